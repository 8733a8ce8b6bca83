//! An echoing process, and a peer that does by hand what a reactor would never do.

use cairn_env::{Buf, DiskDone, DiskOp, DiskRequest, IoId};
use cairn_env_real::{Disk, Identity, Reactor, ReactorConfig, ReactorOptions, block_on_local};
use cairn_types::{ClientId, ClusterId, CsId, Level, NodeId};
use cairn_wire::auth::{ClusterKey, Initiator, Peer};
use cairn_wire::frame::{Frame, FrameKind, FrameReader, write_frame};
use cairn_wire::{DiskIndex, Effects, Event, LinkId, NetEffect, NetEvent, Now, Process};
use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
pub const SERVER: NodeId = NodeId::Cs(CsId(1025));
pub const CLIENT: NodeId = NodeId::Client(ClientId(2049));
/// A test that has not ended by then hangs; none comes near it otherwise.
const HANG: Duration = Duration::from_secs(60);

/// Answers `Data` with its own payload; the first byte of the prefix says how.
#[derive(Default)]
pub struct Echo {
    pub is_server: bool,
    /// Sent on every link that comes up.
    pub greeting: Option<Vec<u8>>,
    pub ups: Vec<(LinkId, NodeId)>,
    pub downs: Vec<(LinkId, String)>,
    pub frames: Vec<(LinkId, Frame)>,
    pub disk: Vec<DiskDone>,
    pub timers: Vec<Now>,
    pub starts: usize,
    pub turns: usize,
    pub waiting: Vec<(IoId, LinkId, u64)>,
    pub ios: u64,
}

impl Echo {
    fn serve(&mut self, link: LinkId, frame: Frame, out: &mut Effects) {
        let Frame { id, prefix, payload, .. } = frame;
        let reply = |payload| NetEffect::Send { link, kind: FrameKind::DataReply, id, prefix: Vec::new(), payload };
        match prefix.first() {
            // As many replies as the second byte says, each the whole payload.
            Some(b'M') => (0..prefix[1]).for_each(|_| out.net.push(reply(vec![payload.clone()]))),
            // To the disk and back.
            Some(b'D') => {
                self.ios += 1;
                self.waiting.push((IoId(self.ios), link, id));
                let op = DiskOp::Write { offset: (id % 256) * 4096, bufs: vec![payload] };
                out.disk.push((DiskIndex(0), DiskRequest { io: IoId(self.ios), op }));
            }
            Some(b'F') => out.fatal = Some("told to".to_owned()),
            _ => {
                let half = payload.len() / 2;
                let pieces = vec![payload.slice(0, half), payload.slice(half, payload.len() - half)];
                let (kind, prefix) =
                    if payload.is_empty() { (FrameKind::MdsReply, prefix) } else { (FrameKind::DataReply, vec![]) };
                let payload = if payload.is_empty() { vec![] } else { pieces };
                out.net.push(NetEffect::Send { link, kind, id, prefix, payload });
            }
        }
    }
}

impl Process for Echo {
    fn step(&mut self, now: Now, event: Event, out: &mut Effects) {
        match event {
            Event::Start => self.starts += 1,
            Event::Turn => self.turns += 1,
            Event::Timer => self.timers.push(now),
            Event::Net(NetEvent::Up { link, peer, .. }) => {
                self.ups.push((link, peer));
                if let Some(greeting) = &self.greeting {
                    out.send(link, FrameKind::MdsPush, 0, greeting.clone());
                }
            }
            Event::Net(NetEvent::Down { link, reason }) => self.downs.push((link, reason)),
            Event::Net(NetEvent::Frame { link, frame }) if self.is_server => self.serve(link, frame, out),
            Event::Net(NetEvent::Frame { link, frame }) => self.frames.push((link, frame)),
            Event::Disk(_, done) => {
                if let Some(at) = self.waiting.iter().position(|(io, ..)| *io == done.io) {
                    let (_, link, id) = self.waiting.remove(at);
                    out.send(link, FrameKind::DataReply, id, vec![u8::from(done.result.is_ok())]);
                }
                self.disk.push(done);
            }
        }
    }
}

pub struct Host {
    pub reactor: Reactor<Echo>,
    pub addr: SocketAddr,
    pub log: Rc<RefCell<Vec<String>>>,
    turned: Rc<Notify>,
    next_link: RefCell<u64>,
}

pub fn key(password: &str) -> ClusterKey {
    // Deriving takes a while by intent; these are as good.
    let byte = password.bytes().fold(0u8, |a, b| a.wrapping_mul(31).wrapping_add(b));
    ClusterKey::from_hex(&format!("{byte:02x}").repeat(32)).unwrap()
}

pub fn identity(node: NodeId) -> Identity {
    Identity { key: key("good"), cluster_name: "stor1".to_owned(), cluster: Some(CLUSTER), node }
}

