//! Group headers: one slot of records in front of (or, on a fragmented disk, beside) the data slots they describe.

use super::bytes::{Put, Take};
use super::superblock::{COUNT_MAX, ChainPosition, LABEL_BYTES};
use super::{CHUNK_BLOCKS_MAX, FORMAT_VERSION, Run, SLOT, TAG_BYTES_MAX, VERSION_MAX, is_superblock};
use cairn_env::BufMut;
use cairn_stdx::checksum::crc64;
use cairn_types::{ChunkId, ChunkVersion, Epoch, LayerId, Sequence, VolumeId};

const MAGIC: [u8; 8] = *b"CAIRNGRP";
/// Bytes before the runs.
const FIXED_BYTES: usize = 128;
/// Room for runs and records.
pub(crate) const GROUP_BODY_BYTES: usize = SLOT - FIXED_BYTES;
/// Bytes of one run.
pub(crate) const RUN_BYTES: usize = 8;
/// Bytes of a write record before its checksums.
pub(crate) const WRITE_RECORD_BYTES: usize = 40;
/// Bytes of a create record before its tag.
pub(crate) const CREATE_RECORD_BYTES: usize = 48;

/// The fixed part of a header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct GroupHeader {
    pub store_uuid: [u8; 16],
    pub group: u64,
    pub session: u64,
    /// Checksum of the header of the group before.
    pub previous: u64,
    /// Every group up to this one was durable when this header was written.
    pub flushed_through: u64,
    /// Generation of the newest durable superblock when this header was written.
    pub generation: u64,
    /// Where the next header is.
    pub next: Run,
    pub after: Run,
    /// Slots of this group in order; the first is the header itself.
    pub runs: Vec<Run>,
}

/// One change, as recorded in a group. Borrowed from the header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Record<'a> {
    /// Blocks `first..first + count` of `chunk` got new data in the next `count` data slots of the group.
    Write {
        chunk: ChunkId,
        first: u32,
        stamp: Stamp,
        checksums: Checksums<'a>,
    },
    /// Blocks `first..first + count` hold nothing any more.
    Unmap {
        chunk: ChunkId,
        first: u32,
        count: u32,
        stamp: Stamp,
    },
    Create {
        chunk: ChunkId,
        volume: VolumeId,
        layer: LayerId,
        index: u64,
        block_count: u32,
        version: ChunkVersion,
        tag: &'a [u8],
    },
    Delete {
        chunk: ChunkId,
    },
    SetVersion {
        chunk: ChunkId,
        version: ChunkVersion,
    },
    SetTag {
        chunk: ChunkId,
        tag: &'a [u8],
    },
    Fence {
        volume: VolumeId,
        epoch: Epoch,
    },
    Settle {
        volume: VolumeId,
        epoch: Epoch,
        sequence: Sequence,
    },
    Forget {
        volume: VolumeId,
    },
    ForgetTail {
        chunk: ChunkId,
    },
    SetLabel {
        label: [u8; LABEL_BYTES],
    },
}

/// Version, epoch and sequence of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stamp {
    pub version: ChunkVersion,
    pub epoch: Epoch,
    pub sequence: Sequence,
}

/// The block checksums of a write record, still as bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Checksums<'a>(&'a [u8]);

impl<'a> Checksums<'a> {
    pub(crate) fn len(self) -> u32 {
        (self.0.len() / 8) as u32
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = u64> + 'a {
        self.0.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
    }
}

/// Collects the records of one group.
#[derive(Default)]
pub(crate) struct RecordWriter {
    pub bytes: Vec<u8>,
    pub count: u16,
}

impl RecordWriter {
    fn begin(&mut self, kind: u8, small: u16, word: u32) {
        self.count += 1;
        self.bytes.extend_from_slice(&[kind, 0]);
        self.bytes.extend_from_slice(&small.to_le_bytes());
        self.bytes.extend_from_slice(&word.to_le_bytes());
    }

    fn words(&mut self, words: &[u64]) {
        words.iter().for_each(|word| self.bytes.extend_from_slice(&word.to_le_bytes()));
    }

    pub(crate) fn write(&mut self, chunk: ChunkId, first: u32, stamp: &Stamp, checksums: &[u64]) {
        self.begin(1, checksums.len() as u16, first);
        self.words(&[chunk.0, stamp.version.0, stamp.epoch.0, stamp.sequence.0]);
        self.words(checksums);
    }

    pub(crate) fn unmap(&mut self, chunk: ChunkId, first: u32, count: u32, stamp: &Stamp) {
        self.begin(2, count as u16, first);
        self.words(&[chunk.0, stamp.version.0, stamp.epoch.0, stamp.sequence.0]);
    }

