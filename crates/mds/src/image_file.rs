//! The file of the durable image, below redb: it waits for room instead of failing.
//!
//! redb gives a database up for good at the first write that fails, readers included. So a write that finds the disk
//! full never fails here: the blocks of each piece of the file are reserved before something is written to it, and
//! where there are none the writer's thread waits until there are. Its server goes on meanwhile: it reads what the
//! last transaction left and keeps the changes since in memory and in its log.
//!
//! A *reserve* lies beside the image, `image.reserve`: blocks that are given up for the image when the disk is full.
//! Moving changes into the image needs room even when nothing is added, because a page is never written in place; with
//! the reserve a server on a full disk can go on deleting. It is filled again when there is room.

use redb::StorageBackend;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes kept beside the image for when the disk is full.
pub const RESERVE_BYTES: u64 = 64 << 20;
/// The disk is said to be full when fewer bytes than this are free, and to have room when twice as many are.
pub const FREE_MIN: u64 = 64 << 20;
/// Blocks are reserved in pieces of this size.
const PIECE: u64 = 256 << 10;
/// The reserve is filled and given up in steps of this size.
const STEP: u64 = 1 << 20;
/// How often room is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Where blocks come from: the file system, or a test.
pub trait Blocks: Send + Sync + 'static {
    /// Reserves the blocks of a range of a file, whose length stays.
    ///
    /// # Errors
    /// `StorageFull` without room; `Unsupported` where nothing can be reserved.
    fn reserve(&self, file: &File, offset: u64, len: u64) -> Result<()>;

    /// Bytes free on the file system of `path`.
    ///
    /// # Errors
    /// When that cannot be told.
    fn free(&self, path: &Path) -> Result<u64>;
}

/// The blocks of the real file system.
pub struct RealBlocks;

impl Blocks for RealBlocks {
    fn reserve(&self, file: &File, offset: u64, len: u64) -> Result<()> {
        cairn_env_real::reserve_range(file, offset, len)
    }

    fn free(&self, path: &Path) -> Result<u64> {
        cairn_env_real::free_bytes(path)
    }
}

/// How much room the disk of an image has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Little is left, or the reserve is in use.
    pub short: bool,
    /// A write waits: the durable image stands still until there is room.
    pub waits: bool,
    /// Bytes free.
    pub free: u64,
}

/// What is reserved.
struct Space {
    /// One bit for each piece of the image: its blocks are there.
    backed: Vec<u64>,
    reserve: Option<Reserve>,
}

struct Reserve {
    file: File,
    len: u64,
}

/// The file of an image.
pub(crate) struct ImageFile {
    file: File,
    path: PathBuf,
    blocks: Box<dyn Blocks>,
    space: Mutex<Space>,
    /// Woken when the image closes.
    wake: Condvar,
    /// Without room it waits; otherwise it fails.
    patient: AtomicBool,
    closing: AtomicBool,
    waits: AtomicBool,
    short: AtomicBool,
    refused: AtomicBool,
    free: AtomicU64,
}

