//! The ordered store under the state machine: [`MemKv`] for tests and simulations, [`Overlay`] over a base on disk.
//!
//! Writes of an [`Overlay`] go to a memtable only; the Raft log makes them durable. From time to time the shell freezes
//! the memtable and lets it be written to the base in the background while a new one takes writes. A crash loses the
//! memtables, and the log from the base's index on is replayed.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::Arc;

/// Keys with their values, ascending.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// An ordered store that can be read. An implementation over a disk stops the process when the disk fails: the state
/// machine has no way to go on without its state.
pub trait BaseKv {
    /// Value of a key.
    fn get(&self, key: &[u8]) -> Option<Vec<u8>>;

    /// At most `limit` pairs with `from <= key < to`, ascending.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs;

    /// Shows the value of a key to `read` without copying it, where the store can.
    fn view<R>(&self, key: &[u8], read: impl FnOnce(Option<&[u8]>) -> R) -> R
    where
        Self: Sized,
    {
        read(self.get(key).as_deref())
    }
}

/// An ordered store that can be written.
pub trait Kv: BaseKv {
    /// Sets a key.
    fn put(&mut self, key: &[u8], value: Vec<u8>);
    /// Removes a key.
    fn delete(&mut self, key: &[u8]);
}

/// Longest key kept inside [`Key`].
const KEY_INLINE_MAX: usize = 30;

/// A key of a [`MemKv`]. Nearly all are short enough to lie inside, so that a search compares them without a cache miss
/// each.
#[derive(Clone)]
enum Key {
    /// Length and bytes.
    Inline(u8, [u8; KEY_INLINE_MAX]),
    /// A long one.
    Heap(Box<[u8]>),
}

const _: () = assert!(size_of::<Key>() == 32);

