//! A small world in virtual time: real chunk servers over simulated disks, the real metadata state machine behind a
//! thin server, clients; links are queues with delays.

use cairn_client::{ClientCore, Completion, CoreConfig, Notice, OnNoSpace, OpenError, SizeRule, VolumeHandle};
use cairn_cs::{CsConfig, CsCore};
use cairn_env::block::{BlockError, BlockOp, BlockReply, BlockResult};
use cairn_env::{Buf, DiskRequest, IoId};
use cairn_env_sim::SimDisk;
use cairn_meta::{Command, MemKv, Meta, MetaEffect, Recipient};
use cairn_stdx::Rng;
use cairn_store::{Store, StoreConfig, StoreOptions};
use cairn_types::*;
use cairn_wire::mds::*;
use cairn_wire::{DiskIndex, Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

pub const CLUSTER: ClusterId = ClusterId([5; 16]);
pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;
pub const CHUNK: u64 = 1 << 20;
const DISK_SIZE: u64 = 64 << 20;

pub trait Node: Process {
    fn any(&mut self) -> &mut dyn Any;
}
impl<P: Process + 'static> Node for P {
    fn any(&mut self) -> &mut dyn Any {
        self
    }
}

/// The metadata servers as one: no log, no leader, only the state machine and the clocks of sessions and servers.
pub struct Mds {
    meta: Meta<MemKv>,
    index: u64,
    sessions: BTreeMap<ClientId, (LinkId, Instant)>,
    ended: BTreeMap<ClientId, Instant>,
    servers: BTreeMap<CsId, (LinkId, Instant)>,
    /// Answers to lose: the call is carried out, its answer is not sent and the link breaks.
    pub lose_answers: u32,
    /// Frames to swallow: nothing is answered at all.
    pub deaf: bool,
    pub calls: Vec<MdsRequest>,
}

impl Mds {
    fn new() -> Self {
        let mut mds = Self {
            meta: Meta::open(MemKv::new()),
            index: 0,
            sessions: BTreeMap::new(),
            ended: BTreeMap::new(),
            servers: BTreeMap::new(),
            lose_answers: 0,
            deaf: false,
            calls: Vec::new(),
        };
        let first = MdsInfo { mds: MdsId(1), addr: addr(0), voter: true, repository: "/mds".into() };
        let bootstrap = Command::Bootstrap { cluster: CLUSTER, name: "test".into(), first, wall_ns: 1 };
        mds.apply(&bootstrap, &mut Effects::default()).unwrap();
        mds
    }

    fn apply(&mut self, command: &Command, out: &mut Effects) -> Result<MdsReply, MdsError> {
        self.index += 1;
        let applied = self.meta.apply(self.index, &command.encode());
        for effect in applied.effects {
            let MetaEffect::Push { to, push } = effect else { continue };
            let links: Vec<LinkId> = match to {
                Recipient::Session(client) => self.sessions.get(&client).map(|s| s.0).into_iter().collect(),
                Recipient::Cs(cs) => self.servers.get(&cs).map(|s| s.0).into_iter().collect(),
                Recipient::Everyone => self.sessions.values().chain(self.servers.values()).map(|s| s.0).collect(),
            };
            links.into_iter().for_each(|link| out.send(link, FrameKind::MdsPush, 0, cairn_wire::encode(&push)));
        }
        applied.reply
    }

    fn call(&mut self, now: Now, link: LinkId, id: u64, call: Call, out: &mut Effects) {
        self.calls.push(call.request.clone());
        if call.session != ClientId(0) && self.meta.session_alive(call.session) {
            self.sessions.insert(call.session, (link, now.mono));
        }
        let cs = match &call.request {
            MdsRequest::CsHeartbeat { cs, .. } | MdsRequest::CsJoin { server: CsProfile { cs: Some(cs), .. }, .. } => {
                Some(*cs)
            }
            _ => None,
        };
        if let Some(cs) = cs {
            self.servers.insert(cs, (link, now.mono));
        }
        let reply = if call.request.is_read() {
            self.meta.query(&call.request)
        } else {
            self.apply(&Command::Call { call, wall_ns: now.wall_ns }, out)
        };
        if let Ok(MdsReply::Session { client, .. }) = &reply {
            self.sessions.insert(*client, (link, now.mono));
        }
        if let Ok(MdsReply::CsRegistered { cs, .. }) = &reply {
            self.servers.insert(*cs, (link, now.mono));
        }
        if self.lose_answers > 0 {
            self.lose_answers -= 1;
            out.net.push(NetEffect::Close { link });
            return;
        }
        out.send(link, FrameKind::MdsReply, id, cairn_wire::encode(&reply));
    }

