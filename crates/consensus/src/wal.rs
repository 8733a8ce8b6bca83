//! The ring of groups: where the next one goes, what it holds, when it is durable.
//!
//! One group is in flight at a time; what happens meanwhile goes into the next. So a valid group proves that its
//! predecessor was durable, and only the last one can be torn.
//!
//! Space. `live` bytes of entries stay below a sixth of the ring, and so does any group. When the used part would pass
//! half of the ring, the next group is a *checkpoint*: it repeats the whole live log and becomes the head. At that
//! moment at most half is used, the checkpoint needs a sixth and the gap before the ring's end wastes less than
//! another sixth: it always fits, whatever elections and rewritten tails filled the ring with.

use crate::config::Config;
use crate::entry;
use crate::format::{GroupWriter, Place};
use crate::output::SnapshotMeta;
use crate::store::LogStore;
use crate::wire::Identity;
use cairn_env::{Buf, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use std::collections::VecDeque;

/// A group that replay would read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupPlace {
    pub place: Place,
    pub size: u64,
}

struct InFlight {
    io: IoId,
    flushing: bool,
    head: Place,
    covers: u64,
}

/// What a completion led to.
pub(crate) enum Progress {
    /// Another request is needed before the group is durable.
    Next(DiskRequest),
    /// Everything up to this batch of changes is durable.
    Durable(u64),
}

/// The write side of the log.
pub(crate) struct Wal {
    identity: Identity,
    size: u64,
    write_through: bool,
    tail: u64,
    head: Place,
    next_sequence: u64,
    previous_crc32c: u32,
    groups: VecDeque<GroupPlace>,
    in_flight: Option<InFlight>,
    next_io: u64,
    /// The base moved since the last group.
    pub base_dirty: bool,
    /// The intent changed since the last group.
    pub intent_dirty: bool,
    /// Commit index in the last group.
    pub commit_written: u64,
}

/// What recovery found of the ring.
#[derive(Default)]
pub(crate) struct Ring {
    pub groups: VecDeque<GroupPlace>,
    pub previous_crc32c: u32,
    pub commit: u64,
    pub next_io: u64,
}

impl Wal {
    pub fn new(config: &Config, identity: Identity, ring: Ring) -> Self {
        let (first, last) = (ring.groups.front().copied(), ring.groups.back().copied());
        Self {
            identity,
            size: config.log_size_bytes,
            write_through: config.write_through,
            tail: last.map_or(0, |group| group.place.offset + group.size),
            head: first.map_or(Place { sequence: 1, offset: 0 }, |group| group.place),
            next_sequence: last.map_or(1, |group| group.place.sequence + 1),
            previous_crc32c: ring.previous_crc32c,
            groups: ring.groups,
            in_flight: None,
            next_io: ring.next_io,
            base_dirty: false,
            intent_dirty: false,
            commit_written: ring.commit,
        }
    }

    pub fn is_busy(&self) -> bool {
        self.in_flight.is_some()
    }

    fn io(&mut self) -> IoId {
        self.next_io += 1;
        IoId(self.next_io)
    }

    /// Writes a group again where it lies.
    pub fn again(&mut self, (offset, group): (u64, Buf)) -> DiskRequest {
        DiskRequest { io: self.io(), op: DiskOp::Write { offset, bufs: vec![group] } }
    }

    /// A flush that belongs to no group: opening makes what it has read durable before anything relies on it.
    pub fn barrier(&mut self) -> DiskRequest {
        DiskRequest { io: self.io(), op: DiskOp::Flush }
    }

    /// Bytes between head and tail, the gap at the ring's end included.
    pub fn used(&self) -> u64 {
        match self.groups.front() {
            None => 0,
            Some(head) if self.tail > head.place.offset => self.tail - head.place.offset,
            Some(head) => self.size - (head.place.offset - self.tail),
        }
    }

