//! Attributes, extended attributes, open handles, and the end of an inode.
//!
//! An inode without a name lives on while a session has it open, be it by [`MdsRequest::OpenHandle`] or by a lease on
//! its content. When the last of them goes, its chunks and attributes are freed in the background.
//!
//! [`MdsRequest::OpenHandle`]: cairn_wire::mds::MdsRequest::OpenHandle

use crate::command::{Answer, Recipient};
use crate::keys;
use crate::kv::Kv;
use crate::record::Inode;
use crate::state::{Meta, errno, posix};
use cairn_types::{ClientId, InodeId, VolumeId};
use cairn_wire::mds::{InodeKind, LeaseMode, MdsError, MdsReply, NAME_MAX, Push, SetAttr, XATTR_VALUE_MAX};

/// Largest size of a file or volume: the client's address space.
pub const SIZE_MAX: u64 = 1 << 62;
/// Most bytes of extended attributes of one inode, names and values.
const XATTR_BYTES_MAX: u32 = 1 << 20;
/// Most bytes of names of extended attributes (as Linux).
const XATTR_LIST_MAX: usize = 65536;

impl<K: Kv> Meta<K> {
    pub(crate) fn set_attr(&mut self, client: ClientId, inode: InodeId, set: &SetAttr, now_ns: u64) -> Answer {
        let mut record = self.inode(inode)?;
        if record.kind == InodeKind::Volume {
            return Err(posix(errno::EPERM));
        }
        let wanted = set.size.or(set.grow_to);
        if wanted.is_some() && record.kind != InodeKind::File {
            return Err(Self::content_errno(&record));
        }
        if wanted.is_some_and(|size| size > SIZE_MAX) {
            return Err(posix(errno::EFBIG));
        }
        let volume = VolumeId::of_inode(inode);
        if let Some(size) = set.size {
            if size < record.size {
                // Chunks must not vanish under a holder that still writes to them.
                self.refuse_if_held(Some(client), volume, &record.lease)?;
                self.drop_past(volume, &mut record, size);
            }
            self.resize(client, volume, &mut record, size);
            record.touch(now_ns);
        }
        if let Some(size) = set.grow_to.filter(|size| *size > record.size) {
            self.resize(client, volume, &mut record, size);
        }
        record.mode = set.mode.map_or(record.mode, |mode| mode & 0o7777);
        record.uid = set.uid.unwrap_or(record.uid);
        record.gid = set.gid.unwrap_or(record.gid);
        record.allocated = set.allocated.unwrap_or(record.allocated);
        if let Some(atime_ns) = set.atime_ns {
            record.set_atime(atime_ns);
        }
        if let Some(mtime_ns) = set.mtime_ns {
            record.set_mtime(mtime_ns);
        }
        record.set_ctime(now_ns);
        self.put_inode(inode, &record);
        Ok(MdsReply::Attr(record.attr(inode)))
    }

    /// Sets a size and tells the other holders. The caller writes the inode.
    pub(crate) fn resize(&mut self, client: ClientId, volume: VolumeId, record: &mut Inode, size: u64) {
        if record.size == size {
            return;
        }
        record.size = size;
        for holder in record.lease.holders().filter(|holder| *holder != client).collect::<Vec<_>>() {
            self.push(Recipient::Session(holder), Push::Resized { volume, size });
        }
    }

    /// Drops the whole chunks past `size`.
    pub(crate) fn drop_past(&mut self, volume: VolumeId, record: &mut Inode, size: u64) {
        if record.chunks > 0 {
            let first = size.div_ceil(record.policy.chunk_size());
            record.chunks -= self.free_chunks(volume, first, u64::MAX, usize::MAX) as u64;
        }
    }

    fn xattr_name(name: &[u8]) -> Result<(), MdsError> {
        match name.len() {
            0 => Err(posix(errno::EINVAL)),
            length if length > NAME_MAX => Err(posix(errno::ERANGE)),
            _ if name.contains(&0) => Err(posix(errno::EINVAL)),
            _ => Ok(()),
        }
    }

    pub(crate) fn get_xattr(&self, inode: InodeId, name: &[u8]) -> Answer {
        // The kernel asks for `security.capability` before every write: most inodes have none at all.
        if self.inode(inode)?.xattr_bytes == 0 {
            return Err(posix(errno::ENODATA));
        }
        self.kv.get(&keys::xattr(inode, name)).map(MdsReply::Bytes).ok_or(posix(errno::ENODATA))
    }

    fn xattr_list(&self, inode: InodeId) -> Vec<u8> {
        let prefix = keys::one(keys::XATTR, inode.0);
        let mut list = Vec::new();
        for (key, _) in self.kv.scan(&prefix, &keys::after(&prefix), usize::MAX) {
            list.extend_from_slice(&key[9..]);
            list.push(0);
        }
        list
    }

    pub(crate) fn list_xattr(&self, inode: InodeId) -> Answer {
        let record = self.inode(inode)?;
        Ok(MdsReply::Bytes(if record.xattr_bytes == 0 { Vec::new() } else { self.xattr_list(inode) }))
    }

