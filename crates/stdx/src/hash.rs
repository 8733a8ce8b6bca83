//! Hash maps with a fixed hasher, for hot paths where a `BTreeMap` is too slow.
//!
//! The hasher has no random seed, so behaviour never differs between two runs. Iteration order is still an accident of
//! capacity: cores look up in these maps and never iterate them to decide anything.

#![expect(clippy::disallowed_types, reason = "this module is the sanctioned wrapper")]

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// `HashMap` with [`FixedHasher`].
pub type FixedMap<K, V> = HashMap<K, V, BuildHasherDefault<FixedHasher>>;
/// `HashSet` with [`FixedHasher`].
pub type FixedSet<K> = HashSet<K, BuildHasherDefault<FixedHasher>>;

/// A multiply-xorshift hasher for small integer keys. Not for keys an adversary picks freely.
#[derive(Default, Clone, Copy, Debug)]
pub struct FixedHasher(u64);

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.write_u64(u64::from_le_bytes(word) ^ ((piece.len() as u64) << 56));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let mixed = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}
