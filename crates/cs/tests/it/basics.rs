//! Fencing, versions, duplicates, marks, links, the metadata link.

use crate::world::*;
use cairn_env::Buf;
use cairn_types::*;
use cairn_wire::FrameKind;
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataStatus, FLAG_DURABLE, FLAG_REPAIR};
use cairn_wire::mds::{CsOrder, MdsError};

fn ready(seed: u64) -> (World, usize) {
    let mut world = World::new(seed, 1);
    let client = world.client(0, 1, 1);
    assert!(world.fence(client, 5).is_ok());
    world.create(client, 1, 5);
    (world, client)
}

#[test]
pub fn only_the_fenced_epoch_reads_and_writes_across_kill_and_power_cut() {
    let (mut world, mut client) = ready(1);
    for round in 0..3u64 {
        let epoch = 5 + round;
        let (request, data) = write(1, epoch, 1 + round, 3, 1, 42 + round);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
        for operation in [DataOp::Read, DataOp::Unmap, DataOp::Flush, DataOp::Confirm] {
            let stale = op(operation, 1, epoch - 1, 9, 3);
            assert_eq!(world.status(client, &stale, Buf::default()), DataStatus::StaleEpoch, "{operation:?}");
            let unknown = op(operation, 1, epoch + 1, 9, 3);
            assert_eq!(world.status(client, &unknown, Buf::default()), DataStatus::NotFenced, "{operation:?}");
        }
        let (stale, data) = write(1, epoch - 1, 9, 3, 1, 666);
        assert_eq!(world.status(client, &stale, data), DataStatus::StaleEpoch);
        assert!(matches!(world.fence(client, epoch - 1), Err(CsError::StaleEpoch { .. })));
        assert!(world.fence(client, epoch).is_ok(), "fencing is idempotent");
        assert!(world.fence(client, epoch + 1).is_ok());
        if round % 2 == 0 {
            world.power_cut(0)
        } else {
            world.kill(0)
        }
        world.start(0);
        world.settle();
        assert!(world.clients[client].closed);
        client = world.client(0, 1, 2 + round);
        let read = op(DataOp::Read, 1, epoch, 0, 3);
        assert_eq!(world.status(client, &read, Buf::default()), DataStatus::StaleEpoch, "the fence is durable");
        assert!(matches!(world.fence(client, epoch), Err(CsError::StaleEpoch { .. })));
    }
}

#[test]
fn another_volume_is_not_touched_by_a_fence_and_unknown_ones_are_not_served() {
    let (mut world, client) = ready(2);
    let other = cairn_wire::data::DataRequest { volume: VolumeId(78), ..op(DataOp::Read, 1, 5, 0, 0) };
    assert_eq!(world.status(client, &other, Buf::default()), DataStatus::NotFenced);
    let tail = world.call(client, CsRequest::Tail { volume: VolumeId(78), epoch: Epoch(5), skip: 0 });
    assert_eq!(tail, Err(CsError::NotFenced(VolumeId(78))));
}

#[test]
fn a_version_is_exact_and_raised_only_from_its_membership() {
    let (mut world, client) = ready(3);
    let (request, data) = write(1, 5, 1, 0, 2, 7);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    let (reply, _) = world.data(client, &op(DataOp::Read, 2, 5, 0, 0), Buf::default());
    assert_eq!((reply.status, reply.detail), (DataStatus::VersionMismatch, 1));
    let mut raise = |since, version| {
        let request = CsRequest::Raise {
            chunk: CHUNK,
            volume: VOLUME,
            epoch: Epoch(5),
            since: ChunkVersion(since),
            version: ChunkVersion(version),
        };
        world.call(client, request)
    };
    assert!(matches!(raise(2, 3), Err(CsError::VersionMismatch { .. })), "the copy left the set at 1");
    assert_eq!(raise(1, 3), Ok(CsReply::Done));
    assert_eq!(raise(1, 3), Ok(CsReply::Done), "idempotent");
    assert!(matches!(raise(1, 2), Err(CsError::VersionMismatch { .. })), "never downwards");
    world.power_cut(0);
    world.start(0);
    world.settle();
    let client = world.client(0, 1, 2);
    assert_eq!(world.status(client, &op(DataOp::Read, 1, 5, 0, 0), Buf::default()), DataStatus::VersionMismatch);
    let (reply, data) = world.data(client, &op(DataOp::Read, 3, 5, 0, 0), Buf::default());
    assert_eq!((reply.status, data[0]), (DataStatus::Ok, 7), "a durable raise makes what came before it durable");
}

