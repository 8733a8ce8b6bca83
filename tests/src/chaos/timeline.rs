//! Timelines: what clients feel of one fault at a time, printed and not judged by speed. Data is judged as ever.
//!
//! Single 4 KiB blocks are written through the export, 32 at a time; a client of the mount makes and removes names, one
//! after another. A scene prints how many of both were answered in each tenth of a second, the longest time in which
//! none was, and the longest single operation. The command stands in `docs/performance.md`.

use super::history::History;
use super::lab::{EXPORT, Lab, NBD_PORT, SERVER_HOSTS};
use super::load::{Gate, Load, Place};
use crate::hosts::Host;
use crate::process;
use serde_json::Value;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Writes under way at a time.
const DEPTH: usize = 32;
/// Load before each fault.
const BEFORE: Duration = Duration::from_secs(3);
/// Load that is printed before the fault.
const PRINTED_BEFORE: Duration = Duration::from_secs(1);
const TENTH: Duration = Duration::from_millis(100);
/// Only what is stuck takes so long.
const LIMIT: Duration = Duration::from_secs(300);

/// When each operation began and when it was answered.
pub struct Meter {
    begun: Instant,
    answered: Mutex<Vec<(Duration, Duration)>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self { begun: process::now(), answered: Mutex::default() }
    }
}

/// What a scene shows of one meter.
struct Shown {
    /// Operations answered in each tenth of a second.
    tenths: Vec<usize>,
    /// Longest time without any answer.
    gap: Duration,
    /// All times without any answer for a tenth of a second or more, together.
    still: Duration,
    /// Longest operation that was answered.
    longest: Duration,
}

impl Meter {
    /// An operation that began at `begun` is answered now.
    pub fn answered(&self, begun: Instant) {
        let times = (begun - self.begun, self.begun.elapsed());
        self.answered.lock().expect("not poisoned").push(times);
    }

    /// True when something was answered at or after `at`.
    fn answered_since(&self, at: Instant) -> bool {
        self.answered.lock().expect("not poisoned").last().is_some_and(|(_, end)| self.begun + *end >= at)
    }

    /// When the first thing was answered at or after `at`.
    fn first_since(&self, at: Instant) -> Option<Instant> {
        let answered = self.answered.lock().expect("not poisoned");
        answered.iter().map(|(_, end)| self.begun + *end).filter(|end| *end >= at).min()
    }

    /// What was answered from `from` to `to`, and forgets all before.
    fn show(&self, from: Instant, to: Instant) -> Shown {
        let (from, to) = (from - self.begun, to - self.begun);
        let mut all = std::mem::take(&mut *self.answered.lock().expect("not poisoned"));
        all.retain(|(_, end)| *end >= from && *end < to);
        all.sort_unstable_by_key(|(_, end)| *end);
        let mut tenths = vec![0; (to - from).as_millis().div_ceil(TENTH.as_millis()) as usize];
        let mut last = from;
        let (mut gap, mut still, mut longest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        for (_, end) in &all {
            tenths[((*end - from).as_millis() / TENTH.as_millis()) as usize] += 1;
        }
        for (begin, end) in all.into_iter().chain([(to, to)]) {
            gap = gap.max(end - last);
            still += if end - last >= TENTH { end - last } else { Duration::ZERO };
            longest = longest.max(end.saturating_sub(begin));
            last = end;
        }
        Shown { tenths, gap, still, longest }
    }
}

struct Scenes<'a> {
    lab: &'a mut Lab,
    data: &'a Load,
    names: &'a Meter,
}

