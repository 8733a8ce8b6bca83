//! Control operations: fences, creations, version changes, deletions, beginnings of rebuilds.
//!
//! They change what the writes of a volume are judged by, so each waits until the volume's writes at the store are
//! answered, and writes that come later stand in line behind it. Operations next to each other in the line run together
//! and share the store's group write. Every one is durable before it is answered.

use super::rebuild::RebuildOrder;
use super::volume::{Volume, Waiting};
use super::{Copy, CsCore, Pending};
use crate::links::Caller;
use crate::tag::{ChunkTag, CopyState, TAG_SUSPECTS_MAX};
use cairn_stdx::planted;
use cairn_store::{StoreError, StoreReply, StoreRequest};
use cairn_types::{ChunkId, ChunkVersion, Epoch, LayerId, Sequence, VolumeId};
use cairn_wire::cs::{CsError, CsReply};
use cairn_wire::mds::{OrderDone, OrderKind};
use cairn_wire::{Effects, Now};

/// Who hears how it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Audience {
    /// A lease holder.
    Caller(Caller),
    /// The metadata servers, as an order of this kind and version.
    Order(OrderKind, ChunkVersion),
    /// Nobody.
    None,
}

/// An operation in line.
#[derive(Debug)]
pub(super) enum Control {
    Fence {
        epoch: Epoch,
        caller: Caller,
    },
    Create {
        chunk: ChunkId,
        layer: LayerId,
        index: u64,
        block_count: u32,
        version: ChunkVersion,
        caller: Caller,
    },
    Raise {
        chunk: ChunkId,
        since: ChunkVersion,
        version: ChunkVersion,
        audience: Audience,
    },
    Delete {
        chunk: ChunkId,
        version: ChunkVersion,
    },
    Rebuild(Box<RebuildOrder>),
    /// Every block was copied: say so in the tag, if it is still true when all writes before are answered.
    EndRebuild {
        chunk: ChunkId,
        attempt: u64,
    },
}

/// What is left to do when the store answered.
#[derive(Debug)]
pub(super) enum Done {
    Fence {
        epoch: Epoch,
        caller: Caller,
    },
    Create {
        caller: Caller,
        chunk: ChunkId,
    },
    Raise {
        chunk: ChunkId,
        audience: Audience,
    },
    Delete {
        chunk: ChunkId,
        version: ChunkVersion,
    },
    /// One of several steps; the last one carries on.
    Step,
    Rebuild {
        chunk: ChunkId,
        copy: Box<Copy>,
    },
    EndRebuild {
        chunk: ChunkId,
        attempt: u64,
    },
}

impl CsCore {
    /// Puts an operation in its volume's line.
    pub(super) fn control(&mut self, now: Now, id: VolumeId, control: Control, out: &mut Effects) {
        if !self.volumes.contains_key(&id) {
            self.volumes.insert(id, Volume::load(&self.store, id, now.mono));
        }
        let volume = self.volumes.get_mut(&id).expect("inserted above");
        volume.touched = now.mono;
        volume.waiting.push_back(Waiting::Control(control));
        self.drain(now, id, out);
    }

    /// Lets the line of a volume move as far as it can.
    pub(super) fn drain(&mut self, now: Now, id: VolumeId, out: &mut Effects) {
        loop {
            let Some(volume) = self.volumes.get_mut(&id) else { return };
            match volume.waiting.front() {
                None => return,
                Some(Waiting::Control(_) | Waiting::Late(_)) if volume.writes > 0 && self.failed.is_none() => return,
                Some(Waiting::Data(_) | Waiting::Late(_) | Waiting::Repair(_))
                    if volume.controls > 0 && self.failed.is_none() =>
                {
                    return;
                }
                Some(_) => {}
            }
            match volume.waiting.pop_front().expect("looked at above") {
                Waiting::Control(control) => self.start_control(now, id, control, out),
                Waiting::Repair(repair) => self.submit_repair(now, repair),
                Waiting::Data(call) | Waiting::Late(call) => {
                    self.client_depth -= 1;
                    // A closed link takes its queued requests along: they must not run after a newer link's.
                    if !self.links.is_up(call.caller.link) && !planted!("cs_old_link_still_served") {
                        continue;
                    }
                    self.data_call_in_turn(now, call, out);
                }
            }
        }
    }

    /// A data request that stood in line: everything is judged anew, except that it need not stand in line again.
    fn data_call_in_turn(&mut self, now: Now, call: super::DataCall, out: &mut Effects) {
        use cairn_wire::data::DataStatus;
        if self.failed.is_some() {
            return self.refuse(call.caller, DataStatus::DiskFailed, 0, out);
        }
        let volume = self.volumes.get(&call.request.volume).expect("it stood in its line");
        let floor = volume.floor;
        if call.request.epoch < floor {
            return self.refuse_in(call.caller, call.request.volume, DataStatus::StaleEpoch, 0, out);
        }
        self.write(now, call, out);
    }

