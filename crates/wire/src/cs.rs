//! Rare calls to a chunk server: fencing, tails, versions, repair. The frequent ones are in [`crate::data`].

use cairn_types::{ChunkId, ChunkVersion, Epoch, LayerId, Sequence, VolumeId};
use serde::{Deserialize, Serialize};

/// Most tail entries or ranges in one answer; the caller asks on.
pub const CS_LIST_MAX: usize = 16384;

/// Calls. All but those marked *repair* come from lease holders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CsRequest {
    /// First call on a data link: who calls. Answered by [`CsReply::Hello`].
    Hello {
        /// Number of the calling session's link, rising: a later link of the same session ends the earlier one, so
        /// that no packet of the old link can be executed after one of the new.
        session: u64,
        /// Generation of the link within the session.
        generation: u64,
    },
    /// Durably refuses every lower epoch of the volume from now on, reads and writes alike; answered by
    /// [`CsReply::Fenced`].
    Fence {
        /// The volume.
        volume: VolumeId,
        /// The new epoch.
        epoch: Epoch,
    },
    /// Unsettled writes of a volume known here, after `skip` entries; answered by [`CsReply::Tail`].
    Tail {
        /// The volume.
        volume: VolumeId,
        /// The caller's epoch.
        epoch: Epoch,
        /// Entries already seen.
        skip: u64,
    },
    /// Creates a chunk, if absent, at this version. Idempotent.
    Create {
        /// The chunk.
        chunk: ChunkId,
        /// Its volume.
        volume: VolumeId,
        /// Its layer.
        layer: LayerId,
        /// Its index in the volume.
        index: u64,
        /// Number of blocks.
        block_count: u32,
        /// Its version.
        version: ChunkVersion,
        /// The caller's epoch.
        epoch: Epoch,
    },
    /// Raises a chunk from a version in `since..=version` to `version`, durably; its tail counts as written in the new
    /// version.
    Raise {
        /// The chunk.
        chunk: ChunkId,
        /// Its volume.
        volume: VolumeId,
        /// The caller's epoch.
        epoch: Epoch,
        /// Lowest version the copy may have now.
        since: ChunkVersion,
        /// The version to adopt.
        version: ChunkVersion,
    },
    /// Which blocks of a range are mapped; answered by [`CsReply::Ranges`].
    Extents {
        /// The chunk.
        chunk: ChunkId,
        /// Its volume.
        volume: VolumeId,
        /// The caller's epoch.
        epoch: Epoch,
        /// The version the caller relies on.
        version: ChunkVersion,
        /// First block.
        first_block: u32,
        /// Number of blocks.
        block_count: u32,
    },
    /// Everything of this epoch up to `settled` is durable on all replicas: tails may be dropped.
    Settle {
        /// The volume.
        volume: VolumeId,
        /// The caller's epoch.
        epoch: Epoch,
        /// The mark.
        settled: Sequence,
    },
    /// *Repair*: ranges of blocks whose version is above `after`, from `from_block` on; answered by
    /// [`CsReply::Ranges`]. Answered only by a copy at exactly `version`.
    Changed {
        /// The chunk.
        chunk: ChunkId,
        /// The version the copy must have.
        version: ChunkVersion,
        /// Blocks written in this version or before are not wanted; none wants every block with any history.
        after: Option<ChunkVersion>,
        /// First block wanted.
        from_block: u32,
    },
}

/// One unsettled write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TailEntry {
    /// The chunk.
    pub chunk: ChunkId,
    /// First block.
    pub first_block: u32,
    /// Number of blocks.
    pub block_count: u32,
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Number of the write.
    pub sequence: Sequence,
    /// True for an unmap.
    pub unmap: bool,
}

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub first_block: u32,
    /// Number of blocks.
    pub block_count: u32,
    /// The blocks hold data; false: they were unmapped.
    pub mapped: bool,
    /// The unsettled write these blocks come from, if it is unsettled: a copy made of them has to know it too, or a
    /// version change would not mark the blocks there.
    pub tail: Option<(Epoch, Sequence)>,
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CsReply {
    /// Done.
    Done,
    /// The server's identity.
    Hello {
        /// Drawn at each start: tells a restart, after which unflushed writes may be lost.
        boot: u64,
    },
    /// The epoch is fenced.
    Fenced {
        /// Drawn at each start.
        boot: u64,
        /// Number of unsettled entries held.
        tail: u64,
        /// The epoch that was the highest before.
        previous: Epoch,
    },
    /// Unsettled writes; `end` when none follow.
    Tail {
        /// The entries.
        entries: Vec<TailEntry>,
        /// No more follow.
        end: bool,
    },
    /// Runs of blocks; `next` is where to ask on, none at the end.
    Ranges {
        /// The runs, ascending.
        ranges: Vec<BlockRange>,
        /// Next block to ask for.
        next: Option<u32>,
    },
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CsError {
    /// A higher epoch is known.
    #[error("{volume} is fenced at {current}")]
    StaleEpoch {
        /// The volume.
        volume: VolumeId,
        /// The highest epoch.
        current: Epoch,
    },
    /// The copy has another version.
    #[error("{chunk} is at {current} here")]
    VersionMismatch {
        /// The chunk.
        chunk: ChunkId,
        /// Its version here.
        current: ChunkVersion,
    },
    /// No such chunk here.
    #[error("{0} is not on this chunk server")]
    NoSuchChunk(ChunkId),
    /// The caller has not fenced this epoch here.
    #[error("{0} has not been fenced at this epoch")]
    NotFenced(VolumeId),
    /// A later link of the same session exists.
    #[error("a later link of this session took over")]
    Superseded,
    /// The disk failed.
    #[error("the disk of this chunk server failed: {0}")]
    DiskFailed(String),
    /// No space.
    #[error("the disk of this chunk server is full")]
    NoSpace,
    /// The arguments make no sense.
    #[error("invalid request: {0}")]
    Invalid(String),
}
