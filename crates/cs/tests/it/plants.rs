//! Every planted bug of this crate is seen by one of the tests.

use cairn_stdx::planted;

#[test]
fn each_planted_bug_is_seen() {
    if !planted::available() {
        return;
    }
    let plants: [(&'static str, fn()); 6] = [
        (
            "cs_skip_epoch_check_on_unmap",
            crate::basics::only_the_fenced_epoch_reads_and_writes_across_kill_and_power_cut,
        ),
        ("cs_epoch_compared_loosely", crate::basics::only_the_fenced_epoch_reads_and_writes_across_kill_and_power_cut),
        ("cs_epoch_only_in_memory", crate::basics::only_the_fenced_epoch_reads_and_writes_across_kill_and_power_cut),
        ("cs_mark_counts_undurable", crate::basics::durable_marks_follow_flushes_and_the_timer),
        ("cs_old_link_still_served", crate::basics::packets_of_an_older_link_never_follow_those_of_a_newer),
        ("cs_source_may_be_stale", crate::rebuilds::a_stale_source_is_no_source_and_the_next_one_is_tried),
    ];
    for (bug, test) in plants {
        test();
        planted::activate(Some(bug));
        let caught = std::panic::catch_unwind(test).is_err();
        planted::activate(None);
        assert!(caught, "nobody saw {bug}");
    }
}
