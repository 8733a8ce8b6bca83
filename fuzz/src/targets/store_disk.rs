//! The disk of a chunk server, damaged: opened, examined by the doctor, used.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, script, seed, unsealed};
use cairn_env::{Buf, DiskRequest, IoId};
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::{Store, StoreConfig, StoreOptions, StoreOutput, StoreRequest, doctor, format};
use cairn_types::{BLOCK_SIZE, ChunkId, ChunkVersion, ClusterId, Epoch, Instant, LayerId, Sequence, VolumeId};
use std::cell::RefCell;
use std::collections::BTreeSet;

pub const TARGET: Target = Target {
    name: "store_disk",
    covers: "superblocks, group headers and records, metadata trees, index leaves: patches of a good disk with \
             checksums made good; then `cairn doctor cs`, and a chunk server's use of what opened",
    entry: "cairn_store::{Store::start, doctor::check}",
    shape: Shape::Script,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

const NOW: Instant = Instant(0);
const SIZE: u64 = 16 << 20;
const PAGE: usize = BLOCK_SIZE;
const CLUSTER: ClusterId = ClusterId([9; 16]);
const SUPERBLOCKS: [u64; 4] = [0, 1, 256, 257];
/// Where a superblock keeps the pointer of its first tree: pages, slot, checksum.
const TREES_AT: usize = 128;
const TREES: usize = 4;

/// A store that is driven to rest after each call.
struct Bench {
    disk: SimDisk,
    store: Store,
    out: StoreOutput,
    rng: Rng,
    token: u64,
}

impl Bench {
    fn over(disk: SimDisk, options: StoreOptions) -> Self {
        let store = Store::new(disk.size(), options);
        Self { disk, store, out: StoreOutput::default(), rng: Rng::new(1), token: 0 }
    }

    fn open(&mut self) -> bool {
        self.store.start(NOW, &mut self.out);
        loop {
            self.pass_on();
            if let Some(opened) = self.out.opened.take() {
                if let Err(error) = &opened {
                    let _ = error.to_string();
                }
                return opened.is_ok();
            }
            let done = self.disk.complete_next(&mut self.rng).expect("opening waits for nothing");
            self.store.disk_done(NOW, done, &mut self.out);
            self.store.turn(NOW, &mut self.out);
        }
    }

    fn pass_on(&mut self) {
        self.out.disk.drain(..).for_each(|request| self.disk.submit(request));
        self.out.done.clear();
        self.out.notices.clear();
    }

    fn call(&mut self, request: StoreRequest) {
        self.token += 1;
        self.store.submit(NOW, self.token, request, &mut self.out);
        loop {
            self.store.turn(NOW, &mut self.out);
            self.pass_on();
            let Some(done) = self.disk.complete_next(&mut self.rng) else { break };
            self.store.disk_done(NOW, done, &mut self.out);
        }
    }
}

fn write(chunk: u64, first_block: u32, count: u32, sequence: u64) -> StoreRequest {
    let data = Buf::copy_from(&vec![sequence as u8; count as usize * PAGE]);
    StoreRequest::Write {
        chunk: ChunkId(chunk),
        version: ChunkVersion(1),
        epoch: Epoch(1),
        sequence: Sequence(sequence),
        first_block,
        checksums: data.chunks_exact(PAGE).map(crc64).collect(),
        data,
        durable: false,
    }
}

fn create(chunk: u64) -> StoreRequest {
    StoreRequest::CreateChunk {
        chunk: ChunkId(chunk),
        volume: VolumeId(5),
        layer: LayerId(1),
        index: chunk,
        block_count: 600,
        version: ChunkVersion(1),
        tag: vec![chunk as u8; 5],
    }
}

fn unmap(chunk: u64, sequence: u64) -> StoreRequest {
    StoreRequest::Unmap {
        chunk: ChunkId(chunk),
        version: ChunkVersion(1),
        epoch: Epoch(1),
        sequence: Sequence(sequence),
        first_block: 50,
        block_count: 10,
        durable: false,
    }
}

/// A disk with a checkpoint and groups after it, and the places of its metadata.
struct Base {
    disk: SimDisk,
    headers: Vec<u64>,
    leaves: Vec<u64>,
    newest: u64,
}

fn page(disk: &SimDisk, slot: u64) -> Vec<u8> {
    disk.peek(slot * PAGE as u64, PAGE as u32).to_vec()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn good() -> Base {
    let mut disk = SimDisk::new(SIZE);
    let config = StoreConfig { cluster: CLUSTER, store_uuid: [7; 16], capacity_bytes: 0 };
    for (io, op) in format(&config, SIZE).expect("the size suits").into_iter().enumerate() {
        disk.submit(DiskRequest { io: IoId(io as u64), op });
        disk.complete(IoId(io as u64)).expect("asked for").result.expect("no faults");
    }
    let mut bench = Bench::over(disk, StoreOptions::default());
    assert!(bench.open(), "a fresh store opens");
    for chunk in 1..=3 {
        bench.call(create(chunk));
        bench.call(write(chunk, 0, 40, chunk));
        bench.call(write(chunk, 300, 3, chunk + 10));
    }
    bench.call(StoreRequest::Fence { volume: VolumeId(8), epoch: Epoch(1) });
    bench.call(StoreRequest::Checkpoint);
    bench.call(write(1, 50, 10, 20));
    bench.call(unmap(2, 21));
    bench.call(StoreRequest::Flush);
    bench.call(StoreRequest::SetVersion { chunk: ChunkId(2), version: ChunkVersion(2) });
    bench.call(StoreRequest::SetTag { chunk: ChunkId(2), tag: vec![1; 40] });
    bench.call(StoreRequest::DeleteChunk { chunk: ChunkId(3) });
    bench.call(StoreRequest::Fence { volume: VolumeId(5), epoch: Epoch(2) });
    let disk = bench.disk;
    let pages = disk.written_pages();
    let headers = pages.iter().copied().filter(|slot| page(&disk, *slot).starts_with(b"CAIRNGRP")).collect();
    let newest = SUPERBLOCKS.into_iter().max_by_key(|slot| word(&page(&disk, *slot), 64)).expect("four of them");
    // Leaves are what the chunk tree points at: five bytes of slot, eight of checksum.
    let root = page(&disk, newest);
    let tree_pages: Vec<Vec<u8>> = (0..TREES).map(|tree| page(&disk, word(&root, TREES_AT + tree * 24 + 8))).collect();
    let written: BTreeSet<u64> = pages.into_iter().collect();
    let is_leaf = |slot: u64| {
        slot > 257
            && written.contains(&slot)
            && tree_pages.iter().any(|page| page.windows(5).any(|bytes| bytes == &slot.to_le_bytes()[..5]))
    };
    let leaves = written.iter().copied().filter(|slot| is_leaf(*slot)).take(16).collect();
    Base { disk, headers, leaves, newest }
}

thread_local! {
    static BASE: RefCell<Option<Base>> = const { RefCell::new(None) };
}

/// Writes a superblock or group header with its checksum made good.
fn seal_page(disk: &mut SimDisk, slot: u64, mut bytes: Vec<u8>, sealed: bool) {
    if sealed {
        let checksum = crc64(&bytes[16..]);
        bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
    }
    disk.poke(slot * PAGE as u64, &bytes);
}

fn patched(mut bytes: Vec<u8>, piece: &[u8]) -> Vec<u8> {
    let [low, high, patch @ ..] = piece else { return bytes };
    let at = usize::from(u16::from_le_bytes([*low, *high])) % PAGE;
    let end = (at + patch.len()).min(PAGE);
    bytes[at..end].copy_from_slice(&patch[..end - at]);
    bytes
}

/// Applies one patch. The low two bits of the kind: superblock, group header, tree page, leaf; the next four which one;
/// bit 7 leaves checksums alone.
fn patch(base: &Base, disk: &mut SimDisk, kind: u8, piece: &[u8]) {
    let (which, sealed) = (usize::from(kind >> 2 & 15), kind & 128 == 0);
    let root_slot = base.newest;
    match kind & 3 {
        0 => {
            let bytes = patched(page(disk, root_slot), piece);
            SUPERBLOCKS.into_iter().for_each(|slot| seal_page(disk, slot, bytes.clone(), sealed));
        }
        1 => {
            let slot = base.headers[which % base.headers.len()];
            let bytes = patched(page(disk, slot), piece);
            seal_page(disk, slot, bytes, sealed);
        }
        2 => patch_tree(disk, root_slot, which % TREES, sealed, &mut |bytes| patched(bytes, piece)),
        _ => {
            let Some(&slot) = base.leaves.get(which % base.leaves.len().max(1)) else { return };
            let old = page(disk, slot);
            let new = patched(old.clone(), piece);
            disk.poke(slot * PAGE as u64, &new);
            let change = crc64(&old) ^ crc64(&new);
            for tree in 0..TREES {
                patch_tree(disk, root_slot, tree, sealed, &mut |mut bytes| {
                    let found = bytes.windows(5).position(|window| window == &slot.to_le_bytes()[..5]);
                    if let Some(at) = found.filter(|at| at + 13 <= PAGE) {
                        let checksum = word(&bytes, at + 5) ^ change;
                        bytes[at + 5..at + 13].copy_from_slice(&checksum.to_le_bytes());
                    }
                    bytes
                });
            }
        }
    }
}

/// Changes the one page of a tree and its checksum in the superblock, which is bound by exclusive or.
fn patch_tree(
    disk: &mut SimDisk,
    root_slot: u64,
    tree: usize,
    sealed: bool,
    change: &mut dyn FnMut(Vec<u8>) -> Vec<u8>,
) {
    let mut root = page(disk, root_slot);
    let at = TREES_AT + tree * 24;
    let slot = word(&root, at + 8);
    if slot == 0 || slot >= SIZE / PAGE as u64 {
        return;
    }
    let old = page(disk, slot);
    let new = change(old.clone());
    disk.poke(slot * PAGE as u64, &new);
    if sealed {
        let checksum = word(&root, at + 16) ^ crc64(&old) ^ crc64(&new);
        root[at + 16..at + 24].copy_from_slice(&checksum.to_le_bytes());
        SUPERBLOCKS.into_iter().for_each(|slot| seal_page(disk, slot, root.clone(), true));
    }
}

fn run(bytes: &[u8]) {
    BASE.with(|cell| {
        let mut cell = cell.borrow_mut();
        let base = cell.get_or_insert_with(good);
        let mut disk = base.disk.clone();
        for (kind, piece) in script::pieces(bytes) {
            patch(base, &mut disk, kind, piece);
        }
        open_and_use(disk);
    });
}

fn open_and_use(disk: SimDisk) {
    let report =
        measured(SIZE as usize, || doctor::check(&mut |offset, len| Ok(disk.peek(offset, len)), disk.size(), true));
    let _ = (report.to_string(), report.is_healthy());
    let options =
        StoreOptions { cache_bytes: 1, dirty_leaves_max: 12, chain_groups_max: 24, ..StoreOptions::default() };
    let mut bench = Bench::over(disk, options);
    if !measured(SIZE as usize, || bench.open()) {
        return;
    }
    let chunks: Vec<(ChunkId, u32)> = bench.store.chunks().map(|(id, info)| (id, info.block_count)).take(8).collect();
    let volumes: Vec<VolumeId> = bench.store.volumes().take(8).collect();
    for volume in volumes {
        let _ = (bench.store.tail(volume).count(), bench.store.settled(volume), bench.store.fence(volume));
    }
    for (chunk, block_count) in chunks {
        for from_block in (0..block_count.min(1024)).step_by(256) {
            bench.call(StoreRequest::Verify { chunk, from_block, limit: 256 });
        }
        bench.call(StoreRequest::Read { chunk, first_block: 0, block_count: block_count.min(64) });
        bench.call(write(chunk.0, 7 % block_count.max(1), 1, 90));
        bench.call(StoreRequest::Checkpoint);
        bench.call(StoreRequest::DeleteChunk { chunk });
    }
    bench.call(create(77));
    bench.call(StoreRequest::Checkpoint);
}

/// Patches that write what stands there already: mutations start from good fields.
fn seeds() -> Seeds {
    let base = good();
    let disk = &base.disk;
    let copy =
        |slot: u64, at: usize, len: usize| [&(at as u16).to_le_bytes()[..], &page(disk, slot)[at..at + len]].concat();
    let root = page(disk, base.newest);
    let mut seeds = vec![seed("good", Vec::new())];
    seeds.push(seed("superblock", script::script([(0, &copy(base.newest, 16, 240)[..])])));
    for which in 0..base.headers.len().min(16) {
        let piece = copy(base.headers[which], 16, 384);
        seeds.push(seed(&format!("group_{which}"), script::script([(1 | (which as u8) << 2, &piece[..])])));
    }
    for tree in 0..TREES {
        let slot = word(&root, TREES_AT + tree * 24 + 8);
        if slot != 0 {
            let piece = copy(slot, 0, 300);
            seeds.push(seed(&format!("tree_{tree}"), script::script([(2 | (tree as u8) << 2, &piece[..])])));
        }
    }
    for which in 0..base.leaves.len().min(3) {
        let piece = copy(base.leaves[which], 0, 200);
        seeds.push(seed(&format!("leaf_{which}"), script::script([(3 | (which as u8) << 2, &piece[..])])));
    }
    seeds
}
