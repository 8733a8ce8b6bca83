//! Turning never-written extents of a store file into written ones, ahead of the store.
//!
//! A file that was only allocated makes each first write also a journalled change of its extent map; a flush then takes
//! about twice as long (`docs/design/runtime.md`). Writing the whole file with zeros before first use would take
//! seconds per store, so the ring writes zeros ahead of the store, one piece at a time. While the store has nothing to
//! do it fills a long way ahead. While the store is busy, filling is what its requests would wait for (milliseconds per
//! megabyte), so only what the store is about to reach is filled, in small pieces.
//!
//! Invariant: a range the store has written, or is about to, is never filled. A range leaves the set of unwritten
//! ranges when the store asks to write it, and a store write that meets the piece being filled waits for that piece.

use std::collections::BTreeMap;

/// Largest piece filled in one write, while the store is quiet.
pub const FILL_PIECE_MAX: u64 = 1 << 20;
/// And while it is busy.
const BUSY_PIECE_MAX: u64 = 128 << 10;
/// A busy store has this much filled ahead of each place it writes at.
const NEAR: u64 = 16 << 20;
/// Places a store writes at: its log, and its checkpoints.
const PLACES: usize = 2;

/// Disjoint ranges, start to end.
#[derive(Clone, Debug, Default)]
pub struct RangeSet {
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds `start..end`.
    pub fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        if start < end {
            self.ranges.insert(start, end);
        }
    }

    /// Takes `start..end` out.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end || self.ranges.is_empty() {
            return;
        }
        if let Some((&before, &before_end)) = self.ranges.range(..start).next_back()
            && before_end > start
        {
            self.ranges.insert(before, start);
            if before_end > end {
                self.ranges.insert(end, before_end);
            }
        }
        while let Some((&inner, &inner_end)) = self.ranges.range(start..end).next() {
            self.ranges.remove(&inner);
            if inner_end > end {
                self.ranges.insert(end, inner_end);
            }
        }
    }

    /// Removes and returns a piece of at most `len_max` bytes that starts at or after `from` and before `limit`.
    pub fn take_first(&mut self, from: u64, limit: u64, len_max: u64) -> Option<(u64, u64)> {
        let around = self.ranges.range(..=from).next_back().filter(|(_, end)| **end > from);
        let found = around.or_else(|| self.ranges.range(from..limit).next());
        let (&start, &end) = found.filter(|_| from < limit)?;
        let start = start.max(from);
        let piece_end = end.min(start + len_max);
        self.remove(start, piece_end);
        Some((start, piece_end))
    }

    /// True when nothing is left.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

/// What is known about the unwritten part of one file.
#[derive(Debug, Default)]
pub struct Filler {
    unwritten: RangeSet,
    ahead: u64,
    furthest: u64,
    /// Ends of the last writes, one for each place; the last one used comes first.
    places: [u64; PLACES],
    busy: Option<(u64, u64)>,
}

impl Filler {
    /// Fills `unwritten` up to `ahead` bytes beyond the furthest write.
    pub fn new(unwritten: RangeSet, ahead: u64) -> Self {
        Self { unwritten, ahead, furthest: 0, places: [0; PLACES], busy: None }
    }

    /// True when something is left to fill, now or later.
    pub fn has_work(&self) -> bool {
        self.ahead > 0 && !self.unwritten.is_empty()
    }

    /// The store is about to write or discard a range. False: it meets the piece under way and must wait for it.
    pub fn store_writes(&mut self, start: u64, end: u64) -> bool {
        self.furthest = self.furthest.max(end);
        if self.busy.is_none() && self.unwritten.is_empty() {
            return true;
        }
        self.unwritten.remove(start, end);
        let near = |place: &u64| start.saturating_add(NEAR) >= *place && start <= place.saturating_add(NEAR);
        let place = self.places.iter().position(near).unwrap_or(PLACES - 1);
        self.places[..=place].rotate_right(1);
        self.places[0] = end;
        self.busy.is_none_or(|(busy_start, busy_end)| end <= busy_start || busy_end <= start)
    }

    /// The next piece to fill, unless one is under way or enough is filled. A `quiet` store has nothing to do.
    pub fn start_piece(&mut self, quiet: bool) -> Option<(u64, u64)> {
        if self.busy.is_some() || !self.has_work() {
            return None;
        }
        self.busy = if quiet {
            self.unwritten.take_first(0, self.furthest.saturating_add(self.ahead), FILL_PIECE_MAX)
        } else {
            let near = |place: &u64| self.unwritten.take_first(*place, *place + NEAR.min(self.ahead), BUSY_PIECE_MAX);
            self.places.iter().find_map(near)
        };
        self.busy
    }

    /// The piece under way has ended. After a failure no more is filled: it only costs speed.
    pub fn piece_done(&mut self, good: bool) {
        self.busy = None;
        if !good {
            self.unwritten = RangeSet::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_set_is_a_set_of_points(ops in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..64), 0..40)) {
            let mut set = RangeSet::default();
            let mut model = [false; 64];
            for (add, a, b) in ops {
                let (start, end) = (a.min(b), a.max(b));
                if add { set.insert(start, end) } else { set.remove(start, end) }
                model[start as usize..end as usize].fill(add);
                let mut points = [false; 64];
                for (&start, &end) in &set.ranges {
                    prop_assert!(start < end);
                    prop_assert!(points[start as usize..end as usize].iter().all(|p| !p));
                    points[start as usize..end as usize].fill(true);
                }
                prop_assert_eq!(points, model);
            }
        }
    }

    #[test]
    fn what_the_store_wrote_is_never_filled() {
        let mut unwritten = RangeSet::default();
        unwritten.insert(0, 8 << 20);
        let mut filler = Filler::new(unwritten, 2 << 20);
        assert_eq!(filler.start_piece(true), Some((0, 1 << 20)));
        assert!(!filler.store_writes(4096, 8192), "a write into the piece under way waits");
        assert!(filler.store_writes(1 << 20, (1 << 20) + 4096));
        filler.piece_done(true);
        assert_eq!(filler.start_piece(true), Some(((1 << 20) + 4096, (2 << 20) + 4096)));
        filler.piece_done(true);
        assert_eq!(filler.start_piece(true), Some(((2 << 20) + 4096, (3 << 20) + 4096)));
        filler.piece_done(true);
        assert_eq!(filler.start_piece(true), None, "far enough ahead");
        assert!(filler.has_work());
    }

    #[test]
    fn a_busy_store_has_only_what_lies_right_before_it_filled() {
        let mut unwritten = RangeSet::default();
        unwritten.insert(0, 1 << 30);
        let mut filler = Filler::new(unwritten, 512 << 20);
        assert!(filler.store_writes(4096, 8192) && filler.store_writes(512 << 20, (512 << 20) + 4096));
        let mut filled = 0;
        while let Some((start, end)) = filler.start_piece(false) {
            assert!(end - start <= BUSY_PIECE_MAX && !(8192 + NEAR..512 << 20).contains(&start));
            filled += end - start;
            filler.piece_done(true);
        }
        assert!((2 * NEAR..=2 * (NEAR + BUSY_PIECE_MAX)).contains(&filled), "{filled} bytes are filled");
    }
}
