//! Removal of chunk servers: draining, dropping, what would be lost by it, and a new store in place of a removed one.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::record::{Chunk, Inode, Presence, Standing};
use crate::state::Meta;
use cairn_stdx::planted;
use cairn_types::{CsId, InodeId, VolumeId, format_size};
use cairn_wire::mds::{CsState, CsStats, LostChunks, MdsError, MdsReply, ReplicaRole, Severity};

/// Copies looked at for one answer.
const EXAMINE_MAX: usize = 4096;
/// Volumes named in one event or refusal.
const NAMED_MAX: usize = 5;

/// What becomes of a chunk without one of its copies.
enum Fate {
    /// The copy is not current, or another current one is in reach.
    Kept,
    /// There are other current copies, none of which can be reached.
    Unreachable,
    /// There is no other current copy.
    Lost,
}

/// A piece of what was found on a server.
#[derive(Default)]
struct Examined {
    chunks: u64,
    lost: Vec<LostChunks>,
    next: Option<(VolumeId, u64)>,
}

impl<K: Kv> Meta<K> {
    pub(crate) fn cs_remove(&mut self, cs: CsId, force: bool, cancel: bool) -> Answer {
        let server = self.known_server(cs)?;
        if cancel {
            if !server.draining {
                return Err(MdsError::Refused(format!("{cs} is not being removed")));
            }
        } else if force {
            self.check_drop(cs)?;
            let lost = self.all_lost(cs);
            if !lost.is_empty() {
                return Err(MdsError::Refused(format!(
                    "{} have no other current copy in reach than that on {cs}: {}; bring {cs} or the other servers back; \
                     `cairn rm-cs -f --dry-run {}` lists them, and with --lose-data they are given up",
                    count_chunks(&lost),
                    name_some(&lost),
                    cs.0
                )));
            }
        } else {
            self.check_drain(cs)?;
        }
        self.begin_removal(cs, force, cancel)
    }

    /// Drops a server whatever is lost with it.
    pub(crate) fn cs_abandon(&mut self, cs: CsId) -> Answer {
        self.known_server(cs)?;
        self.check_drop(cs)?;
        let lost = self.all_lost(cs);
        let answer = self.begin_removal(cs, true, false);
        if answer.is_ok() && !lost.is_empty() {
            let text = format!(
                "{cs} was removed although {} had no other current copy in reach: {}; what needs them stays unreadable until \
                 it is deleted",
                count_chunks(&lost),
                name_some(&lost)
            );
            self.event(Severity::Error, "MDS-4011", text);
        }
        answer
    }

    /// Does what was checked.
    fn begin_removal(&mut self, cs: CsId, force: bool, cancel: bool) -> Answer {
        let server = self.known_server(cs)?;
        let was = server.state();
        match (cancel, force) {
            (true, _) => server.draining = false,
            (false, true) => server.dropped = true,
            (false, false) => server.draining = true,
        }
        self.changed();
        self.digest(&cairn_wire::encode(&(cs, force, cancel)));
        self.topology_changed();
        self.server_state_changed(cs, was);
        // A silent server that is drained stays inactive in name, yet its chunks count differently.
        self.sweep_start(cs);
        Ok(MdsReply::Done)
    }

    /// Gives a removed server a new, empty store.
    pub(crate) fn cs_replace(&mut self, cs: CsId, store: [u8; 16]) -> Answer {
        let server = self.servers.get(&cs).ok_or_else(|| MdsError::NotFound(cs.to_string()))?;
        if !server.dropped {
            return match server.store == store {
                // The answer was lost.
                true => Ok(MdsReply::CsReplaced { left: 0 }),
                false => Err(MdsError::Refused(format!(
                    "{cs} is of the cluster; remove it first, with `cairn rm-cs --wait {0}`, or `cairn rm-cs -f {0}` when its \
                     disk is lost",
                    cs.0
                ))),
            };
        }
        if let Some(other) = self.servers.iter().find_map(|(other, server)| (server.store == store).then_some(other)) {
            return Err(MdsError::Refused(format!("this store is that of {other}; make a new one")));
        }
        let prefix = keys::server(keys::COPY, cs);
        let left = self.kv.scan(&prefix, &keys::after(&prefix), EXAMINE_MAX).len() as u64;
        if left > 0 && !planted!("replaced_store_keeps_copies") {
            if self.kv.get(&keys::server(keys::SWEEP, cs)).is_some() {
                return Ok(MdsReply::CsReplaced { left });
            }
            // What was given up with `--lose-data`: an empty store must not be taken for these copies.
            let lost = self.all_lost(cs);
            return Err(MdsError::Refused(format!(
                "{} had their only copy on {cs}: {}; delete what needs them first, or join the disk as a new server with \
                 `cairn make-cs`",
                count_chunks(&lost),
                name_some(&lost)
            )));
        }
        self.drop_orders(cs);
        self.forget_starts(cs);
        let server = self.servers.get_mut(&cs).expect("looked up above");
        let was = server.state();
        (server.store, server.dropped, server.draining) = (store, false, false);
        (server.failed, server.presence, server.stats) = (None, Presence::Inactive, CsStats::default());
        self.changed();
        self.digest(&cairn_wire::encode(&(cs, store)));
        self.event(Severity::Info, "MDS-4012", format!("{cs} gets a new store, empty, in place of the one it had"));
        self.topology_changed();
        self.server_state_changed(cs, was);
        Ok(MdsReply::CsReplaced { left: 0 })
    }

