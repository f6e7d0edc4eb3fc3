//! What is refused, how, and that a refusal harms nobody else.
//!
//! Most of these never send the body they announce: a refusal must not wait for it.

use crate::support::client::{Answer, KEY, Request};
use crate::support::fixtures;
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;

/// Sends these bytes and nothing more.
fn answer_to(proxy: &Proxy, bytes: &[u8]) -> Answer {
    let mut client = proxy.connect();
    client.send_bytes(bytes);
    client.answer()
}

/// The program lives, takes new connections, and still relays.
fn expect_unharmed(proxy: &Proxy) {
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
    proxy.wait_idle();
}

/// The head of a message request with extra header lines, and no body.
fn head_with(lines: &str) -> Vec<u8> {
    format!("POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\n{lines}\r\n").into_bytes()
}

#[test]
fn a_wrong_key_is_refused_before_the_body_is_read() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for headers in
        ["x-api-key: wrong\r\n", "Authorization: Bearer wrong\r\n", "Authorization: Basic abc\r\n", ""]
    {
        for framing in ["Content-Length: 300000", "Content-Length: 20", "Transfer-Encoding: chunked"] {
            let head = format!("POST /v1/messages HTTP/1.1\r\nHost: x\r\n{headers}{framing}\r\n\r\n");
            answer_to(&proxy, head.as_bytes()).error(401, "authentication_error");
        }
    }
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

#[test]
fn an_unknown_path_is_refused_before_the_body_is_read() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    for path in [
        "/v1/complete",
        "/v1/messages/",
        "/v1/messages/batches",
        "/V1/MESSAGES",
        "//v1/messages",
        "/favicon.ico",
    ] {
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: 300000\r\n\r\n");
        answer_to(&proxy, head.as_bytes()).error(404, "not_found_error");
    }
}

#[test]
fn a_wrong_method_names_the_right_ones() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let cases = [
        ("GET", "/v1/messages", "POST"),
        ("PUT", "/v1/messages?beta=true", "POST"),
        ("DELETE", "/v1/messages/count_tokens", "POST"),
        ("POST", "/health", "GET"),
        ("POST", "/stats", "GET"),
        ("GET", "/reset", "POST"),
        ("GET", "/api/event_logging/batch", "POST"),
    ];
    for (method, path, allowed) in cases {
        let request = Request::new(method, path).with("x-api-key", KEY).with("Content-Length", "0");
        let answer = proxy.ask(&request);
        answer.error(405, "invalid_request_error");
        let allow = answer.header("allow").unwrap_or_else(|| panic!("{method} {path}: no Allow"));
        assert!(allow.split(',').any(|method| method.trim() == allowed), "{method} {path}: Allow: {allow}");
    }
    answer_to(&proxy, b"PUT /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
        .error(405, "invalid_request_error");
}

fn small_limit(upstream: &Upstream) -> Setup {
    Proxy::with(&[upstream]).set("limits.max_body_bytes", 1_048_576)
}

fn expect_too_large(answer: &Answer, sizes: [&str; 2]) {
    let message = answer.error(413, "request_too_large");
    assert!(message.contains("/clear"), "{message}");
    assert!(message.matches("MB").count() >= 2, "both sizes in MB: {message}");
    for size in sizes {
        assert!(message.contains(size), "{size} in {message}");
    }
}

