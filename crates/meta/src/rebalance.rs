//! Balance of space: while nothing needs repair, copies move from the fullest chunk servers of a tier to the emptiest.
//!
//! A move is a repair in miniature: the chunk gets one copy more, on the empty server, and when that is current the
//! copies beyond the wanted number go, the one on the fullest server first (`repair.rs`). So a chunk never has less
//! than its redundancy on the way, and a move that is cut short costs nothing but its copy.

use crate::keys;
use crate::kv::Kv;
use crate::placement::REPAIR_FILL_PER_CENT;
use crate::record::{Balance, Chunk, ChunkState, Inode, Standing};
use crate::state::{Meta, decode_record};
use cairn_types::{CsId, FailureDomain, InodeId, VolumeId};
use cairn_wire::mds::{CsStats, Replica, ReplicaRole, Severity};

/// Parameter: the spread of fill at which moving begins, in per cent; it ends at half of it.
pub(crate) const GAP: &str = "mds.rebalance.gap";
/// Parameter: copies moved to one server at a time.
pub(crate) const MOVES: &str = "mds.rebalance.moves_per_cs";

/// Basis points in a whole.
const WHOLE: u64 = 10_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Copies looked at in one tick.
const STEP_COPIES: usize = 128;
/// Moves begun in one tick.
const STEP_MOVES: usize = 16;
/// Without a move for so long, what remains cannot be moved.
const FRUITLESS_NS: u64 = 60 * SECOND_NS;
/// When to try again after that.
const REST_NS: u64 = 600 * SECOND_NS;

/// Basis points of `capacity` that `used` is.
fn fill(used: u64, capacity: u64) -> u64 {
    (u128::from(used) * u128::from(WHOLE) / u128::from(capacity.max(1))).min(u128::from(WHOLE)) as u64
}

fn filled(stats: &CsStats) -> u64 {
    fill(stats.used, stats.capacity)
}

/// The fullest and the emptiest server of a tier.
struct Spread {
    tier: u8,
    fullest: (u64, CsId),
    emptiest: (u64, CsId),
}

impl Spread {
    fn gap(&self) -> u64 {
        self.fullest.0 - self.emptiest.0
    }
}

impl<K: Kv> Meta<K> {
    /// Begins, goes on with or ends the moving of copies for balance.
    pub(crate) fn run_balance(&mut self) {
        let counts = self.globals.counts;
        let needed = counts.blocked + counts.urgent + counts.degraded + counts.offline + counts.pending;
        if self.on_hold() || self.globals.brake.is_some() || needed > 0 {
            return;
        }
        let now = self.globals.clock_ns;
        let limit = self.config(GAP) * WHOLE / 100;
        let spread = self.spreads().into_iter().max_by_key(Spread::gap);
        let gap = spread.as_ref().map_or(0, Spread::gap);
        let state: Option<Balance> = self.record(&[keys::BALANCE]);
        let (mut moved, mut last_ns) = match state {
            Some(Balance::Resting { until_ns }) if until_ns > now => return,
            Some(Balance::Moving { moved, last_ns }) => (moved, last_ns),
            Some(Balance::Resting { .. }) | None => match spread {
                Some(spread) if gap > limit => {
                    let ((full, from), (empty, to)) = (spread.fullest, spread.emptiest);
                    let (full, empty) = (full / 100, empty / 100);
                    let text = format!("copies move to emptier servers: {from} is {full} % full, {to} {empty} %");
                    self.event(Severity::Info, "MDS-5040", text);
                    (0, now)
                }
                _ => return self.note_balance(state, None),
            },
        };
        if gap <= limit / 2 {
            let text = format!("the servers are balanced, {moved} copies were moved");
            self.event(Severity::Info, "MDS-5041", text);
            return self.note_balance(state, None);
        }
        let begun = self.begin_moves(limit / 2);
        if begun > 0 {
            (moved, last_ns) = (moved + begun, now);
        }
        if now - last_ns > FRUITLESS_NS && counts.replicating == 0 {
            let text = format!("{moved} copies were moved; what remains has no emptier server in a domain of its own");
            self.event(Severity::Info, "MDS-5042", text);
            return self.note_balance(state, Some(Balance::Resting { until_ns: now + REST_NS }));
        }
        self.note_balance(state, Some(Balance::Moving { moved, last_ns }));
    }

    fn note_balance(&mut self, old: Option<Balance>, new: Option<Balance>) {
        match new {
            _ if old == new => {}
            Some(new) => self.put_record(&[keys::BALANCE], &new),
            None => self.delete(&[keys::BALANCE]),
        }
    }

    /// The servers that take part, with how full they are.
    fn filled_servers(&self) -> impl Iterator<Item = (u64, CsId, u8)> {
        let part = self.servers.iter().filter(|(_, server)| server.standing() == Standing::Good);
        part.filter(|(_, server)| server.stats.capacity > 0)
            .map(|(cs, server)| (filled(&server.stats), *cs, server.tier))
    }

