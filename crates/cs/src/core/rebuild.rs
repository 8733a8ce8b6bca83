//! Making or freshening a copy from other servers, while clients go on writing to it (rule 12).
//!
//! A copy under rebuild has two sets of blocks: *fresh* ones, which a client wrote or which were copied since this
//! server joined the replica set, and the rest, which may be stale. The source lists what changed since the copy was
//! whole (its base); every listed block that is not fresh is read from the source and stored. From the moment the copy
//! accepts writes of the new version, every new write reaches it directly, so what is copied once stays right. Fresh
//! blocks are remembered in memory; after a restart the unsettled tail tells them, because what was settled is on the
//! source too.
//!
//! The tag says that a copy is being rebuilt, durably and before its version changes, so a crash never makes it
//! current.

use super::control::{Audience, Control};
use super::data::weight;
use super::peers::Tail;
use super::volume::Waiting;
use super::{CsCore, Pending};
use crate::tag::{ChunkTag, CopyState};
use cairn_env::Buf;
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_store::{StoreError, StoreReply, StoreRequest};
use cairn_types::{BLOCK_SIZE, ChunkId, ChunkVersion, CsId, Duration, Epoch, Instant, Sequence, VolumeId};
use cairn_wire::cs::{BlockRange, CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_REPAIR, FLAG_ZERO};
use cairn_wire::mds::{ChunkEntry, OrderDone, OrderKind};
use cairn_wire::{Effects, Now};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

/// Rebuilds that run at a time. Most of the time of a small one is waiting: for the metadata servers, for a flush.
pub const REBUILDS_MAX: usize = 32;
/// Rebuilds that wait for their turn; the metadata servers repeat what does not fit.
pub const REBUILDS_WAITING_MAX: usize = 1024;
/// Reads under way for one rebuild.
const READS_MAX: u32 = 4;
/// Damaged blocks of one source that are left for the next; beyond it the source is left as a whole.
const LEFT_MAX: u32 = 256;
/// Blocks of one read: 512 KiB.
const READ_BLOCKS: u32 = 128;
/// Blocks of all rebuilds on their way, to be read or to be written: 16 MiB; and while clients are at work here.
/// What a client asks for waits behind no more than this; the more it has to do, the longer a block takes, and the
/// slower rebuilds become by themselves.
pub(super) const WINDOW_IDLE: u32 = 4096;
pub(super) const WINDOW_BUSY: u32 = 256;
/// A source that is not at the version yet is asked again after this time.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// A source that gave nothing for this long is given up.
const SOURCE_PATIENCE: Duration = Duration::from_secs(5);

/// An order to rebuild, with this server's part of the entry looked up.
#[derive(Clone, Debug)]
pub(super) struct RebuildOrder {
    pub entry: ChunkEntry,
    pub volume: VolumeId,
    pub block_count: u32,
    pub sources: Vec<(CsId, SocketAddr)>,
    pub joined: ChunkVersion,
    /// A source is known to have had its copy.
    pub created: bool,
}

/// Copied blocks on their way to the store.
#[derive(Debug)]
pub(super) struct RepairWrite {
    volume: VolumeId,
    chunk: ChunkId,
    attempt: u64,
    first_block: u32,
    block_count: u32,
    tail: Tail,
    /// None: holes.
    data: Option<(Buf, Vec<u64>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The copy is made ready to accept writes.
    Beginning,
    /// Blocks are copied.
    Copying,
    /// The tag that says so and the flush behind it are on their way.
    Ending,
}

struct Job {
    order: RebuildOrder,
    phase: Phase,
    source: usize,
    /// Sources of this round that have no such chunk.
    absent: usize,
    /// Blocks the present source has damaged: the next one is asked for them when all others are here.
    left: u32,
    /// Rises with every change of source, so that late answers of the old one are known.
    attempt: u64,
    /// Where to ask on for changed blocks; none when all are known.
    list_from: Option<u32>,
    listing: bool,
    work: VecDeque<BlockRange>,
    /// Fetched after what changed, which says of the same blocks which write they come from.
    suspects: Vec<(u32, u32)>,
    reads: u32,
    /// Their blocks.
    asked: u32,
    writes: u32,
    /// It would read if there were room in the window.
    starved: bool,
    /// A client write failed after its blocks were taken for fresh: list once more before the end.
    recheck: bool,
    retry_at: Option<Instant>,
    progress: Instant,
    reason: String,
}

/// All rebuilds.
#[derive(Default)]
pub(super) struct Rebuilds {
    jobs: BTreeMap<ChunkId, Job>,
    waiting: VecDeque<RebuildOrder>,
    attempts: u64,
    /// Copied blocks that the store is writing.
    storing: u32,
    /// Something ended: jobs that wait for room in the window may go on.
    moved: bool,
    tidy_at: Option<Instant>,
}

impl Rebuilds {
    pub(super) fn wake_at(&self) -> Option<Instant> {
        if self.jobs.is_empty() {
            return self.tidy_at;
        }
        let jobs = self.jobs.values().flat_map(|job| [job.retry_at, Some(job.progress + SOURCE_PATIENCE)]);
        jobs.flatten().chain(self.tidy_at).min()
    }

