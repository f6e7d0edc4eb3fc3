//! One explanation as JSON. Names are those of /stats and the access line; times are milliseconds since the request's
//! head was whole.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use super::story::story;
use super::{Attempt, Explained};
use crate::balancer::Why;
use crate::balancer::decision::{Considered, Decision, Home, Out};
use crate::balancer::strategy::Strategy;
use crate::logging;
use crate::outcome::Outcome;

#[derive(Serialize)]
struct Page<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    shown_id: &'a str,
    arrived: String,
    model: &'a str,
    served: &'a str,
    stream: bool,
    status: Option<u16>,
    endpoint: Option<&'a str>,
    end: &'a str,
    story: Vec<String>,
    times: Times,
    tokens: Tokens,
    decisions: Vec<DecisionPart<'a>>,
}

#[derive(Serialize)]
struct Times {
    taken_up_ms: Option<f64>,
    first_byte_ms: Option<f64>,
    ended_ms: f64,
}

#[derive(Serialize)]
struct Tokens {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_write_tokens: Option<u64>,
    cache_read_tokens: Option<u64>,
}

#[derive(Serialize)]
struct DecisionPart<'a> {
    at_ms: f64,
    chosen: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nobody_because: Option<&'static str>,
    strategy: &'static str,
    affinity: Option<&'static str>,
    bound_to: Option<&'a str>,
    candidates: Vec<CandidatePart<'a>>,
    #[serde(skip_serializing_if = "is_zero")]
    more_candidates: usize,
    attempts: Vec<AttemptPart<'a>>,
}

#[derive(Serialize)]
struct CandidatePart<'a> {
    name: &'a str,
    out: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    back_in_ms: Option<f64>,
    active: usize,
    awaited: f64,
    load: f64,
    weight: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
    recent: f64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    tried: bool,
}

#[derive(Serialize)]
struct AttemptPart<'a> {
    number: usize,
    began_ms: f64,
    head_ms: Option<f64>,
    ended_ms: Option<f64>,
    outcome: &'static str,
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_s: Option<f64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    why: &'a str,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// The whole page.
pub fn page(explained: &Explained, now: Instant, wall_clock: Duration) -> String {
    let trace = &explained.trace;
    let last = trace.attempts().last();
    let arrived = wall_clock.saturating_sub(now.saturating_duration_since(explained.received_at));
    let page = Page {
        id: &explained.id,
        shown_id: &explained.shown_id,
        arrived: logging::timestamp(arrived),
        model: &explained.asked,
        served: &explained.served,
        stream: explained.is_stream,
        status: explained.status,
        endpoint: last.map(|attempt| trace.endpoint(attempt)),
        end: explained.end(),
        story: story(explained),
        times: Times {
            taken_up_ms: explained.taken_up_at.map(|at| explained.ms(at)),
            first_byte_ms: explained.first_at.map(|at| explained.ms(at)),
            ended_ms: explained.ms(explained.ended_at),
        },
        tokens: Tokens {
            input_tokens: explained.usage.input_tokens,
            output_tokens: explained.usage.output_tokens,
            cache_write_tokens: explained.usage.cache_creation_input_tokens,
            cache_read_tokens: explained.usage.cache_read_input_tokens,
        },
        decisions: trace.decisions.iter().enumerate().map(|(at, one)| decision(explained, at, one)).collect(),
    };
    let mut text = Vec::new();
    let formatter = Shallow { pretty: PrettyFormatter::new(), depth: 0 };
    // Numbers and texts alone: nothing in it can fail.
    let _ = page.serialize(&mut Serializer::with_formatter(&mut text, formatter));
    text.push(b'\n');
    String::from_utf8(text).unwrap_or_default()
}

fn decision<'a>(explained: &'a Explained, place: usize, decision: &'a Decision) -> DecisionPart<'a> {
    let attempts = explained.trace.attempts().iter().filter(|attempt| attempt.decision == place);
    DecisionPart {
        at_ms: explained.ms(decision.at),
        chosen: decision.chosen.map(|index| decision.name(index)),
        nobody_because: decision.refused.map(why),
        strategy: match decision.strategy {
            Strategy::LeastRequests => "least_requests",
            Strategy::RoundRobin => "round_robin",
            Strategy::Random => "random",
        },
        affinity: decision.chosen.filter(|_| !decision.is_repeat).map(|_| decision.course.word()),
        bound_to: match decision.home {
            Home::None => None,
            Home::At(index) => Some(decision.name(index)),
            Home::Removed => Some("(removed)"),
        },
        candidates: decision.considered.iter().map(|one| candidate(decision, one)).collect(),
        more_candidates: decision.more,
        attempts: attempts.map(|one| attempt(explained, one)).collect(),
    }
}

