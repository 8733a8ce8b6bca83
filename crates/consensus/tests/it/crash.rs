//! The log under crashes and rot, one node at a time.

use crate::solo::{Solo, config, format, member};
use cairn_consensus::{
    Change, CommittedKind, Config, Consensus, Initial, Member, Members, OpenError, Output, ProposeError, SnapshotMeta,
};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, MdsId};

const SECTOR: usize = 512;

fn bootstrap(config: &Config) -> Solo {
    let initial = Initial::Bootstrap { voters: vec![member(config.id.0)] };
    let mut solo = Solo::open(config.clone(), format(config, &initial), 0);
    solo.turn();
    solo.lead();
    solo
}

/// Proposals of mixed sizes, with compaction in between: the ring goes around several times.
fn workload(solo: &mut Solo, steps: u64) {
    let mut rng = Rng::new(11);
    for step in 0..steps {
        for i in 0..rng.range(1, 4) {
            let size = if rng.chance(1, 8) { rng.range(4000, 8000) } else { rng.range(1, 300) };
            match solo.core.propose(step * 10 + i, vec![step as u8; size as usize]) {
                Ok(()) => {}
                Err(error) => assert_eq!(error, ProposeError::LogFull),
            }
        }
        solo.turn();
        let applied = solo.core.status().applied;
        if rng.chance(1, 4) || solo.core.status().live_bytes > 24 << 10 {
            solo.core.compact(applied.saturating_sub(rng.below(6)));
            solo.turn();
        }
        if rng.chance(1, 10) {
            (0..12).for_each(|_| solo.tick());
        }
    }
}

fn last_of(solo: &Solo) -> u64 {
    solo.opened.as_ref().unwrap().as_ref().unwrap_or_else(|error| panic!("{error}")).last
}

#[test]
fn every_torn_state_of_every_group_opens_with_everything_acknowledged() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    workload(&mut solo, 60);
    let mut bytes = format(&config, &Initial::Bootstrap { voters: vec![member(1)] });
    let mut rng = Rng::new(3);
    let (mut states, mut cuts) = (0u64, 0u64);
    for (offset, data, acknowledged) in &solo.writes {
        let sectors = data.len() / SECTOR;
        let subsets = if sectors <= 8 { 1 << sectors } else { 64 };
        // All subsets of a small group would cost minutes over a whole workload; every 5th, and always the extremes.
        for subset in (0..subsets as u64).filter(|subset| sectors > 8 || subset % 5 == 0 || *subset == 255) {
            let mut torn = bytes.clone();
            for sector in 0..sectors {
                let kept = if sectors <= 8 { subset >> sector & 1 == 1 } else { rng.below(64) < subset };
                if kept {
                    let at = *offset as usize + sector * SECTOR;
                    torn[at..at + SECTOR].copy_from_slice(&data[sector * SECTOR..][..SECTOR]);
                }
            }
            let opened = Consensus::new(config.clone());
            let base = open_base(&config, &torn);
            drop(opened);
            let again = Solo::open(config.clone(), torn, base);
            assert!(last_of(&again) >= *acknowledged, "group at {offset}: {:?} < {acknowledged}", again.opened);
            states += 1;
            cuts += u64::from(again.opened.unwrap().unwrap().cut_bytes > 0);
        }
        bytes[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
    }
    assert!(states > 4_000 && cuts > 500, "{states} states, {cuts} cuts");
}

