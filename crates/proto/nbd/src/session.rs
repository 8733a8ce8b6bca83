//! One connection of a client, from the greeting to the end.

use crate::catalog::Catalog;
use crate::fields::Fields;
use crate::handshake::{Handshake, HandshakeStep};
use crate::output::Output;
use crate::request::{Request, Ticket};
use crate::transmission::{Transmission, TransmissionStep};
use crate::wire::Errno;
use cairn_env::block::BlockResult;

/// Whether a server offers TLS, and whether it insists ("Server-side requirements").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// NOTLS: `NBD_OPT_STARTTLS` is refused.
    #[default]
    Off,
    /// SELECTIVETLS with no export that needs it: the client decides.
    Optional,
    /// FORCEDTLS: nothing but `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` is answered in the clear.
    Required,
}

/// What a session found in its input.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// From the next byte on, both directions speak TLS. What `receive` left over is the start of the TLS handshake;
    /// what is in the output goes out in the clear first.
    StartTls,
    /// The handshake ended with this export; requests follow.
    Started {
        /// The server's own name of the export.
        name: String,
    },
    /// Something to do.
    Request(Request),
    /// The client takes its leave: finish what is under way, then close.
    Disconnect,
}

/// Why a connection can't go on. There is no reply for these: the connection must be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Bits in the client flags that the server did not offer.
    #[error("the client set flags {flags:#x}, which were not offered")]
    ClientFlags {
        /// The flags as sent.
        flags: u32,
    },
    /// An option does not start with its magic number.
    #[error("an option starts with {found:#018x} instead of IHAVEOPT")]
    OptionMagic {
        /// What stood there.
        found: u64,
    },
    /// A request does not start with its magic number.
    #[error("a request starts with {found:#010x} instead of its magic number")]
    RequestMagic {
        /// What stood there.
        found: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` for an export that does not exist; that option has no error reply.
    #[error("there is no export named `{name}`")]
    UnknownExport {
        /// The name asked for.
        name: String,
    },
    /// `NBD_OPT_EXPORT_NAME` with a name that is none.
    #[error("NBD_OPT_EXPORT_NAME carries {size} bytes that are no export name")]
    ExportName {
        /// Length of the option.
        size: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` after extended headers were agreed on.
    #[error("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")]
    ExportNameAfterExtendedHeaders,
    /// `NBD_OPT_EXPORT_NAME` in the clear on a server that insists on TLS.
    #[error("the client asks for an export without TLS, which this server requires")]
    TlsRequired,
    /// `NBD_OPT_EXPORT_NAME` while the server goes down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// A payload too long even to read past.
    #[error("a request announces {size} bytes of payload")]
    PayloadTooLong {
        /// Its length.
        size: u64,
    },
}

enum Phase {
    Handshake(Handshake),
    Transmission(Transmission),
}

/// One connection. See the crate documentation for its use.
pub struct Session {
    phase: Phase,
    shutting_down: bool,
    ended: bool,
}

impl Session {
    /// A new connection; the greeting is put into `output`.
    pub fn new(tls: TlsMode, output: &mut Output) -> Self {
        let handshake = Handshake::new(tls);
        handshake.greet(output);
        Self { phase: Phase::Handshake(handshake), shutting_down: false, ended: false }
    }

    /// Takes what it can from the front of `input` and returns how many bytes that was; the caller keeps the rest and
    /// offers it again together with what arrives next, or once requests were finished or output was sent.
    ///
    /// Progress is certain when `input` holds [`crate::limits::RECEIVE_BUFFER_MIN`] bytes, nothing is under way and
    /// `output` is empty. After [`Event::StartTls`] no further byte is taken in the same call.
    ///
    /// # Errors
    /// [`ProtocolError`] when the connection can't go on. Later calls take everything and do nothing.
    pub fn receive(
        &mut self,
        input: &[u8],
        catalog: &dyn Catalog,
        output: &mut Output,
        events: &mut Vec<Event>,
    ) -> Result<usize, ProtocolError> {
        let mut rest = Fields(input);
        while !self.ended {
            let step = self.step(&mut rest, catalog, output, events).inspect_err(|_| self.ended = true)?;
            if step == Flow::Pause {
                return Ok(input.len() - rest.0.len());
            }
        }
        Ok(input.len())
    }

