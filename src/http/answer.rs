//! The heads and small answers that we write ourselves.

use std::fmt::Write as _;

/// A request that is turned away before anything was done for it. Becomes an Anthropic error body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// A sentence for the person at the client.
    pub message: String,
    /// Headers the status calls for, such as `allow` or `retry-after`.
    pub headers: Vec<(&'static str, String)>,
}

impl Refusal {
    /// A refusal without extra headers.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), headers: Vec::new() }
    }

    /// The body is longer than a workspace takes. `bytes` is its length, if that was told.
    pub fn too_large(bytes: Option<u64>, most: usize) -> Self {
        let size = |bytes: u64| format!("{:.1} MB", bytes as f64 / (1024.0 * 1024.0));
        let is = bytes.map_or_else(|| format!("more than {}", size(most as u64)), size);
        let message = format!(
            "the request is {is}, and at most {} are accepted: shorten the conversation with /compact, or start \
             over with /clear",
            size(most as u64)
        );
        Self::new(413, message)
    }

    /// There is no room: tried again in a second, the request may be served.
    pub fn overloaded(why: &str) -> Self {
        Self::new(529, why).with("retry-after", "1")
    }

    /// Adds a header.
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A whole answer that fits in memory.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Headers besides length and connection. Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body; may be empty.
    pub body: Vec<u8>,
}

impl Answer {
    /// A JSON answer.
    pub fn json(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: vec![("content-type".into(), "application/json".into())], body: body.into() }
    }

    /// Adds a header.
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_string(), value.into()));
        self
    }

    /// Head and body as they go onto the wire. `head_only` leaves the body out (HEAD), `close` announces the end of
    /// the connection.
    pub fn to_bytes(&self, head_only: bool, close: bool) -> Vec<u8> {
        let mut text = String::with_capacity(256 + self.body.len());
        start(&mut text, self.status);
        for (name, value) in &self.headers {
            field(&mut text, name, value);
        }
        field(&mut text, "content-length", self.body.len());
        finish(&mut text, close);
        let mut bytes = text.into_bytes();
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

/// Begins a response head: the status line. HTTP/1.1 is right for a 1.0 client too (RFC 9110 section 6.2).
pub fn start(head: &mut String, status: u16) {
    head.push_str("HTTP/1.1 ");
    push(head, status);
    head.push(' ');
    head.push_str(reason(status));
    head.push_str("\r\n");
}

/// Adds a header line.
pub fn field(head: &mut String, name: &str, value: impl std::fmt::Display) {
    head.push_str(name);
    head.push_str(": ");
    push(head, value);
    head.push_str("\r\n");
}

/// Each piece of a longer format would cost more than the copy that it stands for.
fn push(head: &mut String, value: impl std::fmt::Display) {
    // A string takes whatever is written to it.
    let _ = write!(head, "{value}");
}

/// Ends a response head.
pub fn finish(head: &mut String, close: bool) {
    head.push_str(if close { "connection: close\r\n\r\n" } else { "\r\n" });
}

/// The usual phrase for a status (RFC 9110; 529 is Anthropic's).
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        529 => "Overloaded",
        _ => match status / 100 {
            2 => "OK",
            3 => "Redirect",
            4 => "Client Error",
            _ => "Server Error",
        },
    }
}

/// Appends `data` as one chunk of a chunked body. Empty data adds nothing: an empty chunk would end the body.
pub fn chunk(out: &mut Vec<u8>, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    let mut digits = [0u8; 16];
    let mut at = digits.len();
    let mut left = data.len();
    while left > 0 {
        at -= 1;
        digits[at] = b"0123456789abcdef"[left & 15];
        left >>= 4;
    }
    out.extend_from_slice(&digits[at..]);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// The chunk that ends a body well.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_one_piece_on_the_wire() {
        let answer = Answer::json(404, "{}").with("request-id", "r1");
        let text = String::from_utf8(answer.to_bytes(false, true)).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\nrequest-id: r1\r\n\
             content-length: 2\r\nconnection: close\r\n\r\n{}"
        );
        assert!(
            String::from_utf8(answer.to_bytes(true, false)).unwrap().ends_with("content-length: 2\r\n\r\n")
        );
    }

    #[test]
    fn chunks_carry_their_length_in_hex() {
        for length in [1usize, 15, 16, 255, 4096, 70_000] {
            let mut out = Vec::new();
            chunk(&mut out, &vec![b'x'; length]);
            let head = format!("{length:x}\r\n");
            assert!(out.starts_with(head.as_bytes()) && out.ends_with(b"x\r\n"));
            assert_eq!(out.len(), head.len() + length + 2);
        }
        let mut out = Vec::new();
        chunk(&mut out, b"");
        assert!(out.is_empty());
    }
}
