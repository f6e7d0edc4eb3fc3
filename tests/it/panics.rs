//! A fault of ours costs one request: the client is told if nothing was sent, the connection breaks if something was,
//! the worker lives, and the log gets one loud line without content.
//!
//! The program itself has no panic to offer, so this runs the clients' side as a library, with a service that does.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use claude_lb::config::{LogFormat, Logging};
use claude_lb::front::{Body, Ending, Exchange, Front, Pool, Route, Service, Settings};
use claude_lb::http::answer::{Answer, Refusal};
use claude_lb::http::head::Head;

use crate::support::client::{Client, Request};
use crate::support::{DEADLINE, eventually};

/// Panics on demand.
#[derive(Default)]
struct Faulty {
    panicked: AtomicUsize,
    given_up: AtomicUsize,
}

impl Service for Faulty {
    fn route(&self, head: &Head) -> Result<Route, Refusal> {
        assert!(head.path() != "/panic-in-the-watcher", "a fault of the watcher");
        Ok(Route { pool: Pool::Messages, key: None, body_bytes_max: 1 << 20 })
    }

    fn refuse(&self, refusal: Refusal, _: Option<&Head>, _: SocketAddr) -> Answer {
        Answer::json(refusal.status, "{}")
    }

    fn serve(&self, exchange: &Exchange, body: Body) -> Ending {
        let secret = String::from_utf8_lossy(&body).into_owned();
        match exchange.head.path() {
            "/before" => panic!("nothing was sent yet"),
            "/secret" => drop(secret.parse::<u64>().expect("the body is a number")),
            "/after" => {
                exchange.client.send_or_forget(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten bytes,");
                panic!("some of it was sent");
            }
            "/endless" => {
                let part = [b'y'; 64 * 1024];
                exchange.client.send_or_forget(b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n");
                while claude_lb::relay::Client::send(&*exchange.client, &part).is_ok() {}
                self.given_up.fetch_add(1, Ordering::SeqCst);
                return Ending::Broken;
            }
            _ => {}
        }
        exchange.client.send_or_forget(&Answer::json(200, "{}").to_bytes(false, exchange.closes));
        Ending::Whole
    }

    fn tick(&self, _: Instant) {}

    fn panicked(&self, _: &Exchange) -> Answer {
        self.panicked.fetch_add(1, Ordering::SeqCst);
        Answer::json(500, r#"{"type":"error"}"#)
    }
}

/// One worker, so that a lost one would be missed.
fn front(service: &Arc<Faulty>) -> Front {
    front_with(1, service)
}

fn front_with(workers: usize, service: &Arc<Faulty>) -> Front {
    let settings = Settings {
        host: "127.0.0.1".into(),
        port: 0,
        workers,
        queue: 8,
        queue_timeout: DEADLINE,
        max_connections: 64,
        head: DEADLINE,
        body: DEADLINE,
        keep_alive: DEADLINE,
        write: Duration::from_millis(300),
        buffered_bytes_max: 1 << 24,
        open_buffered_bytes_max: 1 << 20,
    };
    Front::start(settings, Arc::clone(service) as Arc<dyn Service>).expect("a free loopback port")
}

fn expect_works(front: &Front) {
    let mut client = Client::connect(front.address());
    for _ in 0..2 {
        assert_eq!(client.ask(&Request::get("/fine")).status(), 200);
    }
}

#[test]
fn a_panic_before_the_answer_is_a_500_and_costs_one_request() {
    let service = Arc::new(Faulty::default());
    let front = front(&service);
    for made in 1..=5 {
        let mut client = Client::connect(front.address());
        let answer = client.ask(&Request::get("/before"));
        assert_eq!((answer.status(), answer.header("connection")), (500, Some("close")));
        client.expect_closed();
        assert_eq!(service.panicked.load(Ordering::SeqCst), made);
        expect_works(&front);
    }
    let connections = front.connection_counter();
    eventually("everything to be over", || (front.busy() == 0 && connections() == 0).then_some(()));
}

#[test]
fn a_panic_within_the_answer_breaks_the_connection() {
    let service = Arc::new(Faulty::default());
    let front = front(&service);
    let answer = Client::connect(front.address()).ask(&Request::get("/after"));
    assert_eq!((answer.status(), answer.text().as_str()), (200, "ten bytes,"));
    assert!(answer.end.is_broken(), "nothing that could be taken for the whole answer");
    assert_eq!(service.panicked.load(Ordering::SeqCst), 1);
    expect_works(&front);
}

/// A worker stays with a client that goes on at once, if there is another worker: a fault in the second request, or
/// while its route is looked for, is that client's alone.
#[test]
fn a_panic_in_a_row_of_requests_costs_one_connection() {
    let service = Arc::new(Faulty::default());
    let front = front_with(2, &service);
    for (path, expected) in [("/before", Some(500)), ("/after", Some(200)), ("/panic-in-the-watcher", None)] {
        for _ in 0..3 {
            let mut client = Client::connect(front.address());
            for _ in 0..4 {
                assert_eq!(client.ask(&Request::get("/fine")).status(), 200);
            }
            client.send(&Request::get(path));
            let status = client.try_head().map(|head| head.status).ok();
            assert_eq!(status, expected, "{path}");
            if status.is_some() {
                client.rest();
                client.expect_closed();
            }
        }
    }
    assert_eq!(service.panicked.load(Ordering::SeqCst), 6);
    expect_works(&front);
    let connections = front.connection_counter();
    eventually("everything to be over", || (front.busy() == 0 && connections() == 0).then_some(()));
}

/// The watcher is one thread for all connections.
#[test]
fn a_panic_in_the_watcher_costs_one_connection() {
    let service = Arc::new(Faulty::default());
    let front = front(&service);
    let mut neighbour = Client::connect(front.address());
    assert_eq!(neighbour.ask(&Request::get("/fine")).status(), 200);
    let mut client = Client::connect(front.address());
    client.send(&Request::get("/panic-in-the-watcher"));
    client.expect_closed();
    assert_eq!(neighbour.ask(&Request::get("/fine")).status(), 200);
    expect_works(&front);
}

/// Without this a client that takes nothing would hold its worker for ever; the program waits for 30 s.
#[test]
fn a_client_that_takes_nothing_is_given_up_at_the_write_timeout() {
    let service = Arc::new(Faulty::default());
    let front = front(&service);
    let mut deaf = Client::connect(front.address());
    deaf.send(&Request::get("/endless"));
    expect_works(&front);
    assert_eq!(service.given_up.load(Ordering::SeqCst), 1);
    drop(deaf);
}

const CHILD: &str = "CLAUDE_LB_TEST_PANIC_CHILD";

/// Not a test of its own: what the next one runs in a process of its own, for the hook is the process's.
#[test]
fn child_that_panics() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    claude_lb::logging::init(&Logging { level: log::LevelFilter::Info, format: LogFormat::Text });
    claude_lb::panics::watch();
    let front = front(&Arc::new(Faulty::default()));
    for path in ["/before", "/secret", "/after"] {
        Client::connect(front.address()).ask(&Request::new("POST", path).body("a-secret-of-the-client"));
    }
    assert_eq!(claude_lb::panics::count(), 3);
}

fn log_of_child(backtrace: &str) -> Vec<String> {
    let this = std::env::current_exe().expect("a test has a program");
    let output = Command::new(this)
        .args(["--exact", "panics::child_that_panics", "--nocapture"])
        .env(CHILD, "1")
        .env("RUST_BACKTRACE", backtrace)
        .stdin(Stdio::null())
        .output()
        .expect("a test can be run again");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

#[test]
fn a_panic_is_one_loud_line_without_content() {
    let lines = log_of_child("0");
    let panics: Vec<&String> = lines.iter().filter(|line| line.contains("panic in thread")).collect();
    assert_eq!(panics.len(), 3, "{lines:?}");
    assert_eq!(lines.len(), panics.len(), "and nothing else: {lines:?}");
    for (line, message) in
        panics.iter().zip(["nothing was sent yet", "the body is a number (...)", "some of it was sent"])
    {
        assert!(line.contains("[ERROR] panic in thread worker at tests/it/panics.rs:"), "{line}");
        assert!(line.ends_with(message), "{message}: {line}");
    }
    assert!(!lines.iter().any(|line| line.contains("a-secret-of-the-client")), "{lines:?}");
}

#[test]
fn with_rust_backtrace_the_frames_follow_a_line_each() {
    let lines = log_of_child("1");
    assert!(lines.len() > 20, "{lines:?}");
    assert!(lines.iter().all(|line| line.contains("[ERROR] panic")), "each is a line of the log: {lines:?}");
    assert!(lines.iter().any(|line| line.contains("Faulty")), "the frame at fault is named: {lines:?}");
    assert!(!lines.iter().any(|line| line.contains("a-secret-of-the-client")), "{lines:?}");
}
