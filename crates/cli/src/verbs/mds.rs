//! Verbs of metadata servers: `make-mds`, `rm-mds`, `mds run`.

use crate::context::{Context, MDS_PORT, address, block_on_config, unexpected};
use crate::exit::usage;
use crate::password;
use anyhow::{Context as _, Result, bail};
use cairn_consensus::{Initial, Member};
use cairn_mds::repository::{self, Identity};
use cairn_mds::shell::{RunConfig, run as run_daemon};
use cairn_types::{ClusterId, MdsId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::{MdsReply, MdsRequest, SessionKind};
use clap::{Args, Subcommand};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `make-mds`.
#[derive(Args, Debug)]
pub struct MakeMdsArgs {
    /// Creates a new cluster; this is its first metadata server.
    #[arg(short = 'I')]
    init: bool,
    /// Address to listen on, `IP[:PORT]`; the port is 2510 unless given.
    #[arg(short = 'a', value_name = "ADDR")]
    addr: String,
    /// Directory for log and state, with at least 10 GB free.
    #[arg(short = 'r', value_name = "DIR")]
    repository: PathBuf,
    /// Asks for the cluster password and keeps its key on this node. A new cluster always needs one.
    #[arg(short = 'p')]
    password: bool,
    /// Reads the password from a file instead of asking.
    #[arg(long)]
    password_file: Option<PathBuf>,
    /// Metadata servers of the cluster to join; kept in bs.list.
    #[arg(short = 'b', value_name = "ADDR", value_delimiter = ',')]
    bootstrap: Vec<String>,
}

/// How often `rm-mds` looks whether a server has left, and how many times.
const REMOVAL_LOOK_EVERY: Duration = Duration::from_millis(100);
const REMOVAL_LOOKS_MAX: u32 = 300;

/// Options of `rm-mds`.
#[derive(Args, Debug)]
pub struct RmMdsArgs {
    /// Id of the server, as `list-services` shows it.
    id: u64,
}

/// Verbs of the daemon.
#[derive(Subcommand, Debug)]
pub enum MdsVerb {
    /// Runs the metadata server of a repository in the foreground.
    Run {
        /// The repository directory.
        #[arg(short = 'r', value_name = "DIR")]
        repository: PathBuf,
    },
}

/// Runs `make-mds`.
pub fn make(context: &Context, args: &MakeMdsArgs) -> Result<()> {
    let name = context.name()?;
    let addr = address(&args.addr, MDS_PORT)?;
    if addr.ip().is_unspecified() {
        return Err(usage(format!("-a {addr}: give the address other nodes reach this server at, not a wildcard")));
    }
    check_address(addr)?;
    let context = &context.with_bootstrap(&args.bootstrap)?;
    let key = match args.init || args.password || args.password_file.is_some() {
        true => ClusterKey::derive(name, &password::ask(args.password_file.as_deref(), args.init)?)?,
        false => context.key()?,
    };
    let mut fresh = FreshDir::prepare(&args.repository)?;
    warn_about_space(&args.repository);
    let dir = std::fs::canonicalize(&args.repository).context("resolve the repository directory")?;
    let id = if args.init { make_first(context, &key, addr, &dir)? } else { join(context, &key, addr, &dir)? };
    fresh.keep();
    context.keep_bootstrap()?;
    context.add_to_bs_list(&[addr])?;
    eprintln!("metadata server {} of cluster {name} is made in {}", id.0, dir.display());
    eprintln!("run it with: cairn mds run -r {}", dir.display());
    Ok(())
}

/// Refuses an address on which the server could not listen.
pub(super) fn check_address(addr: SocketAddr) -> Result<()> {
    use std::io::ErrorKind;
    match std::net::TcpListener::bind(addr).map_err(|error| error.kind()) {
        Err(ErrorKind::AddrInUse) => bail!("-a {addr}: another process listens there; stop it or give another address"),
        Err(ErrorKind::AddrNotAvailable) => bail!("-a {addr}: this machine does not have that address"),
        Err(ErrorKind::PermissionDenied) => bail!("-a {addr}: ports below 1024 are for root; give another one"),
        // Anything else shows, with its words, when the server runs.
        _ => Ok(()),
    }
}

/// A repository directory that is being made. Unless it is kept, it is taken away again, with what was put in.
pub(super) struct FreshDir<'a> {
    dir: &'a Path,
    was_there: bool,
    kept: bool,
}

impl<'a> FreshDir<'a> {
    pub(super) fn prepare(dir: &'a Path) -> Result<Self> {
        let was_there = dir.exists();
        repository::prepare(dir)?;
        Ok(Self { dir, was_there, kept: false })
    }

