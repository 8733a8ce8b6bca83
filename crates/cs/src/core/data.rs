//! The request path: reads, writes, unmaps, flushes, confirmations.
//!
//! A request is judged in this order: disk, epoch, chunk, range, version, duplicate, checksums. Only then the store
//! sees it.

use super::volume::{Volume, Waiting};
use super::{CsCore, FlushWaiter, Pending};
use crate::links::Caller;
use cairn_env::Buf;
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_store::{StoreError, StoreReply, StoreRequest};
use cairn_types::{BLOCK_SIZE, ChunkId, ChunkVersion, Duration, Epoch, NodeId, Sequence, VolumeId};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_DURABLE, FLAG_REPAIR, FLAG_ZERO};
use cairn_wire::{Effects, FrameKind, NetEffect, Now};

/// Clients that asked for nothing for this long are not at work: rebuilds need not step back.
const CLIENTS_GONE: Duration = Duration::from_millis(20);
/// What a piece of a rebuild counts at least, in blocks.
const WEIGHT_MIN: u32 = 8;

/// An admitted data request.
#[derive(Debug)]
pub(super) struct DataCall {
    pub caller: Caller,
    pub request: DataRequest,
    pub payload: Buf,
}

/// A write or unmap at the store.
#[derive(Debug)]
pub(super) struct WriteInFlight {
    caller: Caller,
    volume: VolumeId,
    chunk: ChunkId,
    sequence: Sequence,
    first_block: u32,
    block_count: u32,
    /// The store answers only when it is durable.
    durable: bool,
    /// Only a part of this request: when it is done the rest goes its way.
    rest: Option<Box<DataCall>>,
}

/// A read at the store.
#[derive(Debug)]
pub(super) struct ReadInFlight {
    caller: Caller,
    volume: VolumeId,
    chunk: ChunkId,
    first_block: u32,
    block_count: u32,
    /// Asked by a server that rebuilds a copy.
    repair: bool,
}

impl CsCore {
    /// Judges an admitted request and gives it to the store or refuses it.
    pub(super) fn data_call(&mut self, now: Now, call: DataCall, out: &mut Effects) {
        if self.failed.is_some() {
            return self.refuse(call.caller, DataStatus::DiskFailed, 0, out);
        }
        let request = &call.request;
        if request.flags & FLAG_REPAIR != 0 {
            return self.repair_read(now, call, out);
        }
        self.client_seen = Some(now.mono);
        let Some(volume) = self.volume(now, request.volume) else {
            return self.refuse(call.caller, DataStatus::NotFenced, 0, out);
        };
        if let Some((status, epoch)) = judge_epoch(volume, request) {
            return self.reply(call.caller, DataReply { epoch, ..DataReply::of(status) }, Vec::new(), out);
        }
        volume.touched = now.mono;
        if request.settled > volume.settled {
            let (id, settled) = (request.volume, request.settled);
            self.note_settled(now, id, settled, false);
        }
        match call.request.op {
            DataOp::Read => self.read(now, call, out),
            DataOp::Write | DataOp::Unmap => {
                let volume = self.volumes.get_mut(&call.request.volume).expect("found above");
                if volume.is_held() {
                    self.client_depth += 1;
                    volume.waiting.push_back(Waiting::Data(call));
                } else {
                    self.write(now, call, out);
                }
            }
            DataOp::Flush => self.flush(call, out),
            DataOp::Confirm => self.answer_ok(call.caller, call.request.volume, out),
        }
    }

    /// The state of a volume that was fenced here at least once.
    pub(super) fn volume(&mut self, now: Now, id: VolumeId) -> Option<&mut Volume> {
        if !self.volumes.contains_key(&id) {
            self.store.fence(id).filter(|epoch| epoch.0 > 0)?;
            self.volumes.insert(id, Volume::load(&self.store, id, now.mono));
        }
        self.volumes.get_mut(&id).filter(|volume| volume.floor.0 > 0)
    }

    /// Chunk, range and version; the refusal if one of them is wrong.
    fn judge_chunk(&self, request: &DataRequest) -> Result<(), (DataStatus, u64)> {
        let Some(info) = self.store.chunk(request.chunk) else { return Err((DataStatus::NoSuchChunk, 0)) };
        let end = request.first_block + request.block_count;
        if info.volume != request.volume || end > info.block_count {
            return Err((DataStatus::BadRequest, 0));
        }
        if info.version != request.version {
            let known =
                if self.copies.contains_key(&request.chunk) && request.op == DataOp::Read { 0 } else { info.version.0 };
            return Err((DataStatus::VersionMismatch, known));
        }
        if request.op == DataOp::Read && self.copies.contains_key(&request.chunk) {
            // A copy that is being rebuilt has the right version and not yet the right blocks.
            return Err((DataStatus::VersionMismatch, 0));
        }
        Ok(())
    }

