//! Load shapes, and the loop that drives a volume with one through the client library.

use super::report::Figures;
use anyhow::{Context, Result};
use cairn_client::{LocalClient, LocalVolume};
use cairn_env::block::{BlockDevice, BlockError, BlockOp};
use cairn_env::{Buf, BufMut};
use cairn_stdx::Rng;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Reads, writes or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Only reads.
    Read,
    /// Only writes.
    Write,
    /// This many reads in a hundred.
    Mixed(u8),
}

/// What to do to a device.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Reads or writes.
    pub direction: Direction,
    /// Uniformly random offsets, or one after the other.
    pub random: bool,
    /// Bytes per operation.
    pub block_size: usize,
    /// Operations in flight.
    pub depth: u32,
    /// For how long.
    pub duration: Duration,
    /// A flush after every so many writes; 0 for none.
    pub fsync_every: u32,
}

impl Shape {
    /// Random operations of 4 KiB.
    pub fn random(direction: Direction, depth: u32) -> Self {
        Self { direction, random: true, block_size: 4096, depth, duration: Duration::from_secs(3), fsync_every: 0 }
    }

    /// Sequential operations.
    pub fn sequential(direction: Direction, block_size: usize, depth: u32) -> Self {
        Self { direction, random: false, block_size, depth, duration: Duration::from_secs(3), fsync_every: 0 }
    }

    /// The offsets of a run over a device of `size` bytes.
    pub fn offsets(&self, size: u64, seed: u64) -> Offsets {
        let count = (size / self.block_size as u64).max(1);
        Offsets { random: self.random.then(|| Rng::new(seed)), count, next: 0, block_size: self.block_size as u64 }
    }

    /// Whether the next operation writes.
    pub fn is_write(&self, rng: &mut Rng) -> bool {
        match self.direction {
            Direction::Read => false,
            Direction::Write => true,
            Direction::Mixed(reads) => !rng.chance(u64::from(reads), 100),
        }
    }
}

/// Generator of offsets.
pub struct Offsets {
    random: Option<Rng>,
    count: u64,
    next: u64,
    block_size: u64,
}

impl Offsets {
    /// The next offset in bytes.
    pub fn next_offset(&mut self) -> u64 {
        let index = match &mut self.random {
            Some(rng) => rng.below(self.count),
            None => {
                self.next = (self.next + 1) % self.count;
                self.next
            }
        };
        index * self.block_size
    }
}

struct Run {
    volume: LocalVolume,
    shape: Shape,
    offsets: Offsets,
    rng: Rng,
    data: Buf,
    latency: hdrhistogram::Histogram<u64>,
    begun: Instant,
    done: u64,
    in_flight: u32,
    error: Option<BlockError>,
    over: Rc<Cell<bool>>,
    finished: Rc<Notify>,
}

/// Drives `volume` with `shape`: each completion starts the next operation, no task hop between.
pub async fn drive(volume: &LocalVolume, shape: &Shape, span: u64) -> Result<Figures> {
    drive_until(volume, shape, span, &Rc::default()).await
}

/// The same until it is `over`, if that comes before the end of the shape's duration.
pub async fn drive_until(volume: &LocalVolume, shape: &Shape, span: u64, over: &Rc<Cell<bool>>) -> Result<Figures> {
    let mut data = BufMut::zeroed(shape.block_size);
    Rng::new(3).fill(&mut data);
    let finished = Rc::new(Notify::new());
    let run = Rc::new(RefCell::new(Run {
        volume: volume.clone(),
        offsets: shape.offsets(span.min(volume.size()), 23),
        shape: shape.clone(),
        rng: Rng::new(29),
        data: data.freeze(),
        latency: super::report::histogram()?,
        begun: Instant::now(),
        done: 0,
        in_flight: 0,
        error: None,
        over: over.clone(),
        finished: finished.clone(),
    }));
    for _ in 0..shape.depth {
        start_one(&run);
    }
    finished.notified().await;
    let run = run.borrow();
    if let Some(error) = &run.error {
        return Err(error.clone()).context("an operation of the benchmark failed");
    }
    Ok(Figures::new(&run.latency, run.done, run.begun.elapsed(), shape.block_size))
}

fn start_one(run: &Rc<RefCell<Run>>) {
    let (volume, op, flush) = {
        let mut state = run.borrow_mut();
        if state.begun.elapsed() >= state.shape.duration || state.over.get() || state.error.is_some() {
            if state.in_flight == 0 {
                state.finished.notify_one();
            }
            return;
        }
        state.in_flight += 1;
        let offset = state.offsets.next_offset();
        let Run { shape, rng, data, .. } = &mut *state;
        let write = shape.is_write(rng);
        let op = if write {
            BlockOp::Write { offset, data: data.clone(), fua: false }
        } else {
            BlockOp::Read { offset, len: shape.block_size as u32 }
        };
        let every = u64::from(state.shape.fsync_every);
        let flush = write && every > 0 && (state.done + 1).is_multiple_of(every);
        (state.volume.clone(), op, flush)
    };
    let start = Instant::now();
    let again = run.clone();
    let device = volume.clone();
    volume.submit(
        op,
        Box::new(move |result| match result {
            Ok(_) if flush => {
                let inner = again.clone();
                device.submit(BlockOp::Flush, Box::new(move |result| finish_one(&inner, start, result.err())));
            }
            result => finish_one(&again, start, result.err()),
        }),
    );
}

fn finish_one(run: &Rc<RefCell<Run>>, start: Instant, error: Option<BlockError>) {
    {
        let mut state = run.borrow_mut();
        state.in_flight -= 1;
        state.done += 1;
        state.latency.saturating_record(start.elapsed().as_nanos() as u64);
        if error.is_some() {
            state.error = error;
        }
    }
    start_one(run);
}

/// Writes every byte of the first `span` bytes, so that reads find data and writes overwrite.
pub async fn fill(volume: &LocalVolume, span: u64) -> Result<()> {
    let mut data = BufMut::zeroed(1 << 20);
    Rng::new(11).fill(&mut data);
    let data = data.freeze();
    for offset in (0..span).step_by(1 << 20) {
        volume.run(BlockOp::Write { offset, data: data.clone(), fua: false }).await?;
    }
    volume.run(BlockOp::Flush).await?;
    Ok(())
}

/// Opens the volume called `name`.
pub async fn open(client: &LocalClient, name: &str) -> Result<LocalVolume> {
    use cairn_wire::mds::{LeaseMode, MdsReply, MdsRequest};
    let reply = client.call(MdsRequest::VolumeGet { name: name.to_owned() }).await?;
    let MdsReply::Volume(info) = reply else { anyhow::bail!("unexpected answer {reply:?}") };
    Ok(client.open(info.volume, LeaseMode::Exclusive, cairn_client::SizeRule::Fixed).await?)
}
