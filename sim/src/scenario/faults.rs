//! Faults: what breaks, for how long, and what that allows to be lost.
//!
//! A write that was acknowledged and not flushed may be lost only when every current replica of its chunk lost power
//! before it was durable there. Chunk servers flush by themselves within a second, so losses far apart cannot have
//! taken the same write. When the servers that lost power close together hold all current replicas of some chunk, the
//! era of the shadow map ends; in every other case nothing acknowledged may be missing.

use super::cluster::{Cluster, SimMds};
use super::plan::FaultKind;
use super::{Scenario, TOKEN_FAULT, TOKEN_RESTORE, Verdict};
use crate::world::{MS, NodeIndex, SECOND};
use cairn_stdx::Rng;
use cairn_types::{ChunkId, ChunkVersion, CsId};
use cairn_wire::mds::{MdsReply, MdsRequest, ReplicaRole};
use std::collections::BTreeMap;

/// Power cuts further apart than this cannot have taken the same write from servers that ran undisturbed: a write is
/// flushed within a second of its answer.
const TOGETHER: u64 = 6 * SECOND;

/// What undoes a fault.
#[derive(Clone, Debug)]
enum Restore {
    StartMds(usize),
    StartCs(usize),
    StartClient(usize),
    Unblock(Vec<(NodeIndex, NodeIndex)>),
    Resume(NodeIndex),
    FastDisk(NodeIndex),
}

/// The state of the faults of a run.
pub(super) struct Faults {
    rng: Rng,
    restores: BTreeMap<u64, Restore>,
    next_restore: u64,
    /// When each chunk server last lost power with something unflushed.
    lost_power: Vec<Option<u64>>,
    /// When each chunk server was last frozen or slow: its own flushes may be late.
    disturbed: Vec<Option<u64>>,
    /// The newest replica set seen of each chunk.
    sets: BTreeMap<ChunkId, (ChunkVersion, Vec<CsId>)>,
}

impl Faults {
    pub fn new(rng: Rng, cs: usize) -> Self {
        Self {
            rng,
            restores: BTreeMap::new(),
            next_restore: TOKEN_RESTORE,
            lost_power: vec![None; cs],
            disturbed: vec![None; cs],
            sets: BTreeMap::new(),
        }
    }
}

impl Cluster {
    fn all_nodes(&self) -> Vec<NodeIndex> {
        let servers = self.mds.iter().map(|mds| mds.node).chain(self.cs.iter().map(|cs| cs.node));
        servers.chain(self.clients.iter().copied()).collect()
    }
}

