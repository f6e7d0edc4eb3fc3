//! Streams that break: hidden before content, honest after it.

use crate::support::client::{Answer, End, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures, sse};

fn two(first: &Upstream, second: &Upstream) -> Setup {
    Proxy::with(&[first, second]).in_order().set("load_balancer.circuit_breaker_threshold", 1)
}

/// One coherent stream: the first `message_start` that was relayed, then the second endpoint's content.
fn expect_coherent(answer: &Answer, first_id: &str) {
    assert_eq!((answer.status(), answer.end), (200, End::Complete), "{}", answer.text());
    let names = sse::names(&sse::without_pings(&answer.body)).join(" ");
    let expected =
        "message_start content_block_start content_block_delta content_block_stop message_delta message_stop";
    assert_eq!(names, expected, "{}", answer.text());
    let start = sse::data_of(&answer.body, "message_start").expect("a message_start");
    assert_eq!(start["message"]["id"], first_id);
    assert!(answer.text().contains("from the second"), "{}", answer.text());
}

fn second() -> Upstream {
    Upstream::always(Reply::stream(sse::message("msg_second", "from the second")))
}

/// How a stream may fail before its first content block. What comes after the opening waits for the gate.
fn failures_before_content(opening: &[u8], gate: &Gate) -> Vec<(&'static str, Reply)> {
    let opened = || Reply::sse().part(opening).wait(gate);
    vec![
        ("error event", opened().part(sse::error("api_error"))),
        ("overloaded event", opened().part(sse::error("overloaded_error"))),
        ("cut", opened().close()),
        ("reset", opened().reset()),
        ("clean end", opened()),
        ("cut inside an event", opened().part(&sse::block_start()[..20]).close()),
        ("error event cut short", opened().part(&sse::error("api_error")[..30]).close()),
        ("silence", opened().stall()),
    ]
}

/// Asks for a stream and opens the gate once the opening has come, so that it is certain to have been relayed.
fn ask_and_open(proxy: &Proxy, opening: &[u8], gate: &Gate) -> Answer {
    let mut client = proxy.connect();
    client.send(&Request::stream());
    let head = client.head();
    client.expect_body(opening);
    gate.open();
    let (rest, end) = client.rest();
    Answer { head, body: [opening, &rest].concat(), end }
}

/// The predecessor spliced a second `message_start` into the stream (O5).
#[test]
fn after_message_start_another_endpoint_takes_over() {
    let opening = [sse::message_start("msg_first"), sse::ping()].concat();
    let cases = failures_before_content(&opening, &Gate::closed()).len();
    for case in 0..cases {
        let gate = Gate::closed();
        let (how, reply) = failures_before_content(&opening, &gate).swap_remove(case);
        let (first, second) = (Upstream::always(reply), second());
        let proxy = two(&first, &second).set("timeouts.idle", 0.4).start();
        let answer = ask_and_open(&proxy, &opening, &gate);
        eprintln!("after message_start: {how}");
        expect_coherent(&answer, "msg_first");
        assert_eq!((first.count(), second.count()), (1, 1));
        proxy.wait_idle();
    }
}

#[test]
fn before_any_event_another_endpoint_takes_over_unseen() {
    let gate = Gate::closed();
    gate.open();
    for (how, reply) in failures_before_content(b"", &gate) {
        let (first, second) = (Upstream::always(reply), second());
        let proxy = two(&first, &second).set("timeouts.idle", 0.4).set("timeouts.first_byte", 0.4).start();
        let answer = proxy.ask(&Request::stream());
        eprintln!("before any event: {how}");
        expect_coherent(&answer, "msg_second");
        assert_eq!(answer.header("x-claude-lb-endpoint"), Some("w2"), "nothing was committed to the first");
        assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
        proxy.wait_idle();
    }
}

/// Cut behind a partial first event, the fork sent what it had and then a second stream (F10): only whole events
/// go out before content.
#[test]
fn a_partial_first_event_is_not_shown() {
    let start = sse::message_start("msg_first");
    for cut in [1, 10, start.len() - 1] {
        let (first, second) = (Upstream::always(Reply::stream(&start[..cut]).close()), second());
        let proxy = two(&first, &second).start();
        expect_coherent(&proxy.ask(&Request::stream()), "msg_second");
    }
}

