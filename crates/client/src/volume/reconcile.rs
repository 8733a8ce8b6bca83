//! Making replicas equal before a lease that was taken over is used (rule 8).
//!
//! Stages: ask the servers for their *tails* (twice: to learn of the chunks, and again when those are raised); find the
//! chunks the tails name in the *map*; *prepare* them, which raises every replica to the version in force; per block
//! take the highest (epoch, sequence) of the current replicas, and where they differ *copy* the winner to all of them
//! as a new write of ours; *flush*. Only then the settled mark moves and the volume opens. Should anything fail on the
//! way, or a server restart, it begins again: every step can be repeated.

use super::map::Entry;
use super::ops::{Done, Kind};
use super::{Fence, State, Volume, VolumeCall};
use crate::io::Ctx;
use crate::servers::{CallFor, Owner};
use crate::timers::Timer;
use cairn_stdx::planted;
use cairn_types::{ChunkId, ChunkVersion, Duration, Epoch, Sequence};
use cairn_wire::cs::{CsError, CsReply, CsRequest, TailEntry};
use cairn_wire::data::DATA_BLOCKS_MAX;
use cairn_wire::mds::{MdsError, MdsReply, MdsRequest};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Copies under way at once.
const COPIES_MAX: u32 = 16;
/// Entries of one server's tail that are taken; a server holds far fewer.
const TAIL_MAX: usize = 1 << 20;
/// Map entries fetched at once.
const MAP_PAGE: u32 = 4096;
const AGAIN_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Tails,
    Map,
    Prepare,
    Copy,
    Flush,
    /// Something failed; a timer begins anew.
    Again,
}

/// Blocks to copy within a chunk.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Copy {
    index: u64,
    first: u32,
    count: u32,
    unmap: bool,
    sources: Vec<u16>,
}

pub(super) struct Reconcile {
    stage: Stage,
    asked: BTreeSet<u16>,
    tails: BTreeMap<u16, Vec<TailEntry>>,
    unresolved: BTreeSet<ChunkId>,
    /// Chunks that tails name and the map does not know.
    dropped: BTreeSet<ChunkId>,
    /// The chunks are known and raised, and the tails asked for anew: only these count. A server may have joined a set
    /// after it was asked first, and what its tail said then was of a copy that is gone.
    second: bool,
    /// The versions the chunks had when the tails were asked for anew.
    versions: BTreeMap<u64, ChunkVersion>,
    /// Chunks concerned, pinned in the cache.
    chunks: BTreeMap<u64, ChunkId>,
    preparing: BTreeSet<u64>,
    copies: VecDeque<Copy>,
    under_way: u32,
    failed: bool,
    /// A server restarted meanwhile.
    again: bool,
}

impl Reconcile {
    /// How far it is, for people.
    pub(super) fn explain(&self) -> String {
        format!(
            "{:?}, tails asked {:?}, chunks to prepare {:?}, {} copies to do, {} under way{}{}",
            self.stage,
            self.asked,
            self.preparing,
            self.copies.len(),
            self.under_way,
            if self.failed { ", failed" } else { "" },
            if self.again { ", once more" } else { "" }
        )
    }
}

/// Which write a block's content comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Origin {
    epoch: Epoch,
    sequence: Sequence,
    unmap: bool,
}

/// Runs of blocks with the same origin: first to (end, origin).
#[derive(Default)]
struct Painting(BTreeMap<u32, (u32, Origin)>);

impl Painting {
    /// Puts an origin over a run; what lay there is covered.
    fn paint(&mut self, first: u32, end: u32, origin: Origin) {
        self.split(first);
        self.split(end);
        let covered: Vec<u32> = self.0.range(first..end).map(|(at, _)| *at).collect();
        for at in covered {
            self.0.remove(&at);
        }
        self.0.insert(first, (end, origin));
    }

    fn split(&mut self, at: u32) {
        let Some((_, (end, origin))) = self.0.range_mut(..at).next_back() else { return };
        if *end > at {
            let (old_end, origin) = (std::mem::replace(end, at), *origin);
            self.0.insert(at, (old_end, origin));
        }
    }

    fn at(&self, block: u32) -> Option<Origin> {
        let (_, (end, origin)) = self.0.range(..=block).next_back()?;
        (*end > block).then_some(*origin)
    }
}

