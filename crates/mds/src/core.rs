//! The server's core: events in, effects out.

use crate::backup::Backups;
use crate::base::Base;
use crate::calls::Calls;
use crate::checkpoint::Checkpoint;
use crate::duty::Duty;
use crate::group::Group;
use crate::image::Images;
use crate::room::Rooms;
use cairn_consensus::{Committed, CommittedKind, Consensus, Output};
use cairn_meta::Overlay;
use cairn_meta::{Command, CommandError, Meta, MetaEffect};
use cairn_stdx::Rng;
use cairn_types::{ClusterId, Duration, Level, MdsId};
use cairn_wire::mds::{MdsError, MdsInfo};
use cairn_wire::{DiskIndex, Effects, Event, FrameKind, LinkId, NetEvent, Now, Process};
use std::net::SocketAddr;

/// The one disk of a metadata server: its log.
const LOG_DISK: DiskIndex = DiskIndex(0);
/// How often the leader looks at what it has to do by itself, and everyone at the checkpoint.
const DUTY_PERIOD: Duration = Duration::from_millis(100);

/// What a metadata server is told at its start.
#[derive(Clone, Debug)]
pub struct MdsConfig {
    /// Its id.
    pub id: MdsId,
    /// The level it runs at.
    pub level: Level,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its repository directory, for `list-services`.
    pub repository: String,
    /// The servers known when it was made, itself included; later the state knows better.
    pub servers: Vec<MdsInfo>,
    /// It is the first server of a new cluster: proposes the bootstrap command while the state is empty.
    pub bootstrap: bool,
    /// Its log.
    pub log: cairn_consensus::Config,
    /// Memtable size that starts a checkpoint.
    pub checkpoint_bytes: usize,
}

/// The metadata server as a pure state machine.
pub struct MdsCore<B: Base> {
    pub(crate) config: MdsConfig,
    pub(crate) consensus: Consensus,
    pub(crate) meta: Meta<Overlay<B>>,
    pub(crate) calls: Calls,
    pub(crate) duty: Duty,
    pub(crate) group: Group,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) images: Images,
    pub(crate) backups: Backups,
    pub(crate) rooms: Rooms,
    pub(crate) leading: bool,
    /// The log goes on after what the lost state contained: another server must give the state.
    pub(crate) state_lost: bool,
    /// Last log index applied here, whatever kind of entry it was.
    pub(crate) applied: u64,
    rng: Rng,
    pub(crate) out: Output,
    open: bool,
    /// The log or the image is not for this release: nothing more is applied, and the process ends.
    cannot_read: bool,
}

impl<B: Base> MdsCore<B> {
    /// A server that has not started. `rng` is seeded by the shell or the simulator.
    pub fn new(config: MdsConfig, base: B, rng: Rng) -> Self {
        let applied = base.mark().index;
        Self {
            consensus: Consensus::new(config.log.clone()),
            meta: Meta::open_at(Overlay::new(base), config.level),
            calls: Calls::default(),
            duty: Duty::default(),
            group: Group::new(config.id, &config.servers),
            checkpoint: Checkpoint::default(),
            images: Images::default(),
            backups: Backups::default(),
            rooms: Rooms::default(),
            leading: false,
            state_lost: false,
            applied,
            rng,
            out: Output::default(),
            open: false,
            cannot_read: false,
            config,
        }
    }

    /// The state, for checkers and screens.
    pub fn meta(&self) -> &Meta<Overlay<B>> {
        &self.meta
    }

    /// The state, of a server that ends.
    pub fn into_meta(self) -> Meta<Overlay<B>> {
        self.meta
    }

    /// The consensus node, for checkers and screens.
    pub fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    /// True while this server leads.
    pub fn is_leader(&self) -> bool {
        self.leading
    }

    /// Last log index applied here.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Address of the leader, as far as known.
    pub(crate) fn leader_addr(&self) -> Option<SocketAddr> {
        let leader = self.consensus.status().leader?;
        self.group.addr(leader)
    }

    pub(crate) fn not_leader(&self) -> MdsError {
        MdsError::NotLeader { leader: self.leader_addr().filter(|addr| *addr != self.config.addr) }
    }

    /// Proposes a command of the server's own; it is repeated by the next look at the duties if it is lost.
    pub(crate) fn propose_own(&mut self, command: &Command) {
        let token = self.calls.next_token();
        // A full queue or lost leadership: the duty is still there at the next look.
        let _ = self.consensus.propose(token, command.encode());
    }

