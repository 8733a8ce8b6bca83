//! Tags of chunks: what a chunk server writes beside each copy in its store.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, seed, unsealed};
use cairn_cs::tag::{ChunkTag, CopyState};
use cairn_types::{ChunkVersion, CsId};
use cairn_wire::mds::{Replica, ReplicaRole};

pub const TARGET: Target = Target {
    name: "cs_tag",
    covers: "the tag of a chunk in the store: state of the copy, replica set, suspect blocks",
    entry: "cairn_cs::tag::ChunkTag::decode",
    shape: Shape::Bytes,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    if let Ok(tag) = measured(bytes.len(), || ChunkTag::decode(bytes)) {
        assert_eq!(ChunkTag::decode(&tag.encode()), Ok(tag), "a tag survives the trip");
    }
}

fn seeds() -> Seeds {
    let replica = |cs, role| Replica { cs: CsId(cs), role, since: ChunkVersion(u64::from(cs)) };
    let replicas = vec![replica(1025, ReplicaRole::Current), replica(1026, ReplicaRole::Rebuilding)];
    let rebuilding = CopyState::Rebuilding {
        base: Some(ChunkVersion(4)),
        joined: ChunkVersion(7),
        suspects: vec![(0, 16), (700, 1)],
    };
    vec![
        seed("whole", ChunkTag { state: CopyState::Whole, replicas: replicas.clone() }.encode()),
        seed("rebuilding", ChunkTag { state: rebuilding, replicas: replicas.clone() }.encode()),
        seed("rebuilt", ChunkTag { state: CopyState::Rebuilt { joined: ChunkVersion(9) }, replicas }.encode()),
    ]
}
