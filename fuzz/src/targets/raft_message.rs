//! Messages between metadata servers, heard by one node of three.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, script, seed};
use cairn_consensus::{Config, Consensus, Initial, Member, Output};
use cairn_env::{Buf, DiskDone, DiskOp};
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc32c;
use cairn_types::{ClusterId, Duration, Instant, MdsId};

pub const TARGET: Target = Target {
    name: "raft_message",
    covers: "Raft messages in any order with good checksums: their form, and what the library does with them",
    entry: "cairn_consensus::Consensus::receive",
    shape: Shape::Script,
    bound: Bound {
        base: 4 << 20,
        factor: 4,
        why: "a group of the log is one device write, and the node keeps the live part of its log in memory",
    },
    run,
    seal,
    seeds,
};

/// The parameters of the node and of the log of the target `raft_log`.
pub fn config() -> Config {
    Config { log_size_bytes: 256 << 10, ..Config::new(MdsId(1), ClusterId([3; 16])) }
}

fn member(id: u64) -> Member {
    Member { id: MdsId(id), instance: 100 + id }
}

/// A node of three over a log in memory.
pub struct Lone {
    pub core: Consensus,
    pub log: Vec<u8>,
    pub now: Instant,
    pub sent: Vec<(MdsId, Vec<u8>)>,
    rng: Rng,
    config: Config,
}

fn disk(bytes: &mut [u8], op: &DiskOp) -> Buf {
    match op {
        DiskOp::Read { offset, len } => Buf::copy_from(&bytes[*offset as usize..][..*len as usize]),
        DiskOp::Write { offset, bufs } => {
            let mut at = *offset as usize;
            for buf in bufs {
                bytes[at..at + buf.len()].copy_from_slice(buf);
                at += buf.len();
            }
            Buf::default()
        }
        _ => Buf::default(),
    }
}

impl Lone {
    /// Node `id` with a fresh log.
    pub fn new(id: u64) -> Self {
        let config = Config { id: MdsId(id), ..config() };
        let mut log = vec![0; config.log_size_bytes as usize];
        let voters = (1..=3).map(member).collect();
        for op in Consensus::format(&config, 100 + id, &Initial::Bootstrap { voters }) {
            disk(&mut log, &op);
        }
        Self::over(config, log)
    }

    /// A node over a log as it is, not yet open.
    pub fn over(config: Config, log: Vec<u8>) -> Self {
        let core = Consensus::new(config.clone());
        Self { core, log, now: Instant(0), sent: Vec::new(), rng: Rng::new(config.id.0), config }
    }

    /// Opens the log; false when it refuses.
    pub fn open(&mut self, applied: u64) -> bool {
        let mut out = Output::default();
        self.core.start(self.now, applied, &mut self.rng, &mut out);
        self.settle(out)
    }

    /// Runs until nothing moves; false when the log did not open.
    fn settle(&mut self, mut out: Output) -> bool {
        let mut good = true;
        loop {
            self.core.turn(self.now, &mut out);
            if let Some(last) = out.committed.last() {
                self.core.applied(last.index);
                out.committed.clear();
            }
            if let Some(Err(error)) = out.opened.take() {
                let _ = error.to_string();
                good = false;
            }
            self.sent.append(&mut out.send);
            if out.disk.is_empty() {
                return good;
            }
            for request in std::mem::take(&mut out.disk) {
                let result = Ok(disk(&mut self.log, &request.op));
                self.core.disk_done(self.now, DiskDone { io: request.io, result }, &mut out);
            }
        }
    }

    /// Time passes.
    pub fn tick(&mut self) {
        self.now = self.now + Duration::from_millis(50);
        let mut out = Output::default();
        self.core.tick(self.now, &mut self.rng, &mut out);
        self.settle(out);
    }

    /// A message arrives.
    pub fn hear(&mut self, from: u64, bytes: &[u8]) {
        let mut out = Output::default();
        let heard = measured(bytes.len(), || self.core.receive(self.now, MdsId(from), bytes, &mut out));
        if let Err(error) = heard {
            let _ = error.to_string();
        }
        self.settle(out);
    }

    /// Work of its own.
    pub fn propose(&mut self, data: &[u8]) {
        let mut out = Output::default();
        if data.len() as u64 <= self.config.command_size_max() && !data.is_empty() {
            let _ = self.core.propose(1, data.to_vec());
        }
        let _ = self.core.read_index(2, &mut out);
        self.settle(out);
    }
}

/// Pieces by kind: messages of node 2 and 3, ticks, a proposal.
fn run(bytes: &[u8]) {
    let mut node = Lone::new(1);
    node.open(0);
    for (kind, piece) in script::pieces(bytes) {
        match kind % 5 {
            0 | 1 => node.hear(2, piece),
            2 => node.hear(3, piece),
            3 => (0..=piece.first().map_or(0, |count| count & 31)).for_each(|_| node.tick()),
            _ => node.propose(piece),
        }
    }
    let _ = node.core.status();
}

/// Makes the checksum of every message good.
fn seal(bytes: &mut Vec<u8>) {
    let pieces: Vec<(u8, Vec<u8>)> = script::pieces(bytes)
        .into_iter()
        .map(|(kind, piece)| {
            let mut piece = piece.to_vec();
            if kind % 5 < 3 && piece.len() > 4 {
                let sum = crc32c(&piece[4..]).to_le_bytes();
                piece[..4].copy_from_slice(&sum);
            }
            (kind, piece)
        })
        .collect();
    *bytes = script::script(pieces.iter().map(|(kind, piece)| (*kind, &piece[..])));
}

/// What three honest nodes say to each other, as the first one heard it.
fn seeds() -> Seeds {
    let mut seeds = Vec::new();
    for leader in [1u64, 2] {
        let mut nodes: Vec<Lone> = (1..=3).map(Lone::new).collect();
        nodes.iter_mut().for_each(|node| assert!(node.open(0)));
        let mut heard = Vec::new();
        for round in 0..40 {
            let ticking = &mut nodes[leader as usize - 1];
            ticking.tick();
            if leader == 1 {
                script::put(&mut heard, 3, &[0]);
            }
            if round > 30 {
                ticking.propose(b"a command of some length");
                if leader == 1 {
                    script::put(&mut heard, 4, b"a command of some length");
                }
            }
            for _ in 0..8 {
                for from in 1..=3u64 {
                    for (to, message) in std::mem::take(&mut nodes[from as usize - 1].sent) {
                        if to == MdsId(1) {
                            script::put(&mut heard, from as u8 - 1, &message);
                        }
                        nodes[to.0 as usize - 1].hear(from, &message);
                    }
                }
            }
        }
        // Silence is worth one piece.
        let pieces = script::all(&heard);
        let mut short: Vec<(u8, Vec<u8>)> = Vec::new();
        for (kind, piece) in pieces {
            match short.last_mut() {
                Some((3, ticks)) if kind == 3 && ticks[0] < 31 => ticks[0] += 1,
                _ => short.push((kind, piece.to_vec())),
            }
        }
        let whole = script::script(short.iter().map(|(kind, piece)| (*kind, &piece[..])));
        seeds.push(seed(if leader == 1 { "leads" } else { "follows" }, whole));
    }
    seeds
}