    fn read(&mut self, now: Now, call: DataCall, out: &mut Effects) {
        let request = &call.request;
        if request.block_count > cairn_wire::data::DATA_BLOCKS_MAX {
            return self.refuse(call.caller, DataStatus::BadRequest, 0, out);
        }
        if let Err((status, detail)) = self.judge_chunk(request) {
            return self.refuse_in(call.caller, request.volume, status, detail, out);
        }
        self.client_depth += 1;
        self.submit_read(now, &call, false);
    }

    fn submit_read(&mut self, now: Now, call: &DataCall, repair: bool) {
        let DataRequest { volume, chunk, first_block, block_count, .. } = call.request;
        let read = ReadInFlight { caller: call.caller, volume, chunk, first_block, block_count, repair };
        self.submit(now, Pending::Read(read), StoreRequest::Read { chunk, first_block, block_count });
    }

    /// A read by a server that rebuilds a copy: no lease, but exactly the version, and never from a copy that is itself
    /// incomplete (I7).
    fn repair_read(&mut self, now: Now, call: DataCall, out: &mut Effects) {
        let request = &call.request;
        let from_server = self.links.get(call.caller.link).is_some_and(|link| matches!(link.peer, NodeId::Cs(_)));
        if request.op != DataOp::Read || !from_server {
            return self.refuse(call.caller, DataStatus::BadRequest, 0, out);
        }
        if self.repairs_out > 0 && self.repairs_out >= self.repair_window(now) {
            // Clients come first. What is under way takes the next along.
            return self.repairs_waiting.push_back(call);
        }
        let stale_allowed = planted!("cs_source_may_be_stale");
        match self.judge_chunk(request) {
            Err((DataStatus::VersionMismatch, _)) if stale_allowed => {}
            Err((status, detail)) => return self.refuse(call.caller, status, detail, out),
            Ok(()) => {}
        }
        self.repairs_out += weight(request.block_count);
        self.submit_read(now, &call, true);
    }

    /// Blocks of repair reads, or of a rebuild's reads and writes, that may be under way here now.
    pub(super) fn repair_window(&self, now: Now) -> u32 {
        let at_work = self.client_seen.is_some_and(|seen| now.mono < seen + CLIENTS_GONE);
        if self.client_depth > 0 || at_work { super::rebuild::WINDOW_BUSY } else { super::rebuild::WINDOW_IDLE }
    }

    /// A write or unmap whose turn has come.
    pub(super) fn write(&mut self, now: Now, call: DataCall, out: &mut Effects) {
        let request = &call.request;
        let (id, epoch, sequence) = (request.volume, request.epoch, request.sequence);
        if let Err((status, detail)) = self.judge_chunk(request) {
            return self.refuse_in(call.caller, id, status, detail, out);
        }
        let store_version_max = cairn_store::VERSION_MAX;
        if sequence.0 == 0 || request.version.0 > store_version_max {
            return self.refuse_in(call.caller, id, DataStatus::BadRequest, 0, out);
        }
        let asks_durable = request.flags & FLAG_DURABLE != 0 || self.config.durable_always;
        let volume = self.volumes.get_mut(&id).expect("judged by the caller");
        if sequence <= volume.settled {
            // Settled means applied and durable on every replica: this is an old packet.
            return self.answer_ok(call.caller, id, out);
        }
        let durable = asks_durable || volume.marks.must_be_durable(sequence);
        let mut run = (request.first_block, request.block_count);
        if sequence <= volume.marks.seen_max() {
            if volume.marks.in_flight(sequence) {
                volume.twins.push((sequence, call.caller));
                return;
            }
            if self.is_overtaken(request.chunk, run, sequence) && !planted!("cs_late_write_overtakes") {
                self.client_depth += 1;
                let volume = self.volumes.get_mut(&id).expect("judged by the caller");
                volume.waiting.push_front(Waiting::Late(call));
                return;
            }
            match self.first_new_run(request.chunk, run, (epoch, sequence)) {
                Some(new) => run = new,
                None => return self.answer_duplicate(call.caller, id, sequence, durable, out),
            }
        }
        if request.op == DataOp::Write
            && let Some(at) = bad_checksum(&call.payload, &request.checksums)
        {
            let detail = u64::from(request.first_block) + at as u64;
            return self.refuse_in(call.caller, id, DataStatus::BadRequest, detail, out);
        }
        self.submit_write(now, call, run, durable);
    }

