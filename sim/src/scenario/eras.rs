//! What may be lost, and when: the rules by which eras of the shadow map end.
//!
//! A client keeps its unsettled writes until they are settled and sends them again to servers that restarted. So while
//! the client that wrote lives and holds its lease, nothing acknowledged may be missing, whatever loses power. When it
//! dies, or loses its lease, acknowledged writes that were not flushed may be gone in two cases only:
//!
//! - every current replica of a chunk lost power before they were durable there. Chunk servers flush by themselves
//!   within a second, so losses far apart cannot have taken the same write;
//! - some replicas lost power, and the next holder opened the volume while none of the others could be reached.

use super::{Scenario, Verdict};
use crate::scenario::cluster::SimMds;
use crate::world::SECOND;
use cairn_types::{ChunkId, ChunkVersion, CsId};
use cairn_wire::mds::{MdsReply, MdsRequest, ReplicaRole};
use std::collections::{BTreeMap, BTreeSet};

/// Power cuts further apart than this cannot have taken the same write from servers that ran undisturbed: a write is
/// flushed within a second of its answer.
const TOGETHER: u64 = 6 * SECOND;

/// See the module.
pub(super) struct Eras {
    /// When each chunk server last lost power with something unflushed.
    lost_power: Vec<Option<u64>>,
    /// Chunk servers that lost power with something unflushed and may still lack it.
    lacking: Vec<bool>,
    /// Copies made from such servers alone: they lack the same.
    heirs: BTreeSet<(ChunkId, CsId)>,
    /// When each chunk server was last frozen or slow: its own flushes may be late.
    disturbed: Vec<Option<u64>>,
    /// The newest replica set seen of each chunk, with its volume.
    sets: BTreeMap<ChunkId, (ChunkVersion, usize, Vec<CsId>)>,
    /// Who opened each volume last and has neither closed it nor died.
    holder: Vec<Option<usize>>,
    /// The last holder of a volume left without closing it.
    left_open: Vec<bool>,
    /// Volumes whose unflushed writes only their holder has now.
    at_risk: Vec<Option<u64>>,
}

impl Eras {
    pub fn new(cs: usize) -> Self {
        Self {
            lost_power: vec![None; cs],
            lacking: vec![false; cs],
            heirs: BTreeSet::new(),
            disturbed: vec![None; cs],
            sets: BTreeMap::new(),
            holder: Vec::new(),
            left_open: Vec::new(),
            at_risk: Vec::new(),
        }
    }

    /// A chunk server joins.
    pub fn add_cs(&mut self) {
        self.lost_power.push(None);
        self.lacking.push(false);
        self.disturbed.push(None);
    }

    /// The disk of a chunk server is gone.
    pub fn lost_for_good(&mut self, cs: usize, now: u64) {
        self.lost_power[cs] = Some(now);
        self.lacking[cs] = true;
    }

    pub fn know_volumes(&mut self, count: usize) {
        self.holder = vec![None; count];
        self.left_open = vec![false; count];
        self.at_risk = vec![None; count];
    }

    pub fn disturb(&mut self, cs: usize, now: u64) {
        self.disturbed[cs] = Some(now);
    }

    /// A flush asked for at `since` was acknowledged.
    pub fn flushed(&mut self, volume: usize, since: u64) {
        if self.at_risk[volume].is_some_and(|at| at <= since) {
            self.at_risk[volume] = None;
        }
    }

    /// A volume was closed in good order.
    pub fn closed(&mut self, client: usize, volume: usize) {
        if self.holder[volume] == Some(client) {
            self.holder[volume] = None;
            self.at_risk[volume] = None;
        }
    }
}

impl Scenario {
    /// Some chunk servers lose power now.
    pub(super) fn power_is_lost(&mut self, which: &[usize]) -> Verdict {
        let now = self.now();
        let eras = &mut self.eras;
        for &index in which {
            let node = self.cluster.cs[index].node;
            if !self.cluster.world.nodes[node.0].disks[0].unflushed_pages().is_empty() {
                eras.lost_power[index] = Some(now);
                eras.lacking[index] = true;
            }
        }
        let disturbed_since = |at: u64| which.iter().any(|&index| eras.disturbed[index].is_some_and(|d| d >= at));
        let losers: Vec<CsId> = (0..self.cluster.cs.len())
            .filter(|&index| {
                eras.lost_power[index]
                    .is_some_and(|at| now - at <= TOGETHER || disturbed_since(at.saturating_sub(TOGETHER)))
            })
            .filter_map(|index| self.cluster.cs[index].id)
            .collect();
        for volume in self.volumes_within(&losers) {
            if self.eras.holder[volume].is_some() {
                self.eras.at_risk[volume] = Some(now);
            } else {
                self.end_era(volume, "every replica lost power, and nobody has its writes")?;
            }
        }
        Ok(())
    }

