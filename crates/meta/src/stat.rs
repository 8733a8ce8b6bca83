//! Summaries: all from sums that are kept as things change; only the few servers are added up.

use crate::kv::Kv;
use crate::placement;
use crate::record::{SessionState, Standing};
use crate::state::Meta;
use cairn_types::{ClusterId, CsId, InodeId};
use cairn_wire::mds::{ChunkCounts, ClusterHealth, ClusterStat, CsInfo, CsState, MdsReply, SessionInfo};
use std::collections::BTreeMap;

impl<K: Kv> Meta<K> {
    /// The chunk servers as callers see them, removed ones included.
    pub fn cs_infos(&self) -> Vec<CsInfo> {
        self.servers.iter().map(|(cs, server)| server.info(*cs)).collect()
    }

    /// The sessions that have not ended.
    pub fn session_infos(&self) -> Vec<SessionInfo> {
        let live = self.sessions.iter().filter(|(_, session)| session.state == SessionState::Live);
        live.map(|(client, session)| SessionInfo {
            client: *client,
            host_name: session.host_name.clone(),
            purpose: session.purpose.clone(),
            leases: session.leases,
        })
        .collect()
    }

    /// The chunk servers, removed ones included.
    pub fn servers(&self) -> impl Iterator<Item = (CsId, CsState)> + '_ {
        self.servers.iter().map(|(cs, server)| (*cs, server.state()))
    }

    /// Id and name of the cluster; none before [`crate::Command::Bootstrap`].
    pub fn identity(&self) -> Option<(ClusterId, &str)> {
        self.globals.identity.as_ref().map(|identity| (identity.cluster, identity.name.as_str()))
    }

    pub(crate) fn topology(&self) -> MdsReply {
        let (mds, cs) = (self.members().collect(), self.cs_infos());
        MdsReply::Topology { revision: self.globals.topology_revision, mds, cs }
    }

    /// Chunks by state.
    ///
    /// Each chunk counts once among offline, blocked, urgent, degraded, standby, overcommitted and healthy, under the
    /// most serious. Beside that, `pending` counts blocked ones in the repair queue, `replicating` those with a
    /// copy being made, `void` those no server has reported yet, and `deleting` copies being removed.
    pub fn chunk_counts(&self) -> ChunkCounts {
        self.globals.counts
    }

    fn health(&self) -> ClusterHealth {
        let counts = &self.globals.counts;
        let ill = |state| matches!(state, CsState::Inactive | CsState::Offline | CsState::Failed);
        if self.globals.brake.is_some() {
            ClusterHealth::Failed
        } else if self.servers.values().any(|server| ill(server.state()))
            || !self.ailing.is_empty()
            || counts.offline + counts.blocked + counts.urgent + counts.degraded + counts.standby > 0
        {
            ClusterHealth::Degraded
        } else {
            ClusterHealth::Healthy
        }
    }

    /// The leader is for the shell to fill in.
    pub(crate) fn stat(&self) -> MdsReply {
        let identity = self.globals.identity.as_ref().expect("checked before dispatch");
        let in_use = self.servers.values().filter(|server| !server.dropped);
        let (capacity, used) = in_use.fold((0u64, 0u64), |(capacity, used), server| {
            (capacity.saturating_add(server.stats.capacity), used.saturating_add(server.stats.used))
        });
        MdsReply::Stat(Box::new(ClusterStat {
            name: identity.name.clone(),
            cluster: identity.cluster,
            health: self.health(),
            capacity,
            used,
            inodes: self.globals.inodes,
            volumes: self.globals.volumes,
            chunks: self.globals.counts,
            mds: self.members().collect(),
            leader: None,
            mds_silent: Vec::new(),
            cs: self.cs_infos(),
            clients: self.session_infos(),
            mds_ill: self.ailing.iter().map(|(mds, condition)| (*mds, *condition)).collect(),
        }))
    }

    /// Space as seen by a user of the root directory's redundancy: copies need different failure domains, so the
    /// largest domain may not count in full.
    pub(crate) fn stat_fs(&self) -> MdsReply {
        let policy = self.inode(InodeId::ROOT).map(|root| root.policy).unwrap_or_default();
        let slots = placement::slots(&self.servers, self.config("mds.alloc.fill_margin"));
        let mut domains: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        let margin = self.config("mds.alloc.fill_margin").min(100);
        for (slot, server) in slots.iter().zip(self.servers.values()) {
            if matches!(server.standing(), Standing::Gone | Standing::Leaving | Standing::SilentLeaving) {
                continue;
            }
            let usable = server.stats.capacity / 100 * (100 - margin);
            let (capacity, free) = domains.entry(slot.domains[policy.domain as usize]).or_default();
            *capacity = capacity.saturating_add(usable);
            *free = free.saturating_add(usable.saturating_sub(server.stats.used));
        }
        let (capacity, free): (Vec<u64>, Vec<u64>) = domains.into_values().unzip();
        let copies = u64::from(policy.replicas);
        let free = placement::allocatable(&free, copies);
        let capacity = placement::allocatable(&capacity, copies).max(free);
        MdsReply::StatFs { capacity, free, inodes: self.globals.inodes }
    }
}
