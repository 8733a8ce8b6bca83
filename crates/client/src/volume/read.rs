//! One read at a replica (rules 10 and 11), and the mapped ranges of a chunk.
//!
//! A replica that cannot answer well is remembered with what it said and the next one is asked. When the lease is not
//! known to be alive by the clock, the other current replicas are asked in the same round trip to confirm that our
//! epoch is still the highest; a hole, which no replica holds, is confirmed by every server of the volume.

use super::map::Entry;
use super::ops::Done;
use super::write::{Body, Part, ReadPart};
use super::{Fence, Volume};
use crate::io::Ctx;
use crate::servers::{CallFor, Owner, Packet};
use crate::timers::Timer;
use cairn_env::Buf;
use cairn_env::block::{BlockError, Extent};
use cairn_stdx::checksum::crc64;
use cairn_types::{BLOCK_SIZE, BLOCK_SIZE_U64, ChunkId, ChunkVersion, Duration, Sequence};
use cairn_wire::FrameKind;
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_ZERO};
use std::rc::Rc;

const SOON: Duration = Duration::from_millis(100);

fn is_good(reply: &DataReply, data: &Buf, count: u32) -> bool {
    if reply.block_count != count {
        return false;
    }
    reply.flags & FLAG_ZERO != 0
        || (data.len() == count as usize * BLOCK_SIZE
            && reply.checksums.len() == count as usize
            && data.chunks_exact(BLOCK_SIZE).zip(&reply.checksums).all(|(block, sum)| crc64(block) == *sum))
}

impl Volume {
    fn read_part(&mut self, id: u64) -> Option<(&mut super::write::ReadPart, u64, u32, u32)> {
        match self.parts.get_mut(id) {
            Some(Part { body: Body::Read(read), index, first, count, .. }) => Some((read, *index, *first, *count)),
            _ => None,
        }
    }

    /// What a read was answered or is still to be answered counts no more.
    pub(super) fn take_back_read(&mut self, id: u64) {
        if let Some((read, ..)) = self.read_part(id) {
            read.attempt += 1;
            read.at = None;
            read.data = None;
            read.confirms = 0;
        }
    }

    fn retry_read(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        ctx.io.timers.after(ctx.io.now, SOON, Timer::Part(self.key, id));
    }

    /// The chunk is ready: asks a replica.
    pub(super) fn start_read(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let fresh = ctx.session.is_fresh(ctx.io.now);
        let Some((read, index, first, count)) = self.read_part(id) else { return };
        read.attempt += 1;
        read.data = None;
        read.verified = !fresh;
        read.confirms = 0;
        let attempt = read.attempt;
        let (bad, sources) = (read.bad.clone(), read.sources.clone());
        let chunk = &self.chunks[&index];
        let (entry, hint) = (chunk.entry.clone(), chunk.hint);
        if hint {
            self.refresh(ctx, index);
        }
        let Some(entry) = entry else {
            let zeros = ctx.zeros.slice(0, count as usize * BLOCK_SIZE);
            self.read_zeros(ctx, id, zeros, fresh);
            return;
        };
        let strict = self.parts.get(id).is_some_and(|part| part.internal);
        let Some(slot) = self.choose(ctx, &entry, &bad, &sources, strict) else {
            if strict {
                self.source_lost(ctx, id, &bad);
                return;
            }
            self.read_failed(ctx, id, &entry, &bad);
            return;
        };
        let request = DataRequest {
            op: DataOp::Read,
            flags: 0,
            volume: self.id,
            chunk: entry.chunk,
            version: entry.version,
            epoch: self.epoch,
            sequence: Sequence(0),
            settled: Sequence(self.tracker.settled()),
            first_block: first,
            block_count: count,
            checksums: Vec::new(),
        };
        let owner = Owner::Read { volume: self.key, part: id, slot };
        self.send_data(ctx, slot, &request, owner);
        if let Some((read, ..)) = self.read_part(id) {
            read.at = Some(slot);
        }
        if !fresh {
            let others: Vec<u16> = entry.current().filter(|other| *other != slot).collect();
            self.ask_confirms(ctx, id, attempt, &others);
        }
    }

    fn send_data(&mut self, ctx: &mut Ctx<'_>, slot: u16, request: &DataRequest, owner: Owner) {
        let mut prefix = Vec::with_capacity(64);
        request.encode(&mut prefix);
        let server = self.server_mut(slot);
        server.told = server.told.max(request.settled.0);
        let packet = Packet { kind: FrameKind::Data, prefix, payload: Vec::new() };
        ctx.servers.send(&mut ctx.io, server.number, Rc::new(packet), owner);
    }

