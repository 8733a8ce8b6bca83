//! Space that runs out: which copies move away from a full server, and what the event log says of it.
//!
//! New chunks go to servers below `mds.alloc.fill_margin` only, but chunks are thin: what is placed grows until its
//! server has no room left. Then its holder asks for another place. A server keeps working space of its own beyond the
//! capacity it reports, so that deleting, reading, and overwriting what is mapped never need any.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::placement::{self, REPAIR_FILL_PER_CENT, Wish};
use crate::record::{Chunk, Inode};
use crate::state::Meta;
use crate::{chunks, record};
use cairn_types::{ChunkId, ClientId, CsId, Epoch, VolumeId, format_size};
use cairn_wire::mds::{MdsError, MdsReply, Replica, ReplicaRole, Severity};

/// Per cent at which a server, or the cluster, is said to be filling up, and full.
const FILL_LEVELS: [u64; 2] = [80, 95];
/// So many per cent below a level it is said to be over. Without this, one that sways would fill the log.
const FILL_SWAY: u64 = 2;

/// A new place for a copy.
enum Room {
    Found(CsId),
    /// All that have room are busy with other copies, or are rid of an old one soon.
    Busy,
    /// Nowhere, and why.
    None(String),
}

/// The level of `used` after `old`.
fn fill_level(old: u8, used: u64, capacity: u64) -> u8 {
    let reached = |margin: u64| {
        let parts = u128::from(used) * 100;
        let is_over = |level: &&u64| parts >= u128::from(capacity) * u128::from(**level - margin);
        FILL_LEVELS.iter().filter(is_over).count() as u8
    };
    // It falls only once it is clearly below, and rises at once.
    reached(0).max(old.min(reached(FILL_SWAY)))
}

impl<K: Kv> Meta<K> {
    /// A server has no room for what the holder writes to a chunk.
    pub(crate) fn replica_full(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        epoch: Epoch,
        cs: CsId,
        chunk: ChunkId,
    ) -> Answer {
        let inode = self.held_inode(client, volume, epoch, true)?;
        let Some((_, index)) = self.place(cs, chunk).filter(|(of, _)| *of == volume) else {
            return Ok(MdsReply::Chunks(Vec::new()));
        };
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        let mut new = old.clone();
        match old.replica(cs).map(|replica| replica.role) {
            // It was to get a copy and has no room for it either: repair finds another.
            Some(ReplicaRole::Rebuilding) => {
                new.bump();
                new.take_out(cs, true);
            }
            Some(ReplicaRole::Current) if old.replicas.iter().all(|r| r.role == ReplicaRole::Current) => {
                match self.room_beside(&old, cs, &inode) {
                    Room::Found(target) => {
                        new.bump();
                        if new.current() > usize::from(new.minimum) {
                            new.take_out(cs, false);
                        }
                        new.stale.retain(|stale| stale.cs != target);
                        let replica = Replica { cs: target, role: ReplicaRole::Rebuilding, since: new.version };
                        new.replicas.push(replica);
                    }
                    Room::Busy => {}
                    Room::None(refusal) => {
                        self.report_no_space(&refusal);
                        return Err(MdsError::NoSpace(refusal));
                    }
                }
            }
            _ => {}
        }
        if new.version != old.version {
            self.set_chunk(volume, index, Some(&old), Some(&mut new), true);
            self.push_map_changed(volume, &inode, Some(client));
        }
        Ok(MdsReply::Chunks(vec![chunks::entry(volume, index, &new)]))
    }