    fn submit_control(&mut self, now: Now, id: VolumeId, done: Done, request: StoreRequest) {
        self.volumes.get_mut(&id).expect("its line is moving").controls += 1;
        self.submit(now, Pending::Control { volume: id, done }, request);
    }

    fn start_control(&mut self, now: Now, id: VolumeId, control: Control, out: &mut Effects) {
        if let Some(what) = self.failed.clone() {
            return self.fail_control(control, &what, out);
        }
        match control {
            Control::Fence { epoch, caller } => {
                let volume = self.volumes.get(&id).expect("its line is moving");
                if epoch < volume.floor {
                    let error = CsError::StaleEpoch { volume: id, current: volume.floor };
                    self.answer_call(caller, Err(error), out);
                } else if epoch == volume.fenced {
                    self.answer_fenced(caller, id, out);
                } else if planted!("cs_epoch_only_in_memory") {
                    self.on_fenced(id, epoch);
                    self.answer_fenced(caller, id, out);
                } else {
                    let request = StoreRequest::Fence { volume: id, epoch };
                    self.submit_control(now, id, Done::Fence { epoch, caller }, request);
                }
            }
            Control::Create { chunk, layer, index, block_count, version, caller } => {
                match self.store.chunk(chunk).map(|info| (info.volume, info.version)) {
                    Some((volume, _)) if volume != id => {
                        let error = CsError::Invalid(format!("{chunk} belongs to {volume}"));
                        self.answer_call(caller, Err(error), out);
                    }
                    Some((_, current)) if current != version || self.copies.contains_key(&chunk) => {
                        self.answer_call(caller, Err(CsError::VersionMismatch { chunk, current }), out);
                    }
                    Some(_) => self.answer_call(caller, Ok(CsReply::Done), out),
                    None => {
                        let tag = ChunkTag::whole().encode();
                        let request =
                            StoreRequest::CreateChunk { chunk, volume: id, layer, index, block_count, version, tag };
                        self.submit_control(now, id, Done::Create { caller, chunk }, request);
                    }
                }
            }
            Control::Raise { chunk, since, version, audience } => {
                let Some(current) = self.store.chunk(chunk).map(|info| info.version) else {
                    return self.tell(audience, chunk, Err(CsError::NoSuchChunk(chunk)), out);
                };
                // A copy under rebuild may follow the versions of its own membership only.
                let member = self.copies.get(&chunk).is_none_or(|copy| since >= copy.joined);
                if !member || current < since || current > version {
                    let current = super::data::trusted_version(self, chunk, current);
                    return self.tell(audience, chunk, Err(CsError::VersionMismatch { chunk, current }), out);
                }
                if current == version {
                    return self.tell(audience, chunk, Ok(CsReply::Done), out);
                }
                let request = StoreRequest::SetVersion { chunk, version };
                self.submit_control(now, id, Done::Raise { chunk, audience }, request);
            }
            Control::Delete { chunk, version } => {
                let error = match self.store.chunk(chunk).map(|info| info.version) {
                    None => None,
                    Some(current) if current > version => Some(format!("{chunk} is at {current} here")),
                    Some(_) => {
                        self.drop_rebuild(chunk);
                        let request = StoreRequest::DeleteChunk { chunk };
                        return self.submit_control(now, id, Done::Delete { chunk, version }, request);
                    }
                };
                self.mds.order_done(OrderDone { chunk, version, kind: OrderKind::Delete, error });
            }
            Control::Rebuild(order) => self.begin_rebuild(now, id, *order, out),
            Control::EndRebuild { chunk, attempt } => {
                if let Some(tag) = self.rebuilt_tag(now, chunk, attempt, out) {
                    let done = Done::EndRebuild { chunk, attempt };
                    self.submit_control(now, id, done, StoreRequest::SetTag { chunk, tag });
                }
            }
        }
    }

    fn fail_control(&mut self, control: Control, what: &str, out: &mut Effects) {
        let error = || CsError::DiskFailed(what.to_owned());
        match control {
            Control::Fence { caller, .. } | Control::Create { caller, .. } => {
                self.answer_call(caller, Err(error()), out)
            }
            Control::Raise { chunk, audience, .. } => self.tell(audience, chunk, Err(error()), out),
            // The metadata servers learn of the disk by the heartbeat.
            Control::Delete { .. } | Control::Rebuild(_) | Control::EndRebuild { .. } => {}
        }
    }

