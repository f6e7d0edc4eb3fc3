//! How one attempt at one endpoint ended, and who is to blame. Pure.
//!
//! [`Outcome::blame`] is the only place that decides whether the breaker counts, and whether and for how long the
//! endpoint (or one model on it) is kept out. Whether another endpoint is tried is decided in `retry`, and nowhere
//! else. The table behind both stands in the README under "What happens when".

use std::time::Duration;

pub use crate::anthropic::error::Meaning;

/// The end of one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The answer was relayed whole, including a stream that ended with an honest `error` event after content.
    Completed,
    /// There is no token to send: its file cannot be read, or OAuth failed. Nothing was sent.
    NoCredential,
    /// No connection: refused, timed out, TLS or DNS failed.
    ConnectFailed,
    /// The connection ended, or brought something that is not HTTP, before a status was known.
    NoAnswer,
    /// No status, or no byte of the body, within `first_byte`.
    FirstByteTimeout,
    /// The upstream answered with an error status.
    Refused {
        /// The HTTP status, 300 or more.
        status: u16,
        /// The Retry-After it came with.
        retry_after: Option<Duration>,
        /// What the body told.
        meaning: Meaning,
    },
    /// 200, but with a web page: a login page or a captive portal.
    WebPage,
    /// The first event that mattered was an `error`; the status its type stands for.
    ErrorEvent {
        /// 529 for `overloaded_error`, 429 for `rate_limit_error`, and so on.
        status: u16,
    },
    /// Cut or silent before the client got any content: nothing is lost yet.
    BrokeBeforeContent,
    /// Cut or silent after content went to the client.
    BrokeAfterContent,
    /// The client went away.
    ClientGone,
    /// Nothing was sent, for a reason that has nothing to do with the endpoint.
    Local,
}

/// What the breaker makes of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The endpoint works: the count of consecutive failures goes back to zero.
    Success,
    /// One more consecutive failure.
    Failure,
    /// Says nothing about the endpoint's health.
    Neutral,
}

/// What is kept away from new traffic, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepOut {
    /// This model here, which is over its limit: the time given, else 5 s doubling to 60 s.
    Model(Option<Duration>),
    /// This model here, 5 s doubling to 60 s: the workspace has too much to do.
    ModelOverloaded,
    /// This model here for a fixed long time: it does not exist, or has no quota at all.
    ModelLong,
    /// The whole endpoint, for the time given.
    Endpoint(Duration),
    /// The whole endpoint, for a moment: there is no token to send.
    NoToken,
    /// The whole endpoint, 60 s doubling to 30 min: its credential is not accepted.
    EndpointParked,
    /// The whole endpoint, as long: it does not talk to our address.
    EndpointBlocked,
}

/// Who is to blame, in all the terms the balancer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blame {
    /// What the breaker counts.
    pub verdict: Verdict,
    /// What is kept away from new traffic.
    pub keep_out: Option<KeepOut>,
    /// Shown as `total_errors`: the endpoint did not do what was asked of it.
    pub is_error: bool,
}

impl Outcome {
    /// Who is to blame. Exhaustive on purpose: a new outcome must be judged here.
    pub fn blame(&self) -> Blame {
        use KeepOut::{
            Endpoint, EndpointBlocked, EndpointParked, Model, ModelLong, ModelOverloaded, NoToken,
        };
        use Verdict::{Failure, Neutral, Success};
        let blame = |verdict, keep_out, is_error| Blame { verdict, keep_out, is_error };
        match *self {
            Outcome::Completed => blame(Success, None, false),
            Outcome::NoCredential => blame(Failure, Some(NoToken), true),
            Outcome::ConnectFailed
            | Outcome::NoAnswer
            | Outcome::FirstByteTimeout
            | Outcome::WebPage
            | Outcome::BrokeBeforeContent
            | Outcome::BrokeAfterContent => blame(Failure, None, true),
            Outcome::Refused { meaning: Meaning::RequestLimitExceeded, retry_after, .. }
            | Outcome::Refused { status: 429, retry_after, .. } => {
                blame(Failure, Some(Model(retry_after)), true)
            }
            Outcome::Refused { status: 529, .. } => blame(Neutral, Some(ModelOverloaded), true),
            Outcome::Refused { meaning: Meaning::RateLimitZero, .. } => blame(Neutral, Some(ModelLong), true),
            Outcome::Refused { meaning: Meaning::IpBlocked, .. } => {
                blame(Neutral, Some(EndpointBlocked), true)
            }
            Outcome::Refused { status: 401 | 403, .. } => blame(Neutral, Some(EndpointParked), true),
            Outcome::Refused { meaning: Meaning::ModelMissing, .. } => blame(Neutral, Some(ModelLong), true),
            Outcome::Refused { status: 500.., retry_after, .. } => {
                blame(Failure, retry_after.map(Endpoint), true)
            }
            // A redirect is a misconfigured endpoint or a login gate, never an answer.
            Outcome::Refused { status: 300..=399, .. } => blame(Failure, None, true),
            // The client's own mistake, and often on purpose: it repairs itself from the words.
            Outcome::Refused { .. } => blame(Neutral, None, false),
            Outcome::ErrorEvent { status: 529 } => blame(Neutral, Some(ModelOverloaded), true),
            Outcome::ErrorEvent { status: 429 } => blame(Failure, Some(Model(None)), true),
            Outcome::ErrorEvent { status: 500.. } => blame(Failure, None, true),
            Outcome::ErrorEvent { .. } => blame(Neutral, None, false),
            Outcome::ClientGone | Outcome::Local => blame(Neutral, None, false),
        }
    }

