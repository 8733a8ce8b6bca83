//! Determinism, reload, malformed input, and the small services.

use crate::support::{SECOND, World, addr};
use cairn_meta::{BaseKv, Command, Kv, MemKv, Meta, MetaEffect, Overlay};
use cairn_stdx::Rng;
use cairn_types::{ChunkId, ChunkVersion, ClientId, CsId, Epoch, HostId, InodeId, MdsId, VolumeId};
use cairn_wire::mds::*;
use proptest::prelude::*;

/// A request with small random numbers, so that many of them meet.
fn any_request(rng: &mut Rng) -> MdsRequest {
    let inode = InodeId(rng.below(12));
    let parent = InodeId(1 + rng.below(6));
    let volume = VolumeId(rng.below(12));
    let epoch = Epoch(rng.below(4));
    let cs = CsId(1024 + rng.below(6) as u32);
    let name = vec![b'a' + rng.below(5) as u8];
    let chunk = ChunkId(rng.below(20));
    match rng.below(31) {
        0 => MdsRequest::SetAttr { inode, set: SetAttr { size: Some(rng.below(1 << 30)), ..SetAttr::default() } },
        1..=3 => MdsRequest::Create {
            parent,
            name,
            kind: if rng.chance(1, 2) { InodeKind::File } else { InodeKind::Directory },
            mode: 0o2755,
            uid: 0,
            gid: 0,
            rdev: 0,
            lease: rng.chance(1, 3),
        },
        4 => MdsRequest::Symlink { parent, name, target: b"x".to_vec(), uid: 0, gid: 0 },
        5 => MdsRequest::Link { inode, parent, name },
        6 => MdsRequest::Unlink { parent, name },
        7 => MdsRequest::Rmdir { parent, name },
        8 => MdsRequest::Rename {
            parent,
            name,
            new_parent: inode,
            new_name: vec![b'a' + rng.below(5) as u8],
            mode: RenameMode::Replace,
        },
        9 => MdsRequest::SetXattr { inode, name, value: vec![1; rng.below(40) as usize], exists: None },
        10 => MdsRequest::RemoveXattr { inode, name },
        11 => MdsRequest::OpenHandle { inode },
        12 => MdsRequest::CloseHandle { inode },
        13 => MdsRequest::AttributesSet { inode, pairs: vec![("replicas".into(), (1 + rng.below(4)).to_string())] },
        14 => MdsRequest::VolumeCreate {
            name: format!("v{}", rng.below(4)),
            size: 1 << 30,
            options: VolumeOptions { chunk_size: Some(1 << 20), ..VolumeOptions::default() },
        },
        15 => MdsRequest::VolumeResize { volume, size: (1 + rng.below(100)) << 24, shrink: true },
        16 => MdsRequest::VolumeDelete { volume },
        17 => MdsRequest::VolumeRename { volume, name: format!("v{}", rng.below(4)) },
        18..=20 => MdsRequest::LeaseAcquire {
            volume,
            mode: if rng.chance(1, 2) { LeaseMode::Exclusive } else { LeaseMode::Shared },
        },
        21 => MdsRequest::LeaseRelease { leases: vec![(volume, epoch, rng.chance(1, 2))] },
        22..=24 => MdsRequest::ChunkAllocate { volume, epoch, indexes: (0..rng.below(9)).collect() },
        25 => MdsRequest::ReplicaFailed { volume, epoch, cs, chunks: Vec::new() },
        26 => MdsRequest::ChunkDrop { volume, epoch, index: rng.below(9), count: 3 },
        27 => MdsRequest::CsRemove { cs, force: rng.chance(1, 2), cancel: rng.chance(1, 3) },
        29 => MdsRequest::ReplicaFull { volume, epoch, cs, chunk },
        28 => MdsRequest::KvPut { key: vec![1 + rng.below(3) as u8], value: vec![2; 9], expected: None },
        _ => MdsRequest::CsHeartbeat {
            cs,
            boot: 1,
            stats: CsStats { capacity: 1 << 40, used: rng.below(1 << 40), ..CsStats::default() },
            done: vec![OrderDone {
                chunk,
                version: ChunkVersion(rng.below(5)),
                kind: *rng.choose(&[OrderKind::Raise, OrderKind::Rebuild, OrderKind::Delete]).unwrap(),
                error: rng.chance(1, 3).then(|| "no".into()),
            }],
            damaged: vec![(chunk, 1)],
            failed: rng.chance(1, 20).then(|| "broken".into()),
        },
    }
}

