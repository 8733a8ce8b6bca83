//! The daemon: opens the repository and lets the reactor drive [`MdsCore`] until it is asked to stop.

use crate::base::BaseError;
use crate::core::{MdsConfig, MdsCore};
use crate::redb_base::RedbBase;
use crate::repository::{Repository, RepositoryError, log_config};
use cairn_env_real::{Disk, DiskOptions, Identity, OpenDiskError, Reactor, ReactorConfig, ReactorOptions, Stopped};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, MdsId, NodeId};
use cairn_wire::auth::ClusterKey;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

/// Memtable size that starts a checkpoint.
const CHECKPOINT_BYTES: usize = 24 << 20;

/// What the daemon is told.
pub struct RunConfig {
    /// The repository directory.
    pub dir: PathBuf,
    /// The cluster key.
    pub key: ClusterKey,
    /// Called once the socket listens.
    pub on_ready: Box<dyn FnOnce(SocketAddr)>,
}

/// Why the daemon could not run or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The image.
    #[error("{0}; this server's state is lost: remove the server from the cluster and make a new one")]
    Image(BaseError),
    /// The disk of the image is full.
    #[error("{0}; nothing is lost: make room on the disk of {dir} and start this server again", dir = .1.display())]
    NoRoom(BaseError, PathBuf),
    /// The log file.
    #[error("open the metadata log: {0}")]
    Log(#[from] OpenDiskError),
    /// The address.
    #[error("listen on {addr}: {source}; is another process using that port?")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The runtime or the ring.
    #[error("start the reactor: {0}")]
    Start(std::io::Error),
    /// The server cannot go on.
    #[error("{0}")]
    Fatal(String),
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// [`RunError`] when it cannot start, or cannot go on.
pub fn run(config: RunConfig) -> Result<(), RunError> {
    let repository = Repository::open(&config.dir)?;
    let identity = repository.identity.clone();
    let addr = identity.addr;
    let listener = TcpListener::bind(addr).map_err(|source| RunError::Listen { addr, source })?;
    let image = RedbBase::open(&config.dir.join("image.redb")).and_then(RedbBase::wait_for_room);
    let base = image.map_err(|error| match error.no_room {
        true => RunError::NoRoom(error, config.dir.clone()),
        false => RunError::Image(error),
    })?;
    let options = DiskOptions { write_through: true, ..DiskOptions::default() };
    let log = Disk::open_file(config.dir.join("log"), options)?;
    let id = MdsId(identity.id);
    let cluster: ClusterId = identity.cluster_id().unwrap_or_default();
    let mut servers = identity.servers();
    for info in servers.iter_mut().filter(|info| info.mds == id) {
        info.repository = config.dir.display().to_string();
        info.voter = identity.bootstrap;
    }
    let core_config = MdsConfig {
        id,
        cluster,
        cluster_name: identity.cluster_name.clone(),
        addr,
        repository: config.dir.display().to_string(),
        servers,
        bootstrap: identity.bootstrap,
        log: log_config(&identity),
        checkpoint_bytes: CHECKPOINT_BYTES,
    };
    let seed = u64::from_le_bytes(cairn_env_real::random_bytes());
    let core = MdsCore::new(core_config, base, Rng::new(seed));
    let reactor_config = ReactorConfig {
        identity: Identity {
            key: config.key,
            cluster_name: identity.cluster_name.clone(),
            cluster: Some(cluster),
            node: NodeId::Mds(id),
        },
        listen: vec![listener],
        disks: vec![log],
        options: ReactorOptions { send_first: true, ..ReactorOptions::default() },
    };
    let on_ready = config.on_ready;
    let stopped = cairn_env_real::block_on_local(async move {
        let reactor = Reactor::start(reactor_config, core)?;
        on_ready(addr);
        stop_on_signal(&reactor)?;
        Ok::<_, std::io::Error>(reactor.stopped().await)
    });
    match stopped.and_then(|inner| inner).map_err(RunError::Start)? {
        Stopped::Asked => Ok(()),
        Stopped::Fatal(why) => Err(RunError::Fatal(why)),
    }
}

fn stop_on_signal(reactor: &Reactor<MdsCore<RedbBase>>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let reactor = reactor.clone();
        tokio::task::spawn_local(async move {
            signals.recv().await;
            reactor.stop();
        });
    }
    Ok(())
}
