//! Linearizable reads: tokens wait in rounds, each round is one question to a majority.

use std::collections::VecDeque;

/// Rounds in flight; later reads wait and share the next one. Each round costs every server a message and an answer, so
/// few rounds with many reads are cheaper, and a read waits for one round longer at most.
const ROUNDS_MAX: usize = 2;

struct Read {
    token: u64,
    asked_tick: u64,
}

struct Round {
    context: Vec<u8>,
    reads: Vec<Read>,
    asked_tick: u64,
}

/// Reads that wait for their index.
pub(crate) struct Reads {
    queued: Vec<Read>,
    rounds: VecDeque<Round>,
    /// Drawn when the log opens: an answer to a question of an earlier life never fits a question of this one.
    nonce: u64,
    counter: u64,
    waiting: usize,
}

impl Reads {
    pub fn new(nonce: u64) -> Self {
        Self { queued: Vec::new(), rounds: VecDeque::new(), nonce, counter: 0, waiting: 0 }
    }

    pub fn len(&self) -> usize {
        self.waiting
    }

    pub fn push(&mut self, token: u64, tick: u64) {
        self.waiting += 1;
        self.queued.push(Read { token, asked_tick: tick });
    }

    /// Starts a round for all queued reads. Returns its context, unique in the group.
    pub fn start_round(&mut self, id: u64, tick: u64) -> Option<Vec<u8>> {
        if self.queued.is_empty() || self.rounds.len() >= ROUNDS_MAX {
            return None;
        }
        self.counter += 1;
        let context =
            [id, self.nonce, self.counter].iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        let reads = std::mem::take(&mut self.queued);
        self.rounds.push_back(Round { context: context.clone(), reads, asked_tick: tick });
        Some(context)
    }

    /// The tokens of an answered round; none when it was given up.
    pub fn answered(&mut self, context: &[u8]) -> Vec<u64> {
        let Some(at) = self.rounds.iter().position(|round| round.context == context) else { return Vec::new() };
        let round = self.rounds.remove(at).expect("found above");
        self.waiting -= round.reads.len();
        round.reads.into_iter().map(|read| read.token).collect()
    }

    /// Asks again all rounds that began before `tick`: their question or its answer was lost.
    pub fn retry_before(&mut self, tick: u64) {
        let mut kept = VecDeque::with_capacity(self.rounds.len());
        for round in self.rounds.drain(..) {
            if round.asked_tick < tick {
                self.queued.extend(round.reads);
            } else {
                kept.push_back(round);
            }
        }
        self.rounds = kept;
    }

    /// Gives up queued reads asked for before `tick`.
    pub fn expire_before(&mut self, tick: u64, dropped: &mut Vec<u64>) {
        let before = self.queued.len();
        self.queued.retain(|read| {
            if read.asked_tick < tick {
                dropped.push(read.token);
            }
            read.asked_tick >= tick
        });
        self.waiting -= before - self.queued.len();
    }
}
