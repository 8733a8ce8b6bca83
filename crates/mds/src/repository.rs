//! The repository directory of a metadata server: who it is, its log, its image.
//!
//! ```text
//! DIR/mds.json     identity: cluster, name, id, address, servers known at creation; written last, atomically
//! DIR/log          the Raft log, preallocated            docs/formats/raft-log.md
//! DIR/image.redb   the durable metadata image            docs/formats/metadata.md
//! DIR/image.reserve  blocks for the image when the disk is full; may be deleted while the server is stopped
//! DIR/image.damaged  an image that was put aside; for whoever wants to know, may be deleted
//! DIR/lock         locked while a process uses the directory
//! ```

use cairn_types::{ClusterId, MdsId};
use cairn_wire::mds::MdsInfo;
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Size of the log.
pub const LOG_SIZE: u64 = 128 << 20;
/// Free space a repository should have (R0050).
pub const FREE_ADVISED: u64 = 10 << 30;

/// What `mds.json` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of this file.
    pub version: u32,
    /// Identity of the cluster, 32 hex digits.
    pub cluster: String,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Id of the server.
    pub id: u64,
    /// Random number drawn when the log was formatted.
    pub instance: u64,
    /// It is the first server of the cluster.
    pub bootstrap: bool,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Servers known when it was made, and later when they change: id, address.
    pub servers: Vec<(u64, SocketAddr)>,
}

/// What is wrong with a repository directory.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The directory holds something already.
    #[error("{path} is not empty ({found}); give a new directory, or remove it if it holds nothing of value")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// Not made by `make-mds`.
    #[error("{path} is no repository of a metadata server (no mds.json); make one with `cairn -c NAME make-mds -r {path}`", path = path.display())]
    NotARepository {
        /// The directory.
        path: PathBuf,
    },
    /// `mds.json` cannot be understood.
    #[error("{path} is damaged: {reason}; put it back from a backup, or remove this server from the cluster with \
             `cairn rm-mds` and make a new one: the others have everything", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Another process has it.
    #[error("{path} is in use by another process", path = path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> RepositoryError + 'a {
    move |source| RepositoryError::Io { action, path: path.to_owned(), source }
}

/// A repository that this process has locked.
pub struct Repository {
    /// The directory.
    pub dir: PathBuf,
    /// What it says of itself.
    pub identity: Identity,
    _lock: File,
}

impl Identity {
    /// The cluster's identity.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.cluster.parse().ok()
    }

    /// The servers known at creation.
    pub fn servers(&self) -> Vec<MdsInfo> {
        let info =
            |&(id, addr): &(u64, SocketAddr)| MdsInfo { mds: MdsId(id), addr, voter: false, repository: String::new() };
        self.servers.iter().map(info).collect()
    }
}

/// Prepares an empty directory; refuses one that holds anything.
///
/// # Errors
/// [`RepositoryError`] when it cannot be made or is not empty.
pub fn prepare(dir: &Path) -> Result<(), RepositoryError> {
    std::fs::create_dir_all(dir).map_err(io("create directory", dir))?;
    let mut entries = std::fs::read_dir(dir).map_err(io("read directory", dir))?;
    let found = entries.find_map(|entry| {
        let name = entry.ok()?.file_name().to_string_lossy().into_owned();
        (name != "lost+found").then_some(name)
    });
    match found {
        Some(found) => Err(RepositoryError::NotEmpty { path: dir.to_owned(), found }),
        None => Ok(()),
    }
}

