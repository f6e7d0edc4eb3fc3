//! Which endpoint a conversation belongs to. Pure; the time is an argument.
//!
//! A prompt cache lives in one workspace, and reading from it costs a tenth of the input price. So a conversation is
//! bound to the endpoint it was sent to first, as long as the cache there can be warm: 5 minutes after its last use, or
//! 60 when the request asks for the long cache (`"ttl":"1h"`, Anthropic's documentation on prompt caching).
//!
//! A conversation between two turns is idle but not gone: its next request comes in seconds. So it still counts as
//! load where it is bound, for a moment. Else every pause would look like room, newcomers would be put there, and the
//! conversation would be crowded out of its own cache. What that is worth, and how it was measured: `docs/ROUTING.md`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::EndpointId;
use super::decision::Out;

/// Bindings that are remembered. A team of a thousand has a few thousand conversations at once.
const BINDINGS_MAX: usize = 16 * 1024;

/// How fast the hope fades that a conversation comes back after an answer. Tools mostly run for a few seconds.
const RETURN_HALF_LIFE: Duration = Duration::from_secs(4);

/// One conversation: the hash of session, agent and model. A collision costs a cache hit and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// The hash.
    pub key: u64,
    /// How long its cache stays warm without use.
    pub idle: Duration,
}

/// What became of the requests that belong to a conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Went to the endpoint they are bound to.
    pub hits: u64,
    /// Went elsewhere this once, because that endpoint was too busy; the binding was kept.
    pub detours: u64,
    /// Were bound anew, because that endpoint was out.
    pub moves: u64,
    /// The same, by why it was out.
    pub moved_because: Reasons,
    /// Were bound for the first time, or again after their cache had gone cold.
    pub new: u64,
}

/// How many moves there were for which reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reasons {
    by_word: [u64; Out::WORDS.len()],
    /// The endpoint was no longer configured.
    removed: u64,
}

impl Reasons {
    /// One more; `None` stands for an endpoint that is gone.
    pub fn count(&mut self, why: Option<Out>) {
        let place = why.and_then(|out| Out::WORDS.iter().position(|word| *word == out.word()));
        *place.map_or(&mut self.removed, |place| &mut self.by_word[place]) += 1;
    }

    /// Each reason that there was, by its word.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counted = Out::WORDS.into_iter().zip(self.by_word).chain([("removed", self.removed)]);
        counted.filter(|(_, count)| *count > 0)
    }
}

#[derive(Debug, Clone, Copy)]
struct Binding {
    endpoint: EndpointId,
    until: Instant,
    /// Where it went last while its endpoint was too busy: an older part of it is cached there.
    detour: Option<EndpointId>,
    /// When it was answered last; `None` while it asks.
    answered: Option<Instant>,
    /// Tokens for each byte of its last request, if anybody keeps account.
    density: Option<f64>,
}

/// How many conversations an endpoint expects back soon. Each counts 1 when it was answered, and fades.
#[derive(Debug, Clone, Copy, Default)]
pub struct Returns {
    sum: f64,
    at: Option<Instant>,
}

impl Returns {
    /// In thousandths of a request, as the strategies count.
    pub fn expected_thousandths(&self, now: Instant) -> u64 {
        (1000.0 * self.expected(now)).round() as u64
    }

    /// A conversation was answered.
    pub fn await_one(&mut self, now: Instant) {
        *self = Self { sum: self.expected(now) + 1.0, at: Some(now) };
    }

    /// A conversation that was answered at `answered` asks again.
    pub fn came(&mut self, answered: Instant, now: Instant) {
        *self = Self { sum: (self.expected(now) - fading(answered, now)).max(0.0), at: Some(now) };
    }

    fn expected(&self, now: Instant) -> f64 {
        self.at.map_or(0.0, |at| self.sum * fading(at, now))
    }
}

/// What is left of 1 after the time from `at` to `now`.
fn fading(at: Instant, now: Instant) -> f64 {
    (-now.saturating_duration_since(at).as_secs_f64() / RETURN_HALF_LIFE.as_secs_f64()).exp2()
}

