//! The seam between a core and the world: events in, effects out.
//!
//! Chunk server, metadata server and client are each one [`Process`]. The shell in `cairn-env-real` drives it with
//! sockets and an io_uring; the simulator drives the same code with virtual time, simulated links and disks. Effects
//! are data: a process never blocks and never sees a socket, a file or a clock.
//!
//! Contract of links: frames of one link arrive in order, each at most once, until the link goes down; then any suffix
//! of what was sent may be lost. A link is authenticated before [`NetEvent::Up`]. The shell ends a reactor turn, after
//! the last event at hand, with [`Event::Turn`]: a process batches its disk writes there.

use crate::frame::{Frame, FrameKind};
use cairn_env::{Buf, DiskDone, DiskRequest};
use cairn_types::{Instant, Level, NodeId};
use std::net::SocketAddr;

/// A link to another process. Ids chosen by the process (for [`NetEffect::Connect`]) have the top bit clear and rise;
/// ids of accepted links have it set. Never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LinkId(pub u64);

impl LinkId {
    /// Set in the ids of links the other side opened.
    pub const ACCEPTED: u64 = 1 << 63;

    /// True when the other side opened this link.
    pub fn is_accepted(self) -> bool {
        self.0 & Self::ACCEPTED != 0
    }
}

/// Which disk of a process: a chunk server has one, a metadata server its log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskIndex(pub u8);

/// The two clocks of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Now {
    /// Monotonic: for durations and deadlines. Drifts, never jumps back.
    pub mono: Instant,
    /// Wall clock, nanoseconds since 1970: for time stamps people read. May jump.
    pub wall_ns: u64,
}

/// What happened on the network.
#[derive(Clone, Debug)]
pub enum NetEvent {
    /// A link is up and its peer authenticated.
    Up {
        /// The link.
        link: LinkId,
        /// Who is at the other end.
        peer: NodeId,
        /// Its release level.
        level: Level,
    },
    /// A link ended, or could not be opened. Its id is dead.
    Down {
        /// The link.
        link: LinkId,
        /// Why, in words.
        reason: String,
    },
    /// A frame arrived.
    Frame {
        /// The link.
        link: LinkId,
        /// The frame.
        frame: Frame,
    },
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The process begins (after each start).
    Start,
    /// On the network.
    Net(NetEvent),
    /// On a disk.
    Disk(DiskIndex, DiskDone),
    /// The time asked for by [`Effects::wake_at`] has come.
    Timer,
    /// No more events are at hand.
    Turn,
}

/// What a process wants of the network.
#[derive(Clone, Debug)]
pub enum NetEffect {
    /// Open a link; [`NetEvent::Up`] or [`NetEvent::Down`] follows.
    Connect {
        /// Its id.
        link: LinkId,
        /// Where to.
        addr: SocketAddr,
    },
    /// Send a frame. On a link that is down it is dropped silently.
    Send {
        /// The link.
        link: LinkId,
        /// Kind of frame.
        kind: FrameKind,
        /// Number of the request.
        id: u64,
        /// The checked part.
        prefix: Vec<u8>,
        /// The data part, in pieces.
        payload: Vec<Buf>,
    },
    /// Close a link; no event follows.
    Close {
        /// The link.
        link: LinkId,
    },
}

/// All that a process wants done, in order per kind.
#[derive(Default, Debug)]
pub struct Effects {
    /// On the network.
    pub net: Vec<NetEffect>,
    /// On its disks.
    pub disk: Vec<(DiskIndex, DiskRequest)>,
    /// When to step it with [`Event::Timer`] at the latest; the earliest wins. Cleared once given.
    pub wake_at: Option<Instant>,
    /// Lines for the log of the daemon.
    pub log: Vec<String>,
    /// The process cannot go on (its disk failed, its log is corrupt): print this and exit.
    pub fatal: Option<String>,
}

impl Effects {
    /// Sends a frame without payload.
    pub fn send(&mut self, link: LinkId, kind: FrameKind, id: u64, prefix: Vec<u8>) {
        self.net.push(NetEffect::Send { link, kind, id, prefix, payload: Vec::new() });
    }

    /// Asks to be woken at `at` or earlier.
    pub fn wake_at(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
    }
}

/// A core: steps on events, leaves effects.
pub trait Process {
    /// Applies one event. All consequences leave through `out`.
    fn step(&mut self, now: Now, event: Event, out: &mut Effects);
}
