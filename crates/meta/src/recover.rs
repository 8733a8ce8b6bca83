//! The metadata of a cluster made anew from what its chunk servers hold (I21), with or without a backup.
//!
//! [`recover`] is a pure function: listings of chunk servers and perhaps the pairs of an old state go in, the pairs of
//! a new state and a [`Report`] come out. The rules, with their reasons: `docs/design/metadata.md`, "Disaster".
//!
//! - Every number handed out before (epochs, versions, ids) is passed by a margin, so that what a forgotten server or
//!   client still has never looks newer than what is made from now on.
//! - A write that was acknowledged is in every copy of its set, so one complete copy at the highest version found is
//!   enough. Its unsettled writes are reconciled by the first holder: every volume is marked as released uncleanly.
//! - Nothing is thrown away: copies that found no place stay where they are until the operator lifts
//!   `mds.recovery.hold`.

mod report;

pub use report::{FoundCopy, Listing, Options, Problem, RecoverError, RecoveredVolume, Report};

use crate::keys;
use crate::kv::{BaseKv, Kv, MemKv};
use crate::record::{Chunk, ChunkState, Inode, Member, Presence, Server, StaleCopy};
use crate::state::{Meta, decode_record};
use cairn_stdx::planted;
use cairn_types::{
    BLOCK_SIZE_U64, ChunkId, ChunkVersion, ClusterId, CsId, Epoch, InodeId, Level, MdsId, Redundancy, VolumeId,
};
use cairn_wire::mds::{ChunkCounts, CsStats, InodeKind, Location, MdsInfo, Replica, ReplicaRole, Severity};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};

/// The parameter that keeps every copy where it is until the operator has looked at the report.
pub(crate) const HOLD: &str = "mds.recovery.hold";
/// How far ids, epochs and indexes go beyond the highest one found: more than was handed out unseen.
const CHUNK_MARGIN: u64 = 1 << 32;
const INODE_MARGIN: u64 = 1 << 24;
const CLIENT_MARGIN: u64 = 1 << 20;
const EPOCH_MARGIN: u64 = 1 << 20;
const INDEX_MARGIN: u64 = 1 << 20;
const MDS_MARGIN: u64 = 100;

/// A copy and the server that holds it.
type Seen<'a> = (CsId, &'a FoundCopy);
/// Copies by chunk.
type Claims<'a> = BTreeMap<ChunkId, Vec<Seen<'a>>>;
/// Place of a chunk.
type Place = (VolumeId, u64);

/// Makes the metadata of a cluster anew. See the module.
///
/// # Errors
/// [`RecoverError`] when the listings, or listings and backup, cannot be of one cluster.
pub fn recover(
    options: &Options,
    listings: &[Listing],
    backup: Option<MemKv>,
) -> Result<(MemKv, Report), RecoverError> {
    let cluster = check_listings(listings)?;
    let from_backup = backup.is_some();
    let meta = Meta::open_at(backup.unwrap_or_default(), Level::CURRENT);
    if let Some(level) = meta.too_new() {
        return Err(RecoverError::LaterRelease(level));
    }
    let mut recovery = Recovery {
        meta,
        options,
        report: Report { cluster, from_backup, ..Report::default() },
        read: BTreeSet::new(),
        inodes: BTreeMap::new(),
    };
    recovery.identify(cluster)?;
    recovery.forget_the_living();
    let servers = recovery.servers(listings)?;
    recovery.advance_ids(listings);
    recovery.chunks(listings, &servers);
    recovery.finish();
    let Recovery { meta, mut report, .. } = recovery;
    report.problems.sort();
    Ok((meta.into_kv(), report))
}

fn check_listings(listings: &[Listing]) -> Result<ClusterId, RecoverError> {
    let first = listings.first().ok_or(RecoverError::NoServers)?;
    let mut stores: BTreeMap<[u8; 16], &str> = BTreeMap::new();
    let mut ids = BTreeSet::new();
    for listing in listings {
        if listing.cluster != first.cluster {
            let (one, other) = (first.repository.clone(), listing.repository.clone());
            return Err(RecoverError::TwoClusters { one, other });
        }
        if let Some(one) = stores.insert(listing.store, &listing.repository) {
            return Err(RecoverError::Twice { one: one.to_owned(), other: listing.repository.clone() });
        }
        if let Some(cs) = listing.cs.filter(|cs| !ids.insert(*cs)) {
            return Err(RecoverError::TwoStores { cs, repository: listing.repository.clone() });
        }
    }
    Ok(first.cluster)
}

