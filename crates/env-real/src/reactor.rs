//! The loop that drives one process.
//!
//! Events are stepped where they arise: a link's task steps the frames it has read, the timer its event. Each of them
//! then *schedules a turn*. The turn's task runs behind all tasks that are ready now, so one turn serves everything
//! that had arrived: it collects disk completions, steps [`Event::Turn`], carries out the effects of all steps in
//! order, writes every link that has output and submits the ring once.

use crate::awake::{self, Awake};
use crate::clock;
use crate::disk::Disk;
use crate::link::Links;
use crate::log::{LogLimiter, LogSink, stderr_sink};
use crate::ring::{Offloaded, Ring};
use crate::socket::Listener;
use crate::sys;
use cairn_env::DiskDone;
use cairn_stdx::repeats::Repeats;
use cairn_types::{ClusterId, Duration, Instant, NodeId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::{DiskIndex, Effects, Event, NetEffect, Now, Process};
use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// All links receive into one buffer of this size, one after the other.
const SCRATCH_SIZE: usize = 256 << 10;
/// So many of the last 32 waits must have been short for a reactor to spin.
const WAITS_SHORT_MIN: u32 = 24;
/// A turn that serves more than this is one of many in flight: sleeping then costs nothing, for others keep the machine
/// busy.
const SPIN_EVENTS_MAX: u64 = 3;
/// A turn takes tens of microseconds; the usual slice is milliseconds.
const SLICE: Duration = Duration::from_micros(200);
/// A spinning thread that was not running for so long has stood in somebody's way.
const PUSHED_ASIDE: Duration = Duration::from_micros(25);
/// Turns without spinning after that, at first; twice as many each time it happens again, up to the second number.
const PAUSE_TURNS: (u32, u32) = (32, 4096);

/// Who this node is to its peers.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The secret of the cluster.
    pub key: ClusterKey,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Identity of the cluster; learnt from the first peer that proves itself when not known.
    pub cluster: Option<ClusterId>,
    /// This node.
    pub node: NodeId,
}

/// Knobs of a reactor.
pub struct ReactorOptions {
    /// After work, look for more for this many microseconds before sleeping. Zero sleeps at once.
    pub spin_us: u32,
    /// Most links in their handshake at a time; more are closed at once.
    pub unauthenticated_max: usize,
    /// A handshake must end within this time.
    pub handshake_deadline: Duration,
    /// A connection must be made within this time.
    pub connect_deadline: Duration,
    /// A link with more unsent bytes than this after a turn is closed.
    pub output_max: usize,
    /// In each turn writes the links before it submits to the disks: for a process whose peers have more to do with a
    /// message than its own disk, such as the leader of a consensus group.
    pub send_first: bool,
    /// Where log lines go.
    pub log: LogSink,
}

impl Default for ReactorOptions {
    fn default() -> Self {
        Self {
            spin_us: 0,
            unauthenticated_max: 64,
            handshake_deadline: Duration::from_secs(5),
            connect_deadline: Duration::from_secs(3),
            output_max: 64 << 20,
            send_first: false,
            log: stderr_sink(),
        }
    }
}

/// What a reactor starts with.
pub struct ReactorConfig {
    /// Who this node is.
    pub identity: Identity,
    /// Sockets to accept links on, already listening.
    pub listen: Vec<std::net::TcpListener>,
    /// The disks, by [`DiskIndex`].
    pub disks: Vec<Disk>,
    /// Knobs.
    pub options: ReactorOptions,
}

/// Why a reactor has stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The process cannot go on, for this reason.
    Fatal(String),
    /// [`Reactor::stop`] was called.
    Asked,
}

/// What a reactor has done since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Turns.
    pub turns: u64,
    /// Frames received.
    pub frames_in: u64,
    /// Frames sent.
    pub frames_out: u64,
    /// Requests to disks.
    pub disk_requests: u64,
    /// Completions of disks.
    pub disk_completions: u64,
}

/// A process being driven on this thread. Clones are handles to the same one.
pub struct Reactor<P: Process>(pub(crate) Rc<Inner<P>>);

impl<P: Process> Clone for Reactor<P> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

type Hook<P> = Box<dyn FnMut(&Reactor<P>)>;

/// How looking for work without sleeping ended.
enum Spin {
    Work,
    Vain,
    /// The thread lost its core meanwhile.
    PushedAside,
}

