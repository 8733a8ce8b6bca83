//! Open files and their leases.
//!
//! There is one [`File`] per inode in use; all its handles share one volume. The lease is exclusive as soon as one
//! handle may write, shared otherwise, and stays for a while after the last close, so that the next open costs nothing
//! and the kernel's cached pages stay valid. Life of a lease:
//!
//! ```text
//! None --open--> Opening --granted--> Held --recalled, upgraded, idle--> Leaving --released--> None
//! ```
//!
//! Invariants:
//! - F1: cached pages of an inode in the kernel were read under the present lease of its file, or under no other holder
//!   since. So before a lease is given away the kernel forgets the pages. Whether it has is decided when the lease goes
//!   and nothing is under way any more: pages are left unless every answer that could have filled one came before the
//!   last forgetting began. Where pages are left, the next open waits until they are forgotten under the next lease.
//! - F2: while the lease is exclusive this mount owns size and modification time. They reach the metadata servers with
//!   fsync and close, at the latest after a second, always before the lease goes, and never reordered with a
//!   truncation.
//! - F3: `Exclusive` is asked for whenever a handle may write. So a write, for which the kernel holds pages locked,
//!   never waits for the kernel to forget those pages.
//! - F4: pages are forgotten only while nobody has the file open for writing. The kernel puts what is written into the
//!   cache before it sends it; forgotten in between and read anew, the page would hold what was there before the write.
//!   So no open makes the kernel forget pages, and a writer's open waits for a lease that is on its way out to be gone.

use crate::backend::Volume;
use crate::core::{Core, Later};
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, LeaseMode};
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

/// Called with the volume once the lease suffices.
pub(crate) type WithVolume = Box<dyn FnOnce(&Rc<Core>, Result<Rc<dyn Volume>, Errno>)>;
/// The mode needed, and what waits for it.
pub(crate) type Waiter = (LeaseMode, WithVolume);

/// Why a lease is given away, and so how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Departure {
    /// Another client asked, or a stronger mode is needed here: pages are dropped, the lease goes at once.
    Wanted,
    /// Nobody used the file for a while: pages are dropped, the lease goes when convenient.
    Idle,
    /// The file lost its last name and its last handle.
    Orphan,
}

pub(crate) enum Lease {
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
    /// The metadata servers keep it for this mount although its last name may go: that went, or the lease did, while
    /// it was open here.
    pub orphan: Cell<bool>,
    /// `Some(false)` once it is known that the file has no `security.capability`.
    pub capabilities: Cell<Option<bool>>,
    pub(crate) lease: RefCell<Lease>,
    /// The lease is on its way out although still held: the kernel is forgetting pages.
    pub(crate) departing: Cell<bool>,
    pub(crate) recalled: Cell<bool>,
    /// F1 holds for the pages the kernel has.
    pub(crate) pages_valid: Cell<bool>,
    /// How often F1 has stopped to hold.
    pub(crate) pages_round: Cell<u64>,
    /// The kernel is being told to forget pages for which F1 does not hold.
    pub(crate) cleaning: Cell<bool>,
    /// Waiting for F1 to hold.
    pub(crate) page_waiters: RefCell<Vec<Later>>,
    pub(crate) waiters: RefCell<Vec<Waiter>>,
    pub(crate) handles: Cell<u32>,
    pub(crate) writers: Cell<u32>,
    pub(crate) idle_listed: Cell<bool>,
    pub(crate) idle_since: Cell<u64>,
    pub(crate) in_flight: Cell<u32>,
    pub(crate) reads_in_flight: Cell<u32>,
    /// Answers after which the kernel may have a page it had not before.
    pub(crate) pages_filled: Cell<u64>,
    /// Value of `pages_filled` up to which the kernel has forgotten all pages.
    pub(crate) pages_forgotten: Cell<u64>,
    pub(crate) size: Cell<u64>,
    pub(crate) append_end: Cell<u64>,
    pub(crate) mtime_ns: Cell<u64>,
    pub(crate) allocated: Cell<u64>,
    pub(crate) size_dirty: Cell<bool>,
    pub(crate) mtime_dirty: Cell<bool>,
    pub(crate) writes_answered: Cell<u64>,
    pub(crate) writes_flushed: Cell<u64>,
    /// Size, time and allocation are this mount's word, not what the metadata servers said last (F2).
    pub(crate) owned: Cell<bool>,
    pub(crate) attr: RefCell<Option<(Attr, u64)>>,
    pub(crate) attr_changes: Cell<u64>,
    pub(crate) attr_busy: Cell<bool>,
    pub(crate) attr_queue: RefCell<VecDeque<Later>>,
}

