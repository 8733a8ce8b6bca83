//! Durable marks: for one epoch of one volume, up to which sequence everything received here is durable.
//!
//! The mark D promises: every write of the epoch that this server took with a sequence up to D is durable. Writes
//! arrive nearly in order of sequence, so the undurable ones stand in a deque sorted by sequence: appending, finding
//! and dropping cost next to nothing. A write refused and sent again may come with a sequence at or below a mark
//! already given out; it must be durable before it is answered, which [`Marks::must_be_durable`] tells.

use cairn_types::Sequence;
use std::collections::VecDeque;

/// Log sequence number of a write the store has not answered yet.
const IN_FLIGHT: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    sequence: u64,
    /// Number of store writes under way for this sequence.
    in_flight: u32,
    /// Highest log sequence number of its answered parts; [`IN_FLIGHT`] until the first answer.
    lsn: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Marks {
    /// Ascending by sequence; durable ones are dropped from the front when a mark is asked for.
    entries: VecDeque<Entry>,
    /// Highest sequence taken by this process.
    received_max: u64,
    /// Highest sequence of the epoch known at all, recovered tails and copied blocks included.
    seen_max: u64,
    published: u64,
}

impl Marks {
    /// Marks of an epoch whose tail here ends at `seen_max` already. What an earlier process took does not count for
    /// the mark: a power cut may have taken it again, which the lease holder learns from the new boot number.
    pub fn new(seen_max: Sequence) -> Self {
        Self { entries: VecDeque::new(), received_max: 0, seen_max: seen_max.0, published: 0 }
    }

    /// Highest sequence of this epoch that the tail here ever held, before a restart or after, taken or copied: only
    /// writes at or below it can be duplicates.
    pub fn seen_max(&self) -> Sequence {
        Sequence(self.seen_max)
    }

    /// True when a write with this sequence must be durable before it is answered: a mark that covers it is out
    /// already.
    pub fn must_be_durable(&self, sequence: Sequence) -> bool {
        sequence.0 <= self.published
    }

    fn find(&self, sequence: u64) -> Result<usize, usize> {
        match self.entries.back() {
            None => Err(0),
            Some(last) if last.sequence < sequence => Err(self.entries.len()),
            _ => self.entries.binary_search_by_key(&sequence, |entry| entry.sequence),
        }
    }

    /// A rebuild copies what this write wrote, under its mark: it can come again, and is a duplicate then, although
    /// nothing of it was taken here.
    pub fn copied(&mut self, sequence: Sequence) {
        self.seen_max = self.seen_max.max(sequence.0);
    }

    /// True while the store works on a write with this sequence.
    pub fn in_flight(&self, sequence: Sequence) -> bool {
        self.find(sequence.0).is_ok_and(|at| self.entries[at].in_flight > 0)
    }

    /// A write goes to the store.
    pub fn submitted(&mut self, sequence: Sequence) {
        self.received_max = self.received_max.max(sequence.0);
        self.seen_max = self.seen_max.max(sequence.0);
        match self.find(sequence.0) {
            Ok(at) => self.entries[at].in_flight += 1,
            Err(at) => self.entries.insert(at, Entry { sequence: sequence.0, in_flight: 1, lsn: IN_FLIGHT }),
        }
    }

    /// A write came again that was done here before: what is not tracked of it is durable, perhaps since an earlier
    /// process, and the mark may pass it. Without this a write resent after a restart would never settle.
    pub fn repeated(&mut self, sequence: Sequence) {
        self.received_max = self.received_max.max(sequence.0);
    }

    /// The store answered a write: it is durable once the log is durable up to `lsn`; zero for durable already.
    pub fn done(&mut self, sequence: Sequence, lsn: u64) {
        let at = self.find(sequence.0).expect("an answered write was submitted");
        let entry = &mut self.entries[at];
        assert!(entry.in_flight > 0, "each submitted write is answered once");
        entry.in_flight -= 1;
        entry.lsn = if entry.lsn == IN_FLIGHT { lsn } else { entry.lsn.max(lsn) };
    }