/// What must be copied so that the replicas of one chunk agree: per block the highest origin of the current replicas
/// wins. The first `current` tails are those; the others belong to copies being rebuilt, which took writes that the
/// current ones may never have got, or lost some. Where only such a copy names a block, what the current ones hold
/// wins. Blocks that rotted where they are (`rotten`: replica and block) win nothing, and get what the others hold.
fn differences(
    index: u64,
    tails: &[(u16, Vec<TailEntry>)],
    current: usize,
    rotten: &BTreeSet<(u16, u32)>,
) -> Vec<Copy> {
    let mut paintings: Vec<(u16, Painting)> = Vec::with_capacity(tails.len());
    let mut bounds = BTreeSet::new();
    for (slot, tail) in tails {
        let mut entries: Vec<&TailEntry> = tail.iter().filter(|entry| entry.block_count > 0).collect();
        entries.sort_by_key(|entry| (entry.epoch, entry.sequence));
        let mut painting = Painting::default();
        for entry in entries {
            let end = entry.first_block.saturating_add(entry.block_count);
            bounds.extend([entry.first_block, end]);
            let origin = Origin { epoch: entry.epoch, sequence: entry.sequence, unmap: entry.unmap };
            painting.paint(entry.first_block, end, origin);
        }
        paintings.push((*slot, painting));
    }
    bounds.extend(rotten.iter().flat_map(|(_, block)| [*block, block + 1]));
    let bounds: Vec<u32> = bounds.into_iter().collect();
    let mut copies: Vec<Copy> = Vec::new();
    for pair in bounds.windows(2) {
        let (first, end) = (pair[0], pair[1]);
        let origins: Vec<(u16, Option<Origin>)> = paintings.iter().map(|(slot, p)| (*slot, p.at(first))).collect();
        let is_sound = |slot: u16| !rotten.contains(&(slot, first));
        let sound = || origins[..current].iter().filter(|(slot, _)| is_sound(*slot));
        if sound().next().is_none() {
            // Every copy is damaged here: there is nothing to copy.
            continue;
        }
        let known = sound().filter_map(|(_, origin)| *origin);
        let winner = if planted!("tail_merge_takes_lower_epoch") { known.min() } else { known.max() };
        if origins.iter().all(|(slot, origin)| *origin == winner && is_sound(*slot)) {
            continue;
        }
        let unmap = winner.is_some_and(|winner| winner.unmap);
        let holders = sound().filter(|(_, origin)| *origin == winner);
        let sources: Vec<u16> = holders.map(|(slot, _)| *slot).collect();
        let mut at = first;
        while at < end {
            let room = if unmap { u32::MAX } else { DATA_BLOCKS_MAX };
            let joins = copies.last().is_some_and(|last| {
                last.first + last.count == at && last.unmap == unmap && last.sources == sources && last.count < room
            });
            if !joins {
                copies.push(Copy { index, first: at, count: 0, unmap, sources: sources.clone() });
            }
            let last = copies.last_mut().expect("just made");
            let count = (end - at).min(room - last.count);
            last.count += count;
            at += count;
        }
    }
    copies
}

impl Volume {
    /// Begins: asks every server for its tail.
    pub(super) fn begin_reconcile(&mut self, ctx: &mut Ctx<'_>) {
        assert!(
            self.state == State::Fencing && self.reconcile.is_none(),
            "before the volume is used, and once at a time"
        );
        let slots = self.slots_to_ask();
        self.reconcile = Some(Reconcile {
            stage: Stage::Tails,
            asked: slots.iter().copied().collect(),
            tails: BTreeMap::new(),
            unresolved: BTreeSet::new(),
            dropped: BTreeSet::new(),
            second: false,
            versions: BTreeMap::new(),
            chunks: BTreeMap::new(),
            preparing: BTreeSet::new(),
            copies: VecDeque::new(),
            under_way: 0,
            failed: false,
            again: false,
        });
        if slots.is_empty() {
            self.resolve(ctx);
        }
        for slot in slots {
            self.ask_tail(ctx, slot, 0);
        }
    }

