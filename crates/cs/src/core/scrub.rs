//! The scrub: verifies every copy in the background, slowly, and steps back while clients are busy.

use super::{BUSY_DEPTH, CsCore, Pending};
use cairn_store::{REQUEST_BLOCKS_MAX, StoreError, StoreReply, StoreRequest};
use cairn_types::{ChunkId, Duration, Instant};
use cairn_wire::{Effects, Now};

/// Pause after a step that was due while clients were busy.
const YIELD: Duration = Duration::from_millis(100);
/// A step is put off at most so often, then done whatever the load: a busy server is scrubbed too.
const YIELDS_MAX: u32 = 20;
/// Pause when there is nothing to verify.
const IDLE: Duration = Duration::from_secs(60);

/// Where the scrub stands.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    next_at: Option<Instant>,
    /// The copy under the scrub and the next block of it.
    at: Option<(ChunkId, u32)>,
    /// Copies left in this round, in reverse.
    round: Vec<ChunkId>,
    running: bool,
    yields: u32,
    /// Rounds completed since start.
    rounds: u64,
}

impl Scrub {
    pub(super) fn begin(&mut self, now: Now) {
        self.next_at = Some(now.mono + IDLE);
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.next_at.filter(|_| !self.running)
    }
}

impl CsCore {
    /// Rounds of the scrub completed since start.
    pub fn scrub_rounds(&self) -> u64 {
        self.scrub.rounds
    }

    /// The cluster says how fast to verify.
    pub(super) fn set_scrub_rate(&mut self, now: Now, chunks_per_minute: u32) {
        let before = std::mem::replace(&mut self.config.scrub_chunks_per_minute, chunks_per_minute);
        if before == 0 && chunks_per_minute > 0 && !self.scrub.running {
            self.scrub.begin(now);
        }
    }

    pub(super) fn scrub_turn(&mut self, now: Now) {
        let rate = self.config.scrub_chunks_per_minute;
        if rate == 0 || self.failed.is_some() {
            self.scrub.next_at = None;
            return;
        }
        if self.scrub.running || self.scrub.next_at.is_none_or(|at| now.mono < at) {
            return;
        }
        if self.client_depth > BUSY_DEPTH && self.scrub.yields < YIELDS_MAX {
            self.scrub.yields += 1;
            self.scrub.next_at = Some(now.mono + YIELD);
            return;
        }
        self.scrub.yields = 0;
        let Some((chunk, from_block)) = self.scrub_position() else {
            self.scrub.next_at = Some(now.mono + IDLE);
            return;
        };
        let block_count = self.store.chunk(chunk).map_or(1, |info| info.block_count);
        let steps = u64::from(block_count.div_ceil(REQUEST_BLOCKS_MAX)) * u64::from(rate);
        self.scrub.next_at = Some(now.mono + Duration::from_nanos(60_000_000_000 / steps.max(1)));
        self.scrub.running = true;
        let request = StoreRequest::Verify { chunk, from_block, limit: REQUEST_BLOCKS_MAX };
        self.submit(now, Pending::Verify { chunk }, request);
    }

    /// The next blocks to verify, on a copy that still exists.
    fn scrub_position(&mut self) -> Option<(ChunkId, u32)> {
        if let Some((chunk, block)) = self.scrub.at.filter(|(chunk, _)| self.store.chunk(*chunk).is_some()) {
            return Some((chunk, block));
        }
        self.scrub.at = None;
        loop {
            if let Some(chunk) = self.scrub.round.pop() {
                if self.store.chunk(chunk).is_some_and(|info| info.mapped_blocks > 0) {
                    self.scrub.at = Some((chunk, 0));
                    return self.scrub.at;
                }
                if !self.scrub.round.is_empty() {
                    continue;
                }
                return None;
            }
            self.scrub.round = self.store.chunks().map(|(chunk, _)| chunk).collect();
            self.scrub.round.sort_unstable_by(|a, b| b.cmp(a));
            self.scrub.rounds += 1;
            if self.scrub.round.is_empty() {
                return None;
            }
        }
    }

    pub(super) fn on_verified(&mut self, chunk: ChunkId, result: Result<StoreReply, StoreError>, out: &mut Effects) {
        self.scrub.running = false;
        match result {
            Ok(StoreReply::Verified { bad, next }) => {
                self.scrub.at = next.map(|next| (chunk, next));
                if let Some(first) = bad.first() {
                    self.note_damaged(chunk, *first, out);
                }
            }
            Ok(other) => panic!("the store answers a verification with {other:?}"),
            Err(StoreError::Io(error)) => {
                out.log.push(format!("the scrub cannot read {chunk}: {error}"));
                self.note_damaged(chunk, self.scrub.at.map_or(0, |at| at.1), out);
                self.scrub.at = None;
            }
            Err(_) => self.scrub.at = None,
        }
    }
}
