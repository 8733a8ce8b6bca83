//! The suite `recovery`: how long a lost chunk server is felt, beside what the disk could do.
//!
//! It runs in a quickstart cluster of its own (three metadata, four chunk servers, one disk), kills chunk servers and
//! deletes their directories. The scenes follow one another: a server is lost while nobody writes, and its copies are
//! made on the three others; another one is lost under load, and all its copies are made on one new, empty server; a
//! third one is away for a minute of writes; the same one is killed and started again with 100 GiB of sparse data.

use super::baseline::RawFile;
use super::load::{self, Direction, Shape};
use super::report::{Figures, Goal, Line};
use super::suite::{create_volume, delete_volume, join_all};
use super::{BenchArgs, cpu, print_lines, raw_dir};
use crate::context::Context as Cluster;
use anyhow::{Context, Result, bail};
use cairn_client::{LocalClient, LocalVolume};
use cairn_env::block::BlockOp;
use cairn_env::{Buf, BufMut};
use cairn_stdx::Rng;
use cairn_types::{CHUNK_SIZE_DEFAULT, CsId, HostId, Redundancy};
use cairn_wire::mds::{CsInfo, CsState, MdsReply, MdsRequest, VolumeOptions};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Bytes that a lost server held, unless given.
const HELD_DEFAULT: u64 = 2 << 30;
/// Its redundancy is whole again within this time for each 2 GiB.
const REBUILD_TARGET: f64 = 8.0;
const REBUILD_UNIT: f64 = (2u64 << 30) as f64;
/// Nothing of a scene takes so long unless it is stuck.
const PATIENCE: Duration = Duration::from_secs(600);
/// Load before a fault, for comparison.
const BEFORE: Duration = Duration::from_secs(6);
/// Between a kill and the command that declares the server lost: clients have noticed.
const NOTICED: Duration = Duration::from_secs(2);
/// Seconds a server is away unless given, and the writes of each tenth of a second meanwhile.
const AWAY_DEFAULT: u64 = 60;
const AWAY_WRITES: usize = 100;
/// The sparse volume, and its random writes to each chunk.
const SPARSE: u64 = 100 << 30;
const SPARSE_WRITES: u64 = 16;

/// Chunk servers of the quickstart cluster; new ones get higher numbers.
const QUICKSTART_SERVERS: usize = 4;
const MIB: f64 = 1048576.0;
const VOLUME: &str = "bench-recovery";

/// The loads of the scenes: small random reads and writes, as many virtual machines do; and as many writes as fit.
fn loads() -> [(&'static str, Shape); 2] {
    let load = |direction, depth| Shape { duration: BEFORE, ..Shape::random(direction, depth) };
    [("4k 70/30 depth 16", load(Direction::Mixed(70), 16)), ("4k write depth 32", load(Direction::Write, 32))]
}

/// Runs the suite: outside a quickstart cluster it starts one.
pub fn run(cluster: &Cluster, args: &BenchArgs) -> Result<()> {
    let held = args.size.unwrap_or(HELD_DEFAULT);
    // It destroys servers, so only in a cluster that was made for it.
    let is_ours = |dir: &PathBuf| {
        dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("cairn-bench-"))
    };
    let Some(dir) = std::env::var_os("CAIRN_QUICKSTART_DIR").map(PathBuf::from).filter(is_ours) else {
        let cs_size = format!("{}M", (held * 2).max(3 << 30) >> 20);
        let held = format!("{held}");
        let away = args.runtime.unwrap_or(AWAY_DEFAULT).to_string();
        let words = ["bench", "--suite", "recovery", "--size", &held, "--runtime", &away];
        return super::suite::run_in_quickstart(cluster, args, &["--no-mount", "--cs-size", &cs_size], &words);
    };
    let raw = RawFile::create(&raw_dir(args), 1 << 30)?;
    let shape = |direction| Shape { duration: Duration::from_secs(2), ..Shape::sequential(direction, 1 << 20, 8) };
    let disk = (raw.run(&shape(Direction::Read))?, raw.run(&shape(Direction::Write))?);
    drop(raw);
    let mut lab = Lab::new(dir)?;
    let away = Duration::from_secs(args.runtime.unwrap_or(AWAY_DEFAULT));
    let mut lines = Vec::new();
    let outcome = cluster.block_on(async |client| scenes(&client, &mut lab, (held, away), &disk, &mut lines).await);
    lab.stop();
    outcome?;
    print_lines(cluster, &lines)
}

