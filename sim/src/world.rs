//! The simulated world: nodes, links, disks and time. One thread, one seed, one trace.
//!
//! A node is any [`Process`] of ours, exactly as the shipped daemons run it. The world carries out its effects: links
//! that delay, stall, break and deliver late; disks that tear, lose and fail; clocks that drift. Everything random
//! comes from generators split off the seed, so that one more draw in one place does not reshuffle another.

use crate::checkers::shadow::Invariant;
use crate::net::{Conn, Network};
use cairn_env::{Buf, DiskDone, IoId};
use cairn_env_sim::SimDisk;
use cairn_stdx::{Rng, checksum::crc64};
use cairn_types::{BLOCK_SIZE, Instant, Level, NodeId};
use cairn_wire::data::{DataReply, DataStatus};
use cairn_wire::mds::Call;
use cairn_wire::{DiskIndex, Effects, Event, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

/// Nanoseconds in a millisecond and a second, for readable schedules.
pub const MS: u64 = 1_000_000;
/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000 * MS;

/// Index of a node in the world.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeIndex(pub usize);

/// A process the simulator can look into.
pub trait SimProcess: Process {
    /// Itself, to be cast to the concrete core.
    fn as_any(&mut self) -> &mut dyn Any;
}

impl<P: Process + 'static> SimProcess for P {
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

/// What the world does at a point of time.
#[derive(Debug)]
pub(crate) enum Happening {
    /// An event for a node; dropped when its incarnation has passed.
    Node { node: NodeIndex, incarnation: u32, event: Event },
    /// The next queued frame of a connection, in one direction, is due.
    Deliver { conn: u64, to_acceptor: bool },
    /// One side learns that a connection is gone.
    Broken { conn: u64, acceptor_side: bool, reason: &'static str },
    /// A connection attempt ends.
    Connected { conn: u64 },
    /// A disk finishes one of its requests.
    Disk { node: NodeIndex, incarnation: u32, disk: u8, io: IoId },
    /// The time a node asked for has come; void when it asked for another time since.
    Wake { node: NodeIndex, incarnation: u32 },
    /// A wake-up of the scenario driver.
    Driver { token: u64 },
}

struct Clock {
    origin: u64,
    /// Parts per million the monotonic clock runs fast.
    drift_ppm: i64,
    wall_offset_ns: i64,
}

/// One simulated machine with one process.
pub struct Node {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Who it is, as its peers learn after the handshake.
    pub identity: NodeId,
    /// Release level of its process, as its peers learn too.
    pub level: Level,
    /// Its disks; they outlive the process.
    pub disks: Vec<SimDisk>,
    /// The process, while it runs.
    pub process: Option<Box<dyn SimProcess>>,
    /// Frozen: events wait.
    pub paused: bool,
    /// Counts starts.
    pub incarnation: u32,
    /// Extra time each disk request takes, in ns (a slow disk).
    pub disk_delay_ns: u64,
    /// The start of which a flush failed: what that process holds is not to be trusted any more (I12).
    untrusted: Option<u32>,
    waiting: VecDeque<Event>,
    clock: Clock,
    wake: Option<u64>,
    turn_due: bool,
}

/// The world.
pub struct World {
    now: u64,
    tick: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    /// All nodes ever added.
    pub nodes: Vec<Node>,
    pub(crate) net: Network,
    rng_disk: Rng,
    rng_time: Rng,
    trace: u64,
    /// Events stepped.
    pub steps: u64,
    /// The last events, for the report of a failure.
    pub recent: VecDeque<String>,
    /// Print every event as it happens.
    pub verbose: bool,
    /// Prints every frame delivered as well, but for those of Raft.
    pub frames: bool,
    /// A process declared that it cannot go on: (node, why).
    pub fatal: Vec<(NodeIndex, String)>,
    /// An invariant that what a process sends has broken, and how.
    pub found: Option<(Invariant, String)>,
    /// Calls above the first level are looked for.
    pub watch_levels: bool,
    /// Who sent it, and what.
    pub above_first: Option<String>,
    effects: Effects,
}

/// How many past events a failure report shows.
const RECENT_MAX: usize = 200;

impl World {
    /// An empty world whose whole future follows from `seed`.
    pub fn new(seed: u64) -> Self {
        let rng = Rng::new(seed);
        Self {
            now: 1_000 * SECOND,
            tick: 0,
            queue: BTreeMap::new(),
            nodes: Vec::new(),
            net: Network::new(rng.split(1)),
            rng_disk: rng.split(2),
            rng_time: rng.split(3),
            trace: seed,
            steps: 0,
            recent: VecDeque::new(),
            verbose: false,
            frames: false,
            fatal: Vec::new(),
            found: None,
            watch_levels: false,
            above_first: None,
            effects: Effects::default(),
        }
    }

    /// True time in nanoseconds.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The hash of everything that happened so far (I20).
    pub fn trace_hash(&self) -> u64 {
        self.trace
    }

    /// Adds a machine; its process starts with [`World::start`].
    pub fn add_node(&mut self, addr: SocketAddr, identity: NodeId, disks: Vec<SimDisk>) -> NodeIndex {
        let drift_ppm = self.rng_time.below(200) as i64 - 100;
        let clock = Clock { origin: self.rng_time.below(1 << 40), drift_ppm, wall_offset_ns: 0 };
        self.nodes.push(Node {
            addr,
            identity,
            level: Level::FIRST,
            disks,
            process: None,
            paused: false,
            incarnation: 0,
            disk_delay_ns: 0,
            untrusted: None,
            waiting: VecDeque::new(),
            clock,
            wake: None,
            turn_due: false,
        });
        NodeIndex(self.nodes.len() - 1)
    }

    /// Sets how fast a node's monotonic clock runs, in parts per million, and shifts its wall clock.
    pub fn set_clock(&mut self, node: NodeIndex, drift_ppm: i64, wall_offset_ns: i64) {
        let before = self.local_mono(node);
        let now = self.now;
        let clock = &mut self.nodes[node.0].clock;
        clock.drift_ppm = drift_ppm;
        clock.wall_offset_ns = wall_offset_ns;
        // Keep the monotonic clock continuous across the change.
        let scaled = Self::scaled(now, drift_ppm);
        clock.origin = before.wrapping_sub(scaled);
    }

    fn scaled(now: u64, drift_ppm: i64) -> u64 {
        let extra = i128::from(now) * i128::from(drift_ppm) / 1_000_000;
        (i128::from(now) + extra) as u64
    }

    fn local_mono(&self, node: NodeIndex) -> u64 {
        let clock = &self.nodes[node.0].clock;
        clock.origin.wrapping_add(Self::scaled(self.now, clock.drift_ppm))
    }

    /// What the two clocks of a node say now.
    pub fn local_now(&self, node: NodeIndex) -> Now {
        const WALL_ORIGIN: u64 = 1_790_000_000 * SECOND;
        let clock = &self.nodes[node.0].clock;
        let wall_ns = (WALL_ORIGIN + self.now).saturating_add_signed(clock.wall_offset_ns);
        Now { mono: Instant(self.local_mono(node)), wall_ns }
    }

    /// Starts (again) the process of a node.
    pub fn start(&mut self, node: NodeIndex, process: Box<dyn SimProcess>) {
        let state = &mut self.nodes[node.0];
        assert!(state.process.is_none(), "node {} runs already", node.0);
        state.process = Some(process);
        state.incarnation += 1;
        state.wake = None;
        state.turn_due = false;
        state.waiting.clear();
        self.note(format_args!("start {node:?}"));
        self.deliver(node, Event::Start);
    }

    /// Ends the process of a node as `kill -9` does: completed writes stay, those in flight may or may not be on disk.
    pub fn kill(&mut self, node: NodeIndex) {
        self.note(format_args!("kill {node:?}"));
        self.stop_process(node);
        for disk in &mut self.nodes[node.0].disks {
            disk.kill(&mut self.rng_disk);
        }
    }

    /// Cuts the power of a node: any subset of unflushed sectors is lost.
    pub fn power_cut(&mut self, node: NodeIndex) {
        self.note(format_args!("power cut {node:?}"));
        self.stop_process(node);
        for disk in &mut self.nodes[node.0].disks {
            disk.power_cut(&mut self.rng_disk);
        }
    }

    fn stop_process(&mut self, node: NodeIndex) {
        let state = &mut self.nodes[node.0];
        state.process = None;
        state.paused = false;
        state.waiting.clear();
        state.wake = None;
        for (id, acceptor_side) in self.net.conns_of(node) {
            self.break_side(id, !acceptor_side, "connection reset by peer");
            self.net.forget_side(id, acceptor_side);
        }
    }

    /// Freezes a node (SIGSTOP) or lets it go on; its packets and completions wait meanwhile.
    pub fn pause(&mut self, node: NodeIndex, paused: bool) {
        self.note(format_args!("pause {node:?} {paused}"));
        self.nodes[node.0].paused = paused;
        if !paused {
            while let Some(event) = self.nodes[node.0].waiting.pop_front() {
                self.schedule_node(0, node, event);
            }
        }
    }

    /// Cuts or heals one direction of the path between two nodes.
    pub fn set_blocked(&mut self, from: NodeIndex, to: NodeIndex, blocked: bool) {
        self.note(format_args!("path {from:?}->{to:?} blocked {blocked}"));
        let released = self.net.set_blocked(from, to, blocked);
        if blocked {
            for id in self.net.conns_between(from, to) {
                // A stalled connection is given up by each side after some seconds of silence, as TCP_USER_TIMEOUT
                // does.
                for acceptor_side in [false, true] {
                    let after = self.rng_time.range(3 * SECOND, 12 * SECOND);
                    self.schedule(after, Happening::Broken { conn: id, acceptor_side, reason: "timed out" });
                }
            }
        }
        for (conn, to_acceptor) in released {
            self.schedule(self.now_latency(), Happening::Deliver { conn, to_acceptor });
        }
    }

    fn now_latency(&self) -> u64 {
        MS / 10
    }

    /// Resets every connection between two nodes, as a middlebox may at any time.
    pub fn reset_connections(&mut self, a: NodeIndex, b: NodeIndex) {
        self.note(format_args!("reset {a:?}<->{b:?}"));
        for id in self.net.conns_between(a, b) {
            for acceptor_side in [false, true] {
                self.break_side(id, acceptor_side, "connection reset");
            }
        }
    }

    fn break_side(&mut self, conn: u64, acceptor_side: bool, reason: &'static str) {
        let after = self.rng_time.range(1, 5 * MS);
        self.schedule(after, Happening::Broken { conn, acceptor_side, reason });
    }

    /// Wakes the scenario driver after `after` nanoseconds with `token`.
    pub fn wake_driver(&mut self, after: u64, token: u64) {
        self.schedule(after, Happening::Driver { token });
    }

    /// Runs `f` on the process of a node and carries out what it wants; none when the node is down or frozen.
    pub fn with<P: 'static, R>(
        &mut self,
        node: NodeIndex,
        f: impl FnOnce(&mut P, Now, &mut Effects) -> R,
    ) -> Option<R> {
        let now = self.local_now(node);
        let state = &mut self.nodes[node.0];
        if state.paused {
            return None;
        }
        let process = state.process.as_mut()?.as_any().downcast_mut::<P>().expect("the node runs that kind of process");
        let mut effects = std::mem::take(&mut self.effects);
        let result = f(process, now, &mut effects);
        self.carry_out(node, &mut effects);
        self.effects = effects;
        self.ask_for_turn(node);
        Some(result)
    }

    /// Looks at the process of a node without stepping it.
    pub fn inspect<P: 'static, R>(&mut self, node: NodeIndex, f: impl FnOnce(&mut P) -> R) -> Option<R> {
        let process = self.nodes[node.0].process.as_mut()?.as_any().downcast_mut::<P>()?;
        Some(f(process))
    }

    /// Lets the next thing happen; gives a token when it concerns the driver. None: nothing will ever happen again.
    pub fn step(&mut self) -> Option<Option<u64>> {
        let ((time, _), happening) = self.queue.pop_first()?;
        debug_assert!(time >= self.now);
        self.now = time;
        self.steps += 1;
        match happening {
            Happening::Driver { token } => return Some(Some(token)),
            Happening::Node { node, incarnation, event } => {
                if self.nodes[node.0].incarnation == incarnation && self.nodes[node.0].process.is_some() {
                    self.deliver(node, event);
                }
            }
            Happening::Wake { node, incarnation } => {
                let state = &self.nodes[node.0];
                if state.incarnation == incarnation && state.wake == Some(self.now) {
                    self.deliver(node, Event::Timer);
                }
            }
            Happening::Disk { node, incarnation, disk, io } => {
                if self.nodes[node.0].incarnation == incarnation && self.nodes[node.0].process.is_some() {
                    let done: Option<DiskDone> = self.nodes[node.0].disks[usize::from(disk)].complete(io);
                    if let Some(done) = done {
                        if done.result.as_ref().is_err_and(|error| error.operation == "flush") {
                            self.nodes[node.0].untrusted = Some(incarnation);
                        }
                        self.deliver(node, Event::Disk(DiskIndex(disk), done));
                    }
                }
            }
            Happening::Connected { conn } => self.connected(conn),
            Happening::Deliver { conn, to_acceptor } => self.deliver_frame(conn, to_acceptor),
            Happening::Broken { conn, acceptor_side, reason } => self.broken(conn, acceptor_side, reason),
        }
        Some(None)
    }

    fn connected(&mut self, id: u64) {
        let Some(conn) = self.net.conn(id) else { return };
        let (from, to, link) = (conn.initiator.0, conn.acceptor_node, conn.initiator.1);
        let reachable = !self.net.is_blocked(from, to) && !self.net.is_blocked(to, from);
        if self.nodes[to.0].process.is_none() || !reachable || self.nodes[to.0].paused {
            let reason = if reachable { "connection refused" } else { "connection timed out" };
            self.net.remove(id);
            self.deliver(from, Event::Net(NetEvent::Down { link, reason: reason.to_owned() }));
            return;
        }
        let accepted = self.net.accept(id);
        let (from_identity, to_identity) = (self.nodes[from.0].identity, self.nodes[to.0].identity);
        let (from_level, to_level) = (self.nodes[from.0].level, self.nodes[to.0].level);
        self.deliver(to, Event::Net(NetEvent::Up { link: accepted, peer: from_identity, level: from_level }));
        self.deliver(from, Event::Net(NetEvent::Up { link, peer: to_identity, level: to_level }));
    }

    fn deliver_frame(&mut self, id: u64, to_acceptor: bool) {
        if let Some((node, link, frame)) = self.net.pop_frame(id, to_acceptor, self.now) {
            if self.frames && !matches!(frame.kind, FrameKind::Raft) {
                let from = self.net.peer_of(id, to_acceptor);
                let what = cairn_wire::describe(&frame);
                println!("{:>14.6} {from:?} -> {node:?} {what}", (self.now as f64) / SECOND as f64);
            }
            self.deliver(node, Event::Net(NetEvent::Frame { link, frame }));
        }
    }

    fn broken(&mut self, id: u64, acceptor_side: bool, reason: &'static str) {
        // A timeout that was scheduled when the path was cut does nothing once the path has healed.
        if reason == "timed out" && !self.net.is_stalled(id) {
            return;
        }
        if let Some((node, link)) = self.net.forget_side(id, acceptor_side) {
            self.deliver(node, Event::Net(NetEvent::Down { link, reason: reason.to_owned() }));
            self.break_side(id, !acceptor_side, "connection reset by peer");
        }
    }

    /// Steps a node with an event, now, unless it is frozen.
    fn deliver(&mut self, node: NodeIndex, event: Event) {
        let now = self.local_now(node);
        let state = &mut self.nodes[node.0];
        let Some(process) = state.process.as_mut() else { return };
        if state.paused {
            state.waiting.push_back(event);
            return;
        }
        let is_turn = matches!(event, Event::Turn);
        if is_turn {
            state.turn_due = false;
        }
        if matches!(event, Event::Timer) {
            state.wake = None;
        }
        let digest = digest_of(&event);
        let mut effects = std::mem::take(&mut self.effects);
        process.step(now, event, &mut effects);
        self.trace = crc64(&[self.trace, self.now, node.0 as u64, digest].map(u64::to_le_bytes).concat());
        self.carry_out(node, &mut effects);
        self.effects = effects;
        if !is_turn {
            self.ask_for_turn(node);
        }
    }

    fn ask_for_turn(&mut self, node: NodeIndex) {
        if !self.nodes[node.0].turn_due && self.nodes[node.0].process.is_some() {
            self.nodes[node.0].turn_due = true;
            // Sometimes at once, sometimes after more events have gathered: batches of every size are met.
            let after = if self.rng_time.chance(1, 2) { 1 } else { self.rng_time.range(1, 60_000) };
            self.schedule_node(after, node, Event::Turn);
        }
    }

    fn carry_out(&mut self, node: NodeIndex, effects: &mut Effects) {
        for line in effects.log.drain(..) {
            if self.verbose {
                println!("{:>14.6} {node:?} log: {line}", (self.now as f64) / SECOND as f64);
            }
            self.remember(format!("{node:?} log: {line}"));
        }
        for effect in effects.net.drain(..) {
            self.net_effect(node, effect);
        }
        for (index, request) in effects.disk.drain(..) {
            let io = request.io;
            let state = &mut self.nodes[node.0];
            let incarnation = state.incarnation;
            let delay = state.disk_delay_ns;
            state.disks[usize::from(index.0)].submit(request);
            let took = self.rng_disk.range(20_000, 200_000) + delay;
            self.schedule(took, Happening::Disk { node, incarnation, disk: index.0, io });
        }
        if let Some(at) = effects.wake_at.take() {
            let local = self.local_mono(node);
            let after = at.0.saturating_sub(local).max(1);
            let due = self.now + after;
            if self.nodes[node.0].wake.is_none_or(|wake| due < wake || wake <= self.now) {
                self.nodes[node.0].wake = Some(due);
                let incarnation = self.nodes[node.0].incarnation;
                self.schedule(after, Happening::Wake { node, incarnation });
            }
        }
        if let Some(why) = effects.fatal.take() {
            self.note(format_args!("{node:?} fatal: {why}"));
            self.fatal.push((node, why));
            self.stop_process(node);
        }
    }

    fn net_effect(&mut self, node: NodeIndex, effect: NetEffect) {
        match effect {
            NetEffect::Connect { link, addr } => {
                let to = self.nodes.iter().position(|other| other.addr == addr).map(NodeIndex);
                let Some(to) = to else {
                    let reason = format!("nobody listens at {addr}");
                    self.schedule_node(MS, node, Event::Net(NetEvent::Down { link, reason }));
                    return;
                };
                let blocked = self.net.is_blocked(node, to) || self.net.is_blocked(to, node);
                let after = if blocked { 3 * SECOND } else { self.rng_time.range(50_000, MS) };
                let conn = self.net.connect(node, link, to);
                self.schedule(after, Happening::Connected { conn });
            }
            NetEffect::Send { link, kind, id, prefix, payload } => {
                self.check_sent(node, kind, &prefix, &payload);
                if self.watch_levels && kind == FrameKind::MdsCall {
                    self.look_at_level(node, &prefix);
                }
                if let Some((conn, to_acceptor, due)) = self.net.send(self.now, node, link, kind, id, prefix, payload) {
                    self.schedule(due.saturating_sub(self.now), Happening::Deliver { conn, to_acceptor });
                }
            }
            NetEffect::Close { link } => {
                if let Some((conn, acceptor_side)) = self.net.find(node, link) {
                    self.net.forget_side(conn, acceptor_side);
                    self.break_side(conn, !acceptor_side, "connection closed by peer");
                }
            }
        }
    }

    /// What no server may send: a block that is not what its index says (I10), or anything that rests on a device
    /// after a flush of it failed (I12).
    fn check_sent(&mut self, node: NodeIndex, kind: FrameKind, prefix: &[u8], payload: &[Buf]) {
        if !matches!(kind, FrameKind::DataReply | FrameKind::Raft) {
            return;
        }
        let state = &self.nodes[node.0];
        let untrusted = state.untrusted == Some(state.incarnation);
        let payload_len = payload.iter().map(|buf| buf.len()).sum();
        let reply = (kind == FrameKind::DataReply).then(|| DataReply::decode(prefix, payload_len));
        let rests_on_disk = match &reply {
            Some(reply) => reply.as_ref().is_ok_and(|reply| reply.status == DataStatus::Ok),
            None => true,
        };
        if untrusted && rests_on_disk {
            let what = format!("{node:?} sent {kind:?} after a flush of its disk had failed: {reply:?}");
            self.found.get_or_insert((Invariant::I12, what));
        }
        if let Some(Ok(reply)) = reply {
            let blocks = payload.iter().flat_map(|buf| buf.chunks(BLOCK_SIZE));
            let bad = blocks.zip(&reply.checksums).position(|(block, checksum)| crc64(block) != *checksum);
            if let Some(at) = bad {
                let what = format!("{node:?} sent a damaged block, number {at} of an answer to a read");
                self.found.get_or_insert((Invariant::I10, what));
            }
        }
    }

    fn look_at_level(&mut self, node: NodeIndex, call: &[u8]) {
        if let Ok(Call { request, .. }) = cairn_wire::decode("call", call)
            && request.level() > Level::FIRST
        {
            self.above_first = Some(format!("{node:?} sent {request:?}"));
        }
    }

    fn schedule_node(&mut self, after: u64, node: NodeIndex, event: Event) {
        let incarnation = self.nodes[node.0].incarnation;
        self.schedule(after, Happening::Node { node, incarnation, event });
    }

    pub(crate) fn schedule(&mut self, after: u64, happening: Happening) {
        self.tick += 1;
        self.queue.insert((self.now + after, self.tick), happening);
    }

    /// Adds a line to the recent events.
    pub fn note(&mut self, line: std::fmt::Arguments<'_>) {
        let text = line.to_string();
        if self.verbose {
            println!("{:>14.6} {text}", (self.now as f64) / SECOND as f64);
        }
        self.remember(text);
    }

    fn remember(&mut self, text: String) {
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(format!("{:.6} {text}", (self.now as f64) / SECOND as f64));
    }
}

/// A number that stands for an event in the trace.
fn digest_of(event: &Event) -> u64 {
    match event {
        Event::Start => 1,
        Event::Turn => 2,
        Event::Timer => 3,
        Event::Disk(disk, done) => {
            4 ^ (u64::from(disk.0) << 8) ^ (done.io.0 << 16) ^ u64::from(done.result.is_ok()).rotate_left(60)
        }
        Event::Net(NetEvent::Up { link, .. }) => 5 ^ link.0.rotate_left(8),
        Event::Net(NetEvent::Down { link, .. }) => 6 ^ link.0.rotate_left(8),
        Event::Net(NetEvent::Frame { link, frame }) => {
            7 ^ link.0.rotate_left(8) ^ frame.id.rotate_left(32) ^ crc64(&frame.prefix) ^ (frame.kind as u64)
        }
    }
}

impl Conn {
    pub(crate) fn end(&self, acceptor_side: bool) -> Option<(NodeIndex, LinkId)> {
        if acceptor_side { self.accepted.map(|link| (self.acceptor_node, link)) } else { Some(self.initiator) }
    }
}