    pub(crate) fn create(&mut self, chunk: ChunkId, info: &crate::chunks::ChunkInfo) {
        self.begin(3, info.tag.len() as u16, info.block_count);
        self.words(&[chunk.0, info.volume.0, info.layer.0, info.index, info.version.0]);
        self.bytes.extend_from_slice(&info.tag);
    }

    pub(crate) fn delete(&mut self, chunk: ChunkId) {
        self.begin(4, 0, 0);
        self.words(&[chunk.0]);
    }

    pub(crate) fn set_version(&mut self, chunk: ChunkId, version: ChunkVersion) {
        self.begin(5, 0, 0);
        self.words(&[chunk.0, version.0]);
    }

    pub(crate) fn set_tag(&mut self, chunk: ChunkId, tag: &[u8]) {
        self.begin(6, tag.len() as u16, 0);
        self.words(&[chunk.0]);
        self.bytes.extend_from_slice(tag);
    }

    pub(crate) fn fence(&mut self, volume: VolumeId, epoch: Epoch) {
        self.begin(7, 0, 0);
        self.words(&[volume.0, epoch.0]);
    }

    pub(crate) fn settle(&mut self, volume: VolumeId, epoch: Epoch, sequence: Sequence) {
        self.begin(8, 0, 0);
        self.words(&[volume.0, epoch.0, sequence.0]);
    }

    pub(crate) fn forget_tail(&mut self, chunk: ChunkId) {
        self.begin(10, 0, 0);
        self.words(&[chunk.0]);
    }

    pub(crate) fn set_label(&mut self, label: &[u8; LABEL_BYTES]) {
        self.begin(11, 0, 0);
        self.bytes.extend_from_slice(label);
    }

    pub(crate) fn forget(&mut self, volume: VolumeId) {
        self.begin(9, 0, 0);
        self.words(&[volume.0]);
    }
}

impl GroupHeader {
    /// Fills `slot` and returns its checksum.
    pub(crate) fn encode(&self, records: &RecordWriter, slot: &mut BufMut) -> u64 {
        assert!(self.runs.len() * RUN_BYTES + records.bytes.len() <= GROUP_BODY_BYTES, "a group fits its header");
        assert_eq!(slot.len(), SLOT, "a header fills a slot");
        slot[..FIXED_BYTES].fill(0);
        let mut put = Put::new(slot);
        put.bytes(&MAGIC);
        put.u64(0);
        put.bytes(&self.store_uuid);
        for word in [self.group, self.session, self.previous, self.flushed_through, self.generation] {
            put.u64(word);
        }
        for word in [self.next.start, self.next.end, self.after.start, self.after.end] {
            put.u64(word);
        }
        put.u16(records.bytes.len() as u16);
        put.u16(records.count);
        put.u16(self.runs.len() as u16);
        put.u16(FORMAT_VERSION);
        put.skip(FIXED_BYTES - put.position());
        for run in &self.runs {
            put.u64(run.start | (run.len() << 48));
        }
        put.bytes(&records.bytes);
        let end = put.position();
        slot[end..].fill(0);
        let checksum = crc64(&slot[16..]);
        slot[8..16].copy_from_slice(&checksum.to_le_bytes());
        checksum
    }

    /// The header in `slot` with its checksum and its records, or none when this is no intact header of this store.
    ///
    /// `Some(Err(field))`: the checksum is good and the content impossible.
    pub(crate) fn decode(
        slot: &[u8],
        store_uuid: &[u8; 16],
        slot_count: u64,
    ) -> Option<Result<(GroupHeader, u64), &'static str>> {
        let mut take = Take::new(slot);
        if slot.len() != SLOT || take.array() != Some(MAGIC) {
            return None;
        }
        let checksum = take.u64()?;
        if take.array() != Some(*store_uuid) || checksum != crc64(&slot[16..]) {
            return None;
        }
        let (group, session, previous, flushed_through, generation) =
            (take.u64()?, take.u64()?, take.u64()?, take.u64()?, take.u64()?);
        let next = Run { start: take.u64()?, end: take.u64()? };
        let after = Run { start: take.u64()?, end: take.u64()? };
        let (record_bytes, _records, run_count, version) = (take.u16()?, take.u16()?, take.u16()?, take.u16()?);
        if version != FORMAT_VERSION {
            return Some(Err("version"));
        }
        if group > COUNT_MAX || session > COUNT_MAX {
            return Some(Err("counters"));
        }
        if !next.is_valid(slot_count) || next.is_empty() || !after.is_valid(slot_count) {
            return Some(Err("next"));
        }
        if usize::from(run_count) * RUN_BYTES + usize::from(record_bytes) > GROUP_BODY_BYTES || run_count == 0 {
            return Some(Err("lengths"));
        }
        let mut take = Take::new(&slot[FIXED_BYTES..]);
        let mut runs = Vec::with_capacity(usize::from(run_count));
        for _ in 0..run_count {
            let word = take.u64()?;
            let (start, len) = (word & ((1 << 48) - 1), word >> 48);
            let run = Run { start, end: start + len };
            if !run.is_valid(slot_count) || run.is_empty() || (run.start..run.end).any(is_superblock) {
                return Some(Err("runs"));
            }
            runs.push(run);
        }
        // Each data slot has a checksum in a record: more slots than that are never read, however runs overlap (I19).
        if runs.iter().map(|run| run.len()).sum::<u64>() > 1 + u64::from(record_bytes) / 8 {
            return Some(Err("runs"));
        }
        let header = GroupHeader {
            store_uuid: *store_uuid,
            group,
            session,
            previous,
            flushed_through,
            generation,
            next,
            after,
            runs,
        };
        Some(Ok((header, checksum)))
    }

    /// Where the chain goes on after this header.
    pub(crate) fn position(&self, header_checksum: u64) -> ChainPosition {
        ChainPosition {
            group: self.group,
            session: self.session,
            header_checksum,
            current: self.next,
            after: self.after,
        }
    }

    /// Data slots in order.
    pub(crate) fn data_slots(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().flat_map(|run| run.start..run.end).skip(1)
    }
}

