//! What calls to the metadata servers are about: inodes, leases, chunk maps, servers, events.

use cairn_types::{
    ChunkId, ChunkVersion, ClientId, ClusterId, CsId, Epoch, FailureDomain, HostId, InodeId, LayerId, Level, MdsId,
    NodeId, Redundancy, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// What a session may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionKind {
    /// Holds leases: a mount, an NBD server, a benchmark.
    Client,
    /// Only calls: the command line.
    Admin,
}

/// The kinds of inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InodeKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// A named block volume; lives outside the tree.
    Volume,
}

/// Attributes of an inode. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    /// The inode.
    pub inode: InodeId,
    /// Its kind.
    pub kind: InodeKind,
    /// Permission bits, 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; for directories 2 + subdirectories.
    pub nlink: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes allocated: chunk granularity is too coarse, so this is what the last holder reported.
    pub allocated: u64,
    /// Device number of a device node.
    pub rdev: u32,
    /// Last access.
    pub atime_ns: u64,
    /// Last change of content.
    pub mtime_ns: u64,
    /// Last change of the inode.
    pub ctime_ns: u64,
}

/// Changes to attributes; absent fields stay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAttr {
    /// New permission bits.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size: growing leaves a hole; shrinking drops whole chunks past the end (the lease holder zeroes the partial
    /// one first).
    pub size: Option<u64>,
    /// As [`SetAttr::size`], but never shrinks: what a holder reports after writing.
    pub grow_to: Option<u64>,
    /// Bytes allocated, as the holder counts them.
    pub allocated: Option<u64>,
    /// New access time.
    pub atime_ns: Option<u64>,
    /// New modification time.
    pub mtime_ns: Option<u64>,
}

/// One directory entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The inode it names.
    pub inode: InodeId,
    /// Kind of that inode.
    pub kind: InodeKind,
    /// Where to go on after this entry; opaque, stable while the directory changes.
    pub cookie: u64,
    /// Attributes, when the listing asked for them.
    pub attr: Option<Attr>,
}

/// How a rename treats an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    /// Replaces it atomically (POSIX).
    Replace,
    /// Fails when it exists (`RENAME_NOREPLACE`).
    NoReplace,
    /// Swaps the two (`RENAME_EXCHANGE`).
    Exchange,
}

/// Lease modes: one exclusive holder, or any number of shared ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseMode {
    /// Reads only.
    Shared,
    /// Reads and writes.
    Exclusive,
}

/// A granted lease, and all that its holder needs to begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGrant {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch every request of this holder carries.
    pub epoch: Epoch,
    /// Granted mode.
    pub mode: LeaseMode,
    /// Size of the volume in bytes.
    pub size: u64,
    /// Chunk size in bytes, a power of two.
    pub chunk_size: u64,
    /// Redundancy of new chunks.
    pub redundancy: Redundancy,
    /// True when the previous holder released cleanly (or there was none): tails are empty, fencing needs no
    /// reconcile.
    pub clean: bool,
    /// Chunk servers that hold replicas of the volume: each is to be fenced before the first read or write.
    pub servers: Vec<CsId>,
}

/// Part a chunk server plays for one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaRole {
    /// Serves and votes.
    Current,
    /// Receives new writes, serves nothing until promoted.
    Rebuilding,
}

/// One copy of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Where it is.
    pub cs: CsId,
    /// Its part.
    pub role: ReplicaRole,
    /// The version with which this server last joined the set: a copy at this version or later may be raised to the
    /// chunk's.
    pub since: ChunkVersion,
}

/// One entry of a volume's chunk map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkEntry {
    /// Index of the chunk within the volume.
    pub index: u64,
    /// The chunk.
    pub chunk: ChunkId,
    /// The layer it belongs to.
    pub layer: LayerId,
    /// Current version.
    pub version: ChunkVersion,
    /// Writes wait while fewer current replicas than this exist (rule 4).
    pub minimum: u8,
    /// The replica set of that version.
    pub replicas: Vec<Replica>,
}

/// Where a chunk server stands in the tree disk < host < rack < row < room < site. The disk is the server itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// Identity of the host.
    pub host: HostId,
    /// Name of the host, for people.
    pub host_name: String,
    /// Rack, row, room, site; empty where the operator gave none.
    pub rack: String,
    /// Row.
    pub row: String,
    /// Room.
    pub room: String,
    /// Site.
    pub site: String,
}

/// States of a chunk server (R0089).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CsState {
    /// Answers heartbeats.
    Active,
    /// Silent for less than `mds.wd.offline_tout`.
    Inactive,
    /// Silent for longer; its chunks are replicated elsewhere.
    Offline,
    /// Being removed: its chunks move away.
    Draining,
    /// Its disk failed; it serves nothing.
    Failed,
    /// Removed by the administrator.
    Dropped,
}

