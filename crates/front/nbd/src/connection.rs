//! One client: the task that reads, and the completions that answer.

use crate::execute::execute;
use crate::exports::{ExportOptions, Exports};
use crate::input::Input;
use crate::notice::{Ending, Notice};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::transport::Transport;
use cairn_env::block::{BlockDevice, BlockResult};
use cairn_nbd_proto::{Errno, Event, Output, Session, Ticket, TlsMode};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Rounds of reading and answering in one turn of the task; then others get theirs.
const ROUNDS_MAX: usize = 16;

pub(crate) struct Connection {
    stream: Stream,
    peer: String,
    exports: Exports,
    tls: Option<Tls>,
    notices: Rc<dyn Fn(&Notice)>,
    state: RefCell<State>,
    ended: Cell<bool>,
}

struct State {
    session: Session,
    output: Output,
    transport: Transport,
    input: Input,
    export: Option<Attached>,
    events: Vec<Event>,
    waker: Option<Waker>,
    /// The task is in its turn and will send what completions leave in the output.
    in_turn: bool,
    /// `NBD_OPT_STARTTLS` was answered; TLS starts when the answer is out.
    tls_next: bool,
    /// Why nothing more will be read; the first reason stays.
    ending: Option<Ending>,
    /// The peer takes nothing any more.
    write_closed: bool,
    killed: bool,
}

#[derive(Clone)]
struct Attached {
    name: String,
    device: Rc<dyn BlockDevice>,
    options: Rc<ExportOptions>,
}

impl Connection {
    pub(crate) fn new(
        stream: Stream,
        peer: String,
        exports: Exports,
        tls: Option<Tls>,
        notices: Rc<dyn Fn(&Notice)>,
    ) -> Rc<Self> {
        let mut output = Output::new();
        let mode = tls.as_ref().map_or(TlsMode::Off, |tls| tls.mode);
        let session = Session::new(mode, &mut output);
        let state = State {
            session,
            output,
            transport: Transport::Plain,
            input: Input::new(),
            export: None,
            events: Vec::new(),
            waker: None,
            in_turn: false,
            tls_next: false,
            ending: None,
            write_closed: false,
            killed: false,
        };
        Rc::new(Self { stream, peer, exports, tls, notices, state: RefCell::new(state), ended: Cell::new(false) })
    }

    /// Serves the client until it leaves, breaks the protocol, or is shut down.
    pub(crate) async fn run(self: Rc<Self>, handshake_timeout: Duration) {
        let mut deadline = std::pin::pin!(tokio::time::sleep(handshake_timeout));
        poll_fn(|cx| {
            if !self.state.borrow().session.is_started() && deadline.as_mut().poll(cx).is_ready() {
                let mut state = self.state.borrow_mut();
                state.end(Ending::HandshakeTimeout);
                state.killed = true;
            }
            self.turn(cx)
        })
        .await;
        self.ended.set(true);
        let (export, ending) = {
            let state = &mut *self.state.borrow_mut();
            state.transport.close(&self.stream);
            self.stream.shut_down(); // Operations of a client that was cut off still hold this connection.
            state.output.clear();
            (state.export.take().map(|export| export.name), state.ending.take().unwrap_or(Ending::Closed))
        };
        (self.notices)(&Notice::Ended { peer: self.peer.clone(), export, ending });
    }

    /// True when the task is over; replies that come later are dropped.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Finish what is under way, refuse the rest, disconnect.
    pub(crate) fn begin_shutdown(&self) {
        let mut state = self.state.borrow_mut();
        state.session.begin_shutdown();
        state.end(Ending::ShutDown);
        state.wake();
    }

    /// Disconnect without waiting for anything.
    pub(crate) fn kill(&self) {
        let mut state = self.state.borrow_mut();
        if state.session.in_flight() > 0 || !state.output.is_empty() {
            state.ending = Some(Ending::Killed);
        }
        state.killed = true;
        state.wake();
    }

    /// The device answered the request of `ticket`.
    pub(crate) fn complete(&self, ticket: Ticket, result: BlockResult) {
        self.answer(|session, output| session.finish(ticket, result, output));
    }

    /// The request of `ticket` never reached the device.
    pub(crate) fn refuse(&self, ticket: Ticket, errno: Errno, text: &str) {
        self.answer(|session, output| session.refuse(ticket, errno, text, output));
    }

    fn answer(&self, encode: impl FnOnce(&mut Session, &mut Output)) {
        let state = &mut *self.state.borrow_mut();
        encode(&mut state.session, &mut state.output);
        if self.ended.get() || state.write_closed {
            state.output.clear();
        }
        if self.ended.get() || state.in_turn {
            return;
        }
        if state.session.in_flight() == 0 {
            state.send(&self.stream); // Nothing will come that could share this send.
        }
        if !state.output.is_empty() || !state.input.is_empty() || state.is_closing() {
            state.wake();
        }
    }

