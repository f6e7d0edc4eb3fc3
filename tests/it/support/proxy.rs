//! The built program on a free port, its configuration, its log, its numbers.
//!
//! A [`Setup`] writes a configuration into a folder of its own and starts the program. The [`Proxy`] is killed
//! when dropped; a test that fails shows what the program wrote, and a panic inside the program fails the test.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::client::{Answer, Client, KEY, Request, ask};
use super::upstream::Upstream;
use super::{DEADLINE, eventually};

/// The token of the endpoint at this place in the configuration.
pub fn token(place: usize) -> String {
    format!("dapi-token-of-w{}", place + 1)
}

/// A folder that goes away with its holder.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).expect("the build folder can be written");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("the build folder can be written");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The built program, with none of the surrounding environment that could change what it does.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_claude-lb"));
    for name in ["CONFIG_PATH", "LOG_LEVEL", "LOG_FORMAT", "SSL_CERT_FILE", "RUST_LOG"] {
        command.env_remove(name);
    }
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.env("RUST_BACKTRACE", "1");
    command
}

/// A configuration in the making: `key: value` lines under their sections.
#[derive(Clone)]
pub struct Setup {
    sections: BTreeMap<String, BTreeMap<String, String>>,
    endpoints: Vec<BTreeMap<String, String>>,
    environment: Vec<(String, String)>,
    /// What a shell does before it becomes the program.
    shell: Option<String>,
    upstreams: Vec<Upstream>,
}

