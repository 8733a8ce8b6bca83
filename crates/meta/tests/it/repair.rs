//! Chunk servers that come, go and lose copies, a writer, and the state machine between them.
//!
//! The servers here keep of each copy its version and the last value written, and follow the rules of the data path; so
//! a copy that the state machine calls current and that missed a write is seen at once.

use crate::support::{SECOND, World};
use cairn_meta::Command;
use cairn_stdx::Rng;
use cairn_types::{ChunkId, ChunkVersion, ClientId, CsId, Epoch, VolumeId};
use cairn_wire::mds::*;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug)]
pub struct Copy {
    pub version: ChunkVersion,
    pub value: u64,
    pub rebuilding: bool,
}

#[derive(Default)]
pub struct Server {
    pub up: bool,
    pub copies: BTreeMap<ChunkId, Copy>,
    pub done: Vec<OrderDone>,
}

pub struct Cluster {
    pub world: World,
    pub servers: BTreeMap<CsId, Server>,
    pub session: ClientId,
    pub volume: VolumeId,
    pub epoch: Epoch,
    /// Last acknowledged value per index.
    pub written: BTreeMap<u64, u64>,
    pub next_value: u64,
    /// Index of every chunk there ever was.
    pub indexes: BTreeMap<ChunkId, u64>,
    /// What servers can hold, of which each copy takes 1 MiB; none: more than the tests use.
    pub capacity: Option<u64>,
}

impl Cluster {
    pub fn new(hosts: u8, per_host: u8, options: VolumeOptions) -> Self {
        let mut world = World::new();
        let mut servers = BTreeMap::new();
        for host in 0..hosts {
            for _ in 0..per_host {
                let cs = world.server(host, 1 << 40);
                servers.insert(cs, Server { up: true, ..Server::default() });
            }
        }
        let session = world.session();
        let volume = world.volume(session, "v", options).volume;
        let epoch = world.acquire(session, volume, LeaseMode::Exclusive).unwrap().epoch;
        Cluster {
            world,
            servers,
            session,
            volume,
            epoch,
            written: BTreeMap::new(),
            next_value: 1,
            indexes: BTreeMap::new(),
            capacity: None,
        }
    }

    fn entry(&self, index: u64) -> Option<ChunkEntry> {
        let request = MdsRequest::ChunkMap { volume: self.volume, index, limit: 1 };
        match self.world.meta.query(&request).unwrap() {
            MdsReply::Chunks(entries) => entries.into_iter().find(|entry| entry.index == index),
            other => panic!("{other:?}"),
        }
    }

    fn fail(&mut self, cs: CsId, chunks: Vec<ChunkId>) {
        let before = self.world.chunks(self.volume);
        let request = MdsRequest::ReplicaFailed { volume: self.volume, epoch: self.epoch, cs, chunks };
        let MdsReply::Chunks(changed) = self.world.call(self.session, request).unwrap() else { panic!() };
        for new in changed {
            let mut expected = before.iter().find(|entry| entry.chunk == new.chunk).unwrap().clone();
            let is_current = |replica: &Replica| replica.role == ReplicaRole::Current;
            if expected.replicas.iter().any(|replica| replica.cs != cs && is_current(replica)) {
                expected.replicas.retain(|replica| replica.cs != cs);
                expected.version.0 += 1;
            }
            assert_eq!(new, expected);
        }
    }