    /// Carries out what consensus wants and applies what it committed, until nothing is left.
    pub(crate) fn drain(&mut self, now: Now, effects: &mut Effects) {
        let mut out = std::mem::take(&mut self.out);
        for request in out.disk.drain(..) {
            effects.disk.push((LOG_DISK, request));
        }
        // A server that is leaving must still hear of the change before the group forgets it.
        let changes = out.committed.iter().any(|committed| !matches!(committed.kind, CommittedKind::Command(_)));
        if changes {
            self.send_raft(&mut out, effects);
        }
        if let Some(opened) = out.opened.take() {
            self.opened(opened, effects);
        }
        if let Some(error) = out.failed.take() {
            effects.fatal = Some(format!(
                "the disk of the metadata log failed ({error}); the other servers go on. Replace the disk, then remove \
                 this server with `cairn rm-mds {}` and make a new one",
                self.config.id.0
            ));
        }
        for committed in out.committed.drain(..) {
            if self.cannot_read {
                break;
            }
            self.apply(now, committed, effects);
        }
        if let Some(role) = out.role.take() {
            self.role_changed(now, role.we_are_leader, effects);
        }
        self.consensus.applied(self.applied);
        // After the answers to those whose commands were committed: they wait, the other servers do not.
        self.send_raft(&mut out, effects);
        for token in out.dropped.drain(..) {
            self.calls.answer(token, &Err(MdsError::Unknown), effects);
        }
        for (token, index) in out.read_ready.drain(..) {
            self.calls.read_ready(token, index);
        }
        for token in out.read_dropped.drain(..) {
            let error = MdsError::Unavailable("no majority of the metadata servers answers".to_owned());
            self.calls.drop_read(token, &error, effects);
        }
        for wanted in out.snapshot_wanted.drain(..) {
            self.image_wanted(&wanted, effects);
        }
        if let Some(meta) = out.snapshot_prepared.take() {
            self.image_prepared(&meta, effects);
        }
        self.answer_reads(effects);
        self.out = out;
    }

    fn send_raft(&mut self, out: &mut Output, effects: &mut Effects) {
        for (to, bytes) in out.send.drain(..) {
            self.group.send(to, bytes, effects);
        }
    }

    fn opened(&mut self, opened: Result<cairn_consensus::Opened, cairn_consensus::OpenError>, effects: &mut Effects) {
        match opened {
            Ok(report) => {
                self.open = true;
                let cut = if report.cut_bytes > 0 { " after cutting a torn last group" } else { "" };
                effects.log.push(format!(
                    "log opened{cut}: term {}, entries {} to {}, state at {}",
                    report.term, report.base, report.last, self.applied
                ));
                self.look_for_state(effects);
            }
            Err(error) => effects.fatal = Some(format!("metadata log: {error}")),
        }
    }

    /// A server whose log was compacted and that has no image gets its state from another one, if there is another.
    fn look_for_state(&mut self, effects: &mut Effects) {
        let status = self.consensus.status();
        self.state_lost = status.state_lost;
        if !self.state_lost {
            return;
        }
        if status.members.voters.keys().all(|mds| *mds == self.config.id) {
            effects.fatal = Some(format!(
                "the metadata image in {} is lost or damaged, and no other metadata server has the state: restore it with \
                 `cairn recover-metadata`, from the newest backup if there is one (guide: disaster.md); keep the directory",
                self.config.repository
            ));
            return;
        }
        let text =
            "the state of this server is lost, its log and its votes are whole: the leader is asked for the state";
        effects.log.push(text.to_owned());
    }

    fn apply(&mut self, now: Now, committed: Committed, effects: &mut Effects) {
        assert!(committed.index == self.applied + 1, "I11: entry {} follows {}", committed.index, self.applied);
        let command = match &committed.kind {
            CommittedKind::Command(bytes) => match Command::decode(bytes, self.config.level) {
                Ok(command) => Some(command),
                Err(error) => return self.cannot_apply(committed.index, &error, effects),
            },
            CommittedKind::Noop | CommittedKind::Change { .. } => None,
        };
        self.applied = committed.index;
        match committed.kind {
            CommittedKind::Noop => {}
            CommittedKind::Change { change, members } => {
                effects.log.push(format!("configuration change {change:?}"));
                if let Some(token) = committed.token {
                    self.calls.forget(token);
                }
                self.members_changed(change, &members, effects);
            }
            CommittedKind::Command(_) => {
                let (level, command) = command.expect("decoded above");
                let applied = self.meta.apply_command(committed.index, level, command);
                if let Some(token) = committed.token {
                    self.calls.answer(token, &applied.reply, effects);
                }
                for effect in applied.effects {
                    self.meta_effect(now, effect, effects);
                }
            }
        }
    }

    /// Nothing more is applied: the state is not for this release.
    pub(crate) fn cannot_go_on(&mut self) {
        self.cannot_read = true;
    }

