//! A disk that fails on command: a FUSE file system over a directory.
//!
//! The servers on it are the shipped ones and do not know. What fails is drawn request by request; a flush that fails
//! has not flushed. Nothing is forgotten here: the directory below keeps what was written, so this stands for a disk
//! that errs, not for a power cut.

use crate::process;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const TTL: Duration = Duration::ZERO;
const GENERATION: Generation = Generation(0);
/// Threads that serve the kernel; a slow disk delays as many requests at a time.
const THREADS: usize = 3;

/// What a disk does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskFault {
    /// Nothing.
    None,
    /// One read of four ends with EIO.
    Reads,
    /// Every write ends with EIO.
    Writes,
    /// Every flush ends with EIO.
    Flushes,
    /// No file grows and none is made: ENOSPC.
    Full,
    /// Each request takes 20 ms and more.
    Slow,
}

impl DiskFault {
    /// All that can be wrong.
    pub const ALL: [Self; 5] = [Self::Reads, Self::Writes, Self::Flushes, Self::Full, Self::Slow];

    fn of(byte: u8) -> Self {
        Self::ALL.into_iter().find(|fault| *fault as u8 == byte).unwrap_or(Self::None)
    }
}

/// False, with a word why, where nothing can be mounted.
pub fn available() -> bool {
    let tried = tempfile::tempdir().and_then(|dir| {
        let disk = FaultDisk::mount(&dir.path().join("below"), &dir.path().join("disk"))?;
        fs::write(dir.path().join("disk/file"), "tried")?;
        drop(disk);
        Ok(())
    });
    if let Err(error) = &tried {
        eprintln!("skipped: nothing can be mounted here: {error}");
    }
    tried.is_ok()
}

struct Switch {
    fault: AtomicU8,
    draws: AtomicU64,
    refused: AtomicU64,
}

/// A mounted disk. Dropping it unmounts; whoever uses it must have ended.
pub struct FaultDisk {
    switch: Arc<Switch>,
    mountpoint: PathBuf,
    session: Option<BackgroundSession>,
}

impl FaultDisk {
    /// Mounts the directory `below` on `mountpoint`; both are made.
    pub fn mount(below: &Path, mountpoint: &Path) -> io::Result<Self> {
        fs::create_dir_all(below)?;
        fs::create_dir_all(mountpoint)?;
        let switch = Arc::new(Switch { fault: AtomicU8::new(0), draws: AtomicU64::new(0), refused: AtomicU64::new(0) });
        let passing = Passing {
            root: below.to_path_buf(),
            switch: Arc::clone(&switch),
            paths: Mutex::default(),
            files: Mutex::default(),
            next: AtomicU64::new(1),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("fault-disk".to_owned()), MountOption::DefaultPermissions];
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        let session = Session::new(passing, mountpoint, &config)?.spawn()?;
        Ok(Self { switch, mountpoint: mountpoint.to_path_buf(), session: Some(session) })
    }

    /// From now on the disk does this wrong.
    pub fn set(&self, fault: DiskFault) {
        self.switch.fault.store(fault as u8, Ordering::SeqCst);
    }

    /// Requests that were answered with an error of the disk so far.
    pub fn refused(&self) -> u64 {
        self.switch.refused.load(Ordering::SeqCst)
    }
}

impl Drop for FaultDisk {
    fn drop(&mut self) {
        self.set(DiskFault::None);
        process::unmount_lazily(&self.mountpoint);
        // Ends with the mount; not waited for, since a leftover user of the mount would make that endless.
        drop(self.session.take());
    }
}

struct Passing {
    root: PathBuf,
    switch: Arc<Switch>,
    /// Where a known inode is, relative to the root.
    paths: Mutex<BTreeMap<u64, PathBuf>>,
    files: Mutex<BTreeMap<u64, Arc<File>>>,
    next: AtomicU64,
}

impl Passing {
    fn fault(&self) -> DiskFault {
        DiskFault::of(self.switch.fault.load(Ordering::SeqCst))
    }