    /// Writes one value as a lease holder does; gives up where a holder would wait.
    pub fn write(&mut self, index: u64) {
        for _ in 0..12 {
            let Some(entry) = self.entry(index) else {
                let request =
                    MdsRequest::ChunkAllocate { volume: self.volume, epoch: self.epoch, indexes: vec![index] };
                if self.world.call(self.session, request).is_err() {
                    return;
                }
                continue;
            };
            self.indexes.insert(entry.chunk, index);
            let current = entry.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current).count();
            if current < usize::from(entry.minimum) {
                return;
            }
            let Some((cs, all)) = entry.replicas.iter().find_map(|replica| self.refusal(&entry, replica, index)) else {
                let value = self.next_value;
                self.next_value += 1;
                for replica in &entry.replicas {
                    let copies = &mut self.servers.get_mut(&replica.cs).unwrap().copies;
                    let copy = copies.entry(entry.chunk);
                    let copy = copy.or_insert(Copy { version: entry.version, value, rebuilding: false });
                    copy.value = value;
                }
                self.written.insert(index, value);
                return;
            };
            self.fail(cs, if all { Vec::new() } else { vec![entry.chunk] });
            if self.entry(index).is_some_and(|now| now.version == entry.version) {
                return;
            }
        }
    }

    /// Why a replica does not take the write, after raising it if that is allowed: the server, and whether all of it is
    /// bad.
    fn refusal(&mut self, entry: &ChunkEntry, replica: &Replica, index: u64) -> Option<(CsId, bool)> {
        let server = self.servers.get_mut(&replica.cs).unwrap();
        if !server.up {
            return Some((replica.cs, true));
        }
        match server.copies.get_mut(&entry.chunk) {
            None if replica.role == ReplicaRole::Current && !self.written.contains_key(&index) => None,
            None => Some((replica.cs, false)),
            Some(copy) if replica.role == ReplicaRole::Rebuilding => {
                (copy.version != entry.version).then_some((replica.cs, false))
            }
            Some(copy) if copy.rebuilding => Some((replica.cs, false)),
            Some(copy) => {
                assert!(copy.version <= entry.version);
                if copy.version < replica.since {
                    return Some((replica.cs, false));
                }
                copy.version = entry.version;
                None
            }
        }
    }

    /// One heartbeat: reports what is done and carries out what comes back, with a delay of one heartbeat.
    pub fn heartbeat(&mut self, cs: CsId) {
        if self.world.meta.servers().any(|(other, state)| other == cs && state == CsState::Dropped) {
            return;
        }
        let done = std::mem::take(&mut self.servers.get_mut(&cs).unwrap().done);
        let (capacity, used) = match self.capacity {
            Some(capacity) => (capacity, self.servers[&cs].copies.len() as u64 * (1 << 20)),
            None => (1 << 40, 1 << 30),
        };
        for order in self.world.heartbeat(cs, capacity, used, done) {
            let done = self.obey(cs, order);
            self.servers.get_mut(&cs).unwrap().done.extend(done);
        }
    }

    fn obey(&mut self, cs: CsId, order: CsOrder) -> Option<OrderDone> {
        let done = |chunk, version, kind, error: Option<&str>| {
            Some(OrderDone { chunk, version, kind, error: error.map(str::to_owned) })
        };
        let copies = &mut self.servers.get_mut(&cs).unwrap().copies;
        match order {
            CsOrder::Raise { chunk, since, version } => match copies.get_mut(&chunk) {
                Some(copy) if !copy.rebuilding && since <= copy.version && copy.version <= version => {
                    copy.version = version;
                    done(chunk, version, OrderKind::Raise, None)
                }
                _ => done(chunk, version, OrderKind::Raise, Some("no such copy")),
            },
            CsOrder::Delete { chunk, version } => {
                if copies.get(&chunk).is_some_and(|copy| copy.version > version) {
                    return done(chunk, version, OrderKind::Delete, Some("newer"));
                }
                copies.remove(&chunk);
                done(chunk, version, OrderKind::Delete, None)
            }
            CsOrder::Rebuild { entry, sources, .. } => {
                let copy =
                    copies.entry(entry.chunk).or_insert(Copy { version: entry.version, value: 0, rebuilding: true });
                if copy.version > entry.version {
                    return None;
                }
                *copy = Copy { version: entry.version, rebuilding: true, ..*copy };
                let source = sources.iter().find_map(|(from, _)| {
                    let server = self.servers.get(from).filter(|server| server.up)?;
                    let copy = server.copies.get(&entry.chunk)?;
                    (copy.version == entry.version && !copy.rebuilding).then_some(copy.value)
                });
                let never_written = !self.written.contains_key(&entry.index);
                let value = source.or(never_written.then_some(0))?;
                let copies = &mut self.servers.get_mut(&cs).unwrap().copies;
                let copy = copies.get_mut(&entry.chunk).unwrap();
                copy.value = copy.value.max(value);
                copy.rebuilding = false;
                done(entry.chunk, entry.version, OrderKind::Rebuild, None)
            }
            CsOrder::VerifyRate { .. } | CsOrder::Level(_) => None,
        }
    }

    /// I7 and I1: every current replica that has not lost its copy has the last acknowledged value. A copy below the
    /// version with which its server joined is refused by all, so there must be none.
    pub fn check_truth(&self, context: &str) {
        for entry in self.world.chunks(self.volume) {
            let Some(expected) = self.written.get(&entry.index) else { continue };
            for replica in entry.replicas.iter().filter(|replica| replica.role == ReplicaRole::Current) {
                let Some(copy) = self.servers[&replica.cs].copies.get(&entry.chunk) else { continue };
                if copy.version >= replica.since {
                    assert_eq!(
                        copy.value, *expected,
                        "{context}: {} on {} is current and old",
                        entry.chunk, replica.cs
                    );
                }
            }
        }
    }

    pub fn heal(&mut self) {
        for server in self.servers.values_mut() {
            server.up = true;
        }
        let all: Vec<CsId> = self.servers.keys().copied().collect();
        for _ in 0..200 {
            for cs in &all {
                self.heartbeat(*cs);
            }
            self.world.tick(SECOND);
            let counts = self.world.meta.chunk_counts();
            let idle = counts.healthy == counts.total && counts.replicating == 0 && counts.deleting == 0;
            if idle && !self.world.meta.has_work() && self.servers.values().all(|server| server.done.is_empty()) {
                return;
            }
        }
        panic!("not healed: {:?}", self.world.meta.chunk_counts());
    }

    /// Something happens to the cluster.
    pub fn random_step(&mut self, rng: &mut Rng, all: &[CsId]) {
        let cs = *rng.choose(all).unwrap();
        match rng.below(20) {
            0..=7 => self.write(rng.below(12)),
            8..=12 => {
                if self.servers[&cs].up {
                    self.heartbeat(cs);
                }
            }
            13 => {
                let down = self.servers.values().filter(|server| !server.up).count();
                let server = self.servers.get_mut(&cs).unwrap();
                server.up = !server.up || down >= 2;
                if !server.up {
                    server.done.clear();
                }
            }
            14 => {
                if !self.servers[&cs].up {
                    let state = if rng.chance(1, 2) { CsState::Inactive } else { CsState::Offline };
                    let wall_ns = self.world.wall_ns;
                    self.world.command(Command::CsSilent { cs, state, wall_ns }).unwrap();
                }
            }
            15 => {
                let index = rng.below(12);
                let request = MdsRequest::ChunkDrop { volume: self.volume, epoch: self.epoch, index, count: 2 };
                self.world.call(self.session, request).unwrap();
                self.written.remove(&index);
                self.written.remove(&(index + 1));
            }
            16 => {
                if self.servers[&cs].up {
                    self.report(cs);
                }
            }
            17 => {
                let value = ["2", "3:2", "4:2"][rng.below(3) as usize].to_owned();
                let inode = cairn_types::InodeId(self.volume.0);
                let request = MdsRequest::AttributesSet { inode, pairs: vec![("replicas".into(), value)] };
                self.world.call(self.session, request).unwrap();
            }
            _ => self.world.tick(rng.below(3) * SECOND),
        }
    }

    pub fn report(&mut self, cs: CsId) {
        let copies = &self.servers[&cs].copies;
        let chunks = copies.iter().map(|(chunk, copy)| ChunkReport { chunk: *chunk, version: copy.version }).collect();
        let request = MdsRequest::CsReport { cs, after: ChunkId(0), chunks, last: true };
        self.world.call(ClientId(0), request).unwrap();
    }
}

