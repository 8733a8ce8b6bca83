//! The chunk map cache, and what a chunk needs before it may be used.
//!
//! [`Volume::drive`] takes a chunk one step further: fetch its entry, allocate it, fence its servers, create it, raise
//! it. When nothing is left it is *ready*: writes under way are matched with the replica set in force, and waiting
//! parts start. A version change of a chunk with writes under way or unsettled always raises every replica before any
//! of those writes may be acknowledged or settled without a server that left the set: only then do they stand in the
//! new version, and a resync of that server will copy them (rule 2).

use super::write::Body;
use super::{Fence, State, Volume, VolumeCall};
use crate::config::{MAP_CACHE_MAX, MAP_RUN, OnNoSpace, SizeRule};
use crate::io::Ctx;
use crate::servers::CallFor;
use crate::timers::Timer;
use cairn_env::block::BlockError;
use cairn_stdx::planted;
use cairn_types::{BLOCK_SIZE_U64, ChunkId, ChunkVersion, Duration, LayerId};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::mds::{ChunkEntry, LeaseMode, MdsError, MdsReply, MdsRequest, ReplicaRole};

/// Most indexes in one allocation (bound of the call).
const ALLOCATE_MAX: usize = 64;
/// Before a chunk whose state cannot change by our doing is looked at again.
const LATER: Duration = Duration::from_secs(1);
/// Before a chunk whose map entry lags behind its servers is looked at again.
const SOON: Duration = Duration::from_millis(50);

/// A replica of a chunk, by slot of its server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rep {
    pub slot: u16,
    pub current: bool,
    pub since: ChunkVersion,
}

/// The map entry of an allocated chunk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub chunk: ChunkId,
    pub layer: LayerId,
    pub version: ChunkVersion,
    pub minimum: usize,
    pub reps: Vec<Rep>,
}

impl Entry {
    pub(super) fn rep(&self, slot: u16) -> Option<&Rep> {
        self.reps.iter().find(|rep| rep.slot == slot)
    }

    pub(super) fn current(&self) -> impl Iterator<Item = u16> + '_ {
        self.reps.iter().filter(|rep| rep.current).map(|rep| rep.slot)
    }

    pub(super) fn is_below_minimum(&self) -> bool {
        self.current().count() < self.minimum
    }
}

/// Every current replica of a version has no such chunk. Either nobody ever created it, or it has moved to other
/// servers and was deleted where it was: only the map tells, asked after the servers.
#[derive(Clone, Copy)]
struct Absent {
    version: ChunkVersion,
    /// The last look at the map before the servers had answered.
    after: u64,
    /// A later one found this version in force: the chunk was never created, and what it would hold are zeros, until
    /// it is created from here.
    sure: bool,
}

/// One place of the cache.
#[derive(Default)]
pub(super) struct Chunk {
    /// The entry, or none for a hole, is known.
    pub known: bool,
    pub entry: Option<Entry>,
    /// The entry is to be fetched (again).
    pub fetch: bool,
    fetching: bool,
    /// The entry is being looked up again while it is used as it stands.
    refreshing: bool,
    /// The map is said to have changed: look the entry up at its next use.
    pub hint: bool,
    /// A hole that is to be allocated.
    pub want: bool,
    allocating: bool,
    /// Allocated by us and not created everywhere yet.
    pub create: bool,
    /// Replicas may be below the entry's version.
    pub raise: bool,
    /// A failed copy is being reported.
    pub failing: bool,
    /// A new place is being asked for, because a server has no room.
    pub room_asked: bool,
    calls: u32,
    round: u32,
    /// Current replicas that have no such chunk, says the present round of preparation.
    missing: Vec<u16>,
    /// All current replicas said that they have no such chunk.
    absent: Option<Absent>,
    delayed: bool,
    /// Usable as it stands.
    pub ready: bool,
    pub waiting: Vec<u64>,
    /// Parts in memory.
    pub active: u32,
    /// Unsettled writes.
    pub unsettled: u32,
    /// Acknowledged writes that are being sent again: reads wait for them.
    pub revived: u32,
    used: bool,
}

