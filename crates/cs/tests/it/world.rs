//! A small world: chunk servers over simulated disks, links as queues, a scripted metadata server, hand-driven clients.

use cairn_cs::{CsConfig, CsCore};
use cairn_env::{Buf, BufMut, DiskRequest, IoId};
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::{Store, StoreConfig, StoreOptions};
use cairn_types::*;
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_ZERO};
use cairn_wire::mds::*;
use cairn_wire::{Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

pub const CLUSTER: ClusterId = ClusterId([5; 16]);
pub const VOLUME: VolumeId = VolumeId(77);
pub const CHUNK: ChunkId = ChunkId(900);
/// Small chunks keep tests quick; the rules do not depend on the size.
pub const BLOCKS: u32 = 512;
const DISK_SIZE: u64 = 32 << 20;

pub fn addr_of(node: usize) -> SocketAddr {
    format!("127.0.0.1:{}", 8000 + node).parse().unwrap()
}

pub fn mds_addr(index: usize) -> SocketAddr {
    format!("127.0.0.1:{}", 7000 + index).parse().unwrap()
}

pub fn cs_of(node: usize) -> CsId {
    CsId(1025 + node as u32)
}

/// Where a link ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum End {
    Node(usize, LinkId),
    Mds(usize),
    Client(usize),
}

pub struct Node {
    pub core: Option<CsCore>,
    pub disk: SimDisk,
    pub fatal: Option<String>,
    pub log: Vec<String>,
    wake_at: Option<Instant>,
    /// The disk completes nothing while set.
    pub hold_disk: bool,
    /// Connections to it fail while set.
    pub unreachable: bool,
    incarnation: u64,
    pub config: CsConfig,
    /// What the scripted metadata server heard and will answer.
    pub orders: Vec<CsOrder>,
    pub done: Vec<OrderDone>,
    pub damaged: Vec<(ChunkId, u32)>,
    pub told_failed: Option<String>,
    pub reports: BTreeMap<ChunkId, ChunkVersion>,
    pub heartbeats: u64,
    pub registrations: u64,
    /// Times it asked for the addresses of the metadata servers.
    pub topologies: u64,
    /// Nonce of a registration that was answered and is to be confirmed.
    pub unconfirmed: Option<u64>,
    /// What was told to be durable.
    pub marked: u64,
    /// How this server stood in its last registration, and whether the next is turned away.
    pub lineage: Lineage,
    pub turn_away: bool,
    /// Errors to answer the next calls with.
    pub mds_errors: VecDeque<MdsError>,
    mds_link: Option<LinkId>,
}

/// A client's link to one node.
#[derive(Default)]
pub struct Client {
    next_id: u64,
    pub calls: BTreeMap<u64, Result<CsReply, CsError>>,
    pub data: BTreeMap<u64, (DataReply, Buf)>,
    pub closed: bool,
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    /// Where metadata servers are.
    pub group: Vec<SocketAddr>,
    pub nodes: Vec<Node>,
    pub clients: Vec<Client>,
    /// Both directions of every link: from one end to the other.
    routes: BTreeMap<End, End>,
    /// Frames on their way to an end.
    queues: BTreeMap<End, VecDeque<NetEvent>>,
    accepted: u64,
}

fn frame(kind: FrameKind, id: u64, prefix: Vec<u8>, payload: Buf) -> Frame {
    Frame { kind, id, prefix, payload }
}

impl World {
    pub fn new(seed: u64, count: usize) -> Self {
        Self::with(seed, count, |_| {})
    }

