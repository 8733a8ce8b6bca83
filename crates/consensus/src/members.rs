//! Who belongs to the group, and the single steps in which that changes.

use crate::config::NUMBER_MAX;
use cairn_types::MdsId;
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};
use std::collections::BTreeMap;

/// Voters at most: a majority of more buys nothing.
pub const VOTERS_MAX: usize = 7;
/// Voters and learners at most.
pub const MEMBERS_MAX: usize = 16;

/// A node together with the random number drawn when its log was formatted. A wiped node that comes back under its id
/// has another instance, and its votes and acknowledgements do not count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Member {
    /// The node.
    pub id: MdsId,
    /// The instance of its log, not zero.
    pub instance: u64,
}

/// A configuration of the group.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Members {
    /// Nodes that count in majorities, with their instances.
    pub voters: BTreeMap<MdsId, u64>,
    /// Nodes that receive the log and do not count.
    pub learners: BTreeMap<MdsId, u64>,
}

/// A single step from one configuration to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Adds a voter or promotes a learner.
    AddVoter(Member),
    /// Adds a node that receives the log without a vote.
    AddLearner(Member),
    /// Removes a node.
    Remove(MdsId),
}

/// Why a configuration change is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChangeError {
    /// The node already has that place.
    #[error("{0} is already a member in that role")]
    AlreadyMember(MdsId),
    /// A voter cannot be turned into a learner; remove it and add it anew.
    #[error("{0} is a voter; remove it before adding it as a learner")]
    IsVoter(MdsId),
    /// The learner to promote has another instance.
    #[error("{0} is a member with another instance: its log was wiped; add it under a new id")]
    OtherInstance(MdsId),
    /// The node to remove is not a member.
    #[error("{0} is not a member")]
    NotMember(MdsId),
    /// The group would have no voter.
    #[error("{0} is the last voter")]
    LastVoter(MdsId),
    /// The group is as large as it may be.
    #[error("the group has {VOTERS_MAX} voters or {MEMBERS_MAX} members already")]
    TooMany,
    /// An id or instance of zero, or one beyond 2^62.
    #[error("{0} is not a valid node id or its instance is zero")]
    Invalid(MdsId),
}

impl Members {
    /// The instance registered for `id`.
    pub fn instance_of(&self, id: MdsId) -> Option<u64> {
        self.voters.get(&id).or_else(|| self.learners.get(&id)).copied()
    }

    /// True for voters and learners.
    pub fn contains(&self, id: MdsId) -> bool {
        self.instance_of(id).is_some()
    }

    /// The configuration after `change`.
    ///
    /// # Errors
    /// [`ChangeError`] when the change makes no sense here; the same on every node, since all see the same sequence.
    pub fn after(&self, change: Change) -> Result<Members, ChangeError> {
        let mut next = self.clone();
        match change {
            Change::AddVoter(member) | Change::AddLearner(member)
                if member.instance == 0 || member.id.0 == 0 || member.id.0 >= NUMBER_MAX =>
            {
                return Err(ChangeError::Invalid(member.id));
            }
            Change::AddVoter(member) => {
                if self.voters.contains_key(&member.id) {
                    return Err(ChangeError::AlreadyMember(member.id));
                }
                if next.learners.remove(&member.id).is_some_and(|instance| instance != member.instance) {
                    return Err(ChangeError::OtherInstance(member.id));
                }
                next.voters.insert(member.id, member.instance);
            }
            Change::AddLearner(member) => {
                if self.voters.contains_key(&member.id) {
                    return Err(ChangeError::IsVoter(member.id));
                }
                if next.learners.insert(member.id, member.instance).is_some() {
                    return Err(ChangeError::AlreadyMember(member.id));
                }
            }
            Change::Remove(id) => {
                if next.learners.remove(&id).is_none() && next.voters.remove(&id).is_none() {
                    return Err(ChangeError::NotMember(id));
                }
                if next.voters.is_empty() {
                    return Err(ChangeError::LastVoter(id));
                }
            }
        }
        if next.voters.len() > VOTERS_MAX || next.voters.len() + next.learners.len() > MEMBERS_MAX {
            return Err(ChangeError::TooMany);
        }
        Ok(next)
    }

    pub(crate) fn conf_state(&self) -> ConfState {
        ConfState {
            voters: self.voters.keys().map(|id| id.0).collect(),
            learners: self.learners.keys().map(|id| id.0).collect(),
            ..ConfState::default()
        }
    }

    /// True when `conf` names the same nodes, in any order.
    pub(crate) fn matches(&self, conf: &ConfState) -> bool {
        let same = |mine: &BTreeMap<MdsId, u64>, theirs: &[u64]| {
            mine.len() == theirs.len() && theirs.iter().all(|id| mine.contains_key(&MdsId(*id)))
        };
        same(&self.voters, &conf.voters) && same(&self.learners, &conf.learners) && conf.voters_outgoing.is_empty()
    }

