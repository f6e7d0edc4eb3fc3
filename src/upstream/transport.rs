//! Plain TCP to a workspace, as a ureq transport.
//!
//! Ours instead of ureq's own for four reasons, all measured on 3.5.2: the wait for the response head ticks (see
//! `wait`); one peek tells whether a pooled connection is still open (ureq switches blocking off and on, four system
//! calls more); head and body of a request leave in one send, from where they lie (see `pieces`); and the buffers start
//! small, because a stream needs little.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use ureq::Error;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, NextTimeout, Transport};

use super::pieces::{HEAD_END, Payload};
use super::wait;
use crate::env;

/// How much of an answer is taken from the socket at once, in bytes: an event, or a short answer with its head.
const INPUT_BYTES: usize = 1536;
/// How much of an answer that fills the input again and again.
const INPUT_BYTES_FULL: usize = 8 * 1024;
/// How large the input may grow, for a response head that does not fit.
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// How much is gathered for one send, in bytes, where it is not a request of ours: what TLS has encrypted.
const OUTPUT_BYTES: usize = 32 * 1024;
/// Room for the head that ureq writes, beyond what the address takes.
const HEAD_BYTES: usize = 2 * 1024;

/// Opens TCP connections.
#[derive(Debug)]
pub(super) struct TcpConnector {
    /// The longest a connect may take, all addresses together.
    pub(super) connect_timeout: Duration,
    /// How often a wait looks up.
    pub(super) tick: Duration,
}

impl<In: Transport> Connector<In> for TcpConnector {
    type Out = Either<In, TcpTransport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        if let Some(tunnel) = chained {
            return Ok(Some(Either::A(tunnel)));
        }
        let deadline = env::now() + self.connect_timeout;
        wait::note(|trace| (trace.connecting, trace.connect_by) = (true, Some(deadline)));
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        let count = details.addrs.len();
        for (done, address) in details.addrs.iter().enumerate() {
            // Each address gets a fair part of what is left, so that one dead address does not use it all.
            let left = deadline.saturating_duration_since(env::now()) / (count - done) as u32;
            match self.connect_one(*address, env::now() + left) {
                Ok(stream) => return Ok(Some(Either::B(self.transport(stream)?))),
                Err(Error::Io(error)) => last = error,
                Err(other) => return Err(other),
            }
        }
        Err(Error::Io(last))
    }
}

impl TcpConnector {
    fn connect_one(&self, address: SocketAddr, deadline: Instant) -> Result<TcpStream, Error> {
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            let left = deadline.saturating_duration_since(env::now());
            if left.is_zero() {
                return Err(Error::Io(io::Error::new(io::ErrorKind::TimedOut, "connect timed out")));
            }
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            let pause = Timespec::try_from(left.min(self.tick)).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
            match rustix::event::poll(&mut fds, Some(&pause)) {
                Ok(0) => {
                    wait::tick().map_err(|aborted| Error::Other(Box::new(aborted)))?;
                }
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
        if let Some(error) = socket.take_error()? {
            return Err(error.into());
        }
        socket.set_nonblocking(false)?;
        Ok(socket.into())
    }

    fn transport(&self, stream: TcpStream) -> Result<TcpTransport, Error> {
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_keepalive(true)?;
        stream.set_read_timeout(Some(self.tick))?;
        stream.set_write_timeout(Some(self.tick))?;
        Ok(TcpTransport { stream, buffers: SmallBuffers::new(false), refuses: None, is_lent: true })
    }
}

/// One connection.
pub(super) struct TcpTransport {
    stream: TcpStream,
    buffers: SmallBuffers,
    /// The workspace takes no more of the request. It may have answered all the same.
    refuses: Option<io::Error>,
    /// A request is using it: it is not in the pool.
    is_lent: bool,
}

impl TcpTransport {
    /// Sends what was gathered. A workspace that answers before it has read everything, with a 429 or a 413, and closes
    /// lets our sending fail, but its answer lies in the kernel and is what counts. So the failure only shows when
    /// nothing can be read either.
    fn flush(&mut self) -> Result<(), Error> {
        let Self { stream, buffers, refuses, .. } = self;
        let result = buffers.send(|rest| match (&*stream).write_vectored(rest) {
            Ok(0) => Err(Error::Io(io::ErrorKind::WriteZero.into())),
            Ok(sent) => {
                // A workspace that takes the request bit by bit must not keep us from looking up.
                if sent < rest.iter().map(|slice| slice.len()).sum() {
                    wait::tick().map_err(|aborted| Error::Other(Box::new(aborted)))?;
                }
                Ok(Some(sent))
            }
            Err(error) if is_closed(&error) => {
                *refuses = Some(error);
                Ok(None)
            }
            Err(error) => tick_or(error).map(|()| Some(0)),
        });
        buffers.sent();
        result
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// After an interrupted or timed-out call: goes on, or ends with the reason to give up.
fn tick_or(error: io::Error) -> Result<(), Error> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => match wait::tick() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::Io(io::ErrorKind::WouldBlock.into())),
            Err(aborted) => Err(Error::Other(Box::new(aborted))),
        },
        _ => Err(Error::Io(error)),
    }
}

