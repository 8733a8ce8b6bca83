//! A device that is not there yet: operations wait for it.

use cairn_env::block::{BlockDevice, BlockDone, BlockError, BlockOp};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// Stands in for a device that is being opened. Operations wait until [`Gate::open`] brings the device or
/// [`Gate::fail`] says that it will not come. What waits is bounded by what the connections may have under way.
pub struct Gate {
    size: u64,
    read_only: bool,
    state: RefCell<State>,
}

enum State {
    Waiting(VecDeque<(BlockOp, BlockDone)>),
    Open(Rc<dyn BlockDevice>),
    Failed,
}

impl Gate {
    /// Nothing behind it yet; clients that connect meanwhile are told this size.
    pub fn new(size: u64, read_only: bool) -> Self {
        Self { size, read_only, state: RefCell::new(State::Waiting(VecDeque::new())) }
    }

    /// The device is here: what waits goes to it, in order.
    pub fn open(&self, device: Rc<dyn BlockDevice>) {
        let before = self.state.replace(State::Open(Rc::clone(&device)));
        if let State::Waiting(waiting) = before {
            waiting.into_iter().for_each(|(op, done)| device.submit(op, done));
        }
    }

    /// The device does not come: what waits fails, and so does everything from here on.
    pub fn fail(&self) {
        if let State::Waiting(waiting) = self.state.replace(State::Failed) {
            waiting.into_iter().for_each(|(_, done)| done(Err(BlockError::Fenced)));
        }
    }
}

impl BlockDevice for Gate {
    fn size(&self) -> u64 {
        match &*self.state.borrow() {
            State::Open(device) => device.size(),
            _ => self.size,
        }
    }

    fn read_only(&self) -> bool {
        match &*self.state.borrow() {
            State::Open(device) => device.read_only(),
            _ => self.read_only,
        }
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let device = match &mut *self.state.borrow_mut() {
            State::Open(device) => Some(Rc::clone(device)),
            State::Waiting(waiting) => return waiting.push_back((op, done)),
            State::Failed => None,
        };
        match device {
            Some(device) => device.submit(op, done),
            None => done(Err(BlockError::Fenced)),
        }
    }
}
