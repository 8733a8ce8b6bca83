//! The link to the metadata servers: registration, heartbeats, chunk reports, orders.
//!
//! Copies just made are reported within seconds, all copies hourly. One call is outstanding at a time. A follower
//! names the leader; when nobody answers, the addresses that the metadata servers told last are tried in turn, and
//! after each round of them one of those configured, with a bounded, growing pause. So a server finds the group however
//! often its members were replaced, as long as it heard of some of the present ones.
//! Data requests never wait for any of this.

use super::CsCore;
use super::control::{Audience, Control};
use super::rebuild::RebuildOrder;
use crate::lineage::Lineage;
use cairn_stdx::planted;
use cairn_types::{ChunkId, ChunkVersion, ClientId, CsId, Duration, Instant, Level, VolumeId};
use cairn_wire::mds::{
    Call, ChunkReport, CsOrder, CsProfile, MdsError, MdsReply, MdsRequest, OrderDone, OrderKind, Push,
};
use cairn_wire::{Effects, Frame, FrameKind, LinkId, NetEffect, Now};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

/// Time between heartbeats.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
/// What is durable is told this often at most, when it moved: a copy of the store with less is an older one.
pub const MARK_EVERY: Duration = Duration::from_secs(1);
/// Time between full chunk reports.
pub const REPORT_EVERY: Duration = Duration::from_secs(3600);
/// Copies in one piece of a report.
pub const REPORT_PAGE: usize = 4096;
/// How busy this server is is told this often at most.
pub const BUSY_EVERY: Duration = Duration::from_secs(20);
/// The addresses of all metadata servers are asked for this often at most.
pub const TOPOLOGY_EVERY: Duration = Duration::from_millis(500);
/// Addresses of metadata servers that are kept; a cluster has at most fifteen.
const SERVERS_MAX: usize = 64;
/// A metadata server that does not answer for this long is left for another.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);
/// First and longest pause between attempts.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
/// How long copies just made are collected before they are reported, so that many make one call, and how often those
/// with unsettled writes are looked at.
const CREATED_WAIT: Duration = Duration::from_secs(1);
/// Copies just made and not reported yet; what is beyond it waits for the hourly report.
const CREATED_MAX: usize = 8192;
/// Finished orders kept until a heartbeat has told them; the metadata servers repeat orders that are forgotten.
const DONE_MAX: usize = 16_384;
/// Finished orders and damaged blocks in one heartbeat.
const HEARTBEAT_LIST_MAX: usize = 1024;
/// Before it first registered, a server that is turned away this often as one of another cluster gives up. More than
/// once, because lists of metadata servers are sometimes wrong for a moment while a cluster is moved.
const STRANGER_MAX: u32 = 10;
/// How handshakes end at a metadata server of another cluster, or of one that was made anew under the same name.
const STRANGER: [&str; 2] = ["another identity", "belongs to cluster"];
/// A server that points to a leader is believed this often in a row before the next pause.
const HOPS_MAX: u32 = 3;

#[derive(Debug)]
enum Phase {
    /// Which start of the store this is has yet to become durable: nobody may hear of it.
    Starting,
    Pause {
        until: Instant,
    },
    Connecting {
        link: LinkId,
        until: Instant,
    },
    Up {
        link: LinkId,
    },
}

#[derive(Debug)]
enum Asked {
    Register,
    Heartbeat { done: usize, damaged: usize },
    Report { last: bool },
    Mark { durable: u64 },
    Busy,
    Topology,
}