    pub fn with(seed: u64, count: usize, change: impl Fn(&mut CsConfig)) -> Self {
        let mut world = Self {
            now: 1_000_000_000,
            rng: Rng::new(seed),
            group: vec![mds_addr(0)],
            nodes: Vec::new(),
            clients: Vec::new(),
            routes: BTreeMap::new(),
            queues: BTreeMap::new(),
            accepted: 0,
        };
        for node in 0..count {
            let store = [node as u8 + 1; 16];
            let mut config = CsConfig {
                cs: None,
                level: Level::CURRENT,
                cluster: CLUSTER,
                store,
                addr: addr_of(node),
                location: Location {
                    host: HostId([node as u8; 16]),
                    host_name: format!("host{node}"),
                    rack: String::new(),
                    row: String::new(),
                    room: String::new(),
                    site: String::new(),
                },
                tier: 0,
                capacity: 0,
                repository: format!("/cs{node}"),
                mds: vec![mds_addr(0)],
                mds_known: Vec::new(),
                durable_always: false,
                scrub_chunks_per_minute: 0,
            };
            change(&mut config);
            let mut disk = SimDisk::new(DISK_SIZE);
            let store_config = StoreConfig { cluster: CLUSTER, store_uuid: store, capacity_bytes: 0 };
            for (io, op) in cairn_store::format(&store_config, DISK_SIZE).unwrap().into_iter().enumerate() {
                disk.submit(DiskRequest { io: IoId(io as u64), op });
                disk.complete(IoId(io as u64)).unwrap().result.unwrap();
            }
            world.nodes.push(Node {
                core: None,
                disk,
                fatal: None,
                log: Vec::new(),
                wake_at: None,
                hold_disk: false,
                unreachable: false,
                incarnation: 0,
                config,
                orders: Vec::new(),
                done: Vec::new(),
                damaged: Vec::new(),
                told_failed: None,
                reports: BTreeMap::new(),
                heartbeats: 0,
                registrations: 0,
                topologies: 0,
                unconfirmed: None,
                marked: 0,
                lineage: Lineage::default(),
                turn_away: false,
                mds_errors: VecDeque::new(),
                mds_link: None,
            });
            world.start(node);
        }
        world.settle();
        world
    }

    pub fn core(&self, node: usize) -> &CsCore {
        self.nodes[node].core.as_ref().expect("the node is up")
    }

    /// Starts a node on whatever its disk holds.
    pub fn start(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.incarnation += 1;
        let options = StoreOptions { cluster: Some(CLUSTER), store_uuid: Some(n.config.store), ..Default::default() };
        let store = Store::new(n.disk.size(), options);
        let rng = Rng::new(n.incarnation * 1000 + node as u64);
        n.core = Some(CsCore::new(n.config.clone(), store, rng));
        n.wake_at = None;
        self.step(node, Event::Start);
        self.turn(node);
    }

    fn vanish(&mut self, node: usize) {
        // What the shell wrote down.
        self.nodes[node].config.mds_known =
            self.nodes[node].core.as_ref().map_or(Vec::new(), |core| core.mds_servers().to_vec());
        self.nodes[node].core = None;
        self.nodes[node].mds_link = None;
        let ends: Vec<End> =
            self.routes.keys().filter(|end| matches!(end, End::Node(n, _) if *n == node)).copied().collect();
        for end in ends {
            self.cut(end, "the peer died");
        }
    }

    /// The process dies; the machine lives.
    pub fn kill(&mut self, node: usize) {
        self.vanish(node);
        self.nodes[node].disk.kill(&mut self.rng);
    }

    /// The machine loses power.
    pub fn power_cut(&mut self, node: usize) {
        self.vanish(node);
        self.nodes[node].disk.power_cut(&mut self.rng);
    }

    fn clock(&self) -> Now {
        Now { mono: Instant(self.now), wall_ns: self.now }
    }

    fn step(&mut self, node: usize, event: Event) {
        let now = self.clock();
        let Some(core) = &mut self.nodes[node].core else { return };
        let mut out = Effects::default();
        core.step(now, event, &mut out);
        self.carry_out(node, out);
    }

    fn turn(&mut self, node: usize) {
        self.step(node, Event::Turn);
    }

    fn carry_out(&mut self, node: usize, out: Effects) {
        let n = &mut self.nodes[node];
        n.log.extend(out.log);
        if out.fatal.is_some() {
            n.fatal = out.fatal;
        }
        for (_, request) in out.disk {
            n.disk.submit(request);
        }
        if let Some(at) = out.wake_at {
            n.wake_at = Some(n.wake_at.map_or(at, |earlier| earlier.min(at)));
        }
        for effect in out.net {
            match effect {
                NetEffect::Connect { link, addr } => self.connect(node, link, addr),
                NetEffect::Close { link } => {
                    let end = End::Node(node, link);
                    self.queues.remove(&end);
                    if let Some(other) = self.routes.remove(&end) {
                        self.routes.remove(&other);
                        let down = NetEvent::Down { link: link_of(other), reason: "closed by the peer".into() };
                        self.queues.entry(other).or_default().push_back(down);
                    }
                }
                NetEffect::Send { link, kind, id, prefix, payload } => {
                    let mut bytes = Vec::new();
                    payload.iter().for_each(|piece| bytes.extend_from_slice(piece));
                    let frame = frame(kind, id, prefix, Buf::copy_from(&bytes));
                    self.post(End::Node(node, link), frame);
                }
            }
        }
    }

