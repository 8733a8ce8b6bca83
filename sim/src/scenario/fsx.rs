//! Files: clients do what fsx does, through the file logic of the mount, and every byte and length is compared.
//!
//! A few files, each worked on by one client at a time, one operation after the other; when it is closed, another
//! client may go on with it and must see all of it. What faults leave in doubt: `crate::checkers::file`.

use super::load::{Kind, Pending};
use super::{END_WITHIN, Scenario, SimVolume, TOKEN_CLIENT, TOKEN_NAMES, Verdict, broken};
use crate::checkers::file::FileModel;
use crate::checkers::shadow::Invariant;
use crate::mount::{Mount, News};
use crate::world::SECOND;
use cairn_client::Notice;
use cairn_env::Buf;
use cairn_fuse::driver::Range;
use cairn_stdx::Rng;
use cairn_types::{FailureDomain, InodeId, Redundancy, VolumeId};
use cairn_wire::mds::{Attr, InodeKind, MdsReply, MdsRequest, VolumeInfo};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

/// Longest a file gets: two chunks, the second one not full.
const SIZE_MAX: u64 = 1_300_000;
/// Bytes of a chunk.
const CHUNK: u64 = 1 << 20;
/// Most bytes of one read when a whole file is read.
const PIECE: u64 = 256 << 10;

/// An operation on a file.
#[derive(Clone)]
pub(super) enum FileOp {
    Open { writer: bool },
    Stat,
    Read { offset: u64, len: u64 },
    Write { offset: u64, data: Buf, append: bool, durable: bool },
    Truncate { size: u64 },
    Range { range: Range, offset: u64, len: u64 },
    Sync,
    Close,
    Rename { to: String },
    Lookup { name: String },
}

impl fmt::Debug for FileOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileOp::Open { writer } => write!(f, "open, to write: {writer}"),
            FileOp::Stat => write!(f, "stat"),
            FileOp::Read { offset, len } => write!(f, "read {len} at {offset}"),
            FileOp::Write { offset, data, append, durable } => {
                write!(f, "write {} at {offset}, append: {append}, durable: {durable}", data.len())
            }
            FileOp::Truncate { size } => write!(f, "truncate to {size}"),
            FileOp::Range { range, offset, len } => write!(f, "{range:?} {len} at {offset}"),
            FileOp::Sync => write!(f, "fsync"),
            FileOp::Close => write!(f, "close"),
            FileOp::Rename { to } => write!(f, "rename to {to}"),
            FileOp::Lookup { name } => write!(f, "look {name} up"),
        }
    }
}

/// How an operation ended.
enum Ended {
    Opened(u64),
    Attr(Box<Attr>),
    Data(Buf),
    Found(Option<InodeId>),
    Done,
}

struct SimFile {
    inode: InodeId,
    /// Names it may have, one of them.
    names: Vec<String>,
    model: FileModel,
    rng: Rng,
    client: usize,
    handle: Option<(u64, bool)>,
    /// What is to be done before anything is drawn again.
    queue: VecDeque<FileOp>,
    /// The operation under way.
    busy: Option<u64>,
    asked: Option<FileOp>,
    /// Counts processes and handles: answers to older ones are void.
    generation: u64,
    /// Names under which the last lookups found it.
    found: Vec<String>,
    /// Nothing is drawn any more.
    at_rest: bool,
}

/// Answers: file, generation, outcome.
type Answers = Rc<RefCell<Vec<(usize, u64, Result<Ended, i32>)>>>;

/// All files and mounts of a run.
pub(super) struct Fsx {
    rng: Rng,
    files: Vec<SimFile>,
    mounts: Vec<Option<Mount>>,
    answers: Answers,
    operations: u64,
}

impl Fsx {
    pub fn new(rng: Rng) -> Self {
        Self { rng, files: Vec::new(), mounts: Vec::new(), answers: Answers::default(), operations: 0 }
    }

    /// News of a client's core.
    pub fn on_notice(&self, client: usize, notice: &Notice) {
        let Some(Some(mount)) = self.mounts.get(client) else { return };
        match notice {
            Notice::Recall(handle, mode) => mount.recalled(*handle, *mode),
            Notice::Fenced(handle) => mount.fenced(*handle),
            Notice::Resized(handle, size) => mount.resized(*handle, *size),
            _ => {}
        }
    }

    /// Operations that were answered, and bytes compared.
    pub fn work(&self) -> (u64, u64) {
        (self.operations, self.files.iter().map(|file| file.model.compared).sum())
    }
}

