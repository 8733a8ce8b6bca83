//! A quickstart cluster that a test owns: its directory, its processes, its end.

use crate::nbd::NbdClient;
use crate::process::{self, Outcome, poll};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A cluster must serve within this time, also after a crash of everything.
const START_LIMIT: Duration = Duration::from_secs(90);
/// Longest run of one `cairn` verb.
const VERB_LIMIT: Duration = Duration::from_secs(60);
/// Space of each chunk server. It is allocated at once, so it is also what a test takes from the disk, four times.
const CS_SIZE: &str = "1536M";

/// How the directories of tests begin.
pub const SCRATCH_PREFIX: &str = "cairn-test";

/// A cluster in a directory of its own. Dropping it kills what runs and takes the mounts away.
pub struct Cluster {
    dir: PathBuf,
    cs_size: &'static str,
    supervisor: Option<Child>,
    by_hand: Vec<(String, Child)>,
    pids: Arc<Mutex<Vec<u32>>>,
    // Dropping the sender ends the watchdog.
    _watchdog: mpsc::Sender<()>,
    _scratch: tempfile::TempDir,
    /// Time from the start of the command to a cluster that serves.
    pub start_took: Duration,
}

/// A scratch directory that other users may pass through, as PostgreSQL's must.
pub fn scratch() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    builder.prefix(SCRATCH_PREFIX).permissions(std::fs::Permissions::from_mode(0o755));
    match std::env::var_os("CAIRN_TEST_DIR") {
        Some(parent) => builder.tempdir_in(parent),
        None => builder.tempdir(),
    }
    .expect("make a scratch directory")
}

impl Cluster {
    /// Starts a new cluster; after `limit` everything of it is killed, so that whatever waits for it fails.
    pub fn start(limit: Duration) -> Self {
        Self::start_sized(limit, CS_SIZE)
    }

