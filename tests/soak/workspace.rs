//! A workspace that answers most requests well and the rest in every way the outcome table knows.
//!
//! Each answer carries the nonce of its request, so that a client sees when it got somebody else's. What was received
//! and how it was treated is counted; from time to time a workspace has a bad second in which nearly all fails.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::sse;

/// How one request is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Healthy,
    /// An answer of a megabyte or more.
    Large,
    /// Pauses that are longer than the heartbeat.
    Slow,
    Status(u16),
    /// With Retry-After.
    Later(u16),
    WebPage,
    Redirect,
    /// FIN or RST before any byte.
    HangUp,
    Reset,
    Garbage,
    /// No byte, for longer than `first_byte`.
    Silence,
    HeadCut,
    /// An error event, before or after content.
    EventFirst,
    EventLater,
    /// Cut before or after content, or silent there.
    CutEarly,
    CutLate,
    StallEarly,
    StallLate,
    /// A clean end without `message_stop`.
    EndsShort,
    BadChunk,
}

/// Weights of a usual second.
const FATES: [(Fate, u32); 24] = [
    (Fate::Healthy, 700),
    (Fate::Large, 25),
    (Fate::Slow, 15),
    (Fate::Status(400), 20),
    (Fate::Status(413), 5),
    (Fate::Status(500), 15),
    (Fate::Status(502), 10),
    (Fate::Status(529), 1),
    (Fate::Later(503), 2),
    (Fate::Later(429), 5),
    (Fate::WebPage, 5),
    (Fate::Redirect, 5),
    (Fate::HangUp, 20),
    (Fate::Reset, 20),
    (Fate::Garbage, 10),
    (Fate::Silence, 3),
    (Fate::HeadCut, 10),
    (Fate::EventFirst, 1),
    (Fate::EventLater, 15),
    (Fate::CutEarly, 20),
    (Fate::CutLate, 20),
    (Fate::StallEarly, 3),
    (Fate::StallLate, 3),
    (Fate::EndsShort, 15),
];

/// How often a workspace has a bad second.
const BAD_EVERY: Duration = Duration::from_secs(17);
/// Longer than the proxy's `first_byte` and `idle`, which then end it.
const STALL: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Counts {
    received: AtomicU64,
    /// Hung up before any byte on a connection that had served before: the proxy asks again, and blames nobody.
    hung_up_reused: AtomicU64,
    connections: AtomicU64,
}

/// One workspace. It lives until the test process ends.
pub struct Workspace {
    pub address: SocketAddr,
    counts: Arc<Counts>,
}

impl Workspace {
    pub fn start(seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let counts = Arc::new(Counts::default());
        let (shared, start) = (Arc::clone(&counts), Instant::now());
        std::thread::spawn(move || {
            for (number, socket) in (0u64..).zip(listener.incoming()) {
                let Ok(socket) = socket else { continue };
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let counts = Arc::clone(&shared);
                let rng = fastrand::Rng::with_seed(seed.wrapping_mul(31).wrapping_add(number));
                std::thread::spawn(move || Session { socket: &socket, counts: &counts, rng, start }.run());
            }
        });
        Self { address, counts }
    }

    pub fn received(&self) -> u64 {
        self.counts.received.load(Ordering::SeqCst)
    }

    pub fn hung_up_reused(&self) -> u64 {
        self.counts.hung_up_reused.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::SeqCst)
    }
}

/// One connection.
struct Session<'a> {
    socket: &'a TcpStream,
    counts: &'a Counts,
    rng: fastrand::Rng,
    start: Instant,
}

/// What matters of a request.
struct Asked {
    nonce: String,
    is_stream: bool,
    is_missing_model: bool,
}

