//! Names are linearizable: what clients that work on the same few names were told fits one order of their calls.
//!
//! Every file has an inode number of its own, but names move, so unlike blocks this needs a search: the history is
//! walked in time with the set of all states it may be in, and a call is carried out at the latest when it is answered.
//! Calls that were never answered may take effect at any later time, or never.
//! Source: Lowe, "Testing for linearizability", Concurrency and Computation 29(4), 2017 (just-in-time linearization).
//!
//! Killed clients leave many calls without an answer, each of which doubles what may have happened. Four facts keep
//! the search small and lose nothing:
//!
//! - Calls without an answer that ask the same are interchangeable, so a branch counts how many of each kind it spent.
//! - They need not happen, so of two branches that otherwise agree, the one that spent less can do all the other can.
//! - A file made by such a call has a number nobody knows, and one name, so two of them are told apart by name only.
//! - A call carried out just before the one being answered that could as well come just after it is put off: it is
//!   still open, and the branch without it can do whatever the branch with it can.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names that clients share.
pub const NAMES: usize = 4;
/// With more branches at once than this, a history is not judged: too many calls were never answered.
const BRANCHES_MAX: usize = 100_000;
/// With more branches than this in all its answers together, neither.
const SEARCHED_MAX: usize = 3_000_000;
/// What a call can ask: to create or unlink a name, or to rename one to another. Lookups change nothing.
const KINDS: usize = 2 * NAMES + NAMES * NAMES;

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

/// What the search says of a history that it does not refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// There is an order that explains every answer.
    Fits,
    /// The search was given up at its bounds.
    NotJudged,
}

/// The file that has a name; it never has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum File {
    Known(u64),
    /// Made by a call that was never answered; its number is not known before somebody looks.
    Unknown,
}

type State = [Option<File>; NAMES];

/// How many calls of each kind took effect that were never answered.
type Spent = [u16; KINDS];

/// A state the names may be in, and the calls that have taken effect in it and will be answered later, in order.
type Place = (State, Vec<CallId>);

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
    pub fn check(&self) -> Result<Judgement, String> {
        check(&self.calls, BRANCHES_MAX, SEARCHED_MAX)
    }
}

/// The kind of a call, unless it changes nothing.
fn kind(op: NameOp) -> Option<usize> {
    match op {
        NameOp::Create(name) => Some(name),
        NameOp::Unlink(name) => Some(NAMES + name),
        NameOp::Rename(from, to) => Some(2 * NAMES + from * NAMES + to),
        NameOp::Lookup(_) => None,
    }
}

/// Branches, of which none can do all that another can: for each place what was spent on the way, the least only, and
/// whether the last step there can be put off.
#[derive(Default)]
struct Branches {
    places: BTreeMap<Place, Vec<(Spent, bool)>>,
    count: usize,
}

impl Branches {
    /// Adds a branch; false when it is there or one that spent less is.
    fn insert(&mut self, place: &Place, spent: Spent, later: bool) -> bool {
        let no_more = |one: &Spent, other: &Spent| one.iter().zip(other).all(|(one, other)| one <= other);
        let Some(all) = self.places.get_mut(place) else {
            self.places.insert(place.clone(), vec![(spent, later)]);
            self.count += 1;
            return true;
        };
        if let Some((least, is_later)) = all.iter_mut().find(|(least, _)| no_more(least, &spent)) {
            *is_later |= later && *least == spent;
            return false;
        }
        let before = all.len();
        all.retain(|(least, _)| !no_more(&spent, least));
        all.push((spent, later));
        self.count = self.count + all.len() - before;
        true
    }

    fn contains(&self, place: &Place, spent: &Spent) -> bool {
        self.places.get(place).is_some_and(|all| all.iter().any(|(least, _)| least == spent))
    }
}

/// See [`Names::check`].
fn check(calls: &[NameCall], branches_max: usize, searched_max: usize) -> Result<Judgement, String> {
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
    let made = calls.iter().filter_map(made).collect();
    let mut search = Search { calls, made, open: BTreeSet::new(), lost: BTreeMap::new(), branches_max };
    let mut branches = Branches::default();
    branches.insert(&([None; NAMES], Vec::new()), [0; KINDS], false);
    let mut searched = 0;
    for (_, ends, call) in events {
        if !ends {
            search.begin(call);
            continue;
        }
        let Some((next, visited)) = search.answer(&branches, call) else { return Ok(Judgement::NotJudged) };
        if next.count == 0 {
            let before: BTreeSet<&State> = branches.places.keys().map(|(state, _)| state).collect();
            let under_way: Vec<_> = search.open.iter().map(|call| (*call, calls[*call])).collect();
            let lost: Vec<_> = search.lost.values().map(|(op, many)| (*op, *many)).collect();
            return Err(format!(
                "call {call}, {:?}, fits no order; the names may have been {before:?}; under way: {under_way:?}; \
                 never answered: {lost:?}",
                calls[call]
            ));
        }
        searched += visited;
        if searched > searched_max {
            return Ok(Judgement::NotJudged);
        }
        search.open.remove(&call);
        branches = next;
    }
    Ok(Judgement::Fits)
}

