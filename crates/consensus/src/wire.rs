//! Messages between nodes: our own layout, version 1. Table: docs/formats/raft-log.md, second part.
//!
//! Decoding never panics, allocates at most four times the input, and lets only those combinations of fields through
//! that the consensus library accepts without panicking.

use crate::config::NUMBER_MAX;
use crate::entry;
use crate::error::ReceiveError;
use cairn_stdx::checksum::crc32c;
use cairn_types::{ClusterId, MdsId};
use raft::eraftpb::{Entry, Message, MessageType};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the layout.
pub const WIRE_VERSION: u16 = 1;
/// Bytes of context a message may carry: the id of a round of reads.
pub const CONTEXT_SIZE_MAX: usize = 32;

const FLAG_REJECT: u8 = 1;
const FLAG_TRANSFER: u8 = 2;
/// The library marks elections asked for by a leader with this context; on the wire it is a flag.
const CAMPAIGN_TRANSFER: &[u8] = b"CampaignTransfer";

/// Before each message: 112 bytes, little-endian, no padding.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct MessageHeader {
    crc32c: U32, // Covers bytes 4 to the end of the message.
    version: U16,
    kind: u8,
    flags: u8,
    cluster_id: [u8; 16],
    from: U64,
    to: U64,
    instance: U64, // Of the sender.
    term: U64,
    log_term: U64,
    index: U64,
    commit: U64,
    commit_term: U64,
    reject_hint: U64,
    entry_count: U32,
    context_size_bytes: U32,
    reserved: [u8; 8],
}
const HEADER_SIZE: usize = size_of::<MessageHeader>();
const _: () = assert!(HEADER_SIZE == 112);

/// Who sends: goes into each header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub id: MdsId,
    /// The instance of its log.
    pub instance: u64,
}

/// Kinds on the wire; the numbers are ours and fixed.
const KINDS: [(u8, MessageType); 12] = [
    (1, MessageType::MsgAppend),
    (2, MessageType::MsgAppendResponse),
    (3, MessageType::MsgRequestVote),
    (4, MessageType::MsgRequestVoteResponse),
    (5, MessageType::MsgHeartbeat),
    (6, MessageType::MsgHeartbeatResponse),
    (7, MessageType::MsgTimeoutNow),
    (8, MessageType::MsgReadIndex),
    (9, MessageType::MsgReadIndexResp),
    (10, MessageType::MsgRequestPreVote),
    (11, MessageType::MsgRequestPreVoteResponse),
    (0, MessageType::MsgHup), // Never sent, never accepted; keeps the table total.
];

/// True for the kinds that a leader or candidate counts towards a majority.
pub(crate) fn counts(kind: MessageType) -> bool {
    matches!(
        kind,
        MessageType::MsgAppendResponse
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVoteResponse
    )
}

/// The bytes of `message`, or nothing for kinds that do not travel.
pub(crate) fn encode(identity: &Identity, message: &Message) -> Option<Vec<u8>> {
    let kind_of = message.get_msg_type();
    let kind = KINDS.iter().find(|(number, kind)| *kind == kind_of && *number != 0)?.0;
    let is_read = matches!(kind_of, MessageType::MsgReadIndex | MessageType::MsgReadIndexResp);
    // Rounds of reads travel in the data of one entry inside the library, in the context on the wire.
    let (context, entries): (&[u8], &[Entry]) = match (is_read, message.context.as_slice()) {
        (true, _) => (&message.entries.first()?.data, &[]),
        (false, CAMPAIGN_TRANSFER) => (&[], &message.entries),
        (false, context) => (context, &message.entries),
    };
    assert!(context.len() <= CONTEXT_SIZE_MAX, "a context of {} bytes", context.len());
    let mut flags = 0;
    flags |= if message.reject { FLAG_REJECT } else { 0 };
    flags |= if message.context == CAMPAIGN_TRANSFER { FLAG_TRANSFER } else { 0 };
    let size = HEADER_SIZE + context.len() + entries.iter().map(entry::encoded_len).sum::<usize>();
    let mut bytes = Vec::with_capacity(size);
    let header = MessageHeader {
        crc32c: U32::new(0),
        version: U16::new(WIRE_VERSION),
        kind,
        flags,
        cluster_id: identity.cluster.0,
        from: U64::new(message.from),
        to: U64::new(message.to),
        instance: U64::new(identity.instance),
        term: U64::new(message.term),
        log_term: U64::new(message.log_term),
        index: U64::new(message.index),
        commit: U64::new(message.commit),
        commit_term: U64::new(message.commit_term),
        reject_hint: U64::new(message.reject_hint),
        entry_count: U32::new(u32::try_from(entries.len()).expect("messages are bounded")),
        context_size_bytes: U32::new(context.len() as u32),
        reserved: [0; 8],
    };
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(context);
    for entry in entries {
        entry::encode(entry, &mut bytes);
    }
    let crc = crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    Some(bytes)
}