/// Shows all scenes.
///
/// # Errors
/// Something was stuck or wrong, in words; and what happened before.
pub fn run(root: &Path) -> Result<(), (String, Vec<String>)> {
    let mut lab = Lab::new(root, &[]).map_err(|error| (format!("make the hosts: {error}"), Vec::new()))?;
    let place = Place::Nbd { host: SERVER_HOSTS, port: NBD_PORT, export: EXPORT.to_owned() };
    let data = Arc::new(Load::new("export", 1, 1, place, DEPTH).measured(Meter::default()));
    let file = Arc::new(Load::new("file", 2, 2, Place::File(lab.mountpoint().join(EXPORT)), 0));
    lab.add_front_ends(&data, &file);
    let hosts: Vec<Host> = lab.hosts().iter().map(|host| host.again().expect("duplicate")).collect();
    let (gate, names) = (Gate::default(), Meter::default());
    let dir = lab.mountpoint();
    let outcome = std::thread::scope(|scope| {
        for worker in 0..DEPTH {
            let (data, hosts, gate) = (&data, &hosts, &gate);
            scope.spawn(move || data.work(worker, hosts, gate));
        }
        scope.spawn(|| make_names(&dir, &gate, &names));
        let shown = std::panic::AssertUnwindSafe(|| {
            let mut scenes = Scenes { lab: &mut lab, data: &data, names: &names };
            scenes.all()?;
            scenes.judge(&gate, &hosts)
        });
        let outcome = std::panic::catch_unwind(shown);
        // Whoever waits for a front end ends with it.
        gate.end();
        lab.kill_everything();
        outcome
    });
    let diary = std::mem::take(&mut lab.diary);
    match outcome {
        Ok(outcome) => outcome.map_err(|why| (why, diary)),
        Err(panic) => Err((super::text_of(panic), diary)),
    }
}

/// A client that makes a name and removes it, again and again.
fn make_names(dir: &Path, gate: &Gate, meter: &Meter) {
    process::own_descriptors();
    for number in 0u64.. {
        if gate.has_ended() {
            return;
        }
        gate.pass();
        let path = dir.join(format!("timeline{number}"));
        let begun = process::now();
        let made = File::options().write(true).create_new(true).open(&path);
        if made.is_err() {
            process::pause();
            continue;
        }
        meter.answered(begun);
        let begun = process::now();
        if std::fs::remove_file(&path).is_ok() {
            meter.answered(begun);
        }
    }
}

