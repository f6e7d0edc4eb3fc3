//! Two fake workspaces, plain and with TLS, on one thread with one epoll.
//!
//! They insist on path and token, count the body without looking at it, and answer as they were last told to: a
//! message, or a stream whose events carry the time at which they were sent. epoll comes from rustix: the `polling`
//! crate sets a timer and renews its wake-up descriptor in each wait, which would cost as much as the fakes do.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustls::{ServerConfig, ServerConnection};

use crate::wire::{self, broken, clock};

const CERTIFICATE: &str = include_str!("../../tests/fixtures/tls/workspace.pem");
const CERTIFICATE_KEY: &str = include_str!("../../tests/fixtures/tls/workspace.key");
/// What is read at once; a large body should not cost the fake a thousand calls.
const SCRATCH_BYTES: usize = 256 * 1024;
/// The longest wait, so that a word from the other thread is heard.
const WAIT: Duration = Duration::from_millis(100);
/// Between two looks whether a client has heard of an event.
const STEP: Duration = Duration::from_micros(200);
/// Keys of the listeners lie behind those of the connections.
const LISTENERS: u64 = 1 << 32;

/// How requests are answered from now on.
#[derive(Clone, Copy)]
pub enum Act {
    Message,
    /// `events` events, one per `interval`. The first comes at once if `at_once`, else within the first interval.
    /// With `in_step` none comes before the client has `heard` of what came before it; for one stream at a time.
    Stream {
        interval: Duration,
        events: u64,
        at_once: bool,
        in_step: bool,
    },
}

