//! A healthy workspace behind TLS, with the certificate in `tests/fixtures/tls` (for 127.0.0.1, used nowhere else).

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, Stream};

use super::fixtures;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

/// The certificate of the authority that signed the workspace's.
pub fn authority() -> PathBuf {
    file("authority.pem")
}

/// What every request gets, and how many of them a connection takes before the next one is met by a goodbye.
#[derive(Clone)]
struct Manner {
    answer: Vec<u8>,
    answers: usize,
}

#[derive(Default)]
struct Seen {
    last_head: Mutex<String>,
    sockets: Mutex<Vec<TcpStream>>,
    stop: AtomicBool,
}

/// Answers every request in the same way; gone when dropped.
pub struct TlsUpstream {
    address: SocketAddr,
    seen: Arc<Seen>,
    accepting: Option<JoinHandle<()>>,
}

impl TlsUpstream {
    /// Answers with the transcript `text`.
    pub fn start() -> Self {
        let body = fixtures::transcript("text");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n";
        Self::answering([format!("{head}content-length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat())
    }

    /// Answers with these bytes, in one record as far as they fit.
    pub fn answering(answer: Vec<u8>) -> Self {
        Self::with(Manner { answer, answers: usize::MAX })
    }

    /// The same, and says goodbye to each connection just as its second request comes.
    pub fn answering_once(answer: Vec<u8>) -> Self {
        Self::with(Manner { answer, answers: 1 })
    }

    fn with(manner: Manner) -> Self {
        let certificate = CertificateDer::from_pem_file(file("workspace.pem")).expect("a fixture");
        let key = PrivateKeyDer::from_pem_file(file("workspace.key")).expect("a fixture");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring knows the usual versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("the fixtures belong together");
        let (config, seen) = (Arc::new(config), Arc::new(Seen::default()));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let accepting = Some(std::thread::spawn({
            let seen = seen.clone();
            move || accept(&listener, &config, &manner, &seen)
        }));
        Self { address, seen, accepting }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The head of the last request, or nothing when none ever came through.
    pub fn last_head(&self) -> String {
        self.seen.last_head.lock().expect("no holder panics").clone()
    }
}

impl Drop for TlsUpstream {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::SeqCst);
        for socket in self.seen.sockets.lock().expect("no holder panics").iter() {
            // A socket that is closed already has nothing left to stop.
            socket.shutdown(Shutdown::Both).ok();
        }
        TcpStream::connect(self.address).ok();
        if let Some(accepting) = self.accepting.take() {
            accepting.join().ok();
        }
    }
}

fn accept(listener: &TcpListener, config: &Arc<ServerConfig>, manner: &Manner, seen: &Arc<Seen>) {
    std::thread::scope(|scope| {
        while let Ok((mut socket, _)) = listener.accept() {
            let handle = socket.try_clone().expect("a descriptor for one more handle");
            seen.sockets.lock().expect("no holder panics").push(handle);
            if seen.stop.load(Ordering::SeqCst) {
                // Those that came before the flag was seen are shut down by the drop; this one wakes the loop only.
                return;
            }
            scope.spawn(move || {
                let mut session = ServerConnection::new(config.clone()).expect("a valid configuration");
                let mut stream = Stream::new(&mut session, &mut socket);
                let answered = (0..manner.answers).find(|_| serve(&mut stream, manner, seen).is_none());
                if answered.is_none() && socket.peek(&mut [0]).is_ok_and(|bytes| bytes > 0) {
                    session.send_close_notify();
                    session.write_tls(&mut socket).ok();
                }
                // Other handles of this socket exist, so only this ends the connection.
                socket.shutdown(Shutdown::Both).ok();
            });
        }
    });
}

/// One request and its answer. `None` when the other side has left, or never was one we can talk to.
fn serve(stream: &mut (impl Read + Write), manner: &Manner, seen: &Seen) -> Option<()> {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    let body_start = loop {
        if let Some(position) = memchr::memmem::find(&request, b"\r\n\r\n") {
            break position + 4;
        }
        match stream.read(&mut piece).ok()? {
            0 => return None,
            bytes => request.extend_from_slice(&piece[..bytes]),
        }
    };
    let head = String::from_utf8_lossy(&request[..body_start]).into_owned();
    let lower = head.to_lowercase();
    let length =
        lower.lines().find_map(|line| line.strip_prefix("content-length:"))?.trim().parse::<usize>().ok()?;
    while request.len() < body_start + length {
        match stream.read(&mut piece).ok()? {
            0 => return None,
            bytes => request.extend_from_slice(&piece[..bytes]),
        }
    }
    *seen.last_head.lock().expect("no holder panics") = head;
    stream.write_all(&manner.answer).ok()?;
    stream.flush().ok()
}
