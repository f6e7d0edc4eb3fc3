//! What each model really counts, learned from the usage of complete answers.
//!
//! An observation needs the request's text gone over once more, some microseconds for each kilobyte. That is done when
//! the client has the first words of its answer (see `kept`), for a few requests a minute of each model, and outside
//! the lock; it counts when the answer is whole. One small mutex, held for a look or an insertion; `now` is an
//! argument. Bounded: models, observations of each, and the body that is worth it. Survives a reload, not a restart:
//! what is to be kept on disk are the windows of the [`Factor`]s. Shown under `token_counts` in /stats.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use crate::anthropic::tokens::{Estimate, Factor, UNTAUGHT};

/// Models that are remembered, at most.
const MODELS_MAX: usize = 64;

/// A longer name of a model is not remembered.
const MODEL_BYTES_MAX: usize = 128;

/// Requests of one model that are looked at within a span.
const LOOKS_MAX: u32 = 30;
const LOOKS_SPAN: Duration = Duration::from_secs(60);

/// A larger request is not looked at: it would keep its worker for longer than it is worth.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// One model, as /stats shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct View {
    model: String,
    /// Requests that were learned from.
    observations: u64,
    /// What estimates of text are multiplied by.
    factor: f64,
}

/// The factors of all models.
#[derive(Debug, Default)]
pub struct Counting {
    /// In the order of their last observation.
    models: Mutex<Vec<Model>>,
}

#[derive(Debug)]
struct Model {
    name: String,
    factor: Factor,
    looks: u32,
    looks_since: Instant,
}

impl Counting {
    /// What estimates for this model are multiplied by.
    pub fn factor(&self, model: &str) -> f64 {
        let models = self.models.lock();
        models.iter().find(|known| known.name == model).map_or(UNTAUGHT, |known| known.factor.value())
    }

    /// True when a request of this model and size is worth a look; that counts as one.
    pub fn takes(&self, model: &str, body_bytes: usize, now: Instant) -> bool {
        if body_bytes > BODY_BYTES_MAX || model.len() > MODEL_BYTES_MAX {
            return false;
        }
        let mut models = self.models.lock();
        let known = match models.iter().position(|known| known.name == model) {
            Some(at) => models.remove(at),
            None => Model { name: model.to_owned(), factor: Factor::default(), looks: 0, looks_since: now },
        };
        if models.len() >= MODELS_MAX {
            models.remove(0);
        }
        models.push(known);
        let Some(known) = models.last_mut() else { return false };
        if now.saturating_duration_since(known.looks_since) >= LOOKS_SPAN {
            (known.looks, known.looks_since) = (0, now);
        }
        known.looks += 1;
        known.looks <= LOOKS_MAX
    }

    /// A request that was estimated so had `reported` tokens, cached ones included.
    pub fn observe(&self, model: &str, estimate: Estimate, reported: u64) {
        let mut models = self.models.lock();
        if let Some(known) = models.iter_mut().find(|known| known.name == model) {
            known.factor.observe(estimate, reported);
        }
    }

    /// What to show, by name. Changes nothing.
    pub fn snapshot(&self) -> Vec<View> {
        let models = self.models.lock();
        let learned = models.iter().filter(|known| known.factor.observations() > 0);
        let mut views: Vec<View> = learned
            .map(|known| View {
                model: known.name.clone(),
                observations: known.factor.observations(),
                factor: (known.factor.value() * 1000.0).round() / 1000.0,
            })
            .collect();
        drop(models);
        views.sort_by(|one, other| one.model.cmp(&other.model));
        views
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env;

    const REQUEST: Estimate = Estimate { text: 1_000, apart: 0 };

    fn teach(counting: &Counting, model: &str, reported: u64, times: usize) {
        for _ in 0..times {
            assert!(counting.takes(model, 1, env::now()));
            counting.observe(model, REQUEST, reported);
        }
    }

    #[test]
    fn each_model_learns_for_itself() {
        let counting = Counting::default();
        teach(&counting, "new", 1_300, 20);
        teach(&counting, "other", 900, 5);
        assert!((counting.factor("new") - 1.3).abs() < 1e-9);
        assert!((counting.factor("other") - 0.9).abs() < 1e-9);
        assert_eq!(counting.factor("unknown"), UNTAUGHT);
        let seen: Vec<_> =
            counting.snapshot().into_iter().map(|view| (view.model, view.observations)).collect();
        assert_eq!(seen, [("new".to_owned(), 20), ("other".to_owned(), 5)]);
    }

    #[test]
    fn looks_are_few_and_large_requests_are_none() {
        let (counting, now) = (Counting::default(), env::now());
        let looks = |at: Instant| (0..100).filter(|_| counting.takes("m", 1, at)).count();
        assert_eq!(looks(now), LOOKS_MAX as usize);
        assert_eq!(looks(now + LOOKS_SPAN - Duration::from_nanos(1)), 0);
        assert_eq!(looks(now + LOOKS_SPAN), LOOKS_MAX as usize);
        assert!(counting.takes("n", BODY_BYTES_MAX, now), "another model has looks of its own");
        assert!(!counting.takes("n", BODY_BYTES_MAX + 1, now));
        assert!(!counting.takes(&"m".repeat(MODEL_BYTES_MAX + 1), 1, now));
        assert!(counting.snapshot().is_empty(), "looked at is not learned");
    }

    #[test]
    fn models_are_bounded_and_the_oldest_goes_first() {
        let counting = Counting::default();
        for number in 0..MODELS_MAX {
            teach(&counting, &format!("m{number}"), 1_300, 10);
        }
        teach(&counting, "m0", 1_300, 1);
        teach(&counting, "one more", 1_300, 10);
        assert_eq!(counting.snapshot().len(), MODELS_MAX);
        assert_eq!(counting.factor("m1"), UNTAUGHT);
        for kept in ["m0", "m2", "one more"] {
            assert!((counting.factor(kept) - 1.3).abs() < 1e-9, "{kept}");
        }
        counting.observe("m1", REQUEST, 1_300);
        assert_eq!(counting.factor("m1"), UNTAUGHT, "what was forgotten is not learned from");
    }
}
