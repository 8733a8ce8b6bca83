//! Open files and their leases.
//!
//! There is one [`File`] per inode in use; all its handles share one volume. The lease is exclusive as soon as one handle
//! may write, shared otherwise, and stays for a while after the last close, so that the next open costs nothing and the
//! kernel's cached pages stay valid. Life of a lease:
//!
//! ```text
//! None --open--> Opening --granted--> Held --recalled, upgraded, idle--> Leaving --released--> None
//! ```
//!
//! Invariants:
//! - F1: cached pages of an inode in the kernel were read under the present lease of its file, or under no other holder
//!   since. So before a lease is given away to somebody else the kernel forgets the pages, and an open that cannot show an
//!   unbroken lease drops them.
//! - F2: while the lease is exclusive this mount owns size and modification time. They reach the metadata servers with
//!   fsync and close, at the latest after a second, always before the lease goes, and never reordered with a truncation.
//! - F3: `Exclusive` is asked for whenever a handle may write. So a write, for which the kernel holds pages locked, never
//!   waits for the kernel to forget those pages.

use crate::attr::{block_errno, open_errno, wall_ns};
use crate::backend::{OpenFailure, Volume};
use crate::core::{Core, Done, Later};
use cairn_env::block::{BlockError, BlockOp, BlockReply};
use cairn_types::{InodeId, VolumeId};
use cairn_wire::mds::{Attr, LeaseMode, MdsError, MdsReply, MdsRequest, SetAttr};
use fuser::Errno;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// Seconds a lease is kept after the last close.
const IDLE_TICKS: u64 = 10;
/// Most files that keep a lease without being open.
const IDLE_MAX: usize = 4096;
/// Seconds for which attributes learnt under an exclusive lease answer for themselves.
const ATTR_TICKS: u64 = 30;
/// How often pages are dropped again because reads were answered meanwhile, before the lease goes regardless.
const FORGET_ROUNDS_MAX: u32 = 16;

/// Called with the volume once the lease suffices.
type Waiter = (LeaseMode, Box<dyn FnOnce(&Rc<Core>, Result<Rc<dyn Volume>, Errno>)>);

/// Why a lease is given away, and so how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Departure {
    /// Another client asked, or a stronger mode is needed here: pages are dropped, the lease goes at once.
    Wanted,
    /// Nobody used the file for a while: attributes are dropped, the lease goes when convenient.
    Idle,
    /// The file lost its last name and its last handle.
    Orphan,
}

enum Lease {
    None,
    Opening,
    Held { volume: Rc<dyn Volume>, mode: LeaseMode },
    Leaving { volume: Rc<dyn Volume>, why: Departure, started: bool },
}

/// A regular file in use.
pub(crate) struct File {
    /// Which.
    pub inode: InodeId,
    /// How often a lease of this file was lost to a fence.
    pub fences: Cell<u64>,
    /// It lost its last name while open, and the metadata servers keep it for this mount.
    pub orphan: Cell<bool>,
    /// `Some(false)` once it is known that the file has no `security.capability`.
    pub capabilities: Cell<Option<bool>>,
    lease: RefCell<Lease>,
    /// The lease is on its way out although still held: the kernel is forgetting pages.
    departing: Cell<bool>,
    recalled: Cell<bool>,
    /// F1 holds for the pages the kernel has.
    pages_valid: Cell<bool>,
    waiters: RefCell<Vec<Waiter>>,
    handles: Cell<u32>,
    writers: Cell<u32>,
    idle_listed: Cell<bool>,
    idle_since: Cell<u64>,
    in_flight: Cell<u32>,
    reads_answered: Cell<u64>,
    size: Cell<u64>,
    append_end: Cell<u64>,
    mtime_ns: Cell<u64>,
    allocated: Cell<u64>,
    size_dirty: Cell<bool>,
    mtime_dirty: Cell<bool>,
    writes_answered: Cell<u64>,
    writes_flushed: Cell<u64>,
    /// Size, time and allocation are this mount's word, not what the metadata servers said last (F2).
    owned: Cell<bool>,
    attr: RefCell<Option<(Attr, u64)>>,
    attr_changes: Cell<u64>,
    attr_busy: Cell<bool>,
    attr_queue: RefCell<VecDeque<Later>>,
}

