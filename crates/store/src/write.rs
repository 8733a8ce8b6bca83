//! The write pipeline: staging, groups, answers.
//!
//! A change is *staged* until the index leaves it touches are in memory, then *queued*; each turn forms groups from the
//! queue, and when a group's device writes have completed, and those of all groups before it, the group is *applied* to
//! the state and answered. Changes of one chunk keep their order; a change that must be alone (delete, new version)
//! waits for those before it and holds back those after it.

use crate::api::{REQUEST_BLOCKS_MAX, StoreError, StoreOutput, StoreReply, StoreRequest};
use crate::chunks::{ChunkInfo, NOT_CACHED};
use crate::engine::{AwaitingFlush, Engine, Io, Waiter};
use crate::layout::group::{
    CREATE_RECORD_BYTES, GROUP_BODY_BYTES, GroupHeader, RUN_BYTES, RecordWriter, Stamp, WRITE_RECORD_BYTES,
};
use crate::layout::superblock::LABEL_BYTES;
use crate::layout::{CHUNK_BLOCKS_MAX, LEAF_BLOCKS, Run, SLOT, SLOT_U64, TAG_BYTES_MAX, VERSION_MAX};
use cairn_env::{Buf, BufMut, DiskError, DiskOp};
use cairn_stdx::planted;
use cairn_types::{ChunkId, ChunkVersion, Epoch, VolumeId};
use std::ops::Range;

/// Most blocks of one write record: a piece that fits a header whatever the fragmentation.
const PIECE_BLOCKS_MAX: u32 = 128;
/// Most blocks of one unmap record: bounds the leaves one group makes dirty.
const UNMAP_BLOCKS_MAX: u32 = 4096;
/// A write with so many blocks left is large.
const LARGE_BLOCKS: u32 = 64;
/// Groups in flight, beyond what the options say, while the next write is large.
const LARGE_GROUPS_MORE: usize = 3;
/// Pages of the chunk tree one change may make dirty: where its record is, and where it moves to.
const PAGES_PER_CHANGE: u64 = 2;
/// Settled marks logged with one group.
const SETTLES_PER_GROUP: usize = 16;
/// Header buffers kept for the next groups.
const HEADER_POOL_MAX: usize = 8;
const SETTLE_RECORD_BYTES: usize = 32;
/// Bytes a record of metadata takes besides its tag, rounded up.
const META_RECORD_BYTES: usize = 32;

/// What a mutation does.
pub(crate) enum Change {
    Write { stamp: Stamp, checksums: Vec<u64>, data: Buf },
    Unmap { stamp: Stamp },
    Create(Box<ChunkInfo>),
    Delete,
    SetVersion(ChunkVersion),
    SetTag(Vec<u8>),
    ForgetTail,
    Fence(VolumeId, Epoch),
    Forget(VolumeId),
    SetLabel([u8; LABEL_BYTES]),
}

/// A change on its way to the log.
pub(crate) struct Mutation {
    id: u64,
    pub token: u64,
    change: Change,
    chunk: ChunkId,
    first: u32,
    count: u32,
    /// Blocks already in groups.
    formed: u32,
    /// Leaves pinned, once acquired.
    leaves: Range<u32>,
    /// Leaves of the range that could not be loaded.
    missing: Vec<u32>,
    acquired: bool,
    waiting: u32,
    error: Option<StoreError>,
    durable: bool,
}

impl Mutation {
    pub(crate) fn is_delete(&self) -> bool {
        matches!(self.change, Change::Delete)
    }

    fn is_exclusive(&self) -> bool {
        matches!(self.change, Change::Delete | Change::SetVersion(_))
    }

    /// Takes no space for data: may use the part of the reserve that writes may not.
    fn is_privileged(&self) -> bool {
        !matches!(self.change, Change::Write { .. } | Change::Create(_))
    }

    fn concerns_chunk(&self) -> bool {
        !matches!(self.change, Change::Fence(..) | Change::Forget(_) | Change::SetLabel(_))
    }
}

