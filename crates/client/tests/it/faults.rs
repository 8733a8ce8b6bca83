//! Servers, links, clients and metadata servers fail; nothing acknowledged is lost, nothing stale is read.

use crate::world::*;
use cairn_client::VolumeHandle;
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockOp, BlockReply};
use cairn_stdx::Rng;
use cairn_types::VolumeId;
use cairn_wire::mds::{LeaseMode, MdsReply, MdsRequest};

fn ready(seed: u64, servers: usize) -> (World, usize, VolumeId, VolumeHandle) {
    let mut world = World::new(seed, servers);
    let client = world.add_client();
    let volume = world.create_volume(client, "disk", 16 << 20, "3:2");
    let handle = world.open(client, volume);
    (world, client, volume, handle)
}

fn fill(world: &mut World, client: usize, handle: VolumeHandle, value: u8) {
    for block in 0..32u64 {
        world.write(client, handle, block * 4096 * 9, &[value.wrapping_add(block as u8); 4096]);
    }
}

fn check(world: &mut World, client: usize, handle: VolumeHandle, value: u8) {
    for block in 0..32u64 {
        let data = world.read(client, handle, block * 4096 * 9, 4096).unwrap();
        assert!(data.iter().all(|byte| *byte == value.wrapping_add(block as u8)), "block {block}: {}", data[0]);
    }
}

#[test]
fn a_broken_link_is_mended_and_nothing_executes_twice() {
    let (mut world, client, _, handle) = ready(11, 3);
    let mut tokens = Vec::new();
    for i in 0..200u64 {
        let data = Buf::copy_from(&[i as u8; 4096]);
        tokens.push(world.submit(client, handle, BlockOp::Write { offset: (i % 16) * 4096, data, fua: i % 3 == 0 }));
        if i % 20 == 0 {
            let server = 1 + (i as usize / 20) % 3;
            world.reset(client, server);
            world.run_for(MS);
        }
    }
    for token in tokens {
        world.finish(token, 20 * SECOND).unwrap();
    }
    for i in 184..200u64 {
        assert_eq!(world.read(client, handle, (i % 16) * 4096, 1).unwrap(), [i as u8]);
    }
    let failed = world.mds(|mds| mds.calls.iter().any(|call| matches!(call, MdsRequest::ReplicaFailed { .. })));
    assert!(!failed, "a link that comes back at once costs no replica");
}

#[test]
fn a_dead_server_costs_at_most_seconds_and_is_resynced() {
    let (mut world, client, _, handle) = ready(12, 3);
    fill(&mut world, client, handle, 1);
    world.kill(2);
    let before = world.now;
    fill(&mut world, client, handle, 50);
    assert!(world.now - before < 3 * SECOND, "{} ms", (world.now - before) / MS);
    check(&mut world, client, handle, 50);
    world.flush(client, handle);
    world.start_cs(2);
    world.run_for(30 * SECOND);
    fill(&mut world, client, handle, 90);
    // The others die: only the returned server is left to read from, and it must have everything.
    world.flush(client, handle);
    world.run_for(5 * SECOND);
    world.kill(1);
    world.kill(3);
    check(&mut world, client, handle, 90);
}

#[test]
fn a_silent_server_is_given_up_within_seconds() {
    let (mut world, client, _, handle) = ready(13, 4);
    fill(&mut world, client, handle, 1);
    world.pause(1, true);
    let before = world.now;
    fill(&mut world, client, handle, 2);
    assert!(world.now - before < 6 * SECOND, "{} ms", (world.now - before) / MS);
    world.pause(1, false);
    world.run_for(10 * SECOND);
    check(&mut world, client, handle, 2);
}

#[test]
fn below_the_minimum_writes_wait_and_reads_go_on() {
    let (mut world, client, _, handle) = ready(14, 3);
    fill(&mut world, client, handle, 1);
    world.kill(1);
    world.kill(2);
    let write =
        world.submit(client, handle, BlockOp::Write { offset: 0, data: Buf::copy_from(&[9; 4096]), fua: false });
    world.run_for(8 * SECOND);
    assert!(!world.is_done(write));
    assert_eq!(world.read(client, handle, 4096 * 9, 4096).unwrap(), [2; 4096]);
    world.start_cs(1);
    world.finish(write, 40 * SECOND).unwrap();
    assert_eq!(world.read(client, handle, 0, 4096).unwrap(), [9; 4096]);
}

