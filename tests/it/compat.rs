//! What a workspace refuses to take, and that requests learn to do without it.

use serde_json::{Value, json};

use crate::support::client::{Answer, Request};
use crate::support::fixtures;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::{Recorded, Upstream};

const BETAS: &str = "claude-code-20250219,context-management-2025-06-27,effort-2025-11-24,\
    per-turn-control-2026-07-01,advanced-tool-use-2025-11-20";

/// What Databricks makes of Anthropic's words.
fn refusal(message: &str) -> Reply {
    Reply::json(400, refusal_text(message))
}

fn refusal_text(message: &str) -> String {
    let inner = json!({ "message": message }).to_string();
    json!({ "error_code": "BAD_REQUEST", "message": inner }).to_string()
}

fn extra(place: &str) -> Reply {
    refusal(&format!("{place}: Extra inputs are not permitted"))
}

/// A workspace that refuses these places, one at a time in this order, like the real validator.
fn strict(places: &'static [(&'static str, &'static str)]) -> Upstream {
    let upstream = Upstream::start();
    upstream.answer(move |request| {
        let body = request.json();
        match places.iter().find(|(pointer, _)| body.pointer(pointer).is_some()) {
            Some((_, place)) => extra(place),
            None if body["stream"] == true => Reply::stream(fixtures::transcript("text")),
            None => Reply::message(),
        }
    });
    upstream
}

fn body() -> Value {
    json!({
        "model": "claude-opus-5-5",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "\"context_management\":{},\"output_config\":1"}]},
            {"role": "system", "content": "s", "output_config": {"effort": "low"}},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "b",
                "input": {"context_management": 1, "defer_loading": true, "cache_control": {"scope": "x"}}}]}
        ],
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "scope": "global"}}],
        "tools": [
            {"name": "a", "input_schema": {"type": "object", "properties": {"defer_loading": {"type": "string"}}}},
            {"name": "b", "input_schema": {"type": "object"}, "defer_loading": true}
        ],
        "max_tokens": 64,
        "context_management": {"edits": []},
        "output_config": {"effort": "medium"},
        "stream": false
    })
}

fn ask(proxy: &Proxy, body: &Value) -> Answer {
    proxy.ask(&Request::post_message(body.to_string()).with("anthropic-beta", BETAS))
}

fn attempts(answer: &Answer) -> (u16, Option<u64>) {
    (answer.status(), answer.number("x-claude-lb-attempts"))
}

/// What was sent, but for the model's name.
fn sent(request: &Recorded) -> Value {
    let mut body = request.json();
    body["model"] = "claude-opus-5-5".into();
    body
}

fn without(pointers: &[(&str, &str)]) -> Value {
    let mut body = body();
    for (holder, key) in pointers {
        body.pointer_mut(holder).and_then(Value::as_object_mut).expect("an object").remove(*key);
    }
    body
}

fn changes(proxy: &Proxy) -> Vec<(String, String, String, u64)> {
    let stats = proxy.stats();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let changes = stats["compat"]["changes"].as_array().expect("a list").iter();
    let change = |change: &Value| {
        let requests = change["requests"].as_u64().expect("a count");
        (text(&change["endpoint"]), text(&change["path"]), text(&change["reason"]), requests)
    };
    changes.map(change).collect()
}

#[test]
fn a_refused_field_is_learned_once_and_left_out_from_then_on() {
    let upstream = strict(&[("/context_management", "context_management")]);
    let proxy = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1).start();
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(2)));
    let requests = upstream.requests();
    assert_eq!(sent(&requests[0]), body());
    assert_eq!(sent(&requests[1]), without(&[("", "context_management")]));
    assert_eq!(requests[0].header("anthropic-beta"), Some(BETAS));
    let fewer = BETAS.replace("context-management-2025-06-27,", "");
    assert_eq!(requests[1].header("anthropic-beta"), Some(&*fewer));

    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(1)));
    let requests = upstream.requests();
    assert_eq!((requests.len(), &requests[2].body), (3, &requests[1].body));
    assert_eq!(requests[2].header("anthropic-beta"), Some(&*fewer));
    let line = proxy.wait_log("refuses context_management");
    assert!(line.contains("w1") && line.contains("databricks-claude-opus-5-5"), "{line}");
    assert_eq!(changes(&proxy), [("w1".into(), "context_management".into(), "learned".into(), 2)]);
    assert_eq!(proxy.stats()["compat"]["extra_attempts"], 1);
    assert_eq!(proxy.number("w1", "total_errors"), 0, "a refusal blames nobody");
    assert_eq!(proxy.number("w1", "total_requests"), 2, "one place in the endpoint serves both attempts");
}

#[test]
fn a_request_without_the_field_keeps_its_bytes_and_headers() {
    let upstream = strict(&[("/context_management", "context_management")]);
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(ask(&proxy, &body()).status(), 200);
    let plain = without(&[("", "context_management")]).to_string();
    assert_eq!(proxy.ask(&Request::post_message(&plain).with("anthropic-beta", BETAS)).status(), 200);
    let last = &upstream.requests()[2];
    assert_eq!(last.body, plain.replace("claude-opus", "databricks-claude-opus").into_bytes());
    assert_eq!(last.header("anthropic-beta"), Some(BETAS));
}

