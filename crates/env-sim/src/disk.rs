//! A disk in memory that behaves as badly as the contract of `cairn_env::disk` allows, and worse when told to.
//!
//! The disk holds three layers per 4 KiB page: what survives a power cut (`stable`), completed writes that no flush has
//! covered yet (`dirty`, every version of them), and what reads return instead because of a fault (`faulty`). Keeping
//! them apart means that a fault can be lifted and the true content is still there. Pages are shared, so a clone of a
//! disk of many gigabytes costs a walk over the pages ever written.

use cairn_env::{BufMut, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskRequest, IoId};
use cairn_stdx::Rng;
use std::collections::BTreeMap;
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// Bytes a page: the unit of requests.
const PAGE: usize = 4096;
/// Bytes a sector: the unit of tearing.
const SECTOR: usize = 512;
/// Sectors a page.
pub const SECTORS_PER_PAGE: usize = PAGE / SECTOR;

type Page = [u8; PAGE];

/// Kinds of request, for counting and for choosing what fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Any request.
    Any,
}

/// A fault waiting for its moment. Counts start at 0 with the first request submitted after [`SimDisk::inject`].
#[derive(Clone, Debug)]
pub enum Fault {
    /// The `nth` request of `kind` fails with an input/output error; with `forever`, all later ones too.
    Fail {
        /// Which requests count.
        kind: OpKind,
        /// How many of them succeed first.
        nth: u64,
        /// Whether everything after it fails as well.
        forever: bool,
    },
    /// The `nth` write is acknowledged but never stored.
    LoseWrite {
        /// How many writes are stored first.
        nth: u64,
    },
    /// Of the `nth` write the pages from `first` on are never stored; it is acknowledged.
    LosePart {
        /// How many writes are stored first.
        nth: u64,
        /// Pages of it that are stored.
        first: u64,
    },
    /// The `nth` write lands at `offset` instead of where it belongs.
    MisdirectWrite {
        /// How many writes go right first.
        nth: u64,
        /// Byte offset where the data lands, aligned.
        offset: u64,
    },
    /// The `nth` read returns what its pages held before they were last written, if the disk
    /// [remembers](SimDisk::remember).
    StaleRead {
        /// How many reads are right first.
        nth: u64,
    },
    /// The `nth` request of `kind` never completes.
    Hang {
        /// Which requests count.
        kind: OpKind,
        /// How many of them complete first.
        nth: u64,
    },
}

#[derive(Clone, Debug)]
struct Armed {
    fault: Fault,
    seen: u64,
}

#[derive(Clone)]
struct Version {
    order: u64,
    page: Arc<Page>,
    /// Covered by a flush that failed: no later flush makes it durable, only writing it again does.
    stranded: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Fate {
    Normal,
    Fails,
    Hangs,
    /// From this page of the write on.
    Lost(u64),
    Misdirected(u64),
    Stale,
}

/// Something wrong that was done, of which the disk said nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Misdeed {
    /// What it was.
    pub what: &'static str,
    /// The first page it concerns.
    pub page: u64,
    /// How many pages.
    pub pages: u64,
}

#[derive(Clone)]
enum Work {
    Read { offset: u64, len: u32 },
    Write { first_page: u64, pages: Vec<Arc<Page>> },
    Flush { covers: u64 },
    Discard,
}

#[derive(Clone)]
struct Flying {
    work: Work,
    fate: Fate,
}

/// The simulated disk. See the module for the model.
#[derive(Clone)]
pub struct SimDisk {
    size: u64,
    capacity: u64,
    stable: BTreeMap<u64, Arc<Page>>,
    dirty: BTreeMap<u64, Vec<Version>>,
    faulty: BTreeMap<u64, Arc<Page>>,
    stale: BTreeMap<u64, Arc<Page>>,
    flying: BTreeMap<IoId, Flying>,
    armed: Vec<Armed>,
    /// What pages held before they were last written, once the disk remembers.
    before: Option<BTreeMap<u64, Arc<Page>>>,
    /// Flushes are acknowledged and do nothing.
    lies: bool,
    misdeeds: Vec<Misdeed>,
    order: u64,
    zero: Arc<Page>,
    /// Requests completed so far, by kind: reads, writes, flushes.
    pub completed: [u64; 3],
    /// Bytes written so far.
    pub written_bytes: u64,
}