    /// A server restarted in the middle: what its tail said is not true any more. Nothing is copied by the old plan;
    /// copies already read are written out, then all begins anew.
    pub(super) fn abort_reconcile(&mut self, ctx: &mut Ctx<'_>) {
        let reading = self.reading_copies();
        let Some(reconcile) = &mut self.reconcile else { return };
        match reconcile.stage {
            Stage::Again => {}
            Stage::Flush => reconcile.again = true,
            Stage::Tails | Stage::Map | Stage::Prepare => self.reconcile_again(ctx),
            Stage::Copy => {
                reconcile.failed = true;
                reconcile.copies.clear();
                for op in reading {
                    self.abandon_copy(ctx, op);
                }
            }
        }
    }

    fn ask_tail(&mut self, ctx: &mut Ctx<'_>, slot: u16, skip: u64) {
        let request = CsRequest::Tail { volume: self.id, epoch: self.epoch, skip };
        self.cs_call(ctx, slot, &request, CallFor::Tail);
    }

    pub(super) fn on_tail(&mut self, ctx: &mut Ctx<'_>, slot: u16, result: Result<CsReply, CsError>) {
        let Some(reconcile) = self.reconcile.as_mut().filter(|r| r.stage == Stage::Tails) else { return };
        match result {
            Ok(CsReply::Tail { entries, end }) => {
                let tail = reconcile.tails.entry(slot).or_default();
                let stuck = entries.is_empty() && !end;
                tail.extend(entries);
                if stuck || tail.len() > TAIL_MAX {
                    self.fail_server(ctx, slot);
                } else if end {
                    reconcile.asked.remove(&slot);
                    if reconcile.asked.is_empty() {
                        self.resolve(ctx);
                    }
                } else {
                    let skip = tail.len() as u64;
                    self.ask_tail(ctx, slot, skip);
                }
            }
            Err(CsError::StaleEpoch { .. }) => self.taken_over(ctx),
            Err(CsError::NotFenced(_)) => {
                self.server_mut(slot).fence = Fence::No;
                self.ask_fence(ctx, slot);
                self.reconcile_again(ctx);
            }
            _ => self.fail_server(ctx, slot),
        }
    }

    /// A server is out: its tail counts no more.
    pub(super) fn forget_tail(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        let Some(reconcile) = &mut self.reconcile else { return };
        reconcile.tails.remove(&slot);
        if reconcile.asked.remove(&slot) && reconcile.asked.is_empty() && reconcile.stage == Stage::Tails {
            self.resolve(ctx);
        }
    }

    /// All tails are here: finds the chunks they name.
    fn resolve(&mut self, ctx: &mut Ctx<'_>) {
        if self.reconcile.as_ref().is_some_and(|reconcile| reconcile.second) {
            return self.judge_tails(ctx);
        }
        let reconcile = self.reconcile.as_mut().expect("the caller is in it");
        reconcile.unresolved = reconcile.tails.values().flatten().map(|entry| entry.chunk).collect();
        let mut indexes: Vec<u64> = self.chunk_order.iter().copied().collect();
        indexes.sort_unstable();
        for index in indexes {
            let Some(entry) = &self.chunks[&index].entry else { continue };
            if reconcile.unresolved.remove(&entry.chunk) {
                reconcile.chunks.insert(index, entry.chunk);
            }
        }
        reconcile.stage = Stage::Map;
        self.pin_chunks(1);
        self.read_map(ctx, 0);
    }

    fn pin_chunks(&mut self, change: i32) {
        let Some(reconcile) = &self.reconcile else { return };
        for index in reconcile.chunks.keys() {
            if let Some(chunk) = self.chunks.get_mut(index) {
                chunk.active = chunk.active.checked_add_signed(change).expect("pins are taken off once");
            }
        }
    }

    fn read_map(&mut self, ctx: &mut Ctx<'_>, from: u64) {
        if self.reconcile.as_ref().expect("the caller is in it").unresolved.is_empty() {
            self.prepare_chunks(ctx);
            return;
        }
        let request = MdsRequest::ChunkMap { volume: self.id, index: from, limit: MAP_PAGE };
        ctx.call(request, self.waiter(VolumeCall::Map { from }));
    }

