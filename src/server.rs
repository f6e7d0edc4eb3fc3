//! Assembly: from a configuration to a running proxy, and to its end.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::access;
use crate::admin::{self, ProcessNumbers};
use crate::anthropic::error::{error_body, error_type};
use crate::anthropic::model::Families;
use crate::anthropic::tokens;
use crate::balancer::{self, Balancer, breaker};
use crate::config::{AuthMode, Config};
use crate::env;
use crate::front::{self, Ending, Exchange, Front, Route, Service};
use crate::http::answer::{Answer, Refusal};
use crate::http::head::Head;
use crate::messages::Messages;
use crate::relay::Limits;
use crate::routes::{self, Keys, Target};
use crate::upstream::{CachingResolver, Network, Tls, Workspace};

/// Descriptors that are not connections: listener, log, poller, token files and the like.
const SPARE_DESCRIPTORS: usize = 48;
/// A client connection has two of tiny_http and one of ours; its upstream connection is one more.
const DESCRIPTORS_PER_CONNECTION: usize = 4;

/// A running proxy.
pub struct Server {
    app: Arc<App>,
    front: Front,
    signals: Mutex<Signals>,
}

/// What requests are served with.
struct App {
    messages: Messages,
    keys: Keys,
    body_bytes_max: usize,
    started: Instant,
    panics: AtomicU64,
    is_draining: AtomicBool,
    connections: std::sync::OnceLock<Box<dyn Fn() -> usize + Send + Sync>>,
}