impl SimDisk {
    /// A disk of `size` zero bytes; a multiple of 4096.
    pub fn new(size: u64) -> Self {
        assert!(size.is_multiple_of(PAGE as u64), "a disk is made of whole pages");
        Self {
            size,
            capacity: u64::MAX,
            stable: BTreeMap::new(),
            dirty: BTreeMap::new(),
            faulty: BTreeMap::new(),
            stale: BTreeMap::new(),
            flying: BTreeMap::new(),
            armed: Vec::new(),
            before: None,
            lies: false,
            misdeeds: Vec::new(),
            order: 0,
            zero: Arc::new([0; PAGE]),
            completed: [0; 3],
            written_bytes: 0,
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// From now on a write to a page never written before fails with "no space" once `bytes` are in use: the store file
    /// lies on a file system that ran full.
    pub fn set_capacity(&mut self, bytes: u64) {
        self.capacity = bytes;
    }

    /// Takes a request. It completes when [`complete`](Self::complete) is called for it.
    ///
    /// Panics on a request outside the contract (unaligned, outside the disk, overlapping a request in flight): a core
    /// that issues one is broken.
    pub fn submit(&mut self, request: DiskRequest) {
        let kind = match &request.op {
            DiskOp::Read { .. } => OpKind::Read,
            DiskOp::Write { .. } => OpKind::Write,
            DiskOp::Flush => OpKind::Flush,
            DiskOp::Discard { .. } => OpKind::Any,
        };
        let work = match request.op {
            DiskOp::Read { offset, len } => {
                self.check_range(offset, u64::from(len));
                self.check_overlap(offset, u64::from(len), false);
                Work::Read { offset, len }
            }
            DiskOp::Write { offset, bufs } => {
                let len: usize = bufs.iter().map(|buf| buf.len()).sum();
                self.check_range(offset, len as u64);
                self.check_overlap(offset, len as u64, true);
                let mut pages = Vec::with_capacity(len / PAGE);
                for buf in &bufs {
                    assert!(buf.is_aligned() && buf.len().is_multiple_of(PAGE), "write buffers are aligned pages");
                    pages.extend(buf.chunks_exact(PAGE).map(|c| Arc::new(Page::try_from(c).expect("a whole page"))));
                }
                Work::Write { first_page: offset / PAGE as u64, pages }
            }
            DiskOp::Flush => Work::Flush { covers: self.order },
            DiskOp::Discard { offset, len } => {
                self.check_range(offset, len);
                Work::Discard
            }
        };
        let fate = self.fate(kind);
        let previous = self.flying.insert(request.io, Flying { work, fate });
        assert!(previous.is_none(), "request id {:?} is in flight twice", request.io);
    }

    fn check_range(&self, offset: u64, len: u64) {
        let page = PAGE as u64;
        assert!(offset.is_multiple_of(page) && len.is_multiple_of(page) && len > 0, "unaligned {offset}+{len}");
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "{offset}+{len} outside the disk");
    }

    /// Two requests in flight to one range have no order, so a core never issues them, unless both are reads.
    fn check_overlap(&self, offset: u64, len: u64, write: bool) {
        for (io, flying) in &self.flying {
            let (start, size, other_writes) = match &flying.work {
                Work::Read { offset, len } => (*offset, u64::from(*len), false),
                Work::Write { first_page, pages } => (first_page * PAGE as u64, (pages.len() * PAGE) as u64, true),
                Work::Flush { .. } | Work::Discard => continue,
            };
            let overlap = offset < start + size && start < offset + len;
            assert!(!(overlap && (write || other_writes)), "{offset}+{len} overlaps {io:?} at {start}+{size}");
        }
    }

    fn fate(&mut self, kind: OpKind) -> Fate {
        let mut fate = Fate::Normal;
        self.armed.retain_mut(|armed| {
            let wanted = match &armed.fault {
                Fault::Fail { kind, .. } | Fault::Hang { kind, .. } => *kind,
                Fault::LoseWrite { .. } | Fault::LosePart { .. } | Fault::MisdirectWrite { .. } => OpKind::Write,
                Fault::StaleRead { .. } => OpKind::Read,
            };
            if wanted != OpKind::Any && wanted != kind {
                return true;
            }
            let at = armed.seen;
            armed.seen += 1;
            match &armed.fault {
                Fault::Fail { nth, forever, .. } => {
                    if at >= *nth {
                        fate = Fate::Fails;
                    }
                    at < *nth || *forever
                }
                Fault::Hang { nth, .. } => {
                    if at == *nth {
                        fate = Fate::Hangs;
                    }
                    at < *nth
                }
                Fault::LoseWrite { nth } => {
                    if at == *nth {
                        fate = Fate::Lost(0);
                    }
                    at < *nth
                }
                Fault::LosePart { nth, first } => {
                    if at == *nth {
                        fate = Fate::Lost(*first);
                    }
                    at < *nth
                }
                Fault::MisdirectWrite { nth, offset } => {
                    if at == *nth {
                        fate = Fate::Misdirected(*offset);
                    }
                    at < *nth
                }
                Fault::StaleRead { nth } => {
                    if at == *nth {
                        fate = Fate::Stale;
                    }
                    at < *nth
                }
            }
        });
        fate
    }

    /// Requests that can complete now, in id order. Hanging ones are left out.
    pub fn pending(&self) -> impl Iterator<Item = IoId> + '_ {
        self.flying.iter().filter(|(_, flying)| flying.fate != Fate::Hangs).map(|(io, _)| *io)
    }

