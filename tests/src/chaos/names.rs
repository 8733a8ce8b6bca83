//! A client that makes, renames and removes files, and knows which must be there: I1 and I18 for names.
//!
//! No name is used twice, so "exists already" and "is not there" are wrong answers, never the client's own doing: they
//! mean that a call took effect twice, or that what was answered is gone.

use super::load::Gate;
use crate::process;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Some of the names are removed again.
const REMOVED_ONE_IN: u64 = 3;
/// Names kept in mind before the older half is removed, so that long runs end, too.
const KEPT_MAX: usize = 400;

/// The names of one directory.
pub struct Names {
    dir: PathBuf,
    /// True: must be there. False: must not. Absent from the map: nobody knows, an answer was missing.
    known: Mutex<BTreeMap<String, bool>>,
    next: AtomicU64,
    /// Of names with a lower number the last listing told everything.
    settled: AtomicU64,
    /// Steps done.
    pub done: AtomicU64,
    /// What it does, for messages.
    pub doing: Mutex<String>,
    /// The first thing that was wrong.
    pub broken: Mutex<Option<String>>,
}

impl Names {
    /// Names in `dir`, which exists.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            known: Mutex::default(),
            next: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            done: AtomicU64::new(0),
            doing: Mutex::default(),
            broken: Mutex::new(None),
        }
    }

    /// Works until the gate ends it.
    pub fn work(&self, gate: &Gate) {
        process::own_descriptors();
        while !gate.has_ended() {
            gate.pass();
            // By descriptor: a mount that died and was mounted anew must not look like missing names.
            let Ok(dir) = File::open(&self.dir) else {
                *self.doing.lock().expect("not poisoned") = "cannot open the directory".to_owned();
                process::pause();
                continue;
            };
            let root = PathBuf::from(format!("/proc/thread-self/fd/{}", dir.as_raw_fd()));
            while !gate.is_shut() {
                if let Err(error) = self.step(&root) {
                    *self.doing.lock().expect("not poisoned") = format!("failed: {error}");
                    process::pause();
                    break;
                }
                self.done.fetch_add(1, Ordering::SeqCst);
                // Names are cheap to break; the blocks want the processor, too.
                process::pause();
            }
        }
    }

    fn judge(&self, what: &str, outcome: io::Result<()>, wrong: ErrorKind) -> io::Result<()> {
        if let Err(error) = &outcome
            && error.kind() == wrong
        {
            self.broken.lock().expect("not poisoned").get_or_insert(format!("I1/I18: {what}: {error}"));
        }
        outcome
    }

    /// A call that ends with `there` being as said; until it is answered nobody knows.
    fn call(
        &self,
        root: &Path,
        names: &[(&str, bool)],
        wrong: ErrorKind,
        f: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<()> {
        let text = format!("{names:?}");
        self.known.lock().expect("not poisoned").retain(|name, _| names.iter().all(|(other, _)| other != name));
        *self.doing.lock().expect("not poisoned") = text.clone();
        self.judge(&text, f(root), wrong)?;
        self.known.lock().expect("not poisoned").extend(names.iter().map(|(name, there)| ((*name).to_owned(), *there)));
        Ok(())
    }

    fn step(&self, root: &Path) -> io::Result<()> {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let (new, kept) = (format!("new{number}"), format!("kept{number}"));
        self.call(root, &[(&new, true)], ErrorKind::AlreadyExists, |root| {
            File::options().write(true).create_new(true).open(root.join(&new)).map(drop)
        })?;
        self.call(root, &[(&new, false), (&kept, true)], ErrorKind::NotFound, |root| {
            fs::rename(root.join(&new), root.join(&kept))
        })?;
        // A set: the one just made can be among the many, too, and no name is removed twice.
        let mut remove = BTreeSet::new();
        if number.is_multiple_of(REMOVED_ONE_IN) {
            remove.insert(kept);
        }
        let there: Vec<String> = {
            let known = self.known.lock().expect("not poisoned");
            known.iter().filter(|(_, there)| **there).map(|(name, _)| name.clone()).collect()
        };
        if there.len() > KEPT_MAX {
            remove.extend(there.into_iter().step_by(2));
        }
        for name in remove {
            self.call(root, &[(&name, false)], ErrorKind::NotFound, |root| fs::remove_file(root.join(&name)))?;
        }
        Ok(())
    }

    /// Lists the directory while nobody works, and judges; gives the number of names found.
    pub fn check(&self, limit: Duration) -> Result<usize, String> {
        process::own_descriptors();
        let begun = process::now();
        let list = || -> io::Result<Vec<String>> {
            let names = fs::read_dir(&self.dir)?.map(|entry| entry.map(|entry| entry.file_name()));
            names.map(|name| name.map(|name| name.to_string_lossy().into_owned())).collect()
        };
        let found = loop {
            match list() {
                Ok(found) => break found,
                Err(error) if begun.elapsed() > limit => {
                    return Err(format!("I17: the names are not listed within {} s: {error}", limit.as_secs()));
                }
                Err(_) => process::pause(),
            }
        };
        let mut known = self.known.lock().expect("not poisoned");
        for (name, there) in known.iter() {
            if found.contains(name) != *there {
                let what = if *there { "is gone" } else { "is back" };
                return Err(format!("I1/I18: the name {name} {what}"));
            }
        }
        let settled = self.settled.load(Ordering::SeqCst);
        let number = |name: &str| name.trim_start_matches(char::is_alphabetic).parse::<u64>().unwrap_or(0);
        if let Some(name) = found.iter().find(|name| number(name) < settled && !known.contains_key(*name)) {
            return Err(format!("I18: the name {name} is back after it was seen to be gone"));
        }
        // From now on everybody knows, and names that are gone are never used again.
        self.settled.store(self.next.load(Ordering::SeqCst), Ordering::SeqCst);
        *known = found.iter().map(|name| (name.clone(), true)).collect();
        Ok(found.len())
    }
}
