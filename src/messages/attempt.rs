//! One attempt at one workspace: send, look at the status, relay.
//!
//! It ends in exactly one [`Outcome`], and either the client has its answer by then, or nothing is lost and the
//! [`Failure`] says what the client would see if this was the last attempt.

use std::borrow::Cow;
use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::heads::{self, Length, Marks};
use super::prepare::Prepared;
use super::surface::Failure;
use super::{Messages, Report};
use crate::anthropic::edit::Edit;
use crate::anthropic::error::{Presented, meaning, present, status_of_error_type};
use crate::anthropic::sse::{Scanner, error_of, usage_of_message};
use crate::balancer::limits::Kind;
use crate::env;
use crate::front::{Ending, Exchange};
use crate::http::forward;
use crate::outcome::{Outcome, retry_after};
use crate::relay::body::{Body, Ended as BodyEnded, Room, gather};
use crate::relay::stream::{Ended as StreamEnded, Stream};
use crate::relay::{Downstream, Limits};
use crate::stack;
use crate::upstream::{Abort, Incoming, Outgoing, Pieces, SendError, SendErrorKind, Wait, Workspace};

/// The largest error body that is read.
const ERROR_BYTES_MAX: usize = 256 * 1024;
/// The longest silence within an error body. What it means is mostly told by the status, and others may be waiting to
/// serve the request.
const ERROR_BODY_IDLE: Duration = Duration::from_secs(2);
/// The longest an error body may take altogether: one that trickles must not keep the client from the next workspace.
const ERROR_BODY_TIME: Duration = Duration::from_secs(5);
/// What became of the client's answer.
pub(super) enum Attempted {
    /// The client has seen an answer, whole or broken off, or has left.
    Answered(Ending),
    /// The client has seen nothing that cannot be continued.
    Failed(Failure),
}

/// The end of one attempt. Boxed, since it is handed on through all that waits for a stream.
pub(super) struct End {
    /// What became of the client's answer.
    pub(super) attempted: Attempted,
    /// Who is to blame, and what follows.
    pub(super) outcome: Outcome,
    /// For the log.
    pub(super) report: Report,
}

impl End {
    fn answered(ending: Ending, outcome: Outcome) -> Box<Self> {
        Box::new(Self { attempted: Attempted::Answered(ending), outcome, report: Report::default() })
    }

    fn failed(failure: Failure, outcome: Outcome, why: String) -> Box<Self> {
        let report = Report { why, status: Some(failure.status()), ..Report::default() };
        Box::new(Self { attempted: Attempted::Failed(failure), outcome, report })
    }
}

/// One attempt.
pub(super) struct Attempt<'a> {
    pub(super) messages: &'a Messages,
    pub(super) exchange: &'a Exchange,
    pub(super) prepared: &'a Prepared<'a>,
    /// What is other in the body this time.
    pub(super) edits: &'a Arc<[Edit]>,
    /// The client's headers that go along this time.
    pub(super) headers: &'a [(&'a str, &'a [u8])],
    /// Called when the workspace takes the request, before the client sees anything of the answer.
    pub(super) accepted: &'a dyn Fn(),
    pub(super) downstream: &'a Rc<Downstream>,
    pub(super) id: &'a str,
    /// Attempts so far, this one included.
    pub(super) made: usize,
}