struct Recovery<'a> {
    meta: Meta<MemKv>,
    options: &'a Options,
    report: Report,
    /// Servers whose listing is at hand.
    read: BTreeSet<CsId>,
    /// Everything with content, written back at the end.
    inodes: BTreeMap<InodeId, Inode>,
}

impl Recovery<'_> {
    /// Makes sure of the cluster's identity and of its one metadata server.
    fn identify(&mut self, cluster: ClusterId) -> Result<(), RecoverError> {
        let meta = &mut self.meta;
        meta.globals.wall_ns = self.options.wall_ns;
        let info =
            |mds| MdsInfo { mds, addr: self.options.addr, voter: true, repository: self.options.repository.clone() };
        if !self.report.from_backup {
            let first = info(MdsId(1 + MDS_MARGIN));
            meta.bootstrap(cluster, self.options.name.clone(), first).expect("an empty state takes its first command");
        }
        match &meta.globals.identity {
            Some(identity) if identity.cluster == cluster && identity.name == self.options.name => {}
            other => {
                let backup = other.as_ref().map_or("none at all".to_owned(), |i| format!("{} ({})", i.name, i.cluster));
                return Err(RecoverError::OtherBackup { backup, servers: cluster });
            }
        }
        if self.report.from_backup {
            let mds = MdsId(meta.globals.next_mds + MDS_MARGIN);
            meta.globals.next_mds = mds.0 + 1;
            let member = Member { info: info(mds), nonce: 0, leaving: false };
            meta.globals.members = BTreeMap::from([(mds, member)]);
        }
        meta.globals.applied += INDEX_MARGIN;
        self.report.mds = *meta.globals.members.keys().next().expect("one was put in");
        self.report.index = meta.globals.applied;
        Ok(())
    }

    fn scan(&self, table: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.meta.kv.scan(&[table], &[table + 1], usize::MAX)
    }

    fn clear(&mut self, table: u8) {
        for (key, _) in self.scan(table) {
            self.meta.kv.delete(&key);
        }
    }

    /// Sessions, handles, leases, orders and the repair queue are of processes that are no more; the starts of chunk
    /// servers that the old state knew are behind those their stores know; damage is found again.
    fn forget_the_living(&mut self) {
        use keys::{COPY, DAMAGED, HANDLE, HANDLE_OF, LEASE, LINEAGE, ORDER, QUEUE, REPLICA, SESSION, SWEEP};
        for table in [COPY, DAMAGED, HANDLE, HANDLE_OF, LEASE, LINEAGE, ORDER, QUEUE, REPLICA, SESSION, SWEEP] {
            self.clear(table);
        }
        self.meta.sessions.clear();
        self.meta.damaged.clear();
        self.meta.globals.counts = ChunkCounts::default();
        self.meta.globals.brake = None;
        self.meta.globals.repairing = false;
        for (key, value) in self.scan(keys::INODE) {
            let mut inode: Inode = decode_record(&value);
            if !inode.has_content() && inode.handles == 0 {
                continue;
            }
            inode.handles = 0;
            inode.chunks = 0;
            inode.lease.exclusive = None;
            inode.lease.shared.clear();
            self.inodes.insert(InodeId(keys::number(&key, 1)), inode);
        }
    }

    /// Puts the chunk servers in; returns the id of each listing, none for those left out.
    fn servers(&mut self, listings: &[Listing]) -> Result<Vec<Option<CsId>>, RecoverError> {
        let globals = &mut self.meta.globals;
        let mentioned = listings.iter().flat_map(|listing| listing.cs.iter().chain(&listing.mentioned));
        let highest = mentioned.clone().max().map_or(0, |cs| cs.0.saturating_add(1));
        globals.next_cs = globals.next_cs.max(highest);
        for server in self.meta.servers.values_mut() {
            server.presence = Presence::Inactive;
            server.rebuilding = 0;
            server.boot = 0;
            server.report_floor = ChunkId(0);
        }
        let mut ids = Vec::with_capacity(listings.len());
        for listing in listings {
            ids.push(self.server(listing)?);
        }
        let mut missing: BTreeMap<CsId, String> = BTreeMap::new();
        for cs in mentioned.filter(|cs| !self.meta.servers.contains_key(cs)) {
            missing.insert(*cs, String::new());
        }
        for (cs, server) in self.meta.servers.iter().filter(|(_, server)| !server.dropped) {
            if !self.read.contains(cs) {
                missing.insert(*cs, server.repository.clone());
            }
        }
        let problem = |(server, repository)| Problem::ServerNotGiven { server, repository };
        self.report.problems.extend(missing.into_iter().map(problem));
        Ok(ids)
    }

    fn server(&mut self, listing: &Listing) -> Result<Option<CsId>, RecoverError> {
        let known = self.meta.servers.iter().find(|(_, server)| server.store == listing.store).map(|(cs, _)| *cs);
        let cs = match (known, listing.cs) {
            (Some(known), _) => known,
            (None, Some(cs)) if self.meta.servers.contains_key(&cs) => {
                return Err(RecoverError::TwoStores { cs, repository: listing.repository.clone() });
            }
            (None, Some(cs)) => cs,
            (None, None) => {
                let cs = CsId(self.meta.globals.next_cs);
                self.meta.globals.next_cs += 1;
                cs
            }
        };
        let stats = CsStats {
            capacity: listing.capacity,
            used: listing.used,
            chunks: listing.copies.len() as u64,
            ..CsStats::default()
        };
        let server = self.meta.servers.entry(cs).or_insert_with(|| Server {
            store: listing.store,
            // Nobody is reached there: the server says where it is when it registers.
            addr: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            location: Location {
                host: listing.host,
                host_name: String::new(),
                rack: String::new(),
                row: String::new(),
                room: String::new(),
                site: String::new(),
            },
            tier: listing.tier,
            repository: listing.repository.clone(),
            presence: Presence::Inactive,
            draining: false,
            failed: None,
            dropped: false,
            boot: 0,
            stats,
            rebuilding: 0,
            report_floor: ChunkId(0),
            busy: 0,
        });
        if server.dropped {
            self.report.problems.push(Problem::ServerRemoved { server: cs });
            return Ok(None);
        }
        server.stats = stats;
        self.read.insert(cs);
        self.report.servers.push((cs, listing.repository.clone(), listing.copies.len() as u64));
        Ok(Some(cs))
    }

    /// No id that was given out before is given out again, whether or not it was found.
    fn advance_ids(&mut self, listings: &[Listing]) {
        let copies = || listings.iter().flat_map(|listing| &listing.copies);
        let fenced = listings.iter().flat_map(|listing| &listing.epochs).map(|(volume, _)| volume.0);
        let chunk = copies().map(|copy| copy.chunk.0).max().unwrap_or(0);
        let volume = copies().map(|copy| copy.volume.0).chain(fenced).max().unwrap_or(0);
        let globals = &mut self.meta.globals;
        globals.next_chunk = globals.next_chunk.max(chunk.saturating_add(1)).saturating_add(CHUNK_MARGIN);
        globals.next_inode = globals.next_inode.max(volume.saturating_add(1)).saturating_add(INODE_MARGIN);
        globals.next_client = globals.next_client.saturating_add(CLIENT_MARGIN);
    }

    fn chunks(&mut self, listings: &[Listing], servers: &[Option<CsId>]) {
        let mut old: BTreeMap<Place, Chunk> = BTreeMap::new();
        for (key, value) in self.scan(keys::CHUNK) {
            old.insert((VolumeId(keys::number(&key, 1)), keys::number(&key, 9)), decode_record(&value));
        }
        self.clear(keys::CHUNK);
        let mut places: BTreeMap<Place, Claims<'_>> = old.keys().map(|place| (*place, Claims::new())).collect();
        let given = listings.iter().zip(servers).filter_map(|(listing, cs)| Some((listing, (*cs)?)));
        for (listing, cs) in given.clone() {
            for copy in &listing.copies {
                let claims = places.entry((copy.volume, copy.index)).or_default();
                claims.entry(copy.chunk).or_default().push((cs, copy));
            }
        }
        self.make_nameless_volumes(&places);
        self.drop_odd_copies(&mut places);
        for ((volume, index), claims) in &places {
            let inode = self.inodes.get(&InodeId(volume.0));
            if let Some(policy) = inode.map(|inode| inode.policy) {
                let wanted = (usize::from(policy.replicas), usize::from(policy.minimum));
                self.place_chunk((*volume, *index), claims, old.get(&(*volume, *index)), wanted);
            }
        }
        let mut epochs: BTreeMap<VolumeId, Epoch> = BTreeMap::new();
        for (listing, _) in given {
            for (volume, epoch) in &listing.epochs {
                let highest = epochs.entry(*volume).or_default();
                *highest = (*highest).max(*epoch);
            }
        }
        for (id, inode) in self.inodes.iter_mut().filter(|(_, inode)| inode.has_content()) {
            let seen = epochs.get(&VolumeId::of_inode(*id)).copied().unwrap_or_default();
            inode.lease.epoch = Epoch(inode.lease.epoch.max(seen).0.saturating_add(EPOCH_MARGIN));
            // Whoever opens it first compares the unsettled writes of all copies.
            inode.lease.unclean = inode.chunks > 0;
        }
    }

    /// Gives every volume that has chunks and that nothing is known of an inode.
    fn make_nameless_volumes(&mut self, places: &BTreeMap<Place, Claims<'_>>) {
        let mut volumes: BTreeMap<VolumeId, Vec<(&u64, &Claims<'_>)>> = BTreeMap::new();
        for ((volume, index), claims) in places {
            let id = InodeId(volume.0);
            // Ids are shared with directories and the like: a chunk that claims such a volume is odd.
            if !self.inodes.contains_key(&id) && self.meta.kv.get(&keys::inode(id)).is_none() && volume.0 > 1 {
                volumes.entry(*volume).or_default().push((index, claims));
            }
        }
        let mut directory: Option<(InodeId, String)> = None;
        for (volume, chunks) in volumes {
            let copies = || chunks.iter().flat_map(|(_, claims)| claims.values().flatten());
            let block_count = copies().map(|(_, copy)| copy.block_count).max().unwrap_or_default();
            let size = u64::from(block_count) * BLOCK_SIZE_U64;
            let root: Inode = self.meta.record(&keys::inode(InodeId::ROOT)).expect("a state has its root");
            let mut policy = root.policy;
            let valid = size.is_power_of_two()
                && (crate::volumes::CHUNK_SIZE_MIN..=crate::volumes::CHUNK_SIZE_MAX).contains(&size);
            if !valid {
                continue;
            }
            policy.chunk_shift = size.trailing_zeros() as u8;
            let whole = |claims: &Claims<'_>| {
                claims.values().map(|seen| seen.iter().filter(|(_, copy)| copy.whole).count()).max().unwrap_or(0)
            };
            let found = chunks.iter().map(|(_, claims)| whole(claims)).max().unwrap_or(1).clamp(1, 15) as u8;
            let derived = Redundancy::new(found, Redundancy::derived_minimum(found)).expect("one to fifteen");
            let redundancy = self.options.redundancy.unwrap_or(derived);
            (policy.replicas, policy.minimum) = (redundancy.replicas(), redundancy.minimum());
            policy.tier = copies()
                .filter_map(|(cs, _)| self.meta.servers.get(cs))
                .map(|server| server.tier)
                .min()
                .unwrap_or(policy.tier);
            let block = self.options.all_block_volumes || self.options.block_volumes.contains(&volume);
            let kind = if block { InodeKind::Volume } else { InodeKind::File };
            let mut inode = Inode::new(kind, 0o600, 0, 0, policy, self.options.wall_ns);
            let mapped = |claims: &Claims<'_>| {
                claims.values().flatten().map(|(_, copy)| u64::from(copy.mapped_blocks)).max().unwrap_or(0)
            };
            inode.allocated = chunks.iter().map(|(_, claims)| mapped(claims) * BLOCK_SIZE_U64).sum();
            let name = match kind {
                InodeKind::Volume => self.name_volume(volume, &mut inode),
                _ => {
                    let place = directory.take().unwrap_or_else(|| self.make_directory());
                    let name = self.name_file(&place, volume);
                    directory = Some(place);
                    name
                }
            };
            self.inodes.insert(InodeId(volume.0), inode);
            self.report.nameless.push(RecoveredVolume { volume, name, block_volume: block, size: 0, chunks: 0 });
        }
    }

    fn name_volume(&mut self, volume: VolumeId, inode: &mut Inode) -> String {
        let names = std::iter::once(format!("recovered-{}", volume.0))
            .chain((2u64..).map(|n| format!("recovered-{}-{n}", volume.0)));
        let key = |name: &str| keys::bytes(keys::NAME, name.as_bytes());
        let mut free = names.filter(|name| self.meta.kv.get(&key(name)).is_none());
        let name = free.next().expect("names do not end");
        self.meta.put_record(&key(&name), &volume);
        inode.text = name.clone().into_bytes();
        self.meta.globals.volumes += 1;
        name
    }

    /// A new directory in the root, for what has no name.
    fn make_directory(&mut self) -> (InodeId, String) {
        let names = std::iter::once("recovered".to_owned()).chain((2u64..).map(|n| format!("recovered-{n}")));
        let mut free = names.filter(|name| self.meta.entry(InodeId::ROOT, name.as_bytes()).is_none());
        let name = free.next().expect("names do not end");
        let id = InodeId(self.meta.globals.next_inode);
        self.meta.globals.next_inode += 1;
        self.meta.globals.inodes += 1;
        let mut root: Inode = self.meta.record(&keys::inode(InodeId::ROOT)).expect("a state has its root");
        let mut inode = Inode::new(InodeKind::Directory, 0o700, 0, 0, root.policy, self.options.wall_ns);
        inode.parent = InodeId::ROOT;
        self.meta.put_inode(id, &inode);
        let added = self.meta.add_entry(InodeId::ROOT, name.as_bytes(), id, InodeKind::Directory);
        added.expect("the name is free and hashes hardly ever collide");
        root.size += 1;
        root.nlink += 1;
        self.meta.put_inode(InodeId::ROOT, &root);
        (id, name)
    }

    fn name_file(&mut self, directory: &(InodeId, String), volume: VolumeId) -> String {
        let (id, path) = directory;
        let name = format!("volume-{}", volume.0);
        let added = self.meta.add_entry(*id, name.as_bytes(), InodeId(volume.0), InodeKind::File);
        added.expect("each volume has its own name in a new directory");
        let mut inode: Inode = self.meta.record(&keys::inode(*id)).expect("just made");
        inode.size += 1;
        self.meta.put_inode(*id, &inode);
        self.meta.globals.inodes += 1;
        format!("/{path}/{name}")
    }

    /// Takes out copies that cannot be of the volume they name: it is none, or its chunks have another size.
    fn drop_odd_copies(&mut self, places: &mut BTreeMap<Place, Claims<'_>>) {
        for ((volume, _), claims) in places {
            let size = self.inodes.get(&InodeId(volume.0)).filter(|i| i.has_content()).map(|i| i.policy.chunk_size());
            for (chunk, seen) in claims.iter_mut() {
                let fits =
                    |(_, copy): &Seen<'_>| size.is_some_and(|s| u64::from(copy.block_count) * BLOCK_SIZE_U64 == s);
                for (server, _) in seen.iter().filter(|one| !fits(one)) {
                    self.report.problems.push(Problem::Odd { volume: *volume, chunk: *chunk, server: *server });
                }
                seen.retain(|one| fits(one));
            }
            claims.retain(|_, seen| !seen.is_empty());
        }
    }

    /// Decides which chunk is at a place, on which servers, and puts it into the map.
    fn place_chunk(&mut self, place: Place, claims: &Claims<'_>, old: Option<&Chunk>, wanted: (usize, usize)) {
        let (volume, index) = place;
        let elsewhere = old.map_or(Vec::new(), |old| self.current_elsewhere(old));
        let of_old = old.filter(|_| !elsewhere.is_empty()).map(|old| old.id);
        // Ids rise: the chunk allocated last is the one in use, also when only a piece of it was found.
        let Some(id) = claims.keys().copied().chain(of_old).max() else {
            if let Some(old) = old.filter(|old| old.used) {
                self.report.problems.push(Problem::GoneSinceBackup { volume, index, chunk: old.id });
            }
            return;
        };
        for (chunk, seen) in claims.iter().filter(|(chunk, _)| **chunk != id) {
            let servers = seen.iter().map(|(cs, _)| *cs).collect();
            self.report.problems.push(Problem::Superseded { volume, index, chunk: *chunk, servers });
        }
        let seen = claims.get(&id).map_or(&[][..], Vec::as_slice);
        let old = old.filter(|old| old.id == id);
        let mut replicas = choose(seen, old, &elsewhere);
        let found = replicas.iter().filter(|replica| self.read.contains(&replica.cs)).count();
        let highest = seen.iter().map(|(_, copy)| copy.version).chain(old.map(|old| old.version)).max();
        let version = ChunkVersion(highest.expect("a chunk has a copy or a record").0 + 1);
        if replicas.is_empty() {
            // Reads must fail rather than give zeros: the incomplete copies stand for the chunk.
            let at = |(cs, _): &Seen<'_>| Replica { cs: *cs, role: ReplicaRole::Current, since: version };
            replicas = seen.iter().map(at).collect();
            let servers = seen.iter().map(|(cs, _)| *cs).collect();
            self.report.problems.push(Problem::Lost { volume, index, chunk: id, servers });
        } else if found == 0 {
            let servers = replicas.iter().map(|replica| replica.cs).collect();
            self.report.problems.push(Problem::Waits { volume, index, chunk: id, servers });
        } else if found < wanted.1 {
            let minimum = wanted.1;
            self.report.problems.push(Problem::BelowMinimum { volume, index, chunk: id, found, minimum });
        }
        let members: BTreeSet<CsId> = replicas.iter().map(|replica| replica.cs).collect();
        let others = seen.iter().map(|(cs, _)| *cs).filter(|cs| !members.contains(cs));
        let stale: Vec<StaleCopy> = others.map(|cs| StaleCopy { cs, deleting: false }).collect();
        self.report.chunks += 1;
        self.report.degraded += u64::from(found < wanted.0);
        self.report.stale_copies += stale.len() as u64;
        let mut before = Chunk {
            id,
            version: highest.expect("found above"),
            replicas_normal: wanted.0 as u8,
            minimum: wanted.1 as u8,
            used: true,
            holders: members.iter().copied().filter(|cs| seen.iter().any(|(other, _)| other == cs)).collect(),
            replicas,
            stale,
            state: ChunkState::Healthy,
            queued: None,
        };
        // Two steps: the second is a version change, so that the copies are ordered to adopt it and the set of no
        // version there ever was is changed (I7).
        self.meta.set_chunk(volume, index, None, Some(&mut before), false);
        let mut after = Chunk { version, ..before.clone() };
        self.meta.set_chunk(volume, index, Some(&before), Some(&mut after), true);
        self.account(place, seen);
    }

    /// Current replicas of an old record on servers that were not given and are still of the cluster.
    fn current_elsewhere(&self, old: &Chunk) -> Vec<Replica> {
        let away = |replica: &&Replica| {
            replica.role == ReplicaRole::Current
                && !self.read.contains(&replica.cs)
                && self.meta.servers.get(&replica.cs).is_some_and(|server| !server.dropped)
        };
        old.replicas.iter().filter(away).copied().collect()
    }

    /// Counts a chunk in its volume, which grows where it has data beyond its end.
    fn account(&mut self, (volume, index): Place, seen: &[Seen<'_>]) {
        let inode = self.inodes.get_mut(&InodeId(volume.0)).expect("chunks are placed in volumes there are");
        inode.chunks += 1;
        let blocks =
            |(_, copy): &Seen<'_>| copy.end_block.unwrap_or(if copy.mapped_blocks > 0 { copy.block_count } else { 0 });
        let whole = seen.iter().filter(|(_, copy)| copy.whole).map(blocks).max();
        let last = whole.or(seen.iter().map(blocks).max()).unwrap_or(0);
        if last == 0 {
            return;
        }
        let end = index.saturating_mul(inode.policy.chunk_size()).saturating_add(u64::from(last) * BLOCK_SIZE_U64);
        if end <= inode.size.next_multiple_of(BLOCK_SIZE_U64) {
            return;
        }
        let before = inode.size;
        inode.size = end;
        let named = inode.nlink > 0;
        if named && !self.report.nameless.iter().any(|known| known.volume == volume) {
            let grown = |problem: &&mut Problem| matches!(problem, Problem::Grown { volume: v, .. } if *v == volume);
            match self.report.problems.iter_mut().find(grown) {
                Some(Problem::Grown { now, .. }) => *now = end,
                _ => self.report.problems.push(Problem::Grown { volume, before, now: end }),
            }
        }
    }

    /// Writes back what has content and frees what nobody can reach any more.
    fn finish(&mut self) {
        for volume in &mut self.report.nameless {
            let inode = self.inodes.get_mut(&InodeId(volume.volume.0)).expect("made above");
            if volume.block_volume {
                // A block volume ends where its last chunk ends: nobody can say that it was shorter.
                inode.size = inode.size.next_multiple_of(inode.policy.chunk_size()).max(inode.policy.chunk_size());
            }
            (volume.size, volume.chunks) = (inode.size, inode.chunks);
        }
        for (id, inode) in std::mem::take(&mut self.inodes) {
            self.meta.put_inode(id, &inode);
            let going = self.meta.kv.get(&keys::one(keys::GARBAGE, id.0)).is_some();
            if !going && inode.is_gone() {
                self.meta.free_if_orphan(id, inode);
            }
        }
        let globals = &mut self.meta.globals;
        globals.config.insert(HOLD.to_owned(), 1);
        globals.topology_revision += 1;
        (self.report.inodes, self.report.block_volumes) = (globals.inodes, globals.volumes);
        let text = format!(
            "the metadata were recovered from {} chunk servers; nothing is deleted before {HOLD} is set to 0",
            self.report.servers.len()
        );
        self.meta.event(Severity::Warning, "MDS-1002", text);
        assert!(self.meta.sessions.is_empty(), "sessions are gone");
    }
}

