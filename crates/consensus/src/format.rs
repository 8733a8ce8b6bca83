//! The log on disk, version 1: a ring of groups, each one device write. Table: docs/formats/raft-log.md.
//!
//! A group is a [`GroupHeader`] and records, padded with zeros to 4096 bytes. It names its own place and number, the
//! checksum of its predecessor's header, and the head: the oldest group that replay needs.

use crate::config::NUMBER_MAX;
use crate::entry;
use crate::members::Members;
use crate::output::SnapshotMeta;
use crate::wire::Identity;
use cairn_env::{Buf, BufMut, DISK_ALIGNMENT};
use cairn_stdx::checksum::crc32c;
use raft::eraftpb::{Entry, HardState};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the layout.
pub const LOG_VERSION: u16 = 1;
/// Marks a group's header; its position in the header lets a scan skip other pages cheaply.
pub const MAGIC: [u8; 8] = *b"CairnRft";
const PAGE: usize = DISK_ALIGNMENT as usize;

/// Header of one group: 128 bytes, little-endian, no padding.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct GroupHeader {
    /// Covers bytes 4..128, so that the header is trusted before the body is read.
    pub header_crc32c: U32,
    /// Covers the records.
    pub body_crc32c: U32,
    /// Bytes of the records, without padding.
    pub body_size_bytes: U32,
    /// [`LOG_VERSION`].
    pub version: U16,
    /// Zero.
    pub flags: U16,
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// A log of another cluster is refused.
    pub cluster_id: [u8; 16],
    /// A log of another node is refused.
    pub node_id: U64,
    /// Drawn when the log was formatted.
    pub instance: U64,
    /// Number of the group: 1, 2, 3, …
    pub sequence: U64,
    /// Where the group lies: a misdirected write is found.
    pub offset: U64,
    /// The oldest group that replay needs once this one is durable.
    pub head_sequence: U64,
    /// Where that group lies.
    pub head_offset: U64,
    /// `header_crc32c` of group `sequence - 1`; zero in the first.
    pub previous_crc32c: U32,
    /// Written as zero, checked as zero.
    pub reserved: [u8; 36],
}
/// Bytes of a [`GroupHeader`].
pub const GROUP_HEADER_SIZE: usize = size_of::<GroupHeader>();
const _: () = assert!(GROUP_HEADER_SIZE == 128);

impl GroupHeader {
    /// Bytes the group occupies.
    pub fn padded_size(&self) -> u64 {
        (GROUP_HEADER_SIZE as u64 + u64::from(self.body_size_bytes.get())).next_multiple_of(DISK_ALIGNMENT)
    }
}

const RECORD_HARD_STATE: u16 = 1;
const RECORD_BASE: u16 = 2;
const RECORD_INTENT: u16 = 3;
const RECORD_ENTRIES: u16 = 4;
const RECORD_HEADER_SIZE: usize = 8;

/// One record of a group.
#[derive(Debug, PartialEq)]
pub(crate) enum Record {
    /// Term, vote and commit index: in every group.
    HardState(HardState),
    /// The log starts after this index, with this configuration: compaction, or an installed state image.
    Base(SnapshotMeta),
    /// A state image is about to be installed; `None` withdraws it.
    Intent(Option<SnapshotMeta>),
    /// Entries that replace everything from their first index on.
    Entries(Vec<Entry>),
}

/// Collects the records of one group.
pub(crate) struct GroupWriter {
    bytes: Vec<u8>,
}

impl GroupWriter {
    pub fn new(size_hint: usize) -> Self {
        let mut bytes = Vec::with_capacity(GROUP_HEADER_SIZE + size_hint);
        bytes.resize(GROUP_HEADER_SIZE, 0);
        Self { bytes }
    }

