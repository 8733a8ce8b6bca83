//! Verbs of metadata servers: `make-mds`, `rm-mds`, `mds run`.

use crate::context::{Context, MDS_PORT, address, unexpected};
use crate::password;
use anyhow::{Context as _, Result, bail};
use cairn_consensus::{Initial, Member};
use cairn_mds::repository::{self, Identity};
use cairn_mds::shell::{RunConfig, run as run_daemon};
use cairn_types::{ClusterId, MdsId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::{MdsReply, MdsRequest};
use clap::{Args, Subcommand};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

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

/// Adds addresses to bs.list, so that every later verb on this node finds the cluster.
pub fn keep_bootstrap(context: &Context, bootstrap: &[String]) -> Result<()> {
    if bootstrap.is_empty() {
        return Ok(());
    }
    let addrs: Vec<SocketAddr> = bootstrap.iter().map(|text| address(text, MDS_PORT)).collect::<Result<_>>()?;
    context.add_to_bs_list(&addrs)
}

/// Runs `make-mds`.
pub fn make(context: &Context, args: &MakeMdsArgs) -> Result<()> {
    let name = context.name()?;
    let addr = address(&args.addr, MDS_PORT)?;
    if addr.ip().is_unspecified() {
        bail!("-a {addr}: give the address other nodes reach this server at, not a wildcard");
    }
    keep_bootstrap(context, &args.bootstrap)?;
    repository::prepare(&args.repository)?;
    warn_about_space(&args.repository);
    let dir = std::fs::canonicalize(&args.repository).context("resolve the repository directory")?;
    let id = if args.init {
        let password = password::ask(args.password_file.as_deref(), true)?;
        let key = ClusterKey::derive(name, &password)?;
        make_first(context, &key, addr, &dir)?
    } else {
        if args.password || args.password_file.is_some() {
            let password = password::ask(args.password_file.as_deref(), false)?;
            context.files()?.write_key(&ClusterKey::derive(name, &password)?)?;
        }
        join(context, addr, &dir)?
    };
    context.add_to_bs_list(&[addr])?;
    eprintln!("metadata server {} of cluster {name} is made in {}", id.0, dir.display());
    eprintln!("run it with: cairn mds run -r {}", dir.display());
    Ok(())
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

/// Makes a further server: the cluster admits it and gives it an id.
pub fn join(context: &Context, addr: SocketAddr, dir: &Path) -> Result<MdsId> {
    let instance = fresh_instance();
    let request = MdsRequest::MdsAdd { addr, repository: dir.display().to_string(), nonce: instance };
    let (id, cluster, name, servers) = match context.call(request).context("ask the cluster for admission")? {
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
    Ok(id)
}

fn fresh_instance() -> u64 {
    // Not zero and below 2^62, as the log wants it.
    (u64::from_le_bytes(cairn_env_real::random_bytes()) >> 2).max(1)
}

/// Runs `rm-mds`.
pub fn remove(context: &Context, args: &RmMdsArgs) -> Result<()> {
    context.call(MdsRequest::MdsRemove { mds: MdsId(args.id) })?;
    eprintln!("metadata server {} leaves the cluster; its process ends by itself", args.id);
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
    run_daemon(RunConfig { dir: repository.clone(), key, on_ready })?;
    Ok(())
}
