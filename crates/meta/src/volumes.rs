//! Block volumes, and the attributes that say how content is stored.
//!
//! A block volume is an inode outside the tree, found by a name of its own. Attributes are inherited by copying: a new
//! inode takes those of its directory, a new volume those of the root, so reading them needs no walk.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::record::{Inode, Policy};
use crate::state::{Meta, decode_record, short};
use cairn_types::{BLOCK_SIZE_U64, ClientId, InodeId, Redundancy, VolumeId, parse_size};
use cairn_wire::mds::{InodeKind, LIST_MAX, MdsError, MdsReply, VolumeInfo, VolumeOptions};

/// Longest name of a volume, in bytes.
pub const VOLUME_NAME_MAX: usize = 200;
/// Smallest chunk size.
pub const CHUNK_SIZE_MIN: u64 = 1 << 20;
/// Largest chunk size.
pub const CHUNK_SIZE_MAX: u64 = 256 << 20;

fn check_name(name: &str) -> Result<(), MdsError> {
    let digits = name.bytes().all(|byte| byte.is_ascii_digit());
    if name.is_empty()
        || name.len() > VOLUME_NAME_MAX
        || digits
        || matches!(name, "." | "..")
        || name.chars().any(|c| c.is_control() || c == '/')
        || name.trim() != name
    {
        return Err(MdsError::Invalid(format!(
            "a volume name has 1 to {VOLUME_NAME_MAX} bytes, no `/`, no control characters, no space at either end, and is not `.`, `..` or a number"
        )));
    }
    Ok(())
}

fn check_size(size: u64) -> Result<(), MdsError> {
    if size == 0 || !size.is_multiple_of(BLOCK_SIZE_U64) || size > crate::inodes::SIZE_MAX {
        return Err(MdsError::Invalid(format!("a volume's size is a positive multiple of {BLOCK_SIZE_U64} bytes")));
    }
    Ok(())
}

fn chunk_shift(size: u64) -> Result<u8, MdsError> {
    if !size.is_power_of_two() || !(CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&size) {
        return Err(MdsError::Invalid("chunk-size is a power of two from 1M to 256M".into()));
    }
    Ok(size.trailing_zeros() as u8)
}

fn check_tier(tier: u8) -> Result<u8, MdsError> {
    if tier > crate::placement::TIER_MAX {
        return Err(MdsError::Invalid("tier is 0 to 3".into()));
    }
    Ok(tier)
}

impl Policy {
    fn set_redundancy(&mut self, redundancy: Redundancy) {
        (self.replicas, self.minimum) = (redundancy.replicas(), redundancy.minimum());
    }

    /// Sets one attribute from its text.
    fn set(&mut self, key: &str, value: &str) -> Result<(), MdsError> {
        let invalid = |error: &dyn std::fmt::Display| MdsError::Invalid(error.to_string());
        match key {
            "replicas" => self.set_redundancy(value.parse().map_err(|error| invalid(&error))?),
            "failure-domain" => self.domain = value.parse().map_err(|error: String| invalid(&error))?,
            "tier" => self.tier = check_tier(value.parse().map_err(|_| invalid(&"tier is 0 to 3"))?)?,
            "chunk-size" => self.chunk_shift = chunk_shift(parse_size(value).map_err(|error| invalid(&error))?)?,
            "encoding" => {
                return Err(MdsError::Refused(
                    "erasure coding (encoding=M+N) is not available yet; use replicas=N".into(),
                ));
            }
            _ => {
                return Err(MdsError::Invalid(format!(
                    "there is no attribute `{}`; choose one of replicas, failure-domain, tier, chunk-size",
                    short(key)
                )));
            }
        }
        Ok(())
    }

    fn pairs(&self) -> Vec<(String, String)> {
        let pair = |key: &str, value: String| (key.to_owned(), value);
        vec![
            pair("chunk-size", self.chunk_size().to_string()),
            pair("failure-domain", self.domain.to_string()),
            pair("replicas", self.redundancy().to_string()),
            pair("tier", self.tier.to_string()),
        ]
    }
}

impl<K: Kv> Meta<K> {
    pub(crate) fn attributes_get(&self, inode: InodeId) -> Answer {
        Ok(MdsReply::Pairs(self.inode(inode)?.policy.pairs()))
    }

    pub(crate) fn attributes_set(&mut self, inode: InodeId, pairs: &[(String, String)], now_ns: u64) -> Answer {
        let mut record = self.inode(inode)?;
        let before = record.policy;
        for (key, value) in pairs {
            // Paths on the command line come with a slash: `-p /failure-domain=disk`.
            record.policy.set(key.strip_prefix('/').unwrap_or(key), &short(value))?;
        }
        if record.policy == before {
            return Ok(MdsReply::Done);
        }
        if record.policy.chunk_shift != before.chunk_shift {
            if record.chunks > 0 {
                return Err(MdsError::Refused("the chunk size is fixed once something was written".into()));
            }
            // A holder has the old size in its grant.
            self.refuse_if_held(None, VolumeId::of_inode(inode), &record.lease)?;
        }
        record.set_ctime(now_ns);
        self.put_inode(inode, &record);
        if record.chunks > 0 && (record.policy.replicas, record.policy.minimum) != (before.replicas, before.minimum) {
            self.retarget_start(inode);
        }
        Ok(MdsReply::Done)
    }

    fn volume_id(&self, name: &str) -> Option<VolumeId> {
        let by_name = self.record(&keys::bytes(keys::NAME, name.as_bytes()));
        by_name.or_else(|| name.parse().ok().map(VolumeId))
    }

