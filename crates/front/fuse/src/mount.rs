//! Mounting, unmounting, and who keeps a mount busy.

use crate::backend::Runner;
use crate::core::{Core, Notice, install, remove, with_core};
use crate::kernel::Kernel;
use crate::log::Log;
use crate::options::MountOptions;
use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Kibibytes the kernel reads ahead of a sequential reader.
const READ_AHEAD_KIB: u32 = 4096;
/// How long unmounting waits for the last leases to be given back; after that they go with the session.
const CLOSE_WITHIN: Duration = Duration::from_secs(30);
/// A session that ends later than this after its unmounting is kept by somebody.
const TELL_AFTER: Duration = Duration::from_secs(3);

/// Why a file system was not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The log file could not be opened.
    #[error("open log file {path}")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("mount {mountpoint}")]
    Mount {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody uses it.
    #[error("{mountpoint} is in use{}", holders_text(.holders))]
    Busy {
        /// Where.
        mountpoint: PathBuf,
        /// Processes that have files open or stand inside: id and name.
        holders: Vec<(u32, String)>,
    },
    /// The kernel refused to unmount.
    #[error("unmount {mountpoint}")]
    Unmount {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn holders_text(holders: &[(u32, String)]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    let list: Vec<String> = holders.iter().map(|(pid, name)| format!("{name} ({pid})")).collect();
    format!(" by {}", list.join(", "))
}

/// A mounted file system. Dropping it unmounts.
pub struct Mounted {
    id: u64,
    runner: Arc<dyn Runner>,
    session: Option<BackgroundSession>,
    mountpoint: PathBuf,
    log: Log,
}

/// Mounts a file system whose client is reached through `runner`. [`crate::mount`] is this over the real client.
///
/// # Errors
/// [`MountError::Log`], [`MountError::Mount`].
pub fn mount_with(runner: Arc<dyn Runner>, options: &MountOptions) -> Result<Mounted, MountError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let log = Log::open(options.log_file.as_deref())
        .map_err(|source| MountError::Log { path: options.log_file.clone().unwrap_or_default(), source })?;
    let mount_error = |source| MountError::Mount { mountpoint: options.mountpoint.clone(), source };
    let (notices, notices_received) = mpsc::channel();
    let (core_log, settings) = (log.clone(), options.clone());
    runner.start(Box::new(move |backend| install(id, Core::new(backend, core_log, &settings, notices))));
    let kernel = Kernel::new(id, Arc::clone(&runner), log.clone(), options.writeback);
    let started = Session::new(kernel, &options.mountpoint, &session_config(options)).and_then(|session| {
        start_notifier(id, Arc::clone(&runner), session.notifier(), notices_received)?;
        session.spawn()
    });
    let session = match started {
        Ok(session) => session,
        Err(source) => {
            runner.run(Box::new(move || remove(id)));
            return Err(mount_error(source));
        }
    };
    let mountpoint = fs::canonicalize(&options.mountpoint).unwrap_or_else(|_| options.mountpoint.clone());
    if let Err(error) = raise_read_ahead(&mountpoint) {
        log.line(format_args!("read-ahead stays at the kernel's default: {error}"));
    }
    Ok(Mounted { id, runner, session: Some(session), mountpoint, log })
}

fn session_config(options: &MountOptions) -> Config {
    let flag = |on: bool, yes: MountOption, no: MountOption| if on { yes } else { no };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(options.fsname.clone()),
        // Given to the kernel itself, so that the type reads `fuse.cairn` without a helper in between.
        MountOption::CUSTOM("subtype=cairn".to_owned()),
        MountOption::DefaultPermissions,
        flag(options.read_only, MountOption::RO, MountOption::RW),
        flag(options.dev, MountOption::Dev, MountOption::NoDev),
        flag(options.suid, MountOption::Suid, MountOption::NoSuid),
        flag(options.exec, MountOption::Exec, MountOption::NoExec),
        flag(options.sync, MountOption::Sync, MountOption::Async),
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = options.threads > 1;
    config
}

/// Sends invalidations to the kernel from a thread of its own. A notice may wait until reads under way are answered,
/// and those answers come from the client's thread, so that thread must not wait here.
fn start_notifier(
    id: u64,
    runner: Arc<dyn Runner>,
    notifier: Notifier,
    notices: mpsc::Receiver<Notice>,
) -> io::Result<()> {
    let work = move || {
        for Notice { inode, content, token } in notices {
            // An offset below zero: attributes only. Length zero: to the end.
            // An error means that the kernel does not know the inode, or the mount is gone: nothing is cached then.
            let _ = notifier.inval_inode(INodeNo(inode.0), if content { 0 } else { -1 }, 0);
            runner.run(Box::new(move || with_core(id, |core| core.noticed(token))));
        }
    };
    std::thread::Builder::new().name("cairn-fuse-note".to_owned()).spawn(work).map(|_| ())
}

/// The kernel limits read-ahead of a FUSE mount to 128 KiB unless its backing device says otherwise.
fn raise_read_ahead(mountpoint: &Path) -> io::Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let device = device_of(&table, mountpoint).ok_or(io::ErrorKind::NotFound)?;
    fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD_KIB.to_string())
}

/// `major:minor` of the topmost mount on `mountpoint`. Asking the file system itself would wait for the cluster.
fn device_of<'a>(mountinfo: &'a str, mountpoint: &Path) -> Option<&'a str> {
    mountinfo.lines().rev().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let directory = fields.nth(1)?;
        (unescape(directory) == mountpoint.as_os_str().as_bytes()).then_some(device)
    })
}

/// Undoes the octal escapes of the kernel's mount table.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok()));
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

