//! Links: sockets between processes, from handshake to end.
//!
//! Each link has one task that reads; writing happens in the turn, straight to the socket. Only when a socket is full
//! does a second task wait for room. A link has one entry in [`Links`] from its [`Connect`](cairn_wire::NetEffect)
//! (or, if accepted, from its `Up`) until it ends, and whoever removes the entry ends its tasks: so nothing happens on
//! a link after its `Down`, and nothing at all after a `Close`.

use crate::clock;
use crate::cutter::Cutter;
use crate::output::{Output, SLICES_MAX};
use crate::reactor::{Identity, Inner, State};
use crate::socket::{self, Listener, ReadHalf, Socket, WriteHalf};
use crate::sys;
use cairn_env::Buf;
use cairn_wire::auth::{AuthError, Challenge, Initiator, Peer, Responder};
use cairn_wire::frame::{Frame, FrameKind, write_frame};
use cairn_wire::{Event, LinkId, NetEvent, Now, Process};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::task::AbortHandle;

/// Bytes one link may read before the others have their turn.
const READ_BUDGET: usize = 1 << 20;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A refused peer has this long to read why.
const REFUSAL_LINGER: Duration = Duration::from_secs(1);
const HANDSHAKE_BUFFER: usize = 4096;

struct Link {
    /// None while connecting.
    socket: Option<Rc<WriteHalf>>,
    output: Output,
    is_dirty: bool,
    reader: Option<AbortHandle>,
    /// Waits for room in the socket; while it does the turn leaves the link alone.
    writer: Option<AbortHandle>,
}

impl Link {
    fn end(&mut self) {
        self.reader.take().inspect(AbortHandle::abort);
        self.writer.take().inspect(AbortHandle::abort);
    }
}

/// All links of a reactor.
#[derive(Default)]
pub(crate) struct Links {
    table: BTreeMap<LinkId, Link>,
    dirty: Vec<LinkId>,
    accepted: u64,
}

enum Flush {
    Done,
    Full,
    Failed(String),
}

