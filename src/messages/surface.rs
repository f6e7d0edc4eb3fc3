//! What the client sees when no attempt gave it an answer.
//!
//! While no head went out it is an HTTP status. After a heartbeat has committed 200 it is an `error` event, an honest
//! end. Once a `message_start` went out nothing more is said: the socket closes, and the client knows best how to
//! go on from there.

use std::time::Duration;

use super::heads::visible;
use super::prepare::Prepared;
use crate::access::Record;
use crate::anthropic::error::{error_body, error_event, error_type};
use crate::anthropic::sse::error_of;
use crate::balancer::limits::Kind;
use crate::balancer::{RETRY_AFTER_MAX, Shortage, Unavailable, Why};
use crate::env;
use crate::front::{Ending, Exchange};
use crate::http::answer::{Refusal, field, finish, start};
use crate::relay::Downstream;

/// How the last attempt failed, in the client's terms.
pub(super) enum Failure {
    /// The workspace's own answer.
    Upstream {
        status: u16,
        headers: Vec<(String, Vec<u8>)>,
        body: Vec<u8>,
        retry_after: Option<Duration>,
        endpoint: String,
    },
    /// An error event that came before content: its data is an error body in Anthropic's shape.
    Event { status: u16, data: Vec<u8>, endpoint: String },
    /// No answer worth showing; in our words.
    Local { status: u16, message: String },
}

impl Failure {
    pub(super) fn local(status: u16, message: &str) -> Self {
        Self::Local { status, message: message.to_string() }
    }

    /// The status the client sees.
    pub(super) fn status(&self) -> u16 {
        match *self {
            // The client would retry a 401 for minutes, and its own key is not at fault.
            Self::Upstream { status: 401, .. } => 403,
            Self::Upstream { status, .. } | Self::Event { status, .. } | Self::Local { status, .. } => status,
        }
    }
}

/// What to say when every endpoint is at a configured limit.
fn no_room(model: &str, shortages: &[Shortage]) -> String {
    use std::fmt::Write as _;
    const SHOWN: usize = 8;
    let mut message =
        format!("no workspace has room for this request for {model} within its configured limits");
    for (at, Shortage { endpoint, kind, level, wait }) in shortages.iter().take(SHOWN).enumerate() {
        let (sign, limit) = (if at == 0 { ": " } else { "; " }, level.limit.unwrap_or_default());
        let (used, words, seconds) = (level.used, kind.key().replace('_', " "), wait.as_secs() + 1);
        let _ =
            write!(message, "{sign}{endpoint} has {used} of {limit} {words} in use, room within {seconds} s");
    }
    let is_output = shortages.iter().any(|shortage| shortage.kind == Kind::Output);
    let reserved = if is_output { ", lower max_tokens (CLAUDE_CODE_MAX_OUTPUT_TOKENS)" } else { "" };
    message + &format!(" (ask again later{reserved}, raise endpoints[].limits, or add a workspace)")
}

/// Shows failures to one client.
pub(super) struct Surface<'a> {
    pub(super) exchange: &'a Exchange,
    pub(super) downstream: &'a Downstream,
}

