//! What clients do: they fight for a few volumes, write stamped blocks to few hot places, and keep house in the
//! namespace.

use super::fsx::FileOp;
use super::{Answer, Scenario, TOKEN_CLIENT, Verdict, broken};
use crate::checkers::names::{CallId, NameOp};
use crate::checkers::shadow::{Broken, Invariant, OpId};
use crate::stamp::Stamp;
use crate::world::SECOND;
use cairn_client::{ClientCore, OpenError, SizeRule, VolumeHandle};
use cairn_env::Buf;
use cairn_env::block::{BlockError, BlockOp, BlockReply, BlockResult};
use cairn_stdx::Rng;
use cairn_types::{BLOCK_SIZE_U64, Epoch, InodeId, VolumeId};
use cairn_wire::mds::{InodeKind, LeaseMode, MdsError, MdsReply, MdsRequest, RenameMode};
use std::collections::BTreeMap;

/// What a client has in flight.
#[derive(Debug)]
#[expect(dead_code, reason = "shown when an operation is stuck")]
pub(super) enum Kind {
    /// A call of the setup.
    Setup,
    /// A call of the operator's.
    Operator,
    /// The operator's call to raise the cluster.
    Raise,
    Open {
        volume: usize,
    },
    Close {
        volume: usize,
    },
    Read {
        volume: usize,
        op: OpId,
        first: u64,
    },
    Write {
        volume: usize,
        op: OpId,
        first: u64,
        values: Vec<u64>,
        durable: bool,
    },
    CompareAndWrite {
        volume: usize,
        op: OpId,
        first: u64,
        old: u64,
        new: u64,
    },
    Flush {
        volume: usize,
    },
    Extents {
        volume: usize,
    },
    Create {
        name: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Unlink {
        name: String,
    },
    /// On a file.
    File {
        file: usize,
        op: FileOp,
    },
    /// On a name that clients share.
    Shared {
        call: CallId,
        op: NameOp,
    },
}

impl Kind {
    /// The volume that is read or written.
    fn volume(&self) -> Option<usize> {
        match self {
            Kind::Read { volume, .. } | Kind::Write { volume, .. } | Kind::CompareAndWrite { volume, .. } => {
                Some(*volume)
            }
            _ => None,
        }
    }

    /// True when it writes other bytes than zeros: nothing else may fail for lack of room.
    fn needs_room(&self) -> bool {
        match self {
            Kind::Write { values, .. } => values.iter().any(|value| *value != 0),
            Kind::CompareAndWrite { .. } => true,
            _ => false,
        }
    }
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Pending {
    pub client: usize,
    pub since: u64,
    pub kind: Kind,
}

/// What clients of a cluster with small disks are after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mood {
    Usual,
    Fill,
    Drain,
}

/// How long a mood lasts.
const MOOD_NS: u64 = 6 * SECOND;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    Closed,
    Opening,
    Open(VolumeHandle),
    Closing,
}

/// One client's state.
pub(super) struct Load {
    rng: Rng,
    holds: Vec<Hold>,
    recalled: Vec<bool>,
    /// Opened to read only.
    shared: Vec<bool>,
    /// Under which epoch.
    epochs: Vec<Epoch>,
    in_flight: usize,
    /// Last value this client wrote or read, by volume and block: what a compare-and-write expects.
    known: BTreeMap<(usize, u64), u64>,
    /// Files this client made and nobody else touches.
    files: Vec<String>,
}

impl Load {
    pub fn new(rng: Rng) -> Self {
        Self {
            rng,
            holds: Vec::new(),
            recalled: Vec::new(),
            shared: Vec::new(),
            epochs: Vec::new(),
            in_flight: 0,
            known: BTreeMap::new(),
            files: Vec::new(),
        }
    }

    pub fn know_volumes(&mut self, count: usize) {
        self.holds = vec![Hold::Closed; count];
        self.recalled = vec![false; count];
        self.shared = vec![false; count];
        self.epochs = vec![Epoch(0); count];
    }

