//! The daemon: opens the directory, listens, and drives a [`CsCore`] with the real reactor.

use crate::core::{CsConfig, CsCore};
use crate::repository::{Repository, RepositoryError};
use cairn_env_real::{Disk, DiskOptions, Identity, OpenDiskError, Reactor, ReactorConfig, ReactorOptions, Stopped};
use cairn_stdx::Rng;
use cairn_store::{Store, StoreOptions};
use cairn_types::{CsId, Duration, NodeId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::Location;
use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::rc::Rc;

/// How long a planned stop may take to leave a fresh checkpoint behind.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long the store file of a locked directory may stay locked, and how often to look.
const RING_PATIENCE: Duration = Duration::from_secs(10);
const RING_POLL: Duration = Duration::from_millis(5);

/// What the daemon is told.
#[derive(Clone, Debug)]
pub struct CsRunConfig {
    /// The repository directory.
    pub dir: PathBuf,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Its key.
    pub key: ClusterKey,
    /// Addresses of metadata servers.
    pub mds: Vec<SocketAddr>,
    /// Address to listen on; port 0 takes any free one, none any address.
    pub listen: Option<SocketAddr>,
    /// Name of this host, for people.
    pub host_name: String,
    /// Rack, row, room, site; empty where none is given.
    pub place: [String; 4],
    /// Every write is durable before its answer.
    pub durable_always: bool,
    /// Chunks the scrub verifies a minute.
    pub scrub_chunks_per_minute: u32,
    /// Microseconds to look for more work before sleeping.
    pub spin_us: u32,
    /// Memory for the index.
    pub cache_bytes: u64,
}

impl CsRunConfig {
    /// The defaults for a directory of a cluster.
    pub fn new(dir: PathBuf, cluster_name: String, key: ClusterKey, mds: Vec<SocketAddr>) -> Self {
        Self {
            dir,
            cluster_name,
            key,
            mds,
            listen: None,
            host_name: String::new(),
            place: Default::default(),
            durable_always: false,
            scrub_chunks_per_minute: 2,
            spin_us: 0,
            cache_bytes: StoreOptions::default().cache_bytes,
        }
    }
}

/// Why the daemon did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CsRunError {
    /// The directory.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The store file or device.
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
    /// No metadata server is known.
    #[error("no metadata server of cluster {0} is known on this host; run `cairn -c {0} auth-node` first")]
    NoMds(String),
    /// The address cannot be listened on.
    #[error("listen on {addr}{}", if .source.kind() == io::ErrorKind::AddrInUse { " (another process uses this address: give another port with -a)" } else { "" })]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The reactor.
    #[error("start the reactor")]
    Reactor(#[source] io::Error),
    /// The server cannot go on.
    #[error("{0}")]
    Fatal(String),
}

/// A chunk server running on this thread.
pub struct RunningCs {
    /// Drives it.
    pub reactor: Reactor<CsCore>,
    /// Where it listens, as told to the cluster.
    pub addr: SocketAddr,
}

/// Starts the server of a directory on this thread, inside a `LocalSet`.
///
/// # Errors
/// [`CsRunError`] saying what is wrong and what to do.
pub async fn start(config: &CsRunConfig) -> Result<RunningCs, CsRunError> {
    let repository = Repository::open(&config.dir, &config.cluster_name)?;
    let identity = repository.identity().clone();
    let mds_known = repository.mds_list()?;
    if config.mds.is_empty() && mds_known.is_empty() {
        return Err(CsRunError::NoMds(config.cluster_name.clone()));
    }
    let disk = open_store(&repository).await?;
    let wanted = config.listen.unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
    let listener = TcpListener::bind(wanted).map_err(|source| CsRunError::Listen { addr: wanted, source })?;
    let some_mds = *config.mds.first().or(mds_known.first()).expect("looked at above");
    let addr = announced_address(&listener, some_mds).map_err(|source| CsRunError::Listen { addr: wanted, source })?;
    let options = StoreOptions {
        cluster: Some(identity.cluster),
        store_uuid: Some(identity.store),
        cache_bytes: config.cache_bytes,
        ..StoreOptions::default()
    };
    let store = Store::new(disk.size(), options);
    let [rack, row, room, site] = config.place.clone();
    let core = CsConfig {
        cs: identity.cs,
        level: cairn_env_real::release_level(),
        cluster: identity.cluster,
        store: identity.store,
        addr,
        location: Location { host: identity.host, host_name: config.host_name.clone(), rack, row, room, site },
        tier: identity.tier,
        capacity: 0,
        repository: config.dir.display().to_string(),
        mds: config.mds.clone(),
        mds_known,
        durable_always: config.durable_always,
        scrub_chunks_per_minute: config.scrub_chunks_per_minute,
    };
    let seed = u64::from_le_bytes(cairn_env_real::random_bytes());
    let core = CsCore::new(core, store, Rng::new(seed));
    let reactor_config = ReactorConfig {
        identity: Identity {
            key: config.key.clone(),
            cluster_name: config.cluster_name.clone(),
            cluster: Some(identity.cluster),
            node: NodeId::Cs(identity.cs.unwrap_or(CsId(0))),
        },
        listen: vec![listener],
        disks: vec![disk],
        options: ReactorOptions { spin_us: config.spin_us, ..ReactorOptions::default() },
    };
    let reactor = Reactor::start(reactor_config, core).map_err(CsRunError::Reactor)?;
    keep_what_is_told(&reactor, repository);
    Ok(RunningCs { reactor, addr })
}

/// Opens the store file. The directory is locked already, so a lock on the file is the kernel's, which is still taking
/// apart the disk ring of the process before.
async fn open_store(repository: &Repository) -> Result<Disk, CsRunError> {
    let mut patience = RING_PATIENCE;
    loop {
        match Disk::open_file(repository.store_path(), DiskOptions::default()) {
            Err(OpenDiskError::InUse { .. }) if !patience.is_zero() => {
                tokio::time::sleep(RING_POLL).await;
                patience = patience.saturating_sub(RING_POLL);
            }
            other => return Ok(other?),
        }
    }
}

/// Writes down the id when the cluster gives one and the addresses of its metadata servers when they change, and keeps
/// the directory locked for as long as the reactor lives.
fn keep_what_is_told(reactor: &Reactor<CsCore>, mut repository: Repository) {
    let mut known: Vec<SocketAddr> = reactor.peek(|core| core.mds_servers().to_vec());
    reactor.after_turn(move |reactor| {
        // Cheap after every turn: a few words are compared.
        if reactor.peek(|core| core.mds_servers() != known) {
            known = reactor.peek(|core| core.mds_servers().to_vec());
            if let Err(error) = repository.set_mds_list(&known) {
                // They are told again after each start that finds one of them.
                let text = format!("writing down the addresses of the metadata servers: {error}");
                cairn_env_real::log::write_line(&text);
            }
        }
        let Some(cs) = reactor.peek(|core| core.id()) else { return };
        if repository.identity().cs == Some(cs) {
            return;
        }
        reactor.set_identity_node(NodeId::Cs(cs));
        if let Err(error) = repository.set_cs(cs) {
            // Not knowing its id after a restart is harmless: the cluster knows the store by its uuid.
            cairn_env_real::log::write_line(&format!("writing down the id {cs}: {error}"));
        }
    });
}

/// The address to tell the cluster: the one listened on, or, when that is any address, the one that reaches the
/// metadata servers.
fn announced_address(listener: &TcpListener, mds: SocketAddr) -> io::Result<SocketAddr> {
    let mut addr = listener.local_addr()?;
    if addr.ip().is_unspecified() {
        let any: IpAddr = if mds.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let probe = UdpSocket::bind((any, 0))?;
        // Connecting a datagram socket sends nothing; it only asks the routing table.
        probe.connect(mds)?;
        addr.set_ip(probe.local_addr()?.ip());
    }
    Ok(addr)
}

impl RunningCs {
    /// Stops the server, leaving a checkpoint behind so that the next start has nothing to replay.
    pub async fn stop(&self) {
        let stopped = Rc::new(tokio::sync::Notify::new());
        let signal = Rc::new(RefCell::new(Some(Rc::clone(&stopped))));
        self.reactor.with(|core, now, out| core.prepare_stop(now, out));
        self.reactor.after_turn(move |reactor| {
            if signal.borrow().is_some() && reactor.peek(|core| core.is_ready_to_stop()) {
                signal.borrow_mut().take().expect("looked at above").notify_one();
            }
        });
        let _ = tokio::time::timeout(STOP_PATIENCE, stopped.notified()).await;
        self.reactor.stop();
    }
}

/// Runs the daemon until it is asked to stop (SIGTERM, SIGINT) or cannot go on.
///
/// # Errors
/// [`CsRunError`] saying what is wrong and what to do.
pub fn run(config: &CsRunConfig) -> Result<(), CsRunError> {
    let ran = cairn_env_real::block_on_local(async {
        let running = start(config).await?;
        cairn_env_real::log::write_line(&format!(
            "chunk server in {} listens on {}",
            config.dir.display(),
            running.addr
        ));
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(CsRunError::Reactor)?;
        tokio::select! {
            biased;
            stopped = running.reactor.stopped() => match stopped {
                Stopped::Fatal(reason) => return Err(CsRunError::Fatal(reason)),
                Stopped::Asked => return Ok(()),
            },
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        running.stop().await;
        Ok(())
    });
    ran.map_err(CsRunError::Reactor)?
}
