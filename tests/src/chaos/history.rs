//! The record of what real clients did to one volume, and the verdict: I1 durable, I2 true, I3 fresh, I5 fenced.
//!
//! The simulator's stamps and its checker of zones judge it. A record goes from one read-back of every block to the
//! next: what was found there, once judged, is where the next one begins. So a write of before that shows up later is
//! seen as a value nobody wrote.

use crate::process;
use cairn_sim::checkers::zone::{self, BlockOp};
use cairn_sim::stamp::Stamp;
use std::collections::BTreeMap;
use std::time::Instant;

/// Size of a block.
pub const BLOCK_SIZE: usize = 4096;

/// What a block read as that holds zeros although something was there when the record began.
const LOST: u64 = u64::MAX - 1;

struct Op {
    first_block: u64,
    values: Vec<u64>,
    write: bool,
    start: u64,
    end: u64,
    /// A write has taken effect until here or never will: then a later front end had the volume.
    latest: u64,
    /// The front end it was given to, counted from one start of a front end to the next.
    incarnation: u64,
}

/// Names an operation of the present record.
#[derive(Clone, Copy, Debug)]
pub struct OpId(usize);

/// The record of one volume.
pub struct History {
    volume: u64,
    begun: Instant,
    last_time: u64,
    next_value: u64,
    ops: Vec<Op>,
    /// What each block held when the record began.
    base: BTreeMap<u64, u64>,
    /// The last write of a block that was durable by an answer: its value and start.
    floors: BTreeMap<u64, (u64, u64)>,
    unflushed: Vec<OpId>,
    newest_incarnation: u64,
    /// Answered writes, blocks compared, answered flushes, operations that failed.
    pub counts: Counts,
}

/// What was done: a run that did nothing proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Writes answered.
    pub writes: u64,
    /// Blocks read and compared.
    pub blocks_read: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Operations without an answer, or with an error.
    pub failed: u64,
}

impl Counts {
    /// True when enough was done to be judged.
    pub fn are_enough(&self) -> bool {
        self.writes >= 100 && self.blocks_read >= 100 && self.flushes > 0
    }
}

impl History {
    /// Nothing written yet.
    pub fn new(volume: u64) -> Self {
        Self {
            volume,
            begun: process::now(),
            last_time: 0,
            next_value: 1,
            ops: Vec::new(),
            base: BTreeMap::new(),
            floors: BTreeMap::new(),
            unflushed: Vec::new(),
            newest_incarnation: 0,
            counts: Counts::default(),
        }
    }

    /// A time later than all before; the checker wants no ties.
    pub fn now(&mut self) -> u64 {
        self.last_time = (self.begun.elapsed().as_nanos() as u64).max(self.last_time + 1);
        self.last_time
    }

    /// A write of `count` blocks is about to be sent; gives its bytes.
    pub fn write_begins(&mut self, first_block: u64, count: u64, incarnation: u64) -> (OpId, Vec<u8>) {
        let values: Vec<u64> = (self.next_value..self.next_value + count).collect();
        self.next_value += count;
        let mut bytes = vec![0; count as usize * BLOCK_SIZE];
        for (index, (out, value)) in bytes.chunks_exact_mut(BLOCK_SIZE).zip(&values).enumerate() {
            Stamp::fill(out, self.volume, first_block + index as u64, *value);
        }
        let start = self.now();
        let (end, latest) = (u64::MAX, u64::MAX);
        self.ops.push(Op { first_block, values, write: true, start, end, latest, incarnation });
        (OpId(self.ops.len() - 1), bytes)
    }

    /// A write was answered; with `durable` it is safe at once.
    pub fn write_answered(&mut self, id: OpId, durable: bool) {
        self.ops[id.0].end = self.now();
        self.counts.writes += 1;
        if durable { self.raise_floors(id) } else { self.unflushed.push(id) }
    }

    fn raise_floors(&mut self, id: OpId) {
        let op = &self.ops[id.0];
        for (index, value) in op.values.iter().enumerate() {
            let floor = self.floors.entry(op.first_block + index as u64).or_insert((*value, op.start));
            if floor.1 < op.start {
                *floor = (*value, op.start);
            }
        }
    }

    /// A flush that was sent at `sent` was answered.
    pub fn flush_answered(&mut self, sent: u64) {
        self.counts.flushes += 1;
        let (covered, rest): (Vec<OpId>, Vec<OpId>) =
            std::mem::take(&mut self.unflushed).into_iter().partition(|id| self.ops[id.0].end <= sent);
        self.unflushed = rest;
        covered.into_iter().for_each(|id| self.raise_floors(id));
    }

    /// A read sent at `sent` was answered.
    ///
    /// # Errors
    /// I2, in words: a block holds no stamp of itself.
    pub fn read_answered(
        &mut self,
        first_block: u64,
        sent: u64,
        bytes: &[u8],
        incarnation: u64,
    ) -> Result<Vec<u64>, String> {
        let mut values = Vec::new();
        for (block, bytes) in (first_block..).zip(bytes.chunks(BLOCK_SIZE)) {
            let value = Stamp::decode(bytes, self.volume, block)
                .map_err(|why| format!("I2: volume {} block {block}: {why}", self.volume))?;
            values.push(value);
        }
        self.counts.blocks_read += values.len() as u64;
        let (end, latest) = (self.now(), u64::MAX);
        self.ops.push(Op { first_block, values: values.clone(), write: false, start: sent, end, latest, incarnation });
        if incarnation > self.newest_incarnation {
            // The volume is in other hands since some moment before this answer.
            self.newest_incarnation = incarnation;
            let older = |op: &&mut Op| op.write && op.incarnation < incarnation && op.end == u64::MAX;
            self.ops.iter_mut().filter(older).for_each(|op| op.latest = op.latest.min(end));
        }
        Ok(values)
    }

