//! Images on disks that are full.

use super::*;
use crate::base::{Base, Changes, ImageMark};
use crate::redb_base::RedbBase;
use cairn_meta::BaseKv;
use std::collections::BTreeSet;

/// A disk of a given size that holds an image and its reserve. Pieces of the image, once given, stay.
struct Disk {
    size: AtomicU64,
    pieces: Mutex<BTreeSet<u64>>,
    reserve: PathBuf,
}

#[derive(Clone)]
struct SmallDisk(Arc<Disk>);

impl SmallDisk {
    fn new(image: &Path) -> Self {
        let reserve = image.with_extension("reserve");
        Self(Arc::new(Disk { size: AtomicU64::new(MUCH), pieces: Mutex::default(), reserve }))
    }

    fn reserve_len(&self) -> u64 {
        std::fs::metadata(&self.0.reserve).map_or(0, |reserve| reserve.len())
    }

    fn used(&self) -> u64 {
        self.0.pieces.lock().unwrap().len() as u64 * PIECE + self.reserve_len()
    }

    fn left(&self) -> u64 {
        self.0.size.load(Ordering::SeqCst).saturating_sub(self.used())
    }

    /// Something else takes all that is free.
    fn fill(&self) {
        self.0.size.store(self.used(), Ordering::SeqCst);
    }

    fn make_room(&self) {
        self.0.size.store(MUCH, Ordering::SeqCst);
    }
}

impl Blocks for SmallDisk {
    fn reserve(&self, _file: &File, offset: u64, len: u64) -> Result<()> {
        // What the reserve takes is seen by its length.
        let of_image = len == PIECE;
        if of_image && self.0.pieces.lock().unwrap().contains(&offset) {
            return Ok(());
        }
        if self.left() < len {
            return Err(ErrorKind::StorageFull.into());
        }
        if of_image {
            self.0.pieces.lock().unwrap().insert(offset);
        }
        Ok(())
    }

    fn free(&self, _path: &Path) -> Result<u64> {
        Ok(self.left())
    }
}

const MUCH: u64 = 1 << 40;

fn changes(keys: std::ops::Range<u32>, len: usize) -> Changes {
    Arc::new(keys.map(|key| (key.to_be_bytes().to_vec(), Some(vec![key as u8; len]))).collect())
}

fn mark(index: u64) -> ImageMark {
    ImageMark { index, term: 1, members: Vec::new() }
}

fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(found) = look() {
            return found;
        }
        std::thread::yield_now();
    }
}

fn flush(base: &mut RedbBase, index: u64, what: Changes) {
    base.begin_flush(mark(index), what);
    until(|| base.poll()).unwrap();
}

#[test]
fn a_flush_without_room_waits_while_readers_go_on_and_ends_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.redb");
    let disk = SmallDisk::new(&path);
    let mut base = RedbBase::open_on(&path, Box::new(disk.clone())).unwrap().wait_for_room().unwrap();
    flush(&mut base, 5, changes(0..2000, 100));
    assert_eq!((base.room().short, base.room().waits, disk.reserve_len()), (false, false, RESERVE_BYTES));

    // The reserve goes first, then the writer waits.
    disk.fill();
    base.begin_flush(mark(6), changes(0..100_000, 1000));
    until(|| base.room().waits.then_some(()));
    assert!(base.room().short && base.poll().is_none());
    assert_eq!(disk.reserve_len(), 0);
    assert_eq!(base.get(&7u32.to_be_bytes()), Some(vec![7; 100]), "the image as it was is read");
    let mut reader = base.reader();
    let mut seen = 0;
    loop {
        let pairs = reader.next_pairs(64 << 10).unwrap();
        if pairs.is_empty() {
            break;
        }
        seen += pairs.len();
    }
    assert_eq!((reader.mark().index, seen), (5, 2000));

    disk.make_room();
    until(|| base.poll()).unwrap();
    assert_eq!((base.mark().index, base.scan(b"", &[255; 5], usize::MAX).len()), (6, 100_000));
    until(|| (!base.room().short && !base.room().waits).then_some(()));
    assert_eq!(disk.reserve_len(), RESERVE_BYTES, "the reserve is filled again");
}

#[test]
fn an_image_closed_while_it_waits_is_found_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.redb");
    let disk = SmallDisk::new(&path);
    let mut base = RedbBase::open_on(&path, Box::new(disk.clone())).unwrap().wait_for_room().unwrap();
    flush(&mut base, 5, changes(0..2000, 100));
    disk.fill();
    base.begin_flush(mark(6), changes(0..100_000, 1000));
    until(|| base.room().waits.then_some(()));
    drop(base);
    // On a full disk it opens, or says that only room is missing.
    match RedbBase::open_on(&path, Box::new(disk.clone())) {
        Ok(base) => assert_eq!(base.mark().index, 5),
        Err(error) => assert!(error.no_room, "{error}"),
    }
    disk.make_room();
    let mut base = RedbBase::open_on(&path, Box::new(disk)).unwrap();
    assert_eq!((base.mark().index, base.scan(b"", &[255; 5], usize::MAX).len()), (5, 2000));
    base.begin_install();
    base.install(vec![(b"x".to_vec(), b"y".to_vec())], Some(mark(9)));
    until(|| base.poll()).unwrap();
    assert_eq!((base.mark().index, base.get(b"x")), (9, Some(b"y".to_vec())));
}

#[test]
fn an_image_that_cannot_be_made_says_that_room_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.redb");
    let disk = SmallDisk::new(&path);
    disk.fill();
    let error = RedbBase::open_on(&path, Box::new(disk)).err().unwrap();
    assert!(error.no_room, "{error}");
}

#[test]
fn without_growth_an_image_on_a_full_disk_lives_on_its_reserve() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.redb");
    let disk = SmallDisk::new(&path);
    let mut base = RedbBase::open_on(&path, Box::new(disk.clone())).unwrap().wait_for_room().unwrap();
    flush(&mut base, 1, changes(0..200_000, 100));
    disk.fill();
    // Each of these touches a leaf of its own with nearly every key.
    for index in 2..100 {
        let of_this = |nth: u32| ((nth * 137 + index as u32 * 7919) % 200_000).to_be_bytes().to_vec();
        let new = (0..1500).map(|nth| (of_this(nth), Some(vec![index as u8; 100]))).collect();
        flush(&mut base, index, Arc::new(new));
    }
    assert!(base.room().short && !base.room().waits);
    let used = RESERVE_BYTES - disk.reserve_len();
    assert!(used < RESERVE_BYTES / 2, "{} MiB of the reserve were used", used >> 20);
    // Deleting needs no more.
    for (index, first) in (100..).zip((0..200_000).step_by(2000)) {
        flush(
            &mut base,
            index,
            Arc::new((first..first + 2000u32).map(|key| (key.to_be_bytes().to_vec(), None)).collect()),
        );
    }
    assert!(base.scan(b"", &[255; 5], 1).is_empty());
    assert!(disk.reserve_len() > RESERVE_BYTES / 4, "{} MiB are left", disk.reserve_len() >> 20);
}