    fn submit_write(&mut self, now: Now, call: DataCall, run: (u32, u32), durable: bool) {
        let DataCall { caller, mut request, payload } = call;
        let DataRequest { volume: id, chunk, version, epoch, sequence, .. } = request;
        let (first_block, block_count) = run;
        let whole = run == (request.first_block, request.block_count);
        let skipped = (first_block - request.first_block) as usize;
        let store_request = if request.op == DataOp::Unmap {
            StoreRequest::Unmap { chunk, version, epoch, sequence, first_block, block_count, durable }
        } else {
            let aligned = if payload.is_aligned() { payload.clone() } else { Buf::copy_from(&payload) };
            let data = match whole {
                true => aligned,
                false => aligned.slice(skipped * BLOCK_SIZE, block_count as usize * BLOCK_SIZE),
            };
            let checksums = match whole {
                true => std::mem::take(&mut request.checksums),
                false => request.checksums[skipped..skipped + block_count as usize].to_vec(),
            };
            StoreRequest::Write { chunk, version, epoch, sequence, first_block, checksums, data, durable }
        };
        let rest = (!whole).then(|| Box::new(DataCall { caller, request, payload }));
        if let Some(copy) = self.copies.get_mut(&chunk)
            && !planted!("cs_rebuild_loses_new_writes")
        {
            super::rebuild::set_blocks(&mut copy.fresh, first_block, block_count);
        }
        let volume = self.volumes.get_mut(&id).expect("judged by the caller");
        volume.marks.submitted(sequence);
        volume.writes += 1;
        self.client_depth += 1;
        let write = WriteInFlight { caller, volume: id, chunk, sequence, first_block, block_count, durable, rest };
        self.submit(now, Pending::Write(write), store_request);
    }

    /// True while the store works on a later write of some of these blocks: only when that is done can be said what of
    /// this one is still new.
    fn is_overtaken(&self, chunk: ChunkId, run: (u32, u32), sequence: Sequence) -> bool {
        self.pending.iter().any(|pending| match pending {
            Pending::Write(write) => {
                write.chunk == chunk
                    && write.sequence > sequence
                    && write.first_block < run.0 + run.1
                    && run.0 < write.first_block + write.block_count
            }
            // What a rebuild copies may carry the mark of a later write.
            Pending::Repair { chunk: copied, first_block, block_count, .. } => {
                *copied == chunk && *first_block < run.0 + run.1 && run.0 < first_block + block_count
            }
            _ => false,
        })
    }

    /// The first run of blocks that this write or a later one has not reached yet.
    fn first_new_run(&self, chunk: ChunkId, run: (u32, u32), mark: (Epoch, Sequence)) -> Option<(u32, u32)> {
        let is_new = |block: &u32| self.store.tail_latest(chunk, *block).is_none_or(|latest| latest < mark);
        let end = run.0 + run.1;
        let first = (run.0..end).find(is_new)?;
        let count = (first..end).take_while(is_new).count() as u32;
        Some((first, count))
    }

    fn answer_duplicate(&mut self, caller: Caller, id: VolumeId, sequence: Sequence, durable: bool, out: &mut Effects) {
        let volume = self.volumes.get_mut(&id).expect("judged by the caller");
        if planted!("cs_duplicate_uncounted") {
            // The mistake: what is there already counts for nothing.
        } else if volume.marks.is_clean(self.durable_lsn) && self.answered_lsn <= self.durable_lsn {
            volume.marks.repeated(sequence);
        } else {
            // Its blocks may stand under a later write that is not durable yet, or come from a rebuild, which the marks
            // do not track.
            volume.marks.submitted(sequence);
            volume.marks.done(sequence, self.answered_lsn);
        }
        if durable && volume.marks.is_undurable(sequence, self.durable_lsn) {
            self.flush_waiters.push(FlushWaiter { caller, volume: id });
        } else {
            self.answer_ok(caller, id, out);
        }
    }

    fn flush(&mut self, call: DataCall, out: &mut Effects) {
        let (caller, id) = (call.caller, call.request.volume);
        let durable_lsn = self.durable_lsn;
        let volume = self.volumes.get_mut(&id).expect("judged by the caller");
        volume.habit.flushed();
        if volume.marks.is_clean(durable_lsn) {
            self.answer_ok(caller, id, out);
        } else if self.flush_running && volume.marks.all_durable(self.flush_covers) {
            // Everything this volume has answered was complete when the flush under way began.
            self.flush_joined.push(FlushWaiter { caller, volume: id });
        } else {
            self.flush_waiters.push(FlushWaiter { caller, volume: id });
        }
    }

