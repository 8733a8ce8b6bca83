//! I1 durable, I2 true, I3 fresh and I4 ordered on blocks: the record of everything clients did, and the verdict.
//!
//! Every write carries a [`Stamp`]; a read is decoded back into the stamp it returned. Within one *era* (between two
//! losses of unflushed data that redundancy cannot cover, such as a power cut of every server) histories are
//! linearizable. At the end of an era a block may fall back, but never below its floor: the last write acknowledged
//! before an acknowledged flush began.

use super::zone::{self, BlockOp};
use crate::stamp::Stamp;
use std::collections::{BTreeMap, BTreeSet};

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
    /// What a disk damaged is found before a byte leaves its server, and never copied.
    I10,
    /// After a failed flush nothing depends on the device until it was verified again.
    I12,
    /// Neighbouring releases run mixed, and back again, until the cluster is raised.
    I15,
    /// A full cluster goes on reading and deleting, loses nothing, and what is returned can be used again.
    I16,
    /// The log is kept; equal index, equal state.
    I11,
    /// Live: each operation ends once faults are healed.
    I17,
    /// A retried command takes effect once.
    I18,
    /// One seed, one trace.
    I20,
    /// Findable: metadata made anew from the chunk servers serve every acknowledged, flushed byte.
    I21,
    /// Files hold what was written to them, and end where they were made to end.
    Files,
    /// Names are linearizable.
    Names,
    /// Space accounting equals a full count.
    Accounting,
    /// A core's own assertion.
    Assertion,
}

/// A broken invariant and the evidence.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which one.
    pub invariant: Invariant,
    /// What was seen, in words.
    pub detail: String,
}

/// A block of a volume. Volumes that are written in sectors count sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockKey {
    /// The volume.
    pub volume: u64,
    /// Block within the volume.
    pub block: u64,
}

#[derive(Default)]
struct BlockState {
    /// Values that may be current when the era begins; none recorded: only zeros.
    candidates: Vec<u64>,
    /// Last write acknowledged before an acknowledged flush began: (value, start of the write).
    floor: Option<(u64, u64)>,
}

/// Names an operation in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpId(u64);

struct OpRecord {
    volume: u64,
    first_block: u64,
    values: Vec<u64>,
    write: bool,
    start: u64,
    end: u64,
    /// A write can have taken effect until here: then the volume had another holder, and this one was fenced (I5).
    latest: u64,
    /// The era it began in: a read that was under way when an era ended may have seen what is gone since.
    era: u64,
}

impl OpRecord {
    fn blocks(&self) -> impl Iterator<Item = (BlockKey, BlockOp)> + '_ {
        self.values.iter().enumerate().map(|(i, &value)| {
            let key = BlockKey { volume: self.volume, block: self.first_block + i as u64 };
            (key, BlockOp { write: self.write, value, start: self.start, end: self.end })
        })
    }
}

/// The record of all block operations of a run.
#[derive(Default)]
pub struct Shadow {
    blocks: BTreeMap<BlockKey, BlockState>,
    ops: BTreeMap<OpId, OpRecord>,
    next: u64,
    /// Eras that ended, by volume.
    eras: BTreeMap<u64, u64>,
    /// Writes answered, blocks read and compared: a run that did nothing proves nothing.
    pub writes_acknowledged: u64,
    /// Blocks read and compared.
    pub blocks_read: u64,
}

impl Shadow {
    /// A write (or, with zero values, an unmap) was submitted.
    pub fn write_submitted(&mut self, now: u64, volume: u64, first_block: u64, values: Vec<u64>) -> OpId {
        self.record(OpRecord {
            volume,
            first_block,
            values,
            write: true,
            start: now,
            end: u64::MAX,
            latest: u64::MAX,
            era: self.era(volume),
        })
    }

    /// A read was submitted.
    pub fn read_submitted(&mut self, now: u64, volume: u64, first_block: u64) -> OpId {
        let era = self.era(volume);
        let (end, latest) = (u64::MAX, u64::MAX);
        self.record(OpRecord { volume, first_block, values: Vec::new(), write: false, start: now, end, latest, era })
    }

    /// A compare-and-write that succeeded saw these values.
    pub fn observed(&mut self, start: u64, end: u64, volume: u64, first_block: u64, values: Vec<u64>) {
        let (latest, era) = (u64::MAX, self.era(volume));
        self.record(OpRecord { volume, first_block, values, write: false, start, end, latest, era });
    }

    fn era(&self, volume: u64) -> u64 {
        self.eras.get(&volume).copied().unwrap_or_default()
    }

    fn record(&mut self, op: OpRecord) -> OpId {
        self.next += 1;
        self.ops.insert(OpId(self.next), op);
        OpId(self.next)
    }

