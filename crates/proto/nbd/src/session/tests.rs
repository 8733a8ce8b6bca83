//! Transcripts, refusals, limits, and the property that no input and no cutting of it does harm.

use super::*;
use crate::catalog::ExportInfo;
use crate::limits::*;
use crate::request::Command;
use crate::wire::*;
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockReply, Extent};
use proptest::prelude::*;

struct Shelf(Vec<ExportInfo>);

impl Catalog for Shelf {
    fn get(&self, name: &str) -> Option<ExportInfo> {
        self.0.iter().find(|export| export.name == name).cloned()
    }
    fn list(&self) -> Vec<(String, String)> {
        self.0.iter().map(|export| (export.name.clone(), export.description.clone())).collect()
    }
}

fn export(name: &str, size: u64, read_only: bool) -> ExportInfo {
    ExportInfo { name: name.to_owned(), description: format!("volume {name}"), size, read_only }
}

fn shelf() -> Shelf {
    Shelf(vec![export("vm1", 1 << 30, false), export("iso", 1 << 20, true)])
}

/// A session with everything around it.
struct Peer {
    session: Session,
    shelf: Shelf,
    input: Vec<u8>,
    output: Output,
    events: Vec<Event>,
}

impl Peer {
    fn new(tls: TlsMode) -> Self {
        let mut output = Output::new();
        let session = Session::new(tls, &mut output);
        Self { session, shelf: shelf(), input: Vec::new(), output, events: Vec::new() }
    }

    /// A connection whose greeting and client flags are over.
    fn haggling(tls: TlsMode) -> Self {
        let mut peer = Self::new(tls);
        assert_eq!(peer.sent(), [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat());
        peer.send(&3u32.to_be_bytes()).unwrap();
        peer
    }

    /// A connection in the transmission phase on `name`, after `options`.
    fn started(name: &str, options: &[u32]) -> Self {
        let mut peer = Self::haggling(TlsMode::Off);
        for &kind in options {
            let data = if kind == option::SET_META_CONTEXT { meta(name, &["base:allocation"]) } else { vec![] };
            peer.send(&opt(kind, &data)).unwrap();
        }
        peer.send(&opt(option::GO, &go(name, &[]))).unwrap();
        peer.sent();
        assert_eq!(peer.events.pop(), Some(Event::Started { name: name.to_owned() }));
        peer
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.input.extend_from_slice(bytes);
        let taken = self.session.receive(&self.input, &self.shelf, &mut self.output, &mut self.events)?;
        self.input.drain(..taken);
        Ok(())
    }

    fn sent(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while !self.output.is_empty() {
            let count = self.output.front().len();
            all.extend_from_slice(self.output.front());
            self.output.advance(count);
        }
        all
    }

    /// Sends an option and returns the replies as `(type, data)`.
    fn option(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&opt(kind, data)).unwrap();
        let sent = self.sent();
        let mut fields = Fields(&sent);
        let mut replies = Vec::new();
        while !fields.is_empty() {
            assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
            assert_eq!(fields.u32(), Some(kind));
            replies.push((fields.u32().unwrap(), fields.counted().unwrap().to_vec()));
        }
        replies
    }

    fn request(&mut self) -> Request {
        assert_eq!(self.events.len(), 1, "{:?}", self.events);
        let Some(Event::Request(request)) = self.events.pop() else { panic!("no request") };
        request
    }
}

fn opt(kind: u32, data: &[u8]) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

