//! The small key-value store for services, with revisions for compare-and-set.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::state::{Meta, decode_record};
use cairn_wire::mds::{KV_VALUE_MAX, LIST_MAX, MdsError, MdsReply};

/// Longest key, in bytes.
pub const KV_KEY_MAX: usize = 1024;
/// Most bytes of keys and values in one listing; the caller asks on.
const LIST_BYTES_MAX: usize = 4 << 20;
/// Values fetched at a time while listing: each may be large.
const LIST_PAGE: usize = 4;

type Value = (u64, Vec<u8>);

impl<K: Kv> Meta<K> {
    fn check_revision(&self, key: &[u8], expected: Option<u64>) -> Result<(), MdsError> {
        if key.is_empty() || key.len() > KV_KEY_MAX {
            return Err(MdsError::Invalid(format!("a key has 1 to {KV_KEY_MAX} bytes")));
        }
        let Some(expected) = expected else { return Ok(()) };
        let revision = self.record::<Value>(&keys::bytes(keys::USER, key)).map_or(0, |(revision, _)| revision);
        if revision != expected {
            return Err(MdsError::Refused(format!("the key is at revision {revision}, expected was {expected}")));
        }
        Ok(())
    }

    pub(crate) fn user_get(&self, key: &[u8]) -> MdsReply {
        let value = self.record::<Value>(&keys::bytes(keys::USER, key));
        MdsReply::Kv { value: value.map(|(revision, value)| (value, revision)) }
    }

    /// Answers with the new revision and an empty value.
    pub(crate) fn user_put(&mut self, key: &[u8], value: Vec<u8>, expected: Option<u64>) -> Answer {
        self.check_revision(key, expected)?;
        if value.len() > KV_VALUE_MAX {
            return Err(MdsError::Invalid(format!("a value has at most {KV_VALUE_MAX} bytes")));
        }
        let revision = self.globals.next_revision;
        self.globals.next_revision += 1;
        self.put_record(&keys::bytes(keys::USER, key), &(revision, value));
        Ok(MdsReply::Kv { value: Some((Vec::new(), revision)) })
    }

    pub(crate) fn user_delete(&mut self, key: &[u8], expected: Option<u64>) -> Answer {
        self.check_revision(key, expected)?;
        self.delete(&keys::bytes(keys::USER, key));
        Ok(MdsReply::Done)
    }

    pub(crate) fn user_list(&self, prefix: &[u8], after: &[u8], limit: u32) -> MdsReply {
        let prefix = keys::bytes(keys::USER, prefix);
        let end = keys::after(&prefix);
        let mut from = keys::bytes(keys::USER, after);
        if !after.is_empty() {
            from.push(0);
        }
        let mut from = from.max(prefix);
        let limit = (limit as usize).clamp(1, LIST_MAX);
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while entries.len() < limit && bytes < LIST_BYTES_MAX {
            let page = self.kv.scan(&from, &end, LIST_PAGE.min(limit - entries.len()));
            let Some((last, _)) = page.last() else { return MdsReply::KvList { entries, end: true } };
            from.clone_from(last);
            from.push(0);
            for (key, value) in page {
                let (revision, value): Value = decode_record(&value);
                bytes += key.len() + value.len();
                entries.push((key[1..].to_vec(), value, revision));
            }
        }
        let end = self.kv.scan(&from, &end, 1).is_empty();
        MdsReply::KvList { entries, end }
    }
}