/// The bindings.
#[derive(Debug, Clone, Default)]
pub struct Affinity {
    bindings: HashMap<u64, Binding>,
    /// How it went so far.
    pub counts: Counts,
}

impl Affinity {
    /// The endpoint this conversation is bound to, while its cache there can be warm.
    pub fn bound(&self, session: Session, now: Instant) -> Option<EndpointId> {
        self.bindings.get(&session.key).filter(|binding| now < binding.until).map(|binding| binding.endpoint)
    }

    /// Where it went last while its endpoint was too busy.
    pub fn detour(&self, session: Session) -> Option<EndpointId> {
        self.bindings.get(&session.key).and_then(|binding| binding.detour)
    }

    /// It went elsewhere this once.
    pub fn note_detour(&mut self, session: Session, endpoint: EndpointId) {
        if let Some(binding) = self.bindings.get_mut(&session.key) {
            binding.detour = Some(endpoint);
        }
    }

    /// Tokens for each byte of its last request.
    pub fn density(&self, session: Session) -> Option<f64> {
        self.bindings.get(&session.key).and_then(|binding| binding.density)
    }

    /// So many tokens for each byte its last request had.
    pub fn note_density(&mut self, session: Session, density: f64) {
        if let Some(binding) = self.bindings.get_mut(&session.key) {
            binding.density = Some(density);
        }
    }

    /// Binds it, or keeps its binding fresh.
    pub fn bind(&mut self, session: Session, endpoint: EndpointId, now: Instant) {
        if self.bindings.len() >= BINDINGS_MAX && !self.bindings.contains_key(&session.key) {
            self.make_room(now);
        }
        let fresh = Binding { endpoint, until: now, detour: None, answered: None, density: None };
        let binding = self.bindings.entry(session.key).or_insert(fresh);
        if binding.endpoint != endpoint {
            *binding = Binding { density: binding.density, ..fresh };
        }
        binding.until = now + session.idle;
    }

    /// The conversation asks. Where it is bound, and when it was answered last, if it was awaited there.
    pub fn asks(&mut self, session: Session) -> Option<(EndpointId, Instant)> {
        let binding = self.bindings.get_mut(&session.key)?;
        Some((binding.endpoint, binding.answered.take()?))
    }

    /// The conversation was answered. Where it is bound, and awaited from now on.
    pub fn answered(&mut self, session: Session, now: Instant) -> Option<EndpointId> {
        let binding = self.bindings.get_mut(&session.key)?;
        binding.answered = Some(now);
        Some(binding.endpoint)
    }

    /// The conversation was used until now; says nothing if it was bound elsewhere meanwhile.
    pub fn used(&mut self, session: Session, endpoint: EndpointId, now: Instant) {
        if let Some(binding) = self.bindings.get_mut(&session.key).filter(|b| b.endpoint == endpoint) {
            binding.until = binding.until.max(now + session.idle);
        }
    }

    /// Bindings that are in force.
    pub fn len(&self, now: Instant) -> usize {
        self.bindings.values().filter(|binding| now < binding.until).count()
    }

    /// Drops what is cold; if everything is warm, the eighth that goes cold first.
    fn make_room(&mut self, now: Instant) {
        self.bindings.retain(|_, binding| now < binding.until);
        if self.bindings.len() < BINDINGS_MAX {
            return;
        }
        let mut ends: Vec<Instant> = self.bindings.values().map(|binding| binding.until).collect();
        let (_, &mut end, _) = ends.select_nth_unstable(BINDINGS_MAX / 8);
        self.bindings.retain(|_, binding| binding.until > end);
    }
}

/// True when an endpoint with this load may take another request of its own conversations. Load is requests running and
/// conversations expected back, in thousandths; the total includes the new request.
pub fn may_stay(load: u64, total: u64, weight: u64, weights: u64) -> bool {
    load + 1000 <= stay_limit(total, weight, weights)
}

