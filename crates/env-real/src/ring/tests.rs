//! The ring against real files, and against descriptors that block or fail on demand. Time is an argument here.

use super::*;
use crate::disk::DiskOptions;
use crate::fill::{Filler, RangeSet};
use cairn_stdx::Rng;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

const START: Instant = Instant(1_000_000_000);
const DISK: DiskIndex = DiskIndex(0);

/// A disk over any descriptor, past the checks of [`Disk::open_file`].
fn disk_over(file: File, options: DiskOptions) -> Disk {
    let (path, filler) = ("test".into(), Filler::new(RangeSet::default(), 0));
    Disk { file: Arc::new(file), path, size: 1 << 30, is_device: false, options, filler, warning: None }
}

fn ring_over(disk: Disk) -> Ring {
    let mut ring = Ring::new().unwrap();
    ring.add_disk(disk).unwrap();
    ring
}

fn pipe(path: &Path) -> File {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name ends with NUL and lives through the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    File::options().read(true).write(true).open(path).unwrap()
}

impl Ring {
    fn ask(&mut self, io: u64, op: DiskOp) {
        self.enqueue(START, DISK, DiskRequest { io: IoId(io), op });
    }

    fn collect(&mut self) -> Vec<DiskDone> {
        let mut out = Vec::new();
        self.drain(&mut out);
        out.into_iter().map(|(_, done)| done).collect()
    }

    /// Runs discards here and waits until `count` requests have completed.
    fn finish(&mut self, count: usize) -> Vec<DiskDone> {
        let mut out = Vec::new();
        loop {
            self.submit(Instant(0)).unwrap();
            for discard in self.take_offloaded() {
                let result = crate::sys::punch_hole(&discard.file, discard.offset, discard.len);
                self.offloaded_done(discard.ticket, result);
            }
            out.append(&mut self.collect());
            if out.len() >= count {
                assert_eq!(out.len(), count, "each request completes once");
                out.sort_by_key(|done| done.io);
                return out;
            }
            // A completion may have let others go on, which the next round submits.
            if self.disks.iter().all(|disk| disk.queue.is_empty()) {
                self.uring.submit_and_wait(1).unwrap();
            }
        }
    }

    fn one(&mut self, op: DiskOp) -> Result<Buf, DiskErrorKind> {
        self.ask(7, op);
        self.finish(1).remove(0).result.map_err(|error| error.kind)
    }

    fn idle(&self) -> bool {
        self.free.len() == self.slots.len() && self.disks.iter().all(|disk| disk.in_flight == 0)
    }
}

fn block(byte: u8, len: usize) -> Buf {
    let mut buf = BufMut::zeroed(len);
    buf.fill(byte);
    buf.freeze()
}

#[test]
fn a_request_without_an_answer_times_out_once_and_its_late_completion_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut far_end = pipe(&dir.path().join("pipe"));
    let mut ring = ring_over(disk_over(far_end.try_clone().unwrap(), DiskOptions::default()));
    ring.ask(1, DiskOp::Read { offset: 0, len: 4096 });
    ring.submit(Instant(0)).unwrap();
    assert_eq!(ring.check_at(), Some(START + Duration::from_secs(30)));
    ring.expire(START + Duration::from_secs(29));
    assert!(ring.collect().is_empty(), "not yet");
    ring.expire(START + Duration::from_secs(30));
    let done = ring.collect();
    assert_eq!(done[0].result.as_ref().unwrap_err().kind, DiskErrorKind::Timeout);
    assert_eq!((done.len(), ring.check_at()), (1, None));
    assert!(!ring.idle(), "the kernel still holds the buffer");
    far_end.write_all(&[9; 4096]).unwrap();
    ring.uring.submit_and_wait(1).unwrap();
    assert!(ring.collect().is_empty(), "the process has had its answer");
    assert!(ring.idle());
}