impl Chunk {
    /// What it waits for, for people.
    pub(super) fn explain(&self) -> String {
        let flags = [
            (self.ready, "ready"),
            (!self.known, "unknown"),
            (self.fetch, "to be fetched"),
            (self.fetching, "being fetched"),
            (self.refreshing, "being refreshed"),
            (self.want, "to be allocated"),
            (self.allocating, "being allocated"),
            (self.create, "to be created"),
            (self.raise, "to be raised"),
            (self.failing, "a copy being reported as failed"),
            (self.calls > 0, "being prepared"),
            (self.delayed, "looked at again soon"),
        ];
        let words: Vec<&str> = flags.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect();
        let entry = self.entry.as_ref().map_or("a hole".to_owned(), |entry| {
            let reps: Vec<String> = entry
                .reps
                .iter()
                .map(|rep| {
                    format!("slot {}{} since {}", rep.slot, if rep.current { "" } else { " rebuilding" }, rep.since)
                })
                .collect();
            format!("{} {} min {} [{}]", entry.chunk, entry.version, entry.minimum, reps.join(", "))
        });
        let (waiting, active, unsettled) = (self.waiting.len(), self.active, self.unsettled);
        let revived = self.revived;
        format!(
            "{entry}: {}; {waiting} parts wait, {active} pins, {unsettled} unsettled, {revived} sent again",
            words.join(", ")
        )
    }
}

impl Volume {
    /// The cache place of an index, made if absent.
    pub(super) fn chunk(&mut self, index: u64) -> &mut Chunk {
        if !self.chunks.contains_key(&index) {
            if self.chunk_order.len() >= MAP_CACHE_MAX {
                self.evict();
            }
            let chunk = Chunk { known: self.virgin, ..Chunk::default() };
            self.chunks.insert(index, chunk);
            self.chunk_order.push_back(index);
        }
        let chunk = self.chunks.get_mut(&index).expect("just made");
        chunk.used = true;
        chunk
    }

    /// Second chance, first in first out; what is in use stays.
    fn evict(&mut self) {
        for _ in 0..2 * self.chunk_order.len() {
            let Some(index) = self.chunk_order.pop_front() else { return };
            let Some(chunk) = self.chunks.get_mut(&index) else { continue };
            let busy = chunk.active > 0 || chunk.unsettled > 0 || chunk.fetching || chunk.allocating || chunk.calls > 0;
            if !busy && !chunk.used && chunk.waiting.is_empty() {
                self.chunks.remove(&index);
                self.virgin = false;
                return;
            }
            chunk.used = false;
            self.chunk_order.push_back(index);
        }
    }

    /// The chunks `first..end` do not exist any more. `holes`: they are known to be holes now.
    pub(super) fn forget_chunks(&mut self, ctx: &mut Ctx<'_>, first: u64, end: u64, holes: bool) {
        self.forget_writes(ctx, first, end);
        let mut order = std::mem::take(&mut self.chunk_order);
        for index in order.iter().filter(|index| (first..end).contains(*index)) {
            let chunk = self.chunks.get_mut(index).expect("the order names what is cached");
            chunk.entry = None;
            chunk.ready = false;
            chunk.known = holes || self.virgin;
            chunk.fetch = false;
            // Preparations under way were for a chunk that is gone: their answers mean nothing, and nobody else would
            // ever count them down.
            chunk.want = false;
            chunk.create = false;
            chunk.raise = false;
            chunk.calls = 0;
            chunk.round = chunk.round.wrapping_add(1);
            if !chunk.waiting.is_empty() {
                self.forgotten.push(*index);
            }
        }
        order.retain(|index| {
            let chunk = &self.chunks[index];
            let keep =
                chunk.active > 0 || chunk.unsettled > 0 || !chunk.waiting.is_empty() || chunk.known || chunk.calls > 0;
            if !keep && (first..end).contains(index) && !chunk.fetching && !chunk.allocating {
                self.chunks.remove(index);
                return false;
            }
            true
        });
        self.chunk_order = order;
    }

