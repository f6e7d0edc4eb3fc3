//! The small routes: health, stats, reset, the client's probes, counting tokens.

use serde_json::{Value, json};

use crate::support::client::{Answer, Client, End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures, together};

fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    (upstream, proxy)
}

#[test]
fn health_needs_no_key() {
    let (_upstream, proxy) = proxy();
    for route in ["/health", "/health/live", "/health?from=probe"] {
        let answer = proxy.ask(&Request::get(route));
        assert_eq!((answer.status(), answer.json()), (200, json!({"status": "healthy"})), "{route}");
    }
    assert_eq!(proxy.ask(&Request::get("/health/ready")).status(), 200);
}

#[test]
fn head_is_answered_without_a_body_and_the_connection_lives() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    for route in ["/health", "/health/live", "/health/ready", "/", "/api/hello"] {
        let answer = client.ask(&Request::new("HEAD", route));
        assert_eq!((answer.status(), answer.end), (200, End::Complete), "{route}");
    }
    assert_eq!(client.ask(&Request::get("/health")).status(), 200);
}

#[test]
fn ready_says_no_with_reasons_when_no_endpoint_is_usable() {
    let upstream = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let proxy = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1).start();
    assert_eq!(proxy.ask(&Request::get("/health/ready")).status(), 200);
    proxy.ask(&Request::message());
    let answer = eventually("readiness to be 503", || {
        let answer = proxy.ask(&Request::get("/health/ready"));
        (answer.status() == 503).then_some(answer)
    });
    assert!(answer.text().contains("w1"), "a reason that names the endpoint: {}", answer.text());
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200, "it is alive all the same");
    assert_eq!(proxy.ask(&Request::new("HEAD", "/health/ready")).status(), 503);
}

#[test]
fn stats_holds_the_five_fields_of_every_endpoint() {
    let upstreams = [Upstream::start(), Upstream::start()];
    let proxy = Proxy::with(&[&upstreams[0], &upstreams[1]]).start();
    proxy.ask(&Request::message());
    let stats = proxy.stats();
    let endpoints = stats["endpoints"].as_array().expect("a list");
    let names: Vec<&Value> = endpoints.iter().map(|endpoint| &endpoint["name"]).collect();
    assert_eq!(names, ["w1", "w2"], "in the order of the configuration");
    for endpoint in endpoints {
        for field in ["active_requests", "total_requests", "total_errors"] {
            assert!(endpoint[field].is_u64(), "{field} of {endpoint}");
        }
        assert_eq!(endpoint["circuit_open"], false);
    }
    let total: u64 = endpoints.iter().filter_map(|endpoint| endpoint["total_requests"].as_u64()).sum();
    assert_eq!(total, 1);
}

#[test]
fn event_logging_is_swallowed() {
    let (upstream, proxy) = proxy();
    let mut client = proxy.connect();
    for route in ["/api/event_logging/batch", "/api/event_logging/v2/batch"] {
        for size in [10, 50_000] {
            let request = Request::new("POST", route).body("x".repeat(size));
            let answer = client.ask(&request);
            assert_eq!((answer.status(), answer.json()), (200, json!({"status": "ok"})), "{route} {size}");
        }
    }
    assert_eq!(upstream.count(), 0);
}

#[test]
fn the_captured_start_up_probes_are_answered() {
    let (_upstream, proxy) = proxy();
    for captured in fixtures::captured().iter().filter(|captured| captured.method == "HEAD") {
        assert_eq!(proxy.ask(&Request::captured(captured)).status(), 200, "{}", captured.name);
    }
}

#[test]
fn unknown_paths_and_methods_are_told_in_anthropics_shape() {
    let (_upstream, proxy) = proxy();
    for request in
        [Request::get("/nothing"), Request::new("OPTIONS", "/nothing"), Request::get("/health/other")]
    {
        proxy.ask(&request).error(404, "not_found_error");
    }
    proxy.ask(&Request::new("DELETE", "/stats")).error(405, "invalid_request_error");
    proxy.ask(&Request::new("BREW", "/health")).error(405, "invalid_request_error");
}

/// `/stats` and `/reset` were open to everyone (O17, F8).
#[test]
fn protect_admin_asks_for_the_key() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("auth.protect_admin", true).start();
    for request in [Request::get("/stats"), Request::new("POST", "/reset")] {
        proxy.ask(&request).error(401, "authentication_error");
        proxy.ask(&request.clone().with("x-api-key", "wrong")).error(401, "authentication_error");
        assert_eq!(proxy.ask(&request.with("x-api-key", KEY)).status(), 200);
    }
    for route in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(proxy.ask(&Request::get(route)).status(), 200, "{route}");
    }
}

