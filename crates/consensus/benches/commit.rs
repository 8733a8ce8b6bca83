//! CPU time of one committed 200-byte entry: three nodes in one thread, all of wire and log encoding included, the
//! disk answering at once and storing nothing. `cargo bench -p cairn-consensus`.

use cairn_consensus::{Config, Consensus, Initial, Member, Output};
use cairn_env::{Buf, DiskDone, DiskOp};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, Duration, Instant, MdsId};

struct Bench {
    nodes: Vec<(Consensus, Output)>,
    log: Vec<Vec<u8>>,
    now: Instant,
    rng: Rng,
    committed: u64,
    disk_writes: u64,
    messages: u64,
}

impl Bench {
    fn new() -> Self {
        let voters: Vec<Member> = (1..=3).map(|id| Member { id: MdsId(id), instance: 100 + id }).collect();
        let mut bench = Self {
            nodes: Vec::new(),
            log: Vec::new(),
            now: Instant(0),
            rng: Rng::new(1),
            committed: 0,
            disk_writes: 0,
            messages: 0,
        };
        for voter in &voters {
            let config = Config { write_through: true, ..Config::new(voter.id, ClusterId([1; 16])) };
            let mut bytes = vec![0; config.log_size_bytes as usize];
            for op in Consensus::format(&config, voter.instance, &Initial::Bootstrap { voters: voters.clone() }) {
                if let DiskOp::Write { offset, bufs } = op {
                    bytes[offset as usize..][..bufs[0].len()].copy_from_slice(&bufs[0]);
                }
            }
            let mut out = Output::default();
            let mut core = Consensus::new(config);
            core.start(bench.now, 0, &mut bench.rng, &mut out);
            bench.nodes.push((core, out));
            bench.log.push(bytes);
        }
        bench.settle();
        while bench.nodes[0].0.status().leader.is_none() {
            bench.now = bench.now + Duration::from_millis(50);
            let (core, out) = &mut bench.nodes[0];
            core.tick(bench.now, &mut bench.rng, out);
            bench.settle();
        }
        bench
    }

    /// Turns, disks and links until nothing more happens.
    fn settle(&mut self) {
        loop {
            let mut idle = true;
            for node in 0..self.nodes.len() {
                let (core, out) = &mut self.nodes[node];
                core.turn(self.now, out);
                if let Some(last) = out.committed.last() {
                    core.applied(last.index);
                    self.committed += if node == 0 { out.committed.len() as u64 } else { 0 };
                    if core.status().base + 1100 < last.index {
                        core.compact(last.index - 100);
                    }
                    out.committed.clear();
                }
                for request in std::mem::take(&mut out.disk) {
                    idle = false;
                    let result = match request.op {
                        DiskOp::Read { offset, len } => {
                            Buf::copy_from(&self.log[node][offset as usize..][..len as usize])
                        }
                        _ => Buf::default(),
                    };
                    self.disk_writes += 1;
                    core.disk_done(self.now, DiskDone { io: request.io, result: Ok(result) }, out);
                }
                for (to, bytes) in std::mem::take(&mut self.nodes[node].1.send) {
                    idle = false;
                    self.messages += 1;
                    let (peer, out) = &mut self.nodes[to.0 as usize - 1];
                    peer.receive(self.now, MdsId(node as u64 + 1), &bytes, out).expect("a message of our own");
                }
            }
            if idle {
                return;
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]
fn main() {
    for batch in [1u64, 8, 64] {
        let mut bench = Bench::new();
        let rounds = 100_000 / batch;
        let (committed, writes, messages) = (bench.committed, bench.disk_writes, bench.messages);
        let start = std::time::Instant::now();
        for round in 0..rounds {
            for i in 0..batch {
                bench.nodes[0].0.propose(round * batch + i, vec![7; 200]).expect("the leader takes proposals");
            }
            bench.settle();
        }
        let (elapsed, count) = (start.elapsed(), bench.committed - committed);
        assert_eq!(count, rounds * batch);
        println!(
            "batch {batch:>2}: {:.2} us per entry, {:.2} disk writes and {:.2} messages per batch",
            elapsed.as_secs_f64() * 1e6 / count as f64,
            (bench.disk_writes - writes) as f64 / rounds as f64,
            (bench.messages - messages) as f64 / rounds as f64,
        );
    }
}
