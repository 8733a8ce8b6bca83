//! Measures the CPU a request costs in the chunk server core: judging, store, answer, on a disk of plain memory.
//!
//! `cargo run --release -p cairn-cs --example cs_cpu`

use cairn_cs::{CsConfig, CsCore};
use cairn_env::{Buf, DiskDone, DiskOp, IoId};
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::{Store, StoreConfig, StoreOptions};
use cairn_types::*;
use cairn_wire::cs::CsRequest;
use cairn_wire::data::{DataOp, DataRequest};
use cairn_wire::mds::Location;
use cairn_wire::{DiskIndex, Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::BTreeMap;

const SIZE: u64 = 512 << 20;
const BLOCKS: u32 = 16_384;
const OPS: u64 = 400_000;
const LINK: LinkId = LinkId(LinkId::ACCEPTED | 1);

/// Plain memory, touched beforehand, so that only the copy of the data is added to what is measured.
struct MemoryDisk(Vec<u8>);

impl MemoryDisk {
    fn run(&mut self, io: IoId, op: DiskOp) -> DiskDone {
        let mut result = Buf::default();
        match op {
            DiskOp::Read { offset, len } => result = Buf::copy_from(&self.0[offset as usize..][..len as usize]),
            DiskOp::Write { offset, bufs } => {
                let mut at = offset as usize;
                for buf in bufs {
                    self.0[at..at + buf.len()].copy_from_slice(&buf);
                    at += buf.len();
                }
            }
            DiskOp::Flush | DiskOp::Discard { .. } => {}
        }
        DiskDone { io, result: Ok(result) }
    }
}

struct Bench {
    core: CsCore,
    disk: MemoryDisk,
    now: u64,
    out: Effects,
    answers: u64,
}

impl Bench {
    fn step(&mut self, event: Event) {
        let now = Now { mono: Instant(self.now), wall_ns: self.now };
        self.core.step(now, event, &mut self.out);
    }

    /// Ends a turn and runs the disk until it has nothing to do.
    fn turn(&mut self) {
        self.step(Event::Turn);
        while !self.out.disk.is_empty() {
            for (_, request) in std::mem::take(&mut self.out.disk) {
                let done = self.disk.run(request.io, request.op);
                self.step(Event::Disk(DiskIndex(0), done));
            }
            self.step(Event::Turn);
        }
        for effect in self.out.net.drain(..) {
            if let NetEffect::Send { prefix, .. } = &effect {
                self.answers += 1;
                assert!(!prefix.is_empty());
            }
        }
        self.out.log.clear();
    }

    fn frame(&mut self, kind: FrameKind, id: u64, prefix: Vec<u8>, payload: Buf) {
        self.step(Event::Net(NetEvent::Frame { link: LINK, frame: Frame { kind, id, prefix, payload } }));
    }

    fn call(&mut self, request: CsRequest) {
        self.frame(FrameKind::CsCall, 1, cairn_wire::encode(&request), Buf::default());
        self.turn();
    }
}

fn cpu_ns() -> u64 {
    // Nanoseconds this thread has spent on a CPU: the first figure of its schedstat.
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a Linux machine");
    text.split_whitespace().next().and_then(|figure| figure.parse().ok()).expect("a figure")
}

fn main() {
    let store_config = StoreConfig { cluster: ClusterId([1; 16]), store_uuid: [2; 16], capacity_bytes: 0 };
    let mut disk = MemoryDisk(vec![1; SIZE as usize]);
    disk.0.fill(0);
    for op in cairn_store::format(&store_config, SIZE).expect("large enough") {
        disk.run(IoId(0), op);
    }
    let config = CsConfig {
        cs: None,
        level: Level::CURRENT,
        cluster: ClusterId([1; 16]),
        store: [2; 16],
        addr: "127.0.0.1:1".parse().expect("an address"),
        location: Location::default(),
        tier: 0,
        capacity: 0,
        repository: String::new(),
        mds: Vec::new(),
        mds_known: Vec::new(),
        durable_always: false,
        scrub_chunks_per_minute: 0,
    };
    let core = CsCore::new(config, Store::new(SIZE, StoreOptions::default()), Rng::new(1));
    let mut bench = Bench { core, disk, now: 1, out: Effects::default(), answers: 0 };
    bench.step(Event::Start);
    bench.turn();
    bench.step(Event::Net(NetEvent::Up { link: LINK, peer: NodeId::Client(ClientId(1)), level: Level::CURRENT }));
    bench.call(CsRequest::Hello { session: 1, generation: 1 });
    let (volume, epoch, chunk) = (VolumeId(1), Epoch(1), ChunkId(1));
    bench.call(CsRequest::Fence { volume, epoch });
    let (layer, version) = (LayerId(1), ChunkVersion(1));
    bench.call(CsRequest::Create { chunk, volume, layer, index: 0, block_count: BLOCKS, version, epoch });
    let payload = Buf::copy_from(&[7; 4096]);
    let checksum = crc64(&payload);
    let mut rng = Rng::new(3);
    for batch in [1u64, 32] {
        for operation in [DataOp::Write, DataOp::Read] {
            let mut prefixes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            let before = bench.core.stats().writes;
            for n in 0..OPS {
                let is_write = operation == DataOp::Write;
                let request = DataRequest {
                    op: operation,
                    flags: 0,
                    volume,
                    chunk,
                    version,
                    epoch,
                    sequence: Sequence(if is_write { before + n + 1 } else { 0 }),
                    settled: Sequence(if is_write { (before + n).saturating_sub(4096) } else { 0 }),
                    first_block: rng.below(u64::from(BLOCKS)) as u32,
                    block_count: 1,
                    checksums: if is_write { vec![checksum] } else { Vec::new() },
                };
                let mut prefix = Vec::new();
                request.encode(&mut prefix);
                prefixes.insert(n, prefix);
            }
            let answers = bench.answers;
            let start = cpu_ns();
            for (n, prefix) in prefixes {
                let payload = if operation == DataOp::Write { payload.clone() } else { Buf::default() };
                bench.frame(FrameKind::Data, n, prefix, payload);
                if (n + 1) % batch == 0 {
                    bench.now += 10_000 * batch;
                    bench.turn();
                }
            }
            bench.turn();
            let spent = cpu_ns() - start;
            assert_eq!(bench.answers - answers, OPS, "every request was answered");
            println!("{operation:?} 4 KiB, {batch} in flight: {} ns of CPU", spent / OPS);
        }
    }
}
