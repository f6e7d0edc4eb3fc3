//! Reads request bodies: at most so many bytes, at least so fast, and until a deadline on the wall.
//!
//! A body that has arrived already is read by the worker itself; a slow one by a thread of the reader lanes. Either
//! way the key was checked first, and a body that is not wanted is never waited for.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tiny_http::Request;

use super::budget::Share;
use super::connection::Connection;
use super::watcher::whole_length;
use super::{Job, Shared};
use crate::env;
use crate::http::answer::Refusal;
use crate::http::chunked::Chunked;
use crate::http::head::Framing;

/// A body slower than this, in bytes per second on average, is given up...
const RATE_MIN: u64 = 1024;
/// ...but not before it had this long.
const RATE_GRACE: Duration = Duration::from_secs(5);

/// tiny_http (fork 0.12.17) fills a buffer of this size whenever less is asked for, and reads bodies up to this size
/// before it hands the request out.
pub(super) const READ_AHEAD: usize = 1024;

/// A body, and the end of the request that tiny_http waits for before it reads the next one.
pub(super) struct Read {
    pub(super) body: Vec<u8>,
    /// Never written to: answers go through our own handle. Dropped when the answer is out.
    pub(super) writer: Box<dyn Write + Send>,
    /// The answer to this one ends the connection: there may be more behind it, in tiny_http's buffer.
    pub(super) closes: bool,
    /// The memory it takes.
    pub(super) share: Share,
}

/// A body is held twice while it is served: as it came, and as it goes out with the model's name.
const COPIES: usize = 2;

/// Why there is no body.
pub(super) enum Failed {
    /// The client is told why. With what tiny_http has of the request, if it has seen it.
    Refused(Refusal, Option<Box<Request>>),
    /// tiny_http has refused the head after all, or the client has reset the connection.
    Lost,
}

/// Reads the body of a request.
pub(super) fn read(job: &mut Job, shared: &Shared) -> Result<Read, Failed> {
    match whole_length(&job.head) {
        Some(_) => read_through_library(job, shared),
        None => read_from_socket(job, shared).map_err(|refusal| Failed::Refused(refusal, None)),
    }
}

/// Pulls the request from tiny_http and reads its body.
fn read_through_library(job: &mut Job, shared: &Shared) -> Result<Read, Failed> {
    // tiny_http reads ahead, and what it takes of a next request is never seen by the watcher. So this is asked just
    // before it reads the head, and again before it reads the end of the body.
    let mut closes = whole_length(&job.head).is_none_or(|whole| job.connection.available() > whole);
    let mut request = job.connection.next_request().ok_or(Failed::Lost)?;
    let limits = Limits {
        framing: job.head.framing(),
        bytes_max: job.route.body_bytes_max,
        started: env::now(),
        longest: shared.settings.body,
    };
    let connection = &job.connection;
    let mut at_end = |left: u64| {
        if !closes {
            connection.wait_for_input();
            closes = connection.available() > left;
        }
    };
    let mut share = shared.bodies_of(job.route.pool).share();
    let mut has_room = |bytes: usize| share.grow_to(bytes.saturating_mul(COPIES));
    let mut around =
        Around { has_room: &mut has_room, is_gone: &|| connection.is_gone(), at_end: &mut at_end };
    match read_body(request.as_reader(), limits, &env::now, &mut around) {
        Ok(body) => Ok(Read { body, writer: request.into_writer(), closes, share }),
        Err(refusal) => Err(Failed::Refused(refusal, Some(Box::new(request)))),
    }
}