    /// True when nothing can complete.
    pub fn is_idle(&self) -> bool {
        self.pending().next().is_none()
    }

    /// Completes one request that `rng` picks.
    pub fn complete_next(&mut self, rng: &mut Rng) -> Option<DiskDone> {
        let pending: Vec<IoId> = self.pending().collect();
        let io = *rng.choose(&pending)?;
        self.complete(io)
    }

    /// Completes the request `io`; none when it is not in flight or hangs.
    pub fn complete(&mut self, io: IoId) -> Option<DiskDone> {
        if self.flying.get(&io)?.fate == Fate::Hangs {
            return None;
        }
        let flying = self.flying.remove(&io)?;
        let failed = flying.fate == Fate::Fails;
        let error = |operation, offset, len, kind| DiskError { operation, offset, len, kind };
        let result = match flying.work {
            Work::Read { offset, len } => {
                self.completed[0] += 1;
                if failed {
                    Err(error("read", offset, u64::from(len), DiskErrorKind::Io))
                } else {
                    let mut buf = BufMut::zeroed(len as usize);
                    for (i, out) in buf.chunks_exact_mut(PAGE).enumerate() {
                        let page = offset / PAGE as u64 + i as u64;
                        let mut stale = self.stale.remove(&page);
                        if flying.fate == Fate::Stale {
                            stale = stale.or_else(|| self.before.as_ref()?.get(&page).cloned());
                            self.misdeeds.extend(stale.iter().map(|_| Misdeed { what: "stale read", page, pages: 1 }));
                        }
                        out.copy_from_slice(&stale.unwrap_or_else(|| self.visible(page))[..]);
                    }
                    Ok(buf.freeze())
                }
            }
            Work::Write { first_page, pages } => {
                self.completed[1] += 1;
                let (offset, len) = (first_page * PAGE as u64, (pages.len() * PAGE) as u64);
                let grows = pages.len() as u64;
                let used = (self.stable.len() + self.dirty.len()) as u64;
                if failed {
                    Err(error("write", offset, len, DiskErrorKind::Io))
                } else if self.capacity != u64::MAX && (used + grows) * PAGE as u64 > self.capacity {
                    Err(error("write", offset, len, DiskErrorKind::NoSpace))
                } else {
                    self.written_bytes += len;
                    self.store(first_page, pages, &flying.fate);
                    Ok(BufMut::zeroed(0).freeze())
                }
            }
            Work::Flush { covers } => {
                self.completed[2] += 1;
                if self.lies && !failed {
                    self.misdeeds.push(Misdeed { what: "flush that did nothing", page: 0, pages: 0 });
                } else {
                    self.flush(covers, failed);
                }
                if failed { Err(error("flush", 0, 0, DiskErrorKind::Io)) } else { Ok(BufMut::zeroed(0).freeze()) }
            }
            Work::Discard => Ok(BufMut::zeroed(0).freeze()),
        };
        Some(DiskDone { io, result })
    }

