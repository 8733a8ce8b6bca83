//! What a session accepts and holds at most.

use crate::wire::OPTION_HEADER_SIZE;

/// Longest string of the handshake in bytes ("Conventions": strings are at most 4096 bytes).
pub const STRING_MAX: usize = 4096;

/// Most data an option may carry; a longer one is read past and answered `NBD_REP_ERR_TOO_BIG`.
///
/// An option is taken only when it has arrived whole, so a receive buffer must hold [`RECEIVE_BUFFER_MIN`] bytes.
pub const OPTION_DATA_MAX: usize = 64 << 10;

/// Smallest receive buffer with which a session always makes progress.
pub const RECEIVE_BUFFER_MIN: usize = OPTION_HEADER_SIZE + OPTION_DATA_MAX;

/// Options are taken only while less than this waits to be sent; one reply may exceed it by the length of a listing.
pub const HANDSHAKE_OUTPUT_MAX: usize = 256 << 10;

/// Smallest length and alignment of a request.
pub const BLOCK_SIZE_MIN: u32 = 1;

/// Alignment at which requests are cheapest: the block of a volume.
pub const BLOCK_SIZE_PREFERRED: u32 = 4096;

/// Longest payload of a read or a write.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// A payload up to this size gets its buffer with its header; room for a longer one is made as it arrives (I19).
pub const PAYLOAD_AT_ONCE: usize = 1 << 20;

/// A refused payload is read past up to this length; a client that announces more is disconnected.
pub const PAYLOAD_DISCARD_MAX: u64 = 64 << 20;

/// Requests a connection may have under way.
pub const IN_FLIGHT_MAX: usize = 256;

/// Bytes a connection may hold: payloads of requests under way and replies not yet sent.
pub const IN_FLIGHT_BYTES_MAX: u64 = 64 << 20;

/// Longest range examined for one `NBD_CMD_BLOCK_STATUS`; a longer one gets a shorter answer, as the protocol allows.
pub const BLOCK_STATUS_LEN_MAX: u64 = 4 << 30;

/// Most extents in one reply ("`NBD_REPLY_TYPE_BLOCK_STATUS`": not more than 2^20).
pub const BLOCK_STATUS_EXTENTS_MAX: usize = 1 << 20;

/// Bytes of memory that the worst answer to a status request takes per block of its range.
pub(crate) const BLOCK_STATUS_BYTES_PER_BLOCK: u64 = 24;

const _: () = assert!(PAYLOAD_MAX as u64 <= IN_FLIGHT_BYTES_MAX, "the longest request must fit when nothing is held");
const _: () = assert!(
    BLOCK_STATUS_LEN_MAX / BLOCK_SIZE_PREFERRED as u64 * BLOCK_STATUS_BYTES_PER_BLOCK <= IN_FLIGHT_BYTES_MAX,
    "the longest status request must fit when nothing is held"
);
const _: () = assert!(PAYLOAD_MAX as u64 <= PAYLOAD_DISCARD_MAX);
const _: () = assert!(BLOCK_SIZE_PREFERRED.is_power_of_two() && BLOCK_SIZE_MIN.is_power_of_two());
