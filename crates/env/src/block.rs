//! A block device as front ends see it: what NBD, FUSE, iSCSI and the benchmark drive, and what a client volume offers.
//!
//! Offsets and lengths are bytes, aligned to nothing: the volume reads, merges and writes whole blocks by itself.
//! Operations complete in any order; overlapping operations in flight are ordered as submitted.

use crate::Buf;

/// One operation on a block device.
#[derive(Clone, Debug)]
pub enum BlockOp {
    /// Reads `len` bytes at `offset`.
    Read {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Writes `data` at `offset`.
    Write {
        /// Byte offset.
        offset: u64,
        /// The bytes; need not be aligned, whole aligned blocks travel without a copy.
        data: Buf,
        /// Durable on every replica before the answer (force unit access).
        fua: bool,
    },
    /// Makes every write answered before this was submitted durable on every replica.
    Flush,
    /// Gives up a range: it reads as zeros afterwards and its space returns. Partial blocks at the ends are zeroed.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Makes a range read as zeros.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before the answer.
        fua: bool,
    },
    /// Writes `data` only if the range holds exactly `compare`; atomic against every other operation on the device.
    CompareAndWrite {
        /// Byte offset.
        offset: u64,
        /// The bytes expected.
        compare: Buf,
        /// The bytes to write; as long as `compare`.
        data: Buf,
        /// Durable before the answer.
        fua: bool,
    },
    /// Which parts of a range hold data and which are holes that read as zeros.
    Extents {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A run of a range that either holds data or is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Byte offset.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// True for data, false for a hole.
    pub data: bool,
}

/// Answer to a [`BlockOp`].
#[derive(Clone, Debug)]
pub enum BlockReply {
    /// Done; nothing to tell.
    Done,
    /// The bytes read, in order, in one or more pieces.
    Data(Vec<Buf>),
    /// Runs that cover the range asked for without gap or overlap.
    Extents(Vec<Extent>),
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The range does not lie inside the device.
    #[error("range {offset}+{len} lies outside the volume of {size} bytes")]
    OutOfRange {
        /// Byte offset asked for.
        offset: u64,
        /// Length asked for.
        len: u64,
        /// Size of the device in bytes.
        size: u64,
    },
    /// The device was opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// No space in the cluster, and the volume was opened to fail rather than wait.
    #[error("no space left in the cluster")]
    NoSpace,
    /// The lease is lost: another client took it over, an operator revoked it, or it ran out while this client was
    /// stopped or cut off.
    #[error("the lease of this volume was lost; the log says why")]
    Fenced,
    /// [`BlockOp::CompareAndWrite`] found other bytes; `offset` is the first that differs, from the start of the range.
    #[error("compare-and-write found other data at byte {offset} of the range")]
    Miscompare {
        /// First differing byte, relative to the range.
        offset: u64,
    },
    /// Every copy of a block is damaged or lost.
    #[error("no good copy of the data at {offset}: {detail}")]
    Damaged {
        /// Byte offset of the damage.
        offset: u64,
        /// What each replica said.
        detail: String,
    },
    /// The device was closed while the operation was under way.
    #[error("the volume was closed")]
    Closed,
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// Result of one operation.
pub type BlockResult = Result<BlockReply, BlockError>;

/// Called once with the outcome of an operation, on the thread that drives the device.
pub type BlockDone = Box<dyn FnOnce(BlockResult)>;

/// A device that takes operations and answers each exactly once. Not `Send`: it lives on one thread with its users.
pub trait BlockDevice {
    /// Size in bytes; grows and shrinks with the volume.
    fn size(&self) -> u64;

    /// True when writes are refused.
    fn read_only(&self) -> bool;

    /// Starts `op`; `done` is called when it has ended, perhaps before this returns.
    fn submit(&self, op: BlockOp, done: BlockDone);
}
