//! What each request means, beyond reading back what was written.

use crate::harness::*;
use cairn_env::IoId;
use cairn_store::*;
use cairn_types::*;

const MIB: u64 = 1 << 20;
const CHUNK: ChunkId = ChunkId(1);
const VOLUME: VolumeId = VolumeId(5);

fn changed(world: &mut World, version: u64) -> Vec<(u32, u32, bool)> {
    let mut all = Vec::new();
    let mut from_block = 0;
    loop {
        let request = StoreRequest::ChangedSince { chunk: CHUNK, version: ChunkVersion(version), from_block, limit: 3 };
        let Ok(StoreReply::Changed { ranges, next }) = world.call(request) else { panic!("no change list") };
        all.extend(ranges.iter().map(|r| (r.first_block, r.block_count, r.mapped)));
        match next {
            Some(next) => from_block = next,
            None => return all,
        }
    }
}

#[test]
fn a_new_version_restamps_the_tail_and_nothing_else() {
    let mut world = World::new(32 * MIB, 1, options());
    world.create(1, VOLUME.0, 2000).unwrap();
    world.call(write(1, 10, 4, 1, true)).unwrap();
    world.call(write(1, 600, 2, 2, true)).unwrap();
    let settle = StoreRequest::Settle { volume: VOLUME, epoch: Epoch(1), sequence: Sequence(1) };
    world.call(settle).unwrap();
    world.call(unmap(1, 900, 3, 3)).unwrap();
    world.call(StoreRequest::SetVersion { chunk: CHUNK, version: ChunkVersion(2) }).unwrap();
    for reopened in [false, true] {
        assert_eq!(changed(&mut world, 1), [(600, 2, true), (900, 3, false)], "reopened {reopened}");
        assert_eq!(changed(&mut world, 0), [(10, 4, true), (600, 2, true), (900, 3, false)]);
        assert_eq!(world.store.chunk(CHUNK).unwrap().version, ChunkVersion(2));
        assert_eq!(world.store.tail_latest(CHUNK, 601), Some((Epoch(1), Sequence(2))));
        if !reopened {
            world.open().unwrap();
        }
    }
    world.call(StoreRequest::Checkpoint).unwrap();
    world.open().unwrap();
    assert_eq!(changed(&mut world, 1), [(600, 2, true), (900, 3, false)]);
}

#[test]
fn the_tail_lists_unsettled_writes_in_order_and_shrinks_with_the_mark() {
    let mut world = World::new(32 * MIB, 1, options());
    world.create(1, VOLUME.0, 500).unwrap();
    for stamp in 1..=6 {
        world.call(write(1, stamp as u32 * 2, 3, stamp, false)).unwrap();
    }
    world.call(unmap(1, 0, 300, 7)).unwrap();
    let listed = |world: &World| -> Vec<(u64, u32, u32, bool)> {
        let tail = world.store.tail(VOLUME);
        tail.map(|e| (e.sequence.0, e.first_block, e.block_count, e.unmap)).collect()
    };
    assert_eq!(listed(&world).len(), 7);
    let settle = |sequence| StoreRequest::Settle { volume: VOLUME, epoch: Epoch(1), sequence: Sequence(sequence) };
    world.call(settle(5)).unwrap();
    assert_eq!(listed(&world), [(6, 12, 3, false), (7, 0, 300, true)]);
    assert_eq!(world.store.tail_latest(CHUNK, 12), Some((Epoch(1), Sequence(7))));
    assert_eq!(world.store.settled(VOLUME), (Epoch(1), Sequence(5)));
    world.call(settle(3)).unwrap();
    assert_eq!(world.store.settled(VOLUME), (Epoch(1), Sequence(5)));
    // The mark travels with the next group.
    world.call(write(1, 400, 1, 8, true)).unwrap();
    world.open().unwrap();
    assert_eq!(listed(&world), [(6, 12, 3, false), (7, 0, 300, true), (8, 400, 1, false)]);
    assert_eq!(world.store.settled(VOLUME), (Epoch(1), Sequence(5)));
    world.call(settle(8)).unwrap();
    assert_eq!((listed(&world).len(), world.store.tail_latest(CHUNK, 12)), (0, None));
}

