//! The machines of a simulated cluster: made, started and started again exactly as the daemons' shells do it.

use crate::world::{NodeIndex, World};
use cairn_client::{ClientCore, CoreConfig, OnNoSpace};
use cairn_consensus::{Consensus, Initial, Member};
use cairn_cs::{CsConfig, CsCore};
use cairn_env::{DiskOp, DiskRequest};
use cairn_env_sim::SimDisk;
use cairn_mds::disaster::fill;
use cairn_mds::{MdsConfig, MdsCore, MemBase, Room};
use cairn_meta::recover::{Listing, Report};
use cairn_meta::{BaseKv, MemKv};
use cairn_stdx::Rng;
use cairn_store::{Store, StoreConfig, StoreOptions};
use cairn_types::{ClientId, ClusterId, CsId, Duration, HostId, Level, MdsId, NodeId};
use cairn_wire::mds::{Location, MdsInfo, SessionKind};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::SocketAddr;

/// Bytes of a chunk server's disk, where room does not matter.
pub(super) const CS_DISK: u64 = 64 << 20;
/// Bytes of a metadata log.
const MDS_LOG: u64 = 1 << 20;
/// The one cluster.
const CLUSTER: ClusterId = ClusterId([7; 16]);
/// Its name.
pub(super) const CLUSTER_NAME: &str = "sim";

/// What a recovery made.
pub(super) struct Recovered<'a> {
    pub report: &'a Report,
    /// Term its log begins with.
    pub term: u64,
    pub state: &'a MemKv,
}

/// The metadata server of the simulator: the production core over an image in memory.
pub(super) type SimMds = MdsCore<MemBase>;

/// A metadata server's machine.
pub(super) struct MdsNode {
    pub node: NodeIndex,
    /// Out of the cluster: never started again.
    pub retired: bool,
    /// The release its next start is of.
    pub level: Level,
    base: MemBase,
    config: MdsConfig,
}

impl MdsNode {
    pub fn id(&self) -> MdsId {
        self.config.id
    }

    /// Its image.
    pub fn image(&self) -> &MemBase {
        &self.base
    }
}

/// A chunk server's machine.
pub(super) struct CsNode {
    pub node: NodeIndex,
    /// Written down by the shell as soon as the cluster gives it.
    pub id: Option<CsId>,
    /// Out of the cluster: never started again.
    pub retired: bool,
    /// The release its next start is of.
    pub level: Level,
    config: CsConfig,
}

/// Where a process finds metadata servers.
#[derive(Clone, Default)]
struct Addresses {
    /// What it was started with.
    given: Vec<SocketAddr>,
    /// What it learnt, written down by its shell.
    known: Vec<SocketAddr>,
}

/// What a seed draws about the shape of its cluster.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub mds: usize,
    pub cs: usize,
    pub clients: usize,
    /// Groups of a store between two checkpoints.
    pub chain_groups_max: u64,
    /// Bytes of a metadata memtable that start a checkpoint.
    pub checkpoint_bytes: usize,
    pub scrub: u32,
    /// Bytes of a chunk server's disk.
    pub cs_disk: u64,
    /// Every other client has its writes fail where no server has room; the rest wait.
    pub fail_when_full: bool,
    /// Clients carry mounts, which wait for room themselves.
    pub mounts: bool,
    /// The release every process is first started with.
    pub level: Level,
}

/// All machines.
pub(super) struct Cluster {
    pub world: World,
    pub mds: Vec<MdsNode>,
    pub cs: Vec<CsNode>,
    pub clients: Vec<NodeIndex>,
    /// The releases their next starts are of.
    pub client_levels: Vec<Level>,
    /// A client nobody kills, through which servers are added and removed.
    pub operator: Option<NodeIndex>,
    pub shape: Shape,
    addresses: BTreeMap<NodeIndex, Addresses>,
    /// Who was down, frozen or cut off, and has not been seen to know a metadata server since.
    away: BTreeSet<NodeIndex>,
    rng: Rng,
}

fn addr(kind: u8, index: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, kind, index as u8 + 1], 7000))
}

fn host(kind: u8, index: usize) -> HostId {
    let mut id = [kind; 16];
    id[15] = index as u8 + 1;
    HostId(id)
}

/// Carries out the operations that make a log or a store, past the request queue.
fn format_disk(size: u64, ops: Vec<DiskOp>) -> SimDisk {
    let mut disk = SimDisk::new(size);
    for op in ops {
        if let DiskOp::Write { mut offset, bufs } = op {
            for buf in bufs {
                disk.poke(offset, &buf);
                offset += buf.len() as u64;
            }
        }
    }
    disk
}

