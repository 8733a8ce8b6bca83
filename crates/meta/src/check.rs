//! The whole state held against itself: every sum and index is counted again. For tests and the simulator.

use crate::kv::Kv;
use crate::record::{Chunk, Dentry, Inode, Order, OrderKindRecord, SessionState};
use crate::state::{Meta, decode_record};
use crate::{chunks, keys};
use cairn_types::{ChunkId, ClientId, CsId, InodeId, VolumeId};
use cairn_wire::mds::{ChunkCounts, InodeKind, ReplicaRole};
use std::collections::{BTreeMap, BTreeSet};

impl<K: Kv> Meta<K> {
    fn table(&self, table: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.kv.scan(&[table], &[table + 1], usize::MAX)
    }

    /// Counts everything again and compares. Reads the whole state.
    ///
    /// # Panics
    /// When a sum, an index or a link count is not what the records say.
    pub fn check(&self) {
        let mut inodes: BTreeMap<InodeId, Inode> = BTreeMap::new();
        for (key, value) in self.table(keys::INODE) {
            inodes.insert(InodeId(keys::number(&key, 1)), decode_record(&value));
        }
        self.check_tree(&inodes);
        self.check_leases(&inodes);
        self.check_chunks(&inodes);
    }

    fn check_tree(&self, inodes: &BTreeMap<InodeId, Inode>) {
        let mut names: BTreeMap<InodeId, u32> = BTreeMap::from([(InodeId::ROOT, 1)]);
        let mut entries: BTreeMap<InodeId, (u64, u32)> = BTreeMap::new();
        for (key, value) in self.table(keys::DENTRY) {
            let (parent, entry) = (InodeId(keys::number(&key, 1)), decode_record::<Dentry>(&value));
            let inode = inodes.get(&entry.inode).expect("an entry leads to an inode");
            assert_eq!(inode.kind, entry.kind, "{} has two kinds", entry.inode);
            *names.entry(entry.inode).or_default() += 1;
            let (all, directories) = entries.entry(parent).or_default();
            *all += 1;
            if entry.kind == InodeKind::Directory {
                assert_eq!(inode.parent, parent, "parent of {}", entry.inode);
                *directories += 1;
            }
        }
        let (mut in_tree, mut volumes) = (0, 0);
        for (id, inode) in inodes {
            let garbage = self.kv.get(&keys::one(keys::GARBAGE, id.0)).is_some();
            match inode.kind {
                InodeKind::Volume => volumes += u64::from(!garbage),
                _ => in_tree += u64::from(!garbage),
            }
            let found = names.get(id).copied().unwrap_or(0);
            let (all, directories) = entries.get(id).copied().unwrap_or_default();
            match inode.kind {
                InodeKind::Directory => {
                    assert_eq!(inode.size, all, "entries of {id}");
                    let expected = if found == 0 { 0 } else { 2 + directories };
                    assert_eq!(inode.nlink, expected, "links of directory {id}");
                }
                InodeKind::Volume => {}
                _ => assert_eq!(inode.nlink, found, "links of {id}"),
            }
            assert!(inode.kind == InodeKind::Directory || all == 0, "{id} is no directory and has entries");
            let freeable = inode.is_gone();
            assert!(!freeable || garbage, "{id} is gone and not being freed");
        }
        assert_eq!(in_tree, self.globals.inodes, "I8: inodes");
        assert_eq!(volumes, self.globals.volumes, "I8: volumes");
        let named = self.table(keys::NAME).len() as u64;
        let with_names = inodes.values().filter(|inode| inode.kind == InodeKind::Volume && inode.nlink > 0).count();
        assert_eq!(named, with_names as u64, "names of volumes");
    }

