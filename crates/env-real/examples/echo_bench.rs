//! What the shell costs: a request with 4 KiB, a disk write, an answer of 16 bytes, over loopback.
//!
//! Compares a reactor with blocking threads that do the same work (one thread per connection, `pread`-style IO), at one
//! request in flight and at 32. Prints operations per second, CPU of the serving side per operation and latencies.
//! `cargo run --release -p cairn-env-real --example echo_bench -- [DIRECTORY] [SECONDS]`
#![allow(unsafe_code, reason = "thread CPU clocks")]
#![allow(clippy::disallowed_methods, reason = "a benchmark measures time and runs threads")]

use cairn_env::{DiskOp, DiskRequest, IoId};
use cairn_env_real::{Disk, DiskOptions, Identity, Reactor, ReactorConfig, ReactorOptions, Stopped, block_on_local};
use cairn_types::{ClientId, ClusterId, CsId, Level, NodeId};
use cairn_wire::auth::{ClusterKey, Initiator, Peer};
use cairn_wire::frame::{FRAME_HEADER_SIZE, FrameKind, FrameReader, write_frame, write_frame_head};
use cairn_wire::{DiskIndex, Effects, Event, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const BLOCKS: u64 = 65_536;
const REQUEST: usize = 4096;
const PREFIX: usize = 72;

/// Turns of all servers, to see how many requests one turn serves.
static TURNS: AtomicU64 = AtomicU64::new(0);

/// Writes each request to another place and answers when it is there.
struct Server {
    waiting: BTreeMap<u64, (LinkId, u64)>,
    ios: u64,
}

impl Process for Server {
    fn step(&mut self, _now: Now, event: Event, out: &mut Effects) {
        match event {
            Event::Net(NetEvent::Frame { link, frame }) => {
                self.ios += 1;
                self.waiting.insert(self.ios, (link, frame.id));
                // Another block than any in flight, as a store would choose.
                let offset = (self.ios.wrapping_mul(7919) % BLOCKS) * 4096;
                let op = DiskOp::Write { offset, bufs: vec![frame.payload] };
                out.disk.push((DiskIndex(0), DiskRequest { io: IoId(self.ios), op }));
            }
            Event::Disk(_, done) => {
                done.result.expect("the benchmark disk works");
                let (link, id) = self.waiting.remove(&done.io.0).expect("a request waits for it");
                out.net.push(NetEffect::Send {
                    link,
                    kind: FrameKind::DataReply,
                    id,
                    prefix: vec![0; 16],
                    payload: vec![],
                });
            }
            Event::Turn => {
                TURNS.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

fn cpu(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to fill.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn key() -> ClusterKey {
    ClusterKey::from_hex(&"5a".repeat(32)).expect("64 digits")
}

fn read_frame(stream: &mut TcpStream, reader: &mut FrameReader) -> cairn_wire::Frame {
    loop {
        if let Some(frame) = reader.next_frame().expect("frames") {
            return frame;
        }
        let mut bytes = [0; 65_536];
        let count = stream.read(&mut bytes).expect("read");
        assert!(count > 0, "the server closed the link");
        reader.push(&bytes[..count]);
    }
}

fn connect(addr: SocketAddr, handshake: bool) -> TcpStream {
    let mut stream = TcpStream::connect(addr).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    if handshake {
        let mut reader = FrameReader::new();
        let us = Peer { node: NodeId::Client(ClientId(2049)), level: Level::CURRENT };
        let initiator = Initiator::new(key(), "bench", None, us, [1; 32]);
        let send = |stream: &mut TcpStream, prefix: &[u8]| {
            let mut bytes = Vec::new();
            write_frame(&mut bytes, FrameKind::Auth, 0, prefix);
            stream.write_all(&bytes).expect("write");
        };
        send(&mut stream, &initiator.hello());
        let challenge = read_frame(&mut stream, &mut reader);
        send(&mut stream, &initiator.challenged(&challenge.prefix).expect("challenge").0);
        initiator.judged(&read_frame(&mut stream, &mut reader).prefix).expect("verdict");
    }
    stream
}

/// Keeps `depth` requests in flight on one connection; gives the latencies and the CPU time spent here.
fn client(addr: SocketAddr, depth: usize, handshake: bool, seconds: f64) -> (Vec<u32>, Duration) {
    let mut stream = connect(addr, handshake);
    let reply = FRAME_HEADER_SIZE + 16;
    let mut request = Vec::new();
    write_frame_head(&mut request, FrameKind::Data, 1, &[0; PREFIX], REQUEST);
    request.extend_from_slice(&[7; REQUEST]);
    let batch = request.repeat(depth);
    let (cpu_before, start) = (cpu(libc::CLOCK_THREAD_CPUTIME_ID), Instant::now());
    let mut sent: std::collections::VecDeque<Instant> = (0..depth).map(|_| start).collect();
    let mut latencies = Vec::new();
    let (mut buffer, mut held) = ([0u8; 65_536], 0);
    stream.write_all(&batch).expect("write");
    while !sent.is_empty() {
        held += stream.read(&mut buffer).expect("read");
        let (arrived, now) = (held / reply, Instant::now());
        held %= reply;
        for _ in 0..arrived {
            let at = sent.pop_front().expect("as many answers as requests");
            latencies.push((now - at).as_nanos().try_into().unwrap_or(u32::MAX));
        }
        if start.elapsed().as_secs_f64() < seconds {
            stream.write_all(&batch[..arrived * request.len()]).expect("write");
            sent.extend((0..arrived).map(|_| now));
        }
    }
    (latencies, cpu(libc::CLOCK_THREAD_CPUTIME_ID) - cpu_before)
}

struct Outcome {
    rate: f64,
    cpu_us: f64,
    p50: f64,
    p99: f64,
    turns: f64,
}

/// Runs `clients` client threads of `depth` each and relates what the rest of this process used to their work.
fn measure(addr: SocketAddr, clients: usize, depth: usize, handshake: bool, seconds: f64) -> Outcome {
    let (cpu_before, start) = (cpu(libc::CLOCK_PROCESS_CPUTIME_ID), Instant::now());
    let threads: Vec<_> =
        (0..clients).map(|_| std::thread::spawn(move || client(addr, depth, handshake, seconds))).collect();
    let (mut latencies, mut client_cpu) = (Vec::new(), Duration::ZERO);
    for thread in threads {
        let (mut mine, cpu) = thread.join().expect("client thread");
        latencies.append(&mut mine);
        client_cpu += cpu;
    }
    let (elapsed, total) = (start.elapsed(), cpu(libc::CLOCK_PROCESS_CPUTIME_ID) - cpu_before);
    latencies.sort_unstable();
    let count = latencies.len() as f64;
    let quantile = |q: f64| f64::from(latencies[(count * q) as usize]) / 1000.0;
    Outcome {
        rate: count / elapsed.as_secs_f64(),
        cpu_us: (total.saturating_sub(client_cpu)).as_secs_f64() * 1e6 / count,
        p50: quantile(0.5),
        p99: quantile(0.99),
        turns: TURNS.swap(0, Ordering::Relaxed) as f64 / count,
    }
}

fn reactor_server(path: PathBuf, spin_us: u32) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("address");
    std::thread::spawn(move || {
        let outcome = block_on_local(async move {
            let disk = Disk::open_file(&path, DiskOptions::default()).expect("open the disk");
            let identity = Identity {
                key: key(),
                cluster_name: "bench".to_owned(),
                cluster: Some(ClusterId([1; 16])),
                node: NodeId::Cs(CsId(1025)),
            };
            let options = ReactorOptions { spin_us, ..ReactorOptions::default() };
            let config = ReactorConfig { identity, listen: vec![listener], disks: vec![disk], options };
            let server = Server { waiting: BTreeMap::new(), ios: 0 };
            let reactor = Reactor::start(config, server).expect("start");
            reactor.stopped().await
        });
        assert_eq!(outcome.expect("runtime"), Stopped::Asked);
    });
    addr
}

fn blocking_server(path: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("address");
    let mut how = std::fs::File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(how.read(true).write(true), libc::O_DIRECT);
    let file = std::sync::Arc::new(how.open(path).expect("open the disk"));
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let (mut stream, file) = (stream.expect("accept"), file.clone());
            stream.set_nodelay(true).expect("nodelay");
            std::thread::spawn(move || {
                let mut request = vec![0u8; FRAME_HEADER_SIZE + PREFIX + REQUEST];
                let mut block = cairn_env::BufMut::zeroed(REQUEST);
                let mut at = number as u64 * 1000;
                while stream.read_exact(&mut request).is_ok() {
                    block.copy_from_slice(&request[FRAME_HEADER_SIZE + PREFIX..]);
                    at += 1;
                    file.write_all_at(&block, (at.wrapping_mul(7919) % BLOCKS) * 4096).expect("write the disk");
                    if stream.write_all(&[0; FRAME_HEADER_SIZE + 16]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().unwrap_or_else(|| ".".to_owned()));
    let seconds: f64 = arguments.next().map_or(3.0, |text| text.parse().expect("seconds"));
    // Of its own, so that nothing else is touched.
    let path = directory.join(format!("echo_bench.{}", std::process::id()));
    Disk::create_filled(&path, BLOCKS * 4096, |_| ()).expect("create the disk");
    let print = |name: &str, run: &Outcome, base: &Outcome| {
        let Outcome { rate, cpu_us, p50, p99, turns } = run;
        let ratio = rate / base.rate;
        println!(
            "{name:34} {rate:9.0}/s  {cpu_us:6.2} CPU-us/op  p50 {p50:7.1} us  p99 {p99:8.1} us  ratio {ratio:.2}  turns/op {turns:.2}"
        );
    };
    let blocking = blocking_server(&path);
    let base_1 = measure(blocking, 1, 1, false, seconds);
    print("blocking, 1 in flight", &base_1, &base_1);
    let base_32 = measure(blocking, 32, 1, false, seconds);
    print("blocking, 32 connections x 1", &base_32, &base_32);
    for spin_us in [0, 50] {
        // A file is open in one place at a time: each server has its own.
        let path = path.with_extension(spin_us.to_string());
        Disk::create_filled(&path, BLOCKS * 4096, |_| ()).expect("create the disk");
        let reactor = reactor_server(path.clone(), spin_us);
        print(&format!("reactor spin {spin_us}, 1 in flight"), &measure(reactor, 1, 1, true, seconds), &base_1);
        print(&format!("reactor spin {spin_us}, 1 x 32 in flight"), &measure(reactor, 1, 32, true, seconds), &base_32);
        print(&format!("reactor spin {spin_us}, 8 x 4 in flight"), &measure(reactor, 8, 4, true, seconds), &base_32);
        let (before, wait) = (cpu(libc::CLOCK_PROCESS_CPUTIME_ID), Duration::from_secs(2));
        std::thread::sleep(wait);
        let idle = (cpu(libc::CLOCK_PROCESS_CPUTIME_ID) - before).as_secs_f64() / wait.as_secs_f64() * 100.0;
        println!("idle: {idle:.3} % CPU");
        let _ = std::fs::remove_file(&path);
    }
    let _ = std::fs::remove_file(&path);
}
