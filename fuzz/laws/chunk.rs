//! Relaying: whatever the workspaces do, the client gets a coherent stream and not a byte that no workspace sent,
//! apart from pings; and its chunks can be read by a decoder that shares nothing with the encoder.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::time::{Duration, Instant};

use claude_lb::anthropic::sse::{Kind, Scanner, split_event};
use claude_lb::http::answer::{LAST_CHUNK, chunk};
use claude_lb::http::chunked::Chunked;
use claude_lb::relay::body::{self, Body, GATHERED_BYTES_MAX};
use claude_lb::relay::stream::{Ended, Stream};
use claude_lb::relay::{Client, Downstream, Limits, PING};

const HEAD: &[u8] = b"HEAD|";
const LIMITS: Limits = Limits { idle: Duration::from_secs(30), heartbeat: Duration::from_secs(10) };

/// The first byte says how the client and the reader are; the rest is what the workspaces do, one after another.
/// A byte from 0xf8 up is no part of UTF-8 and means an event other than bytes, see [`Script`].
pub fn check(input: &[u8]) {
    let Some((&how, script)) = input.split_first() else { return };
    encodes(script, how);
    decodes(script, how);
    let attempts = script_of(script, how & 0x38 == 0x38);
    streams(&attempts, how);
    let length = (how & 0x40 != 0).then(|| attempts[0].bytes().len() as u64);
    relays_body(&attempts[0], length, how & 1 != 0);
}

/// A chunk holds its data and nothing else, whatever the data looks like.
fn encodes(data: &[u8], how: u8) {
    let cut = data.len() * usize::from(how) / 256;
    let mut encoded = Vec::new();
    chunk(&mut encoded, &data[..cut]);
    chunk(&mut encoded, &data[cut..]);
    assert_eq!(decode(&encoded), (data.to_vec(), false));
    encoded.extend_from_slice(LAST_CHUNK);
    assert_eq!(decode(&encoded), (data.to_vec(), true));
    for step in [1, 7, encoded.len()] {
        assert_eq!(taken(&encoded, step), Some((data.to_vec(), false)));
    }
}

/// A chunked request means the same however it arrives; and what is behind its end is noticed.
fn decodes(data: &[u8], how: u8) {
    // Without a size in front random bytes are hardly ever a body.
    let front = format!("{:x}\r\n", data.len() * usize::from(how) / 256);
    for bytes in [data, &[front.as_bytes(), data].concat()] {
        let whole = taken(bytes, bytes.len()).map(|(body, _)| body);
        assert_eq!(taken(bytes, 1).map(|(body, _)| body), whole);
        if let Some((body, has_read_beyond)) = taken(bytes, bytes.len()) {
            assert!(body.len() + 5 <= bytes.len());
            assert!(!has_read_beyond || taken(&bytes[..bytes.len() - 1], 1).is_some());
        }
    }
}

