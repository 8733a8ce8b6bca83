//! Making copies from other servers.

use crate::world::*;
use cairn_env::Buf;
use cairn_types::*;
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataStatus, FLAG_REPAIR};
use cairn_wire::mds::CsOrder;

/// Source on node 0 with some blocks, raised to `version`.
fn source(world: &mut World, version: u64) -> usize {
    let client = world.client(0, 1, 1);
    world.fence(client, 5).unwrap();
    world.create(client, 1, 5);
    for sequence in 1..=20u64 {
        let (request, data) = write(1, 5, sequence, sequence as u32 * 13, 3, sequence);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    raise(world, client, 1, version);
    client
}

fn raise(world: &mut World, client: usize, since: u64, version: u64) {
    raise_at(world, client, since, version, 5);
}

pub fn raise_at(world: &mut World, client: usize, since: u64, version: u64, epoch: u64) {
    let request = CsRequest::Raise {
        chunk: CHUNK,
        volume: VOLUME,
        epoch: Epoch(epoch),
        since: ChunkVersion(since),
        version: ChunkVersion(version),
    };
    assert_eq!(world.call(client, request), Ok(CsReply::Done));
}

fn same(world: &mut World, version: u64) {
    let (a, b) = (world.client(0, 50, world.now), world.client(1, 50, world.now));
    world.fence(b, 5).unwrap();
    let (left, right) = (world.read_all(a, version, 5), world.read_all(b, version, 5));
    assert_eq!(left, right);
    assert!(left.unwrap().iter().any(|value| *value > 0));
}

#[test]
fn a_lost_copy_is_made_anew() {
    let mut world = World::new(1, 2);
    source(&mut world, 2);
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    same(&mut world, 2);
    // A repeated order is answered at once.
    let reads = world.core(0).stats().reads;
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty());
    assert_eq!(world.core(0).stats().reads, reads);
}

