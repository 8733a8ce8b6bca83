//! What the store has promised so far, and whether what is found after a crash keeps it.

use crate::harness::*;
use cairn_store::*;
use cairn_types::*;
use std::collections::BTreeMap;

pub const VOLUME: VolumeId = VolumeId(5);
/// A volume that only gets fences.
pub const FENCED: VolumeId = VolumeId(99);

/// One value a block was given.
#[derive(Clone, Copy, Debug)]
struct Value {
    stamp: u64,
    token: u64,
}

#[derive(Clone, Default)]
pub struct Model {
    /// Per block all values since the last crash, oldest first; the first is what was there then.
    blocks: BTreeMap<(ChunkId, u32), Vec<Value>>,
    /// Log sequence numbers of answered writes.
    lsn: BTreeMap<u64, u64>,
    /// Everything up to here was reported durable.
    flushed: u64,
    /// Chunks, and the token of their creation or deletion if it is still unanswered.
    chunks: BTreeMap<ChunkId, u32>,
    pending_create: BTreeMap<u64, (ChunkId, u32)>,
    pending_delete: BTreeMap<u64, ChunkId>,
    pending_version: BTreeMap<u64, (ChunkId, ChunkVersion)>,
    versions: BTreeMap<ChunkId, ChunkVersion>,
    pending_fence: BTreeMap<u64, Epoch>,
    fence: (Epoch, Epoch),
    settled: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    Kill,
    PowerCut,
}

impl Model {
    pub fn chunks(&self) -> Vec<(ChunkId, u32)> {
        let deleting: Vec<ChunkId> = self.pending_delete.values().copied().collect();
        self.chunks.iter().map(|(c, n)| (*c, *n)).filter(|(c, _)| !deleting.contains(c)).collect()
    }

    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// The request `token` was submitted.
    pub fn submitted(&mut self, token: u64, request: &StoreRequest) {
        match request {
            StoreRequest::Write { chunk, sequence, first_block, checksums, .. } => {
                for block in *first_block..*first_block + checksums.len() as u32 {
                    self.blocks.entry((*chunk, block)).or_default().push(Value { stamp: sequence.0, token });
                }
            }
            StoreRequest::Unmap { chunk, first_block, block_count, .. } => {
                for block in *first_block..*first_block + block_count {
                    self.blocks.entry((*chunk, block)).or_default().push(Value { stamp: 0, token });
                }
            }
            StoreRequest::CreateChunk { chunk, block_count, .. } => {
                self.pending_create.insert(token, (*chunk, *block_count));
            }
            StoreRequest::DeleteChunk { chunk } => drop(self.pending_delete.insert(token, *chunk)),
            StoreRequest::SetVersion { chunk, version } => {
                self.pending_version.insert(token, (*chunk, *version));
            }
            StoreRequest::Fence { epoch, .. } => {
                self.pending_fence.insert(token, *epoch);
                self.fence.1 = self.fence.1.max(*epoch);
            }
            StoreRequest::Settle { sequence, .. } => self.settled = self.settled.max(sequence.0),
            _ => {}
        }
    }

    pub fn answered(&mut self, token: u64, answer: &Answer) {
        if let Some((chunk, block_count)) = self.pending_create.remove(&token) {
            answer.as_ref().unwrap();
            self.chunks.insert(chunk, block_count);
            self.versions.insert(chunk, ChunkVersion(1));
        }
        if let Some(chunk) = self.pending_delete.remove(&token) {
            answer.as_ref().unwrap();
            self.forget(chunk);
        }
        if let Some((chunk, version)) = self.pending_version.remove(&token)
            && answer.is_ok()
        {
            self.versions.insert(chunk, version);
        }
        if let Some(epoch) = self.pending_fence.remove(&token) {
            self.fence.0 = self.fence.0.max(epoch);
        }
        match answer {
            Ok(StoreReply::Written { lsn }) => drop(self.lsn.insert(token, *lsn)),
            Ok(StoreReply::Flushed { lsn }) => self.flushed = self.flushed.max(*lsn),
            Err(StoreError::NoSpace | StoreError::Io(_)) => {
                self.blocks.values_mut().for_each(|values| values.retain(|value| value.token != token));
            }
            _ => {}
        }
    }

    /// A write that was answered with a durable flag counts as flushed.
    pub fn flushed_through(&mut self, lsn: u64) {
        self.flushed = self.flushed.max(lsn);
    }

    fn forget(&mut self, chunk: ChunkId) {
        self.chunks.remove(&chunk);
        self.versions.remove(&chunk);
        self.blocks.retain(|(c, _), _| *c != chunk);
    }

    /// The store must show exactly the latest values now.
    pub fn check_now(&self, world: &mut World) {
        let expected = |key: &(ChunkId, u32)| self.blocks.get(key).and_then(|v| v.last()).map_or(0, |v| v.stamp);
        for (key, stamp) in world.dump() {
            assert_eq!(stamp, expected(&key), "I3: {key:?}");
        }
    }

