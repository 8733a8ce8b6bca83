//! Faults: what breaks, for how long. What that allows to be lost is in `super::eras`.

use super::cluster::{Cluster, SimMds};
use super::plan::{FaultKind, SEEDS_ISLAND, SEEDS_OF};
use super::{Scenario, TOKEN_FAULT, TOKEN_RESTORE, Verdict};
use crate::stamp::Stamp;
use crate::world::{MS, NodeIndex, SECOND};
use cairn_cs::CsCore;
use cairn_env_sim::{Fault, OpKind, SimDisk};
use cairn_mds::Room;
use cairn_stdx::Rng;
use cairn_types::{BLOCK_SIZE, BLOCK_SIZE_U64};
use std::collections::BTreeMap;

/// So long after a disk was mended an operation may still be answered with what it did before.
const ANSWERS_LATE: u64 = 5 * SECOND;

/// What undoes a fault.
#[derive(Clone, Debug)]
pub(super) enum Restore {
    StartMds(usize),
    StartCs(usize),
    StartClient(usize),
    Unblock(Vec<(NodeIndex, NodeIndex)>),
    Resume(NodeIndex),
    FastDisk(NodeIndex),
    MendDisk(NodeIndex),
    RightDisk(usize),
    RoomAtMds(usize),
}

/// A copy of a chunk server's disk: taken, then started from while the disk itself lies aside.
struct OldCopy {
    index: usize,
    taken: u64,
    /// The copy; once it was put in, the right one.
    other: SimDisk,
    is_in: bool,
}

/// The state of the faults of a run.
pub(super) struct Faults {
    rng: Rng,
    restores: BTreeMap<u64, Restore>,
    next_restore: u64,
    /// Nodes with a disk that fails or has failed, and when it was mended.
    failing: BTreeMap<NodeIndex, Option<u64>>,
    /// The client on an island.
    isolated: Option<usize>,
    old_copy: Option<OldCopy>,
    /// Volume and block that rotted, and on which server.
    rotten: BTreeMap<(u64, u64), usize>,
}

impl Faults {
    pub fn new(rng: Rng) -> Self {
        Self {
            rng,
            restores: BTreeMap::new(),
            next_restore: TOKEN_RESTORE,
            failing: BTreeMap::new(),
            isolated: None,
            old_copy: None,
            rotten: BTreeMap::new(),
        }
    }
}

impl Cluster {
    fn all_nodes(&self) -> Vec<NodeIndex> {
        let mds = self.mds.iter().filter(|mds| !mds.retired).map(|mds| mds.node);
        let servers = mds.chain(self.cs.iter().filter(|cs| !cs.retired).map(|cs| cs.node));
        servers.chain(self.clients.iter().copied()).chain(self.operator).collect()
    }
}

