//! `cairn quickstart`: a whole cluster on this machine in seconds, made of the daemons an operator starts by hand.
//!
//! Three metadata servers, four chunk servers (each its own failure domain), a mount and an NBD export of the volume
//! `demo`. With a command after `--` it runs the command against the cluster, stops the cluster and exits with the
//! command's status.

mod children;
mod layout;

use crate::context::{Context, unexpected};
use crate::verbs::nbd::UNIX_PATH_MAX;
use anyhow::{Result, bail};
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

/// Fewer metadata servers than this are no majority, and nothing would serve.
const MDS_MIN: usize = 2;
/// With fewer chunk servers than this every write would wait: the minimum of copies of a new cluster.
const CS_MIN: usize = 2;

/// Options of `quickstart`.
#[derive(Args, Debug)]
pub struct QuickstartArgs {
    /// Where everything is kept; started again with the same directory it serves the same data.
    #[arg(long, default_value = "cairn-quickstart")]
    dir: PathBuf,
    /// Space of each of the four chunk servers, taken from the disk at once, at least 512M; 3G unless given, or a
    /// sixteenth of what is free if that is less.
    #[arg(long, visible_alias = "size", value_name = "SIZE", value_parser = crate::size)]
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
    layout.write_environment(&nbd_uri(layout), !args.no_mount && Path::new("/dev/fuse").exists())?;
    start_servers(layout, context, children, fresh)?;
    wait_until_it_serves(layout, context, children, stop, fresh)?;
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
/// volume. A cluster that served before goes on without servers that do not start, as long as enough are left.
fn wait_until_it_serves(
    layout: &Layout,
    context: &Context,
    children: &mut Children<'_>,
    stop: &children::StopFlag,
    fresh: bool,
) -> Result<()> {
    let begun = now();
    look_after(layout, children, fresh)?;
    context.block_on(async |client| {
        loop {
            look_after(layout, children, fresh)?;
            if stop.is_set() {
                bail!("stopped while starting");
            }
            match client.call(MdsRequest::Stat).await {
                Ok(MdsReply::Stat(stat)) if serves(layout, children, &stat) => break,
                Ok(MdsReply::Stat(stat)) if begun.elapsed() > START_DEADLINE => {
                    let mds = stat.mds.iter().filter(|m| m.voter).count();
                    let cs = stat.cs.iter().filter(|cs| cs.state == CsState::Active).count();
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
        if let Ok(MdsReply::Stat(stat)) = client.call(MdsRequest::Stat).await {
            children.ended().iter().for_each(|ended| eprintln!("{}\n", how_to_mend(layout, &ended.label, &stat)));
        }
        let options = VolumeOptions::default();
        let request = MdsRequest::VolumeCreate { name: DEMO_VOLUME.to_owned(), size: DEMO_SIZE, options };
        match client.call(request).await {
            Ok(_) | Err(MdsError::Exists(_)) => Ok(()),
            Err(error) => Err(anyhow::Error::from(error).context("create the demo volume")),
        }
    })
}

/// Looks whether servers have ended; an error when the cluster cannot do without them.
fn look_after(layout: &Layout, children: &mut Children<'_>, fresh: bool) -> Result<()> {
    for ended in children.notice_ended()? {
        if fresh {
            bail!("{} ended with {}: {}", ended.label, ended.status, ended.last_words);
        }
        eprintln!("{} does not start: {}", ended.label, ended.last_words);
        eprintln!("  all it said: {}", layout.log_file(&ended.label).display());
    }
    let left = |role: &str| children.list().filter(|child| child.label.starts_with(role)).count();
    let (mds, cs) = (left("mds"), left("cs"));
    if mds < MDS_MIN || cs < CS_MIN {
        bail!(
            "{mds} of {MDS_COUNT} metadata and {cs} of {CS_COUNT} chunk servers run, and at least {MDS_MIN} and {CS_MIN} are \
             needed to read and write; mend what the lines above name"
        );
    }
    Ok(())
}

/// True when all that runs serves.
fn serves(layout: &Layout, children: &Children<'_>, stat: &ClusterStat) -> bool {
    let runs = |label: &str| children.list().any(|child| child.label == label);
    let is_active = |n: usize| {
        let port = layout.state.cs_ports[n - 1];
        stat.cs.iter().any(|cs| cs.addr.port() == port && cs.state == CsState::Active)
    };
    let members = stat.mds.len() >= MDS_COUNT || !children.ended().is_empty();
    members && stat.mds.iter().all(|mds| mds.voter) && (1..=CS_COUNT).all(|n| !runs(&format!("cs{n}")) || is_active(n))
}

/// What to do about a server that does not start, in words and commands.
fn how_to_mend(layout: &Layout, label: &str, stat: &ClusterStat) -> String {
    let number = label.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().unwrap_or(1);
    let environment = format!(". {}", layout.environment_file().display());
    if label.starts_with("mds") {
        let (dir, addr) = (layout.mds_dir(number), layout.mds_addr(number));
        let id = stat.mds.iter().find(|mds| mds.addr == addr).map_or("ID".to_owned(), |mds| mds.mds.0.to_string());
        return format!(
            "The cluster runs without {label}; the others have all it had. To make it anew, in another terminal:\n  \
             {environment}\n  cairn rm-mds {id}; rm -r {dir}\n  cairn make-mds -a {addr} -r {dir} && cairn mds run -r {dir}",
            dir = dir.display()
        );
    }
    let (dir, addr) = (layout.cs_dir(number), layout.cs_addr(number));
    let known = stat.cs.iter().find(|cs| cs.addr == addr && cs.state != CsState::Dropped);
    let id = known.map_or("ID".to_owned(), |cs| cs.cs.0.to_string());
    let host = known.map_or("ID".to_owned(), |cs| cs.location.host.to_string());
    let size = layout.state.cs_size >> 20;
    format!(
        "The cluster runs without {label}, degraded: {label}'s copies are made on the other servers after five minutes.\n\
         To look at its disk: cairn doctor cs {dir}\nTo make it anew, in another terminal:\n  {environment}\n  \
         cairn rm-cs -f {id} && rm -r {dir}\n  cairn make-cs -a {addr} -r {dir} --size {size}M --host-id {host} && \
         cairn cs run -r {dir}",
        dir = dir.display()
    )
}

/// Starts NBD server and mount; true when the namespace is mounted.
fn start_front_ends(args: &QuickstartArgs, layout: &Layout, children: &mut Children<'_>) -> Result<bool> {
    let listen = format!("127.0.0.1:{}", layout.state.nbd_port);
    let socket = layout.nbd_socket().display().to_string();
    let mut words = vec!["nbd", "serve", DEMO_VOLUME, "--listen", &listen];
    if socket.len() <= UNIX_PATH_MAX {
        words.extend(["--unix", &socket]);
    } else {
        eprintln!("note: {socket} is too long for a Unix socket, so {DEMO_VOLUME} is served on TCP only");
    }
    children.start_front_end("nbd", &nbd_uri(layout), &words)?;
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
    let place = mount.display().to_string();
    children.start_front_end("mount", &place, &["mount", "--foreground", &place])?;
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
    let status = match command.status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("cairn: run {}: {error}", args.command[0].to_string_lossy());
            // As a shell has it.
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn print_welcome(layout: &Layout, children: &Children<'_>, mounted: bool, took: Duration) {
    let (cluster, dir) = (&layout.state.cluster, layout.dir.display());
    let health = if children.ended().is_empty() { "serves" } else { "serves, degraded," };
    println!("Cluster {cluster} {health} after {:.1} s. It lives in {dir}.\n", took.as_secs_f64());
    println!("{:<7} {:>7}  WHERE", "WHAT", "PID");
    for child in children.list() {
        println!("{:<7} {:>7}  {}", child.label, child.pid, child.place);
    }
    println!("\nType in another terminal, the first line first:");
    println!("  . {}", layout.environment_file().display());
    let mut lines = vec![("cairn stat".to_owned(), "health, space, servers")];
    if mounted {
        lines.push(("cp -r /etc $CAIRN_MOUNT/".to_owned(), "files, three copies each"));
    }
    lines.push(("qemu-img info $CAIRN_NBD".to_owned(), "the demo volume over NBD"));
    lines.push(("cairn volume create disk1 10G".to_owned(), "a volume of your own"));
    lines.push(("cairn bench --rw randwrite --iodepth 32".to_owned(), "how fast it is, beside the raw disk"));
    if let Some(victim) = children.list().find(|child| child.label.starts_with("cs")) {
        lines.push((format!("kill -9 {}", victim.pid), "a chunk server dies; reads and writes go on"));
    }
    let width = lines.iter().map(|(command, _)| command.len()).max().unwrap_or_default();
    lines.iter().for_each(|(command, what)| println!("  {command:width$}  {what}"));
    println!("\nCtrl-C stops everything; the same command starts it again with the same data.");
}
