//! The durable image in a redb file, written by one thread of its own so that the reactor never waits for it.
//!
//! redb compares the checksums of its pages after a crash only, and trusts what it reads. So each value here ends with
//! a checksum of key and value (CRC-32C), and what redb says or does on bytes that are not its own is contained: an
//! error of it, a panic of it, a value that is not what was written, or keys out of order mean that the image is
//! damaged. It is given up then ([`ImageDamaged`]), and its server starts anew without one.
//!
//! Reads go to a read transaction of the last flush: pages come from redb's cache or the page cache. Two tables:
//! `state` with the pairs, `mark` with the [`ImageMark`]; both change in one transaction. An installation fills
//! `incoming` and is swapped in by renaming the table.

use crate::base::{Base, BaseError, Changes, ImageDamaged, ImageMark, ImageReader, Pairs, give_up};
use crate::image_file::{Backend, Blocks, ImageFile, RealBlocks, Room};
use cairn_meta::BaseKv;
use cairn_stdx::checksum::crc32c;
use cairn_stdx::planted;
use redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

const STATE: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("state");
const INCOMING: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("incoming");
const MARK: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("mark");
const CACHE_BYTES: usize = 32 << 20;
/// The values of this format end with their checksum; those of the one before, which had no number, do not.
const FORMAT: &[u8] = &[2];
/// Bytes of a checksum.
const SUM: usize = 4;

/// The pairs as a read transaction sees them.
type StateTable = ReadOnlyTable<&'static [u8], &'static [u8]>;

enum Job {
    Flush(ImageMark, Changes),
    /// Pairs, the mark of a complete image, and whether these pairs are the first.
    Install(Pairs, Option<ImageMark>, bool),
}

/// The image in a redb file.
pub struct RedbBase {
    database: Arc<Database>,
    /// The last transaction, as readers see it. Kept, because beginning another one could wait for the writer.
    shown: ReadTransaction,
    table: StateTable,
    mark: ImageMark,
    /// The next pairs of an installation are its first.
    installs_anew: bool,
    file: Arc<ImageFile>,
    keeper: Option<std::thread::JoinHandle<()>>,
    /// None only while being dropped.
    jobs: Option<Sender<Job>>,
    writer: Option<std::thread::JoinHandle<()>>,
    outcomes: Receiver<Result<(), BaseError>>,
}

fn wrong(error: impl std::fmt::Display) -> BaseError {
    BaseError { what: error.to_string(), no_room: false, damaged: false }
}

fn damaged(what: impl std::fmt::Display) -> BaseError {
    BaseError { damaged: true, ..wrong(what) }
}

/// What redb says.
fn failed(error: impl Into<redb::Error>) -> BaseError {
    use std::io::ErrorKind::{InvalidData, StorageFull, UnexpectedEof};
    match error.into() {
        redb::Error::Io(error) if error.kind() == StorageFull => BaseError { no_room: true, ..wrong(error) },
        redb::Error::Io(error) if !matches!(error.kind(), InvalidData | UnexpectedEof) => wrong(error),
        error @ (redb::Error::PreviousIo | redb::Error::DatabaseAlreadyOpen | redb::Error::DatabaseClosed) => {
            wrong(error)
        }
        error => damaged(error),
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Carries out something of redb, which may panic on bytes that are not its own.
fn guarded<T>(act: impl FnOnce() -> Result<T, BaseError>) -> Result<T, BaseError> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| Err(damaged(text_of(&*panic))))
}

/// Carries out something that reads an image, and gives the error when the image was given up meanwhile.
///
/// # Errors
/// [`BaseError`] when the image is damaged.
pub fn contain<T>(act: impl FnOnce() -> T) -> Result<T, BaseError> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|panic| match panic.downcast::<ImageDamaged>() {
        Ok(image) => damaged(image.0),
        Err(other) => resume_unwind(other),
    })
}

