//! A disk that fails, lies and rots: an error or the truth, never something else.

use crate::crash::seeds;
use crate::harness::*;
use crate::model::*;
use cairn_env_sim::{Fault, OpKind, SimDisk};
use cairn_stdx::Rng;
use cairn_store::*;
use cairn_types::*;

/// A workload on a disk whose `nth` request of `kind` fails. True when the fault was reached.
pub fn fail_nth(seed: u64, kind: OpKind, nth: u64, forever: bool) -> bool {
    let mut rng = Rng::new(seed);
    let mut checked = Checked::new(World::new(16 << 20, seed, tight_options()));
    checked.allow_failed = true;
    checked.submit(create(1, VOLUME.0, 600));
    checked.submit(create(2, VOLUME.0, 600));
    checked.settle();
    if kind == OpKind::Read {
        // Cold leaves: then writes read, too.
        for first in [0, 256, 512] {
            checked.submit(write(1, first, 60, 1, false));
            checked.submit(write(2, first, 60, 1, false));
        }
        checked.submit(StoreRequest::Checkpoint);
        checked.settle();
        checked.world.open().unwrap();
    }
    checked.world.disk.inject(Fault::Fail { kind, nth, forever });
    for stamp in 2..60 {
        let chunk = 1 + rng.below(2);
        let request = match rng.below(10) {
            0..=5 => write(chunk, rng.below(590) as u32, 1 + rng.below(8) as u32, stamp, rng.chance(1, 4)),
            6 => unmap(chunk, rng.below(500) as u32, 90, stamp),
            7 => StoreRequest::Checkpoint,
            8 if kind == OpKind::Read => {
                StoreRequest::Read { chunk: ChunkId(chunk), first_block: rng.below(500) as u32, block_count: 90 }
            }
            _ => StoreRequest::Flush,
        };
        checked.submit(request);
        if rng.chance(1, 3) {
            checked.settle();
        }
    }
    checked.settle();
    let reached = if kind == OpKind::Read {
        checked.world.notices.iter().any(|notice| matches!(notice, Notice::ReadFailed(_)))
    } else {
        checked.world.store.failure().is_some()
    };
    if reached && kind != OpKind::Read {
        let answer = checked.world.call(StoreRequest::Flush);
        assert!(matches!(answer, Err(StoreError::Failed { .. })), "I12: a stopped store answers nothing");
        if forever {
            let opened = checked.world.open();
            assert!(opened.is_err(), "a store whose device cannot write must not open");
        }
    }
    checked.world.disk.lift_faults();
    checked.crash(Crash::PowerCut);
    assert!(checked.world.doctor(true).is_healthy());
    reached
}

#[test]
fn the_nth_request_fails_once_or_forever_and_nothing_promised_is_lost() {
    for kind in [OpKind::Write, OpKind::Flush, OpKind::Read] {
        for forever in [false, true] {
            let reached = (0..seeds(60)).filter(|nth| fail_nth(nth % 7, kind, nth * 2 / 3, forever)).count();
            assert!(reached > 3, "{kind:?} faults were hardly reached: {reached}");
        }
    }
}

/// A store with a checkpoint, a chain behind it, and a flush mark that covers all but the last write.
fn settled_world(seed: u64) -> World {
    let options = StoreOptions { cache_bytes: 1, ..options() };
    let mut world = World::new(16 << 20, seed, options);
    for chunk in 1..=3 {
        world.create(chunk, VOLUME.0, 600).unwrap();
        for first in (0..600).step_by(40) {
            world.call(write(chunk, first, 20, u64::from(first) + 1, false)).unwrap();
        }
    }
    world.call(StoreRequest::Fence { volume: FENCED, epoch: Epoch(4) }).unwrap();
    world.call(StoreRequest::Checkpoint).unwrap();
    for stamp in 700..712 {
        world.call(write(stamp % 3 + 1, stamp as u32 - 600, 3, stamp, false)).unwrap();
    }
    world.call(StoreRequest::Flush).unwrap();
    world.call(write(1, 0, 1, 720, false)).unwrap();
    world
}