#[test]
fn duplicates_change_nothing_and_old_packets_stay_dead() {
    let (mut world, client) = ready(4);
    for (sequence, value) in [(1, 10), (2, 20)] {
        let (request, data) = write(1, 5, sequence, 8, 4, value);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    let (old, data) = write(1, 5, 1, 8, 4, 10);
    assert_eq!(world.status(client, &old, data.clone()), DataStatus::Ok);
    let (reply, read) = world.data(client, &op(DataOp::Read, 1, 5, 0, 9), Buf::default());
    assert_eq!((reply.status, read[0]), (DataStatus::Ok, 20));
    // Also after it settled, and so left the tail.
    let settle = CsRequest::Settle { volume: VOLUME, epoch: Epoch(5), settled: Sequence(2) };
    assert_eq!(world.call(client, settle), Ok(CsReply::Done));
    let tail = world.call(client, CsRequest::Tail { volume: VOLUME, epoch: Epoch(5), skip: 0 });
    assert_eq!(tail, Ok(CsReply::Tail { entries: Vec::new(), end: true }));
    assert_eq!(world.status(client, &old, data), DataStatus::Ok);
    let (_, read) = world.data(client, &op(DataOp::Read, 1, 5, 0, 9), Buf::default());
    assert_eq!(read[0], 20);
}

#[test]
fn a_repeated_request_is_answered_with_the_one_under_way() {
    let (mut world, client) = ready(5);
    world.nodes[0].hold_disk = true;
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    let ids: Vec<u64> = (0..3).map(|_| world.post_data(client, &request, data.clone())).collect();
    world.settle();
    assert!(ids.iter().all(|id| !world.clients[client].data.contains_key(id)), "nothing is answered before the disk");
    world.nodes[0].hold_disk = false;
    world.settle();
    assert!(ids.iter().all(|id| world.clients[client].data[id].0.status == DataStatus::Ok));
}

#[test]
fn the_tail_tells_unsettled_writes_and_survives_restarts() {
    let (mut world, client) = ready(6);
    for sequence in 1..=5u64 {
        let (mut request, data) = write(1, 5, sequence, sequence as u32, 1, sequence);
        request.flags = FLAG_DURABLE;
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    let settle = CsRequest::Settle { volume: VOLUME, epoch: Epoch(5), settled: Sequence(3) };
    assert_eq!(world.call(client, settle), Ok(CsReply::Done));
    world.power_cut(0);
    world.start(0);
    world.settle();
    let client = world.client(0, 1, 2);
    let Ok(CsReply::Fenced { tail, previous, .. }) = world.fence(client, 6) else { panic!("fenced") };
    assert_eq!(previous, Epoch(5));
    assert!(tail >= 2, "too much is harmless, too little is a bug: {tail}");
    let Ok(CsReply::Tail { entries, end }) =
        world.call(client, CsRequest::Tail { volume: VOLUME, epoch: Epoch(6), skip: 0 })
    else {
        panic!("a tail")
    };
    assert!(end && entries.iter().any(|entry| entry.sequence == Sequence(5) && entry.first_block == 5));
}

#[test]
pub fn durable_marks_follow_flushes_and_the_timer() {
    let (mut world, client) = ready(7);
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.data(client, &request, data).0.durable, Sequence(0));
    let (reply, _) = world.data(client, &op(DataOp::Flush, 0, 5, 0, 0), Buf::default());
    assert_eq!((reply.status, reply.durable), (DataStatus::Ok, Sequence(1)));
    let (request, data) = write(1, 5, 2, 0, 1, 2);
    assert_eq!(world.data(client, &request, data).0.durable, Sequence(1));
    world.pass(Duration::from_secs(1));
    let (reply, _) = world.data(client, &op(DataOp::Confirm, 0, 5, 0, 0), Buf::default());
    assert_eq!(reply.durable, Sequence(2), "the server flushes by itself within a second");
    let (mut request, data) = write(1, 5, 3, 0, 1, 3);
    request.flags = FLAG_DURABLE;
    assert_eq!(world.data(client, &request, data).0.durable, Sequence(3));
    // A write refused and sent again below a mark that is out must be durable at once.
    let (wrong, data) = write(9, 5, 4, 0, 1, 4);
    assert_eq!(world.status(client, &wrong, data), DataStatus::VersionMismatch);
    let (mut later, data) = write(1, 5, 5, 1, 1, 5);
    later.flags = FLAG_DURABLE;
    assert_eq!(world.data(client, &later, data).0.durable, Sequence(5));
    let (again, data) = write(1, 5, 4, 0, 1, 4);
    assert_eq!(world.data(client, &again, data).0.durable, Sequence(5));
    world.power_cut(0);
    world.start(0);
    world.settle();
    let client = world.client(0, 1, 2);
    let (_, data) = world.data(client, &op(DataOp::Read, 1, 5, 0, 0), Buf::default());
    assert_eq!(data[0], 4, "what a mark covered survives a power cut");
}

#[test]
fn durable_always_leaves_nothing_undurable() {
    let mut world = World::with(8, 1, |config| config.durable_always = true);
    let client = world.client(0, 1, 1);
    world.fence(client, 5).unwrap();
    world.create(client, 1, 5);
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.data(client, &request, data).0.durable, Sequence(1));
    world.power_cut(0);
    world.start(0);
    world.settle();
    let client = world.client(0, 1, 2);
    assert_eq!(world.read_all(client, 1, 5).unwrap()[0], 1);
}