    fn post(&mut self, from: End, frame: Frame) {
        let Some(to) = self.routes.get(&from).copied() else { return };
        self.queues.entry(to).or_default().push_back(NetEvent::Frame { link: link_of(to), frame });
    }

    /// Ends a link; both sides that still exist hear of it.
    fn cut(&mut self, end: End, reason: &str) {
        let Some(other) = self.routes.remove(&end) else { return };
        self.routes.remove(&other);
        self.queues.remove(&end);
        for end in [end, other] {
            let down = NetEvent::Down { link: link_of(end), reason: reason.into() };
            self.queues.entry(end).or_default().push_back(down);
        }
    }

    fn connect(&mut self, node: usize, link: LinkId, addr: SocketAddr) {
        let here = End::Node(node, link);
        if self.group.contains(&addr) {
            self.nodes[node].mds_link = Some(link);
            return self.join(here, End::Mds(node), NodeId::Mds(MdsId(1)), None);
        }
        let there = self.nodes.iter().position(|n| n.config.addr == addr && n.core.is_some() && !n.unreachable);
        match there {
            Some(there) => {
                self.accepted += 1;
                let accepted = LinkId(LinkId::ACCEPTED | self.accepted);
                self.join(here, End::Node(there, accepted), NodeId::Cs(cs_of(there)), Some(NodeId::Cs(cs_of(node))));
            }
            None => {
                let down = NetEvent::Down { link, reason: "connection refused".into() };
                self.queues.entry(here).or_default().push_back(down);
            }
        }
    }

    fn join(&mut self, here: End, there: End, peer: NodeId, ours: Option<NodeId>) {
        self.routes.insert(here, there);
        self.routes.insert(there, here);
        self.queues.entry(here).or_default().push_back(NetEvent::Up {
            link: link_of(here),
            peer,
            level: Level::CURRENT,
        });
        if let Some(ours) = ours {
            self.queues.entry(there).or_default().push_back(NetEvent::Up {
                link: link_of(there),
                peer: ours,
                level: Level::CURRENT,
            });
        }
    }

    /// One event, chosen at random among all that can happen now; false when nothing can.
    pub fn progress(&mut self) -> bool {
        let mut choices: Vec<(u8, End)> = Vec::new();
        for (end, queue) in &self.queues {
            if !queue.is_empty() {
                choices.push((0, *end));
            }
        }
        for (at, node) in self.nodes.iter().enumerate() {
            if node.core.is_some() && !node.hold_disk && !node.disk.is_idle() {
                choices.push((1, End::Mds(at)));
            }
        }
        let Some((kind, end)) = self.rng.choose(&choices).copied() else { return false };
        match (kind, end) {
            (0, end) => {
                let event = self.queues.get_mut(&end).and_then(VecDeque::pop_front).expect("chosen as not empty");
                self.deliver(end, event);
            }
            (_, End::Mds(node)) => {
                let done = self.nodes[node].disk.complete_next(&mut self.rng).expect("chosen as not idle");
                self.step(node, Event::Disk(cairn_wire::DiskIndex(0), done));
                self.turn(node);
            }
            _ => unreachable!("disks are named by their node"),
        }
        true
    }

    fn deliver(&mut self, end: End, event: NetEvent) {
        match (end, event) {
            (End::Node(node, _), event) => {
                self.step(node, Event::Net(event));
                self.turn(node);
            }
            (End::Mds(node), NetEvent::Frame { frame, .. }) => self.answer_as_mds(node, frame),
            (End::Client(client), NetEvent::Frame { frame, .. }) => {
                let client = &mut self.clients[client];
                match frame.kind {
                    FrameKind::CsReply => {
                        client.calls.insert(frame.id, cairn_wire::decode("reply", &frame.prefix).unwrap());
                    }
                    FrameKind::DataReply => {
                        let reply = DataReply::decode(&frame.prefix, frame.payload.len()).unwrap();
                        client.data.insert(frame.id, (reply, frame.payload));
                    }
                    kind => panic!("a client gets {kind:?}"),
                }
            }
            (End::Client(client), NetEvent::Down { .. }) => self.clients[client].closed = true,
            _ => {}
        }
    }

