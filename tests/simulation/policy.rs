//! The ways of choosing that are compared. All of them run on the real balancer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claude_lb::balancer::affinity::Session;
use claude_lb::balancer::strategy::Strategy;
use claude_lb::balancer::{Ask, Balancer, Endpoint, EndpointId, Lease, Settings, breaker};

use crate::workload::Turn;

/// Workspaces of equal size.
pub const WORKSPACES: usize = 4;
const MODEL: &str = "databricks-claude-sonnet-5";

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    RoundRobin,
    LeastRequests,
    /// A session and all its sub-agents stay at one workspace for ever, however busy it is.
    PlainStickiness,
    /// Least requests with session affinity.
    Ours,
}

impl Kind {
    /// In the order of the table.
    pub const ALL: [Self; 4] = [Self::RoundRobin, Self::LeastRequests, Self::PlainStickiness, Self::Ours];

    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round robin",
            Self::LeastRequests => "least requests",
            Self::PlainStickiness => "plain stickiness",
            Self::Ours => "claude-lb",
        }
    }
}

/// A policy at work. The payload of an endpoint is its number.
pub enum Policy {
    Balanced(Arc<Balancer<usize>>),
    /// One balancer for each workspace, so that slots, rests and breakers are the real ones; who is asked is not.
    Sticky {
        each: Vec<Arc<Balancer<usize>>>,
        homes: HashMap<usize, usize>,
        rng: fastrand::Rng,
    },
}

impl Policy {
    pub fn new(kind: Kind, seed: u64, now: Instant) -> Self {
        let balancer = |strategy, session_affinity, numbers: std::ops::Range<usize>| {
            let breaker = breaker::Settings { threshold: 5, timeout: Duration::from_secs(60), rate: None };
            let settings = Settings { strategy, session_affinity, breaker };
            let rng = fastrand::Rng::with_seed(seed);
            Balancer::new(settings, numbers.map(endpoint).collect(), rng, now)
        };
        match kind {
            Kind::RoundRobin => Self::Balanced(balancer(Strategy::RoundRobin, false, 0..WORKSPACES)),
            Kind::LeastRequests => Self::Balanced(balancer(Strategy::LeastRequests, false, 0..WORKSPACES)),
            Kind::Ours => Self::Balanced(balancer(Strategy::LeastRequests, true, 0..WORKSPACES)),
            Kind::PlainStickiness => Self::Sticky {
                each: (0..WORKSPACES).map(|n| balancer(Strategy::LeastRequests, false, n..n + 1)).collect(),
                homes: HashMap::new(),
                rng: fastrand::Rng::with_seed(seed),
            },
        }
    }

    /// A lease, or how long the client is asked to wait.
    pub fn pick(
        &mut self,
        turn: &Turn,
        session: usize,
        tried: &[Refused],
        now: Instant,
    ) -> Result<Lease<usize>, Duration> {
        match self {
            Self::Balanced(balancer) => {
                let tried: Vec<EndpointId> = tried.iter().map(|tried| tried.id).collect();
                let session = Session { key: turn.conversation, idle: Duration::from_secs(300) };
                let ask = Ask { model: MODEL, tried: &tried, session: Some(session) };
                balancer.pick(ask, now).map_err(|none| wait(none.soonest))
            }
            Self::Sticky { each, homes, rng } => {
                let home = *homes.entry(session).or_insert_with(|| rng.usize(..WORKSPACES));
                let order = (0..WORKSPACES).map(|step| (home + step) % WORKSPACES);
                let ask = Ask { model: MODEL, tried: &[], session: None };
                let untried = order.filter(|number| tried.iter().all(|tried| tried.number != *number));
                let mut found = untried.filter_map(|number| each[number].pick(ask, now).ok());
                let soonest = || each.iter().filter_map(|one| one.soonest(MODEL, now)).min();
                found.next().ok_or_else(|| wait(soonest()))
            }
        }
    }
}

/// An endpoint that has refused a request.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    pub id: EndpointId,
    pub number: usize,
}

fn wait(soonest: Option<Duration>) -> Duration {
    soonest.unwrap_or_default().clamp(Duration::from_secs(1), Duration::from_secs(60))
}

fn endpoint(number: usize) -> Endpoint<usize> {
    Endpoint {
        name: format!("workspace-{number}"),
        address: format!("https://{number}"),
        weight: 1,
        max_concurrent: None,
        models: vec![],
        payload: Arc::new(number),
    }
}
