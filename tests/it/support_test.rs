//! The scripted workspace and the raw client, tried on each other without the program between them.

use crate::support::client::{Client, End, Piece, Request, ask};
use crate::support::fixtures;
use crate::support::gate::Gate;
use crate::support::reply::Reply;
use crate::support::sse;
use crate::support::upstream::{DeadAddress, Upstream};

#[test]
fn a_request_is_recorded_as_it_was_sent() {
    let upstream = Upstream::start();
    let request = Request::message().with("X-Twice", "one").with("x-twice", "two");
    let answer = ask(upstream.address(), &request);
    assert_eq!((answer.status(), answer.end), (200, End::Complete));
    assert_eq!(answer.body, fixtures::message_json());
    let recorded = &upstream.wait_requests(1)[0];
    assert_eq!(recorded.request_line(), "POST /v1/messages?beta=true HTTP/1.1");
    assert_eq!(recorded.all("x-twice"), ["one", "two"]);
    assert_eq!(recorded.json()["model"], "claude-sonnet-4-5");
}

#[test]
fn a_chunked_request_body_is_put_together() {
    let upstream = Upstream::start();
    ask(upstream.address(), &Request::message().chunked(7));
    assert_eq!(upstream.wait_requests(1)[0].json()["messages"][0]["content"], "hello");
}

#[test]
fn one_connection_serves_many_requests() {
    let upstream = Upstream::start();
    let mut client = Client::connect(upstream.address());
    assert_eq!(client.ask(&Request::message()).end, End::Complete);
    assert_eq!(client.ask(&Request::stream()).body, fixtures::transcript("text"));
    assert_eq!(upstream.connections(), 1);
}

#[test]
fn a_gate_holds_the_rest_of_a_stream_back() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::sse().part("first").wait(&gate).part("second")]);
    let mut client = Client::connect(upstream.address());
    client.send(&Request::stream());
    assert_eq!(client.head().status, 200);
    assert_eq!(client.next_piece(), Piece::Data(b"first".to_vec()));
    gate.open();
    assert_eq!(client.next_piece(), Piece::Data(b"second".to_vec()));
    assert_eq!(client.next_piece(), Piece::End(End::Complete));
}

#[test]
fn the_ways_an_answer_breaks_are_told_apart() {
    let cases = [
        (Reply::sse().part("half").close(), End::Closed),
        (Reply::sse().part("half").reset(), End::Reset),
        (Reply::json(200, "half").declaring(100).close(), End::Closed),
        (Reply::page(200, "text/plain", "half").until_close(), End::Complete),
        (Reply::page(200, "text/plain", "half").then_close(), End::Complete),
    ];
    for (reply, expected) in cases {
        let upstream = Upstream::script([reply]);
        let answer = ask(upstream.address(), &Request::message());
        assert_eq!((answer.text().as_str(), answer.end), ("half", expected));
    }
    for (reply, expected) in [(Reply::hang_up(), End::Closed), (Reply::reset_at_once(), End::Reset)] {
        let upstream = Upstream::script([reply]);
        let mut client = Client::connect(upstream.address());
        client.send(&Request::message());
        assert_eq!(client.try_head().err(), Some(expected));
    }
}

#[test]
fn a_client_that_leaves_is_noticed_while_the_reply_waits() {
    let upstream = Upstream::script([Reply::silence(), Reply::sse().part("half").stall()]);
    let mut first = Client::connect(upstream.address());
    first.send(&Request::message());
    upstream.wait_requests(1);
    drop(first);
    upstream.wait_client_gone(1);
    let mut second = Client::connect(upstream.address());
    second.send(&Request::message());
    second.head();
    second.reset();
    upstream.wait_client_gone(2);
    upstream.wait_open_connections(0);
}

#[test]
fn a_stream_is_split_into_events_without_losing_a_byte() {
    for name in fixtures::transcripts() {
        let stream = fixtures::transcript(&name);
        assert_eq!(sse::split(&stream).concat(), stream, "{name}");
    }
    let names = sse::names(&sse::message("msg_1", "text"));
    let expected =
        "message_start content_block_start content_block_delta content_block_stop message_delta message_stop";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn a_dead_address_refuses_connections() {
    let dead = DeadAddress::new();
    assert!(std::net::TcpStream::connect(dead.address()).is_err());
}
