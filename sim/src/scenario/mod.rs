//! The scenario: a whole cluster over the production cores, clients that fight for a few volumes, faults, healing, and
//! the verdict of every checker.
//!
//! Three phases a seed: chaos; heal everything and wait for every operation in flight (I17); read everything back
//! through a fresh client, wait for full redundancy, compare every copy of every chunk and the state of every metadata
//! server.

mod cluster;
mod disaster;
mod eras;
mod faults;
mod fsx;
mod load;
mod members;
mod names;
mod plan;
mod setup;
mod skew;
mod verify;
mod wrong;

use crate::checkers::holders::Holders;
use crate::checkers::names::Names;
use crate::checkers::shadow::{Broken, Invariant, Shadow};
use crate::run::{Options, Outcome};
use crate::world::{MS, SECOND};
use cairn_client::ClientCore;
use cairn_client::{Completion, Notice, OpenError, VolumeHandle};
use cairn_env::block::BlockResult;
use cairn_stdx::Rng;
use cairn_wire::mds::{MdsError, MdsReply, VolumeInfo};
use cluster::{Cluster, SimMds};
use disaster::Disaster;
pub(crate) use disaster::{SEEDS_DISASTER, SEEDS_DISASTER_OF};
use eras::Eras;
use faults::Faults;
use fsx::Fsx;
use load::{Load, Pending};
use members::Members;
use plan::Plan;
pub(crate) use plan::{
    SEEDS_CUT_HOST, SEEDS_FLUSH_FAILS, SEEDS_FULL, SEEDS_FULL_MDS, SEEDS_FULL_MDS_OF, SEEDS_ISLAND, SEEDS_MEMBERS,
    SEEDS_OF, SEEDS_OLD_COPY, SEEDS_SKEW, SEEDS_SKEW_OF,
};
use skew::Skew;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use wrong::WrongDisk;
pub(crate) use wrong::{SEEDS_MISDIRECTED, SEEDS_STALE, SEEDS_WRONG_OF};

/// A verdict: nothing, or the first broken invariant.
pub(crate) type Verdict = Result<(), Box<Broken>>;

/// How often the driver looks around.
const LOOK_EVERY: u64 = 50 * MS;
/// Driver tokens: the look, faults, restarts with another release, the load of one client, its work on shared names,
/// and restorations from here on.
const TOKEN_LOOK: u64 = 0;
const TOKEN_FAULT: u64 = 1;
const TOKEN_SKEW: u64 = 2;
const TOKEN_CLIENT: u64 = 16;
const TOKEN_NAMES: u64 = 512;
const TOKEN_RESTORE: u64 = 1024;
/// Virtual time within which every operation must end once everything is healed (I17).
const END_WITHIN: u64 = 120 * SECOND;

pub(crate) fn broken(invariant: Invariant, detail: impl Into<String>) -> Box<Broken> {
    Box::new(Broken { invariant, detail: detail.into() })
}

/// How an operation of a client ended.
pub(crate) enum Answer {
    Block(BlockResult),
    Call(Result<MdsReply, MdsError>),
    Open(Result<VolumeHandle, OpenError>),
    Closed,
}

/// Answers on their way from the clients' callbacks to the driver.
type Mailbox = Rc<RefCell<Vec<(u64, Answer)>>>;

/// A volume of the run.
pub(crate) struct SimVolume {
    pub info: VolumeInfo,
    pub unit: u64,
}

/// One seed under way.
pub(crate) struct Scenario {
    seed: u64,
    plan: Plan,
    cluster: Cluster,
    shadow: Shadow,
    volumes: Vec<SimVolume>,
    loads: Vec<Load>,
    faults: Faults,
    members: Members,
    wrong: Option<WrongDisk>,
    skew: Skew,
    eras: Eras,
    pending: BTreeMap<u64, Pending>,
    mailbox: Mailbox,
    next_token: u64,
    next_value: u64,
    next_name: u64,
    names: Names,
    /// Too many calls on them were never answered.
    names_not_judged: bool,
    names_rng: Rng,
    holders: Holders,
    disaster: Disaster,
    /// Files that clients work on, in runs of that kind.
    fsx: Option<Fsx>,
    chaos: bool,
    /// The faults are over, and clients make room.
    draining: bool,
    /// Digest of the metadata state by applied index, from whichever server had it first (I11).
    digests: BTreeMap<u64, (usize, u64)>,
    /// Answers to calls of the setup.
    replies: BTreeMap<u64, Result<MdsReply, MdsError>>,
}

