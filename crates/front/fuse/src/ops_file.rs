//! Open files: open, read, write, flush, fsync, release.

use crate::attr::{FILE_SIZE_MAX, of_inode};
use crate::core::{Core, Done, Handle};
use crate::files::File;
use crate::full::Caller;
use cairn_env::Buf;
use cairn_env::block::{BlockOp, BlockReply};
use cairn_types::InodeId;
use cairn_wire::mds::LeaseMode;
use fuser::{Errno, FopenFlags};
use std::rc::Rc;

/// What the kernel is told of a file just opened.
pub(crate) struct Opened {
    /// Handle number.
    pub handle: u64,
    /// How the kernel may cache.
    pub flags: FopenFlags,
}

/// One write as the kernel sends it.
pub(crate) struct WriteArgs {
    /// Where, as the kernel thinks.
    pub offset: u64,
    /// What.
    pub data: Buf,
    /// Flags of the open file.
    pub flags: i32,
    /// The page cache writes back: the offset is right even for a file opened to append.
    pub from_cache: bool,
    /// Who waits for it.
    pub caller: Caller,
    /// The caller has no right to keep set-user-id and set-group-id bits on files it changes.
    pub kill_privileges: bool,
}

/// How the kernel is to treat an open file with these flags.
pub(crate) fn open_flags(flags: i32) -> FopenFlags {
    // Without this every open would drop the pages, and that at a moment of the kernel's choice (F4).
    let mut answer = FopenFlags::FOPEN_KEEP_CACHE;
    if flags & libc::O_DIRECT != 0 {
        answer |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    }
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        // Nothing to say at the close of a file that was only read.
        answer |= FopenFlags::FOPEN_NOFLUSH;
    }
    answer
}

impl Core {
    /// Opens a file and acquires its lease, so that a conflict with another mount shows here and not at some later
    /// read.
    pub fn open(self: &Rc<Self>, inode: InodeId, flags: i32, done: Done<Opened>) {
        let file = self.file(inode);
        let writer = flags & libc::O_ACCMODE != libc::O_RDONLY;
        self.add_handle(&file, writer);
        let need = if writer { LeaseMode::Exclusive } else { LeaseMode::Shared };
        let opened = Rc::clone(&file);
        let then = move |core: &Rc<Self>, volume: Result<_, Errno>| match volume {
            Ok(_) => {
                let file = Rc::clone(&opened);
                core.with_valid_pages(&opened, Box::new(move |core| core.opened_file(&file, flags, done)));
            }
            Err(errno) => {
                core.drop_handle(&opened, writer);
                done(Err(of_inode(errno)));
            }
        };
        if writer && file.departing.get() {
            // Pages are being forgotten, so nobody may begin to write (F4): this one has the next lease.
            self.wait_for_lease(&file, need, Box::new(then));
        } else {
            self.with_volume(&file, need, then);
        }
    }

    fn opened_file(self: &Rc<Self>, file: &Rc<File>, flags: i32, done: Done<Opened>) {
        let handle = self.enter_handle(file, flags & libc::O_ACCMODE != libc::O_RDONLY);
        let answer = Opened { handle, flags: open_flags(flags) };
        // Another mount may have changed the size since the kernel asked; then it must ask again before it reads.
        let outdated = self.told(file.inode).is_some_and(|told| told.size != file.size());
        if outdated {
            self.notify(file.inode, false, Box::new(move |_| done(Ok(answer))));
        } else {
            done(Ok(answer));
        }
    }

    /// The handle of an operation, unless the lease it was used under as a writer was lost since. One that nothing was
    /// done with has nothing to lose: it may have been opened before it was known here that the lease was lost.
    pub fn live_handle(&self, number: u64) -> Result<Rc<Handle>, Errno> {
        let handle = self.handle(number)?;
        let fences = handle.file.fences.get();
        if handle.writer && handle.used.get() && handle.fences.get() != fences {
            return Err(Errno::EIO);
        }
        handle.fences.set(fences);
        handle.used.set(true);
        Ok(handle)
    }

    /// Reads up to `len` bytes; fewer only at the end of the file.
    pub fn read(self: &Rc<Self>, number: u64, offset: u64, len: u32, done: Done<Vec<Buf>>) {
        match self.live_handle(number) {
            Ok(handle) => self.read_file(&handle.file, offset, len, done),
            Err(errno) => done(Err(errno)),
        }
    }

