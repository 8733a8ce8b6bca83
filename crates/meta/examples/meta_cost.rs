//! What the state machine costs: microseconds of processor time per command and bytes per inode, on a store in memory.
//!
//! `cargo run --release -p cairn-meta --example meta_cost`

use cairn_meta::{Command, MemKv, Meta};
use cairn_types::{ClientId, ClusterId, Epoch, HostId, InodeId, MdsId, VolumeId};
use cairn_wire::mds::*;
use std::time::Duration;

/// Processor time of this thread, so that other work on the machine does not count.
struct Instant(Duration);

impl Instant {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with schedstat");
        let first = text.split_whitespace().next().and_then(|word| word.parse().ok());
        Instant(Duration::from_nanos(first.expect("nanoseconds on a processor")))
    }

    fn elapsed(&self) -> Duration {
        Instant::now().0 - self.0
    }
}

const FILES: u64 = 500_000;
const DIRECTORIES: u64 = 500;
const CHUNKS: u64 = 200_000;

struct Bench {
    meta: Meta<MemKv>,
    index: u64,
    session: ClientId,
    sequence: u64,
}

impl Bench {
    fn apply(&mut self, command: &[u8]) -> Result<MdsReply, MdsError> {
        self.index += 1;
        self.meta.apply(self.index, command).reply
    }

    fn encode(&mut self, request: MdsRequest) -> Vec<u8> {
        self.sequence += 1;
        let (session, sequence) = (self.session, self.sequence);
        let call = Call { session, sequence, acknowledged: sequence - 1, wall_ns: 1_700_000_000_000_000_000, request };
        Command::Call { call, wall_ns: 1_700_000_000_000_000_000 }.encode()
    }

    /// Encodes first, then applies and measures.
    fn measure(&mut self, what: &str, requests: Vec<MdsRequest>) {
        let commands: Vec<Vec<u8>> = requests.into_iter().map(|request| self.encode(request)).collect();
        let start = Instant::now();
        for command in &commands {
            self.apply(command).unwrap();
        }
        report(what, start, commands.len());
    }
}

fn report(what: &str, start: Instant, count: usize) {
    println!("{what:<28} {:>7.2} us", start.elapsed().as_secs_f64() * 1e6 / count as f64);
}

fn create(parent: u64, name: String, kind: InodeKind, lease: bool) -> MdsRequest {
    MdsRequest::Create { parent: InodeId(parent), name: name.into(), kind, mode: 0o644, uid: 0, gid: 0, rdev: 0, lease }
}