    fn tick(&mut self, now: Now, out: &mut Effects) {
        let silent = |at: Instant, seconds| now.mono.saturating_since(at) > Duration::from_secs(seconds);
        let late: Vec<ClientId> = self.sessions.iter().filter(|(_, s)| silent(s.1, 10)).map(|(c, _)| *c).collect();
        for client in late {
            self.sessions.remove(&client);
            self.ended.insert(client, now.mono);
            let _ = self.apply(&Command::SessionExpired { client }, out);
        }
        let free: Vec<ClientId> = self.ended.iter().filter(|(_, at)| silent(**at, 1)).map(|(c, _)| *c).collect();
        for client in free {
            self.ended.remove(&client);
            let _ = self.apply(&Command::LeasesFree { client }, out);
        }
        let gone: Vec<CsId> = self.servers.iter().filter(|(_, s)| silent(s.1, 3)).map(|(c, _)| *c).collect();
        for cs in gone {
            self.servers.remove(&cs);
            let _ = self.apply(&Command::CsSilent { cs, state: CsState::Inactive, wall_ns: now.wall_ns }, out);
        }
        let _ = self.apply(&Command::Tick { wall_ns: now.wall_ns }, out);
        out.wake_at(now.mono + Duration::from_millis(250));
    }
}

impl Process for Mds {
    fn step(&mut self, now: Now, event: Event, out: &mut Effects) {
        match event {
            Event::Start | Event::Timer => self.tick(now, out),
            Event::Net(NetEvent::Frame { link, frame }) if !self.deaf => {
                let call = cairn_wire::decode("call", &frame.prefix).unwrap();
                self.call(now, link, frame.id, call, out);
            }
            _ => {}
        }
    }
}

struct Place {
    addr: SocketAddr,
    process: Option<Box<dyn Node>>,
    disk: SimDisk,
    incarnation: u64,
    paused: bool,
    held: Vec<Event>,
    wake: Option<u64>,
    size: u64,
    uuid: u8,
    cs: Option<CsId>,
}

enum Happening {
    Step(usize, u64, Event),
    Disk(usize, u64),
    Timer(usize, u64),
    Arrive(u64, bool),
}

struct Conn {
    /// Initiator and acceptor.
    ends: [(usize, LinkId); 2],
    queues: [VecDeque<NetEvent>; 2],
    alive: [bool; 2],
}

#[derive(Default)]
pub struct Outcomes {
    pub blocks: BTreeMap<u64, BlockResult>,
    pub opens: BTreeMap<u64, Result<VolumeHandle, OpenError>>,
    pub calls: BTreeMap<u64, Result<MdsReply, MdsError>>,
    pub closed: BTreeSet<u64>,
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    tick: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    places: Vec<Place>,
    conns: BTreeMap<u64, Conn>,
    links: BTreeMap<(usize, LinkId), (u64, usize)>,
    cut: BTreeSet<(usize, usize)>,
    next_conn: u64,
    pub outcomes: Rc<RefCell<Outcomes>>,
    pub notices: Vec<(usize, Notice)>,
    pub log: Vec<String>,
    /// Log every request and answer of the data path.
    pub trace: bool,
    tokens: u64,
    pub on_no_space: OnNoSpace,
}

pub fn addr(place: usize) -> SocketAddr {
    format!("127.0.0.1:{}", 8000 + place).parse().unwrap()
}

impl World {
    /// One metadata server at place 0, chunk servers from 1 on.
    pub fn new(seed: u64, servers: usize) -> Self {
        Self::with_disks(seed, &vec![DISK_SIZE; servers])
    }