/// Break it at every boundary: cut behind the Nth event, the client sees either one whole stream or exactly what
/// came, and a close without the final chunk. A `message_stop` is never invented (F3).
#[test]
fn a_cut_at_every_event_is_hidden_or_honest() {
    let stream = sse::message("msg_first", "from the first");
    let events = sse::split(&stream);
    for made in 0..events.len() {
        let sent = events[..made].concat();
        let (first, second) = (Upstream::script([Reply::stream(&sent).close()]), second());
        let proxy = two(&first, &second).start();
        let answer = proxy.ask(&Request::stream());
        if made < 2 {
            expect_coherent(&answer, if made == 0 { "msg_second" } else { "msg_first" });
        } else {
            assert_eq!(answer.text(), String::from_utf8_lossy(&sent), "cut after {made} events");
            assert!(answer.end.is_broken(), "cut after {made} events");
            assert_eq!(second.count(), 0, "nothing is retried after content");
            eventually("the broken stream to be counted", || proxy.is_open("w1").then_some(()));
        }
        proxy.wait_idle();
    }
}

/// The same at bytes instead of events: wherever the first stream breaks, the client gets one whole stream or
/// exactly what came.
#[test]
fn a_cut_anywhere_is_hidden_or_honest() {
    let stream = sse::message("msg_first", "from the first");
    let content_from: usize = sse::split(&stream)[..2].iter().map(|event| event.len()).sum();
    let (first, second) = (Upstream::start(), second());
    let proxy = two(&first, &second).set("load_balancer.circuit_breaker_threshold", 1_000).start();
    let near = content_from - 3..content_from + 4;
    let cuts = (0..stream.len() - 1).step_by(17).chain(near);
    for cut in cuts {
        let sent = &stream[..cut];
        first.queue([Reply::sse().parts_of(50, sent).close()]);
        let answer = proxy.ask(&Request::stream());
        if cut < content_from {
            let start_is_whole = cut >= sse::split(&stream)[0].len();
            expect_coherent(&answer, if start_is_whole { "msg_first" } else { "msg_second" });
        } else {
            assert_eq!(answer.text(), String::from_utf8_lossy(sent), "cut at {cut}");
            assert!(answer.end.is_broken(), "cut at {cut}");
        }
    }
    proxy.wait_idle();
}

/// The same before there is any stream: a head cut anywhere is no answer.
#[test]
fn a_head_cut_anywhere_is_hidden() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let (first, second) = (Upstream::start(), second());
    let proxy = two(&first, &second).set("load_balancer.circuit_breaker_threshold", 1_000).start();
    for cut in (0..=head.len()).step_by(7).chain([head.len()]) {
        first.queue([Reply::garbage(&head[..cut])]);
        expect_coherent(&proxy.ask(&Request::stream()), "msg_second");
    }
    proxy.wait_idle();
}

/// The Python SDK takes a clean early end for success, so an upstream's clean framing is no excuse.
#[test]
fn a_stream_without_message_stop_is_broken_whatever_its_framing() {
    for name in ["cut_before_message_stop", "cut_mid_block", "cut_mid_event"] {
        let sent = fixtures::transcript(name);
        let replies = [
            Reply::stream(&sent),
            Reply::page(200, "text/event-stream", &sent),
            Reply::stream(&sent).until_close(),
        ];
        for reply in replies {
            let upstream = Upstream::script([reply]);
            let proxy = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1).start();
            let answer = proxy.ask(&Request::stream());
            assert_eq!(answer.text(), String::from_utf8_lossy(&sent), "{name}");
            assert!(answer.end.is_broken(), "{name} ended with a final chunk");
            eventually("the broken stream to be counted", || proxy.is_open("w1").then_some(()));
        }
    }
}

#[test]
fn an_error_event_after_content_passes_and_is_an_honest_end() {
    for name in ["error_mid_stream", "error_after_block"] {
        let (first, second) = (Upstream::script([Reply::stream(fixtures::transcript(name))]), second());
        let proxy = two(&first, &second).start();
        let answer = proxy.ask(&Request::stream());
        assert_eq!(answer.text(), String::from_utf8_lossy(&fixtures::transcript(name)));
        assert_eq!((answer.end, second.count()), (End::Complete, 0));
        proxy.wait_idle();
    }
}

