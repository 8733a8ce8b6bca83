//! What the client is told, what it promises, and its bounds.

use crate::cluster::ClusterFiles;
use cairn_types::{ClientId, ClusterId, Duration, HostId, VolumeId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::{MdsError, SessionKind};
use std::net::SocketAddr;

/// A session is renewed this often.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);
/// Term of a session, until the metadata servers say otherwise.
pub const TERM_DEFAULT: Duration = Duration::from_secs(10);
/// Part of the term given away to the drift of clocks: reads are verified from `term - DRIFT_MARGIN` on (rule 11).
pub const DRIFT_MARGIN: Duration = Duration::from_secs(1);
/// Changing calls that may be unanswered at once: as many answers as a metadata server keeps for a session.
pub const CALL_WINDOW: u64 = 256;
/// Calls that may wait in all; beyond it a call is refused at once.
pub const CALLS_MAX: usize = 16_384;
/// Requests in flight on one link to a chunk server.
pub const LINK_WINDOW: usize = 256;
/// A link that is down for this long, with no attempt under way that may yet succeed, makes its server *failed*.
pub const RECONNECT_WITHIN: Duration = Duration::from_millis(500);
/// An attempt to connect may take so long before it counts as failed.
pub const CONNECT_WITHIN: Duration = Duration::from_millis(1000);
/// A server that owes answers and says nothing for this long has failed.
pub const SILENCE_MAX: Duration = Duration::from_secs(3);
/// A single request may take so long while its server answers others.
pub const REQUEST_MAX: Duration = Duration::from_secs(15);
/// Unsettled writes of one volume; beyond it writes wait for a flush.
pub const UNSETTLED_MAX: usize = 16_384;
/// Bytes of unsettled writes of one volume; beyond it writes wait for a flush.
pub const UNSETTLED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of unsettled writes of all volumes of a client: they are kept in memory to be sent again when a server
/// restarts.
pub const UNSETTLED_TOTAL_MAX: u64 = 256 << 20;
/// Chunk map entries cached for one volume.
pub const MAP_CACHE_MAX: usize = 65_536;
/// Map entries fetched at once.
pub const MAP_RUN: u64 = 64;
/// Volumes whose lease is kept after they were closed, in case they are opened again.
pub const IDLE_LEASES_MAX: usize = 4096;
/// How long such a lease is kept.
pub const IDLE_LEASE_TIME: Duration = Duration::from_secs(30);
/// Leases given back in one call.
pub const RELEASE_BATCH: usize = 256;
/// Damaged copies rewritten at once, per volume; further ones are found again by the next read or by the scrub.
pub const REPAIRS_MAX: usize = 16;

/// What a write does when the cluster is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnNoSpace {
    /// Waits until there is space.
    Wait,
    /// Fails with [`cairn_env::block::BlockError::NoSpace`] when no server has room for a chunk or a copy of it. What
    /// some replicas took is taken back first, so copies stay equal and hold what they held before.
    Fail,
}

/// How ranges are checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeRule {
    /// A device: ranges lie inside the volume.
    Fixed,
    /// The content of a file: any range below 2^62; the front end clips reads to the file's size.
    File,
}

/// All that a front end says to become a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Name of the cluster.
    pub cluster_name: String,
    /// Its key.
    pub key: ClusterKey,
    /// Its identity, when known; another one is then refused.
    pub cluster: Option<ClusterId>,
    /// Metadata servers to try first; the rest is learnt.
    pub mds: Vec<SocketAddr>,
    /// Identity of this host.
    pub host: HostId,
    /// Name of this host.
    pub host_name: String,
    /// What this client is, for people: `mount /mnt/stor1`.
    pub purpose: String,
    /// Holder of leases or mere caller.
    pub kind: SessionKind,
    /// What writes do when the cluster is full.
    pub on_no_space: OnNoSpace,
    /// Where the addresses of the metadata servers are kept for the next start on this host when they change.
    pub keep_servers: Option<ClusterFiles>,
}

impl ClientConfig {
    /// The part the core needs, with the usual deadlines.
    pub fn core(&self) -> CoreConfig {
        CoreConfig {
            mds: self.mds.clone(),
            host: self.host,
            host_name: self.host_name.clone(),
            purpose: self.purpose.clone(),
            kind: self.kind,
            on_no_space: self.on_no_space,
            call_deadline: Duration::from_secs(60),
            open_deadline: Duration::from_secs(30),
        }
    }
}

/// What [`crate::ClientCore`] is told.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Metadata servers to try first.
    pub mds: Vec<SocketAddr>,
    /// Identity of this host.
    pub host: HostId,
    /// Name of this host.
    pub host_name: String,
    /// What this client is, for people.
    pub purpose: String,
    /// Holder of leases or mere caller.
    pub kind: SessionKind,
    /// What writes do when the cluster is full.
    pub on_no_space: OnNoSpace,
    /// How long a call is retried before it fails. Calls the data path makes for itself are retried for ever.
    pub call_deadline: Duration,
    /// How long a lease is asked for while another client holds it.
    pub open_deadline: Duration,
}

/// Why a volume was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another client holds the lease and did not give it back in time.
    #[error("{volume} is in use by {holder}")]
    Held {
        /// The volume.
        volume: VolumeId,
        /// Its holder.
        holder: ClientId,
    },
    /// This client has it open for reading and cannot write at the same time.
    #[error("{0} is open for reading in this client; close it there before opening it for writing")]
    InUse(VolumeId),
    /// The metadata servers refused.
    #[error("open: {0}")]
    Mds(#[from] MdsError),
    /// The lease was lost again before the volume was ready.
    #[error("the lease of {0} was taken over while it was opened")]
    Fenced(VolumeId),
    /// The client is shutting down.
    #[error("the client is shutting down")]
    Closed,
}

/// Why no client came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No address to try.
    #[error("no metadata server is known; see `bs.list`")]
    NoServers,
    /// Nobody answered as wanted.
    #[error("no metadata server of cluster {cluster} let this client in: {reason}")]
    Unreachable {
        /// The cluster.
        cluster: String,
        /// What the last attempts ended with.
        reason: String,
    },
    /// The session was refused.
    #[error("open a session: {0}")]
    Refused(MdsError),
    /// The operating system refused a thread, a socket or random numbers.
    #[error("start the client")]
    Io(#[from] std::io::Error),
}
