//! The client as a sans-IO process: session, chunk servers, volumes, and what ties them together.
//!
//! Users hand in closures. They are never called from within a step: finished work is kept in order and taken with
//! [`ClientCore::take_completions`] after the step, so that a callback may use the core again.

use crate::config::{CoreConfig, IDLE_LEASE_TIME, IDLE_LEASES_MAX, OpenError, RELEASE_BATCH, SizeRule};
use crate::io::{Ctx, Io, LinkUse, Links};
use crate::servers::{ServerEvent, Servers};
use crate::session::{CallDone, Session, Waiter};
use crate::slab::Slab;
use crate::timers::{Timer, Timers};
use crate::volume::Volume;
use cairn_env::Buf;
use cairn_env::block::{BlockDone, BlockError, BlockOp, BlockResult};
use cairn_stdx::Rng;
use cairn_types::{BLOCK_SIZE, ClientId, ClusterId, Duration, Epoch, Instant, VolumeId};
use cairn_wire::data::DATA_BLOCKS_MAX;
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsError, MdsReply, MdsRequest, Push};
use cairn_wire::{Effects, Event, NetEvent, Now, Process};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

/// Called with the outcome of an open.
pub type OpenDone = Box<dyn FnOnce(Result<VolumeHandle, OpenError>)>;

const IDLE_EVERY: Duration = Duration::from_secs(1);
const TOPOLOGY_EVERY: Duration = Duration::from_millis(500);
const SHUTDOWN_MAX: Duration = Duration::from_secs(10);
/// A timer this late means that this process was not running.
const SLEPT: Duration = Duration::from_secs(1);

/// An open volume of a core. Dead after the close that was called for it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeHandle(pub(crate) u64);

/// News that belong to no call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Another client wants the lease of an open volume in this mode.
    Recall(VolumeHandle, LeaseMode),
    /// The lease of a volume is lost; its operations answer [`BlockError::Fenced`].
    Fenced(VolumeHandle),
    /// The size of an open volume changed.
    Resized(VolumeHandle, u64),
    /// As the metadata servers sent it.
    Push(Push),
    /// The session is open, or open again under another id.
    Session(ClientId, ClusterId),
    /// The session could not be opened, says a metadata server.
    Refused(MdsError),
    /// A link to a metadata server stands.
    Linked,
    /// An attempt to reach a metadata server failed: so many since the last success, and how the last ones ended.
    Unlinked(u64, String),
}

/// Finished work: a callback and its argument.
pub enum Completion {
    /// An operation on a volume.
    Block(BlockDone, BlockResult),
    /// A call to the metadata servers.
    Call(CallDone, Result<MdsReply, MdsError>),
    /// An open.
    Open(OpenDone, Result<VolumeHandle, OpenError>),
    /// A close or release.
    Closed(Box<dyn FnOnce()>),
    /// News; [`Completion::run`] ignores it.
    Notice(Notice),
}

impl Completion {
    /// Calls the callback.
    pub fn run(self) {
        match self {
            Self::Block(done, result) => done(result),
            Self::Call(done, result) => done(result),
            Self::Open(done, result) => done(result),
            Self::Closed(done) => done(),
            Self::Notice(_) => {}
        }
    }
}

/// See the module.
pub struct ClientCore {
    config: CoreConfig,
    rng: Rng,
    timers: Timers,
    links: Links,
    session: Session,
    servers: Servers,
    volumes: Slab<Box<Volume>>,
    by_id: BTreeMap<VolumeId, u64>,
    done: Vec<Completion>,
    zeros: Buf,
    /// Bytes of unsettled writes of all volumes.
    unsettled: Rc<Cell<u64>>,
    release: VecDeque<u64>,
    known_client: Option<ClientId>,
    known_linked: bool,
    known_failures: u64,
    topology_asked: bool,
    topology_at: Option<Instant>,
    idle_armed: bool,
    next_wake: Option<Instant>,
    shutdown: Option<Box<dyn FnOnce()>>,
    shutting_down: bool,
    stopped: bool,
}

