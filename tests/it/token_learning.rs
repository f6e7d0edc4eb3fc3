//! `count_tokens` follows what the workspaces report.

use claude_lb::anthropic::tokens::{UNTAUGHT, estimate};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::client::{KEY, Request};
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::sse;
use crate::support::upstream::Upstream;

/// What a request with these words about costs, before anything was learned.
const WORDS: usize = 900;

fn body(model: &str, number: usize, stream: bool) -> String {
    let words = "The scheduler decides which job comes next, and a starving queue is worth a look. ";
    let text = format!("{number}. {}", words.repeat(WORDS / 16));
    json!({ "model": model, "max_tokens": 64, "stream": stream, "messages": [{ "role": "user", "content": text }] })
        .to_string()
}

fn text_of(body: &str) -> u64 {
    estimate(body.as_bytes()).expect("a valid body").text
}

/// A workspace that reports `times` our estimate, two thirds of it from the cache.
fn reports(times: f64) -> impl Fn(u64) -> Value {
    move |text| {
        let tokens = (text as f64 * times).round() as u64;
        let (read, written) = (tokens / 3, tokens / 3);
        json!({ "input_tokens": tokens - read - written, "cache_read_input_tokens": read,
            "cache_creation_input_tokens": written, "output_tokens": 7 })
    }
}

/// Answers with usage: streams with a stream, and others with a message.
fn workspace(times: f64) -> Upstream {
    let upstream = Upstream::start();
    let usage = reports(times);
    upstream.answer(move |request| {
        let body = request.json();
        let usage = usage(text_of(&body.to_string()));
        let message = json!({ "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
            "content": [], "stop_reason": null, "usage": usage });
        match body["stream"] == true {
            true => Reply::sse()
                .part(sse::event(&json!({ "type": "message_start", "message": message })))
                .part(sse::block_start())
                .part(sse::ending()),
            false => Reply::json(200, message.to_string()),
        }
    });
    upstream
}

fn ask(proxy: &Proxy, model: &str, requests: usize, stream: bool) {
    for number in 0..requests {
        assert_eq!(proxy.ask(&Request::post_message(body(model, number, stream))).status(), 200);
    }
}

/// The worker learns when the client has its answer already.
fn wait_for(proxy: &Proxy, model: &str, observations: u64) -> f64 {
    eventually("the answers are learned from", || {
        let stats = proxy.stats();
        let views = stats["token_counts"].as_array().expect("a list").clone();
        let view = views.into_iter().find(|view| view["model"] == model)?;
        (view["observations"] == observations).then(|| view["factor"].as_f64().expect("a number"))
    })
}

fn count(proxy: &Proxy, model: &str) -> f64 {
    let body = body(model, 0, false);
    let answer = proxy.ask(&Request::new("POST", "/v1/messages/count_tokens").body(&body));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["input_tokens"].as_u64().expect("a number") as f64 / text_of(&body) as f64
}

#[track_caller]
fn is_about(value: f64, expected: f64) {
    assert!((value - expected).abs() < 0.01, "{value} is not {expected}");
}

#[test]
fn counts_follow_the_reports_of_each_model() {
    let upstream = workspace(1.3);
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    let (model, other) = ("claude-opus-4-6", "claude-sonnet-4-5");
    is_about(count(&proxy, model), UNTAUGHT);
    assert_eq!(proxy.stats()["token_counts"], json!([]));
    ask(&proxy, model, 11, true);
    ask(&proxy, model, 11, false);
    is_about(wait_for(&proxy, "databricks-claude-opus-4-6", 22), 1.3);
    is_about(count(&proxy, model), 1.3);
    is_about(count(&proxy, "databricks-claude-opus-4-6"), 1.3);
    is_about(count(&proxy, other), UNTAUGHT);
    let without_model = r#"{"messages":[{"role":"user","content":"hi"}]}"#;
    let answer = proxy.ask(&Request::new("POST", "/v1/messages/count_tokens").body(without_model));
    assert!(answer.json()["input_tokens"].as_u64().is_some_and(|tokens| (7..12).contains(&tokens)));
    proxy.rewrite(&setup.clone().set("load_balancer.max_attempts", 2).yaml());
    proxy.signal(Signal::HUP);
    proxy.wait_log("reloaded");
    is_about(count(&proxy, model), 1.3);
}

#[test]
fn what_breaks_off_or_reports_no_input_teaches_nothing() {
    let upstream = Upstream::start();
    let usage = reports(1.9);
    upstream.answer(move |request| {
        let message = json!({ "id": "msg_1", "usage": usage(text_of(&request.json().to_string())) });
        let start = sse::event(&json!({ "type": "message_start", "message": message }));
        let begun = Reply::sse().part(start).part(sse::block_start()).part(sse::delta("a"));
        match request.json()["max_tokens"].as_u64() {
            Some(1) => begun.close(),
            Some(2) => Reply::json(200, r#"{"type":"message","content":[]}"#),
            // Nine tokens for some hundred words.
            _ => Reply::sse().part(sse::message("msg_1", "a")),
        }
    });
    let proxy = Proxy::with(&[&upstream]).start();
    for kind in [1, 2, 3] {
        let mut body: Value = serde_json::from_str(&body("claude-opus-4-6", 1, kind != 2)).expect("JSON");
        body["max_tokens"] = kind.into();
        let mut client = proxy.connect();
        client.send(&Request::post_message(body.to_string()));
        client.head();
        client.rest();
    }
    proxy.wait_idle();
    // A good answer last: when it has been learned from, the others would have been, too.
    let good = workspace(1.3);
    let reload = Proxy::with(&[&good]);
    proxy.rewrite(&reload.yaml());
    assert_eq!(proxy.ask(&Request::new("POST", "/admin/reload").with("x-api-key", KEY)).status(), 200);
    ask(&proxy, "claude-opus-4-6", 1, true);
    wait_for(&proxy, "databricks-claude-opus-4-6", 1);
}
