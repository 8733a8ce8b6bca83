//! Entries as bytes, the same on disk and between nodes, and what an entry says.

use crate::config::NUMBER_MAX;
use crate::members::Change;
use raft::eraftpb::{Entry, EntryType};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Before each entry's payload: 24 bytes, little-endian. Table: docs/formats/raft-log.md.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct EntryHeader {
    term: U64,
    index: U64,
    size_bytes: U32, // Of the payload that follows.
    kind: u8,
    reserved: [u8; 3],
}
/// Bytes of an entry besides its payload.
pub(crate) const ENTRY_HEADER_SIZE: usize = size_of::<EntryHeader>();
const _: () = assert!(ENTRY_HEADER_SIZE == 24);
// A decoded entry costs less than four times the bytes it came from, even when it is empty (I19).
const _: () = assert!(size_of::<Entry>() <= 4 * ENTRY_HEADER_SIZE);

const KIND_NOOP: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_CHANGE: u8 = 2;

/// What an entry says. Commands travel in `data`; configuration changes in `context`, with empty `data`, because the
/// library insists on reading the data of a change as protobuf when it is proposed, and empty data is valid protobuf.
pub(crate) enum Content {
    Noop,
    Command(Vec<u8>),
    Change(Change),
}

pub(crate) fn command_entry(data: Vec<u8>) -> Entry {
    Entry { data, ..Entry::default() }
}

pub(crate) fn change_entry(change: Change) -> Entry {
    let mut entry = Entry { context: change.encode().to_vec(), ..Entry::default() };
    entry.set_entry_type(EntryType::EntryConfChange);
    entry
}

/// Takes the content out of an entry that was made or checked by this module.
pub(crate) fn content(entry: Entry) -> Content {
    if entry.entry_type == EntryType::EntryConfChange as i32 {
        let change = Change::decode(&entry.context).expect("configuration entries are checked when they are decoded");
        Content::Change(change)
    } else if entry.data.is_empty() {
        Content::Noop
    } else {
        Content::Command(entry.data)
    }
}

/// Bytes of the encoding of `entry`.
pub(crate) fn encoded_len(entry: &Entry) -> usize {
    ENTRY_HEADER_SIZE + entry.data.len() + entry.context.len()
}

pub(crate) fn encode(entry: &Entry, to: &mut Vec<u8>) {
    let is_change = entry.entry_type == EntryType::EntryConfChange as i32;
    assert!(entry.data.is_empty() || entry.context.is_empty(), "an entry has data or context, never both");
    let (kind, payload) = match (is_change, entry.data.is_empty()) {
        (true, _) => (KIND_CHANGE, &entry.context),
        (false, true) => (KIND_NOOP, &entry.data),
        (false, false) => (KIND_COMMAND, &entry.data),
    };
    let header = EntryHeader {
        term: U64::new(entry.term),
        index: U64::new(entry.index),
        size_bytes: U32::new(u32::try_from(payload.len()).expect("commands are bounded")),
        kind,
        reserved: [0; 3],
    };
    to.extend_from_slice(header.as_bytes());
    to.extend_from_slice(payload);
}

/// Reads `count` entries with consecutive indexes from `first_index` and non-decreasing terms; nothing may remain.
pub(crate) fn decode_all(mut bytes: &[u8], count: usize, first_index: u64) -> Result<Vec<Entry>, &'static str> {
    if count > bytes.len() / ENTRY_HEADER_SIZE || first_index == 0 || first_index >= NUMBER_MAX {
        return Err("entry count or first index");
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(count);
    for i in 0..count {
        let (header, rest) = EntryHeader::read_from_prefix(bytes).map_err(|_| "entry header is cut")?;
        let size = header.size_bytes.get() as usize;
        if size > rest.len() {
            return Err("entry payload is cut");
        }
        let (payload, rest) = rest.split_at(size);
        let (term, index) = (header.term.get(), header.index.get());
        if index != first_index + i as u64 {
            return Err("entry index");
        }
        if term == 0 || term >= NUMBER_MAX || entries.last().is_some_and(|previous| previous.term > term) {
            return Err("entry term");
        }
        if header.reserved != [0; 3] {
            return Err("entry reserved bytes");
        }
        let mut entry = Entry { term, index, ..Entry::default() };
        match header.kind {
            KIND_NOOP if payload.is_empty() => {}
            KIND_COMMAND if !payload.is_empty() => entry.data = payload.to_vec(),
            KIND_CHANGE if Change::decode(payload).is_some() => {
                entry.set_entry_type(EntryType::EntryConfChange);
                entry.context = payload.to_vec();
            }
            _ => return Err("entry kind or payload"),
        }
        entries.push(entry);
        bytes = rest;
    }
    if bytes.is_empty() { Ok(entries) } else { Err("bytes after the last entry") }
}
