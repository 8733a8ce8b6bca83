//! One seed, from its first event to its verdict. (Scenario code follows with the cluster.)

use crate::checkers::shadow::Broken;
use std::fmt;

/// How a seed is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print every event.
    pub verbose: bool,
}

/// What became of a seed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Virtual time that passed, in nanoseconds.
    pub virtual_ns: u64,
    /// Hash of everything that happened.
    pub trace: u64,
    /// The first broken invariant.
    pub broken: Option<Broken>,
    /// The last events, when something broke.
    pub recent: Vec<String>,
}

impl Outcome {
    /// True when an invariant broke.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}", self.seed)
    }
}

/// Runs one seed.
pub fn run(seed: u64, _options: &Options) -> Outcome {
    Outcome { seed, ..Outcome::default() }
}
