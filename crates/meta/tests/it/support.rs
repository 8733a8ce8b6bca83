//! A cluster's log in a test: numbers commands, keeps the time, opens sessions.

use cairn_meta::{Answer, Applied, Command, Kv, MemKv, Meta, MetaEffect, Recipient};
use cairn_types::{ClientId, ClusterId, CsId, HostId, InodeId, MdsId};
use cairn_wire::mds::*;
use std::collections::BTreeMap;

pub const SECOND: u64 = 1_000_000_000;

/// A state machine with a log that only grows.
pub struct World<K = MemKv> {
    pub meta: Meta<K>,
    pub log: Vec<Vec<u8>>,
    pub wall_ns: u64,
    pub effects: Vec<MetaEffect>,
    sequences: BTreeMap<ClientId, u64>,
    nonce: u64,
    /// Index before the first entry of the log.
    base: u64,
}

impl World<MemKv> {
    pub fn new() -> Self {
        World::over(MemKv::new())
    }
}

impl<K: Kv> World<K> {
    pub fn over(kv: K) -> Self {
        let meta = Meta::open(kv);
        let mut world = World {
            meta,
            log: Vec::new(),
            wall_ns: 1_000 * SECOND,
            effects: Vec::new(),
            sequences: BTreeMap::new(),
            nonce: 0,
            base: 0,
        };
        let first = MdsInfo { mds: MdsId(1), addr: addr(1), voter: true, repository: "/m".into() };
        let wall_ns = world.wall_ns;
        world
            .command(Command::Bootstrap { cluster: ClusterId([7; 16]), name: "stor1".into(), first, wall_ns })
            .unwrap();
        world
    }

    /// A state that a log goes on from.
    pub fn resume(kv: K, wall_ns: u64) -> Self {
        let meta = Meta::open(kv);
        let base = meta.applied_index();
        let (log, effects, sequences) = (Vec::new(), Vec::new(), BTreeMap::new());
        World { meta, log, wall_ns, effects, sequences, nonce: 1_000_000, base }
    }

    pub fn command(&mut self, command: Command) -> Answer {
        self.raw(command.encode()).reply
    }

    pub fn raw(&mut self, bytes: Vec<u8>) -> Applied {
        let applied = self.meta.apply(self.base + self.log.len() as u64 + 1, &bytes);
        self.log.push(bytes);
        self.effects.extend(applied.effects.iter().cloned());
        applied
    }

    pub fn tick(&mut self, ns: u64) {
        self.wall_ns += ns;
        self.command(Command::Tick { wall_ns: self.wall_ns }).unwrap();
    }