fn log_config(id: MdsId) -> cairn_consensus::Config {
    let mut config = cairn_consensus::Config::new(id, CLUSTER);
    config.log_size_bytes = MDS_LOG;
    config.write_through = false;
    config
}

impl Cluster {
    pub fn new(seed: u64, shape: Shape, rng: Rng) -> Self {
        let world = World::new(seed);
        let (mds, cs, clients, addresses) = (Vec::new(), Vec::new(), Vec::new(), BTreeMap::new());
        let client_levels = Vec::new();
        Self { world, mds, cs, clients, client_levels, operator: None, shape, addresses, away: BTreeSet::new(), rng }
    }

    fn next_rng(&mut self) -> Rng {
        Rng::new(self.rng.next_u64())
    }

    /// Makes the first metadata server, the one that creates the cluster.
    pub fn create_first_mds(&mut self) {
        let (id, instance) = (MdsId(1), self.rng.next_u64() | 1);
        let initial = Initial::Bootstrap { voters: vec![Member { id, instance }] };
        self.make_mds(id, instance, &initial, Vec::new(), MemBase::default());
    }

    /// The operator's client is gone as well.
    pub fn lose_operator(&mut self) {
        if let Some(node) = self.operator.take() {
            self.world.kill(node);
        }
    }

    /// What a chunk server that is stopped has, as `cairn cs scan` would list it.
    pub fn list(&self, index: usize) -> Result<Listing, String> {
        let cs = &self.cs[index];
        let mut disk = self.world.nodes[cs.node.0].disks[0].clone();
        let run = |request: DiskRequest| {
            let io = request.io;
            disk.submit(request);
            disk.complete(io).expect("a request of a disk at rest ends at once")
        };
        let held = cairn_cs::scan::scan(self.shape.cs_disk, self.store_options(index), run)
            .map_err(|error| format!("chunk server {index}: {error}: {:?}", error.source()))?;
        Ok(Listing {
            cluster: CLUSTER,
            cs: cs.id,
            store: cs.config.store,
            host: cs.config.location.host,
            tier: 0,
            repository: format!("cs{index}"),
            capacity: held.capacity,
            used: held.used,
            epochs: held.epochs,
            copies: held.copies,
            mentioned: held.mentioned,
        })
    }

    /// Starts the first metadata server of a recovered cluster, then the chunk servers.
    pub fn start_recovered(&mut self, recovered: &Recovered<'_>) {
        let (id, instance) = (recovered.report.mds, self.rng.next_u64() | 1);
        let pairs = recovered.state.scan(&[0], &[u8::MAX], usize::MAX);
        let mut base = MemBase::default();
        let initial = fill(&mut base, (id, instance), recovered.report.index, recovered.term, &pairs)
            .expect("an image in memory takes everything");
        self.make_mds(id, instance, &initial, Vec::new(), base);
        (0..self.cs.len()).for_each(|index| self.start_cs(index));
    }

    /// Where the next metadata server will listen.
    pub fn next_mds_addr(&self) -> SocketAddr {
        addr(1, self.mds.len())
    }

    /// Makes a metadata server that was admitted as `id` for `nonce`.
    pub fn join_mds(&mut self, id: MdsId, nonce: u64, servers: Vec<MdsInfo>) {
        self.make_mds(id, nonce, &Initial::Join, servers, MemBase::default());
    }

    /// Makes and starts a metadata server; who does not join others is the only one.
    fn make_mds(&mut self, id: MdsId, instance: u64, initial: &Initial, mut servers: Vec<MdsInfo>, base: MemBase) {
        let (addr, log) = (self.next_mds_addr(), log_config(id));
        let disk = format_disk(MDS_LOG, Consensus::format(&log, instance, initial));
        let bootstrap = !matches!(initial, Initial::Join);
        if bootstrap {
            servers = vec![MdsInfo { mds: id, addr, voter: true, repository: String::new() }];
        }
        let level = self.shape.level;
        let config = MdsConfig {
            id,
            level,
            cluster: CLUSTER,
            cluster_name: CLUSTER_NAME.to_owned(),
            addr,
            repository: String::new(),
            servers,
            bootstrap,
            log,
            checkpoint_bytes: self.shape.checkpoint_bytes,
        };
        let node = self.world.add_node(addr, NodeId::Mds(id), vec![disk]);
        self.mds.push(MdsNode { node, retired: false, level, base, config });
        self.start_mds(self.mds.len() - 1);
    }

