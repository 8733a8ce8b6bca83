//! The plain path: create, write, read, flush, reopen.

use crate::harness::*;
use cairn_store::*;
use cairn_types::*;

const MIB: u64 = 1 << 20;

#[test]
fn what_was_written_is_read_now_and_after_reopening() {
    let mut world = World::new(32 * MIB, 1, options());
    world.create(1, 5, 1024).unwrap();
    assert!(matches!(world.create(1, 5, 1024), Err(StoreError::Exists { .. })));
    for i in 0..40u32 {
        world.call(write(1, i * 7, 3, u64::from(i) + 1, false)).unwrap();
    }
    world.call(unmap(1, 0, 2, 100)).unwrap();
    let before = world.dump();
    assert_eq!(before[&(ChunkId(1), 2)], 1);
    assert_eq!(before[&(ChunkId(1), 1)], 0);
    assert_eq!(before[&(ChunkId(1), 3)], 0);
    let info = world.store.chunk(ChunkId(1)).unwrap().clone();
    assert_eq!(info.mapped_blocks, 118);
    assert!(matches!(world.call(StoreRequest::Flush), Ok(StoreReply::Flushed { .. })));
    let report = world.open().unwrap();
    assert!(report.groups_replayed > 40 && !report.torn_tail, "{report:?}");
    assert_eq!(world.dump(), before);
    assert_eq!(world.call(StoreRequest::Checkpoint), Ok(StoreReply::Done));
    let report = world.open().unwrap();
    assert_eq!((report.groups_replayed, report.generation), (0, 2));
    assert_eq!(world.dump(), before);
    assert_eq!(world.store.chunk(ChunkId(1)), Some(&info));
    assert_eq!(world.store.tail(VolumeId(5)).count(), 41);
}

#[test]
fn thirty_two_queued_writes_become_one_device_write() {
    let mut world = World::new(32 * MIB, 2, options());
    world.create(1, 5, 1024).unwrap();
    world.call(write(1, 0, 1, 1, false)).unwrap();
    let before = world.disk.completed[1];
    for i in 0..32 {
        world.submit(write(1, i * 3, 1, u64::from(i) + 2, false));
    }
    world.settle();
    assert_eq!(world.disk.completed[1] - before, 1);
}

#[test]
fn long_random_overwrites_pass_through_many_checkpoints() {
    let mut world = World::new(32 * MIB, 3, tight_options());
    for chunk in 1..=4 {
        world.create(chunk, 5, 1000).unwrap();
    }
    let mut rng = cairn_stdx::Rng::new(9);
    let mut model = std::collections::BTreeMap::new();
    for stamp in 1..3000u64 {
        let (chunk, first, count) = (1 + rng.below(4), rng.below(990) as u32, 1 + rng.below(10) as u32);
        world.submit(write(chunk, first, count, stamp, false));
        model.extend((first..first + count).map(|b| ((ChunkId(chunk), b), stamp)));
        if rng.chance(1, 8) {
            world.turn();
            world.step();
        }
        if stamp % 500 == 0 {
            world.settle();
            assert!(world.dump().into_iter().filter(|(_, s)| *s > 0).eq(model.clone()), "at {stamp}");
            world.open().unwrap();
            assert!(world.dump().into_iter().filter(|(_, s)| *s > 0).eq(model.clone()), "reopened at {stamp}");
        }
    }
    world.settle();
    assert!(world.answers.values().all(|answer| answer.is_ok()));
    assert!(world.store.stats().generation > 20, "{:?}", world.store.stats());
}
