//! A full cluster, as programs on a mount see it.

use crate::TestMount;
use crate::world::Cluster;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that writes 64 KiB to a file and tells how it ended.
fn writer(path: &Path) -> Child {
    let target = format!("of={}", path.display());
    let words = ["if=/dev/zero", target.as_str(), "bs=64k", "count=1", "conv=notrunc"];
    Command::new("dd").args(words).stderr(Stdio::null()).spawn().expect("start dd")
}

#[expect(clippy::disallowed_methods, reason = "a test of a real mount waits for a real process")]
fn ends_within(child: &mut Child, limit: Duration) -> Option<bool> {
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if let Some(status) = child.try_wait().expect("wait") {
            return Some(status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

#[test]
fn writes_fail_where_the_mount_says_so() {
    let cluster = Cluster::start(31);
    let Some(mount) = TestMount::new(&cluster, "fail-on-nospace") else { return };
    let mut file = fs::File::create(mount.path().join("f")).expect("create");
    file.write_all(b"there is room").expect("write");
    cluster.set_full(true);
    assert_eq!(file.write_all(b"there is none").expect_err("full").kind(), ErrorKind::StorageFull);
    assert_eq!(fs::read(mount.path().join("f")).expect("read"), b"there is room");
    cluster.set_full(false);
    file.write_all(b" again").expect("write");
    assert_eq!(fs::read(mount.path().join("f")).expect("read"), b"there is room again");
}

#[test]
fn writes_wait_for_room_and_a_kill_ends_the_wait() {
    let cluster = Cluster::start(32);
    let Some(mount) = TestMount::new(&cluster, "") else { return };
    let (kept, given_up) = (mount.path().join("kept"), mount.path().join("given-up"));
    fs::write(&kept, b"old").expect("write");
    fs::write(mount.path().join("other"), b"other").expect("write");
    cluster.set_full(true);
    let (mut patient, mut doomed) = (writer(&kept), writer(&given_up));
    assert_eq!(ends_within(&mut patient, Duration::from_secs(3)), None, "it waits");
    assert_eq!(ends_within(&mut doomed, Duration::ZERO), None, "it waits");
    // Everything but writing goes on, in the same directory too.
    assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 3);
    assert_eq!(fs::read(mount.path().join("other")).expect("read"), b"other");
    fs::create_dir(mount.path().join("d")).expect("mkdir");
    doomed.kill().expect("kill");
    assert_eq!(ends_within(&mut doomed, Duration::from_secs(5)), Some(false), "a kill ends it");
    fs::remove_file(&given_up).expect("remove what it wrote to");
    cluster.set_full(false);
    assert_eq!(ends_within(&mut patient, Duration::from_secs(5)), Some(true), "there is room");
    assert_eq!(fs::metadata(&kept).expect("stat").len(), 64 << 10);
}
