//! Request heads: the verdict does not depend on how the bytes arrive, the ranges are those of a naive reader, and
//! tiny_http, which reads the same bytes afterwards, understands every accepted head in the same way. Where they
//! differed, one of them would take for a request what the other took for a body.

use claude_lb::http::head::{Framing, HEADERS_MAX, Head, Verdict, judge};

/// The last byte chooses the largest head; the rest is what a client sent.
pub fn check(input: &[u8]) {
    let Some((&how, bytes)) = input.split_last() else { return };
    let limit = if how % 8 == 0 { 16 + usize::from(how) } else { 64 * 1024 };
    let verdict = judge(bytes, limit);
    does_not_depend_on_the_split(bytes, limit, &verdict);
    match verdict {
        Verdict::Complete(head) => {
            assert!(head.len() <= limit.min(bytes.len()) && head.headers().count() <= HEADERS_MAX);
            let (whole, rest) = bytes.split_at(head.len());
            reads_as_a_naive_reader_does(whole, &head);
            #[cfg(target_os = "linux")]
            tiny_http_reads_the_same(whole, rest, &head);
        }
        Verdict::Refuse(refusal) => {
            assert!([400, 417, 431, 501, 505].contains(&refusal.status) && !refusal.message.is_empty());
        }
        Verdict::Incomplete => assert!(bytes.len() < limit),
    }
}

/// Looks at some beginnings, the sharp ones among them.
fn does_not_depend_on_the_split(bytes: &[u8], limit: usize, whole: &Verdict) {
    let ends = bytes.iter().enumerate().filter(|(_, byte)| matches!(byte, b'\r' | b'\n' | b' ' | b':'));
    let sharp = ends.flat_map(|(at, _)| [at, at + 1]).take(40);
    for cut in sharp.chain((0..bytes.len()).step_by(1 + bytes.len() / 16)) {
        match (judge(&bytes[..cut], limit), whole) {
            (Verdict::Complete(early), Verdict::Complete(late)) => assert_eq!(early.len(), late.len()),
            (Verdict::Complete(_), other) => panic!("accepted at {cut}, then {other:?}"),
            (Verdict::Refuse(_), Verdict::Refuse(_)) => {}
            (Verdict::Refuse(early), other) => panic!("refused at {cut} ({}), then {other:?}", early.message),
            (Verdict::Incomplete, Verdict::Complete(late)) => assert!(cut < late.len()),
            (Verdict::Incomplete, _) => {}
        }
    }
}

fn reads_as_a_naive_reader_does(whole: &[u8], head: &Head) {
    let text = std::str::from_utf8(whole).expect("an accepted head is ASCII");
    let mut lines = text.strip_suffix("\r\n\r\n").expect("an accepted head has its end").split("\r\n");
    let words: Vec<&str> = lines.next().unwrap().split(' ').collect();
    let [method, target, version] = words[..] else { panic!("{words:?}") };
    assert_eq!((head.method(), version), (method, if head.is_http_1_0() { "HTTP/1.0" } else { "HTTP/1.1" }));
    if target.starts_with('/') {
        let (path, query) =
            target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        assert_eq!((head.path(), head.query()), (path, query));
    }
    let fields: Vec<(&str, &str)> = lines
        .map(|line| {
            line.split_once(':').map(|(name, value)| (name, value.trim_matches([' ', '\t']))).unwrap()
        })
        .collect();
    assert_eq!(head.headers().collect::<Vec<_>>(), fields);

    let values = |wanted: &str| -> Vec<&str> {
        fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| *value).collect()
    };
    let framing = match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => Framing::None,
        ([], ["chunked"]) => Framing::Chunked,
        ([digits], []) if digits.bytes().all(|digit| digit.is_ascii_digit()) => {
            Framing::Length(digits.parse().unwrap_or(u64::MAX))
        }
        other => panic!("{other:?} was accepted"),
    };
    assert_eq!(head.framing(), framing);
}

/// The body that is put behind a head that announces chunks.
#[cfg(target_os = "linux")]
const CHUNKS: &[u8] = b"5\r\nhello\r\n0\r\n\r\n";

/// Bodies up to here are sent whole.
#[cfg(target_os = "linux")]
const BODY_BYTES_MAX: u64 = 4 * 1024;

#[cfg(target_os = "linux")]
fn tiny_http_reads_the_same(whole: &[u8], rest: &[u8], head: &Head) {
    let mut body = match head.framing() {
        Framing::None => Vec::new(),
        Framing::Length(length) if length <= BODY_BYTES_MAX => {
            rest.iter().copied().chain(std::iter::repeat(b'x')).take(length as usize).collect()
        }
        // Answered with a 413 before tiny_http sees any of it.
        Framing::Length(_) => return,
        Framing::Chunked => CHUNKS.to_vec(),
    };
    let next = b"GET /next HTTP/1.1\r\n\r\n";
    let mut requests = tiny_http_on(&[whole, &body, next].concat());
    let mut request = match requests.next() {
        Some(Ok(request)) => request,
        other => panic!("tiny_http: {:?}", other.map(|refused| refused.map(drop))),
    };

    assert_eq!(request.method().to_string(), head.method());
    let minor = u8::from(!head.is_http_1_0());
    assert_eq!(*request.http_version(), tiny_http::HTTPVersion(1, minor));
    if request.url().starts_with('/') {
        let query = head.query().map_or(String::new(), |query| format!("?{query}"));
        assert_eq!(request.url(), format!("{}{query}", head.path()));
    }
    for name in ["content-length", "transfer-encoding", "connection", "expect", "host", "x-api-key", "x"] {
        let theirs = request.headers().get(name).map(|value| value.as_str());
        assert_eq!(theirs, head.header(name), "{name}");
    }
    if let Framing::Length(length) = head.framing() {
        assert_eq!(request.body_length(), Some(length as usize));
    }
    // With `Connection: upgrade` it hands out the rest of the connection, which ends with this request.
    if head.keep_alive() {
        let mut read = Vec::new();
        request.as_reader().read_to_end(&mut read).expect("a whole body");
        if head.framing() == Framing::Chunked {
            body = b"hello".to_vec();
        }
        assert_eq!(read, body);
        drop(request);
        let next = requests.next().expect("a kept connection").expect("the request behind the body");
        assert_eq!(next.url(), "/next");
    }
}

/// tiny_http's own reader at the other end of a connection on which these bytes have come, and its end.
#[cfg(target_os = "linux")]
fn tiny_http_on(bytes: &[u8]) -> impl Iterator<Item = Result<tiny_http::Request, String>> + use<> {
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    thread_local! {
        static LISTENER: (tiny_http::Listener, SocketAddr) = {
            let name = format!("claude-lb-laws-{}-{:?}", std::process::id(), std::thread::current().id());
            let address = SocketAddr::from_abstract_name(name).unwrap();
            (tiny_http::Listener::Unix(UnixListener::bind_addr(&address).unwrap()), address)
        };
    }
    LISTENER.with(|(listener, address)| {
        let mut client = UnixStream::connect_addr(address).unwrap();
        client.write_all(bytes).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let plain = tiny_http::SslContextWrap::build_ssl_capabilities(None).unwrap();
        let connection = tiny_http::Server::accept_connection(listener, &plain).unwrap().unwrap();
        connection.map(|read| read.map_err(|error| error.to_string()))
    })
}