#[test]
fn requests_waiting_behind_a_dead_disk_time_out_too() {
    let dir = tempfile::tempdir().unwrap();
    let far_end = pipe(&dir.path().join("pipe"));
    let mut ring = ring_over(disk_over(far_end.try_clone().unwrap(), DiskOptions::default()));
    let count = IN_FLIGHT_MAX as u64 + 50;
    (0..count).for_each(|io| ring.ask(io, DiskOp::Read { offset: io * 4096, len: 4096 }));
    ring.submit(Instant(0)).unwrap();
    assert_eq!((ring.disks[0].in_flight, ring.disks[0].queue.len()), (IN_FLIGHT_MAX, 50));
    ring.expire(START + Duration::from_secs(31));
    let done = ring.collect();
    assert_eq!(done.len() as u64, count);
    assert!(done.iter().all(|done| done.result.as_ref().unwrap_err().kind == DiskErrorKind::Timeout));
    assert!(ring.take_log().len() <= ERROR_LINES_MAX as usize + 1, "a dead disk does not fill the log");
}

#[test]
fn a_short_read_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut far_end = pipe(&dir.path().join("pipe"));
    let mut ring = ring_over(disk_over(far_end.try_clone().unwrap(), DiskOptions::default()));
    ring.ask(1, DiskOp::Read { offset: 0, len: 8192 });
    ring.submit(Instant(0)).unwrap();
    far_end.write_all(&[1; 4096]).unwrap();
    ring.uring.submit_and_wait(1).unwrap();
    assert!(ring.collect().is_empty());
    far_end.write_all(&[2; 4096]).unwrap();
    let done = ring.finish(1).remove(0).result.unwrap();
    assert!(done[..4096] == [1; 4096] && done[4096..] == [2; 4096]);
}

#[test]
fn errors_of_the_system_become_kinds() {
    let broken = File::open("/proc/self/mem").unwrap();
    let mut ring = ring_over(disk_over(broken, DiskOptions::default()));
    assert_eq!(ring.one(DiskOp::Read { offset: 0, len: 4096 }), Err(DiskErrorKind::Io));
    assert_eq!(ring.take_log().len(), 1, "the log has the errno");

    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut ring = ring_over(disk_over(full, DiskOptions::default()));
    let write = DiskOp::Write { offset: 0, bufs: vec![block(1, 4096)] };
    assert_eq!(ring.one(write.clone()), Err(DiskErrorKind::NoSpace));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![5; 8192]).unwrap();
    let mut ring = ring_over(disk_over(File::open(&path).unwrap(), DiskOptions::default()));
    assert_eq!(ring.one(write.clone()), Err(DiskErrorKind::Gone), "opened for reading only");
    assert_eq!(ring.one(DiskOp::Read { offset: 8192, len: 4096 }), Err(DiskErrorKind::Io), "the file was cut short");
    assert_eq!(ring.one(DiskOp::Read { offset: 4096, len: 8192 }), Err(DiskErrorKind::Io), "in the middle of a read");
    assert_eq!(ring.one(DiskOp::Read { offset: 1 << 30, len: 4096 }), Err(DiskErrorKind::Io), "beyond the disk");
    let read_only = DiskOptions { read_only: true, ..DiskOptions::default() };
    let mut ring = ring_over(disk_over(File::open(&path).unwrap(), read_only));
    assert_eq!(ring.one(write), Err(DiskErrorKind::Gone));
    assert!(ring.idle());

    use DiskErrorKind::*;
    for (errno, kind) in [(libc::EIO, Io), (libc::EREMOTEIO, Io), (libc::EILSEQ, Io), (libc::EINVAL, Io)] {
        assert_eq!(kind_of_errno(errno), kind);
    }
    for (errno, kind) in
        [(libc::EDQUOT, NoSpace), (libc::ENODEV, Gone), (libc::EROFS, Gone), (libc::ETIMEDOUT, Timeout)]
    {
        assert_eq!(kind_of_errno(errno), kind);
    }
}

#[test]
#[should_panic(expected = "is not aligned")]
fn an_unaligned_request_stops_the_process() {
    let null = File::open("/dev/null").unwrap();
    ring_over(disk_over(null, DiskOptions::default())).ask(1, DiskOp::Read { offset: 512, len: 4096 });
}

