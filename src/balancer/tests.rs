//! The balancer's laws: stories, then random operations against a naive model.

use super::decision::Out;
use super::*;
use crate::outcome::{Meaning, Outcome};

pub(super) type Plain = Balancer<()>;

pub(super) fn endpoint(name: &str) -> Endpoint<()> {
    Endpoint {
        name: name.into(),
        address: format!("http://{name}"),
        weight: 1,
        max_concurrent: None,
        models: vec![],
        limits: Limits::default(),
        payload: Arc::new(()),
    }
}

pub(super) fn settings(strategy: Strategy) -> Settings {
    let breaker = breaker::Settings { threshold: 2, timeout: Duration::from_secs(60), rate: None };
    Settings { strategy, session_affinity: true, breaker, waiting_max: 8, learns_limits: true }
}

pub(super) fn balancer(endpoints: Vec<Endpoint<()>>, now: Instant) -> Arc<Plain> {
    Balancer::new(settings(Strategy::LeastRequests), endpoints, fastrand::Rng::with_seed(5), now)
}

/// The number of the endpoint in the list that the balancer was made with; ids count from 1.
fn number(lease: &Lease<()>) -> usize {
    lease.id().0 as usize - 1
}

fn ids(numbers: impl IntoIterator<Item = usize>) -> Vec<EndpointId> {
    numbers.into_iter().map(|number| EndpointId(number as u64 + 1)).collect()
}

pub(super) fn ask(model: &str) -> Ask<'_> {
    Ask { model, tried: &[], session: None, need: Need::default(), place: None, insists: false }
}

pub(super) fn refused(status: u16) -> Outcome {
    Outcome::Refused { status, retry_after: None, meaning: Meaning::Other }
}

#[test]
fn a_slot_is_given_back_however_the_lease_ends() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a")], now);
    let lease = balancer.pick(ask("m"), now).unwrap();
    assert_eq!(balancer.snapshot(now)[0].active_requests, 1);
    drop(lease);
    balancer.pick(ask("m"), now).unwrap().finish(&Outcome::Completed, now);
    let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _lease = balancer.pick(ask("m"), now).unwrap();
        panic!("as a worker might");
    }));
    assert!(panicking.is_err());
    let view = &balancer.snapshot(now)[0];
    assert_eq!((view.active_requests, view.total_requests, view.total_errors), (0, 3, 0));
}

/// A trial that panicked was never taken off the breaker's count: with another endpoint at hand no second trial was
/// allowed, and the endpoint stayed out for good.
#[test]
fn a_trial_that_tells_nothing_makes_room_for_the_next() {
    let start = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], start);
    let away_from_b = ids([1]);
    let ask_a = Ask { tried: &away_from_b, ..ask("m") };
    for _ in 0..2 {
        balancer.pick(ask_a, start).unwrap().finish(&Outcome::ConnectFailed, start);
    }
    let later = start + Duration::from_secs(61);
    let picked = |now| (0..2).map(|_| balancer.pick(ask("m"), now).unwrap()).collect::<Vec<_>>();
    for round in 0..3 {
        let both = picked(later);
        assert!(both.iter().any(|lease| number(lease) == 0), "no trial in round {round}");
        drop(both);
    }
}

#[test]
fn max_concurrent_weight_zero_and_models_limit_who_is_asked() {
    let now = crate::env::now();
    let mut list = vec![endpoint("a"), endpoint("b"), endpoint("c")];
    list[0].max_concurrent = Some(1);
    list[1].weight = 0;
    list[2].models = vec!["databricks-claude-opus-*".into()];
    let balancer = balancer(list, now);
    let first = balancer.pick(ask("databricks-claude-sonnet-5"), now).unwrap();
    assert_eq!(number(&first), 0);
    let full = balancer.pick(ask("databricks-claude-sonnet-5"), now).err().unwrap();
    assert_eq!(full.why, Why::AllOut);
    assert_eq!(number(&balancer.pick(ask("databricks-claude-opus-5"), now).unwrap()), 2);
    assert!(balancer.is_only_one("databricks-claude-sonnet-5"));
    assert!(!balancer.is_only_one("databricks-claude-opus-5"));
}

#[test]
fn a_model_nobody_serves_is_told_apart() {
    let now = crate::env::now();
    let mut only = endpoint("a");
    only.models = vec!["x".into()];
    let balancer = balancer(vec![only], now);
    assert_eq!(balancer.pick(ask("y"), now).err().unwrap().why, Why::NoneServesModel);
}

