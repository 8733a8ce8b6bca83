//! `cairn nbd serve`: volumes over the Network Block Device protocol.

use crate::context::{Context, block_on_config};
use crate::exit::usage;
use anyhow::{Context as _, Result, bail};
use cairn_client::{LocalClient, LocalVolume, OpenError, SizeRule};
use cairn_env::block::BlockDevice;
use cairn_nbd::{ExportOptions, Exports, Gate, NbdServer, ServerConfig, Tls};
use cairn_types::{ClientId, Epoch};
use cairn_wire::mds::{LeaseMode, MdsError, MdsReply, MdsRequest, SessionKind};
use clap::Subcommand;
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Longest path of a Unix socket: `sun_path` less the zero byte at its end (unix(7)).
pub const UNIX_PATH_MAX: usize = 107;
/// Between two looks whether a lost volume is free.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Verbs of NBD.
#[derive(Subcommand, Debug)]
pub enum NbdVerb {
    /// Serves volumes until it is stopped; each is an export of its name.
    Serve {
        /// Names or ids of the volumes.
        #[arg(required = true)]
        volumes: Vec<String>,
        /// TCP address to listen on; several allowed.
        #[arg(long, default_value = "127.0.0.1:10809", value_delimiter = ',')]
        listen: Vec<String>,
        /// Do not listen on TCP at all.
        #[arg(long)]
        no_tcp: bool,
        /// Unix socket to listen on too.
        #[arg(long)]
        unix: Option<PathBuf>,
        /// Serve read-only.
        #[arg(long)]
        read_only: bool,
        /// Certificate for TLS, PEM.
        #[arg(long, requires = "tls_key")]
        tls_cert: Option<PathBuf>,
        /// Private key for TLS, PEM.
        #[arg(long, requires = "tls_cert")]
        tls_key: Option<PathBuf>,
        /// Clients must present a certificate signed by this authority, PEM.
        #[arg(long, requires = "tls_cert")]
        tls_client_ca: Option<PathBuf>,
        /// Refuse clients that do not use TLS.
        #[arg(long, requires = "tls_cert")]
        tls_required: bool,
    },
}

/// Runs the verb.
pub fn run(context: &Context, verb: &NbdVerb) -> Result<()> {
    let NbdVerb::Serve { volumes, listen, no_tcp, unix, .. } = verb;
    if *no_tcp && unix.is_none() {
        return Err(usage("nothing to listen on: give --unix PATH or drop --no-tcp"));
    }
    if let Some(path) = unix.as_ref().filter(|path| path.as_os_str().len() > UNIX_PATH_MAX) {
        let length = path.as_os_str().len();
        return Err(usage(format!("--unix: a path of {length} bytes; Unix sockets take {UNIX_PATH_MAX} at most")));
    }
    // Before anything is opened.
    listen.iter().try_for_each(|text| crate::context::address(text, 10809).map(|_| ()))?;
    let purpose = format!("nbd {}", volumes.join(" "));
    let config = context.client_config(SessionKind::Client, &purpose)?;
    block_on_config(config, async |client| serve(&client, verb).await)
}

