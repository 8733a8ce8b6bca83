//! Disks that fail, rot and fill up.

use crate::world::*;
use cairn_env::Buf;
use cairn_env_sim::{Fault, OpKind};
use cairn_types::*;
use cairn_wire::cs::CsError;
use cairn_wire::data::{DataOp, DataStatus};
use cairn_wire::mds::CsOrder;

#[test]
fn a_failed_disk_serves_nothing_and_says_so() {
    for kind in [OpKind::Write, OpKind::Flush] {
        let mut world = World::new(1, 1);
        let client = world.client(0, 1, 1);
        world.fence(client, 5).unwrap();
        world.create(client, 1, 5);
        world.nodes[0].disk.inject(Fault::Fail { kind, nth: 0, forever: false });
        let (mut request, data) = write(1, 5, 1, 0, 1, 1);
        request.flags = cairn_wire::data::FLAG_DURABLE;
        assert_eq!(world.status(client, &request, data), DataStatus::DiskFailed);
        for operation in [DataOp::Read, DataOp::Flush, DataOp::Confirm, DataOp::Unmap] {
            assert_eq!(world.status(client, &op(operation, 1, 5, 2, 0), Buf::default()), DataStatus::DiskFailed);
        }
        assert!(matches!(world.fence(client, 6), Err(CsError::DiskFailed(_))));
        world.pass(Duration::from_secs(2));
        assert!(world.nodes[0].told_failed.is_some());
        assert!(world.nodes[0].fatal.is_none() && world.core(0).failed().is_some(), "it stays up to tell");
    }
}

#[test]
fn a_rotten_block_is_never_served_and_a_write_heals_it() {
    // Without a scrub of its own accord, until the metadata servers set the pace below.
    let mut world = World::new(2, 1);
    let client = world.client(0, 1, 1);
    world.fence(client, 5).unwrap();
    world.create(client, 1, 5);
    let value = 0x5eed_f00d_cafe_0001;
    let (request, data) = write(1, 5, 1, 9, 1, value);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    let mut at = None;
    for page in 0..world.nodes[0].disk.size() / 4096 {
        if world.nodes[0].disk.peek(page * 4096, 4096)[..8] == value.to_le_bytes() {
            at = Some(page * 4096);
        }
    }
    world.nodes[0].disk.rot(at.expect("the block is on the disk") + 100, 3);
    let (reply, data) = world.data(client, &op(DataOp::Read, 1, 5, 0, 9), Buf::default());
    assert_eq!((reply.status, reply.detail, data.len()), (DataStatus::Corrupt, 9, 0));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.nodes[0].damaged, [(CHUNK, 9)]);
    world.nodes[0].damaged.clear();
    world.pass(Duration::from_secs(200));
    assert_eq!(world.core(0).scrub_rounds(), 0);
    world.order(0, CsOrder::VerifyRate { chunks_per_minute: 60 });
    world.pass(Duration::from_secs(200));
    assert!(world.core(0).scrub_rounds() > 0);
    assert!(world.nodes[0].damaged.contains(&(CHUNK, 9)), "the scrub finds it as well");
    let (request, data) = write(1, 5, 2, 9, 1, 7);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok);
    assert_eq!(world.status(client, &op(DataOp::Read, 1, 5, 0, 9), Buf::default()), DataStatus::Ok);
}

#[test]
fn an_unreadable_store_ends_the_process_with_advice() {
    let mut world = World::new(3, 1);
    world.kill(0);
    for offset in [0, 4096, 256 * 4096, 257 * 4096] {
        world.nodes[0].disk.poke(offset, &[0xee; 4096]);
    }
    world.start(0);
    world.settle();
    let reason = world.nodes[0].fatal.clone().expect("it cannot go on");
    assert!(reason.contains("chunk store cannot be opened"), "{reason}");
}

#[test]
fn a_full_disk_refuses_writes_and_goes_on_with_the_rest() {
    let mut world = World::new(4, 1);
    let client = world.client(0, 1, 1);
    world.fence(client, 5).unwrap();
    let mut sequence = 0;
    let mut full = false;
    'fill: for index in 0..20u64 {
        let chunk = ChunkId(1000 + index);
        let create = cairn_wire::cs::CsRequest::Create {
            chunk,
            volume: VOLUME,
            layer: LayerId(1),
            index,
            block_count: BLOCKS,
            version: ChunkVersion(1),
            epoch: Epoch(5),
        };
        if world.call(client, create) == Err(CsError::NoSpace) {
            full = true;
            break;
        }
        for first in (0..BLOCKS).step_by(64) {
            sequence += 1;
            let (mut request, data) = write(1, 5, sequence, first, 64, sequence);
            request.chunk = chunk;
            match world.status(client, &request, data) {
                DataStatus::Ok => {}
                DataStatus::NoSpace => {
                    full = true;
                    break 'fill;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(full, "32 MiB cannot hold 40");
    assert!(world.fence(client, 6).is_ok());
    let read = cairn_wire::data::DataRequest { chunk: ChunkId(1000), ..op(DataOp::Read, 1, 6, 0, 0) };
    assert_eq!(world.status(client, &read, Buf::default()), DataStatus::Ok);
    let unmap =
        cairn_wire::data::DataRequest { chunk: ChunkId(1000), block_count: BLOCKS, ..op(DataOp::Unmap, 1, 6, 1, 0) };
    assert_eq!(world.status(client, &unmap, Buf::default()), DataStatus::Ok);
    let (mut request, data) = write(1, 6, 2, 0, 64, 9);
    request.chunk = ChunkId(1000);
    assert_eq!(world.status(client, &request, data), DataStatus::Ok, "space returned is usable");
}