impl Scenario {
    pub fn new(seed: u64, options: &Options) -> Self {
        let rng = Rng::new(seed);
        let plan = match options.fsx {
            true => Plan::draw_files(seed, &mut rng.split(16), options.faultless),
            false => Plan::draw(seed, &mut rng.split(11), options.faultless),
        };
        let mut cluster = Cluster::new(seed, plan.shape.clone(), rng.split(12));
        cluster.world.verbose = options.verbose;
        cluster.world.frames = options.frames;
        cluster.world.net.slow_one_in = plan.slow_one_in;
        cluster.world.watch_levels = plan.skew;
        let loads = (0..plan.shape.clients as u64).map(|i| Load::new(rng.split(100 + i))).collect();
        let eras = Eras::new(plan.shape.cs);
        let faults = Faults::new(rng.split(13));
        let wrong = WrongDisk::new(plan.wrong, plan.shape.cs, rng.split(16));
        Self {
            seed,
            plan,
            cluster,
            shadow: Shadow::default(),
            volumes: Vec::new(),
            loads,
            faults,
            members: Members::new(rng.split(14)),
            wrong,
            skew: Skew::new(rng.split(19)),
            eras,
            pending: BTreeMap::new(),
            mailbox: Mailbox::default(),
            next_token: 1,
            next_value: 0,
            next_name: 0,
            names: Names::default(),
            names_not_judged: false,
            names_rng: rng.split(15),
            holders: Holders::default(),
            disaster: Disaster::default(),
            fsx: options.fsx.then(|| Fsx::new(rng.split(17))),
            chaos: false,
            draining: false,
            digests: BTreeMap::new(),
            replies: BTreeMap::new(),
        }
    }

    /// Runs the seed to its verdict.
    pub fn run(&mut self) -> Verdict {
        self.cluster.world.wake_driver(LOOK_EVERY, TOKEN_LOOK);
        self.set_up()?;
        self.cluster.world.note(format_args!("chaos begins: {}", self.plan.describe()));
        self.chaos = true;
        if self.fsx.is_some() {
            self.start_files();
        } else {
            for client in 0..self.loads.len() as u64 {
                self.cluster.world.wake_driver(1 + client, TOKEN_CLIENT + client);
                self.cluster.world.wake_driver(1 + client, TOKEN_NAMES + client);
            }
        }
        self.cluster.world.wake_driver(SECOND, TOKEN_FAULT);
        let (half, until) = (self.now() + self.plan.chaos_ns / 2, self.now() + self.plan.chaos_ns);
        self.begin_skew();
        self.run_until(half, |_| false)?;
        self.back_metadata_up();
        self.run_until(until, |_| false)?;
        (self.chaos, self.draining) = (self.plan.full, self.plan.full);
        self.heal()?;
        self.judge_wrong_disk()?;
        if self.draining {
            self.drain_at_last()?;
            self.chaos = false;
        }
        self.cluster.world.note(format_args!("healed; {} operations in flight", self.pending.len()));
        self.wait("changes of membership", members::ENDS_WITHIN, |s| s.members.is_idle())?;
        self.finish_skew()?;
        self.wait("operations in flight", END_WITHIN, |s| s.pending.is_empty())?;
        self.lose_all_metadata()?;
        self.verify().map_err(|broken| self.as_found(broken))
    }

    /// The verdict with everything a reader wants to know.
    pub fn outcome(self, broken: Option<Broken>) -> Outcome {
        let world = &self.cluster.world;
        let recent = if broken.is_some() { world.recent.iter().cloned().collect() } else { Vec::new() };
        Outcome {
            seed: self.seed,
            virtual_ns: world.now() - 1_000 * SECOND,
            steps: world.steps,
            trace: world.trace_hash(),
            work: self.fsx.as_ref().map_or((self.shadow.writes_acknowledged, self.shadow.blocks_read), Fsx::work),
            fsx: self.fsx.is_some(),
            names_not_judged: self.names_not_judged,
            plan: self.plan.describe(),
            broken,
            recent,
        }
    }

    fn now(&self) -> u64 {
        self.cluster.world.now()
    }

