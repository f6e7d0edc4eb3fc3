//! From the client's bytes to the bytes that every attempt sends.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use super::Messages;
use crate::anthropic::body::{self, Facts};
use crate::anthropic::compat::without_adaptive;
use crate::anthropic::model::{is_4_5_or_older, map_model};
use crate::anthropic::session::session_of_user_id;
use crate::balancer::affinity::Session;
use crate::balancer::limits::Need;
use crate::balancer::{Ask, EndpointId};
use crate::front::Exchange;
use crate::http::answer::Refusal;
use crate::http::forward;
use crate::http::head::Head;
use crate::upstream::{Bytes, Outgoing, Pieces};

/// A request, ready to be sent to any workspace.
pub(super) struct Prepared<'a> {
    pub(super) facts: Facts,
    /// The model as the workspaces call it.
    pub(super) model: String,
    /// Of the client's body.
    bytes: u64,
    body: Pieces,
    headers: Vec<(&'a str, &'a [u8])>,
    query: Option<&'a str>,
    session: Option<Session>,
    /// Adaptive thinking became enabled thinking, because the model is too old for it.
    pub(super) is_downgraded: bool,
}

impl Prepared<'_> {
    /// What the balancer is asked for.
    pub(super) fn ask<'s>(&'s self, tried: &'s [EndpointId]) -> Ask<'s> {
        let need = Need { bytes: self.bytes, max_tokens: self.facts.max_tokens, density: None };
        Ask { model: &self.model, tried, session: self.session, need, place: None, insists: false }
    }

    /// The same for every attempt, but for what an endpoint does not take.
    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        Outgoing { query: self.query, headers: &self.headers, body: &self.body }
    }
}

/// Scans the body, decides the model, and picks the headers that go along. Nothing is changed but the model's name, and
/// adaptive thinking for a model that does not know it.
pub(super) fn prepare<'a>(messages: &Messages, exchange: &'a Exchange) -> Result<Prepared<'a>, Refusal> {
    let facts = body::scan(&exchange.body).map_err(|problem| Refusal::new(400, problem.to_string()))?;
    let model = map_model(&facts.model, &messages.map, &messages.families).into_owned();
    has_memory_for(exchange.body.len())?;
    let is_too_new = facts.is_adaptive && messages.compat.learns && is_4_5_or_older(&model);
    let older = if is_too_new { without_adaptive(&exchange.body) } else { None };
    let is_downgraded = older.is_some();
    let body = match older {
        None => renamed(Arc::clone(&exchange.body) as Bytes, &facts, &model),
        Some(older) => {
            let facts = body::scan(&older).map_err(|problem| Refusal::new(400, problem.to_string()))?;
            renamed(Arc::new(older), &facts, &model)
        }
    };
    let head = &exchange.head;
    let connection = head.header("connection");
    let headers = head.headers().filter(|(name, _)| forward::goes_upstream(name, connection)).collect();
    let session = session(head, &facts, &model);
    let bytes = exchange.body.len() as u64;
    Ok(Prepared { facts, model, bytes, body, headers, query: head.query(), session, is_downgraded })
}

/// The bytes with the model's name in the place of the client's.
fn renamed(bytes: Bytes, facts: &Facts, model: &str) -> Pieces {
    match body::model_token(facts, model) {
        Some(token) => Pieces::exchanged(bytes, facts.model_at.clone(), token.as_bytes()),
        None => Pieces::whole(bytes),
    }
}

/// How long the usual prompt cache and the long one stay warm (Anthropic's documentation on prompt caching).
const CACHE_WARM: Duration = Duration::from_secs(5 * 60);
const LONG_CACHE_WARM: Duration = Duration::from_secs(60 * 60);

/// The conversation that a request belongs to. Sub-agents share the session but have prompts of their own, so the
/// agent counts, and so does the model: each has its own cache. Without a plain session there is no affinity.
fn session(head: &Head, facts: &Facts, model: &str) -> Option<Session> {
    let plain =
        |value: &&str| !value.is_empty() && value.len() <= 128 && value.bytes().all(|b| b.is_ascii_graphic());
    let session = match head.header("x-claude-code-session-id").filter(plain) {
        Some(id) => Cow::Borrowed(id),
        None => Cow::Owned(facts.user_id.as_deref().and_then(session_of_user_id)?),
    };
    let agent = head.header("x-claude-code-agent-id").unwrap_or("main");
    let mut hasher = DefaultHasher::new();
    (&*session, agent, model).hash(&mut hasher);
    let idle = if facts.ttl_1h { LONG_CACHE_WARM } else { CACHE_WARM };
    Some(Session { key: hasher.finish(), idle })
}

/// Asks for the memory that a copy of a large body takes, before it is made: a failed allocation would end the
/// process, and a lack of memory is met here first. Small ones find their place.
fn has_memory_for(bytes: usize) -> Result<(), Refusal> {
    const LARGE: usize = 64 * 1024;
    match bytes < LARGE || Vec::<u8>::new().try_reserve_exact(bytes).is_ok() {
        true => Ok(()),
        false => Err(Refusal::overloaded("the proxy has no memory for this request")),
    }
}
