//! A worker stays with a connection that brings one request right behind the other.
//!
//! Between requests a connection is the watcher's, and each request costs a hand-over and a sleeping worker's wake-up.
//! A client that has just gone on at once will do so again: its worker waits for it on the spot, for a moment, and
//! only while most workers have nothing to do. Whatever comes that is not simply the next message goes to the watcher.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::Connection;
use super::watcher::{FIRST_LOOK, HEAD_BYTES_MAX, whole_length};
use super::{Job, Pool, Shared};
use crate::env;
use crate::http::head::{Verdict, judge};

/// How soon a request follows an answer for its client to be expected again, and how long it is waited for then.
const MOMENT: Duration = Duration::from_millis(5);

/// True for a client that went on at once: the answer before this request, and the request.
pub(super) fn went_on_at_once(answered_at: Option<Instant>, received_at: Instant) -> bool {
    answered_at.is_some_and(|at| received_at.saturating_duration_since(at) < MOMENT)
}

impl Shared {
    /// Waits a moment for the next message on this connection, or hands the connection back.
    #[inline(never)] // Its buffer must not lie on the stack of a request.
    pub(super) fn next_message(self: &Arc<Self>, connection: Connection) -> Result<Job, Connection> {
        let waits = !self.is_draining() && self.pools.of(Pool::Messages).is_mostly_idle();
        if !waits || !comes(&connection) {
            return Err(connection);
        }
        let mut scratch = [0; FIRST_LOOK];
        let Ok(length) = connection.peek(&mut scratch) else { return Err(connection) };
        let Verdict::Complete(head) = judge(&scratch[..length], HEAD_BYTES_MAX) else {
            return Err(connection);
        };
        let Ok(route) = self.service.route(&head) else { return Err(connection) };
        let available = if length < FIRST_LOOK { length as u64 } else { connection.available() };
        match whole_length(&head) {
            Some(whole) if whole <= available && route.pool == Pool::Messages => {
                let has_more = whole < available;
                Ok(Job { connection, head, route, received_at: env::now(), has_more, read: None })
            }
            _ => Err(connection),
        }
    }
}

/// True when bytes come within the moment, or the end.
fn comes(connection: &Connection) -> bool {
    let moment = Timespec { tv_sec: 0, tv_nsec: i64::from(MOMENT.subsec_nanos()) };
    let mut fds = [PollFd::new(&**connection.socket(), PollFlags::IN)];
    poll(&mut fds, Some(&moment)).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_client_that_goes_on_at_once_is_waited_for() {
        let answered = env::now();
        assert!(went_on_at_once(Some(answered), answered));
        assert!(went_on_at_once(Some(answered), answered + MOMENT / 2));
        assert!(!went_on_at_once(Some(answered), answered + MOMENT));
        assert!(!went_on_at_once(None, answered), "the first request tells nothing");
    }
}
