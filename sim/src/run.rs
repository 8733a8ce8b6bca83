//! One seed, from its first event to its verdict.

use crate::checkers::shadow::{Broken, Invariant};
use crate::scenario::Scenario;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a seed is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print every event.
    pub verbose: bool,
    /// Prints every frame delivered as well.
    pub frames: bool,
    /// Inject no faults at all: what must work before anything else does.
    pub faultless: bool,
    /// Clients work on files through the logic of mounts, for minutes (`docs/design/simulator.md`, "Files").
    pub fsx: bool,
}

/// What became of a seed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Virtual time that passed, in nanoseconds.
    pub virtual_ns: u64,
    /// Events stepped.
    pub steps: u64,
    /// Hash of everything that happened.
    pub trace: u64,
    /// Writes acknowledged and blocks read back and compared.
    pub work: (u64, u64),
    /// Files were worked on: `work` counts operations and bytes.
    pub fsx: bool,
    /// What clients were told of names they share was not judged: too many calls were never answered.
    pub names_not_judged: bool,
    /// What the seed drew.
    pub plan: String,
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
        let (seed, seconds) = (self.seed, self.virtual_ns / 1_000_000_000);
        let Some(broken) = &self.broken else {
            let (writes, reads) = self.work;
            let fsx = self.fsx;
            writeln!(f, "seed {seed} holds: {seconds} s, {} events, trace {:016x}", self.steps, self.trace)?;
            if fsx {
                return write!(f, "{writes} operations on files, {reads} bytes compared; {}", self.plan);
            }
            let names = if self.names_not_judged { "shared names NOT JUDGED; " } else { "" };
            return write!(f, "{writes} writes acknowledged, {reads} blocks read; {names}{}", self.plan);
        };
        for line in &self.recent {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "seed {seed} breaks {:?} after {seconds} s; {}", broken.invariant, self.plan)?;
        writeln!(f, "{}", broken.detail)?;
        write!(f, "replay: cairn sim {}--seed {seed} --trace", if self.fsx { "--fsx " } else { "" })
    }
}

/// Runs one seed. An assertion that fails inside a core is a broken invariant like any other.
pub fn run(seed: u64, options: &Options) -> Outcome {
    let mut scenario = Scenario::new(seed, options);
    let verdict = catch_unwind(AssertUnwindSafe(|| scenario.run()));
    let broken = match verdict {
        Ok(Ok(())) => None,
        Ok(Err(broken)) => Some(*broken),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let detail = text.unwrap_or_else(|| "a panic without words".to_owned());
            Some(Broken { invariant: Invariant::Assertion, detail })
        }
    };
    scenario.outcome(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_without_faults_holds() {
        for seed in 1..=3 {
            let outcome = run(seed, &Options { faultless: true, ..Options::default() });
            assert!(!outcome.is_broken(), "{outcome}");
            assert!(outcome.work.0 > 50, "a run that did nothing proves nothing: {outcome}");
        }
    }

    #[test]
    fn twenty_seeds_run_twice_leave_the_same_trace() {
        for seed in 100..120 {
            let (first, second) = (run(seed, &Options::default()), run(seed, &Options::default()));
            assert_eq!((first.trace, first.steps), (second.trace, second.steps), "I20: {first}\n{second}");
        }
    }

    #[test]
    fn mounts_that_work_on_files_find_what_they_wrote() {
        // One without faults, one with.
        for seed in [1, 2] {
            let options = Options { fsx: true, ..Options::default() };
            let (first, second) = (run(seed, &options), run(seed, &options));
            assert!(!first.is_broken(), "{first}");
            assert!(first.work.0 > 5_000, "a run that did nothing proves nothing: {first}");
            assert_eq!((first.trace, first.steps), (second.trace, second.steps), "I20: {first}\n{second}");
        }
    }

    #[test]
    fn metadata_lost_with_all_its_servers_are_found_at_the_chunk_servers() {
        use crate::scenario::{SEEDS_DISASTER, SEEDS_DISASTER_OF};
        for seed in (SEEDS_DISASTER[0]..).step_by(SEEDS_DISASTER_OF as usize).take(8) {
            let outcome = run(seed, &Options::default());
            assert!(!outcome.is_broken(), "{outcome}");
        }
    }

    #[test]
    fn every_seed_of_the_regression_list_holds() {
        for seed in crate::regressions() {
            let outcome = run(seed, &Options::default());
            assert!(!outcome.is_broken(), "{outcome}");
        }
    }
}