#[test]
fn without_keys_on_loopback_everyone_is_served() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).unset("auth.api_key").set("auth.mode", "none").start();
    assert_eq!(proxy.ask(&Request::message().without("x-api-key")).status(), 200);
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    assert!(upstream.requests().iter().all(|request| request.header("x-api-key").is_none()));
}

fn count(body: impl AsRef<[u8]>) -> Request {
    Request::new("POST", "/v1/messages/count_tokens?beta=true")
        .with("Content-Type", "application/json")
        .body(body)
}

fn tokens(answer: &Answer) -> u64 {
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["input_tokens"].as_u64().unwrap_or_else(|| panic!("no input_tokens: {}", answer.text()))
}

#[test]
fn the_captured_count_tokens_requests_are_answered() {
    let (upstream, proxy) = proxy();
    for (name, least, most) in [
        ("count-tokens-text", 200, 1_500),
        ("count-tokens-tools", 4_000, 20_000),
        ("count-tokens-large", 12_000, 70_000),
    ] {
        let request = Request::captured(&fixtures::captured_named(name));
        let counted = tokens(&proxy.ask(&request));
        assert!((least..=most).contains(&counted), "{name}: {counted}");
        assert_eq!(tokens(&proxy.ask(&request.without("x-api-key").without("authorization"))), counted);
    }
    assert_eq!(upstream.count(), 0, "it is counted here");
}

/// A system prompt of 40 kB counted as 8 tokens, and a tool list of 30 KB as 10 (O14).
#[test]
fn system_tools_and_all_content_count() {
    let (_upstream, proxy) = proxy();
    let long = "several words that make a sentence. ".repeat(600);
    let base = json!({"model": "claude-sonnet-4-5", "messages": [{"role": "user", "content": "hello"}]});
    let small = tokens(&proxy.ask(&count(base.to_string())));
    assert!((1..100).contains(&small), "{small}");
    let block = |block: Value| json!([{"role": "user", "content": [block]}]);
    let tool = json!([{"name": "t", "description": long, "input_schema": {"type": "object"}}]);
    let additions = [
        ("system", json!(long)),
        ("system", json!([{"type": "text", "text": long}])),
        ("tools", tool),
        ("messages", json!([{"role": "user", "content": long}])),
        ("messages", block(json!({"type": "text", "text": long}))),
        ("messages", block(json!({"type": "tool_result", "tool_use_id": "t", "content": long}))),
        (
            "messages",
            json!([{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "t", "input": {"text": long}}]}]),
        ),
        (
            "messages",
            block(
                json!({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": long}}),
            ),
        ),
    ];
    for (field, value) in additions {
        let mut body = base.clone();
        body[field] = value;
        let counted = tokens(&proxy.ask(&count(body.to_string())));
        assert!(counted > small + 2_500, "{field}: {counted}");
    }
}

#[test]
fn what_cannot_be_counted_is_a_400() {
    let (_upstream, proxy) = proxy();
    for body in ["", "not json", "[1,2]"] {
        proxy.ask(&count(body)).error(400, "invalid_request_error");
    }
    let mut client = proxy.connect();
    client.send_bytes(
        b"POST /v1/messages/count_tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n\r\n",
    );
    client.answer().error(413, "request_too_large");
}

/// `/context` asks 26 times over up to 14 connections, while a turn is running.
#[test]
fn a_burst_of_count_tokens_is_answered_while_every_worker_is_busy() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::message().after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 1).start();
    let mut held = proxy.connect();
    held.send(&Request::message());
    upstream.wait_requests(1);
    let captured = fixtures::captured_named("count-tokens-tools");
    let expected = tokens(&proxy.ask(&Request::captured(&captured)));
    together(14, |connection| {
        let mut client: Client = proxy.connect();
        for _ in 0..(if connection < 12 { 2 } else { 1 }) {
            assert_eq!(tokens(&client.ask(&Request::captured(&captured))), expected);
        }
    });
    gate.open();
    assert_eq!(held.answer().status(), 200);
}

/// Counting needs no key, so slow senders must not lock it.
#[test]
fn slow_count_tokens_bodies_do_not_stop_the_rest() {
    let (_upstream, proxy) = proxy();
    let slow: Vec<Client> = (0..4)
        .map(|_| {
            let mut client = proxy.connect();
            let head = "POST /v1/messages/count_tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n{";
            client.send_bytes(head.as_bytes());
            client
        })
        .collect();
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    drop(slow);
    eventually("counting to be possible", || {
        (proxy.ask(&count(r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#)).status() == 200)
            .then_some(())
    });
}
