//! The file `cairn backup-metadata` writes. Table: `docs/formats/metadata.md`.
//!
//! A header, blocks of pairs with a checksum each, and an end that counts the pairs, so that a file that was cut is
//! known as such.

use crate::base::Pairs;
use cairn_stdx::checksum::crc64;
use cairn_types::ClusterId;
use std::io::{self, Read, Write};

/// Version of the file.
const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"CAIRNMDB";
const HEADER: usize = 64;
const BLOCK_HEADER: usize = 16;
/// Largest block read: a page of pairs, and one pair may be as large as a value of the key-value store.
const BLOCK_MAX: usize = 8 << 20;
/// Longest name of a cluster read.
const NAME_MAX: usize = 256;

/// What the file says of the state in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupHeader {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub name: String,
    /// Log index of the state.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// When it was made.
    pub wall_ns: u64,
}

/// A file that is no backup, or a damaged one.
#[derive(Debug, thiserror::Error)]
pub enum BackupFileError {
    /// The system refused, or the file ends too early.
    #[error("{}", if .0.kind() == io::ErrorKind::UnexpectedEof { "the file was cut".to_owned() } else { .0.to_string() })]
    Io(#[from] io::Error),
    /// Not what a backup looks like.
    #[error("{0}")]
    Content(&'static str),
    /// Of a later version.
    #[error("version {0} was written by a newer cairn; use that one")]
    Version(u32),
}

/// Writes a backup.
pub struct BackupWriter<W> {
    to: W,
    count: u64,
}

impl<W: Write> BackupWriter<W> {
    /// Begins with the header.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn begin(mut to: W, header: &BackupHeader) -> io::Result<Self> {
        let name = header.name.as_bytes();
        let mut bytes = Vec::with_capacity(HEADER + name.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(name.len()).expect("a name is short").to_le_bytes());
        bytes.extend_from_slice(&header.cluster.0);
        for number in [header.index, header.term, header.wall_ns] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(name);
        let crc = crc64(&bytes);
        bytes.splice(HEADER - 8..HEADER - 8, crc.to_le_bytes()).for_each(drop);
        to.write_all(&bytes)?;
        Ok(Self { to, count: 0 })
    }

    /// Adds pairs.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn pairs(&mut self, pairs: &Pairs) -> io::Result<()> {
        let size = |(key, value): &(Vec<u8>, Vec<u8>)| 8 + key.len() + value.len();
        let mut rest = &pairs[..];
        while !rest.is_empty() {
            // A page may hold one large value behind many small ones.
            let mut bytes = 0;
            let fits = |pair: &&(Vec<u8>, Vec<u8>)| {
                bytes += size(pair);
                bytes <= BLOCK_MAX / 2
            };
            let (block, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.block(block)?;
            rest = after;
        }
        Ok(())
    }

    fn block(&mut self, pairs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        let mut body = Vec::new();
        for (key, value) in pairs {
            for part in [key, value] {
                body.extend_from_slice(&u32::try_from(part.len()).expect("keys and values are bounded").to_le_bytes());
            }
            body.extend_from_slice(key);
            body.extend_from_slice(value);
        }
        assert!(body.len() <= BLOCK_MAX, "a pair larger than a block");
        self.count += pairs.len() as u64;
        self.to.write_all(&(body.len() as u32).to_le_bytes())?;
        self.to.write_all(&(pairs.len() as u32).to_le_bytes())?;
        self.to.write_all(&crc64(&body).to_le_bytes())?;
        self.to.write_all(&body)
    }

    /// Ends the file; returns how many pairs it has.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn end(mut self) -> io::Result<(W, u64)> {
        self.to.write_all(&[0; 8])?;
        self.to.write_all(&self.count.to_le_bytes())?;
        self.to.flush()?;
        Ok((self.to, self.count))
    }
}