/// Shared by the handle and the tasks of one reactor.
pub(crate) struct Inner<P: Process> {
    ring_ready: OnceCell<AsyncFd<OwnedFd>>,
    state: RefCell<State<P>>,
    hooks: RefCell<Vec<Hook<P>>>,
    turn_due: Cell<bool>,
    turn_waker: RefCell<Option<Waker>>,
    timer_at: Cell<Instant>,
    timer_changed: Notify,
    stop_signal: Notify,
    pub(crate) handshakes: Cell<usize>,
    tasks: RefCell<Vec<AbortHandle>>,
}

/// Everything behind the one borrow that a step needs.
pub(crate) struct State<P> {
    pub(crate) process: P,
    pub(crate) effects: Effects,
    pub(crate) identity: Identity,
    pub(crate) options: ReactorOptions,
    pub(crate) links: Links,
    pub(crate) scratch: Box<[u8]>,
    pub(crate) stats: Stats,
    pub(crate) limiter: LogLimiter,
    repeats: Repeats,
    /// Events that arose while effects were carried out; stepped at the start of the next turn.
    pub(crate) deferred: VecDeque<Event>,
    ring: Option<Ring>,
    completions: Vec<(DiskIndex, DiskDone)>,
    /// Frames and completions up to the last turn.
    events_before: u64,
    awake: Awake,
    wake_at: Option<Instant>,
    stopped: Option<Stopped>,
}

impl<P: Process> State<P> {
    pub(crate) fn step(&mut self, now: Now, event: Event) {
        if self.stopped.is_none() {
            self.process.step(now, event, &mut self.effects);
        }
    }

    pub(crate) fn log(&mut self, line: &str) {
        if let Some(line) = self.repeats.pass(clock::monotonic().0, line) {
            (self.options.log)(&line);
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }
}

/// Runs `future` and everything it spawns on this thread: a runtime for one reactor and its front ends.
///
/// # Errors
/// When the runtime cannot be built (no descriptors left).
pub fn block_on_local<F: Future>(future: F) -> io::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let output = tokio::task::LocalSet::new().block_on(&runtime, future);
    // A discard may hang in a broken device; leaving must not wait for it.
    runtime.shutdown_background();
    Ok(output)
}

