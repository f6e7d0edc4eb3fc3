//! Who waits for room, in the order in which they came.
//!
//! Whoever comes later takes no room at a limited endpoint while somebody waits for the same model: otherwise small
//! requests would pass the large ones for ever.

use std::sync::Arc;

use super::Balancer;

/// A place in the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(u64);

/// The line: first come, first served for each model.
#[derive(Debug, Default)]
pub(super) struct Line {
    waiting: Vec<(Number, String)>,
    next: u64,
}

impl Line {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// True when somebody came earlier for this model than the one with this place, or than one without.
    pub(super) fn is_behind(&self, model: &str, place: Option<Number>) -> bool {
        let earlier = |number: Number| place.is_none_or(|own| number < own);
        self.waiting.iter().any(|(number, name)| name == model && earlier(*number))
    }
}

/// One request's place; dropping it leaves the line.
pub struct Place<T> {
    balancer: Arc<Balancer<T>>,
    number: Number,
}

impl<T> Place<T> {
    /// For [`Ask::place`](super::Ask::place).
    pub fn number(&self) -> Number {
        self.number
    }
}

impl<T> Drop for Place<T> {
    fn drop(&mut self) {
        self.balancer.inner.lock().line.waiting.retain(|(number, _)| *number != self.number);
    }
}

impl<T> Balancer<T> {
    /// Joins those who wait for room for this model; `None` when as many wait as may.
    pub fn wait_in_line(self: &Arc<Self>, model: &str) -> Option<Place<T>> {
        let mut inner = self.inner.lock();
        if inner.line.len() >= inner.settings.waiting_max {
            return None;
        }
        let line = &mut inner.line;
        let number = Number(line.next);
        line.next += 1;
        line.waiting.push((number, model.to_string()));
        drop(inner);
        Some(Place { balancer: Arc::clone(self), number })
    }

    /// How many wait for room.
    pub fn waiting(&self) -> usize {
        self.inner.lock().line.len()
    }
}
