//! Frames: the unit every link carries.
//!
//! A frame is a 32-byte header, a *prefix* covered by the header's checksum, and a *payload* covered by the per-block
//! checksums inside the prefix. Control messages are all prefix.

use cairn_env::Buf;
use cairn_stdx::checksum::crc32c;
use cairn_stdx::planted;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First field of every frame.
pub const FRAME_MAGIC: u16 = 0xCA17;
/// Version of the frame layout.
pub const FRAME_VERSION: u8 = 1;
/// Size of [`FrameHeader`] in bytes.
pub const FRAME_HEADER_SIZE: usize = 32;
/// Largest prefix: control messages and data headers.
pub const FRAME_PREFIX_MAX: usize = 16 << 20;
/// Largest payload: the data of one request.
pub const FRAME_PAYLOAD_MAX: usize = 4 << 20;
/// Before a peer has proven itself nothing longer is read from it.
pub const FRAME_UNAUTHENTICATED_MAX: usize = 1024;

/// Header of a frame: 32 bytes, little-endian, no padding.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// Covers bytes 4..32.
    pub header_crc32c: U32,
    /// [`FRAME_MAGIC`].
    pub magic: U16,
    /// [`FRAME_VERSION`].
    pub version: u8,
    /// A [`FrameKind`].
    pub kind: u8,
    /// Number of the request on this link; an answer repeats it.
    pub id: U64,
    /// Length of the prefix in bytes.
    pub prefix_len: U32,
    /// Length of the payload in bytes.
    pub payload_len: U32,
    /// Covers the prefix.
    pub prefix_crc32c: U32,
    /// Written as zero, checked as zero.
    pub reserved: U32,
}
const _: () = assert!(size_of::<FrameHeader>() == FRAME_HEADER_SIZE);

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FrameKind {
    /// A step of the handshake, [`crate::auth`].
    Auth = 1,
    /// A call to a metadata server, [`crate::mds::Call`]; answered by [`FrameKind::MdsReply`].
    MdsCall = 2,
    /// The answer, `Result<MdsReply, MdsError>`.
    MdsReply = 3,
    /// Unasked news from a metadata server, [`crate::mds::Push`]; the id is zero.
    MdsPush = 4,
    /// A rare call to a chunk server, [`crate::cs::CsRequest`]; answered by [`FrameKind::CsReply`].
    CsCall = 5,
    /// The answer, `Result<CsReply, CsError>`.
    CsReply = 6,
    /// Read, write, unmap or flush at a chunk server, [`crate::data`].
    Data = 7,
    /// The answer.
    DataReply = 8,
    /// A message between metadata servers, opaque here.
    Raft = 9,
    /// A piece of a state image between metadata servers, [`crate::mds::ImagePiece`].
    Image = 10,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        use FrameKind::*;
        [Auth, MdsCall, MdsReply, MdsPush, CsCall, CsReply, Data, DataReply, Raft, Image]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A whole frame as received.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// Number of the request on this link.
    pub id: u64,
    /// The checked part.
    pub prefix: Vec<u8>,
    /// The data part, aligned in memory.
    pub payload: Buf,
}

/// Bytes that are no frame. The link is closed: after this nothing on it can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol at all.
    #[error("the peer does not speak Cairn's protocol (first bytes {0:02x?})")]
    Magic([u8; 8]),
    /// Our protocol in another version.
    #[error("the peer speaks frame version {theirs}, this process speaks {FRAME_VERSION}")]
    Version {
        /// The peer's version.
        theirs: u8,
    },
    /// A checksum that does not match.
    #[error("frame {part} checksum is {computed:#010x}, expected {expected:#010x}")]
    Checksum {
        /// `header` or `prefix`.
        part: &'static str,
        /// As carried.
        expected: u32,
        /// As computed.
        computed: u32,
    },
    /// An unknown kind, a reserved field that is not zero, or a length over the limit.
    #[error("frame field {field} has the value {value}, which is not allowed")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Appends a frame without payload to `out`.
pub fn write_frame(out: &mut Vec<u8>, kind: FrameKind, id: u64, prefix: &[u8]) {
    write_frame_head(out, kind, id, prefix, 0);
}

/// Appends header and prefix of a frame whose payload of `payload_len` bytes the caller sends right after.
pub fn write_frame_head(out: &mut Vec<u8>, kind: FrameKind, id: u64, prefix: &[u8], payload_len: usize) {
    assert!(prefix.len() <= FRAME_PREFIX_MAX && payload_len <= FRAME_PAYLOAD_MAX, "frame within its limits");
    let mut header = FrameHeader {
        header_crc32c: U32::ZERO,
        magic: U16::new(FRAME_MAGIC),
        version: FRAME_VERSION,
        kind: kind as u8,
        id: U64::new(id),
        prefix_len: U32::new(prefix.len() as u32),
        payload_len: U32::new(payload_len as u32),
        prefix_crc32c: U32::new(crc32c(prefix)),
        reserved: U32::ZERO,
    };
    header.header_crc32c = U32::new(crc32c(&header.as_bytes()[4..]));
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(prefix);
}

