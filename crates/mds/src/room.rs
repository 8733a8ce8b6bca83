//! Full disks, and servers that fall behind: what each server sees of its own disk and tells the leader, and what the
//! leader makes of it. It leaves leading to a server with room, and brings what ails a server into the state, which
//! logs it and refuses growth when too few have room (`cairn-meta`, `ailing.rs`).

use crate::base::{Base, Room};
use crate::core::MdsCore;
use cairn_consensus::{PeerStatus, SnapshotWanted, Status};
use cairn_meta::Command;
use cairn_types::{ClientId, Duration, Instant, MdsId, NodeId, format_size};
use cairn_wire::mds::{Call, MdsCondition, MdsLag, MdsRequest};
use cairn_wire::{Effects, FrameKind, LinkId, Now};
use std::collections::BTreeMap;

/// How often each server looks at its disk, and the leader at the servers.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// A report counts for this long.
const REPORT_TERM: Duration = Duration::from_secs(5);
/// Pause between two attempts to hand leadership over.
const HAND_OVER_PAUSE: Duration = Duration::from_secs(5);
/// A server that lacks more entries than this, not only for a moment, lags.
const LAG_MAX: u64 = 1000;
/// A moment.
const LAG_MOMENT: Duration = Duration::from_secs(2);
/// A server that has accepted nothing for this long, though there was something, is stale.
const ACCEPTS_NOTHING: Duration = Duration::from_secs(10);
/// One that lacks no more than this has caught up.
const CAUGHT_UP: u64 = 256;

/// What a server said of its disk.
#[derive(Clone, Copy)]
pub(crate) struct Report {
    pub heard: Instant,
    pub short: bool,
    pub free: u64,
    /// It lacks its state and wants one that contains this index.
    pub state_wanted: u64,
}

/// How a server follows.
struct Following {
    matched: u64,
    moved: Instant,
    behind_since: Option<Instant>,
}

/// What this server knows of disks. All but its own is a leader's, and volatile.
#[derive(Default)]
pub(crate) struct Rooms {
    own: Room,
    looked: Option<Instant>,
    reports: BTreeMap<MdsId, Report>,
    following: BTreeMap<MdsId, Following>,
    handed_over: Option<Instant>,
}

impl Rooms {
    pub fn begin_to_lead(&mut self) {
        self.reports.clear();
        self.following.clear();
        self.handed_over = None;
    }

    /// The last report of a server, unless it is old.
    fn report(&self, mds: MdsId, now: Instant) -> Option<Report> {
        self.reports.get(&mds).copied().filter(|report| now <= report.heard + REPORT_TERM)
    }

    /// How a server follows now, for how long it has accepted nothing, given how it did before.
    fn lag(&mut self, peer: &PeerStatus, now: Instant, before: MdsLag) -> (MdsLag, Duration) {
        let new = || Following { matched: peer.matched, moved: now, behind_since: None };
        let following = self.following.entry(peer.id).or_insert_with(new);
        if peer.matched > following.matched || peer.lag == 0 {
            (following.matched, following.moved) = (peer.matched, now);
        }
        let since = following.behind_since.unwrap_or(now);
        following.behind_since = (peer.lag > LAG_MAX).then_some(since);
        let silent = now.saturating_since(following.moved);
        let lag = match before {
            _ if peer.in_snapshot => MdsLag::Resync,
            _ if silent >= ACCEPTS_NOTHING => MdsLag::Silent,
            _ if peer.active && peer.lag <= CAUGHT_UP => MdsLag::None,
            _ if following.behind_since.is_some() && now.saturating_since(since) >= LAG_MOMENT => MdsLag::Behind,
            before => before,
        };
        (lag, silent)
    }
}

impl<B: Base> MdsCore<B> {
    /// Looks at the own disk, and as leader at the others.
    pub(crate) fn look_at_room(&mut self, now: Now, effects: &mut Effects) {
        if self.rooms.looked.is_some_and(|at| now.mono < at + LOOK_PERIOD) {
            return;
        }
        self.rooms.looked = Some(now.mono);
        let room = self.meta.kv().base().room();
        let before = std::mem::replace(&mut self.rooms.own, room);
        let (free, dir) = (format_size(room.free), &self.config.repository);
        match (before.short, room.short) {
            (false, true) => effects.log.push(format!("no room on the disk of {dir}: {free} free; goes on as it can")),
            (true, false) => effects.log.push(format!("there is room on the disk of {dir} again: {free} free")),
            _ => {}
        }
        if room.waits && !before.waits {
            effects.log.push(format!("the image in {dir} waits for room; the log keeps what is new"));
        }
        if self.leading {
            self.judge_members(now, effects);
        } else {
            self.report_room(effects);
        }
    }

    fn report_room(&mut self, effects: &mut Effects) {
        let leader = self.consensus.status().leader;
        let Some(link) = leader.and_then(|leader| self.group.link(leader)) else { return };
        let Room { short, free, .. } = self.rooms.own;
        let state_wanted = if self.state_lost { self.consensus.status().base + 1 } else { 0 };
        let request = MdsRequest::MdsReport { mds: self.config.id, short, free, state_wanted };
        let call = Call { session: ClientId(0), sequence: 0, acknowledged: 0, wall_ns: 0, request };
        effects.send(link, FrameKind::MdsCall, 0, cairn_wire::encode(&call));
    }

