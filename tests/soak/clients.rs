//! The clients: most ask and read to the end; some leave at a random point, read slowly, never read, or send
//! nonsense. Each files what became of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::ledger::{End, Ledger};
use crate::support::client::{self, Client, Piece, Request};
use crate::support::{hostile, sse};

/// One client thread's view.
pub struct Crew<'a> {
    pub address: SocketAddr,
    pub ledger: &'a Ledger,
    pub stop: &'a AtomicBool,
}

/// One message request.
struct Message {
    nonce: String,
    is_stream: bool,
    request: Request,
}

fn message(rng: &mut fastrand::Rng) -> Message {
    let nonce = format!("nonce-{:016x}", rng.u64(..));
    let is_stream = rng.u8(..10) < 7;
    let model = match rng.u8(..50) {
        0 => "missing-model",
        1..=15 => "claude-opus-4-5",
        _ => "claude-sonnet-4-5",
    };
    let padding = match rng.u8(..100) {
        0 => rng.usize(500_000..3_500_000),
        1..=30 => rng.usize(2_000..60_000),
        _ => rng.usize(..2_000),
    };
    let body = format!(
        r#"{{"model":"{model}","stream":{is_stream},"max_tokens":64,"x":"{nonce} {}","messages":[]}}"#,
        "y".repeat(padding)
    );
    let request = Request::post_message(&body);
    let request = if rng.u8(..20) == 0 { request.chunked(rng.usize(10..100_000)) } else { request };
    Message { nonce, is_stream, request }
}

