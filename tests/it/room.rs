//! Limits of the workspaces: where there is room, waiting for it, and what is said when there is none in time.

use serde_json::{Value, json};

use crate::support::client::{Client, End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{Stopwatch, eventually};

/// Each request reserves 64 output tokens, so that one fits and a second does not.
const ONE_AT_A_TIME: &str = "{ output_tokens_per_minute: 100 }";

/// A message that took so many tokens.
fn taking(input: u64, output: u64) -> Reply {
    let usage = json!({ "input_tokens": input, "output_tokens": output });
    Reply::json(200, json!({ "type": "message", "content": [], "usage": usage }).to_string())
}

/// One workspace that takes one request at a time and holds its answers until the gate opens.
fn held_by(gate: &Gate) -> (Upstream, Setup) {
    let upstream = Upstream::always(taking(20, 5).after(gate));
    let setup = Proxy::with(&[&upstream]).endpoint(0, "limits", ONE_AT_A_TIME);
    (upstream, setup)
}

fn sent(proxy: &Proxy, request: &Request) -> Client {
    let mut client = proxy.connect();
    client.send(request);
    client
}

fn wait_waiting(proxy: &Proxy, count: u64) {
    eventually("requests to wait for room", || (proxy.stats()["waiting_for_room"] == count).then_some(()));
}

/// What `/stats` says of the limits of `w1` for the one model that was asked for.
fn now(proxy: &Proxy) -> Value {
    let limits = proxy.endpoint("w1")["limits"].clone();
    assert_eq!(limits["now"].as_array().map(Vec::len), Some(1), "{limits}");
    limits["now"][0].clone()
}

#[test]
fn requests_go_to_the_workspace_with_room() {
    let gate = Gate::closed();
    let (first, setup) = held_by(&gate);
    let second = Upstream::start();
    let proxy = setup.and_endpoint_at(second.address()).in_order().start();
    let mut held = sent(&proxy, &Request::message());
    first.wait_requests(1);
    for _ in 0..3 {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
    }
    let level = now(&proxy);
    assert_eq!(level["model"], "databricks-claude-sonnet-4-5");
    assert_eq!(level["output_tokens_per_minute"], json!({ "used": 64, "limit": 100, "learned": null }));
    // Each model has an account of its own.
    let mut other = sent(&proxy, &Request::message_for("claude-opus-4-5", false));
    first.wait_requests(2);
    gate.open();
    assert_eq!([held.answer().status(), other.answer().status()], [200, 200]);
    proxy.wait_idle();
    assert_eq!(now_of(&proxy, "databricks-claude-sonnet-4-5")["output_tokens_per_minute"]["used"], 5);
    assert_eq!(proxy.ask_who(&Request::message()), "w1", "what was not used is free again");
}

fn now_of(proxy: &Proxy, model: &str) -> Value {
    let limits = proxy.endpoint("w1")["limits"].clone();
    let models = limits["now"].as_array().expect("a list");
    models
        .iter()
        .find(|level| level["model"] == model)
        .unwrap_or_else(|| panic!("no {model}: {limits}"))
        .clone()
}

#[test]
fn a_request_waits_for_room_and_is_served() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 60).start();
    let mut held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let mut waiting: Vec<Client> = (0..3).map(|_| sent(&proxy, &Request::message())).collect();
    wait_waiting(&proxy, 3);
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    assert_eq!((upstream.count(), proxy.active()), (1, 1));
    gate.open();
    assert_eq!(held.answer().status(), 200);
    for client in &mut waiting {
        let answer = client.answer();
        assert_eq!((answer.status(), answer.header("x-claude-lb-attempts")), (200, Some("1")));
    }
    wait_waiting(&proxy, 0);
    assert_eq!(upstream.count(), 4);
}

/// Who asks why it took so long learns that it waited, and for what.
#[test]
fn a_wait_for_room_is_explained() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 60).start();
    let mut held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let mut waiting = sent(&proxy, &Request::message());
    wait_waiting(&proxy, 1);
    gate.open();
    assert_eq!(held.answer().status(), 200);
    let answer = waiting.answer();
    let story = proxy.explain(answer.header("request-id").expect("an id"));
    let first = &story["decisions"][0];
    assert_eq!((&first["chosen"], &first["nobody_because"]), (&Value::Null, &json!("no_room")), "{story}");
    assert_eq!(first["candidates"][0]["out"], "at_limit");
    assert_eq!(story["decisions"][1]["chosen"], "w1");
}

#[test]
fn no_room_within_queue_timeout_is_a_429_that_says_what_to_do() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 0.3).start();
    let _held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let watch = Stopwatch::start();
    let answer = proxy.ask(&Request::message());
    assert!(watch.elapsed().as_millis() >= 300, "it waits: {:?}", watch.elapsed());
    let message = answer.error(429, "rate_limit_error");
    for words in ["w1 has 64 of 100 output tokens per minute", "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "limits"] {
        assert!(message.contains(words), "{words}: {message}");
    }
    assert_eq!(answer.number("retry-after"), Some(5), "the running answer may end at any time");
    assert_eq!((upstream.count(), proxy.number("w1", "total_errors")), (1, 0), "nobody is to blame");
}

