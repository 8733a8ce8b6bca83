//! Opening a store: the newest checkpoint, then the chain of groups after it.
//!
//! The chain ends at the first header that does not continue it. Groups up to the newest flush mark found in any header
//! are known to be complete; the data of later ones is verified, and the first incomplete group and all after it are
//! dropped. When the chain ends *before* a flush mark, a durable group is damaged, and opening stops: dropping it would
//! lose acknowledged writes silently. To find such marks the rest of the current run and the whole next run, where
//! further headers must be, are searched.
//!
//! The newest superblock and the groups after the flush mark are written again as they were read. They may have been
//! covered by a flush that failed, and then no later flush makes them durable although they can be read: only writing
//! them again does.
//!
//! Then the touched leaves are read, the groups replayed through `State::apply`, and an empty group of a new session is
//! written and flushed. Only then is the store open.

use crate::api::{Notice, OpenError, OpenReport, StoreOptions, StoreOutput};
use crate::chunks::NOT_CACHED;
use crate::engine::{Engine, EngineSeed};
use crate::layout::group::{GroupHeader, Record, records};
use crate::layout::superblock::{ChainPosition, Superblock, SuperblockError};
use crate::layout::{LEAF_BLOCKS, SLOT, SLOT_U64, SLOTS_MIN, SUPERBLOCK_SLOTS};
use crate::reader::Reader;
use crate::rewriter::Rewriter;
use crate::state::State;
use crate::tree::{Tree, TreeLoad};
use crate::volumes::parse_tail_page;
use cairn_env::{Buf, DiskDone};
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_types::ChunkId;
use std::collections::{BTreeSet, VecDeque};

/// Slots read ahead while walking the chain.
const WALK_SLOTS: u64 = 16;
/// Data slots verified at once.
const VERIFY_SLOTS_MAX: usize = 4096;

enum Phase {
    Superblocks,
    Tree(TreeLoad),
    Walk,
    Scan,
    /// Verifying the data of the groups from this index on, up to the second one.
    Verify(usize, usize),
    /// Writing verified groups again; the next to verify begin at this index.
    Rewrite(usize),
    Leaves,
}

/// A group of the chain.
pub(crate) struct WalkedGroup {
    pub header: GroupHeader,
    pub checksum: u64,
    pub slot: Buf,
}

pub(crate) struct Recovery {
    options: StoreOptions,
    device_size: u64,
    phase: Phase,
    reader: Reader,
    rewriter: Rewriter,
    next_io: u64,
    root: Option<Superblock>,
    state: State,
    trees: Vec<Tree>,
    groups: Vec<WalkedGroup>,
    position: ChainPosition,
    flushed_through: u64,
    torn_tail: bool,
    leaves: Vec<(ChunkId, u32)>,
}

/// What a completion led to.
pub(crate) enum Progress {
    Going,
    Open(Box<Engine>),
}

fn damaged(structure: &'static str, slot: u64, detail: impl Into<String>) -> OpenError {
    OpenError::Damaged { structure, offset: slot * SLOT_U64, detail: detail.into() }
}

pub(crate) const TREE_NAMES: [&str; 4] = ["bitmap tree", "chunk tree", "volume tree", "tail tree"];

impl Recovery {
    pub(crate) fn new(options: StoreOptions, device_size: u64, out: &mut StoreOutput) -> Result<Self, OpenError> {
        let device_slots = device_size / SLOT_U64;
        if device_slots < SLOTS_MIN {
            return Err(OpenError::NotAStore { reason: SuperblockError::Magic });
        }
        let mut recovery = Self {
            options,
            device_size,
            phase: Phase::Superblocks,
            reader: Reader::default(),
            rewriter: Rewriter::default(),
            next_io: 1,
            root: None,
            state: State::new(SLOTS_MIN, 0),
            trees: Vec::new(),
            groups: Vec::new(),
            position: ChainPosition::default(),
            flushed_through: 0,
            torn_tail: false,
            leaves: Vec::new(),
        };
        recovery.read(SUPERBLOCK_SLOTS.iter().flatten().copied().collect(), out);
        Ok(recovery)
    }