    fn record(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 6]);
        fill(&mut self.bytes);
        let size = u32::try_from(self.bytes.len() - start - RECORD_HEADER_SIZE).expect("groups are bounded");
        self.bytes[start + 4..start + 8].copy_from_slice(&size.to_le_bytes());
    }

    pub fn hard_state(&mut self, hard: &HardState) {
        let vote = if cairn_stdx::planted!("raft_forget_vote") { 0 } else { hard.vote };
        self.record(RECORD_HARD_STATE, |to| {
            [hard.term, vote, hard.commit].iter().for_each(|number| to.extend_from_slice(&number.to_le_bytes()));
        });
    }

    fn place(&mut self, kind: u16, index: u64, term: u64, members: &Members) {
        self.record(kind, |to| {
            to.extend_from_slice(&index.to_le_bytes());
            to.extend_from_slice(&term.to_le_bytes());
            members.encode(to);
        });
    }

    pub fn base(&mut self, index: u64, term: u64, members: &Members) {
        self.place(RECORD_BASE, index, term, members);
    }

    pub fn intent(&mut self, intent: Option<&SnapshotMeta>) {
        match intent {
            Some(meta) => self.place(RECORD_INTENT, meta.index, meta.term, &meta.members),
            None => self.place(RECORD_INTENT, 0, 0, &Members::default()),
        }
    }

    pub fn entries<'a>(&mut self, first_index: u64, count: usize, entries: impl Iterator<Item = &'a Entry>) {
        self.record(RECORD_ENTRIES, |to| {
            to.extend_from_slice(&first_index.to_le_bytes());
            to.extend_from_slice(&u32::try_from(count).expect("groups are bounded").to_le_bytes());
            to.extend_from_slice(&[0; 4]);
            let mut written = 0;
            for entry in entries {
                entry::encode(entry, to);
                written += 1;
            }
            assert_eq!(written, count, "entries counted and entries written differ");
        });
    }

    /// Bytes the group will occupy.
    pub fn padded_size(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(DISK_ALIGNMENT)
    }

    /// Seals the group for its place. Returns the buffer and the checksum of its header.
    pub fn seal(mut self, identity: &Identity, place: Place, head: Place, previous_crc32c: u32) -> (Buf, u32) {
        assert!(place.sequence >= head.sequence, "the head lies behind the group");
        let body = &self.bytes[GROUP_HEADER_SIZE..];
        let mut header = GroupHeader {
            header_crc32c: U32::new(0),
            body_crc32c: U32::new(crc32c(body)),
            body_size_bytes: U32::new(u32::try_from(body.len()).expect("groups are bounded")),
            version: U16::new(LOG_VERSION),
            flags: U16::new(0),
            magic: MAGIC,
            cluster_id: identity.cluster.0,
            node_id: U64::new(identity.id.0),
            instance: U64::new(identity.instance),
            sequence: U64::new(place.sequence),
            offset: U64::new(place.offset),
            head_sequence: U64::new(head.sequence),
            head_offset: U64::new(head.offset),
            previous_crc32c: U32::new(previous_crc32c),
            reserved: [0; 36],
        };
        header.header_crc32c = U32::new(crc32c(&header.as_bytes()[4..]));
        self.bytes[..GROUP_HEADER_SIZE].copy_from_slice(header.as_bytes());
        let mut buf = BufMut::zeroed(self.bytes.len().next_multiple_of(PAGE));
        buf[..self.bytes.len()].copy_from_slice(&self.bytes);
        (buf.freeze(), header.header_crc32c.get())
    }
}

/// Number and offset of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// Its number.
    pub sequence: u64,
    /// Its offset.
    pub offset: u64,
}

/// The header at the start of `page`, when its checksum is right and it names `offset` as its place.
pub fn read_header(page: &[u8], offset: u64) -> Option<GroupHeader> {
    let (header, _) = GroupHeader::read_from_prefix(page).ok()?;
    let sealed = header.magic == MAGIC && crc32c(&header.as_bytes()[4..]) == header.header_crc32c.get();
    (sealed && header.offset.get() == offset).then_some(header)
}

/// The records of a group's body.
pub(crate) fn read_records(mut body: &[u8]) -> Result<Vec<Record>, &'static str> {
    let mut records = Vec::new();
    while !body.is_empty() {
        let (head, rest) = body.split_first_chunk::<RECORD_HEADER_SIZE>().ok_or("record header is cut")?;
        let kind = u16::from_le_bytes([head[0], head[1]]);
        let size = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if head[2..4] != [0; 2] || size > rest.len() {
            return Err("record header");
        }
        let (payload, rest) = rest.split_at(size);
        records.push(read_record(kind, payload)?);
        body = rest;
    }
    Ok(records)
}