/// True for the errors of a disk, or a quota, that is used up.
fn is_no_room(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

impl Space {
    fn is_backed(&self, piece: u64) -> bool {
        self.backed.get((piece / 64) as usize).is_some_and(|word| word >> (piece % 64) & 1 == 1)
    }

    fn set_backed(&mut self, piece: u64) {
        let word = (piece / 64) as usize;
        if self.backed.len() <= word {
            self.backed.resize(word + 1, 0);
        }
        self.backed[word] |= 1 << (piece % 64);
    }

    /// The file ends at `len` now: what lay behind is gone.
    fn cut(&mut self, len: u64) {
        let piece = len / PIECE;
        self.backed.truncate((piece / 64) as usize + 1);
        if let Some(last) = self.backed.get_mut((piece / 64) as usize) {
            *last &= (1 << (piece % 64)) - 1;
        }
    }

    /// Gives up a step of the reserve; false when nothing of it is left.
    fn give_up(&mut self) -> bool {
        let Some(reserve) = self.reserve.as_mut().filter(|reserve| reserve.len > 0) else { return false };
        let len = reserve.len.saturating_sub(STEP);
        if reserve.file.set_len(len).is_err() {
            return false;
        }
        reserve.len = len;
        true
    }
}

impl ImageFile {
    /// Opens the file, or creates it.
    pub fn open(path: &Path, blocks: Box<dyn Blocks>) -> Result<Arc<Self>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => Error::new(ErrorKind::ResourceBusy, "another process has it open"),
            std::fs::TryLockError::Error(error) => error,
        })?;
        Ok(Arc::new(Self {
            file,
            path: path.to_owned(),
            blocks,
            space: Mutex::new(Space { backed: Vec::new(), reserve: None }),
            wake: Condvar::new(),
            patient: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            short: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            free: AtomicU64::new(0),
        }))
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on writes wait for room, and a reserve is kept. Gives the thread that sees to it, which ends at
    /// [`ImageFile::close_now`].
    pub fn become_patient(self: &Arc<Self>) -> Result<std::thread::JoinHandle<()>> {
        let path = self.path.with_extension("reserve");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let len = file.metadata()?.len();
        self.space().reserve = Some(Reserve { file, len });
        self.patient.store(true, Ordering::Release);
        self.look();
        let shared = Arc::clone(self);
        std::thread::Builder::new().name("image-room".to_owned()).spawn(move || {
            while !shared.pause() {
                shared.look();
            }
        })
    }

    /// Writes that wait fail, and the thread ends.
    pub fn close_now(&self) {
        self.closing.store(true, Ordering::Release);
        let _held = self.space();
        self.wake.notify_all();
    }

    /// How much room there is.
    pub fn room(&self) -> Room {
        Room {
            short: self.short.load(Ordering::Acquire),
            waits: self.waits.load(Ordering::Acquire),
            free: self.free.load(Ordering::Acquire),
        }
    }

    /// True when something failed for want of room.
    pub fn was_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }

    /// Waits a moment; true when the image closes.
    fn pause(&self) -> bool {
        let closing = || self.closing.load(Ordering::Acquire);
        let held = self.space();
        if !closing() {
            let _ = self.wake.wait_timeout(held, LOOK_EVERY);
        }
        closing()
    }

    /// Fills the reserve when there is room, and notes how much room there is.
    fn look(&self) {
        let Ok(free) = self.blocks.free(&self.path) else { return };
        let missing = self.fill_reserve(free);
        let was_short = self.short.load(Ordering::Acquire);
        let enough = if was_short { 2 * FREE_MIN } else { FREE_MIN };
        let short = missing > 0 || free < enough || self.waits.load(Ordering::Acquire);
        self.free.store(free, Ordering::Release);
        self.short.store(short, Ordering::Release);
    }

    /// Gives how much the reserve lacks afterwards.
    fn fill_reserve(&self, free: u64) -> u64 {
        let mut space = self.space();
        let Some(reserve) = &mut space.reserve else { return 0 };
        // Only out of plenty: what is taken in the last moment would be missing to the writer that waits.
        let mut left = free.saturating_sub(FREE_MIN);
        while reserve.len < RESERVE_BYTES && left >= STEP {
            let taken = self
                .blocks
                .reserve(&reserve.file, reserve.len, STEP)
                .and_then(|()| reserve.file.set_len(reserve.len + STEP));
            match taken {
                Ok(()) => (reserve.len, left) = (reserve.len + STEP, left - STEP),
                // A reserve that cannot be made is not missed.
                Err(error) if error.kind() == ErrorKind::Unsupported => return 0,
                Err(_) => {
                    // What was reserved in part lies behind the end.
                    let _ = reserve.file.set_len(reserve.len);
                    break;
                }
            }
        }
        RESERVE_BYTES.saturating_sub(reserve.len)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let pieces = offset / PIECE..(offset + data.len() as u64).div_ceil(PIECE);
        for piece in pieces {
            if self.space().is_backed(piece) {
                continue;
            }
            match self.blocks.reserve(&self.file, piece * PIECE, PIECE) {
                Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error),
                _ => self.space().set_backed(piece),
            }
        }
        self.file.write_all_at(data, offset)
    }
}

/// The backend redb gets.
pub(crate) struct Backend(pub Arc<ImageFile>);

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Backend").field(&self.0.path).finish()
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> Result<u64> {
        Ok(self.0.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.0.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        // Longer means a hole at the end, which takes no room; what lies behind a new end must be reserved anew.
        self.0.file.set_len(len)?;
        self.0.space().cut(len);
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        self.0.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let image = &*self.0;
        loop {
            match image.try_write(offset, data) {
                Err(error) if is_no_room(&error) => {
                    if image.patient.load(Ordering::Acquire) && image.space().give_up() {
                        continue;
                    }
                    image.refused.store(true, Ordering::Release);
                    if !image.patient.load(Ordering::Acquire) || image.closing.load(Ordering::Acquire) {
                        return Err(error);
                    }
                    image.waits.store(true, Ordering::Release);
                    image.short.store(true, Ordering::Release);
                    image.pause();
                }
                done => {
                    image.waits.store(false, Ordering::Release);
                    return done;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
