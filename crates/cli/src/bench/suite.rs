//! The suite `core`: every line of "how fast" with its target, measured beside its baseline.

use super::baseline::{self, RawFile};
use super::load::{self, Direction, Shape};
use super::report::{Figures, Goal, Line};
use super::{BenchArgs, SERVER_ROLES, cpu, measure, print_lines, raw_dir};
use crate::context::Context as Cluster;
use anyhow::{Context, Result, bail};
use cairn_client::LocalClient;
use cairn_wire::mds::{MdsReply, MdsRequest, VolumeOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Part of the volume the suite uses.
const SPAN: u64 = 1 << 30;
/// Name of its volume.
const VOLUME: &str = "bench-suite";

/// Creates a volume with three copies.
pub async fn create_volume(client: &LocalClient, name: &str, size: u64) -> Result<()> {
    let request = MdsRequest::VolumeCreate { name: name.to_owned(), size, options: VolumeOptions::default() };
    client.call(request).await.with_context(|| format!("create volume {name}"))?;
    Ok(())
}

/// Deletes a volume by name.
pub async fn delete_volume(client: &LocalClient, name: &str) -> Result<()> {
    let MdsReply::Volume(info) = client.call(MdsRequest::VolumeGet { name: name.to_owned() }).await? else {
        bail!("unexpected answer to VolumeGet");
    };
    client.call(MdsRequest::VolumeDelete { volume: info.volume }).await?;
    Ok(())
}

/// Runs the suite, in a quickstart cluster of its own when no cluster is named.
pub fn run(cluster: &Cluster, args: &BenchArgs) -> Result<()> {
    if std::env::var_os("CAIRN_CLUSTER").is_none() {
        return run_in_quickstart(cluster, args, &[], &["bench", "--suite", "core"]);
    }
    let mut lines = Vec::new();
    wait_until_settled();
    idle_line(&mut lines);
    block_lines(cluster, &raw_dir(args), &mut lines)?;
    match std::env::var_os("CAIRN_MOUNT") {
        Some(mount) => mount_lines(&PathBuf::from(mount).join(format!("bench-{}", std::process::id())), &mut lines)?,
        None => eprintln!("CAIRN_MOUNT is not set: the lines about the mount are left out"),
    }
    memory_lines(&mut lines);
    print_lines(cluster, &lines)
}

/// Runs `cairn` with these words in a quickstart cluster of its own, started with `options` and removed afterwards.
pub fn run_in_quickstart(cluster: &Cluster, args: &BenchArgs, options: &[&str], words: &[&str]) -> Result<()> {
    let exe = std::env::current_exe()?;
    let dir = raw_dir(args).join(format!("cairn-bench-{}", std::process::id()));
    let mut command = std::process::Command::new(&exe);
    command.arg("quickstart").args(options).arg("--dir").arg(&dir).arg("--").arg(&exe);
    if cluster.json() {
        command.args(["-o", "json"]);
    }
    let status = command.args(words).status().context("start a quickstart cluster")?;
    std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    if !status.success() {
        bail!("the suite ended with {status}");
    }
    Ok(())
}

/// Waits until the chunk servers write nothing more by themselves: a young store file is filled with zeros once.
pub fn wait_until_settled() {
    const PATIENCE: Duration = Duration::from_secs(120);
    const REST: Duration = Duration::from_secs(2);
    let servers = cpu::servers(&["cs"]);
    let written = || servers.iter().map(|server| cpu::written_bytes(server.pid)).sum::<u64>();
    let begun = Instant::now();
    loop {
        let before = written();
        #[expect(clippy::disallowed_methods, reason = "waiting for other processes")]
        std::thread::sleep(REST);
        // A renewed lease or a checkpoint is no filling.
        if written() - before < 1 << 20 || begun.elapsed() > PATIENCE {
            break;
        }
    }
    eprintln!("the stores are at rest after {:.0} s", begun.elapsed().as_secs_f64());
}

fn idle_line(lines: &mut Vec<Line>) {
    const SECONDS: u64 = 5;
    let servers = cpu::servers(&["mds", "cs", "mount"]);
    let before: f64 = servers.iter().map(|server| cpu::cpu_us(server.pid)).sum();
    #[expect(clippy::disallowed_methods, reason = "idle is measured by waiting")]
    std::thread::sleep(Duration::from_secs(SECONDS));
    let used: f64 = servers.iter().map(|server| cpu::cpu_us(server.pid)).sum::<f64>() - before;
    let percent = used / (SECONDS as f64 * 1e6) * 100.0;
    let note = format!("{} processes: all metadata and chunk servers and the mount", servers.len());
    lines.push(Line::new("idle cluster, share of one core", percent, "%", Goal::AtMost, 3.0, note));
}

fn block_lines(cluster: &Cluster, dir: &Path, lines: &mut Vec<Line>) -> Result<()> {
    let raw = Arc::new(RawFile::create(dir, SPAN)?);
    let result = cluster.block_on(async |client| {
        create_volume(&client, VOLUME, SPAN).await?;
        let volume = load::open(&client, VOLUME).await?;
        load::fill(&volume, SPAN).await?;
        let mut out = Vec::new();
        for (name, shape) in shapes() {
            let (rtt, raw_figures) = baselines_at_rest(&raw, &shape).await?;
            let figures = measure(&volume, &shape, SPAN).await.with_context(|| name.to_owned())?;
            eprintln!("{name}\n  cairn {figures}\n  raw   {raw_figures}\n  rtt   {:.1} us", rtt.mean_us);
            out.push((name, figures, raw_figures, rtt));
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        volume.clone().release_with(move || sender.send(()).unwrap_or(()));
        let _ = receiver.await;
        delete_volume(&client, VOLUME).await?;
        out.push(("volume create", volume_creates(&client).await?, Figures::default(), Figures::default()));
        Ok(out)
    })?;
    drop(raw);
    let three = baseline::three_writers(dir, Duration::from_secs(3))? / 3.0;
    for (name, figures, raw, rtt) in result {
        judge(name, &figures, &raw, &rtt, three, lines);
    }
    Ok(())
}

/// The loopback and the raw disk while the cluster rests. Off the client's thread, which could not rest otherwise:
/// while it works it keeps the cores from sleeping deeply, and so does whoever works for it.
async fn baselines_at_rest(raw: &Arc<RawFile>, shape: &Shape) -> Result<(Figures, Figures)> {
    const REST: Duration = Duration::from_millis(500);
    tokio::time::sleep(REST).await;
    let (raw, shape) = (Arc::clone(raw), shape.clone());
    let run = move || anyhow::Ok((baseline::loopback_round_trip(Duration::from_millis(500))?, raw.run(&shape)?));
    tokio::task::spawn_blocking(run).await.context("measure the baselines")?
}

fn shapes() -> Vec<(&'static str, Shape)> {
    let synced = Shape { fsync_every: 1, ..Shape::random(Direction::Write, 1) };
    vec![
        ("4k random write depth 1", Shape::random(Direction::Write, 1)),
        ("4k random write depth 32", Shape::random(Direction::Write, 32)),
        ("4k random read depth 1", Shape::random(Direction::Read, 1)),
        ("4k random read depth 32", Shape::random(Direction::Read, 32)),
        ("4k write + fsync depth 1", synced),
        ("1m write depth 8", Shape::sequential(Direction::Write, 1 << 20, 8)),
        ("1m read depth 8", Shape::sequential(Direction::Read, 1 << 20, 8)),
    ]
}

fn judge(name: &str, us: &Figures, raw: &Figures, rtt: &Figures, three: f64, lines: &mut Vec<Line>) {
    let base = raw.mean_us + rtt.mean_us;
    let cpu = us.cpu_us.unwrap_or(0.0);
    let latency_note = format!("{:.0} us against raw {:.0} + rtt {:.0} us", us.mean_us, raw.mean_us, rtt.mean_us);
    let share = |rate: f64, of: f64| 100.0 * rate / of;
    let mut line = |what: &str, value: f64, unit, goal, target, note: String| {
        lines.push(Line::new(&format!("{name}: {what}"), value, unit, goal, target, note));
    };
    match name {
        "4k random write depth 1" => {
            line("mean", us.mean_us / base, "x", Goal::AtMost, 1.2, latency_note);
            let note = format!("p99 {:.0} us against the same base", us.p99_us);
            line("p99", us.p99_us / base, "x", Goal::AtMost, 4.0, note);
        }
        "4k random write depth 32" => {
            let note = format!("{:.0} op/s, raw {:.0} op/s", us.iops, raw.iops);
            line("cpu per write", cpu, "us", Goal::AtMost, 60.0, note);
        }
        "4k random read depth 1" => line("mean", us.mean_us / base, "x", Goal::AtMost, 0.7, latency_note),
        "4k random read depth 32" => {
            let note = format!("{:.0} op/s, raw {:.0} op/s", us.iops, raw.iops);
            line("share of raw", share(us.iops, raw.iops), "%", Goal::AtLeast, 85.0, note);
            line("cpu per read", cpu, "us", Goal::AtMost, 18.0, String::new());
        }
        "4k write + fsync depth 1" => line("mean", us.mean_us / base, "x", Goal::AtMost, 1.6, latency_note),
        "1m write depth 8" => {
            let rate = us.bytes_per_second;
            let note = format!("{:.0} MiB/s, three raw writers / 3 {:.0} MiB/s", rate / 1048576.0, three / 1048576.0);
            line("share of 3 raw writers / 3", share(rate, three), "%", Goal::AtLeast, 60.0, note);
            line("cpu per MiB", cpu, "us", Goal::AtMost, 1500.0, String::new());
        }
        "1m read depth 8" => {
            let (ours, raw) = (us.bytes_per_second, raw.bytes_per_second);
            let note = format!("{:.0} MiB/s, raw {:.0} MiB/s", ours / 1048576.0, raw / 1048576.0);
            line("share of raw", share(ours, raw), "%", Goal::AtLeast, 95.0, note);
            line("cpu per MiB", cpu, "us", Goal::AtMost, 600.0, String::new());
        }
        "volume create" => line("through one connection", us.iops, "/s", Goal::AtLeast, 2000.0, String::new()),
        other => unreachable!("{other} has no target"),
    }
}

/// Creates volumes for a while with 32 calls in flight on one connection.
async fn volume_creates(client: &LocalClient) -> Result<Figures> {
    const COUNT: usize = 4000;
    const WINDOW: usize = 32;
    let begun = Instant::now();
    let mut made = 0;
    while made < COUNT {
        let batch = (0..WINDOW.min(COUNT - made)).map(|i| {
            let name = format!("bench-v{}", made + i);
            async move { create_volume(client, &name, 1 << 30).await }
        });
        for outcome in join_all(batch).await {
            outcome?;
        }
        made += WINDOW;
    }
    let elapsed = begun.elapsed();
    for i in 0..made {
        delete_volume(client, &format!("bench-v{i}")).await?;
    }
    let operations = made as u64;
    Ok(Figures { operations, iops: operations as f64 / elapsed.as_secs_f64(), ..Figures::default() })
}

/// Polls all futures until each has ended.
pub async fn join_all<F: std::future::Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in pending.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(cx) {
                *output = Some(value);
            }
        }
        match pending.iter().all(|(_, output)| output.is_some()) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    pending.into_iter().filter_map(|(_, output)| output).collect()
}

