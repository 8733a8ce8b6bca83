//! Rolling upgrades amid faults: processes are started again with the release before or after, in any order, and the
//! cluster is raised in the end, or not (I15).
//!
//! The cluster is made by the older release. While faults go on each process may be restarted with either. Then some
//! clusters are raised amid the faults, some after them, some go all the way back, and some stay mixed. In those that
//! were raised a metadata server and a chunk server are started with the older release once more: they must give up,
//! and go on with the newer.

use super::cluster::SimMds;
use super::load::{Kind, Pending};
use super::{Answer, Scenario, TOKEN_SKEW, Verdict, broken};
use crate::checkers::shadow::Invariant;
use crate::world::{MS, NodeIndex, SECOND};
use cairn_client::ClientCore;
use cairn_stdx::Rng;
use cairn_types::Level;
use cairn_wire::mds::{MdsError, MdsReply, MdsRequest};

/// Longest pause between two restarts, and longest time a process is away for one.
const PAUSE_MAX: u64 = 3 * SECOND;
const AWAY_MAX: u64 = 2 * SECOND;
/// Restarts of clients to and fro in a run: what each leaves unanswered makes the search through the orders of calls on
/// shared names longer by a factor.
const CLIENTS_MAX: usize = 3;
/// How long the operator waits before calling again.
const AGAIN_AFTER: u64 = SECOND;
/// Virtual time within which an upgrade ends once the faults are over.
const ENDS_WITHIN: u64 = 600 * SECOND;
/// Virtual time within which a process of the older release has given up in a cluster that was raised.
const GIVES_UP_WITHIN: u64 = 60 * SECOND;

/// How the upgrade ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// Raised while faults go on, or as soon after them as can be.
    RaisedAmid,
    /// Raised when the faults are over.
    RaisedAfter,
    /// Every process is of the older release again.
    Back,
    /// As the last restart left it.
    Mixed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// To and fro.
    Rolling,
    /// Everything is restarted with this release.
    To(Level),
    /// The operator asks for the cluster to be raised; called, or to be called at this time.
    Asking(Option<u64>),
    /// Nothing is restarted any more; the cluster is raised, or stays.
    Over,
}

/// A process that is restarted.
#[derive(Clone, Copy)]
enum Which {
    Mds(usize),
    Cs(usize),
    Client(usize),
}

/// The upgrade of a run.
pub(super) struct Skew {
    rng: Rng,
    ending: Ending,
    phase: Phase,
    raise_at: u64,
    /// The operator has asked: what is new may be used from then on.
    asked: bool,
    /// It must give up.
    tried: Option<NodeIndex>,
    clients_left: usize,
}

impl Skew {
    pub fn new(mut rng: Rng) -> Self {
        let endings = [Ending::RaisedAmid, Ending::RaisedAmid, Ending::RaisedAfter, Ending::Back, Ending::Mixed];
        let ending = *rng.choose(&endings).expect("not empty");
        let raise_at = rng.range(3 * SECOND, 15 * SECOND);
        Self { rng, ending, phase: Phase::Rolling, raise_at, asked: false, tried: None, clients_left: CLIENTS_MAX }
    }
}

impl Scenario {
    /// Begins to restart processes.
    pub(super) fn begin_skew(&mut self) {
        if self.plan.skew {
            self.skew.raise_at += self.now();
            self.cluster.world.wake_driver(SECOND, TOKEN_SKEW);
            let ending = self.skew.ending;
            self.cluster.world.note(format_args!("the upgrade begins; ending: {ending:?}"));
        }
    }