/// True for root, who may mount without a helper and lets others in by default.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    #[expect(unsafe_code, reason = "the standard library does not tell the user id")]
    let user = unsafe { libc::geteuid() };
    user == 0
}

fn unmount_at(mountpoint: &Path) -> io::Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that lives across the call.
    #[expect(unsafe_code, reason = "the standard library does not unmount")]
    let result = unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Processes of which `matches` holds: id and name. Those of other users are seen by root only.
fn processes(matches: impl Fn(&Path) -> bool) -> Vec<(u32, String)> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let name = |pid: u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pid, name.trim().to_owned())
    };
    pids.filter(|pid| matches(&PathBuf::from(format!("/proc/{pid}")))).map(name).collect()
}

/// Processes that keep `mountpoint` busy.
fn holders(mountpoint: &Path) -> Vec<(u32, String)> {
    let inside = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    processes(|process| {
        ["cwd", "root", "exe"].iter().any(|link| inside(process.join(link)))
            || fs::read_dir(process.join("fd")).is_ok_and(|files| files.flatten().any(|file| inside(file.path())))
    })
}

/// Processes in whose mount namespace something of ours is mounted at `mountpoint`.
fn seen_by(mountpoint: &Path) -> Vec<(u32, String)> {
    let ours = |line: &str| {
        line.contains(" - fuse.cairn ")
            && line.split(' ').nth(4).map(unescape).as_deref() == Some(mountpoint.as_os_str().as_bytes())
    };
    processes(|process| fs::read_to_string(process.join("mountinfo")).is_ok_and(|all| all.lines().any(ours)))
}

impl Mounted {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Unmounts: flushes, gives every lease back, ends the client. Refused, with the list of holders, while in use.
    ///
    /// # Errors
    /// [`MountError::Busy`], [`MountError::Unmount`]; the mount then goes on as before.
    pub fn unmount(&mut self) -> Result<(), MountError> {
        if self.session.is_none() {
            return Ok(());
        }
        match unmount_at(&self.mountpoint) {
            Ok(()) => {}
            // Somebody else unmounted it already.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let holders = holders(&self.mountpoint);
                return Err(MountError::Busy { mountpoint: self.mountpoint.clone(), holders });
            }
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                // Not root: the session unmounts through the setuid helper it was mounted with.
                return self.unmount_by_helper();
            }
            Err(source) => return Err(MountError::Unmount { mountpoint: self.mountpoint.clone(), source }),
        }
        let ended = self.tell_of_copies();
        self.finish();
        drop(ended);
        Ok(())
    }

    /// Copies of the mount in other mount namespaces (containers, services with a private view) keep the session alive
    /// after it has gone here. The log says so when that takes a while; dropping the sender says that it has ended.
    fn tell_of_copies(&self) -> mpsc::Sender<()> {
        let (ended, end) = mpsc::channel();
        let (log, mountpoint) = (self.log.clone(), self.mountpoint.clone());
        let tell = move || {
            if end.recv_timeout(TELL_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
                let holders = holders_text(&seen_by(&mountpoint));
                let path = mountpoint.display();
                log.line(format_args!(
                    "{path} is unmounted here, but seen in another mount namespace{holders}: waiting"
                ));
            }
        };
        if let Err(error) = std::thread::Builder::new().name("cairn-fuse-end".to_owned()).spawn(tell) {
            self.log.line(format_args!("nobody will tell of copies of the mount: {error}"));
        }
        ended
    }

    fn unmount_by_helper(&mut self) -> Result<(), MountError> {
        let Some(session) = self.session.take() else { return Ok(()) };
        let mountpoint = self.mountpoint.clone();
        session.umount_and_join().map_err(|source| MountError::Unmount { mountpoint, source })?;
        self.close();
        Ok(())
    }

    /// Waits until somebody unmounts it from outside, then cleans up as [`Mounted::unmount`] does.
    pub fn wait(mut self) {
        self.finish();
    }

    /// Joins the session threads, which end when the kernel has let go, and closes everything behind them.
    fn finish(&mut self) {
        let Some(session) = self.session.take() else { return };
        if let Err(error) = session.join() {
            self.log.line(format_args!("the session of {} ended with: {error}", self.mountpoint.display()));
        }
        self.close();
    }

    fn close(&self) {
        let (id, (closed, all_closed)) = (self.id, mpsc::channel());
        let closing = move || {
            with_core(id, |core| {
                core.close_all(Box::new(move || {
                    let _ = closed.send(());
                }));
            });
        };
        self.runner.run(Box::new(closing));
        if all_closed.recv_timeout(CLOSE_WITHIN).is_err() {
            self.log.line(format_args!("not every lease could be given back in time; the rest ends with the session"));
        }
        self.runner.run(Box::new(move || remove(id)));
        self.runner.shutdown();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            self.log.line(format_args!("{error}; leaving it mounted until its last user is gone"));
            // The session lives on by itself; only this handle to it ends.
            if let Some(session) = self.session.take() {
                std::mem::forget(session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_from_its_top() {
        let table = "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     41 30 0:51 / /mnt/my\\040disk rw - fuse.cairn cairn://a rw\n\
                     42 41 0:52 / /mnt/my\\040disk rw - fuse.cairn cairn://b rw\n";
        assert_eq!(device_of(table, Path::new("/mnt/my disk")), Some("0:52"));
        assert_eq!(device_of(table, Path::new("/mnt")), None);
    }

    #[test]
    fn a_busy_mount_says_who_holds_it() {
        let error = MountError::Busy { mountpoint: "/m".into(), holders: vec![(7, "vim".into()), (9, "sh".into())] };
        assert_eq!(error.to_string(), "/m is in use by vim (7), sh (9)");
    }
}
