//! Chunk maps: allocating, dropping, and every change of a replica set.
//!
//! All changes of a chunk go through [`Meta::set_chunk`]: it keeps the counts, the repair queue, the indexes by server
//! and the outstanding orders in step with the record. A version change is a record with a higher version; the set of a
//! version never changes.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::placement::{self, Wish};
use crate::record::{Chunk, ChunkState, Inode, Order, OrderKindRecord, StaleCopy};
use crate::state::{Meta, decode_record};
use cairn_stdx::planted;
use cairn_types::{ChunkId, ChunkVersion, ClientId, CsId, Epoch, InodeId, LayerId, VolumeId};
use cairn_wire::mds::{
    ChunkCounts, ChunkEntry, InodeKind, LIST_MAX, MdsError, MdsReply, Replica, ReplicaRole, Severity,
};
use std::collections::BTreeSet;

/// Most chunks allocated by one call.
pub const ALLOCATE_MAX: usize = 64;
/// An allocation that failed is reported at most this often.
const NO_SPACE_REPORT_NS: u64 = 60_000_000_000;
/// A server that does not answer a client is found silent by the metadata servers, too, within this time of the
/// client's report (which comes 0.5 s after a broken link or 3 s after the last answer; theirs after 1.5 s and 4 s).
const SILENCE_NOTICED_NS: u64 = 2_000_000_000;

/// The one layer of a volume without snapshots: ids are shared with volumes.
fn layer_of(volume: VolumeId) -> LayerId {
    LayerId(volume.0)
}

pub(crate) fn entry(volume: VolumeId, index: u64, chunk: &Chunk) -> ChunkEntry {
    ChunkEntry {
        index,
        chunk: chunk.id,
        layer: layer_of(volume),
        version: chunk.version,
        minimum: chunk.minimum,
        replicas: chunk.replicas.clone(),
    }
}

/// Adds one chunk to the counts, or takes it out.
pub(crate) fn tally(counts: &mut ChunkCounts, chunk: &Chunk, add: bool) {
    let apply = |count: &mut u64, counts_here: bool| {
        if counts_here {
            *count = count.checked_add_signed(if add { 1 } else { -1 }).expect("I8: a count of chunks went below zero");
        }
    };
    let state = chunk.state;
    apply(&mut counts.total, true);
    apply(&mut counts.offline, state == ChunkState::Offline);
    apply(&mut counts.blocked, state == ChunkState::Blocked);
    apply(&mut counts.urgent, state == ChunkState::Urgent);
    apply(&mut counts.degraded, state == ChunkState::Degraded);
    apply(&mut counts.standby, state == ChunkState::Standby);
    apply(&mut counts.overcommitted, state == ChunkState::Overcommitted);
    apply(&mut counts.healthy, state == ChunkState::Healthy);
    apply(&mut counts.pending, state == ChunkState::Blocked && chunk.queued.is_some());
    apply(&mut counts.replicating, chunk.is_replicating());
    apply(&mut counts.void, !chunk.used);
}

impl Chunk {
    /// A version change: the next record has a set of its own.
    pub(crate) fn bump(&mut self) {
        self.version = ChunkVersion(self.version.0 + 1);
    }

    /// Takes a server out of the set; its copy stays behind as a stale one.
    pub(crate) fn take_out(&mut self, cs: CsId, deleting: bool) {
        self.replicas.retain(|replica| replica.cs != cs);
        self.holders.retain(|holder| *holder != cs);
        self.stale.retain(|stale| stale.cs != cs);
        self.stale.push(StaleCopy { cs, deleting });
    }

    /// A server of the set has shown its copy.
    pub(crate) fn is_held_by(&mut self, cs: CsId) {
        self.used = true;
        if self.replica(cs).is_some() && !self.holders.contains(&cs) {
            self.holders.push(cs);
        }
    }

    /// True when taking `cs` out would leave no current replica.
    pub(crate) fn is_last_current(&self, cs: CsId) -> bool {
        self.replica(cs).is_some_and(|replica| replica.role == ReplicaRole::Current) && self.current() == 1
    }
}

impl<K: Kv> Meta<K> {
    pub(crate) fn chunk(&self, volume: VolumeId, index: u64) -> Option<Chunk> {
        self.record(&keys::chunk(volume, index))
    }

    /// Where a chunk is of which `cs` has a copy.
    pub(crate) fn place(&self, cs: CsId, chunk: ChunkId) -> Option<(VolumeId, u64)> {
        self.record(&keys::copy(cs, chunk))
    }

