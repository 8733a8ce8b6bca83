//! The process tree of a quickstart cluster: started, watched, stopped in order.

use super::layout::Layout;
use anyhow::{Context as _, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A daemon that does not stop within this time is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// A front end must serve within this time.
const FRONT_END_DEADLINE: Duration = Duration::from_secs(30);

/// A running daemon.
pub struct Running {
    /// `mds1`, `cs3`, `mount`, `nbd`.
    pub label: String,
    /// Its process id.
    pub pid: u32,
    /// Where it works: a directory or a URI.
    pub place: String,
    child: Child,
    reported: bool,
}

/// A daemon that ended by itself.
pub struct Ended {
    /// As in [`Running`].
    pub label: String,
    /// How it ended.
    pub status: ExitStatus,
    /// The last line of its log.
    pub last_words: String,
}

/// All daemons of the cluster.
pub struct Children<'a> {
    layout: &'a Layout,
    exe: PathBuf,
    running: Vec<Running>,
    ended: Vec<Ended>,
}

/// Set by SIGINT and SIGTERM.
pub struct StopFlag(Arc<AtomicBool>);

static STOP_ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    STOP_ASKED.store(true, Ordering::SeqCst);
}

impl StopFlag {
    /// Catches SIGINT and SIGTERM from now on.
    #[expect(unsafe_code, reason = "signal handlers")]
    pub fn install() -> Result<Self> {
        for signal in [libc::SIGINT, libc::SIGTERM] {
            // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
            let previous = unsafe { libc::signal(signal, on_signal as *const () as libc::sighandler_t) };
            if previous == libc::SIG_ERR {
                bail!("install a signal handler: {}", std::io::Error::last_os_error());
            }
        }
        Ok(Self(Arc::new(AtomicBool::new(false))))
    }

    /// True once somebody asked to stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst) || STOP_ASKED.load(Ordering::SeqCst)
    }
}

/// Waits a moment between two looks at something another process does.
#[expect(clippy::disallowed_methods, reason = "polling other processes")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

#[expect(clippy::disallowed_methods, reason = "deadlines of other processes")]
fn now() -> Instant {
    Instant::now()
}

impl<'a> Children<'a> {
    /// No daemons yet.
    pub fn new(layout: &'a Layout) -> Result<Self> {
        Ok(Self { layout, exe: std::env::current_exe()?, running: Vec::new(), ended: Vec::new() })
    }

    /// The daemons, in the order they were started.
    pub fn list(&self) -> impl Iterator<Item = &Running> {
        self.running.iter()
    }

    /// Starts a server on its repository, as an operator would by hand.
    pub fn start(&mut self, role: &str, number: usize, dir: &Path, words: &[&str]) -> Result<()> {
        let dir = dir.display().to_string();
        let mut words: Vec<&str> = words.to_vec();
        words.extend(["-r", &dir]);
        self.spawn(&format!("{role}{number}"), &dir, &words)
    }

    /// Starts a front end; `place` is where its users find it.
    pub fn start_front_end(&mut self, label: &str, place: &str, words: &[&str]) -> Result<()> {
        self.spawn(label, place, words)
    }

    fn spawn(&mut self, label: &str, place: &str, words: &[&str]) -> Result<()> {
        use std::os::unix::process::CommandExt;
        let log_path = self.layout.log_file(label);
        let log = File::options().create(true).append(true).open(&log_path)?;
        let mut command = Command::new(&self.exe);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.layout.environment(&mut command)?;
        die_with_parent(&mut command);
        let child = command.spawn().with_context(|| format!("start {label}"))?;
        let (label, place) = (label.to_owned(), place.to_owned());
        self.running.push(Running { label, pid: child.id(), place, child, reported: false });
        Ok(())
    }

    /// The daemons that have ended while the cluster started.
    pub fn ended(&self) -> &[Ended] {
        &self.ended
    }

    /// Looks which daemons have ended since the last look and takes them from the list.
    pub fn notice_ended(&mut self) -> Result<&[Ended]> {
        let known = self.ended.len();
        let mut at = 0;
        while at < self.running.len() {
            let Some(status) = self.running[at].child.try_wait()? else {
                at += 1;
                continue;
            };
            let label = self.running.remove(at).label;
            let last_words = self.last_words(&label);
            self.ended.push(Ended { label, status, last_words });
        }
        Ok(&self.ended[known..])
    }

    /// Fails when the daemon started last, a front end, has ended.
    fn fail_if_front_end_ended(&mut self) -> Result<()> {
        let Some(running) = self.running.last_mut() else { return Ok(()) };
        let Some(status) = running.child.try_wait()? else { return Ok(()) };
        let label = running.label.clone();
        bail!("{label} ended with {status}: {}", self.last_words(&label))
    }

