//! Leases: one exclusive holder or any number of shared ones per volume, told apart by epochs.
//!
//! An exclusive grant always takes a fresh epoch. Shared holders share one, the first of them taking a fresh one, so
//! that a further reader does not fence the others. A volume that was not released cleanly has tails to reconcile,
//! which needs writing: whoever comes first gets it exclusively, even when only a shared lease was asked for.

use crate::command::{Answer, Recipient};
use crate::keys;
use crate::kv::Kv;
use crate::record::{Chunk, Inode, Lease, SessionState};
use crate::state::{Meta, decode_record, errno, posix};
use cairn_stdx::planted;
use cairn_types::{ClientId, CsId, Epoch, InodeId, VolumeId};
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsError, MdsReply, Push, SessionKind};
use std::collections::BTreeSet;

impl<K: Kv> Meta<K> {
    /// The inode behind a volume.
    pub(crate) fn volume_inode(&self, volume: VolumeId) -> Result<Inode, MdsError> {
        let inode = self.inode(InodeId(volume.0)).ok().filter(Inode::has_content);
        inode.ok_or_else(|| MdsError::NotFound(volume.to_string()))
    }

    /// Takes void holders out of a lease; true when it changed.
    pub(crate) fn lease_settle(&self, lease: &mut Lease) -> bool {
        // None: still holds. Some(clean): void.
        let void = |client: &ClientId| match self.sessions.get(client).map(|session| session.state) {
            Some(SessionState::Live | SessionState::Ended) => None,
            Some(SessionState::Freeing { clean }) => Some(clean),
            None => Some(false),
        };
        let mut changed = false;
        if let Some(clean) = lease.exclusive.as_ref().and_then(void) {
            lease.exclusive = None;
            lease.unclean &= !clean;
            changed = true;
        }
        let shared = lease.shared.len();
        lease.shared.retain(|client| void(client).is_none());
        changed || lease.shared.len() != shared
    }

    pub(crate) fn lease_acquire(&mut self, client: ClientId, volume: VolumeId, mode: LeaseMode) -> Answer {
        let mut inode = self.volume_inode(volume)?;
        if self.sessions.get(&client).is_none_or(|session| session.kind != SessionKind::Client) {
            return Err(MdsError::Refused("only client sessions hold leases".into()));
        }
        self.lease_settle(&mut inode.lease);
        let others: Vec<ClientId> = match mode {
            LeaseMode::Exclusive => inode.lease.holders().filter(|holder| *holder != client).collect(),
            LeaseMode::Shared => inode.lease.exclusive.filter(|holder| *holder != client).into_iter().collect(),
        };
        if let Some(&holder) = others.first() {
            for other in others {
                self.push(Recipient::Session(other), Push::LeaseRecall { volume, wanted: mode });
            }
            return Err(MdsError::Held { volume, holder, alive: self.session_alive(holder) });
        }
        let grant = self.lease_grant(client, volume, &mut inode, mode);
        self.put_inode(InodeId(volume.0), &inode);
        Ok(MdsReply::Lease(grant))
    }

    /// Grants what nobody else holds. The caller writes the inode.
    pub(crate) fn lease_grant(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        inode: &mut Inode,
        mode: LeaseMode,
    ) -> LeaseGrant {
        let lease = &mut inode.lease;
        let held = lease.holders().any(|holder| holder == client);
        // A holder that asks again gave up what it had: its old epoch is fenced like anybody's.
        let clean = !lease.unclean;
        let mode = if clean { mode } else { LeaseMode::Exclusive };
        let joins = mode == LeaseMode::Shared && lease.exclusive.is_none() && !lease.shared.is_empty();
        if !(joins || (planted!("epoch_not_raised_on_regrant") && lease.epoch > Epoch(0))) {
            lease.epoch = Epoch(lease.epoch.0 + 1);
        }
        lease.exclusive = None;
        lease.shared.retain(|holder| *holder != client);
        match mode {
            LeaseMode::Exclusive => {
                assert!(lease.shared.is_empty(), "I6: {volume} granted exclusively beside shared holders");
                lease.exclusive = Some(client);
                lease.unclean = true;
            }
            LeaseMode::Shared => lease.shared.push(client),
        }
        let epoch = lease.epoch;
        if !held {
            self.put(&keys::lease(client, volume), Vec::new());
            self.count_lease(client, 1);
        }
        let servers = self.volume_servers(volume, inode);
        LeaseGrant {
            volume,
            epoch,
            mode,
            size: inode.size,
            chunk_size: inode.policy.chunk_size(),
            redundancy: inode.policy.redundancy(),
            clean,
            servers,
        }
    }