async fn scenes(
    client: &LocalClient,
    lab: &mut Lab,
    (held, absence): (u64, Duration),
    disk: &(Figures, Figures),
    lines: &mut Vec<Line>,
) -> Result<()> {
    // Three copies of each chunk on four servers.
    let span = (held * 4 / 3).next_multiple_of(CHUNK_SIZE_DEFAULT);
    create_volume(client, VOLUME, span).await?;
    let volume = load::open(client, VOLUME).await?;
    load::fill(&volume, span).await.context("fill the volume")?;
    tokio::task::spawn_blocking(super::suite::wait_until_settled).await?;
    lost_while_idle(client, lab, disk, lines).await?;
    for (number, (name, shape)) in loads().into_iter().enumerate() {
        lost_under_load(client, lab, (&volume, span), (QUICKSTART_SERVERS + 1 + number, name, shape), disk, lines)
            .await?;
    }
    away(client, lab, &volume, span, absence, lines).await?;
    release(volume).await;
    restarted(client, lab, lines).await?;
    memory(client, lab, lines).await?;
    delete_volume(client, VOLUME).await
}

async fn release(volume: LocalVolume) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    volume.release_with(move || sender.send(()).unwrap_or(()));
    let _ = receiver.await;
}

fn rebuild_line(name: &str, took: Duration, held: u64, disk: &(Figures, Figures), note: &str) -> Line {
    let target = REBUILD_TARGET * held as f64 / REBUILD_UNIT;
    let mib = held as f64 / MIB;
    let note = format!(
        "{mib:.0} MiB, {:.0} MiB/s; raw disk reads {:.0}, writes {:.0} MiB/s{note}",
        mib / took.as_secs_f64(),
        disk.0.bytes_per_second / MIB,
        disk.1.bytes_per_second / MIB
    );
    eprintln!("{name}: {:.2} s, {note}", took.as_secs_f64());
    Line::new(name, took.as_secs_f64(), "s", Goal::AtMost, target, note)
}

/// A server dies with its directory while nobody writes; the three others take its copies.
async fn lost_while_idle(
    client: &LocalClient,
    lab: &mut Lab,
    disk: &(Figures, Figures),
    lines: &mut Vec<Line>,
) -> Result<()> {
    wait_until_whole(client).await?;
    let victim =
        lab.active(client).await?.into_iter().max_by_key(|info| info.stats.used).context("servers are there")?;
    lab.destroy(&victim)?;
    wait_until_silent(client, lab, &victim).await?;
    let before = lab.cpu_us();
    let begun = now();
    declare_lost(client, victim.cs).await?;
    wait_until_whole(client).await?;
    let took = begun.elapsed();
    let cpu = (lab.cpu_us() - before) / (victim.stats.used as f64 / MIB);
    let note = format!("; on three servers, {cpu:.0} us of CPU per MiB over all servers");
    lines.push(rebuild_line("lost server, idle: whole", took, victim.stats.used, disk, &note));
    Ok(())
}