/// Without a read limit a silent upstream hung the user for ever (F4).
#[test]
fn silence_after_content_ends_at_the_idle_limit() {
    let sent = [sse::message_start("msg_1"), sse::block_start(), sse::delta("half")].concat();
    let upstream = Upstream::script([Reply::stream(&sent).stall()]);
    let proxy = Proxy::with(&[&upstream]).set("timeouts.idle", 0.3).start();
    let answer = proxy.ask(&Request::stream());
    assert_eq!(sse::without_pings(&answer.body), sent);
    assert!(answer.end.is_broken());
    upstream.wait_client_gone(1);
    proxy.wait_idle();
}

#[test]
fn when_all_fail_after_message_start_the_socket_is_closed() {
    let (gate, start) = (Gate::closed(), sse::message_start("msg_first"));
    let failing =
        || Upstream::always(Reply::sse().part(&start).wait(&gate).part(sse::error("overloaded_error")));
    let (first, second) = (failing(), failing());
    let proxy = two(&first, &second).start();
    let answer = ask_and_open(&proxy, &start, &gate);
    assert_eq!(answer.text(), String::from_utf8_lossy(&sse::message_start("msg_first")));
    assert!(answer.end.is_broken());
    assert_eq!((first.count(), second.count()), (1, 1));
}

#[test]
fn when_all_fail_after_pings_an_error_event_says_so() {
    let gate = Gate::closed();
    let failing =
        || Upstream::always(Reply::sse().part(sse::ping()).wait(&gate).part(sse::error("overloaded_error")));
    let (first, second) = (failing(), failing());
    let proxy = two(&first, &second).start();
    let answer = ask_and_open(&proxy, &sse::ping(), &gate);
    expect_error_event(&answer);
    assert_eq!((first.count(), second.count()), (1, 1));
}

/// The predecessor's errors inside streams lacked the `event: error` line (O6).
fn expect_error_event(answer: &Answer) {
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.end, End::Complete, "{}", answer.text());
    assert_eq!(sse::names(&sse::without_pings(&answer.body)), ["error"], "{}", answer.text());
    let error = sse::data_of(&answer.body, "error").expect("an error event");
    assert_eq!(error["type"], "error");
    assert!(error["error"]["type"].is_string() && error["error"]["message"].is_string(), "{error}");
}

#[test]
fn a_ping_before_the_head_commits_an_event_stream() {
    let gate = Gate::closed();
    let stream = sse::message("msg_1", "late");
    let upstream = Upstream::script([Reply::stream(&stream).after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("timeouts.heartbeat", 0.2).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    let head = client.head();
    assert_eq!(head.status, 200);
    assert!(
        head.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")),
        "{head:?}"
    );
    let early = client.body_until("event: ping");
    gate.open();
    let (late, end) = client.rest();
    assert_eq!(end, End::Complete);
    assert_eq!(sse::without_pings(&[early, late].concat()), stream);
}

/// A request that wants JSON gets no ping: nothing is sent before its status is known.
#[test]
fn a_plain_request_has_no_heartbeat() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::error(400, "anthropic-400.json").after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("timeouts.heartbeat", 0.05).start();
    let mut streaming = proxy.connect();
    let mut plain = proxy.connect();
    plain.send(&Request::message());
    upstream.wait_requests(1);
    let held = Gate::closed();
    upstream.queue([Reply::stream(sse::message("msg_1", "x")).after(&held)]);
    streaming.send(&Request::stream());
    // Once the streaming neighbour has had its pings, a heartbeat of the plain one would be out as well.
    streaming.head();
    for _ in 0..3 {
        streaming.body_until("event: ping");
    }
    gate.open();
    assert_eq!(plain.answer().status(), 400);
    held.open();
    streaming.rest();
}

#[test]
fn a_ping_fills_silence_at_an_event_boundary() {
    let gates = [Gate::closed(), Gate::closed()];
    let (start, rest) = (sse::message_start("msg_1"), [sse::block_start(), sse::delta("text")].concat());
    let reply = Reply::sse().part(&start).wait(&gates[0]).part(&rest).wait(&gates[1]).part(sse::ending());
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).set("timeouts.heartbeat", 0.2).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    let mut seen = client.body_until("event: ping");
    gates[0].open();
    seen.extend(client.body_until("content_block_delta"));
    seen.extend(client.body_until("event: ping"));
    gates[1].open();
    let (rest, end) = client.rest();
    seen.extend(rest);
    assert_eq!(end, End::Complete);
    assert!(sse::names(&seen).iter().filter(|name| *name == "ping").count() >= 2);
    assert_eq!(sse::without_pings(&seen), sse::message("msg_1", "text"));
}

