//! A client as small as can be: one connection, one request, and the answer as it arrives.
//!
//! It believes nothing: an answer counts only with status 200, its body ended well, and, for a stream, exactly one
//! `message_start` and a `message_stop`.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::KEY;
use super::workspace::LINE_HEADER;
use crate::anthropic::sse::{Kind, split_event};
use crate::env;

/// The longest silence; the fakes answer at once, but the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// The largest response head, and the largest chunk or body.
const BYTES_MAX: u64 = 1024 * 1024;

/// A whole answer to a message request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    /// `x-claude-lb-endpoint`.
    pub(super) endpoint: String,
    /// `x-claude-lb-attempts`.
    pub(super) attempts: u32,
    /// From the request sent to the first byte.
    pub(super) first_byte: Duration,
    /// What it said.
    pub(super) text: String,
}

/// Sends a message request that wants to hear `line`; `on_text` gets each piece of text when it arrives.
pub(super) fn message(
    address: SocketAddr,
    line: usize,
    is_stream: bool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Reply, String> {
    let body = format!(
        r#"{{"model":"claude-sonnet-4-5","max_tokens":99,"stream":{is_stream},"messages":[{{"role":"user","content":"Hello?"}}]}}"#
    );
    let request = format!(
        "POST /v1/messages HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nx-api-key: {KEY}\r\n\
         content-type: application/json\r\nanthropic-version: 2023-06-01\r\n{LINE_HEADER}: {line}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut answer = Answer::to(address, &request)?;
    answer.expect_200()?;
    let text = if is_stream { stream_text(&mut answer, on_text)? } else { whole_text(&mut answer, on_text)? };
    let attempts = answer.header("x-claude-lb-attempts").and_then(|value| value.parse().ok());
    Ok(Reply {
        endpoint: answer.header("x-claude-lb-endpoint").unwrap_or_default().to_string(),
        attempts: attempts.ok_or("the answer has no x-claude-lb-attempts")?,
        first_byte: answer.first_byte,
        text,
    })
}

/// The body of a GET.
pub(super) fn get(address: SocketAddr, path: &str) -> Result<Vec<u8>, String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let mut answer = Answer::to(address, &request)?;
    answer.expect_200()?;
    answer.rest()
}

fn stream_text(answer: &mut Answer, on_text: &mut dyn FnMut(&str)) -> Result<String, String> {
    let (mut text, mut held) = (String::new(), Vec::new());
    let (mut starts, mut has_stopped) = (0, false);
    while let Some(part) = answer.part()? {
        held.extend_from_slice(&part);
        while let Some(event) = split_event(&held) {
            match event.kind {
                Kind::MessageStart => starts += 1,
                Kind::ContentBlockDelta => {
                    let data = &held[event.data.clone()];
                    let piece = text_at(data, "/delta/text")?;
                    on_text(&piece);
                    text.push_str(&piece);
                }
                Kind::MessageStop => has_stopped = true,
                Kind::Error => return Err("the stream holds an error event".into()),
                _ => {}
            }
            held.drain(..event.len);
        }
    }
    match (starts, has_stopped) {
        (1, true) => Ok(text),
        _ => Err(format!("the stream has {starts} message_start, and message_stop: {has_stopped}")),
    }
}

fn whole_text(answer: &mut Answer, on_text: &mut dyn FnMut(&str)) -> Result<String, String> {
    let text = text_at(&answer.rest()?, "/content/0/text")?;
    on_text(&text);
    Ok(text)
}

fn text_at(json: &[u8], pointer: &str) -> Result<String, String> {
    let value: Value =
        serde_json::from_slice(json).map_err(|error| format!("the answer is no JSON: {error}"))?;
    let text = value.pointer(pointer).and_then(Value::as_str);
    text.map(str::to_string).ok_or_else(|| format!("the answer has no text at {pointer}"))
}

/// An answer whose head is known and whose body is still on its way.
struct Answer {
    reader: BufReader<TcpStream>,
    status: String,
    headers: Vec<(String, String)>,
    first_byte: Duration,
    /// Bytes that are still to come, or `None` for chunks.
    length: Option<u64>,
    is_over: bool,
}

impl Answer {
    fn to(address: SocketAddr, request: &str) -> Result<Self, String> {
        let stream = connect(address, request).map_err(|error| format!("cannot ask {address}: {error}"))?;
        Self::read(stream, env::now()).map_err(|error| format!("no answer from {address}: {error}"))
    }

    fn read(stream: TcpStream, asked_at: Instant) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        reader.fill_buf()?;
        let first_byte = env::now().saturating_duration_since(asked_at);
        let mut lines = reader.by_ref().take(BYTES_MAX).lines();
        let mut line = || lines.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
        let status = line()?;
        let mut headers = Vec::new();
        loop {
            let line = line()?;
            match line.split_once(':') {
                Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_string())),
                None => break,
            }
        }
        let mut answer = Self { reader, status, headers, first_byte, length: None, is_over: false };
        answer.length = answer.header("content-length").and_then(|value| value.parse().ok());
        Ok(answer)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn expect_200(&mut self) -> Result<(), String> {
        if self.status.starts_with("HTTP/1.1 200 ") {
            return Ok(());
        }
        let body = self.rest().unwrap_or_default();
        Err(format!("answered {}: {}", self.status, String::from_utf8_lossy(&body)))
    }

    /// The next part of the body as it arrived; `None` at its proper end.
    fn part(&mut self) -> Result<Option<Vec<u8>>, String> {
        if self.is_over {
            return Ok(None);
        }
        let part = match self.length {
            Some(length) => {
                self.is_over = true;
                self.exactly(length)
            }
            None => self.chunk(),
        };
        let part = part.map_err(|error| format!("the answer broke off: {error}"))?;
        self.is_over |= part.is_empty();
        Ok((!part.is_empty()).then_some(part))
    }

    fn rest(&mut self) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        while let Some(part) = self.part()? {
            body.extend_from_slice(&part);
        }
        Ok(body)
    }

    /// One chunk; the last one is empty.
    fn chunk(&mut self) -> io::Result<Vec<u8>> {
        let mut digits = String::new();
        self.reader.by_ref().take(20).read_line(&mut digits)?;
        let Ok(length) = u64::from_str_radix(digits.trim_end(), 16) else {
            return Err(if digits.is_empty() {
                io::ErrorKind::UnexpectedEof.into()
            } else {
                io::ErrorKind::InvalidData.into()
            });
        };
        let mut chunk = self.exactly(length.saturating_add(2))?;
        chunk.truncate(chunk.len() - 2);
        Ok(chunk)
    }

    fn exactly(&mut self, length: u64) -> io::Result<Vec<u8>> {
        if length > BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length as usize];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn connect(address: SocketAddr, request: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}
