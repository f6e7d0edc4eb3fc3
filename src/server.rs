//! Assembly: from a configuration to a running proxy, through reloads, to its end.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::access;
use crate::admin::{self, ProcessNumbers};
use crate::anthropic::error::{error_body, error_type};
use crate::app::App;
use crate::config::{AuthMode, Config};
use crate::env;
use crate::explain::{self, Explained, Explanations};
use crate::front::{self, Body, Ending, Exchange, Front, Route, Service};
use crate::http::answer::{Answer, Refusal};
use crate::http::head::Head;
use crate::panics;
use crate::routes::{self, Target};

/// Descriptors that are not connections: listener, log, poller, token files and the like.
const SPARE_DESCRIPTORS: usize = 48;
/// The share of the memory for bodies that is there for requests without a key, beside the rest.
const SHARE_WITHOUT_KEY: usize = 8;
/// A client connection has two of tiny_http and one of ours; its upstream connection is one more.
const DESCRIPTORS_PER_CONNECTION: usize = 4;

/// A running proxy.
pub struct Server {
    host: Arc<Host>,
    front: Front,
    signals: Mutex<Signals>,
}

/// What outlives a reload, and the App of the moment.
struct Host {
    app: RwLock<Arc<App>>,
    /// One reload at a time.
    reloading: Mutex<()>,
    /// The file that a reload reads; none for the demo.
    file: Option<PathBuf>,
    started: Instant,
    reloads: AtomicU64,
    is_draining: AtomicBool,
    address: OnceLock<SocketAddr>,
    connections: OnceLock<Box<dyn Fn() -> usize + Send + Sync>>,
}

