//! Names are linearizable: what clients that work on the same few names were told fits one order of their calls.
//!
//! Every file has an inode number of its own, but names move, so unlike blocks this needs a search: the history is
//! walked in time with the set of all states it may be in, and a call is carried out at the latest when it is answered.
//! Calls that were never answered may take effect at any later time, or never.
//! Source: Lowe, "Testing for linearizability", Concurrency and Computation 29(4), 2017 (just-in-time linearization).

use std::collections::BTreeSet;

/// Names that clients share.
pub const NAMES: usize = 4;
/// Beyond this many states at once the check gives up: too many calls were never answered.
const STATES_MAX: usize = 50_000;

/// What a client asks of the shared names; numbers are names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameOp {
    /// Makes a file, unless there is one.
    Create(usize),
    /// Which file it is.
    Lookup(usize),
    /// Removes the file.
    Unlink(usize),
    /// Gives the file of the first the second name, replacing what has it.
    Rename(usize, usize),
}

/// What it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameResult {
    /// The file made or found.
    Inode(u64),
    /// Done.
    Done,
    /// There is no such name.
    Missing,
    /// There is one already.
    Exists,
    /// Nothing was done, whatever there is.
    Refused,
}

/// A call; times are the simulator's true time.
#[derive(Clone, Copy, Debug)]
pub struct NameCall {
    /// What was asked.
    pub op: NameOp,
    /// When.
    pub begun: u64,
    /// When it was answered, and how; none when it never was.
    pub ended: Option<(u64, NameResult)>,
}

/// Number of a call in its history.
pub type CallId = usize;

/// The file that has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum File {
    Known(u64),
    /// Made by a call that was never answered; its number is not known before somebody looks.
    MadeBy(CallId),
}

type State = [Option<File>; NAMES];

/// A state the names may be in, and the calls under way that have taken effect in it.
type Branch = (State, BTreeSet<CallId>);

/// All calls on the shared names.
#[derive(Default)]
pub struct Names {
    calls: Vec<NameCall>,
}

impl Names {
    /// A call begins.
    pub fn begin(&mut self, now: u64, op: NameOp) -> CallId {
        self.calls.push(NameCall { op, begun: now, ended: None });
        self.calls.len() - 1
    }

    /// It was answered.
    pub fn end(&mut self, now: u64, call: CallId, result: NameResult) {
        self.calls[call].ended = Some((now, result));
    }

    /// Looks for an order of all calls. Names are free at first.
    ///
    /// # Errors
    /// The call whose answer fits no order, with what the names may have been before it.
    pub fn check(&self) -> Result<(), String> {
        check(&self.calls)
    }
}

/// See [`Names::check`].
fn check(calls: &[NameCall]) -> Result<(), String> {
    // Beginnings before endings of the same instant: then both orders are tried.
    let mut events: Vec<(u64, bool, CallId)> = Vec::new();
    for (call, NameCall { begun, ended, .. }) in calls.iter().enumerate() {
        events.push((*begun, false, call));
        events.extend(ended.map(|(at, _)| (at, true, call)));
    }
    events.sort_unstable();
    let made = |call: &NameCall| match (call.op, call.ended) {
        (NameOp::Create(_), Some((_, NameResult::Inode(inode)))) => Some(inode),
        _ => None,
    };
    let search = Search { calls, made: calls.iter().filter_map(made).collect() };
    let mut open: BTreeSet<CallId> = BTreeSet::new();
    let mut branches: BTreeSet<Branch> = BTreeSet::from([([None; NAMES], BTreeSet::new())]);
    for (_, ends, call) in events {
        if !ends {
            open.insert(call);
            continue;
        }
        let mut next = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for branch in &branches {
            search.carry_out(branch.clone(), call, &open, &mut seen, &mut next);
        }
        if next.is_empty() {
            let before: BTreeSet<&State> = branches.iter().map(|(state, _)| state).collect();
            let under_way: Vec<_> = open.iter().map(|call| (*call, calls[*call])).collect();
            return Err(format!(
                "call {call}, {:?}, fits no order; the names may have been {before:?}; under way: {under_way:?}",
                calls[call]
            ));
        }
        if next.len() > STATES_MAX {
            return Ok(());
        }
        open.remove(&call);
        branches = next;
    }
    Ok(())
}

struct Search<'a> {
    calls: &'a [NameCall],
    /// Numbers of files whose making was answered.
    made: BTreeSet<u64>,
}

impl Search<'_> {
    /// Every branch after `call`, which is being answered, has taken effect, among any others that are open.
    fn carry_out(
        &self,
        (state, done): Branch,
        call: CallId,
        open: &BTreeSet<CallId>,
        seen: &mut BTreeSet<Branch>,
        found: &mut BTreeSet<Branch>,
    ) {
        if !seen.insert((state, done.clone())) {
            return;
        }
        if done.contains(&call) {
            let mut rest = done;
            rest.remove(&call);
            found.insert((state, rest));
            return;
        }
        for other in open.iter().filter(|other| !done.contains(other)) {
            let Some(after) = self.apply(&state, *other) else { continue };
            // What is never answered and changes nothing need not have happened.
            if after == state && self.calls[*other].ended.is_none() {
                continue;
            }
            let mut done = done.clone();
            done.insert(*other);
            self.carry_out((after, done), call, open, seen, found);
        }
    }

    /// The names after a call; none when it would have been answered differently.
    fn apply(&self, state: &State, call: CallId) -> Option<State> {
        let NameCall { op, ended, .. } = self.calls[call];
        let result = ended.map(|(_, result)| result);
        let fits = |would: NameResult| result.is_none_or(|told| told == would);
        let mut after = *state;
        if result == Some(NameResult::Refused) {
            return Some(after);
        }
        match op {
            NameOp::Create(name) if state[name].is_some() => return fits(NameResult::Exists).then_some(after),
            NameOp::Create(name) => {
                after[name] = Some(match result {
                    None => File::MadeBy(call),
                    Some(NameResult::Inode(inode)) => File::Known(inode),
                    Some(_) => return None,
                });
            }
            NameOp::Lookup(name) | NameOp::Unlink(name) | NameOp::Rename(name, _) if state[name].is_none() => {
                return fits(NameResult::Missing).then_some(after);
            }
            NameOp::Lookup(name) => match (state[name], result) {
                (Some(File::Known(file)), Some(NameResult::Inode(told))) if file == told => {}
                (Some(file @ File::MadeBy(_)), Some(NameResult::Inode(told))) if !self.made.contains(&told) => {
                    let one = after.iter_mut().find(|other| **other == Some(file)).expect("a file has one name");
                    *one = Some(File::Known(told));
                }
                (_, None) => {}
                _ => return None,
            },
            NameOp::Unlink(name) if fits(NameResult::Done) => after[name] = None,
            NameOp::Rename(from, to) if fits(NameResult::Done) => after[to] = after[from].take(),
            NameOp::Unlink(_) | NameOp::Rename(..) => return None,
        }
        Some(after)
    }
}

#[cfg(test)]
mod tests;