/// A group in flight.
pub(crate) struct Group {
    number: u64,
    header: Buf,
    fixed: GroupHeader,
    checksum: u64,
    pending: u32,
    /// Mutations whose last piece is in this group.
    pub finished: Vec<Mutation>,
    new_slots: u64,
    leaves: u64,
}

enum Admission {
    Yes,
    Wait,
    Full,
}

impl Engine {
    /// Takes a request that changes something.
    pub(crate) fn submit_change(&mut self, token: u64, request: StoreRequest, out: &mut StoreOutput) {
        let mutation = match self.mutation(token, request) {
            Ok(mutation) => mutation,
            Err(error) => {
                out.done.push((token, Err(error)));
                return;
            }
        };
        if let Change::Fence(volume, epoch) = mutation.change {
            let current = self.state.volumes.fence(volume);
            if epoch < current {
                out.done.push((token, Err(StoreError::StaleEpoch { volume, requested: epoch, current })));
                return;
            }
            // From now on no write of a lower epoch enters the log, even one that waits for a leaf (I5).
            self.state.volumes.raise_fence(volume, epoch);
        }
        if !mutation.concerns_chunk() {
            self.fifo.push_back(mutation);
            return;
        }
        let chunk = mutation.chunk;
        if matches!(mutation.change, Change::Create(_)) && !self.staged.contains_key(&chunk) {
            if self.state.chunks.get(chunk).is_some() || !self.creating.insert(chunk) {
                out.done.push((token, Err(StoreError::Exists { chunk })));
            } else {
                self.fifo.push_back(mutation);
            }
            return;
        }
        let held = self.staged.contains_key(&chunk);
        let left = if held { Some(mutation) } else { self.queue_at_once(mutation) };
        if let Some(mutation) = left {
            self.staged.entry(chunk).or_default().push_back(mutation);
            self.pump_chunk(chunk, out);
        }
    }

    /// The common case: the chunk is free and its leaves are in memory. Gives the mutation back otherwise.
    fn queue_at_once(&mut self, mut mutation: Mutation) -> Option<Mutation> {
        let Some(owner) = self.state.chunks.get_mut(mutation.chunk) else { return Some(mutation) };
        let end = mutation.first.checked_add(mutation.count);
        if mutation.is_exclusive() || owner.exclusive || end.is_none_or(|end| end > owner.info.block_count) {
            return Some(mutation);
        }
        if mutation.count > 0 {
            mutation.leaves = mutation.first / LEAF_BLOCKS..(mutation.first + mutation.count - 1) / LEAF_BLOCKS + 1;
            let range = mutation.leaves.start as usize..mutation.leaves.end as usize;
            if owner.leaves[range.clone()].iter().any(|leaf| leaf.cached == NOT_CACHED) {
                mutation.leaves = 0..0;
                return Some(mutation);
            }
            for leaf in &owner.leaves[range] {
                self.state.cache.touch(leaf.cached);
                self.state.cache.get_mut(leaf.cached).pins += 1;
            }
        }
        owner.inflight += 1;
        mutation.acquired = true;
        self.fifo.push_back(mutation);
        None
    }

