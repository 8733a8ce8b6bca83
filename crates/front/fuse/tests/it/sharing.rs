//! Several mounts of one cluster: who sees what when.

use crate::TestMount;
use crate::world::Cluster;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

fn two(options: &str) -> Option<(Cluster, TestMount, TestMount)> {
    let cluster = Cluster::start(11);
    let first = TestMount::new(&cluster, options)?;
    let second = TestMount::new(&cluster, options)?;
    Some((cluster, first, second))
}

#[test]
fn what_was_closed_here_is_read_there() {
    let Some((_cluster, a, b)) = two("") else { return };
    let (here, there) = (a.path().join("f"), b.path().join("f"));
    for round in 0..40_usize {
        // Longer, shorter, and of equal length: sizes and cached pages must both follow.
        let text = format!("round {round} ").repeat(1 + (round * 7919) % 3000);
        let (writer, reader) = if round % 2 == 0 { (&here, &there) } else { (&there, &here) };
        fs::write(writer, &text).expect("write");
        assert_eq!(fs::read_to_string(reader).expect("read"), text, "round {round}");
        assert_eq!(fs::metadata(writer).expect("stat").len(), text.len() as u64);
    }
}

#[test]
fn pages_read_before_are_dropped_when_another_mount_writes() {
    let Some((_cluster, a, b)) = two("") else { return };
    let (here, there) = (a.path().join("f"), b.path().join("f"));
    fs::write(&here, vec![1; 300_000]).expect("write");
    let reader = File::open(&there).expect("open");
    let mut byte = [0; 1];
    for value in 2..30 {
        let mut all = vec![0; 300_000];
        reader.read_exact_at(&mut all, 0).expect("read");
        assert!(all.iter().all(|&byte| byte == value - 1), "round {value}");
        let writer = OpenOptions::new().write(true).open(&here).expect("open to write");
        writer.write_all_at(&vec![value; 300_000], 0).expect("write");
        drop(writer);
        reader.read_exact_at(&mut byte, 299_999).expect("read through the handle that stayed open");
        assert_eq!(byte, [value]);
    }
}

#[test]
fn a_file_open_for_writing_is_busy_elsewhere_until_it_is_closed() {
    let Some((_cluster, a, b)) = two("lease-wait=1") else { return };
    let mut writer = File::create(a.path().join("f")).expect("create");
    writer.write_all(b"mine").expect("write");
    for attempt in [OpenOptions::new().read(true), OpenOptions::new().write(true)] {
        let refused = attempt.open(b.path().join("f")).expect_err("busy");
        assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
    }
    assert_eq!(fs::metadata(b.path().join("f")).expect("stat needs no lease").ino(), writer.metadata().unwrap().ino());
    drop(writer);
    assert_eq!(fs::read(b.path().join("f")).expect("free now"), b"mine");
}

#[test]
fn a_lost_lease_fails_its_writers_and_nobody_else() {
    let Some((cluster, a, b)) = two("") else { return };
    let (here, there) = (a.path().join("f"), b.path().join("f"));
    fs::write(&here, b"old content").expect("write");
    let writer = OpenOptions::new().read(true).write(true).open(&here).expect("open");
    let mut text = String::new();
    (&writer).read_to_string(&mut text).expect("read");
    cluster.fence_all();
    fs::write(&there, b"new content").expect("the other mount took it over");
    let refused = writer.write_all_at(b"late", 0).expect_err("fenced");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    assert_eq!(writer.write_all_at(b"late", 0).expect_err("for good").raw_os_error(), Some(libc::EIO));
    drop(writer);
    assert_eq!(fs::read(&here).expect("a new open acquires anew"), b"new content");
    assert_eq!(fs::read(&there).expect("read"), b"new content");
}