impl Setup {
    /// Sets `section.key`, for example `timeouts.heartbeat`.
    pub fn set(mut self, path: &str, value: impl Display) -> Self {
        let (section, key) = path.split_once('.').expect("a path of section and key");
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_string());
        self
    }

    /// Takes a key away again.
    pub fn unset(mut self, path: &str) -> Self {
        let (section, key) = path.split_once('.').expect("a path of section and key");
        self.sections.entry(section.to_owned()).or_default().remove(key);
        self
    }

    /// Sets a key of the endpoint at this place.
    pub fn endpoint(mut self, place: usize, key: &str, value: impl Display) -> Self {
        self.endpoints[place].insert(key.to_owned(), value.to_string());
        self
    }

    /// Takes a key of an endpoint away again.
    pub fn endpoint_unset(mut self, place: usize, key: &str) -> Self {
        self.endpoints[place].remove(key);
        self
    }

    /// One more endpoint, at an address of the test's choice.
    pub fn and_endpoint_at(mut self, address: SocketAddr) -> Self {
        let place = self.endpoints.len();
        let base = format!("http://{address}/serving-endpoints");
        let keys = [("name", format!("w{}", place + 1)), ("api_base", base), ("token", token(place))];
        self.endpoints.push(keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
        self
    }

    /// An idle first endpoint is asked before an idle second one: least_requests divides by weight.
    pub fn in_order(mut self) -> Self {
        for (place, weight) in (0..self.endpoints.len()).zip([1_000, 100, 10, 1]) {
            self = self.endpoint(place, "weight", weight);
        }
        self.set("load_balancer.strategy", "least_requests")
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the program with no more than this many descriptors, and no way to raise the limit.
    pub fn descriptors(self, limit: u32) -> Self {
        self.through_shell(&format!("ulimit -n {limit}; exec \"$0\" \"$@\""))
    }

    /// Starts the program through this line of shell, in which `"$0" "$@"` is the program.
    pub fn through_shell(mut self, line: &str) -> Self {
        self.shell = Some(line.to_owned());
        self
    }

    pub fn yaml(&self) -> String {
        let mut yaml = String::new();
        for (section, keys) in &self.sections {
            yaml.push_str(&format!("{section}:\n"));
            for (key, value) in keys {
                yaml.push_str(&format!("  {key}: {value}\n"));
            }
        }
        yaml.push_str("endpoints:\n");
        for endpoint in &self.endpoints {
            yaml.push_str(&format!("  - name: {}\n", endpoint["name"]));
            for (key, value) in endpoint.iter().filter(|(key, _)| *key != "name") {
                yaml.push_str(&format!("    {key}: {value}\n"));
            }
        }
        yaml
    }

    /// Starts the program and waits until it says where it listens.
    pub fn start(&self) -> Proxy {
        let folder = Folder::new();
        let config = folder.write("config.yaml", &self.yaml());
        let mut command = self.shell.as_ref().map_or_else(program, |line| {
            let plain = program();
            let mut shell = Command::new("sh");
            for (name, value) in plain.get_envs() {
                match value {
                    Some(value) => shell.env(name, value),
                    None => shell.env_remove(name),
                };
            }
            shell.arg("-c").arg(line).arg(plain.get_program());
            shell
        });
        command.arg("--config").arg(&config).current_dir(folder.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let running = Running::spawn(command);
        let line = running.out.wait("listening on http://");
        let address = line.split("listening on http://").nth(1).unwrap_or_default();
        let address = address.split(|c: char| c.is_whitespace() || c == '/').next().unwrap_or_default();
        let address = address.parse().unwrap_or_else(|_| panic!("no address in {line:?}"));
        Proxy { running, address, folder, _upstreams: self.upstreams.clone() }
    }
}

/// Lines as they come from one of the program's outputs.
#[derive(Clone, Default)]
pub struct Lines(Arc<Followed>);

#[derive(Default)]
struct Followed {
    written: Mutex<Written>,
    changed: Condvar,
}

#[derive(Default)]
struct Written {
    lines: Vec<String>,
    /// Nothing more can come.
    ended: bool,
}

impl Lines {
    fn follow(source: impl Read + Send + 'static) -> (Self, JoinHandle<()>) {
        let lines = Self::default();
        let writer = lines.clone();
        let reading = std::thread::spawn(move || {
            for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                writer.update(|written| written.lines.push(line));
            }
            writer.update(|written| written.ended = true);
        });
        (lines, reading)
    }

    fn update(&self, change: impl FnOnce(&mut Written)) {
        change(&mut self.0.written.lock().expect("no reader panics"));
        self.0.changed.notify_all();
    }

    pub fn all(&self) -> Vec<String> {
        self.0.written.lock().expect("no reader panics").lines.clone()
    }

    /// Waits for the first line that contains this text.
    pub fn wait(&self, text: &str) -> String {
        let find = |written: &Written| written.lines.iter().find(|line| line.contains(text)).cloned();
        let written = self.0.written.lock().expect("no reader panics");
        let waiting = |written: &mut Written| find(written).is_none() && !written.ended;
        let (written, _) =
            self.0.changed.wait_timeout_while(written, DEADLINE, waiting).expect("no reader panics");
        let found = find(&written);
        drop(written);
        found.unwrap_or_else(|| panic!("no line with {text:?}"))
    }
}

/// A started program and what it writes.
pub struct Running {
    child: Child,
    pub out: Lines,
    pub err: Lines,
    readers: Vec<JoinHandle<()>>,
}

impl Running {
    pub fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program was built by this test run");
        let (out, reading_out) = Lines::follow(child.stdout.take().expect("stdout is a pipe"));
        let (err, reading_err) = Lines::follow(child.stderr.take().expect("stderr is a pipe"));
        Self { child, out, err, readers: vec![reading_out, reading_err] }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("the program still runs");
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_none()
    }

    /// Waits for the program to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let status = eventually("the program to end", || self.child.try_wait().expect("our own child"));
        self.join_readers();
        status
    }

    /// All it wrote, both outputs.
    pub fn output(&self) -> String {
        format!("{}\n{}", self.out.all().join("\n"), self.err.all().join("\n"))
    }

    fn join_readers(&mut self) {
        for reader in self.readers.drain(..) {
            reader.join().ok();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, which is fine.
        self.child.kill().ok();
        self.child.wait().ok();
        self.join_readers();
        if std::thread::panicking() {
            eprintln!("---- what the program wrote\n{}\n----", self.output());
        } else {
            assert!(!self.output().contains("panicked at"), "the program panicked:\n{}", self.output());
        }
    }
}

