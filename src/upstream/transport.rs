//! Plain TCP to a workspace, as a ureq transport.
//!
//! Ours instead of ureq's own for four reasons, all measured on 3.5.2: the wait for the response head ticks (see
//! `wait`); one peek tells whether a pooled connection is still open (ureq switches blocking off and on, four system
//! calls more); request head and body leave in one send; and the buffers start small, because a stream needs little.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use ureq::Error;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, NextTimeout, Transport};

use super::wait;
use crate::env;

/// How much of an answer is taken from the socket at once, in bytes.
const INPUT_BYTES: usize = 8 * 1024;
/// How large the input may grow, for a response head that does not fit.
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// How much of a request is gathered for one send, in bytes.
const OUTPUT_BYTES: usize = 32 * 1024;
/// What ureq adds to a request head of its own, at most.
const HEAD_EXTRA_BYTES: usize = 1024;

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
        Ok(TcpTransport { stream, buffers: SmallBuffers::default(), refuses: None })
    }
}

/// One connection.
pub(super) struct TcpTransport {
    stream: TcpStream,
    buffers: SmallBuffers,
    /// The workspace takes no more of the request. It may have answered all the same.
    refuses: Option<io::Error>,
}

impl TcpTransport {
    /// Sends what was gathered. A workspace that answers before it has read everything, with a 429 or a 413, and closes
    /// lets our sending fail, but its answer lies in the kernel and is what counts. So the failure only shows when
    /// nothing can be read either.
    fn flush(&mut self) -> Result<(), Error> {
        let mut rest = 0..self.buffers.gathered;
        while !rest.is_empty() && self.refuses.is_none() {
            match (&self.stream).write(&self.buffers.output[rest.clone()]) {
                Ok(0) => return Err(Error::Io(io::ErrorKind::WriteZero.into())),
                Ok(sent) => rest.start += sent,
                Err(error) if is_closed(&error) => self.refuses = Some(error),
                Err(error) => tick_or(error)?,
            }
        }
        self.buffers.gathered = 0;
        Ok(())
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
        self.buffers.gathered += amount;
        // What is left of a request goes out when its answer is awaited.
        if self.buffers.gathered == self.buffers.output.len() { self.flush() } else { Ok(()) }
    }

    fn await_input(&mut self, _: NextTimeout) -> Result<bool, Error> {
        self.flush()?;
        self.buffers.output = Vec::new();
        loop {
            match (&self.stream).read(self.buffers.input_append_buf()) {
                Ok(amount) => {
                    if let Some(error) = self.refuses.take_if(|_| amount == 0) {
                        return Err(Error::Io(error));
                    }
                    self.buffers.input_appended(amount);
                    if amount > 0 {
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
#[derive(Default)]
pub(super) struct SmallBuffers {
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes at the front of `output` that were handed over but not sent.
    pub(super) gathered: usize,
    pub(super) output: Vec<u8>,
    progress: bool,
}

impl Buffers for SmallBuffers {
    fn output(&mut self) -> &mut [u8] {
        if self.output.is_empty() {
            // ureq writes a header line in one piece or not at all.
            let head = wait::trace().head_bytes + HEAD_EXTRA_BYTES;
            self.output = vec![0; OUTPUT_BYTES.max(head)];
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
        if self.end == self.input.len() && self.input.len() < INPUT_BYTES_MAX {
            let larger = (self.input.len() * 2).clamp(INPUT_BYTES, INPUT_BYTES_MAX);
            self.input.resize(larger, 0);
        }
        &mut self.input[self.end..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.end += amount;
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
