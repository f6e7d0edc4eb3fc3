//! What one request and one event cost, in counts that do not depend on how busy the machine is: instructions,
//! allocations (under callgrind) and system calls (under strace) of the very binary that is released.
//!
//! Each shape is run twice, the second time with twice as many units; the difference is the units' alone, without the
//! start, the first connection and the end. `benches/costs.json` holds what they cost when somebody last looked; a
//! figure that has risen by more than a tenth since is an error until that file is changed on purpose.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::callgrind::{self, Counts};
use crate::load::{Load, Plan, key_header};
use crate::proxy::{self, Proxy};
use crate::scenario::PLAN;
use crate::strace;
use crate::wire::broken;
use crate::workspaces::{Act, Workspaces};

pub const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/costs.json");
const RENEW: &str = "cargo bench --bench proxies -- --renew-costs";
/// How much a figure may rise, or fall, before it is said.
const TOLERANCE: f64 = 0.10;
/// Less than this is not worth an alarm, whatever its share: half an allocation or system call.
const SLACK: f64 = 0.5;
/// Shown, but free to rise: how many reads a large body takes depends on how it arrives.
const NOT_GUARDED: [(&str, &str); 1] = [("body-200k", "syscalls")];
/// Only so that a run ends when something is broken; under callgrind everything takes fifty times as long.
const PATIENCE: Duration = Duration::from_secs(300);
/// Functions shown in a profile.
const SHOWN: usize = 45;

struct Shape {
    name: &'static str,
    what: &'static str,
    /// In the first of the two runs.
    units: u64,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Units are requests with bodies of so many bytes.
    Requests(usize),
    /// Units are streams with one piece of content.
    Streams,
    /// Units are events of one stream.
    Events,
}

const SHAPES: &[Shape] = &[
    Shape { name: "small", what: "2 KB request, 1 KB answer", units: 300, kind: Kind::Requests(2_000) },
    Shape {
        name: "body-200k",
        what: "200 KB request, 1 KB answer",
        units: 40,
        kind: Kind::Requests(200_000),
    },
    Shape { name: "stream", what: "2 KB request, stream of one event", units: 200, kind: Kind::Streams },
    Shape { name: "event", what: "one more event of a stream", units: 600, kind: Kind::Events },
];

/// What is to be done with the figures.
#[derive(Clone, PartialEq)]
pub enum Job {
    Compare,
    Renew,
    /// Show the functions of one shape.
    Profile(String),
}

/// Whether all is well.
pub fn run(job: &Job, program: &Path, folder: &Path) -> Result<bool, Box<dyn Error>> {
    let valgrind = callgrind::version()?;
    strace::find()?;
    let workspaces = Workspaces::start()?;
    let meter = Meter { workspaces: &workspaces, folder, program };
    if let Job::Profile(name) = job {
        let shape = SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
            let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
            format!("no shape {name}; there are {}", names.join(", "))
        })?;
        show_profile(&meter.counts(shape)?);
        return Ok(true);
    }
    let mut figures = serde_json::Map::new();
    for shape in SHAPES {
        let counts = meter.counts(shape)?;
        let syscalls = meter.syscalls(shape)?;
        figures.insert(
            shape.name.into(),
            json!({
                "what": shape.what,
                "instructions": counts.instructions.round() as u64,
                "allocations": hundredths(counts.allocations),
                "syscalls": hundredths(syscalls),
            }),
        );
    }
    if *job == Job::Renew {
        let baseline = json!({ "renew": RENEW, "valgrind": valgrind, "figures": figures });
        fs::write(BASELINE, format!("{baseline:#}\n"))?;
        println!("{baseline:#}\nwritten to benches/costs.json");
        return Ok(true);
    }
    let baseline: Value = serde_json::from_str(&fs::read_to_string(BASELINE)?)?;
    Ok(compare(&baseline["figures"], &figures))
}

struct Meter<'a> {
    workspaces: &'a Workspaces,
    folder: &'a Path,
    program: &'a Path,
}