impl Scenario {
    /// One fault, then the next after a while.
    pub(super) fn next_fault(&mut self) -> Verdict {
        if !self.chaos || self.draining || self.plan.faults.is_empty() {
            return Ok(());
        }
        let after = self.faults.rng.range(MS, self.plan.fault_every);
        self.cluster.world.wake_driver(after, TOKEN_FAULT);
        // One lost disk is enough until its copies have been made anew.
        if self.members.replaces_a_disk() {
            return Ok(());
        }
        let kind = *self.faults.rng.choose(&self.plan.faults).expect("not empty");
        let nodes = self.cluster.all_nodes();
        match kind {
            FaultKind::KillCs => {
                let index = self.faults.rng.below(self.cluster.cs.len() as u64) as usize;
                if !self.is_on_copy(index) && self.cluster.is_running(self.cluster.cs[index].node) {
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
                self.kill_client(index)?;
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
            FaultKind::FullMds => self.fill_mds(),
            FaultKind::LoseImage => self.lose_image(),
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
            FaultKind::DiskFails => self.fail_disk(false),
            FaultKind::FlushFails => self.fail_disk(true),
            FaultKind::Rot => self.rot(),
            FaultKind::CutHost => self.cut_host()?,
            FaultKind::Island => self.isolate_host(),
            FaultKind::OldCopy => self.use_old_copy()?,
            FaultKind::Members => self.change_members()?,
            FaultKind::WrongDisk => self.do_wrong(),
            FaultKind::RestartWrong => self.restart_wrong(),
        }
        Ok(())
    }

    fn is_on_copy(&self, index: usize) -> bool {
        self.faults.old_copy.as_ref().is_some_and(|copy| copy.is_in && copy.index == index)
    }

    /// Ends a metadata server, if it runs, and starts it again after a while.
    pub(super) fn kill_mds_for(&mut self, index: usize, after: u64) {
        if self.cluster.is_running(self.cluster.mds[index].node) {
            self.learn_sets();
            self.cluster.world.kill(self.cluster.mds[index].node);
            self.restore_after(after, Restore::StartMds(index));
        }
    }

    /// As [`Self::kill_mds_for`], a chunk server; false when it has to stay as it is for now.
    pub(super) fn kill_cs_for(&mut self, index: usize, after: u64) -> bool {
        if self.is_on_copy(index) || self.members.replaces_a_disk() {
            return false;
        }
        if self.cluster.is_running(self.cluster.cs[index].node) {
            self.cluster.world.kill(self.cluster.cs[index].node);
            self.restore_after(after, Restore::StartCs(index));
        }
        true
    }

    /// As [`Self::kill_mds_for`], a client.
    pub(super) fn kill_client_for(&mut self, index: usize, after: u64) -> Verdict {
        if self.cluster.is_running(self.cluster.clients[index]) {
            self.cluster.world.kill(self.cluster.clients[index]);
            self.client_died(index)?;
            self.restore_after(after, Restore::StartClient(index));
        }
        Ok(())
    }

    /// A metadata server ends, and its image is lost: one at a time, while all others have theirs.
    fn lose_image(&mut self) {
        let nodes: Vec<NodeIndex> = self.cluster.mds.iter().map(|mds| mds.node).collect();
        let is_whole = |core: &mut SimMds| !core.consensus().status().state_lost && core.applied() > 0;
        let world = &mut self.cluster.world;
        let whole = nodes.iter().filter(|node| world.inspect(**node, is_whole) == Some(true)).count();
        if nodes.len() < 3 || whole < nodes.len() {
            return;
        }
        let index = self.faults.rng.below(nodes.len() as u64) as usize;
        self.learn_sets();
        self.cluster.world.note(format_args!("metadata server {index} loses its image"));
        self.cluster.lose_mds_image(index);
        self.later(Restore::StartMds(index));
    }

    /// The disks of one metadata server, some, or all get full: what they flush may still find room in a reserve, or
    /// not.
    fn fill_mds(&mut self) {
        let mut all: Vec<usize> = (0..self.cluster.mds.len()).collect();
        self.faults.rng.shuffle(&mut all);
        let count = if self.faults.rng.chance(1, 2) { 1 } else { self.faults.rng.range(1, all.len() as u64 + 1) };
        let waits = self.faults.rng.chance(1, 2);
        for &index in &all[..count as usize] {
            self.cluster.world.note(format_args!("the disk of metadata server {index} is full, waits: {waits}"));
            self.cluster.set_mds_room(index, Room { short: true, waits, free: 0 });
            let after = self.faults.rng.range(SECOND, 20 * SECOND);
            self.restore_after(after, Restore::RoomAtMds(index));
        }
    }

    /// True while everything that failed is whole again.
    pub(super) fn is_quiet(&self) -> bool {
        let slow = |node: &NodeIndex| self.cluster.world.nodes[node.0].disk_delay_ns > 0;
        self.faults.restores.is_empty() && !self.cluster.all_nodes().iter().any(slow)
    }

    /// True when the process of a chunk server is down for a while only.
    pub(super) fn starts_later(&self, index: usize) -> bool {
        self.faults.restores.values().any(|restore| matches!(restore, Restore::StartCs(at) if *at == index))
    }

    pub(super) fn later(&mut self, restore: Restore) {
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
                self.faults.isolated = None;
                for (from, to) in paths {
                    self.cluster.world.set_blocked(from, to, false);
                }
            }
            Some(Restore::Resume(node)) => self.resume(node),
            Some(Restore::FastDisk(node)) => {
                self.disturb(node);
                self.cluster.world.nodes[node.0].disk_delay_ns = 0;
            }
            Some(Restore::MendDisk(node)) => self.mend_disk(node),
            Some(Restore::RoomAtMds(index)) => {
                self.cluster.set_mds_room(index, Room { free: 1 << 40, ..Room::default() })
            }
            Some(Restore::RightDisk(index)) => self.put_right_disk_back(index),
            None => {}
        }
    }

