//! The rare calls: hello, fence, tails, chunks, versions, extents, settled marks, changed blocks.

use super::control::{Audience, Control};
use super::{CsCore, Pending};
use crate::links::{Caller, Hello};
use cairn_stdx::planted;
use cairn_store::{ChangedRange, StoreError, StoreReply, StoreRequest};
use cairn_types::{ChunkId, ChunkVersion, Epoch, NodeId, VolumeId};
use cairn_wire::cs::{BlockRange, CS_LIST_MAX, CsError, CsReply, CsRequest, TailEntry};
use cairn_wire::{Effects, FrameKind, Now};

/// A listing at the store.
#[derive(Debug)]
pub(super) struct Listing {
    caller: Caller,
    chunk: ChunkId,
    /// Only mapped blocks below this block are wanted.
    mapped_below: Option<u32>,
}

impl CsCore {
    pub(super) fn cs_call(&mut self, now: Now, caller: Caller, request: CsRequest, out: &mut Effects) {
        if let CsRequest::Hello { session, generation } = request {
            return self.hello(caller, session, generation, out);
        }
        if !self.admit(caller, out) {
            return;
        }
        if let Some(what) = &self.failed {
            let error = CsError::DiskFailed(what.clone());
            return self.answer_call(caller, Err(error), out);
        }
        match request {
            CsRequest::Hello { .. } => unreachable!("taken above"),
            CsRequest::Fence { volume, epoch } => self.fence(now, caller, volume, epoch, out),
            CsRequest::Tail { volume, epoch, skip } => {
                let result = self.judge_call(now, volume, epoch).map(|()| self.tail_page(volume, skip));
                self.answer_call(caller, result, out);
            }
            CsRequest::Create { chunk, volume, layer, index, block_count, version, epoch } => {
                let sensible = block_count > 0
                    && block_count <= cairn_store::CHUNK_BLOCKS_MAX
                    && (1..=cairn_store::VERSION_MAX).contains(&version.0);
                // Another chunk server asks for a chunk that was never created, at the version the cluster gave.
                let judged = if self.is_from_server(caller) { Ok(()) } else { self.judge_call(now, volume, epoch) };
                if let Err(error) = judged {
                    self.answer_call(caller, Err(error), out);
                } else if !sensible {
                    let error = CsError::Invalid(format!("a chunk of {block_count} blocks at {version}"));
                    self.answer_call(caller, Err(error), out);
                } else {
                    let create = Control::Create { chunk, layer, index, block_count, version, caller };
                    self.control(now, volume, create, out);
                }
            }
            CsRequest::Raise { chunk, volume, epoch, since, version } => {
                if let Err(error) = self.judge_chunk_call(now, chunk, volume, epoch) {
                    self.answer_call(caller, Err(error), out);
                } else if version.0 > cairn_store::VERSION_MAX {
                    self.answer_call(caller, Err(CsError::Invalid(format!("no chunk can be at {version}"))), out);
                } else {
                    let audience = Audience::Caller(caller);
                    self.control(now, volume, Control::Raise { chunk, since, version, audience }, out);
                }
            }
            CsRequest::Extents { chunk, volume, epoch, version, first_block, block_count } => {
                let judged = self
                    .judge_chunk_call(now, chunk, volume, epoch)
                    .and_then(|()| self.judge_version(chunk, version))
                    .and_then(|()| self.judge_range(chunk, first_block, block_count));
                match judged {
                    Ok(end) => {
                        let listing = Listing { caller, chunk, mapped_below: Some(end) };
                        self.list(now, listing, chunk, ChunkVersion(0), first_block);
                    }
                    Err(error) => self.answer_call(caller, Err(error), out),
                }
            }
            CsRequest::Settle { volume, epoch, settled } => {
                let judged = self.judge_call(now, volume, epoch);
                if judged.is_ok() {
                    self.note_settled(now, volume, settled, true);
                }
                self.answer_call(caller, judged.map(|()| CsReply::Done), out);
            }
            CsRequest::Changed { chunk, version, after, from_block } => {
                let from_server = self.is_from_server(caller);
                let judged = match self.store.chunk(chunk) {
                    _ if !from_server => Err(CsError::Invalid("only chunk servers repair".to_owned())),
                    None => Err(CsError::NoSuchChunk(chunk)),
                    Some(_) if planted!("cs_source_may_be_stale") => Ok(()),
                    Some(_) => self.judge_version(chunk, version),
                };
                match judged {
                    Ok(()) => {
                        let listing = Listing { caller, chunk, mapped_below: None };
                        self.list(now, listing, chunk, after.unwrap_or(ChunkVersion(0)), from_block);
                    }
                    Err(error) => self.answer_call(caller, Err(error), out),
                }
            }
        }
    }

