//! How many of an endpoint's latest calls failed: a count over a sliding window of time. Pure; the time is an argument.
//!
//! The window is cut into slots, and the oldest slot is dropped as a whole: memory does not grow with traffic, and what
//! is counted is never older than the window and never younger than nine tenths of it.

use std::time::{Duration, Instant};

const SLOTS: usize = 10;

/// Calls and how many of them failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// All of them.
    pub all: u32,
    /// Those that failed.
    pub failed: u32,
}

/// The calls of the latest time.
#[derive(Debug, Clone, Default)]
pub struct Window {
    slots: [Calls; SLOTS],
    /// When slot 0 began, and how long all slots last together.
    begun: Option<(Instant, Duration)>,
    /// The slot that is filled now, counted from the beginning.
    newest: u64,
}

impl Window {
    /// Counts one call that ended now, and tells what the window holds with it. Another `length` than before begins a
    /// new window.
    pub fn note(&mut self, has_failed: bool, length: Duration, now: Instant) -> Calls {
        let begun = match self.begun {
            Some((begun, same)) if same == length => begun,
            _ => {
                *self = Self { begun: Some((now, length)), ..Self::default() };
                now
            }
        };
        let slot_nanos = (length.as_nanos() / SLOTS as u128).max(1);
        let number = (now.saturating_duration_since(begun).as_nanos() / slot_nanos) as u64;
        // At most all of them, however long nothing was called. A clock read a moment earlier fills the newest.
        for old in (self.newest + 1..=number).rev().take(SLOTS) {
            self.slots[old as usize % SLOTS] = Calls::default();
        }
        self.newest = self.newest.max(number);
        let slot = &mut self.slots[self.newest as usize % SLOTS];
        slot.all = slot.all.saturating_add(1);
        slot.failed = slot.failed.saturating_add(u32::from(has_failed));
        self.slots.iter().fold(Calls::default(), |sum, slot| Calls {
            all: sum.all.saturating_add(slot.all),
            failed: sum.failed.saturating_add(slot.failed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(60);

    #[test]
    fn calls_count_for_a_window_and_no_longer() {
        let (mut window, start) = (Window::default(), crate::env::now());
        for (second, has_failed, all, failed) in
            [(0, true, 1, 1), (5, false, 2, 1), (30, true, 3, 2), (59, true, 4, 3), (60, false, 3, 2)]
        {
            let calls = window.note(has_failed, LENGTH, start + Duration::from_secs(second));
            assert_eq!(calls, Calls { all, failed }, "at {second} s");
        }
        let later = start + 100 * LENGTH;
        assert_eq!(window.note(true, LENGTH, later), Calls { all: 1, failed: 1 });
        assert_eq!(window.note(true, LENGTH, start), Calls { all: 2, failed: 2 }, "a clock read earlier");
        assert_eq!(window.note(true, 2 * LENGTH, later), Calls { all: 1, failed: 1 }, "another window");
    }

    /// Against a list of all calls: nothing older than the window counts, everything within nine tenths does.
    #[test]
    fn random_calls_are_counted_as_a_list_would() {
        for seed in 0..50 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut window, mut now) = (Window::default(), crate::env::now());
            let mut list: Vec<(Instant, bool)> = Vec::new();
            for step in 0..300 {
                let longest = 1 << rng.u32(1..17);
                now += Duration::from_millis(rng.u64(0..longest));
                let has_failed = rng.bool();
                list.push((now, has_failed));
                let calls = window.note(has_failed, LENGTH, now);
                let within = |length: Duration| {
                    let young = list.iter().filter(|(at, _)| now - *at < length);
                    young.fold((0, 0), |(all, failed), (_, bad)| (all + 1, failed + u32::from(*bad)))
                };
                let ((least, least_failed), (most, most_failed)) = (within(LENGTH * 9 / 10), within(LENGTH));
                assert!((least..=most).contains(&calls.all), "seed {seed} step {step}: {calls:?}");
                assert!((least_failed..=most_failed).contains(&calls.failed), "seed {seed} step {step}");
            }
        }
    }
}
