//! Servers that run out of space: copies move, writes fail or wait, and nothing is lost or left unequal.

use crate::world::*;
use cairn_client::{OnNoSpace, VolumeHandle};
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockOp};
use cairn_wire::mds::{MdsRequest, Severity};

const MIB: u64 = 1 << 20;
const PIECE: u64 = 128 << 10;

/// The content of a piece: nothing in it is a block of zeros.
fn piece(number: u64, round: u8) -> Vec<u8> {
    (0..PIECE).map(|at| ((number * 31 + at / 4096) as u8 ^ round) | 1).collect()
}

fn ready(disks: &[u64], rule: OnNoSpace, copies: &str) -> (World, usize, VolumeHandle) {
    let mut world = World::with_disks(7, disks);
    world.on_no_space = rule;
    let client = world.add_client();
    let volume = world.create_volume(client, "disk", 256 * MIB, copies);
    let handle = world.open(client, volume);
    (world, client, handle)
}

fn write(number: u64, round: u8) -> BlockOp {
    BlockOp::Write { offset: number * PIECE, data: Buf::copy_from(&piece(number, round)), fua: false }
}

/// Writes pieces until one finds no room; answers its number.
fn fill(world: &mut World, client: usize, handle: VolumeHandle) -> u64 {
    for number in 0.. {
        match world.run(client, handle, write(number, 0)) {
            Ok(_) => {}
            Err(BlockError::NoSpace) => return number,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!()
}

/// Every copy holds this: reads take turns among the replicas.
fn check(world: &mut World, client: usize, handle: VolumeHandle, number: u64, expected: &[u8]) {
    for turn in 0..9 {
        let data = world.read(client, handle, number * PIECE, PIECE as u32).unwrap();
        assert!(data == expected, "piece {number}, turn {turn}");
    }
}

fn asked_for_room(world: &mut World) -> usize {
    world.mds(|mds| mds.calls.iter().filter(|call| matches!(call, MdsRequest::ReplicaFull { .. })).count())
}

#[test]
fn copies_leave_a_full_server_for_one_with_room() {
    for copies in ["3:2", "2:2", "1:1"] {
        let small = usize::from(copies.as_bytes()[0] - b'0');
        let (mut world, client, handle) = ready(&vec![16 * MIB; small], OnNoSpace::Fail, copies);
        // Chunks are thin: so many find a place that they cannot all be filled there.
        let (chunks, per_chunk) = (16, MIB / PIECE);
        for chunk in 0..chunks {
            world.run(client, handle, write(chunk * per_chunk, 0)).unwrap();
        }
        // What is moved here moves because there is no room, not for balance.
        let pairs = vec![("mds.rebalance.gap".to_owned(), "100".to_owned())];
        world.call(client, MdsRequest::ConfigSet { pairs }).unwrap();
        for _ in 0..small {
            world.add_server(64 * MIB);
        }
        world.run_for(2 * SECOND);
        let all = chunks * per_chunk;
        let tokens: Vec<u64> = (0..all).map(|number| world.submit(client, handle, write(number, 0))).collect();
        for token in tokens {
            world.finish(token, 120 * SECOND).unwrap();
        }
        assert!(asked_for_room(&mut world) > 0, "the small disks were filled");
        // Overwriting needs no further room.
        for number in 0..all {
            world.run(client, handle, write(number, 64)).unwrap();
        }
        world.run_for(60 * SECOND);
        for number in 0..all {
            check(&mut world, client, handle, number, &piece(number, 64));
        }
    }
}

#[test]
fn a_write_nobody_has_room_for_fails_and_leaves_what_was_there() {
    let (mut world, client, handle) = ready(&[16 * MIB, 64 * MIB, 64 * MIB], OnNoSpace::Fail, "3:2");
    let end = fill(&mut world, client, handle);
    assert!((64..128).contains(&end), "the smallest disk decides: {end}");
    assert!(asked_for_room(&mut world) > 0);
    // The rest of the chunk was taken by two of three and refused by one.
    for number in end..end + 4 {
        let refused = world.run(client, handle, write(number, 0)).unwrap_err();
        assert!(matches!(refused, BlockError::NoSpace), "{refused}");
        check(&mut world, client, handle, number, &vec![0; PIECE as usize]);
    }
    for number in 0..end {
        check(&mut world, client, handle, number, &piece(number, 0));
    }
    assert!(world.log.iter().any(|line| line.contains("taking back write")), "some replicas took it and some did not");
    // What is mapped can be overwritten. Half old and half new: all or nothing of the old half, never zeros.
    world.run(client, handle, write(end - 1, 8)).unwrap();
    let both = BlockOp::Write { offset: (end - 1) * PIECE, data: Buf::copy_from(&[9; 2 * PIECE as usize]), fua: true };
    assert!(matches!(world.run(client, handle, both), Err(BlockError::NoSpace)));
    check(&mut world, client, handle, end - 1, &piece(end - 1, 8));
    check(&mut world, client, handle, end, &vec![0; PIECE as usize]);
    // Room comes back by deleting.
    world.run(client, handle, BlockOp::Discard { offset: 0, len: 4 * PIECE + 100 }).unwrap();
    for number in end..end + 3 {
        world.run(client, handle, write(number, 0)).unwrap();
    }
    world.flush(client, handle);
    world.close(client, handle, true);
}

#[test]
fn a_write_that_waits_goes_on_when_there_is_room() {
    let (mut world, client, handle) = ready(&[16 * MIB, 64 * MIB, 64 * MIB], OnNoSpace::Wait, "3:2");
    let mut tokens: Vec<u64> =
        (0..24 * MIB / PIECE).map(|number| world.submit(client, handle, write(number, 0))).collect();
    world.run_for(20 * SECOND);
    tokens.retain(|token| !world.is_done(*token));
    assert!(!tokens.is_empty(), "the smallest disk has no room for all");
    // Reading goes on meanwhile.
    check(&mut world, client, handle, 0, &piece(0, 0));
    world.add_server(64 * MIB);
    for token in tokens {
        world.finish(token, 120 * SECOND).unwrap();
    }
    world.run_for(60 * SECOND);
    for number in 0..24 * MIB / PIECE {
        check(&mut world, client, handle, number, &piece(number, 0));
    }
}

#[test]
fn copies_stay_equal_when_servers_restart_while_a_cluster_is_full() {
    let (mut world, client, handle) = ready(&[16 * MIB, 64 * MIB, 64 * MIB], OnNoSpace::Fail, "3:2");
    let end = fill(&mut world, client, handle);
    for round in 0..6u64 {
        let tokens: Vec<u64> = (end..end + 3).map(|number| world.submit(client, handle, write(number, 0))).collect();
        world.run_for(round * 300_000);
        let place = 1 + (round as usize) % 3;
        world.kill(place);
        world.run_for(SECOND);
        world.start_cs(place);
        let mut outcomes = Vec::new();
        for token in tokens {
            outcomes.push(world.finish(token, 120 * SECOND));
        }
        world.run_for(40 * SECOND);
        for (number, outcome) in (end..).zip(outcomes) {
            let expected = if outcome.is_ok() { piece(number, 0) } else { vec![0; PIECE as usize] };
            check(&mut world, client, handle, number, &expected);
            world.run(client, handle, BlockOp::Discard { offset: number * PIECE, len: PIECE }).unwrap();
        }
        check(&mut world, client, handle, end - 1, &piece(end - 1, 0));
    }
}

#[test]
fn the_event_log_tells_when_a_server_fills_up() {
    let (mut world, client, handle) = ready(&[16 * MIB, 64 * MIB, 64 * MIB], OnNoSpace::Fail, "3:2");
    for number in 0.. {
        if world.run(client, handle, write(number, 0)).is_err() {
            break;
        }
        // Heartbeats come once a second.
        world.run_for(SECOND / 2);
    }
    world.run_for(5 * SECOND);
    world.run(client, handle, BlockOp::Discard { offset: 0, len: 256 * MIB }).unwrap();
    world.run_for(20 * SECOND);
    let events = match world.call(client, MdsRequest::Events { after: 0, limit: 1000 }) {
        Ok(cairn_wire::mds::MdsReply::Events(events)) => events,
        other => panic!("{other:?}"),
    };
    let said: Vec<(&str, Severity)> =
        events.iter().filter(|e| e.code.starts_with("MDS-300")).map(|e| (e.code.as_str(), e.severity)).collect();
    for expected in [("MDS-3002", Severity::Warning), ("MDS-3003", Severity::Error), ("MDS-3004", Severity::Info)] {
        assert!(said.contains(&expected), "{expected:?} in {said:?}");
    }
}
