//! Two bitmaps over slots: [`LiveMap`] says what the index refers to and is persisted by checkpoints, [`BusyMap`] says
//! what must not be allocated now and lives only in memory.

use crate::layout::{Run, SLOT};
use std::sync::Arc;

const WORDS_PER_PAGE: usize = SLOT / 8;
/// Slots one page of the live map describes: 128 MiB of disk.
pub(crate) const SLOTS_PER_PAGE: u64 = SLOT as u64 * 8;

pub(crate) type MapPage = [u64; WORDS_PER_PAGE];

/// Slots that hold data blocks or index leaves as of the last applied group. Pages are shared with the snapshot a
/// running checkpoint writes: a change copies the page first.
pub(crate) struct LiveMap {
    pages: Vec<Arc<MapPage>>,
    dirty: Vec<bool>,
    dirty_list: Vec<u32>,
    ones: u64,
    slot_count: u64,
}

impl LiveMap {
    pub(crate) fn new(slot_count: u64) -> Self {
        let count = slot_count.div_ceil(SLOTS_PER_PAGE) as usize;
        // All pages share one until they are changed.
        let zeros = Arc::new([0; WORDS_PER_PAGE]);
        Self {
            pages: (0..count).map(|_| Arc::clone(&zeros)).collect(),
            dirty: vec![false; count],
            dirty_list: Vec::new(),
            ones: 0,
            slot_count,
        }
    }

    /// Slots set.
    pub(crate) fn ones(&self) -> u64 {
        self.ones
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    fn locate(slot: u64) -> (usize, usize, u64) {
        let bit = slot % SLOTS_PER_PAGE;
        ((slot / SLOTS_PER_PAGE) as usize, (bit / 64) as usize, 1 << (bit % 64))
    }

    pub(crate) fn get(&self, slot: u64) -> bool {
        let (page, word, mask) = Self::locate(slot);
        slot < self.slot_count && self.pages[page][word] & mask != 0
    }

    /// Sets the bit of `slot`; false when it was set before.
    #[must_use]
    pub(crate) fn set(&mut self, slot: u64) -> bool {
        self.change(slot, true)
    }

    /// Clears the bit of `slot`; false when it was clear before.
    #[must_use]
    pub(crate) fn clear(&mut self, slot: u64) -> bool {
        self.change(slot, false)
    }

    fn change(&mut self, slot: u64, value: bool) -> bool {
        if slot >= self.slot_count {
            return false;
        }
        let (page, word, mask) = Self::locate(slot);
        if (self.pages[page][word] & mask != 0) == value {
            return false;
        }
        Arc::make_mut(&mut self.pages[page])[word] ^= mask;
        self.ones = if value { self.ones + 1 } else { self.ones - 1 };
        if !self.dirty[page] {
            self.dirty[page] = true;
            self.dirty_list.push(page as u32);
        }
        true
    }

    /// Takes the pages changed since the last call, in order.
    pub(crate) fn take_dirty(&mut self) -> Vec<(u64, Arc<MapPage>)> {
        let mut list = std::mem::take(&mut self.dirty_list);
        list.sort_unstable();
        list.iter()
            .map(|page| {
                self.dirty[*page as usize] = false;
                (u64::from(*page), Arc::clone(&self.pages[*page as usize]))
            })
            .collect()
    }

    /// Installs a page read from disk; false when it sets a bit beyond the end.
    #[must_use]
    pub(crate) fn load(&mut self, number: u64, bytes: &[u8]) -> bool {
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let Ok(page) = MapPage::try_from(words) else { return false };
        let ones: u64 = page.iter().map(|word| u64::from(word.count_ones())).sum();
        self.ones += ones;
        let first = number * SLOTS_PER_PAGE;
        let inside = page.iter().enumerate().all(|(i, word)| {
            let base = first + i as u64 * 64;
            base + 64 <= self.slot_count || *word & !(((1u128 << self.slot_count.saturating_sub(base)) - 1) as u64) == 0
        });
        self.pages[number as usize] = Arc::new(page);
        inside
    }

    /// All set slots, as words with their first slot.
    pub(crate) fn words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pages.iter().enumerate().flat_map(|(p, page)| {
            page.iter().enumerate().map(move |(w, word)| (p as u64 * SLOTS_PER_PAGE + w as u64 * 64, *word))
        })
    }
}

/// Bytes of a map page as written to disk.
pub(crate) fn map_page_bytes(page: &MapPage, out: &mut [u8]) {
    for (word, out) in page.iter().zip(out.as_chunks_mut::<8>().0) {
        *out = word.to_le_bytes();
    }
}

/// A run this long is worth a device write of its own: a search for a longer one ends.
const LONG_RUN: u64 = 64;
const ZONE_WORDS: usize = 64;
const ZONE_SLOTS: u64 = ZONE_WORDS as u64 * 64;

/// What the allocator must not touch.
pub(crate) struct BusyMap {
    words: Vec<u64>,
    /// Free slots in each zone of 4096 slots, so that a search passes over full zones.
    zone_free: Vec<u32>,
    slot_count: u64,
    free: u64,
}