    /// The process died: handles and operations died with it.
    pub fn died(&mut self) {
        let count = self.holds.len();
        self.know_volumes(count);
        self.in_flight = 0;
        self.known.clear();
    }

    pub fn volume_of(&self, handle: VolumeHandle) -> Option<usize> {
        self.holds.iter().position(|hold| *hold == Hold::Open(handle))
    }

    pub fn recalled(&mut self, handle: VolumeHandle) {
        if let Some(volume) = self.volume_of(handle) {
            self.recalled[volume] = true;
        }
    }
}

impl Scenario {
    fn begin(&mut self, client: usize, kind: Kind) -> u64 {
        let token = self.token();
        self.loads[client].in_flight += 1;
        self.pending.insert(token, Pending { client, since: self.now(), kind });
        token
    }

    pub(super) fn is_idle(&self, client: usize) -> bool {
        let node = &self.cluster.world.nodes[self.cluster.clients[client].0];
        node.process.is_none() || node.paused
    }

    /// One step of a client's load.
    pub(super) fn act(&mut self, client: usize) {
        if !self.chaos {
            return;
        }
        let think = self.plan.think;
        let after = self.loads[client].rng.range(think / 20, think);
        self.cluster.world.wake_driver(after, TOKEN_CLIENT + client as u64);
        // Who waits for room does not wait with trimming.
        let in_flight_max = self.plan.in_flight_max + if self.mood() == Mood::Drain { 8 } else { 0 };
        if self.is_idle(client) || self.loads[client].in_flight >= in_flight_max {
            return;
        }
        let only_trims = self.loads[client].in_flight >= self.plan.in_flight_max;
        let load = &mut self.loads[client];
        if only_trims {
            let volume = load.rng.below(load.holds.len() as u64) as usize;
            if let (Hold::Open(handle), false) = (load.holds[volume], load.shared[volume]) {
                self.drain(client, volume, handle);
            }
            return;
        }
        if load.rng.chance(1, 25) {
            return self.act_on_names(client);
        }
        let volume = load.rng.below(load.holds.len() as u64) as usize;
        let hold = load.holds[volume];
        let leaves = matches!(hold, Hold::Open(_)) && load.rng.chance(1, 120);
        let leaves = leaves && !self.waits_for_room(client, volume);
        let load = &mut self.loads[client];
        match hold {
            Hold::Closed if load.rng.chance(1, 4) => self.open(client, volume),
            Hold::Open(handle) if leaves => self.release(client, volume, handle),
            Hold::Open(handle) => self.act_on_blocks(client, volume, handle),
            Hold::Closed | Hold::Opening | Hold::Closing => {}
        }
    }

    /// What clients are after now.
    fn mood(&self) -> Mood {
        match (self.plan.full, self.draining) {
            (false, _) => Mood::Usual,
            (true, true) => Mood::Drain,
            (true, false) => [Mood::Fill, Mood::Usual, Mood::Fill, Mood::Drain][(self.now() / MOOD_NS % 4) as usize],
        }
    }

