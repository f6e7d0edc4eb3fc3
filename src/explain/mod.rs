//! Why a request went where it went: the last requests with every decision and attempt, for `GET /explain/{request-id}`.
//!
//! Facts are collected as numbers while a request is served, in what [`access`](crate::access) notes of it; words are made
//! of them in `page` and `story`, only when somebody asks. Nothing of a request's or an answer's content is kept, nor what
//! a workspace said in an error.

mod page;
mod story;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::anthropic::sse::Usage;
use crate::balancer::decision::Decision;
use crate::outcome::Outcome;

/// Requests that are kept.
pub const KEPT_MAX: usize = 1000;
/// Decisions of one request that are kept, with their attempts: the first ones, and the last.
const DECISIONS_MAX: usize = 8;
/// Bytes of a text that is kept, such as why a connection failed.
const TEXT_BYTES_MAX: usize = 300;

/// One attempt.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The decision that led to it, counted from 0.
    pub decision: usize,
    /// Its number within the request, counted from 1.
    pub number: usize,
    /// When the workspace was asked.
    pub began_at: Instant,
    /// When its status was known.
    pub head_at: Option<Instant>,
    /// When the attempt was over.
    pub ended_at: Option<Instant>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// In our own words, where the outcome alone does not say it; may be empty.
    pub why: String,
}

/// The decisions and attempts of one request, in their order.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    decisions: Vec<Decision>,
    attempts: Vec<Attempt>,
    /// Decisions in the middle that are not kept.
    left_out: usize,
}

impl Trace {
    /// The balancer has decided.
    pub fn decided(&mut self, decision: Decision) {
        // Most requests have one.
        self.decisions.reserve_exact(1);
        self.decisions.push(decision);
    }

    /// The endpoint that was chosen last is asked.
    pub fn begin_attempt(&mut self, now: Instant) {
        self.attempts.reserve_exact(1);
        self.attempts.push(Attempt {
            decision: self.decisions.len().saturating_sub(1),
            number: self.attempts.len() + 1,
            began_at: now,
            head_at: None,
            ended_at: None,
            outcome: None,
            why: String::new(),
        });
    }

    /// The attempt that was begun last is over.
    pub fn end_attempt(&mut self, outcome: &Outcome, head_at: Option<Instant>, why: &str, now: Instant) {
        let Some(last) = self.attempts.last_mut() else { return };
        (last.head_at, last.ended_at) = (head_at, Some(now));
        last.outcome = Some(outcome.clone());
        // What a workspace said belongs to the client, and where tokens come from to the operator.
        if !matches!(outcome, Outcome::Refused { .. } | Outcome::NoCredential) {
            last.why = cut(why).to_string();
        }
    }

    /// All attempts.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// The name of the endpoint that was asked.
    pub fn endpoint(&self, attempt: &Attempt) -> &str {
        let decision = self.decisions.get(attempt.decision);
        decision.and_then(|decision| Some(decision.name(decision.chosen?))).unwrap_or("-")
    }

    /// Forgets what would take too much memory.
    fn trim(&mut self) {
        let last = self.decisions.len().saturating_sub(1);
        if last < DECISIONS_MAX {
            return;
        }
        let gone = DECISIONS_MAX - 1..last;
        self.left_out = gone.len();
        self.decisions.drain(gone.clone());
        self.decisions.shrink_to_fit();
        self.attempts.retain(|attempt| !gone.contains(&attempt.decision));
        self.attempts.shrink_to_fit();
        for attempt in self.attempts.iter_mut().filter(|attempt| attempt.decision == last) {
            attempt.decision = DECISIONS_MAX - 1;
        }
    }
}

/// One request that has ended.
#[derive(Debug, Clone)]
pub struct Explained {
    /// Our id.
    pub id: String,
    /// The workspace's id, when the client was shown that one; else empty.
    pub shown_id: String,
    /// The model the client asked for; empty when the request was not understood.
    pub asked: String,
    /// The model as the workspaces call it.
    pub served: String,
    /// The client asked for a stream.
    pub is_stream: bool,
    /// The status the client saw.
    pub status: Option<u16>,
    /// The client left while nobody was being asked.
    pub is_client_gone: bool,
    /// What the client was told, when the proxy answered in its own words.
    pub said: String,
    /// When its head was whole.
    pub received_at: Instant,
    /// When a worker took it up.
    pub taken_up_at: Option<Instant>,
    /// When the client got its first byte.
    pub first_at: Option<Instant>,
    /// When it was over.
    pub ended_at: Instant,
    /// Bytes of body the client got.
    pub bytes: u64,
    /// What the workspace reported.
    pub usage: Usage,
    /// Decisions and attempts.
    pub trace: Trace,
}

impl Explained {
    /// A request that was turned away before anything was decided about it.
    pub fn turned_away(id: String, status: u16, said: &str, now: Instant) -> Self {
        Self {
            id,
            shown_id: String::new(),
            asked: String::new(),
            served: String::new(),
            is_stream: false,
            status: Some(status),
            is_client_gone: false,
            said: said.to_string(),
            received_at: now,
            taken_up_at: None,
            first_at: Some(now),
            ended_at: now,
            bytes: 0,
            usage: Usage::default(),
            trace: Trace::default(),
        }
    }

    /// How it ended, in a word of the access line.
    pub fn end(&self) -> &'static str {
        match self.trace.attempts().last() {
            _ if self.is_client_gone => "client_gone",
            Some(attempt) => attempt.outcome.as_ref().map_or("local", Outcome::word),
            None => "refused_here",
        }
    }

    fn has_id(&self, id: &str) -> bool {
        self.id == id || (!self.shown_id.is_empty() && self.shown_id == id)
    }

    fn trim(&mut self) {
        for text in [&mut self.shown_id, &mut self.asked, &mut self.served, &mut self.said] {
            if text.len() > TEXT_BYTES_MAX {
                *text = cut(text).to_string();
            }
        }
        self.trace.trim();
    }
}

/// At most [`TEXT_BYTES_MAX`] bytes of a text.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

/// The last requests.
#[derive(Debug, Default)]
pub struct Explanations {
    /// The oldest first.
    kept: Mutex<VecDeque<Arc<Explained>>>,
}

impl Explanations {
    /// Keeps a request, and forgets the oldest when there are too many.
    pub fn keep(&self, mut explained: Explained) {
        explained.trim();
        let explained = Arc::new(explained);
        let mut kept = self.kept.lock();
        let oldest = if kept.len() >= KEPT_MAX { kept.pop_front() } else { None };
        kept.push_back(explained);
        drop(kept);
        drop(oldest);
    }

    /// The explanation of a request as JSON, by our id or by the workspace's that the client was shown: the newest, if
    /// a workspace gave one id twice. `now` and `wall_clock` are one moment on both clocks.
    pub fn page(&self, id: &str, now: Instant, wall_clock: Duration) -> Option<String> {
        let found = self.kept.lock().iter().rev().find(|explained| explained.has_id(id)).map(Arc::clone);
        found.map(|explained| page::page(&explained, now, wall_clock))
    }

    /// How many are kept now.
    pub fn len(&self) -> usize {
        self.kept.lock().len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests;