impl FrameHeader {
    /// Checks everything a header alone can tell.
    ///
    /// # Errors
    /// [`FrameError`] naming the first thing wrong.
    pub fn parse(bytes: &[u8; FRAME_HEADER_SIZE], authenticated: bool) -> Result<(FrameHeader, FrameKind), FrameError> {
        let header = FrameHeader::read_from_bytes(bytes).expect("the sizes agree");
        if header.magic.get() != FRAME_MAGIC {
            let mut first = [0u8; 8];
            first.copy_from_slice(&bytes[..8]);
            return Err(FrameError::Magic(first));
        }
        if header.version != FRAME_VERSION {
            return Err(FrameError::Version { theirs: header.version });
        }
        let computed = crc32c(&bytes[4..]);
        if computed != header.header_crc32c.get() {
            return Err(FrameError::Checksum { part: "header", expected: header.header_crc32c.get(), computed });
        }
        let field = |field, value: u64| FrameError::Field { field, value };
        let kind = FrameKind::from_byte(header.kind).ok_or_else(|| field("kind", u64::from(header.kind)))?;
        let (prefix, payload) = (header.prefix_len.get() as usize, header.payload_len.get() as usize);
        let carries_data = matches!(kind, FrameKind::Data | FrameKind::DataReply);
        let prefix_max = if authenticated { FRAME_PREFIX_MAX } else { FRAME_UNAUTHENTICATED_MAX };
        if prefix > prefix_max {
            return Err(field("prefix_len", prefix as u64));
        }
        if payload > if carries_data { FRAME_PAYLOAD_MAX } else { 0 } {
            return Err(field("payload_len", payload as u64));
        }
        if header.reserved.get() != 0 {
            return Err(field("reserved", u64::from(header.reserved.get())));
        }
        if !authenticated && kind != FrameKind::Auth {
            return Err(field("kind before authentication", u64::from(header.kind)));
        }
        Ok((header, kind))
    }
}

/// Cuts a byte stream into frames. Memory grows only as bytes arrive (I19), never by what a header promises.
#[derive(Default)]
pub struct FrameReader {
    bytes: Vec<u8>,
    start: usize,
    authenticated: bool,
}

impl FrameReader {
    /// A reader at the start of a link, before the handshake.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on frames of every kind and size are accepted.
    pub fn set_authenticated(&mut self) {
        self.authenticated = true;
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start * 2 >= self.bytes.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes held and not yet returned as frames.
    pub fn buffered(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// The next whole frame, if all of it has arrived.
    ///
    /// # Errors
    /// [`FrameError`] when the stream is no sequence of frames; the link must be closed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let held = &self.bytes[self.start..];
        let Some(head) = held.first_chunk::<FRAME_HEADER_SIZE>() else { return Ok(None) };
        let (header, kind) = FrameHeader::parse(head, self.authenticated)?;
        let (prefix_len, payload_len) = (header.prefix_len.get() as usize, header.payload_len.get() as usize);
        let body = &held[FRAME_HEADER_SIZE..];
        if planted!("wire_room_by_promise") {
            std::hint::black_box(Vec::<u8>::with_capacity(payload_len));
        }
        if body.len() < prefix_len + payload_len && !planted!("wire_frame_length_unchecked") {
            return Ok(None);
        }
        let prefix = body[..prefix_len].to_vec();
        let computed = crc32c(&prefix);
        if computed != header.prefix_crc32c.get() {
            return Err(FrameError::Checksum { part: "prefix", expected: header.prefix_crc32c.get(), computed });
        }
        let payload = match payload_len {
            0 => Buf::default(),
            len => Buf::copy_from(&body[prefix_len..prefix_len + len]),
        };
        self.start += FRAME_HEADER_SIZE + prefix_len + payload_len;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
        Ok(Some(Frame { kind, id: header.id.get(), prefix, payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_cut_anywhere_arrives_whole() {
        let mut bytes = Vec::new();
        write_frame_head(&mut bytes, FrameKind::Data, 9, b"prefix", 5);
        bytes.extend_from_slice(b"hello");
        for cut in 0..bytes.len() {
            let mut reader = FrameReader::new();
            reader.set_authenticated();
            reader.push(&bytes[..cut]);
            assert!(reader.next_frame().unwrap().is_none());
            reader.push(&bytes[cut..]);
            let frame = reader.next_frame().unwrap().unwrap();
            assert_eq!((frame.id, &frame.prefix[..], &frame.payload[..]), (9, &b"prefix"[..], &b"hello"[..]));
            assert_eq!(reader.buffered(), 0);
        }
    }

    #[test]
    fn strangers_are_told_apart_and_kept_short() {
        let mut reader = FrameReader::new();
        reader.push(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(matches!(reader.next_frame(), Err(FrameError::Magic(_))));
        let mut bytes = Vec::new();
        write_frame(&mut bytes, FrameKind::MdsCall, 1, b"");
        let mut reader = FrameReader::new();
        reader.push(&bytes);
        assert!(matches!(reader.next_frame(), Err(FrameError::Field { .. })), "no call before the handshake");
    }

    proptest! {
        #[test]
        fn any_damage_is_an_error_or_an_incomplete_frame(at in 0usize..38, flip in 1u8..) {
            let mut bytes = Vec::new();
            write_frame(&mut bytes, FrameKind::MdsCall, 3, b"abcdef");
            bytes[at] ^= flip;
            let mut reader = FrameReader::new();
            reader.set_authenticated();
            reader.push(&bytes);
            prop_assert!(!matches!(reader.next_frame(), Ok(Some(_))));
        }

        #[test]
        fn no_bytes_panic_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = FrameReader::new();
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_frame() {}
        }
    }
}
