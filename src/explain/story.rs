//! One explanation in sentences, in the order in which things happened: what a person reads first.

use std::time::{Duration, Instant};

use super::page::{ms, score, thousandths};
use super::{Attempt, Explained};
use crate::balancer::Why;
use crate::balancer::decision::{Considered, Course, Decision, Home, Out};
use crate::balancer::strategy::Strategy;
use crate::outcome::{Meaning, Outcome};

/// The sentences, each with its moment.
pub fn story(explained: &Explained) -> Vec<String> {
    let mut story = vec![arrival(explained)];
    if let Some(at) = explained.taken_up_at {
        let ms = explained.ms(at);
        let why =
            if ms < NOTABLE_MS { "" } else { "; until then its body was coming, or all workers were busy" };
        story.push(format!("{ms} ms: a worker took it up{why}"));
    }
    let (decisions, left_out) = (&explained.trace.decisions, explained.trace.left_out);
    for (place, decision) in decisions.iter().enumerate() {
        if left_out > 0 && place + 1 == decisions.len() {
            story.push(format!("and so on: {left_out} further decisions are not kept"));
        }
        story.push(format!("{} ms: {}", explained.ms(decision.at), decided(decision)));
        let attempts = explained.trace.attempts().iter().filter(|attempt| attempt.decision == place);
        story.extend(attempts.enumerate().map(|(nth, attempt)| attempted(explained, attempt, nth > 0)));
    }
    story.push(ending(explained));
    story.extend(where_the_time_went(explained));
    story
}

/// A wait that a person asks about.
const NOTABLE_MS: f64 = 10.0;

fn arrival(explained: &Explained) -> String {
    let Explained { asked, served, .. } = explained;
    let kind = if explained.is_stream { "a stream" } else { "a message" };
    match (asked.is_empty(), asked == served) {
        (true, _) => "0 ms: a request had arrived".into(),
        (false, true) => format!("0 ms: a request for {kind} of {asked} had arrived"),
        (false, false) => format!("0 ms: a request for {kind} of {asked}, here {served}, had arrived"),
    }
}

fn decided(decision: &Decision) -> String {
    let insists = if decision.insists && !decision.is_repeat {
        "it has waited long enough for a limit that is only a guess; "
    } else {
        ""
    };
    let outs = outs(decision);
    format!("{insists}{}", went(decision, &outs))
}

fn went(decision: &Decision, outs: &str) -> String {
    let Some(chosen) = decision.chosen else {
        return format!("{}{outs}", nobody(decision.refused));
    };
    let name = decision.name(chosen);
    if decision.is_repeat {
        return format!("{name} is the only endpoint for this model, so it is asked once more{outs}");
    }
    let by_strategy = by_strategy(decision, chosen);
    let home = match decision.home {
        Home::At(index) => decision.name(index),
        Home::None | Home::Removed => "an endpoint that is no longer configured",
    };
    match decision.course {
        Course::NoSession => format!("{name} {by_strategy}{outs}"),
        Course::New => {
            format!("the conversation was bound nowhere; {name} {by_strategy}, and it is bound there{outs}")
        }
        Course::Hit => format!(
            "{name}, where the conversation is bound, has room for it: {}{outs}",
            stays(decision, chosen)
        ),
        Course::Detour => {
            let why = why_not_home(decision);
            format!("the conversation is bound to {home}, {why}; this once {name} {by_strategy}{outs}")
        }
        Course::Move => {
            let why = why_not_home(decision);
            format!(
                "the conversation was bound to {home}{why}; {name} {by_strategy}, and it is bound there now{outs}"
            )
        }
    }
}

/// How the chosen one won.
fn by_strategy(decision: &Decision, chosen: usize) -> String {
    let able = decision.considered.iter().filter(|one| one.out.is_none());
    let scores: Vec<f64> = able.map(score).collect();
    let own = decision.of(chosen).map_or(0.0, score);
    let is_lowest = scores.iter().all(|score| own <= *score);
    match decision.strategy {
        _ if scores.len() == 1 => "takes it as the only one that can".into(),
        Strategy::LeastRequests if is_lowest && decision.more == 0 => {
            let equals = scores.iter().filter(|score| **score == own).count();
            let tie = if equals > 1 { ", where it is used least lately or won by chance" } else { "" };
            format!("takes it with the lowest score of {}: {own}{tie}", scores.len())
        }
        Strategy::LeastRequests if decision.more == 0 => {
            "takes it because the last detour of this conversation led there".into()
        }
        Strategy::LeastRequests => format!("takes it with a score of {own}"),
        Strategy::RoundRobin => format!("takes it, whose turn it is among {}", scores.len()),
        Strategy::Random => format!("takes it by chance among {}", scores.len()),
    }
}

/// Load and limit of the endpoint that a conversation is bound to.
fn stays(decision: &Decision, index: usize) -> String {
    let load = decision.of(index).map_or(0, |one| one.candidate.load() + 1000);
    let limit = decision.stay_limit(index).unwrap_or_default();
    format!("its load with this request is {}, and may be up to {}", thousandths(load), thousandths(limit))
}

fn why_not_home(decision: &Decision) -> String {
    let Home::At(index) = decision.home else { return String::new() };
    match decision.home_out() {
        None => format!("which has too much to do ({})", stays(decision, index)),
        Some(Out::Tried) => "which this request has tried".into(),
        Some(out) if decision.course == Course::Move => format!(", which is out ({})", out.word()),
        Some(out) => format!("which cannot take it ({})", out.word()),
    }
}

