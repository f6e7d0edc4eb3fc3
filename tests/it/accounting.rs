//! Whatever a client does, the slot is given back exactly once, and the workspace is let go of.
//!
//! The predecessors leaked a slot at every disconnect and kept the upstream's connection (O4), until the pool was
//! full.

use crate::support::client::{Client, End, Request};
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, sse, together};

fn expect_released(proxy: &Proxy, upstream: &Upstream, abandoned: usize) {
    upstream.wait_client_gone(abandoned);
    proxy.wait_idle();
    assert_eq!(proxy.number("w1", "total_errors"), 0, "a client that leaves blames nobody");
    assert!(!proxy.is_open("w1"));
}

/// How the client goes: both must be noticed while nothing is being written.
fn leave(client: Client, how: usize) {
    match how {
        0 => drop(client),
        _ => client.reset(),
    }
}

fn one_strike(upstream: &Upstream) -> Proxy {
    Proxy::with(&[upstream]).set("load_balancer.circuit_breaker_threshold", 1).start()
}

#[test]
fn a_client_that_leaves_before_the_head_is_noticed() {
    let upstream = Upstream::always(Reply::silence());
    let proxy = one_strike(&upstream);
    let mut gone = 0;
    for request in [Request::stream(), Request::message()] {
        for how in 0..2 {
            let mut client = proxy.connect();
            client.send(&request);
            gone += 1;
            upstream.wait_requests(gone);
            assert_eq!(proxy.active(), 1);
            leave(client, how);
            expect_released(&proxy, &upstream, gone);
        }
    }
}

#[test]
fn a_client_that_leaves_after_the_head_is_noticed() {
    let upstream = Upstream::always(Reply::sse().part(sse::message_start("msg_1")).stall());
    let proxy = one_strike(&upstream);
    for how in 0..2 {
        let mut client = proxy.connect();
        client.send(&Request::stream());
        client.head_and_body_until("message_start");
        leave(client, how);
        expect_released(&proxy, &upstream, how + 1);
    }
}

#[test]
fn a_client_that_leaves_in_mid_stream_is_noticed() {
    let opening = [sse::message_start("msg_1"), sse::block_start(), sse::delta("some")].concat();
    let upstream = Upstream::always(Reply::sse().part(&opening).stall());
    let proxy = one_strike(&upstream);
    for how in 0..2 {
        let mut client = proxy.connect();
        client.send(&Request::stream());
        client.head();
        client.expect_body(&opening);
        leave(client, how);
        expect_released(&proxy, &upstream, how + 1);
    }
}

