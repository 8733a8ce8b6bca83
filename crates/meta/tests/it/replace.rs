//! A new store in place of a removed server.

use crate::repair::{Cluster, Server, filled};
use crate::support::{SECOND, addr};
use cairn_types::{ClientId, CsId, HostId};
use cairn_wire::mds::*;

const NEW_STORE: [u8; 16] = [0xee; 16];

fn join(cluster: &mut Cluster, cs: CsId, store: [u8; 16], lineage: Lineage) -> Result<MdsReply, MdsError> {
    let location = Location { host: HostId([0; 16]), host_name: "host0".into(), ..Location::default() };
    let (addr, repository) = (addr(99), "/new".into());
    let server = CsProfile { cs: Some(cs), store, addr, location, tier: 0, capacity: 1 << 40, repository };
    cluster.world.call(ClientId(0), MdsRequest::CsJoin { server, lineage })
}

fn replace(cluster: &mut Cluster, cs: CsId) -> Result<u64, MdsError> {
    match cluster.world.call(cluster.session, MdsRequest::CsReplace { cs, store: NEW_STORE })? {
        MdsReply::CsReplaced { left } => Ok(left),
        other => panic!("{other:?}"),
    }
}

#[test]
pub fn an_empty_store_takes_an_id_only_when_no_chunk_names_it() {
    let mut cluster = filled(4, 40);
    let cs = *cluster.servers.keys().next().unwrap();
    let refused = replace(&mut cluster, cs).unwrap_err().to_string();
    assert!(refused.contains("remove it first"), "{refused}");
    cluster.silence(cs, CsState::Offline);
    cluster.world.call(cluster.session, MdsRequest::CsRemove { cs, force: true, cancel: false }).unwrap();
    let mut asked = 0;
    while replace(&mut cluster, cs).unwrap() > 0 {
        cluster.world.tick(SECOND);
        asked += 1;
        assert!(asked < 100, "it comes to an end");
    }
    let chunks = cluster.world.chunks(cluster.volume);
    assert!(chunks.iter().all(|entry| entry.replicas.iter().all(|replica| replica.cs != cs)));
    assert_eq!(replace(&mut cluster, cs), Ok(0), "its answer was lost");
    // A process that still runs with the old store has no say, nor has its directory when it is started again.
    let beat = MdsRequest::CsHeartbeat {
        cs,
        boot: 1,
        stats: CsStats::default(),
        done: Vec::new(),
        damaged: Vec::new(),
        failed: None,
    };
    let answer = cluster.world.call(ClientId(0), beat).unwrap();
    assert!(matches!(answer, MdsReply::CsTurnedAway { .. }), "{answer:?}");
    let first = Lineage { generation: 1, previous: 0, nonce: 5, boot: 1, recovered: 0 };
    let old = join(&mut cluster, cs, [40; 16], first).unwrap_err().to_string();
    assert!(old.contains("known with another store"), "{old}");
    assert!(matches!(join(&mut cluster, cs, NEW_STORE, first), Ok(MdsReply::CsRegistered { .. })));
    cluster.servers.insert(cs, Server { up: true, ..Server::default() });
    cluster.heal();
    cluster.check_truth("healed");
    cluster.world.meta.check();
    // It takes part again.
    let copies = |cluster: &Cluster| cluster.servers[&cs].copies.len();
    let other = *cluster.servers.keys().nth(1).unwrap();
    cluster.silence(other, CsState::Offline);
    cluster.run(60);
    assert!(copies(&cluster) > 10);
    assert_eq!(cluster.world.meta.chunk_counts().healthy, 40);
}

#[test]
fn an_empty_store_is_never_taken_for_the_only_copy_that_was_given_up() {
    let mut cluster = filled(3, 6);
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    all.iter().for_each(|cs| cluster.silence(*cs, CsState::Offline));
    for cs in &all {
        cluster.world.call(cluster.session, MdsRequest::CsAbandon { cs: *cs }).unwrap();
    }
    for _ in 0..20 {
        cluster.world.tick(SECOND);
    }
    let named: Vec<CsId> = cluster.world.chunks(cluster.volume)[0].replicas.iter().map(|replica| replica.cs).collect();
    assert_eq!(named.len(), 1);
    let refused = replace(&mut cluster, named[0]).unwrap_err().to_string();
    assert!(refused.contains("volume v") && refused.contains("make-cs"), "{refused}");
}
