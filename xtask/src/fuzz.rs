//! `cargo xtask fuzz`: builds the fuzz targets and runs them. With `--coverage` the crates of the workspace are
//! compiled with LLVM's coverage instrumentation, and mutations are guided by it.

use std::path::Path;
use std::process::{Command, ExitCode};

/// Passes `words` on to the runner, all but `--coverage`.
pub fn run(root: &Path, words: &[String]) -> ExitCode {
    let coverage = words.iter().any(|word| word == "--coverage");
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--release", "--quiet", "--package", "cairn-fuzz"]).current_dir(root);
    if coverage {
        // Only the workspace is instrumented, so dependencies are those of the ordinary build.
        cargo.env("RUSTC_WORKSPACE_WRAPPER", root.join("fuzz/rustc-coverage")).args(["--features", "coverage"]);
    }
    let status = cargo.arg("--").args(words.iter().filter(|word| *word != "--coverage")).status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo could not run: {error}");
            ExitCode::FAILURE
        }
    }
}