    fn is_from_server(&self, caller: Caller) -> bool {
        self.links.get(caller.link).is_some_and(|link| matches!(link.peer, NodeId::Cs(_)))
    }

    fn hello(&mut self, caller: Caller, session: u64, generation: u64, out: &mut Effects) {
        let reply = match self.links.hello(caller.link, session, generation) {
            Hello::Newest { superseded } => {
                if let Some(old) = superseded {
                    self.close(old, "a later link of its session took over", out);
                }
                Ok(CsReply::Hello { boot: self.boot })
            }
            Hello::Stale => Err(CsError::Superseded),
        };
        let stale = reply.is_err();
        out.send(caller.link, FrameKind::CsReply, caller.id, cairn_wire::encode(&reply));
        if stale {
            self.close(caller.link, "a later link of its session exists", out);
        }
    }

    fn fence(&mut self, now: Now, caller: Caller, id: VolumeId, epoch: Epoch, out: &mut Effects) {
        if epoch.0 == 0 {
            return self.answer_call(caller, Err(CsError::Invalid("epochs begin at 1".to_owned())), out);
        }
        if let Some(volume) = self.volume(now, id)
            && epoch < volume.floor
        {
            let error = CsError::StaleEpoch { volume: id, current: volume.floor };
            return self.answer_call(caller, Err(error), out);
        }
        self.control(now, id, Control::Fence { epoch, caller }, out);
        // From here on lower epochs are refused, though the new one is served only once it is durable.
        let volume = self.volumes.get_mut(&id).expect("a volume with operations is kept");
        volume.floor = volume.floor.max(epoch);
    }

    /// Rule 1 for calls.
    fn judge_call(&mut self, now: Now, id: VolumeId, epoch: Epoch) -> Result<(), CsError> {
        let Some(volume) = self.volume(now, id) else { return Err(CsError::NotFenced(id)) };
        if epoch < volume.floor {
            return Err(CsError::StaleEpoch { volume: id, current: volume.floor });
        }
        if epoch > volume.fenced {
            return Err(CsError::NotFenced(id));
        }
        volume.touched = now.mono;
        Ok(())
    }

    fn judge_chunk_call(&mut self, now: Now, chunk: ChunkId, id: VolumeId, epoch: Epoch) -> Result<(), CsError> {
        self.judge_call(now, id, epoch)?;
        match self.store.chunk(chunk) {
            None => Err(CsError::NoSuchChunk(chunk)),
            Some(info) if info.volume != id => Err(CsError::Invalid(format!("{chunk} belongs to {}", info.volume))),
            Some(_) => Ok(()),
        }
    }

    fn judge_version(&self, chunk: ChunkId, version: ChunkVersion) -> Result<(), CsError> {
        let info = self.store.chunk(chunk).ok_or(CsError::NoSuchChunk(chunk))?;
        let current = super::data::trusted_version(self, chunk, info.version);
        if self.copies.contains_key(&chunk) || info.version != version {
            return Err(CsError::VersionMismatch { chunk, current });
        }
        Ok(())
    }

