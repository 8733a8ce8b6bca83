//! Where free slots come from and when used ones may be used again.
//!
//! Groups take slots from a stream of two reserved runs, so that a header can name the place of the next header and,
//! one run ahead, where to look for it if that header is damaged. A slot that loses its last reference is
//! *quarantined*: it returns to the allocator only when a checkpoint that no longer refers to it is durable, and when
//! every read that might still be under way to it has ended. So recovery finds every block of the chain intact, and a
//! read never sees the next owner's bytes.

use crate::bitmap::BusyMap;
use crate::layout::{Run, SUPERBLOCK_SLOTS};
use cairn_stdx::planted;
use std::collections::{BTreeSet, VecDeque};

/// Longest run reserved for groups.
const RUN_SLOTS_MAX: u64 = 1024;
/// Slots searched for a long run before a shorter one is taken.
const SEARCH_WINDOW: u64 = 512;

struct Batch {
    slots: Vec<u64>,
    /// Reads with a smaller ordinal may still look at these slots.
    reads_before: u64,
    durable: bool,
}

pub(crate) struct Space {
    pub(crate) busy: BusyMap,
    slot_count: u64,
    cursor: u64,
    meta_cursor: u64,
    pub(crate) current: Run,
    pub(crate) after: Run,
    /// Freed since the last checkpoint snapshot.
    quarantine: Vec<u64>,
    batches: VecDeque<Batch>,
    quarantined: u64,
    reads: BTreeSet<u64>,
    next_read: u64,
}

impl Space {
    pub(crate) fn new(slot_count: u64) -> Self {
        let mut busy = BusyMap::new(slot_count);
        for slot in SUPERBLOCK_SLOTS.iter().flatten() {
            assert!(busy.set(*slot), "superblock slots are distinct");
        }
        Self {
            busy,
            slot_count,
            cursor: 0,
            meta_cursor: slot_count / 2,
            current: Run::default(),
            after: Run::default(),
            quarantine: Vec::new(),
            batches: VecDeque::new(),
            quarantined: 0,
            reads: BTreeSet::new(),
            next_read: 1,
        }
    }

    /// Free slots, not counting the two reserved runs.
    pub(crate) fn free(&self) -> u64 {
        self.busy.free()
    }

    /// Slots waiting for a checkpoint.
    pub(crate) fn quarantined(&self) -> u64 {
        self.quarantined
    }

    /// Longest run worth reserving: short on a small or full disk, so that reservations never starve a checkpoint.
    fn run_target(&self) -> u64 {
        (self.busy.free() / 16).clamp(1, RUN_SLOTS_MAX)
    }

    /// Most slots a group of `slots` slots takes from the free ones, reservations included.
    pub(crate) fn group_cost(&self, slots: u64) -> u64 {
        slots + 2 * self.run_target()
    }

    /// Marks a run as reserved when it is taken over from a header; false when a slot of it is in
    /// use or nothing could follow the next header.
    #[must_use]
    pub(crate) fn adopt(&mut self, current: Run, after: Run) -> bool {
        let fresh = [current, after].iter().all(|run| (run.start..run.end).all(|slot| self.busy.set(slot)));
        self.current = current;
        self.after = after;
        self.cursor = after.end.max(current.end);
        if self.after.is_empty() {
            self.reserve_after();
        }
        fresh && !self.current.is_empty() && self.current.len() + self.after.len() > 1
    }

    fn reserve_after(&mut self) {
        let target = self.run_target();
        self.after = match self.busy.find(self.cursor, SEARCH_WINDOW, target) {
            Some(run) => {
                (run.start..run.end).for_each(|slot| assert!(self.busy.set(slot), "found runs are free"));
                self.cursor = run.end;
                run
            }
            None => Run::default(),
        };
    }

    /// Takes `count` slots in log order and appends them to `out` as runs.
    pub(crate) fn take(&mut self, mut count: u64, out: &mut Vec<Run>) {
        while count > 0 {
            let taken = count.min(self.current.len());
            let run = Run { start: self.current.start, end: self.current.start + taken };
            match out.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => out.push(run),
            }
            self.current.start += taken;
            count -= taken;
            if self.current.is_empty() {
                self.current = self.after;
                self.reserve_after();
                assert!(!self.current.is_empty(), "admission keeps room for the next header");
            }
        }
    }

    /// Allocates `count` slots for a checkpoint, in runs as long as possible.
    pub(crate) fn allocate(&mut self, mut count: u64) -> Vec<u64> {
        let mut slots = Vec::with_capacity(count as usize);
        while count > 0 {
            let run = self.busy.find(self.meta_cursor, SEARCH_WINDOW, count.min(RUN_SLOTS_MAX));
            let run = run.expect("admission keeps room for a checkpoint");
            for slot in run.start..run.end {
                assert!(self.busy.set(slot), "found runs are free");
                slots.push(slot);
            }
            self.meta_cursor = if run.end >= self.slot_count { 0 } else { run.end };
            count -= run.len();
        }
        slots
    }

    /// `slot` lost its last reference.
    pub(crate) fn release(&mut self, slot: u64) {
        assert!(self.busy.get(slot), "slot {slot} released while free");
        self.quarantined += 1;
        self.quarantine.push(slot);
    }

    /// A checkpoint took its snapshot: everything released before it becomes one batch.
    pub(crate) fn snapshot(&mut self) {
        let slots = std::mem::take(&mut self.quarantine);
        self.batches.push_back(Batch { slots, reads_before: self.next_read, durable: false });
        if planted!("store_free_before_checkpoint") {
            self.checkpoint_durable();
        }
    }

    /// The checkpoint is durable: its batch returns as soon as no old read is under way.
    pub(crate) fn checkpoint_durable(&mut self) {
        self.batches.iter_mut().for_each(|batch| batch.durable = true);
        self.recycle();
    }

    fn recycle(&mut self) {
        let oldest_read = self.reads.first().copied().unwrap_or(u64::MAX);
        while let Some(batch) = self.batches.front() {
            let read_free = oldest_read >= batch.reads_before || planted!("store_reuse_under_read");
            if !batch.durable || !read_free {
                return;
            }
            let batch = self.batches.pop_front().expect("looked at above");
            self.quarantined -= batch.slots.len() as u64;
            batch.slots.iter().for_each(|slot| self.busy.clear(*slot));
        }
    }

    /// A read of slots taken from the index begins.
    pub(crate) fn read_begins(&mut self) -> u64 {
        let ordinal = self.next_read;
        self.next_read += 1;
        self.reads.insert(ordinal);
        ordinal
    }

    /// The read ended.
    pub(crate) fn read_ends(&mut self, ordinal: u64) {
        assert!(self.reads.remove(&ordinal), "read {ordinal} ended twice");
        if !self.batches.is_empty() {
            self.recycle();
        }
    }
}
