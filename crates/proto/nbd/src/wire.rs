//! The numbers of the protocol. All fields on the wire are big-endian ("Conventions").

/// "NBDMAGIC", the first eight bytes of the server ("Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before the handshake flags and before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts a compact request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts an extended request (extension "extended headers").
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Starts a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts a chunk of a structured reply ("Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Starts a chunk of an extended reply (extension "extended headers").
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Size of a compact request header in bytes.
pub const REQUEST_SIZE: usize = 28;
/// Size of an extended request header in bytes.
pub const EXTENDED_REQUEST_SIZE: usize = 32;
/// Size of an option header in bytes.
pub const OPTION_HEADER_SIZE: usize = 16;

/// Handshake flags and the client's answers to them; both sides use the same bits ("Handshake flags").
pub mod handshake_flag {
    /// The peer speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeros after `NBD_OPT_EXPORT_NAME` may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// What an export can do ("Transmission flags").
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `NBD_CMD_TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes answered on every other.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_CACHE` is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake ("Option types").
pub mod option {
    /// Choose an export and start, without a way to answer an error.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Switch to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options ("Option reply types").
pub mod option_reply {
    /// Accepted, or end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// The option is not allowed here.
    pub const ERR_POLICY: u32 = 0x8000_0002;
    /// The option is malformed or comes at the wrong time.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// TLS must be started first.
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Extended headers are in use and rule this option out.
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Kinds of information about an export (`NBD_REP_INFO`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name the server uses itself.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Requests ("Request types").
pub mod command {
    /// Read a range.
    pub const READ: u16 = 0;
    /// Write a range.
    pub const WRITE: u16 = 1;
    /// Leave.
    pub const DISC: u16 = 2;
    /// Make answered writes durable.
    pub const FLUSH: u16 = 3;
    /// Give up a range.
    pub const TRIM: u16 = 4;
    /// The client will need a range soon.
    pub const CACHE: u16 = 5;
    /// Zero a range.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask what a range holds.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests ("Command flags").
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeros must take space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk at most.
    pub const DF: u16 = 1 << 2;
    /// One extent at most.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than write zeros slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length counts bytes that follow (extension "extended headers").
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured replies ("Structured reply types").
pub mod chunk {
    /// Flag: the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// Bytes of a read.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths (extension "extended headers").
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The request failed.
    pub const ERROR: u16 = 0x8001;
    /// The request failed at a known offset.
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// The one metadata context offered ("`base:allocation` metadata context").
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its id on every connection.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
/// The range takes no space.
pub const STATE_HOLE: u32 = 1 << 0;
/// The range reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// Error values of replies ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// `NBD_EPERM`: a write to a read-only export.
    NotPermitted = 1,
    /// `NBD_EIO`.
    Io = 5,
    /// `NBD_EINVAL`: an unknown command or flag, or a range outside the export.
    Invalid = 22,
    /// `NBD_ENOSPC`: no space, or a write outside the export.
    NoSpace = 28,
    /// `NBD_EOVERFLOW`: a read longer than the maximum payload.
    Overflow = 75,
    /// `NBD_ENOTSUP`: zeros can't be written any faster than data.
    NotSupported = 95,
    /// `NBD_ESHUTDOWN`: the server or the export is going away.
    Shutdown = 108,
}
