//! Ranges of files: allocation, holes, copies.

use crate::attr::FILE_SIZE_MAX;
use crate::core::{Core, Done};
use crate::files::File;
use crate::full::Caller;
use crate::pieces::join;
use cairn_env::Buf;
use cairn_env::block::{BlockOp, BlockReply, Extent};
use cairn_wire::mds::LeaseMode;
use fuser::Errno;
use std::rc::Rc;

/// Bytes asked about at once when looking for data or a hole.
const SEEK_STEP: u64 = 1 << 30;
/// Bytes copied at once.
const COPY_STEP: u64 = 1 << 20;
/// Most bytes copied for one request; callers of `copy_file_range` go on by themselves.
const COPY_MAX: u64 = 16 << 20;

/// A range of a file to copy from or to.
pub(crate) struct CopyEnd {
    /// Handle number.
    pub handle: u64,
    /// Byte offset.
    pub offset: u64,
}

struct Copy {
    from: Rc<File>,
    from_offset: u64,
    to: Rc<File>,
    to_offset: u64,
    caller: Caller,
    len: u64,
    copied: u64,
}

impl Core {
    /// `fallocate(2)`. Volumes are thin, so mode 0 only grows the file: it does not reserve space.
    pub fn fallocate(self: &Rc<Self>, number: u64, offset: u64, len: u64, mode: i32, done: Done<()>) {
        let file = match self.live_handle(number) {
            Ok(handle) => Rc::clone(&handle.file),
            Err(errno) => return done(Err(errno)),
        };
        let end = match offset.checked_add(len) {
            Some(end) if end <= FILE_SIZE_MAX && len > 0 => end,
            Some(_) if len == 0 => return done(Err(Errno::EINVAL)),
            _ => return done(Err(Errno::EFBIG)),
        };
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let kind = mode & !libc::FALLOC_FL_KEEP_SIZE;
        let punch = match kind {
            0 | libc::FALLOC_FL_ZERO_RANGE => false,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => true,
            _ => return done(Err(Errno::EOPNOTSUPP)),
        };
        let changed = Rc::clone(&file);
        self.with_volume(&file, LeaseMode::Exclusive, move |core, volume| {
            if let Err(errno) = volume {
                return done(Err(errno));
            }
            let grow_to = if keep_size { 0 } else { end };
            let inside = end.min(changed.size()).saturating_sub(offset);
            if kind == 0 || inside == 0 {
                core.grown(&changed, grow_to);
                return done(Ok(()));
            }
            let op = if punch {
                BlockOp::Discard { offset, len: inside }
            } else {
                BlockOp::WriteZeroes { offset, len: inside, fua: false }
            };
            core.io(&Rc::clone(&changed), LeaseMode::Exclusive, op, move |core, result| {
                if result.is_ok() {
                    changed.range_punched(if punch { inside } else { 0 }, core.backend.wall_ns());
                    core.grown(&changed, grow_to);
                }
                done(result.map(|_| ()));
            });
        });
    }

    /// The next data or hole at or after `offset`.
    pub fn seek(self: &Rc<Self>, number: u64, offset: u64, data: bool, done: Done<u64>) {
        match self.handle(number) {
            Ok(handle) => self.seek_step(&Rc::clone(&handle.file), offset, data, done),
            Err(errno) => done(Err(errno)),
        }
    }

    fn seek_step(self: &Rc<Self>, file: &Rc<File>, offset: u64, data: bool, done: Done<u64>) {
        let sought = Rc::clone(file);
        self.with_volume(file, LeaseMode::Shared, move |core, volume| {
            if let Err(errno) = volume {
                return done(Err(errno));
            }
            let size = sought.size();
            if offset >= size {
                // The end of a file counts as a hole, but only as seen from inside the file.
                return done(Err(Errno::ENXIO));
            }
            let len = SEEK_STEP.min(size - offset);
            let op = BlockOp::Extents { offset, len };
            core.io(&Rc::clone(&sought), LeaseMode::Shared, op, move |core, result| match result {
                Ok(BlockReply::Extents(extents)) => match find(&extents, offset, data) {
                    Some(found) => done(Ok(found)),
                    None if offset + len < size => core.seek_step(&sought, offset + len, data, done),
                    None if data => done(Err(Errno::ENXIO)),
                    None => done(Ok(size)),
                },
                Ok(_) => done(Err(Errno::EIO)),
                Err(errno) => done(Err(errno)),
            });
        });
    }

