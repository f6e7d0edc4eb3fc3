//! One run: the arguments, the proxies that are there, the rounds, and the results.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::costs::{self, Job};
use crate::proxy::{self, Kind, Proxy};
use crate::report::Report;
use crate::scenario::{Bench, SCENARIOS, Scenario};
use crate::workspaces::Workspaces;

const USAGE: &str = "\
cargo bench --bench proxies -- [options]
  --quick            one round of one second: does it work, not how fast
  --rounds N         rounds (default 5)
  --seconds N        length of one measurement (default 3)
  --only NAME        only scenarios whose name begins so; may be repeated
  --claude-lb FILE   another binary than the one just built
  --litellm FOLDER   a virtual environment with litellm[proxy] in it
  --json FILE        where the figures go (default target/proxies.json)
  --list             name the scenarios
  --costs            instead: count instructions, allocations and system calls, compare with benches/costs.json
  --renew-costs      instead: count them and write that file
  --profile SHAPE    instead: show by function what small, body-200k, stream or event costs";

struct Options {
    rounds: usize,
    time: Duration,
    only: Vec<String>,
    claude_lb: PathBuf,
    litellm: Option<PathBuf>,
    json: PathBuf,
    command: Option<&'static str>,
    costs: Option<Job>,
}

/// False when a figure is not what it should be; the report says which.
pub fn run() -> Result<bool, Box<dyn Error>> {
    let options = options()?;
    match options.command {
        Some("list") => {
            for scenario in SCENARIOS {
                println!("{:<12} {}", scenario.name, scenario.what);
            }
            return Ok(true);
        }
        Some(_) => {
            println!("{USAGE}");
            return Ok(true);
        }
        None => {}
    }
    if let Some(job) = &options.costs {
        let folder = Folder::new()?;
        end_on_signals(folder.0.clone())?;
        return costs::run(job, &options.claude_lb, &folder.0);
    }
    let chosen = chosen(&options.only)?;
    let proxies = proxies(&options);
    raise_descriptors();
    let folder = Folder::new()?;
    end_on_signals(folder.0.clone())?;
    let workspaces = Workspaces::start()?;
    let bench = Bench {
        workspaces: &workspaces,
        folder: &folder.0,
        time: options.time,
        warm_up: options.time.mul_f32(0.2),
    };
    let mut report = Report::default();
    let load_before = load_average();
    for scenario in &chosen {
        eprint!("{:<12}", scenario.name);
        for round in 0..options.rounds {
            // Whoever comes first in one round comes later in the next.
            for place in 0..proxies.len() {
                let proxy = &proxies[(place + round) % proxies.len()];
                if proxy.kind == Kind::Litellm && !scenario.with_gateway {
                    continue;
                }
                eprint!(" {}", proxy.kind.name());
                match bench.measure(scenario, proxy) {
                    Ok(samples) => report.add(scenario.name, proxy.kind, &samples),
                    Err(why) => eprint!(" (failed: {why})"),
                }
            }
        }
        eprintln!();
    }
    let kinds: Vec<Kind> = proxies.iter().map(|proxy| proxy.kind).collect();
    report.added_first_byte(&kinds);
    let facts = facts(&options, &proxies, &load_before);
    println!("{}", describe(&facts));
    println!("{}", report.table(&kinds));
    report.save(&options.json, &facts)?;
    println!("figures of every round: {}", options.json.display());
    Ok(true)
}

