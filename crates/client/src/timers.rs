//! Deadlines of the core: one heap, one wake-up asked of the shell at a time.

use cairn_types::{Duration, Instant};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What to look at when its time has come. Every timer is a hint: who is woken looks at its own state first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Timer {
    /// The session with the metadata servers.
    Session,
    /// The link to a chunk server.
    Server(u32),
    /// Upkeep of a volume: idle settling, lazy release.
    Volume(u64),
    /// Ask for the lease again.
    Acquire(u64),
    /// Try a chunk again.
    Chunk(u64, u64),
    /// Try a part of an operation again.
    Part(u64, u64),
    /// Ask for the entry of a chunk below its minimum again.
    Minimum(u64, u64),
    /// Send the requests of a flush again.
    Flush(u64, u64, u16),
    /// Begin a reconciliation again.
    Reconcile(u64),
    /// Look for leases to give back.
    Idle,
    /// Shutting down has taken long enough.
    Shutdown,
}

/// The heap.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u64, Timer)>>,
    count: u64,
    asked: Option<Instant>,
}

impl Timers {
    /// Fires `timer` once, `after` from `now`.
    pub(crate) fn after(&mut self, now: Instant, after: Duration, timer: Timer) {
        self.count += 1;
        self.heap.push(Reverse((now + after, self.count, timer)));
    }

    /// The next timer that is due.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Timer> {
        if self.heap.peek()?.0.0 > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, _, timer))| timer)
    }

    /// The shell has woken us: whatever was asked for has been given.
    pub(crate) fn woken(&mut self) {
        self.asked = None;
    }

    /// When to be woken, if that is news to the shell.
    pub(crate) fn wish(&mut self) -> Option<Instant> {
        let at = self.heap.peek()?.0.0;
        if self.asked.is_some_and(|asked| asked <= at) {
            return None;
        }
        self.asked = Some(at);
        Some(at)
    }
}