    /// An entry of the log cannot be read here: to pass it over would make this state another one than that of the
    /// others. It is not applied, so a release that can read it goes on from here.
    fn cannot_apply(&mut self, index: u64, error: &CommandError, effects: &mut Effects) {
        self.cannot_go_on();
        let what = format!("entry {index} of the metadata log");
        effects.fatal = Some(match error {
            CommandError::Level { found, .. } => self.too_new(&what, *found),
            CommandError::Malformed(error) => format!(
                "{what} in {} cannot be read: {error}. This server stops before it differs from the others; they go on",
                self.config.repository
            ),
        });
    }

    fn meta_effect(&mut self, now: Now, effect: MetaEffect, effects: &mut Effects) {
        match effect {
            MetaEffect::Event(event) if self.leading => {
                effects.log.push(format!("{} {}", event.code, event.text));
            }
            MetaEffect::Push { to, push } if self.leading => self.calls.push(to, &push, effects),
            MetaEffect::SessionEnded(client) => self.session_ended(now, client),
            MetaEffect::MdsAdmitted(info) => self.group.know(&info),
            MetaEffect::MdsRemoving(_) | MetaEffect::Event(_) | MetaEffect::Push { .. } => {}
        }
    }

    fn role_changed(&mut self, now: Now, leading: bool, effects: &mut Effects) {
        if leading == self.leading {
            return;
        }
        self.leading = leading;
        if leading {
            effects.log.push(format!("leads the metadata servers from term {}", self.consensus.status().term));
            self.begin_duty(now);
            self.rooms.begin_to_lead();
        } else {
            effects.log.push("no longer leads the metadata servers".to_owned());
            self.calls.lost_leadership(effects);
        }
    }

    fn net(&mut self, now: Now, event: NetEvent, effects: &mut Effects) {
        match event {
            NetEvent::Up { link, peer, level } => {
                self.group.link_up(link);
                self.calls.link_up(link, peer, level);
            }
            NetEvent::Down { link, reason } => {
                if self.group.link_down(link, now.mono) {
                    self.calls.forget_link(link);
                    self.images.link_down(link);
                    return;
                }
                let _ = reason;
                self.link_down(now, link);
            }
            NetEvent::Frame { link, frame } => match frame.kind {
                FrameKind::MdsCall => self.call(now, link, frame.id, &frame.prefix, effects),
                FrameKind::Raft => self.raft_frame(now, link, &frame.prefix, effects),
                FrameKind::Image => self.image_frame(now, link, frame.id, &frame.prefix, effects),
                other => {
                    effects.log.push(format!("link {link:?} sent a frame of kind {other:?}, which is not for us"));
                    self.close(link, effects);
                }
            },
        }
    }

    pub(crate) fn close(&mut self, link: LinkId, effects: &mut Effects) {
        effects.net.push(cairn_wire::NetEffect::Close { link });
        self.calls.forget_link(link);
        self.images.link_down(link);
        self.group.forget_link(link);
    }

    fn timer(&mut self, now: Now, effects: &mut Effects) {
        self.consensus.tick(now.mono, &mut self.rng, &mut self.out);
        self.drain(now, effects);
        if !self.open {
            return;
        }
        self.group.reconnect(now.mono, effects);
        if self.duty.due(now.mono, DUTY_PERIOD) {
            self.backups.look(now.mono);
            self.look_at_checkpoint(effects);
            self.look_at_images(effects);
            self.look_at_room(now, effects);
            if self.leading {
                self.look_at_duties(now, effects);
            }
        }
    }
}

impl<B: Base> Process for MdsCore<B> {
    fn step(&mut self, now: Now, event: Event, effects: &mut Effects) {
        if self.cannot_read {
            return;
        }
        match event {
            Event::Start => {
                if let Some(level) = self.meta.too_new() {
                    self.cannot_read = true;
                    effects.fatal = Some(self.too_new("the metadata image", level));
                    return;
                }
                match self.applied {
                    0 => self.consensus.start_without_state(now.mono, &mut self.rng, &mut self.out),
                    applied => self.consensus.start(now.mono, applied, &mut self.rng, &mut self.out),
                }
                self.refresh_group();
            }
            Event::Disk(_, done) => self.consensus.disk_done(now.mono, done, &mut self.out),
            Event::Net(event) => self.net(now, event, effects),
            Event::Timer => self.timer(now, effects),
            Event::Turn => self.consensus.turn(now.mono, &mut self.out),
        }
        self.drain(now, effects);
        if !self.open {
            // The log is being read: its disk wakes us. The duties stand since before time began and would have us
            // spin.
            return;
        }
        let duty = self.duty.next(DUTY_PERIOD).max(now.mono);
        effects.wake_at(self.consensus.next_tick().map_or(duty, |tick| tick.min(duty)));
    }
}

#[cfg(test)]
mod tests;