/// Room that is known to come too late is not waited for.
#[test]
fn retry_after_is_the_moment_of_room() {
    let upstream = Upstream::always(taking(900, 5));
    let proxy = Proxy::with(&[&upstream])
        .set("server.queue_timeout", 5)
        .endpoint(0, "limits", "{ models: { \"*sonnet*\": { input_tokens_per_minute: 910 } } }")
        .start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    proxy.wait_idle();
    let answer = proxy.ask(&Request::message());
    let message = answer.error(429, "rate_limit_error");
    assert!(message.contains("900 of 910 input tokens per minute"), "{message}");
    let seconds = answer.number("retry-after").expect("a retry-after");
    assert!((30..=60).contains(&seconds), "{seconds}");
    assert_eq!(proxy.ask(&Request::message_for("claude-opus-4-5", false)).status(), 200, "no limit for it");
    assert_eq!(upstream.count(), 2);
}

#[test]
fn a_client_that_leaves_the_line_leaves_nothing_behind() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 600).start();
    let mut held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let leaving = [sent(&proxy, &Request::message()), sent(&proxy, &Request::stream())];
    wait_waiting(&proxy, 2);
    drop(leaving);
    wait_waiting(&proxy, 0);
    proxy.wait_log("end=client_gone");
    gate.open();
    assert_eq!(held.answer().status(), 200);
    proxy.wait_idle();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    assert_eq!(upstream.count(), 2, "those who left were never sent");
}

/// It was shown as refused with the failure of the attempt before, which nobody saw.
#[test]
fn a_client_that_leaves_the_line_after_a_failure_has_left() {
    let gate = Gate::closed();
    let broken = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let room = Upstream::always(taking(20, 5).after(&gate));
    let proxy = Proxy::with(&[&broken, &room])
        .endpoint(1, "limits", ONE_AT_A_TIME)
        .set("server.queue_timeout", 600)
        .in_order()
        .start();
    let mut held = sent(&proxy, &Request::message());
    room.wait_requests(1);
    let leaving = sent(&proxy, &Request::message());
    wait_waiting(&proxy, 1);
    drop(leaving);
    wait_waiting(&proxy, 0);
    let line = proxy.wait_log("end=client_gone");
    assert!(line.contains("tried=w1:500 status=0"), "{line}");
    gate.open();
    assert_eq!(held.answer().status(), 200);
}

/// Who waits holds a worker, so half of them are kept for those who need not wait.
#[test]
fn only_half_of_the_workers_wait() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 600).set("server.workers", 4).start();
    let _held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let _waiting = [sent(&proxy, &Request::message()), sent(&proxy, &Request::message())];
    wait_waiting(&proxy, 2);
    proxy.ask(&Request::message()).error(429, "rate_limit_error");
    let other = sent(&proxy, &Request::message_for("claude-opus-4-5", false));
    upstream.wait_requests(2);
    gate.open();
    drop(other);
}

/// The client has its 200 by then; what follows is an honest end.
#[test]
fn a_stream_is_kept_alive_while_it_waits() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 1).set("timeouts.heartbeat", 0.1).start();
    let _held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let mut stream = sent(&proxy, &Request::stream());
    assert_eq!(stream.head().status, 200);
    let (body, end) = stream.rest();
    let text = String::from_utf8_lossy(&body);
    assert!(text.starts_with("event: ping") && text.contains("event: error"), "{text}");
    assert!(text.contains("rate_limit_error") && text.contains("64 of 100"), "{text}");
    assert_eq!(end, End::Complete);
}

/// A refusal in Databricks' words that asks for no pause.
fn over_its_output_limit() -> Reply {
    let words = "REQUEST_LIMIT_EXCEEDED: Exceeded workspace output tokens per minute rate limit for x.";
    let body = json!({ "error_code": "REQUEST_LIMIT_EXCEEDED", "message": words });
    Reply::json(429, body.to_string()).header("retry-after", "0")
}

