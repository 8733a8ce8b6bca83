//! Chunk servers: joining, heartbeats, reports of copies, silence, removal.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::placement::{self, Slot, TIER_MAX};
use crate::record::{Chunk, OrderKindRecord, Presence, Server, Standing};
use crate::state::{Meta, short};
use cairn_stdx::planted;
use cairn_types::{ChunkId, CsId, format_size};
use cairn_wire::mds::{
    ChunkReport, CsProfile, CsState, CsStats, Lineage, Location, MdsError, MdsReply, OrderDone, OrderKind, ReplicaRole,
    Severity,
};
use std::collections::BTreeMap;

/// Most orders in the answer of one heartbeat.
pub const ORDERS_MAX: usize = 256;
/// Most copies in one piece of a report.
pub const REPORT_MAX: usize = 65536;

/// Longest host name, place or directory of a chunk server, in bytes.
const TEXT_MAX: usize = 4096;

/// The fields of a heartbeat.
pub(crate) struct Heartbeat {
    pub boot: u64,
    pub stats: CsStats,
    pub done: Vec<OrderDone>,
    pub damaged: Vec<(ChunkId, u32)>,
    pub failed: Option<String>,
}

impl<K: Kv> Meta<K> {
    /// What placement sees, from the cache.
    pub(crate) fn slots(&mut self) -> &[Slot] {
        if self.slots.is_none() {
            self.slots = Some(placement::slots(&self.servers, self.config("mds.alloc.fill_margin")));
        }
        self.slots.as_deref().expect("just filled")
    }

    /// A chunk server joins or comes back; earlier servers tell no lineage.
    pub(crate) fn cs_register(&mut self, new: CsProfile, lineage: Option<Lineage>) -> Answer {
        if new.tier > TIER_MAX {
            return Err(MdsError::Invalid(format!("tier {} is not 0 to {TIER_MAX}", new.tier)));
        }
        let place = &new.location;
        let texts = [&place.host_name, &place.rack, &place.row, &place.room, &place.site, &new.repository];
        if texts.iter().any(|text| text.len() > TEXT_MAX) {
            return Err(MdsError::Invalid(format!("names and directories have at most {TEXT_MAX} bytes")));
        }
        let by_store = self.servers.iter().find(|(_, server)| server.store == new.store).map(|(cs, _)| *cs);
        let cs = match (new.cs, by_store) {
            (Some(cs), _) if !self.servers.contains_key(&cs) => {
                return Err(MdsError::Refused(format!(
                    "{cs} is not of this cluster; make the store anew to join as a new server"
                )));
            }
            (Some(cs), found) if found != Some(cs) => {
                return Err(MdsError::Refused(format!("{cs} is known with another store; make the store anew")));
            }
            (_, found) => found,
        };
        let known = match cs.and_then(|cs| Some((cs, self.servers.get(&cs)?))) {
            Some((cs, server)) if server.dropped => {
                return Err(MdsError::Refused(format!("{cs} was removed from the cluster; make the store anew")));
            }
            known => known.map(|(cs, server)| (cs, server.clone())),
        };
        let is_new = known.is_none();
        let cs = known.as_ref().map_or(CsId(self.globals.next_cs), |(cs, _)| *cs);
        if let Some(turned_away) = self.judge_lineage(cs, lineage.as_ref())? {
            return Ok(turned_away);
        }
        self.check_host_id(cs, &new.location);
        let mut server = known.map_or_else(
            || Server {
                store: new.store,
                addr: new.addr,
                location: new.location.clone(),
                tier: new.tier,
                repository: String::new(),
                presence: Presence::Active,
                draining: false,
                failed: None,
                dropped: false,
                boot: 0,
                stats: CsStats::default(),
                rebuilding: 0,
                report_floor: ChunkId(0),
                busy: 0,
            },
            |(_, server)| server,
        );
        let was = server.state();
        server.addr = new.addr;
        server.location = new.location;
        server.tier = new.tier;
        server.repository = new.repository;
        server.stats.capacity = new.capacity;
        server.presence = Presence::Active;
        // It could open its store, so the disk works again; what it lost shows in its report.
        server.failed = None;
        let state = server.state();
        if is_new {
            self.globals.next_cs += 1;
            let text = format!(
                "{cs} joined from {} with {} in tier {}",
                server.location.host_name,
                format_size(new.capacity),
                new.tier
            );
            self.event(Severity::Info, "MDS-4001", text);
        }
        self.digest(&cairn_wire::encode(&server));
        self.changed();
        self.servers.insert(cs, server);
        self.topology_changed();
        if !is_new && state != was {
            self.server_state_changed(cs, was);
        }
        let cluster = self.globals.identity.as_ref().expect("checked before dispatch").cluster;
        Ok(MdsReply::CsRegistered { cs, cluster })
    }

