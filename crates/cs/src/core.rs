//! The chunk server as a sans-IO process around the chunk store.
//!
//! Where things are: this file holds the state, the step function and the traffic with the store; [`data`] the request
//! path of reads and writes; [`calls`] the rare calls; [`control`] operations that change a chunk's or volume's rules
//! and therefore wait for its writes; [`rebuild`] and [`peers`] the copying of chunks from other servers; [`mds`] the
//! link to the metadata servers; [`scrub`] the background check. The whole is described in
//! `docs/design/chunk-server.md`.

mod busy;
mod calls;
mod control;
mod data;
mod mds;
mod peers;
mod rebuild;
mod scrub;
mod volume;

use crate::lineage::Lineage;
use crate::links::{Caller, Links};
use crate::tag::{ChunkTag, CopyState};
use cairn_env::DiskDone;
use cairn_stdx::{FixedMap, Rng};
use cairn_store::{Notice, OpenError, OpenReport, Store, StoreError, StoreOutput, StoreReply, StoreRequest};
use cairn_types::{ChunkId, ClusterId, CsId, Duration, Instant, Level, VolumeId};
use cairn_wire::mds::{CsStats, Location};
use cairn_wire::{DiskIndex, Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use data::DataCall;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use volume::Volume;

/// Writes answered and not durable are flushed after this time at the latest; with the flush itself it stays within the
/// second that rule 3 of the design allows.
pub const SELF_FLUSH_AFTER: Duration = Duration::from_millis(750);
/// So many answered and undurable writes are flushed at once.
pub const UNDURABLE_MAX: u32 = 8192;
/// Settled marks that only crept forward are told to the store this often.
const SETTLE_EVERY: Duration = Duration::from_millis(100);
/// A settled mark that leapt this far is told at once.
const SETTLE_LEAP: u64 = 1024;
/// Clients have more requests than this in flight: background work steps back.
pub const BUSY_DEPTH: u32 = 16;
/// Volume states kept; beyond it idle ones are dropped and looked up again when needed.
const VOLUMES_MAX: usize = 65_536;
/// How long a volume must be idle before its state may be dropped.
const VOLUME_IDLE: Duration = Duration::from_secs(600);
/// Damaged blocks remembered for the next heartbeats.
const DAMAGED_MAX: usize = 1024;
/// Frames that may wait on one link while the store opens and the metadata servers have not admitted it.
const EARLY_MAX: usize = crate::links::WINDOW_MAX as usize;

/// What a chunk server is told at its start.
#[derive(Clone, Debug)]
pub struct CsConfig {
    /// Its id; none before it first registered.
    pub cs: Option<CsId>,
    /// The release level it runs at.
    pub level: Level,
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Uuid of its store.
    pub store: [u8; 16],
    /// Where clients reach it.
    pub addr: SocketAddr,
    /// Where it stands.
    pub location: Location,
    /// Tier, 0 to 3.
    pub tier: u8,
    /// Capacity in bytes as told to the cluster; zero takes the store's own figure.
    pub capacity: u64,
    /// Repository directory, for listings.
    pub repository: String,
    /// Addresses of metadata servers, as people told them.
    pub mds: Vec<SocketAddr>,
    /// Addresses of all metadata servers, as they told them last ([`CsCore::mds_servers`]): tried before the others.
    pub mds_known: Vec<SocketAddr>,
    /// Make every write durable before its answer.
    pub durable_always: bool,
    /// Chunks the scrub verifies a minute; zero switches it off.
    pub scrub_chunks_per_minute: u32,
}

/// What the store said when it opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartReport {
    /// Drawn for this start; tells clients that the server restarted.
    pub boot: u64,
    /// Copies held.
    pub chunks: u64,
    /// Copies that were being rebuilt.
    pub rebuilding: u64,
    /// Groups of the store's log replayed since its last checkpoint.
    pub groups_replayed: u64,
    /// The log ended in an incomplete group that no flush had covered.
    pub torn_tail: bool,
}

/// Who waits for the store to be durable: a client's flush, or a duplicate of a write that asked for durability.
#[derive(Debug)]
struct FlushWaiter {
    caller: Caller,
    volume: VolumeId,
}

