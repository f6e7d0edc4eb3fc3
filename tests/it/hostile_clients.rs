//! Hostile and broken clients: each gets its stated answer, others are served meanwhile, nothing is left behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::client::{Client, End, KEY, Request};
use crate::support::hostile::{Row, Then, rows};
use crate::support::proxy::Proxy;
use crate::support::rest::AtRest;
use crate::support::upstream::Upstream;
use crate::support::{Stopwatch, eventually, fixtures, together};

/// Sends what the row says and judges the answer.
fn check(proxy: &Proxy, row: &Row) {
    let what = row.what;
    let mut client = proxy.connect();
    client.send_if_taken(&row.sends);
    let head = client.try_head().unwrap_or_else(|end| panic!("{what}: no answer, {end:?}"));
    let (body, _) = client.rest();
    assert_eq!(head.status, row.status, "{what}: {}", String::from_utf8_lossy(&body));
    match row.then {
        Then::Closes => {
            let more = client.try_head();
            assert!(more.is_err(), "{what}: the connection stayed open and answered {more:?}");
        }
        Then::Lives => {
            assert_eq!(client.ask(&Request::get("/health")).status(), 200, "{what}: what followed")
        }
    }
}

/// A neighbour on a connection of its own, who must be served whatever the others do.
fn expect_served(proxy: &Proxy, neighbour: &mut Client) {
    assert_eq!(neighbour.ask(&Request::get("/health")).status(), 200);
    assert_eq!(neighbour.ask(&Request::message()).body, fixtures::message_json());
    assert_eq!(proxy.ask(&Request::message()).status(), 200, "and whoever comes now");
}

/// Four clients send all rows, each beginning elsewhere; the crowd leaves nothing behind.
#[test]
fn every_row_of_the_table_gets_its_answer_also_in_a_crowd() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let rows = rows();
    let rest = AtRest::of(&proxy);
    together(4, |place| {
        let mut neighbour = proxy.connect();
        for at in 0..rows.len() {
            check(&proxy, &rows[(at + place * rows.len() / 4) % rows.len()]);
            if at % 16 == 0 {
                expect_served(&proxy, &mut neighbour);
            }
        }
    });
    rest.expect(&proxy);
    assert_eq!(proxy.number("w1", "total_errors"), 0, "none of it is a workspace's fault");
    let messages = rows.iter().filter(|row| row.status == 200 && row.what.starts_with("chunks")).count() * 4;
    assert!(upstream.requests().iter().all(|request| request.request_line().contains("/v1/messages")));
    assert!(upstream.count() >= messages);
}

/// The table of the documentation is the table of the test.
#[test]
fn the_documentation_holds_the_same_table() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/RELIABILITY.md");
    let page = fs::read_to_string(page).expect("docs/RELIABILITY.md is part of the repository");
    for row in rows() {
        let then = if row.then == Then::Closes { "closed" } else { "kept" };
        let line = format!("| {} | {} | {then} |", row.what, row.status);
        assert!(page.contains(&line), "docs/RELIABILITY.md lacks this row:\n{line}");
    }
}

#[test]
fn two_hundred_half_open_connections_cost_no_thread_and_end_at_their_deadline() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("timeouts.head", 1.5).start();
    let rest = AtRest::of(&proxy);
    let mut neighbour = proxy.connect();
    let mut half: Vec<Client> = (0..200).map(|_| proxy.connect()).collect();
    for (place, client) in half.iter_mut().enumerate() {
        let parts =
            ["", "P", "POST /v1/messages HTTP/1.1\r\n", "GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "];
        client.send_bytes(parts[place % parts.len()].as_bytes());
    }
    eventually("all of them to be known", || {
        (proxy.stats()["process"]["connections"].as_u64()? >= 201).then_some(())
    });
    expect_served(&proxy, &mut neighbour);
    assert!(rest.threads_above(&proxy) <= 4, "a thread each would be 200");
    for client in &mut half {
        // What said nothing at all is closed without a word, half a head is a 408.
        assert!(client.try_head().is_ok_and(|head| head.status == 408) || client.try_head().is_err());
    }
    drop(half);
    expect_served(&proxy, &mut neighbour);
    drop(neighbour);
    rest.expect(&proxy);
}

/// Room for 244 connections: the longest idle ones make room, so nobody new is kept waiting.
#[test]
fn more_idle_connections_than_descriptors_harm_nobody() {
    let upstream = Upstream::start();
    let mut proxy = Proxy::with(&[&upstream]).descriptors(1024).start();
    proxy.wait_log("1024 open files are room for 244 connections");
    let rest = AtRest::of(&proxy);
    let mut crowd: Vec<Client> = Vec::new();
    for place in 0..1_100 {
        crowd.push(proxy.connect());
        if place % 100 == 99 {
            assert_eq!(proxy.ask(&Request::message()).status(), 200, "after {place} idle ones");
        }
    }
    assert!(proxy.running.is_alive());
    expect_served(&proxy, &mut proxy.connect());
    drop(crowd);
    rest.expect(&proxy);
    let lines = proxy.running.err.all();
    assert!(!lines.iter().any(|line| line.contains("ERROR")), "{lines:?}");
}

/// The head of an upload that never ends, of the kind that is refused before its body.
fn endless(route: &str, framing: &str) -> Vec<u8> {
    format!("POST {route} HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\n{framing}\r\n\r\n").into_bytes()
}

