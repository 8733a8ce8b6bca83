//! `cairn bench`: drives a volume through the client library and, in the same run, measures what the machine could do.
//!
//! Every figure stands beside its baseline, because machines are noisy: the raw disk through io_uring with O_DIRECT and
//! the loopback round trip. `--suite core` runs every line of the performance targets in `docs/performance.md`.

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

pub mod baseline;
pub mod cpu;
pub mod load;
mod recovery;
pub mod report;
mod suite;

use crate::context::Context as Cluster;
use crate::exit::usage;
use anyhow::{Context, Result};
use baseline::RawFile;
use clap::Args;
use cpu::Meter;
use load::{Direction, Shape};
use report::{Figures, print_table};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Roles whose CPU counts as that of the servers.
pub const SERVER_ROLES: [&str; 2] = ["mds", "cs"];

/// Part of a volume that is used.
const SIZE_DEFAULT: u64 = 1 << 30;

/// Options of `cairn bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Volume to drive; its content is overwritten. Without one a volume is made and deleted afterwards.
    #[arg(long)]
    volume: Option<String>,
    /// What to do: randread, randwrite, randrw, read, write, rw.
    #[arg(long, default_value = "randwrite")]
    rw: String,
    /// Share of reads in randrw and rw, in per cent.
    #[arg(long, default_value_t = 70)]
    rwmixread: u8,
    /// Bytes per operation.
    #[arg(long, default_value = "4K", value_parser = crate::size)]
    bs: u64,
    /// Operations in flight per job.
    #[arg(long, default_value_t = 1)]
    iodepth: u32,
    /// Jobs; each drives its own part of the volume from the same client.
    #[arg(long, default_value_t = 1)]
    jobs: u32,
    /// Part of the volume to use, 1G unless given; with `--suite recovery` what the lost chunk server held, 2G unless
    /// given.
    #[arg(long, value_parser = crate::size)]
    size: Option<u64>,
    /// Seconds to run, 5 unless given; with `--suite recovery` how long a chunk server is away, 60 unless given.
    #[arg(long)]
    runtime: Option<u64>,
    /// A flush after every so many writes.
    #[arg(long, default_value_t = 0)]
    fsync: u32,
    /// Runs all lines of a suite instead: `core`, in a quickstart cluster of its own unless CAIRN_CLUSTER is set, or
    /// `recovery`, always in one of its own.
    #[arg(long)]
    suite: Option<String>,
    /// Where the raw baseline makes its file; should be the disk of the stores.
    #[arg(long)]
    raw_dir: Option<PathBuf>,
}

/// The outcome of a plain run.
#[derive(Serialize)]
struct Outcome {
    shape: String,
    cairn: Figures,
    raw: Figures,
    loopback: Figures,
    /// Mean latency divided by that of the raw disk and the loopback together (depth 1) or raw IOPS divided by ours.
    latency_ratio: f64,
    iops_ratio: f64,
}

impl BenchArgs {
    fn shape(&self) -> Result<Shape> {
        let (random, direction) = match self.rw.as_str() {
            "randread" => (true, Direction::Read),
            "randwrite" => (true, Direction::Write),
            "randrw" => (true, Direction::Mixed(self.rwmixread)),
            "read" => (false, Direction::Read),
            "write" => (false, Direction::Write),
            "rw" => (false, Direction::Mixed(self.rwmixread)),
            other => return Err(usage(format!("--rw {other}: use randread, randwrite, randrw, read, write or rw"))),
        };
        if self.bs == 0 || self.bs > 64 << 20 || !self.bs.is_multiple_of(512) {
            return Err(usage(format!("--bs {}: use a multiple of 512 up to 64M", self.bs)));
        }
        if self.iodepth == 0 || self.iodepth > 1024 || self.jobs == 0 || self.jobs > 64 || self.rwmixread > 100 {
            return Err(usage("--iodepth takes 1 to 1024, --jobs 1 to 64, --rwmixread 0 to 100"));
        }
        Ok(Shape {
            direction,
            random,
            block_size: self.bs as usize,
            depth: self.iodepth * self.jobs,
            duration: Duration::from_secs(self.runtime.unwrap_or(5).max(1)),
            fsync_every: self.fsync,
        })
    }
}