    fn mutation(&mut self, token: u64, request: StoreRequest) -> Result<Mutation, StoreError> {
        let invalid = |what| Err(StoreError::Invalid { what });
        let mut mutation = Mutation {
            id: self.next_mutation,
            token,
            change: Change::Delete,
            chunk: ChunkId(0),
            first: 0,
            count: 0,
            formed: 0,
            leaves: 0..0,
            missing: Vec::new(),
            acquired: false,
            waiting: 0,
            error: None,
            durable: true,
        };
        self.next_mutation += 1;
        match request {
            StoreRequest::Write { chunk, version, epoch, sequence, first_block, checksums, data, durable } => {
                let count = checksums.len();
                if count == 0 || count > REQUEST_BLOCKS_MAX as usize || data.len() != count * SLOT {
                    return invalid("a write has 1 to 256 blocks and a checksum for each");
                }
                if version.0 > VERSION_MAX {
                    return invalid("version beyond 24 bits");
                }
                let data = if data.is_aligned() { data } else { Buf::copy_from(&data) };
                (mutation.chunk, mutation.first, mutation.count) = (chunk, first_block, count as u32);
                mutation.change = Change::Write { stamp: Stamp { version, epoch, sequence }, checksums, data };
                mutation.durable = durable;
            }
            StoreRequest::Unmap { chunk, version, epoch, sequence, first_block, block_count, durable } => {
                if block_count == 0 || version.0 > VERSION_MAX {
                    return invalid("an unmap has at least one block and a version of 24 bits");
                }
                (mutation.chunk, mutation.first, mutation.count) = (chunk, first_block, block_count);
                mutation.change = Change::Unmap { stamp: Stamp { version, epoch, sequence } };
                mutation.durable = durable;
            }
            StoreRequest::CreateChunk { chunk, volume, layer, index, block_count, version, tag } => {
                if block_count == 0 || block_count > CHUNK_BLOCKS_MAX {
                    return invalid("a chunk has 1 to 65536 blocks");
                }
                if version.0 > VERSION_MAX || tag.len() > TAG_BYTES_MAX {
                    return invalid("a version has 24 bits, a tag 512 bytes");
                }
                let info = ChunkInfo { volume, layer, index, version, block_count, mapped_blocks: 0, tag };
                mutation.chunk = chunk;
                mutation.change = Change::Create(Box::new(info));
            }
            StoreRequest::DeleteChunk { chunk } => mutation.chunk = chunk,
            StoreRequest::SetVersion { chunk, version } => {
                if version.0 > VERSION_MAX {
                    return invalid("version beyond 24 bits");
                }
                mutation.chunk = chunk;
                mutation.change = Change::SetVersion(version);
            }
            StoreRequest::SetTag { chunk, tag } => {
                if tag.len() > TAG_BYTES_MAX {
                    return invalid("a tag has at most 512 bytes");
                }
                mutation.chunk = chunk;
                mutation.change = Change::SetTag(tag);
            }
            StoreRequest::ForgetTail { chunk } => {
                mutation.chunk = chunk;
                mutation.change = Change::ForgetTail;
            }
            StoreRequest::Fence { volume, epoch } => mutation.change = Change::Fence(volume, epoch),
            StoreRequest::SetLabel { label } => mutation.change = Change::SetLabel(label),
            StoreRequest::ForgetVolume { volume } => {
                if self.state.chunks.of_volume(volume).next().is_some() {
                    return invalid("a volume with chunks cannot be forgotten");
                }
                mutation.change = Change::Forget(volume);
            }
            _ => unreachable!("only requests that change something come here"),
        }
        Ok(mutation)
    }

    /// Moves staged mutations of `chunk` on as far as they can go.
    pub(crate) fn pump_chunk(&mut self, chunk: ChunkId, out: &mut StoreOutput) {
        let Some(mut queue) = self.staged.remove(&chunk) else { return };
        loop {
            self.acquire_in_order(chunk, &mut queue, out);
            let mut failed = false;
            while let Some(front) = queue.front() {
                let ready = if front.acquired { front.waiting == 0 } else { front.error.is_some() };
                if !ready {
                    break;
                }
                let mutation = queue.pop_front().expect("looked at above");
                if mutation.error.is_some() {
                    failed = true;
                    self.finish(mutation, 0, out);
                } else {
                    self.fifo.push_back(mutation);
                }
            }
            // A mutation that failed may have held back the next one.
            if !failed {
                break;
            }
        }
        if !queue.is_empty() {
            self.staged.insert(chunk, queue);
        }
    }

