//! Servers without room.
//!
//! A write that a server has no room for is held until every replica has answered. Then the metadata servers are asked
//! for another place for the copy. Is there one, the write ends in the new set. Is there none, the write waits, or
//! fails where the client was told so. A write that fails after some replicas took it is *undone* first: what a replica
//! that refused it still holds is written to all of them, zeros as holes; that needs no room where the blocks were
//! refused, since it only overwrites what is mapped there. So a failed write leaves equal copies and the old content.
//!
//! The failed write keeps its place among the unsettled ones until then: were it settled before, a holder that takes
//! over in the middle would not see that the replicas differ.

use super::Volume;
use super::ops::{Done, Kind};
use super::write::{At, Body, WritePart};
use crate::config::OnNoSpace;
use crate::io::Ctx;
use cairn_env::Buf;
use cairn_env::block::BlockError;
use cairn_stdx::planted;
use cairn_types::{BLOCK_SIZE, Duration};
use cairn_wire::mds::{MdsError, MdsReply, MdsRequest};

const LATER: Duration = Duration::from_secs(1);

impl Volume {
    /// Goes on with a write for which a server has no room, once all replicas have answered.
    pub(super) fn on_no_space(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(part) = self.parts.get(id) else { return };
        let Body::Write(write) = &part.body else { return };
        let (index, undoing) = (part.index, write.undoing);
        let open = write.targets.iter().any(|target| !matches!(target.at, At::Ok | At::Refused));
        let refused: Vec<u16> = write.targets.iter().filter(|t| t.at == At::Refused).map(|t| t.slot).collect();
        // Copies being made first: those simply go elsewhere.
        let slot = refused.iter().find(|slot| !self.is_current(index, **slot)).or(refused.first()).copied();
        if let Some(slot) = slot.filter(|_| !open && !undoing) {
            self.ask_for_room(ctx, slot, index);
        }
    }

    fn is_current(&self, index: u64, slot: u16) -> bool {
        let entry = self.chunks.get(&index).and_then(|chunk| chunk.entry.as_ref());
        entry.and_then(|entry| entry.rep(slot)).is_some_and(|rep| rep.current)
    }

    /// Asks for another place for the copy in `slot`.
    pub(super) fn ask_for_room(&mut self, ctx: &mut Ctx<'_>, slot: u16, index: u64) {
        if self.is_current(index, slot) && self.no_room_until.is_some_and(|until| ctx.io.now < until) {
            return self.no_room(ctx, index);
        }
        let cs = self.server(slot).cs;
        let chunk = self.chunk(index);
        let Some(entry) = &chunk.entry else { return };
        let name = entry.chunk;
        if std::mem::replace(&mut chunk.room_asked, true) {
            return;
        }
        ctx.log(format!("{cs} has no room for {name}: asking for another place"));
        let request = MdsRequest::ReplicaFull { volume: self.id, epoch: self.epoch, cs, chunk: name };
        ctx.call(request, self.waiter(super::VolumeCall::Full { index }));
    }

    /// The metadata servers decided.
    pub(super) fn on_room(&mut self, ctx: &mut Ctx<'_>, index: u64, result: Result<MdsReply, MdsError>) {
        let Some(chunk) = self.chunks.get_mut(&index) else { return };
        chunk.room_asked = false;
        let before = chunk.entry.as_ref().map(|entry| entry.version);
        match result {
            Ok(MdsReply::Chunks(entries)) => {
                entries.into_iter().for_each(|entry| self.adopt_entry(ctx, entry, false));
                if self.chunk(index).entry.as_ref().map(|entry| entry.version) == before {
                    // A copy is being made, or will be soon.
                    self.retry_refused(ctx, index);
                } else {
                    self.drive(ctx, index);
                }
            }
            Err(MdsError::NoSpace(why)) => {
                ctx.log(format!("no room for {}: {why}", self.id));
                self.no_room_until = Some(ctx.io.now + LATER);
                self.no_room(ctx, index);
            }
            other => {
                ctx.log(format!("no other place for chunk {index} of {}: {other:?}", self.id));
                self.retry_refused(ctx, index);
            }
        }
    }