impl Session<'_> {
    fn run(mut self) {
        self.socket.set_nodelay(true).ok();
        let mut buffer = Vec::new();
        let mut served = 0;
        while let Some(asked) = self.read(&mut buffer) {
            self.counts.received.fetch_add(1, Ordering::SeqCst);
            let fate = if asked.is_missing_model { Fate::Status(404) } else { self.fate() };
            if served > 0 && matches!(fate, Fate::HangUp | Fate::Reset) {
                self.counts.hung_up_reused.fetch_add(1, Ordering::SeqCst);
            }
            if self.answer(fate, &asked).is_none() {
                break;
            }
            served += 1;
        }
        self.socket.shutdown(Shutdown::Both).ok();
    }

    fn fate(&mut self) -> Fate {
        let is_bad = self.start.elapsed().as_millis() % BAD_EVERY.as_millis() > BAD_EVERY.as_millis() - 1_000;
        if is_bad && self.rng.u8(..10) < 9 {
            return *self
                .rng
                .choice(&[Fate::Status(500), Fate::Status(504), Fate::HangUp, Fate::CutEarly])
                .expect("not empty");
        }
        let all: u32 = FATES.iter().map(|(_, weight)| weight).sum();
        let mut left = self.rng.u32(..all);
        for (fate, weight) in FATES {
            if left < weight {
                return fate;
            }
            left -= weight;
        }
        Fate::BadChunk
    }

    fn read(&mut self, buffer: &mut Vec<u8>) -> Option<Asked> {
        let mut socket = self.socket;
        let mut piece = [0; 16 * 1024];
        let mut fill = |buffer: &mut Vec<u8>| match socket.read(&mut piece) {
            Ok(0) | Err(_) => None,
            Ok(count) => {
                buffer.extend_from_slice(&piece[..count]);
                Some(())
            }
        };
        let head = loop {
            match memchr::memmem::find(buffer, b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => fill(buffer)?,
            }
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:"))?;
        let whole = head + length.trim().parse::<usize>().ok()?;
        while buffer.len() < whole {
            fill(buffer)?;
        }
        let body: Vec<u8> = buffer.drain(..whole).skip(head).collect();
        let nonce = memchr::memmem::find(&body, b"nonce-").map_or(&b"none"[..], |at| &body[at..at + 22]);
        Some(Asked {
            nonce: String::from_utf8_lossy(nonce).into_owned(),
            is_stream: memchr::memmem::find(&body, b"\"stream\":true").is_some(),
            is_missing_model: memchr::memmem::find(&body, b"missing").is_some(),
        })
    }

    fn send(&self, bytes: &[u8]) -> Option<()> {
        let mut socket = self.socket;
        socket.write_all(bytes).ok()
    }

    fn page(&self, status: u16, kind: &str, extra: &str, body: &str) -> Option<()> {
        let length = body.len();
        self.send(
            format!("HTTP/1.1 {status} Soak\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n{extra}\r\n{body}")
                .as_bytes(),
        )
    }

    fn error(&self, status: u16, extra: &str) -> Option<()> {
        let kind = if status == 404 { "not_found_error" } else { "api_error" };
        let message = if status == 404 { "model: no such model" } else { "soak" };
        let body = format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"{message}"}}}}"#);
        self.page(status, "application/json", extra, &body)
    }

    /// `None` when the connection ends here.
    fn answer(&mut self, fate: Fate, asked: &Asked) -> Option<()> {
        match fate {
            Fate::Status(status) => self.error(status, ""),
            Fate::Later(status) => self.error(status, "retry-after: 1\r\n"),
            Fate::WebPage => self.page(200, "text/html", "", "<html>sign in</html>"),
            Fate::Redirect => self.page(302, "text/html", "location: https://login.example/\r\n", ""),
            Fate::HangUp => None,
            Fate::Reset => {
                socket2::SockRef::from(self.socket).set_linger(Some(Duration::ZERO)).ok();
                None
            }
            Fate::Garbage => self.send(b"220 smtp.example ready\r\n\r\n").and(None),
            Fate::Silence => self.wait_for_the_end(),
            Fate::HeadCut => self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/ev").and(None),
            _ if asked.is_stream => self.stream(fate, asked),
            _ => self.message(fate, asked),
        }
    }

    fn message(&mut self, fate: Fate, asked: &Asked) -> Option<()> {
        let text = match fate {
            Fate::Large => "y".repeat(self.rng.usize(200_000..1_500_000)),
            _ => "some words".to_owned(),
        };
        let body = format!(
            r#"{{"id":"msg_1","type":"message","role":"assistant","content":[{{"type":"text","text":"{} {text}"}}],"usage":{{"input_tokens":9,"output_tokens":5}}}}"#,
            asked.nonce
        );
        if fate == Fate::Slow {
            std::thread::sleep(Duration::from_millis(700));
        }
        match fate {
            Fate::Healthy | Fate::Large | Fate::Slow => self.page(200, "application/json", "", &body),
            Fate::StallEarly | Fate::StallLate => {
                self.send(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{",
                )?;
                self.wait_for_the_end()
            }
            _ => {
                let length = body.len() + 100;
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
                );
                self.send(head.as_bytes())?;
                self.send(body.as_bytes()).and(None)
            }
        }
    }

    fn stream(&mut self, fate: Fate, asked: &Asked) -> Option<()> {
        self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
        )?;
        match fate {
            Fate::EventFirst => {
                self.chunk(&sse::error("overloaded_error"))?;
                return self.send(b"0\r\n\r\n");
            }
            Fate::BadChunk => return self.send(b"not-a-size\r\n").and(None),
            _ => self.chunk(&sse::message_start("msg_1"))?,
        }
        match fate {
            Fate::CutEarly => return self.chunk(&sse::block_start()[..20]).and(None),
            Fate::StallEarly => return self.wait_for_the_end(),
            Fate::Slow => std::thread::sleep(Duration::from_millis(700)),
            _ => {}
        }
        self.chunk(&sse::block_start())?;
        self.chunk(&sse::delta(&asked.nonce))?;
        let (deltas, size) = match fate {
            Fate::Large => (self.rng.usize(200..800), 2_000),
            _ => (self.rng.usize(..12), 40),
        };
        for _ in 0..deltas {
            self.chunk(&sse::delta(&"y".repeat(size)))?;
            if fate == Fate::Slow {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        match fate {
            Fate::CutLate => return self.send(b"28\r\nevent: content_bl").and(None),
            Fate::StallLate => return self.wait_for_the_end(),
            Fate::EventLater => self.chunk(&sse::error("api_error"))?,
            Fate::EndsShort => {}
            _ => self.chunk(&sse::ending())?,
        }
        self.send(b"0\r\n\r\n")
    }

    fn chunk(&self, bytes: &[u8]) -> Option<()> {
        self.send(&[format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())
    }

    /// Says nothing until the proxy gives up.
    fn wait_for_the_end(&self) -> Option<()> {
        let mut socket = self.socket;
        socket.set_read_timeout(Some(STALL)).ok();
        socket.read_exact(&mut [0; 1]).ok();
        None
    }
}