fn main() {
    let mut bench = Bench { meta: Meta::open(MemKv::new()), index: 0, session: ClientId(0), sequence: 0 };
    let first = MdsInfo { mds: MdsId(1), addr: ([127, 0, 0, 1], 1).into(), voter: true, repository: "/m".into() };
    let bootstrap = Command::Bootstrap { cluster: ClusterId([1; 16]), name: "bench".into(), first, wall_ns: 1 };
    bench.apply(&bootstrap.encode()).unwrap();
    let open = MdsRequest::SessionOpen {
        kind: SessionKind::Client,
        host: HostId([1; 16]),
        host_name: "h".into(),
        purpose: "p".into(),
        nonce: 1,
    };
    let open = bench.encode(open);
    let MdsReply::Session { client, .. } = bench.apply(&open).unwrap() else { unreachable!() };
    (bench.session, bench.sequence) = (client, 0);
    for host in 0..12u8 {
        let request = MdsRequest::CsRegister(CsProfile {
            cs: None,
            store: [host; 16],
            addr: ([127, 0, 0, 1], 100 + u16::from(host)).into(),
            location: Location {
                host: HostId([host; 16]),
                host_name: format!("h{host}"),
                rack: String::new(),
                row: String::new(),
                room: String::new(),
                site: String::new(),
            },
            tier: 0,
            capacity: 1 << 50,
            repository: String::new(),
        });
        let request = bench.encode(request);
        bench.apply(&request).unwrap();
        bench.sequence -= 1;
    }

    let directories = (0..DIRECTORIES).map(|n| create(1, format!("d{n}"), InodeKind::Directory, false)).collect();
    bench.measure("mkdir", directories);
    let before = bench.meta.kv().size_bytes();
    let name = |n: u64| (2 + n % DIRECTORIES, format!("file-{n:08}"));
    let files = |from: u64, lease: bool| -> Vec<MdsRequest> {
        (from..from + FILES)
            .map(|n| {
                let (parent, name) = name(n);
                create(parent, name, InodeKind::File, lease)
            })
            .collect()
    };
    bench.measure("create", files(0, false));
    let bytes = bench.meta.kv().size_bytes() - before;
    println!("{:<28} {:>7} B (keys and values, entry included)", "  per inode", bytes as u64 / FILES);
    bench.measure("create with lease", files(FILES, true));

    for (what, among) in [("lookup, random of 1,000,000", 2 * FILES), ("lookup, random of 10,000", 10_000)] {
        let lookups: Vec<MdsRequest> = (0..FILES)
            .map(|n| {
                let (parent, name) = name(n * 7919 % among);
                MdsRequest::Lookup { parent: InodeId(parent), name: name.into() }
            })
            .collect();
        let start = Instant::now();
        for lookup in &lookups {
            bench.meta.query(lookup).unwrap();
        }
        report(what, start, lookups.len());
    }
    let start = Instant::now();
    for n in 0..FILES {
        bench.meta.query(&MdsRequest::GetAttr { inode: InodeId(2 + DIRECTORIES + n * 7919 % FILES) }).unwrap();
    }
    report("getattr (random)", start, FILES as usize);
    let set = SetAttr { grow_to: Some(1 << 20), mtime_ns: Some(5), ..SetAttr::default() };
    let inode = |n| InodeId(2 + DIRECTORIES + n);
    bench.measure("setattr", (0..FILES).map(|n| MdsRequest::SetAttr { inode: inode(n), set: set.clone() }).collect());
    let start = Instant::now();
    let mut listed = 0;
    for directory in 0..DIRECTORIES {
        let mut cookie = 0;
        loop {
            let request = MdsRequest::ReadDir { inode: InodeId(2 + directory), cookie, limit: 512, attributes: true };
            let Ok(MdsReply::Entries { entries, end }) = bench.meta.query(&request) else { unreachable!() };
            listed += entries.len();
            cookie = entries.last().map_or(0, |entry| entry.cookie);
            if end {
                break;
            }
        }
    }
    report("readdir entry, with attr", start, listed);

    let options = VolumeOptions::default();
    let volume = bench.encode(MdsRequest::VolumeCreate { name: "v".into(), size: 1 << 50, options });
    let MdsReply::Volume(info) = bench.apply(&volume).unwrap() else { unreachable!() };
    let acquire = bench.encode(MdsRequest::LeaseAcquire { volume: info.volume, mode: LeaseMode::Exclusive });
    let MdsReply::Lease(grant) = bench.apply(&acquire).unwrap() else { unreachable!() };
    allocate(&mut bench, info.volume, grant.epoch);
    let unlinks = (0..FILES).map(|n| {
        let (parent, name) = name(n);
        MdsRequest::Unlink { parent: InodeId(parent), name: name.into() }
    });
    let unlinks = unlinks.collect();
    bench.measure("unlink", unlinks);
}

fn allocate(bench: &mut Bench, volume: VolumeId, epoch: Epoch) {
    let before = bench.meta.kv().size_bytes();
    let one = |index: u64| MdsRequest::ChunkAllocate { volume, epoch, indexes: vec![index] };
    bench.measure("allocate, 3 replicas of 12", (0..CHUNKS).map(one).collect());
    let bytes = bench.meta.kv().size_bytes() - before;
    println!("{:<28} {:>7} B", "  per chunk", bytes as u64 / CHUNKS);
    let cs = bench.meta.servers().next().expect("servers joined").0;
    let failed = bench.encode(MdsRequest::ReplicaFailed { volume, epoch, cs, chunks: Vec::new() });
    let start = Instant::now();
    bench.apply(&failed).unwrap();
    report("replica failed, per chunk", start, CHUNKS as usize / 4);
    let start = Instant::now();
    let ticks = 50;
    for tick in 1..=ticks {
        let command = Command::Tick { wall_ns: 1_700_000_000_000_000_000 + tick * 1_000_000_000 };
        bench.apply(&command.encode()).unwrap();
    }
    report("tick under repair", start, ticks as usize);
}
