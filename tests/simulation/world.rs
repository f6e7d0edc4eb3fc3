//! Forty minutes of virtual time: agents ask, a policy chooses, workspaces answer. No socket, no pause, no clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use claude_lb::anthropic::sse::Usage;
use claude_lb::balancer::limits::Quota;
use claude_lb::balancer::{Lease, Place};
use claude_lb::outcome::{Meaning, Outcome};

use crate::policy::{Kind, Policy, Refused, WORKSPACES};
use crate::workload::{Agent, Next, SESSIONS, Turn};
use crate::workspace::{Service, Workspace};

/// How long a run lasts.
const LENGTH: Duration = Duration::from_secs(40 * 60);
/// How often the load is looked at apart from that.
const SAMPLE: Duration = Duration::from_secs(1);
/// With fewer requests in flight, balance means nothing.
const IN_FLIGHT_MIN: usize = 4;
/// As the configuration has it by default.
const MAX_ATTEMPTS: usize = 3;
/// Likewise.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a waiting request looks again; in operation more often.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What one run came to, or several.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub requests: u64,
    pub input: u64,
    pub cached: u64,
    /// 429s that the workspaces answered.
    pub limited: u64,
    /// Requests that the clients got back unanswered, and sent again.
    pub turned_away: u64,
    /// Requests that waited for room, in seconds.
    pub waited: Vec<f64>,
    /// The busiest workspace's load over the mean one, as each request finds it.
    pub imbalance: Vec<f64>,
    /// The same once a second, whether or not anything begins.
    pub imbalance_by_clock: Vec<f64>,
}

impl Tally {
    /// Of all input tokens, those read from a cache.
    pub fn cached_share(&self) -> f64 {
        self.cached as f64 / self.input as f64
    }

    /// What the input cost, over its price without any caching: a token read costs 0.1, every other is written at 1.25.
    pub fn relative_cost(&self) -> f64 {
        0.1 * self.cached_share() + 1.25 * (1.0 - self.cached_share())
    }

    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.input += other.input;
        self.cached += other.cached;
        self.limited += other.limited;
        self.turned_away += other.turned_away;
        self.waited.extend(other.waited);
        self.imbalance.extend(other.imbalance);
        self.imbalance_by_clock.extend(other.imbalance_by_clock);
    }
}

/// The value that 95 % do not exceed.
pub fn p95(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() * 95 / 100).copied().unwrap_or_default()
}

/// What happens at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ask {
        agent: usize,
    },
    /// It waits for room.
    LookAgain {
        agent: usize,
    },
    FirstToken {
        agent: usize,
    },
    Answered {
        agent: usize,
    },
    Sample,
}

/// A request that a workspace has let in.
struct Running {
    lease: Lease<usize>,
    turn: Turn,
    cached: u64,
}

/// A request that is on its way through the proxy.
struct Asking {
    turn: Turn,
    tried: Vec<Refused>,
    /// In the line of those who wait for room, and since when.
    waiting: Option<(Place<usize>, Instant)>,
    /// When it began to wait, this time or an earlier one.
    since: Option<Instant>,
}

struct World {
    policy: Policy,
    quota: Quota,
    workspaces: Vec<Workspace>,
    agents: Vec<Agent>,
    /// By agent: each waits for its answer before it goes on.
    running: Vec<Option<Running>>,
    /// By agent.
    asking: Vec<Option<Asking>>,
    /// Requests at each workspace.
    loads: [usize; WORKSPACES],
    /// Sub-agents at work, by session.
    subs: Vec<usize>,
    /// The number keeps events of one moment in the order in which they were planned.
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    planned: u64,
    tally: Tally,
}

/// One run.
pub fn run(kind: Kind, seed: u64, quota: Quota) -> Tally {
    let start = claude_lb::env::now();
    let mut world = World {
        policy: Policy::new(kind, seed, quota, start),
        quota,
        workspaces: (0..WORKSPACES).map(|_| Workspace::default()).collect(),
        agents: Vec::new(),
        running: Vec::new(),
        asking: Vec::new(),
        loads: [0; WORKSPACES],
        subs: vec![0; SESSIONS],
        events: BinaryHeap::new(),
        planned: 0,
        tally: Tally::default(),
    };
    for session in 0..SESSIONS {
        let (begin, agent) = Agent::main(session, seed);
        world.enter(agent, start + begin);
    }
    world.plan(start + SAMPLE, Event::Sample);
    while let Some(Reverse((now, _, event))) = world.events.pop() {
        if now >= start + LENGTH {
            break;
        }
        world.happen(event, now);
    }
    world.tally
}

impl World {
    fn plan(&mut self, at: Instant, event: Event) {
        self.planned += 1;
        self.events.push(Reverse((at, self.planned, event)));
    }

    fn enter(&mut self, agent: Agent, at: Instant) {
        self.agents.push(agent);
        self.running.push(None);
        self.asking.push(None);
        self.plan(at, Event::Ask { agent: self.agents.len() - 1 });
    }

