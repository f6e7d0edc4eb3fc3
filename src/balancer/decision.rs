//! What the balancer saw when it chose: every endpoint with its load, or why it was out. This is both what the choice is
//! made from and what /explain shows of it. Collected under the balancer's lock as plain numbers; words are made of them
//! outside, and only when somebody asks.

use std::sync::Arc;
use std::time::Instant;

use super::affinity;
use super::breaker::State;
use super::cooldown::Reason;
use super::limits::{Kind, Room};
use super::strategy::{Candidate, Strategy};
use super::{Ask, Inner, Member, Why};

/// Endpoints of one decision that are kept for /explain.
const KEPT_MAX: usize = 32;

/// Why an endpoint cannot be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Out {
    /// Its weight is 0.
    WeightZero,
    /// It does not list the model.
    ModelNotListed,
    /// It, or the model on it, is kept out.
    Held {
        /// Every model is, not only this one.
        is_whole: bool,
        /// Why.
        reason: Reason,
    },
    /// Its breaker is open.
    CircuitOpen,
    /// This request has tried it.
    Tried,
    /// It has as many requests as it may have at once.
    Full,
    /// The request would exceed one of its configured limits.
    AtLimit(Kind),
    /// It has such limits, and somebody who came earlier waits for room.
    BehindOthers,
    /// It would rise above what 429s have taught, and there is one that would not, or that can be waited for.
    AboveLearnedLimit,
    /// It is half-open and its trial is running.
    TrialRunning,
    /// Its last result was bad, and there is one for this retry whose last result was good.
    LastResultBad,
}

impl Out {
    /// The words shown in /explain and under `affinity.moved_because` in /stats.
    pub const WORDS: [&'static str; 17] = [
        "weight_zero",
        "model_not_listed",
        "rate_limited",
        "overloaded",
        "model_unavailable",
        "asked_to_wait",
        "no_token",
        "credential_rejected",
        "address_blocked",
        "circuit_open",
        "tried_before",
        "at_max_concurrent",
        "at_limit",
        "behind_others",
        "above_learned_limit",
        "trial_running",
        "last_result_bad",
    ];

    /// One of [`Out::WORDS`].
    pub fn word(self) -> &'static str {
        match self {
            Out::WeightZero => "weight_zero",
            Out::ModelNotListed => "model_not_listed",
            Out::Held { reason, .. } => reason.word(),
            Out::CircuitOpen => "circuit_open",
            Out::Tried => "tried_before",
            Out::Full => "at_max_concurrent",
            Out::AtLimit(_) => "at_limit",
            Out::BehindOthers => "behind_others",
            Out::AboveLearnedLimit => "above_learned_limit",
            Out::TrialRunning => "trial_running",
            Out::LastResultBad => "last_result_bad",
        }
    }

    /// A conversation leaves an endpoint that is out for this, and only makes a detour around the others.
    pub(super) fn moves_conversations(self) -> bool {
        match self {
            Out::WeightZero | Out::ModelNotListed | Out::Held { .. } | Out::CircuitOpen => true,
            Out::TrialRunning => true,
            Out::Tried | Out::Full | Out::LastResultBad => false,
            Out::AtLimit(_) | Out::BehindOthers | Out::AboveLearnedLimit => false,
        }
    }

    /// There is no room for the request yet, and nothing else in its way.
    pub(super) fn is_no_room(self) -> bool {
        matches!(self, Out::AtLimit(_) | Out::BehindOthers | Out::AboveLearnedLimit)
    }
}

/// One endpoint at the moment of a decision.
#[derive(Debug, Clone, Copy)]
pub struct Considered {
    /// Its place, load and weight.
    pub candidate: Candidate,
    /// Why it could not be chosen; `None` if it could.
    pub out: Option<Out>,
    /// When that ends, if it is known.
    pub back_at: Option<Instant>,
    /// This request had tried it.
    pub is_tried: bool,
}

