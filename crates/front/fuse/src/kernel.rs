//! The kernel's side: every FUSE request becomes a job on the client's thread, its reply goes out from the completion.
//!
//! Nothing is decided here. Requests of all session threads run side by side; none waits for another.

use crate::attr::{TTL_EXCLUSIVE, TTL_NEGATIVE, absent_attr, file_attr, file_type, kind_of_mode, time_or_now};
use crate::backend::Runner;
use crate::core::{Core, Done, Stat, with_core};
use crate::full::Caller;
use crate::log::Log;
use crate::ops_file::{Opened, WriteArgs};
use crate::ops_name::NewNode;
use crate::ops_range::CopyEnd;
use crate::pieces::join;
use crate::removed::Removed;
use cairn_env::Buf;
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, InodeKind, RenameMode, SetAttr};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// Largest write in one request; larger ones arrive as several.
const WRITE_SIZE_MAX: u32 = 1 << 20;
/// Requests the kernel may have under way in the background: read-ahead, write-back, asynchronous direct I/O.
const BACKGROUND_MAX: u16 = 256;
/// Inodes are never reused, so their generation says nothing.
const GENERATION: Generation = Generation(0);

/// The file system as `fuser` drives it.
pub(crate) struct Kernel {
    id: u64,
    runner: Arc<dyn Runner>,
    log: Log,
    writeback: bool,
    next_directory: AtomicU64,
    removed: Arc<Removed>,
}

impl Kernel {
    /// The kernel's side of mount `id`.
    pub fn new(id: u64, runner: Arc<dyn Runner>, log: Log, writeback: bool) -> Self {
        Self { id, runner, log, writeback, next_directory: AtomicU64::new(1), removed: Arc::default() }
    }

    /// Runs `f` on the client's thread. When the mount has gone there, the reply inside `f` is dropped, which answers
    /// EIO.
    fn run(&self, f: impl FnOnce(&Rc<Core>) + Send + 'static) {
        let id = self.id;
        self.runner.run(Box::new(move || with_core(id, f)));
    }
}

fn id(inode: INodeNo) -> InodeId {
    InodeId(inode.0)
}

fn bytes(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}

fn empty_reply(reply: ReplyEmpty) -> Done<()> {
    Box::new(move |result| match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    })
}

fn entry_reply(reply: ReplyEntry) -> Done<Stat> {
    Box::new(move |result| match result {
        Ok(stat) => {
            let names = crate::attr::TTL_SHARED;
            reply.entry_with_ttls(&stat.ttl, &names, &file_attr(&stat.attr), GENERATION);
        }
        Err(errno) => reply.error(errno),
    })
}

fn attr_reply(reply: ReplyAttr) -> Done<Stat> {
    Box::new(move |result| match result {
        Ok(stat) => reply.attr(&stat.ttl, &file_attr(&stat.attr)),
        Err(errno) => reply.error(errno),
    })
}

/// Extended attributes are asked for twice: for the size with room for nothing, then for the value.
fn xattr_reply(reply: ReplyXattr, room: u32) -> Done<Vec<u8>> {
    Box::new(move |result| match result {
        Ok(value) if room == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > room as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(errno) => reply.error(errno),
    })
}

impl Filesystem for Kernel {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPORT_SUPPORT
            | if self.writeback { InitFlags::FUSE_WRITEBACK_CACHE } else { InitFlags::empty() };
        if let Err(missing) = config.add_capabilities(wanted) {
            self.log.line(format_args!("this kernel lacks {missing:?}; going on without"));
            let _ = config.add_capabilities(wanted & !missing);
        }
        let _ = config.set_max_write(WRITE_SIZE_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        // The kernel offers what the mount's backing device is set to; the mount raises that afterwards.
        let _ = config.set_max_readahead(u32::MAX).or_else(|most| config.set_max_readahead(most));
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        self.run(move |core| {
            let reply = move |result: Result<Option<Stat>, Errno>| match result {
                Ok(Some(stat)) => entry_reply(reply)(Ok(stat)),
                Ok(None) => reply.entry(&TTL_NEGATIVE, &absent_attr(), GENERATION),
                Err(errno) => reply.error(errno),
            };
            core.lookup(id(parent), name, Box::new(reply));
        });
    }

