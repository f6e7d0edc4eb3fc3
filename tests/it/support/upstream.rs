//! A scripted workspace on a real socket.
//!
//! Each request takes the next [`Reply`] of the queue, or the standing answer when the queue is empty. A reply is
//! written step by step; a [`Gate`] between two steps lets the test prove by order, not by time, what the proxy
//! has passed on. Every request is recorded as it came off the wire. While a reply waits, the socket is watched,
//! so that a test can wait for the proxy to have let go of it.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::gate::Gate;
use super::reply::{End, Framing, Reply, Step};
use super::{DEADLINE, fixtures};

/// How long one look at the socket lasts while a reply waits for its gate.
const GLANCE: Duration = Duration::from_millis(2);

/// A request as the workspace received it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Request line and header lines in wire order, without line ends.
    pub lines: Vec<String>,
    pub body: Vec<u8>,
    /// Which connection it came on, counted from 0 in the order of acceptance.
    pub connection: usize,
}

impl Recorded {
    pub fn request_line(&self) -> &str {
        &self.lines[0]
    }

    /// All values of a header, in wire order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let pairs = self.lines[1..].iter().filter_map(|line| line.split_once(':'));
        pairs.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the workspace received JSON")
    }
}

type Standing = Arc<dyn Fn(&Recorded) -> Reply + Send + Sync>;

struct State {
    queue: VecDeque<Reply>,
    standing: Standing,
    requests: Vec<Recorded>,
    accepted: usize,
    sockets: HashMap<usize, TcpStream>,
    abandoned: usize,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the scripted workspace panics with the lock")
    }

    /// Waits until `done` says so, or fails with `what`.
    fn wait(&self, what: &str, done: impl Fn(&State) -> bool) {
        let waiting = |state: &mut State| !done(state);
        let (state, timeout) =
            self.changed.wait_timeout_while(self.lock(), DEADLINE, waiting).expect("no poisoned lock");
        let seen = (state.requests.len(), state.sockets.len(), state.abandoned);
        drop(state);
        let (requests, open, abandoned) = seen;
        assert!(
            !timeout.timed_out(),
            "the workspace still waits for {what}: {requests} requests, {open} connections open, {abandoned} abandoned"
        );
    }
}

/// A fake workspace. Clones are the same one; it is gone with the last of them, and a proxy in front keeps one.
#[derive(Clone)]
pub struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    _listening: Arc<Listening>,
}

/// Ends everything when dropped.
struct Listening {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Upstream {
    /// A healthy workspace: a JSON message, or the transcript `text` when the request asks for a stream.
    pub fn start() -> Self {
        let standing: Standing = Arc::new(|request| {
            if memchr::memmem::find(&request.body, b"\"stream\":true").is_some() {
                Reply::stream(fixtures::transcript("text"))
            } else {
                Reply::message()
            }
        });
        let (queue, requests, sockets, threads) = (VecDeque::new(), vec![], HashMap::new(), vec![]);
        let state = State { queue, standing, requests, accepted: 0, sockets, abandoned: 0, threads };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let accepting = Some(std::thread::spawn({
            let shared = shared.clone();
            move || accept(&listener, &shared)
        }));
        let _listening = Arc::new(Listening { address, shared: shared.clone(), accepting });
        Self { address, shared, _listening }
    }

    /// A workspace that gives every request this answer.
    pub fn always(reply: Reply) -> Self {
        let upstream = Self::start();
        upstream.answer(move |_| reply.clone());
        upstream
    }

    /// A workspace that gives these answers once each, in this order, and then is healthy.
    pub fn script(replies: impl IntoIterator<Item = Reply>) -> Self {
        let upstream = Self::start();
        upstream.queue(replies);
        upstream
    }

    pub fn queue(&self, replies: impl IntoIterator<Item = Reply>) {
        self.shared.lock().queue.extend(replies);
    }

    /// The standing answer from now on.
    pub fn answer(&self, standing: impl Fn(&Recorded) -> Reply + Send + Sync + 'static) {
        self.shared.lock().standing = Arc::new(standing);
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.lock().requests.clone()
    }

    pub fn count(&self) -> usize {
        self.shared.lock().requests.len()
    }

    /// Waits until `count` requests have been read completely, and returns all there are.
    pub fn wait_requests(&self, count: usize) -> Vec<Recorded> {
        self.shared.wait(&format!("{count} requests"), |state| state.requests.len() >= count);
        self.requests()
    }

    /// Waits until the proxy has dropped `count` connections in the middle of an answer.
    pub fn wait_client_gone(&self, count: usize) {
        self.shared.wait(&format!("{count} abandoned answers"), |state| state.abandoned >= count);
    }

    /// Waits until this many connections are open.
    pub fn wait_open_connections(&self, count: usize) {
        self.shared.wait(&format!("{count} open connections"), |state| state.sockets.len() == count);
    }

    /// How many connections were ever made.
    pub fn connections(&self) -> usize {
        self.shared.lock().accepted
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for socket in self.shared.lock().sockets.values() {
            // A socket that is closed already has nothing left to stop.
            socket.shutdown(Shutdown::Both).ok();
        }
        // Wakes the accept call, which then sees the stop flag.
        TcpStream::connect(self.address).ok();
        if let Some(accepting) = self.accepting.take() {
            accepting.join().ok();
        }
        let threads = std::mem::take(&mut self.shared.lock().threads);
        for thread in threads {
            thread.join().ok();
        }
    }
}

/// An address that refuses connections for as long as this lives: bound, so that nobody else gets the port, but
/// never listening.
pub struct DeadAddress(socket2::Socket);

impl DeadAddress {
    pub fn new() -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.expect("a descriptor for one more socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free loopback port");
        Self(socket)
    }

