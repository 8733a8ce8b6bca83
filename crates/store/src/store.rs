//! The public face of the store: opening, requests, completions, and getters that answer from memory.

use crate::api::{OpenError, StoreError, StoreOptions, StoreOutput, StoreReply, StoreRequest, StoreStats};
use crate::chunks::ChunkInfo;
use crate::engine::Engine;
use crate::layout::SLOT_U64;
use crate::read::ReadKind;
use crate::recovery::{Progress, Recovery};
use crate::volumes::TailEntry;
use cairn_env::DiskDone;
use cairn_types::{ChunkId, Epoch, Instant, Sequence, VolumeId};

enum Phase {
    New,
    Opening(Box<Recovery>),
    Running(Box<Engine>),
    Refused,
}

/// One store on one disk: a core without IO. See the crate for how to drive it.
pub struct Store {
    device_size: u64,
    options: StoreOptions,
    phase: Phase,
}

impl Store {
    /// A store on a device of `device_size` bytes, not open yet.
    pub fn new(device_size: u64, options: StoreOptions) -> Self {
        Self { device_size, options, phase: Phase::New }
    }

    /// Begins to open the store; `StoreOutput::opened` tells how it ended.
    pub fn start(&mut self, _now: Instant, out: &mut StoreOutput) {
        assert!(matches!(self.phase, Phase::New), "a store is started once");
        match Recovery::new(self.options.clone(), self.device_size, out) {
            Ok(recovery) => self.phase = Phase::Opening(Box::new(recovery)),
            Err(error) => self.refuse(error, out),
        }
    }

    fn refuse(&mut self, error: OpenError, out: &mut StoreOutput) {
        self.phase = Phase::Refused;
        out.disk.clear();
        out.opened = Some(Err(error));
    }

    fn engine(&self) -> Option<&Engine> {
        match &self.phase {
            Phase::Running(engine) => Some(engine),
            _ => None,
        }
    }

    /// Takes a request; its answer carries `token`, perhaps within this call. Call [`turn`](Self::turn) afterwards,
    /// once for as many requests as came together.
    pub fn submit(&mut self, _now: Instant, token: u64, request: StoreRequest, out: &mut StoreOutput) {
        let Phase::Running(engine) = &mut self.phase else {
            out.done.push((token, Err(StoreError::NotOpen)));
            return;
        };
        if let Some(what) = &engine.failed {
            out.done.push((token, Err(StoreError::Failed { what: what.clone() })));
            return;
        }
        if engine.is_opening() {
            out.done.push((token, Err(StoreError::NotOpen)));
            return;
        }
        match request {
            StoreRequest::Read { chunk, first_block, block_count } => {
                engine.submit_read(token, chunk, first_block, block_count, ReadKind::Data, out);
            }
            StoreRequest::Verify { chunk, from_block, limit } => {
                engine.submit_read(token, chunk, from_block, limit.max(1), ReadKind::Verify, out);
            }
            StoreRequest::ChangedSince { chunk, version, from_block, limit } => {
                let kind = ReadKind::Changed { since: version, limit };
                engine.submit_read(token, chunk, from_block, u32::MAX, kind, out);
            }
            StoreRequest::Flush => engine.request_flush(token, out),
            StoreRequest::Settle { volume, epoch, sequence } => {
                engine.state.settle(volume, (epoch, sequence));
                engine.settles.insert(volume);
                out.done.push((token, Ok(StoreReply::Done)));
            }
            StoreRequest::Checkpoint => engine.checkpoint_waiters.push(token),
            change => engine.submit_change(token, change, out),
        }
    }

    /// End of a reactor turn: forms group writes from what was submitted since, issues flushes, moves checkpoints on.
    /// Call it after every batch of `submit` and `disk_done`.
    pub fn turn(&mut self, _now: Instant, out: &mut StoreOutput) {
        if let Phase::Running(engine) = &mut self.phase {
            engine.turn(out);
        }
    }

