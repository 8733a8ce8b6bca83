//! The read pipeline: reads, scrubs and change lists.

use crate::api::{ChangedRange, Notice, REQUEST_BLOCKS_MAX, ReadData, StoreError, StoreOutput, StoreReply};
use crate::chunks::NOT_CACHED;
use crate::engine::{Engine, Io, Waiter};
use crate::layout::{LEAF_BLOCKS, SLOT, SLOT_U64};
use crate::leaf::Entry;
use cairn_env::{Buf, DiskError, DiskOp};
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_types::{ChunkId, ChunkVersion};

/// Blocks one change list looks at before it returns with a place to go on.
const CHANGED_BLOCKS_MAX: u32 = 16 * LEAF_BLOCKS;
/// CRC-64/NVME of 4096 zero bytes.
pub(crate) const ZERO_BLOCK_CHECKSUM: u64 = 0x6482_d367_eb22_b64e;

/// What is wanted of the blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadKind {
    Data,
    Verify,
    Changed { since: ChunkVersion, limit: u32 },
}

/// A read under way.
pub(crate) struct ReadOp {
    pub token: u64,
    chunk: ChunkId,
    first: u32,
    count: u32,
    block_count: u32,
    kind: ReadKind,
    /// Leaves not in memory yet.
    waiting: u32,
    missing: Vec<u32>,
    error: Option<StoreError>,
    entries: Vec<Entry>,
    /// First block (from `first`) and blocks of each device read.
    runs: Vec<(u32, u32)>,
    pieces: Vec<Option<Buf>>,
    outstanding: u32,
    ordinal: Option<u64>,
}

impl Engine {
    /// Takes a request that reads `count` blocks from `first`.
    pub(crate) fn submit_read(
        &mut self,
        token: u64,
        chunk: ChunkId,
        first: u32,
        count: u32,
        kind: ReadKind,
        out: &mut StoreOutput,
    ) {
        let Some(owner) = self.state.chunks.get(chunk) else {
            out.done.push((token, Err(StoreError::NoChunk { chunk })));
            return;
        };
        let block_count = owner.info.block_count;
        let exact = kind == ReadKind::Data;
        let available = block_count.saturating_sub(first);
        let what = if exact && (count == 0 || count > REQUEST_BLOCKS_MAX) {
            Some("a read has 1 to 256 blocks")
        } else if exact && count > available {
            Some("blocks beyond the end of the chunk")
        } else {
            None
        };
        if let Some(what) = what {
            out.done.push((token, Err(StoreError::Invalid { what })));
            return;
        }
        let most = if matches!(kind, ReadKind::Changed { .. }) { CHANGED_BLOCKS_MAX } else { REQUEST_BLOCKS_MAX };
        let count = count.min(available).min(most);
        let mut read = ReadOp {
            token,
            chunk,
            first,
            count,
            block_count,
            kind,
            waiting: 0,
            missing: Vec::new(),
            error: None,
            entries: Vec::new(),
            runs: Vec::new(),
            pieces: Vec::new(),
            outstanding: 0,
            ordinal: None,
        };
        let id = self.next_read;
        self.next_read += 1;
        for number in read.leaves() {
            read.waiting += u32::from(self.acquire_leaf(chunk, number, Waiter::Read(id), out));
        }
        if read.waiting > 0 {
            self.reads.insert(id, read);
        } else {
            self.start_read(id, read, out);
        }
    }

    pub(crate) fn read_leaf_ready(&mut self, id: u64, number: u32, error: Option<DiskError>, out: &mut StoreOutput) {
        let read = self.reads.get_mut(&id).expect("a waiting read is known");
        read.waiting -= 1;
        if let Some(error) = error {
            read.missing.push(number);
            read.error = Some(StoreError::Io(error));
        }
        if read.waiting == 0 {
            let read = self.reads.remove(&id).expect("looked at above");
            self.start_read(id, read, out);
        }
    }

    /// All leaves are in memory and pinned: copies the entries, lets the leaves go, issues the device reads.
    fn start_read(&mut self, id: u64, mut read: ReadOp, out: &mut StoreOutput) {
        read.entries.reserve(read.count as usize);
        let owner = self.state.chunks.get(read.chunk).expect("a chunk is not deleted while its leaves load");
        let (mut at, end) = (read.first, read.first + read.count);
        while at < end {
            let segment_end = end.min((at / LEAF_BLOCKS + 1) * LEAF_BLOCKS);
            let handle = owner.leaves[(at / LEAF_BLOCKS) as usize].cached;
            if handle == NOT_CACHED {
                read.entries.extend((at..segment_end).map(|_| Entry::default()));
            } else {
                let start = (at % LEAF_BLOCKS) as usize;
                let len = (segment_end - at) as usize;
                read.entries.extend_from_slice(&self.state.cache.get(handle).leaf[start..start + len]);
            }
            at = segment_end;
        }
        for number in read.leaves() {
            if !read.missing.contains(&number) {
                self.release_leaf(read.chunk, number);
            }
        }
        if let Some(error) = read.error.take() {
            out.done.push((read.token, Err(error)));
            return;
        }
        if let ReadKind::Changed { since, limit } = read.kind {
            out.done.push((read.token, Ok(read.changed(since, limit))));
            return;
        }
        read.find_runs();
        if read.runs.is_empty() {
            self.finish_read(read, out);
            return;
        }
        read.ordinal = Some(self.state.space.read_begins());
        read.outstanding = read.runs.len() as u32;
        read.pieces.resize(read.runs.len(), None);
        for (piece, (first, blocks)) in read.runs.iter().enumerate() {
            let slot = read.entries[*first as usize].slot().expect("runs are mapped");
            let op = DiskOp::Read { offset: slot * SLOT_U64, len: *blocks * SLOT as u32 };
            self.issue(Io::Read { read: id, piece: piece as u32 }, op, out);
        }
        self.reads.insert(id, read);
    }

