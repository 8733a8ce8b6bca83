//! An NBD client in a hundred lines: enough to write stamped blocks and to see each error.
//!
//! Source: the NBD protocol document, sections "Fixed newstyle negotiation" and "Transmission phase", simple replies.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A request that takes longer has failed: a crash of a server may pause a client for some seconds, not for a minute.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_FLUSH: u16 = 3;
const FLAG_DURABLE: u16 = 1;
const FLAGS_FIXED_NO_ZEROES: u32 = 3;
const OPTION_EXPORT_NAME: u32 = 1;

/// A connection in the transmission phase.
pub struct NbdClient {
    stream: TcpStream,
    handle: u64,
    /// Size of the export in bytes.
    pub size: u64,
}

impl NbdClient {
    /// Connects to an export of a server on this machine.
    pub fn connect(port: u16, export: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REQUEST_LIMIT))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(io::Error::other("this is no NBD server"));
        }
        let mut hello = FLAGS_FIXED_NO_ZEROES.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(OPTION_EXPORT_NAME.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        let size = u64::from_be_bytes(answer[..8].try_into().expect("8 bytes"));
        Ok(Self { stream, handle: 0, size })
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        self.request_with(0, command, offset, length, payload)
    }

    fn request_with(&mut self, flags: u16, command: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        self.handle += 1;
        let mut message = 0x2560_9513u32.to_be_bytes().to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.handle.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().expect("4 bytes"));
        let handle = u64::from_be_bytes(reply[8..].try_into().expect("8 bytes"));
        if word(0) != 0x6744_6698 || handle != self.handle {
            return Err(io::Error::other("the reply is not to this request"));
        }
        if word(4) == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(word(4) as i32)) }
    }

    /// Reads at a place.
    pub fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.request(COMMAND_READ, offset, buffer.len() as u32, &[])?;
        self.stream.read_exact(buffer)
    }

    /// Writes at a place; durable after the next flush.
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.request(COMMAND_WRITE, offset, bytes.len() as u32, bytes)
    }

    /// Writes at a place; durable when it returns.
    pub fn write_durable_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.request_with(FLAG_DURABLE, COMMAND_WRITE, offset, bytes.len() as u32, bytes)
    }

    /// The connection once more, to shut it down from elsewhere.
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Returns when every answered write is durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.request(COMMAND_FLUSH, 0, 0, &[])
    }
}
