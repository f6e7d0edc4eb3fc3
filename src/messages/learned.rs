//! What each endpoint has refused to take, for each model, and what is left out of requests because of it.
//!
//! Bounded, and forgotten after a day: the service moves, and a field that was refused yesterday may be welcome today.
//! One small mutex, held for a look or an insertion; `now` is an argument. Shown under `compat` in /stats.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use crate::anthropic::compat::Path;
use crate::balancer::EndpointId;

/// How long a refusal is believed.
const BELIEVED: Duration = Duration::from_secs(24 * 3600);

/// Refusals remembered, and changes counted, at most.
const ENTRIES_MAX: usize = 256;

/// Refusals remembered for one endpoint and model.
const PER_MODEL_MAX: usize = 16;

/// A longer name of a model is not remembered.
const MODEL_BYTES_MAX: usize = 128;

/// Why a request is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The endpoint refused the field, and took the request without it.
    Learned,
    /// `compat.strip` names it.
    Configured,
    /// The model does not know adaptive thinking.
    Model,
}

/// One kind of change, as /stats shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct View {
    endpoint: String,
    model: String,
    path: String,
    reason: Reason,
    /// Requests that went out with this change.
    requests: u64,
    /// For what was learned: until it is sent again.
    seconds_left: Option<u64>,
}

/// `compat` in /stats.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Views {
    /// Attempts made only to find out whether a request works without a field.
    extra_attempts: u64,
    changes: Vec<View>,
}

/// The shared memory.
#[derive(Debug, Default)]
pub struct Memory {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    learned: Vec<Learned>,
    changes: Vec<Change>,
    extra_attempts: u64,
}

#[derive(Debug)]
struct Learned {
    endpoint: EndpointId,
    model: String,
    path: Path,
    until: Instant,
}

#[derive(Debug)]
struct Change {
    endpoint: EndpointId,
    name: String,
    model: String,
    path: String,
    reason: Reason,
    requests: u64,
}

impl Memory {
    /// What this endpoint refuses for this model.
    pub fn known(&self, endpoint: EndpointId, model: &str, now: Instant) -> Vec<Path> {
        let inner = self.inner.lock();
        let known = inner.learned.iter().filter(|entry| entry.is(endpoint, model) && now < entry.until);
        known.map(|entry| entry.path.clone()).collect()
    }

    /// The endpoint takes requests for this model without the field.
    pub fn learn(&self, endpoint: EndpointId, model: &str, path: &Path, now: Instant) {
        if model.len() > MODEL_BYTES_MAX {
            return;
        }
        let mut inner = self.inner.lock();
        inner
            .learned
            .retain(|entry| now < entry.until && !(entry.is(endpoint, model) && entry.path == *path));
        let of_model = inner.learned.iter().filter(|entry| entry.is(endpoint, model)).count();
        if of_model >= PER_MODEL_MAX {
            return;
        }
        if inner.learned.len() >= ENTRIES_MAX {
            // Entries are in the order of learning: the first is the oldest.
            inner.learned.remove(0);
        }
        let (model, path) = (model.to_owned(), path.clone());
        inner.learned.push(Learned { endpoint, model, path, until: now + BELIEVED });
    }

    /// One attempt more than the request would have needed.
    pub fn count_extra_attempt(&self) {
        self.inner.lock().extra_attempts += 1;
    }

    /// A request went out with this change. True for the first of its kind, which deserves a line in the log.
    pub fn count(&self, endpoint: EndpointId, name: &str, model: &str, path: &str, reason: Reason) -> bool {
        let mut inner = self.inner.lock();
        let known = inner.changes.iter_mut().find(|change| {
            change.endpoint == endpoint
                && change.reason == reason
                && change.model == model
                && change.path == path
        });
        if let Some(change) = known {
            change.requests += 1;
            return false;
        }
        if inner.changes.len() >= ENTRIES_MAX || model.len() > MODEL_BYTES_MAX {
            return false;
        }
        let (name, model, path) = (name.to_owned(), model.to_owned(), path.to_owned());
        inner.changes.push(Change { endpoint, name, model, path, reason, requests: 1 });
        true
    }

