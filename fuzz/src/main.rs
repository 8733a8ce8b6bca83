//! Runs fuzz targets. `cargo xtask fuzz` builds and calls it; the arguments are the same.

use cairn_fuzz::engine::{Options, artifacts, run};
use cairn_fuzz::{TARGETS, Target, alloc, corpus, engine};
use std::process::ExitCode;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

const USAGE: &str = "usage: cairn-fuzz [--target NAME]... [--seconds N | --total N] [--seed N] [--keep]
       cairn-fuzz --list | --table | --seeds | --input FILE --target NAME
  --seconds N   mutate each target for so long (default 10)
  --total N     share so many seconds among the targets
  --seed N      seed of the mutations; drawn and printed otherwise
  --keep        write inputs that reached new code into fuzz/corpus (only a build with coverage finds any)
  --list        names of the targets
  --table       the table of docs/design/fuzzing.md
  --seeds       write the inputs made by the real encoders into fuzz/corpus
  --input FILE  run one input";

#[derive(Default)]
struct Arguments {
    targets: Vec<&'static Target>,
    seconds: Option<f64>,
    total: Option<f64>,
    seed: Option<u64>,
    input: Option<String>,
    verb: Option<String>,
    keep: bool,
}

fn parse() -> Result<Arguments, String> {
    let mut arguments = Arguments::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--target" => {
                let name = value()?;
                let found = TARGETS.iter().find(|target| target.name == name);
                arguments.targets.push(found.ok_or_else(|| format!("there is no target {name}; see --list"))?);
            }
            "--seconds" => arguments.seconds = Some(value()?.parse().map_err(|_| "--seconds N".to_owned())?),
            "--total" => arguments.total = Some(value()?.parse().map_err(|_| "--total N".to_owned())?),
            "--seed" => arguments.seed = Some(value()?.parse().map_err(|_| "--seed N".to_owned())?),
            "--input" => arguments.input = Some(value()?),
            "--keep" => arguments.keep = true,
            "--list" | "--table" | "--seeds" => arguments.verb = Some(word),
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    if arguments.targets.is_empty() {
        arguments.targets = TARGETS.iter().collect();
    }
    Ok(arguments)
}

fn write_seeds(targets: &[&Target]) -> ExitCode {
    for target in targets {
        match corpus::write_seeds(target) {
            Ok(count) => println!("{:<16} {count} inputs", target.name),
            Err(error) => {
                eprintln!("{}: {error}", target.name);
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn one_input(target: &Target, path: &str) -> ExitCode {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::FAILURE;
        }
    };
    match engine::execute(target, &bytes) {
        (Some(finding), _) => {
            println!("{}: {finding}", target.name);
            ExitCode::FAILURE
        }
        (None, peak) => {
            println!("{}: holds, {} bytes of input, {peak} bytes of memory at most", target.name, bytes.len());
            ExitCode::SUCCESS
        }
    }
}

fn main() -> ExitCode {
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match arguments.verb.as_deref() {
        Some("--list") => TARGETS.iter().for_each(|target| println!("{}", target.name)),
        Some("--table") => print!("{}", cairn_fuzz::table()),
        Some(_) => return write_seeds(&arguments.targets),
        None => {
            if let Some(path) = &arguments.input {
                return one_input(arguments.targets[0], path);
            }
            return fuzz(&arguments);
        }
    }
    ExitCode::SUCCESS
}

fn fuzz(arguments: &Arguments) -> ExitCode {
    let seed = arguments.seed.unwrap_or_else(|| u64::from_le_bytes(cairn_env_real::random_bytes::<8>()) >> 32);
    let shared = arguments.total.map(|total| total / arguments.targets.len() as f64);
    let seconds = arguments.seconds.or(shared).unwrap_or(10.0);
    let guided = if cfg!(feature = "coverage") { "guided by coverage" } else { "blind" };
    println!("{} targets, {seconds:.1} s each, {guided}; again with --seed {seed}", arguments.targets.len());
    println!("target           corpus  executions  per second    peak KiB  slowest ms   edges    kept");
    let mut broken = 0;
    for target in &arguments.targets {
        let time = Duration::from_secs_f64(seconds);
        let options = Options { time, seed, artifacts: artifacts(), keep: arguments.keep };
        let report = match run(target, &options) {
            Ok(report) => report,
            Err(error) => {
                eprintln!("{}: {error}", target.name);
                return ExitCode::FAILURE;
            }
        };
        println!(
            "{:<16} {:>6} {:>11} {:>11} {:>11} {:>11.1} {:>7} {:>7}",
            target.name,
            report.corpus,
            report.executions,
            report.rate,
            report.peak >> 10,
            report.slowest.as_secs_f64() * 1e3,
            report.edges,
            report.kept
        );
        report.findings.iter().for_each(|finding| println!("  BROKEN {finding}"));
        broken += report.findings.len();
    }
    if broken > 0 {
        println!("{broken} findings: move the inputs to fuzz/corpus/TARGET/regress-WHAT with the mend");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
