//! Operations on names: lookup, create, links, renames, removal.

use crate::attr::mode_without_privileges;
use crate::core::{Core, Done, Handle, Stat};
use crate::files::File;
use crate::ops_file::{Opened, open_flags};
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, InodeKind, MdsError, MdsReply, MdsRequest, NAME_MAX, RenameMode, SYMLINK_MAX, SetAttr};
use fuser::Errno;
use std::cell::Cell;
use std::rc::Rc;

/// What a new inode is to be.
pub(crate) struct NewNode {
    /// Its kind.
    pub kind: InodeKind,
    /// Permission bits, the umask already applied.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group of the caller; the metadata servers override it in a set-group-id directory.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
}

fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > NAME_MAX { Err(Errno::ENAMETOOLONG) } else { Ok(()) }
}

impl Core {
    /// Looks a name up; none when it does not exist. `.` and `..` come from kernel NFS exports.
    pub fn lookup(self: &Rc<Self>, parent: InodeId, name: Vec<u8>, done: Done<Option<Stat>>) {
        if let Err(errno) = check_name(&name) {
            return done(Err(errno));
        }
        let request = match name.as_slice() {
            b"." => MdsRequest::GetAttr { inode: parent },
            b".." => MdsRequest::Parent { inode: parent },
            _ => MdsRequest::Lookup { parent, name },
        };
        self.call_attr(request, |core, result| {
            done(match result {
                Ok(attr) => Ok(Some(core.stat(attr))),
                Err(errno) if errno == Errno::ENOENT => Ok(None),
                Err(errno) => Err(errno),
            });
        });
    }

    /// Makes a directory, a node, or an empty file nobody opens.
    pub fn make_node(self: &Rc<Self>, parent: InodeId, name: Vec<u8>, node: NewNode, done: Done<Stat>) {
        if let Err(errno) = check_name(&name) {
            return done(Err(errno));
        }
        self.call_attr(create_request(parent, name, &node, false), |core, result| {
            done(result.map(|attr| core.stat(attr)));
        });
    }

    /// Creates a file and opens it: one call, the exclusive lease comes with the answer.
    pub fn create(
        self: &Rc<Self>,
        parent: InodeId,
        name: Vec<u8>,
        node: NewNode,
        flags: i32,
        done: Done<(Stat, Opened)>,
    ) {
        if let Err(errno) = check_name(&name) {
            return done(Err(errno));
        }
        let request = create_request(parent, name.clone(), &node, true);
        let changes = self.changes.get();
        self.call(request, move |core, result| match result {
            Ok(MdsReply::CreatedIn { attr, lease, parent: directory }) => {
                if core.changes.get() == changes {
                    core.parents.borrow_mut().insert(parent, directory);
                }
                let file = core.file(attr.inode);
                // A file just created may be written whatever its mode or the access asked for says.
                core.add_handle(&file, true);
                if let Some(grant) = lease {
                    core.adopt(&file, core.backend.adopt(grant));
                }
                file.learn(&attr, core.now_tick.get());
                let handle = core.enter_handle(&file, true);
                done(Ok((core.stat(attr), Opened { handle, flags: open_flags(flags) })));
            }
            Ok(other) => done(Err(core.unexpected(&other))),
            Err(MdsError::Posix(libc::EEXIST)) if flags & libc::O_EXCL == 0 => {
                core.open_existing(parent, name, flags, done);
            }
            Err(error) => done(Err(core.refused(&error))),
        });
    }

    /// Somebody else created the name since the kernel looked.
    fn open_existing(self: &Rc<Self>, parent: InodeId, name: Vec<u8>, flags: i32, done: Done<(Stat, Opened)>) {
        self.call_attr(MdsRequest::Lookup { parent, name }, move |core, result| match result {
            Ok(attr) if attr.kind == InodeKind::File => {
                let (inode, entry) = (attr.inode, Rc::clone(core));
                let opened = move |result: Result<Opened, Errno>| {
                    done(result.map(|opened| (entry.stat(attr), opened)));
                };
                core.open(inode, flags, Box::new(opened));
            }
            // The kernel looks again and does the right thing for a link, a directory or a device.
            Ok(_) => done(Err(Errno::ESTALE)),
            Err(errno) => done(Err(errno)),
        });
    }

    /// Enters a handle of a file whose handle count already includes it.
    pub fn enter_handle(&self, file: &Rc<File>, writer: bool) -> u64 {
        let number = self.new_handle();
        let handle =
            Handle { file: Rc::clone(file), writer, fences: Cell::new(file.fences.get()), used: Cell::new(false) };
        self.handles.borrow_mut().insert(number, Rc::new(handle));
        number
    }

    /// Makes a symbolic link.
    pub fn symlink(
        self: &Rc<Self>,
        parent: InodeId,
        name: Vec<u8>,
        target: Vec<u8>,
        uid: u32,
        gid: u32,
        done: Done<Stat>,
    ) {
        if name.len() > NAME_MAX || target.len() > SYMLINK_MAX {
            return done(Err(Errno::ENAMETOOLONG));
        }
        let request = MdsRequest::Symlink { parent, name, target, uid, gid };
        self.call_attr(request, |core, result| done(result.map(|attr| core.stat(attr))));
    }

    /// Reads a symbolic link.
    pub fn readlink(self: &Rc<Self>, inode: InodeId, done: Done<Vec<u8>>) {
        self.call_bytes(MdsRequest::Readlink { inode }, done);
    }

