//! Settled marks, tails, power cuts and reconciling: one block, three replicas, one holder at a time.
//!
//! A replica has what it wrote, what of it is durable, and its unsettled tail. A power cut of a replica loses
//! everything that is not durable. The invariant: a write acknowledged and then covered by an acknowledged flush is
//! never lost while one replica keeps its disk (I1), and after reconciling all replicas hold the same (I8).

use crate::Model;

const REPLICAS: usize = 3;

/// A rule left out on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mistake {
    /// None.
    None,
    /// The flush is acknowledged when all but one replica are durable.
    FlushEarly,
    /// The settled mark is raised to what is acknowledged instead of what is durable everywhere.
    SettleAcknowledged,
    /// Reconciling takes the lowest sequence instead of the highest.
    TakeLowest,
}

/// The model and its bounds.
#[derive(Clone, Copy, Debug)]
pub struct Settle {
    /// Rule left out.
    pub mistake: Mistake,
    /// Writes at most.
    pub writes_max: u8,
    /// Power cuts at most.
    pub cuts_max: u8,
    /// Disks lost for good at most; one always stays.
    pub losses_max: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Replica {
    /// Sequence of the data it would return.
    value: u8,
    /// What would be left after a power cut.
    durable: u8,
    /// Everything up to here left its tail.
    settled: u8,
    /// Lost power since the holder last reconciled.
    rebooted: bool,
    /// Its disk is gone for good; it is out of the set.
    lost: bool,
}

/// A state of the model.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct State {
    replicas: [Replica; REPLICAS],
    issued: u8,
    acknowledged: u8,
    flushed: u8,
    mark: u8,
    cuts: u8,
    losses: u8,
    wrong: Option<&'static str>,
}

impl State {
    fn members(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| !replica.lost)
    }
}

impl Model for Settle {
    type State = State;

    fn initial(&self) -> State {
        State {
            replicas: [Replica::default(); REPLICAS],
            issued: 0,
            acknowledged: 0,
            flushed: 0,
            mark: 0,
            cuts: 0,
            losses: 0,
            wrong: None,
        }
    }

    fn successors(&self, state: &State, out: &mut Vec<(&'static str, State)>) {
        let whole = state.members().all(|replica| !replica.rebooted);
        if whole && state.issued == state.acknowledged && state.issued < self.writes_max {
            out.push(("write", State { issued: state.issued + 1, ..*state }));
        }
        for i in 0..REPLICAS {
            let replica = state.replicas[i];
            if replica.lost {
                continue;
            }
            let mut step = |name, change: &dyn Fn(&mut State)| {
                let mut next = *state;
                change(&mut next);
                out.push((name, next));
            };
            if !replica.rebooted && replica.value < state.issued {
                step("arrive", &|next| next.replicas[i].value = state.issued);
            }
            if replica.durable != replica.value {
                step("flush one", &|next| next.replicas[i].durable = replica.value);
            }
            if replica.settled < state.mark && !replica.rebooted {
                step("settle", &|next| next.replicas[i].settled = state.mark);
            }
            if state.cuts < self.cuts_max {
                step("power cut", &|next| {
                    next.cuts += 1;
                    next.replicas[i].value = replica.durable;
                    next.replicas[i].rebooted = true;
                });
            }
            if state.losses < self.losses_max && state.members().count() > 1 {
                step("lose disk", &|next| {
                    next.losses += 1;
                    next.replicas[i].lost = true;
                });
            }
        }
        self.holder(state, whole, out);
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        state.wrong
    }
}

impl Settle {
    fn holder(&self, state: &State, whole: bool, out: &mut Vec<(&'static str, State)>) {
        if whole && state.acknowledged < state.issued && state.members().all(|r| r.value == state.issued) {
            out.push(("acknowledge", State { acknowledged: state.issued, ..*state }));
        }
        let durable = state.members().filter(|r| r.durable >= state.acknowledged).count();
        let needed = state.members().count() - usize::from(self.mistake == Mistake::FlushEarly);
        if whole && durable >= needed && state.flushed < state.acknowledged {
            out.push(("acknowledge flush", State { flushed: state.acknowledged, ..*state }));
        }
        let lowest = state.members().map(|r| r.durable).min().unwrap_or(0);
        let mark = if self.mistake == Mistake::SettleAcknowledged { state.acknowledged } else { lowest };
        if whole && mark > state.mark {
            out.push(("raise mark", State { mark, ..*state }));
        }
        if !whole {
            out.push(("reconcile", self.reconcile(state)));
        }
    }

    /// The holder compares the tails: only what is above a replica's settled mark is known to differ or not.
    fn reconcile(&self, state: &State) -> State {
        let mut next = *state;
        let visible = |r: &Replica| if r.value > r.settled { Some(r.value) } else { None };
        let tails: Vec<u8> = state.members().filter_map(visible).collect();
        let best = match self.mistake {
            Mistake::TakeLowest => tails.iter().min(),
            _ => tails.iter().max(),
        };
        for replica in next.replicas.iter_mut().filter(|replica| !replica.lost) {
            if let Some(&best) = best {
                // Rolled forward as a new write of the holder, and made durable before it counts.
                replica.value = best;
            }
            replica.durable = replica.value;
            replica.rebooted = false;
        }
        let first = next.members().map(|replica| replica.value).next().expect("one disk always stays");
        if next.members().any(|replica| replica.value != first) {
            next.wrong = Some("I8: replicas differ after reconciling");
        }
        // The contract of a disk: what was acknowledged is lost only if every copy lost power.
        let kept_power = state.members().any(|replica| !replica.rebooted);
        if kept_power && next.members().any(|replica| replica.value < state.acknowledged) {
            next.wrong = Some("an acknowledged write is gone although one copy kept power");
        }
        if next.members().any(|replica| replica.value < state.flushed) {
            next.wrong = Some("I1: an acknowledged and flushed write is gone");
        }
        next.issued = first;
        next.acknowledged = first;
        next.flushed = next.flushed.min(first);
        next.mark = next.mark.min(first);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Verdict, explore};

    fn model(mistake: Mistake) -> Settle {
        Settle { mistake, writes_max: 3, cuts_max: 3, losses_max: 2 }
    }

    #[test]
    fn flushed_writes_survive_and_replicas_converge() {
        let verdict = explore(&model(Mistake::None), 3_000_000);
        assert!(matches!(verdict, Verdict::Holds(count) if count > 1000), "{verdict:?}");
    }

    #[test]
    fn each_mistake_is_noticed() {
        for mistake in [Mistake::FlushEarly, Mistake::SettleAcknowledged, Mistake::TakeLowest] {
            let verdict = explore(&model(mistake), 3_000_000);
            assert!(matches!(verdict, Verdict::Broken { .. }), "{mistake:?}: {verdict:?}");
        }
    }
}
