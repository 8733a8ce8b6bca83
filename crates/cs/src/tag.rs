//! The bytes a chunk server keeps with each copy in the store's `tag`: what state the copy is in, and a map fragment
//! from which the metadata can be found again when every metadata server is lost (I21).
//!
//! Layout, version 1, little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | layout version, 1 |
//! | 1 | state: 0 whole, 1 rebuilding, 2 rebuilt |
//! | 2 | number of replicas |
//! | 3 | number of suspects |
//! | 4..12 | base version + 1; 0 for none (rebuilding only) |
//! | 12..20 | joined version (rebuilding and rebuilt) |
//! | then 16 each | replica: server u32, role u8 (0 current, 1 rebuilding), 3 zero bytes, since u64 |
//! | then 8 each | suspect run: first block u32, number of blocks u32 |

use cairn_types::{ChunkVersion, CsId};
use cairn_wire::mds::{Replica, ReplicaRole};

/// Version of the layout.
const TAG_VERSION: u8 = 1;
/// Fixed bytes before the lists.
const FIXED: usize = 20;
/// Bytes of one replica.
const REPLICA: usize = 16;
/// Bytes of one suspect run.
const SUSPECT: usize = 8;
/// Most replicas kept; the redundancy scheme has no more.
pub const TAG_REPLICAS_MAX: usize = 15;
/// Most suspect runs a tag has room for; of more, the smallest gaps are closed.
pub const TAG_SUSPECTS_MAX: usize = 30;
/// Longest tag.
pub const TAG_MAX: usize = FIXED + TAG_REPLICAS_MAX * REPLICA + TAG_SUSPECTS_MAX * SUSPECT;
const _: () = assert!(TAG_MAX <= 512, "the store keeps tags of 512 bytes at most");

/// What a copy may be used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// Complete at its version.
    Whole,
    /// Being rebuilt: takes writes of its version, serves nothing, is no source. Survives restarts.
    Rebuilding {
        /// The version at which the copy was whole; none when it began empty.
        base: Option<ChunkVersion>,
        /// The version with which this server joined the replica set: names the rebuild. Client writes taken since
        /// then are good only as long as the server stayed in the set.
        joined: ChunkVersion,
        /// Runs of blocks the copy had unsettled writes in before it joined: fetched whatever their version says.
        suspects: Vec<(u32, u32)>,
    },
    /// Complete since the rebuild that began with `joined`, so that a repeated order is answered at once.
    Rebuilt {
        /// See [`CopyState::Rebuilding`].
        joined: ChunkVersion,
    },
}

/// A decoded tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTag {
    /// State of the copy.
    pub state: CopyState,
    /// Replica set as this server last heard of it; empty when it never did.
    pub replicas: Vec<Replica>,
}

