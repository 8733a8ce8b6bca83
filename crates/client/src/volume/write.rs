//! One write or unmap at its replicas (rule 3), and the start of every kind of part.

use super::Volume;
use super::map::Entry;
use crate::io::Ctx;
use crate::servers::{Owner, Packet};
use crate::timers::Timer;
use cairn_env::Buf;
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_types::{BLOCK_SIZE, ChunkVersion, Duration, Instant, Sequence};
use cairn_wire::FrameKind;
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_DURABLE};
use std::rc::Rc;

const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(1);
/// A replica being rebuilt may take so long to begin before it is given up.
const REBUILD_BEGINS_WITHIN: Duration = Duration::from_secs(3);

/// A piece of an operation: within one chunk.
pub(super) struct Part {
    pub op: u64,
    pub index: u64,
    pub first: u32,
    pub count: u32,
    pub internal: bool,
    /// A write acknowledged before that is sent again; no operation waits for it.
    pub revived: bool,
    pub body: Body,
}

pub(super) enum Body {
    Read(ReadPart),
    Write(Box<WritePart>),
    /// Where to go on, and the replicas that could not tell with what they said.
    Extents {
        next: u32,
        tried: Vec<(u16, DataStatus)>,
    },
}

/// See [`super::read`].
pub(super) struct ReadPart {
    pub piece: usize,
    /// Replicas to prefer.
    pub sources: Vec<u16>,
    /// Replicas that cannot answer, and what they said.
    pub bad: Vec<(u16, DataStatus)>,
    pub attempt: u32,
    pub at: Option<u16>,
    pub data: Option<Buf>,
    pub confirms: u32,
    pub verified: bool,
}