impl Scenario {
    /// Makes the files.
    pub(super) fn set_up_files(&mut self) -> Verdict {
        let Some(plan) = self.plan.files.clone() else { return Ok(()) };
        let pairs = [("chunk-size", "1M".to_owned()), ("replicas", format!("{}:{}", plan.replicas, plan.minimum))];
        let pairs = pairs.map(|(key, value)| (key.to_owned(), value)).to_vec();
        self.call_and_wait(MdsRequest::AttributesSet { inode: InodeId::ROOT, pairs })?;
        for nth in 0..plan.count {
            let (parent, kind, name) = (InodeId::ROOT, InodeKind::File, format!("f{nth}"));
            let (mode, uid, gid, rdev, lease) = (0o644, 0, 0, 0, false);
            let bytes = name.as_bytes().to_vec();
            let create = MdsRequest::Create { parent, name: bytes, kind, mode, uid, gid, rdev, lease };
            let MdsReply::CreatedIn { attr, .. } = self.call_and_wait(create)? else {
                return Err(broken(Invariant::Files, "Create was answered by something else"));
            };
            let info = VolumeInfo {
                volume: VolumeId::of_inode(attr.inode),
                name: name.clone(),
                size: SIZE_MAX,
                chunk_size: CHUNK,
                redundancy: Redundancy::new(plan.replicas, plan.minimum).expect("drawn within its range"),
                failure_domain: FailureDomain::Host,
                tier: 0,
                chunks: 0,
                holder: None,
                created_ns: 0,
            };
            self.volumes.push(SimVolume { info, unit: 4096 });
            let fsx = self.fsx.as_mut().expect("files are drawn for it");
            fsx.files.push(SimFile {
                inode: attr.inode,
                names: vec![name],
                model: FileModel::new(SIZE_MAX),
                rng: fsx.rng.split(nth as u64),
                client: nth % self.plan.shape.clients,
                handle: None,
                queue: VecDeque::new(),
                busy: None,
                asked: None,
                generation: 0,
                found: Vec::new(),
                at_rest: false,
            });
        }
        self.loads.iter_mut().for_each(|load| load.know_volumes(self.volumes.len()));
        self.eras.know_volumes(self.volumes.len());
        Ok(())
    }

    /// The clocks of mounts and files begin to run.
    pub(super) fn start_files(&mut self) {
        for file in 0..self.volumes.len() as u64 {
            self.cluster.world.wake_driver(1 + file, TOKEN_CLIENT + file);
        }
        for client in 0..self.cluster.clients.len() as u64 {
            self.cluster.world.wake_driver(1 + client, TOKEN_NAMES + client);
        }
    }

    /// A second has passed at a mount.
    pub(super) fn tick_mount(&mut self, client: usize) {
        self.cluster.world.wake_driver(SECOND, TOKEN_NAMES + client as u64);
        let idle = self.is_idle(client);
        let fsx = self.fsx.as_mut().expect("mounts tick");
        if let Some(Some(mount)) = fsx.mounts.get(client).filter(|_| !idle) {
            mount.files.tick();
        }
    }

    /// One step of a file's client.
    pub(super) fn act_on_file(&mut self, at: usize) {
        let think = self.plan.think;
        let clients = self.cluster.clients.len();
        let fsx = self.fsx.as_mut().expect("files are acted on");
        let after = fsx.files[at].rng.range(think / 20, think);
        self.cluster.world.wake_driver(after, TOKEN_CLIENT + at as u64);
        let file = &mut fsx.files[at];
        let client = file.client;
        if file.busy.is_some() || self.cluster.clients.get(client).is_none() {
            return;
        }
        if !self.chaos && !file.at_rest {
            return;
        }
        if file.queue.is_empty() && !file.at_rest {
            file.draw(clients);
        }
        let client = file.client;
        if self.is_idle(client) {
            return;
        }
        let fsx = self.fsx.as_mut().expect("files are acted on");
        if let Some(op) = fsx.files[at].queue.pop_front() {
            self.begin_on_file(at, op);
        }
    }