/// A tag that this version cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tag of the copy is not readable ({0})")]
pub struct TagError(&'static str);

impl ChunkTag {
    /// The tag of a copy made by a lease holder.
    pub fn whole() -> Self {
        Self { state: CopyState::Whole, replicas: Vec::new() }
    }

    /// The bytes; panics when a list exceeds its maximum, which callers bound.
    pub fn encode(&self) -> Vec<u8> {
        let none: &[(u32, u32)] = &[];
        let (state, base, joined, suspects) = match &self.state {
            CopyState::Whole => (0, 0, 0, none),
            CopyState::Rebuilding { base, joined, suspects } => {
                (1, base.map_or(0, |version| version.0 + 1), joined.0, suspects.as_slice())
            }
            CopyState::Rebuilt { joined } => (2, 0, joined.0, none),
        };
        let replicas = &self.replicas[..self.replicas.len().min(TAG_REPLICAS_MAX)];
        assert!(suspects.len() <= TAG_SUSPECTS_MAX, "a tag has room for {TAG_SUSPECTS_MAX} suspect runs");
        let mut out = Vec::with_capacity(FIXED + replicas.len() * REPLICA + suspects.len() * SUSPECT);
        out.extend_from_slice(&[TAG_VERSION, state, replicas.len() as u8, suspects.len() as u8]);
        out.extend_from_slice(&u64::to_le_bytes(base));
        out.extend_from_slice(&u64::to_le_bytes(joined));
        for replica in replicas {
            out.extend_from_slice(&replica.cs.0.to_le_bytes());
            out.extend_from_slice(&[u8::from(replica.role == ReplicaRole::Rebuilding), 0, 0, 0]);
            out.extend_from_slice(&replica.since.0.to_le_bytes());
        }
        for (first, count) in suspects {
            out.extend_from_slice(&first.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
        }
        out
    }

    /// Reads a tag; no bytes at all mean a whole copy.
    ///
    /// # Errors
    /// [`TagError`] when the bytes are no tag of a known version.
    pub fn decode(bytes: &[u8]) -> Result<Self, TagError> {
        if bytes.is_empty() {
            return Ok(Self::whole());
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes.len() < FIXED || bytes[0] != TAG_VERSION {
            return Err(TagError("unknown layout version"));
        }
        let (replica_count, suspect_count) = (usize::from(bytes[2]), usize::from(bytes[3]));
        if replica_count > TAG_REPLICAS_MAX || suspect_count > TAG_SUSPECTS_MAX {
            return Err(TagError("a list longer than its maximum"));
        }
        if bytes.len() != FIXED + replica_count * REPLICA + suspect_count * SUSPECT {
            return Err(TagError("length"));
        }
        let mut replicas = Vec::with_capacity(replica_count);
        for at in (0..replica_count).map(|i| FIXED + i * REPLICA) {
            let role = match bytes[at + 4] {
                0 => ReplicaRole::Current,
                1 => ReplicaRole::Rebuilding,
                _ => return Err(TagError("role")),
            };
            replicas.push(Replica { cs: CsId(half(at)), role, since: ChunkVersion(word(at + 8)) });
        }
        let suspects_at = FIXED + replica_count * REPLICA;
        let suspects: Vec<(u32, u32)> =
            (0..suspect_count).map(|i| suspects_at + i * SUSPECT).map(|at| (half(at), half(at + 4))).collect();
        let (base, joined) = (word(4), ChunkVersion(word(12)));
        let state = match bytes[1] {
            0 => CopyState::Whole,
            1 => CopyState::Rebuilding { base: base.checked_sub(1).map(ChunkVersion), joined, suspects },
            2 => CopyState::Rebuilt { joined },
            _ => return Err(TagError("state")),
        };
        Ok(Self { state, replicas })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tags_survive_the_trip() {
        let replica = Replica { cs: CsId(1025), role: ReplicaRole::Rebuilding, since: ChunkVersion(7) };
        for state in [
            CopyState::Whole,
            CopyState::Rebuilding { base: None, joined: ChunkVersion(3), suspects: vec![] },
            CopyState::Rebuilding {
                base: Some(ChunkVersion(0)),
                joined: ChunkVersion(3),
                suspects: vec![(1, 2), (9, 1)],
            },
            CopyState::Rebuilt { joined: ChunkVersion(9) },
        ] {
            let tag = ChunkTag { state, replicas: vec![replica; 3] };
            assert_eq!(ChunkTag::decode(&tag.encode()), Ok(tag));
        }
        assert_eq!(ChunkTag::decode(&[]), Ok(ChunkTag::whole()));
        let largest = ChunkTag {
            state: CopyState::Rebuilding {
                base: None,
                joined: ChunkVersion(1),
                suspects: vec![(0, 1); TAG_SUSPECTS_MAX],
            },
            replicas: vec![replica; TAG_REPLICAS_MAX],
        };
        assert_eq!(largest.encode().len(), TAG_MAX);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_decoder(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = ChunkTag::decode(&bytes);
        }
    }
}
