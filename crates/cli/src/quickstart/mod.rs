//! `cairn quickstart`: a whole cluster on this machine in seconds, made of the daemons an operator starts by hand.
//!
//! Three metadata servers, four chunk servers (each its own failure domain), a mount and an NBD export of the volume
//! `demo`. With a command after `--` it runs the command against the cluster, stops the cluster and exits with the
//! command's status.

mod children;
mod layout;

use crate::context::{Context, unexpected};
use anyhow::{Context as _, Result, bail};
use cairn_wire::mds::{ClusterStat, CsState, MdsError, MdsReply, MdsRequest, VolumeOptions};
use children::Children;
use clap::Args;
use layout::Layout;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Metadata servers of a quickstart cluster.
const MDS_COUNT: usize = 3;
/// Chunk servers of a quickstart cluster.
const CS_COUNT: usize = 4;
/// The volume that is exported.
const DEMO_VOLUME: &str = "demo";
/// Its size; it takes space only as it is written.
const DEMO_SIZE: u64 = 4 << 30;
/// Everything must serve within this time.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Options of `quickstart`.
#[derive(Args, Debug)]
pub struct QuickstartArgs {
    /// Where everything is kept; started again with the same directory it serves the same data.
    #[arg(long, default_value = "cairn-quickstart")]
    dir: PathBuf,
    /// Space of each chunk server; only what is written is taken.
    #[arg(long, value_parser = crate::size)]
    cs_size: Option<u64>,
    /// Do not mount the namespace.
    #[arg(long)]
    no_mount: bool,
    /// Runs this command against the cluster, then stops the cluster.
    #[arg(last = true)]
    command: Vec<std::ffi::OsString>,
}

/// Runs `quickstart`; gives the exit code.
pub fn run(args: &QuickstartArgs) -> Result<i32> {
    let begun = now();
    let stop = children::StopFlag::install()?;
    let fresh = !Layout::exists(&args.dir);
    let layout = if fresh { Layout::create(&args.dir, args.cs_size)? } else { Layout::open(&args.dir)? };
    layout.check_ports()?;
    let context = Context::of(&layout.state.cluster, &layout.config_dir());
    let mut children = Children::new(&layout)?;
    let outcome = start_and_serve(args, &layout, &context, &mut children, &stop, fresh, begun);
    let stopped = children.stop_all();
    let code = outcome?;
    stopped?;
    Ok(code)
}

#[expect(clippy::disallowed_methods, reason = "the start-up time is shown to the user")]
fn now() -> Instant {
    Instant::now()
}

fn start_and_serve(
    args: &QuickstartArgs,
    layout: &Layout,
    context: &Context,
    children: &mut Children<'_>,
    stop: &children::StopFlag,
    fresh: bool,
    begun: Instant,
) -> Result<i32> {
    start_servers(layout, context, children, fresh)?;
    wait_until_whole(context, children, stop)?;
    let mounted = start_front_ends(args, layout, children)?;
    children.write_pids()?;
    if args.command.is_empty() {
        print_welcome(layout, children, mounted, begun.elapsed());
        children.wait_for_stop(stop);
        eprintln!("stopping");
        return Ok(0);
    }
    eprintln!("cluster {} is up after {:.1} s", layout.state.cluster, begun.elapsed().as_secs_f64());
    run_command(args, layout, mounted)
}

fn start_servers(layout: &Layout, context: &Context, children: &mut Children<'_>, fresh: bool) -> Result<()> {
    if fresh {
        let key = layout.new_key()?;
        layout.make_first_mds(context, &key)?;
        let first = layout.cluster_id()?;
        children.start("mds", 1, &layout.mds_dir(1), &["mds", "run"])?;
        for n in 1..=CS_COUNT {
            layout.make_cs(n, first)?;
            children.start("cs", n, &layout.cs_dir(n), &["cs", "run"])?;
        }
        for n in 2..=MDS_COUNT {
            layout.join_mds(context, n)?;
            children.start("mds", n, &layout.mds_dir(n), &["mds", "run"])?;
        }
        layout.seal()?;
        return Ok(());
    }
    for n in 1..=MDS_COUNT {
        children.start("mds", n, &layout.mds_dir(n), &["mds", "run"])?;
    }
    for n in 1..=CS_COUNT {
        children.start("cs", n, &layout.cs_dir(n), &["cs", "run"])?;
    }
    Ok(())
}

