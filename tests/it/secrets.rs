//! No token, no key and no word of a conversation in anything the program writes or shows.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::client::{KEY, Request};
use crate::support::proxy::{Folder, Proxy, program, token};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{DEADLINE, fixtures, sse};

const WORDS: [&str; 4] =
    ["a-wrong-key-of-a-client", "a-bearer-of-a-client", "a-word-of-the-question", "a-word-of-the-answer"];

fn question(stream: bool) -> Request {
    let body = format!(
        r#"{{"model":"claude-sonnet-4-5","stream":{stream},"messages":[{{"role":"user","content":"a-word-of-the-question"}}]}}"#
    );
    Request::post_message(body)
}

fn expect_clean(what: &str, text: &str) {
    for secret in WORDS.iter().copied().chain([KEY, &token(0), &token(1)]) {
        assert!(!text.contains(secret), "{what} holds {secret:?}:\n{text}");
    }
}

/// Every way an attempt can go, at the chattiest log level.
#[test]
fn nothing_secret_is_logged_or_shown() {
    for format in ["text", "json"] {
        let first = Upstream::script([
            Reply::error(500, "anthropic-500.json"),
            Reply::error(429, "databricks-429.json").header("retry-after", "1"),
            Reply::json(400, format!(r#"{{"message":"bad token {} a-word-of-the-answer"}}"#, token(0)))
                .header("x-echo", &format!("Bearer {}", token(0))),
            Reply::hang_up(),
            Reply::json(503, format!("Bearer {} refused, a-word-of-the-answer", token(0))),
            Reply::garbage(format!("HTTP/1.1 {} nonsense\r\n\r\n", token(0))),
            Reply::stream(
                [sse::message_start("msg_1"), sse::block_start(), sse::delta("a-word-of-the-answer")]
                    .concat(),
            )
            .header("x-authenticated-by", &token(0))
            .close(),
            Reply::error(403, "databricks-403-invalid-token.json"),
        ]);
        let second = Upstream::always(Reply::stream(sse::message("msg_2", "a-word-of-the-answer")));
        let setup = Proxy::with(&[&first, &second])
            .in_order()
            .set("logging.level", "trace")
            .set("logging.format", format);
        let proxy = setup.start();
        for round in 0..12 {
            proxy.ask(&Request::new("POST", "/reset"));
            let answer = proxy.ask(&question(round % 2 == 0));
            let shown = answer.text().replace("a-word-of-the-answer", "");
            expect_clean("an answer", &shown);
            expect_clean("a head", &format!("{:?}", answer.head));
            let id = answer.header("request-id").expect("every answer has an id");
            expect_clean("an explanation", &proxy.explain(id).to_string());
        }
        let wrong = question(false)
            .without("x-api-key")
            .with("x-api-key", WORDS[0])
            .with("authorization", &format!("Bearer {}", WORDS[1]));
        expect_clean("a refusal", &proxy.ask(&wrong).text());
        for route in ["/stats", "/health/ready"] {
            expect_clean(route, &proxy.ask(&Request::get(route)).text());
        }
        let last = proxy.ask(&question(true));
        proxy.wait_log(last.header("request-id").expect("a request-id"));
        expect_clean("the output", &proxy.running.output());
    }
}

#[test]
fn one_access_line_for_each_request() {
    let upstream = Upstream::script([
        Reply::error(500, "anthropic-500.json"),
        Reply::message().header("request-id", "req_seen_by_the_client"),
    ]);
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    let line = proxy.wait_log("req_seen_by_the_client");
    for word in ["claude-sonnet-4-5", "databricks-claude-sonnet-4-5", "w1", "200"] {
        assert!(line.contains(word), "{word} in {line}");
    }
    let refused = proxy.ask(&Request::message().without("x-api-key"));
    let line = proxy.wait_log(refused.header("request-id").expect("a request-id"));
    assert!(line.contains("401"), "{line}");
    let lines = proxy.running.err.all();
    assert_eq!(lines.iter().filter(|line| line.contains("req_seen_by_the_client")).count(), 1);
}

/// An id that the client was shown can be found, whoever answered.
#[test]
fn every_request_id_is_in_the_log() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let requests = [
        Request::message().without("x-api-key"),
        Request::post_message("not json"),
        Request::get("/no/such/route"),
        Request::get("/v1/messages"),
        Request::message().version("HTTP/2.0"),
        Request::new("POST", "/v1/messages/count_tokens").body("not json"),
    ];
    for request in requests {
        let answer = proxy.ask(&request);
        proxy.wait_log(answer.header("request-id").unwrap_or_else(|| panic!("no request-id: {answer:?}")));
    }
}

/// Somebody else's words cannot come into the middle of a line when all of it is written at once.
#[test]
fn a_line_of_the_log_is_one_write() {
    for format in ["text", "json"] {
        // Each write is a message of its own here.
        let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
        ours.set_read_timeout(Some(DEADLINE)).expect("a live socket");
        let folder = Folder::new();
        let config = Proxy::with(&[&Upstream::start()]).set("logging.format", format).yaml();
        let mut command = program();
        command.arg("--config").arg(folder.write("config.yaml", &config));
        let err = Stdio::from(OwnedFd::from(theirs));
        let child = command.stdout(Stdio::piped()).stderr(err).spawn();
        let mut child = child.expect("the program was built by this test run");
        let mut out = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        out.read_line(&mut String::new()).expect("it says where it listens");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("it still runs");
        let mut line = [0; 4096];
        let length = ours.recv(&mut line).expect("it says that it drains");
        let line = String::from_utf8_lossy(&line[..length]);
        assert!(line.contains("draining") && line.ends_with('\n'), "{line:?}");
        assert!(child.wait().expect("our own child").success());
    }
}

#[test]
fn control_characters_cannot_forge_a_log_line() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let model = r"claude\nFORGED line\r\u001b[31m\u0000";
    let body = format!(r#"{{"model":"{model}","messages":[]}}"#);
    let answer = proxy.ask(&Request::post_message(body));
    let line = proxy.wait_log(answer.header("request-id").expect("a request-id"));
    assert!(!line.chars().any(char::is_control), "{line:?}");
    assert!(!proxy.running.err.all().iter().any(|line| line.starts_with("FORGED")));
}

/// Anybody could write 64 KiB into the log with each request.
#[test]
fn what_a_stranger_asks_for_is_logged_in_part() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let answer = proxy.ask(&Request::get(&format!("/{}", "y".repeat(60_000))));
    let message = answer.error(404, "not_found_error");
    let line = proxy.wait_log(answer.header("request-id").expect("a request-id"));
    assert!(message.len() < 500 && line.len() < 500, "{} and {} bytes", message.len(), line.len());
}

#[test]
fn json_logs_are_one_json_object_a_line() {
    let upstream = Upstream::script([Reply::error(500, "anthropic-500.json")]);
    let proxy = Proxy::with(&[&upstream]).set("logging.format", "json").start();
    let answer = proxy.ask(&Request::stream());
    assert_eq!(answer.body, fixtures::transcript("text"));
    proxy.wait_log(answer.header("request-id").expect("a request-id"));
    for line in proxy.running.err.all() {
        let parsed: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        assert!(parsed.is_object(), "{line}");
    }
}

#[test]
fn a_change_of_state_is_logged_once() {
    let (failing, healthy) = (Upstream::always(Reply::error(500, "anthropic-500.json")), Upstream::start());
    let setup =
        Proxy::with(&[&failing, &healthy]).in_order().set("load_balancer.circuit_breaker_threshold", 2);
    let proxy = setup.start();
    let mut last = None;
    for _ in 0..6 {
        last = Some(proxy.ask(&Request::message()));
    }
    let last = last.expect("six answers");
    proxy.wait_log(last.header("request-id").expect("a request-id"));
    let warnings: Vec<String> =
        proxy.running.err.all().into_iter().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("w1"), "{warnings:?}");
}
