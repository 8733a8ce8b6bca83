//! Chaos: a cluster over six hosts, faults drawn from a seed, real clients whose whole history is judged.
//!
//! A run is made of rounds. A round breaks things for about twenty seconds, mends all of them, and then wants: every
//! worker goes on, the cluster is healthy, every block reads as the history allows. `docs/design/chaos.md` says what is
//! drawn and what is judged.

pub mod history;
pub mod lab;
pub mod load;
pub mod names;
pub mod plan;
pub mod timeline;

use crate::process;
use cairn_stdx::Rng;
use lab::{EXPORT, Lab, NBD_PORT, SERVER_HOSTS};
use load::{Load, Loads, Place};
use plan::{Fault, Round, Step};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// After everything was mended, each worker does its next steps within this time.
///
/// This and the limits below find what is stuck, not what is slow: a good run on an idle machine needs a tenth of them.
const PROGRESS_LIMIT: Duration = Duration::from_secs(180);
/// Steps that show that a worker goes on.
const PROGRESS_STEPS: u64 = 20;
/// After everything was mended, the cluster is healthy within this time.
const HEALTH_LIMIT: Duration = Duration::from_secs(300);
const READ_BACK_LIMIT: Duration = Duration::from_secs(180);
/// Workers of each load, so that operations of one volume overlap.
const WORKERS: usize = 2;
/// Load before the first fault of a run.
const WARM_UP: Duration = Duration::from_secs(2);

/// What a run did.
#[derive(Debug, Default)]
pub struct Report {
    /// Rounds.
    pub rounds: u64,
    /// Faults.
    pub faults: u64,
    /// What happened, with times.
    pub diary: Vec<String>,
}

/// Runs rounds until `lasts` is over; at least one.
///
/// # Errors
/// What was wrong, in words; the diary says what happened before.
pub fn run(root: &Path, seed: u64, lasts: Duration) -> Result<Report, (String, Vec<String>)> {
    let mut lab =
        Lab::new(root, &lab::FAULT_DISK_HOSTS).map_err(|error| (format!("make the hosts: {error}"), Vec::new()))?;
    let place = Place::Nbd { host: SERVER_HOSTS, port: NBD_PORT, export: EXPORT.to_owned() };
    let nbd = Arc::new(Load::new("export", 1, seed ^ 1, place, WORKERS));
    let file = Place::File(lab.mountpoint().join(EXPORT));
    let file = Arc::new(Load::new("file", 2, seed ^ 2, file, WORKERS));
    lab.add_front_ends(&nbd, &file);
    let names_dir = lab.mountpoint().join("names");
    std::fs::create_dir(&names_dir).map_err(|error| (format!("make a directory: {error}"), Vec::new()))?;
    let names = names::Names::new(&names_dir);
    let loads = Loads { all: vec![Arc::clone(&nbd), file], names, gate: load::Gate::default() };
    // The workers borrow hosts while the lab changes what runs on them.
    let hosts: Vec<crate::hosts::Host> = lab.hosts().iter().map(|host| host.again().expect("duplicate")).collect();
    let outcome = std::thread::scope(|scope| {
        for load in &loads.all {
            for worker in 0..WORKERS {
                let (hosts, gate) = (&hosts, &loads.gate);
                scope.spawn(move || load.work(worker, hosts, gate));
            }
        }
        scope.spawn(|| loads.names.work(&loads.gate));
        let run = std::panic::AssertUnwindSafe(|| {
            let mut run = Run {
                lab: &mut lab,
                loads: &loads,
                hosts: &hosts,
                nbd: &nbd,
                export: "nbd-x".to_owned(),
                rng: Rng::new(seed),
                report: Report::default(),
            };
            run.rounds(lasts).map(|()| run.report)
        });
        let outcome = std::panic::catch_unwind(run);
        // Whoever waits for a front end ends with it.
        loads.gate.end();
        lab.kill_everything();
        outcome
    });
    let diary = std::mem::take(&mut lab.diary);
    match outcome {
        Ok(Ok(report)) => Ok(Report { diary, ..report }),
        Ok(Err(why)) => Err((why, diary)),
        Err(panic) => Err((text_of(panic), diary)),
    }
}

fn text_of(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "the harness panicked".to_owned())
}

