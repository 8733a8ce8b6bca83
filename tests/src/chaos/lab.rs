//! A cluster over several hosts, each process in its host's namespace, tended as systemd would.

use super::load::Load;
use crate::cluster::SCRATCH_PREFIX;
use crate::fault_disk::FaultDisk;
use crate::hosts::{Host, Network};
use crate::process::{self, Outcome, poll};
use cairn_sim::stamp::Stamp;
use cairn_stdx::Rng;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The first four carry servers (three of them a metadata server, all a chunk server), the last two clients.
pub const HOSTS: [&str; 6] = ["a", "b", "c", "d", "x", "y"];
/// Hosts with servers.
pub const SERVER_HOSTS: usize = 4;
/// Hosts with a metadata server.
const MDS_HOSTS: usize = 3;
/// Hosts whose disk can fail on command: one with both servers, one with a chunk server.
pub const FAULT_DISK_HOSTS: [usize; 2] = [0, 3];
/// Port of the export on either client host.
pub const NBD_PORT: u16 = 10809;
/// The volume that is exported.
pub const EXPORT: &str = "stamped";

const CS_SIZE: &str = "384M";
const CHUNK_SIZE: &str = "4M";
const PASSWORD: &str = "chaos on real hosts\n";
/// Longest run of one verb, and time for each step of making the cluster. Only a hang takes so long.
const LIMIT: Duration = Duration::from_secs(180);
/// What died by itself is started again after this time.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// A file that names the process of a run, in the directory of the run.
const OWNER: &str = "owner";

/// A process the lab looks after.
struct Process {
    label: String,
    host: usize,
    words: Vec<String>,
    child: Option<Child>,
    wanted: bool,
    ended: Option<Instant>,
    mount: Option<PathBuf>,
    load: Option<Arc<Load>>,
}

/// The hosts and all that runs on them. Dropping it ends everything.
pub struct Lab {
    root: PathBuf,
    /// The hosts.
    pub network: Network,
    disks: BTreeMap<usize, FaultDisk>,
    processes: Vec<Process>,
    begun: Instant,
    /// What happened, with times.
    pub diary: Vec<String>,
    /// What the last removal of a lost server said.
    pub last_refusal: String,
}

impl Lab {
    /// Makes hosts and cluster in `root`; the disks of `failing` hosts can fail on command.
    pub fn new(root: &Path, failing: &[usize]) -> io::Result<Self> {
        unmount_what_dead_runs_left();
        std::fs::write(root.join(OWNER), std::process::id().to_string())?;
        let network = Network::new(&HOSTS)?;
        let mut lab = Self {
            root: root.to_path_buf(),
            network,
            disks: BTreeMap::new(),
            processes: Vec::new(),
            begun: process::now(),
            diary: Vec::new(),
            last_refusal: String::new(),
        };
        for (host, name) in HOSTS.iter().enumerate() {
            std::fs::create_dir_all(root.join(name).join("disk"))?;
            if failing.contains(&host) {
                let disk = FaultDisk::mount(&root.join(name).join("below"), &root.join(name).join("disk"))?;
                lab.disks.insert(host, disk);
            }
        }
        std::fs::create_dir_all(lab.mountpoint())?;
        lab.make_cluster();
        Ok(lab)
    }

    /// Writes down what happens.
    pub fn note(&mut self, text: &str) {
        let line = format!("{:7.2} s  {text}", self.begun.elapsed().as_secs_f64());
        eprintln!("{line}");
        self.diary.push(line);
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        self.network.hosts()
    }

    fn addr(&self, host: usize) -> String {
        self.hosts()[host].addr.clone()
    }

    fn dir(&self, host: usize, role: &str) -> String {
        self.root.join(HOSTS[host]).join("disk").join(role).display().to_string()
    }

    /// Where the namespace is mounted, on the last host.
    pub fn mountpoint(&self) -> PathBuf {
        self.root.join("mnt")
    }

    fn command(&self, host: usize, words: &[&str]) -> std::process::Command {
        let mut command = self.hosts()[host].command(process::binary());
        command.args(words).env("CAIRN_CONFIG_DIR", self.root.join(HOSTS[host]).join("etc"));
        command.env("CAIRN_CLUSTER", "chaos").current_dir(&self.root);
        command
    }