impl Server {
    /// Builds everything and opens the port. The message of an error stands after `claude-lb: `.
    pub fn start(config: &Config) -> Result<Self, String> {
        // Before anything can be reached: a signal in the first moment drains, too.
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
            .map_err(|error| format!("cannot wait for signals: {error}"))?;
        let app = Arc::new(App::new(config)?);
        let max_connections = room_for_connections(config.server.max_connections);
        let settings = front::Settings {
            host: config.server.host.clone(),
            port: config.server.port,
            workers: config.server.workers,
            queue: config.server.queue,
            queue_timeout: config.server.queue_timeout,
            max_connections,
            head: config.timeouts.head,
            body: config.timeouts.body,
            keep_alive: config.timeouts.keep_alive,
        };
        let place = format!("{}:{}", settings.host, settings.port);
        let service: Arc<dyn Service> = Arc::clone(&app) as Arc<dyn Service>;
        let front = Front::start(settings, service).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!(
                    "cannot listen on {place}: another program uses this port (change server.port, or end it)"
                )
            }
            _ => format!("cannot listen on {place}: {error} (check server.host and server.port)"),
        })?;
        let _ = app.connections.set(front.connection_counter());
        Ok(Self { app, front, signals: Mutex::new(signals) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.front.address()
    }

    /// Runs until a signal ends it: the first drains, a second one ends at once. True when everything that ran could
    /// finish.
    pub fn run_until_signal(&self, drain_timeout: Duration) -> bool {
        let mut signals = self.signals.lock();
        for signal in signals.forever() {
            if signal != SIGHUP {
                break;
            }
            log::warn!("SIGHUP: the configuration is read at start only; restart to change it");
        }
        log::info!("draining: {} requests may finish within {drain_timeout:?}", self.front.busy());
        self.drain();
        let until = env::now() + drain_timeout;
        while self.front.busy() > 0 {
            if signals.pending().any(|signal| signal != SIGHUP) {
                log::warn!("second signal: ending {} requests at once", self.front.busy());
                return false;
            }
            if env::now() >= until {
                log::warn!("drain_timeout passed: ending {} requests", self.front.busy());
                return false;
            }
            env::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Closes the port; what runs may finish.
    pub fn drain(&self) {
        self.app.is_draining.store(true, Ordering::SeqCst);
        self.front.drain();
    }

    /// Tells a person where it listens and how to use it.
    pub fn announce(&self, config: &Config) {
        let address = self.address();
        let reachable = match address.ip() {
            ip if ip.is_unspecified() => format!("localhost:{}", address.port()),
            _ => address.to_string(),
        };
        let mut text = format!("claude-lb {} listening on http://{address}\n", env!("CARGO_PKG_VERSION"));
        for endpoint in &config.endpoints {
            text.push_str(&format!("  {} -> {}\n", endpoint.name, endpoint.api_base));
        }
        let key = config.auth.keys.first().map_or_else(
            || "any-text (auth.mode is none)".to_string(),
            |key| format!("<the key \"{}\" of the configuration>", key.name),
        );
        text.push_str(&format!(
            "\nFor Claude Code:\n  export ANTHROPIC_BASE_URL=http://{reachable}\n  export ANTHROPIC_API_KEY={key}\n"
        ));
        // A closed stdout is no reason to stop.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

impl App {
    fn new(config: &Config) -> Result<Self, String> {
        let network = network(config)?;
        let endpoints = config
            .endpoints
            .iter()
            .map(|endpoint| {
                let workspace = Workspace::new(endpoint, &network)
                    .map_err(|why| format!("endpoint {}: {why}", endpoint.name))?;
                Ok(balancer::Endpoint {
                    name: endpoint.name.clone(),
                    address: endpoint.api_base.clone(),
                    weight: endpoint.weight,
                    max_concurrent: endpoint.max_concurrent,
                    models: endpoint.models.clone(),
                    payload: Arc::new(workspace),
                })
            })
            .collect::<Result<Vec<_>, String>>()?;
        let settings = balancer::Settings {
            strategy: config.load_balancer.strategy,
            breaker: breaker::Settings {
                threshold: config.load_balancer.circuit_breaker_threshold,
                timeout: config.load_balancer.circuit_breaker_timeout,
            },
        };
        let models = &config.models;
        let messages = Messages {
            balancer: Balancer::new(settings, endpoints, env::rng(), env::now()),
            map: models.map.clone(),
            families: Families {
                sonnet: models.sonnet.clone(),
                opus: models.opus.clone(),
                haiku: models.haiku.clone(),
            },
            max_attempts: config.load_balancer.max_attempts,
            first_byte: config.timeouts.first_byte,
            limits: Limits { idle: config.timeouts.idle, heartbeat: config.timeouts.heartbeat },
        };
        let keys = match config.auth.mode {
            AuthMode::None => Vec::new(),
            AuthMode::Key => config.auth.keys.iter().map(|k| (k.name.clone(), k.key.clone())).collect(),
        };
        Ok(Self {
            messages,
            keys: Keys::new(keys, config.auth.protect_admin),
            body_bytes_max: config.limits.max_body_bytes,
            started: env::now(),
            panics: AtomicU64::new(0),
            is_draining: AtomicBool::new(false),
            connections: std::sync::OnceLock::new(),
        })
    }

    fn process_numbers(&self, now: Instant) -> ProcessNumbers {
        ProcessNumbers {
            uptime_s: now.saturating_duration_since(self.started).as_secs(),
            connections: self.connections.get().map_or(0, |count| count()),
            panics: self.panics.load(Ordering::Relaxed),
            draining: self.is_draining.load(Ordering::SeqCst),
        }
    }

    /// Everything but messages.
    fn answer(&self, target: Target, exchange: &Exchange, id: &str) -> Answer {
        let (balancer, now) = (&self.messages.balancer, env::now());
        match target {
            Target::Live => admin::live(),
            Target::Ready => admin::ready(balancer, self.is_draining.load(Ordering::SeqCst), now),
            Target::Stats => admin::stats(balancer, self.process_numbers(now), now),
            Target::Reset => admin::reset(balancer),
            Target::EventLogging => admin::event_logging(),
            Target::WarmUp | Target::Messages => admin::warm_up(),
            Target::CountTokens => match tokens::estimate(&exchange.body) {
                Ok(count) => admin::count(count),
                Err(why) => worded(&Refusal::new(400, why), id),
            },
        }
    }
}

impl Service for App {
    fn route(&self, head: &Head) -> Result<Route, Refusal> {
        routes::route(head, &self.keys, self.body_bytes_max)
    }

    fn refuse(&self, refusal: Refusal, head: Option<&Head>, peer: SocketAddr) -> Answer {
        let id = env::request_id();
        access::local(&id, None, &peer.to_string(), head, refusal.status, log::Level::Info);
        worded(&refusal, &id)
    }

    fn serve(&self, exchange: &Exchange) -> Ending {
        let head = &exchange.head;
        let target = match routes::target(head.method(), head.path()) {
            Ok(Target::Messages) => return self.messages.serve(exchange),
            Ok(target) => target,
            Err(_) => Target::WarmUp,
        };
        let id = env::request_id();
        let answer = self.answer(target, exchange, &id);
        let key = exchange.route.key.as_deref();
        // Probes come every few seconds for ever; they are not worth a line each.
        let level = if target == Target::CountTokens { log::Level::Info } else { log::Level::Debug };
        access::local(&id, key, &exchange.peer.to_string(), Some(head), answer.status, level);
        exchange.client.send_or_forget(&answer.to_bytes(head.method() == "HEAD", exchange.closes));
        Ending::Whole
    }

    fn panicked(&self, exchange: &Exchange) -> Answer {
        self.panics.fetch_add(1, Ordering::Relaxed);
        let id = env::request_id();
        access::local(&id, exchange.route.key.as_deref(), "-", Some(&exchange.head), 500, log::Level::Error);
        worded(&Refusal::new(500, "the proxy failed on this request; please report it with this id"), &id)
    }
}

/// A refusal in Anthropic's shape.
fn worded(refusal: &Refusal, id: &str) -> Answer {
    let body = error_body(error_type(refusal.status), &refusal.message, id);
    let answer = Answer::json(refusal.status, body).with("request-id", id);
    refusal.headers.iter().fold(answer, |answer, (name, value)| answer.with(name, value.clone()))
}

fn network(config: &Config) -> Result<Network, String> {
    let timeouts = &config.timeouts;
    let shortest = timeouts.heartbeat.min(timeouts.idle).min(timeouts.first_byte).min(timeouts.connect);
    let tick = (shortest / 4).clamp(Duration::from_millis(10), Duration::from_millis(500));
    let mut ca_files: Vec<PathBuf> = config.tls.ca_file.iter().cloned().collect();
    ca_files.extend(std::env::var_os("SSL_CERT_FILE").filter(|file| !file.is_empty()).map(PathBuf::from));
    Ok(Network {
        tls: Tls::new(&ca_files).map_err(|why| format!("tls.ca_file or SSL_CERT_FILE: {why}"))?,
        resolver: CachingResolver::new(timeouts.connect, tick),
        connect_timeout: timeouts.connect,
        tick,
        idle_connections: config.server.workers,
    })
}

/// Raises the limit on open files as far as it goes, and says so when it is too small for what was configured.
fn room_for_connections(wanted: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let descriptors = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
    let room = (descriptors.saturating_sub(SPARE_DESCRIPTORS) / DESCRIPTORS_PER_CONNECTION).max(1);
    if room < wanted {
        log::warn!(
            "{descriptors} open files are room for {room} connections, not for server.max_connections = {wanted} \
             (raise the limit, ulimit -n)"
        );
    }
    room.min(wanted)
}