    /// Volumes with a chunk all of whose current replicas are among `servers`.
    fn volumes_within(&mut self, servers: &[CsId]) -> Vec<usize> {
        self.learn_sets();
        let within = |set: &[CsId]| !set.is_empty() && set.iter().all(|cs| servers.contains(cs));
        let mut volumes: Vec<usize> =
            self.eras.sets.values().filter(|(.., set)| within(set)).map(|(_, volume, _)| *volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        volumes
    }

    /// True when a server has the only current copy of some chunk.
    pub(super) fn is_last_copy(&mut self, cs: CsId) -> bool {
        self.learn_sets();
        self.eras.sets.values().any(|(.., set)| set == &[cs])
    }

    fn end_era(&mut self, volume: usize, why: &str) -> Verdict {
        let id = self.volumes[volume].info.volume;
        self.cluster.world.note(format_args!("an era of {id} ends: {why}"));
        self.eras.at_risk[volume] = None;
        self.file_may_fall_back(volume);
        self.shadow.end_era(id.0).map_err(Box::new)
    }

    /// A client died or lost the lease of a volume, and with it what it kept.
    pub(super) fn holder_left(&mut self, client: usize, volume: usize) -> Verdict {
        if self.eras.holder[volume] != Some(client) {
            return Ok(());
        }
        self.eras.holder[volume] = None;
        self.eras.left_open[volume] = true;
        match self.eras.at_risk[volume] {
            Some(_) => self.end_era(volume, "every replica had lost power, and its holder left"),
            None => Ok(()),
        }
    }

    /// A client has opened a volume, to read it only (`shared`), or as its holder.
    pub(super) fn holder_came(&mut self, client: usize, volume: usize, shared: bool) -> Verdict {
        if let Some(last) = self.eras.holder[volume].filter(|last| *last != client) {
            self.holder_left(last, volume)?;
        }
        // A reader has nothing unsettled, unless it had to reconcile what a holder left.
        self.eras.holder[volume] = (!shared || self.eras.left_open[volume]).then_some(client);
        if std::mem::take(&mut self.eras.left_open[volume]) {
            self.learn_sets();
            let lacking = self.lacking();
            let lacks = |chunk: &ChunkId, cs: &CsId| lacking.contains(cs) || self.eras.heirs.contains(&(*chunk, *cs));
            let mut of_volume = self.eras.sets.iter().filter(|(_, (_, of, set))| *of == volume && !set.is_empty());
            if of_volume.any(|(chunk, (.., set))| set.iter().all(|cs| lacks(chunk, cs))) {
                self.end_era(volume, "its last holder left, and all servers in reach had lost power")?;
            }
        }
        Ok(())
    }

    /// The servers that may lack what they had not flushed.
    fn lacking(&self) -> Vec<CsId> {
        let cs = &self.cluster.cs;
        (0..cs.len()).filter(|&index| self.eras.lacking[index]).filter_map(|index| cs[index].id).collect()
    }

    /// Asks every metadata server that runs for the chunk maps; the highest version of a chunk counts.
    pub(super) fn learn_sets(&mut self) {
        let lacking = self.lacking();
        for mds in &self.cluster.mds {
            for (index, volume) in self.volumes.iter().enumerate() {
                let request = MdsRequest::ChunkMap { volume: volume.info.volume, index: 0, limit: 64 };
                let answer = self.cluster.world.inspect::<SimMds, _>(mds.node, |core| core.meta().query(&request));
                let Some(Ok(MdsReply::Chunks(entries))) = answer else { continue };
                for entry in entries {
                    let known = self.eras.sets.entry(entry.chunk).or_default();
                    if entry.version >= known.0 {
                        let current = entry.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current);
                        let current: Vec<CsId> = current.map(|replica| replica.cs).collect();
                        let heirs = &mut self.eras.heirs;
                        let lacks = |cs: &CsId| lacking.contains(cs) || heirs.contains(&(entry.chunk, *cs));
                        // Who was there before and still is has been the source; where all changed, anybody was.
                        let mut sources: Vec<CsId> =
                            known.2.iter().copied().filter(|cs| current.contains(cs)).collect();
                        if sources.is_empty() {
                            sources.clone_from(&known.2);
                        }
                        if !sources.is_empty() && sources.iter().all(lacks) {
                            let new = current.iter().filter(|cs| !known.2.contains(cs));
                            let new: Vec<(ChunkId, CsId)> = new.map(|cs| (entry.chunk, *cs)).collect();
                            heirs.extend(new);
                        }
                        *known = (entry.version, index, current);
                    }
                }
            }
        }
    }
}
