//! A raw HTTP/1.1 client: what is sent is exactly what the test says, and what is read is read as it arrives.
//!
//! Every read has a deadline. How a body ended is a value ([`End`]), because the difference between a final chunk,
//! a close and a reset is what a client decides by.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use super::DEADLINE;
use super::fixtures::Captured;

/// The key that the configuration of the tests accepts, and that the captured requests carry.
pub const KEY: &str = "lb-key-example";

/// A request, not yet bytes.
#[derive(Clone)]
pub struct Request {
    method: String,
    target: String,
    version: &'static str,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Chunk size when the body goes out chunked.
    chunks_of: Option<usize>,
}

impl Request {
    pub fn new(method: &str, target: &str) -> Self {
        let headers = vec![("Host".to_owned(), "claude-lb.test:8000".to_owned())];
        let (method, target) = (method.to_owned(), target.to_owned());
        Self { method, target, version: "HTTP/1.1", headers, body: vec![], chunks_of: None }
    }

    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    /// `POST /v1/messages` with the key and this body.
    pub fn post_message(body: impl AsRef<[u8]>) -> Self {
        Self::new("POST", "/v1/messages?beta=true")
            .with("Content-Type", "application/json")
            .with("anthropic-version", "2023-06-01")
            .with("x-api-key", KEY)
            .body(body)
    }

    /// A small message for this model.
    pub fn message_for(model: &str, stream: bool) -> Self {
        let body = json!({"model": model, "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 64, "stream": stream});
        Self::post_message(body.to_string())
    }

    /// A small message that wants JSON.
    pub fn message() -> Self {
        Self::message_for("claude-sonnet-4-5", false)
    }

    /// A small message that wants a stream.
    pub fn stream() -> Self {
        Self::message_for("claude-sonnet-4-5", true)
    }

    /// A captured request, header for header.
    pub fn captured(captured: &Captured) -> Self {
        let mut request = Self::new(&captured.method, &captured.target);
        request.headers = captured.headers.clone();
        request.body = captured.body.clone();
        request
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self
    }

    /// Sets the body and its Content-Length.
    pub fn body(self, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref().to_vec();
        let mut request = self.without("Content-Length").with("Content-Length", &body.len().to_string());
        request.body = body;
        request
    }

    /// The same body in chunks of this size, without a Content-Length.
    pub fn chunked(self, size: usize) -> Self {
        let mut request = self.without("Content-Length").with("Transfer-Encoding", "chunked");
        request.chunks_of = Some(size);
        request
    }

    pub fn version(mut self, version: &'static str) -> Self {
        self.version = version;
        self
    }

    pub fn head_bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} {}\r\n", self.method, self.target, self.version);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        head.into_bytes()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.head_bytes();
        match self.chunks_of {
            None => bytes.extend_from_slice(&self.body),
            Some(size) => {
                for chunk in self.body.chunks(size) {
                    bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    bytes.extend_from_slice(chunk);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
        }
        bytes
    }
}

/// Status line and headers of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    pub status: u16,
    pub headers: Vec<(String, String)>,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).expect("the head of an answer is text");
        let mut lines = text.trim_end().split("\r\n");
        let status_line = lines.next().unwrap_or_default();
        let (version, rest) = status_line.split_once(' ').expect("a status line");
        assert!(matches!(version, "HTTP/1.1" | "HTTP/1.0"), "{status_line}");
        let status = rest.get(..3).and_then(|code| code.parse().ok()).expect("a status code");
        let headers = lines.map(|line| line.split_once(':').expect("a header line"));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        Self { status, headers }
    }
}

/// How a body, or a connection, came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By its own framing: the final chunk, the last byte of Content-Length, or none expected.
    Complete,
    /// The connection was closed in order; the whole body only where the close is the framing.
    Closed,
    /// The connection was reset.
    Reset,
}

impl End {
    /// Closed or reset before the framing was satisfied: no client can take it for a whole answer.
    pub fn is_broken(self) -> bool {
        self != Self::Complete
    }
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub head: Head,
    pub body: Vec<u8>,
    pub end: End,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.head.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// A header that is a number, such as `retry-after`.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)
            .map(|value| value.parse().unwrap_or_else(|_| panic!("{name}: {value} is no number")))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// The message of an answer that must be an error in Anthropic's shape, of this status and type.
    pub fn error(&self, status: u16, kind: &str) -> String {
        let message = self.refusal(status);
        assert_eq!(self.json()["error"]["type"], kind, "{}", self.text());
        message
    }

