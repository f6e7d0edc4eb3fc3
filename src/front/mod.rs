//! The clients' side, and the only room that names tiny_http.
//!
//! The shape of Apache's event MPM. One accept thread; one watcher for all connections on which nothing runs, which
//! judges each request head before anything else is done; lanes with fixed pools of workers that own a connection only
//! while they serve one request. Slow bodies are read by threads of their own, so that a slow upload never holds a
//! worker. What a request means is the business of the [`Service`] above.

mod budget;
mod connection;
mod lane;
mod listener;
mod reader;
mod stay;
mod watcher;

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::env;
use crate::http::answer::{Answer, Refusal};
use crate::http::head::Head;
use budget::Budget;
use connection::Connection;
use lane::Pools;
use watcher::Watcher;

pub use connection::ClientSocket;
pub use reader::Body;

/// Limits of the clients' side.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen; port 0 lets the system choose.
    pub host: String,
    /// See `host`.
    pub port: u16,
    /// Workers for messages.
    pub workers: usize,
    /// Requests that may wait for a worker.
    pub queue: usize,
    /// The longest such a wait.
    pub queue_timeout: Duration,
    /// Connections at once.
    pub max_connections: usize,
    /// The longest a head may take from its first byte, and a fresh connection to its first byte.
    pub head: Duration,
    /// The longest a body may take.
    pub body: Duration,
    /// The longest a connection may be idle between requests.
    pub keep_alive: Duration,
    /// The longest a client may take no byte of its answer.
    pub write: Duration,
    /// Memory for the bodies of messages, in bytes.
    pub buffered_bytes_max: usize,
    /// Memory for all other bodies: it is apart, for these need no key.
    pub open_buffered_bytes_max: usize,
}

/// A client that takes no byte for this long, although the answer waits, is given up.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Which pool serves a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// Messages: the workers, which may be busy for minutes.
    Messages,
    /// Counting tokens: reads bodies and computes, but waits for nobody.
    Count,
    /// Everything that is answered at once.
    Quick,
}

/// What is done with a request whose head is known.
#[derive(Debug, Clone)]
pub struct Route {
    /// Who serves it.
    pub pool: Pool,
    /// The name of the client's key, if one was asked for.
    pub key: Option<Arc<str>>,
    /// The largest body, in bytes. A longer announced one is refused by the service itself.
    pub body_bytes_max: usize,
}

/// One request but for its body, and the way back to its client.
pub struct Exchange {
    /// The request head.
    pub head: Box<Head>,
    /// The client.
    pub client: Rc<ClientSocket>,
    /// The client's address.
    pub peer: SocketAddr,
    /// What [`Service::route`] said.
    pub route: Route,
    /// When the head was whole.
    pub received_at: Instant,
    /// The connection ends after this answer, and the answer should say so.
    pub closes: bool,
}

/// How serving a request left the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The answer was ended well: another request may follow.
    Whole,
    /// The answer broke off: the client must see the connection end.
    Broken,
}

/// What the proxy does with requests. Called from many threads.
pub trait Service: Send + Sync + 'static {
    /// Decides by the head alone. Called by the watcher: must not wait for anything.
    fn route(&self, head: &Head) -> Result<Route, Refusal>;

    /// Words a refusal, and notes it in the access log. Called by the watcher, too.
    fn refuse(&self, refusal: Refusal, head: Option<&Head>, peer: SocketAddr) -> Answer;

    /// Serves one request. Its body goes as soon as it is not needed any more.
    fn serve(&self, exchange: &Exchange, body: Body) -> Ending;

    /// Called about once a second by the watcher: must not wait for anything.
    fn tick(&self, now: Instant);

    /// A worker panicked while it served this request. Returns the answer for a client that has seen nothing yet.
    fn panicked(&self, exchange: &Exchange) -> Answer;
}

/// The running clients' side.
pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// What the threads of this room share.
struct Shared {
    settings: Settings,
    service: Arc<dyn Service>,
    watcher: Watcher,
    pools: Pools,
    connections: connection::Registry,
    bodies: Budget,
    bodies_without_key: Budget,
    is_draining: AtomicBool,
    has_stopped_accepting: AtomicBool,
    /// Sweeps while draining that left nothing to wait for.
    quiet_sweeps: AtomicU64,
    /// How many there were when nothing ran.
    idle_since: Mutex<Option<u64>>,
}