#[test]
fn a_server_that_lost_power_is_reconciled_before_it_is_read() {
    for seed in 20..40 {
        let (mut world, client, volume, handle) = ready(seed, 3);
        fill(&mut world, client, handle, 1);
        world.flush(client, handle);
        fill(&mut world, client, handle, 60);
        // Back within the half second in which a server may be away.
        world.power_cut(1);
        world.start_cs(1);
        for _ in 0..4 {
            check(&mut world, client, handle, 60);
        }
        world.flush(client, handle);
        // After the flush the other two are not needed any more.
        world.run_for(3 * SECOND);
        let tails: usize = (1..4).map(|s| world.cs(s, |cs| cs.store().tail(volume).count())).sum();
        assert_eq!(tails, 0);
        world.power_cut(2);
        world.power_cut(3);
        check(&mut world, client, handle, 60);
    }
}

#[test]
fn a_client_that_dies_is_taken_over_from() {
    for seed in 40..60 {
        let (mut world, client, volume, handle) = ready(seed, 3);
        fill(&mut world, client, handle, 1);
        let mut rng = Rng::new(seed);
        // Writes under way when it dies: any subset of replicas may have them.
        for block in 0..32u64 {
            let data = Buf::copy_from(&[100 + block as u8; 4096]);
            world.submit(client, handle, BlockOp::Write { offset: block * 4096 * 9, data, fua: false });
        }
        let after = rng.below(MS);
        world.run_for(after);
        world.kill(client);
        let acknowledged: Vec<bool> = world.outcomes.borrow().blocks.values().map(Result::is_ok).collect();
        let other = world.add_client();
        let theirs = world.open(other, volume);
        let mut seen = Vec::new();
        for block in 0..32u64 {
            let data = world.read(other, theirs, block * 4096 * 9, 4096).unwrap();
            let (old, new) = (1 + block as u8, 100 + block as u8);
            assert!(data.iter().all(|b| *b == data[0]) && (data[0] == old || data[0] == new), "{} at {block}", data[0]);
            seen.push(data[0]);
        }
        let written = seen.iter().enumerate().filter(|(i, v)| **v == 100 + *i as u8).count();
        assert!(written >= acknowledged.len(), "{written} of at least {}", acknowledged.len());
        // What was seen once stays, whichever replica is asked.
        for _ in 0..3 {
            for block in 0..32u64 {
                assert_eq!(world.read(other, theirs, block * 4096 * 9, 1).unwrap(), [seen[block as usize]]);
            }
        }
        for server in 1..3 {
            world.kill(server);
        }
        for block in 0..32u64 {
            assert_eq!(world.read(other, theirs, block * 4096 * 9, 1).unwrap(), [seen[block as usize]]);
        }
    }
}

#[test]
fn a_paused_holder_is_fenced_and_neither_reads_nor_writes() {
    let (mut world, client, volume, handle) = ready(15, 3);
    fill(&mut world, client, handle, 1);
    world.pause(client, true);
    let other = world.add_client();
    let theirs = world.open(other, volume);
    fill(&mut world, other, theirs, 70);
    world.pause(client, false);
    let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 4096 });
    let write =
        world.submit(client, handle, BlockOp::Write { offset: 0, data: Buf::copy_from(&[7; 4096]), fua: false });
    assert_eq!(world.finish(read, 20 * SECOND).unwrap_err(), BlockError::Fenced);
    assert_eq!(world.finish(write, 20 * SECOND).unwrap_err(), BlockError::Fenced);
    assert!(world.client(client, |core| core.is_fenced(handle)));
    check(&mut world, other, theirs, 70);
    world.close(client, handle, false);
    world.close(other, theirs, true);
    let again = world.open(client, volume);
    check(&mut world, client, again, 70);
}

