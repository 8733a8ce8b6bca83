//! Membership changes while faults go on: an operator adds chunk servers and drains them, adds metadata servers and
//! removes them, and machines come back with an empty disk. One change at a time, each carried through: an operator
//! whose call fails calls again.
//!
//! What stays survivable: a chunk server is wiped only in seeds where nothing else takes copies away and no volume has
//! a single one, while every chunk of it has another current copy, and nothing else fails until it was replaced; a
//! metadata server only while three vote; each once a run.

use super::cluster::SimMds;
use super::load::{Kind, Pending};
use super::{Answer, Scenario, Verdict, broken};
use crate::checkers::shadow::Invariant;
use crate::world::{MS, NodeIndex, SECOND};
use cairn_client::ClientCore;
use cairn_stdx::Rng;
use cairn_types::{CsId, MdsId};
use cairn_wire::mds::{CsState, MdsError, MdsReply, MdsRequest};

/// Most chunk servers, and metadata servers, that are alive at once.
const CS_MAX: usize = 8;
const MDS_MAX: usize = 5;
/// Chunk servers that stay.
const CS_MIN: usize = 3;
/// How long the operator waits before calling again.
const AGAIN_AFTER: u64 = 2 * SECOND;
/// Virtual time within which every change ends once the faults are over.
pub(super) const ENDS_WITHIN: u64 = 600 * SECOND;

/// A change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    DrainCs(usize),
    KeepCs(usize),
    ForceCs(usize),
    AddMds(u64),
    RemoveMds(usize),
}

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Called; the answer is awaited.
    Called,
    /// To be called, again, at this time.
    CallAt(u64),
    /// Agreed to; the cluster is at work. With a time, the operator thinks better of it then.
    AtWork(Option<u64>),
}

/// The operator.
pub(super) struct Members {
    rng: Rng,
    change: Option<(Change, Step)>,
    next_nonce: u64,
    wiped_cs: bool,
    wiped_mds: Option<NodeIndex>,
}

impl Members {
    pub fn new(rng: Rng) -> Self {
        Self { rng, change: None, next_nonce: 0xadd_0000, wiped_cs: false, wiped_mds: None }
    }

    pub fn is_idle(&self) -> bool {
        self.change.is_none()
    }

    /// A disk was lost: what is being drained is needed, and stays.
    pub fn call_drain_off(&mut self, now: u64) {
        if let Some((Change::DrainCs(index), Step::AtWork(_))) = self.change {
            self.change = Some((Change::KeepCs(index), Step::CallAt(now)));
        }
    }

    /// True while the copies on a disk that was lost are made anew elsewhere.
    pub fn replaces_a_disk(&self) -> bool {
        matches!(self.change, Some((Change::ForceCs(_), _)))
    }
}

impl Scenario {
    /// Begins a change, unless one is under way.
    pub(super) fn change_members(&mut self) -> Verdict {
        if !self.members.is_idle() {
            return Ok(());
        }
        let draw = self.members.rng.below(6);
        let cs: Vec<usize> = (0..self.cluster.cs.len()).filter(|&index| !self.cluster.cs[index].retired).collect();
        let mds: Vec<usize> = (0..self.cluster.mds.len()).filter(|&index| !self.cluster.mds[index].retired).collect();
        let replicas = self.plan.volumes.iter().map(|volume| usize::from(volume.replicas)).max().unwrap_or_default();
        let change = match draw {
            0 if cs.len() < CS_MAX => {
                self.add_cs();
                return Ok(());
            }
            1 if cs.len() > CS_MIN.max(replicas) => {
                Change::DrainCs(*self.members.rng.choose(&cs).expect("chunk servers"))
            }
            2 if !self.members.wiped_cs => {
                let index = *self.members.rng.choose(&cs).expect("chunk servers");
                if !self.wipe_cs(index)? {
                    return Ok(());
                }
                Change::ForceCs(index)
            }
            3 if mds.len() < MDS_MAX => {
                self.members.next_nonce += 1;
                Change::AddMds(self.members.next_nonce)
            }
            4 if mds.len() >= 3 && self.voters().len() >= 3 => {
                Change::RemoveMds(*self.members.rng.choose(&mds).expect("metadata servers"))
            }
            5 if self.members.wiped_mds.is_none() => {
                let index = *self.members.rng.choose(&mds).expect("metadata servers");
                let voters = self.voters();
                if voters.len() < 3 || !voters.contains(&self.cluster.mds[index].id()) {
                    return Ok(());
                }
                self.learn_sets();
                self.cluster.wipe_mds(index);
                self.members.wiped_mds = Some(self.cluster.mds[index].node);
                Change::RemoveMds(index)
            }
            _ => return Ok(()),
        };
        self.members.change = Some((change, Step::CallAt(self.now() + self.members.rng.range(MS, 5 * SECOND))));
        Ok(())
    }