    fn happen(&mut self, event: Event, now: Instant) {
        match event {
            Event::Ask { agent } => {
                let turn = self.agents[agent].ask();
                self.asking[agent] = Some(Asking { turn, tried: Vec::new(), waiting: None, since: None });
                self.ask(agent, now);
            }
            Event::LookAgain { agent } => self.ask(agent, now),
            Event::FirstToken { agent } => {
                let running = self.running[agent].as_ref().expect("it is being answered");
                self.workspaces[**running.lease.payload()].write(&running.turn, now);
            }
            Event::Answered { agent } => {
                let Running { mut lease, turn, cached } =
                    self.running[agent].take().expect("it is being answered");
                self.loads[**lease.payload()] -= 1;
                self.workspaces[**lease.payload()].end(&turn);
                let usage = Usage {
                    input_tokens: Some(turn.input - cached),
                    output_tokens: Some(turn.output),
                    cache_read_input_tokens: Some(cached),
                    ..Usage::default()
                };
                lease.reported(usage);
                lease.finish(&Outcome::Completed, now);
                self.follow(agent, now);
            }
            Event::Sample => {
                self.tally.imbalance_by_clock.extend(imbalance(&self.loads));
                self.plan(now + SAMPLE, Event::Sample);
            }
        }
    }

    /// Attempt after attempt, as `messages` does it.
    fn ask(&mut self, agent: usize, now: Instant) {
        let mut asking = self.asking[agent].take().expect("it asks");
        let turn = asking.turn;
        let mut wait = Duration::from_secs(1);
        while asking.tried.len() < MAX_ATTEMPTS {
            let place = asking.waiting.as_ref().map(|(place, _)| place);
            let session = self.session(agent);
            let mut lease = match self.policy.pick(&turn, session, &asking.tried, place, false, now) {
                Ok(lease) => lease,
                Err(nobody) => {
                    let since = *asking.since.get_or_insert(now);
                    if nobody.is_worth_waiting(since, QUEUE_TIMEOUT, now) {
                        if asking.waiting.is_none() {
                            asking.waiting = self.policy.wait_in_line().map(|place| (place, now));
                        }
                        if asking.waiting.is_some() {
                            self.asking[agent] = Some(asking);
                            return self.plan(now + LOOK_AGAIN, Event::LookAgain { agent });
                        }
                    }
                    let insists = nobody.may_insist();
                    match self.policy.pick(&turn, session, &asking.tried, None, insists, now) {
                        Ok(lease) => lease,
                        Err(nobody) => {
                            wait = nobody.retry_after();
                            break;
                        }
                    }
                }
            };
            if let Some((_, since)) = asking.waiting.take() {
                self.tally.waited.push((now - since).as_secs_f64());
            }
            let number = **lease.payload();
            let limited = match self.workspaces[number].admit(&turn, self.quota, now) {
                Ok(service) => return self.serve(agent, lease, turn, service, now),
                Err(limited) => limited,
            };
            self.tally.limited += 1;
            asking.tried.push(Refused { id: lease.id(), number });
            lease.limited_by(Some(limited.by));
            let limited = Outcome::Refused { status: 429, retry_after: None, meaning: Meaning::Other };
            lease.finish(&limited, now);
        }
        if let Some((_, since)) = asking.waiting.take() {
            self.tally.waited.push((now - since).as_secs_f64());
        }
        self.tally.turned_away += 1;
        self.plan(now + wait, Event::Ask { agent });
    }

    fn serve(&mut self, agent: usize, lease: Lease<usize>, turn: Turn, service: Service, now: Instant) {
        self.tally.requests += 1;
        self.tally.input += turn.input;
        self.tally.cached += service.cached;
        self.loads[**lease.payload()] += 1;
        self.tally.imbalance.extend(imbalance(&self.loads));
        self.running[agent] = Some(Running { lease, turn, cached: service.cached });
        self.plan(now + service.first_token, Event::FirstToken { agent });
        self.plan(now + service.whole, Event::Answered { agent });
    }

    fn session(&self, agent: usize) -> usize {
        self.agents[agent].session
    }

    /// What an agent does after an answer.
    fn follow(&mut self, agent: usize, now: Instant) {
        let session = self.agents[agent].session;
        match self.agents[agent].next() {
            Next::Turn(pause) => self.plan(now + pause, Event::Ask { agent }),
            Next::Burst(subs) => {
                self.subs[session] = subs.len();
                for (delay, sub) in subs {
                    self.enter(sub, now + delay);
                }
            }
            Next::Done => {
                self.subs[session] -= 1;
                if self.subs[session] == 0 {
                    // The main loops came first, so a session's number is its main loop's.
                    self.plan(now, Event::Ask { agent: session });
                }
            }
        }
    }
}

/// The busiest workspace's load over the mean one, while there is enough to speak of balance.
fn imbalance(loads: &[usize]) -> Option<f64> {
    let total: usize = loads.iter().sum();
    let busiest = loads.iter().max()?;
    (total >= IN_FLIGHT_MIN).then(|| (busiest * loads.len()) as f64 / total as f64)
}