/// Checksum of a key and its value.
fn sum(key: &[u8], value: &[u8]) -> [u8; SUM] {
    let mut all = Vec::with_capacity(key.len() + value.len());
    all.extend_from_slice(key);
    all.extend_from_slice(value);
    crc32c(&all).to_le_bytes()
}

/// A value as it is stored.
fn seal(key: &[u8], value: &[u8]) -> Vec<u8> {
    [value, &sum(key, value)].concat()
}

/// The value in what is stored.
fn unseal<'a>(key: &[u8], stored: &'a [u8]) -> Result<&'a [u8], BaseError> {
    let whole = stored.split_last_chunk::<SUM>();
    let value = whole.filter(|(value, found)| **found == sum(key, value) || planted!("mds_image_rot_unseen"));
    value
        .map(|(value, _)| value)
        .ok_or_else(|| damaged(format!("the record of key {key:02x?} is not what was written")))
}

/// The next pairs of a range, at most `limit` or about `bytes_max` bytes.
fn pairs_of(
    range: redb::Range<'_, &'static [u8], &'static [u8]>,
    limit: usize,
    bytes_max: usize,
) -> Result<Pairs, BaseError> {
    let mut out: Pairs = Vec::new();
    let mut bytes = 0;
    for pair in range.take(limit) {
        let (key, stored) = pair.map_err(failed)?;
        let (key, value) = (key.value().to_vec(), unseal(key.value(), stored.value())?.to_vec());
        if out.last().is_some_and(|(before, _)| *before >= key) {
            return Err(damaged(format!("the key {key:02x?} is not where it belongs")));
        }
        bytes += key.len() + value.len();
        out.push((key, value));
        if bytes >= bytes_max {
            break;
        }
    }
    Ok(out)
}

fn encode_mark(mark: &ImageMark) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + mark.members.len());
    out.extend_from_slice(&mark.index.to_le_bytes());
    out.extend_from_slice(&mark.term.to_le_bytes());
    out.extend_from_slice(&mark.members);
    out
}

fn decode_mark(bytes: &[u8]) -> Result<ImageMark, BaseError> {
    let word = |at: usize| -> Result<u64, BaseError> {
        let bytes = bytes.get(at..at + 8).ok_or_else(|| damaged("the mark is too short"))?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };
    Ok(ImageMark { index: word(0)?, term: word(8)?, members: bytes[16..].to_vec() })
}

