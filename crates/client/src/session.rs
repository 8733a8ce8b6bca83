//! The session with the metadata servers: one link to the leader, calls that take effect once, renewal.
//!
//! A changing call gets its number when it is first sent and keeps it through every retry, so a metadata server that
//! already carried it out answers from memory (I18). Numbers unanswered never span more than [`CALL_WINDOW`]. Reading
//! calls are numbered zero and simply asked again. A call ends with an answer that decides, or at its deadline.
//!
//! [`Session::renewed_at`] is the moment the last answered renewal was *sent*: the lease lasts at least the term from
//! then.

use crate::config::{CALL_WINDOW, CALLS_MAX, CoreConfig, DRIFT_MARGIN, RENEW_EVERY, SILENCE_MAX, TERM_DEFAULT};
use crate::io::{Io, LinkUse};
use crate::timers::Timer;
use crate::volume::VolumeCall;
use cairn_stdx::planted;
use cairn_types::{ClientId, ClusterId, Duration, Instant};
use cairn_wire::mds::{Call, MdsError, MdsReply, MdsRequest, Push, SessionKind};
use cairn_wire::{Frame, FrameKind, LinkId};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const CONNECT_MAX: Duration = Duration::from_secs(3);
const TICK_BUSY: Duration = Duration::from_millis(100);
const ADDRESSES_MAX: usize = 64;

/// Called with the answer of a user's call.
pub type CallDone = Box<dyn FnOnce(Result<MdsReply, MdsError>)>;

/// Who waits for an answer.
pub(crate) enum Waiter {
    /// A user.
    User(CallDone),
    /// A volume, by key.
    Volume(u64, VolumeCall),
    /// The table of chunk servers.
    Topology,
    /// Leases were given back; the volumes by key.
    Released(Vec<u64>),
    /// Nobody.
    Nobody,
    /// This module: the session itself.
    Open,
    /// This module: a renewal.
    Renew,
}

struct Pending {
    request: MdsRequest,
    waiter: Waiter,
    /// Zero for reads and until first sent.
    sequence: u64,
    deadline: Option<Instant>,
    attempts: u32,
    /// On the present link, unanswered.
    sent_at: Option<Instant>,
    ever_sent: bool,
    wall_ns: u64,
    last_error: Option<MdsError>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down { retry_at: Instant },
    Connecting { link: LinkId, since: Instant },
    Up { link: LinkId, heard: Instant },
}

/// See the module.
pub(crate) struct Session {
    /// All that are tried in turn: those in `servers`, those configured, and leaders that were named.
    addrs: Vec<SocketAddr>,
    configured: Vec<SocketAddr>,
    /// The metadata servers as they told them last.
    servers: Vec<SocketAddr>,
    next_addr: usize,
    link: Link,
    attempts: u32,
    calls: BTreeMap<u64, Pending>,
    next_id: u64,
    ready: VecDeque<u64>,
    delayed: BTreeMap<(Instant, u64), ()>,
    unanswered: BTreeMap<u64, u64>,
    next_sequence: u64,
    client: Option<ClientId>,
    cluster: Option<ClusterId>,
    opening: bool,
    nonce: u64,
    term: Duration,
    renewed_at: Option<Instant>,
    next_renew: Instant,
    renewing: bool,
    tick_at: Option<Instant>,
    in_flight: usize,
    closing: bool,
    wanted: bool,
    open: MdsRequest,
    /// Answers to hand on, drained by the core.
    pub(crate) answers: VecDeque<(Waiter, Result<MdsReply, MdsError>)>,
    /// News to hand on, drained by the core.
    pub(crate) pushes: VecDeque<Push>,
    /// The session that ended: every lease is lost. Taken by the core.
    pub(crate) ended: Option<ClientId>,
    /// How the last attempt to reach a server ended, per address, for people.
    pub(crate) failures: BTreeMap<SocketAddr, String>,
    /// Attempts that failed since the last success.
    pub(crate) failed_attempts: u64,
    /// Why the session could not be opened, when a server said so.
    pub(crate) refused: Option<MdsError>,
}

