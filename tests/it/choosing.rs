//! Which endpoint a request goes to, who is left out, and what is said when nobody is left.

use std::collections::BTreeMap;

use crate::support::client::{Answer, Client, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures, sse};

fn upstreams(count: usize) -> Vec<Upstream> {
    (0..count).map(|_| Upstream::start()).collect()
}

fn in_front_of(upstreams: &[Upstream], strategy: &str) -> Setup {
    Proxy::with(&upstreams.iter().collect::<Vec<_>>()).set("load_balancer.strategy", strategy)
}

fn counts(upstreams: &[Upstream]) -> Vec<usize> {
    upstreams.iter().map(Upstream::count).collect()
}

/// Sends one request after the other on one connection; returns who answered, in order.
fn sequence(proxy: &Proxy, requests: usize) -> Vec<String> {
    let mut client = proxy.connect();
    let ask = |client: &mut Client| {
        let answer = client.ask(&Request::message());
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.header("x-claude-lb-endpoint").expect("the answer names its endpoint").to_owned()
    };
    (0..requests).map(|_| ask(&mut client)).collect()
}

/// The original's round robin always returned the first: 30/0/0 (O1).
#[test]
fn round_robin_gives_exact_shares() {
    let upstreams = upstreams(3);
    let proxy = in_front_of(&upstreams, "round_robin").start();
    sequence(&proxy, 30);
    assert_eq!(counts(&upstreams), [10, 10, 10]);
}

/// Weights were never used (O3); the fork went block-wise, B, B, B in a row (F7).
#[test]
fn round_robin_is_exact_and_smooth_with_weights() {
    let upstreams = upstreams(3);
    let setup = in_front_of(&upstreams, "round_robin");
    let setup = setup.endpoint(0, "weight", 3).endpoint(1, "weight", 2).endpoint(2, "weight", 1);
    let proxy = setup.start();
    let order = sequence(&proxy, 36);
    assert_eq!(counts(&upstreams), [18, 12, 6]);
    assert!(
        !order.windows(3).any(|three| three[0] == three[1] && three[1] == three[2]),
        "in a row: {order:?}"
    );
}

/// Ties went to the first of the list: sequential traffic 30/0/0 (O2).
#[test]
fn least_requests_spreads_sequential_traffic() {
    let upstreams = upstreams(3);
    let proxy = in_front_of(&upstreams, "least_requests").start();
    sequence(&proxy, 30);
    assert!(counts(&upstreams).iter().all(|count| (8..=12).contains(count)), "{:?}", counts(&upstreams));
}

/// Streams that the workspaces hold until the gate opens.
fn hold_all(upstreams: &[Upstream]) -> Gate {
    let gate = Gate::closed();
    for upstream in upstreams {
        let held = gate.clone();
        upstream.answer(move |_| {
            Reply::sse()
                .part(sse::message_start("msg_1"))
                .wait(&held)
                .part(sse::block_start())
                .part(sse::ending())
        });
    }
    gate
}

fn hold(proxy: &Proxy, streams: usize) -> Vec<Client> {
    let start = |_| {
        let mut client = proxy.connect();
        client.send(&Request::stream());
        assert_eq!(client.head().status, 200);
        client
    };
    (0..streams).map(start).collect()
}

#[test]
fn least_requests_goes_where_least_is_going_on() {
    let upstreams = upstreams(3);
    let proxy = in_front_of(&upstreams, "least_requests").start();
    let gate = hold_all(&upstreams);
    let streams = hold(&proxy, 9);
    assert_eq!(counts(&upstreams), [3, 3, 3]);
    gate.open();
    drop(streams);
}

#[test]
fn least_requests_divides_by_weight() {
    let upstreams = upstreams(2);
    let proxy = in_front_of(&upstreams, "least_requests").endpoint(0, "weight", 3).start();
    let gate = hold_all(&upstreams);
    let streams = hold(&proxy, 8);
    assert_eq!(counts(&upstreams), [6, 2]);
    gate.open();
    drop(streams);
}