impl Key {
    /// The bytes.
    fn as_slice(&self) -> &[u8] {
        match self {
            Key::Inline(length, bytes) => &bytes[..usize::from(*length)],
            Key::Heap(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Key {
    fn from(bytes: &[u8]) -> Self {
        if bytes.len() > KEY_INLINE_MAX {
            return Key::Heap(bytes.into());
        }
        let mut inline = [0; KEY_INLINE_MAX];
        inline[..bytes.len()].copy_from_slice(bytes);
        Key::Inline(bytes.len() as u8, inline)
    }
}

impl std::borrow::Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        self.as_slice()
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_slice().cmp(other.as_slice())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// A store in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemKv {
    map: BTreeMap<Key, Vec<u8>>,
}

impl MemKv {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True without any key.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes of all keys and values.
    pub fn size_bytes(&self) -> usize {
        self.map.iter().map(|(key, value)| key.as_slice().len() + value.len()).sum()
    }
}

impl FromIterator<(Vec<u8>, Vec<u8>)> for MemKv {
    fn from_iter<I: IntoIterator<Item = (Vec<u8>, Vec<u8>)>>(pairs: I) -> Self {
        Self { map: pairs.into_iter().map(|(key, value)| (Key::from(key.as_slice()), value)).collect() }
    }
}

impl BaseKv for MemKv {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.map.get(key).cloned()
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs {
        if from >= to {
            return Vec::new();
        }
        let range = (Bound::Included(from), Bound::Excluded(to));
        let pairs = self.map.range::<[u8], _>(range).take(limit);
        pairs.map(|(key, value)| (key.as_slice().to_vec(), value.clone())).collect()
    }

    fn view<R>(&self, key: &[u8], read: impl FnOnce(Option<&[u8]>) -> R) -> R {
        read(self.map.get(key).map(Vec::as_slice))
    }
}

impl Kv for MemKv {
    fn put(&mut self, key: &[u8], value: Vec<u8>) {
        // Most puts overwrite: spare them the copy of the key.
        match self.map.get_mut(key) {
            Some(slot) => *slot = value,
            None => {
                self.map.insert(Key::from(key), value);
            }
        }
    }

    fn delete(&mut self, key: &[u8]) {
        self.map.remove(key);
    }
}

/// Changes not yet in the base; `None` is a deletion.
pub type Memtable = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// A memtable over a base. Reads consult the active memtable, then the frozen one, then the base.
#[derive(Debug)]
pub struct Overlay<B> {
    active: Memtable,
    active_bytes: usize,
    frozen: Option<Arc<Memtable>>,
    base: B,
}

/// Smallest page asked of the base by a scan.
const BASE_PAGE_MIN: usize = 16;
/// Largest page asked of the base by a scan.
const BASE_PAGE_MAX: usize = 4096;

impl<B: BaseKv> Overlay<B> {
    /// An empty memtable over `base`.
    pub fn new(base: B) -> Self {
        Self { active: Memtable::new(), active_bytes: 0, frozen: None, base }
    }

    /// The base.
    pub fn base(&self) -> &B {
        &self.base
    }

    /// The base, for the flush.
    pub fn base_mut(&mut self) -> &mut B {
        &mut self.base
    }

    /// Bytes written to the active memtable since the last freeze: when to freeze.
    pub fn active_bytes(&self) -> usize {
        self.active_bytes
    }

    /// True between [`Overlay::freeze`] and [`Overlay::flushed`].
    pub fn is_flushing(&self) -> bool {
        self.frozen.is_some()
    }

    /// Sets the active memtable aside and begins a new one. The caller writes what it gets to the base, atomically, and
    /// then calls [`Overlay::flushed`]. One at a time.
    pub fn freeze(&mut self) -> Arc<Memtable> {
        assert!(self.frozen.is_none(), "the memtable frozen before is still being flushed");
        let frozen = Arc::new(std::mem::take(&mut self.active));
        self.active_bytes = 0;
        self.frozen = Some(Arc::clone(&frozen));
        frozen
    }

    /// Drops both memtables: the base was replaced as a whole.
    pub fn discard(&mut self) {
        self.active.clear();
        self.active_bytes = 0;
        self.frozen = None;
    }

    /// The frozen memtable is in the base.
    pub fn flushed(&mut self) {
        assert!(self.frozen.take().is_some(), "nothing was frozen");
    }

    /// What the memtables say of a key: nothing, a deletion, or a value.
    fn cached(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        let found = self.active.get(key).or_else(|| self.frozen.as_ref().and_then(|frozen| frozen.get(key)));
        found.map(Option::as_deref)
    }

    fn record(&mut self, key: &[u8], value: Option<Vec<u8>>) {
        self.active_bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        match self.active.get_mut(key) {
            Some(slot) => *slot = value,
            None => {
                self.active.insert(key.to_vec(), value);
            }
        }
    }
}

/// Pages through the base.
struct Pager<'a, B> {
    base: &'a B,
    page: VecDeque<(Vec<u8>, Vec<u8>)>,
    from: Vec<u8>,
    to: &'a [u8],
    size: usize,
    done: bool,
}

impl<B: BaseKv> Pager<'_, B> {
    fn peek(&mut self) -> Option<&[u8]> {
        if self.page.is_empty() && !self.done {
            let page = self.base.scan(&self.from, self.to, self.size);
            self.done = page.len() < self.size;
            if let Some((last, _)) = page.last() {
                self.from.clone_from(last);
                self.from.push(0);
            }
            self.page = page.into();
        }
        self.page.front().map(|(key, _)| key.as_slice())
    }
}

impl<B: BaseKv> BaseKv for Overlay<B> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        match self.cached(key) {
            Some(value) => value.map(<[u8]>::to_vec),
            None => self.base.get(key),
        }
    }

    fn view<R>(&self, key: &[u8], read: impl FnOnce(Option<&[u8]>) -> R) -> R {
        match self.cached(key) {
            Some(value) => read(value),
            None => self.base.view(key, read),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Pairs {
        let mut result = Vec::new();
        if from >= to || limit == 0 {
            return result;
        }
        let range = (Bound::Included(from), Bound::Excluded(to));
        let mut active = self.active.range::<[u8], _>(range).peekable();
        let empty = Memtable::new();
        let mut frozen = self.frozen.as_deref().unwrap_or(&empty).range::<[u8], _>(range).peekable();
        let size = limit.clamp(BASE_PAGE_MIN, BASE_PAGE_MAX);
        let mut pager = Pager { base: &self.base, page: VecDeque::new(), from: from.to_vec(), to, size, done: false };
        while result.len() < limit {
            let keys = [
                active.peek().map(|(key, _)| key.as_slice()),
                frozen.peek().map(|(key, _)| key.as_slice()),
                pager.peek(),
            ];
            let Some(key) = keys.into_iter().flatten().min().map(<[u8]>::to_vec) else { break };
            let from_base = pager.page.pop_front_if(|(front, _)| *front == key).map(|(_, value)| Some(value));
            let from_frozen = frozen.next_if(|(front, _)| **front == key).map(|(_, value)| value.clone());
            let from_active = active.next_if(|(front, _)| **front == key).map(|(_, value)| value.clone());
            if let Some(Some(value)) = from_active.or(from_frozen).or(from_base) {
                result.push((key, value));
            }
        }
        result
    }
}

impl<B: BaseKv> Kv for Overlay<B> {
    fn put(&mut self, key: &[u8], value: Vec<u8>) {
        self.record(key, Some(value));
    }

    fn delete(&mut self, key: &[u8]) {
        self.record(key, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stdx::Rng;

    /// Random writes, freezes and flushes: an overlay reads as a plain map does.
    #[test]
    fn an_overlay_reads_as_a_plain_map_through_freezes_and_flushes() {
        for seed in 0..50 {
            let mut rng = Rng::new(seed);
            let mut model = MemKv::new();
            let mut overlay = Overlay::new(MemKv::new());
            let mut pending: Option<Arc<Memtable>> = None;
            for _ in 0..600 {
                let key = [b'k', rng.below(60) as u8];
                match rng.below(10) {
                    0..4 => {
                        let value = rng.next_u64().to_le_bytes().to_vec();
                        model.put(&key, value.clone());
                        overlay.put(&key, value);
                    }
                    4..6 => {
                        model.delete(&key);
                        overlay.delete(&key);
                    }
                    6 if pending.is_none() => pending = Some(overlay.freeze()),
                    7 => {
                        if let Some(frozen) = pending.take() {
                            for (key, value) in frozen.iter() {
                                match value {
                                    Some(value) => overlay.base_mut().put(key, value.clone()),
                                    None => overlay.base_mut().delete(key),
                                }
                            }
                            overlay.flushed();
                        }
                    }
                    8 => assert_eq!(model.get(&key), overlay.get(&key)),
                    _ => {
                        let (from, to) = ([b'k', rng.below(60) as u8], [b'k', rng.below(70) as u8]);
                        let limit = rng.below(40) as usize;
                        assert_eq!(model.scan(&from, &to, limit), overlay.scan(&from, &to, limit));
                    }
                }
            }
        }
    }
}
