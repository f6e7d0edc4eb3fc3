//! What has arrived goes on at once. Proved by order: the upstream is not let on before the client has read.

use crate::support::client::{Client, End, Piece, Request};
use crate::support::fixtures;
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{sse, together};

#[test]
fn the_first_event_arrives_before_the_upstream_sends_its_second() {
    let gate = Gate::closed();
    let (first, rest) =
        (sse::message_start("msg_1"), [sse::block_start(), sse::delta("a"), sse::ending()].concat());
    let upstream = Upstream::script([Reply::sse().part(&first).wait(&gate).part(&rest)]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    assert_eq!(client.head().status, 200);
    client.expect_body(&first);
    gate.open();
    assert_eq!(client.rest(), (rest, End::Complete));
}

#[test]
fn the_head_and_the_first_event_come_in_one_write() {
    let gate = Gate::closed();
    let first = sse::message_start("msg_1");
    let upstream = Upstream::script([Reply::sse().part(&first).wait(&gate).part(sse::ending())]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    let together = client.read_once();
    assert!(together.starts_with(b"HTTP/1.1 200"));
    assert!(memchr::memmem::find(&together, &first).is_some(), "{:?}", String::from_utf8_lossy(&together));
    gate.open();
}

#[test]
fn every_chunk_goes_on_before_the_next_one_exists() {
    let stream = fixtures::transcript("tool_use");
    let gates: Vec<Gate> = sse::split(&stream).iter().map(|_| Gate::closed()).collect();
    let script = sse::split(&stream).into_iter().zip(&gates);
    let reply = script.fold(Reply::sse(), |reply, (event, gate)| reply.part(event).wait(gate));
    let upstream = Upstream::script([reply]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    for (event, gate) in sse::split(&stream).into_iter().zip(&gates) {
        client.expect_body(event);
        gate.open();
    }
    assert_eq!(client.next_piece(), Piece::End(End::Complete));
}

#[test]
fn after_content_even_half_an_event_goes_on_at_once() {
    let opening = [sse::message_start("msg_1"), sse::block_start()].concat();
    let text = sse::delta("a sentence that arrives in pieces");
    let mut parts: Vec<&[u8]> = vec![&opening];
    parts.extend(text.chunks(13));
    let gates: Vec<Gate> = parts.iter().map(|_| Gate::closed()).collect();
    let script = parts.iter().zip(&gates);
    let reply = script.fold(Reply::sse(), |reply, (part, gate)| reply.part(part).wait(gate));
    let upstream = Upstream::script([reply.part(sse::ending())]);
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    for (part, gate) in parts.iter().zip(&gates) {
        client.expect_body(part);
        gate.open();
    }
    assert_eq!(client.rest(), (sse::ending(), End::Complete));
}

#[test]
fn health_answers_while_every_worker_streams() {
    let gate = Gate::closed();
    let held = Reply::sse()
        .part(sse::message_start("msg_1"))
        .wait(&gate)
        .part(sse::block_start())
        .part(sse::ending());
    let upstream = Upstream::always(held);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 2).start();
    let mut streams: Vec<Client> = (0..2).map(|_| proxy.connect()).collect();
    for stream in &mut streams {
        stream.send(&Request::stream());
        stream.head();
    }
    for route in ["/health", "/health/live", "/health/ready", "/stats"] {
        assert_eq!(proxy.ask(&Request::get(route)).status(), 200, "{route}");
    }
    assert_eq!(proxy.ask(&Request::get("/no/such/route")).status(), 404);
    gate.open();
    for stream in &mut streams {
        assert_eq!(stream.rest().1, End::Complete);
    }
}

/// A task pool that trusts a count of idle threads left 4 of 8, 12 of 16 and 60 of 64 new connections waiting for
/// as long as the others stayed open.
#[test]
fn a_burst_of_new_keep_alive_connections_is_answered_in_full() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for burst in [16, 64] {
        let mut clients: Vec<Client> = (0..burst).map(|_| proxy.connect()).collect();
        for client in &mut clients {
            client.send(&Request::get("/health"));
        }
        for client in &mut clients {
            assert_eq!(client.answer().status(), 200);
        }
        for client in &mut clients {
            client.send(&Request::message());
        }
        for client in &mut clients {
            assert_eq!(client.answer().body, fixtures::message_json());
        }
    }
    proxy.wait_idle();
}

#[test]
fn one_connection_takes_one_request_after_the_other() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    together(4, |_| {
        let mut client = proxy.connect();
        for _ in 0..5 {
            assert_eq!(client.ask(&Request::message()).body, fixtures::message_json());
            assert_eq!(client.ask(&Request::stream()).body, fixtures::transcript("text"));
            assert_eq!(client.ask(&Request::get("/health")).status(), 200);
        }
    });
    assert_eq!(proxy.number("w1", "total_requests"), 40);
}

#[test]
fn the_upstream_connection_is_kept_for_the_next_request() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    for request in [Request::message(), Request::stream(), Request::message(), Request::stream()] {
        assert_eq!(proxy.ask(&request).status(), 200);
    }
    assert_eq!(upstream.connections(), 1);
}