    pub(super) fn on_written(
        &mut self,
        now: Now,
        write: WriteInFlight,
        result: Result<StoreReply, StoreError>,
        out: &mut Effects,
    ) {
        self.client_depth -= 1;
        let WriteInFlight { caller, volume: id, chunk, sequence, first_block, block_count, durable, rest } = write;
        let volume = self.volumes.get_mut(&id).expect("a volume with writes is kept");
        volume.writes -= 1;
        let outcome = match result {
            Ok(StoreReply::Written { lsn }) => {
                volume.marks.done(sequence, if durable { 0 } else { lsn });
                if !durable && lsn > self.durable_lsn {
                    self.answered_lsn = self.answered_lsn.max(lsn);
                    self.undurable += 1;
                    self.undurable_since.get_or_insert(now.mono);
                    self.flush_expected |= rest.is_none() && volume.habit.written();
                }
                self.counters.writes += u64::from(rest.is_none());
                self.counters.written_bytes += u64::from(block_count) * BLOCK_SIZE as u64;
                Ok(())
            }
            Ok(other) => panic!("the store answers a write with {other:?}"),
            Err(error) => {
                volume.marks.refused(sequence);
                if let Some(copy) = self.copies.get_mut(&chunk) {
                    super::rebuild::clear_blocks(&mut copy.fresh, first_block, block_count);
                    self.rebuilds.recheck(chunk);
                }
                Err(status_of(&error))
            }
        };
        match (outcome, rest) {
            (Ok(()), Some(rest)) => {
                // The part just written is a duplicate now; the call finds what is left.
                self.write_again(now, *rest, out);
            }
            (Ok(()), None) => self.answer_write(caller, id, sequence, None, out),
            (Err(status), _) => self.answer_write(caller, id, sequence, Some(status), out),
        }
        if self.volumes.get(&id).is_some_and(|volume| volume.writes == 0 && !volume.waiting.is_empty()) {
            self.drain(now, id, out);
        }
    }

    /// Goes on with a request of which a part is done; behind a control operation if one came in between.
    fn write_again(&mut self, now: Now, call: DataCall, out: &mut Effects) {
        if self.failed.is_some() {
            return self.refuse(call.caller, DataStatus::DiskFailed, 0, out);
        }
        let volume = self.volumes.get_mut(&call.request.volume).expect("a volume with writes is kept");
        if volume.is_held() {
            self.client_depth += 1;
            volume.waiting.push_back(Waiting::Data(call));
        } else {
            self.write(now, call, out);
        }
    }

    /// Answers a write and the repeated requests for it.
    fn answer_write(
        &mut self,
        caller: Caller,
        id: VolumeId,
        sequence: Sequence,
        refused: Option<DataStatus>,
        out: &mut Effects,
    ) {
        let volume = self.volumes.get_mut(&id).expect("a volume with writes is kept");
        let mut twins = Vec::new();
        if !volume.twins.is_empty() {
            twins = volume.twins.extract_if(.., |twin| twin.0 == sequence).map(|(_, caller)| caller).collect();
        }
        for caller in std::iter::once(caller).chain(twins) {
            match refused {
                None => self.answer_ok(caller, id, out),
                Some(status) => self.refuse_in(caller, id, status, 0, out),
            }
        }
    }

    pub(super) fn on_read(
        &mut self,
        now: Now,
        read: ReadInFlight,
        result: Result<StoreReply, StoreError>,
        out: &mut Effects,
    ) {
        match read.repair {
            true => self.repairs_out -= weight(read.block_count),
            false => self.client_depth -= 1,
        }
        self.answer_read(read, result, out);
        while self.repairs_out == 0 || self.repairs_out < self.repair_window(now) {
            let Some(call) = self.repairs_waiting.pop_front() else { return };
            self.data_call(now, call, out);
        }
    }

    fn answer_read(&mut self, read: ReadInFlight, result: Result<StoreReply, StoreError>, out: &mut Effects) {
        let ReadInFlight { caller, volume, chunk, first_block, block_count, .. } = read;
        match result {
            Ok(StoreReply::Data(data)) => {
                self.counters.reads += 1;
                self.counters.read_bytes += u64::from(block_count) * BLOCK_SIZE as u64;
                let mut reply = self.reply_of(volume, DataStatus::Ok, 0);
                reply.block_count = block_count;
                if data.mapped.iter().all(|mapped| !mapped) {
                    reply.flags |= FLAG_ZERO;
                    return self.reply(caller, reply, Vec::new(), out);
                }
                reply.checksums = data.checksums;
                self.reply(caller, reply, data.data, out);
            }
            Ok(other) => panic!("the store answers a read with {other:?}"),
            Err(StoreError::Corrupt { blocks, .. }) => {
                let first = blocks.first().copied().unwrap_or(first_block);
                self.note_damaged(chunk, first, out);
                self.refuse_in(caller, volume, DataStatus::Corrupt, u64::from(first), out);
            }
            Err(error) => {
                let status = status_of(&error);
                if status == DataStatus::Corrupt {
                    self.note_damaged(chunk, first_block, out);
                }
                self.refuse_in(caller, volume, status, u64::from(first_block), out);
            }
        }
    }

