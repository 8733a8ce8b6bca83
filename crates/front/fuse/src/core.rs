//! The state of one mount, on the client's thread.
//!
//! Kernel session threads send closures here through [`with_core`]; every operation is a method that calls `done`
//! exactly once, with the answer or an errno. Nothing here blocks and nothing waits its turn: what must be ordered is
//! ordered per file (see [`crate::files`]). No `RefCell` stays borrowed across a call into the backend or into a
//! completion, because both may come straight back.

use crate::attr::{TTL_EXCLUSIVE, TTL_SHARED, mds_errno};
use crate::backend::Backend;
use crate::files::File;
use crate::full::Waiting;
use crate::log::Log;
use crate::ops_dir::Directory;
use crate::options::MountOptions;
use cairn_stdx::FixedMap;
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, InodeKind, MdsError, MdsReply, MdsRequest};
use fuser::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

/// Called once with the outcome of an operation.
pub(crate) type Done<T> = Box<dyn FnOnce(Result<T, Errno>)>;
/// Something to do on the core later.
pub(crate) type Later = Box<dyn FnOnce(&Rc<Core>)>;

/// An inode's attributes and how long the kernel may believe them.
#[derive(Clone, Debug)]
pub(crate) struct Stat {
    /// The attributes.
    pub attr: Attr,
    /// How long they hold.
    pub ttl: Duration,
}

/// News for the kernel, sent by a thread of its own: the kernel may wait for pages of the inode to be unlocked, which
/// takes answers from the client's thread.
pub(crate) struct Notice {
    /// The inode whose attributes are to be forgotten.
    pub inode: InodeId,
    /// Its cached content too.
    pub content: bool,
    /// Reported back to [`Core::noticed`] when the kernel has done it.
    pub token: u64,
}

/// What the kernel was last told of an inode, kept for at least [`TTL_SHARED`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
}

/// An open file description of the kernel.
pub(crate) struct Handle {
    /// The file.
    pub file: Rc<File>,
    /// Opened for writing.
    pub writer: bool,
    /// Value of [`File::fences`] at open, or later while it was not used: a writer whose lease was lost since must not
    /// go on as if nothing had happened.
    pub fences: Cell<u64>,
    /// Something was read or written through it.
    pub used: Cell<bool>,
}

/// State of one mount.
pub(crate) struct Core {
    /// The client.
    pub backend: Rc<dyn Backend>,
    /// Where lines for the operator go.
    pub log: Log,
    /// The kernel caches writes: it alone knows sizes and times of open files.
    pub writeback: bool,
    /// Writes fail when the cluster is full, instead of waiting.
    pub fail_on_no_space: bool,
    /// Writes that wait for room.
    pub no_room: RefCell<Vec<Waiting>>,
    /// Seconds an open waits for another client to give its lease back.
    pub lease_wait: u64,
    /// Every file with handles, a lease, or something under way.
    pub files: RefCell<FixedMap<InodeId, Rc<File>>>,
    /// Open files by handle number.
    pub handles: RefCell<FixedMap<u64, Rc<Handle>>>,
    /// Open directories by handle number; entered at the first read.
    pub directories: RefCell<FixedMap<u64, Directory>>,
    /// Files with sizes or times the metadata servers do not know yet.
    pub dirty: RefCell<BTreeSet<InodeId>>,
    /// Files without handles that keep their lease for a while: inode and tick of the last close, oldest first.
    pub idle: RefCell<VecDeque<(InodeId, u64)>>,
    /// Files whose open is under way, by inode, with the tick at which it gives up.
    pub opening: RefCell<BTreeMap<InodeId, u64>>,
    /// Seconds since the mount, as far as anything here cares.
    pub now_tick: Cell<u64>,
    /// Number of open file handles.
    pub open_count: Cell<u64>,
    /// Directories in which files were created in this second, as they were right after that: the kernel forgets its
    /// own attributes of a directory it has changed, and asks for them with the next name it creates there.
    pub parents: RefCell<FixedMap<InodeId, Attr>>,
    /// Changing calls sent or answered, creations of files not counted.
    pub changes: Cell<u64>,
    told_new: RefCell<FixedMap<InodeId, Told>>,
    told_old: RefCell<FixedMap<InodeId, Told>>,
    next_handle: Cell<u64>,
    notices: mpsc::Sender<Notice>,
    noticed: RefCell<FixedMap<u64, Later>>,
    next_token: Cell<u64>,
    closing: RefCell<Option<Box<dyn FnOnce()>>>,
}