/// Waits, on one session, until every metadata server votes and every chunk server is active; then makes the demo
/// volume.
fn wait_until_whole(context: &Context, children: &mut Children<'_>, stop: &children::StopFlag) -> Result<()> {
    let begun = now();
    context.block_on(async |client| {
        loop {
            children.fail_if_any_ended()?;
            if stop.is_set() {
                bail!("stopped while starting");
            }
            match client.call(MdsRequest::Stat).await {
                Ok(MdsReply::Stat(stat)) if is_whole(&stat) => break,
                Ok(MdsReply::Stat(stat)) if begun.elapsed() > START_DEADLINE => {
                    let (mds, cs) = (stat.mds.iter().filter(|m| m.voter).count(), active(&stat));
                    bail!(
                        "only {mds} of {MDS_COUNT} metadata and {cs} of {CS_COUNT} chunk servers serve; see the logs"
                    );
                }
                Ok(MdsReply::Stat(_)) => {}
                Ok(other) => return Err(unexpected(&other)),
                Err(error) if begun.elapsed() > START_DEADLINE => return Err(error.into()),
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let options = VolumeOptions::default();
        let request = MdsRequest::VolumeCreate { name: DEMO_VOLUME.to_owned(), size: DEMO_SIZE, options };
        match client.call(request).await {
            Ok(_) | Err(MdsError::Exists(_)) => Ok(()),
            Err(error) => Err(anyhow::Error::from(error).context("create the demo volume")),
        }
    })
}

fn active(stat: &ClusterStat) -> usize {
    stat.cs.iter().filter(|cs| cs.state == CsState::Active).count()
}

fn is_whole(stat: &ClusterStat) -> bool {
    stat.mds.len() >= MDS_COUNT && stat.mds.iter().all(|mds| mds.voter) && active(stat) >= CS_COUNT
}

/// Starts NBD server and mount; true when the namespace is mounted.
fn start_front_ends(args: &QuickstartArgs, layout: &Layout, children: &mut Children<'_>) -> Result<bool> {
    let listen = format!("127.0.0.1:{}", layout.state.nbd_port);
    let socket = layout.nbd_socket();
    let words = ["nbd", "serve", DEMO_VOLUME, "--listen", &listen, "--unix", &socket.display().to_string()];
    children.start_front_end("nbd", &words)?;
    children.wait_for_nbd(&listen)?;
    if args.no_mount {
        return Ok(false);
    }
    if !Path::new("/dev/fuse").exists() {
        eprintln!("note: this machine has no /dev/fuse, so nothing is mounted (modprobe fuse)");
        return Ok(false);
    }
    let mount = layout.mount_dir();
    children::take_away_dead_mount(&mount)?;
    children.start_front_end("mount", &["mount", "--foreground", &mount.display().to_string()])?;
    children.wait_for_mount(&mount)?;
    Ok(true)
}

fn nbd_uri(layout: &Layout) -> String {
    format!("nbd://127.0.0.1:{}/{DEMO_VOLUME}", layout.state.nbd_port)
}

fn run_command(args: &QuickstartArgs, layout: &Layout, mounted: bool) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]);
    layout.environment(&mut command)?;
    command.env("CAIRN_NBD", nbd_uri(layout));
    if mounted {
        command.env("CAIRN_MOUNT", layout.mount_dir());
    }
    let status = command.status().with_context(|| format!("run {}", args.command[0].to_string_lossy()))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn print_welcome(layout: &Layout, children: &Children<'_>, mounted: bool, took: Duration) {
    let cluster = &layout.state.cluster;
    println!("Cluster {cluster} serves after {:.1} s. It lives in {}.\n", took.as_secs_f64(), layout.dir.display());
    println!("{:<7} {:>7}  WHERE", "WHAT", "PID");
    for child in children.list() {
        println!("{:<7} {:>7}  {}", child.label, child.pid, child.place);
    }
    println!("\nType in another terminal:");
    println!("  export CAIRN_CLUSTER={cluster} CAIRN_CONFIG_DIR={}", layout.config_dir().display());
    println!("  cairn stat                                  health, space, servers");
    if mounted {
        println!("  cp -r /etc {}/      files, three copies each", layout.mount_dir().display());
    }
    println!("  qemu-img info {}       the demo volume over NBD", nbd_uri(layout));
    println!("  cairn volume create disk1 10G               a volume of your own");
    println!("  cairn bench --rw randwrite --iodepth 32     how fast it is, beside the raw disk");
    if let Some(victim) = children.list().find(|child| child.label.starts_with("cs")) {
        println!("  kill -9 {}                                a chunk server dies; reads and writes go on", victim.pid);
    }
    println!("\nCtrl-C stops everything; the same command starts it again with the same data.");
}
