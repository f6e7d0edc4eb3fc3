//! Relays an event stream.
//!
//! Until the first content, only whole events go out, so that another workspace can take over between two of them:
//! the client's `message_start` stands, a second one is dropped, and an `error` event is not shown but reported. From
//! the first content on, every chunk goes out as it came, in one send, and a scanner merely watches.

use std::io::Read;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Downstream, Gone, Limits, Quiet, is_tick};
use crate::anthropic::sse::{End, Kind, Scanner, error_of, split_event};

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// With `message_stop`, or with an `error` event after content; the client's body was ended well.
    Complete,
    /// An `error` event came before any content. Nothing of it was relayed.
    ErrorEvent {
        /// Anthropic's type, such as `overloaded_error`.
        kind: String,
        /// The event's data, an error in Anthropic's shape.
        data: Vec<u8>,
    },
    /// Cut before any content, and why.
    BrokeBeforeContent(String),
    /// Silent before any content.
    SilentBeforeContent,
    /// Cut, silent, or ended without `message_stop` after content went out, and why.
    BrokeAfterContent(String),
    /// The client went away.
    ClientGone,
}

/// One attempt's stream.
pub struct Stream<'a> {
    /// Where it goes.
    pub downstream: &'a Downstream,
    /// Called once, when the first content has gone out: nothing may be tried again from there.
    pub content_began: &'a dyn Fn(),
    /// Called once, when the stream has run for some time: it may well run for minutes.
    pub lasts: &'a dyn Fn(),
    /// The response head, sent with the first part if none was sent before. Forgotten when content has gone out.
    pub head: Vec<u8>,
    /// How long to wait.
    pub limits: Limits,
    /// The clock.
    pub clock: &'a dyn Fn() -> Instant,
    /// Watches what passes.
    pub scanner: Scanner,
}

/// The largest event before content that is held back for its end; no real one comes near.
const HELD_BYTES_MAX: usize = 256 * 1024;
/// How much of a stream is taken at once, in bytes. One that has more to give gets more room.
const BUFFER_BYTES: usize = 1024;
const BUFFER_BYTES_MAX: usize = 8 * 1024;
/// From here on a stream is taken for a long one.
const LONG: Duration = Duration::from_millis(500);

impl Stream<'_> {
    /// Relays until the end, whatever it is.
    pub fn run(&mut self, upstream: &mut dyn Read) -> Ended {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut held: Vec<u8> = Vec::new();
        let mut last_upstream = (self.clock)();
        let mut now = last_upstream;
        let mut long_at = Some(now + LONG);
        loop {
            let ended = match upstream.read(&mut buffer) {
                Ok(0) => Some(self.at_end_of_body()),
                Ok(count) => {
                    now = (self.clock)();
                    last_upstream = now;
                    let part = &buffer[..count];
                    self.scanner.feed(part);
                    let sent = if self.downstream.has_content() {
                        self.send(part, now)
                    } else {
                        held.extend_from_slice(part);
                        self.relay_whole_events(&mut held, now)
                    };
                    if count == buffer.len() && count < BUFFER_BYTES_MAX {
                        buffer.resize(2 * count, 0);
                    }
                    sent.err()
                }
                Err(error) if is_tick(&error) => {
                    now = (self.clock)();
                    self.on_tick(last_upstream, now)
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => None,
                Err(error) => Some(self.broke(error.to_string())),
            };
            if let Some(ended) = ended {
                return ended;
            }
            if long_at.take_if(|at| *at <= now).is_some() {
                (self.lasts)();
            }
        }
    }

    /// Sends what may go out of the bytes held, and keeps the rest.
    #[inline(never)]
    fn relay_whole_events(&mut self, held: &mut Vec<u8>, now: Instant) -> Result<(), Ended> {
        let mut out: Vec<Range<usize>> = Vec::new();
        let (mut at, mut has_start, mut is_content) = (0, self.downstream.has_message_start(), false);
        while let Some(event) = split_event(&held[at..]) {
            let end = at + event.len;
            match event.kind {
                Kind::Error => {
                    let data = held[at + event.data.start..at + event.data.end].to_vec();
                    let kind = error_of(&data).map_or_else(|| "api_error".into(), |(kind, _)| kind);
                    return Err(Ended::ErrorEvent { kind, data });
                }
                // Another workspace's stream is going on: the client has its message_start.
                Kind::MessageStart if has_start => {}
                Kind::MessageStart => {
                    has_start = true;
                    out.push(at..end);
                }
                Kind::Ping | Kind::Comment | Kind::Other => out.push(at..end),
                _ => {
                    is_content = true;
                    break;
                }
            }
            at = end;
        }
        let rest = &held[at..];
        is_content = is_content || rest.len() > HELD_BYTES_MAX;
        if is_content {
            out.push(at..held.len());
            at = held.len();
        }
        let mut part = Vec::with_capacity(at);
        out.into_iter().for_each(|range| part.extend_from_slice(&held[range]));
        held.drain(..at);
        {
            let mut sent = self.downstream.sent.borrow_mut();
            (sent.has_message_start, sent.has_content) = (has_start, is_content);
        }
        if part.is_empty() {
            return Ok(());
        }
        self.send(&part, now)?;
        if is_content {
            (*held, self.head) = (Vec::new(), Vec::new());
            (self.content_began)();
        }
        Ok(())
    }

    fn send(&self, part: &[u8], now: Instant) -> Result<(), Ended> {
        self.downstream.send_part(&self.head, part, now).map_err(|Gone| Ended::ClientGone)
    }

    #[inline(never)]
    fn on_tick(&mut self, last_upstream: Instant, now: Instant) -> Option<Ended> {
        if let Some(quiet) = self.downstream.quiet(last_upstream, self.limits, now) {
            return Some(match quiet {
                Quiet::ClientGone => Ended::ClientGone,
                Quiet::Silent if self.is_over() => self.complete(),
                Quiet::Silent if self.downstream.has_content() => {
                    Ended::BrokeAfterContent("the workspace fell silent".into())
                }
                Quiet::Silent => Ended::SilentBeforeContent,
            });
        }
        // The last event is there; a workspace that does not end its body must not keep the client waiting.
        if self.is_over() {
            return Some(self.complete());
        }
        let at_boundary = !self.downstream.has_content() || self.scanner.at_event_boundary();
        if at_boundary && self.downstream.is_heartbeat_due(self.limits, now) {
            return self.downstream.ping(&self.head, now).err().map(|Gone| Ended::ClientGone);
        }
        None
    }

    fn at_end_of_body(&mut self) -> Ended {
        if self.is_over() {
            self.complete()
        } else {
            self.broke("the stream ended without message_stop".into())
        }
    }

    #[inline(never)]
    fn broke(&mut self, why: String) -> Ended {
        if self.is_over() {
            self.complete()
        } else if self.downstream.has_content() {
            Ended::BrokeAfterContent(why)
        } else {
            Ended::BrokeBeforeContent(why)
        }
    }

    /// True when the message was said to be over, at an event boundary, and all of it went out.
    fn is_over(&self) -> bool {
        self.downstream.has_content()
            && self.scanner.at_event_boundary()
            && matches!(self.scanner.end(), Some(End::Stop | End::Error { .. }))
    }

    fn complete(&self) -> Ended {
        match self.downstream.end_stream() {
            Ok(()) => Ended::Complete,
            Err(Gone) => Ended::ClientGone,
        }
    }
}