thread_local! {
    static CORES: RefCell<BTreeMap<u64, Rc<Core>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Runs `f` on mount `id`, if it still exists. Call this on the client's thread only.
pub(crate) fn with_core(id: u64, f: impl FnOnce(&Rc<Core>)) {
    let core = CORES.with(|cores| cores.borrow().get(&id).cloned());
    if let Some(core) = core {
        f(&core);
    }
}

/// Makes a mount known on this thread and starts its clock; the thread must run a tokio `LocalSet`.
pub(crate) fn install(id: u64, core: Rc<Core>) {
    let weak = Rc::downgrade(&core);
    CORES.with(|cores| cores.borrow_mut().insert(id, core));
    tokio::task::spawn_local(async move {
        let mut seconds = tokio::time::interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            seconds.tick().await;
            let Some(core) = weak.upgrade() else { return };
            core.tick();
        }
    });
}

/// Forgets a mount.
pub(crate) fn remove(id: u64) {
    let core = CORES.with(|cores| cores.borrow_mut().remove(&id));
    drop(core);
}

impl Core {
    /// A mount without open files.
    pub fn new(backend: Rc<dyn Backend>, log: Log, options: &MountOptions, notices: mpsc::Sender<Notice>) -> Rc<Self> {
        Rc::new(Self {
            backend,
            log,
            writeback: options.writeback,
            fail_on_no_space: options.fail_on_no_space,
            no_room: RefCell::default(),
            lease_wait: options.lease_wait_seconds,
            files: RefCell::default(),
            handles: RefCell::default(),
            directories: RefCell::default(),
            dirty: RefCell::default(),
            idle: RefCell::default(),
            opening: RefCell::default(),
            now_tick: Cell::new(0),
            open_count: Cell::new(0),
            parents: RefCell::default(),
            changes: Cell::new(0),
            told_new: RefCell::default(),
            told_old: RefCell::default(),
            next_handle: Cell::new(1),
            notices,
            noticed: RefCell::default(),
            next_token: Cell::new(1),
            closing: RefCell::new(None),
        })
    }

    /// Calls the metadata servers.
    pub fn call(
        self: &Rc<Self>,
        request: MdsRequest,
        then: impl FnOnce(&Rc<Self>, Result<MdsReply, MdsError>) + 'static,
    ) {
        let core = Rc::clone(self);
        // Creating files tells what became of the directory; any other change may make that untrue.
        let changes = !request.is_read() && !matches!(request, MdsRequest::Create { lease: true, .. });
        if changes {
            self.forget_parents();
        }
        let then = move |result| {
            if changes {
                core.forget_parents();
            }
            then(&core, result);
        };
        self.backend.call(request, Box::new(then));
    }

    fn forget_parents(&self) {
        self.changes.set(self.changes.get() + 1);
        self.parents.borrow_mut().clear();
    }

    /// Makes a call whose answer carries attributes.
    pub fn call_attr(
        self: &Rc<Self>,
        request: MdsRequest,
        then: impl FnOnce(&Rc<Self>, Result<Attr, Errno>) + 'static,
    ) {
        self.call(request, move |core, result| {
            let attr = match result {
                Ok(MdsReply::Attr(attr) | MdsReply::CreatedIn { attr, .. }) => Ok(attr),
                Ok(other) => Err(core.unexpected(&other)),
                Err(error) => Err(core.refused(&error)),
            };
            then(core, attr);
        });
    }

    /// Makes a call whose answer says nothing but yes.
    pub fn call_done(self: &Rc<Self>, request: MdsRequest, done: Done<()>) {
        self.call(request, move |core, result| {
            done(result.map(|_| ()).map_err(|error| core.refused(&error)));
        });
    }

