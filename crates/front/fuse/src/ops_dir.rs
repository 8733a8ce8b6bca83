//! Reading directories.
//!
//! The kernel asks in pieces of its own size, so a handle keeps what one listing call brought and serves from it. The
//! position the kernel carries is the cookie of the last entry seen plus two; 1 and 2 stand after `.` and `..`.

use crate::core::{Core, Done};
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, DirEntry, InodeKind, MdsError, MdsReply, MdsRequest};
use fuser::Errno;
use std::collections::VecDeque;
use std::rc::Rc;

/// Entries asked for at once.
const LIMIT: u32 = 512;
/// Added to a cookie to make a position.
const DOTS: u64 = 2;

/// What an open directory keeps between two reads.
#[derive(Default)]
pub(crate) struct Directory {
    /// Entries not yet taken by the kernel, in order.
    entries: VecDeque<DirEntry>,
    /// Position before the first of them.
    position: u64,
    /// Nothing follows the last of them.
    end: bool,
    /// They carry attributes.
    attributes: bool,
    /// They are worth using.
    valid: bool,
}

/// One line of a directory for the kernel.
pub(crate) struct Line {
    /// The inode.
    pub inode: InodeId,
    /// Its kind.
    pub kind: InodeKind,
    /// The name.
    pub name: Vec<u8>,
    /// Position after this line.
    pub position: u64,
    /// Attributes, when asked for and known.
    pub attr: Option<Attr>,
}

/// A number of lines; the kernel takes as many as fit and asks again from there.
pub(crate) type Lines = Vec<Line>;

fn dot(inode: InodeId, name: &[u8], position: u64) -> Line {
    Line { inode, kind: InodeKind::Directory, name: name.to_vec(), position, attr: None }
}

impl Core {
    /// Lines after `position`; empty at the end. Tell [`Core::taken`] how far the kernel got.
    pub fn read_directory(
        self: &Rc<Self>,
        inode: InodeId,
        handle: u64,
        position: u64,
        attributes: bool,
        done: Done<Lines>,
    ) {
        if position < DOTS {
            return self.read_dots(inode, handle, position, attributes, done);
        }
        self.read_entries(inode, handle, position, attributes, done);
    }

    fn read_dots(self: &Rc<Self>, inode: InodeId, handle: u64, position: u64, attributes: bool, done: Done<Lines>) {
        // Whoever starts over wants to see what is there now.
        self.directories.borrow_mut().remove(&handle);
        let proceed = move |core: &Rc<Self>, parent: InodeId| {
            let append = move |result: Result<Lines, Errno>| {
                done(result.map(|rest| {
                    let mut lines = Vec::with_capacity(rest.len() + 2);
                    if position == 0 {
                        lines.push(dot(inode, b".", 1));
                    }
                    lines.push(dot(parent, b"..", DOTS));
                    lines.extend(rest);
                    lines
                }));
            };
            core.read_entries(inode, handle, DOTS, attributes, Box::new(append));
        };
        if inode == InodeId::ROOT {
            return proceed(self, inode);
        }
        self.call_attr(MdsRequest::Parent { inode }, move |core, result| {
            // A removed directory has no parent any more; its listing still has to end properly.
            proceed(core, result.map_or(inode, |attr| attr.inode));
        });
    }

    fn read_entries(self: &Rc<Self>, inode: InodeId, handle: u64, position: u64, attributes: bool, done: Done<Lines>) {
        {
            let directories = self.directories.borrow();
            let kept = directories
                .get(&handle)
                .filter(|kept| kept.valid && kept.position == position && (kept.attributes || !attributes));
            if let Some(kept) = kept
                && (kept.end || !kept.entries.is_empty())
            {
                let lines = self.lines(kept);
                drop(directories);
                return done(Ok(lines));
            }
        }
        let request = MdsRequest::ReadDir { inode, cookie: position - DOTS, limit: LIMIT, attributes };
        self.call(request, move |core, result| {
            let (entries, end) = match result {
                Ok(MdsReply::Entries { entries, end }) => (entries, end),
                // Removed while open: POSIX wants an empty directory, not an error.
                Err(MdsError::Posix(libc::ENOENT)) => (Vec::new(), true),
                Ok(other) => return done(Err(core.unexpected(&other))),
                Err(error) => return done(Err(core.refused(&error))),
            };
            let end = end || entries.is_empty();
            let kept = Directory { entries: entries.into(), position, end, attributes, valid: true };
            let lines = core.lines(&kept);
            core.directories.borrow_mut().insert(handle, kept);
            done(Ok(lines));
        });
    }

    fn lines(&self, kept: &Directory) -> Lines {
        let line = |entry: &DirEntry| Line {
            inode: entry.inode,
            kind: entry.kind,
            name: entry.name.clone(),
            position: entry.cookie.saturating_add(DOTS),
            attr: entry.attr.clone().map(|attr| self.stat(attr).attr),
        };
        kept.entries.iter().map(line).collect()
    }

    /// The kernel took every line up to `position`.
    pub fn taken(&self, handle: u64, position: u64) {
        let mut directories = self.directories.borrow_mut();
        let Some(kept) = directories.get_mut(&handle) else { return };
        let count = kept.entries.iter().position(|entry| entry.cookie.saturating_add(DOTS) == position);
        if let Some(last) = count {
            kept.entries.drain(..=last);
            kept.position = position;
        }
    }

    /// An open directory is gone.
    pub fn release_directory(&self, handle: u64) {
        self.directories.borrow_mut().remove(&handle);
    }
}
