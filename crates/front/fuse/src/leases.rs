//! How the lease of an open file comes and goes; the states and the invariants F1 to F4 stand in [`crate::files`].

use crate::attr::open_errno;
use crate::backend::{OpenFailure, Volume};
use crate::core::{Core, Later};
use crate::files::{Departure, File, Lease, WithVolume};
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
        let (core, lost) = (Rc::downgrade(self), Rc::downgrade(file));
        let held = Rc::downgrade(&volume);
        volume.on_lost(Box::new(move || {
            if let (Some(core), Some(file), Some(volume)) = (core.upgrade(), lost.upgrade(), held.upgrade()) {
                core.fenced(&file, &volume);
            }
        }));
        file.size.set(volume.size());
        file.append_end.set(volume.size());
        file.owned.set(false);
        file.recalled.set(false);
        file.departing.set(false);
        *file.lease.borrow_mut() = Lease::Held { volume, mode };
        self.clean_pages(file);
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

    /// Runs `then` as soon as F1 holds for the pages the kernel has.
    pub fn with_valid_pages(self: &Rc<Self>, file: &Rc<File>, then: Later) {
        if file.pages_valid.get() {
            return then(self);
        }
        file.page_waiters.borrow_mut().push(then);
        self.clean_pages(file);
    }

    /// Makes the kernel forget pages for which F1 does not hold. Reads under way end under the present lease; where
    /// there is none, nobody has the file open.
    pub(crate) fn clean_pages(self: &Rc<Self>, file: &Rc<File>) {
        if file.pages_valid.get() || file.cleaning.replace(true) {
            return;
        }
        let (round, cleaned) = (file.pages_round.get(), Rc::clone(file));
        let then = move |core: &Rc<Self>| {
            cleaned.cleaning.set(false);
            if cleaned.pages_round.get() != round {
                return core.clean_pages(&cleaned);
            }
            cleaned.pages_valid.set(true);
            let waiters = std::mem::take(&mut *cleaned.page_waiters.borrow_mut());
            waiters.into_iter().for_each(|then| then(core));
            core.drop_if_unused(&cleaned);
        };
        self.notify(file.inode, true, Box::new(then));
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
        self.wait_for_lease(file, need, Box::new(then));
    }

    /// As [`Core::with_volume`], under the next lease when the present one is on its way out or does not suffice.
    pub(crate) fn wait_for_lease(self: &Rc<Self>, file: &Rc<File>, need: LeaseMode, then: WithVolume) {
        file.waiters.borrow_mut().push((need, then));
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
                // A volume that its last holder left unclean is granted exclusively, whatever was asked for.
                let mode = if volume.mode() == LeaseMode::Exclusive { LeaseMode::Exclusive } else { mode };
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
            Departure::Wanted | Departure::Idle => self.forget_pages(file, why, 0),
            Departure::Orphan => self.leave(file, Departure::Orphan),
        }
    }

    /// Drops the kernel's pages. Reads go on under the old lease meanwhile, because the kernel waits for pages locked
    /// by reads under way. A read answered meanwhile, or still under way now, may fill a page where the kernel has
    /// already been: so once more. When readers never pause the lease goes regardless, see
    /// [`Core::leave_when_drained`].
    fn forget_pages(self: &Rc<Self>, file: &Rc<File>, why: Departure, round: u32) {
        let before = file.pages_filled.get();
        let leaving = Rc::clone(file);
        let then = move |core: &Rc<Self>| {
            leaving.pages_forgotten.set(before);
            let late = leaving.has_pages() || leaving.reads_in_flight.get() > 0;
            if late && round < FORGET_ROUNDS_MAX {
                core.forget_pages(&leaving, why, round + 1);
            } else {
                core.leave(&leaving, why);
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
        if file.has_pages() {
            // From here on they may be older than the file (F1). They are forgotten under the next lease: now, the
            // kernel would wait for reads that themselves wait for that lease.
            file.pages_outdated();
        }
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
        let (core, open) = (Rc::clone(self), Rc::clone(file));
        self.report(
            file,
            Box::new(move |_| match why {
                Departure::Idle => volume.close(gone),
                Departure::Wanted => core.keep_while_open(&open, Box::new(move |_| volume.release(gone))),
                Departure::Orphan => volume.release(gone),
            }),
        );
    }

    /// Without a lease nothing keeps a file whose last name goes, so a file open here is kept by a handle from now on.
    /// Opens that come later wait for the next lease.
    fn keep_while_open(self: &Rc<Self>, file: &Rc<File>, then: Later) {
        if file.handles.get() == 0 || file.orphan.replace(true) {
            return then(self);
        }
        let kept = Rc::clone(file);
        self.call(MdsRequest::OpenHandle { inode: file.inode }, move |core, result| {
            if let Err(error) = result {
                core.refused(&error);
                kept.orphan.set(false);
            }
            then(core);
        });
    }

    fn left(self: &Rc<Self>, file: &Rc<File>, why: Departure) {
        *file.lease.borrow_mut() = Lease::None;
        file.departing.set(false);
        file.recalled.set(false);
        file.attr_changing();
        // Giving a lease back flushes.
        file.writes_flushed.set(file.writes_answered.get());
        let readers_see_old_pages = file.handles.get() > 0 && !file.pages_valid.get();
        if readers_see_old_pages || !file.waiters.borrow().is_empty() {
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