    fn begin_on_file(&mut self, at: usize, op: FileOp) {
        let (now, token) = (self.now(), self.token());
        let fsx = self.fsx.as_mut().expect("files are acted on");
        let file = &mut fsx.files[at];
        let (client, inode) = (file.client, file.inode);
        self.pending.insert(token, Pending { client, since: now, kind: Kind::File { file: at, op: op.clone() } });
        (file.busy, file.asked) = (Some(token), Some(op.clone()));
        self.cluster.world.note(format_args!("file {at}, client {client}: {op:?}"));
        let name = file.names[0].clone();
        fsx.mounts.resize_with(fsx.mounts.len().max(client + 1), || None);
        let files = &fsx.mounts[client].get_or_insert_with(Mount::new).files;
        let handle = file.handle.map_or(0, |(handle, _)| handle);
        let (answers, generation) = (Rc::clone(&fsx.answers), file.generation);
        let told = move |result| answers.borrow_mut().push((at, generation, result));
        match op {
            FileOp::Open { writer } => files.open(inode, writer, Box::new(move |r| told(r.map(Ended::Opened)))),
            FileOp::Stat => files.stat(inode, Box::new(move |r| told(r.map(|attr| Ended::Attr(Box::new(attr)))))),
            FileOp::Read { offset, len } => {
                files.read(handle, offset, len as u32, Box::new(move |r| told(r.map(Ended::Data))));
            }
            FileOp::Write { offset, data, append, durable } => {
                let told = Box::new(move |r: Result<u32, i32>| told(r.map(|_| Ended::Done)));
                files.write(handle, offset, data, append, durable, told);
            }
            FileOp::Truncate { size } => {
                files.truncate(inode, size, Box::new(move |r| told(r.map(|attr| Ended::Attr(Box::new(attr))))));
            }
            FileOp::Range { range, offset, len } => {
                files.fallocate(handle, offset, len, range, Box::new(move |r| told(r.map(|()| Ended::Done))));
            }
            FileOp::Sync => files.fsync(handle, Box::new(move |r| told(r.map(|()| Ended::Done)))),
            FileOp::Close => files.flush(handle, Box::new(move |r| told(r.map(|()| Ended::Done)))),
            FileOp::Rename { to } => {
                let told = Box::new(move |r: Result<(), i32>| told(r.map(|()| Ended::Done)));
                files.rename(name.into_bytes(), to.into_bytes(), told);
            }
            FileOp::Lookup { name } => {
                let told = Box::new(move |r: Result<Option<Attr>, i32>| {
                    told(r.map(|found| Ended::Found(found.map(|attr| attr.inode))));
                });
                files.lookup(name.into_bytes(), told);
            }
        }
    }

    /// Carries out what mounts ask for, and takes what they answered; true when there was anything.
    pub(super) fn pump_mounts(&mut self) -> Result<bool, Box<crate::checkers::shadow::Broken>> {
        let Some(fsx) = self.fsx.as_mut() else { return Ok(false) };
        let mut news = Vec::new();
        let mut any = false;
        for (client, mount) in fsx.mounts.iter_mut().enumerate() {
            let (Some(mount), Some(node)) = (mount, self.cluster.clients.get(client)) else { continue };
            any |= mount.pump(&mut self.cluster.world, *node);
            news.extend(mount.take_news().into_iter().map(|news| (client, news)));
        }
        for (client, news) in news {
            self.on_lease_news(client, &news)?;
        }
        loop {
            let fsx = self.fsx.as_mut().expect("just seen");
            let answers = std::mem::take(&mut *fsx.answers.borrow_mut());
            if answers.is_empty() {
                return Ok(any);
            }
            any = true;
            for (at, generation, result) in answers {
                if self.fsx.as_ref().is_some_and(|fsx| fsx.files[at].generation == generation) {
                    self.on_file_answer(at, result)?;
                }
            }
        }
    }

    fn on_lease_news(&mut self, client: usize, news: &News) -> Verdict {
        let index_of = |s: &Self, id: &VolumeId| s.volumes.iter().position(|volume| volume.info.volume == *id);
        match news {
            News::Opened { volume, epoch, shared } => {
                let Some(index) = index_of(self, volume) else { return Ok(()) };
                self.holders.opened(self.cluster.world.now(), volume.0, client, *epoch, *shared).map_err(Box::new)?;
                self.holder_came(client, index, *shared)
            }
            News::Closed(volume) => {
                if let Some(index) = index_of(self, volume) {
                    self.eras.closed(client, index);
                }
                Ok(())
            }
            News::Lost(volume) => {
                let Some(index) = index_of(self, volume) else { return Ok(()) };
                self.fsx.as_mut().expect("a mount has news").files[index].model.writer_gone();
                self.holder_left(client, index)
            }
        }
    }