impl Crew<'_> {
    pub fn work(&self, seed: u64) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let hostile = hostile::rows();
        while !self.stop.load(Ordering::SeqCst) {
            match rng.u8(..100) {
                0..=74 => self.asks(&mut rng),
                75..=84 => self.leaves(&mut rng),
                85..=86 => self.reads_slowly(&mut rng),
                87 => self.sends_half(&mut rng),
                88..=91 => self.is_hostile(&hostile[rng.usize(..hostile.len())]),
                92..=95 => {
                    let body = r#"{"model":"m","messages":[{"role":"user","content":"count me"}]}"#;
                    let count = Request::new("POST", "/v1/messages/count_tokens").body(body);
                    assert_eq!(client::ask(self.address, &count).status(), 200);
                }
                96..=98 => assert_eq!(client::ask(self.address, &Request::get("/stats")).status(), 200),
                _ => self.never_reads(&mut rng),
            }
            std::thread::sleep(Duration::from_millis(rng.u64(..120)));
        }
    }

    /// A few requests on one connection, each read to its end.
    fn asks(&self, rng: &mut fastrand::Rng) {
        let mut client = Client::connect(self.address);
        for _ in 0..rng.usize(1..6) {
            let message = message(rng);
            self.ledger.sent();
            client.send(&message.request);
            let (end, keeps) = self.read(&mut client, &message);
            self.ledger.ended(end);
            if !keeps {
                return;
            }
        }
    }

    /// Reads an answer and judges it. False when the connection is over.
    fn read(&self, client: &mut Client, message: &Message) -> (End, bool) {
        let head = match client.try_head() {
            Ok(head) => head,
            Err(end) => panic!("no answer to {}: {end:?}", message.nonce),
        };
        let (body, end) = client.rest();
        self.ledger.saw(head.header("request-id").expect("every answer has a request-id"));
        let keeps = !end.is_broken() && head.header("connection") != Some("close");
        if head.status != 200 {
            assert!(!end.is_broken(), "an error broke off: {head:?}");
            let json: serde_json::Value = serde_json::from_slice(&body).expect("an error is JSON");
            // A workspace's own words for a refused token go through as they are.
            assert!(json["type"] == "error" || (head.status == 403 && json["error_code"] == 403), "{json}");
            return (End::Refused(head.status), keeps);
        }
        if end.is_broken() {
            return (End::Cut, false);
        }
        let text = String::from_utf8_lossy(&body);
        let is_stream = head.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
        if !is_stream {
            assert!(
                text.contains(&message.nonce) && text.ends_with('}'),
                "short or foreign: {}",
                message.nonce
            );
            serde_json::from_slice::<serde_json::Value>(&body).expect("a whole answer is JSON");
            return (End::Answered, keeps);
        }
        assert!(message.is_stream);
        let names = sse::names(&body);
        let last = names.iter().rfind(|name| *name != "ping").map(String::as_str);
        assert!(names.iter().filter(|name| *name == "message_start").count() <= 1, "{names:?}");
        match last {
            Some("message_stop") => {
                assert!(text.contains(&message.nonce), "somebody else's answer: {}", message.nonce);
                (End::Answered, keeps)
            }
            Some("error") => (End::ErrorEvent, keeps),
            _ => panic!("a short success for {}: {names:?}", message.nonce),
        }
    }

    /// Sends all of it and goes at a random point.
    fn leaves(&self, rng: &mut fastrand::Rng) {
        let message = message(rng);
        let mut client = Client::connect(self.address);
        self.ledger.abandoned();
        client.send_if_taken(&message.request.bytes());
        match rng.u8(..4) {
            0 => {}
            1 => std::thread::sleep(Duration::from_millis(rng.u64(..30))),
            2 => drop(client.try_head()),
            _ => {
                if client.try_head().is_ok() {
                    for _ in 0..rng.usize(1..4) {
                        if matches!(client.next_piece(), Piece::End(_)) {
                            break;
                        }
                    }
                }
            }
        }
        if rng.bool() {
            client.reset();
        }
    }

    /// Leaves before its request is whole: it never was one.
    fn sends_half(&self, rng: &mut fastrand::Rng) {
        let bytes = message(rng).request.bytes();
        let mut client = Client::connect(self.address);
        client.send_if_taken(&bytes[..rng.usize(..bytes.len() - 1)]);
        self.ledger.halved();
        if rng.bool() {
            client.reset();
        }
    }

    /// Takes a large answer in sips, and all of it.
    fn reads_slowly(&self, rng: &mut fastrand::Rng) {
        let message = message(rng);
        let mut socket = self.raw();
        self.ledger.slow();
        // A request with this header closes the connection, which is the end to read to.
        socket.write_all(&message.request.with("Connection", "close").bytes()).ok();
        let mut piece = vec![0; 20_000];
        while !self.stop.load(Ordering::SeqCst) && matches!(socket.read(&mut piece), Ok(count) if count > 0) {
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Asks, and takes nothing for a while.
    fn never_reads(&self, rng: &mut fastrand::Rng) {
        let mut socket = self.raw();
        self.ledger.abandoned();
        socket.write_all(&message(rng).request.bytes()).ok();
        std::thread::sleep(Duration::from_millis(rng.u64(100..2_000)));
    }

    fn raw(&self) -> TcpStream {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.expect("a descriptor");
        socket.set_recv_buffer_size(4096).expect("a live socket");
        socket.connect(&self.address.into()).expect("the proxy accepts connections");
        socket.set_write_timeout(Some(Duration::from_secs(15))).expect("a live socket");
        socket.into()
    }

    fn is_hostile(&self, row: &hostile::Row) {
        let mut client = Client::connect(self.address);
        client.send_if_taken(&row.sends);
        let head = client.try_head().unwrap_or_else(|end| panic!("{}: no answer, {end:?}", row.what));
        // A few rows are valid messages in odd clothes, and meet the workspaces' moods.
        let is_message = row.status == 200 && row.what.starts_with("chunks");
        assert!(head.status == row.status || is_message, "{}: {}", row.what, head.status);
        self.ledger.hostile(is_message);
    }
}

/// Somebody else, who must always be served at once.
pub fn probe(address: SocketAddr, ledger: &Ledger, stop: &AtomicBool) {
    let mut client = Client::connect(address);
    while !stop.load(Ordering::SeqCst) {
        let start = Instant::now();
        assert_eq!(client.ask(&Request::get("/health")).status(), 200);
        ledger.probed(start.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
}