#[test]
fn an_account_is_kept_without_limits_and_a_429_teaches_one() {
    let upstream = Upstream::script([taking(700, 5)]);
    upstream.answer(|_| Reply::error(429, "databricks-429.json").header("retry-after", "0"));
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(proxy.endpoint("w1")["limits"], json!({ "configured": {}, "now": [] }));
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    proxy.wait_idle();
    let level = |learned: Option<u64>| json!({ "used": 700, "limit": null, "learned": learned });
    assert_eq!(now(&proxy)["input_tokens_per_minute"], level(None));
    assert_eq!(proxy.ask(&Request::message()).status(), 429);
    proxy.wait_idle();
    assert_eq!(now(&proxy)["input_tokens_per_minute"], level(Some(665)));
    assert_eq!(now(&proxy)["output_tokens_per_minute"]["learned"], Value::Null, "it was not named");
    // That was a guess. Room below it comes in a minute, which is too late to wait for: the workspace is asked.
    upstream.answer(|_| taking(900, 5));
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.status(), 200);
    let story = proxy.explain(answer.header("request-id").expect("an id"));
    assert_eq!(story["decisions"][0]["nobody_because"], "no_room", "{story}");
    assert_eq!(story["decisions"][0]["candidates"][0]["out"], "above_learned_limit");
    proxy.wait_idle();
    assert_eq!(now(&proxy)["input_tokens_per_minute"]["learned"], Value::Null, "which took far more");
}

/// A workspace whose first request is held, and whose second one has taught that there is no room beside it.
fn taught_by(gate: &Gate, queue_timeout: f64) -> (Upstream, Proxy, Client) {
    let upstream = Upstream::script([taking(20, 5).after(gate), over_its_output_limit()]);
    let proxy = Proxy::with(&[&upstream]).set("server.queue_timeout", queue_timeout).start();
    let held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    assert_eq!(proxy.ask(&Request::message()).status(), 429);
    (upstream, proxy, held)
}

#[test]
fn a_request_waits_for_room_below_what_a_429_has_taught() {
    let gate = Gate::closed();
    let (upstream, proxy, mut held) = taught_by(&gate, 60.0);
    let mut waiting = sent(&proxy, &Request::message());
    wait_waiting(&proxy, 1);
    assert_eq!(upstream.count(), 2);
    gate.open();
    assert_eq!((held.answer().status(), waiting.answer().status()), (200, 200));
    assert_eq!(upstream.count(), 3);
}

/// What was learned may be wrong. Only the workspace refuses.
#[test]
fn what_a_429_has_taught_refuses_nobody() {
    let gate = Gate::closed();
    let (upstream, proxy, mut held) = taught_by(&gate, 0.3);
    let watch = Stopwatch::start();
    let answer = proxy.ask(&Request::message());
    assert!(watch.elapsed().as_millis() >= 300, "it waits: {:?}", watch.elapsed());
    assert_eq!((answer.status(), upstream.count()), (200, 3));
    let story = proxy.explain(answer.header("request-id").expect("an id"));
    let all = story["story"].to_string();
    assert!(all.contains("has room for it within its limits, which 429s have taught"), "{all}");
    assert!(all.contains("waited long enough for a limit that is only a guess"), "{all}");
    gate.open();
    assert_eq!(held.answer().status(), 200);
}

/// `limits` that come by a reload hold for a request that waits already, whichever way they change.
#[test]
fn a_reload_changes_the_limits_of_those_who_wait() {
    let gate = Gate::closed();
    let (upstream, setup) = held_by(&gate);
    let proxy = setup.set("server.queue_timeout", 600).start();
    let mut held = sent(&proxy, &Request::message());
    upstream.wait_requests(1);
    let mut waiting = sent(&proxy, &Request::message());
    wait_waiting(&proxy, 1);
    let reload = Request::new("POST", "/admin/reload").with("x-api-key", KEY);
    let setup = Proxy::with(&[&upstream]);
    proxy.rewrite(&setup.clone().endpoint(0, "limits", "{ output_tokens_per_minute: 110 }").yaml());
    assert_eq!(proxy.ask(&reload).status(), 200);
    wait_waiting(&proxy, 1);
    proxy.rewrite(&setup.yaml());
    assert_eq!(proxy.ask(&reload).status(), 200);
    upstream.wait_requests(2);
    wait_waiting(&proxy, 0);
    gate.open();
    assert_eq!((held.answer().status(), waiting.answer().status()), (200, 200));
}

#[test]
fn a_reload_keeps_the_account_and_takes_new_limits() {
    let upstream = Upstream::always(taking(50, 60));
    let setup = Proxy::with(&[&upstream]).endpoint(0, "limits", ONE_AT_A_TIME);
    let proxy = setup.set("server.queue_timeout", 0.05).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    proxy.wait_idle();
    proxy.ask(&Request::message()).error(429, "rate_limit_error");
    let reload = Request::new("POST", "/admin/reload").with("x-api-key", KEY);
    let setup = Proxy::with(&[&upstream]);
    proxy.rewrite(&setup.clone().endpoint(0, "limits", "{ output_tokens_per_minute: 123 }").yaml());
    assert_eq!(proxy.ask(&reload).status(), 200);
    assert_eq!(now(&proxy)["output_tokens_per_minute"]["used"], 60);
    proxy.ask(&Request::message()).error(429, "rate_limit_error");
    proxy.rewrite(&setup.endpoint(0, "limits", "{ output_tokens_per_minute: 124 }").yaml());
    assert_eq!(proxy.ask(&reload).status(), 200);
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
}
