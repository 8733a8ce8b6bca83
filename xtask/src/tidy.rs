//! What a machine can check of the house style.

use std::path::Path;

/// Longest file, in lines.
const LINES_MAX: usize = 1000;
/// Longest line, in characters.
const COLUMNS_MAX: usize = 120;

/// Gives a line per breach.
pub fn check(root: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    for path in crate::tracked(root, ".rs").into_iter().filter(|path| !path.starts_with("crates/vendor")) {
        let Ok(text) = std::fs::read_to_string(root.join(&path)) else { continue };
        let name = path.display();
        let lines = text.lines().count();
        if lines > LINES_MAX {
            problems.push(format!("{name}: {lines} lines, a room to divide (at most {LINES_MAX})"));
        }
        // Tests and generated entry points explain themselves; every other file says what it is for.
        let is_test =
            path.components().any(|part| part.as_os_str() == "tests") || name.to_string().ends_with("tests.rs");
        if !is_test && !text.starts_with("//!") {
            problems.push(format!("{name}:1: the file does not begin with `//!` and its purpose"));
        }
        for (number, line) in text.lines().enumerate() {
            // Code is rustfmt's business; it leaves comments alone.
            let comment = line.trim_start().starts_with("//");
            if comment && line.chars().count() > COLUMNS_MAX && !line.contains("http") {
                problems.push(format!("{name}:{}: longer than {COLUMNS_MAX} columns", number + 1));
            }
        }
    }
    let manifests = crate::tracked(root, "Cargo.toml");
    for path in manifests.iter().filter(|path| path.starts_with("crates") && !path.starts_with("crates/vendor")) {
        let text = std::fs::read_to_string(root.join(path)).unwrap_or_default();
        if !text.contains("[lints]\nworkspace = true") {
            problems.push(format!("{}: does not take the lints of the workspace", path.display()));
        }
    }
    problems
}
