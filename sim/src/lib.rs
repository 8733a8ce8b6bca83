//! The simulator: a whole cluster with its clients in one thread, virtual time, one seed.

pub mod checkers;
mod mount;
mod net;
pub mod planted;
pub mod run;
mod scenario;
pub mod stamp;
pub mod world;

/// Seeds that failed once, with the commit that fixed them; the list only grows.
pub fn regressions() -> Vec<u64> {
    let lines = include_str!("../regressions.txt").lines();
    lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}
