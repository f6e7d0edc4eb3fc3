//! A sum over a sliding window, in slots of a sixtieth of it.
//!
//! An amount counts for the whole window and the rest of its slot, so for up to a sixtieth longer. That errs on the safe
//! side, and covers the moment that a request is under way before the workspace counts it.

use std::time::{Duration, Instant};

/// A window and the slot that has not ended.
const SLOTS: usize = 61;

/// The sum of what was added within a window.
#[derive(Debug, Clone)]
pub struct Window {
    begun: Instant,
    span: Duration,
    newest: u64,
    /// Of all slots that counted when the newest began.
    total: u64,
    slots: Box<[u64; SLOTS]>,
}

impl Window {
    /// An empty one.
    pub fn new(span: Duration, now: Instant) -> Self {
        Self { begun: now, span, newest: 0, total: 0, slots: Box::new([0; SLOTS]) }
    }

    /// What counts now.
    pub fn sum(&self, now: Instant) -> u64 {
        let passed = self.first(self.newest)..self.first(self.slot(now)).min(self.newest + 1);
        self.total - passed.map(|slot| self.slots[place(slot)]).sum::<u64>()
    }

    /// Adds an amount.
    pub fn add(&mut self, amount: u64, now: Instant) {
        let slot = self.slot(now);
        self.total = self.sum(now);
        for begun in (self.newest + 1..=slot).rev().take(SLOTS) {
            self.slots[place(begun)] = 0;
        }
        self.newest = slot;
        self.change(slot, 0, amount);
    }

    /// Puts right what was added at `at`; nothing if that is over.
    pub fn correct(&mut self, at: Instant, was: u64, is: u64) {
        let Some(age) = at.checked_duration_since(self.begun) else { return };
        let slot = self.slot_after(age);
        if slot >= self.first(self.newest) && slot <= self.newest {
            self.change(slot, was, is);
        }
    }

    fn change(&mut self, slot: u64, was: u64, is: u64) {
        let count = &mut self.slots[place(slot)];
        let others = self.total - *count;
        // The total must not overflow either.
        *count = count.saturating_sub(was).saturating_add(is).min(u64::MAX - others);
        self.total = others + *count;
    }

    /// When the sum is down to `most`, if nothing is added. Now, if it is already.
    pub fn down_to(&self, most: u64, now: Instant) -> Instant {
        let mut sum = self.sum(now);
        let mut slot = self.first(self.slot(now));
        if sum <= most {
            return now;
        }
        while sum > most && slot <= self.newest {
            sum -= self.slots[place(slot)];
            slot += 1;
        }
        // The last one counted, `slot - 1`, is over when the slot a whole window behind it has ended.
        self.begun + self.width() * u32::try_from(slot - 1 + SLOTS as u64).unwrap_or(u32::MAX)
    }

    fn width(&self) -> Duration {
        self.span / (SLOTS as u32 - 1)
    }

    /// Never before one that was counted already: `now` was read before the lock.
    fn slot(&self, now: Instant) -> u64 {
        self.slot_after(now.saturating_duration_since(self.begun)).max(self.newest)
    }

    fn slot_after(&self, age: Duration) -> u64 {
        // As 64 bits: 584 years, and a division that is one instruction.
        age.as_nanos() as u64 / self.width().as_nanos() as u64
    }

    /// The oldest slot that counts while `slot` runs.
    fn first(&self, slot: u64) -> u64 {
        (slot + 1).saturating_sub(SLOTS as u64)
    }
}

fn place(slot: u64) -> usize {
    (slot % SLOTS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn an_amount_counts_for_a_minute_and_a_second_at_most() {
        let start = crate::env::now();
        for offset in [0.0, 0.5, 0.999] {
            let mut window = Window::new(MINUTE, start);
            let at = start + seconds(offset);
            window.add(7, at);
            assert_eq!(window.sum(at), 7);
            assert_eq!(window.sum(at + MINUTE), 7);
            assert_eq!(window.sum(start + seconds(60.999)), 7);
            assert_eq!(window.sum(start + seconds(61.0)), 0);
            assert_eq!(window.down_to(6, at), start + seconds(61.0));
            assert_eq!(window.down_to(7, at), at);
        }
    }

    #[test]
    fn it_says_when_there_will_be_less() {
        let start = crate::env::now();
        let mut window = Window::new(MINUTE, start);
        for second in 0..10 {
            window.add(10, start + seconds(f64::from(second)));
        }
        let now = start + seconds(9.5);
        for (most, second) in [(99, 61), (90, 61), (89, 62), (45, 66), (0, 70)] {
            let at = window.down_to(most, now);
            assert_eq!(at, start + seconds(f64::from(second)), "{most}");
            assert!(window.sum(at) <= most && window.sum(at - seconds(0.001)) > most);
        }
    }

    #[test]
    fn a_correction_finds_its_slot_or_nothing() {
        let start = crate::env::now();
        let mut window = Window::new(MINUTE, start);
        window.add(10, start);
        window.add(5, start + seconds(30.0));
        window.correct(start, 10, 3);
        assert_eq!(window.sum(start + seconds(30.0)), 8);
        window.add(1, start + seconds(70.0));
        window.correct(start, 3, 100);
        assert_eq!(window.sum(start + seconds(70.0)), 6, "what is over stays over");
        window.add(1, start + seconds(1e6));
        assert_eq!(window.sum(start + seconds(1e6)), 1, "a long pause leaves nothing behind");
        let mut later = Window::new(MINUTE, start + seconds(10.0));
        later.add(4, start + seconds(10.0));
        later.correct(start, 4, 0);
        assert_eq!(later.sum(start + seconds(11.0)), 4, "it was added to another one");
    }

    #[test]
    fn a_clock_reading_that_comes_late_counts_now() {
        let start = crate::env::now();
        let mut window = Window::new(MINUTE, start);
        window.add(1, start + seconds(5.0));
        window.add(1, start + seconds(4.0));
        assert_eq!(window.sum(start + seconds(3.0)), 2);
    }
}