    fn read(&mut self, slots: Vec<u64>, out: &mut StoreOutput) {
        self.reader = Reader::new(slots);
        self.reader.issue(&mut self.next_io, &mut out.disk);
    }

    pub(crate) fn disk_done(&mut self, done: DiskDone, out: &mut StoreOutput) -> Result<Progress, OpenError> {
        self.rewriter.done(&done);
        self.rewriter.issue(&mut self.next_io, &mut out.disk);
        self.reader.done(done.io, done.result);
        self.reader.issue(&mut self.next_io, &mut out.disk);
        while self.reader.is_done() && self.rewriter.is_done() {
            if let Some(error) = self.rewriter.error.take() {
                return Err(OpenError::Io(error));
            }
            let reader = std::mem::take(&mut self.reader);
            match std::mem::replace(&mut self.phase, Phase::Superblocks) {
                Phase::Superblocks => self.superblocks_read(reader)?,
                Phase::Tree(load) => self.tree_read(load, reader)?,
                Phase::Walk => self.walk_read(reader)?,
                Phase::Scan => self.scan_read(reader)?,
                Phase::Verify(from, to) => self.verify_read(from, to, reader)?,
                Phase::Rewrite(next) => self.next_verify(next),
                Phase::Leaves => {
                    self.leaves_read(reader, out)?;
                    return Ok(Progress::Open(Box::new(self.replay(out)?)));
                }
            }
            let slots = self.slots_for_phase();
            self.read(slots, out);
            self.rewriter.issue(&mut self.next_io, &mut out.disk);
        }
        Ok(Progress::Going)
    }

    fn superblocks_read(&mut self, reader: Reader) -> Result<(), OpenError> {
        let error = reader.error.clone();
        let copies: Vec<(u64, Option<Buf>)> = reader.finish().collect();
        let pages: Vec<Option<Buf>> = copies.iter().map(|(_, page)| page.clone()).collect();
        let root = choose_superblock(&pages, error)?;
        if let Some(expected) = self.options.cluster
            && expected != root.cluster
        {
            return Err(OpenError::WrongCluster { found: root.cluster, expected });
        }
        if let Some(expected) = self.options.store_uuid
            && expected != root.store_uuid
        {
            return Err(OpenError::WrongStore { found: root.store_uuid, expected });
        }
        let store_bytes = root.slot_count * SLOT_U64;
        if store_bytes > self.device_size {
            return Err(OpenError::Truncated { device_bytes: self.device_size, store_bytes });
        }
        let is_newest = |page: &Buf| Superblock::decode(page).is_ok_and(|found| found.generation == root.generation);
        let newest = copies.into_iter().filter_map(|(slot, page)| Some((slot, page.filter(is_newest)?))).collect();
        self.rewrite(newest);
        self.state = State::new(root.slot_count, (self.options.cache_bytes / SLOT_U64) as usize);
        self.state.label = root.label;
        if root.trees[0].pages > self.state.live.page_count() {
            return Err(damaged("superblock", 0, "the bitmap tree has too many pages"));
        }
        self.position = root.chain;
        self.flushed_through = root.chain.group;
        self.phase = Phase::Tree(TreeLoad::new(0, root.trees[0], root.slot_count));
        self.root = Some(root);
        Ok(())
    }

    fn root(&self) -> &Superblock {
        self.root.as_ref().expect("the superblock is read first")
    }