impl ReadPart {
    pub(super) fn new(piece: usize, sources: Vec<u16>) -> Self {
        Self { piece, sources, bad: Vec::new(), attempt: 0, at: None, data: None, confirms: 0, verified: false }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum At {
    /// To be sent (again) when the chunk is ready.
    Unsent,
    Sent,
    /// The server has no such chunk.
    Missing,
    /// The server has no room for it.
    Refused,
    Ok,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub slot: u16,
    pub at: At,
    /// Version in which it was last sent: a server that joined the set later has lost what it had before.
    version: ChunkVersion,
}

impl Target {
    fn unsent(slot: u16) -> Self {
        Self { slot, at: At::Unsent, version: ChunkVersion(0) }
    }
}

pub(super) struct WritePart {
    pub unmap: bool,
    fua: bool,
    data: Vec<Buf>,
    checksums: Vec<u64>,
    /// Zero until first sent.
    pub sequence: u64,
    packet: Option<(ChunkVersion, Rc<Packet>)>,
    pub targets: Vec<Target>,
    /// Nobody has room for it: those who took it are being given back what they had.
    pub undoing: bool,
    refused_since: Option<Instant>,
    timer: bool,
    /// Every target has it, but the chunk is below its minimum.
    parked: bool,
}

impl WritePart {
    pub(super) fn data(data: Vec<Buf>, fua: bool) -> Self {
        let checksums = data.iter().flat_map(|buf| buf.chunks_exact(BLOCK_SIZE).map(crc64)).collect();
        Self { data, checksums, ..Self::unmap(fua) }.mapped()
    }

    pub(super) fn unmap(fua: bool) -> Self {
        Self {
            unmap: true,
            fua,
            data: Vec::new(),
            checksums: Vec::new(),
            sequence: 0,
            packet: None,
            targets: Vec::new(),
            undoing: false,
            refused_since: None,
            timer: false,
            parked: false,
        }
    }

    /// How far it is, for people.
    pub(super) fn explain(&self) -> String {
        let targets: Vec<String> =
            self.targets.iter().map(|t| format!("slot {} {:?} at {}", t.slot, t.at, t.version)).collect();
        let parked = if self.parked { ", parked below the minimum" } else { "" };
        let undoing = if self.undoing { ", being taken back for lack of room" } else { "" };
        format!("write {}: {}{parked}{undoing}", self.sequence, targets.join(", "))
    }

    /// Those who had no room are to be asked once more.
    fn ask_again(&mut self) {
        self.targets.iter_mut().filter(|target| target.at == At::Refused).for_each(|target| target.at = At::Unsent);
    }

    fn mapped(self) -> Self {
        Self { unmap: false, ..self }
    }
}

impl Volume {
    /// Starts a part as soon as nothing stands in its way.
    pub(super) fn start_part(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(part) = self.parts.get(id) else { return };
        let (index, is_write) = (part.index, matches!(part.body, Body::Write(_)));
        let chunk = self.chunk(index);
        if chunk.revived > 0 && !is_write {
            // Whoever answered might lack what is being sent again.
            if !chunk.waiting.contains(&id) {
                chunk.waiting.push(id);
            }
            self.take_back_read(id);
            return;
        }
        if !chunk.ready {
            self.wait_for_chunk(ctx, index, id);
            return;
        }
        match &self.parts.get(id).expect("just seen").body {
            Body::Read(_) => self.start_read(ctx, id),
            Body::Extents { .. } => self.start_extents(ctx, id),
            Body::Write(_) => self.start_write(ctx, id),
        }
    }

    /// Sends acknowledged writes again, under their old sequences. `lost`: the server that restarted, and so needs them
    /// whatever it answered. Servers that have a write, or a later one of the same blocks, answer without doing
    /// anything. Answers the chunks concerned, to be driven.
    pub(super) fn revive(&mut self, sequences: Vec<u64>, lost: Option<u16>) -> Vec<u64> {
        let mut chunks = Vec::new();
        for sequence in sequences {
            let Some(mut part) = self.tracker.revive(sequence) else { continue };
            let Body::Write(write) = &mut part.body else { unreachable!("only writes are kept") };
            write.targets.iter_mut().filter(|t| Some(t.slot) == lost).for_each(|target| target.at = At::Unsent);
            write.refused_since = None;
            part.revived = true;
            part.internal = false;
            let chunk = self.chunk(part.index);
            chunk.active += 1;
            chunk.revived += 1;
            chunks.push(part.index);
            self.parts.insert(*part);
        }
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }

    /// The chunks `first..end` are gone: their writes need nobody. One under way came before what dropped the chunk, as
    /// nobody can tell otherwise, and has ended with it. One not sent yet goes to the chunk that takes the place.
    pub(super) fn forget_writes(&mut self, ctx: &mut Ctx<'_>, first: u64, end: u64) {
        self.drop_revived(first, end);
        self.tracker.drop_chunks(first, end);
        let doomed = |part: &Part| match &part.body {
            // One that is being taken back ends with the operation that does it.
            Body::Write(write) => (first..end).contains(&part.index) && write.sequence != 0 && !write.undoing,
            _ => false,
        };
        let ids: Vec<u64> = self.parts.iter().filter(|(_, part)| doomed(part)).map(|(id, _)| id).collect();
        for id in ids {
            let Some(Part { body: Body::Write(write), .. }) = self.parts.get(id) else { continue };
            let sequence = write.sequence;
            let key = self.key;
            for target in &write.targets {
                let mine =
                    |owner: &Owner| matches!(owner, Owner::Write { volume, part, .. } if (*volume, *part) == (key, id));
                ctx.servers.cancel(self.servers[target.slot as usize].number, mine);
            }
            self.tracker.void(sequence);
            self.finish_part(ctx, id, Ok(None));
        }
    }

    /// Forgets what was to be sent again to chunks that are gone.
    fn drop_revived(&mut self, first: u64, end: u64) {
        let doomed = |part: &Part| part.revived && (first..end).contains(&part.index);
        let ids: Vec<u64> = self.parts.iter().filter(|(_, part)| doomed(part)).map(|(id, _)| id).collect();
        for id in ids {
            let part = self.parts.remove(id).expect("just listed");
            let Body::Write(write) = &part.body else { unreachable!("only writes are kept") };
            self.tracker.void(write.sequence);
            let chunk = self.chunk(part.index);
            chunk.active -= 1;
            chunk.revived -= 1;
        }
    }

    fn start_write(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let part = self.parts.get(id).expect("the caller holds it");
        let (index, count, internal, first) = (part.index, part.count, part.internal, part.first);
        let Body::Write(write) = &part.body else { unreachable!("only for writes") };
        let (unmap, sequence) = (write.unmap, write.sequence);
        if sequence != 0 {
            return;
        }
        let Some(entry) = &self.chunk(index).entry else {
            if unmap {
                // There is nothing to unmap, says a map that only the holder may trust. Nobody else can be asked: where
                // the lease may have ended, this ends when it is renewed, or with the handle (I6).
                match ctx.session.is_fresh(ctx.io.now) {
                    true => self.finish_part(ctx, id, Ok(None)),
                    false => self.retry_soon(ctx, id, SOON),
                }
                return;
            }
            let chunk = self.chunk(index);
            chunk.want = true;
            chunk.ready = false;
            self.wait_for_chunk(ctx, index, id);
            return;
        };
        if entry.is_below_minimum() {
            self.chunk(index).waiting.push(id);
            self.refetch_later(ctx, index);
            return;
        }
        let hint = self.chunks[&index].hint;
        if hint {
            self.refresh(ctx, index);
        }
        let Some(entry) = &self.chunk(index).entry else { unreachable!("just seen") };
        let slots: Vec<Target> = entry.reps.iter().map(|rep| Target::unsent(rep.slot)).collect();
        let version = entry.version.0;
        if !internal && self.is_filling() {
            self.flush_for_room(ctx);
            if !self.has_room() {
                self.throttled.push_back(id);
                return;
            }
        }
        let bytes = if unmap { 0 } else { count * BLOCK_SIZE as u32 };
        let sequence = self.tracker.issue(index, bytes);
        slots.iter().for_each(|target| self.tracker.sent(sequence, target.slot, version));
        self.tell_load();
        let chunk = self.chunk(index);
        chunk.unsettled += 1;
        let Some(Part { body: Body::Write(write), .. }) = self.parts.get_mut(id) else { unreachable!("just seen") };
        write.sequence = sequence;
        write.targets = slots;
        self.send_unsent(ctx, id);
        if !unmap && u64::from(first + count) > self.chunk_blocks / 2 && self.is_sequential(index, first, count) {
            self.allocate_ahead(ctx, index);
        }
    }

    fn is_sequential(&self, index: u64, first: u32, count: u32) -> bool {
        self.write_end == index * self.chunk_blocks + u64::from(first + count)
    }

    /// Asks for the entry again in a second: only the metadata servers can bring the chunk back to its minimum.
    fn refetch_later(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        ctx.io.timers.after(ctx.io.now, LATER, Timer::Minimum(self.key, index));
    }

    /// Sends a write to every target that does not have it and is not being asked.
    pub(super) fn send_unsent(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let (volume, epoch, key) = (self.id, self.epoch, self.key);
        let settled = self.tracker.settled();
        let Some(part) = self.parts.get_mut(id) else { return };
        let Body::Write(write) = &mut part.body else { return };
        if write.undoing {
            return;
        }
        let Some(Some(entry)) = self.chunks.get(&part.index).map(|chunk| &chunk.entry) else { return };
        if write.packet.as_ref().is_none_or(|(version, _)| *version != entry.version) {
            let request = DataRequest {
                op: if write.unmap { DataOp::Unmap } else { DataOp::Write },
                flags: if write.fua { FLAG_DURABLE } else { 0 },
                volume,
                chunk: entry.chunk,
                version: entry.version,
                epoch,
                sequence: Sequence(write.sequence),
                settled: Sequence(settled),
                first_block: part.first,
                block_count: part.count,
                checksums: std::mem::take(&mut write.checksums),
            };
            let mut prefix = Vec::with_capacity(64 + 8 * request.checksums.len());
            request.encode(&mut prefix);
            write.checksums = request.checksums;
            let packet = Packet { kind: FrameKind::Data, prefix, payload: write.data.clone() };
            write.packet = Some((entry.version, Rc::new(packet)));
        }
        let packet = write.packet.as_ref().expect("just made").1.clone();
        for target in write.targets.iter_mut().filter(|target| target.at == At::Unsent) {
            target.at = At::Sent;
            target.version = entry.version;
            let server = &mut self.servers[target.slot as usize];
            server.told = server.told.max(settled);
            let owner = Owner::Write { volume: key, part: id, slot: target.slot };
            ctx.servers.send(&mut ctx.io, server.number, packet.clone(), owner);
        }
    }

    /// A server answered a write.
    pub(super) fn on_written(&mut self, ctx: &mut Ctx<'_>, id: u64, slot: u16, reply: &DataReply) {
        self.note_durable(ctx, slot, reply);
        let Some(part) = self.parts.get_mut(id) else { return };
        let index = part.index;
        let Body::Write(write) = &mut part.body else { return };
        let Some(target) = write.targets.iter_mut().find(|target| target.slot == slot && target.at == At::Sent) else {
            return;
        };
        if reply.status == DataStatus::Ok {
            let entry = self.chunks.get(&index).and_then(|chunk| chunk.entry.as_ref());
            let rejoined = entry.and_then(|entry| entry.rep(slot)).is_some_and(|rep| rep.since > target.version);
            if rejoined {
                target.at = At::Unsent;
                self.drive(ctx, index);
            } else {
                target.at = At::Ok;
                self.check_write(ctx, id);
            }
            return;
        }
        target.at = At::Unsent;
        let now = ctx.io.now;
        let since = *write.refused_since.get_or_insert(now);
        let chunk = self.chunks.get(&index).expect("a part pins its chunk");
        let Some(entry) = &chunk.entry else { return };
        let Some(rep) = entry.rep(slot).copied() else {
            self.drive(ctx, index);
            return;
        };
        let (version, detail) = (entry.version, ChunkVersion(reply.detail));
        let rebuild_late = !rep.current && now.saturating_since(since) > REBUILD_BEGINS_WITHIN;
        match reply.status {
            DataStatus::VersionMismatch if detail > version => self.refetch(ctx, index),
            DataStatus::VersionMismatch if detail == version => self.drive(ctx, index),
            DataStatus::VersionMismatch | DataStatus::NoSuchChunk if !rep.current && !rebuild_late => {
                // The order to rebuild has not reached the server yet; the entry may also have moved on.
                self.retry_soon(ctx, id, SOON);
            }
            DataStatus::VersionMismatch if detail >= rep.since => {
                let chunk = self.chunk(index);
                chunk.raise = true;
                chunk.ready = false;
                self.drive(ctx, index);
            }
            DataStatus::NoSuchChunk if rep.current => {
                if let Some(Part { body: Body::Write(write), .. }) = self.parts.get_mut(id)
                    && let Some(target) = write.targets.iter_mut().find(|target| target.slot == slot)
                {
                    target.at = At::Missing;
                }
                self.check_missing(ctx, id);
            }
            DataStatus::NotFenced => {
                self.server_mut(slot).fence = super::Fence::No;
                let chunk = self.chunk(index);
                chunk.ready = false;
                self.drive(ctx, index);
            }
            DataStatus::NoSpace => {
                if let Some(Part { body: Body::Write(write), .. }) = self.parts.get_mut(id)
                    && let Some(target) = write.targets.iter_mut().find(|target| target.slot == slot)
                {
                    target.at = At::Refused;
                }
                self.on_no_space(ctx, id);
            }
            DataStatus::StaleEpoch => self.taken_over(ctx),
            DataStatus::DiskFailed => {
                self.fail_server(ctx, slot);
                self.retry_soon(ctx, id, LATER);
            }
            _ => {
                ctx.log(format!(
                    "{} refused a write to chunk {index} of {}: {:?} ({detail})",
                    self.server(slot).cs,
                    self.id,
                    reply.status
                ));
                self.fail_copy(ctx, slot, index);
            }
        }
    }

    /// Asks for the entry now.
    pub(super) fn refetch(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let chunk = self.chunk(index);
        chunk.fetch = true;
        chunk.ready = false;
        self.drive(ctx, index);
    }

    /// Every current replica was asked and some have no such chunk: if none has it, it was allocated and never created,
    /// so it is created now, if the map agrees; otherwise those without it have lost it.
    fn check_missing(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(part) = self.parts.get(id) else { return };
        let index = part.index;
        let Body::Write(write) = &part.body else { return };
        let Some(entry) = &self.chunks[&index].entry else { return };
        let at = |slot| write.targets.iter().find(|target| target.slot == slot).map(|target| target.at);
        if entry.current().any(|slot| !matches!(at(slot), Some(At::Ok | At::Missing))) {
            return;
        }
        let missing: Vec<u16> = entry.current().filter(|slot| at(*slot) == Some(At::Missing)).collect();
        let all = missing.len() == entry.current().count();
        if missing.is_empty() {
            return;
        }
        let Some(Part { body: Body::Write(write), .. }) = self.parts.get_mut(id) else { return };
        write.targets.iter_mut().filter(|t| t.at == At::Missing).for_each(|t| t.at = At::Unsent);
        if all {
            let never = self.was_never_created(index);
            let chunk = self.chunk(index);
            chunk.create |= never;
            chunk.ready = false;
            self.drive(ctx, index);
        } else {
            self.fail_copy(ctx, missing[0], index);
        }
    }

    pub(super) fn retry_soon(&mut self, ctx: &mut Ctx<'_>, id: u64, after: Duration) {
        if let Some(Part { body: Body::Write(write), .. }) = self.parts.get_mut(id)
            && !write.timer
        {
            write.timer = true;
            ctx.io.timers.after(ctx.io.now, after, Timer::Part(self.key, id));
        }
    }

    /// Time to try a part again.
    pub(crate) fn on_part_timer(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        if self.death().is_some() {
            return;
        }
        let Some(part) = self.parts.get_mut(id) else { return };
        let index = part.index;
        match &mut part.body {
            Body::Write(write) if write.sequence == 0 => {
                write.timer = false;
                self.start_part(ctx, id);
            }
            Body::Write(write) => {
                write.timer = false;
                write.ask_again();
                if self.chunk(index).ready {
                    self.send_unsent(ctx, id);
                } else {
                    self.drive(ctx, index);
                }
            }
            Body::Read(_) | Body::Extents { .. } => self.start_part(ctx, id),
        }
        self.pump(ctx);
    }

    /// Time to look whether a chunk is back at its minimum.
    pub(crate) fn on_minimum_timer(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let below = |entry: &Entry| entry.is_below_minimum();
        if self.chunks.get(&index).is_some_and(|chunk| chunk.active > 0 && chunk.entry.as_ref().is_some_and(below)) {
            self.refetch(ctx, index);
            self.pump(ctx);
        }
    }

    /// A write ends when every replica of the set in force has it, and the set is large enough.
    fn check_write(&mut self, ctx: &mut Ctx<'_>, id: u64) {
        let Some(part) = self.parts.get_mut(id) else { return };
        let Body::Write(write) = &mut part.body else { return };
        if write.undoing {
            return;
        }
        let have = write.targets.iter().filter(|target| target.at == At::Ok).count();
        let enough = if planted!("acknowledge_before_all_replicas") {
            have + 1 >= write.targets.len()
        } else {
            have == write.targets.len()
        };
        if !enough {
            if write.targets.iter().any(|target| target.at == At::Missing) {
                self.check_missing(ctx, id);
            }
            self.on_no_space(ctx, id);
            return;
        }
        let (sequence, index) = (write.sequence, part.index);
        let has = |rep: &super::map::Rep| {
            write.targets.iter().any(|target| target.slot == rep.slot && target.version >= rep.since)
        };
        let lacks = |entry: &Entry| !entry.reps.iter().all(has) && !planted!("older_set_acknowledges");
        if self.chunks[&index].entry.as_ref().is_some_and(lacks) {
            // All of an older set have it, and the set in force has a member that lacks it: it goes there as soon as
            // the chunk is ready in the new version.
            return;
        }
        let below = self.chunks[&index].entry.as_ref().is_some_and(Entry::is_below_minimum);
        if below && !part.revived {
            write.parked = true;
            self.refetch_later(ctx, index);
            return;
        }
        self.finish_write(ctx, id, sequence);
    }

    /// Every replica has the write: it is acknowledged, and kept until it is settled.
    fn finish_write(&mut self, ctx: &mut Ctx<'_>, id: u64, sequence: u64) {
        let mut part = self.parts.remove(id).expect("the caller holds it");
        let Body::Write(write) = &mut part.body else { unreachable!("only for writes") };
        write.packet = None;
        let (op, index, revived) = (part.op, part.index, std::mem::take(&mut part.revived));
        self.tracker.acknowledge(sequence, Some(Box::new(part)));
        let chunk = self.chunk(index);
        chunk.active -= 1;
        chunk.revived -= u32::from(revived);
        if !revived {
            self.less_left(ctx, op, None);
        } else {
            if self.chunk(index).revived == 0 {
                self.drive(ctx, index);
            }
            self.recheck_flushes(ctx, None);
        }
        self.advance(ctx);
    }

    /// The chunk is ready in its present version: every write under way is matched with the set in force.
    pub(super) fn retarget(&mut self, ctx: &mut Ctx<'_>, index: u64) {
        let Some(entry) = self.chunks.get(&index).and_then(|chunk| chunk.entry.clone()) else { return };
        let busy = self.chunks[&index].active > 0;
        let mut writes: Vec<(u64, u64)> = Vec::new();
        if busy {
            let sequence = |part: &Part| match &part.body {
                Body::Write(write) if part.index == index && write.sequence != 0 => Some(write.sequence),
                _ => None,
            };
            writes = self.parts.iter().filter_map(|(id, part)| Some((sequence(part)?, id))).collect();
            writes.sort_unstable();
        }
        self.tracker.retarget(index, |slot| entry.rep(slot).is_some());
        for (sequence, id) in writes {
            let Some(part) = self.parts.get_mut(id) else { continue };
            let Body::Write(write) = &mut part.body else { continue };
            if write.undoing {
                continue;
            }
            write.ask_again();
            for gone in write.targets.iter().filter(|t| entry.rep(t.slot).is_none()) {
                let number = self.servers[gone.slot as usize].number;
                ctx.servers.cancel(
                    number,
                    |owner| matches!(owner, Owner::Write { volume, part, .. } if *volume == self.key && *part == id),
                );
            }
            write.targets.retain(|target| entry.rep(target.slot).is_some());
            for target in &mut write.targets {
                if entry.rep(target.slot).is_some_and(|rep| rep.since > target.version) && target.at == At::Ok {
                    target.at = At::Unsent;
                }
            }
            let mut forget = planted!("forget_replica_in_version_change");
            for rep in &entry.reps {
                if !write.targets.iter().any(|target| target.slot == rep.slot) {
                    // A new member gets its own time to begin.
                    write.refused_since = None;
                    let at = if std::mem::take(&mut forget) { At::Ok } else { At::Unsent };
                    write.targets.push(Target { at, ..Target::unsent(rep.slot) });
                }
                self.tracker.sent(sequence, rep.slot, entry.version.0);
            }
            if write.parked && !entry.is_below_minimum() {
                write.parked = false;
            }
            self.send_unsent(ctx, id);
            self.check_write(ctx, id);
        }
        self.advance(ctx);
    }

    /// Requests to a server were thrown away: their writes are to be sent again. Answers the chunks concerned.
    pub(super) fn unsend(&mut self, slot: u16) -> Vec<u64> {
        let mut chunks = Vec::new();
        for id in self.parts.keys() {
            let Some(Part { index, body: Body::Write(write), .. }) = self.parts.get_mut(id) else { continue };
            for target in write.targets.iter_mut().filter(|t| t.slot == slot && t.at == At::Sent) {
                target.at = At::Unsent;
                chunks.push(*index);
            }
        }
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }

    /// A server restarted: what it answered for writes that are still under way counts no more. Answers the chunks
    /// concerned.
    pub(super) fn forget_answers(&mut self, slot: u16) -> Vec<u64> {
        let mut chunks = Vec::new();
        for id in self.parts.keys() {
            let Some(Part { index, body: Body::Write(write), .. }) = self.parts.get_mut(id) else { continue };
            for target in write.targets.iter_mut().filter(|t| t.slot == slot && t.at == At::Ok) {
                target.at = At::Unsent;
                chunks.push(*index);
            }
        }
        chunks
    }

    /// Takes the durable mark of an answer.
    pub(super) fn note_durable(&mut self, ctx: &mut Ctx<'_>, slot: u16, reply: &DataReply) {
        if reply.status == DataStatus::Ok && reply.epoch == self.epoch && self.tracker.durable(slot, reply.durable.0) {
            self.advance(ctx);
        }
    }

    /// Moves the settled mark and lets throttled writes go.
    pub(super) fn advance(&mut self, ctx: &mut Ctx<'_>) {
        let chunks = &mut self.chunks;
        self.tracker.advance(|index| {
            if let Some(chunk) = chunks.get_mut(&index) {
                chunk.unsettled -= 1;
            }
        });
        self.tell_load();
        while !self.throttled.is_empty() && self.has_room() {
            let part = self.throttled.pop_front().expect("not empty");
            self.start_part(ctx, part);
        }
    }
}