/// Nobody took over: nobody says so, and the volume is opened again with all that was acknowledged.
#[test]
fn after_a_pause_longer_than_the_lease_the_volume_can_be_opened_again() {
    for seed in 150..156 {
        let (mut world, client, volume, handle) = ready(seed, 3);
        fill(&mut world, client, handle, 1);
        world.flush(client, handle);
        fill(&mut world, client, handle, 60);
        let (_, lost, _) = world.client(client, |core| core.volume(handle)).unwrap();
        world.pause(client, true);
        world.run_for(30 * SECOND);
        world.pause(client, false);
        // A call made before it is known that the session has ended goes on in the next one.
        world.create_volume(client, "another", 1 << 20, "3:2");
        let late = BlockOp::Write { offset: 0, data: Buf::copy_from(&[7; 4096]), fua: false };
        let late = world.submit(client, handle, late);
        assert_eq!(world.finish(late, 20 * SECOND).unwrap_err(), BlockError::Fenced);
        let again = world.open(client, volume);
        let (_, epoch, _) = world.client(client, |core| core.volume(again)).unwrap();
        assert_eq!(epoch.0, lost.0 + 1, "nobody had it in between");
        check(&mut world, client, again, 60);
        world.close(client, handle, false);
        fill(&mut world, client, again, 90);
        check(&mut world, client, again, 90);
        assert!(world.log.iter().any(|line| line.contains("ended, because")), "{}", world.log.join("\n"));
        assert!(!world.log.iter().any(|line| line.contains("taken over")), "{}", world.log.join("\n"));
    }
}

/// The chunk of a write under way is dropped by another call of the same client: the write ends with it.
#[test]
fn a_write_whose_chunk_is_dropped_under_it_ends() {
    for seed in 160..164 {
        let (mut world, client, volume, handle) = ready(seed, 3);
        world.write(client, handle, 10 * CHUNK, &[1; 4096]);
        world.write(client, handle, CHUNK, &[2; 4096]);
        world.partition(client, 2, true);
        let data = Buf::copy_from(&[3; 8192]);
        let write = world.submit(client, handle, BlockOp::Write { offset: 10 * CHUNK, data, fua: seed % 2 == 0 });
        let flush = world.submit(client, handle, BlockOp::Flush);
        world.run_for(10 * MS);
        assert!(!world.is_done(write));
        world.call(client, MdsRequest::VolumeResize { volume, size: 4 * CHUNK, shrink: true }).unwrap();
        world.with(client, |core, now, out| core.set_size(now, handle, 4 * CHUNK, out));
        world.finish(write, SECOND).unwrap();
        world.partition(client, 2, false);
        world.finish(flush, 20 * SECOND).unwrap();
        // The chunk that takes the place knows nothing of it.
        world.call(client, MdsRequest::VolumeResize { volume, size: 16 * CHUNK, shrink: false }).unwrap();
        world.with(client, |core, now, out| core.set_size(now, handle, 16 * CHUNK, out));
        world.write(client, handle, 10 * CHUNK + 8192, &[4; 4096]);
        assert_eq!(world.read(client, handle, 10 * CHUNK, 8192).unwrap(), [0; 8192]);
        assert_eq!(world.read(client, handle, CHUNK, 4096).unwrap(), [2; 4096]);
        world.close(client, handle, true);
        let again = world.open(client, volume);
        assert_eq!(world.read(client, again, 10 * CHUNK + 8192, 4096).unwrap(), [4; 4096]);
    }
}

#[test]
fn a_holder_cut_off_from_the_metadata_servers_goes_on_verified_until_it_is_fenced() {
    let (mut world, client, volume, handle) = ready(16, 3);
    fill(&mut world, client, handle, 1);
    world.partition(client, 0, true);
    world.run_for(15 * SECOND);
    // Nobody took over: reads and writes go on, each read confirmed by every replica.
    fill(&mut world, client, handle, 20);
    check(&mut world, client, handle, 20);
    assert_eq!(world.read(client, handle, 15 << 20, 4096).unwrap(), [0; 4096], "a hole");
    let other = world.add_client();
    let theirs = world.open(other, volume);
    check(&mut world, other, theirs, 20);
    world.write(other, theirs, 0, &[77; 4096]);
    let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 4096 });
    assert_eq!(world.finish(read, 20 * SECOND).unwrap_err(), BlockError::Fenced);
}

