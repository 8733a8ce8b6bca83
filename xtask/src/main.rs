//! Chores of the workspace: `cargo xtask tidy`, `cargo xtask requirements`, `cargo xtask fuzz`, `cargo xtask ci`.

mod ci;
mod fuzz;
mod requirements;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Root of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask stands in the workspace").to_owned()
}

/// All files git knows below `folder` whose name ends with `ending`, relative to the root.
fn tracked(root: &Path, ending: &str) -> Vec<PathBuf> {
    let output = std::process::Command::new("git").arg("ls-files").current_dir(root).output();
    let listed = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    listed
        .lines()
        .filter(|line| line.ends_with(ending))
        .map(PathBuf::from)
        .filter(|path| root.join(path).exists())
        .collect()
}

fn main() -> ExitCode {
    let root = root();
    let problems = match std::env::args().nth(1).as_deref() {
        Some("tidy") => tidy::check(&root),
        Some("requirements") => requirements::check(&root),
        Some("fuzz") => return fuzz::run(&root, &std::env::args().skip(2).collect::<Vec<_>>()),
        Some("ci") => return ci::run(&root),
        _ => {
            eprintln!("usage: cargo xtask tidy | requirements | fuzz [--coverage] [OPTIONS] | ci");
            return ExitCode::from(2);
        }
    };
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