    /// One chunk server for each of these disks.
    pub fn with_disks(seed: u64, disks: &[u64]) -> Self {
        let mut world = Self {
            now: SECOND,
            rng: Rng::new(seed),
            tick: 0,
            queue: BTreeMap::new(),
            places: Vec::new(),
            conns: BTreeMap::new(),
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            next_conn: 0,
            outcomes: Rc::default(),
            notices: Vec::new(),
            log: Vec::new(),
            trace: std::env::var_os("SEED").is_some(),
            tokens: 0,
            on_no_space: OnNoSpace::Wait,
        };
        let mds = world.add_place(DISK_SIZE);
        world.launch(mds, Box::new(Mds::new()));
        for size in disks {
            world.add_server(*size);
        }
        world.run_for(500 * MS);
        world
    }

    /// One more chunk server.
    pub fn add_server(&mut self, size: u64) -> usize {
        let place = self.add_place(size);
        self.format(place);
        self.start_cs(place);
        place
    }

    fn add_place(&mut self, size: u64) -> usize {
        let place = self.places.len();
        self.places.push(Place {
            addr: addr(place),
            process: None,
            disk: SimDisk::new(size),
            size,
            incarnation: 0,
            paused: false,
            held: Vec::new(),
            wake: None,
            uuid: place as u8,
            cs: None,
        });
        place
    }

    fn format(&mut self, place: usize) {
        let config = StoreConfig { cluster: CLUSTER, store_uuid: [place as u8; 16], capacity_bytes: 0 };
        let size = self.places[place].size;
        let disk = &mut self.places[place].disk;
        for (io, op) in cairn_store::format(&config, size).unwrap().into_iter().enumerate() {
            disk.submit(DiskRequest { io: IoId(io as u64), op });
            disk.complete(IoId(io as u64)).unwrap().result.unwrap();
        }
    }

    pub fn start_cs(&mut self, place: usize) {
        let uuid = [self.places[place].uuid; 16];
        let config = CsConfig {
            cs: self.places[place].cs,
            level: Level::CURRENT,
            cluster: CLUSTER,
            store: uuid,
            addr: addr(place),
            location: Location {
                host: HostId([place as u8; 16]),
                host_name: format!("host{place}"),
                rack: String::new(),
                row: String::new(),
                room: String::new(),
                site: String::new(),
            },
            tier: 0,
            capacity: 0,
            repository: format!("/cs{place}"),
            mds: vec![addr(0)],
            mds_known: Vec::new(),
            durable_always: false,
            scrub_chunks_per_minute: 0,
        };
        let options = StoreOptions { cluster: Some(CLUSTER), store_uuid: Some(uuid), ..Default::default() };
        let store = Store::new(self.places[place].size, options);
        let rng = Rng::new(self.rng.next_u64());
        self.launch(place, Box::new(CsCore::new(config, store, rng)));
    }

    fn launch(&mut self, place: usize, process: Box<dyn Node>) {
        let p = &mut self.places[place];
        assert!(p.process.is_none());
        p.process = Some(process);
        p.incarnation += 1;
        p.wake = None;
        self.step(place, Event::Start);
    }

    /// Adds a client and waits for its session.
    pub fn add_client(&mut self) -> usize {
        let place = self.add_place(DISK_SIZE);
        let config = CoreConfig {
            mds: vec![addr(0)],
            host: HostId([200 + place as u8; 16]),
            host_name: format!("client{place}"),
            purpose: "test".into(),
            kind: SessionKind::Client,
            on_no_space: self.on_no_space,
            call_deadline: Duration::from_secs(60),
            open_deadline: Duration::from_secs(30),
        };
        let core = ClientCore::new(config, Rng::new(self.rng.next_u64()));
        self.launch(place, Box::new(core));
        self.until(5 * SECOND, |world| world.client(place, |core| core.session().is_some()));
        place
    }

    pub fn client<R>(&mut self, place: usize, f: impl FnOnce(&mut ClientCore) -> R) -> R {
        let process = self.places[place].process.as_mut().expect("the client runs");
        f(process.any().downcast_mut().expect("a client"))
    }

    pub fn mds<R>(&mut self, f: impl FnOnce(&mut Mds) -> R) -> R {
        f(self.places[0].process.as_mut().expect("the mds runs").any().downcast_mut().expect("the mds"))
    }