    fn on_file_answer(&mut self, at: usize, result: Result<Ended, i32>) -> Verdict {
        let faulty = !self.plan.faults.is_empty();
        let fsx = self.fsx.as_mut().expect("a file was acted on");
        fsx.operations += 1;
        let file = &mut fsx.files[at];
        let since = file.busy.take().and_then(|token| self.pending.remove(&token)).map_or(0, |op| op.since);
        let Some(op) = file.asked.take() else { return Ok(()) };
        let (client, name) = (file.client, file.names[0].clone());
        if let Err(errno) = &result {
            self.cluster.world.note(format_args!("file {at}, client {client}: {op:?} fails: {errno}"));
        }
        let wrong = |why: String| broken(Invariant::Files, format!("file {name} at client {client}, {op:?}: {why}"));
        let ended = match result {
            Ok(ended) => ended,
            Err(errno) => {
                // Leases are lost, servers unreachable, and another client does not give up what it holds in time.
                // At the end some clients have vanished and left their leases behind.
                let expected = faulty || (file.at_rest && errno == libc_errno::EBUSY);
                if !expected || ![libc_errno::EIO, libc_errno::EBUSY, libc_errno::ESTALE].contains(&errno) {
                    return Err(wrong(format!("errno {errno}")));
                }
                file.failed(&op);
                let handle = file.handle.take();
                if let (Some((handle, _)), Some(Some(mount))) = (handle, fsx.mounts.get(client)) {
                    mount.files.release(handle);
                }
                return Ok(());
            }
        };
        match (op.clone(), ended) {
            (FileOp::Open { writer }, Ended::Opened(handle)) => {
                file.handle = Some((handle, writer));
                if !file.at_rest {
                    file.queue.push_back(FileOp::Stat);
                    if file.rng.chance(1, 3) {
                        file.read_all();
                    }
                }
            }
            (FileOp::Stat, Ended::Attr(attr)) => file.model.size_seen(attr.size).map_err(wrong)?,
            (FileOp::Read { offset, len }, Ended::Data(data)) => {
                file.model.read(offset, len, &data).map_err(wrong)?;
            }
            (FileOp::Write { offset, data, .. }, Ended::Done) => {
                file.model.written(offset, &data);
            }
            (FileOp::Truncate { size }, Ended::Attr(attr)) => {
                file.model.truncated(size);
                file.model.size_seen(attr.size).map_err(wrong)?;
            }
            (FileOp::Range { range, offset, len }, Ended::Done) => {
                if range != Range::Allocate {
                    file.model.zeroed(offset, len);
                }
                if matches!(range, Range::Allocate | Range::Zero) {
                    file.model.grown(offset + len);
                }
            }
            (FileOp::Sync, Ended::Done) => {
                file.model.synchronised();
                self.eras.flushed(at, since);
            }
            (FileOp::Close, Ended::Done) => {
                if let (Some((handle, _)), Some(Some(mount))) = (file.handle.take(), fsx.mounts.get(client)) {
                    mount.files.release(handle);
                }
            }
            (FileOp::Rename { to }, Ended::Done) => file.names = vec![to],
            (FileOp::Lookup { name }, Ended::Found(inode)) => {
                if inode == Some(file.inode) {
                    file.found.push(name);
                }
            }
            _ => return Err(wrong("answered by something else".to_owned())),
        }
        Ok(())
    }

    /// A process with a mount is gone.
    pub(super) fn mount_died(&mut self, client: usize) {
        let Some(fsx) = self.fsx.as_mut() else { return };
        if let Some(mount) = fsx.mounts.get_mut(client) {
            *mount = None;
        }
        for file in fsx.files.iter_mut().filter(|file| file.client == client) {
            file.model.writer_gone();
            (file.busy, file.handle) = (None, None);
            file.generation += 1;
            file.queue.clear();
            if let Some(op) = file.asked.take() {
                file.failed(&op);
            }
        }
    }

    /// What was not synchronised may be gone.
    pub(super) fn file_may_fall_back(&mut self, volume: usize) {
        if let Some(file) = self.fsx.as_mut().and_then(|fsx| fsx.files.get_mut(volume)) {
            file.model.may_fall_back();
        }
    }

    /// A fresh client reads everything.
    pub(super) fn verify_files(&mut self, reader: usize) -> Verdict {
        let Some(fsx) = self.fsx.as_mut() else { return Ok(()) };
        for file in &mut fsx.files {
            (file.at_rest, file.client) = (true, reader);
            file.generation += 1;
            (file.busy, file.asked, file.handle) = (None, None, None);
            file.read_at_last();
        }
        self.cluster.world.wake_driver(1, TOKEN_NAMES + reader as u64);
        let done = |s: &mut Self| {
            s.fsx.as_ref().is_some_and(|fsx| fsx.files.iter().all(|f| f.queue.is_empty() && f.busy.is_none()))
        };
        self.wait("a fresh mount reads every file", 2 * END_WITHIN, done)?;
        let fsx = self.fsx.as_ref().expect("looked at above");
        for file in &fsx.files {
            if file.found.len() != 1 {
                let why = format!("one of {:?} was to be there, and {:?} are", file.names, file.found);
                return Err(broken(Invariant::I18, why));
            }
            if file.model.size().is_none() {
                return Err(broken(Invariant::Files, format!("{:?} was not read", file.names)));
            }
        }
        let (operations, compared) = fsx.work();
        self.cluster.world.note(format_args!("{operations} operations on files, {compared} bytes compared"));
        Ok(())
    }
}