    fn tree_read(&mut self, mut load: TreeLoad, reader: Reader) -> Result<(), OpenError> {
        let number = self.trees.len();
        let name = TREE_NAMES[number];
        if let Some(error) = reader.error {
            return Err(OpenError::Io(error));
        }
        let mut read = reader.finish();
        let mut pages: Vec<Option<Buf>> = Vec::with_capacity(load.wanted().len());
        for (index, pointer) in load.wanted().iter().enumerate() {
            if pointer.slot == 0 {
                pages.push(None);
                continue;
            }
            let (slot, page) = read.next().expect("every present page was read");
            let page = page.filter(|page| load.check(index, page));
            let page = page.ok_or_else(|| damaged(name, slot, "checksum mismatch"))?;
            if !self.state.space.busy.set(slot) {
                return Err(damaged(name, slot, "the slot is used twice"));
            }
            pages.push(Some(page));
        }
        drop(read);
        if !load.at_pages() {
            if !load.descend(&mut |index| pages[index].take()) {
                return Err(damaged(name, 0, "a pointer leads outside the disk"));
            }
            self.phase = Phase::Tree(load);
            return Ok(());
        }
        for (page_number, page) in pages.iter().enumerate() {
            let slot = load.wanted()[page_number].slot;
            let bytes = page.as_deref().unwrap_or(&[]);
            let outcome = load_tree_page(&mut self.state, number, page_number as u64, bytes);
            outcome.map_err(|detail| damaged(name, slot, detail))?;
        }
        self.trees.push(load.finish());
        if number == 1 {
            self.check_leaf_pointers()?;
        }
        if self.trees.len() < 4 {
            let next = self.trees.len();
            let root = self.root();
            self.phase = Phase::Tree(TreeLoad::new(next as u64, root.trees[next], root.slot_count));
        } else {
            self.claim_live()?;
            self.phase = Phase::Walk;
        }
        Ok(())
    }

    fn check_leaf_pointers(&mut self) -> Result<(), OpenError> {
        let mut mapped = 0;
        for (id, chunk) in self.state.chunks.iter() {
            mapped += u64::from(chunk.info.mapped_blocks);
            if let Some(leaf) = chunk.leaves.iter().find(|leaf| leaf.slot != 0 && !self.state.live.get(leaf.slot)) {
                return Err(damaged("chunk tree", leaf.slot, format!("{id} points to a free slot")));
            }
        }
        self.state.mapped_blocks = mapped;
        Ok(())
    }

    /// Marks every live slot as busy.
    fn claim_live(&mut self) -> Result<(), OpenError> {
        for (base, word) in self.state.live.words() {
            let mut left = word;
            while left != 0 {
                let slot = base + u64::from(left.trailing_zeros());
                left &= left - 1;
                if !self.state.space.busy.set(slot) {
                    return Err(damaged("bitmap tree", slot, "the slot is live and holds metadata"));
                }
            }
        }
        Ok(())
    }

    /// What the phase just entered wants to read.
    fn slots_for_phase(&mut self) -> Vec<u64> {
        match &self.phase {
            Phase::Superblocks => unreachable!("superblocks are read once"),
            Phase::Rewrite(_) => Vec::new(),
            Phase::Tree(load) => load.wanted().iter().map(|p| p.slot).filter(|slot| *slot != 0).collect(),
            Phase::Walk => {
                let run = self.position.current;
                (run.start..run.end.min(run.start + WALK_SLOTS)).collect()
            }
            Phase::Scan => {
                let position = &self.position;
                (position.current.start + 1..position.current.end)
                    .chain(position.after.start..position.after.end)
                    .collect()
            }
            Phase::Verify(from, to) => {
                self.groups[*from..*to].iter().flat_map(|group| group.header.data_slots()).collect()
            }
            Phase::Leaves => {
                self.leaves = self.touched_leaves();
                let slot = |(chunk, number): &(ChunkId, u32)| {
                    self.state.chunks.get(*chunk).expect("touched chunks exist").leaves[*number as usize].slot
                };
                self.leaves.iter().map(slot).collect()
            }
        }
    }

