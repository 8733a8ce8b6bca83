//! Writes that wait because the cluster is full.
//!
//! The client fails what nobody has room for, and leaves equal copies and the old content. Waiting is done here, where
//! it is known who waits: the write is tried again every second, holding nothing in between, and ends with `EINTR` when
//! its caller is being killed. That is looked up in the process table: the kernel says it with `FUSE_INTERRUPT` too,
//! but that request does not get through to us.

use crate::core::Core;
use crate::files::File;
use cairn_env::block::{BlockOp, BlockReply};
use cairn_wire::mds::LeaseMode;
use fuser::Errno;
use std::rc::Rc;

/// Called with the outcome of a data operation.
type IoDone = Box<dyn FnOnce(&Rc<Core>, Result<BlockReply, Errno>)>;

/// The thread that asked for an operation; zero when nobody waits for it, as in write-back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Caller(pub u32);

/// A write for which there was no room.
pub(crate) struct Waiting {
    file: Rc<File>,
    fences: u64,
    op: BlockOp,
    caller: Caller,
    done: IoDone,
}

impl Caller {
    /// True when it is about to die, as soon as it is let go.
    fn is_being_killed(self) -> bool {
        if self.0 == 0 {
            return false;
        }
        match std::fs::read_to_string(format!("/proc/{}/status", self.0)) {
            Ok(status) => kill_is_pending(&status),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }
}

/// Reads the signals pending out of `/proc/PID/status`. A signal that ends a process shows as SIGKILL in each thread.
fn kill_is_pending(status: &str) -> bool {
    let masks = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let kill = 1u64 << (libc::SIGKILL - 1);
    masks.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & kill != 0)
}

impl Core {
    /// As [`Core::io`] for writes, but waits while the cluster is full, unless the mount is to fail then.
    pub fn io_with_room(
        self: &Rc<Self>,
        file: &Rc<File>,
        op: BlockOp,
        caller: Caller,
        done: impl FnOnce(&Rc<Self>, Result<BlockReply, Errno>) + 'static,
    ) {
        if self.fail_on_no_space {
            return self.io(file, LeaseMode::Exclusive, op, done);
        }
        let waiting = Waiting { file: Rc::clone(file), fences: file.fences.get(), op, caller, done: Box::new(done) };
        self.try_waiting(waiting);
    }

    fn try_waiting(self: &Rc<Self>, waiting: Waiting) {
        let (file, op) = (Rc::clone(&waiting.file), waiting.op.clone());
        self.io(&file, LeaseMode::Exclusive, op, move |core, result| match result {
            Err(errno) if errno == Errno::ENOSPC && !core.is_closing() => {
                let mut all = core.no_room.borrow_mut();
                if all.is_empty() {
                    core.log.line(format_args!("the cluster is full: writes wait until there is room"));
                }
                all.push(waiting);
            }
            result => (waiting.done)(core, result),
        });
    }

    /// Tries the writes again that found no room, except those nobody waits for any more.
    pub fn try_for_room(self: &Rc<Self>) {
        let all = std::mem::take(&mut *self.no_room.borrow_mut());
        for waiting in all {
            if waiting.caller.is_being_killed() {
                (waiting.done)(self, Err(Errno::EINTR));
            } else if waiting.fences != waiting.file.fences.get() {
                (waiting.done)(self, Err(Errno::EIO));
            } else {
                self.try_waiting(waiting);
            }
        }
    }

    /// The mount ends: nobody waits any more.
    pub fn give_up_on_room(self: &Rc<Self>) {
        let all = std::mem::take(&mut *self.no_room.borrow_mut());
        all.into_iter().for_each(|waiting| (waiting.done)(self, Err(Errno::ENOSPC)));
    }
}

#[cfg(test)]
mod tests {
    use super::kill_is_pending;

    #[test]
    fn a_kill_is_seen_among_the_signals_pending() {
        let status = |own: &str, shared: &str| format!("Name:\tdd\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\tffff\n");
        assert!(!kill_is_pending(&status("0000000000000000", "0000000000000002")));
        assert!(kill_is_pending(&status("0000000000000100", "0000000000000002")));
        assert!(kill_is_pending(&status("0000000000000000", "0000000000000100")));
        assert!(!kill_is_pending("SigBlk:\t0000000000000100\n"));
    }
}
