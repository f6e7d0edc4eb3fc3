//! Reads request bodies: at most so many bytes, at least so fast, and until a deadline on the wall.
//!
//! A body that has arrived already is read by the worker itself; a slow one by a thread of the reader lanes. Either
//! way the key was checked first, and a body that is not wanted is never waited for. Memory is taken as bytes come, not
//! as they are announced: who announces 4 MB and sends nothing takes no room from anybody.
//!
//! Everything is taken from the socket as it lies there, past tiny_http: the head was parsed by the watcher. Head and
//! body come in one call where the length is told, and nothing of the next request with them.

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::budget::Share;
use super::connection::Connection;
use super::{Job, Shared};
use crate::env;
use crate::http::answer::Refusal;
use crate::http::chunked::Chunked;
use crate::http::head::Framing;

/// A body slower than this, in bytes per second on average, is given up...
const RATE_MIN: u64 = 1024;
/// ...but not before it had this long.
const RATE_GRACE: Duration = Duration::from_secs(5);

/// The body of a request. Its memory, and its share of what there is for bodies, come back when it is dropped.
pub struct Body {
    /// May begin with the head.
    bytes: Vec<u8>,
    start: usize,
    #[expect(dead_code, reason = "it goes back when the body does")]
    share: Share,
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// A request that was read.
pub(super) struct Read {
    pub(super) body: Body,
    /// The answer to this one ends the connection: there is more behind it.
    pub(super) closes: bool,
}

/// Takes the request from its connection.
pub(super) fn read(job: &Job, shared: &Shared) -> Result<Read, Refusal> {
    let Job { connection, head, route, .. } = job;
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
    let (mut source, start) = match head.framing() {
        Framing::Chunked => {
            if !connection.discard_exactly(head.len() as u64) {
                return Err(Refusal::new(400, "the request cannot be read"));
            }
            (Source::Chunked(Chunked::new(Socket(connection))), 0)
        }
        Framing::None | Framing::Length(_) => (Source::Plain(connection), head.len()),
    };
    let mut has_room = |bytes: usize| share.grow_to(bytes);
    let mut around = Around { has_room: &mut has_room, is_gone: &|| connection.is_gone() };
    let bytes = read_body(&mut source, start, limits, &env::now, &mut around)?;
    let closes = job.has_more || matches!(source, Source::Chunked(chunked) if chunked.has_read_beyond());
    Ok(Read { body: Body { bytes, start, share }, closes })
}

/// A reader thread's part.
pub(super) fn run(shared: &Arc<Shared>, mut job: Job) {
    match read(&job, shared) {
        Ok(read) => job.read = Some(read),
        Err(refusal) => return give_up(shared, job, refusal),
    }
    if let Err(job) = shared.enqueue(job) {
        shared.turn_away(*job, Refusal::overloaded("every worker is busy and the queue is full"));
    }
}

/// Answers a request whose body could not be read, without reading the rest of it.
pub(super) fn give_up(shared: &Shared, job: Job, refusal: Refusal) {
    let Job { connection, head, .. } = job;
    let answer = shared.service.refuse(refusal, Some(&head), connection.peer());
    connection.send_now(&answer.to_bytes(false, true));
    shared.watcher.linger(connection);
}

/// The first room for a body whose length was not told.
const CHUNKED_AT_FIRST: usize = 16 * 1024;
/// The first room for a body of which not more has come. It doubles when it is full: a body that is still coming takes
/// at most twice what is there of it.
const PLAIN_AT_FIRST: usize = 64 * 1024;
/// How much is decoded at a time.
const WINDOW: usize = 16 * 1024;

#[derive(Clone, Copy)]
struct Limits {
    framing: Framing,
    bytes_max: usize,
    started: Instant,
    longest: Duration,
}

/// Where a body comes from.
enum Source<'a> {
    /// The socket, as it is.
    Plain(&'a Connection),
    /// The socket, behind the head, in chunks.
    Chunked(Chunked<Socket<'a>>),
    #[cfg(test)]
    Test(&'a mut dyn io::Read),
}

impl Source<'_> {
    /// How much more has come already, as far as that can be told.
    fn waiting(&self) -> usize {
        match self {
            Source::Plain(connection) => connection.available() as usize,
            _ => 0,
        }
    }

    /// Appends what has come, to `room` bytes in all at most.
    fn append_to(&mut self, body: &mut Vec<u8>, room: usize) -> io::Result<usize> {
        match self {
            Source::Plain(connection) => connection.receive(body, room - body.len()),
            Source::Chunked(chunked) => append(chunked, body, room),
            #[cfg(test)]
            Source::Test(reader) => append(reader, body, room),
        }
    }
}

fn append(reader: &mut dyn io::Read, body: &mut Vec<u8>, room: usize) -> io::Result<usize> {
    let filled = body.len();
    body.resize((filled + WINDOW).min(room), 0);
    let result = reader.read(&mut body[filled..]);
    body.truncate(filled + result.as_ref().map_or(0, |&count| count));
    result
}

/// What the client sends. A read waits as long as any read on this socket may wait.
struct Socket<'a>(&'a Connection);

impl io::Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.take(buffer)
    }
}

