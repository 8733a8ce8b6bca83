//! The server against a client of our own, and against every stock client this machine has.

mod behaviour;
mod client;
mod device;
mod tools;

use cairn_nbd::{ExportOptions, Exports, NbdServer, Notice, ServerConfig};
use device::MemDevice;
use std::cell::RefCell;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};

/// A running server with one export `disk`, reachable on a port and a unix socket.
pub(crate) struct Fixture {
    pub exports: Exports,
    pub server: NbdServer,
    pub device: Rc<MemDevice>,
    pub tcp: SocketAddr,
    pub socket: PathBuf,
    pub directory: tempfile::TempDir,
    pub notices: Rc<RefCell<Vec<String>>>,
}

impl Fixture {
    pub(crate) async fn start(device: MemDevice) -> Self {
        Self::start_with(device, |_| {}).await
    }

    pub(crate) async fn start_with(device: MemDevice, adjust: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let notices = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&notices);
        let mut config = ServerConfig {
            notices: Rc::new(move |notice: &Notice| sink.borrow_mut().push(notice.to_string())),
            ..ServerConfig::default()
        };
        adjust(&mut config);
        let (exports, device) = (Exports::new(), Rc::new(device));
        let options = ExportOptions { description: "a test disk".into(), ..ExportOptions::default() };
        exports.insert("disk", device.clone(), options).unwrap();
        let server = NbdServer::with_config(exports.clone(), config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = listener.local_addr().unwrap();
        let unix = UnixListener::bind(&socket).unwrap();
        let (on_tcp, on_unix) = (server.clone(), server.clone());
        tokio::task::spawn_local(async move { on_tcp.serve_tcp(listener).await });
        tokio::task::spawn_local(async move { on_unix.serve_unix(unix).await });
        Self { exports, server, device, tcp, socket, directory, notices }
    }

    pub(crate) fn unix_uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    pub(crate) fn tcp_uri(&self) -> String {
        format!("nbd://{}/disk", self.tcp)
    }
}

/// Runs `test` the way the server wants to live: one thread, a local set.
pub(crate) fn on_one_thread(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limit = Duration::from_secs(120); // Reached only by a test that hangs.
    let limited = async { tokio::time::timeout(limit, test).await.expect("the test hangs") };
    tokio::task::LocalSet::new().block_on(&runtime, limited);
}