    /// Opens a volume for writing, or to read it only.
    pub(super) fn open(&mut self, client: usize, volume: usize) {
        let load = &mut self.loads[client];
        load.holds[volume] = Hold::Opening;
        let shared = self.plan.full && self.chaos && !self.draining && load.rng.chance(1, 3);
        load.shared[volume] = shared;
        let mode = if shared { LeaseMode::Shared } else { LeaseMode::Exclusive };
        let id = self.volumes[volume].info.volume;
        let token = self.begin(client, Kind::Open { volume });
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Open(result))));
            core.open(now, id, mode, SizeRule::Fixed, done, out);
        });
    }

    /// True when a client has writes under way where disks are full: who closes meanwhile can make no room any more,
    /// and nobody else can while it holds the lease.
    fn waits_for_room(&self, client: usize, volume: usize) -> bool {
        let writes = |kind: &Kind| matches!(kind, Kind::Write { volume: of, .. } | Kind::CompareAndWrite { volume: of, .. } if *of == volume);
        self.plan.full
            && self.pending.values().any(|op| op.client == client && writes(&op.kind) && op.kind.needs_room())
    }

    fn release(&mut self, client: usize, volume: usize, handle: VolumeHandle) {
        let load = &mut self.loads[client];
        load.holds[volume] = Hold::Closing;
        load.recalled[volume] = false;
        load.known.retain(|(of, _), _| *of != volume);
        let lease_too = load.rng.chance(3, 4);
        let token = self.begin(client, Kind::Close { volume });
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move || mailbox.borrow_mut().push((token, Answer::Closed)));
            if lease_too {
                core.release(now, handle, done, out);
            } else {
                core.close(now, handle, done, out);
            }
        });
    }

    /// Gives back what others want, sooner or later.
    pub(super) fn release_recalled(&mut self) {
        for client in 0..self.loads.len() {
            for volume in 0..self.loads[client].holds.len() {
                let load = &mut self.loads[client];
                let Hold::Open(handle) = load.holds[volume] else { continue };
                let now = load.recalled[volume] && load.rng.chance(1, 10);
                if now && !self.is_idle(client) && !self.waits_for_room(client, volume) {
                    self.release(client, volume, handle);
                }
            }
        }
    }

    fn submit(&mut self, client: usize, handle: VolumeHandle, op: BlockOp, kind: Kind) {
        let token = self.begin(client, kind);
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Block(result))));
            core.submit(now, handle, op, done, out);
        });
    }

    fn stamped(&mut self, id: VolumeId, unit: u64, first: u64, count: u64) -> (Vec<u64>, Buf) {
        let values: Vec<u64> = (0..count).map(|i| self.next_value + 1 + i).collect();
        self.next_value += count;
        let mut bytes = vec![0; (unit * count) as usize];
        for (i, piece) in bytes.chunks_exact_mut(unit as usize).enumerate() {
            Stamp::fill(piece, id.0, first + i as u64, values[i]);
        }
        (values, Buf::copy_from(&bytes))
    }

    /// A range of a volume, most often in one of few hot places; one of them lies across two chunks.
    fn draw_range(&mut self, client: usize, volume: usize) -> (u64, u64) {
        let SimVolume { units, unit } = self.geometry(volume);
        let rng = &mut self.loads[client].rng;
        let hot = [0, (1 << 20) / unit - 3, units / 2 + 1, units - 8];
        let first =
            if rng.chance(4, 5) { hot[rng.below(hot.len() as u64) as usize] + rng.below(4) } else { rng.below(units) };
        let first = first.min(units - 1);
        let count = if rng.chance(1, 30) { rng.range(1, 300) } else { rng.range(1, 9) };
        (first, count.min(units - first))
    }

    fn act_on_blocks(&mut self, client: usize, volume: usize, handle: VolumeHandle) {
        let (id, unit) = (self.volumes[volume].info.volume, self.volumes[volume].unit);
        let (first, count) = self.draw_range(client, volume);
        let (offset, len) = (first * unit, count * unit);
        let now = self.now();
        let choice = self.loads[client].rng.below(100);
        let choice = match self.mood() {
            _ if self.only_reads(client) || self.loads[client].shared[volume] => choice % 40,
            Mood::Fill if choice < 60 => return self.fill(client, volume, handle),
            Mood::Drain if choice < 60 => return self.drain(client, volume, handle),
            _ => choice,
        };
        match choice {
            0..40 => self.read(client, volume, handle, first, count),
            40..82 => {
                let durable = choice < 46;
                let (values, data) = self.stamped(id, unit, first, count);
                let op = self.shadow.write_submitted(now, id.0, first, values.clone());
                let kind = Kind::Write { volume, op, first, values, durable };
                self.submit(client, handle, BlockOp::Write { offset, data, fua: durable }, kind);
            }
            82..88 => self.submit(client, handle, BlockOp::Flush, Kind::Flush { volume }),
            88..93 => {
                let values = vec![0; count as usize];
                let op = self.shadow.write_submitted(now, id.0, first, values.clone());
                let durable = choice == 88;
                let request = if choice < 90 {
                    BlockOp::WriteZeroes { offset, len, fua: durable }
                } else {
                    BlockOp::Discard { offset, len }
                };
                self.submit(client, handle, request, Kind::Write { volume, op, first, values, durable });
            }
            93..97 => {
                let Some(&old) = self.loads[client].known.get(&(volume, first)) else { return };
                let mut expected = vec![0; unit as usize];
                Stamp::fill(&mut expected, id.0, first, old);
                let (values, data) = self.stamped(id, unit, first, 1);
                let op = self.shadow.write_submitted(now, id.0, first, values.clone());
                let kind = Kind::CompareAndWrite { volume, op, first, old, new: values[0] };
                let compare = Buf::copy_from(&expected);
                self.submit(client, handle, BlockOp::CompareAndWrite { offset, compare, data, fua: false }, kind);
            }
            _ => self.submit(client, handle, BlockOp::Extents { offset, len }, Kind::Extents { volume }),
        }
    }

    /// A place for a long request of whole blocks.
    fn draw_run(&mut self, client: usize, volume: usize) -> (u64, u64) {
        let SimVolume { units, unit } = self.geometry(volume);
        let (per_block, rng) = (BLOCK_SIZE_U64 / unit, &mut self.loads[client].rng);
        let blocks = units / per_block;
        let first = rng.below(blocks);
        let count = rng.range(16, 200).min(blocks - first);
        (first * per_block, count * per_block)
    }

    /// Writes many blocks at once.
    fn fill(&mut self, client: usize, volume: usize, handle: VolumeHandle) {
        let (id, unit) = (self.volumes[volume].info.volume, self.volumes[volume].unit);
        let (first, count) = self.draw_run(client, volume);
        let (values, data) = self.stamped(id, unit, first, count);
        let op = self.shadow.write_submitted(self.now(), id.0, first, values.clone());
        let kind = Kind::Write { volume, op, first, values, durable: false };
        self.submit(client, handle, BlockOp::Write { offset: first * unit, data, fua: false }, kind);
    }

    /// Trims many blocks at once, but for those that somebody is writing: it would wait for them.
    fn drain(&mut self, client: usize, volume: usize, handle: VolumeHandle) {
        let (id, unit) = (self.volumes[volume].info.volume, self.volumes[volume].unit);
        let (first, count) = self.draw_run(client, volume);
        let overlaps = |kind: &Kind| match kind {
            Kind::Write { volume: of, first: other, values, .. } => {
                *of == volume && first < other + values.len() as u64 && *other < first + count
            }
            Kind::CompareAndWrite { volume: of, first: other, .. } => {
                *of == volume && (first..first + count).contains(other)
            }
            _ => false,
        };
        if self.pending.values().any(|op| op.client == client && overlaps(&op.kind)) {
            return;
        }
        let values = vec![0; count as usize];
        let op = self.shadow.write_submitted(self.now(), id.0, first, values.clone());
        let kind = Kind::Write { volume, op, first, values, durable: false };
        self.submit(client, handle, BlockOp::Discard { offset: first * unit, len: count * unit }, kind);
    }

    /// The faults are over: clients trim until whoever waited for room has got it (I16).
    pub(super) fn drain_at_last(&mut self) -> Verdict {
        let (waiting, until): (Vec<u64>, u64) = (self.pending.keys().copied().collect(), self.now() + 15 * SECOND);
        self.wait("space that was returned is used", super::END_WITHIN, |s| {
            s.now() >= until && waiting.iter().all(|token| !s.pending.contains_key(token))
        })
        .map_err(|broken| Box::new(Broken { invariant: Invariant::I16, ..*broken }))
    }

    /// Reads blocks and has them judged.
    fn read(&mut self, client: usize, volume: usize, handle: VolumeHandle, first: u64, count: u64) {
        let (id, unit) = (self.volumes[volume].info.volume, self.volumes[volume].unit);
        let op = self.shadow.read_submitted(self.now(), id.0, first);
        let request = BlockOp::Read { offset: first * unit, len: (count * unit) as u32 };
        self.submit(client, handle, request, Kind::Read { volume, op, first });
    }

    /// Reads a whole volume through an open handle.
    pub(super) fn read_all(&mut self, client: usize, volume: usize) -> Verdict {
        let SimVolume { units, unit } = self.geometry(volume);
        let (handle, known) = match self.loads[client].holds[volume] {
            Hold::Open(handle) if self.disaster.happened => (Some(handle), self.found_size(client, handle) / unit),
            Hold::Open(handle) => (Some(handle), units),
            Hold::Closed if self.disaster.happened => (None, 0),
            _ => return Err(broken(Invariant::I17, format!("volume {volume} could not be opened after healing"))),
        };
        let known = known.min(units);
        let step = (256 << 10) / unit;
        for first in (0..known).step_by(step as usize) {
            self.read(client, volume, handle.expect("it has a size"), first, step.min(known - first));
        }
        if known < units {
            // What was not found again had better be zeros.
            let now = self.now();
            let op = self.shadow.read_submitted(now, self.volumes[volume].info.volume.0, known);
            let zeros = vec![0; ((units - known) * unit) as usize];
            self.shadow.read_answered(now, op, &zeros, unit as usize).map_err(Box::new)?;
        }
        Ok(())
    }

    fn found_size(&mut self, client: usize, handle: VolumeHandle) -> u64 {
        let node = self.cluster.clients[client];
        let known = self.cluster.world.inspect::<ClientCore, _>(node, |core| core.volume(handle)).flatten();
        known.map_or(0, |(_, _, size)| size)
    }

    fn geometry(&self, volume: usize) -> SimVolume {
        let volume = &self.volumes[volume];
        SimVolume { units: volume.info.size / volume.unit, unit: volume.unit }
    }

    fn act_on_names(&mut self, client: usize) {
        self.next_name += 1;
        let fresh = format!("c{client}-{}", self.next_name);
        let (parent, name) = (InodeId::ROOT, |name: &String| name.as_bytes().to_vec());
        let load = &mut self.loads[client];
        let pick = load.rng.below(3);
        let (request, kind) = if load.files.is_empty() || pick == 0 {
            let create = MdsRequest::Create {
                parent,
                name: name(&fresh),
                kind: InodeKind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
                rdev: 0,
                lease: false,
            };
            (create, Kind::Create { name: fresh })
        } else {
            let at = load.rng.below(load.files.len() as u64) as usize;
            let old = load.files.swap_remove(at);
            if pick == 1 {
                let (new_parent, new_name, mode) = (parent, name(&fresh), RenameMode::Replace);
                let rename = MdsRequest::Rename { parent, name: name(&old), new_parent, new_name, mode };
                (rename, Kind::Rename { from: old, to: fresh })
            } else {
                (MdsRequest::Unlink { parent, name: name(&old) }, Kind::Unlink { name: old })
            }
        };
        let token = self.begin(client, kind);
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Call(result))));
            core.call(now, request, done, out);
        });
    }

    /// An operation ended.
    pub(super) fn on_answer(&mut self, token: u64, answer: Answer) -> Verdict {
        let Some(Pending { client, since, kind }) = self.pending.remove(&token) else { return Ok(()) };
        if let (&Kind::Shared { call, op }, Answer::Call(result)) = (&kind, &answer) {
            return self.on_shared_name(call, op, result.clone());
        }
        if let (Kind::Raise, Answer::Call(result)) = (&kind, &answer) {
            self.on_raise(result);
            return Ok(());
        }
        if let (Kind::Operator, Answer::Call(result)) = (&kind, &answer) {
            return self.on_operator(result.clone());
        }
        self.loads[client].in_flight = self.loads[client].in_flight.saturating_sub(1);
        match (kind, answer) {
            (Kind::Setup, Answer::Call(result)) => {
                self.replies.insert(token, result);
                Ok(())
            }
            (Kind::Open { volume }, Answer::Open(result)) => self.on_opened(client, volume, result),
            (Kind::Close { volume }, Answer::Closed) => {
                self.loads[client].holds[volume] = Hold::Closed;
                self.eras.closed(client, volume);
                Ok(())
            }
            (kind, Answer::Block(result)) => self.on_block(client, since, kind, result),
            (kind, Answer::Call(result)) => self.on_name(client, kind, result),
            (kind, _) => Err(broken(Invariant::Assertion, format!("{kind:?} was answered by something else"))),
        }
    }

    fn on_opened(&mut self, client: usize, volume: usize, result: Result<VolumeHandle, OpenError>) -> Verdict {
        let load = &mut self.loads[client];
        load.recalled[volume] = false;
        load.holds[volume] = match result {
            Ok(handle) => {
                load.holds[volume] = Hold::Open(handle);
                let shared = load.shared[volume];
                let (now, node) = (self.now(), self.cluster.clients[client]);
                let known = self.cluster.world.inspect::<ClientCore, _>(node, |core| {
                    core.volume(handle).map(|(_, epoch, _)| (epoch, core.is_read_only(handle)))
                });
                if let Some((epoch, only_reads)) = known.flatten() {
                    self.loads[client].epochs[volume] = epoch;
                    let id = self.volumes[volume].info.volume.0;
                    self.holders.opened(now, id, client, epoch, only_reads).map_err(Box::new)?;
                }
                self.took_over(client, volume);
                return self.holder_came(client, volume, shared);
            }
            Err(OpenError::Held { .. } | OpenError::Fenced(_) | OpenError::Closed) => Hold::Closed,
            // Nothing was found of it: it had better be empty.
            Err(OpenError::Mds(MdsError::NotFound(_))) if self.disaster.happened => Hold::Closed,
            Err(OpenError::Mds(MdsError::SessionEnded(_) | MdsError::Unavailable(_) | MdsError::Unknown)) => {
                Hold::Closed
            }
            Err(error) => {
                return Err(broken(Invariant::I17, format!("client {client} opens volume {volume}: {error}")));
            }
        };
        Ok(())
    }

    /// I5: from now on nothing shows that earlier holders had under way.
    fn took_over(&mut self, client: usize, volume: usize) {
        let (now, id) = (self.now(), self.volumes[volume].info.volume.0);
        let its = self.pending.values().filter(|op| op.client == client).filter_map(|op| match op.kind {
            Kind::Write { op, .. } | Kind::CompareAndWrite { op, .. } => Some(op),
            _ => None,
        });
        self.shadow.taken_over(now, id, &its.collect::<Vec<_>>());
    }

    fn on_block(&mut self, client: usize, since: u64, kind: Kind, result: BlockResult) -> Verdict {
        let now = self.now();
        let reply = match result {
            Ok(reply) => reply,
            Err(BlockError::Fenced | BlockError::Closed) => return Ok(()),
            Err(BlockError::NoSpace) if self.cluster.fails_when_full(client) && kind.needs_room() => {
                if let Kind::Write { op, .. } | Kind::CompareAndWrite { op, .. } = kind {
                    self.shadow.write_failed(now, op);
                }
                return Ok(());
            }
            Err(BlockError::NoSpace) => {
                return Err(broken(Invariant::I16, format!("client {client}: no room for {kind:?}")));
            }
            Err(BlockError::Miscompare { .. }) => {
                // Nothing was written.
                if let Kind::CompareAndWrite { volume, op, first, .. } = kind {
                    self.shadow.write_refused(op);
                    self.loads[client].known.remove(&(volume, first));
                }
                return Ok(());
            }
            Err(BlockError::Damaged { .. }) if self.did_a_disk_fail(since) => return Ok(()),
            Err(error @ BlockError::Damaged { .. }) => {
                return Err(broken(Invariant::I1, format!("client {client}, {kind:?}: {error}")));
            }
            Err(error) => return Err(broken(Invariant::I17, format!("client {client}, {kind:?}: {error}"))),
        };
        // A flush promises what was acknowledged before; where all of that is durable, nobody needs to be asked.
        if let Some(volume) = kind.volume().filter(|_| !matches!(kind, Kind::Flush { .. })) {
            let (id, epoch) = (self.volumes[volume].info.volume.0, self.loads[client].epochs[volume]);
            self.holders.answered(since, now, id, client, epoch).map_err(Box::new)?;
        }
        match kind {
            Kind::Read { volume, op, first } => {
                let BlockReply::Data(pieces) = reply else {
                    return Err(broken(Invariant::I2, "a read was answered without data"));
                };
                let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
                let unit = self.volumes[volume].unit as usize;
                self.shadow.read_answered(now, op, &bytes, unit).map_err(Box::new)?;
                for (i, &value) in self.shadow.values(op).iter().enumerate() {
                    self.loads[client].known.insert((volume, first + i as u64), value);
                }
            }
            Kind::Write { volume, op, first, values, durable } => {
                if durable {
                    self.shadow.durable_write_acknowledged(now, op);
                } else {
                    self.shadow.write_acknowledged(now, op);
                }
                for (i, value) in values.into_iter().enumerate() {
                    self.loads[client].known.insert((volume, first + i as u64), value);
                }
            }
            Kind::CompareAndWrite { volume, op, first, old, new } => {
                self.shadow.write_acknowledged(now, op);
                let id = self.volumes[volume].info.volume.0;
                self.shadow.observed(since, now, id, first, vec![old]);
                self.loads[client].known.insert((volume, first), new);
            }
            Kind::Flush { volume } => {
                self.eras.flushed(volume, since);
                self.shadow.flush_acknowledged(since, self.volumes[volume].info.volume.0);
            }
            _ => {}
        }
        Ok(())
    }

    /// I18: names are each client's own, so that every call but an interrupted one must succeed, once.
    fn on_name(&mut self, client: usize, kind: Kind, result: Result<MdsReply, MdsError>) -> Verdict {
        match (kind, result) {
            (kind, Err(error @ (MdsError::Posix(_) | MdsError::Exists(_) | MdsError::NotFound(_)))) => {
                Err(broken(Invariant::I18, format!("client {client}, {kind:?}: {error}")))
            }
            (Kind::Create { name } | Kind::Rename { to: name, .. }, Ok(_)) => {
                self.loads[client].files.push(name);
                Ok(())
            }
            // Interrupted calls leave names of unknown state behind; nobody looks at them again.
            _ => Ok(()),
        }
    }

    /// A process of a client died: what it had in flight will never be answered.
    pub(super) fn client_died(&mut self, client: usize) -> Verdict {
        self.pending.retain(|_, op| op.client != client);
        self.loads[client].died();
        self.mount_died(client);
        (0..self.volumes.len()).try_for_each(|volume| self.holder_left(client, volume))
    }

    /// Adds a client that has done nothing yet.
    pub(super) fn add_load(&mut self) -> usize {
        let mut load = Load::new(Rng::new(self.seed ^ SECOND));
        load.know_volumes(self.volumes.len());
        self.loads.push(load);
        self.cluster.create_client()
    }

    /// Files that must exist.
    pub(super) fn files(&self) -> impl Iterator<Item = &String> {
        self.loads.iter().flat_map(|load| &load.files)
    }
}

/// Size of a volume in units.
struct SimVolume {
    units: u64,
    unit: u64,
}