    /// Replaces a chunk's record (none: it did not or does not exist), with all that follows. `raise` orders the
    /// current replicas to adopt the version, for changes that no lease holder carries out.
    pub(crate) fn set_chunk(
        &mut self,
        volume: VolumeId,
        index: u64,
        old: Option<&Chunk>,
        new: Option<&mut Chunk>,
        raise: bool,
    ) {
        let Some(id) = old.or(new.as_deref()).map(|chunk| chunk.id) else { return };
        let new = new.map(|chunk| {
            self.check_change(old, chunk);
            let (state, work) = self.evaluate(chunk);
            chunk.state = state;
            chunk.queued = match (work, chunk.queued) {
                (None, _) => None,
                (Some(priority), Some(queued)) if queued.0 == priority => Some(queued),
                (Some(priority), _) => Some((priority, self.globals.clock_ns)),
            };
            &*chunk
        });
        if let Some(old) = old.filter(|_| !(planted!("chunk_counts_drift") && new.is_none())) {
            tally(&mut self.globals.counts, old, false);
        }
        if let Some(new) = new {
            tally(&mut self.globals.counts, new, true);
        }
        let (old_queued, new_queued) = (old.and_then(|chunk| chunk.queued), new.and_then(|chunk| chunk.queued));
        if old_queued != new_queued {
            if let Some((priority, due_ns)) = old_queued {
                self.delete(&keys::queue(priority, due_ns, volume, index));
            }
            if let Some((priority, due_ns)) = new_queued {
                self.put(&keys::queue(priority, due_ns, volume, index), Vec::new());
            }
        }
        self.index_copies(volume, index, id, old, new);
        if let Some(old) = old {
            // A rebuild needs its sources at the very version, also when the lease holder that should raise them died.
            let raise = raise || new.is_some_and(|new| new.version > old.version && new.is_replicating());
            self.reconcile_orders(volume, index, Some(old), new, raise);
        }
        match new {
            Some(new) => self.put_record(&keys::chunk(volume, index), new),
            None => self.delete(&keys::chunk(volume, index)),
        }
    }

    fn check_change(&self, old: Option<&Chunk>, new: &Chunk) {
        assert!(new.current() > 0, "rule 13: {} lost its last current replica", new.id);
        let servers: BTreeSet<CsId> = new.servers().collect();
        assert_eq!(servers.len(), new.replicas.len() + new.stale.len(), "{} has a server twice", new.id);
        if let Some(old) = old {
            let same_set = old.replicas == new.replicas;
            assert!(
                new.version > old.version || (new.version == old.version && same_set),
                "I7: the set of {} changed within {}",
                new.id,
                new.version
            );
        }
    }

    fn index_copies(&mut self, volume: VolumeId, index: u64, id: ChunkId, old: Option<&Chunk>, new: Option<&Chunk>) {
        let replicas = |chunk: Option<&Chunk>| -> Vec<CsId> {
            chunk.map_or(Vec::new(), |chunk| chunk.replicas.iter().map(|replica| replica.cs).collect())
        };
        let copies =
            |chunk: Option<&Chunk>| -> Vec<CsId> { chunk.map_or(Vec::new(), |chunk| chunk.servers().collect()) };
        let (old_replicas, new_replicas) = (replicas(old), replicas(new));
        for cs in old_replicas.iter().filter(|cs| !new_replicas.contains(cs)) {
            self.delete(&keys::replica(*cs, volume, index));
            // The copy leaves the set: what comes in its place is made anew.
            if self.damaged.remove(&(id, *cs)) {
                self.delete(&keys::damaged(*cs, id));
            }
        }
        for cs in new_replicas.iter().filter(|cs| !old_replicas.contains(cs)) {
            self.put(&keys::replica(*cs, volume, index), Vec::new());
        }
        let (old_copies, new_copies) = (copies(old), copies(new));
        for cs in old_copies.iter().filter(|cs| !new_copies.contains(cs)) {
            self.delete(&keys::copy(*cs, id));
        }
        for cs in new_copies.iter().filter(|cs| !old_copies.contains(cs)) {
            self.put_record(&keys::copy(*cs, id), &(volume, index));
        }
    }

    /// Each server has at most one order per chunk, which follows from its part: rebuild when rebuilding, delete when
    /// its copy is to go, raise when it is current and the version was changed by us.
    fn reconcile_orders(
        &mut self,
        volume: VolumeId,
        index: u64,
        old: Option<&Chunk>,
        new: Option<&Chunk>,
        raise: bool,
    ) {
        let Some(id) = old.or(new).map(|chunk| chunk.id) else { return };
        let version = old.into_iter().chain(new).map(|chunk| chunk.version).max().unwrap_or_default();
        let servers: BTreeSet<CsId> = old.into_iter().chain(new).flat_map(Chunk::servers).collect();
        for cs in servers {
            let standing: Option<Order> = self.record(&keys::order(cs, id));
            let is_raise = standing.is_some_and(|order| order.kind == OrderKindRecord::Raise);
            let part = new.and_then(|chunk| chunk.replica(cs)).map(|replica| replica.role);
            let deleting = new.is_none_or(|chunk| chunk.stale.iter().any(|stale| stale.cs == cs && stale.deleting));
            let kind = match part {
                Some(ReplicaRole::Rebuilding) => Some(OrderKindRecord::Rebuild),
                Some(ReplicaRole::Current) => (raise || is_raise).then_some(OrderKindRecord::Raise),
                None => deleting.then_some(OrderKindRecord::Delete),
            };
            let gone = self.servers.get(&cs).is_none_or(|server| server.dropped);
            let wanted = kind.filter(|_| !gone).map(|kind| Order { kind, volume, index, version });
            self.set_order(cs, id, standing, wanted);
        }
    }