fn nobody(why: Option<Why>) -> &'static str {
    match why {
        Some(Why::NoneServesModel) => "no configured endpoint serves this model",
        Some(Why::AllCooling) => "every endpoint rests for this model",
        Some(Why::RetryBudget) => {
            "an endpoint is there, but its last result was bad and as many such retries run as may"
        }
        Some(Why::NoRoom { is_learned: false, .. }) => {
            "no endpoint has room for it within its configured limits"
        }
        Some(Why::NoRoom { is_learned: true, .. }) => {
            "no endpoint has room for it within its limits, which 429s have taught"
        }
        Some(Why::AllOut) | None => "no endpoint can take it",
    }
}

/// Who was out, and why.
fn outs(decision: &Decision) -> String {
    let shown = |one: &Considered| {
        let name = decision.name(one.candidate.index);
        let back = one.back_at.map(|at| at.saturating_duration_since(decision.at));
        let back = back.map_or(String::new(), |span| format!(", back in {}", seconds(span)));
        one.out.map(|out| format!("{name} ({}{back})", out.word()))
    };
    let outs: Vec<String> = decision.considered.iter().filter_map(shown).collect();
    if outs.is_empty() { String::new() } else { format!("; out: {}", outs.join(", ")) }
}

fn seconds(span: Duration) -> String {
    format!("{} s", (span.as_secs_f64() * 10.0).round() / 10.0)
}

fn attempted(explained: &Explained, attempt: &Attempt, is_repeated: bool) -> String {
    let (name, began) = (explained.trace.endpoint(attempt), explained.ms(attempt.began_at));
    let again = if is_repeated { " again, without a field that it refused" } else { "" };
    let took = |at: Instant| ms(at.saturating_duration_since(attempt.began_at));
    let is_answer = !matches!(attempt.outcome, Some(Outcome::Refused { .. }));
    let head = match attempt.head_at.filter(|_| is_answer) {
        Some(at) => format!("it began to answer after {} ms, and ", took(at)),
        None => String::new(),
    };
    let ended = attempt.ended_at.map_or(String::new(), |at| format!("after {} ms ", took(at)));
    let how = attempt.outcome.as_ref().map_or("nothing more was heard of it".into(), outcome);
    let why = if attempt.why.is_empty() { String::new() } else { format!(" ({})", attempt.why) };
    format!("{began} ms: {name} is asked{again}; {head}{ended}{how}{why}")
}

/// How an attempt ended.
fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Completed => "the answer was whole".into(),
        Outcome::NoCredential => "nothing had been sent, for there is no token (the log says why)".into(),
        Outcome::ConnectFailed => "connecting had failed".into(),
        Outcome::NoAnswer => "no valid answer had come".into(),
        Outcome::FirstByteTimeout => "the wait was given up".into(),
        Outcome::Refused { status, retry_after, meaning } => {
            let wait = retry_after.map_or(String::new(), |span| format!(", Retry-After {}", seconds(span)));
            format!("it had answered {status}: {}{wait}", refusal(*status, *meaning))
        }
        Outcome::WebPage => "a web page had come instead of an answer".into(),
        Outcome::ErrorEvent { status } => {
            format!("its stream had begun with an error, as good as a {status}")
        }
        Outcome::BrokeBeforeContent => "the answer had broken off before any content".into(),
        Outcome::BrokeAfterContent => {
            "the answer had broken off after content, when nobody else could be asked any more".into()
        }
        Outcome::ClientGone => "the client had left".into(),
        Outcome::Local => "it was clear that the request cannot be sent to anybody".into(),
    }
}

fn refusal(status: u16, meaning: Meaning) -> &'static str {
    match (meaning, status) {
        (Meaning::ModelMissing, _) => "it does not have this model",
        (Meaning::RateLimitZero, _) => "it gives this model no quota at all",
        (Meaning::IpBlocked, _) => "it blocks the proxy's address",
        (Meaning::RequestLimitExceeded, _) | (_, 429) => "it is over its limit for this model",
        (_, 529) => "it is overloaded",
        (_, 401 | 403) => "it rejects the proxy's token",
        (_, 300..=399) => "a redirect, which is not followed",
        (_, 500..) => "an error of its own",
        _ => "the request itself is refused, which nobody else is asked about",
    }
}

fn ending(explained: &Explained) -> String {
    let at = explained.ms(explained.ended_at);
    let said = if explained.said.is_empty() { String::new() } else { format!(" ({})", explained.said) };
    let Some(first) = explained.first_at.map(|at| explained.ms(at)) else {
        return format!("{at} ms: over; nothing had been sent to the client{said}");
    };
    let status = explained.status.map_or(String::new(), |status| format!("status {status}{said}, "));
    let bytes = explained.bytes;
    format!(
        "{at} ms: over; the client got {status}its first byte at {first} ms, {bytes} bytes of body in all"
    )
}

/// For "why did it take so long", in one sentence.
fn where_the_time_went(explained: &Explained) -> Option<String> {
    let (first, last) = (explained.trace.attempts().first()?, explained.trace.attempts().last()?);
    let mut parts = vec![format!("{} ms before anybody was asked", explained.ms(first.began_at))];
    let mut asked = Duration::ZERO;
    for attempt in explained.trace.attempts() {
        let span = attempt.ended_at?.saturating_duration_since(attempt.began_at);
        asked += span;
        let name = explained.trace.endpoint(attempt);
        let head = attempt.head_at.map(|at| at.saturating_duration_since(attempt.began_at));
        let head = head.map_or(String::new(), |span| format!(" ({} ms until it began to answer)", ms(span)));
        parts.push(format!("{} ms with {name}{head}", ms(span)));
    }
    let between = last.ended_at?.saturating_duration_since(first.began_at).saturating_sub(asked);
    if ms(between) >= NOTABLE_MS {
        parts.push(format!("{} ms between attempts", ms(between)));
    }
    Some(format!("where the time went: {}", parts.join(", ")))
}
