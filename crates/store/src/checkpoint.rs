//! Checkpoints: the state as of one group, written to new places beside the old one, then made the root.
//!
//! The snapshot is taken at one instant: every changed leaf and page is serialised and given a slot, and the roots are
//! known. Writing it out goes on in the background, a bounded number of writes at a time, while groups go on. Then:
//! flush, first superblock copy, flush, second copy. Only after the second flush may the slots of the previous
//! checkpoint be used again. The cost of a snapshot is about 0.3 µs for each changed leaf.

use crate::api::{Notice, StoreOutput};
use crate::bitmap::map_page_bytes;
use crate::chunks::NOT_CACHED;
use crate::engine::{Engine, Io};
use crate::layout::superblock::Superblock;
use crate::layout::{PageKind, SLOT, SLOT_U64, SUPERBLOCK_SLOTS, bound_checksum};
use crate::leaf::leaf_bytes;
use crate::tree::{PageWrite, Tree};
use cairn_env::{Buf, BufMut, DiskOp};
use cairn_stdx::planted;
use cairn_types::ChunkId;
use std::collections::VecDeque;

/// Longest checkpoint write: 256 KiB.
const WRITE_SLOTS_MAX: usize = 64;
/// Checkpoint writes in flight: enough to keep a device busy, few enough to let groups through.
const WRITES_IN_FLIGHT_MAX: u32 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Leaves and pages are being written.
    Pages,
    /// Waits for the flush that covers them.
    PagesFlush,
    /// The first superblock copy is being written.
    FirstCopy,
    /// Waits for the flush that makes it durable.
    FirstFlush,
    /// The second copy is being written.
    SecondCopy,
    Done,
}

pub(crate) struct Checkpoint {
    step: Step,
    writes: VecDeque<(u64, Buf)>,
    in_flight: u32,
    superblock: Buf,
    generation: u64,
    /// Leaves of the snapshot: their slots cannot be read before they are written.
    leaves: Vec<(ChunkId, u32)>,
    /// Requests to answer when done.
    tokens: Vec<u64>,
}

impl Checkpoint {
    pub(crate) fn wants_flush(&self) -> bool {
        matches!(self.step, Step::PagesFlush | Step::FirstFlush)
    }
}

impl Engine {
    /// Upper bound of the slots a checkpoint of the present state takes.
    pub(crate) fn checkpoint_cost(&self) -> u64 {
        let state = &self.state;
        let volumes = state.volumes.page_count();
        let tails = state.volumes.tail_page_count();
        let bitmap = state.live.page_count();
        state.dirty_leaf_count
            + Tree::update_cost(bitmap, bitmap)
            + Tree::update_cost(state.chunks.dirty_cost(), state.chunks.page_count())
            + Tree::update_cost(state.volumes.dirty_cost(), volumes)
            + Tree::update_cost(tails, tails)
    }

    fn checkpoint_wanted(&self) -> bool {
        let options = &self.options;
        let state = &self.state;
        let low = self.free_mark / 2 + self.checkpoint_cost();
        self.checkpoint_requested
            || !self.checkpoint_waiters.is_empty()
            || state.dirty_leaf_count >= options.dirty_leaves_max
            || state.replay_leaves >= options.dirty_leaves_max
            || self.chain_groups >= options.chain_groups_max
            || self.chain_blocks >= options.chain_blocks_max
            || (state.space.free() < low && state.space.quarantined() > self.free_mark / 8 + 1)
    }