    fn acquire_in_order(
        &mut self,
        chunk: ChunkId,
        queue: &mut std::collections::VecDeque<Mutation>,
        out: &mut StoreOutput,
    ) {
        for (i, mutation) in queue.iter_mut().enumerate() {
            if mutation.acquired || mutation.error.is_some() {
                if mutation.is_exclusive() {
                    return;
                }
                continue;
            }
            let Some(owner) = self.state.chunks.get_mut(chunk) else {
                if self.creating.contains(&chunk) {
                    return;
                }
                mutation.error = Some(StoreError::NoChunk { chunk });
                continue;
            };
            let leaf_count = owner.leaves.len() as u32;
            match &mutation.change {
                Change::Create(_) => {
                    mutation.error = Some(StoreError::Exists { chunk });
                    continue;
                }
                Change::Delete | Change::SetVersion(_) => {
                    if i > 0 || owner.inflight > 0 || owner.exclusive {
                        return;
                    }
                    owner.exclusive = true;
                    mutation.leaves = if mutation.is_delete() {
                        0..leaf_count
                    } else {
                        let first = owner.tail.spans().next().map_or(0, |(first, _, _)| first / LEAF_BLOCKS);
                        let last = owner.tail.spans().last().map_or(0, |(_, end, _)| end.div_ceil(LEAF_BLOCKS));
                        first..last
                    };
                }
                _ => {
                    if owner.exclusive {
                        return;
                    }
                    if mutation.first.checked_add(mutation.count).is_none_or(|end| end > owner.info.block_count) {
                        mutation.error = Some(StoreError::Invalid { what: "blocks beyond the end of the chunk" });
                        continue;
                    }
                    if mutation.count > 0 {
                        let last = (mutation.first + mutation.count - 1) / LEAF_BLOCKS;
                        mutation.leaves = mutation.first / LEAF_BLOCKS..last + 1;
                    }
                }
            }
            owner.inflight += 1;
            mutation.acquired = true;
            let make = !mutation.is_delete();
            for number in mutation.leaves.clone() {
                let absent = |state: &crate::state::State| {
                    let leaf = &state.chunks.get(chunk).expect("checked above").leaves[number as usize];
                    leaf.slot == 0 && leaf.cached == NOT_CACHED
                };
                if make && absent(&self.state) {
                    self.state.ensure_new_leaf(chunk, number);
                }
                mutation.waiting += u32::from(self.acquire_leaf(chunk, number, Waiter::Mutation(mutation.id), out));
            }
            if mutation.is_exclusive() {
                return;
            }
        }
    }

    pub(crate) fn mutation_leaf_ready(&mut self, chunk: ChunkId, id: u64, number: u32, error: Option<DiskError>) {
        let queue = self.staged.get_mut(&chunk).expect("a waiting mutation is staged");
        let mutation = queue.iter_mut().find(|mutation| mutation.id == id).expect("a waiting mutation is staged");
        mutation.waiting -= 1;
        if let Some(error) = error {
            mutation.missing.push(number);
            mutation.error = Some(StoreError::Io(error));
        }
    }

    /// Ends a mutation: unpins, answers, lets the next one of its chunk go on.
    fn finish(&mut self, mutation: Mutation, lsn: u64, out: &mut StoreOutput) {
        let chunk = mutation.chunk;
        if mutation.acquired {
            for number in mutation.leaves.clone() {
                if !mutation.missing.contains(&number) {
                    self.release_leaf(chunk, number);
                }
            }
            if let Some(owner) = self.state.chunks.get_mut(chunk) {
                owner.inflight -= 1;
                owner.exclusive &= !mutation.is_exclusive();
            }
        }
        if matches!(mutation.change, Change::Create(_)) && !matches!(mutation.error, Some(StoreError::Exists { .. })) {
            self.creating.remove(&chunk);
        }
        let concerns_chunk = mutation.concerns_chunk();
        let reply = match mutation.change {
            Change::Write { .. } | Change::Unmap { .. } => StoreReply::Written { lsn },
            _ => StoreReply::Done,
        };
        match mutation.error {
            Some(error) => out.done.push((mutation.token, Err(error))),
            None if mutation.durable => {
                let waiting = AwaitingFlush { lsn, token: mutation.token, reply: Some(reply) };
                self.awaiting_flush.push_back(waiting);
            }
            None => out.done.push((mutation.token, Ok(reply))),
        }
        if concerns_chunk && !self.staged.is_empty() {
            self.pump_chunk(chunk, out);
        }
    }

    pub(crate) fn form_groups(&mut self, out: &mut StoreOutput) {
        while let Some(next) = self.fifo.front() {
            // Small writes are better off waiting for one another; large ones fill a group alone, and the disk wants
            // more of them than that.
            let more = if next.count - next.formed >= LARGE_BLOCKS { LARGE_GROUPS_MORE } else { 0 };
            if self.groups.len() >= self.options.groups_in_flight_max.max(1) + more {
                return;
            }
            if self.is_opening() || !self.form_group(out) {
                return;
            }
        }
    }

