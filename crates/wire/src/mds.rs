//! Calls to the metadata servers. Declared schema, encoded with postcard; version the enums by appending variants only.
//!
//! Any metadata server takes any call: a follower answers [`MdsError::NotLeader`] with the leader's address for calls
//! that change something. A changing call carries the session and a call number, so that a retry after a lost answer
//! takes effect once (I18): the state machine remembers the answers a session has not acknowledged yet.

use cairn_types::{
    ChunkId, ChunkVersion, ClientId, ClusterId, CsId, Epoch, FailureDomain, HostId, InodeId, LayerId, MdsId,
    Redundancy, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Longest name of a directory entry, in bytes (as POSIX `NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes.
pub const SYMLINK_MAX: usize = 4095;
/// Most entries in one answer to a listing call; the caller asks on.
pub const LIST_MAX: usize = 4096;
/// Largest extended attribute value, in bytes (as Linux).
pub const XATTR_VALUE_MAX: usize = 65536;
/// Largest value in the key-value store, in bytes.
pub const KV_VALUE_MAX: usize = 1 << 20;

/// Envelope of every call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The caller's session; zero before [`MdsRequest::SessionOpen`] answered and for read-only calls without a session.
    pub session: ClientId,
    /// Number of this call within the session, from 1; zero for calls that change nothing.
    pub sequence: u64,
    /// Every call up to this one has been answered and its answer may be forgotten.
    pub acknowledged: u64,
    /// The caller's wall clock, nanoseconds since 1970: becomes the times of inodes.
    pub wall_ns: u64,
    /// What is asked.
    pub request: MdsRequest,
}

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
    /// New size: growing leaves a hole; shrinking drops whole chunks past the end (the lease holder zeroes the partial one first).
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
    /// True when the previous holder released cleanly (or there was none): tails are empty, fencing needs no reconcile.
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
    /// The version with which this server last joined the set: a copy at this version or later may be raised to the chunk's.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Chunk servers.
    pub cs: Vec<CsInfo>,
    /// Client sessions.
    pub clients: Vec<SessionInfo>,
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
    },
    /// Delete the copy: the chunk is gone or lives elsewhere. Only if the copy's version is at most `version`.
    Delete {
        /// The chunk.
        chunk: ChunkId,
        /// Highest version to delete.
        version: ChunkVersion,
    },
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

/// Everything that can be asked of the metadata servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MdsRequest {
    // Sessions.
    /// Opens a session; answered by [`MdsReply::Session`].
    SessionOpen {
        /// Its kind.
        kind: SessionKind,
        /// Host identity.
        host: HostId,
        /// Host name.
        host_name: String,
        /// What it is, for people.
        purpose: String,
        /// Drawn by the client, so that a retried open finds the same session.
        nonce: u64,
    },
    /// Renews the session and with it all its leases.
    SessionRenew,
    /// Ends the session; its leases are released cleanly.
    SessionClose,
    /// Ends another session by force: `cairn revoke`. Its leases pass on once fenced.
    SessionRevoke {
        /// The session.
        client: ClientId,
    },

    // Namespace. Names are bytes without `/` and NUL.
    /// Walks an absolute path from the root without following a final symlink; answered by [`MdsReply::Attr`].
    Resolve {
        /// The path, `/` separated.
        path: Vec<u8>,
    },
    /// Attributes of the inode a name leads to.
    Lookup {
        /// Directory.
        parent: InodeId,
        /// Name in it.
        name: Vec<u8>,
    },
    /// Attributes of an inode.
    GetAttr {
        /// The inode.
        inode: InodeId,
    },
    /// Changes attributes; answered by [`MdsReply::Attr`].
    SetAttr {
        /// The inode.
        inode: InodeId,
        /// The changes.
        set: SetAttr,
    },
    /// Creates a file, directory or node; answered by [`MdsReply::Created`]. With `lease` a file's exclusive lease comes along.
    Create {
        /// Directory.
        parent: InodeId,
        /// Name in it.
        name: Vec<u8>,
        /// Kind of inode, any but symlink and volume.
        kind: InodeKind,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Device number for device nodes.
        rdev: u32,
        /// Grant the exclusive lease with it (files only).
        lease: bool,
    },
    /// Creates a symbolic link; answered by [`MdsReply::Attr`].
    Symlink {
        /// Directory.
        parent: InodeId,
        /// Name in it.
        name: Vec<u8>,
        /// What it points to.
        target: Vec<u8>,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Target of a symbolic link; answered by [`MdsReply::Bytes`].
    Readlink {
        /// The link.
        inode: InodeId,
    },
    /// A further name for an inode; answered by [`MdsReply::Attr`].
    Link {
        /// The inode.
        inode: InodeId,
        /// Directory of the new name.
        parent: InodeId,
        /// The new name.
        name: Vec<u8>,
    },
    /// Removes a name; the inode goes with its last name and last open handle.
    Unlink {
        /// Directory.
        parent: InodeId,
        /// Name in it.
        name: Vec<u8>,
    },
    /// Removes an empty directory.
    Rmdir {
        /// Directory.
        parent: InodeId,
        /// Name in it.
        name: Vec<u8>,
    },
    /// Renames, atomically.
    Rename {
        /// Old directory.
        parent: InodeId,
        /// Old name.
        name: Vec<u8>,
        /// New directory.
        new_parent: InodeId,
        /// New name.
        new_name: Vec<u8>,
        /// What to do with an existing target.
        mode: RenameMode,
    },
    /// Entries of a directory after `cookie` (0: from the start, without `.` and `..`); answered by [`MdsReply::Entries`].
    ReadDir {
        /// The directory.
        inode: InodeId,
        /// Cookie of the last entry seen.
        cookie: u64,
        /// Most entries wanted.
        limit: u32,
        /// Attributes too.
        attributes: bool,
    },
    /// Parent of a directory; answered by [`MdsReply::Attr`].
    Parent {
        /// The directory.
        inode: InodeId,
    },
    /// Value of an extended attribute; answered by [`MdsReply::Bytes`].
    GetXattr {
        /// The inode.
        inode: InodeId,
        /// Name with its namespace, as `user.note`.
        name: Vec<u8>,
    },
    /// Sets an extended attribute.
    SetXattr {
        /// The inode.
        inode: InodeId,
        /// Name with its namespace.
        name: Vec<u8>,
        /// Value.
        value: Vec<u8>,
        /// Must (`Some(true)`) or must not (`Some(false)`) exist already.
        exists: Option<bool>,
    },
    /// Names of extended attributes, NUL-terminated; answered by [`MdsReply::Bytes`].
    ListXattr {
        /// The inode.
        inode: InodeId,
    },
    /// Removes an extended attribute.
    RemoveXattr {
        /// The inode.
        inode: InodeId,
        /// Name with its namespace.
        name: Vec<u8>,
    },
    /// Says that this session has the inode open, so that it outlives its last name. Counted per session.
    OpenHandle {
        /// The inode.
        inode: InodeId,
    },
    /// Takes back [`MdsRequest::OpenHandle`].
    CloseHandle {
        /// The inode.
        inode: InodeId,
    },
    /// Space and inodes of the file system; answered by [`MdsReply::StatFs`].
    StatFs,

    // Cairn's attributes: replicas, failure-domain, tier, chunk-size.
    /// Attributes of an inode as `key=value`, inherited ones resolved; answered by [`MdsReply::Pairs`].
    AttributesGet {
        /// The inode; a block volume's id as inode works too.
        inode: InodeId,
    },
    /// Sets one attribute; new files and directories inherit it.
    AttributeSet {
        /// The inode.
        inode: InodeId,
        /// Key.
        key: String,
        /// Value, checked.
        value: String,
    },

    // Block volumes.
    /// Creates a volume; answered by [`MdsReply::Volume`].
    VolumeCreate {
        /// Its name.
        name: String,
        /// Size in bytes.
        size: u64,
        /// Wishes.
        options: VolumeOptions,
    },
    /// Finds a volume by name, or by id written in digits; answered by [`MdsReply::Volume`].
    VolumeGet {
        /// Name or id.
        name: String,
    },
    /// Volumes after a name; answered by [`MdsReply::Volumes`].
    VolumeList {
        /// Name of the last one seen, empty at first.
        after: String,
        /// Most wanted.
        limit: u32,
    },
    /// Changes the size; shrinking asks for `shrink` and drops what lies past the end.
    VolumeResize {
        /// The volume.
        volume: VolumeId,
        /// New size in bytes.
        size: u64,
        /// Allow it to become smaller.
        shrink: bool,
    },
    /// Deletes a volume; refused while somebody holds its lease.
    VolumeDelete {
        /// The volume.
        volume: VolumeId,
    },
    /// Renames a volume.
    VolumeRename {
        /// The volume.
        volume: VolumeId,
        /// New name.
        name: String,
    },

    // Leases and chunk maps.
    /// Asks for a lease; answered by [`MdsReply::Lease`]. When another session holds it, that session is asked to give
    /// it back and the call answers [`MdsError::Held`]; the caller asks again.
    LeaseAcquire {
        /// The volume.
        volume: VolumeId,
        /// Wanted mode.
        mode: LeaseMode,
    },
    /// Gives leases back. `clean`: everything acknowledged was flushed and settled.
    LeaseRelease {
        /// Volume, epoch, clean.
        leases: Vec<(VolumeId, Epoch, bool)>,
    },
    /// Map entries from `index` on; answered by [`MdsReply::Chunks`]. Unallocated indexes are absent.
    ChunkMap {
        /// The volume.
        volume: VolumeId,
        /// First index wanted.
        index: u64,
        /// Most entries wanted.
        limit: u32,
    },
    /// Allocates chunks that do not exist yet; answered by [`MdsReply::Chunks`] with all asked for, new or not.
    ChunkAllocate {
        /// The volume.
        volume: VolumeId,
        /// The holder's epoch.
        epoch: Epoch,
        /// Indexes wanted, at most 64.
        indexes: Vec<u64>,
    },
    /// The holder cannot reach a server, or a copy there is bad: takes the server out of the replica sets of these chunks
    /// (all of the volume's when empty) in one commit. Never takes the last current replica. Answered by [`MdsReply::Chunks`] with the changed entries.
    ReplicaFailed {
        /// The volume.
        volume: VolumeId,
        /// The holder's epoch.
        epoch: Epoch,
        /// The server.
        cs: CsId,
        /// Chunks concerned; empty for all.
        chunks: Vec<ChunkId>,
    },
    /// Whole chunks of zeros: drops them from the map.
    ChunkDrop {
        /// The volume.
        volume: VolumeId,
        /// The holder's epoch.
        epoch: Epoch,
        /// First index.
        index: u64,
        /// Number of indexes.
        count: u64,
    },

    // Chunk servers.
    /// A chunk server joins or comes back; answered by [`MdsReply::CsRegistered`].
    CsRegister {
        /// Its id, none for a new server.
        cs: Option<CsId>,
        /// Uuid of its store; a known id with another uuid is refused.
        store: [u8; 16],
        /// Where clients reach it.
        addr: SocketAddr,
        /// Where it stands.
        location: Location,
        /// Tier 0 to 3.
        tier: u8,
        /// Capacity in bytes.
        capacity: u64,
        /// Repository directory, for `list-services`.
        repository: String,
    },
    /// Sent every second, and at once when an order was done; answered by [`MdsReply::Orders`].
    CsHeartbeat {
        /// The server.
        cs: CsId,
        /// Drawn at each start: tells a restart.
        boot: u64,
        /// Figures.
        stats: CsStats,
        /// Orders done since the last one.
        done: Vec<OrderDone>,
        /// Blocks found damaged since the last one: chunk and first bad block.
        damaged: Vec<(ChunkId, u32)>,
        /// The disk failed, in words.
        failed: Option<String>,
    },
    /// A piece of the list of all copies a server holds, ascending by chunk, sent after registering and hourly. The answer
    /// [`MdsReply::Orders`] deletes orphans; the last piece has `last` set.
    CsReport {
        /// The server.
        cs: CsId,
        /// Chunks above this id are covered by this piece.
        after: ChunkId,
        /// The copies.
        chunks: Vec<ChunkReport>,
        /// No more pieces follow.
        last: bool,
    },
    /// Takes a server out: drains it, or drops it at once with `force`; `cancel` stops a drain.
    CsRemove {
        /// The server.
        cs: CsId,
        /// Drop an irrecoverably lost server without draining.
        force: bool,
        /// Stop an ongoing removal.
        cancel: bool,
    },

    // Cluster.
    /// Addresses of all servers; answered by [`MdsReply::Topology`].
    Topology,
    /// The summary; answered by [`MdsReply::Stat`].
    Stat,
    /// Events after a number; answered by [`MdsReply::Events`].
    Events {
        /// Number of the last one seen.
        after: u64,
        /// Most wanted.
        limit: u32,
    },
    /// All configuration parameters; answered by [`MdsReply::Pairs`].
    ConfigList,
    /// Sets a configuration parameter, as `mds.wd.offline_tout`.
    ConfigSet {
        /// Key.
        key: String,
        /// Value, checked.
        value: String,
    },
    /// Asks for admission of a metadata server; answered by [`MdsReply::MdsAdmitted`].
    MdsAdd {
        /// Where it will listen.
        addr: SocketAddr,
        /// Repository directory.
        repository: String,
        /// Drawn by the joining server: a retry finds the same id.
        nonce: u64,
    },
    /// Removes a metadata server.
    MdsRemove {
        /// The server.
        mds: MdsId,
    },
    /// State of this very server, not the cluster's; answered by [`MdsReply::MdsStatus`].
    MdsStatus,

    // Key-value store for services.
    /// Value of a key; answered by [`MdsReply::Kv`].
    KvGet {
        /// The key.
        key: Vec<u8>,
    },
    /// Sets a key, if its revision is still `expected` (0: must not exist; none: whatever).
    KvPut {
        /// The key.
        key: Vec<u8>,
        /// The value.
        value: Vec<u8>,
        /// Revision expected.
        expected: Option<u64>,
    },
    /// Deletes a key, if its revision is still `expected`.
    KvDelete {
        /// The key.
        key: Vec<u8>,
        /// Revision expected.
        expected: Option<u64>,
    },
    /// Keys with a prefix, after a key; answered by [`MdsReply::KvList`].
    KvList {
        /// The prefix.
        prefix: Vec<u8>,
        /// Last key seen.
        after: Vec<u8>,
        /// Most wanted.
        limit: u32,
    },
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MdsReply {
    /// Done; nothing to tell.
    Done,
    /// A session and how long it lasts without renewal.
    Session {
        /// Its id.
        client: ClientId,
        /// Term in milliseconds.
        term_ms: u32,
        /// The cluster.
        cluster: ClusterId,
    },
    /// Attributes.
    Attr(Attr),
    /// A new inode, with its lease when asked for.
    Created {
        /// Attributes.
        attr: Attr,
        /// The lease.
        lease: Option<LeaseGrant>,
    },
    /// Directory entries; `end` when none follow.
    Entries {
        /// The entries.
        entries: Vec<DirEntry>,
        /// No more follow.
        end: bool,
    },
    /// Bytes.
    Bytes(Vec<u8>),
    /// Space, inodes.
    StatFs {
        /// Bytes in all, after redundancy.
        capacity: u64,
        /// Bytes free, after redundancy.
        free: u64,
        /// Inodes in use.
        inodes: u64,
    },
    /// `key`, `value` pairs.
    Pairs(Vec<(String, String)>),
    /// A volume.
    Volume(VolumeInfo),
    /// Volumes; `end` when none follow.
    Volumes {
        /// The volumes.
        volumes: Vec<VolumeInfo>,
        /// No more follow.
        end: bool,
    },
    /// A lease.
    Lease(LeaseGrant),
    /// Map entries.
    Chunks(Vec<ChunkEntry>),
    /// A chunk server is known as this.
    CsRegistered {
        /// Its id.
        cs: CsId,
        /// The cluster.
        cluster: ClusterId,
    },
    /// What to do.
    Orders(Vec<CsOrder>),
    /// All servers; `revision` grows with each change.
    Topology {
        /// Revision.
        revision: u64,
        /// Metadata servers.
        mds: Vec<MdsInfo>,
        /// Chunk servers.
        cs: Vec<CsInfo>,
    },
    /// The summary.
    Stat(Box<ClusterStat>),
    /// Events.
    Events(Vec<ClusterEvent>),
    /// Admission of a metadata server.
    MdsAdmitted {
        /// Its id.
        mds: MdsId,
        /// The cluster.
        cluster: ClusterId,
        /// Name of the cluster.
        name: String,
        /// All metadata servers, the new one included.
        servers: Vec<MdsInfo>,
    },
    /// State of one metadata server.
    MdsStatus {
        /// Its id.
        mds: MdsId,
        /// Its term.
        term: u64,
        /// Who it thinks leads.
        leader: Option<MdsId>,
        /// Last log index.
        last: u64,
        /// Commit index.
        committed: u64,
        /// Applied index.
        applied: u64,
    },
    /// A value and its revision.
    Kv {
        /// The value; none when the key is absent.
        value: Option<(Vec<u8>, u64)>,
    },
    /// Keys with values and revisions.
    KvList {
        /// The entries.
        entries: Vec<(Vec<u8>, Vec<u8>, u64)>,
        /// No more follow.
        end: bool,
    },
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum MdsError {
    /// Ask the leader.
    #[error("this metadata server does not lead")]
    NotLeader {
        /// Where the leader is, if known.
        leader: Option<SocketAddr>,
    },
    /// No majority, or the queue is full: ask again.
    #[error("the metadata servers cannot answer now: {0}")]
    Unavailable(String),
    /// The outcome is unknown (leadership was lost half-way): ask again with the same call number.
    #[error("leadership changed while the call was under way; its outcome is not known yet")]
    Unknown,
    /// The session ended: open a new one; leases are lost.
    #[error("session {0} has ended")]
    SessionEnded(ClientId),
    /// A POSIX error, as errno.
    #[error("{}", errno_text(*.0))]
    Posix(i32),
    /// The lease is held by another session, which has been asked to give it back.
    #[error("{volume} is held by {holder}")]
    Held {
        /// The volume.
        volume: VolumeId,
        /// The holder.
        holder: ClientId,
        /// True when the holder still renews; false when it is silent and will expire.
        alive: bool,
    },
    /// The caller's epoch is not the current one.
    #[error("the lease of {volume} is at {current}")]
    StaleEpoch {
        /// The volume.
        volume: VolumeId,
        /// Current epoch.
        current: Epoch,
    },
    /// Not enough chunk servers with space in different failure domains.
    #[error("no space: {0}")]
    NoSpace(String),
    /// No such thing.
    #[error("{0} does not exist")]
    NotFound(String),
    /// It exists already.
    #[error("{0} exists already")]
    Exists(String),
    /// The state of things forbids it; says what to do.
    #[error("refused: {0}")]
    Refused(String),
    /// The arguments make no sense; says which.
    #[error("invalid argument: {0}")]
    Invalid(String),
}

fn errno_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

/// Unasked news for a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Push {
    /// Somebody else wants this lease: flush, settle, release when nothing has it open for writing.
    LeaseRecall {
        /// The volume.
        volume: VolumeId,
        /// The mode wanted by the other side.
        wanted: LeaseMode,
    },
    /// Map entries of a volume changed (a replica was added or promoted).
    MapChanged {
        /// The volume.
        volume: VolumeId,
    },
    /// The size of a volume changed.
    Resized {
        /// The volume.
        volume: VolumeId,
        /// New size in bytes.
        size: u64,
    },
    /// Chunk servers came, went or moved.
    TopologyChanged,
    /// A chunk server has orders waiting: send a heartbeat now.
    OrdersWaiting,
}

/// A piece of a state image, streamed to a metadata server that lags behind the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePiece {
    /// Log index of the image.
    pub index: u64,
    /// Term of that index.
    pub term: u64,
    /// Number of this piece, from 0.
    pub piece: u64,
    /// Opaque configuration state, in the first piece.
    pub conf_state: Vec<u8>,
    /// Keys and values, ascending.
    pub pairs: Vec<(Vec<u8>, Vec<u8>)>,
    /// No more pieces follow.
    pub last: bool,
}

impl MdsRequest {
    /// True when the call changes nothing: it needs no call number and any server may answer it after a read index.
    pub fn is_read(&self) -> bool {
        use MdsRequest::*;
        matches!(
            self,
            Resolve { .. }
                | Lookup { .. }
                | GetAttr { .. }
                | Readlink { .. }
                | ReadDir { .. }
                | Parent { .. }
                | GetXattr { .. }
                | ListXattr { .. }
                | StatFs
                | AttributesGet { .. }
                | VolumeGet { .. }
                | VolumeList { .. }
                | ChunkMap { .. }
                | Topology
                | Stat
                | Events { .. }
                | ConfigList
                | MdsStatus
                | KvGet { .. }
                | KvList { .. }
        )
    }
}