/// State of the link.
#[derive(Debug)]
pub(super) struct MdsLink {
    cs: Option<CsId>,
    phase: Phase,
    /// Addresses of all metadata servers, as they told them last.
    servers: Vec<SocketAddr>,
    /// They may have changed; and when they may be asked for.
    topology_wanted: bool,
    topology_at: Instant,
    /// Attempts without a leader to turn to.
    target: usize,
    /// Named by a follower.
    leader: Option<SocketAddr>,
    hops: u32,
    /// Times a metadata server of another cluster answered.
    strangers: u32,
    backoff: Duration,
    registered: bool,
    ever_registered: bool,
    /// The label that says so is being written: nothing is asked meanwhile.
    labelling: bool,
    /// The highest log sequence number told to be durable, and when the next may be told.
    marked: u64,
    mark_at: Instant,
    /// The call that tells it before a planned stop, until it is answered.
    last_mark: Option<u64>,
    /// The level of the cluster, as told with heartbeats; and when it may be told next how busy this server is.
    level: Level,
    busy_at: Instant,
    next_id: u64,
    outstanding: Option<(u64, Asked, Instant)>,
    heartbeat_at: Instant,
    report_at: Instant,
    /// Copies still to be reported, ascending; and the highest id reported so far.
    report: Option<(VecDeque<ChunkId>, ChunkId)>,
    /// Copies made since the last report began, and when to tell of them.
    created: BTreeSet<ChunkId>,
    created_due: Instant,
    done: VecDeque<OrderDone>,
    damaged: VecDeque<(ChunkId, u32)>,
    /// Something changed that a heartbeat should tell now.
    urgent: bool,
    last_trouble: String,
}

impl MdsLink {
    pub(super) fn new(cs: Option<CsId>, servers: Vec<SocketAddr>) -> Self {
        Self {
            cs,
            phase: Phase::Starting,
            servers,
            topology_wanted: false,
            topology_at: Instant(0),
            target: 0,
            leader: None,
            hops: 0,
            strangers: 0,
            backoff: BACKOFF[0],
            registered: false,
            ever_registered: false,
            labelling: false,
            marked: 0,
            mark_at: Instant(0),
            last_mark: None,
            level: Level::FIRST,
            busy_at: Instant(0),
            next_id: 1,
            outstanding: None,
            heartbeat_at: Instant(0),
            report_at: Instant(0),
            report: None,
            created: BTreeSet::new(),
            created_due: Instant(0),
            done: VecDeque::new(),
            damaged: VecDeque::new(),
            urgent: false,
            last_trouble: String::new(),
        }
    }

    pub(super) fn cs(&self) -> Option<CsId> {
        self.cs
    }

    pub(super) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// The address to try next: those the metadata servers told in turn, and one of the others after each round.
    fn next_address(&mut self, configured: &[SocketAddr]) -> Option<SocketAddr> {
        let others: Vec<SocketAddr> = configured.iter().copied().filter(|addr| !self.servers.contains(addr)).collect();
        let round = self.servers.len() + usize::from(!others.is_empty());
        let nth = self.target;
        self.target = self.target.wrapping_add(1);
        let (rounds, place) = (nth.checked_div(round)?, nth % round);
        Some(self.servers.get(place).copied().unwrap_or_else(|| others[rounds % others.len()]))
    }

    /// The nonce of this start is durable.
    pub(super) fn begin(&mut self, now: Now) {
        self.phase = Phase::Pause { until: now.mono };
    }

    /// True until the call before a planned stop is answered.
    pub(super) fn is_telling(&self) -> bool {
        self.last_mark.is_some()
    }

    /// The highest log sequence number told to be durable.
    pub(super) fn marked(&self) -> u64 {
        self.marked
    }

    /// The label of the store is written, or cannot be.
    pub(super) fn label_written(&mut self) {
        self.labelling = false;
    }

    pub(super) fn heartbeat_now(&mut self) {
        self.urgent = true;
    }

    /// Remembers a copy that was made and is durable, for a report soon.
    pub(super) fn note_created(&mut self, now: Now, chunk: ChunkId) {
        if self.created.is_empty() {
            self.created_due = now.mono + CREATED_WAIT;
        }
        if self.created.len() < CREATED_MAX {
            self.created.insert(chunk);
        }
    }

    /// Remembers the end of an order for the next heartbeat.
    pub(super) fn order_done(&mut self, done: OrderDone) {
        if self.done.len() < DONE_MAX {
            self.done.push_back(done);
        }
        self.urgent = true;
    }

