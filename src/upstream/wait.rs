//! What happens while a worker waits for a workspace, and what is noted on the way.
//!
//! A blocking read would make the worker deaf: it could not see that its client has left, that it is time for a
//! heartbeat, or that the first byte is overdue. So every wait below (connect, handshake, sending, the response head)
//! is cut into ticks, and on each tick the [`Wait`] of the request is asked. ureq calls our transport deep inside its
//! own loop and has no parameter to pass it along, but always on the thread of the request: so it is kept per thread.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use super::pieces::Payload;
use crate::env;

/// Why a wait was ended from our side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// The client went away.
    ClientGone,
    /// Nothing came within `first_byte`.
    FirstByte,
    /// The connection, with its handshake, was not there within `connect`.
    Connect,
}

/// Asked on each tick of a wait.
pub trait Wait {
    /// Goes on waiting, or gives up.
    fn tick(&self) -> Result<(), Abort>;
}

/// The error that carries an [`Abort`] through ureq.
#[derive(Debug)]
pub(super) struct Aborted(pub(super) Abort);

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "given up: {:?}", self.0)
    }
}

impl std::error::Error for Aborted {}

/// What the transport saw during one call.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Trace {
    /// The name could not be looked up: the call never came to a connection.
    pub(super) unresolved: bool,
    /// A new connection was begun: the call did not use a pooled one.
    pub(super) connecting: bool,
    /// When the new connection must be there.
    pub(super) connect_by: Option<Instant>,
    /// The new connection, with its handshake, came about.
    pub(super) connected: bool,
    /// At least one byte of the answer arrived.
    pub(super) received: bool,
    /// Pooled connections must not be used.
    pub(super) fresh_only: bool,
    /// The request goes through TLS: the transport below carries bytes that are none of its business.
    pub(super) is_tls: bool,
    /// How long ureq's request head may be, in bytes: it must fit into the output buffer in one piece.
    pub(super) head_bytes: usize,
}

impl Trace {
    /// Whether a transport carries the request itself, and not a proxy's greeting, a handshake, or what another
    /// transport above it has encrypted.
    pub(super) fn is_request_of(self, is_tls: bool) -> bool {
        self.is_tls == is_tls && (self.connected || !self.connecting)
    }
}

thread_local! {
    static WAIT: RefCell<Option<Rc<dyn Wait>>> = const { RefCell::new(None) };
    static TRACE: Cell<Trace> = const { Cell::new(Trace {
        unresolved: false, connecting: false, connect_by: None, connected: false, received: false, fresh_only: false,
        is_tls: false, head_bytes: 0 }) };
    static PAYLOAD: Cell<Option<Payload>> = const { Cell::new(None) };
}

/// Runs a call with `wait` asked on each tick. Returns what was noted, too.
pub(super) fn during<R>(
    wait: Rc<dyn Wait>,
    trace: Trace,
    payload: Option<Payload>,
    call: impl FnOnce() -> R,
) -> (R, Trace) {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            WAIT.take();
            TRACE.take();
            PAYLOAD.take();
        }
    }
    let _reset = Reset;
    WAIT.set(Some(wait));
    TRACE.set(trace);
    PAYLOAD.set(payload);
    let result = call();
    (result, TRACE.get())
}

/// A tick passed. `Ok(true)`: go on waiting. `Ok(false)`: nobody is asked on this thread, so the reader above wants
/// to be told of each tick itself.
pub(super) fn tick() -> Result<bool, Aborted> {
    let trace = TRACE.get();
    if !trace.connected && trace.connect_by.is_some_and(|by| by <= env::now()) {
        return Err(Aborted(Abort::Connect));
    }
    match WAIT.with_borrow(Option::clone) {
        Some(wait) => wait.tick().map(|()| true).map_err(Aborted),
        None => Ok(false),
    }
}

/// Notes something about the call that runs on this thread.
pub(super) fn note(change: impl FnOnce(&mut Trace)) {
    let mut trace = TRACE.get();
    change(&mut trace);
    TRACE.set(trace);
}

/// What was noted so far.
pub(super) fn trace() -> Trace {
    TRACE.get()
}

/// What goes out behind the head, for the transport that sends it. There is nothing a second time.
pub(super) fn take_payload() -> Option<Payload> {
    PAYLOAD.take()
}
