//! Leaves of the index and the cache that holds them.

use crate::layout::{LEAF_BLOCKS, SLOT};
use cairn_types::{ChunkId, ChunkVersion};

/// Entries a leaf.
pub(crate) const LEAF_ENTRIES: usize = LEAF_BLOCKS as usize;
const SLOT_BITS: u32 = 40;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

/// Where one block is: checksum, slot and version in 16 bytes. All zero: never written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Entry {
    pub checksum: u64,
    word: u64,
}

impl Entry {
    /// The leaf that described this block was lost: the block is unreadable until it is written again.
    const DAMAGED: u64 = SLOT_MASK;

    pub(crate) fn mapped(slot: u64, version: ChunkVersion, checksum: u64) -> Self {
        Self { checksum, word: slot | (version.0 << SLOT_BITS) }
    }

    pub(crate) fn unmapped(version: ChunkVersion) -> Self {
        Self { checksum: 0, word: version.0 << SLOT_BITS }
    }

    pub(crate) fn damaged(version: ChunkVersion) -> Self {
        Self { checksum: 0, word: Self::DAMAGED | (version.0 << SLOT_BITS) }
    }

    /// The data slot, when the block is mapped.
    pub(crate) fn slot(self) -> Option<u64> {
        let slot = self.word & SLOT_MASK;
        (slot != 0 && slot != Self::DAMAGED).then_some(slot)
    }

    pub(crate) fn is_damaged(self) -> bool {
        self.word & SLOT_MASK == Self::DAMAGED
    }

    pub(crate) fn version(self) -> ChunkVersion {
        ChunkVersion(self.word >> SLOT_BITS)
    }

    pub(crate) fn with_version(self, version: ChunkVersion) -> Self {
        Self { checksum: self.checksum, word: (self.word & SLOT_MASK) | (version.0 << SLOT_BITS) }
    }
}

pub(crate) type Leaf = [Entry; LEAF_ENTRIES];

/// Bytes of a leaf as written to disk.
pub(crate) fn leaf_bytes(leaf: &Leaf, out: &mut [u8]) {
    for (entry, out) in leaf.iter().zip(out.as_chunks_mut::<16>().0) {
        out[..8].copy_from_slice(&entry.checksum.to_le_bytes());
        out[8..].copy_from_slice(&entry.word.to_le_bytes());
    }
}

pub(crate) fn parse_leaf(bytes: &[u8]) -> Leaf {
    assert_eq!(bytes.len(), SLOT, "a leaf fills a slot");
    let mut leaf = [Entry::default(); LEAF_ENTRIES];
    for (entry, bytes) in leaf.iter_mut().zip(bytes.as_chunks::<16>().0) {
        let word = u128::from_le_bytes(*bytes);
        *entry = Entry { checksum: word as u64, word: (word >> 64) as u64 };
    }
    leaf
}

/// One leaf in memory.
pub(crate) struct Cached {
    pub leaf: Box<Leaf>,
    pub chunk: ChunkId,
    pub number: u32,
    pub pins: u32,
    /// Changed since the last checkpoint snapshot.
    pub dirty: bool,
    /// Part of the snapshot being written: its slot cannot be read yet.
    pub in_checkpoint: bool,
    recently_used: bool,
}

/// Leaves in memory, evicted by the clock algorithm. Dirty, pinned and snapshot leaves stay.
pub(crate) struct Cache {
    slab: Vec<Option<Cached>>,
    vacant: Vec<u32>,
    hand: usize,
    limit: usize,
    len: usize,
}

impl Cache {
    pub(crate) fn new(limit: usize) -> Self {
        Self { slab: Vec::new(), vacant: Vec::new(), hand: 0, limit: limit.max(16), len: 0 }
    }

    /// Leaves in memory.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts a leaf in; returns its handle.
    pub(crate) fn insert(&mut self, chunk: ChunkId, number: u32, leaf: Leaf) -> u32 {
        let cached = Cached {
            leaf: Box::new(leaf),
            chunk,
            number,
            pins: 0,
            dirty: false,
            in_checkpoint: false,
            recently_used: true,
        };
        self.len += 1;
        match self.vacant.pop() {
            Some(handle) => {
                self.slab[handle as usize] = Some(cached);
                handle
            }
            None => {
                self.slab.push(Some(cached));
                self.slab.len() as u32 - 1
            }
        }
    }

    pub(crate) fn get(&self, handle: u32) -> &Cached {
        self.slab[handle as usize].as_ref().expect("handles point to cached leaves")
    }

    pub(crate) fn get_mut(&mut self, handle: u32) -> &mut Cached {
        self.slab[handle as usize].as_mut().expect("handles point to cached leaves")
    }

    /// Marks a leaf as used, so that the clock hand passes it once.
    pub(crate) fn touch(&mut self, handle: u32) -> &Cached {
        let cached = self.get_mut(handle);
        cached.recently_used = true;
        cached
    }

    pub(crate) fn remove(&mut self, handle: u32) -> Cached {
        self.len -= 1;
        self.vacant.push(handle);
        self.slab[handle as usize].take().expect("handles point to cached leaves")
    }

    /// Evicts one clean leaf when the cache is over its limit; the caller forgets the handle of the leaf returned.
    pub(crate) fn evict(&mut self) -> Option<(ChunkId, u32)> {
        /// Leaves looked at before giving up: a cache full of dirty leaves waits for the checkpoint instead.
        const STEPS_MAX: usize = 64;
        if self.len <= self.limit {
            return None;
        }
        for _ in 0..STEPS_MAX {
            self.hand = if self.hand + 1 >= self.slab.len() { 0 } else { self.hand + 1 };
            let Some(cached) = &mut self.slab[self.hand] else { continue };
            if cached.dirty || cached.in_checkpoint || cached.pins > 0 {
                continue;
            }
            if cached.recently_used {
                cached.recently_used = false;
                continue;
            }
            let cached = self.remove(self.hand as u32);
            return Some((cached.chunk, cached.number));
        }
        None
    }
}
