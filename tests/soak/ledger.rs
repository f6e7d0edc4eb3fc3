//! The books: what the clients saw, what the log says, what `/stats` says, what the workspaces received. At the end
//! they must agree.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

use crate::process::Process;
use crate::workspace::Workspace;

/// How an answer that was read to its end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Whole, and one's own.
    Answered,
    /// An error status with a whole body.
    Refused(u16),
    /// A stream that ended with an error event.
    ErrorEvent,
    /// The connection ended before the answer did, and the client can see it.
    Cut,
}

#[derive(Default)]
struct Book {
    sent: u64,
    ends: BTreeMap<End, u64>,
    abandoned: u64,
    slow: u64,
    halved: u64,
    hostile: u64,
    odd_messages: u64,
    probes: u64,
    slowest_probe: Duration,
    seen: HashMap<String, u32>,
}

/// What the clients file.
#[derive(Default)]
pub struct Ledger(Mutex<Book>);

impl Ledger {
    fn file(&self, change: impl FnOnce(&mut Book)) {
        change(&mut self.0.lock().expect("no holder panics"));
    }

    pub fn sent(&self) {
        self.file(|book| book.sent += 1);
    }

    pub fn ended(&self, end: End) {
        self.file(|book| *book.ends.entry(end).or_default() += 1);
    }

    /// A client saw this request-id.
    pub fn saw(&self, id: &str) {
        self.file(|book| *book.seen.entry(id.to_owned()).or_default() += 1);
    }

    /// Sent whole, not read to its end.
    pub fn abandoned(&self) {
        self.file(|book| book.abandoned += 1);
    }

    /// Sent whole, read slowly, not judged.
    pub fn slow(&self) {
        self.file(|book| book.slow += 1);
    }

    /// Never sent whole.
    pub fn halved(&self) {
        self.file(|book| book.halved += 1);
    }

    /// Nonsense; sometimes a message all the same.
    pub fn hostile(&self, is_message: bool) {
        self.file(|book| {
            book.hostile += 1;
            book.odd_messages += u64::from(is_message);
        });
    }

    pub fn probed(&self, took: Duration) {
        self.file(|book| {
            book.probes += 1;
            book.slowest_probe = book.slowest_probe.max(took);
        });
    }
}

/// All books side by side.
pub struct Sums {
    book: Book,
    stats: Value,
    attempts: HashMap<String, (u64, u64)>,
    log_ends: BTreeMap<String, u64>,
    unlogged: Vec<String>,
    alarms: Vec<String>,
    /// Per workspace: received, hung up on a used connection, connections.
    workspaces: Vec<(u64, u64, u64)>,
}

impl Sums {
    pub fn take(ledger: &Ledger, process: &Process, workspaces: &[Workspace]) -> Self {
        let book = std::mem::take(&mut *ledger.0.lock().expect("no holder panics"));
        let told = process.told.lock().expect("no holder panics");
        let unlogged = book.seen.keys().filter(|id| told.ids.get(*id) != Some(&1)).take(5).cloned().collect();
        let (attempts, alarms) = (told.attempts.clone(), told.alarms.clone());
        let log_ends = told.ends.clone().into_iter().collect();
        drop(told);
        let counts = |w: &Workspace| (w.received(), w.hung_up_reused(), w.connections());
        let workspaces = workspaces.iter().map(counts).collect();
        Self { book, stats: process.stats(), attempts, log_ends, unlogged, alarms, workspaces }
    }

    fn ended(&self, which: impl Fn(&End) -> bool) -> u64 {
        self.book.ends.iter().filter(|(end, _)| which(end)).map(|(_, count)| count).sum()
    }

    pub fn print(&self) {
        let book = &self.book;
        let refused = self.ended(|end| matches!(end, End::Refused(_)));
        println!(
            "sent and read to the end: {} = {} answered + {refused} refused + {} ended by an error event + {} cut",
            book.sent,
            self.ended(|end| *end == End::Answered),
            self.ended(|end| *end == End::ErrorEvent),
            self.ended(|end| *end == End::Cut)
        );
        println!(
            "beside them: {} left early or never read, {} read slowly, {} sent by half, {} hostile; {} health checks, \
             the slowest {:.0?}",
            book.abandoned, book.slow, book.halved, book.hostile, book.probes, book.slowest_probe
        );
        println!("refusals: {:?}", book.ends);
        println!("access lines: {:?}", self.log_ends);
        println!("workspaces (received, hung up on a used connection, connections): {:?}", self.workspaces);
        println!("stats: {}", self.stats);
    }

    pub fn check(&self) {
        let book = &self.book;
        assert_eq!(book.sent, book.ends.values().sum::<u64>(), "each request ended in one way");
        assert!(self.alarms.is_empty(), "{:?}", self.alarms);
        assert_eq!(self.stats["process"]["panics"], 0);
        assert!(self.unlogged.is_empty(), "not exactly one access line: {:?}", self.unlogged);
        let unsure = book.abandoned + book.slow + book.odd_messages;
        let logged: u64 = self.log_ends.values().sum();
        assert!(
            book.sent <= logged && logged <= book.sent + unsure,
            "{} <= {logged} <= {} access lines",
            book.sent,
            book.sent + unsure
        );
        let completed = self.log_ends.get("completed").copied().unwrap_or_default();
        let honest = self.ended(|end| matches!(end, End::Answered));
        assert!(honest <= completed, "{honest} whole answers, {completed} completed attempts");
        let endpoints = self.stats["endpoints"].as_array().expect("a list");
        for (place, endpoint) in endpoints.iter().enumerate() {
            let name = endpoint["name"].as_str().expect("a name");
            let number = |field: &str| endpoint[field].as_u64().expect("a count");
            let (attempts, errors) = self.attempts.get(name).copied().unwrap_or_default();
            assert_eq!(number("active_requests"), 0, "{name}");
            assert_eq!(number("total_requests"), attempts, "{name}: attempts in /stats and in the log");
            assert_eq!(number("total_errors"), errors, "{name}: errors in /stats and in the log");
            if let Some((received, again, _)) = self.workspaces.get(place) {
                // A client that left early may have taken its attempt with it before the request was out.
                let least = received - again;
                assert!(
                    least <= attempts && attempts <= least + unsure,
                    "{name}: {attempts} attempts, {received} received, {again} of them asked again"
                );
            }
        }
    }
}
