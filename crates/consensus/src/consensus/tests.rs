use super::*;
use crate::members::Member;
use crate::output::Role;
use crate::wire::{self, Identity};
use cairn_env::Buf;
use cairn_types::{ClusterId, Duration};
use raft::eraftpb::{Entry, Message, MessageType};

fn config() -> Config {
    Config { log_size_bytes: 256 << 10, ..Config::new(MdsId(1), ClusterId([3; 16])) }
}

fn member(id: u64) -> Member {
    Member { id: MdsId(id), instance: 100 + id }
}

/// One node of three whose peers are this test.
struct Lone {
    core: Consensus,
    bytes: Vec<u8>,
    now: Instant,
    rng: Rng,
    emitted: u64,
}

impl Lone {
    fn new(seed: u64) -> Self {
        let mut bytes = vec![0; config().log_size_bytes as usize];
        for op in Consensus::format(&config(), 101, &Initial::Bootstrap { voters: (1..=3).map(member).collect() }) {
            disk(&mut bytes, &op);
        }
        let mut lone = Self { core: Consensus::new(config()), bytes, now: Instant(0), rng: Rng::new(seed), emitted: 0 };
        let mut out = Output::default();
        lone.core.start(lone.now, 0, &mut lone.rng, &mut out);
        lone.settle(out, true);
        lone
    }

    fn settle(&mut self, mut out: Output, disk_works: bool) -> Vec<(MdsId, Vec<u8>)> {
        loop {
            self.core.turn(self.now, &mut out);
            if let Some(last) = out.committed.last() {
                assert!(out.committed.iter().all(|entry| entry.index <= last.index));
                self.emitted = last.index;
                self.core.applied(last.index);
                out.committed.clear();
            }
            if out.disk.is_empty() || !disk_works {
                return out.send;
            }
            for request in std::mem::take(&mut out.disk) {
                let result = Ok(disk(&mut self.bytes, &request.op));
                self.core.disk_done(self.now, DiskDone { io: request.io, result }, &mut out);
            }
        }
    }

    fn tick(&mut self) -> Vec<(MdsId, Vec<u8>)> {
        self.now = self.now + Duration::from_millis(50);
        let mut out = Output::default();
        self.core.tick(self.now, &mut self.rng, &mut out);
        self.settle(out, true)
    }

    fn hear(&mut self, from: u64, instance: u64, message: Message) -> Result<(), ReceiveError> {
        let identity = Identity { cluster: config().cluster, id: MdsId(from), instance };
        let bytes = wire::encode(&identity, &Message { from, to: 1, ..message }).expect("a kind that travels");
        let mut out = Output::default();
        let result = self.core.receive(self.now, MdsId(from), &bytes, &mut out);
        self.settle(out, true);
        result
    }
}

fn disk(bytes: &mut [u8], op: &DiskOp) -> Buf {
    match op {
        DiskOp::Read { offset, len } => Buf::copy_from(&bytes[*offset as usize..][..*len as usize]),
        DiskOp::Write { offset, bufs } => {
            bytes[*offset as usize..][..bufs[0].len()].copy_from_slice(&bufs[0]);
            Buf::default()
        }
        _ => Buf::default(),
    }
}

fn random_message(rng: &mut Rng, status: &Status) -> Message {
    use MessageType::*;
    let kinds = [
        MsgAppend,
        MsgAppend,
        MsgAppendResponse,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ];
    let near = |rng: &mut Rng, number: u64| (number + rng.below(4)).saturating_sub(2);
    let wild = |rng: &mut Rng, number: u64| match rng.below(8) {
        0 => rng.below(1 << 61),
        1 => 0,
        _ => near(rng, number),
    };
    let term = match rng.below(20) {
        0 => status.term + 1,
        1 => status.term.saturating_sub(1).max(1),
        _ => status.term,
    };
    let mut message = Message {
        term,
        index: wild(rng, status.last),
        log_term: wild(rng, status.term),
        commit: wild(rng, status.committed),
        commit_term: near(rng, status.term),
        reject: rng.chance(1, 3),
        reject_hint: wild(rng, status.last),
        ..Message::default()
    };
    message.set_msg_type(*rng.choose(&kinds).unwrap());
    match message.get_msg_type() {
        MsgAppend => {
            message.log_term = if message.index == 0 { 0 } else { message.log_term.clamp(1, term) };
            let mut entry_term = message.log_term.max(1);
            for i in 0..rng.below(4) {
                entry_term = (entry_term + rng.below(2)).min(term);
                let entry = entry::command_entry(vec![1; rng.range(1, 30) as usize]);
                message.entries.push(Entry { term: entry_term, index: message.index + 1 + i, ..entry });
            }
        }
        MsgReadIndex | MsgReadIndexResp => {
            message.entries = vec![Entry { data: vec![1; rng.range(1, 32) as usize], ..Entry::default() }];
            message.term = if message.get_msg_type() == MsgReadIndex { 0 } else { term };
        }
        _ => {}
    }
    message
}