    /// The first group of a session: empty, and durable before anything else is written, so that no group of an earlier
    /// session can ever follow a group of this one.
    pub(crate) fn start_session(&mut self, out: &mut StoreOutput) {
        if !planted!("store_session_reused") {
            self.formed.session += 1;
        }
        self.emit_group(RecordWriter::default(), Vec::new(), GroupSums::default(), out);
    }

    /// Forms one group from the queue; false when nothing could be formed now.
    fn form_group(&mut self, out: &mut StoreOutput) -> bool {
        let mut writer = std::mem::take(&mut self.record_pool);
        writer.bytes.clear();
        writer.count = 0;
        let mut data: Vec<Buf> = Vec::new();
        let mut sums = GroupSums::default();
        let mut room = GROUP_BODY_BYTES - RUN_BYTES;
        let settles = self.settles.len().min(SETTLES_PER_GROUP);
        room -= settles * SETTLE_RECORD_BYTES;
        while let Some(mutation) = self.fifo.front() {
            if let Some(error) = self.refusal(mutation) {
                self.refuse_front(error, out, &mut sums);
                continue;
            }
            let (piece, bytes) = piece_of(mutation, room);
            if piece.is_none() && bytes > room {
                break;
            }
            let blocks = piece.unwrap_or(0);
            let data_slots = if matches!(mutation.change, Change::Write { .. }) { u64::from(blocks) } else { 0 };
            let first = mutation.first + mutation.formed;
            let new_slots = self.new_slots(mutation, first, blocks);
            let leaves = match mutation.change {
                Change::SetVersion(_) => PAGES_PER_CHANGE + mutation.leaves.len() as u64,
                _ if blocks == 0 => PAGES_PER_CHANGE,
                _ => PAGES_PER_CHANGE + u64::from((first + blocks - 1) / LEAF_BLOCKS - first / LEAF_BLOCKS + 1),
            };
            if mutation.formed == 0 && mutation.count > blocks && self.is_too_large(mutation) {
                // All of it or nothing: a write of which a part is in the log cannot be refused any more.
                self.refuse_front(StoreError::NoSpace, out, &mut sums);
                continue;
            }
            let admission = self.admit(
                mutation.is_privileged(),
                writer.count > 0,
                1 + sums.blocks + data_slots,
                sums.new_slots + new_slots,
                sums.leaves + leaves,
            );
            match admission {
                Admission::Yes => {}
                Admission::Wait => {
                    self.checkpoint_requested = true;
                    break;
                }
                Admission::Full => {
                    self.refuse_front(StoreError::NoSpace, out, &mut sums);
                    continue;
                }
            }
            if writer.count == 0 {
                self.log_settles(&mut writer);
            }
            room -= bytes;
            sums.blocks += data_slots;
            sums.new_slots += new_slots;
            sums.leaves += leaves;
            let mutation = self.fifo.front_mut().expect("looked at above");
            record_piece(mutation, first, blocks, &mut writer, &mut data);
            mutation.formed += blocks;
            if mutation.formed >= mutation.count {
                let mutation = self.fifo.pop_front().expect("looked at above");
                sums.finished.push(mutation);
            }
        }
        if writer.count == 0 {
            for mutation in sums.finished {
                self.finish(mutation, self.applied.group, out);
            }
            return false;
        }
        self.emit_group(writer, data, sums, out);
        true
    }

    fn log_settles(&mut self, writer: &mut RecordWriter) {
        for _ in 0..SETTLES_PER_GROUP {
            let Some(volume) = self.settles.pop_first() else { return };
            if let Some(known) = self.state.volumes.get(volume) {
                writer.settle(volume, known.settled.0, known.settled.1);
            }
        }
    }