impl BusyMap {
    pub(crate) fn new(slot_count: u64) -> Self {
        let zones = slot_count.div_ceil(ZONE_SLOTS) as usize;
        let mut map = Self {
            words: vec![0; zones * ZONE_WORDS],
            zone_free: vec![ZONE_SLOTS as u32; zones],
            slot_count,
            free: zones as u64 * ZONE_SLOTS,
        };
        for slot in slot_count..zones as u64 * ZONE_SLOTS {
            map.set(slot);
        }
        map
    }

    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Marks `slot`; false when it was marked before or lies outside.
    pub(crate) fn set(&mut self, slot: u64) -> bool {
        let Some(word) = self.words.get_mut((slot / 64) as usize) else { return false };
        let mask = 1 << (slot % 64);
        if *word & mask != 0 {
            return false;
        }
        *word |= mask;
        self.zone_free[(slot / ZONE_SLOTS) as usize] -= 1;
        self.free -= 1;
        true
    }

    pub(crate) fn clear(&mut self, slot: u64) {
        assert!(slot < self.slot_count, "slot {slot} outside the disk");
        let word = &mut self.words[(slot / 64) as usize];
        let mask = 1 << (slot % 64);
        assert!(*word & mask != 0, "slot {slot} freed twice");
        *word &= !mask;
        self.zone_free[(slot / ZONE_SLOTS) as usize] += 1;
        self.free += 1;
    }

    pub(crate) fn get(&self, slot: u64) -> bool {
        slot >= self.slot_count || self.words[(slot / 64) as usize] & (1 << (slot % 64)) != 0
    }

    /// The first free run that starts in `from..limit`, cut at `len_max` slots.
    fn next_run(&self, from: u64, limit: u64, len_max: u64) -> Option<Run> {
        let mut at = from;
        let start = loop {
            if at >= limit.min(self.slot_count) {
                return None;
            }
            if at.is_multiple_of(ZONE_SLOTS) && self.zone_free[(at / ZONE_SLOTS) as usize] == 0 {
                at += ZONE_SLOTS;
                continue;
            }
            let free = !self.words[(at / 64) as usize] & (!0 << (at % 64));
            if free != 0 {
                let start = (at & !63) + u64::from(free.trailing_zeros());
                if start >= limit.min(self.slot_count) {
                    return None;
                }
                break start;
            }
            at = (at & !63) + 64;
        };
        let mut end = start;
        while end - start < len_max && end < self.slot_count {
            let busy = self.words[(end / 64) as usize] & (!0 << (end % 64));
            if busy != 0 {
                end = (end & !63) + u64::from(busy.trailing_zeros());
                break;
            }
            end = (end & !63) + 64;
        }
        Some(Run { start, end: end.min(start + len_max).min(self.slot_count) })
    }

    /// Finds a free run of at most `want` slots near `from`: the first long one that starts within `window` slots, else
    /// the longest there, else the next one anywhere. Wraps around; none only when nothing is free.
    pub(crate) fn find(&self, from: u64, window: u64, want: u64) -> Option<Run> {
        if self.free == 0 {
            return None;
        }
        let from = if from >= self.slot_count { 0 } else { from };
        let mut best: Option<Run> = None;
        let mut at = from;
        while let Some(run) = self.next_run(at, from + window, want) {
            if best.is_none_or(|b| run.len() > b.len()) {
                best = Some(run);
                if run.len() >= want.min(LONG_RUN) {
                    break;
                }
            }
            at = run.end;
        }
        best.or_else(|| self.next_run(from, self.slot_count, want)).or_else(|| self.next_run(0, self.slot_count, want))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stdx::Rng;

    #[test]
    fn find_agrees_with_a_plain_scan() {
        let mut rng = Rng::new(3);
        for round in 0..200 {
            let slots = 64 + rng.below(9000);
            let mut map = BusyMap::new(slots);
            let mut model = vec![false; slots as usize];
            let density = rng.below(101);
            for slot in 0..slots {
                if rng.chance(density, 100) {
                    assert!(map.set(slot));
                    model[slot as usize] = true;
                }
            }
            assert_eq!(map.free(), model.iter().filter(|b| !**b).count() as u64, "round {round}");
            match map.find(rng.below(slots), 512, 16) {
                None => assert!(model.iter().all(|b| *b)),
                Some(run) => {
                    assert!(!run.is_empty() && run.len() <= 16 && run.end <= slots);
                    assert!((run.start..run.end).all(|slot| !model[slot as usize] && !map.get(slot)));
                }
            }
        }
    }

    #[test]
    fn a_live_page_round_trips_and_a_bit_beyond_the_end_is_refused() {
        let mut map = LiveMap::new(5000);
        assert!(map.set(7) && map.set(4999) && !map.set(7) && !map.set(5000));
        let pages = map.take_dirty();
        assert_eq!(pages.len(), 1);
        let mut bytes = vec![0; SLOT];
        map_page_bytes(&pages[0].1, &mut bytes);
        let mut other = LiveMap::new(5000);
        assert!(other.load(0, &bytes) && other.get(7) && other.get(4999) && other.ones() == 2);
        bytes[SLOT - 1] = 1;
        assert!(!LiveMap::new(5000).load(0, &bytes));
    }
}
