//! Cluster files on a host: who the cluster is, how to reach it, who this host is. Every daemon and the command line
//! use them.
//!
//! ```text
//! /etc/cairn/clusters/NAME/bs.list           one ADDRESS:PORT of a metadata server a line; # begins a comment
//! /etc/cairn/clusters/NAME/mds.list          the same, as the cluster told it last; written by clients
//! /etc/cairn/clusters/NAME/auth_digest.key   the cluster key, 64 hexadecimal digits, readable by its owner only
//! /etc/cairn/host_id                         identity of this host, 32 hexadecimal digits
//! ```
//!
//! The environment variable `CAIRN_CONFIG_DIR` replaces `/etc/cairn`.

use cairn_types::HostId;
use cairn_wire::auth::{ClusterKey, is_cluster_name};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Port of a metadata server when a line of `bs.list` gives none.
pub const MDS_PORT_DEFAULT: u16 = 2510;
/// Most lines of `bs.list` that are read; a cluster has at most five metadata servers.
pub const BS_LIST_MAX: usize = 64;

/// Why the cluster files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterFileError {
    /// Not a cluster name.
    #[error("`{0}` is not a cluster name: use letters, digits, `-` and `_`")]
    Name(String),
    /// Nothing known of this cluster on this host.
    #[error("cluster {name} is not known on this host: {path} does not exist; run `cairn -c {name} auth-node`")]
    Unknown {
        /// The cluster.
        name: String,
        /// The file looked for.
        path: PathBuf,
    },
    /// A line that cannot be read.
    #[error("{path} line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// No server in the list.
    #[error("{path} names no metadata server")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A key or id that is none.
    #[error("{path} does not hold {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// The file system refused.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClusterFileError {
    move |source| ClusterFileError::Io { action, path: path.to_owned(), source }
}

