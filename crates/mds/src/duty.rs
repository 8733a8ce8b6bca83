//! What a leader does by itself: ends silent sessions, notices silent chunk servers, moves members in and out, lets the
//! background work of the state go on. What it knows for that is volatile; a new leader starts with everybody heard
//! just now.

use crate::base::Base;
use crate::core::MdsCore;
use cairn_consensus::{Change, Member};
use cairn_meta::Command;
use cairn_types::{ClientId, CsId, Duration, Instant, MdsId};
use cairn_wire::mds::{CsInfo, CsState, CsStats};
use cairn_wire::{Effects, Now};
use std::collections::BTreeMap;

/// A session that has not renewed for this long has ended (rule 1: term 10 s).
pub const SESSION_TERM: Duration = Duration::from_secs(10);
/// After the end its leases stay for this long: a leader deposed without knowing may have answered a renewal meanwhile.
pub const LEASE_GRACE: Duration = Duration::from_secs(1);
/// A chunk server silent for this long is inactive.
const SERVER_SILENT: Duration = Duration::from_secs(4);
/// A chunk server whose link broke gets this long to come back before it counts as inactive.
const SERVER_LINK_GRACE: Duration = Duration::from_millis(1500);
/// Figures of a chunk server enter the log this often at most, unless they moved a lot.
const STATS_PERIOD: Duration = Duration::from_secs(20);
/// Background work of the state is asked for this often while there is some.
const TICK_PERIOD: Duration = Duration::from_millis(100);
/// ... and this often otherwise, so that work with a time of its own comes up.
const TICK_PERIOD_IDLE: Duration = Duration::from_secs(1);
/// A learner this close to the end of the log becomes a voter.
const PROMOTE_LAG_MAX: u64 = 256;

struct Server {
    heard: Instant,
    link_lost: Option<Instant>,
    boot: u64,
    stats: CsStats,
    logged: CsStats,
    logged_at: Option<Instant>,
}

/// A look so much later than it was due means that the process was stopped meanwhile.
const SLEPT: Duration = Duration::from_secs(2);

/// The leader's volatile knowledge.
#[derive(Default)]
pub(crate) struct Duty {
    sessions: BTreeMap<ClientId, Instant>,
    ended: BTreeMap<ClientId, Instant>,
    servers: BTreeMap<CsId, Server>,
    looked: Option<Instant>,
    ticked: Option<Instant>,
}

impl Duty {
    pub fn due(&mut self, now: Instant, period: Duration) -> bool {
        let due = self.looked.is_none_or(|at| now >= at + period);
        if due && self.looked.replace(now).is_some_and(|at| now > at + period + SLEPT) {
            // This process was not running: nobody could be heard, so everybody gets a new term.
            self.sessions.values_mut().chain(self.ended.values_mut()).for_each(|heard| *heard = now);
        }
        due
    }

    pub fn next(&self, period: Duration) -> Instant {
        self.looked.map_or(Instant(0), |at| at + period)
    }

    pub fn heard_session(&mut self, client: ClientId, now: Instant) {
        if client.0 != 0 {
            self.sessions.insert(client, now);
        }
    }

    /// Notes a heartbeat; true when its figures should enter the log.
    pub fn heard_server(&mut self, cs: CsId, boot: u64, stats: &CsStats, now: Instant) -> bool {
        let server = self.servers.entry(cs).or_insert_with(|| Server {
            heard: now,
            link_lost: None,
            boot,
            stats: *stats,
            logged: CsStats::default(),
            logged_at: None,
        });
        server.heard = now;
        server.link_lost = None;
        server.stats = *stats;
        let restarted = std::mem::replace(&mut server.boot, boot) != boot;
        let moved = stats.capacity != server.logged.capacity
            || stats.used.abs_diff(server.logged.used) > (stats.capacity / 64).max(1);
        let old = server.logged_at.is_none_or(|at| now >= at + STATS_PERIOD);
        let differs = stats.used != server.logged.used || stats.chunks != server.logged.chunks;
        let news = restarted || server.logged_at.is_none() || moved || (old && differs);
        if news {
            server.logged = *stats;
            server.logged_at = Some(now);
        }
        news
    }

    pub fn lost_server(&mut self, cs: CsId, now: Instant) {
        if let Some(server) = self.servers.get_mut(&cs) {
            server.link_lost = Some(now);
        }
    }

    /// Puts the figures of the last heartbeats in place of those in the log.
    pub fn freshen(&self, servers: &mut [CsInfo]) {
        for info in servers {
            if let Some(server) = self.servers.get(&info.cs) {
                info.stats = server.stats;
            }
        }
    }
}

impl<B: Base> MdsCore<B> {
    /// True when the state counts a chunk server as active or being drained.
    pub(crate) fn is_active(&self, cs: CsId) -> bool {
        let serves = |state| matches!(state, CsState::Active | CsState::Draining);
        self.meta.servers().any(|(other, state)| other == cs && serves(state))
    }

    /// Begins to lead: everybody is heard just now, whoever led before may have answered them until now.
    pub(crate) fn begin_duty(&mut self, now: Now) {
        let (alive, ended): (Vec<_>, Vec<_>) = self.meta.sessions().partition(|(_, alive)| *alive);
        self.duty.sessions = alive.into_iter().map(|(client, _)| (client, now.mono)).collect();
        self.duty.ended = ended.into_iter().map(|(client, _)| (client, now.mono)).collect();
        self.duty.servers.clear();
        for info in self.meta.cs_infos() {
            let server = Server {
                heard: now.mono,
                link_lost: None,
                boot: 0,
                stats: info.stats,
                logged: info.stats,
                logged_at: None,
            };
            self.duty.servers.insert(info.cs, server);
        }
    }