/// A server dies with its directory under load; a new, empty one takes all its copies.
async fn lost_under_load(
    client: &LocalClient,
    lab: &mut Lab,
    (volume, span): (&LocalVolume, u64),
    (new, load, shape): (usize, &str, Shape),
    disk: &(Figures, Figures),
    lines: &mut Vec<Line>,
) -> Result<()> {
    let old = lab.active(client).await?;
    let victim = old.iter().max_by_key(|info| info.stats.used).context("servers are there")?.clone();
    lab.make_server(new)?;
    lab.start(new)?;
    wait_until("a new server is there", async || Ok(lab.active(client).await?.len() == old.len() + 1)).await?;
    let calm = load::drive(volume, &shape, span).await?;
    eprintln!("load without a rebuild: {calm}");
    lab.destroy(&victim)?;
    let short = Shape { duration: NOTICED, ..shape.clone() };
    let (silent, driven) = tokio::join!(wait_until_silent(client, lab, &victim), load::drive(volume, &short, span));
    silent?;
    driven?;
    let over = Rc::new(Cell::new(false));
    let rebuilt = async {
        let begun = now();
        declare_lost(client, victim.cs).await?;
        wait_until_whole(client).await?;
        over.set(true);
        anyhow::Ok(begun.elapsed())
    };
    let endless = Shape { duration: PATIENCE, ..shape.clone() };
    let (took, during) = tokio::join!(rebuilt, load::drive_until(volume, &endless, span, &over));
    let (took, during) = (took?, during?);
    eprintln!("load during the rebuild:  {during}");
    let note = format!("; on one new server, {:.0} op/s meanwhile, {:.0} before", during.iops, calm.iops);
    let name = format!("lost server, {load}: whole");
    lines.push(rebuild_line(&name, took, victim.stats.used, disk, &note));
    let (name, ratio) = (format!("lost server, {load}: p99"), during.p99_us / calm.p99_us);
    let note = format!("{:.0} us against {:.0} us without a rebuild", during.p99_us, calm.p99_us);
    lines.push(Line::new(&name, ratio, "x", Goal::AtMost, 3.0, note));
    Ok(())
}

/// Random writes at a moderate rate; gives the offsets.
async fn paced_writes(volume: &LocalVolume, span: u64, rng: &mut Rng, duration: Duration) -> Result<BTreeSet<u64>> {
    let (mut changed, data, begun) = (BTreeSet::new(), noise(4096), now());
    while begun.elapsed() < duration {
        let tick = now();
        let offsets: Vec<u64> = (0..AWAY_WRITES).map(|_| rng.below(span / 4096) * 4096).collect();
        changed.extend(&offsets);
        let write = |offset: &u64| volume.run(BlockOp::Write { offset: *offset, data: data.clone(), fua: false });
        for outcome in join_all(offsets.iter().map(write)).await {
            outcome.context("a write while a server is away")?;
        }
        tokio::time::sleep(Duration::from_millis(100).saturating_sub(tick.elapsed())).await;
    }
    Ok(changed)
}

/// A server is away for a minute in which some of its blocks change.
async fn away(
    client: &LocalClient,
    lab: &mut Lab,
    volume: &LocalVolume,
    span: u64,
    absence: Duration,
    lines: &mut Vec<Line>,
) -> Result<()> {
    let victim = lab.active(client).await?.first().context("servers are there")?.clone();
    let number = lab.number(&victim)?;
    let mut rng = Rng::new(41);
    // What it has unsettled when it dies is copied besides.
    paced_writes(volume, span, &mut rng, BEFORE).await?;
    lab.kill(number)?;
    let changed = paced_writes(volume, span, &mut rng, absence).await?;
    volume.run(BlockOp::Flush).await?;
    // Heartbeats come once a second.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let read = |infos: &[CsInfo]| infos.iter().map(|info| info.stats.read_bytes).sum::<u64>();
    let before = read(&lab.active(client).await?);
    let servers = lab.active(client).await?.len();
    lab.start(number)?;
    let begun = now();
    wait_until("the server is back", async || Ok(lab.active(client).await?.len() == servers + 1)).await?;
    let back = begun.elapsed();
    wait_until_whole(client).await?;
    let took = begun.elapsed();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let others: Vec<CsInfo> = lab.active(client).await?.into_iter().filter(|info| info.cs != victim.cs).collect();
    let (moved, changed) = (read(&others) - before, changed.len() as u64 * 4096);
    let note = format!(
        "{:.1} MiB moved, {:.1} MiB changed of {:.0} MiB held; whole {:.1} s after its start, known to be back after {:.1} s",
        moved as f64 / MIB,
        changed as f64 / MIB,
        victim.stats.used as f64 / MIB,
        took.as_secs_f64(),
        back.as_secs_f64()
    );
    eprintln!("away: {note}");
    let name = format!("away for {} s: bytes moved / changed", absence.as_secs());
    lines.push(Line::new(&name, moved as f64 / changed as f64, "x", Goal::AtMost, 1.2, note));
    Ok(())
}

