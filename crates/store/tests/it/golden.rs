//! Format version 1, byte by byte: `tests/golden/store_v1.txt` holds the disk after a fixed script. A change of this
//! file is a change of the format: it needs a new version. `CAIRN_GOLDEN=write` makes the file anew.

use crate::harness::*;
use cairn_env_sim::SimDisk;
use cairn_store::*;
use cairn_types::*;
use std::fmt::Write;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/store_v1.txt");

fn script() -> World {
    let mut world = World::new(16 << 20, 1, options());
    world.create(1, 5, 600).unwrap();
    world.call(write(1, 254, 3, 1, true)).unwrap();
    world.call(unmap(1, 255, 1, 2)).unwrap();
    world.call(StoreRequest::Settle { volume: VolumeId(5), epoch: Epoch(1), sequence: Sequence(1) }).unwrap();
    world.call(StoreRequest::Fence { volume: VolumeId(8), epoch: Epoch(3) }).unwrap();
    world.call(StoreRequest::Checkpoint).unwrap();
    world.call(create(2, 6, 10)).unwrap();
    world.call(StoreRequest::SetTag { chunk: ChunkId(2), tag: b"map".to_vec() }).unwrap();
    world.call(StoreRequest::SetVersion { chunk: ChunkId(1), version: ChunkVersion(7) }).unwrap();
    world.call(write(2, 0, 1, 3, true)).unwrap();
    world
}

/// Rows of 32 bytes that are not zero: slot, offset, hex.
fn image(disk: &SimDisk) -> String {
    let mut text = String::new();
    for slot in disk.written_pages() {
        for (row, bytes) in disk.peek(slot * BLOCK as u64, BLOCK as u32).chunks_exact(32).enumerate() {
            if bytes.iter().any(|b| *b != 0) {
                let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
                writeln!(text, "{slot} {} {hex}", row * 32).unwrap();
            }
        }
    }
    text
}

fn load(text: &str) -> SimDisk {
    let mut disk = SimDisk::new(16 << 20);
    for line in text.lines() {
        let mut fields = line.split(' ');
        let slot: u64 = fields.next().unwrap().parse().unwrap();
        let at: usize = fields.next().unwrap().parse().unwrap();
        let hex = fields.next().unwrap();
        let mut bytes = disk.peek(slot * BLOCK as u64, BLOCK as u32).to_vec();
        for i in 0..32 {
            bytes[at + i] = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        }
        disk.poke(slot * BLOCK as u64, &bytes);
    }
    disk
}

#[test]
fn the_bytes_of_format_one_do_not_change() {
    let written = image(&script().disk);
    if std::env::var("CAIRN_GOLDEN").is_ok_and(|value| value == "write") {
        std::fs::create_dir_all(std::path::Path::new(GOLDEN).parent().unwrap()).unwrap();
        std::fs::write(GOLDEN, &written).unwrap();
    }
    let golden = std::fs::read_to_string(GOLDEN).expect("the golden file is part of the repository");
    for (written, golden) in written.lines().zip(golden.lines()) {
        assert_eq!(written, golden, "the format changed");
    }
    assert_eq!(written.len(), golden.len());
}

#[test]
fn a_disk_of_format_one_opens() {
    let golden = std::fs::read_to_string(GOLDEN).expect("the golden file is part of the repository");
    let mut world = World::on(load(&golden), 1, options());
    let report = world.open().unwrap();
    assert_eq!((report.generation, report.groups_replayed, report.torn_tail), (2, 4, false));
    let shown: Vec<(u64, u32, u64)> =
        world.dump().into_iter().filter(|(_, stamp)| *stamp > 0).map(|((c, b), s)| (c.0, b, s)).collect();
    assert_eq!(shown, [(1, 254, 1), (1, 256, 1), (2, 0, 3)]);
    let (one, two) = (world.store.chunk(ChunkId(1)).unwrap(), world.store.chunk(ChunkId(2)).unwrap());
    assert_eq!((one.version, one.mapped_blocks, &two.tag[..]), (ChunkVersion(7), 2, &b"map"[..]));
    assert_eq!(world.store.fence(VolumeId(8)), Some(Epoch(3)));
    assert_eq!(world.store.tail_latest(ChunkId(1), 255), Some((Epoch(1), Sequence(2))));
    assert!(world.doctor(true).is_healthy());
}
