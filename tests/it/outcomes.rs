//! The outcome table: what a failing workspace means for the breaker, for the next attempt and for the client.
//!
//! Every row is tried plain and streaming, with a healthy second endpoint and without one. The threshold is 1, so
//! a counted failure shows as an open circuit.

use crate::support::client::{Answer, End, Request};
use crate::support::fixtures;
use crate::support::proxy::{Proxy, Setup, token};
use crate::support::reply::Reply;
use crate::support::upstream::{DeadAddress, Recorded, Upstream};
use crate::support::{eventually, together};

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

/// The client saw the 101 as it was, and would have waited for the answer behind it.
#[test]
fn a_switch_of_protocols_counts_and_moves_on() {
    let switching =
        Reply::garbage("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n");
    check(&row(switching, true, true, Sees::Error(502, "api_error")));
}

/// The next workspace was asked only after `idle`, five minutes: the status alone had said enough.
#[test]
fn an_error_body_that_stalls_does_not_hold_the_request_up() {
    let stalled = Reply::json(503, b"{").declaring(100).stall();
    check(&row(stalled, true, true, Sees::Error(503, "api_error")));
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