/// What session affinity made of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// It is off, or the request names no conversation.
    NoSession,
    /// The conversation was bound here for the first time, or again after its cache had gone cold.
    New,
    /// It stayed where it is bound.
    Hit,
    /// It went elsewhere this once, because that endpoint had too much to do or had been tried.
    Detour,
    /// It was bound anew, because that endpoint was out.
    Move,
}

impl Course {
    /// The word shown in /explain.
    pub fn word(self) -> &'static str {
        match self {
            Course::NoSession => "no_session",
            Course::New => "new",
            Course::Hit => "hit",
            Course::Detour => "detour",
            Course::Move => "move",
        }
    }
}

/// Where the conversation of a request was bound when it asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// Nowhere.
    None,
    /// At the endpoint of this place.
    At(usize),
    /// At an endpoint that is no longer configured.
    Removed,
}

/// One decision.
#[derive(Debug, Clone)]
pub struct Decision {
    /// When it was made.
    pub at: Instant,
    /// By which strategy.
    pub strategy: Strategy,
    /// The endpoints it was made among, by [`Candidate::index`].
    pub considered: Vec<Considered>,
    /// How many more there were than are kept here.
    pub more: usize,
    /// Where the conversation was bound.
    pub home: Home,
    /// What became of that.
    pub course: Course,
    /// Who was chosen.
    pub chosen: Option<usize>,
    /// Why nobody was.
    pub refused: Option<Why>,
    /// The only endpoint was asked once more.
    pub is_repeat: bool,
    /// The request had waited long enough for what was only learned of limits.
    pub insists: bool,
    names: Arc<[Box<str>]>,
}

impl Decision {
    /// The name of the endpoint at this place.
    pub fn name(&self, index: usize) -> &str {
        self.names.get(index).map_or("-", |name| name)
    }

    /// What the decision knew of the endpoint at this place.
    pub fn of(&self, index: usize) -> Option<&Considered> {
        self.considered.iter().find(|one| one.candidate.index == index)
    }

    /// Why the endpoint that the conversation was bound to was out; `None` if it was not, or is gone.
    pub fn home_out(&self) -> Option<Out> {
        let Home::At(index) = self.home else { return None };
        self.of(index)?.out
    }

    /// The most that the endpoint at this place may have to do, this request included, before conversations that are
    /// bound to it make detours; in thousandths of a request.
    pub fn stay_limit(&self, index: usize) -> Option<u64> {
        let weight = self.of(index)?.candidate.weight;
        let (total, weights) = totals(&self.candidates());
        Some(affinity::stay_limit(total, weight, weights))
    }

    /// Those who could be chosen.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let able = self.considered.iter().filter(|one| one.out.is_none());
        able.map(|one| one.candidate).collect()
    }

    /// Forgets what would take too much memory: the chosen one, the bound one and the first of the others stay.
    pub(super) fn trim(&mut self) {
        if self.considered.len() <= KEPT_MAX {
            return;
        }
        let home = if let Home::At(index) = self.home { Some(index) } else { None };
        let all = self.considered.len();
        let mut others = KEPT_MAX - 2;
        let chosen = self.chosen;
        self.considered.retain(|one| {
            let index = Some(one.candidate.index);
            let is_kept = index == chosen || index == home || others > 0;
            others -= usize::from(is_kept && index != chosen && index != home);
            is_kept
        });
        self.considered.shrink_to_fit();
        self.more += all - self.considered.len();
    }
}

/// The whole load of the candidates with the new request, and their whole weight.
pub(super) fn totals(candidates: &[Candidate]) -> (u64, u64) {
    let total = 1000 + candidates.iter().map(Candidate::load).sum::<u64>();
    (total, candidates.iter().map(|candidate| candidate.weight).sum())
}

