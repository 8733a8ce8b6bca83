//! CPU time of the client core per operation: three replicas that answer at once, only the core's own steps are timed.
//!
//! `cargo run --release -p cairn-client --example core_bench`

#![expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]

use cairn_client::{ClientCore, CoreConfig, OnNoSpace, SizeRule, VolumeHandle};
use cairn_env::Buf;
use cairn_env::block::BlockOp;
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_types::*;
use cairn_wire::cs::{CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus};
use cairn_wire::mds::*;
use cairn_wire::{Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration as Span, Instant as Clock};

const BLOCKS: u32 = 16_384;
const DEPTH: usize = 32;
const ROUNDS: usize = 20_000;

struct Bench {
    core: ClientCore,
    now: u64,
    spent: Span,
    links: BTreeMap<LinkId, u32>,
    events: VecDeque<NetEvent>,
    block: Buf,
    sum: u64,
}

impl Bench {
    fn step(&mut self, f: impl FnOnce(&mut ClientCore, Now, &mut Effects)) {
        self.now += 1000;
        let now = Now { mono: Instant(self.now), wall_ns: self.now };
        let mut out = Effects::default();
        let begin = Clock::now();
        f(&mut self.core, now, &mut out);
        let completions = self.core.take_completions();
        self.spent += begin.elapsed();
        completions.into_iter().for_each(cairn_client::Completion::run);
        for effect in out.net {
            match effect {
                NetEffect::Connect { link, addr } => {
                    self.links.insert(link, u32::from(addr.port()));
                    self.events.push_back(NetEvent::Up {
                        link,
                        peer: NodeId::Client(ClientId(0)),
                        level: Level::CURRENT,
                    });
                }
                NetEffect::Send { link, kind, id, prefix, payload } => self.answer(link, kind, id, &prefix, &payload),
                NetEffect::Close { .. } => {}
            }
        }
    }

    fn answer(&mut self, link: LinkId, kind: FrameKind, id: u64, prefix: &[u8], payload: &[Buf]) {
        let mut data = Buf::default();
        let (kind, prefix) = match kind {
            FrameKind::MdsCall => (FrameKind::MdsReply, cairn_wire::encode(&mds(prefix))),
            FrameKind::CsCall => {
                let reply = match cairn_wire::decode("call", prefix).unwrap() {
                    CsRequest::Hello { .. } => CsReply::Hello { boot: 1 },
                    CsRequest::Fence { .. } => CsReply::Fenced { boot: 1, tail: 0, previous: Epoch(0) },
                    _ => CsReply::Done,
                };
                (FrameKind::CsReply, cairn_wire::encode(&Ok::<_, cairn_wire::cs::CsError>(reply)))
            }
            _ => {
                let len = payload.iter().map(|piece| piece.len()).sum();
                let request = DataRequest::decode(prefix, len).unwrap();
                let mut reply = DataReply::of(DataStatus::Ok);
                reply.durable = Sequence(u64::MAX >> 1);
                reply.epoch = request.epoch;
                if request.op == DataOp::Read {
                    (reply.block_count, reply.checksums, data) = (1, vec![self.sum], self.block.clone());
                }
                let mut bytes = Vec::new();
                reply.encode(&mut bytes);
                (FrameKind::DataReply, bytes)
            }
        };
        self.events.push_back(NetEvent::Frame { link, frame: Frame { kind, id, prefix, payload: data } });
    }

    fn drain(&mut self) {
        while let Some(event) = self.events.pop_front() {
            self.step(|core, now, out| core.step(now, Event::Net(event), out));
        }
    }

    fn measure(&mut self, name: &str, handle: VolumeHandle, op: impl Fn(u64) -> BlockOp) {
        let mut rng = Rng::new(1);
        self.spent = Span::ZERO;
        for _ in 0..ROUNDS {
            for _ in 0..DEPTH {
                let op = op(rng.below(u64::from(BLOCKS)) * 4096);
                self.step(|core, now, out| core.submit(now, handle, op, Box::new(|result| drop(result.unwrap())), out));
            }
            self.drain();
        }
        let per_op = self.spent.as_nanos() as f64 / (ROUNDS * DEPTH) as f64;
        println!("{name}: {per_op:.0} ns per operation in the core");
    }
}

fn mds(prefix: &[u8]) -> Result<MdsReply, MdsError> {
    let call: Call = cairn_wire::decode("call", prefix).unwrap();
    Ok(match call.request {
        MdsRequest::SessionOpen { .. } => {
            MdsReply::Session { client: ClientId(2049), term_ms: u32::MAX, cluster: ClusterId([1; 16]) }
        }
        MdsRequest::Topology => {
            let info = |n: u32| CsInfo {
                cs: CsId(1025 + n),
                addr: format!("127.0.0.1:{}", 9000 + n).parse().unwrap(),
                location: Location { host: HostId([n as u8; 16]), ..Location::default() },
                tier: 0,
                state: CsState::Active,
                stats: CsStats::default(),
                repository: String::new(),
            };
            MdsReply::Topology { revision: 1, mds: Vec::new(), cs: (0..3).map(info).collect() }
        }
        MdsRequest::ChunkMap { .. } => {
            let replica = |n: u32| Replica { cs: CsId(1025 + n), role: ReplicaRole::Current, since: ChunkVersion(1) };
            MdsReply::Chunks(vec![ChunkEntry {
                index: 0,
                chunk: ChunkId(7),
                layer: LayerId(1),
                version: ChunkVersion(1),
                minimum: 2,
                replicas: (0..3).map(replica).collect(),
            }])
        }
        _ => MdsReply::Done,
    })
}

fn main() {
    let config = CoreConfig {
        mds: vec!["127.0.0.1:2510".parse().unwrap()],
        host: HostId([9; 16]),
        host_name: "bench".into(),
        purpose: "bench".into(),
        kind: SessionKind::Client,
        on_no_space: OnNoSpace::Wait,
        call_deadline: Duration::from_secs(60),
        open_deadline: Duration::from_secs(30),
    };
    let block = Buf::copy_from(&[7; 4096]);
    let sum = crc64(&block);
    let core = ClientCore::new(config, Rng::new(1));
    let (links, events) = (BTreeMap::new(), VecDeque::new());
    let mut bench = Bench { core, now: 1, spent: Span::ZERO, links, events, block: block.clone(), sum };
    bench.step(|core, now, out| core.step(now, Event::Start, out));
    bench.drain();
    let grant = LeaseGrant {
        volume: VolumeId(1),
        epoch: Epoch(1),
        mode: LeaseMode::Exclusive,
        size: u64::from(BLOCKS) * 4096,
        chunk_size: u64::from(BLOCKS) * 4096,
        redundancy: Redundancy::default(),
        clean: true,
        servers: (0..3).map(|n| CsId(1025 + n)).collect(),
    };
    let mut handle = None;
    bench.step(|core, now, out| handle = Some(core.adopt(now, grant, SizeRule::Fixed, out)));
    bench.drain();
    let handle = handle.unwrap();
    for _ in 0..2 {
        let data = block.clone();
        bench.measure("write 4 KiB, 3 replicas", handle, |offset| BlockOp::Write {
            offset,
            data: data.clone(),
            fua: false,
        });
        bench.measure("read 4 KiB", handle, |offset| BlockOp::Read { offset, len: 4096 });
    }
}
