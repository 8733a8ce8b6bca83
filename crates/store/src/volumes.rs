//! What the store knows of volumes: fences, settled marks and unsettled tails.
//!
//! Each volume owns a fixed cell of 40 bytes in the volume tree. Tails are short (about the writes of the last second
//! or two), so each checkpoint writes them out whole.

use crate::layout::SLOT;
use crate::layout::bytes::{Put, Take};
use crate::tail::Mark;
use cairn_types::{ChunkId, Epoch, Sequence, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

const CELL_BYTES: usize = 40;
const CELLS_PER_PAGE: usize = SLOT / CELL_BYTES;
const TAIL_BYTES: usize = 32;
const TAILS_PER_PAGE: usize = SLOT / TAIL_BYTES;

/// One unsettled write: these blocks of a chunk, at this epoch and sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TailEntry {
    /// The chunk.
    pub chunk: ChunkId,
    /// First block written.
    pub first_block: u32,
    /// Blocks written.
    pub block_count: u32,
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Sequence of the write.
    pub sequence: Sequence,
    /// True when the blocks were unmapped rather than written.
    pub unmap: bool,
}

pub(crate) type TailKey = (Epoch, Sequence, ChunkId, u32);

#[derive(Default)]
pub(crate) struct Volume {
    pub fence: Epoch,
    pub settled: Mark,
    cell: u32,
    /// Blocks written and whether they were unmapped.
    pub tail: BTreeMap<TailKey, (u32, bool)>,
}

#[derive(Default)]
pub(crate) struct Volumes {
    map: BTreeMap<VolumeId, Volume>,
    cells: Vec<Option<VolumeId>>,
    vacant: BTreeSet<u32>,
    dirty_pages: BTreeSet<u32>,
    tail_len: u64,
    tails_dirty: bool,
}

fn entry(key: &TailKey, value: &(u32, bool)) -> TailEntry {
    let (epoch, sequence, chunk, first_block) = *key;
    TailEntry { chunk, first_block, block_count: value.0, epoch, sequence, unmap: value.1 }
}

impl Volumes {
    pub(crate) fn get(&self, volume: VolumeId) -> Option<&Volume> {
        self.map.get(&volume)
    }