#[test]
#[should_panic(expected = "not aligned in memory")]
fn an_unaligned_buffer_stops_the_process() {
    let null = File::open("/dev/null").unwrap();
    let bufs = vec![Buf::zeroed(8192).slice(512, 4096)];
    ring_over(disk_over(null, DiskOptions::default())).ask(1, DiskOp::Write { offset: 0, bufs });
}

#[test]
fn a_write_of_more_pieces_than_the_kernel_takes_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let options = DiskOptions { create_size: Some(16 << 20), ..DiskOptions::default() };
    let mut ring = ring_over(Disk::open_file(&path, options).unwrap());
    let bufs: Vec<Buf> = (0..2500u32).map(|i| block(i as u8, 4096)).collect();
    ring.one(DiskOp::Write { offset: 4096, bufs }).unwrap();
    ring.one(DiskOp::Flush).unwrap();
    let read = ring.one(DiskOp::Read { offset: 0, len: 2501 * 4096 }).unwrap();
    assert!((0..2500usize).all(|i| read[(i + 1) * 4096] == i as u8 && read[(i + 2) * 4096 - 1] == i as u8));
}

/// The contract of `cairn_env::disk`: random requests at depth, against a model; then again after reopening.
fn conformance(options: DiskOptions, path: &Path) {
    const BLOCKS: u64 = 4096;
    let options = DiskOptions { create_size: Some(BLOCKS * 4096), ..options };
    let mut rng = Rng::new(42);
    let mut model: Vec<Option<u8>> = vec![Some(0); BLOCKS as usize];
    for _ in 0..2 {
        let disk = Disk::open_file(path, options.clone()).unwrap();
        assert_eq!(disk.size(), BLOCKS * 4096);
        let mut ring = ring_over(disk);
        for round in 0..40u64 {
            // Overlapping requests in flight are the core's mistake: each request has its own stripe of the disk.
            let mut expected = Vec::new();
            for io in 0..64u64 {
                let (first, count) = (io * 64 + rng.below(32), 1 + rng.below(32));
                let blocks = first as usize..(first + count) as usize;
                let (offset, len) = (first * 4096, count * 4096);
                match rng.below(10) {
                    0..=4 => {
                        let byte = 1 + rng.below(255) as u8;
                        let cut = rng.below(count) as usize * 4096;
                        let whole = block(byte, len as usize);
                        let bufs = vec![whole.slice(0, cut), whole.slice(cut, len as usize - cut)];
                        let bufs = bufs.into_iter().filter(|buf| !buf.is_empty()).collect();
                        ring.ask(io, DiskOp::Write { offset, bufs });
                        model[blocks].fill(Some(byte));
                        expected.push(None);
                    }
                    5..=7 => {
                        ring.ask(io, DiskOp::Read { offset, len: len as u32 });
                        expected.push(Some(blocks));
                    }
                    8 => {
                        ring.ask(io, DiskOp::Discard { offset, len });
                        model[blocks].fill(None);
                        expected.push(None);
                    }
                    _ => {
                        ring.ask(io, DiskOp::Flush);
                        expected.push(None);
                    }
                }
            }
            for (done, expected) in ring.finish(64).into_iter().zip(expected) {
                let bytes = done.result.unwrap_or_else(|error| panic!("round {round}: {error}"));
                let blocks = expected.unwrap_or(0..0);
                assert_eq!(bytes.len(), blocks.len() * 4096);
                for (bytes, block) in bytes.chunks_exact(4096).zip(blocks) {
                    let want = model[block];
                    assert!(want.is_none_or(|want| bytes.iter().all(|byte| *byte == want)), "block {block}");
                }
            }
        }
        // Fills of the background may still be under way; nothing else is.
        ring.slots.iter().filter_map(|slot| slot.op.as_ref()).for_each(|op| assert!(matches!(op.work, Work::Fill)));
    }
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    for (block, want) in model.iter().enumerate() {
        let bytes = &bytes[block * 4096..][..4096];
        assert!(want.is_none_or(|want| bytes.iter().all(|byte| *byte == want)), "block {block} in the file");
    }
}