    fn cairn(&self, host: usize, words: &[&str]) -> Outcome {
        process::run_with_input(&mut self.command(host, words), PASSWORD, LIMIT)
    }

    fn done(&self, host: usize, words: &[&str]) -> String {
        self.cairn(host, words).must_succeed(&words.join(" "))
    }

    /// What the cluster says of itself, asked from a host of clients.
    pub fn stat(&self) -> Option<Value> {
        let outcome = self.cairn(SERVER_HOSTS, &["stat", "-o", "json"]);
        (outcome.code == 0).then(|| serde_json::from_str(&outcome.stdout).ok())?
    }

    fn make_cluster(&mut self) {
        for (host, name) in HOSTS.into_iter().enumerate() {
            if host > 0 {
                self.done(host, &["auth-node", "-b", &self.addr(0)]);
            }
            if host < MDS_HOSTS {
                let (addr, dir) = (self.addr(host), self.dir(host, "mds"));
                let words = ["make-mds", "-a", &addr, "-r", &dir, if host == 0 { "-Ip" } else { "-p" }];
                self.done(host, &words);
                self.add(&format!("mds-{name}"), host, &["mds", "run", "-r", &dir]);
                self.wait_for("the metadata server votes", host, |stat| voters(stat) == host + 1);
            }
        }
        for (host, name) in HOSTS.into_iter().enumerate().take(SERVER_HOSTS) {
            let (addr, dir) = (format!("{}:3001", self.addr(host)), self.dir(host, "cs"));
            self.done(host, &["make-cs", "-r", &dir, "-a", &addr, "--size", CS_SIZE]);
            self.add(&format!("cs-{name}"), host, &["cs", "run", "-r", &dir]);
        }
        self.wait_for("the chunk servers are active", 0, |stat| active(stat) == SERVER_HOSTS);
        // Repair and scrub quickly: the defaults are for operators who need minutes.
        self.done(0, &["set-config", "mds.wd.offline_tout=12", "mds.wd.verify_chunks=120"]);
        self.done(0, &["set-attr", "-p", "/", &format!("chunk-size={CHUNK_SIZE}")]);
        let size = super::load::VOLUME_SIZE.to_string();
        self.done(0, &["volume", "create", EXPORT, &size, "--chunk-size", CHUNK_SIZE]);
    }

    fn wait_for(&self, what: &str, host: usize, mut condition: impl FnMut(&Value) -> bool) {
        poll(what, LIMIT, || {
            let outcome = self.cairn(host, &["stat", "-o", "json"]);
            let stat = (outcome.code == 0).then(|| serde_json::from_str(&outcome.stdout).ok())??;
            condition(&stat).then_some(())
        });
    }

    fn add(&mut self, label: &str, host: usize, words: &[&str]) {
        self.processes.push(Process {
            label: label.to_owned(),
            host,
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            child: None,
            wanted: false,
            ended: None,
            mount: None,
            load: None,
        });
        self.start(label);
    }

    /// Adds the front ends of the two loads and waits until they serve.
    pub fn add_front_ends(&mut self, nbd: &Arc<Load>, file: &Arc<Load>) {
        let listen = format!("127.0.0.1:{NBD_PORT}");
        let words = ["nbd", "serve", EXPORT, "--listen", &listen];
        self.add("nbd-x", SERVER_HOSTS, &words);
        let mountpoint = self.mountpoint();
        let place = mountpoint.display().to_string();
        self.add("mount-y", SERVER_HOSTS + 1, &["mount", "--foreground", &place]);
        self.process("mount-y").mount = Some(mountpoint.clone());
        // The other host's export waits until the volume moves there.
        self.add("nbd-y", SERVER_HOSTS + 1, &words);
        self.kill("nbd-y", false);
        for label in ["nbd-x", "nbd-y"] {
            self.process(label).load = Some(Arc::clone(nbd));
        }
        self.process("mount-y").load = Some(Arc::clone(file));
        poll("the namespace is mounted", LIMIT, || process::is_mounted(&mountpoint).then_some(()));
        let made = File::options().write(true).create_new(true).open(mountpoint.join(EXPORT));
        let file = made.expect("make the file on the mount");
        file.set_len(super::load::VOLUME_SIZE).and_then(|()| file.sync_all()).expect("give it its size");
    }