fn read_record(kind: u16, payload: &[u8]) -> Result<Record, &'static str> {
    let number = |at: usize| payload.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    let bounded = |at: usize| number(at).filter(|n| *n < NUMBER_MAX).ok_or("number out of range in a record");
    match kind {
        RECORD_HARD_STATE if payload.len() == 24 => {
            Ok(Record::HardState(HardState { term: bounded(0)?, vote: bounded(8)?, commit: bounded(16)? }))
        }
        RECORD_BASE | RECORD_INTENT => {
            let (index, term) = (bounded(0)?, bounded(8)?);
            let members = Members::decode(&payload[16..]).ok_or("configuration in a record")?;
            if (index == 0) != (term == 0) {
                return Err("index and term of a base or intent");
            }
            let meta = SnapshotMeta { index, term, members };
            Ok(match kind {
                RECORD_BASE => Record::Base(meta),
                _ => Record::Intent((index != 0).then_some(meta)),
            })
        }
        RECORD_ENTRIES if payload.len() > 16 && payload[12..16] == [0; 4] => {
            let count = u32::from_le_bytes(payload[8..12].try_into().expect("four bytes")) as usize;
            Ok(Record::Entries(entry::decode_all(&payload[16..], count, bounded(0)?)?))
        }
        _ => Err("record kind or size"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_types::{ClusterId, MdsId};
    use proptest::prelude::*;

    fn group() -> (Buf, u32) {
        let identity = Identity { cluster: ClusterId([7; 16]), id: MdsId(2), instance: 0x1234 };
        let members = Members { voters: [(MdsId(2), 0x1234)].into(), ..Members::default() };
        let mut writer = GroupWriter::new(0);
        writer.hard_state(&HardState { term: 3, vote: 2, commit: 8 });
        writer.base(5, 2, &members);
        writer.intent(None);
        let entry = Entry { term: 3, index: 6, ..entry::command_entry(b"abc".to_vec()) };
        writer.entries(6, 1, [&entry].into_iter());
        let (place, head) = (Place { sequence: 9, offset: 8192 }, Place { sequence: 4, offset: 4096 });
        writer.seal(&identity, place, head, 0x55)
    }

    #[test]
    fn golden_bytes_of_a_group() {
        let (buf, crc) = group();
        let hex: String = buf[..128 + 163].iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = concat!(
            "b427f4a3",
            "c720bd57",
            "a3000000",
            "0100",
            "0000",
            "436169726e526674", // crcs, body, version, flags, magic
            "07070707070707070707070707070707",
            "0200000000000000",
            "3412000000000000", // cluster, node, instance
            "0900000000000000",
            "0020000000000000",
            "0400000000000000",
            "0010000000000000", // group, offset, head
            "55000000",
            "000000000000000000000000000000000000000000000000000000000000000000000000",
            "01000000",
            "18000000",
            "0300000000000000",
            "0200000000000000",
            "0800000000000000",
            "02000000",
            "28000000",
            "0500000000000000",
            "0200000000000000",
            "0100",
            "0000",
            "00000000",
            "0200000000000000",
            "3412000000000000",
            "03000000",
            "18000000",
            "0000000000000000",
            "0000000000000000",
            "0000000000000000",
            "04000000",
            "2b000000",
            "0600000000000000",
            "01000000",
            "00000000",
            "0300000000000000",
            "0600000000000000",
            "03000000",
            "01",
            "000000",
            "616263",
        );
        assert_eq!(hex[16..golden.len()], golden[16..], "layout");
        assert_eq!(hex[..16], golden[..16], "checksums");
        let header = read_header(&buf, 8192).unwrap();
        assert_eq!((header.sequence.get(), header.header_crc32c.get()), (9, crc));
        assert!(read_header(&buf, 4096).is_none(), "a misdirected group is no group");
        let body = &buf[GROUP_HEADER_SIZE..GROUP_HEADER_SIZE + header.body_size_bytes.get() as usize];
        assert_eq!(read_records(body).unwrap().len(), 4);
    }

    proptest! {
        #[test]
        fn damaged_records_never_panic(edits in proptest::collection::vec((0usize..163, any::<u8>()), 0..6), cut in 0usize..164) {
            let (buf, _) = group();
            let mut body = buf[GROUP_HEADER_SIZE..GROUP_HEADER_SIZE + 163].to_vec();
            for (at, value) in edits { body[at] = value; }
            body.truncate(cut);
            let _ = read_records(&body);
        }
    }
}