    fn answer_as_mds(&mut self, node: usize, call: Frame) {
        let request = cairn_wire::decode::<Call>("call", &call.prefix).unwrap().request;
        let n = &mut self.nodes[node];
        let reply = match (n.mds_errors.pop_front(), request) {
            (Some(error), _) => Err(error),
            (None, MdsRequest::CsJoin { server: CsProfile { cs, store, .. }, lineage }) => {
                assert_eq!(store, n.config.store);
                assert!(cs.is_none_or(|cs| cs == cs_of(node)));
                if n.turn_away {
                    let reply = Ok(MdsReply::CsTurnedAway { reason: "it is an older copy".into() });
                    return self.reply_as_mds(node, call.id, &reply);
                }
                n.lineage = lineage;
                // Told again when the label is durable: the same registration.
                let confirms = lineage.previous == lineage.nonce && n.unconfirmed.take() == Some(lineage.nonce);
                n.unconfirmed = (lineage.previous != lineage.nonce).then_some(lineage.nonce);
                n.registrations += u64::from(!confirms);
                Ok(MdsReply::CsRegistered { cs: cs_of(node), cluster: CLUSTER })
            }
            (None, MdsRequest::CsHeartbeat { done, damaged, failed, .. }) => {
                n.heartbeats += 1;
                for done in done {
                    n.orders.retain(|order| !is_about(order, &done));
                    n.done.push(done);
                }
                n.damaged.extend(damaged);
                n.told_failed = failed;
                Ok(MdsReply::Orders(n.orders.clone()))
            }
            (None, MdsRequest::CsMark { durable, .. }) => {
                n.marked = durable;
                Ok(MdsReply::Done)
            }
            (None, MdsRequest::CsReport { chunks, .. }) => {
                n.reports.extend(chunks.iter().map(|report| (report.chunk, report.version)));
                Ok(MdsReply::Orders(Vec::new()))
            }
            (None, MdsRequest::Topology) => {
                n.topologies += 1;
                let info = |(index, addr): (usize, &SocketAddr)| {
                    let mds = MdsId(index as u64 + 1);
                    MdsInfo { mds, addr: *addr, voter: true, repository: String::new() }
                };
                let mds = self.group.iter().enumerate().map(info).collect();
                Ok(MdsReply::Topology { revision: 1, mds, cs: Vec::new() })
            }
            (None, other) => panic!("a chunk server asks {other:?}"),
        };
        self.reply_as_mds(node, call.id, &reply);
    }

    fn reply_as_mds(&mut self, node: usize, id: u64, reply: &Result<MdsReply, MdsError>) {
        let reply = frame(FrameKind::MdsReply, id, cairn_wire::encode(reply), Buf::default());
        self.post(End::Mds(node), reply);
    }

    /// Gives a node an order and tells it so.
    pub fn order(&mut self, node: usize, order: CsOrder) {
        self.nodes[node].orders.push(order);
        self.push(node, &Push::OrdersWaiting);
    }

    fn push(&mut self, node: usize, push: &Push) {
        let push = frame(FrameKind::MdsPush, 0, cairn_wire::encode(push), Buf::default());
        self.post(End::Mds(node), push);
    }

    /// The metadata servers are others from now on, and tell so.
    pub fn change_group(&mut self, group: Vec<SocketAddr>) {
        self.group = group;
        for node in 0..self.nodes.len() {
            if self.nodes[node].mds_link.is_some() {
                self.push(node, &Push::TopologyChanged);
            }
        }
    }

    /// The link to the metadata server is gone, as with its process.
    pub fn cut_mds(&mut self, node: usize) {
        self.cut(End::Mds(node), "the peer died");
    }

    /// Lets everything happen that can happen without time passing.
    pub fn settle(&mut self) {
        for _ in 0..2_000_000 {
            if !self.progress() {
                return;
            }
        }
        panic!("the world does not come to rest");
    }

    /// Lets time pass, with everything that happens meanwhile.
    pub fn pass(&mut self, duration: Duration) {
        let end = self.now + duration.as_nanos() as u64;
        loop {
            self.settle();
            let next = self.nodes.iter().filter(|n| n.core.is_some()).filter_map(|n| n.wake_at).min();
            match next.filter(|next| next.0 <= end) {
                Some(next) => {
                    self.now = self.now.max(next.0);
                    for node in 0..self.nodes.len() {
                        if self.nodes[node].wake_at.is_some_and(|at| at.0 <= self.now) {
                            self.nodes[node].wake_at = None;
                            self.step(node, Event::Timer);
                            self.turn(node);
                        }
                    }
                }
                None => {
                    self.now = end;
                    return self.settle();
                }
            }
        }
    }

