//! Data operations on open files, and what happens when the lease under them is lost.

use crate::attr::block_errno;
use crate::backend::Volume;
use crate::core::{Core, Done};
use crate::files::{File, Lease};
use cairn_env::block::{BlockError, BlockOp, BlockReply};
use cairn_wire::mds::LeaseMode;
use fuser::Errno;
use std::rc::Rc;

impl Core {
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
        file.reads_in_flight.set(file.reads_in_flight.get() + u32::from(is_read));
        let (core, file, used) = (Rc::clone(self), Rc::clone(file), Rc::clone(volume));
        let complete = move |result: Result<BlockReply, BlockError>| {
            let result = match result {
                Ok(reply) => {
                    if let Some((offset, len)) = written {
                        file.range_written(offset, len, core.backend.wall_ns());
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
            file.pages_filled.set(file.pages_filled.get() + 1);
            file.reads_in_flight.set(file.reads_in_flight.get() - u32::from(is_read));
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

    /// The lease was lost. What this mount knew of the file is void; writers learn it by `EIO`. The next use of the
    /// file asks for the lease anew.
    pub(crate) fn fenced(self: &Rc<Self>, file: &Rc<File>, lost: &Rc<dyn Volume>) {
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
        file.pages_outdated();
        file.size_dirty.set(false);
        file.mtime_dirty.set(false);
        file.attr_changing();
        self.dirty.borrow_mut().remove(&file.inode);
        self.notify(file.inode, true, Box::new(|_| ()));
        if !file.waiters.borrow().is_empty() {
            self.start_open(file);
        } else {
            self.drop_if_unused(file);
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
}
