//! The records of the state: what stands behind the keys of [`crate::keys`]. Encoded with postcard.

use cairn_types::{
    ChunkId, ChunkVersion, ClientId, ClusterId, CsId, Epoch, FailureDomain, HostId, InodeId, Level, MdsId, Redundancy,
    VolumeId,
};
use cairn_wire::mds::{
    Attr, ChunkCounts, CsInfo, CsState, CsStats, InodeKind, Location, MdsInfo, Replica, ReplicaRole, SessionKind,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How the content of an inode is stored; inherited from the directory at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Normal number of copies.
    pub replicas: u8,
    /// Writes wait below this.
    pub minimum: u8,
    /// On which level copies differ.
    pub domain: FailureDomain,
    /// Tier.
    pub tier: u8,
    /// Binary logarithm of the chunk size.
    pub chunk_shift: u8,
}

impl Default for Policy {
    fn default() -> Self {
        let redundancy = Redundancy::default();
        Self {
            replicas: redundancy.replicas(),
            minimum: redundancy.minimum(),
            domain: FailureDomain::default(),
            tier: 0,
            chunk_shift: cairn_types::CHUNK_SIZE_DEFAULT.trailing_zeros() as u8,
        }
    }
}

impl Policy {
    /// The redundancy.
    pub fn redundancy(&self) -> Redundancy {
        Redundancy::new(self.replicas, self.minimum).expect("checked when it was set")
    }

    /// The chunk size in bytes.
    pub fn chunk_size(&self) -> u64 {
        1 << self.chunk_shift
    }
}

/// The lease of a volume. At most one exclusive holder, never beside shared ones (I6).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The last epoch granted.
    pub epoch: Epoch,
    /// An exclusive holder has not released cleanly (yet).
    pub unclean: bool,
    /// The exclusive holder.
    pub exclusive: Option<ClientId>,
    /// The shared holders, all of the same epoch.
    pub shared: Vec<ClientId>,
}

impl Lease {
    /// All holders.
    pub fn holders(&self) -> impl Iterator<Item = ClientId> + '_ {
        self.exclusive.iter().chain(&self.shared).copied()
    }

    /// Nobody holds it.
    pub fn is_free(&self) -> bool {
        self.exclusive.is_none() && self.shared.is_empty()
    }
}

/// An inode or a block volume. Times are kept relative to the birth, where they are short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    /// Kind.
    pub kind: InodeKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub nlink: u32,
    /// Size in bytes; of a directory the number of its entries.
    pub size: u64,
    /// Bytes allocated, as the last holder reported.
    pub allocated: u64,
    /// Device number.
    pub rdev: u32,
    /// When it was created.
    pub birth_ns: u64,
    atime: i64,
    mtime: i64,
    ctime: i64,
    /// Parent of a directory.
    pub parent: InodeId,
    /// How its content is stored.
    pub policy: Policy,
    /// Chunks allocated.
    pub chunks: u64,
    /// Bytes of extended attributes, names and values.
    pub xattr_bytes: u32,
    /// Open handles of all sessions.
    pub handles: u32,
    /// The lease of its content.
    pub lease: Lease,
    /// Target of a symbolic link, name of a block volume.
    pub text: Vec<u8>,
}

impl Inode {
    /// A new inode with one name.
    pub fn new(kind: InodeKind, mode: u32, uid: u32, gid: u32, policy: Policy, now_ns: u64) -> Self {
        Self {
            kind,
            mode: mode & 0o7777,
            uid,
            gid,
            nlink: if kind == InodeKind::Directory { 2 } else { 1 },
            size: 0,
            allocated: 0,
            rdev: 0,
            birth_ns: now_ns,
            atime: 0,
            mtime: 0,
            ctime: 0,
            parent: InodeId(0),
            policy,
            chunks: 0,
            xattr_bytes: 0,
            handles: 0,
            lease: Lease::default(),
            text: Vec::new(),
        }
    }

    /// True for what has a lease and chunks.
    pub fn has_content(&self) -> bool {
        matches!(self.kind, InodeKind::File | InodeKind::Volume)
    }

    /// Nobody can reach it any more: it is being freed.
    pub fn is_gone(&self) -> bool {
        self.nlink == 0 && self.handles == 0 && self.lease.is_free()
    }

    /// Sets the time of last access.
    pub fn set_atime(&mut self, ns: u64) {
        self.atime = ns.wrapping_sub(self.birth_ns) as i64;
    }

    /// Sets the time of the last change of content.
    pub fn set_mtime(&mut self, ns: u64) {
        self.mtime = ns.wrapping_sub(self.birth_ns) as i64;
    }

    /// Sets the time of the last change of the inode.
    pub fn set_ctime(&mut self, ns: u64) {
        self.ctime = ns.wrapping_sub(self.birth_ns) as i64;
    }

    /// Content and inode changed.
    pub fn touch(&mut self, ns: u64) {
        self.set_mtime(ns);
        self.set_ctime(ns);
    }