/// Reads a message that arrived on the connection of `expected`. Returns it with the sender's instance.
pub(crate) fn decode(me: &Identity, expected: MdsId, bytes: &[u8]) -> Result<(Message, u64), ReceiveError> {
    let malformed = ReceiveError::Malformed;
    let (header, body) = MessageHeader::read_from_prefix(bytes).map_err(|_| malformed("header is cut"))?;
    if header.version.get() != WIRE_VERSION {
        return Err(ReceiveError::Version(header.version.get()));
    }
    if crc32c(&bytes[4..]) != header.crc32c.get() {
        return Err(malformed("checksum"));
    }
    if header.cluster_id != me.cluster.0 {
        return Err(ReceiveError::OtherCluster(ClusterId(header.cluster_id)));
    }
    let (from, to) = (MdsId(header.from.get()), MdsId(header.to.get()));
    if from != expected || to != me.id || from == to {
        return Err(ReceiveError::Misdirected { from, to, expected });
    }
    let numbers = [header.from, header.term, header.log_term, header.index, header.commit, header.commit_term];
    if numbers.iter().chain([&header.reject_hint]).any(|number| number.get() >= NUMBER_MAX) || from.0 == 0 {
        return Err(malformed("a number is out of range"));
    }
    if header.flags & !(FLAG_REJECT | FLAG_TRANSFER) != 0 || header.reserved != [0; 8] || header.instance.get() == 0 {
        return Err(malformed("flags, instance or reserved bytes"));
    }
    let kind = KINDS.iter().find(|(number, _)| *number == header.kind && *number != 0);
    let kind = kind.ok_or(malformed("kind"))?.1;
    let context_size = header.context_size_bytes.get() as usize;
    if context_size > CONTEXT_SIZE_MAX || context_size > body.len() {
        return Err(malformed("context size"));
    }
    let (context, rest) = body.split_at(context_size);
    let mut message = Message {
        from: from.0,
        to: to.0,
        term: header.term.get(),
        log_term: header.log_term.get(),
        index: header.index.get(),
        commit: header.commit.get(),
        commit_term: header.commit_term.get(),
        reject: header.flags & FLAG_REJECT != 0,
        reject_hint: header.reject_hint.get(),
        ..Message::default()
    };
    message.set_msg_type(kind);
    let count = header.entry_count.get() as usize;
    if kind == MessageType::MsgAppend {
        message.entries = entry::decode_all(rest, count, message.index + 1).map_err(malformed)?;
        // A position of term zero exists only before the first entry; elsewhere the library would take it for a match.
        if (message.log_term == 0) != (message.index == 0) || message.log_term > message.term {
            return Err(malformed("term of the previous entry"));
        }
        let ordered = message.entries.first().is_none_or(|first| first.term >= message.log_term);
        if !ordered || message.entries.last().is_some_and(|last| last.term > message.term) {
            return Err(malformed("entry term"));
        }
    } else if count != 0 || !rest.is_empty() {
        return Err(malformed("entries in a message without"));
    }
    match kind {
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
            if context.is_empty() {
                return Err(malformed("a read without its round"));
            }
            message.entries = vec![Entry { data: context.to_vec(), ..Entry::default() }];
        }
        _ => message.context = context.to_vec(),
    }
    if (message.term == 0) != (kind == MessageType::MsgReadIndex) {
        return Err(malformed("term"));
    }
    if header.flags & FLAG_TRANSFER != 0 {
        if kind != MessageType::MsgRequestVote || !context.is_empty() {
            return Err(malformed("transfer flag"));
        }
        message.context = CAMPAIGN_TRANSFER.to_vec();
    }
    Ok((message, header.instance.get()))
}

#[cfg(test)]
mod tests;
