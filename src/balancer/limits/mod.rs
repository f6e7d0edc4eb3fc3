//! How much each model of each workspace may take, and how much it has taken. Pure; the time is an argument.
//!
//! Databricks counts by workspace and model: input tokens as a request is let in, output tokens as reserved by
//! `max_tokens` and given back as soon as the answer turns out shorter, each over 60 seconds, and requests over an hour
//! (its page "Foundation Model APIs limits and quotas"). A ledger keeps the same account, so that a request is sent
//! where there is room instead of into a 429.
//!
//! Without configured limits the ledger is kept all the same: what it holds at a 429 is a ceiling. Requests are steered
//! around it, and wait a moment for room below it; but it is a guess, so nobody is refused for it.

mod ledger;
mod window;

use std::time::{Duration, Instant};

use crate::anthropic::model::glob_matches;
use crate::anthropic::sse::Usage;
use crate::outcome::Outcome;
use ledger::Ledger;

/// Models of one endpoint that are kept account of; the one used least lately makes room.
const MODELS_MAX: usize = 64;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Input tokens per minute, whether or not they are read from a cache.
    Input,
    /// Output tokens per minute, reserved by `max_tokens`.
    Output,
    /// Requests per hour.
    Requests,
}

impl Kind {
    /// All of them, in the order of the configuration.
    pub const ALL: [Self; 3] = [Self::Input, Self::Output, Self::Requests];

    /// The limit that a refusal names, in the words of public reports or of Databricks' documentation.
    pub fn named_by(outcome: &Outcome, body: &[u8]) -> Option<Self> {
        const WORDS: [(Kind, [&str; 3]); 3] = [
            (Kind::Input, ["input tokens per minute", "input_tokens_per_minute", "itpm"]),
            (Kind::Output, ["output tokens per minute", "output_tokens_per_minute", "otpm"]),
            (Kind::Requests, ["per hour", "per_hour", "qph"]),
        ];
        if !outcome.is_rate_limit() {
            return None;
        }
        let words = String::from_utf8_lossy(body).to_ascii_lowercase();
        let mut named = WORDS.iter().filter(|(_, names)| names.iter().any(|name| words.contains(name)));
        let (kind, _) = named.next()?;
        named.next().is_none().then_some(*kind)
    }

    /// As the configuration and /stats call it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Input => "input_tokens_per_minute",
            Self::Output => "output_tokens_per_minute",
            Self::Requests => "requests_per_hour",
        }
    }
}

/// One number for each [`Kind`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerKind<T> {
    /// Of [`Kind::Input`].
    pub input: T,
    /// Of [`Kind::Output`].
    pub output: T,
    /// Of [`Kind::Requests`].
    pub requests: T,
}

impl<T> PerKind<T> {
    /// The one of this kind.
    pub fn of(&self, kind: Kind) -> &T {
        match kind {
            Kind::Input => &self.input,
            Kind::Output => &self.output,
            Kind::Requests => &self.requests,
        }
    }

    /// The same, to be changed.
    pub fn of_mut(&mut self, kind: Kind) -> &mut T {
        match kind {
            Kind::Input => &mut self.input,
            Kind::Output => &mut self.output,
            Kind::Requests => &mut self.requests,
        }
    }
}

/// What one model may take; at least 1 each, where there is a limit.
pub type Quota = PerKind<Option<u64>>;

/// `endpoints[].limits`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of each model by itself.
    pub each: Quota,
    /// Globs of models, and what differs for them; the first that matches counts.
    pub models: Vec<(String, Quota)>,
}

impl Limits {
    /// What holds for this model.
    pub fn of(&self, model: &str) -> Quota {
        let own = self.models.iter().find(|(glob, _)| glob_matches(glob, model)).map(|(_, quota)| *quota);
        let own = own.unwrap_or_default();
        PerKind {
            input: own.input.or(self.each.input),
            output: own.output.or(self.each.output),
            requests: own.requests.or(self.each.requests),
        }
    }

    /// True when nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is known of a request's size before it is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Need {
    /// Bytes of its body.
    pub bytes: u64,
    /// Its `max_tokens`.
    pub max_tokens: Option<u64>,
    /// Tokens for each byte of the same conversation's last request.
    pub density: Option<f64>,
}

/// Whether a request fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It does.
    Free,
    /// It would rise above what was learned from 429s: another endpoint is better, none is not.
    Above {
        /// When it would not any more, where the workspace has named the limit; that is worth waiting for.
        until: Option<Instant>,
        /// Which limit that is.
        kind: Kind,
    },
    /// A configured limit would be exceeded.
    Full {
        /// When it fits at the latest, if nothing is added meanwhile.
        until: Instant,
        /// Which limit that is.
        kind: Kind,
    },
}

/// One request in the account of one model; goes back with what it really took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Charge {
    at: Instant,
    bytes: u64,
    input: u64,
    output: u64,
    /// What counted with it.
    reached: PerKind<u64>,
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spent {
    /// The workspace let nothing in: refused by a rate limit, or never sent.
    Nothing,
    /// Input was let in, output ended: as far as both are known.
    Ended {
        /// Input tokens, cached ones included.
        input: Option<u64>,
        /// Output tokens.
        output: Option<u64>,
    },
    /// It is not known whether output still counts. What was reserved stays until it ages out.
    Unknown {
        /// Input tokens, cached ones included.
        input: Option<u64>,
    },
}

