//! Chaos over six hosts in network namespaces.
//!
//! A longer run, with another seed:
//! `CAIRN_CHAOS_SECONDS=3600 CAIRN_CHAOS_SEED=7 cargo test --release -p cairn-tests chaos:: -- --nocapture`. Figures:
//! `cargo test --release -p cairn-tests timelines -- --ignored --nocapture`.

use crate::needs_fuse;
use cairn_tests::cluster::scratch;
use cairn_tests::{chaos, fault_disk, hosts};
use std::time::Duration;

/// Rounds are begun for this time in CI; the last one ends up to 40 seconds later.
const SECONDS: u64 = 90;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn whatever_happens_to_six_hosts_nothing_is_lost_and_nothing_stays_stuck() {
    needs_fuse!();
    if !fault_disk::available() || !hosts::available() {
        return;
    }
    let seed = number("CAIRN_CHAOS_SEED").unwrap_or_else(|| {
        let now = std::fs::metadata("/proc/self").and_then(|metadata| metadata.modified()).expect("the process began");
        now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").subsec_nanos().into()
    });
    let seconds = number("CAIRN_CHAOS_SECONDS").unwrap_or(SECONDS);
    eprintln!("CAIRN_CHAOS_SEED={seed} CAIRN_CHAOS_SECONDS={seconds}");
    let scratch = scratch();
    let root = std::fs::canonicalize(scratch.path()).expect("the directory exists");
    match chaos::run(&root, seed, Duration::from_secs(seconds)) {
        Ok(report) => eprintln!("{} rounds with {} faults held", report.rounds, report.faults),
        Err((why, diary)) => {
            let kept = scratch.keep();
            panic!(
                "{why}\nCAIRN_CHAOS_SEED={seed}; what happened:\n{}\nlogs and stores: {}",
                diary.join("\n"),
                kept.display()
            );
        }
    }
}

#[test]
#[ignore = "prints figures; takes two minutes"]
fn what_clients_feel_of_single_faults_is_shown_as_timelines() {
    needs_fuse!();
    if !fault_disk::available() || !hosts::available() {
        return;
    }
    let scratch = scratch();
    let root = std::fs::canonicalize(scratch.path()).expect("the directory exists");
    if let Err((why, diary)) = chaos::timeline::run(&root) {
        let kept = scratch.keep();
        panic!("{why}; what happened:\n{}\nlogs and stores: {}", diary.join("\n"), kept.display());
    }
}