    /// Cloned machines share a host id; then copies that should be on different hosts are not placed at all.
    fn check_host_id(&mut self, cs: CsId, location: &Location) {
        let twin = self.servers.iter().find(|(other, server)| {
            **other != cs
                && !server.dropped
                && server.location.host == location.host
                && server.location.host_name != location.host_name
        });
        if let Some((other, server)) = twin {
            let text = format!(
                "{cs} on {} and {other} on {} have the same host id {}: one machine was renamed or cloned; a clone needs \
                 its own host_id file",
                location.host_name, server.location.host_name, location.host
            );
            self.event(Severity::Warning, "MDS-4002", text);
        }
    }

    pub(crate) fn cs_heartbeat(&mut self, cs: CsId, beat: Heartbeat) -> Answer {
        self.known_server(cs)?;
        if let Some(turned_away) = self.judge_start(cs, beat.boot) {
            return Ok(turned_away);
        }
        let server = self.known_server(cs)?;
        let was = server.state();
        let failed_before = server.failed.clone();
        server.boot = beat.boot;
        server.stats = beat.stats;
        server.presence = Presence::Active;
        if let Some(reason) = &beat.failed {
            server.failed = Some(short(reason));
        }
        let failed = server.failed.clone();
        let is = server.state();
        self.slots = None;
        self.changed();
        self.digest(&cairn_wire::encode(&(cs, beat.stats)));
        self.watch_fill(cs);
        if let Some(reason) = failed.filter(|_| failed_before.is_none()) {
            self.event(Severity::Error, "MDS-4003", format!("{cs}: its disk failed: {reason}"));
        }
        if is != was {
            self.topology_changed();
            self.server_state_changed(cs, was);
        }
        for done in beat.done.into_iter().take(REPORT_MAX) {
            self.order_done(cs, &done);
        }
        let mut damaged: BTreeMap<ChunkId, u32> = BTreeMap::new();
        for (chunk, block) in beat.damaged.into_iter().take(REPORT_MAX) {
            damaged.entry(chunk).or_insert(block);
        }
        for (chunk, block) in damaged {
            self.copy_damaged(cs, chunk, block);
        }
        Ok(MdsReply::Orders(self.orders_for(cs, ORDERS_MAX)))
    }

    pub(crate) fn known_server(&mut self, cs: CsId) -> Result<&mut Server, MdsError> {
        match self.servers.get_mut(&cs) {
            None => Err(MdsError::NotFound(cs.to_string())),
            Some(server) if server.dropped => Err(MdsError::Refused(format!("{cs} was removed from the cluster"))),
            Some(server) => Ok(server),
        }
    }

