//! The load: clients on one thread with one epoll, each with one connection and one request at a time.
//!
//! The requests look like Claude Code's: its headers, its order of keys, a session per client. Nothing is timed that
//! the proxy does not cause: the bytes of a request are made before it is sent.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use memchr::{memchr, memmem};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::wire::{Answer, KEY, MARK, MARK_DIGITS, broken, clock};

const SCRATCH_BYTES: usize = 64 * 1024;
/// The longest wait for a socket, so that the end of a measurement is not missed.
const WAIT: Duration = Duration::from_millis(20);
/// What Claude Code 2.1 sends, without what depends on the request.
const HEADERS: &str = "Accept: application/json\r\nContent-Type: application/json\r\n\
    User-Agent: claude-cli/2.1.330 (external, cli)\r\nX-Stainless-Arch: x64\r\nX-Stainless-Lang: js\r\n\
    X-Stainless-OS: Linux\r\nX-Stainless-Package-Version: 0.128.0\r\nX-Stainless-Retry-Count: 0\r\n\
    X-Stainless-Runtime: node\r\nX-Stainless-Runtime-Version: v26.12.1\r\nX-Stainless-Timeout: 600\r\n\
    anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27\r\n\
    anthropic-dangerous-direct-browser-access: true\r\nanthropic-version: 2023-06-01\r\nx-app: cli\r\n\
    Connection: keep-alive\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n";

/// What is asked for.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    pub port: u16,
    /// Path and credential; they differ when there is no proxy.
    pub path: &'a str,
    pub credential: &'a str,
    pub clients: usize,
    pub body_bytes: usize,
    pub is_stream: bool,
    /// False: conversations without a name, so that no proxy keeps them on one workspace.
    pub has_session: bool,
    /// In all; then the clients are silent.
    pub requests: u64,
}

/// What came back; times in nanoseconds.
#[derive(Default)]
pub struct Tally {
    pub answers: u64,
    pub errors: u64,
    pub whole: Vec<u64>,
    pub first_byte: Vec<u64>,
    /// Each event's way from the workspace to the client.
    pub relay: Vec<u64>,
}

/// The clients; dropping it closes their connections.
pub struct Load {
    epoll: OwnedFd,
    target: SocketAddr,
    clients: Vec<Client>,
    is_stream: bool,
    requests_left: u64,
    scratch: Vec<u8>,
    pub tally: Tally,
}

struct Client {
    socket: TcpStream,
    request: Vec<u8>,
    sent: usize,
    sent_at: u64,
    waits_for_room: bool,
    has_first_byte: bool,
    answer: Answer,
    /// The unfinished line of a stream.
    line: Vec<u8>,
    events: u64,
}

