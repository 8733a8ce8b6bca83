//! Copies that move for balance.

use crate::repair::{self, Cluster, Server};
use cairn_types::{ChunkVersion, CsId};
use cairn_wire::mds::*;

/// What each server can hold, in copies.
const CAPACITY: u64 = 100;

/// Chunks on servers that can hold [`CAPACITY`].
fn filled(hosts: u8, chunks: u64) -> Cluster {
    let mut cluster = repair::filled(hosts, chunks);
    cluster.capacity = Some(CAPACITY << 20);
    cluster
}

fn add(cluster: &mut Cluster, host: u8) -> CsId {
    let cs = cluster.world.server(host, CAPACITY << 20);
    cluster.servers.insert(cs, Server { up: true, ..Server::default() });
    cs
}

/// Seconds of heartbeats and writes in which no chunk has less than its redundancy.
fn run_whole(cluster: &mut Cluster, seconds: u64, writes: u64) {
    for second in 0..seconds {
        cluster.run(1);
        cluster.write(second % writes);
        let counts = cluster.world.meta.chunk_counts();
        let lacking = counts.blocked + counts.urgent + counts.degraded + counts.offline;
        assert_eq!(lacking, 0, "second {second}: {counts:?}");
        cluster.check_truth(&format!("second {second}"));
        cluster.world.meta.check();
    }
}

fn events(cluster: &Cluster, code: &str) -> Vec<String> {
    let Ok(MdsReply::Events(events)) = cluster.world.meta.query(&MdsRequest::Events { after: 0, limit: 10_000 }) else {
        panic!("events")
    };
    events.into_iter().filter(|event| event.code == code).map(|event| event.text).collect()
}

fn copies(cluster: &Cluster) -> Vec<usize> {
    cluster.servers.values().map(|server| server.copies.len()).collect()
}

fn versions(cluster: &Cluster) -> Vec<ChunkVersion> {
    cluster.world.chunks(cluster.volume).iter().map(|entry| entry.version).collect()
}

#[test]
fn new_servers_get_their_share_under_writes_and_then_it_rests() {
    let mut cluster = filled(4, 60);
    cluster.run(3);
    assert!(events(&cluster, "MDS-5040").is_empty(), "{:?}", copies(&cluster));
    for host in [4, 5] {
        add(&mut cluster, host);
    }
    run_whole(&mut cluster, 120, 60);
    let after = copies(&cluster);
    assert_eq!(after.iter().sum::<usize>(), 180, "{after:?}");
    let (least, most) = (*after.iter().min().unwrap(), *after.iter().max().unwrap());
    assert!(most - least <= 6, "half of 10 % and one: {after:?}");
    assert_eq!(events(&cluster, "MDS-5040").len(), 1);
    assert!(events(&cluster, "MDS-5041")[0].starts_with("the servers are balanced, "));
    let before = versions(&cluster);
    run_whole(&mut cluster, 120, 60);
    assert_eq!((versions(&cluster), copies(&cluster)), (before, after), "nothing moves back");
}

#[test]
fn what_the_failure_domain_forbids_is_not_tried_for_ever() {
    let mut cluster = filled(3, 40);
    add(&mut cluster, 0);
    run_whole(&mut cluster, 200, 40);
    let after = copies(&cluster);
    assert_eq!(&after[1..3], [40, 40], "each chunk needs all three hosts: {after:?}");
    assert!(after[0].abs_diff(after[3]) <= 6, "within the host there is choice: {after:?}");
    let rests = events(&cluster, "MDS-5042");
    assert_eq!(rests.len(), 1, "{rests:?}");
    let before = versions(&cluster);
    run_whole(&mut cluster, 200, 40);
    assert_eq!(versions(&cluster), before);
}

#[test]
fn nothing_moves_while_copies_are_missing_or_when_it_is_turned_off() {
    let mut cluster = filled(4, 60);
    let pairs = vec![("mds.rebalance.gap".to_owned(), "100".to_owned())];
    cluster.world.call(cluster.session, MdsRequest::ConfigSet { pairs }).unwrap();
    add(&mut cluster, 4);
    let before = versions(&cluster);
    cluster.run(60);
    assert_eq!(versions(&cluster), before);
    let pairs = vec![("mds.rebalance.gap".to_owned(), "10".to_owned())];
    cluster.world.call(cluster.session, MdsRequest::ConfigSet { pairs }).unwrap();
    let cs = *cluster.servers.keys().next().unwrap();
    cluster.silence(cs, CsState::Inactive);
    for index in 0..60 {
        cluster.write(index);
    }
    assert!(cluster.world.meta.chunk_counts().urgent > 0);
    cluster.run(30);
    assert!(events(&cluster, "MDS-5040").is_empty());
}
