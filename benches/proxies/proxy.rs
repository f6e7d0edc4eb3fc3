//! The proxies under test: found, configured, started, and ended whatever happens.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};

use crate::meter;
use crate::wire::{KEY, TOKEN, broken, clock};

const CERTIFICATE_AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tls/authority.pem");
/// How long a process may take to end before it is killed.
const END: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(5);
/// How long the start of a wrapped proxy may take.
const WRAPPED: Duration = Duration::from_secs(60);

/// The process under test, for whoever has to end it before its time.
static UNDER_TEST: Mutex<Option<u32>> = Mutex::new(None);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// No proxy: what the fakes themselves cost.
    Direct,
    ClaudeLb,
    Haproxy,
    Nginx,
    Litellm,
}

/// A proxy that can be started here.
#[derive(Clone)]
pub struct Proxy {
    pub kind: Kind,
    program: PathBuf,
    /// What is started in its place, with it as an argument.
    wrapper: Vec<String>,
    pub version: String,
}

/// Where the workspaces are for one measurement.
#[derive(Clone, Copy)]
pub struct Workspaces {
    pub ports: [u16; 2],
    pub is_tls: bool,
}

/// A started proxy; dropping it ends the process and its children.
pub struct Running {
    child: Child,
    pub port: u16,
    pub family: Vec<u32>,
    /// From exec to the first answer, of whatever kind, in nanoseconds.
    pub first_answer_ns: u64,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::ClaudeLb => "claude-lb",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
            Self::Litellm => "LiteLLM",
        }
    }

    fn template(self) -> (&'static str, &'static str) {
        match self {
            Self::Direct | Self::ClaudeLb => ("claude-lb.yaml", include_str!("configs/claude-lb.yaml")),
            Self::Haproxy => ("haproxy.cfg", include_str!("configs/haproxy.cfg")),
            Self::Nginx => ("nginx.conf", include_str!("configs/nginx.conf")),
            Self::Litellm => ("litellm.yaml", include_str!("configs/litellm.yaml")),
        }
    }

    /// How long a start may take.
    fn patience(self) -> Duration {
        Duration::from_secs(if self == Self::Litellm { 60 } else { 5 })
    }
}

impl Proxy {
    /// The proxy if its program answers to a question for its version, else why not.
    pub fn find(kind: Kind, program: &Path) -> Result<Self, String> {
        let flag = match kind {
            Kind::Haproxy | Kind::Nginx => "-v",
            _ => "--version",
        };
        let output = Command::new(program).arg(flag).stdin(Stdio::null()).output();
        let output = output.map_err(|why| format!("{}: {why}", program.display()))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let digits = |word: &&str| word.contains('.') && word.contains(|c: char| c.is_ascii_digit());
        let version = text.split_whitespace().find(digits).unwrap_or("unknown");
        let version = version.trim_start_matches("nginx/").to_owned();
        Ok(Self { kind, program: program.into(), wrapper: Vec::new(), version })
    }

    /// The same proxy, started through another program.
    pub fn under(self, wrapper: Vec<String>) -> Self {
        Self { wrapper, ..self }
    }

    pub fn bytes(&self) -> u64 {
        fs::metadata(&self.program).map_or(0, |data| data.len())
    }