/// Makes the repository: log formatted first, identity last, so that a half-made one is never taken for whole.
///
/// # Errors
/// [`RepositoryError`] when the disk is full, read-only, or refuses.
pub fn create(dir: &Path, identity: &Identity, initial: &cairn_consensus::Initial) -> Result<(), RepositoryError> {
    use std::os::unix::fs::FileExt;
    let path = dir.join("log");
    let file = File::create(&path).map_err(io("create", &path))?;
    let zeros = vec![0u8; 1 << 20];
    for at in (0..LOG_SIZE).step_by(zeros.len()) {
        // Written, not only reserved: unwritten extents make every later write a journalled conversion.
        file.write_all_at(&zeros, at).map_err(io("fill", &path))?;
    }
    let config = log_config(identity);
    for op in cairn_consensus::Consensus::format(&config, identity.instance, initial) {
        match op {
            cairn_env::DiskOp::Write { mut offset, bufs } => {
                for buf in bufs {
                    file.write_all_at(&buf, offset).map_err(io("write", &path))?;
                    offset += buf.len() as u64;
                }
            }
            _ => file.sync_all().map_err(io("sync", &path))?,
        }
    }
    file.sync_all().map_err(io("sync", &path))?;
    write_identity(dir, identity)
}

fn write_identity(dir: &Path, identity: &Identity) -> Result<(), RepositoryError> {
    let (path, temporary) = (dir.join("mds.json"), dir.join("mds.json.new"));
    let text = serde_json::to_string_pretty(identity).expect("an identity can be written") + "\n";
    std::fs::write(&temporary, text).map_err(io("write", &temporary))?;
    File::open(&temporary).and_then(|file| file.sync_all()).map_err(io("sync", &temporary))?;
    std::fs::rename(&temporary, &path).map_err(io("rename", &path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

/// Parameters of the log of a server.
pub fn log_config(identity: &Identity) -> cairn_consensus::Config {
    let cluster = identity.cluster_id().unwrap_or_default();
    let mut config = cairn_consensus::Config::new(MdsId(identity.id), cluster);
    config.log_size_bytes = LOG_SIZE;
    config.write_through = true;
    config
}

impl Repository {
    /// Writes the servers down when they are others than before. On a disk without room the list stays as it was, which
    /// matters only to a server that loses its image too.
    pub fn remember_servers(&mut self, servers: Vec<(u64, SocketAddr)>) {
        if !servers.is_empty() && servers != self.identity.servers {
            let identity = Identity { servers, ..self.identity.clone() };
            let _ = write_identity(&self.dir, &identity);
            self.identity = identity;
        }
    }

    /// Puts a damaged image aside, or removes it where keeping it would take the room for a new one. Says what it did.
    ///
    /// # Errors
    /// [`RepositoryError`] when that fails.
    pub fn put_image_aside(&self) -> Result<String, RepositoryError> {
        let (path, aside) = (self.dir.join("image.redb"), self.dir.join("image.damaged"));
        let len = std::fs::metadata(&path).map_or(0, |image| image.len());
        let free = cairn_env_real::free_bytes(&self.dir).unwrap_or(0);
        let done = if free < 2 * len + 4 * crate::image_file::FREE_MIN {
            std::fs::remove_file(&path).map_err(io("remove", &path))?;
            "it is removed, for there is little room".to_owned()
        } else {
            std::fs::rename(&path, &aside).map_err(io("rename", &path))?;
            format!("it is kept as {}", aside.display())
        };
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io("sync", &self.dir))?;
        Ok(done)
    }

    /// Locks a repository and reads its identity.
    ///
    /// # Errors
    /// [`RepositoryError`] when it is none, is damaged or in use.
    pub fn open(dir: &Path) -> Result<Self, RepositoryError> {
        let path = dir.join("mds.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(RepositoryError::NotARepository { path: dir.to_owned() });
            }
            Err(source) => return Err(RepositoryError::Io { action: "read", path, source }),
        };
        let damaged = |reason: String| RepositoryError::Damaged { path: path.clone(), reason };
        let identity: Identity = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if identity.version != 1 || identity.cluster_id().is_none() || identity.id == 0 {
            return Err(damaged("its version, cluster or id makes no sense".to_owned()));
        }
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), identity, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(RepositoryError::InUse { path: dir.to_owned() }),
            Err(TryLockError::Error(source)) => Err(RepositoryError::Io { action: "lock", path: lock_path, source }),
        }
    }
}
