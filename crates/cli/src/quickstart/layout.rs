//! The directory of a quickstart cluster.
//!
//! ```text
//! DIR/quickstart.json   name and ports; written when the cluster is complete
//! DIR/etc/              what is /etc/cairn on a real node: bs.list, key, host_id (CAIRN_CONFIG_DIR)
//! DIR/mds1..3  DIR/cs1..4   repositories
//! DIR/mnt  DIR/nbd.sock     mount point and socket
//! DIR/log/              output of the daemons
//! DIR/env               read by a shell to use the cluster
//! ```

use crate::context::Context;
use crate::verbs;
use crate::verbs::cs::{CsOptions, Place};
use anyhow::{Context as _, Result, bail};
use cairn_cs::MakeCs;
use cairn_types::{ClusterId, HostId};
use cairn_wire::auth::ClusterKey;
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{CS_COUNT, MDS_COUNT};

/// Space of a chunk server unless given, if a sixteenth of the free space is not less.
const CS_SIZE_DEFAULT: u64 = 3 << 30;
/// Least space a chunk server is made with.
const CS_SIZE_MIN: u64 = 512 << 20;
/// What the metadata servers take at first, and a little for them to grow.
const METADATA_SIZE: u64 = 410 << 20;

/// What `quickstart.json` says.
#[derive(Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Name of the cluster.
    pub cluster: String,
    /// Ports of the metadata servers.
    pub mds_ports: Vec<u16>,
    /// Ports of the chunk servers.
    pub cs_ports: Vec<u16>,
    /// Port of the NBD server.
    pub nbd_port: u16,
    /// Space of each chunk server.
    pub cs_size: u64,
}

/// A quickstart directory.
pub struct Layout {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// Its state.
    pub state: State,
}

impl Layout {
    /// True when a complete cluster is there.
    pub fn exists(dir: &Path) -> bool {
        dir.join("quickstart.json").exists()
    }

