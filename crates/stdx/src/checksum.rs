//! Checksums: CRC-64/NVME for data blocks and structures, CRC-32C for frame headers.
//!
//! Cost: about 0.08 µs per 4 KiB on a machine with VPCLMULQDQ.

use crc_fast::{CrcAlgorithm, checksum};

/// CRC-64/NVME of `bytes`. The checksum of a 4 KiB block travels with it from the client to the disk and back.
pub fn crc64(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// CRC-32C (Castagnoli, as in RFC 3720 appendix B.4) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_answers() {
        assert_eq!(super::crc64(b"123456789"), 0xae8b_1486_0a79_9888);
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
    }
}
