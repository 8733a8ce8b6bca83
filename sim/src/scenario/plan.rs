//! What a seed draws before anything happens: the shape of the cluster, the kinds of fault, their pace (swarm testing:
//! a seed that knows few kinds of fault goes deeper into each).

use super::cluster::{CS_DISK, Shape};
use super::disaster::is_disaster;
use super::wrong::Wrong;
use crate::world::{MS, SECOND};
use cairn_stdx::Rng;
use cairn_types::{BLOCK_SIZE_U64, Level};

/// Kinds of fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FaultKind {
    KillCs,
    KillMds,
    KillClient,
    CutCs,
    CutMds,
    CutAll,
    Partition,
    OneWay,
    Reset,
    Pause,
    Clock,
    SlowDisk,
    /// A request to a disk fails, or all of a kind from then on; the process is started anew later, with a sound disk.
    DiskFails,
    /// Bits rot in blocks of data of one chunk server.
    Rot,
    /// A host with a client and a chunk server on it loses power: who wrote and one who has it are gone at once.
    CutHost,
    /// A host with a client and a chunk server on it is cut off from all others, longer than a lease.
    Island,
    /// A server is added, drained or removed, or comes back with an empty disk.
    Members,
    /// A flush of a server fails once; its process starts anew, and what the flush had covered must not be trusted.
    FlushFails,
    /// A chunk server is started from an older copy of its disk; the right one is put back later.
    OldCopy,
    /// The disks of metadata servers get full, for a while.
    FullMds,
    /// A metadata server is killed and its image is gone when it starts again.
    LoseImage,
    /// The one disk that does wrong is about to do so again.
    WrongDisk,
    /// The server with that disk is killed or loses power.
    RestartWrong,
}

/// Seeds with these remainders have hosts that lose power, islands, flushes that fail before a cut, old copies of
/// disks, small disks, or changes of membership. No draw decides it, so that the seeds of the regression list that have
/// no such remainder stay what they were.
pub(crate) const SEEDS_OF: u64 = 18;
pub(crate) const SEEDS_CUT_HOST: u64 = 4;
pub(crate) const SEEDS_ISLAND: u64 = 1;
pub(crate) const SEEDS_FLUSH_FAILS: u64 = 10;
pub(crate) const SEEDS_OLD_COPY: u64 = 7;
/// Among the others, seeds with this remainder have metadata servers whose disks get full, or that lose their image.
pub(crate) const SEEDS_FULL_MDS_OF: u64 = 17;
pub(crate) const SEEDS_FULL_MDS: u64 = 5;
pub(crate) const SEEDS_FULL: u64 = 3;
pub(crate) const SEEDS_MEMBERS: u64 = 17;

/// Beside all that, seeds with this remainder are made by the older release, and processes are restarted with the newer
/// one and back.
pub(crate) const SEEDS_SKEW_OF: u64 = 29;
pub(crate) const SEEDS_SKEW: u64 = 15;
/// These are of the newer release from the start; all others of the older one, which keeps the seeds of the regression
/// list what they were.
const SEEDS_NEWEST: [u64; 2] = [17, 21];

/// What shows gaps that docs/status.md names is drawn only where the build was told so (`CAIRN_SIM_WIDE=1`): clients
/// that die or lose their leases while disks are full, after which volumes cannot be opened for want of room; and stops
/// of a server whose disk lost the newest groups of its log before anybody else knew of them.
pub(super) const WIDE: bool = option_env!("CAIRN_SIM_WIDE").is_some();

/// The largest volume drawn: as many chunks as the scenario looks at.
const VOLUME_MAX: u64 = 56 << 20;

/// What may happen together with rot: whatever takes whole copies away as well could leave the rotten one alone, and
/// then data is rightly lost.
const WITH_ROT: [FaultKind; 6] =
    [FaultKind::Rot, FaultKind::KillMds, FaultKind::KillClient, FaultKind::CutMds, FaultKind::Clock, FaultKind::Reset];

/// What may happen beside a disk that does wrong.
const BESIDE_WRONG: [FaultKind; 6] = [
    FaultKind::KillMds,
    FaultKind::KillClient,
    FaultKind::CutMds,
    FaultKind::Clock,
    FaultKind::Reset,
    FaultKind::Members,
];

