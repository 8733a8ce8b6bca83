//! Random workloads, crashed at random moments, over and over.

use crate::harness::*;
use crate::model::*;
use cairn_stdx::Rng;
use cairn_store::*;
use cairn_types::*;

/// Seeds to run: few by default, more with `CAIRN_STORE_SEEDS`.
pub fn seeds(default: u64) -> u64 {
    std::env::var("CAIRN_STORE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn random_request(checked: &mut Checked, rng: &mut Rng, next: &mut u64) -> StoreRequest {
    *next += 1;
    let chunks = checked.model.chunks();
    let Some((chunk, block_count)) = rng.choose(&chunks).copied() else { return create(*next + 100, VOLUME.0, 600) };
    // Few hot blocks: contention finds bugs, space does not. Some hot spots span a leaf boundary.
    let hot = if rng.chance(1, 2) { rng.below(12) as u32 } else { 250 + rng.below(12) as u32 };
    let (first, count) = (hot.min(block_count - 1), 1 + rng.below(6) as u32);
    let count = count.min(block_count - first);
    match rng.below(100) {
        0..=54 => write(chunk.0, first, count, *next, rng.chance(1, 10)),
        55..=66 => unmap(chunk.0, first, count, *next),
        67..=68 => unmap(chunk.0, 0, block_count, *next),
        69..=80 => StoreRequest::Flush,
        81..=85 => StoreRequest::Settle {
            volume: VOLUME,
            epoch: Epoch(1),
            sequence: Sequence(checked.model.settled().max(next.saturating_sub(40))),
        },
        86..=88 => StoreRequest::Checkpoint,
        89..=91 => StoreRequest::Fence { volume: FENCED, epoch: Epoch(*next) },
        92..=94 => StoreRequest::SetVersion { chunk, version: ChunkVersion(*next) },
        95..=96 if chunks.len() > 1 => StoreRequest::DeleteChunk { chunk },
        97..=98 if chunks.len() < 6 => create(*next + 100, VOLUME.0, 1 + rng.below(700) as u32),
        _ => write(chunk.0, 0, block_count.min(200), *next, false),
    }
}

/// One seed: rounds of chaos, each ended by a kill, a power cut or nothing.
pub fn crash_loop(seed: u64, rounds: u32) {
    let mut rng = Rng::new(seed);
    let options = if rng.chance(3, 4) { tight_options() } else { options() };
    let options = StoreOptions { groups_in_flight_max: 1 + rng.below(7) as usize, ..options };
    let size = (16 + rng.below(3) * 8) << 20;
    let mut world = World::new(size, seed ^ 77, options);
    if rng.chance(1, 3) {
        fragment(&mut world);
    }
    let mut checked = Checked::new(world);
    let mut next = 1;
    for _ in 0..2 {
        next += 1;
        checked.submit(create(next + 100, VOLUME.0, 600));
    }
    checked.settle();
    for _ in 0..rounds {
        let burst = 1 + rng.below(12);
        for _ in 0..rng.below(120) {
            let request = random_request(&mut checked, &mut rng, &mut next);
            checked.submit(request);
            if rng.chance(1, burst) {
                checked.turn();
                for _ in 0..rng.below(6) {
                    checked.step();
                }
            }
        }
        match rng.below(5) {
            0 => {
                checked.settle();
                checked.model.check_now(&mut checked.world);
            }
            1 | 2 => checked.crash(Crash::Kill),
            _ => checked.crash(Crash::PowerCut),
        }
        if rng.chance(1, 3) {
            let report = checked.world.doctor(rng.chance(1, 4));
            assert!(report.is_healthy(), "I10: {report}");
        }
    }
}

/// Fills the disk with a comb of small holes, so that groups have no long runs.
pub fn fragment(world: &mut World) {
    let mut chunk = 1;
    'fill: loop {
        world.create(chunk, FILLER.0, 256).unwrap();
        for first in (0..256).step_by(16) {
            if world.call(write(chunk, first, 16, 1, false)).is_err() {
                break 'fill;
            }
        }
        chunk += 1;
    }
    for chunk in 1..=chunk {
        for first in (0..256).step_by(8) {
            world.call(unmap(chunk, first + chunk as u32 % 3, 1 + first / 8 % 4, 2)).unwrap();
        }
    }
    world.call(StoreRequest::Checkpoint).unwrap();
    world.call(StoreRequest::Settle { volume: FILLER, epoch: Epoch(2), sequence: Sequence(0) }).unwrap();
}

#[test]
fn nothing_promised_is_lost_over_long_random_crash_loops() {
    for seed in 0..seeds(16) {
        crash_loop(seed, 12);
    }
}
