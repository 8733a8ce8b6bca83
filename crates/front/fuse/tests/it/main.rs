//! Real mounts on this host over a cluster in memory. They need root and `/dev/fuse`, and say so when they skip.

mod fsx;
mod full;
mod mounts;
mod real;
mod sharing;
mod world;

use cairn_fuse::backend::Runner;
use cairn_fuse::mount::MountError;
use cairn_fuse::{MountOptions, Mounted, mount_with};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use world::Cluster;

/// A mount on a directory of its own. Fields drop in order: first the mount, then its directory.
pub struct TestMount {
    mounted: Mounted,
    directory: TempDir,
}

impl TestMount {
    /// Mounts `cluster`, or tells why it cannot.
    pub fn new(cluster: &Cluster, options: &str) -> Option<Self> {
        Self::with(|| cluster.runner(), options)
    }

    /// Mounts what `runner` leads to.
    pub fn with(runner: impl FnOnce() -> Arc<dyn Runner>, options: &str) -> Option<Self> {
        if std::fs::metadata("/dev/fuse").is_err() || !is_root() {
            eprintln!("skipped: mounting needs root and /dev/fuse");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let mut settings = MountOptions::new("test", directory.path());
        settings.apply(options).expect("options");
        let mounted = mount_with(runner(), &settings).expect("mount");
        Some(Self { mounted, directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Unmounts. Another test that starts a program right now holds every file of this process between `fork` and
    /// `exec`, so the kernel may call the mount busy for that moment.
    pub fn unmount(&mut self) {
        loop {
            match self.mounted.unmount() {
                Ok(()) => return,
                Err(MountError::Busy { .. }) => std::thread::yield_now(),
                Err(error) => panic!("unmount: {error}"),
            }
        }
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}