/// What the front makes of a chunked request whose bytes arrive `step` at a time with pauses: the body, and whether
/// bytes behind it were read with it.
fn taken(bytes: &[u8], step: usize) -> Option<(Vec<u8>, bool)> {
    struct Pieces<'a>(&'a [u8], usize, bool);
    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.2 = !self.2;
            if self.2 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let (piece, rest) = self.0.split_at(self.0.len().min(self.1).min(buffer.len()));
            buffer[..piece.len()].copy_from_slice(piece);
            self.0 = rest;
            Ok(piece.len())
        }
    }
    let mut chunked = Chunked::new(Pieces(bytes, step, false));
    let (mut body, mut buffer) = (Vec::new(), [0; 100]);
    loop {
        match chunked.read(&mut buffer) {
            Ok(0) => return Some((body, chunked.has_read_beyond())),
            Ok(count) => body.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
}

/// The body, and whether its last chunk was there. Panics on anything that is no chunk.
fn decode(mut encoded: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while !encoded.is_empty() {
        let line = encoded.windows(2).position(|two| two == b"\r\n").expect("a line with the length");
        let digits = std::str::from_utf8(&encoded[..line]).unwrap();
        assert!(
            digits.bytes().all(|digit| digit.is_ascii_hexdigit())
                && (digits == "0" || !digits.starts_with('0'))
        );
        let length = usize::from_str_radix(digits, 16).unwrap();
        encoded = &encoded[line + 2..];
        body.extend_from_slice(&encoded[..length]);
        assert_eq!(&encoded[length..length + 2], b"\r\n");
        encoded = &encoded[length + 2..];
        if length == 0 {
            assert!(encoded.is_empty(), "bytes behind the last chunk");
            return (body, true);
        }
    }
    (body, false)
}

/// What one workspace does.
#[derive(Clone, Default)]
struct Script(VecDeque<Step>);

#[derive(Clone)]
enum Step {
    Bytes(Vec<u8>),
    /// Nothing for so many seconds.
    Quiet(u64),
    Interrupted,
    Cut,
    /// The client hangs up now.
    Leave,
}

impl Script {
    fn bytes(&self) -> Vec<u8> {
        let parts = self
            .0
            .iter()
            .filter_map(|step| if let Step::Bytes(bytes) = step { Some(&bytes[..]) } else { None });
        parts.collect::<Vec<_>>().concat()
    }
}

fn script_of(bytes: &[u8], may_be_large: bool) -> Vec<Script> {
    let mut attempts = vec![Script::default()];
    let mut pads = 0;
    for part in bytes.split_inclusive(|byte| *byte >= 0xf8) {
        let mark = part.last().filter(|byte| **byte >= 0xf8);
        let plain = &part[..part.len() - usize::from(mark.is_some())];
        let steps = &mut attempts.last_mut().unwrap().0;
        if !plain.is_empty() {
            steps.push_back(Step::Bytes(plain.to_vec()));
        }
        match mark {
            Some(0xf8) => steps.push_back(Step::Quiet(1)),
            Some(0xf9) => steps.push_back(Step::Quiet(11)),
            Some(0xfa) => steps.push_back(Step::Quiet(31)),
            Some(0xfb) => steps.push_back(Step::Cut),
            Some(0xfc) => steps.push_back(Step::Interrupted),
            Some(0xfd) => steps.push_back(Step::Leave),
            // Long enough, a few times over, for what is gathered or held back.
            Some(0xfe) if may_be_large && pads < 5 => {
                pads += 1;
                steps.push_back(Step::Bytes(vec![b'x'; 60 * 1024]));
            }
            Some(0xff) if attempts.len() < 4 => attempts.push(Script::default()),
            _ => {}
        }
    }
    attempts
}

/// The machine as the relay sees it, and a record of what reached the client.
struct World {
    now: Cell<Instant>,
    sends: RefCell<Vec<Send>>,
    is_gone: Cell<bool>,
    /// The last read brought nothing: what is sent now is our own.
    is_tick: Cell<bool>,
    /// All bytes that this attempt has read.
    read: RefCell<Vec<u8>>,
}

struct Send {
    bytes: Vec<u8>,
    on_tick: bool,
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "a place to start from; it is never read again")]
    fn new() -> Rc<Self> {
        let now = Cell::new(Instant::now());
        let (sends, read) = (RefCell::default(), RefCell::default());
        Rc::new(Self { now, sends, is_gone: Cell::new(false), is_tick: Cell::new(false), read })
    }
}

impl Client for World {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if self.is_gone.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.sends.borrow_mut().push(Send { bytes: bytes.to_vec(), on_tick: self.is_tick.get() });
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.is_gone.get()
    }
}

struct Upstream<'a> {
    world: &'a World,
    steps: VecDeque<Step>,
    /// In one read.
    most: usize,
}

impl Read for Upstream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.world.is_tick.set(false);
        match self.steps.pop_front() {
            None => Ok(0),
            Some(Step::Bytes(mut bytes)) => {
                let rest = bytes.split_off(bytes.len().min(buffer.len()).min(self.most));
                buffer[..bytes.len()].copy_from_slice(&bytes);
                self.world.read.borrow_mut().extend_from_slice(&bytes);
                if !rest.is_empty() {
                    self.steps.push_front(Step::Bytes(rest));
                }
                Ok(bytes.len())
            }
            Some(Step::Quiet(0)) => self.read(buffer),
            Some(Step::Quiet(seconds)) => {
                self.world.now.set(self.world.now.get() + Duration::from_secs(1));
                self.world.is_tick.set(true);
                self.steps.push_front(Step::Quiet(seconds - 1));
                Err(io::ErrorKind::WouldBlock.into())
            }
            Some(Step::Interrupted) => Err(io::ErrorKind::Interrupted.into()),
            Some(Step::Cut) => Err(io::ErrorKind::ConnectionReset.into()),
            Some(Step::Leave) => {
                self.world.is_gone.set(true);
                self.read(buffer)
            }
        }
    }
}

