//! `cairn doctor`: reads and explains what is on a disk, without a daemon.

use crate::context::Context;
use crate::exit;
use anyhow::{Context as _, Result};
use cairn_env::{Buf, BufMut, DiskError, DiskErrorKind};
use clap::Subcommand;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// What can be examined.
#[derive(Subcommand, Debug)]
pub enum DoctorVerb {
    /// The store of a stopped chunk server.
    Cs {
        /// Its repository directory, or the store itself.
        dir: PathBuf,
        /// Reads every block and compares its checksum.
        #[arg(long)]
        deep: bool,
    },
}

/// Runs the verb; the exit code is 0 for a healthy store, 1 otherwise.
pub fn run(_context: &Context, verb: &DoctorVerb) -> Result<i32> {
    let DoctorVerb::Cs { dir, deep } = verb;
    let path = if dir.is_dir() { dir.join("store") } else { dir.clone() };
    let file = std::fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let size = file_size(&file).with_context(|| format!("find the size of {}", path.display()))?;
    let mut read = |offset: u64, len: u32| -> Result<Buf, DiskError> {
        let mut buf = BufMut::zeroed(len as usize);
        file.read_exact_at(&mut buf, offset).map_err(|_| DiskError {
            operation: "read",
            offset,
            len: u64::from(len),
            kind: DiskErrorKind::Io,
        })?;
        Ok(buf.freeze())
    };
    let report = cairn_store::doctor::check(&mut read, size, *deep);
    println!("{report}");
    Ok(if report.is_healthy() { exit::DONE } else { exit::FAILED })
}

/// Size of a file or block device: both can be sought to their end.
fn file_size(mut file: &std::fs::File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0))
}