    /// Remembers a damaged block; false when it is known already.
    pub(super) fn note_damaged(&mut self, chunk: ChunkId, block: u32) -> bool {
        if self.damaged.contains(&(chunk, block)) || self.damaged.len() >= super::DAMAGED_MAX {
            return false;
        }
        self.damaged.push_back((chunk, block));
        true
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        match &self.phase {
            // The answer of the store comes with a turn of its own.
            Phase::Starting => None,
            Phase::Pause { until } | Phase::Connecting { until, .. } => Some(*until),
            Phase::Up { .. } => Some(match &self.outstanding {
                Some((_, _, deadline)) => *deadline,
                // Here too.
                None if self.labelling => self.heartbeat_at,
                None if self.urgent => Instant(0),
                None => self.heartbeat_at,
            }),
        }
    }

    fn is_link(&self, link: LinkId) -> bool {
        matches!(&self.phase, Phase::Connecting { link: own, .. } | Phase::Up { link: own } if *own == link)
    }
}

impl CsCore {
    /// Starts whatever is due on the link.
    pub(super) fn mds_turn(&mut self, now: Now, out: &mut Effects) {
        match self.mds.phase {
            Phase::Pause { until } if now.mono >= until => self.mds_connect(now, out),
            Phase::Connecting { until, .. } if now.mono >= until => self.mds_give_up(now, "no connection in time", out),
            Phase::Up { link } => self.mds_ask(now, link, out),
            Phase::Starting | Phase::Pause { .. } | Phase::Connecting { .. } => {}
        }
    }

    fn mds_connect(&mut self, now: Now, out: &mut Effects) {
        let leader = self.mds.leader.take();
        let Some(addr) = leader.or_else(|| self.mds.next_address(&self.config.mds)) else {
            self.mds.phase = Phase::Pause { until: now.mono + BACKOFF[1] };
            return;
        };
        let link = self.new_link();
        self.mds.phase = Phase::Connecting { link, until: now.mono + 2 * ANSWER_PATIENCE };
        out.net.push(NetEffect::Connect { link, addr });
    }

    fn mds_ask(&mut self, now: Now, link: LinkId, out: &mut Effects) {
        if let Some((_, _, deadline)) = &self.mds.outstanding {
            if now.mono >= *deadline {
                self.mds_give_up(now, "no answer in time", out);
            }
            return;
        }
        if self.mds.labelling {
            self.mds.heartbeat_at = now.mono + HEARTBEAT_EVERY;
            return;
        }
        let (asked, request) = match self.mds.cs.filter(|_| self.mds.registered) {
            None => (Asked::Register, self.registration()),
            Some(cs) if self.mds.urgent || now.mono >= self.mds.heartbeat_at => {
                self.mds.urgent = false;
                self.mds.heartbeat_at = now.mono + HEARTBEAT_EVERY;
                self.heartbeat(cs)
            }
            Some(_) if self.mds.topology_wanted && now.mono >= self.mds.topology_at => {
                self.mds.topology_wanted = false;
                self.mds.topology_at = now.mono + TOPOLOGY_EVERY;
                (Asked::Topology, MdsRequest::Topology)
            }
            Some(cs) if self.store.durable_lsn() > self.mds.marked && now.mono >= self.mds.mark_at => {
                self.mds.mark_at = now.mono + MARK_EVERY;
                self.mark(cs)
            }
            Some(cs) if self.may_say_busy() && now.mono >= self.mds.busy_at && self.busy.is_news() => {
                self.mds.busy_at = now.mono + BUSY_EVERY;
                (Asked::Busy, MdsRequest::CsBusy { cs, busy: self.busy.tell() })
            }
            Some(cs) => match self.report_page(now, cs) {
                Some(page) => page,
                None => return,
            },
        };
        let id = self.mds_send(now, link, request, out);
        self.mds.outstanding = Some((id, asked, now.mono + ANSWER_PATIENCE));
    }

