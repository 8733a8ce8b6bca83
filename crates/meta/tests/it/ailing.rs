//! Metadata servers without room, or far behind: what is refused, and what the log of events says.

use crate::support::{World, addr};
use cairn_meta::Command;
use cairn_types::{ClientId, InodeId, MdsId};
use cairn_wire::mds::*;

fn codes(world: &World) -> Vec<String> {
    let Ok(MdsReply::Events(events)) = world.meta.query(&MdsRequest::Events { after: 0, limit: 4096 }) else {
        panic!()
    };
    events.into_iter().map(|event| event.code).filter(|code| code.starts_with("MDS-103")).collect()
}

/// A world with three metadata servers that vote.
fn three_servers() -> (World, ClientId) {
    let mut world = World::new();
    let session = world.session();
    for nth in 2..=3 {
        let add = MdsRequest::MdsAdd { addr: addr(nth as u16), repository: "/m".into(), nonce: nth };
        world.call(ClientId(0), add).unwrap();
        let wall_ns = world.wall_ns;
        world.command(Command::MdsVoter { mds: MdsId(nth), voter: true, wall_ns }).unwrap();
    }
    (world, session)
}

fn condition(world: &mut World, mds: u64, no_room: bool, lag: MdsLag) {
    let condition = MdsCondition { no_room, lag };
    let wall_ns = world.wall_ns;
    let command =
        Command::MdsCondition { mds: MdsId(mds), condition, free: 7 << 20, lacks: 1200, silent_s: 11, wall_ns };
    world.command(command).unwrap();
}

#[test]
pub fn what_adds_to_the_metadata_is_refused_while_too_few_servers_have_room() {
    let (mut world, session) = three_servers();
    let make = |world: &mut World, name: &str| world.make(session, InodeId::ROOT, name, InodeKind::File);
    make(&mut world, "before").unwrap();
    condition(&mut world, 1, true, MdsLag::None);
    make(&mut world, "one is full").unwrap();
    condition(&mut world, 3, true, MdsLag::None);
    condition(&mut world, 3, true, MdsLag::None);
    assert_eq!(codes(&world), ["MDS-1030", "MDS-1030", "MDS-1037"], "each change is told once");

    // Refused: the refusal is the answer, also to a repetition after there is room.
    let Err(MdsError::NoSpace(why)) = make(&mut world, "two are full") else { panic!("it is refused") };
    assert!(why.contains("MDS#1, MDS#3"), "{why}");
    let key = MdsRequest::KvPut { key: b"k".to_vec(), value: b"v".to_vec(), expected: None };
    let other = world.session();
    let put = world.envelope(other, key);
    assert!(matches!(world.send(put.clone()), Err(MdsError::NoSpace(_))));
    assert!(matches!(make(&mut world, "before"), Err(MdsError::Posix(17))), "what exists is said to exist");
    // What was answered before stays answered, what frees room and what keeps the cluster alive goes on.
    let unlink = MdsRequest::Unlink { parent: InodeId::ROOT, name: b"before".to_vec() };
    world.call(session, unlink).unwrap();
    world.server(1, 1 << 40);
    world.session();
    let rename = |from: &str, to: &str| MdsRequest::Rename {
        parent: InodeId::ROOT,
        name: from.as_bytes().to_vec(),
        new_parent: InodeId::ROOT,
        new_name: to.as_bytes().to_vec(),
        mode: RenameMode::NoReplace,
    };
    world.call(session, rename("one is full", "renamed")).unwrap();
    world.call(session, MdsRequest::MdsRemove { mds: MdsId(2) }).unwrap();
    world.meta.check();

    let Ok(MdsReply::Stat(stat)) = world.meta.query(&MdsRequest::Stat) else { panic!() };
    let no_room = MdsCondition { no_room: true, lag: MdsLag::None };
    assert_eq!(stat.mds_ill, [(MdsId(1), no_room), (MdsId(3), no_room)]);
    assert_eq!(stat.health, ClusterHealth::Degraded);

    condition(&mut world, 1, false, MdsLag::None);
    assert_eq!(codes(&world)[3..], ["MDS-1031", "MDS-1038"]);
    make(&mut world, "two are full").unwrap();
    assert!(matches!(world.send(put), Err(MdsError::NoSpace(_))), "a call has one answer (I18)");

    // The state survives its checkpoint, and a server that leaves takes its condition along.
    let wall_ns = world.wall_ns;
    let mut world = World::resume(world.meta.into_kv(), wall_ns);
    assert_eq!(world.meta.mds_condition(MdsId(3)), no_room);
    condition(&mut world, 1, true, MdsLag::None);
    assert!(world.meta.lacks_room());
    world.command(Command::MdsLeft { mds: MdsId(3), wall_ns }).unwrap();
    world.command(Command::MdsLeft { mds: MdsId(1), wall_ns }).unwrap();
    assert!(!world.meta.lacks_room());
}

#[test]
fn a_lagging_metadata_server_and_a_new_leader_are_told_once() {
    let (mut world, _) = three_servers();
    let lags = [MdsLag::Behind, MdsLag::Behind, MdsLag::Silent, MdsLag::Resync, MdsLag::None, MdsLag::None];
    lags.into_iter().for_each(|lag| condition(&mut world, 2, false, lag));
    assert_eq!(codes(&world), ["MDS-1032", "MDS-1033", "MDS-1034", "MDS-1035"]);
    condition(&mut world, 9, true, MdsLag::Silent);
    let wall_ns = world.wall_ns;
    for (mds, term) in [(1, 4), (1, 4), (2, 3), (2, 5)] {
        world.command(Command::MdsLeads { mds: MdsId(mds), term, wall_ns }).unwrap();
    }
    assert_eq!(codes(&world)[4..], ["MDS-1036", "MDS-1036"]);
    assert_eq!(world.meta.leader_told(), Some((MdsId(2), 5)));
    let Ok(MdsReply::Stat(stat)) = world.meta.query(&MdsRequest::Stat) else { panic!() };
    assert_eq!(stat.mds_ill, []);
}
