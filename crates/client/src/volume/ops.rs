//! Operations as users ask them: checked, locked, cut into parts, put together again.
//!
//! An operation goes through at most two stages: *reading* what it needs (the partial blocks at the ends of an
//! unaligned write, what a compare-and-write compares, a block to copy) and *acting*. Its range lock covers both, so
//! nobody sees the middle.

use super::Volume;
use super::write::{Body, Part, ReadPart, WritePart};
use crate::config::{REPAIRS_MAX, SizeRule};
use crate::core::Completion;
use crate::io::Ctx;
use cairn_env::block::{BlockDone, BlockError, BlockOp, BlockReply, BlockResult, Extent};
use cairn_env::{Buf, BufMut};
use cairn_types::{BLOCK_SIZE, BLOCK_SIZE_U64};
use cairn_wire::data::DATA_BLOCKS_MAX;
use cairn_wire::mds::{LeaseMode, MdsError, MdsReply, MdsRequest};

/// Byte ranges end below this.
const RANGE_END_MAX: u64 = 1 << 62;
/// Chunks an extents query looks at in one round.
const EXTENT_CHUNKS: u64 = 32;
/// Longest compare-and-write.
const COMPARE_MAX: usize = 4 << 20;

/// Who wants the outcome.
pub(crate) enum Done {
    User(BlockDone),
    /// The flush of a closing handle.
    Closed(Box<dyn FnOnce()>),
    /// The idle flush.
    Idle,
    /// A rewrite of damaged blocks.
    Repair,
    /// A step of the reconciliation.
    Reconcile,
    /// Takes back the write of this part.
    Undo(u64),
}

impl Done {
    /// Queues the user's callback.
    pub(super) fn finish(self, ctx: &mut Ctx<'_>, result: BlockResult) {
        match self {
            Self::User(done) => ctx.done.push(Completion::Block(done, result)),
            Self::Closed(done) => ctx.done.push(Completion::Closed(done)),
            Self::Idle | Self::Repair | Self::Reconcile | Self::Undo(_) => {}
        }
    }
}