/// The base of a log: what the state machine must at least hold.
fn open_base(config: &Config, bytes: &[u8]) -> u64 {
    match Solo::open(config.clone(), bytes.to_vec(), 0).opened.unwrap() {
        Ok(opened) => opened.base,
        Err(OpenError::StateBehindLog { base, .. }) => base,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_restart_continues_with_every_entry_and_the_same_configuration() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    workload(&mut solo, 200);
    let (status, base) = (solo.core.status(), solo.core.status().base);
    assert!(status.used_bytes < config.log_size_bytes / 2 + (64 << 10), "{status:?}");
    let mut again = Solo::open(config, solo.bytes.clone(), base);
    again.turn();
    again.lead();
    let tail = |solo: &Solo| {
        let mut tail: Vec<_> = solo.committed.clone();
        tail.retain(|entry| entry.index > base && entry.index <= status.last);
        tail.iter_mut().for_each(|entry| entry.token = None);
        tail
    };
    assert_eq!(tail(&again), tail(&solo));
    assert_eq!(again.core.status().members, status.members);
}

/// Damages each sector of each group but the newest: always an error that names the group's offset.
pub fn rot_in_the_middle(config: &Config) -> Result<u64, String> {
    let mut solo = bootstrap(config);
    for step in 0..12 {
        solo.core.propose(step, vec![7; 100 + step as usize * 400]).unwrap();
        solo.turn();
    }
    let mut tried = 0;
    let (_, groups) = solo.writes.split_last().unwrap();
    for (offset, data, _) in groups {
        let used = data.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        for sector in 0..used.div_ceil(SECTOR) {
            let mut bytes = solo.bytes.clone();
            let at = *offset as usize + (sector * SECTOR + 3).min(used - 1);
            bytes[at] ^= 0x40;
            let opened = Solo::open(config.clone(), bytes, 0).opened.unwrap();
            match opened {
                Err(OpenError::Corrupt { offset: named, .. }) if named == *offset => tried += 1,
                other => return Err(format!("rot at {at}: {other:?}")),
            }
        }
    }
    Ok(tried)
}

#[test]
fn a_bad_middle_is_an_error_and_a_bad_tail_is_cut() {
    let config = config(1);
    assert!(rot_in_the_middle(&config).unwrap() > 20);
    let mut solo = bootstrap(&config);
    solo.core.propose(1, vec![1; 100]).unwrap();
    solo.turn();
    let last = solo.core.status().last;
    solo.core.propose(2, vec![2; 100]).unwrap();
    solo.turn();
    let (offset, _, _) = solo.writes.iter().rfind(|(_, data, _)| data.windows(50).any(|w| w == [2; 50])).unwrap();
    let mut bytes = solo.bytes.clone();
    bytes[*offset as usize + 200] ^= 1;
    let again = Solo::open(config.clone(), bytes.clone(), 0);
    let opened = again.opened.unwrap().unwrap();
    assert_eq!((opened.last, opened.cut_bytes), (last, 4096));
    // The state machine knows better: an acknowledged entry is missing, and that is no matter of tails.
    let rolled_back = Solo::open(config, bytes, last + 1).opened.unwrap();
    assert_eq!(rolled_back, Err(OpenError::StateAheadOfLog { applied: last + 1, last }));
}

#[test]
fn random_damage_never_panics_and_never_invents() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    workload(&mut solo, 30);
    let (base, last) = (solo.core.status().base, solo.core.status().last);
    let mut rng = Rng::new(17);
    for _ in 0..400 {
        let mut bytes = solo.bytes.clone();
        for _ in 0..rng.range(1, 4) {
            let at = rng.below(bytes.len() as u64) as usize;
            let len = (rng.range(1, 600) as usize).min(bytes.len() - at);
            rng.fill(&mut bytes[at..at + len]);
        }
        let opened = Solo::open(config.clone(), bytes, base).opened.unwrap();
        if let Ok(opened) = opened {
            assert!(opened.last <= last);
        }
    }
}

#[test]
fn strangers_logs_are_refused_by_name() {
    let own = config(1);
    let bytes = bootstrap(&own).bytes;
    let node = Solo::open(config(2), bytes.clone(), 0).opened.unwrap();
    assert_eq!(node, Err(OpenError::OtherNode { found: MdsId(1), expected: MdsId(2) }));
    let other = Config { cluster: ClusterId([1; 16]), ..own.clone() };
    let cluster = Solo::open(other, bytes, 0).opened.unwrap();
    assert_eq!(cluster, Err(OpenError::OtherCluster { found: ClusterId([9; 16]), expected: ClusterId([1; 16]) }));
    let empty = Solo::open(own.clone(), vec![0; own.log_size_bytes as usize], 0).opened.unwrap();
    assert_eq!(empty, Err(OpenError::NotFormatted));
}

#[test]
fn a_full_log_refuses_proposals_until_it_is_compacted() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    let mut accepted = 0;
    while solo.core.propose(accepted, vec![1; 1000]).is_ok() {
        solo.turn();
        accepted += 1;
        assert!(accepted < 1000);
    }
    assert_eq!(solo.core.propose(0, vec![1; 1000]), Err(ProposeError::LogFull));
    // Elections and rewritten tails go on in a full log: checkpoints make room for their groups.
    for _ in 0..30 {
        let bytes = solo.bytes.clone();
        solo = Solo::open(config.clone(), bytes, 0);
        solo.turn();
        solo.lead();
    }
    let applied = solo.core.status().applied;
    solo.core.compact(applied);
    solo.core.propose(0, vec![1; 1000]).unwrap();
    solo.turn();
    assert!(matches!(solo.committed.last().unwrap().kind, CommittedKind::Command(_)));
}