    /// The store refused a write: as if it had never come.
    pub fn refused(&mut self, sequence: Sequence) {
        let at = self.find(sequence.0).expect("a refused write was submitted");
        let entry = &mut self.entries[at];
        assert!(entry.in_flight > 0, "each submitted write is answered once");
        entry.in_flight -= 1;
        if entry.in_flight == 0 && entry.lsn == IN_FLIGHT {
            self.entries.remove(at);
        }
    }

    /// The mark to give out, when the log is durable up to `durable_lsn`.
    pub fn publish(&mut self, durable_lsn: u64) -> Sequence {
        while let Some(first) = self.entries.front()
            && first.in_flight == 0
            && first.lsn <= durable_lsn
        {
            self.entries.pop_front();
        }
        let mark = self.entries.front().map_or(self.received_max, |first| first.sequence - 1);
        // An older sequence under way was forced to be durable, so what is out stays true.
        self.published = self.published.max(mark);
        Sequence(self.published)
    }

    /// True when the write of this sequence, answered or under way, is not known to be durable.
    pub fn is_undurable(&self, sequence: Sequence, durable_lsn: u64) -> bool {
        self.find(sequence.0).is_ok_and(|at| self.entries[at].in_flight > 0 || self.entries[at].lsn > durable_lsn)
    }

    /// True when nothing taken in this epoch waits for durability.
    pub fn is_clean(&mut self, durable_lsn: u64) -> bool {
        self.publish(durable_lsn);
        self.entries.is_empty()
    }

    /// True when every write tracked is durable; unlike [`Marks::is_clean`] it changes nothing.
    pub fn all_durable(&self, durable_lsn: u64) -> bool {
        self.entries.iter().all(|entry| entry.in_flight == 0 && entry.lsn <= durable_lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_write_resent_below_a_mark_given_out_must_be_durable() {
        let mut marks = Marks::default();
        marks.submitted(Sequence(5));
        marks.refused(Sequence(5));
        marks.submitted(Sequence(6));
        marks.done(Sequence(6), 1);
        assert_eq!(marks.publish(0), Sequence(5));
        assert!(marks.must_be_durable(Sequence(5)));
        assert!(!marks.must_be_durable(Sequence(6)));
        assert_eq!(marks.publish(1), Sequence(6));
    }

    proptest! {
        /// Against a plain list: every write taken at or below the mark is durable, and the mark is the highest such.
        #[test]
        fn the_mark_is_exact(steps in prop::collection::vec((0u8..5, 1u64..12), 1..200)) {
            let mut marks = Marks::default();
            // Sequence, lsn once answered.
            let mut model: Vec<(u64, Option<u64>)> = Vec::new();
            let (mut lsn, mut durable, mut published, mut highest) = (0u64, 0u64, 0u64, 0u64);
            for (step, number) in steps {
                match step {
                    0 | 1 if !model.iter().any(|(sequence, _)| *sequence == number) && number > published => {
                        marks.submitted(Sequence(number));
                        highest = highest.max(number);
                        model.push((number, None));
                    }
                    2 => if let Some(write) = model.iter_mut().find(|(s, l)| *s == number && l.is_none()) {
                        lsn += 1;
                        write.1 = Some(lsn);
                        marks.done(Sequence(number), lsn);
                    },
                    3 => if let Some(at) = model.iter().position(|(s, l)| *s == number && l.is_none()) {
                        model.remove(at);
                        marks.refused(Sequence(number));
                    },
                    4 => durable = lsn,
                    _ => {}
                }
                let undurable = model.iter().filter(|(_, l)| l.is_none_or(|l| l > durable)).map(|(s, _)| *s).min();
                let expected = undurable.map_or(highest, |s| s - 1).max(published);
                let mark = marks.publish(durable).0;
                prop_assert_eq!(mark, expected);
                prop_assert!(mark >= published);
                published = mark;
            }
        }
    }
}
