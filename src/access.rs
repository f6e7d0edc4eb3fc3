//! One line per request: what was asked, who served it, and how it ended. Never a token, a key or content.

use std::time::{Duration, Instant};

use crate::anthropic::sse::Usage;
use crate::front::Exchange;
use crate::http::head::Head;
use crate::logging::ACCESS;
use crate::outcome::Outcome;

/// What is noted while a message request is served.
pub struct Record {
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
    key: String,
    path: String,
    peer: String,
    received_at: Instant,
    tried: Vec<(String, Option<Outcome>)>,
    usage: Usage,
}

impl Record {
    /// Begins with what the request itself tells.
    pub fn new(exchange: &Exchange, id: String) -> Self {
        Self {
            id,
            shown_id: String::new(),
            asked: String::new(),
            served: String::new(),
            is_stream: false,
            status: None,
            key: exchange.route.key.as_deref().unwrap_or("-").to_string(),
            path: exchange.head.path().to_string(),
            peer: exchange.peer.to_string(),
            received_at: exchange.received_at,
            tried: Vec::new(),
            usage: Usage::default(),
        }
    }

    /// Attempts so far.
    pub fn attempts(&self) -> usize {
        self.tried.len()
    }

    /// An endpoint is asked.
    pub fn begin_attempt(&mut self, endpoint: &str) {
        self.tried.push((endpoint.to_string(), None));
    }

    /// How it ended.
    pub fn end_attempt(&mut self, outcome: &Outcome, status: Option<u16>, usage: Usage) {
        if let Some(last) = self.tried.last_mut() {
            last.1 = Some(outcome.clone());
        }
        self.status = status.or(self.status);
        if usage != Usage::default() {
            self.usage = usage;
        }
    }

    /// Writes the line.
    pub fn finish(self, bytes: u64, first_at: Option<Instant>, now: Instant) {
        let (endpoint, end) = match self.tried.last() {
            Some((endpoint, outcome)) => (endpoint.as_str(), outcome.as_ref().map_or("local", Outcome::word)),
            None => ("-", "refused_here"),
        };
        let tried: Vec<String> = self
            .tried
            .iter()
            .map(|(name, outcome)| match outcome {
                Some(Outcome::Refused { status, .. }) => format!("{name}:{status}"),
                Some(outcome) => format!("{name}:{}", outcome.word()),
                None => format!("{name}:?"),
            })
            .collect();
        let milliseconds = |to: Instant| to.saturating_duration_since(self.received_at);
        log::info!(
            target: ACCESS,
            id = if self.shown_id.is_empty() { &self.id } else { &self.shown_id },
            key = self.key,
            peer = self.peer,
            method = "POST",
            path = self.path,
            model = self.asked,
            served = self.served,
            endpoint = endpoint,
            attempts = self.tried.len(),
            tried = tried.join(","),
            status = self.status.unwrap_or(0),
            stream = self.is_stream,
            bytes = bytes,
            ttfb_ms = first_at.map_or(0.0, |at| rounded(milliseconds(at))),
            ms = rounded(milliseconds(now)),
            input_tokens = self.usage.input_tokens.unwrap_or(0),
            output_tokens = self.usage.output_tokens.unwrap_or(0),
            cache_write_tokens = self.usage.cache_creation_input_tokens.unwrap_or(0),
            cache_read_tokens = self.usage.cache_read_input_tokens.unwrap_or(0),
            end = end;
            "request"
        );
    }
}

/// The line for a request that was answered without any workspace.
pub fn local(id: &str, key: Option<&str>, peer: &str, head: Option<&Head>, status: u16, level: log::Level) {
    log::log!(
        target: ACCESS,
        level,
        id = id,
        key = key.unwrap_or("-"),
        peer = peer,
        method = head.map_or("-", Head::method),
        path = head.map_or("-", Head::path),
        status = status;
        "request"
    );
}

fn rounded(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