fn req(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let (magic, flags, kind) = (REQUEST_MAGIC.to_be_bytes(), flags.to_be_bytes(), kind.to_be_bytes());
    [&magic[..], &flags, &kind, &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

fn xreq(kind: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let (magic, flags, kind) = (EXTENDED_REQUEST_MAGIC.to_be_bytes(), flags.to_be_bytes(), kind.to_be_bytes());
    [&magic[..], &flags, &kind, &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

const PLAIN: u16 = 0b1101_0110_1101; // HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO

#[test]
fn golden_export_name_of_an_old_client() {
    let mut peer = Peer::new(TlsMode::Off);
    assert_eq!(peer.sent(), hex("4e42444d41474943 49484156454f5054 0003"));
    peer.send(&hex("00000000 49484156454f5054 00000001 00000003 766d31")).unwrap();
    assert_eq!(peer.sent(), [hex("0000000040000000 0d6d"), vec![0; 124]].concat());
    assert_eq!(peer.events.pop(), Some(Event::Started { name: "vm1".into() }));
    peer.send(&hex("25609513 0000 0000 1122334455667788 0000000000001000 00000004")).unwrap();
    let request = peer.request();
    assert_eq!(request.command, Command::Read { offset: 4096, len: 4 });
    peer.session.finish(request.ticket, Ok(BlockReply::Data(vec![Buf::copy_from(b"abcd")])), &mut peer.output);
    assert_eq!(peer.sent(), hex("67446698 00000000 1122334455667788 61626364"));
    peer.send(&hex("25609513 0000 0002 0000000000000000 0000000000000000 00000000")).unwrap();
    assert_eq!(peer.events, [Event::Disconnect]);
    assert!(peer.session.is_ended() && peer.sent().is_empty());
}

#[test]
fn golden_go_with_structured_replies_and_block_status() {
    let mut peer = Peer::haggling(TlsMode::Off);
    peer.send(&hex("49484156454f5054 00000008 00000000")).unwrap();
    assert_eq!(peer.sent(), hex("0003e889045565a9 00000008 00000001 00000000"));
    peer.send(&hex(
        "49484156454f5054 0000000a 0000001e 00000003 766d31 00000001 0000000f 626173653a616c6c6f636174696f6e",
    ))
    .unwrap();
    assert_eq!(
        peer.sent(),
        hex("0003e889045565a9 0000000a 00000004 00000013 00000001 626173653a616c6c6f636174696f6e
             0003e889045565a9 0000000a 00000001 00000000")
    );
    peer.send(&hex("49484156454f5054 00000007 0000000b 00000003 766d31 0001 0003")).unwrap();
    assert_eq!(
        peer.sent(),
        hex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000040000000 0ded
             0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000
             0003e889045565a9 00000007 00000001 00000000")
    );
    assert_eq!(peer.events.pop(), Some(Event::Started { name: "vm1".into() }));
    peer.send(&hex("25609513 0000 0007 0000000000000009 0000000000002000 00003000")).unwrap();
    let request = peer.request();
    assert_eq!(request.command, Command::BlockStatus { offset: 0x2000, len: 0x3000 });
    let run = |offset, len, data| Extent { offset, len, data };
    let extents = vec![run(0x2000, 0x800, true), run(0x2800, 0x800, true), run(0x3000, 0x2000, false)];
    peer.session.finish(request.ticket, Ok(BlockReply::Extents(extents)), &mut peer.output);
    assert_eq!(
        peer.sent(),
        hex("668e33ef 0001 0005 0000000000000009 00000014 00000001 00001000 00000000 00002000 00000003")
    );
    peer.send(&hex("25609513 0000 0000 000000000000000a 0000000000000000 00000002")).unwrap();
    let request = peer.request();
    peer.session.finish(request.ticket, Ok(BlockReply::Data(vec![Buf::copy_from(b"xy")])), &mut peer.output);
    assert_eq!(peer.sent(), hex("668e33ef 0001 0001 000000000000000a 0000000a 0000000000000000 7879"));
}

#[test]
fn golden_extended_headers() {
    let mut peer = Peer::started("vm1", &[option::EXTENDED_HEADERS, option::SET_META_CONTEXT]);
    peer.send(&hex("21e41c71 0021 0001 0000000000000005 0000000000000200 0000000000000003 616263")).unwrap();
    let request = peer.request();
    assert_eq!(request.command, Command::Write { offset: 512, data: Buf::copy_from(b"abc"), fua: true });
    peer.session.finish(request.ticket, Ok(BlockReply::Done), &mut peer.output);
    assert_eq!(peer.sent(), hex("6e8a278c 0001 0000 0000000000000005 0000000000000200 0000000000000000"));
    peer.send(&hex("21e41c71 0000 0007 0000000000000006 0000000000000000 0000000040000000")).unwrap();
    let request = peer.request();
    let extents = vec![Extent { offset: 0, len: 1 << 30, data: false }];
    peer.session.finish(request.ticket, Ok(BlockReply::Extents(extents)), &mut peer.output);
    assert_eq!(
        peer.sent(),
        hex("6e8a278c 0001 0006 0000000000000006 0000000000000000 0000000000000018
             00000001 00000001 0000000040000000 0000000000000003")
    );
    peer.send(&hex("21e41c71 0000 0001 0000000000000007 0000000000000000 0000000000000001 7a")).unwrap();
    let command = peer.request().command;
    assert_eq!(command, Command::Write { offset: 0, data: Buf::copy_from(b"z"), fua: false }, "as QEMU sends it");
}

#[test]
fn options_are_answered_as_the_protocol_says() {
    use option_reply::*;
    let mut peer = Peer::haggling(TlsMode::Off);
    let codes = |replies: Vec<(u32, Vec<u8>)>| replies.into_iter().map(|reply| reply.0).collect::<Vec<_>>();

    let listed = peer.option(option::LIST, &[]);
    assert_eq!(listed[0], (SERVER, [&[0, 0, 0, 3][..], b"vm1volume vm1"].concat()));
    assert_eq!((listed.len(), listed[2].0), (3, ACK));
    assert_eq!(codes(peer.option(option::LIST, b"x")), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::STARTTLS, &[])), [ERR_POLICY]);
    assert_eq!(codes(peer.option(4, &[])), [ERR_UNSUP]);
    assert_eq!(codes(peer.option(0xffff_ffff, b"whatever")), [ERR_UNSUP]);

    let unknown = peer.option(option::GO, &go("vm2", &[]));
    assert_eq!(unknown, [(ERR_UNKNOWN, b"there is no export named `vm2`".to_vec())]);
    assert_eq!(codes(peer.option(option::INFO, &go("", &[]))), [ERR_UNKNOWN], "two exports, so none is the default");
    assert_eq!(codes(peer.option(option::INFO, &go("vm1", &[1, 2, 3, 77]))), [INFO, INFO, INFO, INFO, ACK]);
    assert_eq!(codes(peer.option(option::INFO, b"\0\0\0\x09vm1\0\0")), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::INFO, b"\0\0\0\x03vm1\0\x02\0\0")), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::INFO, b"\0\0\0\x01\xff\0\0")), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::INFO, &go(&"x".repeat(4097), &[]))), [ERR_TOO_BIG]);
    assert_eq!(codes(peer.option(option::INFO, &vec![0; OPTION_DATA_MAX + 1])), [ERR_TOO_BIG]);

    assert_eq!(codes(peer.option(option::SET_META_CONTEXT, &meta("vm1", &["base:allocation"]))), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::STRUCTURED_REPLY, b"x")), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::STRUCTURED_REPLY, &[])), [ACK]);
    let context = |replies: Vec<(u32, Vec<u8>)>| replies[0].0 == META_CONTEXT && replies.len() == 2;
    assert!(context(peer.option(option::LIST_META_CONTEXT, &meta("vm1", &[]))));
    assert!(context(peer.option(option::LIST_META_CONTEXT, &meta("vm1", &["base:", "base:allocation", "x-a:b"]))));
    assert_eq!(codes(peer.option(option::LIST_META_CONTEXT, &meta("vm1", &["x-a:b"]))), [ACK]);
    assert_eq!(codes(peer.option(option::LIST_META_CONTEXT, &meta("nope", &[]))), [ERR_UNKNOWN]);
    assert_eq!(codes(peer.option(option::SET_META_CONTEXT, &meta("vm1", &["base:"]))), [ACK]);
    assert_eq!(codes(peer.option(option::SET_META_CONTEXT, &meta("vm1", &["noname"]))), [ERR_INVALID]);
    assert_eq!(codes(peer.option(option::SET_META_CONTEXT, &meta("vm1", &[]))), [ACK]);
    assert!(context(peer.option(option::SET_META_CONTEXT, &meta("vm1", &["base:allocation"]))));
    let mut liar = meta("vm1", &[]);
    liar[7..11].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(codes(peer.option(option::SET_META_CONTEXT, &liar)), [ERR_INVALID]);

    assert_eq!(codes(peer.option(option::EXTENDED_HEADERS, &[])), [ACK]);
    assert_eq!(codes(peer.option(option::STRUCTURED_REPLY, &[])), [ERR_EXT_HEADER_REQD]);
    assert!(peer.events.is_empty());
    assert_eq!(codes(peer.option(option::ABORT, b"goodbye")), [ACK]);
    assert_eq!(peer.events, [Event::Disconnect]);
}

