//! Which writes are settled (rule 5): acknowledged, and durable on every server they were sent to.
//!
//! The tracker holds every unsettled write of one epoch in order of sequence. The mark `S` is the largest sequence such
//! that every write up to it is acknowledged and each of its servers reported a durable mark at or above it. A server's
//! durable mark is the *latest* it reported, not the highest: it falls when a write arrives late, and only the latest
//! is true of what has been received until now.
//!
//! An acknowledged write is *kept*, with its data, until it is settled: when one of its servers restarts, or a copy
//! joins that may lack it, the write is sent again under its old sequence ([`Tracker::revive`]). So nothing
//! acknowledged is lost while its client lives, even when every server loses power at once, and a flush keeps its
//! promise.
//!
//! A server stays in the set of a write until the write is known to stand in a version without it (the chunk was raised
//! on all others): dropping it earlier would let `S` pass a write that a stale copy lacks and a later resync would not
//! copy.

use super::write::Part;
use std::collections::{BTreeSet, VecDeque};

/// Most replicas of a chunk (R0114).
pub(crate) const SET_MAX: usize = 15;

/// Servers one unsettled write may need: its replicas, those that left and those that joined meanwhile.
const NEEDED_MAX: usize = 2 * SET_MAX;

/// A few servers of the volume, by slot.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct SlotSet {
    len: u8,
    slots: [u16; NEEDED_MAX],
}

impl SlotSet {
    /// Adds a slot unless it is there.
    pub(crate) fn add(&mut self, slot: u16) {
        if !self.contains(slot) {
            assert!((self.len as usize) < NEEDED_MAX, "a write needs at most {NEEDED_MAX} servers");
            self.slots[self.len as usize] = slot;
            self.len += 1;
        }
    }

    /// The slots.
    pub(crate) fn as_slice(&self) -> &[u16] {
        &self.slots[..self.len as usize]
    }

    /// True when `slot` is among them.
    pub(crate) fn contains(&self, slot: u16) -> bool {
        self.as_slice().contains(&slot)
    }

    /// Keeps what `keep` wants.
    pub(crate) fn retain(&mut self, keep: impl Fn(u16) -> bool) {
        let before = *self;
        self.len = 0;
        before.as_slice().iter().filter(|slot| keep(**slot)).for_each(|slot| self.add(*slot));
    }
}

struct Entry {
    servers: SlotSet,
    index: u64,
    bytes: u32,
    acknowledged: bool,
    /// It was acknowledged before, and is being sent again.
    revived: bool,
    /// What to send again, while it is acknowledged.
    kept: Option<Box<Part>>,
    /// Version of the chunk in which it was last sent.
    version: u64,
}

#[derive(Clone, Copy, Default)]
struct Mark {
    durable: u64,
    sent: u64,
}

/// The unsettled writes of one epoch.
pub(crate) struct Tracker {
    base: u64,
    entries: VecDeque<Entry>,
    marks: Vec<Mark>,
    bytes: u64,
}

impl Tracker {
    /// An empty tracker whose first sequence is `first`.
    pub(crate) fn new(first: u64) -> Self {
        assert!(first > 0, "sequences start at 1");
        Self { base: first, entries: VecDeque::new(), marks: Vec::new(), bytes: 0 }
    }

    fn mark(&mut self, slot: u16) -> &mut Mark {
        let slot = slot as usize;
        if slot >= self.marks.len() {
            self.marks.resize(slot + 1, Mark::default());
        }
        &mut self.marks[slot]
    }

    /// Numbers a new write to chunk `index`.
    pub(crate) fn issue(&mut self, index: u64, bytes: u32) -> u64 {
        let servers = SlotSet::default();
        let entry = Entry { servers, index, bytes, acknowledged: false, revived: false, kept: None, version: 0 };
        self.entries.push_back(entry);
        self.bytes += u64::from(bytes);
        self.last()
    }

    /// The last number given.
    pub(crate) fn last(&self) -> u64 {
        self.base + self.entries.len() as u64 - 1
    }

    /// The settled mark.
    pub(crate) fn settled(&self) -> u64 {
        self.base - 1
    }

    /// Number and bytes of unsettled writes.
    pub(crate) fn load(&self) -> (usize, u64) {
        (self.entries.len(), self.bytes)
    }

    fn entry(&mut self, sequence: u64) -> Option<&mut Entry> {
        self.entries.get_mut(usize::try_from(sequence.checked_sub(self.base)?).ok()?)
    }

