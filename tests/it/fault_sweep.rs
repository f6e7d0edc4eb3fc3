//! The workspace breaks at every place that matters: refused or blackholed, in the TLS handshake, in the head, at and
//! inside every event and chunk, before the last chunk. It closes, resets, or falls silent there; the request streams
//! or not; another workspace stands by or not. One checker for all: the client has a whole answer, an honest error or
//! a broken connection, never a short success; attempts, blame and slots are as the rules say; one access line.

use std::net::SocketAddr;

use crate::support::client::{Answer, End, Request};
use crate::support::cutter::{Break, Cutter};
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::tls::{TlsUpstream, authority};
use crate::support::upstream::{DeadAddress, Upstream};
use crate::support::{eventually, fixtures, sse, together};

/// How far the first workspace came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// No whole head.
    NoHead,
    /// Nothing that the client could make use of.
    NoContent,
    /// `message_start`, and nothing else that counts.
    Opened,
    /// Content, as far as this many bytes.
    Content(usize),
    Whole,
    /// In the last bytes of the framing, where both are right.
    WholeOrNoContent,
}

/// An answer as bytes on the wire, and what each prefix of it is worth.
struct Wire {
    name: &'static str,
    bytes: Vec<u8>,
    payload: Vec<u8>,
    is_stream: bool,
    is_chunked: bool,
    head: usize,
}