    /// Makes a call whose answer is bytes.
    pub fn call_bytes(self: &Rc<Self>, request: MdsRequest, done: Done<Vec<u8>>) {
        self.call(request, |core, result| {
            done(match result {
                Ok(MdsReply::Bytes(bytes)) => Ok(bytes),
                Ok(other) => Err(core.unexpected(&other)),
                Err(error) => Err(core.refused(&error)),
            });
        });
    }

    /// Gives an inode a further name.
    pub fn link(self: &Rc<Self>, inode: InodeId, parent: InodeId, name: Vec<u8>, done: Done<Stat>) {
        if let Err(errno) = check_name(&name) {
            return done(Err(errno));
        }
        self.call_attr(MdsRequest::Link { inode, parent, name }, |core, result| {
            done(result.map(|attr| {
                if let Some(file) = core.file_if_known(attr.inode) {
                    file.attr_changing();
                }
                core.stat(attr)
            }));
        });
    }

    /// Removes a name. If it is the last one of a file this mount has open, the metadata servers are asked to keep the
    /// file until it is closed.
    pub fn unlink(self: &Rc<Self>, parent: InodeId, name: Vec<u8>, done: Done<()>) {
        self.guard(parent, name.clone(), move |core, guarded| {
            core.remove(MdsRequest::Unlink { parent, name }, guarded, done);
        });
    }

    /// Removes an empty directory; tells what it was.
    pub fn rmdir(self: &Rc<Self>, parent: InodeId, name: Vec<u8>, done: Done<Attr>) {
        self.call_attr(MdsRequest::Rmdir { parent, name }, move |_, result| done(result));
    }

    /// Renames.
    pub fn rename(
        self: &Rc<Self>,
        (parent, name): (InodeId, Vec<u8>),
        (new_parent, new_name): (InodeId, Vec<u8>),
        mode: RenameMode,
        done: Done<()>,
    ) {
        if let Err(errno) = check_name(&new_name) {
            return done(Err(errno));
        }
        let target = new_name.clone();
        let request = MdsRequest::Rename { parent, name, new_parent, new_name, mode };
        if mode == RenameMode::Replace {
            self.guard(new_parent, target, move |core, guarded| core.remove(request, guarded, done));
        } else {
            self.call_done(request, done);
        }
    }

    /// Before a name goes: if it leads to a file open here and is its last, tells the metadata servers so. The kernel
    /// names only the directory entry, hence the lookup; with nothing open there is nothing to ask.
    fn guard(
        self: &Rc<Self>,
        parent: InodeId,
        name: Vec<u8>,
        then: impl FnOnce(&Rc<Self>, Option<Rc<File>>) + 'static,
    ) {
        if self.open_count.get() == 0 {
            return then(self, None);
        }
        self.call_attr(MdsRequest::Lookup { parent, name }, move |core, result| {
            let open = result
                .ok()
                .filter(|attr| attr.kind == InodeKind::File && attr.nlink <= 1)
                .and_then(|attr| core.file_if_known(attr.inode))
                .filter(|file| file.is_open() && !file.orphan.get());
            let Some(file) = open else { return then(core, None) };
            file.orphan.set(true);
            core.call(MdsRequest::OpenHandle { inode: file.inode }, move |core, result| {
                if let Err(error) = result {
                    core.refused(&error);
                    file.orphan.set(false);
                    return then(core, None);
                }
                then(core, Some(file));
            });
        });
    }

    fn remove(self: &Rc<Self>, request: MdsRequest, guarded: Option<Rc<File>>, done: Done<()>) {
        self.call(request, move |core, result| {
            if let Some(file) = guarded {
                file.attr_changing();
                if result.is_err() && file.orphan.replace(false) {
                    let used = Rc::clone(&file);
                    core.call(MdsRequest::CloseHandle { inode: file.inode }, move |core, _| core.rest(&used));
                }
            }
            done(result.map(|_| ()).map_err(|error| core.refused(&error)));
        });
    }

    /// Clears set-user-id and set-group-id before somebody without privilege changes a file's content.
    pub fn drop_privileges(
        self: &Rc<Self>,
        file: &Rc<File>,
        then: impl FnOnce(&Rc<Self>, Result<(), Errno>) + 'static,
    ) {
        let inode = file.inode;
        if let Some(mode) = file.mode().or_else(|| self.told(inode).map(|told| told.mode)) {
            return self.clear_privileges(inode, mode, then);
        }
        self.call_attr(MdsRequest::GetAttr { inode }, move |core, result| match result {
            Ok(attr) => core.clear_privileges(inode, attr.mode, then),
            Err(errno) => then(core, Err(errno)),
        });
    }

    fn clear_privileges(
        self: &Rc<Self>,
        inode: InodeId,
        mode: u32,
        then: impl FnOnce(&Rc<Self>, Result<(), Errno>) + 'static,
    ) {
        let cleared = mode_without_privileges(mode);
        if cleared == mode {
            return then(self, Ok(()));
        }
        let (core, set) = (Rc::clone(self), SetAttr { mode: Some(cleared), ..SetAttr::default() });
        self.set_attributes(inode, set, Box::new(move |result| then(&core, result.map(|_| ()))));
    }
}

fn create_request(parent: InodeId, name: Vec<u8>, node: &NewNode, lease: bool) -> MdsRequest {
    let NewNode { kind, mode, uid, gid, rdev } = *node;
    MdsRequest::Create { parent, name, kind, mode, uid, gid, rdev, lease }
}