    /// A disk of a server begins to fail, or one of its next flushes fails.
    fn fail_disk(&mut self, flush: bool) {
        let servers = self.cluster.mds.iter().map(|mds| mds.node).chain(self.cluster.cs.iter().map(|cs| cs.node));
        let servers: Vec<NodeIndex> = servers.collect();
        let node = *self.faults.rng.choose(&servers).expect("servers");
        let fails = self.faults.failing.get(&node).is_some_and(Option::is_none);
        if !self.cluster.is_running(node) || fails {
            return;
        }
        self.faults.failing.insert(node, None);
        let kinds = [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Any];
        let fault = if flush {
            Fault::Fail { kind: OpKind::Flush, nth: self.faults.rng.below(4), forever: false }
        } else {
            let kind = *self.faults.rng.choose(&kinds).expect("kinds");
            Fault::Fail { kind, nth: self.faults.rng.below(40), forever: self.faults.rng.chance(1, 2) }
        };
        self.cluster.world.note(format_args!("the disk of {node:?} fails: {fault:?}"));
        self.disturb(node);
        self.learn_sets();
        self.cluster.world.nodes[node.0].disks[0].inject(fault);
        self.later(Restore::MendDisk(node));
    }

    /// The disk is sound again; a process that has given up, or serves nothing any more, is started anew.
    fn mend_disk(&mut self, node: NodeIndex) {
        let now = self.now();
        let was_failing = self.faults.failing.get(&node).is_some_and(Option::is_none);
        if let Some(mended) = self.faults.failing.get_mut(&node) {
            mended.get_or_insert(now);
        }
        // What it gave up for until now is forgiven.
        self.cluster.world.fatal.retain(|(other, _)| *other != node);
        self.disturb(node);
        // Rot, and what a disk did wrong, does not go away by itself: reads and the scrub must find it.
        if !self.may_hold_damage() {
            self.cluster.world.nodes[node.0].disks.iter_mut().for_each(|disk| disk.lift_faults());
        }
        if let Some(index) = self.cluster.mds.iter().position(|mds| mds.node == node) {
            self.cluster.start_mds(index);
        }
        if let Some(index) = self.cluster.cs.iter().position(|cs| cs.node == node) {
            let failed = self.cluster.world.inspect::<CsCore, _>(node, |core| core.failed().is_some());
            // What it could not read it knows as damaged until it is started anew.
            if failed == Some(true) || (was_failing && self.cluster.is_running(node)) {
                self.cluster.world.kill(node);
            }
            self.cluster.start_cs(index);
        }
    }

    /// True when a process may give up: its disk fails, or did when a request was made that is answered now.
    pub(super) fn may_give_up(&self, node: NodeIndex) -> bool {
        let now = self.now();
        let is_old = |copy: &OldCopy| copy.is_in && self.cluster.cs[copy.index].node == node;
        self.faults.old_copy.as_ref().is_some_and(is_old)
            || self.wrong_node() == Some(node)
            || self.faults.failing.get(&node).is_some_and(|mended| mended.is_none_or(|at| now - at < ANSWERS_LATE))
    }

    /// True when the disk of some chunk server has failed since then: it may have held the last current copy in reach,
    /// and an error is the truth.
    pub(super) fn did_a_disk_fail(&self, since: u64) -> bool {
        let counts = |mended: &Option<u64>| mended.is_none_or(|at| at >= since);
        self.cluster.cs.iter().any(|cs| self.faults.failing.get(&cs.node).is_some_and(counts))
    }

