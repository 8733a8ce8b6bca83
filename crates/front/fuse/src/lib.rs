//! The FUSE front end: a cluster's namespace as a file system of this host.
//!
//! [`mount()`] joins the kernel to a client. `kernel` turns requests into jobs on the client's
//! thread, `core` holds the state of one mount there, `files` the leases of open files (its invariants F1–F3 are the
//! heart of this crate), `ops_*` one operation each. What users need to know stands in `docs/guide/mount.md`.
//!
//! Invariants: no session thread ever waits for another; no lock is held across I/O; a reply is sent exactly once, from
//! the completion of what it answers.

mod attr;
pub mod backend;
mod client;
mod core;
pub mod driver;
mod files;
mod full;
mod io;
mod kernel;
mod leases;
mod log;
pub mod mount;
mod ops_attr;
mod ops_dir;
mod ops_file;
mod ops_name;
mod ops_range;
pub mod options;
mod pieces;
mod removed;
mod reports;

pub use client::ClientRunner;
pub use mount::{MountError, Mounted, mount_with};
pub use options::{MountArgs, MountArgsError, MountOptions, parse_mount_args};

/// Mounts the cluster that `client` is connected to. The client ends with the mount. It must have been started with
/// [`cairn_client::OnNoSpace::Fail`]: where writes wait for room, the mount does the waiting.
///
/// # Errors
/// [`MountError`] when the log file or the kernel refuses.
pub fn mount(client: cairn_client::Client, options: &MountOptions) -> Result<Mounted, MountError> {
    mount_with(std::sync::Arc::new(ClientRunner(client)), options)
}
