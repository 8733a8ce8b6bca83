//! A few cores over disks that answer at once: for tests of single steps and for the measurement.

use cairn_consensus::{Committed, Config, Consensus, Initial, Member, OpenError, Opened, Output, SnapshotMeta};
use cairn_env::{Buf, DiskDone, DiskOp};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, Duration, Instant, MdsId};

pub fn config(id: u64) -> Config {
    Config { log_size_bytes: 256 << 10, ..Config::new(MdsId(id), ClusterId([9; 16])) }
}

pub fn member(id: u64) -> Member {
    Member { id: MdsId(id), instance: 1000 + id }
}

pub fn format(config: &Config, initial: &Initial) -> Vec<u8> {
    let mut bytes = vec![0xee; config.log_size_bytes as usize];
    for op in Consensus::format(config, member(config.id.0).instance, initial) {
        apply(&mut bytes, &op);
    }
    bytes
}

/// Carries out an operation on plain bytes.
pub fn apply(bytes: &mut [u8], op: &DiskOp) -> Buf {
    match op {
        DiskOp::Read { offset, len } => Buf::copy_from(&bytes[*offset as usize..][..*len as usize]),
        DiskOp::Write { offset, bufs } => {
            let mut at = *offset as usize;
            for buf in bufs {
                assert!(buf.is_aligned() && buf.len().is_multiple_of(4096), "an unaligned write");
                bytes[at..at + buf.len()].copy_from_slice(buf);
                at += buf.len();
            }
            Buf::default()
        }
        DiskOp::Flush | DiskOp::Discard { .. } => Buf::default(),
    }
}

/// One core, its disk, and what it has given out.
pub struct Solo {
    pub core: Consensus,
    pub bytes: Vec<u8>,
    /// Every write since the log opened, with the number of entries committed before it was issued.
    pub writes: Vec<(u64, Vec<u8>, u64)>,
    pub committed: Vec<Committed>,
    pub opened: Option<Result<Opened, OpenError>>,
    pub sent: Vec<(MdsId, Vec<u8>)>,
    pub reads: Vec<(u64, u64)>,
    pub prepared: Option<SnapshotMeta>,
    pub now: Instant,
    pub keep_writes: bool,
    rng: Rng,
}

impl Solo {
    pub fn open(config: Config, bytes: Vec<u8>, applied: u64) -> Self {
        Self::open_with(config, bytes, Some(applied))
    }

    /// Opens a log whose state machine stands at `applied`, or has nothing.
    pub fn open_with(config: Config, bytes: Vec<u8>, applied: Option<u64>) -> Self {
        let mut solo = Self {
            core: Consensus::new(config),
            bytes,
            writes: Vec::new(),
            committed: Vec::new(),
            opened: None,
            sent: Vec::new(),
            reads: Vec::new(),
            prepared: None,
            now: Instant(0),
            keep_writes: true,
            rng: Rng::new(5),
        };
        let mut out = Output::default();
        match applied {
            Some(applied) => solo.core.start(solo.now, applied, &mut solo.rng, &mut out),
            None => solo.core.start_without_state(solo.now, &mut solo.rng, &mut out),
        }
        solo.drain(out);
        solo
    }

    /// Ends a turn and carries out everything until nothing more happens.
    pub fn turn(&mut self) {
        let mut out = Output::default();
        self.core.turn(self.now, &mut out);
        self.drain(out);
    }

    pub fn drain(&mut self, mut out: Output) {
        loop {
            if let Some(opened) = out.opened.take() {
                self.opened = Some(opened);
            }
            self.prepared = out.snapshot_prepared.take().or(self.prepared.take());
            self.sent.append(&mut out.send);
            self.reads.append(&mut out.read_ready);
            if let Some(last) = out.committed.last() {
                self.core.applied(last.index);
            }
            let news = !out.committed.is_empty();
            self.committed.append(&mut out.committed);
            if out.disk.is_empty() && !news {
                return;
            }
            for request in std::mem::take(&mut out.disk) {
                if let DiskOp::Write { offset, bufs } = &request.op
                    && self.keep_writes
                {
                    let data = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
                    self.writes.push((*offset, data, self.committed.len() as u64));
                }
                let result = Ok(apply(&mut self.bytes, &request.op));
                self.core.disk_done(self.now, DiskDone { io: request.io, result }, &mut out);
            }
            self.core.turn(self.now, &mut out);
        }
    }

    pub fn tick(&mut self) {
        self.now = self.now + Duration::from_millis(50);
        let mut out = Output::default();
        self.core.tick(self.now, &mut self.rng, &mut out);
        self.drain(out);
        self.turn();
    }

    pub fn lead(&mut self) {
        for _ in 0..60 {
            self.tick();
            if self.core.status().leader == Some(self.core.status().id) {
                return;
            }
        }
        panic!("no leader in a group of one: {:?}", self.core.status());
    }
}