/// The load up to which it may: four requests at once always, and up to one and a half times its fair share of the
/// `total` load.
pub fn stay_limit(total: u64, weight: u64, weights: u64) -> u64 {
    let share = 3 * u128::from(total) * u128::from(weight) / (2 * u128::from(weights)).max(1);
    u64::try_from(share).unwrap_or(u64::MAX).max(4000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(300);

    fn session(key: u64) -> Session {
        Session { key, idle: IDLE }
    }

    #[test]
    fn a_binding_lasts_while_the_cache_is_warm() {
        let (mut affinity, now) = (Affinity::default(), crate::env::now());
        let (here, there) = (EndpointId(1), EndpointId(2));
        affinity.bind(session(7), here, now);
        assert_eq!(affinity.bound(session(7), now + IDLE / 2), Some(here));
        assert_eq!(affinity.bound(session(7), now + IDLE), None);
        assert_eq!(affinity.bound(session(8), now), None);
        affinity.used(session(7), here, now + IDLE / 2);
        assert_eq!(affinity.bound(session(7), now + IDLE), Some(here), "used until then");
        affinity.used(session(7), there, now + IDLE);
        assert_eq!(
            affinity.bound(session(7), now + IDLE + IDLE / 2),
            None,
            "its use elsewhere warms nothing here"
        );
    }

    #[test]
    fn memory_is_bounded_and_the_warmest_stay() {
        let (mut affinity, now) = (Affinity::default(), crate::env::now());
        for key in 0..3 * BINDINGS_MAX as u64 {
            affinity.bind(session(key), EndpointId(1), now + Duration::from_millis(key));
            assert!(affinity.bindings.len() <= BINDINGS_MAX);
        }
        assert!(affinity.bound(session(3 * BINDINGS_MAX as u64 - 1), now).is_some());
        assert!(affinity.len(now) > BINDINGS_MAX / 2);
    }

    #[test]
    fn four_may_always_stay_and_more_up_to_half_above_the_fair_share() {
        for (load, total, expected) in [
            (0, 1_000, true),
            (3_000, 4_000, true),
            (3_001, 5_000, false),
            (4_000, 14_000, true),
            (5_000, 15_000, false),
        ] {
            assert_eq!(may_stay(load, total, 1, 4), expected, "{load} of {total}");
        }
        assert!(may_stay(7_000, 20_000, 2, 5) && !may_stay(12_000, 20_000, 2, 5));
    }

    #[test]
    fn whoever_was_answered_is_awaited_for_a_moment() {
        let (mut returns, start) = (Returns::default(), crate::env::now());
        let later = start + RETURN_HALF_LIFE;
        returns.await_one(start);
        returns.await_one(start);
        assert_eq!(returns.expected_thousandths(start), 2000);
        assert_eq!(returns.expected_thousandths(later), 1000);
        returns.came(start, later);
        assert_eq!(returns.expected_thousandths(later), 500, "the other one is awaited still");
        returns.came(start, later + RETURN_HALF_LIFE);
        returns.came(start, later + RETURN_HALF_LIFE);
        assert_eq!(returns.expected_thousandths(later + RETURN_HALF_LIFE), 0, "never below nothing");
    }

    #[test]
    fn a_binding_knows_its_detour_until_it_moves() {
        let (mut affinity, now) = (Affinity::default(), crate::env::now());
        let (here, there, third) = (EndpointId(1), EndpointId(2), EndpointId(3));
        affinity.note_detour(session(7), there);
        assert_eq!(affinity.detour(session(7)), None, "it is not bound");
        affinity.bind(session(7), here, now);
        affinity.note_detour(session(7), there);
        affinity.bind(session(7), here, now);
        assert_eq!(affinity.detour(session(7)), Some(there));
        assert_eq!(affinity.answered(session(7), now), Some(here));
        assert_eq!(affinity.asks(session(7)), Some((here, now)));
        assert_eq!(affinity.asks(session(7)), None, "it came back only once");
        affinity.bind(session(7), third, now);
        assert_eq!(affinity.detour(session(7)), None);
    }
}
