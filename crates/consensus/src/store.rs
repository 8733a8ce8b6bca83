//! The uncompacted log in memory: what the consensus library reads, synchronously.

use crate::entry;
use crate::members::Members;
use crate::output::SnapshotMeta;
use cairn_types::MdsId;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::collections::{BTreeMap, VecDeque};

/// Marks an entry that is in no group yet.
pub(crate) const UNWRITTEN: u64 = u64::MAX;

struct Slot {
    entry: Entry,
    /// Number of the group on disk that holds it.
    group: u64,
}

/// The log after its base, with the configurations since the base.
#[derive(Default)]
pub(crate) struct LogStore {
    base_index: u64,
    base_term: u64,
    slots: VecDeque<Slot>,
    live_bytes: u64,
    /// First index that is in no group yet; one past the last entry when all are written.
    unwritten_from: u64,
    pub hard: HardState,
    /// Configuration at the index where the library starts.
    pub start_conf: ConfState,
    /// Configuration at the base and after each applied change since.
    configs: BTreeMap<u64, Members>,
}

impl LogStore {
    pub fn new() -> Self {
        Self { unwritten_from: 1, configs: [(0, Members::default())].into(), ..Self::default() }
    }

    pub fn base(&self) -> (u64, u64) {
        (self.base_index, self.base_term)
    }

    pub fn last(&self) -> u64 {
        self.base_index + self.slots.len() as u64
    }

    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    pub fn unwritten_from(&self) -> u64 {
        self.unwritten_from
    }

    pub fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base_index {
            return Some(self.base_term);
        }
        let slot = index.checked_sub(self.base_index + 1)?;
        self.slots.get(usize::try_from(slot).ok()?).map(|slot| slot.entry.term)
    }

    /// Number of the group that holds the first entry, when there is one and it is written.
    pub fn first_group(&self) -> Option<u64> {
        self.slots.front().map(|slot| slot.group).filter(|group| *group != UNWRITTEN)
    }

    /// Entries `from..=last`.
    pub fn entries_from(&self, from: u64) -> impl Iterator<Item = &Entry> {
        assert!(from > self.base_index && from <= self.last() + 1, "entry {from} is not held");
        self.slots.range((from - self.base_index - 1) as usize..).map(|slot| &slot.entry)
    }

    /// Notes that everything from `from` on is now in `group`.
    pub fn set_group(&mut self, from: u64, group: u64) {
        for slot in self.slots.range_mut((from - self.base_index - 1) as usize..) {
            slot.group = group;
        }
        self.unwritten_from = self.last() + 1;
    }

    /// Replaces everything from the first of `entries` on. `group` is where they lie on disk.
    pub fn append(&mut self, entries: Vec<Entry>, group: u64) {
        let Some(first) = entries.first().map(|entry| entry.index) else { return };
        assert!(first > self.base_index, "entry {first} is not after the base {}", self.base_index);
        assert!(first <= self.last() + 1, "entry {first} leaves a gap after {}", self.last());
        let keep = (first - self.base_index - 1) as usize;
        while self.slots.len() > keep {
            let slot = self.slots.pop_back().expect("longer than what is kept");
            self.live_bytes -= entry::encoded_len(&slot.entry) as u64;
        }
        for entry in entries {
            self.live_bytes += entry::encoded_len(&entry) as u64;
            self.slots.push_back(Slot { entry, group });
        }
        self.unwritten_from = if group == UNWRITTEN { self.unwritten_from.min(first) } else { self.last() + 1 };
    }

    /// Drops entries up to `index`, which must be held.
    pub fn compact(&mut self, index: u64) {
        let term = self.term_at(index).expect("compaction within the log");
        let members = if cairn_stdx::planted!("raft_snapshot_without_config") {
            self.configs.first_key_value().map(|(_, members)| members.clone()).unwrap_or_default()
        } else {
            self.members_at(index).clone()
        };
        while self.base_index < index {
            let slot = self.slots.pop_front().expect("compaction within the log");
            self.live_bytes -= entry::encoded_len(&slot.entry) as u64;
            self.base_index += 1;
        }
        self.base_term = term;
        self.unwritten_from = self.unwritten_from.max(index + 1);
        self.configs = self.configs.split_off(&(index + 1));
        self.configs.insert(index, members);
    }

    /// Starts over after `meta`: the entries held are not those the image was made of.
    pub fn install(&mut self, meta: &SnapshotMeta) {
        self.slots.clear();
        self.live_bytes = 0;
        (self.base_index, self.base_term) = (meta.index, meta.term);
        self.unwritten_from = meta.index + 1;
        self.configs = [(meta.index, meta.members.clone())].into();
    }

    /// Replays a base found on disk: keeps the suffix when it continues the base, starts over otherwise.
    ///
    /// Replay begins at the oldest group that still matters; its entries may start after a base that is recorded only
    /// later. Until that record comes, the base is provisional: the index before the first entry, with term zero.
    pub fn replay_base(&mut self, meta: &SnapshotMeta) {
        if meta.index < self.base_index {
            return; // An older base, overtaken by the one that made this group the head.
        }
        if meta.index == self.base_index && self.base_term == 0 {
            self.base_term = meta.term;
            self.configs = [(meta.index, meta.members.clone())].into();
        } else if self.term_at(meta.index) == Some(meta.term) {
            self.compact(meta.index);
            self.configs = [(meta.index, meta.members.clone())].into();
        } else {
            self.install(meta);
        }
    }

    /// Configuration at the base.
    pub fn base_members(&self) -> &Members {
        self.configs.first_key_value().expect("the base has a configuration").1
    }

    /// Configuration in force after applying `index`.
    pub fn members_at(&self, index: u64) -> &Members {
        self.configs.range(..=index).next_back().expect("no configuration before the base").1
    }

    /// The latest applied configuration.
    pub fn members(&self) -> &Members {
        self.configs.last_key_value().expect("the base has a configuration").1
    }

    /// Index of the latest applied configuration.
    pub fn members_index(&self) -> u64 {
        *self.configs.last_key_value().expect("the base has a configuration").0
    }

    pub fn set_members(&mut self, index: u64, members: Members) {
        assert!(index > self.members_index(), "configurations are applied in order");
        self.configs.insert(index, members);
    }

    /// First index of the unbroken run of configurations that contain `id`, up to the latest one.
    fn member_since(&self, id: MdsId) -> u64 {
        self.configs.iter().rev().take_while(|(_, members)| members.contains(id)).last().map_or(0, |(index, _)| *index)
    }
}

impl Storage for LogStore {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.start_conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.base_index {
            return Err(StorageError::Compacted.into());
        }
        assert!(high <= self.last() + 1, "entries up to {high} of {}", self.last());
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let range = self.slots.range((low - self.base_index - 1) as usize..(high - self.base_index - 1) as usize);
        let mut size = 0;
        let mut entries = Vec::with_capacity(range.len().min(1024));
        for slot in range {
            size += entry::encoded_len(&slot.entry) as u64;
            if size > max_size && !entries.is_empty() {
                break;
            }
            entries.push(slot.entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.term_at(index) {
            Some(term) => Ok(term),
            None if index < self.base_index => Err(StorageError::Compacted.into()),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base_index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// Only metadata: the earliest place from which `to` can go on, at or after the base and its own admission.
    fn snapshot(&self, _request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let index = self.base_index.max(self.member_since(MdsId(to)));
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = index;
        metadata.term = self.term(index)?;
        metadata.conf_state = Some(self.members_at(index).conf_state());
        Ok(snapshot)
    }
}