    fn forget(&self, _request: &Request, inode: INodeNo, _lookups: u64) {
        self.removed.forget(inode);
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        if let Some(attr) = self.removed.attr(inode) {
            return reply.attr(&TTL_EXCLUSIVE, &attr);
        }
        self.run(move |core| core.getattr(id(inode), attr_reply(reply)));
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime_ns: atime.map(time_or_now),
            mtime_ns: mtime.map(time_or_now),
            ..SetAttr::default()
        };
        let privileged = request.uid() == 0;
        self.run(move |core| core.setattr(id(inode), set, privileged, attr_reply(reply)));
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        self.run(move |core| {
            let reply = move |result: Result<Vec<u8>, Errno>| match result {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(errno),
            };
            core.readlink(id(inode), Box::new(reply));
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = kind_of_mode(mode) else { return reply.error(Errno::EINVAL) };
        let name = bytes(name);
        let node = NewNode { kind, mode: mode & 0o7777, uid: request.uid(), gid: request.gid(), rdev };
        self.run(move |core| core.make_node(id(parent), name, node, entry_reply(reply)));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let name = bytes(name);
        let (kind, mode) = (InodeKind::Directory, mode & 0o7777);
        let node = NewNode { kind, mode, uid: request.uid(), gid: request.gid(), rdev: 0 };
        self.run(move |core| core.make_node(id(parent), name, node, entry_reply(reply)));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.run(move |core| core.unlink(id(parent), name, empty_reply(reply)));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        let removed = Arc::clone(&self.removed);
        let reply = move |result: Result<Attr, Errno>| match result {
            Ok(attr) => {
                removed.enter(file_attr(&attr));
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        };
        self.run(move |core| core.rmdir(id(parent), name, Box::new(reply)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target) = (bytes(name), bytes(target.as_os_str()));
        let (uid, gid) = (request.uid(), request.gid());
        self.run(move |core| core.symlink(id(parent), name, target, uid, gid, entry_reply(reply)));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
            flags if flags.is_empty() => RenameMode::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        let (old, new) = ((id(parent), bytes(name)), (id(new_parent), bytes(new_name)));
        self.run(move |core| core.rename(old, new, mode, empty_reply(reply)));
    }

    fn link(&self, _request: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        self.run(move |core| core.link(id(inode), id(parent), name, entry_reply(reply)));
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.run(move |core| {
            core.open(
                id(inode),
                flags.0,
                Box::new(move |result| match result {
                    Ok(opened) => reply.opened(FileHandle(opened.handle), opened.flags),
                    Err(errno) => reply.error(errno),
                }),
            );
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = bytes(name);
        let (kind, mode) = (InodeKind::File, mode & 0o7777);
        let node = NewNode { kind, mode, uid: request.uid(), gid: request.gid(), rdev: 0 };
        self.run(move |core| {
            let reply = move |result: Result<(Stat, Opened), Errno>| match result {
                Ok((stat, opened)) => {
                    // One time to live covers name and attributes here; the shorter is right for both.
                    let ttl = crate::attr::TTL_SHARED;
                    let attr = file_attr(&stat.attr);
                    reply.created(&ttl, &attr, GENERATION, FileHandle(opened.handle), opened.flags);
                }
                Err(errno) => reply.error(errno),
            };
            core.create(id(parent), name, node, flags, Box::new(reply));
        });
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.run(move |core| {
            let reply = move |result: Result<Vec<Buf>, Errno>| match result {
                Ok(pieces) => reply.data(&join(pieces)),
                Err(errno) => reply.error(errno),
            };
            core.read(handle.0, offset, size, Box::new(reply));
        });
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // The session thread reuses its buffer for the next request: this is the one copy of the write path here.
        let write = WriteArgs {
            offset,
            data: Buf::copy_from(data),
            flags: flags.0,
            from_cache: write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
            caller: Caller(request.pid()),
            kill_privileges: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        self.run(move |core| {
            let reply = move |result: Result<u32, Errno>| match result {
                Ok(written) => reply.written(written),
                Err(errno) => reply.error(errno),
            };
            core.write(handle.0, write, Box::new(reply));
        });
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.run(move |core| core.flush(handle.0, empty_reply(reply)));
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.run(move |core| core.release(handle.0));
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.run(move |core| core.fsync(handle.0, empty_reply(reply)));
    }

    fn opendir(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.next_directory.fetch_add(1, Ordering::Relaxed);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        position: u64,
        mut reply: ReplyDirectory,
    ) {
        self.run(move |core| {
            let taker = Rc::clone(core);
            core.read_directory(
                id(inode),
                handle.0,
                position,
                false,
                Box::new(move |result| match result {
                    Ok(lines) => {
                        let mut last = None;
                        for line in lines {
                            let name = OsStr::from_bytes(&line.name);
                            if reply.add(INodeNo(line.inode.0), line.position, file_type(line.kind), name) {
                                break;
                            }
                            last = Some(line.position);
                        }
                        if let Some(position) = last {
                            taker.taken(handle.0, position);
                        }
                        reply.ok();
                    }
                    Err(errno) => reply.error(errno),
                }),
            );
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        position: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.run(move |core| {
            let taker = Rc::clone(core);
            core.read_directory(
                id(inode),
                handle.0,
                position,
                true,
                Box::new(move |result| match result {
                    Ok(lines) => {
                        let mut last = None;
                        for line in lines {
                            let name = OsStr::from_bytes(&line.name);
                            let mut attr = line.attr.as_ref().map_or_else(absent_attr, file_attr);
                            if line.attr.is_none() {
                                // Inode number zero in the attributes part: the kernel learns the name only.
                                attr.kind = file_type(line.kind);
                            }
                            let ttl = crate::attr::TTL_SHARED;
                            let inode = INodeNo(line.inode.0);
                            if reply.add(inode, line.position, name, &ttl, &attr, GENERATION) {
                                break;
                            }
                            last = Some(line.position);
                        }
                        if let Some(position) = last {
                            taker.taken(handle.0, position);
                        }
                        reply.ok();
                    }
                    Err(errno) => reply.error(errno),
                }),
            );
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.run(move |core| core.release_directory(handle.0));
    }

    // Changes of directories are durable when they are answered.
    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        self.run(move |core| {
            core.statfs(Box::new(move |result| match result {
                Ok(space) => {
                    // Inodes are limited by space alone; the figure of free ones is what 4 KiB each would leave.
                    let (blocks, free) = (space.capacity / 4096, space.free / 4096);
                    let inodes = space.inodes.saturating_add(free);
                    reply.statfs(blocks, free, free, inodes, free, 4096, 255, 4096);
                }
                Err(errno) => reply.error(errno),
            }));
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (name, value) = (bytes(name), value.to_vec());
        self.run(move |core| core.setxattr(id(inode), name, value, flags, empty_reply(reply)));
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = bytes(name);
        self.run(move |core| core.getxattr(id(inode), name, xattr_reply(reply, size)));
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.run(move |core| core.listxattr(id(inode), xattr_reply(reply, size)));
    }

    fn removexattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.run(move |core| core.removexattr(id(inode), name, empty_reply(reply)));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.run(move |core| core.fallocate(handle.0, offset, len, mode, empty_reply(reply)));
    }

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.run(move |core| {
            let reply = move |result: Result<u64, Errno>| match result {
                Ok(found) => reply.offset(found as i64),
                Err(errno) => reply.error(errno),
            };
            core.seek(handle.0, offset, data, Box::new(reply));
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _inode_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        _inode_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let from = CopyEnd { handle: handle_in.0, offset: offset_in };
        let to = CopyEnd { handle: handle_out.0, offset: offset_out };
        let caller = Caller(request.pid());
        self.run(move |core| {
            let reply = move |result: Result<u32, Errno>| match result {
                Ok(copied) => reply.written(copied),
                Err(errno) => reply.error(errno),
            };
            core.copy_range(from, to, len, caller, Box::new(reply));
        });
    }
}
