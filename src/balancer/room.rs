//! Which of the endpoints that could serve a request have room for it, and what is told when none has.

use std::time::{Duration, Instant};

use super::decision::{Considered, Decision, Out};
use super::limits::{Kind, Level, Need, Quota, Room};
use super::{Ask, Balancer, Inner, Member, Unavailable, Why};

/// An endpoint's configured limit that stands in a request's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// The endpoint's name.
    pub endpoint: String,
    /// Which limit.
    pub kind: Kind,
    /// The limit, and what is used of it.
    pub level: Level,
    /// Until there is room, if nothing changes.
    pub wait: Duration,
}

/// When to ask again while running answers hold what is reserved for them. How soon they end nobody knows; until then
/// a request may wait in line once more.
const RUNNING_ENDS: Duration = Duration::from_secs(5);
/// What 429s have taught holds no request back for longer.
const LEARNED_WAIT_MAX: Duration = Duration::from_secs(10);
/// Claude Code gives up at once when it is told to wait for longer, and sleeps exactly this long up to here.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

impl Unavailable {
    /// True when there may be room in time for a request that has waited since then and may wait for so long.
    pub fn is_worth_waiting(self, since: Instant, longest: Duration, now: Instant) -> bool {
        let Why::NoRoom { may_be_sooner, is_learned } = self.why else { return false };
        let until = since + if is_learned { longest.min(LEARNED_WAIT_MAX) } else { longest };
        now < until && (may_be_sooner || self.soonest.is_some_and(|soonest| now + soonest <= until))
    }

    /// True when it may go all the same: a learned ceiling may be wrong, and only the workspace can tell.
    pub fn may_insist(self) -> bool {
        matches!(self.why, Why::NoRoom { is_learned: true, .. })
    }

    /// When the client should ask again.
    pub fn retry_after(self) -> Duration {
        let longest = match self.why {
            Why::NoRoom { may_be_sooner: true, .. } => RUNNING_ENDS,
            _ => RETRY_AFTER_MAX,
        };
        self.soonest.unwrap_or_default().clamp(Duration::from_secs(1), longest)
    }
}

impl<T> Balancer<T> {
    /// What stands in the way of this request, endpoint by endpoint.
    pub fn shortages(&self, ask: Ask<'_>, now: Instant) -> Vec<Shortage> {
        let inner = self.inner.lock();
        let ask = inner.sized(ask);
        let serving = inner.members.iter().filter(|m| m.endpoint.serves(ask.model));
        let shortage = |m: &Member<T>| match m.room(ask, now) {
            Room::Full { until, kind } => Some(Shortage {
                endpoint: m.endpoint.name.clone(),
                kind,
                level: *m.ledgers.level(&m.endpoint.limits, ask.model, now).of(kind),
                wait: until.saturating_duration_since(now),
            }),
            Room::Free | Room::Above { .. } => None,
        };
        serving.filter_map(shortage).collect()
    }
}