#[test]
fn proposals_and_changes_are_checked() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    assert!(matches!(solo.core.propose(1, Vec::new()), Err(ProposeError::Size { size: 0, .. })));
    assert!(matches!(solo.core.propose(1, vec![0; 9000]), Err(ProposeError::Size { max: 8192, .. })));
    assert!(solo.core.propose_change(1, Change::Remove(MdsId(1))).is_err());
    solo.core.propose_change(2, Change::AddLearner(member(2))).unwrap();
    assert_eq!(solo.core.propose_change(3, Change::AddLearner(member(3))), Err(ProposeError::ChangePending));
    solo.turn();
    let stranger = Member { id: MdsId(2), instance: 1 };
    assert!(matches!(solo.core.propose_change(3, Change::AddVoter(stranger)), Err(ProposeError::Change(_))));
    assert_eq!(solo.core.status().members.learners.len(), 1);
    solo.core.read_index(9, &mut Default::default()).unwrap();
    solo.turn();
    assert_eq!(solo.reads, [(9, solo.core.status().committed)]);
}

#[test]
fn a_log_that_begins_after_an_image_leads_from_there_and_only_with_that_image() {
    let config = config(1);
    let members = Members { voters: [(MdsId(1), member(1).instance)].into(), ..Members::default() };
    let bytes = format(&config, &Initial::Image(SnapshotMeta { index: 1000, term: 7, members }));
    let without = Solo::open(config.clone(), bytes.clone(), 0);
    assert!(matches!(without.opened, Some(Err(OpenError::StateBehindLog { applied: 0, base: 1000 }))));
    let mut solo = Solo::open(config.clone(), bytes, 1000);
    solo.turn();
    solo.lead();
    solo.core.propose(1, b"on".to_vec()).unwrap();
    solo.turn();
    assert!(solo.committed.iter().all(|entry| entry.index > 1000));
    let again = Solo::open(config, solo.bytes.clone(), 1000);
    let opened = again.opened.unwrap().unwrap();
    assert!((opened.base, opened.last > 1001) == (1000, true) && opened.term > 7, "{opened:?}");
}

/// A log that was compacted, and its state machine lost everything: it stands for no election and emits nothing until
/// an image came, and then all that the image does not contain.
pub fn a_node_without_its_state_waits_for_an_image_and_goes_on_with_its_log() {
    let config = config(1);
    let mut solo = bootstrap(&config);
    workload(&mut solo, 200);
    let status = solo.core.status();
    assert!(status.base > 0 && status.applied > status.base + 1, "{status:?}");
    let meta = solo.core.snapshot_meta(status.base + 1).expect("an image in the log");
    let all = std::mem::take(&mut solo.committed);

    let mut lost = Solo::open_with(config.clone(), solo.bytes.clone(), None);
    (0..100).for_each(|_| lost.tick());
    let now = lost.core.status();
    assert!(now.state_lost && lost.committed.is_empty(), "{now:?}");
    assert_eq!((now.leader, now.term, now.last), (None, status.term, status.last), "it keeps its log and its vote");
    let old = SnapshotMeta { index: now.base, ..meta.clone() };
    assert!(lost.core.prepare_snapshot(old).is_err(), "an image of no more than the base does not help");

    lost.core.prepare_snapshot(meta.clone()).unwrap();
    lost.turn();
    assert_eq!(lost.prepared.as_ref(), Some(&meta));
    // The first attempt fails: it must still not go on without the state.
    let mut out = Output::default();
    lost.core.abandon_snapshot(&mut out);
    lost.drain(out);
    lost.turn();
    assert!(lost.core.status().state_lost && lost.committed.is_empty());
    lost.prepared = None;
    lost.core.prepare_snapshot(meta.clone()).unwrap();
    lost.turn();
    let mut out = Output::default();
    lost.core.install_snapshot(&meta, &mut out).unwrap();
    lost.drain(out);
    lost.turn();
    assert!(!lost.core.status().state_lost);
    lost.lead();
    let after: Vec<_> = all.iter().filter(|entry| entry.index > meta.index).map(|entry| &entry.kind).collect();
    let found: Vec<_> = lost.committed.iter().map(|entry| &entry.kind).take(after.len()).collect();
    assert_eq!(found, after);

    // A new log is not a lost state.
    let fresh = Solo::open_with(config.clone(), format(&config, &Initial::Join), None);
    assert!(!fresh.core.status().state_lost);
}

#[test]
fn a_lost_state_comes_back_from_an_image() {
    a_node_without_its_state_waits_for_an_image_and_goes_on_with_its_log();
}