impl File {
    fn new(inode: InodeId) -> Self {
        Self {
            inode,
            fences: Cell::new(0),
            orphan: Cell::new(false),
            capabilities: Cell::new(None),
            lease: RefCell::new(Lease::None),
            departing: Cell::new(false),
            recalled: Cell::new(false),
            pages_valid: Cell::new(false),
            waiters: RefCell::default(),
            handles: Cell::new(0),
            writers: Cell::new(0),
            idle_listed: Cell::new(false),
            idle_since: Cell::new(0),
            in_flight: Cell::new(0),
            reads_answered: Cell::new(0),
            size: Cell::new(0),
            append_end: Cell::new(0),
            mtime_ns: Cell::new(0),
            allocated: Cell::new(0),
            size_dirty: Cell::new(false),
            mtime_dirty: Cell::new(false),
            writes_answered: Cell::new(0),
            writes_flushed: Cell::new(0),
            owned: Cell::new(false),
            attr: RefCell::new(None),
            attr_changes: Cell::new(0),
            attr_busy: Cell::new(false),
            attr_queue: RefCell::default(),
        }
    }

    fn held(&self, need: LeaseMode) -> Option<Rc<dyn Volume>> {
        match &*self.lease.borrow() {
            Lease::Held { volume, mode } if *mode == LeaseMode::Exclusive || need == LeaseMode::Shared => {
                Some(Rc::clone(volume))
            }
            _ => None,
        }
    }

    fn is_held(&self) -> bool {
        matches!(&*self.lease.borrow(), Lease::Held { .. })
    }

    /// True while this mount is the only one that may write the file.
    pub fn is_exclusive(&self) -> bool {
        matches!(&*self.lease.borrow(), Lease::Held { mode: LeaseMode::Exclusive, .. })
    }

    /// True when a handle is open.
    pub fn is_open(&self) -> bool {
        self.handles.get() > 0
    }

    /// The size as this mount knows it; meaningful under a lease.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Number of attribute changes begun or ended from here; an answer asked for before a change may be older than it.
    pub fn attr_changes(&self) -> u64 {
        self.attr_changes.get()
    }

    /// Notes that an attribute change begins or ends.
    pub fn attr_changing(&self) {
        self.attr_changes.set(self.attr_changes.get() + 1);
        *self.attr.borrow_mut() = None;
    }

    /// Takes over what the metadata servers say, except for what this mount knows better.
    pub fn learn(&self, attr: &Attr, now: u64) {
        if !self.owned.get() {
            self.allocated.set(attr.allocated);
            self.mtime_ns.set(attr.mtime_ns);
        }
        *self.attr.borrow_mut() = Some((attr.clone(), now));
    }

    /// Puts what this mount knows better over `attr` (F2).
    pub fn overlay(&self, attr: &mut Attr) {
        if self.is_held() {
            attr.size = self.size.get();
        }
        if self.owned.get() {
            attr.allocated = self.allocated.get();
            attr.mtime_ns = self.mtime_ns.get();
            attr.ctime_ns = attr.ctime_ns.max(if self.mtime_dirty.get() { attr.mtime_ns } else { 0 });
        }
    }

    /// Attributes that need no call, under an exclusive lease.
    pub fn known_attr(&self, now: u64) -> Option<Attr> {
        if !self.is_exclusive() {
            return None;
        }
        let known = self.attr.borrow();
        let (attr, since) = known.as_ref()?;
        (now - since <= ATTR_TICKS).then(|| attr.clone())
    }

    /// Permission bits, if known.
    pub fn mode(&self) -> Option<u32> {
        self.attr.borrow().as_ref().map(|(attr, _)| attr.mode)
    }

