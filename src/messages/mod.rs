//! The main path: the life of one message request.
//!
//! Prepare once, then attempt after attempt until one has given the client its answer, or until the rules say that
//! the client must see how the last one failed. Reads from top to bottom in that order:
//! `prepare` the bytes, take a lease, give its endpoint a `turn` (an `attempt`, or more when it refuses a field), settle
//! the lease with the outcome, ask [`retry`] what follows, and at the end write the access line and learn
//! from the tokens that a whole answer reports.
//!
//! Here and below, what a stream does not need while it runs has frames of its own (`#[inline(never)]`): a worker's
//! stack is held for minutes, and a page of it is a tenth of what a stream takes.

mod attempt;
pub mod counting;
mod heads;
mod kept;
pub mod learned;
mod notices;
mod prepare;
mod room;
mod surface;
mod turn;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::access::Record;
use crate::anthropic::model::{Families, map_model};
use crate::anthropic::sse::Usage;
use crate::anthropic::{body, tokens};
use crate::balancer::limits::Kind;
use crate::balancer::{Balancer, EndpointId, Lease};
use crate::env;
use crate::explain::{Attempt, Explained, Explanations};
use crate::front::{Body, Ending, Exchange};
use crate::outcome::Outcome;
use crate::relay::{Downstream, Limits};
use crate::retry::{self, Next};
use crate::upstream::Workspace;
use attempt::{Attempted, End};
use counting::Counting;
use kept::Kept;
use prepare::Prepared;
use room::{Nobody, Seeker};
use surface::Surface;
use turn::{Turn, Turned};

pub use room::Waiting;
pub use turn::Compat;

/// What all message requests share.
pub struct Messages {
    /// The endpoints.
    pub balancer: Arc<Balancer<Workspace>>,
    /// Names of our own choosing for models, globs first.
    pub map: Vec<(String, String)>,
    /// Where a family name leads that says no usable version.
    pub families: Families,
    /// Attempts for one request, at most.
    pub max_attempts: u32,
    /// The longest wait for an attempt's status.
    pub first_byte: Duration,
    /// Silence, and when to fill it.
    pub limits: Limits,
    /// What is left out of requests.
    pub compat: Compat,
    /// What each model makes of a text.
    pub counting: Arc<Counting>,
    /// Why the last requests went where they went.
    pub explanations: Arc<Explanations>,
    /// When no endpoint has room.
    pub waiting: Waiting,
}

impl Messages {
    /// Serves one request and writes its access line.
    pub fn serve(&self, exchange: &Exchange, body: Body) -> Ending {
        let mut record = Record::new(exchange, env::request_id(), env::now());
        let is_chunked = !exchange.head.is_http_1_0();
        let downstream = Rc::new(Downstream::new(exchange.client.clone(), is_chunked, env::now()));
        let prepared = prepare::prepare(self, exchange, body);
        let ending = match &prepared {
            Ok(prepared) => {
                record.asked = prepared.facts.model.clone();
                record.served = prepared.model.clone();
                record.is_stream = prepared.facts.stream;
                self.run(exchange, prepared, &downstream, &mut record)
            }
            Err(refusal) => {
                let surface = Surface { exchange, downstream: &downstream };
                surface.refusal(refusal, &mut record)
            }
        };
        self.conclude(record, prepared.as_ref().ok(), &downstream);
        ending
    }

    /// Logs and learns. Apart, as all that a stream need not carry on its stack for minutes.
    #[inline(never)]
    fn conclude(&self, record: Record<'_>, prepared: Option<&Prepared<'_>>, downstream: &Downstream) {
        let explained = record.finish(downstream.body_bytes(), downstream.first_at(), env::now());
        if let Some(prepared) = prepared {
            self.learn(&prepared.kept, &explained);
        }
        self.explanations.keep(explained);
    }

    /// How many input tokens a request body has for its model; the error is a sentence for a 400.
    pub fn count_tokens(&self, body: &[u8]) -> Result<u64, String> {
        let estimate = tokens::estimate(body)?;
        let factor = match body::scan(body) {
            Ok(facts) => self.counting.factor(&map_model(&facts.model, &self.map, &self.families)),
            // Without a model nothing is known.
            Err(_) => tokens::UNTAUGHT,
        };
        Ok(estimate.tokens(factor))
    }