/// Reads a body in chunks, or one that the client holds back until it is asked for it, past tiny_http: its decoder
/// does not stand what strangers send (see [`Chunked`]), and it would read on behind the body.
fn read_from_socket(job: &mut Job, shared: &Shared) -> Result<Read, Refusal> {
    let Job { connection, head, route, .. } = job;
    if !connection.discard_exactly(head.len() as u64) {
        return Err(Refusal::new(400, "the request cannot be read"));
    }
    if head.expects_continue() && !head.is_http_1_0() {
        connection.send_now(b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    let limits = Limits {
        framing: head.framing(),
        bytes_max: route.body_bytes_max,
        started: env::now(),
        longest: shared.settings.body,
    };
    let mut share = shared.bodies_of(route.pool).share();
    let mut has_room = |bytes: usize| share.grow_to(bytes.saturating_mul(COPIES));
    let mut around =
        Around { has_room: &mut has_room, is_gone: &|| connection.is_gone(), at_end: &mut |_| {} };
    let source = Source(connection);
    let (body, has_read_beyond) = match head.framing() {
        Framing::Chunked => {
            let mut chunked = Chunked::new(source);
            let body = read_body(&mut chunked, limits, &env::now, &mut around)?;
            (body, chunked.has_read_beyond())
        }
        Framing::Length(bytes) => {
            (read_body(&mut io::Read::take(source, bytes), limits, &env::now, &mut around)?, false)
        }
        Framing::None => (Vec::new(), false),
    };
    let closes = has_read_beyond || connection.available() > 0;
    Ok(Read { body, writer: Box::new(io::sink()), closes, share })
}

/// What the client sends. A read waits as long as any read on this socket may wait.
struct Source<'a>(&'a Connection);

impl io::Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.take(buffer)
    }
}

/// A reader thread's part.
pub(super) fn run(shared: &Arc<Shared>, mut job: Job) {
    match read(&mut job, shared) {
        Ok(read) => job.read = Some(read),
        Err(failed) => return give_up(shared, job, failed),
    }
    if let Err(job) = shared.enqueue(job) {
        shared.turn_away(*job, Refusal::overloaded("every worker is busy and the queue is full"));
    }
}

/// Answers a request whose body could not be read, without reading the rest of it.
pub(super) fn give_up(shared: &Shared, job: Job, failed: Failed) {
    let Job { connection, head, .. } = job;
    let Failed::Refused(refusal, request) = failed else {
        // What tiny_http says to that is not in our words, and stays in its buffer.
        let refusal = Refusal::new(400, "the request cannot be read");
        return shared.refuse(connection, refusal, Some(&head));
    };
    let answer = shared.service.refuse(refusal, Some(&head), connection.peer());
    connection.send_now(&answer.to_bytes(false, true));
    let is_deaf = request.is_some();
    if let Some(request) = request {
        // tiny_http drains an unread body when the request is dropped; after this it finds no more than has arrived.
        connection.end_receiving();
        drop(request.into_writer());
    }
    shared.watcher.linger(connection, is_deaf);
}

/// The first room for a body whose length was not told.
const CHUNKED_AT_FIRST: usize = 16 * 1024;
/// How much of a body is asked for at a time.
const WINDOW: usize = 256 * 1024;

#[derive(Clone, Copy)]
struct Limits {
    framing: Framing,
    bytes_max: usize,
    started: Instant,
    longest: Duration,
}

/// What reading a body asks of its surroundings.
struct Around<'a> {
    /// Takes memory for a body of this size, if there is any.
    has_room: &'a mut dyn FnMut(usize) -> bool,
    is_gone: &'a dyn Fn() -> bool,
    /// So many bytes are left to be read.
    at_end: &'a mut dyn FnMut(u64),
}

impl Around<'_> {
    /// Gives `body` room for this many bytes in all. A lack of memory is told to one client; left to the allocator it
    /// would end the process.
    fn make_room(&mut self, body: &mut Vec<u8>, bytes: usize) -> Result<usize, Refusal> {
        if !(self.has_room)(bytes) {
            let why = "the proxy holds as many bytes of request bodies as it may (limits.max_buffered_bytes)";
            return Err(Refusal::overloaded(why));
        }
        match body.try_reserve_exact(bytes - body.len()) {
            Ok(()) => Ok(bytes),
            Err(_) => Err(Refusal::overloaded("the proxy has no memory for this request")),
        }
    }
}

