//! Opening: reads the whole ring, finds the newest group, replays from the head it names.
//!
//! A bad tail is not a bad middle. Only the last group can be torn by a crash, because each is durable before the next
//! is issued. So a bad group with a valid later one is rot, and the log refuses to open: cutting there would forget
//! acknowledged entries and votes.

use crate::config::{Config, Initial, NUMBER_MAX};
use crate::entry;
use crate::error::OpenError;
use crate::format::{
    GROUP_HEADER_SIZE, GroupHeader, GroupWriter, LOG_VERSION, Place, Record, read_header, read_records,
};
use crate::members::{Change, Members};
use crate::output::SnapshotMeta;
use crate::store::LogStore;
use crate::wal::{GroupPlace, Ring};
use crate::wire::Identity;
use cairn_env::{Buf, DISK_ALIGNMENT, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use cairn_stdx::checksum::crc32c;
use cairn_stdx::planted;
use cairn_types::{ClusterId, MdsId};
use raft::eraftpb::{Entry, HardState};
use std::collections::{BTreeMap, VecDeque};

const READ_SIZE: u64 = 1 << 20;
const READS_MAX: usize = 8;

/// The operations that make a new log, to be carried out one after the other. The whole region is written, which
/// preallocates it and leaves nothing of an older log. `instance` is a fresh random number, not zero.
pub fn format(config: &Config, instance: u64, initial: &Initial) -> Vec<DiskOp> {
    config.validate();
    assert!(instance != 0, "an instance is not zero");
    let zeros = Buf::zeroed(READ_SIZE.min(config.log_size_bytes) as usize);
    let mut operations: Vec<DiskOp> = (0..config.log_size_bytes)
        .step_by(READ_SIZE as usize)
        .map(|offset| {
            let len = READ_SIZE.min(config.log_size_bytes - offset) as usize;
            DiskOp::Write { offset, bufs: vec![zeros.slice(0, len)] }
        })
        .collect();
    operations.push(DiskOp::Flush);

    let mut entries: Vec<Entry> = Vec::new();
    if let Initial::Bootstrap { voters } = initial {
        let mut members = Members::default();
        for (i, voter) in voters.iter().enumerate() {
            let change = Change::AddVoter(*voter);
            members = members.after(change).expect("the first voters are distinct and few");
            entries.push(Entry { term: 1, index: i as u64 + 1, ..entry::change_entry(change) });
        }
        assert_eq!(members.instance_of(config.id), Some(instance), "a node bootstraps a group that contains it");
    }
    let mut writer = GroupWriter::new(1024);
    if let Initial::Image(meta) = initial {
        assert!(meta.index > 0 && meta.term > 0, "an image stands at a place in the log");
        assert_eq!(meta.members.instance_of(config.id), Some(instance), "a node starts a group that contains it");
        writer.hard_state(&HardState { term: meta.term, vote: 0, commit: meta.index });
        writer.base(meta.index, meta.term, &meta.members);
    } else {
        writer.hard_state(&HardState { term: u64::from(!entries.is_empty()), vote: 0, commit: entries.len() as u64 });
        writer.base(0, 0, &Members::default());
    }
    if !entries.is_empty() {
        writer.entries(1, entries.len(), entries.iter());
    }
    let identity = Identity { cluster: config.cluster, id: config.id, instance };
    let place = Place { sequence: 1, offset: 0 };
    let (buf, _) = writer.seal(&identity, place, place, 0);
    operations.push(DiskOp::Write { offset: 0, bufs: vec![buf] });
    operations.push(DiskOp::Flush);
    operations
}

/// The reads of an opening log.
pub(crate) struct Reader {
    bytes: Vec<u8>,
    reads: BTreeMap<IoId, u64>,
    next_offset: u64,
    pub next_io: u64,
}

impl Reader {
    pub fn new(config: &Config) -> Self {
        let bytes = vec![0; config.log_size_bytes as usize];
        Self { bytes, reads: BTreeMap::new(), next_offset: 0, next_io: 0 }
    }

    pub fn issue(&mut self, disk: &mut Vec<DiskRequest>) {
        let size = self.bytes.len() as u64;
        while self.reads.len() < READS_MAX && self.next_offset < size {
            let (offset, len) = (self.next_offset, READ_SIZE.min(size - self.next_offset));
            self.next_io += 1;
            self.reads.insert(IoId(self.next_io), offset);
            disk.push(DiskRequest { io: IoId(self.next_io), op: DiskOp::Read { offset, len: len as u32 } });
            self.next_offset += len;
        }
    }

    /// Takes a completion. Returns the whole ring when it was the last one.
    pub fn done(&mut self, done: DiskDone, disk: &mut Vec<DiskRequest>) -> Result<Option<Vec<u8>>, DiskError> {
        let offset = self.reads.remove(&done.io).expect("a completion nobody waits for") as usize;
        let buf = done.result?;
        self.bytes[offset..offset + buf.len()].copy_from_slice(&buf);
        self.issue(disk);
        Ok(self.reads.is_empty().then(|| std::mem::take(&mut self.bytes)))
    }
}

/// What the ring says.
pub(crate) struct Recovered {
    pub identity: Identity,
    pub store: LogStore,
    pub ring: Ring,
    pub intent: Option<SnapshotMeta>,
    pub cut_bytes: u64,
    /// Offset and bytes of the newest group.
    pub newest: (u64, Buf),
}

struct Scan {
    groups: BTreeMap<u64, GroupHeader>,
    /// Groups whose header is good and whose body is not: offset and size by number.
    torn: BTreeMap<u64, (u64, u64)>,
}

/// Finds all groups of the ring, of this lap and of earlier ones.
fn scan(config: &Config, bytes: &[u8]) -> Result<Scan, OpenError> {
    let mut found = Scan { groups: BTreeMap::new(), torn: BTreeMap::new() };
    let mut instance = None;
    let mut offset = 0;
    while offset < bytes.len() {
        let at = offset as u64;
        let Some(header) = read_header(&bytes[offset..], at) else {
            offset += DISK_ALIGNMENT as usize;
            continue;
        };
        let sequence = header.sequence.get();
        let corrupt = |what| Err(OpenError::Corrupt { offset: at, sequence, what });
        if header.version.get() != LOG_VERSION {
            return Err(OpenError::Version { offset: at, found: header.version.get(), supported: LOG_VERSION });
        }
        if header.cluster_id != config.cluster.0 {
            return Err(OpenError::OtherCluster { found: ClusterId(header.cluster_id), expected: config.cluster });
        }
        if header.node_id.get() != config.id.0 {
            return Err(OpenError::OtherNode { found: MdsId(header.node_id.get()), expected: config.id });
        }
        if *instance.get_or_insert(header.instance.get()) != header.instance.get() || header.instance.get() == 0 {
            return corrupt("groups of two instances in one log");
        }
        let start = offset + GROUP_HEADER_SIZE;
        let body = bytes.get(start..start + header.body_size_bytes.get() as usize);
        if body.is_some_and(|body| crc32c(body) == header.body_crc32c.get()) {
            if found.groups.insert(sequence, header).is_some() {
                return corrupt("two groups of one number");
            }
            offset += header.padded_size() as usize;
        } else {
            found.torn.insert(sequence, (at, header.padded_size()));
            offset += DISK_ALIGNMENT as usize;
        }
    }
    Ok(found)
}

/// The groups from the head to the newest, each one linked to its predecessor.
fn chain(scan: &Scan) -> Result<Vec<GroupHeader>, OpenError> {
    let Some((_, newest)) = scan.groups.last_key_value() else { return Err(OpenError::NotFormatted) };
    let (head, last) = (newest.head_sequence.get(), newest.sequence.get());
    let mut chain: Vec<GroupHeader> = Vec::new();
    if head > last || last >= NUMBER_MAX {
        let what = "the head lies behind the newest group";
        return Err(OpenError::Corrupt { offset: newest.offset.get(), sequence: last, what });
    }
    for sequence in head..=last {
        let expected_offset =
            chain.last().map_or(newest.head_offset.get(), |previous| previous.offset.get() + previous.padded_size());
        let offset = scan.torn.get(&sequence).map_or(expected_offset, |(offset, _)| *offset);
        let corrupt = |what| OpenError::Corrupt { offset, sequence, what };
        let fault = match (scan.groups.get(&sequence), chain.last()) {
            (None, _) => Some("a group is missing or damaged"),
            (Some(group), None) if group.offset != newest.head_offset => Some("the head lies elsewhere"),
            (Some(group), Some(previous)) if group.previous_crc32c != previous.header_crc32c => {
                Some("a group does not continue its predecessor")
            }
            _ => None,
        };
        match fault {
            // The mistake of treating rot as a torn tail: everything after it is silently forgotten.
            Some(_) if planted!("raft_truncate_bad_middle") && !chain.is_empty() => break,
            Some(what) => return Err(corrupt(what)),
            None => chain.push(scan.groups[&sequence]),
        }
    }
    Ok(chain)
}

/// Rebuilds the log from the bytes of the whole ring.
pub(crate) fn recover(config: &Config, bytes: &[u8], next_io: u64) -> Result<Recovered, OpenError> {
    let scan = scan(config, bytes)?;
    let chain = chain(&scan)?;
    let mut store = LogStore::new();
    let mut intent = None;
    let mut started = false;
    for group in &chain {
        let (offset, sequence) = (group.offset.get(), group.sequence.get());
        let corrupt = |what| OpenError::Corrupt { offset, sequence, what };
        let start = offset as usize + GROUP_HEADER_SIZE;
        let body = &bytes[start..start + group.body_size_bytes.get() as usize];
        for record in read_records(body).map_err(corrupt)? {
            match record {
                Record::HardState(hard) => store.hard = hard,
                Record::Base(meta) => {
                    store.replay_base(&meta);
                    intent = None;
                    started = true;
                }
                Record::Intent(meta) => intent = meta,
                Record::Entries(entries) => {
                    let first = entries.first().map_or(0, |entry| entry.index);
                    // The head is kept for its entries; those between its base and them lie before it and are compacted
                    // by a base that a later group records.
                    if !started || (group.sequence == chain[0].sequence && first > store.last() + 1) {
                        store.install(&SnapshotMeta { index: first - 1, term: 0, members: Members::default() });
                        started = true;
                    }
                    let previous_term = first.checked_sub(1).and_then(|index| store.term_at(index));
                    if previous_term.is_none_or(|term| entries.first().is_some_and(|entry| entry.term < term)) {
                        return Err(corrupt("entries that do not continue the log"));
                    }
                    store.append(entries, sequence);
                }
            }
        }
    }
    let newest = chain.last().expect("a chain has its newest group");
    let corrupt = |what| OpenError::Corrupt { offset: newest.offset.get(), sequence: newest.sequence.get(), what };
    let ((base, base_term), last) = (store.base(), store.last());
    if !started || (base == 0) != (base_term == 0) {
        return Err(corrupt("the base of the log is not recorded"));
    }
    store.hard.commit = store.hard.commit.max(base);
    if store.hard.commit > last || store.term_at(last).is_none_or(|term| term > store.hard.term) {
        return Err(corrupt("commit index or term do not fit the entries"));
    }
    let groups: VecDeque<GroupPlace> = chain
        .iter()
        .map(|group| GroupPlace {
            place: Place { sequence: group.sequence.get(), offset: group.offset.get() },
            size: group.padded_size(),
        })
        .collect();
    let ring = Ring { groups, previous_crc32c: newest.header_crc32c.get(), commit: store.hard.commit, next_io };
    let identity = Identity { cluster: config.cluster, id: config.id, instance: newest.instance.get() };
    let cut_bytes = scan.torn.get(&(newest.sequence.get() + 1)).map_or(0, |(_, size)| *size);
    let at = newest.offset.get();
    let newest = (at, Buf::copy_from(&bytes[at as usize..(at + newest.padded_size()) as usize]));
    Ok(Recovered { identity, store, ring, intent, cut_bytes, newest })
}