impl Session {
    pub(crate) fn new(config: &CoreConfig) -> Self {
        Self {
            addrs: config.mds.clone(),
            configured: config.mds.clone(),
            servers: Vec::new(),
            next_addr: 0,
            link: Link::Down { retry_at: Instant(0) },
            attempts: 0,
            calls: BTreeMap::new(),
            next_id: 0,
            ready: VecDeque::new(),
            delayed: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            next_sequence: 1,
            client: None,
            cluster: None,
            opening: false,
            nonce: 0,
            term: TERM_DEFAULT,
            renewed_at: None,
            next_renew: Instant(0),
            renewing: false,
            tick_at: None,
            in_flight: 0,
            closing: false,
            wanted: config.kind == SessionKind::Client,
            open: MdsRequest::SessionOpen {
                kind: config.kind,
                host: config.host,
                host_name: config.host_name.clone(),
                purpose: config.purpose.clone(),
                nonce: 0,
            },
            answers: VecDeque::new(),
            pushes: VecDeque::new(),
            ended: None,
            failures: BTreeMap::new(),
            failed_attempts: 0,
            refused: None,
        }
    }

    /// The session's id, once open.
    pub(crate) fn client(&self) -> Option<ClientId> {
        self.client
    }

    /// The cluster's identity, once a session was opened.
    pub(crate) fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// True when an authenticated link to a metadata server stands.
    pub(crate) fn is_linked(&self) -> bool {
        matches!(self.link, Link::Up { .. })
    }