    /// Starts a checkpoint when one is due, and moves the running one on.
    pub(crate) fn step_checkpoint(&mut self, out: &mut StoreOutput) {
        if self.checkpoint.is_none() && !self.is_opening() && self.checkpoint_wanted() {
            self.begin_checkpoint();
        }
        let Some(mut checkpoint) = self.checkpoint.take() else { return };
        if checkpoint.step == Step::Pages {
            while checkpoint.in_flight < WRITES_IN_FLIGHT_MAX
                && let Some((slot, buf)) = checkpoint.writes.pop_front()
            {
                checkpoint.in_flight += 1;
                let op = DiskOp::Write { offset: slot * SLOT_U64, bufs: vec![buf] };
                self.issue(Io::Checkpoint, op, out);
            }
            if checkpoint.in_flight == 0 {
                checkpoint.step = Step::PagesFlush;
            }
        }
        let copy = match checkpoint.step {
            Step::FirstCopy => Some(0),
            Step::SecondCopy => Some(1),
            _ => None,
        };
        if let Some(copy) = copy
            && checkpoint.in_flight == 0
        {
            checkpoint.in_flight = 1;
            let slot = SUPERBLOCK_SLOTS[(checkpoint.generation % 2) as usize][copy];
            let op = DiskOp::Write { offset: slot * SLOT_U64, bufs: vec![checkpoint.superblock.clone()] };
            self.issue(Io::Checkpoint, op, out);
        }
        if checkpoint.step == Step::Done {
            self.end_checkpoint(checkpoint, out);
        } else {
            self.checkpoint = Some(checkpoint);
        }
    }

    pub(crate) fn checkpoint_written(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("checkpoint writes belong to a checkpoint");
        checkpoint.in_flight -= 1;
        if checkpoint.in_flight > 0 {
            return;
        }
        checkpoint.step = match checkpoint.step {
            Step::Pages if checkpoint.writes.is_empty() => Step::PagesFlush,
            Step::FirstCopy => Step::FirstFlush,
            Step::SecondCopy => Step::Done,
            step => step,
        };
    }

    /// The flush a checkpoint asked for is done.
    pub(crate) fn checkpoint_flushed(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("the flush was tagged with a checkpoint");
        checkpoint.step = match checkpoint.step {
            Step::PagesFlush => Step::FirstCopy,
            Step::FirstFlush => Step::SecondCopy,
            step => unreachable!("a checkpoint in step {step:?} wants no flush"),
        };
    }

    fn begin_checkpoint(&mut self) {
        self.checkpoint_requested = false;
        let mut writes = VecDeque::new();
        let leaves = self.snapshot_leaves(&mut writes);
        let mut pages: Vec<PageWrite> = Vec::new();
        let state = &mut self.state;
        let space = &mut state.space;
        let chunk_pages = state.chunks.snapshot();
        let volume_pages = state.volumes.snapshot();
        let tail_pages = state.volumes.tail_snapshot();
        let bitmap_pages = state.live.take_dirty().into_iter().map(|(number, page)| {
            let mut bytes = vec![0; SLOT];
            map_page_bytes(&page, &mut bytes);
            (number, bytes)
        });
        let updates = [
            Some((state.live.page_count(), bitmap_pages.collect())),
            Some((state.chunks.page_count(), chunk_pages)),
            Some((state.volumes.page_count(), volume_pages)),
            tail_pages.map(|pages| (pages.len() as u64, pages)),
        ];
        let mut freed: Vec<u64> = Vec::new();
        for (tree, update) in self.trees.iter_mut().zip(updates) {
            let Some((count, dirty)) = update else { continue };
            let mut allocate = || space.allocate(1)[0];
            tree.update(count as usize, dirty, &mut allocate, &mut |slot| freed.push(slot), &mut pages);
        }
        freed.into_iter().for_each(|slot| space.release(slot));
        // Whatever lost its last reference up to here belongs to this checkpoint.
        space.snapshot();
        let generation = self.generation + 1;
        let superblock = Superblock {
            cluster: self.cluster,
            store_uuid: self.store_uuid,
            slot_count: state.slot_count,
            generation,
            chain: if planted!("store_checkpoint_drops_last") { self.formed } else { self.applied },
            trees: [0, 1, 2, 3].map(|i| self.trees[i].root()),
            label: state.label,
        };
        self.checkpoint_slots_written += (leaves.len() + pages.len()) as u64 + 2;
        coalesce(pages, &mut writes);
        self.chain_groups = self.groups.len() as u64;
        self.chain_blocks = 0;
        self.checkpoint = Some(Checkpoint {
            step: Step::Pages,
            writes,
            in_flight: 0,
            superblock: Buf::copy_from(&superblock.encode()),
            generation,
            leaves,
            tokens: std::mem::take(&mut self.checkpoint_waiters),
        });
    }

