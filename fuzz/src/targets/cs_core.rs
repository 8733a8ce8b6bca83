//! A chunk server among clients, metadata servers and other chunk servers that say anything.

use crate::driver::{ACCEPT, DOWN, Driver, WAIT, frame};
use crate::{Bound, Seeds, Shape, Target, samples, script, seed, unsealed};
use cairn_cs::{CsConfig, CsCore};
use cairn_env::{DiskRequest, IoId};
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_store::{Store, StoreConfig, StoreOptions};
use cairn_types::{ChunkId, ChunkVersion, CsId, HostId, Level, VolumeId};
use cairn_wire::FrameKind;
use cairn_wire::mds::{CsOrder, Location, MdsError, MdsReply};
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "cs_core",
    covers: "a chunk server's core: data requests, calls, orders, copies from other servers, in any order",
    entry: "cairn_cs::CsCore::step",
    shape: Shape::Script,
    bound: Bound { base: 16 << 20, factor: 64, why: "what a chunk server keeps: store, windows, copies under way" },
    run,
    seal: unsealed,
    seeds,
};

const SIZE: u64 = 16 << 20;
const STORE: [u8; 16] = [1; 16];

thread_local! {
    static BASE: RefCell<Option<SimDisk>> = const { RefCell::new(None) };
}

fn formatted() -> SimDisk {
    let mut disk = SimDisk::new(SIZE);
    let config = StoreConfig { cluster: samples::CLUSTER, store_uuid: STORE, capacity_bytes: 0 };
    for (io, op) in cairn_store::format(&config, SIZE).expect("the size suits").into_iter().enumerate() {
        disk.submit(DiskRequest { io: IoId(io as u64), op });
        disk.complete(IoId(io as u64)).expect("asked for").result.expect("no faults");
    }
    disk
}

fn run(bytes: &[u8]) {
    let disk = BASE.with(|base| base.borrow_mut().get_or_insert_with(formatted).clone());
    let config = CsConfig {
        cs: None,
        level: Level::CURRENT,
        cluster: samples::CLUSTER,
        store: STORE,
        addr: samples::addr(6001),
        location: Location { host: HostId([1; 16]), host_name: "host1".into(), ..Location::default() },
        tier: 0,
        capacity: 0,
        repository: "/c".into(),
        mds: vec![samples::addr(7001)],
        mds_known: Vec::new(),
        durable_always: false,
        scrub_chunks_per_minute: 600,
    };
    let options = StoreOptions { cluster: Some(samples::CLUSTER), store_uuid: Some(STORE), ..StoreOptions::default() };
    let store = Store::new(disk.size(), options);
    let mut driver = Driver::new(CsCore::new(config, store, Rng::new(1)), Some(disk));
    driver.play(bytes, |_, _| {});
    let _ = (driver.core.stats(), driver.core.failed().map(str::len));
}

/// The link of the metadata servers is number 0, the first client's number 1.
pub fn seeds() -> Seeds {
    let call = |index: usize| frame(FrameKind::CsCall, 1, &cairn_wire::encode(&samples::cs_calls()[index].1));
    let data = |index: usize| {
        let mut prefix = Vec::new();
        samples::data_requests()[index].1.encode(&mut prefix);
        frame(FrameKind::Data, 1, &prefix)
    };
    let reply = |reply: &Result<MdsReply, MdsError>| frame(FrameKind::MdsReply, 0, &cairn_wire::encode(reply));
    let registered = reply(&Ok(MdsReply::CsRegistered { cs: CsId(1025), cluster: samples::CLUSTER }));
    let orders = |orders: Vec<CsOrder>| reply(&Ok(MdsReply::Orders(orders)));
    let wait = |ms: u16| (WAIT, ms.to_le_bytes().to_vec());
    let client = (ACCEPT, vec![0, 9]);
    let begin = [wait(1), registered.clone(), client.clone(), call(0), call(1), call(3)];
    let with = |more: Vec<(u8, Vec<u8>)>| -> Vec<u8> {
        let all: Vec<(u8, Vec<u8>)> = begin.iter().cloned().chain(more).collect();
        script::script(all.iter().map(|(kind, piece)| (*kind, &piece[..])))
    };
    let entry = samples::chunk(1);
    let rebuild = CsOrder::Rebuild {
        entry: entry.clone(),
        volume: VolumeId(77),
        block_count: 256,
        sources: vec![(CsId(1026), samples::addr(6002))],
        created: false,
    };
    let raise = CsOrder::Raise { chunk: ChunkId(900), since: ChunkVersion(1), version: ChunkVersion(3) };
    let delete = CsOrder::Delete { chunk: ChunkId(900), version: ChunkVersion(9) };
    let peer = |index: usize| {
        let reply = cairn_wire::encode(&samples::cs_replies()[index].1);
        frame(FrameKind::CsReply, 1, &reply)
    };
    let mut blocks = Vec::new();
    samples::data_replies()[1].1.encode(&mut blocks);
    let copied = vec![
        wait(600),
        orders(vec![rebuild]),
        wait(10),
        peer(1),
        peer(4),
        frame(FrameKind::DataReply, 1, &blocks),
        wait(100),
        frame(FrameKind::DataReply, 1, &blocks),
        wait(1000),
    ];
    vec![
        seed("data", with(vec![data(1), data(0), data(2), data(3), data(4), wait(300), call(2), call(5), call(6)])),
        seed("calls", with(vec![data(1), call(7), call(4), call(5), (DOWN, vec![1]), client, call(0)])),
        seed("orders", with(vec![data(1), wait(600), orders(vec![raise, delete]), wait(2000), orders(vec![])])),
        seed("copy", with(copied)),
        seed("push", with(vec![frame(FrameKind::MdsPush, 0, &cairn_wire::encode(&samples::pushes()[4].1)), wait(50)])),
    ]
}