    /// A block volume; files are volumes too, but not these.
    fn block_volume(&self, volume: VolumeId) -> Result<Inode, MdsError> {
        let inode = self.volume_inode(volume)?;
        if inode.kind == InodeKind::Volume { Ok(inode) } else { Err(MdsError::NotFound(volume.to_string())) }
    }

    fn volume_info(&self, volume: VolumeId, inode: &Inode) -> VolumeInfo {
        let mut lease = inode.lease.clone();
        self.lease_settle(&mut lease);
        VolumeInfo {
            volume,
            name: String::from_utf8_lossy(&inode.text).into_owned(),
            size: inode.size,
            chunk_size: inode.policy.chunk_size(),
            redundancy: inode.policy.redundancy(),
            failure_domain: inode.policy.domain,
            tier: inode.policy.tier,
            chunks: inode.chunks,
            holder: lease.exclusive.map(|client| (client, lease.epoch)),
            created_ns: inode.birth_ns,
        }
    }

    pub(crate) fn volume_get(&self, name: &str) -> Answer {
        let volume = self.volume_id(name).ok_or_else(|| MdsError::NotFound(format!("volume `{name}`")))?;
        let inode = self.block_volume(volume).map_err(|_| MdsError::NotFound(format!("volume `{name}`")))?;
        Ok(MdsReply::Volume(self.volume_info(volume, &inode)))
    }

    pub(crate) fn volume_list(&self, after: &str, limit: u32) -> MdsReply {
        let limit = (limit as usize).clamp(1, LIST_MAX);
        let mut from = keys::bytes(keys::NAME, after.as_bytes());
        if !after.is_empty() {
            from.push(0);
        }
        let mut names = self.kv.scan(&from, &[keys::NAME + 1], limit + 1);
        let end = names.len() <= limit;
        names.truncate(limit);
        let info = |(_, value): &(Vec<u8>, Vec<u8>)| {
            let volume: VolumeId = decode_record(value);
            let inode = self.inode(InodeId(volume.0)).expect("a name leads to a volume");
            self.volume_info(volume, &inode)
        };
        MdsReply::Volumes { volumes: names.iter().map(info).collect(), end }
    }

    pub(crate) fn volume_create(&mut self, name: String, size: u64, options: &VolumeOptions, now_ns: u64) -> Answer {
        check_name(&name)?;
        check_size(size)?;
        let mut policy = self.inode(InodeId::ROOT)?.policy;
        if let Some(redundancy) = options.redundancy {
            // The fields came over the wire and past the constructor.
            let checked = Redundancy::new(redundancy.replicas(), redundancy.minimum());
            policy.set_redundancy(checked.map_err(|error| MdsError::Invalid(error.to_string()))?);
        }
        policy.domain = options.failure_domain.unwrap_or(policy.domain);
        if let Some(tier) = options.tier {
            policy.tier = check_tier(tier)?;
        }
        if let Some(size) = options.chunk_size {
            policy.chunk_shift = chunk_shift(size)?;
        }
        let key = keys::bytes(keys::NAME, name.as_bytes());
        if self.kv.get(&key).is_some() {
            return Err(MdsError::Exists(format!("volume `{name}`")));
        }
        let volume = VolumeId(self.globals.next_inode);
        self.globals.next_inode += 1;
        self.globals.volumes += 1;
        let mut inode = Inode::new(InodeKind::Volume, 0o600, 0, 0, policy, now_ns);
        inode.size = size;
        inode.text = name.into_bytes();
        self.put_inode(InodeId(volume.0), &inode);
        self.put_record(&key, &volume);
        Ok(MdsReply::Volume(self.volume_info(volume, &inode)))
    }

    pub(crate) fn volume_resize(
        &mut self,
        client: ClientId,
        volume: VolumeId,
        size: u64,
        shrink: bool,
        now_ns: u64,
    ) -> Answer {
        let mut inode = self.block_volume(volume)?;
        check_size(size)?;
        if size < inode.size {
            if !shrink {
                return Err(MdsError::Refused(format!(
                    "{volume} has {} bytes; shrinking drops what lies past the end and has to be asked for",
                    inode.size
                )));
            }
            self.refuse_if_held(Some(client), volume, &inode.lease)?;
            self.drop_past(volume, &mut inode, size);
        }
        self.resize(client, volume, &mut inode, size);
        inode.touch(now_ns);
        self.put_inode(InodeId(volume.0), &inode);
        Ok(MdsReply::Volume(self.volume_info(volume, &inode)))
    }

    pub(crate) fn volume_delete(&mut self, volume: VolumeId) -> Answer {
        let mut inode = self.block_volume(volume)?;
        self.refuse_if_held(None, volume, &inode.lease)?;
        if inode.handles > 0 {
            return Err(MdsError::Refused(format!("{volume} is open")));
        }
        self.delete(&keys::bytes(keys::NAME, &inode.text));
        inode.nlink = 0;
        self.put_inode(InodeId(volume.0), &inode);
        self.free_if_orphan(InodeId(volume.0), inode);
        Ok(MdsReply::Done)
    }

    pub(crate) fn volume_rename(&mut self, volume: VolumeId, name: String, now_ns: u64) -> Answer {
        check_name(&name)?;
        let mut inode = self.block_volume(volume)?;
        if inode.text == name.as_bytes() {
            return Ok(MdsReply::Done);
        }
        let key = keys::bytes(keys::NAME, name.as_bytes());
        if self.kv.get(&key).is_some() {
            return Err(MdsError::Exists(format!("volume `{name}`")));
        }
        self.delete(&keys::bytes(keys::NAME, &inode.text));
        self.put_record(&key, &volume);
        inode.text = name.into_bytes();
        inode.set_ctime(now_ns);
        self.put_inode(InodeId(volume.0), &inode);
        Ok(MdsReply::Done)
    }
}
