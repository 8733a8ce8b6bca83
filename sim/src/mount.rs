//! A mount in the simulator: the file logic of the FUSE front end over the client core of a simulated machine, as the
//! shells join the two on a real one.

use crate::world::{NodeIndex, World};
use cairn_client::{ClientCore, OpenError, SizeRule, VolumeHandle};
use cairn_env::block::{BlockDone, BlockError, BlockOp};
use cairn_fuse::MountOptions;
use cairn_fuse::backend::{Backend, CallDone, CloseDone, OpenDone, OpenFailure, Volume};
use cairn_fuse::driver::Files;
use cairn_types::{Epoch, VolumeId};
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsRequest};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};

/// What the file logic asks of the client core. It asks from within callbacks, so this waits until they are over.
enum Ask {
    Call(MdsRequest, CallDone),
    Open(VolumeId, LeaseMode, OpenDone),
    Adopt(LeaseGrant, Rc<Open>),
    Submit(Rc<Open>, BlockOp, BlockDone),
    SetSize(Rc<Open>, u64),
    Close { volume: Rc<Open>, release: bool, done: CloseDone },
}

/// What checkers want to know of leases.
pub(crate) enum News {
    Opened { volume: VolumeId, epoch: Epoch, shared: bool },
    Closed(VolumeId),
    Lost(VolumeId),
}

/// An open that the client core has answered.
type OpenAnswer = (VolumeId, OpenDone, Result<VolumeHandle, OpenError>);
/// Called when somebody else wants the lease.
type RecallHook = Box<dyn FnMut(LeaseMode)>;

#[derive(Default)]
struct Shared {
    asks: RefCell<VecDeque<Ask>>,
    opened: RefCell<Vec<OpenAnswer>>,
    news: RefCell<Vec<News>>,
    wall_ns: Cell<u64>,
}

/// An open volume.
struct Open {
    shared: Rc<Shared>,
    id: VolumeId,
    handle: Cell<Option<VolumeHandle>>,
    size: Cell<u64>,
    mode: LeaseMode,
    fenced: Cell<bool>,
    closed: Cell<bool>,
    on_recall: RefCell<Option<RecallHook>>,
    on_lost: RefCell<Option<Box<dyn FnOnce()>>>,
}

/// One mount.
pub(crate) struct Mount {
    /// Its files.
    pub files: Files,
    shared: Rc<Shared>,
    volumes: BTreeMap<VolumeHandle, Weak<Open>>,
}

impl Shared {
    fn ask(&self, ask: Ask) {
        self.asks.borrow_mut().push_back(ask);
    }
}

struct SimBackend(Rc<Shared>);

impl SimBackend {
    fn volume(shared: &Rc<Shared>, id: VolumeId, size: u64, mode: LeaseMode) -> Rc<Open> {
        Rc::new(Open {
            shared: Rc::clone(shared),
            id,
            handle: Cell::new(None),
            size: Cell::new(size),
            mode,
            fenced: Cell::new(false),
            closed: Cell::new(false),
            on_recall: RefCell::default(),
            on_lost: RefCell::default(),
        })
    }
}

impl Backend for SimBackend {
    fn call(&self, request: MdsRequest, done: CallDone) {
        self.0.ask(Ask::Call(request, done));
    }

    fn open(&self, volume: VolumeId, mode: LeaseMode, done: OpenDone) {
        self.0.ask(Ask::Open(volume, mode, done));
    }

    fn adopt(&self, grant: LeaseGrant) -> Rc<dyn Volume> {
        let volume = Self::volume(&self.0, grant.volume, grant.size, grant.mode);
        self.0.ask(Ask::Adopt(grant, Rc::clone(&volume)));
        VolumeOf::share(volume)
    }

    fn wall_ns(&self) -> u64 {
        self.0.wall_ns.get()
    }
}

/// What the file logic holds: asks carry the volume itself, which a trait object cannot give.
struct VolumeOf(Rc<Open>);

impl VolumeOf {
    fn share(open: Rc<Open>) -> Rc<dyn Volume> {
        Rc::new(Self(open))
    }

    fn give_up(&self, release: bool, done: CloseDone) {
        if self.0.closed.replace(true) {
            return done(Ok(()));
        }
        self.0.shared.ask(Ask::Close { volume: Rc::clone(&self.0), release, done });
    }
}

impl Drop for VolumeOf {
    fn drop(&mut self) {
        self.give_up(false, Box::new(|_| ()));
    }
}

impl Volume for VolumeOf {
    fn size(&self) -> u64 {
        self.0.size.get()
    }

    fn set_size(&self, size: u64) {
        self.0.size.set(size);
        self.0.shared.ask(Ask::SetSize(Rc::clone(&self.0), size));
    }

    fn mode(&self) -> LeaseMode {
        self.0.mode
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        if self.0.closed.get() {
            return done(Err(BlockError::Closed));
        }
        self.0.shared.ask(Ask::Submit(Rc::clone(&self.0), op, done));
    }

    fn on_recall(&self, notify: Box<dyn FnMut(LeaseMode)>) {
        *self.0.on_recall.borrow_mut() = Some(notify);
    }

    fn on_lost(&self, notify: Box<dyn FnOnce()>) {
        if self.0.fenced.get() {
            notify();
        } else {
            *self.0.on_lost.borrow_mut() = Some(notify);
        }
    }

    fn close(&self, done: CloseDone) {
        self.give_up(false, done);
    }

    fn release(&self, done: CloseDone) {
        self.give_up(true, done);
    }
}

impl Mount {
    /// A mount over the client that runs on a machine.
    pub fn new() -> Self {
        let shared = Rc::new(Shared::default());
        let options = MountOptions::new("sim", "/");
        Self { files: Files::new(Rc::new(SimBackend(Rc::clone(&shared))), &options), shared, volumes: BTreeMap::new() }
    }

