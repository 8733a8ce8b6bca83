//! Aligned, shared byte buffers: what travels from the socket to the disk and back without a copy.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// One aligned page. The only reason for this type is its alignment: `O_DIRECT` wants it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// A uniquely owned buffer whose start is aligned to 4096 bytes. Fill it, then [`freeze`](BufMut::freeze) it.
pub struct BufMut {
    pages: Vec<Page>,
    len: usize,
}

impl BufMut {
    /// `len` zero bytes; the capacity is rounded up to whole pages.
    pub fn zeroed(len: usize) -> Self {
        let pages = Page::new_vec_zeroed(len.div_ceil(4096)).expect("allocation of an IO buffer");
        Self { pages, len }
    }

    /// A copy of `bytes`, zero-padded in memory (not in length) to whole pages.
    pub fn copy_from(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Shares the buffer; from here on nobody changes it.
    pub fn freeze(self) -> Buf {
        let len = self.len;
        Buf { pages: Arc::new(self.pages), start: 0, len }
    }
}

impl Deref for BufMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.pages.as_slice().as_bytes()[..self.len]
    }
}

impl std::ops::DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages.as_mut_slice().as_mut_bytes()[..len]
    }
}

/// A shared, immutable slice of an aligned buffer. Cloning and slicing copy nothing.
#[derive(Clone)]
pub struct Buf {
    pages: Arc<Vec<Page>>,
    start: usize,
    len: usize,
}

impl Buf {
    /// A copy of `bytes` in a fresh aligned buffer.
    pub fn copy_from(bytes: &[u8]) -> Self {
        BufMut::copy_from(bytes).freeze()
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        BufMut::zeroed(len).freeze()
    }

    /// The bytes `start..start + len` of this buffer, sharing its memory.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start <= self.len && len <= self.len - start, "slice {start}+{len} of a buffer of {}", self.len);
        Self { pages: Arc::clone(&self.pages), start: self.start + start, len }
    }

    /// The buffer for writing again, when nobody else shares it; otherwise this one back. Spares an allocation where
    /// buffers come and go at a high rate. The bytes keep their values.
    ///
    /// # Errors
    /// The buffer itself, when it is shared or a part of another.
    pub fn try_into_mut(self) -> Result<BufMut, Buf> {
        let (start, len) = (self.start, self.len);
        if start != 0 {
            return Err(self);
        }
        match Arc::try_unwrap(self.pages) {
            Ok(pages) if len.div_ceil(4096) == pages.len() => Ok(BufMut { pages, len }),
            Ok(pages) => Err(Buf { pages: Arc::new(pages), start, len }),
            Err(pages) => Err(Buf { pages, start, len }),
        }
    }

    /// True when the start of this slice is aligned to 4096 bytes in memory.
    pub fn is_aligned(&self) -> bool {
        self.start.is_multiple_of(4096)
    }
}

impl Default for Buf {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.pages.as_slice().as_bytes()[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

impl PartialEq for Buf {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}
impl Eq for Buf {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_slices_share() {
        let mut buf = BufMut::zeroed(10_000);
        buf[5000] = 7;
        assert_eq!(buf.as_ptr().addr() % 4096, 0);
        let buf = buf.freeze();
        let part = buf.slice(4096, 4096);
        assert!(part.is_aligned() && part[904] == 7 && part.len() == 4096);
        assert!(!buf.slice(1, 2).is_aligned());
        assert!(Buf::default().is_empty());
        drop(part);
        let shared = buf.clone();
        let buf = buf.try_into_mut().err().unwrap();
        drop(shared);
        assert_eq!(buf.try_into_mut().unwrap()[5000], 7);
    }
}