    /// Starts a metadata server, unless it runs.
    pub fn start_mds(&mut self, index: usize) {
        let rng = self.next_rng();
        let mds = &self.mds[index];
        if self.world.nodes[mds.node.0].process.is_none() && !mds.retired {
            let config = MdsConfig { level: mds.level, ..mds.config.clone() };
            let core: SimMds = MdsCore::new(config, mds.base.reopen(), rng);
            self.world.nodes[mds.node.0].level = mds.level;
            self.world.start(mds.node, Box::new(core));
        }
    }

    /// A metadata server is killed, and its image is lost; its log is not. Its shell has written down who the others
    /// are.
    pub fn lose_mds_image(&mut self, index: usize) {
        let node = self.mds[index].node;
        let members = self.world.inspect::<SimMds, _>(node, |core| core.meta().members().collect::<Vec<MdsInfo>>());
        self.world.kill(node);
        let mds = &mut self.mds[index];
        mds.base.lose();
        mds.config.servers = members.filter(|members| !members.is_empty()).unwrap_or(mds.config.servers.clone());
    }

    /// The disk of a metadata server's image gets full, or has room again.
    pub fn set_mds_room(&self, index: usize, room: Room) {
        self.mds[index].base.set_room(room);
    }

    /// The disk of a metadata server is lost, and somebody makes its log anew under the old id.
    pub fn wipe_mds(&mut self, index: usize) {
        let instance = self.rng.next_u64() | 1;
        let mds = &mut self.mds[index];
        self.world.note(format_args!("the disk of {:?} ({}) is lost", mds.node, mds.config.id));
        self.world.power_cut(mds.node);
        mds.config.bootstrap = false;
        mds.base = MemBase::default();
        let log = Consensus::format(&mds.config.log, instance, &Initial::Join);
        self.world.nodes[mds.node.0].disks = vec![format_disk(MDS_LOG, log)];
        self.start_mds(index);
    }

    /// Where metadata servers are, or will be.
    fn mds_addrs(&self) -> Vec<SocketAddr> {
        let retired = |mds: &usize| self.mds.get(*mds).is_some_and(|mds| mds.retired);
        (0..self.shape.mds.max(self.mds.len())).filter(|mds| !retired(mds)).map(|mds| addr(1, mds)).collect()
    }

    /// Where a process looks when it starts. What was written down must do while it names one who is there; a process
    /// that was away when all were replaced has to be told by somebody.
    fn addresses_at_start(&mut self, node: NodeIndex) -> Addresses {
        let present = self.mds_addrs();
        let addresses = self.addresses.entry(node).or_default();
        if !addresses.given.iter().chain(&addresses.known).any(|addr| present.contains(addr)) {
            addresses.given = present;
        }
        addresses.clone()
    }

    fn knows_somebody(&self, node: NodeIndex) -> bool {
        let present = self.mds_addrs();
        let knows = |a: &Addresses| a.given.iter().chain(&a.known).any(|addr| present.contains(addr));
        self.addresses.get(&node).is_some_and(knows)
    }

    /// True when a process that runs knows none of the metadata servers, because they were all replaced while it was
    /// away. Who was there all the time is to find them by itself.
    pub fn is_forsaken(&self, node: NodeIndex) -> bool {
        self.is_running(node) && self.away.contains(&node) && !self.knows_somebody(node)
    }

    /// Makes a chunk server on a host of its own.
    pub fn create_cs(&mut self) {
        let index = self.cs.len();
        let mut store = [0; 16];
        self.rng.fill(&mut store);
        let config = StoreConfig { cluster: CLUSTER, store_uuid: store, capacity_bytes: 0 };
        let size = self.shape.cs_disk;
        let disk = format_disk(size, cairn_store::format(&config, size).expect("the size suits a store"));
        let none = String::new;
        let location = Location {
            host: host(2, index),
            host_name: format!("cs{index}"),
            rack: none(),
            row: none(),
            room: none(),
            site: none(),
        };
        let level = self.shape.level;
        let config = CsConfig {
            cs: None,
            level,
            cluster: CLUSTER,
            store,
            addr: addr(2, index),
            location,
            tier: 0,
            capacity: 0,
            repository: none(),
            mds: Vec::new(),
            mds_known: Vec::new(),
            durable_always: false,
            scrub_chunks_per_minute: self.shape.scrub,
        };
        let node = self.world.add_node(config.addr, NodeId::Cs(CsId(0)), vec![disk]);
        self.cs.push(CsNode { node, id: None, retired: false, level, config });
        self.start_cs(index);
    }

