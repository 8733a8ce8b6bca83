//! What the mount needs of the client library, as traits: the real client is one implementation, the tests bring
//! another.
//!
//! A [`Runner`] is reachable from every kernel session thread and starts jobs on the client's own thread. The other two
//! traits live on that thread only. Completions may come before the call that asked for them returns.

use cairn_env::block::{BlockDone, BlockError, BlockOp};
use cairn_types::VolumeId;
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsError, MdsReply, MdsRequest};
use std::rc::Rc;

/// Called once with the answer of the metadata servers.
pub type CallDone = Box<dyn FnOnce(Result<MdsReply, MdsError>)>;
/// Called once with an open volume, or why there is none.
pub type OpenDone = Box<dyn FnOnce(Result<Rc<dyn Volume>, OpenFailure>)>;
/// Called once when a volume has been closed or released.
pub type CloseDone = Box<dyn FnOnce(Result<(), BlockError>)>;
/// A job for the client's thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// Why the content of a file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenFailure {
    /// Another client holds the lease and did not give it back in time.
    #[error("another client holds the lease: {0}")]
    Held(String),
    /// The metadata servers refused.
    #[error("metadata: {0}")]
    Mds(#[from] MdsError),
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// The content of one file under a lease.
pub trait Volume {
    /// Size of the file when the lease was granted, or what [`Volume::set_size`] said since.
    fn size(&self) -> u64;

    /// Tells the volume that the file now ends here, so that it forgets what it knew of chunks past the end.
    fn set_size(&self, size: u64);

    /// The mode of the lease, which may be more than was asked for.
    fn mode(&self) -> LeaseMode;

    /// Starts an operation; `done` is called exactly once, perhaps before this returns.
    fn submit(&self, op: BlockOp, done: BlockDone);

    /// Calls `notify` whenever somebody else asks for the lease.
    fn on_recall(&self, notify: Box<dyn FnMut(LeaseMode)>);

    /// Calls `notify` once when the lease is lost, before operations fail for it.
    fn on_lost(&self, notify: Box<dyn FnOnce()>);

    /// Flushes and settles; the lease goes back when convenient, together with others.
    fn close(&self, done: CloseDone);

    /// Flushes, settles and gives the lease back at once.
    fn release(&self, done: CloseDone);
}

/// The client on its own thread.
pub trait Backend {
    /// Calls the metadata servers; repeats until they answered or the client's deadline passed.
    fn call(&self, request: MdsRequest, done: CallDone);

    /// Acquires a lease, waiting for a recall when somebody else holds it.
    fn open(&self, volume: VolumeId, mode: LeaseMode, done: OpenDone);

    /// Takes over a lease that came with the answer to a create.
    fn adopt(&self, grant: LeaseGrant) -> Rc<dyn Volume>;

    /// The wall clock, nanoseconds since 1970: times of files come from it.
    fn wall_ns(&self) -> u64 {
        crate::attr::wall_ns()
    }
}

/// Starts jobs on the client's thread. Jobs run in the order in which one thread submits them.
pub trait Runner: Send + Sync {
    /// Runs `job` on the client's thread, inside its `LocalSet`, and gives it the backend.
    fn start(&self, job: Box<dyn FnOnce(Rc<dyn Backend>) + Send>);

    /// Runs `job` on the client's thread.
    fn run(&self, job: Job);

    /// Ends the client; called once, after the mount is gone.
    fn shutdown(&self);
}
