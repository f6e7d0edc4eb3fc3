//! The account of one model at one endpoint: what counts now, what is configured, what 429s have taught.

use std::time::{Duration, Instant};

use super::window::Window;
use super::{Charge, Kind, Level, MINUTE, Need, PerKind, Quota, Room, Spent};

/// What Databricks reserves for a request without `max_tokens`.
const OUTPUT_UNSPECIFIED: u64 = 1000;
/// Tokens for each byte of a request's body until answers have told.
const TOKENS_PER_BYTE: f64 = 0.28;
/// What is added to an estimate. It counts for as long as the answer takes, so a little too much costs little.
const CAUTION: f64 = 1.2;
/// The same when the conversation's last request is known.
const CAUTION_KNOWN: f64 = 1.05;
/// How much that counts, in bytes, against what answers tell.
const FIRST_GUESS_BYTES: f64 = 100_000.0;
/// What is left of earlier answers' weight at each new one.
const REMEMBERED: f64 = 0.95;

/// A ceiling stands this far below what the workspace had let in when it refused.
const MARGIN: f64 = 0.95;
/// How much a ceiling rises in each minute without a 429.
const RELAXATION: f64 = 0.01;
/// A request that was let in so far above a ceiling shows that there is none.
const DISPROVED: f64 = 1.1;
/// A ceiling ends after so long without a 429: it may have come from somebody else's use of the same quota.
const CEILING_ENDS: Duration = Duration::from_secs(10 * 60);
/// An account without configured limits ends when nothing in it counts any more.
const FORGOTTEN: Duration = Duration::from_secs(61 * 60);

/// What a workspace seems to let in.
#[derive(Debug, Clone, Copy)]
struct Ceiling {
    tokens: f64,
    since: Instant,
    /// The workspace said that it is this limit.
    is_named: bool,
}

impl Ceiling {
    fn now(self, now: Instant) -> u64 {
        (self.tokens * self.risen(now)) as u64
    }

    fn risen(self, now: Instant) -> f64 {
        let minutes = now.saturating_duration_since(self.since).as_secs_f64() / MINUTE.as_secs_f64();
        1.0 + RELAXATION * minutes
    }
}

/// The account.
#[derive(Debug, Clone)]
pub struct Ledger {
    /// The configured limits.
    pub quota: Quota,
    windows: PerKind<Window>,
    ceilings: PerKind<Option<Ceiling>>,
    used_at: Instant,
    known_tokens: f64,
    known_bytes: f64,
}

impl Ledger {
    /// An empty one.
    pub fn new(quota: Quota, now: Instant) -> Self {
        let minute = || Window::new(MINUTE, now);
        Self {
            quota,
            windows: PerKind { input: minute(), output: minute(), requests: Window::new(60 * MINUTE, now) },
            ceilings: PerKind::default(),
            used_at: now,
            known_tokens: TOKENS_PER_BYTE * FIRST_GUESS_BYTES,
            known_bytes: FIRST_GUESS_BYTES,
        }
    }

    /// Whether a request fits.
    pub fn room(&self, need: Need, now: Instant) -> Room {
        let has_ceiling = Kind::ALL.into_iter().any(|kind| self.ceilings.of(kind).is_some());
        if !has_ceiling && !self.is_configured() {
            return Room::Free;
        }
        let wanted = self.wanted(need);
        let full = Kind::ALL.into_iter().filter_map(|kind| {
            let most = (*self.quota.of(kind)).map(|limit| room_for(*wanted.of(kind), limit))?;
            let window = self.windows.of(kind);
            (window.sum(now) > most).then(|| (window.down_to(most, now), kind))
        });
        if let Some((until, kind)) = full.max_by_key(|(until, _)| *until) {
            return Room::Full { until, kind };
        }
        let above = Kind::ALL.into_iter().filter_map(|kind| {
            let ceiling = self.ceiling(kind, now)?;
            let (most, window) = (room_for(*wanted.of(kind), ceiling.now(now)), self.windows.of(kind));
            (window.sum(now) > most).then(|| (ceiling.is_named.then(|| window.down_to(most, now)), kind))
        });
        above.max_by_key(|(until, _)| *until).map_or(Room::Free, |(until, kind)| Room::Above { until, kind })
    }

    /// A limit is known: it is configured, or the workspace has named it.
    pub fn is_limited(&self, now: Instant) -> bool {
        let is_named = |kind| self.ceiling(kind, now).is_some_and(|ceiling| ceiling.is_named);
        self.is_configured() || Kind::ALL.into_iter().any(is_named)
    }

