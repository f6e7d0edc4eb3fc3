//! Memory for request bodies: so many bytes for all of them together, counted from their arrival on while they are held.
//!
//! Readers, queue and workers may each hold a body, and a body may be megabytes. Without a common bound a crowd would
//! be paid for with all memory there is, and a failed allocation ends the process. Beyond it a request is told at once
//! that there is no room. A body is counted once: nothing that is done with it copies it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is left.
#[derive(Clone)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Budget {
    /// Room for this many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// A share of nothing yet. It grows with the body it stands for, and goes back when dropped.
    pub(super) fn share(&self) -> Share {
        Share { budget: self.clone(), bytes: 0 }
    }
}

/// What one body takes.
pub(super) struct Share {
    budget: Budget,
    bytes: usize,
}

impl Share {
    /// Makes it this large. False when there is no room; it stays as it was then.
    pub(super) fn grow_to(&mut self, bytes: usize) -> bool {
        let Some(more) = bytes.checked_sub(self.bytes) else { return true };
        let left = &self.budget.0;
        let taken =
            left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(more)).is_ok();
        if taken {
            self.bytes = bytes;
        }
        taken
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_comes_back() {
        let budget = Budget::new(100);
        let (mut one, mut two) = (budget.share(), budget.share());
        assert!(one.grow_to(60) && !two.grow_to(41) && two.grow_to(40));
        assert!(one.grow_to(50), "smaller is no more");
        assert!(!one.grow_to(61));
        drop(two);
        assert!(one.grow_to(100));
        drop(one);
        assert!(budget.share().grow_to(100) && !budget.share().grow_to(101));
    }
}
