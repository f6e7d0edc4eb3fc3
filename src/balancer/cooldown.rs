//! What is kept away from an endpoint for a while: one model that is over its limit, or everything when the
//! endpoint's credential is refused. Pure; the time is an argument.
//!
//! Apart from the breaker on purpose: a workspace that is out of quota for one model is not broken.

use std::time::{Duration, Instant};

use crate::outcome::KeepOut;

/// How many models of one endpoint are remembered; the one that ends first makes room.
const MODELS_MAX: usize = 64;
/// A model that does not exist in a workspace is not asked for again for this long.
const MODEL_LONG: Duration = Duration::from_secs(600);
/// An endpoint without a token is looked at again after this long.
const NO_TOKEN_PAUSE: Duration = Duration::from_secs(10);

/// How long a model rests first, and at most, when nobody said for how long.
const REST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(60);

/// A pause that grows each time it was not long enough.
#[derive(Debug, Clone, Copy)]
struct Backoff {
    until: Instant,
    span: Duration,
    /// When the pause before this one ended, if this one is longer for it.
    grown_since: Option<Instant>,
    /// Any answer that ends may end it: it gives back output tokens that it had reserved.
    ends_with_an_answer: bool,
}

impl Backoff {
    fn new(span: Duration, now: Instant) -> Self {
        Self { until: now + span, span, grown_since: None, ends_with_an_answer: false }
    }

    /// The next pause: `first`, and twice the last one each time, up to `longest`. Failures that arrive while a
    /// pause still runs belong to the same bad moment and do not double it.
    fn next(last: Option<Self>, first: Duration, longest: Duration, now: Instant) -> Self {
        match last {
            None => Self::new(first, now),
            Some(last) if now < last.until => last,
            Some(last) => {
                let grown_since = Some(last.until);
                Self { grown_since, ..Self::new((last.span * 2).min(longest), now) }
            }
        }
    }
}

/// Why something is kept out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// 429 for this model.
    Limited,
    /// 529 for this model.
    Overloaded,
    /// The workspace does not have this model, or gives it no quota.
    ModelUnavailable,
    /// The workspace asked for a pause (Retry-After).
    AskedToWait,
    /// There is no token to send.
    NoToken,
    /// The workspace does not accept our credential.
    Rejected,
    /// The workspace does not accept our address.
    AddressBlocked,
}

impl Reason {
    /// The word shown in /stats.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Limited => "rate_limited",
            Reason::Overloaded => "overloaded",
            Reason::ModelUnavailable => "model_unavailable",
            Reason::AskedToWait => "asked_to_wait",
            Reason::NoToken => "no_token",
            Reason::Rejected => "credential_rejected",
            Reason::AddressBlocked => "address_blocked",
        }
    }

    /// True for what passes within a minute or so, and is nobody's mistake: 429 and 529.
    pub fn is_rest(self) -> bool {
        matches!(self, Reason::Limited | Reason::Overloaded)
    }
}

/// Something that was just put aside, worth a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    /// The model, or everything.
    pub model: Option<String>,
    /// Why.
    pub reason: Reason,
    /// For how long from now.
    pub span: Duration,
}

/// Something that was put aside and has just worked again, worth a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The model, or everything.
    pub model: Option<String>,
    /// Why it had been put aside.
    pub reason: Reason,
}

/// What keeps a model away now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Every model is kept away, not only this one.
    pub is_whole: bool,
    /// Why.
    pub reason: Reason,
    /// When it ends.
    pub until: Instant,
}

/// What is in force now, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The model, or everything.
    pub model: Option<String>,
    /// Why.
    pub reason: Reason,
    /// When it ends.
    pub until: Instant,
}

/// The pauses of one endpoint.
#[derive(Debug, Clone, Default)]
pub struct Cooldowns {
    models: Vec<(String, Reason, Backoff)>,
    endpoint: Option<(Reason, Backoff)>,
}

impl Cooldowns {
    /// What keeps this model away from the endpoint now, the longest hold first.
    pub fn hold(&self, model: &str, now: Instant) -> Option<Held> {
        let held = |is_whole, reason, backoff: Backoff| Held { is_whole, reason, until: backoff.until };
        let whole = self.endpoint.map(|(reason, backoff)| held(true, reason, backoff));
        let model = self.model(model).map(|(reason, backoff)| held(false, reason, backoff));
        whole.into_iter().chain(model).filter(|held| now < held.until).max_by_key(|held| held.until)
    }

