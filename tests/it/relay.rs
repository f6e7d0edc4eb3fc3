//! What passes through unchanged, and the little that does not.

use serde_json::Value;

use crate::support::client::{Answer, Client, End, KEY, Request};
use crate::support::fixtures::{self, Captured};
use crate::support::proxy::{Folder, Proxy, token};
use crate::support::reply::Reply;
use crate::support::upstream::{Recorded, Upstream};
use crate::support::{eventually, sse};

/// How a stream must reach the client, by what section 6 of the contract says about its end.
#[derive(PartialEq)]
enum Fate {
    Whole,
    /// All bytes, then a close without the final chunk.
    CutOff,
    /// No stream at all: status 529.
    Overloaded,
}

fn fate(name: &str) -> Fate {
    match name {
        "error_first_event" => Fate::Overloaded,
        name if name.starts_with("cut_") => Fate::CutOff,
        _ => Fate::Whole,
    }
}

fn check_transcript(name: &str, reply: Reply, how: &str) {
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::stream());
    let context = format!("{name} {how}: {answer:?}");
    if fate(name) == Fate::Overloaded {
        answer.error(529, "overloaded_error");
    } else {
        assert_eq!(answer.status(), 200, "{context}");
        assert_eq!(answer.text(), String::from_utf8_lossy(&fixtures::transcript(name)), "{name} {how}");
        assert_eq!(answer.end.is_broken(), fate(name) == Fate::CutOff, "{context}");
    }
    proxy.wait_idle();
}

#[test]
fn every_transcript_arrives_byte_for_byte_in_one_chunk() {
    for name in fixtures::transcripts() {
        let stream = fixtures::transcript(&name);
        let reply = Reply::stream(&stream);
        let reply = if fate(&name) == Fate::CutOff { reply.close() } else { reply };
        check_transcript(&name, reply, "in one chunk");
    }
}

#[test]
fn every_transcript_arrives_byte_for_byte_in_odd_pieces() {
    for (name, size) in fixtures::transcripts().iter().zip([1, 7, 61, 333].into_iter().cycle()) {
        let reply = Reply::sse().parts_of(size, &fixtures::transcript(name));
        let reply = if fate(name) == Fate::CutOff { reply.close() } else { reply };
        check_transcript(name, reply, &format!("in pieces of {size}"));
    }
}

#[test]
fn a_stream_that_ends_with_its_connection_arrives_whole() {
    for name in ["text", "crlf", "thinking_tool_use", "error_after_block"] {
        check_transcript(name, Reply::stream(fixtures::transcript(name)).until_close(), "until close");
    }
}

#[test]
fn a_stream_with_content_length_arrives_whole() {
    let stream = fixtures::transcript("parallel_tool_use");
    check_transcript("parallel_tool_use", Reply::page(200, "text/event-stream", &stream), "with a length");
}

fn without_model(mut body: Value) -> Value {
    body.as_object_mut().expect("a body is an object").remove("model");
    body
}

/// What the model of a captured request becomes.
fn served_model(asked: &str) -> String {
    match asked {
        "claude-haiku-4-5-20251001" => "databricks-claude-haiku-4-5".to_owned(),
        other if other.starts_with("databricks-") => other.to_owned(),
        other => format!("databricks-{other}"),
    }
}

fn expect_spliced(captured: &Captured, received: &Recorded) {
    let name = &captured.name;
    let before: Value = serde_json::from_slice(&captured.body).expect("a captured body is JSON");
    let asked = before["model"].as_str().expect("a captured body names a model").to_owned();
    let old = format!("\"model\":\"{asked}\"");
    let new = format!("\"model\":\"{}\"", served_model(&asked));
    let expected =
        String::from_utf8(captured.body.clone()).expect("captures are UTF-8").replacen(&old, &new, 1);
    assert_eq!(without_model(received.json()), without_model(before), "{name}");
    assert!(received.body == expected.as_bytes(), "{name}: the bytes differ although the JSON is the same");
    assert_eq!(received.header("content-length"), Some(expected.len().to_string().as_str()), "{name}");
}