    /// A piece of what removing a server would mean.
    pub(crate) fn cs_examine(&self, cs: CsId, volume: VolumeId, index: u64) -> Answer {
        let server = self.servers.get(&cs).ok_or_else(|| MdsError::NotFound(cs.to_string()))?;
        if server.dropped {
            return Err(MdsError::Refused(format!("{cs} was removed from the cluster")));
        }
        let Examined { chunks, lost, next } = self.examine(cs, (volume, index), EXAMINE_MAX);
        let words = |checked: Result<(), MdsError>| match checked {
            Ok(()) => None,
            Err(MdsError::Refused(why)) => Some(why),
            Err(other) => Some(other.to_string()),
        };
        let (drain, force) = (words(self.check_drain(cs)), words(self.check_drop(cs)));
        Ok(MdsReply::CsExamined { chunks, lost, next, drain, force })
    }

    fn all_lost(&self, cs: CsId) -> Vec<LostChunks> {
        self.examine(cs, (VolumeId(0), 0), usize::MAX).lost
    }

    fn examine(&self, cs: CsId, from: (VolumeId, u64), limit: usize) -> Examined {
        let end = keys::after(&keys::server(keys::REPLICA, cs));
        let replicas = self.kv.scan(&keys::replica(cs, from.0, from.1), &end, limit);
        let mut examined = Examined::default();
        for (key, _) in &replicas {
            let (volume, index) = (VolumeId(keys::number(key, 5)), keys::number(key, 13));
            let Some(chunk) = self.chunk(volume, index) else { continue };
            let fate = self.fate_without(&chunk, cs);
            examined.chunks += 1;
            let (only, unreachable) = match fate {
                Fate::Kept => continue,
                Fate::Lost => (1, 0),
                Fate::Unreachable => (0, 1),
            };
            match examined.lost.last_mut().filter(|lost| lost.volume == volume) {
                Some(lost) => {
                    lost.only += only;
                    lost.unreachable += unreachable;
                }
                None => examined.lost.push(LostChunks { volume, name: self.volume_name(volume), only, unreachable }),
            }
        }
        if replicas.len() == limit {
            let last = replicas.last().expect("as many as asked for");
            examined.next = Some((VolumeId(keys::number(&last.0, 5)), keys::number(&last.0, 13) + 1));
        }
        examined
    }

    fn fate_without(&self, chunk: &Chunk, cs: CsId) -> Fate {
        if chunk.replica(cs).is_none_or(|replica| replica.role != ReplicaRole::Current) {
            return Fate::Kept;
        }
        let mut others = chunk.replicas.iter().filter(|r| r.role == ReplicaRole::Current && r.cs != cs).peekable();
        if others.peek().is_none() {
            return Fate::Lost;
        }
        let is_reachable = |cs: CsId| matches!(self.standing(cs), Standing::Good | Standing::Leaving);
        if others.any(|replica| is_reachable(replica.cs)) { Fate::Kept } else { Fate::Unreachable }
    }

    fn volume_name(&self, volume: VolumeId) -> String {
        let inode: Option<Inode> = self.record(&keys::inode(InodeId(volume.0)));
        let is_volume = |inode: &Inode| inode.kind == cairn_wire::mds::InodeKind::Volume;
        inode.filter(is_volume).map_or_else(String::new, |inode| String::from_utf8_lossy(&inode.text).into_owned())
    }

    /// Refuses to drop a server that works.
    fn check_drop(&self, cs: CsId) -> Result<(), MdsError> {
        match self.servers[&cs].state() {
            CsState::Active | CsState::Draining => {
                Err(MdsError::Refused(format!("{cs} answers; remove it without force, which moves its data first")))
            }
            CsState::Inactive | CsState::Offline | CsState::Failed | CsState::Dropped => Ok(()),
        }
    }

    /// Refuses a drain that cannot end.
    fn check_drain(&self, cs: CsId) -> Result<(), MdsError> {
        let leaving = &self.servers[&cs];
        let others = self.servers.iter().filter(|(other, server)| **other != cs && server.state() == CsState::Active);
        let (count, free) = others.fold((0u64, 0u64), |(count, free), (_, server)| {
            (count + 1, free.saturating_add(server.stats.capacity.saturating_sub(server.stats.used)))
        });
        let root = self.inode(cairn_types::InodeId::ROOT)?.policy;
        if leaving.stats.used > 0 && count < u64::from(root.replicas) {
            return Err(MdsError::Refused(format!(
                "{count} active chunk servers would remain and {} replicas are wanted; add servers first, or lower replicas",
                root.replicas
            )));
        }
        if leaving.stats.used > free {
            return Err(MdsError::Refused(format!(
                "{cs} holds {} and the others have {} free; add space first",
                format_size(leaving.stats.used),
                format_size(free)
            )));
        }
        Ok(())
    }
}

fn count_chunks(lost: &[LostChunks]) -> String {
    let chunks: u64 = lost.iter().map(|lost| lost.only + lost.unreachable).sum();
    format!("{chunks} chunk{}", if chunks == 1 { "" } else { "s" })
}

/// The first few of the volumes and files.
fn name_some(lost: &[LostChunks]) -> String {
    let one = |lost: &LostChunks| {
        let chunks = lost.only + lost.unreachable;
        match lost.name.as_str() {
            "" => format!("{chunks} of the file with inode {}", lost.volume.0),
            name => format!("{chunks} of volume {name}"),
        }
    };
    let mut words: Vec<String> = lost.iter().take(NAMED_MAX).map(one).collect();
    if lost.len() > NAMED_MAX {
        words.push(format!("and {} more", lost.len() - NAMED_MAX));
    }
    words.join(", ")
}
