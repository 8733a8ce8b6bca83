//! Listeners and the life of a server.

use crate::connection::Connection;
use crate::exports::Exports;
use crate::notice::Notice;
use crate::stream::Stream;
use crate::tls::Tls;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;

/// Pause after a failed accept: the usual cause is a lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How a server behaves.
#[derive(Clone)]
pub struct ServerConfig {
    /// Certificate and key; none for a server without TLS.
    pub tls: Option<Tls>,
    /// Connections beyond this are turned away.
    pub connections_max: usize,
    /// A client that has not chosen an export by then is disconnected.
    pub handshake_timeout: Duration,
    /// Gets a line for each connection; by default it goes to standard error.
    pub notices: Rc<dyn Fn(&Notice)>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            tls: None,
            connections_max: 1024,
            handshake_timeout: Duration::from_secs(30),
            notices: Rc::new(|notice| eprintln!("nbd: {notice}")),
        }
    }
}

/// An NBD server. Clones are the same server; it needs a `tokio::task::LocalSet` around it.
#[derive(Clone)]
pub struct NbdServer(Rc<Inner>);

struct Inner {
    exports: Exports,
    config: ServerConfig,
    connections: RefCell<BTreeMap<u64, Rc<Connection>>>,
    connection_next: Cell<u64>,
    stopping: Cell<bool>,
    stop: Notify,
}

impl NbdServer {
    /// A server in the clear with the default limits.
    pub fn new(exports: Exports) -> Self {
        Self::with_config(exports, ServerConfig::default())
    }

    /// A server that behaves as `config` says.
    pub fn with_config(exports: Exports, config: ServerConfig) -> Self {
        Self(Rc::new(Inner {
            exports,
            config,
            connections: RefCell::default(),
            connection_next: Cell::new(0),
            stopping: Cell::new(false),
            stop: Notify::new(),
        }))
    }

    /// Accepts TCP clients until [`shutdown`](Self::shutdown). A server may have several listeners.
    pub async fn serve_tcp(&self, listener: TcpListener) {
        while let Some(accepted) = self.unless_stopped(listener.accept()).await {
            let admitted = accepted.and_then(|(stream, peer)| Ok((Stream::tcp(stream)?, peer.to_string())));
            self.admit(admitted).await;
        }
    }

    /// Accepts clients of a unix socket until [`shutdown`](Self::shutdown).
    pub async fn serve_unix(&self, listener: UnixListener) {
        while let Some(accepted) = self.unless_stopped(listener.accept()).await {
            let admitted = accepted.map(|(stream, _)| {
                let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
                (Stream::Unix(stream), pid.map_or("unix socket".to_owned(), |pid| format!("process {pid}")))
            });
            self.admit(admitted).await;
        }
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let stop = self.0.stop.notified();
        tokio::pin!(stop);
        stop.as_mut().enable();
        if self.0.stopping.get() {
            return None;
        }
        tokio::select! {
            biased;
            () = stop => None,
            done = work => Some(done),
        }
    }

    async fn admit(&self, accepted: io::Result<(Stream, String)>) {
        let config = &self.0.config;
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                (config.notices)(&Notice::Accept { error });
                self.unless_stopped(tokio::time::sleep(ACCEPT_RETRY)).await;
                return;
            }
        };
        if self.0.connections.borrow().len() >= config.connections_max {
            return (config.notices)(&Notice::TooMany { peer, connections_max: config.connections_max });
        }
        let exports = self.0.exports.clone();
        let connection = Connection::new(stream, peer, exports, config.tls.clone(), Rc::clone(&config.notices));
        let id = self.0.connection_next.replace(self.0.connection_next.get() + 1);
        self.0.connections.borrow_mut().insert(id, Rc::clone(&connection));
        let inner = Rc::clone(&self.0);
        tokio::task::spawn_local(async move {
            connection.run(inner.config.handshake_timeout).await;
            inner.connections.borrow_mut().remove(&id);
            inner.exports.notify_ended();
        });
    }

    /// Connections open now.
    pub fn connection_count(&self) -> usize {
        self.0.connections.borrow().len()
    }

    /// Stops the listeners, lets requests under way end, refuses those received but not begun with `NBD_ESHUTDOWN`,
    /// and disconnects.
    /// Clients whose requests have not ended after `grace` are cut off. Returns when no connection is left.
    pub async fn shutdown(&self, grace: Duration) {
        self.0.stopping.set(true);
        self.0.stop.notify_waiters();
        let each = |act: fn(&Connection)| self.0.connections.borrow().values().for_each(|connection| act(connection));
        each(Connection::begin_shutdown);
        let all_gone = || self.0.connections.borrow().is_empty();
        if tokio::time::timeout(grace, self.0.exports.wait_until(all_gone)).await.is_err() {
            each(Connection::kill);
            self.0.exports.wait_until(all_gone).await;
        }
    }
}