/// A server with 100 GiB of sparse data is killed right after writes, and started again.
async fn restarted(client: &LocalClient, lab: &mut Lab, lines: &mut Vec<Line>) -> Result<()> {
    const SPARSE_VOLUME: &str = "bench-sparse";
    create_volume(client, SPARSE_VOLUME, SPARSE).await?;
    let volume = load::open(client, SPARSE_VOLUME).await?;
    let (mut rng, data) = (Rng::new(43), noise(4096));
    let chunk_count = SPARSE / CHUNK_SIZE_DEFAULT;
    for _ in 0..SPARSE_WRITES {
        for first in (0..chunk_count).step_by(64) {
            let offset = |chunk| chunk * CHUNK_SIZE_DEFAULT + rng.below(CHUNK_SIZE_DEFAULT / 4096) * 4096;
            let offsets: Vec<u64> = (first..(first + 64).min(chunk_count)).map(offset).collect();
            let write = |offset: &u64| volume.run(BlockOp::Write { offset: *offset, data: data.clone(), fua: false });
            for outcome in join_all(offsets.iter().map(write)).await {
                outcome.context("a write to the sparse volume")?;
            }
        }
    }
    volume.run(BlockOp::Flush).await?;
    // A volume with one copy is answered by its server or not at all.
    let mut victim = None;
    let name = |turn: u32| format!("bench-single{turn}");
    for turn in 0.. {
        let redundancy = Some(Redundancy::new(1, 1)?);
        let options = VolumeOptions { redundancy, ..VolumeOptions::default() };
        client.call(MdsRequest::VolumeCreate { name: name(turn), size: CHUNK_SIZE_DEFAULT, options }).await?;
        let single = load::open(client, &name(turn)).await?;
        single.run(BlockOp::Write { offset: 0, data: data.clone(), fua: true }).await?;
        let request = MdsRequest::ChunkMap { volume: single.id(), index: 0, limit: 1 };
        let MdsReply::Chunks(chunks) = client.call(request).await? else { bail!("unexpected answer to ChunkMap") };
        let cs = chunks.first().and_then(|chunk| chunk.replicas.first()).context("the chunk has a copy")?.cs;
        let infos = lab.active(client).await?;
        let info = infos.iter().find(|info| info.cs == cs).context("its server is there")?;
        // The sparse data are on all servers but one, if there are four.
        if info.stats.chunks > chunk_count / 2 {
            victim = Some((single, info.clone(), turn));
            break;
        }
        release(single).await;
    }
    let (single, info, last) = victim.context("a server is there")?;
    let number = lab.number(&info)?;
    for (how, planned) in [("killed", false), ("stopped", true)] {
        volume.run(BlockOp::Write { offset: rng.below(SPARSE / 4096) * 4096, data: data.clone(), fua: false }).await?;
        if planned {
            lab.terminate(number)?
        } else {
            lab.kill(number)?
        }
        // The client has noticed, and tries again by itself.
        let read = async { single.run(BlockOp::Read { offset: 0, len: 4096 }).await };
        let restart = async {
            tokio::time::sleep(NOTICED).await;
            lab.start(number)?;
            anyhow::Ok(now())
        };
        let (answered, started) = tokio::join!(async { (read.await, now()) }, restart);
        answered.0.context("the read that waited for the server")?;
        let took = answered.1 - started?;
        let stats = info.stats;
        let note = format!(
            "first read answered; {} chunks, {:.0} MiB in them, {}",
            stats.chunks,
            stats.used as f64 / MIB,
            lab.last_word(number, "the chunk store is open")
        );
        eprintln!("{how}: {:.2} s, {note}", took.as_secs_f64());
        let name = format!("100 GiB sparse, {how}: serves again");
        lines.push(Line::new(&name, took.as_secs_f64(), "s", Goal::AtMost, 3.0, note));
        let begun = now();
        wait_until_whole(client).await?;
        eprintln!("all copies are current {:.2} s later", begun.elapsed().as_secs_f64());
    }
    release(single).await;
    release(volume).await;
    for turn in 0..=last {
        delete_volume(client, &name(turn)).await?;
    }
    delete_volume(client, SPARSE_VOLUME).await
}

