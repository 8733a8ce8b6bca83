//! Effects and reports of the core: plain data for the shell and the simulator.

use crate::error::OpenError;
use crate::members::{Change, Members};
use cairn_env::{DiskError, DiskRequest};
use cairn_types::MdsId;

/// Everything one or more calls want done. The shell drains it after each turn; the core only appends.
#[derive(Debug, Default)]
pub struct Output {
    /// Requests to the log's disk.
    pub disk: Vec<DiskRequest>,
    /// Messages to peers. Losing, repeating or reordering them is harmless.
    pub send: Vec<(MdsId, Vec<u8>)>,
    /// Committed entries for the state machine, in index order, each once.
    pub committed: Vec<Committed>,
    /// Proposals whose outcome this node cannot tell: leadership was lost before they committed.
    pub dropped: Vec<u64>,
    /// The latest change of role, if any.
    pub role: Option<RoleChange>,
    /// Reads that may be served once the state machine has applied the index beside the token.
    pub read_ready: Vec<(u64, u64)>,
    /// Reads that found no leader or no majority in time; they may be asked again.
    pub read_dropped: Vec<u64>,
    /// Followers that need a state image. Each must be answered by `snapshot_sent`.
    pub snapshot_wanted: Vec<SnapshotWanted>,
    /// The installation asked for by `prepare_snapshot` may begin.
    pub snapshot_prepared: Option<SnapshotMeta>,
    /// Opening is over.
    pub opened: Option<Result<Opened, OpenError>>,
    /// The log's disk failed. The core does nothing any more; the process should end or the node be replaced.
    pub failed: Option<DiskError>,
}

/// What was found when the log opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Instance drawn when the log was formatted; goes into `Member` when this node joins a group.
    pub instance: u64,
    /// Term.
    pub term: u64,
    /// Index before the first entry held.
    pub base: u64,
    /// Last entry held.
    pub last: u64,
    /// Bytes of a torn last group that were cut, zero when the log ended cleanly.
    pub cut_bytes: u64,
}

/// One entry for the state machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its index; indexes are consecutive.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The token of `propose` when this node proposed it and still leads.
    pub token: Option<u64>,
    /// Its content.
    pub kind: CommittedKind,
}

/// What a committed entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommittedKind {
    /// A command.
    Command(Vec<u8>),
    /// A configuration change and the configuration after it.
    Change {
        /// The step.
        change: Change,
        /// The configuration now in force.
        members: Members,
    },
    /// The first entry of a new leader. It moves the index on and says nothing.
    Noop,
}

/// Who leads.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RoleChange {
    /// The leader, as far as this node knows.
    pub leader: Option<MdsId>,
    /// The term.
    pub term: u64,
    /// True when this node leads.
    pub we_are_leader: bool,
}

/// A place in the log where a state image was or will be taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotMeta {
    /// Last index the image contains.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// Configuration at that index.
    pub members: Members,
}

/// A follower lacks entries that are compacted here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotWanted {
    /// The follower.
    pub to: MdsId,
    /// The image must contain at least this index; its exact place is the shell's choice (`snapshot_meta`).
    pub index_min: u64,
}

/// Role of a node.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Role {
    /// Follows a leader or waits for one.
    #[default]
    Follower,
    /// Asks whether an election could succeed.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// A picture of the node for people and policies.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Status {
    /// This node.
    pub id: MdsId,
    /// Instance of its log.
    pub instance: u64,
    /// Its role.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// The leader it knows.
    pub leader: Option<MdsId>,
    /// Index before the first entry held.
    pub base: u64,
    /// Last entry held.
    pub last: u64,
    /// Last entry durable here.
    pub persisted: u64,
    /// Last entry known to be committed.
    pub committed: u64,
    /// Last entry the shell reported as applied.
    pub applied: u64,
    /// Bytes of uncompacted entries.
    pub live_bytes: u64,
    /// Bytes of the ring in use.
    pub used_bytes: u64,
    /// The configuration in force here.
    pub members: Members,
    /// True when the group knows this id under another instance: this log was wiped and must never vote.
    pub impostor: bool,
    /// True when the state machine lacks what made its state: it needs an image, which must contain more than `base`.
    pub state_lost: bool,
    /// Progress of the others; only a leader knows it.
    pub peers: Vec<PeerStatus>,
}

/// A leader's view of one peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub id: MdsId,
    /// Last entry known to be durable there.
    pub matched: u64,
    /// Entries it lacks.
    pub lag: u64,
    /// True when it answered since the last check of the quorum.
    pub active: bool,
    /// True while it waits for a state image.
    pub in_snapshot: bool,
}