/// What to do when the store answers a token.
#[derive(Debug)]
enum Pending {
    /// Nothing beyond noticing a failed disk.
    Nothing,
    /// A client's write or unmap.
    Write(data::WriteInFlight),
    /// A client's or another server's read.
    Read(data::ReadInFlight),
    /// A flush; these wait for it.
    Flush { waiters: Vec<FlushWaiter>, issued: Instant },
    /// A control operation of a volume.
    Control { volume: VolumeId, done: control::Done },
    /// Blocks copied by a rebuild.
    Repair { volume: VolumeId, chunk: ChunkId, attempt: u64, first_block: u32, block_count: u32 },
    /// A listing of blocks.
    List(calls::Listing),
    /// The checkpoint before a planned stop.
    Stop,
    /// The label of the store: a start begins, or was acknowledged.
    Label { acknowledged: bool },
    /// A step of the scrub.
    Verify { chunk: ChunkId },
}

/// Tokens of requests to the store.
#[derive(Default)]
struct Slab {
    slots: Vec<Option<Pending>>,
    free: Vec<u32>,
}

impl Slab {
    fn insert(&mut self, pending: Pending) -> u64 {
        if let Some(at) = self.free.pop() {
            self.slots[at as usize] = Some(pending);
            return u64::from(at);
        }
        self.slots.push(Some(pending));
        self.slots.len() as u64 - 1
    }

    fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.slots.iter().flatten()
    }

    fn take(&mut self, token: u64) -> Pending {
        let pending = self.slots[token as usize].take().expect("the store answers each token once");
        self.free.push(token as u32);
        pending
    }
}

/// A copy that is being rebuilt; see [`CopyState::Rebuilding`].
#[derive(Debug)]
struct Copy {
    base: Option<cairn_types::ChunkVersion>,
    joined: cairn_types::ChunkVersion,
    suspects: Vec<(u32, u32)>,
    /// One bit a block: a client wrote it, or it was copied, since this server joined the replica set.
    fresh: Vec<u64>,
}

/// The chunk server.
pub struct CsCore {
    config: CsConfig,
    rng: Rng,
    boot: u64,
    store: Store,
    store_out: StoreOutput,
    pending: Slab,
    /// Requests given to the store since it last ended a turn.
    submitted: u64,
    opened: Option<StartReport>,
    /// Where the store stands in its history, as it is durable.
    lineage: Lineage,
    /// The metadata servers know this start as the one that follows the last; nothing is served before.
    admitted: bool,
    /// Why the disk is out of use.
    failed: Option<String>,
    fatal_told: bool,
    stop_ready: bool,
    links: Links,
    early: BTreeMap<LinkId, VecDeque<Frame>>,
    next_link: u64,
    volumes: FixedMap<VolumeId, Volume>,
    copies: BTreeMap<ChunkId, Copy>,
    durable_lsn: u64,
    answered_lsn: u64,
    undurable: u32,
    undurable_since: Option<Instant>,
    flush_running: bool,
    /// Writes answered with a number up to this one were complete when the flush under way began.
    flush_covers: u64,
    /// They came while that flush was under way, and it covers what they ask for.
    flush_joined: Vec<FlushWaiter>,
    /// Somebody is about to ask for a flush.
    flush_expected: bool,
    flush_waiters: Vec<FlushWaiter>,
    settle_dirty: Vec<VolumeId>,
    settle_at: Option<Instant>,
    /// Client requests the store works on or that wait behind a control operation.
    client_depth: u32,
    /// When a client last asked for something.
    client_seen: Option<Instant>,
    /// Reads for the rebuilds of other servers: what the store works on, in blocks, and what waits.
    repairs_out: u32,
    repairs_waiting: VecDeque<DataCall>,
    busy: busy::Busy,
    rebuilds: rebuild::Rebuilds,
    peers: peers::Peers,
    mds: mds::MdsLink,
    scrub: scrub::Scrub,
    counters: CsStats,
    armed: Option<Instant>,
}

