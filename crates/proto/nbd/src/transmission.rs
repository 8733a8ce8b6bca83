//! The transmission phase: requests in, replies out ("Transmission phase").

use crate::fields::Fields;
use crate::limits::{
    BLOCK_SIZE_PREFERRED, BLOCK_STATUS_BYTES_PER_BLOCK, BLOCK_STATUS_LEN_MAX, IN_FLIGHT_BYTES_MAX, IN_FLIGHT_MAX,
    PAYLOAD_AT_ONCE, PAYLOAD_DISCARD_MAX, PAYLOAD_MAX,
};
use crate::output::Output;
use crate::reply::Style;
use crate::request::{Command, ReplyKind, Request, Ticket};
use crate::session::ProtocolError;
use crate::wire::{
    EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST_SIZE, Errno, REQUEST_MAGIC, REQUEST_SIZE, command, command_flag,
};
use cairn_env::BufMut;
use cairn_env::block::{BlockError, BlockReply, BlockResult};
use cairn_stdx::planted;

/// What the handshake agreed on.
pub(crate) struct Agreement {
    pub style: Style,
    pub size: u64,
    pub read_only: bool,
    /// `base:allocation` was selected for this very export.
    pub allocation: bool,
}

pub(crate) enum TransmissionStep {
    /// Not enough input, or no room for another request.
    Wait,
    Next,
    Request(Request),
    Leave,
}

enum State {
    Header,
    /// A write whose payload is on its way.
    Payload {
        ticket: Ticket,
        fua: bool,
        /// Room for what is here and comes next; up to `size` as the payload arrives.
        buf: BufMut,
        filled: usize,
        size: usize,
    },
    /// The payload of a refused request is being read past; the refusal follows it.
    Discard {
        left: u64,
        ticket: Ticket,
        refusal: Refusal,
    },
}

struct Refusal(Errno, &'static str);

pub(crate) struct Transmission {
    agreement: Agreement,
    state: State,
    in_flight: usize,
    in_flight_bytes: u64,
}

/// A request header of either form.
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
    /// Bytes that follow the header.
    payload: u64,
}

/// What is to be done about a request.
enum Verdict {
    Run(Command),
    /// Run once `len` bytes of payload are there.
    AwaitPayload {
        fua: bool,
    },
    /// Success without asking the device.
    Done,
    Leave,
}

impl Transmission {
    pub(crate) fn new(agreement: Agreement) -> Self {
        Self { agreement, state: State::Header, in_flight: 0, in_flight_bytes: 0 }
    }

