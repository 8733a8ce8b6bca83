//! From a recovered log to an open node, and the picture of an open node.

use crate::config::Config;
use crate::consensus::Applied;
use crate::error::OpenError;
use crate::members::Change;
use crate::node::Node;
use crate::output::{Opened, Output, PeerStatus, Role, RoleChange, Status};
use crate::reads::Reads;
use crate::recover::Recovered;
use crate::store::LogStore;
use crate::wal::Wal;
use cairn_types::{Instant, MdsId};
use raft::{ProgressState, RawNode, StateRole};
use std::collections::{BTreeMap, VecDeque};

impl Node {
    pub fn open(
        config: &Config,
        found: Recovered,
        mut wal: Wal,
        applied: Applied,
        nonce: u64,
        now: Instant,
        out: &mut Output,
    ) -> Result<Node, OpenError> {
        let Recovered { identity, mut store, intent, cut_bytes, .. } = found;
        let (mut applied, has_nothing) = match applied {
            Applied::At(index) => (index, false),
            Applied::Nothing => (0, true),
        };
        if let Some(meta) = intent {
            // The image of an announced installation is in place exactly when the state machine stands at its index.
            if applied == meta.index && store.term_at(meta.index) != Some(meta.term) {
                store.hard.term = store.hard.term.max(meta.term);
                store.install(&meta);
                wal.base_dirty = true;
            }
            wal.intent_dirty = true;
        }
        let (base, last) = (store.base().0, store.last());
        let state_lost = has_nothing && base > 0;
        if state_lost {
            // Up to its base a log is committed. What comes after waits for the image.
            applied = base;
        }
        if applied < base {
            return Err(OpenError::StateBehindLog { applied, base });
        }
        if applied > last {
            return Err(OpenError::StateAheadOfLog { applied, last });
        }
        // Applied entries were committed, whether or not the commit index reached the disk.
        store.hard.commit = store.hard.commit.max(applied);
        replay_members(&mut store, applied);
        store.start_conf = store.members().conf_state();
        out.opened = Some(Ok(Opened { instance: identity.instance, term: store.hard.term, base, last, cut_bytes }));

        let election_tick = config.election_ticks as usize;
        let library = raft::Config {
            id: identity.id.0,
            election_tick,
            heartbeat_tick: config.heartbeat_ticks as usize,
            applied,
            max_size_per_msg: config.command_size_max(),
            max_inflight_msgs: config.inflight_max as usize,
            check_quorum: true,
            pre_vote: true,
            // Not batched: raft 0.7 then appends entries to an earlier empty message at another position.
            batch_append: false,
            max_committed_size_per_ready: 8 << 20,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&library, store, &logger).expect("the configuration was validated");
        let role = RoleChange { leader: None, term: raw.raft.term, we_are_leader: false };
        out.role = Some(role);
        Ok(Node {
            identity,
            raw,
            wal,
            install: None,
            install_pending: None,
            held: VecDeque::new(),
            ready_taken: 0,
            sync_needed: 0,
            sync_written: 0,
            sync_durable: 0,
            proposals: Vec::new(),
            proposal_bytes: 0,
            change_queued: false,
            tokens: BTreeMap::new(),
            reads: Reads::new(nonce),
            ticks: 0,
            next_tick: now + config.tick,
            commit_lag_ticks: 0,
            commit_due: false,
            election_key: (u64::MAX, StateRole::Follower, 0),
            election_timeout: election_tick,
            emitted: applied,
            applied_goal: applied,
            waiting: VecDeque::new(),
            state_lost,
            role,
        })
    }

    pub fn status(&self) -> Status {
        let (raft, store) = (&self.raw.raft, self.raw.store());
        let last = raft.raft_log.last_index();
        let peers = match raft.state {
            StateRole::Leader => {
                let mut peers: Vec<PeerStatus> = raft
                    .prs()
                    .iter()
                    .filter(|(id, _)| **id != self.identity.id.0)
                    .map(|(id, progress)| PeerStatus {
                        id: MdsId(*id),
                        matched: progress.matched,
                        lag: last.saturating_sub(progress.matched),
                        active: progress.recent_active,
                        in_snapshot: progress.state == ProgressState::Snapshot,
                    })
                    .collect();
                peers.sort_by_key(|peer| peer.id);
                peers
            }
            _ => Vec::new(),
        };
        Status {
            id: self.identity.id,
            instance: self.identity.instance,
            role: match raft.state {
                StateRole::Follower => Role::Follower,
                StateRole::PreCandidate => Role::PreCandidate,
                StateRole::Candidate => Role::Candidate,
                StateRole::Leader => Role::Leader,
            },
            term: raft.term,
            leader: self.leader(),
            base: store.base().0,
            last,
            persisted: raft.raft_log.persisted,
            committed: raft.raft_log.committed,
            applied: raft.raft_log.applied,
            live_bytes: store.live_bytes(),
            used_bytes: self.wal.used(),
            members: store.members().clone(),
            impostor: self.impostor(),
            state_lost: self.state_lost,
            peers,
        }
    }
}

/// Brings the configuration from the base of the log to `applied`, where the library starts.
fn replay_members(store: &mut LogStore, applied: u64) {
    let base = store.base().0;
    let changes: Vec<(u64, Change)> = store
        .entries_from(base + 1)
        .take_while(|entry| entry.index <= applied)
        .filter(|entry| !entry.context.is_empty())
        .map(|entry| (entry.index, Change::decode(&entry.context).expect("checked when it was read")))
        .collect();
    for (index, change) in changes {
        if let Ok(members) = store.members().after(change) {
            store.set_members(index, members);
        }
    }
}