    /// See [`Job::recheck`].
    pub(super) fn recheck(&mut self, chunk: ChunkId) {
        if let Some(job) = self.jobs.get_mut(&chunk) {
            job.recheck = true;
        }
    }

    /// Blocks on their way.
    fn under_way(&self) -> u32 {
        self.storing + self.jobs.values().map(|job| job.asked).sum::<u32>()
    }

    fn job(&mut self, chunk: ChunkId, attempt: u64) -> Option<&mut Job> {
        self.jobs.get_mut(&chunk).filter(|job| job.attempt == attempt)
    }
}

/// An empty set of blocks.
pub(super) fn no_blocks(block_count: u32) -> Vec<u64> {
    vec![0; block_count.div_ceil(64) as usize]
}

pub(super) fn set_blocks(set: &mut [u64], first: u32, count: u32) {
    (first..first + count).for_each(|block| set[block as usize / 64] |= 1 << (block % 64));
}

pub(super) fn clear_blocks(set: &mut [u64], first: u32, count: u32) {
    (first..first + count).for_each(|block| set[block as usize / 64] &= !(1 << (block % 64)));
}

fn has_block(set: &[u64], block: u32) -> bool {
    set[block as usize / 64] & (1 << (block % 64)) != 0
}

/// True when a block is one of these.
fn has_block_in(block: u64, first: u32, count: u32) -> bool {
    (u64::from(first)..u64::from(first) + u64::from(count)).contains(&block)
}

/// The first run of at most `count_max` blocks of `first..end` outside the set.
fn run_outside(set: &[u64], first: u32, end: u32, count_max: u32) -> Option<(u32, u32)> {
    let start = (first..end).find(|block| !has_block(set, *block))?;
    let stop = (start..end.min(start + count_max)).find(|block| has_block(set, *block));
    Some((start, stop.unwrap_or(end.min(start + count_max)) - start))
}

impl CsCore {
    /// Takes an order; a repeated one changes nothing.
    pub(super) fn order_rebuild(&mut self, now: Now, order: RebuildOrder, out: &mut Effects) {
        let chunk = order.entry.chunk;
        if let Some(job) = self.rebuilds.jobs.get_mut(&chunk) {
            if order.joined == job.order.joined && order.entry.version >= job.order.entry.version {
                let raise = order.entry.version > job.order.entry.version && job.phase != Phase::Beginning;
                let (version, since) = (order.entry.version, order.joined);
                let id = order.volume;
                if order.sources.iter().map(|s| s.1).ne(job.order.sources.iter().map(|s| s.1)) {
                    job.source = 0;
                    job.absent = 0;
                }
                job.order = order;
                if raise {
                    let raise = Control::Raise { chunk, since, version, audience: Audience::None };
                    self.control(now, id, raise, out);
                }
                return;
            }
            if order.joined <= job.order.joined || job.phase == Phase::Beginning {
                return;
            }
            // The server was taken out and joined anew: what it took before counts for nothing.
            self.drop_rebuild(chunk);
        }
        if let Some(waiting) = self.rebuilds.waiting.iter_mut().find(|waiting| waiting.entry.chunk == chunk) {
            if (order.joined, order.entry.version) >= (waiting.joined, waiting.entry.version) {
                *waiting = order;
            }
        } else if self.rebuilds.waiting.len() < REBUILDS_WAITING_MAX {
            self.rebuilds.waiting.push_back(order);
        }
        self.start_rebuilds(now, out);
    }

