//! The image: durable, replaced as a whole, and never believed when it rotted.

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

/// An image of two thousand records, closed in good order.
fn small_image(path: &Path) {
    let mut base = RedbBase::open(path).unwrap();
    let pair = |key: u32| (key.to_be_bytes().to_vec(), Some(vec![key as u8; 60]));
    base.begin_flush(ImageMark { index: 5, term: 1, members: vec![9] }, Arc::new((0..2000).map(pair).collect()));
    wait(&mut base);
}

/// Reads all of an image in each way; true when it is as it was made.
fn read_all(path: &Path) -> Result<bool, BaseError> {
    let base = RedbBase::open(path)?;
    contain(|| {
        let all = base.scan(b"", &[255; 5], usize::MAX);
        let gets = (0..2000u32).all(|key| base.get(&key.to_be_bytes()) == Some(vec![key as u8; 60]));
        let mut reader = base.reader();
        let mut streamed = 0;
        while let Ok(pairs) = reader.next_pairs(10_000)
            && !pairs.is_empty()
        {
            streamed += pairs.len();
        }
        // Taken back to the transaction before, it says so.
        let before = base.mark() == ImageMark::default() && all.is_empty();
        before || gets && all.len() == 2000 && streamed == 2000 && base.mark().index == 5
    })
}

#[test]
fn rot_in_an_image_is_found_or_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let (path, rotted) = (dir.path().join("image.redb"), dir.path().join("rotted.redb"));
    small_image(&path);
    let sound = std::fs::read(&path).unwrap();
    let mut rng = cairn_stdx::Rng::new(7);
    let (mut seen, mut whole) = (0, 0);
    for _ in 0..400 {
        let mut bytes = sound.clone();
        // A bit, or a sector of something else.
        let at = rng.below(bytes.len() as u64) as usize;
        if rng.chance(1, 2) {
            bytes[at] ^= 1 << rng.below(8);
        } else {
            let at = at / 512 * 512;
            rng.fill(&mut bytes[at..at + 512]);
        }
        std::fs::write(&rotted, bytes).unwrap();
        match read_all(&rotted) {
            Ok(true) => whole += 1,
            Ok(false) => panic!("rot at byte {at} gives another state, and nobody knows"),
            Err(error) => {
                assert!(error.damaged, "{error}");
                seen += 1;
            }
        }
    }
    assert!(seen > 20 && whole > 20, "{seen} seen, {whole} whole");
}

fn every_bit_of_a_record_counts() {
    let (key, stored) = (b"key", seal(b"key", b"some value"));
    assert_eq!(unseal(key, &stored).unwrap(), b"some value");
    for bit in 0..stored.len() * 8 {
        let mut rotted = stored.clone();
        rotted[bit / 8] ^= 1 << (bit % 8);
        assert!(unseal(key, &rotted).is_err(), "bit {bit}");
    }
    assert!(unseal(b"kex", &stored).is_err() && unseal(key, &stored[..3]).is_err());
}

#[test]
fn a_record_that_is_not_what_was_written_is_refused() {
    every_bit_of_a_record_counts();
    if cairn_stdx::planted::available() {
        cairn_stdx::planted::activate(Some("mds_image_rot_unseen"));
        let outcome = std::panic::catch_unwind(every_bit_of_a_record_counts);
        cairn_stdx::planted::activate(None);
        assert!(outcome.is_err(), "the planted bug was not seen");
    }
}

#[test]
fn an_image_of_before_gets_its_checksums_when_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.redb");
    {
        let database = Database::create(&path).unwrap();
        let txn = database.begin_write().unwrap();
        txn.open_table(STATE).unwrap().insert(b"key".as_slice(), b"value".as_slice()).unwrap();
        txn.open_table(MARK).unwrap();
        txn.commit().unwrap();
    }
    for _ in 0..2 {
        let base = RedbBase::open(&path).unwrap();
        assert_eq!(base.get(b"key"), Some(b"value".to_vec()));
    }
}
