//! A gate the test opens: what stands behind it in an upstream's script waits until then.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Closed when made; opened once, for everyone.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn closed() -> Self {
        Self::default()
    }

    /// Lets everyone through who waits, and everyone who comes later.
    pub fn open(&self) {
        *self.0.0.lock().expect("no holder of a gate panics") = true;
        self.0.1.notify_all();
    }

    /// True when open, or opened within `patience`.
    pub fn passed_within(&self, patience: Duration) -> bool {
        let open = self.0.0.lock().expect("no holder of a gate panics");
        let (open, _) =
            self.0.1.wait_timeout_while(open, patience, |open| !*open).expect("no holder of a gate panics");
        *open
    }
}
