//! Each state of an endpoint as the operator meets it: in /stats with its reason, in the log as one line with the
//! remedy, and in who is asked meanwhile.

use serde_json::Value;

use crate::support::client::Request;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;

const SONNET: &str = "claude-sonnet-4-5";
const SERVED: &str = "databricks-claude-sonnet-4-5";

/// A failure, what it keeps out, and what the log says about it.
struct Row {
    reply: Reply,
    reason: &'static str,
    /// Every model of the endpoint, not only the one that was asked for.
    is_whole: bool,
    says: &'static str,
    remedy: &'static str,
}

fn row(reply: Reply, reason: &'static str, is_whole: bool, says: &'static str, remedy: &'static str) -> Row {
    Row { reply, reason, is_whole, says, remedy }
}

/// Seconds that a fresh hold lasts for this reason.
fn seconds(reason: &str) -> f64 {
    match reason {
        "rate_limited" | "overloaded" => 5.0,
        "model_unavailable" => 600.0,
        "asked_to_wait" => 30.0,
        _ => 60.0,
    }
}

fn log_lines(proxy: &Proxy, text: &str) -> Vec<String> {
    proxy.running.err.all().into_iter().filter(|line| line.contains(text)).collect()
}

fn check(row: &Row) {
    let (failing, healthy) = (Upstream::script([row.reply.clone()]), Upstream::start());
    let proxy = Proxy::with(&[&failing, &healthy]).in_order().start();
    assert_eq!(proxy.ask_who(&Request::message_for(SONNET, false)), "w2", "{}", row.reason);

    let endpoint = eventually("a hold", || {
        let endpoint = proxy.endpoint("w1");
        endpoint["holds"].as_array().is_some_and(|holds| !holds.is_empty()).then_some(endpoint)
    });
    let hold = &endpoint["holds"][0];
    let model = if row.is_whole { Value::Null } else { SERVED.into() };
    assert_eq!((hold["reason"].as_str(), &hold["model"]), (Some(row.reason), &model), "{endpoint}");
    let left = hold["seconds_left"].as_f64().expect("a number");
    assert!(left > 0.0 && left <= seconds(row.reason), "{endpoint}");

    let line = proxy.wait_log(row.says);
    assert!(line.contains("w1") && line.contains(row.remedy), "{line}");
    assert_eq!(log_lines(&proxy, row.says).len(), 1, "one line for one change");

    assert_eq!(proxy.ask_who(&Request::message_for(SONNET, false)), "w2", "{}", row.reason);
    let other = proxy.ask_who(&Request::message_for("claude-opus-4-5", false));
    assert_eq!(other, if row.is_whole { "w2" } else { "w1" }, "{}", row.reason);
    assert_eq!(proxy.ask(&Request::new("POST", "/reset")).status(), 200);
    assert_eq!(proxy.ask_who(&Request::message_for(SONNET, false)), "w1", "{} after /reset", row.reason);
}

#[test]
fn a_limited_model_rests() {
    check(&row(
        Reply::error(429, "databricks-429.json"),
        "rate_limited",
        false,
        "over its limit for databricks-claude-sonnet-4-5",
        "add a workspace",
    ));
    let as_400 = Reply::error(400, "databricks-429.json");
    check(&row(as_400, "rate_limited", false, "over its limit", "have its limit raised"));
}

/// A 529 was shown as `rate_limited` and logged as over its limit: who reads that asks for a quota in vain.
#[test]
fn an_overloaded_model_rests() {
    check(&row(
        Reply::error(529, "anthropic-529.json"),
        "overloaded",
        false,
        "overloaded for databricks-claude-sonnet-4-5",
        "comes back by itself",
    ));
}

#[test]
fn a_missing_model_is_left_alone() {
    check(&row(
        Reply::error(404, "databricks-404.json"),
        "model_unavailable",
        false,
        "does not serve databricks-claude-sonnet-4-5",
        "enable the model there",
    ));
}

/// A workspace without AI Gateway drew all requests to itself: nobody refuses as fast, so it was always the idlest.
#[test]
fn a_workspace_without_the_feature_is_left_alone() {
    let body = r#"{"error_code":"FEATURE_DISABLED","message":"Unity AI Gateway is not enabled"}"#;
    check(&row(
        Reply::json(404, body),
        "model_unavailable",
        false,
        "does not serve",
        "enable the model there",
    ));
}

#[test]
fn a_rate_limit_of_zero_is_a_model_that_is_not_there() {
    check(&row(
        Reply::error(403, "databricks-403-rate-limit-zero.json"),
        "model_unavailable",
        false,
        "does not serve databricks-claude-sonnet-4-5",
        "endpoints[].models",
    ));
}

#[test]
fn a_rejected_token_parks_the_endpoint() {
    for reply in
        [Reply::error(403, "databricks-403-invalid-token.json"), Reply::error(401, "databricks-401.json")]
    {
        check(&row(reply, "credential_rejected", true, "rejects its token", "renew it"));
    }
}

#[test]
fn a_blocked_address_parks_the_endpoint() {
    let body = r#"{"error_code":"PERMISSION_DENIED","message":"Source IP address: 10.0.0.1 is blocked by Databricks IP ACL for workspace: 1"}"#;
    let reply = Reply::json(403, body);
    check(&row(reply, "address_blocked", true, "blocks this machine's address", "IP access list"));
}

#[test]
fn a_503_with_retry_after_pauses_the_endpoint() {
    let reply = Reply::error(503, "anthropic-500.json").header("retry-after", "30");
    check(&row(reply, "asked_to_wait", true, "asked for a pause of 30s", "comes back by itself"));
}

