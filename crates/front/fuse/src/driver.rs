//! The file logic of a mount without a kernel: what the simulator drives, in virtual time, over its own [`Backend`].
//!
//! Everything between the kernel's requests and the client library is the code that [`crate::mount()`] runs. Only the
//! kernel is missing: nothing is cached, so every read is answered by the cluster, and whoever drives says when a
//! second has passed ([`Files::tick`]) and when pages would have been forgotten ([`Files::forget_pages`]).

use crate::backend::Backend;
use crate::core::{Core, Done, Notice};
use crate::full::Caller;
use crate::log::Log;
use crate::ops_file::{Opened, WriteArgs};
use crate::ops_name::NewNode;
use crate::options::MountOptions;
use crate::pieces::join;
use cairn_env::Buf;
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, InodeKind, RenameMode, SetAttr};
use std::rc::Rc;
use std::sync::mpsc;

/// Called once with the outcome of an operation, or its errno.
pub type Outcome<T> = Box<dyn FnOnce(Result<T, i32>)>;

/// The files of one mount.
pub struct Files {
    core: Rc<Core>,
    notices: mpsc::Receiver<Notice>,
}

/// What `fallocate(2)` is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Range {
    /// Space is there, and the file as long as the range.
    Allocate,
    /// The range becomes a hole; the length stays.
    Punch,
    /// The range reads as zeros; the file grows with it.
    Zero,
    /// The range reads as zeros; the length stays.
    ZeroInside,
}

impl Range {
    fn mode(self) -> i32 {
        match self {
            Range::Allocate => 0,
            Range::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Range::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Range::ZeroInside => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

fn then<T: 'static, U: 'static>(done: Outcome<U>, map: impl FnOnce(T) -> U + 'static) -> Done<T> {
    Box::new(move |result| done(result.map(map).map_err(|errno| errno.code())))
}

impl Files {
    /// The files of a mount with these options; its log is silent.
    pub fn new(backend: Rc<dyn Backend>, options: &MountOptions) -> Self {
        let (sender, notices) = mpsc::channel();
        Self { core: Core::new(backend, Log::silent(), options, sender), notices }
    }

    /// Creates a file in the root and opens it for writing: inode and handle.
    pub fn create(&self, name: Vec<u8>, done: Outcome<(InodeId, u64)>) {
        let node = NewNode { kind: InodeKind::File, mode: 0o644, uid: 0, gid: 0, rdev: 0 };
        let done = then(done, |(stat, opened): (crate::core::Stat, Opened)| (stat.attr.inode, opened.handle));
        self.core.create(InodeId::ROOT, name, node, libc::O_RDWR, done);
    }

    /// Looks a name in the root up.
    pub fn lookup(&self, name: Vec<u8>, done: Outcome<Option<Attr>>) {
        let done = then(done, |found: Option<crate::core::Stat>| found.map(|stat| stat.attr));
        self.core.lookup(InodeId::ROOT, name, done);
    }

    /// Renames within the root; whatever had the new name is gone.
    pub fn rename(&self, from: Vec<u8>, to: Vec<u8>, done: Outcome<()>) {
        let root = InodeId::ROOT;
        self.core.rename((root, from), (root, to), RenameMode::Replace, then(done, |()| ()));
    }

    /// Attributes of an inode.
    pub fn stat(&self, inode: InodeId, done: Outcome<Attr>) {
        self.core.getattr(inode, then(done, |stat: crate::core::Stat| stat.attr));
    }

    /// Opens a file to read and, as a `writer`, to write.
    pub fn open(&self, inode: InodeId, writer: bool, done: Outcome<u64>) {
        let flags = if writer { libc::O_RDWR } else { libc::O_RDONLY };
        self.core.open(inode, flags, then(done, |opened: Opened| opened.handle));
    }

    /// Reads.
    pub fn read(&self, handle: u64, offset: u64, len: u32, done: Outcome<Buf>) {
        self.core.read(handle, offset, len, then(done, join));
    }

    /// Writes at `offset` or, to `append`, at the end; `durable` as with `O_DSYNC`.
    pub fn write(&self, handle: u64, offset: u64, data: Buf, append: bool, durable: bool, done: Outcome<u32>) {
        let flags = if append { libc::O_APPEND } else { 0 } | if durable { libc::O_DSYNC } else { 0 };
        let (caller, from_cache, kill_privileges) = (Caller(0), false, false);
        let write = WriteArgs { offset, data, flags, from_cache, caller, kill_privileges };
        self.core.write(handle, write, then(done, |len| len));
    }

    /// Sets the length of a file.
    pub fn truncate(&self, inode: InodeId, size: u64, done: Outcome<Attr>) {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.core.setattr(inode, set, true, then(done, |stat: crate::core::Stat| stat.attr));
    }

    /// `fallocate(2)`.
    pub fn fallocate(&self, handle: u64, offset: u64, len: u64, range: Range, done: Outcome<()>) {
        self.core.fallocate(handle, offset, len, range.mode(), then(done, |()| ()));
    }

    /// `fsync(2)`.
    pub fn fsync(&self, handle: u64, done: Outcome<()>) {
        self.core.fsync(handle, then(done, |()| ()));
    }

    /// A descriptor was closed.
    pub fn flush(&self, handle: u64, done: Outcome<()>) {
        self.core.flush(handle, then(done, |()| ()));
    }

    /// The last descriptor of a handle was closed.
    pub fn release(&self, handle: u64) {
        self.core.release(handle);
    }

    /// A second has passed.
    pub fn tick(&self) {
        self.core.tick();
    }

    /// The kernel has forgotten the pages it was told to forget; true when there were any.
    pub fn forget_pages(&self) -> bool {
        let notices: Vec<Notice> = self.notices.try_iter().collect();
        notices.iter().for_each(|notice| self.core.noticed(notice.token));
        !notices.is_empty()
    }
}