/// 401 and 403 made the originals send one request after another into the same dead workspace.
#[test]
fn a_rejected_credential_parks_the_endpoint() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    let lease = balancer.pick(ask("m"), now).unwrap();
    let bad = lease.id();
    let notices = lease.finish(&refused(403), now);
    assert!(matches!(&notices[..], [Notice { change: Change::Parked(_), .. }]));
    for _ in 0..10 {
        let lease = balancer.pick(ask("m"), now).unwrap();
        assert_ne!(lease.id(), bad);
        lease.finish(&Outcome::Completed, now);
    }
}

#[test]
fn all_cooling_says_when_the_first_is_back() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    for seconds in [30, 20] {
        let retry_after = Some(Duration::from_secs(seconds));
        let limited = Outcome::Refused { status: 429, retry_after, meaning: Meaning::Other };
        balancer.pick(ask("m"), now).unwrap().finish(&limited, now);
    }
    let none = balancer.pick(ask("m"), now).err().unwrap();
    assert_eq!(none, Unavailable { soonest: Some(Duration::from_secs(20)), why: Why::AllCooling });
    assert!(balancer.pick(ask("other"), now).is_ok(), "another model is not affected");
    assert!(balancer.pick(ask("m"), now + Duration::from_secs(20)).is_ok());
}

#[test]
fn half_open_lets_one_trial_through_while_another_can_serve() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    let break_it = |index: usize| {
        let tried = ids([1 - index]);
        for _ in 0..2 {
            let lease = balancer.pick(Ask { tried: &tried, ..ask("m") }, now).unwrap();
            lease.finish(&Outcome::ConnectFailed, now);
        }
    };
    break_it(0);
    let later = now + Duration::from_secs(60);
    let running: Vec<_> = (0..6).map(|_| balancer.pick(ask("m"), later).unwrap()).collect();
    assert_eq!(running.iter().filter(|lease| number(lease) == 0).count(), 1);
    drop(running);
    break_it(1);
    let both_half_open = now + Duration::from_secs(60);
    let running: Vec<_> = (0..6).map(|_| balancer.pick(ask("m"), both_half_open)).collect();
    assert!(running.iter().all(Result::is_ok), "nobody else can serve: everything goes through");
}

#[test]
fn reset_opens_the_door_but_keeps_the_gauge() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a")], now);
    let running = balancer.pick(ask("m"), now).unwrap();
    for _ in 0..2 {
        balancer.pick(ask("m"), now).unwrap().finish(&Outcome::NoAnswer, now);
    }
    assert!(balancer.snapshot(now)[0].circuit_open);
    assert!(!balancer.is_usable(now));
    balancer.reset();
    let view = &balancer.snapshot(now)[0];
    assert_eq!((view.circuit_open, view.total_errors, view.active_requests), (false, 0, 1));
    running.finish(&Outcome::NoAnswer, now);
    assert_eq!(
        balancer.snapshot(now)[0].consecutive_failures,
        0,
        "a late failure does not disturb the new count"
    );
}

/// A bad minute must not turn every request into three: retries to doubtful endpoints are few at a time.
#[test]
fn doubtful_retries_stay_within_the_budget() {
    let now = crate::env::now();
    let balancer = balancer((0..4).map(|i| endpoint(&i.to_string())).collect(), now);
    for index in 0..4 {
        let tried = ids((0..4).filter(|&i| i != index));
        let lease = balancer.pick(Ask { tried: &tried, ..ask("m") }, now).unwrap();
        lease.finish(&refused(529), now);
    }
    let later = now + Duration::from_secs(10);
    let tried = ids([0]);
    let retry = Ask { tried: &tried, ..ask("m") };
    let running: Vec<_> = (0..3).map(|_| balancer.pick(retry, later).unwrap()).collect();
    assert_eq!(balancer.pick(retry, later).err().unwrap().why, Why::RetryBudget);
    drop(running);
    assert!(balancer.pick(retry, later).is_ok());
}