#[test]
fn after_a_lost_lease_nobody_took_over_new_opens_work_at_once() {
    let Some((cluster, a, _b)) = two("") else { return };
    let here = a.path().join("f");
    fs::write(&here, b"old content").expect("write");
    let used = OpenOptions::new().read(true).write(true).open(&here).expect("open");
    used.write_all_at(b"OLD", 0).expect("write");
    used.sync_all().expect("sync");
    let unused = OpenOptions::new().write(true).open(&here).expect("open");
    cluster.fence_all();
    let fresh = OpenOptions::new().read(true).write(true).open(&here).expect("a new open");
    fresh.write_all_at(b"NEW", 8).expect("acquires anew");
    unused.write_all_at(b"-", 3).expect("nothing was done through it under the lost lease");
    let refused = used.write_all_at(b"late", 0).expect_err("it may have lost what it wrote");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    drop((used, fresh, unused));
    assert_eq!(fs::read(&here).expect("read"), b"OLD-contNEW");
}

#[test]
fn names_and_attributes_follow_within_their_time_to_live() {
    let Some((_cluster, a, b)) = two("") else { return };
    fs::create_dir(a.path().join("d")).expect("mkdir");
    fs::write(a.path().join("d/x"), b"1").expect("write");
    assert_eq!(fs::read(b.path().join("d/x")).expect("read"), b"1");
    fs::rename(a.path().join("d/x"), a.path().join("d/y")).expect("rename");
    assert_eq!(fs::read(b.path().join("d/y")).expect("under its new name"), b"1");
    let names: Vec<_> = fs::read_dir(b.path().join("d")).expect("list").map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["y"]);
}

const FILES: usize = 3;
const WORDS: usize = 12_000;

#[derive(Default)]
struct Shared {
    writing: [Mutex<()>; FILES],
    closed: [AtomicU64; FILES],
    next: AtomicU64,
}

