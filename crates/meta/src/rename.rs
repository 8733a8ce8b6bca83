//! Renaming, with every rule of POSIX rename(2) and Linux's `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::record::{Dentry, Inode};
use crate::state::{Meta, errno, posix};
use cairn_types::InodeId;
use cairn_wire::mds::{InodeKind, MdsError, MdsReply, NAME_MAX, RenameMode};

type Place<'a> = (InodeId, &'a [u8]);

impl<K: Kv> Meta<K> {
    pub(crate) fn rename(&mut self, old: Place<'_>, new: Place<'_>, mode: RenameMode, now_ns: u64) -> Answer {
        for name in [old.1, new.1] {
            if name.len() > NAME_MAX {
                return Err(posix(errno::ENAMETOOLONG));
            }
            if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') || name.contains(&0) {
                return Err(posix(errno::EINVAL));
            }
        }
        let old_directory = self.directory(old.0)?;
        let new_directory = self.directory(new.0)?;
        let source = self.entry_or_enoent(old.0, old.1)?;
        let target = self.entry(new.0, new.1);
        if new_directory.nlink == 0 {
            return Err(posix(errno::ENOENT));
        }
        if source.kind == InodeKind::Directory && self.is_within(new.0, source.inode)? {
            return Err(posix(errno::EINVAL));
        }
        match (mode, target) {
            (RenameMode::Exchange, None) => Err(posix(errno::ENOENT)),
            (RenameMode::NoReplace, Some(_)) => Err(posix(errno::EEXIST)),
            // Two names of one inode: POSIX says that nothing happens.
            (_, Some(target)) if target.inode == source.inode => Ok(MdsReply::Done),
            (RenameMode::Exchange, Some(target)) => {
                if target.kind == InodeKind::Directory && self.is_within(old.0, target.inode)? {
                    return Err(posix(errno::EINVAL));
                }
                self.exchange((old, source), (new, target), now_ns)
            }
            (_, target) => {
                if let Some(target) = target {
                    self.check_replace(source, target)?;
                }
                self.replace((old, source, old_directory), (new, target, new_directory), now_ns)
            }
        }
    }

    /// True when `inode` is `ancestor` or lies below it.
    fn is_within(&self, mut inode: InodeId, ancestor: InodeId) -> Result<bool, MdsError> {
        loop {
            if inode == ancestor {
                return Ok(true);
            }
            if inode == InodeId::ROOT {
                return Ok(false);
            }
            inode = self.directory(inode)?.parent;
        }
    }

    fn check_replace(&self, source: Dentry, target: Dentry) -> Result<(), MdsError> {
        match (source.kind == InodeKind::Directory, target.kind == InodeKind::Directory) {
            (true, false) => Err(posix(errno::ENOTDIR)),
            (false, true) => Err(posix(errno::EISDIR)),
            (true, true) if self.directory(target.inode)?.size > 0 => Err(posix(errno::ENOTEMPTY)),
            _ => Ok(()),
        }
    }

    fn replace(
        &mut self,
        (old, source, mut old_directory): (Place<'_>, Dentry, Inode),
        (new, target, mut new_directory): (Place<'_>, Option<Dentry>, Inode),
        now_ns: u64,
    ) -> Answer {
        let is_directory = source.kind == InodeKind::Directory;
        match target {
            Some(target) => {
                let entry = Dentry { slot: target.slot, ..source };
                self.put_record(&keys::dentry(new.0, new.1), &entry);
                new_directory.size -= 1;
                if target.kind == InodeKind::Directory {
                    new_directory.nlink -= 1;
                }
            }
            None => self.add_entry(new.0, new.1, source.inode, source.kind)?,
        }
        self.remove_entry(old.0, old.1);
        // One directory is one record: the changes for the old side go to the same one.
        let same = old.0 == new.0;
        let old_side = if same { &mut new_directory } else { &mut old_directory };
        old_side.size -= 1;
        if is_directory {
            old_side.nlink -= 1;
        }
        old_side.touch(now_ns);
        new_directory.size += 1;
        if is_directory {
            new_directory.nlink += 1;
        }
        new_directory.touch(now_ns);
        if !same {
            self.put_inode(old.0, &old_directory);
        }
        self.put_inode(new.0, &new_directory);
        self.moved(source.inode, new.0, now_ns);
        if let Some(target) = target {
            self.lose_name(target.inode, now_ns);
        }
        Ok(MdsReply::Done)
    }

    fn exchange(
        &mut self,
        (old, source): (Place<'_>, Dentry),
        (new, target): (Place<'_>, Dentry),
        now_ns: u64,
    ) -> Answer {
        // Keys and slots stay, only what the names lead to changes.
        let (old_slot, new_slot) = (source.slot, target.slot);
        self.put_record(&keys::dentry(old.0, old.1), &Dentry { slot: old_slot, ..target });
        self.put_record(&keys::dentry(new.0, new.1), &Dentry { slot: new_slot, ..source });
        let mut subdirectories = [0i32; 2];
        for (kind, delta) in [(source.kind, 1), (target.kind, -1)] {
            if kind == InodeKind::Directory && old.0 != new.0 {
                subdirectories[0] -= delta;
                subdirectories[1] += delta;
            }
        }
        let sides = [(old.0, subdirectories[0]), (new.0, subdirectories[1])];
        for (directory, delta) in sides.into_iter().take(if old.0 == new.0 { 1 } else { 2 }) {
            let mut record = self.directory(directory)?;
            record.nlink = record.nlink.checked_add_signed(delta).expect("a directory counts its subdirectories");
            record.touch(now_ns);
            self.put_inode(directory, &record);
        }
        self.moved(source.inode, new.0, now_ns);
        self.moved(target.inode, old.0, now_ns);
        Ok(MdsReply::Done)
    }

    /// An inode has a new place.
    fn moved(&mut self, inode: InodeId, parent: InodeId, now_ns: u64) {
        let mut record = self.inode(inode).expect("an entry names an inode");
        record.set_ctime(now_ns);
        if record.kind == InodeKind::Directory {
            record.parent = parent;
        }
        self.put_inode(inode, &record);
    }
}