#[test]
fn a_client_that_leaves_while_a_stream_flows_is_noticed() {
    let upstream = Upstream::start();
    upstream.answer(|_| {
        let opening = Reply::sse().part(sse::message_start("msg_1")).part(sse::block_start());
        (0..20_000).fold(opening, |reply, _| reply.part(sse::delta("one of very many"))).stall()
    });
    let proxy = one_strike(&upstream);
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    client.body_until("one of very many");
    drop(client);
    expect_released(&proxy, &upstream, 1);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_json_answer_is_noticed() {
    let upstream = Upstream::always(Reply::json(200, r#"{"type":"message","#).declaring(100_000).stall());
    let proxy = one_strike(&upstream);
    let mut client = proxy.connect();
    client.send(&Request::message());
    upstream.wait_requests(1);
    drop(client);
    expect_released(&proxy, &upstream, 1);
}

#[test]
fn a_client_that_leaves_while_it_waits_in_the_queue_costs_no_attempt() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::message().after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 1).start();
    let mut held = proxy.connect();
    held.send(&Request::message());
    upstream.wait_requests(1);
    let mut waiting = proxy.connect();
    waiting.send(&Request::message());
    drop(waiting);
    gate.open();
    assert_eq!(held.answer().status(), 200);
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    proxy.wait_idle();
    assert_eq!(proxy.number("w1", "total_errors"), 0);
}

/// A client that never sends, or sends half a body, and leaves.
#[test]
fn a_client_that_leaves_before_its_request_is_whole_leaves_no_trace() {
    let upstream = Upstream::start();
    let proxy = one_strike(&upstream);
    let bytes =
        Request::post_message(format!(r#"{{"model":"claude-sonnet-4-5","x":"{}"}}"#, "y".repeat(5_000)))
            .bytes();
    for cut in [0, 1, 40, 100, 300, 1_000, bytes.len() - 1] {
        for how in 0..2 {
            let mut client = proxy.connect();
            client.send_bytes(&bytes[..cut]);
            leave(client, how);
        }
    }
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    proxy.wait_idle();
    assert_eq!((upstream.count(), proxy.number("w1", "total_requests")), (1, 1));
}

/// Drop the client behind every event of a stream: each time exactly one slot comes back.
#[test]
fn a_client_that_leaves_behind_any_event_gives_its_slot_back() {
    let stream = sse::message("msg_1", "text");
    let events: Vec<Vec<u8>> = sse::split(&stream).into_iter().map(<[u8]>::to_vec).collect();
    let upstream = Upstream::start();
    let proxy = one_strike(&upstream);
    for made in 1..events.len() {
        upstream.queue([Reply::sse().part(events[..made].concat()).stall()]);
        let mut client = proxy.connect();
        client.send(&Request::stream());
        client.head();
        client.expect_body(&events[..made].concat());
        drop(client);
        expect_released(&proxy, &upstream, made);
    }
}

#[test]
fn many_clients_leaving_at_random_leave_nothing_behind() {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let upstream = Upstream::start();
    upstream.answer(|request| {
        let is_stalled = request.body.len() % 2 == 0;
        let reply =
            Reply::sse().part(sse::message_start("msg_1")).part(sse::block_start()).part(sse::delta("x"));
        if is_stalled { reply.stall() } else { reply.part(sse::ending()) }
    });
    let proxy = Proxy::with(&[&upstream]).start();
    together(8, |thread| {
        let mut rng = fastrand::Rng::with_seed(seed ^ thread as u64);
        for _ in 0..15 {
            let padding = "y".repeat(rng.usize(..2_000));
            let body = format!(r#"{{"model":"claude-sonnet-4-5","stream":true,"x":"{padding}"}}"#);
            let bytes = Request::post_message(body).bytes();
            let mut client = proxy.connect();
            match rng.u8(..4) {
                0 => client.send_bytes(&bytes[..rng.usize(..bytes.len())]),
                1 => client.send_bytes(&bytes),
                2 => {
                    client.send_bytes(&bytes);
                    client.head();
                }
                _ => {
                    client.send_bytes(&bytes);
                    client.head_and_body_until("content_block_delta");
                }
            }
            leave(client, rng.usize(..2));
        }
    });
    proxy.wait_idle();
    assert_eq!(proxy.number("w1", "total_errors"), 0);
    upstream.answer(|_| Reply::stream(sse::message("msg_1", "still here")));
    assert_eq!(proxy.ask(&Request::stream()).end, End::Complete);
}

#[test]
fn active_requests_are_counted_while_they_last() {
    let gate = Gate::closed();
    let upstream = Upstream::start();
    let held = gate.clone();
    upstream.answer(move |_| Reply::message().after(&held));
    let proxy = Proxy::with(&[&upstream]).start();
    let mut clients: Vec<Client> = (0..3).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(&Request::message());
    }
    upstream.wait_requests(3);
    assert_eq!(proxy.number("w1", "active_requests"), 3);
    gate.open();
    for client in &mut clients {
        assert_eq!(client.answer().status(), 200);
    }
    proxy.wait_idle();
    assert_eq!(proxy.number("w1", "total_requests"), 3);
}

#[test]
fn failures_of_every_kind_give_their_slot_back() {
    let replies = [
        Reply::hang_up(),
        Reply::reset_at_once(),
        Reply::garbage("nonsense\r\n\r\n"),
        Reply::error(500, "anthropic-500.json"),
        Reply::error(503, "databricks-503.html"),
        Reply::error(400, "anthropic-400.json"),
        Reply::json(200, "not json at all"),
        Reply::page(200, "text/html", "<html>"),
        Reply::sse().part("event: message_start\n").close(),
        Reply::sse().part("garbage instead of events"),
        Reply::garbage("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnot-a-size\r\n"),
        Reply::garbage("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"),
    ];
    for request in [Request::message(), Request::stream()] {
        let upstream = Upstream::start();
        let setup = Proxy::with(&[&upstream]).set("load_balancer.circuit_breaker_threshold", 1_000);
        let proxy = setup.set("load_balancer.max_attempts", 1).start();
        for reply in &replies {
            upstream.queue([reply.clone()]);
            let mut client = proxy.connect();
            client.send(&request);
            if client.try_head().is_ok() {
                client.rest();
            }
        }
        proxy.wait_idle();
        eventually("every attempt to be counted", || {
            (proxy.number("w1", "total_requests") as usize >= replies.len()).then_some(())
        });
    }
}
