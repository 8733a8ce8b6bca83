//! The whole check, the same here and in CI: format, lints, unit and property tests, fuzz targets, simulation, system
//! tests.

use std::path::Path;
use std::process::{Command, ExitCode};

/// Fresh seeds of the simulator with faults in one run.
const SEEDS: &str = "300";
/// Fresh seeds without faults: every one must hold.
const SEEDS_FAULTLESS: &str = "100";

/// Seconds of mutated inputs for all fuzz targets together.
const FUZZ_SECONDS: &str = "40";

/// Runs every step; stops at the first that fails.
pub fn run(root: &Path) -> ExitCode {
    let binary = root.join("target/release/cairn").display().to_string();
    let steps: [(&str, &[&str]); 13] = [
        ("format", &["cargo", "fmt", "--all", "--check"]),
        ("lints", &["cargo", "clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
        ("house style", &["cargo", "xtask", "tidy"]),
        ("requirements", &["cargo", "xtask", "requirements"]),
        ("release build", &["cargo", "build", "--release", "--quiet", "-p", "cairn"]),
        // In release, so that dependencies are compiled once; assertions of invariants are on there too.
        (
            "unit and property tests",
            &["cargo", "test", "--release", "--workspace", "--exclude", "cairn-tests", "--quiet"],
        ),
        // A few seconds for each parser of bytes from outside; longer, and guided by coverage, by hand.
        ("fuzz targets", &["cargo", "xtask", "fuzz", "--total", FUZZ_SECONDS]),
        ("regression seeds", &[&binary, "sim", "--regressions"]),
        ("fresh seeds without faults", &[&binary, "sim", "--seeds", SEEDS_FAULTLESS, "--faultless"]),
        ("fresh seeds with faults", &[&binary, "sim", "--seeds", SEEDS]),
        ("an hour of virtual work on files", &[&binary, "sim", "--fsx"]),
        // A share of the planted bugs in each run: all of them, and the cores built with them, would take minutes
        // more.
        (
            "planted bugs",
            &[
                "cargo",
                "run",
                "--release",
                "--quiet",
                "-p",
                "cairn-sim",
                "--features",
                "planted",
                "--example",
                "seeds",
                "--",
                "planted",
                "some",
            ],
        ),
        ("system tests", &["cargo", "test", "--release", "-p", "cairn-tests", "--", "--test-threads=1"]),
    ];
    for (name, words) in steps {
        println!("== {name}: {}", words.join(" "));
        let status = Command::new(words[0]).args(&words[1..]).current_dir(root).status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => {
                eprintln!("{name} failed: {status}");
                return ExitCode::FAILURE;
            }
            Err(error) => {
                eprintln!("{name} could not run: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("all checks passed");
    ExitCode::SUCCESS
}
