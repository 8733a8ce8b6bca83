//! The directory of a chunk server on disk.
//!
//! ```text
//! DIR/mds.list  addresses of all metadata servers as they told them last, one a line, replaced as a whole
//! DIR/cs.conf   who the server is: `key = value` lines, replaced as a whole
//! DIR/store     the chunk store: a preallocated file, or a link to a raw block device
//! DIR/lock      locked while a process uses the directory
//! ```

use cairn_store::{FormatError, StoreConfig};
use cairn_types::{BLOCK_SIZE_U64, ClusterId, CsId, HostId, format_size};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// First line of `cs.conf`; a later layout gets another number.
const FORMAT_LINE: (&str, &str) = ("format", "1");
/// Share of the free space a store takes unless told otherwise.
const FREE_SHARE_PERCENT: u64 = 90;
/// Name of the file with the addresses of the metadata servers, and how many are read.
const MDS_LIST: &str = "mds.list";
const MDS_LIST_MAX: usize = 64;
/// Longest `cs.conf` read.
const CONF_BYTES_MAX: u64 = 64 << 10;

/// Who a chunk server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub cluster_name: String,
    /// Its id; none before it first registered.
    pub cs: Option<CsId>,
    /// Uuid of the store.
    pub store: [u8; 16],
    /// The host it was made on.
    pub host: HostId,
    /// Tier, 0 to 3.
    pub tier: u8,
}

/// What `make-cs` is told.
#[derive(Clone, Debug)]
pub struct MakeCs {
    /// The directory; made if missing.
    pub dir: PathBuf,
    /// The cluster to join.
    pub cluster: ClusterId,
    /// Its name.
    pub cluster_name: String,
    /// The removed server whose place it takes, with its id; none for a new one.
    pub replaces: Option<CsId>,
    /// Identity of this host.
    pub host: HostId,
    /// Tier, 0 to 3.
    pub tier: u8,
    /// Size of the store; never more than 90 % of the free space, which is also what none means.
    pub size: Option<u64>,
    /// A raw block device to use instead of a file; everything on it is lost.
    pub device: Option<PathBuf>,
    /// Write the whole store file now instead of ahead of use.
    pub fill: bool,
}

/// Why a repository directory cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// Not made by `make-cs`.
    #[error("{} is not the directory of a chunk server: {missing} is missing; check the path and whether the disk is mounted", .dir.display())]
    NotACs {
        /// The directory.
        dir: PathBuf,
        /// What is not there.
        missing: &'static str,
    },
    /// Made already.
    #[error("{} is the directory of a chunk server already; choose another, or remove that server first", .dir.display())]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// It holds something else.
    #[error("{} is not empty ({found}); a chunk server wants a directory of its own", .dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
        /// The first thing in it.
        found: String,
    },
    /// Of another cluster.
    #[error("{} belongs to cluster {theirs}, not to {ours}; check the path and `-c`", .dir.display())]
    OtherCluster {
        /// The directory.
        dir: PathBuf,
        /// Its cluster.
        theirs: String,
        /// The cluster wanted.
        ours: String,
    },
    /// Another process uses it.
    #[error("{} is in use by another process", .dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// `cs.conf` cannot be understood.
    #[error("{} is damaged{}: {what}; put the file back from a backup (`cairn doctor cs` says which cluster and store it \
             is of), or remove this server with `cairn rm-cs -f` and make a new one: its chunks are copied from the others",
             .path.display(), if *.line == 0 { String::new() } else { format!(", line {line}") })]
    Conf {
        /// The file.
        path: PathBuf,
        /// Number of the line; zero when a line is missing.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Too little space.
    #[error("{} has {} free, of which a store may take {FREE_SHARE_PERCENT} %: too little", .dir.display(), format_size(*.free))]
    TooSmall {
        /// The directory.
        dir: PathBuf,
        /// Bytes free.
        free: u64,
        /// What the store said.
        #[source]
        source: FormatError,
    },
    /// A tier there is not.
    #[error("there is no tier {0}; tiers are 0 to 3")]
    Tier(u8),
    /// The operating system refused.
    #[error("{action} {}{}", .path.display(), hint(.source))]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The store file.
    #[error("store file")]
    Disk(#[from] cairn_env_real::OpenDiskError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ReadOnlyFilesystem => {
            " (the file system is read-only: it may have failed; check the disk and mount it again)"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            " (the file system is full: make room or choose a smaller size)"
        }
        ErrorKind::PermissionDenied => " (permission denied: run as root or as the owner of the directory)",
        _ => "",
    }
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RepositoryError {
    let path = path.to_owned();
    move |source| RepositoryError::System { action, path, source }
}

