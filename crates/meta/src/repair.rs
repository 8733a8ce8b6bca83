//! Repair: what state a chunk is in, what is to be done about it, and the orders that do it.
//!
//! A chunk that needs work stands in the repair queue, blocked before urgent before degraded before tidying. A copy is
//! made by a version change that adds a rebuilding replica, which gets all writes from then on; when its server reports
//! that the rest is copied, a second version change promotes it. Servers that came back are freshened before new ones
//! are filled. Copies beyond the wanted number go only once the others are current, and so do damaged ones.

use crate::kv::Kv;
use crate::placement::{self, Wish};
use crate::record::{Chunk, ChunkState, Inode, Order, OrderKindRecord, Policy, Standing};
use crate::state::{Meta, decode_record, short};
use crate::{chunks, keys};
use cairn_stdx::planted;
use cairn_types::{CsId, InodeId, VolumeId};
use cairn_wire::mds::{CsOrder, OrderDone, Replica, ReplicaRole, Severity};

/// Priority of a chunk whose writes wait.
pub(crate) const PRIORITY_BLOCKED: u8 = 0;
/// Priority of a degraded chunk with stale copies.
pub(crate) const PRIORITY_URGENT: u8 = 1;
/// Priority of a degraded chunk.
pub(crate) const PRIORITY_DEGRADED: u8 = 2;
/// Priority of moving copies away and of removing surplus ones.
pub(crate) const PRIORITY_MOVE: u8 = 3;
/// Priority of deleting stale copies.
pub(crate) const PRIORITY_TIDY: u8 = 4;

const SECOND_NS: u64 = 1_000_000_000;
/// When to look again at a chunk for which all suitable servers are busy.
const RETRY_BUSY_NS: u64 = SECOND_NS;
/// When to look again at a chunk that waits for a server to return, or for a brake to be released.
const RETRY_WAIT_NS: u64 = 10 * SECOND_NS;
/// When to look again at a chunk for which there is no server, or whose copying failed.
const RETRY_NO_TARGET_NS: u64 = 30 * SECOND_NS;

/// Chunks of the queue looked at for the next one of a server.
const NEXT_LOOKS: usize = 64;

/// The replicas of a chunk by how their servers stand.
#[derive(Default)]
struct Census {
    /// Current, on a server that answers.
    online: usize,
    /// Current, on a server that has just become silent.
    silent: usize,
    /// Current, on a server that answers or has just become silent, and stays.
    staying: usize,
    /// Current, on a server that is leaving or gone, or damaged.
    departing: usize,
    /// Current, on a server that answers or has just become silent, with a damaged block.
    damaged: usize,
    /// Being made.
    rebuilding: usize,
    /// Being made, on a server that is gone.
    rebuilding_lost: usize,
}

impl<K: Kv> Meta<K> {
    pub(crate) fn standing(&self, cs: CsId) -> Standing {
        self.servers.get(&cs).map_or(Standing::Gone, |server| server.standing())
    }

    /// True for a current copy with a bad block that is not the only one.
    fn is_damaged(&self, chunk: &Chunk, cs: CsId) -> bool {
        !self.damaged.is_empty() && chunk.current() > 1 && self.damaged.contains(&(chunk.id, cs))
    }

    fn census(&self, chunk: &Chunk) -> Census {
        let mut census = Census::default();
        for replica in &chunk.replicas {
            let standing = self.standing(replica.cs);
            if replica.role == ReplicaRole::Rebuilding {
                match standing {
                    Standing::Good | Standing::Silent => census.rebuilding += 1,
                    _ => census.rebuilding_lost += 1,
                }
                continue;
            }
            census.online += usize::from(matches!(standing, Standing::Good | Standing::Leaving));
            census.silent += usize::from(matches!(standing, Standing::Silent | Standing::SilentLeaving));
            let damaged = self.is_damaged(chunk, replica.cs);
            census.damaged += usize::from(damaged && standing != Standing::Gone);
            match standing {
                Standing::Good | Standing::Silent if !damaged => census.staying += 1,
                _ => census.departing += 1,
            }
        }
        census
    }