    /// Where a whole further copy of a chunk has room, in place of the one on `full`.
    fn room_beside(&mut self, chunk: &Chunk, full: CsId, inode: &Inode) -> Room {
        let policy = &inode.policy;
        let busy_at = self.config("mds.wd.rebuilds_per_cs") as u32;
        let members: Vec<CsId> = chunk.replicas.iter().map(|r| r.cs).filter(|cs| *cs != full).collect();
        let tight = |server: &record::Server| {
            let limit = server.stats.capacity / 100 * REPAIR_FILL_PER_CENT;
            limit.saturating_sub(server.stats.used) < policy.chunk_size()
        };
        // Stale copies of a chunk that has all it needs are being deleted: soon there is room where they are.
        let complete = chunk.current() >= usize::from(chunk.replicas_normal);
        let mut excluded: Vec<CsId> =
            if complete { chunk.replicas.iter().map(|r| r.cs).collect() } else { chunk.servers().collect() };
        excluded.extend(self.servers.iter().filter(|(_, server)| tight(server)).map(|(cs, _)| *cs));
        let idle = excluded.len();
        excluded.extend(chunk.servers());
        excluded.extend(self.servers.iter().filter(|(_, server)| server.rebuilding >= busy_at).map(|(cs, _)| *cs));
        let (strict_domain, strict_tier) =
            (self.config("mds.alloc.strict_failure_domain") != 0, self.config("mds.alloc.strict_tier") != 0);
        let wish = |excluded| Wish {
            chunk: chunk.id,
            count: 1,
            domain: policy.domain,
            tier: policy.tier,
            strict_domain,
            strict_tier,
            repair: true,
            members: &members,
            excluded,
        };
        let slots = self.slots();
        if let Some(target) = placement::choose(&wish(&excluded), slots).first() {
            return Room::Found(*target);
        }
        if placement::choose(&wish(&excluded[..idle]), slots).is_empty() {
            let all = wish(&excluded[..idle]);
            return Room::None(format!("{full} is full; {}", placement::explain(&all, 1, 0, slots)));
        }
        Room::Busy
    }

    /// Says when a server, or the cluster as a whole, fills up, and when there is room again.
    pub(crate) fn watch_fill(&mut self, cs: CsId) {
        let Some(server) = self.servers.get(&cs) else { return };
        let (used, capacity) = (server.stats.used, server.stats.capacity);
        self.note_fill(cs, used, capacity);
        let in_use = self.servers.values().filter(|server| !server.dropped);
        let (used, capacity) =
            in_use.fold((0, 0), |(used, capacity), s| (used + s.stats.used, capacity + s.stats.capacity));
        self.note_fill(CsId(0), used, capacity);
    }

    fn note_fill(&mut self, cs: CsId, used: u64, capacity: u64) {
        let key = keys::server(keys::FILL, cs);
        let old: u8 = self.record(&key).unwrap_or(0);
        let new = if capacity == 0 { old } else { fill_level(old, used, capacity) };
        if new == old {
            return;
        }
        if new == 0 {
            self.delete(&key);
        } else {
            self.put_record(&key, &new);
        }
        let who = if cs == CsId(0) { "the cluster".to_owned() } else { cs.to_string() };
        let level = |level: u8| FILL_LEVELS[usize::from(level) - 1];
        let space = format!("{} of {}", format_size(used), format_size(capacity));
        let (severity, code, text) = match (new > old, new) {
            (true, 1) => (Severity::Warning, "MDS-3002", format!("{who} is {} % full: {space}", level(new))),
            (true, _) => {
                let text = format!("{who} is {} % full: {space}; add servers or delete data", level(new));
                (Severity::Error, "MDS-3003", text)
            }
            (false, _) => (Severity::Info, "MDS-3004", format!("{who} is less than {} % full: {space}", level(old))),
        };
        self.event(severity, code, text);
    }
}

#[cfg(test)]
mod tests {
    use super::fill_level;

    #[test]
    fn a_level_is_reached_at_once_and_left_with_delay() {
        let steps = [(79, 0), (80, 1), (79, 1), (78, 1), (77, 0), (95, 2), (94, 2), (92, 1), (99, 2), (10, 0)];
        let mut level = 0;
        for (used, expected) in steps {
            level = fill_level(level, used, 100);
            assert_eq!(level, expected, "at {used}");
        }
    }
}
