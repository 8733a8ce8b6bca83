//! The client on a tokio `current_thread` runtime: [`ClientCore`] driven by the real reactor.
//!
//! Callbacks run after the turn in which their work ended, outside of every borrow: they may submit again, which goes
//! out with the next turn. All that is submitted within one turn leaves with one write per socket.

use crate::cluster::ClusterFiles;
use crate::config::{ClientConfig, ConnectError, OpenError, SizeRule};
use crate::core::{ClientCore, Completion, Notice, VolumeHandle};
use cairn_env::block::{BlockDevice, BlockDone, BlockError, BlockOp, BlockResult};
use cairn_env_real::{Identity, Reactor, ReactorConfig, ReactorOptions, random_bytes};
use cairn_stdx::Rng;
use cairn_types::{ClientId, ClusterId, Duration, Epoch, NodeId, VolumeId};
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsError, MdsReply, MdsRequest, Push, SessionKind};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use tokio::sync::oneshot;

/// How long [`LocalClient::connect`] tries.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);
/// Shutting down takes at most this long; the core itself gives up sooner.
const CLOSE_DEADLINE: Duration = Duration::from_secs(12);
/// What a server says that no further attempt will change.
const FATAL: [&str; 4] = ["authentication failed", "belongs to cluster", "another identity", "protocol version"];

type PushHook = Box<dyn FnMut(&Push)>;

struct Inner {
    reactor: Reactor<ClientCore>,
    volumes: RefCell<BTreeMap<VolumeHandle, Weak<VolumeInner>>>,
    push_hooks: RefCell<Vec<PushHook>>,
    connecting: RefCell<Option<Connecting>>,
    keep: Option<Keep>,
    /// Handles dropped without a close; closed at the next turn, because a drop may happen anywhere.
    dropped: RefCell<Vec<VolumeHandle>>,
}

/// Where addresses of metadata servers are kept, and what was kept last.
struct Keep {
    files: ClusterFiles,
    kept: RefCell<Vec<SocketAddr>>,
}

struct Connecting {
    kind: SessionKind,
    servers: u64,
    done: oneshot::Sender<Result<(), ConnectError>>,
    cluster: String,
}

/// A client on this thread. Clones are handles to the same one.
#[derive(Clone)]
pub struct LocalClient(Rc<Inner>);

/// Called when somebody else wants the lease.
type RecallHook = Box<dyn FnMut(LeaseMode)>;

struct VolumeInner {
    client: LocalClient,
    handle: VolumeHandle,
    id: VolumeId,
    size: Cell<u64>,
    read_only: bool,
    fenced: Cell<bool>,
    closed: Cell<bool>,
    recall_hooks: RefCell<Vec<RecallHook>>,
    lost_hooks: RefCell<Vec<Box<dyn FnOnce()>>>,
}

impl Drop for VolumeInner {
    fn drop(&mut self) {
        if !self.closed.get() {
            self.client.0.dropped.borrow_mut().push(self.handle);
        }
    }
}

/// An open volume. Clones are handles to the same open; the last one to go closes it if nobody did.
#[derive(Clone)]
pub struct LocalVolume(Rc<VolumeInner>);