impl Meter<'_> {
    /// What one unit costs the program itself.
    fn counts(&self, shape: &Shape) -> Result<Counts, Box<dyn Error>> {
        let file = self.folder.join("callgrind.out");
        let count = |units| {
            self.run(shape, units, callgrind::wrapper(&file))?;
            Counts::read(&file)
        };
        Ok(count(shape.units)?.until(&count(2 * shape.units)?, shape.units as f64))
    }

    /// The system calls of one unit.
    fn syscalls(&self, shape: &Shape) -> Result<f64, Box<dyn Error>> {
        let file = self.folder.join("strace.out");
        let count = |units| {
            let _ = fs::remove_file(&file);
            self.run(shape, units, strace::wrapper(&file))?;
            strace::calls(&file)
        };
        let (once, twice) = (count(shape.units)?, count(2 * shape.units)?);
        Ok((twice - once) / shape.units as f64)
    }

    /// So many units, from the start of the program to its end. One connection, one request at a time.
    fn run(&self, shape: &Shape, units: u64, wrapper: Vec<String>) -> io::Result<()> {
        let in_step = |events| Act::Stream { interval: Duration::ZERO, events, at_once: true, in_step: true };
        let (act, body_bytes, requests) = match shape.kind {
            Kind::Requests(body_bytes) => (Act::Message, body_bytes, units),
            Kind::Streams => (in_step(1), PLAN.body_bytes, units),
            Kind::Events => (in_step(units), PLAN.body_bytes, 1),
        };
        self.workspaces.set(act);
        let proxy =
            Proxy::find(proxy::Kind::ClaudeLb, self.program).map_err(io::Error::other)?.under(wrapper);
        let ports = proxy::Workspaces { ports: self.workspaces.plain, is_tls: false };
        let running = proxy.start(ports, self.folder)?;
        let credential = key_header();
        let plan = Plan {
            port: running.port,
            path: "/v1/messages",
            credential: &credential,
            body_bytes,
            is_stream: !matches!(shape.kind, Kind::Requests(_)),
            requests,
            ..PLAN
        };
        let mut load = Load::start(&plan)?;
        let is_enough = load.run_until(PATIENCE, |load| {
            let heard = load.tally.first_byte.len() + load.tally.relay.len();
            self.workspaces.heard(heard as u64);
            load.tally.answers + load.tally.errors >= requests
        })?;
        drop(load);
        running.end(PATIENCE)?;
        match is_enough && self.workspaces.refused() == 0 {
            true => Ok(()),
            false => Err(broken("not all requests were answered")),
        }
    }
}

/// Shows every figure beside the baseline's. False when one has risen too far, or is not in the baseline.
fn compare(baseline: &Value, figures: &serde_json::Map<String, Value>) -> bool {
    let (mut risen, mut fallen) = (0, 0);
    println!(
        "| {:<10} | {:<12} | {:>10} | {:>10} | {:>7} |",
        "shape", "per unit", "baseline", "now", "change"
    );
    println!("|---|---|--:|--:|--:|");
    for (shape, now) in figures {
        for figure in ["instructions", "allocations", "syscalls"] {
            let now = now[figure].as_f64().unwrap_or(f64::INFINITY);
            let then = baseline[shape][figure].as_f64().unwrap_or_default();
            let change = match then > 0.0 {
                true => format!("{:+.1}%", (now - then) / then * 100.0),
                false => String::new(),
            };
            let is_other = (now - then).abs() > (then * TOLERANCE).max(SLACK);
            let mark = match is_other {
                _ if NOT_GUARDED.contains(&(shape.as_str(), figure)) => " not guarded",
                true if now > then => {
                    risen += 1;
                    " RISEN"
                }
                true => {
                    fallen += 1;
                    " fallen"
                }
                false => "",
            };
            println!("| {shape:<10} | {figure:<12} | {then:>10} | {now:>10} | {change:>7} |{mark}");
        }
    }
    if fallen > 0 {
        println!(
            "{fallen} figures have fallen by more than a tenth: renew the baseline, so that it stays so: {RENEW}"
        );
    }
    if risen > 0 {
        println!(
            "{risen} figures have risen by more than a tenth over benches/costs.json. `--profile SHAPE` shows where. \
             If it must be so: {RENEW}, and say why in the commit."
        );
    }
    risen == 0
}

fn show_profile(counts: &Counts) {
    let Counts { instructions, allocations, by_function, by_caller } = counts;
    println!("{instructions:.0} instructions and {allocations:.2} allocations per unit\n");
    if by_function.keys().filter(|name| name.starts_with("0x")).count() > by_function.len() / 3 {
        println!("The binary has no symbols: build it with CARGO_PROFILE_BENCH_STRIP=none\n");
    }
    let sorted = |map: &BTreeMap<String, f64>| {
        let mut rows: Vec<_> = map.iter().map(|(name, value)| (name.clone(), *value)).collect();
        rows.sort_unstable_by(|(_, a), (_, b)| b.total_cmp(a));
        rows.truncate(SHOWN);
        rows
    };
    println!("instructions  share  function");
    for (name, own) in sorted(by_function) {
        println!("{own:>12.0} {:>5.1}%  {name}", own / instructions * 100.0);
    }
    println!("\n allocations  wanted by < called by");
    for (name, times) in sorted(by_caller).iter().filter(|(_, times)| *times > 0.005) {
        println!("{times:>12.2}  {name}");
    }
}

/// Two places, and no minus before a zero.
fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0 + 0.0
}
