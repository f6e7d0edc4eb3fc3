//! Who is left alone for a while, for which models, and what the client hears about it.

use crate::support::client::Request;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures};

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
