//! Flushes and settling (rules 5 and 6).
//!
//! A flush ends when every write acknowledged before it is durable on all its servers, by the marks they report. A
//! server that failed is waited for until its chunks are raised without it; one that restarted until it was sent again
//! what it may have lost.

use super::ops::{Done, Kind};
use super::{Fence, State, Volume};
use crate::config::{UNSETTLED_BYTES_MAX, UNSETTLED_MAX, UNSETTLED_TOTAL_MAX};
use crate::io::Ctx;
use crate::servers::{CallFor, Owner};
use crate::timers::Timer;
use cairn_env::block::BlockReply;
use cairn_stdx::planted;
use cairn_types::{Duration, Sequence};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataStatus};

/// Without traffic for this long everything unsettled is flushed and settled.
const IDLE_AFTER: Duration = Duration::from_secs(1);
const AGAIN_AFTER: Duration = Duration::from_millis(250);
/// A server that flushed while writes were on their way to it is asked again so soon: throttled writes wait for it.
const AGAIN_SOON: Duration = Duration::from_millis(3);

impl Volume {
    /// A flush of our own.
    pub(super) fn add_internal_flush(&mut self, ctx: &mut Ctx<'_>, done: Done) {
        if let Some(error) = self.death() {
            let error = error.clone();
            done.finish(ctx, Err(error));
            return;
        }
        self.add_op(ctx, Kind::Flush { waiting: Vec::new(), upto: 0 }, done, false);
        self.pump(ctx);
    }

    /// Too much is unsettled: flush, once at a time.
    pub(super) fn flush_for_room(&mut self, ctx: &mut Ctx<'_>) {
        if !self.settling {
            self.settling = true;
            self.add_op(ctx, Kind::Flush { waiting: Vec::new(), upto: 0 }, Done::Idle, false);
        }
    }

    pub(super) fn start_flush(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let upto = self.tracker.last();
        let op = self.ops.get_mut(&id).expect("the caller holds it");
        op.kind = Kind::Flush { waiting: Vec::new(), upto };
        self.check_flush(ctx, id);
    }

    /// Asks every server that something acknowledged is not durable on; ends the flush when there is none. What is
    /// being sent again is waited for.
    fn check_flush(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(Kind::Flush { waiting, upto }) = self.ops.get(&id).map(|op| &op.kind) else { return };
        let (slots, revived) = self.tracker.undurable(*upto);
        let by_user = || self.ops.get(&id).is_some_and(|op| matches!(op.done, Done::User(_)));
        if slots.is_empty() || (planted!("flush_ignores_marks") && by_user()) {
            if !revived {
                self.finish_op(ctx, id, Ok(BlockReply::Done));
            }
            return;
        }
        let asked: Vec<u16> = slots.into_iter().filter(|slot| !waiting.contains(slot)).collect();
        let Some(Kind::Flush { waiting, .. }) = self.ops.get_mut(&id).map(|op| &mut op.kind) else { return };
        waiting.extend(&asked);
        for slot in asked {
            self.send_flush(ctx, id, slot);
        }
    }

    fn send_flush(&mut self, ctx: &mut Ctx<'_>, op: u64, slot: u16) {
        let owner = Owner::Flush { volume: self.key, op, slot };
        self.send_volume_request(ctx, slot, DataOp::Flush, owner);
    }

    /// A server answered a flush.
    pub(super) fn on_flushed(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16, reply: &DataReply) {
        self.note_durable(ctx, slot, reply);
        match reply.status {
            DataStatus::Ok => {}
            DataStatus::StaleEpoch => return self.taken_over(ctx),
            DataStatus::NotFenced => {
                self.server_mut(slot).fence = Fence::No;
                self.ask_fence(ctx, slot);
            }
            DataStatus::DiskFailed => self.fail_server(ctx, slot),
            _ => {}
        }
        let Some(Kind::Flush { waiting, upto }) = self.ops.get_mut(&id).map(|op| &mut op.kind) else { return };
        if self.tracker.undurable(*upto).0.contains(&slot) {
            // It could not, or what it lacks is still on the way to it: it stays among those waited for until the
            // timer, so that nothing else asks it at once.
            let after = if reply.status == DataStatus::Ok { AGAIN_SOON } else { AGAIN_AFTER };
            ctx.io.timers.after(ctx.io.now, after, Timer::Flush(self.key, id, slot));
            return;
        }
        waiting.retain(|other| *other != slot);
        self.check_flush(ctx, id);
    }

