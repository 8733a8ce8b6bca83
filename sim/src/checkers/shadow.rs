//! I1 durable, I2 true, I3 fresh and I4 ordered on blocks: the record of everything clients did, and the verdict.
//!
//! Every write carries a [`Stamp`]; a read is decoded back into the stamp it returned. Within one *era* (between two
//! losses of unflushed data that redundancy cannot cover, such as a power cut of every server) histories are linearizable.
//! At the end of an era a block may fall back, but never below its floor: the last write acknowledged before an
//! acknowledged flush began.

use super::zone::{self, BlockOp};
use crate::stamp::Stamp;
use std::collections::BTreeMap;

/// What is checked, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Acknowledged and flushed data survives.
    I1,
    /// A read returns bytes of one write to that very block.
    I2,
    /// Linearizable per block.
    I3,
    /// Barriers order what survives a cut.
    I4,
    /// No write of a fenced epoch becomes visible.
    I5,
    /// One holder at a time.
    I6,
    /// Only the current version serves.
    I7,
    /// Replicas identical after convergence.
    I8,
    /// The log is kept; equal index, equal state.
    I11,
    /// Live: each operation ends once faults are healed.
    I17,
    /// A retried command takes effect once.
    I18,
    /// One seed, one trace.
    I20,
    /// Space accounting equals a full count.
    Accounting,
}

/// A broken invariant and the evidence.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which one.
    pub invariant: Invariant,
    /// What was seen, in words.
    pub detail: String,
}

/// A block of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockKey {
    /// The volume.
    pub volume: u64,
    /// Block within the volume.
    pub block: u64,
}

#[derive(Default)]
struct BlockHistory {
    /// Operations of the current era.
    ops: Vec<BlockOp>,
    /// Values that may be current when the era begins.
    candidates: Vec<u64>,
    /// Last write acknowledged before an acknowledged flush began: (value, start of the write).
    floor: Option<(u64, u64)>,
}

/// Names an operation in the record.
#[derive(Clone, Copy, Debug)]
pub struct OpId(usize);

struct OpRecord {
    volume: u64,
    first_block: u64,
    values: Vec<u64>,
    write: bool,
    start: u64,
    end: u64,
    /// Positions in the block histories, as long as the era lasts.
    era: u64,
}

/// The record of all block operations of a run.
#[derive(Default)]
pub struct Shadow {
    blocks: BTreeMap<BlockKey, BlockHistory>,
    ops: Vec<OpRecord>,
    era: u64,
    /// Writes answered, reads checked: a run that did nothing proves nothing.
    pub writes_acknowledged: u64,
    /// Blocks read and compared.
    pub blocks_read: u64,
}

impl Shadow {
    /// A write (or, with zero values, an unmap) was submitted.
    pub fn write_submitted(&mut self, now: u64, volume: u64, first_block: u64, values: Vec<u64>) -> OpId {
        self.record(OpRecord { volume, first_block, values, write: true, start: now, end: u64::MAX, era: self.era })
    }

    /// A read was submitted.
    pub fn read_submitted(&mut self, now: u64, volume: u64, first_block: u64) -> OpId {
        let era = self.era;
        self.record(OpRecord { volume, first_block, values: Vec::new(), write: false, start: now, end: u64::MAX, era })
    }

    fn record(&mut self, op: OpRecord) -> OpId {
        self.ops.push(op);
        OpId(self.ops.len() - 1)
    }

    /// A write was acknowledged.
    pub fn write_acknowledged(&mut self, now: u64, op: OpId) {
        self.ops[op.0].end = now;
        self.writes_acknowledged += 1;
    }

    /// A read was answered with `bytes`, one entry per block.
    ///
    /// # Errors
    /// I2 when a block holds no stamp of this very block.
    pub fn read_answered(&mut self, now: u64, op: OpId, bytes: &[u8]) -> Result<(), Broken> {
        let record = &mut self.ops[op.0];
        record.end = now;
        for (i, block) in bytes.chunks(cairn_types::BLOCK_SIZE).enumerate() {
            let at = record.first_block + i as u64;
            let value = Stamp::decode(block, record.volume, at).map_err(|why| Broken {
                invariant: Invariant::I2,
                detail: format!("volume {} block {at}, read at {now}: {why}", record.volume),
            })?;
            record.values.push(value);
            self.blocks_read += 1;
        }
        Ok(())
    }

    /// A flush of `volume` that was submitted at `submitted` has been acknowledged: raises the floors.
    pub fn flush_acknowledged(&mut self, submitted: u64, volume: u64) {
        for op in self.ops.iter().filter(|op| op.write && op.volume == volume && op.end <= submitted) {
            for (i, &value) in op.values.iter().enumerate() {
                let key = BlockKey { volume, block: op.first_block + i as u64 };
                let history = self.blocks.entry(key).or_default();
                if history.floor.is_none_or(|(_, start)| start < op.start) {
                    history.floor = Some((value, op.start));
                }
            }
        }
    }

