//! What a file holds: every byte and the length, as far as anybody can know.
//!
//! One client at a time works on a file, one operation after the other, so that without faults there is exactly one
//! thing a read may return. A fault leaves doubt: an operation without an answer may have taken effect or not, a
//! length that was not told to the metadata servers yet may be gone with its writer, and what was not synchronised may
//! be gone with the power of all replicas. A read ends the doubt about what it saw: from then on it stays so.

use std::collections::BTreeSet;
use std::ops::Range;

/// Content that was there, or may be.
struct Layer {
    offset: usize,
    bytes: Vec<u8>,
}

impl Layer {
    fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.bytes.len()
    }

    fn has(&self, at: usize, byte: u8) -> bool {
        at.checked_sub(self.offset).and_then(|at| self.bytes.get(at)) == Some(&byte)
    }
}

/// See the module.
pub struct FileModel {
    /// The content, zeros past the end.
    bytes: Vec<u8>,
    unsure: Vec<bool>,
    unsure_count: usize,
    /// What unsure bytes may hold as well.
    others: Vec<Layer>,
    /// What was there before each change since the last synchronisation.
    before: Vec<Layer>,
    /// Lengths the file may have, one of them.
    sizes: BTreeSet<u64>,
    /// Lengths that may be all the metadata servers know.
    told: BTreeSet<u64>,
    /// Bytes compared.
    pub compared: u64,
}

impl FileModel {
    /// An empty file that never grows past `size_max`.
    pub fn new(size_max: u64) -> Self {
        Self {
            bytes: vec![0; size_max as usize],
            unsure: vec![false; size_max as usize],
            unsure_count: 0,
            others: Vec::new(),
            before: Vec::new(),
            sizes: BTreeSet::from([0]),
            told: BTreeSet::new(),
            compared: 0,
        }
    }

    /// The length, when there is no doubt about it.
    pub fn size(&self) -> Option<u64> {
        self.sizes.first().copied().filter(|_| self.sizes.len() == 1)
    }

    /// The length at most.
    pub fn longest(&self) -> u64 {
        self.sizes.last().copied().expect("a file has a length")
    }

    fn layer(&self, range: Range<usize>) -> Layer {
        Layer { offset: range.start, bytes: self.bytes[range].to_vec() }
    }

    fn doubt(&mut self, range: Range<usize>) {
        let unsure = &mut self.unsure[range];
        self.unsure_count += unsure.iter().filter(|unsure| !**unsure).count();
        unsure.fill(true);
    }

    fn know(&mut self, range: Range<usize>) {
        if self.unsure_count > 0 {
            let unsure = &mut self.unsure[range];
            self.unsure_count -= unsure.iter().filter(|unsure| **unsure).count();
            unsure.fill(false);
        }
    }

    /// Bytes were written, and that was answered; the file grows with them.
    pub fn written(&mut self, offset: u64, data: &[u8]) {
        self.replaced(offset, data);
        self.grown(offset + data.len() as u64);
    }

    /// Bytes were written, and nobody knows whether with success.
    pub fn perhaps_written(&mut self, offset: u64, data: &[u8]) {
        self.perhaps_replaced(offset, data);
        self.perhaps_sized(self.longest().max(offset + data.len() as u64));
    }