    fn count_lease(&mut self, client: ClientId, delta: i64) {
        if let Some(session) = self.sessions.get_mut(&client) {
            session.leases = session.leases.checked_add_signed(delta).expect("leases of a session are counted");
            session.dirty = true;
        }
    }

    /// Servers with replicas of a volume: from its map when that is short, else by asking for each server.
    fn volume_servers(&self, volume: VolumeId, inode: &Inode) -> Vec<CsId> {
        if inode.chunks == 0 {
            return Vec::new();
        }
        if inode.chunks <= 4 * self.servers.len() as u64 {
            let prefix = keys::one(keys::CHUNK, volume.0);
            let chunks = self.kv.scan(&prefix, &keys::after(&prefix), usize::MAX);
            let servers: BTreeSet<CsId> = chunks
                .iter()
                .flat_map(|(_, value)| decode_record::<Chunk>(value).replicas)
                .map(|replica| replica.cs)
                .collect();
            return servers.into_iter().collect();
        }
        let has_replica = |cs: &CsId| {
            let (from, to) = (keys::replica(*cs, volume, 0), keys::replica(*cs, VolumeId(volume.0 + 1), 0));
            !self.kv.scan(&from, &to, 1).is_empty()
        };
        self.servers.keys().copied().filter(has_replica).collect()
    }

    pub(crate) fn lease_release(&mut self, client: ClientId, leases: &[(VolumeId, Epoch, bool)]) -> Answer {
        for &(volume, epoch, clean) in leases {
            let Ok(mut inode) = self.volume_inode(volume) else { continue };
            let lease = &mut inode.lease;
            if lease.epoch != epoch || !lease.holders().any(|holder| holder == client) {
                continue;
            }
            if lease.exclusive == Some(client) {
                lease.exclusive = None;
                lease.unclean = !clean;
            }
            lease.shared.retain(|holder| *holder != client);
            self.put_inode(InodeId(volume.0), &inode);
            self.delete(&keys::lease(client, volume));
            self.count_lease(client, -1);
            self.free_if_orphan(InodeId(volume.0), inode);
        }
        Ok(MdsReply::Done)
    }

    /// The inode of a volume on which the caller holds a lease of this epoch.
    ///
    /// # Errors
    /// [`MdsError::StaleEpoch`] when it does not.
    pub(crate) fn held_inode(
        &self,
        client: ClientId,
        volume: VolumeId,
        epoch: Epoch,
        exclusive: bool,
    ) -> Result<Inode, MdsError> {
        let inode = self.volume_inode(volume)?;
        let lease = &inode.lease;
        let holds = lease.exclusive == Some(client) || (!exclusive && lease.shared.contains(&client));
        if !holds || lease.epoch != epoch {
            return Err(MdsError::StaleEpoch { volume, current: lease.epoch });
        }
        Ok(inode)
    }

    /// Refuses with [`MdsError::Held`] while somebody else than `client` holds any lease, and asks for it back.
    pub(crate) fn refuse_if_held(
        &mut self,
        client: Option<ClientId>,
        volume: VolumeId,
        lease: &Lease,
    ) -> Result<(), MdsError> {
        let mut lease = lease.clone();
        self.lease_settle(&mut lease);
        let others: Vec<ClientId> = lease.holders().filter(|holder| Some(*holder) != client).collect();
        let Some(&holder) = others.first() else { return Ok(()) };
        for other in others {
            self.push(Recipient::Session(other), Push::LeaseRecall { volume, wanted: LeaseMode::Exclusive });
        }
        Err(MdsError::Held { volume, holder, alive: self.session_alive(holder) })
    }

    /// Errno for inodes that have no content.
    pub(crate) fn content_errno(inode: &Inode) -> MdsError {
        posix(if inode.kind == cairn_wire::mds::InodeKind::Directory { errno::EISDIR } else { errno::EINVAL })
    }
}
