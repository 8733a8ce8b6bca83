//! Metadata trees: an array of 4 KiB pages reached through pages of checksummed pointers, all copy-on-write.
//!
//! Each checkpoint writes the pages that changed and the pointer pages above them, and the superblock points to the
//! top. The pointers of all levels stay in memory (16 bytes a page).

use crate::layout::bytes::{Put, Take};
use crate::layout::superblock::TreeRoot;
use crate::layout::{PageKind, Pointer, SLOT, bound_checksum};
use std::collections::BTreeSet;

/// Pointers a pointer page holds.
pub(crate) const FANOUT: usize = 256;

/// One tree. `levels[0]` points to the pages, `levels[n]` to the pointer pages of `levels[n - 1]`; the last level has
/// one pointer, or none when the tree is empty.
pub(crate) struct Tree {
    number: u64,
    pub(crate) levels: Vec<Vec<Pointer>>,
}

/// One page a checkpoint has to write.
pub(crate) struct PageWrite {
    pub slot: u64,
    pub bytes: Vec<u8>,
}

/// Sizes of the levels of a tree of `pages` pages, lowest first.
fn level_sizes(pages: usize) -> Vec<usize> {
    let mut sizes = vec![pages];
    let mut size = pages;
    while size > 1 {
        size = size.div_ceil(FANOUT);
        sizes.push(size);
    }
    sizes
}

impl Tree {
    /// Upper bound of the pages an update of `dirty` pages writes when the tree has `pages` pages.
    pub(crate) fn update_cost(dirty: u64, pages: u64) -> u64 {
        dirty + pages / FANOUT as u64 + pages / (FANOUT * FANOUT) as u64 + 4
    }

    pub(crate) fn root(&self) -> TreeRoot {
        let top = self.levels.last().and_then(|level| level.first()).copied().unwrap_or_default();
        TreeRoot { pages: self.levels[0].len() as u64, top }
    }

    /// Resizes the tree to `pages` pages and replaces the `dirty` ones (ascending numbers).
    ///
    /// `allocate` gives a new slot, `free` takes an old one; the pages to write are appended to `out`.
    pub(crate) fn update(
        &mut self,
        pages: usize,
        dirty: Vec<(u64, Vec<u8>)>,
        allocate: &mut dyn FnMut() -> u64,
        free: &mut dyn FnMut(u64),
        out: &mut Vec<PageWrite>,
    ) {
        let sizes = level_sizes(pages);
        let resized = sizes.len() != self.levels.len() || sizes[0] != self.levels[0].len();
        let mut touched: BTreeSet<usize> = BTreeSet::new();
        if resized {
            let mut retire = |level: &mut Vec<Pointer>, keep: usize| {
                level.drain(keep.min(level.len())..).filter(|p| p.slot != 0).for_each(|p| free(p.slot));
            };
            // A change of depth rebuilds the pointer pages; pages themselves stay.
            retire(&mut self.levels[0], pages);
            self.levels[0].resize(pages, Pointer::default());
            if sizes.len() != self.levels.len() {
                for mut level in self.levels.drain(1..) {
                    retire(&mut level, 0);
                }
                self.levels.extend(sizes[1..].iter().map(|size| vec![Pointer::default(); *size]));
                touched.extend(0..sizes.get(1).copied().unwrap_or(0));
            } else {
                for (level, size) in self.levels.iter_mut().zip(&sizes).skip(1) {
                    retire(level, *size);
                    level.resize(*size, Pointer::default());
                }
                touched.extend(sizes.get(1).map(|size| size - 1));
            }
        }
        let mut replace = |level: &mut Vec<Pointer>, index: usize, number: u64, bytes: Vec<u8>| {
            if level[index].slot != 0 {
                free(level[index].slot);
            }
            let slot = allocate();
            level[index] = Pointer { slot, checksum: bound_checksum(&bytes, PageKind::Tree, self.number, number) };
            out.push(PageWrite { slot, bytes });
        };
        for (page, bytes) in dirty {
            replace(&mut self.levels[0], page as usize, page, bytes);
            touched.insert(page as usize / FANOUT);
        }
        for depth in 1..sizes.len() {
            let mut above = BTreeSet::new();
            for index in std::mem::take(&mut touched) {
                let bytes = pointer_page(&self.levels[depth - 1], index);
                replace(&mut self.levels[depth], index, page_number(depth, index), bytes);
                above.insert(index / FANOUT);
            }
            touched = above;
        }
    }
}

/// Number that binds the page at `index` of `depth`: pages of different depth never pass for one another.
pub(crate) fn page_number(depth: usize, index: usize) -> u64 {
    ((depth as u64) << 56) | index as u64
}

fn pointer_page(below: &[Pointer], index: usize) -> Vec<u8> {
    let mut bytes = vec![0; SLOT];
    let mut put = Put::new(&mut bytes);
    for pointer in below.iter().skip(index * FANOUT).take(FANOUT) {
        put.u64(pointer.slot);
        put.u64(pointer.checksum);
    }
    bytes
}

/// Loads a tree level by level from the top; the caller reads the pages it asks for.
pub(crate) struct TreeLoad {
    number: u64,
    sizes: Vec<usize>,
    levels: Vec<Vec<Pointer>>,
    /// The level whose pointed-to pages are to be read next.
    depth: usize,
    slot_count: u64,
}

impl TreeLoad {
    pub(crate) fn new(number: u64, root: TreeRoot, slot_count: u64) -> Self {
        let sizes = level_sizes(root.pages as usize);
        let mut levels: Vec<Vec<Pointer>> = vec![Vec::new(); sizes.len()];
        let depth = sizes.len() - 1;
        if root.pages > 0 {
            levels[depth] = vec![root.top];
        }
        Self { number, sizes, levels, depth, slot_count }
    }

    /// Pages to read now, in order; absent pages (slot 0) are skipped by the caller.
    pub(crate) fn wanted(&self) -> &[Pointer] {
        &self.levels[self.depth]
    }

    /// True when [`wanted`](Self::wanted) are the pages themselves.
    pub(crate) fn at_pages(&self) -> bool {
        self.depth == 0
    }

    /// Checks the page at `index` of the current level.
    pub(crate) fn check(&self, index: usize, bytes: &[u8]) -> bool {
        let pointer = self.levels[self.depth][index];
        bound_checksum(bytes, PageKind::Tree, self.number, page_number(self.depth, index)) == pointer.checksum
    }

    /// Takes the pointer pages of the current level, in order (none for an absent page), and goes one level down; false
    /// when a pointer leads outside the disk.
    #[must_use]
    pub(crate) fn descend(&mut self, pages: &mut dyn FnMut(usize) -> Option<cairn_env::Buf>) -> bool {
        let below = self.sizes[self.depth - 1];
        let mut pointers = Vec::with_capacity(below);
        for index in 0..self.levels[self.depth].len() {
            let bytes = pages(index);
            let mut take = Take::new(bytes.as_deref().unwrap_or(&[]));
            for _ in 0..FANOUT.min(below - pointers.len()) {
                let slot = take.u64().unwrap_or(0);
                let checksum = take.u64().unwrap_or(0);
                if slot >= self.slot_count {
                    return false;
                }
                pointers.push(Pointer { slot, checksum });
            }
        }
        self.depth -= 1;
        self.levels[self.depth] = pointers;
        true
    }

    pub(crate) fn finish(self) -> Tree {
        Tree { number: self.number, levels: self.levels }
    }
}
