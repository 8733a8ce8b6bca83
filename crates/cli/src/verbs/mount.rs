//! `cairn mount`: the namespace of a cluster as a file system. Also what mount(8) runs for `mount -t fuse.cairn`.

use crate::Cli;
use crate::context::Context;
use crate::exit;
use anyhow::{Context as _, Result, bail};
use cairn_client::{Client, OnNoSpace};
use cairn_fuse::MountOptions;
use cairn_wire::mds::SessionKind;
use clap::{Args, Parser};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Printed by the process in the background once the mount works.
const READY: &str = "mounted";

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
    /// Stays in the foreground.
    #[arg(short = 'f', long)]
    foreground: bool,
}

/// Runs `mount`.
pub fn run(context: &Context, args: &MountArgs) -> Result<()> {
    context.key()?;
    if !args.dir.is_dir() {
        bail!("{} is not a directory; make it first", args.dir.display());
    }
    if args.foreground { serve(context, args) } else { go_to_background() }
}

fn serve(context: &Context, args: &MountArgs) -> Result<()> {
    let mut config = context.client_config(SessionKind::Client, &format!("mount {}", args.dir.display()))?;
    config.on_no_space = if args.fail_on_nospace { OnNoSpace::Fail } else { OnNoSpace::Wait };
    let fsname = format!("cairn://{}", context.name()?);
    let client = Client::spawn(config)?;
    let mut options = MountOptions::new(&args.dir);
    options.read_only = args.read_only;
    options.fail_on_no_space = args.fail_on_nospace;
    options.log_file = args.log_file.clone();
    options.fsname = fsname;
    if let Some(threads) = args.threads {
        options.threads = threads;
    }
    if args.private {
        options.allow_other = false;
    }
    let mounted = cairn_fuse::mount(client, options)?;
    println!("{READY}");
    mounted.wait_or_signal()?;
    Ok(())
}

/// Starts this command again with `--foreground` and waits until its mount works.
fn go_to_background() -> Result<()> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).arg("--foreground");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().context("start the mount in the background")?;
    let stdout = child.stdout.take().context("the child has a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() == READY {
        return Ok(());
    }
    let mut reason = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            reason = line;
        }
    }
    child.wait()?;
    bail!("{}", reason.trim_start_matches("cairn: "))
}

/// When mount(8) runs us as `mount.fuse.cairn cairn://NAME DIR [-o OPTIONS]`: mounts and gives the exit code.
pub fn run_as_mount_helper() -> Option<i32> {
    let arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let own_name = PathBuf::from(arguments.first()?).file_name()?.to_string_lossy().into_owned();
    if !own_name.starts_with("mount.") {
        return None;
    }
    let code = match cairn_fuse::parse_mount_args(&arguments[1..]) {
        Ok(parsed) => mount_from_fstab(&parsed),
        Err(error) => Err(error.into()),
    };
    Some(match code {
        Ok(()) => exit::DONE,
        Err(error) => {
            eprintln!("{own_name}: {error:#}");
            exit::code_of(&error)
        }
    })
}

fn mount_from_fstab(parsed: &cairn_fuse::MountRequest) -> Result<()> {
    let mut words: Vec<std::ffi::OsString> = vec!["cairn".into(), "-c".into(), parsed.cluster.clone().into()];
    words.push("mount".into());
    words.extend(parsed.flags().map(Into::into));
    words.push(parsed.options.mountpoint.clone().into());
    let cli = Cli::try_parse_from(&words)?;
    let crate::Verb::Mount(args) = &cli.verb else { unreachable!("the words say mount") };
    let context = Context::new(&cli);
    context.key()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(&words[1..]).env("CAIRN_CLUSTER", &parsed.cluster);
    if args.foreground {
        return serve(&context, args);
    }
    let status = command.status().context("start the mount")?;
    if !status.success() {
        bail!("mounting {} failed", parsed.options.mountpoint.display());
    }
    Ok(())
}