impl Attempt<'_> {
    /// Runs it to its end.
    #[inline(never)]
    pub(super) fn run(&self, workspace: &Workspace) -> Box<End> {
        let wait: Rc<dyn Wait> = Rc::new(Patience {
            downstream: Rc::clone(self.downstream),
            limits: self.messages.limits,
            until: env::now() + self.messages.first_byte,
            heartbeat_head: self.prepared.facts.stream.then(|| heads::heartbeat(self.id, self.exchange)),
        });
        let incoming = match self.send(workspace, &wait) {
            Ok(incoming) => incoming,
            Err(error) => return self.not_sent(error, workspace),
        };
        drop(wait);
        let head_at = env::now();
        let mut end = self.answered(incoming, workspace);
        end.report.head_at = Some(head_at);
        end
    }

    #[inline(never)]
    fn send(&self, workspace: &Workspace, wait: &Rc<dyn Wait>) -> Result<Incoming, SendError> {
        let Some(body) = self.prepared.kept.body() else {
            let message = "content was relayed: no attempt may follow".into();
            return Err(SendError { kind: SendErrorKind::NoAnswer, message });
        };
        let body = Pieces::new(body, Arc::clone(self.edits));
        workspace.send(&Outgoing { query: self.prepared.query, headers: self.headers, body: &body }, wait)
    }

    /// The workspace has answered: what with, its status tells.
    fn answered(&self, incoming: Incoming, workspace: &Workspace) -> Box<End> {
        let marks = Marks { request_id: self.id, endpoint: &workspace.name, attempts: self.made };
        let content_type = incoming.header("content-type").unwrap_or_default().to_ascii_lowercase();
        if incoming.status < 200 {
            // 101 would take the client's connection out of HTTP.
            let why = format!("{} answered {}, which nobody asked for", workspace.name, incoming.status);
            return End::failed(Failure::local(502, &why), Outcome::NoAnswer, why);
        }
        if incoming.status >= 300 {
            return self.refused(incoming, workspace);
        }
        if content_type.starts_with("text/event-stream") {
            (self.accepted)();
            return self.stream(incoming, marks);
        }
        if content_type.starts_with("text/html") {
            return self.web_page(workspace);
        }
        if self.downstream.has_head() {
            let why = format!("{} answered a stream with {content_type:?}", workspace.name);
            return End::failed(Failure::local(502, &why), Outcome::NoAnswer, why);
        }
        (self.accepted)();
        self.body(incoming, marks, workspace)
    }

    #[inline(never)]
    fn not_sent(&self, error: SendError, workspace: &Workspace) -> Box<End> {
        let named = format!("{}: {}", workspace.name, error.message);
        match error.kind {
            SendErrorKind::Aborted(Abort::ClientGone) => self.client_gone(),
            SendErrorKind::Aborted(Abort::FirstByte) => {
                let seconds = self.messages.first_byte.as_secs_f64();
                let why = format!("{} did not begin to answer within {seconds} s", workspace.name);
                End::failed(Failure::local(504, &why), Outcome::FirstByteTimeout, why)
            }
            SendErrorKind::Connect | SendErrorKind::Aborted(Abort::Connect) => {
                let why = format!("cannot connect to {named}");
                End::failed(Failure::local(502, &why), Outcome::ConnectFailed, why)
            }
            SendErrorKind::Credential => {
                // The reason may name a file of this machine: it is for the operator.
                let shown = format!("no token for {} (the proxy's log says why)", workspace.name);
                End::failed(Failure::local(502, &shown), Outcome::NoCredential, error.message)
            }
            SendErrorKind::Request => {
                let why = format!("the request cannot be sent on: {}", error.message);
                End::failed(Failure::local(400, &why), Outcome::Local, why)
            }
            SendErrorKind::NoAnswer => {
                let why = format!("no valid answer from {named}");
                End::failed(Failure::local(502, &why), Outcome::NoAnswer, why)
            }
        }
    }

    /// An error status: its body decides what it means, and is what the client sees if this was the last attempt.
    #[inline(never)]
    fn refused(&self, incoming: Incoming, workspace: &Workspace) -> Box<End> {
        let status = incoming.status;
        let wait = incoming.header("retry-after").and_then(|value| retry_after(value, env::wall_clock()));
        if (300..400).contains(&status) {
            let why = format!("{} answered with a redirect ({status}): is api_base right?", workspace.name);
            let outcome = Outcome::Refused { status, retry_after: wait, meaning: meaning(status, b"") };
            return End::failed(Failure::local(502, &why), outcome, why);
        }
        let connection = incoming.connection().map(Cow::into_owned);
        let mut headers: Vec<(String, Vec<u8>)> = incoming
            .headers()
            .filter(|(name, _)| {
                forward::goes_to_client(name, connection.as_deref()) && *name != "retry-after"
            })
            .map(|(name, value)| (name.to_string(), value.to_vec()))
            .collect();
        let content_type = incoming.header("content-type").map(str::to_string);
        let is_packed = incoming.header("content-encoding").is_some_and(|coding| coding != "identity");
        let given_id = incoming.header("request-id").map(str::to_string);
        let token = incoming.token().clone();
        let announced = incoming.length();
        let mut body = Vec::new();
        let mut reader =
            Until { body: incoming.into_body(), until: env::now() + ERROR_BODY_TIME, clock: env::now };
        let idle = self.messages.limits.idle.min(ERROR_BODY_IDLE);
        let limits = Limits { idle, ..self.messages.limits };
        let room = Room { announced, most: ERROR_BYTES_MAX };
        let gathered = gather(&mut reader, self.downstream, limits, &env::now, room, &mut body);
        if gathered == crate::relay::body::Gathered::ClientGone {
            return self.client_gone();
        }
        let outcome = Outcome::Refused { status, retry_after: wait, meaning: meaning(status, &body) };
        let limited_by = Kind::named_by(&outcome, &body);
        let presented = present(
            status,
            content_type.as_deref(),
            &body,
            token.expose(),
            given_id.as_deref().unwrap_or(self.id),
        );
        let body = match presented {
            // Packed although nobody asked for it: only the client may be able to read it.
            _ if is_packed => body,
            Presented::Unchanged => body,
            Presented::Masked(masked) => masked,
            Presented::Wrapped(text) => {
                headers.retain(|(name, _)| name != "content-type" && name != "content-encoding");
                headers.push(("content-type".into(), b"application/json".to_vec()));
                text.into_bytes()
            }
        };
        let why = format!("{} answered {status}{}", workspace.name, said(status, &body));
        let failure =
            Failure::Upstream { status, headers, body, retry_after: wait, endpoint: workspace.name.clone() };
        let mut end = End::failed(failure, outcome, why);
        end.report.limited_by = limited_by;
        end.report.request_id = given_id;
        end
    }

    #[inline(never)]
    fn stream(&self, incoming: Incoming, marks: Marks<'_>) -> Box<End> {
        let status = incoming.status;
        let mut head = heads::relayed(&incoming, marks);
        head.extend_from_slice(heads::end(Length::Streamed, self.exchange).as_bytes());
        let token = incoming.token().clone();
        // After a heartbeat the client has a head already, with our id.
        let given_id =
            incoming.header("request-id").filter(|_| !self.downstream.has_head()).map(str::to_string);
        let release =
            || self.prepared.kept.release(&self.messages.counting, &self.prepared.model, env::now());
        let mut stream = Stream {
            downstream: self.downstream,
            content_began: &release,
            lasts: &stack::release,
            head,
            limits: self.messages.limits,
            clock: &env::now,
            scanner: Scanner::new(),
        };
        let ended = stream.run(&mut incoming.into_body());
        let usage = *stream.scanner.usage();
        let mut end = self.streamed(ended, marks, token.expose());
        end.report.usage = usage;
        end.report.status.get_or_insert(status);
        end.report.request_id = given_id;
        end
    }

    #[inline(never)]
    fn streamed(&self, ended: StreamEnded, marks: Marks<'_>, token: &str) -> Box<End> {
        match ended {
            StreamEnded::Complete => {
                let keeps = self.downstream.is_chunked();
                let ending = if keeps { Ending::Whole } else { Ending::Broken };
                End::answered(ending, Outcome::Completed)
            }
            StreamEnded::ErrorEvent { kind, data } => {
                let status = status_of_error_type(&kind);
                let outcome = Outcome::ErrorEvent { status };
                let limited_by = Kind::named_by(&outcome, &data);
                let why = format!("{} began with an error event: {kind}", marks.endpoint);
                let data = match present(status, Some("application/json"), &data, token, self.id) {
                    Presented::Masked(masked) => masked,
                    _ => data,
                };
                let failure = Failure::Event { status, data, endpoint: marks.endpoint.to_string() };
                let mut end = End::failed(failure, outcome, why);
                end.report.limited_by = limited_by;
                end
            }
            StreamEnded::BrokeBeforeContent(why) => self.broke_before(marks.endpoint, &why),
            StreamEnded::SilentBeforeContent => self.silent_before(marks.endpoint),
            StreamEnded::BrokeAfterContent(why) => broke_after(marks.endpoint, &why),
            StreamEnded::ClientGone => self.client_gone(),
        }
    }

    #[inline(never)]
    fn body(&self, incoming: Incoming, marks: Marks<'_>, workspace: &Workspace) -> Box<End> {
        let status = incoming.status;
        let announced = incoming.length();
        let given_id = incoming.header("request-id").map(str::to_string);
        let head = heads::relayed(&incoming, marks);
        let make_head = |length: Option<u64>| {
            let length = length.map_or(Length::Streamed, Length::Known);
            [&head, heads::end(length, self.exchange).as_bytes()].concat()
        };
        let relay = Body {
            downstream: self.downstream,
            make_head: &make_head,
            length: announced,
            limits: self.messages.limits,
            clock: &env::now,
        };
        let mut gathered = Vec::new();
        let mut reader: Box<dyn Read> = Box::new(incoming.into_body());
        let mut end = match relay.run(&mut *reader, &mut gathered) {
            BodyEnded::Complete => {
                let is_framed = announced.is_some() || self.downstream.is_chunked() || is_whole(&gathered);
                let ending = if is_framed { Ending::Whole } else { Ending::Broken };
                End::answered(ending, Outcome::Completed)
            }
            BodyEnded::WebPage => self.web_page(workspace),
            BodyEnded::BrokeBeforeContent(why) => self.broke_before(marks.endpoint, &why),
            BodyEnded::SilentBeforeContent => self.silent_before(marks.endpoint),
            BodyEnded::BrokeAfterContent(why) => broke_after(marks.endpoint, &why),
            BodyEnded::ClientGone => self.client_gone(),
        };
        end.report.usage = usage_of_message(&gathered).unwrap_or_default();
        end.report.status.get_or_insert(status);
        end.report.request_id = given_id;
        end
    }

    fn web_page(&self, workspace: &Workspace) -> Box<End> {
        let why = format!(
            "{} answered with a web page instead of the API: a login page or a captive portal; check api_base and \
             the network",
            workspace.name
        );
        End::failed(Failure::local(502, &why), Outcome::WebPage, why)
    }

    fn broke_before(&self, endpoint: &str, why: &str) -> Box<End> {
        let why = format!("the answer of {endpoint} broke off: {why}");
        End::failed(Failure::local(502, &why), Outcome::BrokeBeforeContent, why)
    }

    fn silent_before(&self, endpoint: &str) -> Box<End> {
        let seconds = self.messages.limits.idle.as_secs_f64();
        let why = format!("{endpoint} fell silent for {seconds} s");
        End::failed(Failure::local(504, &why), Outcome::FirstByteTimeout, why)
    }

    fn client_gone(&self) -> Box<End> {
        End::answered(Ending::Broken, Outcome::ClientGone)
    }
}

