//! The simulated disk keeps exactly the promises of `cairn_env::disk`, and breaks them exactly when told to.

use super::*;
use cairn_env::Buf;

const SIZE: u64 = 1 << 20;

fn write(disk: &mut SimDisk, io: u64, page: u64, byte: u8) {
    let bufs = vec![Buf::copy_from(&[byte; PAGE])];
    disk.submit(DiskRequest { io: IoId(io), op: DiskOp::Write { offset: page * PAGE as u64, bufs } });
}

fn flush(disk: &mut SimDisk, io: u64) -> bool {
    disk.submit(DiskRequest { io: IoId(io), op: DiskOp::Flush });
    disk.complete(IoId(io)).expect("flush completes").result.is_ok()
}

fn byte(disk: &SimDisk, page: u64) -> u8 {
    disk.peek(page * PAGE as u64, PAGE as u32)[0]
}

fn cut_to_old(disk: &mut SimDisk) {
    disk.power_cut_choose(&mut |_, _, _| 0);
}

#[test]
fn a_flush_covers_what_completed_before_it_was_issued_and_nothing_else() {
    let mut disk = SimDisk::new(SIZE);
    write(&mut disk, 1, 0, 1);
    disk.complete(IoId(1));
    write(&mut disk, 2, 1, 2);
    disk.submit(DiskRequest { io: IoId(3), op: DiskOp::Flush });
    disk.complete(IoId(2));
    disk.complete(IoId(3));
    assert_eq!((byte(&disk, 0), byte(&disk, 1)), (1, 2));
    cut_to_old(&mut disk);
    assert_eq!((byte(&disk, 0), byte(&disk, 1)), (1, 0));
}

#[test]
fn a_failed_flush_strands_what_it_covered_even_when_retried() {
    let mut disk = SimDisk::new(SIZE);
    write(&mut disk, 1, 0, 1);
    disk.complete(IoId(1));
    disk.inject(Fault::Fail { kind: OpKind::Flush, nth: 0, forever: false });
    assert!(!flush(&mut disk, 2));
    assert!(flush(&mut disk, 3));
    cut_to_old(&mut disk);
    assert_eq!(byte(&disk, 0), 0);
}

#[test]
fn lost_misdirected_rotten_and_stale_pages_show_the_truth_again_when_lifted() {
    let mut disk = SimDisk::new(SIZE);
    disk.inject(Fault::LoseWrite { nth: 0 });
    disk.inject(Fault::MisdirectWrite { nth: 1, offset: 5 * PAGE as u64 });
    for (io, page) in [(1, 1), (2, 2)] {
        write(&mut disk, io, page, io as u8);
        disk.complete(IoId(io));
    }
    assert_eq!([byte(&disk, 1), byte(&disk, 2), byte(&disk, 5)], [0, 0, 2]);
    disk.rot(3 * PAGE as u64, 7);
    assert_eq!(byte(&disk, 3), 128);
    disk.stale_read(4 * PAGE as u64);
    write(&mut disk, 3, 4, 9);
    disk.complete(IoId(3));
    disk.submit(DiskRequest { io: IoId(4), op: DiskOp::Read { offset: 4 * PAGE as u64, len: PAGE as u32 } });
    assert_eq!(disk.complete(IoId(4)).unwrap().result.unwrap()[0], 0);
    disk.lift_faults();
    assert_eq!([1, 2, 3, 4, 5].map(|page| byte(&disk, page)), [1, 2, 0, 9, 0]);
}

#[test]
fn a_kill_keeps_completed_writes_and_a_cut_tears_only_unflushed_sectors() {
    for seed in 0..64 {
        let mut rng = Rng::new(seed);
        let mut disk = SimDisk::new(SIZE);
        write(&mut disk, 1, 0, 1);
        disk.complete(IoId(1));
        write(&mut disk, 2, 1, 2);
        disk.kill(&mut rng);
        assert_eq!(byte(&disk, 0), 1);
        assert!(flush(&mut disk, 3));
        write(&mut disk, 4, 0, 4);
        disk.power_cut(&mut rng);
        for sector in disk.peek(0, PAGE as u32).chunks_exact(SECTOR) {
            assert!(sector.iter().all(|b| *b == sector[0]) && [1, 4].contains(&sector[0]));
        }
    }
}

#[test]
fn hanging_and_failing_requests_do_so_on_their_turn_only() {
    let mut disk = SimDisk::new(SIZE);
    disk.inject(Fault::Hang { kind: OpKind::Write, nth: 0 });
    disk.inject(Fault::Fail { kind: OpKind::Write, nth: 1, forever: false });
    for io in 1..=3 {
        write(&mut disk, io, io, io as u8);
    }
    assert!(disk.complete(IoId(1)).is_none());
    assert!(disk.complete(IoId(2)).unwrap().result.is_err());
    assert!(disk.complete(IoId(3)).unwrap().result.is_ok());
    disk.lift_faults();
    assert!(disk.complete(IoId(1)).unwrap().result.is_ok());
    disk.set_capacity(2 * PAGE as u64);
    write(&mut disk, 4, 9, 9);
    assert_eq!(disk.complete(IoId(4)).unwrap().result.unwrap_err().kind, DiskErrorKind::NoSpace);
}

#[test]
fn a_flush_that_lies_covers_nothing_until_an_honest_one_follows() {
    let mut disk = SimDisk::new(SIZE);
    disk.lie_about_flushes(true);
    write(&mut disk, 1, 0, 1);
    disk.complete(IoId(1));
    assert!(flush(&mut disk, 2));
    let mut other = disk.clone();
    cut_to_old(&mut disk);
    assert_eq!(byte(&disk, 0), 0);
    assert_eq!(disk.take_misdeeds().len(), 1);
    other.lie_about_flushes(false);
    assert!(flush(&mut other, 3));
    cut_to_old(&mut other);
    assert_eq!(byte(&other, 0), 1);
}

#[test]
fn a_stale_read_returns_what_was_before_once() {
    let mut disk = SimDisk::new(SIZE);
    disk.remember();
    for (io, what) in [(1, 7), (2, 8)] {
        write(&mut disk, io, 3, what);
        disk.complete(IoId(io));
    }
    disk.inject(Fault::StaleRead { nth: 1 });
    let mut read = |io| {
        disk.submit(DiskRequest { io: IoId(io), op: DiskOp::Read { offset: 3 * PAGE as u64, len: PAGE as u32 } });
        disk.complete(IoId(io)).expect("a read completes").result.expect("it succeeds")[0]
    };
    assert_eq!([read(3), read(4), read(5)], [8, 7, 8]);
}

#[test]
fn a_write_lost_in_part_keeps_its_first_pages() {
    let mut disk = SimDisk::new(SIZE);
    disk.inject(Fault::LosePart { nth: 0, first: 1 });
    let bufs = vec![Buf::copy_from(&[9; 3 * PAGE])];
    disk.submit(DiskRequest { io: IoId(1), op: DiskOp::Write { offset: 0, bufs } });
    assert!(disk.complete(IoId(1)).expect("it completes").result.is_ok());
    assert_eq!([0, 1, 2].map(|page| byte(&disk, page)), [9, 0, 0]);
    assert_eq!(disk.take_misdeeds(), [Misdeed { what: "lost write", page: 1, pages: 2 }]);
}
