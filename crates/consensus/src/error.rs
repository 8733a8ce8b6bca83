//! What can be refused, and why.

use crate::members::ChangeError;
use cairn_env::DiskError;
use cairn_types::{ClusterId, MdsId};

/// Why a log does not open. None of these is repaired silently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The log cannot be read.
    #[error("read the consensus log")]
    Read(#[source] DiskError),
    /// No group of records anywhere: never formatted, or wiped.
    #[error("the region holds no consensus log; format it, under a new node id if this node was a member before")]
    NotFormatted,
    /// Written by a newer release.
    #[error("the log at offset {offset} has format version {found}, this release reads {supported}")]
    Version {
        /// Where the group lies.
        offset: u64,
        /// Its version.
        found: u16,
        /// Ours.
        supported: u16,
    },
    /// The log belongs to another cluster.
    #[error("the log belongs to cluster {found}, not to {expected}")]
    OtherCluster {
        /// Cluster in the log.
        found: ClusterId,
        /// Cluster asked for.
        expected: ClusterId,
    },
    /// The log belongs to another node.
    #[error("the log belongs to {found}, not to {expected}")]
    OtherNode {
        /// Node in the log.
        found: MdsId,
        /// Node asked for.
        expected: MdsId,
    },
    /// A record is bad though later ones are good: rot, not a torn tail. The node must be replaced, not truncated.
    #[error("the log is corrupt at offset {offset} (group {sequence}; later groups are intact): {what}")]
    Corrupt {
        /// Where the bad group lies or should lie.
        offset: u64,
        /// Its number.
        sequence: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The state machine is older than the start of the log.
    #[error("the state machine has applied {applied}, but the log starts after {base}")]
    StateBehindLog {
        /// Index the state machine holds.
        applied: u64,
        /// Base of the log.
        base: u64,
    },
    /// The state machine is newer than the end of the log: the log lost acknowledged entries.
    #[error("the state machine has applied {applied}, but the log ends at {last}: the log lost entries")]
    StateAheadOfLog {
        /// Index the state machine holds.
        applied: u64,
        /// Last index of the log.
        last: u64,
    },
}

/// This node does not lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the leader (leader: {leader:?})")]
pub struct NotLeader {
    /// Who leads, as far as this node knows.
    pub leader: Option<MdsId>,
}

/// Why a proposal is refused. Nothing was started: it may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another node leads, or none.
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
    /// Too many proposals wait for the next turn.
    #[error("the proposal queue is full")]
    QueueFull,
    /// The log has no room until the state machine is durable further on and `compact` says so.
    #[error("the log is full until it is compacted")]
    LogFull,
    /// Empty, or larger than one entry may be.
    #[error("a command has 1 to {max} bytes, this one has {size}")]
    Size {
        /// Bytes of the command.
        size: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// Leadership is being handed over.
    #[error("leadership is being transferred")]
    Transferring,
    /// Another configuration change is not applied yet.
    #[error("another configuration change is pending")]
    ChangePending,
    /// The leader cannot remove itself: transfer leadership first.
    #[error("the leader cannot remove itself; transfer leadership first")]
    RemoveLeader,
    /// The change makes no sense in the current configuration.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The log is not open or its disk failed.
    #[error("the log is not open")]
    Closed,
}

/// Why a read index is not even asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadIndexError {
    /// Too many reads wait.
    #[error("too many reads wait for their index")]
    QueueFull,
    /// The log is not open or its disk failed.
    #[error("the log is not open")]
    Closed,
}

/// Why a message is refused. The connection may go on; the sender's problem is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The bytes are no message of ours.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// Version of another release.
    #[error("message version {0} is not supported")]
    Version(u16),
    /// Meant for another cluster.
    #[error("message of cluster {0}")]
    OtherCluster(ClusterId),
    /// Sent by or to somebody else than the connection says.
    #[error("message from {from} to {to} on a connection from {expected}")]
    Misdirected {
        /// Sender in the message.
        from: MdsId,
        /// Addressee in the message.
        to: MdsId,
        /// Peer of the connection.
        expected: MdsId,
    },
    /// The sender lost its log: its vote or acknowledgement must not count.
    #[error("{from} has instance {found:#x}, the group knows {expected:#x}: its log was wiped, it needs a new id")]
    OtherInstance {
        /// Sender.
        from: MdsId,
        /// Instance in the message.
        found: u64,
        /// Instance in the configuration.
        expected: u64,
    },
    /// A leader says that entries are committed which this node acknowledged and no longer has: its log went back.
    #[error("index {committed} is committed and was acknowledged by this node, but its log ends at {last}")]
    LogWentBack {
        /// Committed index.
        committed: u64,
        /// Last index here.
        last: u64,
    },
    /// A follower claims entries that its leader never had.
    #[error("{from} acknowledges index {index}, the leader's log ends at {last}")]
    BeyondLog {
        /// Follower.
        from: MdsId,
        /// Index it acknowledges.
        index: u64,
        /// Last index here.
        last: u64,
    },
    /// No room for the entries until this node compacts; the leader sends them again.
    #[error("the log is full until it is compacted")]
    LogFull,
    /// The log is not open or its disk failed.
    #[error("the log is not open")]
    Closed,
}

/// Why a state image cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The state machine has as much already.
    #[error("the image is at {index}, this node has emitted {emitted}")]
    Old {
        /// Index of the image.
        index: u64,
        /// Index this node has reached.
        emitted: u64,
    },
    /// This node is not in the image's configuration.
    #[error("this node is not a member in the image's configuration")]
    NotMember,
    /// This node leads and knows nothing of the image.
    #[error("this node leads, and the image at {index} is not of its log")]
    NotInLog {
        /// Index of the image.
        index: u64,
    },
    /// Another installation is under way.
    #[error("another installation is under way")]
    Busy,
    /// `install_snapshot` without `snapshot_prepared`, or for another image.
    #[error("this installation was not prepared")]
    NotPrepared,
    /// Numbers out of range.
    #[error("the image's index or term is zero or out of range")]
    Invalid,
    /// The log is not open or its disk failed.
    #[error("the log is not open")]
    Closed,
}
