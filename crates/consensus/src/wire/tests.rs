use super::*;
use crate::members::{Change, Member};
use proptest::prelude::*;

fn identity(id: u64) -> Identity {
    Identity { cluster: ClusterId([7; 16]), id: MdsId(id), instance: 100 + id }
}

fn append() -> Message {
    let mut message = Message { from: 1, to: 2, term: 5, log_term: 4, index: 9, commit: 8, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    let command = Entry { term: 4, index: 10, ..entry::command_entry(b"command".to_vec()) };
    let noop = Entry { term: 5, index: 11, ..Entry::default() };
    let change = entry::change_entry(Change::AddLearner(Member { id: MdsId(3), instance: 103 }));
    message.entries = vec![command, noop, Entry { term: 5, index: 12, ..change }];
    message
}

/// Restores the checksum after a deliberate change.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn golden_bytes_of_an_append() {
    let bytes = encode(&identity(1), &append()).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden = concat!(
        "a9e4b8b1",
        "0100",
        "01",
        "00",
        "07070707070707070707070707070707", // crc, version, kind, flags, cluster
        "0100000000000000",
        "0200000000000000",
        "6500000000000000", // from, to, instance
        "0500000000000000",
        "0400000000000000",
        "0900000000000000", // term, log term, index
        "0800000000000000",
        "0000000000000000",
        "0000000000000000", // commit, commit term, reject hint
        "03000000",
        "00000000",
        "0000000000000000", // entries, context, reserved
        "0400000000000000",
        "0a00000000000000",
        "07000000",
        "01",
        "000000",
        "636f6d6d616e64",
        "0500000000000000",
        "0b00000000000000",
        "00000000",
        "00",
        "000000",
        "0500000000000000",
        "0c00000000000000",
        "18000000",
        "02",
        "000000",
        "0200000000000000",
        "0300000000000000",
        "6700000000000000",
    );
    assert_eq!(hex[8..], golden[8..], "layout");
    assert_eq!(hex[..8], golden[..8], "checksum");
    let (decoded, instance) = decode(&identity(2), MdsId(1), &bytes).unwrap();
    assert_eq!((decoded, instance), (append(), 101));
}

#[test]
fn strangers_are_refused_by_name() {
    let bytes = encode(&identity(1), &append()).unwrap();
    let other = Identity { cluster: ClusterId([8; 16]), ..identity(2) };
    assert_eq!(decode(&other, MdsId(1), &bytes), Err(ReceiveError::OtherCluster(ClusterId([7; 16]))));
    assert!(matches!(decode(&identity(3), MdsId(1), &bytes), Err(ReceiveError::Misdirected { .. })));
    assert!(matches!(decode(&identity(2), MdsId(4), &bytes), Err(ReceiveError::Misdirected { .. })));
    let mut newer = bytes.clone();
    newer[4] = 2;
    assert_eq!(decode(&identity(2), MdsId(1), &sealed(newer)), Err(ReceiveError::Version(2)));
    let mut flipped = bytes;
    flipped[130] ^= 1;
    assert_eq!(decode(&identity(2), MdsId(1), &flipped), Err(ReceiveError::Malformed("checksum")));
}

#[test]
fn a_gap_disguised_by_term_zero_is_refused() {
    let message = Message { log_term: 0, entries: Vec::new(), ..append() };
    let bytes = encode(&identity(1), &message).unwrap();
    assert_eq!(decode(&identity(2), MdsId(1), &bytes), Err(ReceiveError::Malformed("term of the previous entry")));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&identity(2), MdsId(1), &bytes);
    }

    #[test]
    fn damaged_messages_with_a_good_checksum_never_panic(
        edits in proptest::collection::vec((0usize..250, any::<u8>()), 1..8),
        cut in 0usize..250,
    ) {
        let mut bytes = encode(&identity(1), &append()).unwrap();
        for (at, value) in edits {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        bytes[4] = 1;
        bytes[5] = 0;
        if cut > 120 { bytes.truncate(cut); }
        if let Ok((message, _)) = decode(&identity(2), MdsId(1), &sealed(bytes)) {
            prop_assert!(message.entries.len() <= 4);
        }
    }

    #[test]
    fn every_kind_survives_the_round_trip(
        kind in 1u8..12, reject: bool, term in 1u64..NUMBER_MAX, index in 0u64..NUMBER_MAX,
        commit in 0u64..NUMBER_MAX, hint in 0u64..NUMBER_MAX, context in proptest::collection::vec(any::<u8>(), 1..32),
    ) {
        let kind = KINDS.iter().find(|(number, _)| *number == kind).unwrap().1;
        let mut message = Message { from: 1, to: 2, term, index, commit, reject, reject_hint: hint, ..Message::default() };
        message.set_msg_type(kind);
        match kind {
            MessageType::MsgAppend => message.log_term = u64::from(index > 0),
            MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
                message.entries = vec![Entry { data: context, ..Entry::default() }];
                if kind == MessageType::MsgReadIndex { message.term = 0; }
            }
            MessageType::MsgRequestVote => message.context = CAMPAIGN_TRANSFER.to_vec(),
            _ => message.context = context,
        }
        let bytes = encode(&identity(1), &message).unwrap();
        prop_assert_eq!(decode(&identity(2), MdsId(1), &bytes), Ok((message, 101)));
    }
}
