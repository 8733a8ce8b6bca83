//! What happens to a call: decoded, answered at once, proposed, or kept until its read index is applied.

use crate::base::Base;
use crate::core::MdsCore;
use cairn_consensus::ProposeError;
use cairn_meta::{Command, Recipient};
use cairn_stdx::FixedMap;
use cairn_types::{ClientId, CsId, Level, NodeId};
use cairn_wire::mds::{Call, ClusterHealth, CsOrder, MdsError, MdsReply, MdsRequest, Push};
use cairn_wire::{Effects, FrameKind, LinkId, Now};
use std::collections::{BTreeMap, VecDeque};

/// Calls under way at most, over all links; beyond it a caller is told to come again.
const CALLS_MAX: usize = 65_536;
/// Orders in one answer to a heartbeat.
pub(crate) const ORDERS_MAX: usize = 256;

type Answer = Result<MdsReply, MdsError>;

#[derive(Clone, Copy)]
struct Asked {
    link: LinkId,
    id: u64,
}

/// Calls under way and the links they came by.
#[derive(Default)]
pub(crate) struct Calls {
    token: u64,
    writes: FixedMap<u64, Asked>,
    reads: FixedMap<u64, (Asked, MdsRequest)>,
    /// Reads whose index is known, until it is applied.
    ready: VecDeque<(u64, u64)>,
    peers: BTreeMap<LinkId, (NodeId, Level)>,
    sessions: BTreeMap<ClientId, LinkId>,
    servers: BTreeMap<CsId, LinkId>,
}

impl Calls {
    pub fn next_token(&mut self) -> u64 {
        self.token += 1;
        self.token
    }

    pub fn link_up(&mut self, link: LinkId, peer: NodeId, level: Level) {
        self.peers.insert(link, (peer, level));
    }

    pub fn peer(&self, link: LinkId) -> Option<NodeId> {
        self.peers.get(&link).map(|(peer, _)| *peer)
    }

    /// The release level of whoever is at the other end.
    pub fn level(&self, link: LinkId) -> Option<Level> {
        self.peers.get(&link).map(|(_, level)| *level)
    }

    /// The link a session spoke over last.
    pub fn session_link(&self, client: ClientId) -> Option<LinkId> {
        self.sessions.get(&client).copied()
    }

    /// The link a chunk server spoke over last.
    pub fn server_link(&self, cs: CsId) -> Option<LinkId> {
        self.servers.get(&cs).copied()
    }

    /// Forgets a link; gives the chunk server that spoke over it.
    pub fn forget_link(&mut self, link: LinkId) -> Option<CsId> {
        self.peers.remove(&link);
        self.sessions.retain(|_, other| *other != link);
        let server = self.servers.iter().find(|(_, other)| **other == link).map(|(cs, _)| *cs)?;
        self.servers.remove(&server);
        Some(server)
    }

    pub fn bind_session(&mut self, client: ClientId, link: LinkId) {
        if client.0 != 0 {
            self.sessions.insert(client, link);
        }
    }

    pub fn bind_server(&mut self, cs: CsId, link: LinkId) {
        self.servers.insert(cs, link);
    }

    pub fn forget(&mut self, token: u64) {
        self.writes.remove(&token);
    }

    pub fn answer(&mut self, token: u64, answer: &Answer, effects: &mut Effects) {
        if let Some(asked) = self.writes.remove(&token) {
            if let Ok(MdsReply::Session { client, .. }) = answer {
                self.bind_session(*client, asked.link);
            }
            if let Ok(MdsReply::CsRegistered { cs, .. }) = answer {
                self.bind_server(*cs, asked.link);
            }
            send_answer(asked, answer, effects);
        }
    }

    pub fn read_ready(&mut self, token: u64, index: u64) {
        self.ready.push_back((token, index));
    }

    pub fn drop_read(&mut self, token: u64, error: &MdsError, effects: &mut Effects) {
        if let Some((asked, _)) = self.reads.remove(&token) {
            send_answer(asked, &Err(error.clone()), effects);
        }
    }

    /// Proposals of a leader that no longer leads: each will come back as committed or dropped, nothing to do for
    /// those; pushes have no addressee any more.
    pub fn lost_leadership(&mut self, effects: &mut Effects) {
        // Sessions follow the leader: closing their links makes them look for it at once.
        for (_, link) in std::mem::take(&mut self.sessions) {
            effects.net.push(cairn_wire::NetEffect::Close { link });
            self.peers.remove(&link);
        }
        for (_, link) in std::mem::take(&mut self.servers) {
            effects.net.push(cairn_wire::NetEffect::Close { link });
            self.peers.remove(&link);
        }
    }