#[test]
fn the_empty_name_means_the_only_export_and_the_reply_says_its_name() {
    let mut peer = Peer::haggling(TlsMode::Off);
    peer.shelf.0.truncate(1);
    let replies = peer.option(option::GO, &go("", &[info::NAME]));
    assert_eq!(replies[1], (option_reply::INFO, b"\0\x01vm1".to_vec()));
    assert_eq!(peer.events, [Event::Started { name: "vm1".into() }]);
}

#[test]
fn a_context_selected_for_another_export_does_not_count() {
    let mut peer = Peer::haggling(TlsMode::Off);
    peer.option(option::STRUCTURED_REPLY, &[]);
    peer.option(option::SET_META_CONTEXT, &meta("iso", &["base:allocation"]));
    peer.option(option::GO, &go("vm1", &[]));
    peer.events.clear();
    peer.send(&req(command::BLOCK_STATUS, 0, 1, 0, 4096)).unwrap();
    assert_eq!(peer.sent()[6..8], chunk::ERROR.to_be_bytes());
    assert!(peer.events.is_empty());
}

#[test]
fn mistakes_without_a_reply_end_the_session() {
    let ends = |bytes: &[u8], error: ProtocolError| {
        let mut peer = Peer::new(TlsMode::Off);
        assert_eq!(peer.send(bytes), Err(error));
        assert!(peer.session.is_ended() && peer.events.is_empty());
        peer.input.clear();
        peer.send(&opt(option::LIST, &[])).unwrap();
        assert!(peer.input.is_empty(), "what follows is swallowed");
    };
    let flags = 3u32.to_be_bytes();
    ends(&hex("00000007"), ProtocolError::ClientFlags { flags: 7 });
    ends(&[&flags[..], &[0; 16]].concat(), ProtocolError::OptionMagic { found: 0 });
    let named = [&flags[..], &opt(option::EXPORT_NAME, b"vm2")].concat();
    ends(&named, ProtocolError::UnknownExport { name: "vm2".into() });
    let long = [&flags[..], &opt(option::EXPORT_NAME, &[b'x'; 5000])].concat();
    ends(&long, ProtocolError::ExportName { size: 5000 });
    let late = [&flags[..], &opt(option::EXTENDED_HEADERS, &[]), &opt(option::EXPORT_NAME, b"vm1")].concat();
    ends(&late, ProtocolError::ExportNameAfterExtendedHeaders);
    let start = [&flags[..], &opt(option::EXPORT_NAME, b"vm1")].concat();
    let mut peer = Peer::new(TlsMode::Off);
    peer.send(&start).unwrap();
    assert_eq!(peer.send(&[0; 28]), Err(ProtocolError::RequestMagic { found: 0 }));
    let mut peer = Peer::started("vm1", &[]);
    let error = peer.send(&req(command::WRITE, 0, 1, 0, u32::MAX));
    assert_eq!(error, Err(ProtocolError::PayloadTooLong { size: u64::from(u32::MAX) }));
}