fn random_world<K: Kv>(seed: u64, kv: K, mut between: impl FnMut(&mut Rng, &mut World<K>)) -> World<K> {
    let mut rng = Rng::new(seed);
    let mut world = World::over(kv);
    for host in 0..4 {
        world.server(host, 1 << 40);
    }
    let mut sessions: Vec<ClientId> = (0..3).map(|_| world.session()).collect();
    let mut chaos = rng.split(1);
    for _ in 0..600 {
        let at = rng.below(3) as usize;
        match rng.below(20) {
            0 => world.tick(rng.below(20) * SECOND),
            1 => {
                let state = *rng.choose(&[CsState::Inactive, CsState::Offline, CsState::Active]).unwrap();
                let (cs, wall_ns) = (CsId(1025 + rng.below(4) as u32), world.wall_ns);
                let _ = world.command(Command::CsSilent { cs, state, wall_ns });
            }
            2 if rng.chance(1, 4) => {
                let client = sessions[at];
                world.command(Command::SessionExpired { client }).unwrap();
                if rng.chance(1, 2) {
                    world.command(Command::LeasesFree { client }).unwrap();
                }
                sessions[at] = world.session();
            }
            _ => {
                let request = any_request(&mut rng);
                let session =
                    if matches!(request, MdsRequest::CsHeartbeat { .. }) { ClientId(0) } else { sessions[at] };
                let _ = world.call(session, request);
            }
        }
        between(&mut chaos, &mut world);
    }
    world
}

#[test]
fn mad_calls_keep_every_sum_and_index() {
    for seed in 0..40 {
        let mut world = random_world(seed, MemKv::new(), |rng, world| {
            if rng.chance(1, 25) {
                world.meta.check();
            }
        });
        world.meta.check();
        world.settle();
        world.meta.check();
    }
}