#[test]
fn an_endpoint_without_a_token_is_left_alone() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let setup = Proxy::with(&[&first, &second]).in_order();
    let proxy = setup.endpoint_unset(0, "token").endpoint(0, "token_file", "no-such-file").start();
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    let line = proxy.wait_log("w1 has no token");
    assert!(line.contains("check token_file or oauth"), "{line}");
    assert_eq!(proxy.endpoint("w1")["holds"][0]["reason"], "no_token");
    assert_eq!(first.count(), 0);
}

/// What is put aside for a second comes back, and says so.
#[test]
fn a_model_that_works_again_is_one_line() {
    let limited = Reply::error(429, "databricks-429.json").header("retry-after", "0.2");
    let (first, second) = (Upstream::script([limited]), Upstream::start());
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    eventually("the model to come back", || (proxy.ask_who(&Request::message()) == "w1").then_some(()));
    proxy.wait_log("w1 takes requests for databricks-claude-sonnet-4-5 again");
    proxy.ask_who(&Request::message());
    proxy.wait_idle();
    assert_eq!(log_lines(&proxy, "again").iter().filter(|line| line.contains("w1 takes")).count(), 1);
}

/// An answer that was underway when another request got a 429 put the model back into service when it ended.
#[test]
fn an_answer_from_before_a_429_does_not_end_the_rest() {
    let gate = crate::support::gate::Gate::closed();
    let (first, second) = (Upstream::start(), Upstream::start());
    first.queue([
        Reply::message().after(&gate),
        Reply::error(429, "databricks-429.json").header("retry-after", "30"),
    ]);
    let proxy = Proxy::with(&[&first, &second]).in_order().start();
    let mut early = proxy.connect();
    early.send(&Request::message());
    first.wait_requests(1);
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    gate.open();
    assert_eq!(early.head().status, 200);
    early.rest();
    proxy.wait_idle();
    assert_eq!(proxy.ask_who(&Request::message()), "w2", "it still rests");
    assert_eq!(first.count(), 2);
}

#[test]
fn an_open_breaker_says_why_and_closes_with_a_word() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let setup = Proxy::with(&[&first, &second]).in_order().set("load_balancer.circuit_breaker_threshold", 2);
    let proxy = setup.set("load_balancer.circuit_breaker_timeout", 0.3).start();
    first.queue((0..3).map(|_| Reply::error(500, "anthropic-500.json")));
    for _ in 0..2 {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
    }
    let opened = proxy.wait_log("w1 is taken out after 2 failures in a row");
    assert!(opened.contains("check the workspace's status"), "{opened}");
    assert_eq!(proxy.endpoint("w1")["opened_by"], "consecutive_failures");
    eventually("the first trial", || {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
        (first.count() == 3).then_some(())
    });
    let failed = proxy.wait_log("w1 still fails");
    assert!(failed.contains("600ms") && failed.contains("POST /reset"), "{failed}");
    eventually("the second trial", || (proxy.ask_who(&Request::message()) == "w1").then_some(()));
    proxy.wait_log("w1 works again");
    let endpoint = proxy.endpoint("w1");
    assert_eq!((&endpoint["state"], &endpoint["opened_by"]), (&"closed".into(), &Value::Null));
    let share = endpoint["share"].as_f64().expect("a number");
    assert!((0.1..=1.0).contains(&share), "{endpoint}");
}

/// After a recovery an endpoint gets less than its weight at first, and more from then on. That it is all of it after ten
/// seconds is told beside the breaker.
#[test]
fn traffic_grows_back_after_a_recovery() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let setup = Proxy::with(&[&first, &second]).in_order().set("load_balancer.circuit_breaker_threshold", 1);
    let proxy = setup.set("load_balancer.circuit_breaker_timeout", 0.1).start();
    first.queue([Reply::hang_up()]);
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    eventually("the trial", || (proxy.ask_who(&Request::message()) == "w1").then_some(()));
    proxy.wait_log("w1 works again");
    let share = || proxy.endpoint("w1")["share"].as_f64().expect("a number");
    let at_first = share();
    assert!((0.1..1.0).contains(&at_first), "{}", proxy.endpoint("w1"));
    eventually("more", || (share() > at_first).then_some(()));
}

/// Failing and working in turn never makes enough failures in a row.
#[test]
fn a_flapping_endpoint_is_taken_out_by_the_rate_rule() {
    for is_on in [false, true] {
        let (first, second) = (Upstream::start(), Upstream::start());
        first.queue((0..6).flat_map(|_| [Reply::message(), Reply::error(500, "anthropic-500.json")]));
        let mut setup = Proxy::with(&[&first, &second]).in_order();
        if is_on {
            setup = setup.set("load_balancer.circuit_breaker_failure_rate_threshold", 50);
            setup = setup.set("load_balancer.circuit_breaker_minimum_calls", 6);
        }
        let proxy = setup.start();
        let served: Vec<String> = (0..12).map(|_| proxy.ask_who(&Request::message())).collect();
        proxy.wait_idle();
        assert_eq!(proxy.is_open("w1"), is_on, "{served:?}");
        assert_eq!(first.count(), if is_on { 6 } else { 12 });
        if is_on {
            let line = proxy.wait_log("w1 is taken out: 3 of its last 6 requests failed within 60s");
            assert!(line.contains("check the workspace's status"), "{line}");
            assert_eq!(proxy.endpoint("w1")["opened_by"], "failure_rate");
        }
    }
}
