//! Lines of a log that say the same again and again.

use std::collections::VecDeque;

/// Different lines remembered.
const LINES_MAX: usize = 32;
/// Times one line is written within [`SPAN_NS`].
const TIMES_MAX: u64 = 3;
/// Nanoseconds in a minute.
const SPAN_NS: u64 = 60_000_000_000;

/// Lets each line through three times a minute, and tells how often it was held back: what is tried every second until
/// somebody helps must not bury the rest of the log.
#[derive(Debug, Default)]
pub struct Repeats {
    lines: VecDeque<Line>,
}

#[derive(Debug)]
struct Line {
    text: String,
    /// Start of the minute in which `times` counts.
    since: u64,
    times: u64,
}

impl Repeats {
    /// What to write for `text` at `now` (nanoseconds of any clock), if anything.
    pub fn pass(&mut self, now: u64, text: &str) -> Option<String> {
        let Some(line) = self.lines.iter_mut().find(|line| line.text == text) else {
            if self.lines.len() == LINES_MAX {
                self.lines.pop_front();
            }
            self.lines.push_back(Line { text: text.to_owned(), since: now, times: 1 });
            return Some(text.to_owned());
        };
        if now.saturating_sub(line.since) < SPAN_NS {
            line.times += 1;
            return (line.times <= TIMES_MAX).then(|| text.to_owned());
        }
        let held_back = line.times.saturating_sub(TIMES_MAX);
        (line.since, line.times) = (now, 1);
        Some(if held_back == 0 { text.to_owned() } else { format!("{text} (said {held_back} times more since)") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_said_three_times_a_minute() {
        let mut repeats = Repeats::default();
        let second = |n: u64| 1_000_000_000_000 + n * 1_000_000_000;
        let said: Vec<String> = (0..=120).filter_map(|n| repeats.pass(second(n), "full")).collect();
        let again = "full (said 57 times more since)";
        assert_eq!(said, ["full", "full", "full", again, "full", "full", again]);
        assert_eq!(repeats.pass(second(121), "other").as_deref(), Some("other"));
        assert_eq!(repeats.pass(second(500), "other").as_deref(), Some("other"));
        for n in 0..1000 {
            assert!(repeats.pass(second(500), &format!("line {n}")).is_some());
        }
        assert_eq!(repeats.lines.len(), LINES_MAX);
    }
}