    /// Makes a copy ready for being rebuilt, or tells that it needs none. The volume has no writes under way here.
    fn begin_rebuild(&mut self, now: Now, id: VolumeId, order: RebuildOrder, out: &mut Effects) {
        let (chunk, version, joined) = (order.entry.chunk, order.entry.version, order.joined);
        let replicas = order.entry.replicas.clone();
        let none =
            |base| Copy { base, joined, suspects: Vec::new(), fresh: super::rebuild::no_blocks(order.block_count) };
        let tag_of = |copy: &Copy| {
            let suspects = widen_runs(copy.suspects.clone(), TAG_SUSPECTS_MAX);
            let state = CopyState::Rebuilding { base: copy.base, joined, suspects };
            ChunkTag { state, replicas: replicas.clone() }.encode()
        };
        let create = |copy: &Copy| StoreRequest::CreateChunk {
            chunk,
            volume: id,
            layer: order.entry.layer,
            index: order.entry.index,
            block_count: order.block_count,
            version,
            tag: tag_of(copy),
        };
        let Some(info) = self.store.chunk(chunk) else {
            let copy = Box::new(none(None));
            let request = create(&copy);
            return self.submit_control(now, id, Done::Rebuild { chunk, copy }, request);
        };
        let current = info.version;
        if info.volume != id || info.block_count != order.block_count {
            let error = format!("{chunk} is here with {} blocks of {}", info.block_count, info.volume);
            return self.rebuild_failed(chunk, error, out);
        }
        if current > version {
            // An order from before the version we have: the metadata servers give a newer one if it is still wanted.
            return self.drop_rebuild(chunk);
        }
        let state = ChunkTag::decode(&info.tag).map(|tag| tag.state);
        let tail: Vec<(u32, u32)> = self.tail_runs(id, chunk);
        let set_version = StoreRequest::SetVersion { chunk, version };
        // Is what the copy took since it joined still good, and does it know from which version on it needs blocks?
        let known = self.copies.get(&chunk);
        let kept = match (known, &state) {
            (Some(copy), _) if copy.joined == joined => {
                let fresh = copy.fresh.clone();
                Some(Copy { base: copy.base, joined, suspects: copy.suspects.clone(), fresh })
            }
            (Some(copy), _) if copy.joined > joined => return self.drop_rebuild(chunk),
            (None, Ok(CopyState::Rebuilt { joined: done })) if *done == joined => {
                let audience = Audience::Order(OrderKind::Rebuild, version);
                self.drop_rebuild(chunk);
                if current == version {
                    return self.tell(audience, chunk, Ok(CsReply::Done), out);
                }
                return self.submit_control(now, id, Done::Raise { chunk, audience }, set_version);
            }
            // Made by the holder at this membership before the order came: all it has, it took as a member.
            (None, _) if current >= joined => {
                let mut copy = none(None);
                tail.iter().for_each(|(first, count)| super::rebuild::set_blocks(&mut copy.fresh, *first, *count));
                Some(copy)
            }
            _ => None,
        };
        if let Some(copy) = kept {
            let request = StoreRequest::SetTag { chunk, tag: tag_of(&copy) };
            self.submit_control(now, id, Done::Step, request);
            let done = Done::Rebuild { chunk, copy: Box::new(copy) };
            return self.submit_control(now, id, done, set_version);
        }
        // A copy from an earlier membership: blocks it wrote that the others may never have got are fetched as well.
        let base = known.map_or(Some(current), |copy| copy.base);
        let mut suspects = known.map(|copy| copy.suspects.clone()).unwrap_or_default();
        if !planted!("cs_tail_forgotten_not_fetched") {
            suspects.extend(&tail);
        }
        let suspects = merge_runs(suspects);
        let copy = Copy { suspects, ..none(base) };
        self.submit_control(now, id, Done::Step, StoreRequest::SetTag { chunk, tag: tag_of(&copy) });
        self.submit_control(now, id, Done::Step, StoreRequest::ForgetTail { chunk });
        self.submit_control(now, id, Done::Rebuild { chunk, copy: Box::new(copy) }, set_version);
    }

    /// Runs of blocks of a chunk with unsettled writes.
    fn tail_runs(&self, id: VolumeId, chunk: ChunkId) -> Vec<(u32, u32)> {
        let entries = self.store.tail(id).filter(|entry| entry.chunk == chunk);
        merge_runs(entries.map(|entry| (entry.first_block, entry.block_count)).collect())
    }