    /// An answer with the volume's durable mark and epoch filled in.
    fn reply_of(&mut self, id: VolumeId, status: DataStatus, detail: u64) -> DataReply {
        let mut reply = DataReply { detail, ..DataReply::of(status) };
        if let Some(volume) = self.volumes.get_mut(&id) {
            reply.epoch = volume.floor;
            let mark = volume.marks.publish(self.durable_lsn);
            reply.durable = if planted!("cs_mark_counts_undurable") { volume.marks.seen_max() } else { mark };
        }
        reply
    }

    pub(super) fn answer_ok(&mut self, caller: Caller, id: VolumeId, out: &mut Effects) {
        let reply = self.reply_of(id, DataStatus::Ok, 0);
        self.reply(caller, reply, Vec::new(), out);
    }

    pub(super) fn refuse_in(
        &mut self,
        caller: Caller,
        id: VolumeId,
        status: DataStatus,
        detail: u64,
        out: &mut Effects,
    ) {
        let reply = self.reply_of(id, status, detail);
        self.reply(caller, reply, Vec::new(), out);
    }

    /// Refuses without naming a volume.
    pub(super) fn refuse(&mut self, caller: Caller, status: DataStatus, detail: u64, out: &mut Effects) {
        self.reply(caller, DataReply { detail, ..DataReply::of(status) }, Vec::new(), out);
    }

    fn reply(&mut self, caller: Caller, reply: DataReply, payload: Vec<Buf>, out: &mut Effects) {
        if !self.links.answered(caller.link) {
            return;
        }
        let mut prefix = Vec::with_capacity(cairn_wire::data::DATA_REPLY_HEADER_SIZE + 8 * reply.checksums.len());
        reply.encode(&mut prefix);
        out.net.push(NetEffect::Send { link: caller.link, kind: FrameKind::DataReply, id: caller.id, prefix, payload });
    }
}

/// What a piece of a rebuild counts against a window: small ones cost more than their blocks.
pub(super) fn weight(block_count: u32) -> u32 {
    block_count.max(WEIGHT_MIN)
}

/// Rule 1: lower epochs are refused, reads and writes alike; unknown higher ones have to be fenced first.
fn judge_epoch(volume: &Volume, request: &DataRequest) -> Option<(DataStatus, Epoch)> {
    if planted!("cs_skip_epoch_check_on_unmap") && request.op == DataOp::Unmap {
        return None;
    }
    let stale = if planted!("cs_epoch_compared_loosely") {
        request.epoch.0 + 1 < volume.floor.0
    } else {
        request.epoch < volume.floor
    };
    if stale {
        return Some((DataStatus::StaleEpoch, volume.floor));
    }
    // While a fence is on its way to the disk its epoch is not served either.
    (request.epoch > volume.fenced).then_some((DataStatus::NotFenced, volume.fenced))
}

/// Index of the first block whose checksum does not match.
fn bad_checksum(payload: &[u8], checksums: &[u64]) -> Option<usize> {
    payload.chunks_exact(BLOCK_SIZE).zip(checksums).position(|(block, checksum)| crc64(block) != *checksum)
}

fn status_of(error: &StoreError) -> DataStatus {
    match error {
        StoreError::NoSpace => DataStatus::NoSpace,
        StoreError::Failed { .. } => DataStatus::DiskFailed,
        StoreError::NoChunk { .. } => DataStatus::NoSuchChunk,
        StoreError::Corrupt { .. } | StoreError::Io(_) => DataStatus::Corrupt,
        StoreError::StaleEpoch { .. } => DataStatus::StaleEpoch,
        _ => DataStatus::BadRequest,
    }
}

/// Version of a copy as other servers may rely on it: the base while it is being rebuilt.
pub(super) fn trusted_version(core: &CsCore, chunk: ChunkId, version: ChunkVersion) -> ChunkVersion {
    core.copies.get(&chunk).map_or(version, |copy| copy.base.unwrap_or(ChunkVersion(0)))
}
