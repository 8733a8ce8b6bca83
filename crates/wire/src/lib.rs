//! What Cairn's processes say to each other, byte by byte. No sockets here.
//!
//! Every link carries [`frame`]s. A link starts with the mutual [`auth`] handshake; then
//! - clients and chunk servers exchange [`data`] requests (fixed layout, payload after it) and [`cs`] calls (rare
//!   ones);
//! - everyone calls the metadata servers with [`mds`] requests;
//! - metadata servers exchange opaque Raft messages of `cairn-consensus`.
//!
//! Layouts and their history: `docs/formats/wire.md`. Invariant I19: no bytes panic a decoder or make it allocate
//! more than they are long.

pub mod auth;
pub mod cs;
pub mod data;
mod describe;
pub mod frame;
pub mod mds;
pub mod process;

pub use describe::describe;
pub use frame::{Frame, FrameError, FrameHeader, FrameKind, FrameReader};
pub use process::{DiskIndex, Effects, Event, LinkId, NetEffect, NetEvent, Now, Process};

use serde::{Serialize, de::DeserializeOwned};

/// A control message that is not what its frame kind promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what} message: {reason}")]
pub struct MessageError {
    what: &'static str,
    reason: String,
}

/// Encodes a control message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("every control message can be encoded")
}

/// Decodes a control message; trailing bytes are refused.
///
/// # Errors
/// [`MessageError`] when the bytes are not exactly one message of this type.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, MessageError> {
    match postcard::take_from_bytes::<T>(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(MessageError { what, reason: format!("{} bytes too many", rest.len()) }),
        Err(error) => Err(MessageError { what, reason: error.to_string() }),
    }
}
