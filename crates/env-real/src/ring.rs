//! The disks of a reactor behind one io_uring.
//!
//! Requests enter by [`Ring::enqueue`], reach the kernel once per turn in [`Ring::submit`], and leave by
//! [`Ring::drain`] or, when their deadline passes first, by [`Ring::expire`]. Rules:
//! - what the kernel may read or write (buffers and io vectors) lives in a *slot* until the kernel has let go of it; a
//!   request that timed out keeps its slot until then, and its late completion is dropped;
//! - at most [`IN_FLIGHT_MAX`] requests per disk are in the kernel, so the submission queue can never be full; the rest
//!   waits in user space, under the same deadline;
//! - only the thread that made the ring uses it (`SINGLE_ISSUER`); discards, which may block, run elsewhere and come
//!   back through [`Ring::offloaded_done`].
#![allow(unsafe_code, reason = "submission entries carry raw pointers; the slot table keeps their targets alive")]

use crate::disk::Disk;
use crate::fill::FILL_PIECE_MAX;
use cairn_env::{Buf, BufMut, DISK_ALIGNMENT, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskRequest, IoId};
use cairn_types::{Duration, Instant};
use cairn_wire::DiskIndex;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most disks of one reactor.
pub const DISKS_MAX: usize = 8;
/// Most requests of one disk inside the kernel.
pub const IN_FLIGHT_MAX: usize = 128;
const RING_ENTRIES: u32 = (DISKS_MAX * IN_FLIGHT_MAX) as u32;
/// The kernel takes no more pieces in one request (`UIO_MAXIOV`); longer writes go in several.
const IO_VECTORS_MAX: usize = 1024;
/// How long a dropped ring waits for the kernel before it leaks what is still in use.
const DROP_WAIT: Duration = Duration::from_secs(2);
/// A store without requests for so long is quiet: its file may be filled far ahead.
const QUIET_AFTER: Duration = Duration::from_millis(20);
/// From the begin of one piece to that of the next in a quiet store: the disk may have other users.
const FILL_PAUSE: Duration = Duration::from_millis(3);
/// Lines about failed requests per disk; the process hears of every failure, the log of the first ones.
const ERROR_LINES_MAX: u32 = 20;

/// A discard for another thread to run.
pub struct Offloaded {
    /// Give it back to [`Ring::offloaded_done`].
    pub ticket: u64,
    /// Where.
    pub file: Arc<File>,
    /// A block device, not a file.
    pub is_device: bool,
    /// Start of the range.
    pub offset: u64,
    /// Length of the range.
    pub len: u64,
}

enum Work {
    Read(BufMut),
    Write(Vec<Buf>),
    Flush,
    Discard,
    Fill,
}

struct Op {
    disk: usize,
    io: IoId,
    work: Work,
    offset: u64,
    len: u64,
    done: u64,
    deadline: Instant,
    io_vectors: Vec<libc::iovec>,
}

impl Op {
    fn name(&self) -> &'static str {
        match self.work {
            Work::Read(_) => "read",
            Work::Write(_) => "write",
            Work::Flush => "flush",
            Work::Discard => "discard",
            Work::Fill => "fill",
        }
    }

    fn failed(&self, kind: DiskErrorKind) -> DiskDone {
        let error = DiskError { operation: self.name(), offset: self.offset, len: self.len, kind };
        DiskDone { io: self.io, result: Err(error) }
    }

    fn overwrites(&self) -> bool {
        matches!(self.work, Work::Write(_) | Work::Discard)
    }
}

#[derive(Default)]
struct Slot {
    /// Counts the uses of this slot, so that a completion is matched with the request it belongs to.
    generation: u32,
    op: Option<Op>,
    /// The deadline has passed and the process was told; the kernel still holds the buffers.
    expired: bool,
}

struct DiskState {
    disk: Disk,
    queue: VecDeque<Op>,
    /// Writes that meet the piece being filled.
    behind_fill: Vec<Op>,
    in_flight: usize,
    /// When the store asked for something last.
    asked: Instant,
    /// When the last piece was begun to be filled.
    filled: Instant,
    error_lines: u32,
}

