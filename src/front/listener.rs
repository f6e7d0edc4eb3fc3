//! Accepts connections and hands each to the watcher.
//!
//! Never ends before it is told to: running out of descriptors is a pause and a log line, not an exit. tiny_http's
//! accept duplicates the socket and panics when that fails (fork 0.12.17, `RefinedTcpStream::new`), so it is caught.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tiny_http::{Listener, Server, SslContextWrap};

use super::connection::{self, Listening};
use super::{Settings, Shared};
use crate::{env, panics};

/// Connections the kernel may hold for us.
const BACKLOG: i32 = 1024;
/// How long a blocking read waits before it looks up, on every accepted socket and in accept itself.
const READ_TICK: Duration = Duration::from_secs(1);
/// The pause after an accept that failed.
const PAUSE: Duration = Duration::from_millis(50);

/// Opens the port. Accepted sockets inherit what is set here.
pub(super) fn bind(settings: &Settings) -> io::Result<TcpListener> {
    let (host, port) = (settings.host.as_str(), settings.port);
    let address = (host.trim_matches(['[', ']']), port).to_socket_addrs()?.next();
    let address = address.ok_or_else(|| io::Error::other(format!("{host} has no address")))?;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.set_read_timeout(Some(READ_TICK))?;
    socket.set_write_timeout(Some(settings.write))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Ends a wait in accept at once.
pub(super) fn wake(address: SocketAddr) {
    let mut address = address;
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    let _ = TcpStream::connect_timeout(&address, Duration::from_millis(100));
}

/// Accepts until the front drains; the port closes when it returns.
pub(super) fn run(listener: TcpListener, shared: &Arc<Shared>) {
    let Ok(listening) = Listening::of(&listener) else { return };
    let Ok(plain) = SslContextWrap::build_ssl_capabilities(None) else { return };
    let listener = Listener::from(listener);
    let most = shared.settings.max_connections;
    let mut failures = 0u64;
    while !shared.is_draining() {
        if shared.connections.len() >= most {
            // Nobody has to go for a client that does not come.
            if !is_awaited(&listener) {
                continue;
            }
            if !shared.watcher.make_room() {
                shared.connections.wait_for_room(most, READ_TICK);
                continue;
            }
        }
        match accept(&listener, &plain, listening, shared) {
            Ok(()) => {
                if failures > 0 {
                    log::info!("accepting again after {failures} failures");
                    failures = 0;
                }
            }
            Err(error) if is_nothing(&error) => {}
            Err(error) => {
                failures += 1;
                if failures == 1 {
                    log::error!(
                        "cannot accept connections: {error} (raise the limit on open files, ulimit -n)"
                    );
                }
                // An idle client is the cheapest source of descriptors.
                if connection::is_shortage(&error) {
                    shared.watcher.make_room();
                }
                env::sleep(PAUSE);
            }
        }
    }
    // What the kernel has accepted for us already may have brought its request.
    if let Listener::Tcp(tcp) = &listener
        && tcp.set_nonblocking(true).is_ok()
    {
        (0..BACKLOG).take_while(|_| accept(&listener, &plain, listening, shared).is_ok()).count();
    }
    drop(listener);
    shared.has_stopped_accepting.store(true, Ordering::SeqCst);
    shared.watcher.wake();
}

/// Waits for a client, at most for a tick.
fn is_awaited(listener: &Listener) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let Listener::Tcp(tcp) = listener else { return true };
    let tick = Timespec::try_from(READ_TICK).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    rustix::event::poll(&mut [PollFd::new(tcp, PollFlags::IN)], Some(&tick)).is_ok_and(|count| count > 0)
}

/// A wait that ended without a connection, or a client that left before it was accepted.
fn is_nothing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted | ConnectionAborted)
}

fn accept(
    listener: &Listener,
    plain: &SslContextWrap,
    listening: Listening,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    // The lowest free descriptor now is most likely the one that accept gets.
    let hint = match listener {
        Listener::Tcp(tcp) => tcp.try_clone()?.as_raw_fd(),
        #[allow(unreachable_patterns)]
        _ => -1,
    };
    let accepted = panics::expected(|| Server::accept_connection(listener, plain));
    let accepted = accepted.unwrap_or_else(|_| Err(rustix::io::Errno::MFILE.into()))?;
    let Some(requests) = accepted else { return Ok(()) };
    let requests = Box::new(requests.map(Result::ok));
    let connection = shared.connections.adopt(requests, listening, hint, shared.watcher.poller())?;
    shared.watcher.park(connection, env::now() + shared.settings.head);
    Ok(())
}
