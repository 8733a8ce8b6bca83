//! Links to chunk servers: pipelined requests, resending after a broken link, failure detection.
//!
//! A request stays in its server's window until it is answered or cancelled, and is sent again, with the same number
//! and the same bytes, when the link was lost and came back. A new link begins with `Hello` and a higher generation,
//! which ends the older link at the server: no packet of the old one can be executed after one of the new.
//!
//! A server is *unreachable* when its link has been down for [`RECONNECT_WITHIN`] (an attempt under way may take
//! [`CONNECT_WITHIN`]), or it owes answers and was silent for [`SILENCE_MAX`]. It is reported again every second while
//! somebody waits for it. Who waits decides what to do; the link is tried on as long as the window holds anything.

use crate::config::{CONNECT_WITHIN, LINK_WINDOW, RECONNECT_WITHIN, REQUEST_MAX, SILENCE_MAX};
use crate::io::{Io, LinkUse};
use crate::timers::Timer;
use cairn_env::Buf;
use cairn_types::{ClientId, CsId, Duration, HostId, Instant};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::DataReply;
use cairn_wire::mds::CsInfo;
use cairn_wire::{Frame, FrameKind, LinkId, NetEffect};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

const TICK: Duration = Duration::from_millis(100);
const TICK_UP: Duration = Duration::from_millis(500);
const REPORT_EVERY: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Ids between the oldest unanswered request and the newest.
const SPAN_MAX: usize = 8 * LINK_WINDOW;
/// Frame id of the hello; requests count from 1.
const HELLO: u64 = 0;

/// A request as it travels; shared by all replicas it goes to.
pub(crate) struct Packet {
    pub kind: FrameKind,
    pub prefix: Vec<u8>,
    pub payload: Vec<Buf>,
}

/// What a rare call was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CallFor {
    Fence,
    /// Create or raise of a chunk, with the round of preparation it belongs to.
    Prepare {
        index: u64,
        round: u32,
    },
    Tail,
    Settle,
    Extents {
        part: u64,
    },
}

/// Who waits for an answer; `volume` is the key of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    Write {
        volume: u64,
        part: u64,
        slot: u16,
    },
    Read {
        volume: u64,
        part: u64,
        slot: u16,
    },
    Confirm {
        volume: u64,
        part: u64,
        slot: u16,
        attempt: u32,
    },
    Flush {
        volume: u64,
        op: u64,
        slot: u16,
    },
    Call {
        volume: u64,
        slot: u16,
        call: CallFor,
    },
    /// Whoever waited does not any more.
    Nobody,
}

impl Owner {
    /// True for what belongs to a read, which can be asked elsewhere.
    pub(crate) fn reads(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Confirm { .. } | Self::Call { call: CallFor::Extents { .. }, .. })
    }

    /// The volume and its slot of the server.
    pub(crate) fn place(&self) -> (u64, u16) {
        match *self {
            Self::Write { volume, slot, .. }
            | Self::Read { volume, slot, .. }
            | Self::Confirm { volume, slot, .. }
            | Self::Flush { volume, slot, .. }
            | Self::Call { volume, slot, .. } => (volume, slot),
            Self::Nobody => (0, 0),
        }
    }
}

/// An answer to hand on.
pub(crate) enum Answer {
    Data(DataReply, Buf),
    Call(Result<CsReply, CsError>),
}

/// News of a server for the volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ServerEvent {
    /// The link broke: reads go elsewhere at once.
    Lost(u32),
    /// The link stands; resending follows the volumes' look at `boot`.
    Up(u32, u64),
    /// See the module.
    Unreachable(u32),
}

struct Sent {
    packet: Rc<Packet>,
    owner: Owner,
    at: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nobody needs it.
    Idle,
    Waiting {
        retry_at: Instant,
    },
    Connecting {
        link: LinkId,
        since: Instant,
    },
    Greeting {
        link: LinkId,
        since: Instant,
    },
    /// The server has greeted; the volumes look at its boot number before anything is sent.
    Greeted {
        link: LinkId,
    },
    Up {
        link: LinkId,
    },
}

struct Server {
    cs: CsId,
    addr: Option<SocketAddr>,
    host: Option<HostId>,
    state: State,
    generation: u64,
    base: u64,
    window: VecDeque<Option<Sent>>,
    in_flight: usize,
    waiting: VecDeque<Sent>,
    heard: Instant,
    down_since: Option<Instant>,
    attempts: u32,
    reported: Option<Instant>,
    armed: bool,
}

impl Server {
    /// Takes what nobody waits for out of the window.
    fn bury(&mut self) {
        for place in &mut self.window {
            if place.as_ref().is_some_and(|sent| sent.owner == Owner::Nobody) {
                *place = None;
                self.in_flight -= 1;
            }
        }
        self.trim();
    }

