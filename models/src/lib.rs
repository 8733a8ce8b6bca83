//! L6: explicit-state models of the rules that keep data safe, explored breadth-first to the end of their small bounds.
//!
//! A model is a set of rules over a small state; [`explore`] visits every reachable state and checks the invariant in
//! each. [`lease`] has leases, epochs, versions and take-over; [`settle`] has settled marks, power cuts and
//! reconciling.

pub mod lease;
pub mod settle;

use cairn_stdx::FixedSet;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::hash::Hash;

/// A system small enough to try everything.
pub trait Model {
    /// A state.
    type State: Clone + Eq + Hash + Debug;

    /// Where it begins.
    fn initial(&self) -> Self::State;

    /// Every state one step away, with the name of the step.
    fn successors(&self, state: &Self::State, out: &mut Vec<(&'static str, Self::State)>);

    /// What is wrong with a state, if anything.
    fn broken(&self, state: &Self::State) -> Option<&'static str>;
}

/// What exploring found.
#[derive(Debug)]
pub enum Verdict {
    /// No reachable state is broken; this many were visited.
    Holds(usize),
    /// A broken state, and the last step into it.
    Broken {
        /// What is wrong.
        what: &'static str,
        /// The step that broke it.
        step: &'static str,
        /// The state.
        state: String,
        /// States visited before.
        visited: usize,
    },
    /// More states than allowed.
    TooMany(usize),
}

/// Visits every state reachable in `model`, at most `states_max`.
pub fn explore<M: Model>(model: &M, states_max: usize) -> Verdict {
    let initial = model.initial();
    let mut seen: FixedSet<M::State> = FixedSet::default();
    let mut queue = VecDeque::from([initial.clone()]);
    seen.insert(initial);
    let mut next = Vec::new();
    while let Some(state) = queue.pop_front() {
        model.successors(&state, &mut next);
        for (step, state) in next.drain(..) {
            if let Some(what) = model.broken(&state) {
                return Verdict::Broken { what, step, state: format!("{state:?}"), visited: seen.len() };
            }
            if !seen.contains(&state) {
                if seen.len() == states_max {
                    return Verdict::TooMany(states_max);
                }
                seen.insert(state.clone());
                queue.push_back(state);
            }
        }
    }
    Verdict::Holds(seen.len())
}
