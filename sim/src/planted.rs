//! Planted bugs: each must be found by a checker within its number of seeds.

use crate::checkers::shadow::Invariant;
use crate::run::{Options, run};
use cairn_stdx::planted;

/// Seeds within which a planted bug must be found.
const SEEDS_MAX: u64 = 2_000;

/// The planted bugs that this world can reach, with the invariant they break first.
pub const PLANTED: &[(&str, Invariant)] = &[
    ("acknowledge_before_all_replicas", Invariant::I3),
    ("forget_replica_in_version_change", Invariant::I3),
    ("sequence_reused_after_reopen", Invariant::I3),
    ("release_before_drain", Invariant::I3),
    ("tail_merge_takes_lower_epoch", Invariant::I3),
    ("holder_trusts_its_clock_too_long", Invariant::I3),
    ("cs_rebuilt_before_last_block", Invariant::I3),
    ("cs_source_may_be_stale", Invariant::I3),
    ("cs_rebuild_loses_new_writes", Invariant::I3),
    ("cs_late_write_overtakes", Invariant::I3),
    ("cs_mark_counts_undurable", Invariant::I1),
    ("cs_skip_epoch_check_on_unmap", Invariant::I5),
    ("cs_epoch_compared_loosely", Invariant::I5),
    ("cs_old_link_still_served", Invariant::I5),
    ("cs_epoch_only_in_memory", Invariant::I5),
    ("cs_tail_forgotten_not_fetched", Invariant::I8),
    ("failed_replica_stays_in_set", Invariant::I7),
    ("epoch_not_raised_on_regrant", Invariant::I5),
    ("chunk_counts_drift", Invariant::Accounting),
    ("rename_retry_executes_again", Invariant::I18),
    ("raft_ack_before_sync", Invariant::I11),
    ("raft_apply_before_commit", Invariant::I11),
    ("raft_forget_vote", Invariant::I11),
    ("raft_read_without_round", Invariant::I3),
    ("raft_snapshot_without_config", Invariant::I11),
    ("store_flush_covers_later", Invariant::I1),
    ("store_session_reused", Invariant::I1),
    ("store_fence_at_submit_only", Invariant::I5),
    ("store_ack_before_data", Invariant::I1),
    ("store_checkpoint_drops_last", Invariant::I1),
    ("store_recovered_not_rewritten", Invariant::I17),
    ("store_trust_tail", Invariant::I2),
    ("store_free_before_checkpoint", Invariant::I2),
    ("store_reuse_under_read", Invariant::I2),
];

/// Turns a planted bug (or, with `all`, each in turn) on; true when one was not found.
///
/// # Errors
/// When this build carries no planted bugs, or none of that name.
pub fn prove(name: &str) -> Result<bool, String> {
    if !planted::available() {
        return Err(format!("this build carries no planted bugs ({name}); build with `--features planted`"));
    }
    let wanted: Vec<_> = PLANTED.iter().filter(|(known, _)| name == "all" || name == *known).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = PLANTED.iter().map(|(known, _)| *known).collect();
        return Err(format!("no planted bug is called {name}; there are {}", names.join(", ")));
    }
    let mut missed = 0;
    for (bug, invariant) in &wanted {
        planted::activate(Some(bug));
        let found = (1..=SEEDS_MAX).find_map(|seed| run(seed, &Options::default()).broken.map(|broken| (seed, broken)));
        planted::activate(None);
        match found {
            Some((seed, broken)) => {
                // A seed that breaks anyway proves nothing about the planted bug.
                let anyway = run(seed, &Options::default()).is_broken();
                let note = if anyway { " (but this seed breaks without it too)" } else { "" };
                let seen = broken.invariant;
                println!("{bug}: found by {seen:?} after {seed} seeds, expected {invariant:?}{note}");
                missed += u32::from(anyway);
            }
            None => {
                println!("{bug}: NOT FOUND within {SEEDS_MAX} seeds, expected {invariant:?}");
                missed += 1;
            }
        }
    }
    println!("{} planted bugs, {missed} not proven", wanted.len());
    Ok(missed > 0)
}