fn read_body(
    reader: &mut dyn io::Read,
    limits: Limits,
    clock: &dyn Fn() -> Instant,
    around: &mut Around<'_>,
) -> Result<Vec<u8>, Refusal> {
    let too_large = |bytes| Refusal::too_large(bytes, limits.bytes_max);
    let expected = match limits.framing {
        Framing::None => return Ok(Vec::new()),
        Framing::Length(bytes) if bytes > limits.bytes_max as u64 => return Err(too_large(Some(bytes))),
        Framing::Length(bytes) => Some(bytes as usize),
        Framing::Chunked => None,
    };
    let mut body = Vec::new();
    let mut room = around.make_room(&mut body, expected.unwrap_or(CHUNKED_AT_FIRST))?;
    let mut filled = 0;
    while Some(filled) != expected {
        if filled == room {
            // One byte more than allowed, to see that there is more than allowed.
            let larger = (room * 2).min(limits.bytes_max + 1);
            if larger == room {
                return Err(too_large(None));
            }
            room = around.make_room(&mut body, larger)?;
        }
        // Memory is touched only as bytes arrive: a false length costs nothing. What is asked for is never less than
        // tiny_http reads ahead.
        if body.len() - filled < READ_AHEAD {
            body.resize((filled + WINDOW).min(room), 0);
        }
        // Shorter bodies have been read with the head.
        if let Some(expected) = expected.filter(|&bytes| bytes > READ_AHEAD && bytes - filled < READ_AHEAD) {
            (around.at_end)((expected - filled) as u64);
        }
        match reader.read(&mut body[filled..]) {
            Ok(0) => match expected {
                Some(expected) => {
                    let why = format!("the request body ended after {filled} of {expected} bytes");
                    return Err(Refusal::new(400, why));
                }
                None if filled > limits.bytes_max => return Err(too_large(None)),
                None => break,
            },
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if (around.is_gone)() {
                    return Err(Refusal::new(400, "the client left before its request was whole"));
                }
            }
            Err(error) => return Err(Refusal::new(400, format!("the request body cannot be read: {error}"))),
        }
        let elapsed = clock().saturating_duration_since(limits.started);
        let is_slow = elapsed > RATE_GRACE && (filled as u64) < RATE_MIN * elapsed.as_secs();
        if Some(filled) != expected && (elapsed >= limits.longest || is_slow) {
            return Err(Refusal::new(
                408,
                format!("the request body came too slowly: {filled} bytes in {elapsed:.0?}"),
            ));
        }
    }
    body.truncate(filled);
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Memory for a body.
    const ROOM: usize = 200_000;

    /// Gives `step` bytes a read, and takes a second for each.
    struct Slow<'a> {
        left: usize,
        step: usize,
        time: &'a Cell<Instant>,
    }

    impl io::Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.time.set(self.time.get() + Duration::from_secs(1));
            let count = self.step.min(self.left).min(buffer.len());
            self.left -= count;
            Ok(count)
        }
    }

    fn check(framing: Framing, left: usize, step: usize, most: usize) -> Result<usize, u16> {
        let time = Cell::new(env::now());
        let limits =
            Limits { framing, bytes_max: most, started: time.get(), longest: Duration::from_secs(60) };
        let mut reader = Slow { left, step, time: &time };
        let mut around =
            Around { has_room: &mut |bytes| bytes <= ROOM, is_gone: &|| false, at_end: &mut |_| {} };
        let read = read_body(&mut reader, limits, &|| time.get(), &mut around);
        read.map(|body| body.len()).map_err(|refusal| refusal.status)
    }

    #[test]
    fn bodies_are_whole_or_refused() {
        use Framing::{Chunked, Length, None};
        for (framing, left, step, most, expected) in [
            (None, 9, 9, 100, Ok(0)),
            (Length(0), 0, 1, 100, Ok(0)),
            (Length(100), 100, 40, 100, Ok(100)),
            (Length(100), 99, 40, 100, Err(400)),
            (Length(101), 101, 40, 100, Err(413)),
            (Length(u64::MAX), 1, 1, 100, Err(413)),
            (Chunked, 100, 40, 100, Ok(100)),
            (Chunked, 101, 40, 100, Err(413)),
            (Chunked, 60_000, 40_000, 100_000, Ok(60_000)),
            (Length(100_000), 100_000, 1, 100_000, Err(408)),
            (Length(200_000), 200_000, 2_000, 200_000, Err(408)),
            (Length(200_001), 200_001, 40_000, 300_000, Err(529)),
            (Chunked, 300_000, 40_000, 300_000, Err(529)),
        ] {
            assert_eq!(check(framing, left, step, most), expected, "{framing:?} {left} {step}");
        }
    }
}
