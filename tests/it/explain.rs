//! `GET /explain/{request-id}`: why a request went where it went, for whatever end it came to.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::client::{Answer, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, sse};

fn id_of(answer: &Answer) -> String {
    answer.header("request-id").expect("every answer has an id").to_owned()
}

/// The id in the access line that holds this text.
fn logged_id(proxy: &Proxy, text: &str) -> String {
    let line = proxy.wait_log(text);
    let id = line.split("id=").nth(1).expect("an access line").split(' ').next();
    id.expect("an id").to_owned()
}

fn story(page: &Value) -> String {
    let lines = page["story"].as_array().expect("a list of sentences");
    lines.iter().map(|line| line.as_str().expect("a sentence")).collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn expect_in(text: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
}

#[test]
fn a_failover_shows_both_decisions_and_both_attempts() {
    let limited = Reply::error(429, "databricks-429.json").header("retry-after", "30");
    let (first, second) = (Upstream::script([limited]), Upstream::start());
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    let answer = proxy.ask(&Request::stream());
    let id = id_of(&answer);
    assert_eq!(logged_id(&proxy, "end=completed"), id, "the id of the answer stands in the access line");
    let page = proxy.explain(&id);

    assert_eq!((&page["id"], &page["status"], &page["endpoint"]), (&json!(id), &json!(200), &json!("w2")));
    assert_eq!((&page["model"], &page["stream"]), (&json!("claude-sonnet-4-5"), &json!(true)));
    assert_eq!(
        (&page["served"], &page["end"]),
        (&json!("databricks-claude-sonnet-4-5"), &json!("completed"))
    );
    let [one, two] = &page["decisions"].as_array().expect("a list")[..] else { panic!("{page:#}") };
    assert_eq!((&one["chosen"], &two["chosen"]), (&json!("w1"), &json!("w2")));
    assert_eq!((&one["strategy"], &one["affinity"]), (&json!("least_requests"), &json!("no_session")));
    let candidates = one["candidates"].as_array().expect("a list");
    assert_eq!(candidates.len(), 2);
    assert_eq!((&candidates[0]["out"], &candidates[0]["score"]), (&Value::Null, &json!(0.001)));
    assert_eq!((&candidates[1]["weight"], &candidates[1]["score"]), (&json!(100.0), &json!(0.01)));
    let out = &two["candidates"][0];
    assert_eq!((&out["out"], &out["tried"]), (&json!("rate_limited"), &json!(true)));
    let back = out["back_in_ms"].as_f64().expect("a number");
    assert!(back > 0.0 && back <= 30_000.0, "{out}");
    let failed = &one["attempts"][0];
    assert_eq!((&failed["outcome"], &failed["status"]), (&json!("refused"), &json!(429)));
    assert_eq!(failed["retry_after_s"], 30.0);
    let served = &two["attempts"][0];
    assert_eq!((&served["number"], &served["outcome"]), (&json!(2), &json!("completed")));

    let times = [
        &page["times"]["taken_up_ms"],
        &one["at_ms"],
        &failed["began_ms"],
        &failed["head_ms"],
        &failed["ended_ms"],
        &two["at_ms"],
        &served["began_ms"],
        &served["head_ms"],
        &page["times"]["first_byte_ms"],
        &page["times"]["ended_ms"],
    ];
    let times = times.map(|time| time.as_f64().unwrap_or_else(|| panic!("a missing time in {page:#}")));
    assert!(times.is_sorted(), "{times:?}");
    expect_in(
        &story(&page),
        &["w1 is asked", "it had answered 429: it is over its limit", "w2 is asked", "where the time went:"],
    );
    assert!(page["tokens"]["output_tokens"].as_u64() > Some(0), "{page:#}");
}

/// The client saw the workspace's id; the access line has that one, too. Ours stands in the page.
#[test]
fn the_workspaces_id_leads_to_the_same_page() {
    let upstream = Upstream::always(Reply::message().header("request-id", "req_of_the_workspace"));
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(id_of(&proxy.ask(&Request::message())), "req_of_the_workspace");
    let page = proxy.explain("req_of_the_workspace");
    assert_eq!(page["shown_id"], "req_of_the_workspace");
    let ours = page["id"].as_str().expect("an id");
    assert!(ours.starts_with("req_clb_"), "{ours}");
    assert_eq!(proxy.explain(ours), page);
}

#[test]
fn what_no_endpoint_could_take_says_why_each_was_out() {
    let limited = || Upstream::always(Reply::error(429, "databricks-429.json").header("retry-after", "30"));
    let (first, second) = (limited(), limited());
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    proxy.ask(&Request::message());
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.status(), 429);
    let page = proxy.explain(&id_of(&answer));
    assert_eq!(
        (&page["status"], &page["endpoint"], &page["end"]),
        (&json!(429), &Value::Null, &json!("refused_here"))
    );
    let decision = &page["decisions"][0];
    assert_eq!((&decision["chosen"], &decision["nobody_because"]), (&Value::Null, &json!("all_cooling")));
    for candidate in decision["candidates"].as_array().expect("a list") {
        assert_eq!(candidate["out"], "rate_limited");
    }
    expect_in(
        &story(&page),
        &["every endpoint rests for this model; out: w1 (rate_limited, back in", "status 429"],
    );

    let parked = Upstream::always(Reply::error(403, "databricks-403-invalid-token.json"));
    let mut setup = Proxy::with(&[&parked, &first]).in_order();
    setup = setup.endpoint(1, "models", "[ \"databricks-claude-opus-*\" ]");
    let proxy = setup.start();
    proxy.ask(&Request::message());
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.status(), 503);
    let page = proxy.explain(&id_of(&answer));
    let outs = ["credential_rejected", "model_not_listed"];
    for (place, out) in outs.into_iter().enumerate() {
        assert_eq!(page["decisions"][0]["candidates"][place]["out"], out, "{page:#}");
    }
    expect_in(&story(&page), &["no endpoint can take it", "No available endpoints"]);
}