    /// What came with a level is said only to a cluster at that level (I15).
    fn may_say_busy(&self) -> bool {
        let level = if planted!("used_before_finalize") { self.config.level } else { self.mds.level };
        level >= Level::BUSY
    }

    fn mds_send(&mut self, now: Now, link: LinkId, request: MdsRequest, out: &mut Effects) -> u64 {
        let id = self.mds.next_id;
        self.mds.next_id += 1;
        let call = Call { session: ClientId(0), sequence: 0, acknowledged: 0, wall_ns: now.wall_ns, request };
        out.send(link, FrameKind::MdsCall, id, cairn_wire::encode(&call));
        id
    }

    fn mark(&self, cs: CsId) -> (Asked, MdsRequest) {
        let durable = self.store.durable_lsn();
        (Asked::Mark { durable }, MdsRequest::CsMark { cs, boot: self.boot, durable })
    }

    /// Before a planned stop: what is durable by now.
    pub(super) fn mds_last_mark(&mut self, now: Now, out: &mut Effects) {
        if let (Phase::Up { link }, Some(cs), true) = (&self.mds.phase, self.mds.cs, self.mds.registered) {
            let link = *link;
            let (_, request) = self.mark(cs);
            self.mds.last_mark = Some(self.mds_send(now, link, request, out));
        }
    }

    fn registration(&self) -> MdsRequest {
        let durable = Lineage::decode(&self.store.label()) == self.lineage;
        assert!(durable || self.failed.is_some(), "I7: a start is told before it is durable: {:?}", self.lineage);
        MdsRequest::CsJoin {
            server: CsProfile {
                cs: self.mds.cs,
                store: self.config.store,
                addr: self.config.addr,
                location: self.config.location.clone(),
                tier: self.config.tier,
                capacity: self.stats().capacity,
                repository: self.config.repository.clone(),
            },
            lineage: self.lineage.told(self.boot),
        }
    }

    fn heartbeat(&self, cs: CsId) -> (Asked, MdsRequest) {
        let done: Vec<OrderDone> = self.mds.done.iter().take(HEARTBEAT_LIST_MAX).cloned().collect();
        let damaged: Vec<(ChunkId, u32)> = self.mds.damaged.iter().take(HEARTBEAT_LIST_MAX).copied().collect();
        let asked = Asked::Heartbeat { done: done.len(), damaged: damaged.len() };
        let failed = self.failed.clone();
        (asked, MdsRequest::CsHeartbeat { cs, boot: self.boot, stats: self.stats(), done, damaged, failed })
    }

    /// The next piece of the chunk report, when one is due.
    fn report_page(&mut self, now: Now, cs: CsId) -> Option<(Asked, MdsRequest)> {
        if self.mds.report.is_none() {
            if self.failed.is_some() {
                return None;
            }
            if now.mono < self.mds.report_at {
                return self.created_page(now, cs);
            }
            self.mds.created.clear();
            let mut ids: Vec<ChunkId> = self.store.chunks().map(|(chunk, _)| chunk).collect();
            ids.sort_unstable();
            self.mds.report = Some((ids.into(), ChunkId(0)));
        }
        let (ids, after) = self.mds.report.as_mut().expect("made above");
        let page: Vec<ChunkId> = ids.drain(..ids.len().min(REPORT_PAGE)).collect();
        let (from, last) = (*after, ids.is_empty());
        *after = page.last().copied().unwrap_or(from);
        // Chunks made or deleted meanwhile: what is gone is left out, what is new is left for the next report.
        let chunks: Vec<ChunkReport> = page.iter().filter_map(|chunk| self.chunk_report(*chunk)).collect();
        Some((Asked::Report { last }, MdsRequest::CsReport { cs, after: from, chunks, last }))
    }

    fn chunk_report(&self, chunk: ChunkId) -> Option<ChunkReport> {
        let info = self.store.chunk(chunk)?;
        let version = super::data::trusted_version(self, chunk, info.version);
        Some(ChunkReport { chunk, version })
    }

