//! The outcome table: what a failing workspace means for the breaker, for the next attempt and for the client.
//!
//! Every row is tried plain and streaming, with a healthy second endpoint and without one. The threshold is 1, so
//! a counted failure shows as an open circuit.

use std::time::Duration;

use crate::support::client::{Answer, End, Request};
use crate::support::fixtures;
use crate::support::proxy::{Proxy, Setup, token};
use crate::support::upstream::{DeadAddress, Recorded, Reply, Upstream};
use crate::support::{Stopwatch, eventually, together};

/// What the client sees when nobody else could be asked.
#[derive(Clone)]
enum Sees {
    /// An error in Anthropic's shape, made or passed on.
    Error(u16, &'static str),
    /// This status with the upstream's own body.
    AsIs(u16, Vec<u8>),
}

#[derive(Clone)]
struct Row {
    reply: Reply,
    counts: bool,
    moves: bool,
    alone: Sees,
}

fn plain_and_streaming(work: impl Fn(&Request) + Sync) {
    together(2, |index| work(&if index == 0 { Request::message() } else { Request::stream() }));
}

fn one_strike(upstreams: &[&Upstream]) -> Setup {
    Proxy::with(upstreams).in_order().set("load_balancer.circuit_breaker_threshold", 1)
}

fn expect(sees: &Sees, answer: &Answer) {
    match sees {
        Sees::Error(status, kind) => {
            answer.error(*status, kind);
        }
        Sees::AsIs(status, body) => {
            assert_eq!(answer.status(), *status, "{}", answer.text());
            assert_eq!(answer.text(), String::from_utf8_lossy(body));
        }
    }
    assert_eq!(answer.end, End::Complete);
}

fn expect_healthy(answer: &Answer) {
    assert_eq!((answer.status(), answer.end), (200, End::Complete), "{}", answer.text());
    assert!(answer.body == fixtures::message_json() || answer.body == fixtures::transcript("text"));
}

fn expect_breaker(proxy: &Proxy, endpoint: &str, counted: bool) {
    proxy.wait_idle();
    if counted {
        eventually("the circuit to open", || proxy.is_open(endpoint).then_some(()));
        assert!(proxy.number(endpoint, "total_errors") >= 1);
    } else {
        assert!(!proxy.is_open(endpoint), "{}", proxy.endpoint(endpoint));
    }
}

fn check(row: &Row) {
    plain_and_streaming(|request| {
        let (failing, healthy) = (Upstream::always(row.reply.clone()), Upstream::start());
        let proxy = one_strike(&[&failing, &healthy]).set("timeouts.first_byte", 0.3).start();
        let answer = proxy.ask(request);
        assert_eq!(failing.count(), 1, "the first endpoint is asked exactly once");
        if row.moves {
            expect_healthy(&answer);
            assert_eq!(answer.header("x-claude-lb-endpoint"), Some("w2"));
            assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
            expect_same_request(&failing.requests()[0], &healthy.requests()[0]);
        } else {
            expect(&row.alone, &answer);
            assert_eq!(answer.header("x-claude-lb-attempts"), Some("1"));
            assert_eq!(healthy.count(), 0, "nobody else is asked");
        }
        expect_breaker(&proxy, "w1", row.counts);
    });
    plain_and_streaming(|request| {
        let failing = Upstream::always(row.reply.clone());
        let proxy = one_strike(&[&failing]).set("timeouts.first_byte", 0.3).start();
        let answer = proxy.ask(request);
        expect(&row.alone, &answer);
        if !row.moves {
            assert_eq!(failing.count(), 1, "the same words are not sent twice");
        }
        expect_breaker(&proxy, "w1", row.counts);
    });
}

/// Every attempt sends identical bytes, apart from whose door it knocks at.
fn expect_same_request(first: &Recorded, second: &Recorded) {
    let lines = |recorded: &Recorded| {
        let is_own = |line: &&String| {
            !["host:", "authorization:"].iter().any(|own| line.to_lowercase().starts_with(own))
        };
        recorded.lines.iter().filter(is_own).cloned().collect::<Vec<_>>()
    };
    assert_eq!(lines(first), lines(second));
    assert!(first.body == second.body, "the bodies differ");
    assert_eq!(first.header("authorization"), Some(format!("Bearer {}", token(0)).as_str()));
    assert_eq!(second.header("authorization"), Some(format!("Bearer {}", token(1)).as_str()));
}

fn row(reply: Reply, counts: bool, moves: bool, alone: Sees) -> Row {
    Row { reply, counts, moves, alone }
}

fn error_row(status: u16, file: &str, counts: bool, moves: bool) -> Row {
    row(Reply::error(status, file), counts, moves, Sees::AsIs(status, fixtures::error_body(file)))
}

#[test]
fn server_errors_count_and_move_on() {
    let page = |status| Reply::json(status, fixtures::error_body("anthropic-500.json"));
    let body = fixtures::error_body("anthropic-500.json");
    together(4, |index| {
        let status = [500, 502, 503, 504][index];
        check(&row(page(status), true, true, Sees::AsIs(status, body.clone())));
    });
}

#[test]
fn a_429_counts_and_moves_on() {
    check(&error_row(429, "databricks-429.json", true, true));
    check(&error_row(429, "anthropic-429.json", true, true));
}

#[test]
fn a_529_moves_on_without_blame() {
    check(&error_row(529, "anthropic-529.json", false, true));
}

/// One revoked token made both predecessors a black hole: 20 of 20 requests failed (O8).
#[test]
fn a_401_moves_on_and_becomes_a_403_at_the_end() {
    let body = fixtures::error_body("databricks-401.json");
    check(&row(Reply::error(401, "databricks-401.json"), false, true, Sees::AsIs(403, body)));
}

#[test]
fn a_403_moves_on_without_blame() {
    check(&error_row(403, "databricks-403-invalid-token.json", false, true));
    check(&error_row(403, "databricks-403-rate-limit-zero.json", false, true));
}

#[test]
fn a_404_for_a_missing_endpoint_moves_on_without_blame() {
    check(&error_row(404, "databricks-404.json", false, true));
}

/// The client sends up to six of these on purpose and repairs itself from the words.
#[test]
fn a_client_error_never_reaches_a_second_endpoint() {
    let cases = [
        (400, "anthropic-400.json"),
        (402, "anthropic-402.json"),
        (413, "anthropic-413.json"),
        (422, "anthropic-400.json"),
    ];
    together(cases.len(), |index| check(&error_row(cases[index].0, cases[index].1, false, false)));
}

#[test]
fn a_json_client_error_of_any_shape_passes_unchanged() {
    let bodies = [r#"{"detail":[{"loc":["body"],"msg":"bad"}]}"#, r#"["just", "a list"]"#, r#""a text""#];
    together(bodies.len(), |index| {
        let body = bodies[index];
        check(&row(Reply::json(400, body), false, false, Sees::AsIs(400, body.into())));
    });
}

#[test]
fn a_close_before_the_status_counts_and_moves_on() {
    check(&row(Reply::hang_up(), true, true, Sees::Error(502, "api_error")));
}

#[test]
fn a_reset_before_the_status_counts_and_moves_on() {
    check(&row(Reply::reset_at_once(), true, true, Sees::Error(502, "api_error")));
}

#[test]
fn garbage_before_the_status_counts_and_moves_on() {
    check(&row(Reply::garbage("SSH-2.0-OpenSSH_9.9\r\n\r\n"), true, true, Sees::Error(502, "api_error")));
}

#[test]
fn half_a_head_counts_and_moves_on() {
    let half = Reply::garbage("HTTP/1.1 200 OK\r\ncontent-type: applica");
    check(&row(half, true, true, Sees::Error(502, "api_error")));
}

#[test]
fn a_login_page_with_status_200_counts_and_moves_on() {
    let page = Reply::page(200, "text/html; charset=utf-8", "<!doctype html><title>Sign in</title>");
    check(&row(page, true, true, Sees::Error(502, "api_error")));
}

#[test]
fn silence_before_the_first_byte_counts_and_moves_on() {
    check(&row(Reply::silence(), true, true, Sees::Error(504, "timeout_error")));
}

/// After `first_byte` the only endpoint is not asked again: nobody waits twice that long.
#[test]
fn a_silent_sole_endpoint_is_asked_once() {
    plain_and_streaming(|request| {
        let silent = Upstream::always(Reply::silence());
        let proxy = Proxy::with(&[&silent]).set("timeouts.first_byte", 0.3).start();
        let answer = proxy.ask(request);
        answer.error(504, "timeout_error");
        assert_eq!(silent.count(), 1);
        silent.wait_client_gone(1);
        proxy.wait_idle();
    });
}

#[test]
fn an_overloaded_first_event_is_a_529() {
    let reply = Reply::stream(fixtures::transcript("error_first_event"));
    let (failing, healthy) = (Upstream::always(reply.clone()), Upstream::start());
    let proxy = one_strike(&[&failing, &healthy]).start();
    let answer = proxy.ask(&Request::stream());
    expect_healthy(&answer);
    assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
    expect_breaker(&proxy, "w1", false);
    let alone = one_strike(&[&Upstream::always(reply)]).start();
    alone.ask(&Request::stream()).error(529, "overloaded_error");
}

#[test]
fn a_refused_connection_counts_and_moves_on() {
    plain_and_streaming(|request| {
        let (dead, healthy) = (DeadAddress::new(), Upstream::start());
        let first = Proxy::with(&[]).and_endpoint_at(dead.address());
        let setup = first.and_endpoint_at(healthy.address()).in_order();
        let proxy = setup.set("load_balancer.circuit_breaker_threshold", 1).start();
        let answer = proxy.ask(request);
        expect_healthy(&answer);
        assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
        expect_breaker(&proxy, "w1", true);
        let alone = Proxy::with(&[]).and_endpoint_at(dead.address()).start();
        alone.ask(request).error(502, "api_error");
    });
}

#[test]
fn an_unknown_host_counts_and_moves_on() {
    let healthy = Upstream::start();
    let setup = Proxy::with(&[&healthy, &healthy]).in_order();
    let setup = setup.endpoint(0, "api_base", "http://no-such-host.invalid/serving-endpoints");
    let proxy = setup.set("load_balancer.circuit_breaker_threshold", 1).start();
    expect_healthy(&proxy.ask(&Request::message()));
    expect_breaker(&proxy, "w1", true);
}

#[test]
fn a_redirect_is_not_followed() {
    let elsewhere = Upstream::start();
    let target = format!("http://{}/login", elsewhere.address());
    for status in [302, 307, 308] {
        let upstream =
            Upstream::always(Reply::page(status, "text/html", "moved").header("location", &target));
        let proxy = Proxy::with(&[&upstream]).start();
        proxy.ask(&Request::message()).error(502, "api_error");
    }
    assert_eq!(elsewhere.count(), 0);
}

/// The server may close a pooled connection at any moment; that says nothing about its health.
#[test]
fn a_stale_pooled_connection_is_replaced_without_blame() {
    for stale in [Reply::hang_up(), Reply::reset_at_once()] {
        plain_and_streaming(|request| {
            let upstream = Upstream::script([Reply::message(), stale.clone()]);
            let proxy = one_strike(&[&upstream]).start();
            expect_healthy(&proxy.ask(&Request::message()));
            expect_healthy(&proxy.ask(request));
            let connections: Vec<usize> =
                upstream.requests().iter().map(|request| request.connection).collect();
            assert_eq!(connections, [0, 0, 1]);
            expect_breaker(&proxy, "w1", false);
            assert_eq!(proxy.number("w1", "total_errors"), 0);
        });
    }
}

#[test]
fn a_connection_that_went_stale_while_idle_is_replaced_without_blame() {
    let upstream = Upstream::script([Reply::message().then_close()]);
    let proxy = one_strike(&[&upstream]).start();
    expect_healthy(&proxy.ask(&Request::message()));
    upstream.wait_open_connections(0);
    expect_healthy(&proxy.ask(&Request::message()));
    assert_eq!((upstream.count(), upstream.connections()), (2, 2));
    assert_eq!(proxy.number("w1", "total_errors"), 0);
}

#[test]
fn a_server_that_hangs_up_on_the_fresh_connection_too_is_to_blame() {
    let failing = Upstream::script([Reply::message()]);
    failing.answer(|_| Reply::hang_up());
    let healthy = Upstream::start();
    let proxy = one_strike(&[&failing, &healthy]).start();
    assert_eq!(proxy.ask_who(&Request::message()), "w1");
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    assert_eq!(failing.count(), 3);
    expect_breaker(&proxy, "w1", true);
}

#[test]
fn an_html_error_page_becomes_an_anthropic_error() {
    plain_and_streaming(|request| {
        let upstream = Upstream::always(Reply::error(503, "databricks-503.html"));
        let proxy = Proxy::with(&[&upstream]).start();
        let answer = proxy.ask(request);
        let body = answer.json();
        assert_eq!((answer.status(), body["type"].as_str()), (503, Some("error")));
        let message = body["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("upstream connect error"), "{message}");
        assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
    });
}

#[test]
fn an_empty_error_becomes_an_anthropic_error() {
    plain_and_streaming(|request| {
        let upstream = Upstream::always(Reply::page(500, "", ""));
        let proxy = Proxy::with(&[&upstream]).start();
        assert!(!proxy.ask(request).error(500, "api_error").is_empty());
    });
}

#[test]
fn a_server_error_of_another_shape_is_wrapped_with_its_words() {
    let upstream =
        Upstream::always(Reply::json(500, r#"{"error_code":"INTERNAL_ERROR","message":"lost my way"}"#));
    let proxy = Proxy::with(&[&upstream]).start();
    assert!(proxy.ask(&Request::message()).error(500, "api_error").contains("lost my way"));
}

#[test]
fn a_client_error_that_is_no_json_is_wrapped_with_its_words() {
    let upstream = Upstream::always(Reply::page(400, "text/plain", "the request was no good"));
    let proxy = Proxy::with(&[&upstream]).start();
    let message = proxy.ask(&Request::message()).error(400, "invalid_request_error");
    assert!(message.contains("the request was no good"), "{message}");
}

#[test]
fn a_token_quoted_in_an_error_body_is_masked() {
    for status in [400, 403, 500] {
        let body = format!(r#"{{"error_code":"X","message":"token {} is not welcome"}}"#, token(0));
        let upstream = Upstream::always(Reply::json(status, body));
        let proxy = Proxy::with(&[&upstream]).start();
        let answer = proxy.ask(&Request::message());
        assert_eq!(answer.status(), status);
        assert!(!answer.text().contains(&token(0)), "{}", answer.text());
        assert!(answer.text().contains("is not welcome"), "{}", answer.text());
    }
}

/// The predecessor turned the last 429 into a 503 and ignored Retry-After (O7).
#[test]
fn the_last_429_names_the_soonest_return() {
    let limited = |seconds: &str| {
        Upstream::always(Reply::error(429, "databricks-429.json").header("retry-after", seconds))
    };
    for (first, second, soonest) in [("30", "7", 7), ("9", "40", 9), ("300", "500", 60)] {
        let (first, second) = (limited(first), limited(second));
        let proxy = Proxy::with(&[&first, &second]).in_order().start();
        let answer = proxy.ask(&Request::message());
        assert_eq!(answer.status(), 429, "{}", answer.text());
        assert_eq!(answer.body, fixtures::error_body("databricks-429.json"));
        let seconds = answer.number("retry-after").expect("a retry-after");
        assert!((soonest - 1..=soonest).contains(&seconds), "{seconds} instead of {soonest}");
        assert_eq!((first.count(), second.count()), (1, 1));
    }
}

#[test]
fn a_429_cools_only_its_model() {
    let limited = Upstream::start();
    limited.answer(|request| match request.json()["model"].as_str() {
        Some("databricks-claude-sonnet-4-5") => {
            Reply::error(429, "databricks-429.json").header("retry-after", "30")
        }
        _ => Reply::message(),
    });
    let healthy = Upstream::start();
    let proxy = Proxy::with(&[&limited, &healthy]).in_order().start();
    for _ in 0..3 {
        assert_eq!(proxy.ask_who(&Request::message_for("claude-sonnet-4-5", false)), "w2");
    }
    assert_eq!(limited.count(), 1, "while it cools it is not asked for this model");
    assert_eq!(proxy.ask_who(&Request::message_for("claude-opus-4-5", false)), "w1");
}

#[test]
fn a_529_or_a_missing_model_cools_only_its_model() {
    for (status, file) in [(529, "anthropic-529.json"), (404, "databricks-404.json")] {
        let failing = Upstream::start();
        failing.answer(move |request| match request.json()["model"].as_str() {
            Some("databricks-claude-sonnet-4-5") => Reply::error(status, file),
            _ => Reply::message(),
        });
        let healthy = Upstream::start();
        let proxy = Proxy::with(&[&failing, &healthy]).in_order().start();
        for _ in 0..3 {
            assert_eq!(proxy.ask_who(&Request::message_for("claude-sonnet-4-5", false)), "w2", "{status}");
        }
        assert_eq!(failing.count(), 1, "{status}");
        assert_eq!(proxy.ask_who(&Request::message_for("claude-opus-4-5", false)), "w1", "{status}");
    }
}

#[test]
fn a_503_with_retry_after_keeps_the_endpoint_out() {
    let busy = Upstream::script([Reply::error(503, "anthropic-529.json").header("retry-after", "30")]);
    let healthy = Upstream::start();
    let proxy = Proxy::with(&[&busy, &healthy]).in_order().start();
    for model in ["claude-sonnet-4-5", "claude-sonnet-4-5", "claude-opus-4-5"] {
        assert_eq!(proxy.ask_who(&Request::message_for(model, false)), "w2");
    }
    assert_eq!(busy.count(), 1);
}

#[test]
fn a_rejected_token_keeps_the_endpoint_out_and_is_logged_loudly() {
    let rejected = Upstream::always(Reply::error(403, "databricks-403-invalid-token.json"));
    let healthy = Upstream::start();
    let proxy = Proxy::with(&[&rejected, &healthy]).in_order().start();
    for model in ["claude-sonnet-4-5", "claude-opus-4-5", "claude-haiku-4-5"] {
        assert_eq!(proxy.ask_who(&Request::message_for(model, false)), "w2");
    }
    assert_eq!(rejected.count(), 1);
    let loud = |line: &String| {
        let line = line.to_lowercase();
        line.contains("w1") && (line.contains("warn") || line.contains("error"))
    };
    eventually("a warning that names the endpoint", || {
        proxy.running.err.all().iter().find(|line| loud(line)).cloned()
    });
}

/// The predecessor excluded only the last failure and asked A, B, A instead of A, B, C (O16); its fork excluded
/// nobody (F2).
#[test]
fn no_endpoint_is_asked_twice_while_another_is_untried() {
    let failing: Vec<Upstream> =
        (0..4).map(|_| Upstream::always(Reply::error(500, "anthropic-500.json"))).collect();
    let proxy = Proxy::with(&failing.iter().take(3).collect::<Vec<_>>()).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.header("x-claude-lb-attempts")), (500, Some("3")));
    assert_eq!(failing.iter().map(Upstream::count).collect::<Vec<_>>(), [1, 1, 1, 0]);
}

#[test]
fn max_attempts_is_a_limit() {
    let failing: Vec<Upstream> =
        (0..4).map(|_| Upstream::always(Reply::error(500, "anthropic-500.json"))).collect();
    let setup = Proxy::with(&failing.iter().collect::<Vec<_>>());
    let proxy = setup.set("load_balancer.max_attempts", 2).start();
    assert_eq!(proxy.ask(&Request::message()).header("x-claude-lb-attempts"), Some("2"));
    assert_eq!(failing.iter().map(Upstream::count).sum::<usize>(), 2);
}

/// The predecessors slept 1 + 2 + 4 s even when an idle workspace stood by (O7). Ten failovers in the time of the
/// shortest of those sleeps leave no room for any.
#[test]
fn another_endpoint_is_asked_without_a_pause() {
    let failing = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let healthy = Upstream::start();
    let setup = Proxy::with(&[&failing, &healthy]).in_order();
    let proxy = setup.set("load_balancer.circuit_breaker_threshold", 1_000).start();
    let watch = Stopwatch::start();
    for _ in 0..10 {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
    }
    assert!(watch.elapsed() < Duration::from_secs(3), "{:?}", watch.elapsed());
    assert_eq!(failing.count(), 10);
}

#[test]
fn a_sole_endpoint_is_asked_once_more_after_a_pause() {
    plain_and_streaming(|request| {
        let upstream = Upstream::script([Reply::error(500, "anthropic-500.json")]);
        let proxy = Proxy::with(&[&upstream]).start();
        let watch = Stopwatch::start();
        let answer = proxy.ask(request);
        expect_healthy(&answer);
        assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
        assert!(watch.elapsed() >= Duration::from_millis(290), "{:?}", watch.elapsed());
    });
}

#[test]
fn a_sole_endpoint_is_not_asked_a_third_time() {
    let upstream = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 500);
    assert_eq!(upstream.count(), 2);
}

/// What a client must never see is half a JSON answer with a whole ending.
#[test]
fn a_json_answer_cut_off_is_never_shown_as_whole() {
    let (cut, healthy) = (Upstream::script([Reply::message().declaring(10_000).close()]), Upstream::start());
    let proxy = one_strike(&[&cut, &healthy]).start();
    let mut client = proxy.connect();
    client.send(&Request::message());
    if let Ok(head) = client.try_head() {
        let (body, end) = client.rest();
        let is_the_second =
            head.header("x-claude-lb-endpoint") == Some("w2") && body == fixtures::message_json();
        assert!(end.is_broken() || is_the_second || head.status == 502, "{head:?} {end:?}");
    }
    expect_breaker(&proxy, "w1", true);
}
