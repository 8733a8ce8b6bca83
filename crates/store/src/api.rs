//! Requests, replies, errors, notices and settings of the store.

use crate::layout::superblock::SuperblockError;
use cairn_env::{Buf, DiskError, DiskRequest};
use cairn_types::{ChunkId, ChunkVersion, ClusterId, Epoch, LayerId, Sequence, VolumeId};

/// Most blocks of one [`StoreRequest::Write`] or [`StoreRequest::Read`]: 1 MiB.
pub const REQUEST_BLOCKS_MAX: u32 = 256;

/// What a new store is told once.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The cluster the store belongs to.
    pub cluster: ClusterId,
    /// Identity of the store. Draw a new one for every format: old group headers on the device carry the old one.
    pub store_uuid: [u8; 16],
    /// Bytes to use; zero or more than the device: the whole device.
    pub capacity_bytes: u64,
}

/// What a store is told each time it is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Refuse the store of another cluster.
    pub cluster: Option<ClusterId>,
    /// Refuse another store.
    pub store_uuid: Option<[u8; 16]>,
    /// Memory for index leaves. Changed leaves may exceed it until the next checkpoint.
    pub cache_bytes: u64,
    /// Changed leaves that start a checkpoint; twice as many make writes wait for it.
    pub dirty_leaves_max: u64,
    /// Groups since the last checkpoint that start one; twice as many make writes wait for it. Bounds recovery.
    pub chain_groups_max: u64,
    /// Blocks written since the last checkpoint that start one.
    pub chain_blocks_max: u64,
    /// Groups in flight: more overlap device latency, fewer make larger groups.
    pub groups_in_flight_max: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            cluster: None,
            store_uuid: None,
            cache_bytes: 64 << 20,
            dirty_leaves_max: 8192,
            chain_groups_max: 8192,
            chain_blocks_max: 65_536,
            groups_in_flight_max: 3,
        }
    }
}

