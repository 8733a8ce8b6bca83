//! A copy rebuilt under random client traffic, with its server killed or cut from power again and again, must end equal
//! to its source, block by block. `CAIRN_SEEDS` raises the number of seeds.

use crate::world::*;
use cairn_env::Buf;
use cairn_stdx::{Rng, planted};
use cairn_types::*;
use cairn_wire::cs::{CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataRequest, DataStatus};
use std::collections::BTreeMap;

const EPOCH: u64 = 5;
/// Few hot blocks: contention finds bugs, space does not. They lie apart, so that a rebuild takes many reads.
const HOT: u64 = 48;

fn hot(rng: &mut Rng) -> u32 {
    rng.below(HOT) as u32 * 10
}

/// A write or unmap of the client, to be answered by both servers.
#[derive(Clone)]
struct Op {
    sequence: u64,
    first: u32,
    count: u32,
    /// Zero: an unmap.
    value: u64,
    sent: [Option<u64>; 2],
    ok: [bool; 2],
}

/// The lease holder, following the protocol rules for a set of two: node 0 current, node 1 rebuilding.
struct Holder {
    version: u64,
    sequence: u64,
    links: [Option<usize>; 2],
    generation: u64,
    boots: [u64; 2],
    pending: Vec<Op>,
    /// Writes answered by both and not settled: sequence, with the highest durable mark that counts for it.
    unsettled: BTreeMap<u64, (u32, u32)>,
    durable: [u64; 2],
    settled: u64,
    model: BTreeMap<u32, u64>,
    reconcile: bool,
}

impl Holder {
    fn connect(&mut self, world: &mut World, node: usize) {
        self.generation += 1;
        let client = world.client(node, 1, self.generation);
        let reply = world.fence(client, EPOCH);
        let Ok(CsReply::Fenced { boot, .. }) = reply else { panic!("{reply:?}") };
        if boot != self.boots[node] {
            self.boots[node] = boot;
            self.durable[node] = 0;
            self.reconcile |= node == 1;
        }
        self.links[node] = Some(client);
        for op in &mut self.pending {
            op.sent[node] = None;
        }
    }

    fn free(&self, first: u32, count: u32) -> bool {
        self.pending.iter().all(|op| op.first + op.count <= first || first + count <= op.first)
    }

    fn issue(&mut self, first: u32, count: u32, value: u64) {
        self.sequence += 1;
        let op = Op { sequence: self.sequence, first, count, value, sent: [None; 2], ok: [false; 2] };
        self.model.extend((first..first + count).map(|block| (block, value)));
        self.pending.push(op);
    }

    fn request(&self, op: &Op) -> (DataRequest, Buf) {
        let (mut request, data) = if op.value == 0 {
            let request = DataRequest {
                block_count: op.count,
                ..crate::world::op(DataOp::Unmap, self.version, EPOCH, op.sequence, op.first)
            };
            (request, Buf::default())
        } else {
            write(self.version, EPOCH, op.sequence, op.first, op.count, op.value)
        };
        request.settled = Sequence(self.settled);
        (request, data)
    }

    /// Sends what is unsent, takes answers, follows the links.
    fn turn(&mut self, world: &mut World) {
        for node in 0..2 {
            if world.nodes[node].core.as_ref().is_none_or(|core| core.start_report().is_none()) {
                self.links[node] = None;
                continue;
            }
            if self.links[node].is_none_or(|client| world.clients[client].closed) {
                self.connect(world, node);
            }
            let client = self.links[node].expect("connected above");
            for at in 0..self.pending.len() {
                let op = &self.pending[at];
                if op.ok[node] {
                    continue;
                }
                match op.sent[node] {
                    None => {
                        let (request, data) = self.request(op);
                        self.pending[at].sent[node] = Some(world.post_data(client, &request, data));
                    }
                    Some(id) => {
                        let Some((reply, _)) = world.clients[client].data.remove(&id) else { continue };
                        match reply.status {
                            DataStatus::Ok => {
                                self.pending[at].ok[node] = true;
                                self.durable[node] = self.durable[node].max(reply.durable.0);
                            }
                            DataStatus::VersionMismatch | DataStatus::NoSuchChunk if node == 1 => {
                                self.pending[at].sent[node] = None;
                            }
                            status => panic!("node {node} answers {status:?}"),
                        }
                    }
                }
            }
        }
        let done: Vec<Op> = self.pending.extract_if(.., |op| op.ok == [true; 2]).collect();
        self.unsettled.extend(done.into_iter().map(|op| (op.sequence, (op.first, op.count))));
        self.settle();
        if self.reconcile && self.links.iter().all(Option::is_some) && self.pending.iter().all(|op| op.ok[0]) {
            self.reconcile = false;
            self.reconcile_tails(world);
        }
    }

