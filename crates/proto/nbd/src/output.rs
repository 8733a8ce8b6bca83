//! Bytes on their way to a client: small pieces gathered in one buffer, large payloads passed on without a copy.

use cairn_env::Buf;
use std::collections::VecDeque;
use std::io::IoSlice;

/// A payload up to this size is copied beside its header: cheaper than one more entry in the vector of a send.
const COPY_MAX: usize = 16 << 10;
/// A gathered buffer is closed at this size, so that what was sent gives its memory back.
const GATHER_MAX: usize = 128 << 10;

enum Segment {
    Gathered(Vec<u8>),
    Shared(Buf),
}

impl Segment {
    fn bytes(&self) -> &[u8] {
        match self {
            Segment::Gathered(bytes) => bytes,
            Segment::Shared(buf) => buf,
        }
    }
}

/// A queue of bytes. The encoders of this crate append to it; a shell sends from its front.
#[derive(Default)]
pub struct Output {
    segments: VecDeque<Segment>,
    sent_of_first: usize,
    len: usize,
    spare: Vec<u8>,
}

impl Output {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of `bytes`.
    pub fn put(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.len += bytes.len();
        if let Some(Segment::Gathered(last)) = self.segments.back_mut()
            && last.len() + bytes.len() <= GATHER_MAX
        {
            last.extend_from_slice(bytes);
            return;
        }
        let mut fresh = std::mem::take(&mut self.spare);
        fresh.extend_from_slice(bytes);
        self.segments.push_back(Segment::Gathered(fresh));
    }

    /// Appends a payload; a large one is shared, not copied.
    pub fn put_buf(&mut self, buf: Buf) {
        if buf.len() <= COPY_MAX {
            self.put(&buf);
        } else {
            self.len += buf.len();
            self.segments.push_back(Segment::Shared(buf));
        }
    }

    /// Fills `slices` with the bytes at the front, in order; returns how many slices it filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.sent_of_first;
        let mut filled = 0;
        for (slice, segment) in slices.iter_mut().zip(&self.segments) {
            *slice = IoSlice::new(&segment.bytes()[skip..]);
            skip = 0;
            filled += 1;
        }
        filled
    }

    /// The first contiguous run of bytes; empty when nothing waits.
    pub fn front(&self) -> &[u8] {
        self.segments.front().map_or(&[], |segment| &segment.bytes()[self.sent_of_first..])
    }

    /// Drops `count` bytes from the front: they were sent.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.len, "{count} bytes sent of {}", self.len);
        self.len -= count;
        self.sent_of_first += count;
        while let Some(first) = self.segments.front() {
            let size = first.bytes().len();
            if self.sent_of_first < size {
                break;
            }
            self.sent_of_first -= size;
            if let Some(Segment::Gathered(mut bytes)) = self.segments.pop_front()
                && bytes.capacity() > self.spare.capacity()
                && bytes.capacity() <= 2 * GATHER_MAX
            {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }

    /// Drops everything: there is nobody left to send to.
    pub fn clear(&mut self) {
        self.advance(self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(output: &mut Output, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); 3];
            let filled = output.slices(&mut slices);
            assert_eq!(output.front().as_ptr(), slices[0].as_ptr());
            let mut left = step;
            for slice in &slices[..filled] {
                let count = left.min(slice.len());
                all.extend_from_slice(&slice[..count]);
                left -= count;
            }
            output.advance(step - left);
        }
        all
    }

    #[test]
    fn bytes_leave_in_the_order_they_came_whatever_the_size_of_a_send() {
        for step in [7, 4096, 1 << 20] {
            let (mut output, mut expected) = (Output::new(), Vec::new());
            for i in 0..40u32 {
                let piece = vec![i as u8; (i as usize * 977) % 40_000];
                if i % 3 == 0 {
                    output.put_buf(Buf::copy_from(&piece))
                } else {
                    output.put(&piece)
                }
                expected.extend_from_slice(&piece);
            }
            assert_eq!(output.len(), expected.len());
            assert!(drain(&mut output, step) == expected, "step {step}");
            output.put(b"again");
            assert_eq!(drain(&mut output, step), b"again");
        }
    }
}
