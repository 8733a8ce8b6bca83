//! A client of the NBD server.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, seed, unsealed};
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockReply, Extent};
use cairn_nbd_proto::wire::option;
use cairn_nbd_proto::{Catalog, Command, Event, ExportInfo, Output, Session, TlsMode};

pub const TARGET: Target = Target {
    name: "nbd",
    covers: "all a client may send: flags, options, requests and payloads, cut anywhere, with requests answered late, \
             early or with an error",
    entry: "cairn_nbd_proto::Session::receive",
    shape: Shape::Bytes,
    bound: Bound {
        base: 2 << 20,
        factor: 8,
        why: "a write of up to 1 MiB has room made for it at its header; replies wait to be sent, up to the limits of \
              a connection",
    },
    run,
    seal: unsealed,
    seeds,
};

struct Shelf;

impl Catalog for Shelf {
    fn get(&self, name: &str) -> Option<ExportInfo> {
        self.list().into_iter().find(|(known, _)| known == name).map(|(name, description)| ExportInfo {
            read_only: name == "iso",
            size: 1 << 40,
            description,
            name,
        })
    }
    fn list(&self) -> Vec<(String, String)> {
        vec![("vm1".into(), "volume vm1".into()), ("iso".into(), String::new())]
    }
}

/// Byte 0: mode; byte 1: size of the pieces; then what the client sends.
fn run(bytes: &[u8]) {
    let [mode, piece, stream @ ..] = bytes else { return };
    let tls = [TlsMode::Off, TlsMode::Off, TlsMode::Optional, TlsMode::Required][usize::from(mode & 3)];
    let piece = 1 + usize::from(*piece) * 16;
    // The answers of the device are the device's memory, not the session's: kept outside.
    let zeros = Buf::zeroed(64 << 10);
    measured(stream.len(), || converse(stream, tls, *mode, piece, &zeros));
}

fn converse(stream: &[u8], tls: TlsMode, mode: u8, piece: usize, zeros: &Buf) {
    let mut output = Output::new();
    let mut session = Session::new(tls, &mut output);
    let (mut held, mut events, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
    for arrived in stream.chunks(piece) {
        let mut arrived = arrived;
        let room = session.payload_mut();
        if !room.is_empty() && held.is_empty() {
            let count = room.len().min(arrived.len());
            room[..count].copy_from_slice(&arrived[..count]);
            session.filled(count, &mut events);
            arrived = &arrived[count..];
        }
        held.extend_from_slice(arrived);
        loop {
            let Ok(count) = session.receive(&held, &Shelf, &mut output, &mut events) else { return };
            held.drain(..count);
            let found = events.len();
            for event in events.drain(..) {
                match event {
                    Event::Request(request) => waiting.push(request),
                    Event::StartTls | Event::Disconnect => return,
                    Event::Started { .. } => {}
                }
            }
            let late = mode & 4 != 0 && waiting.len() < 3;
            if !late {
                for request in waiting.drain(..) {
                    let result = answer(&request.command, mode, zeros);
                    session.finish(request.ticket, result, &mut output);
                }
            }
            if mode & 8 == 0 {
                output.clear();
            }
            if count == 0 && found == 0 {
                break;
            }
        }
        if mode & 16 != 0 {
            session.begin_shutdown();
        }
        assert!(session.in_flight() >= waiting.len());
    }
}

fn answer(command: &Command, mode: u8, zeros: &Buf) -> Result<BlockReply, BlockError> {
    if mode & 32 != 0 {
        return Err(BlockError::NoSpace);
    }
    match command {
        Command::Read { len, .. } => {
            let len = *len as usize;
            let mut pieces = vec![zeros.clone(); len / zeros.len()];
            if !len.is_multiple_of(zeros.len()) {
                pieces.push(zeros.slice(0, len % zeros.len()));
            }
            Ok(BlockReply::Data(pieces))
        }
        Command::BlockStatus { offset, len, .. } => {
            let half = len / 2;
            let first = Extent { offset: *offset, len: half, data: true };
            let second = Extent { offset: offset + half, len: len - half, data: false };
            Ok(BlockReply::Extents([first, second].into_iter().filter(|extent| extent.len > 0).collect()))
        }
        _ => Ok(BlockReply::Done),
    }
}

fn opt(kind: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &kind.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(kind: u32, name: &str) -> Vec<u8> {
    let len = name.len() as u32;
    opt(kind, &[&len.to_be_bytes()[..], name.as_bytes(), &[0, 1, 0, 3]].concat())
}

fn meta(kind: u32, name: &str, query: &str) -> Vec<u8> {
    let (len, query_len) = (name.len() as u32, query.len() as u32);
    let count = 1u32.to_be_bytes();
    opt(kind, &[&len.to_be_bytes()[..], name.as_bytes(), &count, &query_len.to_be_bytes(), query.as_bytes()].concat())
}

fn request(kind: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let head = 0x2560_9513u32.to_be_bytes();
    let cookie = 7u64.to_be_bytes();
    let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
    [&head[..], &flags, &kind, &cookie, &offset.to_be_bytes(), &len.to_be_bytes(), payload].concat()
}

fn extended(kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Vec<u8> {
    let head = 0x21e4_1c71u32.to_be_bytes();
    let cookie = 7u64.to_be_bytes();
    let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
    [&head[..], &flags, &kind, &cookie, &offset.to_be_bytes(), &len.to_be_bytes(), payload].concat()
}

fn seeds() -> Seeds {
    let flags = 3u32.to_be_bytes().to_vec();
    let session = |parts: &[Vec<u8>]| [&[0u8, 200][..], &flags, &parts.concat()].concat();
    let status = meta(option::SET_META_CONTEXT, "vm1", "base:allocation");
    let simple: Vec<Vec<u8>> = vec![
        go(option::GO, "vm1"),
        request(0, 0, 4096, 8192, b""),
        request(1, 1, 0, 16, &[5; 16]),
        request(3, 0, 0, 0, b""),
        request(4, 0, 0, 65_536, b""),
        request(6, 2, 0, 65_536, b""),
        request(2, 0, 0, 0, b""),
    ];
    let structured: Vec<Vec<u8>> = vec![
        opt(option::STRUCTURED_REPLY, b""),
        meta(option::LIST_META_CONTEXT, "vm1", "base:"),
        status.clone(),
        go(option::INFO, "iso"),
        go(option::GO, "vm1"),
        request(0, 4, 0, 4096, b""),
        request(7, 8, 0, 1 << 20, b""),
    ];
    let long: Vec<Vec<u8>> = vec![
        opt(option::EXTENDED_HEADERS, b""),
        status,
        go(option::GO, "vm1"),
        extended(0, 0, 0, 4096, b""),
        extended(1, 32, 0, 4, b"four"),
        extended(7, 0, 0, 1 << 20, b""),
    ];
    let old = vec![opt(option::LIST, b""), opt(option::EXPORT_NAME, b"vm1"), request(0, 0, 0, 512, b"")];
    let promise = vec![go(option::GO, "vm1"), request(1, 0, 0, 1 << 20, &[1; 100])];
    vec![
        seed("simple", session(&simple)),
        seed("structured", session(&structured)),
        seed("extended", session(&long)),
        seed("old", session(&old)),
        seed("promise", session(&promise)),
        seed("tls", [&[2u8, 200][..], &flags, &opt(option::STARTTLS, b"")].concat()),
        seed("abort", session(&[opt(option::ABORT, b"")])),
    ]
}
