//! Commands of the metadata log, applied to a cluster that holds something of everything.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, script, seed, unsealed};
use cairn_meta::{Command, MemKv, Meta};
use cairn_types::{ClientId, CsId, HostId, InodeId, Level, MdsId};
use cairn_wire::mds::*;
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "meta_command",
    covers: "commands of the metadata log and queries, decoded and carried out in any order; then the whole state is \
             held against itself, stored and opened again",
    entry: "cairn_meta::Meta::{apply, query}",
    shape: Shape::Script,
    bound: Bound {
        base: 2 << 20,
        factor: 48,
        why: "an answer lists what the state holds, up to the limits of lists, and a command changes records of it",
    },
    run,
    seal: unsealed,
    seeds,
};

thread_local! {
    static BASE: RefCell<Option<MemKv>> = const { RefCell::new(None) };
}

struct World {
    meta: Meta<MemKv>,
    index: u64,
    sequence: u64,
}

impl World {
    fn command(&mut self, command: &Command) -> Result<MdsReply, MdsError> {
        self.index += 1;
        self.meta.apply(self.index, &command.encode()).reply
    }

    /// True for what no leader logs before the cluster is raised: a state that meets it stops loudly (I15).
    fn is_never_logged(&self, level: Level, command: &Command) -> bool {
        let raises =
            matches!(command, Command::Call { call, .. } if matches!(call.request, MdsRequest::LevelRaise { .. }));
        level > self.meta.level() && !raises && !matches!(command, Command::Bootstrap { .. })
    }

    fn call(&mut self, session: u64, request: MdsRequest) -> Result<MdsReply, MdsError> {
        self.sequence += 1;
        let (sequence, acknowledged) = (self.sequence, self.sequence - 1);
        let call = Call { session: ClientId(session), sequence, acknowledged, wall_ns: 1, request };
        self.command(&Command::Call { call, wall_ns: 1 })
    }
}

/// A cluster with three chunk servers, a session, a file, a directory, a volume with chunks.
fn good() -> MemKv {
    let mut world = World { meta: Meta::open(MemKv::new()), index: 0, sequence: 0 };
    let first = MdsInfo { mds: MdsId(1), addr: samples::addr(7001), voter: true, repository: "/m".into() };
    let bootstrap = Command::Bootstrap { cluster: samples::CLUSTER, name: "stor1".into(), first, wall_ns: 1 };
    world.command(&bootstrap).expect("a first command");
    for number in 1..=4u8 {
        let register = MdsRequest::CsRegister(CsProfile {
            cs: None,
            store: [number; 16],
            addr: samples::addr(6000 + u16::from(number)),
            location: Location { host: HostId([number; 16]), host_name: format!("host{number}"), ..Default::default() },
            tier: 0,
            capacity: 1 << 40,
            repository: "/c".into(),
        });
        world.call(0, register).expect("a new server");
    }
    let open = MdsRequest::SessionOpen {
        kind: SessionKind::Client,
        host: HostId([1; 16]),
        host_name: "host".into(),
        purpose: "test".into(),
        nonce: 1,
    };
    let Ok(MdsReply::Session { client, .. }) = world.call(0, open) else { panic!("a session opens") };
    let create = |name: &[u8], kind| MdsRequest::Create {
        parent: InodeId::ROOT,
        name: name.to_vec(),
        kind,
        mode: 0o755,
        uid: 1,
        gid: 1,
        rdev: 0,
        lease: false,
    };
    let volume = MdsRequest::VolumeCreate { name: "vm1".into(), size: 1 << 30, options: VolumeOptions::default() };
    let Ok(MdsReply::Volume(volume)) = world.call(client.0, volume) else { panic!("a volume is made") };
    for (name, kind) in [(&b"a file"[..], InodeKind::File), (b"dir", InodeKind::Directory)] {
        world.call(client.0, create(name, kind)).expect("a name is made");
    }
    let lease = MdsRequest::LeaseAcquire { volume: volume.volume, mode: LeaseMode::Exclusive };
    let Ok(MdsReply::Lease(grant)) = world.call(client.0, lease) else { panic!("a lease is granted") };
    let allocate =
        MdsRequest::ChunkAllocate { volume: volume.volume, epoch: grant.epoch, indexes: vec![0, 1, 2, 3, 9] };
    world.call(client.0, allocate).expect("there is room");
    let put = MdsRequest::KvPut { key: b"key".to_vec(), value: b"value".to_vec(), expected: None };
    world.call(client.0, put).expect("a key is put");
    world
        .command(&Command::CsSilent { cs: CsId(1028), state: CsState::Inactive, wall_ns: 1 })
        .expect("a server is silent");
    world.meta.checkpoint();
    world.meta.into_kv()
}