    /// A write was acknowledged.
    pub fn write_acknowledged(&mut self, now: u64, op: OpId) {
        self.ops.get_mut(&op).expect("a write in flight outlives its era").end = now;
        self.writes_acknowledged += 1;
    }

    /// A write that was durable before its answer was acknowledged.
    pub fn durable_write_acknowledged(&mut self, now: u64, op: OpId) {
        self.write_acknowledged(now, op);
        let blocks: Vec<_> = self.ops[&op].blocks().collect();
        for (key, block) in blocks {
            self.raise_floor(key, block);
        }
    }

    /// A write failed before anything could have come of it: it was not carried out at all.
    pub fn write_refused(&mut self, op: OpId) {
        self.ops.remove(&op);
    }

    /// A write was answered with an error after it may have been carried out in part: it has taken effect by now, was
    /// taken back, or never will.
    pub fn write_failed(&mut self, now: u64, op: OpId) {
        let op = self.ops.get_mut(&op).expect("a write in flight outlives its era");
        op.latest = op.latest.min(now);
    }

    /// A read was answered with `bytes`, in blocks of `unit` bytes.
    ///
    /// # Errors
    /// I2 when a block holds no stamp of this very block.
    pub fn read_answered(&mut self, now: u64, op: OpId, bytes: &[u8], unit: usize) -> Result<(), Broken> {
        let Some(record) = self.ops.get_mut(&op) else { return Ok(()) };
        record.end = now;
        for (i, block) in bytes.chunks(unit).enumerate() {
            let at = record.first_block + i as u64;
            let value = Stamp::decode(block, record.volume, at).map_err(|why| Broken {
                invariant: Invariant::I2,
                detail: format!("volume {} block {at}, read at {now}: {why}", record.volume),
            })?;
            record.values.push(value);
            self.blocks_read += 1;
        }
        if record.era != self.eras.get(&record.volume).copied().unwrap_or_default() {
            self.ops.remove(&op);
        }
        Ok(())
    }

    /// What a read returned, block by block.
    pub fn values(&self, op: OpId) -> &[u64] {
        self.ops.get(&op).map_or(&[], |op| &op.values)
    }

    fn raise_floor(&mut self, key: BlockKey, op: BlockOp) {
        let state = self.blocks.entry(key).or_default();
        if state.floor.is_none_or(|(_, start)| start < op.start) {
            state.floor = Some((op.value, op.start));
        }
    }

    /// A flush of `volume` that was submitted at `submitted` has been acknowledged: raises the floors. Writes of an era
    /// before are not covered: what was lost with all its replicas cannot be flushed later.
    pub fn flush_acknowledged(&mut self, submitted: u64, volume: u64) {
        let covered = self.ops.values().filter(|op| op.write && op.volume == volume && op.end <= submitted);
        let blocks: Vec<_> = covered.flat_map(OpRecord::blocks).collect();
        for (key, op) in blocks {
            self.raise_floor(key, op);
        }
    }

    /// Unflushed data of a volume may be gone: checks the era that ends, begins a new one. Writes in flight go on in
    /// the new one.
    ///
    /// # Errors
    /// Whatever [`Shadow::check`] finds.
    pub fn end_era(&mut self, volume: u64) -> Result<(), Broken> {
        self.check()?;
        let mut writes: BTreeMap<BlockKey, Vec<BlockOp>> = BTreeMap::new();
        for op in self.ops.values().filter(|op| op.write && op.volume == volume) {
            for (key, block) in op.blocks() {
                writes.entry(key).or_default().push(block);
            }
        }
        // Reads in flight stay known until they are answered, and are then not judged.
        self.ops.retain(|_, op| op.volume != volume || op.end == u64::MAX);
        for (key, ops) in writes {
            let state = self.blocks.entry(key).or_default();
            let floor_start = state.floor.map_or(0, |(_, start)| start);
            let mut candidates = match state.floor {
                Some((value, _)) => vec![value],
                None if state.candidates.is_empty() => vec![0],
                None => std::mem::take(&mut state.candidates),
            };
            // A write that ended before the floor's write began is surely overwritten for good.
            candidates.extend(ops.iter().filter(|op| op.end >= floor_start).map(|op| op.value));
            candidates.sort_unstable();
            candidates.dedup();
            state.candidates = candidates;
        }
        let mine = self.blocks.iter_mut().filter(|(key, _)| key.volume == volume);
        mine.for_each(|(_, state)| state.floor = None);
        *self.eras.entry(volume).or_default() += 1;
        Ok(())
    }