#[test]
pub fn random_failures_keep_every_current_copy_true_and_heal() {
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let options = VolumeOptions { chunk_size: Some(1 << 20), ..VolumeOptions::default() };
        let mut cluster = Cluster::new(5, 1 + (seed % 2) as u8, options);
        // Small enough that copies move for balance meanwhile.
        cluster.capacity = (seed % 3 == 0).then_some(24 << 20);
        let all: Vec<CsId> = cluster.servers.keys().copied().collect();
        for step in 0..400 {
            let context = format!("seed {seed} step {step}");
            cluster.random_step(&mut rng, &all);
            cluster.check_truth(&context);
            if step % 10 == 0 {
                cluster.world.meta.check();
            }
        }
        cluster.heal();
        cluster.check_truth(&format!("seed {seed} healed"));
        cluster.world.meta.check();
        // No orphans, full redundancy, one host per copy.
        let entries = cluster.world.chunks(cluster.volume);
        for (cs, server) in &cluster.servers {
            for chunk in server.copies.keys() {
                let entry = entries.iter().find(|entry| entry.chunk == *chunk);
                let member = entry.is_some_and(|entry| entry.replicas.iter().any(|replica| replica.cs == *cs));
                assert!(member, "seed {seed}: {chunk} on {cs} is an orphan");
            }
        }
        for index in cluster.written.keys() {
            assert!(entries.iter().any(|entry| entry.index == *index));
        }
        let request = MdsRequest::LeaseRelease { leases: vec![(cluster.volume, cluster.epoch, true)] };
        cluster.world.call(cluster.session, request).unwrap();
        let volume = cluster.volume;
        cluster.world.call(cluster.session, MdsRequest::VolumeDelete { volume }).unwrap();
        cluster.world.settle();
        cluster.world.meta.check();
        assert_eq!(cluster.world.meta.chunk_counts().total, 0);
        cluster.written.clear();
        cluster.heal();
        assert!(cluster.servers.values().all(|server| server.copies.is_empty()), "seed {seed}: copies left");
    }
}