    /// Write `sequence` goes to the server in `slot`, in this version of its chunk.
    pub(crate) fn sent(&mut self, sequence: u64, slot: u16, version: u64) {
        let entry = self.entry(sequence).expect("an unacknowledged write is not settled");
        entry.servers.add(slot);
        entry.version = version;
        let mark = self.mark(slot);
        mark.sent = mark.sent.max(sequence);
    }

    /// Every replica of the set in force has write `sequence`; `kept` can be sent again.
    pub(crate) fn acknowledge(&mut self, sequence: u64, kept: Option<Box<Part>>) {
        let entry = self.entry(sequence).expect("an unacknowledged write is not settled");
        entry.acknowledged = true;
        entry.revived = false;
        entry.kept = kept;
    }

    /// Takes a write out that is to be sent again; it is unacknowledged from here on, but still counts for flushes.
    pub(crate) fn revive(&mut self, sequence: u64) -> Option<Box<Part>> {
        let entry = self.entry(sequence)?;
        let kept = entry.kept.take()?;
        entry.acknowledged = false;
        entry.revived = true;
        Some(kept)
    }

    /// Acknowledged writes that need the server in `slot`, in order.
    pub(crate) fn kept_on(&self, slot: u16) -> Vec<u64> {
        let wanted = |entry: &Entry| entry.acknowledged && entry.servers.contains(slot);
        self.entries.iter().zip(self.base..).filter(|(entry, _)| wanted(entry)).map(|(_, sequence)| sequence).collect()
    }

    /// Acknowledged writes to chunk `index` of versions before `since`, in order. A copy that joined with that version
    /// has what they wrote, but not in its tail, so a later version change would not mark them there.
    pub(crate) fn kept_before(&self, index: u64, since: u64) -> Vec<u64> {
        let wanted = |entry: &Entry| {
            entry.index == index && entry.acknowledged && entry.version < since && !entry.servers.as_slice().is_empty()
        };
        self.entries.iter().zip(self.base..).filter(|(entry, _)| wanted(entry)).map(|(_, sequence)| sequence).collect()
    }

    /// What a flush of everything up to `sequence` still waits for: servers whose mark is too low for an acknowledged
    /// write, and whether a write is being sent again.
    pub(crate) fn undurable(&self, sequence: u64) -> (BTreeSet<u16>, bool) {
        let count = usize::try_from((sequence + 1).saturating_sub(self.base)).unwrap_or(usize::MAX);
        let (mut slots, mut revived) = (BTreeSet::new(), false);
        for (entry, at) in self.entries.iter().zip(self.base..).take(count) {
            revived |= entry.revived;
            if entry.acknowledged {
                let low = |slot: &&u16| self.marks[**slot as usize].durable < at;
                slots.extend(entry.servers.as_slice().iter().filter(low));
            }
        }
        (slots, revived)
    }

    /// Write `sequence` was refused everywhere: it needs nobody.
    pub(crate) fn void(&mut self, sequence: u64) {
        let entry = self.entry(sequence).expect("a refused write is not settled");
        entry.servers = SlotSet::default();
        entry.acknowledged = true;
        entry.revived = false;
    }

    /// The server in `slot` reported its durable mark.
    pub(crate) fn durable(&mut self, slot: u16, durable: u64) -> bool {
        let mark = self.mark(slot);
        std::mem::replace(&mut mark.durable, durable) != durable
    }

    /// A few lines about the oldest unsettled write and the marks of the servers, for people.
    pub(crate) fn explain(&self) -> impl Iterator<Item = String> {
        let oldest = self.entries.front().map(|entry| {
            format!(
                "oldest unsettled write {}: chunk {}, version {}, {}, needs slots {:?}",
                self.base,
                entry.index,
                entry.version,
                if entry.acknowledged { "acknowledged" } else { "not acknowledged" },
                entry.servers.as_slice()
            )
        });
        let mark = |(slot, mark): (usize, &Mark)| {
            format!("slot {slot}: durable up to {}, sent up to {}", mark.durable, mark.sent)
        };
        oldest.into_iter().chain(self.marks.iter().enumerate().map(mark).collect::<Vec<_>>())
    }

    /// The server in `slot` restarted: what it reported before means nothing.
    pub(crate) fn restarted(&mut self, slot: u16) {
        self.mark(slot).durable = 0;
    }

    /// Writes to chunk `index` need no server outside `keep`: the chunk was raised without it.
    pub(crate) fn retarget(&mut self, index: u64, keep: impl Fn(u16) -> bool) {
        for entry in self.entries.iter_mut().filter(|entry| entry.index == index) {
            entry.servers.retain(&keep);
        }
    }