    fn trim(&mut self) {
        while matches!(self.window.front(), Some(None)) {
            self.window.pop_front();
            self.base += 1;
        }
    }
}

/// All chunk servers ever needed. Numbers are never reused; a cluster has some hundreds.
#[derive(Default)]
pub(crate) struct Servers {
    servers: Vec<Server>,
    numbers: BTreeMap<CsId, u32>,
    session: Option<ClientId>,
    /// News for the volumes, drained by the core.
    pub(crate) events: VecDeque<ServerEvent>,
    /// A needed server has no known address: the topology is to be fetched.
    pub(crate) wants_topology: bool,
}

impl Servers {
    /// The number of a server.
    pub(crate) fn number(&mut self, cs: CsId) -> u32 {
        if let Some(number) = self.numbers.get(&cs) {
            return *number;
        }
        let number = self.servers.len() as u32;
        self.servers.push(Server {
            cs,
            addr: None,
            host: None,
            state: State::Idle,
            generation: 0,
            base: 1,
            window: VecDeque::new(),
            in_flight: 0,
            waiting: VecDeque::new(),
            heard: Instant(0),
            down_since: None,
            attempts: 0,
            reported: None,
            armed: false,
        });
        self.numbers.insert(cs, number);
        number
    }

    fn at(&mut self, number: u32) -> &mut Server {
        &mut self.servers[number as usize]
    }

    /// The state of the link and what is asked on it, for people.
    pub(crate) fn explain(&self, number: u32) -> String {
        let server = &self.servers[number as usize];
        let asked: Vec<String> = server.window.iter().flatten().map(|sent| format!("{:?}", sent.owner)).collect();
        let (state, addr, waiting) = (server.state, server.addr, server.waiting.len());
        format!("link {state:?} to {addr:?}, asked [{}], {waiting} more to send", asked.join(", "))
    }

    /// True when requests go out at once.
    pub(crate) fn is_up(&self, number: u32) -> bool {
        matches!(self.servers[number as usize].state, State::Up { .. })
    }

    /// Requests under way or waiting.
    pub(crate) fn load(&self, number: u32) -> usize {
        let server = &self.servers[number as usize];
        server.in_flight + server.waiting.len()
    }

    /// True when the server runs on `host`.
    pub(crate) fn is_on(&self, number: u32, host: HostId) -> bool {
        self.servers[number as usize].host == Some(host)
    }

    /// New links say hello as this session.
    pub(crate) fn set_session(&mut self, session: ClientId) {
        self.session = Some(session);
    }

    /// What the metadata servers know.
    pub(crate) fn learn(&mut self, io: &mut Io<'_>, infos: &[CsInfo]) {
        for info in infos {
            let number = self.number(info.cs);
            let server = self.at(number);
            let moved = server.addr != Some(info.addr);
            server.addr = Some(info.addr);
            server.host = Some(info.location.host);
            let wanted = !matches!(server.state, State::Idle | State::Up { .. });
            if moved && wanted {
                if let State::Connecting { link, .. } | State::Greeting { link, .. } = server.state {
                    io.close(link);
                }
                self.connect(io, number);
            }
        }
    }

    /// Sends a request, now or when its turn comes.
    pub(crate) fn send(&mut self, io: &mut Io<'_>, number: u32, packet: Rc<Packet>, owner: Owner) {
        let now = io.now;
        let server = self.at(number);
        server.waiting.push_back(Sent { packet, owner, at: now });
        match server.state {
            State::Up { .. } => self.fill(io, number),
            State::Idle => self.connect(io, number),
            _ => {}
        }
        self.arm(io, number);
    }

    /// Sends a rare call.
    pub(crate) fn call(&mut self, io: &mut Io<'_>, number: u32, request: &CsRequest, owner: Owner) {
        let packet = Packet { kind: FrameKind::CsCall, prefix: cairn_wire::encode(request), payload: Vec::new() };
        self.send(io, number, Rc::new(packet), owner);
    }

    fn fill(&mut self, io: &mut Io<'_>, number: u32) {
        let server = self.at(number);
        let State::Up { link } = server.state else { return };
        while server.in_flight < LINK_WINDOW && server.window.len() < SPAN_MAX {
            let Some(mut sent) = server.waiting.pop_front() else { return };
            sent.at = io.now;
            let id = server.base + server.window.len() as u64;
            transmit(io, link, id, &sent.packet);
            server.window.push_back(Some(sent));
            server.in_flight += 1;
        }
    }

