//! Disk requests and completions as data.
//!
//! Contract of every disk, real or simulated (the conformance suite in `env-sim` and `env-real` checks it):
//! - offsets and lengths are multiples of [`DISK_ALIGNMENT`]; write buffers are aligned in memory;
//! - requests complete in any order, each exactly once; two requests in flight to overlapping ranges have no defined
//!   order, so a core never issues them;
//! - a completed write survives the death of the process; it survives a power cut only when a flush that was *issued
//!   after* its completion completed too. Before that any subset of its 512-byte sectors may be lost;
//! - a failed flush means that nothing since the last good flush may be assumed durable (I12).

use crate::Buf;

/// Alignment of offsets, lengths and memory: 4096 bytes suits every device we accept.
pub const DISK_ALIGNMENT: u64 = 4096;

/// Names one request of one core; the completion carries it back. Never reused by the core that gave it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoId(pub u64);

/// One request to a disk.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Comes back in [`DiskDone`].
    pub io: IoId,
    /// What to do.
    pub op: DiskOp,
}

/// What a disk can do.
#[derive(Clone, Debug)]
pub enum DiskOp {
    /// Reads `len` bytes at `offset`.
    Read {
        /// Byte offset, aligned.
        offset: u64,
        /// Length in bytes, aligned, not zero.
        len: u32,
    },
    /// Writes `bufs` one after the other from `offset`: one device write.
    Write {
        /// Byte offset, aligned.
        offset: u64,
        /// Each aligned in memory, each a multiple of 4096 bytes long.
        bufs: Vec<Buf>,
    },
    /// Makes every write completed before this request was issued durable.
    Flush,
    /// Tells the device that a range holds nothing of value. Advisory: reads of it return anything afterwards.
    Discard {
        /// Byte offset, aligned.
        offset: u64,
        /// Length in bytes, aligned.
        len: u64,
    },
}

/// Completion of a request. A successful read carries exactly the bytes asked for; other operations an empty buffer.
#[derive(Clone, Debug)]
pub struct DiskDone {
    /// The request's id.
    pub io: IoId,
    /// The bytes read, or why not.
    pub result: Result<Buf, DiskError>,
}

/// Why a disk did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("disk {operation} of {len} bytes at {offset}: {kind}")]
pub struct DiskError {
    /// `read`, `write`, `flush` or `discard`.
    pub operation: &'static str,
    /// Byte offset of the request.
    pub offset: u64,
    /// Length of the request in bytes.
    pub len: u64,
    /// What went wrong.
    pub kind: DiskErrorKind,
}

/// Kinds of disk failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskErrorKind {
    /// The device reported a medium or transport error (EIO and its relatives).
    #[error("input/output error")]
    Io,
    /// No answer within the deadline (R: a broken disk is never a hang).
    #[error("no answer from the device within the deadline")]
    Timeout,
    /// The file system under a store file is full.
    #[error("no space left on the device")]
    NoSpace,
    /// The device or file is read-only or was taken away.
    #[error("the device is read-only or gone")]
    Gone,
}