    fn start_rebuilds(&mut self, now: Now, out: &mut Effects) {
        while self.rebuilds.jobs.len() < REBUILDS_MAX && self.failed.is_none() {
            let Some(order) = self.rebuilds.waiting.pop_front() else { return };
            self.rebuilds.attempts += 1;
            let (chunk, volume) = (order.entry.chunk, order.volume);
            let job = Job {
                order: order.clone(),
                phase: Phase::Beginning,
                source: 0,
                absent: 0,
                left: 0,
                attempt: self.rebuilds.attempts,
                list_from: Some(0),
                listing: false,
                work: VecDeque::new(),
                suspects: Vec::new(),
                reads: 0,
                asked: 0,
                writes: 0,
                starved: false,
                recheck: false,
                retry_at: None,
                progress: now.mono,
                reason: "no source answered".to_owned(),
            };
            self.rebuilds.jobs.insert(chunk, job);
            self.control(now, volume, Control::Rebuild(Box::new(order)), out);
        }
    }

    /// Ends a rebuild without a word: it is not needed or not possible any more.
    pub(super) fn drop_rebuild(&mut self, chunk: ChunkId) {
        self.rebuilds.moved = true;
        self.rebuilds.jobs.remove(&chunk);
    }

    /// Ends a rebuild and tells why; the metadata servers order it again if they still want it.
    pub(super) fn rebuild_failed(&mut self, chunk: ChunkId, error: String, out: &mut Effects) {
        let Some(job) = self.rebuilds.jobs.remove(&chunk) else { return };
        self.rebuilds.moved = true;
        out.log.push(format!("rebuilding {chunk} failed: {error}"));
        let version = job.order.entry.version;
        self.mds.order_done(OrderDone { chunk, version, kind: OrderKind::Rebuild, error: Some(error) });
    }

    pub(super) fn fail_rebuilds(&mut self) {
        self.rebuilds.jobs.clear();
        self.rebuilds.waiting.clear();
    }

    /// The copy accepts writes of the new version: copying may begin.
    pub(super) fn rebuild_begun(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { return };
        job.phase = Phase::Copying;
        job.progress = now.mono;
        self.relist(chunk);
        self.advance(now, chunk, out);
    }

    /// Begins at the first block, from the present source.
    fn relist(&mut self, chunk: ChunkId) {
        let (Some(job), Some(copy)) = (self.rebuilds.jobs.get_mut(&chunk), self.copies.get(&chunk)) else { return };
        job.work.clear();
        job.suspects = copy.suspects.clone();
        job.list_from = Some(0);
        job.listing = false;
    }

    pub(super) fn rebuild_turn(&mut self, now: Now, out: &mut Effects) {
        if self.rebuilds.tidy_at.is_some_and(|at| now.mono >= at) {
            self.rebuilds.tidy_at = None;
            self.tidy_peers(now, out);
        }
        // Rebuilds end in many places; whatever waits has its turn here at the latest.
        self.start_rebuilds(now, out);
        if self.rebuilds.jobs.is_empty() {
            return;
        }
        self.rebuilds.tidy_at.get_or_insert(now.mono + Duration::from_secs(60));
        let due = self.rebuilds.wake_at().is_some_and(|at| now.mono >= at);
        if !std::mem::take(&mut self.rebuilds.moved) && !due {
            return;
        }
        let ids: Vec<ChunkId> = self.rebuilds.jobs.keys().copied().collect();
        for chunk in ids {
            let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { continue };
            if job.phase != Phase::Copying {
                job.progress = now.mono;
                continue;
            }
            if job.writes > 0 || job.starved {
                job.progress = now.mono;
            }
            if now.mono >= job.progress + SOURCE_PATIENCE {
                let addr = job.order.sources.get(job.source).map(|source| source.1);
                if let Some(addr) = addr.filter(|_| job.reads > 0 || job.listing) {
                    self.drop_peer(addr, out);
                    self.source_down(now, addr, "it does not answer", out);
                } else {
                    self.next_source(now, chunk, None, out);
                }
                continue;
            }
            if job.retry_at.is_some_and(|at| now.mono >= at) {
                job.retry_at = None;
            }
            self.advance(now, chunk, out);
        }
    }