    /// A reason why the front mutation must not enter the log any more.
    fn refusal(&self, mutation: &Mutation) -> Option<StoreError> {
        let (Change::Write { stamp, .. } | Change::Unmap { stamp }) = &mutation.change else { return None };
        let volume = self.state.chunks.get(mutation.chunk)?.info.volume;
        let current = self.state.volumes.fence(volume);
        let stale = stamp.epoch < current && !planted!("store_fence_at_submit_only");
        stale.then_some(StoreError::StaleEpoch { volume, requested: stamp.epoch, current })
    }

    fn refuse_front(&mut self, error: StoreError, out: &mut StoreOutput, sums: &mut GroupSums) {
        let mut mutation = self.fifo.pop_front().expect("caller looked at it");
        mutation.error = Some(error);
        if mutation.formed == 0 {
            self.finish(mutation, 0, out);
        } else if let (true, Some(group)) = (sums.blocks == 0 && sums.leaves == 0, self.groups.back_mut()) {
            // Earlier pieces are in flight and need the pinned leaves: answer with them.
            group.finished.push(mutation);
        } else {
            sums.finished.push(mutation);
        }
    }

    /// True when there is no room for a write as a whole, though there may be for its first piece.
    fn is_too_large(&self, mutation: &Mutation) -> bool {
        if !matches!(mutation.change, Change::Write { .. }) {
            return false;
        }
        let (first, count) = (mutation.first, mutation.count);
        let leaves = PAGES_PER_CHANGE + u64::from((first + count - 1) / LEAF_BLOCKS - first / LEAF_BLOCKS + 1);
        let new_slots = self.new_slots(mutation, first, count);
        let groups = u64::from(count / LARGE_BLOCKS) + 1;
        let admission = self.admit(mutation.is_privileged(), false, groups + u64::from(count), new_slots, leaves);
        matches!(admission, Admission::Full)
    }

    /// Slots a piece adds to what the store occupies.
    fn new_slots(&self, mutation: &Mutation, first: u32, blocks: u32) -> u64 {
        match &mutation.change {
            Change::Create(_) => 1,
            Change::Write { .. } => {
                let worst = u64::from(blocks) + u64::from(blocks / LEAF_BLOCKS + 2);
                if self.state.occupied() + self.inflight_new + worst <= self.capacity() / 2 {
                    return worst;
                }
                let owner = self.state.chunks.get(mutation.chunk).expect("acquired mutations keep their chunk");
                let mut fresh = 0;
                let mut leaf_before = u32::MAX;
                for block in first..first + blocks {
                    let reference = &owner.leaves[(block / LEAF_BLOCKS) as usize];
                    let cached = self.state.cache.get(reference.cached);
                    if block / LEAF_BLOCKS != leaf_before {
                        leaf_before = block / LEAF_BLOCKS;
                        fresh += u64::from(reference.slot == 0 && !cached.dirty);
                    }
                    fresh += u64::from(cached.leaf[(block % LEAF_BLOCKS) as usize].slot().is_none());
                }
                fresh
            }
            _ => 0,
        }
    }

    /// Decides whether the group being formed may grow to `slots` slots, `new_slots` more occupied ones and `leaves`
    /// more dirty leaves.
    ///
    /// Two limits. Occupied slots stay below the capacity: beyond it a write is refused. And at every moment enough
    /// slots are free for a checkpoint of everything dirty: when they run short, writes wait for the checkpoint
    /// that brings back quarantined slots. Changes that free space may use a part of the reserve that writes may
    /// not.
    ///
    /// `begun`: the group holds changes already. What they replace comes back with a checkpoint too, so a change that
    /// finds too few free slots beside them waits for the next group: an overwrite must never be refused for what
    /// other overwrites take for a while.
    fn admit(&self, privileged: bool, begun: bool, slots: u64, new_slots: u64, leaves: u64) -> Admission {
        let trims_too = planted!("store_trim_needs_room") && self.state.occupied() + 8 > self.capacity();
        if trims_too {
            return Admission::Full;
        }
        if !privileged && new_slots > 0 && self.state.occupied() + self.inflight_new + new_slots > self.capacity() {
            return Admission::Full;
        }
        let overloaded = self.state.dirty_leaf_count + self.inflight_leaves + leaves
            > 2 * self.options.dirty_leaves_max
            || self.chain_groups >= 2 * self.options.chain_groups_max;
        if overloaded && (self.state.dirty_leaf_count > 0 || self.chain_groups > 0) {
            return Admission::Wait;
        }
        let floor = 8 + if privileged { 0 } else { self.privileged_reserve() };
        let needed =
            self.state.space.group_cost(slots) + self.checkpoint_cost() + self.inflight_leaves + leaves + floor;
        if self.state.space.free() >= needed {
            return Admission::Yes;
        }
        let more_comes = self.state.space.quarantined() > 0 || self.checkpoint.is_some() || !self.groups.is_empty();
        if more_comes || begun {
            return Admission::Wait;
        }
        Admission::Full
    }