/// The directory of all cluster files.
pub fn config_dir() -> PathBuf {
    std::env::var_os("CAIRN_CONFIG_DIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| "/etc/cairn".into(), PathBuf::from)
}

/// The files of one cluster.
#[derive(Clone, Debug)]
pub struct ClusterFiles {
    name: String,
    dir: PathBuf,
}

impl ClusterFiles {
    /// The files of cluster `name` under [`config_dir`]; nothing is read yet.
    ///
    /// # Errors
    /// [`ClusterFileError::Name`].
    pub fn new(name: &str) -> Result<Self, ClusterFileError> {
        Self::under(&config_dir(), name)
    }

    /// As [`ClusterFiles::new`], under another root.
    ///
    /// # Errors
    /// [`ClusterFileError::Name`].
    pub fn under(root: &Path, name: &str) -> Result<Self, ClusterFileError> {
        if !is_cluster_name(name) {
            return Err(ClusterFileError::Name(name.to_owned()));
        }
        Ok(Self { name: name.to_owned(), dir: root.join("clusters").join(name) })
    }

    /// Name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the list of metadata servers.
    pub fn bs_list_path(&self) -> PathBuf {
        self.dir.join("bs.list")
    }

    /// Path of the key.
    pub fn key_path(&self) -> PathBuf {
        self.dir.join("auth_digest.key")
    }

    fn read(&self, path: &Path) -> Result<String, ClusterFileError> {
        std::fs::read_to_string(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ClusterFileError::Unknown { name: self.name.clone(), path: path.to_owned() },
            _ => io_error("read", path)(source),
        })
    }

    /// The metadata servers of `bs.list`, in order.
    ///
    /// # Errors
    /// [`ClusterFileError`], naming the line.
    pub fn servers(&self) -> Result<Vec<SocketAddr>, ClusterFileError> {
        let path = self.bs_list_path();
        parse_servers(&path, &self.read(&path)?)
    }

    /// Those of `bs.list`, then those that the cluster told last and people did not write down.
    ///
    /// # Errors
    /// [`ClusterFileError`], of `bs.list`.
    pub fn all_servers(&self) -> Result<Vec<SocketAddr>, ClusterFileError> {
        let mut servers = self.servers()?;
        let more: Vec<SocketAddr> = self.kept_servers().into_iter().filter(|addr| !servers.contains(addr)).collect();
        servers.extend(more);
        Ok(servers)
    }

    fn kept_path(&self) -> PathBuf {
        self.dir.join("mds.list")
    }

    /// What [`ClusterFiles::keep_servers`] kept; a file that is missing or damaged names nobody.
    fn kept_servers(&self) -> Vec<SocketAddr> {
        let text = std::fs::read_to_string(self.kept_path()).unwrap_or_default();
        text.lines().filter_map(|line| line.trim().parse().ok()).take(BS_LIST_MAX).collect()
    }

    /// Keeps the addresses of all metadata servers as the cluster told them, unless they stand there already.
    ///
    /// # Errors
    /// [`ClusterFileError::Io`].
    pub fn keep_servers(&self, servers: &[SocketAddr]) -> Result<(), ClusterFileError> {
        if servers == self.kept_servers() {
            return Ok(());
        }
        let lines: String = servers.iter().map(|addr| format!("{addr}\n")).collect();
        write_atomically(&self.kept_path(), lines.as_bytes(), 0o644)
    }

    /// Forgets what the cluster told: it was made anew elsewhere.
    ///
    /// # Errors
    /// [`ClusterFileError::Io`].
    pub fn forget_kept_servers(&self) -> Result<(), ClusterFileError> {
        let path = self.kept_path();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// The cluster key.
    ///
    /// # Errors
    /// [`ClusterFileError`].
    pub fn key(&self) -> Result<ClusterKey, ClusterFileError> {
        let path = self.key_path();
        let text = self.read(&path)?;
        ClusterKey::from_hex(&text)
            .ok_or(ClusterFileError::Content { path, what: "a cluster key (64 hexadecimal digits)" })
    }

    /// Writes `bs.list`, atomically.
    ///
    /// # Errors
    /// [`ClusterFileError::Io`].
    pub fn write_servers(&self, servers: &[SocketAddr]) -> Result<(), ClusterFileError> {
        let lines: String = servers.iter().map(|addr| format!("{addr}\n")).collect();
        write_atomically(&self.bs_list_path(), lines.as_bytes(), 0o644)
    }

    /// Writes the key, atomically, readable by its owner only.
    ///
    /// # Errors
    /// [`ClusterFileError::Io`].
    pub fn write_key(&self, key: &ClusterKey) -> Result<(), ClusterFileError> {
        write_atomically(&self.key_path(), format!("{}\n", key.to_hex()).as_bytes(), 0o600)
    }
}

/// Parses the content of a `bs.list`. A host name stands for all its addresses; a missing port is [`MDS_PORT_DEFAULT`].
///
/// # Errors
/// [`ClusterFileError::Line`] or [`ClusterFileError::Empty`].
pub fn parse_servers(path: &Path, text: &str) -> Result<Vec<SocketAddr>, ClusterFileError> {
    parse_servers_with(path, text, &mut |host, port| Ok((host, port).to_socket_addrs()?.collect()))
}

/// Finds the addresses of a host.
pub type Resolve<'a> = dyn FnMut(&str, u16) -> io::Result<Vec<SocketAddr>> + 'a;

/// As [`parse_servers`], with another way to look names up.
///
/// # Errors
/// As [`parse_servers`].
pub fn parse_servers_with(
    path: &Path,
    text: &str,
    resolve: &mut Resolve<'_>,
) -> Result<Vec<SocketAddr>, ClusterFileError> {
    let mut servers = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line_error = |reason: String| ClusterFileError::Line { path: path.to_owned(), line: number + 1, reason };
        let entry = line.split('#').next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        if servers.len() >= BS_LIST_MAX {
            return Err(line_error(format!("more than {BS_LIST_MAX} metadata servers")));
        }
        if let Ok(addr) = entry.parse::<SocketAddr>() {
            servers.push(addr);
            continue;
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') => {
                (host, port.parse().map_err(|_| line_error(format!("`{port}` is not a port")))?)
            }
            _ => (entry.trim_matches(['[', ']']), MDS_PORT_DEFAULT),
        };
        let addresses =
            resolve(host, port).map_err(|error| line_error(format!("`{entry}` is not ADDRESS:PORT ({error})")))?;
        servers.extend(addresses);
    }
    if servers.is_empty() {
        return Err(ClusterFileError::Empty { path: path.to_owned() });
    }
    Ok(servers)
}

fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), ClusterFileError> {
    let dir = path.parent().expect("the path has a directory");
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(io_error("create directory", dir))?;
    // Clients of one process may write at the same time.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("new.{}.{nth}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(io_error("write", path))
}

/// The identity of this host; drawn and stored at the first call.
///
/// # Errors
/// [`ClusterFileError`].
pub fn host_id() -> Result<HostId, ClusterFileError> {
    host_id_under(&config_dir())
}

/// As [`host_id`], under another root.
///
/// # Errors
/// [`ClusterFileError`].
pub fn host_id_under(root: &Path) -> Result<HostId, ClusterFileError> {
    let path = root.join("host_id");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            text.parse().map_err(|_| ClusterFileError::Content { path, what: "a host id (32 hexadecimal digits)" })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut id = [0u8; 16];
            let random = Path::new("/dev/urandom");
            std::fs::File::open(random).and_then(|mut f| f.read_exact(&mut id)).map_err(io_error("read", random))?;
            let drawn = HostId(id);
            std::fs::create_dir_all(root).map_err(io_error("create directory", root))?;
            // Two daemons may start at once: whoever links first decides, both read what stands there.
            let temporary = root.join(format!("host_id.new.{}", std::process::id()));
            std::fs::write(&temporary, format!("{drawn}\n")).map_err(io_error("write", &temporary))?;
            let linked = std::fs::hard_link(&temporary, &path);
            let _ = std::fs::remove_file(&temporary);
            match linked {
                Ok(()) => Ok(drawn),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => host_id_under(root),
                Err(error) => Err(io_error("create", &path)(error)),
            }
        }
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// The name of this host, for people.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".to_owned() } else { name.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_parse_and_errors_name_the_line() {
        let path = Path::new("bs.list");
        let parse = |text: &str| parse_servers(path, text);
        let good = parse("# comment\n127.0.0.1:2510\n\n[::1]:7 # second\n127.0.0.3\n").unwrap();
        assert_eq!(
            good.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["127.0.0.1:2510", "[::1]:7", "127.0.0.3:2510"]
        );
        assert!(matches!(parse("\n#\n"), Err(ClusterFileError::Empty { .. })));
        let error = parse("127.0.0.1:1\n127.0.0.1:port\n").unwrap_err().to_string();
        assert_eq!(error, "bs.list line 2: `port` is not a port");
    }

    #[test]
    fn files_round_trip_and_the_host_id_is_drawn_once() {
        let root = tempfile::tempdir().unwrap();
        let files = ClusterFiles::under(root.path(), "stor1").unwrap();
        assert!(matches!(files.servers(), Err(ClusterFileError::Unknown { .. })));
        files.write_servers(&["127.0.0.1:9".parse().unwrap()]).unwrap();
        assert_eq!(files.servers().unwrap().len(), 1);
        let told: Vec<SocketAddr> = vec!["127.0.0.1:9".parse().unwrap(), "127.0.0.1:10".parse().unwrap()];
        files.keep_servers(&told).unwrap();
        assert_eq!(files.all_servers().unwrap(), told);
        assert_eq!(files.servers().unwrap().len(), 1, "the list of people stays as it is");
        files.keep_servers(&told[1..]).unwrap();
        assert_eq!(files.all_servers().unwrap(), told);
        files.forget_kept_servers().unwrap();
        files.forget_kept_servers().unwrap();
        assert_eq!(files.all_servers().unwrap(), told[..1]);
        let key = ClusterKey::from_hex(&"ab".repeat(32)).unwrap();
        files.write_key(&key).unwrap();
        assert_eq!(files.key().unwrap(), key);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(files.key_path()).unwrap().permissions().mode() & 0o777, 0o600);
        let id = host_id_under(root.path()).unwrap();
        assert_eq!(host_id_under(root.path()).unwrap(), id);
        assert!(ClusterFiles::under(root.path(), "../x").is_err());
    }
}
