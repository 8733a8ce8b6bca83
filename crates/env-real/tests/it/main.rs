//! The reactor over real loopback sockets and real files.

mod disks;
mod links;
mod support;