fn options() -> Result<Options, lexopt::Error> {
    use lexopt::prelude::*;
    let target = Path::new(env!("CARGO_BIN_EXE_claude-lb")).ancestors().nth(2).unwrap_or(Path::new("."));
    let mut options = Options {
        rounds: 5,
        time: Duration::from_secs(3),
        only: Vec::new(),
        claude_lb: env!("CARGO_BIN_EXE_claude-lb").into(),
        litellm: None,
        json: target.join("proxies.json"),
        command: None,
        costs: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("quick") => (options.rounds, options.time) = (1, Duration::from_secs(1)),
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("seconds") => options.time = Duration::from_secs(parser.value()?.parse()?),
            Long("only") => options.only.push(parser.value()?.string()?),
            Long("claude-lb") => options.claude_lb = parser.value()?.into(),
            Long("litellm") => options.litellm = Some(parser.value()?.into()),
            Long("json") => options.json = parser.value()?.into(),
            Long("list") => options.command = Some("list"),
            Long("costs") => options.costs = Some(Job::Compare),
            Long("renew-costs") => options.costs = Some(Job::Renew),
            Long("profile") => options.costs = Some(Job::Profile(parser.value()?.string()?)),
            Long("help") => options.command = Some("help"),
            // Cargo itself adds it.
            Long("bench") => {}
            other => return Err(other.unexpected()),
        }
    }
    Ok(options)
}

fn chosen(only: &[String]) -> Result<Vec<&'static Scenario>, String> {
    let fits =
        |scenario: &&Scenario| only.is_empty() || only.iter().any(|name| scenario.name.starts_with(name));
    let chosen: Vec<_> = SCENARIOS.iter().filter(fits).collect();
    match chosen.is_empty() {
        true => Err("no scenario has such a name; --list shows them".into()),
        false => Ok(chosen),
    }
}

/// The proxies that are there; a missing one is named.
fn proxies(options: &Options) -> Vec<Proxy> {
    let mut wanted = vec![
        (Kind::Direct, options.claude_lb.clone()),
        (Kind::ClaudeLb, options.claude_lb.clone()),
        (Kind::Haproxy, installed("haproxy")),
        (Kind::Nginx, installed("nginx")),
    ];
    match &options.litellm {
        Some(folder) => wanted.push((Kind::Litellm, folder.join("bin/litellm"))),
        None => eprintln!("LiteLLM is skipped: name its virtual environment with --litellm"),
    }
    let mut found = Vec::new();
    for (kind, program) in wanted {
        match Proxy::find(kind, &program) {
            Ok(proxy) => found.push(proxy),
            Err(why) => eprintln!("{} is skipped: {why}", kind.name()),
        }
    }
    found
}

/// Debian installs servers where an ordinary user's search path does not lead.
fn installed(name: &str) -> PathBuf {
    let usual = Path::new("/usr/sbin").join(name);
    if usual.exists() { usual } else { name.into() }
}

/// 1,000 streams have 2,000 connections here, and as many in a proxy, which inherits the limit.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// A run that is interrupted leaves no process and no folder behind.
fn end_on_signals(folder: PathBuf) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            proxy::kill_under_test();
            let _ = fs::remove_dir_all(&folder);
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// A folder of our own that goes when the run ends.
struct Folder(PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        let folder = std::env::temp_dir().join(format!("claude-lb-proxies-{}", std::process::id()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn facts(options: &Options, proxies: &[Proxy], load_before: &str) -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let processor = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let versions: serde_json::Map<String, Value> = proxies
        .iter()
        .filter(|proxy| proxy.kind != Kind::Direct)
        .map(|proxy| (proxy.kind.name().into(), proxy.version.clone().into()))
        .collect();
    let ours = proxies.iter().find(|proxy| proxy.kind == Kind::ClaudeLb);
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M"]).output().map(|output| output.stdout);
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "date": date.map_or_else(|_| seconds.to_string(), |text| String::from_utf8_lossy(&text).trim().into()),
        "processor": processor.map_or("unknown", |(_, name)| name.trim()),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_before": load_before,
        "versions": versions,
        "claude_lb_bytes": ours.map_or(0, Proxy::bytes),
        "rounds": options.rounds,
        "seconds": options.time.as_secs(),
    })
}

/// Of the last minute: above 1 before the run means that others are at work, too.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn describe(facts: &Value) -> String {
    let mut text = String::new();
    for (name, value) in facts.as_object().into_iter().flatten() {
        text.push_str(&format!("{name}: {}\n", value.to_string().replace('"', "")));
    }
    text
}