/// What reading a body asks of its surroundings.
struct Around<'a> {
    /// Takes memory for a body of this size, if there is any.
    has_room: &'a mut dyn FnMut(usize) -> bool,
    is_gone: &'a dyn Fn() -> bool,
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

/// Reads to the end of the body, behind `start` bytes that come before it and stand before it in the result.
fn read_body(
    source: &mut Source<'_>,
    start: usize,
    limits: Limits,
    clock: &dyn Fn() -> Instant,
    around: &mut Around<'_>,
) -> Result<Vec<u8>, Refusal> {
    let too_large = |bytes| Refusal::too_large(bytes, limits.bytes_max);
    let expected = match limits.framing {
        Framing::None => Some(start),
        Framing::Length(bytes) if bytes > limits.bytes_max as u64 => return Err(too_large(Some(bytes))),
        Framing::Length(bytes) => Some(start + bytes as usize),
        Framing::Chunked => None,
    };
    // One byte more than allowed, to see that there is more than allowed.
    let most = expected.unwrap_or(limits.bytes_max + 1);
    let at_first = if expected.is_some() { PLAIN_AT_FIRST } else { CHUNKED_AT_FIRST };
    let mut body = Vec::new();
    let mut room = 0;
    while Some(body.len()) != expected {
        if body.len() == room {
            let larger = (room * 2).max(at_first).min(most);
            // What lies there anyway is taken at once.
            let larger = if larger == most { most } else { larger.max(room + source.waiting()).min(most) };
            if larger == room {
                return Err(too_large(None));
            }
            room = around.make_room(&mut body, larger)?;
        }
        match source.append_to(&mut body, room) {
            Ok(0) => match expected {
                Some(expected) => {
                    let (have, whole) = (body.len().saturating_sub(start), expected - start);
                    let why = format!("the request body ended after {have} of {whole} bytes");
                    return Err(Refusal::new(400, why));
                }
                None if body.len() > limits.bytes_max => return Err(too_large(None)),
                None => break,
            },
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if (around.is_gone)() {
                    return Err(Refusal::new(400, "the client left before its request was whole"));
                }
            }
            Err(error) => return Err(Refusal::new(400, format!("the request body cannot be read: {error}"))),
        }
        if Some(body.len()) == expected {
            break;
        }
        let elapsed = clock().saturating_duration_since(limits.started);
        let is_slow = elapsed > RATE_GRACE && (body.len() as u64) < RATE_MIN * elapsed.as_secs();
        if elapsed >= limits.longest || is_slow {
            let have = body.len().saturating_sub(start);
            let why = format!("the request body came too slowly: {have} bytes in {elapsed:.0?}");
            return Err(Refusal::new(408, why));
        }
    }
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
        read_and_charge(framing, left, step, most).0
    }

    /// What became of it, and the most memory that was asked for.
    fn read_and_charge(
        framing: Framing,
        left: usize,
        step: usize,
        most: usize,
    ) -> (Result<usize, u16>, usize) {
        let time = Cell::new(env::now());
        let limits =
            Limits { framing, bytes_max: most, started: time.get(), longest: Duration::from_secs(60) };
        let mut reader = Slow { left, step, time: &time };
        let mut charged = 0;
        let mut has_room = |bytes: usize| {
            charged = charged.max(bytes);
            bytes <= ROOM
        };
        let mut around = Around { has_room: &mut has_room, is_gone: &|| false };
        let read = read_body(&mut Source::Test(&mut reader), 0, limits, &|| time.get(), &mut around);
        (read.map(|body| body.len()).map_err(|refusal| refusal.status), charged)
    }

    #[test]
    fn memory_is_taken_as_bytes_come() {
        let charged = |announced: u64, sent: usize| {
            read_and_charge(Framing::Length(announced), sent, 10_000, 4_000_000).1
        };
        assert_eq!(charged(4_000_000, 0), PLAIN_AT_FIRST);
        assert_eq!(charged(4_000_000, 50_000), PLAIN_AT_FIRST);
        assert!(charged(4_000_000, 70_000) <= 2 * 70_000);
        assert_eq!(charged(100_000, 90_000), 100_000, "never more than was announced");
        assert_eq!(charged(1_000, 1_000), 1_000);
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
            // The first room may not be larger than the body may be, or the next one is reckoned below zero.
            (Chunked, 40_000, 40_000, 100, Err(413)),
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
