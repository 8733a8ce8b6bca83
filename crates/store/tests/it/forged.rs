//! I19: bytes with good checksums and impossible content make the store refuse, not panic.

use crate::harness::*;
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::*;
use cairn_types::*;

const SUPERBLOCKS: [u64; 4] = [0, 1, 256, 257];

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn page(disk: &SimDisk, slot: u64) -> Vec<u8> {
    disk.peek(slot * BLOCK as u64, BLOCK as u32).to_vec()
}

/// Writes a superblock or group header with its checksum made good.
fn seal(disk: &mut SimDisk, slot: u64, mut bytes: Vec<u8>) {
    let checksum = crc64(&bytes[16..]);
    bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
    disk.poke(slot * BLOCK as u64, &bytes);
}

fn mutate(bytes: &mut [u8], rng: &mut Rng, from: usize, to: usize) {
    for _ in 0..1 + rng.below(3) {
        let at = from + rng.below((to - from) as u64) as usize;
        match rng.below(3) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next_u64() as u8,
            _ => bytes[at..(at + 8).min(to)].fill(if rng.chance(1, 2) { 0xff } else { 0 }),
        }
    }
}

fn try_everything(disk: SimDisk) {
    let report = World::on(disk.clone(), 1, options()).doctor(true);
    let mut world = World::on(disk, 1, StoreOptions { cluster: None, store_uuid: None, ..tight_options() });
    if world.open().is_err() {
        return;
    }
    let chunks: Vec<(ChunkId, u32)> = world.store.chunks().map(|(id, info)| (id, info.block_count)).collect();
    for (chunk, block_count) in chunks {
        for first_block in (0..block_count.min(1024)).step_by(64) {
            let _ = world.call(StoreRequest::Verify { chunk, from_block: first_block, limit: 64 });
        }
        for stamp in 1..20 {
            let _ = world.call(write(chunk.0, stamp % block_count.max(1), 1, u64::from(stamp), false));
        }
        let _ = world.call(StoreRequest::Checkpoint);
        let _ = world.call(StoreRequest::DeleteChunk { chunk });
    }
    let _ = world.call(StoreRequest::Checkpoint);
    drop(report);
}

#[test]
fn forged_structures_with_good_checksums_never_make_the_store_panic() {
    let mut world = World::new(16 << 20, 1, options());
    for chunk in 1..=3 {
        world.create(chunk, 5, 600).unwrap();
        world.call(write(chunk, 0, 100, chunk, true)).unwrap();
    }
    world.call(StoreRequest::Fence { volume: VolumeId(8), epoch: Epoch(1) }).unwrap();
    world.call(StoreRequest::Checkpoint).unwrap();
    world.call(write(1, 50, 10, 9, true)).unwrap();
    world.call(unmap(2, 50, 10, 10)).unwrap();
    world.call(StoreRequest::DeleteChunk { chunk: ChunkId(3) }).unwrap();
    let base = world.disk.clone();
    let headers: Vec<u64> = {
        let pages = base.written_pages();
        pages.into_iter().filter(|slot| page(&base, *slot).starts_with(b"CAIRNGRP")).collect()
    };
    let newest = *SUPERBLOCKS.iter().max_by_key(|slot| word(&page(&base, **slot), 64)).unwrap();
    for seed in 0..crate::crash::seeds(400) {
        let mut rng = Rng::new(seed);
        let mut disk = base.clone();
        match rng.below(6) {
            0 => {
                let mut bytes = page(&disk, newest);
                mutate(&mut bytes, &mut rng, 16, 224);
                SUPERBLOCKS.iter().for_each(|slot| seal(&mut disk, *slot, bytes.clone()));
            }
            1 | 2 => {
                let slot = *rng.choose(&headers).unwrap();
                let mut bytes = page(&disk, slot);
                mutate(&mut bytes, &mut rng, 32, 300);
                seal(&mut disk, slot, bytes);
            }
            tree => {
                // The four trees have one page each: the pointer is in the superblock, bound by exclusive or.
                let tree = ((tree - 3) as usize + rng.below(2) as usize) % 4;
                let mut root = page(&disk, newest);
                let at = 128 + tree * 24;
                let slot = word(&root, at + 8);
                if slot == 0 {
                    continue;
                }
                let old = page(&disk, slot);
                let mut new = old.clone();
                mutate(&mut new, &mut rng, 0, 300);
                let checksum = word(&root, at + 16) ^ crc64(&old) ^ crc64(&new);
                root[at + 16..at + 24].copy_from_slice(&checksum.to_le_bytes());
                disk.poke(slot * BLOCK as u64, &new);
                SUPERBLOCKS.iter().for_each(|slot| seal(&mut disk, *slot, root.clone()));
            }
        }
        try_everything(disk);
    }
}