    pub fn push(&self, to: Recipient, push: &Push, effects: &mut Effects) {
        let prefix = cairn_wire::encode(push);
        let mut send = |link: LinkId| effects.send(link, FrameKind::MdsPush, 0, prefix.clone());
        match to {
            Recipient::Session(client) => self.sessions.get(&client).copied().into_iter().for_each(&mut send),
            Recipient::Cs(cs) => self.servers.get(&cs).copied().into_iter().for_each(&mut send),
            Recipient::Everyone => {
                self.sessions.values().chain(self.servers.values()).copied().for_each(&mut send);
            }
        }
    }
}

fn send_answer(asked: Asked, answer: &Answer, effects: &mut Effects) {
    effects.send(asked.link, FrameKind::MdsReply, asked.id, cairn_wire::encode(answer));
}

impl<B: Base> MdsCore<B> {
    /// A call arrived.
    pub(crate) fn call(&mut self, now: Now, link: LinkId, id: u64, bytes: &[u8], effects: &mut Effects) {
        let asked = Asked { link, id };
        let call: Call = match cairn_wire::decode("call", bytes) {
            Ok(call) => call,
            Err(error) => {
                effects.log.push(format!("link {link:?}: {error}"));
                send_answer(asked, &Err(MdsError::Invalid(error.to_string())), effects);
                return;
            }
        };
        if self.calls.writes.len() + self.calls.reads.len() >= CALLS_MAX {
            let error = MdsError::Unavailable("too many calls are under way".to_owned());
            return send_answer(asked, &Err(error), effects);
        }
        if let Some(refused) = self.refuse_level(link, &call.request) {
            return send_answer(asked, &Err(refused), effects);
        }
        match &call.request {
            MdsRequest::Levels => send_answer(asked, &self.levels(call.session), effects),
            &MdsRequest::MdsReport { mds, short, free, state_wanted } => {
                let report = crate::room::Report { heard: now.mono, short, free, state_wanted };
                if !self.room_reported(link, mds, report, effects) {
                    let error = MdsError::Invalid("only a metadata server reports on itself".to_owned());
                    send_answer(asked, &Err(error), effects);
                }
            }
            MdsRequest::MdsStatus => send_answer(asked, &Ok(self.own_status()), effects),
            &MdsRequest::StatePage { token, page } => {
                let answer = self.state_page(now, token, page);
                send_answer(asked, &answer, effects);
            }
            MdsRequest::SessionRenew => {
                let answer = self.renew(now, link, call.session);
                send_answer(asked, &answer, effects);
            }
            MdsRequest::CsHeartbeat { .. } if self.leading => self.heartbeat(now, asked, call, effects),
            request if request.is_read() && self.state_lost => {
                let error = MdsError::Unavailable("this metadata server waits for its state".to_owned());
                send_answer(asked, &Err(error), effects);
            }
            request if request.is_read() => {
                let token = self.calls.next_token();
                self.calls.reads.insert(token, (asked, call.request));
                if let Err(error) = self.consensus.read_index(token, &mut self.out) {
                    self.calls.drop_read(token, &MdsError::Unavailable(error.to_string()), effects);
                }
            }
            MdsRequest::MdsRemove { mds } if self.leading && self.would_lose_majority(*mds).is_some() => {
                let refused = self.would_lose_majority(*mds).unwrap_or_default();
                send_answer(asked, &Err(MdsError::Refused(refused)), effects);
            }
            _ => self.propose_call(now, asked, call, effects),
        }
    }

    /// Why the metadata servers that would remain without one of them could not go on, if so: too few of them answer.
    fn would_lose_majority(&self, leaves: cairn_types::MdsId) -> Option<String> {
        let leaving: Vec<cairn_types::MdsId> = self.meta.members_leaving().collect();
        let status = self.consensus.status();
        let stay = |id: &cairn_types::MdsId| *id != leaves && !leaving.contains(id);
        let rest: Vec<cairn_types::MdsId> = status.members.voters.keys().copied().filter(stay).collect();
        let silent: Vec<cairn_types::MdsId> = self.silent_peers().into_iter().filter(|id| rest.contains(id)).collect();
        let (answer, majority) = (rest.len() - silent.len(), rest.len() / 2 + 1);
        // The last one that votes is refused by the state itself.
        if rest.is_empty() || answer >= majority {
            return None;
        }
        let silent: Vec<String> = silent.iter().map(ToString::to_string).collect();
        Some(format!(
            "without {leaves} {} metadata servers would vote and only {answer} of them answer, a majority is {majority}: \
             first bring {silent} back, or remove {silent} instead and add a new one",
            rest.len(),
            silent = silent.join(" and ")
        ))
    }

