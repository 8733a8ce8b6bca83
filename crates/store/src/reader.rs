//! Reads a list of slots with few device requests: neighbours are joined, a bounded number is in flight.

use crate::layout::{SLOT, SLOT_U64};
use cairn_env::{Buf, DiskError, DiskOp, DiskRequest, IoId};
use cairn_stdx::FixedMap;

const READ_SLOTS_MAX: usize = 64;
const READS_IN_FLIGHT_MAX: usize = 16;

#[derive(Default)]
pub(crate) struct Reader {
    slots: Vec<u64>,
    pages: Vec<Option<Buf>>,
    next: usize,
    in_flight: FixedMap<u64, (usize, usize)>,
    /// The first device error, if any; the slots concerned are missing from the result.
    pub error: Option<DiskError>,
}

impl Reader {
    /// Slots in the order the result should have.
    pub(crate) fn new(slots: Vec<u64>) -> Self {
        let pages = vec![None; slots.len()];
        Self { slots, pages, ..Self::default() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next == self.slots.len() && self.in_flight.is_empty()
    }

    pub(crate) fn issue(&mut self, next_io: &mut u64, out: &mut Vec<DiskRequest>) {
        while self.next < self.slots.len() && self.in_flight.len() < READS_IN_FLIGHT_MAX {
            let start = self.next;
            let first = self.slots[start];
            let run = self.slots[start..].iter().zip(first..).take(READ_SLOTS_MAX).take_while(|(a, b)| *a == b);
            let count = run.count();
            self.next += count;
            self.in_flight.insert(*next_io, (start, count));
            let op = DiskOp::Read { offset: first * SLOT_U64, len: (count * SLOT) as u32 };
            out.push(DiskRequest { io: IoId(*next_io), op });
            *next_io += 1;
        }
    }

    pub(crate) fn done(&mut self, io: IoId, result: Result<Buf, DiskError>) {
        let Some((start, count)) = self.in_flight.remove(&io.0) else { return };
        match result {
            Ok(buf) if buf.len() == count * SLOT => {
                for i in 0..count {
                    self.pages[start + i] = Some(buf.slice(i * SLOT, SLOT));
                }
            }
            Ok(_) => {}
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// The slots and what was read of each.
    pub(crate) fn finish(self) -> impl Iterator<Item = (u64, Option<Buf>)> {
        self.slots.into_iter().zip(self.pages)
    }
}
