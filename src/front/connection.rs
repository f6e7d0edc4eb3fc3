//! One client connection: what tiny_http accepted, and our own handle on its socket.
//!
//! tiny_http never hands out the socket. We need it: to judge a head before anything is read, to take requests as
//! they lie there, to see that a client left while nothing is written, to end a broken answer. [`Registry::adopt`]
//! finds the descriptor that the library has just accepted and takes a duplicate of it. The check is made on the
//! duplicate, so no other thread can change what was checked: a connected socket on our port whose inode no live
//! connection has. Only the accept thread adopts, so exactly one socket fits.

use std::cell::Cell;
use std::collections::HashSet;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use polling::Poller;
use rustix::buffer::spare_capacity;
use rustix::net::{RecvFlags, SendFlags};
use tiny_http::Request;

use crate::env;
use crate::relay::Client;

/// What tiny_http made of a connection: requests to come. Nobody asks it for one; its end is the connection's.
type Requests = Box<dyn Iterator<Item = Option<Request>> + Send>;

/// The live connections: how many, and which sockets.
#[derive(Clone, Default)]
pub(super) struct Registry(Arc<Live>);

#[derive(Default)]
struct Live {
    inodes: Mutex<HashSet<u64>>,
    left: Condvar,
}

/// A place in the registry, given back when the connection's descriptors are closed.
pub(super) struct Place {
    registry: Registry,
    inode: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.registry.0.inodes.lock().remove(&self.inode);
        self.registry.0.left.notify_all();
    }
}

impl Registry {
    /// Connections now.
    pub(super) fn len(&self) -> usize {
        self.0.inodes.lock().len()
    }

    /// Waits until a connection has ended, at most for `longest`.
    pub(super) fn wait_for_room(&self, most: usize, longest: Duration) {
        let mut inodes = self.0.inodes.lock();
        if inodes.len() >= most {
            self.0.left.wait_for(&mut inodes, longest);
        }
    }

    /// Finds the socket behind `requests`, which tiny_http has just accepted. `hint` is the descriptor that was the
    /// lowest free one before.
    pub(super) fn adopt(
        &self,
        requests: Requests,
        listening: Listening,
        hint: RawFd,
        poller: &Arc<Poller>,
    ) -> io::Result<Connection> {
        // A connected socket is always found; one that was reset already has no peer any more.
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the client has left");
        let Some(Found { socket, peer: Some(peer), inode }) = self.find(listening, hint)? else {
            return Err(gone());
        };
        self.0.inodes.lock().insert(inode);
        let place = Arc::new(Place { registry: self.clone(), inode });
        let (socket, poller) = (Arc::new(socket), Arc::clone(poller));
        // SAFETY: `Connection::drop` takes the socket out of the poller before its last descriptor is closed.
        unsafe { poller.add(&*socket, polling::Event::none(place.inode as usize)) }?;
        Ok(Connection { requests: Some(requests), socket, poller, peer, place, answered_at: None })
    }

    fn find(&self, listening: Listening, hint: RawFd) -> io::Result<Option<Found>> {
        let mut gone = None;
        for fd in (hint..hint + 3).filter(|&fd| fd >= 0) {
            match self.examine(fd, listening)? {
                Some(found) if found.peer.is_none() => gone = Some(found),
                Some(found) => return Ok(Some(found)),
                None => {}
            }
        }
        // A crowd that resets its connections must not have us look through all descriptors each time.
        if gone.is_some() {
            return Ok(gone);
        }
        for fd in open_descriptors()? {
            if let Some(found) = self.examine(fd, listening)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// A duplicate of `fd`, if that is a connection on our port that nobody has adopted. The error is a lack of
    /// descriptors.
    fn examine(&self, fd: RawFd, listening: Listening) -> io::Result<Option<Found>> {
        // SAFETY: the borrow lives for this one call, which only asks the kernel to duplicate whatever the number
        // means at that moment, and fails cleanly if it means nothing. Everything is checked on the duplicate.
        let duplicate: OwnedFd = match unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned() {
            Ok(duplicate) => duplicate,
            Err(error) if is_shortage(&error) => return Err(error),
            Err(_) => return Ok(None),
        };
        let Ok(inode) = inode_of(&duplicate) else { return Ok(None) };
        let socket = TcpStream::from(duplicate);
        let Ok(local) = socket.local_addr() else { return Ok(None) };
        let is_new = local.port() == listening.port
            && inode != listening.inode
            && !self.0.inodes.lock().contains(&inode);
        Ok(is_new.then(|| Found { peer: socket.peer_addr().ok(), socket, inode }))
    }
}

/// The listener, as far as a search must know it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listening {
    port: u16,
    inode: u64,
}

impl Listening {
    pub(super) fn of(listener: &TcpListener) -> io::Result<Self> {
        Ok(Self { port: listener.local_addr()?.port(), inode: inode_of(listener)? })
    }
}

struct Found {
    socket: TcpStream,
    /// None when the client has reset the connection already.
    peer: Option<SocketAddr>,
    inode: u64,
}

fn inode_of(socket: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(socket)?.st_ino)
}

