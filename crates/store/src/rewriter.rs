//! Writes slots again as they were read: neighbours are joined, a bounded number is in flight.

use crate::layout::SLOT_U64;
use cairn_env::{Buf, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use std::collections::{BTreeSet, VecDeque};

const WRITE_SLOTS_MAX: usize = 64;
const WRITES_IN_FLIGHT_MAX: usize = 16;

#[derive(Default)]
pub(crate) struct Rewriter {
    slots: VecDeque<(u64, Buf)>,
    in_flight: BTreeSet<u64>,
    /// The first device error, if any.
    pub error: Option<DiskError>,
}

impl Rewriter {
    /// Slots with their content.
    pub(crate) fn new(slots: VecDeque<(u64, Buf)>) -> Self {
        Self { slots, ..Self::default() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.slots.is_empty() && self.in_flight.is_empty()
    }

    pub(crate) fn issue(&mut self, next_io: &mut u64, out: &mut Vec<DiskRequest>) {
        while self.in_flight.len() < WRITES_IN_FLIGHT_MAX
            && let Some((first, page)) = self.slots.pop_front()
        {
            let mut bufs = vec![page];
            while bufs.len() < WRITE_SLOTS_MAX
                && self.slots.front().is_some_and(|(slot, _)| *slot == first + bufs.len() as u64)
            {
                bufs.extend(self.slots.pop_front().map(|(_, page)| page));
            }
            self.in_flight.insert(*next_io);
            out.push(DiskRequest { io: IoId(*next_io), op: DiskOp::Write { offset: first * SLOT_U64, bufs } });
            *next_io += 1;
        }
    }

    /// Takes an answer, unless it belongs to something else.
    pub(crate) fn done(&mut self, done: &DiskDone) {
        if self.in_flight.remove(&done.io.0)
            && let Err(error) = &done.result
        {
            self.error = self.error.take().or_else(|| Some(error.clone()));
        }
    }
}
