//! Which model goes out, and that its name is the only thing replaced.

use crate::support::client::Request;
use crate::support::proxy::Proxy;
use crate::support::upstream::Upstream;

/// Both references mapped names by a fixed table and silently served another model.
#[test]
fn model_names_are_mapped_by_rule() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("models.sonnet", "my-sonnet").start();
    let cases = [
        ("claude-opus-5-5", "databricks-claude-opus-5-5"),
        ("claude-sonnet-5", "databricks-claude-sonnet-5"),
        ("claude-sonnet-4-5-20250929", "databricks-claude-sonnet-4-5"),
        ("claude-opus-4-6[1m]", "databricks-claude-opus-4-6"),
        ("Claude-Haiku-4-5", "databricks-claude-haiku-4-5"),
        ("databricks-claude-opus-4-1", "databricks-claude-opus-4-1"),
        ("system.ai.claude-sonnet-4-5", "system.ai.claude-sonnet-4-5"),
        ("claude-3-5-sonnet-20241022", "my-sonnet"),
        ("gpt-oss-120b", "gpt-oss-120b"),
    ];
    for (index, (asked, served)) in cases.iter().enumerate() {
        assert_eq!(proxy.ask(&Request::message_for(asked, false)).status(), 200, "{asked}");
        assert_eq!(upstream.wait_requests(index + 1)[index].json()["model"], *served, "{asked}");
    }
}

#[test]
fn a_map_of_models_goes_first() {
    let upstream = Upstream::start();
    let map = r#"{ "claude-opus-4-1*": my-opus, "gpt-*": my-other }"#;
    let proxy = Proxy::with(&[&upstream]).set("models.map", map).start();
    let cases = [
        ("claude-opus-4-1-20250805", "my-opus"),
        ("gpt-oss-120b", "my-other"),
        ("claude-opus-4-5", "databricks-claude-opus-4-5"),
    ];
    for (index, (asked, served)) in cases.iter().enumerate() {
        assert_eq!(proxy.ask(&Request::message_for(asked, false)).status(), 200, "{asked}");
        assert_eq!(upstream.wait_requests(index + 1)[index].json()["model"], *served, "{asked}");
    }
}

#[test]
fn a_body_of_many_nested_brackets_overflows_no_stack() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
    let body = format!(r#"{{"x":{open}{close},"model":"claude-sonnet-4-5","messages":[]}}"#);
    let answer = proxy.ask(&Request::post_message(&body));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let expected = body.replace("claude-sonnet", "databricks-claude-sonnet");
    assert!(upstream.wait_requests(1)[0].body == expected.as_bytes());
}

#[test]
fn only_the_model_of_the_request_itself_is_replaced() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let body = r#"{ "messages" : [{"role":"user","content":"{\"model\":\"claude-opus-4-8\"}"}],
        "metadata":{"model":"claude-opus-4-8"} ,  "model" :	"claude-sonnet-4-5" , "n": 1.50e+2, "u":"ü\/\u00fc"}"#;
    assert_eq!(proxy.ask(&Request::post_message(body)).status(), 200);
    let received = upstream.wait_requests(1)[0].body.clone();
    let expected = body.replace("\"claude-sonnet-4-5\"", "\"databricks-claude-sonnet-4-5\"");
    assert_eq!(String::from_utf8_lossy(&received), expected);
}