    /// A range reads as zeros now; no byte past the end changes.
    pub fn zeroed(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.longest());
        if offset < end {
            self.replaced(offset, &vec![0; (end - offset) as usize]);
        }
    }

    /// A range reads as zeros, perhaps.
    pub fn perhaps_zeroed(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.longest());
        if offset < end {
            self.perhaps_replaced(offset, &vec![0; (end - offset) as usize]);
        }
    }

    /// The file is at least so long now.
    pub fn grown(&mut self, size: u64) {
        let old = self.longest();
        if size > old {
            self.told.insert(old);
            self.sizes = BTreeSet::from([size]);
        }
    }

    /// The length may have become this.
    pub fn perhaps_sized(&mut self, size: u64) {
        self.sizes.insert(size);
    }

    /// The length was set, and that was answered: the metadata servers know it.
    pub fn truncated(&mut self, size: u64) {
        let old = self.longest();
        self.zeroed(size, old.saturating_sub(size));
        self.sizes = BTreeSet::from([size]);
        self.told.clear();
    }

    /// The length was set, perhaps.
    pub fn perhaps_truncated(&mut self, size: u64) {
        let old = self.longest();
        self.perhaps_zeroed(size, old.saturating_sub(size));
        self.perhaps_sized(size);
    }

    fn replaced(&mut self, offset: u64, data: &[u8]) {
        let range = offset as usize..offset as usize + data.len();
        self.before.push(self.layer(range.clone()));
        self.bytes[range.clone()].copy_from_slice(data);
        self.know(range);
    }

    fn perhaps_replaced(&mut self, offset: u64, data: &[u8]) {
        let range = offset as usize..offset as usize + data.len();
        self.before.push(self.layer(range.clone()));
        self.others.push(Layer { offset: range.start, bytes: data.to_vec() });
        self.doubt(range);
    }

    /// Content and length are durable.
    pub fn synchronised(&mut self) {
        self.before.clear();
        self.told.clear();
        if self.unsure_count == 0 {
            self.others.clear();
        }
    }

    /// Who wrote is gone: perhaps before it told the metadata servers how long the file had become.
    pub fn writer_gone(&mut self) {
        let told = self.told.clone();
        self.sizes.extend(told);
    }

    /// All replicas lost power before anybody synchronised, and nobody sends again what they lost.
    pub fn may_fall_back(&mut self) {
        for layer in std::mem::take(&mut self.before) {
            self.doubt(layer.range());
            self.others.push(layer);
        }
    }

    fn narrow(&mut self, what: &str, fits: impl Fn(u64) -> bool) -> Result<(), String> {
        if self.sizes.iter().all(|size| fits(*size)) {
            return Ok(());
        }
        let longest = self.longest();
        let sizes: BTreeSet<u64> = self.sizes.iter().copied().filter(|size| fits(*size)).collect();
        if sizes.is_empty() {
            return Err(format!("{what}, but the length is one of {:?}", self.sizes));
        }
        self.sizes = sizes;
        let (from, to) = (self.longest() as usize, longest as usize);
        if from < to {
            // What was written past this end by a writer that is gone may be there, and show when the file grows.
            self.others.push(Layer { offset: from, bytes: vec![0; to - from] });
            self.doubt(from..to);
        }
        Ok(())
    }

    /// Somebody asked for the length.
    ///
    /// # Errors
    /// When it cannot be so.
    pub fn size_seen(&mut self, seen: u64) -> Result<(), String> {
        self.narrow(&format!("the length is said to be {seen}"), |size| size == seen)
    }

    /// A read of `asked` bytes returned `data`.
    ///
    /// # Errors
    /// When it cannot be so.
    pub fn read(&mut self, offset: u64, asked: u64, data: &[u8]) -> Result<(), String> {
        let end = offset + data.len() as u64;
        let what = format!("a read of {asked} bytes at {offset} returned {}", data.len());
        self.narrow(&what, |size| size.saturating_sub(offset).min(asked) == data.len() as u64)?;
        self.compared += data.len() as u64;
        let range = offset as usize..end as usize;
        if self.bytes[range.clone()] == *data {
            self.know(range);
            return Ok(());
        }
        for (at, &byte) in range.clone().zip(data) {
            let expected = self.bytes[at];
            if byte == expected {
                continue;
            }
            if !self.unsure[at] || !self.others.iter().any(|layer| layer.has(at, byte)) {
                let doubt = if self.unsure[at] { ", or what it may be as well" } else { "" };
                let size = &self.sizes;
                return Err(format!("{what}: byte {at} is {byte:#x}, not {expected:#x}{doubt}; length {size:?}"));
            }
            self.bytes[at] = byte;
        }
        self.know(range);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_faults_there_is_one_answer() {
        let mut file = FileModel::new(100);
        file.written(10, b"abc");
        assert_eq!(file.size(), Some(13));
        file.read(0, 100, b"\0\0\0\0\0\0\0\0\0\0abc").unwrap();
        file.read(9, 2, b"\0b").unwrap_err();
        file.read(9, 2, b"\0").unwrap_err();
        file.read(13, 5, b"").unwrap();
        file.truncated(11);
        file.truncated(13);
        file.read(10, 3, b"a\0\0").unwrap();
        file.read(10, 3, b"abc").unwrap_err();
        file.size_seen(12).unwrap_err();
    }

    #[test]
    fn a_read_ends_the_doubt_about_what_it_saw() {
        let mut file = FileModel::new(100);
        file.written(0, b"aaaa");
        file.perhaps_written(0, b"bb");
        file.read(0, 4, b"abaa").unwrap();
        file.read(0, 4, b"bbaa").unwrap_err();
        file.read(0, 4, b"caaa").unwrap_err();
        file.read(0, 4, b"abaa").unwrap();
    }

    #[test]
    fn synchronised_data_never_falls_back() {
        let mut file = FileModel::new(100);
        file.written(0, b"one");
        file.synchronised();
        file.written(0, b"two");
        file.may_fall_back();
        file.read(0, 3, b"one").unwrap();
        file.read(0, 3, b"two").unwrap_err();
        file.written(0, b"six");
        file.synchronised();
        file.may_fall_back();
        file.read(0, 3, b"one").unwrap_err();
    }

    #[test]
    fn a_length_that_was_told_stays() {
        let mut file = FileModel::new(100);
        file.written(0, b"one");
        file.synchronised();
        file.written(3, b"two");
        file.writer_gone();
        file.size_seen(3).unwrap();
        file.size_seen(6).unwrap_err();
        file.truncated(6);
        file.writer_gone();
        file.read(0, 9, b"onetwo").unwrap();
        file.read(0, 9, b"one").unwrap_err();
    }
}