pub(super) enum Kind {
    Read {
        offset: u64,
        len: u64,
    },
    Write {
        offset: u64,
        data: Buf,
        fua: bool,
    },
    Zero {
        offset: u64,
        len: u64,
        fua: bool,
    },
    Compare {
        offset: u64,
        compare: Buf,
        data: Buf,
        fua: bool,
    },
    Extents {
        offset: u64,
        len: u64,
        next: u64,
    },
    Flush {
        waiting: Vec<u16>,
        upto: u64,
    },
    /// Reads blocks of one chunk, from `sources` first, and writes them to every replica.
    Copy {
        block: u64,
        count: u32,
        unmap: bool,
        /// What is read as zeros is unmapped instead of written.
        zeros_as_holes: bool,
        sources: Vec<u16>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Queued,
    Reading,
    Acting,
}

pub(super) struct Op {
    pub kind: Kind,
    stage: Stage,
    locked: bool,
    /// Belongs to the reconciliation: not held back while the volume is paused.
    pub internal: bool,
    /// Parts and calls unanswered.
    pub left: u32,
    pub error: Option<BlockError>,
    pub(super) pieces: Vec<Option<Buf>>,
    pub extents: Vec<Extent>,
    pub done: Done,
}

/// Blocks `first..end` that cover bytes.
fn cover(offset: u64, len: u64) -> (u64, u64) {
    (offset / BLOCK_SIZE_U64, (offset + len).div_ceil(BLOCK_SIZE_U64))
}

/// Takes whole blocks from the front of a list of buffers.
fn take_blocks(pieces: &mut std::collections::VecDeque<Buf>, count: u32) -> Vec<Buf> {
    let mut wanted = count as usize * BLOCK_SIZE;
    let mut taken = Vec::with_capacity(1);
    while wanted > 0 {
        let piece = pieces.pop_front().expect("the pieces cover the range");
        if piece.len() <= wanted {
            wanted -= piece.len();
            taken.push(piece);
        } else {
            pieces.push_front(piece.slice(wanted, piece.len() - wanted));
            taken.push(piece.slice(0, wanted));
            wanted = 0;
        }
    }
    taken
}

/// The block at `at` of a list of pieces read in order.
fn gather(pieces: &[Option<Buf>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    pieces.iter().for_each(|piece| bytes.extend_from_slice(piece.as_ref().expect("every piece was read")));
    bytes
}

impl Volume {
    /// Takes an operation of a user.
    pub(crate) fn submit(&mut self, ctx: &mut Ctx<'_>, op: BlockOp, done: BlockDone) {
        self.last_traffic = ctx.io.now;
        let kind = match self.check(op) {
            Ok(Some(kind)) => kind,
            Ok(None) => {
                ctx.done.push(Completion::Block(done, Ok(BlockReply::Done)));
                return;
            }
            Err(Ok(reply)) => {
                ctx.done.push(Completion::Block(done, Ok(reply)));
                return;
            }
            Err(Err(error)) => {
                ctx.done.push(Completion::Block(done, Err(error)));
                return;
            }
        };
        self.add_op(ctx, kind, Done::User(done), false);
        self.pump(ctx);
    }

    /// What to do; nothing; an answer at once.
    fn check(&self, op: BlockOp) -> Result<Option<Kind>, Result<BlockReply, BlockError>> {
        if let Some(error) = self.death() {
            return Err(Err(error.clone()));
        }
        if self.is_releasing() {
            return Err(Err(BlockError::Closed));
        }
        let (offset, len, writes) = match &op {
            BlockOp::Flush => return Ok(Some(Kind::Flush { waiting: Vec::new(), upto: 0 })),
            BlockOp::Read { offset, len } => (*offset, u64::from(*len), false),
            BlockOp::Extents { offset, len } => (*offset, *len, false),
            BlockOp::Write { offset, data, .. } => (*offset, data.len() as u64, true),
            BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len, .. } => (*offset, *len, true),
            BlockOp::CompareAndWrite { offset, compare, data, .. } => {
                if compare.len() != data.len() || data.len() > COMPARE_MAX {
                    let why = "compare-and-write wants two buffers of one length, at most 4 MiB";
                    return Err(Err(BlockError::Other(why.to_owned())));
                }
                (*offset, data.len() as u64, true)
            }
        };
        let size = if self.rule == SizeRule::File { RANGE_END_MAX } else { self.size };
        if offset > size || len > size - offset {
            return Err(Err(BlockError::OutOfRange { offset, len, size }));
        }
        if writes && self.mode != LeaseMode::Exclusive {
            return Err(Err(BlockError::ReadOnly));
        }
        if len == 0 {
            return match op {
                BlockOp::Read { .. } => Err(Ok(BlockReply::Data(Vec::new()))),
                BlockOp::Extents { .. } => Err(Ok(BlockReply::Extents(Vec::new()))),
                _ => Ok(None),
            };
        }
        Ok(Some(match op {
            BlockOp::Read { offset, .. } => Kind::Read { offset, len },
            BlockOp::Write { offset, data, fua } => Kind::Write { offset, data, fua },
            BlockOp::Discard { offset, len } => Kind::Zero { offset, len, fua: false },
            BlockOp::WriteZeroes { offset, len, fua } => Kind::Zero { offset, len, fua },
            BlockOp::CompareAndWrite { offset, compare, data, fua } => Kind::Compare { offset, compare, data, fua },
            BlockOp::Extents { offset, len } => Kind::Extents { offset, len, next: offset / BLOCK_SIZE_U64 },
            BlockOp::Flush => unreachable!("answered above"),
        }))
    }

    /// Queues an operation behind those it overlaps.
    pub(super) fn add_op(&mut self, ctx: &mut Ctx<'_>, kind: Kind, done: Done, internal: bool) -> u64 {
        let id = self.next_op;
        self.next_op += 1;
        let lock = match &kind {
            Kind::Read { offset, len } | Kind::Extents { offset, len, .. } => Some((cover(*offset, *len), false)),
            Kind::Write { offset, data, .. } | Kind::Compare { offset, data, .. } => {
                Some((cover(*offset, data.len() as u64), true))
            }
            Kind::Zero { offset, len, .. } => Some((cover(*offset, *len), true)),
            Kind::Flush { .. } => None,
            // The reconciliation runs alone.
            Kind::Copy { .. } if internal => None,
            Kind::Copy { block, count, .. } => Some(((*block, *block + u64::from(*count)), true)),
        };
        let op = Op {
            kind,
            stage: Stage::Queued,
            locked: lock.is_some(),
            internal,
            left: 0,
            error: None,
            pieces: Vec::new(),
            extents: Vec::new(),
            done,
        };
        self.ops.insert(id, op);
        let free = lock.is_none_or(|((first, end), exclusive)| self.locks.acquire(id, first, end, exclusive));
        if free {
            self.start_op(ctx, id);
        }
        id
    }

    /// Begins an operation whose lock is held.
    pub(super) fn start_op(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        if self.paused && !op.internal {
            self.held_ops.push_back(id);
            return;
        }
        op.stage = Stage::Reading;
        // One more than the parts, so that a part that ends at once does not end the operation.
        op.left = 1;
        match &op.kind {
            Kind::Flush { .. } => {
                self.start_flush(ctx, id);
                return;
            }
            Kind::Read { offset, len } => {
                let (first, end) = cover(*offset, *len);
                op.stage = Stage::Acting;
                self.add_reads(ctx, id, first, end, &[]);
            }
            Kind::Compare { offset, data, .. } => {
                let (first, end) = cover(*offset, data.len() as u64);
                self.add_reads(ctx, id, first, end, &[]);
            }
            Kind::Write { offset, data, .. } => {
                let (offset, len) = (*offset, data.len() as u64);
                self.read_edges(ctx, id, offset, len);
            }
            Kind::Zero { offset, len, .. } => {
                let (offset, len) = (*offset, *len);
                self.read_edges(ctx, id, offset, len);
            }
            Kind::Copy { unmap: true, .. } => {}
            Kind::Copy { block, count, sources, .. } => {
                let (first, end, sources) = (*block, *block + u64::from(*count), sources.clone());
                self.add_reads(ctx, id, first, end, &sources);
            }
            Kind::Extents { .. } => {
                op.stage = Stage::Acting;
                self.query_extents(ctx, id);
            }
        }
        self.less_left(ctx, id, None);
    }

    /// Reads the partial blocks at the ends of a range: piece 0 is the first block, the last piece the last one.
    fn read_edges(&mut self, ctx: &mut Ctx<'_>, id: u64, offset: u64, len: u64) {
        let (first, end) = cover(offset, len);
        let head = !offset.is_multiple_of(BLOCK_SIZE_U64);
        let tail = !(offset + len).is_multiple_of(BLOCK_SIZE_U64);
        if head {
            self.add_reads(ctx, id, first, first + 1, &[]);
        }
        if tail && !(head && end == first + 1) {
            self.add_reads(ctx, id, end - 1, end, &[]);
        }
    }

    /// Cuts blocks `first..end` at chunks and at 1 MiB.
    fn cut(&self, first: u64, end: u64) -> Vec<(u64, u32, u32)> {
        let mut cuts = Vec::with_capacity(1);
        let mut at = first;
        while at < end {
            let within = at % self.chunk_blocks;
            let count = (end - at).min(self.chunk_blocks - within).min(u64::from(DATA_BLOCKS_MAX));
            cuts.push((at / self.chunk_blocks, within as u32, count as u32));
            at += count;
        }
        cuts
    }

    pub(super) fn add_part(&mut self, ctx: &mut Ctx<'_>, id: u64, cut: (u64, u32, u32), body: Body) {
        let op = self.ops.get_mut(&id).expect("parts are added to a living operation");
        op.left += 1;
        let internal = op.internal;
        let (index, first, count) = cut;
        self.chunk(index).active += 1;
        let part = self.parts.insert(Part { op: id, index, first, count, internal, revived: false, body });
        self.start_part(ctx, part);
    }

    fn add_reads(&mut self, ctx: &mut Ctx<'_>, id: u64, first: u64, end: u64, sources: &[u16]) {
        for cut in self.cut(first, end) {
            let Some(op) = self.ops.get_mut(&id) else { return };
            let piece = op.pieces.len();
            op.pieces.push(None);
            self.add_part(ctx, id, cut, Body::Read(ReadPart::new(piece, sources.to_vec())));
        }
    }

    fn add_writes(&mut self, ctx: &mut Ctx<'_>, id: u64, first: u64, pieces: Vec<Buf>, fua: bool) {
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert!(bytes.is_multiple_of(BLOCK_SIZE), "whole blocks are written");
        let mut pieces: std::collections::VecDeque<Buf> = pieces.into();
        for cut in self.cut(first, first + (bytes / BLOCK_SIZE) as u64) {
            if !self.ops.contains_key(&id) {
                return;
            }
            let data = take_blocks(&mut pieces, cut.2);
            self.add_part(ctx, id, cut, Body::Write(Box::new(WritePart::data(data, fua))));
        }
    }

    /// Unmaps whole blocks: whole chunks are dropped at the metadata servers in one call, the rest at the replicas.
    fn add_unmaps(&mut self, ctx: &mut Ctx<'_>, id: u64, first: u64, end: u64, fua: bool) {
        let (whole_first, whole_end) = (first.div_ceil(self.chunk_blocks), end / self.chunk_blocks);
        let mut rest = vec![(first, end)];
        if whole_first < whole_end {
            rest = vec![(first, whole_first * self.chunk_blocks), (whole_end * self.chunk_blocks, end)];
            self.ops.get_mut(&id).expect("still here").left += 1;
            let count = whole_end - whole_first;
            let request = MdsRequest::ChunkDrop { volume: self.id, epoch: self.epoch, index: whole_first, count };
            ctx.call(request, self.waiter(super::VolumeCall::Drop { op: id, first: whole_first, count }));
        }
        for (first, end) in rest {
            let mut at = first;
            while at < end && self.ops.contains_key(&id) {
                let within = at % self.chunk_blocks;
                let count = (end - at).min(self.chunk_blocks - within);
                let cut = (at / self.chunk_blocks, within as u32, count as u32);
                self.add_part(ctx, id, cut, Body::Write(Box::new(WritePart::unmap(fua))));
                at += count;
            }
        }
    }

    /// Whole chunks are gone from the map.
    pub(super) fn on_dropped(
        &mut self,
        ctx: &mut Ctx<'_>,
        op: u64,
        range: (u64, u64),
        result: Result<MdsReply, MdsError>,
    ) {
        let (first, count) = range;
        match result {
            Ok(_) => {
                self.forget_chunks(ctx, first, first + count, true);
                self.advance(ctx);
                self.less_left(ctx, op, None);
            }
            Err(error) => self.less_left(ctx, op, Some(BlockError::Other(format!("drop chunks: {error}")))),
        }
    }

    /// A part has ended.
    pub(super) fn finish_part(&mut self, ctx: &mut Ctx<'_>, part: u64, result: Result<Option<Buf>, BlockError>) {
        let Some(part) = self.parts.remove(part) else { return };
        let chunk = self.chunks.get_mut(&part.index).expect("a part pins its chunk");
        chunk.active -= 1;
        let error = match result {
            Ok(data) => {
                if let (Body::Read(read), Some(data), Some(op)) = (&part.body, data, self.ops.get_mut(&part.op)) {
                    op.pieces[read.piece] = Some(data);
                }
                None
            }
            Err(error) => Some(error),
        };
        self.less_left(ctx, part.op, error);
    }

    /// One part or call fewer; the last one ends the stage.
    pub(super) fn less_left(&mut self, ctx: &mut Ctx<'_>, id: u64, error: Option<BlockError>) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        op.left -= 1;
        if op.error.is_none() {
            op.error = error;
        }
        if op.left > 0 {
            return;
        }
        if let Some(error) = op.error.take() {
            self.finish_op(ctx, id, Err(error));
        } else if op.stage == Stage::Reading {
            op.stage = Stage::Acting;
            op.left = 1;
            self.act(ctx, id);
        } else {
            self.complete(ctx, id);
        }
    }

    /// Everything needed was read: write.
    fn act(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let op = self.ops.get_mut(&id).expect("the caller holds it");
        let pieces = std::mem::take(&mut op.pieces);
        match &op.kind {
            Kind::Write { offset, data, fua } => {
                let (offset, data, fua) = (*offset, data.clone(), *fua);
                let blocks = merge_edges(offset, &data, &pieces);
                self.write_end = (offset + data.len() as u64).div_ceil(BLOCK_SIZE_U64);
                self.add_writes(ctx, id, offset / BLOCK_SIZE_U64, blocks, fua);
            }
            Kind::Zero { offset, len, fua } => {
                let (offset, len, fua) = (*offset, *len, *fua);
                self.act_zero(ctx, id, offset, len, fua, &pieces);
            }
            Kind::Compare { offset, compare, data, fua } => {
                let (offset, data, fua) = (*offset, data.clone(), *fua);
                let mut held = gather(&pieces);
                let start = (offset % BLOCK_SIZE_U64) as usize;
                let range = start..start + data.len();
                let differs = held[range.clone()].iter().zip(compare.iter()).position(|(a, b)| a != b);
                if let Some(at) = differs {
                    self.less_left(ctx, id, Some(BlockError::Miscompare { offset: at as u64 }));
                    return;
                }
                held[range].copy_from_slice(&data);
                self.add_writes(ctx, id, offset / BLOCK_SIZE_U64, vec![Buf::copy_from(&held)], fua);
            }
            Kind::Copy { block, zeros_as_holes: true, .. } => {
                let block = *block;
                let blocks: Vec<Buf> = pieces.into_iter().map(|piece| piece.expect("every piece was read")).collect();
                for (first, count, data) in super::full::runs(block, &blocks) {
                    match data {
                        Some(data) => self.add_writes(ctx, id, first, data, false),
                        None => {
                            let cut = (first / self.chunk_blocks, (first % self.chunk_blocks) as u32, count as u32);
                            self.add_part(ctx, id, cut, Body::Write(Box::new(WritePart::unmap(false))));
                        }
                    }
                }
            }
            Kind::Copy { block, count, unmap, .. } => {
                let (block, count, unmap) = (*block, *count, *unmap);
                if unmap {
                    let mut at = block;
                    while at < block + u64::from(count) {
                        let within = at % self.chunk_blocks;
                        let run = (block + u64::from(count) - at).min(self.chunk_blocks - within);
                        let cut = (at / self.chunk_blocks, within as u32, run as u32);
                        self.add_part(ctx, id, cut, Body::Write(Box::new(WritePart::unmap(false))));
                        at += run;
                    }
                } else {
                    let blocks = pieces.into_iter().map(|piece| piece.expect("every piece was read")).collect();
                    self.add_writes(ctx, id, block, blocks, false);
                }
            }
            Kind::Read { .. } | Kind::Extents { .. } | Kind::Flush { .. } => {
                unreachable!("these have one stage")
            }
        }
        self.less_left(ctx, id, None);
    }

    fn act_zero(&mut self, ctx: &mut Ctx<'_>, id: u64, offset: u64, len: u64, fua: bool, pieces: &[Option<Buf>]) {
        let end = offset + len;
        let (whole_first, whole_end) = (offset.div_ceil(BLOCK_SIZE_U64), end / BLOCK_SIZE_U64);
        let mut edge = 0;
        let mut zero_edge = |block: u64| {
            let mut bytes = BufMut::copy_from(pieces[edge].as_ref().expect("every piece was read"));
            edge += 1;
            let base = block * BLOCK_SIZE_U64;
            let from = offset.saturating_sub(base).min(BLOCK_SIZE_U64) as usize;
            let to = (end - base).min(BLOCK_SIZE_U64) as usize;
            bytes[from..to].fill(0);
            (block, bytes.freeze())
        };
        let mut edges = Vec::new();
        if !offset.is_multiple_of(BLOCK_SIZE_U64) {
            edges.push(zero_edge(offset / BLOCK_SIZE_U64));
        }
        let one_block = whole_first > whole_end;
        if !end.is_multiple_of(BLOCK_SIZE_U64) && !one_block {
            edges.push(zero_edge(end / BLOCK_SIZE_U64));
        }
        for (block, bytes) in edges {
            if bytes.iter().all(|byte| *byte == 0) {
                // Zeroing must not need room, and a hole reads the same.
                self.add_unmaps(ctx, id, block, block + 1, fua);
            } else {
                self.add_writes(ctx, id, block, vec![bytes], fua);
            }
        }
        if whole_first < whole_end {
            self.add_unmaps(ctx, id, whole_first, whole_end, fua);
        }
    }

    /// The last stage has ended well: the answer.
    fn complete(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let op = self.ops.get_mut(&id).expect("the caller holds it");
        let reply = match &op.kind {
            Kind::Read { offset, len } => {
                let mut skip = (*offset % BLOCK_SIZE_U64) as usize;
                let mut left = *len as usize;
                let mut data = Vec::with_capacity(op.pieces.len());
                for piece in op.pieces.drain(..) {
                    let piece = piece.expect("every piece was read");
                    let take = (piece.len() - skip).min(left);
                    let whole = skip == 0 && take == piece.len();
                    data.push(if whole { piece } else { piece.slice(skip, take) });
                    left -= take;
                    skip = 0;
                }
                BlockReply::Data(data)
            }
            Kind::Extents { offset, len, next } => {
                let (offset, len, next) = (*offset, *len, *next);
                if next < (offset + len).div_ceil(BLOCK_SIZE_U64) {
                    op.left = 1;
                    self.query_extents(ctx, id);
                    self.less_left(ctx, id, None);
                    return;
                }
                BlockReply::Extents(clip_extents(std::mem::take(&mut op.extents), offset, len))
            }
            _ => BlockReply::Done,
        };
        self.finish_op(ctx, id, Ok(reply));
    }

    pub(super) fn finish_op(&mut self, ctx: &mut Ctx<'_>, id: u64, result: BlockResult) {
        let op = self.ops.remove(&id).expect("an operation ends once");
        if op.locked {
            self.locks.release(id, &mut self.ready_ops);
        }
        match &op.done {
            Done::Idle => self.settling = false,
            Done::Repair => self.repairs -= 1,
            Done::Reconcile => self.on_reconcile_step(ctx, result.is_ok()),
            Done::Undo(part) => self.on_undone(ctx, *part, op.stage == Stage::Acting, result.is_ok()),
            Done::User(_) | Done::Closed(_) => {}
        }
        let settle = result.is_ok() && matches!(op.done, Done::Idle | Done::Closed(_));
        op.done.finish(ctx, result);
        if settle {
            self.send_settled(ctx);
        }
    }

    /// Asks about the next chunks of an extents query.
    fn query_extents(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let chunk_blocks = self.chunk_blocks;
        let op = self.ops.get_mut(&id).expect("the caller holds it");
        let Kind::Extents { offset, len, next } = &mut op.kind else { unreachable!("only for extents") };
        let end = (*offset + *len).div_ceil(BLOCK_SIZE_U64);
        let mut cuts = Vec::new();
        while *next < end && (cuts.len() as u64) < EXTENT_CHUNKS {
            let within = *next % chunk_blocks;
            let count = (end - *next).min(chunk_blocks - within);
            cuts.push((*next / chunk_blocks, within as u32, count as u32));
            *next += count;
        }
        for cut in cuts {
            if !self.ops.contains_key(&id) {
                return;
            }
            self.add_part(ctx, id, cut, Body::Extents { next: cut.1, tried: Vec::new() });
        }
    }

    /// Copies of the reconciliation that are still reading, in order.
    pub(super) fn reading_copies(&self) -> Vec<u64> {
        let reads = |op: &Op| {
            matches!(op.done, Done::Reconcile) && op.stage == Stage::Reading && matches!(op.kind, Kind::Copy { .. })
        };
        let mut ids: Vec<u64> = self.ops.iter().filter(|(_, op)| reads(op)).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Ends a copy before it writes anything.
    pub(super) fn abandon_copy(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let parts: Vec<u64> = self.parts.iter().filter(|(_, part)| part.op == id).map(|(part, _)| part).collect();
        for part in parts {
            self.finish_part(ctx, part, Err(BlockError::Other("abandoned".to_owned())));
        }
    }

    /// Rewrites blocks whose copy is damaged somewhere, with what a good copy holds, under the lock of an ordinary
    /// write.
    pub(super) fn repair(&mut self, ctx: &mut Ctx<'_>, index: u64, first: u32, count: u32, good: u16) {
        if self.mode != LeaseMode::Exclusive || self.repairs as usize >= REPAIRS_MAX {
            return;
        }
        self.repairs += 1;
        let block = index * self.chunk_blocks + u64::from(first);
        let kind = Kind::Copy { block, count, unmap: false, zeros_as_holes: false, sources: vec![good] };
        self.add_op(ctx, kind, Done::Repair, false);
    }
}

/// The whole blocks to write for an unaligned range: partial blocks at the ends merged with what was read, the middle
/// as is.
fn merge_edges(offset: u64, data: &Buf, edges: &[Option<Buf>]) -> Vec<Buf> {
    let start = (offset % BLOCK_SIZE_U64) as usize;
    let tail = (start + data.len()) % BLOCK_SIZE;
    if start == 0 && tail == 0 {
        return vec![data.clone()];
    }
    let edge = |at: usize| BufMut::copy_from(edges[at].as_ref().expect("every piece was read"));
    if start + data.len() <= BLOCK_SIZE {
        let mut block = edge(0);
        block[start..start + data.len()].copy_from_slice(data);
        return vec![block.freeze()];
    }
    let mut blocks = Vec::with_capacity(3);
    let mut at = 0;
    if start > 0 {
        let mut block = edge(0);
        at = BLOCK_SIZE - start;
        block[start..].copy_from_slice(&data[..at]);
        blocks.push(block.freeze());
    }
    let middle = data.len() - at - tail;
    if middle > 0 {
        blocks.push(data.slice(at, middle));
    }
    if tail > 0 {
        let mut block = edge(edges.len() - 1);
        block[..tail].copy_from_slice(&data[data.len() - tail..]);
        blocks.push(block.freeze());
    }
    blocks
}

/// Sorts, joins and clips runs so that they cover a range of bytes without gap or overlap.
fn clip_extents(mut runs: Vec<Extent>, offset: u64, len: u64) -> Vec<Extent> {
    runs.sort_unstable_by_key(|run| run.offset);
    let mut out: Vec<Extent> = Vec::new();
    for run in runs {
        let from = run.offset.max(offset);
        let to = (run.offset + run.len).min(offset + len);
        if from >= to {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.data == run.data && last.offset + last.len == from => last.len += to - from,
            _ => out.push(Extent { offset: from, len: to - from, data: run.data }),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn merged_blocks_hold_the_old_ends_and_the_new_middle(offset in 0u64..9000, len in 1usize..20_000) {
            let data = Buf::copy_from(&(0..len).map(|i| (i % 251) as u8 + 1).collect::<Vec<_>>());
            let (first, end) = cover(offset, len as u64);
            let old: Vec<u8> = vec![255; BLOCK_SIZE];
            let mut edges = Vec::new();
            if !offset.is_multiple_of(BLOCK_SIZE_U64) {
                edges.push(Some(Buf::copy_from(&old)));
            }
            if !((offset + len as u64).is_multiple_of(BLOCK_SIZE_U64) || edges.len() == 1 && end == first + 1) {
                edges.push(Some(Buf::copy_from(&old)));
            }
            let merged: Vec<u8> = merge_edges(offset, &data, &edges).iter().flat_map(|b| b.to_vec()).collect();
            prop_assert_eq!(merged.len() as u64, (end - first) * BLOCK_SIZE_U64);
            let start = (offset - first * BLOCK_SIZE_U64) as usize;
            prop_assert_eq!(&merged[start..start + len], &data[..]);
            prop_assert!(merged[..start].iter().chain(&merged[start + len..]).all(|b| *b == 255));
        }
    }
}
