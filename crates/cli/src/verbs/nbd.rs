//! `cairn nbd serve`: volumes over the Network Block Device protocol.

use crate::context::{Context, block_on_config};
use crate::exit::usage;
use anyhow::{Context as _, Result, bail};
use cairn_client::{LocalClient, LocalVolume, OpenError, SizeRule};
use cairn_nbd::{ExportOptions, Exports, NbdServer, ServerConfig, Tls};
use cairn_types::ClientId;
use cairn_wire::mds::{LeaseMode, MdsReply, MdsRequest, SessionKind};
use clap::Subcommand;
use std::path::PathBuf;
use std::rc::Rc;

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
    let NbdVerb::Serve { volumes, no_tcp, unix, .. } = verb;
    if *no_tcp && unix.is_none() {
        return Err(usage("nothing to listen on: give --unix PATH or drop --no-tcp"));
    }
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
        exports.insert(name, Rc::new(volume.clone()), options)?;
        open.push(volume);
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
    server.shutdown(std::time::Duration::from_secs(5)).await;
    for volume in open {
        release(&volume).await;
    }
    if let Some(path) = unix {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
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