/// A finished run of the program.
pub struct Finished {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs the program to its end.
pub fn run(command: Command) -> Finished {
    let mut running = Running::spawn(command);
    let code = running.wait().code();
    Finished { code, out: running.out.all().join("\n"), err: running.err.all().join("\n") }
}

/// The program, listening.
pub struct Proxy {
    pub running: Running,
    address: SocketAddr,
    folder: Folder,
    _upstreams: Vec<Upstream>,
}

impl Proxy {
    /// Endpoints `w1`, `w2`, ... in front of these workspaces.
    pub fn with(upstreams: &[&Upstream]) -> Setup {
        let setup = Setup {
            upstreams: upstreams.iter().map(|upstream| (*upstream).clone()).collect(),
            sections: BTreeMap::new(),
            endpoints: vec![],
            environment: vec![],
            shell: None,
        }
        .set("server.host", "127.0.0.1")
        .set("server.port", 0)
        .set("server.workers", 16)
        .set("auth.api_key", KEY);
        upstreams.iter().fold(setup, |setup, upstream| setup.and_endpoint_at(upstream.address()))
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes the configuration file anew; who reads it, and when, is the test's business.
    pub fn rewrite(&self, yaml: &str) {
        self.folder.write("config.yaml", yaml);
    }

    /// Puts a pipe in the place of the configuration file; nobody ever writes into it.
    pub fn replace_by_pipe(&self) {
        let path = self.folder.path().join("config.yaml");
        std::fs::remove_file(&path).expect("it was written before the start");
        assert!(Command::new("mkfifo").arg(&path).status().is_ok_and(|status| status.success()));
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// One request on a connection of its own.
    pub fn ask(&self, request: &Request) -> Answer {
        ask(self.address, request)
    }

    /// The name of the endpoint that answered a healthy small message.
    pub fn ask_who(&self, request: &Request) -> String {
        let answer = self.ask(request);
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.header("x-claude-lb-endpoint").expect("the answer names its endpoint").to_owned()
    }

    pub fn stats(&self) -> Value {
        let answer = self.ask(&Request::get("/stats").with("Connection", "close"));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.json()
    }

    /// What `/explain` tells about a request, once it has ended for the proxy, too.
    pub fn explain(&self, id: &str) -> Value {
        let ask = || self.ask(&Request::get(&format!("/explain/{id}")).with("Connection", "close"));
        let answer = eventually("an explanation", || Some(ask()).filter(|answer| answer.status() != 404));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.json()
    }

    /// What `/stats` says about one endpoint.
    pub fn endpoint(&self, name: &str) -> Value {
        let stats = self.stats();
        let endpoints = stats["endpoints"].as_array().expect("a list of endpoints");
        let endpoint = endpoints.iter().find(|endpoint| endpoint["name"] == name);
        endpoint.unwrap_or_else(|| panic!("no endpoint {name} in {stats}")).clone()
    }

    /// A number of one endpoint.
    pub fn number(&self, name: &str, field: &str) -> u64 {
        let endpoint = self.endpoint(name);
        endpoint[field].as_u64().unwrap_or_else(|| panic!("{field} of {endpoint}"))
    }

    pub fn is_open(&self, name: &str) -> bool {
        let endpoint = self.endpoint(name);
        endpoint["circuit_open"].as_bool().unwrap_or_else(|| panic!("circuit_open of {endpoint}"))
    }

    /// The sum of all active requests.
    pub fn active(&self) -> u64 {
        let stats = self.stats();
        let endpoints = stats["endpoints"].as_array().expect("a list of endpoints");
        endpoints.iter().map(|endpoint| endpoint["active_requests"].as_u64().expect("a count")).sum()
    }

    /// Waits until no endpoint has an active request.
    pub fn wait_idle(&self) {
        eventually("active_requests to be 0", || (self.active() == 0).then_some(()));
    }

    /// Waits for a line of the log.
    pub fn wait_log(&self, text: &str) -> String {
        self.running.err.wait(text)
    }

    pub fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }
}
