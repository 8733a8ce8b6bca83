//! Aligned, shared byte buffers: what travels from the socket to the disk and back without a copy.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// One aligned page. The only reason for this type is its alignment: `O_DIRECT` wants it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Memory of a buffer. When the last user lets go of it, it goes to the pool of the thread.
struct Pages(Vec<Page>);

impl Drop for Pages {
    fn drop(&mut self) {
        pool::give(std::mem::take(&mut self.0));
    }
}

/// A uniquely owned buffer whose start is aligned to 4096 bytes. Fill it, then [`freeze`](BufMut::freeze) it.
pub struct BufMut {
    pages: Pages,
    len: usize,
}

impl BufMut {
    /// `len` zero bytes; the capacity is rounded up to whole pages.
    pub fn zeroed(len: usize) -> Self {
        let pages = Pages(Page::new_vec_zeroed(len.div_ceil(4096)).expect("allocation of an IO buffer"));
        Self { pages, len }
    }

    /// `len` bytes of any value: memory of an earlier buffer of this thread, or zeros. For those who overwrite all of
    /// it, such as a disk or a socket: clearing a megabyte first costs as much as copying it.
    pub fn recycled(len: usize) -> Self {
        Self { pages: Pages(pool::take(len.div_ceil(4096))), len }
    }

    /// A copy of `bytes`.
    pub fn copy_from(bytes: &[u8]) -> Self {
        let mut buf = Self::recycled(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Shares the buffer; from here on nobody changes it.
    pub fn freeze(self) -> Buf {
        Buf { start: 0, len: self.len, pages: (self.len > 0).then(|| Arc::new(self.pages)) }
    }
}

impl Deref for BufMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.pages.0.as_slice().as_bytes()[..self.len]
    }
}

impl std::ops::DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages.0.as_mut_slice().as_mut_bytes()[..len]
    }
}

/// Buffers that wait for their next use. Bounded per thread; a buffer freed by another thread joins the pool there.
mod pool {
    use super::Page;
    use std::cell::RefCell;
    use zerocopy::FromZeros;

    /// Larger buffers than this (1 MiB) are not kept.
    const CLASS_PAGES_MAX: usize = 256;
    /// Pages kept by one thread: 16 MiB.
    const KEPT_PAGES_MAX: usize = 4096;
    const CLASSES: usize = CLASS_PAGES_MAX.ilog2() as usize + 1;

    #[derive(Default)]
    struct Pool {
        /// By the logarithm of their number of pages.
        classes: [Vec<Vec<Page>>; CLASSES],
        kept: usize,
    }

    thread_local! {
        static POOL: RefCell<Pool> = RefCell::default();
    }

    fn fresh(pages: usize) -> Vec<Page> {
        Page::new_vec_zeroed(pages).expect("allocation of an IO buffer")
    }

    /// At least `pages` pages.
    pub(super) fn take(pages: usize) -> Vec<Page> {
        if pages == 0 || pages > CLASS_PAGES_MAX {
            return fresh(pages);
        }
        let size = pages.next_power_of_two();
        let take = |pool: &RefCell<Pool>| {
            let pool = &mut *pool.borrow_mut();
            let taken = pool.classes[size.ilog2() as usize].pop();
            pool.kept -= taken.as_ref().map_or(0, Vec::len);
            taken
        };
        POOL.try_with(take).ok().flatten().unwrap_or_else(|| fresh(size))
    }

    pub(super) fn give(pages: Vec<Page>) {
        let size = pages.len();
        if !size.is_power_of_two() || size > CLASS_PAGES_MAX {
            return;
        }
        // Without a pool the thread is ending.
        let _ = POOL.try_with(|pool| {
            let pool = &mut *pool.borrow_mut();
            let class = size.ilog2() as usize;
            if pool.kept + size > KEPT_PAGES_MAX {
                // What was in use lately is kept, the other sizes go.
                pool.classes.iter_mut().enumerate().filter(|(other, _)| *other != class).for_each(|(_, c)| c.clear());
                pool.kept = pool.classes[class].len() * size;
            }
            if pool.kept + size <= KEPT_PAGES_MAX {
                pool.kept += size;
                pool.classes[class].push(pages);
            }
        });
    }
}

/// A shared, immutable slice of an aligned buffer. Cloning and slicing copy nothing.
#[derive(Clone, Default)]
pub struct Buf {
    /// None for no bytes, which are common and cost nothing.
    pages: Option<Arc<Pages>>,
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
        Self { pages: self.pages.clone(), start: self.start + start, len }
    }

    /// The buffer for writing again, when nobody else shares it; otherwise this one back. Spares an allocation where
    /// buffers come and go at a high rate. The bytes keep their values.
    ///
    /// # Errors
    /// The buffer itself, when it is shared or a part of another.
    pub fn try_into_mut(self) -> Result<BufMut, Buf> {
        match self {
            Self { pages: Some(pages), start: 0, len } => match Arc::try_unwrap(pages) {
                Ok(pages) => Ok(BufMut { pages, len }),
                Err(shared) => Err(Buf { pages: Some(shared), start: 0, len }),
            },
            other => Err(other),
        }
    }

    /// True when the start of this slice is aligned to 4096 bytes in memory.
    pub fn is_aligned(&self) -> bool {
        self.start.is_multiple_of(4096)
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.pages {
            Some(pages) => &pages.0.as_slice().as_bytes()[self.start..self.start + self.len],
            None => &[],
        }
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
        assert_eq!(BufMut::recycled(9_000).freeze().len(), 9_000);
    }
}