/// The original's random was clock milliseconds modulo n, without weights (O3). 300 draws at 2:1 leave 150..250
/// with a chance below one in a million.
#[test]
fn random_follows_the_weights() {
    let upstreams = upstreams(3);
    let setup = in_front_of(&upstreams, "random").endpoint(0, "weight", 2).endpoint(2, "weight", 0);
    sequence(&setup.start(), 300);
    let counts = counts(&upstreams);
    assert!((150..=250).contains(&counts[0]), "{counts:?}");
    assert_eq!(counts[2], 0);
}

/// Weight 0 divided by zero in the fork (F7).
#[test]
fn weight_zero_gets_no_new_traffic() {
    for strategy in ["least_requests", "round_robin", "random"] {
        let upstreams = upstreams(2);
        let proxy = in_front_of(&upstreams, strategy).endpoint(0, "weight", 0).start();
        sequence(&proxy, 20);
        assert_eq!(counts(&upstreams), [0, 20], "{strategy}");
    }
}

#[test]
fn weight_zero_is_no_refuge_after_a_failure() {
    let (failing, parked) = (Upstream::always(Reply::error(500, "anthropic-500.json")), Upstream::start());
    let proxy = Proxy::with(&[&failing, &parked]).endpoint(1, "weight", 0).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 500);
    assert_eq!(parked.count(), 0);
}

#[test]
fn max_concurrent_is_a_limit() {
    let upstreams = upstreams(2);
    let proxy = in_front_of(&upstreams, "least_requests").in_order().endpoint(0, "max_concurrent", 2).start();
    let gate = hold_all(&upstreams);
    let streams = hold(&proxy, 5);
    assert_eq!(counts(&upstreams), [2, 3]);
    gate.open();
    drop(streams);
}

#[test]
fn when_every_endpoint_is_at_its_limit_the_answer_is_a_503() {
    let upstreams = upstreams(1);
    let proxy = in_front_of(&upstreams, "least_requests").endpoint(0, "max_concurrent", 1).start();
    let gate = hold_all(&upstreams);
    let mut streams = hold(&proxy, 1);
    expect_nobody_left(&proxy.ask(&Request::message()), 503, "overloaded_error");
    gate.open();
    streams[0].rest();
    proxy.wait_idle();
    assert_eq!(proxy.ask(&Request::stream()).status(), 200);
}

fn expect_nobody_left(answer: &Answer, status: u16, kind: &str) {
    let message = answer.error(status, kind);
    assert!(message.contains("No available endpoints") || status == 429, "{message}");
    let seconds = answer.number("retry-after").expect("a retry-after");
    assert!((1..=60).contains(&seconds), "{seconds}");
}

#[test]
fn an_endpoint_gets_only_the_models_it_serves() {
    let upstreams = upstreams(3);
    let setup = in_front_of(&upstreams, "round_robin")
        .endpoint(0, "models", "[ \"databricks-claude-sonnet-*\" ]")
        .endpoint(1, "models", "[ \"databricks-claude-opus-4-5\", \"databricks-claude-haiku-*\" ]");
    let proxy = setup.start();
    let mut seen: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for model in ["claude-sonnet-4-5", "claude-opus-4-5", "claude-opus-4-6"] {
        for _ in 0..4 {
            seen.entry(model).or_default().push(proxy.ask_who(&Request::message_for(model, false)));
        }
    }
    assert!(seen["claude-sonnet-4-5"].iter().all(|name| name == "w1" || name == "w3"), "{seen:?}");
    assert!(seen["claude-sonnet-4-5"].contains(&"w1".to_owned()), "{seen:?}");
    assert!(seen["claude-opus-4-5"].iter().all(|name| name == "w2" || name == "w3"), "{seen:?}");
    assert!(seen["claude-opus-4-6"].iter().all(|name| name == "w3"), "{seen:?}");
}

#[test]
fn a_model_nobody_serves_reaches_nobody() {
    let upstreams = upstreams(1);
    let setup =
        in_front_of(&upstreams, "round_robin").endpoint(0, "models", "[ \"databricks-claude-sonnet-*\" ]");
    let answer = setup.start().ask(&Request::message_for("claude-opus-4-5", false));
    assert!(answer.status() >= 400, "{}", answer.text());
    assert_eq!(answer.json()["type"], "error");
    assert_eq!(upstreams[0].count(), 0);
}

fn failing_first(setup: Setup) -> Setup {
    setup.in_order().set("load_balancer.circuit_breaker_threshold", 3)
}

