//! Every planted bug of the client is seen by a test that passes without it.

use crate::faults::{
    moved_chunks_are_found, release_makes_durable, reopening_goes_on, stale_replica_is_not_read, storm,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn found(name: &'static str, seeds: u64, scenario: impl Fn(u64)) {
    cairn_stdx::planted::activate(Some(name));
    let seen = (0..seeds).any(|seed| catch_unwind(AssertUnwindSafe(|| scenario(seed))).is_err());
    cairn_stdx::planted::activate(None);
    assert!(seen, "{name} was not seen within {seeds} seeds");
}

#[test]
fn acknowledging_before_all_replicas_is_seen() {
    found("acknowledge_before_all_replicas", 500, |seed| storm(5000 + seed));
}

#[test]
fn forgetting_a_replica_in_a_version_change_is_seen() {
    found("forget_replica_in_version_change", 2000, |seed| storm(5000 + seed));
}

#[test]
fn taking_the_lower_epoch_in_a_tail_merge_is_seen() {
    found("tail_merge_takes_lower_epoch", 500, |seed| storm(5000 + seed));
}

#[test]
fn trusting_the_clock_too_long_is_seen() {
    found("holder_trusts_its_clock_too_long", 10, |seed| stale_replica_is_not_read(62 + seed));
}

#[test]
fn releasing_before_draining_is_seen() {
    found("release_before_drain", 1, |_| release_makes_durable());
}

#[test]
fn reusing_a_sequence_after_reopening_is_seen() {
    found("sequence_reused_after_reopen", 1, |_| reopening_goes_on());
}

#[test]
fn taking_a_moved_chunk_for_one_never_written_is_seen() {
    found("absence_not_confirmed", 1, |_| moved_chunks_are_found(81));
}