    fn add_cs(&mut self) {
        self.cluster.create_cs();
        self.eras.add_cs();
    }

    /// Those who vote, as the leader knows them.
    fn voters(&mut self) -> Vec<MdsId> {
        let Some(leader) = self.leader() else { return Vec::new() };
        let voters = self.cluster.world.inspect::<SimMds, _>(leader, |core| {
            core.consensus().status().members.voters.keys().copied().collect::<Vec<_>>()
        });
        voters.unwrap_or_default()
    }

    /// The disk of a chunk server is lost with all it held, and an empty server takes its place. False: not now, as it
    /// holds the only current copy of something.
    fn wipe_cs(&mut self, index: usize) -> Result<bool, Box<crate::checkers::shadow::Broken>> {
        let Some(id) = self.cluster.cs[index].id else { return Ok(false) };
        // A chunk allocated a moment ago, or in a moment, has no copy elsewhere where volumes have one.
        if !self.plan.may_lose_a_disk() || !self.is_quiet() || self.is_last_copy(id) {
            return Ok(false);
        }
        self.members.wiped_cs = true;
        self.lose_disk(index, id)?;
        Ok(true)
    }

    /// A disk that its server refuses is as good as lost: an operator puts an empty one in its place. False: not now,
    /// as it holds the only current copy of something.
    pub(super) fn replace_lost_disk(&mut self, index: usize) -> Result<bool, Box<crate::checkers::shadow::Broken>> {
        let Some(id) = self.cluster.cs[index].id.filter(|_| self.members.is_idle()) else { return Ok(false) };
        if self.is_last_copy(id) {
            return Ok(false);
        }
        self.lose_disk(index, id)?;
        self.members.change = Some((Change::ForceCs(index), Step::CallAt(self.now())));
        Ok(true)
    }

    fn lose_disk(&mut self, index: usize, id: CsId) -> Verdict {
        let node = self.cluster.cs[index].node;
        self.cluster.world.note(format_args!("the disk of {node:?} ({id}) is lost"));
        self.power_is_lost(&[index])?;
        self.eras.lost_for_good(index, self.now());
        self.cluster.world.power_cut(node);
        self.cluster.cs[index].retired = true;
        self.add_cs();
        Ok(())
    }

    /// Carries the change under way on; looked at all the time.
    pub(super) fn tend_members(&mut self) {
        let now = self.now();
        let Some((change, step)) = self.members.change else { return };
        if self.cluster.operator.is_some_and(|node| self.cluster.world.nodes[node.0].paused) {
            return;
        }
        match (change, step) {
            (_, Step::CallAt(at)) if at <= now => self.call_operator(change),
            (Change::DrainCs(index), Step::AtWork(regret)) => {
                if self.is_dropped(index) {
                    self.retire_cs(index);
                } else if regret.is_some_and(|at| at <= now) {
                    self.members.change = Some((Change::KeepCs(index), Step::CallAt(now)));
                }
            }
            (Change::RemoveMds(index), Step::AtWork(_)) => {
                let id = self.cluster.mds[index].id();
                let Some(leader) = self.leader() else { return };
                let member = move |core: &mut SimMds| core.meta().members().any(|member| member.mds == id);
                if self.cluster.world.inspect::<SimMds, _>(leader, member) == Some(false) {
                    self.retire_mds(index);
                }
            }
            _ => {}
        }
    }

    fn is_dropped(&mut self, index: usize) -> bool {
        let (Some(leader), Some(id)) = (self.leader(), self.cluster.cs[index].id) else { return false };
        let state = move |core: &mut SimMds| core.meta().servers().find(|(cs, _)| *cs == id).map(|(_, state)| state);
        matches!(self.cluster.world.inspect::<SimMds, _>(leader, state), Some(None | Some(CsState::Dropped)))
    }

    fn retire_cs(&mut self, index: usize) {
        let node = self.cluster.cs[index].node;
        self.cluster.cs[index].retired = true;
        self.cluster.world.kill(node);
        self.members.change = None;
    }