/// What an attempt took, by how it ended and what was reported.
pub fn spent(outcome: &Outcome, usage: &Usage) -> Spent {
    let input = input_of(usage);
    match outcome {
        Outcome::ConnectFailed | Outcome::NoCredential | Outcome::Local => Spent::Nothing,
        outcome if outcome.is_rate_limit() => Spent::Nothing,
        Outcome::Completed => Spent::Ended { input, output: usage.output_tokens },
        // Not one token was written.
        Outcome::Refused { .. } | Outcome::WebPage | Outcome::ErrorEvent { .. } => {
            Spent::Ended { input, output: Some(0) }
        }
        Outcome::NoAnswer
        | Outcome::FirstByteTimeout
        | Outcome::BrokeBeforeContent
        | Outcome::BrokeAfterContent
        | Outcome::ClientGone => Spent::Unknown { input },
    }
}

/// Tokens for each byte, as an answer shows it.
pub fn density(charge: &Charge, usage: &Usage) -> Option<f64> {
    input_of(usage).filter(|_| charge.bytes > 0).map(|tokens| tokens as f64 / charge.bytes as f64)
}

/// Input as Databricks counts it, which does not know at admission what its cache holds.
fn input_of(usage: &Usage) -> Option<u64> {
    let cached = usage.cache_creation_input_tokens.unwrap_or(0) + usage.cache_read_input_tokens.unwrap_or(0);
    Some(usage.input_tokens? + cached).filter(|tokens| *tokens > 0)
}

/// One limit and what is used of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// As configured.
    pub limit: Option<u64>,
    /// As learned from 429s.
    pub ceiling: Option<u64>,
    /// Counted in the window that ends now.
    pub used: u64,
}

/// The accounts of one endpoint.
#[derive(Debug, Clone, Default)]
pub struct Ledgers {
    list: Vec<(String, Ledger)>,
}

impl Ledgers {
    /// True when no account is kept.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether a request for this model fits.
    pub fn room(&self, model: &str, need: Need, now: Instant) -> Room {
        self.find(model).map_or(Room::Free, |ledger| ledger.room(need, now))
    }

    /// A limit of this model is known: it is configured, or the workspace has named it.
    pub fn is_limited(&self, model: &str, now: Instant) -> bool {
        self.find(model).is_some_and(|ledger| ledger.is_limited(now))
    }

    /// Lets a request in.
    pub fn admit(&mut self, limits: &Limits, model: &str, need: Need, now: Instant) -> Option<Charge> {
        if self.find(model).is_none() {
            self.list.retain(|(_, ledger)| !ledger.is_over(now));
            self.begin(model, Ledger::new(limits.of(model), now));
        }
        self.find_mut(model).map(|ledger| ledger.admit(need, now))
    }

    /// Takes a charge back with what its request came to.
    pub fn settle(&mut self, model: &str, charge: Charge, spent: Spent, now: Instant) {
        if let Some(ledger) = self.find_mut(model) {
            ledger.settle(charge, spent, now);
        }
    }

    /// A workspace has refused a request for being over a limit, which may be named. To be called once its charge is
    /// taken back.
    pub fn limited(&mut self, limits: &Limits, model: &str, kind: Option<Kind>, now: Instant) {
        if self.find(model).is_none() {
            self.begin(model, Ledger::new(limits.of(model), now));
        }
        if let Some(ledger) = self.find_mut(model) {
            ledger.limited(kind, now);
        }
    }

    /// The configuration has changed: what is counted stays.
    pub fn configure(&mut self, limits: &Limits) {
        for (model, ledger) in &mut self.list {
            ledger.quota = limits.of(model);
        }
    }

    /// Forgets what 429s have taught.
    pub fn forget_learned(&mut self) {
        self.list.iter_mut().for_each(|(_, ledger)| ledger.forget_learned());
    }

    /// What has been used lately, for display.
    pub fn levels(&self, now: Instant) -> Vec<(String, PerKind<Level>)> {
        let used = self.list.iter().filter(|(_, ledger)| !ledger.is_over(now));
        used.map(|(model, ledger)| (model.clone(), ledger.levels(now))).collect()
    }

    /// What is used of the limits of this model.
    pub fn level(&self, limits: &Limits, model: &str, now: Instant) -> PerKind<Level> {
        let unused = || Ledger::new(limits.of(model), now).levels(now);
        self.find(model).map_or_else(unused, |ledger| ledger.levels(now))
    }

    fn find(&self, model: &str) -> Option<&Ledger> {
        self.list.iter().find(|(name, _)| name == model).map(|(_, ledger)| ledger)
    }

    fn find_mut(&mut self, model: &str) -> Option<&mut Ledger> {
        self.list.iter_mut().find(|(name, _)| name == model).map(|(_, ledger)| ledger)
    }

    fn begin(&mut self, model: &str, ledger: Ledger) {
        if self.list.len() >= MODELS_MAX
            && let Some(idlest) = (0..self.list.len()).min_by_key(|&at| {
                let ledger = &self.list[at].1;
                (ledger.is_configured(), ledger.used_at())
            })
        {
            self.list.swap_remove(idlest);
        }
        self.list.push((model.to_string(), ledger));
    }
}

const MINUTE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