    /// Checks I1 and I3 on everything recorded since the era began.
    ///
    /// # Errors
    /// The first block whose history cannot be.
    pub fn check(&self) -> Result<(), Broken> {
        let mut histories: BTreeMap<BlockKey, Vec<(BlockOp, u64)>> = BTreeMap::new();
        for op in self.ops.values().filter(|op| op.write || (op.end != u64::MAX && op.era == self.era(op.volume))) {
            for (key, block) in op.blocks() {
                histories.entry(key).or_default().push((block, op.latest));
            }
        }
        let zero = vec![0];
        for (key, ops) in &histories {
            let known = self.blocks.get(key).map(|state| &state.candidates);
            let allowed = known.filter(|candidates| !candidates.is_empty()).unwrap_or(&zero);
            let plain: Vec<BlockOp> = ops.iter().map(|(op, _)| *op).collect();
            check_block(&plain, allowed).map_err(|(invariant, why)| Broken {
                invariant,
                detail: format!("{key:?}: {why}\nhistory: {plain:?}"),
            })?;
            if ops.iter().any(|(op, latest)| *latest < op.end) {
                let fenced = fenced(ops);
                check_block(&fenced, allowed).map_err(|(_, why)| Broken {
                    invariant: Invariant::I5,
                    detail: format!(
                        "{key:?}: a write took effect after its holder was fenced: {why}\nhistory: {ops:?}"
                    ),
                })?;
            }
        }
        Ok(())
    }

    /// Another client holds `volume` now: writes without an answer, but for `its`, have taken effect or never will
    /// (I5).
    pub fn taken_over(&mut self, now: u64, volume: u64, its: &[OpId]) {
        let unanswered = |op: &OpRecord| op.write && op.volume == volume && op.end == u64::MAX && op.latest == u64::MAX;
        let fenced = self.ops.iter_mut().filter(|(id, op)| unanswered(op) && !its.contains(id));
        fenced.for_each(|(_, op)| op.latest = now);
    }
}

/// The history with every write that surely happened ending where its holder was fenced: it was answered, or read.
/// Zeros do not tell which write they come from, so unanswered ones stay as they are.
fn fenced(ops: &[(BlockOp, u64)]) -> Vec<BlockOp> {
    let read: BTreeSet<u64> = ops.iter().filter(|(op, _)| !op.write).map(|(op, _)| op.value).collect();
    let happened = |op: &BlockOp| op.end != u64::MAX || (op.value != 0 && read.contains(&op.value));
    let end = |op: &BlockOp, latest: u64| if op.write && happened(op) { op.end.min(latest) } else { op.end };
    ops.iter().map(|(op, latest)| BlockOp { end: end(op, *latest), ..*op }).collect()
}

/// Judges the history of one block that began with one of `allowed`.
fn check_block(ops: &[BlockOp], allowed: &[u64]) -> Result<(), (Invariant, String)> {
    let written: BTreeMap<u64, BlockOp> =
        ops.iter().filter(|op| op.write && op.value != 0).map(|op| (op.value, *op)).collect();
    let zero_writes: Vec<BlockOp> = ops.iter().filter(|op| op.write && op.value == 0).copied().collect();
    let mut initial: Option<u64> = None;
    // Zeros are not unique where a block was unmapped. Without the zeros a linearizable history is still one, and its
    // other values are unique; the zeros are judged by themselves.
    let mut unique: Vec<BlockOp> = Vec::with_capacity(ops.len());
    let mut zero_reads: Vec<BlockOp> = Vec::new();
    for op in ops {
        if op.write {
            unique.extend((op.value != 0).then_some(*op));
        } else if written.contains_key(&op.value) {
            unique.push(*op);
        } else if op.value == 0 && !zero_writes.is_empty() {
            zero_reads.push(*op);
        } else {
            if !allowed.contains(&op.value) {
                let why = format!("read {:#x}, but only {allowed:x?} can have survived", op.value);
                return Err((Invariant::I1, why));
            }
            if *initial.get_or_insert(op.value) != op.value {
                let why = format!("two different old values read: {initial:x?} and {:#x}", op.value);
                return Err((Invariant::I3, why));
            }
            unique.push(BlockOp { value: 0, ..*op });
        }
    }
    zone::check(&unique).map_err(|violation| (Invariant::I3, format!("{violation:?}")))?;
    check_zeros(&zero_writes, &zero_reads, &unique, &written, allowed.contains(&0) && initial.is_none_or(|v| v == 0))
        .map_err(|why| (Invariant::I3, why))
}