#[test]
fn three_fields_are_learned_in_one_request() {
    let upstream = strict(&[
        ("/output_config", "output_config"),
        ("/tools/1/defer_loading", "tools.1.custom.defer_loading"),
        ("/system/0/cache_control/scope", "system.0.cache_control.ephemeral.scope"),
    ]);
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(4)));
    let gone = [("", "output_config"), ("/tools/1", "defer_loading"), ("/system/0/cache_control", "scope")];
    assert_eq!(sent(&upstream.requests()[3]), without(&gone), "nothing else, inputs and schemas least");
    let betas = upstream.requests()[3].header("anthropic-beta").map(str::to_owned);
    let left = "claude-code-20250219,context-management-2025-06-27,per-turn-control-2026-07-01";
    assert_eq!(betas.as_deref(), Some(left));

    // At another index, and in another place.
    let mut other = body();
    other["tools"][0]["defer_loading"] = true.into();
    other["messages"][0]["content"][0]["cache_control"] = json!({"type": "ephemeral", "scope": "global"});
    assert_eq!(attempts(&ask(&proxy, &other)), (200, Some(1)));
    let seen = upstream.requests()[4].json();
    assert_eq!(seen["tools"][0].get("defer_loading"), None);
    assert_eq!(seen["messages"][0]["content"][0]["cache_control"], json!({"type": "ephemeral"}));
}

/// The limit holds for one request; the next one goes on from there.
#[test]
fn the_fourth_field_shows_the_first_refusal() {
    let upstream = strict(&[
        ("/context_management", "context_management"),
        ("/output_config", "output_config"),
        ("/tools/1/defer_loading", "tools.1.custom.defer_loading"),
        ("/messages/1/output_config", "messages.1.output_config"),
    ]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = ask(&proxy, &body());
    assert_eq!(attempts(&answer), (400, Some(4)));
    assert_eq!(answer.text(), refusal_text("context_management: Extra inputs are not permitted"));
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(2)));
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(1)));
    let seen = upstream.requests()[6].json();
    assert_eq!(seen["messages"][1], json!({"role": "system", "content": "s"}));
}

#[test]
fn the_client_gets_the_first_refusal_untouched_when_the_field_was_not_all() {
    let failures = [
        Reply::error(500, "anthropic-500.json"),
        refusal("context_management is still not welcome"),
        extra("context_management"),
        Reply::page(404, "text/plain", "gone"),
        Reply::hang_up(),
    ];
    for failure in failures {
        let first = extra("context_management").header("x-first", "yes").header("request-id", "req_first");
        let upstream = Upstream::script([first.clone(), failure.clone(), failure]);
        let other = Upstream::start();
        let proxy = Proxy::with(&[&upstream, &other]).in_order().start();
        let answer = ask(&proxy, &body());
        assert_eq!(attempts(&answer), (400, Some(2)));
        assert_eq!(answer.text(), refusal_text("context_management: Extra inputs are not permitted"));
        assert_eq!((answer.header("x-first"), answer.header("request-id")), (Some("yes"), Some("req_first")));
        assert_eq!(other.count(), 0);
        assert!(changes(&proxy).is_empty(), "nothing was learned");
    }
}

/// The client folds a system message away after these words, and only a workspace that has nothing else to say says
/// them. So what stood before them has proved itself.
#[test]
fn a_field_is_learned_when_the_workspace_goes_on_to_another_complaint() {
    let upstream = Upstream::start();
    upstream.answer(|request| match request.json() {
        body if body.get("context_management").is_some() => extra("context_management"),
        body if body["messages"][1]["role"] == "system" => refusal("messages: Unexpected role \"system\""),
        _ => Reply::message(),
    });
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = ask(&proxy, &body());
    assert_eq!(attempts(&answer), (400, Some(2)));
    assert!(answer.text().contains("context_management"), "{}", answer.text());
    let answer = ask(&proxy, &body());
    assert_eq!(attempts(&answer), (400, Some(1)));
    assert!(answer.text().contains("Unexpected role"), "{}", answer.text());
}

#[test]
fn what_is_learned_holds_for_one_endpoint_and_one_model() {
    let first = strict(&[("/context_management", "context_management")]);
    let second = Upstream::start();
    let setup = Proxy::with(&[&first, &second]).set("load_balancer.strategy", "round_robin");
    let proxy = setup.start();
    for _ in 0..4 {
        assert_eq!(ask(&proxy, &body()).status(), 200);
    }
    assert_eq!((first.count(), second.count()), (3, 2));
    assert!(second.requests().iter().all(|request| sent(request) == body()), "the other takes the field");
    let mut other = body();
    other["model"] = "claude-sonnet-5".into();
    let made: Vec<u64> = (0..4).map(|_| attempts(&ask(&proxy, &other)).1.unwrap()).collect();
    assert_eq!(made.iter().sum::<u64>(), 5, "{made:?}: another model is asked anew, once");
}