impl RedbBase {
    /// Opens the image at `path`, or creates an empty one. Without room it fails, until [`RedbBase::wait_for_room`].
    ///
    /// # Errors
    /// [`BaseError`] when the file cannot be read, is no image, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, BaseError> {
        Self::open_on(path, Box::new(RealBlocks))
    }

    /// As [`RedbBase::open`], with the blocks of the file from elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(path: &Path, blocks: Box<dyn Blocks>) -> Result<Self, BaseError> {
        let named = |error: &dyn std::fmt::Display| wrong(format!("{}: {error}", path.display()));
        let file = ImageFile::open(path, blocks).map_err(|error| named(&error))?;
        let database = guarded(|| Self::open_database(&file)).map_err(|error| {
            let no_room = file.was_refused();
            BaseError { no_room, damaged: error.damaged && !no_room, ..named(&error.what) }
        })?;
        let database = Arc::new(database);
        let (jobs, job_queue) = channel();
        let (outcome_queue, outcomes) = channel();
        let shared = database.clone();
        let writer = std::thread::Builder::new()
            .name("image-writer".to_owned())
            .spawn(move || {
                while let Ok(job) = job_queue.recv() {
                    if outcome_queue.send(guarded(|| run(&shared, job))).is_err() {
                        return;
                    }
                }
            })
            .map_err(wrong)?;
        let (shown, table, mark) = guarded(|| read_state(&database))?;
        let (jobs, writer) = (Some(jobs), Some(writer));
        Ok(Self { database, shown, table, mark, installs_anew: false, file, keeper: None, jobs, writer, outcomes })
    }

    fn open_database(file: &Arc<ImageFile>) -> Result<Database, BaseError> {
        let mut builder = redb::Builder::new();
        let builder = builder.set_cache_size(CACHE_BYTES);
        let mut database = builder.create_with_backend(Backend(Arc::clone(file))).map_err(failed)?;
        // Branches of its tree have checksums of redb's only, which it compares here: all is read once. What it repairs
        // it takes back to the transaction before, and the mark says so.
        database.check_integrity().map_err(failed)?;
        let shown = database.begin_read().map_err(failed)?;
        let format = match shown.open_table(MARK) {
            Ok(marks) => marks.get("format").map_err(failed)?.map(|format| format.value().to_vec()),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(failed(error)),
        };
        drop(shown);
        match format {
            Some(format) if format == FORMAT => {}
            Some(format) => return Err(wrong(format!("its format is {format:?}, this release knows {FORMAT:?}"))),
            None => begin_format(&database)?,
        }
        Ok(database)
    }

    /// From now on what finds no room waits for it, and a reserve is kept beside the image.
    ///
    /// # Errors
    /// [`BaseError`] when the file of the reserve cannot be opened.
    pub fn wait_for_room(mut self) -> Result<Self, BaseError> {
        self.keeper = Some(self.file.become_patient().map_err(|error| wrong(format!("the reserve: {error}")))?);
        Ok(self)
    }

    fn submit(&self, job: Job) {
        let jobs = self.jobs.as_ref().expect("only a dropped image has no writer");
        jobs.send(job).expect("the writer thread lives as long as the image");
    }
}

