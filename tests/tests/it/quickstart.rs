//! `cairn quickstart`: a command with its status, and the same data at the next start.

use crate::needs_fuse;
use cairn_tests::cluster::{Cluster, scratch};
use cairn_tests::process::{binary, run};
use cairn_tests::tree;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(150);

#[test]
fn a_command_runs_against_the_cluster_and_its_status_is_the_status() {
    let scratch = scratch();
    let dir = scratch.path().join("q");
    let quickstart = |script: &str| {
        let mut command = Command::new(binary());
        command.args(["quickstart", "--cs-size", "1536M", "--dir"]).arg(&dir).args(["--", "sh", "-c", script]);
        run(&mut command, LIMIT)
    };
    let first = quickstart(
        "set -e; cairn stat; if [ -n \"$CAIRN_MOUNT\" ]; then echo kept > $CAIRN_MOUNT/file; fi; \
         cairn volume create disk1 10G; exit 7",
    );
    assert_eq!(first.code, 7, "{}", first.text());
    assert!(first.stdout.contains("healthy"), "{}", first.text());
    eprint!("{}", first.stderr);
    let second = quickstart("[ -z \"$CAIRN_MOUNT\" ] || cat $CAIRN_MOUNT/file; cairn volume list; kill -9 $$");
    assert_eq!(second.code, 128 + 9, "{}", second.text());
    let kept = second.stdout.contains("kept") || !std::path::Path::new("/dev/fuse").exists();
    assert!(kept && second.stdout.contains("disk1"), "{}", second.text());
    eprint!("{}", second.stderr);
    let leftovers = std::fs::read_dir(dir.join("mnt")).expect("the mount point is there").count();
    assert_eq!(leftovers, 0, "nothing is mounted after the end");
}

#[test]
fn a_stopped_cluster_serves_the_same_files_and_blocks_again() {
    needs_fuse!();
    let mut cluster = Cluster::start(Duration::from_secs(240));
    let source = cluster.beside("source");
    tree::make(&source, 1000, 1).expect("make the source tree");
    cluster.tool("cp", &["-a", &source.display().to_string(), &cluster.mount().display().to_string()], LIMIT);
    let mut model = cairn_tests::stamped::Model::new(11);
    model.run_steps(&mut cluster.nbd(), 4096, 300);
    model.flush(&mut cluster.nbd()).expect("flush");
    cluster.stop();
    cluster.start_again();
    let entries = tree::compare(&source, &cluster.mount().join("source"));
    let blocks = model.check_all(&mut cluster.nbd(), false);
    eprintln!("{entries} entries and {blocks} blocks are the same after a stop and a start");
    cluster.stop();
}

#[test]
fn damaged_servers_are_named_and_the_cluster_starts_without_them() {
    let mut cluster = Cluster::start(Duration::from_secs(300));
    let mut model = cairn_tests::stamped::Model::new(13);
    model.run_steps(&mut cluster.nbd(), 4096, 300);
    model.flush(&mut cluster.nbd()).expect("flush");
    cluster.stop();
    let store = |name: &str| cluster.dir().join(name).display().to_string();
    let healthy = cluster.cairn(&["doctor", "cs", &store("cs1"), "--deep"]).must_succeed("doctor of a healthy store");
    assert!(healthy.contains("healthy"), "{healthy}");
    // Both copies of the superblock of one store, and the identity of a metadata server.
    let file = std::fs::File::options().write(true).open(cluster.dir().join("cs2/store")).expect("open the store");
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xee; 2 << 20], 0).expect("damage the store");
    std::fs::write(cluster.dir().join("mds3/mds.json"), "{").expect("damage the identity");
    let damaged = cluster.cairn(&["doctor", "cs", &store("cs2")]);
    assert!(damaged.code == 1 && damaged.stdout.contains("DAMAGE"), "{}", damaged.text());

    cluster.start_again();
    let said = std::fs::read_to_string(cluster.beside("q.log")).expect("quickstart has a log");
    let parts = ["cs2 does not start", "cairn doctor cs", "cairn rm-cs -f", "mds3 does not start", "cairn rm-mds 3"];
    parts.iter().for_each(|part| assert!(said.contains(part), "{part} is missing: {said}"));
    let blocks = model.check_all(&mut cluster.nbd(), false);
    model.run_steps(&mut cluster.nbd(), 4096, 100);
    eprintln!("{blocks} blocks are the same without two servers, and more can be written");
    let stat = cluster.json(&["stat"]).expect("the cluster answers");
    assert_eq!(stat["health"], "degraded", "{stat}");
    cluster.stop();
}

#[test]
fn a_directory_in_use_or_of_something_else_is_refused() {
    let cluster = Cluster::start(Duration::from_secs(150));
    let dir = cluster.dir().display().to_string();
    let words = ["quickstart", "--no-mount", "--dir", &dir, "--", "true"];
    cluster.cairn(&words).must_fail("a second quickstart on one directory", 1, "does another quickstart run on");
    let other = cluster.beside("other");
    std::fs::create_dir(&other).and_then(|()| std::fs::write(other.join("file"), "mine")).expect("make a file");
    let words = ["quickstart", "--no-mount", "--dir", &other.display().to_string(), "--", "true"];
    cluster.cairn(&words).must_fail("quickstart on another directory", 1, "is not empty and holds no quickstart");
    assert_eq!(std::fs::read_to_string(other.join("file")).expect("it is still there"), "mine");
}
