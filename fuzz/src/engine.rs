//! The loop: take an input, change it, run it, judge it, keep it if it reached something new.
//!
//! A panic, memory beyond the bound and an execution that does not end are findings. Each is saved and the run goes on,
//! except where the process cannot: an endless loop and an allocation that would take the machine down end it.

#![expect(clippy::disallowed_methods, reason = "the time box of a run is real time, and the watchdog is a thread")]

use crate::coverage::{Seen, compared};
use crate::{Target, alloc, corpus, mutate};
use cairn_stdx::Rng;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// An execution that takes longer than this does not end. Parsers take microseconds, cores milliseconds.
const ENDLESS: Duration = Duration::from_secs(20);
/// Inputs kept in memory.
const POOL_MAX: usize = 4096;
/// Findings of one target after which it has nothing more to say.
const FINDINGS_MAX: usize = 20;

/// How a target is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time for mutations; the corpus is always run whole.
    pub time: Duration,
    /// The seed of the mutations.
    pub seed: u64,
    /// Where findings are saved.
    pub artifacts: PathBuf,
    /// Write inputs that reached new code into the corpus.
    pub keep: bool,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Inputs of the corpus.
    pub corpus: usize,
    /// Executions, those of the corpus included.
    pub executions: u64,
    /// Executions in a second.
    pub rate: u64,
    /// Highest peak of memory in one section.
    pub peak: usize,
    /// The longest execution.
    pub slowest: Duration,
    /// Edges reached; zero in a build that is not instrumented.
    pub edges: usize,
    /// Inputs kept because they reached something new.
    pub kept: usize,
    /// What went wrong, each with the input's path.
    pub findings: Vec<String>,
}

/// The input that runs now, for the watchdog and the allocator.
static CURRENT: Mutex<(&'static str, Vec<u8>)> = Mutex::new(("", Vec::new()));
static EXECUTION: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Saves the current input and ends the process: nothing can go on after this.
pub(crate) fn give_up(what: &str) -> ! {
    let saved = match CURRENT.try_lock() {
        Ok(current) => {
            let name = current.0;
            let path = corpus::save(&artifacts(), name, &current.1);
            format!("{name}: {what}; input {}", path.map_or_else(|e| e.to_string(), |p| p.display().to_string()))
        }
        Err(_) => what.to_owned(),
    };
    eprintln!("{saved}");
    std::process::abort()
}

/// Where findings are saved.
pub fn artifacts() -> PathBuf {
    corpus::root().with_file_name("artifacts")
}

fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(|at| format!("{}:{}", at.file(), at.line())).unwrap_or_default();
            let text = info.payload_as_str().unwrap_or("no text").chars().take(300).collect::<String>();
            PANIC.with(|panic| *panic.borrow_mut() = Some(format!("panic at {place}: {text}")));
        }));
        std::thread::spawn(|| {
            let mut last = (u64::MAX, Instant::now());
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let now = EXECUTION.load(Ordering::Relaxed);
                if now != last.0 || now.is_multiple_of(2) {
                    last = (now, Instant::now());
                } else if last.1.elapsed() > ENDLESS {
                    give_up("an execution does not end");
                }
            }
        });
    });
}

/// Runs one input; says what is wrong with it, if anything is, and the peak of its memory.
pub fn execute(target: &Target, bytes: &[u8]) -> (Option<String>, usize) {
    prepare();
    {
        let mut current = CURRENT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        current.0 = target.name;
        current.1.clear();
        current.1.extend_from_slice(bytes);
    }
    alloc::begin(target.bound.base, target.bound.factor);
    // Odd while an execution is under way.
    EXECUTION.fetch_add(1, Ordering::Relaxed);
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    EXECUTION.fetch_add(1, Ordering::Relaxed);
    let worst = alloc::worst();
    if outcome.is_err() {
        let text = PANIC.with(|panic| panic.borrow_mut().take());
        return (Some(text.unwrap_or_else(|| "panic".to_owned())), worst.largest);
    }
    let over = (worst.over > 0).then(|| {
        format!("memory: {} bytes for {} bytes of input, {} beyond the bound", worst.peak, worst.input, worst.over)
    });
    (over, worst.largest)
}

/// The kind of a finding: one of each is enough.
fn kind_of(finding: &str) -> String {
    finding.split(": ").next().unwrap_or_default().to_owned()
}

struct Run<'a> {
    target: &'a Target,
    options: &'a Options,
    report: Report,
    seen: Seen,
    kinds: BTreeSet<String>,
    pool: Vec<Vec<u8>>,
}

