//! Each planted bug is caught by the checks above: a checker that never fired is not trusted.

use crate::{crash, faults, semantics};
use cairn_env_sim::OpKind;
use cairn_stdx::planted::activate;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `check` for seeds until it panics; the number of seeds it took.
fn caught(bug: &'static str, seeds: u64, check: impl Fn(u64)) -> Option<u64> {
    activate(Some(bug));
    let found = (0..seeds).find(|seed| catch_unwind(AssertUnwindSafe(|| check(*seed))).is_err());
    activate(None);
    found.map(|seed| seed + 1)
}

#[test]
fn every_planted_bug_is_caught() {
    type Check = fn(u64);
    let crash: Check = |seed| crash::crash_loop(seed, 12);
    let bugs: [(&'static str, u64, Check); 10] = [
        ("store_ack_before_data", 400, crash),
        ("store_trust_tail", 400, crash),
        ("store_checkpoint_drops_last", 400, crash),
        ("store_free_before_checkpoint", 400, crash),
        ("store_flush_covers_later", 400, crash),
        ("store_session_reused", 1, |_| semantics::lost_group_stays_lost()),
        ("store_retry_fsync", 60, |seed| assert!(faults::fail_nth(seed % 7, OpKind::Flush, seed / 4, false))),
        ("store_read_unverified", 1, |_| faults::rot_everywhere(1)),
        ("store_fence_at_submit_only", 1, |_| semantics::fence_overtakes_a_waiting_write()),
        ("store_reuse_under_read", 1, |_| semantics::slow_read_keeps_its_slot()),
    ];
    let mut missed = Vec::new();
    for (bug, seeds, check) in bugs {
        match caught(bug, seeds, check) {
            Some(seed) => println!("{bug}: caught by seed {seed}"),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