    /// A piece of a report with neighbours among the copies just made. Its range holds nothing else, so it says of no
    /// other copy that it is missing.
    ///
    /// A copy is told only when all writes to it are settled: then every replica of the chunk has it, and a chunk that
    /// is known to have been created is missed by nobody.
    fn created_page(&mut self, now: Now, cs: CsId) -> Option<(Asked, MdsRequest)> {
        if self.mds.created.is_empty() || now.mono < self.mds.created_due {
            return None;
        }
        let created = std::mem::take(&mut self.mds.created);
        let here = created.into_iter().filter_map(|chunk| Some((chunk, self.store.chunk(chunk)?)));
        let (mut tails, mut waiting) = (BTreeMap::new(), BTreeSet::new());
        let mut page: Vec<ChunkId> = Vec::new();
        for (chunk, info) in here {
            let unsettled: &BTreeSet<ChunkId> = tails
                .entry(info.volume)
                .or_insert_with(|| self.store.tail(info.volume).map(|entry| entry.chunk).collect());
            let is_next = page.last().is_none_or(|last| last.0 + 1 == chunk.0) && page.len() < REPORT_PAGE;
            match info.mapped_blocks > 0 && !unsettled.contains(&chunk) && is_next {
                true => page.push(chunk),
                false => drop(waiting.insert(chunk)),
            }
        }
        self.mds.created = waiting;
        if page.is_empty() {
            self.mds.created_due = now.mono + CREATED_WAIT;
        }
        let after = ChunkId(page.first()?.0.saturating_sub(1));
        let chunks = page.iter().filter_map(|chunk| self.chunk_report(*chunk)).collect();
        Some((Asked::Report { last: false }, MdsRequest::CsReport { cs, after, chunks, last: false }))
    }

    /// True when the link is the one to the metadata servers.
    pub(super) fn mds_up(&mut self, now: Now, link: LinkId) -> bool {
        if !self.mds.is_link(link) {
            return false;
        }
        self.mds.phase = Phase::Up { link };
        self.mds.registered = false;
        self.mds.outstanding = None;
        self.mds.heartbeat_at = now.mono;
        true
    }

    /// True when the link was the one to the metadata servers.
    pub(super) fn mds_down(&mut self, now: Now, link: LinkId, reason: &str, out: &mut Effects) -> bool {
        if !self.mds.is_link(link) {
            return false;
        }
        self.mds_pause(now, reason, out);
        if !self.mds.ever_registered && STRANGER.iter().any(|text| reason.contains(text)) {
            self.mds.strangers += 1;
            if self.mds.strangers >= STRANGER_MAX {
                let reason = format!(
                    "this chunk server is of cluster {}, and no metadata server of it was found: {reason} If the old cluster \
                     is gone, make a chunk server anew in a new directory; otherwise correct the addresses in bs.list",
                    self.config.cluster
                );
                self.stop(reason, out);
            }
        }
        true
    }

    fn mds_give_up(&mut self, now: Now, reason: &str, out: &mut Effects) {
        if let Phase::Connecting { link, .. } | Phase::Up { link } = self.mds.phase {
            out.net.push(NetEffect::Close { link });
        }
        self.mds_pause(now, reason, out);
    }

    fn mds_pause(&mut self, now: Now, reason: &str, out: &mut Effects) {
        if self.mds.last_trouble != reason {
            self.mds.last_trouble = reason.to_owned();
            out.log.push(format!("the link to the metadata servers: {reason}"));
        }
        let jitter = Duration::from_nanos(self.rng.below(self.mds.backoff.as_nanos() as u64 / 4 + 1));
        self.mds.phase = Phase::Pause { until: now.mono + self.mds.backoff + jitter };
        self.mds.backoff = (self.mds.backoff * 2).min(BACKOFF[1]);
        self.mds.registered = false;
        self.mds.outstanding = None;
        self.mds.last_mark = None;
        self.mds.report = None;
    }

