//! A metadata server among clients, chunk servers and other metadata servers that say anything.

use crate::driver::{ACCEPT, Driver, WAIT, frame};
use crate::{Bound, Seeds, Shape, Target, samples, script, seed, unsealed};
use cairn_consensus::{Config, Consensus, Initial, Member};
use cairn_env::DiskOp;
use cairn_env_sim::SimDisk;
use cairn_mds::{MdsConfig, MdsCore, MemBase};
use cairn_stdx::Rng;
use cairn_types::{ClientId, HostId, Level, MdsId};
use cairn_wire::FrameKind;
use cairn_wire::mds::{Call, MdsInfo, MdsRequest, SessionKind};
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "mds_core",
    covers: "a metadata server's core: calls, Raft messages and pieces of state images, in any order, through its log",
    entry: "cairn_mds::MdsCore::step",
    shape: Shape::Script,
    bound: Bound { base: 16 << 20, factor: 64, why: "what a metadata server keeps: log, state, windows" },
    run,
    seal: unsealed,
    seeds,
};

const LOG: u64 = 1 << 20;

thread_local! {
    static BASE: RefCell<Option<SimDisk>> = const { RefCell::new(None) };
}

fn log_config() -> Config {
    let mut config = Config::new(MdsId(1), samples::CLUSTER);
    config.log_size_bytes = LOG;
    config
}

fn formatted() -> SimDisk {
    let mut disk = SimDisk::new(LOG);
    let initial = Initial::Bootstrap { voters: vec![Member { id: MdsId(1), instance: 101 }] };
    for op in Consensus::format(&log_config(), 101, &initial) {
        if let DiskOp::Write { mut offset, bufs } = op {
            for buf in bufs {
                disk.poke(offset, &buf);
                offset += buf.len() as u64;
            }
        }
    }
    disk
}

fn run(bytes: &[u8]) {
    let disk = BASE.with(|base| base.borrow_mut().get_or_insert_with(formatted).clone());
    let addr = samples::addr(7001);
    let config = MdsConfig {
        id: MdsId(1),
        level: Level::CURRENT,
        cluster: samples::CLUSTER,
        cluster_name: "stor1".into(),
        addr,
        repository: "/m".into(),
        servers: vec![MdsInfo { mds: MdsId(1), addr, voter: true, repository: String::new() }],
        bootstrap: true,
        log: log_config(),
        checkpoint_bytes: 4096,
    };
    let mut driver = Driver::new(MdsCore::new(config, MemBase::default(), Rng::new(1)), Some(disk));
    driver.play(bytes, |_, _| {});
    let _ = (driver.core.is_leader(), driver.core.applied());
}

/// Link 0 is the first client's.
fn seeds() -> Seeds {
    let wait = |ms: u16| (WAIT, ms.to_le_bytes().to_vec());
    let begin = [wait(1100), wait(1100), wait(1100), (ACCEPT, vec![0, 9])];
    let call = |session: u64, sequence: u64, request: MdsRequest| {
        let (session, acknowledged) = (ClientId(session), sequence.saturating_sub(1));
        let call = Call { session, sequence, acknowledged, wall_ns: 5, request };
        frame(FrameKind::MdsCall, 0, &cairn_wire::encode(&call))
    };
    let open = MdsRequest::SessionOpen {
        kind: SessionKind::Client,
        host: HostId([1; 16]),
        host_name: "host1".into(),
        purpose: "test".into(),
        nonce: 7,
    };
    let with = |more: Vec<(u8, Vec<u8>)>| -> Vec<u8> {
        let all: Vec<(u8, Vec<u8>)> = begin.iter().cloned().chain(more).collect();
        script::script(all.iter().map(|(kind, piece)| (*kind, &piece[..])))
    };
    let mut seeds = Vec::new();
    for (number, group) in samples::requests().chunks(20).enumerate() {
        let mut pieces = vec![call(0, 0, open.clone())];
        for (sequence, (_, request)) in group.iter().enumerate() {
            pieces.push(call(1, sequence as u64 + 1, request.clone()));
        }
        pieces.push(wait(500));
        seeds.push(seed(&format!("calls_{number}"), with(pieces)));
    }
    let images = samples::image_pieces();
    let image = |index: usize| frame(FrameKind::Image, 0, &cairn_wire::encode(&images[index].1));
    let peer = (ACCEPT, vec![2, 2]);
    seeds.push(seed("image", with(vec![image(0), image(1), wait(500), wait(500)])));
    seeds.push(seed("peer", with(vec![peer, frame(FrameKind::Raft, 1, &[0; 112]), frame(FrameKind::Image, 1, &[])])));
    seeds
}
