//! One volume under one lease: the data path of the client. The rules it keeps are those of `docs/design/client.md`.
//!
//! - [`ops`]: what users ask, cut into *parts* of one chunk and at most 1 MiB; range locks order them ([`locks`]).
//! - [`map`]: the chunk map cache and the preparation of a chunk (fence, create, raise) before it is used.
//! - [`write`], [`read`]: one part at the replicas. [`flush`]: durability and settling ([`tracker`]).
//! - [`explain`]: what it waits for, in words. [`fail`]: replicas that fail, [`full`]: that have no room.
//! - [`reconcile`]: making replicas equal after a take-over.
//! - this file: the state, opening and closing.

mod explain;
mod fail;
mod flush;
mod full;
mod locks;
mod map;
mod ops;
mod read;
mod reconcile;
mod tracker;
mod write;

use crate::config::{OpenError, SizeRule};
use crate::core::{Completion, Notice, OpenDone, VolumeHandle};
use crate::io::Ctx;
use crate::servers::{Answer, CallFor, Owner};
use crate::session::Waiter;
use crate::slab::Slab;
use crate::timers::Timer;
use cairn_env::block::BlockError;
use cairn_stdx::{FixedMap, planted};
use cairn_types::{BLOCK_SIZE_U64, CsId, Duration, Epoch, Instant, VolumeId};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsError, MdsReply, MdsRequest};
use locks::RangeLocks;
use map::Chunk;
pub(crate) use ops::Done;
use ops::Op;
use reconcile::Reconcile;
use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use tracker::Tracker;
use write::Part;

/// How soon a lease that somebody else holds is asked for again, at first; then twice as long each time. A holder that
/// only read, or has closed the file, gives it back within milliseconds.
const ACQUIRE_AGAIN: Duration = Duration::from_millis(5);
/// And at most. Each attempt is a command in the metadata servers' log.
const ACQUIRE_AGAIN_MAX: Duration = Duration::from_millis(200);
const TICK: Duration = Duration::from_millis(500);