    fn retire_mds(&mut self, index: usize) {
        let node = self.cluster.mds[index].node;
        self.cluster.mds[index].retired = true;
        self.cluster.world.kill(node);
        self.members.change = None;
    }

    /// True when a metadata server may stop by itself: it is told to leave, or finds its log gone.
    pub(super) fn may_leave(&self, node: NodeIndex) -> bool {
        let leaving = match self.members.change {
            Some((Change::RemoveMds(index), _)) => Some(self.cluster.mds[index].node),
            // One that starts anew just after it was drained is told that it was removed.
            Some((Change::DrainCs(index) | Change::KeepCs(index), _)) => Some(self.cluster.cs[index].node),
            _ => None,
        };
        leaving == Some(node) || self.members.wiped_mds == Some(node)
    }

    fn call_operator(&mut self, change: Change) {
        let Some(node) = self.cluster.operator else { return };
        let cs = |s: &Self, index: usize| s.cluster.cs[index].id;
        let request = match change {
            Change::DrainCs(index) | Change::KeepCs(index) | Change::ForceCs(index) => cs(self, index).map(|cs| {
                let (force, cancel) = (matches!(change, Change::ForceCs(_)), matches!(change, Change::KeepCs(_)));
                MdsRequest::CsRemove { cs, force, cancel }
            }),
            Change::AddMds(nonce) => {
                Some(MdsRequest::MdsAdd { addr: self.cluster.next_mds_addr(), repository: String::new(), nonce })
            }
            Change::RemoveMds(index) => Some(MdsRequest::MdsRemove { mds: self.cluster.mds[index].id() }),
        };
        let Some(request) = request else {
            self.members.change = None;
            return;
        };
        let token = self.token();
        self.cluster.world.note(format_args!("operator: {request:?}"));
        self.pending.insert(token, Pending { client: usize::MAX, since: self.now(), kind: Kind::Operator });
        self.members.change = Some((change, Step::Called));
        let mailbox = self.mailbox.clone();
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Call(result))));
            core.call(now, request, done, out);
        });
    }

    /// The operator's call was answered.
    pub(super) fn on_operator(&mut self, result: Result<MdsReply, MdsError>) -> Verdict {
        let now = self.now();
        let Some((change, _)) = self.members.change else { return Ok(()) };
        let text = format!("{result:?}");
        self.cluster.world.note(format_args!("operator: {change:?} was answered {text:.160}"));
        self.members.change = match (change, result) {
            (Change::DrainCs(_), Ok(_)) => {
                let regret = self.members.rng.chance(1, 2);
                let regret = regret.then(|| now + self.members.rng.range(10 * MS, 10 * SECOND));
                Some((change, Step::AtWork(regret)))
            }
            (Change::RemoveMds(_), Ok(_)) => Some((change, Step::AtWork(None))),
            (Change::AddMds(nonce), Ok(MdsReply::MdsAdmitted { mds, servers, .. })) => {
                self.cluster.join_mds(mds, nonce, servers);
                None
            }
            (Change::KeepCs(_) | Change::ForceCs(_), Ok(_)) => None,
            (change, Ok(other)) => {
                return Err(broken(Invariant::I17, format!("{change:?} was answered with {other:?}")));
            }
            // Drained before it was called off.
            (Change::KeepCs(index), Err(MdsError::Refused(_) | MdsError::NotFound(_))) => {
                if self.is_dropped(index) {
                    self.retire_cs(index);
                }
                None
            }
            // It left: the answer to the first call was lost.
            (Change::RemoveMds(index), Err(MdsError::NotFound(_))) => {
                self.retire_mds(index);
                None
            }
            (Change::ForceCs(_), Err(MdsError::NotFound(_))) => None,
            // It is not missed yet, or its chunks have no other copy yet.
            (Change::ForceCs(_), Err(_)) => Some((change, Step::CallAt(now + AGAIN_AFTER))),
            (Change::DrainCs(index), Err(MdsError::Refused(_) | MdsError::NotFound(_))) => {
                if self.is_dropped(index) {
                    self.retire_cs(index);
                }
                None
            }
            // Another one is away: the one without its log leaves when that one is back.
            (Change::RemoveMds(index), Err(MdsError::Refused(_)))
                if self.members.wiped_mds == Some(self.cluster.mds[index].node) =>
            {
                Some((change, Step::CallAt(now + AGAIN_AFTER)))
            }
            (_, Err(MdsError::Refused(_))) => None,
            (_, Err(_)) => Some((change, Step::CallAt(now + AGAIN_AFTER))),
        };
        Ok(())
    }
}
