//! Which devices are served under which names. May change at any time.

use crate::connection::Connection;
use cairn_env::block::BlockDevice;
use cairn_nbd_proto::limits::STRING_MAX;
use cairn_nbd_proto::{Catalog, ExportInfo};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use tokio::sync::Notify;

/// Why a device can't be exported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// The name is in use.
    #[error("there is an export named `{name}` already")]
    Taken {
        /// The name.
        name: String,
    },
    /// The protocol allows 4096 bytes without a zero byte for a name and for a description.
    #[error("an export name or description of {size} bytes, or with a zero byte; 4096 bytes at most")]
    Text {
        /// Length of the longer of the two.
        size: usize,
    },
}

/// How a device is exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// A text for people; empty for none.
    pub description: String,
    /// Refuse writes even if the device would take them.
    pub read_only: bool,
    /// Take `NBD_CMD_FLAG_NO_HOLE` by its letter: write zeros that occupy space. Otherwise they are punched like any
    /// others, which a thinly provisioned volume loses nothing by.
    pub provision_zeroes: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { description: String::new(), read_only: false, provision_zeroes: true }
    }
}

struct Entry {
    device: Rc<dyn BlockDevice>,
    options: ExportOptions,
    connections: Vec<Weak<Connection>>,
}

/// The exports of one or more servers. Clones share the same set.
#[derive(Clone, Default)]
pub struct Exports(Rc<Inner>);

#[derive(Default)]
struct Inner {
    entries: RefCell<BTreeMap<String, Entry>>,
    /// Told whenever a connection ended.
    ended: Notify,
}

impl Exports {
    /// No exports yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `device` as `name`. Size and state are read from the device whenever a client asks, so a resized volume
    /// needs no call here: clients see the new size when they connect.
    ///
    /// # Errors
    /// [`InsertError`] when the name is taken or a text is longer than the protocol allows.
    pub fn insert(&self, name: &str, device: Rc<dyn BlockDevice>, options: ExportOptions) -> Result<(), InsertError> {
        let size = name.len().max(options.description.len());
        if size > STRING_MAX || name.contains('\0') || options.description.contains('\0') {
            return Err(InsertError::Text { size });
        }
        let mut entries = self.0.entries.borrow_mut();
        if entries.contains_key(name) {
            return Err(InsertError::Taken { name: name.to_owned() });
        }
        entries.insert(name.to_owned(), Entry { device, options, connections: Vec::new() });
        Ok(())
    }

    /// Stops serving `name`: new clients don't find it; connected ones have their requests under way answered and those
    /// received but not begun refused with `NBD_ESHUTDOWN`, and are disconnected. None when there is no such export.
    ///
    /// Await [`Drained::wait`] before the device is closed.
    pub fn remove(&self, name: &str) -> Option<Drained> {
        let entry = self.0.entries.borrow_mut().remove(name)?;
        let connections: Vec<_> = entry.connections.iter().filter_map(Weak::upgrade).collect();
        for connection in &connections {
            connection.begin_shutdown();
        }
        Some(Drained { exports: self.clone(), connections })
    }

    /// Serves another device as `name` from now on. Who is connected is disconnected as by [`Exports::remove`]: its
    /// requests go to the old device to the end. None when there is no such export.
    pub fn replace(&self, name: &str, device: Rc<dyn BlockDevice>) -> Option<Drained> {
        let connections: Vec<_> = {
            let mut entries = self.0.entries.borrow_mut();
            let entry = entries.get_mut(name)?;
            entry.device = device;
            std::mem::take(&mut entry.connections).iter().filter_map(Weak::upgrade).collect()
        };
        for connection in &connections {
            connection.begin_shutdown();
        }
        Some(Drained { exports: self.clone(), connections })
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<String> {
        self.0.entries.borrow().keys().cloned().collect()
    }

    /// How many clients use `name` now; none when there is no such export.
    pub fn connection_count(&self, name: &str) -> Option<usize> {
        let entries = self.0.entries.borrow();
        let open = |connection: &Weak<Connection>| connection.upgrade().is_some_and(|it| !it.has_ended());
        entries.get(name).map(|entry| entry.connections.iter().filter(|it| open(it)).count())
    }

    /// Ties a connection to the export it chose.
    pub(crate) fn attach(
        &self,
        name: &str,
        connection: &Rc<Connection>,
    ) -> Option<(Rc<dyn BlockDevice>, ExportOptions)> {
        let mut entries = self.0.entries.borrow_mut();
        let entry = entries.get_mut(name)?;
        entry.connections.retain(|other| other.upgrade().is_some_and(|other| !other.has_ended()));
        entry.connections.push(Rc::downgrade(connection));
        Some((Rc::clone(&entry.device), entry.options.clone()))
    }

    pub(crate) fn notify_ended(&self) {
        self.0.ended.notify_waiters();
    }

    /// Waits until `done` says so; it is asked again after each end of a connection.
    pub(crate) async fn wait_until(&self, done: impl Fn() -> bool) {
        loop {
            let ended = self.0.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if done() {
                return;
            }
            ended.await;
        }
    }
}

impl Catalog for Exports {
    fn get(&self, name: &str) -> Option<ExportInfo> {
        let entries = self.0.entries.borrow();
        entries.get(name).map(|Entry { device, options, .. }| ExportInfo {
            name: name.to_owned(),
            description: options.description.clone(),
            size: device.size(),
            read_only: options.read_only || device.read_only(),
        })
    }

    fn list(&self) -> Vec<(String, String)> {
        let entries = self.0.entries.borrow();
        entries.iter().map(|(name, entry)| (name.clone(), entry.options.description.clone())).collect()
    }
}

/// The connections of an export that was removed.
pub struct Drained {
    exports: Exports,
    connections: Vec<Rc<Connection>>,
}

impl Drained {
    /// Returns when the last of them has ended: from then on the device gets no operation from here.
    pub async fn wait(self) {
        self.exports.wait_until(|| self.connections.iter().all(|connection| connection.has_ended())).await;
    }

    /// Cuts off those that are left.
    pub fn kill(&self) {
        self.connections.iter().for_each(|connection| connection.kill());
    }
}