    /// Counts a request as let in.
    pub fn admit(&mut self, need: Need, now: Instant) -> Charge {
        let wanted = self.wanted(need);
        for kind in Kind::ALL {
            self.windows.of_mut(kind).add(*wanted.of(kind), now);
        }
        self.used_at = now;
        let reached = |kind: Kind| self.windows.of(kind).sum(now);
        let reached = PerKind { input: reached(Kind::Input), output: reached(Kind::Output), requests: 0 };
        Charge { at: now, bytes: need.bytes, input: wanted.input, output: wanted.output, reached }
    }

    /// Corrects what was counted to what the request came to.
    pub fn settle(&mut self, charge: Charge, spent: Spent, now: Instant) {
        self.used_at = self.used_at.max(now);
        let (input, output) = match spent {
            Spent::Nothing => {
                self.windows.requests.correct(charge.at, 1, 0);
                (Some(0), Some(0))
            }
            Spent::Ended { input, output } => (input, output),
            Spent::Unknown { input } => (input, None),
        };
        if let Some(tokens) = input {
            self.windows.input.correct(charge.at, charge.input, tokens);
        }
        if let Some(tokens) = output {
            self.windows.output.correct(charge.at, charge.output, tokens);
        }
        if let (Some(tokens), true) = (input, charge.bytes > 0 && spent != Spent::Nothing) {
            self.known_tokens = REMEMBERED * self.known_tokens + tokens as f64;
            self.known_bytes = REMEMBERED * self.known_bytes + charge.bytes as f64;
        }
        if let Spent::Ended { output: Some(1..), .. } = spent {
            self.was_let_in(charge, now);
        }
    }

    /// A ceiling that this request was above stands too low, and one that it was far above is none.
    fn was_let_in(&mut self, charge: Charge, now: Instant) {
        for kind in [Kind::Input, Kind::Output] {
            let reached = *charge.reached.of(kind) as f64;
            let ceiling = self.ceilings.of_mut(kind);
            if let Some(stands) = ceiling.as_mut().filter(|ceiling| ceiling.since <= charge.at) {
                if reached > DISPROVED * stands.now(charge.at) as f64 {
                    *ceiling = None;
                } else {
                    stands.tokens = stands.tokens.max(reached / stands.risen(now));
                }
            }
        }
    }

    /// The workspace has refused a request: what it had let in within the last window is about what it lets in. It may
    /// have let in more that this account does not know of, from before a restart or from somebody else; then the
    /// ceiling stands too low, until requests that go all the same show it.
    pub fn limited(&mut self, kind: Option<Kind>, now: Instant) {
        for which in [Kind::Input, Kind::Output] {
            let let_in = self.windows.of(which).sum(now);
            let is_meant = kind.is_none_or(|kind| kind == which) && self.quota.of(which).is_none();
            if is_meant && let_in > 0 {
                let (tokens, is_named) = (MARGIN * let_in as f64, kind == Some(which));
                *self.ceilings.of_mut(which) = Some(Ceiling { tokens, since: now, is_named });
            }
        }
    }

    /// Forgets what 429s have taught.
    pub fn forget_learned(&mut self) {
        self.ceilings = PerKind::default();
    }

    /// True when there is nothing left to keep account for.
    pub fn is_over(&self, now: Instant) -> bool {
        !self.is_configured() && now.saturating_duration_since(self.used_at) >= FORGOTTEN
    }

    /// A limit of this model is configured.
    pub fn is_configured(&self) -> bool {
        self.quota != Quota::default()
    }

    /// When it was used last.
    pub fn used_at(&self) -> Instant {
        self.used_at
    }

    /// For display.
    pub fn levels(&self, now: Instant) -> PerKind<Level> {
        let level = |kind: Kind| Level {
            limit: *self.quota.of(kind),
            ceiling: self.ceiling(kind, now).map(|ceiling| ceiling.now(now)),
            used: self.windows.of(kind).sum(now),
        };
        PerKind { input: level(Kind::Input), output: level(Kind::Output), requests: level(Kind::Requests) }
    }

    fn ceiling(&self, kind: Kind, now: Instant) -> Option<Ceiling> {
        let ceiling = (*self.ceilings.of(kind))?;
        (now.saturating_duration_since(ceiling.since) < CEILING_ENDS).then_some(ceiling)
    }

    /// What a request is expected to take.
    fn wanted(&self, need: Need) -> PerKind<u64> {
        let usual = CAUTION * self.known_tokens / self.known_bytes;
        let density = need.density.map_or(usual, |known| CAUTION_KNOWN * known);
        let input = (need.bytes as f64 * density).ceil() as u64;
        PerKind { input, output: need.max_tokens.unwrap_or(OUTPUT_UNSPECIFIED), requests: 1 }
    }
}

/// How much may count already for a request to be let in. One that is larger than the limit by itself would never fit:
/// it goes when at least half is free, for the workspace to decide.
fn room_for(wanted: u64, limit: u64) -> u64 {
    limit.checked_sub(wanted).unwrap_or(limit / 2)
}