#[test]
fn the_breaker_opens_after_the_threshold() {
    let (failing, healthy) = (Upstream::always(Reply::error(500, "anthropic-500.json")), Upstream::start());
    let proxy = failing_first(Proxy::with(&[&failing, &healthy])).start();
    for made in 1..=6 {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
        proxy.wait_idle();
        assert_eq!(proxy.is_open("w1"), made >= 3, "after {made} failures");
    }
    assert_eq!(failing.count(), 3);
    assert_eq!(proxy.number("w1", "total_errors"), 3);
}

/// A success did not reset the count in the fork: the breaker opened after five errors ever (F1).
#[test]
fn a_success_between_failures_resets_the_count() {
    let upstream = Upstream::start();
    let healthy = Upstream::start();
    let proxy = failing_first(Proxy::with(&[&upstream, &healthy])).start();
    let fail = || Reply::error(500, "anthropic-500.json");
    for _ in 0..5 {
        upstream.queue([fail(), fail(), Reply::message()]);
        // A client has its answer a moment before the books have it.
        let ask = |_| (proxy.ask_who(&Request::message()), proxy.wait_idle()).0;
        let served: Vec<String> = (0..3).map(ask).collect();
        assert_eq!(served, ["w2", "w2", "w1"]);
    }
    assert!(!proxy.is_open("w1"));
    assert_eq!(proxy.number("w1", "total_errors"), 10);
}

/// Opens the circuit of `w1`, whose next answers are then decided by the test.
fn opened(failing: &Upstream, healthy: &Upstream, timeout: f64) -> Proxy {
    let setup = Proxy::with(&[failing, healthy]).in_order().set("load_balancer.circuit_breaker_threshold", 1);
    let proxy = setup.set("load_balancer.circuit_breaker_timeout", timeout).start();
    failing.queue([Reply::error(500, "anthropic-500.json")]);
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    proxy
}

fn wait_half_open(proxy: &Proxy) {
    eventually("the circuit to be half-open", || (!proxy.is_open("w1")).then_some(()));
}

/// All traffic came back at once when the timeout had passed (O9).
#[test]
fn a_half_open_circuit_lets_one_trial_through() {
    let gate = Gate::closed();
    let (first, healthy) = (Upstream::start(), Upstream::start());
    let held = gate.clone();
    first.answer(move |_| Reply::message().after(&held));
    let proxy = opened(&first, &healthy, 0.3);
    wait_half_open(&proxy);
    std::thread::scope(|scope| {
        let mut trials = Vec::new();
        // The trial is whichever request is sent there; the others are answered by the healthy one.
        eventually("a trial to be sent", || {
            let before = first.count();
            let proxy = &proxy;
            let asking = scope.spawn(move || proxy.ask_who(&Request::message()));
            eventually("an answer or a trial", || {
                (asking.is_finished() || first.count() > before).then_some(())
            });
            trials.push(asking);
            (first.count() > before).then_some(())
        });
        for _ in 0..5 {
            assert_eq!(proxy.ask_who(&Request::message()), "w2", "one trial at a time");
        }
        assert_eq!(first.count(), 2);
        gate.open();
        let served: Vec<String> = trials.into_iter().map(|trial| trial.join().expect("an answer")).collect();
        assert_eq!(served.iter().filter(|name| *name == "w1").count(), 1);
    });
    proxy.wait_idle();
    assert!(!proxy.is_open("w1"));
    eventually("traffic to come back", || (proxy.ask_who(&Request::message()) == "w1").then_some(()));
}

#[test]
fn a_failed_trial_opens_the_circuit_again() {
    let (first, healthy) = (Upstream::start(), Upstream::start());
    let proxy = opened(&first, &healthy, 0.3);
    first.answer(|_| Reply::error(500, "anthropic-500.json"));
    wait_half_open(&proxy);
    eventually("the trial to fail", || {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
        proxy.is_open("w1").then_some(())
    });
    assert_eq!(first.count(), 2);
    first.answer(|_| Reply::message());
    wait_half_open(&proxy);
    eventually("traffic to come back", || (proxy.ask_who(&Request::message()) == "w1").then_some(()));
}