impl CsIdentity {
    fn to_text(&self) -> String {
        let hex: String = self.store.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut text = String::from("# Identity of a Cairn chunk server. Written by cairn; do not edit.\n");
        let mut line = |key: &str, value: &str| text.push_str(&format!("{key} = {value}\n"));
        line(FORMAT_LINE.0, FORMAT_LINE.1);
        line("cluster", &self.cluster.to_string());
        line("cluster_name", &self.cluster_name);
        line("store", &hex);
        line("host", &self.host.to_string());
        line("tier", &self.tier.to_string());
        if let Some(cs) = self.cs {
            line("cs", &cs.0.to_string());
        }
        text
    }

    fn from_text(path: &Path, text: &str) -> Result<Self, RepositoryError> {
        let wrong = |line: usize, what: String| RepositoryError::Conf { path: path.to_owned(), line, what };
        let (mut format, mut cluster, mut name, mut store, mut host) = (None, None, None, None, None);
        let (mut tier, mut cs) = (None, None);
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = line.split_once('=').ok_or_else(|| wrong(at + 1, "not a `key = value` line".into()))?;
            let (key, value) = (key.trim(), value.trim());
            let bad = |what: &dyn std::fmt::Display| wrong(at + 1, format!("{key}: {what}"));
            match key {
                "format" if value == FORMAT_LINE.1 => format = Some(()),
                "format" => return Err(bad(&format_args!("format {value} was written by a newer version"))),
                "cluster" => cluster = Some(value.parse::<ClusterId>().map_err(|error| bad(&error))?),
                "cluster_name" => name = Some(value.to_owned()),
                // A store uuid is written like every other id of 16 bytes.
                "store" => store = Some(value.parse::<HostId>().map_err(|error| bad(&error))?.0),
                "host" => host = Some(value.parse::<HostId>().map_err(|error| bad(&error))?),
                "tier" => tier = Some(value.parse::<u8>().map_err(|error| bad(&error))?),
                "cs" => cs = Some(CsId(value.parse::<u32>().map_err(|error| bad(&error))?)),
                _ => return Err(wrong(at + 1, format!("unknown key `{key}`"))),
            }
        }
        let missing = |key: &str| wrong(0, format!("the line `{key} = ...` is missing"));
        format.ok_or_else(|| missing("format"))?;
        Ok(Self {
            cluster: cluster.ok_or_else(|| missing("cluster"))?,
            cluster_name: name.ok_or_else(|| missing("cluster_name"))?,
            cs,
            store: store.ok_or_else(|| missing("store"))?,
            host: host.ok_or_else(|| missing("host"))?,
            tier: tier.ok_or_else(|| missing("tier"))?,
        })
    }
}

/// An opened and locked repository directory.
#[derive(Debug)]
pub struct Repository {
    dir: PathBuf,
    identity: CsIdentity,
    _lock: File,
}

impl Repository {
    /// Opens the directory of a chunk server of this cluster.
    ///
    /// # Errors
    /// [`RepositoryError`] saying what is wrong with it and what to do.
    pub fn open(dir: &Path, cluster_name: &str) -> Result<Self, RepositoryError> {
        let lock = lock(dir)?;
        let identity = read_identity(dir)?;
        if identity.cluster_name != cluster_name {
            let (theirs, ours) = (identity.cluster_name, cluster_name.to_owned());
            return Err(RepositoryError::OtherCluster { dir: dir.to_owned(), theirs, ours });
        }
        if !dir.join("store").exists() {
            return Err(RepositoryError::NotACs { dir: dir.to_owned(), missing: "store" });
        }
        Ok(Self { dir: dir.to_owned(), identity, _lock: lock })
    }

    /// Who the server is.
    pub fn identity(&self) -> &CsIdentity {
        &self.identity
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The store file or device.
    pub fn store_path(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Addresses of the metadata servers as [`Repository::set_mds_list`] left them; a file that is missing or holds
    /// something else names none, as `bs.list` of the host still does.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn mds_list(&self) -> Result<Vec<SocketAddr>, RepositoryError> {
        let path = self.dir.join(MDS_LIST);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(CONF_BYTES_MAX).read_to_end(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            read => read.map_err(system("read", &path))?,
        };
        let text = String::from_utf8_lossy(&text);
        Ok(text.lines().filter_map(|line| line.trim().parse().ok()).take(MDS_LIST_MAX).collect())
    }

    /// Writes down the addresses of all metadata servers, durably.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn set_mds_list(&mut self, servers: &[SocketAddr]) -> Result<(), RepositoryError> {
        let text: String = servers.iter().map(|addr| format!("{addr}\n")).collect();
        replace_file(&self.dir, MDS_LIST, &text)
    }

