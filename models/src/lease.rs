//! Leases, epochs, chunk versions, take-over, rebuild: one block on three replicas, two clients, a metadata server.
//!
//! Messages never leave the network: each may be delivered at any time, any number of times. Clients are asleep as long
//! as they like, there is no clock. Data is numbered in the order it is issued; the invariant is that no read returns
//! anything older than what was acknowledged or read before (I3, I5), and that a rebuilt copy is never stale (I7).

use crate::Model;

/// Replicas.
const REPLICAS: usize = 3;
/// Clients.
const CLIENTS: usize = 2;

/// A rule left out on purpose, to see that the model notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mistake {
    /// None.
    None,
    /// Chunk servers do not compare epochs.
    NoEpochCheck,
    /// Chunk servers do not compare versions.
    NoVersionCheck,
    /// A write does not wait for the copy being rebuilt.
    ForgetRebuilding,
    /// A write counts when all but one replica have it.
    AcknowledgeEarly,
    /// A rebuild copies from a replica that may not be current.
    StaleSource,
}

/// The model and its bounds.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// Rule left out.
    pub mistake: Mistake,
    /// Leases granted at most.
    pub epochs_max: u8,
    /// Versions at most.
    pub versions_max: u8,
    /// Writes issued at most.
    pub writes_max: u8,
}