/// All disks of one reactor.
pub struct Ring {
    uring: IoUring,
    disks: Vec<DiskState>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    zeros: Buf,
    check_at: Option<Instant>,
    /// When to look for something to fill.
    fill_at: Option<Instant>,
    offloaded: Vec<Offloaded>,
    done: Vec<(DiskIndex, DiskDone)>,
    log: Vec<String>,
}

/// What an errno means to a core.
pub fn kind_of_errno(errno: i32) -> DiskErrorKind {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => DiskErrorKind::NoSpace,
        libc::EROFS | libc::EBADF | libc::ENODEV | libc::ENXIO | libc::EPERM | libc::EACCES | libc::ESTALE => {
            DiskErrorKind::Gone
        }
        libc::ETIMEDOUT => DiskErrorKind::Timeout,
        _ => DiskErrorKind::Io,
    }
}

fn build_ring() -> io::Result<IoUring> {
    let build = |cooperative: bool| {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp();
        if cooperative {
            builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
        }
        builder.build(RING_ENTRIES)
    };
    match build(true) {
        // A kernel before 6.0 does not know these flags; it works, with more interruptions.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(false),
        other => other,
    }
    .map_err(|error| {
        let hint =
            "io_uring is not available; see the kernel.io_uring_disabled sysctl and the container's seccomp rules";
        io::Error::new(error.kind(), format!("{hint}: {error}"))
    })
}

impl Ring {
    /// A ring without disks.
    ///
    /// # Errors
    /// When the kernel offers no io_uring.
    pub fn new() -> io::Result<Ring> {
        let uring = build_ring()?;
        uring.submitter().register_files_sparse(DISKS_MAX as u32)?;
        Ok(Ring {
            uring,
            disks: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            zeros: Buf::zeroed(FILL_PIECE_MAX as usize),
            check_at: None,
            fill_at: None,
            offloaded: Vec::new(),
            done: Vec::new(),
            log: Vec::new(),
        })
    }

    /// Adds a disk; its index is the number of disks before it.
    ///
    /// # Errors
    /// When there are [`DISKS_MAX`] already, or the kernel refuses the file.
    pub fn add_disk(&mut self, mut disk: Disk) -> io::Result<DiskIndex> {
        let index = self.disks.len();
        if index == DISKS_MAX {
            return Err(io::Error::other(format!("a process has at most {DISKS_MAX} disks")));
        }
        self.uring.submitter().register_files_update(index as u32, &[disk.file.as_raw_fd()])?;
        self.log.extend(disk.warning.take());
        let (queue, behind_fill) = (VecDeque::new(), Vec::new());
        self.disks.push(DiskState {
            disk,
            queue,
            behind_fill,
            in_flight: 0,
            asked: Instant(0),
            filled: Instant(0),
            error_lines: 0,
        });
        Ok(DiskIndex(index as u8))
    }