pub fn filled(hosts: u8, chunks: u64) -> Cluster {
    let options = VolumeOptions { chunk_size: Some(1 << 20), ..VolumeOptions::default() };
    let mut cluster = Cluster::new(hosts, 1, options);
    for index in 0..chunks {
        cluster.write(index);
    }
    cluster.heal();
    cluster
}

impl Cluster {
    pub fn silence(&mut self, cs: CsId, state: CsState) {
        self.servers.get_mut(&cs).unwrap().up = false;
        let wall_ns = self.world.wall_ns;
        self.world.command(Command::CsSilent { cs, state, wall_ns }).unwrap();
    }

    /// Seconds with heartbeats of all servers that are up.
    pub fn run(&mut self, seconds: u64) {
        let all: Vec<CsId> = self.servers.keys().copied().collect();
        for _ in 0..seconds {
            for cs in &all {
                if self.servers[cs].up {
                    self.heartbeat(*cs);
                }
            }
            self.world.tick(SECOND);
        }
    }
}

#[test]
fn a_silent_server_is_waited_for_and_an_offline_one_replaced() {
    let mut cluster = filled(5, 40);
    let cs = *cluster.servers.keys().next().unwrap();
    let here = cluster.world.chunks(cluster.volume);
    let here = here.iter().filter(|entry| entry.replicas.iter().any(|replica| replica.cs == cs)).count() as u64;
    assert!(here > 10);
    cluster.silence(cs, CsState::Inactive);
    assert_eq!(cluster.world.meta.chunk_counts().standby, here);
    cluster.run(20);
    assert_eq!(cluster.world.meta.chunk_counts().replicating, 0);
    cluster.silence(cs, CsState::Offline);
    assert_eq!(cluster.world.meta.chunk_counts().degraded, here);
    cluster.run(60);
    let counts = cluster.world.meta.chunk_counts();
    assert_eq!((counts.healthy, counts.degraded), (40, 0));
    assert!(cluster.world.chunks(cluster.volume).iter().all(|entry| entry.replicas.iter().all(|r| r.cs != cs)));
    // It returns: its copies are of no use any more and go.
    cluster.heal();
    assert!(cluster.servers[&cs].copies.is_empty());
    cluster.world.meta.check();
}