    /// Starts it on a free port and waits for its first answer.
    pub fn start(&self, workspaces: Workspaces, folder: &Path) -> io::Result<Running> {
        let port = free_port()?;
        let (name, template) = self.kind.template();
        let (scheme, tls) = match workspaces.is_tls {
            true => (
                "https",
                format!(
                    "ssl verify required ca-file {CERTIFICATE_AUTHORITY} sni str(localhost) verifyhost localhost"
                ),
            ),
            false => ("http", String::new()),
        };
        let mut text = template.to_owned();
        for (word, value) in [
            ("@PORT@", port.to_string()),
            ("@KEY@", KEY.into()),
            ("@TOKEN@", TOKEN.into()),
            ("@WORKSPACE_1@", workspaces.ports[0].to_string()),
            ("@WORKSPACE_2@", workspaces.ports[1].to_string()),
            ("@DIR@", folder.display().to_string()),
            ("@SCHEME@", scheme.into()),
            ("@TLS_HAPROXY@", tls),
            ("@CA@", CERTIFICATE_AUTHORITY.into()),
        ] {
            text = text.replace(word, &value);
        }
        let configuration = folder.join(name);
        fs::write(&configuration, text)?;
        let mut command = match self.wrapper.split_first() {
            None => Command::new(&self.program),
            Some((wrapper, arguments)) => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(&self.program);
                command
            }
        };
        match self.kind {
            Kind::Direct | Kind::ClaudeLb | Kind::Litellm => command.arg("--config").arg(&configuration),
            Kind::Haproxy => command.arg("-f").arg(&configuration),
            Kind::Nginx => command.arg("-p").arg(folder).arg("-c").arg(&configuration),
        };
        if self.kind == Kind::Litellm {
            command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        }
        let log = File::create(folder.join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let begin = clock();
        let child = {
            let mut under_test = UNDER_TEST.lock();
            let child = command.spawn()?;
            *under_test = Some(child.id());
            child
        };
        let mut running = Running { child, port, family: Vec::new(), first_answer_ns: 0 };
        let patience = if self.wrapper.is_empty() { self.kind.patience() } else { WRAPPED };
        running.first_answer_ns = running.await_answer(begin, patience).map_err(|why| {
            let log = fs::read_to_string(folder.join(format!("{name}.log"))).unwrap_or_default();
            io::Error::other(format!("{} did not answer: {why}; {}", self.kind.name(), log.trim()))
        })?;
        running.family = meter::family(running.child.id());
        Ok(running)
    }
}

impl Running {
    fn await_answer(&mut self, begin: u64, patience: Duration) -> io::Result<u64> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        loop {
            let why = match question(address, patience) {
                Ok(()) => return Ok(clock() - begin),
                Err(why) => why,
            };
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!("ended with {status}")));
            }
            if clock() - begin > patience.as_nanos() as u64 {
                return Err(why);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

impl Running {
    /// Ends it with a signal; an error if it does not end well in time.
    pub fn end(mut self, patience: Duration) -> io::Result<()> {
        self.terminate(patience);
        match self.child.try_wait()? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(format!("the proxy ended with {status}"))),
            None => Err(broken("the proxy did not end")),
        }
    }

    fn terminate(&mut self, patience: Duration) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let begin = clock();
        while clock() - begin < patience.as_nanos() as u64 {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(POLL),
                _ => break,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let family = meter::family(self.child.id());
        self.terminate(END);
        let mut under_test = UNDER_TEST.lock();
        if let Ok(None) = self.child.try_wait() {
            kill(&family);
            let _ = self.child.wait();
        }
        *under_test = None;
    }
}

/// Ends the process under test and its children at once. The caller must end, too: the lock stays taken, so that no
/// other one is started.
pub fn kill_under_test() {
    let under_test = UNDER_TEST.lock();
    if let Some(id) = *under_test {
        kill(&meter::family(id));
    }
    std::mem::forget(under_test);
}

fn kill(family: &[u32]) {
    for member in family.iter().rev().filter_map(|id| Pid::from_raw(*id as i32)) {
        let _ = kill_process(member, Signal::KILL);
    }
}

/// Any answer will do: the key is missing, and only one of them knows the path.
fn question(address: SocketAddr, patience: Duration) -> io::Result<()> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(patience))?;
    socket.write_all(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    let mut begin = [0; 5];
    socket.read_exact(&mut begin)?;
    if &begin == b"HTTP/" { Ok(()) } else { Err(broken("not HTTP")) }
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A port where nobody listens, kept from others for as long as the socket lives.
pub fn dead_port() -> io::Result<(socket2::Socket, u16)> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let address = socket.local_addr()?.as_socket().ok_or_else(|| broken("no address"))?;
    Ok((socket, address.port()))
}