    /// One turn of the task: take in, submit, send, until the socket has no more to give or take.
    fn turn(self: &Rc<Self>, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut state = self.state.borrow_mut();
            state.in_turn = true;
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
        }
        let mut outcome = None;
        for _ in 0..ROUNDS_MAX {
            let taken = self.take_requests();
            let state = &mut *self.state.borrow_mut();
            let sent = self.send_all(state, cx);
            if state.is_over() {
                outcome = Some(Poll::Ready(()));
                break;
            }
            let started_tls = self.start_tls_if_due(state);
            let read = self.read_some(state, cx);
            if !(taken || sent || read || started_tls) {
                outcome = Some(Poll::Pending);
                break;
            }
        }
        self.state.borrow_mut().in_turn = false;
        outcome.unwrap_or_else(|| {
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// Feeds the session from the receive buffer and submits what it finds. True when it took anything.
    fn take_requests(self: &Rc<Self>) -> bool {
        let (mut events, took, export) = {
            let state = &mut *self.state.borrow_mut();
            let mut took = !state.events.is_empty();
            if !state.tls_next && !state.input.is_empty() {
                if let Some(export) = &state.export {
                    state.session.set_size(export.device.size());
                }
                let State { session, input, output, events, .. } = state;
                match session.receive(input.bytes(), &self.exports, output, events) {
                    Ok(count) => {
                        input.take(count);
                        took |= count > 0;
                    }
                    Err(error) => {
                        state.end(Ending::Protocol(error));
                        took = true;
                    }
                }
            }
            (std::mem::take(&mut state.events), took, state.export.clone())
        };
        let mut export = export;
        for event in events.drain(..) {
            match event {
                Event::Request(request) => {
                    let export = export.as_ref().expect("requests follow the choice of an export");
                    execute(self, &export.device, &export.options, request);
                }
                Event::Started { name } => export = Some(self.start(name)),
                Event::StartTls => self.state.borrow_mut().tls_next = true,
                Event::Disconnect => self.state.borrow_mut().end(Ending::Left),
            }
        }
        self.state.borrow_mut().events = events; // Empty; its memory is used again.
        took
    }

    /// The client chose an export.
    fn start(self: &Rc<Self>, name: String) -> Attached {
        let (device, options) = self.exports.attach(&name, self).expect("nothing ran since the catalog was asked");
        let attached = Attached { name, device, options: Rc::new(options) };
        let mut state = self.state.borrow_mut();
        state.export = Some(attached.clone());
        let tls = matches!(state.transport, Transport::Tls(_));
        drop(state);
        (self.notices)(&Notice::Started { peer: self.peer.clone(), export: attached.name.clone(), tls });
        attached
    }

    /// Sends until the output is empty or the socket is full; then the task is woken when it is not. True when
    /// anything went out.
    fn send_all(&self, state: &mut State, cx: &mut Context<'_>) -> bool {
        let (before, wanted) = (state.output.len(), state.transport.wants_write());
        while !state.write_closed && (!state.output.is_empty() || state.transport.wants_write()) {
            if state.send(&self.stream) {
                continue;
            }
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => state.fail_write(error),
                Poll::Pending => break,
            }
        }
        state.output.len() < before || (wanted && !state.transport.wants_write())
    }

    /// Switches to TLS once the answer to `NBD_OPT_STARTTLS` is out.
    fn start_tls_if_due(&self, state: &mut State) -> bool {
        if !state.tls_next || !state.output.is_empty() {
            return false;
        }
        state.tls_next = false;
        let tls = self.tls.as_ref().expect("the session starts TLS only when it was told there is some");
        match Transport::start_tls(tls.config.clone(), state.input.take_all()) {
            Ok(transport) => state.transport = transport,
            Err(error) => state.fail_write(io::Error::other(error)),
        }
        true
    }

    /// Reads once: into the payload that is awaited, and behind it into the receive buffer. True when bytes came or
    /// the stream ended.
    fn read_some(&self, state: &mut State, cx: &mut Context<'_>) -> bool {
        if state.ending.is_some() || state.tls_next {
            return false;
        }
        loop {
            let payload = if state.input.is_empty() { state.session.payload_mut() } else { &mut [] };
            let space = state.input.space();
            if payload.is_empty() && space.is_empty() {
                return false; // Full: the client waits until requests are answered and replies are sent.
            }
            let awaited = payload.len();
            match state.transport.read(&self.stream, payload, space) {
                Ok(0) => {
                    state.end(Ending::Closed);
                    return true;
                }
                Ok(count) => {
                    let to_payload = count.min(awaited);
                    state.session.filled(to_payload, &mut state.events);
                    state.input.filled(count - to_payload);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => match self.stream.poll_read_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => {
                        state.fail_write(error);
                        return true;
                    }
                    // What TLS has to say before it can hear more is sent in the next round.
                    Poll::Pending => return state.transport.wants_write() && !state.write_closed,
                },
                Err(error) => {
                    state.fail_write(error);
                    return true;
                }
            }
        }
    }
}

impl State {
    fn end(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    fn is_closing(&self) -> bool {
        self.ending.is_some()
    }

    /// Nothing is left to do: every request was answered and every reply sent, or can't be.
    fn is_over(&self) -> bool {
        let sent = self.write_closed || (self.output.is_empty() && !self.transport.wants_write());
        self.killed || (self.is_closing() && self.session.in_flight() == 0 && sent)
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Sends what the socket takes now. False when it is full.
    fn send(&mut self, stream: &Stream) -> bool {
        match self.transport.write(stream, &mut self.output) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) => {
                self.fail_write(error);
                true
            }
        }
    }

    /// The connection is broken: nobody hears further replies.
    fn fail_write(&mut self, error: io::Error) {
        self.end(Ending::Io(error));
        self.write_closed = true;
        self.output.clear();
    }
}
