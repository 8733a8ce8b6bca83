//! Calls to the metadata servers. Declared schema, encoded with postcard; version the enums by appending variants only.
//!
//! Any metadata server takes any call: a follower answers [`MdsError::NotLeader`] with the leader's address for calls
//! that change something. A changing call carries the session and a call number, so that a retry after a lost answer
//! takes effect once (I18): the state machine remembers the answers a session has not acknowledged yet.

use cairn_types::{ChunkId, ClientId, ClusterId, CsId, Epoch, HostId, InodeId, Level, MdsId, VolumeId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

mod types;

pub use types::*;

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
    /// The caller's session; zero before [`MdsRequest::SessionOpen`] answered and for read-only calls without a
    /// session.
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

/// What a chunk server says of itself when it joins or comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CsProfile {
    /// Its id, none for a new server.
    pub cs: Option<CsId>,
    /// Uuid of its store; a known id with another uuid is refused.
    pub store: [u8; 16],
    /// Where clients reach it.
    pub addr: SocketAddr,
    /// Where it stands.
    pub location: Location,
    /// Tier 0 to 3.
    pub tier: u8,
    /// Capacity in bytes.
    pub capacity: u64,
    /// Repository directory, for `list-services`.
    pub repository: String,
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
    /// Creates a file, directory or node; answered by [`MdsReply::CreatedIn`]. With `lease` a file's exclusive lease
    /// comes along.
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
    /// Removes an empty directory; the answer is what its attributes are without a name.
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
    /// Entries of a directory after `cookie` (0: from the start, without `.` and `..`); answered by
    /// [`MdsReply::Entries`].
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
    /// Sets attributes, all of them or none; new files and directories inherit them.
    AttributesSet {
        /// The inode.
        inode: InodeId,
        /// Keys and values, checked.
        pairs: Vec<(String, String)>,
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
    /// The holder cannot reach a server, or a copy there is bad: takes the server out of the replica sets of these
    /// chunks (all of the volume's when empty) in one commit. Never takes the last current replica. Answered by
    /// [`MdsReply::Chunks`] with the changed entries.
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
    /// A chunk server joins or comes back, without saying where its store stands; answered by
    /// [`MdsReply::CsRegistered`]. Sent by earlier servers, refused from a server that has said it once.
    CsRegister(CsProfile),
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
    /// A piece of the list of all copies a server holds, ascending by chunk, sent after registering and hourly. The
    /// answer [`MdsReply::Orders`] deletes orphans; the last piece has `last` set.
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
    /// Sets configuration parameters, as `mds.wd.offline_tout`; all of them or none.
    ConfigSet {
        /// Keys and values, checked.
        pairs: Vec<(String, String)>,
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

    /// A server has no room for what the holder writes to a chunk: another one is to get a copy. Where enough copies
    /// are left the full server leaves the set at once, else when the new copy is complete. Answered by
    /// [`MdsReply::Chunks`] with the entry, unchanged while a copy is being made or all that have room are busy, and by
    /// [`MdsError::NoSpace`] when no server has room.
    ReplicaFull {
        /// The volume.
        volume: VolumeId,
        /// The holder's epoch.
        epoch: Epoch,
        /// The full server.
        cs: CsId,
        /// The chunk.
        chunk: ChunkId,
    },

    /// A page of the whole state at one index, for a backup: asked of the leader, pages in order from 0. Answered by
    /// [`MdsReply::StatePage`]. One backup is under way at a time.
    StatePage {
        /// Drawn by the caller: names its backup.
        token: u64,
        /// Number of the page; the last one may be asked for again.
        page: u64,
    },
    /// A chunk server joins or comes back, and says which of all states of its store this one is; answered by
    /// [`MdsReply::CsRegistered`], or by [`MdsReply::CsTurnedAway`] when it is not the one the cluster last knew. Sent
    /// again with `previous` equal to `nonce` once the first answer is durable in the store: only then it serves.
    CsJoin {
        /// Who it is.
        server: CsProfile,
        /// Where its store stands.
        lineage: Lineage,
    },
    /// How much of its store's log is durable: a copy with less is an older one. Answered by [`MdsReply::Done`].
    CsMark {
        /// The server.
        cs: CsId,
        /// Drawn at each start.
        boot: u64,
        /// The highest durable log sequence number.
        durable: u64,
    },
    /// What removing a server would mean, a piece of its copies at a time; answered by [`MdsReply::CsExamined`].
    CsExamine {
        /// The server.
        cs: CsId,
        /// Copies of this volume and later ones.
        volume: VolumeId,
        /// Copies of this index in it and later ones.
        index: u64,
    },
    /// Drops a server at once, with the only current copies of chunks on it: what needs them is lost. All else is
    /// refused as in [`MdsRequest::CsRemove`] with `force`.
    CsAbandon {
        /// The server.
        cs: CsId,
    },
    /// A removed server gets a new, empty store and is of the cluster again, with its id; answered by
    /// [`MdsReply::CsReplaced`].
    CsReplace {
        /// The server.
        cs: CsId,
        /// Uuid of the new store.
        store: [u8; 16],
    },
    /// A metadata server tells the leader, every second, how it is. Not answered.
    MdsReport {
        /// The server.
        mds: MdsId,
        /// Little room is left, or none.
        short: bool,
        /// Bytes free on the disk of its repository.
        free: u64,
        /// It has lost its state, not its log: it wants an image that contains this index. Zero otherwise.
        state_wanted: u64,
    },
    /// Release levels of the cluster and of everybody in it, as the leader hears them; answered by
    /// [`MdsReply::Levels`].
    Levels,
    /// Raises the cluster to the next level: there is no way back. Refused while somebody is not at it.
    LevelRaise {
        /// The level.
        level: Level,
    },
    /// How busy a chunk server is; answered by [`MdsReply::Done`]. Of [`Level::BUSY`].
    CsBusy {
        /// The server.
        cs: CsId,
        /// Share of the time with requests of clients under way, in thousandths.
        busy: u16,
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
    /// A new inode, with its lease when asked for. Given by earlier servers.
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
    /// A new inode, with its lease when asked for, and what became of the directory.
    CreatedIn {
        /// Attributes.
        attr: Attr,
        /// The lease.
        lease: Option<LeaseGrant>,
        /// Attributes of the directory, after the creation.
        parent: Attr,
    },
    /// A page of the state; one without pairs that is ready is the end.
    StatePage {
        /// Log index at which the state stands.
        index: u64,
        /// Term of that entry.
        term: u64,
        /// Keys and values, ascending.
        pairs: Vec<(Vec<u8>, Vec<u8>)>,
        /// False: the state is being written down; ask for the same page again in a moment.
        ready: bool,
    },
    /// The store of this chunk server is an older or a second copy: it must stop, nothing of it is used.
    CsTurnedAway {
        /// What was found, and what to do.
        reason: String,
    },
    /// What removing a server would mean.
    CsExamined {
        /// Current copies on it in this piece.
        chunks: u64,
        /// Volumes and files with chunks that have no other current copy in reach, ascending by volume.
        lost: Vec<LostChunks>,
        /// Where to ask on; none at the end.
        next: Option<(VolumeId, u64)>,
        /// Why it cannot be drained, if it cannot.
        drain: Option<String>,
        /// Why it cannot be dropped by force, whatever is on it, if it cannot.
        force: Option<String>,
    },
    /// A server has its new store.
    CsReplaced {
        /// Copies of the old store that chunks still name: nobody may take the new store for one that holds them. Ask
        /// again while this is not zero.
        left: u64,
    },
    /// Release levels.
    Levels {
        /// Of the cluster: what may be used.
        cluster: Level,
        /// Of the leader that answers.
        leader: Level,
        /// Of all others: metadata servers, chunk servers, clients.
        members: Vec<MemberLevel>,
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
    /// The lowest release level that knows the request: it is sent only in clusters at that level.
    pub fn level(&self) -> Level {
        match self {
            Self::CsBusy { .. } => Level::BUSY,
            _ => Level::FIRST,
        }
    }

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
                | CsExamine { .. }
                | Topology
                | Stat
                | Events { .. }
                | ConfigList
                | MdsStatus
                | KvGet { .. }
                | KvList { .. }
                | StatePage { .. }
                | Levels
        )
    }
}