impl Load {
    /// Connects all clients; each sends its first request.
    pub fn start(plan: &Plan<'_>) -> io::Result<Self> {
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, plan.port));
        let mut load = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            target,
            clients: Vec::new(),
            is_stream: plan.is_stream,
            requests_left: plan.requests,
            scratch: vec![0; SCRATCH_BYTES],
            tally: Tally::default(),
        };
        for key in 0..plan.clients {
            let socket = connect(target)?;
            epoll::add(&load.epoll, &socket, EventData::new_u64(key as u64), EventFlags::IN)?;
            load.clients.push(Client {
                socket,
                request: request(plan, key),
                sent: 0,
                sent_at: 0,
                waits_for_room: false,
                has_first_byte: false,
                answer: Answer::default(),
                line: Vec::new(),
                events: 0,
            });
            load.ask(key)?;
            // A thousand clients at once would only measure the accept queue.
            if key % 64 == 63 {
                load.run(Duration::from_millis(2))?;
            }
        }
        Ok(load)
    }

    /// Clients that have seen at least one event.
    pub fn heard(&self) -> usize {
        self.clients.iter().filter(|client| client.events > 0).count()
    }

    /// Goes on for `time`; what came back is added to the tally.
    pub fn run(&mut self, time: Duration) -> io::Result<()> {
        let end = clock() + time.as_nanos() as u64;
        self.run_while(end, |_| true)
    }

    /// Goes on until `enough`, at most for `time`; whether it was enough.
    pub fn run_until(&mut self, time: Duration, enough: impl Fn(&Self) -> bool) -> io::Result<bool> {
        let end = clock() + time.as_nanos() as u64;
        self.run_while(end, |load| !enough(load))?;
        Ok(enough(self))
    }

    fn run_while(&mut self, end: u64, go_on: impl Fn(&Self) -> bool) -> io::Result<()> {
        let mut events = Vec::with_capacity(256);
        while go_on(self) {
            let now = clock();
            if now >= end {
                return Ok(());
            }
            let wait = Duration::from_nanos(end - now).min(WAIT);
            let wait = Timespec::try_from(wait).map_err(|_| broken("a wait"))?;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(why) => return Err(why.into()),
            }
            for event in events.drain(..) {
                self.on_ready(event.data.u64() as usize, event.flags)?;
            }
        }
        Ok(())
    }

    fn on_ready(&mut self, key: usize, flags: EventFlags) -> io::Result<()> {
        let result = match flags.contains(EventFlags::OUT) {
            true => self.push(key),
            false => Ok(()),
        };
        let result = match flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            true => result.and_then(|()| self.read(key)),
            false => result,
        };
        if result.is_ok() {
            return Ok(());
        }
        // A broken connection is one error; the client begins anew.
        self.tally.errors += 1;
        let socket = connect(self.target)?;
        epoll::add(&self.epoll, &socket, EventData::new_u64(key as u64), EventFlags::IN)?;
        self.clients[key].socket = socket;
        self.clients[key].waits_for_room = false;
        self.ask(key)
    }

    fn ask(&mut self, key: usize) -> io::Result<()> {
        let Some(left) = self.requests_left.checked_sub(1) else { return Ok(()) };
        self.requests_left = left;
        let client = &mut self.clients[key];
        client.sent = 0;
        client.has_first_byte = false;
        client.answer = Answer::default();
        client.line.clear();
        client.sent_at = clock();
        self.push(key)
    }

    fn push(&mut self, key: usize) -> io::Result<()> {
        let client = &mut self.clients[key];
        while client.sent < client.request.len() {
            match client.socket.write(&client.request[client.sent..]) {
                Ok(count) => client.sent += count,
                Err(why) if why.kind() == ErrorKind::WouldBlock => break,
                Err(why) => return Err(why),
            }
        }
        let waits = client.sent < client.request.len();
        if waits != client.waits_for_room {
            client.waits_for_room = waits;
            let mut flags = EventFlags::IN;
            flags.set(EventFlags::OUT, waits);
            epoll::modify(&self.epoll, &client.socket, EventData::new_u64(key as u64), flags)?;
        }
        Ok(())
    }

    fn read(&mut self, key: usize) -> io::Result<()> {
        let client = &mut self.clients[key];
        let count = match client.socket.read(&mut self.scratch) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(why) => return Err(why),
        };
        let now = clock();
        if !client.has_first_byte {
            client.has_first_byte = true;
            self.tally.first_byte.push(now - client.sent_at);
        }
        let Client { answer, line, events, .. } = client;
        let (is_stream, relay) = (self.is_stream, &mut self.tally.relay);
        let is_complete = answer.feed(&self.scratch[..count], &mut |body| {
            if is_stream {
                see_events(line, body, |sent_at| {
                    *events += 1;
                    relay.push(now.saturating_sub(sent_at));
                });
            }
        })?;
        if !is_complete {
            return Ok(());
        }
        self.tally.whole.push(now - client.sent_at);
        match client.answer.status {
            200 => self.tally.answers += 1,
            _ => self.tally.errors += 1,
        }
        self.ask(key)
    }
}

/// Finds the events in what has come of a stream, line by line.
fn see_events(line: &mut Vec<u8>, body: &[u8], mut see: impl FnMut(u64)) {
    line.extend_from_slice(body);
    let mut done = 0;
    while let Some(length) = memchr(b'\n', &line[done..]) {
        let text = &line[done..done + length];
        done += length + 1;
        let Some(at) = memmem::find(text, MARK) else { continue };
        let digits = text.get(at + MARK.len()..at + MARK.len() + MARK_DIGITS);
        let sent_at = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        if let Some(sent_at) = sent_at {
            see(sent_at);
        }
    }
    line.drain(..done);
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(target)?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// One client's request, head and body.
fn request(plan: &Plan<'_>, client: usize) -> Vec<u8> {
    let session = format!("0f3c1d2e-4b5a-4c6d-8e7f-{client:012x}");
    let (session_header, metadata) = match plan.has_session {
        true => (
            format!("X-Claude-Code-Session-Id: {session}\r\n"),
            format!(r#""metadata":{{"user_id":"{{\"device_id\":\"d\",\"session_id\":\"{session}\"}}"}},"#),
        ),
        false => (String::new(), String::new()),
    };
    let begin =
        r#"{"model":"claude-sonnet-4-5","messages":[{"role":"user","content":[{"type":"text","text":""#;
    let end = format!(
        r#""}}]}}],"system":[{{"type":"text","text":"You are a careful engineer."}}],"tools":[],{metadata}"max_tokens":32000,"stream":{}}}"#,
        plan.is_stream
    );
    // Quotes and line ends are escaped in JSON, and code is full of them.
    let text = r#"    let name = \"lorem ipsum dolor sit amet\";\n        consectetur(adipiscing, elit);\n"#;
    let mut body = begin.to_owned();
    while body.len() + end.len() + text.len() <= plan.body_bytes {
        body.push_str(text);
    }
    while body.len() + end.len() < plan.body_bytes {
        body.push('.');
    }
    body.push_str(&end);
    let Plan { port, path, credential, .. } = plan;
    let head = format!(
        "POST {path}?beta=true HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{credential}\r\n{HEADERS}{session_header}\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body.into_bytes()].concat()
}

/// How a client names itself to a proxy.
pub fn key_header() -> String {
    format!("x-api-key: {KEY}")
}