fn messages_of_the_client() -> Vec<Captured> {
    let captured = fixtures::captured().into_iter();
    captured.filter(|captured| captured.target.starts_with("/v1/messages?")).collect()
}

#[test]
fn all_captured_bodies_pass_unchanged_but_for_the_model() {
    let captured = messages_of_the_client();
    assert!(captured.len() >= 20, "only {} captured messages", captured.len());
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    for (index, captured) in captured.iter().enumerate() {
        let answer = client.ask(&Request::captured(captured));
        assert_eq!(
            (answer.status(), answer.end),
            (200, End::Complete),
            "{}: {}",
            captured.name,
            answer.text()
        );
        expect_spliced(captured, &upstream.wait_requests(index + 1)[index]);
    }
}

/// Sent by the proxy, or by the connection, and never the client's business.
const REPLACED: [&str; 9] = [
    "host",
    "connection",
    "accept-encoding",
    "content-length",
    "authorization",
    "x-api-key",
    "expect",
    "transfer-encoding",
    "te",
];

#[test]
fn all_other_captured_headers_pass_unchanged() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for (index, captured) in messages_of_the_client().iter().enumerate() {
        proxy.ask(&Request::captured(captured));
        let received = &upstream.wait_requests(index + 1)[index];
        for (name, value) in &captured.headers {
            if !REPLACED.contains(&name.to_lowercase().as_str()) {
                assert_eq!(received.all(name), [value.as_str()], "{}: {name}", captured.name);
            }
        }
        assert_eq!(received.all("authorization"), [format!("Bearer {}", token(0))], "{}", captured.name);
    }
}

/// Both predecessors dropped `anthropic-beta` and `anthropic-version` (O15).
#[test]
fn anthropic_headers_and_the_query_pass_untouched() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let betas = (0..40).map(|number| format!("feature-{number}-2026-01-01")).collect::<Vec<_>>().join(",");
    let mut request = Request::new("POST", "/v1/messages?beta=true&x=%20a%2Fb&&y=1?2")
        .with("x-api-key", KEY)
        .with("anthropic-version", "2023-06-01")
        .with("anthropic-beta", &betas)
        .with("anthropic-beta", "second-line-2026-02-02")
        .with("anthropic-not-invented-yet", "a \"quoted\" value; v=1")
        .with("X-Claude-Code-Session-Id", "0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f");
    request = request.body(r#"{"model":"claude-sonnet-4-5","messages":[],"max_tokens":1}"#);
    assert_eq!(proxy.ask(&request).status(), 200);
    let received = &upstream.wait_requests(1)[0];
    let line = "POST /serving-endpoints/anthropic/v1/messages?beta=true&x=%20a%2Fb&&y=1?2 HTTP/1.1";
    assert_eq!(received.request_line(), line);
    assert_eq!(received.all("anthropic-beta"), [betas.as_str(), "second-line-2026-02-02"]);
    assert_eq!(received.all("anthropic-not-invented-yet"), ["a \"quoted\" value; v=1"]);
    assert_eq!(received.all("anthropic-version"), ["2023-06-01"]);
    assert_eq!(received.all("x-claude-code-session-id"), ["0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f"]);
}

#[test]
fn a_trailing_slash_of_api_base_is_folded() {
    let upstream = Upstream::start();
    let base = format!("http://{}/serving-endpoints/", upstream.address());
    let proxy = Proxy::with(&[&upstream]).endpoint(0, "api_base", base).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    let received = &upstream.wait_requests(1)[0];
    assert_eq!(received.request_line(), "POST /serving-endpoints/anthropic/v1/messages?beta=true HTTP/1.1");
}