impl LocalClient {
    /// Connects to the cluster: holders of leases return with a session, mere callers with a link.
    ///
    /// # Errors
    /// [`ConnectError`]; a wrong password or another cluster is told at once, silence after fifteen seconds.
    pub async fn connect(config: ClientConfig) -> Result<Self, ConnectError> {
        if config.mds.is_empty() {
            return Err(ConnectError::NoServers);
        }
        let core = ClientCore::new(config.core(), Rng::new(u64::from_le_bytes(random_bytes())));
        let identity = Identity {
            key: config.key,
            cluster_name: config.cluster_name.clone(),
            cluster: config.cluster,
            node: NodeId::Client(ClientId(0)),
        };
        let reactor =
            ReactorConfig { identity, listen: Vec::new(), disks: Vec::new(), options: ReactorOptions::default() };
        let (done, connected) = oneshot::channel();
        let connecting = Connecting {
            kind: config.kind,
            servers: config.mds.len() as u64,
            done,
            cluster: config.cluster_name.clone(),
        };
        let client = Self(Rc::new(Inner {
            reactor: Reactor::start(reactor, core)?,
            volumes: RefCell::default(),
            push_hooks: RefCell::default(),
            connecting: RefCell::new(Some(connecting)),
            keep: config.keep_servers.map(|files| Keep { files, kept: RefCell::default() }),
            dropped: RefCell::default(),
        }));
        let weak = Rc::downgrade(&client.0);
        client.0.reactor.after_turn(move |_| {
            if let Some(inner) = weak.upgrade() {
                Self(inner).after_turn();
            }
        });
        let outcome = match tokio::time::timeout(CONNECT_DEADLINE, connected).await {
            Ok(Ok(outcome)) => outcome,
            _ => {
                let reason = client.0.reactor.with(|core, _, _| core.failures().1);
                Err(ConnectError::Unreachable { cluster: config.cluster_name, reason })
            }
        };
        if let Err(error) = outcome {
            client.0.reactor.stop();
            return Err(error);
        }
        Ok(client)
    }

    fn after_turn(&self) {
        let dropped = std::mem::take(&mut *self.0.dropped.borrow_mut());
        for handle in dropped {
            self.0.volumes.borrow_mut().remove(&handle);
            self.0.reactor.with(|core, now, out| core.close(now, handle, Box::new(|| ()), out));
        }
        self.keep_servers();
        // Looking costs no turn when nothing has ended.
        let completions = self.0.reactor.peek_mut(ClientCore::take_completions);
        for completion in completions {
            match completion {
                Completion::Notice(notice) => self.notice(notice),
                other => other.run(),
            }
        }
    }

    /// Keeps the addresses of the metadata servers for the next start, when they changed.
    fn keep_servers(&self) {
        let Some(keep) = &self.0.keep else { return };
        let mut kept = keep.kept.borrow_mut();
        if self.0.reactor.peek(|core| core.mds_servers() == *kept) {
            return;
        }
        *kept = self.0.reactor.peek(|core| core.mds_servers().to_vec());
        if let Err(error) = keep.files.keep_servers(&kept) {
            // The list people wrote still counts.
            cairn_env_real::log::write_line(&format!("the addresses of the metadata servers are not kept: {error}"));
        }
    }

    fn notice(&self, notice: Notice) {
        match notice {
            Notice::Session(client, cluster) => {
                self.0.reactor.set_identity_node(NodeId::Client(client));
                self.0.reactor.set_cluster(cluster);
                self.connected(Ok(()));
            }
            Notice::Refused(error) => self.connected(Err(ConnectError::Refused(error))),
            Notice::Linked => {
                if matches!(&*self.0.connecting.borrow(), Some(c) if c.kind == SessionKind::Client) {
                    return;
                }
                self.connected(Ok(()));
            }
            Notice::Unlinked(count, reason) => {
                let hopeless = matches!(&*self.0.connecting.borrow(), Some(connecting)
                    if count >= connecting.servers && FATAL.iter().any(|text| reason.contains(text)));
                if hopeless {
                    let cluster = self.0.connecting.borrow().as_ref().map_or(String::new(), |c| c.cluster.clone());
                    self.connected(Err(ConnectError::Unreachable { cluster, reason }));
                }
            }
            Notice::Push(push) => {
                // A hook may add hooks: those run from the next push on.
                let mut hooks = std::mem::take(&mut *self.0.push_hooks.borrow_mut());
                hooks.iter_mut().for_each(|hook| hook(&push));
                let mut list = self.0.push_hooks.borrow_mut();
                hooks.append(&mut list);
                *list = hooks;
            }
            Notice::Recall(handle, mode) => {
                if let Some(volume) = self.volume(handle) {
                    let mut hooks = std::mem::take(&mut *volume.0.recall_hooks.borrow_mut());
                    hooks.iter_mut().for_each(|hook| hook(mode));
                    let mut list = volume.0.recall_hooks.borrow_mut();
                    hooks.append(&mut list);
                    *list = hooks;
                }
            }
            Notice::Fenced(handle) => {
                if let Some(volume) = self.volume(handle) {
                    volume.0.fenced.set(true);
                    let hooks = std::mem::take(&mut *volume.0.lost_hooks.borrow_mut());
                    hooks.into_iter().for_each(|hook| hook());
                }
            }
            Notice::Resized(handle, size) => {
                if let Some(volume) = self.volume(handle) {
                    volume.0.size.set(size);
                }
            }
        }
    }