/// What a replica stores: who wrote it, and which data it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Value {
    epoch: u8,
    sequence: u8,
    data: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Replica {
    fence: u8,
    version: u8,
    value: Value,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Client {
    epoch: u8,
    version: u8,
    set: u8,
    /// The set and the copy being rebuilt: where writes go.
    targets: u8,
    ready: bool,
    sequence: u8,
    pending: Option<Value>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Write {
    to: u8,
    version: u8,
    value: Value,
}

/// A state of the model.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    epoch: u8,
    version: u8,
    set: u8,
    rebuilding: Option<u8>,
    replicas: [Replica; REPLICAS],
    clients: [Client; CLIENTS],
    sent: Vec<Write>,
    answered: Vec<Write>,
    issued: u8,
    floor: u8,
    wrong: Option<&'static str>,
}

fn members(set: u8) -> impl Iterator<Item = usize> {
    (0..REPLICAS).filter(move |i| set & (1 << i) != 0)
}

fn insert(list: &mut Vec<Write>, write: Write) {
    if let Err(at) = list.binary_search(&write) {
        list.insert(at, write);
    }
}

impl State {
    fn send(&mut self, client: usize, value: Value) {
        let Client { version, targets, .. } = self.clients[client];
        for to in members(targets) {
            insert(&mut self.sent, Write { to: to as u8, version, value });
        }
        self.clients[client].pending = Some(value);
    }

    fn adopt_map(&mut self, client: usize) {
        self.clients[client].version = self.version;
        self.clients[client].set = self.set;
        self.clients[client].targets = self.set | self.rebuilding.map_or(0, |r| 1 << r);
    }
}

impl Lease {
    fn grants(&self, state: &State, out: &mut Vec<(&'static str, State)>) {
        for client in 0..CLIENTS {
            if state.epoch < self.epochs_max {
                let mut next = state.clone();
                next.epoch += 1;
                next.clients[client] = Client { epoch: next.epoch, ..Client::default() };
                next.adopt_map(client);
                out.push(("grant", next));
            }
        }
    }

    fn holder_steps(&self, state: &State, client: usize, out: &mut Vec<(&'static str, State)>) {
        let me = state.clients[client];
        if me.epoch == 0 {
            return;
        }
        for replica in 0..REPLICAS {
            let copy = state.replicas[replica];
            if !me.ready && copy.fence < me.epoch {
                let mut next = state.clone();
                next.replicas[replica].fence = me.epoch;
                out.push(("fence", next));
            }
            // The holder raises a current replica to the version it has learnt.
            if me.set & (1 << replica) != 0 && copy.fence == me.epoch && copy.version < me.version {
                let mut next = state.clone();
                next.replicas[replica].version = me.version;
                out.push(("raise", next));
            }
            let can_drop = state.set & (1 << replica) != 0 && state.set.count_ones() > 1;
            if me.epoch == state.epoch && can_drop && state.version < self.versions_max {
                let mut next = state.clone();
                next.version += 1;
                next.set &= !(1 << replica);
                next.rebuilding = None;
                next.adopt_map(client);
                out.push(("drop replica", next));
            }
        }
        if me.epoch == state.epoch && me.version < state.version {
            let mut next = state.clone();
            next.adopt_map(client);
            if let Some(value) = me.pending {
                next.send(client, value);
            }
            out.push(("refresh map", next));
        }
        self.take_over(state, client, out);
        self.write_and_read(state, client, out);
    }

    fn take_over(&self, state: &State, client: usize, out: &mut Vec<(&'static str, State)>) {
        let me = state.clients[client];
        let fenced = members(me.set).all(|i| state.replicas[i].fence == me.epoch);
        let at_version = members(me.set).all(|i| state.replicas[i].version == me.version);
        if me.ready || me.epoch != state.epoch || !fenced || !at_version {
            return;
        }
        let best = members(me.set).map(|i| state.replicas[i].value).max().unwrap_or_default();
        let mut next = state.clone();
        next.clients[client].ready = true;
        next.clients[client].sequence = 1;
        next.send(client, Value { epoch: me.epoch, sequence: 1, data: best.data });
        out.push(("reconcile", next));
    }

    fn write_and_read(&self, state: &State, client: usize, out: &mut Vec<(&'static str, State)>) {
        let me = state.clients[client];
        if !me.ready {
            return;
        }
        if let Some(value) = me.pending {
            let has =
                |i: usize| state.answered.binary_search(&Write { to: i as u8, version: me.version, value }).is_ok();
            let needed = if self.mistake == Mistake::ForgetRebuilding { me.set } else { me.targets };
            let missing = members(needed).filter(|&i| !has(i)).count();
            if missing <= usize::from(self.mistake == Mistake::AcknowledgeEarly) {
                let mut next = state.clone();
                next.clients[client].pending = None;
                next.floor = next.floor.max(value.data);
                out.push(("acknowledge", next));
            }
            return;
        }
        if state.issued < self.writes_max {
            let mut next = state.clone();
            next.issued += 1;
            next.clients[client].sequence += 1;
            let value = Value { epoch: me.epoch, sequence: me.sequence + 1, data: next.issued };
            next.send(client, value);
            out.push(("write", next));
        }
        // Verified mode: every member of the set confirms epoch and version in the same round trip.
        let confirmed = members(me.set).all(|i| {
            let copy = state.replicas[i];
            (copy.fence == me.epoch || self.mistake == Mistake::NoEpochCheck)
                && (copy.version == me.version || self.mistake == Mistake::NoVersionCheck)
        });
        if confirmed {
            for replica in members(me.set) {
                let mut next = state.clone();
                let data = state.replicas[replica].value.data;
                if data < state.floor {
                    next.wrong = Some("a read returned something older than what was acknowledged or read before");
                }
                next.floor = next.floor.max(data);
                out.push(("read", next));
            }
        }
    }

    fn deliveries(&self, state: &State, out: &mut Vec<(&'static str, State)>) {
        for write in &state.sent {
            let copy = state.replicas[usize::from(write.to)];
            let epoch_ok = write.value.epoch == copy.fence || self.mistake == Mistake::NoEpochCheck;
            let version_ok = write.version == copy.version || self.mistake == Mistake::NoVersionCheck;
            if !epoch_ok || !version_ok || state.answered.binary_search(write).is_ok() && copy.value >= write.value {
                continue;
            }
            let mut next = state.clone();
            let newer = (write.value.epoch, write.value.sequence) > (copy.value.epoch, copy.value.sequence);
            if newer || self.mistake == Mistake::NoEpochCheck {
                next.replicas[usize::from(write.to)].value = write.value;
            }
            insert(&mut next.answered, *write);
            out.push(("deliver", next));
        }
    }

    /// The metadata server adds a copy back: a new version with a rebuilding replica, raised on all, copied, promoted.
    fn rebuild(&self, state: &State, out: &mut Vec<(&'static str, State)>) {
        match state.rebuilding {
            None => {
                for replica in (0..REPLICAS).filter(|i| state.set & (1 << i) == 0) {
                    if state.version < self.versions_max {
                        let mut next = state.clone();
                        next.version += 1;
                        next.rebuilding = Some(replica as u8);
                        out.push(("begin rebuild", next));
                    }
                }
            }
            Some(target) => {
                for i in members(state.set) {
                    if state.replicas[i].version < state.version {
                        let mut next = state.clone();
                        next.replicas[i].version = state.version;
                        out.push(("raise for rebuild", next));
                    }
                    let current = state.replicas[i].version == state.version || self.mistake == Mistake::StaleSource;
                    let done = state.replicas[usize::from(target)].version == state.version;
                    if current && !done && state.version < self.versions_max {
                        let mut next = state.clone();
                        let source = state.replicas[i];
                        let copy = &mut next.replicas[usize::from(target)];
                        // The target refuses epochs its source has fenced; it takes writes of this version from now on.
                        copy.fence = copy.fence.max(source.fence);
                        copy.version = state.version;
                        copy.value = copy.value.max(source.value);
                        if copy.value.data != source.value.data && source.value.data > copy.value.data {
                            next.wrong = Some("a rebuild kept stale data");
                        }
                        out.push(("copy", next));
                    }
                }
                let raised = members(state.set).all(|i| state.replicas[i].version == state.version);
                if raised
                    && state.replicas[usize::from(target)].version == state.version
                    && state.version < self.versions_max
                {
                    let mut next = state.clone();
                    next.version += 1;
                    next.set |= 1 << target;
                    next.rebuilding = None;
                    for i in members(next.set) {
                        next.replicas[i].version = next.version;
                    }
                    out.push(("promote", next));
                }
            }
        }
    }
}

impl Model for Lease {
    type State = State;

    fn initial(&self) -> State {
        State {
            epoch: 0,
            version: 1,
            set: (1 << REPLICAS) - 1,
            rebuilding: None,
            replicas: [Replica { version: 1, ..Replica::default() }; REPLICAS],
            clients: [Client::default(); CLIENTS],
            sent: Vec::new(),
            answered: Vec::new(),
            issued: 0,
            floor: 0,
            wrong: None,
        }
    }

    fn successors(&self, state: &State, out: &mut Vec<(&'static str, State)>) {
        self.grants(state, out);
        (0..CLIENTS).for_each(|client| self.holder_steps(state, client, out));
        self.deliveries(state, out);
        self.rebuild(state, out);
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        state.wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Verdict, explore};

    /// Bounds wide enough for the mistake to show, narrow enough to finish.
    fn model(mistake: Mistake) -> Lease {
        let (epochs_max, versions_max) = match mistake {
            Mistake::NoVersionCheck | Mistake::StaleSource | Mistake::ForgetRebuilding => (1, 4),
            _ => (2, 2),
        };
        Lease { mistake, epochs_max, versions_max, writes_max: 2 }
    }

    #[test]
    fn no_read_is_stale_however_messages_are_delayed() {
        for (epochs_max, versions_max, writes_max) in [(2, 2, 1), (1, 4, 1), (2, 1, 2)] {
            let model = Lease { mistake: Mistake::None, epochs_max, versions_max, writes_max };
            let verdict = explore(&model, 3_000_000);
            assert!(matches!(verdict, Verdict::Holds(count) if count > 1000), "{model:?}: {verdict:?}");
        }
    }

    #[test]
    fn each_mistake_is_noticed() {
        use Mistake::*;
        for mistake in [NoEpochCheck, NoVersionCheck, ForgetRebuilding, AcknowledgeEarly, StaleSource] {
            let verdict = explore(&model(mistake), 2_000_000);
            assert!(matches!(verdict, Verdict::Broken { .. }), "{mistake:?}: {verdict:?}");
        }
    }
}