#[test]
fn tls_is_enforced_and_forgets_what_was_agreed_in_the_clear() {
    use option_reply::*;
    let mut peer = Peer::haggling(TlsMode::Required);
    for kind in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, 99] {
        assert_eq!(peer.option(kind, &[])[0].0, ERR_TLS_REQD);
    }
    assert_eq!(peer.option(option::STARTTLS, b"x")[0].0, ERR_INVALID);
    let mut clear = Peer::haggling(TlsMode::Required);
    assert_eq!(clear.send(&opt(option::EXPORT_NAME, b"vm1")), Err(ProtocolError::TlsRequired));

    let mut peer = Peer::haggling(TlsMode::Optional);
    peer.option(option::STRUCTURED_REPLY, &[]);
    peer.option(option::SET_META_CONTEXT, &meta("vm1", &["base:allocation"]));
    peer.send(&[opt(option::STARTTLS, &[]), opt(option::LIST, &[])].concat()).unwrap();
    assert_eq!(peer.events.pop(), Some(Event::StartTls));
    assert_eq!(peer.input, opt(option::LIST, &[]), "bytes after STARTTLS are not taken as if they came under TLS");
    assert_eq!(peer.sent().len(), 20);
    peer.input.clear();
    assert_eq!(peer.option(option::STARTTLS, &[])[0].0, ERR_INVALID);
    let set = peer.option(option::SET_META_CONTEXT, &meta("vm1", &["base:allocation"]));
    assert_eq!(set[0].0, ERR_INVALID, "structured replies must be asked for again");
    let info = peer.option(option::GO, &go("vm1", &[]));
    assert_eq!(info[0].1[10..], PLAIN.to_be_bytes());
}