/// One request. The token given to `submit` comes back with the answer.
#[derive(Clone, Debug)]
pub enum StoreRequest {
    /// Makes an empty chunk. Durable when answered.
    CreateChunk {
        /// New, never used before.
        chunk: ChunkId,
        /// Its volume.
        volume: VolumeId,
        /// Its layer.
        layer: LayerId,
        /// Its place in the layer.
        index: u64,
        /// Blocks it spans, at most [`CHUNK_BLOCKS_MAX`](crate::CHUNK_BLOCKS_MAX).
        block_count: u32,
        /// Its version.
        version: ChunkVersion,
        /// Opaque map fragment, at most [`TAG_BYTES_MAX`](crate::TAG_BYTES_MAX) bytes.
        tag: Vec<u8>,
    },
    /// Removes a chunk and everything in it. Durable when answered.
    DeleteChunk {
        /// The chunk.
        chunk: ChunkId,
    },
    /// Sets the version of a chunk and of the blocks of its unsettled tail. Durable when answered.
    SetVersion {
        /// The chunk.
        chunk: ChunkId,
        /// The new version.
        version: ChunkVersion,
    },
    /// Replaces the tag of a chunk. Durable when answered.
    SetTag {
        /// The chunk.
        chunk: ChunkId,
        /// The new tag.
        tag: Vec<u8>,
    },
    /// Takes all blocks of a chunk out of the unsettled tail, and leaves them as they are: a copy that is about to be
    /// brought up to date from another one no longer answers for them. Durable when answered.
    ForgetTail {
        /// The chunk.
        chunk: ChunkId,
    },
    /// Raises the lowest epoch that may write to a volume. Writes of a lower epoch that are not in the log yet fail
    /// from now on. Durable when answered.
    Fence {
        /// The volume.
        volume: VolumeId,
        /// The epoch.
        epoch: Epoch,
    },
    /// Forgets fence and settled mark of a deleted volume. Durable when answered.
    ForgetVolume {
        /// The volume; must have no chunks here.
        volume: VolumeId,
    },
    /// Writes whole blocks. Sequence zero marks a repair: it does not enter the unsettled tail.
    Write {
        /// The chunk.
        chunk: ChunkId,
        /// Version the blocks get.
        version: ChunkVersion,
        /// Epoch of the writer.
        epoch: Epoch,
        /// Sequence of the write.
        sequence: Sequence,
        /// First block.
        first_block: u32,
        /// CRC-64 of each block; the caller has verified them.
        checksums: Vec<u64>,
        /// `checksums.len()` blocks, at most [`REQUEST_BLOCKS_MAX`].
        data: Buf,
        /// Durable before the answer.
        durable: bool,
    },
    /// Gives up blocks: they read as zeros, their space returns, their version stays known.
    Unmap {
        /// The chunk.
        chunk: ChunkId,
        /// Version the blocks get.
        version: ChunkVersion,
        /// Epoch of the writer.
        epoch: Epoch,
        /// Sequence of the write.
        sequence: Sequence,
        /// First block.
        first_block: u32,
        /// Blocks, any number within the chunk.
        block_count: u32,
        /// Durable before the answer.
        durable: bool,
    },
    /// Reads blocks and verifies their checksums.
    Read {
        /// The chunk.
        chunk: ChunkId,
        /// First block.
        first_block: u32,
        /// Blocks, at most [`REQUEST_BLOCKS_MAX`].
        block_count: u32,
    },
    /// Makes everything answered before durable.
    Flush,
    /// Writes of `volume` up to this mark are durable on all replicas: they leave the tail. Answered at once; after a
    /// crash the tail may be longer again.
    Settle {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the mark.
        epoch: Epoch,
        /// Sequence of the mark.
        sequence: Sequence,
    },
    /// Lists blocks whose version is higher than `version`, mapped or not.
    ChangedSince {
        /// The chunk.
        chunk: ChunkId,
        /// Versions up to this one are not listed.
        version: ChunkVersion,
        /// First block to look at.
        from_block: u32,
        /// Most ranges to return.
        limit: u32,
    },
    /// Reads the mapped blocks of a range and compares checksums (scrub).
    Verify {
        /// The chunk.
        chunk: ChunkId,
        /// First block to look at.
        from_block: u32,
        /// Blocks to look at, at most [`REQUEST_BLOCKS_MAX`].
        limit: u32,
    },
    /// Keeps a few bytes for the owner of the store, in place of those before. Durable when answered.
    SetLabel {
        /// The bytes.
        label: [u8; crate::LABEL_BYTES],
    },
    /// Writes a checkpoint now: before a planned stop, so that the next start has nothing to replay.
    Checkpoint,
}

/// Answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreReply {
    /// A write or unmap is in the log.
    Written {
        /// Its log sequence number; a flush reports up to which one everything is durable.
        lsn: u64,
    },
    /// A change of metadata is done and durable (a settle: done).
    Done,
    /// Data read.
    Data(ReadData),
    /// Everything up to `lsn` is durable.
    Flushed {
        /// The highest durable log sequence number.
        lsn: u64,
    },
    /// Answer to [`StoreRequest::ChangedSince`].
    Changed {
        /// In order, not overlapping.
        ranges: Vec<ChangedRange>,
        /// Where to go on; none at the end of the chunk.
        next: Option<u32>,
    },
    /// Answer to [`StoreRequest::Verify`].
    Verified {
        /// Blocks whose data or index entry is damaged.
        bad: Vec<u32>,
        /// Where to go on; none at the end of the chunk.
        next: Option<u32>,
    },
}

/// Blocks read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadData {
    /// The bytes in order, in one or more pieces of whole blocks.
    pub data: Vec<Buf>,
    /// CRC-64 of each block; unmapped blocks have that of zeros.
    pub checksums: Vec<u64>,
    /// For each block whether it holds data.
    pub mapped: Vec<bool>,
}