impl Wire {
    fn new(name: &'static str, is_stream: bool, is_chunked: bool) -> Self {
        let payload =
            if is_stream { sse::message("msg_first", "from the first") } else { fixtures::message_json() };
        let kind = if is_stream { "text/event-stream" } else { "application/json" };
        let framing = match is_chunked {
            true => "transfer-encoding: chunked".to_owned(),
            false => format!("content-length: {}", payload.len()),
        };
        let mut bytes = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n").into_bytes();
        let head = bytes.len();
        let parts: Vec<&[u8]> = if is_stream { sse::split(&payload) } else { payload.chunks(100).collect() };
        for part in parts {
            match is_chunked {
                true => bytes
                    .extend_from_slice(&[format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat()),
                false => bytes.extend_from_slice(part),
            }
        }
        if is_chunked {
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
        Self { name, bytes, payload, is_stream, is_chunked, head }
    }

    fn all() -> Vec<Self> {
        vec![
            Self::new("a chunked stream", true, true),
            Self::new("a stream with a length", true, false),
            Self::new("a chunked answer", false, true),
            Self::new("an answer with a length", false, false),
        ]
    }

    /// Around every line end, in the middle of every line, and a few more places in the head.
    fn places(&self) -> Vec<usize> {
        let mut places = vec![0, 1, 4, 8, 9, 12];
        let mut line = 0;
        for at in memchr::memchr_iter(b'\n', &self.bytes) {
            places.extend([line + (at - line) / 2, at, at + 1, at + 2]);
            line = at;
        }
        places.extend((self.head..self.bytes.len()).step_by(61));
        places.retain(|&place| place < self.bytes.len());
        places.sort_unstable();
        places.dedup();
        places
    }

    /// The body in the first `cut` bytes of the wire.
    fn received(&self, cut: usize) -> usize {
        let mut rest = &self.bytes[self.head..cut];
        if !self.is_chunked {
            return rest.len();
        }
        let mut received = 0;
        while let Some(line) = memchr::memmem::find(rest, b"\r\n") {
            let size =
                std::str::from_utf8(&rest[..line]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
            let size = size.expect("a chunk of our own");
            let there = size.min(rest.len() - line - 2);
            received += there;
            rest = rest.get(line + 2 + size + 2..).unwrap_or_default();
        }
        received
    }

    fn came(&self, cut: usize) -> Came {
        if cut < self.head {
            return Came::NoHead;
        }
        let received = self.received(cut);
        let is_whole = received == self.payload.len();
        if !self.is_stream {
            return match is_whole {
                true if cut + 5 > self.bytes.len() => Came::WholeOrNoContent,
                _ => Came::NoContent,
            };
        }
        let events = sse::split(&self.payload);
        match received {
            _ if is_whole => Came::Whole,
            _ if received >= events[0].len() + events[1].len() => Came::Content(received),
            _ if received >= events[0].len() => Came::Opened,
            _ => Came::NoContent,
        }
    }
}

/// A proxy with a first workspace that breaks, and perhaps a healthy second one.
struct World {
    proxy: Proxy,
    second: Option<Upstream>,
}

const SHORT: f64 = 0.5;
const LONG: f64 = 12.0;

const SECOND: &str = "msg_second";

impl World {
    /// `patience` in seconds: short where silence is waited for, long where it would only be a slow machine.
    fn new(setup: Setup, has_second: bool, patience: f64) -> Self {
        let second = has_second.then(|| {
            let upstream = Upstream::start();
            upstream.answer(|request| match memchr::memmem::find(&request.body, b"\"stream\":true") {
                Some(_) => Reply::stream(sse::message(SECOND, "from the second")),
                None => Reply::message(),
            });
            upstream
        });
        let setup = second.iter().fold(setup, |setup, second| setup.and_endpoint_at(second.address()));
        let setup = setup
            .in_order()
            .set("load_balancer.circuit_breaker_threshold", 1_000)
            // The only endpoint would be asked again after a pause; that rule has a test of its own.
            .set("load_balancer.max_attempts", if has_second { 3 } else { 1 })
            .set("timeouts.first_byte", patience)
            .set("timeouts.idle", patience)
            .set("timeouts.connect", patience);
        Self { proxy: setup.start(), second }
    }

    /// One request, and everything that must hold however the first workspace broke.
    fn ask(&self, what: &str, request: &Request) -> Answer {
        assert_eq!(self.proxy.ask(&Request::new("POST", "/reset")).status(), 200);
        let (attempts, asked_second) = (self.proxy.number("w1", "total_requests"), self.seconds());
        let answer = self.proxy.ask(request);
        expect_honest(what, &answer);
        self.proxy.wait_idle();
        let endpoint = self.proxy.endpoint("w1");
        let made = endpoint["total_requests"].as_u64().expect("a count") - attempts;
        let others = (self.seconds() - asked_second) as u64;
        assert_eq!(made, 1, "{what}: attempts at the first");
        assert!(others <= 1, "{what}: attempts at the second");
        if let Some(attempts) = answer.number("x-claude-lb-attempts").filter(|_| !answer.end.is_broken()) {
            let is_relayed_opening = answer.header("x-claude-lb-endpoint") == Some("w1") && others == 1;
            assert!(attempts == made + others || is_relayed_opening, "{what}: {attempts} attempts told");
        }
        let is_whole = answer.status() == 200 && !answer.end.is_broken() && others == 0;
        let blamed = u64::from(!is_whole);
        assert_eq!(endpoint["total_errors"], blamed, "{what}: {endpoint}");
        assert_eq!(endpoint["consecutive_failures"], blamed, "{what}: {endpoint}");
        let id = answer.header("request-id").expect("every answer has a request-id");
        self.proxy.wait_log(id);
        let lines = self.proxy.running.err.all();
        let lines: Vec<&String> = lines.iter().filter(|line| line.contains(id)).collect();
        assert_eq!(lines.len(), 1, "{what}: {lines:?}");
        answer
    }

    fn seconds(&self) -> usize {
        self.second.as_ref().map_or(0, Upstream::count)
    }
}

/// A whole answer, an error in Anthropic's shape, or a connection that broke after the stream had begun.
fn expect_honest(what: &str, answer: &Answer) {
    let names = sse::names(&answer.body);
    let is_stream = answer.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
    assert!(names.iter().filter(|name| *name == "message_start").count() <= 1, "{what}: {names:?}");
    match (answer.status(), answer.end) {
        (200, End::Complete) if is_stream => {
            assert_eq!(names.last().map(String::as_str), Some("message_stop"), "{what}: a short success");
        }
        (200, End::Complete) => assert_eq!(answer.body, fixtures::message_json(), "{what}: a short success"),
        (200, _) => assert!(is_stream, "{what}: only a stream may break"),
        (status, end) => {
            assert_eq!(end, End::Complete, "{what}");
            assert!(matches!(status, 502 | 504), "{what}: {status}");
            answer.refusal(status);
        }
    }
}

/// What exactly the client sees, when it is known how far the first workspace came.
fn expect_as_far(what: &str, wire: &Wire, came: Came, has_second: bool, stalls: bool, answer: &Answer) {
    let failure = if stalls { 504 } else { 502 };
    let seen = (answer.status(), answer.end.is_broken());
    match came {
        Came::WholeOrNoContent => {}
        Came::Whole => assert_eq!((seen, &answer.body), ((200, false), &wire.payload), "{what}"),
        Came::Content(bytes) => {
            assert_eq!(seen, (200, true), "{what}");
            assert_eq!(answer.text(), String::from_utf8_lossy(&wire.payload[..bytes]), "{what}");
        }
        Came::Opened if has_second => {
            assert_eq!(seen, (200, false), "{what}");
            assert!(answer.text().contains("msg_first") && !answer.text().contains(SECOND), "{what}");
            assert!(answer.text().contains("from the second"), "{what}: {}", answer.text());
        }
        Came::Opened => {
            assert_eq!(seen, (200, true), "{what}");
            assert_eq!(sse::names(&answer.body), ["message_start"], "{what}");
        }
        Came::NoHead | Came::NoContent if has_second => {
            assert_eq!(seen, (200, false), "{what}");
            assert_eq!(answer.header("x-claude-lb-endpoint"), Some("w2"), "{what}");
        }
        Came::NoHead | Came::NoContent => assert_eq!(seen, (failure, false), "{what}: {}", answer.text()),
    }
}

fn sweep(wire: &Wire, how: Break, has_second: bool) {
    let first = Upstream::start();
    let patience = if how == Break::Stall { SHORT } else { LONG };
    let world = World::new(Proxy::with(&[&first]), has_second, patience);
    let request = if wire.is_stream { Request::stream() } else { Request::message() };
    let step = if how == Break::Stall { 9 } else { 1 };
    for place in wire.places().into_iter().step_by(step) {
        let reply = Reply::garbage(&wire.bytes[..place]);
        first.queue([match how {
            Break::Close => reply,
            Break::Reset => reply.reset(),
            Break::Stall => reply.stall(),
        }]);
        let what = format!("{}, {how:?} at byte {place}, second: {has_second}", wire.name);
        let answer = world.ask(&what, &request);
        // A reset may overtake what was sent before it.
        if how != Break::Reset {
            expect_as_far(&what, wire, wire.came(place), has_second, how == Break::Stall, &answer);
        }
    }
    // It still serves, and no connection is out of step.
    first.answer(move |_| Reply::garbage(&Wire::new("", false, false).bytes));
    assert_eq!(world.ask("after the sweep", &Request::message()).body, fixtures::message_json());
}

#[test]
fn a_close_anywhere() {
    let wires = Wire::all();
    together(8, |index| sweep(&wires[index / 2], Break::Close, index % 2 == 0));
}

#[test]
fn a_reset_anywhere() {
    let wires = Wire::all();
    together(8, |index| sweep(&wires[index / 2], Break::Reset, index % 2 == 0));
}

#[test]
fn silence_anywhere() {
    let wires = Wire::all();
    together(8, |index| sweep(&wires[index / 2], Break::Stall, index % 2 == 0));
}

/// More than announced: the rest must not become the next answer. Less: see the sweep.
#[test]
fn a_body_longer_than_its_length_taints_no_other_answer() {
    let first = Upstream::start();
    let world = World::new(Proxy::with(&[&first]), false, LONG);
    for _ in 0..5 {
        let body = fixtures::message_json();
        let tail = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nTAINT";
        first.queue([Reply::json(200, [&body[..], tail].concat()).declaring(body.len())]);
        assert_eq!(world.ask("longer than announced", &Request::message()).body, body);
        assert_eq!(world.ask("the one behind it", &Request::message()).body, body);
    }
}

fn at(address: SocketAddr) -> Setup {
    Proxy::with(&[]).and_endpoint_at(address)
}

/// A listener whose queue is full drops what comes: a black hole.
fn black_hole() -> (socket2::Socket, Vec<std::net::TcpStream>, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free loopback port");
    socket.listen(0).expect("a bound socket");
    let address = socket.local_addr().ok().and_then(|address| address.as_socket()).expect("an address");
    let brief = std::time::Duration::from_millis(100);
    let fill = std::iter::from_fn(|| std::net::TcpStream::connect_timeout(&address, brief).ok()).collect();
    (socket, fill, address)
}

#[test]
fn nobody_there_and_a_black_hole() {
    let dead = DeadAddress::new();
    let (_socket, _fill, hole) = black_hole();
    together(4, |index| {
        let (address, has_second) = ([dead.address(), hole][index / 2], index % 2 == 0);
        let world = World::new(at(address), has_second, SHORT);
        for request in [Request::message(), Request::stream()] {
            let answer = world.ask(["refused", "blackholed"][index / 2], &request);
            assert_eq!(answer.status(), if has_second { 200 } else { 502 });
        }
    });
}

fn https(address: SocketAddr) -> Setup {
    let base = format!("https://127.0.0.1:{}/serving-endpoints", address.port());
    at(address).endpoint(0, "api_base", base).set("tls.ca_file", authority().display())
}

/// The wire below TLS breaks: in the handshake, between and inside records.
#[test]
fn tls_cut_or_silent_anywhere() {
    let workspace = TlsUpstream::start();
    let places: Vec<usize> =
        [0, 1, 5, 6, 60, 127, 128, 300].into_iter().chain((400..4_000).step_by(150)).collect();
    together(6, |index| {
        let how = [Break::Close, Break::Reset, Break::Stall][index / 2];
        let cutter = Cutter::before(workspace.address());
        let patience = if how == Break::Stall { SHORT } else { LONG };
        let world = World::new(https(cutter.address()), index % 2 == 0, patience);
        let step = if how == Break::Stall { 4 } else { 1 };
        for &place in places.iter().step_by(step) {
            cutter.set(place, how);
            let what = format!("TLS, {how:?} after {place} bytes, second: {}", index % 2 == 0);
            world.ask(&what, &Request::stream());
        }
    });
    eventually("the workspace to be reached in the end", || {
        let cutter = Cutter::before(workspace.address());
        let world = World::new(https(cutter.address()), false, LONG);
        (world.ask("TLS, not cut", &Request::stream()).status() == 200).then_some(())
    });
}

/// Plain text where TLS was expected, and the other way round.
#[test]
fn the_wrong_protocol() {
    let (plain, tls) =
        (Upstream::always(Reply::garbage("HTTP/1.1 400 Bad Request\r\n\r\n")), TlsUpstream::start());
    together(4, |index| {
        let has_second = index % 2 == 0;
        let setup = if index < 2 { https(plain.address()) } else { at(tls.address()) };
        let answer = World::new(setup, has_second, SHORT).ask("the wrong protocol", &Request::message());
        assert_eq!(answer.status(), if has_second { 200 } else { 502 });
    });
}
