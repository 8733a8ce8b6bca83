//! Cutting a link's byte stream into frames without copying large payloads twice.
//!
//! All links of a reactor receive into one shared *scratch* buffer. Small frames are cut out of it and only the tail of
//! an unfinished one is kept; a large frame gets a buffer of its own, into which the socket then reads directly. Memory
//! grows with what has arrived, never with what a header promises (I19): up to [`AT_ONCE_MAX`], one per authenticated
//! link, the payload's buffer is made at once; a larger one when a quarter of it is here.

use cairn_env::{Buf, BufMut};
use cairn_stdx::checksum::crc32c;
use cairn_wire::frame::{FRAME_HEADER_SIZE, Frame, FrameError, FrameHeader, FrameKind};

/// Frames up to this size wait for their end as plain bytes; the scratch buffer must be larger.
pub const SMALL_FRAME_MAX: usize = 32 << 10;
/// Payloads up to this size, the largest of the data path, get their buffer with their first byte.
const AT_ONCE_MAX: usize = 1 << 20;
/// What is received into the scratch buffer where a large frame is expected: the rest goes straight to its place.
const HEAD_ROOM: usize = 8 << 10;
/// Less than this is not worth a receive call of its own.
const DIRECT_MIN: usize = 8 << 10;

/// A frame larger than [`SMALL_FRAME_MAX`] of which only a part is here.
struct Large {
    header: FrameHeader,
    kind: FrameKind,
    prefix: Vec<u8>,
    /// The first bytes of the payload, until a quarter of it is here.
    early: Vec<u8>,
    payload: Option<BufMut>,
    filled: usize,
}

/// Cuts one link's stream.
#[derive(Default)]
pub struct Cutter {
    kept: Vec<u8>,
    large: Option<Box<Large>>,
    authenticated: bool,
    /// The last frame was a large one: the next may be, too.
    large_before: bool,
}

impl Cutter {
    /// From now on frames of every kind and size are accepted.
    pub fn set_authenticated(&mut self) {
        self.authenticated = true;
    }

    /// Most bytes to receive into the scratch buffer.
    pub fn scratch_max(&self) -> usize {
        if self.large_before { HEAD_ROOM + self.kept.len() } else { usize::MAX }
    }

    /// The rest of a large payload, when the socket should read straight into it; then call [`Cutter::direct_filled`].
    pub fn direct(&mut self) -> Option<&mut [u8]> {
        let large = self.large.as_mut()?;
        let rest = &mut large.payload.as_mut()?[large.filled..];
        (rest.len() >= DIRECT_MIN).then_some(rest)
    }

    /// `count` bytes were read into [`Cutter::direct`]; gives the frame when that was all of it.
    pub fn direct_filled(&mut self, count: usize) -> Option<Frame> {
        let large = self.large.as_mut().expect("direct() gave its payload");
        large.filled += count;
        self.finish_large()
    }

    /// Puts the kept tail at the start of `scratch`; received bytes belong behind it.
    pub fn restore(&mut self, scratch: &mut [u8]) -> usize {
        let count = self.kept.len();
        scratch[..count].copy_from_slice(&self.kept);
        self.kept.clear();
        count
    }

    /// Keeps bytes for later: at the end of the handshake they belong to frames that were sent ahead.
    pub fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
    }

    /// Takes the next whole frame from the front of `bytes`. At none, `bytes` is used up: what is missing must arrive.
    ///
    /// # Errors
    /// [`FrameError`] when the stream is no sequence of frames.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.large.is_some() {
            return self.continue_large(bytes);
        }
        let Some(head) = bytes.first_chunk::<FRAME_HEADER_SIZE>() else {
            self.keep(std::mem::take(bytes));
            return Ok(None);
        };
        let (header, kind) = FrameHeader::parse(head, self.authenticated)?;
        let (prefix_len, payload_len) = (header.prefix_len.get() as usize, header.payload_len.get() as usize);
        let size = FRAME_HEADER_SIZE + prefix_len + payload_len;
        if bytes.len() < size && size <= SMALL_FRAME_MAX {
            self.keep(std::mem::take(bytes));
            return Ok(None);
        }
        if bytes.len() < size {
            *bytes = &bytes[FRAME_HEADER_SIZE..];
            let (prefix, early) = (Vec::new(), Vec::new());
            self.large = Some(Box::new(Large { header, kind, prefix, early, payload: None, filled: 0 }));
            return self.continue_large(bytes);
        }
        self.large_before = false;
        let (frame, rest) = bytes.split_at(size);
        *bytes = rest;
        let (prefix, payload) = frame[FRAME_HEADER_SIZE..].split_at(prefix_len);
        check_prefix(&header, prefix)?;
        let payload = if payload.is_empty() { Buf::default() } else { Buf::copy_from(payload) };
        Ok(Some(Frame { kind, id: header.id.get(), prefix: prefix.to_vec(), payload }))
    }

    fn continue_large(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        let large = self.large.as_mut().expect("the caller checked");
        let (prefix_len, payload_len) =
            (large.header.prefix_len.get() as usize, large.header.payload_len.get() as usize);
        if large.prefix.len() < prefix_len {
            let (now, later) = bytes.split_at(bytes.len().min(prefix_len - large.prefix.len()));
            large.prefix.extend_from_slice(now);
            *bytes = later;
            if large.prefix.len() < prefix_len {
                return Ok(None);
            }
        }
        if large.filled == 0 {
            check_prefix(&large.header, &large.prefix)?;
        }
        let (now, later) = bytes.split_at(bytes.len().min(payload_len - large.filled));
        *bytes = later;
        large.filled += now.len();
        match &mut large.payload {
            Some(payload) => payload[large.filled - now.len()..large.filled].copy_from_slice(now),
            None => {
                if payload_len > AT_ONCE_MAX && large.filled * 4 < payload_len {
                    large.early.extend_from_slice(now);
                } else {
                    let mut payload = BufMut::recycled(payload_len);
                    let early = std::mem::take(&mut large.early);
                    payload[..early.len()].copy_from_slice(&early);
                    payload[early.len()..large.filled].copy_from_slice(now);
                    large.payload = Some(payload);
                }
            }
        }
        Ok(self.finish_large())
    }

    fn finish_large(&mut self) -> Option<Frame> {
        let payload_len = |large: &Large| large.header.payload_len.get() as usize;
        let large = *self.large.take_if(|large| large.filled == payload_len(large))?;
        self.large_before = true;
        let payload = large.payload.map_or_else(Buf::default, BufMut::freeze);
        Some(Frame { kind: large.kind, id: large.header.id.get(), prefix: large.prefix, payload })
    }
}