struct Search<'a> {
    calls: &'a [NameCall],
    /// Numbers of files whose making was answered.
    made: BTreeSet<u64>,
    /// Calls under way that will be answered.
    open: BTreeSet<CallId>,
    /// Calls that began and never are: by kind, what they ask and how many they are.
    lost: BTreeMap<usize, (NameOp, u16)>,
    branches_max: usize,
}

impl Search<'_> {
    fn begin(&mut self, call: CallId) {
        let NameCall { op, ended, .. } = self.calls[call];
        if ended.is_some() {
            self.open.insert(call);
        } else if let Some(kind) = kind(op) {
            self.lost.entry(kind).or_insert((op, 0)).1 += 1;
        }
    }

    /// Every branch after `call`, which is being answered, has taken effect, among any others that are open, and how
    /// many were visited; none when they are too many.
    fn answer(&self, branches: &Branches, call: CallId) -> Option<(Branches, usize)> {
        let mut next = Branches::default();
        let mut seen = Branches::default();
        let mut queue = VecDeque::new();
        for (place, all) in &branches.places {
            let (state, done) = place;
            for (spent, _) in all {
                if done.contains(&call) {
                    let rest = done.iter().copied().filter(|other| *other != call).collect();
                    next.insert(&(*state, rest), *spent, false);
                } else if seen.insert(place, *spent, false) {
                    queue.push_back((place.clone(), *spent));
                }
            }
        }
        // What comes before it, in any order.
        while let Some((place, spent)) = queue.pop_front() {
            if !seen.contains(&place, &spent) {
                continue;
            }
            let (state, done) = &place;
            let mut go = |to: Place, spent: Spent, later: bool| {
                if seen.insert(&to, spent, later) {
                    queue.push_back((to, spent));
                }
            };
            let first = self.call(state, call);
            for other in self.open.iter().filter(|other| **other != call && !done.contains(other)) {
                let Some(after) = self.call(state, *other) else { continue };
                let later = first.is_some_and(|first| self.call(&first, *other) == self.call(&after, call));
                let mut done = done.clone();
                done.insert(done.partition_point(|before| before < other), *other);
                go((after, done), spent, later);
            }
            for (kind, (op, _)) in self.lost.iter().filter(|(kind, (_, many))| spent[**kind] < *many) {
                let Some(after) = self.apply(state, *op, None).filter(|after| after != state) else { continue };
                let later = first.is_some_and(|first| self.apply(&first, *op, None) == self.call(&after, call));
                let mut spent = spent;
                spent[*kind] += 1;
                go((after, done.clone()), spent, later);
            }
            if seen.count > self.branches_max {
                return None;
            }
        }
        for ((state, done), all) in &seen.places {
            let Some(after) = self.call(state, call) else { continue };
            let place = (after, done.clone());
            for (spent, _) in all.iter().filter(|(_, later)| !later) {
                next.insert(&place, *spent, false);
            }
        }
        Some((next, seen.count))
    }

    /// The names after a call that is answered; none when it would have been answered differently.
    fn call(&self, state: &State, call: CallId) -> Option<State> {
        let NameCall { op, ended, .. } = self.calls[call];
        self.apply(state, op, ended.map(|(_, result)| result))
    }

    /// The names after what was asked; none when the answer would have been another than this.
    fn apply(&self, state: &State, op: NameOp, result: Option<NameResult>) -> Option<State> {
        let fits = |would: NameResult| result.is_none_or(|told| told == would);
        let mut after = *state;
        if result == Some(NameResult::Refused) {
            return Some(after);
        }
        match op {
            NameOp::Create(name) if state[name].is_some() => return fits(NameResult::Exists).then_some(after),
            NameOp::Create(name) => {
                after[name] = Some(match result {
                    None => File::Unknown,
                    Some(NameResult::Inode(inode)) => File::Known(inode),
                    Some(_) => return None,
                });
            }
            NameOp::Lookup(name) | NameOp::Unlink(name) | NameOp::Rename(name, _) if state[name].is_none() => {
                return fits(NameResult::Missing).then_some(after);
            }
            NameOp::Lookup(name) => match (state[name], result) {
                (Some(File::Known(file)), Some(NameResult::Inode(told))) if file == told => {}
                (Some(File::Unknown), Some(NameResult::Inode(told))) if !self.made.contains(&told) => {
                    after[name] = Some(File::Known(told));
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
