//! Everything but the chunk servers is lost at a random moment: what was acknowledged is found again, and nothing a
//! server holds goes before an operator said so.

use crate::repair::Cluster;
use crate::support::{SECOND, World, addr};
use cairn_meta::recover::{FoundCopy, Listing, Options, Problem, RecoverError, Report, recover};
use cairn_meta::{Kv, MemKv};
use cairn_stdx::Rng;
use cairn_types::{ChunkId, ChunkVersion, ClientId, ClusterId, CsId, Epoch, HostId, InodeId, MdsId, VolumeId};
use cairn_wire::mds::*;
use std::collections::BTreeSet;

const BLOCKS: u32 = 256;

fn options() -> Options {
    Options {
        name: "stor1".into(),
        addr: addr(9),
        repository: "/new".into(),
        redundancy: None,
        block_volumes: BTreeSet::new(),
        all_block_volumes: false,
        wall_ns: 5_000 * SECOND,
    }
}

fn listing(cs: CsId) -> Listing {
    Listing {
        cluster: ClusterId([7; 16]),
        cs: Some(cs),
        store: [40 + (cs.0 - 1025) as u8; 16],
        host: HostId([cs.0 as u8; 16]),
        tier: 0,
        repository: format!("/cs{}", cs.0),
        capacity: 1 << 40,
        used: 1 << 30,
        epochs: Vec::new(),
        copies: Vec::new(),
        mentioned: Vec::new(),
    }
}

fn copy(chunk: u64, volume: VolumeId, index: u64, version: u64) -> FoundCopy {
    FoundCopy {
        chunk: ChunkId(chunk),
        volume,
        index,
        version: ChunkVersion(version),
        block_count: BLOCKS,
        mapped_blocks: 3,
        end_block: Some(7),
        whole: true,
    }
}

/// What `cairn cs scan` would find.
fn listings(cluster: &Cluster) -> Vec<Listing> {
    let found = |(cs, server): (&CsId, &crate::repair::Server)| {
        let copies = server.copies.iter().map(|(chunk, copy)| FoundCopy {
            chunk: *chunk,
            volume: cluster.volume,
            index: cluster.indexes[chunk],
            version: copy.version,
            block_count: BLOCKS,
            mapped_blocks: 1,
            end_block: Some(1),
            whole: !copy.rebuilding,
        });
        Listing { copies: copies.collect(), epochs: vec![(cluster.volume, cluster.epoch)], ..listing(*cs) }
    };
    cluster.servers.iter().map(found).collect()
}

fn state<K: Kv>(world: &mut World<K>) -> MemKv {
    world.meta.checkpoint();
    world.meta.image_page(None, usize::MAX).into_iter().collect()
}

fn must(options: &Options, listings: &[Listing], backup: Option<MemKv>) -> (World, Report) {
    let (kv, report) = recover(options, listings, backup).unwrap();
    (World::resume(kv, options.wall_ns), report)
}

/// The servers register with the new metadata server and go on; `cluster` becomes the recovered one.
fn go_on(cluster: &mut Cluster, world: World) {
    cluster.world = world;
    cluster.session = cluster.world.session();
    let before = cluster.epoch;
    let grant = cluster.world.acquire(cluster.session, cluster.volume, LeaseMode::Exclusive).unwrap();
    assert!(grant.epoch > before, "an epoch higher than any seen");
    assert!(!grant.clean, "the tails are reconciled first");
    cluster.epoch = grant.epoch;
    for (cs, server) in &mut cluster.servers {
        server.up = true;
        server.done.clear();
        let wanted = listing(*cs);
        let location = Location {
            host: wanted.host,
            host_name: format!("host{}", cs.0),
            rack: String::new(),
            row: String::new(),
            room: String::new(),
            site: String::new(),
        };
        let request = MdsRequest::CsRegister(CsProfile {
            cs: Some(*cs),
            store: wanted.store,
            addr: addr(cs.0 as u16),
            location,
            tier: 0,
            capacity: 1 << 40,
            repository: "/c".into(),
        });
        cluster.world.call(ClientId(0), request).unwrap();
    }
}

fn copies_of(cluster: &Cluster) -> BTreeSet<(CsId, ChunkId)> {
    let of = |(cs, server): (&CsId, &crate::repair::Server)| {
        server.copies.keys().map(|chunk| (*cs, *chunk)).collect::<Vec<_>>()
    };
    cluster.servers.iter().flat_map(of).collect()
}