    pub fn cs<R>(&mut self, place: usize, f: impl FnOnce(&mut CsCore) -> R) -> R {
        f(self.places[place].process.as_mut().expect("it runs").any().downcast_mut().expect("a chunk server"))
    }

    pub fn disk(&mut self, place: usize) -> &mut SimDisk {
        &mut self.places[place].disk
    }

    fn clock(&self) -> Now {
        Now { mono: Instant(self.now), wall_ns: self.now }
    }

    fn at(&mut self, after: u64, what: Happening) {
        self.tick += 1;
        self.queue.insert((self.now + after, self.tick), what);
    }

    pub fn with(&mut self, place: usize, f: impl FnOnce(&mut ClientCore, Now, &mut Effects)) {
        let now = self.clock();
        let mut out = Effects::default();
        self.client(place, |core| f(core, now, &mut out));
        self.carry_out(place, out);
    }

    fn step(&mut self, place: usize, event: Event) {
        let now = self.clock();
        if self.places[place].paused {
            self.places[place].held.push(event);
            return;
        }
        let Some(process) = self.places[place].process.as_mut() else { return };
        let mut out = Effects::default();
        process.step(now, event, &mut out);
        process.step(now, Event::Turn, &mut out);
        self.carry_out(place, out);
    }

    fn carry_out(&mut self, place: usize, out: Effects) {
        for line in out.log {
            self.log.push(format!("{:.6} {place}: {line}", self.now as f64 / 1e9));
        }
        assert!(out.fatal.is_none(), "{:?}", out.fatal);
        let incarnation = self.places[place].incarnation;
        for (_, request) in out.disk {
            self.places[place].disk.submit(request);
            let took = self.rng.range(20_000, 200_000);
            self.at(took, Happening::Disk(place, incarnation));
        }
        if let Some(at) = out.wake_at {
            let due = at.0.max(self.now + 1);
            if self.places[place].wake.is_none_or(|wake| due < wake) {
                self.places[place].wake = Some(due);
                self.at(due - self.now, Happening::Timer(place, incarnation));
            }
        }
        for effect in out.net {
            self.net(place, effect);
        }
        let mut notices = Vec::new();
        if let Some(core) = self.places[place].process.as_mut().and_then(|p| p.any().downcast_mut::<ClientCore>()) {
            for completion in core.take_completions() {
                match completion {
                    Completion::Notice(notice) => notices.push((place, notice)),
                    other => other.run(),
                }
            }
        }
        self.notices.extend(notices);
    }

    fn identity(&mut self, place: usize) -> NodeId {
        if place == 0 {
            return NodeId::Mds(MdsId(1));
        }
        match self.places[place].process.as_mut().map(|p| p.any()) {
            Some(any) => match any.downcast_mut::<CsCore>() {
                Some(core) => NodeId::Cs(core.id().unwrap_or(CsId(0))),
                None => NodeId::Client(ClientId(0)),
            },
            None => NodeId::Client(ClientId(0)),
        }
    }

    fn net(&mut self, place: usize, effect: NetEffect) {
        match effect {
            NetEffect::Connect { link, addr } => {
                if self.trace {
                    self.log.push(format!("{:.6} {place} connects to {addr}", self.now as f64 / 1e9));
                }
                let to = self.places.iter().position(|p| p.addr == addr).expect("an address of the world");
                let blocked = self.cut.contains(&(place, to)) || self.cut.contains(&(to, place));
                let incarnation = self.places[place].incarnation;
                if blocked || self.places[to].process.is_none() {
                    let after = if blocked { 3 * SECOND } else { 100_000 };
                    let down = NetEvent::Down { link, reason: "cannot connect".into() };
                    self.at(after, Happening::Step(place, incarnation, Event::Net(down)));
                    return;
                }
                self.next_conn += 1;
                let conn = self.next_conn;
                let accepted = LinkId(LinkId::ACCEPTED | conn);
                self.links.insert((place, link), (conn, 0));
                self.links.insert((to, accepted), (conn, 1));
                let ends = [(place, link), (to, accepted)];
                self.conns.insert(conn, Conn { ends, queues: Default::default(), alive: [true; 2] });
                let (here, there) = (self.identity(place), self.identity(to));
                self.send(conn, 0, NetEvent::Up { link, peer: there, level: Level::CURRENT });
                self.send(conn, 1, NetEvent::Up { link: accepted, peer: here, level: Level::CURRENT });
            }
            NetEffect::Send { link, kind, id, prefix, payload } => {
                let Some((conn, side)) = self.links.get(&(place, link)).copied() else { return };
                let bytes: Vec<u8> = payload.iter().flat_map(|piece| piece.to_vec()).collect();
                let (there, to) = self.conns[&conn].ends[1 - side];
                if self.trace {
                    self.trace_frame(place, there, kind, id, &prefix, bytes.first().copied());
                }
                let frame = Frame { kind, id, prefix, payload: Buf::copy_from(&bytes) };
                self.send(conn, 1 - side, NetEvent::Frame { link: to, frame });
            }
            NetEffect::Close { link } => {
                if let Some((conn, side)) = self.links.remove(&(place, link)) {
                    self.conns.get_mut(&conn).unwrap().alive[side] = false;
                    let to = self.conns[&conn].ends[1 - side].1;
                    self.send(conn, 1 - side, NetEvent::Down { link: to, reason: "closed by the peer".into() });
                }
            }
        }
    }

