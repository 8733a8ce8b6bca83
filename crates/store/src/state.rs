//! The state a group changes: chunk table, volumes, live map, leaf cache and free space, and the one function that
//! applies records to it. Running and recovery go through the same function, so they cannot disagree.

use crate::bitmap::LiveMap;
use crate::chunks::{ChunkInfo, ChunkTable, NOT_CACHED};
use crate::layout::group::{Record, Stamp, records};
use crate::layout::superblock::LABEL_BYTES;
use crate::layout::{LEAF_BLOCKS, PageKind, bound_checksum};
use crate::leaf::{Cache, Entry, LEAF_ENTRIES, Leaf, parse_leaf};
use crate::space::Space;
use crate::volumes::{TailEntry, Volumes};
use cairn_types::{ChunkId, ChunkVersion, VolumeId};

pub(crate) struct State {
    pub slot_count: u64,
    pub chunks: ChunkTable,
    pub volumes: Volumes,
    pub live: LiveMap,
    pub cache: Cache,
    pub space: Space,
    /// Leaves changed since the last checkpoint snapshot; may list leaves of chunks deleted since.
    pub dirty_leaves: Vec<(ChunkId, u32)>,
    pub dirty_leaf_count: u64,
    /// Changed leaves that have no slot yet.
    pub unplaced_leaves: u64,
    /// Leaves read back for deletions since the last snapshot: recovery would have to read them again.
    pub replay_leaves: u64,
    /// Blocks mapped in all chunks.
    pub mapped_blocks: u64,
    /// What the owner keeps here.
    pub label: [u8; LABEL_BYTES],
}

impl State {
    pub(crate) fn new(slot_count: u64, cache_leaves: usize) -> Self {
        Self {
            slot_count,
            chunks: ChunkTable::default(),
            volumes: Volumes::default(),
            live: LiveMap::new(slot_count),
            cache: Cache::new(cache_leaves),
            space: Space::new(slot_count),
            dirty_leaves: Vec::new(),
            dirty_leaf_count: 0,
            unplaced_leaves: 0,
            replay_leaves: 0,
            mapped_blocks: 0,
            label: [0; LABEL_BYTES],
        }
    }

    /// Checks a leaf read from disk and puts it into the cache. False when it was damaged: then every block of it is
    /// marked so, until written again.
    pub(crate) fn install_leaf(&mut self, chunk: ChunkId, number: u32, bytes: Option<&[u8]>) -> bool {
        let Some(owner) = self.chunks.get_mut(chunk) else { return true };
        let reference = &mut owner.leaves[number as usize];
        let good = bytes
            .filter(|bytes| bound_checksum(bytes, PageKind::Leaf, chunk.0, u64::from(number)) == reference.checksum)
            .map(parse_leaf)
            .filter(|leaf| leaf.iter().filter_map(|entry| entry.slot()).all(|slot| self.live.get(slot)));
        let intact = good.is_some();
        let leaf = good.unwrap_or([Entry::damaged(owner.info.version); LEAF_ENTRIES]);
        reference.cached = self.cache.insert(chunk, number, leaf);
        intact
    }

    /// Makes sure that a leaf never written to disk exists in memory. The caller pins it.
    pub(crate) fn ensure_new_leaf(&mut self, chunk: ChunkId, number: u32) {
        let reference = &mut self.chunks.get_mut(chunk).expect("caller checked").leaves[number as usize];
        if reference.cached == NOT_CACHED {
            assert_eq!(reference.slot, 0, "a leaf on disk is read, not made");
            reference.cached = self.cache.insert(chunk, number, [Entry::default(); LEAF_ENTRIES]);
        }
    }

    /// Lets the cache shrink back to its limit.
    pub(crate) fn trim_cache(&mut self) {
        while let Some((chunk, number)) = self.cache.evict() {
            self.chunks.get_mut(chunk).expect("cached leaves have a chunk").leaves[number as usize].cached = NOT_CACHED;
        }
    }

    /// The leaf for changing; marks it dirty. None when it is not in memory.
    fn leaf_mut(&mut self, chunk: ChunkId, number: u32) -> Option<&mut Leaf> {
        let reference = *self.chunks.get(chunk)?.leaves.get(number as usize)?;
        if reference.cached == NOT_CACHED {
            return None;
        }
        let cached = self.cache.get_mut(reference.cached);
        if !cached.dirty {
            cached.dirty = true;
            self.dirty_leaves.push((chunk, number));
            self.dirty_leaf_count += 1;
            self.unplaced_leaves += u64::from(reference.slot == 0);
            self.chunks.mark_dirty(chunk);
        }
        Some(&mut cached.leaf)
    }

