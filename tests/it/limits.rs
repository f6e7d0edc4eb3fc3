//! Limits: deadlines of the client's side, the queue, connections, descriptors. Reaching one is told, and harms
//! nobody else.

use std::time::Duration;

use crate::support::client::{Answer, Client, End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{DEADLINE, Stopwatch, eventually, fixtures, sse};

/// The program lives, takes new connections, and still relays.
fn expect_unharmed(proxy: &Proxy) {
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
    proxy.wait_idle();
}

/// The head of a message request that announces so many bytes.
fn head_announcing(bytes: usize) -> Vec<u8> {
    format!("POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: {bytes}\r\n\r\n")
        .into_bytes()
}

/// Small bodies kept to the deadline of heads, and whatever `timeouts.body` said was not for them.
#[test]
fn a_body_that_stops_coming_is_given_up_at_its_deadline() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("timeouts.body", 0.3).set("timeouts.head", 600).start();
    for announced in [200, 30_000] {
        let mut client = proxy.connect();
        client.send_bytes(&head_announcing(announced));
        client.send_bytes(br#"{"model":"claude-"#);
        client.answer().refusal(408);
    }
    assert_eq!(upstream.count(), 0);
    expect_unharmed(&proxy);
}

#[test]
fn slow_bodies_hold_no_worker() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 2).start();
    let slow: Vec<Client> = [200, 900, 5_000, 30_000, 100_000, 500_000]
        .iter()
        .map(|announced| {
            let mut client = proxy.connect();
            client.send_bytes(&head_announcing(*announced));
            client.send_bytes(br#"{"model":"#);
            client
        })
        .collect();
    expect_unharmed(&proxy);
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    drop(slow);
    expect_unharmed(&proxy);
}

#[test]
fn half_a_head_is_given_up_at_its_deadline() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("timeouts.head", 0.3).start();
    let watch = Stopwatch::start();
    for half in ["G", "GET /health HTTP/1.1\r\nHost: x\r\n", "POST /v1/messages HTTP/1.1\r\nContent-Le"] {
        let mut client = proxy.connect();
        client.send_bytes(half.as_bytes());
        client.answer().refusal(408);
        assert!(client.try_head().is_err(), "{half:?}: the connection stayed open");
    }
    assert!(watch.elapsed() >= Duration::from_millis(800), "each had its time");
    expect_unharmed(&proxy);
}

/// The deadline is one for the whole head: a byte now and then does not move it.
#[test]
fn a_dripping_head_is_given_up_too() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("timeouts.head", 0.4).start();
    let mut client = proxy.connect();
    for byte in b"GET /health HTTP/1.1\r\nX-Drip: ".iter().chain([b'y'; 10_000].iter()) {
        client.send_if_taken(&[*byte]);
        Gate::closed().passed_within(Duration::from_millis(10));
        if client.has_input() {
            break;
        }
    }
    client.answer().refusal(408);
}

#[test]
fn an_idle_connection_ends_at_its_limit_without_a_word() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("timeouts.keep_alive", 0.3).start();
    let mut client = proxy.connect();
    assert_eq!(client.ask(&Request::get("/health")).status(), 200);
    assert_eq!(client.expect_closed(), End::Closed);
}

/// One stream in the only worker, one message in a queue of one; whoever comes later is told at once.
#[test]
fn a_full_queue_is_a_529_at_once() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::stream(sse::message("msg_1", "held")).after(&gate)]);
    let setup = Proxy::with(&[&upstream]).set("server.workers", 1).set("server.queue", 1);
    let proxy = setup.set("server.queue_timeout", 600).start();
    let mut held = proxy.connect();
    held.send(&Request::stream());
    upstream.wait_requests(1);
    let (sender, answers) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..5 {
            let (proxy, sender) = (&proxy, sender.clone());
            scope.spawn(move || sender.send(proxy.ask(&Request::message())));
        }
        for _ in 0..4 {
            let answer: Answer = answers.recv_timeout(DEADLINE).expect("a 529 at once");
            answer.error(529, "overloaded_error");
        }
        assert_eq!(upstream.count(), 1, "none of them reached a workspace");
        gate.open();
        let queued = answers.recv_timeout(DEADLINE).expect("the queued one is served");
        assert_eq!(queued.status(), 200);
    });
    assert_eq!(held.answer().end, End::Complete);
    assert_eq!(proxy.number("w1", "total_errors"), 0, "our own limits blame nobody");
    expect_unharmed(&proxy);
}

#[test]
fn waiting_longer_than_queue_timeout_is_a_529() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::stream(sse::message("msg_1", "held")).after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 1).set("server.queue_timeout", 0.3).start();
    let mut held = proxy.connect();
    held.send(&Request::stream());
    upstream.wait_requests(1);
    let watch = Stopwatch::start();
    proxy.ask(&Request::message()).error(529, "overloaded_error");
    assert!(watch.elapsed() >= Duration::from_millis(250), "{:?}", watch.elapsed());
    gate.open();
    assert_eq!(held.answer().end, End::Complete);
    assert_eq!(upstream.count(), 1);
    expect_unharmed(&proxy);
}

