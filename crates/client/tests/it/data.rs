//! What users see while nothing fails.

use crate::world::*;
use cairn_client::OpenError;
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockOp, BlockReply, Extent};
use cairn_stdx::Rng;
use cairn_wire::mds::{LeaseMode, MdsRequest};

fn ready(seed: u64) -> (World, usize, cairn_types::VolumeId, cairn_client::VolumeHandle) {
    let mut world = World::new(seed, 3);
    let client = world.add_client();
    let volume = world.create_volume(client, "disk", 16 << 20, "3:2");
    let handle = world.open(client, volume);
    (world, client, volume, handle)
}

#[test]
fn what_is_written_is_read_at_any_alignment() {
    let (mut world, client, _, handle) = ready(1);
    let mut rng = Rng::new(9);
    let mut shadow = vec![0u8; 4 << 20];
    for step in 0..120u64 {
        let offset = rng.below(shadow.len() as u64 - 300_000);
        let len = [1, 511, 4096, 8192, 70_000, 262_144][rng.below(6) as usize] as usize;
        let offset = if rng.chance(1, 2) { offset & !4095 } else { offset };
        let range = offset as usize..offset as usize + len;
        match rng.below(5) {
            0 => {
                world.run(client, handle, BlockOp::Discard { offset, len: len as u64 }).unwrap();
                shadow[range].fill(0);
            }
            1 => {
                world.run(client, handle, BlockOp::WriteZeroes { offset, len: len as u64, fua: false }).unwrap();
                shadow[range].fill(0);
            }
            2 => assert_eq!(world.read(client, handle, offset, len as u32).unwrap(), shadow[range]),
            _ => {
                let data: Vec<u8> = (0..len).map(|i| (i as u64 * 7 + step) as u8).collect();
                world.write(client, handle, offset, &data);
                shadow[range].copy_from_slice(&data);
            }
        }
    }
    assert_eq!(world.read(client, handle, 0, shadow.len() as u32).unwrap(), shadow);
    world.flush(client, handle);
    world.close(client, handle, true);
}

#[test]
fn overlapping_operations_take_effect_in_order_of_submission() {
    let (mut world, client, _, handle) = ready(2);
    let mut tokens = Vec::new();
    for i in 0..40u8 {
        let data = Buf::copy_from(&vec![i + 1; 6000]);
        tokens.push(world.submit(
            client,
            handle,
            BlockOp::Write { offset: 1000 + u64::from(i) * 100, data, fua: false },
        ));
    }
    let read = world.submit(client, handle, BlockOp::Read { offset: 0, len: 16_384 });
    let after = BlockOp::Write { offset: 0, data: Buf::copy_from(&[99; 16_384]), fua: false };
    tokens.push(world.submit(client, handle, after));
    let seen = bytes_of(world.finish(read, 30 * SECOND).unwrap());
    for token in tokens {
        world.finish(token, 30 * SECOND).unwrap();
    }
    let mut expected = vec![0u8; 16_384];
    for i in 0..40usize {
        expected[1000 + i * 100..7000 + i * 100].fill(i as u8 + 1);
    }
    assert_eq!(seen, expected);
}

#[test]
fn compare_and_write_compares_and_extents_tell_holes() {
    let (mut world, client, _, handle) = ready(3);
    world.write(client, handle, 8192, &[5; 4096]);
    let compare = |compare: u8, data: u8| BlockOp::CompareAndWrite {
        offset: 8292,
        compare: Buf::copy_from(&[compare; 100]),
        data: Buf::copy_from(&[data; 100]),
        fua: true,
    };
    assert_eq!(world.run(client, handle, compare(6, 7)).unwrap_err(), BlockError::Miscompare { offset: 0 });
    world.run(client, handle, compare(5, 7)).unwrap();
    assert_eq!(world.read(client, handle, 8292, 100).unwrap(), [7; 100]);
    let reply = world.run(client, handle, BlockOp::Extents { offset: 4096, len: 3 << 20 }).unwrap();
    let BlockReply::Extents(extents) = reply else { panic!("{reply:?}") };
    assert_eq!(
        extents,
        [
            Extent { offset: 4096, len: 4096, data: false },
            Extent { offset: 8192, len: 4096, data: true },
            Extent { offset: 12_288, len: (3 << 20) - 8192, data: false },
        ]
    );
}