    /// A block of a copy is bad. The copy is replaced, and stays in the set until another one is complete: another copy
    /// may have other bad blocks, and then each is the source of what the other lacks.
    fn copy_damaged(&mut self, cs: CsId, id: ChunkId, block: u32) {
        let Some((volume, index)) = self.place(cs, id) else { return };
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        let Some(role) = old.replica(cs).map(|replica| replica.role) else { return };
        let is_current = role == ReplicaRole::Current;
        if is_current && self.damaged.contains(&(id, cs)) {
            return;
        }
        // Another copy that cannot be reached is no source.
        let others = old.replicas.iter().filter(|r| r.role == ReplicaRole::Current && r.cs != cs);
        let last = !others.map(|r| self.standing(r.cs)).any(|s| matches!(s, Standing::Good | Standing::Leaving));
        let fate = if last { "it is the only current copy in reach and stays" } else { "the copy is replaced" };
        let text = format!("{cs}: block {block} of {id} ({volume}, index {index}) is damaged; {fate}");
        self.event(if last { Severity::Error } else { Severity::Warning }, "MDS-5001", text);
        let mut new = old.clone();
        if planted!("damaged_copy_goes_first") && is_current && !last {
            new.bump();
            new.take_out(cs, !self.on_hold());
        } else if is_current {
            self.damaged.insert((id, cs));
            self.put_record(&keys::damaged(cs, id), &block);
        } else {
            new.bump();
            new.take_out(cs, !self.on_hold());
        }
        let changed = new.version != old.version;
        self.set_chunk(volume, index, Some(&old), Some(&mut new), changed);
        if changed {
            self.push_volume_map_changed(volume);
        }
    }

    pub(crate) fn cs_report(&mut self, cs: CsId, after: ChunkId, chunks: &[ChunkReport], last: bool) -> Answer {
        let floor = self.known_server(cs)?.report_floor;
        let ascending = chunks.windows(2).all(|pair| pair[0].chunk < pair[1].chunk);
        if chunks.len() > REPORT_MAX || !ascending || chunks.first().is_some_and(|first| first.chunk <= after) {
            return Err(MdsError::Invalid(format!(
                "a piece of a report is ascending and has at most {REPORT_MAX} chunks"
            )));
        }
        self.changed();
        let end = if last { ChunkId(u64::MAX) } else { chunks.last().map_or(after, |chunk| chunk.chunk) };
        let mut reported = chunks.iter().peekable();
        let (from, to) = (keys::copy(cs, ChunkId(after.0.saturating_add(1))), keys::after(&keys::copy(cs, end)));
        for (key, value) in self.kv.scan(&from, &to, usize::MAX) {
            let id = ChunkId(keys::number(&key, 5));
            while let Some(orphan) = reported.next_if(|report| report.chunk < id) {
                self.report_orphan(cs, orphan);
            }
            let (volume, index) = crate::state::decode_record(&value);
            let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
            match reported.next_if(|report| report.chunk == id) {
                Some(report) => self.report_copy(cs, report, (volume, index), &old),
                None if id < floor => self.report_missing(cs, (volume, index), &old),
                None => {}
            }
        }
        for orphan in reported {
            self.report_orphan(cs, orphan);
        }
        if last {
            let next_chunk = ChunkId(self.globals.next_chunk);
            self.known_server(cs)?.report_floor = next_chunk;
        }
        Ok(MdsReply::Orders(self.orders_for(cs, ORDERS_MAX)))
    }

    /// A copy we know nothing of: the chunk is gone, or the copy was replaced and forgotten.
    fn report_orphan(&mut self, cs: CsId, report: &ChunkReport) {
        if report.chunk.0 >= self.globals.next_chunk {
            let text = format!(
                "{cs} has {} which this cluster has not allocated yet: the metadata are older than the chunk server; nothing is \
                 deleted",
                report.chunk
            );
            self.event(Severity::Error, "MDS-5002", text);
            return;
        }
        if self.on_hold() {
            return;
        }
        let standing = self.record(&keys::order(cs, report.chunk));
        let order = crate::record::Order {
            kind: OrderKindRecord::Delete,
            volume: cairn_types::VolumeId(0),
            index: 0,
            version: report.version,
        };
        self.set_order(cs, report.chunk, standing, Some(order));
    }

