//! A machine that has run out of something: descriptors stand in `limits.rs`; here memory, threads, a place for the
//! log, names. What cannot be served is told at once, and what can be served is.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::client::{Client, End, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup};
use crate::support::reply::Reply;
use crate::support::rest::AtRest;
use crate::support::upstream::Upstream;
use crate::support::{DEADLINE, Stopwatch, eventually, fixtures, sse, together};

const MIB: usize = 1 << 20;

fn large_message(bytes: usize) -> Request {
    Request::post_message(format!(r#"{{"model":"claude-sonnet-4-5","x":"{}"}}"#, "y".repeat(bytes)))
}

/// Room for eight bodies of 4 MB and five times as many clients: the others are told so, and the memory is bounded.
#[test]
fn bodies_beyond_the_memory_for_them_are_a_529_at_once() {
    let gate = Gate::closed();
    let upstream = Upstream::always(Reply::message().after(&gate));
    let setup = Proxy::with(&[&upstream]).set("server.workers", 64);
    let proxy = setup.set("limits.max_buffered_bytes", 34 * MIB).start();
    let rest = AtRest::of(&proxy);
    let message = large_message(4 * MIB - 100);
    let mut held: Vec<Client> = Vec::new();
    for number in 1..=8 {
        let mut client = proxy.connect();
        client.send(&message);
        upstream.wait_requests(number);
        held.push(client);
    }
    let mut others: Vec<Client> = (0..32).map(|_| proxy.connect()).collect();
    std::thread::scope(|scope| {
        for client in &mut others {
            scope.spawn(|| client.send_if_taken(&message.bytes()));
        }
    });
    for client in &mut others {
        let message = client.answer().error(529, "overloaded_error");
        assert!(message.contains("max_buffered_bytes"), "{message}");
    }
    assert!(held.iter().all(|client| !client.has_input()));
    assert_eq!(upstream.count(), 8);
    assert!(rest.grown_bytes(&proxy) < 60 * MIB as u64, "{} MiB more", rest.grown_bytes(&proxy) / MIB as u64);
    // Requests that need no key have memory of their own, and small talk needs none.
    assert_eq!(proxy.ask(&count_tokens("hello")).status(), 200);
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    gate.open();
    for mut client in held {
        assert_eq!(client.answer().status(), 200);
    }
    rest.expect(&proxy);
    assert_eq!(proxy.ask(&message).status(), 200, "what was taken came back");
    assert_eq!(proxy.number("w1", "total_errors"), 0, "our own limits blame nobody");
}

fn count_tokens(text: &str) -> Request {
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#);
    Request::new("POST", "/v1/messages/count_tokens").body(body)
}

/// Two of them took all the memory that there was for requests without a key, and kept it for a minute.
#[test]
fn what_is_announced_and_never_sent_takes_no_room() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("limits.max_buffered_bytes", 8 * MIB).start();
    let announced = Request::new("POST", "/v1/messages/count_tokens")
        .with("content-length", &(4 * MIB).to_string())
        .with("expect", "100-continue");
    let mut silent: Vec<Client> = (0..15).map(|_| proxy.connect()).collect();
    for client in &mut silent {
        client.send_bytes(&announced.head_bytes());
        assert!(client.has_input_within(DEADLINE), "told to go on: somebody waits for the body");
    }
    assert_eq!(proxy.ask(&count_tokens(&"y".repeat(3 * MIB))).status(), 200);
}

/// Once content has gone out nobody can be asked again, and a stream may run for minutes.
#[test]
fn a_stream_that_has_begun_holds_its_body_no_more() {
    let gate = Gate::closed();
    let beginning = [sse::message_start("msg_1"), sse::block_start(), sse::delta("one")].concat();
    let upstream = Upstream::always(Reply::sse().part(beginning).wait(&gate).part(sse::ending()));
    let setup = Proxy::with(&[&upstream]).set("server.workers", 64);
    let proxy = setup.set("limits.max_buffered_bytes", 20 * MIB).start();
    let rest = AtRest::of(&proxy);
    let body =
        format!(r#"{{"model":"claude-sonnet-4-5","stream":true,"x":"{}"}}"#, "y".repeat(4 * MIB - 100));
    let message = Request::post_message(body);
    let mut running: Vec<Client> = Vec::new();
    for _ in 0..12 {
        let mut client = proxy.connect();
        client.send(&message);
        let (head, _) = client.head_and_body_until("one");
        assert_eq!(head.status, 200);
        running.push(client);
    }
    eventually("48 MB of bodies to be gone", || (rest.grown_bytes(&proxy) < 16 * MIB as u64).then_some(()));
    gate.open();
    for mut client in running {
        client.body_until("message_stop");
    }
    rest.expect(&proxy);
}

/// Ten times the bodies that fit under `ulimit -v`: a failed allocation would end the process.
#[test]
fn a_limit_on_memory_is_survived_at_ten_times_the_load() {
    let upstream = Upstream::always(Reply::message());
    let setup = Proxy::with(&[&upstream]).set("limits.max_buffered_bytes", 64 * MIB);
    let setup = setup.through_shell("ulimit -v 480000; exec \"$0\" \"$@\"");
    let mut proxy = setup.start();
    let message = large_message(4 * MIB - 100).bytes();
    for _ in 0..2 {
        let statuses = together(80, |_| {
            let mut client = proxy.connect();
            client.send_if_taken(&message);
            client.try_head().map(|head| head.status).ok()
        });
        for status in statuses {
            // A body that is refused unread may end in a reset before the client has read the answer.
            assert!(matches!(status, Some(200 | 529) | None), "{status:?}");
        }
        assert!(proxy.running.is_alive());
        assert_eq!(proxy.ask(&Request::message()).status(), 200);
    }
}

/// The program with no more threads than main, accept, watcher, and two more. The limit on a user's tasks does not bind
/// root, so the program runs as somebody else. Needs to be root for that.
fn with_five_threads(upstream: &Upstream, users_from: u32) -> Option<Setup> {
    let has = |tool| Path::new("/usr/bin").join(tool).exists();
    let can_become_another = rustix::process::geteuid().is_root() && has("setpriv") && has("prlimit");
    if !can_become_another {
        eprintln!("skipped: only root can start the program as another user");
        return None;
    }
    // A user that nobody is; each run of each test another one, for the limit counts all of a user's tasks.
    let user = users_from + std::process::id() % 100_000;
    let become_another =
        format!("exec setpriv --reuid={user} --regid={user} --clear-groups prlimit --nproc=5 \"$0\" \"$@\"");
    Some(Proxy::with(&[upstream]).through_shell(&become_another))
}

/// Its worker stayed with a client that asked again at once, for most workers seemed to have nothing to do: there was no
/// other one. Whoever else asked waited for `queue_timeout` and got 529.
#[test]
fn the_only_worker_stays_with_nobody_while_others_wait() {
    let upstream = Upstream::always(Reply::message());
    let Some(setup) = with_five_threads(&upstream, 700_000) else { return };
    let proxy = setup.start();
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200, "the other thread has its work");
    let is_over = AtomicBool::new(false);
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = proxy.connect();
            while !is_over.load(Ordering::SeqCst) {
                client.ask(&Request::message());
            }
        });
        upstream.wait_requests(10);
        let statuses = (0..3).map(|_| proxy.ask(&Request::message()).status()).collect();
        is_over.store(true, Ordering::SeqCst);
        statuses
    });
    assert_eq!(statuses, [200; 3]);
}

