//! Lines for the operator: standard error, or the file named by `-o log=FILE`.

use cairn_stdx::repeats::Repeats;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A log that may be shared between threads. Writing never fails the caller: a full log disk must not stop the mount.
#[derive(Clone, Default)]
pub(crate) struct Log {
    file: Option<Arc<Mutex<File>>>,
    repeats: Arc<Mutex<Repeats>>,
    silent: bool,
}

impl Log {
    /// Appends to `path`, or writes to standard error when there is none.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file: Some(Arc::new(Mutex::new(file))), ..Self::default() })
    }

    /// Says nothing.
    pub fn silent() -> Self {
        Self { silent: true, ..Self::default() }
    }

    /// Writes one line with the time (seconds since 1970) before it.
    pub fn line(&self, text: fmt::Arguments<'_>) {
        if self.silent {
            return;
        }
        let ns = crate::attr::wall_ns();
        let mut repeats = self.repeats.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(text) = repeats.pass(ns, &text.to_string()) else { return };
        let line = format!("{}.{:03} cairn-mount: {text}\n", ns / 1_000_000_000, ns / 1_000_000 % 1000);
        match &self.file {
            Some(file) => {
                if let Ok(mut file) = file.lock() {
                    let _ = file.write_all(line.as_bytes());
                }
            }
            None => {
                let _ = io::stderr().write_all(line.as_bytes());
            }
        }
    }
}
