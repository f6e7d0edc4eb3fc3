//! Which endpoint a conversation belongs to. Pure; the time is an argument.
//!
//! A prompt cache lives in one workspace, and reading from it costs a tenth of the input price. So a conversation is
//! bound to the endpoint it was sent to first, as long as the cache there can be warm: 5 minutes after its last use, or
//! 60 when the request asks for the long cache (`"ttl":"1h"`, Anthropic's documentation on prompt caching).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::EndpointId;

/// Bindings that are remembered. A team of a thousand has a few thousand conversations at once.
const BINDINGS_MAX: usize = 16 * 1024;

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
    /// Were bound for the first time, or again after their cache had gone cold.
    pub new: u64,
}

#[derive(Debug, Clone, Copy)]
struct Binding {
    endpoint: EndpointId,
    until: Instant,
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

    /// Binds it, or keeps its binding fresh.
    pub fn bind(&mut self, session: Session, endpoint: EndpointId, now: Instant) {
        if self.bindings.len() >= BINDINGS_MAX && !self.bindings.contains_key(&session.key) {
            self.make_room(now);
        }
        self.bindings.insert(session.key, Binding { endpoint, until: now + session.idle });
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

/// True when an endpoint with `active` requests may take another of its own conversations: up to four at once always,
/// and up to one and a half times its fair share of `total` requests (this one included) in both lists.
pub fn may_stay(active: usize, total: usize, weight: u64, weights: u64) -> bool {
    let wanted = active as u128 + 1;
    wanted <= 4 || 2 * wanted * u128::from(weights) <= 3 * total as u128 * u128::from(weight)
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
        for (active, total, expected) in
            [(0, 1, true), (3, 4, true), (4, 5, false), (4, 14, true), (5, 15, false)]
        {
            assert_eq!(may_stay(active, total, 1, 4), expected, "{active} of {total}");
        }
        assert!(may_stay(7, 20, 2, 5) && !may_stay(12, 20, 2, 5));
    }
}