    /// What callers see.
    pub fn attr(&self, inode: InodeId) -> Attr {
        Attr {
            inode,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size: self.size,
            allocated: self.allocated,
            rdev: self.rdev,
            atime_ns: self.birth_ns.wrapping_add(self.atime as u64),
            mtime_ns: self.birth_ns.wrapping_add(self.mtime as u64),
            ctime_ns: self.birth_ns.wrapping_add(self.ctime as u64),
        }
    }
}

/// A directory entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dentry {
    /// The inode.
    pub inode: InodeId,
    /// Its kind.
    pub kind: InodeKind,
    /// Tells entries apart whose names have the same hash.
    pub slot: u8,
}

/// State of a chunk, most serious first: it counts under the first that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ChunkState {
    /// No current replica online.
    Offline,
    /// Fewer online than the minimum: writes wait.
    Blocked,
    /// Below normal, stale replicas around.
    Urgent,
    /// Below normal.
    Degraded,
    /// Enough, counting servers that have just become silent.
    Standby,
    /// More than normal.
    Overcommitted,
    /// As it should be.
    Healthy,
}

/// A copy that is no longer in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleCopy {
    /// Where it is.
    pub cs: CsId,
    /// The copy is being deleted: no source for a resync.
    pub deleting: bool,
}

/// A chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its id.
    pub id: ChunkId,
    /// Its version.
    pub version: ChunkVersion,
    /// Normal number of copies.
    pub replicas_normal: u8,
    /// Writes wait below this.
    pub minimum: u8,
    /// A copy is known to have existed, from a report or a version change carried out: no longer void.
    pub used: bool,
    /// Servers of the set that have shown that they have their copy. One that has not may never have created it.
    pub holders: Vec<CsId>,
    /// The set.
    pub replicas: Vec<Replica>,
    /// Copies outside the set.
    pub stale: Vec<StaleCopy>,
    /// What it counts under.
    pub state: ChunkState,
    /// Its place in the repair queue: priority and due time.
    pub queued: Option<(u8, u64)>,
}

impl Chunk {
    /// Number of current replicas.
    pub fn current(&self) -> usize {
        self.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current).count()
    }

    /// The replica on a server.
    pub fn replica(&self, cs: CsId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.cs == cs)
    }

    /// True when a copy is being made.
    pub fn is_replicating(&self) -> bool {
        self.replicas.iter().any(|replica| replica.role == ReplicaRole::Rebuilding)
    }

    /// Every server with a copy, in the set or not.
    pub fn servers(&self) -> impl Iterator<Item = CsId> + '_ {
        self.replicas.iter().map(|replica| replica.cs).chain(self.stale.iter().map(|stale| stale.cs))
    }
}

/// Kind of an outstanding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OrderKindRecord {
    /// Raise to the chunk's version.
    Raise,
    /// Rebuild at the chunk's version.
    Rebuild,
    /// Delete.
    Delete,
}

/// An outstanding order; versions of raise and rebuild orders are the chunk's at the time of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// What.
    pub kind: OrderKindRecord,
    /// The volume.
    pub volume: VolumeId,
    /// The index.
    pub index: u64,
    /// Highest version to delete.
    pub version: ChunkVersion,
}

/// Where balancing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Balance {
    /// Copies move.
    Moving {
        /// So many were begun.
        moved: u64,
        /// When the last was, on the clock of ticks.
        last_ns: u64,
    },
    /// What remains cannot be moved now.
    Resting {
        /// When to look again, on the clock of ticks.
        until_ns: u64,
    },
}

/// What the other parties say of a server's presence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// Answers heartbeats.
    Active,
    /// Silent for a short time.
    Inactive,
    /// Silent for long.
    Offline,
}

/// A chunk server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Uuid of its store.
    pub store: [u8; 16],
    /// Where clients reach it.
    pub addr: SocketAddr,
    /// Where it stands.
    pub location: Location,
    /// Tier.
    pub tier: u8,
    /// Repository directory.
    pub repository: String,
    /// Presence.
    pub presence: Presence,
    /// Being drained.
    pub draining: bool,
    /// Its disk failed, in words.
    pub failed: Option<String>,
    /// Removed.
    pub dropped: bool,
    /// Drawn by it at its last start.
    pub boot: u64,
    /// Figures of the last heartbeat.
    pub stats: CsStats,
    /// Rebuild orders outstanding.
    pub rebuilding: u32,
    /// Chunks below this id existed when the last complete report ended; only they can be missing from the next.
    pub report_floor: ChunkId,
    /// How busy it is, in thousandths. Of [`cairn_types::Level::BUSY`]: `crate::level` puts it behind the rest.
    #[serde(skip)]
    pub busy: u16,
}

/// How a server counts in the state of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Active and staying.
    Good,
    /// Active, being drained.
    Leaving,
    /// Silent for a short time, staying.
    Silent,
    /// Silent for a short time, being drained.
    SilentLeaving,
    /// Offline, failed or removed.
    Gone,
}