/// Opens a damaged copy of a disk: an error, or every block true or reported. Returns whether anything was noticed.
fn open_damaged(disk: SimDisk, truth: &std::collections::BTreeMap<(ChunkId, u32), u64>) -> bool {
    let options = StoreOptions { cache_bytes: 1, ..options() };
    let mut world = World::on(disk, 3, options);
    if let Err(error) = world.open() {
        assert!(!matches!(error, OpenError::Failed { .. }), "{error}");
        return true;
    }
    let mut noticed = false;
    for chunk in 1..=3 {
        for first_block in 0..600u32 {
            let wanted = truth[&(ChunkId(chunk), first_block)];
            let read = StoreRequest::Read { chunk: ChunkId(chunk), first_block, block_count: 1 };
            match world.call(read) {
                Ok(StoreReply::Data(data)) => {
                    let stamp = stamps(ChunkId(chunk), first_block, &data)[0];
                    // The last write was not flushed: it may be gone with its group.
                    let unflushed = chunk == 1 && first_block == 0 && stamp == 1;
                    assert!(stamp == wanted || unflushed, "I10: {chunk}/{first_block} shows {stamp}, not {wanted}");
                }
                Err(StoreError::Corrupt { .. }) => noticed = true,
                other => panic!("{other:?}"),
            }
        }
    }
    noticed
}

/// One damaged page at a time, each kind of damage, over every page ever written.
pub fn rot_everywhere(step: usize) {
    let mut world = settled_world(1);
    let truth = world.dump();
    let healthy = world.disk.clone();
    let mut rng = Rng::new(8);
    let (mut noticed, mut tried) = (0, 0);
    let pages = healthy.written_pages();
    for (n, page) in pages.iter().enumerate().step_by(step) {
        let mut disk = healthy.clone();
        let offset = page * BLOCK as u64;
        match n / step % 4 {
            0 => disk.rot(offset + rng.below(BLOCK as u64), rng.below(8) as u8),
            1 => disk.poke(offset, &[0; BLOCK]),
            2 => {
                let other = *rng.choose(&pages).unwrap() * BLOCK as u64;
                let bytes = disk.peek(other, BLOCK as u32);
                disk.poke(offset, &bytes);
            }
            _ => {
                let mut bytes = disk.peek(offset, BLOCK as u32).to_vec();
                rng.fill(&mut bytes[512..1024]);
                disk.poke(offset, &bytes);
            }
        }
        let report = World::on(disk.clone(), 1, options()).doctor(true);
        let seen = open_damaged(disk, &truth);
        tried += 1;
        noticed += u32::from(seen);
        assert!(!seen || !report.findings.is_empty(), "I10: the doctor misses page {page}: {report}");
    }
    assert!(noticed * 2 > tried, "only {noticed} of {tried} damages mattered");
}

#[test]
fn damage_of_any_page_is_an_error_or_has_no_effect() {
    rot_everywhere(3);
}

#[test]
fn a_damaged_block_is_reported_by_reads_and_scrubs_and_repaired_by_a_write() {
    let mut world = World::new(16 << 20, 1, options());
    world.create(1, VOLUME.0, 100).unwrap();
    world.call(write(1, 0, 8, 1, true)).unwrap();
    // Find the data by its content.
    let page = world
        .disk
        .written_pages()
        .into_iter()
        .find(|page| world.disk.peek(page * BLOCK as u64, BLOCK as u32)[..] == block_of(ChunkId(1), 3, 1));
    world.disk.rot(page.unwrap() * BLOCK as u64 + 100, 1);
    let corrupt = StoreError::Corrupt { chunk: ChunkId(1), blocks: vec![3] };
    assert_eq!(world.read_stamps(ChunkId(1), 0, 8), Err(corrupt));
    assert_eq!(world.notices, [Notice::Corrupt { chunk: ChunkId(1), blocks: vec![3] }]);
    let verify = StoreRequest::Verify { chunk: ChunkId(1), from_block: 0, limit: 64 };
    assert_eq!(world.call(verify.clone()), Ok(StoreReply::Verified { bad: vec![3], next: Some(64) }));
    world.call(write(1, 3, 1, 2, false)).unwrap();
    assert_eq!(world.read_stamps(ChunkId(1), 0, 8).unwrap(), [1, 1, 1, 2, 1, 1, 1, 1]);
    assert_eq!(world.call(verify), Ok(StoreReply::Verified { bad: vec![], next: Some(64) }));
}