    pub(super) fn on_reconcile_map(&mut self, ctx: &mut Ctx<'_>, _from: u64, result: Result<MdsReply, MdsError>) {
        if !matches!(&self.reconcile, Some(r) if r.stage == Stage::Map) {
            return;
        }
        let entries = match result {
            Ok(MdsReply::Chunks(entries)) => entries,
            other => {
                ctx.log(format!("the map of {} could not be read: {other:?}", self.id));
                self.reconcile_again(ctx);
                return;
            }
        };
        let last = entries.last().map(|entry| entry.index);
        let full = entries.len() >= MAP_PAGE as usize;
        for entry in entries {
            let reconcile = self.reconcile.as_mut().expect("just seen");
            if reconcile.unresolved.remove(&entry.chunk) {
                reconcile.chunks.insert(entry.index, entry.chunk);
                let index = entry.index;
                self.chunk(index).active += 1;
                self.adopt_entry(ctx, entry, false);
            }
        }
        match last.filter(|_| full) {
            Some(last) => self.read_map(ctx, last + 1),
            None => {
                // What the map does not know was dropped: its tails mean nothing.
                let reconcile = self.reconcile.as_mut().expect("just seen");
                reconcile.dropped = std::mem::take(&mut reconcile.unresolved);
                self.prepare_chunks(ctx);
            }
        }
    }

    fn prepare_chunks(&mut self, ctx: &mut Ctx<'_>) {
        let reconcile = self.reconcile.as_mut().expect("the caller is in it");
        reconcile.stage = Stage::Prepare;
        let indexes: Vec<u64> = reconcile.chunks.keys().copied().collect();
        reconcile.preparing = indexes.iter().copied().collect();
        if indexes.is_empty() {
            self.plan(ctx);
            return;
        }
        for index in indexes {
            let chunk = self.chunk(index);
            chunk.raise = true;
            chunk.ready = false;
            self.drive(ctx, index);
        }
    }

    /// A chunk is ready; the last one concerned lets the copying begin.
    pub(super) fn on_chunk_ready(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        self.recheck_flushes(ctx, None);
        if let Some(reconcile) = &mut self.reconcile
            && reconcile.stage == Stage::Prepare
            && reconcile.preparing.remove(&index)
            && reconcile.preparing.is_empty()
        {
            self.ask_tails_anew(ctx);
        }
    }

    /// Every chunk concerned is raised: what the tails say from here on is of the copies in force.
    fn ask_tails_anew(&mut self, ctx: &mut Ctx<'_>) {
        let slots = self.slots_to_ask();
        let reconcile = self.reconcile.as_mut().expect("the caller is in it");
        let version = |index: &u64| self.chunks.get(index)?.entry.as_ref().map(|entry| (*index, entry.version));
        reconcile.versions = reconcile.chunks.keys().filter_map(version).collect();
        reconcile.second = true;
        reconcile.stage = Stage::Tails;
        reconcile.tails.clear();
        reconcile.asked = slots.iter().copied().collect();
        if slots.is_empty() {
            self.resolve(ctx);
        }
        for slot in slots {
            self.ask_tail(ctx, slot, 0);
        }
    }

    /// The second tails are here: they count if they name no other chunks and no set has changed meanwhile.
    fn judge_tails(&mut self, ctx: &mut Ctx<'_>) {
        let reconcile = self.reconcile.as_ref().expect("the caller is in it");
        let known: BTreeSet<ChunkId> = reconcile.chunks.values().chain(&reconcile.dropped).copied().collect();
        let unknown = reconcile.tails.values().flatten().any(|entry| !known.contains(&entry.chunk));
        let moved = reconcile.chunks.keys().any(|index| {
            let now = self.chunks.get(index).and_then(|chunk| chunk.entry.as_ref()).map(|entry| entry.version);
            now != reconcile.versions.get(index).copied()
        });
        if unknown || moved { self.reconcile_again(ctx) } else { self.plan(ctx) }
    }

    fn slots_to_ask(&self) -> Vec<u16> {
        let stands = |slot: &u16| self.server(*slot).fence == Fence::Yes && !self.server(*slot).excused;
        self.all_slots().filter(stands).collect()
    }

