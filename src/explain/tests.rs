//! What is kept and for how long, and what a reader is told.

use super::*;
use crate::balancer::affinity::Session;
use crate::balancer::strategy::Strategy;
use crate::balancer::{Ask, Balancer, Endpoint, EndpointId, Settings, breaker};
use crate::outcome::Meaning;

fn balancer(names: &[&str], now: Instant) -> Arc<Balancer<()>> {
    let breaker = breaker::Settings { threshold: 2, timeout: Duration::from_secs(60), rate: None };
    let settings = Settings {
        strategy: Strategy::LeastRequests,
        session_affinity: true,
        breaker,
        waiting_max: 8,
        learns_limits: true,
    };
    let endpoint = |name: &&str| Endpoint {
        name: name.to_string(),
        address: format!("http://{name}"),
        weight: 1,
        max_concurrent: None,
        models: vec![],
        limits: crate::balancer::limits::Limits::default(),
        payload: Arc::new(()),
    };
    Balancer::new(settings, names.iter().map(endpoint).collect(), fastrand::Rng::with_seed(1), now)
}

fn explained(id: &str, now: Instant) -> Explained {
    Explained { taken_up_at: Some(now), ..Explained::turned_away(id.into(), 200, "", now) }
}

fn page(explanations: &Explanations, id: &str, now: Instant) -> Option<serde_json::Value> {
    let page = explanations.page(id, now, Duration::from_secs(1_000_000))?;
    Some(serde_json::from_str(&page).expect("the page is JSON"))
}

#[test]
fn the_last_thousand_are_found_by_either_id() {
    let (explanations, now) = (Explanations::default(), crate::env::now());
    for number in 0..KEPT_MAX + 10 {
        let shown_id = if number % 2 == 0 { format!("theirs{number}") } else { String::new() };
        explanations.keep(Explained { shown_id, ..explained(&format!("ours{number}"), now) });
    }
    assert_eq!(explanations.len(), KEPT_MAX);
    for (id, is_kept) in [
        ("ours9", false),
        ("theirs8", false),
        ("ours10", true),
        ("theirs10", true),
        ("ours1009", true),
        ("theirs1008", true),
        ("ours1010", false),
        ("", false),
    ] {
        assert_eq!(page(&explanations, id, now).is_some(), is_kept, "{id}");
    }
}

/// A workspace may give every answer the same id.
#[test]
fn of_two_with_one_id_the_newest_is_told() {
    let (explanations, now) = (Explanations::default(), crate::env::now());
    for ours in ["first", "second"] {
        explanations.keep(Explained { shown_id: "same".into(), ..explained(ours, now) });
    }
    assert_eq!(page(&explanations, "same", now).unwrap()["id"], "second");
}

