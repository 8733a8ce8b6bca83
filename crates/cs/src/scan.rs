//! What a stopped chunk server holds, for a recovery of metadata (I21): its store is opened as its server would open
//! it, log and all, over a disk that the caller brings.

use crate::tag::{ChunkTag, CopyState};
use cairn_env::{DiskDone, DiskRequest};
use cairn_meta::recover::FoundCopy;
use cairn_store::{OpenError, Store, StoreError, StoreOptions, StoreOutput, StoreReply, StoreRequest};
use cairn_types::{ChunkId, ChunkVersion, CsId, Epoch, Instant, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// The store's clock stands still: nothing in it waits for time.
const NOW: Instant = Instant(0);

/// Why a store cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// It does not open.
    #[error("the store does not open")]
    Open(#[source] OpenError),
    /// It opens, and something in it cannot be read.
    #[error("the store cannot be read")]
    Read(#[source] StoreError),
    /// It waits for something that no disk request brings.
    #[error("the store gives no answer")]
    Silent,
}

/// All that a chunk server's store knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Bytes it can store.
    pub capacity: u64,
    /// Bytes taken.
    pub used: u64,
    /// Highest epoch seen of each volume: fenced, settled or in the tail.
    pub epochs: Vec<(VolumeId, Epoch)>,
    /// Its copies.
    pub copies: Vec<FoundCopy>,
    /// Other chunk servers that its copies mention.
    pub mentioned: Vec<CsId>,
}

/// Lists a store of `size` bytes whose disk is reached through `run`.
///
/// # Errors
/// [`ScanError`].
pub fn scan(size: u64, options: StoreOptions, run: impl FnMut(DiskRequest) -> DiskDone) -> Result<Held, ScanError> {
    let (store, out) = (Store::new(size, options), StoreOutput::default());
    let mut stopped = Stopped { store, run, out, token: 0 };
    stopped.open()?;
    let (copies, mentioned) = stopped.copies()?;
    let stats = stopped.store.stats();
    let epochs = stopped.epochs();
    Ok(Held { capacity: stats.capacity_bytes, used: stats.used_bytes, epochs, copies, mentioned })
}

struct Stopped<F> {
    store: Store,
    run: F,
    out: StoreOutput,
    token: u64,
}

impl<F: FnMut(DiskRequest) -> DiskDone> Stopped<F> {
    /// Carries out what the store wants of the disk until it wants nothing more.
    fn drain(&mut self) {
        loop {
            self.store.turn(NOW, &mut self.out);
            let requests = std::mem::take(&mut self.out.disk);
            if requests.is_empty() {
                return;
            }
            for request in requests {
                let done = (self.run)(request);
                self.store.disk_done(NOW, done, &mut self.out);
            }
        }
    }

    fn open(&mut self) -> Result<(), ScanError> {
        self.store.start(NOW, &mut self.out);
        self.drain();
        match self.out.opened.take() {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(ScanError::Open(error)),
            None => Err(ScanError::Silent),
        }
    }

    fn ask(&mut self, request: StoreRequest) -> Result<StoreReply, ScanError> {
        self.token += 1;
        self.store.submit(NOW, self.token, request, &mut self.out);
        self.drain();
        let at = self.out.done.iter().position(|(token, _)| *token == self.token).ok_or(ScanError::Silent)?;
        self.out.done.swap_remove(at).1.map_err(ScanError::Read)
    }

    fn epochs(&self) -> Vec<(VolumeId, Epoch)> {
        let mut epochs: BTreeMap<VolumeId, Epoch> = BTreeMap::new();
        for volume in self.store.volumes() {
            let fence = self.store.fence(volume).unwrap_or_default();
            let tail = self.store.tail(volume).map(|entry| entry.epoch).max().unwrap_or_default();
            epochs.insert(volume, fence.max(self.store.settled(volume).0).max(tail));
        }
        epochs.into_iter().collect()
    }

    fn copies(&mut self) -> Result<(Vec<FoundCopy>, Vec<CsId>), ScanError> {
        let mut mentioned = BTreeSet::new();
        let mut copies = Vec::new();
        let mut highest: BTreeMap<VolumeId, u64> = BTreeMap::new();
        for (chunk, info) in self.store.chunks() {
            let tag = ChunkTag::decode(&info.tag);
            let whole = matches!(&tag, Ok(tag) if !matches!(tag.state, CopyState::Rebuilding { .. }));
            mentioned.extend(tag.into_iter().flat_map(|tag| tag.replicas).map(|replica| replica.cs));
            let top = highest.entry(info.volume).or_default();
            *top = (*top).max(info.index);
            copies.push(FoundCopy {
                chunk,
                volume: info.volume,
                index: info.index,
                version: info.version,
                block_count: info.block_count,
                mapped_blocks: info.mapped_blocks,
                end_block: None,
                whole,
            });
        }
        for copy in copies.iter_mut().filter(|copy| highest[&copy.volume] == copy.index) {
            copy.end_block = Some(self.end_block(copy.chunk)?);
        }
        copies.sort_by_key(|copy| (copy.volume, copy.index, copy.chunk));
        Ok((copies, mentioned.into_iter().collect()))
    }

    /// One past the last block that holds data.
    fn end_block(&mut self, chunk: ChunkId) -> Result<u32, ScanError> {
        let (mut end, mut from_block) = (0, 0);
        loop {
            let request = StoreRequest::ChangedSince { chunk, version: ChunkVersion(0), from_block, limit: 1024 };
            let StoreReply::Changed { ranges, next } = self.ask(request)? else { return Err(ScanError::Silent) };
            let mapped = ranges.iter().filter(|range| range.mapped);
            end = mapped.map(|range| range.first_block + range.block_count).max().unwrap_or(0).max(end);
            match next {
                Some(next) => from_block = next,
                None => return Ok(end),
            }
        }
    }
}