    /// Everything in force, for display.
    pub fn holds(&self, now: Instant) -> Vec<Hold> {
        let whole =
            self.endpoint.iter().map(|(reason, b)| Hold { model: None, reason: *reason, until: b.until });
        let models = self.models.iter().map(|(name, reason, b)| Hold {
            model: Some(name.clone()),
            reason: *reason,
            until: b.until,
        });
        whole.chain(models).filter(|hold| now < hold.until).collect()
    }

    /// Puts something aside. Says what changed, unless it was aside already.
    pub fn keep_out(&mut self, what: KeepOut, model: &str, now: Instant) -> Option<Parked> {
        const SECOND: Duration = Duration::from_secs(1);
        let for_span = |span| Backoff::new(span, now);
        match what {
            KeepOut::Model(Some(span)) => self.set_model(model, Reason::Limited, for_span(span), now),
            KeepOut::Model(None) => self.rest(model, Reason::Limited, now),
            KeepOut::ModelOverloaded => self.rest(model, Reason::Overloaded, now),
            KeepOut::ModelLong => self.set_model(model, Reason::ModelUnavailable, for_span(MODEL_LONG), now),
            KeepOut::Endpoint(span) => self.set_endpoint(Reason::AskedToWait, for_span(span), now),
            KeepOut::NoToken => self.set_endpoint(Reason::NoToken, for_span(NO_TOKEN_PAUSE), now),
            KeepOut::EndpointParked | KeepOut::EndpointBlocked => {
                let is_parked = |reason: &Reason| matches!(reason, Reason::Rejected | Reason::AddressBlocked);
                let last = self.endpoint.filter(|(reason, _)| is_parked(reason)).map(|(_, b)| b);
                let next = Backoff::next(last, 60 * SECOND, 1800 * SECOND, now);
                let reason = match what {
                    KeepOut::EndpointBlocked => Reason::AddressBlocked,
                    _ => Reason::Rejected,
                };
                self.set_endpoint(reason, next, now)
            }
        }
    }

    /// A success of a request that was taken at `taken`: what was held before that is no longer true. A request that
    /// was underway when the hold began proves nothing about it. But one that was let in between two rests proves that
    /// the first was long enough, so the second need not be longer: of a crowd that comes back together some are
    /// refused at once, and the others' answers come later.
    pub fn forgive(&mut self, model: &str, taken: Instant) -> Vec<Recovered> {
        let mut recovered = Vec::new();
        for (_, _, backoff) in self.models.iter_mut().filter(|(name, ..)| name == model) {
            if backoff.grown_since.is_some_and(|end| end <= taken) && taken < backoff.until {
                let since = backoff.until - backoff.span;
                *backoff =
                    Backoff { ends_with_an_answer: backoff.ends_with_an_answer, ..Backoff::new(REST, since) };
            }
        }
        let is_over = |b: &Backoff| b.until <= taken || b.ends_with_an_answer;
        if let Some(at) = self.models.iter().position(|(name, _, b)| name == model && is_over(b)) {
            let (model, reason, _) = self.models.swap_remove(at);
            recovered.push(Recovered { model: Some(model), reason });
        }
        if let Some((reason, _)) = self.endpoint.filter(|(_, b)| b.until <= taken) {
            self.endpoint = None;
            recovered.push(Recovered { model: None, reason });
        }
        recovered
    }

    /// The model rests for want of output tokens. How long that takes was not said, so it ends with the next answer.
    pub fn wants_output(&mut self, model: &str) {
        for (_, _, backoff) in self.models.iter_mut().filter(|(name, ..)| name == model) {
            backoff.ends_with_an_answer = true;
        }
    }