impl Host {
    pub fn start(identity: Identity, options: ReactorOptions, disks: Vec<Disk>, echo: Echo) -> Host {
        Self::start_on("127.0.0.1:0", identity, options, disks, echo)
    }

    fn start_on(listen: &str, identity: Identity, mut options: ReactorOptions, disks: Vec<Disk>, echo: Echo) -> Host {
        let log = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&log);
        options.log = Box::new(move |line| sink.borrow_mut().push(line.to_owned()));
        let listener = TcpListener::bind(listen).unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
        let config = ReactorConfig { identity, listen: vec![listener], disks, options };
        let reactor = Reactor::start(config, echo).unwrap();
        let turned = Rc::new(Notify::new());
        let signal = Rc::clone(&turned);
        reactor.after_turn(move |_| signal.notify_one());
        Host { reactor, addr, log, turned, next_link: RefCell::new(0) }
    }

    pub fn server(options: ReactorOptions) -> Host {
        Self::start(identity(SERVER), options, Vec::new(), Echo { is_server: true, ..Echo::default() })
    }

    /// A server that is reached by TCP, as one on another host: it does not listen on the very address it is reached
    /// at.
    pub fn far_server() -> Host {
        let echo = Echo { is_server: true, ..Echo::default() };
        Self::start_on("0.0.0.0:0", identity(SERVER), ReactorOptions::default(), Vec::new(), echo)
    }

    pub fn client(identity: Identity) -> Host {
        Self::start(identity, ReactorOptions::default(), Vec::new(), Echo::default())
    }

    /// Asks for a link.
    pub fn connect(&self, addr: SocketAddr) -> LinkId {
        *self.next_link.borrow_mut() += 1;
        let link = LinkId(*self.next_link.borrow());
        self.reactor.with(|_, _, out| out.net.push(NetEffect::Connect { link, addr }));
        link
    }

    /// Asks for a link and waits for it to be up.
    pub async fn link(&self, addr: SocketAddr) -> LinkId {
        let link = self.connect(addr);
        self.until(|echo| echo.ups.iter().any(|(up, _)| *up == link).then_some(())).await;
        link
    }

    pub fn send(&self, link: LinkId, kind: FrameKind, id: u64, prefix: &[u8], payload: Vec<Buf>) {
        let prefix = prefix.to_vec();
        self.reactor.with(|_, _, out| out.net.push(NetEffect::Send { link, kind, id, prefix, payload }));
    }

    /// Waits until the process is in the state `find` looks for.
    pub async fn until<T>(&self, mut find: impl FnMut(&mut Echo) -> Option<T>) -> T {
        let wait = async {
            loop {
                // Looking schedules a turn like any `with`, so look only after a turn of the reactor's own.
                if let Some(found) = self.reactor.with(|echo, _, _| find(echo)) {
                    return found;
                }
                self.turned.notified().await;
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(HANG, wait).await.expect("the reactor hangs")
    }

    /// Waits for a link to end and says why it did.
    pub async fn down(&self, link: LinkId) -> String {
        self.until(|echo| echo.downs.iter().find(|(down, _)| *down == link).map(|(_, why)| why.clone())).await
    }
}

/// Runs a test on a runtime of its own.
pub fn run(test: impl Future<Output = ()>) {
    block_on_local(async { tokio::time::timeout(HANG, test).await.expect("the test hangs") }).unwrap();
}

/// A peer made by hand.
pub struct Raw {
    pub stream: TcpStream,
    pub reader: FrameReader,
}

impl Raw {
    pub async fn connect(addr: SocketAddr) -> Raw {
        Raw { stream: TcpStream::connect(addr).await.unwrap(), reader: FrameReader::new() }
    }

    /// With the handshake done.
    pub async fn link(addr: SocketAddr) -> Raw {
        let mut raw = Self::connect(addr).await;
        let us = Peer { node: CLIENT, level: Level::CURRENT };
        let initiator = Initiator::new(key("good"), "stor1", None, us, [3; 32]);
        raw.send(FrameKind::Auth, 0, &initiator.hello()).await;
        let (proof, peer, cluster) = initiator.challenged(&raw.frame().await.unwrap().prefix).unwrap();
        assert_eq!((peer.node, cluster), (SERVER, CLUSTER));
        raw.send(FrameKind::Auth, 0, &proof).await;
        initiator.judged(&raw.frame().await.unwrap().prefix).unwrap();
        raw.reader.set_authenticated();
        raw
    }

    pub async fn send(&mut self, kind: FrameKind, id: u64, prefix: &[u8]) {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, kind, id, prefix);
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// The next frame, or none at the end of the link.
    pub async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.reader.next_frame().unwrap() {
                return Some(frame);
            }
            let mut bytes = vec![0; 64 << 10];
            let count = self.stream.read(&mut bytes).await.ok().filter(|count| *count > 0)?;
            self.reader.push(&bytes[..count]);
        }
    }

    /// Waits for the other side to close, by end of stream or reset.
    pub async fn closed(&mut self) {
        while self.frame().await.is_some() {}
    }
}