    pub(super) fn on_control_done(
        &mut self,
        now: Now,
        id: VolumeId,
        done: Done,
        result: Result<StoreReply, StoreError>,
        out: &mut Effects,
    ) {
        self.volumes.get_mut(&id).expect("a volume with operations is kept").controls -= 1;
        let result = result.map(drop).map_err(|error| match error {
            StoreError::Failed { what } => CsError::DiskFailed(what),
            StoreError::NoSpace => CsError::NoSpace,
            other => CsError::Invalid(other.to_string()),
        });
        match done {
            Done::Step => {}
            Done::Fence { epoch, caller } => match result {
                Ok(()) => {
                    self.on_fenced(id, epoch);
                    self.answer_fenced(caller, id, out);
                }
                Err(error) => self.answer_call(caller, Err(error), out),
            },
            Done::Create { caller, chunk } => {
                if result.is_ok() {
                    self.mds.note_created(now, chunk);
                }
                self.answer_call(caller, result.map(|()| CsReply::Done), out);
            }
            Done::Raise { chunk, audience } => self.tell(audience, chunk, result.map(|()| CsReply::Done), out),
            Done::Delete { chunk, version } => {
                if result.is_ok() {
                    self.copies.remove(&chunk);
                }
                let error = result.err().map(|error| error.to_string());
                self.mds.order_done(OrderDone { chunk, version, kind: OrderKind::Delete, error });
            }
            Done::Rebuild { chunk, copy } => match result {
                Ok(()) => {
                    self.copies.insert(chunk, *copy);
                    self.rebuild_begun(now, chunk, out);
                }
                Err(error) => self.rebuild_failed(chunk, error.to_string(), out),
            },
            Done::EndRebuild { chunk, attempt } => self.on_rebuilt_tag(now, chunk, attempt, result, out),
        }
        self.drain(now, id, out);
    }

    fn on_fenced(&mut self, id: VolumeId, epoch: Epoch) {
        let volume = self.volumes.get_mut(&id).expect("a volume with operations is kept");
        if epoch <= volume.fenced {
            return;
        }
        assert_eq!(volume.writes, 0, "no write of an older epoch is under way when a fence takes hold");
        volume.previous = volume.fenced;
        volume.fenced = epoch;
        volume.floor = volume.floor.max(epoch);
        volume.marks = super::volume::marks_of(&self.store, id, epoch);
        volume.settled = Sequence(0);
        volume.settle_sent = Sequence(0);
    }

    fn answer_fenced(&mut self, caller: Caller, id: VolumeId, out: &mut Effects) {
        let volume = self.volumes.get(&id).expect("a volume with operations is kept");
        let tail = self.store.tail(id).count() as u64;
        let reply = CsReply::Fenced { boot: self.boot, tail, previous: volume.previous };
        self.answer_call(caller, Ok(reply), out);
    }

    /// Tells whoever asked how a version change ended.
    pub(super) fn tell(
        &mut self,
        audience: Audience,
        chunk: ChunkId,
        result: Result<CsReply, CsError>,
        out: &mut Effects,
    ) {
        match audience {
            Audience::Caller(caller) => self.answer_call(caller, result, out),
            Audience::Order(kind, version) => {
                let error = result.err().map(|error| error.to_string());
                self.mds.order_done(OrderDone { chunk, version, kind, error });
            }
            Audience::None => {}
        }
    }
}

/// Sorts runs of blocks and joins those that touch or overlap.
fn merge_runs(mut runs: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    runs.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(runs.len());
    for (first, count) in runs {
        match merged.last_mut() {
            Some(last) if last.0 + last.1 >= first => last.1 = last.1.max(first + count - last.0),
            _ => merged.push((first, count)),
        }
    }
    merged
}

/// At most `count_max` runs that hold all of these: the smallest gaps are closed. The runs are in order and apart.
fn widen_runs(runs: Vec<(u32, u32)>, count_max: usize) -> Vec<(u32, u32)> {
    if runs.len() <= count_max {
        return runs;
    }
    let mut gaps: Vec<(u32, usize)> =
        runs.windows(2).enumerate().map(|(at, pair)| (pair[1].0 - pair[0].0 - pair[0].1, at)).collect();
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    gaps.truncate(count_max - 1);
    let mut kept: Vec<usize> = gaps.into_iter().map(|(_, at)| at).collect();
    kept.sort_unstable();
    let ends = kept.iter().map(|at| runs[*at]).chain(runs.last().copied());
    let starts = runs.first().copied().into_iter().chain(kept.iter().map(|at| runs[at + 1]));
    starts.zip(ends).map(|(start, end)| (start.0, end.0 + end.1 - start.0)).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn many_runs_become_few_that_hold_them() {
        let runs = vec![(0, 2), (3, 1), (10, 5), (16, 1), (100, 1), (103, 2)];
        assert_eq!(super::widen_runs(runs.clone(), 6), runs);
        assert_eq!(super::widen_runs(runs.clone(), 3), [(0, 4), (10, 7), (100, 5)]);
        assert_eq!(super::widen_runs(runs.clone(), 2), [(0, 17), (100, 5)]);
        assert_eq!(super::widen_runs(runs, 1), [(0, 105)]);
    }

    #[test]
    fn runs_that_touch_become_one() {
        let merged = super::merge_runs(vec![(9, 1), (0, 2), (2, 3), (4, 4), (20, 1)]);
        assert_eq!(merged, [(0, 8), (9, 1), (20, 1)]);
    }
}