    /// Lets the clock go on and fires the timers that are due, without waiting for what is under way.
    pub fn pass_without_settling(&mut self, duration: Duration) {
        self.now += duration.as_nanos() as u64;
        for node in 0..self.nodes.len() {
            if self.nodes[node].wake_at.is_some_and(|at| at.0 <= self.now) {
                self.nodes[node].wake_at = None;
                self.step(node, Event::Timer);
                self.turn(node);
            }
        }
    }

    /// A client's link to a node, not greeted yet.
    pub fn dial(&mut self, node: usize) -> usize {
        self.dial_as(node, NodeId::Client(ClientId(2049)))
    }

    pub fn dial_as(&mut self, node: usize, peer: NodeId) -> usize {
        self.accepted += 1;
        let accepted = LinkId(LinkId::ACCEPTED | self.accepted);
        let client = self.clients.len();
        self.clients.push(Client { next_id: 1, ..Client::default() });
        let (here, there) = (End::Client(client), End::Node(node, accepted));
        self.routes.insert(here, there);
        self.routes.insert(there, here);
        self.queues.entry(there).or_default().push_back(NetEvent::Up { link: accepted, peer, level: Level::CURRENT });
        client
    }

    /// A greeted link.
    pub fn client(&mut self, node: usize, session: u64, generation: u64) -> usize {
        let client = self.dial(node);
        let reply = self.call(client, CsRequest::Hello { session, generation });
        assert!(matches!(reply, Ok(CsReply::Hello { .. })), "{reply:?}");
        client
    }

    pub fn post_call(&mut self, client: usize, request: &CsRequest) -> u64 {
        let id = self.clients[client].next_id;
        self.clients[client].next_id += 1;
        let frame = frame(FrameKind::CsCall, id, cairn_wire::encode(request), Buf::default());
        self.post(End::Client(client), frame);
        id
    }

    pub fn call(&mut self, client: usize, request: CsRequest) -> Result<CsReply, CsError> {
        let id = self.post_call(client, &request);
        for _ in 0..1_000_000 {
            // Only as far as needed: the rest of the world stays where it is, in the middle of things.
            if let Some(answer) = self.clients[client].calls.remove(&id) {
                return answer;
            }
            if !self.progress() {
                break;
            }
        }
        panic!("no answer to {request:?}")
    }

    pub fn post_raw(&mut self, client: usize, kind: FrameKind, prefix: Vec<u8>, payload: Buf) -> u64 {
        let id = self.clients[client].next_id;
        self.clients[client].next_id += 1;
        self.post(End::Client(client), frame(kind, id, prefix, payload));
        id
    }

    pub fn post_data(&mut self, client: usize, request: &DataRequest, payload: Buf) -> u64 {
        let mut prefix = Vec::new();
        request.encode(&mut prefix);
        self.post_raw(client, FrameKind::Data, prefix, payload)
    }

    /// Sends a request and lets the world run until the answer is there.
    pub fn data(&mut self, client: usize, request: &DataRequest, payload: Buf) -> (DataReply, Buf) {
        let id = self.post_data(client, request, payload);
        for _ in 0..1_000_000 {
            if let Some(answer) = self.clients[client].data.remove(&id) {
                return answer;
            }
            if !self.progress() {
                break;
            }
        }
        let answer = self.clients[client].data.remove(&id);
        answer.unwrap_or_else(|| panic!("no answer to {request:?}"))
    }

    pub fn status(&mut self, client: usize, request: &DataRequest, payload: Buf) -> DataStatus {
        self.data(client, request, payload).0.status
    }

    pub fn fence(&mut self, client: usize, epoch: u64) -> Result<CsReply, CsError> {
        self.call(client, CsRequest::Fence { volume: VOLUME, epoch: Epoch(epoch) })
    }

    pub fn create(&mut self, client: usize, version: u64, epoch: u64) {
        let request = CsRequest::Create {
            chunk: CHUNK,
            volume: VOLUME,
            layer: LayerId(1),
            index: 0,
            block_count: BLOCKS,
            version: ChunkVersion(version),
            epoch: Epoch(epoch),
        };
        assert_eq!(self.call(client, request), Ok(CsReply::Done));
    }