    /// Forgets the requests `doomed` names: an answer, if one comes, is for nobody. One that was sent keeps its place
    /// in the window until the server has answered it or the link is gone, because the server counts it too.
    pub(crate) fn cancel(&mut self, number: u32, doomed: impl Fn(&Owner) -> bool) {
        let server = self.at(number);
        server.waiting.retain(|sent| !doomed(&sent.owner));
        for sent in server.window.iter_mut().flatten() {
            if doomed(&sent.owner) {
                sent.owner = Owner::Nobody;
            }
        }
        if !matches!(server.state, State::Up { .. }) {
            server.bury();
        }
    }

    /// Takes out the requests `wanted` names and returns their owners in order of sending.
    pub(crate) fn take_back(&mut self, number: u32, wanted: impl Fn(&Owner) -> bool) -> Vec<Owner> {
        let server = &self.servers[number as usize];
        let window = server.window.iter().flatten();
        let owners = window.chain(&server.waiting).map(|sent| sent.owner).filter(|owner| wanted(owner)).collect();
        self.cancel(number, wanted);
        owners
    }

    /// Owners of everything waiting for this server.
    pub(crate) fn owners(&self, number: u32) -> Vec<Owner> {
        let server = &self.servers[number as usize];
        server.window.iter().flatten().chain(&server.waiting).map(|sent| sent.owner).collect()
    }

    fn connect(&mut self, io: &mut Io<'_>, number: u32) {
        let server = self.at(number);
        server.down_since.get_or_insert(io.now);
        let Some(addr) = server.addr else {
            server.state = State::Waiting { retry_at: io.now + TICK };
            self.wants_topology = true;
            return;
        };
        let link = io.connect(addr, LinkUse::Server(number));
        server.state = State::Connecting { link, since: io.now };
    }

    fn arm(&mut self, io: &mut Io<'_>, number: u32) {
        let server = self.at(number);
        if server.armed {
            return;
        }
        server.armed = true;
        let after = if matches!(server.state, State::Up { .. }) { TICK_UP } else { TICK };
        io.timers.after(io.now, after, Timer::Server(number));
    }

    /// The link is authenticated: say hello.
    pub(crate) fn on_up(&mut self, io: &mut Io<'_>, number: u32, link: LinkId) {
        let session = self.session;
        let server = self.at(number);
        if !matches!(server.state, State::Connecting { link: expected, .. } if expected == link) {
            return;
        }
        server.generation += 1;
        server.state = State::Greeting { link, since: io.now };
        let hello = CsRequest::Hello { session: session.unwrap_or_default().0, generation: server.generation };
        io.out.send(link, FrameKind::CsCall, HELLO, cairn_wire::encode(&hello));
    }

    /// The link ended or could not be opened.
    pub(crate) fn on_down(&mut self, io: &mut Io<'_>, number: u32, reason: &str) {
        self.lost(io, number, reason);
        self.arm(io, number);
    }

    fn lost(&mut self, io: &mut Io<'_>, number: u32, reason: &str) {
        let server = self.at(number);
        let was_up = matches!(server.state, State::Greeted { .. } | State::Up { .. });
        server.down_since.get_or_insert(io.now);
        server.bury();
        let wanted = server.in_flight > 0 || !server.waiting.is_empty();
        let backoff = Duration::from_millis(20).saturating_mul(1 << server.attempts.min(6)).min(BACKOFF_MAX);
        server.attempts += 1;
        let first = was_up && server.attempts == 1;
        server.state = if wanted {
            State::Waiting { retry_at: if first { io.now } else { io.now + backoff } }
        } else {
            State::Idle
        };
        if !wanted {
            server.down_since = None;
        }
        if was_up {
            io.out.log.push(format!("link to {} lost: {reason}", server.cs));
            self.events.push_back(ServerEvent::Lost(number));
        }
        if wanted && first {
            self.connect(io, number);
        }
    }