#[derive(Default)]
struct Shared {
    /// Zero events stand for a message.
    events: AtomicU64,
    interval_ns: AtomicU64,
    at_once: AtomicBool,
    in_step: AtomicBool,
    /// Beginnings of streams, and events, that were sent and heard since the last `set`.
    sent: AtomicU64,
    heard: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

/// The running workspaces; dropping it ends them.
pub struct Workspaces {
    pub plain: [u16; 2],
    pub tls: [u16; 2],
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Workspaces {
    pub fn start() -> io::Result<Self> {
        let listen = || -> io::Result<TcpListener> {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
            socket.listen(4096)?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        };
        let listeners = [listen()?, listen()?, listen()?, listen()?];
        let mut ports = [0; 4];
        for (port, listener) in ports.iter_mut().zip(&listeners) {
            *port = listener.local_addr()?.port();
        }
        let shared = Arc::<Shared>::default();
        let mut room = Room::new(listeners, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("workspaces".into()).spawn(move || {
            if let Err(why) = room.run() {
                eprintln!("the workspaces ended: {why}");
            }
        })?;
        let [a, b, c, d] = ports;
        Ok(Self { plain: [a, b], tls: [c, d], shared, thread: Some(thread) })
    }

    pub fn set(&self, act: Act) {
        let (events, interval, at_once, in_step) = match act {
            Act::Message => (0, Duration::ZERO, false, false),
            Act::Stream { interval, events, at_once, in_step } => (events, interval, at_once, in_step),
        };
        self.shared.sent.store(0, Ordering::SeqCst);
        self.shared.heard.store(0, Ordering::SeqCst);
        self.shared.in_step.store(in_step, Ordering::SeqCst);
        self.shared.interval_ns.store(interval.as_nanos() as u64, Ordering::SeqCst);
        self.shared.at_once.store(at_once, Ordering::SeqCst);
        self.shared.events.store(events, Ordering::SeqCst);
    }

    /// How many beginnings of answers, and events, have reached clients since the last `set`.
    pub fn heard(&self, count: u64) {
        self.shared.heard.store(count, Ordering::SeqCst);
    }

    /// Requests without the right path or token since the last question.
    pub fn refused(&self) -> u64 {
        self.shared.refused.swap(0, Ordering::SeqCst)
    }
}

impl Drop for Workspaces {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Room {
    epoll: OwnedFd,
    listeners: [TcpListener; 4],
    tls: Arc<ServerConfig>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// When, for which connection, and which of those that had its place.
    due: BinaryHeap<Reverse<(u64, usize, u64)>>,
    serial: u64,
    chance: fastrand::Rng,
    message: Vec<u8>,
    stream_head: Vec<u8>,
    shared: Arc<Shared>,
}

struct Connection {
    socket: TcpStream,
    tls: Option<Box<ServerConnection>>,
    serial: u64,
    head: Vec<u8>,
    body_left: usize,
    is_fine: bool,
    events_left: u64,
    interval_ns: u64,
    out: Vec<u8>,
    waits_for_room: bool,
}

impl Room {
    fn new(listeners: [TcpListener; 4], shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, listener) in listeners.iter().enumerate() {
            epoll::add(&epoll, listener, EventData::new_u64(LISTENERS + number as u64), EventFlags::IN)?;
        }
        let text = "lorem ipsum ".repeat(64);
        let body = format!(
            r#"{{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":[{{"type":"text","text":"{text}"}}],"stop_reason":"end_turn","stop_sequence":null,"usage":{{"input_tokens":300,"output_tokens":128}}}}"#
        );
        let message = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nrequest-id: req_1\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream_head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nrequest-id: req_1\r\n\
            transfer-encoding: chunked\r\n\r\n"
            .to_vec();
        chunk(
            &mut stream_head,
            concat!(
                "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",",
                "\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-sonnet-4-5\",\"content\":[],",
                "\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":300,\"output_tokens\":1}}}\n\n",
                "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,",
                "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n"
            ),
        );
        Ok(Self {
            epoll,
            listeners,
            tls: tls_config()?,
            connections: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            serial: 0,
            chance: fastrand::Rng::with_seed(4),
            message: message.into_bytes(),
            stream_head,
            shared,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut scratch = vec![0; SCRATCH_BYTES];
        let mut events = Vec::with_capacity(256);
        while !self.shared.stop.load(Ordering::SeqCst) {
            let wait = match self.due.peek() {
                Some(Reverse((due, ..))) => Duration::from_nanos(due.saturating_sub(clock())).min(WAIT),
                None => WAIT,
            };
            let wait = Timespec::try_from(wait).map_err(|_| broken("a wait"))?;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(why) => return Err(why.into()),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    listener @ LISTENERS.. => self.accept((listener - LISTENERS) as usize)?,
                    key => self.on_ready(key as usize, event.flags, &mut scratch),
                }
            }
            self.send_due();
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        loop {
            let socket = match self.listeners[listener].accept() {
                Ok((socket, _)) => socket,
                Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Ok(()),
            };
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let tls = match listener {
                0 | 1 => None,
                _ => Some(Box::new(
                    ServerConnection::new(Arc::clone(&self.tls)).map_err(|_| broken("no TLS connection"))?,
                )),
            };
            let key = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.serial += 1;
            epoll::add(
                &self.epoll,
                &socket,
                EventData::new_u64(key as u64),
                EventFlags::IN | EventFlags::RDHUP,
            )?;
            self.connections[key] = Some(Connection {
                socket,
                tls,
                serial: self.serial,
                head: Vec::new(),
                body_left: 0,
                is_fine: false,
                events_left: 0,
                interval_ns: 0,
                out: Vec::new(),
                waits_for_room: false,
            });
        }
    }

    fn on_ready(&mut self, key: usize, flags: EventFlags, scratch: &mut [u8]) {
        let Some(mut connection) = self.connections.get_mut(key).and_then(Option::take) else { return };
        let result = self.serve(key, &mut connection, flags, scratch);
        match result {
            Ok(()) => self.connections[key] = Some(connection),
            // Closing the socket takes it out of the epoll, too.
            Err(_) => self.free.push(key),
        }
    }

    fn serve(
        &mut self,
        key: usize,
        connection: &mut Connection,
        flags: EventFlags,
        scratch: &mut [u8],
    ) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            connection.flush()?;
            self.watch(key, connection)?;
        }
        if !flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            return Ok(());
        }
        loop {
            let count = match connection.read(scratch) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(why) => return Err(why),
            };
            if connection.take(&scratch[..count])? {
                self.answer(key, connection)?;
            }
            // What a TLS connection has decrypted already makes no socket readable.
            if connection.tls.is_none() {
                return Ok(());
            }
        }
    }

    fn answer(&mut self, key: usize, connection: &mut Connection) -> io::Result<()> {
        if !connection.is_fine {
            self.shared.refused.fetch_add(1, Ordering::SeqCst);
            let refusal = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n";
            connection.send(refusal)?;
            return self.watch(key, connection);
        }
        let events = self.shared.events.load(Ordering::SeqCst);
        if events == 0 {
            connection.send(&self.message)?;
            return self.watch(key, connection);
        }
        connection.events_left = events;
        connection.interval_ns = self.shared.interval_ns.load(Ordering::SeqCst);
        self.shared.sent.fetch_add(1, Ordering::SeqCst);
        connection.send(&self.stream_head)?;
        let delay = match self.shared.at_once.load(Ordering::SeqCst) {
            true => 0,
            false => self.chance.u64(0..connection.interval_ns.max(1)),
        };
        self.due.push(Reverse((clock() + delay, key, connection.serial)));
        self.watch(key, connection)
    }