    /// The state of a chunk, and the priority with which it needs work, if it does.
    ///
    /// A chunk below its minimum only because servers have just become silent is blocked, but nothing is copied for it:
    /// as long as nobody writes, they are expected back; who writes takes them out of the set, and then it is.
    pub(crate) fn evaluate(&self, chunk: &Chunk) -> (ChunkState, Option<u8>) {
        let census = self.census(chunk);
        let (normal, minimum) = (usize::from(chunk.replicas_normal), usize::from(chunk.minimum));
        let stale = chunk.stale.iter().any(|stale| !stale.deleting);
        let state = if census.online == 0 {
            ChunkState::Offline
        } else if census.online < minimum {
            ChunkState::Blocked
        } else if census.online + census.silent < normal + census.damaged {
            if stale { ChunkState::Urgent } else { ChunkState::Degraded }
        } else if census.online < normal {
            ChunkState::Standby
        } else if chunk.current() > normal {
            ChunkState::Overcommitted
        } else {
            ChunkState::Healthy
        };
        let missing = normal > census.staying + census.rebuilding;
        let surplus = census.staying >= normal && (census.departing > 0 || census.staying > normal);
        let work = if census.online == 0 {
            // Nothing to copy from; the sweep after a server's return looks again.
            None
        } else if missing {
            Some(match state {
                ChunkState::Blocked => PRIORITY_BLOCKED,
                ChunkState::Urgent => PRIORITY_URGENT,
                ChunkState::Degraded => PRIORITY_DEGRADED,
                _ => PRIORITY_MOVE,
            })
        } else if surplus || census.rebuilding_lost > 0 {
            Some(PRIORITY_MOVE)
        } else if stale && census.staying >= normal && census.rebuilding == 0 {
            Some(PRIORITY_TIDY)
        } else {
            None
        };
        (state, work)
    }

    /// Looks at a chunk of the queue and does the next thing for it.
    pub(crate) fn plan(&mut self, volume: VolumeId, index: u64) {
        let old = self.chunk(volume, index).expect("the queue names chunks that exist");
        let Some((priority, _)) = old.queued else { return };
        let inode: Inode = self.record(&keys::inode(InodeId(volume.0))).expect("a chunk has a volume");
        let mut new = old.clone();
        let (_, work) = self.evaluate(&new);
        let mut retry_ns = RETRY_NO_TARGET_NS;
        if work.is_some() {
            match priority {
                PRIORITY_TIDY if self.on_hold() => {}
                PRIORITY_TIDY => new.stale.iter_mut().for_each(|stale| stale.deleting = true),
                _ => retry_ns = self.plan_copies(&mut new, &inode.policy),
            }
        }
        let changed = new.version != old.version;
        new.queued = Some((priority, self.globals.clock_ns + retry_ns));
        self.set_chunk(volume, index, Some(&old), Some(&mut new), changed);
        if changed {
            self.push_map_changed(volume, &inode, None);
        }
    }

    /// Adds rebuilding replicas where copies are missing, and takes out what is lost or too much. All of it is one
    /// version change. Returns when to look again if work remains.
    fn plan_copies(&mut self, chunk: &mut Chunk, policy: &Policy) -> u64 {
        let lost: Vec<CsId> = chunk
            .replicas
            .iter()
            .filter(|replica| replica.role == ReplicaRole::Rebuilding)
            .map(|replica| replica.cs)
            .filter(|cs| !matches!(self.standing(*cs), Standing::Good | Standing::Silent))
            .collect();
        let census = self.census(chunk);
        let missing = usize::from(chunk.replicas_normal).saturating_sub(census.staying + census.rebuilding);
        let (targets, retry_ns) =
            if missing > 0 { self.targets(chunk, policy, missing) } else { (Vec::new(), RETRY_BUSY_NS) };
        let alone = missing > 0 && targets.is_empty() && census.rebuilding == 0;
        let stuck = alone && retry_ns == RETRY_NO_TARGET_NS && !self.on_hold();
        if !lost.is_empty() || !targets.is_empty() {
            chunk.bump();
            for cs in lost {
                chunk.take_out(cs, true);
            }
            for cs in targets {
                let returning = chunk.stale.iter().any(|stale| stale.cs == cs);
                chunk.stale.retain(|stale| stale.cs != cs);
                let role = if planted!("stale_copy_rejoins_as_current") && returning {
                    ReplicaRole::Current
                } else {
                    ReplicaRole::Rebuilding
                };
                chunk.replicas.push(Replica { cs, role, since: chunk.version });
            }
        }
        if stuck && let Some(cs) = self.replaceable_in_place(chunk) {
            chunk.bump();
            chunk.take_out(cs, true);
            return RETRY_BUSY_NS;
        }
        self.drop_surplus(chunk, policy);
        retry_ns
    }

