//! Front ends that are stopped (SIGSTOP) for longer than their lease lasts, and go on.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::nbd::NbdClient;
use cairn_tests::process::{self, poll};
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// Stops the processes until the metadata servers have ended their sessions.
fn stop_beyond_the_lease(cluster: &Cluster, pids: &[u32], purposes: &[&str]) {
    pids.iter().for_each(|pid| process::signal(*pid, libc::SIGSTOP));
    let begun = process::now();
    poll("the sessions of the stopped processes end", STEP, || {
        let events = cluster.cairn(&["get-event", "-n", "100"]).stdout;
        let ended = |purpose: &&str| events.lines().any(|line| line.contains("ended") && line.contains(*purpose));
        purposes.iter().all(ended).then_some(())
    });
    eprintln!("the sessions ended after {:.1} s", begun.elapsed().as_secs_f64());
}

/// A process that has a file open for writing and writes words when told. Not the test itself: what it starts while the
/// mount is stopped would wait for the mount, to close its copy of the descriptor.
struct Writer {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Writer {
    fn open(path: &Path) -> Self {
        let script = r#"exec 3<>"$0" || exit 1
            while read -r word; do if printf %s "$word" >&3; then echo ok; else echo failed; fi; done"#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        process::die_with_test(&mut command, libc::SIGKILL);
        let mut child = command.spawn().expect("start a shell");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, answers }
    }

    fn writes(&mut self, word: &str) -> bool {
        writeln!(self.child.stdin.as_mut().expect("a pipe"), "{word}").expect("the shell listens");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("the shell answers");
        answer.trim() == "ok"
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn sync(path: &Path) {
    fs::File::open(path).and_then(|file| file.sync_all()).expect("fsync");
}

fn continue_all(pids: &[u32]) {
    pids.iter().for_each(|pid| process::signal(*pid, libc::SIGCONT));
}

fn log_of(cluster: &Cluster, label: &str) -> String {
    fs::read_to_string(cluster.dir().join(format!("log/{label}.log"))).unwrap_or_default()
}

fn wait_for_log(cluster: &Cluster, label: &str, part: &str) {
    poll(&format!("{label} says: {part}"), STEP, || log_of(cluster, label).contains(part).then_some(()));
}

/// What an export holds at a place, read on a connection of its own.
fn read_once(port: u16, export: &str, offset: u64) -> io::Result<Vec<u8>> {
    let mut client = NbdClient::connect(port, export)?;
    let mut bytes = vec![0; BLOCK];
    client.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[test]
fn an_export_and_a_mount_that_were_stopped_go_on_when_nobody_took_over() {
    needs_fuse!();
    let cluster = Cluster::start(LIMIT);
    let processes = cluster.processes();
    let pids = [processes["nbd"], processes["mount"]];
    let port = cluster.nbd_port();
    let mut old = cluster.nbd();
    old.write_at(&[1; BLOCK], 0).expect("write");
    old.flush().expect("flush");
    old.write_at(&[2; BLOCK], BLOCK as u64).expect("write");
    let path = cluster.mount().join("f");
    fs::write(&path, b"closed").expect("write");
    let mut used = Writer::open(&path);
    assert!(used.writes("SYNCED"));
    sync(&path);

    stop_beyond_the_lease(&cluster, &pids, &["nbd demo", "mount "]);
    continue_all(&pids);
    let begun = process::now();

    // What was open hears of it; it hangs no more than it goes on as if nothing had happened.
    poll("the old connection ends", STEP, || old.write_at(&[9; BLOCK], 1 << 20).is_err().then_some(()));
    let found = poll("an NBD client that comes is served", STEP, || read_once(port, "demo", 0).ok());
    assert_eq!(found, [1; BLOCK], "what was flushed is there");
    assert_eq!(read_once(port, "demo", BLOCK as u64).expect("read"), [2; BLOCK], "what was written, too");
    eprintln!("served again after {:.1} s", begun.elapsed().as_secs_f64());
    let mut again = cluster.nbd();
    again.write_at(&[3; BLOCK], 0).expect("write");
    again.flush().expect("flush");
    assert_eq!(read_once(port, "demo", 0).expect("read"), [3; BLOCK]);

    let text = fs::read(&path).expect("a new open works");
    assert_eq!(text, b"SYNCED");
    assert!(!used.writes("late"), "it was used under the lost lease");
    let fresh = OpenOptions::new().write(true).open(&path).expect("open");
    fresh.write_all_at(b"again", 6).expect("write");
    fresh.sync_all().expect("fsync");
    drop((used, fresh));
    assert_eq!(fs::read(&path).expect("read"), b"SYNCEDagain");

    wait_for_log(&cluster, "nbd", "no other client had it in between");
    for label in ["nbd", "mount"] {
        let log = log_of(&cluster, label);
        assert!(log.contains("ended, because this process was stopped") && !log.contains("taken over"), "{log}");
    }
}

#[test]
fn a_stopped_export_and_mount_write_no_more_when_others_took_over() {
    needs_fuse!();
    let mut cluster = Cluster::start(LIMIT);
    let processes = cluster.processes();
    let pids = [processes["nbd"], processes["mount"]];
    let port = cluster.nbd_port();
    let mut old = cluster.nbd();
    old.write_at(&[1; BLOCK], 0).expect("write");
    old.flush().expect("flush");
    let path = cluster.mount().join("f");
    fs::write(&path, b"first").expect("write");
    let mut used = Writer::open(&path);
    assert!(used.writes("FIRST"));
    sync(&path);

    stop_beyond_the_lease(&cluster, &pids, &["nbd demo", "mount "]);
    let other_port = crate::nbd::free_port();
    let listen = format!("127.0.0.1:{other_port}");
    cluster.run_by_hand("second", &["nbd", "serve", "demo", "--listen", &listen]);
    let mut other = poll("the second server has the volume", STEP, || NbdClient::connect(other_port, "demo").ok());
    other.write_at(&[7; BLOCK], 0).expect("write");
    other.flush().expect("flush");
    let elsewhere = crate::mounting::MountPoint(cluster.beside("elsewhere"));
    fs::create_dir(&elsewhere.0).expect("make a mount point");
    let text = elsewhere.0.display().to_string();
    cluster.cairn(&["mount", &text]).must_succeed("mount");
    poll("the second mount has the file", STEP, || fs::write(elsewhere.0.join("f"), b"second").ok());

    continue_all(&pids);
    poll("the old connection ends", STEP, || old.write_at(&[9; BLOCK], 0).is_err().then_some(()));
    assert!(!used.writes("late"));
    wait_for_log(&cluster, "nbd", "it is not exported here");
    let absent = read_once(port, "demo", 0).expect_err("the volume is elsewhere");
    eprintln!("a client of the old server gets: {absent}");
    assert!(!used.writes("late"), "and for good");
    let mut bytes = vec![0; BLOCK];
    other.read_at(&mut bytes, 0).expect("read");
    assert_eq!(bytes, [7; BLOCK], "the old holder wrote nothing");
    assert_eq!(fs::read(elsewhere.0.join("f")).expect("read"), b"second");
    drop(used);
    assert_eq!(fs::read(&path).expect("a new open acquires anew"), b"second");

    // It waits for the volume to be free and serves it again, without anybody's help.
    cluster.stop_by_hand("second");
    let found = poll("the first server serves again", STEP, || read_once(port, "demo", 0).ok());
    assert_eq!(found, [7; BLOCK]);
    wait_for_log(&cluster, "nbd", "another client may have written to it in between");
}