    /// Takes over a map entry if it is news.
    pub(super) fn adopt_entry(&mut self, ctx: &mut Ctx<'_>, entry: ChunkEntry, ours: bool) {
        let mut reps = Vec::with_capacity(entry.replicas.len());
        for replica in entry.replicas.iter().take(super::tracker::SET_MAX) {
            let slot = self.slot_of(ctx, replica.cs);
            // Whatever it failed at before: it is in a set again.
            self.server_mut(slot).excused = false;
            reps.push(Rep { slot, current: replica.role == ReplicaRole::Current, since: replica.since });
        }
        let news = Entry {
            chunk: entry.chunk,
            layer: entry.layer,
            version: entry.version,
            minimum: usize::from(entry.minimum),
            reps,
        };
        let index = entry.index;
        let chunk = self.chunk(index);
        let same_chunk = chunk.entry.as_ref().is_none_or(|old| old.chunk == news.chunk);
        if same_chunk && chunk.entry.as_ref().is_some_and(|old| old.version >= news.version) {
            return;
        }
        let first = chunk.entry.is_none();
        chunk.absent = None;
        chunk.known = true;
        chunk.ready = false;
        chunk.want = false;
        chunk.create |= ours && first;
        // A preparation for the old entry proves nothing for the new one.
        chunk.round = chunk.round.wrapping_add(1);
        chunk.calls = 0;
        chunk.raise |= !first && (chunk.active > 0 || chunk.unsettled > 0);
        let since = news.reps.iter().filter(|rep| rep.current).map(|rep| rep.since.0).max();
        let unsettled = chunk.unsettled > 0 && !first;
        chunk.entry = Some(news);
        if let Some(since) = since.filter(|_| unsettled) {
            let kept = self.tracker.kept_before(index, since);
            self.revive(kept, None);
        }
    }

    /// A part needs the chunk: it starts when the chunk is ready.
    pub(super) fn wait_for_chunk(&mut self, ctx: &mut Ctx<'_>, index: u64, part: u64) {
        self.chunk(index).waiting.push(part);
        self.drive(ctx, index);
    }

    /// Looks at a chunk again after a while.
    pub(super) fn delay_chunk(&mut self, ctx: &mut Ctx<'_>, index: u64, after: Duration) {
        let chunk = self.chunk(index);
        if !chunk.delayed {
            chunk.delayed = true;
            ctx.io.timers.after(ctx.io.now, after, Timer::Chunk(self.key, index));
        }
    }

    /// The while has passed.
    pub(crate) fn on_chunk_timer(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        if self.death().is_some() {
            return;
        }
        if let Some(chunk) = self.chunks.get_mut(&index) {
            chunk.delayed = false;
            self.drive(ctx, index);
            self.pump(ctx);
        }
    }

    /// Takes a chunk one step towards being ready.
    pub(super) fn drive(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let Some(chunk) = self.chunks.get_mut(&index) else { return };
        if chunk.fetching || chunk.allocating || chunk.failing || chunk.calls > 0 || chunk.delayed {
            return;
        }
        if !chunk.known || chunk.fetch {
            chunk.ready = false;
            self.fetch(ctx, index);
            return;
        }
        let Some(entry) = &chunk.entry else {
            if chunk.want {
                chunk.allocating = true;
                self.allocate.push(index);
            } else {
                chunk.ready = true;
                self.run_waiting(ctx, index);
            }
            return;
        };
        let entry = entry.clone();
        let (create, raise) = (chunk.create, chunk.raise);
        let mut blocked = false;
        for rep in &entry.reps {
            if self.server(rep.slot).fence != Fence::Yes {
                blocked = true;
                self.server_mut(rep.slot).chunks.push(index);
                self.ask_fence(ctx, rep.slot);
            }
        }
        if blocked {
            self.chunk(index).ready = false;
            return;
        }
        if create || raise {
            self.prepare(ctx, index, &entry, create);
            return;
        }
        self.chunk(index).ready = true;
        self.retarget(ctx, index);
        self.run_waiting(ctx, index);
        self.on_chunk_ready(ctx, index);
    }

    fn prepare(&mut self, ctx: &mut Ctx<'_>, index: u64, entry: &Entry, create: bool) {
        let (volume, epoch, version, blocks) = (self.id, self.epoch, entry.version, self.chunk_blocks as u32);
        let slots: Vec<Rep> = entry.reps.iter().filter(|rep| create || rep.since < version).copied().collect();
        let chunk = self.chunk(index);
        chunk.ready = false;
        chunk.round = chunk.round.wrapping_add(1);
        chunk.calls = slots.len() as u32;
        chunk.missing.clear();
        if create {
            chunk.absent = None;
        }
        let round = chunk.round;
        if slots.is_empty() {
            chunk.raise = false;
            self.drive(ctx, index);
            return;
        }
        for rep in slots {
            let request = if create {
                CsRequest::Create {
                    chunk: entry.chunk,
                    volume,
                    layer: entry.layer,
                    index,
                    block_count: blocks,
                    version,
                    epoch,
                }
            } else {
                CsRequest::Raise { chunk: entry.chunk, volume, epoch, since: rep.since, version }
            };
            self.cs_call(ctx, rep.slot, &request, CallFor::Prepare { index, round });
        }
    }