#[test]
fn many_flushes_share_one_device_flush() {
    let (mut world, client) = ready(9);
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    let before = world.nodes[0].disk.completed[2];
    world.nodes[0].hold_disk = true;
    let ids: Vec<u64> =
        (0..100).map(|_| world.post_data(client, &op(DataOp::Flush, 0, 5, 0, 0), Buf::default())).collect();
    world.settle();
    world.nodes[0].hold_disk = false;
    world.settle();
    assert!(ids.iter().all(|id| world.clients[client].data[id].0.status == DataStatus::Ok));
    assert!(world.nodes[0].disk.completed[2] - before <= 2, "{}", world.nodes[0].disk.completed[2] - before);
    let before = world.nodes[0].disk.completed[2];
    assert_eq!(world.status(client, &op(DataOp::Flush, 0, 5, 0, 0), Buf::default()), DataStatus::Ok);
    assert_eq!(world.nodes[0].disk.completed[2], before, "a clean volume costs no device flush");
}

#[test]
fn nonsense_is_refused_and_broken_peers_are_cut_off() {
    let (mut world, client) = ready(10);
    let (mut damaged, data) = write(1, 5, 1, 0, 2, 1);
    damaged.checksums[1] ^= 1;
    let (reply, _) = world.data(client, &damaged, data);
    assert_eq!((reply.status, reply.detail), (DataStatus::BadRequest, 1), "the first bad block is named");
    let beyond = op(DataOp::Read, 1, 5, 0, BLOCKS);
    assert_eq!(world.status(client, &beyond, Buf::default()), DataStatus::BadRequest);
    let mut unnumbered = write(1, 5, 0, 0, 1, 1);
    assert_eq!(world.status(client, &unnumbered.0, unnumbered.1.clone()), DataStatus::BadRequest);
    unnumbered.0.chunk = ChunkId(1);
    assert_eq!(world.status(client, &unnumbered.0, unnumbered.1), DataStatus::NoSuchChunk);
    let repair = cairn_wire::data::DataRequest { flags: FLAG_REPAIR, ..op(DataOp::Read, 1, 5, 0, 0) };
    assert_eq!(world.status(client, &repair, Buf::default()), DataStatus::BadRequest, "clients do not repair");
    let changed = CsRequest::Changed { chunk: CHUNK, version: ChunkVersion(1), after: None, from_block: 0 };
    assert!(matches!(world.call(client, changed), Err(CsError::Invalid(_))));
    for (kind, prefix) in [
        (FrameKind::Data, vec![1, 2, 3]),
        (FrameKind::CsCall, vec![0xff; 40]),
        (FrameKind::MdsReply, Vec::new()),
        (FrameKind::Raft, vec![0; 8]),
    ] {
        let broken = world.client(0, 100 + kind as u64, 1);
        world.post_raw(broken, kind, prefix, Buf::default());
        world.settle();
        assert!(world.clients[broken].closed, "{kind:?}");
    }
    let silent = world.dial(0);
    world.post_data(silent, &op(DataOp::Confirm, 0, 5, 0, 0), Buf::default());
    world.settle();
    assert!(world.clients[silent].closed, "the hello comes first");
    assert!(!world.clients[client].closed, "the others go on");
}