impl SimFile {
    /// An operation failed: it took effect, or did not, or will before anybody else has the file.
    fn failed(&mut self, op: &FileOp) {
        match op {
            FileOp::Write { offset, data, .. } => self.model.perhaps_written(*offset, data),
            FileOp::Truncate { size } => self.model.perhaps_truncated(*size),
            FileOp::Range { range, offset, len } => {
                if *range != Range::Allocate {
                    self.model.perhaps_zeroed(*offset, *len);
                }
                if matches!(range, Range::Allocate | Range::Zero) {
                    self.model.perhaps_sized(self.model.longest().max(offset + len));
                }
            }
            FileOp::Rename { to } => self.names.push(to.clone()),
            _ => {}
        }
        self.queue.clear();
        if self.at_rest {
            self.read_at_last();
        }
    }

    /// What a fresh client looks at.
    fn read_at_last(&mut self) {
        self.queue = VecDeque::from([FileOp::Open { writer: false }, FileOp::Stat]);
        self.read_all();
        self.found.clear();
        self.queue.extend(self.names.iter().map(|name| FileOp::Lookup { name: name.clone() }));
        self.queue.push_back(FileOp::Close);
    }

    fn read_all(&mut self) {
        let pieces = (0..SIZE_MAX).step_by(PIECE as usize);
        self.queue.extend(pieces.map(|offset| FileOp::Read { offset, len: PIECE.min(SIZE_MAX - offset) }));
    }

    /// A range: most often around the start, the end of the file, or where two chunks meet.
    fn draw_range(&mut self) -> (u64, u64) {
        let size = self.model.size().unwrap_or(0);
        let spot = *self.rng.choose(&[0, 0, 4096, 65_536, CHUNK, size]).expect("not empty");
        let offset = match self.rng.below(5) {
            0 => self.rng.below(SIZE_MAX),
            _ => (spot + self.rng.below(9_000)).saturating_sub(4_500),
        };
        let offset = offset.min(SIZE_MAX - 1);
        let most = *self.rng.choose(&[10, 600, 5_000, 5_000, 40_000]).expect("not empty");
        (offset, (1 + self.rng.below(most)).min(SIZE_MAX - offset))
    }

    fn draw(&mut self, clients: usize) {
        let Some((_, writer)) = self.handle else {
            if self.rng.chance(1, 2) {
                self.client = self.rng.below(clients as u64) as usize;
            }
            let writer = self.rng.chance(4, 5);
            return self.queue.push_back(FileOp::Open { writer });
        };
        let Some(size) = self.model.size() else { return self.queue.push_back(FileOp::Stat) };
        let (offset, len) = self.draw_range();
        let choice = self.rng.below(100);
        let op = match if writer { choice } else { choice % 34 } {
            0..3 => FileOp::Close,
            3..6 => FileOp::Stat,
            6..34 => FileOp::Read { offset, len: if self.rng.chance(1, 10) { PIECE } else { len } },
            34..64 => {
                let append = self.rng.chance(1, 8) && size + len <= SIZE_MAX;
                let offset = if append { size } else { offset };
                let mut data = vec![0; len as usize];
                self.rng.fill(&mut data);
                FileOp::Write { offset, data: Buf::copy_from(&data), append, durable: self.rng.chance(1, 12) }
            }
            64..74 => FileOp::Truncate { size: offset },
            74..80 => FileOp::Range { range: Range::Punch, offset, len },
            80..85 => FileOp::Range { range: Range::Zero, offset, len },
            85..88 => FileOp::Range { range: Range::ZeroInside, offset, len },
            88..91 => FileOp::Range { range: Range::Allocate, offset, len },
            91..97 => FileOp::Sync,
            _ if self.names.len() == 1 => {
                FileOp::Rename { to: format!("{}x{}", &self.names[0][..2], self.rng.next_u64()) }
            }
            _ => FileOp::Stat,
        };
        self.queue.push_back(op);
    }
}

/// Linux's numbers of what a mount answers where leases are lost.
mod libc_errno {
    pub const EIO: i32 = 5;
    pub const EBUSY: i32 = 16;
    pub const ESTALE: i32 = 116;
}