impl<P: Process + 'static> Reactor<P> {
    /// Starts driving `process` on this thread, inside a `LocalSet` ([`block_on_local`]). Its first event is
    /// [`Event::Start`].
    ///
    /// # Errors
    /// When a listener cannot be used or the kernel offers no io_uring (only needed with disks).
    pub fn start(config: ReactorConfig, process: P) -> io::Result<Reactor<P>> {
        sys::tune_allocator();
        sys::ask_for_short_slices(SLICE);
        let inner = Rc::new(Inner {
            ring_ready: OnceCell::new(),
            state: RefCell::new(State {
                process,
                effects: Effects::default(),
                identity: config.identity,
                options: config.options,
                links: Links::default(),
                scratch: vec![0; SCRATCH_SIZE].into_boxed_slice(),
                stats: Stats::default(),
                limiter: LogLimiter::new(),
                repeats: Repeats::default(),
                deferred: VecDeque::new(),
                ring: None,
                completions: Vec::new(),
                events_before: 0,
                awake: Awake::default(),
                wake_at: None,
                stopped: None,
            }),
            hooks: RefCell::default(),
            turn_due: Cell::new(false),
            turn_waker: RefCell::default(),
            timer_at: Cell::new(Instant(u64::MAX)),
            timer_changed: Notify::new(),
            stop_signal: Notify::new(),
            handshakes: Cell::new(0),
            tasks: RefCell::default(),
        });
        let reactor = Reactor(inner);
        for disk in config.disks {
            reactor.add_disk(disk)?;
        }
        for listener in config.listen {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            match Listener::beside(&listener) {
                Ok(near) => reactor.0.spawn(Rc::clone(&reactor.0).accept_links(near)),
                Err(error) => reactor.0.state().log(&format!("links on this host will use TCP: {error}")),
            }
            reactor.0.spawn(Rc::clone(&reactor.0).accept_links(Listener::Tcp(listener)));
        }
        reactor.0.spawn(Rc::clone(&reactor.0).run_turns());
        reactor.0.spawn(Rc::clone(&reactor.0).run_timer());
        reactor.0.state().step(clock::now(), Event::Start);
        reactor.0.schedule_turn();
        Ok(reactor)
    }

    /// Adds a disk to a running process; the caller tells the process its index.
    ///
    /// # Errors
    /// When there are too many, or the kernel offers no io_uring.
    pub fn add_disk(&self, disk: Disk) -> io::Result<DiskIndex> {
        let mut state = self.0.state.borrow_mut();
        if state.ring.is_none() {
            let ring = Ring::new()?;
            let ready = ring.watch()?;
            assert!(self.0.ring_ready.set(ready).is_ok(), "a reactor has one ring");
            state.ring = Some(ring);
        }
        let index = state.ring.as_mut().expect("made above").add_disk(disk)?;
        self.0.schedule_turn();
        Ok(index)
    }

    /// Runs `f` on the process; what it leaves in the effects is carried out at the end of the turn that follows.
    ///
    /// # Panics
    /// When called from inside a step of the same process; use [`Reactor::after_turn`] for what a step brings about.
    pub fn with<R>(&self, f: impl FnOnce(&mut P, Now, &mut Effects) -> R) -> R {
        let mut state = self.0.state.borrow_mut();
        let State { process, effects, .. } = &mut *state;
        let result = f(process, clock::now(), effects);
        if state.is_stopped() {
            // Nobody carries them out any more, and they must not pile up.
            state.effects = Effects::default();
        }
        self.0.schedule_turn();
        result
    }

    /// Looks at the process without giving it anything to do: no turn follows.
    ///
    /// # Panics
    /// As [`Reactor::with`].
    pub fn peek<R>(&self, f: impl FnOnce(&P) -> R) -> R {
        f(&self.0.state.borrow().process)
    }

    /// As [`Reactor::peek`], to take out what the process has finished.
    ///
    /// # Panics
    /// As [`Reactor::with`].
    pub fn peek_mut<R>(&self, f: impl FnOnce(&mut P) -> R) -> R {
        f(&mut self.0.state.borrow_mut().process)
    }

    /// Sets the id this node has been given; links made from now on carry it.
    pub fn set_identity_node(&self, node: NodeId) {
        self.0.state.borrow_mut().identity.node = node;
    }

    /// Sets the cluster this node has joined; other clusters are refused from now on.
    pub fn set_cluster(&self, cluster: ClusterId) {
        self.0.state.borrow_mut().identity.cluster = Some(cluster);
    }

    /// The cluster this node belongs to, as set or learnt.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.0.state.borrow().identity.cluster
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        self.0.state.borrow().stats
    }

    /// Runs `hook` after every turn, outside of any borrow: it may call [`Reactor::with`].
    pub fn after_turn(&self, hook: impl FnMut(&Reactor<P>) + 'static) {
        self.0.hooks.borrow_mut().push(Box::new(hook));
    }

    /// Stops: links are written out once and closed, nothing is stepped any more. Disk writes already given to the
    /// kernel complete.
    pub fn stop(&self) {
        self.0.halt(&mut self.0.state.borrow_mut(), Stopped::Asked);
    }

    /// Waits until the process has failed or [`Reactor::stop`] was called.
    pub async fn stopped(&self) -> Stopped {
        loop {
            let signal = self.0.stop_signal.notified();
            if let Some(stopped) = self.0.state.borrow().stopped.clone() {
                return stopped;
            }
            signal.await;
        }
    }
}

