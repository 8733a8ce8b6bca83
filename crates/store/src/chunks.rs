//! The chunk table: every chunk in memory, packed into the pages of the chunk tree by checkpoints.
//!
//! A page starts with the count of its records. A record holds what the chunk is, its tag, and a pointer to each leaf
//! of its index up to the last one in use. Small chunks share a page; a chunk that outgrows its page moves to another.

use crate::layout::bytes::{Put, Take};
use crate::layout::{CHUNK_BLOCKS_MAX, LEAF_BLOCKS, SLOT, TAG_BYTES_MAX, VERSION_MAX};
use crate::tail::TailMap;
use cairn_stdx::FixedMap;
use cairn_types::{ChunkId, ChunkVersion, LayerId, VolumeId};
use std::collections::BTreeSet;

const RECORD_BYTES: usize = 52;
const POINTER_BYTES: usize = 13;
const PAGE_HEADER_BYTES: usize = 8;
const PAGE_ROOM: u32 = (SLOT - PAGE_HEADER_BYTES) as u32;
/// No leaf in memory.
pub(crate) const NOT_CACHED: u32 = u32::MAX;
const NO_HOME: u32 = u32::MAX;
const _: () = assert!(
    RECORD_BYTES + TAG_BYTES_MAX + POINTER_BYTES * (CHUNK_BLOCKS_MAX / LEAF_BLOCKS) as usize <= PAGE_ROOM as usize,
    "the largest record fits one page"
);

/// What a chunk is. Everything here survives restarts and is enough to rebuild the cluster's metadata (I21).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkInfo {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// The layer it belongs to.
    pub layer: LayerId,
    /// Its place in the layer, in chunks.
    pub index: u64,
    /// Version of the chunk as last set.
    pub version: ChunkVersion,
    /// Blocks it spans.
    pub block_count: u32,
    /// Blocks that hold data. After a leaf of the index was lost this is an estimate.
    pub mapped_blocks: u32,
    /// Opaque fragment of the map, kept for rebuilding it.
    pub tag: Vec<u8>,
}

/// Where a leaf is: on disk, in memory, both, or nowhere yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafRef {
    /// Zero: never written to disk.
    pub slot: u64,
    pub checksum: u64,
    /// Handle in the cache, or [`NOT_CACHED`].
    pub cached: u32,
}

pub(crate) struct Chunk {
    pub info: ChunkInfo,
    pub leaves: Vec<LeafRef>,
    pub tail: TailMap,
    /// Entries of this chunk in the tail of its volume.
    pub tail_entries: u32,
    /// Changes queued or under way that touch this chunk.
    pub inflight: u32,
    /// A change that must be alone (delete, new version) is queued or under way.
    pub exclusive: bool,
    dirty: bool,
    home: u32,
    home_bytes: u32,
}

impl Chunk {
    fn record_bytes(&self) -> u32 {
        (RECORD_BYTES + self.info.tag.len() + POINTER_BYTES * self.pointer_count()) as u32
    }

    fn pointer_count(&self) -> usize {
        self.leaves.iter().rposition(|leaf| leaf.slot != 0).map_or(0, |last| last + 1)
    }
}

#[derive(Default)]
struct HomePage {
    members: Vec<ChunkId>,
    bytes: u32,
}

#[derive(Default)]
pub(crate) struct ChunkTable {
    map: FixedMap<ChunkId, Chunk>,
    by_volume: BTreeSet<(VolumeId, ChunkId)>,
    pages: Vec<HomePage>,
    /// Free bytes of each page, for best fit.
    room: BTreeSet<(u32, u32)>,
    dirty_chunks: Vec<ChunkId>,
    dirty_pages: BTreeSet<u32>,
}

impl ChunkTable {
    pub(crate) fn get(&self, chunk: ChunkId) -> Option<&Chunk> {
        self.map.get(&chunk)
    }

    pub(crate) fn get_mut(&mut self, chunk: ChunkId) -> Option<&mut Chunk> {
        self.map.get_mut(&chunk)
    }

    pub(crate) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Most pages a snapshot would write now.
    pub(crate) fn dirty_cost(&self) -> u64 {
        2 * self.dirty_chunks.len() as u64 + self.dirty_pages.len() as u64
    }