    /// A disk request completed.
    pub fn disk_done(&mut self, _now: Instant, done: DiskDone, out: &mut StoreOutput) {
        match &mut self.phase {
            Phase::Opening(recovery) => match recovery.disk_done(done, out) {
                Ok(Progress::Going) => {}
                Ok(Progress::Open(engine)) => self.phase = Phase::Running(engine),
                Err(error) => self.refuse(error, out),
            },
            Phase::Running(engine) => engine.disk_done(done, out),
            Phase::New | Phase::Refused => {}
        }
    }

    /// Why the store has stopped, if it has.
    pub fn failure(&self) -> Option<&str> {
        self.engine().and_then(|engine| engine.failed.as_deref())
    }

    /// What the store knows of a chunk.
    pub fn chunk(&self, chunk: ChunkId) -> Option<&ChunkInfo> {
        Some(&self.engine()?.state.chunks.get(chunk)?.info)
    }

    /// All chunks, by volume.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkId, &ChunkInfo)> + '_ {
        self.engine().into_iter().flat_map(|engine| engine.state.chunks.iter().map(|(id, chunk)| (id, &chunk.info)))
    }

    /// Chunks of one volume, in order of their ids.
    pub fn chunks_of(&self, volume: VolumeId) -> impl Iterator<Item = (ChunkId, &ChunkInfo)> + '_ {
        self.engine().into_iter().flat_map(move |engine| {
            let chunks = &engine.state.chunks;
            chunks.of_volume(volume).map(|id| (id, &chunks.get(id).expect("listed chunks exist").info))
        })
    }

    /// Volumes with a fence, a settled mark or a tail.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.engine().into_iter().flat_map(|engine| engine.state.volumes.ids())
    }

    /// The lowest epoch that may write to a volume; none when it was never fenced. Counts a fence from its submission.
    pub fn fence(&self, volume: VolumeId) -> Option<Epoch> {
        let known = self.engine()?.state.volumes.get(volume)?;
        (known.fence > Epoch(0)).then_some(known.fence)
    }

    /// Unsettled writes of a volume, by epoch and sequence. Only writes already answered are listed.
    pub fn tail(&self, volume: VolumeId) -> impl Iterator<Item = TailEntry> + '_ {
        self.engine().into_iter().flat_map(move |engine| engine.state.volumes.tail(volume))
    }

    /// Epoch and sequence of the highest unsettled write of a block.
    pub fn tail_latest(&self, chunk: ChunkId, block: u32) -> Option<(Epoch, Sequence)> {
        self.engine()?.state.chunks.get(chunk)?.tail.latest(block)
    }

    /// The settled mark of a volume; zero when nothing was settled.
    pub fn settled(&self, volume: VolumeId) -> (Epoch, Sequence) {
        self.engine().and_then(|engine| engine.state.volumes.get(volume)).map_or_else(Default::default, |v| v.settled)
    }

    /// What the owner last kept here with [`StoreRequest::SetLabel`] and is in the log; zeros in a new store.
    pub fn label(&self) -> [u8; crate::LABEL_BYTES] {
        self.engine().map_or([0; crate::LABEL_BYTES], |engine| engine.state.label)
    }

    /// The log sequence number up to which everything is durable.
    pub fn durable_lsn(&self) -> u64 {
        self.engine().map_or(0, |engine| engine.durable)
    }

    /// Sizes and counts.
    pub fn stats(&self) -> StoreStats {
        let Some(engine) = self.engine() else { return StoreStats::default() };
        let state = &engine.state;
        let capacity = engine.capacity();
        let used = state.occupied().min(capacity);
        StoreStats {
            capacity_bytes: capacity * SLOT_U64,
            used_bytes: used * SLOT_U64,
            free_bytes: (capacity - used) * SLOT_U64,
            data_bytes: state.mapped_blocks * SLOT_U64,
            chunks: state.chunks.len(),
            volumes: state.volumes.len(),
            tail_entries: state.volumes.tail_len(),
            cached_leaves: state.cache.len() as u64,
            chain_groups: engine.chain_groups,
            quarantined_bytes: state.space.quarantined() * SLOT_U64,
            generation: engine.generation,
            groups_written: engine.groups_written,
            checkpoint_slots_written: engine.checkpoint_slots_written,
        }
    }
}