    /// The next step of the upgrade.
    pub(super) fn next_of_skew(&mut self) -> Verdict {
        let pause = if self.chaos { PAUSE_MAX } else { SECOND };
        match self.skew.phase {
            Phase::Over => return Ok(()),
            Phase::Rolling if self.skew.ending == Ending::RaisedAmid && self.now() >= self.skew.raise_at => {
                self.all_to(Level::CURRENT);
            }
            Phase::Rolling => {
                let all = self.restartable();
                let which = *self.skew.rng.choose(&all).expect("processes");
                let level = *self.skew.rng.choose(&[Level::OLDEST, Level::CURRENT]).expect("not empty");
                if !matches!(which, Which::Client(_)) {
                    self.restart(which, level)?;
                } else if self.skew.clients_left > 0 && self.level_of(which) != level {
                    self.skew.clients_left -= 1;
                    self.restart(which, level)?;
                }
            }
            Phase::To(level) => {
                let of = |which: &Which| self.level_of(*which) != level;
                let left: Vec<Which> = self.restartable().into_iter().filter(of).collect();
                match self.skew.rng.choose(&left).copied() {
                    Some(which) => self.restart(which, level)?,
                    None if level == Level::CURRENT => self.skew.phase = Phase::Asking(Some(self.now())),
                    None => self.skew.phase = Phase::Over,
                }
            }
            Phase::Asking(Some(at)) if self.now() >= at => self.ask(),
            Phase::Asking(_) => {}
        }
        let after = self.skew.rng.range(50 * MS, pause);
        self.cluster.world.wake_driver(after, TOKEN_SKEW);
        Ok(())
    }

    fn all_to(&mut self, level: Level) {
        self.skew.phase = Phase::To(level);
        // Who is added from now on is of it too.
        self.cluster.shape.level = level;
    }

    fn restartable(&self) -> Vec<Which> {
        let mds = (0..self.cluster.mds.len()).filter(|&index| !self.cluster.mds[index].retired).map(Which::Mds);
        let cs = (0..self.cluster.cs.len()).filter(|&index| !self.cluster.cs[index].retired).map(Which::Cs);
        // Where disks are full, clients do not die: their volumes might not open again.
        let clients = if self.plan.full { 0 } else { self.cluster.clients.len() };
        mds.chain(cs).chain((0..clients).map(Which::Client)).collect()
    }

    fn level_of(&self, which: Which) -> Level {
        match which {
            Which::Mds(index) => self.cluster.mds[index].level,
            Which::Cs(index) => self.cluster.cs[index].level,
            Which::Client(index) => self.cluster.client_levels[index],
        }
    }

    fn restart(&mut self, which: Which, level: Level) -> Verdict {
        let after = self.skew.rng.range(MS, AWAY_MAX);
        match which {
            Which::Mds(index) => {
                self.cluster.mds[index].level = level;
                self.kill_mds_for(index, after);
            }
            Which::Cs(index) => {
                if self.kill_cs_for(index, after) {
                    self.cluster.cs[index].level = level;
                }
            }
            Which::Client(index) => {
                self.cluster.client_levels[index] = level;
                self.kill_client_for(index, after)?;
            }
        }
        Ok(())
    }