    /// Everything is answered by both, also after the last restart.
    fn is_done(&self, world: &World) -> bool {
        let connected = self.links.iter().flatten().filter(|client| !world.clients[**client].closed).count() == 2;
        connected && self.pending.is_empty() && !self.reconcile && world.nodes[1].orders.is_empty()
    }

    /// Rule 5.
    fn settle(&mut self) {
        if self.reconcile {
            return;
        }
        let open = self.pending.iter().map(|op| op.sequence).min().unwrap_or(u64::MAX);
        let mark = self.durable[0].min(self.durable[1]).min(open - 1).min(self.sequence);
        if mark > self.settled {
            self.settled = mark;
            self.unsettled.retain(|sequence, _| *sequence > mark);
        }
    }

    /// Rule 7, with the source as the only current replica: where the tails differ its block is written anew to both.
    fn reconcile_tails(&mut self, world: &mut World) {
        let mut latest = [BTreeMap::new(), BTreeMap::new()];
        for (node, latest) in latest.iter_mut().enumerate() {
            let client = self.links[node].expect("both are up");
            let request = CsRequest::Tail { volume: VOLUME, epoch: Epoch(EPOCH), skip: 0 };
            let Ok(CsReply::Tail { entries, end: true }) = world.call(client, request) else { panic!("a tail") };
            for entry in entries {
                for block in entry.first_block..entry.first_block + entry.block_count {
                    let mark = latest.entry(block).or_insert((entry.epoch, entry.sequence));
                    *mark = (*mark).max((entry.epoch, entry.sequence));
                }
            }
        }
        let unsettled: std::collections::BTreeSet<u32> =
            self.unsettled.values().flat_map(|(first, count)| *first..*first + *count).collect();
        for block in unsettled {
            if latest[0].get(&block) != latest[1].get(&block) && self.free(block, 1) {
                let value = self.model[&block];
                self.issue(block, 1, value);
            }
        }
    }
}