    /// The same where the type of the error may be any.
    pub fn refusal(&self, status: u16) -> String {
        assert_eq!(self.status(), status, "{}", self.text());
        let body = self.json();
        assert_eq!(body["type"], "error", "{body}");
        assert!(
            body["error"]["type"]
                .as_str()
                .is_some_and(|kind| kind.ends_with("_error") || kind == "request_too_large"),
            "{body}"
        );
        let head = &self.head;
        assert!(head.header("request-id").is_some_and(|id| !id.is_empty()), "no request-id: {head:?}");
        let kind = head.header("content-type").unwrap_or_default();
        assert!(kind.starts_with("application/json"), "{head:?}");
        body["error"]["message"].as_str().expect("an error has a message").to_owned()
    }
}

/// A piece of a body as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Vec<u8>),
    End(End),
}

#[derive(Clone, Copy)]
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// One connection to the proxy.
pub struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
    framing: Framing,
    head_only: bool,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).expect("the proxy accepts connections");
        socket.set_nodelay(true).expect("a live socket");
        socket.set_read_timeout(Some(DEADLINE)).expect("a live socket");
        socket.set_write_timeout(Some(DEADLINE)).expect("a live socket");
        Self { socket, buffer: vec![], framing: Framing::Length(0), head_only: false }
    }

    pub fn send(&mut self, request: &Request) {
        self.head_only = request.method == "HEAD";
        self.send_bytes(&request.bytes());
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the proxy reads");
    }

    /// Sends what may be refused half way: a proxy that has answered and closed need not take the rest.
    pub fn send_if_taken(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).ok();
    }

    /// The same; false once the proxy takes no more.
    pub fn sends(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    /// Says that nothing more will be sent, and goes on reading.
    pub fn finish_sending(&mut self) {
        self.socket.shutdown(Shutdown::Write).expect("a live socket");
    }

    /// Leaves with an RST instead of a FIN.
    pub fn reset(self) {
        socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO)).expect("a live socket");
    }

    /// Reads once. `Err` tells how the connection ended.
    fn fill(&mut self) -> Result<(), End> {
        let mut piece = [0; 64 * 1024];
        match self.socket.read(&mut piece) {
            Ok(0) => Err(End::Closed),
            Ok(bytes) => {
                self.buffer.extend_from_slice(&piece[..bytes]);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(End::Reset),
            Err(error) => panic!(
                "nothing more came from the proxy ({error}); unread so far: {:?}",
                String::from_utf8_lossy(&self.buffer)
            ),
        }
    }

    /// True when an answer, or the end, is there to be read.
    pub fn has_input(&self) -> bool {
        self.socket.set_nonblocking(true).expect("a live socket");
        let peeked = self.socket.peek(&mut [0; 1]);
        self.socket.set_nonblocking(false).expect("a live socket");
        !matches!(peeked, Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// The same, after waiting for it this long.
    pub fn has_input_within(&self, patience: Duration) -> bool {
        self.socket.set_read_timeout(Some(patience)).expect("a live socket");
        let peeked = self.socket.peek(&mut [0; 1]);
        self.socket.set_read_timeout(Some(DEADLINE)).expect("a live socket");
        !matches!(peeked, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// True when the proxy has closed the connection, whether everything before that was read or not.
    pub fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec};
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)];
        rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }

    /// What one single read brings: proof of what was sent together.
    pub fn read_once(&mut self) -> Vec<u8> {
        self.fill().expect("the proxy sends something");
        std::mem::take(&mut self.buffer)
    }

    /// The next head, or how the connection ended without one.
    pub fn try_head(&mut self) -> Result<Head, End> {
        loop {
            if let Some(position) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                let head = Head::parse(&self.buffer[..position]);
                self.buffer.drain(..position + 4);
                if head.status == 100 {
                    continue;
                }
                self.framing = self.framing_of(&head);
                return Ok(head);
            }
            self.fill()?;
        }
    }

    pub fn head(&mut self) -> Head {
        self.try_head().unwrap_or_else(|end| panic!("no answer, the connection ended: {end:?}"))
    }

    fn framing_of(&self, head: &Head) -> Framing {
        if self.head_only || head.status == 204 || head.status == 304 {
            return Framing::Length(0);
        }
        match (head.header("transfer-encoding"), head.header("content-length")) {
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => Framing::Chunked,
            (None, Some(length)) => Framing::Length(length.parse().expect("Content-Length is a number")),
            (None, None) => Framing::UntilClose,
            both => panic!("an answer with this framing cannot be read: {both:?}"),
        }
    }

    /// The next piece of the body: one chunk, or what one read brought.
    pub fn next_piece(&mut self) -> Piece {
        let read = match self.framing {
            Framing::Length(0) => return Piece::End(End::Complete),
            Framing::Length(_) | Framing::UntilClose => self.next_bytes(),
            Framing::Chunked => self.next_chunk(),
        };
        read.map_or_else(Piece::End, Piece::Data)
    }

    fn next_bytes(&mut self) -> Result<Vec<u8>, End> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        let Framing::Length(left) = self.framing else {
            return Ok(std::mem::take(&mut self.buffer));
        };
        let taken = left.min(self.buffer.len());
        self.framing = Framing::Length(left - taken);
        Ok(self.buffer.drain(..taken).collect())
    }

    fn next_chunk(&mut self) -> Result<Vec<u8>, End> {
        let line_end = loop {
            match memchr::memmem::find(&self.buffer, b"\r\n") {
                Some(position) => break position,
                None => self.fill()?,
            }
        };
        let line = String::from_utf8_lossy(&self.buffer[..line_end]).into_owned();
        let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("no chunk size: {line:?}"));
        while self.buffer.len() < line_end + 2 + size + 2 {
            self.fill()?;
        }
        let data = self.buffer[line_end + 2..line_end + 2 + size].to_vec();
        assert_eq!(
            &self.buffer[line_end + 2 + size..line_end + 4 + size],
            b"\r\n",
            "a chunk ends with a line end"
        );
        self.buffer.drain(..line_end + 4 + size);
        if size == 0 {
            self.framing = Framing::Length(0);
            return Err(End::Complete);
        }
        Ok(data)
    }

    /// Reads body until exactly these bytes have come; what comes instead, or too little, fails the test.
    pub fn expect_body(&mut self, expected: &[u8]) {
        let mut seen = Vec::new();
        while seen.len() < expected.len() {
            match self.next_piece() {
                Piece::Data(data) => seen.extend(data),
                Piece::End(end) => panic!("{end:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        assert_eq!(String::from_utf8_lossy(&seen), String::from_utf8_lossy(expected));
    }

    /// Reads body until this text has come, and returns all that came up to then.
    pub fn body_until(&mut self, wanted: &str) -> Vec<u8> {
        let mut seen = Vec::new();
        while memchr::memmem::find(&seen, wanted.as_bytes()).is_none() {
            match self.next_piece() {
                Piece::Data(data) => seen.extend(data),
                Piece::End(end) => panic!("{end:?} before {wanted:?}: {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        seen
    }

    /// The head of an answer, and its body until this text has come.
    pub fn head_and_body_until(&mut self, wanted: &str) -> (Head, Vec<u8>) {
        let head = self.head();
        let body = self.body_until(wanted);
        (head, body)
    }

    /// All that is left of the body, and how it ended.
    pub fn rest(&mut self) -> (Vec<u8>, End) {
        let mut body = Vec::new();
        loop {
            match self.next_piece() {
                Piece::Data(data) => body.extend(data),
                // Where no framing was given, the close is the honest end.
                Piece::End(End::Closed) if matches!(self.framing, Framing::UntilClose) => {
                    return (body, End::Complete);
                }
                Piece::End(end) => return (body, end),
            }
        }
    }

    pub fn answer(&mut self) -> Answer {
        let head = self.head();
        let (body, end) = self.rest();
        Answer { head, body, end }
    }

    pub fn ask(&mut self, request: &Request) -> Answer {
        self.send(request);
        self.answer()
    }

    /// Waits for the proxy to close; bytes that come instead fail the test.
    pub fn expect_closed(&mut self) -> End {
        match self.fill() {
            Err(end) => end,
            Ok(()) => panic!("bytes instead of a close: {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }
}

/// One request on a connection of its own.
pub fn ask(address: SocketAddr, request: &Request) -> Answer {
    Client::connect(address).ask(request)
}
