//! One line per request: what was asked, who served it, and how it ended. Never a token, a key or content.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::anthropic::sse::Usage;
use crate::balancer::decision::Decision;
use crate::explain::{Explained, Trace};
use crate::front::Exchange;
use crate::http::head::{Head, shown};
use crate::logging::ACCESS;
use crate::outcome::Outcome;

/// What is noted while a message request is served.
pub struct Record<'a> {
    exchange: &'a Exchange,
    /// The id that the client sees as `request-id`, unless the workspace gave its own.
    pub id: String,
    /// The workspace's id, when the client saw that one; else empty.
    pub shown_id: String,
    /// The model the client asked for.
    pub asked: String,
    /// The model as the workspaces call it.
    pub served: String,
    /// The client asked for a stream.
    pub is_stream: bool,
    /// The status the client saw.
    pub status: Option<u16>,
    /// The client left while nobody was being asked.
    pub is_client_gone: bool,
    /// What the client was told in the proxy's own words.
    pub said: String,
    taken_up_at: Instant,
    trace: Trace,
    usage: Usage,
}

impl<'a> Record<'a> {
    /// Begins with what the request itself tells.
    pub fn new(exchange: &'a Exchange, id: String, now: Instant) -> Self {
        Self {
            exchange,
            id,
            shown_id: String::new(),
            asked: String::new(),
            served: String::new(),
            is_stream: false,
            status: None,
            is_client_gone: false,
            said: String::new(),
            taken_up_at: now,
            trace: Trace::default(),
            usage: Usage::default(),
        }
    }

    /// Attempts so far.
    pub fn attempts(&self) -> usize {
        self.trace.attempts().len()
    }

    /// The balancer has decided who is asked, or that nobody is.
    pub fn decided(&mut self, decision: Decision) {
        self.trace.decided(decision);
    }

    /// The endpoint that was chosen last is asked.
    pub fn begin_attempt(&mut self, now: Instant) {
        self.trace.begin_attempt(now);
    }

    /// How it ended.
    pub fn end_attempt(&mut self, outcome: &Outcome, report: Reported<'_>, now: Instant) {
        self.trace.end_attempt(outcome, report.head_at, report.why, now);
        self.status = report.status.or(self.status);
        if report.usage != Usage::default() {
            self.usage = report.usage;
        }
    }

    /// Writes the line, and hands over what explains it.
    pub fn finish(self, bytes: u64, first_at: Option<Instant>, now: Instant) -> Explained {
        // Without a byte sent it is only what would have been shown.
        let (was_shown, seen) = (self.status, first_at.and(self.status));
        let explained = Explained {
            id: self.id,
            shown_id: self.shown_id,
            asked: self.asked,
            served: self.served,
            is_stream: self.is_stream,
            status: seen,
            is_client_gone: self.is_client_gone,
            said: self.said,
            received_at: self.exchange.received_at,
            taken_up_at: Some(self.taken_up_at),
            first_at,
            ended_at: now,
            bytes,
            usage: self.usage,
            trace: self.trace,
        };
        if log::log_enabled!(target: ACCESS, log::Level::Info) {
            write(self.exchange, &explained, if explained.is_client_gone { seen } else { was_shown });
        }
        explained
    }
}

/// The line itself.
fn write(exchange: &Exchange, explained: &Explained, status: Option<u16>) {
    let attempts = explained.trace.attempts();
    let endpoint = attempts.last().map_or("-", |last| explained.trace.endpoint(last));
    let mut tried = String::new();
    for attempt in attempts {
        let comma = if tried.is_empty() { "" } else { "," };
        let name = explained.trace.endpoint(attempt);
        // A string takes whatever is written to it.
        let _ = match &attempt.outcome {
            Some(Outcome::Refused { status, .. }) => write!(tried, "{comma}{name}:{status}"),
            Some(outcome) => write!(tried, "{comma}{name}:{}", outcome.word()),
            None => write!(tried, "{comma}{name}:?"),
        };
    }
    let milliseconds = |to: Instant| rounded(to.saturating_duration_since(explained.received_at));
    log::info!(
        target: ACCESS,
        id = if explained.shown_id.is_empty() { &explained.id } else { &explained.shown_id },
        key = exchange.route.key.as_deref().unwrap_or("-"),
        peer = exchange.peer.to_string(),
        method = "POST",
        path = exchange.head.path(),
        model = explained.asked,
        served = explained.served,
        endpoint = endpoint,
        attempts = attempts.len(),
        tried = tried,
        status = status.unwrap_or(0),
        stream = explained.is_stream,
        bytes = explained.bytes,
        ttfb_ms = explained.first_at.map_or(0.0, milliseconds),
        ms = milliseconds(explained.ended_at),
        input_tokens = explained.usage.input_tokens.unwrap_or(0),
        output_tokens = explained.usage.output_tokens.unwrap_or(0),
        cache_write_tokens = explained.usage.cache_creation_input_tokens.unwrap_or(0),
        cache_read_tokens = explained.usage.cache_read_input_tokens.unwrap_or(0),
        end = explained.end();
        "request"
    );
}

/// What an attempt told.
#[derive(Debug, Clone, Copy)]
pub struct Reported<'a> {
    /// The status that the client saw, or would have seen.
    pub status: Option<u16>,
    /// Tokens.
    pub usage: Usage,
    /// When the workspace's status was known.
    pub head_at: Option<Instant>,
    /// What failed, in words.
    pub why: &'a str,
}

/// The line for a request that was answered without any workspace.
pub fn local(id: &str, key: Option<&str>, peer: &str, head: Option<&Head>, status: u16, level: log::Level) {
    log::log!(
        target: ACCESS,
        level,
        id = id,
        key = key.unwrap_or("-"),
        peer = peer,
        method = head.map_or("-", |head| shown(head.method())),
        path = head.map_or("-", |head| shown(head.path())),
        status = status;
        "request"
    );
}

fn rounded(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
