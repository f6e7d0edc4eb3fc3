//! What every behaviour test stands on: a scripted workspace, the built program, a raw client.
//!
//! Nothing here decides what is right; the tests do. This is also the only place that reads the clock or
//! pauses: everything waits for an event with a deadline, and where there is no event (a number in `/stats`)
//! one bounded loop asks again.

#![allow(clippy::disallowed_methods)]

pub mod client;
pub mod cutter;
pub mod fixtures;
pub mod gate;
pub mod hostile;
pub mod proxy;
pub mod reply;
pub mod rest;
pub mod sse;
pub mod tls;
pub mod upstream;

use std::time::{Duration, Instant};

/// How long any wait may take before the test fails. Far above what is needed, so that a loaded machine passes.
pub const DEADLINE: Duration = Duration::from_secs(15);

/// Asks again until the question has an answer, or fails with `what`. Only where no event can be waited for.
pub fn eventually<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < end, "still waiting after {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A stopwatch for the few promises that are times: a deadline that must have passed, or a pause that must not.
pub struct Stopwatch(Instant);

impl Stopwatch {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Runs the closures side by side and returns their results in order.
pub fn together<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|index| scope.spawn(move || work(index))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a parallel part of the test failed")).collect()
    })
}