/// The set of a chunk: complete copies that have every acknowledged write.
///
/// A record of the backup that is not older than the copies names the set; a member may stand at any version since it
/// joined, and one on a server that was not given stays a member. Otherwise the complete copies at the highest version
/// found are the set: no write was acknowledged at that version without each of its members, nor at an earlier one.
fn choose(seen: &[Seen<'_>], old: Option<&Chunk>, elsewhere: &[Replica]) -> Vec<Replica> {
    let whole = || seen.iter().filter(|(_, copy)| copy.whole || planted!("recover_trusts_incomplete_copies"));
    let versions = || whole().map(|(_, copy)| copy.version);
    let top = if planted!("recover_takes_old_copies") { versions().min() } else { versions().max() };
    if let Some(old) = old.filter(|old| top.is_none_or(|top| old.version >= top)) {
        let shown = |replica: &Replica| {
            whole().any(|(cs, copy)| *cs == replica.cs && copy.version >= replica.since)
                && replica.role == ReplicaRole::Current
        };
        let set: Vec<Replica> = old.replicas.iter().filter(|r| shown(r) || elsewhere.contains(r)).copied().collect();
        if !set.is_empty() {
            return set;
        }
    }
    let Some(top) = top else { return Vec::new() };
    let best = whole().filter(|(_, copy)| copy.version == top);
    best.map(|(cs, _)| Replica { cs: *cs, role: ReplicaRole::Current, since: top }).collect()
}