    fn store(&mut self, first_page: u64, pages: Vec<Arc<Page>>, fate: &Fate) {
        self.order += 1;
        let misdeed = |what| Misdeed { what, page: first_page, pages: pages.len() as u64 };
        match fate {
            Fate::Lost(first) if *first < pages.len() as u64 => {
                let lost =
                    Misdeed { page: first_page + first, pages: pages.len() as u64 - first, ..misdeed("lost write") };
                self.misdeeds.push(lost);
            }
            Fate::Misdirected(offset) => {
                let there = Misdeed { page: offset / PAGE as u64, ..misdeed("write over") };
                self.misdeeds.extend([misdeed("misdirected write"), there]);
            }
            _ => {}
        }
        for (i, page) in pages.into_iter().enumerate() {
            let number = first_page + i as u64;
            let held = self.before.is_some().then(|| self.visible(number));
            if let (Some(before), Some(held)) = (&mut self.before, held) {
                before.insert(number, held);
            }
            match fate {
                Fate::Lost(first) if i as u64 >= *first => {
                    self.faulty.insert(number, self.visible(number));
                }
                Fate::Misdirected(offset) => {
                    self.faulty.insert(number, self.visible(number));
                    let other = (offset / PAGE as u64 + i as u64) % (self.size / PAGE as u64);
                    self.faulty.insert(other, Arc::clone(&page));
                }
                _ => {
                    self.faulty.remove(&number);
                }
            }
            let version = Version { order: self.order, page, stranded: false };
            self.dirty.entry(number).or_default().push(version);
        }
    }

    fn flush(&mut self, covers: u64, failed: bool) {
        let stable = &mut self.stable;
        self.dirty.retain(|number, versions| {
            if failed {
                versions.iter_mut().filter(|v| v.order <= covers).for_each(|v| v.stranded = true);
                return true;
            }
            if let Some(at) = versions.iter().rposition(|v| v.order <= covers && !v.stranded) {
                stable.insert(*number, Arc::clone(&versions[at].page));
                versions.drain(..=at);
            }
            !versions.is_empty()
        });
    }

    fn true_page(&self, number: u64) -> Arc<Page> {
        match self.dirty.get(&number).and_then(|versions| versions.last()) {
            Some(version) => Arc::clone(&version.page),
            None => Arc::clone(self.stable.get(&number).unwrap_or(&self.zero)),
        }
    }

    fn visible(&self, number: u64) -> Arc<Page> {
        self.faulty.get(&number).cloned().unwrap_or_else(|| self.true_page(number))
    }

    /// Reads past the request queue: what a request would return now. For checkers and offline tools.
    pub fn peek(&self, offset: u64, len: u32) -> cairn_env::Buf {
        self.check_range(offset, u64::from(len));
        let mut buf = BufMut::zeroed(len as usize);
        for (i, out) in buf.chunks_exact_mut(PAGE).enumerate() {
            out.copy_from_slice(&self.visible(offset / PAGE as u64 + i as u64)[..]);
        }
        buf.freeze()
    }

    /// Writes past the request queue, durably: how a test formats a disk or plants bytes.
    pub fn poke(&mut self, offset: u64, bytes: &[u8]) {
        self.check_range(offset, bytes.len() as u64);
        for (i, bytes) in bytes.chunks_exact(PAGE).enumerate() {
            let number = offset / PAGE as u64 + i as u64;
            self.dirty.remove(&number);
            self.faulty.remove(&number);
            self.stable.insert(number, Arc::new(Page::try_from(bytes).expect("a whole page")));
        }
    }

    /// Arms a fault.
    pub fn inject(&mut self, fault: Fault) {
        self.armed.push(Armed { fault, seen: 0 });
    }

    /// Flips one bit of what reads of byte `offset` return, until the page is written again or faults are lifted.
    pub fn rot(&mut self, offset: u64, bit: u8) {
        assert!(offset < self.size && bit < 8, "rot outside the disk");
        let number = offset / PAGE as u64;
        let mut page = self.visible(number);
        Arc::make_mut(&mut page)[(offset % PAGE as u64) as usize] ^= 1 << bit;
        self.faulty.insert(number, page);
    }

    /// The next read of the page at `offset` returns what the page holds now, whatever is written in between.
    pub fn stale_read(&mut self, offset: u64) {
        let number = offset / PAGE as u64;
        self.stale.insert(number, self.visible(number));
    }

    /// From now on the disk knows what each page held before it was last written: stale reads return that.
    pub fn remember(&mut self) {
        self.before.get_or_insert_default();
    }

    /// From now on flushes are acknowledged and do nothing, or are honest again: the next one then covers all.
    pub fn lie_about_flushes(&mut self, lies: bool) {
        self.lies = lies;
    }

