//! The namespace tree: looking up, creating, linking, removing. Renaming is in [`crate::rename`].
//!
//! A directory's entries are keyed by a hash of the name, which makes a listing resumable at a stable cookie and a
//! lookup one read. Permission is the front end's business; the rules here are those that hold for root too.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::record::{Dentry, Inode, Policy};
use crate::state::{Meta, decode_record, errno, posix};
use cairn_types::{ClientId, ClusterId, InodeId, VolumeId};
use cairn_wire::mds::{
    DirEntry, InodeKind, LIST_MAX, LeaseMode, MdsError, MdsInfo, MdsReply, NAME_MAX, SYMLINK_MAX, SessionKind, Severity,
};

/// Most names of one inode, and most subdirectories of a directory.
const NLINK_MAX: u32 = 1 << 30;
/// Most symbolic links followed while resolving a path.
const SYMLINK_HOPS_MAX: usize = 40;
/// Longest path resolved, in bytes (as `PATH_MAX`).
const PATH_MAX: usize = 4096;
/// Most entries of a directory with one hash.
const SLOTS_MAX: usize = 256;
/// Set-group-id bit.
const S_ISGID: u32 = 0o2000;

/// What a new inode is to be.
pub(crate) struct NewInode {
    pub kind: InodeKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub text: Vec<u8>,
}

fn check_name(name: &[u8]) -> Result<(), MdsError> {
    if name.len() > NAME_MAX {
        return Err(posix(errno::ENAMETOOLONG));
    }
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') || name.contains(&0) {
        return Err(posix(errno::EINVAL));
    }
    Ok(())
}

impl<K: Kv> Meta<K> {
    pub(crate) fn bootstrap(&mut self, cluster: ClusterId, name: String, first: MdsInfo) -> Answer {
        if let Some(identity) = &self.globals.identity {
            return Err(MdsError::Exists(format!("cluster {}", identity.name)));
        }
        self.digest(&cluster.0);
        self.globals.next_mds = first.mds.0.saturating_add(1);
        self.mds_bootstrap(first);
        let text = format!("cluster {name} ({cluster}) was created");
        self.globals.identity = Some(crate::record::Identity { cluster, name });
        self.globals.tick_wall_ns = self.globals.wall_ns;
        let mut root = Inode::new(InodeKind::Directory, 0o755, 0, 0, Policy::default(), self.globals.wall_ns);
        root.parent = InodeId::ROOT;
        self.put_inode(InodeId::ROOT, &root);
        self.globals.inodes = 1;
        self.event(Severity::Info, "MDS-1001", text);
        Ok(MdsReply::Done)
    }

    /// A directory that still has its name.
    pub(crate) fn directory(&self, inode: InodeId) -> Result<Inode, MdsError> {
        let record = self.inode(inode)?;
        if record.kind != InodeKind::Directory {
            return Err(posix(errno::ENOTDIR));
        }
        Ok(record)
    }

    /// The entry of a name.
    pub(crate) fn entry(&self, parent: InodeId, name: &[u8]) -> Option<Dentry> {
        self.record(&keys::dentry(parent, name))
    }

    /// The entry of a name that must exist.
    pub(crate) fn entry_or_enoent(&self, parent: InodeId, name: &[u8]) -> Result<Dentry, MdsError> {
        self.entry(parent, name).ok_or(posix(errno::ENOENT))
    }

    /// Where a new entry goes: the key, and the slot among names of the same hash.
    fn free_slot(&self, parent: InodeId, name: &[u8]) -> Result<(Vec<u8>, u8), MdsError> {
        let key = keys::dentry(parent, name);
        let prefix = &key[..keys::DENTRY_PREFIX];
        let same = self.kv.scan(prefix, &keys::after(prefix), SLOTS_MAX);
        if same.is_empty() {
            return Ok((key, 0));
        }
        if same.iter().any(|(other, _)| *other == key) {
            return Err(posix(errno::EEXIST));
        }
        let taken: Vec<u8> = same.iter().map(|(_, value)| decode_record::<Dentry>(value).slot).collect();
        let slot = (0..=u8::MAX).find(|slot| !taken.contains(slot)).ok_or(posix(errno::ENOSPC))?;
        Ok((key, slot))
    }

    /// Adds an entry that does not exist; the caller has checked that, and updates the directory.
    pub(crate) fn add_entry(
        &mut self,
        parent: InodeId,
        name: &[u8],
        inode: InodeId,
        kind: InodeKind,
    ) -> Result<(), MdsError> {
        let (key, slot) = self.free_slot(parent, name)?;
        self.put_record(&key, &Dentry { inode, kind, slot });
        Ok(())
    }

    pub(crate) fn remove_entry(&mut self, parent: InodeId, name: &[u8]) {
        self.delete(&keys::dentry(parent, name));
    }

    pub(crate) fn lookup(&self, parent: InodeId, name: &[u8]) -> Answer {
        let inode = self.step(parent, name)?;
        Ok(MdsReply::Attr(self.inode(inode)?.attr(inode)))
    }