    fn ask(&mut self) {
        let node = self.cluster.operator.expect("made at the beginning");
        let token = self.token();
        self.skew.asked = true;
        self.skew.phase = Phase::Asking(None);
        self.cluster.world.note(format_args!("operator: the cluster is to be raised"));
        self.pending.insert(token, Pending { client: usize::MAX, since: self.now(), kind: Kind::Raise });
        let mailbox = self.mailbox.clone();
        let called = self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Call(result))));
            core.call(now, MdsRequest::LevelRaise { level: Level::CURRENT }, done, out);
        });
        if called.is_none() {
            // Frozen: later.
            self.pending.remove(&token);
            self.skew.phase = Phase::Asking(Some(self.now() + AGAIN_AFTER));
        }
    }

    /// The operator's call was answered.
    pub(super) fn on_raise(&mut self, result: &Result<MdsReply, MdsError>) {
        let text = format!("{result:?}");
        self.cluster.world.note(format_args!("operator: raising was answered {text:.300}"));
        self.skew.phase = match result {
            Ok(_) => Phase::Over,
            Err(_) => Phase::Asking(Some(self.now() + AGAIN_AFTER)),
        };
    }

    /// Brings the upgrade to its end, after the faults.
    pub(super) fn finish_skew(&mut self) -> Verdict {
        if !self.plan.skew {
            return Ok(());
        }
        let raises = matches!(self.skew.ending, Ending::RaisedAmid | Ending::RaisedAfter);
        match self.skew.ending {
            _ if self.skew.phase != Phase::Rolling => {}
            Ending::Mixed => self.skew.phase = Phase::Over,
            Ending::Back => self.all_to(Level::OLDEST),
            Ending::RaisedAmid | Ending::RaisedAfter => self.all_to(Level::CURRENT),
        }
        self.wait("the upgrade ends", ENDS_WITHIN, |s| s.skew.phase == Phase::Over)?;
        self.wait("everything runs again", ENDS_WITHIN, |s| s.is_quiet())?;
        if raises {
            self.try_old_mds()?;
            self.try_old_cs()?;
        }
        Ok(())
    }

    fn try_old_mds(&mut self) -> Verdict {
        let all: Vec<usize> = (0..self.cluster.mds.len()).filter(|&index| !self.cluster.mds[index].retired).collect();
        let index = *self.skew.rng.choose(&all).expect("metadata servers");
        let node = self.cluster.mds[index].node;
        self.cluster.world.kill(node);
        self.cluster.mds[index].level = Level::OLDEST;
        self.cluster.start_mds(index);
        self.gives_up(node)?;
        self.cluster.mds[index].level = Level::CURRENT;
        self.cluster.start_mds(index);
        Ok(())
    }

    fn try_old_cs(&mut self) -> Verdict {
        let all: Vec<usize> = (0..self.cluster.cs.len()).filter(|&index| !self.cluster.cs[index].retired).collect();
        let index = *self.skew.rng.choose(&all).expect("chunk servers");
        let node = self.cluster.cs[index].node;
        self.cluster.world.kill(node);
        self.cluster.cs[index].level = Level::OLDEST;
        self.cluster.start_cs(index);
        self.gives_up(node)?;
        self.cluster.cs[index].level = Level::CURRENT;
        self.cluster.start_cs(index);
        Ok(())
    }

    fn gives_up(&mut self, node: NodeIndex) -> Verdict {
        self.cluster.world.note(format_args!("{node:?} was started with the older release"));
        self.skew.tried = Some(node);
        let until = self.now() + GIVES_UP_WITHIN;
        let gone = self.run_until(until, |s| !s.cluster.is_running(node))?;
        self.skew.tried = None;
        self.cluster.world.fatal.retain(|(other, _)| *other != node);
        // What it had under way at its disk ends with it.
        self.cluster.world.kill(node);
        match gone {
            true => Ok(()),
            false => Err(broken(Invariant::I15, format!("{node:?} goes on with a release below the cluster's level"))),
        }
    }

    /// True when a process is to give up: its release is below the level of the cluster.
    pub(super) fn is_too_old(&self, node: NodeIndex) -> bool {
        self.skew.tried == Some(node)
    }

    /// I15, all the time: nothing new is said before somebody asked for it, and nobody runs on a state above its level.
    pub(super) fn check_levels(&mut self) -> Verdict {
        if !self.plan.skew {
            return Ok(());
        }
        if let Some(what) = self.cluster.world.above_first.take().filter(|_| !self.skew.asked) {
            return Err(broken(Invariant::I15, format!("before the cluster was raised {what}")));
        }
        for index in 0..self.cluster.mds.len() {
            let node = self.cluster.mds[index].node;
            let levels = |core: &mut SimMds| (core.level(), core.meta().level());
            let Some((runs, state)) = self.cluster.world.inspect::<SimMds, _>(node, levels) else { continue };
            if state > runs {
                return Err(broken(Invariant::I15, format!("MDS {index} of {runs} runs on a state of {state}")));
            }
            if state > Level::FIRST && !self.skew.asked {
                return Err(broken(Invariant::I15, format!("MDS {index} is at {state}, and nobody asked for it")));
            }
        }
        Ok(())
    }
}
