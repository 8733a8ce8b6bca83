//! What waits to be sent on one link: small things in byte runs, large payloads by reference.

use cairn_env::Buf;
use cairn_wire::frame::{FrameKind, write_frame_head};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Slices given to one system call.
pub const SLICES_MAX: usize = 64;
/// Payload pieces below this are copied: a slice of their own would cost more.
const COPY_MAX: usize = 2 << 10;
/// A byte run longer than this is not extended or kept for reuse.
const RUN_MAX: usize = 64 << 10;

enum Piece {
    Run(Vec<u8>),
    Shared(Buf),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Run(bytes) => bytes,
            Piece::Shared(buf) => buf,
        }
    }
}

/// The unsent bytes of a link.
#[derive(Default)]
pub struct Output {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece already sent.
    sent: usize,
    size: usize,
    spare: Vec<u8>,
}

impl Output {
    /// Appends a frame.
    pub fn push_frame(&mut self, kind: FrameKind, id: u64, prefix: &[u8], payload: Vec<Buf>) {
        let payload_len = payload.iter().map(|buf| buf.len()).sum();
        let run = self.run();
        let before = run.len();
        write_frame_head(run, kind, id, prefix, payload_len);
        self.size += run.len() - before;
        for buf in payload {
            self.size += buf.len();
            if buf.len() < COPY_MAX {
                self.run().extend_from_slice(&buf);
            } else {
                self.pieces.push_back(Piece::Shared(buf));
            }
        }
    }

    fn run(&mut self) -> &mut Vec<u8> {
        if !matches!(self.pieces.back(), Some(Piece::Run(run)) if run.len() < RUN_MAX) {
            self.pieces.push_back(Piece::Run(std::mem::take(&mut self.spare)));
        }
        match self.pieces.back_mut() {
            Some(Piece::Run(run)) => run,
            _ => unreachable!("a run was pushed if there was none"),
        }
    }

    /// Unsent bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The next slices to send; returns how many of `slices` are in use.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let mut count = 0;
        let mut skip = self.sent;
        for (piece, slice) in self.pieces.iter().zip(slices.iter_mut()) {
            *slice = IoSlice::new(&piece.bytes()[skip..]);
            skip = 0;
            count += 1;
        }
        count
    }

    /// Forgets `count` bytes that were sent.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.size, "no more can be sent than there was");
        self.size -= count;
        self.sent += count;
        while let Some(first) = self.pieces.front()
            && self.sent >= first.bytes().len()
        {
            self.sent -= first.bytes().len();
            if let Some(Piece::Run(mut run)) = self.pieces.pop_front()
                && run.capacity() <= 2 * RUN_MAX
            {
                run.clear();
                self.spare = run;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_wire::FrameReader;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_the_socket_takes_the_frames_come_out_in_order(
            frames in prop::collection::vec((0usize..500, prop::collection::vec(0usize..9000, 0..4)), 1..12),
            takes in prop::collection::vec(1usize..20_000, 1..6),
        ) {
            let mut output = Output::default();
            let mut reader = FrameReader::new();
            reader.set_authenticated();
            let (mut turn, mut got) = (0, 0u64);
            for (id, (prefix, bufs)) in frames.iter().enumerate() {
                let payload: Vec<Buf> = bufs.iter().map(|len| Buf::copy_from(&vec![id as u8; *len])).collect();
                output.push_frame(FrameKind::Data, id as u64, &vec![7; *prefix], payload);
                while output.size() > 0 {
                    let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                    let count = output.slices(&mut slices);
                    let bytes: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                    prop_assert!(count == SLICES_MAX || bytes.len() == output.size());
                    let take = takes[turn % takes.len()].min(bytes.len());
                    turn += 1;
                    reader.push(&bytes[..take]);
                    output.consume(take);
                    if turn % 3 == 0 && id + 1 < frames.len() {
                        break;
                    }
                }
                while let Some(frame) = reader.next_frame().unwrap() {
                    prop_assert_eq!(frame.id, got);
                    prop_assert_eq!(frame.payload.len(), frames[got as usize].1.iter().sum::<usize>());
                    prop_assert!(frame.payload.iter().all(|byte| *byte == got as u8));
                    got += 1;
                }
            }
            prop_assert_eq!(got, frames.len() as u64);
        }
    }
}
