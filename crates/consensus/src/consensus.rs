//! The public face of the core: opening, and the calls of the shell.

use crate::config::{Config, Initial};
use crate::entry;
use crate::error::{OpenError, ProposeError, ReadIndexError, ReceiveError};
use crate::members::{Change, ChangeError};
use crate::node::Node;
use crate::output::{Output, Status};
use crate::recover::{self, Reader, Recovered};
use crate::wal::Wal;
use cairn_env::{DiskDone, DiskOp, IoId};
use cairn_stdx::{Rng, planted};
use cairn_types::{Instant, MdsId};
use raft::StateRole;

/// One member of the group of metadata servers.
///
/// The shell calls [`start`](Self::start), then feeds events, and ends each turn of its loop with
/// [`turn`](Self::turn) before it carries out what has gathered in the [`Output`].
pub struct Consensus {
    config: Config,
    state: State,
}

/// Where the state machine stands when the log opens.
#[derive(Clone, Copy)]
pub(crate) enum Applied {
    At(u64),
    /// It has nothing: where the log does not begin with the first entry, it must get an image before anything else.
    Nothing,
}

enum State {
    New,
    Reading {
        reader: Reader,
        applied: Applied,
        nonce: u64,
    },
    /// Makes what was read durable: the newest group is written again, then all is flushed (`flushing`).
    Settling {
        found: Box<Recovered>,
        wal: Wal,
        flushing: bool,
        io: IoId,
        applied: Applied,
        nonce: u64,
    },
    Open(Box<Node>),
    Closed,
}

impl Consensus {
    /// The operations that make a new log, to be carried out one after the other, each after the previous completed.
    /// `instance` is a fresh random number, not zero; it goes into the [`Member`](crate::Member) of this node.
    pub fn format(config: &Config, instance: u64, initial: &Initial) -> Vec<DiskOp> {
        recover::format(config, instance, initial)
    }

    /// A node that has not read its log yet.
    pub fn new(config: Config) -> Self {
        config.validate();
        Self { config, state: State::New }
    }

    /// Begins to read the log; `Output::opened` tells the end. `applied` is the index up to which the state machine is
    /// durable; entries after it are emitted again.
    pub fn start(&mut self, now: Instant, applied: u64, rng: &mut Rng, out: &mut Output) {
        self.begin(now, Applied::At(applied), rng, out);
    }

    /// As [`start`](Self::start) with a state machine that has nothing, which is well for a new log. A log that was
    /// compacted lacks what made its state: the node then votes and acknowledges with its log as ever, which is whole,
    /// but emits nothing and stands for no election until an image was installed (`Status::state_lost`).
    pub fn start_without_state(&mut self, now: Instant, rng: &mut Rng, out: &mut Output) {
        self.begin(now, Applied::Nothing, rng, out);
    }

    fn begin(&mut self, now: Instant, applied: Applied, rng: &mut Rng, out: &mut Output) {
        assert!(matches!(self.state, State::New), "a node starts once");
        let _ = now;
        let mut reader = Reader::new(&self.config);
        reader.issue(&mut out.disk);
        self.state = State::Reading { reader, applied, nonce: rng.next_u64() };
    }

