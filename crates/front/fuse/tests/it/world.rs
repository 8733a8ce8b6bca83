//! A cluster in one thread: the real metadata state machine, volumes in memory. Several mounts can share it.
//!
//! Answers come late and out of order by chance, as they do over a network; the order in which operations take effect
//! is the order in which they were submitted.

use cairn_env::block::{BlockDone, BlockError, BlockOp, BlockReply, BlockResult, Extent};
use cairn_env::{Buf, BufMut};
use cairn_fuse::backend::{Backend, CallDone, CloseDone, Job, OpenDone, OpenFailure, Runner, Volume};
use cairn_meta::{Command, MemKv, Meta, MetaEffect, Recipient};
use cairn_stdx::Rng;
use cairn_types::{ClientId, ClusterId, Epoch, HostId, MdsId, VolumeId};
use cairn_wire::mds::{Call, LeaseGrant, LeaseMode, MdsError, MdsInfo, MdsReply, MdsRequest, Push, SessionKind};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

const BLOCK: u64 = 4096;

type RecallHook = Box<dyn FnMut(LeaseMode)>;
type WorldJob = Box<dyn FnOnce(&Rc<World>) + Send>;

/// The cluster, from outside its thread.
#[derive(Clone)]
pub struct Cluster {
    jobs: UnboundedSender<WorldJob>,
    calls: Arc<AtomicU64>,
}

/// One mount's way into the cluster.
struct MountRunner {
    cluster: Cluster,
}

#[derive(Default)]
struct Content {
    blocks: BTreeMap<u64, Vec<u8>>,
    fenced: BTreeSet<Epoch>,
}

struct World {
    meta: RefCell<Meta<MemKv>>,
    index: Cell<u64>,
    contents: RefCell<BTreeMap<VolumeId, Content>>,
    sessions: RefCell<BTreeMap<ClientId, Rc<Session>>>,
    released: tokio::sync::Notify,
    rng: RefCell<Rng>,
    nonce: Cell<u64>,
    full: Cell<bool>,
    calls: Arc<AtomicU64>,
}

struct Session {
    client: ClientId,
    sequence: Cell<u64>,
    volumes: RefCell<BTreeMap<VolumeId, Weak<MemVolume>>>,
}

struct SessionBackend {
    world: Rc<World>,
    session: Rc<Session>,
}

struct MemVolume {
    world: Rc<World>,
    session: Rc<Session>,
    id: VolumeId,
    epoch: Epoch,
    size: Cell<u64>,
    mode: LeaseMode,
    recall: RefCell<Option<RecallHook>>,
    lost: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Cluster {
    /// A new, empty cluster.
    pub fn start(seed: u64) -> Self {
        let (jobs, mut received) = unbounded_channel::<WorldJob>();
        let calls = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&calls);
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                let world = World::new(seed, counted);
                while let Some(job) = received.recv().await {
                    job(&world);
                }
            });
        };
        std::thread::Builder::new().name("cluster".into()).spawn(run).expect("a thread");
        Self { jobs, calls }
    }

    /// A runner for one more mount.
    pub fn runner(&self) -> Arc<dyn Runner> {
        Arc::new(MountRunner { cluster: self.clone() })
    }

    /// Calls of metadata servers so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// From here on there is no room for any write, or there is again.
    pub fn set_full(&self, full: bool) {
        let (done, wait) = std::sync::mpsc::channel();
        let job = move |world: &Rc<World>| {
            world.full.set(full);
            done.send(()).expect("somebody waits");
        };
        assert!(self.jobs.send(Box::new(job)).is_ok());
        wait.recv().expect("the cluster lives");
    }

    /// Takes every lease away from whoever holds it, as a takeover after a long silence would.
    pub fn fence_all(&self) {
        let (done, wait) = std::sync::mpsc::channel();
        let job = move |world: &Rc<World>| {
            world.fence_all();
            done.send(()).expect("somebody waits");
        };
        assert!(self.jobs.send(Box::new(job)).is_ok());
        wait.recv().expect("the cluster lives");
    }
}

impl Runner for MountRunner {
    fn start(&self, job: Box<dyn FnOnce(Rc<dyn Backend>) + Send>) {
        let start = move |world: &Rc<World>| {
            let session = world.open_session();
            job(Rc::new(SessionBackend { world: Rc::clone(world), session }));
        };
        assert!(self.cluster.jobs.send(Box::new(start)).is_ok());
    }

    fn run(&self, job: Job) {
        let _ = self.cluster.jobs.send(Box::new(move |_| job()));
    }

    fn shutdown(&self) {}
}

