//! What /stats shows of an endpoint. Taken under the balancer's lock, turned into JSON outside.

use std::time::{Duration, Instant};

use super::breaker::Cause;
use super::limits::{Level, Limits, PerKind};
use super::{Member, State};
use crate::anthropic::sse::Usage;

/// What the answers of an endpoint reported, added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Input read at full price.
    pub input: u64,
    /// Output.
    pub output: u64,
    /// Input written to the prompt cache.
    pub cache_write: u64,
    /// Input read from the prompt cache.
    pub cache_read: u64,
}

impl Tokens {
    pub(super) fn add(&mut self, usage: Usage) {
        self.input += usage.input_tokens.unwrap_or(0);
        self.output += usage.output_tokens.unwrap_or(0);
        self.cache_write += usage.cache_creation_input_tokens.unwrap_or(0);
        self.cache_read += usage.cache_read_input_tokens.unwrap_or(0);
    }

    /// Of all input tokens, those read from the cache; `None` before any.
    pub fn cached_share(&self) -> Option<f64> {
        let all = self.input + self.cache_write + self.cache_read;
        (all > 0).then(|| self.cache_read as f64 / all as f64)
    }
}

/// One endpoint at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointView {
    /// Its name.
    pub name: String,
    /// Requests it is serving.
    pub active_requests: usize,
    /// Attempts ever made on it.
    pub total_requests: u64,
    /// Attempts it failed since the last reset.
    pub total_errors: u64,
    /// True while it lets nothing through.
    pub circuit_open: bool,
    /// `closed`, `open` or `half_open`.
    pub state: &'static str,
    /// What opened its breaker, unless that is closed.
    pub opened_by: Option<&'static str>,
    /// Until trials begin.
    pub opens_again_in: Option<Duration>,
    /// Consecutive failures.
    pub consecutive_failures: u32,
    /// What is kept out: model (or everything), reason, time left.
    pub holds: Vec<(Option<String>, &'static str, Duration)>,
    /// What is configured and what was learned, with what is used of it, by model.
    pub levels: Vec<(String, PerKind<Level>)>,
    /// Configured limits.
    pub limits: Limits,
    /// Configured weight.
    pub weight: u32,
    /// The part of it that counts now, in thousandths: less than 1000 while traffic grows back after a recovery.
    pub share: u64,
    /// What its answers reported.
    pub tokens: Tokens,
}

impl EndpointView {
    pub(super) fn of<T>(member: &Member<T>, now: Instant) -> Self {
        let (state, until) = match member.breaker.state(now) {
            State::Closed => ("closed", None),
            State::Open { until } => ("open", Some(until)),
            State::HalfOpen => ("half_open", None),
        };
        let hold = |hold: super::cooldown::Hold| {
            (hold.model, hold.reason.word(), hold.until.saturating_duration_since(now))
        };
        Self {
            name: member.endpoint.name.clone(),
            active_requests: member.active,
            total_requests: member.total,
            total_errors: member.errors,
            circuit_open: state == "open",
            state,
            opened_by: member.breaker.cause().map(Cause::word),
            opens_again_in: until.map(|until| until.saturating_duration_since(now)),
            consecutive_failures: member.breaker.failures(),
            holds: member.cooldowns.holds(now).into_iter().map(hold).collect(),
            levels: member.ledgers.levels(now),
            limits: member.endpoint.limits.clone(),
            weight: member.endpoint.weight,
            share: member.breaker.share(now),
            tokens: member.tokens,
        }
    }
}
