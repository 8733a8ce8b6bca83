//! The handshake: greeting, client flags, options ("Fixed newstyle negotiation").

use crate::catalog::{Catalog, ExportInfo, resolve};
use crate::fields::Fields;
use crate::limits::{
    BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, HANDSHAKE_OUTPUT_MAX, OPTION_DATA_MAX, PAYLOAD_MAX, STRING_MAX,
};
use crate::output::Output;
use crate::reply::{Style, shorten};
use crate::session::{ProtocolError, TlsMode};
use crate::transmission::{Agreement, Transmission};
use crate::wire::{
    ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, INIT_MAGIC, OPTION_HEADER_SIZE, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    handshake_flag, info, option, option_reply, transmission_flag,
};
use cairn_stdx::planted;

/// Zeros after the answer to `NBD_OPT_EXPORT_NAME`, unless both sides agreed to leave them out.
const EXPORT_NAME_ZEROES: [u8; 124] = [0; 124];
/// A client's text is quoted in messages up to this length.
const QUOTE_MAX: usize = 256;

pub(crate) enum HandshakeStep {
    /// Not enough input, or too much output waits.
    Wait,
    Next,
    StartTls,
    Start {
        name: String,
        transmission: Transmission,
    },
    Leave,
}

enum State {
    ClientFlags,
    Options,
    /// The data of an option that was too long.
    Discard {
        left: u32,
    },
}

pub(crate) struct Handshake {
    state: State,
    tls: TlsMode,
    tls_active: bool,
    fixed: bool,
    no_zeroes: bool,
    style: Style,
    /// The export for which `base:allocation` was selected.
    allocation_of: Option<String>,
}

/// Why an option is refused: reply type and text.
struct Refusal(u32, String);

fn invalid(text: &str) -> Refusal {
    Refusal(option_reply::ERR_INVALID, text.to_owned())
}

fn unknown_export(name: &str) -> Refusal {
    Refusal(option_reply::ERR_UNKNOWN, format!("there is no export named `{}`", shorten(name, QUOTE_MAX)))
}

impl Handshake {
    pub(crate) fn new(tls: TlsMode) -> Self {
        Self {
            state: State::ClientFlags,
            tls,
            tls_active: false,
            fixed: false,
            no_zeroes: false,
            style: Style::Simple,
            allocation_of: None,
        }
    }

    /// "Newstyle negotiation": the server speaks first.
    pub(crate) fn greet(&self, output: &mut Output) {
        output.put(&INIT_MAGIC.to_be_bytes());
        output.put(&OPTION_MAGIC.to_be_bytes());
        output.put(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
    }

    /// Takes the client flags, one option, or a run of data to be read past.
    pub(crate) fn step(
        &mut self,
        rest: &mut Fields<'_>,
        catalog: &dyn Catalog,
        shutting_down: bool,
        output: &mut Output,
    ) -> Result<HandshakeStep, ProtocolError> {
        match &mut self.state {
            State::ClientFlags => self.client_flags(rest),
            State::Discard { left } => {
                let count = rest.0.len().min(*left as usize);
                rest.bytes(count).expect("count is at most what is left");
                *left -= u32::try_from(count).expect("at most left");
                if *left > 0 {
                    return Ok(HandshakeStep::Wait);
                }
                self.state = State::Options;
                Ok(HandshakeStep::Next)
            }
            State::Options if output.len() >= HANDSHAKE_OUTPUT_MAX => Ok(HandshakeStep::Wait),
            State::Options => self.option(rest, catalog, shutting_down, output),
        }
    }

    /// "Client flags".
    fn client_flags(&mut self, rest: &mut Fields<'_>) -> Result<HandshakeStep, ProtocolError> {
        let Some(flags) = rest.u32() else { return Ok(HandshakeStep::Wait) };
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Err(ProtocolError::ClientFlags { flags });
        }
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Options;
        Ok(HandshakeStep::Next)
    }

    fn option(
        &mut self,
        rest: &mut Fields<'_>,
        catalog: &dyn Catalog,
        shutting_down: bool,
        output: &mut Output,
    ) -> Result<HandshakeStep, ProtocolError> {
        let mut ahead = *rest;
        if ahead.0.len() < OPTION_HEADER_SIZE {
            return Ok(HandshakeStep::Wait);
        }
        let (Some(magic), Some(kind), Some(size)) = (ahead.u64(), ahead.u32(), ahead.u32()) else {
            return Ok(HandshakeStep::Wait);
        };
        if magic != OPTION_MAGIC {
            return Err(ProtocolError::OptionMagic { found: magic });
        }
        let too_long = size as usize > OPTION_DATA_MAX;
        let data = if too_long { Some(&[][..]) } else { ahead.bytes(size as usize) };
        if kind == option::ABORT {
            *rest = ahead; // What it carries is ignored, even if it never arrives.
            reply(output, kind, option_reply::ACK, &[]);
            return Ok(HandshakeStep::Leave);
        }
        if kind == option::EXPORT_NAME && (too_long || size as usize > STRING_MAX) {
            return Err(ProtocolError::ExportName { size });
        }
        let Some(data) = data else { return Ok(HandshakeStep::Wait) };
        *rest = ahead;
        if kind == option::SET_META_CONTEXT {
            self.allocation_of = None; // A new selection replaces the last one even when it fails.
        }
        if kind == option::EXPORT_NAME {
            return self.export_name(data, catalog, shutting_down, output);
        }
        let outcome = match self.admit(kind, shutting_down) {
            Ok(()) if too_long => {
                Err(Refusal(option_reply::ERR_TOO_BIG, format!("an option of {size} bytes; {OPTION_DATA_MAX} at most")))
            }
            Ok(()) => self.answer(kind, data, catalog, output),
            Err(refusal) => Err(refusal),
        };
        if too_long {
            self.state = State::Discard { left: size };
        }
        Ok(outcome.unwrap_or_else(|Refusal(code, text)| {
            reply(output, kind, code, text.as_bytes());
            HandshakeStep::Next
        }))
    }