    /// The last line of a daemon's log.
    fn last_words(&self, label: &str) -> String {
        let log = std::fs::read_to_string(self.layout.log_file(label)).unwrap_or_default();
        log.lines().last().unwrap_or("it said nothing").to_owned()
    }

    /// Waits until the NBD server accepts connections.
    pub fn wait_for_nbd(&mut self, addr: &str) -> Result<()> {
        let begun = now();
        while std::net::TcpStream::connect(addr).is_err() {
            self.fail_if_front_end_ended()?;
            if begun.elapsed() > FRONT_END_DEADLINE {
                bail!("the NBD server does not answer on {addr}; see {}", self.layout.log_file("nbd").display());
            }
            pause(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until the mount point is a mount.
    pub fn wait_for_mount(&mut self, dir: &Path) -> Result<()> {
        let begun = now();
        while !is_mount_point(dir) {
            self.fail_if_front_end_ended()?;
            if begun.elapsed() > FRONT_END_DEADLINE {
                bail!("{} is not mounted; see {}", dir.display(), self.layout.log_file("mount").display());
            }
            pause(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Leaves a list of process ids for scripts: one `label pid` per line.
    pub fn write_pids(&self) -> Result<()> {
        let lines: String = self.running.iter().map(|r| format!("{} {}\n", r.label, r.pid)).collect();
        std::fs::write(self.layout.dir.join("pids"), lines)?;
        Ok(())
    }

    /// Waits until somebody asks to stop; says so when a daemon ends meanwhile and how to start it again.
    pub fn wait_for_stop(&mut self, stop: &StopFlag) {
        while !stop.is_set() {
            for running in self.running.iter_mut().filter(|running| !running.reported) {
                if let Ok(Some(status)) = running.child.try_wait() {
                    running.reported = true;
                    let role = running.label.trim_end_matches(|c: char| c.is_ascii_digit());
                    println!(
                        "{} (pid {}) ended with {status}; the cluster goes on without it",
                        running.label, running.pid
                    );
                    if matches!(role, "mds" | "cs") {
                        println!("  start it again: cairn {role} run -r {}", running.place);
                    }
                }
            }
            pause(Duration::from_millis(100));
        }
    }

    /// Stops everything: front ends first, then chunk servers, then metadata servers.
    pub fn stop_all(&mut self) -> Result<()> {
        let mut failed = Vec::new();
        for role in ["nbd", "mount", "cs", "mds"] {
            let (mut group, rest): (Vec<Running>, Vec<Running>) =
                std::mem::take(&mut self.running).into_iter().partition(|running| running.label.starts_with(role));
            self.running = rest;
            group.iter().for_each(|running| signal(running.pid, libc::SIGTERM));
            let begun = now();
            for running in &mut group {
                loop {
                    match running.child.try_wait()? {
                        Some(_) => break,
                        None if begun.elapsed() > STOP_DEADLINE => {
                            failed.push(running.label.clone());
                            running.child.kill()?;
                            running.child.wait()?;
                            break;
                        }
                        None => pause(Duration::from_millis(5)),
                    }
                }
            }
        }
        let _ = std::fs::remove_file(self.layout.dir.join("pids"));
        if failed.is_empty() {
            return Ok(());
        }
        bail!("{} did not stop within {} s and were killed", failed.join(", "), STOP_DEADLINE.as_secs())
    }
}

/// True when something is mounted on `dir`: its device is not that of its parent.
fn is_mount_point(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::symlink_metadata(path).map(|meta| meta.dev()).ok();
    let parent = dir.parent().unwrap_or(Path::new("/"));
    device(dir).is_some() && device(dir) != device(parent)
}

/// Takes away what a killed mount left behind: a mount point whose every use fails with ENOTCONN.
///
/// A mount that answers is left alone; mounting over it then fails with its own words.
#[expect(unsafe_code, reason = "umount2(2)")]
pub fn take_away_dead_mount(dir: &Path) -> Result<()> {
    let is_dead = || std::fs::metadata(dir).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN));
    while is_dead() {
        let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes())?;
        // SAFETY: the string ends with a zero byte and outlives the call.
        let by_root = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0;
        // An ordinary user may only do it through the helper that mounted it.
        if !by_root && !Command::new("fusermount3").args(["-u", "-z"]).arg(dir).status()?.success() {
            bail!("a mount that died is still on {}; take it away with `umount -l`", dir.display());
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "kill(2)")]
fn signal(pid: u32, number: libc::c_int) {
    // SAFETY: plain system call; the process is our child and not yet waited for, so the id is not reused.
    unsafe { libc::kill(pid as libc::pid_t, number) };
}

#[expect(unsafe_code, reason = "prctl(2) between fork and exec")]
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
}