#[test]
fn requests_are_checked_before_they_reach_the_device() {
    let refused = |peer: &mut Peer, bytes: Vec<u8>, error: Errno| {
        peer.send(&bytes).unwrap();
        assert_eq!(peer.sent(), simple(error as u32, 9), "{bytes:?}");
        assert!(peer.events.is_empty() && peer.input.is_empty() && peer.session.in_flight() == 0);
    };
    let size = 1u64 << 30;
    let peer = &mut Peer::started("vm1", &[]);
    refused(peer, req(command::READ, 0, 9, size - 1, 2), Errno::Invalid);
    refused(peer, req(command::READ, 0, 9, u64::MAX, u32::MAX), Errno::Invalid);
    refused(peer, req(command::READ, 0, 9, 0, PAYLOAD_MAX + 1), Errno::Invalid);
    refused(peer, req(command::READ, command_flag::DF, 9, 0, 1), Errno::Invalid);
    refused(peer, [req(command::WRITE, 0, 9, size - 1, 2), vec![1, 2]].concat(), Errno::NoSpace);
    let long = vec![0; PAYLOAD_MAX as usize + 1];
    refused(peer, [req(command::WRITE, 0, 9, 0, PAYLOAD_MAX + 1), long].concat(), Errno::Invalid);
    refused(peer, [req(command::WRITE, command_flag::REQ_ONE, 9, 0, 1), vec![1]].concat(), Errno::Invalid);
    refused(peer, req(command::WRITE_ZEROES, 0, 9, size, 1), Errno::NoSpace);
    refused(peer, req(command::TRIM, 0, 9, size, 1), Errno::Invalid);
    refused(peer, req(command::TRIM, command_flag::NO_HOLE, 9, 0, 1), Errno::Invalid);
    refused(peer, req(command::CACHE, 0, 9, size, 1), Errno::Invalid);
    refused(peer, req(command::FLUSH, 0, 9, 0, 1), Errno::Invalid);
    refused(peer, req(command::BLOCK_STATUS, 0, 9, 0, 4096), Errno::Invalid);
    refused(peer, req(command::READ, command_flag::PAYLOAD_LEN, 9, 0, 1), Errno::Invalid);
    refused(peer, req(99, 0, 9, 0, 0), Errno::Invalid);

    let iso = &mut Peer::started("iso", &[]);
    refused(iso, [req(command::WRITE, 0, 9, 0, 2), vec![1, 2]].concat(), Errno::NotPermitted);
    refused(iso, req(command::WRITE_ZEROES, 0, 9, 0, 1), Errno::NotPermitted);
    refused(iso, req(command::TRIM, 0, 9, 0, 1), Errno::NotPermitted);
    iso.session.begin_shutdown();
    refused(iso, req(command::READ, 0, 9, 0, 1), Errno::Shutdown);
    iso.send(&req(command::DISC, 0, 9, 0, 0)).unwrap();
    assert_eq!(iso.events, [Event::Disconnect], "a client may still leave");
}

#[test]
fn empty_requests_and_hints_succeed_without_the_device() {
    let peer = &mut Peer::started("vm1", &[]);
    for kind in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES, command::CACHE] {
        peer.send(&req(kind, 0, 4, 1 << 30, 0)).unwrap();
        assert_eq!(peer.sent(), simple(0, 4));
    }
    peer.send(&req(command::CACHE, 0, 4, 0, 4096)).unwrap();
    assert_eq!(peer.sent(), simple(0, 4));
    let peer = &mut Peer::started("vm1", &[option::STRUCTURED_REPLY]);
    peer.send(&req(command::READ, 0, 4, 0, 0)).unwrap();
    assert_eq!(peer.sent(), hex("668e33ef 0001 0000 0000000000000004 00000000"));
    assert!(peer.events.is_empty());
}