    /// Begins a new cluster in an empty directory. What an interrupted first start left behind is replaced.
    pub fn create(dir: &Path, cs_size: Option<u64>) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = std::fs::canonicalize(dir)?;
        let marker = dir.join(".quickstart-incomplete");
        let occupied = std::fs::read_dir(&dir)?.next().is_some();
        if occupied && !marker.exists() {
            bail!("{} is not empty and holds no quickstart cluster; give another --dir", dir.display());
        }
        for name in ["etc", "log"].map(str::to_owned).into_iter().chain(part_names()) {
            if dir.join(&name).exists() {
                std::fs::remove_dir_all(dir.join(&name)).context("remove what an interrupted start left")?;
            }
        }
        std::fs::write(&marker, "").with_context(|| format!("write to {}", dir.display()))?;
        for name in ["etc", "log", "mnt", "bin"] {
            std::fs::create_dir_all(dir.join(name))?;
        }
        let free = verbs::cs::free_space(&dir).unwrap_or(u64::MAX);
        let cs_size = cs_size.unwrap_or(CS_SIZE_DEFAULT.min(free / 16)) & !((1 << 20) - 1);
        if cs_size < CS_SIZE_MIN {
            let free = cairn_types::format_size(free);
            bail!(
                "{} has {free} free, and a chunk server would get {}; give --cs-size, at least {} and four times that free",
                dir.display(),
                cairn_types::format_size(cs_size),
                cairn_types::format_size(CS_SIZE_MIN)
            );
        }
        let needed = (CS_COUNT as u64).saturating_mul(cs_size).saturating_add(METADATA_SIZE);
        if needed > free {
            let (needed, free) = (cairn_types::format_size(needed), cairn_types::format_size(free));
            bail!("this takes {needed} and {} has {free} free; give a smaller --cs-size", dir.display());
        }
        let mut ports = free_ports(MDS_COUNT + CS_COUNT + 1)?.into_iter();
        let state = State {
            cluster: "quickstart".to_owned(),
            mds_ports: ports.by_ref().take(MDS_COUNT).collect(),
            cs_ports: ports.by_ref().take(CS_COUNT).collect(),
            nbd_port: ports.next().context("one port is left")?,
            cs_size,
        };
        let layout = Self { dir, state };
        let exe = std::env::current_exe()?;
        let link = layout.dir.join("bin/cairn");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(exe, link)?;
        Ok(layout)
    }

    /// Opens the cluster of an earlier start.
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = std::fs::canonicalize(dir)?;
        let path = dir.join("quickstart.json");
        let text = std::fs::read_to_string(&path)?;
        let state: State = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        if state.mds_ports.len() != MDS_COUNT || state.cs_ports.len() != CS_COUNT {
            bail!(
                "{} names {} + {} servers, not {MDS_COUNT} + {CS_COUNT}",
                path.display(),
                state.mds_ports.len(),
                state.cs_ports.len()
            );
        }
        let link = dir.join("bin/cairn");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(std::env::current_exe()?, link)?;
        Ok(Self { dir, state })
    }

    /// The cluster is complete: the next start finds it.
    pub fn seal(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.state)? + "\n";
        let temporary = self.dir.join("quickstart.json.new");
        std::fs::write(&temporary, text)?;
        std::fs::rename(temporary, self.dir.join("quickstart.json"))?;
        let _ = std::fs::remove_file(self.dir.join(".quickstart-incomplete"));
        Ok(())
    }

    /// Refuses to start while something else listens on one of the ports.
    pub fn check_ports(&self) -> Result<()> {
        let ports = self.state.mds_ports.iter().chain(&self.state.cs_ports).chain([&self.state.nbd_port]);
        for port in ports {
            let addr = SocketAddr::from(([127, 0, 0, 1], *port));
            TcpListener::bind(addr).with_context(|| {
                format!("port {port} is in use; does another quickstart run on {}?", self.dir.display())
            })?;
        }
        Ok(())
    }

    /// Stands for /etc/cairn.
    pub fn config_dir(&self) -> PathBuf {
        self.dir.join("etc")
    }

    /// Repository of metadata server `n`, from 1.
    pub fn mds_dir(&self, n: usize) -> PathBuf {
        self.dir.join(format!("mds{n}"))
    }

    /// Repository of chunk server `n`, from 1.
    pub fn cs_dir(&self, n: usize) -> PathBuf {
        self.dir.join(format!("cs{n}"))
    }

    /// The mount point.
    pub fn mount_dir(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Socket of the NBD server.
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// Output of a daemon.
    pub fn log_file(&self, label: &str) -> PathBuf {
        self.dir.join("log").join(format!("{label}.log"))
    }

    /// Draws a password and derives the cluster key from it. The password is kept beside the key, for `auth-node`
    /// elsewhere.
    pub fn new_key(&self) -> Result<ClusterKey> {
        let random: [u8; 16] = cairn_env_real::random_bytes();
        let password = HostId(random).to_string();
        let path = self.config_dir().join("password");
        write_private(&path, &password)?;
        Ok(ClusterKey::derive(&self.state.cluster, &password)?)
    }

    /// Address of metadata server `n`, from 1.
    pub fn mds_addr(&self, n: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.state.mds_ports[n - 1]))
    }

    /// Address of chunk server `n`, from 1.
    pub fn cs_addr(&self, n: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.state.cs_ports[n - 1]))
    }

    /// What a shell reads (`. DIR/env`) to use this cluster.
    pub fn environment_file(&self) -> PathBuf {
        self.dir.join("env")
    }

    /// Writes that file.
    pub fn write_environment(&self, nbd_uri: &str, mounted: bool) -> Result<()> {
        let path = self.environment_file();
        let quoted = |text: &Path| format!("'{}'", text.display().to_string().replace('\'', r"'\''"));
        let mut text = format!(
            "# To use this cluster in a shell: . {path}\nexport CAIRN_CLUSTER={name} CAIRN_CONFIG_DIR={etc}\n\
             export CAIRN_QUICKSTART_DIR={dir} CAIRN_NBD='{nbd_uri}'\n\
             case \":$PATH:\" in *:{bin}:*) ;; *) export PATH={bin}:\"$PATH\" ;; esac\n",
            path = quoted(&path),
            name = self.state.cluster,
            etc = quoted(&self.config_dir()),
            dir = quoted(&self.dir),
            bin = quoted(&self.dir.join("bin")),
        );
        if mounted {
            text.push_str(&format!("export CAIRN_MOUNT={}\n", quoted(&self.mount_dir())));
        }
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Makes the first metadata server.
    pub fn make_first_mds(&self, context: &Context, key: &ClusterKey) -> Result<()> {
        cairn_mds::repository::prepare(&self.mds_dir(1))?;
        let addrs: Vec<SocketAddr> = (1..=MDS_COUNT).map(|n| self.mds_addr(n)).collect();
        verbs::mds::make_first(context, key, addrs[0], &self.mds_dir(1))?;
        context.add_to_bs_list(&addrs)
    }

    /// Adds metadata server `n`.
    pub fn join_mds(&self, context: &Context, n: usize) -> Result<()> {
        cairn_mds::repository::prepare(&self.mds_dir(n))?;
        verbs::mds::join(context, &context.key()?, self.mds_addr(n), &self.mds_dir(n))?;
        Ok(())
    }

    /// Identity of the cluster, from the first metadata server.
    pub fn cluster_id(&self) -> Result<ClusterId> {
        let text = std::fs::read_to_string(self.mds_dir(1).join("mds.json"))?;
        let identity: cairn_mds::repository::Identity = serde_json::from_str(&text)?;
        identity.cluster_id().context("the first metadata server names its cluster")
    }

    /// Makes chunk server `n` as if it stood on a host of its own.
    pub fn make_cs(&self, n: usize, cluster: ClusterId) -> Result<()> {
        let make = MakeCs {
            replaces: None,
            dir: self.cs_dir(n),
            cluster,
            cluster_name: self.state.cluster.clone(),
            host: HostId(cairn_env_real::random_bytes()),
            tier: 0,
            size: Some(self.state.cs_size),
            device: None,
            fill: false,
        };
        let listen = self.cs_addr(n);
        verbs::cs::make_with_options(&make, &CsOptions { listen, durable_always: false, place: Place::default() })
    }

    /// What a program needs to use this cluster.
    pub fn environment(&self, command: &mut Command) -> Result<()> {
        let mut path = vec![self.dir.join("bin")];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        command
            .env("CAIRN_CLUSTER", &self.state.cluster)
            .env("CAIRN_CONFIG_DIR", self.config_dir())
            .env("CAIRN_QUICKSTART_DIR", &self.dir)
            .env("PATH", std::env::join_paths(path)?);
        Ok(())
    }
}

fn part_names() -> impl Iterator<Item = String> {
    (1..=MDS_COUNT).map(|n| format!("mds{n}")).chain((1..=CS_COUNT).map(|n| format!("cs{n}")))
}

/// Ports nobody listens on, all different.
///
/// They lie below the range from which systems take ports of outgoing connections (from 32768 on): one of those could
/// be taken by a connection, even of this cluster, before its server listens or while it is down.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    const FIRST: u16 = 15_000;
    const PORT_COUNT: u16 = 17_000;
    let random: [u8; 2] = cairn_env_real::random_bytes();
    let start = u16::from_le_bytes(random) % PORT_COUNT;
    let candidates = (0..PORT_COUNT).map(|step| FIRST + (start + step) % PORT_COUNT);
    let held: Vec<TcpListener> =
        candidates.filter_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()).take(count).collect();
    if held.len() < count {
        bail!("no {count} free ports from {FIRST} on");
    }
    held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    Ok(())
}
