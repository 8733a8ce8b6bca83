//! I3 fresh: linearizability of one block by zones.
//!
//! Every block written carries a unique value, so which write a read saw is known. Then no search is needed: group each
//! write with the reads that returned it, take the *zone* between the earliest end and the latest start of the group,
//! and the history is linearizable exactly when no read ends before its write begins, no two forward zones overlap and
//! no backward zone lies inside a forward one.
//! Source: Gibbons and Korach, "Testing Shared Memories", SIAM Journal on Computing 26(4), 1997, section 4.

/// A write or read of one block. Times are the simulator's true time; `end` is `u64::MAX` while unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOp {
    /// True for a write.
    pub write: bool,
    /// The value written, or the value the read returned. 0 is the initial value (zeros).
    pub value: u64,
    /// When it was submitted.
    pub start: u64,
    /// When it was answered.
    pub end: u64,
}

/// Why a history is not linearizable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A read returned a value no write wrote (I2).
    NeverWritten {
        /// The read.
        read: BlockOp,
    },
    /// A read ended before the write of its value began.
    FromTheFuture {
        /// The read.
        read: BlockOp,
    },
    /// Two values were each current in two overlapping spans, or a value was read after it had been overwritten.
    Stale {
        /// The value whose zone clashes.
        value: u64,
        /// The value it clashes with.
        with: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Zone {
    value: u64,
    low: u64,
    high: u64,
    forward: bool,
}

/// Checks the history of one block whose initial value is 0.
///
/// A write that failed or was never answered has `end == u64::MAX`: it may have happened at any time after its start.
///
/// # Errors
/// The first [`Violation`] found.
pub fn check(ops: &[BlockOp]) -> Result<(), Violation> {
    // One group per value: (minimum end, maximum start, start of the write, seen by a read or answered).
    let mut groups: std::collections::BTreeMap<u64, (u64, u64, u64, bool)> = std::collections::BTreeMap::new();
    groups.insert(0, (0, 0, 0, true));
    for op in ops.iter().filter(|op| op.write) {
        groups.insert(op.value, (op.end, op.start, op.start, op.end != u64::MAX));
    }
    for read in ops.iter().filter(|op| !op.write && op.end != u64::MAX) {
        let Some(group) = groups.get_mut(&read.value) else { return Err(Violation::NeverWritten { read: *read }) };
        if read.end < group.2 {
            return Err(Violation::FromTheFuture { read: *read });
        }
        group.0 = group.0.min(read.end);
        group.1 = group.1.max(read.start);
        group.3 = true;
    }
    let mut forward = Vec::new();
    let mut backward = Vec::new();
    for (&value, &(first_end, last_start, _, happened)) in &groups {
        if !happened {
            continue;
        }
        if first_end < last_start {
            forward.push(Zone { value, low: first_end, high: last_start, forward: true });
        } else {
            backward.push(Zone { value, low: last_start, high: first_end, forward: false });
        }
    }
    forward.sort_by_key(|zone| (zone.low, zone.high));
    for pair in forward.windows(2) {
        debug_assert!(pair[0].forward);
        if pair[1].low < pair[0].high {
            return Err(Violation::Stale { value: pair[0].value, with: pair[1].value });
        }
    }
    for zone in &backward {
        // Forward zones are disjoint, so only the last one that begins before this zone can contain it.
        let at = forward.partition_point(|f| f.low < zone.low);
        if at > 0 && zone.high < forward[at - 1].high {
            return Err(Violation::Stale { value: zone.value, with: forward[at - 1].value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stdx::Rng;

    fn w(value: u64, start: u64, end: u64) -> BlockOp {
        BlockOp { write: true, value, start, end }
    }
    fn r(value: u64, start: u64, end: u64) -> BlockOp {
        BlockOp { write: false, value, start, end }
    }

    /// The obvious search: tries every order that respects real time. The oracle for the fast checker.
    fn search(ops: &[BlockOp], done: u32, value: u64) -> bool {
        let left: Vec<usize> = (0..ops.len()).filter(|i| done & (1 << i) == 0).collect();
        if left.iter().all(|&i| ops[i].end == u64::MAX) {
            return true;
        }
        let horizon = left.iter().map(|&i| ops[i].end).min().unwrap();
        left.iter().any(|&i| {
            let op = ops[i];
            op.start <= horizon
                && (op.write || op.value == value)
                && search(ops, done | (1 << i), if op.write { op.value } else { value })
        })
    }

    #[test]
    fn a_stale_read_is_seen() {
        assert!(check(&[w(1, 1, 2), w(2, 3, 4), r(2, 5, 6), r(1, 7, 8)]).is_err());
        assert!(check(&[w(1, 1, 2), r(0, 3, 4)]).is_err());
        assert!(check(&[w(1, 5, 6), r(1, 1, 2)]).is_err());
        assert!(check(&[r(9, 1, 2)]).is_err());
    }

    #[test]
    fn an_unanswered_write_may_or_may_not_have_happened_but_stays_once_seen() {
        assert!(check(&[w(1, 1, u64::MAX), r(0, 2, 3), r(1, 4, 5)]).is_ok());
        assert!(check(&[w(1, 1, u64::MAX), r(1, 2, 3), r(0, 4, 5)]).is_err());
        assert!(check(&[w(1, 1, u64::MAX), r(0, 2, 3), r(0, 4, 5)]).is_ok());
    }

    #[test]
    fn agrees_with_an_exhaustive_search() {
        let mut rng = Rng::new(42);
        let mut wrong = 0;
        for _ in 0..4000 {
            // Distinct times: ties are a matter of convention, and the simulator's events never tie.
            let count = rng.range(2, 8) as usize;
            let mut times: Vec<u64> = (1..=2 * count as u64).collect();
            rng.shuffle(&mut times);
            let mut next_value = 0;
            let mut ops: Vec<BlockOp> = (0..count)
                .map(|i| {
                    let (a, b) = (times[2 * i], times[2 * i + 1]);
                    let write = rng.chance(1, 2);
                    next_value += u64::from(write);
                    let end = if write && rng.chance(1, 5) { u64::MAX } else { a.max(b) };
                    BlockOp { write, value: next_value, start: a.min(b), end }
                })
                .collect();
            for op in ops.iter_mut().filter(|op| !op.write) {
                op.value = rng.below(next_value + 1);
            }
            let expected = search(&ops, 0, 0);
            wrong += u32::from(!expected);
            assert_eq!(check(&ops).is_ok(), expected, "{ops:?}");
        }
        assert!(wrong > 400, "the generator must make wrong histories too, made {wrong}");
    }
}
