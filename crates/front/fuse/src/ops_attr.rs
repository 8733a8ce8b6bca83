//! Attributes, extended attributes, figures of the file system.

use crate::attr::{FILE_SIZE_MAX, TTL_CREATED_IN, mode_without_privileges, of_inode};
use crate::core::{Core, Done, Stat};
use crate::files::File;
use cairn_env::block::BlockOp;
use cairn_stdx::planted;
use cairn_types::InodeId;
use cairn_wire::mds::{Attr, InodeKind, LeaseMode, MdsReply, MdsRequest, SetAttr, XATTR_VALUE_MAX};
use fuser::Errno;
use std::rc::Rc;

/// Figures of the file system, in bytes and inodes.
pub(crate) struct Space {
    /// Bytes in all.
    pub capacity: u64,
    /// Bytes free.
    pub free: u64,
    /// Inodes in use.
    pub inodes: u64,
}

/// The attribute that gives an executable privileges of its own; the kernel asks for it before it writes.
const CAPABILITY: &[u8] = b"security.capability";

/// Attributes that are kept have one of these before their name, as on other file systems. Not `system.`: access
/// control lists live there, and keeping them without obeying them would be worse.
fn is_kept(name: &[u8]) -> bool {
    [&b"user."[..], b"trusted.", b"security."].iter().any(|space| name.len() > space.len() && name.starts_with(space))
}

impl Core {
    /// Attributes of an inode.
    pub fn getattr(self: &Rc<Self>, inode: InodeId, done: Done<Stat>) {
        let created_in = self.parents.borrow().get(&inode).cloned();
        if let Some(attr) = created_in {
            return done(Ok(Stat { ttl: TTL_CREATED_IN, ..self.stat(attr) }));
        }
        let file = self.file_if_known(inode);
        let now = self.now_tick.get();
        if let Some(attr) = file.as_ref().and_then(|file| file.known_attr(now)) {
            return done(Ok(self.stat(attr)));
        }
        let asked_at = file.as_ref().map(|file| file.attr_changes());
        self.call_attr(MdsRequest::GetAttr { inode }, move |core, result| {
            done(result.map_err(of_inode).map(|attr| {
                if let Some(file) = file.filter(|file| Some(file.attr_changes()) == asked_at) {
                    file.learn(&attr, core.now_tick.get());
                }
                core.stat(attr)
            }));
        });
    }

    /// Changes attributes on behalf of a caller; `privileged` callers keep set-user-id bits over a truncation.
    pub fn setattr(self: &Rc<Self>, inode: InodeId, set: SetAttr, privileged: bool, done: Done<Stat>) {
        if set.size.is_some_and(|size| size > FILE_SIZE_MAX) {
            return done(Err(Errno::EFBIG));
        }
        let new_owner = set.uid.is_some() || set.gid.is_some();
        let clears = set.mode.is_none() && (new_owner || (set.size.is_some() && !privileged));
        if !clears {
            return self.set_attributes(inode, set, done);
        }
        // The kernel leaves it to us to take privileges from a file whose owner or content changes.
        self.call_attr(MdsRequest::GetAttr { inode }, move |core, result| match result {
            Ok(attr) => {
                let mut set = set;
                let cleared = mode_without_privileges(attr.mode);
                if attr.kind != InodeKind::Directory && cleared != attr.mode {
                    set.mode = Some(cleared);
                }
                core.set_attributes(inode, set, done);
            }
            Err(errno) => done(Err(errno)),
        });
    }

    /// Changes attributes as told, in step with reports of the same file (F2).
    pub fn set_attributes(self: &Rc<Self>, inode: InodeId, set: SetAttr, done: Done<Stat>) {
        if set == SetAttr::default() {
            return self.getattr(inode, done);
        }
        if let Some(size) = set.size {
            return self.truncate(inode, size, set, done);
        }
        let Some(file) = self.file_if_known(inode) else {
            return self.call_attr(MdsRequest::SetAttr { inode, set }, move |core, result| {
                done(result.map(|attr| core.stat(attr)));
            });
        };
        let changed = Rc::clone(&file);
        self.enter_attr(
            &file,
            Box::new(move |core| {
                // What is dirty goes along, so that no later report overwrites a time set by hand.
                let dirty = core.take_dirty(&changed);
                let set = SetAttr {
                    grow_to: dirty.grow_to,
                    allocated: dirty.allocated,
                    mtime_ns: set.mtime_ns.or(dirty.mtime_ns),
                    ..set
                };
                core.change(changed, set, dirty, done, |_, _, _| ());
            }),
        );
    }

    /// One attribute change inside [`Core::enter_attr`].
    fn change(
        self: &Rc<Self>,
        file: Rc<File>,
        set: SetAttr,
        dirty: SetAttr,
        done: Done<Stat>,
        on_success: impl FnOnce(&Rc<Self>, &File, &Attr) + 'static,
    ) {
        file.attr_changing();
        let (inode, mtime) = (file.inode, set.mtime_ns);
        self.call_attr(MdsRequest::SetAttr { inode, set }, move |core, result| {
            file.attr_changing();
            let answer = match result {
                Ok(attr) => {
                    on_success(core, &file, &attr);
                    if let Some(mtime) = mtime {
                        file.mtime_set(mtime);
                    }
                    file.learn(&attr, core.now_tick.get());
                    Ok(core.stat(attr))
                }
                Err(errno) => {
                    core.restore_dirty(&file, &dirty);
                    Err(errno)
                }
            };
            done(answer);
            core.leave_attr(&file);
        });
    }