#[test]
fn a_peer_that_exceeds_its_window_is_cut_off() {
    let (mut world, client) = ready(11);
    world.nodes[0].hold_disk = true;
    for sequence in 1..=256u64 {
        let (request, data) = write(1, 5, sequence, sequence as u32, 1, 1);
        world.post_data(client, &request, data);
    }
    world.settle();
    assert!(!world.clients[client].closed);
    world.post_data(client, &op(DataOp::Read, 1, 5, 0, 0), Buf::default());
    world.settle();
    assert!(world.clients[client].closed);
    world.nodes[0].hold_disk = false;
    world.settle();
}

#[test]
pub fn packets_of_an_older_link_never_follow_those_of_a_newer() {
    let (mut world, old) = ready(12);
    world.nodes[0].hold_disk = true;
    // A control operation under way makes what follows stand in line.
    let raise = CsRequest::Raise {
        chunk: CHUNK,
        volume: VOLUME,
        epoch: Epoch(5),
        since: ChunkVersion(1),
        version: ChunkVersion(2),
    };
    world.post_call(old, &raise);
    world.settle();
    let (request, data) = write(2, 5, 1, 0, 1, 666);
    world.post_data(old, &request, data);
    world.settle();
    let new = world.client(0, 1, 2);
    let (request, data) = write(2, 5, 2, 0, 1, 2);
    world.post_data(new, &request, data);
    world.settle();
    assert!(world.clients[old].closed);
    world.nodes[0].hold_disk = false;
    world.settle();
    let (reply, data) = world.data(new, &op(DataOp::Read, 2, 5, 0, 0), Buf::default());
    assert_eq!((reply.status, data[0]), (DataStatus::Ok, 2));
    let tail = world.call(new, CsRequest::Tail { volume: VOLUME, epoch: Epoch(5), skip: 0 });
    let Ok(CsReply::Tail { entries, .. }) = tail else { panic!("a tail") };
    assert_eq!(entries.len(), 1, "the write of the old link was never executed");
    let stale = world.dial(0);
    let reply = world.call(stale, CsRequest::Hello { session: 1, generation: 1 });
    assert_eq!(reply, Err(CsError::Superseded));
}

