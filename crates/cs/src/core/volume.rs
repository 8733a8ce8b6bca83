//! What the server keeps in memory of a volume with traffic.

use super::control::Control;
use super::data::DataCall;
use super::rebuild::RepairWrite;
use crate::links::Caller;
use crate::marks::Marks;
use cairn_store::Store;
use cairn_types::{Duration, Epoch, Instant, Sequence, VolumeId};
use std::collections::VecDeque;

/// What stands in line behind a control operation.
#[derive(Debug)]
pub(super) enum Waiting {
    /// A write or unmap of a client, already admitted.
    Data(DataCall),
    /// One that came after a later write of the same blocks: waits until the store has answered every write.
    Late(DataCall),
    /// Blocks a rebuild copied.
    Repair(RepairWrite),
    /// Another control operation.
    Control(Control),
}

/// Whether the holder flushes after each write, as databases do with their logs. Then the device flush begins when the
/// write is answered and is under way, or over, when the request for it arrives: a round trip less to wait for.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Habit {
    /// Writes answered since the last flush was asked for.
    writes: u32,
    /// How often in a row there was exactly one.
    rounds: u32,
}

impl Habit {
    /// So many rounds make a habit. A wrong guess costs one flush and ends it.
    const ROUNDS_MIN: u32 = 4;

    /// A write is answered; true when a flush is to be expected.
    pub(super) fn written(&mut self) -> bool {
        self.writes += 1;
        self.writes == 1 && self.rounds >= Self::ROUNDS_MIN
    }

    /// A flush is asked for.
    pub(super) fn flushed(&mut self) {
        self.rounds = if self.writes == 1 { self.rounds.saturating_add(1) } else { 0 };
        self.writes = 0;
    }
}

/// State of one volume.
#[derive(Debug)]
pub(super) struct Volume {
    /// The highest epoch known durably; zero when none was ever fenced here.
    pub fenced: Epoch,
    /// The highest epoch asked for: everything below is refused already while the fence is on its way to the disk.
    pub floor: Epoch,
    /// The epoch before `fenced`.
    pub previous: Epoch,
    /// Writes at the store.
    pub writes: u32,
    /// Control operations at the store.
    pub controls: u32,
    /// First in, first out; bounded by the windows of the links.
    pub waiting: VecDeque<Waiting>,
    /// Durable marks of `fenced`.
    pub marks: Marks,
    /// Settled mark of `fenced`, as the holder tells it.
    pub settled: Sequence,
    /// The part of it the store knows.
    pub settle_sent: Sequence,
    /// On the list of volumes with a mark to tell.
    pub settle_queued: bool,
    /// Repeated requests of writes still under way; answered with them.
    pub twins: Vec<(Sequence, Caller)>,
    /// Does a flush follow each write?
    pub habit: Habit,
    /// Last time something was asked of it.
    pub touched: Instant,
}

impl Volume {
    /// The state as the store knows it.
    pub(super) fn load(store: &Store, id: VolumeId, now: Instant) -> Self {
        let fenced = store.fence(id).unwrap_or(Epoch(0));
        let (settled_epoch, settled) = store.settled(id);
        let settled = if settled_epoch == fenced { settled } else { Sequence(0) };
        Self {
            fenced,
            floor: fenced,
            previous: fenced,
            writes: 0,
            controls: 0,
            waiting: VecDeque::new(),
            marks: marks_of(store, id, fenced),
            settled,
            settle_sent: settled,
            settle_queued: false,
            twins: Vec::new(),
            habit: Habit::default(),
            touched: now,
        }
    }

    /// True while writes have to stand in line.
    pub(super) fn is_held(&self) -> bool {
        self.controls > 0 || !self.waiting.is_empty()
    }

    /// True when the state can be dropped and loaded again later without anybody noticing.
    pub(super) fn is_idle(&self, now: Instant, after: Duration, durable_lsn: u64) -> bool {
        self.writes == 0
            && !self.is_held()
            && !self.settle_queued
            && self.twins.is_empty()
            && self.marks_clean(durable_lsn)
            && now.saturating_since(self.touched) >= after
    }

    fn marks_clean(&self, durable_lsn: u64) -> bool {
        self.marks.all_durable(durable_lsn)
    }
}

/// Marks of an epoch as the tail in the store tells them. It can hold writes of an epoch that is only being fenced now:
/// a rebuild copied them.
pub(super) fn marks_of(store: &Store, id: VolumeId, epoch: Epoch) -> Marks {
    let seen = store.tail(id).filter(|entry| entry.epoch == epoch).map(|entry| entry.sequence).max();
    Marks::new(seen.unwrap_or(Sequence(0)))
}

#[cfg(test)]
mod tests {
    use super::Habit;

    #[test]
    fn a_habit_takes_four_rounds_and_the_first_exception_ends_it() {
        let mut habit = Habit::default();
        for _ in 0..4 {
            assert!(!habit.written(), "too early to tell");
            habit.flushed();
        }
        assert!(habit.written());
        assert!(!habit.written(), "a second write: the guess was wrong");
        habit.flushed();
        assert!(!habit.written());
    }
}
