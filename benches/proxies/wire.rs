//! As much of HTTP/1.1 as a fake workspace and a fake client need: one request head in, one answer in.
//!
//! Both know what the other side sends, so anything unexpected is an error that the report counts, never a guess.

use std::io;
use std::sync::OnceLock;
use std::time::Instant;

/// The proxies' key, and the token that they must put in its place.
pub const KEY: &str = "bench-key";
pub const TOKEN: &str = "bench-token";
/// Where a workspace takes messages.
pub const WORKSPACE_PATH: &str = "/serving-endpoints/anthropic/v1/messages";
/// Stands before the time at which an event was sent, in nanoseconds of `clock`, with `MARK_DIGITS` digits.
pub const MARK: &[u8] = b"at=";
pub const MARK_DIGITS: usize = 20;

/// Nanoseconds since the first call; the same for all threads.
pub fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

pub fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What a workspace wants to know of a request.
pub struct Asked {
    pub head_bytes: usize,
    pub body_bytes: usize,
    /// Path and token are what a workspace insists on.
    pub is_fine: bool,
}

/// The head at the beginning of `input`; `None` while it is not complete.
pub fn asked(input: &[u8]) -> io::Result<Option<Asked>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let head_bytes = match request.parse(input) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(broken("not a request")),
    };
    let path = request.path.unwrap_or_default();
    let (mut body_bytes, mut has_token) = (None, false);
    for header in request.headers.iter() {
        let value = header.value;
        if header.name.eq_ignore_ascii_case("content-length") {
            body_bytes = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        } else if header.name.eq_ignore_ascii_case("authorization") {
            has_token |= value.strip_prefix(b"Bearer ") == Some(TOKEN.as_bytes());
        } else if header.name.eq_ignore_ascii_case("x-api-key") {
            // LiteLLM sends it so; what the client sent must not come through.
            has_token |= value == TOKEN.as_bytes();
        }
    }
    let is_fine = has_token && path.split('?').next() == Some(WORKSPACE_PATH);
    let body_bytes = body_bytes.ok_or_else(|| broken("a request without a length"))?;
    Ok(Some(Asked { head_bytes, body_bytes, is_fine }))
}

/// An answer as it arrives.
#[derive(Default)]
pub struct Answer {
    state: State,
    /// What has come of the head.
    head: Vec<u8>,
    pub status: u16,
}

#[derive(Default)]
enum State {
    #[default]
    Head,
    Length(usize),
    /// The digits of a chunk's size so far, and whether its extension has begun.
    Size(usize, bool),
    Chunk(usize),
    ChunkEnd,
    /// Behind the last chunk; the bytes of the line so far.
    Trailer(usize),
}

impl Answer {
    /// Takes what has arrived and shows the body to `see`. True when the answer is complete.
    pub fn feed(&mut self, mut input: &[u8], see: &mut impl FnMut(&[u8])) -> io::Result<bool> {
        if matches!(self.state, State::Head) {
            let known = self.head.len();
            self.head.extend_from_slice(input);
            let Some(head_bytes) = self.read_head()? else { return Ok(false) };
            input = &input[head_bytes - known..];
        }
        loop {
            match &mut self.state {
                State::Head => return Err(broken("a second head")),
                State::Length(0) => return Ok(true),
                State::Length(left) | State::Chunk(left) if *left > 0 => {
                    let now = input.len().min(*left);
                    see(&input[..now]);
                    *left -= now;
                    input = &input[now..];
                }
                State::Length(_) => return Ok(true),
                State::Chunk(_) => self.state = State::ChunkEnd,
                State::Size(..) | State::ChunkEnd | State::Trailer(_) => {
                    let Some((&byte, rest)) = input.split_first() else { return Ok(false) };
                    input = rest;
                    if self.step(byte)? {
                        return Ok(true);
                    }
                }
            }
            if input.is_empty() && !matches!(self.state, State::Length(0)) {
                return Ok(false);
            }
        }
    }

    /// One byte between the chunks; true when it was the last of the answer.
    fn step(&mut self, byte: u8) -> io::Result<bool> {
        self.state = match self.state {
            State::Size(0, _) if byte == b'\n' => State::Trailer(0),
            State::Size(size, _) if byte == b'\n' => State::Chunk(size),
            State::Size(size, extended) if extended || byte == b'\r' || byte == b';' => {
                State::Size(size, true)
            }
            State::Size(size, _) => {
                let digit = (byte as char).to_digit(16).ok_or_else(|| broken("not a chunk's size"))?;
                State::Size(size * 16 + digit as usize, false)
            }
            State::ChunkEnd if byte == b'\n' => State::Size(0, false),
            State::ChunkEnd => State::ChunkEnd,
            State::Trailer(0) if byte == b'\n' => return Ok(true),
            State::Trailer(_) if byte == b'\n' => State::Trailer(0),
            State::Trailer(bytes) if byte == b'\r' => State::Trailer(bytes),
            State::Trailer(bytes) => State::Trailer(bytes + 1),
            _ => return Err(broken("a byte out of place")),
        };
        Ok(false)
    }

    fn read_head(&mut self) -> io::Result<Option<usize>> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let head_bytes = match response.parse(&self.head) {
            Ok(httparse::Status::Complete(bytes)) => bytes,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(broken("not an answer")),
        };
        self.status = response.code.unwrap_or_default();
        let value = |name: &str| {
            let header = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            header.and_then(|header| std::str::from_utf8(header.value).ok())
        };
        self.state = match (value("transfer-encoding"), value("content-length")) {
            (Some(_), _) => State::Size(0, false),
            (None, Some(length)) => State::Length(length.parse().map_err(|_| broken("not a length"))?),
            (None, None) => return Err(broken("an answer without a length")),
        };
        Ok(Some(head_bytes))
    }
}