    pub(crate) fn set_xattr(
        &mut self,
        inode: InodeId,
        name: &[u8],
        value: Vec<u8>,
        exists: Option<bool>,
        now_ns: u64,
    ) -> Answer {
        Self::xattr_name(name)?;
        if value.len() > XATTR_VALUE_MAX {
            return Err(posix(errno::ERANGE));
        }
        let mut record = self.inode(inode)?;
        let key = keys::xattr(inode, name);
        let old = self.kv.view(&key, |value| value.map(<[u8]>::len));
        match (exists, old) {
            (Some(true), None) => return Err(posix(errno::ENODATA)),
            (Some(false), Some(_)) => return Err(posix(errno::EEXIST)),
            _ => {}
        }
        let freed = old.map_or(0, |old| name.len() + old);
        let bytes = record.xattr_bytes - freed as u32 + (name.len() + value.len()) as u32;
        if bytes > XATTR_BYTES_MAX || self.xattr_list(inode).len() + name.len() + 1 > XATTR_LIST_MAX {
            return Err(posix(errno::ENOSPC));
        }
        record.xattr_bytes = bytes;
        record.set_ctime(now_ns);
        self.put(&key, value);
        self.put_inode(inode, &record);
        Ok(MdsReply::Done)
    }

    pub(crate) fn remove_xattr(&mut self, inode: InodeId, name: &[u8], now_ns: u64) -> Answer {
        let mut record = self.inode(inode)?;
        let key = keys::xattr(inode, name);
        let Some(old) = self.kv.view(&key, |value| value.map(<[u8]>::len)) else {
            return Err(posix(errno::ENODATA));
        };
        record.xattr_bytes -= (name.len() + old) as u32;
        record.set_ctime(now_ns);
        self.delete(&key);
        self.put_inode(inode, &record);
        Ok(MdsReply::Done)
    }

    pub(crate) fn open_handle(&mut self, client: ClientId, inode: InodeId) -> Answer {
        let mut record = self.inode(inode)?;
        let key = keys::two(keys::HANDLE, inode.0, client.0);
        let count: u32 = self.record(&key).unwrap_or(0);
        if count == u32::MAX || record.handles == u32::MAX {
            return Err(MdsError::Refused("too many handles".into()));
        }
        record.handles += 1;
        self.put_inode(inode, &record);
        self.put_record(&key, &(count + 1));
        self.put(&keys::two(keys::HANDLE_OF, client.0, inode.0), Vec::new());
        Ok(MdsReply::Done)
    }

    pub(crate) fn close_handle(&mut self, client: ClientId, inode: InodeId) -> Answer {
        let key = keys::two(keys::HANDLE, inode.0, client.0);
        let count: u32 = self.record(&key).ok_or_else(|| MdsError::NotFound(format!("a handle of {inode}")))?;
        if count == 1 {
            self.drop_handles(client, inode);
        } else {
            self.put_record(&key, &(count - 1));
            let mut record = self.inode(inode)?;
            record.handles -= 1;
            self.put_inode(inode, &record);
        }
        Ok(MdsReply::Done)
    }

    /// Takes back all handles of a session on an inode.
    pub(crate) fn drop_handles(&mut self, client: ClientId, inode: InodeId) {
        let key = keys::two(keys::HANDLE, inode.0, client.0);
        let count: u32 = self.record(&key).expect("both sides of a handle are kept");
        self.delete(&key);
        self.delete(&keys::two(keys::HANDLE_OF, client.0, inode.0));
        let mut record = self.inode(inode).expect("an inode with handles exists");
        record.handles -= count;
        self.put_inode(inode, &record);
        self.free_if_orphan(inode, record);
    }

    /// Frees an inode without names unless somebody has it open. Who holds a lease is asked to give it back.
    pub(crate) fn free_if_orphan(&mut self, inode: InodeId, mut record: Inode) {
        if record.nlink > 0 || record.handles > 0 {
            return;
        }
        self.lease_settle(&mut record.lease);
        if !record.lease.is_free() {
            let volume = VolumeId::of_inode(inode);
            for holder in record.lease.holders() {
                self.push(Recipient::Session(holder), Push::LeaseRecall { volume, wanted: LeaseMode::Exclusive });
            }
            return;
        }
        match record.kind {
            InodeKind::Volume => self.globals.volumes -= 1,
            _ => self.globals.inodes -= 1,
        }
        if record.chunks == 0 && record.xattr_bytes == 0 {
            self.delete(&keys::inode(inode));
        } else {
            self.put_inode(inode, &record);
            self.put(&keys::one(keys::GARBAGE, inode.0), Vec::new());
        }
    }

    /// Frees at most `limit` chunks and attributes of an inode that is going, and at last the inode. Returns how many.
    pub(crate) fn collect(&mut self, inode: InodeId, limit: usize) -> usize {
        let mut record: Inode = self.record(&keys::inode(inode)).expect("an inode is there until it is freed");
        let volume = VolumeId::of_inode(inode);
        let mut done = self.free_chunks(volume, 0, u64::MAX, limit);
        record.chunks -= done as u64;
        let prefix = keys::one(keys::XATTR, inode.0);
        let xattrs = self.kv.scan(&prefix, &keys::after(&prefix), limit - done);
        for (key, _) in &xattrs {
            self.delete(key);
        }
        done += xattrs.len();
        if done < limit {
            assert_eq!(record.chunks, 0, "{inode} counts chunks that its map does not have");
            self.delete(&keys::inode(inode));
            self.delete(&keys::one(keys::GARBAGE, inode.0));
            self.delete(&keys::one(keys::RETARGET, inode.0));
        } else {
            self.put_inode(inode, &record);
        }
        done.max(1)
    }
}