    /// Steps until `done` holds, looked at with every driver token, or the time has come; true when it holds.
    fn run_until(&mut self, until: u64, done: impl Fn(&mut Self) -> bool) -> Result<bool, Box<Broken>> {
        while self.now() < until {
            let Some(token) = self.cluster.world.step() else { break };
            self.collect()?;
            if let Some((invariant, what)) = self.cluster.world.found.take() {
                return Err(broken(invariant, what));
            }
            if let Some(token) = token {
                self.on_token(token)?;
                self.collect()?;
                if done(self) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// As [`Self::run_until`]; the time running out breaks I17.
    fn wait(&mut self, what: &str, at_most: u64, done: impl Fn(&mut Self) -> bool) -> Verdict {
        let until = self.now() + at_most;
        if self.run_until(until, done)? {
            return Ok(());
        }
        let now = self.now();
        let stuck: Vec<String> = self
            .pending
            .values()
            .map(|op| {
                format!("client {} for {:.1} s: {:?}", op.client, (now - op.since) as f64 / SECOND as f64, op.kind)
            })
            .collect();
        let detail = format!("{what}: not within {} s\n{}\n{}", at_most / SECOND, stuck.join("\n"), self.situation());
        Err(broken(Invariant::I17, detail))
    }

    fn on_token(&mut self, token: u64) -> Verdict {
        match token {
            TOKEN_LOOK => self.look(),
            TOKEN_FAULT => self.next_fault(),
            TOKEN_SKEW => self.next_of_skew(),
            TOKEN_NAMES..TOKEN_RESTORE if self.fsx.is_some() => {
                self.tick_mount((token - TOKEN_NAMES) as usize);
                Ok(())
            }
            TOKEN_CLIENT..TOKEN_NAMES if self.fsx.is_some() => {
                self.act_on_file((token - TOKEN_CLIENT) as usize);
                Ok(())
            }
            TOKEN_NAMES..TOKEN_RESTORE => {
                self.act_on_shared_names((token - TOKEN_NAMES) as usize);
                Ok(())
            }
            TOKEN_CLIENT..TOKEN_NAMES => {
                self.act((token - TOKEN_CLIENT) as usize);
                Ok(())
            }
            _ => {
                self.restore(token);
                Ok(())
            }
        }
    }

    /// What is looked after all the time, as the shells of the daemons do, and what checkers sample.
    fn look(&mut self) -> Verdict {
        self.cluster.world.wake_driver(LOOK_EVERY, TOKEN_LOOK);
        self.cluster.keep_what_is_told();
        if let Some((node, why)) = self
            .cluster
            .world
            .fatal
            .pop()
            .filter(|(node, _)| !self.may_give_up(*node) && !self.may_leave(*node) && !self.is_too_old(*node))
        {
            return Err(broken(Invariant::I17, format!("{node:?} gave up: {why}")));
        }
        for index in 0..self.cluster.mds.len() {
            let node = self.cluster.mds[index].node;
            let seen = self
                .cluster
                .world
                .inspect::<SimMds, _>(node, |core| (core.meta().applied_index(), core.meta().state_hash()));
            let Some((applied, digest)) = seen else { continue };
            let (first, known) = *self.digests.entry(applied).or_insert((index, digest));
            if known != digest {
                let detail = format!("at {applied} MDS {first} had the digest {known:x}, MDS {index} has {digest:x}");
                return Err(broken(Invariant::I11, detail));
            }
        }
        self.check_levels()?;
        self.tend_members();
        self.tend_wrong_disk()?;
        self.release_recalled();
        Ok(())
    }

    /// Takes what the clients finished.
    fn collect(&mut self) -> Verdict {
        for client in 0..=self.cluster.clients.len() {
            let Some(node) = self.cluster.clients.get(client).copied().or(self.cluster.operator) else { continue };
            let completions = self.cluster.world.inspect::<ClientCore, _>(node, ClientCore::take_completions);
            for completion in completions.into_iter().flatten() {
                match completion {
                    Completion::Notice(notice) => self.on_notice(client, &notice)?,
                    other => other.run(),
                }
            }
        }
        loop {
            let answers = std::mem::take(&mut *self.mailbox.borrow_mut());
            if answers.is_empty() {
                break;
            }
            for (token, answer) in answers {
                self.on_answer(token, answer)?;
            }
        }
        // What mounts ask for may end at once.
        if self.pump_mounts()? { self.collect() } else { Ok(()) }
    }

    fn on_notice(&mut self, client: usize, notice: &Notice) -> Verdict {
        if client == self.cluster.clients.len() {
            return Ok(());
        }
        if let Some(fsx) = &self.fsx {
            fsx.on_notice(client, notice);
            return Ok(());
        }
        let Some(load) = self.loads.get_mut(client) else { return Ok(()) };
        match notice {
            Notice::Recall(handle, _) => load.recalled(*handle),
            // A lost lease is given up like a recalled one.
            Notice::Fenced(handle) => {
                let volume = load.volume_of(*handle);
                load.recalled(*handle);
                return volume.map_or(Ok(()), |volume| self.holder_left(client, volume));
            }
            _ => {}
        }
        Ok(())
    }
}