impl CsCore {
    /// A chunk server around a store that has not been started yet.
    pub fn new(config: CsConfig, store: Store, mut rng: Rng) -> Self {
        let boot = rng.next_u64() | 1;
        let mds = mds::MdsLink::new(config.cs, config.mds_known.clone());
        Self {
            mds,
            boot,
            store,
            store_out: StoreOutput::default(),
            pending: Slab::default(),
            submitted: 0,
            opened: None,
            lineage: Lineage::default(),
            admitted: false,
            failed: None,
            fatal_told: false,
            stop_ready: false,
            links: Links::default(),
            early: BTreeMap::new(),
            next_link: 1,
            volumes: FixedMap::default(),
            copies: BTreeMap::new(),
            durable_lsn: 0,
            answered_lsn: 0,
            undurable: 0,
            undurable_since: None,
            flush_running: false,
            flush_covers: 0,
            flush_joined: Vec::new(),
            flush_expected: false,
            flush_waiters: Vec::new(),
            settle_dirty: Vec::new(),
            settle_at: None,
            client_depth: 0,
            client_seen: None,
            repairs_out: 0,
            repairs_waiting: VecDeque::new(),
            busy: busy::Busy::default(),
            rebuilds: rebuild::Rebuilds::default(),
            peers: peers::Peers::default(),
            scrub: scrub::Scrub::default(),
            counters: CsStats::default(),
            armed: None,
            config,
            rng,
        }
    }

    /// What the store said when it opened; none before.
    pub fn start_report(&self) -> Option<&StartReport> {
        self.opened.as_ref()
    }

    /// Id given by the metadata servers; the shell writes it down when it changes.
    pub fn id(&self) -> Option<CsId> {
        self.mds.cs()
    }

    /// Addresses of all metadata servers, as they told them last; the shell writes them down when they change, for the
    /// next start.
    pub fn mds_servers(&self) -> &[SocketAddr] {
        self.mds.servers()
    }

    /// True once the metadata servers know this start as the one that follows the last: nothing is served before.
    pub fn is_admitted(&self) -> bool {
        self.admitted
    }

    /// True when the metadata servers know how much of the store is durable: an older copy would be found out.
    pub fn is_durable_told(&self) -> bool {
        self.admitted && self.mds.marked() >= self.store.durable_lsn()
    }

    /// Number drawn at this start.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// Why the disk is out of use, if it is.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// The store, for checkers and screens.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// True while a copy is being rebuilt and serves nothing.
    pub fn is_rebuilding(&self, chunk: ChunkId) -> bool {
        self.copies.contains_key(&chunk)
    }

    /// Figures as told to the metadata servers.
    pub fn stats(&self) -> CsStats {
        let store = self.store.stats();
        let capacity = if self.config.capacity == 0 {
            store.capacity_bytes
        } else {
            self.config.capacity.min(store.capacity_bytes)
        };
        CsStats {
            capacity,
            used: store.used_bytes,
            chunks: store.chunks,
            queue_depth: self.client_depth + self.repairs_waiting.len() as u32,
            ..self.counters
        }
    }

    /// Begins a planned stop: leaves a checkpoint behind, so that the next start has nothing to replay.
    pub fn prepare_stop(&mut self, now: Now, out: &mut Effects) {
        if self.opened.is_none() || self.failed.is_some() {
            self.stop_ready = true;
            return;
        }
        self.mds_last_mark(now, out);
        self.submit(now, Pending::Stop, StoreRequest::Checkpoint);
        self.turn(now, out);
    }

    /// True when a planned stop has nothing more to wait for.
    pub fn is_ready_to_stop(&self) -> bool {
        self.failed.is_some() || (self.stop_ready && !self.mds.is_telling())
    }

    fn submit(&mut self, now: Now, pending: Pending, request: StoreRequest) {
        let token = self.pending.insert(pending);
        self.submitted += 1;
        self.store.submit(now.mono, token, request, &mut self.store_out);
    }

    /// Sends the store's disk requests out and takes its answers until it has no more.
    fn pump(&mut self, now: Now, out: &mut Effects) {
        loop {
            out.disk.extend(self.store_out.disk.drain(..).map(|request| (DiskIndex(0), request)));
            if let Some(opened) = self.store_out.opened.take() {
                match opened {
                    Ok(report) => self.on_opened(now, report, out),
                    Err(error) => {
                        let reason = why_not_opened(&self.config.repository, &error);
                        self.stop(reason, out);
                    }
                }
            }
            for notice in std::mem::take(&mut self.store_out.notices) {
                self.on_notice(now, notice, out);
            }
            if self.store_out.done.is_empty() {
                return;
            }
            let mut done = std::mem::take(&mut self.store_out.done);
            for (token, result) in done.drain(..) {
                self.on_done(now, token, result, out);
            }
            if self.store_out.done.is_empty() {
                self.store_out.done = done;
            }
        }
    }