    /// One step of a walk; `.` and `..` are understood.
    fn step(&self, parent: InodeId, name: &[u8]) -> Result<InodeId, MdsError> {
        if name.len() > NAME_MAX {
            return Err(posix(errno::ENAMETOOLONG));
        }
        // An entry shows that the directory exists; only without one it is to be found out why.
        if let Some(entry) = self.entry(parent, name) {
            return Ok(entry.inode);
        }
        let directory = self.directory(parent)?;
        match name {
            b"." => Ok(parent),
            b".." => Ok(directory.parent),
            _ => Err(posix(errno::ENOENT)),
        }
    }

    /// Walks a path. Symbolic links on the way are followed, a final one is not.
    pub(crate) fn resolve(&self, path: &[u8]) -> Answer {
        if path.len() > PATH_MAX {
            return Err(posix(errno::ENAMETOOLONG));
        }
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).rev().map(<[u8]>::to_vec).collect()
        };
        // The names still to walk, next one last.
        let mut names = split(path);
        let mut at = InodeId::ROOT;
        let mut hops = 0;
        while let Some(name) = names.pop() {
            let next = self.step(at, &name)?;
            let record = self.inode(next)?;
            if record.kind == InodeKind::Symlink && !names.is_empty() {
                hops += 1;
                if hops > SYMLINK_HOPS_MAX {
                    return Err(posix(errno::ELOOP));
                }
                if record.text.first() == Some(&b'/') {
                    at = InodeId::ROOT;
                }
                names.extend(split(&record.text));
            } else {
                at = next;
            }
        }
        Ok(MdsReply::Attr(self.inode(at)?.attr(at)))
    }

    pub(crate) fn parent(&self, inode: InodeId) -> Answer {
        let parent = self.directory(inode)?.parent;
        Ok(MdsReply::Attr(self.inode(parent)?.attr(parent)))
    }

    pub(crate) fn readlink(&self, inode: InodeId) -> Answer {
        let record = self.inode(inode)?;
        if record.kind != InodeKind::Symlink {
            return Err(posix(errno::EINVAL));
        }
        Ok(MdsReply::Bytes(record.text))
    }

    pub(crate) fn create(
        &mut self,
        client: ClientId,
        parent: InodeId,
        name: &[u8],
        new: NewInode,
        lease: bool,
        now_ns: u64,
    ) -> Answer {
        check_name(name)?;
        let mut directory = self.directory(parent)?;
        if directory.nlink == 0 {
            return Err(posix(errno::ENOENT));
        }
        let (key, slot) = self.free_slot(parent, name)?;
        let kind = new.kind;
        let is_directory = kind == InodeKind::Directory;
        if kind == InodeKind::Volume || (kind == InodeKind::Symlink) == new.text.is_empty() {
            return Err(posix(errno::EINVAL));
        }
        if is_directory && directory.nlink >= NLINK_MAX {
            return Err(posix(errno::EMLINK));
        }
        if lease
            && (kind != InodeKind::File || self.sessions.get(&client).is_none_or(|s| s.kind != SessionKind::Client))
        {
            return Err(MdsError::Invalid("a lease is granted on files, to client sessions".into()));
        }
        let inode = InodeId(self.globals.next_inode);
        self.globals.next_inode += 1;
        let mut record = Inode::new(kind, new.mode, new.uid, new.gid, directory.policy, now_ns);
        record.rdev = new.rdev;
        record.size = new.text.len() as u64;
        record.text = new.text;
        if directory.mode & S_ISGID != 0 {
            record.gid = directory.gid;
            if is_directory {
                record.mode |= S_ISGID;
            }
        }
        if is_directory {
            record.parent = parent;
            directory.nlink += 1;
        }
        let grant =
            lease.then(|| self.lease_grant(client, VolumeId::of_inode(inode), &mut record, LeaseMode::Exclusive));
        directory.size += 1;
        directory.touch(now_ns);
        self.put_record(&key, &Dentry { inode, kind, slot });
        self.put_inode(inode, &record);
        self.put_inode(parent, &directory);
        self.globals.inodes += 1;
        Ok(MdsReply::CreatedIn { attr: record.attr(inode), lease: grant, parent: directory.attr(parent) })
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of the call")]
    pub(crate) fn symlink(
        &mut self,
        client: ClientId,
        parent: InodeId,
        name: &[u8],
        target: Vec<u8>,
        uid: u32,
        gid: u32,
        now_ns: u64,
    ) -> Answer {
        if target.is_empty() {
            return Err(posix(errno::ENOENT));
        }
        if target.len() > SYMLINK_MAX {
            return Err(posix(errno::ENAMETOOLONG));
        }
        let new = NewInode { kind: InodeKind::Symlink, mode: 0o777, uid, gid, rdev: 0, text: target };
        match self.create(client, parent, name, new, false, now_ns)? {
            MdsReply::CreatedIn { attr, .. } => Ok(MdsReply::Attr(attr)),
            other => Ok(other),
        }
    }

    pub(crate) fn link(&mut self, inode: InodeId, parent: InodeId, name: &[u8], now_ns: u64) -> Answer {
        check_name(name)?;
        let mut record = self.inode(inode)?;
        let mut directory = self.directory(parent)?;
        if directory.nlink == 0 {
            return Err(posix(errno::ENOENT));
        }
        if matches!(record.kind, InodeKind::Directory | InodeKind::Volume) {
            return Err(posix(errno::EPERM));
        }
        if record.nlink == 0 {
            return Err(posix(errno::ENOENT));
        }
        if record.nlink >= NLINK_MAX {
            return Err(posix(errno::EMLINK));
        }
        self.add_entry(parent, name, inode, record.kind)?;
        record.nlink += 1;
        record.set_ctime(now_ns);
        directory.size += 1;
        directory.touch(now_ns);
        self.put_inode(inode, &record);
        self.put_inode(parent, &directory);
        Ok(MdsReply::Attr(record.attr(inode)))
    }

    pub(crate) fn unlink(&mut self, parent: InodeId, name: &[u8], now_ns: u64) -> Answer {
        check_name(name)?;
        let mut directory = self.directory(parent)?;
        let entry = self.entry_or_enoent(parent, name)?;
        if entry.kind == InodeKind::Directory {
            return Err(posix(errno::EISDIR));
        }
        self.remove_entry(parent, name);
        directory.size -= 1;
        directory.touch(now_ns);
        self.put_inode(parent, &directory);
        self.lose_name(entry.inode, now_ns);
        Ok(MdsReply::Done)
    }

    /// An inode loses one of its names; a directory loses its only one.
    pub(crate) fn lose_name(&mut self, inode: InodeId, now_ns: u64) {
        let mut record = self.inode(inode).expect("an entry names an inode");
        record.nlink = if record.kind == InodeKind::Directory { 0 } else { record.nlink - 1 };
        record.set_ctime(now_ns);
        self.put_inode(inode, &record);
        self.free_if_orphan(inode, record);
    }

    pub(crate) fn rmdir(&mut self, parent: InodeId, name: &[u8], now_ns: u64) -> Answer {
        check_name(name)?;
        let mut directory = self.directory(parent)?;
        let entry = self.entry_or_enoent(parent, name)?;
        if entry.kind != InodeKind::Directory {
            return Err(posix(errno::ENOTDIR));
        }
        if self.directory(entry.inode)?.size > 0 {
            return Err(posix(errno::ENOTEMPTY));
        }
        self.remove_entry(parent, name);
        directory.size -= 1;
        directory.nlink -= 1;
        directory.touch(now_ns);
        self.put_inode(parent, &directory);
        let mut removed = self.inode(entry.inode)?.attr(entry.inode);
        self.lose_name(entry.inode, now_ns);
        removed.nlink = 0;
        removed.ctime_ns = now_ns;
        Ok(MdsReply::Attr(removed))
    }

    /// Entries after a cookie: `hash << 8 | slot`, ascending. An entry that exists during the whole listing is listed
    /// exactly once, whatever else happens in the directory.
    pub(crate) fn read_dir(&self, inode: InodeId, cookie: u64, limit: u32, attributes: bool) -> Answer {
        self.directory(inode)?;
        let limit = (limit as usize).clamp(1, LIST_MAX);
        let end = keys::after(&keys::one(keys::DENTRY, inode.0));
        let mut from = keys::dentry_prefix(inode, cookie >> 8).to_vec();
        let mut entries: Vec<DirEntry> = Vec::new();
        let mut more = true;
        while more && entries.len() < limit {
            let mut page = self.kv.scan(&from, &end, limit + 1);
            more = page.len() > limit;
            if let Some((last, _)) = page.last() {
                // Entries of one hash are sorted by slot below, so the last hash of a page must be there completely.
                let hash_end = keys::after(&last[..keys::DENTRY_PREFIX]);
                let next = [last.as_slice(), &[0]].concat();
                page.extend(self.kv.scan(&next, &hash_end, SLOTS_MAX));
                from = hash_end;
            }
            let mut found: Vec<DirEntry> = page
                .iter()
                .map(|(key, value)| {
                    let entry: Dentry = decode_record(value);
                    let hash = keys::number(key, keys::DENTRY_PREFIX - 8) & ((1 << 56) - 1);
                    DirEntry {
                        name: key[keys::DENTRY_PREFIX..].to_vec(),
                        inode: entry.inode,
                        kind: entry.kind,
                        cookie: hash << 8 | u64::from(entry.slot),
                        attr: None,
                    }
                })
                .filter(|entry| entry.cookie > cookie)
                .collect();
            found.sort_by_key(|entry| entry.cookie);
            entries.extend(found);
        }
        let end = !more && entries.len() <= limit;
        entries.truncate(limit);
        if attributes {
            for entry in &mut entries {
                entry.attr = Some(self.inode(entry.inode)?.attr(entry.inode));
            }
        }
        Ok(MdsReply::Entries { entries, end })
    }
}
