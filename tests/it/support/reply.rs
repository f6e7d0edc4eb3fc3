//! What a scripted workspace answers, step by step: a head, parts of a body, gates between them, an end.

use super::fixtures;
use super::gate::Gate;

#[derive(Clone)]
pub enum Step {
    /// Bytes of the body; a chunk of their own where the answer is chunked.
    Part(Vec<u8>),
    /// Nothing goes out until the test opens the gate.
    Wait(Gate),
    /// Nothing goes out any more until the other side leaves.
    Stall,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Framing {
    Length,
    Chunked,
    /// The end of the connection is the end of the body.
    Close,
    /// No HTTP at all: the parts are the bytes on the wire.
    Bare,
}

#[derive(Clone, Copy, PartialEq)]
pub enum End {
    /// The body is complete and the connection stays usable.
    Whole,
    /// The body is complete and the connection is closed right after, with no word about it.
    WholeThenClose,
    /// FIN where the answer stands, complete or not.
    Close,
    /// RST where the answer stands.
    Reset,
}

/// What one request gets.
#[derive(Clone)]
pub struct Reply {
    pub before_head: Vec<Step>,
    status: u16,
    headers: Vec<(String, String)>,
    pub framing: Framing,
    declared_length: Option<usize>,
    pub body: Vec<Step>,
    pub end: End,
}

impl Reply {
    fn new(status: u16, content_type: &str, framing: Framing) -> Self {
        let headers = match content_type {
            "" => vec![],
            kind => vec![("content-type".to_owned(), kind.to_owned())],
        };
        let (before_head, body) = (vec![], vec![]);
        Self { before_head, status, headers, framing, declared_length: None, body, end: End::Whole }
    }

    /// A page with Content-Length.
    pub fn page(status: u16, content_type: &str, body: impl AsRef<[u8]>) -> Self {
        Self::new(status, content_type, Framing::Length).part(body)
    }

    pub fn json(status: u16, body: impl AsRef<[u8]>) -> Self {
        Self::page(status, "application/json", body)
    }

    /// An error body from the fixtures, sent with its usual content type.
    pub fn error(status: u16, file: &str) -> Self {
        let kind = if file.ends_with(".html") { "text/html" } else { "application/json" };
        Self::page(status, kind, fixtures::error_body(file))
    }

    /// The answer of a request that does not stream.
    pub fn message() -> Self {
        Self::json(200, fixtures::message_json())
    }

    /// A chunked event stream, filled with [`Reply::part`], [`Reply::wait`] and an end.
    pub fn sse() -> Self {
        Self::new(200, "text/event-stream; charset=utf-8", Framing::Chunked)
    }

    /// A chunked event stream in one chunk.
    pub fn stream(bytes: impl AsRef<[u8]>) -> Self {
        Self::sse().part(bytes)
    }

    /// Whatever bytes these are, then a close.
    pub fn garbage(bytes: impl AsRef<[u8]>) -> Self {
        Self::new(0, "", Framing::Bare).part(bytes).close()
    }

    /// A close instead of an answer.
    pub fn hang_up() -> Self {
        Self::new(0, "", Framing::Bare).close()
    }

    /// An RST instead of an answer.
    pub fn reset_at_once() -> Self {
        Self::new(0, "", Framing::Bare).reset()
    }

    /// No answer, ever.
    pub fn silence() -> Self {
        Self::new(0, "", Framing::Bare).stall()
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Nothing, not even the status, goes out before the gate is open.
    pub fn after(mut self, gate: &Gate) -> Self {
        self.before_head.push(Step::Wait(gate.clone()));
        self
    }

    pub fn part(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.body.push(Step::Part(bytes.as_ref().to_vec()));
        self
    }

    /// The bytes in parts of `size`.
    pub fn parts_of(mut self, size: usize, bytes: &[u8]) -> Self {
        self.body.extend(bytes.chunks(size).map(|part| Step::Part(part.to_vec())));
        self
    }

    pub fn wait(mut self, gate: &Gate) -> Self {
        self.body.push(Step::Wait(gate.clone()));
        self
    }

    /// Then nothing, until the proxy gives up.
    pub fn stall(mut self) -> Self {
        self.body.push(Step::Stall);
        self
    }

    /// Chunked instead of Content-Length.
    pub fn chunked(mut self) -> Self {
        self.framing = Framing::Chunked;
        self
    }

    /// Neither chunked nor a length: the body ends where the connection does.
    pub fn until_close(mut self) -> Self {
        (self.framing, self.end) = (Framing::Close, End::Close);
        self
    }

    /// Content-Length with a number of its own.
    pub fn declaring(mut self, length: usize) -> Self {
        self.declared_length = Some(length);
        self
    }

    /// FIN where the script ends, without the final chunk.
    pub fn close(mut self) -> Self {
        self.end = End::Close;
        self
    }

    /// RST where the script ends.
    pub fn reset(mut self) -> Self {
        self.end = End::Reset;
        self
    }

    /// A whole answer, and a FIN behind it that no header announced: the pooled connection goes stale.
    pub fn then_close(mut self) -> Self {
        self.end = End::WholeThenClose;
        self
    }

    /// Status line and headers, with the framing that goes with the body.
    pub fn head(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} Scripted\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        match self.framing {
            Framing::Length => {
                let length = self.declared_length.unwrap_or_else(|| self.body.iter().map(part_length).sum());
                head.push_str(&format!("content-length: {length}\r\n"));
            }
            Framing::Chunked => head.push_str("transfer-encoding: chunked\r\n"),
            Framing::Close => head.push_str("connection: close\r\n"),
            Framing::Bare => return Vec::new(),
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

fn part_length(step: &Step) -> usize {
    if let Step::Part(bytes) = step { bytes.len() } else { 0 }
}