    fn stop(&mut self, reason: String, out: &mut Effects) {
        if !std::mem::replace(&mut self.fatal_told, true) {
            out.fatal = Some(reason);
        }
    }

    fn on_opened(&mut self, now: Now, report: OpenReport, out: &mut Effects) {
        let mut chunks = 0;
        for (chunk, info) in self.store.chunks() {
            chunks += 1;
            let state = match ChunkTag::decode(&info.tag) {
                Ok(tag) => tag.state,
                Err(error) => {
                    // Whatever the copy was, it is not trusted: it serves nothing until the metadata servers rebuild
                    // it.
                    out.log.push(format!("{chunk}: {error}; the copy waits to be rebuilt"));
                    CopyState::Rebuilding { base: None, joined: cairn_types::ChunkVersion(0), suspects: Vec::new() }
                }
            };
            if let CopyState::Rebuilding { base, joined, suspects } = state {
                let mut fresh = rebuild::no_blocks(info.block_count);
                // Unsettled writes were taken after the rebuild began: older ones were forgotten then.
                for entry in self.store.tail(info.volume).filter(|entry| entry.chunk == chunk) {
                    rebuild::set_blocks(&mut fresh, entry.first_block, entry.block_count);
                }
                self.copies.insert(chunk, Copy { base, joined, suspects, fresh });
            }
        }
        let rebuilding = self.copies.len() as u64;
        let (groups_replayed, torn_tail) = (report.groups_replayed, report.torn_tail);
        out.log.push(format!(
            "the chunk store is open: {chunks} copies, {rebuilding} of them being rebuilt; {groups_replayed} groups replayed{}",
            if torn_tail { ", an unfinished one dropped" } else { "" }
        ));
        self.opened = Some(StartReport { boot: self.boot, chunks, rebuilding, groups_replayed, torn_tail });
        // The store opens only when everything it recovered is durable.
        self.durable_lsn = report.lsn;
        self.scrub.begin(now);
        self.lineage = Lineage::decode(&self.store.label());
        match self.lineage.begin(self.rng.next_u64() | 1, report.recovered_lsn) {
            true => self.write_label(now, self.lineage, false),
            false => self.mds.begin(now),
        }
    }

    /// Makes a label durable; what it says counts once it is.
    fn write_label(&mut self, now: Now, lineage: Lineage, acknowledged: bool) {
        let request = StoreRequest::SetLabel { label: lineage.encode() };
        self.submit(now, Pending::Label { acknowledged }, request);
    }

    fn on_label(&mut self, now: Now, acknowledged: bool, result: &Result<StoreReply, StoreError>, out: &mut Effects) {
        match (acknowledged, result) {
            (false, Ok(_)) => self.mds.begin(now),
            (false, Err(error)) => {
                // It is not known whether the nonce is on the disk, so nobody may hear of it.
                self.stop(format!("the chunk store cannot be written: {error}"), out);
            }
            (true, Ok(_)) => {
                self.lineage = self.lineage.acknowledge();
                self.mds.label_written();
            }
            // The disk has failed: the cluster hears so, and the pending nonce or the new one is on the disk.
            (true, Err(_)) => self.mds.label_written(),
        }
    }

    /// True when requests are judged, if only to say that the disk failed. Until the metadata servers have admitted
    /// this start the store may be an older copy of itself.
    fn is_open(&self) -> bool {
        self.opened.is_some() && (self.admitted || self.failed.is_some())
    }

    /// Requests that came before this server was open.
    fn take_early(&mut self, now: Now, out: &mut Effects) {
        for (link, frames) in std::mem::take(&mut self.early) {
            for frame in frames {
                self.on_frame(now, link, frame, out);
            }
        }
    }

