//! A cluster in one thread: virtual time, one seed, every fault, and checkers that see everything.
//!
//! Checked at every step: one leader per term, its log complete (leader completeness), one content per index on all
//! nodes and equal state hashes at equal indexes (I11), reads never older than what was acknowledged before them. After
//! the faults: everything converges, proposals commit, reads are answered, nothing acknowledged is missing.

use crate::disk::SimDisk;
use crate::solo::{config, member};
use cairn_consensus::{Change, Committed, CommittedKind, Config, Consensus, Initial, Member, Members, Output};
use cairn_consensus::{ReceiveError, SnapshotMeta, Status};
use cairn_env::{DiskDone, DiskOp, DiskRequest};
use cairn_stdx::Rng;
use cairn_types::{Duration, Instant, MdsId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const US: u64 = 1_000;
const MS: u64 = 1_000_000;

/// What a seed exercises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// A group of one grows to five, shrinks to three, changes for ever.
    Membership,
    /// A fixed group; one voter loses its log and comes back under its id.
    Amnesia,
    /// A fixed group under crashes and partitions.
    Fixed,
}

enum Event {
    Tick(u64),
    Turn(u64, u64),
    Deliver { from: u64, to: u64, bytes: Vec<u8> },
    Disk { node: u64, life: u64, request: DiskRequest, flush_covers: usize },
    Image { from: u64, to: u64, meta: SnapshotMeta, hash: u64 },
    ImageOutcome { from: u64, to: u64, ok: bool, request: u64 },
    Client,
    Fault,
    Restart(u64),
    Admin,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct State {
    index: u64,
    hash: u64,
}

struct Node {
    config: Config,
    core: Option<Consensus>,
    life: u64,
    disk: SimDisk,
    in_flight: BTreeMap<u64, DiskOp>,
    state: State,
    saved: State,
    image: Option<(SnapshotMeta, u64, u64, u64)>,
    reads: BTreeMap<u64, u64>,
    instance: u64,
    wiped: bool,
    retired: bool,
    open: bool,
}

/// The cluster and its checkers.
pub struct World {
    rng: Rng,
    now: u64,
    sequence: u64,
    events: BTreeMap<(u64, u64), Event>,
    nodes: BTreeMap<u64, Node>,
    blocked: BTreeSet<(u64, u64)>,
    mode: Mode,
    drop_per_mille: u64,
    duplicate_per_mille: u64,
    delay_max: u64,
    slow_disk: bool,
    faults: bool,
    next_token: u64,
    next_id: u64,
    image_requests: BTreeMap<u64, (u64, u64)>,
    admin_pending: Option<u64>,
    /// Omniscient: content and state hash of every committed index, leaders by term, what clients know.
    chosen: Vec<(u64, u64, u64)>,
    leaders: BTreeMap<u64, u64>,
    acknowledged: u64,
    members: Members,
    wiped_done: bool,
    recent: VecDeque<String>,
    pub acks: u64,
    pub reads_answered: u64,
    pub images: u64,
    pub restarts: u64,
    pub changes: u64,
    pub refused_instances: u64,
    pub trace: u64,
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 31)
}