#[test]
fn a_body_over_the_limit_is_refused_unread_with_both_sizes() {
    let upstream = Upstream::start();
    let proxy = small_limit(&upstream).start();
    expect_too_large(&answer_to(&proxy, &head_with("Content-Length: 5242880\r\n")), ["5", "1"]);
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

#[test]
fn a_chunked_body_over_the_limit_is_refused() {
    let upstream = Upstream::start();
    let proxy = small_limit(&upstream).start();
    let body = format!(r#"{{"model":"claude-sonnet-4-5","x":"{}"}}"#, "y".repeat(1_200_000));
    let mut client = proxy.connect();
    client.send_if_taken(&Request::post_message(body).chunked(60_000).bytes());
    let message = client.answer().error(413, "request_too_large");
    assert!(message.contains("MB") && message.contains("/clear"), "{message}");
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

#[test]
fn a_body_just_inside_the_limit_passes() {
    let upstream = Upstream::start();
    let proxy = small_limit(&upstream).start();
    let frame = r#"{"model":"databricks-claude-sonnet-4-5","x":""}"#;
    for (padding, status) in [(1_048_576 - frame.len(), 200), (1_048_577 - frame.len(), 413)] {
        let body = frame.replace("\"\"", &format!("\"{}\"", "y".repeat(padding)));
        let mut client = proxy.connect();
        client.send_if_taken(&Request::post_message(body).bytes());
        assert_eq!(client.answer().status(), status);
    }
}

/// Invalid JSON gave a 500 (O12).
#[test]
fn a_body_that_is_no_message_is_a_400_that_says_why() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let cases = [
        ("", ""),
        ("not json", ""),
        (r#"{"model":"claude-sonnet-4-5""#, ""),
        (r#"{"model":"claude-sonnet-4-5"} trailing"#, ""),
        (r#"{"model":"claude-sonnet-4-5",}"#, ""),
        (r#"[{"model":"claude-sonnet-4-5"}]"#, "object"),
        (r#""claude-sonnet-4-5""#, "object"),
        ("{}", "model"),
        (r#"{"messages":[{"model":"claude-sonnet-4-5"}]}"#, "model"),
        (r#"{"model":7}"#, "model"),
        (r#"{"model":null}"#, "model"),
        (r#"{"model":["claude-sonnet-4-5"]}"#, "model"),
    ];
    for (body, word) in cases {
        let message = proxy.ask(&Request::post_message(body)).error(400, "invalid_request_error");
        assert!(message.contains(word), "{body}: {message}");
    }
    assert_eq!(upstream.count(), 0, "none of these reaches a workspace");
    assert_eq!(proxy.number("w1", "total_requests"), 0);
}

/// The library below reports the end of a short body as a normal end.
#[test]
fn a_body_shorter_than_announced_is_a_400() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for announced in [200, 30_000] {
        let mut client = proxy.connect();
        client.send_bytes(&head_with(&format!("Content-Length: {announced}\r\n")));
        client.send_bytes(br#"{"model":"claude-sonnet-4-5","messages":[]}"#);
        client.finish_sending();
        client.answer().error(400, "invalid_request_error");
    }
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

/// Two parsers that read a length differently let one request hide in another.
#[test]
fn an_ambiguous_length_is_refused_and_the_connection_closed() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let smuggled = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
    let cases = [
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -5\r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: five\r\n",
        "Content-Length: \r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    ];
    for lines in cases {
        let mut client = proxy.connect();
        client.send_bytes(&head_with(lines));
        client.send_if_taken(format!("0\r\n\r\n{smuggled}").as_bytes());
        let answer = client.answer();
        assert_eq!(answer.status(), 400, "{lines:?}: {}", answer.text());
        answer.error(400, "invalid_request_error");
        assert!(client.try_head().is_err(), "{lines:?}: the hidden request was answered");
    }
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

#[test]
fn a_transfer_encoding_other_than_chunked_is_a_501() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for coding in ["gzip, chunked", "identity", "gzip", "chunked, chunked", "xchunked"] {
        let mut client = proxy.connect();
        client.send_bytes(&head_with(&format!("Transfer-Encoding: {coding}\r\n")));
        client.answer().refusal(501);
        assert!(client.try_head().is_err(), "{coding}: the connection stayed open");
    }
    expect_unharmed(&proxy);
}

/// One such request aborted the whole process: the library below made room for the announced length.
#[test]
fn a_false_huge_length_harms_nothing() {
    let upstream = Upstream::start();
    let mut proxy = Proxy::with(&[&upstream]).start();
    let mut neighbour = proxy.connect();
    assert_eq!(neighbour.ask(&Request::get("/health")).status(), 200);
    for length in ["1000000000000", "999999999999999", "9223372036854775807", "18446744073709551615"] {
        let line = format!("Content-Length: {length}\r\n");
        answer_to(&proxy, &head_with(&line)).error(413, "request_too_large");
        for route in ["GET /health", "GET /no/such/route", "POST /v1/messages/count_tokens", "POST /reset"] {
            let mut client = proxy.connect();
            client.send_bytes(format!("{route} HTTP/1.1\r\nHost: x\r\n{line}\r\n").as_bytes());
            // Any answer will do, or a close; what matters is what happens to everyone else.
            client.try_head().ok();
        }
        let unknown = format!("POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: wrong\r\n{line}\r\n");
        answer_to(&proxy, unknown.as_bytes()).error(401, "authentication_error");
    }
    let beyond = answer_to(&proxy, &head_with("Content-Length: 99999999999999999999999999\r\n"));
    assert!([400, 413].contains(&beyond.status()), "{}", beyond.text());
    assert!(proxy.running.is_alive());
    assert_eq!(neighbour.ask(&Request::message()).body, fixtures::message_json());
    expect_unharmed(&proxy);
}

/// Such a line parked a thread and two descriptors for ever.
#[test]
fn another_http_version_is_a_505() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    for line in ["GET /health HTTP/2.0", "POST /v1/messages HTTP/3.0", "GET /health HTTP/1.2"] {
        let mut client = proxy.connect();
        client.send_bytes(format!("{line}\r\nHost: x\r\n\r\n").as_bytes());
        client.answer().refusal(505);
        assert!(client.try_head().is_err(), "{line}: the connection stayed open");
    }
    let mut preface = proxy.connect();
    preface.send_bytes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert!([400, 505].contains(&preface.answer().status()));
    expect_unharmed(&proxy);
}

#[test]
fn what_is_not_http_is_a_400() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n";
    let cases: [&[u8]; 6] = [
        tls_hello,
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET /health HTTP/1.1\r\nName : space before the colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: 1\r\n folded: yes\r\n\r\n",
    ];
    for bytes in cases {
        let mut client = proxy.connect();
        client.send_bytes(bytes);
        let answer = client.answer();
        assert_eq!(answer.status(), 400, "{:?}", String::from_utf8_lossy(bytes));
        answer.error(400, "invalid_request_error");
        assert!(
            client.try_head().is_err(),
            "{:?}: the connection stayed open",
            String::from_utf8_lossy(bytes)
        );
    }
    expect_unharmed(&proxy);
}

/// Someone points `https://` at it: a real hello has no blank line, so nothing may wait for one.
#[test]
fn a_tls_hello_without_a_line_end_is_refused_at_once() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("timeouts.head", 600).start();
    let mut client = proxy.connect();
    client.send_bytes(&[b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03".as_slice(), &[7; 200]].concat());
    client.answer().refusal(400);
}

#[test]
fn a_head_over_64_kib_is_a_431() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let endless = format!("GET /health HTTP/1.1\r\nHost: x\r\nX-Long: {}", "y".repeat(70_000));
    let many = format!("GET /health HTTP/1.1\r\n{}\r\n", "X-Many: 0123456789\r\n".repeat(4_000));
    for head in [endless, many] {
        let mut client = proxy.connect();
        client.send_if_taken(head.as_bytes());
        client.answer().refusal(431);
        assert!(client.try_head().is_err(), "the connection stayed open");
    }
    let large = Request::message().with("X-Long", &"y".repeat(50_000));
    let answer = proxy.ask(&large);
    assert_eq!(answer.status(), 200, "50 KB of head are allowed: {}", answer.text());
    assert_eq!(proxy.number("w1", "total_errors"), 0, "a long head is not the endpoint's fault");
}

#[test]
fn every_refusal_has_a_request_id_of_its_own() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let ids: Vec<String> = (0..3)
        .map(|_| proxy.ask(&Request::get("/no/such/route")))
        .map(|answer| answer.header("request-id").expect("a request-id").to_owned())
        .collect();
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");
}

#[test]
fn a_connection_lives_on_after_a_refusal_that_left_nothing_unread() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let mut client = proxy.connect();
    for _ in 0..3 {
        client.ask(&Request::get("/no/such/route")).error(404, "not_found_error");
        client.ask(&Request::post_message("not json")).error(400, "invalid_request_error");
        assert_eq!(client.ask(&Request::message()).status(), 200);
    }
}

/// A second request behind the first is not read ahead: the first is answered and the connection ends.
#[test]
fn a_pipelined_request_ends_the_connection_after_the_first_answer() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let two = [Request::get("/health").bytes(), Request::get("/health").bytes()].concat();
    let mut client = proxy.connect();
    client.send_bytes(&two);
    assert_eq!(client.answer().status(), 200);
    assert!(client.try_head().is_err(), "the second was answered too");
    expect_unharmed(&proxy);
}

/// What came behind a request that was still waiting, or whose body was still coming, once went into tiny_http's buffer:
/// the second request was never answered, and if it was long, its rest was judged as a head. Now it stays in the
/// kernel until its turn has come.
#[test]
fn a_request_behind_one_that_waits_has_its_turn_after_it() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::message().after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 1).start();
    let mut held = proxy.connect();
    held.send(&Request::message());
    upstream.wait_requests(1);
    let large = Request::post_message(format!(
        r#"{{"model":"claude-sonnet-4-5","max_tokens":1,"messages":[{{"role":"user","content":"{}"}}]}}"#,
        "x".repeat(40_000)
    ));
    let (mut queued, mut slow) = (proxy.connect(), proxy.connect());
    queued.send(&Request::message());
    let nearly_all = large.bytes().len() - 100;
    slow.send_bytes(&large.bytes()[..nearly_all]);
    // The watcher takes events in order: it has seen both by now.
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    queued.send_bytes(&large.bytes());
    slow.send_bytes(&[&large.bytes()[nearly_all..], &large.bytes()].concat());
    gate.open();
    assert_eq!(held.answer().status(), 200);
    for client in [&mut queued, &mut slow] {
        assert_eq!(client.answer().status(), 200);
        assert_eq!(client.answer().status(), 200);
    }
    expect_unharmed(&proxy);
}

/// A query that no URL library takes was booked as a missing token: one such request put every endpoint aside for
/// ten seconds and counted for their breakers.
#[test]
fn a_query_that_cannot_be_sent_is_the_clients_mistake() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1).start();
    for query in ["a=<b>", "a=\"b\""] {
        let message = String::from_utf8(Request::message().bytes()).expect("a request of text");
        let message = message.replace("?beta=true", &format!("?{query}"));
        answer_to(&proxy, message.as_bytes()).error(400, "invalid_request_error");
    }
    assert_eq!((upstream.count(), proxy.number("w1", "total_errors")), (0, 0));
    expect_unharmed(&proxy);
}