    fn step(
        &mut self,
        rest: &mut Fields<'_>,
        catalog: &dyn Catalog,
        output: &mut Output,
        events: &mut Vec<Event>,
    ) -> Result<Flow, ProtocolError> {
        match &mut self.phase {
            Phase::Handshake(handshake) => match handshake.step(rest, catalog, self.shutting_down, output)? {
                HandshakeStep::Wait => return Ok(Flow::Pause),
                HandshakeStep::Next => {}
                HandshakeStep::StartTls => {
                    events.push(Event::StartTls);
                    return Ok(Flow::Pause);
                }
                HandshakeStep::Start { name, transmission } => {
                    self.phase = Phase::Transmission(transmission);
                    events.push(Event::Started { name });
                }
                HandshakeStep::Leave => self.leave(events),
            },
            Phase::Transmission(transmission) => match transmission.step(rest, self.shutting_down, output)? {
                TransmissionStep::Wait => return Ok(Flow::Pause),
                TransmissionStep::Next => {}
                TransmissionStep::Request(request) => events.push(Event::Request(request)),
                TransmissionStep::Leave => self.leave(events),
            },
        }
        Ok(Flow::Continue)
    }

    fn leave(&mut self, events: &mut Vec<Event>) {
        self.ended = true;
        events.push(Event::Disconnect);
    }

    /// The missing rest of the payload of a write, to be filled straight from the socket instead of through
    /// [`receive`](Self::receive). Empty when no payload is awaited.
    ///
    /// Follow it with [`filled`](Self::filled), and offer no other bytes in between.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        match &mut self.phase {
            Phase::Transmission(transmission) if !self.ended => transmission.payload_mut(),
            _ => &mut [],
        }
    }

    /// The first `count` bytes of [`payload_mut`](Self::payload_mut) hold what the client sent.
    pub fn filled(&mut self, count: usize, events: &mut Vec<Event>) {
        if let Phase::Transmission(transmission) = &mut self.phase
            && let Some(request) = transmission.filled(count)
        {
            events.push(Event::Request(request));
        }
    }

    /// Answers a request with its outcome.
    ///
    /// # Panics
    /// When the device broke its contract: other data than asked for, or extents that do not cover the range.
    pub fn finish(&mut self, ticket: Ticket, result: BlockResult, output: &mut Output) {
        self.transmission().finish(ticket, result, output);
    }

    /// Answers a request with an error that does not come from the device.
    pub fn refuse(&mut self, ticket: Ticket, errno: Errno, text: &str, output: &mut Output) {
        self.transmission().refuse(ticket, errno, text, output);
    }

    fn transmission(&mut self) -> &mut Transmission {
        match &mut self.phase {
            Phase::Transmission(transmission) => transmission,
            Phase::Handshake(_) => panic!("a ticket is only made in the transmission phase"),
        }
    }

    /// Tells the session the present size of the device: requests are checked against it. The client learns of a new
    /// size when it connects again.
    pub fn set_size(&mut self, size: u64) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.set_size(size);
        }
    }

    /// From here on options are answered `NBD_REP_ERR_SHUTDOWN` and requests `NBD_ESHUTDOWN`. Requests under way are
    /// finished as usual.
    pub fn begin_shutdown(&mut self) {
        self.shutting_down = true;
    }

    /// Requests handed out and not yet finished.
    pub fn in_flight(&self) -> usize {
        match &self.phase {
            Phase::Handshake(_) => 0,
            Phase::Transmission(transmission) => transmission.in_flight(),
        }
    }

    /// Bytes held for requests handed out and not yet finished, a payload being received included.
    pub fn in_flight_bytes(&self) -> u64 {
        match &self.phase {
            Phase::Handshake(_) => 0,
            Phase::Transmission(transmission) => transmission.in_flight_bytes(),
        }
    }

    /// True once the handshake is over.
    pub fn is_started(&self) -> bool {
        matches!(self.phase, Phase::Transmission(_))
    }

    /// True once the client left or broke the protocol.
    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

#[derive(PartialEq, Eq)]
enum Flow {
    Continue,
    Pause,
}

#[cfg(test)]
mod tests;