    /// Bytes of the encoding.
    pub(crate) fn encoded_len(&self) -> usize {
        8 + 16 * (self.voters.len() + self.learners.len())
    }

    /// Counts of voters and learners (`u16` each), four zero bytes, then id and instance of each.
    pub(crate) fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&(self.voters.len() as u16).to_le_bytes());
        to.extend_from_slice(&(self.learners.len() as u16).to_le_bytes());
        to.extend_from_slice(&[0; 4]);
        for (id, instance) in self.voters.iter().chain(&self.learners) {
            to.extend_from_slice(&id.0.to_le_bytes());
            to.extend_from_slice(&instance.to_le_bytes());
        }
    }

    /// Reads what [`encode`](Self::encode) wrote; `bytes` must hold nothing else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Members> {
        let (head, body) = bytes.split_first_chunk::<8>()?;
        let voters = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let learners = usize::from(u16::from_le_bytes([head[2], head[3]]));
        if head[4..] != [0; 4] || voters + learners > MEMBERS_MAX || body.len() != 16 * (voters + learners) {
            return None;
        }
        let mut members = Members::default();
        for (i, pair) in body.chunks_exact(16).enumerate() {
            let id = u64::from_le_bytes(pair[..8].try_into().ok()?);
            let instance = u64::from_le_bytes(pair[8..].try_into().ok()?);
            let id_is_known = members.contains(MdsId(id));
            if id == 0 || id >= NUMBER_MAX || instance == 0 || id_is_known {
                return None;
            }
            let side = if i < voters { &mut members.voters } else { &mut members.learners };
            side.insert(MdsId(id), instance);
        }
        Some(members)
    }
}

impl Change {
    /// The node it is about.
    pub fn id(&self) -> MdsId {
        match self {
            Change::AddVoter(member) | Change::AddLearner(member) => member.id,
            Change::Remove(id) => *id,
        }
    }

    /// True when node `id` is no voter afterwards though it may have been one before.
    pub(crate) fn takes_vote_of(&self, id: MdsId) -> bool {
        matches!(self, Change::Remove(gone) if *gone == id) || matches!(self, Change::AddLearner(m) if m.id == id)
    }

    pub(crate) fn conf_change(&self) -> ConfChange {
        let kind = match self {
            Change::AddVoter(_) => ConfChangeType::AddNode,
            Change::AddLearner(_) => ConfChangeType::AddLearnerNode,
            Change::Remove(_) => ConfChangeType::RemoveNode,
        };
        let mut change = ConfChange { node_id: self.id().0, ..ConfChange::default() };
        change.set_change_type(kind);
        change
    }

    /// 24 bytes: kind, seven zero bytes, id, instance (zero for a removal).
    pub(crate) fn encode(&self) -> [u8; 24] {
        let (kind, id, instance) = match self {
            Change::AddVoter(member) => (1, member.id, member.instance),
            Change::AddLearner(member) => (2, member.id, member.instance),
            Change::Remove(id) => (3, *id, 0),
        };
        let mut bytes = [0; 24];
        bytes[0] = kind;
        bytes[8..16].copy_from_slice(&id.0.to_le_bytes());
        bytes[16..].copy_from_slice(&instance.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Change> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let id = MdsId(u64::from_le_bytes(bytes[8..16].try_into().ok()?));
        let instance = u64::from_le_bytes(bytes[16..].try_into().ok()?);
        if bytes[1..8] != [0; 7] || id.0 == 0 || id.0 >= NUMBER_MAX {
            return None;
        }
        match (bytes[0], instance) {
            (1, 1..) => Some(Change::AddVoter(Member { id, instance })),
            (2, 1..) => Some(Change::AddLearner(Member { id, instance })),
            (3, 0) => Some(Change::Remove(id)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64) -> Member {
        Member { id: MdsId(id), instance: id + 100 }
    }

    #[test]
    fn steps_are_checked() {
        let one = Members::default().after(Change::AddVoter(member(1))).unwrap();
        assert_eq!(one.after(Change::Remove(MdsId(1))), Err(ChangeError::LastVoter(MdsId(1))));
        assert_eq!(one.after(Change::AddLearner(member(1))), Err(ChangeError::IsVoter(MdsId(1))));
        let two = one.after(Change::AddLearner(member(2))).unwrap();
        let stranger = Member { id: MdsId(2), instance: 7 };
        assert_eq!(two.after(Change::AddVoter(stranger)), Err(ChangeError::OtherInstance(MdsId(2))));
        let promoted = two.after(Change::AddVoter(member(2))).unwrap();
        assert_eq!((promoted.voters.len(), promoted.learners.len()), (2, 0));
        let mut bytes = Vec::new();
        two.encode(&mut bytes);
        assert_eq!(bytes.len(), two.encoded_len());
        assert_eq!(Members::decode(&bytes), Some(two));
        for change in [Change::AddVoter(member(1)), Change::AddLearner(member(2)), Change::Remove(MdsId(3))] {
            assert_eq!(Change::decode(&change.encode()), Some(change));
        }
    }
}