impl<P: Process + 'static> Inner<P> {
    pub(crate) fn state(&self) -> RefMut<'_, State<P>> {
        self.state.borrow_mut()
    }

    /// Spawns a task that ends with the reactor.
    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.borrow_mut().push(tokio::task::spawn_local(task).abort_handle());
    }

    /// Asks for a turn behind all tasks that are ready now.
    pub(crate) fn schedule_turn(&self) {
        if !self.turn_due.replace(true)
            && let Some(waker) = self.turn_waker.borrow().as_ref()
        {
            waker.wake_by_ref();
        }
    }

    pub(crate) fn halt(&self, state: &mut State<P>, why: Stopped) {
        if state.stopped.is_some() {
            return;
        }
        state.stopped = Some(why);
        state.links.close_all();
        self.tasks.borrow_mut().drain(..).for_each(|task| task.abort());
        // Hooks often hold a handle to this reactor; with them it would never be freed, nor its disks unlocked.
        self.hooks.borrow_mut().clear();
        self.stop_signal.notify_waiters();
    }

    /// Serves turns for ever. With [`ReactorOptions::spin_us`] it looks for work that long before it sleeps, while
    /// three in four of the last 32 waits were that short with little to serve, and as long as nobody else wants
    /// the core.
    async fn run_turns(self: Rc<Self>) {
        let limit = Duration::from_micros(u64::from(self.state.borrow().options.spin_us));
        // A thread that slept was woken late.
        let short = limit * 2;
        let (mut waits, mut pause, mut next_pause) = (0u32, 0u32, PAUSE_TURNS.0);
        let mut begun = Instant(0);
        loop {
            poll_fn(|cx| self.poll_work(cx)).await;
            if limit.is_zero() {
                self.turn();
                continue;
            }
            let wait = clock::monotonic().saturating_since(begun);
            let events = self.turn();
            waits = waits << 1 | u32::from(wait <= short && events <= SPIN_EVENTS_MAX);
            begun = clock::monotonic();
            pause = pause.saturating_sub(1);
            if pause > 0 || waits.count_ones() < WAITS_SHORT_MIN {
                continue;
            }
            match self.spin(begun + limit).await {
                Spin::Work => next_pause = (next_pause - next_pause / 64).max(PAUSE_TURNS.0),
                Spin::Vain => {}
                Spin::PushedAside => {
                    pause = next_pause;
                    next_pause = (next_pause * 2).min(PAUSE_TURNS.1);
                }
            }
        }
    }

    /// Ends the wakefulness of the cores when there was no work for a while.
    async fn let_cores_sleep(inner: Weak<Self>) {
        loop {
            tokio::time::sleep(awake::REST).await;
            // A reactor that is gone has let go with its state.
            match inner.upgrade() {
                Some(inner) if !inner.state.borrow_mut().awake.lets_go(clock::monotonic()) => {}
                _ => return,
            }
        }
    }

    /// Ready when a turn is due. A readable ring makes one due behind the tasks that are ready now.
    fn poll_work(&self, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut waker = self.turn_waker.borrow_mut();
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        if self.turn_due.replace(false) {
            return Poll::Ready(());
        }
        if let Some(ready) = self.ring_ready.get()
            && let Poll::Ready(guard) = ready.poll_read_ready(cx)
        {
            match guard {
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    self.halt(&mut self.state.borrow_mut(), Stopped::Fatal(format!("watch the disk ring: {error}")));
                }
            }
            // Registers for the next edge. What is here now may already have been collected by an earlier turn.
            let again = ready.poll_read_ready(cx).is_ready();
            if again || self.state.borrow_mut().ring.as_mut().is_some_and(Ring::poll_completions) {
                self.schedule_turn();
            }
        }
        Poll::Pending
    }

    /// Looks for work without sleeping.
    async fn spin(&self, end: Instant) -> Spin {
        let mut before = clock::monotonic();
        loop {
            // Lets the other tasks run and polls the sockets once.
            tokio::task::yield_now().await;
            if self.turn_due.get() {
                return Spin::Work;
            }
            if self.state.borrow_mut().ring.as_mut().is_some_and(Ring::poll_completions) {
                self.schedule_turn();
                return Spin::Work;
            }
            let now = clock::monotonic();
            if now.saturating_since(before) > PUSHED_ASIDE {
                return Spin::PushedAside;
            }
            if now >= end {
                return Spin::Vain;
            }
            before = now;
        }
    }

    /// One turn; gives how many frames and completions it served.
    fn turn(self: &Rc<Self>) -> u64 {
        let served = {
            let state = &mut *self.state.borrow_mut();
            if state.is_stopped() {
                return 0;
            }
            state.stats.turns += 1;
            let now = clock::now();
            if state.awake.turn(now.mono) {
                tokio::task::spawn_local(Self::let_cores_sleep(Rc::downgrade(self)));
            }
            self.step_completions(state, now);
            for _ in 0..state.deferred.len() {
                let event = state.deferred.pop_front().expect("counted");
                state.step(now, event);
            }
            state.step(now, Event::Turn);
            self.carry_out(state, now);
            self.finish_turn(state, now);
            let events = state.stats.frames_in + state.stats.disk_completions;
            events - std::mem::replace(&mut state.events_before, events)
        };
        self.run_hooks();
        served
    }

    fn step_completions(&self, state: &mut State<P>, now: Now) {
        let Some(ring) = &mut state.ring else { return };
        let mut completions = std::mem::take(&mut state.completions);
        ring.drain(&mut completions);
        state.stats.disk_completions += completions.len() as u64;
        for (disk, done) in completions.drain(..) {
            state.step(now, Event::Disk(disk, done));
        }
        state.completions = completions;
    }

    /// Carries out the effects of all steps since the last turn.
    fn carry_out(self: &Rc<Self>, state: &mut State<P>, now: Now) {
        for line in std::mem::take(&mut state.effects.log) {
            state.log(&line);
        }
        if let Some(reason) = state.effects.fatal.take() {
            return self.halt(state, Stopped::Fatal(reason));
        }
        if let Some(at) = state.effects.wake_at.take() {
            state.wake_at = Some(state.wake_at.map_or(at, |earlier| earlier.min(at)));
        }
        let mut disk = std::mem::take(&mut state.effects.disk);
        state.stats.disk_requests += disk.len() as u64;
        for (index, request) in disk.drain(..) {
            let ring = state.ring.as_mut().expect("a process with disk requests was started with disks");
            ring.enqueue(now.mono, index, request);
        }
        state.effects.disk = disk;
        let mut net = std::mem::take(&mut state.effects.net);
        for effect in net.drain(..) {
            match effect {
                NetEffect::Connect { link, addr } => self.connect(state, link, addr),
                NetEffect::Close { link } => state.links.close(link),
                NetEffect::Send { link, kind, id, prefix, payload } => {
                    state.stats.frames_out += u64::from(state.links.send(link, kind, id, &prefix, payload));
                }
            }
        }
        state.effects.net = net;
    }

    /// Writes the links, submits the ring, sets the timer.
    fn finish_turn(self: &Rc<Self>, state: &mut State<P>, now: Now) {
        if state.is_stopped() {
            return;
        }
        // The disks first: they work while the sockets are written.
        if state.options.send_first {
            self.flush_links(state);
        }
        if let Err(error) = state.ring.as_mut().map_or(Ok(()), |ring| ring.submit(now.mono)) {
            return self.halt(state, Stopped::Fatal(format!("submit to the disk ring: {error}")));
        }
        self.flush_links(state);
        if let Some(ring) = &mut state.ring {
            for discard in ring.take_offloaded() {
                self.spawn_discard(discard);
            }
            if ring.has_work() {
                self.schedule_turn();
            }
            let lines = ring.take_log();
            lines.iter().for_each(|line| state.log(line));
        }
        if !state.deferred.is_empty() {
            self.schedule_turn();
        }
        self.set_timer(state);
    }

    fn run_hooks(self: &Rc<Self>) {
        let mut hooks = std::mem::take(&mut *self.hooks.borrow_mut());
        if hooks.is_empty() {
            return;
        }
        let handle = Reactor(Rc::clone(self));
        hooks.iter_mut().for_each(|hook| hook(&handle));
        if self.state.borrow().is_stopped() {
            return;
        }
        let added = std::mem::replace(&mut *self.hooks.borrow_mut(), hooks);
        self.hooks.borrow_mut().extend(added);
    }

    fn spawn_discard(self: &Rc<Self>, discard: Offloaded) {
        let inner = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let Offloaded { ticket, file, is_device, offset, len } = discard;
            let work = tokio::task::spawn_blocking(move || match is_device {
                true => sys::discard_device_range(&file, offset, len),
                false => sys::punch_hole(&file, offset, len),
            });
            let result = work.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            if let Some(ring) = &mut inner.state().ring {
                ring.offloaded_done(ticket, result);
            }
            inner.schedule_turn();
        });
    }

    fn set_timer(&self, state: &State<P>) {
        let disks = state.ring.as_ref().and_then(Ring::check_at);
        let at = [state.wake_at, disks].into_iter().flatten().min().unwrap_or(Instant(u64::MAX));
        // A timer that is too early looks again; only one that is too late must be changed.
        if at < self.timer_at.get() {
            self.timer_at.set(at);
            self.timer_changed.notify_one();
        }
    }

    async fn run_timer(self: Rc<Self>) {
        loop {
            let at = self.timer_at.get();
            if at == Instant(u64::MAX) {
                self.timer_changed.notified().await;
                continue;
            }
            let wait = at.saturating_since(clock::monotonic());
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.timer_changed.notified() => continue,
            }
            self.timer_at.set(Instant(u64::MAX));
            let state = &mut *self.state.borrow_mut();
            let now = clock::now();
            self.step_completions(state, now);
            if let Some(ring) = &mut state.ring {
                ring.expire(now.mono);
            }
            if state.wake_at.is_some_and(|at| at <= now.mono) {
                state.wake_at = None;
                state.step(now, Event::Timer);
            }
            // The turn carries out what was asked and sets the timer anew.
            self.schedule_turn();
        }
    }
}
