//! Planted bugs, each caught by the test of its invariant. Run with `--features planted`.

#[cfg(feature = "planted")]
fn caught(name: &'static str, test: fn()) {
    cairn_stdx::planted::activate(Some(name));
    let outcome = std::panic::catch_unwind(test);
    cairn_stdx::planted::activate(None);
    assert!(outcome.is_err(), "the planted bug {name} was not seen");
}

#[cfg(feature = "planted")]
#[test]
fn every_planted_bug_is_seen() {
    caught("rename_retry_executes_again", crate::leases::a_call_takes_effect_once_however_often_it_comes);
    caught("epoch_not_raised_on_regrant", crate::leases::whoever_asks_there_is_one_exclusive_holder_and_epochs_rise);
    caught("replica_forgotten_in_version_change", crate::repair::random_failures_keep_every_current_copy_true_and_heal);
    caught("stale_copy_rejoins_as_current", crate::repair::random_failures_keep_every_current_copy_true_and_heal);
    let found = crate::recover::every_acknowledged_write_is_found_after_random_failures_with_and_without_a_backup;
    caught("recover_takes_old_copies", found);
    caught("recover_trusts_incomplete_copies", found);
    caught("recover_hold_ignored", found);
    caught("damaged_copy_goes_first", crate::repair::damaged_copies_stay_until_others_are_complete);
    caught("replaced_store_keeps_copies", crate::replace::an_empty_store_takes_an_id_only_when_no_chunk_names_it);
    caught(
        "metadata_grow_without_room",
        crate::ailing::what_adds_to_the_metadata_is_refused_while_too_few_servers_have_room,
    );
    caught("chunk_counts_drift", crate::repair::random_failures_keep_every_current_copy_true_and_heal);
}