#[test]
fn extents_list_what_is_mapped() {
    let (mut world, client) = ready(13);
    for (sequence, first, count) in [(1, 0, 4), (2, 10, 2), (3, 100, 1)] {
        let (request, data) = write(1, 5, sequence, first, count, 1);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    let unmap = cairn_wire::data::DataRequest { block_count: 2, ..op(DataOp::Unmap, 1, 5, 4, 1) };
    assert_eq!(world.status(client, &unmap, Buf::default()), DataStatus::Ok);
    let request = CsRequest::Extents {
        chunk: CHUNK,
        volume: VOLUME,
        epoch: Epoch(5),
        version: ChunkVersion(1),
        first_block: 0,
        block_count: 11,
    };
    let Ok(CsReply::Ranges { ranges, .. }) = world.call(client, request) else { panic!("ranges") };
    let found: Vec<(u32, u32)> = ranges.iter().map(|range| (range.first_block, range.block_count)).collect();
    assert_eq!(found, [(0, 1), (3, 1), (10, 1)]);
}

#[test]
fn a_copy_just_made_is_reported_once_its_writes_are_settled() {
    let (mut world, client) = ready(15);
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    world.pass(Duration::from_secs(5));
    assert_eq!(world.nodes[0].reports.get(&CHUNK), None, "another replica may not have it yet");
    let settle = CsRequest::Settle { volume: VOLUME, epoch: Epoch(5), settled: Sequence(1) };
    assert_eq!(world.call(client, settle), Ok(CsReply::Done));
    world.pass(Duration::from_secs(3));
    assert_eq!(world.nodes[0].reports.get(&CHUNK), Some(&ChunkVersion(1)));
}

#[test]
fn it_follows_the_group_when_all_its_members_are_replaced_running_and_started_anew() {
    let (mut world, client) = ready(15);
    world.pass(Duration::from_secs(10));
    assert_eq!(world.core(0).mds_servers(), [mds_addr(0)]);
    // One at a time, as a group is replaced; the chunk server was told of the first only.
    for round in 1..5 {
        world.change_group(vec![mds_addr(round - 1), mds_addr(round)]);
        world.pass(Duration::from_secs(10));
        world.change_group(vec![mds_addr(round)]);
        world.pass(Duration::from_secs(10));
        assert_eq!(world.core(0).mds_servers(), [mds_addr(round)]);
        world.cut_mds(0);
        let (before, asked) = (world.nodes[0].heartbeats, world.nodes[0].topologies);
        world.pass(Duration::from_secs(10));
        assert!(world.nodes[0].heartbeats > before, "round {round}");
        assert!(world.nodes[0].topologies > asked, "asked after each registration");
        let (request, data) = write(1, 5, round as u64, 0, 1, 1);
        assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    }
    // It finds the group from what was written down, though nobody is where it was told to look.
    for round in 5..7 {
        world.kill(0);
        world.start(0);
        let before = world.nodes[0].heartbeats;
        world.pass(Duration::from_secs(10));
        assert!(world.nodes[0].heartbeats > before);
        world.change_group(vec![mds_addr(round)]);
        world.pass(Duration::from_secs(10));
    }
}

#[test]
fn the_addresses_told_at_the_start_count_when_nobody_is_where_the_group_was() {
    let (mut world, _) = ready(16);
    world.change_group(vec![mds_addr(3), mds_addr(4), mds_addr(5)]);
    world.pass(Duration::from_secs(10));
    assert_eq!(world.core(0).mds_servers().len(), 3);
    world.kill(0);
    // Replaced while it was away; the operator tells it of one of the new ones.
    world.group = vec![mds_addr(7)];
    world.nodes[0].config.mds = vec![mds_addr(0), mds_addr(7)];
    world.start(0);
    let before = world.nodes[0].heartbeats;
    world.pass(Duration::from_secs(60));
    assert!(world.nodes[0].heartbeats > before);
    assert_eq!(world.core(0).mds_servers(), [mds_addr(7)]);
}

#[test]
fn many_changes_of_the_topology_are_asked_for_twice_a_second_at_most() {
    let (mut world, _) = ready(17);
    let before = world.nodes[0].topologies;
    for _ in 0..600 {
        world.change_group(vec![mds_addr(0)]);
        world.pass(Duration::from_millis(100));
    }
    let asked = world.nodes[0].topologies - before;
    assert!((60..=130).contains(&asked), "{asked} times in a minute");
}

#[test]
fn it_registers_reports_beats_and_finds_the_leader() {
    let (mut world, client) = ready(14);
    assert_eq!(world.core(0).id(), Some(cs_of(0)));
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    let before = world.nodes[0].heartbeats;
    world.pass(Duration::from_secs(10));
    assert!((9..=12).contains(&(world.nodes[0].heartbeats - before)), "{}", world.nodes[0].heartbeats - before);
    assert_eq!(world.core(0).stats().writes, 1);
    world.pass(Duration::from_secs(3700));
    assert_eq!(world.nodes[0].reports.get(&CHUNK), Some(&ChunkVersion(1)), "the hourly report");
    let registrations = world.nodes[0].registrations;
    world.nodes[0].mds_errors.extend([
        MdsError::NotLeader { leader: Some("127.0.0.1:7000".parse().unwrap()) },
        MdsError::NotLeader { leader: None },
        MdsError::Unavailable("no majority".into()),
    ]);
    world.pass(Duration::from_secs(10));
    assert!(world.nodes[0].registrations > registrations);
    let before = world.nodes[0].heartbeats;
    world.pass(Duration::from_secs(3));
    assert!(world.nodes[0].heartbeats > before);
}

#[test]
fn orders_are_carried_out_once_and_reported() {
    let (mut world, client) = ready(15);
    world.order(0, CsOrder::Raise { chunk: CHUNK, since: ChunkVersion(1), version: ChunkVersion(4) });
    world.settle();
    assert_eq!(world.status(client, &op(DataOp::Read, 4, 5, 0, 0), Buf::default()), DataStatus::Ok);
    world.order(0, CsOrder::Delete { chunk: CHUNK, version: ChunkVersion(3) });
    world.settle();
    assert!(world.nodes[0].done.iter().any(|done| done.error.is_some()), "the copy is newer than the order");
    world.order(0, CsOrder::Delete { chunk: CHUNK, version: ChunkVersion(4) });
    world.order(0, CsOrder::Delete { chunk: ChunkId(1), version: ChunkVersion(4) });
    world.settle();
    assert_eq!(world.status(client, &op(DataOp::Read, 4, 5, 0, 0), Buf::default()), DataStatus::NoSuchChunk);
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[0].orders.is_empty(), "{:?}", world.nodes[0].orders);
}