/// What the cluster knows of a chunk server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CsInfo {
    /// Its id.
    pub cs: CsId,
    /// Where clients reach it.
    pub addr: SocketAddr,
    /// Where it stands.
    pub location: Location,
    /// Its tier, 0 to 3.
    pub tier: u8,
    /// Its state.
    pub state: CsState,
    /// Figures of its last heartbeat.
    pub stats: CsStats,
    /// The repository directory on its host.
    pub repository: String,
}

/// Figures of a chunk server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CsStats {
    /// Bytes it can store in all.
    pub capacity: u64,
    /// Bytes taken.
    pub used: u64,
    /// Number of chunk copies.
    pub chunks: u64,
    /// Requests waiting at this moment.
    pub queue_depth: u32,
    /// Reads served since start.
    pub reads: u64,
    /// Writes served since start.
    pub writes: u64,
    /// Bytes read since start.
    pub read_bytes: u64,
    /// Bytes written since start.
    pub written_bytes: u64,
    /// Checksum errors found since start.
    pub corruptions: u64,
}

/// What the cluster knows of a metadata server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MdsInfo {
    /// Its id.
    pub mds: MdsId,
    /// Where clients, chunk servers and other metadata servers reach it.
    pub addr: SocketAddr,
    /// Votes already, or still catching up.
    pub voter: bool,
    /// The repository directory on its host.
    pub repository: String,
}

/// How far a metadata server is behind its leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MdsLag {
    /// It keeps up.
    #[default]
    None,
    /// It lacks many entries of the log.
    Behind,
    /// It has accepted nothing for a while.
    Silent,
    /// What it lacks is gone from the log: it gets the whole state.
    Resync,
}

/// What ails a metadata server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MdsCondition {
    /// The disk of its repository has little room left, or none.
    pub no_room: bool,
    /// How far it is behind.
    pub lag: MdsLag,
}

/// A block volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its id.
    pub volume: VolumeId,
    /// Its name; names are hints, ids attach.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Chunk size in bytes.
    pub chunk_size: u64,
    /// Redundancy of its chunks.
    pub redundancy: Redundancy,
    /// On which level copies differ.
    pub failure_domain: FailureDomain,
    /// Tier.
    pub tier: u8,
    /// Chunks allocated.
    pub chunks: u64,
    /// Holder of the exclusive lease, with its epoch.
    pub holder: Option<(ClientId, Epoch)>,
    /// When it was created, nanoseconds since 1970.
    pub created_ns: u64,
}

/// What a caller wants of a new volume; absent fields take the cluster's defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOptions {
    /// Redundancy.
    pub redundancy: Option<Redundancy>,
    /// Failure domain.
    pub failure_domain: Option<FailureDomain>,
    /// Tier 0 to 3.
    pub tier: Option<u8>,
    /// Chunk size: a power of two from 1 MiB to 256 MiB.
    pub chunk_size: Option<u64>,
}

/// Severity of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// For the record.
    Info,
    /// Look at it some day.
    Warning,
    /// Look at it now.
    Error,
}

/// One line of the event log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterEvent {
    /// Number, from 1, without gaps.
    pub number: u64,
    /// When, nanoseconds since 1970 by the leader's clock.
    pub wall_ns: u64,
    /// How serious.
    pub severity: Severity,
    /// Short code, as `MDS-1001`.
    pub code: String,
    /// What happened, a sentence.
    pub text: String,
}

/// Counts of chunks by state (R0389–R0399), kept incrementally. A chunk counts under its most serious state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkCounts {
    /// All chunks.
    pub total: u64,
    /// Enough current replicas.
    pub healthy: u64,
    /// A replica inactive for less than the offline timeout.
    pub standby: u64,
    /// Below normal, at or above minimum.
    pub degraded: u64,
    /// Degraded, with stale replicas around.
    pub urgent: u64,
    /// Below minimum: writes wait.
    pub blocked: u64,
    /// Blocked and queued first for repair.
    pub pending: u64,
    /// No current replica online.
    pub offline: u64,
    /// A copy is being made.
    pub replicating: u64,
    /// More replicas than normal.
    pub overcommitted: u64,
    /// Replicas being removed.
    pub deleting: u64,
    /// Allocated, never used.
    pub void: u64,
}

/// Health of the whole cluster (D23).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterHealth {
    /// All is well.
    Healthy,
    /// Something is inactive, offline or below its redundancy.
    Degraded,
    /// Too many servers are offline: repair waits for an operator.
    Failed,
    /// No majority answered.
    Unknown,
}

