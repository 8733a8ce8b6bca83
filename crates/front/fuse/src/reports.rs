//! Sizes and times on their way to the metadata servers, one change per file at a time (F2 in [`crate::files`]).

use crate::attr::FILE_SIZE_MAX;
use crate::core::{Core, Done, Later};
use crate::files::File;
use cairn_wire::mds::{Attr, LeaseMode, MdsError, MdsReply, MdsRequest, SetAttr};
use fuser::Errno;
use std::rc::Rc;

impl Core {
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
            // A volume forgets its map past the end when it shrinks. The metadata servers have dropped every chunk
            // there, also those allocated ahead of writes, so it has to shrink whatever it thought its size
            // was.
            volume.set_size(FILE_SIZE_MAX);
            volume.set_size(size);
        }
    }

    /// Grows a file whose content beyond the old end reads as zeros: `fallocate` and writes of zeros past the end.
    pub fn grown(&self, file: &File, size: u64) {
        if size > file.size.get() {
            file.size.set(size);
            file.size_dirty.set(true);
        }
        file.touch(self.backend.wall_ns());
        self.dirty.borrow_mut().insert(file.inode);
    }
}