/// Blocks with a version above the one asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRange {
    /// First block.
    pub first_block: u32,
    /// Blocks.
    pub block_count: u32,
    /// False: the blocks were unmapped.
    pub mapped: bool,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such chunk here.
    #[error("{chunk} is not on this store")]
    NoChunk {
        /// The chunk asked for.
        chunk: ChunkId,
    },
    /// The chunk exists already.
    #[error("{chunk} exists already")]
    Exists {
        /// The chunk.
        chunk: ChunkId,
    },
    /// The request makes no sense.
    #[error("invalid request: {what}")]
    Invalid {
        /// What is wrong with it.
        what: &'static str,
    },
    /// No space left for data. Deletes, unmaps, fences and version changes go on.
    #[error("no space left on the store")]
    NoSpace,
    /// The volume is fenced above the epoch of the request.
    #[error("{volume} is fenced at {current}, the request carries {requested}")]
    StaleEpoch {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the request.
        requested: Epoch,
        /// The fence.
        current: Epoch,
    },
    /// Blocks are damaged here; another replica has them. Writing a block repairs it.
    #[error("{chunk} has {} damaged blocks, the first is {}", .blocks.len(), .blocks.first().copied().unwrap_or(0))]
    Corrupt {
        /// The chunk.
        chunk: ChunkId,
        /// The damaged blocks.
        blocks: Vec<u32>,
    },
    /// The device failed to read.
    #[error("read from the device")]
    Io(#[source] DiskError),
    /// The store stopped after a failed write or flush and must be opened anew (I12).
    #[error("the store has stopped: {what}")]
    Failed {
        /// What failed.
        what: String,
    },
    /// The store is not open yet.
    #[error("the store is not open")]
    NotOpen,
}

/// What a caller does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The request is wrong or came too late: refuse it.
    Refuse,
    /// Ask another replica.
    TryOtherReplica,
    /// Ask another replica and write the good blocks back here.
    Repair,
    /// Open the store anew.
    Reopen,
}

impl StoreError {
    /// What to do about it.
    pub fn action(&self) -> ErrorAction {
        match self {
            Self::NoChunk { .. } | Self::Exists { .. } | Self::Invalid { .. } | Self::StaleEpoch { .. } => {
                ErrorAction::Refuse
            }
            Self::NoSpace | Self::Io(_) | Self::NotOpen => ErrorAction::TryOtherReplica,
            Self::Corrupt { .. } => ErrorAction::Repair,
            Self::Failed { .. } => ErrorAction::Reopen,
        }
    }
}

/// Something an operator or the repair machinery should know; no request is waiting for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Blocks are damaged: fetch them from another replica and write them.
    Corrupt {
        /// The chunk.
        chunk: ChunkId,
        /// The damaged blocks.
        blocks: Vec<u32>,
    },
    /// The device failed to read.
    ReadFailed(DiskError),
    /// The store has stopped and answers everything with [`StoreError::Failed`].
    Stopped {
        /// What failed.
        what: String,
    },
    /// A checkpoint is durable.
    Checkpointed {
        /// Its generation.
        generation: u64,
    },
}

/// What the store wants done. The caller empties it after every call.
#[derive(Default, Debug)]
pub struct StoreOutput {
    /// For the disk, in any order.
    pub disk: Vec<DiskRequest>,
    /// Answers.
    pub done: Vec<(u64, Result<StoreReply, StoreError>)>,
    /// Set once, when opening has ended.
    pub opened: Option<Result<OpenReport, OpenError>>,
    /// See [`Notice`].
    pub notices: Vec<Notice>,
}

/// What opening found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// The cluster of the store.
    pub cluster: ClusterId,
    /// Identity of the store.
    pub store_uuid: [u8; 16],
    /// Checkpoint the store was opened from.
    pub generation: u64,
    /// Groups replayed on top of it.
    pub groups_replayed: u64,
    /// The highest log sequence number: that of this session's first group.
    pub lsn: u64,
    /// The highest log sequence number found: everything ever reported durable is at or below it.
    pub recovered_lsn: u64,
    /// Chunks on the store.
    pub chunks: u64,
    /// A group at the end of the log was incomplete and dropped: no flush had covered it.
    pub torn_tail: bool,
}