    /// Copies inside the cluster's client: the data never passes through the kernel. May copy less than asked.
    pub fn copy_range(self: &Rc<Self>, from: CopyEnd, to: CopyEnd, len: u64, caller: Caller, done: Done<u32>) {
        let (source, target) = match (self.live_handle(from.handle), self.live_handle(to.handle)) {
            (Ok(source), Ok(target)) => (Rc::clone(&source.file), Rc::clone(&target.file)),
            (Err(errno), _) | (_, Err(errno)) => return done(Err(errno)),
        };
        let fits = |offset: u64| offset.checked_add(len).is_some_and(|end| end <= FILE_SIZE_MAX);
        if !fits(from.offset) || !fits(to.offset) {
            return done(Err(Errno::EFBIG));
        }
        let copy = Copy {
            from: source,
            from_offset: from.offset,
            to: target,
            to_offset: to.offset,
            caller,
            len: len.min(COPY_MAX),
            copied: 0,
        };
        self.copy_step(copy, done);
    }

    fn copy_step(self: &Rc<Self>, mut copy: Copy, done: Done<u32>) {
        let left = (copy.len - copy.copied).min(COPY_STEP);
        if left == 0 {
            return done(Ok(copy.copied as u32));
        }
        let (core, from, offset) = (Rc::clone(self), Rc::clone(&copy.from), copy.from_offset + copy.copied);
        let write = move |result: Result<Vec<Buf>, Errno>| {
            let data = match result {
                Ok(pieces) => join(pieces),
                // What was copied before counts; the caller meets the error when it goes on.
                Err(_) if copy.copied > 0 => return done(Ok(copy.copied as u32)),
                Err(errno) => return done(Err(errno)),
            };
            if data.is_empty() {
                return done(Ok(copy.copied as u32));
            }
            let (offset, len) = (copy.to_offset + copy.copied, data.len() as u64);
            let to = Rc::clone(&copy.to);
            let op = BlockOp::Write { offset, data, fua: false };
            let fails_at_once = copy.copied > 0;
            core.copy_write(&to, op, copy.caller, fails_at_once, move |core, result| match result {
                Ok(_) => {
                    copy.copied += len;
                    core.copy_step(copy, done);
                }
                Err(_) if copy.copied > 0 => done(Ok(copy.copied as u32)),
                Err(errno) => done(Err(errno)),
            });
        };
        self.read_file(&from, offset, left as u32, Box::new(write));
    }
}

impl Core {
    /// Writes what was copied. Only the first piece of a copy waits for room: what was copied before counts.
    fn copy_write(
        self: &Rc<Self>,
        to: &Rc<File>,
        op: BlockOp,
        caller: Caller,
        fails_at_once: bool,
        then: impl FnOnce(&Rc<Self>, Result<BlockReply, Errno>) + 'static,
    ) {
        if fails_at_once {
            self.io(to, LeaseMode::Exclusive, op, then);
        } else {
            self.io_with_room(to, op, caller, then);
        }
    }
}

/// First byte at or after `from` that lies in an extent of the wanted kind.
fn find(extents: &[Extent], from: u64, data: bool) -> Option<u64> {
    extents
        .iter()
        .find(|extent| extent.data == data && extent.offset + extent.len > from)
        .map(|extent| extent.offset.max(from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeking_finds_the_first_run_of_its_kind() {
        let extent = |offset, len, data| Extent { offset, len, data };
        let extents = [extent(0, 4096, true), extent(4096, 8192, false), extent(12288, 4096, true)];
        assert_eq!(find(&extents, 0, true), Some(0));
        assert_eq!(find(&extents, 100, true), Some(100));
        assert_eq!(find(&extents, 100, false), Some(4096));
        assert_eq!(find(&extents, 5000, true), Some(12288));
        assert_eq!(find(&extents, 12288, false), None);
    }
}