    pub fn address(&self) -> SocketAddr {
        self.0
            .local_addr()
            .ok()
            .and_then(|address| address.as_socket())
            .expect("a bound socket has an address")
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((socket, _)) = listener.accept() {
        let handle = socket.try_clone().expect("a descriptor for one more handle");
        let mut state = shared.lock();
        // Looked at under the lock: what is entered below is seen by the drop, which sets the flag first.
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let number = state.accepted;
        state.accepted += 1;
        state.sockets.insert(number, handle);
        let serving = shared.clone();
        state.threads.push(std::thread::spawn(move || {
            let end = serve(&serving, &socket, number);
            close(&serving, socket, number, end);
        }));
        shared.changed.notify_all();
    }
}

fn serve(shared: &Shared, socket: &TcpStream, number: usize) -> End {
    socket.set_nodelay(true).ok();
    let mut buffer = Vec::new();
    while let Some(request) = read_request(socket, &mut buffer, number) {
        let reply = {
            let mut state = shared.lock();
            let standing = state.standing.clone();
            let reply = state.queue.pop_front().unwrap_or_else(|| standing(&request));
            state.requests.push(request);
            shared.changed.notify_all();
            reply
        };
        match play(shared, socket, &reply) {
            Some(End::Whole) => {}
            Some(end) => return end,
            None => {
                if !shared.stop.load(Ordering::SeqCst) {
                    shared.lock().abandoned += 1;
                    shared.changed.notify_all();
                }
                return End::Close;
            }
        }
    }
    End::Close
}

/// The last handle goes here, so that RST or FIN is really sent now.
fn close(shared: &Shared, socket: TcpStream, number: usize, end: End) {
    let mut state = shared.lock();
    if end == End::Reset {
        socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("a live socket");
    }
    state.sockets.remove(&number);
    drop(socket);
    shared.changed.notify_all();
}

/// `None` when the other side left before the reply was over.
fn play(shared: &Shared, mut socket: &TcpStream, reply: &Reply) -> Option<End> {
    for step in &reply.before_head {
        pass(shared, socket, step)?;
    }
    socket.write_all(&reply.head()).ok()?;
    for step in &reply.body {
        match step {
            Step::Part(bytes) if bytes.is_empty() => {}
            Step::Part(bytes) if reply.framing == Framing::Chunked => {
                let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
                socket.write_all(&chunk).ok()?;
            }
            Step::Part(bytes) => socket.write_all(bytes).ok()?,
            waiting => pass(shared, socket, waiting)?,
        }
    }
    let whole = matches!(reply.end, End::Whole | End::WholeThenClose);
    if whole && reply.framing == Framing::Chunked {
        socket.write_all(b"0\r\n\r\n").ok()?;
    }
    Some(reply.end)
}

/// Waits for the gate with an eye on the socket. `None` when the other side left, or the test ended.
fn pass(shared: &Shared, socket: &TcpStream, step: &Step) -> Option<()> {
    let end = Instant::now() + DEADLINE * 2;
    while Instant::now() < end && !shared.stop.load(Ordering::SeqCst) {
        match step {
            Step::Wait(gate) if gate.passed_within(GLANCE) => return Some(()),
            Step::Wait(_) => {}
            _ => {
                Gate::closed().passed_within(GLANCE);
            }
        }
        if has_left(socket) {
            return None;
        }
    }
    None
}

fn has_left(socket: &TcpStream) -> bool {
    socket.set_nonblocking(true).expect("a live socket");
    let peeked = socket.peek(&mut [0; 1]);
    socket.set_nonblocking(false).expect("a live socket");
    match peeked {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

fn read_request(mut socket: &TcpStream, buffer: &mut Vec<u8>, connection: usize) -> Option<Recorded> {
    let mut fill = |buffer: &mut Vec<u8>| -> Option<()> {
        let mut piece = [0; 16 * 1024];
        match socket.read(&mut piece) {
            Ok(0) | Err(_) => None,
            Ok(bytes) => {
                buffer.extend_from_slice(&piece[..bytes]);
                Some(())
            }
        }
    };
    let head_length = loop {
        if let Some(position) = memchr::memmem::find(buffer, b"\r\n\r\n") {
            break position + 4;
        }
        fill(buffer)?;
    };
    let head: Vec<u8> = buffer.drain(..head_length).collect();
    let text = String::from_utf8_lossy(&head);
    let lines = text.trim_end().split("\r\n").map(str::to_owned).collect();
    let mut request = Recorded { lines, body: Vec::new(), connection };
    if request.header("transfer-encoding").is_some() {
        loop {
            let line_end = loop {
                match memchr::memmem::find(buffer, b"\r\n") {
                    Some(position) => break position,
                    None => fill(buffer)?,
                }
            };
            let size = usize::from_str_radix(std::str::from_utf8(&buffer[..line_end]).ok()?, 16).ok()?;
            while buffer.len() < line_end + 2 + size + 2 {
                fill(buffer)?;
            }
            request.body.extend_from_slice(&buffer[line_end + 2..line_end + 2 + size]);
            buffer.drain(..line_end + 2 + size + 2);
            if size == 0 {
                return Some(request);
            }
        }
    }
    let length: usize = request.header("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
    while buffer.len() < length {
        fill(buffer)?;
    }
    request.body = buffer.drain(..length).collect();
    Some(request)
}