    /// A server answered a create or a raise.
    pub(super) fn on_prepared(
        &mut self,
        ctx: &mut Ctx<'_>,
        slot: u16,
        index: u64,
        round: u32,
        result: Result<CsReply, CsError>,
    ) {
        let Some(chunk) = self.chunks.get_mut(&index) else { return };
        if chunk.round != round || chunk.calls == 0 {
            return;
        }
        let Some(entry) = &chunk.entry else { return };
        let (version, rep) = (entry.version, entry.rep(slot).copied());
        let create = chunk.create;
        match result {
            Ok(_) => self.count_prepared(ctx, index),
            // A copy being rebuilt may not have begun: its writes are tried and judged on their own.
            Err(CsError::VersionMismatch { current, .. })
                if current <= version && rep.is_some_and(|rep| !rep.current) =>
            {
                self.count_prepared(ctx, index)
            }
            Err(CsError::NoSuchChunk(_)) if rep.is_some_and(|rep| !rep.current) => self.count_prepared(ctx, index),
            Err(CsError::NoSuchChunk(_)) if !create => {
                chunk.missing.push(slot);
                self.count_prepared(ctx, index);
            }
            Err(CsError::StaleEpoch { .. }) => {
                self.taken_over(ctx);
            }
            Err(error) => {
                // Whatever went wrong, this round is over; the next begins with a fresh look.
                chunk.calls = 0;
                chunk.round = chunk.round.wrapping_add(1);
                match error {
                    CsError::NotFenced(_) => {
                        self.server_mut(slot).fence = Fence::No;
                        self.drive(ctx, index);
                    }
                    CsError::VersionMismatch { current, .. } if current > version => {
                        chunk.fetch = true;
                        self.drive(ctx, index);
                    }
                    CsError::VersionMismatch { .. } | CsError::NoSuchChunk(_) => self.fail_copy(ctx, slot, index),
                    CsError::NoSpace => {
                        self.delay_chunk(ctx, index, LATER);
                        self.ask_for_room(ctx, slot, index);
                    }
                    CsError::DiskFailed(_) => {
                        self.fail_server(ctx, slot);
                        self.delay_chunk(ctx, index, LATER);
                    }
                    error => {
                        let cs = self.server(slot).cs;
                        ctx.log(format!("{cs} refused to prepare chunk {index} of {}: {error}", self.id));
                        self.delay_chunk(ctx, index, LATER);
                    }
                }
            }
        }
    }

    /// One server fewer to wait for. Where all answered and some current ones have no such chunk: if none has it, it
    /// was allocated and never created, so it is created now; otherwise those without it have lost it.
    fn count_prepared(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let chunk = self.chunk(index);
        chunk.calls -= 1;
        if chunk.calls > 0 {
            return;
        }
        let missing = std::mem::take(&mut chunk.missing);
        let entry = chunk.entry.as_ref().expect("what is prepared has an entry");
        match missing.first() {
            None => {
                // A raise may follow a create that began in an earlier version.
                chunk.raise &= chunk.create;
                chunk.create = false;
            }
            Some(_) if entry.current().all(|slot| missing.contains(&slot)) => {
                let never = self.was_never_created(index);
                self.chunk(index).create |= never;
            }
            Some(slot) => return self.fail_copy(ctx, *slot, index),
        }
        self.drive(ctx, index);
    }

    /// Every current replica has no such chunk: true when it is known that it was never created. Otherwise the map is
    /// looked at again, and the servers are asked again after that.
    pub(super) fn was_never_created(&mut self, index: u64) -> bool {
        let after = self.fetches;
        let chunk = self.chunk(index);
        let Some(version) = chunk.entry.as_ref().map(|entry| entry.version) else { return false };
        match chunk.absent.filter(|absent| absent.version == version) {
            Some(absent) if absent.sure => return true,
            Some(_) => {}
            None => chunk.absent = Some(Absent { version, after, sure: false }),
        }
        if planted!("absence_not_confirmed") {
            return true;
        }
        chunk.fetch = true;
        chunk.ready = false;
        false
    }