    /// Asks for as much as may be under way now.
    fn advance(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        let Some(job) = self.rebuilds.jobs.get(&chunk) else { return };
        if job.phase != Phase::Copying || job.retry_at.is_some() {
            return;
        }
        let Some(addr) = job.order.sources.get(job.source).map(|source| source.1) else {
            return self.sources_exhausted(now, chunk, out);
        };
        let Some(version) = self.store.chunk(chunk).map(|info| info.version) else {
            return self.drop_rebuild(chunk);
        };
        let Some(base) = self.copies.get(&chunk).map(|copy| copy.base) else { return self.drop_rebuild(chunk) };
        if self.is_copied(chunk) {
            return self.source_done(now, chunk, out);
        }
        let Some(link) = self.peer_link(now, addr, out) else { return };
        let job = self.rebuilds.jobs.get_mut(&chunk).expect("found above");
        let attempt = job.attempt;
        if let Some(from_block) = job.list_from.filter(|_| !job.listing && job.work.is_empty()) {
            job.listing = true;
            let request = CsRequest::Changed { chunk, version, after: base, from_block };
            self.ask_changed(link, chunk, attempt, &request, out);
        }
        while let Some((first_block, block_count, tail)) = self.next_read(now, chunk) {
            let request = DataRequest {
                op: DataOp::Read,
                flags: FLAG_REPAIR,
                volume: self.rebuilds.jobs[&chunk].order.volume,
                chunk,
                version,
                epoch: Epoch(0),
                sequence: Sequence(0),
                settled: Sequence(0),
                first_block,
                block_count,
                checksums: Vec::new(),
            };
            self.ask_blocks(link, attempt, &request, tail, out);
        }
        // Holes cost no read; they may have been the last of the work.
        if self.is_copied(chunk) {
            self.source_done(now, chunk, out);
        }
    }

    /// Everything the source has was copied: that is all, or the next source is asked for what is damaged there.
    fn source_done(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        match self.rebuilds.jobs.get(&chunk).is_some_and(|job| job.left > 0) {
            true => self.next_source(now, chunk, None, out),
            false => self.end_rebuild(now, chunk, out),
        }
    }

    /// A block of the source is damaged: all around it is still asked for there.
    fn leave_block(&mut self, now: Now, chunk: ChunkId, bad: u32, blocks: (u32, u32, Tail)) {
        let (first, count, tail) = blocks;
        let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { return };
        for (first_block, block_count) in [(bad + 1, first + count - bad - 1), (first, bad - first)] {
            if block_count > 0 {
                job.work.push_front(BlockRange { first_block, block_count, mapped: true, tail });
            }
        }
        job.left += u32::from(!planted!("cs_repair_passes_damaged_over"));
        job.progress = now.mono;
        let name = job.order.sources.get(job.source).map(|source| source.0);
        job.reason = format!("{}: block {bad} is damaged there", name.unwrap_or_default());
    }

    /// No source could give what was asked. If that is because none of them has the chunk, and neither had this server,
    /// it was allocated and no write to it was ever acknowledged: then the first source creates it, empty and at the
    /// present version, and from there on it is a source like any other. Taking the absence itself for emptiness
    /// would not do: a holder with an older map could still create the chunk there and write to it without this
    /// copy.
    fn sources_exhausted(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        let version = self.store.chunk(chunk).map(|info| info.version);
        let is_new = self.copies.get(&chunk).is_some_and(|copy| copy.base.is_none());
        let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { return };
        let nowhere = job.absent > 0 && job.absent == job.order.sources.len();
        let (true, Some(version)) = (nowhere && is_new && !job.order.created, version) else {
            let reason = job.reason.clone();
            return self.rebuild_failed(chunk, reason, out);
        };
        (job.source, job.absent, job.listing) = (0, 0, true);
        let (attempt, addr, order) = (job.attempt, job.order.sources[0].1, job.order.clone());
        let Some(link) = self.peer_link(now, addr, out) else {
            // The round begins anew when the link is up.
            self.rebuilds.jobs.get_mut(&chunk).expect("found above").listing = false;
            return;
        };
        out.log.push(format!("{chunk} was never created: it is created on {}", order.sources[0].0));
        let request = CsRequest::Create {
            chunk,
            volume: order.volume,
            layer: order.entry.layer,
            index: order.entry.index,
            block_count: order.block_count,
            version,
            epoch: Epoch(0),
        };
        self.ask_changed(link, chunk, attempt, &request, out);
    }