#[test]
fn threads_that_cannot_be_had_are_told_and_survived() {
    let upstream = Upstream::always(Reply::message());
    let Some(setup) = with_five_threads(&upstream, 500_000) else { return };
    let mut proxy = setup.set("server.queue_timeout", 0.5).start();
    let statuses = together(20, |_| proxy.ask(&Request::message()).status());
    assert!(statuses.iter().all(|status| matches!(status, 200 | 529)), "{statuses:?}");
    assert!(statuses.contains(&200), "the one worker serves: {statuses:?}");
    let line = proxy.wait_log("no thread for the");
    assert!(line.contains("raise the limit on tasks"), "{line}");
    // The last thread went to the small pool or to nobody: an answer or a refusal, but nothing waits unseen.
    let watch = Stopwatch::start();
    let health = proxy.ask(&Request::get("/health")).status();
    assert!(matches!(health, 200 | 529) && watch.elapsed() < Duration::from_secs(5), "{health}");
    assert!(proxy.running.is_alive());
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    let lines = proxy.running.err.all();
    let complaints = lines.iter().filter(|line| line.contains("no thread for the worker pool")).count();
    assert_eq!(complaints, 1, "once, not for every request: {lines:?}");
}

fn expect_serves(proxy: &mut Proxy) {
    for request in [Request::message(), Request::stream(), Request::get("/health")] {
        assert_eq!(proxy.ask(&request).status(), 200);
    }
    assert_eq!(proxy.ask(&Request::message().without("x-api-key")).status(), 401);
    proxy.wait_idle();
    assert!(proxy.running.is_alive());
}