/// Calls a volume makes to the metadata servers.
pub(crate) enum VolumeCall {
    Acquire,
    Fetch { index: u64, nth: u64 },
    Allocate { indexes: Vec<u64> },
    Failed { slot: u16, index: Option<u64> },
    Full { index: u64 },
    Drop { op: u64, first: u64, count: u64 },
    Map { from: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fence {
    No,
    Asked,
    Yes,
}

/// A chunk server as this volume knows it.
struct VolServer {
    number: u32,
    cs: CsId,
    fence: Fence,
    boot: u64,
    /// Unsettled entries it had when it was fenced.
    tail: u64,
    /// The metadata servers have been told that it failed; reads and fences need not wait for it.
    excused: bool,
    failing: bool,
    /// It failed, and stayed in a set: until then nobody is asked to take it out.
    spared_until: Option<Instant>,
    /// It failed again meanwhile.
    fail_again: bool,
    /// Chunks to look at again once it is fenced.
    chunks: Vec<u64>,
    /// The settled mark it was last told.
    told: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    Acquiring {
        deadline: Instant,
        /// How long to wait before the next attempt.
        again: Duration,
    },
    Fencing,
    Open,
    /// The lease is being given back.
    Releasing,
    Dead(BlockError),
}

/// See the module.
pub(crate) struct Volume {
    key: u64,
    pub(crate) id: VolumeId,
    pub(crate) epoch: Epoch,
    pub(crate) mode: LeaseMode,
    pub(crate) size: u64,
    pub(crate) rule: SizeRule,
    chunk_blocks: u64,
    state: State,
    /// Handles given out.
    pub(crate) refs: u32,
    /// Waiting for the volume to be ready.
    openers: Vec<(SizeRule, OpenDone)>,
    /// Waiting for the lease to be given back, to ask for it anew.
    pub(crate) successors: Vec<(LeaseMode, SizeRule, OpenDone)>,
    /// Closed, settled, and so since then.
    pub(crate) idle_since: Option<Instant>,
    /// The lease is to be given back as soon as the last handle is closed and everything is settled.
    pub(crate) release_wanted: bool,
    /// Called when the lease was given back.
    pub(crate) released: Vec<Box<dyn FnOnce()>>,

    /// New operations wait: the volume is not ready.
    paused: bool,
    held_ops: VecDeque<u64>,
    ops: FixedMap<u64, Op>,
    next_op: u64,
    ready_ops: Vec<u64>,
    parts: Slab<Part>,
    locks: RangeLocks,

    chunks: FixedMap<u64, Chunk>,
    chunk_order: VecDeque<u64>,
    /// Chunks that were forgotten while parts waited for them: driven again by the next pump.
    forgotten: Vec<u64>,
    /// No chunk existed when the lease was granted: what is not in the cache is a hole.
    virgin: bool,
    /// Looks at the map begun so far.
    fetches: u64,
    allocate: Vec<u64>,
    allocating: bool,
    /// The metadata servers said that nobody has room; until then they are not asked again.
    no_room_until: Option<Instant>,
    /// One past the last block written, to see sequential writers.
    write_end: u64,

    servers: Vec<VolServer>,
    slots: FixedMap<u64, u16>,
    read_cursor: usize,
    tracker: Tracker,
    /// Unsettled bytes of all volumes of the client, and our share in it.
    budget: Rc<Cell<u64>>,
    budgeted: u64,
    throttled: VecDeque<u64>,
    settling: bool,
    last_traffic: Instant,
    ticking: bool,
    settles_unanswered: u32,
    repairs: u32,
    clean: bool,
    opening_sequence: u64,
    reconcile: Option<Reconcile>,
    /// Damaged blocks that a reconciliation met: index, replica, block.
    rotten: BTreeSet<(u64, u16, u32)>,
}

impl Volume {
    /// A volume whose lease is still to be asked for.
    pub(crate) fn new(id: VolumeId, mode: LeaseMode, rule: SizeRule, deadline: Instant, budget: Rc<Cell<u64>>) -> Self {
        Self {
            key: 0,
            id,
            epoch: Epoch(0),
            mode,
            size: 0,
            rule,
            chunk_blocks: 1,
            state: State::Acquiring { deadline, again: ACQUIRE_AGAIN },
            refs: 0,
            openers: Vec::new(),
            successors: Vec::new(),
            idle_since: None,
            release_wanted: false,
            released: Vec::new(),
            paused: true,
            held_ops: VecDeque::new(),
            ops: FixedMap::default(),
            next_op: 1,
            ready_ops: Vec::new(),
            parts: Slab::default(),
            locks: RangeLocks::default(),
            chunks: FixedMap::default(),
            chunk_order: VecDeque::new(),
            forgotten: Vec::new(),
            virgin: false,
            fetches: 0,
            allocate: Vec::new(),
            allocating: false,
            no_room_until: None,
            write_end: 0,
            servers: Vec::new(),
            slots: FixedMap::default(),
            read_cursor: 0,
            tracker: Tracker::new(1),
            budget,
            budgeted: 0,
            throttled: VecDeque::new(),
            settling: false,
            last_traffic: Instant(0),
            ticking: false,
            settles_unanswered: 0,
            repairs: 0,
            clean: true,
            opening_sequence: 0,
            reconcile: None,
            rotten: BTreeSet::new(),
        }
    }

    /// Sets the key it is found under.
    pub(crate) fn set_key(&mut self, key: u64) {
        self.key = key;
    }

    /// Why the volume is dead, if it is.
    pub(crate) fn death(&self) -> Option<&BlockError> {
        match &self.state {
            State::Dead(error) => Some(error),
            _ => None,
        }
    }

    /// True when the lease is held and nothing stands in the way of another handle.
    pub(crate) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// True while the lease is still asked for.
    pub(crate) fn is_acquiring(&self) -> bool {
        matches!(self.state, State::Acquiring { .. })
    }

    /// True while the lease is being given back.
    pub(crate) fn is_releasing(&self) -> bool {
        self.state == State::Releasing
    }

    /// True when nothing is under way and nothing is unsettled.
    pub(crate) fn is_settled(&self) -> bool {
        self.ops.is_empty() && self.tracker.load().0 == 0 && self.settles_unanswered == 0
    }

    fn waiter(&self, call: VolumeCall) -> Waiter {
        Waiter::Volume(self.key, call)
    }

    // Opening.

    /// Asks for the lease.
    pub(crate) fn acquire(&mut self, ctx: &mut Ctx<'_>) {
        let request = MdsRequest::LeaseAcquire { volume: self.id, mode: self.mode };
        ctx.call(request, self.waiter(VolumeCall::Acquire));
    }

    /// Adds somebody who waits for the volume to be ready, or answers at once.
    pub(crate) fn add_opener(&mut self, ctx: &mut Ctx<'_>, rule: SizeRule, done: OpenDone) {
        self.openers.push((rule, done));
        if self.state == State::Open {
            self.answer_openers(ctx);
        }
    }

    fn answer_openers(&mut self, ctx: &mut Ctx<'_>) {
        if planted!("sequence_reused_after_reopen") && self.refs == 0 && self.tracker.load().0 == 0 {
            self.tracker = Tracker::new(1);
        }
        for (rule, done) in std::mem::take(&mut self.openers) {
            self.refs += 1;
            self.rule = rule;
            ctx.done.push(Completion::Open(done, Ok(VolumeHandle(self.key))));
        }
        self.idle_since = None;
    }

    fn on_acquired(&mut self, ctx: &mut Ctx<'_>, result: Result<MdsReply, MdsError>) {
        let State::Acquiring { deadline, again } = self.state else { return };
        match result {
            Ok(MdsReply::Lease(grant)) if grant.volume == self.id => self.begin(ctx, grant),
            // Asked for in a session that has ended since: the next one asks again.
            Err(MdsError::Held { .. }) | Err(MdsError::SessionEnded(_)) if ctx.io.now < deadline => {
                ctx.io.timers.after(ctx.io.now, again, Timer::Acquire(self.key));
                self.state = State::Acquiring { deadline, again: (again * 2).min(ACQUIRE_AGAIN_MAX) };
            }
            Err(MdsError::Held { holder, .. }) => {
                let volume = self.id;
                self.fail_open(ctx, OpenError::Held { volume, holder });
            }
            Err(error) => self.fail_open(ctx, OpenError::Mds(error)),
            Ok(other) => {
                self.fail_open(ctx, OpenError::Mds(MdsError::Invalid(format!("unexpected answer {other:?}"))));
            }
        }
    }

    fn fail_open(&mut self, ctx: &mut Ctx<'_>, error: OpenError) {
        for (_, done) in std::mem::take(&mut self.openers) {
            ctx.done.push(Completion::Open(done, Err(error.clone())));
        }
        self.die(ctx, BlockError::Closed);
    }

    /// Time to ask for the lease again.
    pub(crate) fn on_acquire_timer(&mut self, ctx: &mut Ctx<'_>) {
        if matches!(self.state, State::Acquiring { .. }) {
            self.acquire(ctx);
        }
    }

    /// The lease is granted: fence every server of the volume before anything else (rule 1).
    pub(crate) fn begin(&mut self, ctx: &mut Ctx<'_>, grant: LeaseGrant) {
        assert_eq!(grant.volume, self.id, "the lease of the volume asked for");
        let blocks = grant.chunk_size / BLOCK_SIZE_U64;
        if !blocks.is_power_of_two() || blocks > u64::from(u32::MAX) {
            let error = MdsError::Invalid(format!("chunk size {} is not usable", grant.chunk_size));
            self.fail_open(ctx, OpenError::Mds(error));
            return;
        }
        self.epoch = grant.epoch;
        self.mode = grant.mode;
        self.size = grant.size;
        self.chunk_blocks = blocks;
        self.clean = grant.clean;
        self.virgin = grant.servers.is_empty() && grant.clean;
        self.state = State::Fencing;
        self.last_traffic = ctx.io.now;
        // The first number stands for the opening itself: no mark above zero, and so no tail of an earlier epoch
        // dropped at a server, before the opening has ended.
        self.opening_sequence = self.tracker.issue(u64::MAX, 0);
        for cs in grant.servers {
            let slot = self.slot_of(ctx, cs);
            self.ask_fence(ctx, slot);
        }
        self.check_fenced(ctx);
    }

    fn slot_of(&mut self, ctx: &mut Ctx<'_>, cs: CsId) -> u16 {
        if let Some(slot) = self.slots.get(&u64::from(cs.0)) {
            return *slot;
        }
        let slot = u16::try_from(self.servers.len()).expect("fewer than 65536 chunk servers");
        let number = ctx.servers.number(cs);
        self.servers.push(VolServer {
            number,
            cs,
            fence: Fence::No,
            boot: 0,
            tail: 0,
            excused: false,
            failing: false,
            spared_until: None,
            fail_again: false,
            chunks: Vec::new(),
            told: 0,
        });
        self.slots.insert(u64::from(cs.0), slot);
        slot
    }

    fn server(&self, slot: u16) -> &VolServer {
        &self.servers[slot as usize]
    }

    fn server_mut(&mut self, slot: u16) -> &mut VolServer {
        &mut self.servers[slot as usize]
    }

    fn all_slots(&self) -> std::ops::Range<u16> {
        0..self.servers.len() as u16
    }

    fn cs_call(&mut self, ctx: &mut Ctx<'_>, slot: u16, request: &CsRequest, call: CallFor) {
        let owner = Owner::Call { volume: self.key, slot, call };
        ctx.servers.call(&mut ctx.io, self.server(slot).number, request, owner);
    }

    fn ask_fence(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        if self.server(slot).fence == Fence::No {
            self.server_mut(slot).fence = Fence::Asked;
            let request = CsRequest::Fence { volume: self.id, epoch: self.epoch };
            self.cs_call(ctx, slot, &request, CallFor::Fence);
        }
    }

    fn on_fenced(&mut self, ctx: &mut Ctx<'_>, slot: u16, result: Result<CsReply, CsError>) {
        match result {
            Ok(CsReply::Fenced { boot, tail, .. }) => {
                let opening = self.state == State::Fencing;
                let server = self.server_mut(slot);
                let restarted = server.boot != 0 && server.boot != boot;
                server.fence = Fence::Yes;
                server.boot = boot;
                server.excused = false;
                if opening {
                    server.tail = tail;
                }
                if restarted {
                    self.on_restarted(ctx, slot);
                }
                let server = self.server_mut(slot);
                for index in std::mem::take(&mut server.chunks) {
                    self.drive(ctx, index);
                }
                self.check_fenced(ctx);
            }
            Err(CsError::StaleEpoch { .. }) => self.taken_over(ctx),
            Err(CsError::DiskFailed(_)) => {
                self.server_mut(slot).fence = Fence::No;
                self.fail_server(ctx, slot);
            }
            other => {
                let cs = self.server(slot).cs;
                ctx.log(format!("{cs} does not fence {}: {other:?}", self.id));
                self.server_mut(slot).fence = Fence::No;
                self.fail_server(ctx, slot);
            }
        }
    }

    /// Goes on with the opening once every server is fenced or out of the replica sets.
    fn check_fenced(&mut self, ctx: &mut Ctx<'_>) {
        if self.state != State::Fencing || self.reconcile.is_some() {
            return;
        }
        if !self.servers.iter().all(|server| server.fence == Fence::Yes || server.excused) {
            return;
        }
        let tails = self.servers.iter().any(|server| server.tail > 0);
        if tails && self.mode == LeaseMode::Exclusive {
            self.begin_reconcile(ctx);
        } else {
            self.finish_open(ctx);
        }
    }

    fn finish_open(&mut self, ctx: &mut Ctx<'_>) {
        self.state = State::Open;
        self.tracker.acknowledge(self.opening_sequence, None);
        self.advance(ctx);
        self.answer_openers(ctx);
        self.unpause(ctx);
    }

    fn unpause(&mut self, ctx: &mut Ctx<'_>) {
        self.paused = false;
        for op in std::mem::take(&mut self.held_ops) {
            self.start_op(ctx, op);
        }
        self.pump(ctx);
    }

    // Closing.

    /// One handle fewer; the last one flushes and settles. `done` is called when that is through.
    pub(crate) fn close(&mut self, ctx: &mut Ctx<'_>, done: Box<dyn FnOnce()>) {
        self.refs = self.refs.saturating_sub(1);
        if planted!("release_before_drain") && self.release_wanted {
            ctx.done.push(Completion::Closed(done));
            return;
        }
        self.add_internal_flush(ctx, Done::Closed(done));
    }

    /// Looks whether a closed volume has come to rest. True when its lease can be given back.
    pub(crate) fn check_idle(&mut self, now: Instant) -> bool {
        if self.refs > 0 || self.state != State::Open || !self.openers.is_empty() {
            return false;
        }
        if planted!("release_before_drain") && self.release_wanted {
            return true;
        }
        if !self.is_settled() || self.reconcile.is_some() {
            return false;
        }
        self.idle_since.get_or_insert(now);
        true
    }

    /// The lease goes back: from here on nothing is sent for this volume.
    pub(crate) fn begin_release(&mut self, ctx: &mut Ctx<'_>) {
        self.state = State::Releasing;
        if planted!("release_before_drain") {
            self.fail_everything(ctx, &BlockError::Closed);
        }
        assert!(self.ops.is_empty(), "a lease is given back only at rest");
    }

    /// A server knows a later epoch than ours.
    pub(super) fn taken_over(&mut self, ctx: &mut Ctx<'_>) {
        if self.death().is_none() {
            ctx.log(format!("the lease of {} was taken over by another client ({})", self.id, self.epoch));
            self.die(ctx, BlockError::Fenced);
        }
    }

    /// The lease is lost, or the volume closed by force: everything under way fails with `error`.
    pub(crate) fn die(&mut self, ctx: &mut Ctx<'_>, error: BlockError) {
        if matches!(self.state, State::Dead(_)) {
            return;
        }
        let was_ours = !matches!(self.state, State::Acquiring { .. });
        self.state = State::Dead(error.clone());
        if error == BlockError::Fenced && was_ours {
            ctx.done.push(Completion::Notice(Notice::Fenced(VolumeHandle(self.key))));
        }
        for (_, done) in std::mem::take(&mut self.openers) {
            ctx.done.push(Completion::Open(done, Err(OpenError::Fenced(self.id))));
        }
        self.fail_everything(ctx, &error);
        for done in std::mem::take(&mut self.released) {
            ctx.done.push(Completion::Closed(done));
        }
    }

    fn fail_everything(&mut self, ctx: &mut Ctx<'_>, error: &BlockError) {
        let key = self.key;
        for server in &self.servers {
            ctx.servers.cancel(server.number, |owner| owner.place().0 == key);
        }
        let mut ops: Vec<u64> = self.ops.keys().copied().collect();
        ops.sort_unstable();
        for op in ops {
            let op = self.ops.remove(&op).expect("just listed");
            op.done.finish(ctx, Err(error.clone()));
        }
        self.parts = Slab::default();
        self.locks = RangeLocks::default();
        self.chunks.clear();
        self.chunk_order.clear();
        self.held_ops.clear();
        self.throttled.clear();
        self.ready_ops.clear();
        self.reconcile = None;
        self.tracker = Tracker::new(self.tracker.last() + 1);
        self.tell_load();
        self.settles_unanswered = 0;
    }

    // Events.

    /// An answer of the metadata servers.
    pub(crate) fn on_mds(&mut self, ctx: &mut Ctx<'_>, call: VolumeCall, result: Result<MdsReply, MdsError>) {
        if self.death().is_some() {
            return;
        }
        match &result {
            Err(MdsError::SessionEnded(_)) if !self.is_acquiring() => return self.die(ctx, BlockError::Fenced),
            Err(MdsError::StaleEpoch { .. }) if !self.is_acquiring() => return self.taken_over(ctx),
            _ => {}
        }
        match call {
            VolumeCall::Acquire => self.on_acquired(ctx, result),
            VolumeCall::Fetch { index, nth } => self.on_fetched(ctx, index, nth, result),
            VolumeCall::Allocate { indexes } => self.on_allocated(ctx, indexes, result),
            VolumeCall::Failed { slot, index } => self.on_failed(ctx, slot, index, result),
            VolumeCall::Full { index } => self.on_room(ctx, index, result),
            VolumeCall::Drop { op, first, count } => self.on_dropped(ctx, op, (first, count), result),
            VolumeCall::Map { from } => self.on_reconcile_map(ctx, from, result),
        }
        self.pump(ctx);
    }

    /// An answer of a chunk server.
    pub(crate) fn on_answer(&mut self, ctx: &mut Ctx<'_>, owner: Owner, answer: Answer) {
        if self.death().is_some() {
            return;
        }
        match (owner, answer) {
            (Owner::Call { slot, call, .. }, Answer::Call(result)) => match call {
                CallFor::Fence => self.on_fenced(ctx, slot, result),
                CallFor::Prepare { index, round } => self.on_prepared(ctx, slot, index, round, result),
                CallFor::Tail => self.on_tail(ctx, slot, result),
                CallFor::Settle => self.on_settled(ctx, result),
                CallFor::Extents { part } => self.on_extents(ctx, part, slot, result),
            },
            (Owner::Write { part, slot, .. }, Answer::Data(reply, _)) => self.on_written(ctx, part, slot, &reply),
            (Owner::Read { part, slot, .. }, Answer::Data(reply, data)) => self.on_read(ctx, part, slot, &reply, data),
            (Owner::Confirm { part, slot, attempt, .. }, Answer::Data(reply, _)) => {
                self.on_confirmed(ctx, part, slot, attempt, &reply);
            }
            (Owner::Flush { op, slot, .. }, Answer::Data(reply, _)) => self.on_flushed(ctx, op, slot, &reply),
            (owner, _) => {
                // The server mixed up its answers: what it says is worth nothing. The request is lost with the slot.
                let slot = owner.place().1;
                ctx.log(format!("{} answered a request with the wrong kind of frame", self.server(slot).cs));
                self.fail_server(ctx, slot);
            }
        }
        self.pump(ctx);
    }

    /// Upkeep.
    pub(crate) fn on_tick(&mut self, ctx: &mut Ctx<'_>) {
        self.ticking = false;
        if self.death().is_none() {
            self.settle_if_idle(ctx);
            self.fail_spared(ctx);
            self.advance(ctx);
            self.pump(ctx);
        }
    }

    fn arm_tick(&mut self, ctx: &mut Ctx<'_>) {
        let unsettled = self.tracker.load().0 > 0 || self.has_marks_to_tell() || !self.throttled.is_empty();
        let failed = self.servers.iter().any(|server| server.fail_again);
        if !self.ticking && (failed || (unsettled && self.state == State::Open)) {
            self.ticking = true;
            ctx.io.timers.after(ctx.io.now, TICK, Timer::Volume(self.key));
        }
    }

    /// The front end or the metadata servers changed the size. Shrinking forgets the map past the end: those chunks are
    /// gone.
    pub(crate) fn set_size(&mut self, ctx: &mut Ctx<'_>, size: u64) {
        let shrunk = size < self.size;
        self.size = size;
        if shrunk {
            let first = size.div_ceil(self.chunk_blocks * BLOCK_SIZE_U64);
            self.forget_chunks(ctx, first, u64::MAX, false);
            self.advance(ctx);
            self.pump(ctx);
        }
    }

    /// Runs what became ready, until nothing is.
    fn pump(&mut self, ctx: &mut Ctx<'_>) {
        for index in std::mem::take(&mut self.forgotten) {
            self.drive(ctx, index);
        }
        while !self.ready_ops.is_empty() {
            for op in std::mem::take(&mut self.ready_ops) {
                self.start_op(ctx, op);
            }
        }
        self.send_allocations(ctx);
        self.arm_tick(ctx);
    }
}