/// Pieces by kind: a command, a query, a call of session 1 with its number in order, a tick.
fn run(bytes: &[u8]) {
    let kv = BASE.with(|base| base.borrow_mut().get_or_insert_with(good).clone());
    let meta = Meta::open(kv);
    let mut world = World { index: meta.applied_index(), meta, sequence: 200 };
    for (kind, piece) in script::pieces(bytes) {
        match kind & 3 {
            0 => {
                if Command::decode(piece, Level::CURRENT)
                    .is_ok_and(|(level, command)| world.is_never_logged(level, &command))
                {
                    continue;
                }
                world.index += 1;
                let applied = measured(piece.len(), || world.meta.apply(world.index, piece));
                let again = cairn_wire::encode(&applied.reply);
                assert_eq!(cairn_wire::decode("answer", &again), Ok(applied.reply), "an answer survives the trip");
            }
            1 => {
                if let Ok(request) = cairn_wire::decode::<MdsRequest>("request", piece)
                    && request.is_read()
                {
                    let _ = measured(piece.len(), || world.meta.query(&request));
                }
            }
            2 => {
                if let Ok(request) = cairn_wire::decode::<MdsRequest>("request", piece)
                    && (request.level() <= world.meta.level() || matches!(request, MdsRequest::LevelRaise { .. }))
                {
                    let _ = world.call(1, request);
                }
            }
            _ => {
                let wall_ns = piece.iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
                let _ = world.command(&Command::Tick { wall_ns });
            }
        }
    }
    world.meta.check();
    world.meta.checkpoint();
    let hash = world.meta.full_hash();
    let again = Meta::open(world.meta.into_kv());
    assert_eq!(again.full_hash(), hash, "a stored state opens as it was");
}

fn seeds() -> Seeds {
    let wall_ns = 5;
    let mut seeds: Seeds = samples::calls()
        .into_iter()
        .map(|(name, call)| {
            let command = Command::Call { call: Call { sequence: 201, acknowledged: 200, ..call.clone() }, wall_ns };
            let request = cairn_wire::encode(&call.request);
            let pieces: [(u8, &[u8]); 3] = [(0, &command.encode()), (1, &request), (2, &request)];
            seed(name, script::script(pieces))
        })
        .collect();
    let no_room = MdsCondition { no_room: true, lag: MdsLag::Behind };
    let condition =
        Command::MdsCondition { mds: MdsId(1), condition: no_room, free: 1 << 20, lacks: 1001, silent_s: 11, wall_ns };
    let own = [
        ("own_expired", Command::SessionExpired { client: ClientId(1) }),
        ("own_free", Command::LeasesFree { client: ClientId(1) }),
        ("own_silent", Command::CsSilent { cs: CsId(1025), state: CsState::Offline, wall_ns }),
        ("own_back", Command::CsBack { cs: CsId(1025), wall_ns }),
        ("own_voter", Command::MdsVoter { mds: MdsId(1), voter: false, wall_ns }),
        ("own_left", Command::MdsLeft { mds: MdsId(1), wall_ns }),
        ("own_condition", condition),
        ("own_leads", Command::MdsLeads { mds: MdsId(1), term: 3, wall_ns }),
        ("own_tick", Command::Tick { wall_ns: 1 << 50 }),
    ];
    seeds.extend(own.into_iter().map(|(name, command)| seed(name, script::script([(0, &command.encode()[..])]))));
    // A life: names made, renamed, removed; a server lost; a session ended.
    let all = samples::requests();
    let mut life = Vec::new();
    for wanted in
        ["lease_acquire", "chunk_allocate", "create", "rename", "replica_failed", "chunk_drop", "volume_delete"]
    {
        let (_, request) = all.iter().find(|(name, _)| *name == wanted).expect("a sample");
        script::put(&mut life, 2, &cairn_wire::encode(request));
    }
    script::put(&mut life, 0, &Command::SessionExpired { client: ClientId(1) }.encode());
    script::put(&mut life, 3, &[1, 0, 0, 0, 0, 0]);
    script::put(&mut life, 1, &cairn_wire::encode(&MdsRequest::VolumeGet { name: "vm1".into() }));
    seeds.push(seed("life", life));
    seeds
}