/// Valid frames in mad order (I19): peers that lie, forget and contradict themselves do not bring a node down. What
/// they say may be wrong only within what the protocol cannot check, so commit indexes of appends stay honest here.
#[test]
fn messages_in_mad_order_never_panic() {
    for seed in 0..1000 {
        let mut lone = Lone::new(seed);
        let mut rng = Rng::new(seed + 77);
        for _ in 0..400 {
            match rng.below(12) {
                0 => drop(lone.tick()),
                1 => {
                    let _ = lone.core.propose(1, vec![2; 10]);
                    let _ = lone.core.read_index(2, &mut Output::default());
                    lone.settle(Output::default(), true);
                }
                2 => {
                    lone.core.compact(lone.emitted);
                    lone.settle(Output::default(), true);
                }
                _ => {
                    let status = lone.core.status();
                    let message = random_message(&mut rng, &status);
                    let _ = lone.hear(rng.range(2, 4), 0, message.clone());
                    let from = rng.range(2, 4);
                    let _ = lone.hear(from, 100 + from, message);
                }
            }
        }
    }
}

fn response(kind: MessageType, term: u64) -> Message {
    let mut message = Message { term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

/// Ticks until the node asks for votes in earnest, and answers its question before.
fn campaign(lone: &mut Lone) -> u64 {
    for _ in 0..100 {
        lone.tick();
        let status = lone.core.status();
        match status.role {
            Role::PreCandidate => {
                lone.hear(2, 102, response(MessageType::MsgRequestPreVoteResponse, status.term + 1)).unwrap();
            }
            Role::Candidate => return status.term,
            _ => {}
        }
    }
    panic!("no campaign: {:?}", lone.core.status());
}

#[test]
fn a_vote_of_a_wiped_log_does_not_count() {
    let mut lone = Lone::new(1);
    let term = campaign(&mut lone);
    let vote = response(MessageType::MsgRequestVoteResponse, term);
    let refused = ReceiveError::OtherInstance { from: MdsId(3), found: 999, expected: 103 };
    assert_eq!(lone.hear(3, 999, vote.clone()), Err(refused));
    assert_eq!(lone.core.status().role, Role::Candidate);
    lone.hear(3, 103, vote).unwrap();
    assert_eq!(lone.core.status().role, Role::Leader);
}

#[test]
fn a_vote_leaves_only_after_it_is_durable_and_an_append_at_once() {
    let mut lone = Lone::new(2);
    let mut vote = response(MessageType::MsgRequestVote, 7);
    (vote.index, vote.log_term) = (9, 6);
    let identity = Identity { cluster: config().cluster, id: MdsId(2), instance: 102 };
    let bytes = wire::encode(&identity, &Message { from: 2, to: 1, ..vote }).unwrap();
    let mut out = Output::default();
    lone.core.receive(lone.now, MdsId(2), &bytes, &mut out).unwrap();
    lone.core.turn(lone.now, &mut out);
    assert!(out.send.is_empty() && out.disk.len() == 1, "C1: {out:?}");
    let write = out.disk.remove(0);
    lone.core.disk_done(lone.now, DiskDone { io: write.io, result: Ok(Buf::default()) }, &mut out);
    assert!(out.send.is_empty() && matches!(out.disk[0].op, DiskOp::Flush), "C1: {out:?}");
    let flush = out.disk.remove(0);
    lone.core.disk_done(lone.now, DiskDone { io: flush.io, result: Ok(Buf::default()) }, &mut out);
    assert_eq!(out.send.len(), 1);

    let mut leader = Lone::new(3);
    let term = campaign(&mut leader);
    leader.hear(2, 102, response(MessageType::MsgRequestVoteResponse, term)).unwrap();
    let acknowledged = Message { index: leader.core.status().last, ..response(MessageType::MsgAppendResponse, term) };
    leader.hear(2, 102, acknowledged.clone()).unwrap();
    leader.hear(3, 103, acknowledged).unwrap();
    (0..3).for_each(|i| leader.core.propose(i, vec![1; 100]).unwrap());
    let mut out = Output::default();
    leader.core.turn(leader.now, &mut out);
    assert_eq!((out.disk.len(), out.send.len()), (1, 2), "one group, one message a follower");
}

#[test]
fn a_disk_error_closes_the_node() {
    let mut lone = Lone::new(4);
    let mut out = Output::default();
    let term = campaign(&mut lone) + 3;
    let identity = Identity { cluster: config().cluster, id: MdsId(2), instance: 102 };
    let heartbeat = Message { from: 2, to: 1, ..response(MessageType::MsgHeartbeat, term) };
    let bytes = wire::encode(&identity, &heartbeat).unwrap();
    lone.core.receive(lone.now, MdsId(2), &bytes, &mut out).unwrap();
    lone.core.turn(lone.now, &mut out);
    let io = out.disk.pop().unwrap().io;
    let error = cairn_env::DiskError { operation: "write", offset: 0, len: 4096, kind: cairn_env::DiskErrorKind::Io };
    lone.core.disk_done(lone.now, DiskDone { io, result: Err(error.clone()) }, &mut out);
    assert_eq!(out.failed, Some(error));
    assert_eq!(lone.core.propose(1, vec![1]), Err(ProposeError::Closed));
    assert!(out.send.is_empty(), "C1: nothing is promised after a failed write");
}