    /// The pattern of every block of a node's copy, by an honest read; none for holes.
    pub fn read_all(&mut self, client: usize, version: u64, epoch: u64) -> Result<Vec<u64>, DataStatus> {
        let mut found = Vec::new();
        for first in (0..BLOCKS).step_by(256) {
            let read = DataRequest { block_count: 256, ..op(DataOp::Read, version, epoch, 0, first) };
            let (reply, payload) = self.data(client, &read, Buf::default());
            if reply.status != DataStatus::Ok {
                return Err(reply.status);
            }
            if reply.flags & FLAG_ZERO != 0 {
                found.extend([0; 256]);
                continue;
            }
            for (block, checksum) in payload.chunks_exact(BLOCK_SIZE).zip(&reply.checksums) {
                assert_eq!(crc64(block), *checksum);
                let value = u64::from_le_bytes(block[..8].try_into().unwrap());
                assert!(block.chunks_exact(8).all(|word| word == value.to_le_bytes()), "a torn block");
                found.push(value);
            }
        }
        Ok(found)
    }
}

fn is_about(order: &CsOrder, done: &OrderDone) -> bool {
    match order {
        // Told with every answer to a heartbeat.
        CsOrder::VerifyRate { .. } | CsOrder::Level(_) => false,
        CsOrder::Raise { chunk, version, .. } => {
            (*chunk, *version, OrderKind::Raise) == (done.chunk, done.version, done.kind)
        }
        // A rebuild that failed is ordered again.
        CsOrder::Rebuild { entry, .. } => {
            (entry.chunk, entry.version, OrderKind::Rebuild) == (done.chunk, done.version, done.kind)
                && done.error.is_none()
        }
        CsOrder::Delete { chunk, version } => {
            (*chunk, *version, OrderKind::Delete) == (done.chunk, done.version, done.kind)
        }
    }
}

fn link_of(end: End) -> LinkId {
    match end {
        End::Node(_, link) => link,
        End::Mds(_) | End::Client(_) => LinkId(0),
    }
}

/// A data request without payload.
pub fn op(op: DataOp, version: u64, epoch: u64, sequence: u64, first_block: u32) -> DataRequest {
    DataRequest {
        op,
        flags: 0,
        volume: VOLUME,
        chunk: CHUNK,
        version: ChunkVersion(version),
        epoch: Epoch(epoch),
        sequence: Sequence(sequence),
        settled: Sequence(0),
        first_block,
        block_count: u32::from(matches!(op, DataOp::Read | DataOp::Write | DataOp::Unmap)),
        checksums: Vec::new(),
    }
}

/// A write of blocks that all carry `value`.
pub fn write(version: u64, epoch: u64, sequence: u64, first_block: u32, count: u32, value: u64) -> (DataRequest, Buf) {
    let mut payload = BufMut::zeroed(count as usize * BLOCK_SIZE);
    payload.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    let payload = payload.freeze();
    let checksums = payload.chunks_exact(BLOCK_SIZE).map(crc64).collect();
    let request =
        DataRequest { block_count: count, checksums, ..op(DataOp::Write, version, epoch, sequence, first_block) };
    (request, payload)
}

/// An order to make `node` a copy at `version`, with the other nodes as sources.
pub fn rebuild(node: usize, version: u64, since: u64, sources: &[usize]) -> CsOrder {
    let mut replicas: Vec<Replica> = sources
        .iter()
        .map(|source| Replica { cs: cs_of(*source), role: ReplicaRole::Current, since: ChunkVersion(1) })
        .collect();
    replicas.push(Replica { cs: cs_of(node), role: ReplicaRole::Rebuilding, since: ChunkVersion(since) });
    CsOrder::Rebuild {
        entry: ChunkEntry {
            index: 0,
            chunk: CHUNK,
            layer: LayerId(1),
            version: ChunkVersion(version),
            minimum: 1,
            replicas,
        },
        volume: VOLUME,
        block_count: BLOCKS,
        sources: sources.iter().map(|source| (cs_of(*source), addr_of(*source))).collect(),
        created: true,
    }
}

impl World {
    pub fn prepare_stop(&mut self, node: usize) {
        let now = self.clock();
        let mut out = Effects::default();
        self.nodes[node].core.as_mut().expect("the node is up").prepare_stop(now, &mut out);
        self.carry_out(node, out);
    }
}