/// Random picks, finishes and drops against the simplest model that can be right.
#[test]
fn random_operations_keep_the_laws() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let strategy = [Strategy::LeastRequests, Strategy::RoundRobin, Strategy::Random][rng.usize(..3)];
        let mut now = crate::env::now();
        let mut list: Vec<_> = (0..rng.usize(1..6)).map(|i| endpoint(&i.to_string())).collect();
        for endpoint in &mut list {
            endpoint.weight = rng.u32(0..4);
            endpoint.max_concurrent = rng.bool().then(|| rng.u32(1..5));
        }
        let limits: Vec<_> = list.iter().map(|e| (e.weight, e.max_concurrent)).collect();
        let balancer = Balancer::new(settings(strategy), list, rng.fork(), now);
        let mut running: Vec<Lease<()>> = Vec::new();
        for step in 0..600 {
            now += Duration::from_millis(rng.u64(..4000));
            match rng.usize(..10) {
                0..6 => {
                    let open: Vec<bool> = balancer.snapshot(now).iter().map(|v| v.circuit_open).collect();
                    if let Ok(lease) = balancer.pick(ask("m"), now) {
                        assert!(
                            !open[number(&lease)],
                            "seed {seed} step {step}: an open endpoint was picked"
                        );
                        assert!(limits[number(&lease)].0 > 0, "seed {seed} step {step}: weight 0 was picked");
                        running.push(lease);
                    }
                }
                6..9 if !running.is_empty() => {
                    let lease = running.swap_remove(rng.usize(..running.len()));
                    let outcome = match rng.usize(..6) {
                        0 => Outcome::NoAnswer,
                        1 => refused(429),
                        2 => refused(503),
                        3 => Outcome::ClientGone,
                        _ => Outcome::Completed,
                    };
                    lease.finish(&outcome, now);
                }
                _ if !running.is_empty() => drop(running.swap_remove(rng.usize(..running.len()))),
                _ => {}
            }
            for (index, view) in balancer.snapshot(now).iter().enumerate() {
                let live = running.iter().filter(|lease| number(lease) == index).count();
                assert_eq!(
                    view.active_requests, live,
                    "seed {seed} step {step}: active is not the live leases"
                );
                if let Some(most) = limits[index].1 {
                    assert!(live <= most as usize, "seed {seed} step {step}: over max_concurrent");
                }
            }
        }
        running.clear();
        assert!(balancer.snapshot(now).iter().all(|view| view.active_requests == 0));
    }
}

#[test]
fn round_robin_shares_are_exact_through_the_balancer() {
    let now = crate::env::now();
    let mut list = vec![endpoint("a"), endpoint("b"), endpoint("c")];
    list[0].weight = 3;
    let balancer = Balancer::new(settings(Strategy::RoundRobin), list, fastrand::Rng::with_seed(1), now);
    for _ in 0..50 {
        balancer.pick(ask("m"), now).unwrap().finish(&Outcome::Completed, now);
    }
    let totals: Vec<u64> = balancer.snapshot(now).iter().map(|v| v.total_requests).collect();
    assert_eq!(totals, [30, 10, 10]);
}

#[test]
fn a_reload_keeps_what_is_still_there() {
    let now = crate::env::now();
    let (a, b) = (endpoint("a"), endpoint("b"));
    let balancer = balancer(vec![a.clone(), b.clone()], now);
    let on_a = balancer.pick(Ask { tried: &ids([1]), ..ask("m") }, now).unwrap();
    let on_b = balancer.pick(Ask { tried: &ids([0]), ..ask("m") }, now).unwrap();
    balancer.pick(Ask { tried: &ids([0]), ..ask("m") }, now).unwrap().finish(&refused(429), now);
    let moved = Endpoint { address: "http://elsewhere".into(), ..a.clone() };
    balancer.replace(settings(Strategy::RoundRobin), vec![endpoint("c"), b, moved], now);
    let views = balancer.snapshot(now);
    let seen: Vec<_> =
        views.iter().map(|v| (&*v.name, v.active_requests, v.total_errors, v.holds.len())).collect();
    assert_eq!(seen, [("c", 0, 0, 0), ("b", 1, 1, 1), ("a", 0, 0, 0)], "b is the same, a is another");
    on_a.finish(&Outcome::NoAnswer, now);
    on_b.finish(&Outcome::Completed, now);
    assert!(
        balancer.snapshot(now).iter().all(|view| view.active_requests == 0 && view.consecutive_failures == 0)
    );
}

/// Whoever renews a token and reloads expects it to be used at once.
#[test]
fn a_new_credential_is_tried_at_once() {
    let now = crate::env::now();
    let a = endpoint("a");
    let balancer = balancer(vec![a.clone()], now);
    balancer.pick(ask("m"), now).unwrap().finish(&refused(401), now);
    balancer.replace(settings(Strategy::Random), vec![a.clone()], now);
    assert!(balancer.pick(ask("m"), now).is_err(), "nothing has changed about it");
    balancer.replace(settings(Strategy::Random), vec![Endpoint { payload: Arc::new(()), ..a }], now);
    assert!(balancer.pick(ask("m"), now).is_ok());
}

fn session(key: u64) -> Session {
    Session { key, idle: Duration::from_secs(300) }
}

