//! Requests that follow one another at once on a connection: a worker may stay for the next, and nobody can tell.

use crate::support::client::{Client, End, Request};
use crate::support::fixtures;
use crate::support::proxy::Proxy;
use crate::support::upstream::Upstream;
use crate::support::{eventually, together};

fn expect_messages(client: &mut Client, count: usize) {
    for _ in 0..count {
        let answer = client.ask(&Request::message());
        assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
    }
}

/// Whatever may come on a connection comes right behind a row of messages.
#[test]
fn anything_may_follow_a_row_of_messages() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    expect_messages(&mut client, 3);
    assert_eq!(client.ask(&Request::get("/health")).status(), 200);
    expect_messages(&mut client, 3);
    client.ask(&Request::message().without("x-api-key")).error(401, "authentication_error");
    expect_messages(&mut client, 3);
    assert_eq!(client.ask(&Request::message().chunked(100)).status(), 200);
    expect_messages(&mut client, 3);
    let large = fixtures::captured_named("large-tool-result-turn");
    assert_eq!(client.ask(&Request::captured(&large)).status(), 200);
    expect_messages(&mut client, 3);
    let whole = Request::message().bytes();
    for cut in [1, 20, whole.len() / 2, whole.len() - 1] {
        client.send_bytes(&whole[..cut]);
        client.send_bytes(&whole[cut..]);
        assert_eq!(client.answer().status(), 200, "cut at {cut}");
        expect_messages(&mut client, 2);
    }
    client.send_bytes(b"nonsense\r\n\r\n");
    client.answer().error(400, "invalid_request_error");
    assert_eq!(client.expect_closed(), End::Closed);
    proxy.wait_idle();
}

/// More connections than workers: one that stays with its client keeps nobody waiting who has asked.
#[test]
fn rows_on_more_connections_than_workers_are_all_answered() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 4).start();
    together(12, |_| expect_messages(&mut proxy.connect(), 25));
    assert_eq!(upstream.count(), 12 * 25);
    proxy.wait_idle();
}

/// A client that leaves in the middle of a row, or sends half a request, costs nothing but its connection.
#[test]
fn a_row_may_end_anywhere() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    for rest in [&b""[..], b"POST /v1/mess", b"POST /v1/messages HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"] {
        let mut client = proxy.connect();
        expect_messages(&mut client, 4);
        client.send_bytes(rest);
        drop(client);
    }
    expect_messages(&mut proxy.connect(), 1);
    let connections = || proxy.stats()["process"]["connections"].as_u64();
    // The one that asks.
    eventually("the connections to end", || (connections() == Some(1)).then_some(()));
    proxy.wait_idle();
}