    /// What to show. Changes nothing.
    pub fn snapshot(&self, now: Instant) -> Views {
        let inner = self.inner.lock();
        let left = |change: &Change| {
            let is_it = |entry: &&Learned| {
                entry.is(change.endpoint, &change.model) && entry.path.to_string() == change.path
            };
            let entry = inner.learned.iter().filter(|_| change.reason == Reason::Learned).find(is_it)?;
            Some(entry.until.saturating_duration_since(now).as_secs())
        };
        let view = |change: &Change| View {
            endpoint: change.name.clone(),
            model: change.model.clone(),
            path: change.path.clone(),
            reason: change.reason,
            requests: change.requests,
            seconds_left: left(change),
        };
        Views { extra_attempts: inner.extra_attempts, changes: inner.changes.iter().map(view).collect() }
    }
}

impl Learned {
    fn is(&self, endpoint: EndpointId, model: &str) -> bool {
        self.endpoint == endpoint && self.model == model
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env;

    const HERE: EndpointId = EndpointId::for_tests(1);
    const THERE: EndpointId = EndpointId::for_tests(2);

    fn path(text: &str) -> Path {
        Path::configured(text).unwrap()
    }

    #[test]
    fn a_refusal_is_believed_for_a_day() {
        let (memory, start) = (Memory::default(), env::now());
        memory.learn(HERE, "m", &path("a"), start);
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(memory.known(HERE, "m", start + day - Duration::from_secs(1)), [path("a")]);
        assert!(memory.known(HERE, "m", start + day).is_empty());
        assert!(memory.known(HERE, "n", start).is_empty(), "another model");
        assert!(memory.known(THERE, "m", start).is_empty(), "another endpoint");
        memory.learn(HERE, "m", &path("a"), start + day);
        assert_eq!(memory.known(HERE, "m", start + day), [path("a")], "learned anew, once");
    }

    #[test]
    fn the_memory_is_bounded() {
        let (memory, now) = (Memory::default(), env::now());
        for number in 0..ENTRIES_MAX + 10 {
            memory.learn(HERE, &format!("m{number}"), &path("a"), now);
            memory.count(HERE, "w1", &format!("m{number}"), "a", Reason::Learned);
        }
        assert!(memory.known(HERE, "m9", now).is_empty(), "the oldest went");
        assert_eq!(memory.known(HERE, "m10", now).len(), 1);
        assert_eq!(memory.snapshot(now).changes.len(), ENTRIES_MAX);
        for number in 0..PER_MODEL_MAX + 5 {
            memory.learn(THERE, "m", &path(&format!("a{number}")), now);
        }
        assert_eq!(memory.known(THERE, "m", now).len(), PER_MODEL_MAX);
        let long = "m".repeat(MODEL_BYTES_MAX + 1);
        memory.learn(HERE, &long, &path("a"), now);
        assert!(memory.known(HERE, &long, now).is_empty());
    }

    #[test]
    fn the_first_change_of_a_kind_is_told() {
        let (memory, now) = (Memory::default(), env::now());
        memory.learn(HERE, "m", &path("a"), now);
        assert!(memory.count(HERE, "w1", "m", "a", Reason::Learned));
        assert!(!memory.count(HERE, "w1", "m", "a", Reason::Learned));
        assert!(memory.count(HERE, "w1", "m", "a", Reason::Configured));
        assert!(memory.count(THERE, "w2", "m", "a", Reason::Learned));
        let views = memory.snapshot(now);
        let seen: Vec<_> = views.changes.iter().map(|view| (view.requests, view.seconds_left)).collect();
        assert_eq!(seen, [(2, Some(86_400)), (1, None), (1, None)]);
    }
}
