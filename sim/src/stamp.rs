//! Stamps: what simulated and real test clients write into a block, so that a read tells which write it saw.

use cairn_types::BLOCK_SIZE;

/// Size of one stamp; a block is filled with copies of it, so that a torn block shows.
const STAMP_SIZE: usize = 64;

/// The check of a stamp. Not the CRC-64 of the store: a message followed by its own CRC has the same CRC whatever it
/// says, and the store could not tell one stamped block from another, or from a torn mixture of both.
fn digest(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    words.fold(0x9e37_79b9_7f4a_7c15, |hash, word| {
        let mixed = (hash ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 29)
    })
}

/// Encoder and decoder of stamped blocks.
pub struct Stamp;

impl Stamp {
    /// A block of `volume` that carries `value` (not 0: a block of zeros is value 0).
    pub fn encode(volume: u64, block: u64, value: u64) -> [u8; BLOCK_SIZE] {
        let mut out = [0u8; BLOCK_SIZE];
        Self::fill(&mut out, volume, block, value);
        out
    }

    /// Stamps a unit of any size: volumes that are written in 512-byte sectors carry a stamp in each.
    pub fn fill(out: &mut [u8], volume: u64, block: u64, value: u64) {
        assert!(!out.is_empty() && out.len().is_multiple_of(STAMP_SIZE), "a unit holds whole stamps");
        if value == 0 {
            return out.fill(0);
        }
        let mut stamp = [0u8; STAMP_SIZE];
        for (i, word) in [0x4341_4952_4e53_544d, volume, block, value].into_iter().enumerate() {
            stamp[8 * i..8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
        let checksum = digest(&stamp[..STAMP_SIZE - 8]);
        stamp[STAMP_SIZE - 8..].copy_from_slice(&checksum.to_le_bytes());
        out.chunks_exact_mut(STAMP_SIZE).for_each(|piece| piece.copy_from_slice(&stamp));
    }

    /// True for a block that holds stamps, whole or damaged.
    pub fn is_stamped(bytes: &[u8]) -> bool {
        let magic = 0x4341_4952_4e53_544d_u64.to_le_bytes();
        bytes.chunks_exact(STAMP_SIZE).filter(|piece| piece.starts_with(&magic)).count() > bytes.len() / STAMP_SIZE / 2
    }

    /// Volume and unit of the first stamp in a block, and where in the block it stands.
    pub fn place(bytes: &[u8]) -> Option<(u64, u64, usize)> {
        let magic = 0x4341_4952_4e53_544d_u64.to_le_bytes();
        let at = bytes.chunks_exact(STAMP_SIZE).position(|piece| piece.starts_with(&magic))? * STAMP_SIZE;
        let word = |i: usize| u64::from_le_bytes(bytes[at + 8 * i..at + 8 * i + 8].try_into().expect("eight bytes"));
        Some((word(1), word(2), at))
    }

    /// The value a block of `volume` carries; 0 for zeros.
    ///
    /// # Errors
    /// In words, when the block is torn, garbage, or belongs elsewhere.
    pub fn decode(bytes: &[u8], volume: u64, block: u64) -> Result<u64, String> {
        if bytes.is_empty() || !bytes.len().is_multiple_of(STAMP_SIZE) {
            return Err(format!("{} bytes instead of a block", bytes.len()));
        }
        let first = &bytes[..STAMP_SIZE];
        if let Some(at) = bytes.chunks_exact(STAMP_SIZE).position(|piece| piece != first) {
            return Err(format!("torn at byte {}", at * STAMP_SIZE));
        }
        if first.iter().all(|&byte| byte == 0) {
            return Ok(0);
        }
        let word = |i: usize| u64::from_le_bytes(first[8 * i..8 * i + 8].try_into().expect("eight bytes"));
        if digest(&first[..STAMP_SIZE - 8]) != word(STAMP_SIZE / 8 - 1) {
            return Err("garbage".to_owned());
        }
        if (word(1), word(2)) != (volume, block) {
            return Err(format!("it belongs to volume {} block {}", word(1), word(2)));
        }
        Ok(word(3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_tell_where_they_belong() {
        let mut block = Stamp::encode(1, 2, 3);
        assert_eq!(Stamp::decode(&block, 1, 2), Ok(3));
        assert!(Stamp::decode(&block, 1, 3).is_err());
        block[4095] ^= 1;
        assert!(Stamp::decode(&block, 1, 2).is_err());
        assert_eq!(Stamp::decode(&[0; BLOCK_SIZE], 1, 2), Ok(0));
    }
}