    fn trace_frame(&mut self, from: usize, to: usize, kind: FrameKind, id: u64, prefix: &[u8], first: Option<u8>) {
        let text = match kind {
            FrameKind::Data => match cairn_wire::data::DataRequest::decode(prefix, first.map_or(0, |_| 4096)) {
                Ok(r) => format!(
                    "{:?} {} {} {} s{} S{} {}+{} flags {} {first:?}",
                    r.op, r.chunk, r.version, r.epoch, r.sequence.0, r.settled.0, r.first_block, r.block_count, r.flags
                ),
                Err(_) => "data of many blocks".into(),
            },
            FrameKind::DataReply => match cairn_wire::data::DataReply::decode(prefix, first.map_or(0, |_| 4096)) {
                Ok(r) => format!("{:?} D{} detail {} {first:?}", r.status, r.durable.0, r.detail),
                Err(_) => "data of many blocks".into(),
            },
            FrameKind::CsCall => format!("{:?}", cairn_wire::decode::<cairn_wire::cs::CsRequest>("", prefix)),
            FrameKind::CsReply => {
                type Reply = Result<cairn_wire::cs::CsReply, cairn_wire::cs::CsError>;
                format!("{:?}", cairn_wire::decode::<Reply>("", prefix))
            }
            kind => format!("{kind:?}"),
        };
        self.log.push(format!("{:.6} {from}->{to} #{id} {text}", self.now as f64 / 1e9));
    }

    fn send(&mut self, conn: u64, side: usize, event: NetEvent) {
        let c = self.conns.get_mut(&conn).unwrap();
        c.queues[side].push_back(event);
        let after = self.rng.range(20_000, 300_000);
        self.at(after, Happening::Arrive(conn, side == 1));
    }

    fn arrive(&mut self, id: u64, acceptor: bool) {
        let side = usize::from(acceptor);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let (to, from) = (conn.ends[side], conn.ends[1 - side]);
        if self.cut.contains(&(from.0, to.0)) {
            return;
        }
        let Some(event) = conn.queues[side].pop_front() else { return };
        if !conn.alive[side] {
            return;
        }
        if let NetEvent::Down { .. } = event {
            conn.alive[side] = false;
            self.links.remove(&to);
        }
        self.step(to.0, Event::Net(event));
    }

