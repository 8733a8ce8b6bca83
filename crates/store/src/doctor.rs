//! Reads, checks and explains a store offline, with no daemon running: `cairn doctor cs DIR`.
//!
//! Checked: the superblock copies, the metadata trees, every index leaf, that no slot has two owners, that the live
//! bitmap says what the index says, and the chain of groups after the checkpoint. With `deep` also the checksum of
//! every data block. Nothing is changed.

use crate::bitmap::BusyMap;
use crate::layout::group::GroupHeader;
use crate::layout::superblock::{ChainPosition, Superblock};
use crate::layout::{LEAF_BLOCKS, PageKind, SLOT, SLOT_U64, SUPERBLOCK_SLOTS, bound_checksum};
use crate::leaf::parse_leaf;
use crate::recovery::{TREE_NAMES, choose_superblock, data_matches, load_tree_page};
use crate::state::State;
use crate::tree::TreeLoad;
use cairn_env::{Buf, DiskError};
use cairn_stdx::checksum::crc64;
use cairn_types::{ChunkId, ClusterId, format_size};
use std::fmt;

/// Reads `len` bytes at a byte offset.
pub type ReadFn<'a> = dyn FnMut(u64, u32) -> Result<Buf, DiskError> + 'a;

/// Findings kept in a report; further ones are only counted.
const FINDINGS_MAX: usize = 1000;
const READ_SLOTS_MAX: u64 = 64;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Normal after a crash; nothing to do.
    Note,
    /// The store works; something needs repair from another replica, or space is lost.
    Damage,
    /// The store cannot be opened: remove the server and let its data be rebuilt.
    Fatal,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The structure concerned.
    pub structure: &'static str,
    /// Its byte offset on the device; zero when it has no single place.
    pub offset: u64,
    /// What is wrong.
    pub detail: String,
}

/// What the store is and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Cluster of the store; zero when there is no store.
    pub cluster: ClusterId,
    /// Identity of the store.
    pub store_uuid: [u8; 16],
    /// Bytes of the store.
    pub size_bytes: u64,
    /// Newest checkpoint.
    pub generation: u64,
    /// Chunks of the checkpoint.
    pub chunks: u64,
    /// Index leaves checked.
    pub leaves: u64,
    /// Mapped blocks of the checkpoint.
    pub blocks: u64,
    /// Blocks whose data was read and compared.
    pub blocks_verified: u64,
    /// Volumes with a fence or a settled mark.
    pub volumes: u64,
    /// Unsettled writes of the checkpoint.
    pub tail_entries: u64,
    /// Groups a start would replay.
    pub chain_groups: u64,
    /// Findings, in the order of discovery.
    pub findings: Vec<Finding>,
    /// Findings beyond those listed.
    pub findings_omitted: u64,
}

impl Report {
    /// True when nothing worse than a note was found.
    pub fn is_healthy(&self) -> bool {
        self.findings_omitted == 0 && self.findings.iter().all(|finding| finding.severity == Severity::Note)
    }

    fn add(&mut self, severity: Severity, structure: &'static str, slot: u64, detail: impl Into<String>) {
        if self.findings.len() >= FINDINGS_MAX {
            self.findings_omitted += 1;
            return;
        }
        self.findings.push(Finding { severity, structure, offset: slot * SLOT_U64, detail: detail.into() });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uuid = ClusterId(self.store_uuid);
        writeln!(f, "store {uuid} of cluster {}, {}", self.cluster, format_size(self.size_bytes))?;
        writeln!(
            f,
            "checkpoint {}: {} chunks, {} leaves, {} blocks ({}), {} volumes, {} unsettled writes",
            self.generation,
            self.chunks,
            self.leaves,
            self.blocks,
            format_size(self.blocks * SLOT_U64),
            self.volumes,
            self.tail_entries
        )?;
        writeln!(f, "log: {} groups to replay; data blocks verified: {}", self.chain_groups, self.blocks_verified)?;
        for finding in &self.findings {
            let word = match finding.severity {
                Severity::Note => "note",
                Severity::Damage => "DAMAGE",
                Severity::Fatal => "FATAL",
            };
            writeln!(f, "{word}: {} at byte {}: {}", finding.structure, finding.offset, finding.detail)?;
        }
        if self.findings_omitted > 0 {
            writeln!(f, "... and {} more findings", self.findings_omitted)?;
        }
        match self.findings.iter().map(|finding| finding.severity).max() {
            None | Some(Severity::Note) => write!(f, "healthy"),
            Some(Severity::Damage) => write!(f, "damaged: the store opens; let other replicas repair what is listed"),
            Some(Severity::Fatal) => write!(f, "cannot be opened: remove this server and let its data be rebuilt"),
        }
    }
}