    /// A bit flips in some block of data of the one chunk server whose disk rots in this run. In every other such seed
    /// with servers to spare it is two, and never the same block of both.
    fn rot(&mut self) {
        let servers = self.cluster.cs.len();
        let spare = self.plan.volumes.iter().all(|volume| usize::from(volume.replicas) < servers);
        let second = spare && (self.seed / 2).is_multiple_of(2) && self.faults.rng.chance(1, 2);
        let index = (self.seed as usize + usize::from(second)) % servers;
        let node = self.cluster.cs[index].node;
        let disk = &self.cluster.world.nodes[node.0].disks[0];
        let is_data = |page: &u64| Stamp::is_stamped(&disk.peek(page * BLOCK_SIZE_U64, BLOCK_SIZE as u32));
        let pages: Vec<u64> = disk.written_pages().into_iter().filter(is_data).collect();
        let Some(page) = self.faults.rng.choose(&pages).copied() else { return };
        let content = disk.peek(page * BLOCK_SIZE_U64, BLOCK_SIZE as u32);
        let Some((volume, unit, at)) = Stamp::place(&content) else { return };
        // Pages of the volume, whatever its unit is.
        let size = self.plan.volumes.iter().zip(&self.volumes).find(|(_, v)| v.info.volume.0 == volume);
        let size = size.map_or(BLOCK_SIZE_U64, |(plan, _)| plan.unit);
        // A stamp that rotted itself says anything.
        let block = unit.wrapping_mul(size).saturating_sub(at as u64 / size * size) / BLOCK_SIZE_U64;
        if *self.faults.rotten.entry((volume, block)).or_insert(index) != index {
            return;
        }
        let disk = &mut self.cluster.world.nodes[node.0].disks[0];
        let (byte, bit) = (self.faults.rng.below(BLOCK_SIZE_U64), self.faults.rng.below(8) as u8);
        disk.rot(page * BLOCK_SIZE_U64 + byte, bit);
        self.cluster.world.note(format_args!("bit rot at {node:?}, page {page}"));
    }

    /// Copies the disk of a chunk server as it runs; the next time starts the server from the copy, if all that is
    /// durable was told: then the copy is refused, or lacks nothing.
    fn use_old_copy(&mut self) -> Verdict {
        let now = self.now();
        let Some(mut copy) = self.faults.old_copy.take() else {
            let index = self.faults.rng.below(self.cluster.cs.len() as u64) as usize;
            let node = self.cluster.cs[index].node;
            let mut other = self.cluster.world.nodes[node.0].disks[0].clone();
            other.kill(&mut self.faults.rng);
            self.cluster.world.note(format_args!("the disk of {node:?} is copied"));
            self.faults.old_copy = Some(OldCopy { index, taken: now, other, is_in: false });
            return Ok(());
        };
        let node = self.cluster.cs[copy.index].node;
        let told = self.cluster.world.inspect::<CsCore, _>(node, |core| core.is_durable_told());
        if !copy.is_in && now > copy.taken + SECOND && told == Some(true) {
            self.power_is_lost(&[copy.index])?;
            self.cluster.world.kill(node);
            std::mem::swap(&mut self.cluster.world.nodes[node.0].disks[0], &mut copy.other);
            copy.is_in = true;
            self.cluster.world.note(format_args!("{node:?} starts from an older copy of its disk"));
            self.cluster.start_cs(copy.index);
            let after = self.faults.rng.range(SECOND, 6 * SECOND);
            self.restore_after(after, Restore::RightDisk(copy.index));
        }
        self.faults.old_copy = Some(copy);
        Ok(())
    }