    /// How the stores of this cluster are opened.
    pub fn store_options(&self, index: usize) -> StoreOptions {
        StoreOptions {
            cluster: Some(CLUSTER),
            store_uuid: Some(self.cs[index].config.store),
            chain_groups_max: self.shape.chain_groups_max,
            ..StoreOptions::default()
        }
    }

    /// Starts a chunk server, unless it runs.
    pub fn start_cs(&mut self, index: usize) {
        let rng = self.next_rng();
        let store = Store::new(self.shape.cs_disk, self.store_options(index));
        let cs = &self.cs[index];
        if self.world.nodes[cs.node.0].process.is_none() && !cs.retired {
            let (node, id, level) = (cs.node, cs.id, cs.level);
            let config = CsConfig { cs: id, level, ..cs.config.clone() };
            let Addresses { given, known } = self.addresses_at_start(node);
            let config = CsConfig { mds: given, mds_known: known, ..config };
            self.world.nodes[node.0].identity = NodeId::Cs(id.unwrap_or(CsId(0)));
            self.world.nodes[node.0].level = level;
            self.world.start(node, Box::new(CsCore::new(config, store, rng)));
        }
    }

    /// What the shells do after each turn: write down the id the cluster gave, and where its metadata servers are.
    pub fn keep_what_is_told(&mut self) {
        let servers = self.cs.iter().map(|cs| cs.node);
        for node in servers.chain(self.clients.iter().copied()).chain(self.operator).collect::<Vec<_>>() {
            let of_server = self.world.inspect::<CsCore, _>(node, |core| core.mds_servers().to_vec());
            let known =
                of_server.or_else(|| self.world.inspect::<ClientCore, _>(node, |core| core.mds_servers().to_vec()));
            if let Some(known) = known.filter(|known| !known.is_empty()) {
                self.addresses.entry(node).or_default().known = known;
            }
            if !self.is_running(node) || self.world.nodes[node.0].paused || self.world.net.cuts_off(node) {
                self.away.insert(node);
            } else if self.knows_somebody(node) {
                self.away.remove(&node);
            }
        }
        for cs in &mut self.cs {
            let id = self.world.inspect::<CsCore, _>(cs.node, |core| core.id()).flatten();
            if let Some(id) = id {
                cs.id = Some(id);
                self.world.nodes[cs.node.0].identity = NodeId::Cs(id);
            }
        }
    }

    /// Makes a client's machine and starts it.
    pub fn create_client(&mut self) -> usize {
        let index = self.clients.len();
        let node = self.world.add_node(addr(3, index), NodeId::Client(ClientId(0)), Vec::new());
        self.clients.push(node);
        // Where disks are small clients are not restarted, and are of the newer release from the start.
        self.client_levels.push(if self.shape.fail_when_full { Level::CURRENT } else { self.shape.level });
        self.start_client(index);
        index
    }

    /// Starts a client, unless it runs.
    pub fn start_client(&mut self, index: usize) {
        let rng = self.next_rng();
        let node = self.clients[index];
        if self.world.nodes[node.0].process.is_none() {
            self.world.nodes[node.0].level = self.client_levels[index];
            self.start_client_at(node, index, rng);
        }
    }

    /// Makes the operator's client.
    pub fn create_operator(&mut self) {
        let index = 100;
        let node = self.world.add_node(addr(3, index), NodeId::Client(ClientId(0)), Vec::new());
        self.operator = Some(node);
        self.world.nodes[node.0].level = Level::CURRENT;
        let rng = self.next_rng();
        self.start_client_at(node, index, rng);
    }

    fn start_client_at(&mut self, node: NodeIndex, index: usize, rng: Rng) {
        let Addresses { mut given, known } = self.addresses_at_start(node);
        given.extend(known);
        let config = CoreConfig {
            mds: given,
            host: host(3, index),
            host_name: format!("client{index}"),
            purpose: "simulation".to_owned(),
            kind: SessionKind::Client,
            on_no_space: if self.fails_when_full(index) { OnNoSpace::Fail } else { OnNoSpace::Wait },
            call_deadline: Duration::from_secs(60),
            open_deadline: Duration::from_secs(30),
        };
        self.world.start(node, Box::new(ClientCore::new(config, rng)));
    }

    /// True when writes of this client fail for lack of room.
    pub fn fails_when_full(&self, client: usize) -> bool {
        self.shape.mounts || (self.shape.fail_when_full && client % 2 == 1)
    }

    pub fn is_running(&self, node: NodeIndex) -> bool {
        self.world.nodes[node.0].process.is_some()
    }
}