    /// Unflushed data may be gone: checks the era that ends, begins a new one.
    ///
    /// # Errors
    /// Whatever [`Shadow::check`] finds.
    pub fn end_era(&mut self) -> Result<(), Broken> {
        self.check()?;
        for op in self.ops.drain(..).filter(|op| op.write) {
            for (i, &value) in op.values.iter().enumerate() {
                let key = BlockKey { volume: op.volume, block: op.first_block + i as u64 };
                let history = self.blocks.entry(key).or_default();
                history.ops.push(BlockOp { write: true, value, start: op.start, end: op.end });
            }
        }
        for history in self.blocks.values_mut() {
            let mut candidates: Vec<u64> = Vec::new();
            let floor_start = history.floor.map_or(0, |(_, start)| start);
            match history.floor {
                Some((value, _)) => candidates.push(value),
                None if history.candidates.is_empty() => candidates.push(0),
                None => candidates.append(&mut history.candidates),
            }
            // A write that ended before the floor's write began is surely overwritten for good.
            let later = history.ops.drain(..).filter(|op| op.end >= floor_start).map(|op| op.value);
            candidates.extend(later);
            candidates.dedup();
            history.candidates = candidates;
            history.floor = None;
        }
        self.era += 1;
        Ok(())
    }

    /// Checks I1 and I3 on everything recorded since the era began.
    ///
    /// # Errors
    /// The first block whose history cannot be.
    pub fn check(&self) -> Result<(), Broken> {
        let mut histories: BTreeMap<BlockKey, Vec<BlockOp>> = BTreeMap::new();
        for op in &self.ops {
            for (i, &value) in op.values.iter().enumerate() {
                let key = BlockKey { volume: op.volume, block: op.first_block + i as u64 };
                let entry = BlockOp { write: op.write, value, start: op.start, end: op.end };
                histories.entry(key).or_default().push(entry);
            }
        }
        for (key, ops) in &mut histories {
            self.settle_initial_value(*key, ops)?;
            zone::check(ops).map_err(|violation| Broken {
                invariant: Invariant::I3,
                detail: format!("{key:?}: {violation:?}\nhistory: {ops:?}"),
            })?;
        }
        Ok(())
    }

    /// After an era ended a block holds one of its candidates; the first read that returns one decides which.
    fn settle_initial_value(&self, key: BlockKey, ops: &mut [BlockOp]) -> Result<(), Broken> {
        let empty = Vec::new();
        let candidates = self.blocks.get(&key).map_or(&empty, |history| &history.candidates);
        let zero = [0];
        let allowed: &[u64] = if candidates.is_empty() { &zero } else { candidates };
        let written: std::collections::BTreeSet<u64> = ops.iter().filter(|op| op.write).map(|op| op.value).collect();
        let mut initial: Option<u64> = None;
        for op in ops.iter_mut().filter(|op| !op.write && op.end != u64::MAX && !written.contains(&op.value)) {
            if !allowed.contains(&op.value) {
                return Err(Broken {
                    invariant: Invariant::I1,
                    detail: format!("{key:?}: read {:#x}, but only {allowed:x?} can have survived", op.value),
                });
            }
            if *initial.get_or_insert(op.value) != op.value {
                return Err(Broken {
                    invariant: Invariant::I3,
                    detail: format!("{key:?}: two different old values read: {initial:x?} and {:#x}", op.value),
                });
            }
            op.value = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::Stamp;

    fn bytes(volume: u64, block: u64, value: u64) -> Vec<u8> {
        Stamp::encode(volume, block, value).to_vec()
    }

    #[test]
    fn flushed_data_must_survive_a_cut_and_unflushed_data_may() {
        let mut shadow = Shadow::default();
        let a = shadow.write_submitted(1, 5, 0, vec![11]);
        shadow.write_acknowledged(2, a);
        shadow.flush_acknowledged(3, 5);
        let b = shadow.write_submitted(4, 5, 0, vec![12]);
        shadow.write_acknowledged(5, b);
        shadow.end_era().unwrap();
        let r = shadow.read_submitted(6, 5, 0);
        shadow.read_answered(7, r, &bytes(5, 0, 11)).unwrap();
        shadow.check().unwrap();
        let r = shadow.read_submitted(8, 5, 0);
        shadow.read_answered(9, r, &bytes(5, 0, 12)).unwrap();
        assert_eq!(shadow.check().unwrap_err().invariant, Invariant::I3, "it may be either, but not change");
    }

    #[test]
    fn losing_flushed_data_breaks_i1() {
        let mut shadow = Shadow::default();
        let a = shadow.write_submitted(1, 5, 0, vec![11]);
        shadow.write_acknowledged(2, a);
        shadow.flush_acknowledged(3, 5);
        shadow.end_era().unwrap();
        let r = shadow.read_submitted(6, 5, 0);
        shadow.read_answered(7, r, &[0; cairn_types::BLOCK_SIZE]).unwrap();
        assert_eq!(shadow.check().unwrap_err().invariant, Invariant::I1);
    }

    #[test]
    fn another_blocks_data_breaks_i2() {
        let mut shadow = Shadow::default();
        let r = shadow.read_submitted(6, 5, 1);
        assert_eq!(shadow.read_answered(7, r, &bytes(5, 0, 11)).unwrap_err().invariant, Invariant::I2);
    }
}
