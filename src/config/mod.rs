//! What the operator wrote, and what it means.
//!
//! Two floors: `raw` reads the file as typed, `resolve` gives every key its meaning, default and limits. The
//! result is one [`Config`] with nothing left to decide, or all [`Problems`] at once. The environment is
//! passed in; only [`Config::load`] touches the machine, to read the one file.
//!
//! | question | file |
//! |---|---|
//! | which keys there are, and of what kind | `raw` |
//! | defaults and limits | `resolve`, `endpoint`, `auth` |
//! | the line of a key | `tree` |
//! | `${VARIABLE}` | `expand` |
//! | "did you mean" | [`nearest`] |
//! | what `--check` prints | `show` |

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::secret::Secret;

mod auth;
mod endpoint;
mod expand;
pub mod nearest;
mod problems;
mod raw;
mod resolve;
mod show;
#[cfg(test)]
mod tests;
mod tree;

pub use crate::balancer::breaker::RateRule;
pub use crate::balancer::limits::{Limits as EndpointLimits, Quota};
pub use crate::balancer::strategy::Strategy;
pub use problems::{PROBLEMS_MAX, Problem, Problems};

/// The whole configuration, with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where the proxy listens, and how much it takes on.
    pub server: Server,
    /// How an endpoint is chosen and when it is left alone.
    pub load_balancer: LoadBalancer,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// What is too large.
    pub limits: Limits,
    /// Who may use the proxy.
    pub auth: Auth,
    /// Which model name goes out.
    pub models: Models,
    /// What is taken out of requests because the endpoints refuse it.
    pub compat: Compat,
    /// Whom to trust besides the built-in roots.
    pub tls: Tls,
    /// Where usage is kept; `None` keeps it in memory only.
    pub usage: Option<Usage>,
    /// What is logged and how.
    pub logging: Logging,
    /// The workspaces: at least one, with unique names, in the order of the file.
    pub endpoints: Vec<Endpoint>,
}

/// `server:`
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// An IP address (IPv6 without brackets) or a host name.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
    /// Worker threads, and so message requests served at once; at least 1.
    pub workers: usize,
    /// Requests that may wait for a worker; 0 lets none wait.
    pub queue: usize,
    /// How long one may wait there.
    pub queue_timeout: Duration,
    /// Open client connections; at least 1.
    pub max_connections: usize,
    /// How long running streams may go on after a stop signal; may be zero.
    pub drain_timeout: Duration,
}

/// `load_balancer:`
#[derive(Debug, Clone, PartialEq)]
pub struct LoadBalancer {
    /// How an endpoint is chosen.
    pub strategy: Strategy,
    /// Whether a conversation stays on its endpoint.
    pub session_affinity: bool,
    /// Counted failures in a row that open the breaker; at least 1.
    pub circuit_breaker_threshold: u32,
    /// How long the breaker stays open at first.
    pub circuit_breaker_timeout: Duration,
    /// The share of failures that opens the breaker, too; `None` leaves it to failures in a row.
    pub circuit_breaker_rate: Option<RateRule>,
    /// Endpoints tried for one request, the first included; at least 1.
    pub max_attempts: u32,
}

/// `timeouts:`, none of them zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeouts {
    /// Upstream: until connected, TLS included.
    pub connect: Duration,
    /// Upstream: from the request sent to the first byte of the answer.
    pub first_byte: Duration,
    /// Upstream: between two reads of the answer.
    pub idle: Duration,
    /// Client: silence on a stream after which a ping is sent.
    pub heartbeat: Duration,
    /// Client: for the whole request head.
    pub head: Duration,
    /// Client: for the whole request body.
    pub body: Duration,
    /// Client: between two requests on a connection.
    pub keep_alive: Duration,
}

/// `limits:`
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// The largest request body; at least 1.
    pub max_body_bytes: usize,
    /// The memory for all request bodies together; room for at least one.
    pub max_buffered_bytes: usize,
}

/// `auth.mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// A client shows one of the keys.
    Key,
    /// Everyone may; only on a loopback address.
    None,
}

/// One client's key.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientKey {
    /// How logs and statistics name the client; unique.
    pub name: String,
    /// Visible ASCII, never empty; unique.
    pub key: Secret,
}

/// `auth:`
#[derive(Debug, Clone, PartialEq)]
pub struct Auth {
    /// Whether a key is asked for.
    pub mode: AuthMode,
    /// At least one with [`AuthMode::Key`], none with [`AuthMode::None`]. `api_key` comes first, as
    /// `default`.
    pub keys: Vec<ClientKey>,
    /// Whether statistics and the dashboard ask for a key too.
    pub protect_admin: bool,
}

