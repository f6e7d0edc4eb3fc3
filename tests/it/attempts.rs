//! How often, how soon and whom: the attempts of one request, and the pooled connection that went stale.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::client::{Answer, End, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{DEADLINE, Stopwatch, eventually, fixtures, together};

fn plain_and_streaming(work: impl Fn(&Request) + Sync) {
    together(2, |index| work(&if index == 0 { Request::message() } else { Request::stream() }));
}

fn one_strike(upstreams: &[&Upstream]) -> Setup {
    Proxy::with(upstreams).in_order().set("load_balancer.circuit_breaker_threshold", 1)
}

fn expect_healthy(answer: &Answer) {
    assert_eq!((answer.status(), answer.end), (200, End::Complete), "{}", answer.text());
    assert!(answer.body == fixtures::message_json() || answer.body == fixtures::transcript("text"));
}

/// The predecessor excluded only the last failure and asked A, B, A instead of A, B, C (O16); its fork excluded
/// nobody (F2).
#[test]
fn no_endpoint_is_asked_twice_while_another_is_untried() {
    let failing: Vec<Upstream> =
        (0..4).map(|_| Upstream::always(Reply::error(500, "anthropic-500.json"))).collect();
    let proxy = Proxy::with(&failing.iter().take(3).collect::<Vec<_>>()).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.header("x-claude-lb-attempts")), (500, Some("3")));
    assert_eq!(failing.iter().map(Upstream::count).collect::<Vec<_>>(), [1, 1, 1, 0]);
}

#[test]
fn max_attempts_is_a_limit() {
    let failing: Vec<Upstream> =
        (0..4).map(|_| Upstream::always(Reply::error(500, "anthropic-500.json"))).collect();
    let setup = Proxy::with(&failing.iter().collect::<Vec<_>>());
    let proxy = setup.set("load_balancer.max_attempts", 2).start();
    assert_eq!(proxy.ask(&Request::message()).header("x-claude-lb-attempts"), Some("2"));
    assert_eq!(failing.iter().map(Upstream::count).sum::<usize>(), 2);
}

/// The predecessors slept 1 + 2 + 4 s even when an idle workspace stood by (O7). Ten failovers in the time of the
/// shortest of those sleeps leave no room for any.
#[test]
fn another_endpoint_is_asked_without_a_pause() {
    let failing = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let healthy = Upstream::start();
    let setup = Proxy::with(&[&failing, &healthy]).in_order();
    let proxy = setup.set("load_balancer.circuit_breaker_threshold", 1_000).start();
    let watch = Stopwatch::start();
    for _ in 0..10 {
        assert_eq!(proxy.ask_who(&Request::message()), "w2");
    }
    assert!(watch.elapsed() < Duration::from_secs(3), "{:?}", watch.elapsed());
    assert_eq!(failing.count(), 10);
}

#[test]
fn a_sole_endpoint_is_asked_once_more_after_a_pause() {
    plain_and_streaming(|request| {
        let upstream = Upstream::script([Reply::error(500, "anthropic-500.json")]);
        let proxy = Proxy::with(&[&upstream]).start();
        let watch = Stopwatch::start();
        let answer = proxy.ask(request);
        expect_healthy(&answer);
        assert_eq!(answer.header("x-claude-lb-attempts"), Some("2"));
        assert!(watch.elapsed() >= Duration::from_millis(290), "{:?}", watch.elapsed());
    });
}

#[test]
fn a_sole_endpoint_is_not_asked_a_third_time() {
    let upstream = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let proxy = Proxy::with(&[&upstream]).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 500);
    assert_eq!(upstream.count(), 2);
}

/// The server may close a pooled connection at any moment; that says nothing about its health.
#[test]
fn a_stale_pooled_connection_is_replaced_without_blame() {
    for stale in [Reply::hang_up(), Reply::reset_at_once()] {
        plain_and_streaming(|request| {
            let upstream = Upstream::script([Reply::message(), stale.clone()]);
            let proxy = one_strike(&[&upstream]).start();
            expect_healthy(&proxy.ask(&Request::message()));
            expect_healthy(&proxy.ask(request));
            let connections: Vec<usize> =
                upstream.requests().iter().map(|request| request.connection).collect();
            assert_eq!(connections, [0, 0, 1]);
            proxy.wait_idle();
            assert!(!proxy.is_open("w1"));
            assert_eq!(proxy.number("w1", "total_errors"), 0);
        });
    }
}

#[test]
fn a_connection_that_went_stale_while_idle_is_replaced_without_blame() {
    let upstream = Upstream::script([Reply::message().then_close()]);
    let proxy = one_strike(&[&upstream]).start();
    expect_healthy(&proxy.ask(&Request::message()));
    upstream.wait_open_connections(0);
    expect_healthy(&proxy.ask(&Request::message()));
    assert_eq!((upstream.count(), upstream.connections()), (2, 2));
    assert_eq!(proxy.number("w1", "total_errors"), 0);
}

