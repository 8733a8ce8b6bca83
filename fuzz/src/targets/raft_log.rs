//! The log of a metadata server, damaged and opened.

use super::raft_message::{Lone, config};
use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, script, seed, unsealed};
use cairn_stdx::checksum::crc32c;
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "raft_log",
    covers: "groups and records of the Raft log: patches of a good log, with or without checksums made good",
    entry: "cairn_consensus::Consensus::start",
    shape: Shape::Script,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

const PAGE: usize = 4096;
const HEADER: usize = 128;
const MAGIC: &[u8] = b"CairnRft";

thread_local! {
    static BASE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A log that has gone through an election, commands and a compaction.
fn good_log() -> Vec<u8> {
    let mut nodes: Vec<Lone> = (1..=3).map(Lone::new).collect();
    nodes.iter_mut().for_each(|node| assert!(node.open(0)));
    for round in 0..60u8 {
        nodes[0].tick();
        if round > 35 {
            nodes[0].propose(&[round; 300]);
        }
        if round == 50 {
            let applied = nodes[0].core.status().applied;
            nodes[0].core.compact(applied.saturating_sub(3));
        }
        for _ in 0..8 {
            for from in 0..3 {
                for (to, message) in std::mem::take(&mut nodes[from].sent) {
                    nodes[to.0 as usize - 1].hear(from as u64 + 1, &message);
                }
            }
        }
    }
    nodes.swap_remove(0).log
}

/// Offsets of the groups in order of their numbers.
fn groups(log: &[u8]) -> Vec<usize> {
    let mut groups: Vec<usize> = (0..log.len()).step_by(PAGE).filter(|at| &log[at + 16..at + 24] == MAGIC).collect();
    groups.sort_by_key(|at| u64::from_le_bytes(log[at + 56..at + 64].try_into().expect("eight bytes")));
    groups
}

fn number(log: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(log[at..at + 4].try_into().expect("four bytes"))
}

/// Makes the checksums of all groups good, and the links between them.
fn seal_log(log: &mut [u8]) {
    let mut previous = None;
    for at in groups(log) {
        let size = number(log, at + 8) as usize;
        if let Some(body) = log.get(at + HEADER..(at + HEADER).saturating_add(size)) {
            let sum = crc32c(body).to_le_bytes();
            log[at + 4..at + 8].copy_from_slice(&sum);
        }
        if let Some(previous) = previous {
            log[at + 88..at + 92].copy_from_slice(&u32::to_le_bytes(previous));
        }
        let sum = crc32c(&log[at + 4..at + HEADER]);
        log[at..at + 4].copy_from_slice(&sum.to_le_bytes());
        previous = Some(sum);
    }
}

/// Pieces: patches. The low bits of the kind say which group; a piece is an offset (u16) within it and bytes. A first
/// piece of kind 255 says what was applied; a kind with bit 7 leaves the checksums as they are.
fn run(bytes: &[u8]) {
    let mut log = BASE.with(|base| {
        let mut base = base.borrow_mut();
        if base.is_empty() {
            *base = good_log();
        }
        base.clone()
    });
    let (places, mut sealed, mut applied) = (groups(&log), true, 0);
    for (kind, piece) in script::pieces(bytes) {
        if kind == 255 {
            applied = piece.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)) & ((1 << 62) - 1);
            continue;
        }
        let [low, high, patch @ ..] = piece else { continue };
        sealed &= kind & 128 == 0;
        let place = places[usize::from(kind & 127) % places.len()];
        let at = place + usize::from(u16::from_le_bytes([*low, *high])) % (2 * PAGE);
        let end = (at + patch.len()).min(log.len());
        if at < end {
            log[at..end].copy_from_slice(&patch[..end - at]);
        }
    }
    if sealed {
        seal_log(&mut log);
    }
    let size = log.len();
    let mut node = Lone::over(config(), log);
    if measured(size, || node.open(applied)) {
        // What opened must also run.
        (0..40).for_each(|_| node.tick());
    }
}

/// The good log as it is, and patches that write what stands there already.
fn seeds() -> Seeds {
    let log = good_log();
    let places = groups(&log);
    let node_applied: &[u8] = &[8];
    let mut seeds = vec![seed("good", script::script([(255, node_applied)]))];
    for (i, at) in places.iter().enumerate().filter(|(i, _)| i % 4 == 0 || *i + 3 > places.len()) {
        let size = (number(&log, at + 8) as usize).min(1000);
        let head = [&[0, 0][..], &log[*at..at + HEADER]].concat();
        let body = [&[HEADER as u8, 0][..], &log[at + HEADER..at + HEADER + size]].concat();
        let pieces: [(u8, &[u8]); 3] = [(255, node_applied), (i as u8, &head), (i as u8, &body)];
        seeds.push(seed(&format!("group_{i}"), script::script(pieces)));
    }
    seeds
}