impl Scenario {
    /// One fault, then the next after a while.
    pub(super) fn next_fault(&mut self) -> Verdict {
        if !self.chaos || self.plan.faults.is_empty() {
            return Ok(());
        }
        let after = self.faults.rng.range(MS, self.plan.fault_every);
        self.cluster.world.wake_driver(after, TOKEN_FAULT);
        let kind = *self.faults.rng.choose(&self.plan.faults).expect("not empty");
        let nodes = self.cluster.all_nodes();
        match kind {
            FaultKind::KillCs => {
                let index = self.faults.rng.below(self.cluster.cs.len() as u64) as usize;
                if self.cluster.is_running(self.cluster.cs[index].node) {
                    self.cluster.world.kill(self.cluster.cs[index].node);
                    self.later(Restore::StartCs(index));
                }
            }
            FaultKind::KillMds => {
                let index = self.faults.rng.below(self.cluster.mds.len() as u64) as usize;
                if self.cluster.is_running(self.cluster.mds[index].node) {
                    self.learn_sets();
                    self.cluster.world.kill(self.cluster.mds[index].node);
                    self.later(Restore::StartMds(index));
                }
            }
            FaultKind::KillClient => {
                let index = self.faults.rng.below(self.cluster.clients.len() as u64) as usize;
                if self.cluster.is_running(self.cluster.clients[index]) {
                    self.cluster.world.kill(self.cluster.clients[index]);
                    self.client_died(index);
                    self.later(Restore::StartClient(index));
                }
            }
            FaultKind::CutCs => {
                let mut all: Vec<usize> = (0..self.cluster.cs.len()).collect();
                self.faults.rng.shuffle(&mut all);
                let count = if self.faults.rng.chance(3, 4) { 1 } else { self.faults.rng.range(1, all.len() as u64) };
                self.cut_power(&all[..count as usize])?;
            }
            FaultKind::CutAll => {
                if self.faults.rng.chance(1, 3) {
                    let all: Vec<usize> = (0..self.cluster.cs.len()).collect();
                    self.cut_power(&all)?;
                    (0..self.cluster.mds.len()).for_each(|index| self.cut_mds(index));
                }
            }
            FaultKind::CutMds => {
                let index = self.faults.rng.below(self.cluster.mds.len() as u64) as usize;
                self.cut_mds(index);
            }
            FaultKind::Partition | FaultKind::OneWay => self.partition(&nodes, kind == FaultKind::OneWay),
            FaultKind::Reset => {
                let a = *self.faults.rng.choose(&nodes).expect("nodes");
                let b = *self.faults.rng.choose(&nodes).expect("nodes");
                self.cluster.world.reset_connections(a, b);
            }
            FaultKind::Pause => {
                let node = *self.faults.rng.choose(&nodes).expect("nodes");
                if self.cluster.is_running(node) && !self.cluster.world.nodes[node.0].paused {
                    self.disturb(node);
                    self.cluster.world.pause(node, true);
                    // Often longer than a lease and its grace.
                    let longest = *self.faults.rng.choose(&[SECOND, 8 * SECOND, 30 * SECOND]).expect("not empty");
                    let after = self.faults.rng.range(10 * MS, longest);
                    self.restore_after(after, Restore::Resume(node));
                }
            }
            FaultKind::Clock => {
                let node = *self.faults.rng.choose(&nodes).expect("nodes");
                let drift = self.faults.rng.below(10_001) as i64 - 5_000;
                let jump = self.faults.rng.below(7_200) as i64 - 3_600;
                self.cluster.world.set_clock(node, drift, jump * SECOND as i64);
            }
            FaultKind::SlowDisk => {
                let node = *self.faults.rng.choose(&nodes).expect("nodes");
                self.disturb(node);
                self.cluster.world.nodes[node.0].disk_delay_ns = self.faults.rng.range(MS, 700 * MS);
                self.later(Restore::FastDisk(node));
            }
        }
        Ok(())
    }

    fn later(&mut self, restore: Restore) {
        let after = self.faults.rng.range(MS, self.plan.down_max);
        self.restore_after(after, restore);
    }

    fn restore_after(&mut self, after: u64, restore: Restore) {
        let token = self.faults.next_restore;
        self.faults.next_restore += 1;
        self.faults.restores.insert(token, restore);
        self.cluster.world.wake_driver(after, token);
    }

    /// Undoes a fault whose time has come.
    pub(super) fn restore(&mut self, token: u64) {
        match self.faults.restores.remove(&token) {
            Some(Restore::StartMds(index)) => self.cluster.start_mds(index),
            Some(Restore::StartCs(index)) => self.cluster.start_cs(index),
            Some(Restore::StartClient(index)) => self.cluster.start_client(index),
            Some(Restore::Unblock(paths)) => {
                for (from, to) in paths {
                    self.cluster.world.set_blocked(from, to, false);
                }
            }
            Some(Restore::Resume(node)) => self.resume(node),
            Some(Restore::FastDisk(node)) => {
                self.disturb(node);
                self.cluster.world.nodes[node.0].disk_delay_ns = 0;
            }
            None => {}
        }
    }

    fn resume(&mut self, node: NodeIndex) {
        self.disturb(node);
        if self.cluster.world.nodes[node.0].paused {
            self.cluster.world.pause(node, false);
        }
    }

    fn disturb(&mut self, node: NodeIndex) {
        let now = self.now();
        if let Some(index) = self.cluster.cs.iter().position(|cs| cs.node == node) {
            self.faults.disturbed[index] = Some(now);
        }
    }