/// HTTP allows more names and values than libraries do: dots and marks in a name, a tab and bytes beyond ASCII in a
/// value. Such headers were refused with a 400 once; they are the business of whoever sends and whoever reads them.
#[test]
fn odd_headers_go_upstream_as_they_are() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let request = Request::message()
        .with("X.Dotted", "a")
        .with("X!#$%&'*+-.^_`|~", "b")
        .with("X-Tab", "c\td")
        .with("X-Name", "Zo\u{eb} \u{1f600}")
        .with("X-Empty", "");
    let mut bytes = request.bytes();
    let end = memchr::memmem::find(&bytes, b"\r\n\r\n").expect("a whole head") + 2;
    bytes.splice(end..end, *b"X-Latin: caf\xe9\r\n");
    let mut client = proxy.connect();
    client.send_bytes(&bytes);
    assert_eq!(client.answer().status(), 200);
    let received = &upstream.wait_requests(1)[0];
    for (name, value) in [
        ("X.Dotted", "a"),
        ("X!#$%&'*+-.^_`|~", "b"),
        ("X-Tab", "c\td"),
        ("X-Name", "Zo\u{eb} \u{1f600}"),
        ("X-Empty", ""),
        ("X-Latin", "caf\u{fffd}"),
    ] {
        assert_eq!(received.all(name), [value], "{name}: {:?}", received.lines);
    }
}

#[test]
fn headers_of_the_connection_and_credentials_stay_here() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let request = Request::message()
        .with("Authorization", "Bearer client-side-secret")
        .with("Connection", "keep-alive, x-only-this-hop")
        .with("X-Only-This-Hop", "1")
        .with("Connection", "X-Nor-Further")
        .with("X-Nor-Further", "1")
        .with("Keep-Alive", "timeout=5")
        .with("Proxy-Authorization", "Basic abc")
        .with("Proxy-Connection", "keep-alive")
        .with("TE", "trailers")
        .with("Trailer", "x-later")
        .with("Upgrade", "h2c")
        .with("Expect", "100-continue")
        .with("Accept-Encoding", "gzip, deflate, br, zstd");
    assert_eq!(proxy.ask(&request).status(), 200);
    let received = &upstream.wait_requests(1)[0];
    for name in ["x-only-this-hop", "keep-alive", "proxy-authorization", "proxy-connection", "te", "trailer"]
    {
        assert_eq!(received.header(name), None, "{name}");
    }
    for name in ["upgrade", "expect", "x-api-key", "transfer-encoding", "x-nor-further"] {
        assert_eq!(received.header(name), None, "{name}");
    }
    assert!(
        received.header("accept-encoding").is_none_or(|coding| coding == "identity"),
        "{:?}",
        received.lines
    );
    assert_eq!(received.all("host"), [upstream.address().to_string()]);
    assert_eq!(received.all("authorization"), [format!("Bearer {}", token(0))]);
    assert!(!received.lines.join("\n").contains("client-side-secret"));
    assert!(!received.lines.join("\n").contains(KEY));
}

#[test]
fn extra_headers_of_an_endpoint_are_sent() {
    let upstream = Upstream::start();
    let headers = r#"{ x-databricks-use-coding-agent-mode: "true" }"#;
    let proxy = Proxy::with(&[&upstream]).endpoint(0, "headers", headers).start();
    proxy.ask(&Request::message());
    assert_eq!(upstream.wait_requests(1)[0].all("x-databricks-use-coding-agent-mode"), ["true"]);
}

#[test]
fn a_chunked_request_body_goes_on_whole() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let captured = fixtures::captured_named("large-tool-result-turn");
    let mut client = proxy.connect();
    let answer = client.ask(&Request::post_message(&captured.body).chunked(4_001));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert_eq!(client.ask(&Request::message()).status(), 200, "the connection lives on");
    expect_spliced(&captured, &upstream.wait_requests(1)[0]);
}

