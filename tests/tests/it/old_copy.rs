//! A chunk server that is started from an older copy of its directory serves nothing.

use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, poll};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status().expect("run cp");
    assert!(status.success(), "copying {} failed", from.display());
}

fn log_of(cluster: &Cluster, label: &str) -> String {
    std::fs::read_to_string(cluster.dir().join("log").join(format!("{label}.log"))).unwrap_or_default()
}

/// Waits until the log of a server says something, after its first `skip` bytes.
fn wait_for_log(cluster: &Cluster, label: &str, skip: usize, words: &str) {
    poll(&format!("{label} says: {words}"), LIMIT, || log_of(cluster, label)[skip..].contains(words).then_some(()));
}

fn state_of(cluster: &Cluster, dir: &Path) -> String {
    let stat = cluster.json(&["stat"]).unwrap_or_default();
    let dir = dir.display().to_string();
    let servers = stat["cs"].as_array().cloned().unwrap_or_default();
    let server = servers.into_iter().find(|cs| cs["repository"].as_str() == Some(dir.as_str()));
    server.map_or_else(String::new, |cs| cs["state"].as_str().unwrap_or_default().to_owned())
}

/// The label of a server that holds what was written: three of four do.
fn holder(cluster: &Cluster) -> String {
    poll("a server tells of the data it holds", LIMIT, || {
        let stat = cluster.json(&["stat"])?;
        let holds = |cs: &&Value| cs["used"].as_u64().is_some_and(|used| used >= 4 << 20);
        let server = stat["cs"].as_array()?.iter().find(holds)?.clone();
        Some(server["repository"].as_str()?.rsplit('/').next()?.to_owned())
    })
}

/// Fills the exported volume with one byte, durably.
fn fill(cluster: &Cluster, byte: u8) {
    let mut nbd = cluster.nbd();
    for at in 0..64 {
        nbd.write_at(&[byte; 64 << 10], at << 20).expect("write");
    }
    nbd.flush().expect("flush");
}

fn assert_filled(cluster: &Cluster, byte: u8) {
    let mut nbd = cluster.nbd();
    for at in 0..64 {
        let mut read = [0; 64 << 10];
        nbd.read_at(&mut read, at << 20).expect("read");
        assert!(read.iter().all(|found| *found == byte), "old data at {at} MiB: {}", read[0]);
    }
}

#[test]
fn a_restored_directory_is_turned_away_and_the_right_one_is_let_in() {
    let mut cluster = Cluster::start_sized(Duration::from_secs(300), "1G");
    fill(&cluster, 1);
    let label = &holder(&cluster);
    let (dir, aside, old) = (cluster.dir().join(label), cluster.beside("right"), cluster.beside("old"));
    // A copy of the running server's directory, as a snapshot of its file system would be.
    let pid = cluster.processes()[label];
    process::signal(pid, libc::SIGSTOP);
    copy(&dir, &old);
    process::signal(pid, libc::SIGCONT);
    fill(&cluster, 2);
    cluster.wait_until_healthy(LIMIT);
    // The copy is of the present start: only what was told to be durable since, at the latest now, gives it away.
    process::signal(pid, libc::SIGTERM);
    poll("the server stops", LIMIT, || (!process::is_alive(pid)).then_some(()));
    let start_copy = |cluster: &mut Cluster| {
        let skip = log_of(cluster, label).len();
        std::fs::rename(&dir, &aside).expect("set the right directory aside");
        copy(&old, &dir);
        cluster.restart(label);
        wait_for_log(cluster, label, skip, "is turned away and serves nothing");
        assert_filled(cluster, 2);
        std::fs::remove_dir_all(&dir).expect("remove the copy");
        std::fs::rename(&aside, &dir).expect("put the right directory back");
    };
    start_copy(&mut cluster);
    let events = cluster.cairn(&["get-event"]).stdout;
    assert!(events.contains("MDS-4004"), "no event: {events}");
    // The right directory goes on; now the copy is from before the last start.
    cluster.restart(label);
    poll("the right directory is let in", LIMIT, || (state_of(&cluster, &dir) == "active").then_some(()));
    cluster.kill(label);
    start_copy(&mut cluster);
    // Killed again and again somewhere in its start, the right directory is let in when it is given the time.
    for words in ["", "listens on", "the chunk store is open", "registered as", ""] {
        let skip = log_of(&cluster, label).len();
        cluster.restart(label);
        wait_for_log(&cluster, label, skip, words);
        cluster.kill(label);
    }
    cluster.restart(label);
    cluster.wait_until_healthy(LIMIT);
    assert_filled(&cluster, 2);
    cluster.stop();
}