    /// The credential may be another one now, or the way to the workspace.
    pub fn forget_rejection(&mut self) {
        let is_kept =
            |reason: &Reason| !matches!(reason, Reason::Rejected | Reason::AddressBlocked | Reason::NoToken);
        self.endpoint = self.endpoint.filter(|(reason, _)| is_kept(reason));
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn model(&self, model: &str) -> Option<(Reason, Backoff)> {
        self.models.iter().find(|(name, ..)| name == model).map(|(_, reason, backoff)| (*reason, *backoff))
    }

    /// 5 s doubling to 60 s; 429 and 529 in turn are one bad time.
    fn rest(&mut self, model: &str, reason: Reason, now: Instant) -> Option<Parked> {
        let last = self.model(model).filter(|(reason, _)| reason.is_rest()).map(|(_, b)| b);
        let next = Backoff::next(last, REST, REST_MAX, now);
        self.set_model(model, reason, next, now)
    }

    fn set_model(&mut self, model: &str, reason: Reason, next: Backoff, now: Instant) -> Option<Parked> {
        let last = self.model(model);
        // A late answer that asks for less does not let anybody back in early.
        if next.until <= now || last.is_some_and(|(_, b)| next.until <= b.until) {
            return None;
        }
        let was_out = last.is_some_and(|(was, b)| was == reason && now < b.until);
        self.models.retain(|(name, ..)| name != model);
        if self.models.len() >= MODELS_MAX
            && let Some(first) = (0..self.models.len()).min_by_key(|&i| self.models[i].2.until)
        {
            self.models.swap_remove(first);
        }
        self.models.push((model.to_string(), reason, next));
        (!was_out).then(|| Parked { model: Some(model.to_string()), reason, span: next.until - now })
    }

    fn set_endpoint(&mut self, reason: Reason, next: Backoff, now: Instant) -> Option<Parked> {
        // As above, such as with `Retry-After: 0`.
        if next.until <= now || self.endpoint.is_some_and(|(_, b)| next.until <= b.until) {
            return None;
        }
        let was_out = self.endpoint.is_some_and(|(was, b)| was == reason && now < b.until);
        self.endpoint = Some((reason, next));
        (!was_out).then_some(Parked { model: None, reason, span: next.until - now })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn spans(what: KeepOut, times: usize) -> Vec<u64> {
        let (mut cooldowns, mut now) = (Cooldowns::default(), crate::env::now());
        (0..times)
            .map(|_| {
                let span = cooldowns.keep_out(what, "m", now).expect("a new hold").span;
                now += span;
                span.as_secs()
            })
            .collect()
    }

    #[test]
    fn pauses_double_up_to_their_limit() {
        assert_eq!(spans(KeepOut::Model(None), 6), [5, 10, 20, 40, 60, 60]);
        assert_eq!(spans(KeepOut::ModelOverloaded, 6), [5, 10, 20, 40, 60, 60]);
        assert_eq!(spans(KeepOut::EndpointParked, 7), [60, 120, 240, 480, 960, 1800, 1800]);
        assert_eq!(spans(KeepOut::EndpointBlocked, 7), [60, 120, 240, 480, 960, 1800, 1800]);
        assert_eq!(spans(KeepOut::Model(Some(seconds(7))), 3), [7, 7, 7]);
        assert_eq!(spans(KeepOut::ModelLong, 2), [600, 600]);
    }

    #[test]
    fn a_model_over_its_limit_leaves_the_others_alone() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::Model(None), "opus", now);
        assert!(cooldowns.hold("opus", now).is_some());
        assert!(cooldowns.hold("sonnet", now).is_none());
        assert!(cooldowns.hold("opus", now + seconds(5)).is_none());
        cooldowns.keep_out(KeepOut::EndpointParked, "opus", now);
        assert_eq!(cooldowns.hold("sonnet", now).unwrap().reason, Reason::Rejected);
    }