fn check_prefix(header: &FrameHeader, prefix: &[u8]) -> Result<(), FrameError> {
    let (computed, expected) = (crc32c(prefix), header.prefix_crc32c.get());
    if computed == expected { Ok(()) } else { Err(FrameError::Checksum { part: "prefix", expected, computed }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_wire::frame::{write_frame, write_frame_head};
    use proptest::prelude::*;

    /// Plays a socket that hands out `stream` in pieces of the given sizes.
    fn cut(stream: &[u8], pieces: &[usize]) -> Result<Vec<(u64, usize, Vec<u8>)>, FrameError> {
        let (mut cutter, mut frames, mut at, mut turn) = (Cutter::default(), Vec::new(), 0, 0);
        cutter.set_authenticated();
        let mut scratch = vec![0u8; 64 << 10];
        while at < stream.len() {
            let want = pieces[turn % pieces.len()].min(stream.len() - at);
            turn += 1;
            if let Some(rest) = cutter.direct() {
                let count = want.min(rest.len());
                rest[..count].copy_from_slice(&stream[at..at + count]);
                at += count;
                frames.extend(cutter.direct_filled(count));
                continue;
            }
            let held = cutter.restore(&mut scratch);
            let count = want.min(scratch.len() - held);
            scratch[held..held + count].copy_from_slice(&stream[at..at + count]);
            at += count;
            let mut bytes = &scratch[..held + count];
            while let Some(frame) = cutter.next(&mut bytes)? {
                frames.push(frame);
            }
        }
        Ok(frames.into_iter().map(|f| (f.id, f.prefix.len(), f.payload.to_vec())).collect())
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_however_the_stream_is_cut(
            sizes in prop::collection::vec((0usize..300, 0usize..200_000), 1..6),
            control in 0usize..200_000,
            pieces in prop::collection::vec(1usize..90_000, 1..8),
        ) {
            let (mut stream, mut expected) = (Vec::new(), Vec::new());
            for (id, (prefix, payload)) in sizes.into_iter().enumerate() {
                let data: Vec<u8> = (0..payload).map(|i| (i * 7 + id) as u8).collect();
                write_frame_head(&mut stream, FrameKind::Data, id as u64, &vec![3; prefix], payload);
                stream.extend_from_slice(&data);
                expected.push((id as u64, prefix, data));
            }
            write_frame(&mut stream, FrameKind::MdsCall, 99, &vec![1; control]);
            expected.push((99, control, Vec::new()));
            prop_assert_eq!(cut(&stream, &pieces), Ok(expected));
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), piece in 1usize..100) {
            let _ = cut(&bytes, &[piece]);
        }
    }

    #[test]
    fn a_promise_alone_allocates_nothing() {
        let mut stream = Vec::new();
        write_frame_head(&mut stream, FrameKind::Data, 1, b"", 4 << 20);
        stream.extend_from_slice(&[0; 1000]);
        let mut cutter = Cutter::default();
        cutter.set_authenticated();
        assert!(cutter.next(&mut &stream[..]).unwrap().is_none());
        assert!(cutter.direct().is_none());
        assert!(cutter.large.unwrap().early.capacity() <= 4 * stream.len());
    }
}
