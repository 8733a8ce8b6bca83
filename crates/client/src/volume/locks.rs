//! Range locks of one volume: overlapping operations run in the order of their submission (rule 4).
//!
//! Readers share, writers exclude. An operation waits exactly for the earlier ones that overlap it and conflict with
//! it, so nothing starves and nothing deadlocks. Most operations touch one or two cells of 256 KiB; an operation over
//! more than [`CELLS_MAX`] cells is *wide* and is compared with everything, which is rare (discards of whole devices).

use cairn_stdx::FixedMap;

const CELL_SHIFT: u32 = 6; // 64 blocks of 4 KiB.
const CELLS_MAX: u64 = 64;

#[derive(Clone, Copy)]
struct Held {
    first: u64,
    end: u64,
    exclusive: bool,
    blockers: u32,
}

impl Held {
    fn conflicts(&self, other: &Held) -> bool {
        (self.exclusive || other.exclusive) && self.first < other.end && other.first < self.end
    }

    fn first_cell(&self) -> u64 {
        self.first >> CELL_SHIFT
    }

    fn last_cell(&self) -> u64 {
        (self.end - 1) >> CELL_SHIFT
    }

    fn is_wide(&self) -> bool {
        self.last_cell() - self.first_cell() >= CELLS_MAX
    }
}

/// The locks held and waited for. Tickets rise with submission.
#[derive(Default)]
pub(crate) struct RangeLocks {
    held: FixedMap<u64, Held>,
    cells: FixedMap<u64, Vec<u64>>,
    wide: Vec<u64>,
    spare: Vec<Vec<u64>>,
}

impl RangeLocks {
    /// Queues `ticket` for the blocks `first..end`. True when it may run at once; otherwise [`RangeLocks::release`]
    /// names it later.
    pub(crate) fn acquire(&mut self, ticket: u64, first: u64, end: u64, exclusive: bool) -> bool {
        assert!(first < end, "a range lock covers at least one block");
        let mut mine = Held { first, end, exclusive, blockers: 0 };
        let mut blockers = 0;
        self.visit_conflicts(&mine, |_| blockers += 1);
        mine.blockers = blockers;
        if mine.is_wide() {
            self.wide.push(ticket);
        } else {
            for cell in mine.first_cell()..=mine.last_cell() {
                let spare = &mut self.spare;
                self.cells.entry(cell).or_insert_with(|| spare.pop().unwrap_or_default()).push(ticket);
            }
        }
        let before = self.held.insert(ticket, mine);
        assert!(before.is_none(), "a ticket is used once");
        blockers == 0
    }

    /// Calls `visit` once for each ticket that conflicts with `mine`, in no order that means anything.
    fn visit_conflicts(&self, mine: &Held, mut visit: impl FnMut(u64)) {
        if mine.is_wide() {
            self.held.iter().filter(|(_, held)| held.conflicts(mine)).for_each(|(ticket, _)| visit(*ticket));
            return;
        }
        for cell in mine.first_cell()..=mine.last_cell() {
            for ticket in self.cells.get(&cell).into_iter().flatten() {
                let held = &self.held[ticket];
                // Two ranges may share several cells: the first shared one counts.
                if held.conflicts(mine) && held.first_cell().max(mine.first_cell()) == cell {
                    visit(*ticket);
                }
            }
        }
        self.wide.iter().filter(|ticket| self.held[ticket].conflicts(mine)).for_each(|ticket| visit(*ticket));
    }

    /// Gives a lock up, held or waited for, and appends the tickets that may run now to `ready`, in order of
    /// submission.
    pub(crate) fn release(&mut self, ticket: u64, ready: &mut Vec<u64>) {
        let mine = self.held.remove(&ticket).expect("only a queued ticket is released");
        if mine.is_wide() {
            self.wide.retain(|other| *other != ticket);
        } else {
            for cell in mine.first_cell()..=mine.last_cell() {
                let tickets = self.cells.get_mut(&cell).expect("the cell of a held lock exists");
                tickets.retain(|other| *other != ticket);
                if tickets.is_empty() {
                    let empty = self.cells.remove(&cell).expect("just seen");
                    if self.spare.len() < 64 {
                        self.spare.push(empty);
                    }
                }
            }
        }
        let from = ready.len();
        let mut later = std::mem::take(ready);
        self.visit_conflicts(&mine, |other| {
            if other > ticket {
                later.push(other);
            }
        });
        let mut kept = from;
        for at in from..later.len() {
            let held = self.held.get_mut(&later[at]).expect("visited tickets are held");
            held.blockers -= 1;
            if held.blockers == 0 {
                later[kept] = later[at];
                kept += 1;
            }
        }
        later.truncate(kept);
        later[from..].sort_unstable();
        *ready = later;
    }

    /// True when nothing is held or waited for.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::RangeLocks;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Step {
        Acquire(u64, u64, bool),
        Release(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..300, prop_oneof![1u64..100, Just(5000u64)], any::<bool>())
                .prop_map(|(f, n, x)| Step::Acquire(f, n, x)),
            any::<usize>().prop_map(Step::Release),
        ]
    }

    proptest! {
        #[test]
        fn an_operation_runs_exactly_when_no_earlier_conflicting_one_is_left(steps in prop::collection::vec(step(), 1..200)) {
            let mut locks = RangeLocks::default();
            let mut model: BTreeMap<u64, (u64, u64, bool, bool)> = BTreeMap::new(); // first, end, exclusive, running
            let mut next = 0;
            for step in steps {
                let mut started = Vec::new();
                match step {
                    Step::Acquire(first, count, exclusive) => {
                        next += 1;
                        if locks.acquire(next, first, first + count, exclusive) {
                            started.push(next);
                        }
                        model.insert(next, (first, first + count, exclusive, false));
                    }
                    Step::Release(which) if !model.is_empty() => {
                        let ticket = *model.keys().nth(which % model.len()).unwrap();
                        model.remove(&ticket);
                        locks.release(ticket, &mut started);
                    }
                    Step::Release(_) => {}
                }
                let may: Vec<u64> = model
                    .iter()
                    .filter(|(ticket, m)| {
                        !m.3 && !model.range(..**ticket).any(|(_, o)| (m.2 || o.2) && m.0 < o.1 && o.0 < m.1)
                    })
                    .map(|(ticket, _)| *ticket)
                    .collect();
                prop_assert_eq!(&may, &started);
                may.iter().for_each(|ticket| model.get_mut(ticket).unwrap().3 = true);
            }
            prop_assert_eq!(model.is_empty(), locks.is_empty());
        }
    }
}
