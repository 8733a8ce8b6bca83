//! Metadata servers that something ails: no room on their disk, or far behind the leader. What the leader sees of it
//! becomes part of the state when it changes, so that each change is one event and every server knows.
//!
//! While fewer than a majority of those that vote have room, what would add to the metadata is refused. The others
//! would stop following once their image finds no room and their log is full, and without a majority nothing at all
//! could be done: no lease, no heartbeat, and no deleting, which is what helps.

use crate::keys;
use crate::kv::Kv;
use crate::state::Meta;
use cairn_stdx::planted;
use cairn_types::{MdsId, format_size};
use cairn_wire::mds::{MdsCondition, MdsError, MdsLag, MdsReply, MdsRequest, Severity};

/// Figures for the event about a change.
pub(crate) struct Figures {
    pub free: u64,
    pub lacks: u64,
    pub silent_s: u64,
}

impl<K: Kv> Meta<K> {
    /// What ails a metadata server, as the cluster knows.
    pub fn mds_condition(&self, mds: MdsId) -> MdsCondition {
        self.ailing.get(&mds).copied().unwrap_or_default()
    }

    /// Who leads, and from which term, as the log of events says.
    pub fn leader_told(&self) -> Option<(MdsId, u64)> {
        self.record(&keys::one(keys::AILING, 0))
    }

    /// Those that vote, how many of them have room, and how many must.
    fn voters_with_room(&self) -> (usize, usize, usize) {
        let voters = || self.globals.members.values().filter(|member| member.info.voter);
        let all = voters().count();
        let with_room = voters().filter(|member| !self.mds_condition(member.info.mds).no_room).count();
        (all, with_room, all / 2 + 1)
    }

    /// True while too few metadata servers have room for what would add to the metadata.
    pub fn lacks_room(&self) -> bool {
        // With all in order, as nearly always, nothing is counted.
        !self.ailing.is_empty() && {
            let (_, with_room, needed) = self.voters_with_room();
            with_room < needed
        }
    }

    /// True when carrying the request out makes the metadata larger, lastingly and without bound. What exists already
    /// is answered as ever.
    fn grows(&self, request: &MdsRequest) -> bool {
        use MdsRequest::*;
        match request {
            Create { parent, name, .. } | Symlink { parent, name, .. } | Link { parent, name, .. } => {
                self.lookup(*parent, name).is_err()
            }
            VolumeCreate { name, .. } => self.volume_get(name).is_err(),
            ChunkAllocate { volume, indexes, .. } => indexes.iter().any(|index| self.chunk(*volume, *index).is_none()),
            KvPut { key, .. } => self.user_get(key) == MdsReply::Kv { value: None },
            SetXattr { .. } => true,
            _ => false,
        }
    }

    /// The refusal of a request that needs room there is not.
    pub(crate) fn refuse_without_room(&self, request: &MdsRequest) -> Option<MdsError> {
        if !self.lacks_room() || !self.grows(request) || planted!("metadata_grow_without_room") {
            return None;
        }
        let full: Vec<String> = self.ailing.iter().filter(|(_, c)| c.no_room).map(|(mds, _)| mds.to_string()).collect();
        Some(MdsError::NoSpace(format!(
            "the disks of {} have no room for more metadata; make room on them, or delete files or volumes",
            full.join(", ")
        )))
    }

    pub(crate) fn mds_condition_changed(&mut self, mds: MdsId, new: MdsCondition, figures: &Figures) {
        let Some(info) = self.globals.members.get(&mds).map(|member| member.info.clone()) else { return };
        let old = self.mds_condition(mds);
        if new == old {
            return;
        }
        let lacked = self.lacks_room();
        self.set_condition(mds, new);
        let who = format!("{mds} at {}", info.addr);
        if new.no_room != old.no_room {
            let (free, dir) = (format_size(figures.free), &info.repository);
            let (severity, code, text) = match new.no_room {
                true => (
                    Severity::Warning,
                    "MDS-1030",
                    format!(
                        "{who} has no room on its disk: {free} are free in {dir}; it goes on with a reserve and leaves \
                         leading to others; make room there"
                    ),
                ),
                false => (Severity::Info, "MDS-1031", format!("{who} has room on its disk again: {free} are free")),
            };
            self.event(severity, code, text);
        }
        if new.lag != old.lag {
            let (lacks, silent) = (figures.lacks, figures.silent_s);
            let (severity, code, text) = match new.lag {
                MdsLag::Behind => {
                    (Severity::Error, "MDS-1032", format!("{who} is stale: it lacks {lacks} entries of the log"))
                }
                MdsLag::Silent => (
                    Severity::Error,
                    "MDS-1033",
                    format!("{who} is stale: it has accepted nothing for {silent} s and lacks {lacks} entries"),
                ),
                MdsLag::Resync => (
                    Severity::Error,
                    "MDS-1034",
                    format!(
                        "{who} is outdated: what it lacks is gone from the log, or its image is; it gets the whole state anew"
                    ),
                ),
                MdsLag::None => (Severity::Info, "MDS-1035", format!("{who} has caught up")),
            };
            self.event(severity, code, text);
        }
        self.tell_of_room(lacked);
    }

    /// The record of a server that has left goes with it.
    pub(crate) fn forget_condition(&mut self, mds: MdsId) {
        let lacked = self.lacks_room();
        self.set_condition(mds, MdsCondition::default());
        self.tell_of_room(lacked);
    }

    fn set_condition(&mut self, mds: MdsId, new: MdsCondition) {
        let key = keys::one(keys::AILING, mds.0);
        if new != MdsCondition::default() {
            self.ailing.insert(mds, new);
            self.put_record(&key, &new);
        } else if self.ailing.remove(&mds).is_some() {
            self.delete(&key);
        }
    }

    fn tell_of_room(&mut self, lacked: bool) {
        if self.lacks_room() == lacked {
            return;
        }
        let (all, with_room, needed) = self.voters_with_room();
        let figures = format!("{with_room} of {all} metadata servers have room on their disks, {needed} must");
        let (severity, code, text) = match lacked {
            false => {
                let text = format!("{figures}: what adds to the metadata is refused until there is room");
                (Severity::Error, "MDS-1037", text)
            }
            true => (Severity::Info, "MDS-1038", format!("{figures}: what adds to the metadata is accepted again")),
        };
        self.event(severity, code, text);
    }

    pub(crate) fn mds_leads(&mut self, mds: MdsId, term: u64) {
        let Some(addr) = self.globals.members.get(&mds).map(|member| member.info.addr) else { return };
        if self.leader_told().is_some_and(|(_, told)| told >= term) {
            return;
        }
        self.put_record(&keys::one(keys::AILING, 0), &(mds, term));
        let text = format!("{mds} at {addr} leads the metadata servers from term {term} on");
        self.event(Severity::Info, "MDS-1036", text);
    }
}