impl Front {
    /// Listens and starts serving.
    pub fn start(settings: Settings, service: Arc<dyn Service>) -> std::io::Result<Self> {
        let listener = listener::bind(&settings)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            watcher: Watcher::new(&settings)?,
            pools: Pools::new(&settings),
            connections: connection::Registry::default(),
            bodies: Budget::new(settings.buffered_bytes_max),
            bodies_without_key: Budget::new(settings.open_buffered_bytes_max),
            is_draining: AtomicBool::new(false),
            has_stopped_accepting: AtomicBool::new(false),
            quiet_sweeps: AtomicU64::new(0),
            idle_since: Mutex::new(None),
            settings,
            service,
        });
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
        };
        let watching = Arc::clone(&shared);
        spawn("watcher", Box::new(move || watcher::run(&watching)))?;
        let accepting = Arc::clone(&shared);
        spawn("accept", Box::new(move || listener::run(listener, &accepting)))?;
        Ok(Self { address, shared })
    }

    /// Where it really listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port and all idle connections. What runs goes on.
    pub fn drain(&self) {
        self.shared.is_draining.store(true, Ordering::SeqCst);
        listener::wake(self.address);
        self.shared.watcher.wake();
    }

    /// Requests that are read, queued or served.
    pub fn busy(&self) -> usize {
        self.shared.pools.busy()
    }

    /// Draining is over: nothing runs, and a look at all connections after that found no request that had arrived.
    /// Only that order is safe: a worker parks its connection when its client may have sent the next one already.
    pub fn is_drained(&self) -> bool {
        let mut idle_since = self.shared.idle_since.lock();
        if self.busy() > 0 {
            *idle_since = None;
            return false;
        }
        let sweeps = self.shared.quiet_sweeps.load(Ordering::SeqCst);
        // One sweep may have been underway.
        if sweeps >= *idle_since.get_or_insert(sweeps) + 2 {
            return self.busy() == 0;
        }
        self.shared.watcher.wake();
        false
    }

    /// Counts open client connections.
    pub fn connection_counter(&self) -> Box<dyn Fn() -> usize + Send + Sync> {
        let registry = self.shared.connections.clone();
        Box::new(move || registry.len())
    }
}

/// A request on its way to a worker.
struct Job {
    connection: Connection,
    head: Box<Head>,
    route: Route,
    received_at: Instant,
    /// More bytes have come behind it: the client does not wait for its answer before it goes on.
    has_more: bool,
    /// The body, once it was read apart from the worker.
    read: Option<reader::Read>,
}

impl Shared {
    fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    fn bodies_of(&self, pool: Pool) -> &Budget {
        match pool {
            Pool::Messages => &self.bodies,
            Pool::Count | Pool::Quick => &self.bodies_without_key,
        }
    }

    /// Sends a request to its pool; when that is full, the request comes back.
    fn enqueue(self: &Arc<Self>, job: Job) -> Result<(), Box<Job>> {
        let shared = Arc::clone(self);
        self.pools.of(job.route.pool).send(job, move |job| shared.work(job)).map_err(Box::new)
    }

    /// Sends a request whose body is still coming to a reader.
    fn enqueue_unread(self: &Arc<Self>, job: Job) -> Result<(), Box<Job>> {
        let shared = Arc::clone(self);
        let lane = self.pools.readers_for(job.route.pool);
        lane.send(job, move |job| reader::run(&shared, job)).map_err(Box::new)
    }

    /// A worker's part: one request, and those of its client that follow at once.
    fn work(self: &Arc<Self>, job: Job) {
        let mut next = Some(job);
        while let Some(job) = next {
            next = self.work_once(job);
        }
    }

    /// Takes the request from its connection, serves it, parks or closes the connection, or takes the next one from it.
    fn work_once(self: &Arc<Self>, mut job: Job) -> Option<Job> {
        let read = match job.read.take() {
            Some(read) => read,
            None => match reader::read(&job, self) {
                Ok(read) => read,
                Err(refusal) => {
                    reader::give_up(self, job, refusal);
                    return None;
                }
            },
        };
        let Job { mut connection, head, route, received_at, .. } = job;
        let pool = route.pool;
        let closes = read.closes || !head.keep_alive() || self.is_draining();
        let client = Rc::new(ClientSocket::new(&connection));
        let peer = connection.peer();
        let exchange = Exchange { head, client, peer, route, received_at, closes };
        let serve = || self.service.serve(&exchange, read.body);
        let ending = catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| {
            let answer = self.service.panicked(&exchange);
            if exchange.client.bytes_sent() == 0 {
                exchange.client.send_or_forget(&answer.to_bytes(false, true));
            }
            Ending::Broken
        });
        // What was announced holds, also when draining has begun since: the client may have sent the next request.
        let keep = ending == Ending::Whole && !exchange.closes;
        drop(exchange);
        if keep {
            let now = env::now();
            let answered_before = connection.answered_at.replace(now);
            if pool == Pool::Messages && stay::went_on_at_once(answered_before, received_at) {
                match self.next_message(connection) {
                    Ok(job) => return Some(job),
                    Err(back) => connection = back,
                }
            }
            self.watcher.park(connection, now + self.settings.keep_alive);
        } else if ending == Ending::Whole {
            self.end(connection);
        } else {
            connection.close();
        }
        None
    }

    /// Ends a connection whose last answer was whole. Closed on bytes that nobody read, it would end with a reset,
    /// which can destroy the answer on its way.
    fn end(&self, connection: Connection) {
        if connection.available() > 0 {
            self.watcher.linger(connection);
        } else {
            connection.close();
        }
    }
}