    /// Preparations under way may have lost an answer: they begin anew. Answers the chunks concerned.
    pub(super) fn restart_preparations(&mut self) -> Vec<u64> {
        let mut touched = Vec::new();
        for (index, chunk) in self.chunks.iter_mut().filter(|(_, chunk)| chunk.calls > 0) {
            chunk.calls = 0;
            chunk.round = chunk.round.wrapping_add(1);
            touched.push(*index);
        }
        touched.sort_unstable();
        touched
    }

    /// Looks the entry up again without waiting for the answer: what is known stays in use, and goes on to be used when
    /// no metadata server can be reached.
    pub(super) fn refresh(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let Some(chunk) = self.chunks.get_mut(&index) else { return };
        chunk.hint = false;
        if chunk.refreshing || chunk.fetching || !chunk.known {
            return;
        }
        chunk.refreshing = true;
        let request = MdsRequest::ChunkMap { volume: self.id, index, limit: MAP_RUN as u32 };
        self.fetches += 1;
        ctx.call(request, self.waiter(VolumeCall::Fetch { index, nth: self.fetches }));
    }

    /// The map changed somewhere: chunks in use are looked up now, the others when they are used.
    pub(crate) fn on_map_changed(&mut self, ctx: &mut Ctx<'_>) {
        let mut busy: Vec<u64> = Vec::new();
        for (index, chunk) in self.chunks.iter_mut().filter(|(_, chunk)| chunk.entry.is_some()) {
            chunk.hint = true;
            if chunk.active > 0 {
                busy.push(*index);
            }
        }
        busy.sort_unstable();
        busy.into_iter().for_each(|index| self.refresh(ctx, index));
    }

    fn fetch(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        self.chunk(index).fetching = true;
        let request = MdsRequest::ChunkMap { volume: self.id, index, limit: MAP_RUN as u32 };
        self.fetches += 1;
        ctx.call(request, self.waiter(VolumeCall::Fetch { index, nth: self.fetches }));
    }

    pub(super) fn on_fetched(&mut self, ctx: &mut Ctx<'_>, index: u64, nth: u64, result: Result<MdsReply, MdsError>) {
        let Some(chunk) = self.chunks.get_mut(&index) else { return };
        if std::mem::take(&mut chunk.refreshing) && !chunk.fetching {
            if let Ok(MdsReply::Chunks(entries)) = result {
                self.on_refreshed(ctx, entries);
            }
            return;
        }
        chunk.fetching = false;
        let before = chunk.entry.as_ref().map(|entry| entry.version);
        let again = chunk.known && chunk.fetch;
        let entries = match result {
            Ok(MdsReply::Chunks(entries)) => entries,
            other => {
                ctx.log(format!("the map of {} could not be read: {other:?}", self.id));
                self.delay_chunk(ctx, index, LATER);
                return;
            }
        };
        chunk.fetch = false;
        chunk.known = true;
        let mut found = false;
        let mut others = Vec::new();
        for entry in entries {
            found |= entry.index == index;
            if entry.index != index {
                others.push(entry.index);
            }
            // What lies past the index asked for is taken as it comes; an index nobody knew cannot have writes under
            // way.
            self.adopt_entry(ctx, entry, false);
        }
        let chunk = self.chunk(index);
        if !found && chunk.entry.is_some() {
            // Dropped behind our back: a truncation we have not been told of yet.
            chunk.entry = None;
            chunk.ready = false;
            self.forget_writes(ctx, index, index + 1);
        }
        let version = self.chunk(index).entry.as_ref().map(|entry| entry.version);
        let unchanged = again && found && version == before;
        let chunk = self.chunk(index);
        let absent =
            chunk.absent.as_mut().filter(|absent| found && Some(absent.version) == version && nth > absent.after);
        let answered = absent.map(|absent| absent.sure = true).is_some();
        let urgent = chunk.raise || !unchanged || answered;
        if urgent {
            self.drive(ctx, index);
        } else {
            self.delay_chunk(ctx, index, SOON);
        }
        for other in others {
            if self.chunks.get(&other).is_some_and(|chunk| chunk.active > 0 || chunk.unsettled > 0) {
                self.drive(ctx, other);
            }
        }
    }

    fn on_refreshed(&mut self, ctx: &mut Ctx<'_>, entries: Vec<ChunkEntry>) {
        for entry in entries {
            let index = entry.index;
            let Some(chunk) = self.chunks.get_mut(&index) else { continue };
            chunk.hint = false;
            if chunk.entry.as_ref().is_some_and(|known| known.version < entry.version) {
                self.adopt_entry(ctx, entry, false);
                let chunk = self.chunk(index);
                if chunk.active > 0 || chunk.unsettled > 0 {
                    // Reads that wait for a server that left are asked again where the copies are now.
                    self.restart_reads(ctx, index);
                    self.drive(ctx, index);
                }
            }
        }
    }

