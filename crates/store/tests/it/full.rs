//! I16: at 100 % full the store is calm.

use crate::harness::*;
use cairn_stdx::Rng;
use cairn_store::*;
use cairn_types::*;

const VOLUME: u64 = 5;

fn fill(world: &mut World, stamp: &mut u64) -> u64 {
    let mut refused = 0;
    let mut written = 0;
    for chunk in 1..=12u64 {
        for first in (0..1024u32).step_by(16) {
            *stamp += 1;
            match world.call(write(chunk, first, 16, *stamp, false)) {
                Ok(_) => written += 1,
                Err(StoreError::NoSpace) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(refused > 0, "the disk was meant to run full");
    written
}

#[test]
fn a_full_store_overwrites_unmaps_deletes_fences_and_fills_again() {
    let mut world = World::new(32 << 20, 1, tight_options());
    let mut stamp = 0;
    let mut rng = Rng::new(6);
    for chunk in 1..=12 {
        world.create(chunk, VOLUME, 1024).unwrap();
    }
    for cycle in 0..5u64 {
        let written = fill(&mut world, &mut stamp);
        let stats = world.store.stats();
        assert!(stats.free_bytes < 40 * 4096, "cycle {cycle}: {stats:?}");
        assert!(written > 0);
        let before = world.dump();
        // Overwriting takes no more space than there was.
        let mapped: Vec<(ChunkId, u32)> = before.iter().filter(|(_, s)| **s > 0).map(|(k, _)| *k).collect();
        let mut expected = before.clone();
        for _ in 0..600 {
            stamp += 1;
            let (chunk, block) = *rng.choose(&mapped).unwrap();
            world.call(write(chunk.0, block, 1, stamp, false)).unwrap_or_else(|e| panic!("cycle {cycle}: {e}"));
            expected.insert((chunk, block), stamp);
        }
        world.call(StoreRequest::Fence { volume: VolumeId(9), epoch: Epoch(cycle + 1) }).unwrap();
        world.call(StoreRequest::SetVersion { chunk: ChunkId(1), version: ChunkVersion(cycle + 2) }).unwrap();
        world.call(StoreRequest::Flush).unwrap();
        if cycle % 2 == 0 {
            world.disk.power_cut(&mut world.rng);
            world.open().unwrap();
        }
        assert_eq!(world.dump(), expected, "cycle {cycle}");
        let deleted = 1 + cycle % 12;
        world.call(StoreRequest::DeleteChunk { chunk: ChunkId(deleted) }).unwrap();
        world.call(unmap(3 + cycle, 0, 1024, stamp)).unwrap();
        let after = world.store.stats();
        assert!(after.free_bytes > stats.free_bytes + 900 * 4096, "cycle {cycle}: space came back: {after:?}");
        let settle = StoreRequest::Settle { volume: VolumeId(VOLUME), epoch: Epoch(1), sequence: Sequence(stamp) };
        world.call(settle).unwrap();
        world.call(create(deleted, VOLUME, 1024)).unwrap();
    }
    let report = world.doctor(true);
    assert!(report.is_healthy(), "{report}");
}

/// Overwrites take slots until a checkpoint gives back those they replace. A group of them must not use up what is
/// free and have the next one refused.
#[test]
fn a_full_store_refuses_no_overwrite_behind_other_overwrites() {
    let mut world = World::new(16 << 20, 4, options());
    for chunk in 1..=12 {
        world.create(chunk, VOLUME, 1024).unwrap();
    }
    let mut stamp = 0;
    fill(&mut world, &mut stamp);
    let mut expected = world.dump();
    let mapped: Vec<(ChunkId, u32)> = expected.iter().filter(|(_, s)| **s > 0).map(|(k, _)| *k).collect();
    // They were written in runs of this length.
    let runs: Vec<(ChunkId, u32)> = mapped.into_iter().filter(|(_, block)| block % 16 == 0).collect();
    for _ in 0..3 {
        // Nothing is quarantined and nothing under way.
        world.call(StoreRequest::Checkpoint).unwrap();
        for (chunk, first) in &runs {
            stamp += 1;
            world.submit(write(chunk.0, *first, 16, stamp, false));
            expected.extend((*first..first + 16).map(|block| ((*chunk, block), stamp)));
        }
        world.settle();
        for (token, answer) in std::mem::take(&mut world.answers) {
            assert!(answer.is_ok(), "{token}: {answer:?}");
        }
    }
    assert_eq!(world.dump(), expected);
    assert!(world.doctor(true).is_healthy());
}

#[test]
fn a_full_store_stays_full_and_correct_through_crashes() {
    let mut world = World::new(16 << 20, 2, tight_options());
    for chunk in 1..=12 {
        world.create(chunk, VOLUME, 1024).unwrap();
    }
    let mut stamp = 0;
    fill(&mut world, &mut stamp);
    world.call(StoreRequest::Flush).unwrap();
    let mut rng = Rng::new(3);
    for round in 0..30 {
        let before = world.dump();
        let mapped: Vec<(ChunkId, u32)> = before.iter().filter(|(_, s)| **s > 0).map(|(k, _)| *k).collect();
        let mut issued = before.clone();
        for _ in 0..rng.below(80) {
            stamp += 1;
            let (chunk, block) = *rng.choose(&mapped).unwrap();
            world.submit(write(chunk.0, block, 1, stamp, false));
            issued.insert((chunk, block), stamp);
            if rng.chance(1, 8) {
                world.turn();
                world.step();
            }
        }
        world.disk.power_cut(&mut world.rng);
        world.answers.clear();
        world.open().unwrap_or_else(|error| panic!("round {round}: {error}"));
        for (key, found) in world.dump() {
            assert!(found >= before[&key] && found <= issued[&key], "round {round}: {key:?} shows {found}");
        }
        let report = world.doctor(false);
        assert!(report.is_healthy(), "round {round}: {report}");
    }
}