    /// Writes to a chunk that every replica has answered and some have no room for.
    fn refused(&self, index: u64) -> Vec<u64> {
        let is_refused = |write: &WritePart| {
            !write.undoing
                && write.targets.iter().any(|target| target.at == At::Refused)
                && write.targets.iter().all(|target| matches!(target.at, At::Ok | At::Refused))
        };
        let parts = self.parts.iter().filter(|(_, part)| part.index == index);
        parts.filter(|(_, part)| matches!(&part.body, Body::Write(w) if is_refused(w))).map(|(id, _)| id).collect()
    }

    fn retry_refused(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        for id in self.refused(index) {
            self.retry_soon(ctx, id, LATER);
        }
    }

    /// Nobody has room: writes to the chunk fail or wait.
    fn no_room(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        if ctx.config.on_no_space == OnNoSpace::Wait {
            return self.retry_refused(ctx, index);
        }
        if self.chunk(index).create {
            // It cannot even be made; whoever waits for that has sent nothing yet.
            self.fail_waiting_writes(ctx, index, &BlockError::NoSpace);
        }
        for id in self.refused(index) {
            let Some(part) = self.parts.get_mut(id) else { continue };
            let Body::Write(write) = &mut part.body else { continue };
            let refused = write.targets.iter().find(|target| target.at == At::Refused).map(|target| target.slot);
            let taken = write.targets.iter().any(|target| target.at == At::Ok);
            if let Some(slot) = refused.filter(|_| part.revived && taken) {
                // It was acknowledged, so the copy without it is stale.
                self.fail_copy(ctx, slot, index);
            } else if part.internal || part.revived {
                self.retry_soon(ctx, id, LATER);
            } else if planted!("refused_write_not_taken_back")
                || write.targets.iter().all(|target| target.at == At::Refused)
            {
                // Nobody took it, so all still hold what they held.
                self.end_refused(ctx, id);
            } else {
                self.undo(ctx, id);
            }
        }
    }

    fn end_refused(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(Body::Write(write)) = self.parts.get(id).map(|part| &part.body) else { return };
        let sequence = write.sequence;
        self.tracker.void(sequence);
        self.finish_part(ctx, id, Err(BlockError::NoSpace));
        self.advance(ctx);
    }

    /// Gives those who took a write back what the others still hold. The range lock of the failed write covers it.
    fn undo(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let chunk_blocks = self.chunk_blocks;
        let Some(part) = self.parts.get_mut(id) else { return };
        let (block, count) = (part.index * chunk_blocks + u64::from(part.first), part.count);
        let Body::Write(write) = &mut part.body else { return };
        write.undoing = true;
        let refused = write.targets.iter().filter(|target| target.at == At::Refused);
        let sources = refused.map(|target| target.slot).collect();
        ctx.log(format!("{}: taking back write {} for lack of room", self.id, write.sequence));
        let kind = Kind::Copy { block, count, unmap: false, zeros_as_holes: true, sources };
        self.add_op(ctx, kind, Done::Undo(id), true);
    }

    /// A write was taken back. `acted`: something was written for it.
    pub(super) fn on_undone(&mut self, ctx: &mut Ctx<'_>, id: u64, acted: bool, ok: bool) {
        let Some(part) = self.parts.get_mut(id) else { return };
        let index = part.index;
        let Body::Write(write) = &mut part.body else { return };
        if ok {
            self.end_refused(ctx, id);
        } else if acted {
            self.undo(ctx, id);
        } else {
            // Who held the old content is out of reach. As nothing was taken back yet, the write may still succeed.
            write.undoing = false;
            self.chunk(index).ready = false;
            self.drive(ctx, index);
        }
    }
}

/// Cuts blocks into runs of zeros and runs of data: first block and the data, none for zeros.
pub(super) fn runs(first: u64, pieces: &[Buf]) -> Vec<(u64, u64, Option<Vec<Buf>>)> {
    let mut runs: Vec<(u64, u64, Option<Vec<Buf>>)> = Vec::new();
    let blocks = pieces.iter().flat_map(|piece| (0..piece.len() / BLOCK_SIZE).map(move |at| (piece, at * BLOCK_SIZE)));
    for (number, (piece, at)) in blocks.enumerate() {
        let block = piece.slice(at, BLOCK_SIZE);
        let zero = block.iter().all(|byte| *byte == 0);
        match runs.last_mut() {
            Some((_, count, None)) if zero => *count += 1,
            Some((_, count, Some(data))) if !zero => {
                *count += 1;
                data.push(block);
            }
            _ => runs.push((first + number as u64, 1, (!zero).then(|| vec![block]))),
        }
    }
    runs
}
