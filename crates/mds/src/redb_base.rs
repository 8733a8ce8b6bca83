//! The durable image in a redb file, written by one thread of its own so that the reactor never waits for it.
//!
//! Reads go to a read transaction of the last flush: pages come from redb's cache or the page cache. Two tables:
//! `state` with the pairs, `mark` with the [`ImageMark`]; both change in one transaction. An installation fills
//! `incoming` and is swapped in by renaming the table.

use crate::base::{Base, BaseError, Changes, ImageMark, ImageReader, Pairs};
use crate::image_file::{Backend, Blocks, ImageFile, RealBlocks, Room};
use cairn_meta::BaseKv;
use redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, TableDefinition, TableError};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

const STATE: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("state");
const INCOMING: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("incoming");
const MARK: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("mark");
const CACHE_BYTES: usize = 32 << 20;

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
    BaseError { what: error.to_string(), no_room: false }
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
        let bytes = bytes.get(at..at + 8).ok_or_else(|| wrong("the mark is too short"))?;
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
        let database = Self::open_database(&file).map_err(|error| {
            let no_room = file.was_refused();
            BaseError { no_room, ..named(&error.what) }
        })?;
        let database = Arc::new(database);
        let (jobs, job_queue) = channel();
        let (outcome_queue, outcomes) = channel();
        let shared = database.clone();
        let writer = std::thread::Builder::new()
            .name("image-writer".to_owned())
            .spawn(move || {
                while let Ok(job) = job_queue.recv() {
                    if outcome_queue.send(run(&shared, job)).is_err() {
                        return;
                    }
                }
            })
            .map_err(wrong)?;
        let (shown, table, mark) = read_state(&database)?;
        let (jobs, writer) = (Some(jobs), Some(writer));
        Ok(Self { database, shown, table, mark, installs_anew: false, file, keeper: None, jobs, writer, outcomes })
    }

    fn open_database(file: &Arc<ImageFile>) -> Result<Database, BaseError> {
        let mut builder = redb::Builder::new();
        let database =
            builder.set_cache_size(CACHE_BYTES).create_with_backend(Backend(Arc::clone(file))).map_err(wrong)?;
        let shown = database.begin_read().map_err(wrong)?;
        let whole = match (shown.open_table(STATE), shown.open_table(MARK)) {
            (Ok(_), Ok(_)) => true,
            (Err(TableError::TableDoesNotExist(_)), _) | (_, Err(TableError::TableDoesNotExist(_))) => false,
            (Err(error), _) | (_, Err(error)) => return Err(wrong(error)),
        };
        drop(shown);
        if !whole {
            let txn = database.begin_write().map_err(wrong)?;
            txn.open_table(STATE).map_err(wrong)?;
            txn.open_table(MARK).map_err(wrong)?;
            txn.commit().map_err(wrong)?;
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

fn read_state(database: &Database) -> Result<(ReadTransaction, StateTable, ImageMark), BaseError> {
    let txn = database.begin_read().map_err(wrong)?;
    let marks = txn.open_table(MARK).map_err(wrong)?;
    let mark = match marks.get("mark").map_err(wrong)? {
        Some(bytes) => decode_mark(bytes.value())?,
        None => ImageMark::default(),
    };
    let table = txn.open_table(STATE).map_err(wrong)?;
    Ok((txn, table, mark))
}

fn run(database: &Database, job: Job) -> Result<(), BaseError> {
    let mut txn = database.begin_write().map_err(wrong)?;
    // A write may wait for room for hours. Until all pages are there, nothing on the disk shall name them.
    txn.set_two_phase_commit(true);
    match job {
        Job::Flush(mark, changes) => {
            let mut state = txn.open_table(STATE).map_err(wrong)?;
            for (key, value) in changes.iter() {
                match value {
                    Some(value) => state.insert(key.as_slice(), value.as_slice()).map_err(wrong)?,
                    None => state.remove(key.as_slice()).map_err(wrong)?,
                };
            }
            drop(state);
            let mut marks = txn.open_table(MARK).map_err(wrong)?;
            marks.insert("mark", encode_mark(&mark).as_slice()).map_err(wrong)?;
        }
        Job::Install(pairs, mark, first) => {
            if first {
                txn.delete_table(INCOMING).map_err(wrong)?;
            }
            let mut incoming = txn.open_table(INCOMING).map_err(wrong)?;
            for (key, value) in &pairs {
                incoming.insert(key.as_slice(), value.as_slice()).map_err(wrong)?;
            }
            drop(incoming);
            if let Some(mark) = mark {
                txn.delete_table(STATE).map_err(wrong)?;
                txn.rename_table(INCOMING, STATE).map_err(wrong)?;
                let mut marks = txn.open_table(MARK).map_err(wrong)?;
                marks.insert("mark", encode_mark(&mark).as_slice()).map_err(wrong)?;
            }
        }
    }
    txn.commit().map_err(wrong)
}

impl BaseKv for RedbBase {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let found = self.table.get(key).expect("the metadata image can be read");
        found.map(|value| value.value().to_vec())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs {
        if from >= to {
            return Vec::new();
        }
        let range = self.table.range::<&[u8]>(from..to).expect("the metadata image can be read");
        range
            .take(limit)
            .map(|pair| {
                let (key, value) = pair.expect("the metadata image can be read");
                (key.value().to_vec(), value.value().to_vec())
            })
            .collect()
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
        let refreshed = outcome.and_then(|()| read_state(&self.database));
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
        let table = self.shown.open_table(STATE).expect("the metadata image can be read");
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
        let mut out: Pairs = Vec::new();
        let mut bytes = 0;
        for pair in self.table.range::<&[u8]>((from, Bound::Unbounded)).map_err(wrong)? {
            let (key, value) = pair.map_err(wrong)?;
            out.push((key.value().to_vec(), value.value().to_vec()));
            bytes += key.value().len() + value.value().len();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(base: &mut RedbBase) {
        loop {
            if let Some(outcome) = base.poll() {
                return outcome.unwrap();
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_flush_is_durable_and_an_installation_replaces_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.redb");
        let mut base = RedbBase::open(&path).unwrap();
        let changes = BTreeMapOf(&[("a", Some("1")), ("b", Some("2"))]);
        base.begin_flush(ImageMark { index: 5, term: 1, members: vec![9] }, changes);
        wait(&mut base);
        assert_eq!(base.get(b"a"), Some(b"1".to_vec()));
        let mut reader = base.reader();
        base.begin_flush(ImageMark { index: 6, term: 1, members: vec![9] }, BTreeMapOf(&[("a", None)]));
        wait(&mut base);
        assert_eq!(reader.next_pairs(1 << 20).unwrap().len(), 2, "a reader is not moved by later flushes");
        drop((base, reader));
        let mut base = RedbBase::open(&path).unwrap();
        assert_eq!((base.mark().index, base.get(b"a")), (6, None));
        base.begin_install();
        base.install(vec![(b"x".to_vec(), b"9".to_vec())], Some(ImageMark { index: 50, term: 3, members: vec![] }));
        wait(&mut base);
        assert_eq!((base.mark().index, base.scan(b"", b"z", 10).len()), (50, 1));
    }

    #[expect(non_snake_case, reason = "reads like a constructor")]
    fn BTreeMapOf(pairs: &[(&str, Option<&str>)]) -> Changes {
        Arc::new(pairs.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.map(|v| v.as_bytes().to_vec()))).collect())
    }
}
