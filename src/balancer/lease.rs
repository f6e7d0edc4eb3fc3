//! One request's place at one endpoint: taken by a pick, given back however the request ends.

use std::sync::Arc;
use std::time::Instant;

use super::affinity::Session;
use super::breaker::Ticket;
use super::limits::{Charge, Kind, density, spent};
use super::{Balancer, Change, EndpointId, Notice, Settings};
use crate::anthropic::sse::Usage;
use crate::outcome::{KeepOut, Outcome, Verdict};

/// One request's place at one endpoint. Finishing consumes it; dropping it releases it and blames nobody.
pub struct Lease<T> {
    pub(super) balancer: Arc<Balancer<T>>,
    pub(super) payload: Arc<T>,
    pub(super) model: String,
    pub(super) session: Option<Session>,
    /// Until the breaker has it back.
    pub(super) ticket: Option<Ticket>,
    pub(super) id: EndpointId,
    pub(super) is_doubtful: bool,
    pub(super) taken_at: Instant,
    pub(super) usage: Usage,
    /// What was noted against the limits of the endpoint.
    pub(super) charge: Option<Charge>,
    pub(super) limited_by: Option<Kind>,
}

impl<T> Lease<T> {
    /// What the caller does its work with.
    pub fn payload(&self) -> &Arc<T> {
        &self.payload
    }

    /// The endpoint, for [`Ask::tried`](super::Ask::tried).
    pub fn id(&self) -> EndpointId {
        self.id
    }

    /// Notes what the answer reported; it is added to the endpoint's tokens when the lease is finished.
    pub fn reported(&mut self, usage: Usage) {
        self.usage = usage;
    }

    /// Notes the limit that the workspace named when it refused the request.
    pub fn limited_by(&mut self, kind: Option<Kind>) {
        self.limited_by = kind;
    }

    /// Gives the slot back and tells how it went. Returns what changed for the log.
    pub fn finish(mut self, outcome: &Outcome, now: Instant) -> Vec<Notice> {
        let blame = outcome.blame();
        let mut inner = self.balancer.inner.lock();
        let Settings { breaker: settings, learns_limits, .. } = inner.settings;
        // A model that is missing everywhere is the client's to hear of, each time.
        let others =
            inner.members.iter().filter(|m| m.id != self.id && m.endpoint.serves(&self.model)).count();
        let keep_out = blame.keep_out.filter(|what| *what != KeepOut::ModelLong || others > 0);
        let (Some(member), Some(ticket)) = (inner.member(self.id), self.ticket.take()) else {
            return Vec::new();
        };
        member.errors += u64::from(blame.is_error);
        member.tokens.add(self.usage);
        let density = self.charge.as_ref().and_then(|charge| density(charge, &self.usage));
        if let Some(charge) = self.charge.take() {
            member.ledgers.settle(&self.model, charge, spent(outcome, &self.usage), now);
        }
        if learns_limits && outcome.is_rate_limit() {
            member.ledgers.limited(&member.endpoint.limits, &self.model, self.limited_by, now);
        }
        let (mut notices, mut used) = (Vec::new(), None);
        let mut notice = |change| notices.push(Notice { endpoint: member.endpoint.name.clone(), change });
        if let Some(change) = member.breaker.settle(ticket, blame.verdict, now, settings) {
            notice(Change::Breaker(change));
        }
        if let Some(parked) = keep_out.and_then(|what| member.cooldowns.keep_out(what, &self.model, now)) {
            if keep_out == Some(KeepOut::Model(None)) && self.limited_by == Some(Kind::Output) {
                member.cooldowns.wants_output(&self.model);
            }
            notice(Change::Parked(parked));
        }
        match blame.verdict {
            Verdict::Success => {
                used = self.session;
                let recovered = member.cooldowns.forgive(&self.model, self.taken_at);
                recovered.into_iter().for_each(|what| notice(Change::Recovered(what)));
                member.last_was_good = true;
            }
            Verdict::Failure | Verdict::Neutral if blame.is_error => member.last_was_good = false,
            Verdict::Failure | Verdict::Neutral => {}
        }
        if let Some(session) = used {
            inner.answered(session, self.id, now);
        }
        if let (Some(session), Some(density)) = (self.session, density) {
            inner.affinity.note_density(session, density);
        }
        drop(inner);
        notices
        // `self` drops here and gives the slot back, as for every other way out.
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        let mut inner = self.balancer.inner.lock();
        inner.doubtful_retries -= usize::from(self.is_doubtful);
        if let Some(member) = inner.member(self.id) {
            member.active -= 1;
            if let Some(ticket) = self.ticket {
                member.breaker.release(ticket);
            }
        }
    }
}
