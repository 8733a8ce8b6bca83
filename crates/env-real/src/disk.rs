//! Opening the files and block devices a process stores its data on.

use crate::fill::{Filler, RangeSet};
use crate::sys;
use cairn_env::{BufMut, DISK_ALIGNMENT};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const CREATE_PIECE: u64 = 4 << 20;
const LOCK_ATTEMPTS_MAX: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Creates the file with this size when it does not exist; without it a missing file is an error.
    pub create_size: Option<u64>,
    /// Makes every write durable before it completes (`RWF_DSYNC`).
    pub write_through: bool,
    /// A request without an answer for this long fails with a timeout.
    pub deadline: Duration,
    /// Refuses writes; several readers may share the disk.
    pub read_only: bool,
    /// Bypasses the page cache. Falls back, with a warning, where the file system cannot (tmpfs).
    pub direct: bool,
    /// How far ahead of the furthest write never-written extents are filled with zeros while the disk is idle; 0 turns
    /// filling off.
    pub fill_ahead: u64,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            create_size: None,
            write_through: false,
            deadline: Duration::from_secs(30),
            read_only: false,
            direct: true,
            fill_ahead: 4 << 30,
        }
    }
}

/// A disk that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    /// The operating system refused.
    #[error("{action} {path}")]
    System {
        /// What was tried: `open`, `allocate`, ...
        action: &'static str,
        /// The file or device.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process")]
    InUse {
        /// The file or device.
        path: PathBuf,
    },
    /// Neither a file nor a block device.
    #[error("{path} is neither a regular file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// The size asked for is not a positive multiple of the block size.
    #[error("the size of {path} must be a positive multiple of {DISK_ALIGNMENT} bytes, not {size}")]
    Size {
        /// The file.
        path: PathBuf,
        /// The size asked for.
        size: u64,
    },
}

/// An open disk: a store file or a block device, locked against other processes. Give it to a reactor.
#[derive(Debug)]
pub struct Disk {
    pub(crate) file: Arc<File>,
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) is_device: bool,
    pub(crate) options: DiskOptions,
    pub(crate) filler: Filler,
    pub(crate) warning: Option<String>,
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenDiskError {
    let path = path.to_owned();
    move |source| OpenDiskError::System { action, path, source }
}

/// Opens with `O_DIRECT` when asked and possible; the second value says whether it is.
fn open_direct(options: &OpenOptions, path: &Path, direct: bool) -> io::Result<(File, bool)> {
    if direct {
        match options.clone().custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path) {
            Ok(file) => return Ok((file, true)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((options.open(path)?, false))
}

/// Locks a disk. The kernel may hold the lock of a process that has just died a little longer than the process lived,
/// until its last writes are done.
fn lock(file: &File, path: &Path, shared: bool) -> Result<(), OpenDiskError> {
    for attempt in 1.. {
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if attempt < LOCK_ATTEMPTS_MAX => pause(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(OpenDiskError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(system("lock", path)(source)),
        }
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "opening happens before any reactor turns")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Makes the directory entry of a new file survive a power cut.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

impl Disk {
    /// Opens a store file or, found by its type, a block device.
    ///
    /// A file that does not exist is created when `options.create_size` is given: its blocks are reserved at once and
    /// filled lazily ahead of the writes ([`DiskOptions::fill_ahead`]).
    ///
    /// # Errors
    /// [`OpenDiskError`] naming what was refused.
    pub fn open_file(path: impl AsRef<Path>, options: DiskOptions) -> Result<Disk, OpenDiskError> {
        let path = path.as_ref();
        if let Some(size) = options.create_size.filter(|_| !options.read_only && !path.exists()) {
            create(path, size, |_| Ok(()))?;
        }
        let mut how = OpenOptions::new();
        how.read(true).write(!options.read_only);
        let (file, is_direct) = open_direct(&how, path, options.direct).map_err(system("open", path))?;
        lock(&file, path, options.read_only)?;
        let metadata = file.metadata().map_err(system("stat", path))?;
        let is_device = metadata.file_type().is_block_device();
        let size = if is_device {
            sys::block_device_size(&file).map_err(system("measure", path))?
        } else if metadata.is_file() {
            metadata.len()
        } else {
            return Err(OpenDiskError::Kind { path: path.to_owned() });
        };
        let mut unwritten = RangeSet::default();
        // Only with direct IO: filling must never race with pages of the cache.
        if is_direct && !is_device && !options.read_only && options.fill_ahead > 0 {
            for (start, len) in sys::unwritten_ranges(&file).map_err(system("map", path))? {
                let aligned = (start.next_multiple_of(DISK_ALIGNMENT), (start + len).min(size) / DISK_ALIGNMENT);
                unwritten.insert(aligned.0, aligned.1 * DISK_ALIGNMENT);
            }
        }
        let warning = (options.direct && !is_direct)
            .then(|| format!("{}: the file system cannot bypass the page cache; latencies will vary", path.display()));
        Ok(Disk {
            file: Arc::new(file),
            path: path.to_owned(),
            size: size / DISK_ALIGNMENT * DISK_ALIGNMENT,
            is_device,
            filler: Filler::new(unwritten, options.fill_ahead),
            options,
            warning,
        })
    }

    /// Creates a store file of `size` bytes with every block written, about half a second per GiB on a fast disk.
    /// `progress` hears the number of bytes written so far. An existing file is left alone and is an error.
    ///
    /// # Errors
    /// [`OpenDiskError`]; a file that could not be completed is removed.
    pub fn create_filled(
        path: impl AsRef<Path>,
        size: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<(), OpenDiskError> {
        create(path.as_ref(), size, |unfinished| {
            let (file, _) = open_direct(OpenOptions::new().write(true), unfinished, true)?;
            let zeros = BufMut::zeroed(CREATE_PIECE as usize);
            let mut written = 0;
            while written < size {
                let piece = CREATE_PIECE.min(size - written);
                file.write_all_at(&zeros[..piece as usize], written)?;
                written += piece;
                progress(written);
            }
            file.sync_all()
        })
    }

    /// Size in bytes, a multiple of [`DISK_ALIGNMENT`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is worth telling the operator about this disk; a reactor logs it.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }
}

/// Creates a file with all its blocks reserved, durably, or not at all: it gets its name only when it is whole.
fn create(path: &Path, size: u64, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), OpenDiskError> {
    if size == 0 || !size.is_multiple_of(DISK_ALIGNMENT) {
        return Err(OpenDiskError::Size { path: path.to_owned(), size });
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    let unfinished = path.with_file_name(name);
    let finish = || -> Result<(), OpenDiskError> {
        // A left-over of an attempt that was cut short holds nothing of value.
        let mut how = OpenOptions::new();
        let file = how.write(true).create(true).truncate(true).mode(0o600).open(&unfinished);
        let file = file.map_err(system("create", &unfinished))?;
        match sys::allocate(&file, size) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                file.set_len(size).map_err(system("resize", path))?;
            }
            other => other.map_err(system("allocate", path))?,
        }
        fill(&unfinished).map_err(system("fill", path))?;
        file.sync_all().map_err(system("sync", path))?;
        sys::rename_new(&unfinished, path).map_err(system("name", path))?;
        sync_parent(path).map_err(system("sync the directory of", path))
    };
    finish().inspect_err(|_| {
        let _ = std::fs::remove_file(&unfinished);
    })
}
