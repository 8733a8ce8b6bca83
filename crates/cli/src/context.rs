//! What every verb needs: which cluster, its key, its metadata servers, a client session.

use crate::exit::usage;
use crate::{Cli, Output};
use anyhow::{Context as _, Result};
use cairn_client::cluster::{self, ClusterFiles};
use cairn_client::{ClientConfig, LocalClient, OnNoSpace};
use cairn_types::HostId;
use cairn_wire::auth::{ClusterKey, is_cluster_name};
use cairn_wire::mds::{MdsReply, MdsRequest, SessionKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

/// Port of a metadata server unless given (R0049).
pub const MDS_PORT: u16 = 2510;

/// The global arguments, resolved lazily.
pub struct Context {
    cluster: Option<String>,
    mds_addr: Vec<String>,
    /// Addresses given to be remembered; kept in bs.list once the cluster has answered there.
    bootstrap: Vec<SocketAddr>,
    output: Output,
    /// Where clusters and keys are kept on this node.
    root: PathBuf,
}

impl Context {
    /// From the command line.
    pub fn new(cli: &Cli) -> Self {
        let cluster = cli.cluster.clone().or_else(|| std::env::var("CAIRN_CLUSTER").ok());
        let (mds_addr, root) = (cli.mds_addr.clone(), cluster::config_dir());
        Self { cluster, mds_addr, bootstrap: Vec::new(), output: cli.output, root }
    }

    /// A context for a named cluster.
    pub fn of(cluster: &str, root: &Path) -> Self {
        let (cluster, root) = (Some(cluster.to_owned()), root.to_owned());
        Self { cluster, mds_addr: Vec::new(), bootstrap: Vec::new(), output: Output::Text, root }
    }

    /// The same with further metadata servers to ask (`-b`).
    pub fn with_bootstrap(&self, bootstrap: &[String]) -> Result<Self> {
        let addrs = bootstrap.iter().map(|text| address(text, MDS_PORT)).collect::<Result<_>>()?;
        let (cluster, mds_addr, root) = (self.cluster.clone(), self.mds_addr.clone(), self.root.clone());
        Ok(Self { cluster, mds_addr, bootstrap: addrs, output: self.output, root })
    }

    /// Remembers the addresses of [`Context::with_bootstrap`]: the cluster has answered.
    pub fn keep_bootstrap(&self) -> Result<()> {
        self.add_to_bs_list(&self.bootstrap)
    }

    /// The files of the cluster on this node.
    pub fn files(&self) -> Result<ClusterFiles> {
        Ok(ClusterFiles::under(&self.root, self.name()?)?)
    }

    /// Adds addresses to bs.list, so that every later verb on this node finds the cluster.
    pub fn add_to_bs_list(&self, addrs: &[SocketAddr]) -> Result<()> {
        let files = self.files()?;
        let mut known = if files.bs_list_path().exists() { files.servers()? } else { Vec::new() };
        let before = known.len();
        known.extend(addrs);
        known.sort();
        known.dedup();
        if known.len() != before {
            files.write_servers(&known)?;
        }
        Ok(())
    }

    /// True for `-o json`.
    pub fn json(&self) -> bool {
        self.output == Output::Json
    }

    /// Name of the cluster.
    pub fn name(&self) -> Result<&str> {
        let Some(name) = self.cluster.as_deref() else {
            return Err(usage("name the cluster with -c NAME or CAIRN_CLUSTER"));
        };
        if !is_cluster_name(name) {
            return Err(usage(format!("`{name}` is not a cluster name: use 1 to 63 of a-z A-Z 0-9 - _")));
        }
        Ok(name)
    }

    /// Key of the cluster, as `auth-node` or `make-mds -I` left it.
    pub fn key(&self) -> Result<ClusterKey> {
        Ok(self.files()?.key()?)
    }

    /// Addresses of the metadata servers: given with `--mds-addr`, else from bs.list and from what the cluster told.
    pub fn mds(&self) -> Result<Vec<SocketAddr>> {
        if !self.mds_addr.is_empty() {
            return self.mds_addr.iter().map(|text| address(text, MDS_PORT)).collect();
        }
        let files = self.files()?;
        if self.bootstrap.is_empty() || files.bs_list_path().exists() {
            return Ok(self.bootstrap.iter().copied().chain(files.all_servers()?).collect());
        }
        Ok(self.bootstrap.clone())
    }

    /// Identity of this host.
    pub fn host(&self) -> Result<HostId> {
        Ok(cluster::host_id_under(&self.root)?)
    }

    /// Configuration of a client session.
    pub fn client_config(&self, kind: SessionKind, purpose: &str) -> Result<ClientConfig> {
        if !self.mds_addr.is_empty() {
            self.mds()?; // What was typed wrong comes first.
        }
        self.client_config_with_key(self.key()?, kind, purpose)
    }

    /// The same with a key that is not stored yet.
    pub fn client_config_with_key(&self, key: ClusterKey, kind: SessionKind, purpose: &str) -> Result<ClientConfig> {
        Ok(ClientConfig {
            cluster_name: self.name()?.to_owned(),
            key,
            cluster: None,
            mds: self.mds()?,
            host: self.host()?,
            host_name: cluster::host_name(),
            purpose: purpose.to_owned(),
            kind,
            on_no_space: OnNoSpace::Fail,
            keep_servers: Some(self.files()?),
        })
    }

    /// Runs `work` with a client session that ends with it.
    pub fn block_on<T>(&self, work: impl AsyncFnOnce(LocalClient) -> Result<T>) -> Result<T> {
        let config = self.client_config(SessionKind::Client, "command line")?;
        block_on_config(config, work)
    }

    /// One call, on a session of its own.
    pub fn call(&self, request: MdsRequest) -> Result<MdsReply> {
        self.block_on(async |client| Ok(client.call(request).await?))
    }
}

/// Runs `work` with a client session made from `config`.
pub fn block_on_config<T>(config: ClientConfig, work: impl AsyncFnOnce(LocalClient) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let client = LocalClient::connect(config).await?;
        let outcome = work(client.clone()).await;
        client.close().await;
        outcome
    })
}

/// Parses `HOST[:PORT]`.
pub fn address(text: &str, port: u16) -> Result<SocketAddr> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok(addr);
    }
    if let Ok(ip) = text.parse::<std::net::IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, number)) => {
            let number = number.parse().map_err(|_| usage(format!("`{text}`: `{number}` is not a port number")))?;
            (host, number)
        }
        None => (text, port),
    };
    let found = (host, port).to_socket_addrs();
    let found =
        found.map_err(|error| usage(format!("`{text}` is neither an address nor a known host name: {error}")))?;
    found.into_iter().next().ok_or_else(|| usage(format!("`{text}` has no address")))
}

/// The answer was not of the kind the request promises: a version mix-up.
pub fn unexpected(reply: &MdsReply) -> anyhow::Error {
    anyhow::anyhow!("unexpected answer {reply:?}; are all nodes of one version?")
}