    /// A damaged copy that makes room for another one on its own server, because no other server can take it; a copy
    /// without damage has all its blocks.
    fn replaceable_in_place(&self, chunk: &Chunk) -> Option<CsId> {
        let current = || chunk.replicas.iter().filter(|r| r.role == ReplicaRole::Current).map(|r| r.cs);
        let is_source = |cs: &CsId| {
            let reachable = matches!(self.standing(*cs), Standing::Good | Standing::Leaving);
            reachable && !self.is_damaged(chunk, *cs)
        };
        let damaged = |cs: &CsId| self.standing(*cs) == Standing::Good && self.is_damaged(chunk, *cs);
        current().any(|cs| is_source(&cs)).then(|| current().find(damaged)).flatten()
    }

    /// Where to make `missing` copies.
    fn targets(&mut self, chunk: &Chunk, policy: &Policy, missing: usize) -> (Vec<CsId>, u64) {
        let blocked = self.evaluate(chunk).0 == ChunkState::Blocked;
        let busy_at = self.config("mds.wd.rebuilds_per_cs") as u32;
        let strict = self.config("mds.alloc.strict_failure_domain") != 0;
        let strict_tier = self.config("mds.alloc.strict_tier") != 0;
        let is_member = |replica: &&Replica| {
            matches!(self.standing(replica.cs), Standing::Good | Standing::Silent)
                && !self.is_damaged(chunk, replica.cs)
        };
        let mut members: Vec<CsId> = chunk.replicas.iter().filter(is_member).map(|replica| replica.cs).collect();
        let mut targets = Vec::new();
        let mut busy = false;
        let level = policy.domain as usize;
        let slots = self.slots().to_vec();
        let domain = |cs: CsId| slots.binary_search_by_key(&cs, |slot| slot.cs).ok().map(|at| slots[at].domains[level]);
        // A returned server needs only what changed since it went.
        let mut full_ones = Vec::new();
        for stale in chunk.stale.iter().filter(|stale| !stale.deleting && !self.on_hold()) {
            // Freshening takes room as well.
            if slots.iter().any(|slot| slot.cs == stale.cs && slot.repair_weight == 0) {
                full_ones.push(stale.cs);
                continue;
            }
            let conflict = strict && members.iter().any(|member| domain(*member) == domain(stale.cs));
            if targets.len() == missing || conflict || self.standing(stale.cs) != Standing::Good {
                continue;
            }
            if self.servers[&stale.cs].rebuilding >= busy_at {
                busy = true;
                continue;
            }
            members.push(stale.cs);
            targets.push(stale.cs);
        }
        if targets.len() == missing || busy {
            return (targets, RETRY_BUSY_NS);
        }
        let may_return = chunk.stale.iter().any(|stale| !stale.deleting && self.standing(stale.cs) == Standing::Silent);
        if self.globals.brake.is_some() || (may_return && !blocked) {
            return (targets, RETRY_WAIT_NS);
        }
        let is_busy = |cs: &CsId| self.servers[cs].rebuilding >= busy_at;
        let mut excluded: Vec<CsId> = chunk.servers().collect();
        excluded.extend(self.servers.keys().filter(|cs| is_busy(cs)));
        let wish = Wish {
            chunk: chunk.id,
            count: missing - targets.len(),
            domain: policy.domain,
            tier: policy.tier,
            strict_domain: strict,
            strict_tier,
            repair: true,
            members: &members,
            excluded: &excluded,
        };
        let found = placement::choose(&wish, &slots);
        targets.extend(&found);
        members.extend(&found);
        // With nowhere else to go a full server is tried: below the minimum nobody could even trim, and what was
        // trimmed meanwhile frees what its old copy takes, which nothing else would ever do.
        for cs in full_ones.into_iter().filter(|cs| self.standing(*cs) == Standing::Good && !is_busy(cs)) {
            let conflict = strict && members.iter().any(|member| domain(*member) == domain(cs));
            if targets.len() < missing && !conflict && !planted!("full_copy_never_freshened") {
                members.push(cs);
                targets.push(cs);
            }
        }
        let any_busy = self.servers.keys().any(is_busy);
        let retry_ns = if any_busy { RETRY_BUSY_NS } else { RETRY_NO_TARGET_NS };
        (targets, retry_ns)
    }