    /// Chunks in the order of their volumes.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (ChunkId, &Chunk)> + '_ {
        self.by_volume.iter().map(|(_, chunk)| (*chunk, &self.map[chunk]))
    }

    pub(crate) fn of_volume(&self, volume: VolumeId) -> impl Iterator<Item = ChunkId> + '_ {
        self.by_volume.range((volume, ChunkId(0))..=(volume, ChunkId(u64::MAX))).map(|(_, chunk)| *chunk)
    }

    /// Adds a chunk; false when it exists.
    #[must_use]
    pub(crate) fn create(&mut self, id: ChunkId, info: ChunkInfo) -> bool {
        if self.map.contains_key(&id) {
            return false;
        }
        self.by_volume.insert((info.volume, id));
        let leaf = LeafRef { slot: 0, checksum: 0, cached: NOT_CACHED };
        let chunk = Chunk {
            leaves: vec![leaf; info.block_count.div_ceil(LEAF_BLOCKS) as usize],
            info,
            tail: TailMap::default(),
            tail_entries: 0,
            inflight: 0,
            exclusive: false,
            dirty: false,
            home: NO_HOME,
            home_bytes: 0,
        };
        self.map.insert(id, chunk);
        self.mark_dirty(id);
        true
    }

    pub(crate) fn remove(&mut self, id: ChunkId) -> Option<Chunk> {
        let chunk = self.map.remove(&id)?;
        self.by_volume.remove(&(chunk.info.volume, id));
        self.leave_home(id, chunk.home, chunk.home_bytes);
        Some(chunk)
    }

    pub(crate) fn mark_dirty(&mut self, id: ChunkId) {
        if let Some(chunk) = self.map.get_mut(&id)
            && !chunk.dirty
        {
            chunk.dirty = true;
            self.dirty_chunks.push(id);
        }
    }

    fn leave_home(&mut self, id: ChunkId, home: u32, bytes: u32) {
        if home == NO_HOME {
            return;
        }
        let page = &mut self.pages[home as usize];
        self.room.remove(&(PAGE_ROOM - page.bytes, home));
        page.members.retain(|member| *member != id);
        page.bytes -= bytes;
        self.room.insert((PAGE_ROOM - page.bytes, home));
        self.dirty_pages.insert(home);
    }

    fn enter_home(&mut self, id: ChunkId, bytes: u32) -> u32 {
        let home = match self.room.range((bytes, 0)..).next() {
            Some((_, home)) => *home,
            None => {
                self.pages.push(HomePage::default());
                self.pages.len() as u32 - 1
            }
        };
        self.join_home(id, home, bytes);
        home
    }

    fn join_home(&mut self, id: ChunkId, home: u32, bytes: u32) {
        let page = &mut self.pages[home as usize];
        self.room.remove(&(PAGE_ROOM - page.bytes, home));
        page.members.push(id);
        page.bytes += bytes;
        self.room.insert((PAGE_ROOM - page.bytes, home));
        self.dirty_pages.insert(home);
    }

    /// Places every changed chunk and returns the pages to write, in order. Pages at the end that became empty are
    /// dropped: use [`page_count`](Self::page_count) afterwards.
    pub(crate) fn snapshot(&mut self) -> Vec<(u64, Vec<u8>)> {
        for id in std::mem::take(&mut self.dirty_chunks) {
            let Some(chunk) = self.map.get_mut(&id) else { continue };
            if !std::mem::take(&mut chunk.dirty) {
                continue;
            }
            let (bytes, old_bytes, home) = (chunk.record_bytes(), chunk.home_bytes, chunk.home);
            let home = if home == NO_HOME {
                self.enter_home(id, bytes)
            } else if self.pages[home as usize].bytes - old_bytes + bytes > PAGE_ROOM {
                self.leave_home(id, home, old_bytes);
                self.enter_home(id, bytes)
            } else {
                let page = &mut self.pages[home as usize];
                self.room.remove(&(PAGE_ROOM - page.bytes, home));
                page.bytes = page.bytes - old_bytes + bytes;
                self.room.insert((PAGE_ROOM - page.bytes, home));
                self.dirty_pages.insert(home);
                home
            };
            let chunk = self.map.get_mut(&id).expect("looked up above");
            (chunk.home, chunk.home_bytes) = (home, bytes);
        }
        while self.pages.last().is_some_and(|page| page.members.is_empty()) {
            self.pages.pop();
            self.room.remove(&(PAGE_ROOM, self.pages.len() as u32));
        }
        let count = self.pages.len() as u32;
        let dirty = std::mem::take(&mut self.dirty_pages);
        dirty.into_iter().filter(|page| *page < count).map(|page| (u64::from(page), self.encode_page(page))).collect()
    }

    fn encode_page(&self, page: u32) -> Vec<u8> {
        let members = &self.pages[page as usize].members;
        let mut bytes = vec![0; SLOT];
        let mut put = Put::new(&mut bytes);
        put.u16(members.len() as u16);
        put.skip(PAGE_HEADER_BYTES - 2);
        for id in members {
            let chunk = &self.map[id];
            let info = &chunk.info;
            for word in [id.0, info.volume.0, info.layer.0, info.index] {
                put.u64(word);
            }
            put.u32(info.version.0 as u32);
            put.u32(info.block_count);
            put.u32(info.mapped_blocks);
            put.u16(info.tag.len() as u16);
            put.u16(chunk.pointer_count() as u16);
            put.u32(0);
            put.bytes(&info.tag);
            for leaf in &chunk.leaves[..chunk.pointer_count()] {
                put.u40(leaf.slot);
                put.u64(leaf.checksum);
            }
        }
        bytes
    }

    /// Installs page `number` read from disk. Pages come in order, absent ones as empty bytes.
    pub(crate) fn load_page(&mut self, number: u64, bytes: &[u8], slot_count: u64) -> Result<(), &'static str> {
        assert_eq!(number, self.pages.len() as u64, "pages are loaded in order");
        self.pages.push(HomePage::default());
        self.room.insert((PAGE_ROOM, number as u32));
        let mut take = Take::new(bytes);
        let count = if bytes.is_empty() { 0 } else { take.u16().ok_or("empty page")? };
        take.bytes(if bytes.is_empty() { 0 } else { PAGE_HEADER_BYTES - 2 }).ok_or("page header")?;
        for _ in 0..count {
            self.load_record(&mut take, number as u32, slot_count).ok_or("chunk record out of range")??;
        }
        self.dirty_pages.clear();
        self.dirty_chunks.clear();
        Ok(())
    }

    fn load_record(&mut self, take: &mut Take<'_>, home: u32, slot_count: u64) -> Option<Result<(), &'static str>> {
        let id = ChunkId(take.u64()?);
        let (volume, layer, index) = (VolumeId(take.u64()?), LayerId(take.u64()?), take.u64()?);
        let version = ChunkVersion(u64::from(take.u32()?));
        let (block_count, mapped_blocks) = (take.u32()?, take.u32()?);
        let (tag_len, pointers) = (usize::from(take.u16()?), usize::from(take.u16()?));
        take.u32()?;
        if version.0 > VERSION_MAX || block_count == 0 || block_count > CHUNK_BLOCKS_MAX || tag_len > TAG_BYTES_MAX {
            return None;
        }
        let tag = take.bytes(tag_len)?.to_vec();
        let info = ChunkInfo { volume, layer, index, version, block_count, mapped_blocks, tag };
        if !self.create(id, info) {
            return Some(Err("chunk listed twice"));
        }
        let chunk = self.map.get_mut(&id).expect("created above");
        for leaf in 0..pointers {
            let (slot, checksum) = (take.u40()?, take.u64()?);
            let leaf = chunk.leaves.get_mut(leaf)?;
            if slot >= slot_count {
                return None;
            }
            (leaf.slot, leaf.checksum) = (slot, checksum);
        }
        chunk.dirty = false;
        chunk.home = home;
        chunk.home_bytes = chunk.record_bytes();
        let bytes = chunk.home_bytes;
        if self.pages[home as usize].bytes + bytes > PAGE_ROOM {
            return None;
        }
        self.join_home(id, home, bytes);
        Some(Ok(()))
    }
}
