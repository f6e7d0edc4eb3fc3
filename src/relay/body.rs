//! Relays an answer that is not an event stream.
//!
//! It is gathered first, up to [`GATHERED_BYTES_MAX`]: then it leaves in one send with its length, and an answer that
//! breaks off underway has cost the client nothing, so that another workspace can be asked. Larger ones flow through.

use std::io::Read;
use std::time::Instant;

use super::{Downstream, Gone, Limits, Quiet, is_tick};

/// How much of an answer is gathered before it begins to flow.
pub const GATHERED_BYTES_MAX: usize = 256 * 1024;

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// All of it went out.
    Complete,
    /// It is a web page, not an answer of the API. Nothing went out.
    WebPage,
    /// Cut before anything went out, and why.
    BrokeBeforeContent(String),
    /// Silent before anything went out.
    SilentBeforeContent,
    /// Cut or silent underway, and why.
    BrokeAfterContent(String),
    /// The client went away.
    ClientGone,
}

/// Makes the response head: with the length, or (`None`) for a body whose length is not known.
pub type MakeHead<'a> = dyn Fn(Option<u64>) -> Vec<u8> + 'a;

/// One attempt's answer.
pub struct Body<'a> {
    /// Where it goes.
    pub downstream: &'a Downstream,
    /// Makes the head.
    pub make_head: &'a MakeHead<'a>,
    /// The length the workspace announced.
    pub length: Option<u64>,
    /// How long to wait.
    pub limits: Limits,
    /// The clock.
    pub clock: &'a dyn Fn() -> Instant,
}

impl Body<'_> {
    /// Relays until the end. What was gathered stays in `gathered` for the caller to look at.
    pub fn run(&self, upstream: &mut dyn Read, gathered: &mut Vec<u8>) -> Ended {
        let room = Room { announced: self.length, most: GATHERED_BYTES_MAX };
        match gather(upstream, self.downstream, self.limits, self.clock, room, gathered) {
            _ if looks_like_web_page(gathered) => Ended::WebPage,
            Gathered::Whole => self.send_whole(gathered),
            Gathered::Full => self.flow(upstream, gathered),
            Gathered::Broke(why) => Ended::BrokeBeforeContent(why),
            Gathered::Silent => Ended::SilentBeforeContent,
            Gathered::ClientGone => Ended::ClientGone,
        }
    }

    fn send_whole(&self, gathered: &[u8]) -> Ended {
        let mut bytes = (self.make_head)(Some(gathered.len() as u64));
        bytes.extend_from_slice(gathered);
        match self.downstream.send_framed(&bytes, gathered.len(), (self.clock)()) {
            Ok(()) => Ended::Complete,
            Err(Gone) => Ended::ClientGone,
        }
    }

    /// The first part with the head, then the rest as it comes.
    fn flow(&self, upstream: &mut dyn Read, gathered: &[u8]) -> Ended {
        let head = (self.make_head)(self.length);
        let mut last_upstream = (self.clock)();
        if self.send(&head, gathered, last_upstream).is_err() {
            return Ended::ClientGone;
        }
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match upstream.read(&mut buffer) {
                Ok(0) if self.length.is_some() => return Ended::Complete,
                Ok(0) => {
                    let ended = self.downstream.end_stream();
                    return ended.map_or(Ended::ClientGone, |()| Ended::Complete);
                }
                Ok(count) => {
                    last_upstream = (self.clock)();
                    if self.send(&head, &buffer[..count], last_upstream).is_err() {
                        return Ended::ClientGone;
                    }
                }
                Err(error) if is_tick(&error) => {
                    match self.downstream.quiet(last_upstream, self.limits, (self.clock)()) {
                        Some(Quiet::ClientGone) => return Ended::ClientGone,
                        Some(Quiet::Silent) => {
                            return Ended::BrokeAfterContent("the workspace fell silent".into());
                        }
                        None => {}
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Ended::BrokeAfterContent(error.to_string()),
            }
        }
    }

    fn send(&self, head: &[u8], part: &[u8], now: Instant) -> Result<(), Gone> {
        if self.length.is_none() {
            return self.downstream.send_part(head, part, now);
        }
        if self.downstream.has_head() {
            return self.downstream.send_framed(part, part.len(), now);
        }
        self.downstream.send_framed(&[head, part].concat(), part.len(), now)
    }
}

/// How much is gathered.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// The length that was announced, in bytes.
    pub announced: Option<u64>,
    /// At most so much, in bytes.
    pub most: usize,
}

impl Room {
    /// How large a buffer shall be that is full. With a length announced a byte more than that, to see the end.
    fn after(self, filled: usize) -> usize {
        let announced = self.announced.and_then(|bytes| usize::try_from(bytes).ok()).filter(|_| filled == 0);
        announced.map_or((filled * 2).max(8 * 1024), |bytes| bytes.saturating_add(1)).min(self.most)
    }
}

/// How gathering ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gathered {
    /// The body is whole.
    Whole,
    /// There is more than fits.
    Full,
    /// Cut, and why.
    Broke(String),
    /// Silent for too long.
    Silent,
    /// The client went away meanwhile.
    ClientGone,
}

/// Reads up to `most` bytes into `gathered`.
pub fn gather(
    upstream: &mut dyn Read,
    downstream: &Downstream,
    limits: Limits,
    clock: &dyn Fn() -> Instant,
    room: Room,
    gathered: &mut Vec<u8>,
) -> Gathered {
    gathered.clear();
    let mut last_upstream = clock();
    let mut filled = 0;
    loop {
        if filled == gathered.len() {
            if filled >= room.most {
                return Gathered::Full;
            }
            gathered.resize(room.after(filled), 0);
        }
        let ended = match upstream.read(&mut gathered[filled..]) {
            Ok(0) => Some(Gathered::Whole),
            Ok(count) => {
                (filled, last_upstream) = (filled + count, clock());
                None
            }
            Err(error) if is_tick(&error) => match downstream.quiet(last_upstream, limits, clock()) {
                Some(Quiet::ClientGone) => Some(Gathered::ClientGone),
                Some(Quiet::Silent) => Some(Gathered::Silent),
                None => None,
            },
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => None,
            Err(error) => Some(Gathered::Broke(error.to_string())),
        };
        if let Some(ended) = ended {
            gathered.truncate(filled);
            return ended;
        }
    }
}

/// No answer of the API begins with a tag.
fn looks_like_web_page(start: &[u8]) -> bool {
    start.trim_ascii_start().first() == Some(&b'<')
}
