//! From the client's bytes to the bytes that every attempt sends.

use std::borrow::Cow;

use super::Messages;
use crate::anthropic::body::{self, Facts};
use crate::anthropic::model::map_model;
use crate::front::Exchange;
use crate::http::answer::Refusal;
use crate::http::forward;
use crate::upstream::Outgoing;

/// A request, ready to be sent to any workspace.
pub(super) struct Prepared<'a> {
    pub(super) facts: Facts,
    /// The model as the workspaces call it.
    pub(super) model: String,
    body: Cow<'a, [u8]>,
    headers: Vec<(&'a str, &'a str)>,
    query: Option<&'a str>,
}

impl Prepared<'_> {
    /// The same for every attempt.
    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        Outgoing { query: self.query, headers: &self.headers, body: &self.body }
    }
}

/// Scans the body, decides the model, and picks the headers that go along. Nothing but the model's name is changed.
pub(super) fn prepare<'a>(messages: &Messages, exchange: &'a Exchange) -> Result<Prepared<'a>, Refusal> {
    let facts = body::scan(&exchange.body).map_err(|problem| Refusal::new(400, problem.to_string()))?;
    let model = map_model(&facts.model, &messages.map, &messages.families).into_owned();
    let body = match body::splice_model(&exchange.body, &facts, &model) {
        Some(spliced) => Cow::Owned(spliced),
        None => Cow::Borrowed(&exchange.body[..]),
    };
    let head = &exchange.head;
    let connection = head.header("connection");
    let headers = head.headers().filter(|(name, _)| forward::goes_upstream(name, connection)).collect();
    Ok(Prepared { facts, model, body, headers, query: head.query() })
}
