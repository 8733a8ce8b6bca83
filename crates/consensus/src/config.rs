//! What a node must know before it opens its log.

use crate::members::Member;
use crate::output::SnapshotMeta;
use cairn_env::DISK_ALIGNMENT;
use cairn_types::{ClusterId, Duration, MdsId};

/// Smallest log: below it, one group of live entries and its copy would not fit side by side.
pub const LOG_SIZE_MIN: u64 = 256 << 10;
/// Largest log: recovery reads all of it, and its live part stays in RAM.
pub const LOG_SIZE_MAX: u64 = 1 << 30;

/// Parameters of one node. `validate` states their relations.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node. Never reused in a cluster, never zero.
    pub id: MdsId,
    /// The cluster; a log or a message of another one is refused.
    pub cluster: ClusterId,
    /// Size of the log's file or region, a multiple of 4096 bytes.
    pub log_size_bytes: u64,
    /// True when a completed write is already durable (the shell opened the log with `O_DSYNC`); no flush is issued.
    pub write_through: bool,
    /// Length of one tick.
    pub tick: Duration,
    /// Ticks between two heartbeats of a leader.
    pub heartbeat_ticks: u32,
    /// A follower campaigns after `election_ticks..2 * election_ticks` silent ticks.
    pub election_ticks: u32,
    /// Append messages in flight to one follower.
    pub inflight_max: u32,
    /// Proposals waiting for the next turn.
    pub proposals_max: u32,
    /// Reads waiting for their index.
    pub reads_max: u32,
}

impl Config {
    /// The defaults: 64 MiB of log, ticks of 50 ms, heartbeats every 100 ms, elections after 0.5 to 1 s.
    pub fn new(id: MdsId, cluster: ClusterId) -> Self {
        Self {
            id,
            cluster,
            log_size_bytes: 64 << 20,
            write_through: false,
            tick: Duration::from_millis(50),
            heartbeat_ticks: 2,
            election_ticks: 10,
            inflight_max: 64,
            proposals_max: 4096,
            reads_max: 65_536,
        }
    }

    /// Asserts the relations between the parameters: they come from our own code and configuration, validated there.
    pub fn validate(&self) {
        assert!(self.id.0 != 0 && self.id.0 < NUMBER_MAX, "node id {} is out of range", self.id);
        assert!(
            (LOG_SIZE_MIN..=LOG_SIZE_MAX).contains(&self.log_size_bytes),
            "log size {} is outside {LOG_SIZE_MIN}..={LOG_SIZE_MAX}",
            self.log_size_bytes
        );
        assert!(self.log_size_bytes.is_multiple_of(DISK_ALIGNMENT), "log size {} is unaligned", self.log_size_bytes);
        assert!(self.heartbeat_ticks > 0 && self.election_ticks > self.heartbeat_ticks, "ticks out of order");
        assert!(self.inflight_max > 0 && self.proposals_max > 0 && self.reads_max > 0, "a limit is zero");
        assert!(!self.tick.is_zero(), "a tick of no length");
    }

    /// A leader refuses proposals when the uncompacted log holds more bytes than this.
    pub fn leader_live_max(&self) -> u64 {
        self.log_size_bytes / 8
    }

    /// A follower refuses entries beyond this; above the leader's limit, so that it binds only when this node lags
    /// with its own compaction.
    pub fn follower_live_max(&self) -> u64 {
        self.log_size_bytes / 6
    }

    /// Largest command in bytes. Also the soft limit of one append message.
    pub fn command_size_max(&self) -> u64 {
        (self.log_size_bytes / 32).min(1 << 20)
    }
}

/// Indexes, terms and ids stay below this, so that sums of them never overflow.
pub const NUMBER_MAX: u64 = 1 << 62;

/// What a new log starts as.
#[derive(Clone, Debug)]
pub enum Initial {
    /// The first nodes of a cluster. Each of them must be formatted with the same list.
    Bootstrap {
        /// The voters; normally the one node that creates the cluster.
        voters: Vec<Member>,
    },
    /// Empty and voting for nobody until a leader adds this node.
    Join,
    /// Begins after a state image that was made from nothing but what survived a disaster: the state machine starts
    /// with that image, and whoever joins later receives it.
    Image(SnapshotMeta),
}
