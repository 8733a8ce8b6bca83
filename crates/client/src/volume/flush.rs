//! Flushes and settling (rules 5 and 6).
//!
//! A flush asks every server that holds unsettled writes and is not known to be clean, and ends when all have answered.
//! A server that failed is waited for until its chunks are raised without it; one that restarted until it is
//! reconciled, since what it would flush after the restart is not what it had acknowledged before.

use super::ops::{Done, Kind};
use super::tracker::Tracker;
use super::{Fence, State, Volume};
use crate::config::{UNSETTLED_BYTES_MAX, UNSETTLED_MAX};
use crate::io::Ctx;
use crate::servers::{CallFor, Owner};
use crate::timers::Timer;
use cairn_env::block::{BlockError, BlockReply};
use cairn_types::{Duration, Sequence};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataStatus};

/// Without traffic for this long everything unsettled is flushed and settled.
const IDLE_AFTER: Duration = Duration::from_secs(1);
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// True when throttled writes may go on.
pub(super) fn has_room(tracker: &Tracker) -> bool {
    let (count, bytes) = tracker.load();
    count < UNSETTLED_MAX && bytes < UNSETTLED_BYTES_MAX
}

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
        let last = self.tracker.last();
        let forced = self.ops[&id].internal;
        let asked: Vec<u16> = self
            .all_slots()
            .filter(|slot| {
                let server = self.server(*slot);
                (!self.tracker.is_clean(*slot) && self.tracker.needs(*slot, last))
                    || (forced && server.fence == Fence::Yes && !server.excused && server.tail > 0)
            })
            .collect();
        let op = self.ops.get_mut(&id).expect("the caller holds it");
        if asked.is_empty() {
            self.finish_op(ctx, id, Ok(BlockReply::Done));
            return;
        }
        op.kind = Kind::Flush { waiting: asked.clone(), upto: last };
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
            DataStatus::Ok if self.tracker.is_frozen(slot) && !self.ops.get(&id).is_some_and(|op| op.internal) => {}
            DataStatus::Ok => self.flushed(ctx, id, slot),
            DataStatus::StaleEpoch => self.die(ctx, BlockError::Fenced),
            status => {
                match status {
                    DataStatus::NotFenced => {
                        self.server_mut(slot).fence = Fence::No;
                        self.ask_fence(ctx, slot);
                    }
                    DataStatus::DiskFailed => self.fail_server(ctx, slot),
                    _ => {}
                }
                ctx.io.timers.after(ctx.io.now, AGAIN_AFTER, Timer::Flush(self.key, id));
            }
        }
    }

    fn flushed(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        let Kind::Flush { waiting, .. } = &mut op.kind else { return };
        waiting.retain(|other| *other != slot);
        if waiting.is_empty() {
            self.finish_op(ctx, id, Ok(BlockReply::Done));
        }
    }

    /// Time to ask again.
    pub(crate) fn on_flush_timer(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(Kind::Flush { waiting, .. }) = self.ops.get(&id).map(|op| &op.kind) else { return };
        for slot in waiting.clone() {
            let (key, number) = (self.key, self.server(slot).number);
            ctx.servers.cancel(number, |o| matches!(o, Owner::Flush { volume, op, .. } if *volume == key && *op == id));
            self.send_flush(ctx, id, slot);
        }
        self.pump(ctx);
    }

    fn flush_ops(&self) -> Vec<u64> {
        let mut ids: Vec<u64> =
            self.ops.iter().filter(|(_, op)| matches!(op.kind, Kind::Flush { .. })).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Servers that failed may be needed by no unsettled write any more: flushes go on without them. Those still needed
    /// are asked again when `resend` names them.
    pub(super) fn recheck_flushes(&mut self, ctx: &mut Ctx<'_>, resend: Option<u16>) {
        for id in self.flush_ops() {
            let Some(Kind::Flush { waiting, upto }) = self.ops.get(&id).map(|op| &op.kind) else { continue };
            let (waiting, upto) = (waiting.clone(), *upto);
            for slot in waiting {
                if self.server(slot).excused && !self.tracker.needs(slot, upto) {
                    self.flushed(ctx, id, slot);
                } else if resend == Some(slot) {
                    self.send_flush(ctx, id, slot);
                }
            }
        }
    }

    /// Flushes wait for the reconciliation of a restarted server and ask it afterwards.
    pub(super) fn hold_flushes(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        let (key, number) = (self.key, self.server(slot).number);
        ctx.servers.cancel(number, |owner| matches!(owner, Owner::Flush { volume, .. } if *volume == key));
    }

    /// The flush of a reconciliation that will be followed by another does not wait for the server that restarted.
    pub(super) fn skip_internal_flush(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        for id in self.flush_ops() {
            if self.ops.get(&id).is_some_and(|op| op.internal) {
                self.flushed(ctx, id, slot);
            }
        }
    }

    /// Upkeep of a volume without traffic.
    pub(super) fn settle_if_idle(&mut self, ctx: &mut Ctx<'_>) {
        if self.state != State::Open || self.paused || ctx.io.now.saturating_since(self.last_traffic) < IDLE_AFTER {
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
            self.die(ctx, BlockError::Fenced);
        }
    }
}
