//! Baselines measured in the same run: the raw disk through io_uring with O_DIRECT, and the loopback.
//!
//! Nothing of Cairn is in these loops; they say what the machine could do.

use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::load::{Direction, Shape};
use super::report::Figures;
use cairn_env::BufMut;
use cairn_stdx::Rng;

/// A file of its own for the raw loops, removed afterwards. Fully written, so that no extent conversion is measured.
pub struct RawFile {
    file: File,
    path: std::path::PathBuf,
    size: u64,
}

impl RawFile {
    /// Creates and fills a file of `size` bytes beside the stores.
    pub fn create(dir: &Path, size: u64) -> Result<Self> {
        let path = dir.join(format!(".cairn-bench-raw-{}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .with_context(|| format!("create {} for the raw baseline", path.display()))?;
        let mut raw = Self { file, path, size };
        let mut block = BufMut::zeroed(1 << 20);
        Rng::new(1).fill(&mut block);
        for _ in 0..size >> 20 {
            raw.file.write_all(&block).context("fill the file of the raw baseline")?;
        }
        raw.file.sync_all()?;
        Ok(raw)
    }

    /// Runs `shape` on the file for its duration.
    pub fn run(&self, shape: &Shape) -> Result<Figures> {
        let mut ring = IoUring::new(shape.depth.next_power_of_two().max(2) * 2)?;
        let fd = types::Fd(self.file.as_raw_fd());
        let mut buffers: Vec<BufMut> = (0..shape.depth).map(|i| filled(shape.block_size, u64::from(i))).collect();
        let mut started = vec![Instant::now(); shape.depth as usize];
        let mut offsets = shape.offsets(self.size, 17);
        let mut rng = Rng::new(5);
        let mut latency = super::report::histogram()?;
        let begun = Instant::now();
        let mut next: Vec<usize> = (0..shape.depth as usize).collect();
        let (mut in_flight, mut done) = (0usize, 0u64);
        loop {
            let over = begun.elapsed() >= shape.duration;
            while let Some(slot) = next.pop().filter(|_| !over) {
                let offset = offsets.next_offset();
                let (at, len) = (buffers[slot].as_mut_ptr(), shape.block_size as u32);
                let write = shape.is_write(&mut rng);
                let entry = if write {
                    opcode::Write::new(fd, at, len).offset(offset).build()
                } else {
                    opcode::Read::new(fd, at, len).offset(offset).build()
                };
                started[slot] = Instant::now();
                push(&mut ring, entry.user_data(slot as u64));
                in_flight += 1;
            }
            if in_flight == 0 {
                break;
            }
            ring.submit_and_wait(1)?;
            let completions: Vec<(u64, i32)> = ring.completion().map(|c| (c.user_data(), c.result())).collect();
            for (slot, result) in completions {
                anyhow::ensure!(result == shape.block_size as i32, "raw disk operation answered {result}");
                if shape.fsync_every > 0 && (done + 1).is_multiple_of(u64::from(shape.fsync_every)) {
                    self.file.sync_data()?;
                }
                latency.saturating_record(started[slot as usize].elapsed().as_nanos() as u64);
                in_flight -= 1;
                done += 1;
                next.push(slot as usize);
            }
        }
        Ok(Figures::new(&latency, done, begun.elapsed(), shape.block_size))
    }
}

impl Drop for RawFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[expect(unsafe_code, reason = "io_uring submission")]
fn push(ring: &mut IoUring, entry: io_uring::squeue::Entry) {
    // SAFETY: the buffer belongs to a slot that is not reused before its completion has been seen, and the vector of
    // buffers outlives the ring's last completion.
    unsafe { ring.submission().push(&entry) }.expect("the ring is larger than the depth");
}

fn filled(len: usize, seed: u64) -> BufMut {
    let mut buffer = BufMut::zeroed(len);
    Rng::new(seed).fill(&mut buffer);
    buffer
}

/// Three independent writers at once, as three copies would be: gives the bytes per second of all together.
pub fn three_writers(dir: &Path, duration: Duration) -> Result<f64> {
    let shape = Shape { duration, ..Shape::sequential(Direction::Write, 1 << 20, 8) };
    let files: Vec<RawFile> = (0..3)
        .map(|i| {
            let sub = dir.join(format!(".cairn-bench-{i}"));
            std::fs::create_dir_all(&sub)?;
            RawFile::create(&sub, 256 << 20)
        })
        .collect::<Result<_>>()?;
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let runs: Vec<_> = files.iter().map(|file| scope.spawn(|| file.run(&shape))).collect();
        runs.into_iter()
            .map(|run| Ok(run.join().expect("a raw writer does not panic")?.bytes_per_second))
            .collect::<Result<_>>()
    })?;
    drop(files);
    for i in 0..3 {
        let _ = std::fs::remove_dir(dir.join(format!(".cairn-bench-{i}")));
    }
    Ok(rates.into_iter().sum())
}

/// Mean round trip of a 4 KiB request and a small answer over blocking loopback TCP, in nanoseconds.
pub fn loopback_round_trip(duration: Duration) -> Result<Figures> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let mut latency = super::report::histogram()?;
    std::thread::scope(|scope| -> Result<Figures> {
        let server = scope.spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut request = [0u8; 4096];
            while stream.read_exact(&mut request).is_ok() {
                stream.write_all(&request[..32])?;
            }
            Ok(())
        });
        let mut stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        let (request, mut answer) = ([7u8; 4096], [0u8; 32]);
        let begun = Instant::now();
        let mut done = 0;
        while begun.elapsed() < duration {
            let start = Instant::now();
            stream.write_all(&request)?;
            stream.read_exact(&mut answer)?;
            latency.saturating_record(start.elapsed().as_nanos() as u64);
            done += 1;
        }
        let figures = Figures::new(&latency, done, begun.elapsed(), 4096);
        drop(stream);
        server.join().expect("the echo thread does not panic")?;
        Ok(figures)
    })
}
