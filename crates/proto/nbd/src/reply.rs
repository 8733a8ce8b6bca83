//! Replies of the transmission phase, in the three styles a client can choose.

use crate::limits::{BLOCK_STATUS_EXTENTS_MAX, STRING_MAX};
use crate::output::Output;
use crate::request::Ticket;
use crate::wire::{
    ALLOCATION_CONTEXT_ID, EXTENDED_REPLY_MAGIC, Errno, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO,
    STRUCTURED_REPLY_MAGIC, chunk,
};
use cairn_env::Buf;
use cairn_env::block::Extent;

/// How replies are framed; chosen in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// "Simple reply message".
    Simple,
    /// "Structured reply chunk message"; success without data is still a simple reply, as that section allows.
    Structured,
    /// Extension "extended headers": "Extended reply chunk message", always.
    Extended,
}

impl Style {
    /// True when errors carry text and reads can be answered in chunks.
    pub(crate) fn has_chunks(self) -> bool {
        self != Style::Simple
    }

    /// Success without data.
    pub(crate) fn done(self, output: &mut Output, ticket: &Ticket) {
        match self {
            Style::Simple | Style::Structured => simple(output, 0, ticket),
            Style::Extended => self.chunk(output, ticket, chunk::NONE, 0),
        }
    }

    /// The outcome of a read of no bytes: a structured reply, since every read gets one, but no content chunk.
    pub(crate) fn done_reading(self, output: &mut Output, ticket: &Ticket) {
        match self {
            Style::Simple => simple(output, 0, ticket),
            Style::Structured | Style::Extended => self.chunk(output, ticket, chunk::NONE, 0),
        }
    }

    /// Failure; `at` is the offset of the damage when it is known and inside the request.
    pub(crate) fn error(self, output: &mut Output, ticket: &Ticket, errno: Errno, text: &str, at: Option<u64>) {
        if self == Style::Simple {
            return simple(output, errno as u32, ticket);
        }
        let text = shorten(text, STRING_MAX);
        let at = at.filter(|&at| at >= ticket.offset && at - ticket.offset < ticket.len);
        let (kind, size) = match at {
            Some(_) => (chunk::ERROR_OFFSET, 14 + text.len()),
            None => (chunk::ERROR, 6 + text.len()),
        };
        self.chunk(output, ticket, kind, size);
        output.put(&(errno as u32).to_be_bytes());
        output.put(&u16::try_from(text.len()).expect("shortened to 4096").to_be_bytes());
        output.put(text.as_bytes());
        if let Some(at) = at {
            output.put(&at.to_be_bytes());
        }
    }

    /// The bytes of a read, as one content chunk: that also serves a client that asked for no fragments.
    pub(crate) fn data(self, output: &mut Output, ticket: &Ticket, pieces: Vec<Buf>) {
        let size: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert_eq!(size as u64, ticket.len, "the device gives as many bytes as were asked for");
        match self {
            Style::Simple => simple(output, 0, ticket),
            Style::Structured | Style::Extended => {
                self.chunk(output, ticket, chunk::OFFSET_DATA, 8 + size);
                output.put(&ticket.offset.to_be_bytes());
            }
        }
        for piece in pieces {
            output.put_buf(piece);
        }
    }

    /// The extents of a range; neighbours of one kind are joined, and no more than the client wants are sent.
    pub(crate) fn extents(self, output: &mut Output, ticket: &Ticket, extents: &[Extent], one: bool) {
        let count_max = if one { 1 } else { BLOCK_STATUS_EXTENTS_MAX };
        let runs = join(ticket, extents, count_max);
        match self {
            Style::Simple => unreachable!("a status request without structured replies is refused"),
            Style::Structured => {
                self.chunk(output, ticket, chunk::BLOCK_STATUS, 4 + 8 * runs.len());
                output.put(&ALLOCATION_CONTEXT_ID.to_be_bytes());
                for (len, state) in runs {
                    output.put(&u32::try_from(len).expect("a compact request is below 2^32").to_be_bytes());
                    output.put(&state.to_be_bytes());
                }
            }
            Style::Extended => {
                self.chunk(output, ticket, chunk::BLOCK_STATUS_EXT, 8 + 16 * runs.len());
                output.put(&ALLOCATION_CONTEXT_ID.to_be_bytes());
                output.put(&u32::try_from(runs.len()).expect("bounded").to_be_bytes());
                for (len, state) in runs {
                    output.put(&len.to_be_bytes());
                    output.put(&u64::from(state).to_be_bytes());
                }
            }
        }
    }

    /// Header of the only chunk of a reply.
    fn chunk(self, output: &mut Output, ticket: &Ticket, kind: u16, size: usize) {
        let magic = if self == Style::Extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        output.put(&magic.to_be_bytes());
        output.put(&chunk::FLAG_DONE.to_be_bytes());
        output.put(&kind.to_be_bytes());
        output.put(&ticket.cookie.to_be_bytes());
        if self == Style::Extended {
            output.put(&ticket.offset.to_be_bytes());
            output.put(&(size as u64).to_be_bytes());
        } else {
            output.put(&u32::try_from(size).expect("payloads are bounded").to_be_bytes());
        }
    }
}

fn simple(output: &mut Output, error: u32, ticket: &Ticket) {
    output.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    output.put(&error.to_be_bytes());
    output.put(&ticket.cookie.to_be_bytes());
}

/// Joins extents into runs of `(length, state)` and checks that the device covered the range from its start.
fn join(ticket: &Ticket, extents: &[Extent], count_max: usize) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::with_capacity(extents.len().min(count_max));
    let mut covered = 0;
    for extent in extents {
        assert_eq!(extent.offset, ticket.offset + covered, "extents follow each other without a gap");
        assert!(extent.len > 0 && extent.len <= ticket.len - covered, "extents stay inside the range");
        covered += extent.len;
        let state = if extent.data { 0 } else { STATE_HOLE | STATE_ZERO };
        let full = runs.len() == count_max;
        match runs.last_mut() {
            Some((len, last)) if *last == state => *len += extent.len,
            _ if full => break,
            _ => runs.push((extent.len, state)),
        }
    }
    assert!(!runs.is_empty(), "the device describes at least the start of the range");
    runs
}

/// `text` cut to at most `size_max` bytes at a character boundary.
pub(crate) fn shorten(text: &str, size_max: usize) -> &str {
    if text.len() <= size_max {
        return text;
    }
    let end = (0..=size_max).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}
