//! A cluster that runs out of space: what programs see, and that it comes back by itself when something is deleted.

use crate::mounting::MountPoint;
use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, poll};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(400);
const FILE_SIZE: usize = 8 << 20;

fn content(number: usize) -> Vec<u8> {
    (0..FILE_SIZE).map(|at| ((number * 31 + at / 4096) % 255) as u8 + 1).collect()
}

fn name(number: usize) -> String {
    format!("file{number}")
}

fn write_file(path: &Path, data: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(data)?;
    file.sync_all()
}

fn writer(path: &Path) -> Child {
    let target = format!("of={}", path.display());
    let words = ["if=/dev/zero", target.as_str(), "bs=1M", "count=16", "conv=fsync"];
    Command::new("dd").args(words).stderr(Stdio::null()).spawn().expect("start dd")
}

/// Looks for a while whether a process ends; it must not.
fn still_runs(child: &mut Child) {
    let begun = process::now();
    while begun.elapsed() < Duration::from_secs(4) {
        assert_eq!(child.try_wait().expect("wait"), None, "it waits for room");
        process::pause();
    }
}

#[test]
fn a_full_cluster_refuses_or_waits_and_goes_on_after_a_delete() {
    needs_fuse!();
    let mut cluster = Cluster::start_sized(LIMIT, "512M");
    let failing = cluster.beside("failing");
    fs::create_dir(&failing).expect("make a mount point");
    let _taken_away = MountPoint(failing.clone());
    let words = ["mount", failing.to_str().expect("utf-8"), "--foreground", "--fail-on-nospace"];
    cluster.run_by_hand("failing", &words);
    poll("the second mount works", Duration::from_secs(30), || process::is_mounted(&failing).then_some(()));

    // Files until there is no room: the error comes, nothing hangs, and what was written stays.
    // Servers fill unevenly: only when it comes again and again there is no place left for any set of copies.
    let (mut count, mut refusals) = (0, 0);
    while refusals < 8 {
        match write_file(&failing.join(name(count)), &content(count)) {
            Ok(()) => (count, refusals) = (count + 1, 0),
            Err(refused) => {
                assert_eq!(refused.kind(), ErrorKind::StorageFull, "{refused}");
                fs::remove_file(failing.join(name(count))).expect("remove the file there was no room for");
                refusals += 1;
            }
        }
        assert!(count < 200, "2 GiB of disks hold less");
    }
    eprintln!("{count} files of 8 MiB, three copies each, fill the cluster");
    assert!(count >= 40, "only {count} files");
    for number in 0..count {
        assert!(fs::read(failing.join(name(number))).expect("read") == content(number), "file {number}");
    }

    // The operator sees it.
    let said = cluster.cairn(&["get-event"]).must_succeed("get-event");
    assert!(said.contains("MDS-3002") && said.contains("MDS-3001"), "{said}");
    let stat = cluster.cairn(&["stat"]).must_succeed("stat");
    assert!(stat.contains("chunk servers are"), "{stat}");

    // The default mount waits. A kill ends that, and the file can be removed through the same mount.
    let waiting = cluster.mount().join("waiting");
    let mut doomed = writer(&waiting);
    still_runs(&mut doomed);
    assert!(fs::read(cluster.mount().join(name(0))).expect("reading goes on") == content(0));
    doomed.kill().expect("kill");
    poll("a killed writer ends", Duration::from_secs(10), || doomed.try_wait().expect("wait"));
    fs::remove_file(&waiting).expect("remove what it wrote to");

    // A write that waits ends well as soon as something is deleted.
    let mut patient = writer(&waiting);
    still_runs(&mut patient);
    for number in 0..count / 2 {
        fs::remove_file(failing.join(name(number))).expect("deleting works in a full cluster");
    }
    let status = poll("the waiting writer ends", Duration::from_secs(60), || patient.try_wait().expect("wait"));
    assert!(status.success(), "{status}");
    assert_eq!(fs::metadata(&waiting).expect("stat").len(), 16 << 20);
    assert!(fs::read(&waiting).expect("read").iter().all(|byte| *byte == 0));
    for number in 0..count / 4 {
        write_file(&failing.join(name(number)), &content(number)).expect("there is room again");
    }
    for number in (0..count / 4).chain(count / 2..count) {
        assert!(fs::read(cluster.mount().join(name(number))).expect("read") == content(number), "file {number}");
    }
    process::run(Command::new("umount").arg(&failing), Duration::from_secs(40)).must_succeed("umount");
    cluster.wait_until_healthy(Duration::from_secs(60));
}