    pub(crate) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.map.keys().copied()
    }

    /// The lowest epoch that may write; zero when the volume was never fenced.
    pub(crate) fn fence(&self, volume: VolumeId) -> Epoch {
        self.map.get(&volume).map_or(Epoch(0), |v| v.fence)
    }

    pub(crate) fn tail_len(&self) -> u64 {
        self.tail_len
    }

    pub(crate) fn tail(&self, volume: VolumeId) -> impl Iterator<Item = TailEntry> + '_ {
        self.map.get(&volume).into_iter().flat_map(|v| v.tail.iter().map(|(key, value)| entry(key, value)))
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.cells.len().div_ceil(CELLS_PER_PAGE) as u64
    }

    pub(crate) fn tail_page_count(&self) -> u64 {
        self.tail_len.div_ceil(TAILS_PER_PAGE as u64)
    }

    pub(crate) fn dirty_cost(&self) -> u64 {
        self.dirty_pages.len() as u64 + self.tail_page_count()
    }

    fn volume_mut(&mut self, volume: VolumeId) -> &mut Volume {
        let (cells, vacant) = (&mut self.cells, &mut self.vacant);
        self.map.entry(volume).or_insert_with(|| {
            let cell = vacant.pop_first().unwrap_or_else(|| {
                cells.push(None);
                cells.len() as u32 - 1
            });
            cells[cell as usize] = Some(volume);
            Volume { cell, ..Volume::default() }
        })
    }

    fn touch(&mut self, volume: VolumeId) -> &mut Volume {
        let cell = self.volume_mut(volume).cell;
        self.dirty_pages.insert(cell / CELLS_PER_PAGE as u32);
        self.map.get_mut(&volume).expect("made above")
    }

    /// Raises the fence; a lower epoch changes nothing.
    pub(crate) fn raise_fence(&mut self, volume: VolumeId, epoch: Epoch) {
        let volume = self.touch(volume);
        volume.fence = volume.fence.max(epoch);
    }

    /// Raises the settled mark and returns the tail entries that leave; a lower mark changes nothing.
    pub(crate) fn settle(&mut self, volume: VolumeId, mark: Mark) -> Vec<TailEntry> {
        let volume = self.touch(volume);
        if mark <= volume.settled {
            return Vec::new();
        }
        volume.settled = mark;
        let mut gone = Vec::new();
        while let Some(first) = volume.tail.first_entry()
            && (first.key().0, first.key().1) <= mark
        {
            let (key, value) = first.remove_entry();
            gone.push(entry(&key, &value));
        }
        self.tail_len -= gone.len() as u64;
        self.tails_dirty |= !gone.is_empty();
        gone
    }

    /// Adds a tail entry; false when it only replaced the same one.
    pub(crate) fn tail_add(&mut self, volume: VolumeId, new: &TailEntry) -> bool {
        let fresh_volume = !self.map.contains_key(&volume);
        let cell = self.volume_mut(volume).cell;
        if fresh_volume {
            self.dirty_pages.insert(cell / CELLS_PER_PAGE as u32);
        }
        self.tails_dirty = true;
        let key = (new.epoch, new.sequence, new.chunk, new.first_block);
        let tail = &mut self.map.get_mut(&volume).expect("made above").tail;
        let fresh = match tail.get_mut(&key) {
            Some(value) => {
                *value = (value.0.max(new.block_count), new.unmap);
                false
            }
            None => {
                tail.insert(key, (new.block_count, new.unmap));
                true
            }
        };
        self.tail_len += u64::from(fresh);
        fresh
    }

    /// Drops the tail entries of a deleted chunk.
    pub(crate) fn tail_drop_chunk(&mut self, volume: VolumeId, chunk: ChunkId) {
        let Some(volume) = self.map.get_mut(&volume) else { return };
        let before = volume.tail.len();
        volume.tail.retain(|key, _| key.2 != chunk);
        self.tail_len -= (before - volume.tail.len()) as u64;
        self.tails_dirty = true;
    }

    /// Forgets a deleted volume.
    pub(crate) fn forget(&mut self, volume: VolumeId) {
        let Some(gone) = self.map.remove(&volume) else { return };
        self.tail_len -= gone.tail.len() as u64;
        self.tails_dirty |= !gone.tail.is_empty();
        self.cells[gone.cell as usize] = None;
        self.vacant.insert(gone.cell);
        self.dirty_pages.insert(gone.cell / CELLS_PER_PAGE as u32);
    }

    /// Pages of the volume tree changed since the last snapshot, in order.
    pub(crate) fn snapshot(&mut self) -> Vec<(u64, Vec<u8>)> {
        let dirty = std::mem::take(&mut self.dirty_pages);
        dirty.into_iter().map(|page| (u64::from(page), self.encode_page(page as usize))).collect()
    }

    fn encode_page(&self, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; SLOT];
        let mut put = Put::new(&mut bytes);
        for cell in self.cells.iter().skip(page * CELLS_PER_PAGE).take(CELLS_PER_PAGE) {
            let Some(id) = cell else {
                put.skip(CELL_BYTES);
                continue;
            };
            let volume = &self.map[id];
            for word in [1, id.0, volume.fence.0, volume.settled.0.0, volume.settled.1.0] {
                put.u64(word);
            }
        }
        bytes
    }

    /// All pages of the tail tree, when the tails changed since the last snapshot.
    pub(crate) fn tail_snapshot(&mut self) -> Option<Vec<(u64, Vec<u8>)>> {
        if !std::mem::take(&mut self.tails_dirty) {
            return None;
        }
        let mut pages: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut used = TAILS_PER_PAGE;
        for (key, value) in self.map.values().flat_map(|volume| volume.tail.iter()) {
            if used == TAILS_PER_PAGE {
                pages.push((pages.len() as u64, vec![0; SLOT]));
                used = 0;
            }
            let page = &mut pages.last_mut().expect("pushed above").1;
            let mut put = Put::new(&mut page[used * TAIL_BYTES..]);
            let (epoch, sequence, chunk, first) = *key;
            for word in [chunk.0, epoch.0, sequence.0] {
                put.u64(word);
            }
            put.u32(first);
            put.u32(value.0 | (u32::from(value.1) << 31));
            used += 1;
        }
        Some(pages)
    }

    /// Installs a page of the volume tree; pages come in order.
    pub(crate) fn load_page(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        let mut take = Take::new(bytes);
        for _ in 0..CELLS_PER_PAGE {
            let words: Option<Vec<u64>> = (0..5).map(|_| take.u64()).collect();
            let [used, id, fence, epoch, sequence] = words.unwrap_or_else(|| vec![0; 5])[..] else {
                return Err("volume cell cut short");
            };
            let cell = self.cells.len() as u32;
            if used == 0 {
                self.cells.push(None);
                self.vacant.insert(cell);
                continue;
            }
            let settled = (Epoch(epoch), Sequence(sequence));
            let volume = Volume { fence: Epoch(fence), settled, cell, tail: BTreeMap::new() };
            self.cells.push(Some(VolumeId(id)));
            if used != 1 || self.map.insert(VolumeId(id), volume).is_some() {
                return Err("volume cell out of range");
            }
        }
        Ok(())
    }
}

/// The entries of one page of the tail tree; an error when they make no sense.
pub(crate) fn parse_tail_page(bytes: &[u8]) -> Result<Vec<TailEntry>, &'static str> {
    let mut take = Take::new(bytes);
    let mut entries = Vec::new();
    for _ in 0..TAILS_PER_PAGE {
        let words = (take.u64(), take.u64(), take.u64(), take.u32(), take.u32());
        let (Some(chunk), Some(epoch), Some(sequence), Some(first_block), Some(count)) = words else {
            return Err("tail entry cut short");
        };
        let block_count = count & !(1 << 31);
        if block_count == 0 {
            break;
        }
        entries.push(TailEntry {
            chunk: ChunkId(chunk),
            first_block,
            block_count,
            epoch: Epoch(epoch),
            sequence: Sequence(sequence),
            unmap: count >> 31 == 1,
        });
    }
    Ok(entries)
}
