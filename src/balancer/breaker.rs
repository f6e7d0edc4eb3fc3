//! The circuit breaker of one endpoint: closed, open, half-open. Pure; the time is an argument.
//!
//! It opens after `threshold` *consecutive* failures, and, where the operator wants it, when too large a share of the
//! latest calls failed, which catches an endpoint that fails and works in turn. Once `timeout` has passed it is half-open and lets trials
//! through: the first result decides. A failed trial opens it again for twice as long, up to eight times. After a
//! recovery the endpoint is given its full share only gradually.
//!
//! Every admission gets a [`Ticket`] that carries the breaker's generation. A result from an older generation, such
//! as a request that began before the breaker opened, changes nothing.

use std::time::{Duration, Instant};

use super::window::{Calls, Window};
use crate::outcome::Verdict;

/// The longest open time, as a multiple of the configured one.
const LONGEST_OPEN: u32 = 8;
/// How long after a recovery traffic takes to grow back to the full share.
const RAMP: Duration = Duration::from_secs(10);
/// The share right after a recovery, in thousandths.
const RAMP_START: u64 = 100;

/// What the operator chose.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Consecutive failures that open the breaker.
    pub threshold: u32,
    /// How long it stays open the first time.
    pub timeout: Duration,
    /// When a share of failures opens it, too.
    pub rate: Option<RateRule>,
}

/// Opens the breaker when too large a share of the latest calls failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateRule {
    /// The share of failures that opens it, in percent: 1 to 100.
    pub failure_rate_threshold: u32,
    /// With fewer calls in the window a share means nothing.
    pub minimum_calls: u32,
    /// How far back calls count.
    pub window: Duration,
}

impl RateRule {
    fn is_broken_by(&self, calls: Calls) -> bool {
        calls.all >= self.minimum_calls
            && u64::from(calls.failed) * 100 >= u64::from(self.failure_rate_threshold) * u64::from(calls.all)
    }
}

/// What the breaker lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Everything.
    Closed,
    /// Nothing until then.
    Open {
        /// When trials begin.
        until: Instant,
    },
    /// Trials.
    HalfOpen,
}

/// One admission; goes back with its result.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    generation: u64,
    is_trial: bool,
}

/// A change worth a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Opened after so many consecutive failures.
    Opened {
        /// How many.
        failures: u32,
        /// For how long.
        span: Duration,
    },
    /// Opened because too large a share of the latest calls failed.
    OpenedByRate {
        /// How many failed.
        failed: u32,
        /// Of how many.
        calls: u32,
        /// Within which time.
        window: Duration,
        /// For how long.
        span: Duration,
    },
    /// The trial failed.
    Reopened {
        /// For how long.
        span: Duration,
    },
    /// The trial succeeded.
    Closed,
}

/// What opened the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Failures in a row.
    ConsecutiveFailures,
    /// The share of failures among the latest calls.
    FailureRate,
    /// A trial that failed.
    FailedTrial,
}

