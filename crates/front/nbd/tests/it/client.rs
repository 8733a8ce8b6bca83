//! A client small enough to send exactly the bytes a test wants.

use std::io;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const FAST_ZERO: u16 = 16;

/// A connection with simple replies.
pub(crate) struct Client {
    pub stream: UnixStream,
    pub size: u64,
    pub flags: u16,
}

impl Client {
    pub(crate) async fn greet(socket: &Path) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(socket).await?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes()).await?;
        Ok(stream)
    }

    /// Connects to `name` with `NBD_OPT_EXPORT_NAME`.
    pub(crate) async fn connect(socket: &Path, name: &str) -> io::Result<Self> {
        let mut stream = Self::greet(socket).await?;
        let option = [&b"IHAVEOPT"[..], &1u32.to_be_bytes(), &(name.len() as u32).to_be_bytes(), name.as_bytes()];
        stream.write_all(&option.concat()).await?;
        let size = stream.read_u64().await?;
        let flags = stream.read_u16().await?;
        Ok(Self { stream, size, flags })
    }

    pub(crate) fn request(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
        let magic = 0x2560_9513u32.to_be_bytes();
        [&magic[..], &flags, &kind, &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next reply without data: error and cookie.
    pub(crate) async fn reply(&mut self) -> io::Result<(u32, u64)> {
        assert_eq!(self.stream.read_u32().await?, 0x6744_6698);
        Ok((self.stream.read_u32().await?, self.stream.read_u64().await?))
    }

    /// One request and its reply.
    pub(crate) async fn call(&mut self, kind: u16, flags: u16, offset: u64, len: u32) -> u32 {
        self.send(&Self::request(kind, flags, 77, offset, len)).await;
        let (error, cookie) = self.reply().await.unwrap();
        assert_eq!(cookie, 77);
        error
    }

    pub(crate) async fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let head = Self::request(WRITE, flags, 78, offset, data.len() as u32);
        self.send(&[&head[..], data].concat()).await;
        let (error, cookie) = self.reply().await.unwrap();
        assert_eq!(cookie, 78);
        error
    }

    pub(crate) async fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(&Self::request(READ, 0, 79, offset, len)).await;
        assert_eq!(self.reply().await.unwrap(), (0, 79));
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).await.unwrap();
        data
    }

    /// True when the server closed the connection without another byte.
    pub(crate) async fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        !matches!(self.stream.read(&mut byte).await, Ok(1..))
    }
}