    fn plan(&mut self, ctx: &mut Ctx<'_>) {
        let reconcile = self.reconcile.as_mut().expect("the caller is in it");
        let mut copies = VecDeque::new();
        let mut unasked = BTreeSet::new();
        for (index, name) in &reconcile.chunks {
            let Some(entry) = self.chunks.get(index).and_then(|chunk| chunk.entry.as_ref()) else { continue };
            // A lone replica has nobody to differ from.
            if entry.reps.len() > 1 {
                unasked
                    .extend(entry.reps.iter().map(|rep| rep.slot).filter(|slot| !reconcile.tails.contains_key(slot)));
            }
            let of = |slot: u16| -> Vec<TailEntry> {
                let tail = reconcile.tails.get(&slot).into_iter().flatten();
                tail.filter(|e| e.chunk == *name).copied().collect()
            };
            let current = entry.current().count();
            let followers = entry.reps.iter().filter(|rep| !rep.current).map(|rep| rep.slot);
            let tails: Vec<(u16, Vec<TailEntry>)> =
                Entry::current(entry).chain(followers).map(|slot| (slot, of(slot))).collect();
            let rotten = self.rotten.iter().filter(|(of, ..)| of == index).map(|(_, slot, block)| (*slot, *block));
            copies.extend(differences(*index, &tails, current, &rotten.collect()));
        }
        if !unasked.is_empty() {
            // A server came back into a set after the tails were asked for: without its tail nothing is known.
            for slot in unasked {
                self.server_mut(slot).excused = false;
                self.ask_fence(ctx, slot);
            }
            self.reconcile_again(ctx);
            return;
        }
        let count = copies.len();
        reconcile.stage = Stage::Copy;
        reconcile.copies = copies;
        // One more than the copies under way, so that a copy that ends at once does not end the stage.
        reconcile.under_way = 1;
        ctx.log(format!("reconciling {}: {} runs of blocks differ", self.id, count));
        self.on_reconcile_step(ctx, true);
    }

    /// A copy or the flush has ended.
    pub(super) fn on_reconcile_step(&mut self, ctx: &mut Ctx<'_>, ok: bool) {
        let Some(reconcile) = &mut self.reconcile else { return };
        reconcile.under_way -= 1;
        reconcile.failed |= !ok;
        if reconcile.stage == Stage::Flush {
            if reconcile.failed {
                self.reconcile_again(ctx)
            } else {
                self.finish_reconcile(ctx)
            }
            return;
        }
        while let Some(reconcile) = &mut self.reconcile
            && reconcile.stage == Stage::Copy
            && reconcile.under_way < COPIES_MAX
            && !reconcile.failed
            && let Some(copy) = reconcile.copies.pop_front()
        {
            reconcile.under_way += 1;
            let block = copy.index * self.chunk_blocks + u64::from(copy.first);
            let kind = Kind::Copy {
                block,
                count: copy.count,
                unmap: copy.unmap,
                zeros_as_holes: false,
                sources: copy.sources,
            };
            self.add_op(ctx, kind, Done::Reconcile, true);
        }
        let Some(reconcile) = self.reconcile.as_mut().filter(|r| r.stage == Stage::Copy && r.under_way == 0) else {
            return;
        };
        if reconcile.failed {
            self.reconcile_again(ctx);
            return;
        }
        reconcile.stage = Stage::Flush;
        reconcile.under_way = 1;
        self.add_op(ctx, Kind::Flush { waiting: Vec::new(), upto: 0 }, Done::Reconcile, true);
    }

    fn reconcile_again(&mut self, ctx: &mut Ctx<'_>) {
        self.pin_chunks(-1);
        let key = self.key;
        for server in &self.servers {
            ctx.servers.cancel(
                server.number,
                |owner| matches!(owner, Owner::Call { volume, call: CallFor::Tail, .. } if *volume == key),
            );
        }
        let Some(reconcile) = &mut self.reconcile else { return };
        reconcile.chunks.clear();
        reconcile.stage = Stage::Again;
        ctx.io.timers.after(ctx.io.now, AGAIN_AFTER, Timer::Reconcile(self.key));
    }

    /// Time to begin anew.
    pub(crate) fn on_reconcile_timer(&mut self, ctx: &mut Ctx<'_>) {
        if self.death().is_none() && matches!(&self.reconcile, Some(r) if r.stage == Stage::Again) {
            self.reconcile = None;
            self.begin_reconcile(ctx);
            self.pump(ctx);
        }
    }

