//! Hostile and broken bodies: each is passed on unchanged or refused with a reason. None of them crashes anything,
//! counts against a workspace, or forges a line of the log or a header.

use crate::support::client::{Answer, Request};
use crate::support::fixtures;
use crate::support::proxy::Proxy;
use crate::support::upstream::Upstream;

struct Row {
    what: &'static str,
    body: Vec<u8>,
    status: u16,
}

fn rows() -> Vec<Row> {
    let row = |what, body: &[u8], status| Row { what, body: body.to_vec(), status };
    let with = |what, rest: &str, status| {
        row(what, format!(r#"{{"model":"claude-sonnet-4-5","messages":[]{rest}}}"#).as_bytes(), status)
    };
    let model = |what, model: &str, status| {
        row(what, format!(r#"{{"model":{model},"messages":[]}}"#).as_bytes(), status)
    };
    let deep = 100_000;
    let text = |bytes: &[u8]| [br#"{"model":"claude-sonnet-4-5","x":""#, bytes, br#""}"#].concat();
    // What stands inside a string, other than the model, is not looked at: the workspace has the last word on that.
    vec![
        row("nothing", b"", 400),
        row("blanks", b" \r\n\t ", 400),
        row("half an object", br#"{"model":"claude-sonnet-4-5","messages":["#, 400),
        with("a comma too many", ",", 400),
        with(
            "100,000 open brackets, closed",
            &format!(r#","x":{}{}"#, "[".repeat(deep), "]".repeat(deep)),
            200,
        ),
        with(
            "100,000 open braces, closed",
            &format!(r#","x":{}1{}"#, r#"{"y":"#.repeat(deep), "}".repeat(deep)),
            200,
        ),
        with("100,000 open brackets, not closed", &format!(r#","x":{}"#, "[".repeat(deep)), 400),
        with("brackets that do not match", r#","x":[}"#, 400),
        row("100,000 brackets and nothing else", "[".repeat(deep).as_bytes(), 400),
        with("NaN", r#","x":NaN"#, 400),
        with("Infinity", r#","x":-Infinity"#, 400),
        with("a number of 100,000 digits", &format!(r#","x":{}"#, "9".repeat(deep)), 200),
        with("1e999999", r#","x":1e999999"#, 200),
        with("a lone high surrogate", r#","x":"\ud800""#, 200),
        with("a lone low surrogate", r#","x":"\udfff and more""#, 200),
        with("surrogates in the wrong order", r#","x":"\udc00\ud800""#, 200),
        with("an escape that is none", r#","x":"\q""#, 200),
        with("half an escape", r#","x":"\u12""#, 200),
        row("a raw line end in a string", &text(b"a\nb"), 200),
        row("a null byte in a string", &text(b"a\0b"), 200),
        row("a byte order mark", b"\xef\xbb\xbf{\"model\":\"claude-sonnet-4-5\"}", 400),
        row("invalid UTF-8 in a string", &text(b"\xff\xfe"), 400),
        row("UTF-8 cut in the middle", &text(b"\xf0\x9f\x98"), 400),
        row("an overlong encoding", &text(b"\xc0\xaf"), 400),
        row("an encoded surrogate", &text(b"\xed\xa0\x80"), 400),
        row(
            "UTF-16",
            &"{\"model\":\"m\"}".encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>(),
            400,
        ),
        row("two objects", br#"{"model":"claude-sonnet-4-5"}{"model":"claude-sonnet-4-5"}"#, 400),
        row("an array", br#"[{"model":"claude-sonnet-4-5"}]"#, 400),
        row("a string", br#""claude-sonnet-4-5""#, 400),
        row("null", b"null", 400),
        row("no model", br#"{"messages":[]}"#, 400),
        model("a number for a model", "4.5", 400),
        model("null for a model", "null", 400),
        model("an object for a model", r#"{"name":"claude-sonnet-4-5"}"#, 400),
        model("an empty model", r#""""#, 400),
        model("a model with quotes", r#""a\"b\\c""#, 200),
        model("a model with line ends", r#""x\r\nFORGED: yes\r\n\r\n2026 [ERROR] forged""#, 200),
        model("a model with terminal escapes", r#""\u001b[31m\u0000\u0007""#, 200),
        model("a model that is a lone surrogate", r#""\ud800""#, 400),
        model("a model of a megabyte", &format!(r#""{}""#, "m".repeat(1 << 20)), 400),
        with("stream as a string", r#","stream":"true""#, 200),
        with("stream as a number", r#","stream":1"#, 200),
        with("stream as null", r#","stream":null"#, 200),
        with("max_tokens as a string", r#","max_tokens":"many""#, 200),
        with("metadata as a list", r#","metadata":["user_id"]"#, 200),
        with("a key of a megabyte", &format!(r#","{}":1"#, "k".repeat(1 << 20)), 200),
        with("100,000 keys", &(0..100_000).map(|at| format!(r#","k{at}":{at}"#)).collect::<String>(), 200),
    ]
}

/// Everything that must hold whatever the body was.
fn check(proxy: &Proxy, upstream: &Upstream, row: &Row) -> Answer {
    let what = row.what;
    let before = upstream.count();
    let answer = proxy.ask(&Request::post_message(&row.body));
    assert_eq!(
        answer.status(),
        row.status,
        "{what}: {}",
        answer.text().chars().take(300).collect::<String>()
    );
    let arrived = upstream.requests().split_off(before);
    if row.status == 400 {
        let message = answer.error(400, "invalid_request_error");
        assert!(message.len() < 1_000, "{what}: a refusal quotes little: {} bytes", message.len());
        assert!(arrived.is_empty(), "{what}: it reached a workspace");
    } else {
        assert_eq!(arrived.len(), 1, "{what}");
        assert!(
            !arrived[0].lines.iter().any(|line| line.contains("FORGED")),
            "{what}: {:?}",
            arrived[0].lines
        );
    }
    let id = answer.header("request-id").expect("a request-id").to_owned();
    let line = proxy.wait_log(&id);
    assert!(!line.chars().any(char::is_control), "{what}: {line:?}");
    assert!(line.len() < 4_000, "{what}: an access line of {} bytes", line.len());
    answer
}

#[test]
fn each_is_passed_on_or_refused_with_a_reason() {
    let upstream = Upstream::start();
    let setup = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1);
    let mut proxy = setup.start();
    for row in rows() {
        check(&proxy, &upstream, &row);
    }
    proxy.wait_idle();
    let endpoint = proxy.endpoint("w1");
    for field in ["total_errors", "consecutive_failures", "active_requests"] {
        assert_eq!(endpoint[field], 0, "{endpoint}");
    }
    assert!(proxy.running.is_alive() && !proxy.is_open("w1"));
    assert_eq!(proxy.stats()["process"]["panics"], 0);
    let lines = proxy.running.err.all();
    assert!(
        !lines.iter().any(|line| line.starts_with("FORGED") || line.starts_with("2026 [ERROR]")),
        "{lines:?}"
    );
}

/// The same bodies on the route that needs no key and builds more than the scanner does.
#[test]
fn counting_tokens_survives_them_too() {
    let mut proxy = Proxy::with(&[&Upstream::start()]).start();
    for row in rows() {
        let answer = proxy.ask(&Request::new("POST", "/v1/messages/count_tokens").body(&row.body));
        assert!(matches!(answer.status(), 200 | 400), "{}: {}", row.what, answer.status());
    }
    assert!(proxy.running.is_alive());
    assert_eq!(proxy.stats()["process"]["panics"], 0);
}

/// The last of two equal keys counts, for the workspace as for us: the model that is served is the one that is asked.
#[test]
fn of_two_models_the_last_one_counts() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let body = r#"{"model":"claude-opus-4-5","stream": true,"model":"claude-sonnet-4-5","stream":false}"#;
    let answer = proxy.ask(&Request::post_message(body));
    assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
    let line = proxy.wait_log("served=databricks-claude-sonnet-4-5");
    assert!(line.contains("stream=false"), "{line}");
    let sent = String::from_utf8_lossy(&upstream.requests()[0].body).into_owned();
    assert!(sent.contains(r#""stream":false"#) && sent.contains("databricks-claude-sonnet-4-5"), "{sent}");
}
