//! The open node: events in, effects out.
//!
//! Flow of one turn: proposals and reads enter the library; its changes (entries, term, vote) go into the log in memory
//! and, as one group, to the disk; messages that promise something wait until that group is durable, a leader's
//! appends do not wait; committed entries leave for the state machine.

use crate::config::Config;
use crate::entry::{self, Content};
use crate::error::{NotLeader, ProposeError, ReceiveError};
use crate::members::{Change, Members};
use crate::output::{Committed, CommittedKind, Output, RoleChange, SnapshotMeta, SnapshotWanted};
use crate::reads::Reads;
use crate::snapshot::Install;
use crate::store::{LogStore, UNWRITTEN};
use crate::wal::{Progress, Wal};
use crate::wire::{self, Identity};
use cairn_env::{DiskDone, DiskError, DiskRequest};
use cairn_stdx::{Rng, planted};
use cairn_types::{Instant, MdsId};
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{INVALID_ID, RawNode, StateRole};
use std::collections::{BTreeMap, VecDeque};

/// Everything of an open node.
pub(crate) struct Node {
    pub identity: Identity,
    pub raw: RawNode<LogStore>,
    pub wal: Wal,
    pub install: Option<Install>,
    /// Configuration of an image the library has accepted and not handed back yet.
    pub install_pending: Option<Members>,
    /// Messages that must not leave before the batch of changes they promise is durable.
    pub held: VecDeque<(u64, MdsId, Vec<u8>)>,
    /// Numbers of batches of changes ("readies"): taken, needing the disk, in a group, durable.
    pub ready_taken: u64,
    pub sync_needed: u64,
    pub sync_written: u64,
    pub sync_durable: u64,
    pub proposals: Vec<(u64, Entry)>,
    pub proposal_bytes: u64,
    pub change_queued: bool,
    /// Term and token of each entry proposed here, by index.
    pub tokens: BTreeMap<u64, (u64, u64)>,
    pub reads: Reads,
    pub ticks: u64,
    pub next_tick: Instant,
    pub commit_lag_ticks: u32,
    pub commit_due: bool,
    pub election_key: (u64, StateRole, u64),
    pub election_timeout: usize,
    /// Last entry given to the state machine.
    pub emitted: u64,
    /// What the shell reported as applied; the library is told when its own bounds allow.
    pub applied_goal: u64,
    /// Committed entries that wait for the end of an installation, or for one to begin.
    pub waiting: VecDeque<Entry>,
    /// The state machine has nothing, and the log does not begin with the first entry.
    pub state_lost: bool,
    pub role: RoleChange,
}