    /// The chunks `first..end` are gone; their writes need nobody.
    pub(crate) fn drop_chunks(&mut self, first: u64, end: u64) {
        for entry in self.entries.iter_mut().filter(|entry| (first..end).contains(&entry.index)) {
            entry.servers = SlotSet::default();
            entry.kept = None;
        }
    }

    /// Highest sequence sent to the server in `slot`.
    pub(crate) fn sent_to(&self, slot: u16) -> u64 {
        self.marks.get(slot as usize).map_or(0, |mark| mark.sent)
    }

    /// Moves the settled mark as far as it goes and calls `settled` with the chunk of each write it passes.
    pub(crate) fn advance(&mut self, mut settled: impl FnMut(u64)) {
        while let Some(entry) = self.entries.front() {
            let reached = |slot: &u16| self.marks[*slot as usize].durable >= self.base;
            if !entry.acknowledged || !entry.servers.as_slice().iter().all(reached) {
                return;
            }
            self.bytes -= u64::from(entry.bytes);
            settled(entry.index);
            self.entries.pop_front();
            self.base += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Tracker;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[derive(Clone, Debug)]
    enum Step {
        Issue(Vec<u16>),
        Acknowledge(usize),
        Durable(u16, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(0u16..4, 1..4).prop_map(Step::Issue),
            any::<usize>().prop_map(Step::Acknowledge),
            (0u16..4, 0u64..60).prop_map(|(slot, mark)| Step::Durable(slot, mark)),
        ]
    }

    proptest! {
        #[test]
        fn the_mark_is_what_the_rule_says(steps in prop::collection::vec(step(), 1..120)) {
            let mut tracker = Tracker::new(1);
            let mut writes: Vec<(Vec<u16>, bool)> = Vec::new();
            let mut durable: BTreeMap<u16, u64> = BTreeMap::new();
            let mut floor = 0;
            for step in steps {
                match step {
                    Step::Issue(slots) => {
                        let sequence = tracker.issue(0, 4096);
                        slots.iter().for_each(|slot| tracker.sent(sequence, *slot, 1));
                        writes.push((slots, false));
                        prop_assert_eq!(sequence as usize, writes.len());
                    }
                    Step::Acknowledge(which) => {
                        let settled = tracker.settled() as usize;
                        if settled < writes.len() {
                            let at = settled + which % (writes.len() - settled);
                            tracker.acknowledge(at as u64 + 1, None);
                            writes[at].1 = true;
                        }
                    }
                    Step::Durable(slot, mark) => {
                        tracker.durable(slot, mark);
                        durable.insert(slot, mark);
                    }
                }
                tracker.advance(|_| ());
                // The rule, word by word, for what was not settled before: a mark once published stays true although a
                // server's mark falls later, because what fell is younger than what was published.
                let fits = |s: usize| {
                    writes[floor..s].iter().all(|w| w.1)
                        && (0u16..4).all(|slot| {
                            let top = (floor + 1..=s).rev().find(|k| writes[k - 1].0.contains(&slot)).unwrap_or(0);
                            durable.get(&slot).copied().unwrap_or(0) >= top as u64
                        })
                };
                floor = (floor..=writes.len()).rev().find(|s| fits(*s)).expect("the floor itself fits");
                prop_assert_eq!(tracker.settled() as usize, floor);
            }
        }
    }

    #[test]
    fn what_a_restarted_server_reported_counts_no_more() {
        let mut tracker = Tracker::new(1);
        for slot in [0, 1] {
            assert_eq!(tracker.issue(3, 10), u64::from(slot) + 1);
            tracker.sent(u64::from(slot) + 1, slot, 1);
            tracker.acknowledge(u64::from(slot) + 1, None);
        }
        tracker.durable(0, 9);
        tracker.durable(1, 9);
        tracker.restarted(1);
        tracker.advance(|_| ());
        assert_eq!((tracker.settled(), tracker.kept_on(1)), (1, vec![2]));
        assert_eq!(tracker.undurable(2).0, BTreeSet::from([1]));
        tracker.durable(1, 2);
        tracker.advance(|_| ());
        assert_eq!((tracker.settled(), tracker.load()), (2, (0, 0)));
    }

    #[test]
    fn a_flush_may_wait_for_many_more_servers_than_one_chunk_has() {
        let mut tracker = Tracker::new(1);
        for slot in 0..200u16 {
            let sequence = tracker.issue(u64::from(slot), 4096);
            tracker.sent(sequence, slot, 1);
            tracker.acknowledge(sequence, None);
        }
        assert_eq!(tracker.undurable(200).0, (0..200).collect::<BTreeSet<u16>>());
    }
}