    /// Cuts some nodes off from the rest, in both directions or in one.
    fn partition(&mut self, nodes: &[NodeIndex], one_way: bool) {
        let mut nodes = nodes.to_vec();
        self.faults.rng.shuffle(&mut nodes);
        let count = if self.faults.rng.chance(2, 3) { 1 } else { self.faults.rng.range(1, nodes.len() as u64) };
        let (few, rest) = nodes.split_at(count as usize);
        let mut paths = Vec::new();
        for &a in few {
            for &b in rest {
                if one_way {
                    paths.push((a, b));
                } else {
                    paths.extend([(a, b), (b, a)]);
                }
            }
        }
        for &(from, to) in &paths {
            self.cluster.world.set_blocked(from, to, true);
        }
        let longest = *self.faults.rng.choose(&[SECOND, 6 * SECOND, 25 * SECOND]).expect("not empty");
        let after = self.faults.rng.range(10 * MS, longest);
        self.restore_after(after, Restore::Unblock(paths));
    }

    fn cut_mds(&mut self, index: usize) {
        if self.cluster.is_running(self.cluster.mds[index].node) {
            self.learn_sets();
            self.cluster.world.power_cut(self.cluster.mds[index].node);
            self.later(Restore::StartMds(index));
        }
    }

    /// Cuts the power of chunk servers, and ends the era if that may have cost acknowledged writes.
    fn cut_power(&mut self, which: &[usize]) -> Verdict {
        let now = self.now();
        self.learn_sets();
        for &index in which {
            let node = self.cluster.cs[index].node;
            if !self.cluster.world.nodes[node.0].disks[0].unflushed_pages().is_empty() {
                self.faults.lost_power[index] = Some(now);
            }
            if self.cluster.is_running(node) {
                self.later(Restore::StartCs(index));
            }
            self.cluster.world.power_cut(node);
        }
        let disturbed_since =
            |at: u64| which.iter().any(|&index| self.faults.disturbed[index].is_some_and(|d| d >= at));
        let losers: Vec<CsId> = (0..self.cluster.cs.len())
            .filter(|&index| {
                self.faults.lost_power[index]
                    .is_some_and(|at| now - at <= TOGETHER || disturbed_since(at.saturating_sub(TOGETHER)))
            })
            .filter_map(|index| self.cluster.cs[index].id)
            .collect();
        let lost =
            self.faults.sets.values().any(|(_, set)| !set.is_empty() && set.iter().all(|cs| losers.contains(cs)));
        if lost {
            self.cluster.world.note(format_args!("an era ends: {losers:?} lost power"));
            self.faults.lost_power.fill(None);
            for &index in which {
                self.faults.lost_power[index] = Some(now);
            }
            self.shadow.end_era().map_err(Box::new)?;
        }
        Ok(())
    }

    /// Asks every metadata server that runs for the chunk maps; the highest version of a chunk counts.
    pub(super) fn learn_sets(&mut self) {
        for mds in &self.cluster.mds {
            for volume in &self.volumes {
                let request = MdsRequest::ChunkMap { volume: volume.info.volume, index: 0, limit: 64 };
                let answer = self.cluster.world.inspect::<SimMds, _>(mds.node, |core| core.meta().query(&request));
                let Some(Ok(MdsReply::Chunks(entries))) = answer else { continue };
                for entry in entries {
                    let known = self.faults.sets.entry(entry.chunk).or_default();
                    if entry.version >= known.0 {
                        let current = entry.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current);
                        *known = (entry.version, current.map(|replica| replica.cs).collect());
                    }
                }
            }
        }
    }

    /// Ends every fault: paths, clocks, disks, frozen and dead processes.
    pub(super) fn heal(&mut self) {
        let tokens: Vec<u64> = self.faults.restores.keys().copied().collect();
        tokens.into_iter().for_each(|token| self.restore(token));
        let nodes = self.cluster.all_nodes();
        for node in nodes {
            self.cluster.world.nodes[node.0].disk_delay_ns = 0;
            if self.cluster.world.nodes[node.0].paused {
                self.cluster.world.pause(node, false);
            }
            self.cluster.world.nodes[node.0].disks.iter_mut().for_each(|disk| disk.lift_faults());
        }
        (0..self.cluster.mds.len()).for_each(|index| self.cluster.start_mds(index));
        (0..self.cluster.cs.len()).for_each(|index| self.cluster.start_cs(index));
    }
}