    /// Where an append that starts now has to write.
    pub fn append_offset(&self, len: u64) -> u64 {
        let offset = self.append_end.get().max(self.size.get());
        self.append_end.set(offset + len);
        offset
    }

    fn range_written(&self, offset: u64, len: u64) {
        // An estimate between 0 and the size: bytes past the end are new, bytes inside count only while holes are left.
        let blocks = |bytes: u64| bytes.next_multiple_of(4096);
        let (size, end) = (self.size.get(), offset + len);
        let inside = size.min(end).saturating_sub(offset);
        let beyond = blocks(end).saturating_sub(blocks(size).max(offset & !4095));
        let filled = if self.allocated.get() < blocks(size) { blocks(inside) } else { 0 };
        let size = size.max(end);
        self.allocated.set((self.allocated.get() + beyond + filled).min(blocks(size)));
        if size != self.size.get() {
            self.size.set(size);
            self.size_dirty.set(true);
        }
        self.touch();
    }

    fn touch(&self) {
        self.owned.set(true);
        self.mtime_ns.set(wall_ns());
        self.mtime_dirty.set(true);
    }

    /// The modification time was set by hand: nothing older is to be reported.
    pub fn mtime_set(&self, mtime_ns: u64) {
        self.mtime_ns.set(mtime_ns);
    }

    /// Notes that a range was given up: the estimate of what is allocated shrinks.
    pub fn range_punched(&self, len: u64) {
        let left = self.allocated.get().saturating_sub(len);
        // Something that holds data never reports nothing: programs take "no blocks" for "all zeros".
        self.allocated.set(if self.size.get() > 0 { left.max(4096) } else { 0 });
        self.size_dirty.set(true);
        self.touch();
    }

    fn is_dirty(&self) -> bool {
        self.size_dirty.get() || self.mtime_dirty.get()
    }
}

impl Core {
    /// The file of an inode, entered if new.
    pub fn file(&self, inode: InodeId) -> Rc<File> {
        Rc::clone(self.files.borrow_mut().entry(inode).or_insert_with(|| Rc::new(File::new(inode))))
    }

    /// The file of an inode in use.
    pub fn file_if_known(&self, inode: InodeId) -> Option<Rc<File>> {
        self.files.borrow().get(&inode).cloned()
    }

    /// Counts a handle that is being opened; from here on the right kind of lease is asked for (F3).
    pub fn add_handle(&self, file: &File, writer: bool) {
        file.handles.set(file.handles.get() + 1);
        file.writers.set(file.writers.get() + u32::from(writer));
        self.open_count.set(self.open_count.get() + 1);
    }

    /// Counts a handle that is gone, and lets the lease rest, or go.
    pub fn drop_handle(self: &Rc<Self>, file: &Rc<File>, writer: bool) {
        file.handles.set(file.handles.get() - 1);
        file.writers.set(file.writers.get() - u32::from(writer));
        self.open_count.set(self.open_count.get() - 1);
        if file.handles.get() == 0 && file.orphan.get() {
            self.depart(file, Departure::Orphan);
        } else if file.recalled.get() && file.writers.get() == 0 {
            self.depart(file, Departure::Wanted);
        } else {
            self.rest(file);
        }
    }

    /// Puts an unused file on the idle list, or drops it when it holds nothing.
    pub fn rest(self: &Rc<Self>, file: &Rc<File>) {
        if file.handles.get() > 0 {
            return;
        }
        if !file.is_held() {
            self.drop_if_unused(file);
            return;
        }
        if self.is_closing() {
            self.depart(file, Departure::Idle);
            return;
        }
        let now = self.now_tick.get();
        file.idle_since.set(now);
        if file.idle_listed.replace(true) {
            return;
        }
        self.idle.borrow_mut().push_back((file.inode, now));
        if self.idle.borrow().len() > IDLE_MAX {
            self.expire_oldest();
        }
    }