#[test]
fn the_state_of_a_circuit_is_told_apart() {
    let (first, healthy) = (Upstream::start(), Upstream::start());
    let proxy = opened(&first, &healthy, 0.3);
    let states = std::cell::RefCell::new(Vec::new());
    eventually("all three states to be seen", || {
        let endpoint = proxy.endpoint("w1");
        let state = endpoint["state"].as_str().unwrap_or_default().to_owned();
        assert_eq!(endpoint["circuit_open"], state == "open", "{endpoint}");
        if states.borrow().last() != Some(&state) {
            states.borrow_mut().push(state.clone());
        }
        if state != "open" {
            proxy.ask_who(&Request::message());
        }
        (state == "closed").then_some(())
    });
    let states = states.into_inner();
    assert_eq!(states.first().map(String::as_str), Some("open"), "{states:?}");
    assert!(states.len() == 3 || states.len() == 2, "{states:?}");
}

#[test]
fn with_every_circuit_open_the_answer_is_a_503_at_once() {
    let failing = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let proxy = Proxy::with(&[&failing]).set("load_balancer.circuit_breaker_threshold", 1).start();
    proxy.ask(&Request::message());
    eventually("the circuit to open", || proxy.is_open("w1").then_some(()));
    let asked = failing.count();
    for request in [Request::message(), Request::stream()] {
        expect_nobody_left(&proxy.ask(&request), 503, "overloaded_error");
    }
    assert_eq!(failing.count(), asked);
}

#[test]
fn with_every_endpoint_cooling_the_answer_is_a_429() {
    let limited = |seconds: &str| {
        Upstream::always(Reply::error(429, "databricks-429.json").header("retry-after", seconds))
    };
    let (first, second) = (limited("20"), limited("40"));
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    assert_eq!(proxy.ask(&Request::message()).status(), 429);
    let answer = proxy.ask(&Request::message());
    expect_nobody_left(&answer, 429, "rate_limit_error");
    assert!(answer.number("retry-after") <= Some(20), "{answer:?}");
    assert_eq!((first.count(), second.count()), (1, 1), "nobody who cools is asked");
}

#[test]
fn a_sole_endpoint_comes_back_after_its_timeout() {
    let upstream = Upstream::start();
    let setup = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1);
    let setup = setup.set("load_balancer.circuit_breaker_timeout", 0.3).set("load_balancer.max_attempts", 1);
    let proxy = setup.start();
    upstream.queue([Reply::error(500, "anthropic-500.json")]);
    assert_eq!(proxy.ask(&Request::message()).status(), 500);
    wait_half_open(&proxy);
    assert_eq!(proxy.ask(&Request::message()).body, fixtures::message_json());
    assert!(!proxy.is_open("w1"));
}

#[test]
fn reset_closes_breakers_and_cooldowns_and_zeroes_errors() {
    let replies = [
        (Reply::error(500, "anthropic-500.json"), 503),
        (Reply::error(429, "databricks-429.json").header("retry-after", "50"), 429),
        (Reply::error(403, "databricks-403-invalid-token.json"), 0),
        (Reply::error(529, "anthropic-529.json"), 0),
    ];
    for (reply, status) in replies {
        let upstream = Upstream::script([reply]);
        let setup = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1);
        let proxy = setup.set("load_balancer.max_attempts", 1).start();
        proxy.ask(&Request::message());
        proxy.wait_idle();
        let answer = proxy.ask(&Request::message());
        assert_ne!(answer.status(), 200, "kept out");
        assert!(status == 0 || answer.status() == status, "{}", answer.text());
        let reset = proxy.ask(&Request::new("POST", "/reset"));
        assert_eq!((reset.status(), reset.json()["status"].as_str()), (200, Some("reset")));
        assert_eq!(proxy.number("w1", "total_errors"), 0);
        assert!(!proxy.is_open("w1"));
        assert_eq!(proxy.ask(&Request::message()).status(), 200);
        assert_eq!(upstream.count(), 2);
    }
}

#[test]
fn reset_leaves_running_requests_counted() {
    let upstreams = upstreams(1);
    let proxy = in_front_of(&upstreams, "least_requests").start();
    let gate = hold_all(&upstreams);
    let mut streams = hold(&proxy, 2);
    proxy.ask(&Request::new("POST", "/reset"));
    assert_eq!(proxy.active(), 2);
    gate.open();
    for stream in &mut streams {
        stream.rest();
    }
    proxy.wait_idle();
}