    /// Becomes readable when completions wait. Must be made inside a tokio runtime.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring's descriptor is open for as long as the ring; the duplicate has its own life.
        let watched = unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` keeps one open descriptor until the `AsyncFd` drops it.
        Ok(unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE) }?)
    }

    /// Takes a request. An unaligned one is a broken core and stops the process.
    pub fn enqueue(&mut self, now: Instant, disk: DiskIndex, request: DiskRequest) {
        let index = usize::from(disk.0);
        assert!(index < self.disks.len(), "request for disk {index} of {}", self.disks.len());
        let state = &mut self.disks[index];
        state.asked = now;
        let aligned = |what: &str, value: u64| {
            assert!(value.is_multiple_of(DISK_ALIGNMENT), "{what} {value} of a disk request is not aligned");
        };
        let (work, offset, len) = match request.op {
            DiskOp::Read { offset, len } => (Work::Read(BufMut::recycled(len as usize)), offset, u64::from(len)),
            DiskOp::Write { offset, bufs } => {
                for buf in &bufs {
                    assert!(buf.is_aligned(), "a write buffer is not aligned in memory");
                    aligned("buffer length", buf.len() as u64);
                }
                let len = bufs.iter().map(|buf| buf.len() as u64).sum();
                (Work::Write(bufs), offset, len)
            }
            DiskOp::Flush => (Work::Flush, 0, 0),
            DiskOp::Discard { offset, len } => (Work::Discard, offset, len),
        };
        aligned("offset", offset);
        aligned("length", len);
        let has_range = !matches!(work, Work::Flush);
        assert!(!has_range || len > 0, "a disk request of length zero");
        let deadline = now + state.disk.options.deadline;
        let op = Op { disk: index, io: request.io, work, offset, len, done: 0, deadline, io_vectors: Vec::new() };
        if has_range && offset.checked_add(len).is_none_or(|end| end > state.disk.size) {
            self.log.push(format!("{}: {} of {len} bytes at {offset} is beyond the end", state.path(), op.name()));
            self.done.push((disk, op.failed(DiskErrorKind::Io)));
            return;
        }
        if op.overwrites() && state.disk.options.read_only {
            self.done.push((disk, op.failed(DiskErrorKind::Gone)));
            return;
        }
        self.check_at = Some(self.check_at.map_or(deadline, |at| at.min(deadline)));
        if op.overwrites() && !state.disk.filler.store_writes(offset, offset + len) {
            state.behind_fill.push(op);
        } else {
            state.queue.push_back(op);
        }
    }

    /// Hands everything that fits to the kernel: one system call per turn.
    ///
    /// # Errors
    /// When the ring itself is broken; the process cannot go on.
    pub fn submit(&mut self, now: Instant) -> io::Result<()> {
        self.fill_at = None;
        for index in 0..self.disks.len() {
            self.enqueue_fill(index, now);
            while self.disks[index].in_flight < IN_FLIGHT_MAX
                && let Some(op) = self.disks[index].queue.pop_front()
            {
                self.launch(op);
            }
        }
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of something for the moment; the next turn tries again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// True when [`Ring::drain`] would find something, or [`Ring::submit`] left something behind.
    pub fn has_work(&mut self) -> bool {
        !self.done.is_empty() || !self.uring.submission().is_empty() || !self.uring.completion().is_empty()
    }

    /// True when completions wait; looks at memory only, unless the kernel asks to be entered for them.
    pub fn poll_completions(&mut self) -> bool {
        if self.uring.submission().taskrun() {
            let _ = self.uring.submit();
        }
        !self.uring.completion().is_empty()
    }

    /// Collects all completions at hand.
    pub fn drain(&mut self, out: &mut Vec<(DiskIndex, DiskDone)>) {
        let mut arrived = [(0u64, 0i32); 64];
        loop {
            let mut count = 0;
            // The places come first: `zip` asks the completions only when there is room, and what it takes is gone.
            for (place, entry) in arrived.iter_mut().zip(self.uring.completion()) {
                *place = (entry.user_data(), entry.result());
                count += 1;
            }
            for &(ticket, result) in &arrived[..count] {
                self.complete(ticket, result);
            }
            if count < arrived.len() {
                break;
            }
        }
        out.append(&mut self.done);
    }

    /// Fails every request whose deadline has passed. Call [`Ring::drain`] first: what has arrived is no timeout.
    pub fn expire(&mut self, now: Instant) {
        if self.check_at.is_none_or(|at| now < at) {
            return;
        }
        let mut next: Option<Instant> = None;
        let mut timed_out = Vec::new();
        let mut check = |op: &Op| {
            if op.deadline <= now {
                timed_out.push((DiskIndex(op.disk as u8), op.failed(DiskErrorKind::Timeout)));
                return false;
            }
            next = Some(next.map_or(op.deadline, |at: Instant| at.min(op.deadline)));
            true
        };
        for slot in &mut self.slots {
            let Some(op) = slot.op.as_ref().filter(|_| !slot.expired) else { continue };
            slot.expired = !check(op);
        }
        for state in &mut self.disks {
            state.queue.retain(&mut check);
            state.behind_fill.retain(&mut check);
        }
        for (index, done) in &timed_out {
            let Err(error) = &done.result else { continue };
            self.disks[usize::from(index.0)].log_error(&mut self.log, &error.to_string());
        }
        self.done.append(&mut timed_out);
        self.check_at = next;
    }

    /// When [`Ring::expire`] and [`Ring::submit`] want to be called at the latest.
    pub fn check_at(&self) -> Option<Instant> {
        self.check_at.into_iter().chain(self.fill_at).min()
    }

    /// Discards to run on another thread.
    pub fn take_offloaded(&mut self) -> Vec<Offloaded> {
        std::mem::take(&mut self.offloaded)
    }

    /// A discard has ended.
    pub fn offloaded_done(&mut self, ticket: u64, result: io::Result<()>) {
        let result = match result {
            Ok(()) => 0,
            // Advisory: a device that cannot discard has done all it can.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => 0,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        self.complete(ticket, result);
    }

    /// Lines for the log.
    pub fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    fn enqueue_fill(&mut self, index: usize, now: Instant) {
        let state = &mut self.disks[index];
        if !state.disk.filler.has_work() {
            return;
        }
        let busy = state.in_flight + state.queue.len();
        let quiet_at = (state.asked + QUIET_AFTER).max(state.filled + FILL_PAUSE);
        let quiet = busy == 0 && now >= quiet_at;
        // The store goes first: filling takes a turn only when it leaves room.
        if busy < IN_FLIGHT_MAX / 2
            && let Some((offset, end)) = state.disk.filler.start_piece(quiet)
        {
            let len = end - offset;
            // Nobody waits for it, so it has no deadline; store writes that wait behind it have theirs.
            let (io, work, deadline, io_vectors) = (IoId(0), Work::Fill, Instant(u64::MAX), Vec::new());
            state.queue.push_back(Op { disk: index, io, work, offset, len, done: 0, deadline, io_vectors });
            state.filled = now;
        }
        if now < quiet_at {
            self.fill_at = Some(self.fill_at.map_or(quiet_at, |at| at.min(quiet_at)));
        }
    }

    fn launch(&mut self, op: Op) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let entry = &mut self.slots[slot as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.expired = false;
        let ticket = u64::from(entry.generation) << 32 | u64::from(slot);
        let state = &mut self.disks[op.disk];
        state.in_flight += 1;
        if let Work::Discard = op.work {
            let (file, is_device) = (Arc::clone(&state.disk.file), state.disk.is_device);
            self.offloaded.push(Offloaded { ticket, file, is_device, offset: op.offset, len: op.len });
            entry.op = Some(op);
        } else {
            entry.op = Some(op);
            self.push_entry(ticket);
        }
    }

    /// Gives what is left of a slot's request to the submission queue.
    fn push_entry(&mut self, ticket: u64) {
        let op = self.slots[ticket as u32 as usize].op.as_mut().expect("a launched slot holds its request");
        let file = types::Fixed(op.disk as u32);
        let through = if self.disks[op.disk].disk.options.write_through { libc::RWF_DSYNC } else { 0 };
        let (at, left) = (op.offset + op.done, op.len - op.done);
        let entry: squeue::Entry = match &mut op.work {
            Work::Read(buf) => {
                let rest = &mut buf[op.done as usize..];
                opcode::Read::new(file, rest.as_mut_ptr(), rest.len() as u32).offset(at).build()
            }
            Work::Write(bufs) => {
                op.io_vectors.clear();
                let mut skip = op.done as usize;
                for buf in bufs.iter() {
                    let part = &buf[skip.min(buf.len())..];
                    skip -= buf.len() - part.len();
                    if !part.is_empty() && op.io_vectors.len() < IO_VECTORS_MAX {
                        // The kernel only reads through this pointer; iovec knows no constness.
                        op.io_vectors.push(libc::iovec { iov_base: part.as_ptr() as *mut _, iov_len: part.len() });
                    }
                }
                match op.io_vectors[..] {
                    [one] => opcode::Write::new(
                        file,
                        one.iov_base as *const u8,
                        u32::try_from(one.iov_len).unwrap_or(1 << 30),
                    )
                    .offset(at)
                    .rw_flags(through)
                    .build(),
                    _ => opcode::Writev::new(file, op.io_vectors.as_ptr(), op.io_vectors.len() as u32)
                        .offset(at)
                        .rw_flags(through)
                        .build(),
                }
            }
            Work::Fill => opcode::Write::new(file, self.zeros.as_ptr(), left as u32).offset(at).build(),
            Work::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Discard => unreachable!("discards run on another thread"),
        };
        // SAFETY: the entry points into buffers and io vectors that the slot owns. The slot is emptied only in
        // `complete`, when the kernel has answered, and leaked by `Drop` when it has not. The file is registered and
        // its `Disk` lives as long as the ring.
        unsafe { self.uring.submission().push(&entry.user_data(ticket)) }
            .expect("the ring has an entry for every request in flight");
    }

    fn complete(&mut self, ticket: u64, result: i32) {
        let (number, generation) = (ticket as u32, (ticket >> 32) as u32);
        let slot = &mut self.slots[number as usize];
        assert_eq!(slot.generation, generation, "a completion belongs to the request in its slot");
        let op = slot.op.as_mut().expect("a completion belongs to a request in flight");
        let moves_data = matches!(op.work, Work::Read(_) | Work::Write(_) | Work::Fill);
        let mut failure = None;
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            if !slot.expired {
                return self.push_entry(ticket);
            }
        } else if result < 0 {
            failure = Some(-result);
        } else if moves_data {
            // A short transfer goes on at the last whole block; one that got nowhere would go on for ever.
            let before = op.done;
            op.done = (op.done + result as u64).min(op.len);
            if op.done < op.len {
                op.done = op.done / DISK_ALIGNMENT * DISK_ALIGNMENT;
                if op.done == before {
                    failure = Some(libc::EIO);
                } else if !slot.expired {
                    return self.push_entry(ticket);
                }
            }
        }
        let op = slot.op.take().expect("checked above");
        let expired = std::mem::take(&mut slot.expired);
        self.free.push(number);
        let state = &mut self.disks[op.disk];
        state.in_flight -= 1;
        if let Some(errno) = failure {
            let system = io::Error::from_raw_os_error(errno);
            let text = format!("{} of {} bytes at {}: {system}", op.name(), op.len, op.offset);
            state.log_error(&mut self.log, &text);
        }
        if let Work::Fill = op.work {
            state.disk.filler.piece_done(failure.is_none());
            for waiting in state.behind_fill.drain(..).rev() {
                state.queue.push_front(waiting);
            }
        } else if !expired {
            let disk = DiskIndex(op.disk as u8);
            let done = match failure {
                Some(errno) => op.failed(kind_of_errno(errno)),
                None => {
                    let bytes = if let Work::Read(buf) = op.work { buf.freeze() } else { Buf::default() };
                    DiskDone { io: op.io, result: Ok(bytes) }
                }
            };
            self.done.push((disk, done));
        }
    }
}

impl DiskState {
    fn path(&self) -> std::path::Display<'_> {
        self.disk.path.display()
    }

    fn log_error(&mut self, log: &mut Vec<String>, text: &str) {
        self.error_lines += 1;
        if self.error_lines <= ERROR_LINES_MAX {
            log.push(format!("{}: {text}", self.path()));
        }
        if self.error_lines == ERROR_LINES_MAX {
            log.push(format!("{}: further errors of this disk are not logged", self.path()));
        }
    }
}

impl Drop for Ring {
    /// Memory the kernel may still write to must not be given back: waits a little, then leaks it.
    fn drop(&mut self) {
        let give_up = crate::clock::monotonic() + DROP_WAIT;
        let in_kernel = |ring: &Ring| {
            let holds = |slot: &Slot| slot.op.as_ref().is_some_and(|op| !matches!(op.work, Work::Discard));
            ring.slots.iter().any(holds)
        };
        while in_kernel(self) && crate::clock::monotonic() < give_up {
            let wait = types::Timespec::new().nsec(50_000_000);
            let _ = self.uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&wait));
            let arrived: Vec<u64> = self.uring.completion().map(|entry| entry.user_data()).collect();
            for ticket in arrived {
                if let Some(op) = self.slots[ticket as u32 as usize].op.take() {
                    self.disks[op.disk].in_flight -= 1;
                }
            }
        }
        // The kernel drops its references to the files some time after the ring is closed; the next to open them should
        // not have to wait. While requests are under way the lock stays: nobody else may write here yet.
        for disk in self.disks.iter().filter(|state| state.in_flight == 0) {
            let _ = disk.disk.file.unlock();
        }
        if in_kernel(self) {
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(self.zeros.clone());
        }
    }
}

#[cfg(test)]
mod tests;