impl Node {
    pub fn check_leads(&self) -> Result<(), ProposeError> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return Err(NotLeader { leader: self.leader() }.into());
        }
        if raft.lead_transferee.is_some() { Err(ProposeError::Transferring) } else { Ok(()) }
    }

    pub fn leader(&self) -> Option<MdsId> {
        let id = self.raw.raft.leader_id;
        (id != INVALID_ID).then_some(MdsId(id))
    }

    pub fn queue(&mut self, config: &Config, token: u64, entry: Entry) -> Result<(), ProposeError> {
        if self.proposals.len() >= config.proposals_max as usize {
            return Err(ProposeError::QueueFull);
        }
        let bytes = entry::encoded_len(&entry) as u64;
        if self.raw.store().live_bytes() + self.proposal_bytes + bytes > config.leader_live_max() {
            return Err(ProposeError::LogFull);
        }
        self.proposal_bytes += bytes;
        self.proposals.push((token, entry));
        Ok(())
    }

    /// True when the group knows this id under another instance (C4).
    pub fn impostor(&self) -> bool {
        let known = self.raw.store().members().instance_of(self.identity.id);
        known.is_some_and(|instance| instance != self.identity.instance) && !planted!("raft_vote_after_amnesia")
    }

    /// True when this node may stand for election: all it holds is durable, its log is the one the group admitted, and
    /// it can apply what it would commit.
    pub fn may_campaign(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        log.persisted == log.last_index()
            && log.applied >= log.store.base().0
            && !self.impostor()
            && (!self.state_lost || planted!("raft_campaign_without_state"))
    }

    pub fn tick(&mut self, config: &Config, rng: &mut Rng, out: &mut Output) {
        self.ticks += 1;
        let raft = &mut self.raw.raft;
        let key = (raft.term, raft.state, raft.leader_id);
        if key != self.election_key {
            self.election_key = key;
            self.election_timeout =
                (config.election_ticks + rng.below(u64::from(config.election_ticks)) as u32) as usize;
        }
        // The library draws its timeout from a random generator of its own; ours replaces it before it is looked at.
        raft.set_randomized_election_timeout(self.election_timeout);
        if raft.state == StateRole::Leader || self.may_campaign() {
            let campaigned = self.raw.tick() && self.raw.raft.state != StateRole::Leader;
            if campaigned {
                self.election_key.0 = u64::MAX;
            }
        }
        let patience = u64::from(config.election_ticks);
        self.reads.retry_before(self.ticks.saturating_sub(patience));
        self.reads.expire_before(self.ticks.saturating_sub(4 * patience), &mut out.read_dropped);
        // An idle node brings its commit index to disk too. The group proves the one before it, so a torn tail then
        // never hides acknowledged entries.
        let lags = self.raw.store().hard.commit != self.wal.commit_written;
        self.commit_lag_ticks = if lags { self.commit_lag_ticks + 1 } else { 0 };
        self.commit_due = self.commit_lag_ticks >= config.election_ticks;
    }

    pub fn receive(&mut self, config: &Config, from: MdsId, bytes: &[u8]) -> Result<(), ReceiveError> {
        let (message, instance) = wire::decode(&self.identity, from, bytes)?;
        let (kind, log) = (message.get_msg_type(), &self.raw.raft.raft_log);
        let (term, last) = (self.raw.raft.term, log.last_index());
        if wire::counts(kind) && !planted!("raft_vote_after_amnesia") {
            let known = self.raw.store().members().instance_of(from);
            if let Some(expected) = known.filter(|expected| *expected != instance) {
                return Err(ReceiveError::OtherInstance { from, found: instance, expected });
            }
        }
        match kind {
            MessageType::MsgHeartbeat if message.term >= term && message.commit > last => {
                return Err(ReceiveError::LogWentBack { committed: message.commit, last });
            }
            MessageType::MsgAppend if !message.entries.is_empty() => {
                let more: usize = message.entries.iter().map(entry::encoded_len).sum();
                if self.raw.store().live_bytes() + more as u64 > config.follower_live_max() {
                    return Err(ReceiveError::LogFull);
                }
            }
            // Only a leader knows what its followers can have: one that crashed has forgotten what it sent undurable.
            MessageType::MsgAppendResponse
                if self.raw.raft.state == StateRole::Leader
                    && message.term == term
                    && !message.reject
                    && message.index > last =>
            {
                return Err(ReceiveError::BeyondLog { from, index: message.index, last });
            }
            MessageType::MsgTimeoutNow if !self.may_campaign() => return Ok(()),
            _ => {}
        }
        // What the library refuses (an answer of a node that is no member any more) is no error of the connection.
        let _ = self.raw.step(message);
        Ok(())
    }

    pub fn disk_done(&mut self, done: &DiskDone, out: &mut Output) -> Result<(), DiskError> {
        match self.wal.done(done)? {
            Progress::Next(request) => out.disk.push(request),
            Progress::Durable(covers) => {
                self.sync_durable = covers;
                self.raw.on_persist_ready(covers);
                self.sync_applied();
                self.release(out);
                if let Some(install) = &mut self.install {
                    out.snapshot_prepared = install.durable(covers).or(out.snapshot_prepared.take());
                }
            }
        }
        Ok(())
    }

    /// Tells the library what is applied, as far as its own bounds allow.
    pub fn sync_applied(&mut self) {
        let log = &self.raw.raft.raft_log;
        let index = self.applied_goal.min(log.committed).min(log.persisted);
        if index > log.applied {
            self.raw.advance_apply_to(index);
        }
    }

    /// Sends what no longer waits for the disk (C1).
    fn release(&mut self, out: &mut Output) {
        let durable = if planted!("raft_ack_before_sync") { u64::MAX } else { self.sync_durable };
        while self.held.front().is_some_and(|(needs, ..)| *needs <= durable) {
            let (_, to, bytes) = self.held.pop_front().expect("checked above");
            out.send.push((to, bytes));
        }
    }

    pub fn turn(&mut self, out: &mut Output) {
        self.feed_proposals(out);
        let raft = &self.raw.raft;
        if (raft.state == StateRole::Leader || raft.leader_id != INVALID_ID)
            && let Some(context) = self.reads.start_round(self.identity.id.0, self.ticks)
        {
            self.raw.read_index(context);
        }
        while self.raw.has_ready() {
            self.take_ready(out);
        }
        self.sync_applied();
        if self.sync_durable >= self.sync_needed {
            // Nothing since the last durable group needs the disk: these batches are as durable as they will be.
            self.raw.on_persist_ready(self.ready_taken);
        }
        self.release(out);
        self.notice_role(out);
        let dirty = self.sync_needed > self.sync_written || self.wal.base_dirty || self.wal.intent_dirty;
        if !self.wal.is_busy() && (dirty || self.commit_due) {
            out.disk.push(self.write_group());
        }
    }

    fn write_group(&mut self) -> DiskRequest {
        self.sync_written = self.ready_taken;
        if let Some(install) = &mut self.install {
            install.written(self.ready_taken);
        }
        (self.commit_due, self.commit_lag_ticks) = (false, 0);
        let intent = self.install.as_ref().map(Install::meta);
        self.wal.write_group(self.raw.mut_store(), intent, self.ready_taken)
    }

    fn feed_proposals(&mut self, out: &mut Output) {
        if self.proposals.is_empty() {
            return;
        }
        let (tokens, entries): (Vec<u64>, Vec<Entry>) = self.proposals.drain(..).unzip();
        (self.proposal_bytes, self.change_queued) = (0, false);
        let first = self.raw.raft.raft_log.last_index() + 1;
        let mut message = Message { from: self.identity.id.0, entries, ..Message::default() };
        message.set_msg_type(MessageType::MsgPropose);
        if self.raw.raft.state == StateRole::Leader && self.raw.raft.step(message).is_ok() {
            let term = self.raw.raft.term;
            assert_eq!(self.raw.raft.raft_log.last_index() + 1, first + tokens.len() as u64, "one entry per proposal");
            self.tokens.extend((first..).zip(tokens.into_iter().map(|token| (term, token))));
        } else {
            out.dropped.extend(tokens);
        }
    }

    fn take_ready(&mut self, out: &mut Output) {
        let mut ready = self.raw.ready();
        self.ready_taken = ready.number();
        if ready.must_sync() {
            self.sync_needed = ready.number();
        }
        for state in ready.take_read_states() {
            let tokens = self.reads.answered(&state.request_ctx);
            out.read_ready.extend(tokens.into_iter().map(|token| (token, state.index)));
        }
        let hard = ready.hs().cloned();
        let metadata = ready.snapshot().get_metadata();
        let installed = (metadata.index != 0).then_some((metadata.index, metadata.term));
        let entries = ready.take_entries();
        let committed = ready.take_committed_entries();
        let (messages, promises) = (ready.take_messages(), ready.take_persisted_messages());
        if let Some((index, term)) = installed {
            let members = self.installed_members();
            self.raw.mut_store().install(&SnapshotMeta { index, term, members });
            self.wal.base_dirty = true;
        }
        if let Some(hard) = hard {
            self.raw.mut_store().hard = hard;
        }
        let early = if planted!("raft_apply_before_commit") { entries.clone() } else { Vec::new() };
        self.raw.mut_store().append(entries, UNWRITTEN);
        self.raw.advance_append_async(ready);
        for message in messages {
            self.send(message, None, out);
        }
        let needs = self.sync_needed;
        for message in promises {
            self.send(message, Some(needs), out);
        }
        for entry in early {
            if entry.index == self.emitted + 1 && entry.context.is_empty() {
                self.emit(entry, out);
            }
        }
        for entry in committed {
            self.emit_or_wait(entry, out);
        }
    }

    fn send(&mut self, message: Message, needs: Option<u64>, out: &mut Output) {
        let to = MdsId(message.to);
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let index_min = message.get_snapshot().get_metadata().index;
            out.snapshot_wanted.push(SnapshotWanted { to, index_min });
            return;
        }
        // The library forwards reads of others to a leader it has just heard of; the asker asks again instead.
        if message.from != self.identity.id.0 || to == self.identity.id {
            return;
        }
        let Some(bytes) = wire::encode(&self.identity, &message) else { return };
        match needs {
            Some(needs) => self.held.push_back((needs, to, bytes)),
            None => out.send.push((to, bytes)),
        }
    }

    pub fn emit_or_wait(&mut self, entry: Entry, out: &mut Output) {
        if self.install.is_some() || self.state_lost {
            self.waiting.push_back(entry);
        } else {
            self.emit(entry, out);
        }
    }

    /// Gives a committed entry to the state machine, unless an installed image contains it (C3).
    pub fn emit(&mut self, entry: Entry, out: &mut Output) {
        let (index, term) = (entry.index, entry.term);
        let content = entry::content(entry);
        if index <= self.emitted {
            if let Content::Change(change) = content
                && index > self.raw.store().members_index()
            {
                self.apply_change(index, change);
            }
            return;
        }
        assert_eq!(index, self.emitted + 1, "C3: committed entries are consecutive");
        self.emitted = index;
        let token = self.tokens.remove(&index).filter(|(proposed, _)| *proposed == term).map(|(_, token)| token);
        let kind = match content {
            Content::Noop => CommittedKind::Noop,
            Content::Command(data) => CommittedKind::Command(data),
            Content::Change(change) => {
                self.apply_change(index, change);
                CommittedKind::Change { change, members: self.raw.store().members().clone() }
            }
        };
        out.committed.push(Committed { index, term, token, kind });
    }

    /// Brings a committed change into force. A change that makes no sense has no effect, on every node alike.
    fn apply_change(&mut self, index: u64, change: Change) {
        let Ok(members) = self.raw.store().members().after(change) else { return };
        if self.raw.raft.state == StateRole::Leader && change.takes_vote_of(self.identity.id) {
            // The library cannot lead a group it is no voter of; the others elect a leader among themselves.
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, INVALID_ID);
        }
        let conf = self.raw.apply_conf_change(&change.conf_change()).expect("checked against the configuration");
        assert!(members.matches(&conf), "C6: {members:?} differs from {conf:?}");
        self.raw.mut_store().set_members(index, members);
    }

    fn notice_role(&mut self, out: &mut Output) {
        let raft = &self.raw.raft;
        let we_are_leader = raft.state == StateRole::Leader;
        let term = raft.term;
        if !we_are_leader || self.role.term != term {
            let lost = self.tokens.iter().filter(|(_, (proposed, _))| !we_are_leader || *proposed != term);
            let lost: Vec<(u64, u64)> = lost.map(|(index, (_, token))| (*index, *token)).collect();
            for (index, token) in lost {
                self.tokens.remove(&index);
                out.dropped.push(token);
            }
        }
        let role = RoleChange { leader: self.leader(), term, we_are_leader };
        if role != self.role {
            if role.leader != self.role.leader {
                self.reads.retry_before(u64::MAX);
            }
            self.role = role;
            out.role = Some(role);
        }
    }
}
