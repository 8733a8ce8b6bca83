//! Translation between Cairn's attributes, times and errors and those of the kernel.

use cairn_env::block::BlockError;
use cairn_wire::mds::{Attr, InodeKind, MdsError};
use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::backend::OpenFailure;

/// How long the kernel may believe names and attributes that another mount can change.
pub(crate) const TTL_SHARED: Duration = Duration::from_secs(1);
/// And attributes of a directory that are up to a second old when it asks for them.
pub(crate) const TTL_CREATED_IN: Duration = Duration::from_millis(50);
/// How long it may believe the attributes of a file while this mount holds its exclusive lease.
pub(crate) const TTL_EXCLUSIVE: Duration = Duration::from_secs(30);
/// How long it may believe that a name does not exist.
pub(crate) const TTL_NEGATIVE: Duration = Duration::from_secs(1);
/// A file ends below this offset: the range in which client volumes keep files.
pub(crate) const FILE_SIZE_MAX: u64 = 1 << 62;

/// The wall clock, nanoseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "this crate is a shell: times of files come from the clock")]
pub(crate) fn wall_ns() -> u64 {
    time_to_ns(SystemTime::now())
}

/// Nanoseconds since 1970. Times before it are below zero, in two's complement as everywhere behind here; what does not
/// fit becomes the earliest (1677) or the latest (2262) that does.
pub(crate) fn time_to_ns(time: SystemTime) -> u64 {
    let bounded = |span: Duration| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
    let ns = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => bounded(since),
        Err(before) => -bounded(before.duration()),
    };
    ns as u64
}

/// What [`time_to_ns`] was made from.
fn ns_to_time(ns: u64) -> SystemTime {
    let ns = ns as i64;
    let span = Duration::from_nanos(ns.unsigned_abs());
    if ns < 0 { UNIX_EPOCH - span } else { UNIX_EPOCH + span }
}

/// The kernel counts seconds before 1970 down and nanoseconds up from there; `fuser` 0.18 takes both off.
fn as_meant(time: SystemTime) -> SystemTime {
    match UNIX_EPOCH.duration_since(time) {
        Ok(before) => time + Duration::from_nanos(2 * u64::from(before.subsec_nanos())),
        Err(_) => time,
    }
}

/// What `utimensat` meant.
pub(crate) fn time_or_now(time: TimeOrNow) -> u64 {
    match time {
        TimeOrNow::SpecificTime(time) => time_to_ns(as_meant(time)),
        TimeOrNow::Now => wall_ns(),
    }
}

/// The kind as directory entries tell it.
pub(crate) fn file_type(kind: InodeKind) -> FileType {
    match kind {
        InodeKind::File | InodeKind::Volume => FileType::RegularFile,
        InodeKind::Directory => FileType::Directory,
        InodeKind::Symlink => FileType::Symlink,
        InodeKind::Fifo => FileType::NamedPipe,
        InodeKind::Socket => FileType::Socket,
        InodeKind::CharDevice => FileType::CharDevice,
        InodeKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind a `mknod` mode asks for.
pub(crate) fn kind_of_mode(mode: u32) -> Option<InodeKind> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Some(InodeKind::File),
        libc::S_IFIFO => Some(InodeKind::Fifo),
        libc::S_IFSOCK => Some(InodeKind::Socket),
        libc::S_IFCHR => Some(InodeKind::CharDevice),
        libc::S_IFBLK => Some(InodeKind::BlockDevice),
        _ => None,
    }
}

/// Attributes as the kernel wants them.
pub(crate) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.inode.0),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: ns_to_time(attr.atime_ns),
        mtime: ns_to_time(attr.mtime_ns),
        ctime: ns_to_time(attr.ctime_ns),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: 4096,
        flags: 0,
    }
}

/// Attributes of no inode: answered to a lookup they tell the kernel that the name does not exist.
pub(crate) fn absent_attr() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The permission bits left after somebody without privilege changed the content, or anyone the owner: set-user-id
/// goes, and set-group-id where the group may execute (elsewhere it is not a privilege).
pub(crate) fn mode_without_privileges(mode: u32) -> u32 {
    let mut mode = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        mode &= !libc::S_ISGID;
    }
    mode
}

/// Errno of a refused metadata call.
pub(crate) fn mds_errno(error: &MdsError) -> Errno {
    match error {
        MdsError::Posix(errno) => Errno::from_i32(*errno),
        MdsError::NoSpace(_) => Errno::ENOSPC,
        MdsError::NotFound(_) => Errno::ENOENT,
        MdsError::Exists(_) => Errno::EEXIST,
        MdsError::Invalid(_) => Errno::EINVAL,
        MdsError::Refused(_) => Errno::EPERM,
        MdsError::Held { .. } => Errno::EBUSY,
        MdsError::StaleEpoch { .. } => Errno::ESTALE,
        MdsError::NotLeader { .. } | MdsError::Unavailable(_) | MdsError::Unknown | MdsError::SessionEnded(_) => {
            Errno::EIO
        }
    }
}

/// Errno of a call that names an inode: one that is gone is *stale*. On that answer the kernel looks the name up again,
/// which is what a program expects that opens a file another mount has just replaced by renaming.
pub(crate) fn of_inode(errno: Errno) -> Errno {
    if errno == Errno::ENOENT { Errno::ESTALE } else { errno }
}

/// Errno of a failed open.
pub(crate) fn open_errno(error: &OpenFailure) -> Errno {
    match error {
        OpenFailure::Held(_) => Errno::EBUSY,
        OpenFailure::Mds(error) => mds_errno(error),
        OpenFailure::Other(_) => Errno::EIO,
    }
}

/// Errno of a failed data operation.
pub(crate) fn block_errno(error: &BlockError) -> Errno {
    match error {
        BlockError::NoSpace => Errno::ENOSPC,
        BlockError::ReadOnly => Errno::EROFS,
        BlockError::OutOfRange { .. } => Errno::EFBIG,
        BlockError::Fenced
        | BlockError::Closed
        | BlockError::Miscompare { .. }
        | BlockError::Damaged { .. }
        | BlockError::Other(_) => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_go_where_they_are_privileges() {
        assert_eq!(mode_without_privileges(0o6755), 0o755);
        assert_eq!(mode_without_privileges(0o2644), 0o2644, "mandatory locking mark stays");
        assert_eq!(mode_without_privileges(0o1755), 0o1755);
    }

    #[test]
    fn every_refusal_has_an_errno() {
        assert_eq!(mds_errno(&MdsError::Posix(libc::ENOTEMPTY)), Errno::ENOTEMPTY);
        assert_eq!(mds_errno(&MdsError::NoSpace(String::new())), Errno::ENOSPC);
        assert_eq!(block_errno(&BlockError::Fenced), Errno::EIO);
        assert_eq!(open_errno(&OpenFailure::Held(String::new())), Errno::EBUSY);
    }

    #[test]
    fn times_survive_the_way_there_and_back() {
        let time = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
        assert_eq!(time_to_ns(time), 1_700_000_000_123_456_789);
        for time in [time, UNIX_EPOCH, UNIX_EPOCH - Duration::new(86_400 * 365 * 20, 5)] {
            assert_eq!(ns_to_time(time_to_ns(time)), time);
        }
        let far = UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(time_to_ns(far), i64::MAX as u64);
    }
}
