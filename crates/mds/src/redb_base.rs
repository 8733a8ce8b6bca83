//! The durable image in a redb file, written by one thread of its own so that the reactor never waits for it.
//!
//! Reads go to a read transaction of the last flush: pages come from redb's cache or the page cache. Two tables:
//! `state` with the pairs, `mark` with the [`ImageMark`]; both change in one transaction. An installation fills
//! `incoming` and is swapped in by renaming the table.

use crate::base::{Base, BaseError, Changes, ImageMark, ImageReader, Pairs};
use cairn_meta::BaseKv;
use redb::{Database, ReadOnlyTable, ReadableDatabase, TableDefinition};
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
    ClearIncoming,
    Install(Pairs, Option<ImageMark>),
}

/// The image in a redb file.
pub struct RedbBase {
    database: Arc<Database>,
    table: StateTable,
    mark: ImageMark,
    /// None only while being dropped.
    jobs: Option<Sender<Job>>,
    writer: Option<std::thread::JoinHandle<()>>,
    outcomes: Receiver<Result<(), BaseError>>,
}

fn wrong(error: impl std::fmt::Display) -> BaseError {
    BaseError(error.to_string())
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
    /// Opens the image at `path`, or creates an empty one.
    ///
    /// # Errors
    /// [`BaseError`] when the file cannot be read, is no image, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, BaseError> {
        let database = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| BaseError(format!("{}: {error}", path.display())))?;
        let database = Arc::new(database);
        let txn = database.begin_write().map_err(wrong)?;
        txn.open_table(STATE).map_err(wrong)?;
        txn.open_table(MARK).map_err(wrong)?;
        txn.commit().map_err(wrong)?;
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
        let (table, mark) = read_state(&database)?;
        Ok(Self { database, table, mark, jobs: Some(jobs), writer: Some(writer), outcomes })
    }

    fn submit(&self, job: Job) {
        let jobs = self.jobs.as_ref().expect("only a dropped image has no writer");
        jobs.send(job).expect("the writer thread lives as long as the image");
    }
}

impl Drop for RedbBase {
    fn drop(&mut self) {
        // The writer ends what it is at and lets go of the file, so that it can be opened again.
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn read_state(database: &Database) -> Result<(StateTable, ImageMark), BaseError> {
    let txn = database.begin_read().map_err(wrong)?;
    let marks = txn.open_table(MARK).map_err(wrong)?;
    let mark = match marks.get("mark").map_err(wrong)? {
        Some(bytes) => decode_mark(bytes.value())?,
        None => ImageMark::default(),
    };
    Ok((txn.open_table(STATE).map_err(wrong)?, mark))
}

fn run(database: &Database, job: Job) -> Result<(), BaseError> {
    let txn = database.begin_write().map_err(wrong)?;
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
        Job::ClearIncoming => {
            txn.delete_table(INCOMING).map_err(wrong)?;
        }
        Job::Install(pairs, mark) => {
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
        self.submit(Job::ClearIncoming);
        // Its outcome is awaited here and not polled: dropping a table of leftovers is quick and rare.
        if let Ok(Err(error)) = self.outcomes.recv() {
            panic!("{error}");
        }
    }

    fn install(&mut self, pairs: Pairs, mark: Option<ImageMark>) {
        self.submit(Job::Install(pairs, mark));
    }

    fn poll(&mut self) -> Option<Result<(), BaseError>> {
        let outcome = self.outcomes.try_recv().ok()?;
        let refreshed = outcome.and_then(|()| read_state(&self.database));
        Some(refreshed.map(|(table, mark)| {
            self.table = table;
            self.mark = mark;
        }))
    }

    fn reader(&self) -> Box<dyn ImageReader> {
        let (table, mark) = read_state(&self.database).expect("the metadata image can be read");
        Box::new(RedbReader { table, mark, after: None })
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