    fn connected(&self, outcome: Result<(), ConnectError>) {
        if let Some(connecting) = self.0.connecting.borrow_mut().take() {
            let _ = connecting.done.send(outcome);
        }
    }

    fn volume(&self, handle: VolumeHandle) -> Option<LocalVolume> {
        self.0.volumes.borrow().get(&handle).and_then(Weak::upgrade).map(LocalVolume)
    }

    /// The cluster's identity.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.0.reactor.cluster()
    }

    /// The session's id, while one is open.
    pub fn session(&self) -> Option<ClientId> {
        self.0.reactor.peek(|core| core.session())
    }

    /// Calls the metadata servers; `done` is called with the answer.
    pub fn call_with(&self, request: MdsRequest, done: impl FnOnce(Result<MdsReply, MdsError>) + 'static) {
        self.0.reactor.with(|core, now, out| core.call(now, request, Box::new(done), out));
    }

    /// Calls the metadata servers.
    ///
    /// # Errors
    /// Theirs, or [`MdsError::Unavailable`] at the deadline.
    pub async fn call(&self, request: MdsRequest) -> Result<MdsReply, MdsError> {
        let (done, answer) = oneshot::channel();
        self.call_with(request, move |result| drop(done.send(result)));
        answer.await.unwrap_or_else(|_| Err(MdsError::Unavailable("the client was closed".to_owned())))
    }

    /// Opens a volume; `done` is called with it.
    pub fn open_with(
        &self,
        volume: VolumeId,
        mode: LeaseMode,
        rule: SizeRule,
        done: impl FnOnce(Result<LocalVolume, OpenError>) + 'static,
    ) {
        let weak = Rc::downgrade(&self.0);
        let done = Box::new(move |result: Result<VolumeHandle, OpenError>| {
            done(match (result, weak.upgrade()) {
                (Ok(handle), Some(inner)) => Ok(Self(inner).attach(handle)),
                (Ok(_), None) => Err(OpenError::Closed),
                (Err(error), _) => Err(error),
            });
        });
        self.0.reactor.with(|core, now, out| core.open(now, volume, mode, rule, done, out));
    }

    /// Opens a volume.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, volume: VolumeId, mode: LeaseMode, rule: SizeRule) -> Result<LocalVolume, OpenError> {
        let (done, opened) = oneshot::channel();
        self.open_with(volume, mode, rule, move |result| drop(done.send(result)));
        opened.await.unwrap_or(Err(OpenError::Closed))
    }

    /// Takes over a lease that came with another call.
    pub fn adopt(&self, grant: LeaseGrant, rule: SizeRule) -> LocalVolume {
        let handle = self.0.reactor.with(|core, now, out| core.adopt(now, grant, rule, out));
        self.attach(handle)
    }

    fn attach(&self, handle: VolumeHandle) -> LocalVolume {
        let (known, read_only) = self.0.reactor.peek(|core| (core.volume(handle), core.is_read_only(handle)));
        let (id, _, size) = known.unwrap_or_default();
        let volume = LocalVolume(Rc::new(VolumeInner {
            client: self.clone(),
            handle,
            id,
            size: Cell::new(size),
            read_only,
            fenced: Cell::new(false),
            closed: Cell::new(false),
            recall_hooks: RefCell::default(),
            lost_hooks: RefCell::default(),
        }));
        // Opens of one volume share a handle number; news go to the last of them.
        self.0.volumes.borrow_mut().insert(handle, Rc::downgrade(&volume.0));
        volume
    }

    /// Calls `hook` with everything the metadata servers push.
    pub fn on_push(&self, hook: impl FnMut(&Push) + 'static) {
        self.0.push_hooks.borrow_mut().push(Box::new(hook));
    }

    /// Flushes, settles and gives back everything, ends the session and the links. Takes at most twelve seconds.
    pub async fn close(self) {
        let (done, closed) = oneshot::channel::<()>();
        let told = Box::new(move || {
            let _ = done.send(());
        });
        self.0.reactor.with(|core, now, out| core.shutdown(now, told, out));
        let _ = tokio::time::timeout(CLOSE_DEADLINE, closed).await;
        self.0.reactor.stop();
    }
}