/// One seed; gives what the two copies hold, and what they should.
fn run(seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed).split(99);
    let mut world = World::new(seed, 2);
    let mut holder = Holder {
        version: 1,
        sequence: 0,
        links: [None; 2],
        generation: 0,
        boots: [0; 2],
        pending: Vec::new(),
        unsettled: BTreeMap::new(),
        durable: [0; 2],
        settled: 0,
        model: BTreeMap::new(),
        reconcile: false,
    };
    holder.connect(&mut world, 0);
    let first = holder.links[0].expect("connected");
    world.create(first, 1, EPOCH);
    let once_member = rng.chance(2, 3);
    if once_member {
        holder.connect(&mut world, 1);
        let second = holder.links[1].expect("connected");
        world.create(second, 1, EPOCH);
    }
    // Both at version 1; writes reach one, the other or both.
    for _ in 0..rng.below(60) {
        let (first, count) = (hot(&mut rng), 1 + rng.below(4) as u32);
        let value = if rng.chance(1, 5) { 0 } else { rng.next_u64() | 1 };
        holder.issue(first, count, value);
        let mut op = holder.pending.pop().expect("just issued");
        let reach = rng.below(6);
        for node in 0..2 {
            let reached = node == 0 || (once_member && reach != 0);
            let Some(client) = holder.links[node].filter(|_| reached) else { continue };
            let (request, data) = holder.request(&op);
            let (reply, _) = world.data(client, &request, data);
            assert_eq!(reply.status, DataStatus::Ok);
            op.ok[node] = true;
        }
        if once_member && rng.chance(1, 12) {
            // A write that only the second got, of a sequence that is never repeated.
            holder.sequence += 1;
            let (request, data) = write(1, EPOCH, holder.sequence, hot(&mut rng), 1, 666);
            world.data(holder.links[1].expect("connected"), &request, data);
        }
    }
    // The second leaves the set at 2 and joins at 3.
    for version in 2..=3 {
        crate::rebuilds::raise_at(&mut world, first, 1, version, EPOCH);
        holder.version = version;
        for _ in 0..rng.below(20) {
            if version == 3 {
                break;
            }
            holder.issue(hot(&mut rng), 1, rng.next_u64() | 1);
            let op = holder.pending.pop().expect("just issued");
            let (request, data) = holder.request(&op);
            assert_eq!(world.data(first, &request, data).0.status, DataStatus::Ok);
        }
    }
    holder.durable = [0; 2];
    world.order(1, rebuild(1, 3, 3, &[0]));
    let crashes = rng.below(4);
    let (rate, pace) = (1 + rng.below(6), 2 + rng.below(11));
    let (mut crashed, mut down) = (0, 0);
    for step in 0..3000u64 {
        // Writes after the end of the rebuild would only hide what went wrong in it.
        let open = !world.nodes[1].orders.is_empty() && step < 2000;
        if open && holder.pending.len() < 8 && rng.chance(1, rate) && !holder.reconcile {
            let (first, count) = (hot(&mut rng), 1 + rng.below(3) as u32);
            if holder.free(first, count) {
                let value = if rng.chance(1, 5) { 0 } else { rng.next_u64() | 1 };
                holder.issue(first, count, value);
            }
        }
        for _ in 0..rng.below(pace) {
            world.progress();
        }
        if rng.chance(1, 40) {
            world.pass_without_settling(Duration::from_millis(rng.below(400)));
        }
        if down > 0 {
            down -= 1;
            if down == 0 {
                world.start(1);
            }
        } else if crashed < crashes && step > 20 && rng.chance(1, 150) {
            crashed += 1;
            if rng.chance(1, 2) {
                world.kill(1)
            } else {
                world.power_cut(1)
            }
            down = 1 + rng.below(60);
        }
        holder.turn(&mut world);
        if !open && down == 0 && holder.is_done(&world) {
            break;
        }
    }
    if down > 0 {
        world.start(1);
    }
    for _ in 0..2000 {
        if holder.is_done(&world) {
            break;
        }
        world.pass(Duration::from_millis(50));
        holder.turn(&mut world);
    }
    if !holder.is_done(&world) {
        return Err(format!("seed {seed}: it does not end: {:?} {:?}", world.nodes[1].done, world.nodes[1].log));
    }
    let mut found = Vec::new();
    for node in 0..2 {
        holder.connect(&mut world, node);
        let client = holder.links[node].expect("connected");
        found.push(world.read_all(client, 3, EPOCH).map_err(|status| format!("seed {seed}: node {node}: {status:?}"))?);
    }
    for block in 0..BLOCKS {
        let expected = holder.model.get(&block).copied().unwrap_or(0);
        let (left, right) = (found[0][block as usize], found[1][block as usize]);
        if left != expected || right != expected {
            return Err(format!("seed {seed}: block {block}: source {left:x}, copy {right:x}, written {expected:x}"));
        }
    }
    Ok(())
}

fn seeds() -> u64 {
    std::env::var("CAIRN_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn a_copy_rebuilt_under_writes_and_crashes_equals_its_source() {
    for seed in 1..=seeds() {
        if let Err(what) = run(seed) {
            panic!("{what}");
        }
    }
}

#[test]
fn planted_rebuild_bugs_are_seen() {
    if !planted::available() {
        return;
    }
    for bug in ["cs_rebuild_loses_new_writes", "cs_rebuilt_before_last_block", "cs_tail_forgotten_not_fetched"] {
        planted::activate(Some(bug));
        let caught = (1..=seeds().max(300)).find(|seed| {
            let seed = *seed;
            std::panic::catch_unwind(move || run(seed)).map_or(true, |result| result.is_err())
        });
        planted::activate(None);
        assert!(caught.is_some(), "nobody saw {bug}");
    }
}