    /// Offset of a free run of `size` bytes at the tail; groups never wrap around the ring's end.
    fn free_run(&self, size: u64) -> Option<u64> {
        let Some(head) = self.groups.front().map(|group| group.place.offset) else {
            return Some(if self.tail + size <= self.size { self.tail } else { 0 });
        };
        if self.tail > head {
            match self.tail + size <= self.size {
                true => Some(self.tail),
                false => (size <= head).then_some(0),
            }
        } else {
            (self.tail + size <= head).then_some(self.tail)
        }
    }

    /// Puts everything that is not on disk yet into one group. `covers` comes back when it is durable.
    pub fn write_group(&mut self, store: &mut LogStore, intent: Option<&SnapshotMeta>, covers: u64) -> DiskRequest {
        assert!(self.in_flight.is_none(), "one group is in flight at a time");
        let from = store.unwritten_from();
        let unwritten: usize = store.entries_from(from).map(entry::encoded_len).sum();
        let (base_index, base_term) = store.base();
        let fixed = 512 + store.base_members().encoded_len() + intent.map_or(0, |meta| meta.members.encoded_len());
        let checkpoint = self.used() + (fixed + unwritten) as u64 + 4096 > self.size / 2;
        let with_base = checkpoint || self.base_dirty;
        let entries_from = if checkpoint { base_index + 1 } else { from };
        let size_hint = fixed + if checkpoint { store.live_bytes() as usize } else { unwritten };

        let mut writer = GroupWriter::new(size_hint);
        writer.hard_state(&store.hard);
        if with_base {
            writer.base(base_index, base_term, store.base_members());
        }
        if self.intent_dirty || (with_base && intent.is_some()) {
            writer.intent(intent);
        }
        if entries_from <= store.last() {
            let count = (store.last() + 1 - entries_from) as usize;
            writer.entries(entries_from, count, store.entries_from(entries_from));
        }

        let size = writer.padded_size();
        let offset = self.free_run(size);
        let offset = offset.unwrap_or_else(|| panic!("a group of {size} bytes finds no room, {} used", self.used()));
        let place = Place { sequence: self.next_sequence, offset };
        let head = match store.first_group() {
            _ if !with_base => self.head,
            Some(group) if !checkpoint => self.place_of(group),
            _ => place,
        };
        let (buf, crc) = writer.seal(&self.identity, place, head, self.previous_crc32c);
        store.set_group(entries_from, place.sequence);

        self.groups.push_back(GroupPlace { place, size });
        self.tail = offset + size;
        self.next_sequence += 1;
        self.previous_crc32c = crc;
        (self.base_dirty, self.intent_dirty) = (false, false);
        self.commit_written = store.hard.commit;
        let io = self.io();
        self.in_flight = Some(InFlight { io, flushing: false, head, covers });
        DiskRequest { io, op: DiskOp::Write { offset, bufs: vec![buf] } }
    }

    fn place_of(&self, sequence: u64) -> Place {
        let first = self.groups.front().expect("a written entry lies in a group").place.sequence;
        let group = self.groups[usize::try_from(sequence - first).expect("groups fit in memory")].place;
        assert_eq!(group.sequence, sequence, "groups are numbered without gaps");
        group
    }

    /// Takes the completion of the group in flight.
    ///
    /// # Errors
    /// The disk's error. Nothing may be assumed about the group, nor retried (I12).
    pub fn done(&mut self, done: &DiskDone) -> Result<Progress, DiskError> {
        let io = self.in_flight.as_ref().map(|group| group.io);
        assert_eq!(io, Some(done.io), "a completion nobody waits for");
        if let Err(error) = &done.result {
            return Err(error.clone());
        }
        let mut group = self.in_flight.take().expect("checked above");
        if !group.flushing && !self.write_through {
            group.flushing = true;
            group.io = self.io();
            let request = DiskRequest { io: group.io, op: DiskOp::Flush };
            self.in_flight = Some(group);
            return Ok(Progress::Next(request));
        }
        self.head = group.head;
        while self.groups.front().is_some_and(|oldest| oldest.place.sequence < group.head.sequence) {
            self.groups.pop_front();
        }
        Ok(Progress::Durable(group.covers))
    }
}