impl Transport for TcpTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _: NextTimeout) -> Result<(), Error> {
        // What is left of a request goes out when its answer is awaited.
        self.is_lent = true;
        if self.buffers.gather(amount) { self.flush() } else { Ok(()) }
    }

    fn await_input(&mut self, _: NextTimeout) -> Result<bool, Error> {
        self.flush()?;
        loop {
            match (&self.stream).read(self.buffers.input_append_buf()) {
                Ok(amount) => {
                    if let Some(error) = self.refuses.take_if(|_| amount == 0) {
                        return Err(Error::Io(error));
                    }
                    self.buffers.input_appended(amount);
                    // Below TLS it may be a mere goodbye, and no byte of an answer.
                    if amount > 0 && !wait::trace().is_tls {
                        wait::note(|trace| trace.received = true);
                    }
                    return Ok(amount > 0);
                }
                Err(error) => tick_or(error)?,
            }
        }
    }

    fn is_open(&mut self) -> bool {
        if wait::trace().fresh_only {
            return false;
        }
        // ureq asks when a connection goes back, and again before it is used: the second time is what counts.
        if std::mem::take(&mut self.is_lent) {
            return true;
        }
        let mut byte = [0u8; 1];
        let probe = rustix::net::recv(&self.stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        // Open and quiet is the only good state: bytes that nobody asked for would become the next answer.
        matches!(probe, Err(rustix::io::Errno::AGAIN))
    }
}

impl std::fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpTransport").finish_non_exhaustive()
    }
}

/// Buffers that are there while they are used. Also used above TLS.
pub(super) struct SmallBuffers {
    is_tls: bool,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// The last read took all the room there was: more is coming than a stream has.
    is_short: bool,
    /// Bytes at the front of `output` that were handed over but not sent.
    gathered: usize,
    output: Vec<u8>,
    /// What goes out behind the head in `output`.
    payload: Option<Payload>,
    progress: bool,
}

impl SmallBuffers {
    /// For a transport that encrypts, or one that does not.
    pub(super) fn new(is_tls: bool) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        let (start, end, gathered, payload) = (0, 0, 0, None);
        Self { is_tls, input, start, end, is_short: false, gathered, output, payload, progress: false }
    }

    /// Takes what ureq has written. True when there is no room for more, and it must be sent.
    pub(super) fn gather(&mut self, amount: usize) -> bool {
        if self.payload.is_none() && wait::trace().is_request_of(self.is_tls) {
            self.payload = wait::take_payload();
        }
        // Behind the head ureq has only pretended to write.
        if self.payload.is_none() || !self.output[..self.gathered].ends_with(HEAD_END) {
            self.gathered += amount;
        }
        self.payload.is_none() && self.gathered == self.output.len()
    }

    /// Hands over what was gathered until it has all gone, or `write` wants no more of it: that returns how much it
    /// has taken, or `None`.
    pub(super) fn send(
        &self,
        mut write: impl FnMut(&[IoSlice<'_>]) -> Result<Option<usize>, Error>,
    ) -> Result<(), Error> {
        let gathered = &self.output[..self.gathered];
        let (mut all, mut one);
        let mut rest = match &self.payload {
            Some(payload) => {
                all = payload.slices(gathered);
                &mut all[..]
            }
            None => {
                one = [IoSlice::new(gathered)];
                &mut one[..]
            }
        };
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match write(rest)? {
                Some(count) => IoSlice::advance_slices(&mut rest, count),
                None => break,
            }
        }
        Ok(())
    }

    /// Forgets what was gathered, and its memory.
    pub(super) fn sent(&mut self) {
        (self.gathered, self.output, self.payload) = (0, Vec::new(), None);
    }
}

impl Buffers for SmallBuffers {
    fn output(&mut self) -> &mut [u8] {
        if self.output.is_empty() {
            let trace = wait::trace();
            // ureq writes a header line in one piece or not at all.
            let room = if trace.is_request_of(self.is_tls) { 0 } else { OUTPUT_BYTES };
            self.output = vec![0; room.max(HEAD_BYTES + trace.head_bytes)];
        }
        &mut self.output[self.gathered..]
    }

    fn input(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start > 0 && self.end == self.input.len() {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let is_full = self.end == self.input.len() && self.input.len() < INPUT_BYTES_MAX;
        if is_full || self.is_short && self.input.len() < INPUT_BYTES_FULL {
            self.is_short = false;
            let larger = (self.input.len() * 2).clamp(INPUT_BYTES, INPUT_BYTES_MAX);
            self.input.resize(larger, 0);
        }
        &mut self.input[self.end..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.end += amount;
        self.is_short = self.end == self.input.len();
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.start += amount;
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        // ureq needs scratch space only for chunked requests, and ours have a length.
        self.output();
        (&mut [], &mut self.output[self.gathered..])
    }

    fn can_use_input(&self) -> bool {
        self.start < self.end && self.progress
    }
}
