//! The shared truth about the endpoints, behind one mutex: who is busy, broken, cooling, and who comes next.
//!
//! [`Balancer::pick`] chooses and counts under one lock and hands out a [`Lease`]; [`Lease::finish`] gives it back
//! with an outcome. A lease that is dropped for any other reason, such as a panic, releases its slot and blames nobody.
//! Inside the lock there is no I/O, no logging and no clock: `now` is an argument, and whatever deserves a log line is
//! returned as a [`Notice`].

pub mod affinity;
pub mod breaker;
pub mod cooldown;
pub mod decision;
mod lease;
pub mod limits;
mod line;
mod room;
mod standing;
pub mod strategy;
mod view;
mod window;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::anthropic::model::glob_matches;
use crate::anthropic::sse::Usage;
use crate::retry;
use affinity::{Affinity, Returns, Session};
use breaker::{Breaker, State};
use cooldown::{Cooldowns, Parked, Recovered};
use decision::{Decision, Home};
use limits::{Ledgers, Limits, Need};
use line::{Line, Number};
use standing::Standing;
use strategy::Strategy;

pub use lease::Lease;
pub use line::Place;
pub use room::{RETRY_AFTER_MAX, Shortage};
pub use view::{EndpointView, Tokens};

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
    /// How many requests may wait for room at once.
    pub waiting_max: usize,
    /// 429s teach how much a workspace takes.
    pub learns_limits: bool,
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
    /// What each model there may take.
    pub limits: Limits,
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
#[derive(Debug, Clone, Copy, Default)]
pub struct Ask<'a> {
    /// The model as the workspaces call it.
    pub model: &'a str,
    /// Endpoints this request has tried, by [`Lease::id`].
    pub tried: &'a [EndpointId],
    /// The conversation it belongs to.
    pub session: Option<Session>,
    /// How large it is.
    pub need: Need,
    /// Its place among those who wait for room.
    pub place: Option<Number>,
    /// It has waited long enough for what was only learned of limits.
    pub insists: bool,
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
    /// Endpoints are there, but this request would exceed their limits.
    NoRoom {
        /// There may be room before `soonest`, as soon as an answer ends or somebody else leaves the line.
        may_be_sooner: bool,
        /// At one of them only 429s have taught that: it may go there in the end.
        is_learned: bool,
    },
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
    ledgers: Ledgers,
    active: usize,
    total: u64,
    errors: u64,
    last_was_good: bool,
    recent: f64,
    recent_at: Instant,
    returns: Returns,
    tokens: Tokens,
}

impl<T> Member<T> {
    fn new(id: EndpointId, endpoint: Endpoint<T>, now: Instant) -> Self {
        Self {
            id,
            endpoint,
            breaker: Breaker::default(),
            cooldowns: Cooldowns::default(),
            ledgers: Ledgers::default(),
            active: 0,
            total: 0,
            errors: 0,
            last_was_good: true,
            recent: 0.0,
            recent_at: now,
            returns: Returns::default(),
            tokens: Tokens::default(),
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
    /// Their names, for decisions that are kept longer than they.
    names: Arc<[Box<str>]>,
    credit: Vec<i64>,
    settings: Settings,
    rng: fastrand::Rng,
    doubtful_retries: usize,
    next_id: u64,
    affinity: Affinity,
    line: Line,
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
            names: Arc::default(),
            credit: Vec::new(),
            settings,
            rng,
            doubtful_retries: 0,
            next_id: 0,
            affinity: Affinity::default(),
            line: Line::default(),
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
                    member.ledgers.configure(&endpoint.limits);
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
        inner.names = inner.members.iter().map(|member| member.endpoint.name.as_str().into()).collect();
        inner.credit = vec![0; inner.members.len()];
        inner.settings = settings;
    }

    /// Chooses an endpoint and takes one of its slots. With something in `ask.tried` this is a retry: it goes to an
    /// endpoint whose last result was good if there is one, and any other is charged to the retry budget.
    pub fn pick(self: &Arc<Self>, ask: Ask<'_>, now: Instant) -> Result<Lease<T>, Unavailable> {
        self.decide(ask, now).0
    }

    /// [`pick`](Self::pick), and what the choice was made from.
    pub fn decide(self: &Arc<Self>, ask: Ask<'_>, now: Instant) -> (Result<Lease<T>, Unavailable>, Decision) {
        let mut inner = self.inner.lock();
        let session = ask.session.filter(|_| inner.settings.session_affinity);
        let ask = inner.sized(ask);
        if let Some(session) = session {
            inner.came_back(session, now);
        }
        let mut decision = inner.consider(ask, now);
        if !ask.tried.is_empty() {
            inner.prefer_the_good(&mut decision);
        }
        let picked = inner.choose(ask, session, &mut decision, now).map(|(index, is_doubtful)| {
            decision.chosen = Some(index);
            self.lease(&mut inner, index, ask, is_doubtful, now)
        });
        drop(inner);
        decision.refused = picked.as_ref().err().map(|nobody| nobody.why);
        decision.trim();
        (picked, decision)
    }

    /// Takes the only endpoint a second time for one request; `None` when it is out by now. See `retry`.
    pub fn pick_again(
        self: &Arc<Self>,
        id: EndpointId,
        ask: Ask<'_>,
        now: Instant,
    ) -> Option<(Lease<T>, Decision)> {
        let mut inner = self.inner.lock();
        let ask = Ask { tried: &[], session: None, insists: true, ..inner.sized(ask) };
        let mut decision = inner.consider(ask, now);
        let mut candidates = decision.candidates().into_iter().map(|c| c.index);
        let index = candidates.find(|&index| inner.members[index].id == id)?;
        if inner.doubtful_retries >= inner.retry_budget() {
            return None;
        }
        (decision.chosen, decision.is_repeat) = (Some(index), true);
        let lease = self.lease(&mut inner, index, ask, true, now);
        drop(inner);
        decision.trim();
        Some((lease, decision))
    }

    /// True when this endpoint could take this request again now.
    pub fn can_take(&self, id: EndpointId, ask: Ask<'_>, now: Instant) -> bool {
        let inner = self.inner.lock();
        let decision = inner.consider(Ask { tried: &[], insists: true, ..inner.sized(ask) }, now);
        decision.candidates().iter().any(|c| inner.members[c.index].id == id)
    }

    /// True when exactly one configured endpoint serves this model.
    pub fn is_only_one(&self, model: &str) -> bool {
        self.inner.lock().members.iter().filter(|m| m.endpoint.serves(model)).count() == 1
    }

    /// When the first endpoint may be able to take this request, tried or not; zero when one is now.
    pub fn soonest(&self, ask: Ask<'_>, now: Instant) -> Option<Duration> {
        let inner = self.inner.lock();
        inner.soonest(inner.sized(ask), now)
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
            member.ledgers.forget_learned();
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
            charge: member.ledgers.admit(&member.endpoint.limits, ask.model, ask.need, now),
            limited_by: None,
            ticket: Some(member.breaker.admit()),
            payload: Arc::clone(&member.endpoint.payload),
            model: ask.model.to_string(),
            session: ask.session,
            balancer: Arc::clone(self),
            is_doubtful,
            id: member.id,
            taken_at: now,
            usage: Usage::default(),
        }
    }
}