/// The records of an encoded header; call only with a slot that [`GroupHeader::decode`] accepted or that we encoded.
pub(crate) fn records(slot: &[u8]) -> Records<'_> {
    let field = |at: usize| usize::from(u16::from_le_bytes([slot[at], slot[at + 1]]));
    let start = FIXED_BYTES + field(108) * RUN_BYTES;
    Records { take: Take::new(&slot[start..start + field(104)]), left: field(106) }
}

/// Iterates records; an item is an error when the bytes make no sense.
pub(crate) struct Records<'a> {
    take: Take<'a>,
    left: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return (!self.take.is_empty()).then(|| {
                self.take = Take::new(&[]);
                Err("bytes after the last record")
            });
        }
        self.left -= 1;
        let record = decode_record(&mut self.take);
        if record.is_none() {
            self.left = 0;
            self.take = Take::new(&[]);
        }
        Some(record.ok_or("record cut short or out of range"))
    }
}

fn decode_record<'a>(take: &mut Take<'a>) -> Option<Record<'a>> {
    let [kind, _] = take.array()?;
    let (small, word) = (take.u16()?, take.u32()?);
    let version = |v: u64| (v <= VERSION_MAX).then_some(ChunkVersion(v));
    let range = |first: u32, count: u32| {
        (count > 0 && first.checked_add(count).is_some_and(|end| end <= CHUNK_BLOCKS_MAX)).then_some(())
    };
    Some(match kind {
        1 | 2 => {
            let chunk = ChunkId(take.u64()?);
            let stamp =
                Stamp { version: version(take.u64()?)?, epoch: Epoch(take.u64()?), sequence: Sequence(take.u64()?) };
            range(word, u32::from(small))?;
            if kind == 1 {
                let checksums = Checksums(take.bytes(usize::from(small) * 8)?);
                Record::Write { chunk, first: word, stamp, checksums }
            } else {
                Record::Unmap { chunk, first: word, count: u32::from(small), stamp }
            }
        }
        3 => {
            let chunk = ChunkId(take.u64()?);
            let (volume, layer, index) = (VolumeId(take.u64()?), LayerId(take.u64()?), take.u64()?);
            let version = version(take.u64()?)?;
            let tag = take.bytes(usize::from(small))?;
            range(0, word)?;
            (tag.len() <= TAG_BYTES_MAX).then_some(())?;
            Record::Create { chunk, volume, layer, index, block_count: word, version, tag }
        }
        4 => Record::Delete { chunk: ChunkId(take.u64()?) },
        5 => Record::SetVersion { chunk: ChunkId(take.u64()?), version: version(take.u64()?)? },
        6 => {
            let chunk = ChunkId(take.u64()?);
            let tag = take.bytes(usize::from(small))?;
            (tag.len() <= TAG_BYTES_MAX).then_some(())?;
            Record::SetTag { chunk, tag }
        }
        7 => Record::Fence { volume: VolumeId(take.u64()?), epoch: Epoch(take.u64()?) },
        8 => {
            Record::Settle { volume: VolumeId(take.u64()?), epoch: Epoch(take.u64()?), sequence: Sequence(take.u64()?) }
        }
        9 => Record::Forget { volume: VolumeId(take.u64()?) },
        10 => Record::ForgetTail { chunk: ChunkId(take.u64()?) },
        11 => Record::SetLabel { label: take.array()? },
        _ => return None,
    })
}