    fn walk_read(&mut self, reader: Reader) -> Result<(), OpenError> {
        if let Some(error) = reader.error {
            return Err(OpenError::Io(error));
        }
        let window: Vec<(u64, Buf)> = reader.finish().filter_map(|(slot, page)| Some((slot, page?))).collect();
        let (first, end) = (window[0].0, window[0].0 + window.len() as u64);
        while (first..end).contains(&self.position.current.start) {
            let (slot, page) = &window[(self.position.current.start - first) as usize];
            let Some(group) = self.continues(*slot, page)? else {
                self.phase = Phase::Scan;
                return Ok(());
            };
            if group.header.generation > self.root().generation {
                let (found, needed) = (self.root().generation, group.header.generation);
                return Err(OpenError::SuperblockLost { found, needed });
            }
            self.flushed_through = self.flushed_through.max(group.header.flushed_through);
            self.position = group.header.position(group.checksum);
            self.groups.push(group);
            if self.groups.len() as u64 > self.state.slot_count {
                return Err(damaged("log", *slot, "the chain has more groups than the disk has slots"));
            }
        }
        self.phase = Phase::Walk;
        Ok(())
    }

    /// The group in `page` when it continues the chain.
    fn continues(&self, slot: u64, page: &Buf) -> Result<Option<WalkedGroup>, OpenError> {
        let Some(decoded) = GroupHeader::decode(page, &self.root().store_uuid, self.state.slot_count) else {
            return Ok(None);
        };
        let (header, checksum) = decoded.map_err(|field| damaged("group header", slot, field))?;
        let linked = header.previous == self.position.header_checksum && header.session >= self.position.session;
        let fits = header.group == self.position.group + 1 && header.runs[0].start == slot;
        let continues = fits && (linked || planted!("store_session_reused"));
        Ok(continues.then(|| WalkedGroup { header, checksum, slot: page.clone() }))
    }

    /// Looks for flush marks beyond the end of the chain.
    fn scan_read(&mut self, reader: Reader) -> Result<(), OpenError> {
        let missing = self.position.group + 1;
        for page in reader.finish().filter_map(|(_, page)| page) {
            if let Some(Ok((header, _))) = GroupHeader::decode(&page, &self.root().store_uuid, self.state.slot_count)
                && header.group > self.position.group
                && header.session >= self.position.session
            {
                self.torn_tail = true;
                self.flushed_through = self.flushed_through.max(header.flushed_through);
            }
        }
        if self.flushed_through >= missing {
            let offset = self.position.current.start * SLOT_U64;
            return Err(OpenError::LogDamaged { group: missing, offset });
        }
        self.next_verify(0);
        Ok(())
    }

    /// Goes on verifying with the first group at or after `from` that no flush mark covers.
    fn next_verify(&mut self, from: usize) {
        let unflushed = self.groups.partition_point(|group| group.header.group <= self.flushed_through);
        let from = from.max(unflushed);
        if from >= self.groups.len() || planted!("store_trust_tail") {
            self.phase = Phase::Leaves;
            return;
        }
        let (mut to, mut slots) = (from, 0);
        while to < self.groups.len() && (to == from || slots < VERIFY_SLOTS_MAX) {
            slots += self.groups[to].header.data_slots().count();
            to += 1;
        }
        self.phase = Phase::Verify(from, to);
    }

    fn verify_read(&mut self, from: usize, to: usize, reader: Reader) -> Result<(), OpenError> {
        let mut pages = reader.finish();
        let mut again: VecDeque<(u64, Buf)> = VecDeque::new();
        for index in from..to {
            let group = &self.groups[index];
            let data: Vec<Option<Buf>> = group.header.data_slots().map(|_| pages.next().and_then(|p| p.1)).collect();
            if !data_matches(&group.slot, &data) {
                self.torn_tail = true;
                self.groups.truncate(index);
                self.position = match self.groups.last() {
                    Some(last) => last.header.position(last.checksum),
                    None => self.root().chain,
                };
                self.rewrite(again);
                self.phase = Phase::Rewrite(index);
                return Ok(());
            }
            let slots = std::iter::once(group.header.runs[0].start).chain(group.header.data_slots());
            again.extend(slots.zip(std::iter::once(group.slot.clone()).chain(data.into_iter().flatten())));
        }
        self.rewrite(again);
        self.phase = Phase::Rewrite(to);
        Ok(())
    }

    /// Writes slots again as they were read.
    fn rewrite(&mut self, slots: VecDeque<(u64, Buf)>) {
        let wanted = !planted!("store_recovered_not_rewritten");
        self.rewriter = Rewriter::new(if wanted { slots } else { VecDeque::new() });
    }