#[test]
fn a_server_that_does_not_answer_a_client_gets_nothing_back_before_its_silence_is_noticed() {
    let mut cluster = filled(4, 30);
    let cs = *cluster.servers.keys().nth(1).unwrap();
    let copies = |cluster: &Cluster| {
        let entries = cluster.world.chunks(cluster.volume);
        entries.iter().filter(|entry| entry.replicas.iter().any(|replica| replica.cs == cs)).count()
    };
    let before = copies(&cluster);
    assert!(before > 10);
    // It counts as active all the time.
    cluster.servers.get_mut(&cs).unwrap().up = false;
    (0..30).for_each(|index| cluster.write(index));
    for _ in 0..19 {
        cluster.world.tick(SECOND / 10);
        assert_eq!(copies(&cluster), 0);
    }
    // It was a matter between the two: nobody found it silent.
    cluster.servers.get_mut(&cs).unwrap().up = true;
    cluster.heal();
    assert_eq!(copies(&cluster), before);
    cluster.world.meta.check();
}

#[test]
fn a_returning_server_is_freshened_rather_than_another_filled() {
    let mut cluster = filled(5, 30);
    let cs = *cluster.servers.keys().nth(2).unwrap();
    let member = |cluster: &Cluster| -> Vec<u64> {
        let entries = cluster.world.chunks(cluster.volume);
        let here = entries.iter().filter(|entry| entry.replicas.iter().any(|replica| replica.cs == cs));
        here.map(|entry| entry.index).collect()
    };
    let before = member(&cluster);
    cluster.silence(cs, CsState::Inactive);
    for index in 0..30 {
        cluster.write(index);
    }
    assert!(member(&cluster).is_empty());
    assert_eq!(cluster.world.meta.chunk_counts().urgent, before.len() as u64);
    cluster.run(20);
    assert_eq!(cluster.world.meta.chunk_counts().urgent, before.len() as u64);
    cluster.servers.get_mut(&cs).unwrap().up = true;
    cluster.run(60);
    assert_eq!(member(&cluster), before);
    assert_eq!(cluster.world.meta.chunk_counts().healthy, 30);
    cluster.check_truth("freshened");
}

#[test]
fn a_returned_server_is_freshened_without_a_pause_between_its_copies() {
    const CHUNKS: u64 = 200;
    let mut cluster = filled(3, CHUNKS);
    let cs = *cluster.servers.keys().nth(1).unwrap();
    cluster.silence(cs, CsState::Inactive);
    for index in 0..CHUNKS {
        cluster.write(index);
    }
    assert_eq!(cluster.world.meta.chunk_counts().urgent, CHUNKS);
    cluster.servers.get_mut(&cs).unwrap().up = true;
    cluster.run(2);
    let counts = cluster.world.meta.chunk_counts();
    assert!(counts.replicating > 0 && counts.replicating < CHUNKS / 2, "not all at once: {counts:?}");
    // No time passes: each copy that is done makes room for the next.
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    for _ in 0..40 {
        all.iter().for_each(|cs| cluster.heartbeat(*cs));
    }
    assert_eq!(cluster.world.meta.chunk_counts().healthy, CHUNKS);
    cluster.check_truth("freshened");
    cluster.world.meta.check();
}