/// Why a store cannot be opened. `doctor` explains more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No superblock: never formatted, or the wrong device.
    #[error("no store on this device: {reason}; check the path, or format it")]
    NotAStore {
        /// What the first copy looks like.
        #[source]
        reason: SuperblockError,
    },
    /// Both superblock copies of one checkpoint are damaged, so the newest state is unknown.
    #[error(
        "both superblock copies at byte {offset} and 1 MiB above are damaged; remove this server and let its data be rebuilt"
    )]
    SuperblockDamaged {
        /// Byte offset of the first copy.
        offset: u64,
    },
    /// Groups on disk were written after a newer checkpoint than any superblock knows: a superblock write was lost.
    #[error(
        "a superblock of generation {needed} is missing, the newest is {found}; the device loses writes: replace it"
    )]
    SuperblockLost {
        /// Newest generation found.
        found: u64,
        /// Generation a group refers to.
        needed: u64,
    },
    /// The store belongs to another cluster.
    #[error("the store belongs to cluster {found}, not {expected}")]
    WrongCluster {
        /// Cluster in the superblock.
        found: ClusterId,
        /// Cluster asked for.
        expected: ClusterId,
    },
    /// Another store than the one asked for.
    #[error("another store is on this device (uuid {found:02x?}, expected {expected:02x?})")]
    WrongStore {
        /// Uuid in the superblock.
        found: [u8; 16],
        /// Uuid asked for.
        expected: [u8; 16],
    },
    /// The device is smaller than the store.
    #[error("the device has {device_bytes} bytes, the store needs {store_bytes}; was it truncated?")]
    Truncated {
        /// Size of the device.
        device_bytes: u64,
        /// Size of the store.
        store_bytes: u64,
    },
    /// A metadata structure is damaged.
    #[error("{structure} at byte {offset} is damaged: {detail}; remove this server and let its data be rebuilt")]
    Damaged {
        /// Which structure.
        structure: &'static str,
        /// Byte offset, zero when it has no single place.
        offset: u64,
        /// What is wrong.
        detail: String,
    },
    /// The log is damaged at a place that had been flushed: opening would lose acknowledged writes.
    #[error(
        "group {group} of the log at byte {offset} is damaged although it was flushed; remove this server and let its data be rebuilt"
    )]
    LogDamaged {
        /// The group.
        group: u64,
        /// Where its header is.
        offset: u64,
    },
    /// The device failed to read.
    #[error("device error while opening")]
    Io(#[source] DiskError),
    /// The device failed to write the first group of the session.
    #[error("the store stopped while opening: {what}")]
    Failed {
        /// What failed.
        what: String,
    },
}

/// Why a device cannot be formatted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too small.
    #[error("{bytes} bytes are too few for a store, the minimum is 16 MiB")]
    TooSmall {
        /// Bytes available.
        bytes: u64,
    },
    /// Too large.
    #[error("{bytes} bytes are too many for a store, the maximum is 4 PiB")]
    TooLarge {
        /// Bytes available.
        bytes: u64,
    },
}

/// Sizes and counts, for screens and placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes that data and index may occupy.
    pub capacity_bytes: u64,
    /// Bytes they occupy.
    pub used_bytes: u64,
    /// The rest.
    pub free_bytes: u64,
    /// Bytes of mapped blocks.
    pub data_bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Volumes with a fence, a settled mark or a tail.
    pub volumes: u64,
    /// Unsettled tail entries.
    pub tail_entries: u64,
    /// Index leaves in memory.
    pub cached_leaves: u64,
    /// Groups since the last checkpoint: what a crash would replay.
    pub chain_groups: u64,
    /// Bytes freed but not reusable before the next checkpoint.
    pub quarantined_bytes: u64,
    /// Newest durable checkpoint.
    pub generation: u64,
    /// Groups written since the start.
    pub groups_written: u64,
    /// Slots written by checkpoints since the start.
    pub checkpoint_slots_written: u64,
}
