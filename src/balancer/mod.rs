//! The shared truth about the endpoints, behind one mutex: who is busy, broken, cooling, and who comes next.
//!
//! [`Balancer::pick`] chooses and counts under one lock and hands out a [`Lease`]; [`Lease::finish`] gives it back
//! with an outcome. A lease that is dropped for any other reason, such as a panic, releases its slot and blames nobody.
//! Inside the lock there is no I/O, no logging and no clock: `now` is an argument, and whatever deserves a log line is
//! returned as a [`Notice`].

pub mod affinity;
pub mod breaker;
pub mod cooldown;
mod lease;
pub mod strategy;
mod view;
mod window;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::anthropic::model::glob_matches;
use crate::retry;
use affinity::{Affinity, Returns, Session};
use breaker::{Breaker, State};
use cooldown::{Cooldowns, Parked, Recovered};
use strategy::{Candidate, Strategy};

pub use lease::Lease;
pub use view::EndpointView;

/// How fast recent use fades.
const RECENT_HALF_LIFE: Duration = Duration::from_secs(60);

/// How to balance.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How to choose among the eligible endpoints.
    pub strategy: Strategy,
    /// Conversations stay with the endpoint that has their prompt cache.
    pub session_affinity: bool,
    /// When an endpoint is taken out.
    pub breaker: breaker::Settings,
}

/// One endpoint, as the balancer needs it. `payload` is what the caller does its work with.
#[derive(Debug, Clone)]
pub struct Endpoint<T> {
    /// Unique name.
    pub name: String,
    /// Where it is. Name and address together make it the same endpoint across a reload.
    pub address: String,
    /// Relative share; 0 means no new traffic.
    pub weight: u32,
    /// The most requests at once.
    pub max_concurrent: Option<u32>,
    /// Globs of the models it serves; empty means all.
    pub models: Vec<String>,
    /// Handed out with each lease.
    pub payload: Arc<T>,
}

impl<T> Endpoint<T> {
    fn serves(&self, model: &str) -> bool {
        self.weight > 0
            && (self.models.is_empty() || self.models.iter().any(|glob| glob_matches(glob, model)))
    }
}

/// Names one endpoint for as long as it is configured; never used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointId(u64);

#[cfg(test)]
impl EndpointId {
    /// Any number, for tests of rooms that only compare.
    pub const fn for_tests(number: u64) -> Self {
        Self(number)
    }
}

/// What a request needs.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The model as the workspaces call it.
    pub model: &'a str,
    /// Endpoints this request has tried, by [`Lease::id`].
    pub tried: &'a [EndpointId],
    /// The conversation it belongs to.
    pub session: Option<Session>,
}

/// Nobody can take the request now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unavailable {
    /// When the first endpoint may be back, if that is known.
    pub soonest: Option<Duration>,
    /// Why.
    pub why: Why,
}

/// Why nobody can take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No configured endpoint serves this model.
    NoneServesModel,
    /// Every endpoint rests for this model after 429 or 529.
    AllCooling,
    /// Broken, busy, parked, or tried already.
    AllOut,
    /// An endpoint is there, but too many doubtful retries are running.
    RetryBudget,
}

/// Something that changed and deserves a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The endpoint's name.
    pub endpoint: String,
    /// What changed.
    pub change: Change,
}

/// What changed about an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Its breaker.
    Breaker(breaker::Change),
    /// It, or a model on it, was put aside.
    Parked(Parked),
    /// It, or a model on it, was put aside and works again.
    Recovered(Recovered),
}

struct Member<T> {
    id: EndpointId,
    endpoint: Endpoint<T>,
    breaker: Breaker,
    cooldowns: Cooldowns,
    active: usize,
    total: u64,
    errors: u64,
    last_was_good: bool,
    recent: f64,
    recent_at: Instant,
    returns: Returns,
}

impl<T> Member<T> {
    fn new(id: EndpointId, endpoint: Endpoint<T>, now: Instant) -> Self {
        Self {
            id,
            endpoint,
            breaker: Breaker::default(),
            cooldowns: Cooldowns::default(),
            active: 0,
            total: 0,
            errors: 0,
            last_was_good: true,
            recent: 0.0,
            recent_at: now,
            returns: Returns::default(),
        }
    }

    fn recent(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.recent_at).as_secs_f64();
        self.recent * (-age / RECENT_HALF_LIFE.as_secs_f64()).exp2()
    }

    fn has_room(&self) -> bool {
        self.endpoint.max_concurrent.is_none_or(|most| self.active < most as usize)
    }
}