const ALL: [FaultKind; 14] = [
    FaultKind::KillCs,
    FaultKind::KillMds,
    FaultKind::KillClient,
    FaultKind::CutCs,
    FaultKind::CutMds,
    FaultKind::CutAll,
    FaultKind::Partition,
    FaultKind::OneWay,
    FaultKind::Reset,
    FaultKind::Pause,
    FaultKind::Clock,
    FaultKind::SlowDisk,
    FaultKind::DiskFails,
    FaultKind::Rot,
];

/// A volume of the seed.
#[derive(Clone, Debug)]
pub(super) struct VolumePlan {
    pub size: u64,
    pub replicas: u8,
    pub minimum: u8,
    /// Bytes of the unit of the shadow map: whole blocks, or sectors where writes are not aligned.
    pub unit: u64,
}

/// All that a seed draws.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub shape: Shape,
    pub volumes: Vec<VolumePlan>,
    pub faults: Vec<FaultKind>,
    pub chaos_ns: u64,
    /// Longest pause between two faults.
    pub fault_every: u64,
    /// Longest time until what was killed comes back.
    pub down_max: u64,
    /// Longest pause between two operations of a client.
    pub think: u64,
    /// Operations a client has in flight.
    pub in_flight_max: usize,
    /// Seconds until a silent chunk server counts as lost.
    pub offline_after: Option<u64>,
    /// Frames that take a long way, one in so many.
    pub slow_one_in: u64,
    /// Disks too small for what clients write, filled and drained in turn; some opens are shared, some writes fail.
    pub full: bool,
    /// Files that clients work on instead of volumes.
    pub files: Option<FilesPlan>,
    /// What one disk does wrong.
    pub wrong: Option<Wrong>,
    /// Processes are restarted with another release.
    pub skew: bool,
}

/// The files of a seed.
#[derive(Clone, Debug)]
pub(super) struct FilesPlan {
    pub count: usize,
    pub replicas: u8,
    pub minimum: u8,
}

/// Virtual time for which files are worked on.
const FILES_NS: u64 = 300 * SECOND;

impl Plan {
    /// Clients with mounts; faults in every other seed.
    pub fn draw_files(seed: u64, rng: &mut Rng, faultless: bool) -> Self {
        let mut plan = Self::draw(seed, &mut rng.split(1), true);
        plan.volumes.clear();
        plan.shape.mounts = true;
        plan.shape.clients = rng.range(1, 4) as usize;
        let replicas = rng.range(1, 4).max(rng.range(1, 4)) as u8;
        let minimum = rng.range(1, u64::from(replicas) + 1) as u8;
        plan.files = Some(FilesPlan { count: rng.range(2, 5) as usize, replicas, minimum });
        if !faultless && seed.is_multiple_of(2) {
            // Disks keep what they have: what becomes of damage is judged on volumes.
            let keeps = |kind: &FaultKind| !matches!(kind, FaultKind::DiskFails | FaultKind::Rot);
            plan.faults = ALL.into_iter().filter(keeps).collect();
            rng.shuffle(&mut plan.faults);
            plan.faults.truncate(rng.range(1, 6) as usize);
        }
        plan.chaos_ns = FILES_NS;
        plan.fault_every = *rng.choose(&[2 * SECOND, 6 * SECOND, 20 * SECOND]).expect("not empty");
        plan.think = *rng.choose(&[20 * MS, 60 * MS, 100 * MS]).expect("not empty");
        plan
    }

