//! `cairn mount`: the namespace of a cluster as a file system. Also what mount(8) runs for `mount -t fuse.cairn`.

use crate::context::Context;
use crate::exit;
use anyhow::{Context as _, Result, bail};
use cairn_client::{Client, OnNoSpace};
use cairn_fuse::MountOptions;
use cairn_wire::mds::SessionKind;
use clap::Args;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Printed by the process in the background once the mount works.
const READY: &str = "mounted";
/// Set for the process in the background: it tells its failure on standard output.
const BACKGROUND: &str = "CAIRN_MOUNT_BACKGROUND";

/// Options of `mount`.
#[derive(Args, Debug)]
pub struct MountArgs {
    /// Where to mount.
    dir: PathBuf,
    /// Fails writes with ENOSPC when the cluster is full; by default they wait for space.
    #[arg(long)]
    fail_on_nospace: bool,
    /// Mounts read-only.
    #[arg(long)]
    read_only: bool,
    /// Where the mount writes its log.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Threads that take requests from the kernel.
    #[arg(long)]
    threads: Option<usize>,
    /// Only the mounting user may look inside.
    #[arg(long)]
    private: bool,
    /// Lets the kernel keep written data; for file systems used by one mount at a time.
    #[arg(long)]
    writeback: bool,
    /// Options as mount(8) takes them, separated by commas; `-o LIST` behind `mount` says the same.
    #[arg(long = "options", value_name = "LIST")]
    options: Vec<String>,
    /// Stays in the foreground.
    #[arg(short = 'f', long)]
    foreground: bool,
}

/// Runs `mount`.
pub fn run(context: &Context, args: &MountArgs) -> Result<()> {
    context.key()?;
    prepare(&args.dir)?;
    let options = options_of(context, args)?;
    if args.foreground { serve(context, &options) } else { go_to_background(std::env::args_os().skip(1)) }
}

/// Checks the mount point. What a mount left there whose process died is taken away: nothing could be reached through
/// it any more.
fn prepare(dir: &std::path::Path) -> Result<()> {
    match std::fs::metadata(dir) {
        Ok(known) if known.is_dir() && is_ours(dir) => {
            bail!("{} is mounted already; use it, or run `umount {}` first", dir.display(), dir.display())
        }
        Ok(known) if known.is_dir() => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
        _ => bail!("{} is not a directory; make it first", dir.display()),
    }
    if !is_ours(dir) {
        bail!("{} is a mount whose process died; run `umount {}` first", dir.display(), dir.display());
    }
    eprintln!("{} was a mount whose process died: it is taken away", dir.display());
    unmount(dir, libc::MNT_DETACH).with_context(|| format!("run `fusermount3 -u {}` first", dir.display()))?;
    prepare(dir)
}

/// True when the topmost mount on `dir` is one of this program.
fn is_ours(dir: &std::path::Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let name = absolute.to_string_lossy().trim_end_matches('/').replace(' ', "\\040");
    let kind = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        (fields.next() == Some(name.as_str())).then(|| fields.next() == Some("fuse.cairn"))
    };
    table.lines().rev().find_map(kind) == Some(true)
}

/// The words of the command line with `-o LIST` behind `mount` as `--options LIST`: everywhere else `-o` is the output
/// format, which `mount` has no use for, and mount(8)'s users expect the list.
pub fn with_mount_options(words: impl Iterator<Item = std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let mut words = words.peekable();
    let mut out: Vec<std::ffi::OsString> = words.next().into_iter().collect();
    while let Some(word) = words.next_if(|word| word.as_encoded_bytes().starts_with(b"-")) {
        // Those before the verb that have their value in the next word.
        let takes_one =
            [&b"-c"[..], b"--cluster", b"--mds-addr", b"-o", b"--output"].contains(&word.as_encoded_bytes());
        out.push(word);
        out.extend(words.next_if(|_| takes_one));
    }
    let is_mount = words.peek().is_some_and(|verb| verb == "mount");
    out.extend(words.map(|word| match word.as_encoded_bytes() {
        b"-o" if is_mount => "--options".into(),
        [b'-', b'o', list @ ..] if is_mount => {
            let list = String::from_utf8_lossy(list.strip_prefix(b"=").unwrap_or(list)).into_owned();
            format!("--options={list}").into()
        }
        _ => word,
    }));
    out
}

fn options_of(context: &Context, args: &MountArgs) -> Result<MountOptions> {
    let mut options = MountOptions::new(context.name()?, &args.dir);
    options.read_only = args.read_only;
    options.fail_on_no_space = args.fail_on_nospace;
    options.log_file = args.log_file.clone();
    options.writeback = args.writeback;
    if let Some(threads) = args.threads {
        options.threads = threads;
    }
    if args.private {
        options.allow_other = false;
    }
    for list in &args.options {
        options.apply(list)?;
    }
    Ok(options)
}