    fn is_copied(&mut self, chunk: ChunkId) -> bool {
        let Some(job) = self.rebuilds.jobs.get(&chunk) else { return false };
        if job.list_from.is_some() || job.listing || !job.work.is_empty() {
            return false;
        }
        if planted!("cs_rebuilt_before_last_block") {
            return true;
        }
        if job.reads > 0 || job.writes > 0 {
            return false;
        }
        if job.recheck {
            self.rebuilds.recheck_again(chunk);
            self.relist(chunk);
            return false;
        }
        true
    }

    /// The next blocks to read, if another read may begin now. Holes on the way are unmapped.
    fn next_read(&mut self, now: Now, chunk: ChunkId) -> Option<(u32, u32, Tail)> {
        loop {
            let under_way = self.rebuilds.under_way();
            let full = under_way > 0 && under_way >= self.repair_window(now);
            let job = self.rebuilds.jobs.get_mut(&chunk)?;
            if job.phase != Phase::Copying || job.reads >= READS_MAX || job.writes >= 2 * READS_MAX {
                return None;
            }
            let range = *job.work.front()?;
            let fresh = &self.copies.get(&chunk)?.fresh;
            let block_limit = (fresh.len() * 64) as u32;
            let end = range.first_block.saturating_add(range.block_count).min(block_limit);
            let count_max = if range.mapped { READ_BLOCKS } else { u32::MAX / 2 };
            let Some((first, count)) = run_outside(fresh, range.first_block, end, count_max) else {
                job.work.pop_front();
                continue;
            };
            job.starved = range.mapped && full;
            if job.starved {
                return None;
            }
            let done = first + count - range.first_block;
            let front = job.work.front_mut().expect("looked at above");
            front.first_block += done;
            front.block_count = front.block_count.saturating_sub(done);
            if front.block_count == 0 {
                job.work.pop_front();
            }
            if !range.mapped {
                let (volume, attempt) = (job.order.volume, job.attempt);
                job.writes += 1;
                let tail = range.tail;
                let hole =
                    RepairWrite { volume, chunk, attempt, first_block: first, block_count: count, tail, data: None };
                self.repair(now, hole);
                continue;
            }
            job.reads += 1;
            job.asked += weight(count);
            return Some((first, count, range.tail));
        }
    }