    /// Requests handed out; a write whose payload is still arriving is not among them.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight - usize::from(matches!(self.state, State::Payload { .. }))
    }

    pub(crate) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    pub(crate) fn set_size(&mut self, size: u64) {
        self.agreement.size = size;
    }

    /// Takes one header or one run of payload.
    pub(crate) fn step(
        &mut self,
        rest: &mut Fields<'_>,
        shutting_down: bool,
        output: &mut Output,
    ) -> Result<TransmissionStep, ProtocolError> {
        if rest.is_empty() {
            return Ok(TransmissionStep::Wait);
        }
        match &mut self.state {
            State::Header => self.header(rest, shutting_down, output),
            State::Payload { buf, filled, .. } => {
                let count = rest.0.len().min(buf.len() - *filled);
                assert!(count > 0, "there is always room for what comes next");
                let bytes = rest.bytes(count).expect("count is at most what is left");
                buf[*filled..*filled + count].copy_from_slice(bytes);
                Ok(self.filled(count).map_or(TransmissionStep::Next, TransmissionStep::Request))
            }
            State::Discard { left, .. } => {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.0.len());
                rest.bytes(count).expect("count is at most what is left");
                *left -= count as u64;
                if *left == 0
                    && let State::Discard { ticket, refusal, .. } = std::mem::replace(&mut self.state, State::Header)
                {
                    self.agreement.style.error(output, &ticket, refusal.0, refusal.1, None);
                }
                Ok(TransmissionStep::Next)
            }
        }
    }

    pub(crate) fn payload_mut(&mut self) -> &mut [u8] {
        match &mut self.state {
            State::Payload { buf, filled, .. } => &mut buf[*filled..],
            _ => &mut [],
        }
    }

    /// Counts `count` bytes of payload; the request when that was the last of it.
    pub(crate) fn filled(&mut self, count: usize) -> Option<Request> {
        let State::Payload { buf, filled, size, .. } = &mut self.state else {
            assert_eq!(count, 0, "no payload is awaited");
            return None;
        };
        *filled += count;
        assert!(*filled <= buf.len(), "{filled} bytes filled of {}", buf.len());
        if *filled < *size {
            if *filled == buf.len() {
                let mut larger = BufMut::zeroed((buf.len() * 4).min(*size));
                larger[..*filled].copy_from_slice(buf);
                *buf = larger;
            }
            return None;
        }
        let State::Payload { ticket, fua, buf, .. } = std::mem::replace(&mut self.state, State::Header) else {
            return None;
        };
        let command = Command::Write { offset: ticket.offset, data: buf.freeze(), fua };
        Some(Request { ticket, command })
    }

    fn header(
        &mut self,
        rest: &mut Fields<'_>,
        shutting_down: bool,
        output: &mut Output,
    ) -> Result<TransmissionStep, ProtocolError> {
        let mut ahead = *rest;
        let Some(header) = self.parse(&mut ahead)? else { return Ok(TransmissionStep::Wait) };
        if header.payload > PAYLOAD_DISCARD_MAX {
            return Err(ProtocolError::PayloadTooLong { size: header.payload });
        }
        let verdict = if shutting_down && header.kind != command::DISC {
            Err(Refusal(Errno::Shutdown, "the export is being shut down"))
        } else {
            self.judge(&header)
        };
        let kind = match header.kind {
            command::READ => ReplyKind::Data,
            command::BLOCK_STATUS => ReplyKind::Extents { one: header.flags & command_flag::REQ_ONE != 0 },
            kind => ReplyKind::Status { writes: matches!(kind, command::WRITE | command::WRITE_ZEROES) },
        };
        let cost = match &verdict {
            Ok(verdict) => cost(&header, verdict),
            Err(_) => 0,
        };
        if !self.has_room(cost, output) {
            return Ok(TransmissionStep::Wait); // The header stays in the input until there is room.
        }
        *rest = ahead;
        let mut ticket = Ticket { cookie: header.cookie, offset: header.offset, len: header.len, kind, cost };
        match verdict {
            Ok(Verdict::Leave) => return Ok(TransmissionStep::Leave),
            Ok(Verdict::Done) if kind == ReplyKind::Data => self.agreement.style.done_reading(output, &ticket),
            Ok(Verdict::Done) => self.agreement.style.done(output, &ticket),
            Ok(Verdict::AwaitPayload { fua }) => {
                self.admit(cost);
                let size = usize::try_from(header.len).expect("checked against PAYLOAD_MAX");
                let buf = BufMut::zeroed(size.min(PAYLOAD_AT_ONCE));
                self.state = State::Payload { ticket, fua, buf, filled: 0, size };
            }
            Ok(Verdict::Run(command)) => {
                self.admit(cost);
                if let Command::BlockStatus { len, .. } = &command {
                    ticket.len = *len;
                }
                return Ok(TransmissionStep::Request(Request { ticket, command }));
            }
            Err(refusal) if header.payload > 0 => {
                self.state = State::Discard { left: header.payload, ticket, refusal };
            }
            Err(refusal) => self.agreement.style.error(output, &ticket, refusal.0, refusal.1, None),
        }
        Ok(TransmissionStep::Next)
    }

    /// True when a request that holds `cost` bytes may be taken now.
    fn has_room(&self, cost: u64, output: &Output) -> bool {
        if planted!("nbd_unbounded_in_flight") {
            return true;
        }
        let held = self.in_flight_bytes + output.len() as u64;
        self.in_flight < IN_FLIGHT_MAX && (held == 0 || held + cost <= IN_FLIGHT_BYTES_MAX)
    }

    fn admit(&mut self, cost: u64) {
        self.in_flight += 1;
        self.in_flight_bytes += cost;
    }

    fn release(&mut self, ticket: &Ticket) {
        assert!(self.in_flight > 0 && self.in_flight_bytes >= ticket.cost, "a ticket is given back once");
        self.in_flight -= 1;
        self.in_flight_bytes -= ticket.cost;
    }

    /// "Request message", or "Extended request message" of the extension.
    fn parse(&self, rest: &mut Fields<'_>) -> Result<Option<Header>, ProtocolError> {
        let extended = self.agreement.style == Style::Extended;
        let (size, magic) =
            if extended { (EXTENDED_REQUEST_SIZE, EXTENDED_REQUEST_MAGIC) } else { (REQUEST_SIZE, REQUEST_MAGIC) };
        let Some(bytes) = rest.bytes(size) else { return Ok(None) };
        let mut fields = Fields(bytes);
        let parsed = (|| {
            let found = fields.u32()?;
            let (flags, kind, cookie, offset) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u64()?);
            let len = if extended { fields.u64()? } else { u64::from(fields.u32()?) };
            // QEMU as a client leaves the flag out of its extended writes and sends the payload all the same (seen with
            // 10.0); its own server takes a write to carry one in any case, and so do we.
            let flagged = extended && flags & command_flag::PAYLOAD_LEN != 0;
            let carries = flagged || kind == command::WRITE;
            let payload = if carries { len } else { 0 };
            Some((found, Header { flags, kind, cookie, offset, len, payload }))
        })();
        let (found, header) = parsed.expect("the header has its full size");
        if found != magic { Err(ProtocolError::RequestMagic { found }) } else { Ok(Some(header)) }
    }

    /// "Request types" and "Error values".
    fn judge(&self, header: &Header) -> Result<Verdict, Refusal> {
        let &Header { flags, kind, offset, len, .. } = header;
        if kind == command::DISC {
            return Ok(Verdict::Leave);
        }
        self.check_flags(flags, kind)?;
        match kind {
            command::FLUSH if offset != 0 || len != 0 => {
                return Err(Refusal(Errno::Invalid, "a flush has no range"));
            }
            command::FLUSH => return Ok(Verdict::Run(Command::Flush)),
            command::READ | command::WRITE | command::TRIM | command::CACHE => {}
            command::WRITE_ZEROES | command::BLOCK_STATUS => {}
            _ => return Err(Refusal(Errno::Invalid, "unknown command")),
        }
        let writes = matches!(kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && self.agreement.read_only && !planted!("nbd_read_only_writable") {
            return Err(Refusal(Errno::NotPermitted, "the export is read-only"));
        }
        let payload_max = u64::from(PAYLOAD_MAX);
        if kind == command::WRITE && len > payload_max {
            return Err(Refusal(Errno::Invalid, "the write is longer than the maximum payload"));
        }
        self.check_range(offset, len, kind)?;
        let fua = flags & command_flag::FUA != 0 && !planted!("nbd_fua_dropped");
        if len == 0 {
            return if kind == command::BLOCK_STATUS {
                Err(Refusal(Errno::Invalid, "an empty range has no status"))
            } else {
                Ok(Verdict::Done)
            };
        }
        Ok(match kind {
            command::READ if len > payload_max => {
                let errno = if self.agreement.style.has_chunks() { Errno::Overflow } else { Errno::Invalid };
                return Err(Refusal(errno, "the read is longer than the maximum payload"));
            }
            command::READ => Verdict::Run(Command::Read { offset, len: u32::try_from(len).expect("checked above") }),
            command::WRITE => Verdict::AwaitPayload { fua },
            command::TRIM => Verdict::Run(Command::Trim { offset, len, fua }),
            command::CACHE => Verdict::Done, // A hint; the client side of a volume keeps no cache to warm.
            command::WRITE_ZEROES => Verdict::Run(Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: flags & command_flag::NO_HOLE != 0,
                fast: flags & command_flag::FAST_ZERO != 0,
            }),
            command::BLOCK_STATUS if !self.agreement.allocation => {
                return Err(Refusal(Errno::Invalid, "no metadata context was selected"));
            }
            _ => Verdict::Run(Command::BlockStatus { offset, len: len.min(BLOCK_STATUS_LEN_MAX) }),
        })
    }

    /// "Command flags": which flags go with which command. FUA goes with all of them.
    fn check_flags(&self, flags: u16, kind: u16) -> Result<(), Refusal> {
        let extended = self.agreement.style == Style::Extended;
        let valid = command_flag::FUA
            | match kind {
                command::READ if self.agreement.style.has_chunks() => command_flag::DF,
                command::WRITE if extended => command_flag::PAYLOAD_LEN,
                command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
                command::BLOCK_STATUS => command_flag::REQ_ONE,
                _ => 0,
            };
        if flags & !valid != 0 {
            return Err(Refusal(Errno::Invalid, "a flag does not go with the command"));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64, kind: u16) -> Result<(), Refusal> {
        let size = self.agreement.size;
        if len <= size && offset <= size - len {
            return Ok(());
        }
        let errno = match kind {
            command::WRITE | command::WRITE_ZEROES => Errno::NoSpace,
            _ => Errno::Invalid,
        };
        Err(Refusal(errno, "the range lies outside the export"))
    }

    pub(crate) fn finish(&mut self, ticket: Ticket, result: BlockResult, output: &mut Output) {
        self.release(&ticket);
        let style = self.agreement.style;
        match (ticket.kind, result) {
            (ReplyKind::Data, Ok(BlockReply::Data(pieces))) => style.data(output, &ticket, pieces),
            (ReplyKind::Extents { one }, Ok(BlockReply::Extents(extents))) => {
                style.extents(output, &ticket, &extents, one);
            }
            (ReplyKind::Status { .. }, Ok(BlockReply::Done)) => style.done(output, &ticket),
            (kind, Ok(reply)) => panic!("the device answered {reply:?} where {kind:?} was asked for"),
            (kind, Err(error)) => {
                let at = if let BlockError::Damaged { offset, .. } = &error { Some(*offset) } else { None };
                style.error(output, &ticket, errno(&error, kind), &error.to_string(), at);
            }
        }
    }

    pub(crate) fn refuse(&mut self, ticket: Ticket, errno: Errno, text: &str, output: &mut Output) {
        self.release(&ticket);
        self.agreement.style.error(output, &ticket, errno, text, None);
    }
}