#[test]
fn a_verified_read_waits_for_a_replica_that_does_not_confirm() {
    let (mut world, client, _, handle) = ready(17, 3);
    fill(&mut world, client, handle, 1);
    world.mds(|mds| mds.deaf = true);
    world.run_for(15 * SECOND);
    check(&mut world, client, handle, 1);
    world.partition(client, 2, true);
    let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 4096 });
    world.run_for(10 * SECOND);
    assert!(!world.is_done(read), "one replica may be where a new holder writes");
    world.partition(client, 2, false);
    world.finish(read, 10 * SECOND).unwrap();
}

#[test]
fn an_unreachable_server_is_taken_out_when_a_volume_is_opened() {
    let (mut world, client, volume, handle) = ready(18, 3);
    fill(&mut world, client, handle, 1);
    world.close(client, handle, true);
    world.kill(3);
    let handle = world.open(client, volume);
    check(&mut world, client, handle, 1);
    fill(&mut world, client, handle, 2);
    world.start_cs(3);
    world.run_for(20 * SECOND);
    world.kill(1);
    world.kill(2);
    check(&mut world, client, handle, 2);
}

#[test]
fn copies_with_damage_in_different_blocks_are_read_together() {
    let (mut world, client, _, handle) = ready(23, 3);
    let data: Vec<u8> = (0..16u8).flat_map(|block| [block + 1; 4096]).collect();
    world.write(client, handle, 0, &data);
    world.flush(client, handle);
    for (node, block) in [(1, 3), (2, 4), (3, 11), (1, 12)] {
        let holds = |page: &Vec<u8>| page.iter().all(|byte| *byte == block + 1);
        let at = (0..(64 << 20) / 4096).find(|page| holds(&world.disk(node).peek(page * 4096, 4096).to_vec()));
        world.disk(node).rot(at.expect("the block is on the disk") * 4096 + 100, 3);
    }
    assert_eq!(world.read(client, handle, 0, 4096 * 16).unwrap(), data);
    assert!(world.log.iter().any(|line| line.contains("damaged")), "every copy has a bad block");
    // All three in the same block: the error names it.
    for node in 1..=3 {
        let at = (0..(64 << 20) / 4096).find(|page| world.disk(node).peek(page * 4096, 4096).iter().all(|b| *b == 8));
        world.disk(node).rot(at.expect("the block is on the disk") * 4096 + 100, 3);
    }
    let error = world.read(client, handle, 0, 4096 * 16).unwrap_err().to_string();
    assert!(error.contains("no good copy of the data at 28672"), "{error}");
}

#[test]
fn a_damaged_copy_is_read_elsewhere_and_rewritten() {
    let (mut world, client, _, handle) = ready(19, 3);
    world.write(client, handle, 0, &[42; 4096 * 16]);
    world.flush(client, handle);
    // Rot the data wherever it lies on one disk: find it by its content.
    let mut hits = 0;
    for page in 0..(64 << 20) / 4096 {
        if world.disk(1).peek(page * 4096, 4096).iter().all(|byte| *byte == 42) {
            world.disk(1).rot(page * 4096 + 100, 3);
            hits += 1;
        }
    }
    assert!(hits >= 16);
    for _ in 0..6 {
        assert_eq!(world.read(client, handle, 0, 4096 * 16).unwrap(), [42; 4096 * 16]);
    }
    assert!(world.log.iter().any(|line| line.contains("damaged")), "one read in three meets the bad copy");
    world.run_for(3 * SECOND);
    world.kill(2);
    world.kill(3);
    assert_eq!(world.read(client, handle, 0, 4096 * 16).unwrap(), [42; 4096 * 16], "the copy was rewritten");
}

#[test]
fn a_session_that_ended_takes_its_leases_along_and_another_begins() {
    let (mut world, client, volume, handle) = ready(61, 3);
    fill(&mut world, client, handle, 1);
    let session = world.client(client, |core| core.session().unwrap());
    let admin = world.add_client();
    world.call(admin, MdsRequest::SessionRevoke { client: session }).unwrap();
    let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 4096 });
    let _ = world.finish(read, 5 * SECOND);
    world.run_for(4 * SECOND);
    assert!(world.client(client, |core| core.is_fenced(handle)));
    assert_ne!(world.client(client, |core| core.session().unwrap()), session);
    let token = world.begin_open(client, volume, LeaseMode::Exclusive);
    let again = world.opened(token, 30 * SECOND).unwrap();
    check(&mut world, client, again, 1);
}