    /// Leaves on disk that replaying the chain will change or free.
    fn touched_leaves(&self) -> Vec<(ChunkId, u32)> {
        let mut touched = BTreeSet::new();
        let chunks = &self.state.chunks;
        let mut touch = |chunk: ChunkId, leaves: std::ops::Range<u32>| {
            let Some(owner) = chunks.get(chunk) else { return };
            for number in leaves.start..leaves.end.min(owner.leaves.len() as u32) {
                if owner.leaves[number as usize].slot != 0 {
                    touched.insert((chunk, number));
                }
            }
        };
        let range = |first: u32, count: u32| first / LEAF_BLOCKS..(first + count - 1) / LEAF_BLOCKS + 1;
        for record in self.groups.iter().flat_map(|group| records(&group.slot)).flatten() {
            match record {
                Record::Write { chunk, first, checksums, .. } => touch(chunk, range(first, checksums.len())),
                Record::Unmap { chunk, first, count, .. } => touch(chunk, range(first, count)),
                Record::Delete { chunk } => touch(chunk, 0..u32::MAX),
                Record::SetVersion { chunk, .. } => {
                    let Some(owner) = chunks.get(chunk) else { continue };
                    owner.tail.spans().for_each(|(first, end, _)| touch(chunk, range(first, end - first)));
                }
                _ => {}
            }
        }
        touched.into_iter().collect()
    }

    fn leaves_read(&mut self, reader: Reader, out: &mut StoreOutput) -> Result<(), OpenError> {
        if let Some(error) = reader.error {
            // A page that cannot be read now is not lost: going on would make it so with the next checkpoint.
            return Err(OpenError::Io(error));
        }
        let leaves = std::mem::take(&mut self.leaves);
        for ((chunk, number), (_, page)) in leaves.into_iter().zip(reader.finish()) {
            if !self.state.install_leaf(chunk, number, page.as_deref()) {
                let first = number * LEAF_BLOCKS;
                let count = self.state.chunks.get(chunk).expect("touched chunks exist").info.block_count;
                out.notices.push(Notice::Corrupt { chunk, blocks: (first..count.min(first + LEAF_BLOCKS)).collect() });
            }
        }
        Ok(())
    }

    fn replay(&mut self, out: &mut StoreOutput) -> Result<Engine, OpenError> {
        let groups = std::mem::take(&mut self.groups);
        for group in &groups {
            let slots = group.header.runs.iter().flat_map(|run| run.start..run.end);
            for slot in slots {
                if !self.state.space.busy.set(slot) {
                    return Err(damaged("log", slot, format!("group {} uses a slot in use", group.header.group)));
                }
            }
        }
        if !self.state.space.adopt(self.position.current, self.position.after) {
            return Err(damaged("log", self.position.current.start, "the next group would overwrite a slot in use"));
        }
        let mut chain_blocks = 0;
        for group in &groups {
            let header_slot = group.header.runs[0].start;
            self.make_new_leaves(&group.slot);
            let mut data = group.header.data_slots().inspect(|_| chain_blocks += 1);
            let outcome = self.state.apply(&group.slot, &mut data);
            outcome.map_err(|detail| damaged("group", header_slot, detail))?;
            if data.next().is_some() {
                return Err(damaged("group", header_slot, "a data slot without a checksum"));
            }
            self.state.space.release(header_slot);
        }
        let root = self.root.take().expect("the superblock is read first");
        let report = OpenReport {
            cluster: root.cluster,
            store_uuid: root.store_uuid,
            generation: root.generation,
            groups_replayed: groups.len() as u64,
            lsn: self.position.group,
            recovered_lsn: self.position.group,
            chunks: self.state.chunks.len(),
            torn_tail: self.torn_tail,
        };
        let trees = std::mem::take(&mut self.trees);
        let seed = EngineSeed {
            options: self.options.clone(),
            cluster: root.cluster,
            store_uuid: root.store_uuid,
            state: std::mem::replace(&mut self.state, State::new(SLOTS_MIN, 0)),
            trees: trees.try_into().unwrap_or_else(|_| unreachable!("four trees were loaded")),
            chain: self.position,
            generation: root.generation,
            chain_groups: groups.len() as u64,
            chain_blocks,
            next_io: self.next_io,
        };
        let mut engine = Engine::new(seed, report);
        engine.start_session(out);
        Ok(engine)
    }