fn flush(socket: &WriteHalf, output: &mut Output) -> Flush {
    while output.size() > 0 {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = output.slices(&mut slices);
        match socket.try_write_vectored(&slices[..count]) {
            Ok(0) => return Flush::Failed("the socket takes nothing".to_owned()),
            Ok(sent) => output.consume(sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flush::Full,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Flush::Failed(format!("send: {error}")),
        }
    }
    Flush::Done
}

impl Links {
    /// Queues a frame; false when the link is not up.
    pub(crate) fn send(&mut self, link: LinkId, kind: FrameKind, id: u64, prefix: &[u8], payload: Vec<Buf>) -> bool {
        let Some(entry) = self.table.get_mut(&link).filter(|entry| entry.socket.is_some()) else { return false };
        entry.output.push_frame(kind, id, prefix, payload);
        if !std::mem::replace(&mut entry.is_dirty, true) {
            self.dirty.push(link);
        }
        true
    }

    /// Ends a link without a word; what was sent before is written if the socket takes it.
    pub(crate) fn close(&mut self, link: LinkId) {
        if let Some(mut entry) = self.table.remove(&link) {
            entry.end();
            if let Some(socket) = &entry.socket {
                let _ = flush(socket, &mut entry.output);
            }
        }
    }

    pub(crate) fn close_all(&mut self) {
        while let Some((&link, _)) = self.table.first_key_value() {
            self.close(link);
        }
    }

    fn next_accepted(&mut self) -> LinkId {
        self.accepted += 1;
        LinkId(LinkId::ACCEPTED | self.accepted)
    }

    fn insert(&mut self, link: LinkId, socket: Option<Rc<WriteHalf>>, reader: Option<AbortHandle>) {
        let entry = Link { socket, output: Output::default(), is_dirty: false, reader, writer: None };
        let before = self.table.insert(link, entry);
        assert!(before.is_none(), "{link:?} was used twice");
    }
}

/// Why a link ended, in words.
type Reason = String;

/// Counts a handshake from accept to its end.
struct Handshaking<P: Process>(Rc<Inner<P>>);

impl<P: Process> Drop for Handshaking<P> {
    fn drop(&mut self) {
        self.0.handshakes.set(self.0.handshakes.get() - 1);
    }
}

/// Both halves of a socket during the handshake.
struct Shaker {
    read: ReadHalf,
    write: WriteHalf,
    cutter: Cutter,
}

impl Shaker {
    fn new(socket: Socket) -> Result<Self, Reason> {
        let (read, write) = socket.prepare().map_err(|error| format!("prepare the socket: {error}"))?;
        Ok(Self { read, write, cutter: Cutter::default() })
    }

    async fn send(&mut self, prefix: &[u8]) -> Result<(), Reason> {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, FrameKind::Auth, 0, prefix);
        self.write.write_all(&bytes).await.map_err(|error| format!("send handshake: {error}"))
    }

    /// The next frame; bytes behind it stay for later.
    async fn receive(&mut self) -> Result<Vec<u8>, Reason> {
        let mut buffer = [0u8; HANDSHAKE_BUFFER];
        loop {
            let held = self.cutter.restore(&mut buffer);
            let mut bytes = &buffer[..held];
            if let Some(frame) = self.cutter.next(&mut bytes).map_err(|error| error.to_string())? {
                self.cutter.keep(bytes);
                return Ok(frame.prefix);
            }
            let held = self.cutter.restore(&mut buffer);
            let count = self.read.read(&mut buffer[held..]).await.map_err(|error| format!("receive: {error}"))?;
            self.cutter.keep(&buffer[..held + count]);
            if count == 0 {
                return Err("the peer closed the link during the handshake".to_owned());
            }
        }
    }

    /// Tells the peer why it is refused and waits a little for it to hear, or a reset would destroy the message.
    async fn refuse(&mut self, prefix: &[u8]) {
        if self.send(prefix).await.is_ok() && self.write.shutdown().await.is_ok() {
            let mut rest = [0u8; HANDSHAKE_BUFFER];
            let listen = async { while self.read.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
            let _ = tokio::time::timeout(REFUSAL_LINGER, listen).await;
        }
    }

    /// The side that connected.
    async fn initiate<P: Process + 'static>(&mut self, inner: &Rc<Inner<P>>) -> Result<Peer, Reason> {
        let Identity { key, cluster_name, cluster, node } = inner.state().identity.clone();
        let us = Peer { node, level: crate::release_level() };
        let initiator = Initiator::new(key, &cluster_name, cluster, us, sys::random_bytes());
        self.send(&initiator.hello()).await?;
        let challenge = self.receive().await?;
        let (proof, peer, theirs) = initiator.challenged(&challenge).map_err(|error| error.to_string())?;
        self.send(&proof).await?;
        let verdict = self.receive().await?;
        initiator.judged(&verdict).map_err(|error| error.to_string())?;
        // Another link may have taught us a cluster meanwhile; two of one name must not mix.
        let ours = *inner.state().identity.cluster.get_or_insert(theirs);
        if ours != theirs {
            return Err(AuthError::ClusterId { theirs, ours }.to_string());
        }
        Ok(peer)
    }

    /// The side that listens.
    async fn respond<P: Process + 'static>(&mut self, inner: &Rc<Inner<P>>) -> Result<Peer, Reason> {
        let hello = self.receive().await?;
        let Identity { key, cluster_name, cluster, node } = inner.state().identity.clone();
        let Some(cluster) = cluster else {
            let error = AuthError::Malformed("this node has not joined its cluster yet".to_owned());
            self.refuse(&cairn_wire::encode(&Challenge::Refuse(error.clone()))).await;
            return Err(error.to_string());
        };
        let us = Peer { node, level: crate::release_level() };
        let (challenge, responder) = Responder::answer(&key, &cluster_name, cluster, us, sys::random_bytes(), &hello);
        let responder = match responder {
            Ok(responder) => responder,
            Err(error) => {
                self.refuse(&challenge).await;
                return Err(error.to_string());
            }
        };
        self.send(&challenge).await?;
        let proof = self.receive().await?;
        let (verdict, judged) = responder.judge(&proof);
        match judged {
            Ok(peer) => self.send(&verdict).await.map(|()| peer),
            Err(error) => {
                self.refuse(&verdict).await;
                Err(error.to_string())
            }
        }
    }
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T, Reason>>) -> Result<T, Reason> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(format!("{what} took longer than {limit:?}")))
}