    /// Sends every event whose time has come.
    fn send_due(&mut self) {
        while let Some(&Reverse((due, key, serial))) = self.due.peek() {
            let now = clock();
            if due > now {
                return;
            }
            self.due.pop();
            let Some(mut connection) = self.connections.get_mut(key).and_then(Option::take) else { continue };
            if connection.serial != serial {
                self.connections[key] = Some(connection);
                continue;
            }
            if self.shared.in_step.load(Ordering::SeqCst)
                && self.shared.sent.load(Ordering::SeqCst) > self.shared.heard.load(Ordering::SeqCst)
            {
                self.connections[key] = Some(connection);
                self.due.push(Reverse((now + STEP.as_nanos() as u64, key, serial)));
                continue;
            }
            self.shared.sent.fetch_add(1, Ordering::SeqCst);
            connection.events_left -= 1;
            let sent = connection.event(clock()).and_then(|()| self.watch(key, &mut connection));
            if sent.is_err() {
                self.free.push(key);
                continue;
            }
            if connection.events_left > 0 {
                self.due.push(Reverse((due + connection.interval_ns, key, serial)));
            }
            self.connections[key] = Some(connection);
        }
    }

    /// Asks for word that there is room again, only while there is something left to send.
    fn watch(&self, key: usize, connection: &mut Connection) -> io::Result<()> {
        let wants =
            !connection.out.is_empty() || connection.tls.as_ref().is_some_and(|tls| tls.wants_write());
        if wants == connection.waits_for_room {
            return Ok(());
        }
        connection.waits_for_room = wants;
        let mut flags = EventFlags::IN | EventFlags::RDHUP;
        flags.set(EventFlags::OUT, wants);
        Ok(epoll::modify(&self.epoll, &connection.socket, EventData::new_u64(key as u64), flags)?)
    }
}

impl Connection {
    fn read(&mut self, scratch: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.read(scratch) };
        loop {
            match tls.reader().read(scratch) {
                Err(why) if why.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            if tls.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            tls.process_new_packets().map_err(|_| broken("TLS"))?;
            flush_tls(tls, &mut self.socket)?;
        }
    }

    /// Takes what was read; true when a request is complete.
    fn take(&mut self, mut input: &[u8]) -> io::Result<bool> {
        if self.body_left == 0 {
            self.head.extend_from_slice(input);
            let Some(asked) = wire::asked(&self.head)? else { return Ok(false) };
            let behind = self.head.len() - asked.head_bytes;
            input = &input[input.len() - behind..];
            self.head.clear();
            self.is_fine = asked.is_fine;
            self.body_left = asked.body_bytes;
        }
        self.body_left =
            self.body_left.checked_sub(input.len()).ok_or_else(|| broken("more than one request at once"))?;
        Ok(self.body_left == 0)
    }

    fn event(&mut self, now: u64) -> io::Result<()> {
        let mut out = Vec::with_capacity(512);
        chunk(
            &mut out,
            &format!(
                "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":0,\
                \"delta\":{{\"type\":\"text_delta\",\"text\":\"at={now:020} lorem\"}}}}\n\n"
            ),
        );
        if self.events_left == 0 {
            chunk(
                &mut out,
                concat!(
                    "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
                    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":",
                    "\"end_turn\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":9}}\n\n",
                    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
                ),
            );
            out.extend_from_slice(b"0\r\n\r\n");
        }
        self.send(&out)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.writer().write_all(bytes)?;
            return flush_tls(tls, &mut self.socket);
        }
        if !self.out.is_empty() {
            self.out.extend_from_slice(bytes);
            return Ok(());
        }
        match self.socket.write(bytes) {
            Ok(count) => self.out.extend_from_slice(&bytes[count..]),
            Err(why) if why.kind() == ErrorKind::WouldBlock => self.out.extend_from_slice(bytes),
            Err(why) => return Err(why),
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        match &mut self.tls {
            Some(tls) => flush_tls(tls, &mut self.socket),
            None if out.is_empty() => Ok(()),
            None => self.send(&out),
        }
    }
}

fn flush_tls(tls: &mut ServerConnection, socket: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(_) => {}
            Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(why) => return Err(why),
        }
    }
    Ok(())
}

fn chunk(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
}

fn tls_config() -> io::Result<Arc<ServerConfig>> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = CertificateDer::pem_reader_iter(BufReader::new(CERTIFICATE.as_bytes()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| broken("no certificate"))?;
    let key = PrivateKeyDer::from_pem_slice(CERTIFICATE_KEY.as_bytes())
        .map_err(|_| broken("no certificate key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| broken("no TLS versions"))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|_| broken("no usable certificate"))?;
    Ok(Arc::new(config))
}