    /// A server told how it is; false when it is not who it says.
    pub(crate) fn room_reported(&mut self, link: LinkId, mds: MdsId, report: Report, effects: &mut Effects) -> bool {
        let is_itself = self.calls.peer(link) == Some(NodeId::Mds(mds));
        if is_itself {
            self.rooms.reports.insert(mds, report);
            // Consensus does not know of it: its log is whole.
            if self.leading && report.state_wanted > 0 && !self.images.is_sending(mds) {
                self.image_wanted(&SnapshotWanted { to: mds, index_min: report.state_wanted }, effects);
            }
        }
        is_itself
    }

    fn judge_members(&mut self, now: Now, effects: &mut Effects) {
        if self.meta.identity().is_none() {
            return;
        }
        let status = self.consensus.status();
        if self.meta.leader_told().is_none_or(|(_, term)| term < status.term) {
            self.propose_own(&Command::MdsLeads { mds: self.config.id, term: status.term, wall_ns: now.wall_ns });
        }
        let voters: Vec<MdsId> =
            self.meta.registry().filter(|member| member.info.voter).map(|member| member.info.mds).collect();
        self.rooms.reports.retain(|mds, _| voters.contains(mds));
        for mds in voters {
            let known = self.meta.mds_condition(mds);
            let (mut condition, mut free, mut lacks, mut silent) = (known, 0, 0, Duration::ZERO);
            if mds == self.config.id {
                condition = MdsCondition { no_room: self.rooms.own.short, lag: MdsLag::None };
                free = self.rooms.own.free;
            }
            if let Some(report) = self.rooms.report(mds, now.mono) {
                (condition.no_room, free) = (report.short, report.free);
            }
            if let Some(peer) = status.peers.iter().find(|peer| peer.id == mds) {
                (condition.lag, silent) = self.rooms.lag(peer, now.mono, known.lag);
                lacks = peer.lag;
            }
            if self.rooms.report(mds, now.mono).is_some_and(|report| report.state_wanted > 0) {
                condition.lag = MdsLag::Resync;
            }
            if condition != known {
                let (silent_s, wall_ns) = (silent.as_secs(), now.wall_ns);
                self.propose_own(&Command::MdsCondition { mds, condition, free, lacks, silent_s, wall_ns });
            }
        }
        self.leave_leading(now, &status, effects);
    }

    /// A leader without room leaves leading to a server that has some and everything else.
    fn leave_leading(&mut self, now: Now, status: &Status, effects: &mut Effects) {
        let paused = self.rooms.handed_over.is_some_and(|at| now.mono < at + HAND_OVER_PAUSE);
        if !self.rooms.own.short || paused {
            return;
        }
        let fits = |peer: &&PeerStatus| {
            let has_room = self.rooms.report(peer.id, now.mono).is_some_and(|report| !report.short);
            let votes = status.members.voters.contains_key(&peer.id);
            votes && has_room && peer.active && !peer.in_snapshot && peer.lag <= CAUGHT_UP
        };
        let Some(next) = status.peers.iter().filter(fits).max_by_key(|peer| peer.matched).map(|peer| peer.id) else {
            return;
        };
        self.rooms.handed_over = Some(now.mono);
        effects.log.push(format!("leaves leading to {next}, which has room on its disk"));
        let _ = self.consensus.transfer_leader(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a follower every second and gives what is said of it.
    fn judged(looks: &[(u64, u64, bool, bool)]) -> Vec<MdsLag> {
        let mut rooms = Rooms::default();
        let mut lag = MdsLag::None;
        let mut judge = |(second, &(matched, lacks, active, in_snapshot)): (usize, &(u64, u64, bool, bool))| {
            let peer = PeerStatus { id: MdsId(2), matched, lag: lacks, active, in_snapshot };
            (lag, _) = rooms.lag(&peer, Instant(second as u64 * 1_000_000_000), lag);
            lag
        };
        looks.iter().enumerate().map(&mut judge).collect()
    }

    #[test]
    fn what_a_follower_does_is_judged_with_patience() {
        use MdsLag::{Behind, None, Resync, Silent};
        // A burst is no lag; one that lasts is, until it has nearly caught up.
        let (burst, lags) = ((10, 5000, true, false), |matched| (matched, 1001, true, false));
        let looks =
            [burst, (5010, 0, true, false), lags(6000), lags(7000), lags(8000), lags(9000), (9500, 900, true, false)];
        let (mut looks, mut expected) = (looks.to_vec(), vec![None, None, None, None, Behind, Behind, Behind]);
        looks.push((9900, 256, true, false));
        expected.push(None);
        assert_eq!(judged(&looks), expected);
        // Nothing accepted for ten seconds, then what it lacks is gone from the log, then the image has come.
        let mut looks = vec![(50, 10, false, false); 12];
        looks.extend([
            (50, 9000, true, true),
            (50, 9100, true, true),
            (9000, 300, true, false),
            (9300, 0, true, false),
        ]);
        let mut expected = vec![None; 10];
        expected.extend([Silent, Silent, Resync, Resync, Resync, None]);
        assert_eq!(judged(&looks), expected);
        // One that is idle beside an idle leader is well, however long.
        assert_eq!(judged(&[(7, 0, true, false); 60]), [None; 60]);
    }
}
