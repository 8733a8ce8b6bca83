//! What every part of the core is handed along: the time, the effects, the timers, the table of links.

use crate::config::CoreConfig;
use crate::core::Completion;
use crate::servers::Servers;
use crate::session::{Session, Waiter};
use crate::timers::Timers;
use cairn_env::Buf;
use cairn_stdx::{FixedMap, Rng};
use cairn_types::Instant;
use cairn_wire::mds::MdsRequest;
use cairn_wire::{Effects, LinkId, NetEffect};
use std::net::SocketAddr;

/// What a link is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LinkUse {
    /// To a metadata server.
    Mds,
    /// To a chunk server, by its number in [`Servers`].
    Server(u32),
}

/// Links of this process.
#[derive(Default)]
pub(crate) struct Links {
    next: u64,
    uses: FixedMap<u64, LinkUse>,
}

/// Time, effects, timers and links.
pub(crate) struct Io<'a> {
    /// Monotonic time.
    pub now: Instant,
    /// Wall clock.
    pub wall_ns: u64,
    /// Where consequences go.
    pub out: &'a mut Effects,
    /// Deadlines.
    pub timers: &'a mut Timers,
    /// Links.
    pub links: &'a mut Links,
    /// Randomness.
    pub rng: &'a mut Rng,
}

impl Io<'_> {
    /// Opens a link.
    pub(crate) fn connect(&mut self, addr: SocketAddr, usage: LinkUse) -> LinkId {
        self.links.next += 1;
        let link = LinkId(self.links.next);
        self.links.uses.insert(link.0, usage);
        self.out.net.push(NetEffect::Connect { link, addr });
        link
    }

    /// Closes a link.
    pub(crate) fn close(&mut self, link: LinkId) {
        if self.links.uses.remove(&link.0).is_some() {
            self.out.net.push(NetEffect::Close { link });
        }
    }
}

impl Links {
    /// What a link is for, if it is alive.
    pub(crate) fn of(&self, link: LinkId) -> Option<LinkUse> {
        self.uses.get(&link.0).copied()
    }

    /// A link ended by itself.
    pub(crate) fn gone(&mut self, link: LinkId) -> Option<LinkUse> {
        self.uses.remove(&link.0)
    }
}

/// What a volume works with.
pub(crate) struct Ctx<'a> {
    /// Time, effects, timers and links.
    pub io: Io<'a>,
    /// The metadata servers.
    pub session: &'a mut Session,
    /// The chunk servers.
    pub servers: &'a mut Servers,
    /// Finished work of the users.
    pub done: &'a mut Vec<Completion>,
    /// Settings.
    pub config: &'a CoreConfig,
    /// One MiB of zeros, shared by every hole read.
    pub zeros: &'a Buf,
}

impl Ctx<'_> {
    /// Calls the metadata servers until they answer, however long it takes.
    pub(crate) fn call(&mut self, request: MdsRequest, waiter: Waiter) {
        self.session.call(&mut self.io, request, waiter, None);
    }

    /// A line for the log.
    pub(crate) fn log(&mut self, line: String) {
        self.io.out.log.push(line);
    }
}