/// Opens as often as it takes: while the other mount writes, an open may find the file busy.
fn patiently<T>(open: impl Fn() -> std::io::Result<T>) -> T {
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn write_rounds(directory: &Path, shared: &Shared, rounds: usize, seed: usize) {
    for round in 0..rounds {
        let file = (round * 5 + seed) % FILES;
        let _alone = shared.writing[file].lock().unwrap();
        let value = shared.next.fetch_add(1, Ordering::SeqCst) + 1;
        let data = value.to_le_bytes().repeat(WORDS);
        let path = directory.join(format!("f{file}"));
        let writer = patiently(|| OpenOptions::new().write(true).open(&path));
        writer.write_all_at(&data, 0).expect("write");
        drop(writer);
        shared.closed[file].store(value, Ordering::SeqCst);
    }
}

fn read_rounds(directory: &Path, shared: &Shared, rounds: usize) {
    for round in 0..rounds {
        let file = round % FILES;
        let path = directory.join(format!("f{file}"));
        let floor = shared.closed[file].load(Ordering::SeqCst);
        let reader = patiently(|| File::open(&path));
        let mut data = vec![0; 8 * WORDS];
        let mut filled = 0;
        while filled < data.len() {
            match reader.read_at(&mut data[filled..], filled as u64) {
                Ok(count) => filled += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{error}"),
            }
        }
        for word in data.chunks_exact(8) {
            let value = u64::from_le_bytes(word.try_into().unwrap());
            assert!(value >= floor, "read {value} after {floor} was closed");
        }
    }
}

#[test]
fn mounts_that_fight_over_files_never_read_what_is_outdated() {
    let Some((_cluster, a, b)) = two("lease-wait=5") else { return };
    let shared = Shared::default();
    for file in 0..FILES {
        fs::write(a.path().join(format!("f{file}")), vec![0; 8 * WORDS]).expect("write");
    }
    std::thread::scope(|scope| {
        for mount in [&a, &b] {
            scope.spawn(|| write_rounds(mount.path(), &shared, 150, 0));
            scope.spawn(|| write_rounds(mount.path(), &shared, 150, 1));
            scope.spawn(|| read_rounds(mount.path(), &shared, 300));
            scope.spawn(|| read_rounds(mount.path(), &shared, 300));
        }
    });
}

#[test]
fn a_name_replaced_elsewhere_is_never_missing() {
    let Some((_cluster, a, b)) = two("") else { return };
    let (new, name, there) = (a.path().join("f.t"), a.path().join("f"), b.path().join("f"));
    fs::write(&name, "0").expect("write");
    let mut seen = 0;
    for round in 1..8_u32 {
        let before = File::open(&there).expect("open what is there");
        fs::write(&new, format!("{round}")).expect("write the new one");
        fs::rename(&new, &name).expect("replace");
        // The name cached here may lead to an older file for a second, never back to one older than that. One that is
        // gone already makes the kernel look again.
        while seen < round {
            let read = fs::read_to_string(&there).expect("a name that always exists");
            let number = read.parse().expect("whole content");
            assert!((seen..=round).contains(&number), "{number} after {seen} in round {round}");
            seen = number;
            fs::metadata(&there).expect("stat");
        }
        let mut old = String::new();
        (&before).read_to_string(&mut old).expect("a file open here stays, whoever replaced it");
        assert_eq!(old, format!("{}", round - 1));
    }
}

#[test]
fn a_file_removed_elsewhere_stays_for_whoever_has_it_open() {
    let Some((_cluster, a, b)) = two("") else { return };
    let (here, there) = (a.path().join("f"), b.path().join("f"));
    fs::write(&here, vec![7; 300_000]).expect("write");
    let reader = File::open(&there).expect("open");
    // Another mount takes the lease, so the one that reads holds nothing when the name goes.
    let writer = OpenOptions::new().write(true).open(&here).expect("open to write");
    writer.write_all_at(&[8], 0).expect("write");
    drop(writer);
    fs::remove_file(&here).expect("remove");
    let mut all = vec![0; 300_000];
    reader.read_exact_at(&mut all, 0).expect("read what has no name any more");
    assert!(all[0] == 8 && all[1..].iter().all(|&byte| byte == 7));
    assert_eq!(reader.metadata().expect("stat").nlink(), 0);
    drop(reader);
    // The name may be believed for a second.
    while let Ok(again) = File::open(&there) {
        drop(again);
        std::thread::yield_now();
    }
    assert_eq!(File::open(&there).expect_err("removed").kind(), ErrorKind::NotFound);
}

#[test]
fn pages_outlive_a_lease_only_until_the_next_open() {
    let Some((_cluster, a, b)) = two("") else { return };
    fs::write(a.path().join("f"), vec![1; 50_000]).expect("write");
    assert!(fs::read(a.path().join("f")).expect("read").iter().all(|&byte| byte == 1));
    // More files than leases may rest: that of `f` goes, while the kernel still has its pages.
    for number in 0..4200 {
        File::create(a.path().join(format!("n{number}"))).expect("create");
    }
    fs::write(b.path().join("f"), vec![2; 50_000]).expect("write there");
    assert!(fs::read(a.path().join("f")).expect("read").iter().all(|&byte| byte == 2));
}

#[test]
fn a_mount_that_reads_begins_to_write_without_closing() {
    let Some((_cluster, a, b)) = two("") else { return };
    let (here, there) = (a.path().join("f"), b.path().join("f"));
    fs::write(&here, vec![1; 200_000]).expect("write");
    // Both have it open for reading, under leases they share, with pages cached.
    let (reader, other) = (File::open(&here).expect("open"), File::open(&there).expect("open"));
    let mut all = vec![0; 200_000];
    for file in [&reader, &other] {
        file.read_exact_at(&mut all, 0).expect("read");
    }
    for value in 2..20 {
        let writer = OpenOptions::new().write(true).open(&here).expect("the lease becomes exclusive");
        writer.write_all_at(&vec![value; 200_000], 0).expect("write");
        reader.read_exact_at(&mut all, 0).expect("read through the older handle");
        assert!(all.iter().all(|&byte| byte == value));
        drop(writer);
        other.read_exact_at(&mut all, 0).expect("read there");
        assert!(all.iter().all(|&byte| byte == value));
    }
}