struct Inner<T> {
    members: Vec<Member<T>>,
    credit: Vec<i64>,
    settings: Settings,
    rng: fastrand::Rng,
    doubtful_retries: usize,
    next_id: u64,
    affinity: Affinity,
}

/// The endpoints and their state.
pub struct Balancer<T> {
    inner: Mutex<Inner<T>>,
}

impl<T> Balancer<T> {
    /// All endpoints closed and idle.
    pub fn new(
        settings: Settings,
        endpoints: Vec<Endpoint<T>>,
        rng: fastrand::Rng,
        now: Instant,
    ) -> Arc<Self> {
        let inner = Inner {
            members: Vec::new(),
            credit: Vec::new(),
            settings,
            rng,
            doubtful_retries: 0,
            next_id: 0,
            affinity: Affinity::default(),
        };
        let balancer = Self { inner: Mutex::new(inner) };
        balancer.replace(settings, endpoints, now);
        Arc::new(balancer)
    }

    /// Swaps the configuration. An endpoint with the same name and address keeps its state and its running requests;
    /// one that is gone finishes them and is forgotten. A new payload may mean a new credential, so what was held
    /// against the old one ends.
    pub fn replace(&self, settings: Settings, endpoints: Vec<Endpoint<T>>, now: Instant) {
        let mut inner = self.inner.lock();
        let mut old: Vec<Option<Member<T>>> = inner.members.drain(..).map(Some).collect();
        for endpoint in endpoints {
            let is_same =
                |m: &Member<T>| m.endpoint.name == endpoint.name && m.endpoint.address == endpoint.address;
            let kept = old.iter_mut().find(|m| m.as_ref().is_some_and(is_same)).and_then(Option::take);
            let member = match kept {
                Some(mut member) => {
                    if !Arc::ptr_eq(&member.endpoint.payload, &endpoint.payload) {
                        member.cooldowns.forget_rejection();
                    }
                    member.endpoint = endpoint;
                    member
                }
                None => {
                    inner.next_id += 1;
                    Member::new(EndpointId(inner.next_id), endpoint, now)
                }
            };
            inner.members.push(member);
        }
        inner.credit = vec![0; inner.members.len()];
        inner.settings = settings;
    }

    /// Chooses an endpoint and takes one of its slots. With something in `ask.tried` this is a retry: it goes to an
    /// endpoint whose last result was good if there is one, and any other is charged to the retry budget.
    pub fn pick(self: &Arc<Self>, ask: Ask<'_>, now: Instant) -> Result<Lease<T>, Unavailable> {
        let mut inner = self.inner.lock();
        let session = ask.session.filter(|_| inner.settings.session_affinity);
        if let Some(session) = session {
            inner.came_back(session, now);
        }
        let mut candidates = inner.eligible(ask, now);
        if !ask.tried.is_empty() && candidates.iter().any(|c| inner.members[c.index].last_was_good) {
            candidates.retain(|c| inner.members[c.index].last_was_good);
        }
        let bound = session.map(|session| inner.standing(session, ask, &candidates, now));
        let index = match bound {
            Some(Standing::Free(index) | Standing::Busy(Some(index)) | Standing::Out(Some(index))) => index,
            _ => {
                let Inner { settings, credit, rng, .. } = &mut *inner;
                let chosen = strategy::choose(settings.strategy, &candidates, credit, rng);
                chosen.ok_or_else(|| inner.unavailable(ask.model, now))?
            }
        };
        let is_doubtful = !ask.tried.is_empty() && !inner.members[index].last_was_good;
        if is_doubtful {
            let in_flight: usize = inner.members.iter().map(|m| m.active).sum();
            if inner.doubtful_retries >= retry::budget(in_flight) {
                return Err(Unavailable { soonest: None, why: Why::RetryBudget });
            }
        }
        if let (Some(session), Some(standing)) = (session, bound) {
            inner.note(session, standing, index, now);
        }
        Ok(self.lease(&mut inner, index, ask, is_doubtful, now))
    }