    /// Blocks something was ever written to.
    pub fn blocks(&self) -> Vec<u64> {
        let written = self.ops.iter().filter(|op| op.write);
        let mut all: Vec<u64> =
            written.flat_map(|op| (op.first_block..).take(op.values.len())).chain(self.base.keys().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn by_block(&self) -> BTreeMap<u64, Vec<BlockOp>> {
        let read: std::collections::BTreeSet<u64> =
            self.ops.iter().filter(|op| !op.write).flat_map(|op| op.values.iter().copied()).collect();
        let mut histories: BTreeMap<u64, Vec<BlockOp>> = BTreeMap::new();
        for op in &self.ops {
            for (block, value) in (op.first_block..).zip(&op.values) {
                let base = self.base.get(&block).copied().unwrap_or_default();
                // The checker takes 0 for what was there at first.
                let value = match *value {
                    value if value == base => 0,
                    0 => LOST,
                    value => value,
                };
                let happened = op.write && read.contains(&value);
                let end = if happened { op.end.min(op.latest) } else { op.end };
                histories.entry(block).or_default().push(BlockOp { write: op.write, value, start: op.start, end });
            }
        }
        histories
    }

    /// Judges all that is recorded.
    ///
    /// # Errors
    /// In words, the first block whose history cannot be.
    pub fn check(&self) -> Result<(), String> {
        for (block, ops) in self.by_block() {
            zone::check(&ops)
                .map_err(|why| format!("I1/I3/I5: volume {} block {block}: {why:?}\nhistory: {ops:#?}", self.volume))?;
        }
        Ok(())
    }

    /// Everything died at once: what was found afterwards, block by block, must be the last durable write or a later
    /// one. The record begins anew with it.
    ///
    /// # Errors
    /// In words, the first block that fell back too far.
    pub fn died_and_found(&mut self, found: &BTreeMap<u64, u64>) -> Result<(), String> {
        let mut allowed: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for block in self.blocks() {
            let first = self.floors.get(&block).map(|floor| floor.0);
            let base = self.base.get(&block).copied().unwrap_or_default();
            allowed.insert(block, vec![first.unwrap_or(base)]);
        }
        for op in self.ops.iter().filter(|op| op.write) {
            for (block, value) in (op.first_block..).zip(&op.values) {
                if self.floors.get(&block).is_none_or(|floor| op.end >= floor.1) {
                    allowed.entry(block).or_default().push(*value);
                }
            }
        }
        for (block, allowed) in allowed {
            let value = found.get(&block).copied().unwrap_or_default();
            if !allowed.contains(&value) {
                return Err(format!(
                    "I1: volume {} block {block}: {value} was found after everything died; allowed is {allowed:?}",
                    self.volume
                ));
            }
        }
        self.begin_anew(found);
        Ok(())
    }

    /// The record begins anew with what was found while nothing else went on.
    pub fn begin_anew(&mut self, found: &BTreeMap<u64, u64>) {
        self.base.extend(found);
        self.ops.clear();
        self.unflushed.clear();
        self.floors.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(history: &mut History, block: u64, incarnation: u64) -> (OpId, Vec<u8>) {
        history.write_begins(block, 1, incarnation)
    }

    fn read(history: &mut History, block: u64, bytes: &[u8], incarnation: u64) {
        let sent = history.now();
        history.read_answered(block, sent, bytes, incarnation).expect("a whole stamp");
    }

    #[test]
    fn a_lost_write_is_seen() {
        let mut history = History::new(1);
        let (id, bytes) = write(&mut history, 5, 1);
        history.write_answered(id, false);
        read(&mut history, 5, &bytes, 1);
        assert!(history.check().is_ok());
        read(&mut history, 5, &[0; BLOCK_SIZE], 1);
        assert!(history.check().is_err());
    }

    #[test]
    fn a_write_that_shows_up_after_its_front_end_was_replaced_is_seen() {
        let mut history = History::new(1);
        let (_, late) = write(&mut history, 5, 1);
        read(&mut history, 5, &[0; BLOCK_SIZE], 1);
        assert!(history.check().is_ok());
        read(&mut history, 5, &[0; BLOCK_SIZE], 2);
        read(&mut history, 5, &[0; BLOCK_SIZE], 2);
        assert!(history.check().is_ok());
        read(&mut history, 5, &late, 2);
        assert!(history.check().is_err());
    }

    #[test]
    fn only_what_was_not_flushed_may_be_lost_with_everything() {
        let mut history = History::new(1);
        let (first, _) = write(&mut history, 5, 1);
        history.write_answered(first, false);
        let sent = history.now();
        history.flush_answered(sent);
        let (second, _) = write(&mut history, 5, 1);
        history.write_answered(second, false);
        assert!(history.died_and_found(&BTreeMap::from([(5, 0)])).is_err());
        assert!(history.died_and_found(&BTreeMap::from([(5, 1)])).is_ok());
        let old = Stamp::encode(1, 5, 2);
        read(&mut history, 5, &old, 2);
        assert!(history.check().is_err(), "what was lost does not come back");
    }
}