    fn refuse(&self, errno: Errno) -> Errno {
        self.switch.refused.fetch_add(1, Ordering::SeqCst);
        errno
    }

    fn delay(&self) {
        if self.fault() == DiskFault::Slow {
            process::pause();
        }
    }

    fn relative(&self, inode: INodeNo) -> Result<PathBuf, Errno> {
        if inode.0 == 1 {
            return Ok(PathBuf::new());
        }
        self.paths.lock().expect("not poisoned").get(&inode.0).cloned().ok_or(Errno::ENOENT)
    }

    fn path(&self, inode: INodeNo) -> Result<PathBuf, Errno> {
        Ok(self.root.join(self.relative(inode)?))
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        Ok(self.path(parent)?.join(name))
    }

    fn attr(&self, metadata: &Metadata) -> FileAttr {
        let is_root = fs::metadata(&self.root).is_ok_and(|root| root.ino() == metadata.ino());
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => FileType::Directory,
            kind if kind.is_symlink() => FileType::Symlink,
            _ => FileType::RegularFile,
        };
        let modified = metadata.modified().unwrap_or(std::time::UNIX_EPOCH);
        FileAttr {
            ino: INodeNo(if is_root { 1 } else { metadata.ino() }),
            size: metadata.size(),
            blocks: metadata.blocks(),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm: (metadata.mode() & 0o7777) as u16,
            nlink: metadata.nlink() as u32,
            uid: metadata.uid(),
            gid: metadata.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Looks at a name and remembers where its inode is.
    fn entry(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let relative = self.relative(parent)?.join(name);
        let attr = self.attr(&fs::symlink_metadata(self.root.join(&relative))?);
        self.paths.lock().expect("not poisoned").insert(attr.ino.0, relative);
        Ok(attr)
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<File>, Errno> {
        self.files.lock().expect("not poisoned").get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn keep(&self, file: File) -> FileHandle {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        self.files.lock().expect("not poisoned").insert(number, Arc::new(file));
        FileHandle(number)
    }

    fn grows(&self, file: &File, end: u64) -> Result<bool, Errno> {
        Ok(end > file.metadata()?.len())
    }

    fn write_at(&self, handle: FileHandle, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.delay();
        let file = self.file(handle)?;
        match self.fault() {
            DiskFault::Writes => return Err(self.refuse(Errno::EIO)),
            DiskFault::Full if self.grows(&file, offset + data.len() as u64)? => {
                return Err(self.refuse(Errno::ENOSPC));
            }
            _ => {}
        }
        Ok(file.write_all_at(data, offset)?)
    }

    fn read_at(&self, handle: FileHandle, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.delay();
        let file = self.file(handle)?;
        let drawn = self.switch.draws.fetch_add(1, Ordering::SeqCst);
        if self.fault() == DiskFault::Reads && drawn.is_multiple_of(4) {
            return Err(self.refuse(Errno::EIO));
        }
        let mut bytes = vec![0; size as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn open_below(&self, path: &Path, flags: i32) -> Result<File, Errno> {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let mut options = File::options();
        options.read(true).write(writes).custom_flags(libc::O_CLOEXEC);
        Ok(options.truncate(writes && flags & libc::O_TRUNC != 0).open(path)?)
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn entry(reply: ReplyEntry, result: Result<FileAttr, Errno>) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, GENERATION),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Passing {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.entry(parent, name));
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let metadata = match handle.and_then(|handle| self.file(handle).ok()) {
            Some(file) => file.metadata().map_err(Errno::from),
            None => self.path(inode).and_then(|path| Ok(fs::symlink_metadata(path)?)),
        };
        match metadata {
            Ok(metadata) => reply.attr(&TTL, &self.attr(&metadata)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = || -> Result<FileAttr, Errno> {
            let path = self.path(inode)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))?;
            }
            if let Some(size) = size {
                let file = self.open_below(&path, libc::O_RDWR)?;
                if self.fault() == DiskFault::Full && self.grows(&file, size)? {
                    return Err(self.refuse(Errno::ENOSPC));
                }
                file.set_len(size)?;
            }
            Ok(self.attr(&fs::symlink_metadata(&path)?))
        };
        match change() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let make = || -> Result<FileAttr, Errno> {
            let path = self.child(parent, name)?;
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))?;
            self.entry(parent, name)
        };
        entry(reply, make());
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.child(parent, name).and_then(|path| Ok(fs::remove_file(path)?)));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.child(parent, name).and_then(|path| Ok(fs::remove_dir(path)?)));
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
        let change = || -> Result<(), Errno> {
            if !flags.is_empty() {
                return Err(Errno::EINVAL);
            }
            let (old, new) = (self.relative(parent)?.join(name), self.relative(new_parent)?.join(new_name));
            fs::rename(self.root.join(&old), self.root.join(&new))?;
            for path in self.paths.lock().expect("not poisoned").values_mut() {
                if let Ok(rest) = path.strip_prefix(&old) {
                    *path = if rest.as_os_str().is_empty() { new.clone() } else { new.join(rest) };
                }
            }
            Ok(())
        };
        empty(reply, change());
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.path(inode).and_then(|path| self.open_below(&path, flags.0)) {
            Ok(file) => reply.opened(self.keep(file), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let make = || -> Result<(File, FileAttr), Errno> {
            if self.fault() == DiskFault::Full {
                return Err(self.refuse(Errno::ENOSPC));
            }
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(flags & libc::O_TRUNC != 0).mode(mode & 0o7777);
            let file = options.create_new(flags & libc::O_EXCL != 0).open(self.child(parent, name)?)?;
            Ok((file, self.entry(parent, name)?))
        };
        match make() {
            Ok((file, attr)) => {
                reply.created(&TTL, &attr, GENERATION, self.keep(file), FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(errno) => reply.error(errno),
        }
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
        match self.read_at(handle, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_at(handle, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
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
        self.files.lock().expect("not poisoned").remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data: bool, reply: ReplyEmpty) {
        self.delay();
        // The machine's power is not cut, so what the kernel has is safe.
        let failed = matches!(self.fault(), DiskFault::Flushes | DiskFault::Writes);
        empty(reply, if failed { Err(self.refuse(Errno::EIO)) } else { Ok(()) });
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data: bool, reply: ReplyEmpty) {
        let failed = self.fault() == DiskFault::Flushes;
        empty(reply, if failed { Err(self.refuse(Errno::EIO)) } else { Ok(()) });
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = || -> Result<Vec<(u64, FileType, std::ffi::OsString)>, Errno> {
            let path = self.path(inode)?;
            let mut all = vec![(inode.0, FileType::Directory, ".".into()), (inode.0, FileType::Directory, "..".into())];
            for found in fs::read_dir(path)?.flatten() {
                let attr = self.attr(&fs::symlink_metadata(found.path())?);
                all.push((attr.ino.0, attr.kind, found.file_name()));
            }
            Ok(all)
        };
        match list() {
            Ok(all) => {
                for (index, (number, kind, name)) in all.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(number), index as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let free = if self.fault() == DiskFault::Full { 0 } else { 4 << 20 };
        reply.statfs(8 << 20, free, free, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    #[expect(unsafe_code, reason = "fallocate(2)")]
    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let allocate = || -> Result<(), Errno> {
            self.delay();
            let file = self.file(handle)?;
            match self.fault() {
                DiskFault::Writes => return Err(self.refuse(Errno::EIO)),
                DiskFault::Full if mode == 0 && self.grows(&file, offset + length)? => {
                    return Err(self.refuse(Errno::ENOSPC));
                }
                _ => {}
            }
            // SAFETY: plain system call on a descriptor that `file` keeps open.
            match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error().into()),
            }
        };
        empty(reply, allocate());
    }
}