/// I5: a write that waits for an index leaf while its epoch is fenced off must not enter the log afterwards.
pub fn fence_overtakes_a_waiting_write() {
    let mut world = World::new(32 * MIB, 1, tight_options());
    world.create(1, VOLUME.0, 65_536).unwrap();
    for leaf in 0..200u32 {
        world.call(write(1, leaf * 256, 1, 1 + u64::from(leaf), false)).unwrap();
    }
    world.call(StoreRequest::Checkpoint).unwrap();
    let early = world.submit(write(1, 0, 1, 900, false));
    let reads = world.disk.pending().count();
    assert!(reads > 0, "the write waits for its leaf");
    let fence = world.submit(StoreRequest::Fence { volume: VOLUME, epoch: Epoch(2) });
    world.settle();
    assert_eq!(world.answers.remove(&fence), Some(Ok(StoreReply::Done)));
    let answer = world.answers.remove(&early);
    assert!(matches!(answer, Some(Err(StoreError::StaleEpoch { .. }))), "I5: {answer:?}");
    assert_eq!(world.read_stamps(CHUNK, 0, 1).unwrap(), [1]);
    let lower = world.call(StoreRequest::Fence { volume: VOLUME, epoch: Epoch(1) });
    assert!(matches!(lower, Err(StoreError::StaleEpoch { .. })));
    world.open().unwrap();
    assert_eq!(world.store.fence(VOLUME), Some(Epoch(2)));
    world.call(StoreRequest::DeleteChunk { chunk: CHUNK }).unwrap();
    world.call(StoreRequest::ForgetVolume { volume: VOLUME }).unwrap();
    world.open().unwrap();
    assert_eq!(world.store.fence(VOLUME), None);
}

#[test]
fn a_fence_overtakes_a_write_that_waits() {
    fence_overtakes_a_waiting_write();
}

/// A read in flight sees the block it was sent for, however often its slot could have been used again meanwhile.
pub fn slow_read_keeps_its_slot() {
    let mut world = World::new(16 * MIB, 1, tight_options());
    world.create(1, VOLUME.0, 4096).unwrap();
    let mut stamp = 1;
    // Nearly full, so that every free slot is used again and again.
    while world.store.stats().free_bytes > 100 * 4096 {
        world.call(write(1, stamp as u32 * 8, 8, stamp, false)).unwrap();
        stamp += 1;
    }
    let before: Vec<IoId> = world.disk.pending().collect();
    let token = world.submit(StoreRequest::Read { chunk: CHUNK, first_block: 64, block_count: 8 });
    let mut held: Vec<IoId> = world.disk.pending().filter(|io| !before.contains(io)).collect();
    if held.len() == 1 && world.disk.pending().count() == 1 {
        // Perhaps the leaf had to come first: let it, then hold the data reads.
        let done = world.disk.complete(held[0]).unwrap();
        world.store.disk_done(NOW, done, &mut world.out);
        world.turn();
        held = world.disk.pending().collect();
    }
    if world.answers.contains_key(&token) {
        let token = world.submit(StoreRequest::Read { chunk: CHUNK, first_block: 64, block_count: 8 });
        held = world.disk.pending().collect();
        overwrite_and_finish(&mut world, token, &held);
    } else {
        overwrite_and_finish(&mut world, token, &held);
    }
}

fn overwrite_and_finish(world: &mut World, token: u64, held: &[IoId]) {
    assert!(!held.is_empty(), "the read is in flight");
    for stamp in 5000..5600u64 {
        world.submit(write(1, 64 + (stamp % 32) as u32, 8, stamp, false));
        if stamp % 4 == 0 {
            world.settle_except(held);
        }
    }
    world.settle();
    let Some(Ok(StoreReply::Data(data))) = world.answers.remove(&token) else { panic!("I2: the slow read failed") };
    assert!(stamps(CHUNK, 64, &data).iter().all(|stamp| *stamp < 5000));
}

#[test]
fn a_slow_read_keeps_its_slot_from_being_reused() {
    slow_read_keeps_its_slot();
}

/// A group that recovery dropped must not come back when the next session happens to leave room for it in the chain.
pub fn lost_group_stays_lost() {
    let mut world = World::new(16 * MIB, 1, options());
    world.create(1, VOLUME.0, 100).unwrap();
    world.call(write(1, 0, 1, 1, true)).unwrap();
    world.submit(unmap(1, 5, 1, 2));
    world.turn();
    let first: Vec<IoId> = world.disk.pending().collect();
    world.submit(write(1, 0, 1, 3, false));
    world.turn();
    world.settle_except(&first);
    // The second group reached the medium, the first did not.
    let header = world.disk.unflushed_pages()[0];
    world.disk.power_cut_choose(&mut |page, _, versions| if page == header { 0 } else { versions });
    assert!(world.open().unwrap().torn_tail);
    assert_eq!(world.read_stamps(CHUNK, 0, 1).unwrap(), [1]);
    world.open().unwrap();
    assert_eq!(world.read_stamps(CHUNK, 0, 1).unwrap(), [1], "I3: a lost write came back");
}

#[test]
fn a_lost_group_stays_lost() {
    lost_group_stays_lost();
}

