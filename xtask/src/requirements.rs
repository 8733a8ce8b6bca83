//! `docs/requirements.md` maps each R-number of the ledger to what shows it. A claim without its test is a lie; here it
//! fails.
//!
//! Table rows: `| R0047 | done | test:make_mds_creates_a_cluster | note |`. States: `done`, `partly`, `not yet`.
//! Evidence: `test:NAME` (a test function of that name exists), `cmd:WORDS` (a verb), `doc:PATH` (a file exists),
//! several with `;`.

use std::collections::BTreeSet;
use std::path::Path;

/// Numbers in the ledger.
const REQUIREMENTS: u32 = 643;

/// Gives a line per breach.
pub fn check(root: &Path) -> Vec<String> {
    let path = root.join("docs/requirements.md");
    let Ok(text) = std::fs::read_to_string(&path) else { return vec![format!("{} is missing", path.display())] };
    let tests = test_names(root);
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with("| R")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [number, state, evidence, ..] = cells.as_slice() else {
            problems.push(format!("malformed row: {line}"));
            continue;
        };
        seen.insert(number.to_string());
        match *state {
            "done" | "partly" if evidence.is_empty() => problems.push(format!("{number} is {state} without evidence")),
            "done" | "partly" => {
                let parts = evidence.split(';').map(str::trim);
                problems
                    .extend(parts.filter_map(|part| wrong(root, &tests, part)).map(|why| format!("{number}: {why}")));
            }
            "not yet" => {}
            other => problems.push(format!("{number}: `{other}` is not done, partly or not yet")),
        }
    }
    let missing = (1..=REQUIREMENTS).map(|n| format!("R{n:04}")).filter(|number| !seen.contains(number));
    problems.extend(missing.map(|number| format!("{number} is not in the map")));
    problems
}

fn wrong(root: &Path, tests: &BTreeSet<String>, evidence: &str) -> Option<String> {
    match evidence.split_once(':') {
        Some(("test", name)) if tests.contains(name) => None,
        Some(("test", name)) => Some(format!("there is no test `{name}`")),
        Some(("doc", path)) if root.join(path).exists() => None,
        Some(("doc", path)) => Some(format!("there is no file `{path}`")),
        Some(("cmd", words)) if words.starts_with("cairn ") => None,
        _ => Some(format!("`{evidence}` is not test:NAME, cmd:cairn … or doc:PATH")),
    }
}

fn test_names(root: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in crate::tracked(root, ".rs") {
        let text = std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let mut marked = false;
        for line in text.lines().map(str::trim_start) {
            let bare = line.trim_start_matches("pub ").trim_start_matches("async ");
            let function = bare.strip_prefix("fn ");
            if let (true, Some(rest)) = (marked, function) {
                names.insert(rest.split(['(', '<']).next().unwrap_or_default().to_owned());
            }
            // Inside `proptest!` the attribute stands directly above the function too.
            marked = line.starts_with("#[test]") || line.contains("::test]") || (marked && line.starts_with("#["));
        }
    }
    names
}