impl Run<'_> {
    /// Runs an input; true when it reached something new.
    fn try_input(&mut self, bytes: &[u8]) -> bool {
        self.seen.clear();
        let started = Instant::now();
        let (finding, peak) = execute(self.target, bytes);
        self.report.slowest = self.report.slowest.max(started.elapsed());
        self.report.executions += 1;
        self.report.peak = self.report.peak.max(peak);
        if let Some(finding) = finding {
            if self.kinds.insert(kind_of(&finding)) {
                let (small, finding) = self.smaller(bytes, finding);
                let path = corpus::save(&self.options.artifacts, self.target.name, &small);
                let path = path.map_or_else(|error| error.to_string(), |path| path.display().to_string());
                self.report.findings.push(format!("{finding}\n    input of {} bytes: {path}", small.len()));
            }
            return false;
        }
        self.seen.look()
    }

    /// Takes pieces out of a failing input while it fails in the same way.
    fn smaller(&self, bytes: &[u8], finding: String) -> (Vec<u8>, String) {
        let (mut best, mut text) = (bytes.to_vec(), finding);
        let (mut width, mut tries) = (best.len().next_power_of_two() / 2, 400);
        while width > 0 {
            let mut at = 0;
            while at < best.len() && tries > 0 {
                tries -= 1;
                let mut less = best.clone();
                less.drain(at..(at + width).min(best.len()));
                (self.target.seal)(&mut less);
                match execute(self.target, &less).0 {
                    Some(found) if less.len() < best.len() && kind_of(&found) == kind_of(&text) => {
                        (best, text) = (less, found);
                    }
                    _ => at += width,
                }
            }
            width /= 2;
        }
        (best, text)
    }

    fn mutations(&mut self, started: Instant) {
        let mut rng = Rng::new(self.options.seed);
        let mut fresh = Vec::new();
        while started.elapsed() < self.options.time && self.report.findings.len() < FINDINGS_MAX {
            // The latest are the least known.
            let last = self.pool.len() as u64;
            let at = if rng.chance(1, 3) { last - 1 - rng.below(last.min(32)) } else { rng.below(last) };
            let mut input = self.pool[at as usize].clone();
            let other = self.pool[rng.below(last) as usize].clone();
            let hints = if Seen::guided() && rng.chance(1, 2) { compared() } else { Vec::new() };
            mutate::mutate(self.target, &mut input, &other, &hints, 1 << rng.below(5), &mut rng);
            if rng.chance(3, 4) {
                (self.target.seal)(&mut input);
            }
            if self.try_input(&input) && self.pool.len() < POOL_MAX {
                self.report.kept += 1;
                fresh.push(input.clone());
                self.pool.push(input);
            }
        }
        if self.options.keep {
            self.keep(fresh);
        }
    }

    /// Writes those of the new inputs into the corpus that are still needed when the shortest go first.
    fn keep(&mut self, mut fresh: Vec<Vec<u8>>) {
        fresh.sort_by_key(Vec::len);
        self.seen = Seen::default();
        let held = corpus::load(self.target).unwrap_or_default();
        held.iter().for_each(|(_, bytes)| {
            self.try_input(bytes);
        });
        self.report.kept = 0;
        for input in fresh {
            // An edge that is new, not only one that was taken more often: the corpus stays small.
            let edges = self.seen.edges;
            self.try_input(&input);
            let new = self.seen.edges > edges;
            if new && corpus::save(&corpus::folder(self.target), "found", &input).is_ok() {
                self.report.kept += 1;
            }
        }
    }
}

/// Runs the corpus of a target and then mutations of it until the time is over.
///
/// # Errors
/// When the corpus cannot be read.
pub fn run(target: &Target, options: &Options) -> std::io::Result<Report> {
    let mut inputs: BTreeMap<String, Vec<u8>> = corpus::load(target)?.into_iter().collect();
    for (name, bytes) in (target.seeds)() {
        inputs.entry(format!("seed-{name}")).or_insert(bytes);
    }
    let mut run = Run {
        target,
        options,
        report: Report { corpus: inputs.len(), ..Report::default() },
        seen: Seen::default(),
        kinds: BTreeSet::new(),
        pool: vec![Vec::new()],
    };
    let started = Instant::now();
    for bytes in inputs.into_values() {
        run.try_input(&bytes);
        run.pool.push(bytes);
    }
    // The corpus does not count against the time box: it is the part that must be run whole.
    let begun = Instant::now();
    run.mutations(begun);
    let spent = started.elapsed().as_secs_f64().max(0.001);
    run.report.rate = (run.report.executions as f64 / spent) as u64;
    run.report.edges = run.seen.edges;
    Ok(run.report)
}