#[test]
fn what_was_refused_here_says_what_the_client_was_told() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("limits.max_body_bytes", 2_000).start();
    let answer = proxy.ask(&Request::post_message(r#"{"model":7,"word":"of-the-question"}"#));
    assert_eq!(answer.status(), 400);
    let page = proxy.explain(&id_of(&answer));
    expect_in(&story(&page), &["status 400 (`model` must be a string)"]);
    assert!(!page.to_string().contains("of-the-question"));

    let answer = proxy.ask(&Request::post_message("x".repeat(3_000)));
    assert_eq!(answer.status(), 413);
    let page = proxy.explain(&id_of(&answer));
    assert_eq!((&page["status"], &page["end"]), (&json!(413), &json!("refused_here")));

    // Whoever has no key leaves nothing: else anybody could push the others out.
    let answer = proxy.ask(&Request::message().without("x-api-key"));
    assert_eq!(answer.status(), 401);
    proxy.wait_log("status=401");
    let unknown = proxy.ask(&Request::get(&format!("/explain/{}", id_of(&answer))));
    let message = unknown.error(404, "not_found_error");
    expect_in(&message, &[&id_of(&answer), "of the last 1000 there are 2"]);
}

#[test]
fn a_client_that_left_is_told_as_such() {
    let upstream = Upstream::always(Reply::silence());
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::message());
    upstream.wait_requests(1);
    drop(client);
    let page = proxy.explain(&logged_id(&proxy, "end=client_gone"));
    assert_eq!((&page["end"], &page["status"]), (&json!("client_gone"), &Value::Null));
    assert_eq!(page["times"]["first_byte_ms"], Value::Null);
    expect_in(&story(&page), &["the client had left", "nothing had been sent to the client"]);
}

#[test]
fn a_stream_that_broke_says_where() {
    let part = [sse::message_start("msg_1"), sse::block_start(), sse::delta("a-word-of-the-answer")].concat();
    let (first, second) = (Upstream::script([Reply::stream(part).close()]), Upstream::start());
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    let answer = proxy.ask(&Request::stream());
    assert!(answer.end.is_broken());
    let page = proxy.explain(&id_of(&answer));
    assert_eq!(page["end"], "broke_after_content");
    assert_eq!(page["decisions"].as_array().map(Vec::len), Some(1), "nobody else was asked");
    let attempt = &page["decisions"][0]["attempts"][0];
    assert!(attempt["why"].as_str().is_some_and(|why| why.contains("broke off after content")), "{attempt}");
    assert!(!page.to_string().contains("a-word-of-the-answer"));
}

/// The same endpoint, asked again because it is the only one: one more decision, marked as such.
#[test]
fn a_second_try_at_the_only_endpoint_is_told() {
    let upstream = Upstream::script([Reply::error(500, "anthropic-500.json")]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.status(), 200);
    let page = proxy.explain(&id_of(&answer));
    let chosen: Vec<&Value> =
        page["decisions"].as_array().unwrap().iter().map(|one| &one["chosen"]).collect();
    assert_eq!(chosen, [&json!("w1"), &Value::Null, &json!("w1")], "{page:#}");
    expect_in(
        &story(&page),
        &["no endpoint can take it; out: w1 (tried_before)", "asked once more", "between attempts"],
    );
}

