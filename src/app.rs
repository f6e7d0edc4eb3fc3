//! What requests are served with, built from one configuration. A reload builds another and swaps it in; a request
//! keeps the one it began with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::anthropic::compat::Path;
use crate::anthropic::model::Families;
use crate::balancer::{self, Balancer, breaker};
use crate::config::{self, AuthMode, CompatMode, Config};
use crate::env;
use crate::messages::{Compat, Messages, Waiting};
use crate::relay::Limits;
use crate::routes::Keys;
use crate::upstream::{CachingResolver, Network, Tls, Workspace};

/// Everything that a configuration decides about serving requests.
pub struct App {
    /// The main path.
    pub messages: Messages,
    /// Who may ask.
    pub keys: Keys,
    /// The largest message, in bytes.
    pub body_bytes_max: usize,
    /// What it was built from.
    pub config: Config,
    network: Network,
    workspaces: Vec<Arc<Workspace>>,
}

impl App {
    /// Builds it. With `previous`, endpoints that are still there keep their state, and those that are written as
    /// before keep their connections, too.
    pub fn new(config: &Config, previous: Option<&App>) -> Result<Self, String> {
        let network = match previous.filter(|app| has_same_network(&app.config, config)) {
            Some(app) => app.network.clone(),
            None => network(config)?,
        };
        let kept = previous.filter(|app| has_same_network(&app.config, config));
        let workspaces = config
            .endpoints
            .iter()
            .map(|endpoint| match kept.and_then(|app| app.workspace(endpoint)) {
                Some(workspace) => Ok(workspace),
                None => Workspace::new(endpoint, &network)
                    .map(Arc::new)
                    .map_err(|why| format!("endpoint {}: {why}", endpoint.name)),
            })
            .collect::<Result<Vec<_>, String>>()?;
        // As all of `server`: from the next start on.
        let waiting = previous.map_or_else(|| waiting(config), |app| app.messages.waiting);
        let settings = balancer::Settings {
            strategy: config.load_balancer.strategy,
            session_affinity: config.load_balancer.session_affinity,
            breaker: breaker::Settings {
                threshold: config.load_balancer.circuit_breaker_threshold,
                timeout: config.load_balancer.circuit_breaker_timeout,
                rate: config.load_balancer.circuit_breaker_rate,
            },
            waiting_max: waiting.most,
            learns_limits: true,
        };
        let endpoints =
            config.endpoints.iter().zip(&workspaces).map(|(endpoint, workspace)| balancer::Endpoint {
                name: endpoint.name.clone(),
                address: endpoint.api_base.clone(),
                weight: endpoint.weight,
                max_concurrent: endpoint.max_concurrent,
                models: endpoint.models.clone(),
                limits: endpoint.limits.clone(),
                payload: Arc::clone(workspace),
            });
        let balancer = match previous {
            Some(app) => {
                app.messages.balancer.replace(settings, endpoints.collect(), env::now());
                Arc::clone(&app.messages.balancer)
            }
            None => Balancer::new(settings, endpoints.collect(), env::rng(), env::now()),
        };
        let keys = match config.auth.mode {
            AuthMode::None => Vec::new(),
            AuthMode::Key => config.auth.keys.iter().map(|k| (k.name.clone(), k.key.clone())).collect(),
        };
        Ok(Self {
            messages: messages(config, balancer, waiting, previous),
            keys: Keys::new(keys, config.auth.protect_admin),
            body_bytes_max: config.limits.max_body_bytes,
            config: config.clone(),
            network,
            workspaces,
        })
    }

    /// Closes connections to workspaces that have been idle for too long.
    pub fn release_idle(&self, now: Instant) {
        self.workspaces.iter().for_each(|workspace| workspace.release_idle(now));
    }

    /// The connections to an endpoint that is written exactly so.
    fn workspace(&self, endpoint: &config::Endpoint) -> Option<Arc<Workspace>> {
        let at = self.config.endpoints.iter().position(|known| known == endpoint)?;
        self.workspaces.get(at).cloned()
    }
}

/// A request that waits for room holds a worker: half of them go on serving.
fn waiting(config: &Config) -> Waiting {
    Waiting { most: config.server.workers.div_ceil(2), timeout: config.server.queue_timeout }
}

fn messages(
    config: &Config,
    balancer: Arc<Balancer<Workspace>>,
    waiting: Waiting,
    previous: Option<&App>,
) -> Messages {
    let models = &config.models;
    Messages {
        balancer,
        map: models.map.clone(),
        families: Families {
            sonnet: models.sonnet.clone(),
            opus: models.opus.clone(),
            haiku: models.haiku.clone(),
        },
        max_attempts: config.load_balancer.max_attempts,
        first_byte: config.timeouts.first_byte,
        limits: Limits { idle: config.timeouts.idle, heartbeat: config.timeouts.heartbeat },
        compat: Compat {
            learns: config.compat.mode == CompatMode::Learn,
            strip: config.compat.strip.iter().filter_map(|place| Path::configured(place)).collect(),
            // What was learned belongs to the endpoints, not to one reading of the file.
            memory: previous.map(|app| Arc::clone(&app.messages.compat.memory)).unwrap_or_default(),
        },
        counting: previous.map(|app| Arc::clone(&app.messages.counting)).unwrap_or_default(),
        explanations: previous.map(|app| Arc::clone(&app.messages.explanations)).unwrap_or_default(),
        waiting,
    }
}

/// True when connections made under one configuration serve under the other.
fn has_same_network(one: &Config, other: &Config) -> bool {
    one.tls == other.tls && one.timeouts == other.timeouts && one.server.workers == other.server.workers
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