    /// Writes down the id the cluster gave, durably.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn set_cs(&mut self, cs: CsId) -> Result<(), RepositoryError> {
        let identity = CsIdentity { cs: Some(cs), ..self.identity.clone() };
        write_identity(&self.dir, &identity)?;
        self.identity = identity;
        Ok(())
    }
}

/// Reads who the server in a directory is, without locking it: for listings.
///
/// # Errors
/// [`RepositoryError`] when the directory is none of a chunk server.
pub fn read_identity(dir: &Path) -> Result<CsIdentity, RepositoryError> {
    let path = dir.join("cs.conf");
    let not_a_cs = || RepositoryError::NotACs { dir: dir.to_owned(), missing: "cs.conf" };
    let metadata = std::fs::metadata(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => not_a_cs(),
        _ => system("read", &path)(error),
    })?;
    if metadata.len() > CONF_BYTES_MAX {
        let what = format!("{} bytes are too many for an identity", metadata.len());
        return Err(RepositoryError::Conf { path, line: 0, what });
    }
    let text = std::fs::read_to_string(&path).map_err(system("read", &path))?;
    CsIdentity::from_text(&path, &text)
}

fn write_identity(dir: &Path, identity: &CsIdentity) -> Result<(), RepositoryError> {
    replace_file(dir, "cs.conf", &identity.to_text())
}