impl LocalVolume {
    /// The volume's id.
    pub fn id(&self) -> VolumeId {
        self.0.id
    }

    /// The epoch of the lease.
    pub fn epoch(&self) -> Epoch {
        self.0.client.0.reactor.peek(|core| core.volume(self.0.handle)).map_or(Epoch(0), |(_, epoch, _)| epoch)
    }

    /// Tells a new size, after the metadata servers have it. Shrinking forgets the map past the end.
    pub fn set_size(&self, size: u64) {
        self.0.size.set(size);
        self.0.client.0.reactor.with(|core, now, out| core.set_size(now, self.0.handle, size, out));
    }

    /// Carries out an operation.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn run(&self, op: BlockOp) -> BlockResult {
        let (done, ended) = oneshot::channel();
        self.submit(op, Box::new(move |result| drop(done.send(result))));
        ended.await.unwrap_or(Err(BlockError::Closed))
    }

    /// Closes this open: flushes and settles, then `done`. The lease is given back later, or when somebody wants it.
    pub fn close_with(self, done: impl FnOnce() + 'static) {
        if self.0.closed.replace(true) {
            done();
            return;
        }
        let handle = self.0.handle;
        self.0.client.0.reactor.with(|core, now, out| core.close(now, handle, Box::new(done), out));
    }

    /// Closes this open and gives the lease back as soon as no other open of the volume is left; then `done`.
    pub fn release_with(self, done: impl FnOnce() + 'static) {
        if self.0.closed.replace(true) {
            done();
            return;
        }
        let handle = self.0.handle;
        self.0.client.0.reactor.with(|core, now, out| core.release(now, handle, Box::new(done), out));
    }

    /// Calls `hook` when another client wants the lease, with the mode it wants.
    pub fn on_recall(&self, hook: impl FnMut(LeaseMode) + 'static) {
        self.0.recall_hooks.borrow_mut().push(Box::new(hook));
    }

    /// Calls `hook` when the lease is lost, before the operations under way fail for it; at once when it is lost
    /// already. To go on, open the volume again; its new epoch is the next one if nobody else had it in between.
    pub fn on_lost(&self, hook: impl FnOnce() + 'static) {
        if self.is_fenced() {
            hook();
        } else {
            self.0.lost_hooks.borrow_mut().push(Box::new(hook));
        }
    }

    /// True when the lease is lost: every operation answers [`BlockError::Fenced`].
    pub fn is_fenced(&self) -> bool {
        self.0.fenced.get() || self.0.client.0.reactor.peek(|core| core.is_fenced(self.0.handle))
    }
}

impl BlockDevice for LocalVolume {
    fn size(&self) -> u64 {
        self.0.size.get()
    }

    fn read_only(&self) -> bool {
        self.0.read_only
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        if self.0.closed.get() {
            done(Err(BlockError::Closed));
            return;
        }
        self.0.client.0.reactor.with(|core, now, out| core.submit(now, self.0.handle, op, done, out));
    }
}
