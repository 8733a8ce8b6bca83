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
    let mut reader = postcard::Deserializer::from_flavor(Unpromised(postcard::de_flavors::Slice::new(bytes)));
    let read = T::deserialize(&mut reader).and_then(|message| Ok((message, reader.finalize()?)));
    match read {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(MessageError { what, reason: format!("{} bytes too many", rest.len()) }),
        Err(error) => Err(MessageError { what, reason: error.to_string() }),
    }
}

/// Bytes whose length fields are not believed: room for a list is made as its elements arrive. Otherwise a list that
/// claims an element for each byte that follows would get all their memory at once (I19).
struct Unpromised<'a>(postcard::de_flavors::Slice<'a>);

impl<'a> postcard::de_flavors::Flavor<'a> for Unpromised<'a> {
    type Remainder = &'a [u8];
    type Source = &'a [u8];

    fn pop(&mut self) -> postcard::Result<u8> {
        self.0.pop()
    }

    /// No list is ever believed to fit.
    fn size_hint(&self) -> Option<usize> {
        Some(0)
    }

    fn try_take_n(&mut self, count: usize) -> postcard::Result<&'a [u8]> {
        self.0.try_take_n(count)
    }

    fn finalize(self) -> postcard::Result<&'a [u8]> {
        self.0.finalize()
    }
}
