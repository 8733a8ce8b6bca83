//! Background work, in bounded steps driven by ticks: looking again at the chunks of a server that changed its state,
//! freeing what was deleted, giving volumes a new redundancy, clearing away ended sessions, repairing.
//!
//! Each job is a record and its progress is what is left to do, so that it goes on after any crash where it was.

use crate::keys;
use crate::kv::Kv;
use crate::record::{Chunk, Inode, Presence, Server, SessionState, Standing};
use crate::sessions::SESSION_CLEAR_STEP;
use crate::state::{Meta, decode_record};
use cairn_types::{ChunkId, ClientId, CsId, HostId, InodeId, VolumeId};
use cairn_wire::mds::Severity;
use std::collections::BTreeMap;

/// Chunks looked at by one command for background work of each kind.
const STEP_CHUNKS: usize = 2048;
/// Chunks of the repair queue worked on by one tick.
const STEP_PLANS: usize = 512;
/// The same while no server takes another copy.
const STEP_IDLE_LOOKS: usize = 16;
/// The clock follows the leader's clock by at most this much per tick.
const CLOCK_STEP_MAX_NS: u64 = 10_000_000_000;

impl<K: Kv> Meta<K> {
    pub(crate) fn tick(&mut self, wall_ns: u64) {
        let passed = wall_ns.saturating_sub(self.globals.tick_wall_ns).min(CLOCK_STEP_MAX_NS);
        self.globals.tick_wall_ns = wall_ns;
        self.globals.clock_ns += passed;
        self.digest(&self.globals.clock_ns.to_le_bytes());
        self.changed();
        self.update_brake();
        self.clear_sessions();
        self.run_sweeps(STEP_CHUNKS);
        self.run_garbage(STEP_CHUNKS);
        self.run_retarget(STEP_CHUNKS);
        self.run_queue(STEP_PLANS);
        self.run_balance();
        self.finish_drains();
        self.report_repair();
    }

    /// True while a tick has something to do at once; otherwise one a second is enough.
    pub fn has_work(&self) -> bool {
        let any = |table: u8| !self.kv.scan(&[table], &[table + 1], 1).is_empty();
        let queued = (0..=crate::repair::PRIORITY_TIDY).any(|priority| {
            let from = keys::queue(priority, 0, VolumeId(0), 0);
            let to = keys::queue(priority, self.globals.clock_ns.saturating_add(1), VolumeId(0), 0);
            !self.kv.scan(&from, &to, 1).is_empty()
        });
        queued
            || any(keys::SWEEP)
            || (any(keys::GARBAGE) && !self.on_hold())
            || any(keys::RETARGET)
            || self.sessions.values().any(|session| matches!(session.state, SessionState::Freeing { .. }))
    }

    fn clear_sessions(&mut self) {
        let freeing = |(client, session): (&ClientId, &crate::record::Session)| {
            matches!(session.state, SessionState::Freeing { .. }).then_some(*client)
        };
        let clients: Vec<ClientId> = self.sessions.iter().filter_map(freeing).collect();
        let mut budget = SESSION_CLEAR_STEP;
        for client in clients {
            if budget == 0 {
                break;
            }
            budget -= self.session_clear(client, budget).min(budget);
        }
    }

    /// All chunks of a server are to be looked at again, from the first on.
    pub(crate) fn sweep_start(&mut self, cs: CsId) {
        self.put_record(&keys::server(keys::SWEEP, cs), &ChunkId(0));
        self.swept = true;
    }

    /// Looks again at up to `budget` chunks of servers that changed.
    pub(crate) fn run_sweeps(&mut self, mut budget: usize) {
        while budget > 0 {
            let Some((key, value)) = self.kv.scan(&[keys::SWEEP], &[keys::SWEEP + 1], 1).pop() else { return };
            let cs = CsId(u32::from_be_bytes(key[1..5].try_into().expect("four bytes")));
            let after: ChunkId = decode_record(&value);
            let end = keys::after(&keys::server(keys::COPY, cs));
            let copies = self.kv.scan(&keys::copy(cs, ChunkId(after.0 + 1)), &end, budget);
            for (_, place) in &copies {
                let (volume, index) = decode_record(place);
                self.look_again(cs, volume, index);
            }
            match copies.last() {
                Some((last, _)) if copies.len() == budget => {
                    self.put_record(&key, &ChunkId(keys::number(last, 5)));
                }
                _ => self.delete(&key),
            }
            budget -= copies.len();
        }
    }