impl Server {
    /// Its state as shown.
    pub fn state(&self) -> CsState {
        match (self.dropped, &self.failed, self.presence, self.draining) {
            (true, ..) => CsState::Dropped,
            (_, Some(_), ..) => CsState::Failed,
            (_, _, Presence::Offline, _) => CsState::Offline,
            (_, _, Presence::Inactive, _) => CsState::Inactive,
            (_, _, Presence::Active, true) => CsState::Draining,
            (_, _, Presence::Active, false) => CsState::Active,
        }
    }

    /// How it counts.
    pub fn standing(&self) -> Standing {
        match (self.state(), self.draining) {
            (CsState::Active, _) => Standing::Good,
            (CsState::Draining, _) => Standing::Leaving,
            (CsState::Inactive, false) => Standing::Silent,
            (CsState::Inactive, true) => Standing::SilentLeaving,
            _ => Standing::Gone,
        }
    }

    /// What callers see.
    pub fn info(&self, cs: CsId) -> CsInfo {
        CsInfo {
            cs,
            addr: self.addr,
            location: self.location.clone(),
            tier: self.tier,
            state: self.state(),
            stats: self.stats,
            repository: self.repository.clone(),
        }
    }
}

/// How far a session is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// Alive.
    Live,
    /// Ended; its leases wait for the end of the term.
    Ended,
    /// Its leases are void; they are being cleared away.
    Freeing {
        /// It closed in order: its leases count as released cleanly.
        clean: bool,
    },
}

/// A client session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Its kind.
    pub kind: SessionKind,
    /// Its host.
    pub host: HostId,
    /// Host name.
    pub host_name: String,
    /// What it is.
    pub purpose: String,
    /// Drawn by the client.
    pub nonce: u64,
    /// Where it is in its life.
    pub state: SessionState,
    /// Answers up to this number are forgotten.
    pub acknowledged: u64,
    /// Leases held.
    pub leases: u64,
    /// Encoded answers not yet acknowledged.
    pub replies: BTreeMap<u64, Vec<u8>>,
    /// Changed since the last checkpoint.
    #[serde(skip)]
    pub dirty: bool,
}

/// A metadata server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What callers see.
    pub info: MdsInfo,
    /// Drawn by it when it joined.
    pub nonce: u64,
    /// Asked to leave.
    pub leaving: bool,
}

/// Identity of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Id.
    pub cluster: ClusterId,
    /// Name.
    pub name: String,
}

/// All singletons, resident, written at checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Globals {
    /// The level of the cluster: all records are of it. Always the first field.
    pub version: u32,
    /// Log index of the last command applied.
    pub applied: u64,
    /// Digest of all changes so far, in order.
    pub digest: u64,
    /// Identity; none before [`crate::Command::Bootstrap`].
    pub identity: Option<Identity>,
    /// Time that never jumps, fed by ticks.
    pub clock_ns: u64,
    /// The leader's clock in the last command that carried it: the time of events.
    pub wall_ns: u64,
    /// The leader's clock at the last tick.
    pub tick_wall_ns: u64,
    /// Next inode or volume id.
    pub next_inode: u64,
    /// Next chunk id.
    pub next_chunk: u64,
    /// Next chunk server id.
    pub next_cs: u32,
    /// Next session id.
    pub next_client: u64,
    /// Next metadata server id.
    pub next_mds: u64,
    /// Next revision of the key-value store.
    pub next_revision: u64,
    /// Number of the last event.
    pub last_event: u64,
    /// Number of the oldest event kept.
    pub first_event: u64,
    /// Inodes in the namespace, those waiting for their last handle included.
    pub inodes: u64,
    /// Block volumes.
    pub volumes: u64,
    /// Chunks by state.
    pub counts: ChunkCounts,
    /// Grows with each change of addresses and states.
    pub topology_revision: u64,
    /// Metadata servers.
    pub members: BTreeMap<MdsId, Member>,
    /// Parameters that differ from their defaults.
    pub config: BTreeMap<String, u64>,
    /// Chunks were below their redundancy at the last tick.
    pub repairing: bool,
    /// Why repair waits for an operator, if it does.
    pub brake: Option<String>,
    /// When an allocation failed last and was reported, on `clock_ns`.
    pub no_space_reported_ns: Option<u64>,
}

impl Globals {
    /// An empty cluster.
    pub fn new() -> Self {
        Self {
            version: Level::OLDEST.0,
            applied: 0,
            digest: 0,
            identity: None,
            clock_ns: 0,
            wall_ns: 0,
            tick_wall_ns: 0,
            next_inode: InodeId::ROOT.0 + 1,
            next_chunk: 1,
            next_cs: 1025,
            next_client: 2049,
            next_mds: 1,
            next_revision: 1,
            last_event: 0,
            first_event: 1,
            inodes: 0,
            volumes: 0,
            counts: ChunkCounts::default(),
            topology_revision: 0,
            members: BTreeMap::new(),
            config: BTreeMap::new(),
            repairing: false,
            brake: None,
            no_space_reported_ns: None,
        }
    }
}

impl Default for Globals {
    fn default() -> Self {
        Self::new()
    }
}