    /// True while flushes do nothing.
    pub fn lies_about_flushes(&self) -> bool {
        self.lies
    }

    /// What was done wrong since this was last asked, for whoever sees everything.
    pub fn take_misdeeds(&mut self) -> Vec<Misdeed> {
        std::mem::take(&mut self.misdeeds)
    }

    /// No more faults begin; what was done wrong so far stays on the disk.
    pub fn disarm(&mut self) {
        self.armed.clear();
        self.stale.clear();
        self.lies = false;
    }

    /// Undoes every fault: armed ones are forgotten, rotten, lost and misdirected pages show their true content,
    /// hanging requests complete again.
    pub fn lift_faults(&mut self) {
        self.disarm();
        self.faulty.clear();
        self.flying.values_mut().filter(|f| f.fate == Fate::Hangs).for_each(|f| f.fate = Fate::Normal);
    }

    /// Pages with content a power cut could lose, in order: completed but not flushed, or in flight.
    pub fn unflushed_pages(&self) -> Vec<u64> {
        self.candidates().into_keys().collect()
    }

    /// Pages ever written, in order.
    pub fn written_pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.stable.keys().chain(self.dirty.keys()).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    fn candidates(&self) -> BTreeMap<u64, Vec<Arc<Page>>> {
        let mut all: BTreeMap<u64, Vec<Arc<Page>>> = BTreeMap::new();
        for (number, versions) in &self.dirty {
            all.entry(*number).or_default().extend(versions.iter().map(|v| Arc::clone(&v.page)));
        }
        for flying in self.flying.values() {
            if let Work::Write { first_page, pages } = &flying.work {
                for (i, page) in pages.iter().enumerate() {
                    all.entry(first_page + i as u64).or_default().push(Arc::clone(page));
                }
            }
        }
        all
    }

    /// Power fails: of every sector not covered by a flush, `choose(page, sector, versions)` picks what is on the
    /// medium afterwards: 0 is the stable content, `1..=versions` the writes since, in order. In-flight requests
    /// vanish.
    pub fn power_cut_choose(&mut self, choose: &mut dyn FnMut(u64, usize, usize) -> usize) {
        for (number, versions) in self.candidates() {
            let mut page = Arc::clone(self.stable.get(&number).unwrap_or(&self.zero));
            let mixed = Arc::make_mut(&mut page);
            for sector in 0..SECTORS_PER_PAGE {
                let choice = choose(number, sector, versions.len());
                if choice > 0 {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    mixed[range.clone()].copy_from_slice(&versions[choice - 1][range]);
                }
            }
            self.stable.insert(number, page);
        }
        self.dirty.clear();
        self.flying.clear();
    }

    /// Power fails; `rng` decides the fate of every sector no flush has covered: old, any newer version, page by page
    /// or torn between sectors.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        // Whole-page outcomes are as likely as torn ones: both break different assumptions.
        let mood = rng.below(4);
        let mut page_choice = (u64::MAX, 0usize, false);
        self.power_cut_choose(&mut |page, _, versions| {
            if page_choice.0 != page {
                let choice = match mood {
                    0 => 0,
                    1 => versions,
                    _ => rng.below(versions as u64 + 1) as usize,
                };
                page_choice = (page, choice, mood == 3 && rng.chance(1, 2));
            }
            if page_choice.2 { rng.below(versions as u64 + 1) as usize } else { page_choice.1 }
        });
    }

    /// The process dies, the machine lives: completed writes stay, of writes in flight any subset of sectors arrives.
    pub fn kill(&mut self, rng: &mut Rng) {
        let flying = std::mem::take(&mut self.flying);
        for (_, flight) in flying {
            let Work::Write { first_page, pages } = flight.work else { continue };
            let mood = rng.below(3);
            for (i, page) in pages.into_iter().enumerate() {
                let number = first_page + i as u64;
                let mut mixed = self.true_page(number);
                let out = Arc::make_mut(&mut mixed);
                for sector in 0..SECTORS_PER_PAGE {
                    if mood == 1 || (mood == 2 && rng.chance(1, 2)) {
                        let range = sector * SECTOR..(sector + 1) * SECTOR;
                        out[range.clone()].copy_from_slice(&page[range]);
                    }
                }
                self.order += 1;
                let version = Version { order: self.order, page: mixed, stranded: false };
                self.dirty.entry(number).or_default().push(version);
            }
        }
    }
}