/// Memory of the chunk servers with all of that.
async fn memory(client: &LocalClient, lab: &Lab, lines: &mut Vec<Line>) -> Result<()> {
    let mut worst: Option<Line> = None;
    for info in lab.active(client).await? {
        let rss = cpu::rss_bytes(lab.pid(lab.number(&info)?)) as f64 / MIB;
        let stored = info.stats.used as f64 / MIB;
        let note = format!("{:.0} MiB in {} chunks", stored, info.stats.chunks);
        let line = Line::new("memory of a chunk server", rss, "MiB", Goal::AtMost, 64.0 + stored / 1024.0, note);
        if worst.as_ref().is_none_or(|other| line.ratio > other.ratio) {
            worst = Some(line);
        }
    }
    lines.extend(worst);
    Ok(())
}

fn noise(len: usize) -> Buf {
    let mut data = BufMut::zeroed(len);
    Rng::new(47).fill(&mut data);
    data.freeze()
}

fn now() -> Instant {
    Instant::now()
}

async fn declare_lost(client: &LocalClient, cs: CsId) -> Result<()> {
    client.call(MdsRequest::CsRemove { cs, force: true, cancel: false }).await.context("declare the server lost")?;
    Ok(())
}

async fn wait_until(what: &str, mut is_so: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let begun = now();
    while !is_so().await? {
        if begun.elapsed() > PATIENCE {
            bail!("waited {} s until {what}", PATIENCE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Waits until the metadata servers miss a server.
async fn wait_until_silent(client: &LocalClient, lab: &Lab, info: &CsInfo) -> Result<()> {
    let is_missed = async || Ok(lab.active(client).await?.iter().all(|other| other.cs != info.cs));
    wait_until("the lost server is missed", is_missed).await
}

/// Waits until every chunk has all its copies.
async fn wait_until_whole(client: &LocalClient) -> Result<()> {
    let is_whole = async || {
        let MdsReply::Stat(stat) = client.call(MdsRequest::Stat).await? else { bail!("unexpected answer to Stat") };
        let chunks = stat.chunks;
        Ok(chunks.total == chunks.healthy + chunks.overcommitted)
    };
    wait_until("all chunks are whole", is_whole).await
}

/// The chunk servers of the quickstart cluster and those this suite makes.
struct Lab {
    dir: PathBuf,
    exe: PathBuf,
    /// Number in the directory's name, process.
    pids: Vec<(usize, u32)>,
    own: Vec<Child>,
}

impl Lab {
    fn new(dir: PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(dir.join("pids")).context("read the processes of the quickstart cluster")?;
        let words = text.lines().filter_map(|line| line.strip_prefix("cs")?.split_once(' '));
        let pids = words.filter_map(|(number, pid)| Some((number.parse().ok()?, pid.parse().ok()?))).collect();
        Ok(Self { dir, exe: std::env::current_exe()?, pids, own: Vec::new() })
    }

    fn repository(&self, number: usize) -> PathBuf {
        self.dir.join(format!("cs{number}"))
    }

    fn log(&self, number: usize) -> PathBuf {
        self.dir.join("log").join(format!("cs{number}.log"))
    }

    /// The last line of a server's log with these words in it.
    fn last_word(&self, number: usize, words: &str) -> String {
        let log = std::fs::read_to_string(self.log(number)).unwrap_or_default();
        let line = log.lines().rfind(|line| line.contains(words)).unwrap_or_default();
        line[line.find(words).unwrap_or_default()..].to_owned()
    }

    async fn active(&self, client: &LocalClient) -> Result<Vec<CsInfo>> {
        let MdsReply::Stat(stat) = client.call(MdsRequest::Stat).await? else { bail!("unexpected answer to Stat") };
        Ok(stat.cs.into_iter().filter(|info| info.state == CsState::Active).collect())
    }

    fn number(&self, info: &CsInfo) -> Result<usize> {
        let name = Path::new(&info.repository).file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix("cs")?.parse().ok());
        number.with_context(|| format!("{} is no repository of a quickstart cluster", info.repository))
    }

    fn pid(&self, number: usize) -> u32 {
        self.pids.iter().find(|(other, _)| *other == number).map_or(0, |(_, pid)| *pid)
    }

    fn cpu_us(&self) -> f64 {
        cpu::servers(&super::SERVER_ROLES).iter().map(|server| cpu::cpu_us(server.pid)).sum()
    }

    /// Ends a process and waits until it is gone; one of the quickstart's stays a zombie until that ends.
    #[expect(unsafe_code, reason = "kill(2)")]
    fn end(&mut self, number: usize, signal: libc::c_int) -> Result<()> {
        let pid = self.pid(number);
        anyhow::ensure!(pid != 0, "chunk server {number} runs");
        // SAFETY: plain system call; the process is a server of this cluster that nobody has waited for.
        unsafe { libc::kill(pid as libc::pid_t, signal) };
        if let Some(at) = self.own.iter().position(|child| child.id() == pid) {
            self.own.swap_remove(at).wait()?;
        } else {
            let stat = format!("/proc/{pid}/stat");
            let runs = || std::fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z "));
            while runs() {
                #[expect(clippy::disallowed_methods, reason = "waiting for another process")]
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        self.pids.retain(|(other, _)| *other != number);
        Ok(())
    }

    fn kill(&mut self, number: usize) -> Result<()> {
        self.end(number, libc::SIGKILL)
    }

    fn terminate(&mut self, number: usize) -> Result<()> {
        self.end(number, libc::SIGTERM)
    }

    /// The server dies, and its disk with it.
    fn destroy(&mut self, info: &CsInfo) -> Result<()> {
        let number = self.number(info)?;
        self.kill(number)?;
        std::fs::remove_dir_all(self.repository(number)).context("remove the directory of the lost server")
    }

    fn make_server(&self, number: usize) -> Result<()> {
        let (other, _) = self.pids.first().context("a server is left")?;
        let store = self.repository(*other).join("store");
        let size = std::fs::metadata(store).context("look at the size of another store")?.len();
        let host = HostId(cairn_env_real::random_bytes()).to_string();
        let output = Command::new(&self.exe)
            .args(["make-cs", "-a", "127.0.0.1:0", "--host-id", &host, "--size", &format!("{}M", size >> 20), "-r"])
            .arg(self.repository(number))
            .output()?;
        anyhow::ensure!(output.status.success(), "make-cs: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn start(&mut self, number: usize) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.log(number))?;
        let mut command = Command::new(&self.exe);
        command.args(["cs", "run", "-r"]).arg(self.repository(number));
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        self.pids.push((number, child.id()));
        self.own.push(child);
        Ok(())
    }

    /// Ends what this suite started.
    fn stop(&mut self) {
        for mut child in self.own.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}