fn why(why: Why) -> &'static str {
    match why {
        Why::NoneServesModel => "none_serves_model",
        Why::AllCooling => "all_cooling",
        Why::AllOut => "all_out",
        Why::RetryBudget => "retry_budget",
        Why::NoRoom { .. } => "no_room",
    }
}

fn candidate<'a>(decision: &'a Decision, one: &Considered) -> CandidatePart<'a> {
    let out = one.out.map(|out| out.word());
    let is_scored = one.out.is_none() && decision.strategy == Strategy::LeastRequests;
    CandidatePart {
        name: decision.name(one.candidate.index),
        out,
        back_in_ms: one.back_at.map(|at| ms(at.saturating_duration_since(decision.at))),
        active: one.candidate.active,
        awaited: thousandths(one.candidate.awaited),
        load: thousandths(one.candidate.load()),
        weight: match one.out {
            Some(Out::WeightZero) => 0.0,
            _ => thousandths(one.candidate.weight),
        },
        score: is_scored.then(|| score(one)),
        recent: rounded(one.candidate.recent),
        tried: one.is_tried,
    }
}

fn attempt<'a>(explained: &Explained, one: &'a Attempt) -> AttemptPart<'a> {
    let (status, retry_after) = match one.outcome {
        Some(Outcome::Refused { status, retry_after, .. }) => (Some(status), retry_after),
        Some(Outcome::ErrorEvent { status }) => (Some(status), None),
        // Nothing comes after these, so the client saw this attempt's status.
        Some(Outcome::Completed | Outcome::BrokeAfterContent) => (explained.status, None),
        _ => (None, None),
    };
    AttemptPart {
        number: one.number,
        began_ms: explained.ms(one.began_at),
        head_ms: one.head_at.map(|at| explained.ms(at)),
        ended_ms: one.ended_at.map(|at| explained.ms(at)),
        outcome: one.outcome.as_ref().map_or("local", Outcome::word),
        status,
        retry_after_s: retry_after.map(|span| span.as_secs_f64()),
        why: &one.why,
    }
}

impl Explained {
    /// Milliseconds from the request's head to this moment.
    pub(super) fn ms(&self, at: Instant) -> f64 {
        ms(at.saturating_duration_since(self.received_at))
    }
}

pub(super) fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 10_000.0).round() / 10.0
}

/// What least_requests compares: the load with this request, for the weight.
pub(super) fn score(one: &Considered) -> f64 {
    rounded((one.candidate.load() + 1000) as f64 / one.candidate.weight as f64)
}

pub(super) fn thousandths(number: u64) -> f64 {
    number as f64 / 1000.0
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// Indents what a person reads downwards, and keeps each candidate and each attempt on one line.
struct Shallow<'a> {
    pretty: PrettyFormatter<'a>,
    depth: usize,
}

/// The page, its decisions, one decision, its candidates; from the candidate itself on it is one line.
const INDENTED_MAX: usize = 4;

macro_rules! by_depth {
    ($($name:ident($($argument:ident: $kind:ty),*) $change:literal;)*) => {
        $(fn $name<W: ?Sized + std::io::Write>(&mut self, writer: &mut W $(, $argument: $kind)*) -> std::io::Result<()> {
            if $change > 0 {
                self.depth += 1;
            }
            let result = match self.depth <= INDENTED_MAX {
                true => self.pretty.$name(writer $(, $argument)*),
                false => CompactFormatter.$name(writer $(, $argument)*),
            };
            if $change < 0 {
                self.depth -= 1;
            }
            result
        })*
    };
}

impl Formatter for Shallow<'_> {
    by_depth! {
        begin_array() 1;
        end_array() -1;
        begin_array_value(first: bool) 0;
        end_array_value() 0;
        begin_object() 1;
        end_object() -1;
        begin_object_key(first: bool) 0;
        begin_object_value() 0;
        end_object_value() 0;
    }
}