    fn look_again(&mut self, cs: CsId, volume: VolumeId, index: u64) {
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        let mut new = old.clone();
        if self.servers[&cs].dropped {
            // Its copies are no more. The last current one stays in the record: it is what is missing.
            new.stale.retain(|stale| stale.cs != cs);
            if new.replica(cs).is_some() && !new.is_last_current(cs) {
                new.bump();
                new.take_out(cs, false);
                new.stale.retain(|stale| stale.cs != cs);
            }
        }
        let (state, work) = self.evaluate(&new);
        if new == old && state == old.state && work == old.queued.map(|(priority, _)| priority) {
            // Work that waited for this server need not wait any longer.
            match old.queued {
                Some((priority, due_ns)) if due_ns > self.globals.clock_ns => {
                    new.queued = Some((priority, self.globals.clock_ns));
                }
                _ => return,
            }
        }
        let changed = new.version != old.version;
        self.set_chunk(volume, index, Some(&old), Some(&mut new), changed);
        if changed {
            self.push_volume_map_changed(volume);
        }
    }

    fn run_garbage(&mut self, mut budget: usize) {
        while budget > 0 && !self.on_hold() {
            let Some((key, _)) = self.kv.scan(&[keys::GARBAGE], &[keys::GARBAGE + 1], 1).pop() else { return };
            budget -= self.collect(InodeId(keys::number(&key, 1)), budget).min(budget);
        }
    }

    /// Gives the chunks of a volume the redundancy of its inode, from the first on.
    pub(crate) fn retarget_start(&mut self, inode: InodeId) {
        self.put_record(&keys::one(keys::RETARGET, inode.0), &0u64);
    }

    fn run_retarget(&mut self, mut budget: usize) {
        while budget > 0 {
            let Some((key, value)) = self.kv.scan(&[keys::RETARGET], &[keys::RETARGET + 1], 1).pop() else { return };
            let volume = VolumeId(keys::number(&key, 1));
            let inode: Inode = self.record(&keys::inode(InodeId(volume.0))).expect("a job ends with its inode");
            let end = keys::after(&keys::one(keys::CHUNK, volume.0));
            let chunks = self.kv.scan(&keys::chunk(volume, decode_record(&value)), &end, budget);
            for (key, value) in &chunks {
                let old: Chunk = decode_record(value);
                let mut new = old.clone();
                (new.replicas_normal, new.minimum) = (inode.policy.replicas, inode.policy.minimum);
                if new != old {
                    self.set_chunk(volume, keys::number(key, 9), Some(&old), Some(&mut new), false);
                }
            }
            self.push_map_changed(volume, &inode, None);
            match chunks.last() {
                Some((last, _)) if chunks.len() == budget => self.put_record(&key, &(keys::number(last, 9) + 1)),
                _ => self.delete(&key),
            }
            budget -= chunks.len();
        }
    }

    fn run_queue(&mut self, mut budget: usize) {
        let mut idle_looks = 0;
        for priority in 0..=crate::repair::PRIORITY_TIDY {
            let from = keys::queue(priority, 0, VolumeId(0), 0);
            let to = keys::queue(priority, self.globals.clock_ns.saturating_add(1), VolumeId(0), 0);
            let due = self.kv.scan(&from, &to, budget);
            for (key, _) in &due {
                // With all servers at their limit most of the line stays where it is, and is first in line when one of
                // them has ended a copy; tidying needs no room at a server.
                if priority != crate::repair::PRIORITY_TIDY && !self.any_takes_copies() {
                    if idle_looks == STEP_IDLE_LOOKS {
                        break;
                    }
                    idle_looks += 1;
                }
                self.plan(VolumeId(keys::number(key, 10)), keys::number(key, 18));
                budget -= 1;
            }
        }
    }

    /// True when a server may be ordered to make another copy.
    fn any_takes_copies(&self) -> bool {
        let limit = self.config("mds.wd.rebuilds_per_cs") as u32;
        let takes = |server: &Server| server.standing() == Standing::Good && server.rebuilding < limit;
        self.servers.values().any(takes)
    }