/// True when there is no descriptor left, for the process or for the machine.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| shortages.contains(&code))
}

fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let folder = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
    let entries = std::fs::read_dir(folder)?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// A client connection. Dropping it closes all its descriptors.
pub(super) struct Connection {
    requests: Option<Requests>,
    socket: Arc<TcpStream>,
    poller: Arc<Poller>,
    peer: SocketAddr,
    place: Arc<Place>,
    /// When its last answer was whole.
    pub(super) answered_at: Option<Instant>,
}

impl Connection {
    /// The client's address.
    pub(super) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Its number for the poller, unique among live connections.
    pub(super) fn key(&self) -> usize {
        self.place.inode as usize
    }

    /// Its place, to be held by whoever may hold the handle for longer than the connection lives.
    pub(super) fn place(&self) -> Arc<Place> {
        Arc::clone(&self.place)
    }

    /// Our handle.
    pub(super) fn socket(&self) -> &Arc<TcpStream> {
        &self.socket
    }

    /// Copies what has arrived without taking it. `Ok(0)` means the client has closed.
    pub(super) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        receive(&self.socket, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)
    }

    /// Takes bytes that have arrived, or waits for some until the next tick: at most `most`, appended.
    pub(super) fn receive(&self, buffer: &mut Vec<u8>, most: usize) -> io::Result<usize> {
        let filled = buffer.len();
        if buffer.capacity() - filled == most {
            let take = || rustix::net::recv(&*self.socket, spare_capacity(buffer), RecvFlags::empty());
            return retried(take).map(|(count, _)| count);
        }
        // An allocator may give more room than was asked for, and what lies behind this request is not ours to take.
        buffer.resize(filled + most, 0);
        let result = receive(&self.socket, &mut buffer[filled..], RecvFlags::empty());
        buffer.truncate(filled + result.as_ref().map_or(0, |&count| count));
        result
    }

    /// Takes and forgets up to `buffer.len()` bytes that have arrived.
    pub(super) fn discard(&self, buffer: &mut [u8]) -> io::Result<usize> {
        receive(&self.socket, buffer, RecvFlags::DONTWAIT)
    }

    /// Takes and forgets this many bytes, which have arrived. False when they have not.
    pub(super) fn discard_exactly(&self, mut bytes: u64) -> bool {
        let mut scratch = [0; 8 * 1024];
        while bytes > 0 {
            let most = scratch.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            match self.discard(&mut scratch[..most]) {
                Ok(count) if count > 0 => bytes -= count as u64,
                _ => return false,
            }
        }
        true
    }

    /// Takes bytes as they come, past tiny_http, waiting as long as any read on this socket may wait.
    pub(super) fn take(&self, buffer: &mut [u8]) -> io::Result<usize> {
        receive(&self.socket, buffer, RecvFlags::empty())
    }

    /// Bytes that have arrived and were not read.
    pub(super) fn available(&self) -> u64 {
        rustix::io::ioctl_fionread(&*self.socket).unwrap_or(0)
    }

    /// True when the client has hung up.
    pub(super) fn is_gone(&self) -> bool {
        is_gone(&self.socket)
    }

    /// Sends a small answer without waiting. False when it did not fit, which only a client that never reads achieves.
    pub(super) fn send_now(&self, bytes: &[u8]) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::send(&*self.socket, bytes, flags).is_ok_and(|sent| sent == bytes.len())
    }

    /// Tells the client that no more will come, but still hears it.
    pub(super) fn end_sending(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Ends the connection now.
    pub(super) fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.poller.delete(&*self.socket);
        // tiny_http's descriptors first, then ours, then the place: an inode is only forgotten when nothing holds it.
        self.requests = None;
    }
}