    /// Leaves never written to disk come into being with the first record that touches them.
    fn make_new_leaves(&mut self, header: &[u8]) {
        for record in records(header).flatten() {
            let (chunk, first, count) = match record {
                Record::Write { chunk, first, checksums, .. } => (chunk, first, checksums.len()),
                Record::Unmap { chunk, first, count, .. } => (chunk, first, count),
                // A write to a chunk comes in a later group than its creation.
                _ => continue,
            };
            let Some(owner) = self.state.chunks.get(chunk) else { continue };
            if first + count > owner.info.block_count {
                continue;
            }
            for number in first / LEAF_BLOCKS..(first + count - 1) / LEAF_BLOCKS + 1 {
                let leaf = self.state.chunks.get(chunk).expect("looked up above").leaves[number as usize];
                if leaf.slot == 0 && leaf.cached == NOT_CACHED {
                    self.state.ensure_new_leaf(chunk, number);
                }
            }
        }
    }
}

/// Installs one page of a metadata tree; an absent page has no bytes.
pub(crate) fn load_tree_page(state: &mut State, tree: usize, number: u64, bytes: &[u8]) -> Result<(), &'static str> {
    match tree {
        0 if bytes.is_empty() || state.live.load(number, bytes) => Ok(()),
        0 => Err("a bit beyond the end of the disk"),
        1 => state.chunks.load_page(number, bytes, state.slot_count),
        2 => state.volumes.load_page(if bytes.is_empty() { &[0; SLOT] } else { bytes }),
        _ if bytes.is_empty() => Ok(()),
        _ => parse_tail_page(bytes)?.iter().try_for_each(|entry| state.restore_tail(entry)),
    }
}

/// The newest valid copy; an error when the newest state cannot be known.
pub(crate) fn choose_superblock(
    copies: &[Option<Buf>],
    error: Option<cairn_env::DiskError>,
) -> Result<Superblock, OpenError> {
    let decoded: Vec<Result<Superblock, SuperblockError>> = copies
        .iter()
        .map(|copy| copy.as_ref().map_or(Err(SuperblockError::Checksum), |bytes| Superblock::decode(bytes)))
        .collect();
    let newest = decoded.iter().flatten().max_by_key(|superblock| superblock.generation);
    let Some(newest) = newest else {
        if let Some(error) = error {
            return Err(OpenError::Io(error));
        }
        let reasons = decoded.iter().filter_map(|copy| copy.as_ref().err());
        let telling = reasons.clone().find(|reason| **reason != SuperblockError::Magic);
        let reason = telling.or_else(|| reasons.clone().next()).expect("every copy is an error").clone();
        return Err(OpenError::NotAStore { reason });
    };
    // Copies are numbered pair by pair. Writing a checkpoint puts at most one copy of a pair at risk.
    for (pair, slots) in decoded.chunks(2).zip(SUPERBLOCK_SLOTS) {
        if pair.iter().all(Result::is_err) {
            return Err(OpenError::SuperblockDamaged { offset: slots[0] * SLOT_U64 });
        }
    }
    Ok(newest.clone())
}

/// True when the data slots of a group hold what its records say.
pub(crate) fn data_matches(header: &[u8], data: &[Option<Buf>]) -> bool {
    let mut pages = data.iter();
    for record in records(header) {
        let Ok(record) = record else { return false };
        if let Record::Write { checksums, .. } = record {
            for checksum in checksums.iter() {
                let good = pages.next().and_then(|page| page.as_ref()).is_some_and(|page| crc64(page) == checksum);
                if !good {
                    return false;
                }
            }
        }
    }
    pages.next().is_none()
}