    fn ask_confirms(&mut self, ctx: &mut Ctx<'_>, id: u64, attempt: u32, slots: &[u16]) {
        if let Some((read, ..)) = self.read_part(id) {
            read.confirms = slots.len() as u32;
        }
        for slot in slots {
            let request = self.volume_request(DataOp::Confirm);
            let owner = Owner::Confirm { volume: self.key, part: id, slot: *slot, attempt };
            self.send_data(ctx, *slot, &request, owner);
        }
    }

    /// A request about the whole volume.
    pub(super) fn volume_request(&self, op: DataOp) -> DataRequest {
        DataRequest {
            op,
            flags: 0,
            volume: self.id,
            chunk: ChunkId(0),
            version: ChunkVersion(0),
            epoch: self.epoch,
            sequence: Sequence(0),
            settled: Sequence(self.tracker.settled()),
            first_block: 0,
            block_count: 0,
            checksums: Vec::new(),
        }
    }

    pub(super) fn send_volume_request(&mut self, ctx: &mut Ctx<'_>, slot: u16, op: DataOp, owner: Owner) {
        let request = self.volume_request(op);
        self.send_data(ctx, slot, &request, owner);
    }

    /// A hole: no replica holds it, so a cut-off holder asks every server whether its epoch still stands.
    fn read_zeros(&mut self, ctx: &mut Ctx<'_>, id: u64, zeros: Buf, fresh: bool) {
        if fresh {
            self.finish_part(ctx, id, Ok(Some(zeros)));
            return;
        }
        let slots: Vec<u16> = self.all_slots().filter(|slot| self.server(*slot).fence == Fence::Yes).collect();
        if slots.is_empty() {
            self.retry_read(ctx, id);
            return;
        }
        let Some((read, ..)) = self.read_part(id) else { return };
        read.data = Some(zeros);
        let attempt = read.attempt;
        self.ask_confirms(ctx, id, attempt, &slots);
    }