/// A retry after a 429, with the conversation moving: the whole page, as the documentation shows it.
#[test]
fn a_failover_is_told_from_beginning_to_end() {
    let start = crate::env::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    let balancer = balancer(&["workspace-1", "workspace-2"], start);
    let session = Some(Session { key: 7, idle: Duration::from_secs(300) });
    let home = |tried| balancer.pick(Ask { model: "m", tried, session, ..Ask::default() }, start).unwrap();
    let first = home(&[EndpointId::for_tests(2)]);
    first.finish(&Outcome::Completed, start);

    let mut trace = Trace::default();
    let (lease, decision) = balancer.decide(Ask { model: "m", tried: &[], session, ..Ask::default() }, at(2));
    let lease = lease.unwrap();
    let tried = [lease.id()];
    trace.decided(decision);
    trace.begin_attempt(at(2));
    let retry_after = Some(Duration::from_secs(30));
    let limited = Outcome::Refused { status: 429, retry_after, meaning: Meaning::RequestLimitExceeded };
    trace.end_attempt(&limited, Some(at(350)), "workspace-1 answered 429 (quoting the prompt)", at(352));
    lease.finish(&limited, at(352));
    let (lease, decision) =
        balancer.decide(Ask { model: "m", tried: &tried, session, ..Ask::default() }, at(352));
    trace.decided(decision);
    trace.begin_attempt(at(353));
    trace.end_attempt(&Outcome::Completed, Some(at(1153)), "", at(3013));
    drop(lease);

    let explanations = Explanations::default();
    explanations.keep(Explained {
        asked: "claude-m".into(),
        served: "m".into(),
        is_stream: true,
        taken_up_at: Some(at(1)),
        first_at: Some(at(1154)),
        ended_at: at(3014),
        bytes: 940,
        trace,
        ..explained("ours", start)
    });
    let told = explanations.page("ours", at(60_000), Duration::from_secs(60)).unwrap();
    assert!(!told.contains("prompt"), "{told}");
    let value: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(value["arrived"], "1970-01-01T00:00:00.000Z");
    let story: Vec<&str> = value["story"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(
        story,
        [
            "0 ms: a request for a stream of claude-m, here m, had arrived",
            "1 ms: a worker took it up",
            "2 ms: workspace-1, where the conversation is bound, has room for it: its load with this request is 1, and \
             may be up to 4",
            "2 ms: workspace-1 is asked; after 350 ms it had answered 429: it is over its limit for this model, \
             Retry-After 30 s",
            "352 ms: the conversation was bound to workspace-1, which is out (rate_limited); workspace-2 takes it as the \
             only one that can, and it is bound there now; out: workspace-1 (rate_limited, back in 30 s)",
            "353 ms: workspace-2 is asked; it began to answer after 800 ms, and after 2660 ms the answer was whole",
            "3014 ms: over; the client got status 200, its first byte at 1154 ms, 940 bytes of body in all",
            "where the time went: 2 ms before anybody was asked, 350 ms with workspace-1 (348 ms until it began to \
             answer), 2660 ms with workspace-2 (800 ms until it began to answer)",
        ]
    );
    let [first, second] = &value["decisions"].as_array().unwrap()[..] else {
        panic!("two decisions: {told}")
    };
    assert_eq!((&first["affinity"], &first["bound_to"]), (&"hit".into(), &"workspace-1".into()));
    assert_eq!((&second["affinity"], &second["chosen"]), (&"move".into(), &"workspace-2".into()));
    let out = &second["candidates"][0];
    assert_eq!((&out["out"], &out["back_in_ms"]), (&"rate_limited".into(), &30_000.0.into()));
    assert_eq!(first["attempts"][0]["retry_after_s"], 30.0);
    assert_eq!(
        (&second["attempts"][0]["outcome"], &second["attempts"][0]["status"]),
        (&"completed".into(), &200.into())
    );
    assert!(told.contains("\n        {\"name\":\"workspace-1\""), "one line for each candidate:\n{told}");
}

/// Each way in which a decision can go has a sentence that says so.
#[test]
fn every_course_has_its_words() {
    let now = crate::env::now();
    let told = |balancer: &Arc<Balancer<()>>, key: Option<u64>, tried: &[EndpointId]| {
        let session = key.map(|key| Session { key, idle: Duration::from_secs(300) });
        let (lease, decision) = balancer.decide(Ask { model: "m", tried, session, ..Ask::default() }, now);
        let mut trace = Trace::default();
        trace.decided(decision);
        let words = story::story(&Explained { trace, ..explained("x", now) })[2].clone();
        (lease, words)
    };
    let two = balancer(&["a", "b"], now);
    let b_only = [EndpointId::for_tests(1)];
    assert!(told(&two, None, &[]).1.contains("lowest score of 2: 1, where it is used least lately"));
    let (first, words) = told(&two, Some(1), &b_only);
    assert!(words.contains("was bound nowhere; b takes it as the only one that can"), "{words}");
    let mut running = vec![first];
    for _ in 0..3 {
        let (lease, words) = told(&two, Some(1), &[]);
        assert!(words.contains("b, where the conversation is bound, has room"), "{words}");
        running.push(lease);
    }
    let words = told(&two, Some(1), &[]).1;
    let busy = "is bound to b, which has too much to do (its load with this request is 5, and may be up to 4); this once a";
    assert!(words.contains(busy), "{words}");
    let words = told(&two, Some(1), &[EndpointId::for_tests(2)]).1;
    assert!(words.contains("b, which this request has tried; this once a"), "{words}");
    drop(running);

    let one = balancer(&["a"], now);
    one.pick(Ask { model: "m", tried: &[], session: None, ..Ask::default() }, now)
        .unwrap()
        .finish(&Outcome::Refused { status: 403, retry_after: None, meaning: Meaning::Other }, now);
    let (nobody, words) = told(&one, None, &[]);
    assert!(nobody.is_err());
    assert!(
        words.ends_with("no endpoint can take it; out: a (credential_rejected, back in 60 s)"),
        "{words}"
    );
}

/// However many endpoints and attempts there are, a request takes a bounded piece of memory.
#[test]
fn memory_is_bounded() {
    let names: Vec<String> = (0..200).map(|n| format!("w{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (now, mut trace, mut tried) = (crate::env::now(), Trace::default(), Vec::new());
    let balancer = balancer(&names, now);
    for _ in 0..100 {
        let (lease, decision) =
            balancer.decide(Ask { model: "m", tried: &tried, session: None, ..Ask::default() }, now);
        let chosen = decision.chosen.expect("there are enough");
        assert!(decision.of(chosen).is_some(), "the chosen one is kept");
        assert_eq!(decision.considered.len() + decision.more, 200);
        tried.push(lease.unwrap().id());
        trace.decided(decision);
        trace.begin_attempt(now);
        trace.end_attempt(&Outcome::NoAnswer, None, &"é".repeat(1000), now);
    }
    let mut big = Explained { trace, said: "é".repeat(1000), ..explained("x", now) };
    big.trim();
    let considered: usize = big.trace.decisions.iter().map(|one| one.considered.capacity()).sum();
    let texts: usize = big.trace.attempts.iter().map(|one| one.why.capacity()).sum();
    let bytes = considered * size_of::<crate::balancer::decision::Considered>()
        + big.trace.decisions.capacity() * size_of::<Decision>()
        + big.trace.attempts.capacity() * size_of::<Attempt>()
        + texts
        + big.said.len();
    assert!(bytes <= 32 * 1024, "{bytes} bytes");
    let last = big.trace.attempts.last().unwrap();
    assert_eq!((last.number, big.trace.attempts.len()), (100, DECISIONS_MAX));
    let (asked, chosen) = (big.trace.endpoint(last), big.trace.decisions.last().unwrap().chosen.unwrap());
    assert_eq!(asked, names[chosen]);
    let story = story::story(&big);
    assert!(story.iter().any(|line| line == "and so on: 92 further decisions are not kept"), "{story:#?}");
}