    /// Ticks until nothing is due at once.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            self.tick(1);
            if !self.meta.has_work() {
                return;
            }
        }
        panic!("background work does not end");
    }

    pub fn envelope(&mut self, session: ClientId, request: MdsRequest) -> Call {
        let numbered = session != ClientId(0) && !request.is_read();
        let sequence = if numbered {
            let sequence = self.sequences.entry(session).or_default();
            *sequence += 1;
            *sequence
        } else {
            0
        };
        self.wall_ns += 1;
        Call { session, sequence, acknowledged: sequence.saturating_sub(1), wall_ns: self.wall_ns, request }
    }

    pub fn send(&mut self, call: Call) -> Answer {
        let wall_ns = self.wall_ns;
        self.command(Command::Call { call, wall_ns })
    }

    pub fn call(&mut self, session: ClientId, request: MdsRequest) -> Answer {
        let call = self.envelope(session, request);
        self.send(call)
    }

    pub fn session(&mut self) -> ClientId {
        self.nonce += 1;
        let request = MdsRequest::SessionOpen {
            kind: SessionKind::Client,
            host: HostId([1; 16]),
            host_name: "host".into(),
            purpose: "test".into(),
            nonce: self.nonce,
        };
        match self.call(ClientId(0), request).unwrap() {
            MdsReply::Session { client, .. } => client,
            other => panic!("{other:?}"),
        }
    }

    pub fn server(&mut self, host: u8, capacity: u64) -> CsId {
        let number = 40 + self.meta.servers().count() as u8;
        let location = Location {
            host: HostId([host; 16]),
            host_name: format!("host{host}"),
            rack: String::new(),
            row: String::new(),
            room: String::new(),
            site: String::new(),
        };
        let request = MdsRequest::CsRegister(CsProfile {
            cs: None,
            store: [number; 16],
            addr: addr(u16::from(number)),
            location,
            tier: 0,
            capacity,
            repository: "/c".into(),
        });
        match self.call(ClientId(0), request).unwrap() {
            MdsReply::CsRegistered { cs, .. } => cs,
            other => panic!("{other:?}"),
        }
    }

    pub fn heartbeat(&mut self, cs: CsId, capacity: u64, used: u64, done: Vec<OrderDone>) -> Vec<CsOrder> {
        let stats = CsStats { capacity, used, ..CsStats::default() };
        let request = MdsRequest::CsHeartbeat { cs, boot: 1, stats, done, damaged: Vec::new(), failed: None };
        match self.call(ClientId(0), request).unwrap() {
            MdsReply::Orders(orders) => orders,
            other => panic!("{other:?}"),
        }
    }

    pub fn volume(&mut self, session: ClientId, name: &str, options: VolumeOptions) -> VolumeInfo {
        let request = MdsRequest::VolumeCreate { name: name.into(), size: 1 << 40, options };
        match self.call(session, request).unwrap() {
            MdsReply::Volume(info) => info,
            other => panic!("{other:?}"),
        }
    }

    pub fn acquire(
        &mut self,
        session: ClientId,
        volume: cairn_types::VolumeId,
        mode: LeaseMode,
    ) -> Result<LeaseGrant, MdsError> {
        match self.call(session, MdsRequest::LeaseAcquire { volume, mode })? {
            MdsReply::Lease(grant) => Ok(grant),
            other => panic!("{other:?}"),
        }
    }

    pub fn make(&mut self, session: ClientId, parent: InodeId, name: &str, kind: InodeKind) -> Result<Attr, MdsError> {
        let request = MdsRequest::Create {
            parent,
            name: name.as_bytes().to_vec(),
            kind,
            mode: 0o644,
            uid: 1,
            gid: 2,
            rdev: 0,
            lease: false,
        };
        match self.call(session, request)? {
            MdsReply::CreatedIn { attr, .. } => Ok(attr),
            other => panic!("{other:?}"),
        }
    }

    pub fn attr(&self, inode: InodeId) -> Option<Attr> {
        match self.meta.query(&MdsRequest::GetAttr { inode }) {
            Ok(MdsReply::Attr(attr)) => Some(attr),
            _ => None,
        }
    }

    pub fn chunks(&self, volume: cairn_types::VolumeId) -> Vec<ChunkEntry> {
        match self.meta.query(&MdsRequest::ChunkMap { volume, index: 0, limit: u32::MAX }) {
            Ok(MdsReply::Chunks(entries)) => entries,
            other => panic!("{other:?}"),
        }
    }

    /// Pushes for one recipient since the last look.
    pub fn pushes(&mut self, recipient: Recipient) -> Vec<Push> {
        let mine = |effect: &MetaEffect| match effect {
            MetaEffect::Push { to, push } if *to == recipient => Some(push.clone()),
            _ => None,
        };
        let pushes = self.effects.iter().filter_map(mine).collect();
        self.effects.retain(|effect| mine(effect).is_none());
        pushes
    }
}

pub fn addr(port: u16) -> std::net::SocketAddr {
    ([127, 0, 0, 1], port).into()
}

pub fn posix<T: std::fmt::Debug>(result: Result<T, MdsError>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(MdsError::Posix(errno)) => errno,
        other => panic!("{other:?}"),
    }
}