    pub(crate) fn session_ended(&mut self, now: Now, client: ClientId) {
        let renewed = self.duty.sessions.remove(&client);
        // Counted from its last renewal, or from now when that is not known.
        self.duty.ended.insert(client, renewed.unwrap_or(now.mono));
    }

    pub(crate) fn look_at_duties(&mut self, now: Now, _effects: &mut Effects) {
        self.look_at_bootstrap(now);
        self.look_at_sessions(now);
        self.look_at_servers(now);
        self.look_at_members(now);
        let period = if self.meta.has_work() { TICK_PERIOD } else { TICK_PERIOD_IDLE };
        if self.duty.ticked.is_none_or(|at| now.mono >= at + period) && self.meta.identity().is_some() {
            self.duty.ticked = Some(now.mono);
            self.propose_own(&Command::Tick { wall_ns: now.wall_ns });
        }
    }

    fn look_at_bootstrap(&mut self, now: Now) {
        if self.config.bootstrap && self.meta.identity().is_none() {
            let first = self.config.servers.iter().find(|info| info.mds == self.config.id);
            let bootstrap = Command::Bootstrap {
                cluster: self.config.cluster,
                name: self.config.cluster_name.clone(),
                first: first.expect("the list of servers contains this one").clone(),
                wall_ns: now.wall_ns,
            };
            // A cluster begins at the level of its first server.
            let token = self.calls.next_token();
            let _ = self.consensus.propose(token, bootstrap.encode_at(self.config.level));
        }
    }

    fn look_at_sessions(&mut self, now: Now) {
        let (known, ended): (Vec<_>, Vec<_>) = self.meta.sessions().partition(|(_, alive)| *alive);
        let known: Vec<ClientId> = known.into_iter().map(|(client, _)| client).collect();
        let ended: Vec<ClientId> = ended.into_iter().map(|(client, _)| client).collect();
        self.duty.sessions.retain(|client, _| known.binary_search(client).is_ok());
        for client in known {
            let heard = *self.duty.sessions.entry(client).or_insert(now.mono);
            if now.mono > heard + SESSION_TERM {
                self.propose_own(&Command::SessionExpired { client });
            }
        }
        self.duty.ended.retain(|client, _| ended.binary_search(client).is_ok());
        for client in ended {
            let since = *self.duty.ended.entry(client).or_insert(now.mono);
            if now.mono > since + SESSION_TERM + LEASE_GRACE {
                self.propose_own(&Command::LeasesFree { client });
            }
        }
    }

    fn look_at_servers(&mut self, now: Now) {
        let offline_after = Duration::from_secs(self.meta.config("mds.wd.offline_tout"));
        for info in self.meta.cs_infos() {
            let Some(server) = self.duty.servers.get(&info.cs) else {
                // Registered under this leader and not heard since: begin to count now.
                self.duty.heard_server(info.cs, 0, &info.stats, now.mono);
                continue;
            };
            let link_gone = server.link_lost.is_some_and(|at| now.mono > at + SERVER_LINK_GRACE);
            let silent = now.mono > server.heard + SERVER_SILENT || link_gone;
            let long_silent = now.mono > server.heard + offline_after;
            let state = match info.state {
                CsState::Active if silent => CsState::Inactive,
                CsState::Inactive if long_silent => CsState::Offline,
                _ => continue,
            };
            self.propose_own(&Command::CsSilent { cs: info.cs, state, wall_ns: now.wall_ns });
        }
    }

    /// Brings the group in line with the registry: admitted servers become learners, then voters; removed ones leave.
    fn look_at_members(&mut self, now: Now) {
        let status = self.consensus.status();
        let registry: Vec<_> = self.meta.registry().cloned().collect();
        for entry in registry {
            let id = entry.info.mds;
            let (votes, learns) = (status.members.voters.contains_key(&id), status.members.learners.contains_key(&id));
            if entry.leaving {
                self.move_out(now, id, votes || learns);
            } else if !votes && !learns {
                let member = Member { id, instance: entry.nonce };
                let token = self.calls.next_token();
                let _ = self.consensus.propose_change(token, Change::AddLearner(member));
            } else if learns {
                let caught_up =
                    status.peers.iter().any(|p| p.id == id && p.active && p.lag <= PROMOTE_LAG_MAX && !p.in_snapshot);
                if caught_up {
                    let member = Member { id, instance: entry.nonce };
                    let token = self.calls.next_token();
                    let _ = self.consensus.propose_change(token, Change::AddVoter(member));
                }
            } else if !entry.info.voter {
                self.propose_own(&Command::MdsVoter { mds: id, voter: true, wall_ns: now.wall_ns });
            }
        }
    }

    fn move_out(&mut self, now: Now, id: MdsId, is_member: bool) {
        if !is_member {
            self.propose_own(&Command::MdsLeft { mds: id, wall_ns: now.wall_ns });
        } else if id == self.config.id {
            // A leader cannot remove itself: it hands over first, and the next leader goes on.
            let next = self.consensus.status().members.voters.keys().copied().find(|other| *other != id);
            if let Some(next) = next {
                let _ = self.consensus.transfer_leader(next);
            }
        } else {
            let token = self.calls.next_token();
            let _ = self.consensus.propose_change(token, Change::Remove(id));
        }
    }
}