/// The same log gives the same state: applied at once, after a reload in the middle, and over an overlay that is
/// frozen, flushed and torn down at random.
#[test]
fn one_log_one_state() {
    for seed in 0..12 {
        let first = random_world(seed, MemKv::new(), |_, _| {});
        let mut second = Meta::open(MemKv::new());
        let mut third = Meta::open(Overlay::new(MemKv::new()));
        let mut rng = Rng::new(seed ^ 0xabc);
        let (mut flushing, mut at) = (None, 0);
        while at < first.log.len() {
            let index = at as u64 + 1;
            second.apply(index, &first.log[at]);
            if rng.chance(1, 40) {
                second = Meta::open(second.into_kv());
            }
            third.apply(index, &first.log[at]);
            assert_eq!(second.state_hash(), third.state_hash(), "seed {seed} index {index}");
            at += 1;
            if flushing.is_none() && rng.chance(1, 60) {
                flushing = Some(third.freeze().1);
            } else if rng.chance(1, 30) {
                if let Some(frozen) = flushing.take() {
                    let base = third.kv_mut().base_mut();
                    for (key, value) in frozen.iter() {
                        match value {
                            Some(value) => base.put(key, value.clone()),
                            None => base.delete(key),
                        }
                    }
                    third.kv_mut().flushed();
                }
            } else if rng.chance(1, 100) {
                // A crash: what was not flushed is gone, and the log is replayed from the base's index.
                flushing = None;
                third = Meta::open(Overlay::new(third.kv().base().clone()));
                for (replayed, command) in first.log[..at].iter().enumerate().skip(third.applied_index() as usize) {
                    third.apply(replayed as u64 + 1, command);
                }
            }
        }
        assert_eq!(first.meta.state_hash(), second.state_hash());
        assert_eq!(first.meta.full_hash(), second.full_hash(), "seed {seed}");
        assert_eq!(first.meta.full_hash(), third.full_hash(), "seed {seed}");
        // An image carried over page by page is the state.
        second.checkpoint();
        let mut pairs = Vec::new();
        loop {
            let page = second.image_page(pairs.last().map(|(key, _): &(Vec<u8>, Vec<u8>)| key.as_slice()), 50);
            if page.is_empty() {
                break;
            }
            pairs.extend(page);
        }
        let copy = Meta::open(pairs.into_iter().collect::<MemKv>());
        assert_eq!(copy.full_hash(), second.full_hash());
        assert_eq!(copy.applied_index(), second.applied_index());
        copy.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_bytes_panic_the_state_machine(bytes in prop::collection::vec(any::<u8>(), 0..60), variant in 0u8..12) {
        let mut world = World::new();
        world.session();
        world.server(1, 1 << 40);
        let mut framed = vec![1, variant];
        framed.extend_from_slice(&bytes);
        let _ = world.raw(framed);
        let _ = world.raw(bytes);
        world.meta.check();
    }

    #[test]
    fn broken_commands_do_not_panic(seed in any::<u64>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        world.server(1, 1 << 40);
        let session = world.session();
        for _ in 0..10 {
            let call = world.envelope(session, any_request(&mut rng));
            let mut bytes = Command::Call { call, wall_ns: 1 }.encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = world.raw(bytes);
        }
        world.meta.check();
    }
}

#[test]
fn the_key_value_store_compares_and_lists() {
    let mut world = World::new();
    let session = world.session();
    let put = |world: &mut World, key: &str, value: &str, expected| {
        let request = MdsRequest::KvPut { key: key.into(), value: value.into(), expected };
        world.call(session, request)
    };
    let Ok(MdsReply::Kv { value: Some((_, revision)) }) = put(&mut world, "svc/a", "1", Some(0)) else { panic!() };
    assert!(matches!(put(&mut world, "svc/a", "2", Some(0)), Err(MdsError::Refused(_))));
    assert!(put(&mut world, "svc/a", "2", Some(revision)).is_ok());
    for n in 0..20 {
        put(&mut world, &format!("svc/b{n:02}"), "x", None).unwrap();
    }
    put(&mut world, "svd", "x", None).unwrap();
    let (mut found, mut after) = (Vec::new(), Vec::new());
    loop {
        let request = MdsRequest::KvList { prefix: b"svc/".to_vec(), after: after.clone(), limit: 6 };
        let Ok(MdsReply::KvList { entries, end }) = world.meta.query(&request) else { panic!() };
        found.extend(entries.iter().map(|(key, ..)| String::from_utf8(key.clone()).unwrap()));
        if end {
            break;
        }
        after = entries.last().unwrap().0.clone();
    }
    assert_eq!(found.len(), 21);
    assert_eq!((found[0].as_str(), found[20].as_str()), ("svc/a", "svc/b19"));
    world.call(session, MdsRequest::KvDelete { key: b"svc/a".to_vec(), expected: None }).unwrap();
    let get = world.meta.query(&MdsRequest::KvGet { key: b"svc/a".to_vec() });
    assert_eq!(get, Ok(MdsReply::Kv { value: None }));
}

#[test]
fn parameters_are_checked_and_misspelt_ones_explained() {
    let mut world = World::new();
    let session = world.session();
    let set = |world: &mut World, key: &str, value: &str| {
        world.call(session, MdsRequest::ConfigSet { pairs: vec![(key.into(), value.into())] })
    };
    set(&mut world, "mds.wd.offline_tout", "60").unwrap();
    assert_eq!(world.meta.config("mds.wd.offline_tout"), 60);
    for (key, value) in [("mds.wd.offline_tout", "1"), ("mds.wd.offline_tout", "x"), ("mds.alloc.strict_tier", "2")] {
        assert!(matches!(set(&mut world, key, value), Err(MdsError::Invalid(_))), "{key}={value}");
    }
    let Err(MdsError::Invalid(text)) = set(&mut world, "mds.wd.offline_timeout", "60") else { panic!() };
    assert!(text.contains("mds.wd.offline_tout"), "{text}");
    let Ok(MdsReply::Pairs(pairs)) = world.meta.query(&MdsRequest::ConfigList) else { panic!() };
    assert!(
        pairs.contains(&("mds.wd.offline_tout".into(), "60".into()))
            && pairs.len() == cairn_meta::config::PARAMETERS.len()
    );
}

#[test]
fn events_are_numbered_without_gaps_and_the_oldest_go() {
    let mut world = World::new();
    let session = world.session();
    for n in 0..250u64 {
        let key = "mds.events.kept".into();
        world.call(session, MdsRequest::ConfigSet { pairs: vec![(key, (100 + n % 2).to_string())] }).unwrap();
    }
    let Ok(MdsReply::Events(events)) = world.meta.query(&MdsRequest::Events { after: 0, limit: 4096 }) else {
        panic!()
    };
    assert!((100..=101).contains(&events.len()));
    assert!(events.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
    assert_eq!(events.last().unwrap().number, 251);
}

#[test]
fn metadata_servers_get_one_id_per_nonce_and_never_an_old_one() {
    let mut world = World::new();
    let session = world.session();
    let add = |world: &mut World, port, nonce| match world
        .call(ClientId(0), MdsRequest::MdsAdd { addr: addr(port), repository: "/m".into(), nonce })
    {
        Ok(MdsReply::MdsAdmitted { mds, servers, .. }) => Ok((mds, servers.len())),
        Err(error) => Err(error),
        other => panic!("{other:?}"),
    };
    assert_eq!(add(&mut world, 2, 5), Ok((MdsId(2), 2)));
    assert_eq!(add(&mut world, 2, 5), Ok((MdsId(2), 2)));
    assert!(matches!(add(&mut world, 2, 6), Err(MdsError::Refused(_))));
    assert!(matches!(world.call(session, MdsRequest::MdsRemove { mds: MdsId(1) }), Err(MdsError::Refused(_))));
    let wall_ns = world.wall_ns;
    world.command(Command::MdsVoter { mds: MdsId(2), voter: true, wall_ns }).unwrap();
    world.call(session, MdsRequest::MdsRemove { mds: MdsId(2) }).unwrap();
    assert!(world.effects.contains(&MetaEffect::MdsRemoving(MdsId(2))));
    world.command(Command::MdsLeft { mds: MdsId(2), wall_ns }).unwrap();
    assert_eq!(add(&mut world, 2, 6), Ok((MdsId(3), 2)));
}

#[test]
fn cloned_hosts_and_foreign_stores_are_named() {
    let mut world = World::new();
    let cs = world.server(1, 1 << 40);
    let register = |host_name: &str, cs, store| {
        MdsRequest::CsRegister(CsProfile {
            cs,
            store: [store; 16],
            addr: addr(7),
            location: Location {
                host: HostId([1; 16]),
                host_name: host_name.into(),
                rack: String::new(),
                row: String::new(),
                room: String::new(),
                site: String::new(),
            },
            tier: 0,
            capacity: 1 << 40,
            repository: String::new(),
        })
    };
    let again = world.call(ClientId(0), register("host1", None, 40)).unwrap();
    assert!(matches!(again, MdsReply::CsRegistered { cs: found, .. } if found == cs), "the store tells who it is");
    assert!(matches!(world.call(ClientId(0), register("host1", Some(cs), 99)), Err(MdsError::Refused(_))));
    assert!(matches!(world.call(ClientId(0), register("host1", Some(CsId(5)), 99)), Err(MdsError::Refused(_))));
    world.effects.clear();
    world.call(ClientId(0), register("host2", None, 99)).unwrap();
    let twin = |effect: &MetaEffect| matches!(effect, MetaEffect::Event(event) if event.code == "MDS-4002");
    assert!(world.effects.iter().any(twin));
}

#[test]
fn space_is_counted_by_failure_domain_and_a_full_cluster_refuses_in_words() {
    let mut world = World::new();
    let session = world.session();
    for (host, capacity) in [(1, 200u64), (2, 500), (3, 1000)] {
        world.server(host, capacity << 30);
    }
    let Ok(MdsReply::StatFs { capacity, .. }) = world.meta.query(&MdsRequest::StatFs) else { panic!() };
    assert_eq!(capacity >> 30, 190, "200 GiB less the margin");
    let options =
        VolumeOptions { redundancy: Some(cairn_types::Redundancy::new(5, 4).unwrap()), ..VolumeOptions::default() };
    let volume = world.volume(session, "v", options).volume;
    let epoch = world.acquire(session, volume, LeaseMode::Exclusive).unwrap().epoch;
    let answer = world.call(session, MdsRequest::ChunkAllocate { volume, epoch, indexes: vec![0] });
    let Err(MdsError::NoSpace(text)) = answer else { panic!("{answer:?}") };
    assert!(text.starts_with("4 replicas are needed on different hosts and 3 can be placed"), "{text}");
    assert_eq!(world.chunks(volume), []);
    world.meta.check();
}

#[test]
fn large_things_are_freed_in_steps() {
    let mut world = World::new();
    let session = world.session();
    for host in 0..3 {
        world.server(host, 1 << 50);
    }
    let options = VolumeOptions { chunk_size: Some(1 << 20), ..VolumeOptions::default() };
    let volume = world.volume(session, "v", options).volume;
    let epoch = world.acquire(session, volume, LeaseMode::Exclusive).unwrap().epoch;
    for first in (0..5_000u64).step_by(50) {
        let indexes = (first..first + 50).collect();
        world.call(session, MdsRequest::ChunkAllocate { volume, epoch, indexes }).unwrap();
    }
    world.call(session, MdsRequest::LeaseRelease { leases: vec![(volume, epoch, true)] }).unwrap();
    world.call(session, MdsRequest::VolumeDelete { volume }).unwrap();
    assert_eq!(
        world.meta.query(&MdsRequest::VolumeGet { name: "v".into() }),
        Err(MdsError::NotFound("volume `v`".into()))
    );
    assert!(matches!(
        world.call(session, MdsRequest::LeaseAcquire { volume, mode: LeaseMode::Shared }),
        Err(MdsError::NotFound(_))
    ));
    assert_eq!(world.meta.chunk_counts().total, 5_000);
    world.tick(SECOND);
    assert!((1..5_000).contains(&world.meta.chunk_counts().total));
    world.meta.check();
    world.settle();
    assert_eq!(world.meta.chunk_counts().total, 0);
    assert_eq!(world.meta.chunk_counts().deleting, 15_000);
    world.meta.check();
    assert!(world.meta.kv().scan(&[0], &[255], 1).len() == 1);
}
