//! Processes: running them with a limit, killing them by id, waiting for what they do.

use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The executable under test: `CAIRN_BIN`, else the release build of this workspace.
pub fn binary() -> PathBuf {
    let path = std::env::var_os("CAIRN_BIN").map(PathBuf::from).unwrap_or_else(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        target.join("release/cairn")
    });
    assert!(
        path.is_file(),
        "{} is missing: build it with `cargo build --release -p cairn`, or name an executable in CAIRN_BIN",
        path.display()
    );
    path
}

/// The time, for deadlines and figures only.
#[expect(clippy::disallowed_methods, reason = "deadlines of real processes")]
pub fn now() -> Instant {
    Instant::now()
}

/// Between two looks at another process.
#[expect(clippy::disallowed_methods, reason = "polling other processes")]
pub fn pause() {
    std::thread::sleep(POLL_INTERVAL);
}

/// Waits until `look` gives something; panics when it does not within `limit`.
pub fn poll<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < limit, "within {} s this did not happen: {what}", limit.as_secs());
        pause();
    }
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; 128 plus the signal when it was killed.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Both outputs, for messages.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The standard output, after checking that the program succeeded.
    pub fn must_succeed(self, what: &str) -> String {
        assert_eq!(self.code, 0, "{what} failed with {}:\n{}", self.code, self.text());
        self.stdout
    }

    /// Checks exit code and a part of what was said on standard error.
    pub fn must_fail(&self, what: &str, code: i32, part: &str) {
        assert!(
            self.code == code && self.stderr.contains(part),
            "{what}: wanted exit code {code} and {part:?}, got {} and:\n{}",
            self.code,
            self.text()
        );
    }
}

/// Runs a program to its end; kills it and panics when it takes longer than `limit`.
pub fn run(command: &mut Command, limit: Duration) -> Outcome {
    run_with_input(command, "", limit)
}

/// [`run`] with something on standard input.
pub fn run_with_input(command: &mut Command, input: &str, limit: Duration) -> Outcome {
    use std::os::unix::process::ExitStatusExt;
    // Files instead of pipes: a program that says much can never block on us.
    let mut stdin = tempfile::tempfile().expect("a scratch file");
    stdin.write_all(input.as_bytes()).and_then(|()| stdin.rewind()).expect("fill standard input");
    let mut stdout = tempfile::tempfile().expect("a scratch file");
    let mut stderr = tempfile::tempfile().expect("a scratch file");
    let duplicate = |file: &std::fs::File| Stdio::from(file.try_clone().expect("duplicate a descriptor"));
    command.stdin(Stdio::from(stdin)).stdout(duplicate(&stdout)).stderr(duplicate(&stderr));
    let mut child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let begun = now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            break Some(status);
        }
        if begun.elapsed() > limit {
            // Not waited for: a process that hangs in the kernel must not hang the test, too.
            let _ = child.kill();
            break None;
        }
        pause();
    };
    let mut texts = [String::new(), String::new()];
    for (file, text) in [&mut stdout, &mut stderr].into_iter().zip(&mut texts) {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("read back the output");
        *text = String::from_utf8_lossy(&bytes).into_owned();
    }
    let [stdout, stderr] = texts;
    let Some(status) = status else {
        panic!("{command:?} did not end within {} s:\n{stdout}{stderr}", limit.as_secs());
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Outcome { code, stdout, stderr }
}

/// Sends a signal to a process this test started.
#[expect(unsafe_code, reason = "kill(2)")]
pub fn signal(pid: u32, number: libc::c_int) {
    // SAFETY: plain system call.
    unsafe { libc::kill(pid as libc::pid_t, number) };
}

/// True while the process exists and has not ended. One of its threads may outlive the first in a system call, and its
/// files and sockets with it.
pub fn is_alive(pid: u32) -> bool {
    let ended = |stat: String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']));
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !ended(stat) || threads() > 1)
}

/// The kernel sends the child `number` when the test ends without having stopped it.
#[expect(unsafe_code, reason = "prctl(2) between fork and exec")]
pub fn die_with_test(command: &mut Command, number: libc::c_int) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, number);
            Ok(())
        });
    }
}

/// Gives the calling thread descriptors of its own. A child is born with all of its parent's and closes them when it
/// becomes another program; closing a file of a stopped mount waits for that mount, and the one who would wake it waits
/// for the child.
#[expect(unsafe_code, reason = "unshare(2)")]
pub fn own_descriptors() {
    // SAFETY: plain system call; nothing else uses the copied descriptors by number.
    let outcome = unsafe { libc::unshare(libc::CLONE_FILES) };
    assert_eq!(outcome, 0, "unshare: {}", std::io::Error::last_os_error());
}

/// Takes a mount away even when its server is dead.
#[expect(unsafe_code, reason = "umount2(2)")]
pub fn unmount_lazily(dir: &Path) {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).expect("no zero byte in a path");
    // SAFETY: the string ends with a zero byte and outlives the call.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
}

/// True when something is mounted on `dir`.
pub fn is_mounted(dir: &Path) -> bool {
    let wanted = format!(" {} ", dir.display());
    std::fs::read_to_string("/proc/self/mounts").is_ok_and(|mounts| mounts.contains(&wanted))
}

/// Where a program is, looking also where only root usually looks.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// False, with a word why, when a tool is missing.
pub fn have_tools(names: &[&str]) -> bool {
    let missing: Vec<&str> = names.iter().copied().filter(|name| find_tool(name).is_none()).collect();
    if !missing.is_empty() {
        eprintln!("skipped: {} not installed", missing.join(", "));
    }
    missing.is_empty()
}

/// True when this process is root; some kernel interfaces want it.
#[expect(unsafe_code, reason = "geteuid(2)")]
pub fn is_root() -> bool {
    // SAFETY: cannot fail.
    unsafe { libc::geteuid() == 0 }
}