/// Checks the store on a device of `size` bytes. See the module.
pub fn check(read: &mut ReadFn<'_>, size: u64, deep: bool) -> Report {
    let mut doctor = Doctor { read, report: Report::default(), deep };
    doctor.run(size);
    doctor.report
}

struct Doctor<'a, 'b> {
    read: &'a mut ReadFn<'b>,
    report: Report,
    deep: bool,
}

impl Doctor<'_, '_> {
    fn slot(&mut self, slot: u64) -> Result<Buf, DiskError> {
        (self.read)(slot * SLOT_U64, SLOT as u32)
    }

    fn run(&mut self, size: u64) {
        let Some(root) = self.superblocks(size) else { return };
        let mut state = State::new(root.slot_count, 16);
        let mut owners = BusyMap::new(root.slot_count);
        for slot in SUPERBLOCK_SLOTS.iter().flatten() {
            owners.set(*slot);
        }
        for number in 0..4 {
            if !self.tree(&root, number, &mut state, &mut owners) {
                return;
            }
        }
        self.report.chunks = state.chunks.len();
        self.report.volumes = state.volumes.len();
        self.report.tail_entries = state.volumes.tail_len();
        let metadata = owners;
        let mut owners = BusyMap::new(root.slot_count);
        self.leaves(&state, &metadata, &mut owners);
        self.bitmap(&state, &owners);
        self.chain(&root);
    }

    fn superblocks(&mut self, size: u64) -> Option<Superblock> {
        if size < crate::layout::SLOTS_MIN * SLOT_U64 {
            self.report.add(Severity::Fatal, "device", 0, format!("{size} bytes are too few for a store"));
            return None;
        }
        let mut copies = Vec::new();
        for slot in SUPERBLOCK_SLOTS.iter().flatten() {
            match self.slot(*slot) {
                Ok(page) => {
                    if let Err(reason) = Superblock::decode(&page) {
                        self.report.add(Severity::Damage, "superblock copy", *slot, reason.to_string());
                    }
                    copies.push(Some(page));
                }
                Err(error) => {
                    self.report.add(Severity::Damage, "superblock copy", *slot, error.to_string());
                    copies.push(None);
                }
            }
        }
        let root = match choose_superblock(&copies, None) {
            Ok(root) => root,
            Err(error) => {
                self.report.add(Severity::Fatal, "superblock", 0, error.to_string());
                return None;
            }
        };
        self.report.cluster = root.cluster;
        self.report.store_uuid = root.store_uuid;
        self.report.size_bytes = root.slot_count * SLOT_U64;
        self.report.generation = root.generation;
        if self.report.size_bytes > size {
            let detail = format!("the device has {size} bytes, the store needs {}", self.report.size_bytes);
            self.report.add(Severity::Fatal, "device", 0, detail);
            return None;
        }
        // One torn copy is what a crash in the middle of a checkpoint leaves behind.
        if let [only] = &mut self.report.findings[..] {
            only.severity = Severity::Note;
        }
        Some(root)
    }