/// The summary behind `cairn stat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStat {
    /// Name.
    pub name: String,
    /// Identity.
    pub cluster: ClusterId,
    /// Health.
    pub health: ClusterHealth,
    /// Raw capacity of all chunk servers in use.
    pub capacity: u64,
    /// Raw bytes taken.
    pub used: u64,
    /// Inodes in the namespace.
    pub inodes: u64,
    /// Block volumes.
    pub volumes: u64,
    /// Chunks by state.
    pub chunks: ChunkCounts,
    /// Metadata servers.
    pub mds: Vec<MdsInfo>,
    /// The leader.
    pub leader: Option<MdsId>,
    /// Metadata servers that do not answer the leader.
    pub mds_silent: Vec<MdsId>,
    /// Chunk servers.
    pub cs: Vec<CsInfo>,
    /// Client sessions.
    pub clients: Vec<SessionInfo>,
    /// Metadata servers that something ails.
    pub mds_ill: Vec<(MdsId, MdsCondition)>,
}

/// One client session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its id.
    pub client: ClientId,
    /// Host it runs on.
    pub host_name: String,
    /// What it is, as `mount /mnt/stor1`.
    pub purpose: String,
    /// Leases it holds.
    pub leases: u64,
}

/// The release level of somebody in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberLevel {
    /// Who.
    pub node: NodeId,
    /// Where it is and what it does, for people.
    pub what: String,
    /// Its level; none when the leader does not hear it.
    pub level: Option<Level>,
}

/// A chunk copy as a chunk server reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkReport {
    /// The chunk.
    pub chunk: ChunkId,
    /// The server's version of it.
    pub version: ChunkVersion,
}

/// What a chunk server is told to do. Each order is idempotent and repeated until its effect is reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CsOrder {
    /// Raise a chunk from `since` or later to `version`.
    Raise {
        /// The chunk.
        chunk: ChunkId,
        /// Lowest version the copy may have now.
        since: ChunkVersion,
        /// The version to adopt.
        version: ChunkVersion,
    },
    /// Make or freshen a copy at `version` from one of `sources`, then report it.
    Rebuild {
        /// Map entry of the chunk at that version.
        entry: ChunkEntry,
        /// The volume.
        volume: VolumeId,
        /// Blocks per chunk.
        block_count: u32,
        /// Current replicas to copy from, nearest first, with their addresses.
        sources: Vec<(CsId, SocketAddr)>,
        /// A source is known to have had its copy. While none is, and none has one now, the chunk was allocated and no
        /// write to it can have been acknowledged: all its current replicas would have created it before.
        created: bool,
    },
    /// Delete the copy: the chunk is gone or lives elsewhere. Only if the copy's version is at most `version`.
    Delete {
        /// The chunk.
        chunk: ChunkId,
        /// Highest version to delete.
        version: ChunkVersion,
    },
    /// Verify so many chunks a minute from now on (`mds.wd.verify_chunks`); nothing is reported back.
    VerifyRate {
        /// Chunks a minute; zero switches the scrub off.
        chunks_per_minute: u32,
    },
    /// The cluster is at this level: what came with it may be used. Not told at the first one.
    Level(Level),
}

/// How an order ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderDone {
    /// The chunk.
    pub chunk: ChunkId,
    /// The version the order named.
    pub version: ChunkVersion,
    /// What was done.
    pub kind: OrderKind,
    /// Why not, if it failed.
    pub error: Option<String>,
}

/// Kind of a finished order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OrderKind {
    /// [`CsOrder::Raise`].
    Raise,
    /// [`CsOrder::Rebuild`].
    Rebuild,
    /// [`CsOrder::Delete`].
    Delete,
}

/// Where a chunk store stands in its own history, told at registration. Each start that is acknowledged has a nonce of
/// its own, and names that of the start before: a copy of the store that was left behind names another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Number of this start, counting those that were acknowledged.
    pub generation: u64,
    /// Nonce of the last start that was acknowledged; zero in a new store. Equal to `nonce` when this start has been.
    pub previous: u64,
    /// Nonce of this start.
    pub nonce: u64,
    /// Drawn by the process, as in its heartbeats.
    pub boot: u64,
    /// The highest log sequence number the store held when this start began.
    pub recovered: u64,
}

/// Chunks of a volume or file that would be lost with a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostChunks {
    /// The volume; of a file its inode.
    pub volume: VolumeId,
    /// Name of a block volume; empty for a file.
    pub name: String,
    /// Chunks with no other current copy at all.
    pub only: u64,
    /// Chunks whose other current copies are on servers that do not answer.
    pub unreachable: u64,
}