#[test]
fn flags_reach_the_device() {
    use command_flag::*;
    let peer = &mut Peer::started("vm1", &[option::STRUCTURED_REPLY, option::SET_META_CONTEXT]);
    let mut command = |bytes: Vec<u8>| {
        peer.send(&bytes).unwrap();
        let request = peer.request();
        let command = request.command.clone();
        peer.session.finish(request.ticket, Err(BlockError::Closed), &mut peer.output);
        command
    };
    let write = [req(command::WRITE, FUA, 1, 8, 3), b"abc".to_vec()].concat();
    assert_eq!(command(write), Command::Write { offset: 8, data: Buf::copy_from(b"abc"), fua: true });
    assert_eq!(command(req(command::TRIM, FUA, 1, 8, 3)), Command::Trim { offset: 8, len: 3, fua: true });
    assert_eq!(command(req(command::FLUSH, FUA, 1, 0, 0)), Command::Flush);
    assert_eq!(command(req(command::READ, FUA | DF, 1, 8, 3)), Command::Read { offset: 8, len: 3 });
    let zeroes = Command::WriteZeroes { offset: 8, len: 3, fua: false, no_hole: true, fast: true };
    assert_eq!(command(req(command::WRITE_ZEROES, NO_HOLE | FAST_ZERO, 1, 8, 3)), zeroes);
    assert_eq!(command(req(command::BLOCK_STATUS, REQ_ONE, 1, 8, 3)), Command::BlockStatus { offset: 8, len: 3 });
}

#[test]
fn one_extent_is_sent_to_a_client_that_wants_one() {
    let peer = &mut Peer::started("vm1", &[option::STRUCTURED_REPLY, option::SET_META_CONTEXT]);
    peer.send(&req(command::BLOCK_STATUS, command_flag::REQ_ONE, 1, 0, 8192)).unwrap();
    let request = peer.request();
    let run = |offset, data| Extent { offset, len: 4096, data };
    let extents = vec![run(0, false), run(4096, true)];
    peer.session.finish(request.ticket, Ok(BlockReply::Extents(extents)), &mut peer.output);
    assert_eq!(peer.sent(), hex("668e33ef 0001 0005 0000000000000001 0000000c 00000001 00001000 00000003"));
}

#[test]
fn errors_of_the_device_have_a_number_and_a_text() {
    let check = |kind: u16, error: BlockError, errno: Errno| {
        let peer = &mut Peer::started("vm1", &[option::STRUCTURED_REPLY]);
        peer.send(&[req(kind, 0, 1, 4096, 4), vec![0; if kind == command::WRITE { 4 } else { 0 }]].concat()).unwrap();
        let request = peer.request();
        let text = error.to_string();
        let offset = if let BlockError::Damaged { offset, .. } = &error { Some(*offset) } else { None };
        peer.session.finish(request.ticket, Err(error), &mut peer.output);
        let sent = peer.sent();
        let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        assert_eq!(sent[6..8], kind.to_be_bytes());
        assert_eq!(sent[20..24], (errno as u32).to_be_bytes());
        assert_eq!(&sent[26..26 + text.len()], text.as_bytes());
        assert_eq!(&sent[26 + text.len()..], offset.map_or(vec![], |offset| offset.to_be_bytes().to_vec()));
    };
    let outside = || BlockError::OutOfRange { offset: 4096, len: 4, size: 4096 };
    check(command::READ, outside(), Errno::Invalid);
    check(command::WRITE, outside(), Errno::NoSpace);
    check(command::WRITE, BlockError::NoSpace, Errno::NoSpace);
    check(command::WRITE, BlockError::ReadOnly, Errno::NotPermitted);
    check(command::WRITE, BlockError::Fenced, Errno::Io);
    check(command::READ, BlockError::Closed, Errno::Shutdown);
    check(command::READ, BlockError::Damaged { offset: 4098, detail: "all bad".into() }, Errno::Io);
    check(command::READ, BlockError::Other("é".repeat(10)), Errno::Io);
}

