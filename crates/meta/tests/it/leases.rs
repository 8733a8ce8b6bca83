//! Leases and sessions: one exclusive holder, rising epochs, every call once.

use crate::support::World;
use cairn_meta::{Command, MetaEffect, Recipient, SESSION_WINDOW};
use cairn_stdx::Rng;
use cairn_types::{ClientId, Epoch, InodeId, VolumeId};
use cairn_wire::mds::*;
use std::collections::BTreeMap;

#[test]
pub fn whoever_asks_there_is_one_exclusive_holder_and_epochs_rise() {
    for seed in 0..30 {
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        let mut sessions: Vec<ClientId> = (0..4).map(|_| world.session()).collect();
        let volume = world.volume(sessions[0], "v", VolumeOptions::default()).volume;
        // What each session was granted and neither gave back nor lost.
        let mut holders: BTreeMap<ClientId, (LeaseMode, Epoch)> = BTreeMap::new();
        let mut ended: Vec<ClientId> = Vec::new();
        let (mut highest, mut dirty) = (Epoch(0), false);
        for step in 0..400 {
            let at = rng.below(4) as usize;
            let session = sessions[at];
            match rng.below(10) {
                0..=4 => {
                    let mode = if rng.chance(1, 2) { LeaseMode::Exclusive } else { LeaseMode::Shared };
                    let others = || holders.iter().filter(|(client, _)| **client != session);
                    let conflict =
                        others().any(|(_, (held, _))| *held == LeaseMode::Exclusive || mode == LeaseMode::Exclusive);
                    match world.acquire(session, volume, mode) {
                        Ok(grant) => {
                            assert!(!conflict, "seed {seed} step {step}: granted beside {holders:?}");
                            assert_eq!(grant.clean, !dirty, "seed {seed} step {step}");
                            assert!(grant.mode == mode || !grant.clean);
                            let joins = grant.mode == LeaseMode::Shared && grant.epoch == highest;
                            assert!(
                                grant.epoch > highest || joins,
                                "seed {seed} step {step}: epoch {} again",
                                grant.epoch
                            );
                            if grant.mode == LeaseMode::Shared {
                                assert!(others().all(|(_, (_, epoch))| *epoch == grant.epoch));
                            } else {
                                dirty = true;
                            }
                            highest = grant.epoch;
                            holders.insert(session, (grant.mode, grant.epoch));
                        }
                        Err(MdsError::Held { holder, alive, .. }) => {
                            assert!(conflict && holders.contains_key(&holder), "seed {seed} step {step}");
                            assert_eq!(alive, !ended.contains(&holder));
                            let recall = Push::LeaseRecall { volume, wanted: mode };
                            assert!(world.pushes(Recipient::Session(holder)).contains(&recall));
                        }
                        other => panic!("{other:?}"),
                    }
                }
                5..=7 => {
                    if let Some((mode, epoch)) = holders.remove(&session) {
                        let clean = rng.chance(3, 4);
                        let stale = vec![(volume, Epoch(epoch.0 - 1), true), (VolumeId(99), epoch, true)];
                        world.call(session, MdsRequest::LeaseRelease { leases: stale }).unwrap();
                        world.call(session, MdsRequest::LeaseRelease { leases: vec![(volume, epoch, clean)] }).unwrap();
                        if mode == LeaseMode::Exclusive {
                            dirty = !clean;
                        }
                    }
                }
                8 => {
                    if rng.chance(1, 2) {
                        world.command(Command::SessionExpired { client: session }).unwrap();
                        assert!(world.effects.contains(&MetaEffect::SessionEnded(session)));
                        ended.push(session);
                    } else {
                        world.call(session, MdsRequest::SessionClose).unwrap();
                        if holders.remove(&session).is_some_and(|(mode, _)| mode == LeaseMode::Exclusive) {
                            dirty = false;
                        }
                    }
                    assert_eq!(world.call(session, MdsRequest::SessionRenew), Err(MdsError::SessionEnded(session)));
                    sessions[at] = world.session();
                }
                _ => {
                    if let Some(client) = ended.pop() {
                        world.command(Command::LeasesFree { client }).unwrap();
                        holders.remove(&client);
                    }
                }
            }
            world.meta.check();
        }
    }
}