impl Cause {
    /// The word shown in /stats.
    pub fn word(self) -> &'static str {
        match self {
            Cause::ConsecutiveFailures => "consecutive_failures",
            Cause::FailureRate => "failure_rate",
            Cause::FailedTrial => "failed_trial",
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Opening {
    until: Instant,
    span: Duration,
    trials: usize,
    cause: Cause,
}

/// The breaker of one endpoint.
#[derive(Debug, Clone, Default)]
pub struct Breaker {
    failures: u32,
    opening: Option<Opening>,
    recovered_at: Option<Instant>,
    generation: u64,
    /// Filled only under a rate rule.
    window: Window,
}

impl Breaker {
    /// What it would let through now. Changes nothing.
    pub fn state(&self, now: Instant) -> State {
        match self.opening {
            None => State::Closed,
            Some(opening) if now < opening.until => State::Open { until: opening.until },
            Some(_) => State::HalfOpen,
        }
    }

    /// True when it is half-open and no trial is running.
    pub fn trial_is_free(&self, now: Instant) -> bool {
        self.state(now) == State::HalfOpen && self.opening.is_some_and(|opening| opening.trials == 0)
    }

    /// What opened it; `None` while it is closed.
    pub fn cause(&self) -> Option<Cause> {
        self.opening.map(|opening| opening.cause)
    }

    /// Consecutive failures so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The share of its weight the endpoint gets now, in thousandths: less than 1000 shortly after a recovery.
    pub fn share(&self, now: Instant) -> u64 {
        let Some(since) = self.recovered_at.map(|at| now.saturating_duration_since(at)) else { return 1000 };
        if since >= RAMP {
            return 1000;
        }
        RAMP_START + (1000 - RAMP_START) * since.as_millis() as u64 / RAMP.as_millis() as u64
    }

    /// Notes that a request was let through.
    pub fn admit(&mut self) -> Ticket {
        if let Some(opening) = &mut self.opening {
            opening.trials += 1;
        }
        Ticket { generation: self.generation, is_trial: self.opening.is_some() }
    }

    /// Takes a ticket back with what its request showed.
    pub fn settle(
        &mut self,
        ticket: Ticket,
        verdict: Verdict,
        now: Instant,
        settings: Settings,
    ) -> Option<Change> {
        if ticket.generation != self.generation {
            return None;
        }
        self.release(ticket);
        match (verdict, self.opening) {
            (Verdict::Neutral, _) => None,
            (Verdict::Success, None) => {
                self.failures = 0;
                if let Some(rule) = settings.rate {
                    self.window.note(false, rule.window, now);
                }
                None
            }
            (Verdict::Success, Some(_)) => {
                *self = Self { recovered_at: Some(now), generation: self.generation + 1, ..Self::default() };
                Some(Change::Closed)
            }
            (Verdict::Failure, None) => {
                self.failures = self.failures.saturating_add(1);
                let (failures, span) = (self.failures, settings.timeout);
                let broken = settings.rate.and_then(|rule| {
                    let calls = self.window.note(true, rule.window, now);
                    let (failed, calls_all, window) = (calls.failed, calls.all, rule.window);
                    let opened = Change::OpenedByRate { failed, calls: calls_all, window, span };
                    rule.is_broken_by(calls).then_some(opened)
                });
                let broken = match failures >= settings.threshold {
                    true => Some(Change::Opened { failures, span }),
                    false => broken,
                };
                match broken {
                    Some(Change::Opened { .. }) => self.open(now, span, Cause::ConsecutiveFailures),
                    Some(_) => self.open(now, span, Cause::FailureRate),
                    None => {}
                }
                broken
            }
            (Verdict::Failure, Some(opening)) => {
                let span = (opening.span * 2).min(settings.timeout * LONGEST_OPEN);
                self.failures = self.failures.saturating_add(1);
                self.open(now, span, Cause::FailedTrial);
                Some(Change::Reopened { span })
            }
        }
    }

    /// Takes a ticket back whose request showed nothing, as one that panicked: another trial may begin.
    pub fn release(&mut self, ticket: Ticket) {
        if let Some(opening) = &mut self.opening
            && ticket.is_trial
            && ticket.generation == self.generation
        {
            opening.trials = opening.trials.saturating_sub(1);
        }
    }

    /// Closes it and forgets everything; tickets that are out no longer count.
    pub fn reset(&mut self) {
        *self = Self { generation: self.generation + 1, ..Self::default() };
    }

    fn open(&mut self, now: Instant, span: Duration, cause: Cause) {
        self.opening = Some(Opening { until: now + span, span, trials: 0, cause });
        self.recovered_at = None;
        self.window = Window::default();
        self.generation += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Failure, Neutral, Success};

    const SETTINGS: Settings = Settings { threshold: 3, timeout: Duration::from_secs(60), rate: None };

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    fn fail(breaker: &mut Breaker, now: Instant, times: usize) -> Option<Change> {
        (0..times).map(|_| run(breaker, Failure, now)).last().flatten()
    }

    fn run(breaker: &mut Breaker, verdict: Verdict, now: Instant) -> Option<Change> {
        let ticket = breaker.admit();
        breaker.settle(ticket, verdict, now, SETTINGS)
    }

    /// The fork counted errors *ever*, and opened at five errors spread over 45 mostly good requests.
    #[test]
    fn only_consecutive_failures_open() {
        let (mut breaker, now) = (Breaker::default(), crate::env::now());
        for _ in 0..50 {
            assert_eq!(fail(&mut breaker, now, 2), None);
            run(&mut breaker, Success, now);
        }
        assert_eq!(breaker.state(now), State::Closed);
        assert_eq!(
            fail(&mut breaker, now, 3),
            Some(Change::Opened { failures: 3, span: Duration::from_secs(60) })
        );
        assert_eq!(breaker.state(now), State::Open { until: at(now, 60) });
    }

    #[test]
    fn the_first_trial_decides_and_a_failed_one_doubles_the_wait() {
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        fail(&mut breaker, start, 3);
        let mut now = at(start, 60);
        for span in [120, 240, 480, 480] {
            assert!(breaker.trial_is_free(now));
            let ticket = breaker.admit();
            assert!(!breaker.trial_is_free(now));
            let change = breaker.settle(ticket, Failure, now, SETTINGS);
            assert_eq!(change, Some(Change::Reopened { span: Duration::from_secs(span) }));
            assert_eq!(breaker.state(now), State::Open { until: at(now, span) });
            now = at(now, span);
        }
        assert_eq!(run(&mut breaker, Success, now), Some(Change::Closed));
        assert_eq!((breaker.state(now), breaker.failures()), (State::Closed, 0));
    }

    const RATE: RateRule =
        RateRule { failure_rate_threshold: 50, minimum_calls: 10, window: Duration::from_secs(30) };

    /// Failing and working in turn never made three failures in a row, so half of all requests failed for ever.
    #[test]
    fn a_flapping_endpoint_is_caught_by_the_rate_rule_only() {
        for rate in [None, Some(RATE)] {
            let settings = Settings { rate, ..SETTINGS };
            let (mut breaker, start) = (Breaker::default(), crate::env::now());
            let changes: Vec<(u64, Change)> = (0..40)
                .filter_map(|second| {
                    let verdict = if second % 2 == 0 { Success } else { Failure };
                    let ticket = breaker.admit();
                    Some((second, breaker.settle(ticket, verdict, at(start, second), settings)?))
                })
                .take(1)
                .collect();
            let (window, span) = (RATE.window, SETTINGS.timeout);
            let opened = (9, Change::OpenedByRate { failed: 5, calls: 10, window, span });
            assert_eq!(changes, Vec::from_iter(rate.map(|_| opened)), "{rate:?}");
            assert_eq!(breaker.cause(), rate.map(|_| Cause::FailureRate));
        }
    }

    #[test]
    fn the_rate_rule_needs_calls_and_a_share_within_its_window() {
        let settings = Settings { threshold: 100, rate: Some(RATE), ..SETTINGS };
        let settle = |breaker: &mut Breaker, verdict, now| {
            let ticket = breaker.admit();
            breaker.settle(ticket, verdict, now, settings)
        };
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        assert!((0..9).all(|_| settle(&mut breaker, Failure, start).is_none()), "too few to tell");
        // Half a minute later they no longer count.
        for _ in 0..5 {
            assert_eq!(settle(&mut breaker, Neutral, at(start, 30)), None);
            assert_eq!(settle(&mut breaker, Success, at(start, 30)), None);
        }
        assert!((0..4).all(|_| settle(&mut breaker, Failure, at(start, 31)).is_none()), "less than half");
        assert!(matches!(settle(&mut breaker, Failure, at(start, 31)), Some(Change::OpenedByRate { .. })));
        // After a recovery it is counted anew.
        assert_eq!(settle(&mut breaker, Success, at(start, 91)), Some(Change::Closed));
        assert!((0..9).all(|_| settle(&mut breaker, Failure, at(start, 91)).is_none()));
        assert!(settle(&mut breaker, Failure, at(start, 91)).is_some());
    }

    /// A trial whose client left proves nothing, but must not block the next trial.
    #[test]
    fn a_neutral_trial_frees_its_place() {
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        fail(&mut breaker, start, 3);
        let now = at(start, 61);
        assert_eq!(run(&mut breaker, Neutral, now), None);
        assert!(breaker.trial_is_free(now));
    }

    #[test]
    fn late_results_of_an_older_time_change_nothing() {
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        let early = [breaker.admit(), breaker.admit(), breaker.admit()];
        fail(&mut breaker, start, 3);
        let before = breaker.state(start);
        assert_eq!(breaker.settle(early[0], Failure, start, SETTINGS), None);
        assert_eq!(breaker.settle(early[1], Success, start, SETTINGS), None);
        assert_eq!(breaker.state(start), before);
        breaker.reset();
        assert_eq!(breaker.settle(early[2], Failure, start, SETTINGS), None);
        assert_eq!(breaker.failures(), 0);
    }

    #[test]
    fn traffic_ramps_up_after_a_recovery() {
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        assert_eq!(breaker.share(start), 1000);
        fail(&mut breaker, start, 3);
        let now = at(start, 60);
        run(&mut breaker, Success, now);
        let shares: Vec<u64> = [0, 5, 10, 100].map(|s| breaker.share(at(now, s))).to_vec();
        assert_eq!(shares, [100, 550, 1000, 1000]);
    }

    #[test]
    fn asking_changes_nothing() {
        let (mut breaker, start) = (Breaker::default(), crate::env::now());
        fail(&mut breaker, start, 3);
        let now = at(start, 60);
        for _ in 0..10 {
            assert!(breaker.trial_is_free(now));
            assert_eq!(breaker.state(now), State::HalfOpen);
        }
    }
}