    /// Compares the tokens that a complete answer reports with our count of them.
    fn learn(&self, kept: &Kept, explained: &Explained) {
        let is_complete = |attempt: &Attempt| matches!(attempt.outcome, Some(Outcome::Completed));
        let Some(reported) = explained.usage.whole_input() else { return };
        let model = &explained.served;
        if !explained.trace.attempts().last().is_some_and(is_complete) {
            return;
        }
        kept.release(&self.counting, model, explained.ended_at);
        if let Some(estimate) = kept.estimate() {
            self.counting.observe(model, estimate, reported);
        }
    }

    /// Attempt after attempt.
    fn run(
        &self,
        exchange: &Exchange,
        prepared: &Prepared<'_>,
        downstream: &Rc<Downstream>,
        record: &mut Record<'_>,
    ) -> Ending {
        let surface = Surface { exchange, downstream };
        let mut tried = Vec::new();
        let seeker = Seeker { messages: self, exchange, prepared, downstream, since: Cell::new(None) };
        let mut lease = match seeker.find(&tried, record) {
            Ok(lease) => lease,
            Err(Nobody::Unavailable(nobody)) => {
                let shortages = self.balancer.shortages(prepared.ask(&tried), env::now());
                return surface.unavailable(nobody, &shortages, prepared, record);
            }
            Err(Nobody::ClientGone) => {
                record.is_client_gone = true;
                return Ending::Broken;
            }
        };
        loop {
            tried.push(lease.id());
            let turn = Turn { messages: self, exchange, prepared, downstream, lease: &lease };
            let Turned { end, is_final } = turn.run(record);
            self.settle(lease, &end);
            let next = match is_final {
                true => Next::Surface,
                false => retry::next(&end.outcome, tried.len() as u32, self.max_attempts),
            };
            let failure = match end.attempted {
                Attempted::Answered(ending) => return ending,
                Attempted::Failed(failure) => failure,
            };
            lease = match self.next_lease(next, &tried, &seeker, record) {
                Some(lease) => lease,
                None if record.is_client_gone => return Ending::Broken,
                None => {
                    let soonest = self.balancer.soonest(prepared.ask(&tried), env::now());
                    return surface.failure(failure, soonest, record);
                }
            };
        }
    }

    /// Gives the slot back and logs what changed.
    #[inline(never)]
    fn settle(&self, mut lease: Lease<Workspace>, end: &End) {
        lease.reported(end.report.usage);
        lease.limited_by(end.report.limited_by);
        for notice in lease.finish(&end.outcome, env::now()) {
            notices::log(&notice, &end.report.why);
        }
    }

    /// The endpoint for another attempt, or `None` when the client must see the failure or has left.
    #[inline(never)]
    fn next_lease(
        &self,
        next: Next,
        tried: &[EndpointId],
        seeker: &Seeker<'_>,
        record: &mut Record<'_>,
    ) -> Option<Lease<Workspace>> {
        if next == Next::Surface {
            return None;
        }
        match seeker.find(tried, record) {
            Ok(lease) => return Some(lease),
            Err(Nobody::ClientGone) => {
                record.is_client_gone = true;
                return None;
            }
            Err(Nobody::Unavailable(_)) => {}
        }
        let (only, ask) = (tried[0], seeker.prepared.ask(tried));
        let may_repeat =
            next == Next::OtherOrSame && tried.len() == 1 && self.balancer.is_only_one(ask.model);
        // Not while it is out: then the client learns it at once.
        let may_repeat = may_repeat && self.balancer.can_take(only, ask, env::now());
        if !may_repeat {
            return None;
        }
        if !pause(retry::same_endpoint_pause(&mut env::rng()), seeker.downstream) {
            record.is_client_gone = true;
            return None;
        }
        let (lease, decision) = self.balancer.pick_again(only, ask, env::now())?;
        record.decided(decision);
        Some(lease)
    }
}

/// Waits before the only endpoint is asked again. False when the client leaves meanwhile.
fn pause(length: Duration, downstream: &Downstream) -> bool {
    const STEP: Duration = Duration::from_millis(50);
    let until: Instant = env::now() + length;
    while env::now() < until {
        if downstream.is_gone() {
            return false;
        }
        env::sleep(STEP.min(until.saturating_duration_since(env::now())));
    }
    true
}

/// What an attempt tells beyond its outcome.
#[derive(Debug, Default)]
struct Report {
    /// In words, for the log: what failed.
    why: String,
    /// The status the client was or would have been shown.
    status: Option<u16>,
    /// The workspace's own name for the request, if the client was shown it.
    request_id: Option<String>,
    /// Tokens, as far as the workspace told.
    usage: Usage,
    /// The limit that a 429 named.
    limited_by: Option<Kind>,
    /// When the workspace's status was known.
    head_at: Option<Instant>,
}
