//! What is measured: the list of scenarios, and one measurement of one proxy in one of them.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::load::{Load, Plan, key_header};
use crate::meter::{Reading, pss_kib};
use crate::proxy::{self, Kind, Proxy, Running};
use crate::wire::{TOKEN, WORKSPACE_PATH, broken};
use crate::workspaces::{Act, Workspaces};

/// A number with its name; times in microseconds, memory in KiB, all per request, event or stream.
pub type Sample = (&'static str, f64);

pub struct Scenario {
    pub name: &'static str,
    pub what: &'static str,
    shape: Shape,
    /// Also shown for the gateway, which takes seconds to start.
    pub with_gateway: bool,
}

#[derive(Clone, Copy)]
enum Shape {
    Requests { clients: usize, body_bytes: usize, is_tls: bool },
    FirstByte,
    Streams { clients: usize },
    Held { clients: usize, body_bytes: usize },
    Failover,
    Start,
}

const fn requests(clients: usize, body_bytes: usize) -> Shape {
    Shape::Requests { clients, body_bytes, is_tls: false }
}

const fn scenario(name: &'static str, what: &'static str, shape: Shape) -> Scenario {
    Scenario { name, what, shape, with_gateway: false }
}

const fn gateway(mut scenario: Scenario) -> Scenario {
    scenario.with_gateway = true;
    scenario
}

pub const SCENARIOS: &[Scenario] = &[
    gateway(scenario("start", "from exec to the first answer; idle memory", Shape::Start)),
    gateway(scenario("small-1", "2 KB requests, 1 connection", requests(1, 2_000))),
    gateway(scenario("small-32", "2 KB requests, 32 connections", requests(32, 2_000))),
    scenario("body-50k", "50 KB requests, 8 connections", requests(8, 50_000)),
    scenario("body-200k", "200 KB requests, 8 connections", requests(8, 200_000)),
    scenario("body-3m", "3 MB requests, 4 connections", requests(4, 3_000_000)),
    scenario(
        "tls-32",
        "2 KB requests, 32 connections, TLS to the workspaces",
        Shape::Requests { clients: 32, body_bytes: 2_000, is_tls: true },
    ),
    scenario("first-byte", "streams one after another, to their first byte", Shape::FirstByte),
    gateway(scenario("streams-20", "20 streams, 20 events a second each", Shape::Streams { clients: 20 })),
    scenario("streams-100", "100 streams, 20 events a second each", Shape::Streams { clients: 100 }),
    scenario("streams-200", "200 streams, 20 events a second each", Shape::Streams { clients: 200 }),
    scenario("held-1000", "1,000 silent streams", Shape::Held { clients: 1_000, body_bytes: 2_000 }),
    scenario(
        "held-200k",
        "500 silent streams, each with a body of 200 KB",
        Shape::Held { clients: 500, body_bytes: 200_000 },
    ),
    scenario("failover", "2 KB requests, 4 connections, one workspace dead", Shape::Failover),
];

/// 20 events a second, as fast as models write.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);
/// No event after the first while a stream is held.
const SILENCE: Duration = Duration::from_secs(3600);
/// Between the first and the last event of a stream that is only there for its beginning.
const SHORT: Duration = Duration::from_millis(1);
/// For all streams of a scenario to be heard.
const BEGINNING: Duration = Duration::from_secs(10);

/// What all measurements of a run share.
pub struct Bench<'a> {
    pub workspaces: &'a Workspaces,
    pub folder: &'a Path,
    pub time: Duration,
    pub warm_up: Duration,
}

