//! Odd names of sessions and agents: there is no affinity then, and never an error.

use serde_json::json;

use crate::support::client::Request;
use crate::support::proxy::Proxy;
use crate::support::upstream::Upstream;

const SESSION: &str = "X-Claude-Code-Session-Id";
const AGENT: &str = "x-claude-code-agent-id";

fn with_user_id(user_id: serde_json::Value) -> Request {
    let body = json!({"model": "claude-sonnet-4-5", "max_tokens": 9, "metadata": {"user_id": user_id},
        "messages": [{"role": "user", "content": "hello"}]});
    Request::post_message(body.to_string())
}

/// The request as it is, with one header whose value is these bytes.
fn with_raw(name: &str, value: &[u8]) -> Vec<u8> {
    let bytes = Request::message().bytes();
    let end = memchr::memmem::find(&bytes, b"\r\n\r\n").expect("a whole head") + 2;
    [&bytes[..end], name.as_bytes(), b": ", value, b"\r\n", &bytes[end..]].concat()
}

#[test]
fn without_a_plain_session_there_is_no_affinity_and_no_error() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let proxy = Proxy::with(&[&first, &second]).start();
    let megabyte = "x".repeat(1 << 20);
    let odd = [
        Request::message(),
        Request::message().with(SESSION, ""),
        Request::message().with(SESSION, "two words"),
        Request::message().with(SESSION, &"x".repeat(60_000)),
        with_user_id(json!(format!(r#"{{"session_id":"{megabyte}"}}"#))),
        with_user_id(json!(format!("user_a_session_{megabyte}"))),
        with_user_id(json!(format!("{megabyte}_session_abc"))),
        with_user_id(json!("a\u{0}b\u{1f}\u{7f}\u{fffd}_session_\u{0}")),
        with_user_id(json!({"session_id": "an object"})),
        with_user_id(json!(["a", 1, null])),
        with_user_id(json!(null)),
        with_user_id(json!("[".repeat(8_000))),
    ];
    for (place, request) in odd.iter().enumerate() {
        let answer = proxy.ask(request);
        assert_eq!(answer.status(), 200, "request {place}: {}", answer.text());
    }
    let affinity = &proxy.stats()["affinity"];
    let counted = ["bindings", "hits", "detours", "moves", "new"].map(|field| affinity[field].as_u64());
    assert_eq!(counted, [Some(0); 5], "{affinity}");
}

/// An agent's name is only a part of the key: an odd one is another agent, whatever it is.
#[test]
fn an_odd_agent_is_an_agent_of_its_own() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let long = "x".repeat(60_000);
    for agent in ["", "two words", r#"{"\"}<>|^`~"#, &long] {
        for _ in 0..2 {
            let request = Request::message().with(SESSION, "0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f");
            let answer = proxy.ask(&request.with(AGENT, agent));
            assert_eq!(answer.status(), 200, "{agent:.40}: {}", answer.text());
        }
    }
    let affinity = &proxy.stats()["affinity"];
    assert_eq!((affinity["new"].as_u64(), affinity["hits"].as_u64()), (Some(4), Some(4)), "{affinity}");
}

/// A session's name that no client would choose is none: the request goes its way, and the header with it as it is.
/// Only a head of more than 64 KiB is refused, as such.
#[test]
fn a_session_that_is_not_text_is_none() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for value in [&b"\x80\xff"[..], b"caf\xc3\xa9", b"a\tb"] {
        let mut client = proxy.connect();
        client.send_bytes(&with_raw(SESSION, value));
        assert_eq!(client.answer().status(), 200, "{value:?}");
    }
    let affinity = &proxy.stats()["affinity"];
    assert_eq!((affinity["new"].as_u64(), affinity["hits"].as_u64()), (Some(0), Some(0)), "{affinity}");
    let mut client = proxy.connect();
    client.send_if_taken(&with_raw(SESSION, &vec![b'x'; 1 << 20]));
    client.answer().refusal(431);
    assert_eq!(upstream.count(), 3);
}