impl<P: Process + 'static> Inner<P> {
    /// Accepts links for ever.
    pub(crate) async fn accept_links(self: Rc<Self>, listener: Listener) {
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.log_limited(&format!("accept a link: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if self.handshakes.get() >= self.state().options.unauthenticated_max {
                self.log_limited(&format!("link from {peer} dropped: too many peers in their handshake"));
                continue;
            }
            self.handshakes.set(self.handshakes.get() + 1);
            let counted = Handshaking(Rc::clone(&self));
            let inner = Rc::clone(&self);
            tokio::task::spawn_local(async move {
                if let Err(reason) = inner.accept_link(socket, counted).await {
                    inner.log_limited(&format!("link from {peer} refused: {reason}"));
                }
            });
        }
    }

    async fn accept_link(self: &Rc<Self>, socket: Socket, counted: Handshaking<P>) -> Result<(), Reason> {
        let mut shaker = Shaker::new(socket)?;
        let limit = self.state().options.handshake_deadline;
        let peer = within(limit, "the handshake", shaker.respond(self)).await?;
        drop(counted);
        let link = {
            let state = &mut *self.state();
            if state.is_stopped() {
                return Ok(());
            }
            let link = state.links.next_accepted();
            state.links.insert(link, None, None);
            link
        };
        self.link_up(link, peer, shaker);
        Ok(())
    }

    /// Carries out [`NetEffect::Connect`](cairn_wire::NetEffect::Connect).
    pub(crate) fn connect(self: &Rc<Self>, state: &mut State<P>, link: LinkId, addr: SocketAddr) {
        assert!(!link.is_accepted(), "{link:?} of a connect has the bit of accepted links");
        let inner = Rc::clone(self);
        let (connect_limit, shake_limit) = (state.options.connect_deadline, state.options.handshake_deadline);
        let task = tokio::task::spawn_local(async move {
            let work = async {
                let connecting = async { socket::connect(addr).await.map_err(|error| format!("connect: {error}")) };
                let socket = within(connect_limit, "connecting", connecting).await?;
                let mut shaker = Shaker::new(socket)?;
                let peer = within(shake_limit, "the handshake", shaker.initiate(&inner)).await?;
                Ok((peer, shaker))
            };
            match work.await {
                Ok((peer, shaker)) => inner.link_up(link, peer, shaker),
                Err(reason) => inner.link_down(link, reason),
            }
        });
        state.links.insert(link, None, Some(task.abort_handle()));
    }

    /// Steps `Up` and starts reading, unless the process has closed the link meanwhile.
    fn link_up(self: &Rc<Self>, link: LinkId, peer: Peer, shaker: Shaker) {
        let Shaker { read, write, mut cutter } = shaker;
        cutter.set_authenticated();
        let state = &mut *self.state();
        let Some(entry) = state.links.table.get_mut(&link) else { return };
        let inner = Rc::clone(self);
        let reader = tokio::task::spawn_local(async move {
            let (mut read, mut cutter) = (read, cutter);
            let reason = match inner.step_kept(link, &mut cutter) {
                Ok(()) => poll_fn(|cx| inner.poll_link(cx, link, &mut read, &mut cutter)).await,
                Err(reason) => reason,
            };
            inner.link_down(link, reason);
        });
        entry.socket = Some(Rc::new(write));
        entry.reader = Some(reader.abort_handle());
        state.step(clock::now(), Event::Net(NetEvent::Up { link, peer: peer.node, level: peer.level }));
        self.schedule_turn();
    }

    /// Ends a link and tells the process, unless it has closed the link itself.
    fn link_down(self: &Rc<Self>, link: LinkId, reason: Reason) {
        let state = &mut *self.state();
        if let Some(mut entry) = state.links.table.remove(&link) {
            entry.end();
            state.step(clock::now(), Event::Net(NetEvent::Down { link, reason }));
            self.schedule_turn();
        }
    }

    /// Steps the frames that came right behind the handshake.
    fn step_kept(&self, link: LinkId, cutter: &mut Cutter) -> Result<(), Reason> {
        let mut kept = [0u8; HANDSHAKE_BUFFER];
        let held = cutter.restore(&mut kept);
        self.schedule_turn();
        cut_and_step(&mut self.state(), clock::now(), link, cutter, &kept[..held])
    }

    /// Reads what the socket holds and steps the process with each frame. Ready when the link has ended.
    fn poll_link(&self, cx: &mut Context<'_>, link: LinkId, read: &mut ReadHalf, cutter: &mut Cutter) -> Poll<Reason> {
        let state = &mut *self.state();
        let mut now = None;
        let mut budget = READ_BUDGET;
        loop {
            let direct = cutter.direct();
            let is_direct = direct.is_some();
            let (buffer, held) = match direct {
                Some(rest) => (rest, 0),
                None => {
                    let max = cutter.scratch_max().min(state.scratch.len());
                    let held = cutter.restore(&mut state.scratch);
                    (&mut state.scratch[held..max], held)
                }
            };
            let mut buffer = ReadBuf::new(buffer);
            let polled = Pin::new(&mut *read).poll_read(cx, &mut buffer);
            let count = buffer.filled().len();
            match polled {
                Poll::Ready(Ok(())) if count == 0 => return Poll::Ready("the peer closed the link".to_owned()),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(format!("receive: {error}")),
                Poll::Pending => {
                    if !is_direct {
                        cutter.keep(&state.scratch[..held]);
                    }
                    return Poll::Pending;
                }
            }
            let now = *now.get_or_insert_with(clock::now);
            if is_direct {
                if let Some(frame) = cutter.direct_filled(count)
                    && let Err(reason) = step_frame(state, now, link, frame)
                {
                    return Poll::Ready(reason);
                }
            } else {
                // Taken out so that the process can be stepped while its frames are cut.
                let scratch = std::mem::take(&mut state.scratch);
                let outcome = cut_and_step(state, now, link, cutter, &scratch[..held + count]);
                state.scratch = scratch;
                if let Err(reason) = outcome {
                    return Poll::Ready(reason);
                }
            }
            self.schedule_turn();
            budget = budget.saturating_sub(count);
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Writes every link that has output.
    pub(crate) fn flush_links(self: &Rc<Self>, state: &mut State<P>) {
        let mut dirty = std::mem::take(&mut state.links.dirty);
        for link in dirty.drain(..) {
            if let Some(entry) = state.links.table.get_mut(&link) {
                entry.is_dirty = false;
                if entry.writer.is_none() {
                    self.flush_link(state, link);
                }
                self.check_output(state, link);
            }
        }
        state.links.dirty = dirty;
    }

    fn flush_link(self: &Rc<Self>, state: &mut State<P>, link: LinkId) {
        let Some(entry) = state.links.table.get_mut(&link) else { return };
        let Some(socket) = &entry.socket else { return };
        match flush(socket, &mut entry.output) {
            Flush::Done => {}
            Flush::Full => {
                let (inner, socket) = (Rc::clone(self), Rc::clone(socket));
                let writer = tokio::task::spawn_local(async move { inner.write_when_writable(link, socket).await });
                entry.writer = Some(writer.abort_handle());
            }
            Flush::Failed(reason) => self.fail_link(state, link, reason),
        }
    }

    async fn write_when_writable(self: Rc<Self>, link: LinkId, socket: Rc<WriteHalf>) {
        loop {
            // An error shows itself in the write that follows.
            let _ = socket.writable().await;
            let state = &mut *self.state();
            let Some(entry) = state.links.table.get_mut(&link) else { return };
            match flush(&socket, &mut entry.output) {
                Flush::Full => {}
                Flush::Done => {
                    entry.writer = None;
                    return;
                }
                Flush::Failed(reason) => {
                    self.fail_link(state, link, reason);
                    return self.schedule_turn();
                }
            }
        }
    }

    /// A peer that does not read must not fill our memory.
    fn check_output(&self, state: &mut State<P>, link: LinkId) {
        let max = state.options.output_max;
        if let Some(size) = state.links.table.get(&link).map(|entry| entry.output.size()).filter(|size| *size > max) {
            self.fail_link(state, link, format!("the peer does not read: {size} bytes wait to be sent"));
        }
    }

    /// Ends a link from within a turn; its `Down` is stepped in the next.
    fn fail_link(&self, state: &mut State<P>, link: LinkId, reason: Reason) {
        if let Some(mut entry) = state.links.table.remove(&link) {
            entry.end();
            state.deferred.push_back(Event::Net(NetEvent::Down { link, reason }));
        }
    }

    fn log_limited(&self, line: &str) {
        let state = &mut *self.state();
        if state.limiter.allows(clock::monotonic()) {
            state.log(line);
        }
    }
}

fn cut_and_step<P: Process>(
    state: &mut State<P>,
    now: Now,
    link: LinkId,
    cutter: &mut Cutter,
    mut bytes: &[u8],
) -> Result<(), Reason> {
    while let Some(frame) = cutter.next(&mut bytes).map_err(|error| error.to_string())? {
        step_frame(state, now, link, frame)?;
    }
    Ok(())
}

/// Steps one frame, unless its kind has no place after the handshake.
fn step_frame<P: Process>(state: &mut State<P>, now: Now, link: LinkId, frame: Frame) -> Result<(), Reason> {
    if frame.kind == FrameKind::Auth {
        return Err("the peer sent a handshake frame after the handshake".to_owned());
    }
    state.stats.frames_in += 1;
    state.step(now, Event::Net(NetEvent::Frame { link, frame }));
    Ok(())
}