#[test]
fn a_damaged_leaf_costs_its_blocks_only_and_writes_repair_them() {
    let mut world = settled_world(2);
    world.call(StoreRequest::Checkpoint).unwrap();
    let healthy = world.disk.clone();
    let mut found = 0;
    for page in healthy.written_pages() {
        let mut disk = healthy.clone();
        disk.rot(page * BLOCK as u64 + 16 * 22, 0);
        let mut world = World::on(disk, 1, StoreOptions { cache_bytes: 1, ..options() });
        if world.open().is_err() {
            continue;
        }
        let answer = world.call(StoreRequest::Read { chunk: ChunkId(2), first_block: 256, block_count: 256 });
        let Err(StoreError::Corrupt { blocks, .. }) = answer else { continue };
        if blocks.len() < 256 {
            continue;
        }
        found += 1;
        assert!(world.doctor(false).findings.iter().any(|f| f.structure == "leaf"));
        for first in (256..512).step_by(64) {
            world.call(write(2, first, 64, 800, true)).unwrap();
        }
        assert_eq!(world.read_stamps(ChunkId(2), 256, 256).unwrap(), [800; 256]);
        assert_eq!(world.read_stamps(ChunkId(2), 0, 1).unwrap().len(), 1);
        world.call(StoreRequest::Checkpoint).unwrap();
        world.open().unwrap();
        assert_eq!(world.read_stamps(ChunkId(2), 256, 256).unwrap(), [800; 256]);
        world.call(StoreRequest::DeleteChunk { chunk: ChunkId(2) }).unwrap();
    }
    assert_eq!(found, 1, "one leaf describes these blocks");
}

#[test]
fn lost_misdirected_and_stale_writes_never_show_wrong_data() {
    for seed in 0..seeds(40) {
        let mut rng = Rng::new(seed);
        let mut world = World::new(16 << 20, seed, tight_options());
        world.create(1, VOLUME.0, 600).unwrap();
        match rng.below(3) {
            0 => world.disk.inject(Fault::LoseWrite { nth: rng.below(30) }),
            1 => {
                let offset = rng.below(1000) * BLOCK as u64;
                world.disk.inject(Fault::MisdirectWrite { nth: rng.below(30), offset });
            }
            _ => {}
        }
        let mut truth = std::collections::BTreeMap::new();
        for stamp in 1..60 {
            let (first, count) = (rng.below(590) as u32, 1 + rng.below(8) as u32);
            let answer = world.call(write(1, first, count, stamp, false));
            if answer.is_ok() {
                truth.extend((first..first + count).map(|block| (block, stamp)));
            }
            if rng.chance(1, 4) {
                world.disk.stale_read(rng.below(1000) * BLOCK as u64);
            }
            let block = rng.below(600) as u32;
            match world.read_stamps(ChunkId(1), block, 1) {
                Ok(stamps) => assert_eq!(stamps[0], truth.get(&block).copied().unwrap_or(0), "I10: seed {seed}"),
                Err(StoreError::Corrupt { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_hanging_write_delays_its_followers_and_reads_go_on() {
    let mut world = World::new(16 << 20, 1, options());
    world.create(1, VOLUME.0, 600).unwrap();
    world.call(write(1, 0, 4, 1, false)).unwrap();
    world.disk.inject(Fault::Hang { kind: OpKind::Write, nth: 0 });
    let first = world.submit(write(1, 0, 1, 2, false));
    world.turn();
    let second = world.submit(write(1, 1, 1, 3, false));
    world.settle();
    assert!(world.answers.is_empty(), "answers come in log order");
    assert_eq!(world.read_stamps(ChunkId(1), 0, 4).unwrap(), [1, 1, 1, 1]);
    world.disk.lift_faults();
    world.settle();
    assert!(world.answers[&first].is_ok() && world.answers[&second].is_ok());
    assert_eq!(world.read_stamps(ChunkId(1), 0, 4).unwrap(), [2, 3, 1, 1]);
}
