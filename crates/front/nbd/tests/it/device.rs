//! A device in memory that knows what is durable and can hold its answers back.

use cairn_env::Buf;
use cairn_env::block::{BlockDevice, BlockDone, BlockError, BlockOp, BlockReply, BlockResult, Extent};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

const BLOCK: u64 = 4096;

/// When operations are answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    /// Inside `submit`.
    AtOnce,
    /// From another task, in the order submitted.
    Later,
    /// When the test says so.
    WhenReleased,
}

pub(crate) struct MemDevice {
    state: RefCell<State>,
    pub answers: Cell<Answers>,
    pub read_only: bool,
    held: RefCell<VecDeque<(BlockResult, BlockDone)>>,
}

struct State {
    data: Vec<u8>,
    durable: Vec<u8>,
    allocated: Vec<bool>,
    /// Ranges answered and not yet durable.
    dirty: Vec<(u64, u64)>,
    log: Vec<String>,
    keep_log: bool,
}

impl MemDevice {
    pub(crate) fn new(size: u64) -> Self {
        let state = State {
            data: vec![0; size as usize],
            durable: vec![0; size as usize],
            allocated: vec![false; size.div_ceil(BLOCK) as usize],
            dirty: Vec::new(),
            log: Vec::new(),
            keep_log: true,
        };
        Self {
            state: RefCell::new(state),
            answers: Cell::new(Answers::Later),
            read_only: false,
            held: RefCell::default(),
        }
    }

    pub(crate) fn answering(self, answers: Answers) -> Self {
        self.answers.set(answers);
        self
    }

    pub(crate) fn without_log(self) -> Self {
        self.state.borrow_mut().keep_log = false;
        self
    }

    pub(crate) fn data(&self) -> Vec<u8> {
        self.state.borrow().data.clone()
    }

    pub(crate) fn durable(&self, offset: u64, len: u64) -> Vec<u8> {
        self.state.borrow().durable[offset as usize..(offset + len) as usize].to_vec()
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.borrow_mut().log)
    }

    pub(crate) fn resize(&self, size: u64) {
        let state = &mut *self.state.borrow_mut();
        state.data.resize(size as usize, 0);
        state.durable.resize(size as usize, 0);
        state.allocated.resize(size.div_ceil(BLOCK) as usize, false);
    }

    pub(crate) fn held_count(&self) -> usize {
        self.held.borrow().len()
    }

    /// Answers the oldest operation held back.
    pub(crate) fn release(&self) -> bool {
        let next = self.held.borrow_mut().pop_front();
        next.map(|(result, done)| done(result)).is_some()
    }
}

impl State {
    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, BlockError> {
        let size = self.data.len() as u64;
        match offset.checked_add(len).filter(|&end| end <= size) {
            Some(end) => Ok(offset as usize..end as usize),
            None => Err(BlockError::OutOfRange { offset, len, size }),
        }
    }

    fn persist(&mut self, offset: u64, len: u64) {
        let range = offset as usize..(offset + len) as usize;
        let (data, durable) = (&self.data, &mut self.durable);
        durable[range.clone()].copy_from_slice(&data[range]);
    }

    fn changed(&mut self, offset: u64, len: u64, fua: bool) {
        if fua { self.persist(offset, len) } else { self.dirty.push((offset, len)) }
    }

    fn zero(&mut self, offset: u64, len: u64, fua: bool) -> BlockResult {
        let range = self.range(offset, len)?;
        self.data[range].fill(0);
        for block in offset.div_ceil(BLOCK)..(offset + len) / BLOCK {
            self.allocated[block as usize] = false;
        }
        self.changed(offset, len, fua);
        Ok(BlockReply::Done)
    }

    fn apply(&mut self, op: BlockOp) -> BlockResult {
        if self.keep_log {
            self.log.push(match &op {
                BlockOp::Write { offset, data, fua } => format!("write {offset}+{} fua={fua}", data.len()),
                other => format!("{other:?}"),
            });
        }
        match op {
            BlockOp::Read { offset, len } => {
                let bytes = &self.data[self.range(offset, u64::from(len))?];
                // In two pieces, as a volume would answer across a chunk boundary.
                let (head, tail) = bytes.split_at(bytes.len() / 2);
                Ok(BlockReply::Data(vec![Buf::copy_from(head), Buf::copy_from(tail)]))
            }
            BlockOp::Write { offset, data, fua } => {
                assert!(data.is_aligned(), "payloads land in aligned buffers");
                let range = self.range(offset, data.len() as u64)?;
                self.data[range].copy_from_slice(&data);
                for block in offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK) {
                    self.allocated[block as usize] = true;
                }
                self.changed(offset, data.len() as u64, fua);
                Ok(BlockReply::Done)
            }
            BlockOp::Flush => {
                for (offset, len) in std::mem::take(&mut self.dirty) {
                    self.persist(offset, len);
                }
                Ok(BlockReply::Done)
            }
            BlockOp::Discard { offset, len } => self.zero(offset, len, false),
            BlockOp::WriteZeroes { offset, len, fua } => self.zero(offset, len, fua),
            BlockOp::CompareAndWrite { .. } => Err(BlockError::Other("NBD has no such command".into())),
            BlockOp::Extents { offset, len } => {
                self.range(offset, len)?;
                let mut extents = Vec::new();
                let mut at = offset;
                while at < offset + len {
                    let end = ((at / BLOCK + 1) * BLOCK).min(offset + len);
                    extents.push(Extent { offset: at, len: end - at, data: self.allocated[(at / BLOCK) as usize] });
                    at = end;
                }
                Ok(BlockReply::Extents(extents))
            }
        }
    }
}

impl BlockDevice for MemDevice {
    fn size(&self) -> u64 {
        self.state.borrow().data.len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let result = self.state.borrow_mut().apply(op);
        match self.answers.get() {
            Answers::AtOnce => done(result),
            Answers::WhenReleased => self.held.borrow_mut().push_back((result, done)),
            Answers::Later => {
                tokio::task::spawn_local(async move { done(result) });
            }
        }
    }
}
