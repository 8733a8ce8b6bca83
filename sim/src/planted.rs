//! Planted bugs: each must be found by a checker within its number of seeds. What is found by what, and what this world
//! cannot reach: docs/design/simulator.md.

use crate::checkers::shadow::Invariant;
use crate::run::{Options, run};
use crate::scenario::{
    SEEDS_CUT_HOST, SEEDS_DISASTER, SEEDS_DISASTER_OF, SEEDS_FLUSH_FAILS, SEEDS_FULL, SEEDS_FULL_MDS,
    SEEDS_FULL_MDS_OF, SEEDS_ISLAND, SEEDS_MEMBERS, SEEDS_MISDIRECTED, SEEDS_OF, SEEDS_OLD_COPY, SEEDS_SKEW,
    SEEDS_SKEW_OF, SEEDS_STALE, SEEDS_WRONG_OF,
};
use cairn_stdx::{Rng, planted};

/// A planted bug that this world can reach.
pub struct Planted {
    /// Its name, as the core asks for it.
    pub name: &'static str,
    /// What it breaks first.
    pub breaks: Invariant,
    /// Seeds within which it must be found: far more than it took when it was measured, because every change of a core
    /// deals the faults of a seed anew. Only a bug that is missed pays for them.
    pub seeds_max: u64,
    /// The seeds tried: the first, and how far apart they are.
    pub seeds: (u64, u64),
    /// Looked for where clients work on files.
    pub fsx: bool,
}

/// The bound of bugs that take hundreds of seeds: they are proven by name or with `all`, not in each run of the check.
const RARE: u64 = 3_000;

const fn bug(name: &'static str, breaks: Invariant, seeds_max: u64) -> Planted {
    Planted { name, breaks, seeds_max, seeds: (1, 1), fsx: false }
}

/// Looked for in seeds where a client and a chunk server lose power together.
const fn in_cut_hosts(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_CUT_HOST, SEEDS_OF), ..bug }
}

/// Looked for in seeds where flushes fail, and power is cut later.
const fn with_failing_flushes(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_FLUSH_FAILS, SEEDS_OF), ..bug }
}

/// Looked for in seeds where chunk servers are started from older copies of their disks.
const fn with_old_copies(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_OLD_COPY, SEEDS_OF), ..bug }
}

/// Looked for in seeds where a client and a chunk server are cut off together.
const fn on_islands(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_ISLAND, SEEDS_OF), ..bug }
}

/// Looked for in seeds where disks get full.
const fn on_small_disks(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_FULL, SEEDS_OF), ..bug }
}

/// Looked for in seeds where servers come and go.
const fn amid_changes(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_MEMBERS, SEEDS_OF), ..bug }
}

/// Looked for in seeds where all metadata servers are lost.
const fn after_disasters(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_DISASTER[0], SEEDS_DISASTER_OF), ..bug }
}

/// Looked for where clients work on files.
const fn on_files(bug: Planted) -> Planted {
    Planted { fsx: true, ..bug }
}

/// Looked for in seeds where processes are restarted with another release.
const fn amid_upgrades(bug: Planted) -> Planted {
    Planted { seeds: (SEEDS_SKEW, SEEDS_SKEW_OF), ..bug }
}

/// Looked for in seeds where a disk does wrong and says nothing: the kind, by its remainder.
const fn with_wrong_disk(kind: u64, bug: Planted) -> Planted {
    Planted { seeds: (kind, SEEDS_WRONG_OF), ..bug }
}

