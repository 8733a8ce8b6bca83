//! Servers and copies that fail (rule 3).
//!
//! A failed server is taken out of every replica set of the volume by one call to the metadata servers. What the answer
//! changes is raised on the remaining replicas; then writes under way count the new sets. Where the server held the
//! last current copy nothing changes, and its requests wait for its return.

use super::{Fence, Volume, VolumeCall};
use crate::io::Ctx;
use crate::servers::{CallFor, Owner, ServerEvent};
use cairn_stdx::planted;
use cairn_types::Duration;
use cairn_wire::mds::{MdsError, MdsReply, MdsRequest};
use std::collections::BTreeSet;

const LATER: Duration = Duration::from_secs(1);

impl Volume {
    fn slot_by_number(&self, number: u32) -> Option<u16> {
        self.servers.iter().position(|server| server.number == number).map(|slot| slot as u16)
    }

    /// News of a server.
    pub(crate) fn on_server(&mut self, ctx: &mut Ctx<'_>, event: ServerEvent) {
        let (ServerEvent::Lost(number) | ServerEvent::Up(number, _) | ServerEvent::Unreachable(number)) = event;
        let Some(slot) = self.slot_by_number(number) else { return };
        if self.death().is_some() {
            return;
        }
        match event {
            ServerEvent::Lost(_) => self.move_reads(ctx, slot),
            ServerEvent::Up(_, boot) => {
                let server = self.server_mut(slot);
                server.spared_until = None;
                if std::mem::take(&mut server.fail_again) && server.fence == Fence::No {
                    // It failed while it was asked to fence, and chunks may wait for that.
                    self.ask_fence(ctx, slot);
                }
                let server = self.server_mut(slot);
                if server.fence == Fence::Yes {
                    server.excused = false;
                    if std::mem::replace(&mut server.boot, boot) != boot {
                        self.on_restarted(ctx, slot);
                    }
                }
            }
            ServerEvent::Unreachable(_) => self.on_unreachable(ctx, slot),
        }
        self.pump(ctx);
    }

    /// The server runs anew: what it had not flushed may be gone, so every unsettled write it had is sent to it again
    /// (rule 7).
    pub(super) fn on_restarted(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        // It may have forgotten the settled mark, which is no loss but work for the next holder: tell it again.
        self.server_mut(slot).told = 0;
        self.tracker.restarted(slot);
        let mut chunks = self.forget_answers(slot);
        if planted!("restart_not_sent_again") {
            // The mistake: what the other replicas have is taken for enough.
            self.chunks.keys().for_each(|index| self.tracker.retarget(*index, |other| other != slot));
        }
        let kept = self.tracker.kept_on(slot);
        if !kept.is_empty() {
            let cs = self.server(slot).cs;
            ctx.log(format!("{cs} restarted: {} unsettled writes of {} are sent to it again", kept.len(), self.id));
        }
        chunks.append(&mut self.revive(kept, Some(slot)));
        // What it was asked to read before it died it would answer from what the power cut left.
        self.move_reads(ctx, slot);
        chunks.sort_unstable();
        chunks.dedup();
        for index in chunks {
            self.drive(ctx, index);
        }
        self.abort_reconcile(ctx);
    }

    fn on_unreachable(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        let (key, number) = (self.key, self.server(slot).number);
        let mine: Vec<Owner> = ctx.servers.owners(number).into_iter().filter(|o| o.place().0 == key).collect();
        self.give_up_settles(ctx, slot);
        let needed = mine.iter().any(|owner| match owner {
            Owner::Write { .. } | Owner::Flush { .. } | Owner::Confirm { .. } => true,
            Owner::Call { call, .. } => matches!(call, CallFor::Fence | CallFor::Prepare { .. } | CallFor::Tail),
            Owner::Read { .. } | Owner::Nobody => false,
        });
        if needed {
            self.fail_server(ctx, slot);
        } else {
            // Perhaps the copies are elsewhere by now.
            for owner in mine {
                if let Owner::Read { part, .. } = owner
                    && let Some(index) = self.parts.get(part).map(|part| part.index)
                {
                    self.refresh(ctx, index);
                }
            }
            self.move_reads(ctx, slot);
        }
    }

    /// A settled mark that does not arrive is no loss: the next holder settles what is left.
    fn give_up_settles(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        let (key, number) = (self.key, self.server(slot).number);
        let settles =
            |owner: &Owner| matches!(owner, Owner::Call { volume, call: CallFor::Settle, .. } if *volume == key);
        let given_up = ctx.servers.take_back(number, settles).len() as u32;
        self.settles_unanswered = self.settles_unanswered.checked_sub(given_up).expect("each settle is counted");
    }