    pub(super) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for FreshDir<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Only what `repository::create` makes: the directory was empty before.
        for name in ["log", "image.redb", "mds.json.new", "mds.json"] {
            let _ = std::fs::remove_file(self.dir.join(name));
        }
        if !self.was_there {
            let _ = std::fs::remove_dir(self.dir);
        }
    }
}

fn warn_about_space(dir: &Path) {
    if let Some(free) = super::cs::free_space(dir).filter(|free| *free < repository::FREE_ADVISED) {
        let free = cairn_types::format_size(free);
        eprintln!("warning: {} has {free} free; 10 GB are advised for a metadata server", dir.display());
    }
}

/// Makes the first server of a new cluster in an empty directory and keeps the key on this node.
pub fn make_first(context: &Context, key: &ClusterKey, addr: SocketAddr, dir: &Path) -> Result<MdsId> {
    let name = context.name()?;
    let id = MdsId(1);
    let instance = fresh_instance();
    let identity = Identity {
        version: 1,
        cluster: ClusterId(cairn_env_real::random_bytes()).to_string(),
        cluster_name: name.to_owned(),
        id: id.0,
        instance,
        bootstrap: true,
        addr,
        servers: vec![(id.0, addr)],
    };
    repository::create(dir, &identity, &Initial::Bootstrap { voters: vec![Member { id, instance }] })?;
    context.files()?.write_key(key)?;
    Ok(id)
}

/// Makes a further server: the cluster admits it and gives it an id. Then the key is kept on this node.
pub fn join(context: &Context, key: &ClusterKey, addr: SocketAddr, dir: &Path) -> Result<MdsId> {
    let instance = fresh_instance();
    let request = MdsRequest::MdsAdd { addr, repository: dir.display().to_string(), nonce: instance };
    let config = context.client_config_with_key(key.clone(), SessionKind::Client, "make-mds")?;
    let reply = block_on_config(config, async |client| Ok(client.call(request).await?));
    let (id, cluster, name, servers) = match reply.context("ask the cluster for admission")? {
        MdsReply::MdsAdmitted { mds, cluster, name, servers } => (mds, cluster, name, servers),
        other => return Err(unexpected(&other)),
    };
    let identity = Identity {
        version: 1,
        cluster: cluster.to_string(),
        cluster_name: name,
        id: id.0,
        instance,
        bootstrap: false,
        addr,
        servers: servers.iter().map(|info| (info.mds.0, info.addr)).collect(),
    };
    repository::create(dir, &identity, &Initial::Join)?;
    context.files()?.write_key(key)?;
    Ok(id)
}

pub(super) fn fresh_instance() -> u64 {
    // Not zero and below 2^62, as the log wants it.
    (u64::from_le_bytes(cairn_env_real::random_bytes()) >> 2).max(1)
}

/// Runs `rm-mds`.
pub fn remove(context: &Context, args: &RmMdsArgs) -> Result<()> {
    let id = MdsId(args.id);
    context.call(MdsRequest::MdsRemove { mds: id })?;
    // Until it has left, its address is taken and its vote counts.
    context.block_on(async |client| {
        for _ in 0..REMOVAL_LOOKS_MAX {
            match client.call(MdsRequest::Topology).await? {
                MdsReply::Topology { mds, .. } if mds.iter().any(|info| info.mds == id) => {}
                MdsReply::Topology { .. } => return Ok(()),
                other => return Err(unexpected(&other)),
            }
            tokio::time::sleep(REMOVAL_LOOK_EVERY).await;
        }
        bail!("metadata server {} is being removed and has not left yet; see `cairn stat`", args.id)
    })?;
    eprintln!("metadata server {} has left the cluster; its process ends by itself", args.id);
    Ok(())
}

/// Runs `mds run`.
pub fn run(verb: &MdsVerb) -> Result<()> {
    let MdsVerb::Run { repository } = verb;
    let identity = cairn_mds::repository::Repository::open(repository)?.identity;
    let key = cairn_client::cluster::ClusterFiles::new(&identity.cluster_name)?.key()?;
    let name = identity.cluster_name.clone();
    let id = identity.id;
    let on_ready = Box::new(move |addr| eprintln!("metadata server {id} of cluster {name} listens on {addr}"));
    // What the cluster shows as its place must mean the same everywhere.
    let dir = std::fs::canonicalize(repository).with_context(|| format!("resolve {}", repository.display()))?;
    run_daemon(RunConfig { dir, key, on_ready })?;
    Ok(())
}