#[test]
fn too_many_offline_hosts_stop_copying_and_say_so() {
    let mut cluster = filled(7, 40);
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    for cs in &all[..3] {
        cluster.silence(*cs, CsState::Offline);
    }
    cluster.run(60);
    assert_eq!(cluster.world.meta.chunk_counts().replicating, 0);
    let Ok(MdsReply::Stat(stat)) = cluster.world.meta.query(&MdsRequest::Stat) else { panic!() };
    assert_eq!(stat.health, ClusterHealth::Failed);
    let Ok(MdsReply::Events(events)) = cluster.world.meta.query(&MdsRequest::Events { after: 0, limit: 1000 }) else {
        panic!()
    };
    assert!(events.iter().any(|event| event.text.contains("mds.wd.max_offline_cs_hosts")));
    let request = MdsRequest::ConfigSet { pairs: vec![("mds.wd.max_offline_cs_hosts".into(), "0".into())] };
    cluster.world.call(cluster.session, request).unwrap();
    cluster.run(120);
    let counts = cluster.world.meta.chunk_counts();
    assert_eq!(counts.healthy + counts.offline, 40, "{counts:?}");
    cluster.heal();
    cluster.check_truth("after the outage");
}

#[test]
fn a_drained_server_leaves_when_its_chunks_live_elsewhere() {
    let mut cluster = filled(5, 40);
    let cs = *cluster.servers.keys().next().unwrap();
    let remove = |cancel| MdsRequest::CsRemove { cs, force: false, cancel };
    cluster.world.call(cluster.session, remove(false)).unwrap();
    assert!(matches!(
        cluster.world.call(cluster.session, MdsRequest::CsRemove { cs, force: true, cancel: false }),
        Err(MdsError::Refused(_))
    ));
    cluster.run(1);
    cluster.world.call(cluster.session, remove(true)).unwrap();
    cluster.heal();
    assert!(!cluster.servers[&cs].copies.is_empty());
    cluster.world.call(cluster.session, remove(false)).unwrap();
    for round in 0..40 {
        if cluster.world.meta.servers().any(|(other, state)| other == cs && state == CsState::Dropped) {
            assert!(round > 1);
            break;
        }
        cluster.run(2);
        cluster.write(round % 40);
        cluster.check_truth("draining");
    }
    assert!(cluster.servers[&cs].copies.is_empty());
    cluster.servers.remove(&cs);
    cluster.heal();
    cluster.world.meta.check();
    let back = MdsRequest::CsRegister(CsProfile {
        cs: Some(cs),
        store: [40; 16],
        addr: crate::support::addr(9),
        location: Location {
            host: cairn_types::HostId([0; 16]),
            host_name: "host0".into(),
            rack: String::new(),
            row: String::new(),
            room: String::new(),
            site: String::new(),
        },
        tier: 0,
        capacity: 1,
        repository: String::new(),
    });
    assert!(matches!(cluster.world.call(ClientId(0), back), Err(MdsError::Refused(_))));
}

#[test]
fn the_last_current_copy_stays_whatever_is_said_of_it() {
    let mut cluster = filled(3, 4);
    let entry = cluster.entry(0).unwrap();
    let all: Vec<CsId> = entry.replicas.iter().map(|replica| replica.cs).collect();
    for cs in &all {
        cluster.fail(*cs, Vec::new());
    }
    let left = cluster.entry(0).unwrap();
    assert_eq!(left.replicas.iter().map(|replica| replica.cs).collect::<Vec<_>>(), [all[2]]);
    assert_eq!(cluster.world.meta.chunk_counts().blocked, 4);
    let damaged = MdsRequest::CsHeartbeat {
        cs: all[2],
        boot: 1,
        stats: CsStats { capacity: 1 << 40, ..CsStats::default() },
        done: Vec::new(),
        damaged: vec![(entry.chunk, 3)],
        failed: Some("it smells".into()),
    };
    cluster.world.call(ClientId(0), damaged).unwrap();
    assert_eq!(cluster.entry(0).unwrap(), left);
    assert_eq!(cluster.world.meta.chunk_counts().offline, 4);
    let force = MdsRequest::CsRemove { cs: all[2], force: true, cancel: false };
    assert!(matches!(cluster.world.call(cluster.session, force), Err(MdsError::Refused(_))));
    cluster.world.meta.check();
}

