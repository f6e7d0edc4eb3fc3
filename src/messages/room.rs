//! An endpoint for a request, waited for while none has room.
//!
//! Waiting costs a worker, so only so many requests wait at once, and none for longer than `queue_timeout`. No lock is
//! held meanwhile; a client that leaves is noticed, and a stream is kept alive.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::attempt::Patience;
use super::prepare::Prepared;
use super::{Messages, heads};
use crate::access::Record;
use crate::balancer::{Ask, EndpointId, Lease, Unavailable};
use crate::env;
use crate::front::Exchange;
use crate::relay::Downstream;
use crate::upstream::{Abort, Wait as _, Workspace};

/// How often a waiting request looks again: room comes at moments that are known, and when an answer ends.
const STEP: Duration = Duration::from_millis(20);

/// How many requests wait for room, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// At most; half of the workers.
    pub most: usize,
    /// For one request, all its attempts together.
    pub timeout: Duration,
}

/// Why there is no endpoint.
pub(super) enum Nobody {
    /// None can take it.
    Unavailable(Unavailable),
    /// The client has left.
    ClientGone,
}

/// Finds endpoints for one request.
pub(super) struct Seeker<'a> {
    pub(super) messages: &'a Messages,
    pub(super) exchange: &'a Exchange,
    pub(super) prepared: &'a Prepared<'a>,
    pub(super) downstream: &'a Rc<Downstream>,
    /// When waiting began, once it has.
    pub(super) since: Cell<Option<Instant>>,
}

impl Seeker<'_> {
    /// One that has not been tried. What was decided is noted: at once, and when a wait has ended.
    #[inline(never)]
    pub(super) fn find(
        &self,
        tried: &[EndpointId],
        record: &mut Record<'_>,
    ) -> Result<Lease<Workspace>, Nobody> {
        let ask = self.prepared.ask(tried);
        let (picked, decision) = self.messages.balancer.decide(ask, env::now());
        record.decided(decision);
        let found = picked.or_else(|nobody| self.wait(ask, nobody, record));
        match found {
            Err(Nobody::Unavailable(nobody)) if nobody.may_insist() => {
                let (picked, decision) =
                    self.messages.balancer.decide(Ask { insists: true, ..ask }, env::now());
                record.decided(decision);
                picked.map_err(Nobody::Unavailable)
            }
            found => found,
        }
    }

    fn wait(
        &self,
        ask: Ask<'_>,
        nobody: Unavailable,
        record: &mut Record<'_>,
    ) -> Result<Lease<Workspace>, Nobody> {
        let balancer = &self.messages.balancer;
        let (since, longest) = (self.since.get().unwrap_or_else(env::now), self.messages.waiting.timeout);
        self.since.set(Some(since));
        let place = match nobody.is_worth_waiting(since, longest, env::now()) {
            true => balancer.wait_in_line(ask.model),
            false => None,
        };
        let Some(place) = place else { return Err(Nobody::Unavailable(nobody)) };
        let ask = Ask { place: Some(place.number()), ..ask };
        let patience = Patience {
            downstream: Rc::clone(self.downstream),
            limits: self.messages.limits,
            until: since + longest,
            heartbeat_head: self.prepared.facts.stream.then(|| heads::heartbeat(&record.id, self.exchange)),
        };
        loop {
            let now = env::now();
            let (picked, decision) = balancer.decide(ask, now);
            let nobody = match picked {
                Ok(lease) => {
                    record.decided(decision);
                    return Ok(lease);
                }
                Err(nobody) => nobody,
            };
            match patience.tick() {
                Err(Abort::ClientGone) => return Err(Nobody::ClientGone),
                Ok(()) if nobody.is_worth_waiting(since, longest, now) => env::sleep(STEP),
                _ => {
                    record.decided(decision);
                    return Err(Nobody::Unavailable(nobody));
                }
            }
        }
    }
}
