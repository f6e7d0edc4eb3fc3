//! The requests that a newcomer watches, one after the other, and what is said about each.
//!
//! Ends with an error at the first request that was not answered whole, and when a failover did not happen.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Deserialize;

use super::client::{self, Reply};
use super::script::{Failure, NAMES, Script};
use super::show::Show;

/// The tour through one running proxy.
pub(super) struct Tour {
    /// Where the proxy listens.
    pub(super) address: SocketAddr,
    /// What the workspaces follow.
    pub(super) script: Arc<Script>,
    /// Set by a signal: no further request is sent.
    pub(super) is_ending: Arc<AtomicBool>,
}

type Step = fn(&Tour, &mut Show) -> Result<(), String>;

impl Tour {
    /// Everything in order. The error says what went wrong.
    pub(super) fn run(&self, show: &mut Show) -> Result<(), String> {
        let steps: [(&str, Step); 6] = [
            ("Four streamed turns, one after the other", Self::one_after_the_other),
            ("Three turns at once", Self::at_once),
            ("A workspace is overloaded", Self::overloaded),
            ("A workspace hangs up before its first word", Self::cut_off),
            ("A turn without streaming", Self::without_streaming),
            ("What /stats tells now", Self::numbers),
        ];
        for (title, step) in steps {
            if self.is_ending.load(Ordering::SeqCst) {
                return Ok(());
            }
            show.heading(title);
            step(self, show).map_err(|why| format!("demo: \"{title}\" went wrong: {why}"))?;
        }
        show.line("\nTwo attempts failed, and every turn was answered whole.");
        Ok(())
    }

    fn one_after_the_other(&self, show: &mut Show) -> Result<(), String> {
        for line in 0..4 {
            if self.is_ending.load(Ordering::SeqCst) {
                return Ok(());
            }
            let reply = self.watched(line, true, show)?;
            show.note(&summary(&reply));
        }
        Ok(())
    }

    /// Nobody can read three texts at once, so only who answered is shown.
    fn at_once(&self, show: &mut Show) -> Result<(), String> {
        let ask = || client::message(self.address, 4, true, &mut |_| {});
        let replies: Vec<Result<Reply, String>> = std::thread::scope(|scope| {
            let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, ask);
            let running: Vec<_> = NAMES.iter().map(spawn).collect();
            let finish = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err("the client failed".into())),
                Err(error) => Err(format!("cannot start a thread: {error}")),
            };
            running.into_iter().map(finish).collect()
        });
        for reply in replies {
            show.note(&summary(&checked(reply?)?));
        }
        Ok(())
    }

    fn overloaded(&self, show: &mut Show) -> Result<(), String> {
        self.script.arm(Failure::Overloaded);
        let reply = self.watched(5, true, show)?;
        let failed = self.script.who_failed().ok_or("no workspace was asked")?;
        if reply.attempts != 2 || reply.endpoint == failed {
            return Err(format!("no failover was seen: {}", summary(&reply)));
        }
        show.note(&taken_over(failed, &reply));
        Ok(())
    }

    /// The head went out with the first workspace's `message_start`, so only the text tells who went on.
    fn cut_off(&self, show: &mut Show) -> Result<(), String> {
        self.script.arm(Failure::Cut);
        let reply = self.watched(6, true, show)?;
        let failed = self.script.who_failed().ok_or("no workspace was asked")?;
        match speaker(&reply.text) {
            Some(other) if other != failed => {
                show.note(&format!("{failed} broke off, {other} went on in the same stream"));
                Ok(())
            }
            _ => Err(format!("no failover was seen: {}", summary(&reply))),
        }
    }

    fn without_streaming(&self, show: &mut Show) -> Result<(), String> {
        let reply = self.watched(7, false, show)?;
        show.note(&summary(&reply));
        Ok(())
    }

    fn numbers(&self, show: &mut Show) -> Result<(), String> {
        let body = client::get(self.address, "/stats")?;
        let stats: Stats = serde_json::from_slice(&body).map_err(|error| format!("/stats: {error}"))?;
        show.line("  endpoint     requests  errors  now");
        for endpoint in &stats.endpoints {
            show.line(&row(endpoint));
        }
        if stats.endpoints.iter().all(|endpoint| endpoint.total_errors == 0) {
            return Err("/stats knows of no failed attempt".into());
        }
        Ok(())
    }

    /// A turn whose text is shown as it arrives.
    fn watched(&self, line: usize, is_stream: bool, show: &mut Show) -> Result<Reply, String> {
        let reply = client::message(self.address, line, is_stream, &mut |text| show.text(text));
        show.end_text();
        checked(reply?)
    }
}