/// A thinking block takes no `cache_control`. Were it taken from the other blocks, too, nothing would come from the
/// prompt cache for a day.
#[test]
fn what_one_kind_of_block_does_not_take_stays_in_the_others() {
    let upstream =
        strict(&[("/messages/2/content/1/cache_control", "messages.2.content.1.thinking.cache_control")]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut body = body();
    let cached = json!({"type": "ephemeral"});
    body["messages"][0]["content"][0]["cache_control"] = cached.clone();
    let thought = json!({"type": "thinking", "thinking": "x", "signature": "y", "cache_control": cached});
    body["messages"][2]["content"].as_array_mut().expect("a list").push(thought);
    for made in [2, 1] {
        assert_eq!(attempts(&ask(&proxy, &body)), (200, Some(made)));
        let seen = upstream.requests().last().expect("a request").json();
        assert_eq!(seen["messages"][2]["content"][1].get("cache_control"), None);
        assert_eq!(seen["messages"][0]["content"][0]["cache_control"], cached);
        assert_eq!(seen["system"], body["system"]);
    }
}

#[test]
fn streams_learn_too() {
    let upstream = strict(&[("/context_management", "context_management")]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut body = body();
    body["stream"] = true.into();
    let answer = ask(&proxy, &body);
    assert_eq!(attempts(&answer), (200, Some(2)));
    assert_eq!(answer.body, fixtures::transcript("text"));
}

#[test]
fn nothing_is_learned_in_off_mode() {
    let upstream = strict(&[("/context_management", "context_management")]);
    let proxy = Proxy::with(&[&upstream]).set("compat.mode", "off").start();
    for made in 1..=2 {
        let answer = ask(&proxy, &body());
        assert_eq!(attempts(&answer), (400, Some(1)));
        assert_eq!(answer.text(), refusal_text("context_management: Extra inputs are not permitted"));
        assert_eq!(upstream.count(), made);
    }
    let adaptive = json!({"model": "claude-sonnet-4-5", "messages": [], "max_tokens": 10,
        "thinking": {"type": "adaptive"}});
    assert_eq!(ask(&proxy, &adaptive).status(), 200);
    assert_eq!(upstream.requests()[2].json()["thinking"], json!({"type": "adaptive"}));
}

#[test]
fn needed_parts_are_never_left_out() {
    for place in
        ["messages", "messages.0.content", "max_tokens", "tools.1.custom.input_schema", "nothing", "stream"]
    {
        let upstream = Upstream::always(extra(place));
        let proxy = Proxy::with(&[&upstream]).start();
        assert_eq!(attempts(&ask(&proxy, &body())), (400, Some(1)), "{place}");
        assert_eq!(upstream.count(), 1);
    }
}

#[test]
fn listed_places_are_always_left_out() {
    for mode in ["learn", "off"] {
        let upstream = Upstream::start();
        let setup = Proxy::with(&[&upstream]).set("compat.mode", mode);
        let proxy = setup.set("compat.strip", r#"[ "tools.*.defer_loading", cache_control.scope ]"#).start();
        assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(1)));
        let gone = [("/tools/1", "defer_loading"), ("/system/0/cache_control", "scope")];
        assert_eq!(sent(&upstream.requests()[0]), without(&gone));
        proxy.wait_log("tools.*.defer_loading is left out");
        let seen = changes(&proxy);
        assert_eq!(seen.len(), 2);
        assert!(
            seen.iter().all(|(_, _, reason, requests)| reason == "configured" && *requests == 1),
            "{seen:?}"
        );
    }
}

#[test]
fn adaptive_thinking_becomes_enabled_for_older_models() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let body = |model: &str| {
        format!(
            r#"{{"model":"{model}", "messages":[] , "max_tokens" : 32000,"thinking": {{"type":"adaptive","display":"omitted"}}}}"#
        )
    };
    assert_eq!(proxy.ask(&Request::post_message(body("claude-sonnet-4-5"))).status(), 200);
    let expected = body("databricks-claude-sonnet-4-5")
        .replace(r#""type":"adaptive""#, r#""type":"enabled","budget_tokens":25600"#);
    assert_eq!(String::from_utf8_lossy(&upstream.requests()[0].body), expected);
    assert_eq!(proxy.ask(&Request::post_message(body("claude-opus-4-6"))).status(), 200);
    let expected = body("databricks-claude-opus-4-6");
    assert_eq!(String::from_utf8_lossy(&upstream.requests()[1].body), expected);
    assert_eq!(changes(&proxy), [("w1".into(), "thinking.type".into(), "model".into(), 1)]);
}

#[test]
fn what_was_learned_survives_a_reload() {
    let upstream = strict(&[("/context_management", "context_management")]);
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(2)));
    proxy.rewrite(&setup.set("load_balancer.max_attempts", 2).yaml());
    let reload = Request::new("POST", "/admin/reload").with("x-api-key", crate::support::client::KEY);
    assert_eq!(proxy.ask(&reload).status(), 200);
    assert_eq!(attempts(&ask(&proxy, &body())), (200, Some(1)));
}