/// Zeros read must come from an unmap (or the beginning) that no later write surely replaced; other values must not be
/// read after an unmap that surely replaced them.
fn check_zeros(
    zero_writes: &[BlockOp],
    zero_reads: &[BlockOp],
    unique: &[BlockOp],
    written: &BTreeMap<u64, BlockOp>,
    began_with_zeros: bool,
) -> Result<(), String> {
    for read in zero_reads {
        let replaced = |since: u64| written.values().any(|write| since < write.start && write.end < read.start);
        let from_start = began_with_zeros && !written.values().any(|write| write.end < read.start);
        if !from_start && !zero_writes.iter().any(|zero| zero.start < read.end && !replaced(zero.end)) {
            return Err(format!("zeros read though surely overwritten: {read:?}"));
        }
    }
    for read in unique.iter().filter(|op| !op.write) {
        let begun = written.get(&read.value).map_or(0, |write| write.end);
        if let Some(zero) = zero_writes.iter().find(|zero| begun < zero.start && zero.end < read.start) {
            return Err(format!("{read:?} returned what {zero:?} had zeroed"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::Stamp;
    use cairn_types::BLOCK_SIZE;

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
        shadow.end_era(5).unwrap();
        let r = shadow.read_submitted(6, 5, 0);
        shadow.read_answered(7, r, &bytes(5, 0, 11), BLOCK_SIZE).unwrap();
        shadow.check().unwrap();
        let r = shadow.read_submitted(8, 5, 0);
        shadow.read_answered(9, r, &bytes(5, 0, 12), BLOCK_SIZE).unwrap();
        assert_eq!(shadow.check().unwrap_err().invariant, Invariant::I3, "it may be either, but not change");
    }

    #[test]
    fn a_write_that_shows_after_its_holder_was_fenced_breaks_i5() {
        let history = |fenced_at: u64| {
            let mut shadow = Shadow::default();
            let _late = shadow.write_submitted(1, 5, 0, vec![11]);
            shadow.taken_over(fenced_at, 5, &[]);
            let mine = shadow.write_submitted(20, 5, 0, vec![12]);
            shadow.write_acknowledged(21, mine);
            let r = shadow.read_submitted(22, 5, 0);
            shadow.read_answered(23, r, &bytes(5, 0, 11), BLOCK_SIZE).unwrap();
            shadow.check().map_err(|broken| broken.invariant)
        };
        assert_eq!((history(10), history(22)), (Err(Invariant::I5), Ok(())));
    }

    #[test]
    fn losing_flushed_data_breaks_i1() {
        let mut shadow = Shadow::default();
        let a = shadow.write_submitted(1, 5, 0, vec![11]);
        shadow.write_acknowledged(2, a);
        shadow.flush_acknowledged(3, 5);
        shadow.end_era(5).unwrap();
        let r = shadow.read_submitted(6, 5, 0);
        shadow.read_answered(7, r, &[0; BLOCK_SIZE], BLOCK_SIZE).unwrap();
        assert_eq!(shadow.check().unwrap_err().invariant, Invariant::I1);
    }

    #[test]
    fn another_blocks_data_breaks_i2() {
        let mut shadow = Shadow::default();
        let r = shadow.read_submitted(6, 5, 1);
        assert_eq!(shadow.read_answered(7, r, &bytes(5, 0, 11), BLOCK_SIZE).unwrap_err().invariant, Invariant::I2);
    }

    fn history(ops: &[(bool, u64, u64, u64)]) -> Result<(), Broken> {
        let mut shadow = Shadow::default();
        for &(write, value, start, end) in ops {
            if write {
                let op = shadow.write_submitted(start, 5, 0, vec![value]);
                if end != u64::MAX {
                    shadow.write_acknowledged(end, op);
                }
            } else {
                shadow.observed(start, end, 5, 0, vec![value]);
            }
        }
        shadow.check()
    }

    #[test]
    fn unmapped_blocks_are_judged_though_zeros_are_not_unique() {
        // Unmapped, then written: zeros afterwards are stale.
        assert!(history(&[(true, 1, 1, 2), (true, 0, 3, 4), (false, 0, 5, 6)]).is_ok());
        assert!(history(&[(true, 1, 1, 2), (true, 0, 3, 4), (false, 1, 5, 6)]).is_err());
        assert!(history(&[(true, 0, 1, 2), (true, 1, 3, 4), (false, 0, 5, 6)]).is_err());
        assert!(history(&[(true, 1, 1, 2), (true, 0, 3, u64::MAX), (false, 1, 5, 6), (false, 0, 7, 8)]).is_ok());
        assert!(history(&[(true, 0, 1, 2), (true, 0, 3, 4), (true, 7, 5, 6), (false, 7, 7, 8)]).is_ok());
    }

    #[test]
    fn operations_in_flight_outlive_the_era() {
        let mut shadow = Shadow::default();
        let a = shadow.write_submitted(1, 5, 0, vec![11]);
        let r = shadow.read_submitted(2, 5, 0);
        shadow.end_era(5).unwrap();
        shadow.write_acknowledged(5, a);
        shadow.read_answered(6, r, &bytes(5, 0, 0), BLOCK_SIZE).unwrap();
        shadow.observed(7, 8, 5, 0, vec![11]);
        shadow.check().unwrap();
        shadow.observed(9, 10, 5, 0, vec![0]);
        shadow.check().unwrap_err();
    }
}
