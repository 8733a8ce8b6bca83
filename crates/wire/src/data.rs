//! The data path between a client and a chunk server (and between chunk servers, for repair): fixed layouts.
//!
//! A request is a [`DataHeader`], then for writes one CRC-64/NVME per block, then (as payload) the blocks. An answer is
//! a [`DataReplyHeader`], then for reads one checksum per block, then the blocks; when every block read is a hole the
//! flag [`FLAG_ZERO`] stands instead of checksums and payload.

use cairn_types::{BLOCK_SIZE, ChunkId, ChunkVersion, Epoch, Sequence, VolumeId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most blocks in one data request: 1 MiB.
pub const DATA_BLOCKS_MAX: u32 = 256;
const _: () = assert!(DATA_BLOCKS_MAX as usize * BLOCK_SIZE <= crate::frame::FRAME_PAYLOAD_MAX);

/// Durable before the answer (force unit access).
pub const FLAG_DURABLE: u8 = 1;
/// On a reply to a read: every block is a hole, nothing follows.
pub const FLAG_ZERO: u8 = 2;
/// On a read by a chunk server that rebuilds a copy: no lease, only the version is checked.
pub const FLAG_REPAIR: u8 = 4;

/// What a data request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DataOp {
    /// Reads blocks.
    Read = 1,
    /// Writes blocks.
    Write = 2,
    /// Unmaps blocks: they read as zeros and their space returns. Discard and write-zeroes both become this.
    Unmap = 3,
    /// Makes every answered write of the volume durable.
    Flush = 4,
    /// Confirms that `epoch` is still the highest of the volume (verified mode of rule 1). Reads nothing.
    Confirm = 5,
}

/// Fixed part of a data request: 64 bytes, little-endian, no padding.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataHeader {
    /// A [`DataOp`].
    pub op: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Written as zero, checked as zero.
    pub reserved: U16,
    /// Number of blocks; zero for flush and confirm.
    pub block_count: U32,
    /// The volume.
    pub volume: U64,
    /// The chunk; zero for flush and confirm.
    pub chunk: U64,
    /// The chunk version the sender relies on.
    pub version: U64,
    /// The sender's lease epoch.
    pub epoch: U64,
    /// Number of this write within the epoch.
    pub sequence: U64,
    /// Every write of this epoch up to this one is settled: durable on all replicas (rule 3).
    pub settled: U64,
    /// First block within the chunk.
    pub first_block: U32,
    /// Written as zero, checked as zero.
    pub reserved_2: U32,
}
/// Size of [`DataHeader`].
pub const DATA_HEADER_SIZE: usize = 64;
const _: () = assert!(size_of::<DataHeader>() == DATA_HEADER_SIZE);

/// Fixed part of an answer: 32 bytes, little-endian, no padding.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataReplyHeader {
    /// A [`DataStatus`].
    pub status: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Written as zero, checked as zero.
    pub reserved: U16,
    /// Number of blocks that follow.
    pub block_count: U32,
    /// All writes of this epoch received by this server up to this sequence are durable here.
    pub durable: U64,
    /// The server's version of the chunk (on [`DataStatus::VersionMismatch`]) or its first bad block (on `Corrupt`).
    pub detail: U64,
    /// The highest epoch the server knows for the volume.
    pub epoch: U64,
}
/// Size of [`DataReplyHeader`].
pub const DATA_REPLY_HEADER_SIZE: usize = 32;
const _: () = assert!(size_of::<DataReplyHeader>() == DATA_REPLY_HEADER_SIZE);

/// Outcome of a data request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DataStatus {
    /// Done.
    Ok = 0,
    /// A higher epoch is known: the sender lost its lease.
    StaleEpoch = 1,
    /// The chunk is at another version, given in `detail`.
    VersionMismatch = 2,
    /// The server has no such chunk.
    NoSuchChunk = 3,
    /// The disk is full.
    NoSpace = 4,
    /// A block's checksum does not match its data; the copy here is bad, another may be good.
    Corrupt = 5,
    /// The server's disk failed; it serves nothing until looked after.
    DiskFailed = 6,
    /// The request makes no sense (range outside the chunk, payload does not match its checksum).
    BadRequest = 7,
    /// The server has never been told this epoch: fence first.
    NotFenced = 8,
}

