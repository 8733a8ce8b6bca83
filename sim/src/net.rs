//! Simulated links: ordered, reliable while they last, and broken in every way TCP connections break.
//!
//! Frames of one direction arrive in order after a random delay. A cut path stalls them; after seconds of silence each
//! side gives the connection up by itself, so one side may keep sending on a connection the other has forgotten. Frames
//! sent before a reset may still arrive at the side that has not heard of the reset: late packets of an old connection
//! are real.

use crate::world::{MS, NodeIndex};
use cairn_env::{Buf, BufMut};
use cairn_stdx::Rng;
use cairn_wire::{Frame, FrameKind, LinkId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// One connection.
pub(crate) struct Conn {
    pub(crate) initiator: (NodeIndex, LinkId),
    pub(crate) acceptor_node: NodeIndex,
    /// The acceptor's link, once accepted.
    pub(crate) accepted: Option<LinkId>,
    open: [bool; 2],
    queue: [VecDeque<(u64, Frame)>; 2],
    last_due: [u64; 2],
}

/// All connections and the state of all paths.
pub(crate) struct Network {
    conns: BTreeMap<u64, Conn>,
    by_end: BTreeMap<(NodeIndex, LinkId), (u64, bool)>,
    blocked: BTreeSet<(NodeIndex, NodeIndex)>,
    next_conn: u64,
    rng: Rng,
    /// One in this many frames takes a long way (tens of milliseconds).
    pub(crate) slow_one_in: u64,
}

impl Network {
    pub(crate) fn new(rng: Rng) -> Self {
        Self {
            conns: BTreeMap::new(),
            by_end: BTreeMap::new(),
            blocked: BTreeSet::new(),
            next_conn: 1,
            rng,
            slow_one_in: 1000,
        }
    }

    pub(crate) fn conn(&self, id: u64) -> Option<&Conn> {
        self.conns.get(&id)
    }

    pub(crate) fn is_blocked(&self, from: NodeIndex, to: NodeIndex) -> bool {
        self.blocked.contains(&(from, to))
    }

    /// True when some path from or to a node is cut.
    pub(crate) fn cuts_off(&self, node: NodeIndex) -> bool {
        self.blocked.iter().any(|(from, to)| *from == node || *to == node)
    }

    /// Cuts or heals a direction; on healing gives the connections and directions whose queued frames may go on.
    pub(crate) fn set_blocked(&mut self, from: NodeIndex, to: NodeIndex, blocked: bool) -> Vec<(u64, bool)> {
        if blocked {
            self.blocked.insert((from, to));
            return Vec::new();
        }
        self.blocked.remove(&(from, to));
        let mut released = Vec::new();
        for (&id, conn) in &self.conns {
            for to_acceptor in [false, true] {
                let path = conn.path(to_acceptor);
                if path == (from, to) {
                    released.extend(std::iter::repeat_n((id, to_acceptor), conn.queue[usize::from(to_acceptor)].len()));
                }
            }
        }
        released
    }

    pub(crate) fn connect(&mut self, node: NodeIndex, link: LinkId, to: NodeIndex) -> u64 {
        let id = self.next_conn;
        self.next_conn += 1;
        let conn = Conn {
            initiator: (node, link),
            acceptor_node: to,
            accepted: None,
            open: [true, false],
            queue: Default::default(),
            last_due: [0; 2],
        };
        self.conns.insert(id, conn);
        self.by_end.insert((node, link), (id, false));
        id
    }

    pub(crate) fn accept(&mut self, id: u64) -> LinkId {
        let link = LinkId(LinkId::ACCEPTED | id);
        let conn = self.conns.get_mut(&id).expect("the connection exists");
        conn.accepted = Some(link);
        conn.open[1] = true;
        self.by_end.insert((conn.acceptor_node, link), (id, true));
        link
    }

    pub(crate) fn remove(&mut self, id: u64) {
        if let Some(conn) = self.conns.remove(&id) {
            self.by_end.remove(&conn.initiator);
            if let Some(link) = conn.accepted {
                self.by_end.remove(&(conn.acceptor_node, link));
            }
        }
    }

    pub(crate) fn find(&self, node: NodeIndex, link: LinkId) -> Option<(u64, bool)> {
        self.by_end.get(&(node, link)).copied()
    }

    /// One side no longer knows the connection; gives its end unless it had forgotten already.
    pub(crate) fn forget_side(&mut self, id: u64, acceptor_side: bool) -> Option<(NodeIndex, LinkId)> {
        let conn = self.conns.get_mut(&id)?;
        let side = usize::from(acceptor_side);
        if !conn.open[side] {
            return None;
        }
        conn.open[side] = false;
        let end = conn.end(acceptor_side)?;
        self.by_end.remove(&end);
        if conn.open == [false, false] {
            self.conns.remove(&id);
        }
        Some(end)
    }

    pub(crate) fn conns_of(&self, node: NodeIndex) -> Vec<(u64, bool)> {
        self.by_end.range((node, LinkId(0))..=(node, LinkId(u64::MAX))).map(|(_, &end)| end).collect()
    }

    pub(crate) fn conns_between(&self, a: NodeIndex, b: NodeIndex) -> Vec<u64> {
        let joins = |conn: &Conn| {
            let ends = (conn.initiator.0, conn.acceptor_node);
            ends == (a, b) || ends == (b, a)
        };
        self.conns.iter().filter(|(_, conn)| joins(conn)).map(|(&id, _)| id).collect()
    }

    pub(crate) fn is_stalled(&self, id: u64) -> bool {
        self.conns.get(&id).is_some_and(|conn| {
            [false, true].into_iter().any(|to_acceptor| {
                let (from, to) = conn.path(to_acceptor);
                self.is_blocked(from, to)
            })
        })
    }

    /// Queues a frame; gives when it is due, unless the link is dead.
    #[expect(clippy::too_many_arguments, reason = "the fields of one effect")]
    pub(crate) fn send(
        &mut self,
        now: u64,
        node: NodeIndex,
        link: LinkId,
        kind: FrameKind,
        id: u64,
        prefix: Vec<u8>,
        payload: Vec<Buf>,
    ) -> Option<(u64, bool, u64)> {
        let (conn_id, acceptor_side) = self.find(node, link)?;
        let conn = self.conns.get_mut(&conn_id).expect("an end belongs to a connection");
        let to_acceptor = !acceptor_side;
        let delay = if self.rng.chance(1, self.slow_one_in) {
            self.rng.range(MS, 60 * MS)
        } else {
            self.rng.range(20_000, 150_000)
        };
        let direction = usize::from(to_acceptor);
        let due = (now + delay).max(conn.last_due[direction] + 1);
        conn.last_due[direction] = due;
        conn.queue[direction].push_back((due, Frame { kind, id, prefix, payload: join(payload) }));
        Some((conn_id, to_acceptor, due))
    }

    /// Who sends in a direction of a connection.
    pub(crate) fn peer_of(&self, id: u64, to_acceptor: bool) -> Option<NodeIndex> {
        self.conns.get(&id).map(|conn| conn.path(to_acceptor).0)
    }

    /// The next frame of a direction, if it can be delivered now.
    pub(crate) fn pop_frame(&mut self, id: u64, to_acceptor: bool, now: u64) -> Option<(NodeIndex, LinkId, Frame)> {
        let (from, to) = self.conns.get(&id)?.path(to_acceptor);
        if self.is_blocked(from, to) {
            return None;
        }
        let conn = self.conns.get_mut(&id)?;
        if !conn.open[usize::from(to_acceptor)] {
            return None;
        }
        let queue = &mut conn.queue[usize::from(to_acceptor)];
        if queue.front()?.0 > now {
            return None;
        }
        let (_, frame) = queue.pop_front()?;
        let (node, link) = conn.end(to_acceptor)?;
        Some((node, link, frame))
    }
}

impl Conn {
    fn path(&self, to_acceptor: bool) -> (NodeIndex, NodeIndex) {
        if to_acceptor { (self.initiator.0, self.acceptor_node) } else { (self.acceptor_node, self.initiator.0) }
    }
}

fn join(mut pieces: Vec<Buf>) -> Buf {
    match pieces.len() {
        0 => Buf::default(),
        1 => pieces.remove(0),
        _ => {
            let mut out = BufMut::zeroed(pieces.iter().map(|piece| piece.len()).sum());
            let mut at = 0;
            for piece in pieces {
                out[at..at + piece.len()].copy_from_slice(&piece);
                at += piece.len();
            }
            out.freeze()
        }
    }
}
