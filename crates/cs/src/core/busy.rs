//! How busy this server is: the share of time with requests of clients under way, smoothed.

use cairn_types::{Duration, Instant};

/// One reading is taken over this time.
const READING: Duration = Duration::from_secs(1);
/// Readings that make up most of the figure.
const SMOOTH: u32 = 8;
/// A figure that has moved by less is not worth a command in the log of the metadata servers, in thousandths.
const NEWS: u32 = 20;

/// The figure, and what it is made of.
#[derive(Debug, Default)]
pub(super) struct Busy {
    /// Up to when time was counted, and since when it counts for the present reading.
    until: Option<Instant>,
    since: Instant,
    worked: Duration,
    /// Thousandths, smoothed, with the fraction that whole numbers would lose.
    figure: Option<u32>,
    told: Option<u32>,
}

impl Busy {
    /// Time has passed, with something to do or without.
    pub(super) fn pass(&mut self, now: Instant, busy: bool) {
        let Some(until) = self.until.replace(now) else {
            self.since = now;
            return;
        };
        if busy {
            self.worked += now.saturating_since(until);
        }
        let passed = now.saturating_since(self.since);
        if passed >= READING {
            let reading =
                (u128::from(self.worked.as_nanos() as u64) * 1000 / u128::from(passed.as_nanos() as u64)) as u32;
            let scaled = reading.min(1000) * SMOOTH;
            self.figure = Some(self.figure.map_or(scaled, |old| old - old / SMOOTH + scaled / SMOOTH));
            (self.since, self.worked) = (now, Duration::ZERO);
        }
    }

    /// True when the figure was not told yet, or has moved since.
    pub(super) fn is_news(&self) -> bool {
        let now = self.figure.map(|figure| figure / SMOOTH);
        now.is_some_and(|now| self.told.is_none_or(|told| now.abs_diff(told) >= NEWS))
    }

    /// The figure in thousandths, which is told now.
    pub(super) fn tell(&mut self) -> u16 {
        let figure = self.figure.unwrap_or_default() / SMOOTH;
        self.told = Some(figure);
        figure as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_load_and_small_moves_are_no_news() {
        let (mut busy, mut now) = (Busy::default(), 0);
        let mut run = |busy: &mut Busy, seconds: u64, share: u64| {
            for _ in 0..seconds {
                busy.pass(Instant(now + 1_000_000 * share), true);
                now += 1_000_000_000;
                busy.pass(Instant(now), false);
            }
        };
        busy.pass(Instant(0), false);
        assert!(!busy.is_news());
        run(&mut busy, 2, 300);
        assert!(busy.is_news());
        let first = busy.tell();
        assert!((295..=300).contains(&first), "{first}");
        run(&mut busy, 30, 310);
        assert!(!busy.is_news());
        run(&mut busy, 60, 1000);
        assert!(busy.is_news());
        let last = busy.tell();
        assert!((980..=1000).contains(&last), "{last}");
        run(&mut busy, 90, 0);
        assert!(busy.tell() < 10);
    }
}