fn receive(socket: &TcpStream, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    retried(|| rustix::net::recv(socket, &mut *buffer, flags).map(|(count, _)| count))
}

/// Repeats a call that a signal has interrupted.
fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(Into::into),
        }
    }
}

/// A client that closed its half is taken for gone, as nginx does: it will not read an answer that takes minutes.
fn is_gone(socket: &TcpStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    #[cfg(target_os = "linux")]
    let hang_up = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    #[cfg(not(target_os = "linux"))]
    let hang_up = PollFlags::HUP | PollFlags::ERR;
    let mut fds = [PollFd::new(socket, hang_up)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&at_once)).is_ok_and(|count| count > 0)
}

/// The client, as the worker that serves it sees it.
pub struct ClientSocket {
    socket: Arc<TcpStream>,
    bytes_sent: Cell<u64>,
}

impl ClientSocket {
    pub(super) fn new(connection: &Connection) -> Self {
        Self { socket: Arc::clone(connection.socket()), bytes_sent: Cell::new(0) }
    }

    /// Bytes handed to the kernel for this request.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent.get()
    }

    /// Sends, and does not mind a client that has left.
    pub fn send_or_forget(&self, bytes: &[u8]) {
        let _ = self.send(bytes);
    }

    /// Sends an answer for which nobody may be held up. A client that has not taken its earlier answers is not waited
    /// for at all, any other one for a second.
    pub fn send_promptly(&self, mut bytes: &[u8]) -> io::Result<()> {
        let until = env::now() + PROMPTLY;
        let mut patience = Duration::ZERO;
        loop {
            // Not writable: most of the kernel's room is taken by what the client has not read.
            if !is_writable(&self.socket, patience) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match rustix::net::send(&*self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.bytes_sent.set(self.bytes_sent.get() + sent as u64);
                    bytes = &bytes[sent..];
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            if bytes.is_empty() {
                return Ok(());
            }
            patience = until.saturating_duration_since(env::now());
        }
    }
}

/// How long a client may take for the answers of [`ClientSocket::send_promptly`].
const PROMPTLY: Duration = Duration::from_secs(1);

fn is_writable(socket: &TcpStream, patience: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let patience = Timespec::try_from(patience).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    rustix::event::poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&patience))
        .is_ok_and(|count| count > 0)
}

impl Client for ClientSocket {
    fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // The listener's write timeout holds here: a client that does not read for so long counts as gone.
            match (&*self.socket).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    self.bytes_sent.set(self.bytes_sent.get() + sent as u64);
                    bytes = &bytes[sent..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        is_gone(&self.socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    /// Whether the socket is taken for one that was just accepted, and whether it has a peer.
    fn examine(registry: &Registry, socket: &impl AsRawFd, listener: &TcpListener) -> Option<bool> {
        let found = registry.examine(socket.as_raw_fd(), Listening::of(listener).unwrap()).unwrap();
        found.map(|found| found.peer.is_some())
    }

    /// One that was reset before it was accepted was not known, and all descriptors were looked through for it: with
    /// 900 connections a few hundred resets a second kept everybody else out.
    #[test]
    fn a_connection_that_was_reset_already_is_known_for_what_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let registry = Registry::default();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        assert_eq!(examine(&registry, &listener, &listener), None);
        assert_eq!(examine(&registry, &client, &listener), None);
        assert_eq!(examine(&registry, &accepted, &listener), Some(true));
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!((&accepted).read(&mut [0]).is_err(), "the reset has arrived");
        assert_eq!(examine(&registry, &accepted, &listener), Some(false));
        registry.0.inodes.lock().insert(inode_of(&accepted).unwrap());
        assert_eq!(examine(&registry, &accepted, &listener), None, "a live connection is nobody's new one");
    }
}