    /// Leaves for the leader a follower named, at once unless the servers send us round in circles.
    fn mds_follow(&mut self, now: Now, leader: Option<SocketAddr>, out: &mut Effects) {
        if let Phase::Up { link } = self.mds.phase {
            out.net.push(NetEffect::Close { link });
        }
        self.mds_pause(now, "asked a follower", out);
        self.mds.hops += 1;
        self.mds.leader = leader;
        if leader.is_some() && self.mds.hops <= HOPS_MAX {
            self.mds.phase = Phase::Pause { until: now.mono };
            self.mds_connect(now, out);
        }
    }

    /// True when the frame came over the link to the metadata servers.
    pub(super) fn mds_frame(&mut self, now: Now, link: LinkId, frame: &Frame, out: &mut Effects) -> bool {
        if !self.mds.is_link(link) {
            return false;
        }
        let problem = match frame.kind {
            FrameKind::MdsPush => match cairn_wire::decode::<Push>("push", &frame.prefix) {
                Ok(Push::OrdersWaiting) => {
                    self.mds.urgent = true;
                    None
                }
                Ok(Push::TopologyChanged) => {
                    self.mds.topology_wanted = true;
                    None
                }
                Ok(_) => None,
                Err(error) => Some(error.to_string()),
            },
            FrameKind::MdsReply => match cairn_wire::decode("metadata server reply", &frame.prefix) {
                Ok(reply) => {
                    match self.mds.outstanding.take() {
                        Some((id, asked, _)) if id == frame.id => self.mds_answered(now, asked, reply, out),
                        other => self.mds.outstanding = other,
                    }
                    self.mds.last_mark.take_if(|id| *id == frame.id);
                    None
                }
                Err(error) => Some(error.to_string()),
            },
            kind => Some(format!("a frame of kind {kind:?} has no business here")),
        };
        if let Some(problem) = problem {
            self.mds_give_up(now, &problem, out);
        }
        true
    }

    fn mds_answered(&mut self, now: Now, asked: Asked, reply: Result<MdsReply, MdsError>, out: &mut Effects) {
        match (asked, reply) {
            (Asked::Register, Ok(MdsReply::CsRegistered { cs, cluster })) => {
                if cluster != self.config.cluster || self.mds.cs.is_some_and(|own| own != cs) {
                    let own = self.config.cluster;
                    let reason = format!(
                        "the metadata servers answer as cluster {cluster} and call this server {cs}, but its store belongs \
                         to cluster {own}; check the repository directory and the addresses of the metadata servers"
                    );
                    return self.stop(reason, out);
                }
                self.mds.cs = Some(cs);
                if !self.lineage.is_acknowledged() && self.failed.is_none() {
                    self.mds.labelling = true;
                    return self.write_label(now, self.lineage.acknowledge(), true);
                }
                if !self.mds.ever_registered {
                    out.log.push(format!("registered as {cs}"));
                }
                self.admitted |= self.lineage.is_acknowledged();
                self.mds.registered = true;
                self.mds.ever_registered = true;
                self.mds.hops = 0;
                self.mds.backoff = BACKOFF[0];
                self.mds.last_trouble.clear();
                self.mds.urgent = true;
                self.mds.topology_wanted = true;
                self.mds.report_at = now.mono;
                self.mds.report = None;
            }
            (Asked::Heartbeat { done, damaged }, Ok(MdsReply::Orders(orders))) => {
                self.mds.done.drain(..done);
                self.mds.damaged.drain(..damaged);
                self.mds.urgent |= !self.mds.done.is_empty();
                self.take_orders(now, orders, out);
            }
            (Asked::Report { last }, Ok(MdsReply::Orders(orders))) => {
                if last {
                    self.mds.report = None;
                    self.mds.report_at = now.mono + REPORT_EVERY;
                }
                self.take_orders(now, orders, out);
            }
            (Asked::Mark { durable }, Ok(MdsReply::Done)) => self.mds.marked = durable,
            (Asked::Topology, Ok(MdsReply::Topology { mds, .. })) if !mds.is_empty() => {
                if planted!("servers_of_the_start_only") {
                    return;
                }
                self.mds.servers = mds.iter().map(|info| info.addr).take(SERVERS_MAX).collect();
            }
            (_, Ok(MdsReply::CsTurnedAway { reason })) => {
                self.mds_give_up(now, "turned away", out);
                self.stop(reason, out);
            }
            (_, Err(MdsError::NotLeader { leader })) => self.mds_follow(now, leader, out),
            // It is told again when it has changed.
            (Asked::Busy, Ok(MdsReply::Done) | Err(_)) => {}
            // They are asked again; the link is good for everything else.
            (Asked::Topology, Err(_)) => self.mds.topology_wanted = true,
            (Asked::Register, Err(MdsError::Refused(reason))) if !self.mds.ever_registered => {
                let reason = format!("the metadata servers refuse this chunk server: {reason}");
                self.stop(reason, out);
            }
            (_, Err(error)) => self.mds_give_up(now, &error.to_string(), out),
            (asked, Ok(other)) => {
                let name = format!("{other:?}");
                let name = name.split([' ', '(']).next().unwrap_or_default();
                self.mds_give_up(now, &format!("{asked:?} was answered with {name}"), out);
            }
        }
    }