    /// A copy that was let in stays, since it lacks nothing; else the right disk comes back.
    fn put_right_disk_back(&mut self, index: usize) {
        let node = self.cluster.cs[index].node;
        match self.cluster.world.inspect::<CsCore, _>(node, |core| core.is_admitted()) {
            Some(false) => self.restore_after(SECOND, Restore::RightDisk(index)),
            Some(true) => self.faults.old_copy = None,
            None => {
                let copy = self.faults.old_copy.take().expect("put in before");
                self.cluster.world.fatal.retain(|(other, _)| *other != node);
                self.cluster.world.nodes[node.0].disks[0] = copy.other;
                self.cluster.world.note(format_args!("{node:?} has its own disk again"));
                self.cluster.start_cs(index);
            }
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
            self.eras.disturb(index, now);
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
        let longest = *self.faults.rng.choose(&[SECOND, 6 * SECOND, 25 * SECOND]).expect("not empty");
        let after = self.faults.rng.range(10 * MS, longest);
        self.block(paths, after);
    }

    fn block(&mut self, paths: Vec<(NodeIndex, NodeIndex)>, for_ns: u64) {
        for &(from, to) in &paths {
            self.cluster.world.set_blocked(from, to, true);
        }
        self.restore_after(for_ns, Restore::Unblock(paths));
    }

    fn kill_client(&mut self, index: usize) -> Verdict {
        if self.cluster.is_running(self.cluster.clients[index]) {
            self.cluster.world.kill(self.cluster.clients[index]);
            self.client_died(index)?;
            self.later(Restore::StartClient(index));
        }
        Ok(())
    }

    /// A client and a chunk server, as if they ran on one host.
    fn draw_host(&mut self) -> (usize, usize) {
        let client = self.faults.rng.below(self.plan.shape.clients as u64) as usize;
        (client, self.faults.rng.below(self.cluster.cs.len() as u64) as usize)
    }

    fn cut_host(&mut self) -> Verdict {
        let (client, cs) = self.draw_host();
        // At times the whole rack.
        let rack = self.faults.rng.chance(1, 8);
        let which = if rack { (0..self.cluster.cs.len()).collect() } else { vec![cs] };
        self.cut_power(&which)?;
        self.kill_client(client)
    }

    /// True when the client is on an island and, in every other such seed, only reads: writes end its load within a
    /// moment, and what it reads after others took its volumes over is what matters. In the rest its writes come late.
    pub(super) fn only_reads(&self, client: usize) -> bool {
        self.faults.isolated == Some(client) && self.seed % (2 * SEEDS_OF) == SEEDS_ISLAND
    }

    /// Cuts a client and a chunk server off from all others, until others could take the volumes over; one at a time.
    fn isolate_host(&mut self) {
        if self.faults.restores.values().any(|restore| matches!(restore, Restore::Unblock(_))) {
            return;
        }
        let (client, cs) = self.draw_host();
        self.faults.isolated = Some(client);
        let island = [self.cluster.clients[client], self.cluster.cs[cs].node];
        let rest = self.cluster.all_nodes().into_iter().filter(|node| !island.contains(node));
        let paths = rest.flat_map(|there| island.into_iter().flat_map(move |here| [(here, there), (there, here)]));
        let (paths, for_ns) = (paths.collect(), self.faults.rng.range(15 * SECOND, 40 * SECOND));
        self.block(paths, for_ns);
    }

    fn cut_mds(&mut self, index: usize) {
        if self.cluster.is_running(self.cluster.mds[index].node) {
            self.learn_sets();
            self.cluster.world.power_cut(self.cluster.mds[index].node);
            self.later(Restore::StartMds(index));
        }
    }

    fn cut_power(&mut self, which: &[usize]) -> Verdict {
        self.power_is_lost(which)?;
        for &index in which {
            let node = self.cluster.cs[index].node;
            if self.cluster.is_running(node) {
                self.later(Restore::StartCs(index));
            }
            self.cluster.world.power_cut(node);
        }
        Ok(())
    }

    /// Ends every fault: paths, clocks, disks, frozen and dead processes.
    pub(super) fn heal(&mut self) -> Verdict {
        let tokens: Vec<u64> = self.faults.restores.keys().copied().collect();
        tokens.into_iter().for_each(|token| self.restore(token));
        let nodes = self.cluster.all_nodes();
        for node in nodes {
            self.cluster.world.nodes[node.0].disk_delay_ns = 0;
            if self.cluster.world.nodes[node.0].paused {
                self.cluster.world.pause(node, false);
            }
        }
        let servers = self.cluster.mds.iter().map(|mds| mds.node).chain(self.cluster.cs.iter().map(|cs| cs.node));
        servers.collect::<Vec<_>>().into_iter().for_each(|node| self.mend_disk(node));
        self.tell_the_forsaken()
    }

    /// Who was cut off while all metadata servers were replaced is started anew with a list that is right.
    fn tell_the_forsaken(&mut self) -> Verdict {
        self.cluster.keep_what_is_told();
        for index in 0..self.cluster.cs.len() {
            let node = self.cluster.cs[index].node;
            if self.cluster.is_forsaken(node) {
                self.cluster.world.note(format_args!("{node:?} knows no metadata server"));
                self.cluster.world.kill(node);
                self.cluster.start_cs(index);
            }
        }
        for index in 0..self.cluster.clients.len() {
            let node = self.cluster.clients[index];
            if self.cluster.is_forsaken(node) {
                self.cluster.world.note(format_args!("{node:?} knows no metadata server"));
                self.cluster.world.kill(node);
                self.client_died(index)?;
                self.cluster.start_client(index);
            }
        }
        Ok(())
    }
}