/// Directory for the raw baseline: given, that of the quickstart, or the current one.
fn raw_dir(args: &BenchArgs) -> PathBuf {
    let from_quickstart = std::env::var_os("CAIRN_QUICKSTART_DIR").map(PathBuf::from);
    args.raw_dir.clone().or(from_quickstart).unwrap_or_else(|| PathBuf::from("."))
}

/// Runs the benchmark.
pub fn run(cluster: &Cluster, args: &BenchArgs) -> Result<()> {
    if let Some(name) = &args.suite {
        return match name.as_str() {
            "core" => suite::run(cluster, args),
            "recovery" => recovery::run(cluster, args),
            _ => Err(usage(format!("--suite {name}: use core or recovery"))),
        };
    }
    let shape = args.shape()?;
    let size = args.size.unwrap_or(SIZE_DEFAULT);
    let loopback = baseline::loopback_round_trip(Duration::from_secs(1))?;
    let raw = RawFile::create(&raw_dir(args), size.clamp(64 << 20, 1 << 30))?.run(&shape)?;
    let cairn = cluster.block_on(async |client| {
        let made = args.volume.is_none();
        let name = args.volume.clone().unwrap_or_else(|| format!("bench-{}", std::process::id()));
        if made {
            suite::create_volume(&client, &name, size).await?;
        }
        let figures = run_volume(&client, &name, &shape, size).await;
        let deleted = if made { suite::delete_volume(&client, &name).await } else { Ok(()) };
        // What went wrong first is told first.
        figures.and_then(|figures| deleted.map(|()| figures))
    })?;
    let outcome = Outcome {
        shape: format!("{} {} bytes depth {}", args.rw, shape.block_size, shape.depth),
        latency_ratio: cairn.mean_us / (raw.mean_us + loopback.mean_us),
        iops_ratio: cairn.iops / raw.iops,
        cairn,
        raw,
        loopback,
    };
    if cluster.json() {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
        return Ok(());
    }
    println!("{}", outcome.shape);
    println!("  cairn     {}", outcome.cairn);
    println!("  raw disk  {}", outcome.raw);
    println!("  loopback  {}", outcome.loopback);
    println!(
        "  latency {:.2} x (raw + loopback), {:.0} % of raw operations per second",
        outcome.latency_ratio,
        outcome.iops_ratio * 100.0
    );
    Ok(())
}

/// Fills what is to be read, warms up, measures with CPU.
async fn run_volume(client: &cairn_client::LocalClient, name: &str, shape: &Shape, span: u64) -> Result<Figures> {
    let volume = load::open(client, name).await.with_context(|| format!("open volume {name}"))?;
    let span = span.min(cairn_env::block::BlockDevice::size(&volume));
    // Released whatever comes, or nobody could delete it.
    let figures = match load::fill(&volume, span & !((1 << 20) - 1)).await.context("fill the volume") {
        Ok(()) => measure(&volume, shape, span).await,
        Err(error) => Err(error),
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    volume.clone().release_with(move || sender.send(()).unwrap_or(()));
    let _ = receiver.await;
    figures
}

/// One measured run on an open volume, with the CPU of this process and all servers.
async fn measure(volume: &cairn_client::LocalVolume, shape: &Shape, span: u64) -> Result<Figures> {
    let warm = Shape { duration: Duration::from_millis(500), ..shape.clone() };
    load::drive(volume, &warm, span).await?;
    let servers = cpu::servers(&SERVER_ROLES);
    let meter = Meter::start(&servers);
    let mut figures = load::drive(volume, shape, span).await?;
    let (client, servers) = meter.used_us();
    let operations = figures.operations.max(1) as f64;
    (figures.cpu_us, figures.cpu_client_us) = (Some((client + servers) / operations), Some(client / operations));
    Ok(figures)
}

fn print_lines(cluster: &Cluster, lines: &[report::Line]) -> Result<()> {
    if cluster.json() {
        println!("{}", serde_json::to_string_pretty(lines)?);
    } else {
        print_table(lines);
    }
    Ok(())
}