async fn serve(client: &LocalClient, verb: &NbdVerb) -> Result<()> {
    let NbdVerb::Serve { volumes, listen, no_tcp, unix, read_only, .. } = verb;
    let exports = Exports::new();
    let mut open = Vec::new();
    for name in volumes {
        let volume = open_volume(client, name, *read_only).await.with_context(|| format!("open volume {name}"))?;
        let options = ExportOptions { read_only: *read_only, ..ExportOptions::default() };
        exports.insert(name, Rc::new(volume.clone()), options.clone())?;
        let keeper = Keeper { client: client.clone(), exports: exports.clone(), name: name.clone(), options };
        let held = Rc::new(RefCell::new(volume));
        open.push(Rc::clone(&held));
        tokio::task::spawn_local(async move { keeper.keep(&held).await });
    }
    let config = ServerConfig { tls: tls_of(verb)?, ..ServerConfig::default() };
    let server = NbdServer::with_config(exports, config);
    let addrs = if *no_tcp { &[] } else { listen.as_slice() };
    for text in addrs {
        let addr = crate::context::address(text, 10809)?;
        let listener = tokio::net::TcpListener::bind(addr)
            .await
            .with_context(|| format!("listen on {addr}; is another server using that port?"))?;
        let addr = listener.local_addr()?;
        volumes.iter().for_each(|name| eprintln!("serving nbd://{addr}/{name}"));
        let server = server.clone();
        tokio::task::spawn_local(async move { server.serve_tcp(listener).await });
    }
    if let Some(path) = unix {
        let listener = bind_unix(path)?;
        volumes.iter().for_each(|name| eprintln!("serving nbd+unix:///{name}?socket={}", path.display()));
        let server = server.clone();
        tokio::task::spawn_local(async move { server.serve_unix(listener).await });
    }
    stop_signal().await?;
    server.shutdown(Duration::from_secs(5)).await;
    for volume in open {
        let volume = volume.borrow().clone();
        release(&volume).await;
    }
    if let Some(path) = unix {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Sees to it that an export whose lease was lost comes back.
struct Keeper {
    client: LocalClient,
    exports: Exports,
    name: String,
    options: ExportOptions,
}

impl Keeper {
    /// Whenever the lease is lost: everybody is disconnected, because what they wrote and did not flush may be lost
    /// with it and they must hear of it; then the volume is opened again. Until another client is seen to have it,
    /// clients that connect wait for that; then the export is withdrawn until the volume is free.
    async fn keep(&self, held: &RefCell<LocalVolume>) {
        let mut volume = held.borrow().clone();
        loop {
            let (lost, gate) = (volume.epoch(), self.wait_for_loss(&volume).await);
            drop(volume);
            volume = self.open_again(&gate, lost).await;
            *held.borrow_mut() = volume.clone();
        }
    }

    /// The gate is in place before the first operation fails, so nothing a client had under way can get past it.
    async fn wait_for_loss(&self, volume: &LocalVolume) -> Rc<Gate> {
        let (sender, lost) = tokio::sync::oneshot::channel();
        let (exports, name) = (self.exports.clone(), self.name.clone());
        let gate = Rc::new(Gate::new(volume.size(), volume.read_only()));
        let placed = Rc::clone(&gate);
        volume.on_lost(move || {
            eprintln!(
                "export {name}: the lease of its volume is lost; requests under way fail with EIO, clients are \
                 disconnected and may connect again"
            );
            exports.replace(&name, placed);
            let _ = sender.send(());
        });
        if lost.await.is_err() {
            std::future::pending::<()>().await; // The client is closing.
        }
        gate
    }

    async fn open_again(&self, gate: &Rc<Gate>, lost: Epoch) -> LocalVolume {
        let mut said = String::new();
        let mut offered = true;
        loop {
            let why = match self.try_open().await {
                Ok(volume) => {
                    eprintln!("export {}: {}", self.name, reopened(lost, volume.epoch()));
                    let device = Rc::new(volume.clone());
                    if offered {
                        gate.open(device);
                    } else if let Err(error) = self.exports.insert(&self.name, device, self.options.clone()) {
                        eprintln!("export {}: {error}", self.name);
                    }
                    return volume;
                }
                Err(why) => why,
            };
            if offered && !matches!(why, Obstacle::Ours | Obstacle::Unreachable(_)) {
                offered = false;
                gate.fail();
                self.exports.remove(&self.name);
            }
            let text = why.to_string();
            if text != said {
                eprintln!("export {}: {text}; waiting until it can be opened again", self.name);
                said = text;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Looks before it asks for the lease: asking costs the metadata servers a command each time.
    async fn try_open(&self) -> Result<LocalVolume, Obstacle> {
        let info = match self.client.call(MdsRequest::VolumeGet { name: self.name.clone() }).await {
            Ok(MdsReply::Volume(info)) => info,
            Ok(other) => return Err(Obstacle::Refused(format!("unexpected answer {other:?}"))),
            Err(error @ MdsError::Unavailable(_)) => return Err(Obstacle::Unreachable(error.to_string())),
            Err(error) => return Err(Obstacle::Refused(error.to_string())),
        };
        if let Some((holder, _)) = info.holder.filter(|(holder, _)| self.client.session() != Some(*holder)) {
            let Ok(MdsReply::Stat(stat)) = self.client.call(MdsRequest::Stat).await else {
                return Err(Obstacle::Unreachable("no answer to Stat".to_owned()));
            };
            return Err(match stat.clients.iter().find(|client| client.client == holder) {
                Some(other) => Obstacle::Held(format!("{holder} ({} on {})", other.purpose, other.host_name)),
                None => Obstacle::Ours,
            });
        }
        let mode = if self.options.read_only { LeaseMode::Shared } else { LeaseMode::Exclusive };
        self.client.open(info.volume, mode, SizeRule::Fixed).await.map_err(|error| match error {
            OpenError::Held { .. } | OpenError::Fenced(_) | OpenError::Mds(MdsError::Unavailable(_)) => {
                Obstacle::Unreachable(error.to_string())
            }
            error => Obstacle::Refused(error.to_string()),
        })
    }
}

/// Why a volume cannot be opened again yet.
#[derive(Debug, thiserror::Error)]
enum Obstacle {
    /// The session that ended, ours most likely, still has the lease until its term is over.
    #[error("the lease of the session that ended has still to run out")]
    Ours,
    #[error("{0}")]
    Unreachable(String),
    #[error("the volume is in use by {0}, so it is not exported here")]
    Held(String),
    #[error("the volume cannot be opened ({0}), so it is not exported here")]
    Refused(String),
}

/// What a new epoch tells about the time without a lease.
fn reopened(lost: Epoch, now: Epoch) -> String {
    if now.0 <= lost.0 + 1 {
        return format!("the volume is open again ({now}), and no other client had it in between");
    }
    format!("the volume is open again ({now} after {lost}): another client may have written to it in between")
}

/// Binds a unix socket; a leftover of a server that died is replaced, a living one is not.
fn bind_unix(path: &PathBuf) -> Result<tokio::net::UnixListener> {
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!("{} is in use by another server", path.display());
        }
        std::fs::remove_file(path).with_context(|| format!("remove the leftover socket {}", path.display()))?;
    }
    tokio::net::UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))
}

fn tls_of(verb: &NbdVerb) -> Result<Option<Tls>> {
    let NbdVerb::Serve { tls_cert, tls_key, tls_client_ca, tls_required, .. } = verb;
    match (tls_cert, tls_key) {
        (Some(cert), Some(key)) => Ok(Some(Tls::load(cert, key, tls_client_ca.as_deref(), *tls_required)?)),
        _ => Ok(None),
    }
}

async fn open_volume(client: &LocalClient, name: &str, read_only: bool) -> Result<LocalVolume> {
    let MdsReply::Volume(info) = client.call(MdsRequest::VolumeGet { name: name.to_owned() }).await? else {
        bail!("unexpected answer to VolumeGet");
    };
    let mode = if read_only { LeaseMode::Shared } else { LeaseMode::Exclusive };
    if let Some((holder, _)) = info.holder.filter(|(holder, _)| client.session() != Some(*holder)) {
        let who = describe(client, holder).await;
        eprintln!("volume {name} is in use by {who}; it is asked to give the volume back, and this waits for it");
    }
    match client.open(info.volume, mode, SizeRule::Fixed).await {
        Err(OpenError::Held { holder, .. }) => {
            let who = describe(client, holder).await;
            bail!("it is still in use by {who}; stop that, or end it by force with `cairn revoke {}`", holder.0)
        }
        other => Ok(other?),
    }
}

/// Who a client is, for people: `CL#2052 (nbd demo on host7)`.
async fn describe(client: &LocalClient, who: ClientId) -> String {
    let Ok(MdsReply::Stat(stat)) = client.call(MdsRequest::Stat).await else { return who.to_string() };
    match stat.clients.iter().find(|info| info.client == who) {
        Some(info) => format!("{who} ({} on {})", info.purpose, info.host_name),
        // Its session has ended; the lease passes on when its term is over.
        None => format!("{who} (a client that is gone; its lease ends within half a minute)"),
    }
}

/// Gives a lease back and waits for it.
pub async fn release(volume: &LocalVolume) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    volume.clone().release_with(move || sender.send(()).unwrap_or(()));
    let _ = receiver.await;
}

/// Waits for SIGTERM or SIGINT.
pub async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        biased;
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
