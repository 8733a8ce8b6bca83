//! Accepted links: who is at the other end, how much it has outstanding, and which link of a session is the newest.
//!
//! Bounds: a peer may have [`WINDOW_MAX`] requests outstanding on one link and is cut off when it sends more, so all
//! that can wait here is `links * WINDOW_MAX` requests of at most 1 MiB. The shell bounds the number of links.

use cairn_stdx::FixedMap;
use cairn_types::NodeId;
use cairn_wire::LinkId;
use std::collections::BTreeMap;

/// Most requests outstanding on one link.
pub const WINDOW_MAX: u32 = 256;
/// Most sessions whose newest link is remembered; sessions without a link go first.
pub const SESSIONS_MAX: usize = 4096;

/// One accepted link.
#[derive(Debug)]
pub(crate) struct Link {
    pub peer: NodeId,
    /// Requests not answered yet.
    pub outstanding: u32,
    /// Said hello as this session.
    pub session: Option<u64>,
}

/// Who waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Caller {
    pub link: LinkId,
    pub id: u64,
}

#[derive(Debug)]
struct Session {
    generation: u64,
    link: Option<LinkId>,
    /// Order of hellos, to forget the oldest.
    stamp: u64,
}

/// All accepted links.
#[derive(Default)]
pub(crate) struct Links {
    links: FixedMap<u64, Link>,
    sessions: BTreeMap<u64, Session>,
    stamp: u64,
}

/// What a hello means.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Hello {
    /// Welcome; the older link of the session, if any, is to be closed.
    Newest { superseded: Option<LinkId> },
    /// A newer link of this session exists.
    Stale,
}

impl Links {
    pub(crate) fn up(&mut self, link: LinkId, peer: NodeId) {
        self.links.insert(link.0, Link { peer, outstanding: 0, session: None });
    }

    /// Forgets a link; requests still queued from it find it gone and do nothing.
    pub(crate) fn down(&mut self, link: LinkId) {
        let Some(gone) = self.links.remove(&link.0) else { return };
        if let Some(session) = gone.session.and_then(|session| self.sessions.get_mut(&session))
            && session.link == Some(link)
        {
            session.link = None;
        }
    }

    pub(crate) fn get(&self, link: LinkId) -> Option<&Link> {
        self.links.get(&link.0)
    }

    pub(crate) fn get_mut(&mut self, link: LinkId) -> Option<&mut Link> {
        self.links.get_mut(&link.0)
    }

    pub(crate) fn is_up(&self, link: LinkId) -> bool {
        self.links.contains_key(&link.0)
    }

    /// Takes one request off the link's count; false when the link is gone and no answer can be sent.
    pub(crate) fn answered(&mut self, link: LinkId) -> bool {
        let Some(link) = self.links.get_mut(&link.0) else { return false };
        assert!(link.outstanding > 0, "each request is answered once");
        link.outstanding -= 1;
        true
    }

    /// Judges a hello on an open link.
    pub(crate) fn hello(&mut self, link: LinkId, session: u64, generation: u64) -> Hello {
        self.stamp += 1;
        let stamp = self.stamp;
        let known = self.sessions.get(&session).map(|known| (known.generation, known.link));
        if let Some((known, holder)) = known
            && (generation < known || (generation == known && holder != Some(link)))
        {
            return Hello::Stale;
        }
        let superseded = known.and_then(|(_, holder)| holder).filter(|holder| *holder != link);
        self.sessions.insert(session, Session { generation, link: Some(link), stamp });
        if let Some(link) = self.links.get_mut(&link.0) {
            link.session = Some(session);
        }
        if self.sessions.len() > SESSIONS_MAX {
            let oldest = self.sessions.iter().filter(|(_, s)| s.link.is_none()).min_by_key(|(_, s)| s.stamp);
            if let Some(oldest) = oldest.map(|(id, _)| *id) {
                self.sessions.remove(&oldest);
            }
        }
        Hello::Newest { superseded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_types::ClientId;

    #[test]
    fn a_newer_link_ends_the_older_and_never_the_other_way_round() {
        let mut links = Links::default();
        let [a, b, c] = [1, 2, 3].map(|n| LinkId(LinkId::ACCEPTED | n));
        for link in [a, b, c] {
            links.up(link, NodeId::Client(ClientId(2049)));
        }
        assert_eq!(links.hello(a, 9, 1), Hello::Newest { superseded: None });
        assert_eq!(links.hello(a, 9, 1), Hello::Newest { superseded: None });
        assert_eq!(links.hello(b, 9, 2), Hello::Newest { superseded: Some(a) });
        assert_eq!(links.hello(c, 9, 1), Hello::Stale);
        links.down(b);
        assert_eq!(links.hello(c, 9, 2), Hello::Stale, "the generation outlives its link");
        assert_eq!(links.hello(c, 9, 3), Hello::Newest { superseded: None });
    }

    #[test]
    fn sessions_are_bounded() {
        let mut links = Links::default();
        for n in 0..2 * SESSIONS_MAX as u64 {
            let link = LinkId(LinkId::ACCEPTED | n);
            links.up(link, NodeId::Client(ClientId(n)));
            links.hello(link, n, 1);
            links.down(link);
        }
        assert!(links.sessions.len() <= SESSIONS_MAX && links.links.is_empty());
    }
}