    /// Replaces the order of a server for a chunk.
    pub(crate) fn set_order(&mut self, cs: CsId, chunk: ChunkId, old: Option<Order>, new: Option<Order>) {
        if old == new {
            return;
        }
        for (order, delta) in [(old, -1), (new, 1)] {
            let Some(order) = order else { continue };
            match order.kind {
                OrderKindRecord::Delete => {
                    let deleting = &mut self.globals.counts.deleting;
                    *deleting = deleting.checked_add_signed(delta).expect("delete orders are counted");
                }
                OrderKindRecord::Rebuild => {
                    if let Some(server) = self.servers.get_mut(&cs) {
                        server.rebuilding =
                            server.rebuilding.checked_add_signed(delta as i32).expect("orders are counted");
                    }
                }
                OrderKindRecord::Raise => {}
            }
        }
        match new {
            Some(order) => {
                self.put_record(&keys::order(cs, chunk), &order);
                self.push_orders(cs);
            }
            None => self.delete(&keys::order(cs, chunk)),
        }
    }

    pub(crate) fn chunk_map(&self, volume: VolumeId, index: u64, limit: u32) -> Answer {
        self.volume_inode(volume)?;
        let end = keys::after(&keys::one(keys::CHUNK, volume.0));
        let limit = (limit as usize).clamp(1, LIST_MAX);
        let chunks = self.kv.scan(&keys::chunk(volume, index), &end, limit);
        let entries = chunks.iter().map(|(key, value)| entry(volume, keys::number(key, 9), &decode_record(value)));
        Ok(MdsReply::Chunks(entries.collect()))
    }

    pub(crate) fn chunk_allocate(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        epoch: Epoch,
        indexes: &[u64],
    ) -> Answer {
        let mut inode = self.held_inode(client, volume, epoch, true)?;
        let limit = match inode.kind {
            InodeKind::Volume => inode.size.div_ceil(inode.policy.chunk_size()),
            _ => crate::inodes::SIZE_MAX >> inode.policy.chunk_shift,
        };
        if indexes.len() > ALLOCATE_MAX || indexes.iter().any(|index| *index >= limit) {
            return Err(MdsError::Invalid(format!("at most {ALLOCATE_MAX} indexes below {limit}")));
        }
        let mut entries = Vec::with_capacity(indexes.len());
        let mut new_chunks = Vec::new();
        let mut next_chunk = self.globals.next_chunk;
        for &index in indexes {
            if new_chunks.iter().any(|(known, _)| *known == index) {
                continue;
            }
            if let Some(chunk) = self.chunk(volume, index) {
                entries.push(entry(volume, index, &chunk));
                continue;
            }
            let chunk = self.place_chunk(ChunkId(next_chunk), &inode)?;
            next_chunk += 1;
            new_chunks.push((index, chunk));
        }
        self.globals.next_chunk = next_chunk;
        inode.chunks += new_chunks.len() as u64;
        if !new_chunks.is_empty() {
            self.put_inode(InodeId(volume.0), &inode);
        }
        for (index, mut chunk) in new_chunks {
            self.set_chunk(volume, index, None, Some(&mut chunk), false);
            entries.push(entry(volume, index, &chunk));
        }
        entries.sort_by_key(|entry| entry.index);
        Ok(MdsReply::Chunks(entries))
    }

