//! System calls the standard library has no name for. Each wrapper is safe: it checks what the kernel trusts.
#![allow(unsafe_code, reason = "thin wrappers around libc; no pointer leaves a function")]

use cairn_types::Instant;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Once;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `_IOR(0x12, 114, size_t)`: size of a block device in bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IO(0x12, 119)`: discard a range of a block device.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `_IOWR('f', 11, struct fiemap)`: extents of a file.
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
/// Write dirty pages back before looking.
const FIEMAP_FLAG_SYNC: u32 = 1;
/// The last extent of the file.
const FIEMAP_EXTENT_LAST: u32 = 1;
/// Allocated, never written: reads as zeros.
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
const FIEMAP_BATCH: usize = 128;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `CLOCK_MONOTONIC`.
pub fn monotonic() -> Instant {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the kernel to fill.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(result, 0, "every Linux has CLOCK_MONOTONIC");
    Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// `N` random bytes of the operating system: nonces, and seeds for the cores' [`Rng`](cairn_stdx::Rng).
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        // SAFETY: the pointer and length describe the unfilled rest of `bytes`.
        let got = unsafe { libc::getrandom(bytes[filled..].as_mut_ptr().cast(), N - filled, 0) };
        if got > 0 {
            filled += got as usize;
        } else {
            let error = io::Error::last_os_error();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "getrandom: {error}");
        }
    }
    bytes
}

/// The user this process acts as.
pub fn user_id() -> u32 {
    // SAFETY: takes nothing, touches nothing, cannot fail.
    unsafe { libc::geteuid() }
}

fn set_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer and size describe `value`, which lives through the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), size) })
}

/// Makes the kernel notice a dead peer: probes on an idle link, and a limit on unacknowledged data.
pub fn set_keepalive(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 2)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 10_000)
}

/// Keeps megabyte buffers on the heap. By default glibc maps each anew and gives the pages back on free, so that every
/// large request pays hundreds of page faults.
pub fn tune_allocator() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(target_env = "gnu")]
        // SAFETY: mallopt only sets two tunables; 32 MiB is the largest mmap threshold glibc accepts.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 20);
        }
    });
}

/// Lets the runtime watch a socket. Must be called inside one.
pub fn watch(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: a `UnixStream` owns its descriptor, always the same one, until the `AsyncFd` drops it.
    Ok(unsafe { AsyncFd::register_with_interest(stream, interest) }?)
}

/// How much of what was sent a socket holds for the peer. Beyond the system's limit only for the privileged.
pub fn set_send_buffer(fd: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    let size = libc::c_int::try_from(size).unwrap_or(libc::c_int::MAX);
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, size))
}

/// `struct sched_attr` in its first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}
const _: () = assert!(size_of::<SchedAttr>() == 48);

/// Asks the scheduler for short slices (Linux 6.12 and later): this thread gets no more of a core than before, but it
/// waits less behind threads that compute. It changes nothing else, needs no privilege, and where the kernel does not
/// know it, nothing is lost.
pub fn ask_for_short_slices(slice: std::time::Duration) {
    let mut attr =
        SchedAttr { size: 0, policy: 0, flags: 0, nice: 0, priority: 0, runtime_ns: 0, deadline_ns: 0, period_ns: 0 };
    let size = size_of::<SchedAttr>() as libc::c_uint;
    // SAFETY: the kernel fills at most `size` bytes of `attr`; thread 0 is the caller.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    // A thread under another policy was put there by its operator.
    if got == 0 && attr.policy == libc::SCHED_OTHER as u32 {
        attr.size = size;
        attr.runtime_ns = slice.as_nanos() as u64;
        // SAFETY: the kernel reads `attr.size` bytes of `attr`.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    }
}

/// Size in bytes of the block device behind `file`.
pub fn block_device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) })?;
    Ok(size)
}

/// Gives up a range of a block device. Blocks.
pub fn discard_device_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 through the pointer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) })
}

fn fallocate_mode(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    };
    loop {
        // SAFETY: no pointers are passed.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Returns a range of a file to its file system; it reads as zeros afterwards. Blocks.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate_mode(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Reserves the blocks of a file of `size` bytes and makes it that long.
pub fn allocate(file: &File, size: u64) -> io::Result<()> {
    fallocate_mode(file, 0, 0, size)
}

/// Reserves the blocks of a range of a file, whose length stays: a write there needs no further room.
///
/// # Errors
/// `StorageFull` or `QuotaExceeded` without room, `Unsupported` where the file system cannot reserve.
pub fn reserve_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate_mode(file, libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Bytes an unprivileged process may still allocate on the file system of `path`.
///
/// # Errors
/// When the path cannot be looked at.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut figures = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the string ends with NUL, the structure is ours; both live through the call.
    check(unsafe { libc::statvfs(path.as_ptr(), figures.as_mut_ptr()) })?;
    // SAFETY: zeroed memory is a valid value of this plain structure, and the call filled it.
    let figures = unsafe { figures.assume_init() };
    Ok(figures.f_bavail.saturating_mul(figures.f_frsize))
}

/// Renames a file, refusing to replace another.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let (from_c, to_c) = (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let (here, flags) = (libc::AT_FDCWD, libc::RENAME_NOREPLACE);
    // SAFETY: both strings end with NUL and live through the call.
    match check(unsafe { libc::renameat2(here, from_c.as_ptr(), here, to_c.as_ptr(), flags) }) {
        // The file system knows no such flag.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !to.exists() => std::fs::rename(from, to),
        other => other,
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}
const _: () = assert!(size_of::<FiemapExtent>() == 56);

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; FIEMAP_BATCH],
}

/// Ranges `(start, len)` of a file that are allocated but were never written. Empty where the file system cannot tell.
pub fn unwritten_ranges(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut start = 0u64;
    loop {
        let empty = FiemapExtent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: FIEMAP_FLAG_SYNC,
            mapped_extents: 0,
            extent_count: FIEMAP_BATCH as u32,
            reserved: 0,
            extents: [empty; FIEMAP_BATCH],
        };
        // SAFETY: the kernel writes at most `extent_count` extents behind the header, for which `map` has room.
        match check(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) }) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => return Ok(ranges),
            Err(error) => return Err(error),
        }
        let found = &map.extents[..(map.mapped_extents as usize).min(FIEMAP_BATCH)];
        for extent in found.iter().filter(|extent| extent.flags & FIEMAP_EXTENT_UNWRITTEN != 0) {
            ranges.push((extent.logical, extent.length));
        }
        match found.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 && last.logical + last.length > start => {
                start = last.logical + last.length;
            }
            _ => return Ok(ranges),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_moves_forward_and_randomness_differs() {
        let first = monotonic();
        assert!(monotonic() >= first);
        assert_ne!(random_bytes::<32>(), random_bytes::<32>());
    }
}