/// `models:`
#[derive(Debug, Clone, PartialEq)]
pub struct Models {
    /// For names of the family that have no model of their own.
    pub sonnet: String,
    /// Likewise.
    pub opus: String,
    /// Likewise.
    pub haiku: String,
    /// Pattern and model, looked at first, in the order of the file.
    pub map: Vec<(String, String)>,
}

/// `compat.mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompatMode {
    /// What an endpoint refuses is left out the next time.
    Learn,
    /// Requests go out as they are.
    Off,
}

/// `compat:`
#[derive(Debug, Clone, PartialEq)]
pub struct Compat {
    /// Whether refusals teach.
    pub mode: CompatMode,
    /// Paths that are always left out.
    pub strip: Vec<String>,
}

/// `tls:`
#[derive(Debug, Clone, PartialEq)]
pub struct Tls {
    /// Certificates in PEM, in addition to the built-in roots.
    pub ca_file: Option<PathBuf>,
}

/// `usage:`
#[derive(Debug, Clone, PartialEq)]
pub struct Usage {
    /// The directory of the daily files.
    pub dir: PathBuf,
    /// Days after which a file is removed; at least 1.
    pub retention_days: u32,
}

/// `logging.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `logging:`, where `LOG_LEVEL` and `LOG_FORMAT` of the environment win.
#[derive(Debug, Clone, PartialEq)]
pub struct Logging {
    /// The least important level that is logged.
    pub level: log::LevelFilter,
    /// How lines look.
    pub format: LogFormat,
}

/// How the proxy shows a workspace who it is.
#[derive(Debug, Clone, PartialEq)]
pub enum Credential {
    /// A token: visible ASCII, never empty.
    Token(Secret),
    /// A file that holds the token; read, and its content checked, by whoever uses it.
    TokenFile(PathBuf),
    /// A service principal, for which tokens are fetched.
    OAuth {
        /// Visible ASCII, never empty.
        client_id: Secret,
        /// Visible ASCII, never empty.
        client_secret: Secret,
    },
}

/// One item of `endpoints:`, a workspace.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Unique, without control characters, not always ASCII.
    pub name: String,
    /// `http://` or `https://`, host, and path without a slash at its end.
    pub api_base: String,
    /// How the proxy shows who it is.
    pub credential: Credential,
    /// Its share of the traffic; 0 gets no new requests.
    pub weight: u32,
    /// Requests it takes at once; at least 1.
    pub max_concurrent: Option<u32>,
    /// Patterns of the models it serves; none means all.
    pub models: Vec<String>,
    /// What each model there may take; limits that are learned besides are the balancer's business.
    pub limits: EndpointLimits,
    /// Added to each request; names in lower case, each once.
    pub headers: Vec<(String, Secret)>,
}

impl Config {
    /// Reads the file and everything in it.
    pub fn load(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Problems> {
        let file = path.display().to_string();
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
        if let Err(error) = read {
            return Err(Problems::of_file(&file, None, unreadable(&error)));
        }
        let text = decode(&bytes).map_err(|(line, what)| Problems::of_file(&file, line, what))?;
        Self::parse(text, &file, env)
    }

    /// Reads the text of a configuration; `file_name` is how messages name it.
    pub fn parse(
        text: &str,
        file_name: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Problems> {
        resolve::resolve(text, env).map_err(|problems| Problems { file: file_name.to_owned(), ..problems })
    }

    /// The configuration as YAML, every default filled in and secrets as `***`.
    pub fn show(&self) -> String {
        show::show(self)
    }
}

/// A thousand endpoints need half of this.
const FILE_BYTES_MAX: u64 = 512 * 1024;

fn unreadable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "no such file (`claude-lb init` writes one, see also the README; --config FILE or CONFIG_PATH \
             names another)"
                .to_owned()
        }
        io::ErrorKind::IsADirectory => {
            "is a directory (name the file in it with --config or CONFIG_PATH)".to_owned()
        }
        _ => format!("cannot be read: {error} (--config FILE or CONFIG_PATH names another)"),
    }
}

/// The text of the file, or the line and reason why it is none.
fn decode(bytes: &[u8]) -> Result<&str, (Option<usize>, String)> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err((None, "larger than 512 KiB (is it the right file?)".to_owned()));
    }
    std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        (Some(line), "not UTF-8 text (save the file as UTF-8)".to_owned())
    })
}