impl DataStatus {
    fn from_byte(byte: u8) -> Option<Self> {
        use DataStatus::*;
        [Ok, StaleEpoch, VersionMismatch, NoSuchChunk, NoSpace, Corrupt, DiskFailed, BadRequest, NotFenced]
            .into_iter()
            .find(|status| *status as u8 == byte)
    }
}

/// A data request, decoded. The blocks themselves are the frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataRequest {
    /// What to do.
    pub op: DataOp,
    /// `FLAG_*`.
    pub flags: u8,
    /// The volume.
    pub volume: VolumeId,
    /// The chunk.
    pub chunk: ChunkId,
    /// The chunk version the sender relies on.
    pub version: ChunkVersion,
    /// The sender's epoch.
    pub epoch: Epoch,
    /// Number of the write within the epoch; zero for reads.
    pub sequence: Sequence,
    /// Settled mark of the epoch.
    pub settled: Sequence,
    /// First block within the chunk.
    pub first_block: u32,
    /// Number of blocks.
    pub block_count: u32,
    /// One per block, for writes only.
    pub checksums: Vec<u64>,
}

/// An answer, decoded. The blocks read are the frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataReply {
    /// Outcome.
    pub status: DataStatus,
    /// `FLAG_*`.
    pub flags: u8,
    /// Durable mark of the epoch at this server.
    pub durable: Sequence,
    /// See [`DataReplyHeader::detail`].
    pub detail: u64,
    /// Highest epoch the server knows.
    pub epoch: Epoch,
    /// One per block read; empty with [`FLAG_ZERO`].
    pub checksums: Vec<u64>,
    /// Number of blocks read.
    pub block_count: u32,
}

/// A data frame whose prefix is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed data frame: {0}")]
pub struct DataError(pub &'static str);

fn checksums_of(bytes: &[u8], count: usize) -> Result<Vec<u64>, DataError> {
    if bytes.len() != count * 8 {
        return Err(DataError("the number of checksums does not match the number of blocks"));
    }
    Ok(bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("eight bytes"))).collect())
}

fn append_checksums(out: &mut Vec<u8>, checksums: &[u64]) {
    checksums.iter().for_each(|checksum| out.extend_from_slice(&checksum.to_le_bytes()));
}

impl DataRequest {
    /// Appends the prefix of this request to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let header = DataHeader {
            op: self.op as u8,
            flags: self.flags,
            reserved: U16::ZERO,
            block_count: U32::new(self.block_count),
            volume: U64::new(self.volume.0),
            chunk: U64::new(self.chunk.0),
            version: U64::new(self.version.0),
            epoch: U64::new(self.epoch.0),
            sequence: U64::new(self.sequence.0),
            settled: U64::new(self.settled.0),
            first_block: U32::new(self.first_block),
            reserved_2: U32::ZERO,
        };
        out.extend_from_slice(header.as_bytes());
        append_checksums(out, &self.checksums);
    }

    /// Decodes a prefix and checks it against the length of the payload that came with it.
    ///
    /// # Errors
    /// [`DataError`] in words; the sender is broken and its link is closed.
    pub fn decode(prefix: &[u8], payload_len: usize) -> Result<Self, DataError> {
        let (header, rest) =
            DataHeader::read_from_prefix(prefix).map_err(|_| DataError("the prefix is shorter than its header"))?;
        let op = [DataOp::Read, DataOp::Write, DataOp::Unmap, DataOp::Flush, DataOp::Confirm]
            .into_iter()
            .find(|op| *op as u8 == header.op)
            .ok_or(DataError("unknown operation"))?;
        let block_count = header.block_count.get();
        let has_blocks = matches!(op, DataOp::Read | DataOp::Write | DataOp::Unmap);
        let blocks_max = if op == DataOp::Unmap { u32::MAX } else { DATA_BLOCKS_MAX };
        if header.reserved.get() != 0 || header.reserved_2.get() != 0 {
            return Err(DataError("a reserved field is not zero"));
        }
        if has_blocks != (block_count > 0) || block_count > blocks_max {
            return Err(DataError("the number of blocks is out of range"));
        }
        if header.first_block.get().checked_add(block_count).is_none() {
            return Err(DataError("the range of blocks overflows"));
        }
        let carried = if op == DataOp::Write { block_count as usize } else { 0 };
        if payload_len != carried * BLOCK_SIZE {
            return Err(DataError("the payload does not match the number of blocks"));
        }
        Ok(Self {
            op,
            flags: header.flags,
            volume: VolumeId(header.volume.get()),
            chunk: ChunkId(header.chunk.get()),
            version: ChunkVersion(header.version.get()),
            epoch: Epoch(header.epoch.get()),
            sequence: Sequence(header.sequence.get()),
            settled: Sequence(header.settled.get()),
            first_block: header.first_block.get(),
            block_count,
            checksums: checksums_of(rest, carried)?,
        })
    }
}

