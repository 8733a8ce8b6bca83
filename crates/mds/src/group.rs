//! The other metadata servers: their addresses and the links this server opened to them.
//!
//! Each server sends over links it opened itself and receives over those the others opened. A peer it has no such link
//! to is answered over the one its messages come by: who was away while servers were replaced knows none of the present
//! addresses, and could not tell a new leader what it lacks. A message for a peer that cannot be reached is dropped:
//! Raft repeats what matters.

use crate::base::Base;
use crate::core::MdsCore;
use cairn_consensus::{Change, Members};
use cairn_stdx::planted;
use cairn_types::{Duration, Instant, MdsId, NodeId};
use cairn_wire::mds::MdsInfo;
use cairn_wire::{Effects, FrameKind, LinkId, NetEffect, Now};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Pause between two attempts to reach a peer.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

struct Peer {
    addr: SocketAddr,
    link: Option<LinkId>,
    up: bool,
    retry_at: Instant,
}

/// Links to the other servers.
pub(crate) struct Group {
    own: MdsId,
    next_link: u64,
    peers: BTreeMap<MdsId, Peer>,
    addrs: BTreeMap<MdsId, SocketAddr>,
    /// The links opened by others over which they spoke last.
    heard: BTreeMap<MdsId, LinkId>,
}

impl Group {
    pub fn new(own: MdsId, servers: &[MdsInfo]) -> Self {
        let (peers, addrs, heard) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut group = Self { own, next_link: 1, peers, addrs, heard };
        servers.iter().for_each(|info| group.know(info));
        group
    }

    /// Learns or corrects the address of a server.
    pub fn know(&mut self, info: &MdsInfo) {
        self.addrs.insert(info.mds, info.addr);
        if info.mds == self.own {
            return;
        }
        let peer = Peer { addr: info.addr, link: None, up: false, retry_at: Instant(0) };
        let known = self.peers.entry(info.mds).or_insert(peer);
        known.addr = info.addr;
    }

    pub fn addr(&self, mds: MdsId) -> Option<SocketAddr> {
        self.addrs.get(&mds).copied()
    }

    /// The link this server opened to a peer, if it is up.
    pub fn link(&self, mds: MdsId) -> Option<LinkId> {
        self.peers.get(&mds).filter(|peer| peer.up).and_then(|peer| peer.link)
    }

    pub fn send(&mut self, to: MdsId, bytes: Vec<u8>, effects: &mut Effects) {
        if let Some(link) = self.link(to).or_else(|| self.heard.get(&to).copied()) {
            effects.send(link, FrameKind::Raft, 0, bytes);
        }
    }

    pub fn reconnect(&mut self, now: Instant, effects: &mut Effects) {
        for peer in self.peers.values_mut().filter(|peer| peer.link.is_none() && now >= peer.retry_at) {
            let link = LinkId(self.next_link);
            self.next_link += 1;
            peer.link = Some(link);
            effects.net.push(NetEffect::Connect { link, addr: peer.addr });
        }
    }

    pub fn link_up(&mut self, link: LinkId) {
        if let Some(peer) = self.peers.values_mut().find(|peer| peer.link == Some(link)) {
            peer.up = true;
        }
    }

    /// A peer spoke over a link.
    pub fn hear(&mut self, from: MdsId, link: LinkId) {
        if self.link(from) != Some(link) && !planted!("answers_only_whom_it_knows") {
            self.heard.insert(from, link);
        }
    }

    /// Nothing may be sent over a link any more.
    pub fn forget_link(&mut self, link: LinkId) {
        self.heard.retain(|_, heard| *heard != link);
    }

    /// A link ended; true when it was one of ours.
    pub fn link_down(&mut self, link: LinkId, now: Instant) -> bool {
        self.forget_link(link);
        let Some(peer) = self.peers.values_mut().find(|peer| peer.link == Some(link)) else { return false };
        peer.link = None;
        peer.up = false;
        peer.retry_at = now + RECONNECT_PAUSE;
        true
    }

    /// Drops the peers that are no longer in `keep`.
    fn retain(&mut self, keep: impl Fn(MdsId) -> bool, effects: &mut Effects) {
        self.peers.retain(|id, peer| {
            let kept = keep(*id);
            if let (false, Some(link)) = (kept, peer.link) {
                effects.net.push(NetEffect::Close { link });
            }
            kept
        });
    }
}

impl<B: Base> MdsCore<B> {
    /// Learns the addresses the state knows.
    pub(crate) fn refresh_group(&mut self) {
        let registry: Vec<_> = self.meta.members().collect();
        for info in registry {
            self.group.know(&info);
        }
    }

    pub(crate) fn members_changed(&mut self, change: Change, members: &Members, effects: &mut Effects) {
        self.refresh_group();
        if change == Change::Remove(self.config.id) {
            effects.fatal = Some(format!(
                "this metadata server ({}) was removed from the cluster; its directory {} may be deleted",
                self.config.id, self.config.repository
            ));
        }
        let admitted: Vec<MdsId> = self.meta.registry().map(|entry| entry.info.mds).collect();
        self.group.retain(|id| members.contains(id) || admitted.contains(&id), effects);
    }

    /// A Raft message arrived over a link; only metadata servers may send one.
    pub(crate) fn raft_frame(&mut self, now: Now, link: LinkId, bytes: &[u8], effects: &mut Effects) {
        let Some(NodeId::Mds(from)) = self.calls.peer(link) else {
            effects.log.push(format!("link {link:?} sent a Raft message and is no metadata server"));
            return self.close(link, effects);
        };
        self.group.hear(from, link);
        if let Err(error) = self.consensus.receive(now.mono, from, bytes, &mut self.out) {
            effects.log.push(format!("Raft message of {from} refused: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_known_is_answered_over_the_link_it_speaks_by() {
        let info = |id: u64| MdsInfo {
            mds: MdsId(id),
            addr: SocketAddr::from(([10, 0, 0, id as u8], 2510)),
            voter: true,
            repository: String::new(),
        };
        let mut group = Group::new(MdsId(1), &[info(1), info(2)]);
        let sent = |group: &mut Group, to: u64| {
            let mut effects = Effects::default();
            group.send(MdsId(to), vec![1], &mut effects);
            effects.net.iter().find_map(|effect| match effect {
                NetEffect::Send { link, .. } => Some(*link),
                _ => None,
            })
        };
        let accepted = |nth: u64| LinkId(LinkId::ACCEPTED | nth);
        assert_eq!(sent(&mut group, 7), None);
        group.hear(MdsId(7), accepted(1));
        group.hear(MdsId(2), accepted(2));
        assert_eq!(sent(&mut group, 7), Some(accepted(1)));
        assert_eq!(sent(&mut group, 2), Some(accepted(2)), "until a link of its own is up");
        group.reconnect(Instant(1), &mut Effects::default());
        group.link_up(LinkId(1));
        assert_eq!(sent(&mut group, 2), Some(LinkId(1)));
        group.link_down(accepted(1), Instant(2));
        assert_eq!(sent(&mut group, 7), None);
        group.forget_link(accepted(2));
        group.link_down(LinkId(1), Instant(3));
        assert_eq!(sent(&mut group, 2), None);
    }
}