impl World {
    fn new(seed: u64, calls: Arc<AtomicU64>) -> Rc<Self> {
        let world = Rc::new(Self {
            meta: RefCell::new(Meta::open(MemKv::new())),
            index: Cell::new(0),
            contents: RefCell::default(),
            sessions: RefCell::default(),
            released: tokio::sync::Notify::new(),
            rng: RefCell::new(Rng::new(seed)),
            nonce: Cell::new(1),
            full: Cell::new(false),
            calls,
        });
        let first = MdsInfo {
            mds: MdsId(1),
            addr: "127.0.0.1:1".parse().expect("an address"),
            voter: true,
            repository: String::new(),
        };
        let command = Command::Bootstrap { cluster: ClusterId([7; 16]), name: "test".into(), first, wall_ns: 1 };
        world.apply(&command).expect("bootstrap");
        world
    }

    fn apply(self: &Rc<Self>, command: &Command) -> Result<MdsReply, MdsError> {
        let index = self.index.get() + 1;
        self.index.set(index);
        let applied = self.meta.borrow_mut().apply(index, &command.encode());
        for effect in applied.effects {
            if let MetaEffect::Push { to: Recipient::Session(client), push: Push::LeaseRecall { volume, wanted } } =
                effect
            {
                let world = Rc::clone(self);
                tokio::task::spawn_local(async move { world.recall(client, volume, wanted) });
            }
        }
        applied.reply
    }

    fn recall(&self, client: ClientId, volume: VolumeId, wanted: LeaseMode) {
        let session = self.sessions.borrow().get(&client).cloned();
        let holder = session.and_then(|session| session.volumes.borrow().get(&volume).and_then(Weak::upgrade));
        let Some(holder) = holder else { return };
        let notify = holder.recall.borrow_mut().take();
        if let Some(mut notify) = notify {
            notify(wanted);
            *holder.recall.borrow_mut() = Some(notify);
        }
    }

    fn call(self: &Rc<Self>, session: &Session, request: MdsRequest) -> Result<MdsReply, MdsError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if request.is_read() {
            return self.meta.borrow().query(&request);
        }
        let is_release = matches!(request, MdsRequest::LeaseRelease { .. });
        let sequence = session.sequence.get() + 1;
        session.sequence.set(sequence);
        let wall_ns = wall_ns();
        let call = Call { session: session.client, sequence, acknowledged: sequence - 1, wall_ns, request };
        let reply = self.apply(&Command::Call { call, wall_ns });
        if is_release {
            self.released.notify_waiters();
        }
        reply
    }

    fn open_session(self: &Rc<Self>) -> Rc<Session> {
        let nonce = self.nonce.get();
        self.nonce.set(nonce + 1);
        let request = MdsRequest::SessionOpen {
            kind: SessionKind::Client,
            host: HostId([nonce as u8; 16]),
            host_name: format!("host{nonce}"),
            purpose: "test".into(),
            nonce,
        };
        let call = Call { session: ClientId(0), sequence: 0, acknowledged: 0, wall_ns: wall_ns(), request };
        let reply = self.apply(&Command::Call { call, wall_ns: wall_ns() });
        let Ok(MdsReply::Session { client, .. }) = reply else { panic!("session refused: {reply:?}") };
        let session = Rc::new(Session { client, sequence: Cell::new(0), volumes: RefCell::default() });
        self.sessions.borrow_mut().insert(client, Rc::clone(&session));
        session
    }

    fn fence_all(self: &Rc<Self>) {
        let sessions: Vec<Rc<Session>> = self.sessions.borrow().values().cloned().collect();
        for session in sessions {
            let volumes: Vec<Rc<MemVolume>> = session.volumes.borrow().values().filter_map(Weak::upgrade).collect();
            for volume in volumes {
                self.contents.borrow_mut().entry(volume.id).or_default().fenced.insert(volume.epoch);
                let leases = vec![(volume.id, volume.epoch, false)];
                let _ = self.call(&session, MdsRequest::LeaseRelease { leases });
                let lost = volume.lost.borrow_mut().take();
                if let Some(lost) = lost {
                    lost();
                }
            }
        }
    }

    /// Runs `answer` now, or after a few turns of the loop.
    fn answer(&self, answer: impl FnOnce() + 'static) {
        let turns = self.rng.borrow_mut().below(4);
        if turns == 0 {
            answer();
            return;
        }
        tokio::task::spawn_local(async move {
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            answer();
        });
    }
}

impl Backend for SessionBackend {
    fn call(&self, request: MdsRequest, done: CallDone) {
        let reply = self.world.call(&self.session, request);
        self.world.answer(move || done(reply));
    }

    fn open(&self, volume: VolumeId, mode: LeaseMode, done: OpenDone) {
        let (world, session) = (Rc::clone(&self.world), Rc::clone(&self.session));
        tokio::task::spawn_local(async move {
            loop {
                let released = world.released.notified();
                match world.call(&session, MdsRequest::LeaseAcquire { volume, mode }) {
                    Ok(MdsReply::Lease(grant)) => return done(Ok(MemVolume::open(&world, &session, grant))),
                    Err(MdsError::Held { .. }) => released.await,
                    Ok(other) => return done(Err(OpenFailure::Other(format!("{other:?}")))),
                    Err(error) => return done(Err(OpenFailure::Mds(error))),
                }
            }
        });
    }

