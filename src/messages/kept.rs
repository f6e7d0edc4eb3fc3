//! The client's body, kept for as long as another attempt may need it.
//!
//! Once content has gone to the client nothing can follow, and a stream may run for minutes from there: so the body
//! goes then, with its share of `limits.max_buffered_bytes`. Whether it is worth a look for [`Counting`] is decided at
//! that moment, too, when the client has its first words.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use super::counting::Counting;
use crate::anthropic::tokens::{self, Estimate};
use crate::front::Body;

/// A body until it is released, and afterwards what was estimated of it.
pub(super) struct Kept {
    body: RefCell<Option<Arc<Body>>>,
    estimate: Cell<Option<Estimate>>,
}

impl Kept {
    /// Not yet released.
    pub(super) fn new(body: Body) -> Self {
        Self { body: RefCell::new(Some(Arc::new(body))), estimate: Cell::new(None) }
    }

    /// The client's bytes; `None` once they were released.
    pub(super) fn body(&self) -> Option<Arc<Body>> {
        self.body.borrow().clone()
    }

    /// Lets it go. If a request of this model is worth a look, it gets that first. A second time nothing happens.
    pub(super) fn release(&self, counting: &Counting, model: &str, now: Instant) {
        let Some(body) = self.body.take() else { return };
        if counting.takes(model, body.len(), now) {
            self.estimate.set(tokens::estimate(&body).ok());
        }
    }

    /// What was found when it was released.
    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.estimate.get()
    }
}
