//! State images: a follower behind the base of its leader's log gets the state itself, streamed by the shells.
//!
//! The consensus log keeps only the announcement. Receiving side: `prepare_snapshot` writes the intent, and from then
//! on no entry is emitted; `Output::snapshot_prepared` says that the intent is durable; the shell replaces its state;
//! `install_snapshot` moves the base of the log. A crash anywhere between is told apart at opening: the state machine
//! stands at the announced index, or it does not.

use crate::config::NUMBER_MAX;
use crate::consensus::Consensus;
use crate::error::SnapshotError;
use crate::members::Members;
use crate::node::Node;
use crate::output::{Output, SnapshotMeta};
use cairn_types::MdsId;
use raft::eraftpb::{Message, MessageType, Snapshot};
use raft::{INVALID_ID, SnapshotStatus, StateRole};

/// An installation under way.
pub(crate) struct Install {
    meta: SnapshotMeta,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Asked,
    Written(u64),
    Prepared,
}

impl Install {
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// The group now being written contains the intent.
    pub fn written(&mut self, covers: u64) {
        if self.phase == Phase::Asked {
            self.phase = Phase::Written(covers);
        }
    }

    /// A group is durable. Returns the image when its intent is among it.
    pub fn durable(&mut self, covers: u64) -> Option<SnapshotMeta> {
        if matches!(self.phase, Phase::Written(written) if written <= covers) {
            self.phase = Phase::Prepared;
            return Some(self.meta.clone());
        }
        None
    }
}

impl Consensus {
    /// Term and configuration at `index`, for an image of the state after that entry. None outside the log.
    pub fn snapshot_meta(&self, index: u64) -> Option<SnapshotMeta> {
        let node = self.node()?;
        let store = node.raw.store();
        if index == 0 || index < store.base().0 || index > node.emitted {
            return None;
        }
        let term = store.term_at(index)?;
        Some(SnapshotMeta { index, term, members: store.members_at(index).clone() })
    }

    /// The answer to `Output::snapshot_wanted`: the image reached `to`, or did not. Each request must be answered.
    pub fn snapshot_sent(&mut self, to: MdsId, ok: bool) {
        if let Some(node) = self.node_mut() {
            node.raw.report_snapshot(to.0, if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
        }
    }

    /// Announces the installation of an image that the leader's shell offers. No entry is emitted from now on, until
    /// `install_snapshot` or `abandon_snapshot`.
    ///
    /// # Errors
    /// [`SnapshotError`] when the image is of no use here.
    pub fn prepare_snapshot(&mut self, meta: SnapshotMeta) -> Result<(), SnapshotError> {
        let node = self.node_mut().ok_or(SnapshotError::Closed)?;
        if meta.index == 0 || meta.term == 0 || meta.index >= NUMBER_MAX || meta.term >= NUMBER_MAX {
            return Err(SnapshotError::Invalid);
        }
        if node.install.is_some() {
            return Err(SnapshotError::Busy);
        }
        if meta.index <= node.emitted {
            // The leader does not know how far this node is, or it would not offer: without an answer it offers for
            // ever.
            let emitted = node.emitted;
            node.answer_leader(emitted);
            return Err(SnapshotError::Old { index: meta.index, emitted: node.emitted });
        }
        if !meta.members.contains(node.identity.id) {
            return Err(SnapshotError::NotMember);
        }
        // What is committed is in a leader's log: an image of anything else is none of this group.
        let log = &node.raw.raft.raft_log;
        if node.raw.raft.state == StateRole::Leader
            && !log.match_term(meta.index, meta.term)
            && meta.index > node.raw.store().base().0
        {
            return Err(SnapshotError::NotInLog { index: meta.index });
        }
        node.install = Some(Install { meta, phase: Phase::Asked });
        node.wal.intent_dirty = true;
        Ok(())
    }

    /// The state machine now stands durably at the prepared image.
    ///
    /// # Errors
    /// [`SnapshotError::NotPrepared`] when `snapshot_prepared` did not name this image.
    pub fn install_snapshot(&mut self, meta: &SnapshotMeta, out: &mut Output) -> Result<(), SnapshotError> {
        let node = self.node_mut().ok_or(SnapshotError::Closed)?;
        if !node.install.as_ref().is_some_and(|install| install.meta == *meta && install.phase == Phase::Prepared) {
            return Err(SnapshotError::NotPrepared);
        }
        node.install_prepared(out);
        Ok(())
    }

    /// Gives an announced installation up. The state machine must stand where it stood before.
    pub fn abandon_snapshot(&mut self, out: &mut Output) {
        if let Some(node) = self.node_mut()
            && node.install.take().is_some()
        {
            node.wal.intent_dirty = true;
            if node.state_lost {
                return;
            }
            for entry in std::mem::take(&mut node.waiting) {
                node.emit(entry, out);
            }
        }
    }
}

impl Node {
    fn install_prepared(&mut self, out: &mut Output) {
        let meta = self.install.as_ref().expect("checked by the caller").meta.clone();
        let (term, state) = (self.raw.raft.term, self.raw.raft.state);
        if term < meta.term || !matches!(state, StateRole::Leader | StateRole::Follower) {
            self.raw.raft.become_follower(term.max(meta.term), INVALID_ID);
        }
        let leads = self.raw.raft.state == StateRole::Leader;
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (meta.index, meta.term);
        metadata.conf_state = Some(meta.members.conf_state());
        // A leader's log contains everything committed, so the image only moves its state machine on.
        let replaced = !leads && self.raw.raft.restore(snapshot);
        let meta_index = meta.index;
        self.emitted = meta.index;
        self.applied_goal = self.applied_goal.max(meta.index);
        self.wal.intent_dirty = true;
        if replaced {
            self.waiting.clear();
            self.install_pending = Some(meta.members);
            self.answer_leader(meta_index);
        } else {
            let held =
                self.raw.raft.raft_log.match_term(meta.index, meta.term) || meta.index <= self.raw.store().base().0;
            assert!(held, "I11: the image at {} is not in a log that should contain it", meta.index);
        }
        (self.install, self.state_lost) = (None, false);
        for entry in std::mem::take(&mut self.waiting) {
            self.emit(entry, out);
        }
    }

    /// Configuration of the image whose installation the library has just accepted.
    pub(crate) fn installed_members(&mut self) -> Members {
        self.install_pending.take().expect("only install_snapshot gives images to the library")
    }

    /// Tells the leader how far this node is now; waits for the disk like any acknowledgement.
    fn answer_leader(&mut self, index: u64) {
        let raft = &mut self.raw.raft;
        if raft.leader_id == INVALID_ID || raft.leader_id == raft.id {
            return;
        }
        let mut message = Message {
            to: raft.leader_id,
            from: self.identity.id.0,
            term: raft.term,
            index,
            commit: raft.raft_log.committed,
            ..Message::default()
        };
        message.set_msg_type(MessageType::MsgAppendResponse);
        raft.msgs.push(message);
    }
}
