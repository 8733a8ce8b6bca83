//! Every byte the store puts on a disk. Tables and history: `docs/formats/store.md`.
//!
//! The disk is an array of 4 KiB *slots*. Four slots at fixed places hold superblocks; every other slot holds a group
//! header, a data block, a leaf of the index, or a page of one of the four metadata trees. All integers are
//! little-endian.

pub(crate) mod bytes;
pub(crate) mod group;
pub(crate) mod superblock;

use cairn_types::BLOCK_SIZE;

/// Bytes a slot.
pub(crate) const SLOT: usize = BLOCK_SIZE;
/// Bytes a slot.
pub(crate) const SLOT_U64: u64 = SLOT as u64;
/// Version of the format this code writes.
pub const FORMAT_VERSION: u16 = 1;
/// Slots of the superblock copies: generation `g` lives in both slots of `SUPERBLOCK_SLOTS[g % 2]`. The copies of a
/// pair lie 1 MiB apart, so that one bad spot of the medium does not take both.
pub(crate) const SUPERBLOCK_SLOTS: [[u64; 2]; 2] = [[0, 256], [1, 257]];
/// The first group header of a fresh store.
pub(crate) const FIRST_SLOT: u64 = 2;
/// Smallest device: 16 MiB.
pub const SLOTS_MIN: u64 = 4096;
/// Largest device: slot numbers have 40 bits and the highest value means "damaged".
pub const SLOTS_MAX: u64 = (1 << 40) - 2;
/// Highest version a chunk may have: index entries keep 24 bits.
pub const VERSION_MAX: u64 = (1 << 24) - 1;
/// Blocks a leaf of the index covers.
pub const LEAF_BLOCKS: u32 = 256;
/// Most blocks a chunk may have: 256 MiB.
pub const CHUNK_BLOCKS_MAX: u32 = 65_536;
/// Longest tag of a chunk in bytes; keeps a chunk record below one page.
pub const TAG_BYTES_MAX: usize = 512;

/// True when `slot` holds a superblock copy.
pub(crate) fn is_superblock(slot: u64) -> bool {
    SUPERBLOCK_SLOTS.iter().flatten().any(|s| *s == slot)
}

/// A run of slots `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Run {
    pub start: u64,
    pub end: u64,
}

impl Run {
    pub(crate) fn len(self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// True when the run is well formed and lies between the superblocks and `slot_count`; an empty run is `0..0`.
    pub(crate) fn is_valid(self, slot_count: u64) -> bool {
        (self.start == 0 && self.end == 0)
            || (self.start >= FIRST_SLOT && self.start < self.end && self.end <= slot_count)
    }
}

/// A reference to a slot together with the checksum its content must have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Pointer {
    /// Zero: no slot; the page reads as zeros.
    pub slot: u64,
    pub checksum: u64,
}

/// What kind of page a checksum belongs to; part of the binding.
#[derive(Clone, Copy)]
pub(crate) enum PageKind {
    Leaf = 1,
    Tree = 2,
}

/// Binds a content checksum to the place the content belongs to, so that a good page in the wrong place is a bad page.
pub(crate) fn bound_checksum(content: &[u8], kind: PageKind, owner: u64, number: u64) -> u64 {
    let mut x = (kind as u64) ^ owner.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.rotate_left(32);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    cairn_stdx::checksum::crc64(content) ^ x ^ (x >> 31)
}
