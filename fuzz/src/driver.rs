//! A core with the rest of the world played by a script: whoever is linked to it says what the script says.

use crate::alloc::measured;
use crate::script;
use cairn_env::Buf;
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_types::{BLOCK_SIZE, ClientId, CsId, Duration, Instant, Level, MdsId, NodeId};
use cairn_wire::data::DATA_HEADER_SIZE;
use cairn_wire::{DiskIndex, Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::{BTreeMap, VecDeque};

/// A new link from somebody; the piece says who.
pub const ACCEPT: u8 = 11;
/// Time passes: milliseconds (u16).
pub const WAIT: u8 = 12;
/// A link goes down.
pub const DOWN: u8 = 13;
/// Something the user of the core asks.
pub const USE: u8 = 14;

/// Frame kinds by number.
const KINDS: [FrameKind; 9] = [
    FrameKind::MdsCall,
    FrameKind::MdsReply,
    FrameKind::MdsPush,
    FrameKind::CsCall,
    FrameKind::CsReply,
    FrameKind::Data,
    FrameKind::DataReply,
    FrameKind::Raft,
    FrameKind::Image,
];
/// Completions of the disk in answer to one event.
const DISK_STEPS_MAX: usize = 2000;
/// Blocks of payload that come with one frame.
const PAYLOAD_BLOCKS_MAX: usize = 16;

/// A core and its world.
pub struct Driver<P> {
    pub core: P,
    disk: Option<SimDisk>,
    now: u64,
    rng: Rng,
    /// Requests the core has sent and not had answered, by link.
    asked: BTreeMap<LinkId, VecDeque<u64>>,
    accepted: u64,
    wake_at: Option<Instant>,
    zeros: Buf,
    dead: bool,
}

/// The piece of a frame on a link: which one, then the prefix.
pub fn frame(kind: FrameKind, link: u8, prefix: &[u8]) -> (u8, Vec<u8>) {
    (kind as u8, [&[link], prefix].concat())
}

impl<P: Process> Driver<P> {
    /// Starts a core.
    pub fn new(core: P, disk: Option<SimDisk>) -> Self {
        let mut driver = Self {
            core,
            disk,
            now: 1_000_000_000,
            rng: Rng::new(1),
            asked: BTreeMap::new(),
            accepted: 0,
            wake_at: None,
            zeros: Buf::zeroed(PAYLOAD_BLOCKS_MAX * BLOCK_SIZE),
            dead: false,
        };
        driver.step(Event::Start);
        driver
    }

    /// The clocks.
    pub fn now(&self) -> Now {
        Now { mono: Instant(self.now), wall_ns: self.now }
    }

    /// An event, and everything that follows from it on the disk.
    fn step(&mut self, event: Event) {
        let mut next = Some(event);
        for _ in 0..DISK_STEPS_MAX {
            if let Some(event) = next.take() {
                let mut out = Effects::default();
                self.core.step(self.now(), event, &mut out);
                self.carry_out(out);
            }
            let done = self.disk.as_mut().and_then(|disk| disk.complete_next(&mut self.rng));
            match done {
                Some(done) => next = Some(Event::Disk(DiskIndex(0), done)),
                None => {
                    let mut out = Effects::default();
                    self.core.step(self.now(), Event::Turn, &mut out);
                    self.carry_out(out);
                    if self.disk.as_ref().is_none_or(SimDisk::is_idle) {
                        return;
                    }
                }
            }
        }
    }

    /// Does what the core wants. A link it opens comes up at once.
    pub fn carry_out(&mut self, out: Effects) {
        self.dead |= out.fatal.is_some();
        if let Some(disk) = &mut self.disk {
            out.disk.into_iter().for_each(|(_, request)| disk.submit(request));
        }
        if let Some(at) = out.wake_at {
            self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
        }
        let mut opened = Vec::new();
        for effect in out.net {
            match effect {
                NetEffect::Connect { link, .. } => {
                    self.asked.entry(link).or_default();
                    opened.push(link);
                }
                NetEffect::Close { link } => drop(self.asked.remove(&link)),
                NetEffect::Send { link, kind, id, prefix, payload } => {
                    assert!(prefix.len() <= cairn_wire::frame::FRAME_PREFIX_MAX, "a prefix of {} bytes", prefix.len());
                    let payload_len: usize = payload.iter().map(|piece| piece.len()).sum();
                    assert!(payload_len <= cairn_wire::frame::FRAME_PAYLOAD_MAX, "a payload of {payload_len} bytes");
                    let is_question = matches!(kind, FrameKind::MdsCall | FrameKind::CsCall | FrameKind::Data);
                    if let Some(asked) = self.asked.get_mut(&link).filter(|_| is_question) {
                        asked.push_back(id);
                    }
                }
            }
        }
        for link in opened {
            let mut out = Effects::default();
            let up = NetEvent::Up { link, peer: NodeId::Mds(MdsId(1)), level: Level::CURRENT };
            self.core.step(self.now(), Event::Net(up), &mut out);
            self.carry_out(out);
        }
    }

    fn accept(&mut self, who: &[u8]) {
        self.accepted += 1;
        let link = LinkId(LinkId::ACCEPTED | self.accepted);
        self.asked.insert(link, VecDeque::new());
        let number = who.get(1).copied().unwrap_or(0);
        let kind = who.first().copied().unwrap_or(0);
        // The handshake lets neighbours in.
        let level = Level(Level::OLDEST.0 + u32::from(kind / 3 % 3));
        let peer = match kind % 3 {
            0 => NodeId::Client(ClientId(u64::from(number))),
            1 => NodeId::Cs(CsId(1024 + u32::from(number))),
            _ => NodeId::Mds(MdsId(u64::from(number))),
        };
        self.step(Event::Net(NetEvent::Up { link, peer, level }));
    }

    fn link(&self, which: u8) -> Option<LinkId> {
        let links: Vec<LinkId> = self.asked.keys().copied().collect();
        links.get(usize::from(which) % links.len().max(1)).copied()
    }

    fn hear(&mut self, kind: FrameKind, piece: &[u8]) {
        let Some((which, prefix)) = piece.split_first() else { return };
        let Some(link) = self.link(*which & 15) else { return };
        let asked = self.asked.entry(link).or_default();
        let is_answer = matches!(kind, FrameKind::MdsReply | FrameKind::CsReply | FrameKind::DataReply);
        // Mostly the oldest question is answered; with the top bit set, one that nobody asked.
        let id = match is_answer && *which & 128 == 0 {
            true => asked.pop_front().unwrap_or(0),
            false => u64::from(*which),
        };
        // Checksums at the end of a prefix stand for blocks of zeros.
        let head = match kind {
            FrameKind::Data => DATA_HEADER_SIZE,
            FrameKind::DataReply => size_of::<cairn_wire::data::DataReplyHeader>(),
            _ => usize::MAX,
        };
        let blocks = (prefix.len().saturating_sub(head) / 8).min(PAYLOAD_BLOCKS_MAX);
        let payload = self.zeros.slice(0, blocks * BLOCK_SIZE);
        let frame = Frame { kind, id, prefix: prefix.to_vec(), payload };
        self.step(Event::Net(NetEvent::Frame { link, frame }));
    }

    fn wait(&mut self, piece: &[u8]) {
        let number = |at: usize| u64::from(piece.get(at).copied().unwrap_or(0));
        let until = self.now + (number(0) | number(1) << 8) * 1_000_000;
        // Timers on the way ring on the way, though not without end.
        for _ in 0..32 {
            let Some(at) = self.wake_at.filter(|at| at.0 <= until) else { break };
            self.wake_at = None;
            self.now = self.now.max(at.0) + Duration::from_micros(1).as_nanos() as u64;
            self.step(Event::Timer);
        }
        self.now = self.now.max(until);
        self.step(Event::Timer);
    }

    /// Plays a script; `user` does what a piece of kind [`USE`] says.
    pub fn play(&mut self, bytes: &[u8], mut user: impl FnMut(&mut Self, &[u8])) {
        for (kind, piece) in script::pieces(bytes) {
            if self.dead {
                return;
            }
            measured(bytes.len(), || match kind & 15 {
                ACCEPT => self.accept(piece),
                WAIT => self.wait(piece),
                DOWN => {
                    if let Some(link) = self.link(piece.first().copied().unwrap_or(0)) {
                        self.asked.remove(&link);
                        self.step(Event::Net(NetEvent::Down { link, reason: "the script says so".into() }));
                    }
                }
                USE => {
                    user(self, piece);
                    self.step(Event::Turn);
                }
                number => {
                    if let Some(kind) = KINDS.into_iter().find(|kind| *kind as u8 == number) {
                        self.hear(kind, piece);
                    }
                }
            });
        }
    }
}