    /// True while a client must start TLS before anything else.
    fn needs_tls(&self) -> bool {
        self.tls == TlsMode::Required && !self.tls_active && !planted!("nbd_tls_not_enforced")
    }

    /// Refusals that come before a look at the option ("FORCEDTLS mode", "Termination of the session").
    fn admit(&self, kind: u32, shutting_down: bool) -> Result<(), Refusal> {
        if shutting_down {
            return Err(Refusal(option_reply::ERR_SHUTDOWN, "the server is shutting down".to_owned()));
        }
        if self.needs_tls() && kind != option::STARTTLS {
            return Err(Refusal(option_reply::ERR_TLS_REQD, "this server requires TLS".to_owned()));
        }
        Ok(())
    }

    fn answer(
        &mut self,
        kind: u32,
        data: &[u8],
        catalog: &dyn Catalog,
        output: &mut Output,
    ) -> Result<HandshakeStep, Refusal> {
        match kind {
            option::LIST => {
                no_data(data)?;
                for (name, description) in catalog.list() {
                    let name = name.as_bytes();
                    let size = u32::try_from(name.len()).expect("names are short").to_be_bytes();
                    reply(output, kind, option_reply::SERVER, &[&size, name, description.as_bytes()].concat());
                }
            }
            option::STARTTLS => return self.start_tls(data, output),
            option::INFO | option::GO => return self.info_or_go(kind, data, catalog, output),
            option::STRUCTURED_REPLY => {
                no_data(data)?;
                if self.style == Style::Extended {
                    let text = "extended headers were agreed on already".to_owned();
                    return Err(Refusal(option_reply::ERR_EXT_HEADER_REQD, text));
                }
                self.style = Style::Structured;
            }
            option::EXTENDED_HEADERS => {
                no_data(data)?;
                self.style = Style::Extended;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(kind, data, catalog, output)?,
            _ => return Err(Refusal(option_reply::ERR_UNSUP, format!("option {kind} is not supported"))),
        }
        reply(output, kind, option_reply::ACK, &[]);
        Ok(HandshakeStep::Next)
    }

    /// `NBD_OPT_STARTTLS`. Nothing agreed on in the clear survives it.
    fn start_tls(&mut self, data: &[u8], output: &mut Output) -> Result<HandshakeStep, Refusal> {
        no_data(data)?;
        if self.tls_active {
            return Err(invalid("TLS is running already"));
        }
        if self.tls == TlsMode::Off || !self.fixed {
            return Err(Refusal(option_reply::ERR_POLICY, "this server has no TLS".to_owned()));
        }
        reply(output, option::STARTTLS, option_reply::ACK, &[]);
        self.tls_active = true;
        if !planted!("nbd_starttls_keeps_state") {
            self.style = Style::Simple;
            self.allocation_of = None;
        }
        Ok(HandshakeStep::StartTls)
    }

    /// `NBD_OPT_EXPORT_NAME`: the only answer to a mistake is to hang up.
    fn export_name(
        &mut self,
        data: &[u8],
        catalog: &dyn Catalog,
        shutting_down: bool,
        output: &mut Output,
    ) -> Result<HandshakeStep, ProtocolError> {
        if shutting_down {
            return Err(ProtocolError::ShuttingDown);
        }
        if self.needs_tls() {
            return Err(ProtocolError::TlsRequired);
        }
        if self.style == Style::Extended {
            return Err(ProtocolError::ExportNameAfterExtendedHeaders);
        }
        let size = u32::try_from(data.len()).expect("checked against STRING_MAX");
        let name = std::str::from_utf8(data).map_err(|_| ProtocolError::ExportName { size })?;
        let export = resolve(catalog, name)
            .ok_or_else(|| ProtocolError::UnknownExport { name: shorten(name, QUOTE_MAX).to_owned() })?;
        output.put(&export.size.to_be_bytes());
        output.put(&self.transmission_flags(&export).to_be_bytes());
        if !self.no_zeroes {
            output.put(&EXPORT_NAME_ZEROES);
        }
        Ok(self.start(export))
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn info_or_go(
        &mut self,
        kind: u32,
        data: &[u8],
        catalog: &dyn Catalog,
        output: &mut Output,
    ) -> Result<HandshakeStep, Refusal> {
        let mut fields = Fields(data);
        let name = fields.counted().ok_or_else(|| invalid("the name is longer than the option"))?;
        let name = text(name)?;
        let count = fields.u16().ok_or_else(|| invalid("the option ends before its information requests"))?;
        if fields.0.len() != usize::from(count) * 2 {
            return Err(invalid("the number of information requests does not match the length of the option"));
        }
        let (mut wants_name, mut wants_description, mut wants_block_size) = (false, false, false);
        while let Some(wanted) = fields.u16() {
            match wanted {
                info::NAME => wants_name = true,
                info::DESCRIPTION => wants_description = true,
                info::BLOCK_SIZE => wants_block_size = true,
                _ => {}
            }
        }
        let export = resolve(catalog, name).ok_or_else(|| unknown_export(name))?;
        let mut inform = |what: u16, fields: &[&[u8]]| {
            let payload = [&[&what.to_be_bytes()[..]], fields].concat().concat();
            reply(output, kind, option_reply::INFO, &payload);
        };
        inform(info::EXPORT, &[&export.size.to_be_bytes(), &self.transmission_flags(&export).to_be_bytes()]);
        if wants_name {
            inform(info::NAME, &[export.name.as_bytes()]);
        }
        if wants_description && !export.description.is_empty() {
            inform(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        if wants_block_size {
            let sizes = [BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, PAYLOAD_MAX].map(u32::to_be_bytes);
            inform(info::BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        }
        reply(output, kind, option_reply::ACK, &[]);
        Ok(if kind == option::GO { self.start(export) } else { HandshakeStep::Next })
    }

    /// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT` ("Metadata querying").
    fn meta_context(
        &mut self,
        kind: u32,
        data: &[u8],
        catalog: &dyn Catalog,
        output: &mut Output,
    ) -> Result<(), Refusal> {
        let set = kind == option::SET_META_CONTEXT;
        if !self.style.has_chunks() {
            return Err(invalid("metadata contexts need structured replies"));
        }
        let mut fields = Fields(data);
        let malformed = || invalid("a string is longer than the option");
        let name = text(fields.counted().ok_or_else(malformed)?)?;
        let count = fields.u32().ok_or_else(|| invalid("the option ends before its queries"))?;
        let mut wanted = count == 0 && !set;
        for _ in 0..count {
            let query = text(fields.counted().ok_or_else(malformed)?)?;
            if !query.contains(':') {
                return Err(invalid("a query without a namespace"));
            }
            wanted |= query == ALLOCATION_CONTEXT || (query == "base:" && !set);
        }
        if !fields.is_empty() {
            return Err(invalid("the option is longer than its queries"));
        }
        let export = resolve(catalog, name).ok_or_else(|| unknown_export(name))?;
        if wanted {
            let id = if set { ALLOCATION_CONTEXT_ID } else { 0 };
            let payload = [&id.to_be_bytes()[..], ALLOCATION_CONTEXT.as_bytes()].concat();
            reply(output, kind, option_reply::META_CONTEXT, &payload);
        }
        if set && wanted {
            self.allocation_of = Some(export.name);
        }
        Ok(())
    }

    fn start(&mut self, export: ExportInfo) -> HandshakeStep {
        let agreement = Agreement {
            style: self.style,
            size: export.size,
            read_only: export.read_only,
            allocation: self.allocation_of.as_deref() == Some(&export.name),
        };
        HandshakeStep::Start { name: export.name, transmission: Transmission::new(agreement) }
    }

    /// "Transmission flags". Several connections are safe: all of them use one device, and its flush covers every
    /// write it has answered, whoever sent it.
    fn transmission_flags(&self, export: &ExportInfo) -> u16 {
        use transmission_flag::*;
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
        flags |= if export.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
        if self.style.has_chunks() {
            flags |= SEND_DF;
        }
        flags
    }
}

fn no_data(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() { Ok(()) } else { Err(invalid("the option carries no data")) }
}

/// A string of the handshake ("Conventions").
fn text(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > STRING_MAX {
        return Err(Refusal(option_reply::ERR_TOO_BIG, format!("a string of {} bytes; 4096 at most", bytes.len())));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| invalid("a string is not UTF-8"))?;
    if text.contains('\0') { Err(invalid("a string contains a zero byte")) } else { Ok(text) }
}

/// "Fixed newstyle negotiation": one reply to an option.
fn reply(output: &mut Output, option: u32, kind: u32, data: &[u8]) {
    output.put(&OPTION_REPLY_MAGIC.to_be_bytes());
    output.put(&option.to_be_bytes());
    output.put(&kind.to_be_bytes());
    output.put(&u32::try_from(data.len()).expect("replies are short").to_be_bytes());
    output.put(data);
}