    /// Takes a server out of all replica sets of the volume.
    pub(super) fn fail_server(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        if self.server(slot).failing {
            return;
        }
        if self.server(slot).spared_until.is_some_and(|until| ctx.io.now < until) {
            // It holds the last copy of something, said the metadata servers just now: they are not asked at once
            // again.
            self.server_mut(slot).fail_again = true;
            return;
        }
        let server = self.server_mut(slot);
        server.failing = true;
        let cs = server.cs;
        ctx.log(format!("{cs} failed for {}: asking to go on without it", self.id));
        let request = MdsRequest::ReplicaFailed { volume: self.id, epoch: self.epoch, cs, chunks: Vec::new() };
        ctx.call(request, self.waiter(VolumeCall::Failed { slot, index: None }));
    }

    /// Time to ask once more about servers that failed and were still needed.
    pub(super) fn fail_spared(&mut self, ctx: &mut Ctx<'_>) {
        for slot in self.all_slots() {
            let server = self.server_mut(slot);
            if server.fail_again && server.spared_until.is_none_or(|until| ctx.io.now >= until) {
                server.fail_again = false;
                self.fail_server(ctx, slot);
            }
        }
    }

    /// Takes one copy out: it is stale, lost or damaged.
    pub(super) fn fail_copy(&mut self, ctx: &mut Ctx<'_>, slot: u16, index: u64) {
        let cs = self.server(slot).cs;
        let chunk = self.chunk(index);
        let Some(entry) = &chunk.entry else { return };
        let name = entry.chunk;
        chunk.ready = false;
        if chunk.failing {
            return;
        }
        chunk.failing = true;
        ctx.log(format!("the copy of {name} on {cs} is of no use: asking to go on without it"));
        let request = MdsRequest::ReplicaFailed { volume: self.id, epoch: self.epoch, cs, chunks: vec![name] };
        ctx.call(request, self.waiter(VolumeCall::Failed { slot, index: Some(index) }));
    }

    /// The metadata servers decided.
    pub(super) fn on_failed(
        &mut self,
        ctx: &mut Ctx<'_>,
        slot: u16,
        index: Option<u64>,
        result: Result<MdsReply, MdsError>,
    ) {
        let entries = match result {
            Ok(MdsReply::Chunks(entries)) => entries,
            other => {
                ctx.log(format!("{} stays in the replica sets of {}: {other:?}", self.server(slot).cs, self.id));
                match index {
                    Some(index) => {
                        let chunk = self.chunk(index);
                        chunk.failing = false;
                        chunk.fetch = true;
                        self.delay_chunk(ctx, index, LATER);
                    }
                    None => self.server_mut(slot).failing = false,
                }
                return;
            }
        };
        // The answer names every chunk asked about, changed or not: only another version is news.
        let (mut changed, mut told) = (Vec::new(), BTreeSet::new());
        for entry in entries {
            let Some(chunk) = self.chunks.get(&entry.index) else { continue };
            told.insert(entry.index);
            if chunk.entry.as_ref().is_none_or(|known| known.version < entry.version) {
                changed.push(entry.index);
                self.adopt_entry(ctx, entry, false);
            }
        }
        if index.is_none() {
            // An answer holds only so many entries; what did not fit is fetched where it matters now.
            for (index, chunk) in &mut self.chunks {
                let stands = chunk.entry.as_ref().is_some_and(|entry| entry.rep(slot).is_some());
                if stands && !told.contains(index) && (chunk.active > 0 || chunk.unsettled > 0) {
                    chunk.fetch = true;
                    changed.push(*index);
                }
            }
        }
        match index {
            Some(index) => {
                let chunk = self.chunk(index);
                chunk.failing = false;
                if changed.contains(&index) {
                    self.drive(ctx, index);
                } else {
                    // The last current copy stays where it is; perhaps the map has moved on otherwise.
                    chunk.fetch = true;
                    self.delay_chunk(ctx, index, LATER);
                }
            }
            None => self.go_on_without(ctx, slot, changed),
        }
    }

    fn go_on_without(&mut self, ctx: &mut Ctx<'_>, slot: u16, mut touched: Vec<u64>) {
        let key = self.key;
        self.give_up_settles(ctx, slot);
        let until = ctx.io.now + LATER;
        let server = self.server_mut(slot);
        server.failing = false;
        server.spared_until = Some(until);
        server.excused = true;
        if server.fence == Fence::Asked {
            server.fence = Fence::No;
        }
        let number = server.number;
        touched.append(&mut std::mem::take(&mut server.chunks));
        // Reads move last: where this server keeps the only copy they go to it again, and must not be cancelled with
        // the rest.
        ctx.servers.cancel(number, |owner| owner.place().0 == key && !owner.reads());
        self.move_reads(ctx, slot);
        touched.append(&mut self.unsend(slot));
        touched.append(&mut self.restart_preparations());
        touched.sort_unstable();
        touched.dedup();
        self.forget_tail(ctx, slot);
        for index in touched {
            self.drive(ctx, index);
        }
        // Where the server stays in a set it is used again as soon as it is back.
        self.recheck_flushes(ctx, Some(slot));
        self.check_fenced(ctx);
    }
}