/// What threads have done: how often each, and how often per second all together.
struct Rate {
    done: Vec<usize>,
    per_second: f64,
}

/// Runs `work` with rising numbers on `threads` threads, `count` times or until `limit` is over. Thread `t` of `n` has
/// the numbers `t`, `t + n`, ...
fn rate(
    count: usize,
    threads: usize,
    limit: Duration,
    work: impl Fn(usize) -> std::io::Result<()> + Sync,
) -> Result<Rate> {
    let begun = Instant::now();
    let run = |thread: usize| -> std::io::Result<usize> {
        let mut done = 0;
        for number in (thread..count).step_by(threads) {
            if begun.elapsed() >= limit {
                break;
            }
            work(number)?;
            done += 1;
        }
        Ok(done)
    };
    let done = std::thread::scope(|scope| -> Result<Vec<usize>> {
        let run = &run;
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| worker.join().expect("a bench thread does not panic");
        workers.into_iter().map(|worker| join(worker).context("an operation on the mount failed")).collect()
    })?;
    let per_second = done.iter().sum::<usize>() as f64 / begun.elapsed().as_secs_f64();
    Ok(Rate { done, per_second })
}

fn mount_lines(dir: &Path, lines: &mut Vec<Line>) -> Result<()> {
    const FILES: usize = 100_000;
    const SHARED: usize = 4_000;
    const THREADS: usize = 16;
    const LIMIT: Duration = Duration::from_secs(15);
    let (one, shared) = (dir.join("one"), dir.join("shared"));
    let own = |thread: usize| dir.join(format!("own{thread}"));
    for sub in [one.clone(), shared.clone()].into_iter().chain((0..THREADS).map(own)) {
        std::fs::create_dir_all(sub).context("make a directory on the mount")?;
    }
    let create = |path: PathBuf| std::fs::File::create_new(path).map(drop);
    let single = rate(FILES / 10, 1, LIMIT, |i| create(one.join(i.to_string())))?;
    let mut line = |name: &str, rate: &Rate, target: f64, note: String| {
        eprintln!("{name} {:.0}/s {note}", rate.per_second);
        lines.push(Line::new(name, rate.per_second, "/s", Goal::AtLeast, target, note));
    };
    line("create + close, 1 thread", &single, 2500.0, String::new());
    // Linux lets one thread at a time create in a directory, whatever the file system.
    let together = rate(SHARED, THREADS, LIMIT, |i| create(shared.join(i.to_string())))?;
    let left = FILES - single.done[0] - together.done.iter().sum::<usize>();
    let path = |i: usize| own(i % THREADS).join(i.to_string());
    let apart = rate(left, THREADS, LIMIT, |i| create(path(i)))?;
    let note = format!("a directory for each thread; all in one directory: {:.0}/s", together.per_second);
    line("create + close, 16 threads", &apart, 10_000.0, note);
    let numbers = |thread: usize| (0..apart.done[thread]).map(move |turn| thread + turn * THREADS);
    let made: Vec<PathBuf> = (0..THREADS).flat_map(numbers).map(path).collect();
    drop_caches();
    let stat = |path: &Path| std::fs::symlink_metadata(path).map(drop);
    let cold = rate(made.len(), THREADS, LIMIT, |i| stat(&made[i]))?;
    line("stat, cold", &cold, 15_000.0, format!("{} files, 16 threads", made.len()));
    let few = &made[..made.len().min(2000)];
    rate(few.len(), 1, LIMIT, |i| stat(&few[i]))?;
    let warm = rate(200_000, 2, LIMIT, |i| stat(&few[i % few.len()]))?;
    line("stat, warm", &warm, 100_000.0, format!("{} files, 2 threads", few.len()));
    Ok(())
}

/// Makes the kernel forget names and attributes, so that a cold run is cold.
fn drop_caches() {
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "2") {
        eprintln!("the kernel's caches could not be dropped ({error}); the cold figures are warm");
    }
}

fn memory_lines(lines: &mut Vec<Line>) {
    let servers = cpu::servers(&SERVER_ROLES);
    let largest = |role: &str| {
        servers.iter().filter(|s| s.role == role).map(|s| cpu::rss_bytes(s.pid)).max().unwrap_or(0) as f64 / 1048576.0
    };
    let note = "largest of the metadata servers, with the files above".to_owned();
    lines.push(Line::new("memory of a metadata server", largest("mds"), "MiB", Goal::AtMost, 150.0, note));
    let note = "largest of the chunk servers; the target grows by 1 GiB per TiB stored".to_owned();
    lines.push(Line::new("memory of a chunk server", largest("cs"), "MiB", Goal::AtMost, 64.0, note));
}
