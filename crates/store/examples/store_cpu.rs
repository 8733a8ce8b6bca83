//! Prints what the store core costs in CPU time and how much it writes: `cargo run --release --example store_cpu`.
//!
//! The disk is a table of buffers that completes at once; only time inside the core is counted. Figures of our machine:
//! `docs/design/store.md`.

#![expect(clippy::disallowed_methods, reason = "a benchmark measures time")]

use cairn_env::{Buf, BufMut, DiskDone, DiskOp, DiskRequest};
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::{StoreConfig, StoreOptions, StoreOutput, StoreRequest, StoreStats, format};
use cairn_types::{ChunkId, ChunkVersion, ClusterId, Epoch, Instant, LayerId, Sequence, VolumeId};
use std::collections::VecDeque;
use std::time::{Duration, Instant as Clock};

const BLOCK: usize = 4096;
const NOW: Instant = Instant(0);
const CHUNK_BLOCKS: u32 = 16_384;

/// Keeps the buffers it is given, slot by slot.
struct TableDisk {
    slots: Vec<Option<Buf>>,
    zero: Buf,
    writes: u64,
    bytes: u64,
}

impl TableDisk {
    fn new(size: u64) -> Self {
        Self { slots: vec![None; (size / 4096) as usize], zero: Buf::zeroed(BLOCK), writes: 0, bytes: 0 }
    }

    fn run(&mut self, op: DiskOp) -> Buf {
        match op {
            DiskOp::Write { offset, bufs } => {
                self.writes += 1;
                let mut slot = (offset / 4096) as usize;
                for buf in bufs {
                    self.bytes += buf.len() as u64;
                    for at in (0..buf.len()).step_by(BLOCK) {
                        self.slots[slot] = Some(buf.slice(at, BLOCK));
                        slot += 1;
                    }
                }
                self.zero.slice(0, 0)
            }
            DiskOp::Read { offset, len } if len as usize == BLOCK => {
                self.slots[(offset / 4096) as usize].clone().unwrap_or_else(|| self.zero.clone())
            }
            DiskOp::Read { offset, len } => {
                let mut buf = BufMut::zeroed(len as usize);
                for (i, out) in buf.chunks_exact_mut(BLOCK).enumerate() {
                    if let Some(page) = &self.slots[(offset / 4096) as usize + i] {
                        out.copy_from_slice(page);
                    }
                }
                buf.freeze()
            }
            _ => self.zero.slice(0, 0),
        }
    }
}

struct Bench {
    store: cairn_store::Store,
    disk: TableDisk,
    out: StoreOutput,
    queue: VecDeque<DiskRequest>,
    inside: Duration,
    token: u64,
    sequence: u64,
    failed: u64,
}

impl Bench {
    fn new(size: u64, options: StoreOptions) -> Self {
        let mut disk = TableDisk::new(size);
        let config = StoreConfig { cluster: ClusterId([1; 16]), store_uuid: [2; 16], capacity_bytes: 0 };
        for op in format(&config, size).expect("the size is fine") {
            disk.run(op);
        }
        let mut bench = Self {
            store: cairn_store::Store::new(size, options),
            disk,
            out: StoreOutput::default(),
            queue: VecDeque::new(),
            inside: Duration::ZERO,
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
            dones.extend(self.queue.drain(..).map(|request| DiskDone { io: request.io, result: Ok(self.disk.run(request.op)) }));
            let start = Clock::now();
            for done in dones.drain(..) {
                self.store.disk_done(NOW, done, &mut self.out);
            }
            self.store.turn(NOW, &mut self.out);
            self.inside += start.elapsed();
        }
    }

    fn batch(&mut self, requests: Vec<StoreRequest>) {
        let start = Clock::now();
        for request in requests {
            self.token += 1;
            self.store.submit(NOW, self.token, request, &mut self.out);
        }
        self.store.turn(NOW, &mut self.out);
        self.inside += start.elapsed();
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
        let settle =
            StoreRequest::Settle { volume: VolumeId(1), epoch: Epoch(1), sequence: Sequence(self.sequence) };
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

fn measure(name: &str, bench: &mut Bench, operations: u64, queue: u64, mut request: impl FnMut(&mut Bench) -> StoreRequest) {
    bench.inside = Duration::ZERO;
    let (writes, bytes) = (bench.disk.writes, bench.disk.bytes);
    for batch in 0..operations / queue {
        let requests = (0..queue).map(|_| request(bench)).collect();
        bench.batch(requests);
        if batch % (32_768 / queue) == 0 {
            bench.upkeep();
        }
    }
    let per = bench.inside.as_nanos() as u64 / operations;
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
    let mut bench = Bench::new(4 << 30, StoreOptions::default());
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
        let mut bench = Bench::new(size, StoreOptions::default());
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

fn main() {
    cpu();
    amplification(1 << 30);
    amplification(8 << 30);
}