    /// What happened to leases since this was asked last.
    pub fn take_news(&self) -> Vec<News> {
        std::mem::take(&mut *self.shared.news.borrow_mut())
    }

    /// Somebody wants a lease of this mount.
    pub fn recalled(&self, handle: VolumeHandle, mode: LeaseMode) {
        let Some(volume) = self.volumes.get(&handle).and_then(Weak::upgrade) else { return };
        let hook = volume.on_recall.borrow_mut().take();
        if let Some(mut hook) = hook {
            hook(mode);
            volume.on_recall.borrow_mut().get_or_insert(hook);
        }
    }

    /// A lease of this mount is lost.
    pub fn fenced(&self, handle: VolumeHandle) {
        let Some(volume) = self.volumes.get(&handle).and_then(Weak::upgrade) else { return };
        self.lost(&volume);
    }

    fn lost(&self, volume: &Rc<Open>) {
        if !volume.fenced.replace(true) {
            self.shared.news.borrow_mut().push(News::Lost(volume.id));
        }
        let hook = volume.on_lost.borrow_mut().take();
        if let Some(hook) = hook {
            hook();
        }
    }

    /// The size of a volume changed.
    pub fn resized(&self, handle: VolumeHandle, size: u64) {
        if let Some(volume) = self.volumes.get(&handle).and_then(Weak::upgrade) {
            volume.size.set(size);
        }
    }

    /// Carries out what the file logic has asked for; true when there was anything. A frozen machine asks for nothing.
    pub fn pump(&mut self, world: &mut World, node: NodeIndex) -> bool {
        if world.nodes[node.0].process.is_none() || world.nodes[node.0].paused {
            return false;
        }
        self.shared.wall_ns.set(world.local_now(node).wall_ns);
        let mut any = false;
        loop {
            let mut busy = self.files.forget_pages();
            let opened = std::mem::take(&mut *self.shared.opened.borrow_mut());
            for (id, done, result) in opened {
                busy = true;
                done(self.attach(world, node, id, result));
            }
            let asks = std::mem::take(&mut *self.shared.asks.borrow_mut());
            for ask in asks {
                busy = true;
                self.carry_out(world, node, ask);
            }
            if !busy {
                return any;
            }
            any = true;
        }
    }

    fn attach(
        &mut self,
        world: &mut World,
        node: NodeIndex,
        id: VolumeId,
        result: Result<VolumeHandle, OpenError>,
    ) -> Result<Rc<dyn Volume>, OpenFailure> {
        let handle = match result {
            Ok(handle) => handle,
            Err(error @ (OpenError::Held { .. } | OpenError::InUse(_))) => {
                return Err(OpenFailure::Held(error.to_string()));
            }
            Err(OpenError::Mds(error)) => return Err(OpenFailure::Mds(error)),
            Err(error) => return Err(OpenFailure::Other(error.to_string())),
        };
        let known = world.inspect::<ClientCore, _>(node, |core| {
            (core.volume(handle), core.is_read_only(handle), core.is_fenced(handle))
        });
        let Some((Some((_, epoch, size)), shared, fenced)) = known else {
            return Err(OpenFailure::Other("the volume went while it was opened".to_owned()));
        };
        let mode = if shared { LeaseMode::Shared } else { LeaseMode::Exclusive };
        let volume = SimBackend::volume(&self.shared, id, size, mode);
        volume.handle.set(Some(handle));
        self.volumes.insert(handle, Rc::downgrade(&volume));
        self.shared.news.borrow_mut().push(News::Opened { volume: id, epoch, shared });
        if fenced {
            self.lost(&volume);
        }
        Ok(VolumeOf::share(volume))
    }

    fn carry_out(&mut self, world: &mut World, node: NodeIndex, ask: Ask) {
        let shared = Rc::clone(&self.shared);
        match ask {
            Ask::Call(request, done) => {
                world.with::<ClientCore, _>(node, |core, now, out| core.call(now, request, done, out));
            }
            Ask::Open(id, mode, done) => {
                let done = Box::new(move |result| shared.opened.borrow_mut().push((id, done, result)));
                world.with::<ClientCore, _>(node, |core, now, out| {
                    core.open(now, id, mode, SizeRule::File, done, out);
                });
            }
            Ask::Adopt(grant, volume) => {
                let news = News::Opened { volume: grant.volume, epoch: grant.epoch, shared: false };
                let adopt = |core: &mut ClientCore, now, out: &mut _| core.adopt(now, grant, SizeRule::File, out);
                volume.handle.set(world.with::<ClientCore, _>(node, adopt));
                if let Some(handle) = volume.handle.get() {
                    self.volumes.insert(handle, Rc::downgrade(&volume));
                    shared.news.borrow_mut().push(news);
                }
            }
            Ask::Submit(volume, op, done) => {
                let Some(handle) = volume.handle.get() else { return done(Err(BlockError::Closed)) };
                world.with::<ClientCore, _>(node, |core, now, out| core.submit(now, handle, op, done, out));
            }
            Ask::SetSize(volume, size) => {
                let Some(handle) = volume.handle.get() else { return };
                world.with::<ClientCore, _>(node, |core, now, out| core.set_size(now, handle, size, out));
            }
            Ask::Close { volume, release, done } => {
                let Some(handle) = volume.handle.get() else { return done(Ok(())) };
                let done = Box::new(move || {
                    if !volume.fenced.get() {
                        shared.news.borrow_mut().push(News::Closed(volume.id));
                    }
                    done(Ok(()));
                });
                world.with::<ClientCore, _>(node, |core, now, out| match release {
                    true => core.release(now, handle, done, out),
                    false => core.close(now, handle, done, out),
                });
            }
        }
    }
}