    /// Gives up the lease of a file nobody has open.
    pub fn let_go(self: &Rc<Self>, file: &Rc<File>) {
        if file.handles.get() == 0 {
            self.depart(file, if file.orphan.get() { Departure::Orphan } else { Departure::Idle });
        }
    }

    /// Lets go of leases that rested long enough.
    pub fn expire_idle(self: &Rc<Self>, now: u64) {
        while self.idle.borrow().front().is_some_and(|(_, since)| since + IDLE_TICKS <= now) {
            self.expire_oldest();
        }
    }

    fn expire_oldest(self: &Rc<Self>) {
        let oldest = self.idle.borrow_mut().pop_front();
        let Some((inode, since)) = oldest else { return };
        let Some(file) = self.file_if_known(inode) else { return };
        let last = file.idle_since.get();
        if file.handles.get() == 0 && last > since {
            // Used since it was listed: it rests from then.
            self.idle.borrow_mut().push_back((inode, last));
            return;
        }
        file.idle_listed.set(false);
        self.let_go(&file);
    }

    /// Ends opens that waited too long for another client.
    pub fn expire_opens(self: &Rc<Self>, now: u64) {
        let late: Vec<InodeId> =
            self.opening.borrow().iter().filter(|(_, until)| **until <= now).map(|(inode, _)| *inode).collect();
        for inode in late {
            self.opening.borrow_mut().remove(&inode);
            let Some(file) = self.file_if_known(inode) else { continue };
            let waiters = std::mem::take(&mut *file.waiters.borrow_mut());
            self.log.line(format_args!("{inode}: another client did not give its lease back in time"));
            for (_, then) in waiters {
                then(self, Err(Errno::EBUSY));
            }
        }
    }

    fn drop_if_unused(self: &Rc<Self>, file: &Rc<File>) {
        let unused = file.handles.get() == 0
            && file.waiters.borrow().is_empty()
            && !file.attr_busy.get()
            && file.in_flight.get() == 0
            && matches!(&*file.lease.borrow(), Lease::None);
        if unused {
            self.dirty.borrow_mut().remove(&file.inode);
            let mut files = self.files.borrow_mut();
            if files.get(&file.inode).is_some_and(|known| Rc::ptr_eq(known, file)) {
                files.remove(&file.inode);
            }
            drop(files);
            if self.is_closing() {
                self.check_closed();
            }
        }
    }

    /// Takes over the lease of a file just created: it is empty, and the kernel has no page of it.
    pub fn adopt(self: &Rc<Self>, file: &Rc<File>, volume: Rc<dyn Volume>) {
        file.pages_valid.set(true);
        file.capabilities.set(Some(false));
        self.hold(file, volume, LeaseMode::Exclusive);
    }

    fn hold(self: &Rc<Self>, file: &Rc<File>, volume: Rc<dyn Volume>, mode: LeaseMode) {
        let (core, recalled) = (Rc::downgrade(self), Rc::downgrade(file));
        let held = Rc::downgrade(&volume);
        volume.on_recall(Box::new(move |wanted| {
            if let (Some(core), Some(file), Some(volume)) = (core.upgrade(), recalled.upgrade(), held.upgrade()) {
                core.recall(&file, &volume, wanted);
            }
        }));
        file.size.set(volume.size());
        file.append_end.set(volume.size());
        file.owned.set(false);
        file.recalled.set(false);
        file.departing.set(false);
        *file.lease.borrow_mut() = Lease::Held { volume, mode };
    }

    fn recall(self: &Rc<Self>, file: &Rc<File>, recalled: &Rc<dyn Volume>, wanted: LeaseMode) {
        let mode = match &*file.lease.borrow() {
            Lease::Held { volume, mode } if Rc::ptr_eq(volume, recalled) => *mode,
            _ => return,
        };
        if mode == LeaseMode::Shared && wanted == LeaseMode::Shared {
            return;
        }
        file.recalled.set(true);
        if file.writers.get() == 0 {
            self.depart(file, Departure::Wanted);
        }
    }