/// Behind sixteen slow uploads the seventeenth waited in a queue that nobody looked into, for as long as they took.
#[test]
fn waiting_for_a_reader_ends_at_queue_timeout_too() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("server.queue_timeout", 0.3).start();
    let slow = || {
        let mut client = proxy.connect();
        let head = "POST /v1/messages/count_tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n{";
        client.send_bytes(head.as_bytes());
        client
    };
    let held: Vec<Client> = (0..16).map(|_| slow()).collect();
    slow().answer().error(529, "overloaded_error");
    drop(held);
    expect_unharmed(&proxy);
}

#[test]
fn refusals_do_not_wait_for_a_worker() {
    let gate = Gate::closed();
    let upstream = Upstream::script([Reply::message().after(&gate)]);
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 1).start();
    let mut held = proxy.connect();
    held.send(&Request::message());
    upstream.wait_requests(1);
    proxy.ask(&Request::message().without("x-api-key")).error(401, "authentication_error");
    proxy.ask(&Request::get("/v1/messages")).error(405, "invalid_request_error");
    let mut large = proxy.connect();
    large.send_bytes(&head_announcing(900_000_000));
    large.answer().error(413, "request_too_large");
    gate.open();
    assert_eq!(held.answer().status(), 200);
}

/// Idle connections may have to go to make room; those at work may not.
#[test]
fn more_connections_than_allowed_harm_nobody_at_work() {
    let gate = Gate::closed();
    let upstream = Upstream::always(Reply::stream(sse::message("msg_1", "held")).after(&gate));
    let proxy = Proxy::with(&[&upstream]).set("server.max_connections", 4).start();
    let mut working: Vec<Client> = (0..3).map(|_| proxy.connect()).collect();
    for client in &mut working {
        client.send(&Request::stream());
    }
    upstream.wait_requests(3);
    let crowd: Vec<Client> = (0..20).map(|_| proxy.connect()).collect();
    drop(crowd);
    eventually("room for a new connection", || {
        let mut client = proxy.connect();
        client.send_if_taken(&Request::get("/health").bytes());
        client.try_head().is_ok_and(|head| head.status == 200).then_some(())
    });
    gate.open();
    for client in &mut working {
        let answer = client.answer();
        assert_eq!((answer.body, answer.end), (sse::message("msg_1", "held"), End::Complete));
    }
}

/// As soon as the last place was taken the longest idle client had to go, although nobody was waiting.
#[test]
fn at_the_limit_nobody_goes_before_another_comes() {
    let proxy = Proxy::with(&[&Upstream::start()]).set("server.max_connections", 4).start();
    let mut clients: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
    for _ in 0..3 {
        for client in &mut clients {
            assert_eq!(client.ask(&Request::get("/health")).status(), 200);
        }
    }
    let mut fifth = proxy.connect();
    assert_eq!(fifth.ask(&Request::get("/health")).status(), 200, "an idle one makes room");
    eventually("one of the idle to go", || clients.iter().any(Client::has_input).then_some(()));
    let gone = clients.iter_mut().filter(|client| client.has_input());
    assert_eq!(gone.map(Client::expect_closed).collect::<Vec<_>>(), [End::Closed]);
}

/// A shortage of descriptors ended accepting for good, and could even panic: the accept thread was gone and nobody
/// was told.
#[test]
fn running_out_of_descriptors_is_survived() {
    let upstream = Upstream::start();
    let setup = Proxy::with(&[&upstream]).set("server.workers", 2).descriptors(72);
    let mut proxy = setup.start();
    let crowd: Vec<Client> = (0..150).map(|_| proxy.connect()).collect();
    for client in crowd {
        drop(client);
    }
    eventually("service after the shortage", || {
        let mut client = proxy.connect();
        client.send_if_taken(&Request::get("/health").bytes());
        client.try_head().is_ok_and(|head| head.status == 200).then_some(())
    });
    assert!(proxy.running.is_alive());
    expect_unharmed(&proxy);
}

/// Gone before it was accepted: that is no shortage of descriptors, and no reason to end a neighbour.
#[test]
fn clients_that_reset_at_once_harm_nobody() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    let mut neighbours: Vec<Client> = (0..8).map(|_| proxy.connect()).collect();
    for _ in 0..100 {
        proxy.connect().reset();
    }
    for neighbour in &mut neighbours {
        assert_eq!(neighbour.ask(&Request::message()).status(), 200);
    }
    let lines = proxy.running.err.all();
    assert!(!lines.iter().any(|line| line.contains("ERROR")), "{lines:?}");
}