    /// The replica to ask: one with a link, on this host, with little to do; equals take turns. `sources` come first;
    /// with `strict` nobody else will do.
    fn choose(
        &mut self,
        ctx: &Ctx<'_>,
        entry: &Entry,
        bad: &[(u16, DataStatus)],
        sources: &[u16],
        strict: bool,
    ) -> Option<u16> {
        self.read_cursor = self.read_cursor.wrapping_add(1);
        let count = entry.reps.len();
        let mut best: Option<((bool, bool, usize), u16)> = None;
        for turn in 0..count {
            let rep = &entry.reps[(turn + self.read_cursor) % count];
            let candidate = rep.current && !bad.iter().any(|(slot, _)| *slot == rep.slot);
            if !candidate || (strict && !sources.contains(&rep.slot)) {
                continue;
            }
            let number = self.server(rep.slot).number;
            let local = ctx.servers.is_on(number, ctx.config.host);
            let load = ctx.servers.load(number) + if local { 0 } else { 2 };
            let cost = (!sources.contains(&rep.slot) && !sources.is_empty(), !ctx.servers.is_up(number), load);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, rep.slot));
            }
        }
        best.map(|(_, slot)| slot)
    }

    /// No holder of the winning write of a reconciliation can be read: it is judged anew from what is left. A damaged
    /// block is found out, and wins nothing from then on; the rest of that copy may be the only good one. A holder that
    /// is of no use otherwise is taken out first, or it would win again.
    fn source_lost(&mut self, ctx: &mut Ctx<'_>, id: u64, bad: &[(u16, DataStatus)]) {
        let Some((_, index, first, count)) = self.read_part(id) else { return };
        let op = self.parts.get(id).and_then(|part| self.ops.get(&part.op));
        let reconciles = op.is_some_and(|op| matches!(op.done, Done::Reconcile));
        if reconciles && count > 1 && bad.iter().any(|(_, status)| *status == DataStatus::Corrupt) {
            self.split_read(ctx, id);
            return;
        }
        for (slot, status) in bad {
            if reconciles && *status == DataStatus::Corrupt {
                self.rotten.insert((index, *slot, first));
            } else {
                self.fail_copy(ctx, *slot, index);
            }
        }
        self.finish_part(ctx, id, Err(BlockError::Other("the source of a reconciliation is lost".to_owned())));
    }

    /// No replica is left to ask.
    fn read_failed(&mut self, ctx: &mut Ctx<'_>, id: u64, entry: &Entry, bad: &[(u16, DataStatus)]) {
        let Some((_, index, first, count)) = self.read_part(id) else { return };
        let said = |status| bad.iter().filter(|(_, s)| *s == status).count();
        if entry.current().count() == 0 {
            self.retry_read(ctx, id);
        } else if said(DataStatus::NoSuchChunk) == bad.len() {
            // Allocated and never written, if that is the set in force: all current replicas agree that there is
            // nothing, and all were asked at our epoch.
            if self.was_never_created(index) {
                let zeros = ctx.zeros.slice(0, count as usize * BLOCK_SIZE);
                self.finish_part(ctx, id, Ok(Some(zeros)));
                return;
            }
            if let Some((read, ..)) = self.read_part(id) {
                read.bad.clear();
            }
            self.start_part(ctx, id);
        } else if count > 1 && said(DataStatus::Corrupt) > 0 {
            self.split_read(ctx, id);
        } else {
            let block = index * self.chunk_blocks + u64::from(first);
            let detail: Vec<String> =
                bad.iter().map(|(slot, status)| format!("{}: {status:?}", self.server(*slot).cs)).collect();
            let error = BlockError::Damaged { offset: block * BLOCK_SIZE_U64, detail: detail.join(", ") };
            ctx.log(format!("{}: {error}", self.id));
            self.finish_part(ctx, id, Err(error));
        }
    }

    /// Every replica has a damaged block, but perhaps not the same: each half is asked for by itself.
    fn split_read(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let part = self.parts.get_mut(id).expect("the caller read it");
        let (op, index, first, count) = (part.op, part.index, part.first, part.count);
        let half = count / 2;
        part.count = half;
        let Body::Read(read) = &mut part.body else { unreachable!("only reads are split") };
        let (piece, sources) = (read.piece, read.sources.clone());
        *read = ReadPart { attempt: read.attempt, ..ReadPart::new(piece, sources.clone()) };
        let others: Vec<u64> = self.parts.iter().filter(|(_, part)| part.op == op).map(|(id, _)| id).collect();
        for other in others {
            if let Some((read, ..)) = self.read_part(other).filter(|(read, ..)| read.piece > piece) {
                read.piece += 1;
            }
        }
        self.ops.get_mut(&op).expect("a part has an operation").pieces.insert(piece + 1, None);
        self.add_part(ctx, op, (index, first + half, count - half), Body::Read(ReadPart::new(piece + 1, sources)));
        self.start_part(ctx, id);
    }

    /// A server answered a read.
    pub(super) fn on_read(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16, reply: &DataReply, data: Buf) {
        self.note_durable(ctx, slot, reply);
        let Some((read, index, first, count)) = self.read_part(id) else { return };
        if read.at != Some(slot) {
            return;
        }
        read.at = None;
        let status = match reply.status {
            DataStatus::Ok if is_good(reply, &data, count) => {
                let zero = reply.flags & FLAG_ZERO != 0;
                read.data = Some(if zero { ctx.zeros.slice(0, count as usize * BLOCK_SIZE) } else { data });
                self.check_read(ctx, id, slot);
                return;
            }
            // Damaged on the way or by a server that did not notice.
            DataStatus::Ok => DataStatus::Corrupt,
            status => status,
        };
        let Some(entry) = self.chunks[&index].entry.clone() else {
            self.start_part(ctx, id);
            return;
        };
        let detail = ChunkVersion(reply.detail);
        match status {
            DataStatus::StaleEpoch => {
                self.taken_over(ctx);
                return;
            }
            DataStatus::NotFenced => {
                self.server_mut(slot).fence = Fence::No;
                self.chunk(index).ready = false;
            }
            DataStatus::VersionMismatch if detail > entry.version => {
                let chunk = self.chunk(index);
                chunk.fetch = true;
                chunk.ready = false;
            }
            DataStatus::VersionMismatch if detail == entry.version => {
                // The entry was renewed while the read was under way, or the copy is being rebuilt: look again in a
                // moment.
                self.retry_read(ctx, id);
                return;
            }
            DataStatus::VersionMismatch if entry.rep(slot).is_some_and(|rep| detail >= rep.since) => {
                let chunk = self.chunk(index);
                chunk.raise = true;
                chunk.ready = false;
            }
            status => {
                if let Some((read, ..)) = self.read_part(id) {
                    read.bad.push((slot, status));
                }
                match status {
                    DataStatus::Corrupt => ctx.log(format!(
                        "{} returned damaged data: chunk {index} of {}, blocks {first}+{count}",
                        self.server(slot).cs,
                        self.id
                    )),
                    DataStatus::DiskFailed => self.fail_server(ctx, slot),
                    DataStatus::VersionMismatch => self.fail_copy(ctx, slot, index),
                    _ => {}
                }
            }
        }
        self.start_part(ctx, id);
    }

    /// A server answered a confirmation.
    pub(super) fn on_confirmed(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16, attempt: u32, reply: &DataReply) {
        match reply.status {
            DataStatus::Ok => self.note_durable(ctx, slot, reply),
            DataStatus::StaleEpoch => {
                self.taken_over(ctx);
                return;
            }
            DataStatus::NotFenced => {
                self.server_mut(slot).fence = Fence::No;
                self.ask_fence(ctx, slot);
            }
            DataStatus::DiskFailed => self.fail_server(ctx, slot),
            _ => {}
        }
        let Some((read, ..)) = self.read_part(id) else { return };
        if read.attempt != attempt {
            return;
        }
        if reply.status != DataStatus::Ok {
            // The whole read again, when the server may have come to its senses.
            read.attempt += 1;
            read.at = None;
            self.retry_read(ctx, id);
            return;
        }
        read.confirms -= 1;
        self.check_read(ctx, id, slot);
    }

    /// Ends a read that has its data and every confirmation it needs.
    fn check_read(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16) {
        let fresh = ctx.session.is_fresh(ctx.io.now);
        let Some((read, index, first, count)) = self.read_part(id) else { return };
        if read.data.is_none() || read.confirms > 0 {
            return;
        }
        if !read.verified && !fresh {
            // The lease ran out by the clock while the answer was on its way: ask again, verified.
            self.start_part(ctx, id);
            return;
        }
        let data = read.data.take();
        let corrupt = read.bad.iter().any(|(_, status)| *status == DataStatus::Corrupt);
        let repairing = matches!(self.ops.get(&self.parts.get(id).expect("just seen").op), Some(op) if matches!(op.done, super::Done::Repair));
        self.finish_part(ctx, id, Ok(data));
        if corrupt && !repairing {
            self.repair(ctx, index, first, count, slot);
        }
    }

    /// The link to a server broke or it failed: what it was asked to read is asked elsewhere.
    pub(super) fn move_reads(&mut self, ctx: &mut Ctx<'_>, slot: u16) {
        let key = self.key;
        let number = self.server(slot).number;
        let mine = |owner: &Owner| match owner {
            Owner::Read { volume, .. } | Owner::Confirm { volume, .. } => *volume == key,
            Owner::Call { volume, call: CallFor::Extents { .. }, .. } => *volume == key,
            _ => false,
        };
        let mut parts: Vec<u64> = ctx
            .servers
            .take_back(number, mine)
            .into_iter()
            .filter_map(|owner| match owner {
                Owner::Read { part, .. } | Owner::Confirm { part, .. } => Some(part),
                Owner::Call { call: CallFor::Extents { part }, .. } => Some(part),
                _ => None,
            })
            .collect();
        parts.sort_unstable();
        parts.dedup();
        for part in parts {
            self.start_part(ctx, part);
        }
    }

    /// The replica set of a chunk changed: reads waiting for servers that have no link are asked again.
    pub(super) fn restart_reads(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let waits = |part: &Part| match &part.body {
            Body::Read(read) if part.index == index => read.at,
            _ => None,
        };
        let stuck: Vec<(u64, u16)> =
            self.parts.iter().filter_map(|(id, part)| waits(part).map(|slot| (id, slot))).collect();
        for (id, slot) in stuck {
            let (key, number) = (self.key, self.server(slot).number);
            if ctx.servers.is_up(number) {
                continue;
            }
            ctx.servers.cancel(
                number,
                |owner| matches!(owner, Owner::Read { volume, part, .. } if *volume == key && *part == id),
            );
            self.start_part(ctx, id);
        }
    }

    // Extents.

    pub(super) fn start_extents(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(Part { body: Body::Extents { next, tried }, index, first, count, .. }) = self.parts.get(id) else {
            return;
        };
        let (index, next, end, tried) = (*index, *next, *first + *count, tried.clone());
        let Some(entry) = self.chunks[&index].entry.clone() else {
            self.end_extents(ctx, id, Vec::new());
            return;
        };
        let Some(slot) = self.choose(ctx, &entry, &tried, &[], false) else {
            if entry.current().next().is_none() {
                self.retry_read(ctx, id);
                return;
            }
            // Without such a chunk on any of them there is nothing; where they cannot tell, to call it data is true
            // enough.
            let nothing = tried.iter().all(|(_, status)| *status == DataStatus::NoSuchChunk);
            if nothing && !self.was_never_created(index) {
                if let Some(Part { body: Body::Extents { tried, .. }, .. }) = self.parts.get_mut(id) {
                    tried.clear();
                }
                self.start_part(ctx, id);
                return;
            }
            let runs = if nothing { Vec::new() } else { vec![(next, end)] };
            self.end_extents(ctx, id, runs);
            return;
        };
        let request = CsRequest::Extents {
            chunk: entry.chunk,
            volume: self.id,
            epoch: self.epoch,
            version: entry.version,
            first_block: next,
            block_count: end - next,
        };
        self.cs_call(ctx, slot, &request, CallFor::Extents { part: id });
    }

    pub(super) fn on_extents(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16, result: Result<CsReply, CsError>) {
        let Some(Part { body: Body::Extents { next, tried }, index, first, count, .. }) = self.parts.get_mut(id) else {
            return;
        };
        let (index, end) = (*index, *first + *count);
        let base = index * self.chunk_blocks;
        match result {
            Ok(CsReply::Ranges { ranges, next: more }) => {
                let mut runs = Vec::with_capacity(ranges.len());
                for range in ranges.iter().filter(|range| range.mapped && range.first_block < end) {
                    let run_end = range.first_block.saturating_add(range.block_count).min(end);
                    runs.push((range.first_block, run_end));
                }
                match more.filter(|more| *more > *next && *more < end) {
                    Some(more) => {
                        let from = std::mem::replace(next, more);
                        let op = self.parts.get(id).expect("just seen").op;
                        self.push_extents(op, base, from, more, &runs);
                        self.start_part(ctx, id);
                    }
                    None => self.end_extents(ctx, id, runs),
                }
            }
            Err(CsError::StaleEpoch { .. }) => self.taken_over(ctx),
            Err(error) => {
                match error {
                    CsError::VersionMismatch { .. } => {
                        let chunk = self.chunk(index);
                        chunk.fetch = true;
                        chunk.ready = false;
                        self.drive(ctx, index);
                        self.retry_read(ctx, id);
                        return;
                    }
                    CsError::NotFenced(_) => {
                        self.server_mut(slot).fence = Fence::No;
                        self.chunk(index).ready = false;
                    }
                    CsError::NoSuchChunk(_) => tried.push((slot, DataStatus::NoSuchChunk)),
                    _ => tried.push((slot, DataStatus::DiskFailed)),
                }
                self.start_part(ctx, id);
            }
            Ok(_) => {
                tried.push((slot, DataStatus::BadRequest));
                self.start_part(ctx, id);
            }
        }
    }

    fn end_extents(&mut self, ctx: &mut Ctx<'_>, id: u64, runs: Vec<(u32, u32)>) {
        let Some(Part { body: Body::Extents { next, .. }, op, index, first, count, .. }) = self.parts.get(id) else {
            return;
        };
        let (op, from, end, base) = (*op, *next, *first + *count, *index * self.chunk_blocks);
        self.push_extents(op, base, from, end, &runs);
        self.finish_part(ctx, id, Ok(None));
    }

    /// Adds runs of data within `from..end` of a chunk, and the holes between them.
    fn push_extents(&mut self, op: u64, base: u64, from: u32, end: u32, runs: &[(u32, u32)]) {
        let Some(op) = self.ops.get_mut(&op) else { return };
        let extent = |a: u32, b: u32, data| Extent {
            offset: (base + u64::from(a)) * BLOCK_SIZE_U64,
            len: u64::from(b - a) * BLOCK_SIZE_U64,
            data,
        };
        let mut at = from;
        for (first, last) in runs {
            let (first, last) = ((*first).max(at), (*last).min(end));
            if first >= last {
                continue;
            }
            if first > at {
                op.extents.push(extent(at, first, false));
            }
            op.extents.push(extent(first, last, true));
            at = last;
        }
        if at < end {
            op.extents.push(extent(at, end, false));
        }
    }
}