    /// Errno of a refused call; what no program can explain from its errno goes to the log.
    pub fn refused(&self, error: &MdsError) -> Errno {
        let errno = mds_errno(error);
        if errno == Errno::EIO || matches!(error, MdsError::NoSpace(_) | MdsError::Refused(_)) {
            self.log.line(format_args!("the metadata servers refused a call: {error}"));
        }
        errno
    }

    /// Errno for an answer of the wrong kind.
    pub fn unexpected(&self, reply: &MdsReply) -> Errno {
        self.log.line(format_args!("the metadata servers gave an answer of the wrong kind: {reply:?}"));
        Errno::EIO
    }

    /// Puts what this mount knows better over `attr`, remembers it as told, and says how long it holds.
    pub fn stat(&self, mut attr: Attr) -> Stat {
        let file = if attr.kind == InodeKind::File { self.files.borrow().get(&attr.inode).cloned() } else { None };
        let mut ttl = TTL_SHARED;
        if let Some(file) = file {
            file.overlay(&mut attr);
            if file.is_exclusive() {
                ttl = TTL_EXCLUSIVE;
            }
        }
        self.tell(&attr);
        Stat { attr, ttl }
    }

    fn tell(&self, attr: &Attr) {
        let told = Told { size: attr.size, mode: attr.mode };
        self.told_new.borrow_mut().insert(attr.inode, told);
    }

    /// What the kernel may still believe of an inode that no file here knows better.
    pub fn told(&self, inode: InodeId) -> Option<Told> {
        self.told_new.borrow().get(&inode).or(self.told_old.borrow().get(&inode)).copied()
    }

    /// A number for a new handle.
    pub fn new_handle(&self) -> u64 {
        let number = self.next_handle.get();
        self.next_handle.set(number + 1);
        number
    }

    /// An open file by handle.
    pub fn handle(&self, number: u64) -> Result<Rc<Handle>, Errno> {
        self.handles.borrow().get(&number).cloned().ok_or(Errno::EBADF)
    }

    /// Tells the kernel to forget attributes, and content with `content`; `then` runs when it has.
    pub fn notify(self: &Rc<Self>, inode: InodeId, content: bool, then: Later) {
        let token = self.next_token.get();
        self.next_token.set(token + 1);
        self.noticed.borrow_mut().insert(token, then);
        if self.notices.send(Notice { inode, content, token }).is_err() {
            // No notifier any more: the kernel's side of the mount is gone, and its caches with it.
            self.noticed(token);
        }
    }

    /// The kernel has acted on a notice.
    pub fn noticed(self: &Rc<Self>, token: u64) {
        let then = self.noticed.borrow_mut().remove(&token);
        if let Some(then) = then {
            then(self);
        }
    }

    /// Once a second: reports sizes, lets go of idle leases, ends waits that took too long.
    pub(crate) fn tick(self: &Rc<Self>) {
        let now = self.now_tick.get() + 1;
        self.now_tick.set(now);
        self.parents.borrow_mut().clear();
        let recent = std::mem::take(&mut *self.told_new.borrow_mut());
        *self.told_old.borrow_mut() = recent;
        let dirty: Vec<InodeId> = self.dirty.borrow().iter().copied().collect();
        for inode in dirty {
            if let Some(file) = self.file_if_known(inode) {
                self.report(&file, Box::new(|_| ()));
            }
        }
        self.try_for_room();
        self.expire_opens(now);
        self.expire_idle(now);
    }

    /// Closes everything; `done` runs when nothing is left. The kernel's side must be gone already.
    pub fn close_all(self: &Rc<Self>, done: Box<dyn FnOnce()>) {
        *self.closing.borrow_mut() = Some(done);
        self.give_up_on_room();
        let numbers: Vec<u64> = self.handles.borrow().keys().copied().collect();
        for number in numbers {
            self.release(number);
        }
        let files: Vec<Rc<File>> = self.files.borrow().values().cloned().collect();
        for file in files {
            self.let_go(&file);
        }
        self.check_closed();
    }

    /// True once [`Core::close_all`] began.
    pub fn is_closing(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Ends [`Core::close_all`] when the last file has gone.
    pub fn check_closed(&self) {
        if self.files.borrow().is_empty() {
            let done = self.closing.borrow_mut().take();
            if let Some(done) = done {
                done();
            }
        }
    }
}
