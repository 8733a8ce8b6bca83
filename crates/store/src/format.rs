//! Making a store on an empty device.

use crate::api::{FormatError, StoreConfig};
use crate::layout::superblock::{ChainPosition, LABEL_BYTES, Superblock, TREES, TreeRoot};
use crate::layout::{FIRST_SLOT, Run, SLOT_U64, SLOTS_MAX, SLOTS_MIN, SUPERBLOCK_SLOTS};
use cairn_env::{Buf, DiskOp};
use cairn_stdx::checksum::crc64;

/// The first runs of a fresh store: up to the second pair of superblocks, and some way beyond.
const FIRST_CURRENT: Run = Run { start: FIRST_SLOT, end: SUPERBLOCK_SLOTS[0][1] };
const FIRST_AFTER: Run = Run { start: SUPERBLOCK_SLOTS[1][1] + 1, end: SUPERBLOCK_SLOTS[1][1] + 1 + 64 };

/// What to write to turn a device of `device_size` bytes into an empty store. The caller executes the operations in
/// order, each completed before the next is issued; the last one is a flush.
///
/// # Errors
/// [`FormatError`] when the device is too small or too large.
pub fn format(config: &StoreConfig, device_size: u64) -> Result<Vec<DiskOp>, FormatError> {
    let bytes = if config.capacity_bytes == 0 { device_size } else { config.capacity_bytes.min(device_size) };
    let slot_count = bytes / SLOT_U64;
    if slot_count < SLOTS_MIN {
        return Err(FormatError::TooSmall { bytes });
    }
    if slot_count > SLOTS_MAX {
        return Err(FormatError::TooLarge { bytes });
    }
    let write = |slot: u64, bytes: &[u8]| DiskOp::Write { offset: slot * SLOT_U64, bufs: vec![Buf::copy_from(bytes)] };
    // Old superblocks go first, so that a half-formatted device is no store rather than the old one.
    let zeros = [0; SLOT_U64 as usize];
    let mut ops: Vec<DiskOp> = SUPERBLOCK_SLOTS.iter().flatten().map(|slot| write(*slot, &zeros)).collect();
    ops.push(write(FIRST_SLOT, &zeros));
    ops.push(DiskOp::Flush);
    for generation in [0u64, 1] {
        let superblock = Superblock {
            cluster: config.cluster,
            store_uuid: config.store_uuid,
            slot_count,
            generation,
            chain: ChainPosition {
                group: 0,
                session: 0,
                header_checksum: crc64(&config.store_uuid),
                current: FIRST_CURRENT,
                after: FIRST_AFTER,
            },
            trees: [TreeRoot::default(); TREES],
            label: [0; LABEL_BYTES],
        };
        let bytes = superblock.encode();
        ops.extend(SUPERBLOCK_SLOTS[generation as usize].iter().map(|slot| write(*slot, &bytes)));
    }
    ops.push(DiskOp::Flush);
    Ok(ops)
}
