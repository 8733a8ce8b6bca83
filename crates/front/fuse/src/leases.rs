//! How the lease of an open file comes and goes; the states and the invariants F1 to F3 stand in [`crate::files`].

use crate::attr::open_errno;
use crate::backend::{OpenFailure, Volume};
use crate::core::{Core, Handle};
use crate::files::{Departure, File, Lease};
use cairn_env::block::BlockError;
use cairn_types::{InodeId, VolumeId};
use cairn_wire::mds::{LeaseMode, MdsRequest};
use fuser::Errno;
use std::rc::Rc;

/// How often pages are dropped again because reads were answered meanwhile, before the lease goes regardless.
const FORGET_ROUNDS_MAX: u32 = 16;

impl Core {
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

    /// True when the kernel may keep the pages it has over this open (F1).
    ///
    /// An open without that makes the kernel forget them, but only when it gets to the answer: another open may
    /// overtake it. So pages count as valid again from the first request of such a handle on, see
    /// [`Core::uses_handle`].
    pub fn claim_pages(&self, file: &File) -> bool {
        file.pages_valid.get()
    }

    /// A request of a handle proves that the kernel has taken its open, and with it forgotten older pages.
    pub fn uses_handle(&self, handle: &Handle) {
        if handle.pages_round == handle.file.pages_round.get() {
            handle.file.pages_valid.set(true);
        }
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

    pub(crate) fn start_open(self: &Rc<Self>, file: &Rc<File>) {
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
    pub(crate) fn depart(self: &Rc<Self>, file: &Rc<File>, why: Departure) {
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

    /// Drops the kernel's pages. Reads go on under the old lease meanwhile, because the kernel waits for pages locked
    /// by reads under way; if any was answered, its pages may have come too late to be dropped, so once more.
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
                leaving.pages_outdated();
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

    pub(crate) fn leave_when_drained(self: &Rc<Self>, file: &Rc<File>) {
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
        // Giving a lease back flushes.
        file.writes_flushed.set(file.writes_answered.get());
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
}