impl DataReply {
    /// An answer without data.
    pub fn of(status: DataStatus) -> Self {
        Self {
            status,
            flags: 0,
            durable: Sequence(0),
            detail: 0,
            epoch: Epoch(0),
            checksums: Vec::new(),
            block_count: 0,
        }
    }

    /// Appends the prefix of this answer to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let header = DataReplyHeader {
            status: self.status as u8,
            flags: self.flags,
            reserved: U16::ZERO,
            block_count: U32::new(self.block_count),
            durable: U64::new(self.durable.0),
            detail: U64::new(self.detail),
            epoch: U64::new(self.epoch.0),
        };
        out.extend_from_slice(header.as_bytes());
        append_checksums(out, &self.checksums);
    }

    /// Decodes a prefix and checks it against the length of the payload that came with it.
    ///
    /// # Errors
    /// [`DataError`] in words; the sender is broken and its link is closed.
    pub fn decode(prefix: &[u8], payload_len: usize) -> Result<Self, DataError> {
        let (header, rest) = DataReplyHeader::read_from_prefix(prefix)
            .map_err(|_| DataError("the prefix is shorter than its header"))?;
        let status = DataStatus::from_byte(header.status).ok_or(DataError("unknown status"))?;
        let block_count = header.block_count.get();
        if header.reserved.get() != 0 {
            return Err(DataError("a reserved field is not zero"));
        }
        if block_count > DATA_BLOCKS_MAX {
            return Err(DataError("the number of blocks is out of range"));
        }
        let carried = if header.flags & FLAG_ZERO != 0 { 0 } else { block_count as usize };
        if payload_len != carried * BLOCK_SIZE {
            return Err(DataError("the payload does not match the number of blocks"));
        }
        Ok(Self {
            status,
            flags: header.flags,
            durable: Sequence(header.durable.get()),
            detail: header.detail.get(),
            epoch: Epoch(header.epoch.get()),
            checksums: checksums_of(rest, carried)?,
            block_count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_and_answers_survive_the_trip() {
        let request = DataRequest {
            op: DataOp::Write,
            flags: FLAG_DURABLE,
            volume: VolumeId(1),
            chunk: ChunkId(2),
            version: ChunkVersion(3),
            epoch: Epoch(4),
            sequence: Sequence(5),
            settled: Sequence(4),
            first_block: 7,
            block_count: 2,
            checksums: vec![10, 11],
        };
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        assert_eq!(DataRequest::decode(&bytes, 2 * BLOCK_SIZE), Ok(request));
        assert!(DataRequest::decode(&bytes, BLOCK_SIZE).is_err());
        let reply = DataReply { checksums: vec![1], block_count: 1, ..DataReply::of(DataStatus::Ok) };
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        assert_eq!(DataReply::decode(&bytes, BLOCK_SIZE), Ok(reply));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_decoders(bytes in prop::collection::vec(any::<u8>(), 0..200), payload in 0usize..9000) {
            let _ = DataRequest::decode(&bytes, payload);
            let _ = DataReply::decode(&bytes, payload);
        }
    }
}