    fn process(&mut self, label: &str) -> &mut Process {
        self.processes.iter_mut().find(|process| process.label == label).expect("the lab knows its processes")
    }

    /// Labels of the processes on a host.
    pub fn labels_on(&self, host: usize) -> Vec<String> {
        self.processes.iter().filter(|process| process.host == host).map(|process| process.label.clone()).collect()
    }

    /// Starts a process that does not run.
    pub fn start(&mut self, label: &str) {
        let log = self.root.join(format!("{label}.log"));
        let log = File::options().create(true).append(true).open(log).expect("open the log");
        let process = self.process(label);
        if process.child.is_some() {
            return;
        }
        let (host, words, mount, load) =
            (process.host, process.words.clone(), process.mount.clone(), process.load.clone());
        while mount.as_ref().is_some_and(|mount| process::is_mounted(mount)) {
            process::unmount_lazily(mount.as_ref().expect("it has a mount"));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = self.command(host, &words);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("duplicate")).stderr(log);
        process::die_with_test(&mut command, libc::SIGKILL);
        // No operation may count for the new front end before the old one is known to be gone.
        if let Some(load) = load {
            load.moved(None);
        }
        let child = command.spawn().expect("start cairn");
        let process = self.process(label);
        process.child = Some(child);
        process.wanted = true;
        process.ended = None;
    }

    /// `kill -9`, and waits for the end; it is started again by [`Lab::tend`] only if that is `wanted`.
    pub fn kill(&mut self, label: &str, wanted: bool) {
        let process = self.process(label);
        process.wanted = wanted;
        if let Some(mut child) = process.child.take() {
            child.kill().and_then(|()| child.wait()).expect("kill a process");
            process.ended = Some(process::now());
        }
    }

    /// Sends a signal to a process if it runs.
    pub fn signal(&mut self, label: &str, number: libc::c_int) {
        if let Some(child) = &self.process(label).child {
            process::signal(child.id(), number);
        }
    }

    /// `kill -9` of everything, without a pause between.
    pub fn kill_everything(&mut self) {
        for process in &mut self.processes {
            if let Some(child) = &mut process.child {
                let _ = child.kill();
            }
        }
        for process in &mut self.processes {
            process.wanted = false;
            if let Some(mut child) = process.child.take() {
                let _ = child.wait();
            }
        }
    }

    /// Starts again what died by itself.
    pub fn tend(&mut self) {
        let mut again = Vec::new();
        let mut ended = Vec::new();
        for process in self.processes.iter_mut().filter(|process| process.wanted) {
            if let Some(child) = &mut process.child
                && let Some(status) = child.try_wait().expect("wait for a child")
            {
                ended.push(format!("{} ended by itself: {status}", process.label));
                process.child = None;
                process.ended = Some(process::now());
            }
            if process.child.is_none() && process.ended.is_none_or(|ended| ended.elapsed() > RESTART_AFTER) {
                again.push(process.label.clone());
            }
        }
        ended.iter().for_each(|text| self.note(text));
        for label in again {
            self.note(&format!("{label} is started again"));
            self.start(&label);
        }
    }

    /// The disk of a host.
    pub fn disk(&self, host: usize) -> Option<&FaultDisk> {
        self.disks.get(&host)
    }

    /// Turns a bit in up to `count` stamped blocks of a chunk server that does not run; gives how many.
    pub fn rot(&mut self, host: usize, count: usize, rng: &mut Rng) -> io::Result<usize> {
        let below = if self.disks.contains_key(&host) { "below" } else { "disk" };
        let path = self.root.join(HOSTS[host]).join(below).join("cs").join("store");
        let store = File::options().read(true).write(true).open(path)?;
        let mut stamped = Vec::new();
        let mut piece = vec![0; 1 << 20];
        for offset in (0..store.metadata()?.len()).step_by(piece.len()) {
            let read = store.read_at(&mut piece, offset)?;
            for (index, block) in piece[..read].chunks_exact(4096).enumerate() {
                if Stamp::is_stamped(block) {
                    stamped.push(offset + index as u64 * 4096);
                }
            }
        }
        rng.shuffle(&mut stamped);
        stamped.truncate(count);
        for offset in &stamped {
            let at = offset + rng.below(4096);
            let mut byte = [0];
            store.read_exact_at(&mut byte, at)?;
            store.write_all_at(&[byte[0] ^ 1 << rng.below(8)], at)?;
        }
        store.sync_all()?;
        Ok(stamped.len())
    }