    fn propose_call(&mut self, now: Now, asked: Asked, call: Call, effects: &mut Effects) {
        self.calls.bind_session(call.session, asked.link);
        self.duty.heard_session(call.session, now.mono);
        if let Some(why) = self.leading.then(|| self.refuse_to_log(&call.request)).flatten() {
            return send_answer(asked, &Err(MdsError::Refused(why)), effects);
        }
        let token = self.calls.next_token();
        let command = Command::Call { call, wall_ns: now.wall_ns };
        self.calls.writes.insert(token, asked);
        if let Err(error) = self.consensus.propose(token, command.encode()) {
            let error = match error {
                ProposeError::NotLeader(_) => self.not_leader(),
                ProposeError::Size { size, max } => {
                    MdsError::Invalid(format!("the call takes {size} bytes, at most {max} are allowed"))
                }
                other => MdsError::Unavailable(other.to_string()),
            };
            self.calls.answer(token, &Err(error), effects);
        }
    }

    fn renew(&mut self, now: Now, link: LinkId, client: ClientId) -> Answer {
        if !self.leading {
            return Err(self.not_leader());
        }
        if !self.meta.session_alive(client) {
            return Err(MdsError::SessionEnded(client));
        }
        self.calls.bind_session(client, link);
        self.duty.heard_session(client, now.mono);
        Ok(MdsReply::Done)
    }

    /// A heartbeat enters the log only when it says something that must last.
    fn heartbeat(&mut self, now: Now, asked: Asked, call: Call, effects: &mut Effects) {
        let MdsRequest::CsHeartbeat { cs, boot, stats, done, damaged, failed } = &call.request else {
            unreachable!("only heartbeats come here")
        };
        self.calls.bind_server(*cs, asked.link);
        let news = self.duty.heard_server(*cs, *boot, stats, now.mono);
        let lasting = !done.is_empty() || !damaged.is_empty() || failed.is_some() || !self.is_active(*cs);
        // One that was started from another copy of its store meanwhile is told so by the state.
        let lasting = lasting || !self.meta.is_of_last_start(*cs, *boot);
        if news || lasting {
            return self.propose_call(now, asked, call, effects);
        }
        let mut orders = self.meta.orders_for(*cs, ORDERS_MAX);
        // Told every time: the server keeps no parameters, and it may have started a moment ago.
        let chunks_per_minute = u32::try_from(self.meta.config("mds.wd.verify_chunks")).unwrap_or(u32::MAX);
        orders.push(CsOrder::VerifyRate { chunks_per_minute });
        if self.meta.level() > Level::FIRST {
            orders.push(CsOrder::Level(self.meta.level()));
        }
        send_answer(asked, &Ok(MdsReply::Orders(orders)), effects);
    }

    /// Answers the reads whose index has been applied.
    pub(crate) fn answer_reads(&mut self, effects: &mut Effects) {
        while let Some(&(token, index)) = self.calls.ready.front() {
            if index > self.applied {
                return;
            }
            self.calls.ready.pop_front();
            if let Some((asked, request)) = self.calls.reads.remove(&token) {
                let mut answer = self.meta.query(&request);
                self.add_volatile(&mut answer);
                send_answer(asked, &answer, effects);
            }
        }
    }

    /// Adds to an answer what only this server knows: who leads, figures of the last heartbeats.
    fn add_volatile(&self, answer: &mut Answer) {
        let leader = self.consensus.status().leader;
        match answer {
            Ok(MdsReply::Stat(stat)) => {
                stat.leader = leader;
                stat.mds_silent = self.silent_peers();
                if !stat.mds_silent.is_empty() && stat.health == ClusterHealth::Healthy {
                    stat.health = ClusterHealth::Degraded;
                }
                self.duty.freshen(&mut stat.cs);
            }
            Ok(MdsReply::Topology { cs, .. }) => self.duty.freshen(cs),
            _ => {}
        }
    }

    /// Metadata servers that have not answered this leader lately; a follower cannot tell.
    fn silent_peers(&self) -> Vec<cairn_types::MdsId> {
        let peers = self.consensus.status().peers;
        peers
            .iter()
            .filter(|peer| self.leading && !peer.active && peer.id != self.config.id)
            .map(|peer| peer.id)
            .collect()
    }

    fn own_status(&self) -> MdsReply {
        let status = self.consensus.status();
        MdsReply::MdsStatus {
            mds: self.config.id,
            term: status.term,
            leader: status.leader,
            last: status.last,
            committed: status.committed,
            applied: self.applied,
        }
    }

    /// A link of a client or a chunk server went down.
    pub(crate) fn link_down(&mut self, now: Now, link: LinkId) {
        if let Some(cs) = self.calls.forget_link(link) {
            self.duty.lost_server(cs, now.mono);
        }
        self.images.link_down(link);
    }
}