/// Kills a chunk server or cuts its power; tells which.
fn strike(world: &mut World, rng: &mut Rng) -> usize {
    let server = 1 + rng.below(4) as usize;
    if rng.chance(1, 2) {
        world.kill(server)
    } else {
        world.power_cut(server)
    }
    server
}

/// Random faults against a shadow: every acknowledged write is read back, nothing else ever is.
#[test]
fn random_faults_lose_nothing() {
    let one: Option<u64> = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    for seed in one.map_or(100..130, |seed| seed..seed + 1) {
        let (mut world, client, _, handle) = ready(seed, 4);
        let mut rng = Rng::new(seed * 31);
        let mut shadow = [0u8; 24];
        let mut down: Option<usize> = None;
        for step in 0..150u64 {
            let dice = rng.below(14);
            world.log.push(format!("{:.6} step {step} dice {dice} down {down:?}", world.now as f64 / 1e9));
            match dice {
                0 if down.is_none() => {
                    let server = strike(&mut world, &mut rng);
                    down = Some(server);
                    if rng.chance(1, 2) {
                        world.start_cs(server);
                        down = None;
                    }
                }
                1 => {
                    if let Some(server) = down.take() {
                        world.start_cs(server);
                        // Another may fail only when this one is whole again.
                        world.run_for(25 * SECOND);
                    }
                }
                2 => world.reset(client, 1 + rng.below(4) as usize),
                3 => world.flush(client, handle),
                4 => world.run_for(rng.clone().below(2 * SECOND)),
                5..=8 => {
                    let block = rng.below(24);
                    let data = world.read(client, handle, block * 65_536, 4096).unwrap();
                    let value = shadow[block as usize];
                    assert!(
                        data.iter().all(|b| *b == value),
                        "seed {seed} step {step}: {} not {value}\n{}",
                        data[0],
                        world.log.join("\n")
                    );
                }
                _ => {
                    let block = rng.below(24);
                    shadow[block as usize] = step as u8 + 1;
                    world.log.push(format!("write block {block} value {}", step as u8 + 1));
                    world.write(client, handle, block * 65_536, &[step as u8 + 1; 4096]);
                }
            }
        }
        world.flush(client, handle);
        for (block, value) in shadow.into_iter().enumerate() {
            let data = world.read(client, handle, block as u64 * 65_536, 1).unwrap();
            assert_eq!(data, [value], "seed {seed} block {block}\n{}", world.log.join("\n"));
        }
    }
}

/// What a block may hold: one value, or after the death of a client one of several.
#[derive(Clone, Debug)]
struct Block {
    settled: u8,
    /// Submitted and unanswered, in order.
    pending: Vec<(u64, u8)>,
}