impl Drop for RedbBase {
    fn drop(&mut self) {
        // The writer ends what it is at, unless that waits for room, and lets go of the file, so that it can be opened
        // again.
        self.file.close_now();
        self.jobs = None;
        for thread in [self.writer.take(), self.keeper.take()].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

/// Makes an empty image, or adds checksums to one that has none.
fn begin_format(database: &Database) -> Result<(), BaseError> {
    let txn = database.begin_write().map_err(failed)?;
    let old = txn.open_table(STATE).map_err(failed)?;
    txn.delete_table(INCOMING).map_err(failed)?;
    let mut new = txn.open_table(INCOMING).map_err(failed)?;
    for pair in old.range::<&[u8]>(..).map_err(failed)? {
        let (key, value) = pair.map_err(failed)?;
        new.insert(key.value(), seal(key.value(), value.value()).as_slice()).map_err(failed)?;
    }
    drop((old, new));
    txn.delete_table(STATE).map_err(failed)?;
    txn.rename_table(INCOMING, STATE).map_err(failed)?;
    let mut marks = txn.open_table(MARK).map_err(failed)?;
    let mark = marks.get("mark").map_err(failed)?.map(|mark| seal(b"mark", mark.value()));
    if let Some(mark) = mark {
        marks.insert("mark", mark.as_slice()).map_err(failed)?;
    }
    marks.insert("format", FORMAT).map_err(failed)?;
    drop(marks);
    txn.commit().map_err(failed)
}

fn read_state(database: &Database) -> Result<(ReadTransaction, StateTable, ImageMark), BaseError> {
    let txn = database.begin_read().map_err(failed)?;
    let marks = txn.open_table(MARK).map_err(failed)?;
    let mark = match marks.get("mark").map_err(failed)? {
        Some(bytes) => decode_mark(unseal(b"mark", bytes.value())?)?,
        None => ImageMark::default(),
    };
    let table = txn.open_table(STATE).map_err(failed)?;
    Ok((txn, table, mark))
}

fn run(database: &Database, job: Job) -> Result<(), BaseError> {
    let mut txn = database.begin_write().map_err(failed)?;
    // A write may wait for room for hours. Until all pages are there, nothing on the disk shall name them.
    txn.set_two_phase_commit(true);
    let mark = match job {
        Job::Flush(mark, changes) => {
            let mut state = txn.open_table(STATE).map_err(failed)?;
            for (key, value) in changes.iter() {
                match value {
                    Some(value) => state.insert(key.as_slice(), seal(key, value).as_slice()).map_err(failed)?,
                    None => state.remove(key.as_slice()).map_err(failed)?,
                };
            }
            Some(mark)
        }
        Job::Install(pairs, mark, first) => {
            if first {
                txn.delete_table(INCOMING).map_err(failed)?;
            }
            let mut incoming = txn.open_table(INCOMING).map_err(failed)?;
            for (key, value) in &pairs {
                incoming.insert(key.as_slice(), seal(key, value).as_slice()).map_err(failed)?;
            }
            drop(incoming);
            if mark.is_some() {
                txn.delete_table(STATE).map_err(failed)?;
                txn.rename_table(INCOMING, STATE).map_err(failed)?;
            }
            mark
        }
    };
    if let Some(mark) = mark {
        let mut marks = txn.open_table(MARK).map_err(failed)?;
        marks.insert("mark", seal(b"mark", &encode_mark(&mark)).as_slice()).map_err(failed)?;
    }
    txn.commit().map_err(failed)
}

impl BaseKv for RedbBase {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.view(key, |value| value.map(<[u8]>::to_vec))
    }

    fn view<R>(&self, key: &[u8], read: impl FnOnce(Option<&[u8]>) -> R) -> R {
        let found = guarded(|| self.table.get(key).map_err(failed)).unwrap_or_else(|error| give_up(error));
        let Some(stored) = found else { return read(None) };
        let value = guarded(|| unseal(key, stored.value()));
        read(Some(value.unwrap_or_else(|error| give_up(error))))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs {
        if from >= to {
            return Vec::new();
        }
        let read = || pairs_of(self.table.range::<&[u8]>(from..to).map_err(failed)?, limit, usize::MAX);
        guarded(read).unwrap_or_else(|error| give_up(error))
    }
}

impl Base for RedbBase {
    fn mark(&self) -> ImageMark {
        self.mark.clone()
    }

    fn begin_flush(&mut self, mark: ImageMark, changes: Changes) {
        self.submit(Job::Flush(mark, changes));
    }

    fn begin_install(&mut self) {
        self.installs_anew = true;
    }

    fn install(&mut self, pairs: Pairs, mark: Option<ImageMark>) {
        let first = std::mem::take(&mut self.installs_anew);
        self.submit(Job::Install(pairs, mark, first));
    }

    fn poll(&mut self) -> Option<Result<(), BaseError>> {
        let outcome = self.outcomes.try_recv().ok()?;
        let refreshed = outcome.and_then(|()| guarded(|| read_state(&self.database)));
        Some(refreshed.map(|(shown, table, mark)| {
            self.shown = shown;
            self.table = table;
            self.mark = mark;
        }))
    }

    fn room(&self) -> Room {
        self.file.room()
    }

    fn reader(&self) -> Box<dyn ImageReader> {
        let table = guarded(|| self.shown.open_table(STATE).map_err(failed)).unwrap_or_else(|error| give_up(error));
        Box::new(RedbReader { table, mark: self.mark.clone(), after: None })
    }
}

struct RedbReader {
    table: StateTable,
    mark: ImageMark,
    after: Option<Vec<u8>>,
}

impl ImageReader for RedbReader {
    fn mark(&self) -> ImageMark {
        self.mark.clone()
    }

    fn next_pairs(&mut self, bytes_max: usize) -> Result<Pairs, BaseError> {
        use std::ops::Bound;
        let from = self.after.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let range = || self.table.range::<&[u8]>((from, Bound::Unbounded)).map_err(failed);
        let out = guarded(|| pairs_of(range()?, usize::MAX, bytes_max))?;
        if let Some((key, _)) = out.last() {
            self.after = Some(key.clone());
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
