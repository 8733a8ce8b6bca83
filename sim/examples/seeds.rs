//! Runs seeds without building the whole product: `seeds FIRST [COUNT [APART]] [--trace] [--faultless] [--fsx]`, with a
//! planted bug when `CAIRN_PLANT` names one; or `seeds planted NAME [SEEDS_MAX]`; or `seeds planted some [DRAW]`.
//! Prints every broken seed, then what was found how often.

use cairn_sim::run::{Options, run};
use std::collections::BTreeMap;

/// How many planted bugs `some` are.
const SOME: usize = 10;

#[expect(clippy::disallowed_methods, reason = "the speed of the simulator is wall-clock time")]
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| args.iter().any(|arg| arg == name);
    let plain: Vec<&String> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    if plain.first().is_some_and(|word| *word == "planted") {
        let name = plain.get(1).map_or("all", |name| name.as_str());
        let number = plain.get(2).and_then(|word| word.parse().ok());
        let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
        let verdict = match name {
            "some" => cairn_sim::planted::prove_some(number.unwrap_or_else(clock), SOME),
            _ => cairn_sim::planted::prove(name, number),
        };
        match verdict {
            Ok(missed) => std::process::exit(i32::from(missed)),
            Err(why) => panic!("{why}"),
        }
    }
    let number = |at: usize| plain.get(at).and_then(|word| word.parse::<u64>().ok());
    let (first, count, apart) = (number(0).unwrap_or(1), number(1).unwrap_or(1), number(2).unwrap_or(1));
    let options = Options {
        verbose: flag("--trace"),
        frames: flag("--frames"),
        faultless: flag("--faultless"),
        fsx: flag("--fsx"),
    };
    if let Ok(name) = std::env::var("CAIRN_PLANT") {
        let known = cairn_sim::planted::PLANTED.iter().find(|bug| bug.name == name).expect("a planted bug of the list");
        cairn_stdx::planted::activate(Some(known.name));
    }
    let begun = std::time::Instant::now();
    let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let (mut virtual_ns, mut steps) = (0u64, 0u64);
    let mut not_judged = Vec::new();
    for seed in (first..).step_by(apart as usize).take(count as usize) {
        let outcome = run(seed, &options);
        virtual_ns += outcome.virtual_ns;
        steps += outcome.steps;
        not_judged.extend(outcome.names_not_judged.then_some(seed));
        if let Some(broken) = &outcome.broken {
            let key: String = broken.detail.lines().next().unwrap_or_default().chars().take(100).collect();
            found.entry(format!("{:?} {key}", broken.invariant)).or_default().push(seed);
        }
        if outcome.is_broken() || count == 1 {
            println!("{outcome}\n");
        }
    }
    let real = begun.elapsed().as_secs_f64();
    for (what, seeds) in &found {
        println!("{:5} x {what}: {seeds:?}", seeds.len());
    }
    println!("shared names not judged in {} seeds: {not_judged:?}", not_judged.len());
    let broken: usize = found.values().map(Vec::len).sum();
    println!(
        "{count} seeds, {broken} broken; {:.1} seeds/s, {:.0} virtual seconds a second, {:.0} events/s",
        count as f64 / real,
        virtual_ns as f64 / 1e9 / real,
        steps as f64 / real
    );
}