    fn tree(&mut self, root: &Superblock, number: usize, state: &mut State, owners: &mut BusyMap) -> bool {
        let name = TREE_NAMES[number];
        let mut load = TreeLoad::new(number as u64, root.trees[number], root.slot_count);
        if number == 0 && root.trees[0].pages > state.live.page_count() {
            self.report.add(Severity::Fatal, name, 0, "too many pages");
            return false;
        }
        loop {
            let mut pages: Vec<Option<Buf>> = Vec::new();
            for index in 0..load.wanted().len() {
                let slot = load.wanted()[index].slot;
                if slot == 0 {
                    pages.push(None);
                    continue;
                }
                let wrong = match self.slot(slot) {
                    Ok(page) if load.check(index, &page) => {
                        pages.push(Some(page));
                        (!owners.set(slot)).then(|| "the slot has two owners".to_owned())
                    }
                    Ok(_) => Some("checksum mismatch".to_owned()),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(detail) = wrong {
                    self.report.add(Severity::Fatal, name, slot, detail);
                    return false;
                }
            }
            if load.at_pages() {
                for (page_number, page) in pages.iter().enumerate() {
                    let slot = load.wanted()[page_number].slot;
                    let bytes = page.as_deref().unwrap_or(&[]);
                    if let Err(detail) = load_tree_page(state, number, page_number as u64, bytes) {
                        self.report.add(Severity::Fatal, name, slot, detail);
                        return false;
                    }
                }
                return true;
            }
            if !load.descend(&mut |index| pages[index].take()) {
                self.report.add(Severity::Fatal, name, 0, "a pointer leads outside the disk");
                return false;
            }
        }
    }

    fn leaves(&mut self, state: &State, metadata: &BusyMap, owners: &mut BusyMap) {
        for (id, chunk) in state.chunks.iter() {
            for (number, reference) in chunk.leaves.iter().enumerate().filter(|(_, leaf)| leaf.slot != 0) {
                self.report.leaves += 1;
                if metadata.get(reference.slot) || !owners.set(reference.slot) {
                    let detail = format!("leaf {number} of {id} shares its slot with something else");
                    self.report.add(Severity::Fatal, "leaf", reference.slot, detail);
                    continue;
                }
                let page = match self.slot(reference.slot) {
                    Ok(page) => page,
                    Err(error) => {
                        self.report.add(Severity::Damage, "leaf", reference.slot, format!("{id}: {error}"));
                        continue;
                    }
                };
                if bound_checksum(&page, PageKind::Leaf, id.0, number as u64) != reference.checksum {
                    let first = number as u32 * LEAF_BLOCKS;
                    let detail =
                        format!("checksum mismatch: {id} blocks {first}..{} are lost here", first + LEAF_BLOCKS);
                    self.report.add(Severity::Damage, "leaf", reference.slot, detail);
                    continue;
                }
                self.leaf(id, number as u32, &page, metadata, owners);
            }
        }
    }

    fn leaf(&mut self, id: ChunkId, number: u32, page: &Buf, metadata: &BusyMap, owners: &mut BusyMap) {
        let mut mapped: Vec<(u64, u32, u64)> = Vec::new();
        for (i, entry) in parse_leaf(page).iter().enumerate() {
            let block = number * LEAF_BLOCKS + i as u32;
            if entry.is_damaged() {
                self.report.add(Severity::Damage, "block", 0, format!("{id} block {block} was lost with its leaf"));
            }
            let Some(slot) = entry.slot() else { continue };
            self.report.blocks += 1;
            if metadata.get(slot) || !owners.set(slot) {
                let detail = format!("{id} block {block} shares its slot with something else");
                self.report.add(Severity::Fatal, "block", slot, detail);
                continue;
            }
            mapped.push((slot, block, entry.checksum));
        }
        if !self.deep {
            return;
        }
        mapped.sort_unstable();
        let mut rest = &mapped[..];
        while let Some((first, ..)) = rest.first() {
            let run = rest.iter().zip(*first..first + READ_SLOTS_MAX).take_while(|((slot, ..), at)| slot == at).count();
            let read = (self.read)(first * SLOT_U64, (run * SLOT) as u32);
            for (i, (slot, block, checksum)) in rest[..run].iter().enumerate() {
                self.report.blocks_verified += 1;
                let detail = match &read {
                    Ok(buf) if crc64(&buf[i * SLOT..(i + 1) * SLOT]) == *checksum => continue,
                    Ok(_) => format!("{id} block {block}: checksum mismatch"),
                    Err(error) => format!("{id} block {block}: {error}"),
                };
                self.report.add(Severity::Damage, "block", *slot, detail);
            }
            rest = &rest[run..];
        }
    }

    /// Compares the live bitmap with what the index refers to.
    fn bitmap(&mut self, state: &State, owners: &BusyMap) {
        // A leaf that cannot be read hides what it refers to, so its slots look leaked.
        let mut leaked = 0u64;
        for (base, word) in state.live.words() {
            for slot in (base..base + 64).take_while(|slot| *slot < state.slot_count) {
                let live = word & (1 << (slot % 64)) != 0;
                if live && !owners.get(slot) {
                    leaked += 1;
                } else if !live && owners.get(slot) {
                    self.report.add(Severity::Fatal, "bitmap", slot, "a slot in use is marked free");
                }
            }
        }
        if leaked > 0 {
            let detail = format!("{leaked} slots are marked used and have no owner");
            self.report.add(Severity::Damage, "bitmap", 0, detail);
        }
    }

    fn chain(&mut self, root: &Superblock) {
        let mut position = root.chain;
        let mut flushed = position.group;
        let mut headers: Vec<(GroupHeader, Buf)> = Vec::new();
        while headers.len() as u64 <= root.slot_count {
            let Some((header, checksum, page)) = self.next_group(root, &position) else { break };
            if header.generation > root.generation {
                let detail = format!("refers to checkpoint {}, which no superblock knows", header.generation);
                self.report.add(Severity::Fatal, "group header", position.current.start, detail);
                return;
            }
            flushed = flushed.max(header.flushed_through);
            position = header.position(checksum);
            headers.push((header, page));
        }
        let mut beyond = 0;
        for slot in (position.current.start + 1..position.current.end).chain(position.after.start..position.after.end) {
            let Ok(page) = self.slot(slot) else { continue };
            if let Some(Ok((header, _))) = GroupHeader::decode(&page, &root.store_uuid, root.slot_count)
                && header.group > position.group
                && header.session >= position.session
            {
                beyond = beyond.max(header.group);
                flushed = flushed.max(header.flushed_through);
            }
        }
        let missing = position.group + 1;
        if flushed >= missing {
            let detail = format!("group {missing} is damaged although it was flushed");
            self.report.add(Severity::Fatal, "log", position.current.start, detail);
        } else if beyond > 0 {
            let detail = format!("group {missing} is incomplete: no flush had covered it, it will be dropped");
            self.report.add(Severity::Note, "log", position.current.start, detail);
        }
        for (header, page) in &headers {
            let durable = header.group <= flushed;
            self.report.chain_groups += 1;
            if durable && !self.deep {
                continue;
            }
            let slots: Vec<u64> = header.data_slots().collect();
            let data: Vec<Option<Buf>> = slots.into_iter().map(|slot| self.slot(slot).ok()).collect();
            self.report.blocks_verified += data.len() as u64;
            if !data_matches(page, &data) {
                let slot = header.runs[0].start;
                if durable {
                    let detail = format!("data of group {} is damaged", header.group);
                    self.report.add(Severity::Damage, "group", slot, detail);
                } else {
                    let detail = format!("group {} is incomplete: it and later ones will be dropped", header.group);
                    self.report.add(Severity::Note, "group", slot, detail);
                    return;
                }
            }
        }
    }

    fn next_group(&mut self, root: &Superblock, position: &ChainPosition) -> Option<(GroupHeader, u64, Buf)> {
        let slot = position.current.start;
        let page = self.slot(slot).ok()?;
        let (header, checksum) = match GroupHeader::decode(&page, &root.store_uuid, root.slot_count)? {
            Ok(decoded) => decoded,
            Err(field) => {
                self.report.add(Severity::Fatal, "group header", slot, format!("{field} is out of range"));
                return None;
            }
        };
        let linked = header.previous == position.header_checksum && header.session >= position.session;
        let fits = header.group == position.group + 1 && header.runs[0].start == slot;
        (linked && fits).then_some((header, checksum, page))
    }
}