#[test]
fn requests_beyond_the_limits_wait_until_others_are_answered_and_sent() {
    let peer = &mut Peer::started("vm1", &[]);
    let many: Vec<u8> = (0..300).flat_map(|cookie| req(command::READ, 0, cookie, 0, 1)).collect();
    peer.send(&many).unwrap();
    assert_eq!((peer.events.len(), peer.session.in_flight()), (IN_FLIGHT_MAX, IN_FLIGHT_MAX));
    assert_eq!(peer.input.len(), (300 - IN_FLIGHT_MAX) * REQUEST_SIZE);
    for event in peer.events.split_off(0) {
        let Event::Request(request) = event else { panic!() };
        peer.session.finish(request.ticket, Err(BlockError::NoSpace), &mut peer.output);
    }
    peer.send(&[]).unwrap();
    assert_eq!((peer.events.len(), peer.input.len()), (300 - IN_FLIGHT_MAX, 0));

    let peer = &mut Peer::started("vm1", &[]);
    let three: Vec<u8> = (0..3).flat_map(|cookie| req(command::READ, 0, cookie, 0, PAYLOAD_MAX)).collect();
    peer.send(&three).unwrap();
    assert_eq!((peer.events.len(), peer.session.in_flight_bytes()), (2, IN_FLIGHT_BYTES_MAX));
    let Event::Request(first) = peer.events.remove(0) else { panic!() };
    let data = vec![Buf::zeroed(PAYLOAD_MAX as usize)];
    peer.session.finish(first.ticket, Ok(BlockReply::Data(data)), &mut peer.output);
    peer.send(&[]).unwrap();
    assert_eq!(peer.events.len(), 1, "a reply that is not sent yet still counts");
    peer.sent();
    peer.send(&[]).unwrap();
    assert_eq!(peer.events.len(), 2);
}

#[test]
fn a_payload_may_be_filled_in_place() {
    let peer = &mut Peer::started("vm1", &[]);
    assert!(peer.session.payload_mut().is_empty());
    peer.send(&[req(command::WRITE, 0, 1, 0, 6), b"ab".to_vec()].concat()).unwrap();
    assert_eq!(peer.session.payload_mut().len(), 4);
    peer.session.payload_mut()[..3].copy_from_slice(b"cde");
    peer.session.filled(3, &mut peer.events);
    assert!(peer.events.is_empty());
    peer.send(b"f").unwrap();
    let request = peer.request();
    let Command::Write { data, .. } = &request.command else { panic!() };
    assert!(&data[..] == b"abcdef" && data.is_aligned());
    peer.session.finish(request.ticket, Ok(BlockReply::Done), &mut peer.output);
    assert_eq!(peer.sent(), simple(0, 1));
}

#[test]
fn a_new_size_counts_for_later_requests() {
    let peer = &mut Peer::started("vm1", &[]);
    peer.session.set_size(2 << 30);
    peer.send(&req(command::READ, 0, 1, 1 << 30, 1)).unwrap();
    assert_eq!(peer.events.len(), 1);
    peer.session.set_size(4096);
    peer.send(&req(command::READ, 0, 2, 4096, 1)).unwrap();
    assert_eq!(peer.sent(), simple(Errno::Invalid as u32, 2));
}

/// One request with numbers near the edges, in either header form.
fn request(extended: bool) -> impl Strategy<Value = Vec<u8>> {
    let offset = prop_oneof![0u64..9000, Just(1 << 30), (1u64 << 30) - 4096..(1 << 30) + 4096, any::<u64>()];
    let len = prop_oneof![6 => 0u32..300, 1 => 0u32..70 << 20, 1 => any::<u32>()];
    let kind = prop_oneof![9 => prop::sample::select(vec![0u16, 1, 3, 4, 5, 6, 7]), 1 => any::<u16>()];
    let payload = prop::collection::vec(any::<u8>(), 300);
    let flags = prop_oneof![Just(0u16), 0u16..64];
    (kind, flags, any::<u64>(), offset, len, payload).prop_map(move |(kind, flags, cookie, offset, len, payload)| {
        let flags = if extended && kind == command::WRITE { flags ^ command_flag::PAYLOAD_LEN } else { flags };
        let head = if extended {
            xreq(kind, flags, cookie, offset, u64::from(len))
        } else {
            req(kind, flags, cookie, offset, len)
        };
        let carries = kind == command::WRITE || (extended && flags & command_flag::PAYLOAD_LEN != 0);
        if carries { [&head[..], &payload[..(len as usize).min(300)]].concat() } else { head }
    })
}