#[test]
fn expect_100_continue_gets_its_interim_answer() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let request =
        Request::post_message(fixtures::captured_named("main-turn").body).with("Expect", "100-continue");
    let mut client = proxy.connect();
    client.send_bytes(&request.head_bytes());
    assert!(client.read_once().starts_with(b"HTTP/1.1 100"));
    client.send_bytes(&request.bytes()[request.head_bytes().len()..]);
    assert_eq!(client.answer().body, fixtures::transcript("text"));
    assert_eq!(client.ask(&Request::message()).status(), 200, "the connection lives on");
}

#[test]
fn headers_of_the_answer_pass_and_ours_are_added() {
    let reply = Reply::message()
        .header("request-id", "req_from_upstream")
        .header("anthropic-ratelimit-input-tokens-remaining", "41000")
        .header("anthropic-ratelimit-requests-reset", "2026-11-23T06:00:00Z")
        .header("x-something-new", "kept")
        .header("keep-alive", "timeout=99")
        .header("connection", "x-first-hop")
        .header("connection", "X-Second-Hop")
        .header("x-first-hop", "1")
        .header("x-second-hop", "1");
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.header("request-id"), Some("req_from_upstream"));
    assert_eq!(answer.header("anthropic-ratelimit-input-tokens-remaining"), Some("41000"));
    assert_eq!(answer.header("anthropic-ratelimit-requests-reset"), Some("2026-11-23T06:00:00Z"));
    assert_eq!(answer.header("x-something-new"), Some("kept"));
    assert_eq!(answer.header("x-claude-lb-endpoint"), Some("w1"));
    assert_eq!(answer.header("x-claude-lb-attempts"), Some("1"));
    assert_ne!(answer.header("keep-alive"), Some("timeout=99"));
    assert_eq!((answer.header("x-first-hop"), answer.header("x-second-hop")), (None, None));
}

#[test]
fn a_missing_request_id_is_added_and_is_in_the_access_line() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let answers: Vec<Answer> =
        [Request::message(), Request::stream()].iter().map(|request| proxy.ask(request)).collect();
    let ids: Vec<&str> = answers.iter().map(|answer| answer.header("request-id").expect("an id")).collect();
    assert_ne!(ids[0], ids[1]);
    for id in ids {
        let line = proxy.wait_log(id);
        assert!(line.contains("w1") && line.contains("200"), "{line}");
    }
}

#[test]
fn an_answer_of_known_length_keeps_its_content_length() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.number("content-length"), Some(fixtures::message_json().len() as u64));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let large =
        format!(r#"{{"type":"message","content":[{{"type":"text","text":"{}"}}]}}"#, "x".repeat(3_000_000));
    upstream.queue([Reply::json(200, &large)]);
    let answer = proxy.ask(&Request::message());
    assert_eq!(answer.number("content-length"), Some(large.len() as u64));
    assert!(answer.body == large.as_bytes());
}

#[test]
fn a_chunked_json_answer_arrives_whole() {
    let upstream = Upstream::script([Reply::json(200, "{\"type\":").part("\"message\"}").chunked()]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.text().as_str(), answer.end), (r#"{"type":"message"}"#, End::Complete));
}

#[test]
fn an_encoded_answer_passes_as_it_is() {
    let bytes: Vec<u8> = (0..2_000u32).map(|number| (number * 37 % 251) as u8).collect();
    let reply = Reply::json(200, &bytes).header("content-encoding", "gzip");
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.header("content-encoding")), (200, Some("gzip")));
    assert!(answer.body == bytes);
}

#[test]
fn json_for_a_request_that_wanted_a_stream_passes_as_it_is() {
    let upstream = Upstream::script([Reply::message()]);
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::stream());
    assert_eq!((answer.status(), answer.end), (200, End::Complete));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.body, fixtures::message_json());
}

#[test]
fn an_http_1_0_client_gets_an_unchunked_answer_and_a_close() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for (request, body) in
        [(Request::stream(), fixtures::transcript("text")), (Request::message(), fixtures::message_json())]
    {
        let mut client = proxy.connect();
        let answer = client.ask(&request.version("HTTP/1.0"));
        assert_eq!((answer.status(), answer.end), (200, End::Complete));
        assert_eq!(answer.header("transfer-encoding"), None);
        assert_eq!(answer.body, body);
        assert_eq!(client.try_head().err(), Some(End::Closed));
    }
}