    /// Time passed. `slept`: nobody looked for a while, so the silence is ours.
    pub(crate) fn tick(&mut self, io: &mut Io<'_>, number: u32, slept: bool) {
        let now = io.now;
        let server = self.at(number);
        server.armed = false;
        if slept {
            server.heard = now;
            server.down_since = server.down_since.map(|_| now);
        }
        let wanted = server.in_flight > 0 || !server.waiting.is_empty();
        match server.state {
            State::Up { link } => {
                let oldest = server.window.iter().flatten().map(|sent| sent.at).next();
                let silent = oldest.is_some_and(|at| {
                    now.saturating_since(at.max(server.heard)) > SILENCE_MAX
                        || (!slept && now.saturating_since(at) > REQUEST_MAX)
                });
                if silent {
                    io.close(link);
                    server.attempts = server.attempts.max(1);
                    self.lost(io, number, "it stopped answering");
                    let server = self.at(number);
                    server.reported = Some(now);
                    self.events.push_back(ServerEvent::Unreachable(number));
                }
            }
            State::Connecting { link, since } | State::Greeting { link, since }
                if now.saturating_since(since) > CONNECT_WITHIN =>
            {
                io.close(link);
                self.lost(io, number, "no answer to the connection");
            }
            State::Waiting { .. } if !wanted => {
                server.state = State::Idle;
                server.down_since = None;
            }
            State::Waiting { retry_at } if retry_at <= now => self.connect(io, number),
            _ => {}
        }
        let server = self.at(number);
        let wanted = server.in_flight > 0 || !server.waiting.is_empty();
        if let Some(since) = server.down_since
            && wanted
        {
            let hoping = matches!(server.state, State::Connecting { .. } | State::Greeting { .. })
                && now.saturating_since(since) < CONNECT_WITHIN;
            let due = server.reported.is_none_or(|at| now.saturating_since(at) >= REPORT_EVERY);
            if now.saturating_since(since) >= RECONNECT_WITHIN && !hoping && due {
                server.reported = Some(now);
                self.wants_topology = true;
                self.events.push_back(ServerEvent::Unreachable(number));
            }
        }
        if wanted || !matches!(self.at(number).state, State::Idle | State::Up { .. }) {
            self.arm(io, number);
        }
    }

    /// A frame of the server's present link. Answers the owner and what came, if somebody waits for it.
    pub(crate) fn on_frame(
        &mut self,
        io: &mut Io<'_>,
        number: u32,
        link: LinkId,
        frame: Frame,
    ) -> Option<(Owner, Answer)> {
        let server = self.at(number);
        server.heard = io.now;
        match server.state {
            State::Up { link: expected } if expected == link => {}
            State::Greeting { link: expected, .. } if expected == link && frame.id == HELLO => {
                self.on_hello(io, number, link, &frame);
                return None;
            }
            _ => return None,
        }
        let answer = match frame.kind {
            FrameKind::DataReply => DataReply::decode(&frame.prefix, frame.payload.len())
                .map(|reply| Answer::Data(reply, frame.payload))
                .map_err(|error| error.to_string()),
            FrameKind::CsReply => {
                cairn_wire::decode("chunk server reply", &frame.prefix).map(Answer::Call).map_err(|e| e.to_string())
            }
            kind => Err(format!("unexpected frame {kind:?}")),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                io.close(link);
                self.lost(io, number, &error);
                self.arm(io, number);
                return None;
            }
        };
        let server = self.at(number);
        let place = usize::try_from(frame.id.checked_sub(server.base)?).ok()?;
        let sent = server.window.get_mut(place)?.take()?;
        server.in_flight -= 1;
        server.trim();
        if !server.waiting.is_empty() {
            self.fill(io, number);
        }
        (sent.owner != Owner::Nobody).then_some((sent.owner, answer))
    }

    fn on_hello(&mut self, io: &mut Io<'_>, number: u32, link: LinkId, frame: &Frame) {
        let reply = cairn_wire::decode::<Result<CsReply, CsError>>("chunk server reply", &frame.prefix);
        let server = self.at(number);
        match reply {
            Ok(Ok(CsReply::Hello { boot })) => {
                server.state = State::Greeted { link };
                server.down_since = None;
                server.reported = None;
                server.attempts = 0;
                self.events.push_back(ServerEvent::Up(number, boot));
            }
            other => {
                io.close(link);
                self.lost(io, number, &format!("its hello failed: {other:?}"));
                self.arm(io, number);
            }
        }
    }

    /// The volumes have looked at the boot number: send what is unanswered, and what waits.
    pub(crate) fn resume(&mut self, io: &mut Io<'_>, number: u32) {
        let server = self.at(number);
        let State::Greeted { link } = server.state else { return };
        server.bury();
        server.state = State::Up { link };
        for (place, sent) in server.window.iter_mut().enumerate() {
            if let Some(sent) = sent {
                sent.at = io.now;
                transmit(io, link, server.base + place as u64, &sent.packet);
            }
        }
        self.fill(io, number);
        self.arm(io, number);
    }

    /// Says goodbye to everybody.
    pub(crate) fn hang_up(&mut self, io: &mut Io<'_>) {
        for server in &mut self.servers {
            if let State::Connecting { link, .. }
            | State::Greeting { link, .. }
            | State::Greeted { link }
            | State::Up { link } = server.state
            {
                io.close(link);
            }
            server.state = State::Idle;
            server.down_since = None;
        }
    }
}

fn transmit(io: &mut Io<'_>, link: LinkId, id: u64, packet: &Packet) {
    io.out.net.push(NetEffect::Send {
        link,
        kind: packet.kind,
        id,
        prefix: packet.prefix.clone(),
        payload: packet.payload.clone(),
    });
}
