//! A load that knows its data: each block carries its place and version, and a model knows what may be read.
//!
//! An acknowledged write must be read until it is overwritten; after a crash of everything, each block must have a
//! version not older than the one flushed last and not newer than the one written last.

use crate::nbd::NbdClient;
use crate::process;
use cairn_stdx::Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Size of a stamped block.
pub const BLOCK_SIZE: usize = 4096;

/// Something that keeps blocks.
pub trait Target {
    /// Reads one block.
    fn read_block(&mut self, block: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes whole blocks from `block` on.
    fn write_blocks(&mut self, block: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all answered writes durable.
    fn flush(&mut self) -> io::Result<()>;
}

impl Target for NbdClient {
    fn read_block(&mut self, block: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(buffer, block * BLOCK_SIZE as u64)
    }

    fn write_blocks(&mut self, block: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_at(bytes, block * BLOCK_SIZE as u64)
    }

    fn flush(&mut self) -> io::Result<()> {
        NbdClient::flush(self)
    }
}

impl Target for File {
    fn read_block(&mut self, block: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, block * BLOCK_SIZE as u64)
    }

    fn write_blocks(&mut self, block: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, block * BLOCK_SIZE as u64)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// What was written, and what must be found.
#[derive(Default)]
pub struct Model {
    seed: u64,
    versions: BTreeMap<u64, Versions>,
    /// Longest time one request took.
    pub stall_max: Duration,
}

#[derive(Clone, Copy, Default)]
struct Versions {
    flushed: u64,
    written: u64,
}

fn fill(seed: u64, block: u64, version: u64, bytes: &mut [u8]) {
    let mut rng = Rng::new(seed ^ block.wrapping_mul(0x9e37_79b9) ^ version.rotate_left(40));
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&rng.next_u64().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&version.to_le_bytes());
}

impl Model {
    /// Nothing written yet; two models of different seeds never agree on a block.
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Writes one to eight blocks of new versions.
    fn write(&mut self, target: &mut dyn Target, rng: &mut Rng, block_count: u64) -> io::Result<()> {
        let count = rng.range(1, 9).min(block_count);
        let first = rng.below(block_count - count + 1);
        let mut bytes = vec![0; count as usize * BLOCK_SIZE];
        for (index, part) in bytes.chunks_exact_mut(BLOCK_SIZE).enumerate() {
            let block = first + index as u64;
            let versions = self.versions.entry(block).or_default();
            versions.written += 1;
            fill(self.seed, block, versions.written, part);
        }
        target.write_blocks(first, &bytes)
    }

    /// Reads a block and checks it against what was acknowledged.
    fn check(&self, target: &mut dyn Target, block: u64, after_crash: bool) -> io::Result<()> {
        let known = self.versions.get(&block).copied().unwrap_or_default();
        let mut found = vec![0; BLOCK_SIZE];
        target.read_block(block, &mut found)?;
        let version = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
        let least = if after_crash { known.flushed } else { known.written };
        assert!(
            (least..=known.written).contains(&version),
            "block {block} has version {version}; flushed was {}, written {}",
            known.flushed,
            known.written
        );
        let mut wanted = vec![0; BLOCK_SIZE];
        if version > 0 {
            fill(self.seed, block, version, &mut wanted);
        }
        assert!(found == wanted, "block {block} claims version {version} and has other bytes");
        Ok(())
    }

    fn step(&mut self, target: &mut dyn Target, rng: &mut Rng, block_count: u64) {
        let begun = process::now();
        let outcome = match rng.below(10) {
            0..=5 => self.write(target, rng, block_count),
            6..=8 => {
                let from = rng.below(block_count);
                let next = self.versions.range(from..).next().or_else(|| self.versions.iter().next());
                match next.map(|(block, _)| *block) {
                    Some(block) => self.check(target, block, false),
                    None => Ok(()),
                }
            }
            _ => self.flush(target),
        };
        self.stall_max = self.stall_max.max(begun.elapsed());
        if let Err(error) = outcome {
            panic!("I/O failed after {:.1} s: {error}", begun.elapsed().as_secs_f64());
        }
    }

    /// So many random writes, checked reads and flushes; any I/O error is a failure.
    pub fn run_steps(&mut self, target: &mut dyn Target, block_count: u64, steps: u64) {
        let mut rng = Rng::new(self.seed ^ self.versions.len() as u64);
        (0..steps).for_each(|_| self.step(target, &mut rng, block_count));
    }

    /// The same until `stop`; counts each step in `done`.
    pub fn run_until(&mut self, target: &mut dyn Target, block_count: u64, stop: &AtomicBool, done: &AtomicU64) {
        let mut rng = Rng::new(self.seed);
        while !stop.load(Ordering::SeqCst) {
            self.step(target, &mut rng, block_count);
            done.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Makes everything written so far durable.
    pub fn flush(&mut self, target: &mut dyn Target) -> io::Result<()> {
        target.flush()?;
        self.versions.values_mut().for_each(|versions| versions.flushed = versions.written);
        Ok(())
    }

    /// After a crash: takes for written what is there now, once [`Model::check_all`] found it allowed.
    pub fn settle(&mut self, target: &mut dyn Target) {
        for (block, versions) in &mut self.versions {
            let mut found = vec![0; BLOCK_SIZE];
            target.read_block(*block, &mut found).unwrap_or_else(|error| panic!("read block {block}: {error}"));
            let version = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
            *versions = Versions { flushed: version, written: version };
        }
    }

    /// Checks every block that was written; gives their number.
    pub fn check_all(&self, target: &mut dyn Target, after_crash: bool) -> usize {
        for block in self.versions.keys() {
            self.check(target, *block, after_crash).unwrap_or_else(|error| panic!("read block {block}: {error}"));
        }
        self.versions.len()
    }
}

/// Ends a load, also when the test panics, so that the scope of its thread can end.
pub struct StopGuard<'a>(pub &'a AtomicBool);

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits until the load did `more` steps from now on.
pub fn wait_for_steps(done: &AtomicU64, more: u64, limit: Duration) {
    let wanted = done.load(Ordering::SeqCst) + more;
    process::poll("the load goes on", limit, || (done.load(Ordering::SeqCst) >= wanted).then_some(()));
}
