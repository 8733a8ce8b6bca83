//! The server side of the NBD protocol, without a socket: bytes in, typed requests out, replies into a byte queue.
//!
//! Source: "The NBD protocol" (`doc/proto.md` of the NetworkBlockDevice project, as of version 3.27) and its
//! `extension-ext-header` branch; comments name the section they follow. What is supported stands in
//! `docs/formats/nbd.md`.
//!
//! Start at [`Session`]: feed it what the socket gave with [`Session::receive`], run the [`Event::Request`]s it found
//! on the device, and give each outcome back with [`Session::finish`]. Both leave their bytes in an [`Output`].
//!
//! Invariants:
//! - No input makes a session panic. A client's mistake gets the reply the protocol has for it, or a
//!   [`ProtocolError`], after which the connection must be closed.
//! - What a session holds for a client is bounded by [`limits`], whatever the client sends or refuses to read.
//! - How the input was cut into pieces changes nothing but the moment of the outcome.
//! - A request is answered exactly once, and only by [`Session::finish`] of its [`Ticket`] or by a refusal.

mod catalog;
mod fields;
mod handshake;
pub mod limits;
mod output;
mod reply;
mod request;
mod session;
mod transmission;
pub mod wire;

pub use catalog::{Catalog, ExportInfo, resolve};
pub use output::Output;
pub use request::{Command, Request, Ticket};
pub use session::{Event, ProtocolError, Session, TlsMode};
pub use wire::Errno;