    /// A drained server without copies has left.
    fn finish_drains(&mut self) {
        let draining = |(cs, server): (&CsId, &Server)| (server.draining && !server.dropped).then_some(*cs);
        let draining: Vec<CsId> = self.servers.iter().filter_map(draining).collect();
        for cs in draining {
            let prefix = keys::server(keys::COPY, cs);
            if self.kv.scan(&prefix, &keys::after(&prefix), 1).is_empty() {
                self.servers.get_mut(&cs).expect("listed above").dropped = true;
                let host = self.servers[&cs].location.host_name.clone();
                self.drop_orders(cs);
                self.topology_changed();
                self.event(Severity::Info, "MDS-4011", format!("{cs} on {host} is drained and was removed"));
            }
        }
        // Servers dropped by force keep no orders either, once their copies are out of the sets.
        let swept = |cs: &CsId| self.kv.get(&keys::server(keys::SWEEP, *cs)).is_none();
        let dropped = self.servers.iter().filter(|(_, server)| server.dropped).map(|(cs, _)| *cs);
        let dropped: Vec<CsId> = dropped.filter(swept).collect();
        for cs in dropped {
            self.drop_orders(cs);
        }
    }

    pub(crate) fn drop_orders(&mut self, cs: CsId) {
        let prefix = keys::server(keys::ORDER, cs);
        for (key, value) in self.kv.scan(&prefix, &keys::after(&prefix), STEP_CHUNKS) {
            self.set_order(cs, ChunkId(keys::number(&key, 5)), Some(decode_record(&value)), None);
        }
    }

    /// Stops copying to new servers when too much is offline: a bigger outage is for an operator (D04, D24). A host
    /// that is gone as a whole counts as one host; other offline servers count one by one. Both limits grow with
    /// the cluster: 2 % of the servers, 5 % of the hosts. Zero turns a limit off.
    fn update_brake(&mut self) {
        let mut hosts: BTreeMap<HostId, (u64, u64)> = BTreeMap::new();
        for server in self.servers.values().filter(|server| !server.dropped) {
            let (all, offline) = hosts.entry(server.location.host).or_default();
            *all += 1;
            *offline += u64::from(server.presence == Presence::Offline);
        }
        let servers: u64 = hosts.values().map(|(all, _)| all).sum();
        let whole = hosts.values().filter(|(all, offline)| all == offline).count() as u64;
        let single: u64 = hosts.values().filter(|(all, offline)| all != offline).map(|(_, offline)| offline).sum();
        let exceeded = |key: &str, found: u64, scaled: u64| {
            let limit = self.config(key);
            (limit > 0 && found > limit.max(scaled)).then(|| (limit.max(scaled), found))
        };
        let by_host = exceeded("mds.wd.max_offline_cs_hosts", whole, hosts.len() as u64 / 20).map(|(limit, found)| {
            format!("mds.wd.max_offline_cs_hosts: {found} hosts are offline, {limit} are repaired by itself")
        });
        let by_server = exceeded("mds.wd.max_offline_cs", single, servers / 50).map(|(limit, found)| {
            format!("mds.wd.max_offline_cs: {found} chunk servers of otherwise living hosts are offline, {limit} are repaired by itself")
        });
        let brake = by_host.or(by_server);
        if brake.is_some() != self.globals.brake.is_some() {
            match &brake {
                Some(reason) => {
                    let text = format!("copying to other servers waits for an operator: {reason}");
                    self.event(Severity::Error, "MDS-5020", text);
                }
                None => self.event(Severity::Info, "MDS-5021", "copying to other servers goes on".into()),
            }
        }
        self.globals.brake = brake;
    }

    fn report_repair(&mut self) {
        let counts = self.globals.counts;
        let queued = counts.blocked + counts.urgent + counts.degraded;
        match (self.globals.repairing, queued) {
            (false, 1..) => {
                self.event(Severity::Info, "MDS-5030", format!("replication started, {queued} chunks queued"));
                self.globals.repairing = true;
            }
            (true, 0) if counts.replicating == 0 => {
                self.event(Severity::Info, "MDS-5031", "replication completed".into());
                self.globals.repairing = false;
            }
            _ => {}
        }
    }
}