    /// Slots writes may not use, so that deletes and version changes always go on.
    fn privileged_reserve(&self) -> u64 {
        32 + (self.state.slot_count / 64).min(512)
    }

    /// Slots that data and leaves may occupy. The rest is working space: one checkpoint's copies, quarantine, headers.
    pub(crate) fn capacity(&self) -> u64 {
        let reserve =
            self.state.slot_count / 32 + 2 * self.state.live.page_count() + 2 * self.privileged_reserve() + 64;
        self.state.slot_count - reserve
    }

    /// Writes a group: takes slots, seals the header, issues one device write a run.
    fn emit_group(&mut self, writer: RecordWriter, data: Vec<Buf>, sums: GroupSums, out: &mut StoreOutput) {
        let mut runs: Vec<Run> = Vec::with_capacity(2);
        self.state.space.take(1 + sums.blocks, &mut runs);
        let number = self.formed.group + 1;
        let fixed = GroupHeader {
            store_uuid: self.store_uuid,
            group: number,
            session: self.formed.session,
            previous: self.formed.header_checksum,
            flushed_through: self.durable,
            // What an earlier session left may be in a cache that a failed flush gave up: the first group claims
            // nothing.
            generation: if self.is_opening() { 0 } else { self.generation },
            next: self.state.space.current,
            after: self.state.space.after,
            runs,
        };
        let mut header = self.header_pool.pop().unwrap_or_else(|| BufMut::zeroed(SLOT));
        let checksum = fixed.encode(&writer, &mut header);
        let header = header.freeze();
        self.record_pool = writer;
        self.formed = fixed.position(checksum);
        self.groups_written += 1;
        self.chain_groups += 1;
        self.chain_blocks += sums.blocks;
        self.inflight_new += sums.new_slots;
        self.inflight_leaves += sums.leaves;
        let mut slices = Slices { bufs: data.into_iter(), rest: None };
        let mut pending = 0;
        for (i, run) in fixed.runs.iter().enumerate() {
            let mut bufs = Vec::with_capacity(8);
            let mut slots = run.len() as usize;
            if i == 0 {
                bufs.push(header.clone());
                slots -= 1;
            }
            slices.take(slots, &mut bufs);
            // The bug to plant: the group counts as written when its header is.
            pending += u32::from(i == 0 || !planted!("store_ack_before_data"));
            let op = DiskOp::Write { offset: run.start * SLOT_U64, bufs };
            let number = if i > 0 && planted!("store_ack_before_data") { 0 } else { number };
            self.issue(Io::Group { number }, op, out);
        }
        self.groups.push_back(Group {
            number,
            header,
            fixed,
            checksum,
            pending,
            finished: sums.finished,
            new_slots: sums.new_slots,
            leaves: sums.leaves,
        });
    }

    /// One device write of a group has completed.
    pub(crate) fn group_written(&mut self, number: u64, out: &mut StoreOutput) {
        if let Some(group) = self.groups.iter_mut().find(|group| group.number == number) {
            group.pending -= 1;
        }
        while self.groups.front().is_some_and(|group| group.pending == 0) {
            let group = self.groups.pop_front().expect("looked at above");
            assert_eq!(group.number, self.applied.group + 1, "groups are applied in order");
            self.inflight_new -= group.new_slots;
            self.inflight_leaves -= group.leaves;
            let mut slots = group.fixed.data_slots();
            let outcome = self.state.apply(&group.header, &mut slots);
            let leftover = slots.next();
            drop(slots);
            if let Err(what) = outcome {
                self.groups.push_front(group);
                self.stop(format!("the index contradicts a change: {what}"), out);
                return;
            }
            assert!(leftover.is_none(), "group {} has a data slot without a checksum", group.number);
            self.state.space.release(group.fixed.runs[0].start);
            self.applied = group.fixed.position(group.checksum);
            for mutation in group.finished {
                self.finish(mutation, group.number, out);
            }
            if let (true, Ok(buf)) = (self.header_pool.len() < HEADER_POOL_MAX, group.header.try_into_mut()) {
                self.header_pool.push(buf);
            }
        }
    }
}