impl Surface<'_> {
    /// The request itself is at fault.
    #[inline(never)]
    pub(super) fn refusal(&self, refusal: &Refusal, record: &mut Record<'_>) -> Ending {
        let kind = error_type(refusal.status);
        self.answer(refusal.status, kind, &refusal.message, None, record)
    }

    /// No endpoint could be asked at all.
    #[inline(never)]
    pub(super) fn unavailable(
        &self,
        nobody: Unavailable,
        shortages: &[Shortage],
        prepared: &Prepared<'_>,
        record: &mut Record<'_>,
    ) -> Ending {
        let (asked, model) = (&prepared.facts.model, &prepared.model);
        let wait = nobody.retry_after();
        match nobody.why {
            Why::NoneServesModel => {
                let message = format!(
                    "no configured endpoint serves the model {model} (asked for as {asked}): name it under \
                     endpoints[].models, or map it under models.map"
                );
                self.answer(404, "not_found_error", &message, None, record)
            }
            Why::AllCooling => {
                let message = format!("every endpoint is over its rate limit or overloaded for {model}");
                self.answer(429, "rate_limit_error", &message, Some(wait), record)
            }
            Why::NoRoom { .. } => {
                let message = no_room(model, shortages);
                if self.downstream.has_head() {
                    return self.error_event(Failure::local(429, &message), record);
                }
                self.answer(429, "rate_limit_error", &message, Some(wait), record)
            }
            Why::AllOut | Why::RetryBudget => {
                self.answer(503, "overloaded_error", "No available endpoints", Some(wait), record)
            }
        }
    }

    /// The last attempt failed. `soonest` is when the first endpoint may be back.
    #[inline(never)]
    pub(super) fn failure(
        &self,
        failure: Failure,
        soonest: Option<Duration>,
        record: &mut Record<'_>,
    ) -> Ending {
        if self.downstream.has_message_start() {
            record.status = Some(200);
            return Ending::Broken;
        }
        if self.downstream.has_head() {
            return self.error_event(failure, record);
        }
        let status = failure.status();
        match failure {
            Failure::Upstream { headers, body, retry_after, endpoint, .. } => {
                let wait = if status == 429 { soonest.or(retry_after) } else { retry_after };
                self.whole(status, &headers, &body, wait, Some(&endpoint), record)
            }
            Failure::Event { data, endpoint, .. } => {
                let headers = [("content-type".to_string(), b"application/json".to_vec())];
                let wait = soonest.filter(|_| status == 429);
                self.whole(status, &headers, &data, wait, Some(&endpoint), record)
            }
            Failure::Local { message, .. } => self.answer(status, error_type(status), &message, None, record),
        }
    }

    fn error_event(&self, failure: Failure, record: &mut Record<'_>) -> Ending {
        let status = failure.status();
        let (kind, message) = match &failure {
            Failure::Upstream { body: said, .. } | Failure::Event { data: said, .. } => error_of(said)
                .unwrap_or_else(|| (error_type(status).into(), String::from_utf8_lossy(said).into())),
            Failure::Local { message, .. } => (error_type(status).into(), message.clone()),
        };
        record.status = Some(200);
        if let Failure::Local { message, .. } = failure {
            record.said = message;
        }
        let event = error_event(&kind, &message);
        let sent = self.downstream.send_part(b"", event.as_bytes(), env::now());
        let ended = sent.and_then(|()| self.downstream.end_stream());
        if ended.is_ok() && self.downstream.is_chunked() { Ending::Whole } else { Ending::Broken }
    }

    /// An error in our own words.
    fn answer(
        &self,
        status: u16,
        kind: &str,
        message: &str,
        wait: Option<Duration>,
        record: &mut Record<'_>,
    ) -> Ending {
        let headers = [("content-type".to_string(), b"application/json".to_vec())];
        record.said = message.to_string();
        let body = error_body(kind, message, &record.id);
        self.whole(status, &headers, body.as_bytes(), wait, None, record)
    }

    fn whole(
        &self,
        status: u16,
        headers: &[(String, Vec<u8>)],
        body: &[u8],
        wait: Option<Duration>,
        endpoint: Option<&str>,
        record: &mut Record<'_>,
    ) -> Ending {
        record.status = Some(status);
        let mut text = String::with_capacity(256);
        start(&mut text, status);
        let mut out = text.into_bytes();
        for (name, value) in headers {
            for part in [name.as_bytes(), b": ", value, b"\r\n"] {
                out.extend_from_slice(part);
            }
        }
        let mut text = String::with_capacity(192);
        if !headers.iter().any(|(name, _)| name == "request-id") {
            field(&mut text, "request-id", &record.id);
        }
        if let Some(wait) = wait {
            // Rounded up: asking a moment too early would only meet the same answer.
            field(&mut text, "retry-after", wait.min(RETRY_AFTER_MAX).as_millis().div_ceil(1000));
        }
        if let Some(endpoint) = endpoint {
            field(&mut text, "x-claude-lb-endpoint", visible(endpoint));
        }
        if record.attempts() > 0 {
            field(&mut text, "x-claude-lb-attempts", record.attempts());
        }
        field(&mut text, "content-length", body.len());
        finish(&mut text, self.exchange.closes);
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(body);
        match self.downstream.send_framed(&out, body.len(), env::now()) {
            Ok(()) => Ending::Whole,
            Err(_) => Ending::Broken,
        }
    }
}