impl<T> Inner<T> {
    /// The endpoint of a lease, unless a reload took it away meanwhile.
    fn member(&mut self, id: EndpointId) -> Option<&mut Member<T>> {
        self.members.iter_mut().find(|member| member.id == id)
    }

    /// Who takes the request, and whether that is a doubtful retry.
    fn choose(
        &mut self,
        ask: Ask<'_>,
        session: Option<Session>,
        decision: &mut Decision,
        now: Instant,
    ) -> Result<(usize, bool), Unavailable> {
        let candidates = decision.candidates();
        decision.home = session.map_or(Home::None, |session| self.home(session, now));
        let bound = session.map(|session| self.standing(session, decision, &candidates));
        let index = match bound {
            Some(Standing::Free(index) | Standing::Busy(Some(index)) | Standing::Out(Some(index))) => index,
            _ => {
                let Inner { settings, credit, rng, .. } = &mut *self;
                let chosen = strategy::choose(settings.strategy, &candidates, credit, rng);
                chosen.ok_or_else(|| self.unavailable(ask, decision, now))?
            }
        };
        let is_doubtful = !ask.tried.is_empty() && !self.members[index].last_was_good;
        if is_doubtful && self.doubtful_retries >= self.retry_budget() {
            return Err(Unavailable { soonest: None, why: Why::RetryBudget });
        }
        if let (Some(session), Some(standing)) = (session, bound) {
            decision.course = self.note(session, standing, decision, index, now);
        }
        Ok((index, is_doubtful))
    }

    /// How many doubtful retries may run now.
    fn retry_budget(&self) -> usize {
        retry::budget(self.members.iter().map(|member| member.active).sum())
    }

    /// What was only learned of limits holds nobody back for as long.
    fn soonest(&self, ask: Ask<'_>, now: Instant) -> Option<Duration> {
        let ask = Ask { insists: true, ..ask };
        let serving = self.members.iter().filter(|m| m.endpoint.serves(ask.model));
        let ready_at = |m: &Member<T>| m.back_at(ask.model, now).max(m.room_at(ask, now));
        serving.map(|m| ready_at(m).saturating_duration_since(now)).min()
    }

    fn unavailable(&self, ask: Ask<'_>, decision: &Decision, now: Instant) -> Unavailable {
        let model = ask.model;
        let mut serving = self.members.iter().filter(|m| m.endpoint.serves(model)).peekable();
        if serving.peek().is_none() {
            return Unavailable { soonest: None, why: Why::NoneServesModel };
        }
        if let Some(no_room) = self.no_room(ask, decision, now) {
            return no_room;
        }
        let is_cooling =
            |m: &Member<T>| m.cooldowns.hold(model, now).is_some_and(|hold| hold.reason.is_rest());
        let why = if serving.all(is_cooling) { Why::AllCooling } else { Why::AllOut };
        Unavailable { soonest: self.soonest(ask, now), why }
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