/// The planted bugs.
pub const PLANTED: &[Planted] = &[
    bug("acknowledge_before_all_replicas", Invariant::I3, 100),
    bug("forget_replica_in_version_change", Invariant::I17, 200),
    bug("older_set_acknowledges", Invariant::I3, RARE),
    bug("restart_not_sent_again", Invariant::I3, 100),
    in_cut_hosts(bug("flush_ignores_marks", Invariant::I1, 200)),
    bug("sequence_reused_after_reopen", Invariant::I3, 100),
    bug("release_before_drain", Invariant::I3, 300),
    in_cut_hosts(bug("tail_merge_takes_lower_epoch", Invariant::I3, 200)),
    on_islands(bug("holder_trusts_its_clock_too_long", Invariant::I6, 1500)),
    bug("cs_rebuilt_before_last_block", Invariant::I8, 100),
    bug("cs_rebuild_loses_new_writes", Invariant::I3, RARE),
    bug("cs_late_write_overtakes", Invariant::I3, 100),
    bug("cs_mark_counts_undurable", Invariant::I3, 100),
    bug("cs_duplicate_uncounted", Invariant::I17, 100),
    on_islands(bug("cs_skip_epoch_check_on_unmap", Invariant::I3, RARE)),
    bug("cs_epoch_compared_loosely", Invariant::I5, RARE),
    bug("cs_epoch_only_in_memory", Invariant::I1, RARE),
    in_cut_hosts(bug("cs_tail_forgotten_not_fetched", Invariant::I8, 1000)),
    bug("replica_forgotten_in_version_change", Invariant::I1, RARE),
    bug("stale_copy_rejoins_as_current", Invariant::I17, 100),
    on_islands(bug("epoch_not_raised_on_regrant", Invariant::I6, 100)),
    with_old_copies(bug("old_copy_judged_by_starts_only", Invariant::I3, 100)),
    bug("chunk_counts_drift", Invariant::Accounting, 400),
    bug("rename_retry_executes_again", Invariant::I18, 100),
    Planted {
        seeds: (SEEDS_FULL_MDS, SEEDS_FULL_MDS_OF),
        ..bug("mds_declined_image_never_asked_again", Invariant::I17, RARE)
    },
    bug("raft_ack_before_sync", Invariant::I17, 600),
    bug("raft_read_without_round", Invariant::I3, RARE),
    bug("raft_apply_before_commit", Invariant::I11, 100),
    bug("raft_snapshot_without_config", Invariant::Assertion, 100),
    with_failing_flushes(bug("raft_recovered_not_rewritten", Invariant::I17, 100)),
    in_cut_hosts(bug("store_flush_covers_later", Invariant::I3, RARE)),
    bug("store_checkpoint_drops_last", Invariant::I8, 100),
    with_failing_flushes(bug("store_recovered_not_rewritten", Invariant::I17, 100)),
    amid_changes(bug("absence_not_confirmed", Invariant::I3, 200)),
    amid_changes(bug("servers_of_the_start_only", Invariant::I8, 600)),
    amid_changes(bug("answers_only_whom_it_knows", Invariant::I17, 1000)),
    on_small_disks(bug("full_copy_never_freshened", Invariant::I16, 600)),
    on_small_disks(bug("store_trim_needs_room", Invariant::I16, 100)),
    on_small_disks(bug("refused_write_not_taken_back", Invariant::I5, 200)),
    amid_upgrades(bug("used_before_finalize", Invariant::I15, 100)),
    amid_upgrades(bug("newer_state_read_as_old", Invariant::I15, 200)),
    with_failing_flushes(bug("store_retry_fsync", Invariant::I12, 100)),
    with_wrong_disk(SEEDS_STALE, bug("store_read_unverified", Invariant::I10, 200)),
    with_wrong_disk(SEEDS_MISDIRECTED, bug("cs_repair_passes_damaged_over", Invariant::I3, 2000)),
    bug("store_trust_tail", Invariant::I1, 100),
    after_disasters(bug("recover_takes_old_copies", Invariant::I21, 600)),
    after_disasters(bug("recover_trusts_incomplete_copies", Invariant::I21, RARE)),
    on_files(bug("truncate_leaves_the_tail", Invariant::Files, 10)),
];

/// Turns a planted bug (or, with `all`, each in turn) on; true when one was not found. With `seeds_max`, that many
/// seeds are tried instead of those of the table, to measure.
///
/// # Errors
/// When this build carries no planted bugs, or none of that name.
pub fn prove(name: &str, seeds_max: Option<u64>) -> Result<bool, String> {
    let wanted = |bug: &&Planted| name == "all" || name == bug.name;
    let wanted: Vec<&Planted> = PLANTED.iter().filter(wanted).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = PLANTED.iter().map(|bug| bug.name).collect();
        return Err(format!("no planted bug is called {name}; there are {}", names.join(", ")));
    }
    prove_each(&wanted, seeds_max)
}

/// Proves `count` planted bugs that are not rare, drawn by `draw`: a share of them in each run of the whole check.
///
/// # Errors
/// When this build carries no planted bugs.
pub fn prove_some(draw: u64, count: usize) -> Result<bool, String> {
    println!("planted bugs drawn by {draw}");
    let mut some: Vec<&Planted> = PLANTED.iter().filter(|bug| bug.seeds_max < RARE).collect();
    Rng::new(draw).shuffle(&mut some);
    some.truncate(count);
    prove_each(&some, None)
}

/// Proves these planted bugs; true when one was not found.
///
/// # Errors
/// When this build carries no planted bugs.
pub fn prove_each(wanted: &[&Planted], seeds_max: Option<u64>) -> Result<bool, String> {
    if !planted::available() {
        return Err("this build carries no planted bugs; build with `--features planted`".to_owned());
    }
    // A core that asserts is a finding like any other; the first line of what it says is shown below.
    std::panic::set_hook(Box::new(|_| ()));
    let mut missed = 0;
    for Planted { name, breaks, seeds_max: bound, seeds: (first, apart), fsx } in wanted {
        let options = Options { fsx: *fsx, ..Options::default() };
        let bound = seeds_max.unwrap_or(*bound);
        planted::activate(Some(name));
        let mut tried = (1..=bound).zip((*first..).step_by(*apart as usize));
        let found = tried.find_map(|(nth, seed)| run(seed, &options).broken.map(|broken| (nth, seed, broken)));
        planted::activate(None);
        match found {
            Some((nth, seed, broken)) => {
                // A seed that breaks anyway proves nothing about the planted bug.
                let anyway = run(seed, &options).is_broken();
                let note = if anyway { " (BUT THIS SEED BREAKS WITHOUT IT TOO)" } else { "" };
                let what: String = broken.detail.lines().next().unwrap_or_default().chars().take(90).collect();
                let seen = broken.invariant;
                println!("{name}: {seen:?} (table: {breaks:?}), {nth} of {bound} seeds, seed {seed}{note}: {what}");
                missed += u32::from(anyway);
            }
            None => {
                println!("{name}: NOT FOUND within {bound} seeds (table: {breaks:?})");
                missed += 1;
            }
        }
    }
    println!("{} planted bugs, {missed} not proven", wanted.len());
    Ok(missed > 0)
}