impl Scenes<'_> {
    fn all(&mut self) -> Result<(), String> {
        self.healthy()?;
        self.scene("a chunk server is killed", Duration::from_secs(6), |lab| lab.kill("cs-b", false))?;
        self.lab.start("cs-b");
        self.healthy()?;
        self.scene("a chunk server stops (SIGSTOP)", Duration::from_secs(9), |lab| lab.signal("cs-c", libc::SIGSTOP))?;
        self.lab.signal("cs-c", libc::SIGCONT);
        self.healthy()?;
        let leader = self.leader()?;
        self.scene("the leading metadata server is killed", Duration::from_secs(6), |lab| lab.kill(&leader, false))?;
        self.lab.start(&leader);
        self.healthy()?;
        self.take_over()
    }

    fn linger(&mut self, time: Duration) {
        let begun = process::now();
        while begun.elapsed() < time {
            self.lab.tend();
            process::pause();
        }
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) -> Result<Instant, String> {
        let begun = process::now();
        while !condition(self) {
            self.lab.tend();
            if begun.elapsed() > LIMIT {
                return Err(format!("within {} s this did not happen: {what}", LIMIT.as_secs()));
            }
            process::pause();
        }
        Ok(process::now())
    }

    fn healthy(&mut self) -> Result<(), String> {
        let begun = process::now();
        let mut last = String::new();
        self.until("the cluster is healthy", |scenes| match scenes.lab.is_healthy() {
            Ok(()) => true,
            Err(why) => {
                last = why;
                false
            }
        })
        .map_err(|why| format!("{why}: {last}"))?;
        self.lab.note(&format!("healthy after {:.1} s", begun.elapsed().as_secs_f64()));
        Ok(())
    }

    fn leader(&mut self) -> Result<String, String> {
        let mut leader = None;
        self.until("a metadata server leads", |scenes| {
            leader = scenes.lab.leading_mds();
            leader.is_some()
        })?;
        Ok(leader.expect("waited for"))
    }

    fn scene(&mut self, what: &str, lasts: Duration, fault: impl FnOnce(&mut Lab)) -> Result<(), String> {
        self.linger(BEFORE);
        let at = process::now();
        fault(self.lab);
        self.linger(lasts);
        // What is still stalled now shows up as a gap up to here, and ends before the next scene.
        let ended = process::now();
        self.print(what, at, ended);
        let data = self.data;
        let names = self.names;
        self.until("writes and names go on", |_| data.meter().answered_since(ended) && names.answered_since(ended))?;
        Ok(())
    }

    fn print(&mut self, what: &str, at: Instant, to: Instant) {
        let from = at - PRINTED_BEFORE;
        let (data, names) = (self.data.meter().show(from, to), self.names.show(from, to));
        self.lab.note(&format!(
            "{what}: 4 KiB writes at depth {DEPTH}: none answered for {:.2} s at most, {:.2} s in all, longest write \
             {:.2} s; names: none answered for {:.2} s at most, longest call {:.2} s",
            data.gap.as_secs_f64(),
            data.still.as_secs_f64(),
            data.longest.as_secs_f64(),
            names.gap.as_secs_f64(),
            names.longest.as_secs_f64()
        ));
        let row = |tenths: &[usize]| tenths.iter().map(|count| format!("{count:5}")).collect::<String>();
        for (second, (data, names)) in data.tenths.chunks(10).zip(names.tenths.chunks(10)).enumerate() {
            let second = second as i64 - PRINTED_BEFORE.as_secs() as i64;
            self.lab.note(&format!("{second:+4} s  writes {}", row(data)));
            self.lab.note(&format!("        names  {}", row(names)));
        }
    }

    /// The client that holds the volume dies with its host, and another one on another host takes it over.
    fn take_over(&mut self) -> Result<(), String> {
        self.linger(BEFORE);
        let before = last_end(&self.lab.events());
        let at = process::now();
        self.lab.kill("nbd-x", false);
        let place = Place::Nbd { host: SERVER_HOSTS + 1, port: NBD_PORT, export: EXPORT.to_owned() };
        self.data.moved(Some(place));
        let moved = process::now();
        self.lab.start("nbd-y");
        let known = self.until("the dead client is noticed", |scenes| last_end(&scenes.lab.events()) > before)?;
        let data = self.data;
        self.until("the volume is taken over", |_| data.meter().answered_since(moved))?;
        let first = data.meter().first_since(moved).expect("waited for");
        self.linger(Duration::from_secs(2));
        self.print("the host of the export dies, another one takes the volume", at, process::now());
        let after = |later: Instant, earlier: Instant| later.saturating_duration_since(earlier).as_secs_f64();
        self.lab.note(&format!(
            "known to be dead {:.2} s after the kill; first write through the other host {:.2} s after that",
            after(known, at),
            after(first, known)
        ));
        Ok(())
    }

    /// Every block holds its last answered write.
    fn judge(&mut self, gate: &Gate, hosts: &[Host]) -> Result<(), String> {
        gate.close(true);
        self.until("the workers wait", |_| gate.parked() == DEPTH + 1)?;
        let found = self.data.read_back(hosts, LIMIT)?;
        let history: &Mutex<History> = &self.data.history;
        let history = history.lock().expect("not poisoned");
        history.check()?;
        let counts = history.counts;
        drop(history);
        self.lab.note(&format!("{} blocks judged: {counts:?}", found.len()));
        self.data.broken.lock().expect("not poisoned").clone().map_or(Ok(()), Err)
    }
}

/// Number of the newest event that tells of an export whose session ended without closing.
fn last_end(events: &str) -> Option<u64> {
    let ends = events.lines().filter_map(|line| {
        let event: Value = serde_json::from_str(line).ok()?;
        let text = event["text"].as_str()?;
        (text.contains("(nbd ") && text.contains("ended without closing")).then(|| event["number"].as_u64())?
    });
    ends.max()
}