    /// Carries out orders. All are idempotent, so repeated ones do no harm.
    fn take_orders(&mut self, now: Now, orders: Vec<CsOrder>, out: &mut Effects) {
        for order in orders {
            if self.failed.is_some() {
                return;
            }
            match order {
                CsOrder::Raise { chunk, since, version } => {
                    let audience = Audience::Order(OrderKind::Raise, version);
                    let raise = Control::Raise { chunk, since, version, audience };
                    self.order_control(now, chunk, version, OrderKind::Raise, raise, out);
                }
                CsOrder::Delete { chunk, version } => {
                    let delete = Control::Delete { chunk, version };
                    self.order_control(now, chunk, version, OrderKind::Delete, delete, out);
                }
                CsOrder::VerifyRate { chunks_per_minute } => self.set_scrub_rate(now, chunks_per_minute),
                CsOrder::Level(level) if level > self.config.level => {
                    let reason = format!(
                        "the cluster was raised to {level}, and this chunk server is of release {}: start the newer release; \
                         nothing on its disk is lost",
                        self.config.level
                    );
                    return self.stop(reason, out);
                }
                CsOrder::Level(level) => self.mds.level = level,
                CsOrder::Rebuild { entry, volume, block_count, sources, created } => {
                    let (chunk, version) = (entry.chunk, entry.version);
                    let sane = (1..=cairn_store::CHUNK_BLOCKS_MAX).contains(&block_count)
                        && (1..=cairn_store::VERSION_MAX).contains(&version.0);
                    if !sane {
                        let error = Some(format!("a chunk of {block_count} blocks at {version} cannot be"));
                        self.mds.order_done(OrderDone { chunk, version, kind: OrderKind::Rebuild, error });
                        continue;
                    }
                    let own = entry.replicas.iter().find(|replica| Some(replica.cs) == self.mds.cs);
                    let joined = own.map_or(version, |replica| replica.since);
                    let own_id = self.mds.cs;
                    let sources = sources.into_iter().filter(|(cs, _)| Some(*cs) != own_id).collect();
                    let order = RebuildOrder { entry, volume, block_count, sources, joined, created };
                    self.order_rebuild(now, order, out);
                }
            }
        }
    }

    fn order_control(
        &mut self,
        now: Now,
        chunk: ChunkId,
        version: ChunkVersion,
        kind: OrderKind,
        control: Control,
        out: &mut Effects,
    ) {
        let volume: Option<VolumeId> = self.store.chunk(chunk).map(|info| info.volume);
        match volume {
            Some(volume) => self.control(now, volume, control, out),
            None => {
                // Nothing to delete is as good as deleted; nothing to raise is not.
                let error = (kind == OrderKind::Raise).then(|| format!("{chunk} is not on this chunk server"));
                self.mds.order_done(OrderDone { chunk, version, kind, error });
            }
        }
    }
}