/// One client, and as many attempts as it takes.
fn streams(attempts: &[Script], how: u8) {
    let is_chunked = how & 1 != 0;
    let world = World::new();
    let downstream = Downstream::new(Rc::clone(&world) as Rc<dyn Client>, is_chunked, world.now.get());
    // Small reads of large amounts find nothing that small amounts do not, and take their time.
    let is_large = attempts.iter().any(|script| script.bytes().len() > 32 * 1024);
    let most = if is_large { 16 * 1024 } else { [1, 7, 64, 1024][usize::from(how >> 1 & 3)] };
    // What the client has been sent of the earlier attempts, without pings.
    let mut before = Vec::new();
    let mut has_start = false;
    for script in attempts {
        world.read.borrow_mut().clear();
        let clock = || world.now.get();
        let mut stream = Stream {
            downstream: &downstream,
            content_began: &|| (),
            lasts: &|| (),
            head: HEAD.to_vec(),
            limits: LIMITS,
            clock: &clock,
            scanner: Scanner::new(),
        };
        let ended = stream.run(&mut Upstream { world: &world, steps: script.0.clone(), most });

        let received = received(&world, is_chunked);
        assert!(received.whole.starts_with(&before), "bytes that were sent cannot be taken back");
        let read = world.read.borrow();
        has_start = coherent(&read, &received, &before, &ended, has_start, &downstream);
        assert_eq!(downstream.has_message_start(), has_start);
        let is_last_chunk_due = ended == Ended::Complete && is_chunked;
        assert_eq!(received.has_last_chunk, is_last_chunk_due);
        let body_bytes = received.whole.len() + received.pings * PING.len();
        assert_eq!(downstream.body_bytes() as usize, body_bytes, "a send that failed does not count");
        match ended {
            Ended::Complete => assert!(downstream.has_content() && says_over(&read)),
            Ended::ErrorEvent { .. } | Ended::BrokeBeforeContent(_) | Ended::SilentBeforeContent => {
                assert!(!downstream.has_content());
            }
            Ended::BrokeAfterContent(_) => assert!(downstream.has_content()),
            Ended::ClientGone => assert!(world.is_gone.get()),
        }
        if downstream.has_content() || world.is_gone.get() {
            return;
        }
        before = received.whole;
    }
}

struct Received {
    /// The body without the pings that are our own.
    whole: Vec<u8>,
    pings: usize,
    has_last_chunk: bool,
}

/// Takes the framing off. Each send must be whole by itself, for it is flushed.
fn received(world: &World, is_chunked: bool) -> Received {
    let mut received = Received { whole: Vec::new(), pings: 0, has_last_chunk: false };
    for (index, send) in world.sends.borrow().iter().enumerate() {
        assert!(!received.has_last_chunk, "bytes behind the end");
        let framed =
            if index == 0 { send.bytes.strip_prefix(HEAD).expect("the head first") } else { &send.bytes };
        let (part, is_last) = if is_chunked { decode(framed) } else { (framed.to_vec(), false) };
        received.has_last_chunk = is_last;
        if send.on_tick && !is_last {
            assert_eq!(part, PING, "only a ping is our own");
            assert!(is_between_events(&received.whole), "a ping inside an event");
            received.pings += 1;
        } else {
            assert!(is_last || !part.is_empty(), "an empty send");
            received.whole.extend(part);
        }
    }
    received
}