/// What an error body says, for the operator. A 400 may quote the prompt, so only others are shown.
fn said(status: u16, body: &[u8]) -> String {
    const LONGEST: usize = 200;
    match error_of(body) {
        Some((_, message)) if matches!(status, 401 | 403 | 404 | 429 | 500..) && !message.is_empty() => {
            format!(" ({})", message.chars().take(LONGEST).collect::<String>())
        }
        _ => String::new(),
    }
}

fn broke_after(endpoint: &str, why: &str) -> Box<End> {
    let why = format!("the answer of {endpoint} broke off after content: {why}");
    let mut end = End::answered(Ending::Broken, Outcome::BrokeAfterContent);
    end.report.why = why;
    end
}

fn is_whole(gathered: &[u8]) -> bool {
    gathered.len() < crate::relay::body::GATHERED_BYTES_MAX
}

/// A body that ends at some moment, whole or not.
struct Until<R, C> {
    body: R,
    until: Instant,
    clock: C,
}

impl<R: Read, C: Fn() -> Instant> Read for Until<R, C> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if (self.clock)() >= self.until { Ok(0) } else { self.body.read(buffer) }
    }
}

/// What a request can bear while nothing has come from the workspace.
pub(super) struct Patience {
    pub(super) downstream: Rc<Downstream>,
    pub(super) limits: Limits,
    pub(super) until: Instant,
    /// For streams: the head that a heartbeat may commit to.
    pub(super) heartbeat_head: Option<Vec<u8>>,
}

impl Wait for Patience {
    fn tick(&self) -> Result<(), Abort> {
        let now = env::now();
        if self.downstream.is_gone() {
            return Err(Abort::ClientGone);
        }
        if now >= self.until {
            return Err(Abort::FirstByte);
        }
        match &self.heartbeat_head {
            Some(head) if self.downstream.is_heartbeat_due(self.limits, now) => {
                self.downstream.ping(head, now).map_err(|_| Abort::ClientGone)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// A byte a second for ever, none of the silences too long, held a request until its client gave up.
    #[test]
    fn a_body_that_trickles_ends_when_its_time_is_over() {
        let (start, passed) = (env::now(), Cell::new(Duration::ZERO));
        let clock = || {
            passed.set(passed.get() + Duration::from_secs(1));
            start + passed.get()
        };
        let mut body = Until { body: std::io::repeat(b'y'), until: start + ERROR_BODY_TIME, clock };
        let read = (0..100).take_while(|_| body.read(&mut [0; 1]).unwrap() == 1).count();
        assert_eq!(read, 4);
    }
}