    /// True while the lease is known to be alive by the clock (rule 11); otherwise reads are verified.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        planted!("holder_trusts_its_clock_too_long")
            || self.renewed_at.is_some_and(|at| now.saturating_since(at) < self.term.saturating_sub(DRIFT_MARGIN))
    }

    /// Begins: links up and opens the session.
    pub(crate) fn start(&mut self, io: &mut Io<'_>) {
        self.nonce = io.rng.next_u64();
        self.next_addr = io.rng.below(self.addrs.len().max(1) as u64) as usize;
        self.pump(io);
    }

    /// The metadata servers as they told them last; empty before.
    pub(crate) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// The metadata servers are these: they are tried first, and those configured remain for bad days. Others are
    /// forgotten, however many there were while this client ran.
    pub(crate) fn learn_servers(&mut self, servers: Vec<SocketAddr>) {
        if servers.is_empty() || servers == self.servers {
            return;
        }
        let present = self.addrs.get(self.next_addr % self.addrs.len().max(1)).copied();
        self.addrs.clear();
        for addr in servers.iter().chain(&self.configured).take(ADDRESSES_MAX) {
            if !self.addrs.contains(addr) {
                self.addrs.push(*addr);
            }
        }
        self.servers = servers;
        // The link in use stays the one counted from; one that is no longer listed is followed by the first.
        let at = present.and_then(|present| self.addrs.iter().position(|addr| *addr == present));
        self.next_addr = at.unwrap_or(self.addrs.len() - 1);
    }

    /// Place of a leader that was named among the addresses; the last place is given up for it when there are too many.
    fn place_of(&mut self, addr: SocketAddr) -> usize {
        if let Some(at) = self.addrs.iter().position(|known| *known == addr) {
            return at;
        }
        self.addrs.truncate(ADDRESSES_MAX - 1);
        self.addrs.push(addr);
        self.addrs.len() - 1
    }

    /// Asks the metadata servers; the answer comes through [`Session::answers`].
    pub(crate) fn call(&mut self, io: &mut Io<'_>, request: MdsRequest, waiter: Waiter, deadline: Option<Instant>) {
        if self.closing || (deadline.is_some() && self.calls.len() >= CALLS_MAX) {
            let why = if self.closing { "the client is shutting down" } else { "too many calls are waiting" };
            self.answers.push_back((waiter, Err(MdsError::Unavailable(why.to_owned()))));
            return;
        }
        self.wanted |= !request.is_read();
        self.enqueue(io, request, waiter, deadline);
        self.pump(io);
    }

    fn enqueue(&mut self, io: &mut Io<'_>, request: MdsRequest, waiter: Waiter, deadline: Option<Instant>) {
        self.next_id += 1;
        let first = matches!(request, MdsRequest::SessionOpen { .. } | MdsRequest::SessionRenew);
        let pending = Pending {
            request,
            waiter,
            sequence: 0,
            deadline,
            attempts: 0,
            sent_at: None,
            ever_sent: false,
            wall_ns: io.wall_ns,
            last_error: None,
        };
        self.calls.insert(self.next_id, pending);
        if first {
            self.ready.push_front(self.next_id);
        } else {
            self.ready.push_back(self.next_id);
        }
    }

    /// Closes the session after everything asked so far, then the link.
    pub(crate) fn close(&mut self, io: &mut Io<'_>) {
        if self.client.is_some() {
            self.enqueue(io, MdsRequest::SessionClose, Waiter::Nobody, Some(io.now + Duration::from_secs(2)));
        }
        self.closing = true;
        self.pump(io);
    }

    /// True after [`Session::close`].
    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    /// True when nothing is left to be said after [`Session::close`].
    pub(crate) fn is_closed(&self) -> bool {
        self.closing && !self.calls.values().any(|call| matches!(call.request, MdsRequest::SessionClose))
    }

    /// Drops the link now.
    pub(crate) fn hang_up(&mut self, io: &mut Io<'_>) {
        if let Link::Up { link, .. } | Link::Connecting { link, .. } = self.link {
            io.close(link);
        }
        self.link = Link::Down { retry_at: Instant(u64::MAX) };
    }

    fn may_send(&self, call: &Pending, now: Instant) -> bool {
        match call.request {
            MdsRequest::SessionOpen { .. } => true,
            _ if call.request.is_read() => true,
            _ => {
                let span = self.unanswered.keys().next().map_or(0, |oldest| self.next_sequence - oldest);
                // In a session that may have run out only the renewal is sent: a call that was never sent goes on in
                // the next session, one that was sent would have an unknown outcome.
                let renews = matches!(call.request, MdsRequest::SessionRenew);
                self.client.is_some() && (call.sequence != 0 || (span < CALL_WINDOW && (renews || self.is_fresh(now))))
            }
        }
    }

    fn is_numbered(request: &MdsRequest) -> bool {
        !request.is_read() && !matches!(request, MdsRequest::SessionOpen { .. } | MdsRequest::SessionRenew)
    }

    /// Opens what must be open, sends what can be sent, and sees to it that it is woken.
    fn pump(&mut self, io: &mut Io<'_>) {
        if let Link::Down { retry_at } = self.link
            && retry_at <= io.now
            && !self.addrs.is_empty()
        {
            let addr = self.addrs[self.next_addr % self.addrs.len()];
            let link = io.connect(addr, LinkUse::Mds);
            self.link = Link::Connecting { link, since: io.now };
        }
        if let Link::Up { link, .. } = self.link {
            if self.client.is_none() && self.wanted && !self.opening && !self.closing {
                self.opening = true;
                let mut request = self.open.clone();
                if let MdsRequest::SessionOpen { nonce, .. } = &mut request {
                    *nonce = self.nonce;
                }
                self.enqueue(io, request, Waiter::Open, None);
            }
            if self.client.is_some() && !self.renewing && !self.closing && io.now >= self.next_renew {
                self.renewing = true;
                self.next_renew = io.now + RENEW_EVERY;
                self.enqueue(io, MdsRequest::SessionRenew, Waiter::Renew, None);
            }
            self.send_ready(io, link);
        }
        self.arm(io);
    }

    fn send_ready(&mut self, io: &mut Io<'_>, link: LinkId) {
        let mut kept = VecDeque::new();
        while let Some(id) = self.ready.pop_front() {
            let Some(call) = self.calls.get(&id) else { continue };
            if call.sent_at.is_some() {
                continue;
            }
            if !self.may_send(call, io.now) || self.in_flight >= 4 * CALL_WINDOW as usize {
                kept.push_back(id);
                continue;
            }
            let numbered = Self::is_numbered(&call.request);
            let call = self.calls.get_mut(&id).expect("just seen");
            if numbered && call.sequence == 0 {
                call.sequence = self.next_sequence;
                self.next_sequence += 1;
                self.unanswered.insert(call.sequence, id);
            }
            let oldest = self.unanswered.keys().next().copied().unwrap_or(self.next_sequence);
            let opens = matches!(call.request, MdsRequest::SessionOpen { .. });
            let session = if opens { ClientId(0) } else { self.client.unwrap_or(ClientId(0)) };
            // The request is moved through the envelope and back: some are large.
            let envelope = Call {
                session,
                sequence: call.sequence,
                acknowledged: oldest - 1,
                wall_ns: call.wall_ns,
                request: std::mem::replace(&mut call.request, MdsRequest::SessionRenew),
            };
            io.out.send(link, FrameKind::MdsCall, id, cairn_wire::encode(&envelope));
            call.request = envelope.request;
            call.sent_at = Some(io.now);
            call.ever_sent = true;
            self.in_flight += 1;
        }
        self.ready = kept;
    }

    fn arm(&mut self, io: &mut Io<'_>) {
        let busy = !self.calls.is_empty() || !self.is_linked();
        let wish = if busy { io.now + TICK_BUSY } else { self.next_renew.max(io.now + TICK_BUSY) };
        let idle = !busy && self.client.is_none();
        if !idle && self.tick_at.is_none_or(|at| at > wish || at <= io.now) {
            self.tick_at = Some(wish);
            io.timers.after(io.now, wish.saturating_since(io.now), Timer::Session);
        }
    }

    /// Time passed. `slept` is how long nobody looked: a pause of our own is not the server's silence.
    pub(crate) fn tick(&mut self, io: &mut Io<'_>, slept: bool) {
        self.tick_at = None;
        match self.link {
            Link::Connecting { link, since } if io.now.saturating_since(since) > CONNECT_MAX => {
                io.close(link);
                self.unlinked(io, "no answer to the connection");
            }
            Link::Up { link, .. } if slept => self.link = Link::Up { link, heard: io.now },
            Link::Up { link, heard } => {
                let owed = self.in_flight > 0
                    && self
                        .calls
                        .values()
                        .filter_map(|call| call.sent_at)
                        .min()
                        .is_some_and(|oldest| io.now.saturating_since(oldest.max(heard)) > SILENCE_MAX);
                if owed {
                    io.close(link);
                    self.unlinked(io, "the server stopped answering");
                }
            }
            _ => {}
        }
        while let Some((&(at, id), ())) = self.delayed.first_key_value() {
            if at > io.now {
                break;
            }
            self.delayed.pop_first();
            self.ready.push_back(id);
        }
        let late: Vec<u64> =
            self.calls.iter().filter(|(_, c)| c.deadline.is_some_and(|d| d <= io.now)).map(|(id, _)| *id).collect();
        for id in late {
            let call = self.calls.get(&id).expect("just seen");
            let error = call.last_error.clone().unwrap_or_else(|| {
                MdsError::Unavailable(format!("no metadata server answered in time{}", self.why_not()))
            });
            self.finish(id, Err(error));
        }
        self.pump(io);
    }

    /// The last failures, for people.
    pub(crate) fn why_not(&self) -> String {
        self.failures.iter().map(|(addr, why)| format!("; {addr}: {why}")).collect()
    }

    /// The link is up.
    pub(crate) fn on_up(&mut self, io: &mut Io<'_>, link: LinkId) {
        let Link::Connecting { link: expected, .. } = self.link else { return };
        if expected != link {
            return;
        }
        self.link = Link::Up { link, heard: io.now };
        self.failures.clear();
        self.failed_attempts = 0;
        // A server knows where to push to from the calls on a link: say hello at once.
        self.next_renew = io.now;
        self.pump(io);
    }

    /// The link ended or could not be opened.
    pub(crate) fn on_down(&mut self, io: &mut Io<'_>, reason: &str) {
        self.unlinked(io, reason);
        self.pump(io);
    }

    fn unlinked(&mut self, io: &mut Io<'_>, reason: &str) {
        if !self.addrs.is_empty() {
            let addr = self.addrs[self.next_addr % self.addrs.len()];
            self.failures.insert(addr, reason.to_owned());
        }
        self.failed_attempts += 1;
        self.next_addr = self.next_addr.wrapping_add(1);
        self.reconnect_later(io);
    }

    fn reconnect_later(&mut self, io: &mut Io<'_>) {
        let rounds = self.attempts / self.addrs.len().max(1) as u32;
        let base = BACKOFF_FIRST.saturating_mul(1 << rounds.min(5)).min(BACKOFF_MAX);
        let jitter = Duration::from_nanos(io.rng.below(base.as_nanos() as u64 / 2 + 1));
        self.attempts = self.attempts.saturating_add(1);
        self.link = Link::Down { retry_at: io.now + base / 2 + jitter };
        self.requeue_all();
    }

    fn requeue_all(&mut self) {
        self.in_flight = 0;
        self.delayed.clear();
        self.ready = self.calls.keys().copied().collect();
        // Session calls first: nothing else can be answered without them.
        let (mut first, rest): (VecDeque<u64>, VecDeque<u64>) =
            std::mem::take(&mut self.ready).into_iter().partition(|id| {
                matches!(self.calls[id].request, MdsRequest::SessionOpen { .. } | MdsRequest::SessionRenew)
            });
        first.extend(rest);
        self.ready = first;
        self.calls.values_mut().for_each(|call| call.sent_at = None);
    }

    /// A frame from the metadata server. Garbage closes the link.
    pub(crate) fn on_frame(&mut self, io: &mut Io<'_>, link: LinkId, frame: &Frame) {
        let Link::Up { link: current, .. } = self.link else { return };
        if current != link {
            return;
        }
        self.link = Link::Up { link, heard: io.now };
        match frame.kind {
            FrameKind::MdsPush => match cairn_wire::decode::<Push>("push", &frame.prefix) {
                Ok(push) => self.pushes.push_back(push),
                Err(error) => self.garbage(io, link, &error.to_string()),
            },
            FrameKind::MdsReply => {
                match cairn_wire::decode::<Result<MdsReply, MdsError>>("metadata reply", &frame.prefix) {
                    Ok(result) => self.on_answer(io, frame.id, result),
                    Err(error) => self.garbage(io, link, &error.to_string()),
                }
            }
            kind => self.garbage(io, link, &format!("unexpected frame {kind:?}")),
        }
        self.pump(io);
    }

    fn garbage(&mut self, io: &mut Io<'_>, link: LinkId, what: &str) {
        io.close(link);
        self.unlinked(io, what);
    }

    fn on_answer(&mut self, io: &mut Io<'_>, id: u64, result: Result<MdsReply, MdsError>) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        if call.sent_at.is_none() {
            return;
        }
        match result {
            Err(MdsError::NotLeader { leader }) => {
                call.last_error = Some(MdsError::NotLeader { leader });
                self.follow(io, leader);
            }
            Err(error @ (MdsError::Unavailable(_) | MdsError::Unknown)) => {
                call.sent_at = None;
                call.attempts += 1;
                call.last_error = Some(error);
                self.in_flight -= 1;
                let base = BACKOFF_FIRST.saturating_mul(1 << call.attempts.min(4)).min(BACKOFF_MAX);
                let jitter = Duration::from_nanos(io.rng.below(base.as_nanos() as u64 / 2 + 1));
                self.delayed.insert((io.now + base + jitter, id), ());
            }
            Err(MdsError::SessionEnded(client)) if self.client.is_none_or(|mine| mine == client) => {
                if self.client.is_some() {
                    self.lost_session(io);
                } else {
                    self.finish(id, Err(MdsError::SessionEnded(client)));
                }
            }
            result => self.finish(id, result),
        }
    }

    /// Turns to the leader, or to the next server when nobody knows it.
    fn follow(&mut self, io: &mut Io<'_>, leader: Option<SocketAddr>) {
        let Link::Up { link, .. } = self.link else { return };
        io.close(link);
        match leader {
            Some(addr) => {
                // Two servers that point at each other must not make us spin: only the first hop is free.
                let at = self.place_of(addr);
                let same = at == self.next_addr % self.addrs.len();
                self.next_addr = at;
                self.reconnect_later(io);
                if !same && self.attempts <= 2 {
                    self.link = Link::Down { retry_at: io.now };
                }
            }
            None => {
                self.next_addr = self.next_addr.wrapping_add(1);
                self.reconnect_later(io);
            }
        }
    }

    /// Ends a call.
    fn finish(&mut self, id: u64, result: Result<MdsReply, MdsError>) {
        let Some(call) = self.calls.remove(&id) else { return };
        if call.sent_at.is_some() {
            self.in_flight -= 1;
        }
        if call.sequence != 0 {
            self.unanswered.remove(&call.sequence);
        }
        match call.waiter {
            Waiter::Open => {
                self.opening = false;
                match result {
                    Ok(MdsReply::Session { client, term_ms, cluster }) => {
                        self.client = Some(client);
                        self.cluster = Some(cluster);
                        self.term = Duration::from_millis(u64::from(term_ms));
                        self.renewed_at = call.sent_at;
                        self.next_renew = call.sent_at.unwrap_or_default() + RENEW_EVERY;
                        self.attempts = 0;
                        self.refused = None;
                    }
                    Ok(other) => self.refused = Some(MdsError::Invalid(format!("unexpected answer {other:?}"))),
                    Err(error) => self.refused = Some(error),
                }
            }
            Waiter::Renew => {
                self.renewing = false;
                if result.is_ok() {
                    self.renewed_at = self.renewed_at.max(call.sent_at);
                    self.attempts = 0;
                }
            }
            waiter => self.answers.push_back((waiter, result)),
        }
    }

    /// The session is over: leases are lost; calls of unknown outcome end, the others go on in a new session.
    fn lost_session(&mut self, io: &mut Io<'_>) {
        let client = self.client.take().expect("only an open session ends");
        self.ended = Some(client);
        self.renewed_at = None;
        self.nonce = io.rng.next_u64();
        let over: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, call)| {
                !call.request.is_read()
                    && (call.ever_sent || matches!(call.waiter, Waiter::Volume(..) | Waiter::Released(_)))
            })
            .map(|(id, _)| *id)
            .collect();
        over.into_iter().for_each(|id| self.finish(id, Err(MdsError::SessionEnded(client))));
        self.renewing = false;
        self.unanswered.clear();
        self.next_sequence = 1;
        assert!(self.calls.values().all(|call| call.sequence == 0), "no number outlives its session");
    }
}