    fn adopt(&self, grant: LeaseGrant) -> Rc<dyn Volume> {
        MemVolume::open(&self.world, &self.session, grant)
    }
}

impl MemVolume {
    fn open(world: &Rc<World>, session: &Rc<Session>, grant: LeaseGrant) -> Rc<dyn Volume> {
        let volume = Rc::new(Self {
            world: Rc::clone(world),
            session: Rc::clone(session),
            id: grant.volume,
            epoch: grant.epoch,
            size: Cell::new(grant.size),
            mode: grant.mode,
            recall: RefCell::new(None),
            lost: RefCell::new(None),
        });
        session.volumes.borrow_mut().insert(grant.volume, Rc::downgrade(&volume));
        volume
    }

    fn execute(&self, op: BlockOp) -> BlockResult {
        let mut contents = self.world.contents.borrow_mut();
        let content = contents.entry(self.id).or_default();
        if content.fenced.contains(&self.epoch) {
            return Err(BlockError::Fenced);
        }
        match op {
            BlockOp::Read { offset, len } => {
                // In two pieces, as a read across chunks would come.
                let first = len / 2;
                let pieces = [(offset, first), (offset + u64::from(first), len - first)];
                Ok(BlockReply::Data(pieces.iter().map(|&(offset, len)| content.read(offset, len as usize)).collect()))
            }
            BlockOp::Write { .. } if self.world.full.get() => Err(BlockError::NoSpace),
            BlockOp::Write { offset, data, .. } => {
                content.write(offset, &data);
                Ok(BlockReply::Done)
            }
            BlockOp::Flush => Ok(BlockReply::Done),
            BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len, .. } => {
                content.zero(offset, len);
                Ok(BlockReply::Done)
            }
            BlockOp::CompareAndWrite { .. } => Err(BlockError::Other("not for files".into())),
            BlockOp::Extents { offset, len } => Ok(BlockReply::Extents(content.extents(offset, len))),
        }
    }

    fn give_back(&self, done: CloseDone) {
        let leases = vec![(self.id, self.epoch, true)];
        let _ = self.world.call(&self.session, MdsRequest::LeaseRelease { leases });
        self.world.answer(move || done(Ok(())));
    }
}

impl Volume for MemVolume {
    fn mode(&self) -> LeaseMode {
        self.mode
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn set_size(&self, size: u64) {
        self.size.set(size);
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let result = self.execute(op);
        self.world.answer(move || done(result));
    }

    fn on_recall(&self, notify: Box<dyn FnMut(LeaseMode)>) {
        *self.recall.borrow_mut() = Some(notify);
    }

    fn on_lost(&self, notify: Box<dyn FnOnce()>) {
        *self.lost.borrow_mut() = Some(notify);
    }

    fn close(&self, done: CloseDone) {
        self.give_back(done);
    }

    fn release(&self, done: CloseDone) {
        self.give_back(done);
    }
}

impl Content {
    fn read(&self, offset: u64, len: usize) -> Buf {
        let mut data = BufMut::zeroed(len);
        self.each(offset, len as u64, |block, at, range| {
            if let Some(bytes) = self.blocks.get(&block) {
                data[range.clone()].copy_from_slice(&bytes[at..at + range.len()]);
            }
        });
        data.freeze()
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut parts = Vec::new();
        self.each(offset, data.len() as u64, |block, at, range| parts.push((block, at, range)));
        for (block, at, range) in parts {
            let bytes = self.blocks.entry(block).or_insert_with(|| vec![0; BLOCK as usize]);
            bytes[at..at + range.len()].copy_from_slice(&data[range]);
        }
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let inside: Vec<u64> =
            self.blocks.range(offset / BLOCK..end.div_ceil(BLOCK)).map(|(block, _)| *block).collect();
        for block in inside {
            let (start, stop) = (offset.max(block * BLOCK), end.min((block + 1) * BLOCK));
            if stop - start == BLOCK {
                self.blocks.remove(&block);
            } else if let Some(bytes) = self.blocks.get_mut(&block) {
                bytes[(start - block * BLOCK) as usize..(stop - block * BLOCK) as usize].fill(0);
            }
        }
    }

    fn extents(&self, offset: u64, len: u64) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        self.each(offset, len, |block, at, range| {
            let data = self.blocks.contains_key(&block);
            let (offset, len) = (block * BLOCK + at as u64, range.len() as u64);
            match extents.last_mut() {
                Some(last) if last.data == data => last.len += len,
                _ => extents.push(Extent { offset, len, data }),
            }
        });
        extents
    }

    fn each(&self, offset: u64, len: u64, mut part: impl FnMut(u64, usize, std::ops::Range<usize>)) {
        let mut at = offset;
        while at < offset + len {
            let block = at / BLOCK;
            let end = ((block + 1) * BLOCK).min(offset + len);
            part(block, (at % BLOCK) as usize, (at - offset) as usize..(end - offset) as usize);
            at = end;
        }
    }
}

fn wall_ns() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64)
}