    /// Takes the only endpoint a second time for one request; `None` when it is out by now. See `retry`.
    pub fn pick_again(self: &Arc<Self>, id: EndpointId, model: &str, now: Instant) -> Option<Lease<T>> {
        let mut inner = self.inner.lock();
        let ask = Ask { model, tried: &[], session: None };
        let candidates = inner.eligible(ask, now);
        let index = candidates.iter().map(|c| c.index).find(|&index| inner.members[index].id == id)?;
        let in_flight: usize = inner.members.iter().map(|m| m.active).sum();
        let may = inner.doubtful_retries < retry::budget(in_flight);
        may.then(|| self.lease(&mut inner, index, ask, true, now))
    }

    /// True when this endpoint could take another request for this model now.
    pub fn can_take(&self, id: EndpointId, model: &str, now: Instant) -> bool {
        let inner = self.inner.lock();
        inner
            .eligible(Ask { model, tried: &[], session: None }, now)
            .iter()
            .any(|c| inner.members[c.index].id == id)
    }

    /// True when exactly one configured endpoint serves this model.
    pub fn is_only_one(&self, model: &str) -> bool {
        self.inner.lock().members.iter().filter(|m| m.endpoint.serves(model)).count() == 1
    }

    /// When the first endpoint may be back for this model; zero when one is free now.
    pub fn soonest(&self, model: &str, now: Instant) -> Option<Duration> {
        self.inner.lock().soonest(model, now)
    }

    /// True when some endpoint could take a request for some model now.
    pub fn is_usable(&self, now: Instant) -> bool {
        self.inner.lock().members.iter().any(|m| {
            m.endpoint.weight > 0
                && !matches!(m.breaker.state(now), State::Open { .. })
                && m.cooldowns.holds(now).iter().all(|hold| hold.model.is_some())
        })
    }

    /// Closes every breaker, ends every hold and zeroes the error counts. Requests that are running keep their slots.
    pub fn reset(&self) {
        for member in &mut self.inner.lock().members {
            member.breaker.reset();
            member.cooldowns.clear();
            member.errors = 0;
            member.last_was_good = true;
        }
    }

    /// Bindings in force, and how conversations have fared.
    pub fn affinity(&self, now: Instant) -> (usize, affinity::Counts) {
        let inner = self.inner.lock();
        (inner.affinity.len(now), inner.affinity.counts)
    }

    /// The state of every endpoint, in configuration order. Changes nothing.
    pub fn snapshot(&self, now: Instant) -> Vec<EndpointView> {
        self.inner.lock().members.iter().map(|member| EndpointView::of(member, now)).collect()
    }

    fn lease(
        self: &Arc<Self>,
        inner: &mut Inner<T>,
        index: usize,
        ask: Ask<'_>,
        is_doubtful: bool,
        now: Instant,
    ) -> Lease<T> {
        inner.doubtful_retries += usize::from(is_doubtful);
        let member = &mut inner.members[index];
        member.active += 1;
        member.total += 1;
        member.recent = member.recent(now) + 1.0;
        member.recent_at = now;
        Lease {
            ticket: Some(member.breaker.admit()),
            payload: Arc::clone(&member.endpoint.payload),
            model: ask.model.to_string(),
            session: ask.session,
            balancer: Arc::clone(self),
            is_doubtful,
            id: member.id,
            taken_at: now,
        }
    }
}

/// How the endpoint that a conversation is bound to stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It can take the request.
    Free(usize),
    /// It has too much to do, or has just failed this very request: the binding is kept. With the endpoint of the
    /// last detour, if that can take it.
    Busy(Option<usize>),
    /// Broken, cooling, parked or gone: the conversation moves; to the endpoint of the last detour, if that can take it.
    Out(Option<usize>),
    /// There is none.
    Unbound,
}

impl<T> Inner<T> {
    /// The endpoint of a lease, unless a reload took it away meanwhile.
    fn member(&mut self, id: EndpointId) -> Option<&mut Member<T>> {
        self.members.iter_mut().find(|member| member.id == id)
    }

    /// Who may be chosen. A half-open endpoint takes one trial at a time while somebody else can serve, and
    /// everything when nobody can.
    fn eligible(&self, ask: Ask<'_>, now: Instant) -> Vec<Candidate> {
        let free = |(_, m): &(usize, &Member<T>)| {
            m.endpoint.serves(ask.model)
                && m.has_room()
                && m.cooldowns.hold(ask.model, now).is_none()
                && !ask.tried.contains(&m.id)
        };
        let candidate = |(index, m): (usize, &Member<T>)| Candidate {
            index,
            active: m.active,
            awaited: if self.settings.session_affinity { m.returns.expected_thousandths(now) } else { 0 },
            weight: (u64::from(m.endpoint.weight) * m.breaker.share(now)).max(1),
            recent: m.recent(now),
        };
        let of = |wanted: &dyn Fn(&Breaker) -> bool| -> Vec<Candidate> {
            let members = self.members.iter().enumerate().filter(free);
            members.filter(|(_, m)| wanted(&m.breaker)).map(candidate).collect()
        };
        let ready = of(&|b| b.state(now) == State::Closed || b.trial_is_free(now));
        if !ready.is_empty() {
            return ready;
        }
        of(&|b| b.state(now) == State::HalfOpen)
    }