/// Bytes held for a request while it is under way.
fn cost(header: &Header, verdict: &Verdict) -> u64 {
    match verdict {
        Verdict::AwaitPayload { .. } | Verdict::Run(Command::Read { .. }) => header.len,
        Verdict::Run(Command::BlockStatus { len, .. }) => {
            len.div_ceil(u64::from(BLOCK_SIZE_PREFERRED)) * BLOCK_STATUS_BYTES_PER_BLOCK
        }
        _ => 0,
    }
}

/// "Error values": what a failure of the device is called on the wire.
fn errno(error: &BlockError, kind: ReplyKind) -> Errno {
    match error {
        BlockError::OutOfRange { .. } if kind == (ReplyKind::Status { writes: true }) => Errno::NoSpace,
        BlockError::OutOfRange { .. } => Errno::Invalid,
        BlockError::ReadOnly => Errno::NotPermitted,
        BlockError::NoSpace => Errno::NoSpace,
        BlockError::Closed => Errno::Shutdown,
        // A fenced client must see its IO fail; `NBD_ESHUTDOWN` would invite it to reconnect and go on.
        BlockError::Fenced | BlockError::Miscompare { .. } | BlockError::Damaged { .. } | BlockError::Other(_) => {
            Errno::Io
        }
    }
}