impl Bench<'_> {
    /// One measurement; nothing if it would say nothing of this proxy.
    pub fn measure(&self, scenario: &Scenario, proxy: &Proxy) -> io::Result<Vec<Sample>> {
        let mut samples = match scenario.shape {
            Shape::Requests { clients, body_bytes, is_tls } => {
                if is_tls && proxy.kind == Kind::Direct {
                    return Ok(Vec::new());
                }
                self.requests(proxy, clients, body_bytes, is_tls)?
            }
            Shape::FirstByte => self.first_byte(proxy)?,
            Shape::Streams { clients } => self.streams(proxy, clients)?,
            Shape::Held { .. } | Shape::Start | Shape::Failover if proxy.kind == Kind::Direct => Vec::new(),
            Shape::Held { clients, body_bytes } => self.held(proxy, clients, body_bytes)?,
            Shape::Failover => self.failover(proxy)?,
            Shape::Start => self.start_up(proxy)?,
        };
        match self.workspaces.refused() {
            0 => {}
            refused => samples.push(("refused", refused as f64)),
        }
        Ok(samples)
    }

    fn start(&self, proxy: &Proxy, is_tls: bool) -> io::Result<Option<Running>> {
        let ports = if is_tls { self.workspaces.tls } else { self.workspaces.plain };
        match proxy.kind {
            Kind::Direct => Ok(None),
            _ => proxy.start(proxy::Workspaces { ports, is_tls }, self.folder).map(Some),
        }
    }

    /// The load for a proxy, or for a workspace when there is none.
    fn load(&self, running: Option<&Running>, kind: Kind, plan: Plan<'_>) -> io::Result<Load> {
        let credential = match kind {
            Kind::Direct => format!("Authorization: Bearer {TOKEN}"),
            Kind::Litellm => key_header().replace(": ", ": sk-"),
            _ => key_header(),
        };
        let (port, path) = match running {
            Some(running) => (running.port, "/v1/messages"),
            None => (self.workspaces.plain[0], WORKSPACE_PATH),
        };
        Load::start(&Plan { port, path, credential: &credential, ..plan })
    }

    fn requests(
        &self,
        proxy: &Proxy,
        clients: usize,
        body_bytes: usize,
        is_tls: bool,
    ) -> io::Result<Vec<Sample>> {
        self.workspaces.set(Act::Message);
        let running = self.start(proxy, is_tls)?;
        let plan = Plan { clients, body_bytes, is_stream: false, ..PLAN };
        let mut load = self.load(running.as_ref(), proxy.kind, plan)?;
        load.run(self.warm_up)?;
        load.tally = Default::default();
        let before = running.as_ref().map(|running| Reading::of(&running.family));
        load.run(self.time)?;
        let after = running.as_ref().map(|running| Reading::of(&running.family));
        let answers = load.tally.answers as f64;
        let mut samples = Vec::new();
        if let (Some(before), Some(after)) = (before, after) {
            let spent = before.until(&after);
            samples.push(("cpu_us", spent.cpu_us / answers));
            samples.push(("switches", spent.switches / answers));
        }
        percentiles(&mut samples, ("p50_us", "p99_us"), &mut load.tally.whole);
        samples.push(("per_second", answers / self.time.as_secs_f64()));
        if let Some(running) = &running {
            samples.push(("pss_kib", pss_kib(&running.family)));
        }
        complaints(&mut samples, load.tally.errors);
        Ok(samples)
    }

    fn first_byte(&self, proxy: &Proxy) -> io::Result<Vec<Sample>> {
        self.workspaces.set(Act::Stream { interval: SHORT, events: 2, at_once: false, in_step: false });
        let running = self.start(proxy, false)?;
        let mut load = self.load(running.as_ref(), proxy.kind, PLAN)?;
        load.run(self.warm_up)?;
        load.tally = Default::default();
        load.run(self.time)?;
        let mut samples = Vec::new();
        percentiles(&mut samples, ("first_byte_p50_us", "first_byte_p99_us"), &mut load.tally.first_byte);
        complaints(&mut samples, load.tally.errors);
        Ok(samples)
    }

    fn streams(&self, proxy: &Proxy, clients: usize) -> io::Result<Vec<Sample>> {
        self.workspaces.set(Act::Stream {
            interval: EVENT_INTERVAL,
            events: u64::MAX,
            at_once: false,
            in_step: false,
        });
        let running = self.start(proxy, false)?;
        let mut load = self.load(running.as_ref(), proxy.kind, Plan { clients, ..PLAN })?;
        let heard = load.run_until(BEGINNING, |load| load.heard() == clients)?;
        if !heard {
            return Err(broken("not all streams were heard"));
        }
        load.run(self.warm_up)?;
        load.tally = Default::default();
        let before = running.as_ref().map(|running| Reading::of(&running.family));
        load.run(self.time)?;
        let after = running.as_ref().map(|running| Reading::of(&running.family));
        let events = load.tally.relay.len() as f64;
        let mut samples = Vec::new();
        if let (Some(before), Some(after)) = (before, after) {
            let spent = before.until(&after);
            samples.push(("cpu_us", spent.cpu_us / events));
            samples.push(("switches", spent.switches / events));
        }
        percentiles(&mut samples, ("relay_p50_us", "relay_p99_us"), &mut load.tally.relay);
        complaints(&mut samples, load.tally.errors);
        Ok(samples)
    }

    fn held(&self, proxy: &Proxy, clients: usize, body_bytes: usize) -> io::Result<Vec<Sample>> {
        self.workspaces.set(Act::Stream {
            interval: SILENCE,
            events: u64::MAX,
            at_once: true,
            in_step: false,
        });
        let Some(running) = self.start(proxy, false)? else { return Ok(Vec::new()) };
        std::thread::sleep(self.warm_up);
        let idle = pss_kib(&running.family);
        let mut load = self.load(Some(&running), proxy.kind, Plan { clients, body_bytes, ..PLAN })?;
        load.run_until(BEGINNING, |load| load.heard() == clients)?;
        load.run(self.warm_up)?;
        let held = pss_kib(&running.family);
        let mute = clients - load.heard();
        let mut samples = vec![
            ("kib_per_stream", (held - idle) / clients as f64),
            ("pss_kib", held),
            ("mute", mute as f64),
        ];
        complaints(&mut samples, load.tally.errors);
        Ok(samples)
    }

    /// Without sessions: with them a proxy learns after one request whom to ask, and there is no failover to time.
    fn failover(&self, proxy: &Proxy) -> io::Result<Vec<Sample>> {
        self.workspaces.set(Act::Message);
        let (_kept, dead) = proxy::dead_port()?;
        let ports = [dead, self.workspaces.plain[1]];
        let running = proxy.start(proxy::Workspaces { ports, is_tls: false }, self.folder)?;
        let plan = Plan { clients: 4, is_stream: false, has_session: false, ..PLAN };
        let mut load = self.load(Some(&running), proxy.kind, plan)?;
        load.run(self.time)?;
        let mut samples = Vec::new();
        percentiles(&mut samples, ("p50_us", "p99_us"), &mut load.tally.whole);
        samples.push(("per_second", load.tally.answers as f64 / self.time.as_secs_f64()));
        complaints(&mut samples, load.tally.errors);
        Ok(samples)
    }

    fn start_up(&self, proxy: &Proxy) -> io::Result<Vec<Sample>> {
        let Some(running) = self.start(proxy, false)? else { return Ok(Vec::new()) };
        std::thread::sleep(self.warm_up);
        Ok(vec![
            ("first_answer_us", running.first_answer_ns as f64 / 1e3),
            ("idle_pss_kib", pss_kib(&running.family)),
        ])
    }
}

/// One client, 2 KB, a stream, without end.
pub const PLAN: Plan<'static> = Plan {
    port: 0,
    path: "",
    credential: "",
    clients: 1,
    body_bytes: 2_000,
    is_stream: true,
    has_session: true,
    requests: u64::MAX,
};

fn percentiles(samples: &mut Vec<Sample>, names: (&'static str, &'static str), times: &mut [u64]) {
    times.sort_unstable();
    for (name, share) in [(names.0, 0.50), (names.1, 0.99)] {
        let place = (times.len() as f64 * share) as usize;
        if let Some(time) = times.get(place.min(times.len().saturating_sub(1))) {
            samples.push((name, *time as f64 / 1e3));
        }
    }
}

fn complaints(samples: &mut Vec<Sample>, errors: u64) {
    if errors > 0 {
        samples.push(("errors", errors as f64));
    }
}