    /// After a crash and a successful open: checks every promise and starts anew from what was found.
    pub fn check_after(&mut self, world: &mut World, crash: Crash) {
        self.check_chunks(world);
        let found = world.dump();
        let promised =
            |value: &Value| self.lsn.get(&value.token).is_some_and(|lsn| crash == Crash::Kill || *lsn <= self.flushed);
        // The newest log sequence number that certainly survived.
        let mut newest = 0;
        for (key, stamp) in &found {
            let values = self.blocks.get(key).map_or(&[][..], |v| v);
            let floor = values.iter().rposition(promised);
            let shown = values.iter().enumerate().position(|(i, v)| v.stamp == *stamp && Some(i) >= floor);
            let initial = *stamp == 0 && floor.is_none();
            assert!(
                shown.is_some() || initial,
                "I1: {key:?} shows {stamp}, {crash:?}, flushed {}, {values:?}",
                self.flushed
            );
            if let (Some(shown), false) = (shown, initial) {
                newest = newest.max(self.lsn.get(&values[shown].token).copied().unwrap_or(0));
            }
        }
        for (key, stamp) in &found {
            let values = self.blocks.get(key).map_or(&[][..], |v| v);
            let floor = values.iter().rposition(|v| self.lsn.get(&v.token).is_some_and(|lsn| *lsn < newest));
            let fine = values.iter().enumerate().any(|(i, v)| v.stamp == *stamp && Some(i) >= floor);
            assert!(fine || (*stamp == 0 && floor.is_none()), "I4: {key:?} shows {stamp}, but {newest} survived");
        }
        for ((chunk, block), stamp) in &found {
            let latest = world.store.tail_latest(*chunk, *block);
            if *stamp > self.settled {
                assert_eq!(latest, Some((Epoch(1), Sequence(*stamp))), "tail of {chunk} block {block}");
            }
        }
        let fence = world.store.fence(FENCED).unwrap_or_default();
        assert!(fence >= self.fence.0 && fence <= self.fence.1, "I5: fence {fence}, promised {}", self.fence.0);
        self.fence = (fence, fence);
        self.pending_fence.clear();
        self.lsn.clear();
        self.flushed = 0;
        self.blocks = found.into_iter().map(|(key, stamp)| (key, vec![Value { stamp, token: 0 }])).collect();
        // What was found is durable: opening flushed it.
        self.lsn.insert(0, 0);
    }

    fn check_chunks(&mut self, world: &World) {
        for (chunk, block_count) in std::mem::take(&mut self.pending_create).into_values() {
            if world.store.chunk(chunk).is_some() {
                self.chunks.insert(chunk, block_count);
                self.versions.insert(chunk, ChunkVersion(1));
            }
        }
        for chunk in std::mem::take(&mut self.pending_delete).into_values() {
            if world.store.chunk(chunk).is_none() {
                self.forget(chunk);
            }
        }
        let found = world.visible_chunks();
        assert_eq!(found, self.chunks.iter().map(|(c, n)| (*c, *n)).collect::<Vec<_>>(), "chunks");
        for (chunk, version) in std::mem::take(&mut self.pending_version).into_values() {
            if world.store.chunk(chunk).is_some_and(|info| info.version == version) {
                self.versions.insert(chunk, version);
            }
        }
        for (chunk, version) in &self.versions {
            let info = world.store.chunk(*chunk).unwrap();
            assert_eq!(info.version, *version, "I7: version of {chunk}");
            assert_eq!(info.tag, vec![chunk.0 as u8; 5]);
        }
    }
}

/// A world with its model: submits, crashes, checks.
pub struct Checked {
    pub world: World,
    pub model: Model,
    durable: Vec<u64>,
    /// Errors other than the store's own are a failed test.
    pub allow_failed: bool,
}

impl Checked {
    pub fn new(world: World) -> Self {
        Self { world, model: Model::default(), durable: Vec::new(), allow_failed: false }
    }

    pub fn submit(&mut self, request: StoreRequest) {
        self.model.submitted(self.world.next_token, &request);
        if matches!(&request, StoreRequest::Write { durable: true, .. }) {
            self.durable.push(self.world.next_token);
        }
        self.world.submit(request);
        self.collect();
    }

    pub fn collect(&mut self) {
        for (token, answer) in std::mem::take(&mut self.world.answers) {
            if self.allow_failed && matches!(answer, Err(StoreError::Failed { .. })) {
                continue;
            }
            let expected = matches!(answer, Ok(_) | Err(StoreError::NoSpace));
            assert!(expected || (self.allow_failed && matches!(answer, Err(StoreError::Io(_)))), "{answer:?}");
            if let (true, Ok(StoreReply::Written { lsn })) = (self.durable.contains(&token), &answer) {
                self.model.flushed_through(*lsn);
            }
            self.model.answered(token, &answer);
        }
    }

    pub fn turn(&mut self) {
        self.world.turn();
        self.collect();
    }

    pub fn step(&mut self) -> bool {
        let moved = self.world.step();
        self.collect();
        moved
    }

    pub fn settle(&mut self) {
        self.world.settle();
        self.collect();
    }

    /// Crashes, opens again, checks.
    pub fn crash(&mut self, crash: Crash) {
        match crash {
            Crash::Kill => self.world.disk.kill(&mut self.world.rng),
            Crash::PowerCut => self.world.disk.power_cut(&mut self.world.rng),
        }
        self.reopen(crash);
    }

    pub fn reopen(&mut self, crash: Crash) {
        self.durable.clear();
        self.world.open().unwrap_or_else(|error| panic!("I1: cannot open after {crash:?}: {error}"));
        self.model.check_after(&mut self.world, crash);
    }
}
