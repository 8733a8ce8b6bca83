//! The unsettled tail: which blocks were written since the volume was last settled, and by which write last.

use cairn_types::{Epoch, Sequence};
use std::collections::BTreeMap;

/// Epoch and sequence: the order of writes of one volume.
pub(crate) type Mark = (Epoch, Sequence);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    end: u32,
    mark: Mark,
}

/// Spans of one chunk that do not overlap; each carries the highest mark that wrote it.
#[derive(Default)]
pub(crate) struct TailMap(BTreeMap<u32, Span>);

impl TailMap {
    /// The highest unsettled write of `block`.
    pub(crate) fn latest(&self, block: u32) -> Option<Mark> {
        let (_, span) = self.0.range(..=block).next_back()?;
        (block < span.end).then_some(span.mark)
    }

    /// Spans in order: first block, end, mark.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (u32, u32, Mark)> + '_ {
        self.0.iter().map(|(start, span)| (*start, span.end, span.mark))
    }

    fn split_at(&mut self, block: u32) {
        if let Some((_, span)) = self.0.range_mut(..block).next_back()
            && span.end > block
        {
            let upper = *span;
            span.end = block;
            self.0.insert(block, upper);
        }
    }

    /// Blocks `first..end` were written by `mark`; a block keeps the higher mark.
    pub(crate) fn cover(&mut self, first: u32, end: u32, mark: Mark) {
        // Nearly always the blocks are not in the tail yet, or were written alike.
        match self.0.range_mut(..end).next_back() {
            Some((start, span)) if *start == first && span.end == end => {
                span.mark = span.mark.max(mark);
                return;
            }
            Some((_, span)) if span.end > first => {}
            _ => {
                self.0.insert(first, Span { end, mark });
                return;
            }
        }
        self.split_at(first);
        self.split_at(end);
        let mut higher = Vec::new();
        while let Some((&start, span)) = self.0.range(first..end).next() {
            if span.mark > mark {
                higher.push((start, *span));
            }
            self.0.remove(&start);
        }
        let mut at = first;
        for (start, span) in higher {
            if start > at {
                self.0.insert(at, Span { end: start, mark });
            }
            at = span.end;
            self.0.insert(start, span);
        }
        if at < end {
            self.0.insert(at, Span { end, mark });
        }
    }

    /// The write of `first..end` settled: blocks not written since with a mark above `mark` leave the tail.
    pub(crate) fn uncover(&mut self, first: u32, end: u32, mark: Mark) {
        self.split_at(first);
        self.split_at(end);
        let gone: Vec<u32> =
            self.0.range(first..end).filter(|(_, span)| span.mark <= mark).map(|(start, _)| *start).collect();
        for start in gone {
            self.0.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_stdx::Rng;

    #[test]
    fn spans_agree_with_a_map_of_blocks() {
        let mut rng = Rng::new(11);
        let (mut tail, mut model) = (TailMap::default(), BTreeMap::new());
        for _ in 0..20_000 {
            let first = rng.below(60) as u32;
            let end = first + 1 + rng.below(9) as u32;
            let mark = (Epoch(rng.below(3)), Sequence(rng.below(20)));
            if rng.chance(2, 3) {
                tail.cover(first, end, mark);
                (first..end).for_each(|b| {
                    let entry = model.entry(b).or_insert(mark);
                    *entry = (*entry).max(mark);
                });
            } else {
                tail.uncover(first, end, mark);
                (first..end).for_each(|b| {
                    if model.get(&b).is_some_and(|m| *m <= mark) {
                        model.remove(&b);
                    }
                });
            }
            let block = rng.below(70) as u32;
            assert_eq!(tail.latest(block), model.get(&block).copied());
        }
    }
}