    /// One for each tier with several servers.
    fn spreads(&self) -> Vec<Spread> {
        let mut spreads: Vec<Spread> = Vec::new();
        for (fill, cs, tier) in self.filled_servers() {
            match spreads.iter_mut().find(|spread| spread.tier == tier) {
                Some(spread) => {
                    spread.fullest = spread.fullest.max((fill, cs));
                    spread.emptiest = spread.emptiest.min((fill, cs));
                }
                None => spreads.push(Spread { tier, fullest: (fill, cs), emptiest: (fill, cs) }),
            }
        }
        spreads
    }

    /// Begins what moves may run now, from servers that are `limit` fuller than the emptiest of their tier. Returns how
    /// many.
    fn begin_moves(&mut self, limit: u64) -> u64 {
        let per_cs = self.config(MOVES);
        let mut copies_left = STEP_COPIES;
        let mut begun = 0;
        for spread in self.spreads().into_iter().filter(|spread| spread.gap() > limit) {
            let in_tier = self.filled_servers().filter(|(_, _, tier)| *tier == spread.tier);
            let mut by_fill: Vec<(u64, CsId)> = in_tier.map(|(fill, cs, _)| (fill, cs)).collect();
            by_fill.sort_unstable();
            let full = by_fill.iter().rev().take_while(|(fill, _)| fill - spread.emptiest.0 > limit);
            for (_, source) in full {
                for (volume, index) in self.some_copies(*source, &mut copies_left) {
                    let under_way = self.globals.counts.replicating;
                    if begun as usize == STEP_MOVES || under_way >= per_cs * by_fill.len() as u64 {
                        return begun;
                    }
                    begun += u64::from(self.move_copy(volume, index, *source, &by_fill));
                }
            }
        }
        begun
    }

    /// Places of copies on a server, from one on that differs with each tick.
    fn some_copies(&self, cs: CsId, left: &mut usize) -> Vec<(VolumeId, u64)> {
        let chance = crate::placement::scramble(self.globals.clock_ns ^ u64::from(cs.0));
        let start = cairn_types::ChunkId(chance % self.globals.next_chunk.max(1));
        let (from, end) = (keys::copy(cs, start), keys::after(&keys::server(keys::COPY, cs)));
        let mut copies = self.kv.scan(&from, &end, *left);
        if copies.len() < *left {
            copies.extend(self.kv.scan(&keys::server(keys::COPY, cs), &from, *left - copies.len()));
        }
        *left -= copies.len();
        copies.iter().map(|(_, place)| decode_record(place)).collect()
    }

    /// Gives a chunk a copy on an emptier server than `source`, if there is one and the chunk lacks nothing.
    fn move_copy(&mut self, volume: VolumeId, index: u64, source: CsId, by_fill: &[(u64, CsId)]) -> bool {
        let old = self.chunk(volume, index).expect("the index by server names chunks that exist");
        let whole = old.state == ChunkState::Healthy && old.queued.is_none() && old.stale.is_empty();
        if !whole || old.is_replicating() || old.replica(source).is_none() {
            return false;
        }
        let inode: Inode = self.record(&keys::inode(InodeId(volume.0))).expect("a chunk has a volume");
        let policy = &inode.policy;
        let Some(target) = self.emptier(&old, source, policy.domain, policy.chunk_size(), by_fill) else {
            return false;
        };
        let mut new = old.clone();
        new.bump();
        new.replicas.push(Replica { cs: target, role: ReplicaRole::Rebuilding, since: new.version });
        self.set_chunk(volume, index, Some(&old), Some(&mut new), true);
        self.push_map_changed(volume, &inode, None);
        true
    }

    /// The emptiest server that may have the copy of `source`, and is the emptier of both also afterwards. Copies that
    /// are under way count as full ones, away from the source and onto the target: so nothing moves back and forth.
    fn emptier(
        &mut self,
        chunk: &Chunk,
        source: CsId,
        domain: FailureDomain,
        size: u64,
        by_fill: &[(u64, CsId)],
    ) -> Option<CsId> {
        let level = domain as usize;
        let slots = self.slots().to_vec();
        let domain = |cs: CsId| slots.binary_search_by_key(&cs, |slot| slot.cs).ok().map(|at| slots[at].domains[level]);
        let per_cs = self.config(MOVES);
        let from = self.servers[&source].stats;
        let leaving = size.saturating_mul(self.globals.counts.replicating + 1);
        let source_after = fill(from.used.saturating_sub(leaving), from.capacity);
        let stays = |cs: &CsId| *cs != source;
        by_fill.iter().map(|(_, cs)| *cs).find(|target| {
            let server = &self.servers[target];
            let coming = size.saturating_mul(u64::from(server.rebuilding) + 1);
            let target_after = fill(server.stats.used.saturating_add(coming), server.stats.capacity);
            let apart = chunk.servers().filter(stays).all(|cs| domain(cs) != domain(*target));
            let room = target_after <= source_after && target_after < WHOLE / 100 * REPAIR_FILL_PER_CENT;
            room && apart && chunk.replica(*target).is_none() && u64::from(server.rebuilding) < per_cs
        })
    }
}