    /// Gives every changed leaf a new slot and serialises it.
    fn snapshot_leaves(&mut self, writes: &mut VecDeque<(u64, Buf)>) -> Vec<(ChunkId, u32)> {
        let state = &mut self.state;
        let mut leaves = std::mem::take(&mut state.dirty_leaves);
        leaves.retain(|(chunk, number)| {
            let cached = state.chunks.get(*chunk).map_or(NOT_CACHED, |owner| owner.leaves[*number as usize].cached);
            cached != NOT_CACHED && state.cache.get(cached).dirty
        });
        leaves.sort_unstable();
        leaves.dedup();
        assert_eq!(leaves.len() as u64, state.dirty_leaf_count, "the count of dirty leaves is exact");
        let slots = state.space.allocate(state.dirty_leaf_count);
        let mut at = 0;
        while at < slots.len() {
            let run = slots[at..].iter().zip(slots[at]..).take(WRITE_SLOTS_MAX).take_while(|(a, b)| *a == b).count();
            let mut buf = BufMut::zeroed(run * SLOT);
            for (i, bytes) in buf.chunks_exact_mut(SLOT).enumerate() {
                let (chunk, number) = leaves[at + i];
                let owner = state.chunks.get_mut(chunk).expect("only leaves of living chunks are kept");
                let reference = &mut owner.leaves[number as usize];
                let cached = state.cache.get_mut(reference.cached);
                cached.dirty = false;
                cached.in_checkpoint = true;
                leaf_bytes(&cached.leaf, bytes);
                let slot = slots[at + i];
                assert!(state.live.set(slot), "a free slot is not live");
                // A slot that is not live here belongs to two leaves on a forged disk: it is left alone.
                if reference.slot != 0 && state.live.clear(reference.slot) {
                    state.space.release(reference.slot);
                }
                reference.slot = slot;
                reference.checksum = bound_checksum(bytes, PageKind::Leaf, chunk.0, u64::from(number));
            }
            writes.push_back((slots[at], buf.freeze()));
            at += run;
        }
        state.dirty_leaf_count = 0;
        state.unplaced_leaves = 0;
        state.replay_leaves = 0;
        leaves
    }

    fn end_checkpoint(&mut self, checkpoint: Checkpoint, out: &mut StoreOutput) {
        let state = &mut self.state;
        for (chunk, number) in checkpoint.leaves {
            let Some(owner) = state.chunks.get(chunk) else { continue };
            let handle = owner.leaves[number as usize].cached;
            if handle != NOT_CACHED {
                state.cache.get_mut(handle).in_checkpoint = false;
            }
        }
        self.generation = checkpoint.generation;
        state.space.checkpoint_durable();
        self.free_mark = state.space.free();
        out.notices.push(Notice::Checkpointed { generation: self.generation });
        out.done.extend(checkpoint.tokens.into_iter().map(|token| (token, Ok(crate::api::StoreReply::Done))));
    }
}

/// Joins pages with neighbouring slots into long writes.
fn coalesce(mut pages: Vec<PageWrite>, writes: &mut VecDeque<(u64, Buf)>) {
    pages.sort_unstable_by_key(|page| page.slot);
    let mut rest = &pages[..];
    while let Some(first) = rest.first() {
        let run = rest.iter().zip(first.slot..).take(WRITE_SLOTS_MAX).take_while(|(page, slot)| page.slot == *slot);
        let count = run.count();
        let mut buf = BufMut::zeroed(count * SLOT);
        for (page, out) in rest[..count].iter().zip(buf.chunks_exact_mut(SLOT)) {
            out.copy_from_slice(&page.bytes);
        }
        writes.push_back((first.slot, buf.freeze()));
        rest = &rest[count..];
    }
}