impl<T> Inner<T> {
    /// The request with what is known of its conversation's size, where an account is kept.
    pub(super) fn sized<'a>(&self, ask: Ask<'a>) -> Ask<'a> {
        if self.members.iter().all(|m| m.ledgers.is_empty()) {
            return ask;
        }
        let density = ask.session.and_then(|session| self.affinity.density(session));
        Ask { need: Need { density, ..ask.need }, ..ask }
    }

    /// Those above what was learned are out as long as there is one that is not. Where the workspace has named its
    /// limit they are out even without, until the request insists; then, and where it has not, another one is better,
    /// none is not. Nobody who came later takes the room that somebody waits for.
    pub(super) fn prefer_room(&self, considered: &mut [Considered], ask: Ask<'_>, now: Instant) {
        if self.members.iter().all(|m| m.ledgers.is_empty()) {
            return;
        }
        let is_behind = self.line.is_behind(ask.model, ask.place);
        let rank = |one: &Considered| {
            let member = &self.members[one.candidate.index];
            match member.room(ask, now) {
                Room::Above { until: Some(_), .. } => 2,
                _ if is_behind && member.ledgers.is_limited(ask.model, now) => 2,
                Room::Above { until: None, .. } => 1,
                _ => 0,
            }
        };
        let best = considered.iter().filter(|one| one.out.is_none()).map(rank).min();
        let most = best.map_or(0, |best| if best == 2 && !ask.insists { 1 } else { best });
        let above = considered.iter_mut().filter(|one| one.out.is_none() && rank(one) > most);
        above.for_each(|one| one.out = Some(Out::AboveLearnedLimit));
    }

    /// The answer when endpoints could serve this request, but have no room for it.
    pub(super) fn no_room(&self, ask: Ask<'_>, decision: &Decision, now: Instant) -> Option<Unavailable> {
        let short = || decision.considered.iter().filter(|one| one.out.is_some_and(Out::is_no_room));
        let soonest = short().map(|one| self.members[one.candidate.index].room_at(ask, now)).min()?;
        let may_be_sooner = short().any(|one| match one.out {
            Some(Out::BehindOthers) => true,
            // What a running request has reserved and does not use is free as soon as its answer ends.
            Some(Out::AtLimit(kind)) => kind == Kind::Output && one.candidate.active > 0,
            Some(Out::AboveLearnedLimit) => match self.members[one.candidate.index].room(ask, now) {
                Room::Above { kind, .. } => kind == Kind::Output && one.candidate.active > 0,
                // It is behind others, too.
                Room::Free | Room::Full { .. } => true,
            },
            _ => false,
        });
        let is_learned = short().any(|one| one.out == Some(Out::AboveLearnedLimit));
        let soonest = Some(soonest.saturating_duration_since(now));
        Some(Unavailable { soonest, why: Why::NoRoom { may_be_sooner, is_learned } })
    }
}

impl<T> Member<T> {
    /// Whether it has room for this request.
    pub(super) fn room(&self, ask: Ask<'_>, now: Instant) -> Room {
        self.ledgers.room(ask.model, ask.need, now)
    }

    /// When there is room for this request at the latest; now, if there is.
    pub(super) fn room_at(&self, ask: Ask<'_>, now: Instant) -> Instant {
        match self.room(ask, now) {
            Room::Full { until, .. } => until,
            Room::Above { until: Some(until), .. } if !ask.insists => until,
            Room::Free | Room::Above { .. } => now,
        }
    }

    /// A limit is configured for this model.
    pub(super) fn is_limited(&self, model: &str) -> bool {
        self.endpoint.limits.of(model) != Quota::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ask, ask_for, balancer, endpoint, refused, settings};
    use super::super::{Endpoint, EndpointId, Lease, strategy::Strategy};
    use super::*;
    use crate::anthropic::sse::Usage;
    use crate::balancer::limits::{Limits, Need};
    use crate::outcome::Outcome;
    use std::sync::Arc;

    fn limited(name: &str, output: u64) -> Endpoint<()> {
        let each = Quota { output: Some(output), ..Quota::default() };
        Endpoint { limits: Limits { each, models: vec![] }, ..endpoint(name) }
    }

