//! Links this server opens to other chunk servers, to copy chunks from them.

use super::CsCore;
use cairn_types::{ChunkId, Duration, Epoch, Instant, Sequence};
use cairn_wire::cs::CsRequest;
use cairn_wire::data::DataRequest;
use cairn_wire::{Effects, Frame, FrameKind, LinkId, NetEffect, Now};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A link without traffic for this long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// The unsettled write that blocks come from, if any.
pub(super) type Tail = Option<(Epoch, Sequence)>;

/// What was asked of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Asked {
    /// Which blocks changed.
    Changed,
    /// These blocks.
    Blocks { first_block: u32, block_count: u32, tail: Tail },
}

struct Peer {
    addr: SocketAddr,
    up: bool,
    next_id: u64,
    /// Chunk, attempt of its rebuild, what was asked.
    calls: BTreeMap<u64, (ChunkId, u64, Asked)>,
    used: Instant,
}

/// All such links.
#[derive(Default)]
pub(super) struct Peers {
    by_addr: BTreeMap<SocketAddr, LinkId>,
    links: BTreeMap<LinkId, Peer>,
}

impl CsCore {
    /// The link to a server, if it is up; begins to open one otherwise.
    pub(super) fn peer_link(&mut self, now: Now, addr: SocketAddr, out: &mut Effects) -> Option<LinkId> {
        if let Some(link) = self.peers.by_addr.get(&addr) {
            let peer = self.peers.links.get_mut(link).expect("both maps name the same links");
            peer.used = now.mono;
            return peer.up.then_some(*link);
        }
        let link = self.new_link();
        let peer = Peer { addr, up: false, next_id: 1, calls: BTreeMap::new(), used: now.mono };
        self.peers.by_addr.insert(addr, link);
        self.peers.links.insert(link, peer);
        out.net.push(NetEffect::Connect { link, addr });
        None
    }

    fn peer_call(&mut self, link: LinkId, chunk: ChunkId, attempt: u64, asked: Asked) -> u64 {
        let peer = self.peers.links.get_mut(&link).expect("the caller asked for the link just now");
        let id = peer.next_id;
        peer.next_id += 1;
        peer.calls.insert(id, (chunk, attempt, asked));
        id
    }

    pub(super) fn ask_changed(
        &mut self,
        link: LinkId,
        chunk: ChunkId,
        attempt: u64,
        request: &CsRequest,
        out: &mut Effects,
    ) {
        let id = self.peer_call(link, chunk, attempt, Asked::Changed);
        out.send(link, FrameKind::CsCall, id, cairn_wire::encode(request));
    }

    pub(super) fn ask_blocks(
        &mut self,
        link: LinkId,
        attempt: u64,
        request: &DataRequest,
        tail: Tail,
        out: &mut Effects,
    ) {
        let asked = Asked::Blocks { first_block: request.first_block, block_count: request.block_count, tail };
        let id = self.peer_call(link, request.chunk, attempt, asked);
        let mut prefix = Vec::with_capacity(cairn_wire::data::DATA_HEADER_SIZE);
        request.encode(&mut prefix);
        out.send(link, FrameKind::Data, id, prefix);
    }

    pub(super) fn peer_up(&mut self, now: Now, link: LinkId, out: &mut Effects) {
        let Some(peer) = self.peers.links.get_mut(&link) else { return };
        peer.up = true;
        peer.used = now.mono;
        let addr = peer.addr;
        self.source_up(now, addr, out);
    }

    pub(super) fn peer_down(&mut self, now: Now, link: LinkId, reason: &str, out: &mut Effects) {
        let Some(peer) = self.peers.links.remove(&link) else { return };
        self.peers.by_addr.remove(&peer.addr);
        self.source_down(now, peer.addr, reason, out);
    }

    /// An answer of a peer. Anything that is no answer to what was asked ends the link.
    pub(super) fn peer_frame(&mut self, now: Now, link: LinkId, frame: Frame, out: &mut Effects) {
        let Some(peer) = self.peers.links.get_mut(&link) else { return };
        peer.used = now.mono;
        let result = match (peer.calls.remove(&frame.id), frame.kind) {
            (Some((chunk, attempt, Asked::Changed)), FrameKind::CsReply) => {
                let reply = cairn_wire::decode("chunk server reply", &frame.prefix).map_err(|error| error.to_string());
                reply.map(|reply| self.on_changed(now, chunk, attempt, reply, out))
            }
            (Some((chunk, attempt, Asked::Blocks { first_block, block_count, tail })), FrameKind::DataReply) => {
                let reply = cairn_wire::data::DataReply::decode(&frame.prefix, frame.payload.len());
                let blocks = (first_block, block_count, tail);
                reply
                    .map(|reply| self.on_blocks(now, chunk, attempt, blocks, reply, frame.payload, out))
                    .map_err(|error| error.to_string())
            }
            (_, kind) => Err(format!("an unexpected frame of kind {kind:?}")),
        };
        if let Err(reason) = result {
            out.net.push(NetEffect::Close { link });
            self.peer_down(now, link, &reason, out);
        }
    }

    /// Closes links nobody needs and such as do not come up or do not answer.
    pub(super) fn tidy_peers(&mut self, now: Now, out: &mut Effects) {
        let quiet = |peer: &Peer| now.mono.saturating_since(peer.used) >= IDLE;
        let idle: Vec<LinkId> = self.peers.links.iter().filter(|(_, peer)| quiet(peer)).map(|(id, _)| *id).collect();
        for link in idle {
            out.net.push(NetEffect::Close { link });
            self.peer_down(now, link, "it was idle", out);
        }
    }

    /// Ends the link to a server that does not answer.
    pub(super) fn drop_peer(&mut self, addr: SocketAddr, out: &mut Effects) {
        if let Some(link) = self.peers.by_addr.remove(&addr) {
            self.peers.links.remove(&link);
            out.net.push(NetEffect::Close { link });
        }
    }
}