    fn judge_range(&self, chunk: ChunkId, first_block: u32, block_count: u32) -> Result<u32, CsError> {
        let limit = self.store.chunk(chunk).map_or(0, |info| info.block_count);
        let end = first_block.checked_add(block_count).filter(|end| *end <= limit && block_count > 0);
        end.ok_or_else(|| CsError::Invalid(format!("blocks {first_block}+{block_count} of a chunk of {limit}")))
    }

    fn tail_page(&self, id: VolumeId, skip: u64) -> CsReply {
        let mut entries =
            self.store.tail(id).skip(usize::try_from(skip).unwrap_or(usize::MAX)).map(|entry| TailEntry {
                chunk: entry.chunk,
                first_block: entry.first_block,
                block_count: entry.block_count,
                epoch: entry.epoch,
                sequence: entry.sequence,
                unmap: entry.unmap,
            });
        let page: Vec<TailEntry> = entries.by_ref().take(CS_LIST_MAX).collect();
        let end = entries.next().is_none();
        CsReply::Tail { entries: page, end }
    }

    fn list(&mut self, now: Now, listing: Listing, chunk: ChunkId, after: ChunkVersion, from_block: u32) {
        let request = StoreRequest::ChangedSince { chunk, version: after, from_block, limit: CS_LIST_MAX as u32 };
        self.submit(now, Pending::List(listing), request);
    }

    pub(super) fn on_listed(&mut self, listing: Listing, result: Result<StoreReply, StoreError>, out: &mut Effects) {
        let Listing { caller, chunk, mapped_below } = listing;
        let reply = match result {
            Ok(StoreReply::Changed { ranges, next }) => {
                let below = mapped_below.unwrap_or(u32::MAX);
                let wanted =
                    |range: &ChangedRange| range.first_block < below && (mapped_below.is_none() || range.mapped);
                let ranges = ranges.into_iter().filter(wanted).map(|range| BlockRange {
                    first_block: range.first_block,
                    block_count: range.block_count.min(below - range.first_block),
                    mapped: range.mapped,
                    tail: None,
                });
                let mut ranges: Vec<BlockRange> = ranges.collect();
                if mapped_below.is_none() && !planted!("cs_rebuilt_without_tail") {
                    ranges = self.with_tails(chunk, ranges);
                }
                Ok(CsReply::Ranges { ranges, next: next.filter(|next| *next < below) })
            }
            Ok(other) => panic!("the store answers a listing with {other:?}"),
            Err(StoreError::NoChunk { .. }) => Err(CsError::NoSuchChunk(chunk)),
            Err(StoreError::Failed { what }) => Err(CsError::DiskFailed(what)),
            Err(other) => Err(CsError::Invalid(other.to_string())),
        };
        self.answer_call(caller, reply, out);
    }

    /// Cuts runs of blocks where the unsettled write changes that they come from.
    fn with_tails(&self, chunk: ChunkId, ranges: Vec<BlockRange>) -> Vec<BlockRange> {
        let Some(volume) = self.store.chunk(chunk).map(|info| info.volume) else { return ranges };
        let tail: Vec<_> = self.store.tail(volume).filter(|entry| entry.chunk == chunk).collect();
        if tail.is_empty() {
            return ranges;
        }
        let mut cut = Vec::with_capacity(ranges.len() + tail.len());
        for range in ranges {
            let (mut at, end) = (range.first_block, range.first_block + range.block_count);
            while at < end {
                let of = self.store.tail_latest(chunk, at);
                let bounds = tail.iter().flat_map(|entry| [entry.first_block, entry.first_block + entry.block_count]);
                let stop = bounds.filter(|bound| *bound > at).min().unwrap_or(end).min(end);
                cut.push(BlockRange { first_block: at, block_count: stop - at, tail: of, ..range });
                at = stop;
            }
        }
        cut
    }

    pub(super) fn answer_call(&mut self, caller: Caller, reply: Result<CsReply, CsError>, out: &mut Effects) {
        if self.links.answered(caller.link) {
            out.send(caller.link, FrameKind::CsReply, caller.id, cairn_wire::encode(&reply));
        }
    }
}