/// Many operations in flight, everything fails at random, clients die and are taken over from.
#[test]
fn concurrent_operations_survive_random_faults_and_take_overs() {
    let one: Option<u64> = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    let many = std::env::var("SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(25);
    for seed in one.map_or(1000..1000 + many, |seed| seed..seed + 1) {
        storm(seed);
    }
}

/// One seed of it: 220 steps.
pub fn storm(seed: u64) {
    const BLOCKS: u64 = 40;
    {
        eprintln!("seed {seed}");
        let (mut world, mut client, volume, mut handle) = ready(seed, 4);
        let mut rng = Rng::new(seed * 77);
        let mut blocks = vec![Block { settled: 0, pending: Vec::new() }; BLOCKS as usize];
        let mut reads: Vec<(u64, u64, u8)> = Vec::new();
        let mut flushes: Vec<u64> = Vec::new();
        let mut down: Option<usize> = None;
        for step in 0..220u64 {
            let dice = rng.below(40);
            world.log.push(format!("{:.6} step {step} dice {dice} down {down:?}", world.now as f64 / 1e9));
            match dice {
                0 if down.is_none() => {
                    let server = strike(&mut world, &mut rng);
                    if rng.chance(1, 2) { world.start_cs(server) } else { down = Some(server) }
                }
                1 | 2 => {
                    if let Some(server) = down.take() {
                        world.start_cs(server);
                        world.run_for(25 * SECOND);
                    }
                }
                3 => {
                    let server = 1 + rng.below(4) as usize;
                    world.reset(client, server);
                }
                4 => world.reset(client, 0),
                5 if down.is_none() => {
                    let server = 1 + rng.below(4) as usize;
                    world.partition(client, server, true);
                    let held = rng.below(5 * SECOND);
                    world.run_for(held);
                    world.partition(client, server, false);
                    world.run_for(25 * SECOND);
                }
                6 => {
                    let held = rng.below(2 * SECOND);
                    world.pause(client, true);
                    world.run_for(held);
                    world.pause(client, false);
                }
                7 => flushes.push(world.submit(client, handle, BlockOp::Flush)),
                8 if step > 100 && rng.chance(1, 2) => {
                    world.kill(client);
                    client = world.add_client();
                    handle = world.open(client, volume);
                    reads.clear();
                    flushes.clear();
                    for (at, block) in blocks.iter_mut().enumerate() {
                        let answered = |token: &u64| world.outcomes.borrow().blocks.contains_key(token);
                        // Whatever was acknowledged is the floor; anything submitted after it may have happened.
                        let floor = block.pending.iter().rposition(|(token, _)| answered(token));
                        let mut may: Vec<u8> = block.pending.iter().skip(floor.unwrap_or(0)).map(|p| p.1).collect();
                        if floor.is_none() {
                            may.push(block.settled);
                        }
                        let data = world.read(client, handle, at as u64 * 40_960, 4096).unwrap();
                        let log = || world.log.join("\n");
                        assert!(data.iter().all(|b| *b == data[0]), "seed {seed} torn\n{}", log());
                        assert!(
                            may.contains(&data[0]),
                            "seed {seed} block {at}: {} not in {may:?}\n{}",
                            data[0],
                            log()
                        );
                        *block = Block { settled: data[0], pending: Vec::new() };
                    }
                }
                9 => {
                    let held = rng.below(3 * SECOND);
                    world.run_for(held);
                }
                10..=24 => {
                    let block = rng.below(BLOCKS);
                    let state = &blocks[block as usize];
                    let value = state.pending.last().map_or(state.settled, |p| p.1);
                    let token = world.submit(client, handle, BlockOp::Read { offset: block * 40_960, len: 4096 });
                    reads.push((token, block, value));
                }
                _ => {
                    let block = rng.below(BLOCKS);
                    let value = if rng.chance(1, 8) { 0 } else { (step % 250) as u8 + 1 };
                    let (offset, fua) = (block * 40_960, rng.chance(1, 5));
                    let op = match value {
                        0 => BlockOp::Discard { offset, len: 4096 },
                        _ => BlockOp::Write { offset, data: Buf::copy_from(&[value; 4096]), fua },
                    };
                    let token = world.submit(client, handle, op);
                    world.log.push(format!("write block {block} value {value} token {token}"));
                    blocks[block as usize].pending.push((token, value));
                }
            }
            world.run_for(MS / 20);
        }
        if let Some(server) = down {
            world.start_cs(server);
        }
        for (token, block, value) in reads {
            let data = bytes_of(world.finish(token, 60 * SECOND).unwrap());
            let log = || world.log.join("\n");
            assert!(data.iter().all(|b| *b == value), "seed {seed} block {block}: {} not {value}\n{}", data[0], log());
        }
        flushes.into_iter().for_each(|token| drop(world.finish(token, 60 * SECOND).unwrap()));
        for block in &mut blocks {
            for (token, value) in std::mem::take(&mut block.pending) {
                world.finish(token, 60 * SECOND).unwrap();
                block.settled = value;
            }
        }
        world.flush(client, handle);
        // Everything loses power at once; what was flushed is there.
        world.run_for(20 * SECOND);
        for server in 1..=4 {
            world.power_cut(server);
        }
        for server in 1..=4 {
            world.start_cs(server);
        }
        for (at, block) in blocks.iter().enumerate() {
            let data = world.read(client, handle, at as u64 * 40_960, 4096).unwrap();
            let log = || world.log.join("\n");
            assert!(data.iter().all(|b| *b == block.settled), "seed {seed} end {at}: {}\n{}", data[0], log());
        }
        // Tails that came back with the power are settled by the next holder.
        world.close(client, handle, true);
        handle = world.open(client, volume);
        world.close(client, handle, true);
        world.run_for(SECOND);
        let tails: Vec<usize> = (1..=4).map(|s| world.cs(s, |cs| cs.store().tail(volume).count())).collect();
        assert_eq!(tails.iter().sum::<usize>(), 0, "seed {seed}: {tails:?}\n{}", world.log.join("\n"));
    }
}

/// The old holder cannot reach the metadata servers, the new one cannot reach a replica, which is therefore taken out
/// without being fenced: only confirmation by the other replicas keeps the old holder from reading there.
pub fn stale_replica_is_not_read(seed: u64) {
    let (mut world, client, volume, handle) = ready(seed, 3);
    fill(&mut world, client, handle, 1);
    world.flush(client, handle);
    world.partition(client, 0, true);
    let other = world.add_client();
    world.partition(other, 1, true);
    world.run_for(15 * SECOND);
    let theirs = world.open(other, volume);
    fill(&mut world, other, theirs, 90);
    for _ in 0..6 {
        let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 4096 });
        assert_eq!(world.finish(read, 20 * SECOND).unwrap_err(), BlockError::Fenced);
    }
}

