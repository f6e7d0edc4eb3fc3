//! One workspace: its prompt cache, its quota, its speed.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use claude_lb::balancer::limits::{Kind, Quota};

use crate::policy::MAX_TOKENS;
use crate::workload::{Prefix, Turn, seconds};

/// How long a cached prefix lives after its last use.
const CACHE_WARM: Duration = Duration::from_secs(5 * 60);
/// Over which input tokens are counted.
const QUOTA_WINDOW: Duration = Duration::from_secs(60);

/// What can be read from the cache: a whole conversation so far, or the prefix in front of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Entry {
    Conversation(u64),
    Prefix(Prefix),
}

/// How a request that was let in will go.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// Input tokens read from the cache.
    pub cached: u64,
    /// Until the first token; what was written to the cache can be read from then on.
    pub first_token: Duration,
    /// Until the last one.
    pub whole: Duration,
}

/// A 429, and the limit that it names.
#[derive(Debug, Clone, Copy)]
pub struct Limited {
    pub by: Kind,
}

/// A workspace of the simulation.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Tokens, and until when they stay.
    cache: HashMap<Entry, (u64, Instant)>,
    /// What was let in within the last minute.
    admitted: VecDeque<Admitted>,
}

/// Tokens of one request as the quota counts them.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    at: Instant,
    conversation: u64,
    input: u64,
    /// What it has reserved, until its answer ends; then what that took.
    output: u64,
}

impl Workspace {
    /// Lets a request in, or answers 429 when it does not fit into the last minute any more.
    pub fn admit(&mut self, turn: &Turn, quota: Quota, now: Instant) -> Result<Service, Limited> {
        while self.admitted.front().is_some_and(|first| first.at + QUOTA_WINDOW <= now) {
            self.admitted.pop_front();
        }
        let sum = |of: fn(&Admitted) -> u64| self.admitted.iter().map(of).sum::<u64>();
        if quota.input.is_some_and(|quota| sum(|one| one.input) + turn.input > quota) {
            return Err(Limited { by: Kind::Input });
        }
        if quota.output.is_some_and(|quota| sum(|one| one.output) + MAX_TOKENS > quota) {
            return Err(Limited { by: Kind::Output });
        }
        let (conversation, input) = (turn.conversation, turn.input);
        self.admitted.push_back(Admitted { at: now, conversation, input, output: MAX_TOKENS });
        let prefix = self.read(Entry::Prefix(turn.prefix), now);
        let cached = self.read(Entry::Conversation(turn.conversation), now).max(prefix);
        let uncached = turn.input - cached;
        let first_token = 0.8 + uncached as f64 / 15_000.0 + cached as f64 / 200_000.0;
        let whole = first_token + turn.output as f64 / 70.0;
        Ok(Service { cached, first_token: seconds(first_token), whole: seconds(whole) })
    }

    /// The first token has come.
    pub fn write(&mut self, turn: &Turn, now: Instant) {
        let until = now + CACHE_WARM;
        self.cache.insert(Entry::Prefix(turn.prefix), (turn.prefix_tokens, until));
        self.cache.insert(Entry::Conversation(turn.conversation), (turn.input, until));
    }

    /// The answer has ended: what was reserved and not used is given back.
    pub fn end(&mut self, turn: &Turn) {
        let mine = self.admitted.iter_mut().rev().find(|one| one.conversation == turn.conversation);
        if let Some(admitted) = mine {
            admitted.output = turn.output;
        }
    }

    /// Tokens that are there and warm; reading keeps them so.
    fn read(&mut self, entry: Entry, now: Instant) -> u64 {
        match self.cache.get_mut(&entry) {
            Some((tokens, until)) if now < *until => {
                *until = now + CACHE_WARM;
                *tokens
            }
            _ => 0,
        }
    }
}