#[test]
pub fn every_acknowledged_write_is_found_after_random_failures_with_and_without_a_backup() {
    for seed in 0..240 {
        let mut rng = Rng::new(seed);
        let chunk_size = VolumeOptions { chunk_size: Some(1 << 20), ..VolumeOptions::default() };
        let mut cluster = Cluster::new(5, 1, chunk_size);
        let all: Vec<CsId> = cluster.servers.keys().copied().collect();
        let steps = rng.range(20, 400);
        let backup_at = rng.chance(2, 3).then(|| rng.below(steps));
        let mut backup = None;
        for step in 0..steps {
            if backup_at == Some(step) {
                backup = Some(state(&mut cluster.world));
            }
            cluster.random_step(&mut rng, &all);
        }
        let with_backup = backup.is_some();
        let wish = Options { all_block_volumes: true, ..options() };
        let (world, report) = must(&wish, &listings(&cluster), backup);
        world.meta.check();
        if cluster.written.is_empty() {
            continue;
        }
        go_on(&mut cluster, world);
        let context = format!("seed {seed}, backup {with_backup}");
        let entries = cluster.world.chunks(cluster.volume);
        for index in cluster.written.keys() {
            let entry = entries.iter().find(|entry| entry.index == *index);
            let entry = entry.unwrap_or_else(|| panic!("{context}: index {index} is not found: {report}"));
            let has = |replica: &Replica| cluster.servers[&replica.cs].copies.contains_key(&entry.chunk);
            assert!(entry.replicas.iter().all(has), "{context}: {entry:?} names servers without a copy: {report}");
        }
        cluster.check_truth(&context);
        let name = if with_backup { "v".to_owned() } else { format!("recovered-{}", cluster.volume.0) };
        assert!(cluster.world.meta.query(&MdsRequest::VolumeGet { name }).is_ok(), "{context}");
        // While the operator looks, nothing goes, whatever is reported and written.
        let before = copies_of(&cluster);
        let used = cluster.written.keys().copied().max().unwrap_or(0) + 1;
        for step in 0..60 {
            let cs = *rng.choose(&all).unwrap();
            match step % 3 {
                0 => cluster.report(cs),
                1 => cluster.write(rng.below(used)),
                _ => cluster.heartbeat(cs),
            }
            cluster.world.tick(SECOND);
            cluster.check_truth(&context);
        }
        cluster.world.meta.check();
        assert!(copies_of(&cluster).is_superset(&before), "{context}: a copy went");
        let pairs = vec![("mds.recovery.hold".to_owned(), "0".to_owned())];
        cluster.world.call(cluster.session, MdsRequest::ConfigSet { pairs }).unwrap();
        all.iter().for_each(|cs| cluster.report(*cs));
        cluster.heal();
        cluster.check_truth(&format!("{context}, healed"));
        cluster.world.meta.check();
    }
}

#[test]
fn without_a_backup_volumes_become_files_with_the_size_of_their_data_and_the_report_says_what_is_missing() {
    let (one, two) = (VolumeId(17), VolumeId(30));
    let mut servers: Vec<Listing> = (1025..1028).map(|cs| listing(CsId(cs))).collect();
    for server in &mut servers {
        server.copies = vec![copy(5, one, 0, 1), copy(9, one, 2, 4)];
        server.epochs = vec![(one, Epoch(12))];
    }
    servers[0].copies.push(copy(11, two, 0, 2));
    servers[1].mentioned = vec![CsId(1031)];
    let (world, report) = must(&options(), &servers, None);
    world.meta.check();
    let MdsReply::Attr(attr) =
        world.meta.query(&MdsRequest::Resolve { path: b"/recovered/volume-17".to_vec() }).unwrap()
    else {
        panic!()
    };
    assert_eq!(attr.size, 2 * (1 << 20) + 7 * 4096, "up to the last block with data");
    assert_eq!(report.problems, vec![Problem::ServerNotGiven { server: CsId(1031), repository: String::new() }]);
    assert!(!report.is_whole());
    assert_eq!((report.nameless.len(), report.chunks), (2, 3));
    let entry = &world.chunks(one)[1];
    assert_eq!((entry.index, entry.chunk, entry.version, entry.minimum), (2, ChunkId(9), ChunkVersion(5), 2));
    // One copy found: one copy wanted, as far as anybody can tell.
    assert_eq!(world.chunks(two)[0].minimum, 1);
    assert_eq!(world.meta.config("mds.recovery.hold"), 1);
    assert_eq!(report.mds, MdsId(101));
}

#[test]
fn the_chunk_allocated_last_is_used_and_what_is_incomplete_is_lost_rather_than_replaced_by_an_older_one() {
    let volume = VolumeId(17);
    let mut servers = vec![listing(CsId(1025)), listing(CsId(1026))];
    let partial = |mut copy: FoundCopy| {
        copy.whole = false;
        copy
    };
    servers[0].copies = vec![copy(5, volume, 0, 9), copy(6, volume, 1, 3)];
    servers[1].copies = vec![copy(8, volume, 0, 1), partial(copy(7, volume, 1, 2))];
    let (world, report) = must(&options(), &servers, None);
    world.meta.check();
    let entries = world.chunks(volume);
    assert_eq!((entries[0].chunk, entries[1].chunk), (ChunkId(8), ChunkId(7)));
    let lost = |problem: &Problem| matches!(problem, Problem::Lost { chunk, .. } if *chunk == ChunkId(7));
    assert!(report.problems.iter().any(lost) && !report.is_whole());
    let older = |problem: &&Problem| matches!(problem, Problem::Superseded { .. });
    assert_eq!(report.problems.iter().filter(older).count(), 2);
}