    /// Sends the allocations asked for, one call at a time: what comes meanwhile goes together in the next.
    pub(super) fn send_allocations(&mut self, ctx: &mut Ctx<'_>) {
        if self.allocating || self.allocate.is_empty() || self.state != State::Open {
            return;
        }
        self.allocating = true;
        let count = self.allocate.len().min(ALLOCATE_MAX);
        let indexes: Vec<u64> = self.allocate.drain(..count).collect();
        let request = MdsRequest::ChunkAllocate { volume: self.id, epoch: self.epoch, indexes: indexes.clone() };
        ctx.call(request, self.waiter(VolumeCall::Allocate { indexes }));
    }

    pub(super) fn on_allocated(&mut self, ctx: &mut Ctx<'_>, indexes: Vec<u64>, result: Result<MdsReply, MdsError>) {
        self.allocating = false;
        for index in &indexes {
            self.chunk(*index).allocating = false;
        }
        match result {
            Ok(MdsReply::Chunks(entries)) => {
                entries.into_iter().for_each(|entry| self.adopt_entry(ctx, entry, true));
                indexes.into_iter().for_each(|index| self.drive(ctx, index));
            }
            Err(MdsError::NoSpace(why)) => {
                ctx.log(format!("no chunk for {}: {why}", self.id));
                let fail = ctx.config.on_no_space == OnNoSpace::Fail;
                for index in indexes {
                    if fail {
                        self.chunk(index).want = false;
                        self.fail_waiting_writes(ctx, index, &BlockError::NoSpace);
                        self.drive(ctx, index);
                    } else {
                        self.end_waiting_trims(ctx, index);
                        self.delay_chunk(ctx, index, LATER);
                    }
                }
            }
            other => {
                let why = match other {
                    Err(error) => error.to_string(),
                    Ok(other) => format!("unexpected answer {other:?}"),
                };
                for index in indexes {
                    self.chunk(index).want = false;
                    self.fail_waiting_writes(ctx, index, &BlockError::Other(format!("allocate a chunk: {why}")));
                    self.drive(ctx, index);
                }
            }
        }
    }

    /// Allocates and creates the next chunk of a sequential writer before it gets there.
    pub(super) fn allocate_ahead(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let next = index + 1;
        let inside = self.rule == SizeRule::File
            || next.saturating_mul(self.chunk_blocks).saturating_mul(BLOCK_SIZE_U64) < self.size;
        if !inside || self.mode != LeaseMode::Exclusive {
            return;
        }
        let chunk = self.chunk(next);
        if chunk.known && chunk.entry.is_none() && !chunk.want {
            chunk.want = true;
            chunk.ready = false;
            self.drive(ctx, next);
        } else if !chunk.known {
            self.drive(ctx, next);
        }
    }

    /// Starts what waited for the chunk. Who cannot start queues again by itself.
    fn run_waiting(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        for part in std::mem::take(&mut self.chunk(index).waiting) {
            self.start_part(ctx, part);
        }
    }

    /// Trims do not wait for room: where there is no chunk they find nothing to do.
    fn end_waiting_trims(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let is_trim = |volume: &Self, part| {
            volume.parts.get(part).is_some_and(|p| matches!(&p.body, Body::Write(w) if w.sequence == 0 && w.unmap))
        };
        for part in std::mem::take(&mut self.chunk(index).waiting) {
            match is_trim(self, part) {
                true => self.finish_part(ctx, part, Ok(None)),
                false => self.chunk(index).waiting.push(part),
            }
        }
    }

    /// Ends the writes that wait for a chunk there will not be. Trims go on: where there is no chunk they find nothing
    /// to do.
    pub(super) fn fail_waiting_writes(&mut self, ctx: &mut Ctx<'_>, index: u64, error: &BlockError) {
        let waiting = std::mem::take(&mut self.chunk(index).waiting);
        for part in waiting {
            let fresh =
                self.parts.get(part).is_some_and(|p| matches!(&p.body, Body::Write(w) if w.sequence == 0 && !w.unmap));
            if fresh {
                self.finish_part(ctx, part, Err(error.clone()));
            } else {
                self.chunk(index).waiting.push(part);
            }
        }
    }
}