    fn finish_reconcile(&mut self, ctx: &mut Ctx<'_>) {
        self.pin_chunks(-1);
        let reconcile = self.reconcile.take().expect("the caller is in it");
        self.rotten.clear();
        if reconcile.again {
            self.begin_reconcile(ctx);
            return;
        }
        self.finish_open(ctx);
        self.send_settled(ctx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Vec<TailEntry>> {
        let one = (0u32..40, 1u32..30, 1u64..3, 1u64..9, any::<bool>());
        prop::collection::vec(one, 0..12).prop_map(|list| {
            let entry = |(first_block, block_count, epoch, sequence, unmap)| TailEntry {
                chunk: ChunkId(1),
                first_block,
                block_count,
                epoch: Epoch(epoch),
                sequence: Sequence(sequence),
                unmap,
            };
            list.into_iter().map(entry).collect()
        })
    }

    proptest! {
        /// Against the rule, block by block.
        #[test]
        fn the_highest_write_of_each_block_is_copied_where_replicas_differ(tails in prop::collection::vec(entries(), 1..4)) {
            let tails: Vec<(u16, Vec<TailEntry>)> = tails.into_iter().enumerate().map(|(i, t)| (i as u16, t)).collect();
            let copies = differences(7, &tails, tails.len(), &BTreeSet::new());
            for block in 0u32..80 {
                let top = |tail: &[TailEntry]| {
                    let over = |e: &&TailEntry| (e.first_block..e.first_block + e.block_count).contains(&block);
                    tail.iter().filter(over).map(|e| Origin { epoch: e.epoch, sequence: e.sequence, unmap: e.unmap })
                        .max_by_key(|o| (o.epoch, o.sequence))
                };
                let tops: Vec<Option<Origin>> = tails.iter().map(|(_, tail)| top(tail)).collect();
                let winner = tops.iter().flatten().max_by_key(|o| (o.epoch, o.sequence)).copied();
                let key = |o: &Origin| (o.epoch, o.sequence);
                let differ = tops.iter().any(|o| o.as_ref().map(key) != winner.as_ref().map(key));
                let found: Vec<&Copy> =
                    copies.iter().filter(|c| (c.first..c.first + c.count).contains(&block)).collect();
                if winner.is_some() && differ {
                    prop_assert_eq!(found.len(), 1);
                    for source in &found[0].sources {
                        prop_assert_eq!(tops[*source as usize].as_ref().map(key), winner.as_ref().map(key));
                    }
                    prop_assert!(!found[0].sources.is_empty());
                }
                prop_assert!(found.len() <= 1);
            }
            prop_assert!(copies.iter().all(|c| c.unmap || c.count <= DATA_BLOCKS_MAX));
        }
    }

    #[test]
    fn a_copy_being_rebuilt_follows_the_current_ones() {
        let entry = |first_block, sequence| TailEntry {
            chunk: ChunkId(1),
            first_block,
            block_count: 1,
            epoch: Epoch(1),
            sequence: Sequence(sequence),
            unmap: false,
        };
        // Block 3: a write only the follower took. Block 5: a later write it lost. Block 7: all alike.
        let tails = [
            (0, vec![entry(5, 8), entry(7, 9)]),
            (1, vec![entry(5, 8), entry(7, 9)]),
            (2, vec![entry(3, 7), entry(5, 2), entry(7, 9)]),
        ];
        let copies = differences(0, &tails, 2, &BTreeSet::new());
        let found: Vec<(u32, u32, &[u16])> = copies.iter().map(|c| (c.first, c.count, &c.sources[..])).collect();
        assert_eq!(found, [(3, 1, &[0, 1][..]), (5, 1, &[0, 1][..])]);
    }

    #[test]
    fn what_rotted_wins_nothing_and_gets_what_the_others_hold() {
        let entry = |first_block, block_count, sequence| TailEntry {
            chunk: ChunkId(1),
            first_block,
            block_count,
            epoch: Epoch(1),
            sequence: Sequence(sequence),
            unmap: false,
        };
        // Replica 0 alone has a write of blocks 3 to 6, of which 4 rotted. Both have block 9, which rotted in
        // replica 1, and block 12, which rotted in both.
        let tails =
            [(0, vec![entry(3, 4, 8), entry(9, 1, 7), entry(12, 1, 6)]), (1, vec![entry(9, 1, 7), entry(12, 1, 6)])];
        let rotten = BTreeSet::from([(0, 4), (1, 9), (0, 12), (1, 12)]);
        let copies = differences(0, &tails, 2, &rotten);
        let found: Vec<(u32, u32, &[u16])> = copies.iter().map(|c| (c.first, c.count, &c.sources[..])).collect();
        assert_eq!(found, [(3, 1, &[0][..]), (4, 1, &[1][..]), (5, 2, &[0][..]), (9, 1, &[0][..])]);
    }
}
