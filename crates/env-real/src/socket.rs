//! The byte stream under a link: TCP, or a Unix socket when both processes run on one host.
//!
//! A process that listens on an address listens on a Unix socket in the abstract namespace too, named after that
//! address; who connects tries that name first. Moving a megabyte through a Unix socket takes less than half of the CPU
//! it takes through the loopback (`docs/performance.md`). The name exists only on the host (strictly: in the network
//! namespace) where the address is listened on, so the attempt fails at once everywhere else. The handshake is the
//! same: a name proves nothing. A stranger who took the name could only keep us waiting, so the peer must run as the
//! same user or as root; otherwise TCP is used.
//!
//! The kernel tells a Unix socket's sender whenever the peer has read something. So such a socket is watched for room
//! only while it is full: otherwise each message would wake its sender for nothing.

use crate::sys;
use std::ffi::OsString;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net as std_unix;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, tcp};

/// Room for the largest request: with the 200 KiB that are usual a megabyte takes five or more rounds of waking.
const UNIX_SEND_BUFFER: usize = 1 << 20;

/// A connected socket.
pub enum Socket {
    /// To anywhere.
    Tcp(TcpStream),
    /// On this host.
    Unix(UnixStream),
}

/// The receiving half.
pub enum ReadHalf {
    /// To anywhere.
    Tcp(tcp::OwnedReadHalf),
    /// On this host; watched for bytes to read.
    Unix(Rc<AsyncFd<std_unix::UnixStream>>),
}

/// The sending half.
pub enum WriteHalf {
    /// To anywhere.
    Tcp(tcp::OwnedWriteHalf),
    /// On this host; watched for bytes to read.
    Unix(Rc<AsyncFd<std_unix::UnixStream>>),
}

/// Where links are accepted.
pub enum Listener {
    /// From anywhere.
    Tcp(TcpListener),
    /// From this host.
    Unix(UnixListener),
}

/// Name of the Unix socket beside the TCP address `addr`; the leading zero stands for the abstract namespace.
fn name_beside(addr: SocketAddr) -> OsString {
    OsString::from_vec(format!("\0cairn/{addr}").into_bytes())
}

/// Connects to a process that listens on `addr`.
pub async fn connect(addr: SocketAddr) -> io::Result<Socket> {
    if let Ok(stream) = UnixStream::connect(name_beside(addr)).await
        && stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == sys::user_id())
    {
        return Ok(Socket::Unix(stream));
    }
    TcpStream::connect(addr).await.map(Socket::Tcp)
}

impl Socket {
    /// Sets the options of a fresh connection and gives both directions, each on its own.
    pub fn prepare(self) -> io::Result<(ReadHalf, WriteHalf)> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                sys::set_keepalive(stream.as_fd())?;
                let (read, write) = stream.into_split();
                Ok((ReadHalf::Tcp(read), WriteHalf::Tcp(write)))
            }
            Self::Unix(stream) => {
                // No keepalive: the kernel tells at once when the other process is gone.
                let stream = stream.into_std()?;
                sys::set_send_buffer(stream.as_fd(), UNIX_SEND_BUFFER)?;
                let stream = Rc::new(sys::watch(stream, Interest::READABLE)?);
                Ok((ReadHalf::Unix(Rc::clone(&stream)), WriteHalf::Unix(stream)))
            }
        }
    }
}

impl Listener {
    /// The Unix socket beside a listening TCP socket.
    ///
    /// # Errors
    /// When somebody has the name already; links then use TCP.
    pub fn beside(listener: &TcpListener) -> io::Result<Self> {
        UnixListener::bind(name_beside(listener.local_addr()?)).map(Self::Unix)
    }

    /// The next connection, and who it is from, in words.
    pub async fn accept(&self) -> io::Result<(Socket, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Socket::Tcp(stream), peer.to_string()))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let peer = peer.map_or("this host".to_owned(), |pid| format!("process {pid} of this host"));
                Ok((Socket::Unix(stream), peer))
            }
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let stream = match self.get_mut() {
            Self::Tcp(half) => return Pin::new(half).poll_read(cx, buffer),
            Self::Unix(stream) => stream,
        };
        loop {
            let mut guard = ready!(stream.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            let size = room.len();
            match (&mut stream.get_ref()).read(room) {
                Ok(count) => {
                    // Less than asked for: the socket is empty, which need not be asked again.
                    if 0 < count && count < size {
                        guard.clear_ready();
                    }
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl WriteHalf {
    /// Sends what the socket takes at once.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write_vectored(slices),
            Self::Unix(stream) => (&mut stream.get_ref()).write_vectored(slices),
        }
    }

    /// Waits until the socket takes something again.
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.writable().await,
            Self::Unix(stream) => {
                let watched = stream.get_ref().try_clone()?;
                sys::watch(watched, Interest::WRITABLE)?.writable().await.map(drop)
            }
        }
    }

    /// Sends all of `bytes`.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if let Self::Tcp(half) = self {
            return half.write_all(bytes).await;
        }
        while !bytes.is_empty() {
            match self.try_write_vectored(&[IoSlice::new(bytes)]) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Says that nothing more will be sent.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.shutdown().await,
            Self::Unix(stream) => stream.get_ref().shutdown(Shutdown::Write),
        }
    }
}
