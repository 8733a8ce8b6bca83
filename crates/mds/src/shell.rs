//! The daemon: opens the repository and lets the reactor drive [`MdsCore`] until it is asked to stop.

use crate::base::BaseError;
use crate::core::{MdsConfig, MdsCore};
use crate::redb_base::{RedbBase, contain};
use crate::repository::{Repository, RepositoryError, log_config};
use cairn_env_real::{Disk, DiskOptions, Identity, OpenDiskError, Reactor, ReactorConfig, ReactorOptions, Stopped};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, Duration, Instant, MdsId, NodeId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::{Effects, Event, Now, Process};
use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;

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
    #[error("{0}; the image was neither used nor changed")]
    Image(BaseError),
    /// The image is damaged again and again.
    #[error(
        "{0}; image after image is damaged on the disk of {dir}: replace the disk, remove this server with `cairn rm-mds`, \
         and make a new one",
        dir = .1.display()
    )]
    Damaged(BaseError, PathBuf),
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

/// Images that may be found damaged in one run of the process; then the disk itself is not to be trusted.
const DAMAGES_MAX: u32 = 3;
/// How often the shell looks whether there are other metadata servers than it wrote down.
const SERVERS_PERIOD: Duration = Duration::from_secs(1);

/// How a run of the core ended.
enum Ended {
    Asked,
    Fatal(String),
    /// The image is damaged.
    Damaged(String),
}

/// Runs the daemon until SIGTERM or SIGINT. A damaged image is put aside, and the server gets its state from another.
///
/// # Errors
/// [`RunError`] when it cannot start, or cannot go on.
pub fn run(config: RunConfig) -> Result<(), RunError> {
    let repository = Rc::new(RefCell::new(Repository::open(&config.dir)?));
    let mut on_ready = Some(config.on_ready);
    let mut damages = 0;
    loop {
        let ended = run_core(&repository, &config.key, &mut on_ready)?;
        let why = match ended {
            Ended::Asked => return Ok(()),
            Ended::Fatal(why) => return Err(RunError::Fatal(why)),
            Ended::Damaged(why) => why,
        };
        damages += 1;
        if damages > DAMAGES_MAX {
            let error = BaseError { what: why, no_room: false, damaged: true };
            return Err(RunError::Damaged(error, config.dir));
        }
        let aside = repository.borrow().put_image_aside()?;
        cairn_env_real::log::write_line(&format!(
            "the metadata image is damaged ({why}); {aside}, and another metadata server is asked for the state"
        ));
    }
}

fn run_core(
    repository: &Rc<RefCell<Repository>>,
    key: &ClusterKey,
    on_ready: &mut Option<Box<dyn FnOnce(SocketAddr)>>,
) -> Result<Ended, RunError> {
    let (dir, identity) = (repository.borrow().dir.clone(), repository.borrow().identity.clone());
    let addr = identity.addr;
    let listener = TcpListener::bind(addr).map_err(|source| RunError::Listen { addr, source })?;
    let base = match RedbBase::open(&dir.join("image.redb")).and_then(RedbBase::wait_for_room) {
        Ok(base) => base,
        Err(error) if error.damaged => return Ok(Ended::Damaged(error.what)),
        Err(error) if error.no_room => return Err(RunError::NoRoom(error, dir)),
        Err(error) => return Err(RunError::Image(error)),
    };
    let options = DiskOptions { write_through: true, ..DiskOptions::default() };
    let log = Disk::open_file(dir.join("log"), options)?;
    let id = MdsId(identity.id);
    let cluster: ClusterId = identity.cluster_id().unwrap_or_default();
    let mut servers = identity.servers();
    for info in servers.iter_mut().filter(|info| info.mds == id) {
        info.repository = dir.display().to_string();
        info.voter = identity.bootstrap;
    }
    let core_config = MdsConfig {
        id,
        level: cairn_env_real::release_level(),
        cluster,
        cluster_name: identity.cluster_name.clone(),
        addr,
        repository: dir.display().to_string(),
        servers,
        bootstrap: identity.bootstrap,
        log: log_config(&identity),
        checkpoint_bytes: CHECKPOINT_BYTES,
    };
    let seed = u64::from_le_bytes(cairn_env_real::random_bytes());
    let core = match contain(|| MdsCore::new(core_config, base, Rng::new(seed))) {
        Ok(core) => core,
        Err(error) => return Ok(Ended::Damaged(error.what)),
    };
    let reactor_config = ReactorConfig {
        identity: Identity {
            key: key.clone(),
            cluster_name: identity.cluster_name.clone(),
            cluster: Some(cluster),
            node: NodeId::Mds(id),
        },
        listen: vec![listener],
        disks: vec![log],
        options: ReactorOptions { send_first: true, ..ReactorOptions::default() },
    };
    let damage = Rc::new(RefCell::new(None));
    let repository = Rc::clone(repository);
    let watched = Watched { core: Some(core), damage: Rc::clone(&damage), repository, looked: Instant(0) };
    let stopped = cairn_env_real::block_on_local(async move {
        let reactor = Reactor::start(reactor_config, watched)?;
        if let Some(on_ready) = on_ready.take() {
            on_ready(addr);
        }
        stop_on_signal(&reactor)?;
        Ok::<_, std::io::Error>(reactor.stopped().await)
    });
    let stopped = stopped.and_then(|inner| inner).map_err(RunError::Start)?;
    Ok(match (damage.take(), stopped) {
        (Some(why), _) => Ended::Damaged(why),
        (None, Stopped::Asked) => Ended::Asked,
        (None, Stopped::Fatal(why)) => Ended::Fatal(why),
    })
}

/// The core, watched for an image that turns out to be damaged.
struct Watched {
    /// None once it is: nothing of it is touched any more, not even to free it.
    core: Option<MdsCore<RedbBase>>,
    damage: Rc<RefCell<Option<String>>>,
    repository: Rc<RefCell<Repository>>,
    looked: Instant,
}

impl Process for Watched {
    fn step(&mut self, now: Now, event: Event, effects: &mut Effects) {
        let Some(core) = &mut self.core else { return };
        if let Err(error) = contain(|| core.step(now, event, effects)) {
            effects.fatal = Some(error.to_string());
            *self.damage.borrow_mut() = Some(error.what);
            self.remember_servers();
            std::mem::forget(self.core.take());
            return;
        }
        if now.mono >= self.looked + SERVERS_PERIOD {
            self.looked = now.mono;
            self.remember_servers();
        }
    }
}

impl Watched {
    /// Writes down who the metadata servers are: without its image this one could not find the others.
    fn remember_servers(&mut self) {
        let Some(core) = &self.core else { return };
        let servers: Vec<(u64, SocketAddr)> = core.meta().members().map(|info| (info.mds.0, info.addr)).collect();
        self.repository.borrow_mut().remember_servers(servers);
    }
}

fn stop_on_signal(reactor: &Reactor<Watched>) -> std::io::Result<()> {
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
