//! The superblock: who the store is, and the root of one checkpoint.

use super::bytes::{Put, Take};
use super::{FORMAT_VERSION, Pointer, Run, SLOT, SLOTS_MAX, SLOTS_MIN};
use cairn_stdx::checksum::crc64;
use cairn_types::ClusterId;

const MAGIC: [u8; 8] = *b"CAIRNCS1";
/// Counters of groups, sessions and generations stay below this; a higher one is forged.
pub(crate) const COUNT_MAX: u64 = 1 << 60;
/// Bytes the owner of a store keeps in it; see [`crate::StoreRequest::SetLabel`].
pub const LABEL_BYTES: usize = 32;
/// Metadata trees, in the order of their roots: bitmap, chunks, volumes, tails.
pub(crate) const TREES: usize = 4;

/// Where the chain of groups goes on after a given group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ChainPosition {
    /// Number of the group before.
    pub group: u64,
    /// Session that wrote it.
    pub session: u64,
    /// Checksum of its header: the next header repeats it.
    pub header_checksum: u64,
    /// The next header is the first slot of this run.
    pub current: Run,
    /// Reserved: used when `current` is full.
    pub after: Run,
}

/// Root of one metadata tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct TreeRoot {
    pub pages: u64,
    pub top: Pointer,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Superblock {
    pub cluster: ClusterId,
    pub store_uuid: [u8; 16],
    pub slot_count: u64,
    pub generation: u64,
    pub chain: ChainPosition,
    pub trees: [TreeRoot; TREES],
    pub label: [u8; LABEL_BYTES],
}

/// Why a slot is no superblock.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// The first eight bytes are something else.
    #[error("no Cairn store begins here")]
    Magic,
    /// The checksum does not match.
    #[error("checksum mismatch: torn or rotten")]
    Checksum,
    /// Written by a newer program.
    #[error("format version {found}, this program reads up to {FORMAT_VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// Checksum good, content impossible.
    #[error("field {field} is out of range")]
    Field {
        /// Which one.
        field: &'static str,
    },
}

impl Superblock {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut slot = vec![0u8; SLOT];
        let mut put = Put::new(&mut slot);
        put.bytes(&MAGIC);
        put.u64(0);
        put.u16(FORMAT_VERSION);
        put.skip(6);
        put.bytes(&self.cluster.0);
        put.bytes(&self.store_uuid);
        put.u64(self.slot_count);
        put.u64(self.generation);
        let chain = &self.chain;
        for word in [chain.group, chain.session, chain.header_checksum, chain.current.start, chain.current.end] {
            put.u64(word);
        }
        put.u64(chain.after.start);
        put.u64(chain.after.end);
        for tree in &self.trees {
            put.u64(tree.pages);
            put.u64(tree.top.slot);
            put.u64(tree.top.checksum);
        }
        put.bytes(&self.label);
        let checksum = crc64(&slot[16..]);
        slot[8..16].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    pub(crate) fn decode(slot: &[u8]) -> Result<Self, SuperblockError> {
        let short = SuperblockError::Field { field: "length" };
        let mut take = Take::new(slot);
        if take.array() != Some(MAGIC) {
            return Err(SuperblockError::Magic);
        }
        if slot.len() != SLOT || take.u64() != Some(crc64(&slot[16..])) {
            return Err(SuperblockError::Checksum);
        }
        let version = take.u16().ok_or(short.clone())?;
        if version != FORMAT_VERSION {
            return Err(SuperblockError::Version { found: version });
        }
        Self::decode_body(&mut take).ok_or(short)?
    }

    fn decode_body(take: &mut Take<'_>) -> Option<Result<Self, SuperblockError>> {
        take.bytes(6)?;
        let cluster = ClusterId(take.array()?);
        let store_uuid = take.array()?;
        let (slot_count, generation) = (take.u64()?, take.u64()?);
        let (group, session, header_checksum) = (take.u64()?, take.u64()?, take.u64()?);
        let current = Run { start: take.u64()?, end: take.u64()? };
        let after = Run { start: take.u64()?, end: take.u64()? };
        let mut trees = [TreeRoot::default(); TREES];
        for tree in &mut trees {
            tree.pages = take.u64()?;
            tree.top = Pointer { slot: take.u64()?, checksum: take.u64()? };
        }
        let label = take.array()?;
        let field = |field| Some(Err(SuperblockError::Field { field }));
        if !(SLOTS_MIN..=SLOTS_MAX).contains(&slot_count) {
            return field("slot_count");
        }
        if [group, session, generation].iter().any(|count| *count > COUNT_MAX) {
            return field("counters");
        }
        if !current.is_valid(slot_count) || current.is_empty() || !after.is_valid(slot_count) {
            return field("chain");
        }
        if trees.iter().any(|tree| tree.pages > slot_count || tree.top.slot >= slot_count) {
            return field("trees");
        }
        let chain = ChainPosition { group, session, header_checksum, current, after };
        Some(Ok(Self { cluster, store_uuid, slot_count, generation, chain, trees, label }))
    }
}
