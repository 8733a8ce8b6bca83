//! Prints what the store core costs in CPU time and how much it writes: `cargo run --release --example store_cpu`. With
//! the argument `cpu` only the first part, with `open` what opening a store of 100 GiB costs.
//!
//! The disk forgets and completes at once. Counted is the CPU time of the thread, the making of the requests included.
//! Figures of our machine: `docs/design/store.md`.

use cairn_env::{Buf, BufMut, DiskDone, DiskOp, DiskRequest};
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::{StoreConfig, StoreOptions, StoreOutput, StoreRequest, StoreStats, format};
use cairn_types::{ChunkId, ChunkVersion, ClusterId, Epoch, Instant, LayerId, Sequence, VolumeId};
use std::collections::{BTreeMap, VecDeque};

const BLOCK: usize = 4096;
const NOW: Instant = Instant(0);
const CHUNK_BLOCKS: u32 = 16_384;

/// Remembers superblocks, or with `keep` whatever does not begin with a page of zeros. All data blocks are zeros, and
/// without `keep` index leaves stay in memory, so nothing else is ever read back.
struct FrontDisk {
    slots: BTreeMap<u64, Buf>,
    keep: bool,
    zero: Buf,
    writes: u64,
    reads: u64,
    bytes: u64,
}

impl FrontDisk {
    fn new(keep: bool) -> Self {
        Self { slots: BTreeMap::new(), keep, zero: Buf::zeroed(1 << 20), writes: 0, reads: 0, bytes: 0 }
    }

    fn run(&mut self, op: DiskOp) -> Buf {
        match op {
            DiskOp::Write { offset, bufs } => {
                self.writes += 1;
                let mut slot = offset / 4096;
                for buf in bufs {
                    self.bytes += buf.len() as u64;
                    if [0, 1, 256, 257].contains(&slot) || (self.keep && buf[..BLOCK].iter().any(|byte| *byte != 0)) {
                        for i in 0..buf.len() / BLOCK {
                            self.slots.insert(slot + i as u64, buf.slice(i * BLOCK, BLOCK));
                        }
                    }
                    slot += (buf.len() / BLOCK) as u64;
                }
                self.zero.slice(0, 0)
            }
            DiskOp::Read { offset, len } => {
                self.reads += 1;
                let first = offset / 4096;
                let last = first + u64::from(len) / 4096;
                if len as usize == BLOCK {
                    return self.slots.get(&first).cloned().unwrap_or_else(|| self.zero.slice(0, BLOCK));
                }
                if self.slots.range(first..last).next().is_none() {
                    return self.zero.slice(0, len as usize);
                }
                let mut buf = BufMut::zeroed(len as usize);
                for (slot, page) in self.slots.range(first..last) {
                    buf[(slot - first) as usize * BLOCK..][..BLOCK].copy_from_slice(page);
                }
                buf.freeze()
            }
            _ => self.zero.slice(0, 0),
        }
    }
}

/// Nanoseconds this thread has been on a CPU: other programs on the machine do not count.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with scheduler statistics");
    text.split(' ').next().and_then(|word| word.parse().ok()).expect("the first field is a number")
}

struct Bench {
    store: cairn_store::Store,
    disk: FrontDisk,
    out: StoreOutput,
    queue: VecDeque<DiskRequest>,
    token: u64,
    sequence: u64,
    failed: u64,
}

impl Bench {
    fn new(size: u64, options: StoreOptions, keep: bool) -> Self {
        let mut disk = FrontDisk::new(keep);
        let config = StoreConfig { cluster: ClusterId([1; 16]), store_uuid: [2; 16], capacity_bytes: 0 };
        for op in format(&config, size).expect("the size is fine") {
            disk.run(op);
        }
        let mut bench = Self {
            store: cairn_store::Store::new(size, options),
            disk,
            out: StoreOutput::default(),
            queue: VecDeque::new(),
            token: 0,
            sequence: 0,
            failed: 0,
        };
        bench.store.start(NOW, &mut bench.out);
        bench.settle();
        let opened = bench.out.opened.take();
        assert!(matches!(opened, Some(Ok(_))), "{opened:?}");
        bench
    }

    fn settle(&mut self) {
        let mut dones: Vec<DiskDone> = Vec::new();
        loop {
            self.queue.extend(self.out.disk.drain(..));
            self.failed += self.out.done.drain(..).filter(|(_, answer)| answer.is_err()).count() as u64;
            self.out.notices.clear();
            if self.queue.is_empty() {
                return;
            }
            dones.extend(
                self.queue.drain(..).map(|request| DiskDone { io: request.io, result: Ok(self.disk.run(request.op)) }),
            );
            for done in dones.drain(..) {
                self.store.disk_done(NOW, done, &mut self.out);
            }
            self.store.turn(NOW, &mut self.out);
        }
    }

    fn batch(&mut self, requests: Vec<StoreRequest>) {
        for request in requests {
            self.token += 1;
            self.store.submit(NOW, self.token, request, &mut self.out);
        }
        self.store.turn(NOW, &mut self.out);
        self.settle();
    }

    fn write(&mut self, block: u64, data: &Buf, checksums: &[u64]) -> StoreRequest {
        self.sequence += 1;
        StoreRequest::Write {
            chunk: ChunkId(1 + block / u64::from(CHUNK_BLOCKS)),
            version: ChunkVersion(1),
            epoch: Epoch(1),
            sequence: Sequence(self.sequence),
            first_block: (block % u64::from(CHUNK_BLOCKS)) as u32,
            checksums: checksums.to_vec(),
            data: data.clone(),
            durable: false,
        }
    }