#[test]
fn an_unfenced_replica_is_not_read_without_confirmation() {
    stale_replica_is_not_read(62);
}

/// What was acknowledged before a release survives a power cut of everything after it.
pub fn release_makes_durable() {
    for seed in 70..74 {
        let (mut world, client, volume, handle) = ready(seed, 3);
        fill(&mut world, client, handle, 7);
        world.close(client, handle, true);
        for server in 1..=3 {
            world.power_cut(server);
        }
        for server in 1..=3 {
            world.start_cs(server);
        }
        world.run_for(2 * SECOND);
        let handle = world.open(client, volume);
        check(&mut world, client, handle, 7);
    }
}

#[test]
fn a_released_volume_is_durable() {
    release_makes_durable();
}

/// Closing and opening again goes on with the same lease, so with fresh numbers.
pub fn reopening_goes_on() {
    let (mut world, client, volume, mut handle) = ready(75, 3);
    for round in 0..4u8 {
        fill(&mut world, client, handle, round * 40);
        check(&mut world, client, handle, round * 40);
        world.close(client, handle, false);
        handle = world.open(client, volume);
    }
}

#[test]
fn a_reopened_volume_never_reuses_a_number() {
    reopening_goes_on();
}

/// A chunk whose only copy was moved away while its holder looked elsewhere is neither a hole nor made anew where it
/// was.
pub fn moved_chunks_are_found(seed: u64) {
    let mut world = World::new(seed, 3);
    let (client, operator) = (world.add_client(), world.add_client());
    let volume = world.create_volume(client, "moved", 8 * CHUNK, "1:1");
    let mut handle = world.open(client, volume);
    fill(&mut world, client, handle, 1);
    world.flush(client, handle);
    let Ok(MdsReply::Chunks(entries)) = world.call(client, MdsRequest::ChunkMap { volume, index: 0, limit: 1 }) else {
        panic!("a map");
    };
    let cs = entries[0].replicas[0].cs;
    // The client hears nothing of it, for less than its lease lasts.
    world.partition(client, 0, true);
    world.call(operator, MdsRequest::CsRemove { cs, force: false, cancel: false }).unwrap();
    world.run_for(5 * SECOND);
    world.partition(client, 0, false);
    match seed % 3 {
        0 => check(&mut world, client, handle, 1),
        1 => {
            // Not a hole either.
            let op = BlockOp::Extents { offset: 0, len: 4096 };
            let BlockReply::Extents(extents) = world.run(client, handle, op).unwrap() else { panic!("extents") };
            assert!(extents.iter().all(|extent| extent.data), "{extents:?}");
        }
        _ => {
            // Written now, it is written where the chunk is.
            fill(&mut world, client, handle, 7);
            world.close(client, handle, true);
            handle = world.open(operator, volume);
            check(&mut world, operator, handle, 7);
        }
    }
}

#[test]
fn a_chunk_that_was_moved_is_not_taken_for_one_never_written() {
    (80..86).for_each(moved_chunks_are_found);
}
