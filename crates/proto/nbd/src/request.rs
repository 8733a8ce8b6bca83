//! What a client asked for.

use cairn_env::Buf;

/// One request of the transmission phase, checked against the export.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Goes back to [`crate::Session::finish`] with the outcome.
    pub ticket: Ticket,
    /// What to do.
    pub command: Command,
}

/// What to do. Ranges lie inside the export and are never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read a range.
    Read {
        /// Byte offset.
        offset: u64,
        /// Length in bytes, at most [`crate::limits::PAYLOAD_MAX`].
        len: u32,
    },
    /// Write `data`.
    Write {
        /// Byte offset.
        offset: u64,
        /// The bytes, at the start of an aligned buffer of their own.
        data: Buf,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make every write answered so far durable.
    Flush,
    /// Give up a range.
    Trim {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
        /// The zeros must take space.
        no_hole: bool,
        /// Fail with [`crate::Errno::NotSupported`] rather than be as slow as a write.
        fast: bool,
    },
    /// Which parts of a range are holes.
    BlockStatus {
        /// Byte offset.
        offset: u64,
        /// Length in bytes, at most [`crate::limits::BLOCK_STATUS_LEN_MAX`].
        len: u64,
    },
}

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyKind {
    /// With the bytes asked for.
    Data,
    /// With extents; `one` for at most one.
    Extents { one: bool },
    /// With success or failure; `writes` says how a range outside the export is reported.
    Status { writes: bool },
}

/// The right to answer one request, once. Neither `Copy` nor `Clone`: [`crate::Session::finish`] consumes it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request whose ticket is dropped is never answered"]
pub struct Ticket {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) kind: ReplyKind,
    pub(crate) cost: u64,
}

impl Ticket {
    /// The client's name for the request.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }
}