#[test]
fn ranges_and_modes_are_checked() {
    let (mut world, client, volume, handle) = ready(4);
    let beyond = BlockOp::Read { offset: 16 << 20, len: 1 };
    assert!(matches!(world.run(client, handle, beyond), Err(BlockError::OutOfRange { .. })));
    world.write(client, handle, 0, &[1; 4096]);
    world.close(client, handle, true);
    let token = world.begin_open(client, volume, LeaseMode::Shared);
    let shared = world.opened(token, 5 * SECOND).unwrap();
    assert_eq!(world.read(client, shared, 0, 4096).unwrap(), [1; 4096]);
    let write = BlockOp::Write { offset: 0, data: Buf::zeroed(4096), fua: false };
    assert_eq!(world.run(client, shared, write).unwrap_err(), BlockError::ReadOnly);
    let token = world.begin_open(client, volume, LeaseMode::Exclusive);
    assert_eq!(world.opened(token, 5 * SECOND).unwrap_err(), OpenError::InUse(volume));
}

#[test]
fn a_closed_volume_is_opened_again_without_a_new_lease_and_recalled_when_wanted() {
    let (mut world, client, volume, handle) = ready(5);
    world.write(client, handle, 0, &[1; 4096]);
    let epoch = world.client(client, |core| core.volume(handle).unwrap().1);
    world.close(client, handle, false);
    let handle = world.open(client, volume);
    assert_eq!(world.client(client, |core| core.volume(handle).unwrap().1), epoch);
    for round in 2..6u8 {
        world.write(client, handle, 0, &[round; 4096]);
        assert_eq!(world.read(client, handle, 0, 4096).unwrap(), [round; 4096]);
    }
    world.close(client, handle, false);
    let other = world.add_client();
    let theirs = world.open(other, volume);
    assert_eq!(world.read(other, theirs, 0, 4096).unwrap(), [5; 4096]);
    let reconciled = world.log.iter().any(|line| line.contains("reconciling"));
    assert!(!reconciled, "a clean release leaves nothing to reconcile");
    // An open volume is not given up: the front end is asked.
    let token = world.begin_open(client, volume, LeaseMode::Exclusive);
    world.run_for(2 * SECOND);
    assert!(world.notices.iter().any(|(p, n)| *p == other && matches!(n, cairn_client::Notice::Recall(..))));
    world.close(other, theirs, true);
    let handle = world.opened(token, 5 * SECOND).unwrap();
    assert_eq!(world.read(client, handle, 0, 4096).unwrap(), [5; 4096]);
}

#[test]
fn an_idle_volume_settles_by_itself() {
    let (mut world, client, volume, handle) = ready(6);
    for block in 0..64u64 {
        world.write(client, handle, block * 4096, &[3; 4096]);
    }
    world.run_for(5 * SECOND);
    for server in 1..4 {
        let tail = world.cs(server, |cs| cs.store().tail(volume).count());
        assert_eq!(tail, 0, "server {server}");
    }
}

#[test]
fn a_call_whose_answer_is_lost_takes_effect_once() {
    let mut world = World::new(7, 3);
    let client = world.add_client();
    for i in 0..10 {
        world.mds(|mds| mds.lose_answers = 1 + i % 2);
        world.create_volume(client, &format!("v{i}"), 1 << 20, "3:2");
    }
    let create = MdsRequest::VolumeCreate { name: "v3".into(), size: 1 << 20, options: Default::default() };
    assert!(matches!(world.call(client, create), Err(cairn_wire::mds::MdsError::Exists(_))));
}

#[test]
fn many_writes_in_flight_stay_within_bounds_and_all_end() {
    let (mut world, client, _, handle) = ready(8);
    let mut tokens = Vec::new();
    for i in 0..3000u64 {
        let data = Buf::copy_from(&[(i % 250) as u8; 4096]);
        tokens.push(world.submit(client, handle, BlockOp::Write { offset: (i % 2048) * 4096, data, fua: false }));
    }
    for token in tokens {
        world.finish(token, 60 * SECOND).unwrap();
    }
    for i in 1000..2048u64 {
        let last = if i + 2048 < 3000 { i + 2048 } else { i };
        assert_eq!(world.read(client, handle, i * 4096, 1).unwrap(), [(last % 250) as u8]);
    }
}