#[test]
fn a_client_that_asks_for_a_close_gets_one() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for request in [Request::stream(), Request::message(), Request::get("/health")] {
        let mut client = proxy.connect();
        let answer = client.ask(&request.with("Connection", "close"));
        assert_eq!((answer.status(), answer.end), (200, End::Complete));
        assert_eq!(client.expect_closed(), End::Closed);
    }
}

/// The client may send both credentials, different; either may be the right one.
#[test]
fn either_credential_opens_the_door() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let right = format!("Bearer {KEY}");
    let cases = [
        (Some(KEY), None, 200),
        (None, Some(right.as_str()), 200),
        (Some("wrong"), Some(right.as_str()), 200),
        (Some(KEY), Some("Bearer wrong"), 200),
        (Some("wrong"), Some("Bearer wrong"), 401),
        (Some(""), Some("Bearer "), 401),
        (None, Some(KEY), 401),
        (None, None, 401),
    ];
    for (x_api_key, authorization, status) in cases {
        let mut request = Request::message().without("x-api-key");
        if let Some(key) = x_api_key {
            request = request.with("x-api-key", key);
        }
        if let Some(value) = authorization {
            request = request.with("Authorization", value);
        }
        let answer = proxy.ask(&request);
        assert_eq!(answer.status(), status, "{x_api_key:?} {authorization:?}: {}", answer.text());
    }
    assert_eq!(upstream.count(), 4);
}

#[test]
fn named_keys_open_the_door_too() {
    let upstream = Upstream::start();
    let keys = "[ { name: alice, key: alices-own-key } ]";
    let proxy = Proxy::with(&[&upstream]).set("auth.api_keys", keys).start();
    for key in [KEY, "alices-own-key"] {
        let request = Request::message().without("x-api-key").with("x-api-key", key);
        assert_eq!(proxy.ask(&request).status(), 200, "{key}");
    }
}

/// A rotated token must not need a restart.
#[test]
fn a_token_file_is_read_again_when_it_changes() {
    let upstream = Upstream::start();
    let folder = Folder::new();
    let path = folder.write("token", "the-first-token\n");
    let setup =
        Proxy::with(&[&upstream]).endpoint_unset(0, "token").endpoint(0, "token_file", path.display());
    let proxy = setup.start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    assert_eq!(upstream.wait_requests(1)[0].all("authorization"), ["Bearer the-first-token"]);
    folder.write("token", "a-second-and-longer-token\n");
    eventually("the new token to be used", || {
        proxy.ask(&Request::message());
        let last = upstream.requests().pop()?;
        (last.header("authorization") == Some("Bearer a-second-and-longer-token")).then_some(())
    });
}

#[test]
fn requests_side_by_side_do_not_mix() {
    let upstream = Upstream::start();
    upstream.answer(|request| {
        let word = request.json()["messages"][0]["content"].as_str().unwrap_or_default().to_owned();
        Reply::sse().parts_of(40, &sse::message(&word, &word.repeat(50)))
    });
    let proxy = Proxy::with(&[&upstream]).start();
    crate::support::together(8, |thread| {
        let mut client: Client = proxy.connect();
        for round in 0..4 {
            let word = format!("word-{thread}-{round} ");
            let body = format!(
                r#"{{"model":"claude-sonnet-4-5","stream":true,"messages":[{{"role":"user","content":"{word}"}}]}}"#
            );
            let answer = client.ask(&Request::post_message(body));
            assert_eq!(answer.body, sse::message(&word, &word.repeat(50)));
        }
    });
    eventually("all 32 requests to be counted", || {
        (proxy.number("w1", "total_requests") == 32).then_some(())
    });
}
