//! Keeps idle cores from sleeping deeply while requests are being served.
//!
//! A request with one in flight wakes four or five threads one after the other, and each of them finds its core asleep:
//! halted in a guest, which costs a way through the hypervisor and back (tens of microseconds, for who wakes and who is
//! woken), or in a deep state of the processor (a hundred and more). Linux has an agreement for that, PM QoS: as long
//! as a process holds `/dev/cpu_dma_latency` open, no core enters an idle state which takes more microseconds to leave
//! than were written there (Documentation/power/pm_qos_interface.rst). It is held only while turns follow one another,
//! so an idle cluster lets the machine sleep, and it needs root, as the device's mode says. Without it all works as
//! before.

use cairn_types::{Duration, Instant};
use std::fs::File;
use std::io::Write;

/// Turns are counted over this time.
const WINDOW: Duration = Duration::from_millis(50);
/// So many turns within a window are work: some hundred requests a second. Filling a young store file makes half as
/// many, heartbeats and renewals of an idle cluster a twentieth.
const TURNS_BUSY: u32 = 64;
/// Let go after so long without work; also how often a holder looks.
pub(crate) const REST: Duration = Duration::from_millis(150);
/// Switches it off when it is `0`.
const VARIABLE: &str = "CAIRN_KEEP_AWAKE";
const DEVICE: &str = "/dev/cpu_dma_latency";
const DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";

/// What is allowed to the cores, in microseconds until they are back; `None` where asking has no effect.
fn latency_us() -> Option<i32> {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "0") {
        return None;
    }
    match std::fs::read_to_string(DRIVER).ok()?.trim() {
        "none" => None,
        // A guest: it can only poll or halt, and says that halting takes one microsecond.
        "haltpoll" => Some(0),
        // The first sleeping state (C1): saves power, lets a sibling thread run, is left within a microsecond or two.
        _ => Some(2),
    }
}

/// Whether the cores are kept awake by this reactor.
#[derive(Debug, Default)]
pub(crate) struct Awake {
    held: Option<File>,
    /// Refused once, or of no effect: not asked again.
    hopeless: bool,
    window_began: Instant,
    turns: u32,
    worked_at: Instant,
}

impl Awake {
    /// Counts a turn. True when the cores are kept awake from now on: the caller then asks [`Awake::lets_go`] every
    /// [`REST`].
    pub(crate) fn turn(&mut self, now: Instant) -> bool {
        if self.hopeless {
            return false;
        }
        if now.saturating_since(self.window_began) > WINDOW {
            self.window_began = now;
            self.turns = 0;
        }
        self.turns += 1;
        if self.turns < TURNS_BUSY {
            return false;
        }
        self.worked_at = now;
        if self.held.is_some() {
            return false;
        }
        self.held = latency_us().and_then(|latency| {
            let mut device = File::options().write(true).open(DEVICE).ok()?;
            device.write_all(&latency.to_ne_bytes()).ok()?;
            Some(device)
        });
        self.hopeless = self.held.is_none();
        self.held.is_some()
    }

    /// Lets the cores sleep when there was no work for [`REST`]; true when it did.
    pub(crate) fn lets_go(&mut self, now: Instant) -> bool {
        if now.saturating_since(self.worked_at) < REST {
            return false;
        }
        self.held = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_turns_are_no_work_and_work_ends() {
        let mut awake = Awake::default();
        let at = |ms: u64| Instant(ms * 1_000_000 + 1_000_000_000);
        for second in 0..20 {
            for turn in 0..10 {
                assert!(!awake.turn(at(second * 100 + turn)), "heartbeats keep nobody awake");
            }
        }
        // Whether the device may be opened is the machine's affair; that a rest follows is not.
        for turn in 0..100 {
            awake.turn(at(10_000 + turn / 10));
        }
        if !awake.hopeless {
            assert!(!awake.lets_go(at(10_050)));
        }
        assert!(awake.lets_go(at(10_500)));
        assert!(awake.held.is_none());
    }
}