    /// How the endpoint that a conversation is bound to can take this request.
    fn standing(&self, session: Session, ask: Ask<'_>, candidates: &[Candidate], now: Instant) -> Standing {
        let Some(id) = self.affinity.bound(session, now) else { return Standing::Unbound };
        let total = 1000 + candidates.iter().map(Candidate::load).sum::<u64>();
        let weights = candidates.iter().map(|c| c.weight).sum();
        let may_take = |id: EndpointId| {
            let candidate = candidates.iter().find(|c| self.members[c.index].id == id)?;
            affinity::may_stay(candidate.load(), total, candidate.weight, weights).then_some(candidate.index)
        };
        if let Some(index) = may_take(id) {
            return Standing::Free(index);
        }
        let detour = self.affinity.detour(session).and_then(may_take);
        let is_out = self.members.iter().find(|m| m.id == id).is_none_or(|m| {
            !m.endpoint.serves(ask.model)
                || m.cooldowns.hold(ask.model, now).is_some()
                || (m.breaker.state(now) != State::Closed
                    && !candidates.iter().any(|c| self.members[c.index].id == id))
        });
        if is_out { Standing::Out(detour) } else { Standing::Busy(detour) }
    }

    /// The conversation asks again: it is no longer awaited, but here.
    fn came_back(&mut self, session: Session, now: Instant) {
        if let Some((id, answered)) = self.affinity.asks(session)
            && let Some(member) = self.member(id)
        {
            member.returns.came(answered, now);
        }
    }

    /// The conversation was answered by this endpoint: its cache is warm there, and its next request is expected
    /// where it is bound, which is elsewhere after a detour.
    fn answered(&mut self, session: Session, by: EndpointId, now: Instant) {
        self.came_back(session, now);
        self.affinity.used(session, by, now);
        if let Some(id) = self.affinity.answered(session, now)
            && let Some(member) = self.member(id)
        {
            member.returns.await_one(now);
        }
    }

    /// Counts where a conversation's request went, and binds it there unless it is only passing.
    fn note(&mut self, session: Session, standing: Standing, index: usize, now: Instant) {
        let (id, counts) = (self.members[index].id, &mut self.affinity.counts);
        match standing {
            Standing::Free(_) => counts.hits += 1,
            Standing::Busy(_) => {
                counts.detours += 1;
                return self.affinity.note_detour(session, id);
            }
            Standing::Out(_) => counts.moves += 1,
            Standing::Unbound => counts.new += 1,
        }
        self.affinity.bind(session, id, now);
    }

    fn soonest(&self, model: &str, now: Instant) -> Option<Duration> {
        let serving = self.members.iter().filter(|m| m.endpoint.serves(model));
        serving.map(|m| m.back_at(model, now).saturating_duration_since(now)).min()
    }

    fn unavailable(&self, model: &str, now: Instant) -> Unavailable {
        let mut serving = self.members.iter().filter(|m| m.endpoint.serves(model)).peekable();
        if serving.peek().is_none() {
            return Unavailable { soonest: None, why: Why::NoneServesModel };
        }
        let is_cooling =
            |m: &Member<T>| m.cooldowns.hold(model, now).is_some_and(|hold| hold.reason.is_rest());
        let why = if serving.all(is_cooling) { Why::AllCooling } else { Why::AllOut };
        Unavailable { soonest: self.soonest(model, now), why }
    }
}

impl<T> Member<T> {
    /// When it can serve this model again, as far as breaker and holds know.
    fn back_at(&self, model: &str, now: Instant) -> Instant {
        let breaker = match self.breaker.state(now) {
            State::Open { until } => until,
            State::Closed | State::HalfOpen => now,
        };
        self.cooldowns.hold(model, now).map_or(breaker, |hold| hold.until.max(breaker))
    }
}

#[cfg(test)]
mod tests;
