//! Directories removed through this mount of which the kernel still knows: whoever stands in one, or has it open, may
//! ask for its attributes although no metadata server has them any more. Removed files need none of this, because
//! those that are open are kept (see [`crate::files`]).

use cairn_stdx::FixedMap;
use fuser::{FileAttr, INodeNo};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The last attributes of each, until the kernel forgets it.
#[derive(Default)]
pub(crate) struct Removed(Mutex<FixedMap<u64, FileAttr>>);

impl Removed {
    fn map(&self) -> MutexGuard<'_, FixedMap<u64, FileAttr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory was removed.
    pub fn enter(&self, attr: FileAttr) {
        self.map().insert(attr.ino.0, attr);
    }

    /// What it was.
    pub fn attr(&self, inode: INodeNo) -> Option<FileAttr> {
        self.map().get(&inode.0).copied()
    }

    /// The kernel has no use of it any more.
    pub fn forget(&self, inode: INodeNo) {
        self.map().remove(&inode.0);
    }
}