#[test]
fn a_store_file_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    conformance(DiskOptions::default(), &dir.path().join("direct"));
    conformance(DiskOptions { write_through: true, ..DiskOptions::default() }, &dir.path().join("through"));
    conformance(DiskOptions { direct: false, ..DiskOptions::default() }, &dir.path().join("cached"));
}

#[test]
fn a_file_in_memory_keeps_the_contract() {
    if let Ok(dir) = tempfile::tempdir_in("/dev/shm") {
        conformance(DiskOptions::default(), &dir.path().join("disk"));
    }
}

#[test]
fn filling_goes_ahead_of_the_store_and_never_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let options = DiskOptions { create_size: Some(32 << 20), fill_ahead: 16 << 20, ..DiskOptions::default() };
    let disk = Disk::open_file(&path, options.clone()).unwrap();
    let unwritten = |path: &Path| -> u64 {
        crate::sys::unwritten_ranges(&File::open(path).unwrap()).unwrap().iter().map(|(_, len)| len).sum()
    };
    let before = unwritten(&path);
    let mut ring = ring_over(disk);
    // Every write lands in or near the piece being filled, and more are queued than the kernel takes at once.
    for round in 0..16u64 {
        for io in 0..200 {
            ring.ask(io, DiskOp::Write { offset: (round << 20) + io * 4096, bufs: vec![block(io as u8 + 1, 4096)] });
        }
        ring.finish(200);
    }
    // Then the store is quiet.
    let mut now = Instant(u64::MAX / 2);
    ring.submit(now).unwrap();
    while ring.disks[0].in_flight > 0 {
        ring.uring.submit_and_wait(1).unwrap();
        assert!(ring.collect().is_empty());
        now = now + FILL_PAUSE;
        ring.submit(now).unwrap();
    }
    assert!(ring.idle());
    drop(ring);
    let mut file = File::open(&path).unwrap();
    let mut bytes = vec![0; 200 * 4096];
    for round in 0..16u64 {
        file.seek(SeekFrom::Start(round << 20)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        assert!(bytes.chunks(4096).enumerate().all(|(io, block)| block.iter().all(|byte| *byte == io as u8 + 1)));
    }
    if before > 0 {
        let left = unwritten(&path);
        assert!(left <= 2 << 20, "{left} bytes of {before} are still unwritten");
    }
}

#[test]
fn disks_are_opened_once_and_created_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let missing = Disk::open_file(&path, DiskOptions::default()).unwrap_err();
    assert!(matches!(missing, crate::OpenDiskError::System { action: "open", .. }), "{missing}");
    let mut heard = 0;
    Disk::create_filled(&path, 9 << 20, |written| heard = written).unwrap();
    assert_eq!(heard, 9 << 20);
    assert!(crate::sys::unwritten_ranges(&File::open(&path).unwrap()).unwrap().is_empty());
    assert!(Disk::create_filled(&path, 9 << 20, |_| ()).is_err(), "an existing file is left alone");
    let disk = Disk::open_file(&path, DiskOptions { create_size: Some(4096), ..DiskOptions::default() }).unwrap();
    assert_eq!(disk.size(), 9 << 20, "an existing file keeps its size");
    let read_only = DiskOptions { read_only: true, ..DiskOptions::default() };
    let second = Disk::open_file(&path, read_only.clone()).unwrap_err();
    assert!(matches!(second, crate::OpenDiskError::InUse { .. }), "{second}");
    drop(disk);
    let readers = [(); 2].map(|()| Disk::open_file(&path, read_only.clone()).unwrap());
    assert_eq!(readers[0].size(), readers[1].size());
    let odd = DiskOptions { create_size: Some(5000), ..DiskOptions::default() };
    assert!(matches!(Disk::open_file(dir.path().join("odd"), odd), Err(crate::OpenDiskError::Size { .. })));
    assert!(matches!(Disk::open_file("/dev/null", DiskOptions::default()), Err(crate::OpenDiskError::Kind { .. })));
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk"], "nothing unfinished is left behind");
}
