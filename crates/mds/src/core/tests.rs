//! What a server does that has lost its image.

use super::*;
use crate::base::MemBase;
use cairn_consensus::{Initial, Members, SnapshotMeta};
use cairn_env::{Buf, DiskDone, DiskOp};
use cairn_types::{Instant, Level};

fn carry_out(bytes: &mut [u8], op: &DiskOp) -> Buf {
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
        DiskOp::Flush | DiskOp::Discard { .. } => Buf::default(),
    }
}

/// Starts server 1 without an image on a log that begins after index 1000, in a group of these voters; gives its last
/// words, if it ended, and its log.
fn start_without_image(voters: &[u64]) -> (Option<String>, Vec<String>) {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut log = cairn_consensus::Config::new(MdsId(1), ClusterId([7; 16]));
    log.log_size_bytes = 1 << 20;
    let voters = voters.iter().map(|id| (MdsId(*id), 100 + id)).collect();
    let meta = SnapshotMeta { index: 1000, term: 3, members: Members { voters, ..Members::default() } };
    let mut bytes = vec![0; log.log_size_bytes as usize];
    for op in Consensus::format(&log, 101, &Initial::Image(meta)) {
        carry_out(&mut bytes, &op);
    }
    let config = MdsConfig {
        id: MdsId(1),
        level: Level::CURRENT,
        cluster: ClusterId([7; 16]),
        cluster_name: "test".to_owned(),
        addr,
        repository: "/srv/mds".to_owned(),
        servers: vec![MdsInfo { mds: MdsId(1), addr, voter: true, repository: String::new() }],
        bootstrap: false,
        log,
        checkpoint_bytes: 1 << 20,
    };
    let mut core = MdsCore::new(config, MemBase::default(), Rng::new(1));
    let (mut effects, mut said) = (Effects::default(), Vec::new());
    let at = |ms: u64| Now { mono: Instant(ms * 1_000_000), wall_ns: 0 };
    core.step(at(0), Event::Start, &mut effects);
    for ms in (0..10_000).step_by(50) {
        while !effects.disk.is_empty() {
            for (index, request) in std::mem::take(&mut effects.disk) {
                let result = Ok(carry_out(&mut bytes, &request.op));
                core.step(at(ms), Event::Disk(index, DiskDone { io: request.io, result }), &mut effects);
            }
            core.step(at(ms), Event::Turn, &mut effects);
        }
        said.append(&mut effects.log);
        if let Some(fatal) = effects.fatal.take() {
            return (Some(fatal), said);
        }
        core.step(at(ms), Event::Timer, &mut effects);
        core.step(at(ms), Event::Turn, &mut effects);
    }
    assert!(!core.is_leader() && core.applied() == 0 && core.consensus().status().term == 3, "it stands for nothing");
    (None, said)
}

#[test]
fn the_only_server_that_lost_its_image_says_what_to_do() {
    let (fatal, _) = start_without_image(&[1]);
    let fatal = fatal.expect("it stops");
    assert!(fatal.contains("/srv/mds") && fatal.contains("cairn recover-metadata"), "{fatal}");
}

#[test]
fn one_of_three_that_lost_its_image_waits_for_the_state_and_stands_for_no_election() {
    let (fatal, said) = start_without_image(&[1, 2, 3]);
    assert_eq!(fatal, None);
    assert!(said.iter().any(|line| line.contains("the leader is asked for the state")), "{said:?}");
}