    /// Ten requests in flight that all get 429 are one bad moment, not ten.
    #[test]
    fn failures_during_a_pause_do_not_double_it() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        assert!(cooldowns.keep_out(KeepOut::Model(None), "m", now).is_some());
        for _ in 0..9 {
            assert_eq!(cooldowns.keep_out(KeepOut::Model(None), "m", now + seconds(1)), None);
        }
        assert!(cooldowns.hold("m", now + seconds(5)).is_none());
    }

    #[test]
    fn a_success_starts_the_count_anew() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::Model(None), "m", now);
        let recovered = cooldowns.forgive("m", now + seconds(5));
        assert_eq!(recovered, [Recovered { model: Some("m".into()), reason: Reason::Limited }]);
        assert_eq!(cooldowns.forgive("m", now + seconds(5)), [], "said once");
        let again = cooldowns.keep_out(KeepOut::Model(None), "m", now + seconds(60)).unwrap();
        assert_eq!(again.span, seconds(5));
    }

    /// Of ten that came back together after a rest, nine were let in and one was not. It doubled the rest at once, and
    /// the nine answers came too late to start the count anew: in the end the workspace worked for a few seconds in
    /// each minute.
    #[test]
    fn a_rest_does_not_grow_while_requests_are_let_in_between() {
        let (mut cooldowns, start) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::Model(None), "m", start);
        let mut now = start + seconds(5);
        for _ in 0..10 {
            let grown = cooldowns.keep_out(KeepOut::Model(None), "m", now).expect("a rest").span;
            assert_eq!(grown, seconds(10));
            assert_eq!(cooldowns.forgive("m", now), [], "the rest itself goes on");
            assert!(cooldowns.hold("m", now + seconds(4)).is_some());
            now += seconds(5);
            assert!(cooldowns.hold("m", now).is_none(), "no longer than the first");
        }
        cooldowns.keep_out(KeepOut::Model(None), "m", now);
        cooldowns.forgive("m", now - seconds(1));
        assert!(cooldowns.hold("m", now + seconds(9)).is_some(), "what was let in before tells nothing");
    }

    #[test]
    fn a_rest_for_want_of_output_ends_with_an_answer() {
        let (mut cooldowns, start) = (Cooldowns::default(), crate::env::now());
        let now = start + seconds(1);
        cooldowns.keep_out(KeepOut::Model(None), "m", now);
        cooldowns.keep_out(KeepOut::Model(None), "other", now);
        cooldowns.wants_output("m");
        cooldowns.forgive("other", start);
        let recovered = cooldowns.forgive("m", start);
        assert_eq!(recovered, [Recovered { model: Some("m".into()), reason: Reason::Limited }]);
        assert!(cooldowns.hold("m", now).is_none() && cooldowns.hold("other", now).is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        for i in 0..1000 {
            cooldowns.keep_out(KeepOut::Model(None), &format!("m{i}"), now + seconds(i));
        }
        assert!(cooldowns.models.len() <= MODELS_MAX);
        assert!(cooldowns.hold("m999", now + seconds(1000)).is_some());
    }

    /// A 503 with `Retry-After: 0` that arrived late put an endpoint back into service whose token had just been
    /// refused.
    #[test]
    fn a_shorter_hold_does_not_end_a_longer_one() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::EndpointParked, "m", now);
        assert_eq!(cooldowns.keep_out(KeepOut::Endpoint(seconds(0)), "m", now), None);
        let hold = cooldowns.hold("m", now + seconds(59)).expect("still out");
        assert_eq!(hold.reason, Reason::Rejected);
        assert!(cooldowns.keep_out(KeepOut::Endpoint(seconds(90)), "m", now).is_some());
        assert!(cooldowns.hold("m", now + seconds(89)).is_some());
    }

    /// An answer that had begun before the 429 and ended well after it put the model back into service at once, so
    /// that under load no rest ever lasted.
    #[test]
    fn a_success_from_before_a_hold_ends_nothing() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::Model(None), "m", now);
        cooldowns.keep_out(KeepOut::EndpointParked, "m", now);
        assert_eq!(cooldowns.forgive("m", now), []);
        assert_eq!(cooldowns.forgive("m", now + seconds(4)), []);
        assert!(cooldowns.hold("m", now + seconds(4)).is_some());
        let model = Recovered { model: Some("m".into()), reason: Reason::Limited };
        assert_eq!(cooldowns.forgive("m", now + seconds(5)), [model]);
        assert!(cooldowns.hold("m", now + seconds(59)).is_some(), "the token is still refused");
        assert_eq!(cooldowns.forgive("m", now + seconds(60)).len(), 1);
    }

    /// A late 429 put a model back into service after 5 s that the workspace does not have.
    #[test]
    fn a_rest_does_not_end_a_longer_hold_of_the_model() {
        let (mut cooldowns, now) = (Cooldowns::default(), crate::env::now());
        cooldowns.keep_out(KeepOut::ModelLong, "m", now);
        for late in [KeepOut::Model(None), KeepOut::Model(Some(seconds(7))), KeepOut::ModelOverloaded] {
            assert_eq!(cooldowns.keep_out(late, "m", now + seconds(1)), None);
        }
        assert_eq!(cooldowns.hold("m", now + seconds(599)).unwrap().reason, Reason::ModelUnavailable);
    }

    #[test]
    fn limits_and_overload_in_turn_double_one_pause() {
        let (mut cooldowns, mut now) = (Cooldowns::default(), crate::env::now());
        let turns = [KeepOut::Model(None), KeepOut::ModelOverloaded, KeepOut::Model(None)];
        let seen = turns.map(|what| {
            let parked = cooldowns.keep_out(what, "m", now).unwrap();
            now += parked.span;
            (parked.reason.word(), parked.span.as_secs())
        });
        assert_eq!(seen, [("rate_limited", 5), ("overloaded", 10), ("rate_limited", 20)]);
    }
}