/// An unread body is listened to for a second, and by nobody's leave longer: throwing away what a client sends
/// without pause kept the watcher from everybody else.
#[test]
fn uploads_without_end_are_cut_off_and_hold_nobody_up() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).start();
    let rest = AtRest::of(&proxy);
    let heads = [
        endless("/v1/messages", "Content-Length: 18446744073709551615"),
        endless("/no/such/route", "Content-Length: 900000000000"),
        endless("/v1/messages", "Transfer-Encoding: chunked"),
        endless("/v1/messages/count_tokens", "Transfer-Encoding: chunked"),
    ];
    let watch = Stopwatch::start();
    std::thread::scope(|scope| {
        let senders: Vec<_> = heads
            .iter()
            .map(|head| {
                let mut client = proxy.connect();
                client.send_bytes(head);
                let is_chunked = memchr::memmem::find(head, b"chunked").is_some();
                let piece = vec![b'y'; 64 * 1024];
                let piece = if is_chunked { [b"10000\r\n", &piece[..], b"\r\n"].concat() } else { piece };
                scope.spawn(move || {
                    let mut sent = 0;
                    while client.sends(&piece) {
                        sent += piece.len();
                    }
                    sent
                })
            })
            .collect();
        let mut neighbour = proxy.connect();
        for _ in 0..20 {
            expect_served(&proxy, &mut neighbour);
        }
        for sender in senders {
            sender.join().expect("it ended");
        }
    });
    assert!(watch.elapsed() < Duration::from_secs(8), "a second each, side by side: {:?}", watch.elapsed());
    rest.expect(&proxy);
}

/// Bodies that trickle in chunks: below the least rate or past the deadline, either ends them. Also when nothing of
/// the body comes at all, but more and more of a chunk's extension: tiny_http's decoder never came back from that.
#[test]
fn bodies_that_trickle_end_at_their_deadline() {
    let upstream = Upstream::start();
    let proxy = Proxy::with(&[&upstream]).set("timeouts.body", 1).start();
    let rest = AtRest::of(&proxy);
    together(12, |place| {
        let mut client = proxy.connect();
        let chunked = "Transfer-Encoding: chunked";
        let (framing, start, piece) =
            [(chunked, "", "1\r\n \r\n"), ("Content-Length: 100000", "", " "), (chunked, "1;", "x")]
                [place % 3];
        client.send_bytes(&endless(["/v1/messages", "/v1/messages/count_tokens"][place / 3 % 2], framing));
        client.send_bytes(start.as_bytes());
        while !client.has_input_within(Duration::from_millis(20)) {
            client.send_if_taken(piece.as_bytes());
        }
        client.answer().refusal(408);
        assert_ne!(client.expect_closed(), End::Complete);
    });
    assert_eq!(upstream.count(), 0);
    rest.expect(&proxy);
}

/// The kernel's buffers fill, then a worker waits: a health check and other workers do not.
#[test]
fn clients_that_never_read_hold_nobody_else_up() {
    let upstream = Upstream::start();
    upstream.answer(|request| {
        let is_large = memchr::memmem::find(&request.body, b"large").is_some();
        let text = if is_large { "y".repeat(8 << 20) } else { "small".into() };
        crate::support::reply::Reply::json(200, format!(r#"{{"type":"message","text":"{text}"}}"#))
    });
    let proxy = Proxy::with(&[&upstream]).set("server.workers", 4).start();
    let rest = AtRest::of(&proxy);
    let deaf: Vec<Client> = (0..3)
        .map(|_| {
            let mut client = proxy.connect();
            client.send(&Request::post_message(r#"{"model":"claude-sonnet-4-5","x":"large"}"#));
            client
        })
        .collect();
    upstream.wait_requests(3);
    let mut neighbour = proxy.connect();
    for _ in 0..10 {
        assert_eq!(neighbour.ask(&Request::message()).status(), 200);
        assert_eq!(neighbour.ask(&Request::get("/health")).status(), 200);
    }
    drop(deaf);
    drop(neighbour);
    rest.expect(&proxy);
    assert_eq!(proxy.number("w1", "total_errors"), 0, "a client that does not read blames nobody");
}

/// Clients that ask again and again and never read, on routes that need no key. Once the kernel's buffers were full
/// they held both threads that answer health checks, half a minute each.
#[test]
fn questions_whose_answers_nobody_reads_hold_no_health_check_up() {
    let upstream = Upstream::start();
    // Names that make /stats long.
    let mut setup = Proxy::with(&[&upstream]).env("LOG_LEVEL", "debug");
    for place in 0..100 {
        setup = setup.and_endpoint_at(upstream.address());
        setup = setup.endpoint(place + 1, "name", format!("w{place}-{}", "y".repeat(60)));
    }
    let proxy = setup.start();
    let rest = AtRest::of(&proxy);
    let asked = || proxy.running.err.all().iter().filter(|line| line.contains("path=/stats ")).count();
    let mut deaf: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
    // Each question when the one before was answered: of two at once the connection ends with the first.
    for client in &mut deaf {
        let mut before = asked();
        while client.sends(&Request::get("/stats").bytes()) {
            let is_answered = eventually("an answer, or the end", || {
                let now = asked();
                (now > before).then_some(true).or_else(|| client.has_ended().then_some(false))
            });
            before = asked();
            if !is_answered {
                break;
            }
        }
    }
    assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
    drop(deaf);
    rest.expect(&proxy);
}