impl<T> Inner<T> {
    /// Looks at every endpoint. A half-open one takes one trial at a time while somebody else can serve, and everything
    /// when nobody can.
    pub(super) fn consider(&self, ask: Ask<'_>, now: Instant) -> Decision {
        let is_behind = self.line.is_behind(ask.model, ask.place);
        let one = |(index, member): (usize, &Member<T>)| {
            let (out, back_at) =
                member.out(ask, is_behind, now).map_or((None, None), |(out, at)| (Some(out), at));
            let awaited = match self.settings.session_affinity {
                true => member.returns.expected_thousandths(now),
                false => 0,
            };
            let candidate = Candidate {
                index,
                active: member.active,
                awaited,
                weight: (u64::from(member.endpoint.weight) * member.breaker.share(now)).max(1),
                recent: member.recent(now),
            };
            Considered { candidate, out, back_at, is_tried: ask.tried.contains(&member.id) }
        };
        let mut considered: Vec<Considered> = self.members.iter().enumerate().map(one).collect();
        // Room comes in a moment; a broken endpoint is no place to wait for it.
        if considered.iter().all(|one| one.out.is_some_and(|out| !out.is_no_room())) {
            let trials = considered.iter_mut().filter(|one| one.out == Some(Out::TrialRunning));
            trials.for_each(|one| one.out = None);
        }
        self.prefer_room(&mut considered, ask, now);
        Decision {
            at: now,
            strategy: self.settings.strategy,
            considered,
            more: 0,
            home: Home::None,
            course: Course::NoSession,
            chosen: None,
            refused: None,
            is_repeat: false,
            insists: ask.insists,
            names: Arc::clone(&self.names),
        }
    }

    /// A retry goes to those whose last result was good, if there are any.
    pub(super) fn prefer_the_good(&self, decision: &mut Decision) {
        let is_good = |one: &Considered| self.members[one.candidate.index].last_was_good;
        if decision.considered.iter().any(|one| one.out.is_none() && is_good(one)) {
            let doubtful = decision.considered.iter_mut().filter(|one| one.out.is_none() && !is_good(one));
            doubtful.for_each(|one| one.out = Some(Out::LastResultBad));
        }
    }
}

impl<T> Member<T> {
    /// Why it cannot take this request, and when that ends. What lasts longest comes first.
    fn out(&self, ask: Ask<'_>, is_behind: bool, now: Instant) -> Option<(Out, Option<Instant>)> {
        if self.endpoint.weight == 0 {
            return Some((Out::WeightZero, None));
        }
        if !self.endpoint.serves(ask.model) {
            return Some((Out::ModelNotListed, None));
        }
        let state = self.breaker.state(now);
        let open = if let State::Open { until } = state { Some(until) } else { None };
        if let Some(held) = self.cooldowns.hold(ask.model, now).filter(|held| Some(held.until) >= open) {
            let out = Out::Held { is_whole: held.is_whole, reason: held.reason };
            return Some((out, Some(held.until)));
        }
        if open.is_some() {
            return Some((Out::CircuitOpen, open));
        }
        if ask.tried.contains(&self.id) {
            return Some((Out::Tried, None));
        }
        if !self.has_room() {
            return Some((Out::Full, None));
        }
        if let Room::Full { until, kind } = self.room(ask, now) {
            return Some((Out::AtLimit(kind), Some(until)));
        }
        if is_behind && self.is_limited(ask.model) {
            return Some((Out::BehindOthers, None));
        }
        let waits = state == State::HalfOpen && !self.breaker.trial_is_free(now);
        waits.then_some((Out::TrialRunning, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_word() {
        let held = |reason| Out::Held { is_whole: true, reason };
        let all = [
            Out::WeightZero,
            Out::ModelNotListed,
            held(Reason::Limited),
            held(Reason::Overloaded),
            held(Reason::ModelUnavailable),
            held(Reason::AskedToWait),
            held(Reason::NoToken),
            held(Reason::Rejected),
            held(Reason::AddressBlocked),
            Out::CircuitOpen,
            Out::Tried,
            Out::Full,
            Out::AtLimit(Kind::Input),
            Out::BehindOthers,
            Out::AboveLearnedLimit,
            Out::TrialRunning,
            Out::LastResultBad,
        ];
        assert_eq!(all.map(Out::word), Out::WORDS);
    }
}