    /// Sets the size under the exclusive lease. What lies past a smaller size is zeroed first: the metadata servers
    /// drop whole chunks only, and a later growth must find zeros.
    fn truncate(self: &Rc<Self>, inode: InodeId, size: u64, set: SetAttr, done: Done<Stat>) {
        let file = self.file(inode);
        let cut = Rc::clone(&file);
        self.with_volume(&file, LeaseMode::Exclusive, move |core, volume| {
            if let Err(errno) = volume {
                core.rest(&cut);
                return done(Err(errno));
            }
            let inside = Rc::clone(&cut);
            core.enter_attr(
                &cut,
                Box::new(move |core| {
                    let old = inside.size();
                    if size >= old || planted!("truncate_leaves_the_tail") {
                        return core.set_size(inside, size, set, done);
                    }
                    let op = BlockOp::Discard { offset: size, len: old - size };
                    core.io(&Rc::clone(&inside), LeaseMode::Exclusive, op, move |core, result| match result {
                        Ok(_) => core.set_size(inside, size, set, done),
                        Err(errno) => {
                            done(Err(errno));
                            core.leave_attr(&inside);
                        }
                    });
                }),
            );
        });
    }

    fn set_size(self: &Rc<Self>, file: Rc<File>, size: u64, set: SetAttr, done: Done<Stat>) {
        let dirty = self.take_dirty(&file);
        let allocated = dirty.allocated.map(|bytes| bytes.min(size.next_multiple_of(4096)));
        let mtime_ns = set.mtime_ns.or(Some(self.backend.wall_ns()));
        let set = SetAttr { size: Some(size), allocated, mtime_ns, ..set };
        let used = Rc::clone(&file);
        let (core, done_then_rest) = (Rc::clone(self), done);
        let done: Done<Stat> = Box::new(move |result| {
            done_then_rest(result);
            core.rest(&used);
        });
        self.change(file, set, dirty, done, move |core, file, attr| core.truncated(file, size, attr));
    }

    /// Value of an extended attribute.
    pub fn getxattr(self: &Rc<Self>, inode: InodeId, name: Vec<u8>, done: Done<Vec<u8>>) {
        if !is_kept(&name) {
            return done(Err(Errno::EOPNOTSUPP));
        }
        let file = if name == CAPABILITY { self.file_if_known(inode) } else { None };
        if let Some(file) = &file
            && file.is_exclusive()
            && file.capabilities.get() == Some(false)
        {
            return done(Err(Errno::ENODATA));
        }
        let learn = Box::new(move |result: Result<Vec<u8>, Errno>| {
            if let Some(file) = file {
                let known = match &result {
                    Ok(_) => Some(true),
                    Err(errno) if *errno == Errno::ENODATA => Some(false),
                    Err(_) => None,
                };
                file.capabilities.set(known);
            }
            done(result);
        });
        self.call_bytes(MdsRequest::GetXattr { inode, name }, learn);
    }

    /// Sets an extended attribute; `flags` as `setxattr(2)`.
    pub fn setxattr(self: &Rc<Self>, inode: InodeId, name: Vec<u8>, value: Vec<u8>, flags: i32, done: Done<()>) {
        if !is_kept(&name) {
            return done(Err(Errno::EOPNOTSUPP));
        }
        if value.len() > XATTR_VALUE_MAX {
            return done(Err(Errno::E2BIG));
        }
        let exists = match flags & (libc::XATTR_CREATE | libc::XATTR_REPLACE) {
            0 => None,
            libc::XATTR_CREATE => Some(false),
            libc::XATTR_REPLACE => Some(true),
            _ => return done(Err(Errno::EINVAL)),
        };
        if name == CAPABILITY
            && let Some(file) = self.file_if_known(inode)
        {
            file.capabilities.set(None);
        }
        self.call_done(MdsRequest::SetXattr { inode, name, value, exists }, done);
    }

    /// Names of extended attributes, each ended by NUL.
    pub fn listxattr(self: &Rc<Self>, inode: InodeId, done: Done<Vec<u8>>) {
        self.call_bytes(MdsRequest::ListXattr { inode }, done);
    }

    /// Removes an extended attribute.
    pub fn removexattr(self: &Rc<Self>, inode: InodeId, name: Vec<u8>, done: Done<()>) {
        if !is_kept(&name) {
            return done(Err(Errno::EOPNOTSUPP));
        }
        self.call_done(MdsRequest::RemoveXattr { inode, name }, done);
    }

    /// Space and inodes.
    pub fn statfs(self: &Rc<Self>, done: Done<Space>) {
        self.call(MdsRequest::StatFs, |core, result| {
            done(match result {
                Ok(MdsReply::StatFs { capacity, free, inodes }) => Ok(Space { capacity, free, inodes }),
                Ok(other) => Err(core.unexpected(&other)),
                Err(error) => Err(core.refused(&error)),
            });
        });
    }
}
