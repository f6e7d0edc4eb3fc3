//! The ways of choosing that are compared. All of them run on the real balancer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claude_lb::balancer::affinity::Session;
use claude_lb::balancer::limits::{Limits, Need, Quota};
use claude_lb::balancer::strategy::Strategy;
use claude_lb::balancer::{
    Ask, Balancer, Endpoint, EndpointId, Lease, Place, Settings, Unavailable, Why, breaker,
};

use crate::workload::Turn;

/// Workspaces of equal size.
pub const WORKSPACES: usize = 4;
/// Half of the workers, as the configuration has them by default.
const WAITING_MAX: usize = 64;
/// What Claude Code asks for with many models.
pub const MAX_TOKENS: u64 = 32_000;
const MODEL: &str = "databricks-claude-sonnet-5";

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    RoundRobin,
    LeastRequests,
    /// A session and all its sub-agents stay at one workspace for ever, however busy it is.
    PlainStickiness,
    /// Least requests with session affinity, as it is shipped: 429s teach ceilings.
    Ours,
    /// The same, but 429s teach nothing.
    OursUnlearned,
    /// The same with the workspaces' real limits configured.
    OursLimited,
}

impl Kind {
    /// In the order of the first table.
    pub const ALL: [Self; 4] = [Self::RoundRobin, Self::LeastRequests, Self::PlainStickiness, Self::Ours];
    /// In the order of the tables with a tight quota.
    pub const TIGHT: [Self; 4] = [Self::LeastRequests, Self::OursUnlearned, Self::Ours, Self::OursLimited];

    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round robin",
            Self::LeastRequests => "least requests",
            Self::PlainStickiness => "plain stickiness",
            Self::Ours => "claude-lb",
            Self::OursUnlearned => "claude-lb, learning nothing",
            Self::OursLimited => "claude-lb, limits configured",
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
    pub fn new(kind: Kind, seed: u64, quota: Quota, now: Instant) -> Self {
        let limits = match kind {
            Kind::OursLimited => Limits { each: quota, models: vec![] },
            _ => Limits::default(),
        };
        let balancer = |strategy, session_affinity, numbers: std::ops::Range<usize>| {
            let breaker = breaker::Settings { threshold: 5, timeout: Duration::from_secs(60), rate: None };
            let learns_limits = matches!(kind, Kind::Ours | Kind::OursLimited);
            let settings =
                Settings { strategy, session_affinity, breaker, waiting_max: WAITING_MAX, learns_limits };
            let rng = fastrand::Rng::with_seed(seed);
            Balancer::new(settings, numbers.map(|number| endpoint(number, &limits)).collect(), rng, now)
        };
        match kind {
            Kind::RoundRobin => Self::Balanced(balancer(Strategy::RoundRobin, false, 0..WORKSPACES)),
            Kind::LeastRequests => Self::Balanced(balancer(Strategy::LeastRequests, false, 0..WORKSPACES)),
            Kind::Ours | Kind::OursUnlearned | Kind::OursLimited => {
                Self::Balanced(balancer(Strategy::LeastRequests, true, 0..WORKSPACES))
            }
            Kind::PlainStickiness => Self::Sticky {
                each: (0..WORKSPACES).map(|n| balancer(Strategy::LeastRequests, false, n..n + 1)).collect(),
                homes: HashMap::new(),
                rng: fastrand::Rng::with_seed(seed),
            },
        }
    }

    /// A lease, or why there is none.
    pub fn pick(
        &mut self,
        turn: &Turn,
        session: usize,
        tried: &[Refused],
        place: Option<&Place<usize>>,
        insists: bool,
        now: Instant,
    ) -> Result<Lease<usize>, Unavailable> {
        let need = Need { bytes: turn.bytes, max_tokens: Some(MAX_TOKENS), density: None };
        let place = place.map(Place::number);
        let ask = Ask { model: MODEL, tried: &[], session: None, need, place, insists };
        match self {
            Self::Balanced(balancer) => {
                let tried: Vec<EndpointId> = tried.iter().map(|tried| tried.id).collect();
                let session = Session { key: turn.conversation, idle: Duration::from_secs(300) };
                balancer.pick(Ask { tried: &tried, session: Some(session), ..ask }, now)
            }
            Self::Sticky { each, homes, rng } => {
                let home = *homes.entry(session).or_insert_with(|| rng.usize(..WORKSPACES));
                let order = (0..WORKSPACES).map(|step| (home + step) % WORKSPACES);
                let untried = order.filter(|number| tried.iter().all(|tried| tried.number != *number));
                let mut found = untried.filter_map(|number| each[number].pick(ask, now).ok());
                let soonest = || each.iter().filter_map(|one| one.soonest(ask, now)).min();
                found.next().ok_or_else(|| Unavailable { soonest: soonest(), why: Why::AllOut })
            }
        }
    }

    /// A place in the line of those who wait for room.
    pub fn wait_in_line(&self) -> Option<Place<usize>> {
        match self {
            Self::Balanced(balancer) => balancer.wait_in_line(MODEL),
            Self::Sticky { .. } => None,
        }
    }
}

/// An endpoint that has refused a request.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    pub id: EndpointId,
    pub number: usize,
}

fn endpoint(number: usize, limits: &Limits) -> Endpoint<usize> {
    Endpoint {
        name: format!("workspace-{number}"),
        address: format!("https://{number}"),
        weight: 1,
        max_concurrent: None,
        models: vec![],
        limits: limits.clone(),
        payload: Arc::new(number),
    }
}