    /// True when the kernel may keep the pages it has over this open; from now on they are valid (F1).
    pub fn claim_pages(&self, file: &File) -> bool {
        file.pages_valid.replace(true)
    }

    /// Runs `then` with the volume as soon as the lease allows `need`.
    pub fn with_volume(
        self: &Rc<Self>,
        file: &Rc<File>,
        need: LeaseMode,
        then: impl FnOnce(&Rc<Self>, Result<Rc<dyn Volume>, Errno>) + 'static,
    ) {
        if let Some(volume) = file.held(need) {
            then(self, Ok(volume));
            return;
        }
        file.waiters.borrow_mut().push((need, Box::new(then)));
        if matches!(&*file.lease.borrow(), Lease::Opening) {
            let until = self.now_tick.get() + 1 + self.lease_wait;
            self.opening.borrow_mut().entry(file.inode).or_insert(until);
        }
        let (none, held) = match &*file.lease.borrow() {
            Lease::None => (true, false),
            Lease::Held { .. } => (false, true),
            Lease::Opening | Lease::Leaving { .. } => (false, false),
        };
        if none {
            self.start_open(file);
        } else if held {
            // Shared, and exclusive is wanted: there is no upgrade in place, others may have to give theirs back first.
            self.depart(file, Departure::Wanted);
        }
    }

    fn start_open(self: &Rc<Self>, file: &Rc<File>) {
        let exclusive =
            file.writers.get() > 0 || file.waiters.borrow().iter().any(|(need, _)| *need == LeaseMode::Exclusive);
        let mode = if exclusive { LeaseMode::Exclusive } else { LeaseMode::Shared };
        *file.lease.borrow_mut() = Lease::Opening;
        self.opening.borrow_mut().insert(file.inode, self.now_tick.get() + 1 + self.lease_wait);
        let (core, opened) = (Rc::clone(self), Rc::clone(file));
        self.backend.open(
            VolumeId::of_inode(file.inode),
            mode,
            Box::new(move |result| core.opened(&opened, mode, result)),
        );
    }

    fn opened(self: &Rc<Self>, file: &Rc<File>, mode: LeaseMode, result: Result<Rc<dyn Volume>, OpenFailure>) {
        self.opening.borrow_mut().remove(&file.inode);
        let failed = match result {
            Ok(volume) => {
                self.hold(file, volume, mode);
                None
            }
            Err(error) => {
                *file.lease.borrow_mut() = Lease::None;
                let errno = open_errno(&error);
                if errno != Errno::ENOENT {
                    self.log.line(format_args!("{}: cannot be opened: {error}", file.inode));
                }
                Some(errno)
            }
        };
        let waiters = std::mem::take(&mut *file.waiters.borrow_mut());
        for (need, then) in waiters {
            match failed {
                Some(errno) => then(self, Err(errno)),
                None => self.with_volume(file, need, then),
            }
        }
        self.rest(file);
    }

    /// Starts giving the lease away.
    fn depart(self: &Rc<Self>, file: &Rc<File>, why: Departure) {
        if !file.is_held() {
            if why == Departure::Orphan && matches!(&*file.lease.borrow(), Lease::None) {
                self.close_orphan(file);
            }
            return;
        }
        if file.departing.replace(true) {
            return;
        }
        match why {
            Departure::Wanted => self.forget_pages(file, 0),
            Departure::Idle => {
                let leaving = Rc::clone(file);
                self.notify(file.inode, false, Box::new(move |core| core.leave(&leaving, Departure::Idle)));
            }
            Departure::Orphan => self.leave(file, Departure::Orphan),
        }
    }