#[test]
fn a_returning_copy_gets_only_what_changed() {
    let mut world = World::new(2, 2);
    let source = source(&mut world, 2);
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    raise(&mut world, source, 1, 3);
    let (request, data) = write(3, 5, 100, 400, 2, 77);
    assert_eq!(world.status(source, &request, data), DataStatus::Ok);
    let unmap = cairn_wire::data::DataRequest { block_count: 2, ..op(DataOp::Unmap, 3, 5, 101, 13) };
    assert_eq!(world.status(source, &unmap, Buf::default()), DataStatus::Ok);
    raise(&mut world, source, 1, 4);
    let before = world.core(0).stats().read_bytes;
    world.order(1, rebuild(1, 4, 4, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    let read = world.core(0).stats().read_bytes - before;
    assert!(read <= 70 * 4096, "the unsettled tail of the source and two blocks, not the chunk: {read}");
    same(&mut world, 4);
}

#[test]
fn unsettled_writes_only_the_returning_copy_has_do_not_survive() {
    let mut world = World::new(3, 2);
    let source = source(&mut world, 2);
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    let target = world.client(1, 1, 1);
    world.fence(target, 5).unwrap();
    let (request, data) = write(2, 5, 200, 13, 1, 666);
    assert_eq!(world.status(target, &request, data), DataStatus::Ok, "a write the others never got");
    raise(&mut world, source, 1, 3);
    world.order(1, rebuild(1, 3, 3, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    same(&mut world, 3);
    let Ok(CsReply::Tail { entries, .. }) =
        world.call(target, CsRequest::Tail { volume: VOLUME, epoch: Epoch(5), skip: 0 })
    else {
        panic!("a tail")
    };
    // What is unsettled at the source is so here; the write the others never got is forgotten.
    assert!(entries.iter().all(|entry| entry.sequence != Sequence(200)), "it answers for it no more: {entries:?}");
}

/// A copy with fifty blocks, none beside another, of writes that the other one never got, and left behind since.
fn with_many_suspects(seed: u64, flags: u8) -> World {
    let mut world = World::new(seed, 2);
    let source = source(&mut world, 2);
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    let target = world.client(1, 1, 1);
    world.fence(target, 5).unwrap();
    for sequence in 200..250u64 {
        let (mut request, data) = write(2, 5, sequence, (sequence as u32 - 200) * 2, 1, 666);
        request.flags = flags;
        assert_eq!(world.status(target, &request, data), DataStatus::Ok);
    }
    raise(&mut world, source, 1, 3);
    world
}

#[test]
fn many_suspects_are_fetched_and_nothing_besides() {
    let mut world = with_many_suspects(4, 0);
    let before = world.core(0).stats().read_bytes;
    world.order(1, rebuild(1, 3, 3, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    let read = world.core(0).stats().read_bytes - before;
    assert!(read <= (50 + 60) * 4096, "what is in doubt and the unsettled tail of the source: {read}");
    same(&mut world, 3);
}

#[test]
fn a_crash_amid_a_rebuild_with_many_suspects_leaves_none_behind() {
    for after in [0, 20, 100, 500] {
        let mut world = with_many_suspects(6, cairn_wire::data::FLAG_DURABLE);
        world.nodes[0].hold_disk = true;
        world.order(1, rebuild(1, 3, 3, &[0]));
        world.pass(Duration::from_millis(after));
        world.kill(1);
        world.nodes[0].hold_disk = false;
        world.start(1);
        world.pass(Duration::from_secs(12));
        assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
        same(&mut world, 3);
    }
}

#[test]
fn a_copy_under_rebuild_takes_writes_and_serves_nothing_even_after_a_crash() {
    let mut world = World::new(5, 2);
    source(&mut world, 2);
    world.nodes[0].hold_disk = true;
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_millis(500));
    for round in 0..3u64 {
        assert!(world.core(1).is_rebuilding(CHUNK));
        let target = world.client(1, 9, round + 1);
        world.fence(target, 5).unwrap();
        let (reply, _) = world.data(target, &op(DataOp::Read, 2, 5, 0, 0), Buf::default());
        assert_eq!((reply.status, reply.detail), (DataStatus::VersionMismatch, 0));
        let (mut request, data) = write(2, 5, 300 + round, 5, 1, 300 + round);
        request.flags = cairn_wire::data::FLAG_DURABLE;
        assert_eq!(world.status(target, &request, data), DataStatus::Ok);
        let peer = world.dial_as(1, NodeId::Cs(cs_of(0)));
        let changed = CsRequest::Changed { chunk: CHUNK, version: ChunkVersion(2), after: None, from_block: 0 };
        assert!(matches!(world.call(peer, changed), Err(CsError::VersionMismatch { .. })), "no source either");
        let repair = cairn_wire::data::DataRequest { flags: FLAG_REPAIR, ..op(DataOp::Read, 2, 0, 0, 0) };
        assert_eq!(world.status(peer, &repair, Buf::default()), DataStatus::VersionMismatch);
        if round % 2 == 0 {
            world.power_cut(1)
        } else {
            world.kill(1)
        }
        world.start(1);
        world.pass(Duration::from_millis(500));
    }
    world.pass(Duration::from_secs(2));
    assert_eq!(world.nodes[1].reports.get(&CHUNK), Some(&ChunkVersion(0)), "reported as worth nothing");
}

#[test]
pub fn a_stale_source_is_no_source_and_the_next_one_is_tried() {
    let mut world = World::new(6, 3);
    let source = source(&mut world, 2);
    // Node 2 becomes a copy at 2 and then misses version 3.
    world.order(2, rebuild(2, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    raise(&mut world, source, 1, 3);
    let (request, data) = write(3, 5, 100, 13, 1, 99);
    assert_eq!(world.status(source, &request, data), DataStatus::Ok);
    world.order(1, rebuild(1, 3, 3, &[2, 0]));
    world.pass(Duration::from_secs(12));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    same(&mut world, 3);
}

#[test]
fn sources_that_die_hang_or_rot_are_left_for_others_or_named() {
    let mut world = World::new(7, 3);
    source(&mut world, 2);
    world.order(2, rebuild(2, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[2].orders.is_empty());
    // The first hangs, the second is gone.
    world.nodes[2].hold_disk = true;
    world.nodes[0].unreachable = true;
    world.order(1, rebuild(1, 2, 2, &[2, 0]));
    world.pass(Duration::from_secs(15));
    let error = world.nodes[1].done.iter().find_map(|done| done.error.clone()).expect("it is told");
    assert!(error.contains("CS#1025"), "{error}");
    assert!(world.core(1).is_rebuilding(CHUNK));
    world.nodes[0].unreachable = false;
    world.pass(Duration::from_secs(15));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    same(&mut world, 2);
}

#[test]
fn a_rebuild_goes_on_under_load_and_follows_raises() {
    let mut world = World::new(8, 2);
    let source = source(&mut world, 2);
    world.nodes[0].hold_disk = true;
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_millis(300));
    let target = world.client(1, 1, 1);
    world.fence(target, 5).unwrap();
    raise(&mut world, target, 2, 3);
    world.nodes[0].hold_disk = false;
    raise(&mut world, source, 1, 3);
    world.pass(Duration::from_secs(3));
    let done: Vec<_> = world.nodes[1].done.iter().filter(|done| done.error.is_none()).collect();
    assert!(!done.is_empty(), "{:?}", world.nodes[1].log);
    same(&mut world, 3);
}

/// Two unsettled writes of one block at the source, copied to node 1, and both sent again there, where nothing of the
/// volume was taken before but what was copied.
fn writes_sent_again_to_a_copy(seed: u64, fenced_before: bool, cut: bool) {
    let mut world = World::new(seed, 2);
    let client = world.client(0, 1, 1);
    world.fence(client, 5).unwrap();
    world.create(client, 1, 5);
    for sequence in [1, 2] {
        let (request, data) = write(1, 5, sequence, 13, 2, sequence);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    raise(&mut world, client, 1, 2);
    if fenced_before {
        let target = world.client(1, 1, 1);
        world.fence(target, 5).unwrap();
    }
    world.order(1, rebuild(1, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    let target = world.client(1, 1, 2);
    world.fence(target, 5).unwrap();
    let (request, data) = write(2, 5, 1, 13, 2, 1);
    assert_eq!(world.status(target, &request, data), DataStatus::Ok);
    if cut {
        // The later one was on its way; what came first is durable.
        world.pass(Duration::from_secs(2));
        world.power_cut(1);
        world.start(1);
        world.pass(Duration::from_secs(1));
        let target = world.client(1, 1, 3);
        world.fence(target, 5).unwrap();
        for sequence in [1, 2] {
            let (request, data) = write(2, 5, sequence, 13, 2, sequence);
            assert_eq!(world.status(target, &request, data), DataStatus::Ok);
        }
    }
    let client = world.client(1, 1, 4);
    let read = world.read_all(client, 2, 5).unwrap();
    assert_eq!(read[13..15], [2, 2], "an earlier write does not come back");
}

#[test]
fn a_write_sent_again_to_a_copy_made_of_a_later_one_has_no_effect() {
    writes_sent_again_to_a_copy(10, true, false);
    writes_sent_again_to_a_copy(11, true, true);
}

#[test]
fn nor_has_it_where_the_epoch_became_known_only_after_the_copying() {
    writes_sent_again_to_a_copy(12, false, false);
    writes_sent_again_to_a_copy(13, false, true);
}

/// Rots the blocks with this value, wherever the disk holds them.
fn rot_blocks(world: &mut World, node: usize, value: u64) {
    let disk = &mut world.nodes[node].disk;
    let holds = |page: &u64| disk.peek(*page * 4096, 4096)[..8] == value.to_le_bytes();
    let pages: Vec<u64> = disk.written_pages().into_iter().filter(holds).collect();
    assert!(!pages.is_empty(), "the disk holds value {value}");
    for page in pages {
        disk.rot(page * 4096 + 100, 3);
    }
}

#[test]
fn sources_with_damage_in_different_blocks_make_one_whole_copy() {
    let mut world = World::new(9, 3);
    let first = source(&mut world, 2);
    let (request, data) = write(2, 5, 21, 5 * 13 + 1, 1, 21);
    assert_eq!(world.status(first, &request, data), DataStatus::Ok, "in the middle of the fifth write");
    world.order(2, rebuild(2, 2, 2, &[0]));
    world.pass(Duration::from_secs(2));
    // In one run of blocks that is read at once (5 and 21), and in others.
    for (node, value) in [(0, 5), (2, 21), (0, 9), (2, 12), (2, 20)] {
        rot_blocks(&mut world, node, value);
    }
    world.order(1, rebuild(1, 2, 2, &[0, 2]));
    world.pass(Duration::from_secs(5));
    assert!(world.nodes[1].orders.is_empty(), "{:?} {:?}", world.nodes[1].done, world.nodes[1].log);
    assert!(world.nodes[1].done.iter().all(|done| done.error.is_none()), "{:?}", world.nodes[1].done);
    let client = world.client(1, 50, world.now);
    world.fence(client, 5).unwrap();
    let read = world.read_all(client, 2, 5).unwrap();
    for sequence in 1..=20u64 {
        let middle = if sequence == 5 { 21 } else { sequence };
        assert_eq!(read[sequence as usize * 13..][..3], [sequence, middle, sequence], "write {sequence}");
    }
    // The same block damaged in all of them has no source.
    world.order(1, CsOrder::Delete { chunk: CHUNK, version: ChunkVersion(2) });
    world.pass(Duration::from_secs(2));
    rot_blocks(&mut world, 0, 21);
    world.order(1, rebuild(1, 3, 3, &[0, 2]));
    let client = world.client(0, 51, world.now);
    raise(&mut world, client, 1, 3);
    let client = world.client(2, 52, world.now);
    world.fence(client, 5).unwrap();
    raise(&mut world, client, 1, 3);
    // The order is repeated as soon as its failure is told, so the world has no rest.
    let told = |world: &World| world.nodes[1].done.iter().find_map(|done| done.error.clone());
    let mut error = None;
    for _ in 0..100_000 {
        error = told(&world);
        if error.is_some() {
            break;
        }
        if !world.progress() {
            world.pass_without_settling(Duration::from_millis(10));
        }
    }
    let error = error.expect("it is told");
    assert!(error.contains("block 66 is damaged"), "{error}");
}
