//! The proxy under test: its configuration, its reloads, its log, and what the kernel says about it.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::WORKERS;
use crate::support::client::{KEY, Request, ask};
use crate::support::proxy::{Folder, Proxy, Setup, program};
use crate::support::reply::Reply;
use crate::support::upstream::{DeadAddress, Upstream};
use crate::workspace::Workspace;

/// Threads that may be there when nothing runs: the main thread, accept, the watcher, the small pools, all workers.
pub fn threads_at_rest(workers: usize) -> u64 {
    workers as u64 + 8
}

/// One look at the process.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub resident_bytes: u64,
    pub threads: u64,
    pub descriptors: u64,
    pub cpu: Duration,
}

/// What the log told, line by line.
#[derive(Default)]
pub struct Told {
    /// How often each request-id had an access line.
    pub ids: HashMap<String, u32>,
    /// Per endpoint: attempts, and how many of them were its fault.
    pub attempts: HashMap<String, (u64, u64)>,
    /// How requests ended, by the word of the access line.
    pub ends: HashMap<String, u64>,
    /// Lines that must not be there.
    pub alarms: Vec<String>,
}

impl Told {
    fn read(&mut self, line: &str) {
        if line.contains("panic") {
            self.alarms.push(line.to_owned());
        }
        let field = |name: &str| {
            let start = line.find(&format!(" {name}="))? + name.len() + 2;
            line[start..].split(' ').next()
        };
        let Some(id) = field("id").filter(|_| line.contains("] request ")) else { return };
        *self.ids.entry(id.to_owned()).or_default() += 1;
        if let Some(end) = field("end") {
            *self.ends.entry(end.to_owned()).or_default() += 1;
        }
        for (endpoint, word) in
            field("tried").unwrap_or_default().split(',').filter_map(|part| part.split_once(':'))
        {
            let count = self.attempts.entry(endpoint.to_owned()).or_default();
            count.0 += 1;
            count.1 += u64::from(is_error(word));
        }
    }
}

/// The column `total_errors` of the outcome table. The only 404 here is that of a missing model.
fn is_error(word: &str) -> bool {
    match word.parse::<u16>() {
        Ok(status) => !matches!(status, 400 | 413),
        Err(_) => !matches!(word, "completed" | "client_gone" | "local" | "?"),
    }
}

pub struct Process {
    child: Mutex<Child>,
    id: u32,
    pub address: SocketAddr,
    pub told: Arc<Mutex<Told>>,
    following: Mutex<Option<JoinHandle<()>>>,
    folder: Folder,
    setup: Setup,
    _locked: Upstream,
    _dead: DeadAddress,
}

impl Process {
    /// Three workspaces with moods, one that refuses its token, one that is not there.
    pub fn start(workspaces: &[Workspace]) -> Self {
        let (locked, dead) =
            (Upstream::always(Reply::error(403, "databricks-403-invalid-token.json")), DeadAddress::new());
        let addresses = workspaces.iter().map(|workspace| workspace.address);
        let setup = addresses
            .chain([locked.address(), dead.address()])
            .fold(Proxy::with(&[]), Setup::and_endpoint_at)
            .set("server.workers", WORKERS)
            .set("load_balancer.circuit_breaker_timeout", 0.5)
            .set("timeouts.first_byte", 2)
            .set("timeouts.idle", 2)
            .set("timeouts.heartbeat", 0.4);
        let folder = Folder::new();
        let config = folder.write("config.yaml", &setup.yaml());
        let mut child = program()
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program was built by this test run");
        let mut out = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let address = out
            .find_map(|line| line.ok()?.split("listening on http://").nth(1)?.trim().parse().ok())
            .expect("it says where it listens");
        let told = Arc::new(Mutex::new(Told::default()));
        let (log, writer) = (BufReader::new(child.stderr.take().expect("a pipe")), Arc::clone(&told));
        let following = std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                writer.lock().expect("no holder panics").read(&line);
            }
        });
        let (id, following) = (child.id(), Mutex::new(Some(following)));
        let process = Self {
            child: Mutex::new(child),
            id,
            address,
            told,
            following,
            folder,
            setup,
            _locked: locked,
            _dead: dead,
        };
        // One request of each small pool, so that its threads and descriptors are there.
        process.stats();
        std::thread::sleep(Duration::from_millis(300));
        process
    }

    pub fn stats(&self) -> Value {
        ask(self.address, &Request::get("/stats").with("Connection", "close")).json()
    }

    /// True when nothing runs and the only connection is the one that asks.
    pub fn is_quiet(&self) -> bool {
        let stats = self.stats();
        let endpoints = stats["endpoints"].as_array().expect("a list");
        endpoints.iter().all(|endpoint| endpoint["active_requests"] == 0)
            && stats["process"]["connections"] == 1
    }

    pub fn sample(&self) -> Sample {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", self.id)).unwrap_or_default();
        let status = read("status");
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|text| text.parse::<u64>().ok()).unwrap_or_default()
        };
        let stat = read("stat");
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let ticks = |place: usize| {
            after_name.split(' ').nth(place).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default()
        };
        Sample {
            resident_bytes: number("VmRSS:") * 1024,
            threads: number("Threads:"),
            descriptors: fs::read_dir(format!("/proc/{}/fd", self.id))
                .map_or(0, |entries| entries.count() as u64),
            // USER_HZ is 100 on every Linux that matters.
            cpu: Duration::from_millis((ticks(11) + ticks(12)) * 10),
        }
    }

    /// Every few seconds: other weights, or a file that is not valid; by signal or by request.
    pub fn reload_now_and_then(&self, stop: &AtomicBool, seed: u64) {
        let mut rng = fastrand::Rng::with_seed(seed);
        while !stop.load(Ordering::SeqCst) {
            let is_valid = rng.u8(..4) > 0;
            let setup = self.setup.clone().endpoint(2, "weight", rng.u8(1..4));
            let setup = if is_valid { setup } else { setup.set("load_balancer.strategy", "fastest") };
            self.folder.write("config.yaml", &setup.yaml());
            if rng.bool() {
                self.signal(Signal::HUP);
            } else {
                let status = self.reload();
                assert!(status == if is_valid { 200 } else { 400 }, "reload: {status}");
            }
            for _ in 0..30 {
                if !stop.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn reload(&self) -> u16 {
        ask(self.address, &Request::new("POST", "/admin/reload").with("x-api-key", KEY)).status()
    }

    /// Other timeouts mean another network: the connections of the old one are closed.
    pub fn forget_pooled_connections(&self) {
        self.folder.write("config.yaml", &self.setup.clone().set("timeouts.connect", 9).yaml());
        assert_eq!(self.reload(), 200);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.id).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("the program still runs");
    }

    /// SIGTERM, and an end with 0.
    pub fn end(&self) {
        self.signal(Signal::TERM);
        let status = self.child.lock().expect("no holder panics").wait().expect("our own child");
        assert_eq!(status.code(), Some(0));
        if let Some(following) = self.following.lock().expect("no holder panics").take() {
            following.join().expect("the log was readable");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(child) = self.child.get_mut() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}
