//! From the workspace to the client: bytes as they come, flushed at once.
//!
//! Sees only a reader that ticks (`WouldBlock` when nothing came for a moment) and a [`Client`]; knows no socket and
//! no HTTP library. [`stream`] relays event streams and can be left for another attempt until content went out;
//! [`body`] relays everything else. Neither retries, and neither decides who is to blame: they report how it ended.

pub mod body;
pub mod stream;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::http::answer::{LAST_CHUNK, chunk};

/// The client's end of the connection.
pub trait Client {
    /// Sends all of `bytes` at once. An error means that the client cannot be reached any more.
    fn send(&self, bytes: &[u8]) -> io::Result<()>;

    /// True when the client has hung up, although nothing was written.
    fn is_gone(&self) -> bool;
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest silence of the workspace.
    pub idle: Duration,
    /// The longest silence towards the client of a stream; then a ping is sent.
    pub heartbeat: Duration,
}

/// The client is gone: nothing more can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// Why nothing came for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quiet {
    ClientGone,
    Silent,
}

/// What one client has been sent so far. Lives across all attempts for one request.
pub struct Downstream {
    client: Rc<dyn Client>,
    is_chunked: bool,
    sent: RefCell<Sent>,
}

struct Sent {
    has_head: bool,
    has_message_start: bool,
    has_content: bool,
    body_bytes: u64,
    first_at: Option<Instant>,
    last_at: Instant,
    scratch: Vec<u8>,
}

impl Downstream {
    /// Nothing was sent yet. A client of HTTP/1.0 (`is_chunked` false) gets streams without framing, ended by the
    /// end of the connection.
    pub fn new(client: Rc<dyn Client>, is_chunked: bool, now: Instant) -> Self {
        let sent = Sent {
            has_head: false,
            has_message_start: false,
            has_content: false,
            body_bytes: 0,
            first_at: None,
            last_at: now,
            scratch: Vec::new(),
        };
        Self { client, is_chunked, sent: RefCell::new(sent) }
    }

    /// The status went out: a later failure can no longer be an HTTP status.
    pub fn has_head(&self) -> bool {
        self.sent.borrow().has_head
    }

    /// A `message_start` went out: the next attempt's must not.
    pub fn has_message_start(&self) -> bool {
        self.sent.borrow().has_message_start
    }

    /// Content went out: nothing may be tried again.
    pub fn has_content(&self) -> bool {
        self.sent.borrow().has_content
    }

    /// Bytes of body sent, without framing. A part whose sending failed does not count.
    pub fn body_bytes(&self) -> u64 {
        self.sent.borrow().body_bytes
    }

    /// When the first byte went out.
    pub fn first_at(&self) -> Option<Instant> {
        self.sent.borrow().first_at
    }

    /// True when the client hung up.
    pub fn is_gone(&self) -> bool {
        self.client.is_gone()
    }

    /// True for a client that understands chunks.
    pub fn is_chunked(&self) -> bool {
        self.is_chunked
    }

    /// Sends a part of a streamed body, with `head` in front when it has not gone out yet, all in one piece.
    pub fn send_part(&self, head: &[u8], part: &[u8], now: Instant) -> Result<(), Gone> {
        let mut sent = self.sent.borrow_mut();
        let mut scratch = std::mem::take(&mut sent.scratch);
        scratch.clear();
        let has_head = sent.has_head;
        if !has_head {
            scratch.extend_from_slice(head);
        }
        if self.is_chunked {
            chunk(&mut scratch, part)
        } else {
            scratch.extend_from_slice(part)
        }
        self.client.send(&scratch).map_err(|_| Gone)?;
        sent.note(part.len(), now);
        // The head, or a single large part, must not be paid for until the stream ends.
        if has_head && scratch.capacity() <= 64 * 1024 {
            sent.scratch = scratch;
        }
        Ok(())
    }

    /// Sends bytes whose framing is done already: a whole answer, or more of a body with a known length.
    pub fn send_framed(&self, bytes: &[u8], body_bytes: usize, now: Instant) -> Result<(), Gone> {
        self.client.send(bytes).map_err(|_| Gone)?;
        self.sent.borrow_mut().note(body_bytes, now);
        Ok(())
    }

    /// Ends a streamed body well.
    pub fn end_stream(&self) -> Result<(), Gone> {
        if self.is_chunked { self.client.send(LAST_CHUNK).map_err(|_| Gone) } else { Ok(()) }
    }

    /// True when a stream has been quiet towards the client for so long that it should hear something.
    pub fn is_heartbeat_due(&self, limits: Limits, now: Instant) -> bool {
        now.saturating_duration_since(self.sent.borrow().last_at) >= limits.heartbeat
    }

    /// Sends a ping event; only at an event boundary. See SPEC section 6: the client counts any byte as life.
    pub fn ping(&self, head: &[u8], now: Instant) -> Result<(), Gone> {
        self.send_part(head, PING, now)
    }

    fn quiet(&self, last_upstream: Instant, limits: Limits, now: Instant) -> Option<Quiet> {
        if self.client.is_gone() {
            return Some(Quiet::ClientGone);
        }
        (now.saturating_duration_since(last_upstream) >= limits.idle).then_some(Quiet::Silent)
    }
}

impl Sent {
    fn note(&mut self, body_bytes: usize, now: Instant) {
        self.has_head = true;
        self.body_bytes += body_bytes as u64;
        self.first_at.get_or_insert(now);
        self.last_at = now;
    }
}

/// An event that says only that we are alive.
pub const PING: &[u8] = b"event: ping\ndata: {\"type\": \"ping\"}\n\n";

/// True when a read failed only because nothing came during one tick.
fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests;