/// Compares what came of one attempt with what a naive reader of all its bytes would pass on. True when the client
/// has its `message_start` now.
fn coherent(
    read: &[u8],
    received: &Received,
    before: &[u8],
    ended: &Ended,
    mut has_start: bool,
    downstream: &Downstream,
) -> bool {
    let (mut wanted, mut at, mut started_at) = (Vec::new(), 0, None);
    let mut error = None;
    while let Some(event) = split_event(&read[at..]) {
        let bytes = &read[at..at + event.len];
        match event.kind {
            Kind::Error => {
                error = Some(read[at + event.data.start..at + event.data.end].to_vec());
                break;
            }
            Kind::MessageStart if has_start || started_at.is_some() => {}
            Kind::MessageStart => {
                started_at = Some(wanted.len());
                wanted.extend_from_slice(bytes);
            }
            Kind::Ping | Kind::Comment | Kind::Other => wanted.extend_from_slice(bytes),
            _ => {
                wanted.extend_from_slice(&read[at..]);
                break;
            }
        }
        at += event.len;
    }
    let got = &received.whole[before.len()..];
    // More than is held back goes out unread; and a lone carriage return may count as a line end of its own, so that
    // a line feed stays behind when its event is dropped. Then the order is all that can be checked.
    if read.len() > 200 * 1024 || read.contains(&b'\r') {
        let mut rest = read.iter();
        assert!(got.iter().all(|byte| rest.any(|other| other == byte)), "bytes that no workspace sent");
        return downstream.has_message_start();
    }
    match ended {
        Ended::ErrorEvent { data, .. } => {
            assert_eq!(Some(data), error.as_ref());
            assert!(wanted.starts_with(got), "before an error only what came before it");
        }
        Ended::ClientGone => assert!(wanted.starts_with(got)),
        _ => {
            assert!(error.is_none() || downstream.has_content(), "an error event was overlooked");
            assert_eq!(got, wanted);
        }
    }
    has_start |= started_at.is_some_and(|at| got.len() > at) || downstream.has_message_start();
    has_start
}

/// True at the start and behind a blank line, by the letter of the format.
fn is_between_events(sent: &[u8]) -> bool {
    let text = sent.iter().rev().copied();
    // The last line end, and one more before it: with CRLF both are two bytes long.
    let mut ends = 0;
    let mut bytes = text.peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\n' => {
                bytes.next_if_eq(&b'\r');
                ends += 1;
            }
            b'\r' => ends += 1,
            _ => return ends >= 2,
        }
    }
    true
}

/// True when some whole event says that the message is over.
fn says_over(mut read: &[u8]) -> bool {
    while let Some(event) = split_event(read) {
        if matches!(event.kind, Kind::MessageStop | Kind::Error) {
            return true;
        }
        read = &read[event.len..];
    }
    false
}

/// An answer that is no stream: all of it, or the front of it and no end.
fn relays_body(script: &Script, length: Option<u64>, is_chunked: bool) {
    let world = World::new();
    let downstream = Downstream::new(Rc::clone(&world) as Rc<dyn Client>, is_chunked, world.now.get());
    let clock = || world.now.get();
    let told = Cell::new(None);
    let make_head = |length: Option<u64>| {
        told.set(length);
        HEAD.to_vec()
    };
    let body = Body { downstream: &downstream, make_head: &make_head, length, limits: LIMITS, clock: &clock };
    let ended =
        body.run(&mut Upstream { world: &world, steps: script.0.clone(), most: usize::MAX }, &mut Vec::new());

    let read = world.read.borrow();
    let sent: Vec<u8> = world.sends.borrow().iter().flat_map(|send| send.bytes.clone()).collect();
    let Some(framed) = sent.strip_prefix(HEAD) else {
        assert!(sent.is_empty(), "a body without a head");
        assert!(!matches!(ended, body::Ended::Complete | body::Ended::BrokeAfterContent(_)));
        return;
    };
    let is_framed = told.get().is_none() && is_chunked;
    let (got, has_end) = if is_framed { decode(framed) } else { (framed.to_vec(), false) };
    assert!(read.starts_with(&got), "bytes that the workspace did not send");
    match ended {
        body::Ended::Complete => {
            assert_eq!(got, *read);
            assert!(has_end || !is_framed);
            if read.len() <= GATHERED_BYTES_MAX {
                assert_eq!(told.get(), Some(read.len() as u64));
            }
        }
        body::Ended::BrokeAfterContent(_) => assert!(!has_end && read.len() >= GATHERED_BYTES_MAX),
        body::Ended::ClientGone => assert!(!has_end && world.is_gone.get()),
        other => panic!("{other:?}, but {} bytes went out", got.len()),
    }
}