    /// Takes out the current replicas beyond the normal number: those on departing servers first, then those that share
    /// a domain, then those on silent servers, then those on the fullest. Does nothing until enough others are
    /// current.
    fn drop_surplus(&mut self, chunk: &mut Chunk, policy: &Policy) {
        let normal = usize::from(chunk.replicas_normal);
        let census = self.census(chunk);
        if census.staying < normal || census.staying + census.departing == normal || self.on_hold() {
            return;
        }
        let level = policy.domain as usize;
        let slots = self.slots().to_vec();
        let domain = |cs: CsId| slots.binary_search_by_key(&cs, |slot| slot.cs).ok().map(|at| slots[at].domains[level]);
        let mut drop: Vec<CsId> = Vec::new();
        let mut kept: Vec<CsId> = Vec::new();
        for replica in chunk.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current) {
            match self.standing(replica.cs) {
                Standing::Good | Standing::Silent if !self.is_damaged(chunk, replica.cs) => kept.push(replica.cs),
                _ => drop.push(replica.cs),
            }
        }
        while kept.len() > normal {
            let rank = |cs: &CsId| {
                let shares = kept.iter().any(|other| other != cs && domain(*other) == domain(*cs));
                let stats = self.servers[cs].stats;
                let fill = u128::from(stats.used) * 10_000 / u128::from(stats.capacity.max(1));
                (shares, self.standing(*cs) == Standing::Silent, fill, *cs)
            };
            let worst = kept.iter().copied().max_by_key(rank).expect("more than normal are kept");
            kept.retain(|cs| *cs != worst);
            drop.push(worst);
        }
        // Reads need one that answers.
        if drop.is_empty() || !kept.iter().any(|cs| self.standing(*cs) == Standing::Good) {
            return;
        }
        chunk.bump();
        for cs in drop {
            chunk.take_out(cs, true);
        }
    }

    pub(crate) fn push_volume_map_changed(&mut self, volume: VolumeId) {
        if let Some(inode) = self.record::<Inode>(&keys::inode(InodeId(volume.0))) {
            self.push_map_changed(volume, &inode, None);
        }
    }

    /// What a server is to do now, at most `max` orders. They are repeated until their effect is reported.
    pub fn orders_for(&self, cs: CsId, max: usize) -> Vec<CsOrder> {
        let prefix = keys::server(keys::ORDER, cs);
        let orders = self.kv.scan(&prefix, &keys::after(&prefix), max);
        orders
            .iter()
            .filter_map(|(key, value)| {
                let order: Order = decode_record(value);
                let id = cairn_types::ChunkId(keys::number(key, 5));
                if order.kind == OrderKindRecord::Delete {
                    return Some(CsOrder::Delete { chunk: id, version: order.version });
                }
                let chunk = self.chunk(order.volume, order.index)?;
                match order.kind {
                    OrderKindRecord::Raise => {
                        let since = chunk.replica(cs)?.since;
                        Some(CsOrder::Raise { chunk: id, since, version: chunk.version })
                    }
                    _ => self.rebuild_order(cs, order, &chunk),
                }
            })
            .collect()
    }

    fn rebuild_order(&self, cs: CsId, order: Order, chunk: &Chunk) -> Option<CsOrder> {
        let inode: Inode = self.record(&keys::inode(InodeId(order.volume.0)))?;
        let home = &self.servers.get(&cs)?.location;
        let mut sources: Vec<_> = chunk
            .replicas
            .iter()
            .filter(|replica| replica.role == ReplicaRole::Current)
            .filter_map(|replica| Some((replica.cs, self.servers.get(&replica.cs)?)))
            .filter(|(_, server)| matches!(server.standing(), Standing::Good | Standing::Leaving))
            .collect();
        sources.sort_by_key(|(cs, server)| {
            let place = &server.location;
            let near =
                [place.host == home.host, place.rack == home.rack, place.room == home.room, place.site == home.site];
            (self.is_damaged(chunk, *cs), near.map(|same| !same), server.stats.queue_depth, *cs)
        });
        if sources.is_empty() {
            return None;
        }
        Some(CsOrder::Rebuild {
            entry: chunks::entry(order.volume, order.index, chunk),
            volume: order.volume,
            block_count: u32::try_from(inode.policy.chunk_size() / cairn_types::BLOCK_SIZE_U64)
                .expect("256 MiB at most"),
            sources: sources.into_iter().map(|(cs, server)| (cs, server.addr)).collect(),
            created: chunk.replicas.iter().any(|r| r.role == ReplicaRole::Current && chunk.holders.contains(&r.cs)),
        })
    }

    pub(crate) fn rebuild_done(&mut self, cs: CsId, done: &OrderDone) {
        let Some((volume, index)) = self.place(cs, done.chunk) else { return };
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        // A rebuild at an earlier version may lack writes of this one; the order is repeated with the new version.
        if old.version != done.version || old.replica(cs).is_none_or(|replica| replica.role != ReplicaRole::Rebuilding)
        {
            return;
        }
        let inode: Inode = self.record(&keys::inode(InodeId(volume.0))).expect("a chunk has a volume");
        let mut new = old.clone();
        new.bump();
        if let Some(error) = &done.error {
            let text = format!("{cs} could not copy {}: {}; another server is tried", old.id, short(error));
            self.event(Severity::Warning, "MDS-5010", text);
            new.take_out(cs, true);
            let priority = self.evaluate(&new).1.unwrap_or(PRIORITY_DEGRADED);
            new.queued = Some((priority, self.globals.clock_ns + RETRY_WAIT_NS));
        } else {
            let replica = new.replicas.iter_mut().find(|replica| replica.cs == cs).expect("found above");
            *replica = Replica { cs, role: ReplicaRole::Current, since: done.version };
            new.is_held_by(cs);
            self.drop_surplus(&mut new, &inode.policy);
        }
        self.set_chunk(volume, index, Some(&old), Some(&mut new), true);
        self.push_map_changed(volume, &inode, None);
        self.next_for(cs);
    }

    /// A server has ended a copy: the next of those that only it can freshen has its turn, without waiting for the time
    /// to look at it again. A server that was away may have thousands, most of them done in no time.
    fn next_for(&mut self, cs: CsId) {
        let mut looks = NEXT_LOOKS;
        for priority in PRIORITY_BLOCKED..=PRIORITY_MOVE {
            let from = keys::queue(priority, 0, VolumeId(0), 0);
            let to = keys::queue(priority + 1, 0, VolumeId(0), 0);
            let line = self.kv.scan(&from, &to, looks);
            looks -= line.len();
            for (key, _) in line {
                let (volume, index) = (VolumeId(keys::number(&key, 10)), keys::number(&key, 18));
                let chunk = self.chunk(volume, index).expect("the queue names chunks that exist");
                let waits = chunk.stale.iter().any(|stale| stale.cs == cs && !stale.deleting);
                if waits && chunk.replicas.iter().all(|replica| replica.role == ReplicaRole::Current) {
                    return self.plan(volume, index);
                }
            }
        }
    }

    pub(crate) fn raise_done(&mut self, cs: CsId, done: &OrderDone, order: Order) {
        let old = self.chunk(order.volume, order.index).expect("a raise order has a chunk");
        if done.error.is_none() {
            if done.version == old.version {
                self.set_order(cs, done.chunk, Some(order), None);
            }
            let mut new = old.clone();
            new.is_held_by(cs);
            if new != old {
                self.set_chunk(order.volume, order.index, Some(&old), Some(&mut new), false);
            }
            return;
        }
        self.set_order(cs, done.chunk, Some(order), None);
        // The server does not have what it should: the copy is stale, unless nothing was ever written there. A server
        // whose disk failed keeps its place until it is replaced or comes back.
        let failed = self.servers.get(&cs).is_none_or(|server| server.failed.is_some());
        if done.version == old.version && !failed && !old.is_last_current(cs) && old.replica(cs).is_some() {
            let mut new = old.clone();
            new.bump();
            new.take_out(cs, false);
            self.set_chunk(order.volume, order.index, Some(&old), Some(&mut new), true);
            self.push_volume_map_changed(order.volume);
        }
    }

    pub(crate) fn delete_done(&mut self, cs: CsId, done: &OrderDone, order: Order) {
        self.set_order(cs, done.chunk, Some(order), None);
        let Some((volume, index)) = self.place(cs, done.chunk) else { return };
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        let mut new = old.clone();
        match &done.error {
            None => new.stale.retain(|stale| stale.cs != cs),
            Some(_) => {
                // Try again later, with the version of then.
                new.stale.iter_mut().filter(|stale| stale.cs == cs).for_each(|stale| stale.deleting = false);
                if let Some(priority) = self.evaluate(&new).1 {
                    new.queued = Some((priority, self.globals.clock_ns + RETRY_NO_TARGET_NS));
                }
            }
        }
        self.set_chunk(volume, index, Some(&old), Some(&mut new), false);
    }
}