    /// As [`Cluster::start`], with so much space on each chunk server.
    pub fn start_sized(limit: Duration, cs_size: &'static str) -> Self {
        let scratch = scratch();
        let dir = std::fs::canonicalize(scratch.path()).expect("the directory exists").join("q");
        let pids = Arc::new(Mutex::new(Vec::new()));
        let (watchdog, ended) = mpsc::channel();
        let watched = Arc::clone(&pids);
        let watch = move || {
            if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the test took longer than {} s: its cluster is killed", limit.as_secs());
                watched.lock().expect("no panic holds it").iter().for_each(|pid| process::signal(*pid, libc::SIGKILL));
            }
        };
        std::thread::Builder::new().name("watchdog".into()).spawn(watch).expect("start the watchdog");
        let mut cluster = Self {
            dir,
            cs_size,
            supervisor: None,
            by_hand: Vec::new(),
            pids,
            _watchdog: watchdog,
            _scratch: scratch,
            start_took: Duration::ZERO,
        };
        cluster.start_again();
        cluster
    }

    /// Starts the cluster on what it left behind.
    pub fn start_again(&mut self) {
        assert!(self.supervisor.is_none(), "the cluster runs already");
        // A killed cluster leaves its list of processes; only a new one says that this start is done.
        let _ = std::fs::remove_file(self.dir.join("pids"));
        let log_path = self.dir.with_extension("log");
        let log = File::options().create(true).append(true).open(&log_path).expect("open the log");
        let mut command = Command::new(process::binary());
        command.args(["quickstart", "--cs-size", self.cs_size, "--dir"]).arg(&self.dir);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("duplicate")).stderr(log);
        process::die_with_test(&mut command, libc::SIGTERM);
        let begun = process::now();
        let mut child = command.spawn().expect("start cairn");
        self.pids.lock().expect("not poisoned").push(child.id());
        poll("the quickstart cluster serves", START_LIMIT, || {
            if let Some(status) = child.try_wait().expect("wait for cairn") {
                panic!("quickstart ended with {status}: {}", std::fs::read_to_string(&log_path).unwrap_or_default());
            }
            let text = std::fs::read_to_string(self.dir.join("pids")).ok()?;
            text.lines().any(|line| line.starts_with("mount ") || !Path::new("/dev/fuse").exists()).then_some(())
        });
        self.start_took = begun.elapsed();
        eprintln!("the cluster serves after {:.1} s", self.start_took.as_secs_f64());
        self.supervisor = Some(child);
        self.pids.lock().expect("not poisoned").extend(self.processes().values());
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A scratch directory of the test, beside the cluster's.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.with_file_name(name)
    }

    /// Its mount point.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// URI of the exported volume.
    pub fn nbd_uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/demo", self.nbd_port())
    }

    fn state(&self) -> Value {
        let text = std::fs::read_to_string(self.dir.join("quickstart.json")).expect("read quickstart.json");
        serde_json::from_str(&text).expect("quickstart.json is JSON")
    }

    /// Port of the NBD server.
    pub fn nbd_port(&self) -> u16 {
        self.state()["nbd_port"].as_u64().expect("a port") as u16
    }

    /// A connection to the exported volume.
    pub fn nbd(&self) -> NbdClient {
        NbdClient::connect(self.nbd_port(), "demo").expect("connect to the NBD server")
    }

    /// Label and process id of what runs.
    pub fn processes(&self) -> BTreeMap<String, u32> {
        let text = std::fs::read_to_string(self.dir.join("pids")).unwrap_or_default();
        let words = text.lines().filter_map(|line| line.split_once(' '));
        let mut all: BTreeMap<String, u32> =
            words.filter_map(|(label, pid)| Some((label.to_owned(), pid.trim().parse().ok()?))).collect();
        all.extend(self.by_hand.iter().map(|(label, child)| (label.clone(), child.id())));
        all
    }

    /// `kill -9`; returns when the process is gone.
    pub fn kill(&self, label: &str) {
        let pid = *self.processes().get(label).unwrap_or_else(|| panic!("{label} runs"));
        process::signal(pid, libc::SIGKILL);
        poll("a killed process is gone", Duration::from_secs(20), || (!process::is_alive(pid)).then_some(()));
    }

    /// `kill -9` of every process of the cluster, the daemons first, without a pause between them.
    pub fn kill_everything(&mut self) {
        let pids: Vec<u32> = self.processes().into_values().collect();
        pids.iter().for_each(|pid| process::signal(*pid, libc::SIGKILL));
        if let Some(mut supervisor) = self.supervisor.take() {
            supervisor.kill().and_then(|()| supervisor.wait()).expect("kill the supervisor");
        }
        for (_, mut child) in self.by_hand.drain(..) {
            let _ = child.wait();
        }
        poll("all processes are gone", Duration::from_secs(20), || {
            pids.iter().all(|pid| !process::is_alive(*pid)).then_some(())
        });
        self.pids.lock().expect("not poisoned").clear();
    }

    /// Stops the cluster as Ctrl-C does, then what was started by hand, and checks that all of it ended.
    pub fn stop(&mut self) {
        let pids: Vec<u32> = self.processes().into_values().collect();
        let mut supervisor = self.supervisor.take().expect("the cluster runs");
        process::signal(supervisor.id(), libc::SIGTERM);
        let status = poll("quickstart stops", Duration::from_secs(60), || supervisor.try_wait().expect("wait"));
        let log = || std::fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default();
        assert!(status.success(), "quickstart ended with {status}: {}", log());
        // Nothing needs to be told to these in order: all that used them has ended.
        self.by_hand.iter().for_each(|(_, child)| process::signal(child.id(), libc::SIGTERM));
        for (label, mut child) in std::mem::take(&mut self.by_hand) {
            poll(&format!("{label} stops"), Duration::from_secs(30), || child.try_wait().expect("wait"));
        }
        assert!(pids.iter().all(|pid| !process::is_alive(*pid)), "a daemon outlived its cluster");
        self.pids.lock().expect("not poisoned").clear();
    }

    /// The command a user would type, with the cluster's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut dirs = vec![self.dir.join("bin")];
        dirs.extend(std::env::split_paths(&path));
        dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        command
            .env("PATH", std::env::join_paths(dirs).expect("no colon in a path"))
            .env("CAIRN_CLUSTER", "quickstart")
            .env("CAIRN_CONFIG_DIR", self.dir.join("etc"))
            .env("CAIRN_QUICKSTART_DIR", &self.dir);
        command
    }

    /// Runs a verb.
    pub fn cairn(&self, words: &[&str]) -> Outcome {
        process::run(self.command(process::binary()).args(words), VERB_LIMIT)
    }

    /// Runs a verb that prints JSON; none when it fails, as it may while servers are being killed.
    pub fn json(&self, words: &[&str]) -> Option<Value> {
        let outcome = self.cairn(&[words, &["-o", "json"]].concat());
        (outcome.code == 0).then(|| serde_json::from_str(&outcome.stdout).expect("the output is JSON"))
    }

    /// Runs another program against the cluster; it must succeed.
    pub fn tool(&self, program: &str, words: &[&str], limit: Duration) -> String {
        let path = process::find_tool(program).unwrap_or_else(|| program.into());
        process::run(self.command(path).args(words), limit).must_succeed(&format!("{program} {}", words.join(" ")))
    }

    /// Starts a server, a mount or an export by hand, as the operator would after it died.
    pub fn run_by_hand(&mut self, label: &str, words: &[&str]) {
        let log_path = self.dir.join("log").join(format!("{label}.log"));
        let log = File::options().create(true).append(true).open(log_path).expect("open the log");
        let mut command = self.command(process::binary());
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone().expect("duplicate")).stderr(log);
        process::die_with_test(&mut command, libc::SIGKILL);
        let child = command.spawn().expect("start cairn");
        self.pids.lock().expect("not poisoned").push(child.id());
        self.by_hand.retain(|(other, _)| other != label);
        self.by_hand.push((label.to_owned(), child));
    }

    /// Ends what [`Cluster::run_by_hand`] started, as its operator would, and waits for it.
    pub fn stop_by_hand(&mut self, label: &str) {
        let at = self.by_hand.iter().position(|(other, _)| other == label).expect("it was started by hand");
        let (_, mut child) = self.by_hand.remove(at);
        process::signal(child.id(), libc::SIGTERM);
        poll(&format!("{label} stops"), Duration::from_secs(30), || child.try_wait().expect("wait"));
    }

    /// Starts `cs2` or `mds1` again.
    pub fn restart(&mut self, label: &str) {
        let role = label.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
        let repository = self.dir.join(label).display().to_string();
        self.run_by_hand(label, &[&role, "run", "-r", &repository]);
    }

    /// The label of the leading metadata server.
    pub fn leader(&self) -> String {
        poll("a metadata server leads", Duration::from_secs(60), || {
            let stat = self.json(&["stat"])?;
            let leader = stat["mds"].as_array()?.iter().find(|mds| mds["leader"] == true)?.clone();
            let port: u64 = leader["addr"].as_str()?.rsplit_once(':')?.1.parse().ok()?;
            let state = self.state();
            let index = state["mds_ports"].as_array()?.iter().position(|other| other.as_u64() == Some(port))?;
            Some(format!("mds{}", index + 1))
        })
    }

    /// Waits until every server is there and every chunk has all its copies.
    pub fn wait_until_healthy(&self, limit: Duration) {
        let begun = process::now();
        let mut last = Value::Null;
        loop {
            if let Some(stat) = self.json(&["stat"]) {
                let count = |list: &str, good: &dyn Fn(&Value) -> bool| {
                    stat[list].as_array().map_or(0, |all| all.iter().filter(|one| good(one)).count())
                };
                let chunks = &stat["chunks"];
                let whole = chunks["total"] == chunks["healthy"]
                    && count("cs", &|cs| cs["state"] == "active") == 4
                    && count("mds", &|mds| mds["voter"] == true) == 3;
                if stat["health"] == "healthy" && whole {
                    eprintln!("healthy again after {:.1} s", begun.elapsed().as_secs_f64());
                    return;
                }
                last = stat;
            }
            assert!(begun.elapsed() < limit, "not healthy within {} s: {last:#}", limit.as_secs());
            process::pause();
        }
    }

    /// What the daemons wrote, for a failing test: the last lines of each log.
    fn print_logs(&self) {
        let Ok(entries) = std::fs::read_dir(self.dir.join("log")) else { return };
        for entry in entries.flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {}", entry.file_name().to_string_lossy());
            lines[lines.len().saturating_sub(15)..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        let mut pids = std::mem::take(&mut *self.pids.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        pids.extend(self.processes().into_values());
        // The list may name processes that ended long ago; kill only what is of this cluster.
        let marker = self.dir.display().to_string();
        let is_ours = |pid: u32| {
            let place = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let text = [place("cmdline"), place("environ")].concat();
            String::from_utf8_lossy(&text).contains(&marker)
        };
        pids.iter().filter(|pid| is_ours(**pid)).for_each(|pid| process::signal(*pid, libc::SIGKILL));
        if let Some(mut supervisor) = self.supervisor.take() {
            let _ = supervisor.kill().and_then(|()| supervisor.wait());
        }
        for (_, mut child) in self.by_hand.drain(..) {
            let _ = child.kill().and_then(|()| child.wait());
        }
        while process::is_mounted(&self.mount()) {
            process::unmount_lazily(&self.mount());
        }
    }
}
