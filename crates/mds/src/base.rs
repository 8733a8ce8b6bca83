//! The durable image of the metadata state: what the overlay's memtable is flushed into and what a lagging server
//! receives.
//!
//! The image always stands at one index of the log, its [`ImageMark`]. The state machine reads *active memtable →
//! frozen memtable → image*; a checkpoint moves the frozen memtable into the image in one transaction, then the log up
//! to the mark may go. In production the image is a redb file written by a thread of its own; the simulator keeps it in
//! memory.

pub use crate::image_file::Room;
use cairn_meta::BaseKv;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Changes of a frozen memtable: none deletes the key.
pub type Changes = Arc<BTreeMap<Vec<u8>, Option<Vec<u8>>>>;
/// Keys and values, ascending.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Where in the log an image stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageMark {
    /// Last index contained; 0 for an empty image.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// The members of the group at that index, as `cairn-consensus` encodes them.
    pub members: Vec<u8>,
}

/// An image that cannot be read or written. The server stops: its state is the log's and the other servers' now.
#[derive(Clone, Debug, thiserror::Error)]
#[error("metadata image: {what}")]
pub struct BaseError {
    /// What is wrong.
    pub what: String,
    /// Only room is missing: the image is whole.
    pub no_room: bool,
    /// What is stored is not what was written: only another image helps.
    pub damaged: bool,
}

/// The image was found damaged in the middle of something. It unwinds out of the core, whose state is of no use from
/// then on; the shell catches it, puts the image aside and starts anew without one.
pub struct ImageDamaged(pub String);

/// Gives the image up.
pub(crate) fn give_up(error: BaseError) -> ! {
    std::panic::resume_unwind(Box::new(ImageDamaged(error.what)))
}

/// The durable image. One flush or one installation is under way at a time.
pub trait Base: BaseKv {
    /// Where the durable image stands.
    fn mark(&self) -> ImageMark;

    /// Begins to move `changes` into the image, which then stands at `mark`, atomically.
    fn begin_flush(&mut self, mark: ImageMark, changes: Changes);

    /// Begins an installation: a new, empty image beside the current one.
    fn begin_install(&mut self);

    /// Adds keys to the new image; with `mark` it is complete and takes the place of the current one, atomically.
    fn install(&mut self, pairs: Pairs, mark: Option<ImageMark>);

    /// The outcome of the last `begin_flush` or `install`, once it is there.
    fn poll(&mut self) -> Option<Result<(), BaseError>>;

    /// How much room the disk of the image has.
    fn room(&self) -> Room;

    /// A reader of the durable image as it is now, unmoved by later flushes.
    fn reader(&self) -> Box<dyn ImageReader>;
}

/// Reads an image from the first key to the last.
pub trait ImageReader {
    /// Where the image stands.
    fn mark(&self) -> ImageMark;

    /// The next pairs, about `bytes_max` bytes of them; empty at the end.
    fn next_pairs(&mut self, bytes_max: usize) -> Result<Pairs, BaseError>;
}

/// An image in memory: for the simulator, where its content is the "disk" that survives a restart.
#[derive(Clone, Default)]
pub struct MemBase {
    durable: std::rc::Rc<std::cell::RefCell<MemImage>>,
    pending: Option<(ImageMark, Changes)>,
    installing: BTreeMap<Vec<u8>, Vec<u8>>,
    installed: Option<Option<ImageMark>>,
    room: std::rc::Rc<std::cell::Cell<Room>>,
}

/// The content that survives.
#[derive(Default)]
struct MemImage {
    mark: ImageMark,
    pairs: Arc<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl MemBase {
    /// The same durable content for the next start of the process; what was under way is lost.
    pub fn reopen(&self) -> MemBase {
        MemBase { durable: self.durable.clone(), room: self.room.clone(), ..MemBase::default() }
    }

    /// Its content is gone.
    pub fn lose(&self) {
        *self.durable.borrow_mut() = MemImage::default();
    }

    /// How much room its "disk" has from now on. While writes wait, no flush and no installation ends.
    pub fn set_room(&self, room: Room) {
        self.room.set(room);
    }
}

impl BaseKv for MemBase {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.durable.borrow().pairs.get(key).cloned()
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs {
        let image = self.durable.borrow();
        image.pairs.range(from.to_vec()..to.to_vec()).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

impl Base for MemBase {
    fn mark(&self) -> ImageMark {
        self.durable.borrow().mark.clone()
    }

    fn begin_flush(&mut self, mark: ImageMark, changes: Changes) {
        assert!(self.pending.is_none(), "one flush at a time");
        self.pending = Some((mark, changes));
    }

    fn begin_install(&mut self) {
        self.installing.clear();
    }

    fn install(&mut self, pairs: Pairs, mark: Option<ImageMark>) {
        self.installing.extend(pairs);
        self.installed = Some(mark);
    }

    fn room(&self) -> Room {
        self.room.get()
    }

    fn poll(&mut self) -> Option<Result<(), BaseError>> {
        if self.room.get().waits {
            return None;
        }
        if let Some(mark) = self.installed.take() {
            if let Some(mark) = mark {
                let pairs = Arc::new(std::mem::take(&mut self.installing));
                *self.durable.borrow_mut() = MemImage { mark, pairs };
            }
            return Some(Ok(()));
        }
        let (mark, changes) = self.pending.take()?;
        let mut image = self.durable.borrow_mut();
        let pairs = Arc::make_mut(&mut image.pairs);
        for (key, value) in changes.iter() {
            match value {
                Some(value) => pairs.insert(key.clone(), value.clone()),
                None => pairs.remove(key),
            };
        }
        image.mark = mark;
        Some(Ok(()))
    }

    fn reader(&self) -> Box<dyn ImageReader> {
        let image = self.durable.borrow();
        Box::new(MemReader { mark: image.mark.clone(), pairs: image.pairs.clone(), after: None })
    }
}

struct MemReader {
    mark: ImageMark,
    pairs: Arc<BTreeMap<Vec<u8>, Vec<u8>>>,
    after: Option<Vec<u8>>,
}

impl ImageReader for MemReader {
    fn mark(&self) -> ImageMark {
        self.mark.clone()
    }

    fn next_pairs(&mut self, bytes_max: usize) -> Result<Pairs, BaseError> {
        use std::ops::Bound;
        let from = self.after.as_ref().map_or(Bound::Unbounded, |key| Bound::Excluded(key.clone()));
        let mut out = Vec::new();
        let mut bytes = 0;
        for (key, value) in self.pairs.range((from, Bound::Unbounded)) {
            out.push((key.clone(), value.clone()));
            bytes += key.len() + value.len();
            if bytes >= bytes_max {
                break;
            }
        }
        if let Some((key, _)) = out.last() {
            self.after = Some(key.clone());
        }
        Ok(out)
    }
}
