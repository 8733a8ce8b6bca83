//! After healing: read everything back, wait for full redundancy, compare every copy and every metadata server.

use super::cluster::SimMds;
use super::{Scenario, Verdict, broken};
use crate::checkers::shadow::Invariant;
use crate::world::{NodeIndex, SECOND};
use cairn_client::ClientCore;
use cairn_cs::CsCore;
use cairn_env_sim::SimDisk;
use cairn_store::{ReadData, Store, StoreOptions, StoreOutput, StoreReply, StoreRequest};
use cairn_types::{ChunkId, CsId, InodeId, Instant};
use cairn_wire::mds::{ChunkEntry, MdsReply, MdsRequest, ReplicaRole};
use std::collections::BTreeMap;

/// Virtual time within which redundancy is full again after the last fault (I8).
const CONVERGED_WITHIN: u64 = 900 * SECOND;

impl Scenario {
    pub(super) fn verify(&mut self) -> Verdict {
        self.send_clients_home()?;
        let reader = self.add_load();
        if self.fsx.is_some() {
            self.verify_files(reader)?;
            return self.verify_at_rest(reader);
        }
        for volume in 0..self.volumes.len() {
            self.open(reader, volume);
        }
        self.wait("a fresh client opens every volume", 2 * super::END_WITHIN, |s| s.pending.is_empty())?;
        for volume in 0..self.volumes.len() {
            self.read_all(reader, volume)?;
        }
        if !self.disaster.happened {
            self.look_at_shared_names(reader);
        }
        self.wait("a fresh client reads everything", super::END_WITHIN, |s| s.pending.is_empty())?;
        self.shadow.check().map_err(Box::new)?;
        if !self.disaster.happened {
            self.check_shared_names()?;
        }
        self.confirm_recovery(reader)?;
        self.verify_at_rest(reader)
    }

    fn verify_at_rest(&mut self, reader: usize) -> Verdict {
        self.cluster.world.note(format_args!("everything was read back"));
        self.shut_down(reader)?;
        self.check_converged()?;
        self.check_metadata()?;
        self.check_copies()
    }

    /// Half of the clients go in good order, half vanish and leave their leases behind.
    fn send_clients_home(&mut self) -> Verdict {
        for client in 0..self.cluster.clients.len() {
            let node = self.cluster.clients[client];
            if !self.cluster.is_running(node) {
                continue;
            }
            if (self.seed >> client) & 1 == 0 {
                self.shut_down(client)?;
            } else {
                self.cluster.world.kill(node);
                self.client_died(client)?;
            }
        }
        Ok(())
    }