/// Reads a whole backup.
///
/// # Errors
/// [`BackupFileError`] saying what is wrong with it.
pub fn read(mut from: impl Read) -> Result<(BackupHeader, Pairs), BackupFileError> {
    let header = read_header(&mut from)?;
    let mut pairs = Pairs::new();
    loop {
        let mut head = [0; BLOCK_HEADER];
        from.read_exact(&mut head)?;
        let (size, count, crc) = (half(&head, 0) as usize, half(&head, 4), word(&head, 8));
        if size == 0 && count == 0 {
            if crc != pairs.len() as u64 {
                return Err(BackupFileError::Content("the file lacks some of its pairs"));
            }
            if from.read(&mut [0])? != 0 {
                return Err(BackupFileError::Content("something follows its end"));
            }
            return Ok((header, pairs));
        }
        if size > BLOCK_MAX {
            return Err(BackupFileError::Content("a block is too large"));
        }
        // Read as far as it goes: a size that lies costs no memory.
        let mut body = Vec::new();
        from.by_ref().take(size as u64).read_to_end(&mut body)?;
        if body.len() != size || crc64(&body) != crc {
            return Err(BackupFileError::Content("a block is damaged"));
        }
        read_pairs(&body, count, &mut pairs)?;
    }
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn read_header(from: &mut impl Read) -> Result<BackupHeader, BackupFileError> {
    let mut head = [0; HEADER];
    from.read_exact(&mut head)?;
    if head[..8] != MAGIC {
        return Err(BackupFileError::Content("this is no backup of metadata"));
    }
    if half(&head, 8) != VERSION {
        return Err(BackupFileError::Version(half(&head, 8)));
    }
    let size = half(&head, 12) as usize;
    if size > NAME_MAX {
        return Err(BackupFileError::Content("the header is damaged"));
    }
    let mut name = vec![0; size];
    from.read_exact(&mut name)?;
    let sealed = [&head[..HEADER - 8], &name].concat();
    if crc64(&sealed) != word(&head, HEADER - 8) {
        return Err(BackupFileError::Content("the header is damaged"));
    }
    let name = String::from_utf8(name).map_err(|_| BackupFileError::Content("the header is damaged"))?;
    let cluster = ClusterId(head[16..32].try_into().expect("sixteen bytes"));
    Ok(BackupHeader { cluster, name, index: word(&head, 32), term: word(&head, 40), wall_ns: word(&head, 48) })
}

fn read_pairs(mut body: &[u8], count: u32, pairs: &mut Pairs) -> Result<(), BackupFileError> {
    for _ in 0..count {
        let (head, rest) = body.split_at_checked(8).ok_or(BackupFileError::Content("a pair is cut"))?;
        let (key, value) = (half(head, 0) as usize, half(head, 4) as usize);
        let (key, rest) = rest.split_at_checked(key).ok_or(BackupFileError::Content("a key is cut"))?;
        let (value, rest) = rest.split_at_checked(value).ok_or(BackupFileError::Content("a value is cut"))?;
        if pairs.last().is_some_and(|(last, _)| last.as_slice() >= key) {
            return Err(BackupFileError::Content("keys are out of order"));
        }
        pairs.push((key.to_vec(), value.to_vec()));
        body = rest;
    }
    if body.is_empty() { Ok(()) } else { Err(BackupFileError::Content("a block has bytes too many")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stdx::Rng;

    fn sample() -> (BackupHeader, Pairs, Vec<u8>) {
        let header =
            BackupHeader { cluster: ClusterId([3; 16]), name: "stor1".into(), index: 900, term: 4, wall_ns: 77 };
        let pairs: Pairs = (0u32..300).map(|n| (n.to_be_bytes().to_vec(), vec![n as u8; n as usize])).collect();
        let mut writer = BackupWriter::begin(Vec::new(), &header).unwrap();
        pairs.chunks(70).for_each(|page| writer.pairs(&page.to_vec()).unwrap());
        let (bytes, count) = writer.end().unwrap();
        assert_eq!(count, 300);
        (header, pairs, bytes)
    }

    #[test]
    fn a_backup_is_read_as_it_was_written() {
        let (header, pairs, bytes) = sample();
        assert_eq!(&bytes[..16], b"CAIRNMDB\x01\0\0\0\x05\0\0\0");
        assert_eq!(bytes.len(), HEADER + 5 + 5 * BLOCK_HEADER + BLOCK_HEADER + 300 * 12 + (0..300).sum::<usize>());
        assert_eq!(read(&bytes[..]).unwrap(), (header, pairs));
    }

    #[test]
    fn a_backup_with_any_byte_changed_or_cut_is_refused_or_the_same() {
        let (_, _, bytes) = sample();
        for end in 0..bytes.len() {
            assert!(read(&bytes[..end]).is_err(), "cut at {end}");
        }
        let mut rng = Rng::new(1);
        for _ in 0..2000 {
            let mut bytes = bytes.clone();
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
            assert!(read(&bytes[..]).is_err(), "byte {at} changed");
        }
        assert!(read(&[&bytes[..], &[0]].concat()[..]).is_err(), "bytes too many");
    }
}
