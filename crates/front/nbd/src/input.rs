//! The receive buffer of a connection.

use cairn_nbd_proto::limits::RECEIVE_BUFFER_MIN;

/// Size of the buffer: one read takes in a queue of 64 writes of 4 KiB.
const INPUT_SIZE: usize = 256 << 10;

const _: () = assert!(INPUT_SIZE >= RECEIVE_BUFFER_MIN, "the session must always be able to go on");

/// Bytes received and not yet taken by the session.
pub(crate) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; INPUT_SIZE], start: 0, end: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Drops `count` bytes from the front.
    pub(crate) fn take(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "the session took more than there was");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where the next bytes go; empty when there is no room.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.end == self.bytes.len() && self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were put into the [`space`](Self::space).
    pub(crate) fn filled(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.bytes.len(), "more was received than there was space");
    }

    /// Everything, leaving nothing.
    pub(crate) fn take_all(&mut self) -> Vec<u8> {
        let all = self.bytes().to_vec();
        (self.start, self.end) = (0, 0);
        all
    }
}