    fn check_leases(&self, inodes: &BTreeMap<InodeId, Inode>) {
        let mut held: BTreeSet<(ClientId, VolumeId)> = BTreeSet::new();
        for (key, _) in self.table(keys::LEASE) {
            held.insert((ClientId(keys::number(&key, 1)), VolumeId(keys::number(&key, 9))));
        }
        let mut handles: BTreeMap<InodeId, u32> = BTreeMap::new();
        for (key, value) in self.table(keys::HANDLE) {
            let (inode, client) = (InodeId(keys::number(&key, 1)), keys::number(&key, 9));
            *handles.entry(inode).or_default() += decode_record::<u32>(&value);
            assert!(self.kv.get(&keys::two(keys::HANDLE_OF, client, inode.0)).is_some(), "handle of {inode}");
        }
        let mut leases: BTreeMap<ClientId, u64> = BTreeMap::new();
        for (id, inode) in inodes {
            let lease = &inode.lease;
            assert!(lease.exclusive.is_none() || lease.shared.is_empty(), "I6: {id} is held exclusively and shared");
            assert_eq!(inode.handles, handles.remove(id).unwrap_or(0), "handles of {id}");
            for holder in lease.holders() {
                let client = self.sessions.get(&holder).expect("a holder is a session until it is cleared away");
                if !matches!(client.state, SessionState::Freeing { .. }) {
                    assert!(
                        held.contains(&(holder, VolumeId::of_inode(*id))),
                        "{holder} does not know its lease of {id}"
                    );
                    *leases.entry(holder).or_default() += 1;
                }
            }
        }
        assert!(handles.is_empty(), "handles of inodes that are not: {handles:?}");
        for (client, session) in &self.sessions {
            if !matches!(session.state, SessionState::Freeing { .. }) {
                assert_eq!(session.leases, leases.get(client).copied().unwrap_or(0), "leases of {client}");
            }
        }
    }

    fn check_chunks(&self, inodes: &BTreeMap<InodeId, Inode>) {
        let sweeping = !self.table(keys::SWEEP).is_empty();
        let mut counts = ChunkCounts::default();
        let mut of_volume: BTreeMap<InodeId, u64> = BTreeMap::new();
        let (mut replicas, mut copies, mut queue) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (key, value) in self.table(keys::CHUNK) {
            let (volume, index) = (VolumeId(keys::number(&key, 1)), keys::number(&key, 9));
            let chunk: Chunk = decode_record(&value);
            if !sweeping {
                let (state, work) = self.evaluate(&chunk);
                assert_eq!(state, chunk.state, "I8: state of {}: {chunk:?}", chunk.id);
                assert_eq!(work, chunk.queued.map(|(priority, _)| priority), "work for {}: {chunk:?}", chunk.id);
            }
            chunks::tally(&mut counts, &chunk, true);
            *of_volume.entry(InodeId(volume.0)).or_default() += 1;
            replicas.extend(chunk.replicas.iter().map(|replica| keys::replica(replica.cs, volume, index).to_vec()));
            copies.extend(chunk.servers().map(|cs| keys::copy(cs, chunk.id).to_vec()));
            queue.extend(chunk.queued.map(|(priority, due)| keys::queue(priority, due, volume, index).to_vec()));
            for replica in &chunk.replicas {
                let order: Option<Order> = self.record(&keys::order(replica.cs, chunk.id));
                let rebuild = order.is_some_and(|order| order.kind == OrderKindRecord::Rebuild);
                assert_eq!(
                    rebuild,
                    replica.role == ReplicaRole::Rebuilding,
                    "order for {} on {}",
                    chunk.id,
                    replica.cs
                );
            }
        }
        let (mut deleting, mut rebuilding) = (0, BTreeMap::<CsId, u32>::new());
        for (key, value) in self.table(keys::ORDER) {
            let cs = CsId(u32::from_be_bytes(key[1..5].try_into().expect("four bytes")));
            match decode_record::<Order>(&value).kind {
                OrderKindRecord::Delete => deleting += 1,
                OrderKindRecord::Rebuild => *rebuilding.entry(cs).or_default() += 1,
                OrderKindRecord::Raise => {
                    assert!(self.place(cs, ChunkId(keys::number(&key, 5))).is_some(), "a raise order without a copy");
                }
            }
        }
        counts.deleting = deleting;
        assert_eq!(counts, self.globals.counts, "I8: chunks by state");
        for (cs, server) in &self.servers {
            assert_eq!(server.rebuilding, rebuilding.get(cs).copied().unwrap_or(0), "rebuild orders of {cs}");
        }
        let keys_of = |table: u8| -> BTreeSet<Vec<u8>> { self.table(table).into_iter().map(|(key, _)| key).collect() };
        assert_eq!(replicas, keys_of(keys::REPLICA), "replicas by server");
        assert_eq!(copies, keys_of(keys::COPY), "copies by server");
        assert_eq!(queue, keys_of(keys::QUEUE), "repair queue");
        for (id, inode) in inodes {
            assert_eq!(inode.chunks, of_volume.remove(id).unwrap_or(0), "chunks of {id}");
        }
        assert!(of_volume.is_empty(), "chunks of volumes that are not: {of_volume:?}");
    }
}