    /// Drops the kernel's pages. Reads go on under the old lease meanwhile, because the kernel waits for pages locked by
    /// reads under way; if any was answered, its pages may have come too late to be dropped, so once more.
    fn forget_pages(self: &Rc<Self>, file: &Rc<File>, round: u32) {
        let before = file.reads_answered.get();
        let leaving = Rc::clone(file);
        let then = move |core: &Rc<Self>| {
            let late = leaving.reads_answered.get() != before;
            if late && round < FORGET_ROUNDS_MAX {
                core.forget_pages(&leaving, round + 1);
                return;
            }
            core.leave(&leaving, Departure::Wanted);
            if late {
                // Readers never paused. New reads wait for the next lease now, so nobody may wait for this notice.
                leaving.pages_valid.set(false);
                core.notify(leaving.inode, true, Box::new(|_| ()));
            }
        };
        self.notify(file.inode, true, Box::new(then));
    }

    fn leave(self: &Rc<Self>, file: &Rc<File>, why: Departure) {
        let volume = match &*file.lease.borrow() {
            Lease::Held { volume, .. } => Rc::clone(volume),
            _ => return,
        };
        let (waiting, recalled) = (!file.waiters.borrow().is_empty(), file.recalled.get());
        if why == Departure::Idle && (file.handles.get() > 0 || waiting || recalled) {
            // Things changed while the kernel was told: the lease stays, or goes the way that drops pages.
            file.departing.set(false);
            if waiting || (recalled && file.writers.get() == 0) {
                self.depart(file, Departure::Wanted);
            } else {
                self.rest(file);
            }
            return;
        }
        *file.lease.borrow_mut() = Lease::Leaving { volume, why, started: false };
        self.leave_when_drained(file);
    }

    fn leave_when_drained(self: &Rc<Self>, file: &Rc<File>) {
        let ready = match &mut *file.lease.borrow_mut() {
            Lease::Leaving { volume, why, started } if !*started && file.in_flight.get() == 0 => {
                *started = true;
                Some((Rc::clone(volume), *why))
            }
            _ => None,
        };
        let Some((volume, why)) = ready else { return };
        // Whoever opens the volume next from this client may get it without a question to the metadata servers.
        volume.set_size(file.size.get());
        let leaving = Rc::clone(file);
        let core = Rc::clone(self);
        let gone = Box::new(move |result: Result<(), BlockError>| {
            if let Err(error) = result {
                core.log.line(format_args!("{}: giving its lease back: {error}", leaving.inode));
            }
            core.left(&leaving, why);
        });
        // F2: the size goes first, then the lease.
        self.report(
            file,
            Box::new(move |_| match why {
                Departure::Idle => volume.close(gone),
                Departure::Wanted | Departure::Orphan => volume.release(gone),
            }),
        );
    }

    fn left(self: &Rc<Self>, file: &Rc<File>, why: Departure) {
        *file.lease.borrow_mut() = Lease::None;
        file.departing.set(false);
        file.recalled.set(false);
        file.attr_changing();
        if !file.waiters.borrow().is_empty() {
            self.start_open(file);
        } else if file.handles.get() == 0 && (why == Departure::Orphan || file.orphan.get()) {
            self.close_orphan(file);
        } else {
            self.drop_if_unused(file);
        }
    }

    fn close_orphan(self: &Rc<Self>, file: &Rc<File>) {
        if !file.orphan.replace(false) {
            return self.drop_if_unused(file);
        }
        file.size_dirty.set(false);
        file.mtime_dirty.set(false);
        let gone = Rc::clone(file);
        self.call(MdsRequest::CloseHandle { inode: file.inode }, move |core, _| core.drop_if_unused(&gone));
    }

    /// One data operation. `done` gets the answer before the operation counts as ended, so a lease never goes with an
    /// answer outstanding.
    pub fn io(
        self: &Rc<Self>,
        file: &Rc<File>,
        need: LeaseMode,
        op: BlockOp,
        done: impl FnOnce(&Rc<Self>, Result<BlockReply, Errno>) + 'static,
    ) {
        if let Some(volume) = file.held(need) {
            self.submit(file, &volume, op, done);
            return;
        }
        let used = Rc::clone(file);
        self.with_volume(file, need, move |core, volume| match volume {
            Ok(volume) => core.submit(&used, &volume, op, done),
            Err(errno) => done(core, Err(errno)),
        });
    }