struct Run<'a> {
    lab: &'a mut Lab,
    loads: &'a Loads,
    hosts: &'a [crate::hosts::Host],
    nbd: &'a Arc<Load>,
    /// The process that serves the volume now.
    export: String,
    rng: Rng,
    report: Report,
}

impl Run<'_> {
    fn rounds(&mut self, lasts: Duration) -> Result<(), String> {
        let begun = process::now();
        self.goes_on(process::now())?;
        self.linger(WARM_UP)?;
        while self.report.rounds == 0 || begun.elapsed() < lasts {
            let round = plan::draw(&mut self.rng, &self.export);
            self.report.rounds += 1;
            self.report.faults += round.steps.len() as u64 + u64::from(round.kill_everything);
            let number = self.report.rounds;
            self.lab.note(&format!("round {number}"));
            if let Some(host) = round.replaces {
                self.replaces(host)?;
            }
            self.breaks(&round)?;
            if round.kill_everything {
                self.everything_dies()?;
            }
            self.heals()?;
        }
        // However slow the machine is, what is judged at the end was worth judging.
        while !self.loads.all.iter().all(|load| load.history.lock().expect("not poisoned").counts.are_enough()) {
            self.goes_on(process::now())?;
        }
        for load in &self.loads.all {
            let (counts, longest) = (load.history.lock().expect("not poisoned").counts, &load.stall_ms_max);
            let longest = longest.load(Ordering::SeqCst) as f64 / 1e3;
            self.lab.note(&format!("{}: {counts:?}, longest operation {longest:.1} s", load.name));
        }
        Ok(())
    }

    fn watch(&mut self) -> Result<(), String> {
        self.lab.tend();
        self.loads.broken().map_or(Ok(()), Err)
    }

    fn linger(&mut self, time: Duration) -> Result<(), String> {
        let begun = process::now();
        while begun.elapsed() < time {
            self.watch()?;
            process::pause();
        }
        Ok(())
    }

    fn breaks(&mut self, round: &Round) -> Result<(), String> {
        let begun = process::now();
        let mut coming: Vec<Step> = round.steps.iter().rev().cloned().collect();
        let mut going: Vec<(u64, Fault)> = Vec::new();
        while !coming.is_empty() || !going.is_empty() {
            let now_ms = begun.elapsed().as_millis() as u64;
            if coming.last().is_some_and(|step| step.at_ms <= now_ms) {
                let step = coming.pop().expect("looked at just now");
                self.lab.note(&format!("begins, for {} ms: {:?}", step.lasts_ms, step.fault));
                plan::begin(self.lab, &step.fault, &mut self.export, self.nbd, &mut self.rng);
                going.push((now_ms + step.lasts_ms, step.fault));
            }
            if let Some(index) = going.iter().position(|(end_ms, _)| *end_ms <= now_ms) {
                let (_, fault) = going.swap_remove(index);
                self.lab.note(&format!("ends: {fault:?}"));
                plan::end(self.lab, &fault, &self.export);
            }
            self.watch()?;
            process::pause();
        }
        Ok(())
    }

    fn is_healthy(&mut self, since: Instant) -> Result<(), String> {
        loop {
            self.watch()?;
            match self.lab.is_healthy() {
                Ok(()) => return Ok(()),
                Err(why) if since.elapsed() > HEALTH_LIMIT => {
                    return Err(format!("I17: not healthy within {} s: {why}", HEALTH_LIMIT.as_secs()));
                }
                Err(_) => process::pause(),
            }
        }
    }

    /// A disk is lost, its server removed and made anew, while the load goes on and nothing else is wrong.
    fn replaces(&mut self, host: usize) -> Result<(), String> {
        self.lab.note(&format!("the disk of cs-{} is lost", lab::HOSTS[host]));
        self.lab.lose_disk(host).map_err(|error| format!("lose a disk: {error}"))?;
        let begun = process::now();
        while !self.lab.replace_disk(host)? {
            self.watch()?;
            if begun.elapsed() > HEALTH_LIMIT {
                return Err(format!("I17: a lost server cannot be removed: {}", self.lab.last_refusal));
            }
        }
        let replaced = begun.elapsed().as_secs_f64();
        self.is_healthy(process::now())?;
        let healthy = begun.elapsed().as_secs_f64();
        self.lab.note(&format!("replaced after {replaced:.1} s, all copies whole after {healthy:.1} s"));
        Ok(())
    }

    /// Nothing is cut, stopped or missing any more.
    fn mend(&mut self) {
        self.lab.network.heal();
        let spare = if self.export == "nbd-x" { "nbd-y" } else { "nbd-x" };
        self.lab.kill(spare, false);
        for host in 0..lab::HOSTS.len() {
            for label in self.lab.labels_on(host).into_iter().filter(|label| label != spare) {
                self.lab.signal(&label, libc::SIGCONT);
                self.lab.start(&label);
            }
        }
    }

    fn everything_dies(&mut self) -> Result<(), String> {
        self.lab.note("everything dies");
        self.lab.kill_everything();
        self.park()?;
        for load in &self.loads.all {
            load.history.lock().expect("not poisoned").check()?;
        }
        self.mend();
        for load in &self.loads.all {
            let found = self.read_back(load)?;
            load.history.lock().expect("not poisoned").died_and_found(&found)?;
        }
        self.check_names()?;
        self.loads.gate.close(false);
        Ok(())
    }

    fn heals(&mut self) -> Result<(), String> {
        self.mend();
        let mended = process::now();
        self.goes_on(mended)?;
        let went_on = mended.elapsed();
        self.is_healthy(mended)?;
        let healthy = mended.elapsed();
        self.park()?;
        let mut blocks = 0;
        for load in &self.loads.all {
            let found = self.read_back(load)?;
            let mut history = load.history.lock().expect("not poisoned");
            history.check()?;
            history.begin_anew(&found);
            blocks += found.len();
        }
        let names = self.check_names()?;
        self.loads.gate.close(false);
        let (went_on, healthy) = (went_on.as_secs_f64(), healthy.as_secs_f64());
        self.lab.note(&format!(
            "goes on after {went_on:.1} s, healthy after {healthy:.1} s; {blocks} blocks and {names} names judged"
        ));
        Ok(())
    }

    /// Every worker does some steps.
    fn goes_on(&mut self, since: Instant) -> Result<(), String> {
        let counters: Vec<&AtomicU64> = self.loads.counters();
        let wanted: Vec<u64> = counters.iter().map(|done| done.load(Ordering::SeqCst) + PROGRESS_STEPS).collect();
        while !counters.iter().zip(&wanted).all(|(done, wanted)| done.load(Ordering::SeqCst) >= *wanted) {
            self.lab.tend();
            if let Some(why) = self.loads.broken() {
                return Err(why);
            }
            if since.elapsed() > PROGRESS_LIMIT {
                let doing = self.loads.doing();
                return Err(format!("I17: no progress within {} s: {doing}", PROGRESS_LIMIT.as_secs()));
            }
            process::pause();
        }
        Ok(())
    }

    /// Workers end what they do and wait.
    fn park(&mut self) -> Result<(), String> {
        self.loads.gate.close(true);
        let begun = process::now();
        while self.loads.gate.parked() < self.loads.worker_count() {
            self.watch()?;
            if begun.elapsed() > PROGRESS_LIMIT {
                return Err(format!("I17: an operation does not end: {}", self.loads.doing()));
            }
            process::pause();
        }
        Ok(())
    }

    fn check_names(&mut self) -> Result<usize, String> {
        let names = &self.loads.names;
        let found = std::thread::scope(|scope| {
            let reader = scope.spawn(|| names.check(READ_BACK_LIMIT));
            while !reader.is_finished() {
                self.lab.tend();
                process::pause();
            }
            reader.join().expect("checking names does not panic")
        })?;
        self.loads.broken().map_or(Ok(found), Err)
    }

    /// Reads all of a load back; the servers are tended meanwhile.
    fn read_back(&mut self, load: &Load) -> Result<std::collections::BTreeMap<u64, u64>, String> {
        let hosts = self.hosts;
        let found = std::thread::scope(|scope| {
            let reader = scope.spawn(|| load.read_back(hosts, READ_BACK_LIMIT));
            while !reader.is_finished() {
                self.lab.tend();
                process::pause();
            }
            reader.join().expect("reading back does not panic")
        })?;
        self.loads.broken().map_or(Ok(found), Err)
    }
}