    /// True when the endpoint let nothing in because a rate limit is used up.
    pub fn is_rate_limit(&self) -> bool {
        matches!(
            self,
            Self::Refused { meaning: Meaning::RequestLimitExceeded, .. }
                | Self::Refused { status: 429, .. }
                | Self::ErrorEvent { status: 429 }
        )
    }

    /// A word for the access line and for /explain.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::NoCredential => "no_credential",
            Outcome::ConnectFailed => "connect_failed",
            Outcome::NoAnswer => "no_answer",
            Outcome::FirstByteTimeout => "first_byte_timeout",
            Outcome::Refused { .. } => "refused",
            Outcome::WebPage => "web_page",
            Outcome::ErrorEvent { .. } => "error_event",
            Outcome::BrokeBeforeContent => "broke_before_content",
            Outcome::BrokeAfterContent => "broke_after_content",
            Outcome::ClientGone => "client_gone",
            Outcome::Local => "local",
        }
    }
}

/// Reads a Retry-After value: seconds, or an HTTP date seen from `wall_clock` (time since 1970). Capped at an hour,
/// so that one strange header cannot keep a workspace out for a day.
pub fn retry_after(value: &str, wall_clock: Duration) -> Option<Duration> {
    const LONGEST: Duration = Duration::from_secs(3600);
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return (seconds >= 0.0)
            .then(|| Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    let date = date.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(date.saturating_sub(wall_clock).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16) -> Outcome {
        Outcome::Refused { status, retry_after: None, meaning: Meaning::Other }
    }

    /// The table of the README, row by row.
    #[test]
    fn blame_follows_the_table() {
        use KeepOut::*;
        use Verdict::*;
        let after = Some(Duration::from_secs(7));
        let with = |status, meaning| Outcome::Refused { status, retry_after: after, meaning };
        for (outcome, verdict, keep_out, is_error) in [
            (Outcome::Completed, Success, None, false),
            (Outcome::NoCredential, Failure, Some(NoToken), true),
            (Outcome::ConnectFailed, Failure, None, true),
            (Outcome::NoAnswer, Failure, None, true),
            (Outcome::FirstByteTimeout, Failure, None, true),
            (Outcome::WebPage, Failure, None, true),
            (Outcome::BrokeBeforeContent, Failure, None, true),
            (Outcome::BrokeAfterContent, Failure, None, true),
            (refused(500), Failure, None, true),
            (refused(502), Failure, None, true),
            (with(503, Meaning::Other), Failure, Some(Endpoint(Duration::from_secs(7))), true),
            (refused(504), Failure, None, true),
            (refused(520), Failure, None, true),
            (refused(429), Failure, Some(Model(None)), true),
            (with(429, Meaning::Other), Failure, Some(Model(after)), true),
            (with(400, Meaning::RequestLimitExceeded), Failure, Some(Model(after)), true),
            (refused(529), Neutral, Some(ModelOverloaded), true),
            (refused(401), Neutral, Some(EndpointParked), true),
            (refused(403), Neutral, Some(EndpointParked), true),
            (with(403, Meaning::RateLimitZero), Neutral, Some(ModelLong), true),
            (with(403, Meaning::IpBlocked), Neutral, Some(EndpointBlocked), true),
            (with(404, Meaning::ModelMissing), Neutral, Some(ModelLong), true),
            (refused(404), Neutral, None, false),
            (refused(400), Neutral, None, false),
            (refused(413), Neutral, None, false),
            (refused(422), Neutral, None, false),
            (refused(307), Failure, None, true),
            (Outcome::ErrorEvent { status: 529 }, Neutral, Some(ModelOverloaded), true),
            (Outcome::ErrorEvent { status: 429 }, Failure, Some(Model(None)), true),
            (Outcome::ErrorEvent { status: 500 }, Failure, None, true),
            (Outcome::ErrorEvent { status: 400 }, Neutral, None, false),
            (Outcome::ClientGone, Neutral, None, false),
            (Outcome::Local, Neutral, None, false),
        ] {
            assert_eq!(outcome.blame(), Blame { verdict, keep_out, is_error }, "{outcome:?}");
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let clock = Duration::from_secs(784_111_777 - 30);
        for (value, seconds) in [
            ("0", Some(0.0)),
            ("7", Some(7.0)),
            (" 1.5 ", Some(1.5)),
            ("999999999", Some(3600.0)),
            ("1e300", Some(3600.0)),
            ("-1", None),
            ("NaN", None),
            ("soon", None),
            ("", None),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30.0)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0.0)),
        ] {
            assert_eq!(retry_after(value, clock), seconds.map(Duration::from_secs_f64), "{value:?}");
        }
    }
}