/// Half an event has gone out; a ping now would land inside it.
#[test]
fn no_ping_lands_inside_an_event() {
    let gate = Gate::closed();
    let opening = [sse::message_start("msg_1"), sse::block_start()].concat();
    let text = sse::delta("cut in the middle of this word");
    let (half, other_half) = text.split_at(text.len() / 2);
    let reply = Reply::sse().part(&opening).part(half).wait(&gate).part(other_half).part(sse::ending());
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).set("timeouts.heartbeat", 0.05).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    client.expect_body(&[opening.as_slice(), half].concat());
    // A neighbour's silent stream shows that several heartbeats have passed meanwhile.
    let held = Gate::closed();
    upstream.queue([Reply::stream(sse::message("msg_2", "x")).after(&held)]);
    let mut neighbour = proxy.connect();
    neighbour.send(&Request::stream());
    neighbour.head();
    for _ in 0..3 {
        neighbour.body_until("event: ping");
    }
    gate.open();
    held.open();
    assert_eq!(sse::without_pings(&client.rest().0), [other_half, &sse::ending()].concat());
    neighbour.rest();
}

#[test]
fn after_a_heartbeat_another_endpoint_may_still_take_over() {
    let gate = Gate::closed();
    let (first, second) =
        (Upstream::script([Reply::error(500, "anthropic-500.json").after(&gate)]), second());
    let proxy = two(&first, &second).set("timeouts.heartbeat", 0.2).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    assert_eq!(client.head().status, 200);
    client.body_until("event: ping");
    gate.open();
    let (body, end) = client.rest();
    assert_eq!(end, End::Complete);
    assert_eq!(sse::without_pings(&body), sse::message("msg_second", "from the second"));
    assert_eq!((first.count(), second.count()), (1, 1));
}

#[test]
fn after_a_heartbeat_a_failure_of_all_is_an_error_event() {
    let cases = [
        Reply::error(529, "anthropic-529.json"),
        Reply::error(400, "databricks-400-wrapped.json"),
        Reply::error(503, "databricks-503.html"),
        Reply::hang_up(),
    ];
    for reply in cases {
        let gate = Gate::closed();
        let first = Upstream::script([reply.clone().after(&gate)]);
        first.answer(move |_| reply.clone());
        let proxy = Proxy::with(&[&first]).set("timeouts.heartbeat", 0.2).start();
        let mut client = proxy.connect();
        client.send(&Request::stream());
        let head = client.head();
        let early = client.body_until("event: ping");
        gate.open();
        let (late, end) = client.rest();
        expect_error_event(&Answer { head, body: [early, late].concat(), end });
    }
}

/// Bounded by `first_byte`: pings do not keep a dead upstream alive (F4).
#[test]
fn heartbeats_end_with_the_first_byte_limit() {
    let silent = Upstream::always(Reply::silence());
    let setup = Proxy::with(&[&silent]).set("timeouts.heartbeat", 0.1);
    let proxy = setup.set("timeouts.first_byte", 0.5).start();
    let answer = proxy.ask(&Request::stream());
    expect_error_event(&answer);
    assert_eq!(
        sse::data_of(&answer.body, "error").expect("an error event")["error"]["type"],
        "timeout_error"
    );
    assert_eq!(silent.count(), 1);
}

/// An `overloaded_error` inside a stream counted as a success before (O10): afterwards the endpoint was asked
/// again at once.
#[test]
fn an_endpoint_overloaded_in_its_stream_is_left_alone_for_a_while() {
    let reply = Reply::sse().part(sse::message_start("msg_first")).part(sse::error("overloaded_error"));
    let (first, second) = (Upstream::always(reply), second());
    let proxy = two(&first, &second).start();
    for _ in 0..3 {
        assert_eq!(proxy.ask(&Request::stream()).end, End::Complete);
    }
    assert_eq!((first.count(), second.count()), (1, 3));
}

#[test]
fn three_endpoints_are_tried_in_one_stream() {
    let start = |id: &str| Reply::sse().part(sse::message_start(id));
    let first = Upstream::always(start("msg_first").close());
    let middle = Upstream::always(start("msg_middle").part(sse::error("api_error")));
    let last = second();
    let proxy = Proxy::with(&[&first, &middle, &last]).in_order().start();
    expect_coherent(&proxy.ask(&Request::stream()), "msg_first");
    assert_eq!((first.count(), middle.count(), last.count()), (1, 1, 1));
}