impl ClientCore {
    /// A client that has not begun: step it with [`Event::Start`].
    pub fn new(config: CoreConfig, rng: Rng) -> Self {
        Self {
            session: Session::new(&config),
            config,
            rng,
            timers: Timers::default(),
            links: Links::default(),
            servers: Servers::default(),
            volumes: Slab::default(),
            by_id: BTreeMap::new(),
            done: Vec::new(),
            zeros: Buf::zeroed(DATA_BLOCKS_MAX as usize * BLOCK_SIZE),
            unsettled: Rc::default(),
            release: VecDeque::new(),
            known_client: None,
            known_linked: false,
            known_failures: 0,
            topology_asked: false,
            topology_at: None,
            idle_armed: false,
            next_wake: None,
            shutdown: None,
            shutting_down: false,
            stopped: false,
        }
    }

    /// Work finished since the last call, in order.
    pub fn take_completions(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.done)
    }

    /// The metadata servers as they told them last, empty before; the shell writes them down for the next start.
    pub fn mds_servers(&self) -> &[SocketAddr] {
        self.session.servers()
    }

    /// The session's id, while one is open.
    pub fn session(&self) -> Option<ClientId> {
        self.session.client()
    }

    /// The cluster's identity, once a session was opened.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.session.cluster()
    }

    /// True when an authenticated link to a metadata server stands.
    pub fn is_linked(&self) -> bool {
        self.session.is_linked()
    }

    /// Failed attempts to reach a metadata server since the last success, and how the last ones ended.
    pub fn failures(&self) -> (u64, String) {
        (self.session.failed_attempts, self.session.why_not().trim_start_matches("; ").to_owned())
    }

    /// True after [`ClientCore::shutdown`] has run its course.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// What every volume waits for, in words; nothing of those at rest.
    pub fn explain(&self) -> Vec<String> {
        self.volumes.iter().flat_map(|(_, volume)| volume.explain(&self.servers)).collect()
    }

    /// Volume, epoch and size of an open volume.
    pub fn volume(&self, handle: VolumeHandle) -> Option<(VolumeId, Epoch, u64)> {
        self.volumes.get(handle.0).map(|volume| (volume.id, volume.epoch, volume.size))
    }

    /// True when the volume of this handle takes no writes.
    pub fn is_read_only(&self, handle: VolumeHandle) -> bool {
        self.volumes.get(handle.0).is_none_or(|volume| volume.mode != LeaseMode::Exclusive)
    }

    /// True when the lease of this handle is lost.
    pub fn is_fenced(&self, handle: VolumeHandle) -> bool {
        self.volumes.get(handle.0).is_none_or(|volume| volume.death().is_some())
    }

    fn ctx<'a>(&'a mut self, now: Now, out: &'a mut Effects) -> (Ctx<'a>, &'a mut Slab<Box<Volume>>) {
        let io = Io {
            now: now.mono,
            wall_ns: now.wall_ns,
            out,
            timers: &mut self.timers,
            links: &mut self.links,
            rng: &mut self.rng,
        };
        let ctx = Ctx {
            io,
            session: &mut self.session,
            servers: &mut self.servers,
            done: &mut self.done,
            config: &self.config,
            zeros: &self.zeros,
        };
        (ctx, &mut self.volumes)
    }

    fn with_volume(&mut self, now: Now, out: &mut Effects, key: u64, f: impl FnOnce(&mut Volume, &mut Ctx<'_>)) {
        let (mut ctx, volumes) = self.ctx(now, out);
        if let Some(volume) = volumes.get_mut(key) {
            f(volume, &mut ctx);
        }
        self.look_after(now, out, key);
    }

    /// After anything happened to a volume: is it at rest, is it gone?
    fn look_after(&mut self, now: Now, out: &mut Effects, key: u64) {
        let Some(volume) = self.volumes.get_mut(key) else { return };
        if volume.death().is_some() {
            let (id, refs) = (volume.id, volume.refs);
            if self.by_id.get(&id) == Some(&key) {
                self.by_id.remove(&id);
            }
            if refs == 0 && !volume.is_releasing() {
                self.remove_volume(now, out, key);
            }
        } else if volume.check_idle(now.mono) && volume.release_wanted {
            self.start_release(now, out, key);
        }
    }

    fn remove_volume(&mut self, now: Now, out: &mut Effects, key: u64) {
        let Some(volume) = self.volumes.remove(key) else { return };
        if self.by_id.get(&volume.id) == Some(&key) {
            self.by_id.remove(&volume.id);
        }
        for done in volume.released {
            self.done.push(Completion::Closed(done));
        }
        for (mode, rule, done) in volume.successors {
            self.open_now(now, volume.id, mode, rule, done, out);
        }
    }

    fn start_release(&mut self, now: Now, out: &mut Effects, key: u64) {
        let (mut ctx, volumes) = self.ctx(now, out);
        let volume = volumes.get_mut(key).expect("the caller looked");
        volume.begin_release(&mut ctx);
        self.release.push_back(key);
    }

    // What users ask.

    /// Calls the metadata servers. Retried, taking effect once, until it is answered or the deadline has passed.
    pub fn call(&mut self, now: Now, request: MdsRequest, done: CallDone, out: &mut Effects) {
        let deadline = Some(now.mono + self.config.call_deadline);
        let (mut ctx, _) = self.ctx(now, out);
        ctx.session.call(&mut ctx.io, request, Waiter::User(done), deadline);
        self.settle(now, out);
    }

    /// Opens a volume: takes the lease, waiting for its holder to give it back, fences its servers, reconciles its
    /// replicas. Opening again what is open shares the lease; each open wants its close.
    pub fn open(&mut self, now: Now, id: VolumeId, mode: LeaseMode, rule: SizeRule, done: OpenDone, out: &mut Effects) {
        self.open_now(now, id, mode, rule, done, out);
        self.settle(now, out);
    }

    fn open_now(&mut self, now: Now, id: VolumeId, mode: LeaseMode, rule: SizeRule, done: OpenDone, out: &mut Effects) {
        if self.shutting_down {
            self.done.push(Completion::Open(done, Err(OpenError::Closed)));
            return;
        }
        if let Some(&key) = self.by_id.get(&id) {
            let volume = self.volumes.get_mut(key).expect("the table names living volumes");
            let enough = volume.mode == mode || volume.mode == LeaseMode::Exclusive;
            let going = volume.is_releasing() || volume.release_wanted;
            if !going && enough {
                let (mut ctx, volumes) = self.ctx(now, out);
                volumes.get_mut(key).expect("just seen").add_opener(&mut ctx, rule, done);
            } else if going || volume.refs == 0 {
                volume.release_wanted = true;
                volume.successors.push((mode, rule, done));
                self.look_after(now, out, key);
            } else {
                self.done.push(Completion::Open(done, Err(OpenError::InUse(id))));
            }
            return;
        }
        let deadline = now.mono + self.config.open_deadline;
        let key = self.volumes.insert(Box::new(Volume::new(id, mode, rule, deadline, self.unsettled.clone())));
        self.by_id.insert(id, key);
        self.with_volume(now, out, key, |volume, ctx| {
            volume.set_key(key);
            volume.add_opener(ctx, rule, done);
            volume.acquire(ctx);
        });
        self.arm_idle(now);
    }

    /// Takes over a lease that came along with another call (a file just created). Operations may be submitted at once.
    pub fn adopt(&mut self, now: Now, grant: LeaseGrant, rule: SizeRule, out: &mut Effects) -> VolumeHandle {
        if let Some(old) = self.by_id.get(&grant.volume).copied() {
            // A fresh grant of the same volume: the older epoch is history.
            self.with_volume(now, out, old, |volume, ctx| volume.die(ctx, BlockError::Fenced));
        }
        let id = grant.volume;
        let key = self.volumes.insert(Box::new(Volume::new(id, grant.mode, rule, now.mono, self.unsettled.clone())));
        self.by_id.insert(id, key);
        self.with_volume(now, out, key, |volume, ctx| {
            volume.set_key(key);
            volume.refs = 1;
            volume.begin(ctx, grant);
        });
        self.arm_idle(now);
        self.settle(now, out);
        VolumeHandle(key)
    }

    /// Starts an operation. The queue behind it is the front end's own: it bounds what it has in flight.
    pub fn submit(&mut self, now: Now, handle: VolumeHandle, op: BlockOp, done: BlockDone, out: &mut Effects) {
        let (mut ctx, volumes) = self.ctx(now, out);
        match volumes.get_mut(handle.0) {
            Some(volume) => volume.submit(&mut ctx, op, done),
            None => ctx.done.push(Completion::Block(done, Err(BlockError::Closed))),
        }
        self.look_after(now, out, handle.0);
        self.settle(now, out);
    }

    /// Gives a handle up: flushes and settles. The lease itself is kept for a while, in case the volume is opened
    /// again, and given back when somebody else wants it.
    pub fn close(&mut self, now: Now, handle: VolumeHandle, done: Box<dyn FnOnce()>, out: &mut Effects) {
        if self.volumes.get(handle.0).is_none() {
            self.done.push(Completion::Closed(done));
            return;
        }
        self.with_volume(now, out, handle.0, |volume, ctx| volume.close(ctx, done));
        self.settle(now, out);
    }

    /// Gives a handle up, and the lease with it as soon as no other open of the volume is left. `done` follows the
    /// release.
    pub fn release(&mut self, now: Now, handle: VolumeHandle, done: Box<dyn FnOnce()>, out: &mut Effects) {
        if self.volumes.get(handle.0).is_none() {
            self.done.push(Completion::Closed(done));
            return;
        }
        self.with_volume(now, out, handle.0, |volume, ctx| {
            if volume.death().is_some() {
                volume.close(ctx, done);
                return;
            }
            volume.release_wanted = true;
            volume.released.push(done);
            volume.close(ctx, Box::new(|| ()));
        });
        self.settle(now, out);
    }

    /// The front end knows a new size of the volume.
    pub fn set_size(&mut self, now: Now, handle: VolumeHandle, size: u64, out: &mut Effects) {
        self.with_volume(now, out, handle.0, |volume, ctx| volume.set_size(ctx, size));
        self.settle(now, out);
    }

    /// Closes everything: flushes, settles, gives leases back, ends the session. What cannot be reached within ten
    /// seconds is left as it is; the next holder reconciles it.
    pub fn shutdown(&mut self, now: Now, done: Box<dyn FnOnce()>, out: &mut Effects) {
        self.shutting_down = true;
        self.shutdown = Some(done);
        self.timers.after(now.mono, SHUTDOWN_MAX, Timer::Shutdown);
        for key in self.volumes.keys() {
            self.with_volume(now, out, key, |volume, ctx| {
                volume.refs = 0;
                volume.release_wanted = true;
                if volume.is_open() {
                    volume.close(ctx, Box::new(|| ()));
                } else if !volume.is_releasing() {
                    volume.die(ctx, BlockError::Closed);
                }
            });
        }
        self.settle(now, out);
    }

    fn check_shutdown(&mut self, now: Now, out: &mut Effects, by_force: bool) {
        if !self.shutting_down || self.stopped {
            return;
        }
        if by_force {
            for key in self.volumes.keys() {
                self.with_volume(now, out, key, |volume, ctx| volume.die(ctx, BlockError::Closed));
            }
        }
        if self.volumes.len() > 0 && !by_force {
            return;
        }
        let (mut ctx, _) = self.ctx(now, out);
        if !ctx.session.is_closed() && !by_force {
            if !ctx.session.is_closing() {
                ctx.session.close(&mut ctx.io);
            }
            if !ctx.session.is_closed() {
                return;
            }
        }
        ctx.session.hang_up(&mut ctx.io);
        ctx.servers.hang_up(&mut ctx.io);
        self.stopped = true;
        if let Some(done) = self.shutdown.take() {
            self.done.push(Completion::Closed(done));
        }
    }

    // Events.

    fn arm_idle(&mut self, now: Now) {
        if !self.idle_armed && self.volumes.len() > 0 {
            self.idle_armed = true;
            self.timers.after(now.mono, IDLE_EVERY, Timer::Idle);
        }
    }

    /// Leases of volumes long closed go back; the longest idle first when there are too many.
    fn release_idle(&mut self, now: Now, out: &mut Effects) {
        self.idle_armed = false;
        let mut idle: Vec<(Instant, u64)> = Vec::new();
        for key in self.volumes.keys() {
            let volume = self.volumes.get_mut(key).expect("just listed");
            if volume.check_idle(now.mono) {
                idle.push((volume.idle_since.unwrap_or(now.mono), key));
            }
        }
        idle.sort_unstable();
        let surplus = idle.len().saturating_sub(IDLE_LEASES_MAX);
        for (at, (since, key)) in idle.into_iter().enumerate() {
            if at < surplus || now.mono.saturating_since(since) >= IDLE_LEASE_TIME {
                self.volumes.get_mut(key).expect("just seen").release_wanted = true;
                self.look_after(now, out, key);
            }
        }
        self.arm_idle(now);
    }

    fn send_releases(&mut self, now: Now, out: &mut Effects) {
        while !self.release.is_empty() {
            let count = self.release.len().min(RELEASE_BATCH);
            let keys: Vec<u64> = self.release.drain(..count).collect();
            let (mut ctx, volumes) = self.ctx(now, out);
            let leases = keys.iter().filter_map(|key| volumes.get(*key)).map(|v| (v.id, v.epoch, true)).collect();
            ctx.call(MdsRequest::LeaseRelease { leases }, Waiter::Released(keys));
        }
    }

    fn on_push(&mut self, now: Now, push: Push, out: &mut Effects) {
        match &push {
            Push::LeaseRecall { volume, wanted } => {
                if let Some(&key) = self.by_id.get(volume) {
                    let held = self.volumes.get_mut(key).expect("the table names living volumes");
                    if held.refs == 0 {
                        held.release_wanted = true;
                        self.look_after(now, out, key);
                    } else {
                        self.done.push(Completion::Notice(Notice::Recall(VolumeHandle(key), *wanted)));
                    }
                }
            }
            Push::Resized { volume, size } => {
                if let Some(&key) = self.by_id.get(volume) {
                    self.with_volume(now, out, key, |volume, ctx| volume.set_size(ctx, *size));
                    self.done.push(Completion::Notice(Notice::Resized(VolumeHandle(key), *size)));
                }
            }
            Push::TopologyChanged => self.servers.wants_topology = true,
            Push::MapChanged { volume } => {
                if let Some(&key) = self.by_id.get(volume) {
                    self.with_volume(now, out, key, |volume, ctx| volume.on_map_changed(ctx));
                }
            }
            Push::OrdersWaiting => {}
        }
        self.done.push(Completion::Notice(Notice::Push(push)));
    }

    fn on_answer(&mut self, now: Now, waiter: Waiter, result: Result<MdsReply, MdsError>, out: &mut Effects) {
        match waiter {
            Waiter::User(done) => self.done.push(Completion::Call(done, result)),
            Waiter::Volume(key, call) => {
                self.with_volume(now, out, key, |volume, ctx| volume.on_mds(ctx, call, result))
            }
            Waiter::Topology => {
                self.topology_asked = false;
                if let Ok(MdsReply::Topology { mds, cs, .. }) = result {
                    let (mut ctx, _) = self.ctx(now, out);
                    ctx.session.learn_servers(mds.iter().map(|info| info.addr).collect());
                    ctx.servers.learn(&mut ctx.io, &cs);
                }
            }
            Waiter::Released(keys) => {
                if let Err(error) = result {
                    out.log.push(format!("leases were not given back: {error}"));
                }
                keys.into_iter().for_each(|key| self.remove_volume(now, out, key));
            }
            Waiter::Nobody | Waiter::Open | Waiter::Renew => {}
        }
    }

    /// Carries on until nothing is left to do at this moment, then says when to be woken.
    fn settle(&mut self, now: Now, out: &mut Effects) {
        loop {
            // First, so that whatever it ended is not taken for a take-over.
            if let Some(client) = self.session.ended.take() {
                self.session_ended(now, client, out);
            } else if let Some((waiter, result)) = self.session.answers.pop_front() {
                self.on_answer(now, waiter, result, out);
            } else if let Some(push) = self.session.pushes.pop_front() {
                self.on_push(now, push, out);
            } else if let Some(event) = self.servers.events.pop_front() {
                self.on_server_event(now, event, out);
            } else if !self.release.is_empty() {
                self.send_releases(now, out);
            } else {
                break;
            }
        }
        self.note_session();
        self.ask_topology(now, out);
        self.check_shutdown(now, out, false);
        if let Some(at) = self.timers.wish() {
            self.next_wake = Some(at);
            out.wake_at(at);
        }
    }

    /// Nobody says that any lease was taken over: whether one was shows when it is asked for again.
    fn session_ended(&mut self, now: Now, client: ClientId, out: &mut Effects) {
        let held: Vec<u64> = self.volumes.keys().into_iter().filter(|key| self.is_held(*key)).collect();
        out.log.push(format!(
            "session {client} ended, because this process was stopped, was cut off from the metadata servers for longer \
             than a lease lasts, or was revoked; the leases of {} open volumes ran out with it",
            held.len()
        ));
        for key in held {
            self.with_volume(now, out, key, |volume, ctx| volume.die(ctx, BlockError::Fenced));
        }
    }

    fn is_held(&self, key: u64) -> bool {
        self.volumes.get(key).is_some_and(|volume| volume.death().is_none() && !volume.is_acquiring())
    }

    fn note_session(&mut self) {
        let (linked, failures) = (self.session.is_linked(), self.session.failed_attempts);
        if linked != std::mem::replace(&mut self.known_linked, linked) && linked {
            self.done.push(Completion::Notice(Notice::Linked));
        }
        if failures != std::mem::replace(&mut self.known_failures, failures) && failures > 0 {
            let (count, why) = self.failures();
            self.done.push(Completion::Notice(Notice::Unlinked(count, why)));
        }
        if let Some(error) = self.session.refused.take() {
            self.done.push(Completion::Notice(Notice::Refused(error)));
        }
        let client = self.session.client();
        if client != self.known_client {
            self.known_client = client;
            if let (Some(client), Some(cluster)) = (client, self.session.cluster()) {
                self.servers.set_session(client);
                self.servers.wants_topology = true;
                self.done.push(Completion::Notice(Notice::Session(client, cluster)));
            }
        }
    }

    fn ask_topology(&mut self, now: Now, out: &mut Effects) {
        let due = self.topology_at.is_none_or(|at| now.mono.saturating_since(at) >= TOPOLOGY_EVERY);
        if self.servers.wants_topology && !self.topology_asked && due && !self.shutting_down {
            self.servers.wants_topology = false;
            self.topology_asked = true;
            self.topology_at = Some(now.mono);
            let (mut ctx, _) = self.ctx(now, out);
            ctx.call(MdsRequest::Topology, Waiter::Topology);
        }
    }

    fn on_server_event(&mut self, now: Now, event: ServerEvent, out: &mut Effects) {
        for key in self.volumes.keys() {
            self.with_volume(now, out, key, |volume, ctx| volume.on_server(ctx, event));
        }
        if let ServerEvent::Up(number, _) = event {
            let (mut ctx, _) = self.ctx(now, out);
            ctx.servers.resume(&mut ctx.io, number);
        }
    }

    fn on_timer(&mut self, now: Now, out: &mut Effects) {
        let slept = self.next_wake.take().is_some_and(|at| now.mono.saturating_since(at) > SLEPT);
        self.timers.woken();
        while let Some(timer) = self.timers.due(now.mono) {
            let (mut ctx, _) = self.ctx(now, out);
            match timer {
                Timer::Session => ctx.session.tick(&mut ctx.io, slept),
                Timer::Server(number) => ctx.servers.tick(&mut ctx.io, number, slept),
                Timer::Volume(key) => self.with_volume(now, out, key, |v, ctx| v.on_tick(ctx)),
                Timer::Acquire(key) => self.with_volume(now, out, key, |v, ctx| v.on_acquire_timer(ctx)),
                Timer::Chunk(key, index) => self.with_volume(now, out, key, |v, ctx| v.on_chunk_timer(ctx, index)),
                Timer::Part(key, part) => self.with_volume(now, out, key, |v, ctx| v.on_part_timer(ctx, part)),
                Timer::Minimum(key, index) => self.with_volume(now, out, key, |v, ctx| v.on_minimum_timer(ctx, index)),
                Timer::Flush(key, op, slot) => {
                    self.with_volume(now, out, key, |v, ctx| v.on_flush_timer(ctx, op, slot))
                }
                Timer::Reconcile(key) => self.with_volume(now, out, key, |v, ctx| v.on_reconcile_timer(ctx)),
                Timer::Idle => self.release_idle(now, out),
                Timer::Shutdown => self.check_shutdown(now, out, true),
            }
        }
    }

    fn on_net(&mut self, now: Now, event: NetEvent, out: &mut Effects) {
        match event {
            NetEvent::Up { link, .. } => {
                let (mut ctx, _) = self.ctx(now, out);
                match ctx.io.links.of(link) {
                    Some(LinkUse::Mds) => ctx.session.on_up(&mut ctx.io, link),
                    Some(LinkUse::Server(number)) => ctx.servers.on_up(&mut ctx.io, number, link),
                    None => {}
                }
            }
            NetEvent::Down { link, reason } => {
                let (mut ctx, _) = self.ctx(now, out);
                match ctx.io.links.gone(link) {
                    Some(LinkUse::Mds) => ctx.session.on_down(&mut ctx.io, &reason),
                    Some(LinkUse::Server(number)) => ctx.servers.on_down(&mut ctx.io, number, &reason),
                    None => {}
                }
            }
            NetEvent::Frame { link, frame } => {
                let (mut ctx, _) = self.ctx(now, out);
                match ctx.io.links.of(link) {
                    Some(LinkUse::Mds) => ctx.session.on_frame(&mut ctx.io, link, &frame),
                    Some(LinkUse::Server(number)) => {
                        let answer = ctx.servers.on_frame(&mut ctx.io, number, link, frame);
                        if let Some((owner, answer)) = answer {
                            let key = owner.place().0;
                            self.with_volume(now, out, key, |volume, ctx| volume.on_answer(ctx, owner, answer));
                        }
                    }
                    None => {}
                }
            }
        }
    }
}

impl Process for ClientCore {
    fn step(&mut self, now: Now, event: Event, out: &mut Effects) {
        if self.stopped {
            return;
        }
        match event {
            Event::Start => {
                let (mut ctx, _) = self.ctx(now, out);
                ctx.session.start(&mut ctx.io);
            }
            Event::Net(event) => self.on_net(now, event, out),
            Event::Timer => self.on_timer(now, out),
            Event::Disk(..) | Event::Turn => {}
        }
        self.settle(now, out);
    }
}
