//! The response heads that a client sees.

use std::borrow::Cow;

use crate::front::Exchange;
use crate::http::answer::{field, finish, start};
use crate::http::forward;
use crate::upstream::Incoming;

/// How the length of an answer's body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    Known(u64),
    /// Chunks, or for HTTP/1.0 the end of the connection.
    Streamed,
}

/// What the proxy adds to an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks<'a> {
    pub(super) request_id: &'a str,
    pub(super) endpoint: &'a str,
    pub(super) attempts: usize,
}

/// The workspace's head: its status and headers, and ours. Its end, with the length, comes from [`end`].
pub(super) fn relayed(incoming: &Incoming, marks: Marks<'_>) -> Vec<u8> {
    let connection = incoming.connection();
    let mut line = String::with_capacity(512);
    start(&mut line, incoming.status);
    let mut head = line.into_bytes();
    let passes = |name: &str| forward::goes_to_client(name, connection.as_deref());
    for (name, value) in incoming.headers().filter(|(name, _)| passes(name)) {
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    let mut ours = String::with_capacity(128);
    if incoming.header("request-id").is_none() {
        field(&mut ours, "request-id", marks.request_id);
    }
    field(&mut ours, "x-claude-lb-endpoint", visible(marks.endpoint));
    field(&mut ours, "x-claude-lb-attempts", marks.attempts);
    head.extend_from_slice(ours.as_bytes());
    head
}

/// The head that a heartbeat commits to before any workspace has answered: which one will is not known yet.
pub(super) fn heartbeat(request_id: &str, exchange: &Exchange) -> Vec<u8> {
    let mut head = String::with_capacity(256);
    start(&mut head, 200);
    field(&mut head, "content-type", "text/event-stream; charset=utf-8");
    field(&mut head, "cache-control", "no-cache");
    field(&mut head, "request-id", request_id);
    head.push_str(&end(Length::Streamed, exchange));
    head.into_bytes()
}

/// A name may be in any script; a header takes visible ASCII. The rest is percent-encoded.
pub(super) fn visible(name: &str) -> Cow<'_, str> {
    if name.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Cow::Borrowed(name);
    }
    let encoded = name.bytes().map(|b| match b {
        b if b.is_ascii_graphic() || b == b' ' => char::from(b).to_string(),
        b => format!("%{b:02X}"),
    });
    Cow::Owned(encoded.collect())
}

/// The end of a head: how long the body is, and whether the connection goes on.
pub(super) fn end(length: Length, exchange: &Exchange) -> String {
    let mut head = String::with_capacity(64);
    match length {
        Length::Known(bytes) => field(&mut head, "content-length", bytes),
        Length::Streamed if exchange.head.is_http_1_0() => {}
        Length::Streamed => field(&mut head, "transfer-encoding", "chunked"),
    }
    let is_unframed = length == Length::Streamed && exchange.head.is_http_1_0();
    finish(&mut head, exchange.closes || is_unframed);
    head
}