#[test]
fn requests_that_make_no_sense_are_refused_with_the_reason() {
    let mut world = World::new(32 * MIB, 1, options());
    world.create(1, VOLUME.0, 100).unwrap();
    let read = |first_block, block_count| StoreRequest::Read { chunk: CHUNK, first_block, block_count };
    for request in [
        read(99, 2),
        read(0, 0),
        read(0, 300),
        write(1, 98, 3, 1, false),
        write(1, u32::MAX, 1, 1, false),
        unmap(1, 90, 11, 1),
        create(2, 1, 0),
        create(2, 1, 70_000),
        StoreRequest::SetTag { chunk: CHUNK, tag: vec![0; 513] },
        StoreRequest::SetVersion { chunk: CHUNK, version: ChunkVersion(1 << 24) },
        StoreRequest::ForgetVolume { volume: VOLUME },
    ] {
        let answer = world.call(request.clone());
        assert!(matches!(answer, Err(StoreError::Invalid { .. })), "{request:?}: {answer:?}");
    }
    for request in [
        write(9, 0, 1, 1, false),
        StoreRequest::Read { chunk: ChunkId(9), first_block: 0, block_count: 1 },
        StoreRequest::DeleteChunk { chunk: ChunkId(9) },
        StoreRequest::Verify { chunk: ChunkId(9), from_block: 0, limit: 1 },
    ] {
        assert_eq!(world.call(request), Err(StoreError::NoChunk { chunk: ChunkId(9) }));
    }
}

#[test]
fn changes_of_one_chunk_keep_their_order_through_create_and_delete() {
    let mut world = World::new(32 * MIB, 1, options());
    let tokens: Vec<u64> = [
        create(1, 5, 100),
        write(1, 0, 1, 1, false),
        StoreRequest::SetTag { chunk: CHUNK, tag: b"map".to_vec() },
        StoreRequest::SetVersion { chunk: CHUNK, version: ChunkVersion(3) },
        write(1, 1, 1, 2, false),
        StoreRequest::DeleteChunk { chunk: CHUNK },
        write(1, 2, 1, 3, false),
        create(2, 5, 100),
    ]
    .into_iter()
    .map(|request| world.submit(request))
    .collect();
    world.settle();
    let answers: Vec<Answer> = tokens.iter().map(|token| world.answers.remove(token).unwrap()).collect();
    assert!(answers[..6].iter().all(|a| a.is_ok()), "{answers:?}");
    assert_eq!(answers[6], Err(StoreError::NoChunk { chunk: CHUNK }));
    assert_eq!(answers[7], Ok(StoreReply::Done));
    let stats = world.store.stats();
    assert_eq!((stats.chunks, stats.data_bytes, stats.tail_entries), (1, 0, 0));
    assert_eq!(world.store.chunks_of(VOLUME).map(|(id, _)| id).collect::<Vec<_>>(), [ChunkId(2)]);
}

#[test]
fn a_store_of_another_cluster_is_named_and_refused() {
    let disk = World::formatted(16 * MIB);
    let other = StoreOptions { cluster: Some(ClusterId([1; 16])), ..options() };
    assert!(matches!(World::on(disk.clone(), 1, other).open(), Err(OpenError::WrongCluster { .. })));
    let other = StoreOptions { store_uuid: Some([1; 16]), ..options() };
    assert!(matches!(World::on(disk.clone(), 1, other).open(), Err(OpenError::WrongStore { .. })));
    let empty = cairn_env_sim::SimDisk::new(16 * MIB);
    let error = World::on(empty, 1, options()).open().unwrap_err();
    assert_eq!(error.to_string(), "no store on this device: no Cairn store begins here; check the path, or format it");
    assert!(matches!(
        format(&StoreConfig { cluster: CLUSTER, store_uuid: UUID, capacity_bytes: 0 }, MIB),
        Err(FormatError::TooSmall { .. })
    ));
}

#[test]
fn a_clean_reopen_shows_exactly_the_same_state() {
    let mut world = World::new(32 * MIB, 4, tight_options());
    let mut rng = cairn_stdx::Rng::new(4);
    for chunk in 1..=5 {
        world.create(chunk, VOLUME.0 + chunk % 2, 700).unwrap();
    }
    for stamp in 1..400 {
        let chunk = 1 + rng.below(5);
        world.call(write(chunk, rng.below(690) as u32, 1 + rng.below(10) as u32, stamp, false)).unwrap();
    }
    type Picture = (Vec<(ChunkId, ChunkInfo)>, Vec<TailEntry>, u64);
    let picture = |world: &World| -> Picture {
        let chunks = world.store.chunks().map(|(id, info)| (id, info.clone())).collect();
        let tails = world.store.volumes().flat_map(|volume| world.store.tail(volume)).collect();
        (chunks, tails, world.store.stats().data_bytes)
    };
    let (before, dump) = (picture(&world), world.dump());
    world.open().unwrap();
    assert_eq!(picture(&world), before);
    assert_eq!(world.dump(), dump);
}