/// Replaces a file of the directory as a whole, durably.
fn replace_file(dir: &Path, name: &str, text: &str) -> Result<(), RepositoryError> {
    let (path, fresh) = (dir.join(name), dir.join(format!("{name}.new")));
    let mut file = File::create(&fresh).map_err(system("create", &fresh))?;
    file.write_all(text.as_bytes()).map_err(system("write", &fresh))?;
    file.sync_all().map_err(system("sync", &fresh))?;
    std::fs::rename(&fresh, &path).map_err(system("replace", &path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(system("sync", dir))
}

fn lock(dir: &Path) -> Result<File, RepositoryError> {
    if !dir.is_dir() {
        return Err(RepositoryError::NotACs { dir: dir.to_owned(), missing: "the directory itself" });
    }
    let path = dir.join("lock");
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(system("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RepositoryError::InUse { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(system("lock", &path)(source)),
    }
}

/// Makes the directory of a new chunk server and formats its store. The server registers when it first runs.
/// `progress` hears of the bytes written while the store file is filled.
///
/// # Errors
/// [`RepositoryError`] saying what is wrong and what to do. A directory that was half made holds no `cs.conf` and can
/// be made again.
pub fn make_cs(make: &MakeCs, progress: impl FnMut(u64)) -> Result<CsIdentity, RepositoryError> {
    let dir = &make.dir;
    if make.tier > 3 {
        return Err(RepositoryError::Tier(make.tier));
    }
    std::fs::create_dir_all(dir).map_err(system("create", dir))?;
    let _lock = lock(dir)?;
    if dir.join("cs.conf").exists() {
        return Err(RepositoryError::Exists { dir: dir.clone() });
    }
    let store = dir.join("store");
    for entry in std::fs::read_dir(dir).map_err(system("list", dir))? {
        let name = entry.map_err(system("list", dir))?.file_name().to_string_lossy().into_owned();
        let left_over = ["lock", "store", "store.unfinished", "cs.conf.new"].contains(&name.as_str());
        if !left_over && name != "lost+found" {
            return Err(RepositoryError::NotEmpty { dir: dir.clone(), found: name });
        }
    }
    let identity = CsIdentity {
        cluster: make.cluster,
        cluster_name: make.cluster_name.clone(),
        cs: make.replaces,
        store: cairn_env_real::random_bytes::<16>(),
        host: make.host,
        tier: make.tier,
    };
    // Without `cs.conf` a store here is what an interrupted attempt left.
    match std::fs::remove_file(&store) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(system("remove", &store)(error)),
        _ => {}
    }
    let free = match &make.device {
        Some(device) => {
            std::os::unix::fs::symlink(device, &store).map_err(system("link", &store))?;
            0
        }
        None => make_store_file(make, &store, progress)?,
    };
    // Opened only to learn the size of a device; the reactor's kind of disk is not needed to format.
    let size =
        cairn_env_real::Disk::open_file(&store, cairn_env_real::DiskOptions { fill_ahead: 0, ..Default::default() })?
            .size();
    let config = StoreConfig { cluster: make.cluster, store_uuid: identity.store, capacity_bytes: 0 };
    let ops = cairn_store::format(&config, size).map_err(|source| RepositoryError::TooSmall {
        dir: dir.clone(),
        free: free.max(size),
        source,
    })?;
    write_format(&store, ops).map_err(system("format", &store))?;
    // Last of all: only now is the directory one of a chunk server.
    write_identity(dir, &identity)?;
    Ok(identity)
}

/// Makes the store file; gives the bytes that were free before.
fn make_store_file(make: &MakeCs, store: &Path, progress: impl FnMut(u64)) -> Result<u64, RepositoryError> {
    let free = cairn_env_real::free_bytes(&make.dir).map_err(system("measure", &make.dir))?;
    let limit = free / 100 * FREE_SHARE_PERCENT;
    let size = make.size.unwrap_or(limit).min(limit) / BLOCK_SIZE_U64 * BLOCK_SIZE_U64;
    let least = cairn_store::SLOTS_MIN * BLOCK_SIZE_U64;
    if size < least {
        let source = FormatError::TooSmall { bytes: size };
        return Err(RepositoryError::TooSmall { dir: make.dir.clone(), free, source });
    }
    if make.fill {
        cairn_env_real::Disk::create_filled(store, size, progress)?;
    } else {
        let options = cairn_env_real::DiskOptions { create_size: Some(size), fill_ahead: 0, ..Default::default() };
        cairn_env_real::Disk::open_file(store, options)?;
    }
    Ok(free)
}

fn write_format(store: &Path, ops: Vec<cairn_env::DiskOp>) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(store)?;
    for op in ops {
        match op {
            cairn_env::DiskOp::Write { offset, bufs } => {
                let mut at = offset;
                for buf in bufs {
                    file.write_all_at(&buf, at)?;
                    at += buf.len() as u64;
                }
            }
            cairn_env::DiskOp::Flush => file.sync_all()?,
            other => unreachable!("formatting only writes and flushes, not {other:?}"),
        }
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(dir: &Path) -> MakeCs {
        MakeCs {
            replaces: None,
            dir: dir.to_owned(),
            cluster: ClusterId([7; 16]),
            cluster_name: "stor1".into(),
            host: HostId([9; 16]),
            tier: 1,
            size: Some(32 << 20),
            device: None,
            fill: false,
        }
    }

    #[test]
    fn a_made_directory_opens_once_and_only_for_its_cluster() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("cs1");
        let identity = make_cs(&make(&dir), |_| {}).unwrap();
        assert!(matches!(Repository::open(&dir, "stor2"), Err(RepositoryError::OtherCluster { .. })));
        let mut repository = Repository::open(&dir, "stor1").unwrap();
        assert_eq!(repository.identity(), &identity);
        assert!(matches!(Repository::open(&dir, "stor1"), Err(RepositoryError::InUse { .. })));
        repository.set_cs(CsId(1025)).unwrap();
        assert_eq!(repository.mds_list().unwrap(), []);
        let servers: Vec<SocketAddr> = vec!["10.0.0.1:2510".parse().unwrap(), "[fe80::1]:7".parse().unwrap()];
        repository.set_mds_list(&servers[..1]).unwrap();
        repository.set_mds_list(&servers).unwrap();
        drop(repository);
        let repository = Repository::open(&dir, "stor1").unwrap();
        assert_eq!(repository.identity().cs, Some(CsId(1025)));
        assert_eq!(repository.mds_list().unwrap(), servers);
        std::fs::write(dir.join(MDS_LIST), b"10.0.0.1:2510\n\xff\xff garbage\n").unwrap();
        assert_eq!(repository.mds_list().unwrap(), servers[..1], "what is no address is no reason not to start");
        drop(repository);
        assert!(matches!(make_cs(&make(&dir), |_| {}), Err(RepositoryError::Exists { .. })));
    }

    #[test]
    fn wrong_places_are_named() {
        let scratch = tempfile::tempdir().unwrap();
        let (dir, missing) = (scratch.path(), scratch.path().join("none"));
        assert!(matches!(Repository::open(&missing, "stor1"), Err(RepositoryError::NotACs { .. })));
        assert!(matches!(Repository::open(dir, "stor1"), Err(RepositoryError::NotACs { .. })));
        std::fs::write(dir.join("photo.jpg"), b"x").unwrap();
        assert!(matches!(make_cs(&make(dir), |_| {}), Err(RepositoryError::NotEmpty { .. })));
        let other = scratch.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("cs.conf"), "format = 1\ntier = x\n").unwrap();
        assert!(matches!(Repository::open(&other, "stor1"), Err(RepositoryError::Conf { line: 2, .. })));
        std::fs::write(other.join("cs.conf"), "format = 1\n").unwrap();
        assert!(matches!(Repository::open(&other, "stor1"), Err(RepositoryError::Conf { line: 0, .. })));
    }

    #[test]
    fn an_interrupted_attempt_can_be_repeated() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::write(scratch.path().join("store"), b"half").unwrap();
        make_cs(&make(scratch.path()), |_| {}).unwrap();
    }
}