    /// Applies the records of a group whose header is `header`; `data` gives its data slots in order.
    ///
    /// # Errors
    /// Says what contradicts the state. While running that is a bug or a damaged index, and the store stops.
    pub(crate) fn apply(&mut self, header: &[u8], data: &mut dyn Iterator<Item = u64>) -> Result<(), &'static str> {
        for record in records(header) {
            match record? {
                Record::Write { chunk, first, stamp, checksums } => {
                    let mut checksums_left = checksums.iter();
                    let mut replacement = || {
                        let checksum = checksums_left.next()?;
                        Some(Entry::mapped(data.next()?, stamp.version, checksum))
                    };
                    self.replace(chunk, first, checksums.len(), &mut replacement)?;
                    self.add_tail(chunk, first, checksums.len(), &stamp, false);
                }
                Record::Unmap { chunk, first, count, stamp } => {
                    self.replace(chunk, first, count, &mut || Some(Entry::unmapped(stamp.version)))?;
                    self.add_tail(chunk, first, count, &stamp, true);
                }
                Record::Create { chunk, volume, layer, index, block_count, version, tag } => {
                    let tag = tag.to_vec();
                    let info = ChunkInfo { volume, layer, index, version, block_count, mapped_blocks: 0, tag };
                    if !self.chunks.create(chunk, info) {
                        return Err("a chunk is created twice");
                    }
                }
                Record::Delete { chunk } => self.delete(chunk)?,
                Record::SetVersion { chunk, version } => self.set_version(chunk, version)?,
                Record::SetTag { chunk, tag } => {
                    let owner = self.chunks.get_mut(chunk).ok_or("a tag for a chunk that does not exist")?;
                    owner.info.tag = tag.to_vec();
                    self.chunks.mark_dirty(chunk);
                }
                Record::Fence { volume, epoch } => self.volumes.raise_fence(volume, epoch),
                Record::Settle { volume, epoch, sequence } => self.settle(volume, (epoch, sequence)),
                Record::Forget { volume } => self.volumes.forget(volume),
                Record::SetLabel { label } => self.label = label,
                Record::ForgetTail { chunk } => {
                    let owner = self.chunks.get_mut(chunk).ok_or("a tail of a chunk that does not exist")?;
                    owner.tail = crate::tail::TailMap::default();
                    owner.tail_entries = 0;
                    self.volumes.tail_drop_chunk(owner.info.volume, chunk);
                }
            }
        }
        Ok(())
    }

    /// Gives blocks `first..first + count` new entries and frees the slots of the old ones.
    fn replace(
        &mut self,
        chunk: ChunkId,
        first: u32,
        count: u32,
        replacement: &mut dyn FnMut() -> Option<Entry>,
    ) -> Result<(), &'static str> {
        let block_count = self.chunks.get(chunk).ok_or("a write to a chunk that does not exist")?.info.block_count;
        if first + count > block_count {
            return Err("a write beyond the end of its chunk");
        }
        let (mut at, end, mut mapped_change) = (first, first + count, 0i64);
        while at < end {
            let segment_end = end.min((at / LEAF_BLOCKS + 1) * LEAF_BLOCKS);
            self.leaf_mut(chunk, at / LEAF_BLOCKS).ok_or("a write to a leaf that is not loaded")?;
            let handle = self.chunks.get(chunk).expect("checked above").leaves[(at / LEAF_BLOCKS) as usize].cached;
            let leaf = &mut self.cache.get_mut(handle).leaf;
            for block in at..segment_end {
                let entry = &mut leaf[(block % LEAF_BLOCKS) as usize];
                let new = replacement().ok_or("fewer data slots than checksums")?;
                if let Some(slot) = new.slot() {
                    if !self.live.set(slot) {
                        return Err("a data slot is used twice");
                    }
                    mapped_change += i64::from(!entry.is_damaged());
                }
                if let Some(old) = entry.slot() {
                    if !self.live.clear(old) {
                        return Err("an overwritten slot was not in use");
                    }
                    self.space.release(old);
                    mapped_change -= 1;
                }
                *entry = new;
            }
            at = segment_end;
        }
        let info = &mut self.chunks.get_mut(chunk).expect("checked above").info;
        let before = info.mapped_blocks;
        info.mapped_blocks = (i64::from(before) + mapped_change).clamp(0, i64::from(block_count)) as u32;
        self.mapped_blocks = (self.mapped_blocks + u64::from(info.mapped_blocks)).saturating_sub(u64::from(before));
        Ok(())
    }

    fn add_tail(&mut self, chunk: ChunkId, first: u32, count: u32, stamp: &Stamp, unmap: bool) {
        if stamp.sequence.0 == 0 {
            return;
        }
        let owner = self.chunks.get_mut(chunk).expect("replace() checked it");
        owner.tail.cover(first, first + count, (stamp.epoch, stamp.sequence));
        let (epoch, sequence) = (stamp.epoch, stamp.sequence);
        let entry = TailEntry { chunk, first_block: first, block_count: count, epoch, sequence, unmap };
        if self.volumes.tail_add(owner.info.volume, &entry) {
            owner.tail_entries += 1;
        }
    }

    /// Drops tail entries up to `mark`.
    pub(crate) fn settle(&mut self, volume: VolumeId, mark: crate::tail::Mark) {
        for gone in self.volumes.settle(volume, mark) {
            if let Some(owner) = self.chunks.get_mut(gone.chunk) {
                owner.tail.uncover(gone.first_block, gone.first_block + gone.block_count, mark);
                owner.tail_entries -= 1;
            }
        }
    }

    /// Restores one tail entry of a checkpoint.
    pub(crate) fn restore_tail(&mut self, entry: &TailEntry) -> Result<(), &'static str> {
        let owner = self.chunks.get_mut(entry.chunk).ok_or("a tail entry of a chunk that does not exist")?;
        let end = entry.first_block.checked_add(entry.block_count).ok_or("a tail entry out of range")?;
        if end > owner.info.block_count {
            return Err("a tail entry out of range");
        }
        owner.tail.cover(entry.first_block, end, (entry.epoch, entry.sequence));
        if self.volumes.tail_add(owner.info.volume, entry) {
            owner.tail_entries += 1;
        }
        Ok(())
    }

    fn delete(&mut self, chunk: ChunkId) -> Result<(), &'static str> {
        let owner = self.chunks.remove(chunk).ok_or("a delete of a chunk that does not exist")?;
        self.mapped_blocks = self.mapped_blocks.saturating_sub(u64::from(owner.info.mapped_blocks));
        if owner.tail_entries > 0 {
            self.volumes.tail_drop_chunk(owner.info.volume, chunk);
        }
        for reference in &owner.leaves {
            if reference.cached == NOT_CACHED {
                if reference.slot != 0 {
                    return Err("a delete with a leaf that is not loaded");
                }
                continue;
            }
            let cached = self.cache.remove(reference.cached);
            if cached.dirty {
                self.dirty_leaf_count -= 1;
                self.unplaced_leaves -= u64::from(reference.slot == 0);
            }
            for slot in cached.leaf.iter().filter_map(|entry| entry.slot()) {
                if !self.live.clear(slot) {
                    return Err("a deleted slot was not in use");
                }
                self.space.release(slot);
            }
            if reference.slot != 0 {
                self.replay_leaves += 1;
                if !self.live.clear(reference.slot) {
                    return Err("a deleted leaf was not in use");
                }
                self.space.release(reference.slot);
            }
        }
        Ok(())
    }

    /// Sets the version of a chunk and of every block of its unsettled tail (rule 3: a version change counts the tail
    /// as written in the new version, so that a server that lost it gets it back by resync).
    fn set_version(&mut self, chunk: ChunkId, version: ChunkVersion) -> Result<(), &'static str> {
        let owner = self.chunks.get_mut(chunk).ok_or("a version for a chunk that does not exist")?;
        owner.info.version = version;
        let spans: Vec<(u32, u32)> = owner.tail.spans().map(|(first, end, _)| (first, end)).collect();
        self.chunks.mark_dirty(chunk);
        for (first, end) in spans {
            for block in first..end {
                let leaf = self.leaf_mut(chunk, block / LEAF_BLOCKS).ok_or("a new version without its leaves")?;
                let entry = &mut leaf[(block % LEAF_BLOCKS) as usize];
                *entry = entry.with_version(version);
            }
        }
        Ok(())
    }

    /// Slots that hold data or will after the next checkpoint.
    pub(crate) fn occupied(&self) -> u64 {
        self.live.ones() + self.unplaced_leaves + self.chunks.page_count()
    }
}