    fn upkeep(&mut self) {
        let settle = StoreRequest::Settle { volume: VolumeId(1), epoch: Epoch(1), sequence: Sequence(self.sequence) };
        self.batch(vec![StoreRequest::Flush, settle]);
    }

    fn fill(&mut self, blocks: u64) {
        let data = Buf::zeroed(128 * BLOCK);
        let checksums = vec![crc64(&data[..BLOCK]); 128];
        for chunk in 0..blocks.div_ceil(u64::from(CHUNK_BLOCKS)) {
            let create = StoreRequest::CreateChunk {
                chunk: ChunkId(chunk + 1),
                volume: VolumeId(1),
                layer: LayerId(1),
                index: chunk,
                block_count: CHUNK_BLOCKS,
                version: ChunkVersion(1),
                tag: Vec::new(),
            };
            self.batch(vec![create]);
        }
        for block in (0..blocks).step_by(128) {
            let request = self.write(block, &data, &checksums);
            self.batch(vec![request]);
            if block % 4096 == 0 {
                self.upkeep();
            }
        }
        self.upkeep();
        assert_eq!(self.failed, 0, "the fill fits");
    }
}

fn measure(
    name: &str,
    bench: &mut Bench,
    operations: u64,
    queue: u64,
    mut request: impl FnMut(&mut Bench) -> StoreRequest,
) {
    let (writes, bytes, start) = (bench.disk.writes, bench.disk.bytes, cpu_ns());
    for batch in 0..operations / queue {
        let requests = (0..queue).map(|_| request(bench)).collect();
        bench.batch(requests);
        if batch % (32_768 / queue) == 0 {
            bench.upkeep();
        }
    }
    let per = (cpu_ns() - start) / operations;
    let (writes, bytes) = (bench.disk.writes - writes, bench.disk.bytes - bytes);
    println!(
        "{name:34} {per:6} ns/op   {:.2} device writes/op   {:.2} x 4 KiB written/op   failed {}",
        writes as f64 / operations as f64,
        bytes as f64 / (operations * 4096) as f64,
        bench.failed
    );
}

fn cpu() {
    println!("CPU inside the core, 4 GiB store, 2 GiB of data, uniform random");
    let mut bench = Bench::new(4 << 30, StoreOptions::default(), false);
    let blocks = (2u64 << 30) / 4096;
    bench.fill(blocks);
    let data = Buf::zeroed(BLOCK);
    let checksums = [crc64(&data)];
    let mut rng = Rng::new(1);
    for queue in [1, 8, 32] {
        measure(&format!("4 KiB write, queue {queue}"), &mut bench, 400_000, queue, |bench| {
            let block = rng.below(blocks);
            bench.write(block, &data, &checksums)
        });
    }
    let mut rng = Rng::new(2);
    for queue in [1, 32] {
        measure(&format!("4 KiB read, queue {queue}"), &mut bench, 400_000, queue, |_| {
            let block = rng.below(blocks);
            StoreRequest::Read {
                chunk: ChunkId(1 + block / u64::from(CHUNK_BLOCKS)),
                first_block: (block % u64::from(CHUNK_BLOCKS)) as u32,
                block_count: 1,
            }
        });
    }
}

fn amplification(size: u64) {
    println!("\nwrite amplification, {} GiB store, uniform random 4 KiB overwrite, queue 32", size >> 30);
    let data = Buf::zeroed(BLOCK);
    let checksums = [crc64(&data)];
    for percent in [50, 80, 90, 95] {
        let mut bench = Bench::new(size, StoreOptions::default(), false);
        let StoreStats { capacity_bytes, .. } = bench.store.stats();
        let blocks = capacity_bytes / 4096 * percent / 100 / 257 * 256;
        bench.fill(blocks);
        let mut rng = Rng::new(percent);
        // Two passes over the data bring the free space into its steady state.
        for pass in 0..2 {
            let warm = if pass == 0 { "aging" } else { "aged" };
            measure(&format!("{percent} % full, {warm}"), &mut bench, blocks / 32 * 32, 32, |bench| {
                let block = rng.below(blocks);
                bench.write(block, &data, &checksums)
            });
        }
    }
}

/// Fills a store of 100 GiB, dirties it, and opens it again without a clean stop.
fn open() {
    let mut bench = Bench::new(110 << 30, StoreOptions::default(), true);
    let blocks = (100u64 << 30) / 4096;
    bench.fill(blocks);
    let data = Buf::zeroed(BLOCK);
    let checksums = [crc64(&data)];
    let mut rng = Rng::new(1);
    measure("100 GiB stored, 4 KiB write", &mut bench, 300_000, 32, |bench| {
        let block = rng.below(blocks);
        bench.write(block, &data, &checksums)
    });
    let stats = bench.store.stats();
    let (reads, start) = (bench.disk.reads, cpu_ns());
    bench.store = cairn_store::Store::new(110 << 30, StoreOptions::default());
    bench.store.start(NOW, &mut bench.out);
    bench.settle();
    let report = bench.out.opened.take().expect("opening ended").expect("the store opens");
    let ms = (cpu_ns() - start) / 1_000_000;
    let reads = bench.disk.reads - reads;
    println!("open: {ms} ms of CPU, {reads} device reads, {} groups replayed", report.groups_replayed);
    println!("before: {stats:?}");
}

fn main() {
    if std::env::args().any(|argument| argument == "open") {
        open();
        return;
    }
    cpu();
    if std::env::args().any(|argument| argument == "cpu") {
        return;
    }
    amplification(1 << 30);
    amplification(8 << 30);
}