#[test]
fn only_the_holder_of_the_epoch_changes_the_map() {
    let mut world = World::new();
    for host in 0..3 {
        world.server(host, 1 << 40);
    }
    let (one, two) = (world.session(), world.session());
    let volume = world.volume(one, "v", VolumeOptions::default()).volume;
    let grant = world.acquire(one, volume, LeaseMode::Exclusive).unwrap();
    let allocate = |epoch| MdsRequest::ChunkAllocate { volume, epoch, indexes: vec![0, 5] };
    assert!(matches!(world.call(two, allocate(grant.epoch)), Err(MdsError::StaleEpoch { .. })));
    assert!(matches!(world.call(one, allocate(Epoch(0))), Err(MdsError::StaleEpoch { .. })));
    let MdsReply::Chunks(first) = world.call(one, allocate(grant.epoch)).unwrap() else { panic!() };
    let MdsReply::Chunks(again) = world.call(one, allocate(grant.epoch)).unwrap() else { panic!() };
    assert_eq!((first.len(), &first), (2, &again));
    assert_eq!(world.acquire(one, volume, LeaseMode::Exclusive).unwrap().servers.len(), 3);
    assert!(matches!(world.call(one, allocate(grant.epoch)), Err(MdsError::StaleEpoch { .. })));
    assert!(matches!(world.call(two, MdsRequest::VolumeDelete { volume }), Err(MdsError::Held { .. })));
}

#[test]
pub fn a_call_takes_effect_once_however_often_it_comes() {
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        let session = world.session();
        let mut sent: Vec<(Call, Result<MdsReply, MdsError>)> = Vec::new();
        for step in 0..300 {
            if rng.chance(1, 2) && !sent.is_empty() {
                // A late duplicate: the same answer, or refused when its answer was acknowledged; never an effect.
                let newest = sent.last().unwrap().0.acknowledged;
                let (call, answer) = rng.choose(&sent).unwrap().clone();
                let before = world.meta.state_hash();
                let again = world.send(call.clone());
                assert_eq!(world.meta.state_hash(), before, "seed {seed} step {step}: {call:?}");
                if call.sequence > newest {
                    assert_eq!(again, answer, "seed {seed} step {step}: {call:?}");
                } else {
                    assert!(matches!(again, Err(MdsError::Refused(_))), "{again:?}");
                }
                continue;
            }
            let name = |rng: &mut Rng| vec![b'a' + rng.below(4) as u8];
            let parent = InodeId::ROOT;
            let request = match rng.below(3) {
                0 => MdsRequest::Create {
                    parent,
                    name: name(&mut rng),
                    kind: InodeKind::File,
                    mode: 0,
                    uid: 0,
                    gid: 0,
                    rdev: 0,
                    lease: false,
                },
                1 => MdsRequest::Unlink { parent, name: name(&mut rng) },
                _ => MdsRequest::Rename {
                    parent,
                    name: name(&mut rng),
                    new_parent: parent,
                    new_name: name(&mut rng),
                    mode: RenameMode::Replace,
                },
            };
            let mut call = world.envelope(session, request);
            call.acknowledged = call.sequence.saturating_sub(1 + rng.below(20));
            call.acknowledged = call.acknowledged.max(sent.last().map_or(0, |(call, _)| call.acknowledged));
            let answer = world.send(call.clone());
            sent.push((call, answer));
        }
    }
}

#[test]
fn a_session_has_a_bounded_window_and_opens_once() {
    let mut world = World::new();
    let session = world.session();
    let set = |key: u8| MdsRequest::KvPut { key: vec![key], value: Vec::new(), expected: None };
    for _ in 0..SESSION_WINDOW {
        let mut call = world.envelope(session, set(1));
        call.acknowledged = 0;
        world.send(call).unwrap();
    }
    let mut call = world.envelope(session, set(1));
    call.acknowledged = 0;
    assert!(matches!(world.send(call.clone()), Err(MdsError::Refused(_))));
    call.acknowledged = 10;
    assert!(world.send(call).is_ok());
    let open = MdsRequest::SessionOpen {
        kind: SessionKind::Admin,
        host: cairn_types::HostId([9; 16]),
        host_name: "h".into(),
        purpose: "p".into(),
        nonce: 77,
    };
    let first = world.call(ClientId(0), open.clone()).unwrap();
    assert_eq!(world.call(ClientId(0), open).unwrap(), first);
}