    fn reserving(ask: Ask<'_>, tokens: u64) -> Ask<'_> {
        Ask { need: Need { max_tokens: Some(tokens), ..Need::default() }, ..ask }
    }

    fn used(mut lease: Lease<()>, output: u64, now: Instant) {
        lease.reported(Usage { output_tokens: Some(output), ..Usage::default() });
        lease.finish(&Outcome::Completed, now);
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn requests_go_where_there_is_room() {
        let now = crate::env::now();
        let balancer = balancer(vec![limited("a", 1000), limited("b", 10_000)], now);
        let ask = reserving(ask("m"), 900);
        let leases: Vec<_> = (0..12).map_while(|_| balancer.pick(ask, now).ok()).collect();
        let of = |id| leases.iter().filter(|lease| lease.id() == id).count();
        assert_eq!((of(EndpointId(1)), of(EndpointId(2))), (1, 11));
        let nobody = balancer.pick(ask, now).err().expect("no room");
        assert_eq!(nobody.why, Why::NoRoom { may_be_sooner: true, is_learned: false });
        assert_eq!(nobody.soonest, Some(61 * SECOND));
        assert_eq!(nobody.retry_after(), 5 * SECOND, "an answer may end");
        assert!(balancer.pick(Ask { model: "other", ..ask }, now).is_ok(), "each model by itself");
        let shortages = balancer.shortages(ask, now);
        assert_eq!(shortages.len(), 2);
        assert_eq!((shortages[0].kind, shortages[0].level.used), (Kind::Output, 900));
        for lease in leases {
            used(lease, 100, now);
        }
        assert!(balancer.pick(ask, now).is_ok(), "what was not used is free again");
    }

    /// Retry-After is when the first endpoint has room, not when the first one is back.
    #[test]
    fn the_soonest_moment_counts_room_as_well() {
        let now = crate::env::now();
        let balancer = balancer(vec![limited("a", 1000), endpoint("b")], now);
        let (plain, tried) = (ask("m"), [EndpointId(2)]);
        let on_a = balancer.pick(Ask { tried: &tried, ..reserving(plain, 900) }, now).unwrap();
        used(on_a, 900, now);
        let on_b = balancer.pick(reserving(plain, 900), now).unwrap();
        assert_eq!(on_b.id(), EndpointId(2));
        let wait = Outcome::Refused {
            status: 429,
            retry_after: Some(90 * SECOND),
            meaning: crate::outcome::Meaning::Other,
        };
        on_b.finish(&wait, now);
        assert_eq!(balancer.soonest(reserving(plain, 900), now), Some(61 * SECOND));
        let nobody = balancer.pick(reserving(plain, 900), now).err().expect("no room, and one that rests");
        assert_eq!(nobody.why, Why::NoRoom { may_be_sooner: false, is_learned: false });
        assert!(
            nobody.is_worth_waiting(now, 61 * SECOND, now) && !nobody.is_worth_waiting(now, 60 * SECOND, now)
        );
        assert_eq!(nobody.retry_after(), RETRY_AFTER_MAX);
    }

    #[test]
    fn a_conversation_whose_endpoint_is_full_makes_a_detour() {
        let now = crate::env::now();
        let balancer = balancer(vec![limited("a", 1000), limited("b", 1000)], now);
        let first = balancer.pick(reserving(ask_for(1), 900), now).unwrap();
        let home = first.id();
        let detour = balancer.pick(reserving(ask_for(1), 900), now).unwrap();
        assert_ne!(detour.id(), home);
        used(first, 10, now);
        assert_eq!(balancer.pick(reserving(ask_for(1), 900), now).unwrap().id(), home);
        assert_eq!(balancer.affinity(now).1.detours, 1);
    }

    #[test]
    fn whoever_came_first_goes_first_and_only_so_many_wait() {
        let now = crate::env::now();
        let balancer = balancer(vec![limited("a", 1000)], now);
        let running = balancer.pick(reserving(ask("m"), 800), now).unwrap();
        let large = balancer.wait_in_line("m").unwrap();
        let small = balancer.wait_in_line("m").unwrap();
        let small_ask = Ask { place: Some(small.number()), ..reserving(ask("m"), 100) };
        assert!(balancer.pick(small_ask, now).is_err(), "it fits, but another one waits");
        assert!(balancer.pick(Ask { place: None, ..small_ask }, now).is_err(), "nor may a newcomer pass");
        assert!(balancer.pick(Ask { model: "other", place: None, ..small_ask }, now).is_ok());
        used(running, 10, now);
        let large_ask = Ask { place: Some(large.number()), ..reserving(ask("m"), 800) };
        assert!(balancer.pick(large_ask, now).is_ok());
        drop(large);
        assert!(balancer.pick(small_ask, now).is_ok());
        let others: Vec<_> = (0..7).map(|_| balancer.wait_in_line("m").unwrap()).collect();
        assert!(balancer.wait_in_line("m").is_none(), "eight wait");
        drop((small, others));
        assert_eq!(balancer.waiting(), 0);
    }

    /// Nobody is made to wait for a limit that was not named.
    #[test]
    fn above_a_learned_ceiling_another_one_is_better() {
        let now = crate::env::now();
        let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
        let to =
            |id: u64| Ask { tried: if id == 1 { &[EndpointId(2)] } else { &[EndpointId(1)] }, ..ask("m") };
        let full = |id| {
            used(balancer.pick(reserving(to(id), 1000), now).unwrap(), 1000, now);
            balancer.pick(to(id), now).unwrap().finish(&refused(429), now);
        };
        full(1);
        let now = now + 6 * SECOND;
        let seen = |now| {
            (0..20)
                .filter(|_| balancer.pick(reserving(ask("m"), 100), now).unwrap().id() == EndpointId(1))
                .count()
        };
        assert_eq!(seen(now), 0, "it has refused at as much");
        full(2);
        let now = now + 6 * SECOND;
        assert!(seen(now) > 0, "both are above");
        balancer.reset();
        assert!(seen(now) > 0);
    }

    /// One endpoint, which has refused a request after letting in 1,000 tokens of output within a minute.
    fn taught(now: Instant) -> Arc<super::Balancer<()>> {
        let balancer = balancer(vec![endpoint("a")], now - 30 * SECOND);
        let running = balancer.pick(reserving(ask("m"), 1000), now - 30 * SECOND).unwrap();
        let mut limited = balancer.pick(reserving(ask("m"), 1000), now - 10 * SECOND).unwrap();
        limited.limited_by(Some(Kind::Output));
        limited.finish(&refused(429), now - 10 * SECOND);
        used(running, 900, now - 10 * SECOND);
        balancer
    }

    /// It waits for room as below a configured limit, but what was learned is a guess: in the end it goes.
    #[test]
    fn a_learned_ceiling_holds_back_for_a_moment_only() {
        let now = crate::env::now();
        let balancer = taught(now);
        let large = reserving(ask("m"), 500);
        let nobody = balancer.pick(large, now).err().expect("no room");
        assert_eq!(nobody.why, Why::NoRoom { may_be_sooner: false, is_learned: true });
        assert!(nobody.may_insist());
        let is_worth = |waited: Duration| {
            let nobody = balancer.pick(large, now + 25 * SECOND).err().expect("no room yet");
            nobody.is_worth_waiting(now + 25 * SECOND - waited, 600 * SECOND, now + 25 * SECOND)
        };
        assert!(!nobody.is_worth_waiting(now, 600 * SECOND, now), "room comes in 31 s, which is too late");
        assert!(is_worth(Duration::ZERO), "and now soon");
        assert!(!is_worth(10 * SECOND), "however long queue_timeout is");
        let small = balancer.pick(reserving(ask("m"), 20), now).expect("below it there is room");
        used(small, 20, now);
        let lease = balancer.pick(Ask { insists: true, ..large }, now).expect("it was a guess");
        used(lease, 500, now);
        assert!(balancer.pick(large, now).is_ok(), "and a wrong one");
    }

    #[test]
    fn nobody_passes_those_who_wait_below_a_learned_ceiling() {
        let now = crate::env::now();
        let balancer = taught(now);
        let first = balancer.wait_in_line("m").unwrap();
        let small = reserving(ask("m"), 10);
        assert!(balancer.pick(small, now).is_err(), "it fits, but another one waits");
        assert!(balancer.pick(Ask { insists: true, ..small }, now).is_ok());
        assert!(balancer.pick(Ask { place: Some(first.number()), ..small }, now).is_ok());
        drop(first);
        assert!(balancer.pick(small, now).is_ok());
    }

    /// The only endpoint is asked once more after a failure: that is no moment to wait for a guess.
    #[test]
    fn a_repeat_does_not_wait_for_what_was_learned() {
        let now = crate::env::now();
        let balancer = taught(now);
        let large = reserving(ask("m"), 500);
        assert!(balancer.pick(large, now).is_err());
        assert_eq!(balancer.soonest(large, now), Some(Duration::ZERO), "nor does a client for its next try");
        assert!(balancer.can_take(EndpointId(1), large, now));
        assert!(balancer.pick_again(EndpointId(1), large, now).is_some());
    }

    /// Where one endpoint is at a configured limit and the other above a guess, the guess gives way.
    #[test]
    fn a_guess_gives_way_and_a_configured_limit_does_not() {
        let now = crate::env::now();
        let balancer = taught(now);
        let both = vec![endpoint("a"), limited("b", 400)];
        balancer.replace(settings(Strategy::LeastRequests), both, now);
        let large = reserving(ask("m"), 500);
        let on_b = balancer.pick(large, now).expect("larger than the limit by itself, and all of it is free");
        assert_eq!(on_b.id(), EndpointId(2));
        let nobody = balancer.pick(large, now).err().expect("no room");
        assert_eq!(nobody.why, Why::NoRoom { may_be_sooner: true, is_learned: true });
        let insisting = balancer.pick(Ask { insists: true, ..large }, now).unwrap();
        assert_eq!(insisting.id(), EndpointId(1));
        insisting.finish(&refused(429), now);
        let nobody =
            balancer.pick(Ask { insists: true, ..large }, now).err().expect("one rests, one is full");
        assert!(!nobody.may_insist());
    }

    /// How long that takes nobody said, and an answer that ends gives back what it had reserved.
    #[test]
    fn a_rest_ends_with_an_answer_only_when_it_is_a_guess_for_output() {
        let now = crate::env::now();
        let refused = |retry_after| Outcome::Refused {
            status: 429,
            retry_after,
            meaning: crate::outcome::Meaning::Other,
        };
        for (retry_after, kind, ends) in [
            (None, Some(Kind::Output), true),
            (None, Some(Kind::Input), false),
            (None, None, false),
            (Some(30 * SECOND), Some(Kind::Output), false),
        ] {
            let balancer = balancer(vec![endpoint("a")], now);
            let older = balancer.pick(ask("m"), now).unwrap();
            let mut limited = balancer.pick(ask("m"), now + SECOND).unwrap();
            limited.limited_by(kind);
            limited.finish(&refused(retry_after), now + SECOND);
            assert!(balancer.pick(ask("m"), now + SECOND).is_err());
            used(older, 10, now + SECOND);
            assert_eq!(balancer.pick(ask("m"), now + SECOND).is_ok(), ends, "{retry_after:?} {kind:?}");
        }
    }

    #[test]
    fn a_reload_keeps_what_is_counted() {
        let now = crate::env::now();
        let balancer = balancer(vec![limited("a", 1000)], now);
        let running = balancer.pick(reserving(ask("m"), 800), now).unwrap();
        balancer.replace(settings(Strategy::LeastRequests), vec![limited("a", 1500)], now);
        assert!(balancer.pick(reserving(ask("m"), 800), now).is_err());
        assert!(balancer.pick(reserving(ask("m"), 700), now).is_ok(), "the new limit holds");
        used(running, 10, now);
        let moved = Endpoint { address: "http://elsewhere".into(), ..limited("a", 1500) };
        balancer.replace(settings(Strategy::LeastRequests), vec![moved], now);
        assert!(balancer.pick(reserving(ask("m"), 1500), now).is_ok(), "another workspace");
    }
}