    /// The disk of a chunk server is gone, with all that was on it.
    pub fn lose_disk(&mut self, host: usize) -> io::Result<()> {
        self.kill(&format!("cs-{}", HOSTS[host]), false);
        std::fs::remove_dir_all(self.dir(host, "cs"))
    }

    /// Tries to remove the lost server and to make a new one in its place, as the guide says; false until it worked.
    pub fn replace_disk(&mut self, host: usize) -> Result<bool, String> {
        let addr = format!("{}:3001", self.addr(host));
        let Some(stat) = self.stat() else { return Ok(false) };
        let lost = stat["cs"].as_array().into_iter().flatten().find(|cs| cs["addr"] == addr.as_str());
        if let Some(id) = lost.map(|cs| cs["id"].to_string()) {
            let outcome = self.cairn(SERVER_HOSTS, &["rm-cs", &id, "-f"]);
            self.last_refusal = outcome.text();
            if outcome.code != 0 {
                return Ok(false);
            }
        }
        let dir = self.dir(host, "cs");
        let outcome = self.cairn(host, &["make-cs", "-r", &dir, "-a", &addr, "--size", CS_SIZE]);
        if outcome.code != 0 {
            return Err(format!("make-cs in place of a lost one: {}", outcome.text()));
        }
        self.start(&format!("cs-{}", HOSTS[host]));
        Ok(true)
    }

    /// True when every server is there and every chunk has all its copies.
    pub fn is_healthy(&self) -> Result<(), String> {
        let Some(stat) = self.stat() else { return Err("the cluster does not answer".to_owned()) };
        let chunks = &stat["chunks"];
        let whole = chunks["total"] == chunks["healthy"];
        if stat["health"] == "healthy" && whole && active(&stat) == SERVER_HOSTS && voters(&stat) == MDS_HOSTS {
            return Ok(());
        }
        Err(format!("{stat:#}"))
    }

    /// The metadata server that leads.
    pub fn leading_mds(&self) -> Option<String> {
        let stat = self.stat()?;
        let leader = stat["mds"].as_array()?.iter().find(|mds| mds["leader"] == true)?;
        let addr = leader["addr"].as_str()?.split(':').next()?;
        let host = self.hosts().iter().find(|host| host.addr == addr)?;
        Some(format!("mds-{}", host.name))
    }

    /// The last events of the cluster, as JSON, a line for each.
    pub fn events(&self) -> String {
        self.cairn(SERVER_HOSTS, &["get-event", "-o", "json"]).stdout
    }
}

/// A run that was killed leaves its mounts, with nobody behind them.
fn unmount_what_dead_runs_left() {
    for line in std::fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines() {
        let Some(mountpoint) = line.split(' ').nth(1).map(Path::new) else { continue };
        // Only directories of tests are looked at: others may be mounts whose server does not answer.
        let is_scratch = |dir: &&Path| {
            let name = dir.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(SCRATCH_PREFIX))
        };
        let Some(root) = mountpoint.ancestors().skip(1).find(is_scratch) else { continue };
        let owner = std::fs::read_to_string(root.join(OWNER)).ok().and_then(|text| text.parse::<u32>().ok());
        if owner.is_some_and(|pid| !process::is_alive(pid)) {
            process::unmount_lazily(mountpoint);
        }
    }
}

fn voters(stat: &Value) -> usize {
    stat["mds"].as_array().map_or(0, |all| all.iter().filter(|mds| mds["voter"] == true).count())
}

fn active(stat: &Value) -> usize {
    stat["cs"].as_array().map_or(0, |all| all.iter().filter(|cs| cs["state"] == "active").count())
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.kill_everything();
        while process::is_mounted(&self.mountpoint()) {
            process::unmount_lazily(&self.mountpoint());
        }
        self.disks.clear();
    }
}