    fn on_notice(&mut self, now: Now, notice: Notice, out: &mut Effects) {
        match notice {
            Notice::Corrupt { chunk, blocks } => {
                self.note_damaged(chunk, blocks.first().copied().unwrap_or(0), out);
            }
            Notice::Stopped { what } => self.note_failed(now, what, out),
            Notice::ReadFailed(error) => out.log.push(format!("the disk failed to read: {error}")),
            Notice::Checkpointed { .. } => {}
        }
    }

    fn note_damaged(&mut self, chunk: ChunkId, block: u32, out: &mut Effects) {
        self.counters.corruptions += 1;
        if self.mds.note_damaged(chunk, block) {
            out.log.push(format!("{chunk}: block {block} is damaged on this disk"));
        }
    }

    /// Remembers that the disk is out of use; everything is refused from now on.
    fn note_failed(&mut self, now: Now, what: String, out: &mut Effects) {
        if self.failed.is_some() {
            return;
        }
        out.log
            .push(format!("the disk of this chunk server failed: {what}; it serves nothing until it is looked after"));
        self.failed = Some(what);
        self.mds.heartbeat_now();
        for volume in self.volumes_with_waiters() {
            self.drain(now, volume, out);
        }
        self.fail_rebuilds();
        for waiter in std::mem::take(&mut self.flush_waiters) {
            self.refuse(waiter.caller, cairn_wire::data::DataStatus::DiskFailed, 0, out);
        }
    }

