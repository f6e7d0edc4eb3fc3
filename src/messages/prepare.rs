//! From the client's bytes to the bytes that every attempt sends.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use super::Messages;
use super::kept::Kept;
use crate::anthropic::body::{self, Facts};
use crate::anthropic::compat::without_adaptive;
use crate::anthropic::edit::{Edit, in_order};
use crate::anthropic::model::{is_4_5_or_older, map_model};
use crate::anthropic::session::session_of_user_id;
use crate::balancer::affinity::Session;
use crate::balancer::limits::Need;
use crate::balancer::{Ask, EndpointId};
use crate::front::{Body, Exchange};
use crate::http::answer::Refusal;
use crate::http::forward;
use crate::http::head::Head;

/// A request, ready to be sent to any workspace.
pub(super) struct Prepared<'a> {
    pub(super) facts: Facts,
    /// The model as the workspaces call it.
    pub(super) model: String,
    /// Of the client's body.
    bytes: u64,
    /// As the client sent it.
    pub(super) kept: Kept,
    /// What is other in it for every workspace.
    pub(super) edits: Arc<[Edit]>,
    /// Those that go along, in wire order.
    pub(super) headers: Vec<(&'a str, &'a [u8])>,
    /// The client's query, without `?`.
    pub(super) query: Option<&'a str>,
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
}

/// Scans the body, decides the model, and picks the headers that go along. Nothing is changed but the model's name, and
/// adaptive thinking for a model that does not know it.
#[inline(never)]
pub(super) fn prepare<'a>(
    messages: &Messages,
    exchange: &'a Exchange,
    body: Body,
) -> Result<Prepared<'a>, Refusal> {
    let facts = body::scan(&body).map_err(|problem| Refusal::new(400, problem.to_string()))?;
    let model = map_model(&facts.model, &messages.map, &messages.families).into_owned();
    let is_too_new = facts.is_adaptive && messages.compat.learns && is_4_5_or_older(&model);
    let older = if is_too_new { without_adaptive(&body) } else { None };
    let is_downgraded = older.is_some();
    let mut edits = older.unwrap_or_default();
    edits.extend(body::rename(&facts, &model));
    let edits = in_order(edits).into();
    let head = &exchange.head;
    let passes = |name: &str| forward::goes_upstream(name, head.connection());
    let headers = head.headers().filter(|(name, _)| passes(name)).collect();
    let session = session(head, &facts, &model);
    let (bytes, query) = (body.len() as u64, head.query());
    let kept = Kept::new(body);
    Ok(Prepared { facts, model, bytes, kept, edits, headers, query, session, is_downgraded })
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