fn checked(reply: Reply) -> Result<Reply, String> {
    if !NAMES.contains(&reply.endpoint.as_str()) {
        return Err(format!("{:?} is no workspace", reply.endpoint));
    }
    match speaker(&reply.text) {
        Some(_) => Ok(reply),
        None => Err(format!("{} said {:?}", reply.endpoint, reply.text)),
    }
}

/// Who says this.
fn speaker(text: &str) -> Option<&'static str> {
    let rest = text.strip_prefix("Hello from ")?;
    NAMES.into_iter().find(|name| rest.strip_prefix(name).is_some_and(|rest| rest.starts_with(". ")))
}

fn summary(reply: &Reply) -> String {
    format!("{}, {}", reply.endpoint, effort(reply))
}

fn taken_over(failed: &str, reply: &Reply) -> String {
    let Reply { endpoint, attempts, first_byte, .. } = reply;
    format!("{failed} answered 529, {endpoint} took over: {attempts} attempts, {}", milliseconds(*first_byte))
}

fn effort(reply: &Reply) -> String {
    let attempts = if reply.attempts == 1 { "attempt" } else { "attempts" };
    format!("{} {attempts}, first byte {}", reply.attempts, milliseconds(reply.first_byte))
}

fn milliseconds(duration: Duration) -> String {
    match duration.as_secs_f64() * 1000.0 {
        short if short < 9.95 => format!("{short:.1} ms"),
        long => format!("{long:.0} ms"),
    }
}

/// What the demo reads of /stats.
#[derive(Deserialize)]
struct Stats {
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    name: String,
    total_requests: u64,
    total_errors: u64,
    circuit_open: bool,
    holds: Vec<Hold>,
}

#[derive(Deserialize)]
struct Hold {
    seconds_left: f64,
}

fn row(endpoint: &Endpoint) -> String {
    let longest = endpoint.holds.iter().map(|hold| hold.seconds_left).reduce(f64::max);
    let now = match longest {
        Some(seconds) => format!("rests for {seconds:.1} s more"),
        None if endpoint.circuit_open => "taken out".into(),
        None => "works".into(),
    };
    let Endpoint { name, total_requests, total_errors, .. } = endpoint;
    format!("  {name:<11} {total_requests:>9} {total_errors:>7}  {now}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speaker_is_read_off_the_text() {
        assert_eq!(speaker("Hello from workspace-2. Hi."), Some("workspace-2"));
        for text in ["", "Hello from workspace-22. Hi.", "Hello from workspace-2", "workspace-2. "] {
            assert_eq!(speaker(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_longest_notes_fit_a_terminal() {
        let reply = Reply {
            endpoint: "workspace-3".into(),
            attempts: 2,
            first_byte: Duration::from_millis(10_000),
            text: String::new(),
        };
        assert_eq!(summary(&reply), "workspace-3, 2 attempts, first byte 10000 ms");
        let longest = taken_over("workspace-1", &reply);
        assert_eq!(longest, "workspace-1 answered 529, workspace-3 took over: 2 attempts, 10000 ms");
        assert!(longest.len() + "  -> ".len() <= 80);
    }

    #[test]
    fn a_row_tells_the_state_in_words() {
        let endpoint = |circuit_open, holds: &[f64]| Endpoint {
            name: "workspace-1".into(),
            total_requests: 12,
            total_errors: 1,
            circuit_open,
            holds: holds.iter().map(|&seconds_left| Hold { seconds_left }).collect(),
        };
        for (circuit_open, holds, expected) in [
            (false, &[][..], "  workspace-1        12       1  works"),
            (true, &[], "  workspace-1        12       1  taken out"),
            (false, &[1.0, 3.25], "  workspace-1        12       1  rests for 3.2 s more"),
        ] {
            assert_eq!(row(&endpoint(circuit_open, holds)), expected);
        }
    }
}