pub(super) fn ask_for(key: u64) -> Ask<'static> {
    Ask { session: Some(session(key)), ..ask("m") }
}

#[test]
fn a_conversation_stays_where_its_cache_is() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b"), endpoint("c")], now);
    let first = balancer.pick(ask_for(1), now).unwrap();
    let home = first.id();
    first.finish(&Outcome::Completed, now);
    for turn in 1..20 {
        let now = now + Duration::from_secs(turn * 200);
        let lease = balancer.pick(ask_for(1), now).unwrap();
        assert_eq!(lease.id(), home, "turn {turn}");
        lease.finish(&Outcome::Completed, now);
    }
    assert_eq!(
        balancer.affinity(now),
        (1, affinity::Counts { hits: 19, new: 1, ..affinity::Counts::default() })
    );
}

#[test]
fn a_busy_home_is_left_for_once_and_an_outage_for_good() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    let first = balancer.pick(ask_for(1), now).unwrap();
    let home = first.id();
    let _busy: Vec<_> = (0..3).map(|_| balancer.pick(ask_for(1), now).unwrap()).collect();
    let detour = balancer.pick(ask_for(1), now).unwrap();
    assert_ne!(detour.id(), home, "four at home, none elsewhere");
    drop(detour);
    first.finish(&Outcome::Completed, now);
    assert_eq!(balancer.pick(ask_for(1), now).unwrap().id(), home, "the binding was kept");
    balancer.pick(ask_for(1), now).unwrap().finish(&refused(429), now);
    let moved = balancer.pick(ask_for(1), now).unwrap().id();
    assert_ne!(moved, home, "it cools");
    let later = now + Duration::from_secs(20);
    assert_eq!(balancer.pick(ask_for(1), later).unwrap().id(), moved, "and the conversation has moved");
    let counts = balancer.affinity(later).1;
    assert_eq!((counts.new, counts.detours, counts.moves), (1, 1, 1), "{counts:?}");
    assert_eq!(counts.moved_because.each().collect::<Vec<_>>(), [("rate_limited", 1)]);
}

/// Each way in which an endpoint can be out moves the conversation, and is counted under its own word.
#[test]
fn moves_are_counted_by_their_reason() {
    let with = |status, meaning| Outcome::Refused { status, retry_after: None, meaning };
    let waits =
        Outcome::Refused { status: 503, retry_after: Some(Duration::from_secs(9)), meaning: Meaning::Other };
    for (outcome, times, word) in [
        (refused(429), 1, "rate_limited"),
        (refused(529), 1, "overloaded"),
        (with(404, Meaning::ModelMissing), 1, "model_unavailable"),
        (with(403, Meaning::RateLimitZero), 1, "model_unavailable"),
        (refused(403), 1, "credential_rejected"),
        (with(403, Meaning::IpBlocked), 1, "address_blocked"),
        (Outcome::NoCredential, 1, "no_token"),
        (waits, 1, "asked_to_wait"),
        (Outcome::NoAnswer, 2, "circuit_open"),
    ] {
        let now = crate::env::now();
        let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
        let home = balancer.pick(ask_for(1), now).unwrap().id();
        for _ in 0..times {
            balancer.pick(ask_for(1), now).unwrap().finish(&outcome, now);
        }
        let (lease, decision) = balancer.decide(ask_for(1), now);
        assert_ne!(lease.unwrap().id(), home, "{word}");
        assert_eq!(decision.home_out().map(Out::word), Some(word));
        let counts = balancer.affinity(now).1;
        assert_eq!(counts.moved_because.each().collect::<Vec<_>>(), [(word, 1)]);
    }
    let now = crate::env::now();
    let (a, b) = (endpoint("a"), endpoint("b"));
    let balancer = balancer(vec![a.clone(), b.clone()], now);
    let on_a = number(&balancer.pick(ask_for(1), now).unwrap()) == 0;
    balancer.replace(settings(Strategy::LeastRequests), vec![if on_a { b } else { a }], now);
    balancer.pick(ask_for(1), now).unwrap();
    assert_eq!(balancer.affinity(now).1.moved_because.each().collect::<Vec<_>>(), [("removed", 1)]);
}

