//! Disks that do wrong and say nothing: writes that are lost or land elsewhere, reads that return what was there
//! before, flushes that do nothing.
//!
//! One chunk server of a seed has such a disk. Whatever it holds may be wrong, so nothing else in the seed takes a copy
//! away: every block has a good copy elsewhere, and the cluster has to serve that one and no other. The server is
//! killed, or loses power, again and again, because only a start shows what its log and its trees lost. When it refuses
//! to serve, an operator puts an empty server in its place, as with a disk that was lost.
//!
//! What keeps a seed survivable: nobody but the metadata servers can tell that the newest groups of a log are missing,
//! and they know how long the log was a moment ago (`docs/design/chunk-server.md`, "Lineage"). So the server is stopped
//! only when they know all that is durable, or when the disk did nothing wrong since they did.

use super::faults::Restore;
use super::plan::{FaultKind, WIDE};
use super::{Scenario, Verdict, broken};
use crate::checkers::shadow::Invariant;
use crate::world::{NodeIndex, SECOND};
use cairn_cs::CsCore;
use cairn_env_sim::Fault;
use cairn_stdx::Rng;
use cairn_types::BLOCK_SIZE_U64;

/// Seeds with these remainders have a disk that does wrong, one kind each. Those of other remainders stay what they
/// were, and no seed of the regression list of before has one of these.
pub(crate) const SEEDS_WRONG_OF: u64 = 23;
pub(crate) const SEEDS_LOST: u64 = 3;
pub(crate) const SEEDS_MISDIRECTED: u64 = 8;
pub(crate) const SEEDS_STALE: u64 = 12;
pub(crate) const SEEDS_LIES: u64 = 13;

/// Virtual time within which a server with such a disk serves again, or is replaced, after the last fault.
const JUDGED_WITHIN: u64 = 300 * SECOND;

/// What the disk does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wrong {
    LostWrites,
    MisdirectedWrites,
    StaleReads,
    LyingFlushes,
}

impl Wrong {
    /// What the seed has, by its remainder.
    pub fn of(seed: u64) -> Option<Self> {
        match seed % SEEDS_WRONG_OF {
            SEEDS_LOST => Some(Self::LostWrites),
            SEEDS_MISDIRECTED => Some(Self::MisdirectedWrites),
            SEEDS_STALE => Some(Self::StaleReads),
            SEEDS_LIES => Some(Self::LyingFlushes),
            _ => None,
        }
    }
}

/// The disk of a run that does wrong.
pub(super) struct WrongDisk {
    rng: Rng,
    kind: Wrong,
    /// Its server.
    index: usize,
    /// Something was done wrong.
    did_wrong: bool,
    /// Nothing was done wrong since the metadata servers knew all that was durable.
    clean: bool,
    /// The server is stopped only when its store has made a checkpoint since something was done wrong: then its log is
    /// whole, and what is damaged is elsewhere.
    patient: bool,
    /// The checkpoint of the store when something was last done wrong.
    generation: u64,
    /// The server is to be stopped.
    restart: bool,
    /// The server was replaced.
    gone: bool,
}

impl WrongDisk {
    pub fn new(kind: Option<Wrong>, servers: usize, mut rng: Rng) -> Option<Self> {
        let index = rng.below(servers as u64) as usize;
        let patient = rng.chance(1, 2);
        let (did_wrong, clean, restart, gone) = (false, true, false, false);
        kind.map(|kind| Self { rng, kind, index, did_wrong, clean, patient, generation: 0, restart, gone })
    }
}

impl Scenario {
    /// The node whose disk does wrong, while it is part of the cluster.
    pub(super) fn wrong_node(&self) -> Option<NodeIndex> {
        let wrong = self.wrong.as_ref().filter(|wrong| !wrong.gone)?;
        self.cluster.cs.get(wrong.index).filter(|cs| !cs.retired).map(|cs| cs.node)
    }

    /// Another wrong of the disk is prepared.
    pub(super) fn do_wrong(&mut self) {
        let Some(node) = self.wrong_node() else { return };
        let wrong = self.wrong.as_mut().expect("it has a node");
        let disk = &mut self.cluster.world.nodes[node.0].disks[0];
        match wrong.kind {
            Wrong::LostWrites => {
                // A write of the log is a header and then data: without the first page the log itself is damaged.
                let (nth, first) = (wrong.rng.below(30), wrong.rng.below(2) * wrong.rng.range(1, 4));
                disk.inject(Fault::LosePart { nth, first });
            }
            Wrong::MisdirectedWrites => {
                // Mostly where something is.
                let pages = disk.written_pages();
                let somewhere = wrong.rng.below(disk.size() / BLOCK_SIZE_U64);
                let page = wrong.rng.choose(&pages).copied().filter(|_| wrong.rng.chance(7, 8)).unwrap_or(somewhere);
                disk.inject(Fault::MisdirectWrite { nth: wrong.rng.below(30), offset: page * BLOCK_SIZE_U64 });
            }
            Wrong::StaleReads => {
                disk.remember();
                disk.inject(Fault::StaleRead { nth: wrong.rng.below(20) });
            }
            Wrong::LyingFlushes => {
                let lies = !disk.lies_about_flushes() || wrong.rng.chance(1, 2);
                disk.lie_about_flushes(lies);
            }
        }
        self.cluster.world.note(format_args!("the disk of {node:?} will do wrong"));
    }

    /// The server with that disk is killed or loses power, and starts again, as soon as that may be.
    pub(super) fn restart_wrong(&mut self) {
        if let Some(wrong) = &mut self.wrong {
            wrong.restart = true;
        }
    }