    /// Takes the completion of a disk request.
    pub fn disk_done(&mut self, now: Instant, done: DiskDone, out: &mut Output) {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Reading { mut reader, applied, nonce } => {
                self.state = match reader.done(done, &mut out.disk) {
                    Ok(None) => State::Reading { reader, applied, nonce },
                    Ok(Some(bytes)) => match recover::recover(&self.config, &bytes, reader.next_io) {
                        Ok(mut found) => {
                            let ring = std::mem::take(&mut found.ring);
                            let mut wal = Wal::new(&self.config, found.identity, ring);
                            // What was read may lie in a volatile cache; nothing relies on it before a flush. And the
                            // flush of the newest group may have failed: then only writing it again makes it durable.
                            let newest = std::mem::take(&mut found.newest);
                            let flushing = planted!("raft_recovered_not_rewritten");
                            let request = if flushing { wal.barrier() } else { wal.again(newest) };
                            let io = request.io;
                            out.disk.push(request);
                            State::Settling { found: Box::new(found), wal, flushing, io, applied, nonce }
                        }
                        Err(error) => closed(out, error),
                    },
                    Err(error) => closed(out, OpenError::Read(error)),
                };
            }
            State::Settling { found, mut wal, flushing, io, applied, nonce } => {
                assert_eq!(done.io, io, "a completion nobody waits for");
                self.state = match done.result {
                    Err(error) => closed(out, OpenError::Read(error)),
                    Ok(_) if !flushing => {
                        let request = wal.barrier();
                        let io = request.io;
                        out.disk.push(request);
                        State::Settling { found, wal, flushing: true, io, applied, nonce }
                    }
                    Ok(_) => match Node::open(&self.config, *found, wal, applied, nonce, now, out) {
                        Ok(node) => State::Open(Box::new(node)),
                        Err(error) => closed(out, error),
                    },
                };
            }
            State::Open(mut node) => {
                self.state = match node.disk_done(&done, out) {
                    Ok(()) => State::Open(node),
                    Err(error) => {
                        out.failed = Some(error);
                        State::Closed
                    }
                };
            }
            // Completions of requests that were in flight when the log closed.
            state @ (State::New | State::Closed) => self.state = state,
        }
    }

    pub(crate) fn node(&self) -> Option<&Node> {
        match &self.state {
            State::Open(node) => Some(node),
            _ => None,
        }
    }

    pub(crate) fn node_mut(&mut self) -> Option<&mut Node> {
        match &mut self.state {
            State::Open(node) => Some(node),
            _ => None,
        }
    }

    /// When `tick` wants to be called next.
    pub fn next_tick(&self) -> Option<Instant> {
        self.node().map(|node| node.next_tick)
    }

    /// Lets time pass. One tick at most per call: a node that slept hears its messages before it suspects its leader.
    pub fn tick(&mut self, now: Instant, rng: &mut Rng, out: &mut Output) {
        let State::Open(node) = &mut self.state else { return };
        if now >= node.next_tick {
            let due = node.next_tick + self.config.tick;
            node.next_tick = if due > now { due } else { now + self.config.tick };
            node.tick(&self.config, rng, out);
        }
    }

    /// Takes a message of peer `from`.
    ///
    /// # Errors
    /// [`ReceiveError`] when the message is refused; the node is unharmed.
    pub fn receive(&mut self, _now: Instant, from: MdsId, bytes: &[u8], _out: &mut Output) -> Result<(), ReceiveError> {
        let State::Open(node) = &mut self.state else { return Err(ReceiveError::Closed) };
        node.receive(&self.config, from, bytes)
    }

    /// Queues a command for the next turn. `token` comes back with the committed entry, or in `Output::dropped`.
    ///
    /// # Errors
    /// [`ProposeError`]; nothing was started then.
    pub fn propose(&mut self, token: u64, data: Vec<u8>) -> Result<(), ProposeError> {
        let State::Open(node) = &mut self.state else { return Err(ProposeError::Closed) };
        node.check_leads()?;
        let (size, max) = (data.len() as u64, self.config.command_size_max());
        if size == 0 || size > max {
            return Err(ProposeError::Size { size, max });
        }
        node.queue(&self.config, token, entry::command_entry(data))
    }

    /// Queues a configuration change for the next turn.
    ///
    /// # Errors
    /// [`ProposeError`]; among them `ChangePending` while another change is not applied here.
    pub fn propose_change(&mut self, token: u64, change: Change) -> Result<(), ProposeError> {
        let State::Open(node) = &mut self.state else { return Err(ProposeError::Closed) };
        node.check_leads()?;
        if node.change_queued || node.raw.raft.has_pending_conf() {
            return Err(ProposeError::ChangePending);
        }
        node.raw.store().members().after(change)?;
        if change == Change::Remove(node.identity.id) {
            return Err(ProposeError::RemoveLeader);
        }
        node.queue(&self.config, token, entry::change_entry(change))?;
        node.change_queued = true;
        Ok(())
    }

    /// Hands leadership to voter `to`. It happens within an election timeout or not at all.
    ///
    /// # Errors
    /// [`ProposeError`] when this node does not lead or `to` is no voter.
    pub fn transfer_leader(&mut self, to: MdsId) -> Result<(), ProposeError> {
        let State::Open(node) = &mut self.state else { return Err(ProposeError::Closed) };
        node.check_leads()?;
        if !node.raw.store().members().voters.contains_key(&to) {
            return Err(ChangeError::NotMember(to).into());
        }
        node.raw.transfer_leader(to.0);
        Ok(())
    }

    /// Asks for an index at which a linearizable read may be served. Works on every member.
    ///
    /// # Errors
    /// [`ReadIndexError`] when too many reads wait already.
    pub fn read_index(&mut self, token: u64, out: &mut Output) -> Result<(), ReadIndexError> {
        let State::Open(node) = &mut self.state else { return Err(ReadIndexError::Closed) };
        if node.reads.len() >= self.config.reads_max as usize {
            return Err(ReadIndexError::QueueFull);
        }
        if planted!("raft_read_without_round") && node.raw.raft.state == StateRole::Leader {
            out.read_ready.push((token, node.raw.raft.raft_log.committed));
            return Ok(());
        }
        node.reads.push(token, node.ticks);
        Ok(())
    }

    /// Ends a turn: everything fed since the last one takes effect.
    pub fn turn(&mut self, _now: Instant, out: &mut Output) {
        if let State::Open(node) = &mut self.state {
            node.turn(out);
        }
    }

    /// The state machine has applied everything up to `index`, in memory or durably.
    pub fn applied(&mut self, index: u64) {
        if let State::Open(node) = &mut self.state {
            assert!(index <= node.emitted, "applied {index} of {} emitted", node.emitted);
            node.applied_goal = node.applied_goal.max(index);
            node.sync_applied();
        }
    }

    /// The state machine is durable at `upto` or further: the log before may go. Followers that lag behind the new
    /// base need a state image, so a caller keeps some tail. Takes the smaller of `upto` and what is applied.
    pub fn compact(&mut self, upto: u64) {
        if let State::Open(node) = &mut self.state {
            let upto = upto.min(node.raw.raft.raft_log.applied);
            if upto > node.raw.store().base().0 {
                node.raw.mut_store().compact(upto);
                node.wal.base_dirty = true;
            }
        }
    }

    /// A picture of the node; empty unless it is open.
    pub fn status(&self) -> Status {
        self.node().map_or_else(Status::default, Node::status)
    }
}

fn closed(out: &mut Output, error: OpenError) -> State {
    out.opened = Some(Err(error));
    State::Closed
}

#[cfg(test)]
mod tests;