#[test]
fn a_planned_stop_leaves_nothing_to_replay() {
    let (mut world, client) = ready(16);
    let (request, data) = write(1, 5, 1, 0, 1, 1);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    world.prepare_stop(0);
    world.settle();
    assert!(world.core(0).is_ready_to_stop());
    world.kill(0);
    world.start(0);
    world.settle();
    assert!(world.core(0).start_report().unwrap().groups_replayed == 0);
}

#[test]
fn a_start_is_let_in_before_anything_is_served_and_follows_the_one_before() {
    let (mut world, client) = ready(17);
    let (request, data) = write(1, 5, 1, 0, 1, 7);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    world.pass(Duration::from_secs(12));
    let told = world.nodes[0].marked;
    assert!(told > 0, "what is durable is told");
    let first = world.nodes[0].lineage;
    assert_eq!((first.generation, first.previous), (1, first.nonce), "the start was confirmed");
    world.kill(0);
    // No metadata server leads: requests wait, and crashes meanwhile change nothing.
    let nobody = || std::iter::repeat_n(MdsError::Unavailable("no majority".into()), 1000);
    world.nodes[0].mds_errors.extend(nobody());
    for _ in 0..3 {
        world.start(0);
        world.pass(Duration::from_secs(2));
        assert!(!world.core(0).is_admitted());
        world.kill(0);
    }
    world.start(0);
    let client = world.dial(0);
    let id = world.post_call(client, &CsRequest::Hello { session: 9, generation: 9 });
    world.pass(Duration::from_secs(2));
    assert!(!world.clients[client].calls.contains_key(&id), "nothing is served before");
    world.nodes[0].mds_errors.clear();
    world.pass(Duration::from_secs(5));
    assert!(world.clients[client].calls.contains_key(&id), "what waited is answered");
    let second = world.nodes[0].lineage;
    assert_eq!((second.generation, second.previous), (2, second.nonce));
    assert!(second.nonce != first.nonce && second.recovered >= told);
    // Turned away: it ends, and says why.
    world.kill(0);
    world.nodes[0].turn_away = true;
    world.start(0);
    world.pass(Duration::from_secs(2));
    assert!(world.nodes[0].fatal.as_ref().is_some_and(|why| why.contains("older copy")), "{:?}", world.nodes[0].fatal);
}