    /// Time to ask one server again.
    pub(crate) fn on_flush_timer(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16) {
        let Some(Kind::Flush { waiting, .. }) = self.ops.get_mut(&id).map(|op| &mut op.kind) else { return };
        waiting.retain(|other| *other != slot);
        self.check_flush(ctx, id);
        self.pump(ctx);
    }

    fn flush_ops(&self) -> Vec<u64> {
        let mut ids: Vec<u64> =
            self.ops.iter().filter(|(_, op)| matches!(op.kind, Kind::Flush { .. })).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Something changed that flushes wait for. With `lost`, what was asked of that server was thrown away.
    pub(super) fn recheck_flushes(&mut self, ctx: &mut Ctx<'_>, lost: Option<u16>) {
        for id in self.flush_ops() {
            if let Some(Kind::Flush { waiting, .. }) = self.ops.get_mut(&id).map(|op| &mut op.kind) {
                waiting.retain(|slot| Some(*slot) != lost);
            }
            self.check_flush(ctx, id);
        }
    }

    // How much may be unsettled.

    /// True when more writes may be taken.
    pub(super) fn has_room(&self) -> bool {
        let (count, bytes) = self.tracker.load();
        count < UNSETTLED_MAX && bytes < UNSETTLED_BYTES_MAX && self.budget.get() < UNSETTLED_TOTAL_MAX
    }

    /// True when it is time to settle.
    pub(super) fn is_filling(&self) -> bool {
        let (count, bytes) = self.tracker.load();
        count >= UNSETTLED_MAX / 2 || bytes >= UNSETTLED_BYTES_MAX / 2 || self.budget.get() >= UNSETTLED_TOTAL_MAX / 2
    }

    /// Brings the sum over all volumes up to date.
    pub(super) fn tell_load(&mut self) {
        let bytes = self.tracker.load().1;
        self.budget.set(self.budget.get() - self.budgeted + bytes);
        self.budgeted = bytes;
    }

    /// Upkeep of a volume without traffic.
    pub(super) fn settle_if_idle(&mut self, ctx: &mut Ctx<'_>) {
        if self.state != State::Open || ctx.io.now.saturating_since(self.last_traffic) < IDLE_AFTER {
            return;
        }
        if self.tracker.load().0 > 0 {
            self.flush_for_room(ctx);
        } else {
            self.send_settled(ctx);
        }
    }

    /// True when a server holds a tail that could be dropped.
    pub(super) fn has_marks_to_tell(&self) -> bool {
        self.all_slots().any(|slot| self.mark_to_tell(slot))
    }

    fn mark_to_tell(&self, slot: u16) -> bool {
        let server = self.server(slot);
        let settled = self.tracker.settled();
        let held = self.tracker.sent_to(slot).max(if server.tail > 0 { self.opening_sequence } else { 0 });
        server.fence == Fence::Yes && !server.excused && settled > server.told && server.told < held
    }

    /// Tells the settled mark to every server that holds a tail.
    pub(super) fn send_settled(&mut self, ctx: &mut Ctx<'_>) {
        let settled = self.tracker.settled();
        for slot in self.all_slots() {
            if self.mark_to_tell(slot) {
                self.server_mut(slot).told = settled;
                self.settles_unanswered += 1;
                let request = CsRequest::Settle { volume: self.id, epoch: self.epoch, settled: Sequence(settled) };
                self.cs_call(ctx, slot, &request, CallFor::Settle);
            }
        }
    }

    pub(super) fn on_settled(&mut self, ctx: &mut Ctx<'_>, result: Result<CsReply, CsError>) {
        self.settles_unanswered = self.settles_unanswered.saturating_sub(1);
        if let Err(CsError::StaleEpoch { .. }) = result {
            self.taken_over(ctx);
        }
    }
}