    pub(crate) fn read_done(&mut self, id: u64, piece: u32, result: Result<Buf, DiskError>, out: &mut StoreOutput) {
        let read = self.reads.get_mut(&id).expect("a read in flight is known");
        match result {
            Ok(buf) => read.pieces[piece as usize] = Some(buf),
            Err(error) => {
                out.notices.push(Notice::ReadFailed(error.clone()));
                if read.kind == ReadKind::Data {
                    read.error = Some(StoreError::Io(error));
                }
            }
        }
        read.outstanding -= 1;
        if read.outstanding == 0 {
            let read = self.reads.remove(&id).expect("looked at above");
            self.state.space.read_ends(read.ordinal.expect("device reads have an ordinal"));
            self.finish_read(read, out);
        }
    }

    /// Everything has arrived: verifies and answers.
    fn finish_read(&mut self, mut read: ReadOp, out: &mut StoreOutput) {
        let bad = read.verify();
        if !bad.is_empty() {
            out.notices.push(Notice::Corrupt { chunk: read.chunk, blocks: bad.clone() });
        }
        let result = if read.kind == ReadKind::Verify {
            let end = read.first + read.count;
            Ok(StoreReply::Verified { bad, next: (end < read.block_count).then_some(end) })
        } else if let Some(error) = read.error.take() {
            Err(error)
        } else if !bad.is_empty() {
            Err(StoreError::Corrupt { chunk: read.chunk, blocks: bad })
        } else {
            Ok(StoreReply::Data(read.take_data(&self.zeros)))
        };
        out.done.push((read.token, result));
    }
}

impl ReadOp {
    fn leaves(&self) -> std::ops::Range<u32> {
        if self.count == 0 {
            return 0..0;
        }
        self.first / LEAF_BLOCKS..(self.first + self.count - 1) / LEAF_BLOCKS + 1
    }

    /// Finds runs of blocks whose slots follow one another: one device read each.
    fn find_runs(&mut self) {
        let mut open: Option<(u32, u32, u64)> = None;
        for (i, entry) in self.entries.iter().enumerate() {
            match (entry.slot(), &mut open) {
                (Some(slot), Some((_, blocks, next))) if slot == *next => {
                    *blocks += 1;
                    *next += 1;
                }
                (slot, _) => {
                    self.runs.extend(open.take().map(|(first, blocks, _)| (first, blocks)));
                    open = slot.map(|slot| (i as u32, 1, slot + 1));
                }
            }
        }
        self.runs.extend(open.map(|(first, blocks, _)| (first, blocks)));
    }

    /// Blocks whose data does not match the index, or that the index lost.
    fn verify(&self) -> Vec<u32> {
        let damaged = self.entries.iter().enumerate().filter(|(_, entry)| entry.is_damaged());
        let mut bad: Vec<u32> = damaged.map(|(i, _)| self.first + i as u32).collect();
        for ((first, blocks), piece) in self.runs.iter().zip(&self.pieces) {
            for i in 0..*blocks {
                let expected = self.entries[(first + i) as usize].checksum;
                let good = piece.as_ref().is_some_and(|buf| {
                    crc64(&buf[i as usize * SLOT..(i as usize + 1) * SLOT]) == expected
                        || planted!("store_read_unverified")
                });
                // A block that could not be read at all is an error of the whole read, not a damaged block.
                if !good && (piece.is_some() || self.kind == ReadKind::Verify) {
                    bad.push(self.first + first + i);
                }
            }
        }
        bad.sort_unstable();
        bad
    }

    fn take_data(&mut self, zeros: &Buf) -> ReadData {
        let mut data = Vec::with_capacity(self.runs.len() * 2 + 1);
        let mut at = 0;
        for ((first, blocks), piece) in self.runs.iter().zip(&mut self.pieces) {
            if *first > at {
                data.push(zeros.slice(0, (*first - at) as usize * SLOT));
            }
            data.push(piece.take().expect("verified above"));
            at = first + blocks;
        }
        if at < self.count {
            data.push(zeros.slice(0, (self.count - at) as usize * SLOT));
        }
        let mapped: Vec<bool> = self.entries.iter().map(|entry| entry.slot().is_some()).collect();
        let checksum = |entry: &Entry| if entry.slot().is_some() { entry.checksum } else { ZERO_BLOCK_CHECKSUM };
        ReadData { data, checksums: self.entries.iter().map(checksum).collect(), mapped }
    }

    fn changed(&self, since: ChunkVersion, limit: u32) -> StoreReply {
        let mut ranges: Vec<ChangedRange> = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            if entry.version() <= since {
                continue;
            }
            let block = self.first + i as u32;
            let mapped = entry.slot().is_some() || entry.is_damaged();
            match ranges.last_mut() {
                Some(last) if last.first_block + last.block_count == block && last.mapped == mapped => {
                    last.block_count += 1;
                }
                _ => {
                    if ranges.len() as u32 >= limit.max(1) {
                        return StoreReply::Changed { ranges, next: Some(block) };
                    }
                    ranges.push(ChangedRange { first_block: block, block_count: 1, mapped });
                }
            }
        }
        let end = self.first + self.count;
        StoreReply::Changed { ranges, next: (end < self.block_count).then_some(end) }
    }
}
