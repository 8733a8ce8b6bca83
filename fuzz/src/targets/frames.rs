//! Frames cut out of a byte stream: the reader that copies, used by tests and tools.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, seed};
use cairn_stdx::checksum::crc32c;
use cairn_wire::frame::{FRAME_HEADER_SIZE, FrameKind, FrameReader, write_frame, write_frame_head};

pub const TARGET: Target = Target {
    name: "frames",
    covers: "a link's byte stream before and after the handshake, in two pieces",
    entry: "cairn_wire::FrameReader::next_frame",
    shape: Shape::Bytes,
    bound: Bound::STRICT,
    run,
    seal,
    seeds,
};

/// Byte 0: authenticated or not; byte 1: where the stream is cut; then the stream.
fn run(bytes: &[u8]) {
    let [mode, cut, stream @ ..] = bytes else { return };
    let (first, second) = stream.split_at(usize::from(*cut).min(stream.len()));
    measured(stream.len(), || {
        let mut reader = FrameReader::new();
        if mode & 1 == 1 {
            reader.set_authenticated();
        }
        for piece in [first, second] {
            reader.push(piece);
            loop {
                match reader.next_frame() {
                    Ok(Some(frame)) => assert!(frame.prefix.len() + frame.payload.len() <= stream.len()),
                    Ok(None) => break,
                    Err(error) => {
                        let _ = error.to_string();
                        return;
                    }
                }
            }
        }
    });
}

/// Makes the checksums of all frames good.
#[expect(clippy::ptr_arg, reason = "the type of every target's seal")]
pub fn seal(bytes: &mut Vec<u8>) {
    let Some(mut rest) = bytes.get_mut(2..) else { return };
    while rest.len() >= FRAME_HEADER_SIZE {
        let len =
            |at: usize, rest: &[u8]| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four bytes")) as usize;
        let (prefix, payload) = (len(16, rest), len(20, rest));
        if let Some(body) = rest.get(FRAME_HEADER_SIZE..FRAME_HEADER_SIZE.saturating_add(prefix)) {
            let sum = crc32c(body).to_le_bytes();
            rest[24..28].copy_from_slice(&sum);
        }
        let sum = crc32c(&rest[4..FRAME_HEADER_SIZE]).to_le_bytes();
        rest[..4].copy_from_slice(&sum);
        let size = FRAME_HEADER_SIZE + prefix + payload;
        let Some(next) = rest.get_mut(size..) else { return };
        rest = next;
    }
}

/// Streams as they look on a link.
pub fn seeds() -> Seeds {
    let mut hello = vec![0, 40];
    write_frame(&mut hello, FrameKind::Auth, 0, &samples::initiator(None).hello());
    let mut calls = vec![1, 50];
    for (id, (_, call)) in samples::calls().iter().take(5).enumerate() {
        write_frame(&mut calls, FrameKind::MdsCall, id as u64, &cairn_wire::encode(call));
    }
    let mut data = vec![1, 200];
    let (prefix, payload) = samples::write_request();
    write_frame_head(&mut data, FrameKind::Data, 7, &prefix, payload.len());
    data.extend_from_slice(&payload);
    write_frame(&mut data, FrameKind::Raft, 0, b"raft");
    let mut promise = vec![1, 100];
    write_frame_head(&mut promise, FrameKind::DataReply, 9, b"", 4 << 20);
    promise.extend_from_slice(&[5; 300]);
    vec![seed("hello", hello), seed("calls", calls), seed("data", data), seed("promise", promise)]
}