    /// As [`Core::read`], without a handle.
    pub fn read_file(self: &Rc<Self>, file: &Rc<File>, offset: u64, len: u32, done: Done<Vec<Buf>>) {
        let read = Rc::clone(file);
        self.with_volume(file, LeaseMode::Shared, move |core, volume| {
            if let Err(errno) = volume {
                return done(Err(of_inode(errno)));
            }
            let left = read.size().saturating_sub(offset);
            let len = u64::from(len).min(left) as u32;
            if len == 0 {
                return done(Ok(Vec::new()));
            }
            core.io(&read, LeaseMode::Shared, BlockOp::Read { offset, len }, move |core, result| {
                done(match result {
                    Ok(BlockReply::Data(pieces)) => Ok(pieces),
                    Ok(_) => {
                        core.log.line(format_args!("a read was answered without data"));
                        Err(Errno::EIO)
                    }
                    Err(errno) => Err(errno),
                });
            });
        });
    }

    /// Writes; answered when every replica has the data.
    pub fn write(self: &Rc<Self>, number: u64, write: WriteArgs, done: Done<u32>) {
        let handle = match self.live_handle(number) {
            Ok(handle) => handle,
            Err(errno) => return done(Err(errno)),
        };
        let file = Rc::clone(&handle.file);
        if !write.kill_privileges {
            return self.write_file(&file, write, done);
        }
        self.drop_privileges(&Rc::clone(&file), move |core, result| match result {
            Ok(()) => core.write_file(&file, write, done),
            Err(errno) => done(Err(errno)),
        });
    }

    fn write_file(self: &Rc<Self>, file: &Rc<File>, write: WriteArgs, done: Done<u32>) {
        let len = write.data.len() as u64;
        let append = write.flags & libc::O_APPEND != 0 && !write.from_cache && !self.writeback;
        let offset = if append && file.is_exclusive() { file.append_offset(len) } else { write.offset };
        if offset.checked_add(len).is_none_or(|end| end > FILE_SIZE_MAX) {
            return done(Err(Errno::EFBIG));
        }
        if len == 0 {
            return done(Ok(0));
        }
        if offset != write.offset {
            // The kernel appended at an end it knew wrongly: what it cached there is not what lies there.
            self.notify(file.inode, true, Box::new(|_| ()));
        }
        let durable = write.flags & libc::O_DSYNC != 0;
        let op = BlockOp::Write { offset, data: write.data, fua: durable };
        let written = Rc::clone(file);
        self.io_with_room(file, op, write.caller, move |core, result| match result {
            Ok(_) if durable => core.report(&written, Box::new(move |result| done(result.map(|()| len as u32)))),
            Ok(_) => done(Ok(len as u32)),
            Err(errno) => done(Err(errno)),
        });
    }

    /// A descriptor was closed: other mounts see size and time from here on.
    pub fn flush(self: &Rc<Self>, number: u64, done: Done<()>) {
        match self.live_handle(number) {
            Ok(handle) => self.report(&handle.file, done),
            Err(errno) => done(Err(errno)),
        }
    }

    /// Makes content and size durable; times too unless `data_only`.
    pub fn fsync(self: &Rc<Self>, number: u64, done: Done<()>) {
        match self.live_handle(number) {
            Ok(handle) => self.sync_file(&handle.file, done),
            Err(errno) => done(Err(errno)),
        }
    }

    /// As [`Core::fsync`], without a handle.
    pub fn sync_file(self: &Rc<Self>, file: &Rc<File>, done: Done<()>) {
        let (core, synced) = (Rc::clone(self), Rc::clone(file));
        let report = move |result: Result<(), Errno>| match result {
            Ok(()) => core.report(&synced, done),
            Err(errno) => done(Err(errno)),
        };
        self.flush_data(file, Box::new(report));
    }

    /// The last reference to an open file is gone. The kernel does not wait for this.
    pub fn release(self: &Rc<Self>, number: u64) {
        let handle = self.handles.borrow_mut().remove(&number);
        if let Some(handle) = handle {
            self.drop_handle(&handle.file, handle.writer);
        }
    }
}
