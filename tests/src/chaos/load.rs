//! Real clients: they write stamped blocks, flush, read back, and record all of it.

use super::history::{BLOCK_SIZE, History};
use super::names::Names;
use super::timeline::Meter;
use crate::hosts::Host;
use crate::nbd::NbdClient;
use crate::process;
use cairn_stdx::Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Blocks a load writes to, spread over its volume so that several chunks take part.
const BLOCK_COUNT: u64 = 512;
/// Distance between groups of eight blocks.
const GROUP_STRIDE: u64 = 256;
/// Bytes of a volume that hold all of them.
pub const VOLUME_SIZE: u64 = BLOCK_COUNT / 8 * GROUP_STRIDE * BLOCK_SIZE as u64;

/// Where a load finds its volume; changes when it moves to another host.
#[derive(Clone)]
pub enum Place {
    /// An export that the host itself serves on this port.
    Nbd {
        /// The host.
        host: usize,
        /// The port.
        port: u16,
        /// Name of the export.
        export: String,
    },
    /// A file on a mount.
    File(PathBuf),
}

trait Target {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()>;
    fn flush(&mut self) -> io::Result<()>;
}

impl Target for NbdClient {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(buffer, offset)
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        if durable { self.write_durable_at(bytes, offset) } else { self.write_at(bytes, offset) }
    }

    fn flush(&mut self) -> io::Result<()> {
        NbdClient::flush(self)
    }
}

/// A file without the kernel's cache between, and the same one where each write is durable.
struct DirectFile {
    plain: File,
    durable: File,
}

/// A part of `store` that begins at a multiple of a block, as `O_DIRECT` wants it.
fn aligned(store: &mut Vec<u8>, size: usize) -> &mut [u8] {
    store.resize(size + BLOCK_SIZE, 0);
    let skip = store.as_ptr().align_offset(BLOCK_SIZE);
    &mut store[skip..skip + size]
}

impl Target for DirectFile {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut store = Vec::new();
        let part = aligned(&mut store, buffer.len());
        self.plain.read_exact_at(part, offset)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        let mut store = Vec::new();
        let part = aligned(&mut store, bytes.len());
        part.copy_from_slice(bytes);
        if durable { &self.durable } else { &self.plain }.write_all_at(part, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.plain.sync_all()
    }
}

/// Workers stop before their next operation while it is closed.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    ended: AtomicBool,
    parked: AtomicUsize,
}

impl Gate {
    /// Closes it, or opens it again.
    pub fn close(&self, closed: bool) {
        self.closed.store(closed, Ordering::SeqCst);
    }

    /// Workers that wait.
    pub fn parked(&self) -> usize {
        self.parked.load(Ordering::SeqCst)
    }

    /// Workers end.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// True when the workers are to end.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// True when nobody begins anything.
    pub fn is_shut(&self) -> bool {
        self.closed.load(Ordering::SeqCst) || self.has_ended()
    }