/// Half a minute after a token was refused it is refused still; the pause doubles, and the first success ends it.
#[test]
fn parking_doubles_until_the_token_works() {
    let start = crate::env::now();
    let balancer = balancer(vec![endpoint("a")], start);
    let mut now = start;
    for seconds in [60, 120, 240, 480, 960, 1800, 1800] {
        let notices = balancer.pick(ask("m"), now).unwrap().finish(&refused(403), now);
        let span = Duration::from_secs(seconds);
        assert!(
            matches!(&notices[..], [Notice { change: Change::Parked(parked), .. }] if parked.span == span),
            "{notices:?}"
        );
        assert!(balancer.pick(ask("m"), now + span - Duration::from_millis(1)).is_err());
        now += span;
    }
    let notices = balancer.pick(ask("m"), now).unwrap().finish(&Outcome::Completed, now);
    assert!(matches!(&notices[..], [Notice { change: Change::Recovered(_), .. }]), "{notices:?}");
    let again = balancer.pick(ask("m"), now).unwrap().finish(&refused(403), now);
    assert!(
        matches!(&again[..], [Notice { change: Change::Parked(parked), .. }] if parked.span.as_secs() == 60)
    );
}

#[test]
fn what_answers_report_is_added_up_by_endpoint() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a")], now);
    assert_eq!(balancer.snapshot(now)[0].tokens.cached_share(), None);
    for (outcome, read) in [(Outcome::Completed, 60), (Outcome::ClientGone, 20)] {
        let mut lease = balancer.pick(ask("m"), now).unwrap();
        lease.reported(Usage {
            input_tokens: Some(5),
            output_tokens: Some(7),
            cache_creation_input_tokens: Some(5),
            cache_read_input_tokens: Some(read),
        });
        lease.finish(&outcome, now);
    }
    let tokens = balancer.snapshot(now)[0].tokens;
    assert_eq!(tokens, Tokens { input: 10, output: 14, cache_write: 10, cache_read: 80 });
    assert_eq!(tokens.cached_share(), Some(0.8));
}

/// A pause between two turns looked like room: newcomers were put there and crowded the conversation out.
#[test]
fn a_conversation_in_its_pause_still_counts_where_it_is_bound() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    let first = balancer.pick(ask_for(1), now).unwrap();
    let home = first.id();
    // Used lately by others, so that an equal load would lead home.
    for _ in 0..3 {
        balancer.pick(Ask { tried: &[home], ..ask("m") }, now).unwrap().finish(&Outcome::Completed, now);
    }
    first.finish(&Outcome::Completed, now);
    assert_ne!(balancer.pick(ask_for(2), now).unwrap().id(), home, "it is expected back in a moment");
    let later = now + Duration::from_secs(60);
    assert_eq!(balancer.pick(ask_for(3), later).unwrap().id(), home, "and after a while no longer");
}

#[test]
fn detours_lead_to_the_same_place_again() {
    let now = crate::env::now();
    let balancer = balancer((0..4).map(|i| endpoint(&i.to_string())).collect(), now);
    let _busy: Vec<_> = (0..4).map(|_| balancer.pick(ask_for(1), now).unwrap()).collect();
    let first = balancer.pick(ask_for(1), now).unwrap();
    let place = first.id();
    // As busy as the others, and used more: the strategy alone would go elsewhere.
    first.finish(&Outcome::Completed, now);
    for _ in 0..5 {
        let again = balancer.pick(ask_for(1), now).unwrap();
        assert_eq!(again.id(), place);
        again.finish(&Outcome::Completed, now);
    }
}

#[test]
fn a_failure_within_a_request_does_not_move_the_conversation() {
    let now = crate::env::now();
    let balancer = balancer(vec![endpoint("a"), endpoint("b")], now);
    let first = balancer.pick(ask_for(1), now).unwrap();
    let home = first.id();
    first.finish(&refused(500), now);
    let retry = balancer.pick(Ask { tried: &[home], ..ask_for(1) }, now).unwrap();
    assert_ne!(retry.id(), home);
    retry.finish(&Outcome::Completed, now);
    assert_eq!(balancer.pick(ask_for(1), now).unwrap().id(), home);
}

/// With one workspace, "this model does not exist" must be heard each time: a 503 would be retried for minutes.
#[test]
fn a_missing_model_is_only_kept_out_when_another_may_have_it() {
    let now = crate::env::now();
    let missing = Outcome::Refused { status: 404, retry_after: None, meaning: Meaning::ModelMissing };
    let alone = balancer(vec![endpoint("a")], now);
    assert!(alone.pick(ask("m"), now).unwrap().finish(&missing, now).is_empty());
    assert!(alone.pick(ask("m"), now).is_ok());
    let two = balancer(vec![endpoint("a"), endpoint("b")], now);
    let first = two.pick(ask("m"), now).unwrap();
    let id = first.id();
    first.finish(&missing, now);
    assert!((0..5).all(|_| two.pick(ask("m"), now).unwrap().id() != id));
}