/// A client that mostly speaks the protocol: some options, then requests in the form agreed on.
fn conversation() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("vm1".to_owned()), Just("iso".to_owned()), Just(String::new()), "[a-z]{1,3}"];
    let noise = prop_oneof![
        (0u32..13, prop::collection::vec(any::<u8>(), 0..30)).prop_map(|(kind, data)| {
            if matches!(kind, option::EXPORT_NAME | option::ABORT | option::STARTTLS) {
                vec![]
            } else {
                opt(kind, &data)
            }
        }),
        (name, prop::collection::vec(0u16..6, 0..4)).prop_map(|(name, infos)| opt(option::INFO, &go(&name, &infos))),
    ];
    (prop::collection::vec(noise, 0..4), 0usize..3, prop::sample::select(vec!["vm1", "vm1", "iso"])).prop_flat_map(
        |(noise, style, name)| {
            let mut bytes = noise.concat();
            bytes.extend(
                [vec![], opt(option::STRUCTURED_REPLY, &[]), opt(option::EXTENDED_HEADERS, &[])][style].clone(),
            );
            bytes.extend(opt(option::SET_META_CONTEXT, &meta(name, &["base:allocation"])));
            bytes.extend(opt(option::GO, &go(name, &[])));
            prop::collection::vec(request(style == 2), 0..40)
                .prop_map(move |requests| [bytes.clone(), requests.concat()].concat())
        },
    )
}

/// Everything a session did with `bytes`, fed in pieces of the sizes given, every request answered with an error once
/// all pieces were fed or no more were taken.
fn run(bytes: &[u8], cuts: &[usize]) -> (Vec<Event>, Vec<u8>, Option<ProtocolError>) {
    let mut peer = Peer::haggling(TlsMode::Optional);
    let (mut fed, mut cuts) = (0, cuts.iter().cycle());
    let mut sent = Vec::new();
    while fed < bytes.len() {
        let count = (*cuts.next().unwrap()).clamp(1, bytes.len() - fed);
        let mut result = peer.send(&bytes[fed..fed + count]);
        fed += count;
        while !peer.output.is_empty() && result.is_ok() {
            sent.extend(peer.sent());
            result = peer.send(&[]);
        }
        sent.extend(peer.sent());
        let held = peer.session.in_flight_bytes();
        assert!(held <= IN_FLIGHT_BYTES_MAX && peer.session.in_flight() <= IN_FLIGHT_MAX, "{held} bytes held");
        assert!(peer.session.payload_mut().len() as u64 <= held, "a payload being received is counted");
        if let Err(error) = result {
            return (peer.events, sent, Some(error));
        }
    }
    (peer.events, sent, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_do_no_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        cuts in prop::collection::vec(1usize..50, 1..5),
    ) {
        run(&bytes, &cuts);
    }

    #[test]
    fn the_cutting_of_the_input_changes_nothing(
        conversation in conversation(),
        cuts in prop::collection::vec(1usize..90, 1..6),
        damage in prop::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut bytes = conversation;
        if let Some((at, value)) = damage && !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        prop_assert_eq!(run(&bytes, &[usize::MAX]), run(&bytes, &cuts));
    }
}

/// Each planted bug makes the test that guards its rule fail.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_seen() {
    let guards: [(&'static str, fn()); 5] = [
        ("nbd_unbounded_in_flight", requests_beyond_the_limits_wait_until_others_are_answered_and_sent),
        ("nbd_read_only_writable", requests_are_checked_before_they_reach_the_device),
        ("nbd_fua_dropped", flags_reach_the_device),
        ("nbd_tls_not_enforced", tls_is_enforced_and_forgets_what_was_agreed_in_the_clear),
        ("nbd_starttls_keeps_state", tls_is_enforced_and_forgets_what_was_agreed_in_the_clear),
    ];
    for (name, guard) in guards {
        cairn_stdx::planted::activate(Some(name));
        assert!(std::panic::catch_unwind(guard).is_err(), "{name} is not seen");
        cairn_stdx::planted::activate(None);
    }
}