    /// Breaks every connection between two places: both sides learn of it, what is under way is lost.
    pub fn reset(&mut self, a: usize, b: usize) {
        let hit: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| {
                let pair = (c.ends[0].0, c.ends[1].0);
                pair == (a, b) || pair == (b, a)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in hit {
            for side in 0..2 {
                let conn = self.conns.get_mut(&id).unwrap();
                conn.queues[side].clear();
                if conn.alive[side] {
                    let link = conn.ends[side].1;
                    self.send(id, side, NetEvent::Down { link, reason: "connection reset".into() });
                }
            }
        }
    }

    /// Cuts or heals the path between two places, both ways. Frames wait while it is cut.
    pub fn partition(&mut self, a: usize, b: usize, cut: bool) {
        for pair in [(a, b), (b, a)] {
            if cut {
                self.cut.insert(pair)
            } else {
                self.cut.remove(&pair)
            };
        }
        if !cut {
            let waiting: Vec<(u64, usize, usize)> = self
                .conns
                .iter()
                .flat_map(|(id, c)| [(*id, 0, c.queues[0].len()), (*id, 1, c.queues[1].len())])
                .filter(|(_, _, count)| *count > 0)
                .collect();
            for (id, side, count) in waiting {
                (0..count).for_each(|_| self.at(50_000, Happening::Arrive(id, side == 1)));
            }
        }
    }

    fn vanish(&mut self, place: usize) {
        if let Some(core) = self.places[place].process.as_mut().and_then(|p| p.any().downcast_mut::<CsCore>()) {
            self.places[place].cs = core.id();
        }
        self.places[place].process = None;
        self.places[place].wake = None;
        self.places[place].held.clear();
        self.places[place].paused = false;
        let mine: Vec<(usize, LinkId)> = self.links.keys().filter(|(p, _)| *p == place).copied().collect();
        for end in mine {
            self.net(end.0, NetEffect::Close { link: end.1 });
        }
    }

    /// The process dies; what its disk completed stays.
    pub fn kill(&mut self, place: usize) {
        self.vanish(place);
        let mut rng = self.rng.split(place as u64 ^ self.now);
        self.places[place].disk.kill(&mut rng);
    }

    /// The machine loses power: what was not flushed may be lost.
    pub fn power_cut(&mut self, place: usize) {
        self.vanish(place);
        let mut rng = self.rng.split(place as u64 ^ self.now);
        self.places[place].disk.power_cut(&mut rng);
    }

    pub fn pause(&mut self, place: usize, paused: bool) {
        self.places[place].paused = paused;
        if !paused {
            let incarnation = self.places[place].incarnation;
            for event in std::mem::take(&mut self.places[place].held) {
                self.at(1, Happening::Step(place, incarnation, event));
            }
        }
    }

    fn next(&mut self) {
        let Some(((time, _), what)) = self.queue.pop_first() else {
            self.now += MS;
            return;
        };
        self.now = time;
        match what {
            Happening::Step(place, incarnation, event) if self.places[place].incarnation == incarnation => {
                self.step(place, event);
            }
            Happening::Timer(place, incarnation)
                if self.places[place].incarnation == incarnation
                    && self.places[place].wake.is_some_and(|wake| wake <= self.now) =>
            {
                self.places[place].wake = None;
                self.step(place, Event::Timer);
            }
            Happening::Disk(place, incarnation) if self.places[place].incarnation == incarnation => {
                let mut rng = self.rng.split(self.tick);
                if self.places[place].process.is_some()
                    && let Some(done) = self.places[place].disk.complete_next(&mut rng)
                {
                    self.step(place, Event::Disk(DiskIndex(0), done));
                }
            }
            Happening::Arrive(conn, acceptor) => self.arrive(conn, acceptor),
            _ => {}
        }
    }

    pub fn run_for(&mut self, duration: u64) {
        let end = self.now + duration;
        while self.queue.first_key_value().is_some_and(|((time, _), _)| *time <= end) {
            self.next();
        }
        self.now = end;
    }

    /// Runs until `done`; fails loudly when it takes longer than `limit`.
    pub fn until(&mut self, limit: u64, mut done: impl FnMut(&mut World) -> bool) {
        let end = self.now + limit;
        while !done(self) {
            if self.now > end {
                let tail = if self.trace { 4000 } else { 60 };
                let from = self.log.len().saturating_sub(tail);
                panic!("not within {} ms; the log ends with\n{}", limit / MS, self.log[from..].join("\n"));
            }
            self.next();
        }
    }

    // What clients do.

    pub fn token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    pub fn begin_call(&mut self, client: usize, request: MdsRequest) -> u64 {
        let token = self.token();
        let outcomes = Rc::clone(&self.outcomes);
        let done = Box::new(move |result| drop(outcomes.borrow_mut().calls.insert(token, result)));
        self.with(client, |core, now, out| core.call(now, request, done, out));
        token
    }

    pub fn call(&mut self, client: usize, request: MdsRequest) -> Result<MdsReply, MdsError> {
        let token = self.begin_call(client, request);
        self.until(70 * SECOND, |world| world.outcomes.borrow().calls.contains_key(&token));
        self.outcomes.borrow_mut().calls.remove(&token).unwrap()
    }

    pub fn create_volume(&mut self, client: usize, name: &str, size: u64, redundancy: &str) -> VolumeId {
        let options = VolumeOptions {
            redundancy: Some(redundancy.parse().unwrap()),
            chunk_size: Some(CHUNK),
            ..VolumeOptions::default()
        };
        match self.call(client, MdsRequest::VolumeCreate { name: name.into(), size, options }) {
            Ok(MdsReply::Volume(info)) => info.volume,
            other => panic!("{other:?}"),
        }
    }

    pub fn begin_open(&mut self, client: usize, volume: VolumeId, mode: LeaseMode) -> u64 {
        let token = self.token();
        let outcomes = Rc::clone(&self.outcomes);
        let done = Box::new(move |result| drop(outcomes.borrow_mut().opens.insert(token, result)));
        self.with(client, |core, now, out| core.open(now, volume, mode, SizeRule::Fixed, done, out));
        token
    }

    pub fn opened(&mut self, token: u64, limit: u64) -> Result<VolumeHandle, OpenError> {
        self.until(limit, |world| world.outcomes.borrow().opens.contains_key(&token));
        self.outcomes.borrow_mut().opens.remove(&token).unwrap()
    }

    pub fn open(&mut self, client: usize, volume: VolumeId) -> VolumeHandle {
        let token = self.begin_open(client, volume, LeaseMode::Exclusive);
        self.opened(token, 40 * SECOND).unwrap()
    }

    pub fn submit(&mut self, client: usize, handle: VolumeHandle, op: BlockOp) -> u64 {
        let token = self.token();
        let outcomes = Rc::clone(&self.outcomes);
        let done = Box::new(move |result| drop(outcomes.borrow_mut().blocks.insert(token, result)));
        self.with(client, |core, now, out| core.submit(now, handle, op, done, out));
        token
    }

    pub fn is_done(&self, token: u64) -> bool {
        self.outcomes.borrow().blocks.contains_key(&token)
    }

    pub fn finish(&mut self, token: u64, limit: u64) -> BlockResult {
        self.until(limit, |world| world.is_done(token));
        self.outcomes.borrow_mut().blocks.remove(&token).unwrap()
    }

    pub fn run(&mut self, client: usize, handle: VolumeHandle, op: BlockOp) -> BlockResult {
        let token = self.submit(client, handle, op);
        self.finish(token, 30 * SECOND)
    }

    pub fn write(&mut self, client: usize, handle: VolumeHandle, offset: u64, data: &[u8]) {
        let op = BlockOp::Write { offset, data: Buf::copy_from(data), fua: false };
        assert!(matches!(self.run(client, handle, op), Ok(BlockReply::Done)));
    }

    pub fn read(&mut self, client: usize, handle: VolumeHandle, offset: u64, len: u32) -> Result<Vec<u8>, BlockError> {
        self.run(client, handle, BlockOp::Read { offset, len }).map(bytes_of)
    }

    pub fn flush(&mut self, client: usize, handle: VolumeHandle) {
        assert!(matches!(self.run(client, handle, BlockOp::Flush), Ok(BlockReply::Done)));
    }

    pub fn close(&mut self, client: usize, handle: VolumeHandle, release: bool) {
        let token = self.token();
        let outcomes = Rc::clone(&self.outcomes);
        let done = Box::new(move || {
            outcomes.borrow_mut().closed.insert(token);
        });
        self.with(client, |core, now, out| {
            if release { core.release(now, handle, done, out) } else { core.close(now, handle, done, out) }
        });
        self.until(30 * SECOND, |world| world.outcomes.borrow().closed.contains(&token));
    }
}

pub fn bytes_of(reply: BlockReply) -> Vec<u8> {
    match reply {
        BlockReply::Data(pieces) => pieces.iter().flat_map(|piece| piece.to_vec()).collect(),
        other => panic!("{other:?}"),
    }
}