#[test]
fn a_lost_copy_shows_in_the_report_and_an_orphan_is_deleted() {
    let mut cluster = filled(4, 10);
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    for cs in &all {
        cluster.report(*cs);
    }
    assert_eq!(cluster.world.meta.chunk_counts().void, 0);
    let cs = all[0];
    let lost = *cluster.servers[&cs].copies.keys().next().unwrap();
    cluster.servers.get_mut(&cs).unwrap().copies.remove(&lost);
    cluster
        .servers
        .get_mut(&cs)
        .unwrap()
        .copies
        .insert(ChunkId(0), Copy { version: ChunkVersion(1), value: 0, rebuilding: false });
    let foreign = Copy { version: ChunkVersion(1), value: 0, rebuilding: false };
    cluster.servers.get_mut(&cs).unwrap().copies.insert(ChunkId(1 << 40), foreign);
    let report = |cluster: &mut Cluster, after, from: u64, to: u64, last| {
        let copies = cluster.servers[&cs].copies.range(ChunkId(from)..ChunkId(to));
        let chunks = copies.map(|(chunk, copy)| ChunkReport { chunk: *chunk, version: copy.version }).collect();
        cluster.world.call(ClientId(0), MdsRequest::CsReport { cs, after: ChunkId(after), chunks, last })
    };
    assert!(report(&mut cluster, 5, 0, 4, false).is_err());
    cluster.servers.get_mut(&cs).unwrap().copies.remove(&ChunkId(0));
    report(&mut cluster, 0, 1, 6, false).unwrap();
    report(&mut cluster, 5, 6, u64::MAX, true).unwrap();
    assert_eq!(cluster.world.meta.chunk_counts().degraded, 1);
    let entry = cluster.world.chunks(cluster.volume).into_iter().find(|entry| entry.chunk == lost).unwrap();
    assert_eq!((entry.replicas.len(), entry.version), (2, ChunkVersion(2)));
    cluster.heal();
    assert!(cluster.servers[&cs].copies.contains_key(&ChunkId(1 << 40)), "a chunk of the future is not deleted");
    cluster.check_truth("after the report");
    cluster.world.meta.check();
}

impl Cluster {
    fn damage(&mut self, cs: CsId, chunk: ChunkId) {
        let stats = CsStats { capacity: 1 << 40, used: 1 << 30, ..CsStats::default() };
        let damaged = vec![(chunk, 3)];
        let request = MdsRequest::CsHeartbeat { cs, boot: 1, stats, done: Vec::new(), damaged, failed: None };
        self.world.call(ClientId(0), request).unwrap();
    }

    fn current(&self, index: u64) -> Vec<CsId> {
        let replicas = self.entry(index).unwrap().replicas;
        replicas.iter().filter(|replica| replica.role == ReplicaRole::Current).map(|replica| replica.cs).collect()
    }
}

#[test]
pub fn damaged_copies_stay_until_others_are_complete() {
    let mut cluster = filled(5, 4);
    let chunk = cluster.entry(0).unwrap().chunk;
    let before = cluster.current(0);
    cluster.damage(before[0], chunk);
    cluster.damage(before[1], chunk);
    cluster.damage(before[1], chunk);
    assert_eq!(cluster.current(0), before, "each may be the source of what the other lacks");
    assert_eq!(cluster.world.meta.chunk_counts().degraded, 1);
    cluster.world.meta.check();
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    for _ in 0..10 {
        for cs in &all {
            cluster.heartbeat(*cs);
            let current = cluster.current(0);
            let whole = current.iter().filter(|cs| !before[..2].contains(cs)).count();
            assert!(current.contains(&before[0]) && current.contains(&before[1]) || whole >= 3, "{current:?}");
        }
        cluster.world.tick(SECOND);
        cluster.world.meta.check();
    }
    cluster.heal();
    let after = cluster.current(0);
    assert!(after.len() == 3 && !after.contains(&before[0]) && !after.contains(&before[1]), "{after:?}");
    cluster.check_truth("after the damage");
    cluster.world.meta.check();
}