    /// Kills the server or cuts its power; none when nobody could tell what it lost, or when it has the last copy of
    /// something.
    fn stop_wrong(&mut self, node: NodeIndex) -> Result<Option<usize>, Box<crate::checkers::shadow::Broken>> {
        self.note_misdeeds();
        let (told, generation) = (self.is_told(node), self.generation_of(node));
        let wrong = self.wrong.as_mut().expect("it has a node");
        // What is read wrong at the next start may be the end of the log, and so is what an honest flush never saw.
        let needs_told = matches!(wrong.kind, Wrong::StaleReads | Wrong::LyingFlushes);
        if !told && !WIDE && (needs_told || !wrong.clean) {
            return Ok(None);
        }
        if self.chaos && wrong.patient && generation.is_none_or(|now| now <= wrong.generation) {
            return Ok(None);
        }
        if wrong.patient && wrong.kind == Wrong::StaleReads {
            self.cluster.world.nodes[node.0].disks[0].disarm();
        }
        let (index, kind) = (wrong.index, wrong.kind);
        wrong.restart = false;
        let cut = kind == Wrong::LyingFlushes || wrong.rng.chance(1, 2);
        if self.cluster.cs[index].id.is_none_or(|id| self.is_last_copy(id)) {
            return Ok(None);
        }
        if cut {
            self.power_is_lost(&[index])?;
            self.cluster.world.power_cut(node);
        } else {
            self.cluster.world.kill(node);
        }
        self.note_misdeeds();
        Ok(Some(index))
    }

    fn is_told(&mut self, node: NodeIndex) -> bool {
        self.cluster.world.inspect::<CsCore, _>(node, |core| core.is_durable_told()) == Some(true)
    }

    fn generation_of(&mut self, node: NodeIndex) -> Option<u64> {
        self.cluster.world.inspect::<CsCore, _>(node, |core| core.store().stats().generation)
    }

    fn note_misdeeds(&mut self) {
        let Some(node) = self.wrong_node() else { return };
        let misdeeds = self.cluster.world.nodes[node.0].disks[0].take_misdeeds();
        let generation = self.generation_of(node);
        for misdeed in misdeeds {
            let wrong = self.wrong.as_mut().expect("it has a node");
            (wrong.did_wrong, wrong.clean) = (true, false);
            // One more, as the next may have been under way already.
            wrong.generation = generation.map_or(wrong.generation, |now| now + 1);
            self.cluster.world.note(format_args!(
                "the disk of {node:?} did wrong: {}, pages {}+{}",
                misdeed.what, misdeed.page, misdeed.pages
            ));
        }
    }

    /// Looked at all the time: a server that refuses its disk is replaced.
    pub(super) fn tend_wrong_disk(&mut self) -> Verdict {
        self.note_misdeeds();
        let Some(node) = self.wrong_node() else { return Ok(()) };
        let told = self.is_told(node);
        self.wrong.as_mut().expect("it has a node").clean |= told;
        let wants_restart = self.wrong.as_ref().is_some_and(|wrong| wrong.restart);
        if wants_restart
            && self.chaos
            && self.cluster.is_running(node)
            && let Some(index) = self.stop_wrong(node)?
        {
            self.later(Restore::StartCs(index));
        }
        let index = self.wrong.as_ref().expect("it has a node").index;
        let failed = self.cluster.world.inspect::<CsCore, _>(node, |core| core.failed().is_some()) == Some(true);
        let down = !self.cluster.is_running(node) && !self.starts_later(index);
        if !(down || failed) {
            return Ok(());
        }
        let now = self.now();
        self.members.call_drain_off(now);
        if !self.members.is_idle() {
            return Ok(());
        }
        if !self.wrong.as_ref().expect("it has a node").did_wrong {
            return Err(broken(Invariant::I17, format!("{node:?} gave up, and its disk had done nothing wrong")));
        }
        if self.replace_lost_disk(index)? {
            self.wrong.as_mut().expect("it has a node").gone = true;
        }
        Ok(())
    }

    /// The faults are over: the disk does no more wrong, and one more start tells what is left of it.
    pub(super) fn judge_wrong_disk(&mut self) -> Verdict {
        let Some(node) = self.wrong_node() else { return Ok(()) };
        self.note_misdeeds();
        // A flush that lies until the power is gone is the last it does.
        if self.wrong.as_ref().is_some_and(|wrong| wrong.kind != Wrong::LyingFlushes) {
            self.cluster.world.nodes[node.0].disks[0].disarm();
        }
        let until = self.now() + SECOND * 20;
        self.run_until(until, |s| s.wrong_node().is_none_or(|node| s.is_told(node)))?;
        if self.wrong_node() == Some(node)
            && self.cluster.is_running(node)
            && let Some(index) = self.stop_wrong(node)?
        {
            self.cluster.world.nodes[node.0].disks[0].disarm();
            self.cluster.start_cs(index);
        }
        self.cluster.world.nodes[node.0].disks[0].disarm();
        self.wait("the disk that did wrong is judged", JUDGED_WITHIN, |s| {
            let Some(node) = s.wrong_node() else { return true };
            s.cluster.world.inspect::<CsCore, _>(node, |core| core.is_admitted() && core.failed().is_none())
                == Some(true)
        })
    }

    /// True when copies may hold what nobody has noticed yet, so that all are verified at the end.
    pub(super) fn may_hold_damage(&self) -> bool {
        self.wrong.is_some() || self.plan.faults.contains(&FaultKind::Rot)
    }
}
