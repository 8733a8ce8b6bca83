//! `cairn sim`: replays a seed, runs fresh ones, proves that planted bugs are found.

use crate::exit::usage;
use anyhow::Result;
use cairn_sim::run::{Options, Outcome};
use clap::Args;
use std::time::{Duration, Instant};

/// Seeds of `--fsx` in which clients work for an hour of virtual time.
const FSX_HOUR: u64 = 12;

/// Options of `sim`.
#[derive(Args, Debug)]
pub struct SimArgs {
    /// Replays one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints every event of the replay.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Print every frame delivered as well, but for those of Raft.
    #[arg(long)]
    frames: bool,
    /// Runs so many fresh seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// Runs fresh seeds for so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Without any fault: the plain path must hold.
    #[arg(long)]
    faultless: bool,
    /// Clients work on files through the logic of mounts, as fsx does, for five virtual minutes a seed; seeds with an
    /// even number have faults. Alone: an hour of it.
    #[arg(long)]
    fsx: bool,
    /// Turns a planted bug on and reports the seed that found it; `all` for each in turn. Needs a build with
    /// `--features planted`.
    #[arg(long)]
    planted: Option<String>,
    /// Runs the seeds of the regression list.
    #[arg(long)]
    regressions: bool,
}

/// Runs the verb.
pub fn run(args: &SimArgs) -> Result<i32> {
    if let Some(name) = &args.planted {
        return cairn_sim::planted::prove(name, None).map_err(anyhow::Error::msg).map(i32::from);
    }
    let options = Options { faultless: args.faultless, fsx: args.fsx, ..Options::default() };
    if let Some(seed) = args.seed {
        let outcome = cairn_sim::run::run(
            seed,
            &Options {
                verbose: args.trace || args.frames,
                frames: args.frames,
                faultless: args.faultless,
                fsx: args.fsx,
            },
        );
        println!("{outcome}");
        return Ok(i32::from(outcome.is_broken()));
    }
    if args.regressions {
        return Ok(run_all(cairn_sim::regressions(), None, &options));
    }
    let first = u64::from_le_bytes(cairn_env_real::random_bytes()) >> 16;
    match (args.seeds, args.minutes) {
        (Some(count), None) => Ok(run_all(first..first + count, None, &options)),
        (None, Some(minutes)) => Ok(run_all(first.., Some(Duration::from_secs(60 * minutes)), &options)),
        (None, None) if args.fsx => Ok(run_all(first..first + FSX_HOUR, None, &options)),
        _ => Err(usage("give one of --seed N, --seeds K, --minutes M, --fsx, --planted NAME or --regressions")),
    }
}

#[expect(clippy::disallowed_methods, reason = "the speed of the simulator is wall-clock time")]
fn run_all(seeds: impl IntoIterator<Item = u64>, limit: Option<Duration>, options: &Options) -> i32 {
    let begun = Instant::now();
    let (mut count, mut virtual_ns, mut broken, mut not_judged) = (0u64, 0u64, 0, 0u64);
    for seed in seeds {
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            break;
        }
        if count == 0 {
            eprintln!("first seed {seed}");
        }
        let outcome: Outcome = cairn_sim::run::run(seed, options);
        count += 1;
        virtual_ns += outcome.virtual_ns;
        not_judged += u64::from(outcome.names_not_judged);
        if outcome.is_broken() {
            println!("{outcome}");
            broken += 1;
            if broken == 3 {
                break;
            }
        }
    }
    let (real, simulated) = (begun.elapsed().as_secs_f64(), virtual_ns as f64 / 1e9);
    println!(
        "{count} seeds, {broken} broken, {not_judged} with shared names not judged, {simulated:.0} cluster-seconds in {real:.1} s ({:.0} x)",
        simulated / real
    );
    i32::from(broken > 0)
}