    fn submit(
        self: &Rc<Self>,
        file: &Rc<File>,
        volume: &Rc<dyn Volume>,
        op: BlockOp,
        done: impl FnOnce(&Rc<Self>, Result<BlockReply, Errno>) + 'static,
    ) {
        file.in_flight.set(file.in_flight.get() + 1);
        let (is_read, written) = match &op {
            BlockOp::Read { .. } => (true, None),
            BlockOp::Write { offset, data, .. } => (false, Some((*offset, data.len() as u64))),
            _ => (false, None),
        };
        let (core, file, used) = (Rc::clone(self), Rc::clone(file), Rc::clone(volume));
        let complete = move |result: Result<BlockReply, BlockError>| {
            let result = match result {
                Ok(reply) => {
                    if let Some((offset, len)) = written {
                        file.range_written(offset, len);
                        core.dirty.borrow_mut().insert(file.inode);
                    }
                    if !is_read {
                        file.writes_answered.set(file.writes_answered.get() + 1);
                    }
                    Ok(reply)
                }
                Err(error) => Err(core.failed(&file, &used, &error, written)),
            };
            done(&core, result);
            if is_read {
                file.reads_answered.set(file.reads_answered.get() + 1);
            }
            file.in_flight.set(file.in_flight.get() - 1);
            if file.in_flight.get() == 0 {
                file.append_end.set(file.size.get());
                core.leave_when_drained(&file);
                core.drop_if_unused(&file);
            }
        };
        volume.submit(op, Box::new(complete));
    }

    fn failed(
        self: &Rc<Self>,
        file: &Rc<File>,
        volume: &Rc<dyn Volume>,
        error: &BlockError,
        written: Option<(u64, u64)>,
    ) -> Errno {
        if !matches!(error, BlockError::NoSpace) {
            self.log.line(format_args!("{}: {error}", file.inode));
        }
        if matches!(error, BlockError::Fenced | BlockError::Closed) {
            self.fenced(file, volume);
        } else if let Some((offset, len)) = written
            && offset + len > file.size.get()
        {
            // Part of it may have arrived: past the end nothing but zeros may lie, or a later growth would show it.
            let from = offset.max(file.size.get());
            volume.submit(BlockOp::Discard { offset: from, len: offset + len - from }, Box::new(|_| ()));
        }
        block_errno(error)
    }

    /// The lease was lost to another client. What this mount knew of the file is void; writers learn it by `EIO`.
    fn fenced(self: &Rc<Self>, file: &Rc<File>, lost: &Rc<dyn Volume>) {
        let is_current = match &*file.lease.borrow() {
            Lease::Held { volume, .. } => Rc::ptr_eq(volume, lost),
            _ => false,
        };
        if !is_current {
            return;
        }
        *file.lease.borrow_mut() = Lease::None;
        file.departing.set(false);
        file.fences.set(file.fences.get() + 1);
        file.pages_valid.set(false);
        file.size_dirty.set(false);
        file.mtime_dirty.set(false);
        file.attr_changing();
        self.dirty.borrow_mut().remove(&file.inode);
        self.notify(file.inode, true, Box::new(|_| ()));
        if !file.waiters.borrow().is_empty() {
            self.start_open(file);
        }
    }

    /// Makes every answered write durable; costs nothing when nothing was written since the last time.
    pub fn flush_data(self: &Rc<Self>, file: &Rc<File>, done: Done<()>) {
        let upto = file.writes_answered.get();
        if file.writes_flushed.get() >= upto || !file.is_held() {
            done(Ok(()));
            return;
        }
        let flushed = Rc::clone(file);
        self.io(file, LeaseMode::Exclusive, BlockOp::Flush, move |_, result| {
            if result.is_ok() {
                flushed.writes_flushed.set(flushed.writes_flushed.get().max(upto));
            }
            done(result.map(|_| ()));
        });
    }