fn content_hash(entry: &Committed) -> u64 {
    let text = match &entry.kind {
        CommittedKind::Command(data) => return data.iter().fold(1, |hash, byte| mix(hash, u64::from(*byte))),
        CommittedKind::Change { change, members } => format!("{change:?}{members:?}"),
        CommittedKind::Noop => String::new(),
    };
    text.bytes().fold(2, |hash, byte| mix(hash, u64::from(byte)))
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mode = *rng.choose(&[Mode::Membership, Mode::Membership, Mode::Amnesia, Mode::Fixed]).unwrap();
        let count = match mode {
            Mode::Membership => 1,
            Mode::Amnesia => 3,
            Mode::Fixed => *rng.choose(&[3, 3, 5]).unwrap(),
        };
        let mut world = Self {
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            nodes: BTreeMap::new(),
            blocked: BTreeSet::new(),
            mode,
            drop_per_mille: *rng.choose(&[0, 0, 10, 100]).unwrap(),
            duplicate_per_mille: *rng.choose(&[0, 10, 50]).unwrap(),
            delay_max: *rng.choose(&[MS, 5 * MS, 60 * MS]).unwrap(),
            slow_disk: rng.chance(1, 4),
            faults: true,
            next_token: 0,
            next_id: count + 1,
            image_requests: BTreeMap::new(),
            admin_pending: None,
            chosen: Vec::new(),
            leaders: BTreeMap::new(),
            acknowledged: 0,
            members: Members::default(),
            wiped_done: false,
            recent: VecDeque::new(),
            acks: 0,
            reads_answered: 0,
            images: 0,
            restarts: 0,
            changes: 0,
            refused_instances: 0,
            trace: seed,
            rng,
        };
        let voters: Vec<Member> = (1..=count).map(member).collect();
        for id in 1..=count {
            world.create(id, member(id).instance, &Initial::Bootstrap { voters: voters.clone() });
        }
        world.at(10 * MS, Event::Client);
        world.at(300 * MS, Event::Fault);
        world.at(100 * MS, Event::Admin);
        world
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), event);
    }

    fn create(&mut self, id: u64, instance: u64, initial: &Initial) {
        let config = Config { write_through: self.rng.chance(1, 2), ..config(id) };
        let mut disk = SimDisk::new(config.log_size_bytes, true);
        for op in Consensus::format(&config, instance, initial) {
            disk.complete(&op, 0);
        }
        let mut fresh = SimDisk::new(0, config.write_through);
        fresh.durable = disk.durable;
        let life = self.nodes.get(&id).map_or(0, |node| node.life);
        let wiped = self.nodes.contains_key(&id);
        let node = Node {
            config,
            core: None,
            life,
            disk: fresh,
            in_flight: BTreeMap::new(),
            state: State::default(),
            saved: State::default(),
            image: None,
            reads: BTreeMap::new(),
            instance,
            wiped,
            retired: false,
            open: false,
        };
        self.nodes.insert(id, node);
        self.start(id);
    }

    fn start(&mut self, id: u64) {
        let tick = self.rng.below(50 * MS);
        let node = self.nodes.get_mut(&id).unwrap();
        if node.core.is_some() || node.retired {
            return;
        }
        node.life += 1;
        node.state = node.saved;
        node.open = false;
        let mut core = Consensus::new(node.config.clone());
        let mut out = Output::default();
        core.start(Instant(self.now), node.saved.index, &mut self.rng, &mut out);
        node.core = Some(core);
        self.at(tick, Event::Tick(id));
        self.drain(id, out);
    }

    /// Ends a process, by a signal or by a power cut.
    fn stop(&mut self, id: u64, power: bool) {
        let Self { nodes, rng, .. } = self;
        let node = nodes.get_mut(&id).unwrap();
        node.core = None;
        node.life += 1;
        node.image = None;
        node.reads.clear();
        for op in std::mem::take(&mut node.in_flight).into_values() {
            node.disk.tear(&op, rng);
        }
        if power {
            node.disk.cut(rng);
        }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.recent.len() == 120 {
            self.recent.pop_front();
        }
        let text = format!("{:>9} us  {}", self.now / US, text());
        self.recent.push_back(text);
    }

    fn fail(&self, what: &str) -> ! {
        if std::env::var_os("CAIRN_TRACE").is_some() {
            self.recent.iter().for_each(|line| eprintln!("{line}"));
        }
        panic!("{what}");
    }

    fn feed(&mut self, id: u64, feed: impl FnOnce(&mut Consensus, Instant, &mut Rng, &mut Output)) {
        let lazy = self.rng.chance(1, 6);
        let now = Instant(self.now);
        let Self { nodes, rng, .. } = self;
        let node = nodes.get_mut(&id).unwrap();
        let Some(core) = &mut node.core else { return };
        let mut out = Output::default();
        feed(core, now, rng, &mut out);
        let life = node.life;
        if lazy {
            self.at(100 * US, Event::Turn(id, life));
        } else {
            core.turn(now, &mut out);
        }
        self.drain(id, out);
    }

    fn drain(&mut self, id: u64, mut out: Output) {
        loop {
            if let Some(error) = out.failed.take() {
                self.fail(&format!("node {id}: {error}"));
            }
            if let Some(opened) = out.opened.take() {
                match opened {
                    Ok(opened) => {
                        let node = self.nodes.get_mut(&id).unwrap();
                        assert_eq!(opened.instance, node.instance);
                        node.open = true;
                        self.note(|| format!("node {id} opened {opened:?}"));
                    }
                    Err(error) => self.fail(&format!("I11: node {id} does not open: {error}")),
                }
            }
            for request in std::mem::take(&mut out.disk) {
                self.issue(id, request);
            }
            for (to, bytes) in std::mem::take(&mut out.send) {
                self.send(id, to.0, bytes);
            }
            for wanted in std::mem::take(&mut out.snapshot_wanted) {
                self.stream_image(id, wanted.to.0, wanted.index_min);
            }
            for (token, index) in std::mem::take(&mut out.read_ready) {
                self.read_answered(id, token, index);
            }
            for token in std::mem::take(&mut out.read_dropped) {
                self.nodes.get_mut(&id).unwrap().reads.remove(&token);
            }
            for token in std::mem::take(&mut out.dropped) {
                if self.admin_pending == Some(token) {
                    self.admin_pending = None;
                }
            }
            if let Some(role) = out.role.take() {
                self.note(|| format!("node {id} {role:?}"));
                if role.we_are_leader {
                    self.check_leader(id, role.term);
                }
            }
            let committed = std::mem::take(&mut out.committed);
            for entry in &committed {
                self.apply(id, entry);
            }
            let prepared = out.snapshot_prepared.take();
            if committed.is_empty() && prepared.is_none() {
                return;
            }
            if let Some(meta) = prepared {
                self.install(id, &meta, &mut out);
            }
            let (now, node) = (Instant(self.now), self.nodes.get_mut(&id).unwrap());
            let Some(core) = &mut node.core else { return };
            core.applied(node.state.index);
            core.turn(now, &mut out);
        }
    }

    fn issue(&mut self, id: u64, request: DiskRequest) {
        let base = if matches!(request.op, DiskOp::Read { .. }) { 50 * US } else { 120 * US };
        let slow = if self.slow_disk && self.faults { 30 * MS } else { 400 * US };
        let delay = base + self.rng.below(slow);
        let node = self.nodes.get_mut(&id).unwrap();
        node.in_flight.insert(request.io.0, request.op.clone());
        let (life, flush_covers) = (node.life, node.disk.volatile.len());
        self.at(delay, Event::Disk { node: id, life, request, flush_covers });
    }

    fn send(&mut self, from: u64, to: u64, bytes: Vec<u8>) {
        if self.faults && (self.blocked.contains(&(from, to)) || self.rng.below(1000) < self.drop_per_mille) {
            return;
        }
        let max = if self.faults { self.delay_max } else { MS };
        if self.faults && self.rng.below(1000) < self.duplicate_per_mille {
            let delay = 20 * US + self.rng.below(10 * max);
            self.at(delay, Event::Deliver { from, to, bytes: bytes.clone() });
        }
        let delay = 20 * US + self.rng.below(max);
        self.at(delay, Event::Deliver { from, to, bytes });
    }

    /// The shell of a leader sends its present state to a follower.
    fn stream_image(&mut self, from: u64, to: u64, index_min: u64) {
        self.next_token += 1;
        let request = self.next_token;
        self.image_requests.insert(request, (from, to));
        let node = &self.nodes[&from];
        let state = node.state;
        assert!(state.index >= index_min, "the image must be newer than the state of its sender");
        let meta = node.core.as_ref().unwrap().snapshot_meta(state.index).expect("an image at the applied index");
        self.at(2_000 * MS, Event::ImageOutcome { from, to, ok: false, request });
        if !(self.faults && (self.blocked.contains(&(from, to)) || self.rng.chance(1, 4))) {
            let delay = MS + self.rng.below(200 * MS);
            self.at(delay, Event::Image { from, to, meta, hash: state.hash });
        }
    }

    fn image_arrives(&mut self, from: u64, to: u64, meta: SnapshotMeta, hash: u64) {
        let node = self.nodes.get_mut(&to).unwrap();
        let (Some(core), true) = (&mut node.core, node.open) else { return };
        let request = self.image_requests.iter().rfind(|(_, pair)| **pair == (from, to)).map_or(0, |(id, _)| *id);
        match core.prepare_snapshot(meta.clone()) {
            Ok(()) => node.image = Some((meta, hash, from, request)),
            Err(_) => self.at(MS, Event::ImageOutcome { from, to, ok: false, request }),
        }
        self.feed(to, |_, _, _, _| ());
    }

    fn install(&mut self, id: u64, meta: &SnapshotMeta, out: &mut Output) {
        let (abandon, die) = (self.rng.chance(1, 10), self.rng.chance(1, 5) && self.faults);
        let node = self.nodes.get_mut(&id).unwrap();
        let (image, hash, from, request) = node.image.take().expect("an image was announced");
        assert_eq!(image, *meta);
        let core = node.core.as_mut().unwrap();
        if abandon {
            core.abandon_snapshot(out);
            self.at(MS, Event::ImageOutcome { from, to: id, ok: false, request });
            return;
        }
        assert!(image.index > node.state.index, "an image goes forward");
        node.saved = State { index: image.index, hash };
        if die {
            self.stop(id, true);
            self.at(20 * MS, Event::Restart(id));
            return;
        }
        node.state = node.saved;
        core.install_snapshot(meta, out).expect("the installation was prepared");
        self.images += 1;
        self.check_hash(id, node_state(&self.nodes[&id]));
        self.note(|| format!("node {id} installed {meta:?}"));
        self.at(MS, Event::ImageOutcome { from, to: id, ok: true, request });
    }

    fn check_hash(&self, id: u64, state: State) {
        if state.index > 0 && self.chosen[state.index as usize - 1].2 != state.hash {
            self.fail(&format!("I11: node {id} differs in state at index {}", state.index));
        }
    }

    fn apply(&mut self, id: u64, entry: &Committed) {
        let content = content_hash(entry);
        let before = self.nodes[&id].state.index;
        if entry.index != before + 1 {
            self.fail(&format!("C3: node {id} emits {} after {before}", entry.index));
        }
        let node = self.nodes.get_mut(&id).unwrap();
        node.state = State { index: entry.index, hash: mix(node.state.hash, mix(content, entry.term)) };
        let state = node.state;
        self.trace = mix(self.trace, mix(state.hash, id));
        let known = self.chosen.get(entry.index as usize - 1).copied();
        match known {
            Some((term, chosen, _)) if (term, chosen) != (entry.term, content) => {
                self.fail(&format!("I11: node {id} commits another entry at {}: {entry:?}", entry.index));
            }
            Some(_) => self.check_hash(id, state),
            None => {
                assert_eq!(self.chosen.len() as u64 + 1, entry.index, "I11: node {id} commits beyond a gap");
                self.chosen.push((entry.term, content, state.hash));
                if let CommittedKind::Change { members, .. } = &entry.kind {
                    self.members = members.clone();
                    self.changes += 1;
                }
            }
        }
        if let Some(token) = entry.token {
            self.acks += 1;
            self.acknowledged = self.acknowledged.max(entry.index);
            if self.admin_pending == Some(token) {
                self.admin_pending = None;
            }
        }
    }

    fn check_leader(&mut self, id: u64, term: u64) {
        if *self.leaders.entry(term).or_insert(id) != id {
            self.fail(&format!("I11: nodes {} and {id} lead in term {term}", self.leaders[&term]));
        }
        let before = self.chosen.partition_point(|(chosen, ..)| *chosen < term) as u64;
        let last = self.status(id).last;
        if last < before {
            self.fail(&format!("I11: leader {id} of term {term} ends at {last}, {before} was committed before"));
        }
    }

    fn read_answered(&mut self, id: u64, token: u64, index: u64) {
        let floor = self.nodes.get_mut(&id).unwrap().reads.remove(&token);
        if let Some(floor) = floor {
            if index < floor {
                self.fail(&format!("C5: node {id} may read at {index}, {floor} was acknowledged before"));
            }
            self.reads_answered += 1;
        }
    }

    fn status(&self, id: u64) -> Status {
        self.nodes[&id].core.as_ref().map(Consensus::status).unwrap_or_default()
    }

    fn running(&self) -> Vec<u64> {
        self.nodes.iter().filter(|(_, node)| node.open && node.core.is_some()).map(|(id, _)| *id).collect()
    }

    fn leader(&self) -> Option<u64> {
        let leads = |id: &u64| self.status(*id).leader == Some(MdsId(*id));
        self.running().into_iter().filter(leads).max_by_key(|id| self.status(*id).term)
    }

    fn client(&mut self) {
        let running = self.running();
        for _ in 0..self.rng.range(1, 5) {
            let leader = self.leader().filter(|_| self.rng.chance(3, 4));
            let Some(id) = leader.or_else(|| self.rng.choose(&running).copied()) else { break };
            self.next_token += 1;
            let token = self.next_token;
            match self.rng.below(10) {
                0..6 => {
                    let size = if self.rng.chance(1, 40) { 6000 } else { self.rng.range(8, 200) };
                    let mut data = vec![0; size as usize];
                    data[..8].copy_from_slice(&token.to_le_bytes());
                    self.feed(id, |core, _, _, _| {
                        let _ = core.propose(token, data);
                    });
                }
                6..9 => {
                    let floor = self.acknowledged;
                    self.nodes.get_mut(&id).unwrap().reads.insert(token, floor);
                    self.feed(id, |core, _, _, out| {
                        let _ = core.read_index(token, out);
                    });
                }
                _ => self.save(id),
            }
        }
        let pause = self.rng.range(MS, 30 * MS);
        self.at(pause, Event::Client);
    }

    /// The state machine becomes durable and the log is compacted, with some tail kept.
    fn save(&mut self, id: u64) {
        let keep = self.rng.below(12);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.image.is_none() && node.core.is_some() {
            node.saved = node.state;
            let upto = node.saved.index.saturating_sub(keep);
            self.feed(id, |core, _, _, _| core.compact(upto));
        }
    }

    fn fault(&mut self) {
        let all: Vec<u64> = self.nodes.keys().copied().collect();
        let running = self.running();
        match self.rng.below(8) {
            0..3 => {
                if let Some(id) = self.rng.choose(&running).copied() {
                    let power = self.rng.chance(2, 3);
                    self.note(|| format!("node {id} stops, power cut: {power}"));
                    self.stop(id, power);
                    let pause = self.rng.range(MS, 1500 * MS);
                    self.at(pause, Event::Restart(id));
                }
            }
            3 => {
                for id in running {
                    self.stop(id, true);
                    let pause = self.rng.range(MS, 300 * MS);
                    self.at(pause, Event::Restart(id));
                }
            }
            4..6 => {
                let side: BTreeSet<u64> = all.iter().copied().filter(|_| self.rng.chance(1, 2)).collect();
                let one_way = self.rng.chance(1, 3);
                for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (*a, *b))) {
                    if side.contains(&a) && !side.contains(&b) {
                        self.blocked.insert((a, b));
                        if !one_way {
                            self.blocked.insert((b, a));
                        }
                    }
                }
                self.note(|| format!("partition {side:?}, one way: {one_way}"));
            }
            _ => self.blocked.clear(),
        }
        if self.mode == Mode::Amnesia && !self.wiped_done && self.now > 1500 * MS {
            self.wiped_done = true;
            let id = *self.rng.choose(&all).unwrap();
            self.stop(id, true);
            self.note(|| format!("node {id} is wiped"));
            self.create(id, 5000 + id, &Initial::Join);
        }
        let pause = self.rng.range(50 * MS, 900 * MS);
        self.at(pause, Event::Fault);
    }

    fn admin(&mut self) {
        let pause = self.rng.range(30 * MS, 250 * MS);
        self.at(pause, Event::Admin);
        let Some(leader) = self.leader() else { return };
        let status = self.status(leader);
        if self.rng.chance(1, 12) {
            let voters: Vec<u64> = status.members.voters.keys().map(|id| id.0).collect();
            let to = self.rng.choose(&voters).copied().unwrap_or(leader);
            self.feed(leader, |core, _, _, _| {
                let _ = core.transfer_leader(MdsId(to));
            });
        }
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            // A removed node goes on for a while, to disturb the others, and is then switched off.
            if id < self.next_id && self.changes > 3 && self.rng.chance(1, 6) && self.is_removed(id) {
                self.stop(id, true);
                self.nodes.get_mut(&id).unwrap().retired = true;
            }
        }
        if self.mode != Mode::Membership || self.admin_pending.is_some() {
            return;
        }
        let voters = status.members.voters.len();
        let caught_up = |id: MdsId| status.peers.iter().any(|peer| peer.id == id && peer.lag < 4 && peer.active);
        let learner =
            status.members.learners.iter().next().map(|(id, instance)| Member { id: *id, instance: *instance });
        let change = if let Some(learner) = learner {
            let promote = caught_up(learner.id) && self.rng.chance(3, 4);
            promote
                .then_some(Change::AddVoter(learner))
                .or(self.rng.chance(1, 30).then_some(Change::Remove(learner.id)))
        } else if voters < 3 || (voters < 5 && self.rng.chance(1, 3)) {
            if self.next_id > 11 {
                return;
            }
            let id = self.next_id;
            self.next_id += 1;
            self.create(id, member(id).instance, &Initial::Join);
            Some(Change::AddLearner(member(id)))
        } else if voters > 3 && self.next_id > 6 && self.rng.chance(1, 3) {
            let ids: Vec<MdsId> = status.members.voters.keys().copied().filter(|id| id.0 != leader).collect();
            self.rng.choose(&ids).map(|id| Change::Remove(*id))
        } else {
            None
        };
        let Some(change) = change else { return };
        self.next_token += 1;
        let token = self.next_token;
        self.note(|| format!("leader {leader} proposes {change:?}"));
        let mut accepted = false;
        self.feed(leader, |core, _, _, _| accepted = core.propose_change(token, change).is_ok());
        if accepted {
            self.admin_pending = Some(token);
        }
    }

    fn is_removed(&self, id: u64) -> bool {
        let node = &self.nodes[&id];
        !node.retired && !self.members.contains(MdsId(id)) && node.state.index > 0 && self.mode == Mode::Membership
    }

    fn step(&mut self) {
        let ((time, _), event) = self.events.pop_first().expect("ticks never end");
        self.now = time;
        match event {
            Event::Tick(id) => {
                if self.nodes[&id].core.is_some() {
                    self.feed(id, |core, now, rng, out| core.tick(now, rng, out));
                    let drift = self.rng.below(4 * MS);
                    self.at(48 * MS + drift, Event::Tick(id));
                }
            }
            Event::Turn(id, life) if self.nodes[&id].life == life => {
                let now = Instant(self.now);
                let mut out = Output::default();
                if let Some(core) = &mut self.nodes.get_mut(&id).unwrap().core {
                    core.turn(now, &mut out);
                    self.drain(id, out);
                }
            }
            Event::Turn(..) => {}
            Event::Deliver { from, to, bytes } => {
                let mut result = Ok(());
                self.feed(to, |core, now, _, out| result = core.receive(now, MdsId(from), &bytes, out));
                match result {
                    Ok(()) | Err(ReceiveError::Closed | ReceiveError::LogFull) => {}
                    Err(ReceiveError::OtherInstance { .. }) => self.refused_instances += 1,
                    Err(ReceiveError::LogWentBack { .. } | ReceiveError::BeyondLog { .. })
                        if self.nodes[&to].wiped || self.nodes[&from].wiped => {}
                    Err(error) => self.fail(&format!("node {to} refuses a message of {from}: {error}")),
                }
            }
            Event::Disk { node: id, life, request, flush_covers } => {
                let node = self.nodes.get_mut(&id).unwrap();
                if node.life == life && node.core.is_some() {
                    node.in_flight.remove(&request.io.0);
                    let result = Ok(node.disk.complete(&request.op, flush_covers));
                    self.feed(id, |core, now, _, out| core.disk_done(now, DiskDone { io: request.io, result }, out));
                }
            }
            Event::Image { from, to, meta, hash } => self.image_arrives(from, to, meta, hash),
            Event::ImageOutcome { from, to, ok, request } => {
                if self.image_requests.remove(&request).is_some() {
                    self.feed(from, |core, _, _, _| core.snapshot_sent(MdsId(to), ok));
                }
            }
            Event::Client => self.client(),
            Event::Fault if self.faults => self.fault(),
            Event::Fault => {}
            Event::Restart(id) => {
                self.restarts += 1;
                self.start(id);
            }
            Event::Admin if self.faults => self.admin(),
            Event::Admin => {}
        }
    }

    fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration.as_nanos() as u64;
        while self.events.first_key_value().is_some_and(|((time, _), _)| *time < end) {
            self.step();
        }
        self.now = end;
    }

    /// Faults, then healing, then everything must converge.
    pub fn run(&mut self) {
        self.run_for(Duration::from_secs(8));
        self.faults = false;
        self.blocked.clear();
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.start(id);
        }
        let healed = self.acknowledged;
        for _ in 0..20 {
            self.run_for(Duration::from_millis(500));
            self.running().into_iter().for_each(|id| self.save(id));
            if self.acknowledged > healed + 5 && self.converged() {
                return;
            }
        }
        let states: Vec<_> = self.running().into_iter().map(|id| self.status(id)).collect();
        self.fail(&format!("I17: no convergence after healing; members {:?}; {states:#?}", self.members));
    }

    /// Every intact member has applied everything acknowledged; equal hashes were checked on the way.
    fn converged(&mut self) -> bool {
        let acknowledged = self.acknowledged;
        let members: Vec<u64> = self.members.voters.keys().chain(self.members.learners.keys()).map(|id| id.0).collect();
        let lags = |id: &u64| self.nodes[id].state.index + 20 < acknowledged && !self.nodes[id].wiped;
        !members.iter().any(lags) && self.chosen.len() as u64 >= acknowledged
    }
}

fn node_state(node: &Node) -> State {
    node.state
}