    pub(super) fn on_changed(
        &mut self,
        now: Now,
        chunk: ChunkId,
        attempt: u64,
        reply: Result<CsReply, CsError>,
        out: &mut Effects,
    ) {
        let Some(job) = self.rebuilds.job(chunk, attempt) else { return };
        job.listing = false;
        match reply {
            Ok(CsReply::Ranges { ranges, next }) => {
                job.progress = now.mono;
                let sane = next.is_none_or(|next| Some(next) > job.list_from)
                    && ranges.iter().all(|range| range.first_block.checked_add(range.block_count).is_some());
                if !sane {
                    return self.next_source(now, chunk, Some("its list of changed blocks makes no sense".into()), out);
                }
                job.list_from = next;
                job.work.extend(ranges.into_iter().filter(|range| range.block_count > 0));
                if next.is_none() {
                    let suspect =
                        |(first_block, block_count)| BlockRange { first_block, block_count, mapped: true, tail: None };
                    job.work.extend(std::mem::take(&mut job.suspects).into_iter().map(suspect));
                }
                self.advance(now, chunk, out);
            }
            // The chunk was created there.
            Ok(CsReply::Done) => {
                job.progress = now.mono;
                self.advance(now, chunk, out);
            }
            Ok(other) => self.next_source(now, chunk, Some(format!("it answered {other:?}")), out),
            Err(CsError::NoSuchChunk(_)) => {
                job.absent += 1;
                self.next_source(now, chunk, Some("it has no such chunk".to_owned()), out);
            }
            Err(CsError::VersionMismatch { .. }) => self.retry_source(now, chunk, "it is at another version"),
            Err(error) => self.next_source(now, chunk, Some(error.to_string()), out),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an answer with everything that identifies it")]
    pub(super) fn on_blocks(
        &mut self,
        now: Now,
        chunk: ChunkId,
        attempt: u64,
        blocks: (u32, u32, Tail),
        reply: DataReply,
        payload: Buf,
        out: &mut Effects,
    ) {
        self.rebuilds.moved = true;
        let Some(job) = self.rebuilds.job(chunk, attempt) else { return };
        job.reads -= 1;
        job.asked -= weight(blocks.1);
        if job.phase != Phase::Copying {
            return;
        }
        let (first_block, block_count, tail) = blocks;
        let again = BlockRange { first_block, block_count, mapped: true, tail };
        let problem = match reply.status {
            DataStatus::Ok if reply.block_count != block_count => Some("it answered with other blocks".to_owned()),
            DataStatus::Ok => {
                let sums = payload.chunks_exact(BLOCK_SIZE).zip(&reply.checksums);
                let good = sums.into_iter().all(|(block, checksum)| crc64(block) == *checksum);
                (!good).then(|| format!("blocks {first_block}+{block_count} arrived damaged"))
            }
            DataStatus::VersionMismatch => {
                job.work.push_front(again);
                return self.retry_source(now, chunk, "it is at another version");
            }
            DataStatus::Corrupt if has_block_in(reply.detail, first_block, block_count) && job.left < LEFT_MAX => {
                self.leave_block(now, chunk, reply.detail as u32, blocks);
                return self.advance(now, chunk, out);
            }
            status => Some(format!("it answered {status:?} for blocks {first_block}+{block_count}")),
        };
        if problem.is_some() {
            return self.next_source(now, chunk, problem, out);
        }
        job.progress = now.mono;
        let (volume, mut at) = (job.order.volume, 0usize);
        let holes = reply.flags & FLAG_ZERO != 0;
        let is_hole = |index: usize| {
            holes
                || (reply.checksums[index] == zero_checksum() && is_zero(&payload[index * BLOCK_SIZE..][..BLOCK_SIZE]))
        };
        // Runs of equal kind become one write each.
        while at < block_count as usize {
            let hole = is_hole(at);
            let len = (at..block_count as usize).take_while(|index| is_hole(*index) == hole).count();
            let data = (!hole)
                .then(|| (payload.slice(at * BLOCK_SIZE, len * BLOCK_SIZE), reply.checksums[at..at + len].to_vec()));
            let first_block = first_block + at as u32;
            if let Some(job) = self.rebuilds.job(chunk, attempt) {
                job.writes += 1;
            }
            let block_count = len as u32;
            self.repair(now, RepairWrite { volume, chunk, attempt, first_block, block_count, tail, data });
            at += len;
        }
        self.advance(now, chunk, out);
    }

    /// Stores copied blocks, behind control operations if there are any.
    fn repair(&mut self, now: Now, repair: RepairWrite) {
        let Some(volume) = self.volumes.get_mut(&repair.volume) else { return };
        if volume.is_held() {
            volume.waiting.push_back(Waiting::Repair(repair));
        } else {
            self.submit_repair(now, repair);
        }
    }

    /// Gives the blocks that are not fresh by now to the store, under the version the copy has by now.
    pub(super) fn submit_repair(&mut self, now: Now, repair: RepairWrite) {
        let RepairWrite { volume: id, chunk, attempt, first_block, block_count, tail, data } = repair;
        let live = self.rebuilds.job(chunk, attempt).is_some() && self.failed.is_none();
        let (true, Some(version)) = (live, self.store.chunk(chunk).map(|info| info.version)) else {
            return self.repair_settled(now, chunk, attempt);
        };
        let (mut at, end) = (first_block, first_block + block_count);
        let mut parts = 0;
        while let Some((first, count)) =
            self.copies.get(&chunk).and_then(|c| run_outside(&c.fresh, at, end, u32::MAX / 2))
        {
            at = first + count;
            // Later client writes reach the store later, so from here on the block is as good as copied.
            set_blocks(&mut self.copies.get_mut(&chunk).expect("found above").fresh, first, count);
            let volume = self.volumes.get_mut(&id).expect("a volume under rebuild is kept");
            volume.writes += 1;
            // What is unsettled at the source is so here, unless it was settled meanwhile or another holder came: then,
            // and for all the rest, sequence zero, which is no write of a holder and never part of the
            // unsettled tail.
            let settled = (volume.fenced, volume.settled);
            let (epoch, sequence) = tail.filter(|tail| *tail > settled).unwrap_or((volume.fenced, Sequence(0)));
            if epoch == volume.fenced {
                // Its holder may send it again, or an earlier write of these blocks. One of an epoch not fenced here
                // yet is looked up in the tail when it is.
                volume.marks.copied(sequence);
            }
            let request = match &data {
                None => StoreRequest::Unmap {
                    chunk,
                    version,
                    epoch,
                    sequence,
                    first_block: first,
                    block_count: count,
                    durable: false,
                },
                Some((bytes, checksums)) => {
                    let (skip, len) = ((first - first_block) as usize, count as usize);
                    let checksums = checksums[skip..skip + len].to_vec();
                    let data = bytes.slice(skip * BLOCK_SIZE, len * BLOCK_SIZE);
                    let data = if data.is_aligned() { data } else { Buf::copy_from(&data) };
                    StoreRequest::Write {
                        chunk,
                        version,
                        epoch,
                        sequence,
                        first_block: first,
                        checksums,
                        data,
                        durable: false,
                    }
                }
            };
            parts += 1;
            self.rebuilds.storing += weight(count);
            let blocks = (first, count);
            self.submit(
                now,
                Pending::Repair { volume: id, chunk, attempt, first_block: blocks.0, block_count: blocks.1 },
                request,
            );
        }
        // The job counts one write for the whole piece; now it counts the parts.
        if let Some(job) = self.rebuilds.job(chunk, attempt) {
            job.writes += parts;
        }
        self.repair_settled(now, chunk, attempt);
    }

    fn repair_settled(&mut self, now: Now, chunk: ChunkId, attempt: u64) {
        self.rebuilds.moved = true;
        if let Some(job) = self.rebuilds.job(chunk, attempt) {
            job.writes -= 1;
            job.progress = now.mono;
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an answer with everything that identifies it")]
    pub(super) fn on_repaired(
        &mut self,
        now: Now,
        id: VolumeId,
        chunk: ChunkId,
        attempt: u64,
        blocks: (u32, u32),
        result: Result<StoreReply, StoreError>,
        out: &mut Effects,
    ) {
        self.rebuilds.storing -= weight(blocks.1);
        self.rebuilds.moved = true;
        let volume = self.volumes.get_mut(&id).expect("a volume with writes is kept");
        volume.writes -= 1;
        let idle = volume.writes == 0 && !volume.waiting.is_empty();
        match result {
            Ok(StoreReply::Written { lsn }) => {
                // The flush that ends the rebuild covers it; the timer covers an abandoned one.
                self.answered_lsn = self.answered_lsn.max(lsn);
                self.undurable_since.get_or_insert(now.mono);
                self.repair_settled(now, chunk, attempt);
                self.advance(now, chunk, out);
            }
            Ok(other) => panic!("the store answers a write with {other:?}"),
            Err(error) => {
                if let Some(copy) = self.copies.get_mut(&chunk) {
                    clear_blocks(&mut copy.fresh, blocks.0, blocks.1);
                }
                self.rebuilds.recheck(chunk);
                if self.rebuilds.job(chunk, attempt).is_some() {
                    self.rebuild_failed(chunk, error.to_string(), out);
                }
            }
        }
        if idle {
            self.drain(now, id, out);
        }
    }

    /// Every block was copied: once the writes before are answered the tag says so, and as the log is durable in its
    /// order, so is everything copied when the store has answered. Then the metadata servers are told.
    fn end_rebuild(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { return };
        job.phase = Phase::Ending;
        let (attempt, volume) = (job.attempt, job.order.volume);
        self.control(now, volume, Control::EndRebuild { chunk, attempt }, out);
    }

    /// The tag of a complete copy; none when a client write failed after its blocks were taken for fresh, so that the
    /// copy has to list once more.
    pub(super) fn rebuilt_tag(&mut self, now: Now, chunk: ChunkId, attempt: u64, out: &mut Effects) -> Option<Vec<u8>> {
        let job = self.rebuilds.job(chunk, attempt)?;
        if std::mem::take(&mut job.recheck) {
            job.phase = Phase::Copying;
            self.relist(chunk);
            self.advance(now, chunk, out);
            return None;
        }
        let state = CopyState::Rebuilt { joined: job.order.joined };
        Some(ChunkTag { state, replicas: job.order.entry.replicas.clone() }.encode())
    }

    pub(super) fn on_rebuilt_tag(
        &mut self,
        now: Now,
        chunk: ChunkId,
        attempt: u64,
        result: Result<(), CsError>,
        out: &mut Effects,
    ) {
        if self.rebuilds.job(chunk, attempt).is_none() {
            return;
        }
        match result {
            Ok(()) => {
                self.copies.remove(&chunk);
                self.rebuild_told(now, chunk, out);
            }
            Err(error) => self.rebuild_failed(chunk, error.to_string(), out),
        }
    }

    fn rebuild_told(&mut self, now: Now, chunk: ChunkId, out: &mut Effects) {
        let Some(job) = self.rebuilds.jobs.remove(&chunk) else { return };
        self.rebuilds.moved = true;
        let version = job.order.entry.version;
        out.log.push(format!("{chunk} is rebuilt at {version}"));
        self.mds.order_done(OrderDone { chunk, version, kind: OrderKind::Rebuild, error: None });
        self.start_rebuilds(now, out);
    }

    pub(super) fn source_up(&mut self, now: Now, addr: SocketAddr, out: &mut Effects) {
        for chunk in self.rebuilds_from(addr) {
            self.advance(now, chunk, out);
        }
    }

    pub(super) fn source_down(&mut self, now: Now, addr: SocketAddr, reason: &str, out: &mut Effects) {
        for chunk in self.rebuilds_from(addr) {
            self.next_source(now, chunk, Some(format!("the link to it ended: {reason}")), out);
        }
    }

    fn rebuilds_from(&self, addr: SocketAddr) -> Vec<ChunkId> {
        let uses = |job: &Job| job.order.sources.get(job.source).is_some_and(|source| source.1 == addr);
        self.rebuilds.jobs.iter().filter(|(_, job)| uses(job)).map(|(chunk, _)| *chunk).collect()
    }

    /// Asks the same source again in a moment; its version or ours is about to change.
    fn retry_source(&mut self, now: Now, chunk: ChunkId, reason: &str) {
        if let Some(job) = self.rebuilds.jobs.get_mut(&chunk) {
            job.retry_at = Some(now.mono + RETRY_AFTER);
            job.reason = format!("source {}: {reason}", job.source);
        }
    }

    /// Goes on with the next source, or gives up when there is none.
    fn next_source(&mut self, now: Now, chunk: ChunkId, reason: Option<String>, out: &mut Effects) {
        self.rebuilds.attempts += 1;
        let attempt = self.rebuilds.attempts;
        let Some(job) = self.rebuilds.jobs.get_mut(&chunk) else { return };
        if job.phase != Phase::Copying {
            return;
        }
        if let Some(reason) = reason {
            let name = job.order.sources.get(job.source).map(|source| source.0);
            job.reason = format!("{}: {reason}", name.unwrap_or_default());
        }
        // Writes of the old attempt still come back; a new attempt must not count them.
        job.attempt = attempt;
        job.source += 1;
        job.left = 0;
        job.reads = 0;
        job.asked = 0;
        job.writes = 0;
        job.retry_at = None;
        job.starved = false;
        job.progress = now.mono;
        self.relist(chunk);
        self.advance(now, chunk, out);
    }
}

impl Rebuilds {
    fn recheck_again(&mut self, chunk: ChunkId) {
        if let Some(job) = self.jobs.get_mut(&chunk) {
            job.recheck = false;
        }
    }
}

fn zero_checksum() -> u64 {
    static ZERO: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *ZERO.get_or_init(|| crc64(&[0; BLOCK_SIZE]))
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_outside_a_set_are_found_and_bounded() {
        let mut set = no_blocks(200);
        set_blocks(&mut set, 10, 5);
        set_blocks(&mut set, 100, 64);
        assert_eq!(run_outside(&set, 0, 200, 128), Some((0, 10)));
        assert_eq!(run_outside(&set, 10, 200, 128), Some((15, 85)));
        assert_eq!(run_outside(&set, 20, 200, 16), Some((20, 16)));
        assert_eq!(run_outside(&set, 100, 164, 16), None);
        clear_blocks(&mut set, 120, 1);
        assert_eq!(run_outside(&set, 100, 164, 16), Some((120, 1)));
    }
}