    fn report_copy(&mut self, cs: CsId, report: &ChunkReport, place: (cairn_types::VolumeId, u64), old: &Chunk) {
        let mut new = old.clone();
        new.is_held_by(cs);
        // A current copy below the version with which it joined lost something: it is stale, whatever we thought.
        let lagging = old.replica(cs).is_some_and(|replica| {
            replica.role == cairn_wire::mds::ReplicaRole::Current && report.version < replica.since
        });
        if lagging && !old.is_last_current(cs) {
            new.bump();
            new.take_out(cs, false);
            let text = format!("{cs} has {} at {} and should not be below {}", old.id, report.version, old.version);
            self.event(Severity::Warning, "MDS-5003", text);
        }
        if new != *old {
            let changed = new.version != old.version;
            self.set_chunk(place.0, place.1, Some(old), Some(&mut new), changed);
            if changed {
                self.push_volume_map_changed(place.0);
            }
        }
    }

    /// A copy that should be there and is not.
    fn report_missing(&mut self, cs: CsId, place: (cairn_types::VolumeId, u64), old: &Chunk) {
        let mut new = old.clone();
        match old.replica(cs).map(|replica| replica.role) {
            None => new.stale.retain(|stale| stale.cs != cs),
            Some(cairn_wire::mds::ReplicaRole::Current) if old.holders.contains(&cs) && !old.is_last_current(cs) => {
                new.bump();
                new.take_out(cs, false);
                new.stale.retain(|stale| stale.cs != cs);
                let text = format!("{cs} no longer has its copy of {}; another one is made", old.id);
                self.event(Severity::Warning, "MDS-5004", text);
            }
            Some(_) => return,
        }
        let changed = new.version != old.version;
        self.set_chunk(place.0, place.1, Some(old), Some(&mut new), changed);
        if changed {
            self.push_volume_map_changed(place.0);
        }
    }

    pub(crate) fn cs_silent(&mut self, cs: CsId, offline: bool) {
        let presence = if offline { Presence::Offline } else { Presence::Inactive };
        self.set_presence(cs, presence);
    }

    pub(crate) fn cs_back(&mut self, cs: CsId) {
        self.set_presence(cs, Presence::Active);
    }

    fn set_presence(&mut self, cs: CsId, presence: Presence) {
        let Some(server) = self.servers.get_mut(&cs).filter(|server| !server.dropped && server.presence != presence)
        else {
            return;
        };
        let was = server.state();
        server.presence = presence;
        self.changed();
        self.digest(&cairn_wire::encode(&(cs, presence)));
        self.topology_changed();
        self.server_state_changed(cs, was);
    }

    /// Reports a change of state and looks at the chunks of the server again.
    pub(crate) fn server_state_changed(&mut self, cs: CsId, was: CsState) {
        let server = &self.servers[&cs];
        let (is, host) = (server.state(), server.location.host_name.clone());
        if is == was {
            return;
        }
        let (severity, text) = match is {
            CsState::Active => (Severity::Info, format!("{cs} on {host} is active")),
            CsState::Inactive => (Severity::Warning, format!("{cs} on {host} is silent")),
            CsState::Offline => {
                let timeout = self.config("mds.wd.offline_tout");
                let text =
                    format!("{cs} on {host} has been silent for {timeout} s and is offline; its chunks are copied");
                (Severity::Warning, text)
            }
            CsState::Draining => (Severity::Info, format!("{cs} on {host} is being drained")),
            CsState::Failed => (Severity::Error, format!("{cs} on {host} failed")),
            CsState::Dropped => (Severity::Info, format!("{cs} on {host} was removed")),
        };
        self.event(severity, "MDS-4010", text);
        self.sweep_start(cs);
    }

    pub(crate) fn order_done(&mut self, cs: CsId, done: &OrderDone) {
        let standing: Option<crate::record::Order> = self.record(&keys::order(cs, done.chunk));
        let Some(order) = standing else { return };
        match (order.kind, done.kind) {
            (OrderKindRecord::Delete, OrderKind::Delete) => self.delete_done(cs, done, order),
            (OrderKindRecord::Raise, OrderKind::Raise) => self.raise_done(cs, done, order),
            (OrderKindRecord::Rebuild, OrderKind::Rebuild) => self.rebuild_done(cs, done),
            // The answer to an order that was replaced meanwhile.
            _ => {}
        }
    }
}