impl File {
    /// The kernel may have pages of the present lease.
    pub(crate) fn has_pages(&self) -> bool {
        self.pages_filled.get() != self.pages_forgotten.get()
    }

    /// F1 does not hold any more for the pages the kernel has.
    pub(crate) fn pages_outdated(&self) {
        self.pages_valid.set(false);
        self.pages_round.set(self.pages_round.get() + 1);
    }

    fn new(inode: InodeId) -> Self {
        Self {
            inode,
            fences: Cell::new(0),
            orphan: Cell::new(false),
            capabilities: Cell::new(None),
            lease: RefCell::new(Lease::None),
            departing: Cell::new(false),
            recalled: Cell::new(false),
            // What was in use before and is not any more has left no pages, see [`Core::drop_if_unused`].
            pages_valid: Cell::new(true),
            pages_round: Cell::new(0),
            cleaning: Cell::new(false),
            page_waiters: RefCell::default(),
            waiters: RefCell::default(),
            handles: Cell::new(0),
            writers: Cell::new(0),
            idle_listed: Cell::new(false),
            idle_since: Cell::new(0),
            in_flight: Cell::new(0),
            reads_in_flight: Cell::new(0),
            pages_filled: Cell::new(0),
            pages_forgotten: Cell::new(0),
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

    pub(crate) fn held(&self, need: LeaseMode) -> Option<Rc<dyn Volume>> {
        match &*self.lease.borrow() {
            Lease::Held { volume, mode } if *mode == LeaseMode::Exclusive || need == LeaseMode::Shared => {
                Some(Rc::clone(volume))
            }
            _ => None,
        }
    }

    pub(crate) fn is_held(&self) -> bool {
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

    /// Attributes that need no call, under an exclusive lease. Of a file with several names not: one of them may go by
    /// a path that says nothing of this inode, and the count with it.
    pub fn known_attr(&self, now: u64) -> Option<Attr> {
        if !self.is_exclusive() {
            return None;
        }
        let known = self.attr.borrow();
        let (attr, since) = known.as_ref()?;
        (now - since <= ATTR_TICKS && attr.nlink == 1).then(|| attr.clone())
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

    pub(crate) fn range_written(&self, offset: u64, len: u64, now_ns: u64) {
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
        self.touch(now_ns);
    }

    pub(crate) fn touch(&self, now_ns: u64) {
        self.owned.set(true);
        self.mtime_ns.set(now_ns);
        self.mtime_dirty.set(true);
    }

    /// The modification time was set by hand: nothing older is to be reported.
    pub fn mtime_set(&self, mtime_ns: u64) {
        self.mtime_ns.set(mtime_ns);
    }

    /// Notes that a range was given up: the estimate of what is allocated shrinks.
    pub fn range_punched(&self, len: u64, now_ns: u64) {
        let left = self.allocated.get().saturating_sub(len);
        // Something that holds data never reports nothing: programs take "no blocks" for "all zeros".
        self.allocated.set(if self.size.get() > 0 { left.max(4096) } else { 0 });
        self.size_dirty.set(true);
        self.touch(now_ns);
    }

    pub(crate) fn is_dirty(&self) -> bool {
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
    pub(crate) fn drop_if_unused(self: &Rc<Self>, file: &Rc<File>) {
        let unused = file.handles.get() == 0
            && file.waiters.borrow().is_empty()
            && !file.attr_busy.get()
            && file.in_flight.get() == 0
            && matches!(&*file.lease.borrow(), Lease::None);
        if unused && !file.pages_valid.get() {
            self.clean_pages(file);
        } else if unused {
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
}
