//! The connections to one workspace: ureq's pool, and an end for those that nobody asks for any more.
//!
//! ureq 3.5.2 looks at the age of its idle connections only when one is asked for or comes back. A proxy at rest would
//! keep them, and their descriptors, for ever, although most were closed by the other side long ago. So the agent, and
//! its pool with it, is replaced when it has been out of use for as long as a connection may be idle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ureq::Agent;

use crate::env;

/// Idle connections are given up before any load balancer on the way does it (60 s is the shortest usual limit).
pub(super) const IDLE_AGE: Duration = Duration::from_secs(50);

/// Makes agents that are all alike.
type NewAgent = dyn Fn() -> Agent + Send + Sync;

/// The connections to one workspace.
pub(super) struct Connections {
    new_agent: Box<NewAgent>,
    state: Mutex<State>,
}

struct State {
    agent: Agent,
    /// Calls and bodies underway.
    in_use: usize,
    /// When the last of them ended; none before the first.
    idle_since: Option<Instant>,
}

/// The agent, while a call or the body of its answer needs it.
pub(super) struct InUse {
    connections: Arc<Connections>,
    pub(super) agent: Agent,
}

impl Connections {
    /// Nothing is connected yet.
    pub(super) fn new(new_agent: Box<NewAgent>) -> Arc<Self> {
        let state = State { agent: new_agent(), in_use: 0, idle_since: None };
        Arc::new(Self { new_agent, state: Mutex::new(state) })
    }

    /// The agent for one call.
    pub(super) fn begin(self: &Arc<Self>) -> InUse {
        let mut state = self.state.lock();
        state.in_use += 1;
        InUse { connections: Arc::clone(self), agent: state.agent.clone() }
    }

    /// Closes what has been idle for too long.
    pub(super) fn release_idle(&self, now: Instant) {
        let old = {
            let mut state = self.state.lock();
            let is_old = |since: Instant| now.saturating_duration_since(since) >= IDLE_AGE;
            if state.in_use > 0 || !state.idle_since.is_some_and(is_old) {
                return;
            }
            state.idle_since = None;
            std::mem::replace(&mut state.agent, (self.new_agent)())
        };
        // Its connections close here, outside the lock.
        drop(old);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = self.connections.state.lock();
        state.in_use -= 1;
        state.idle_since = Some(env::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn ask(connections: &Arc<Connections>, listener: &TcpListener) -> TcpStream {
        let url = format!("http://{}/", listener.local_addr().unwrap());
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let mut socket = listener.accept().unwrap().0;
                assert!(socket.read(&mut [0; 4096]).unwrap() > 0);
                socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
                socket
            });
            let used = connections.begin();
            assert_eq!(used.agent.get(&url).call().unwrap().body_mut().read_to_string().unwrap(), "ok");
            server.join().unwrap()
        })
    }

    #[test]
    fn connections_that_nobody_asks_for_are_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connections = Connections::new(Box::new(Agent::new_with_defaults));
        let mut socket = ask(&connections, &listener);
        socket.set_nonblocking(true).unwrap();
        let is_open = |socket: &mut TcpStream| socket.read(&mut [0; 1]).is_err();
        let old = env::now() + IDLE_AGE;
        connections.release_idle(old - IDLE_AGE / 2);
        assert!(is_open(&mut socket), "it may be asked for");
        let used = connections.begin();
        connections.release_idle(old);
        assert!(is_open(&mut socket), "the workspace is in use");
        drop(used);
        socket.set_nonblocking(false).unwrap();
        connections.release_idle(env::now() + IDLE_AGE);
        assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
        ask(&connections, &listener);
    }
}