#[test]
fn with_a_backup_names_come_back_and_what_it_does_not_know_gets_a_name() {
    let mut world = World::new();
    let servers: Vec<CsId> = (0..3).map(|host| world.server(host, 1 << 40)).collect();
    let session = world.session();
    let directory = world.make(session, InodeId::ROOT, "docs", InodeKind::Directory).unwrap().inode;
    let file = world.make(session, directory, "a", InodeKind::File).unwrap().inode;
    let volume = VolumeId::of_inode(file);
    let grant = world.acquire(session, volume, LeaseMode::Exclusive).unwrap();
    let request = MdsRequest::ChunkAllocate { volume, epoch: grant.epoch, indexes: vec![0, 1] };
    world.call(session, request).unwrap();
    let entries = world.chunks(volume);
    // Not named any more, yet open: it goes, like the session that had it open.
    let open = world.make(session, directory, "open", InodeKind::File).unwrap().inode;
    world.call(session, MdsRequest::OpenHandle { inode: open }).unwrap();
    world.call(session, MdsRequest::Unlink { parent: directory, name: b"open".to_vec() }).unwrap();
    let backup = state(&mut world);
    let mut found: Vec<Listing> = servers.iter().map(|cs| listing(*cs)).collect();
    let blocks = (grant.chunk_size / 4096) as u32;
    for server in &mut found {
        server.copies = vec![
            FoundCopy { block_count: blocks, ..copy(entries[0].chunk.0, volume, 0, 1) },
            copy(500, VolumeId(90), 0, 1),
        ];
        server.epochs = vec![(volume, Epoch(40))];
    }
    let (mut world, report) = must(&options(), &found, Some(backup.clone()));
    world.meta.check();
    let resolve = |world: &World, path: &str| world.meta.query(&MdsRequest::Resolve { path: path.into() });
    let Ok(MdsReply::Attr(attr)) = resolve(&world, "/docs/a") else { panic!() };
    assert_eq!((attr.inode, attr.size, attr.uid), (file, 7 * 4096, 1), "its attributes, and the data written since");
    assert!(resolve(&world, "/recovered/volume-90").is_ok());
    assert!(world.attr(open).is_none(), "nobody has it open any more");
    assert!(report.is_whole(), "{report}");
    let grown = Problem::Grown { volume, before: 0, now: 7 * 4096 };
    assert!(report.problems.contains(&grown), "{report}");
    let session = world.session();
    let epoch = world.acquire(session, volume, LeaseMode::Exclusive).unwrap().epoch;
    assert!(epoch > Epoch(40));
    let inode = world.make(session, InodeId::ROOT, "new", InodeKind::File).unwrap().inode;
    assert!(inode.0 > 90, "no id is given twice");
    // A server that was not given: its chunk waits for it.
    let mut without = found.clone();
    without.iter_mut().for_each(|server| server.copies.clear());
    without.pop();
    let (world, report) = must(&options(), &without, Some(backup));
    world.meta.check();
    let waits = |problem: &&Problem| matches!(problem, Problem::Waits { servers, .. } if *servers == vec![CsId(1027)]);
    assert_eq!(report.problems.iter().filter(waits).count(), 2, "{report}");
}

#[test]
fn listings_that_cannot_be_of_one_cluster_are_refused() {
    let (one, two) = (listing(CsId(1025)), listing(CsId(1026)));
    let refused = |listings: &[Listing], backup| recover(&options(), listings, backup).unwrap_err();
    assert_eq!(refused(&[], None), RecoverError::NoServers);
    let other = Listing { cluster: ClusterId([8; 16]), ..two.clone() };
    assert!(matches!(refused(&[one.clone(), other], None), RecoverError::TwoClusters { .. }));
    let twin = Listing { store: one.store, ..two.clone() };
    assert!(matches!(refused(&[one.clone(), twin], None), RecoverError::Twice { .. }));
    let claim = Listing { cs: Some(CsId(1025)), ..two };
    assert!(matches!(refused(&[one.clone(), claim], None), RecoverError::TwoStores { .. }));
    let mut world = World::new();
    let backup = state(&mut world);
    let other = Listing { cluster: ClusterId([8; 16]), ..one };
    assert!(matches!(refused(&[other], Some(backup)), RecoverError::OtherBackup { .. }));
}