#[derive(Default)]
struct GroupSums {
    blocks: u64,
    new_slots: u64,
    leaves: u64,
    finished: Vec<Mutation>,
}

/// How many blocks of a mutation go into a group with `room` bytes left, and the bytes its record takes. None: the
/// record has no blocks, or nothing fits.
fn piece_of(mutation: &Mutation, room: usize) -> (Option<u32>, usize) {
    let left = mutation.count - mutation.formed;
    match &mutation.change {
        Change::Write { .. } => {
            let wanted = left.min(PIECE_BLOCKS_MAX);
            // Worst case: each block is a run of its own.
            let bytes = WRITE_RECORD_BYTES + wanted as usize * (8 + RUN_BYTES);
            if bytes <= room { (Some(wanted), bytes) } else { (None, bytes) }
        }
        Change::Unmap { .. } if WRITE_RECORD_BYTES <= room => (Some(left.min(UNMAP_BLOCKS_MAX)), WRITE_RECORD_BYTES),
        Change::Unmap { .. } => (None, WRITE_RECORD_BYTES),
        Change::Create(info) => (None, CREATE_RECORD_BYTES + info.tag.len()),
        Change::SetTag(tag) => (None, META_RECORD_BYTES + tag.len()),
        Change::SetLabel(label) => (None, META_RECORD_BYTES + label.len()),
        _ => (None, META_RECORD_BYTES),
    }
}

fn record_piece(mutation: &Mutation, first: u32, blocks: u32, writer: &mut RecordWriter, data: &mut Vec<Buf>) {
    let chunk = mutation.chunk;
    match &mutation.change {
        Change::Write { stamp, checksums, data: buf } => {
            let range = mutation.formed as usize..(mutation.formed + blocks) as usize;
            data.push(if range.len() == checksums.len() {
                buf.clone()
            } else {
                buf.slice(range.start * SLOT, range.len() * SLOT)
            });
            writer.write(chunk, first, stamp, &checksums[range]);
        }
        Change::Unmap { stamp } => writer.unmap(chunk, first, blocks, stamp),
        Change::Create(info) => writer.create(chunk, info),
        Change::Delete => writer.delete(chunk),
        Change::SetVersion(version) => writer.set_version(chunk, *version),
        Change::SetTag(tag) => writer.set_tag(chunk, tag),
        Change::ForgetTail => writer.forget_tail(chunk),
        Change::Fence(volume, epoch) => writer.fence(*volume, *epoch),
        Change::Forget(volume) => writer.forget(*volume),
        Change::SetLabel(label) => writer.set_label(label),
    }
}

/// Hands out the data of a group slot by slot, without copying.
struct Slices {
    bufs: std::vec::IntoIter<Buf>,
    /// A buffer partly handed out, and how far.
    rest: Option<(Buf, usize)>,
}

impl Slices {
    fn take(&mut self, mut slots: usize, out: &mut Vec<Buf>) {
        while slots > 0 {
            let (buf, at) = match self.rest.take() {
                Some(rest) => rest,
                None => (self.bufs.next().expect("a group has as many blocks as data slots"), 0),
            };
            let left = (buf.len() - at) / SLOT;
            if left <= slots {
                slots -= left;
                out.push(if at == 0 { buf } else { buf.slice(at, left * SLOT) });
            } else {
                out.push(buf.slice(at, slots * SLOT));
                self.rest = Some((buf, at + slots * SLOT));
                slots = 0;
            }
        }
    }
}