/// The disk that holds the log is full, its reader is gone, or there never was one.
#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let lines = [
        "exec \"$0\" \"$@\" 2>/dev/full",
        "exec \"$0\" \"$@\" 2>&-",
        // A pipe whose reader has ended.
        "mkfifo log; true <log & exec \"$0\" \"$@\" 2>log",
    ];
    for (line, format) in lines.iter().zip(["text", "json", "text"]) {
        let upstream = Upstream::start();
        let setup = Proxy::with(&[&upstream]).set("logging.format", format).set("logging.level", "trace");
        expect_serves(&mut setup.through_shell(line).start());
    }
}

/// Nobody reads where it says that it listens.
#[test]
fn a_closed_stdout_stops_nothing() {
    let upstream = Upstream::start();
    for stdout in ["1>&-", "1>/dev/full"] {
        let port = free_port();
        let setup = Proxy::with(&[&upstream]).set("server.port", port);
        let mut proxy = setup
            .through_shell(&format!("echo listening on http://127.0.0.1:{port}; exec \"$0\" \"$@\" {stdout}"))
            .start();
        eventually("the port to open", || {
            std::net::TcpStream::connect(proxy.address()).is_ok().then_some(())
        });
        expect_serves(&mut proxy);
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
    listener.local_addr().expect("a bound socket has an address").port()
}

fn with_unknown_name(healthy: Option<&Upstream>) -> Setup {
    let nowhere = Upstream::start();
    let setup = Proxy::with(&[&nowhere]).endpoint(0, "api_base", "http://no-such-workspace.invalid:8080/x");
    let setup = healthy.iter().fold(setup, |setup, healthy| setup.and_endpoint_at(healthy.address()));
    setup.in_order().set("timeouts.connect", 2).set("load_balancer.max_attempts", 2)
}

/// Names cannot be looked up: the other workspace serves, and without one the client is told.
#[test]
fn a_name_without_an_address_is_a_failed_connection() {
    let healthy = Upstream::start();
    let proxy = with_unknown_name(Some(&healthy)).start();
    let answer = proxy.ask(&Request::message());
    assert_eq!((answer.status(), answer.header("x-claude-lb-endpoint")), (200, Some("w2")));
    assert_eq!(proxy.number("w1", "total_errors"), 1);
    let proxy = with_unknown_name(None).start();
    let message = proxy.ask(&Request::message()).error(502, "api_error");
    assert!(message.contains("cannot connect to w1"), "{message}");
    proxy.wait_idle();
}

/// Every worker streams, the queue is full, everything else goes on: the answer is there before any of them ends.
#[test]
fn saturation_is_answered_at_once_and_says_when_to_come_back() {
    let gate = Gate::closed();
    let held = Reply::sse().part(sse::message_start("msg_1")).wait(&gate).part(sse::block_start());
    let upstream = Upstream::always(held.part(sse::ending()));
    let setup = Proxy::with(&[&upstream]).set("server.workers", 4).set("server.queue", 0);
    let proxy = setup.set("server.queue_timeout", 600).start();
    let mut streams: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
    for stream in &mut streams {
        stream.send(&Request::stream());
        stream.head_and_body_until("message_start");
    }
    let answers = together(16, |place| {
        proxy.ask(&if place % 2 == 0 { Request::message() } else { large_message(100_000) })
    });
    for answer in answers {
        answer.error(529, "overloaded_error");
        assert_eq!(answer.number("retry-after"), Some(1));
    }
    assert_eq!(proxy.ask(&Request::get("/health/ready")).status(), 200);
    gate.open();
    for mut stream in streams {
        assert_eq!(stream.rest().1, End::Complete);
    }
    proxy.wait_idle();
    upstream.answer(|_| Reply::message());
    assert_eq!(proxy.ask(&Request::message()).body, fixtures::message_json());
}