    fn shut_down(&mut self, client: usize) -> Verdict {
        let node = self.cluster.clients[client];
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| core.shutdown(now, Box::new(|| ()), out));
        self.wait("a client shuts down", 30 * SECOND, |s| {
            s.cluster.world.inspect::<ClientCore, _>(node, |core| core.is_stopped()) == Some(true)
        })?;
        self.cluster.world.kill(node);
        self.client_died(client)
    }

    pub(super) fn leader(&mut self) -> Option<NodeIndex> {
        let nodes: Vec<NodeIndex> = self.cluster.mds.iter().map(|mds| mds.node).collect();
        let leads = |s: &mut Self, node| s.cluster.world.inspect::<SimMds, _>(node, |core| core.is_leader());
        nodes.into_iter().find(|&node| leads(self, node) == Some(true))
    }

    /// Every chunk has all its copies again, and nothing is in the making.
    fn is_converged(&mut self) -> bool {
        let Some(node) = self.leader() else { return false };
        let counts = self.cluster.world.inspect::<SimMds, _>(node, |core| core.meta().chunk_counts());
        counts.is_some_and(|c| c.healthy == c.total && c.replicating == 0 && c.deleting == 0)
    }

    fn check_converged(&mut self) -> Verdict {
        let servers = |s: &Self| s.cluster.cs.iter().filter(|cs| !cs.retired).count();
        let full = |s: &Self| s.plan.volumes.iter().all(|v| usize::from(v.replicas) <= servers(s));
        if !full(self) {
            return Ok(());
        }
        self.await_scrub()?;
        let until = self.now() + CONVERGED_WITHIN;
        loop {
            if !self.run_until(until, Self::is_converged)? {
                let why = format!("redundancy is not full after {} s\n{}", CONVERGED_WITHIN / SECOND, self.situation());
                return Err(broken(Invariant::I8, why));
            }
            // Servers flush and settle by themselves within seconds, and tell of what verifying has just found.
            let settled = self.now() + 3 * SECOND;
            self.run_until(settled, |_| false)?;
            if self.is_converged() {
                break;
            }
        }
        self.cluster.world.note(format_args!("redundancy is full"));
        Ok(())
    }

    /// Where bits rot or disks do wrong, every chunk server verifies all it has: two rounds, as the
    /// present one may be past the place.
    fn await_scrub(&mut self) -> Verdict {
        if !self.may_hold_damage() {
            return Ok(());
        }
        let rounds = |s: &mut Self| -> Vec<u64> {
            let nodes: Vec<NodeIndex> = s.cluster.cs.iter().filter(|cs| !cs.retired).map(|cs| cs.node).collect();
            let count = |node| s.cluster.world.inspect::<CsCore, _>(node, |core| core.scrub_rounds());
            nodes.into_iter().map(count).map(Option::unwrap_or_default).collect()
        };
        let begun = rounds(self);
        self.wait("every chunk server has verified its copies", CONVERGED_WITHIN, |s| {
            rounds(s).iter().zip(&begun).all(|(now, then)| *now >= then + 2)
        })
    }

    /// I11 at rest, and the counts against a full count.
    fn check_metadata(&mut self) -> Verdict {
        let alive = self.cluster.mds.iter().filter(|mds| !mds.retired);
        let nodes: Vec<NodeIndex> = alive.map(|mds| mds.node).collect();
        let states = |s: &mut Self| -> Vec<(u64, u64)> {
            let state = |core: &mut SimMds| (core.applied(), core.meta().state_hash());
            nodes.iter().filter_map(|&node| s.cluster.world.inspect::<SimMds, _>(node, state)).collect()
        };
        let count = nodes.len();
        self.wait("metadata servers reach the same index", 60 * SECOND, |s| {
            let states = states(s);
            states.len() == count && states.iter().all(|state| state.0 == states[0].0)
        })?;
        let states = states(self);
        if states.iter().any(|state| state != &states[0]) {
            return Err(broken(Invariant::I11, format!("(applied, digest) at rest: {states:x?}")));
        }
        // What came by snapshots and what was replayed are one state, and every sum and index in it is right.
        let whole = |s: &mut Self, node| {
            let look = |core: &mut SimMds| {
                core.meta().check();
                (core.applied(), core.meta().full_hash())
            };
            s.cluster.world.inspect::<SimMds, _>(node, look)
        };
        let wholes: Vec<_> = nodes.iter().map(|&node| whole(self, node)).collect();
        if wholes.iter().any(|one| *one != wholes[0]) {
            return Err(broken(Invariant::I11, format!("(applied, hash of all records) at rest: {wholes:x?}")));
        }
        let entries = self.map_entries(nodes[0]);
        let leader = self.leader().unwrap_or(nodes[0]);
        let counts = self.cluster.world.inspect::<SimMds, _>(leader, |core| core.meta().chunk_counts());
        let counted = entries.len() as u64;
        if counts.is_none_or(|counts| counts.total != counted) {
            return Err(broken(Invariant::Accounting, format!("{counted} chunks in the maps, counted {counts:?}")));
        }
        let files: Vec<Vec<u8>> = self.files().map(|name| name.as_bytes().to_vec()).collect();
        // Without a backup names are gone, and with one they are those of its moment.
        for name in files.into_iter().filter(|_| !self.disaster.happened) {
            let request = MdsRequest::Lookup { parent: InodeId::ROOT, name: name.clone() };
            let found = self.cluster.world.inspect::<SimMds, _>(leader, |core| core.meta().query(&request));
            if !matches!(found, Some(Ok(_))) {
                let name = String::from_utf8_lossy(&name);
                return Err(broken(Invariant::I18, format!("{name} was created and is gone: {found:?}")));
            }
        }
        Ok(())
    }

    fn map_entries(&mut self, node: NodeIndex) -> Vec<ChunkEntry> {
        let mut all = Vec::new();
        for volume in &self.volumes {
            let request = MdsRequest::ChunkMap { volume: volume.info.volume, index: 0, limit: 64 };
            let answer = self.cluster.world.inspect::<SimMds, _>(node, |core| core.meta().query(&request));
            if let Some(Ok(MdsReply::Chunks(entries))) = answer {
                all.extend(entries);
            }
        }
        all
    }

    /// I8: after a stop every store opens, and all current copies of every chunk are alike, block by block.
    fn check_copies(&mut self) -> Verdict {
        let Some(leader) = self.leader() else { return Ok(()) };
        let entries = self.map_entries(leader);
        let mut stores: BTreeMap<CsId, OpenStore> = BTreeMap::new();
        for index in 0..self.cluster.cs.len() {
            let node = self.cluster.cs[index].node;
            self.cluster.world.kill(node);
            if self.cluster.cs[index].retired {
                continue;
            }
            let (options, Some(id)) = (self.cluster.store_options(index), self.cluster.cs[index].id) else { continue };
            let disk = self.cluster.world.nodes[node.0].disks[0].clone();
            let store = OpenStore::open(disk, options).map_err(|why| broken(Invariant::I8, format!("{id}: {why}")))?;
            stores.insert(id, store);
        }
        for entry in entries {
            let mut first: Option<(CsId, ReadData)> = None;
            for replica in entry.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current) {
                let Some(store) = stores.get_mut(&replica.cs) else { continue };
                let data = store
                    .read_chunk(entry.chunk)
                    .map_err(|why| broken(Invariant::I8, format!("{}: {why}", replica.cs)))?;
                match (&first, data) {
                    (None, data) => first = data.map(|data| (replica.cs, data)),
                    (Some((other, expected)), Some(data)) if data.checksums != expected.checksums => {
                        let at = data.checksums.iter().zip(&expected.checksums).position(|(a, b)| a != b);
                        let detail =
                            format!("{} differs between {other} and {} at block {at:?}", entry.chunk, replica.cs);
                        return Err(broken(Invariant::I8, detail));
                    }
                    (Some((other, expected)), None) if expected.mapped.iter().any(|mapped| *mapped) => {
                        let detail = format!("{} is on {other} and missing on {}", entry.chunk, replica.cs);
                        return Err(broken(Invariant::I8, detail));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What a reader of a failure wants to know about the cluster.
    pub(super) fn situation(&mut self) -> String {
        let mut lines = Vec::new();
        for index in 0..self.cluster.mds.len() {
            let node = self.cluster.mds[index].node;
            let line = self.cluster.world.inspect::<SimMds, _>(node, |core| {
                let (counts, status) = (core.meta().chunk_counts(), core.consensus().status());
                let sessions: Vec<_> = core.meta().sessions().collect();
                let servers: Vec<_> = core.meta().servers().collect();
                format!(
                    "leads {}, term {}, applied {}, {counts:?}, sessions {sessions:?}, servers {servers:?}",
                    core.is_leader(),
                    status.term,
                    core.applied()
                )
            });
            lines.push(format!("MDS {index}: {}", line.unwrap_or_else(|| "down".to_owned())));
        }
        for index in 0..self.cluster.cs.len() {
            let (node, id) = (self.cluster.cs[index].node, self.cluster.cs[index].id);
            let line = self.cluster.world.inspect::<CsCore, _>(node, |core| {
                let store = core.store();
                let chunks: Vec<_> = store
                    .chunks()
                    .map(|(chunk, info)| {
                        let mark = if core.is_rebuilding(chunk) { "~" } else { "" };
                        format!("{}@{}{mark}", chunk.0, info.version.0)
                    })
                    .collect();
                format!("failed {:?}, tail {}, chunks {}", core.failed(), store.stats().tail_entries, chunks.join(" "))
            });
            lines.push(format!("CS {index} {id:?}: {}", line.unwrap_or_else(|| "down".to_owned())));
        }
        if let Some(leader) = self.leader() {
            for entry in self.map_entries(leader) {
                lines.push(format!("{} {} min {}: {:?}", entry.chunk, entry.version, entry.minimum, entry.replicas));
            }
        }
        for (index, node) in self.cluster.clients.clone().into_iter().enumerate() {
            let waits = self.cluster.world.inspect::<ClientCore, _>(node, |core| core.explain());
            lines.extend(waits.unwrap_or_default().into_iter().map(|line| format!("client {index}: {line}")));
        }
        lines.join("\n")
    }
}

/// A store opened over a copy of a disk, with no process around it.
struct OpenStore {
    store: Store,
    disk: SimDisk,
    next_token: u64,
}

impl OpenStore {
    fn open(disk: SimDisk, options: StoreOptions) -> Result<Self, String> {
        let mut out = StoreOutput::default();
        let mut this = Self { store: Store::new(disk.size(), options), disk, next_token: 0 };
        this.store.start(Instant(0), &mut out);
        while out.opened.is_none() {
            if !this.pump(&mut out) {
                return Err("the store waits for nothing while it opens".to_owned());
            }
        }
        match out.opened.expect("just seen") {
            Ok(_) => Ok(this),
            Err(error) => Err(format!("the store does not open after a kill: {error}")),
        }
    }

    /// Carries out disk requests; false when there was none.
    fn pump(&mut self, out: &mut StoreOutput) -> bool {
        let requests = std::mem::take(&mut out.disk);
        let some = !requests.is_empty();
        for request in requests {
            let io = request.io;
            self.disk.submit(request);
            if let Some(done) = self.disk.complete(io) {
                self.store.disk_done(Instant(0), done, out);
            }
        }
        self.store.turn(Instant(0), out);
        some || !out.disk.is_empty()
    }

    /// All blocks of a chunk; none when it is not here.
    fn read_chunk(&mut self, chunk: ChunkId) -> Result<Option<ReadData>, String> {
        let Some(count) = self.store.chunk(chunk).map(|info| info.block_count) else { return Ok(None) };
        let mut all = ReadData { data: Vec::new(), checksums: Vec::new(), mapped: Vec::new() };
        for first_block in (0..count).step_by(cairn_store::REQUEST_BLOCKS_MAX as usize) {
            let block_count = cairn_store::REQUEST_BLOCKS_MAX.min(count - first_block);
            let mut out = StoreOutput::default();
            self.next_token += 1;
            let request = StoreRequest::Read { chunk, first_block, block_count };
            self.store.submit(Instant(0), self.next_token, request, &mut out);
            while out.done.is_empty() && self.pump(&mut out) {}
            match out.done.pop() {
                Some((_, Ok(StoreReply::Data(part)))) => {
                    all.checksums.extend(part.checksums);
                    all.mapped.extend(part.mapped);
                }
                other => return Err(format!("{chunk} cannot be read: {other:?}")),
            }
        }
        Ok(Some(all))
    }
}