#[test]
fn a_damaged_copy_without_another_server_is_made_anew_in_its_place() {
    let mut cluster = filled(3, 4);
    let chunk = cluster.entry(0).unwrap().chunk;
    let before = cluster.current(0);
    cluster.damage(before[0], chunk);
    cluster.servers.get_mut(&before[0]).unwrap().copies.get_mut(&chunk).unwrap().value = 0;
    cluster.heal();
    assert_eq!(cluster.current(0).len(), 3);
    assert!(cluster.servers[&before[0]].copies[&chunk].value > 0, "the copy was made anew");
    // All damaged, nowhere else to go: none of them goes.
    before.iter().for_each(|cs| cluster.damage(*cs, chunk));
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    for _ in 0..80 {
        all.iter().for_each(|cs| cluster.heartbeat(*cs));
        cluster.world.tick(SECOND);
    }
    assert_eq!(cluster.current(0).len(), 3);
    cluster.world.meta.check();
}

impl Cluster {
    fn examine(&self, cs: CsId) -> MdsReply {
        let request = MdsRequest::CsExamine { cs, volume: VolumeId(0), index: 0 };
        self.world.meta.query(&request).unwrap()
    }
}

#[test]
fn what_removing_a_server_would_lose_is_listed_and_refused() {
    let mut cluster = filled(3, 6);
    let all: Vec<CsId> = cluster.servers.keys().copied().collect();
    let MdsReply::CsExamined { chunks, lost, next, drain, force } = cluster.examine(all[0]) else { panic!() };
    assert_eq!((chunks, lost.len(), next), (6, 0, None));
    assert!(drain.is_some_and(|why| why.contains("2 active chunk servers would remain")));
    assert!(force.is_some_and(|why| why.contains("answers")));
    // Two of three lie still: nothing is lost with the third as long as they may come back, and nothing is in reach.
    for cs in &all {
        cluster.silence(*cs, CsState::Offline);
    }
    let MdsReply::CsExamined { lost, force, .. } = cluster.examine(all[0]) else { panic!() };
    assert!(force.is_none());
    assert_eq!((lost.len(), lost[0].name.as_str(), lost[0].only, lost[0].unreachable), (1, "v", 0, 6));
    let remove = |cs| MdsRequest::CsRemove { cs, force: true, cancel: false };
    let refused = cluster.world.call(cluster.session, remove(all[0])).unwrap_err().to_string();
    assert!(refused.contains("6 of volume v") && refused.contains("--lose-data"), "{refused}");
    // Given up, one after the other: the last one holds the only copies, and they stay unreadable until deleted.
    cluster.world.call(cluster.session, MdsRequest::CsAbandon { cs: all[0] }).unwrap();
    cluster.world.call(cluster.session, MdsRequest::CsAbandon { cs: all[1] }).unwrap();
    cluster.world.meta.check();
    cluster.world.call(cluster.session, MdsRequest::CsAbandon { cs: all[2] }).unwrap();
    for _ in 0..20 {
        cluster.world.tick(SECOND);
        cluster.world.meta.check();
    }
    assert_eq!(cluster.world.meta.chunk_counts().offline, 6);
    assert!(cluster.world.meta.query(&MdsRequest::CsExamine { cs: all[0], volume: VolumeId(0), index: 0 }).is_err());
    let Ok(MdsReply::Events(events)) = cluster.world.meta.query(&MdsRequest::Events { after: 0, limit: 1000 }) else {
        panic!()
    };
    assert!(events.iter().any(|event| event.code == "MDS-4011" && event.text.contains("volume v")));
}