    /// A new chunk on servers of its own choice: as many as wanted, at least as many as writes need.
    fn place_chunk(&mut self, id: ChunkId, inode: &Inode) -> Result<Chunk, MdsError> {
        let policy = &inode.policy;
        let wish = Wish {
            chunk: id,
            count: policy.replicas as usize,
            domain: policy.domain,
            tier: policy.tier,
            strict_domain: self.config("mds.alloc.strict_failure_domain") != 0,
            strict_tier: self.config("mds.alloc.strict_tier") != 0,
            repair: false,
            members: &[],
            excluded: &[],
        };
        let chosen = placement::choose(&wish, self.slots());
        if chosen.len() < policy.minimum as usize {
            let refusal = placement::explain(&wish, policy.minimum as usize, chosen.len(), self.slots());
            self.report_no_space(&refusal);
            return Err(MdsError::NoSpace(refusal));
        }
        let version = ChunkVersion(1);
        let replica = |cs| Replica { cs, role: ReplicaRole::Current, since: version };
        Ok(Chunk {
            id,
            version,
            replicas_normal: policy.replicas,
            minimum: policy.minimum,
            used: false,
            holders: Vec::new(),
            replicas: chosen.into_iter().map(replica).collect(),
            stale: Vec::new(),
            state: ChunkState::Healthy,
            queued: None,
        })
    }

    pub(crate) fn report_no_space(&mut self, refusal: &str) {
        let now = self.globals.clock_ns;
        if self.globals.no_space_reported_ns.is_none_or(|last| now >= last + NO_SPACE_REPORT_NS) {
            self.globals.no_space_reported_ns = Some(now);
            self.event(Severity::Warning, "MDS-3001", format!("a chunk could not be allocated: {refusal}"));
        }
    }

    pub(crate) fn chunk_drop(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        epoch: Epoch,
        index: u64,
        count: u64,
    ) -> Answer {
        let mut inode = self.held_inode(client, volume, epoch, true)?;
        let freed = self.free_chunks(volume, index, index.saturating_add(count), usize::MAX);
        if freed > 0 {
            inode.chunks -= freed as u64;
            self.put_inode(InodeId(volume.0), &inode);
        }
        Ok(MdsReply::Done)
    }

    /// Frees at most `limit` chunks with `from <= index < to`; the caller updates the inode. Returns how many.
    pub(crate) fn free_chunks(&mut self, volume: VolumeId, from: u64, to: u64, limit: usize) -> usize {
        let end = match to {
            u64::MAX => keys::after(&keys::one(keys::CHUNK, volume.0)),
            to => keys::chunk(volume, to).to_vec(),
        };
        let chunks = self.kv.scan(&keys::chunk(volume, from), &end, limit);
        for (key, value) in &chunks {
            let chunk: Chunk = decode_record(value);
            self.set_chunk(volume, keys::number(key, 9), Some(&chunk), None, false);
        }
        chunks.len()
    }

    /// When to plan for a chunk that lost the copy of a server that does not answer its client. Such a server may count
    /// as active a little longer; if it were given the chunk back meanwhile, every write would wait for it until the
    /// client has reported it once more.
    fn queued_after_failure(&self, chunk: &Chunk) -> Option<(u8, u64)> {
        let (state, work) = self.evaluate(chunk);
        let wait_ns = if state == ChunkState::Blocked { 0 } else { SILENCE_NOTICED_NS };
        work.map(|priority| (priority, self.globals.clock_ns + wait_ns))
    }

    pub(crate) fn replica_failed(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        epoch: Epoch,
        cs: CsId,
        chunks: &[ChunkId],
    ) -> Answer {
        let inode = self.held_inode(client, volume, epoch, false)?;
        if chunks.len() > LIST_MAX {
            return Err(MdsError::Invalid(format!("at most {LIST_MAX} chunks; none means all")));
        }
        let indexes: Vec<u64> = if chunks.is_empty() {
            let (from, to) = (keys::replica(cs, volume, 0), keys::replica(cs, VolumeId(volume.0 + 1), 0));
            self.kv.scan(&from, &to, usize::MAX).iter().map(|(key, _)| keys::number(key, 13)).collect()
        } else {
            let places = chunks.iter().filter_map(|chunk| self.place(cs, *chunk));
            places.filter(|(of, _)| *of == volume).map(|(_, index)| index).collect()
        };
        let mut entries = Vec::new();
        let (mut changed, mut truncated) = (false, false);
        for index in indexes {
            let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
            // Chunks of which the server still has a copy are answered whether they changed or not.
            let mut new = old.clone();
            if old.replica(cs).is_some() && !old.is_last_current(cs) {
                new.bump();
                new.take_out(cs, false);
                if chunks.is_empty() {
                    new.queued = self.queued_after_failure(&new);
                }
                if planted!("replica_forgotten_in_version_change") && new.current() > 1 {
                    new.replicas.pop();
                }
                self.set_chunk(volume, index, Some(&old), Some(&mut new), false);
                changed = true;
            }
            if entries.len() < LIST_MAX {
                entries.push(entry(volume, index, &new));
            } else {
                // What does not fit is to be fetched: the caller gets news of the map as the others do.
                truncated = true;
            }
        }
        if changed {
            self.push_map_changed(volume, &inode, Some(client).filter(|_| !truncated));
        }
        Ok(MdsReply::Chunks(entries))
    }
}