#[test]
fn a_server_that_hangs_up_on_the_fresh_connection_too_is_to_blame() {
    let failing = Upstream::script([Reply::message()]);
    failing.answer(|_| Reply::hang_up());
    let healthy = Upstream::start();
    let proxy = one_strike(&[&failing, &healthy]).start();
    assert_eq!(proxy.ask_who(&Request::message()), "w1");
    assert_eq!(proxy.ask_who(&Request::message()), "w2");
    assert_eq!(failing.count(), 3);
    eventually("the circuit to open", || proxy.is_open("w1").then_some(()));
}

/// The first failure opened its circuit, so nothing will be asked again, and there is nothing to pause for.
#[test]
fn a_sole_endpoint_that_is_out_is_not_waited_for() {
    let upstream = Upstream::always(Reply::error(500, "anthropic-500.json"));
    let proxy = one_strike(&[&upstream]).start();
    let watch = Stopwatch::start();
    for made in 1..=10 {
        assert_eq!(proxy.ask(&Request::message()).status(), 500);
        assert_eq!(upstream.count(), made);
        proxy.ask(&Request::new("POST", "/reset"));
    }
    assert!(watch.elapsed() < Duration::from_secs(3), "{:?}", watch.elapsed());
}

/// When every workspace fails, retries must not double the load: to endpoints whose last result was bad they stay
/// within a fifth of what is in flight.
#[test]
fn a_storm_of_failures_is_not_doubled() {
    const CLIENTS: usize = 40;
    let (first_wave, retries) = (Gate::closed(), Gate::closed());
    let asked = Arc::new(AtomicUsize::new(0));
    let failing = || {
        let (upstream, asked) = (Upstream::start(), asked.clone());
        let (first_wave, retries) = (first_wave.clone(), retries.clone());
        upstream.answer(move |_| {
            let failure = Reply::error(500, "anthropic-500.json");
            match asked.fetch_add(1, Ordering::SeqCst) {
                0..2 => failure,
                number if number < 2 + CLIENTS => failure.after(&first_wave),
                _ => failure.after(&retries),
            }
        });
        upstream
    };
    let (first, second) = (failing(), failing());
    let setup = Proxy::with(&[&first, &second]).set("server.workers", CLIENTS);
    let proxy = setup.set("load_balancer.circuit_breaker_threshold", 1_000).start();
    assert_eq!(proxy.ask(&Request::message()).header("x-claude-lb-attempts"), Some("2"), "both are bad now");
    let (sender, answers) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            let (proxy, sender) = (&proxy, sender.clone());
            scope.spawn(move || sender.send(proxy.ask(&Request::message())));
        }
        eventually("all to be in flight", || (asked.load(Ordering::SeqCst) == 2 + CLIENTS).then_some(()));
        first_wave.open();
        for _ in 0..CLIENTS - CLIENTS / 5 {
            let answer: Answer = answers.recv_timeout(DEADLINE).expect("most are told without a retry");
            assert_eq!((answer.status(), answer.header("x-claude-lb-attempts")), (500, Some("1")));
        }
        assert!(asked.load(Ordering::SeqCst) <= 2 + CLIENTS + CLIENTS / 5);
        retries.open();
    });
    proxy.wait_idle();
}

/// A gateway that limits its clients answers before it has read everything, and closes. Our sending failed, the
/// answer that lay ready was never looked at, and the client saw a 502 that also counted for the breaker.
#[test]
fn an_answer_before_the_end_of_the_request_is_heard() {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let listener = listener.expect("a descriptor for one more socket");
    listener.set_recv_buffer_size(4096).expect("a small buffer, so that sending has to wait");
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free loopback port");
    listener.listen(16).expect("a bound socket can listen");
    let listener = TcpListener::from(listener);
    let address = listener.local_addr().expect("a bound socket has an address");
    let hasty = std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok).take(8) {
            let body = fixtures::error_body("anthropic-400.json");
            let head = format!("HTTP/1.1 400 Early\r\ncontent-length: {}\r\n\r\n", body.len());
            socket.read_exact(&mut [0; 100]).expect("the beginning of a request");
            socket.write_all(&[head.as_bytes(), &body].concat()).expect("the proxy listens");
        }
    });
    let proxy = Proxy::with(&[]).and_endpoint_at(address).start();
    let long = "x".repeat(3_000_000);
    let request = Request::post_message(format!(
        r#"{{"model":"claude-sonnet-4-5","messages":[{{"role":"user","content":"{long}"}}],"max_tokens":1}}"#
    ));
    for _ in 0..8 {
        let answer = proxy.ask(&request);
        assert_eq!((answer.status(), answer.body), (400, fixtures::error_body("anthropic-400.json")));
    }
    assert_eq!(proxy.number("w1", "total_errors"), 0);
    hasty.join().expect("the hasty workspace has answered everybody");
}
