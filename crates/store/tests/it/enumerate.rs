//! Crash enumeration: every workload of up to three operations, cut at every point, with every subset of the sectors no
//! flush had covered (all subsets of whole pages up to ten, torn sectors of every page, random mixtures above).

use crate::harness::*;
use crate::model::*;
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_store::*;
use cairn_types::*;

/// Crash states to visit: about a tenth of all by default, all of them with a large `CAIRN_STORE_STATES`.
fn states_max() -> u64 {
    std::env::var("CAIRN_STORE_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(6000)
}

const ALPHABET: usize = 9;

fn operation(letter: usize, stamp: u64) -> StoreRequest {
    match letter {
        0 => write(1, 0, 1, stamp, false),
        1 => write(1, 0, 2, stamp, true),
        2 => write(1, 255, 2, stamp, false),
        3 => unmap(1, 0, 1, stamp),
        4 => StoreRequest::Flush,
        5 => StoreRequest::Checkpoint,
        6 => create(2, VOLUME.0, 10),
        7 => StoreRequest::SetVersion { chunk: ChunkId(1), version: ChunkVersion(stamp) },
        _ => StoreRequest::Fence { volume: FENCED, epoch: Epoch(stamp) },
    }
}

fn workloads() -> Vec<Vec<usize>> {
    let mut all = Vec::new();
    for a in 0..ALPHABET {
        all.push(vec![a]);
        for b in 0..ALPHABET {
            all.push(vec![a, b]);
            all.extend((0..ALPHABET).map(|c| vec![a, b, c]));
        }
    }
    // A chunk is created once.
    all.retain(|letters| letters.iter().filter(|letter| **letter == 6).count() < 2);
    all
}

/// Walks over the crash states of one moment; only wanted ones are made.
struct Explorer {
    rng: Rng,
    visited: u64,
    /// Visit one state in this many.
    stride: u64,
    seen: u64,
}

impl Explorer {
    fn wanted(&mut self) -> bool {
        self.seen += 1;
        let wanted = self.seen.is_multiple_of(self.stride);
        self.visited += u64::from(wanted);
        wanted
    }

    fn cut(&mut self, checked: &Checked, choose: &mut dyn FnMut(u64, usize, usize) -> usize) {
        if self.wanted() {
            let mut disk = checked.world.disk.clone();
            disk.power_cut_choose(choose);
            self.check(checked, disk, Crash::PowerCut);
        }
    }

    fn check(&self, checked: &Checked, disk: SimDisk, crash: Crash) {
        let mut world = World::on(disk, self.visited, options());
        world.open().unwrap_or_else(|error| panic!("I1: {error}"));
        checked.model.clone().check_after(&mut world, crash);
    }

    fn explore(&mut self, checked: &Checked) {
        let pages = checked.world.disk.unflushed_pages();
        let index_of = |page: u64| pages.iter().position(|p| *p == page).unwrap();
        for subset in 0..1u64 << pages.len().min(10) {
            let subset = if pages.len() > 10 { self.rng.next_u64() } else { subset };
            self.cut(checked, &mut |page, _, versions| if subset >> index_of(page) & 1 == 1 { versions } else { 0 });
        }
        for torn in 0..pages.len() {
            for sector in 0..8 {
                let hit = |page: u64| index_of(page) == torn;
                self.cut(checked, &mut |page, s, versions| if hit(page) && s == sector { 0 } else { versions });
                self.cut(checked, &mut |page, s, versions| if hit(page) && s != sector { 0 } else { versions });
            }
        }
        for _ in 0..4 {
            let mut rng = Rng::new(self.rng.next_u64());
            self.cut(checked, &mut |_, _, versions| rng.below(versions as u64 + 1) as usize);
        }
        if self.wanted() {
            let mut disk = checked.world.disk.clone();
            disk.kill(&mut self.rng);
            self.check(checked, disk, Crash::Kill);
        }
    }
}

#[test]
fn every_crash_state_of_every_small_workload_keeps_every_promise() {
    let mut base = Checked::new(World::new(16 << 20, 1, options()));
    base.submit(create(1, VOLUME.0, 260));
    base.settle();
    base.submit(write(1, 0, 3, 1, true));
    base.settle();
    base.crash(Crash::Kill);
    let workloads = workloads();
    // Measured: a workload has about 700 states.
    let stride = (workloads.len() as u64 * 700 / states_max()).max(1);
    let mut explorer = Explorer { rng: Rng::new(5), visited: 0, stride, seen: 0 };
    for (n, letters) in workloads.iter().enumerate() {
        let mut checked = Checked::new(World::on(base.world.disk.clone(), n as u64, options()));
        checked.world.open().unwrap();
        checked.model = base.model.clone();
        checked.world.next_token = 1000;
        let queued = n % 2 == 0;
        for (i, letter) in letters.iter().enumerate() {
            checked.submit(operation(*letter, 2 + i as u64));
            if !queued {
                checked.turn();
                explorer.explore(&checked);
                while checked.step() {
                    checked.turn();
                    explorer.explore(&checked);
                }
            }
        }
        checked.turn();
        explorer.explore(&checked);
        while checked.step() {
            checked.turn();
            explorer.explore(&checked);
        }
    }
    println!("{} crash states visited of {}", explorer.visited, explorer.seen);
    assert!(explorer.visited >= states_max().min(explorer.seen) / 4);
}