    /// Runs `job` alone among the changes of this file's attributes; `job` ends with [`Core::leave_attr`].
    pub fn enter_attr(self: &Rc<Self>, file: &Rc<File>, job: Later) {
        if file.attr_busy.replace(true) {
            file.attr_queue.borrow_mut().push_back(job);
        } else {
            job(self);
        }
    }

    /// Lets the next change of this file's attributes go.
    pub fn leave_attr(self: &Rc<Self>, file: &Rc<File>) {
        let next = file.attr_queue.borrow_mut().pop_front();
        match next {
            Some(job) => job(self),
            None => {
                file.attr_busy.set(false);
                self.drop_if_unused(file);
            }
        }
    }

    /// Tells the metadata servers size and times, if they do not know them.
    pub fn report(self: &Rc<Self>, file: &Rc<File>, done: Done<()>) {
        if !file.is_dirty() && !file.attr_busy.get() {
            self.dirty.borrow_mut().remove(&file.inode);
            done(Ok(()));
            return;
        }
        let reported = Rc::clone(file);
        self.enter_attr(
            file,
            Box::new(move |core| {
                let set = core.take_dirty(&reported);
                if set == SetAttr::default() {
                    done(Ok(()));
                    core.leave_attr(&reported);
                    return;
                }
                let inode = reported.inode;
                core.call(MdsRequest::SetAttr { inode, set: set.clone() }, move |core, result| {
                    done(core.reported(&reported, &set, result));
                    core.leave_attr(&reported);
                });
            }),
        );
    }

    /// What is to be reported; from here on it counts as reported. Call inside [`Core::enter_attr`].
    pub fn take_dirty(&self, file: &File) -> SetAttr {
        self.dirty.borrow_mut().remove(&file.inode);
        let (size, mtime) = (file.size_dirty.replace(false), file.mtime_dirty.replace(false));
        SetAttr {
            grow_to: size.then(|| file.size.get()),
            allocated: (size || mtime).then(|| file.allocated.get()),
            mtime_ns: mtime.then(|| file.mtime_ns.get()),
            ..SetAttr::default()
        }
    }

    fn reported(&self, file: &File, set: &SetAttr, result: Result<MdsReply, MdsError>) -> Result<(), Errno> {
        match result {
            Ok(MdsReply::Attr(attr)) => {
                file.learn(&attr, self.now_tick.get());
                Ok(())
            }
            Ok(other) => Err(self.unexpected(&other)),
            // The file is gone: there is nothing left to report to.
            Err(MdsError::Posix(libc::ENOENT | libc::ESTALE) | MdsError::NotFound(_)) => Ok(()),
            Err(error) => {
                self.restore_dirty(file, set);
                Err(self.refused(&error))
            }
        }
    }

    /// Takes back [`Core::take_dirty`] after the call failed.
    pub fn restore_dirty(&self, file: &File, set: &SetAttr) {
        file.size_dirty.set(file.size_dirty.get() || set.grow_to.is_some());
        file.mtime_dirty.set(file.mtime_dirty.get() || set.mtime_ns.is_some());
        self.dirty.borrow_mut().insert(file.inode);
    }

    /// Takes over a size that a truncation has set at the metadata servers.
    pub fn truncated(&self, file: &File, size: u64, attr: &Attr) {
        file.size.set(size);
        file.append_end.set(size);
        file.size_dirty.set(false);
        file.mtime_dirty.set(false);
        file.owned.set(true);
        file.allocated.set(attr.allocated.min(size.next_multiple_of(4096)));
        file.mtime_ns.set(attr.mtime_ns);
        if let Some(volume) = file.held(LeaseMode::Shared) {
            volume.set_size(size);
        }
    }

    /// Grows a file whose content beyond the old end reads as zeros: `fallocate` and writes of zeros past the end.
    pub fn grown(&self, file: &File, size: u64) {
        if size > file.size.get() {
            file.size.set(size);
            file.size_dirty.set(true);
        }
        file.touch();
        self.dirty.borrow_mut().insert(file.inode);
    }
}