impl Server {
    /// Builds everything and opens the port. `file` is what a reload reads. The message of an error stands after
    /// `claude-lb: `.
    pub fn start(config: &Config, file: Option<PathBuf>) -> Result<Self, String> {
        // Before anything can be reached: a signal in the first moment drains, too.
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
            .map_err(|error| format!("cannot wait for signals: {error}"))?;
        let host = Arc::new(Host {
            app: RwLock::new(Arc::new(App::new(config, None)?)),
            reloading: Mutex::new(()),
            file,
            started: env::now(),
            reloads: AtomicU64::new(0),
            is_draining: AtomicBool::new(false),
            address: OnceLock::new(),
            connections: OnceLock::new(),
        });
        let settings = front_settings(config);
        let place = format!("{}:{}", settings.host, settings.port);
        let service: Arc<dyn Service> = Arc::clone(&host) as Arc<dyn Service>;
        let front = Front::start(settings, service).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!(
                    "cannot listen on {place}: another program uses this port (change server.port, or end it)"
                )
            }
            _ => format!("cannot listen on {place}: {error} (check server.host and server.port)"),
        })?;
        let _ = host.address.set(front.address());
        let _ = host.connections.set(front.connection_counter());
        Ok(Self { host, front, signals: Mutex::new(signals) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.front.address()
    }

    /// Runs until a signal ends it: the first drains, a second one ends at once. SIGHUP reloads. True when everything
    /// that ran could finish.
    pub fn run_until_signal(&self, drain_timeout: Duration) -> bool {
        let mut signals = self.signals.lock();
        for signal in signals.forever() {
            if signal != SIGHUP {
                break;
            }
            // What happened is in the log; nothing else can be done about it here.
            let _ = self.host.reload();
        }
        log::info!("draining: {} requests may finish within {drain_timeout:?}", self.front.busy());
        self.drain();
        let until = env::now() + drain_timeout;
        while !self.front.is_drained() {
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
        self.host.is_draining.store(true, Ordering::SeqCst);
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

impl Host {
    fn app(&self) -> Arc<App> {
        Arc::clone(&self.app.read())
    }

    /// Reads the configuration again. Valid, it is swapped in; else nothing changes, and every problem is told.
    fn reload(&self) -> Result<(), Vec<String>> {
        let Some(file) = &self.file else {
            return Err(vec!["this instance was not started from a configuration file".into()]);
        };
        // Reading a pipe again waits for a writer, and a signal would wait behind it.
        if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            let why = format!("{} is no file: it can be read at the start only", file.display());
            log::error!("not reloaded, nothing has changed: {why}");
            return Err(vec![why]);
        }
        let _one = self.reloading.lock();
        let result = Config::load(file, &|name| std::env::var(name).ok())
            .map_err(|problems| problems.lines())
            .and_then(|config| {
                let current = self.app();
                self.stays_closed(&config)?;
                let next = App::new(&config, Some(&current)).map_err(|why| vec![why])?;
                *self.app.write() = Arc::new(next);
                let running = &current.config;
                let (old, new) = (&running.timeouts, &config.timeouts);
                let same_front = (old.head, old.body, old.keep_alive) == (new.head, new.body, new.keep_alive)
                    && running.limits.max_buffered_bytes == config.limits.max_buffered_bytes;
                Ok(running.server != config.server || running.logging != config.logging || !same_front)
            });
        match result {
            Ok(needs_restart) => {
                self.reloads.fetch_add(1, Ordering::Relaxed);
                log::info!("reloaded {}", file.display());
                if needs_restart {
                    log::warn!(
                        "changes under server and logging, of timeouts.head, body and keep_alive, and of \
                         limits.max_buffered_bytes take effect at the next start"
                    );
                }
                Ok(())
            }
            Err(problems) => {
                log::error!("not reloaded, nothing has changed; wrong in {}:", file.display());
                problems.iter().for_each(|line| log::error!("{line}"));
                Err(problems)
            }
        }
    }

    /// A reload must not open the door: the address that is really bound stays what it was.
    fn stays_closed(&self, config: &Config) -> Result<(), Vec<String>> {
        let bound = self.address.get();
        if config.auth.mode == AuthMode::Key || bound.is_some_and(|address| address.ip().is_loopback()) {
            return Ok(());
        }
        let bound = bound.map(ToString::to_string).unwrap_or_default();
        Err(vec![format!(
            "auth.mode: none needs a loopback address, and this instance listens on {bound} (restart it)"
        )])
    }

    fn process_numbers(&self, now: Instant) -> ProcessNumbers {
        ProcessNumbers {
            uptime_s: now.saturating_duration_since(self.started).as_secs(),
            connections: self.connections.get().map_or(0, |count| count()),
            reloads: self.reloads.load(Ordering::Relaxed),
            panics: panics::count(),
            draining: self.is_draining.load(Ordering::SeqCst),
        }
    }

    /// Everything but messages.
    fn answer(&self, target: Target, exchange: &Exchange, body: &[u8], exchange_id: &str) -> Answer {
        let (app, now) = (self.app(), env::now());
        let balancer = &app.messages.balancer;
        match target {
            Target::Live => admin::live(),
            Target::Ready => admin::ready(balancer, self.is_draining.load(Ordering::SeqCst), now),
            Target::Stats => {
                let learned = admin::Learned {
                    compat: app.messages.compat.memory.snapshot(now),
                    token_counts: app.messages.counting.snapshot(),
                };
                admin::stats(balancer, learned, self.process_numbers(now), now)
            }
            Target::Explain => {
                let id = routes::explained_id(exchange.head.path()).unwrap_or_default();
                match app.messages.explanations.page(id, now, env::wall_clock()) {
                    Some(page) => Answer::json(200, page),
                    None => worded(&not_explained(id, &app.messages.explanations), exchange_id),
                }
            }
            Target::Reset => admin::reset(balancer),
            Target::Reload => match self.reload() {
                Ok(()) => admin::reloaded(),
                Err(problems) => worded(&Refusal::new(400, problems.join("\n")), exchange_id),
            },
            Target::EventLogging => admin::event_logging(),
            Target::WarmUp | Target::Messages => admin::warm_up(),
            Target::CountTokens => match app.messages.count_tokens(body) {
                Ok(count) => admin::count(count),
                Err(why) => worded(&Refusal::new(400, why), exchange_id),
            },
        }
    }
}

impl Service for Host {
    fn route(&self, head: &Head) -> Result<Route, Refusal> {
        let app = self.app.read();
        routes::route(head, &app.keys, app.body_bytes_max)
    }

    fn refuse(&self, refusal: Refusal, head: Option<&Head>, peer: SocketAddr) -> Answer {
        let id = env::request_id();
        let app = self.app();
        let key = head.and_then(|head| app.keys.find(head));
        access::local(&id, key.as_deref(), &peer.to_string(), head, refusal.status, log::Level::Info);
        if let Some(head) = head.filter(|_| app.keys.admit(key.as_deref())) {
            explain_refusal(&app, head, &id, &refusal);
        }
        worded(&refusal, &id)
    }

    fn serve(&self, exchange: &Exchange, body: Body) -> Ending {
        let head = &exchange.head;
        let target = match routes::target(head.method(), head.path()) {
            Ok(Target::Messages) => return self.app().messages.serve(exchange, body),
            Ok(target) => target,
            Err(_) => Target::WarmUp,
        };
        let id = env::request_id();
        let answer = self.answer(target, exchange, &body, &id);
        let key = exchange.route.key.as_deref();
        // Probes come every few seconds for ever; they are not worth a line each.
        let level = if target == Target::CountTokens { log::Level::Info } else { log::Level::Debug };
        access::local(&id, key, &exchange.peer.to_string(), Some(head), answer.status, level);
        let bytes = answer.to_bytes(head.method() == "HEAD", exchange.closes);
        exchange.client.send_promptly(&bytes).map_or(Ending::Broken, |()| Ending::Whole)
    }

    fn tick(&self, now: Instant) {
        self.app().release_idle(now);
    }

    fn panicked(&self, exchange: &Exchange) -> Answer {
        let id = env::request_id();
        let key = exchange.route.key.as_deref();
        access::local(&id, key, &exchange.peer.to_string(), Some(&exchange.head), 500, log::Level::Error);
        let refusal = Refusal::new(500, "the proxy failed on this request; please report it with this id");
        explain_refusal(&self.app(), &exchange.head, &id, &refusal);
        worded(&refusal, &id)
    }
}

fn front_settings(config: &Config) -> front::Settings {
    front::Settings {
        host: config.server.host.clone(),
        port: config.server.port,
        workers: config.server.workers,
        queue: config.server.queue,
        queue_timeout: config.server.queue_timeout,
        max_connections: room_for_connections(config.server.max_connections),
        head: config.timeouts.head,
        body: config.timeouts.body,
        keep_alive: config.timeouts.keep_alive,
        write: front::WRITE_TIMEOUT,
        buffered_bytes_max: config.limits.max_buffered_bytes,
        // Room for two of the largest.
        open_buffered_bytes_max: (config.limits.max_buffered_bytes / SHARE_WITHOUT_KEY)
            .max(2 * config.limits.max_body_bytes),
    }
}

/// A message that was turned away before it was looked at, such as by a full queue. Only for who has a key: nobody else
/// is to push requests out of the memory.
fn explain_refusal(app: &App, head: &Head, id: &str, refusal: &Refusal) {
    if routes::target(head.method(), head.path()) == Ok(Target::Messages) {
        let refused = Explained::turned_away(id.into(), refusal.status, &refusal.message, env::now());
        app.messages.explanations.keep(refused);
    }
}

/// The id is not known, or no longer.
fn not_explained(id: &str, explanations: &Explanations) -> Refusal {
    const SHOWN_CHARS: usize = 100;
    let shown: String = id.chars().take(SHOWN_CHARS).collect();
    let (kept, most) = (explanations.len(), explain::KEPT_MAX);
    Refusal::new(
        404,
        format!(
            "no message request {shown} is kept: of the last {most} there are {kept}, each from its end on; the id is \
             the `request-id` of the answer and the `id` of the access line"
        ),
    )
}

/// A refusal in Anthropic's shape.
fn worded(refusal: &Refusal, id: &str) -> Answer {
    let body = error_body(error_type(refusal.status), &refusal.message, id);
    let answer = Answer::json(refusal.status, body).with("request-id", id);
    refusal.headers.iter().fold(answer, |answer, (name, value)| answer.with(name, value.clone()))
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