    fn volumes_with_waiters(&self) -> Vec<VolumeId> {
        // Sorted, so that the order of answers does not depend on the map.
        let mut ids: Vec<VolumeId> =
            self.volumes.iter().filter(|(_, volume)| !volume.waiting.is_empty()).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    fn on_done(&mut self, now: Now, token: u64, result: Result<StoreReply, StoreError>, out: &mut Effects) {
        let pending = self.pending.take(token);
        if let Err(StoreError::Failed { what }) = &result {
            self.note_failed(now, what.clone(), out);
        }
        match pending {
            Pending::Nothing => {}
            Pending::Stop => self.stop_ready = true,
            Pending::Label { acknowledged } => self.on_label(now, acknowledged, &result, out),
            Pending::Write(write) => self.on_written(now, write, result, out),
            Pending::Read(read) => self.on_read(now, read, result, out),
            Pending::Flush { waiters, issued } => self.on_flushed(waiters, issued, result, out),
            Pending::Control { volume, done } => self.on_control_done(now, volume, done, result, out),
            Pending::Repair { volume, chunk, attempt, first_block, block_count } => {
                self.on_repaired(now, volume, chunk, attempt, (first_block, block_count), result, out);
            }
            Pending::List(listing) => self.on_listed(listing, result, out),
            Pending::Verify { chunk } => self.on_verified(chunk, result, out),
        }
    }

    fn on_flushed(
        &mut self,
        waiters: Vec<FlushWaiter>,
        issued: Instant,
        result: Result<StoreReply, StoreError>,
        out: &mut Effects,
    ) {
        self.flush_running = false;
        if let Ok(StoreReply::Flushed { lsn }) = result {
            self.durable_lsn = self.durable_lsn.max(lsn);
            self.undurable_since = (self.answered_lsn > self.durable_lsn).then_some(issued);
        }
        let ok = self.failed.is_none();
        let joined = std::mem::take(&mut self.flush_joined);
        for waiter in waiters.into_iter().chain(joined) {
            match ok {
                true => self.answer_ok(waiter.caller, waiter.volume, out),
                false => self.refuse(waiter.caller, cairn_wire::data::DataStatus::DiskFailed, 0, out),
            }
        }
    }

    /// Starts a device flush when somebody waits for one or is about to, or answered writes have been undurable for
    /// long enough. One runs at a time, so everybody who comes while it runs, and is not covered by it, shares the
    /// next.
    fn flush_if_due(&mut self, now: Now) {
        if self.flush_running || self.failed.is_some() {
            return;
        }
        let overdue = self.undurable_since.is_some_and(|since| now.mono >= since + SELF_FLUSH_AFTER);
        let expected = std::mem::take(&mut self.flush_expected);
        if self.flush_waiters.is_empty() && !overdue && !expected && self.undurable < UNDURABLE_MAX {
            return;
        }
        self.flush_running = true;
        self.flush_covers = self.answered_lsn;
        self.undurable = 0;
        let waiters = std::mem::take(&mut self.flush_waiters);
        self.submit(now, Pending::Flush { waiters, issued: now.mono }, StoreRequest::Flush);
    }

    fn settle_if_due(&mut self, now: Now) {
        if self.settle_at.is_none_or(|at| now.mono < at) {
            return;
        }
        self.settle_at = None;
        let mut dirty = std::mem::take(&mut self.settle_dirty);
        for id in dirty.drain(..) {
            self.settle_volume(now, id);
        }
        self.settle_dirty = dirty;
    }

    fn settle_volume(&mut self, now: Now, id: VolumeId) {
        let Some(volume) = self.volumes.get_mut(&id) else { return };
        volume.settle_queued = false;
        if volume.settled <= volume.settle_sent || self.failed.is_some() {
            return;
        }
        volume.settle_sent = volume.settled;
        let request = StoreRequest::Settle { volume: id, epoch: volume.fenced, sequence: volume.settled };
        self.submit(now, Pending::Nothing, request);
    }

    /// Takes a settled mark of the volume's current epoch.
    fn note_settled(&mut self, now: Now, id: VolumeId, settled: cairn_types::Sequence, at_once: bool) {
        let Some(volume) = self.volumes.get_mut(&id) else { return };
        volume.settled = volume.settled.max(settled);
        if volume.settled <= volume.settle_sent {
            return;
        }
        if at_once || volume.settled.0 - volume.settle_sent.0 >= SETTLE_LEAP {
            self.settle_volume(now, id);
        } else if !volume.settle_queued {
            volume.settle_queued = true;
            self.settle_dirty.push(id);
            self.settle_at.get_or_insert(now.mono + SETTLE_EVERY);
        }
    }

    fn on_net(&mut self, now: Now, event: NetEvent, out: &mut Effects) {
        match event {
            NetEvent::Up { link, peer, .. } if link.is_accepted() => self.links.up(link, peer),
            NetEvent::Up { link, .. } => {
                if !self.mds_up(now, link) {
                    self.peer_up(now, link, out);
                }
            }
            NetEvent::Down { link, .. } if link.is_accepted() => {
                self.links.down(link);
                self.early.remove(&link);
            }
            NetEvent::Down { link, reason } => {
                if !self.mds_down(now, link, &reason, out) {
                    self.peer_down(now, link, &reason, out);
                }
            }
            NetEvent::Frame { link, frame } => self.on_frame(now, link, frame, out),
        }
    }

    fn on_frame(&mut self, now: Now, link: LinkId, frame: Frame, out: &mut Effects) {
        if !link.is_accepted() {
            if !self.mds_frame(now, link, &frame, out) {
                self.peer_frame(now, link, frame, out);
            }
            return;
        }
        if !self.links.is_up(link) {
            return;
        }
        if !self.is_open() {
            let queue = self.early.entry(link).or_default();
            queue.push_back(frame);
            if queue.len() > EARLY_MAX {
                self.close(link, "more requests than its window while this server starts", out);
            }
            return;
        }
        let caller = Caller { link, id: frame.id };
        match frame.kind {
            FrameKind::Data => match cairn_wire::data::DataRequest::decode(&frame.prefix, frame.payload.len()) {
                Ok(request) => {
                    if self.admit(caller, out) {
                        self.data_call(now, DataCall { caller, request, payload: frame.payload }, out);
                    }
                }
                Err(error) => self.close(link, &error.to_string(), out),
            },
            FrameKind::CsCall => match cairn_wire::decode("chunk server call", &frame.prefix) {
                Ok(request) => self.cs_call(now, caller, request, out),
                Err(error) => self.close(link, &error.to_string(), out),
            },
            kind => self.close(link, &format!("a frame of kind {kind:?} has no business here"), out),
        }
    }

    /// Counts a request against its link's window; false when the link had to be closed.
    fn admit(&mut self, caller: Caller, out: &mut Effects) -> bool {
        let Some(link) = self.links.get_mut(caller.link) else { return false };
        let spoke = link.session.is_some() || matches!(link.peer, cairn_types::NodeId::Cs(_));
        link.outstanding += 1;
        let outstanding = link.outstanding;
        if !spoke {
            self.close(caller.link, "a request before the hello of its session", out);
            return false;
        }
        if outstanding > crate::links::WINDOW_MAX {
            self.close(caller.link, "more requests outstanding than its window", out);
            return false;
        }
        true
    }

    fn close(&mut self, link: LinkId, reason: &str, out: &mut Effects) {
        if let Some(gone) = self.links.get(link) {
            out.log.push(format!("closing the link from {:?}: {reason}", gone.peer));
        }
        self.links.down(link);
        self.early.remove(&link);
        out.net.push(NetEffect::Close { link });
    }

    fn new_link(&mut self) -> LinkId {
        let link = LinkId(self.next_link);
        self.next_link += 1;
        link
    }

    fn turn(&mut self, now: Now, out: &mut Effects) {
        if self.is_open() && !self.early.is_empty() {
            self.take_early(now, out);
        }
        if self.opened.is_some() {
            self.mds_turn(now, out);
            self.rebuild_turn(now, out);
            self.scrub_turn(now);
            self.settle_if_due(now);
        }
        loop {
            if self.opened.is_some() {
                self.flush_if_due(now);
            }
            self.store.turn(now.mono, &mut self.store_out);
            let before = self.submitted;
            self.pump(now, out);
            let more = !self.flush_waiters.is_empty() && !self.flush_running && self.failed.is_none();
            if self.submitted == before && !more {
                break;
            }
        }
        self.forget_idle_volumes(now);
        self.arm(now, out);
    }

    fn forget_idle_volumes(&mut self, now: Now) {
        if self.volumes.len() <= VOLUMES_MAX {
            return;
        }
        let durable = self.durable_lsn;
        self.volumes.retain(|_, volume| !volume.is_idle(now.mono, VOLUME_IDLE, durable));
    }

    fn arm(&mut self, now: Now, out: &mut Effects) {
        if self.opened.is_none() {
            return;
        }
        let flush = self.undurable_since.filter(|_| !self.flush_running && self.failed.is_none());
        let next = [
            flush.map(|since| since + SELF_FLUSH_AFTER),
            self.settle_at,
            self.mds.wake_at(),
            self.rebuilds.wake_at(),
            self.scrub.wake_at(),
        ]
        .into_iter()
        .flatten()
        .min();
        let Some(next) = next else { return };
        let next = next.max(now.mono + Duration::from_micros(100));
        if self.armed.is_none_or(|armed| armed <= now.mono || next < armed) {
            self.armed = Some(next);
            out.wake_at(next);
        }
    }
}

impl Process for CsCore {
    fn step(&mut self, now: Now, event: Event, out: &mut Effects) {
        self.busy.pass(now.mono, self.client_depth > 0);
        match event {
            Event::Start => self.store.start(now.mono, &mut self.store_out),
            Event::Net(event) => self.on_net(now, event, out),
            Event::Disk(_, done) => self.on_disk(now, done),
            Event::Timer => self.armed = None,
            Event::Turn => {
                self.turn(now, out);
                return;
            }
        }
        self.pump(now, out);
    }
}

impl CsCore {
    fn on_disk(&mut self, now: Now, done: DiskDone) {
        self.store.disk_done(now.mono, done, &mut self.store_out);
    }
}

/// What the operator reads when the store cannot be opened, and what to do.
fn why_not_opened(dir: &str, error: &OpenError) -> String {
    match error {
        // The store may well be whole: removing the server would throw good copies away.
        OpenError::WrongCluster { .. } | OpenError::WrongStore { .. } => format!(
            "`cs.conf` in {dir} is not of the store beside it: {error}; was another disk mounted, or one of the two copied \
             there? `cairn doctor cs {dir}` says which store it is. Put the right one of the two back; remove this server \
             with `cairn rm-cs -f` only if its store is lost"
        ),
        error => format!(
            "the chunk store cannot be opened: {error}; `cairn doctor cs {dir}` says what is left of it. If it stays so, \
             remove this server with `cairn rm-cs -f` and make a new one: its chunks are copied from the others"
        ),
    }
}
