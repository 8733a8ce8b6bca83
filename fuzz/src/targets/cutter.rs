//! Frames cut out of a byte stream as the reactor does it, compared with the plain reader.

use crate::alloc::measured;
use crate::targets::frames;
use crate::{Bound, Shape, Target};
use cairn_env_real::cutter::Cutter;
use cairn_stdx::checksum::crc64;
use cairn_wire::frame::{Frame, FrameReader};

pub const TARGET: Target = Target {
    name: "cutter",
    covers: "the same stream as the reactor cuts it, in pieces; must give the frames that the plain reader gives",
    entry: "cairn_env_real::cutter::Cutter::next",
    shape: Shape::Bytes,
    bound: Bound {
        base: (1 << 20) + (64 << 10),
        factor: 4,
        why: "an authenticated link may have one payload of up to 1 MiB, the largest of the data path, made room for \
              at its first byte",
    },
    run,
    seal: frames::seal,
    seeds: frames::seeds,
};

const SCRATCH: usize = 64 << 10;

fn print(frame: &Frame) -> (u64, u64, u64) {
    (frame.id, crc64(&frame.prefix), crc64(&frame.payload))
}

fn plain(stream: &[u8], authenticated: bool) -> Vec<(u64, u64, u64)> {
    let mut reader = FrameReader::new();
    if authenticated {
        reader.set_authenticated();
    }
    reader.push(stream);
    let mut frames = Vec::new();
    while let Ok(Some(frame)) = reader.next_frame() {
        frames.push(print(&frame));
    }
    frames
}

fn cut(stream: &[u8], authenticated: bool, piece: usize, scratch: &mut [u8]) -> Vec<(u64, u64, u64)> {
    let (mut cutter, mut frames, mut at) = (Cutter::default(), Vec::new(), 0);
    if authenticated {
        cutter.set_authenticated();
    }
    while at < stream.len() {
        let want = piece.min(stream.len() - at).min(cutter.scratch_max());
        if let Some(rest) = cutter.direct() {
            let count = want.min(rest.len());
            rest[..count].copy_from_slice(&stream[at..at + count]);
            at += count;
            frames.extend(cutter.direct_filled(count).iter().map(print));
            continue;
        }
        let held = cutter.restore(scratch);
        let count = want.min(scratch.len() - held);
        assert!(count > 0, "a full scratch buffer holds no frame and takes no more");
        scratch[held..held + count].copy_from_slice(&stream[at..at + count]);
        at += count;
        let mut bytes = &scratch[..held + count];
        loop {
            match cutter.next(&mut bytes) {
                Ok(Some(frame)) => frames.push(print(&frame)),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
    }
    frames
}

fn run(bytes: &[u8]) {
    let [mode, piece, stream @ ..] = bytes else { return };
    let (authenticated, piece) = (mode & 1 == 1, 1 + usize::from(*piece) * 64);
    let mut scratch = vec![0; SCRATCH];
    let expected = plain(stream, authenticated);
    let found = measured(stream.len(), || cut(stream, authenticated, piece, &mut scratch));
    assert_eq!(found, expected, "two readers of one stream differ");
}