    pub fn draw(seed: u64, rng: &mut Rng, faultless: bool) -> Self {
        let mds = *rng.choose(&[1, 1, 3, 3, 3, 5]).expect("not empty");
        let cs = rng.range(3, 6) as usize;
        let mut shape = Shape {
            mds,
            cs,
            clients: rng.range(2, 4) as usize,
            chain_groups_max: *rng.choose(&[24, 96, 8192]).expect("not empty"),
            checkpoint_bytes: *rng.choose(&[16 << 10, 128 << 10, 4 << 20]).expect("not empty"),
            scrub: *rng.choose(&[0, 0, 120]).expect("not empty"),
            cs_disk: CS_DISK,
            fail_when_full: false,
            mounts: false,
            level: if SEEDS_NEWEST.contains(&(seed % SEEDS_SKEW_OF)) { Level::CURRENT } else { Level::OLDEST },
        };
        let volume = |rng: &mut Rng| {
            let replicas = rng.range(1, 4).max(rng.range(1, 4)) as u8;
            let minimum = rng.range(1, u64::from(replicas) + 1) as u8;
            let unit = *rng.choose(&[4096, 4096, 512]).expect("not empty");
            VolumePlan { size: (1 << 20) * rng.range(1, 4), replicas, minimum, unit }
        };
        let mut volumes: Vec<VolumePlan> = (0..rng.range(1, 4)).map(|_| volume(rng)).collect();
        let mut faults: Vec<FaultKind> = ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.range(1, 7) as usize);
        if faultless {
            faults.clear();
        }
        if faults.contains(&FaultKind::Rot) {
            faults.retain(|fault| WITH_ROT.contains(fault));
            shape.scrub = 600;
            for volume in &mut volumes {
                volume.replicas = volume.replicas.max(2);
            }
        }
        let faults_rot = faults.contains(&FaultKind::Rot);
        let mut plan = Self {
            shape,
            volumes,
            faults,
            chaos_ns: rng.range(15 * SECOND, 40 * SECOND),
            fault_every: *rng.choose(&[600 * MS, 2 * SECOND, 6 * SECOND]).expect("not empty"),
            down_max: *rng.choose(&[300 * MS, 3 * SECOND, 15 * SECOND]).expect("not empty"),
            think: *rng.choose(&[20 * MS, 60 * MS, 200 * MS]).expect("not empty"),
            in_flight_max: rng.range(1, 9) as usize,
            offline_after: rng.chance(1, 3).then_some(10),
            slow_one_in: *rng.choose(&[20, 300, 5000]).expect("not empty"),
            full: false,
            files: None,
            wrong: None,
            skew: false,
        };
        if !faultless && !plan.faults.contains(&FaultKind::Rot) {
            match seed % SEEDS_OF {
                SEEDS_CUT_HOST => plan.draw_hosts(FaultKind::CutHost, rng),
                SEEDS_ISLAND => plan.draw_hosts(FaultKind::Island, rng),
                SEEDS_FLUSH_FAILS => plan.faults = vec![FaultKind::FlushFails, FaultKind::CutCs, FaultKind::CutMds],
                SEEDS_OLD_COPY => {
                    plan.fault_every = 600 * MS;
                    plan.faults =
                        vec![FaultKind::OldCopy, FaultKind::OldCopy, FaultKind::KillCs, FaultKind::KillClient];
                }
                SEEDS_MEMBERS => plan.draw_members(rng),
                SEEDS_FULL => plan.draw_full(rng),
                _ if seed % SEEDS_FULL_MDS_OF == SEEDS_FULL_MDS => {
                    plan.faults.truncate(2);
                    plan.faults.extend([FaultKind::FullMds, FaultKind::KillMds, FaultKind::LoseImage]);
                    plan.shape.checkpoint_bytes = 16 << 10;
                }
                _ => {}
            }
        }
        let of_others = [SEEDS_CUT_HOST, SEEDS_ISLAND, SEEDS_FLUSH_FAILS, SEEDS_OLD_COPY, SEEDS_MEMBERS, SEEDS_FULL];
        let taken =
            of_others.contains(&(seed % SEEDS_OF)) || seed % SEEDS_FULL_MDS_OF == SEEDS_FULL_MDS || is_disaster(seed);
        if !faultless && !taken {
            plan.draw_wrong(Wrong::of(seed), rng);
        }
        // Restarts could leave the copy alone that rotted or that a disk did wrong to, and recovered metadata are of
        // the first level again.
        let only_copy = faults_rot || plan.wrong.is_some();
        plan.skew = seed % SEEDS_SKEW_OF == SEEDS_SKEW && !faultless && !only_copy && !is_disaster(seed);
        plan
    }

    /// One chunk server has a disk that does wrong; nothing else takes copies away.
    fn draw_wrong(&mut self, wrong: Option<Wrong>, rng: &mut Rng) {
        let Some(wrong) = wrong else { return };
        self.wrong = Some(wrong);
        self.faults = BESIDE_WRONG.to_vec();
        rng.shuffle(&mut self.faults);
        self.faults.truncate(rng.below(3) as usize);
        self.faults.extend([FaultKind::WrongDisk, FaultKind::WrongDisk, FaultKind::RestartWrong]);
        self.fault_every = self.fault_every.min(2 * SECOND);
        self.chaos_ns = rng.range(20 * SECOND, 60 * SECOND);
        self.shape.scrub = 600;
        self.volumes.iter_mut().for_each(|volume| volume.replicas = volume.replicas.max(2));
    }

    /// Hosts that run a client and a chunk server fail as a whole; few other faults, so that what they leave is not
    /// forgiven, and more than one copy, so that something is left.
    fn draw_hosts(&mut self, kind: FaultKind, rng: &mut Rng) {
        self.faults.truncate(rng.below(2) as usize);
        self.faults.push(kind);
        self.volumes.iter_mut().for_each(|volume| volume.replicas = volume.replicas.max(2));
        if kind == FaultKind::Island {
            self.volumes.iter_mut().for_each(|volume| volume.minimum = 1);
            self.chaos_ns = rng.range(40 * SECOND, 70 * SECOND);
        }
    }

    /// True when nothing that takes a copy out of its set happens beside a disk that is lost: a client that does not
    /// get through would leave the lost one alone in it.
    pub fn may_lose_a_disk(&self) -> bool {
        let harmless = |fault: &FaultKind| *fault == FaultKind::Members || WITH_ROT.contains(fault);
        !self.skew && self.faults.iter().all(harmless) && self.volumes.iter().all(|volume| volume.replicas >= 2)
    }

    /// Servers that hold about two thirds of what clients want to write, and few faults, so that they get full.
    fn draw_full(&mut self, rng: &mut Rng) {
        self.full = true;
        self.shape.fail_when_full = true;
        self.faults.retain(|fault| WIDE || !matches!(fault, FaultKind::KillClient | FaultKind::Pause));
        self.faults.truncate(rng.below(3) as usize);
        self.volumes.truncate(2);
        // Writes of sectors are what makes a block be read, changed and written; one volume of them is enough.
        self.volumes[1..].iter_mut().for_each(|volume| volume.unit = 4096);
        self.volumes.iter_mut().for_each(|volume| volume.replicas = volume.replicas.max(2));
        // The smallest store there is.
        self.shape.cs_disk = cairn_store::SLOTS_MIN * BLOCK_SIZE_U64;
        let copies: u64 = self.volumes.iter().map(|volume| u64::from(volume.replicas)).sum();
        let size = self.shape.cs as u64 * self.shape.cs_disk * 3 / 2 / copies;
        self.volumes.iter_mut().for_each(|volume| volume.size = (size >> 20 << 20).min(VOLUME_MAX));
        self.chaos_ns = rng.range(30 * SECOND, 60 * SECOND);
    }

    /// Servers come and go while others fail: no failing disks, as a wiped one is enough to survive.
    fn draw_members(&mut self, rng: &mut Rng) {
        self.faults.retain(|fault| *fault != FaultKind::DiskFails);
        self.faults.truncate(rng.below(4) as usize);
        let pace = self.faults.len().max(1);
        self.faults.extend(vec![FaultKind::Members; pace]);
        self.fault_every = self.fault_every.min(2 * SECOND);
        self.shape.mds = self.shape.mds.max(3 * usize::from(rng.chance(3, 4)));
        self.offline_after = Some(10);
        self.chaos_ns = rng.range(30 * SECOND, 80 * SECOND);
    }

    /// One line for the report.
    pub fn describe(&self) -> String {
        let shape = &self.shape;
        if let Some(FilesPlan { count, replicas, minimum }) = &self.files {
            return format!(
                "{} MDS, {} CS, {} mounts, {count} files {replicas}:{minimum}, faults {:?}",
                shape.mds, shape.cs, shape.clients, self.faults
            );
        }
        let volumes: Vec<String> =
            self.volumes.iter().map(|v| format!("{}:{}/{}", v.replicas, v.minimum, v.unit)).collect();
        format!(
            "{} MDS, {} CS{}, {} clients, volumes {}, faults {:?}{}, release {}{}",
            shape.mds,
            shape.cs,
            if self.full { format!(" of {} MiB", shape.cs_disk >> 20) } else { String::new() },
            shape.clients,
            volumes.join(" "),
            self.faults,
            self.wrong.map_or_else(String::new, |wrong| format!(", {wrong:?}")),
            shape.level,
            if self.skew { " and up" } else { "" }
        )
    }
}
