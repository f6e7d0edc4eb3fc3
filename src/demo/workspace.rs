//! The sockets of the fake workspaces: a loopback port each, a thread per connection, kept alive like the real ones.
//!
//! They are as strict as a real workspace about path and token, and take any request body that the proxy lets pass.
//! A connection that fails in any way is simply closed, and its thread ends; the rest ends with the process.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::answer::{self, Facts};
use super::script::{Act, Failure, NAMES, Script};
use crate::anthropic::{body, tokens};
use crate::env;
use crate::http::answer::{Answer, LAST_CHUNK, chunk};
use crate::http::head::{Framing, Head, Verdict, judge};

/// The header by which the tour says what it wants to hear; it passes the proxy like any other.
pub(super) const LINE_HEADER: &str = "x-demo-line";

/// The pause between two words: fast enough for a demo, slow enough to be seen.
const WORD_PAUSE: Duration = Duration::from_millis(30);
/// How long a stream that will be cut goes on after its first event.
const CUT_PAUSE: Duration = Duration::from_millis(100);
/// The pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longer than the proxy keeps an idle connection, so that the proxy closes first.
const IDLE: Duration = Duration::from_secs(120);
/// The largest request head.
const HEAD_BYTES_MAX: usize = 128 * 1024;
/// The largest request body: twice what the proxy lets pass.
const BODY_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// One fake workspace.
struct Workspace {
    number: usize,
    script: Arc<Script>,
    serial: Arc<AtomicUsize>,
}

/// Opens all workspaces; where they listen, in the order of their names.
pub(super) fn start_all(script: &Arc<Script>) -> io::Result<Vec<SocketAddr>> {
    let serial = Arc::new(AtomicUsize::new(1));
    let start = |number| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (script, serial) = (Arc::clone(script), Arc::clone(&serial));
        let workspace = Arc::new(Workspace { number, script, serial });
        thread(NAMES[number], move || accept(&workspace, &listener))?;
        Ok(address)
    };
    (0..NAMES.len()).map(start).collect()
}

/// The token that a workspace accepts.
pub(super) fn token(number: usize) -> String {
    format!("demo-token-{}", number + 1)
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

fn accept(workspace: &Arc<Workspace>, listener: &TcpListener) {
    for accepted in listener.incoming() {
        let Ok(stream) = accepted else {
            env::sleep(ACCEPT_PAUSE);
            continue;
        };
        let workspace = Arc::clone(workspace);
        // Without a thread for it the connection closes, and the proxy asks another workspace.
        let _ = thread(NAMES[workspace.number], move || drop(workspace.converse(stream)));
    }
}

impl Workspace {
    /// Request after request, until the proxy leaves or an answer was to be cut off.
    fn converse(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        let mut connection = Connection { stream, input: Vec::new() };
        while let Some(head) = connection.head()? {
            let body = connection.body(&head)?;
            self.respond(&mut connection, &head, &body)?;
        }
        Ok(())
    }

    fn respond(&self, connection: &mut Connection, head: &Head, request: &[u8]) -> io::Result<()> {
        if (head.method(), head.path()) != ("POST", "/serving-endpoints/anthropic/v1/messages") {
            return connection.send(&answer::refusal(404, "ENDPOINT_NOT_FOUND", "No API found here."));
        }
        let bearer = head.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        if bearer != Some(&token(self.number)) {
            return connection.send(&answer::refusal(403, "403", "Invalid access token."));
        }
        let found = match body::scan(request) {
            Ok(found) => found,
            Err(why) => return connection.send(&answer::refusal(400, "BAD_REQUEST", &why.to_string())),
        };
        let facts = Facts {
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            model: found.model,
            input_tokens: tokens::estimate(request).map_or(0, |estimate| estimate.tokens(1.0)),
        };
        let line = head.header(LINE_HEADER).and_then(|value| value.parse().ok());
        match self.script.act(self.number, line, request.len()) {
            Act::Say(text) if found.stream => connection.stream(&facts, &text),
            Act::Say(text) => connection.send(&answer::message(&facts, &text)),
            Act::Fail(failure) => connection.fail(failure, &facts, found.stream),
        }
    }
}

/// A connection, with what was read ahead.
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Connection {
    /// The next request's head; `None` when the other side has closed.
    fn head(&mut self) -> io::Result<Option<Box<Head>>> {
        loop {
            match judge(&self.input, HEAD_BYTES_MAX) {
                Verdict::Complete(head) => {
                    self.input.drain(..head.len());
                    return Ok(Some(head));
                }
                Verdict::Incomplete if self.read_more()? => {}
                Verdict::Incomplete => return Ok(None),
                Verdict::Refuse(refusal) => {
                    self.send(&answer::refusal(refusal.status, "BAD_REQUEST", &refusal.message))?;
                    return Ok(None);
                }
            }
        }
    }

    fn body(&mut self, head: &Head) -> io::Result<Vec<u8>> {
        let length = match head.framing() {
            Framing::None => 0,
            Framing::Length(length) if length <= BODY_BYTES_MAX => length as usize,
            // The proxy always tells the length, and never so large a one.
            Framing::Length(_) | Framing::Chunked => return Err(io::ErrorKind::InvalidInput.into()),
        };
        while self.input.len() < length {
            if !self.read_more()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let rest = self.input.split_off(length);
        Ok(std::mem::replace(&mut self.input, rest))
    }

    fn read_more(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 * 1024];
        let count = self.stream.read(&mut buffer)?;
        self.input.extend_from_slice(&buffer[..count]);
        Ok(count > 0)
    }

    fn send(&mut self, answer: &Answer) -> io::Result<()> {
        self.stream.write_all(&answer.to_bytes(false, false))
    }

    /// A whole stream, a word at a time.
    fn stream(&mut self, facts: &Facts, text: &str) -> io::Result<()> {
        self.begin(facts, &answer::message_start(facts))?;
        self.part(&answer::opening())?;
        for word in answer::words(text) {
            env::sleep(WORD_PAUSE);
            self.part(&answer::delta(word))?;
        }
        self.part(&answer::closing(facts, text))?;
        self.stream.write_all(LAST_CHUNK)
    }

    /// The head and the first event, in one piece.
    fn begin(&mut self, facts: &Facts, event: &str) -> io::Result<()> {
        let mut bytes = answer::stream_head(facts).into_bytes();
        chunk(&mut bytes, event.as_bytes());
        self.stream.write_all(&bytes)
    }

    fn part(&mut self, events: &str) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(events.len() + 16);
        chunk(&mut bytes, events.as_bytes());
        self.stream.write_all(&bytes)
    }

    fn fail(&mut self, failure: Failure, facts: &Facts, is_stream: bool) -> io::Result<()> {
        match failure {
            Failure::ErrorEvent if is_stream => {
                self.begin(facts, &answer::overloaded_event())?;
                self.stream.write_all(LAST_CHUNK)
            }
            Failure::Overloaded | Failure::ErrorEvent => self.send(&answer::overloaded(facts)),
            Failure::Unavailable => self.send(&answer::unavailable()),
            Failure::Cut => {
                if is_stream {
                    self.begin(facts, &answer::message_start(facts))?;
                    env::sleep(CUT_PAUSE);
                }
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}