    /// Waits while it is closed.
    pub fn pass(&self) {
        if self.is_shut() {
            self.parked.fetch_add(1, Ordering::SeqCst);
            while self.is_shut() && !self.has_ended() {
                process::pause();
            }
            self.parked.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// One volume under load.
pub struct Load {
    /// What it is called in messages.
    pub name: String,
    seed: u64,
    place: Mutex<Place>,
    /// Counts starts of the front end that serves it.
    pub incarnation: AtomicU64,
    /// Connections that are shut down when the place changes, so that nobody waits for a stopped front end.
    sockets: Mutex<Vec<std::net::TcpStream>>,
    /// What happened.
    pub history: Mutex<History>,
    /// Steps done by each worker.
    pub done: Vec<AtomicU64>,
    /// What each worker does now, and since when, in words.
    doing: Vec<Mutex<String>>,
    /// The first thing that was wrong, in words.
    pub broken: Mutex<Option<String>>,
    /// Longest time of one answered operation, in milliseconds.
    pub stall_ms_max: AtomicU64,
    /// When this is there, all steps are writes of one block, and each is measured.
    meter: Option<Meter>,
}

impl Load {
    /// A load with so many workers.
    pub fn new(name: &str, volume: u64, seed: u64, place: Place, workers: usize) -> Self {
        Self {
            name: name.to_owned(),
            seed,
            place: Mutex::new(place),
            incarnation: AtomicU64::new(1),
            sockets: Mutex::default(),
            history: Mutex::new(History::new(volume)),
            done: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            doing: (0..workers).map(|_| Mutex::default()).collect(),
            broken: Mutex::new(None),
            stall_ms_max: AtomicU64::new(0),
            meter: None,
        }
    }

    /// The same load with nothing but writes of one block, measured.
    pub fn measured(mut self, meter: Meter) -> Self {
        self.meter = Some(meter);
        self
    }

    /// The measure of a measured load.
    pub fn meter(&self) -> &Meter {
        self.meter.as_ref().expect("a measured load")
    }

    /// The front end was started anew, perhaps elsewhere: what was under way with the one before is given up.
    pub fn moved(&self, place: Option<Place>) {
        if let Some(place) = place {
            *self.place.lock().expect("not poisoned") = place;
        }
        self.incarnation.fetch_add(1, Ordering::SeqCst);
        for socket in self.sockets.lock().expect("not poisoned").drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Where it is now.
    pub fn place(&self) -> Place {
        self.place.lock().expect("not poisoned").clone()
    }

    /// What the workers do, for messages.
    pub fn doing(&self) -> String {
        let each = self.doing.iter().map(|text| text.lock().expect("not poisoned").clone());
        format!("{}: {}", self.name, each.collect::<Vec<_>>().join("; "))
    }

    fn open(&self, hosts: &[Host]) -> io::Result<(Box<dyn Target>, u64)> {
        // Read first: when it changes meanwhile, operations count for the older front end, which judges them less hard.
        let incarnation = self.incarnation.load(Ordering::SeqCst);
        let target: Box<dyn Target> = match self.place() {
            Place::Nbd { host, port, export } => {
                hosts[host].enter()?;
                let client = NbdClient::connect(port, &export)?;
                let mut sockets = self.sockets.lock().expect("not poisoned");
                sockets.push(client.socket()?);
                if self.incarnation.load(Ordering::SeqCst) != incarnation {
                    return Err(io::Error::other("the volume moved"));
                }
                Box::new(client)
            }
            Place::File(path) => {
                let open = |flags: i32| {
                    let mut options = File::options();
                    options.read(true).write(true).custom_flags(libc::O_DIRECT | flags).open(&path)
                };
                Box::new(DirectFile { plain: open(0)?, durable: open(libc::O_DSYNC)? })
            }
        };
        Ok((target, incarnation))
    }

    /// Sockets stay shared: they are shut down from elsewhere, and closing them waits for nobody.
    fn keep_files_apart(&self) {
        if matches!(self.place(), Place::File(_)) {
            process::own_descriptors();
        }
    }

    fn block(index: u64) -> u64 {
        index / 8 * GROUP_STRIDE + index % 8
    }

    /// One worker: works until the gate ends it.
    pub fn work(&self, worker: usize, hosts: &[Host], gate: &Gate) {
        self.keep_files_apart();
        let mut rng = Rng::new(self.seed).split(worker as u64 + 1);
        while !gate.has_ended() {
            if gate.is_shut() {
                *self.doing[worker].lock().expect("not poisoned") = "parked".to_owned();
                gate.pass();
                continue;
            }
            *self.doing[worker].lock().expect("not poisoned") = "opens".to_owned();
            match self.open(hosts) {
                Ok((mut target, incarnation)) => {
                    while !gate.is_shut() {
                        let outcome = self.step(worker, target.as_mut(), incarnation, &mut rng);
                        if let Err(error) = outcome {
                            self.history.lock().expect("not poisoned").counts.failed += 1;
                            *self.doing[worker].lock().expect("not poisoned") = format!("failed: {error}");
                            process::pause();
                            break;
                        }
                        self.done[worker].fetch_add(1, Ordering::SeqCst);
                    }
                }
                Err(error) => {
                    *self.doing[worker].lock().expect("not poisoned") = format!("cannot open: {error}");
                    process::pause();
                }
            }
        }
    }

    fn step(&self, worker: usize, target: &mut dyn Target, incarnation: u64, rng: &mut Rng) -> io::Result<()> {
        let count = if self.meter.is_some() { 1 } else { rng.range(1, 5) };
        let index = rng.below(BLOCK_COUNT / 8) * 8 + rng.below(8 - count + 1);
        let (block, offset) = (Self::block(index), Self::block(index) * BLOCK_SIZE as u64);
        let choice = if self.meter.is_some() { 1 } else { rng.below(20) };
        let say = |what: &str| {
            *self.doing[worker].lock().expect("not poisoned") = format!("{what} of blocks {block}+{count}");
        };
        let begun = process::now();
        match choice {
            0..=8 => {
                let durable = choice == 0;
                say(if durable { "durable write" } else { "write" });
                let (id, bytes) = self.history.lock().expect("not poisoned").write_begins(block, count, incarnation);
                target.write(offset, &bytes, durable)?;
                self.history.lock().expect("not poisoned").write_answered(id, durable);
            }
            9..=18 => {
                say("read");
                self.read(target, block, count, incarnation)?;
            }
            _ => {
                say("flush");
                let sent = self.history.lock().expect("not poisoned").now();
                target.flush()?;
                self.history.lock().expect("not poisoned").flush_answered(sent);
            }
        }
        self.stall_ms_max.fetch_max(begun.elapsed().as_millis() as u64, Ordering::SeqCst);
        self.meter.iter().for_each(|meter| meter.answered(begun));
        Ok(())
    }

    fn read(&self, target: &mut dyn Target, block: u64, count: u64, incarnation: u64) -> io::Result<Vec<u64>> {
        let sent = self.history.lock().expect("not poisoned").now();
        let mut bytes = vec![0; count as usize * BLOCK_SIZE];
        target.read(block * BLOCK_SIZE as u64, &mut bytes)?;
        let mut history = self.history.lock().expect("not poisoned");
        Ok(history.read_answered(block, sent, &bytes, incarnation).unwrap_or_else(|why| {
            self.broken.lock().expect("not poisoned").get_or_insert(why);
            Vec::new()
        }))
    }

    /// Reads every block that was ever written while nobody else works; tries again for a while when that fails.
    pub fn read_back(&self, hosts: &[Host], limit: Duration) -> Result<BTreeMap<u64, u64>, String> {
        self.keep_files_apart();
        let begun = process::now();
        let blocks = self.history.lock().expect("not poisoned").blocks();
        let mut groups: Vec<u64> = blocks.iter().map(|block| block / GROUP_STRIDE * GROUP_STRIDE).collect();
        groups.dedup();
        loop {
            let attempt = || -> io::Result<BTreeMap<u64, u64>> {
                let (mut target, incarnation) = self.open(hosts)?;
                target.flush()?;
                let mut found = BTreeMap::new();
                for group in &groups {
                    let values = self.read(target.as_mut(), *group, 8, incarnation)?;
                    found.extend((*group..).zip(values));
                }
                Ok(found)
            };
            match attempt() {
                Ok(found) => return Ok(found),
                Err(error) if begun.elapsed() > limit => {
                    return Err(format!("{}: not readable within {} s: {error}", self.name, limit.as_secs()));
                }
                Err(_) => process::pause(),
            }
        }
    }
}

/// All loads and the gate before them.
pub struct Loads {
    /// The loads.
    pub all: Vec<Arc<Load>>,
    /// The names.
    pub names: Names,
    /// The gate.
    pub gate: Gate,
}

impl Loads {
    /// Workers of all loads.
    pub fn worker_count(&self) -> usize {
        self.all.iter().map(|load| load.done.len()).sum::<usize>() + 1
    }

    /// Steps done, worker by worker.
    pub fn counters(&self) -> Vec<&AtomicU64> {
        self.all.iter().flat_map(|load| &load.done).chain([&self.names.done]).collect()
    }

    /// What everybody does, for messages.
    pub fn doing(&self) -> String {
        let all: Vec<String> = self.all.iter().map(|load| load.doing()).collect();
        format!("{}; names: {}", all.join("; "), self.names.doing.lock().expect("not poisoned"))
    }

    /// The first thing that is wrong.
    pub fn broken(&self) -> Option<String> {
        let names = self.names.broken.lock().expect("not poisoned").clone();
        names.or_else(|| self.all.iter().find_map(|load| load.broken.lock().expect("not poisoned").clone()))
    }
}