/// A field that a workspace refuses: a second attempt within one decision.
#[test]
fn an_attempt_without_a_refused_field_belongs_to_the_same_decision() {
    let refusal = r#"{"type":"error","error":{"type":"invalid_request_error","message":"context_management: Extra inputs are not permitted"}}"#;
    let upstream = Upstream::script([Reply::json(400, refusal)]);
    let proxy = Proxy::with(&[&upstream]).start();
    let body = json!({"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [], "context_management": {"edits": []}});
    let answer = proxy.ask(&Request::post_message(body.to_string()));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let page = proxy.explain(&id_of(&answer));
    let attempts = page["decisions"][0]["attempts"].as_array().expect("a list");
    assert_eq!((attempts.len(), &attempts[0]["status"]), (2, &json!(400)), "{page:#}");
    expect_in(&story(&page), &["w1 is asked again, without a field that it refused"]);
}

#[test]
fn a_conversation_is_told_where_it_is_bound_and_why_it_left() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    let ask = || {
        let request =
            Request::message().with("X-Claude-Code-Session-Id", "0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f");
        let answer = proxy.ask(&request);
        let page = proxy.explain(&id_of(&answer));
        let last = page["decisions"].as_array().unwrap().last().unwrap();
        (last["affinity"].clone(), last["chosen"].clone(), last["bound_to"].clone(), story(&page))
    };
    let (affinity, chosen, bound, _) = ask();
    assert_eq!((affinity, chosen, bound), (json!("new"), json!("w1"), Value::Null));
    let (affinity, chosen, bound, told) = ask();
    assert_eq!((affinity, chosen, bound), (json!("hit"), json!("w1"), json!("w1")));
    expect_in(&told, &["w1, where the conversation is bound, has room for it"]);
    first.queue([Reply::error(403, "databricks-403-invalid-token.json")]);
    let (affinity, chosen, bound, told) = ask();
    assert_eq!((affinity, chosen, bound), (json!("move"), json!("w2"), json!("w1")));
    expect_in(&told, &["was bound to w1, which is out (credential_rejected); w2 takes it"]);
    let affinity = &proxy.stats()["affinity"];
    assert_eq!(
        (&affinity["moves"], &affinity["moved_because"]),
        (&json!(1), &json!({"credential_rejected": 1}))
    );
}

#[test]
fn it_is_guarded_as_stats_is_and_survives_a_reload() {
    let upstream = Upstream::start();
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    let id = id_of(&proxy.ask(&Request::message()));
    proxy.explain(&id);
    proxy.rewrite(&setup.set("auth.protect_admin", true).yaml());
    proxy.signal(Signal::HUP);
    let route = Request::get(&format!("/explain/{id}"));
    eventually("the reload", || (proxy.ask(&route).status() == 401).then_some(()));
    let answer = proxy.ask(&route.with("x-api-key", KEY));
    assert_eq!((answer.status(), &answer.json()["id"]), (200, &json!(id)));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let wrong = Request::new("DELETE", &format!("/explain/{id}")).with("x-api-key", KEY);
    assert_eq!(proxy.ask(&wrong).status(), 405);
}

/// A request is explained once it has ended; until then it is not known.
#[test]
fn a_running_request_is_not_yet_explained() {
    let gate = Gate::closed();
    let upstream = Upstream::always(
        Reply::sse()
            .part([sse::message_start("msg_1"), sse::block_start()].concat())
            .wait(&gate)
            .part(sse::ending()),
    );
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    let head = client.head();
    let id = head.header("request-id").expect("an id").to_owned();
    let answer = proxy.ask(&Request::get(&format!("/explain/{id}")));
    expect_in(&answer.error(404, "not_found_error"), &["from its end on"]);
    gate.open();
    client.rest();
    assert_eq!(proxy.explain(&id)["status"], 200);
}

#[test]
fn stats_tell_the_share_that_came_from_the_cache() {
    let usage = |input: u64, write: u64, read: u64| {
        let usage = json!({"input_tokens": input, "output_tokens": 7, "cache_creation_input_tokens": write,
            "cache_read_input_tokens": read});
        Reply::json(200, json!({"type": "message", "content": [], "usage": usage}).to_string())
    };
    let upstream = Upstream::script([usage(10, 90, 0), usage(0, 0, 300)]);
    let idle = Upstream::start();
    let proxy = Proxy::with(&[&upstream, &idle]).in_order().start();
    assert_eq!(proxy.endpoint("w1")["tokens"]["cached_share"], Value::Null);
    for _ in 0..2 {
        proxy.ask(&Request::message());
    }
    proxy.wait_idle();
    let tokens = json!({"input_tokens": 10, "output_tokens": 14, "cache_write_tokens": 90, "cache_read_tokens": 300,
        "cached_share": 0.75});
    assert_eq!(proxy.endpoint("w1")["tokens"], tokens);
    assert_eq!(proxy.endpoint("w2")["tokens"]["cached_share"], Value::Null);
}
