//! Serves block devices over NBD, on TCP and unix sockets.
//!
//! Start at [`NbdServer`]: give it [`Exports`] and listeners. Everything runs on one thread, inside a
//! `tokio::task::LocalSet`, beside the devices it serves; the protocol itself lives in `cairn-nbd-proto`.
//!
//! How a connection moves bytes: one task per connection reads what the socket has, hands every complete request to
//! the device and sends the replies that are ready, all in one turn. The payload of a large write is read from the
//! socket into the aligned buffer that travels to the disk; a small one is copied into such a buffer once. A
//! completion appends its reply to the connection's output. The completion that leaves nothing under way sends at
//! once; others wake the task, so that the completions of one turn of the device leave in one send.
//!
//! Invariants:
//! - A reply leaves only after the device answered.
//! - What a client makes the server hold is bounded (`cairn_nbd_proto::limits`): beyond it nothing more is read.
//! - A flush on any connection covers every write answered on any other: they share the device, and no one caches.
//! - Nothing that was agreed on in the clear survives the switch to TLS.

mod connection;
mod execute;
mod exports;
mod gate;
mod input;
mod notice;
mod server;
mod stream;
mod tls;
mod transport;

pub use exports::{Drained, ExportOptions, Exports, InsertError};
pub use gate::Gate;
pub use notice::{Ending, Notice};
pub use server::{NbdServer, ServerConfig};
pub use tls::{Tls, TlsError};
