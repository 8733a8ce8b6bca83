//! The running store: one engine holds the state, the queues and everything in flight. This file has the frame: device
//! requests, flushes, leaf loads, failing for good. The pipelines are in `write`, `read` and `checkpoint`.

use crate::api::{Notice, OpenReport, StoreError, StoreOptions, StoreOutput, StoreReply};
use crate::checkpoint::Checkpoint;
use crate::chunks::NOT_CACHED;
use crate::layout::group::RecordWriter;
use crate::layout::superblock::ChainPosition;
use crate::layout::{SLOT, SLOT_U64};
use crate::read::ReadOp;
use crate::state::State;
use crate::tree::Tree;
use crate::write::{Group, Mutation};
use cairn_env::{Buf, BufMut, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use cairn_stdx::{FixedMap, planted};
use cairn_types::{ChunkId, ClusterId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a device request in flight is for.
pub(crate) enum Io {
    Group { number: u64 },
    Flush,
    Leaf { chunk: ChunkId, number: u32 },
    Read { read: u64, piece: u32 },
    Checkpoint,
}

/// Who waits for a leaf.
pub(crate) enum Waiter {
    Mutation(u64),
    Read(u64),
}

struct FlushInFlight {
    /// Groups up to this one were complete when the flush was issued.
    covers: u64,
    for_checkpoint: bool,
}

/// An answer that waits until a group is durable.
pub(crate) struct AwaitingFlush {
    pub lsn: u64,
    pub token: u64,
    /// None: answer with [`StoreReply::Flushed`].
    pub reply: Option<StoreReply>,
}

/// Where a new engine starts.
pub(crate) struct EngineSeed {
    pub options: StoreOptions,
    pub cluster: ClusterId,
    pub store_uuid: [u8; 16],
    pub state: State,
    pub trees: [Tree; 4],
    pub chain: ChainPosition,
    pub generation: u64,
    pub chain_groups: u64,
    pub chain_blocks: u64,
    pub next_io: u64,
}

pub(crate) struct Engine {
    pub(crate) options: StoreOptions,
    pub(crate) cluster: ClusterId,
    pub(crate) store_uuid: [u8; 16],
    pub(crate) state: State,
    pub(crate) trees: [Tree; 4],
    /// Newest durable checkpoint.
    pub(crate) generation: u64,
    next_io: u64,
    pub(crate) ios: FixedMap<u64, Io>,
    /// Set when the store has stopped for good.
    pub(crate) failed: Option<String>,
    /// The report to give once the first group of this session is durable.
    opening: Option<OpenReport>,

    pub(crate) fifo: VecDeque<Mutation>,
    pub(crate) staged: BTreeMap<ChunkId, VecDeque<Mutation>>,
    pub(crate) creating: BTreeSet<ChunkId>,
    pub(crate) next_mutation: u64,
    /// Volumes whose settled mark goes into the next group.
    pub(crate) settles: BTreeSet<VolumeId>,
    pub(crate) groups: VecDeque<Group>,
    /// After the last group formed.
    pub(crate) formed: ChainPosition,
    /// After the last group applied.
    pub(crate) applied: ChainPosition,
    pub(crate) header_pool: Vec<BufMut>,
    pub(crate) record_pool: RecordWriter,
    pub(crate) inflight_new: u64,
    pub(crate) inflight_leaves: u64,
    /// Groups and blocks since the last checkpoint snapshot.
    pub(crate) chain_groups: u64,
    pub(crate) chain_blocks: u64,

    pub(crate) durable: u64,
    flush: Option<FlushInFlight>,
    pub(crate) awaiting_flush: VecDeque<AwaitingFlush>,

    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) checkpoint_requested: bool,
    pub(crate) checkpoint_waiters: Vec<u64>,
    /// Free slots after the last checkpoint.
    pub(crate) free_mark: u64,

    pub(crate) loads: BTreeMap<(ChunkId, u32), Vec<Waiter>>,
    pub(crate) reads: BTreeMap<u64, ReadOp>,
    pub(crate) next_read: u64,
    pub(crate) zeros: Buf,

    pub(crate) groups_written: u64,
    pub(crate) checkpoint_slots_written: u64,
}

impl Engine {
    pub(crate) fn new(seed: EngineSeed, report: OpenReport) -> Self {
        let free_mark = seed.state.space.free();
        Self {
            options: seed.options,
            cluster: seed.cluster,
            store_uuid: seed.store_uuid,
            state: seed.state,
            trees: seed.trees,
            generation: seed.generation,
            next_io: seed.next_io,
            ios: FixedMap::default(),
            failed: None,
            opening: Some(report),
            fifo: VecDeque::new(),
            staged: BTreeMap::new(),
            creating: BTreeSet::new(),
            next_mutation: 1,
            settles: BTreeSet::new(),
            groups: VecDeque::new(),
            formed: seed.chain,
            applied: seed.chain,
            header_pool: Vec::new(),
            record_pool: RecordWriter::default(),
            inflight_new: 0,
            inflight_leaves: 0,
            chain_groups: seed.chain_groups,
            chain_blocks: seed.chain_blocks,
            durable: 0,
            flush: None,
            awaiting_flush: VecDeque::new(),
            checkpoint: None,
            checkpoint_requested: false,
            checkpoint_waiters: Vec::new(),
            free_mark,
            loads: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_read: 1,
            zeros: Buf::zeroed(SLOT * crate::api::REQUEST_BLOCKS_MAX as usize),
            groups_written: 0,
            checkpoint_slots_written: 0,
        }
    }

    /// True until the first group of this session is durable.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening.is_some()
    }

    pub(crate) fn issue(&mut self, io: Io, op: DiskOp, out: &mut StoreOutput) {
        let id = self.next_io;
        self.next_io += 1;
        self.ios.insert(id, io);
        out.disk.push(DiskRequest { io: IoId(id), op });
    }

    /// End of a reactor turn: forms groups, starts checkpoints and flushes.
    pub(crate) fn turn(&mut self, out: &mut StoreOutput) {
        if self.failed.is_some() {
            return;
        }
        self.form_groups(out);
        self.step_checkpoint(out);
        self.issue_flush(out);
        self.state.trim_cache();
    }

    fn issue_flush(&mut self, out: &mut StoreOutput) {
        if self.flush.is_some() || self.failed.is_some() {
            return;
        }
        let for_checkpoint = self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.wants_flush());
        let wanted = self.awaiting_flush.front().is_some_and(|waiting| waiting.lsn <= self.applied.group);
        let opening = self.opening.is_some() && self.groups.is_empty();
        if for_checkpoint || wanted || opening {
            self.flush = Some(FlushInFlight { covers: self.applied.group, for_checkpoint });
            self.issue(Io::Flush, DiskOp::Flush, out);
        }
    }

    fn flush_done(&mut self, out: &mut StoreOutput) {
        let flush = self.flush.take().expect("a flush completes once");
        let covers = if planted!("store_flush_covers_later") { self.applied.group } else { flush.covers };
        self.durable = self.durable.max(covers);
        if flush.for_checkpoint {
            self.checkpoint_flushed();
        }
        if self.durable > 0
            && self.durable >= self.applied.group
            && let Some(mut report) = self.opening.take()
        {
            report.lsn = self.durable;
            out.opened = Some(Ok(report));
        }
        self.answer_flushed(out);
    }

    pub(crate) fn answer_flushed(&mut self, out: &mut StoreOutput) {
        while self.awaiting_flush.front().is_some_and(|waiting| waiting.lsn <= self.durable) {
            let waiting = self.awaiting_flush.pop_front().expect("looked at above");
            out.done.push((waiting.token, Ok(waiting.reply.unwrap_or(StoreReply::Flushed { lsn: self.durable }))));
        }
    }

    /// A flush request: durable is what was answered before it.
    pub(crate) fn request_flush(&mut self, token: u64, out: &mut StoreOutput) {
        let lsn = self.applied.group;
        self.awaiting_flush.push_back(AwaitingFlush { lsn, token, reply: None });
        self.answer_flushed(out);
    }

    pub(crate) fn disk_done(&mut self, done: DiskDone, out: &mut StoreOutput) {
        // A stopped store forgot what it had in flight.
        let Some(io) = self.ios.remove(&done.io.0) else { return };
        match (io, done.result) {
            (Io::Group { number }, Ok(_)) => self.group_written(number, out),
            (Io::Flush, Ok(_)) => self.flush_done(out),
            (Io::Checkpoint, Ok(_)) => self.checkpoint_written(),
            (Io::Flush, Err(_)) if planted!("store_retry_fsync") => {
                self.flush_done(out);
            }
            (Io::Group { .. } | Io::Flush | Io::Checkpoint, Err(error)) => self.stop(error.to_string(), out),
            (Io::Leaf { chunk, number }, result) => self.leaf_loaded(chunk, number, result, out),
            (Io::Read { read, piece }, result) => self.read_done(read, piece, result, out),
        }
    }

    /// Stops for good: a write or flush failed, so what the device holds is unknown (I12). Everything waiting fails,
    /// and everything later too, until the store is opened anew and the log has been verified.
    pub(crate) fn stop(&mut self, what: String, out: &mut StoreOutput) {
        if self.failed.is_some() {
            return;
        }
        let error = StoreError::Failed { what: what.clone() };
        let mut tokens: Vec<u64> = Vec::new();
        tokens.extend(self.awaiting_flush.drain(..).map(|waiting| waiting.token));
        for group in self.groups.drain(..) {
            tokens.extend(group.finished.iter().map(|mutation| mutation.token));
        }
        tokens.extend(self.fifo.drain(..).map(|mutation| mutation.token));
        tokens.extend(std::mem::take(&mut self.staged).into_values().flatten().map(|mutation| mutation.token));
        tokens.extend(std::mem::take(&mut self.reads).into_values().map(|read| read.token));
        tokens.append(&mut self.checkpoint_waiters);
        out.done.extend(tokens.into_iter().map(|token| (token, Err(error.clone()))));
        out.notices.push(Notice::Stopped { what: what.clone() });
        if self.opening.take().is_some() {
            out.opened = Some(Err(crate::api::OpenError::Failed { what: what.clone() }));
        }
        self.ios.clear();
        self.loads.clear();
        self.checkpoint = None;
        self.flush = None;
        self.failed = Some(what);
    }

    /// Asks for leaf `number` of `chunk` on behalf of `waiter`; true when it must wait. Otherwise the leaf is pinned,
    /// or does not exist.
    pub(crate) fn acquire_leaf(&mut self, chunk: ChunkId, number: u32, waiter: Waiter, out: &mut StoreOutput) -> bool {
        let reference = self.state.chunks.get(chunk).expect("caller checked").leaves[number as usize];
        if reference.cached != NOT_CACHED {
            self.state.cache.touch(reference.cached);
            self.state.cache.get_mut(reference.cached).pins += 1;
            return false;
        }
        if reference.slot == 0 {
            return false;
        }
        let waiters = self.loads.entry((chunk, number)).or_default();
        waiters.push(waiter);
        if waiters.len() == 1 {
            let op = DiskOp::Read { offset: reference.slot * SLOT_U64, len: SLOT as u32 };
            self.issue(Io::Leaf { chunk, number }, op, out);
        }
        true
    }

    /// Undoes one pin, when the leaf exists.
    pub(crate) fn release_leaf(&mut self, chunk: ChunkId, number: u32) {
        let Some(owner) = self.state.chunks.get(chunk) else { return };
        let handle = owner.leaves[number as usize].cached;
        if handle != NOT_CACHED {
            let cached = self.state.cache.get_mut(handle);
            assert!(cached.pins > 0, "a leaf is released more often than acquired");
            cached.pins -= 1;
        }
    }

    fn leaf_loaded(&mut self, chunk: ChunkId, number: u32, result: Result<Buf, DiskError>, out: &mut StoreOutput) {
        let waiters = self.loads.remove(&(chunk, number)).expect("a load has waiters");
        let for_delete = self.staged.get(&chunk).and_then(|queue| queue.front()).is_some_and(Mutation::is_delete);
        let error = result.as_ref().err().cloned();
        let bytes = result.ok();
        if let Some(error) = &error {
            out.notices.push(Notice::ReadFailed(error.clone()));
        }
        // A chunk whose leaf cannot be read must still be deletable: what the leaf referred to is lost, not in the way.
        let installed = error.is_none() || for_delete;
        if installed {
            if !self.state.install_leaf(chunk, number, bytes.as_deref()) {
                let info = &self.state.chunks.get(chunk).expect("a load keeps its chunk").info;
                let first = number * crate::layout::LEAF_BLOCKS;
                let end = (first + crate::layout::LEAF_BLOCKS).min(info.block_count);
                out.notices.push(Notice::Corrupt { chunk, blocks: (first..end).collect() });
            }
            let handle = self.state.chunks.get(chunk).expect("installed above").leaves[number as usize].cached;
            self.state.cache.get_mut(handle).pins += waiters.len() as u32;
        }
        let error = error.filter(|_| !installed);
        let mut pump = false;
        for waiter in waiters {
            match waiter {
                Waiter::Read(read) => self.read_leaf_ready(read, number, error.clone(), out),
                Waiter::Mutation(id) => {
                    self.mutation_leaf_ready(chunk, id, number, error.clone());
                    pump = true;
                }
            }
        }
        if pump {
            self.pump_chunk(chunk, out);
        }
    }
}
