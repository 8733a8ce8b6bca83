//! The byte pipeline of a connection: in the clear, or through TLS.

use crate::stream::Stream;
use cairn_nbd_proto::Output;
use rustls::{ServerConfig, ServerConnection};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

/// Slices given to one send.
const SLICES_MAX: usize = 32;

/// Encrypted bytes a connection holds for one send.
const TLS_BUFFER_SIZE: usize = 256 << 10;

pub(crate) enum Transport {
    Plain,
    Tls(Box<TlsPipe>),
}

/// A TLS session, and what arrived for it before it existed.
pub(crate) struct TlsPipe {
    session: ServerConnection,
    early: Vec<u8>,
    early_taken: usize,
}

impl Transport {
    /// Switches to TLS; `early` is what the socket gave after the plain part.
    pub(crate) fn start_tls(config: Arc<ServerConfig>, early: Vec<u8>) -> Result<Self, rustls::Error> {
        let mut session = ServerConnection::new(config)?;
        session.set_buffer_limit(Some(TLS_BUFFER_SIZE));
        Ok(Transport::Tls(Box::new(TlsPipe { session, early, early_taken: 0 })))
    }

    /// Reads into `first` and, as far as the transport can, `second` behind it. Zero is the end of the stream.
    pub(crate) fn read(&mut self, stream: &Stream, first: &mut [u8], second: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain => stream.try_read(&mut [IoSliceMut::new(first), IoSliceMut::new(second)]),
            Transport::Tls(pipe) => pipe.read(stream, if first.is_empty() { second } else { first }),
        }
    }

    /// Sends from the front of `output` until it is empty or the socket is full (`WouldBlock`).
    pub(crate) fn write(&mut self, stream: &Stream, output: &mut Output) -> io::Result<()> {
        match self {
            Transport::Plain => write_plain(stream, output),
            Transport::Tls(pipe) => pipe.write(stream, output),
        }
    }

    /// True when the transport itself has something to send: handshake messages, or records cut short.
    pub(crate) fn wants_write(&self) -> bool {
        match self {
            Transport::Plain => false,
            Transport::Tls(pipe) => pipe.session.wants_write(),
        }
    }

    /// Says goodbye, as far as the socket takes it.
    pub(crate) fn close(&mut self, mut stream: &Stream) {
        if let Transport::Tls(pipe) = self {
            pipe.session.send_close_notify();
            while pipe.session.wants_write() && pipe.session.write_tls(&mut stream).is_ok_and(|count| count > 0) {}
        }
    }
}

fn write_plain(stream: &Stream, output: &mut Output) -> io::Result<()> {
    while !output.is_empty() {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let filled = output.slices(&mut slices);
        let count = stream.try_write(&slices[..filled])?;
        if count == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        output.advance(count);
    }
    Ok(())
}

impl TlsPipe {
    fn read(&mut self, mut stream: &Stream, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(buf) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            let early = self.early.get(self.early_taken..).unwrap_or_default();
            if early.is_empty() {
                self.session.read_tls(&mut stream)?;
            } else {
                self.early_taken += self.session.read_tls(&mut &early[..])?;
                if self.early_taken == self.early.len() {
                    (self.early, self.early_taken) = (Vec::new(), 0);
                }
            }
            if let Err(error) = self.session.process_new_packets() {
                // The alert that tells the client why; whether it arrives changes nothing.
                let _ = self.session.write_tls(&mut stream);
                return Err(io::Error::new(ErrorKind::InvalidData, error));
            }
        }
    }

    fn write(&mut self, mut stream: &Stream, output: &mut Output) -> io::Result<()> {
        loop {
            while self.session.wants_write() {
                if self.session.write_tls(&mut stream)? == 0 {
                    return Err(ErrorKind::WriteZero.into());
                }
            }
            if output.is_empty() {
                return Ok(());
            }
            // The session takes what its buffer holds; nothing while the TLS handshake is not over.
            match self.session.writer().write(output.front())? {
                0 => return Err(ErrorKind::WouldBlock.into()),
                count => output.advance(count),
            }
        }
    }
}