fn serve(context: &Context, options: &MountOptions) -> Result<()> {
    let outcome = serve_until_unmounted(context, options);
    if let (Err(error), true) = (&outcome, std::env::var_os(BACKGROUND).is_some()) {
        println!("{error:#}");
    }
    outcome
}

fn serve_until_unmounted(context: &Context, options: &MountOptions) -> Result<()> {
    let purpose = format!("mount {}", options.mountpoint.display());
    let mut config = context.client_config(SessionKind::Client, &purpose)?;
    // Where writes wait for room, the mount does the waiting.
    config.on_no_space = OnNoSpace::Fail;
    let mounted = cairn_fuse::mount(Client::spawn(config)?, options)?;
    unmount_on_signal(mounted.mountpoint().to_owned())?;
    println!("{READY}");
    mounted.wait();
    Ok(())
}

/// SIGTERM and SIGINT unmount; [`cairn_fuse::Mounted::wait`] then cleans up. A mount that is in use is detached: it
/// disappears for everybody else and ends with its last user.
fn unmount_on_signal(mountpoint: PathBuf) -> Result<()> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let wait = move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let _ = ready.send(());
            loop {
                tokio::select! {
                    biased;
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                if unmount(&mountpoint, 0).is_err() {
                    eprintln!("{} is in use; it ends with its last user", mountpoint.display());
                    let _ = unmount(&mountpoint, libc::MNT_DETACH);
                }
            }
        })
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("start a thread for signals")?;
    is_ready.recv().context("catch signals")
}

/// Takes a mount away; `flags` as umount2(2) takes them.
#[expect(unsafe_code, reason = "umount2(2)")]
fn unmount(mountpoint: &std::path::Path, flags: libc::c_int) -> std::io::Result<()> {
    let path = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(mountpoint.as_os_str()))?;
    // SAFETY: a plain system call on a NUL-terminated path that outlives it.
    match unsafe { libc::umount2(path.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Starts this command again with `--foreground` and waits until its mount works.
fn go_to_background(words: impl Iterator<Item = std::ffi::OsString>) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe()?);
    // Under the same name: the mount helper takes its own kind of arguments.
    command.arg0(std::env::args_os().next().unwrap_or_default());
    command.args(words).arg("--foreground");
    // Lines for the operator go to the log file; a pipe would break once this process has ended.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    command.env(BACKGROUND, "1");
    let mut child = command.spawn().context("start the mount in the background")?;
    let stdout = child.stdout.take().context("the child has a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() == READY {
        return Ok(());
    }
    child.wait()?;
    let reason = line.trim();
    if reason.is_empty() { bail!("the mount ended without a word") } else { bail!("{reason}") }
}

/// When mount(8) runs us as `mount.fuse.cairn cairn://NAME DIR [-o OPTIONS]`: mounts and gives the exit code.
pub fn run_as_mount_helper() -> Option<i32> {
    let arguments: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let own_name = PathBuf::from(arguments.first()?).file_name()?.to_string_lossy().into_owned();
    if !own_name.starts_with("mount.") {
        return None;
    }
    match mount_from_fstab(&arguments[1..]) {
        Ok(()) => Some(exit::DONE),
        Err(error) => {
            eprintln!("{own_name}: {error:#}");
            Some(exit::code_of(&error))
        }
    }
}

fn mount_from_fstab(arguments: &[String]) -> Result<()> {
    let request = cairn_fuse::parse_mount_args(arguments)?;
    let context = Context::of(&request.cluster, &cairn_client::cluster::config_dir());
    context.key()?;
    prepare(&request.options.mountpoint)?;
    if request.foreground || arguments.iter().any(|word| word == "--foreground") {
        return serve(&context, &request.options);
    }
    go_to_background(std::env::args_os().skip(1))
}

#[cfg(test)]
mod tests {
    use super::with_mount_options;

    fn words(line: &str) -> String {
        let words = with_mount_options(line.split(' ').map(std::ffi::OsString::from));
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_list_of_mount_options_is_told_from_an_output_format() {
        assert_eq!(words("cairn -c a mount /m -o ro,log=/l"), "cairn -c a mount /m --options ro,log=/l");
        assert_eq!(words("cairn mount -oro /m"), "cairn mount --options=ro /m");
        assert_eq!(words("cairn -o json mount /m"), "cairn -o json mount /m");
        assert_eq!(words("cairn -o json -c mount stat -o text"), "cairn -o json -c mount stat -o text");
        assert_eq!(words("cairn --cluster=a mount /m -o=ro"), "cairn --cluster=a mount /m --options=ro");
        assert_eq!(words("cairn"), "cairn");
    }
}
