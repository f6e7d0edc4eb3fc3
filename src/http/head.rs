//! Judges a request head before any other code reads it.
//!
//! The watcher peeks at what a client sent and asks [`judge`]: not finished yet, fine, or refused. The parsed [`Head`]
//! travels with the connection: routing, the key check and the headers to forward come from it. tiny_http never reads
//! one: it would take headers without limit, wait for ever on `HTTP/2.0`, and believe the first of two
//! Content-Lengths.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::answer::Refusal;

/// How many header lines a request may have; Claude Code sends about 20.
pub const HEADERS_MAX: usize = 128;

/// Stands for a byte that is not ASCII: no header that anybody asks for has it.
const PLACEHOLDER: char = '\x7f';

/// What was found in the bytes a client has sent so far.
#[derive(Debug)]
pub enum Verdict {
    /// The blank line has not come yet, and nothing is wrong so far.
    Incomplete,
    /// A whole, acceptable head.
    Complete(Box<Head>),
    /// The client is told this, and the connection ends.
    Refuse(Refusal),
}

/// How the length of the body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Neither Content-Length nor Transfer-Encoding: no body.
    None,
    /// One plain Content-Length, in bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// A request head that passed [`judge`].
#[derive(Debug)]
pub struct Head {
    /// As received, with a [`PLACEHOLDER`] for each byte that is not ASCII.
    text: Box<str>,
    /// As received, if that is something else.
    raw: Option<Box<[u8]>>,
    method: Range<usize>,
    target: Range<usize>,
    fields: Vec<(Range<usize>, Range<usize>)>,
    framing: Framing,
    minor: u8,
    expects_continue: bool,
    keep_alive: bool,
    connection: Option<String>,
}

impl Head {
    /// The method as sent, such as `POST`.
    pub fn method(&self) -> &str {
        self.text(&self.method)
    }

    /// The path without query, also when the request line held a whole URL.
    pub fn path(&self) -> &str {
        let target = self.origin_form();
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    /// What follows the first `?`.
    pub fn query(&self) -> Option<&str> {
        self.origin_form().split_once('?').map(|(_, query)| query)
    }

    /// How many bytes the head is, with its blank line.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Never true: a head has at least a request line.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// How the body's length is told.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// True for HTTP/1.0, which knows no chunks.
    pub fn is_http_1_0(&self) -> bool {
        self.minor == 0
    }

    /// The client waits for `100 Continue` before it sends the body.
    pub fn expects_continue(&self) -> bool {
        self.expects_continue
    }

    /// The client wants to use the connection again.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// What all Connection lines say, as one list in lower case (RFC 9110 section 5.3 takes them so).
    pub fn connection(&self) -> Option<&str> {
        self.connection.as_deref()
    }

    /// The first value of a header; the name's case does not matter. A byte that is not ASCII is a control character
    /// here, so that the value is like nothing anybody asks for.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut same_length = self.fields.iter().filter(|(n, _)| n.len() == name.len());
        same_length.find(|(n, _)| self.text(n).eq_ignore_ascii_case(name)).map(|(_, value)| self.text(value))
    }

    /// All headers in wire order, the values as they came.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let raw = self.raw.as_deref().unwrap_or(self.text.as_bytes());
        self.fields.iter().map(|(name, value)| (self.text(name), &raw[value.clone()]))
    }

    /// `/path?query`, with scheme and host of an absolute-form target taken off (RFC 9112 section 3.2.2).
    fn origin_form(&self) -> &str {
        let target = self.text(&self.target);
        let Some((_, rest)) = target.split_once("://").filter(|(scheme, _)| is_http(scheme)) else {
            return target;
        };
        rest.find(['/', '?']).map_or("/", |at| &rest[at..])
    }

    fn text(&self, range: &Range<usize>) -> &str {
        &self.text[range.clone()]
    }
}

/// The front of a method or path, as much of it as is worth showing: a stranger's 64 KiB are not for the log.
pub fn shown(text: &str) -> &str {
    const BYTES_MAX: usize = 256;
    text.get(..BYTES_MAX).unwrap_or(text)
}

fn is_http(scheme: &str) -> bool {
    scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")
}

/// Looks at everything a client has sent so far. `limit` is the largest head accepted, in bytes.
pub fn judge(bytes: &[u8], limit: usize) -> Verdict {
    // A TLS ClientHello: a person typed https:// for a plain port.
    if bytes.first() == Some(&0x16) {
        return refuse(400, "this port speaks plain HTTP, but the client began a TLS handshake: use http://");
    }
    let end = memchr::memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4);
    let head = &bytes[..end.unwrap_or(bytes.len())];
    if head.len() > limit || (end.is_none() && head.len() >= limit) {
        return refuse(431, format!("the request head is larger than {} KiB", limit / 1024));
    }
    // Somebody else on the way might see the end of the head elsewhere.
    if memchr::memchr_iter(b'\n', head).any(|at| at == 0 || head[at - 1] != b'\r') {
        return refuse(400, "the request head has a line that ends without a carriage return");
    }
    if head.starts_with(b"\r") {
        return refuse(400, "the request begins with an empty line");
    }
    let mut storage = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(head, &mut storage) {
        Ok(httparse::Status::Complete(_)) => complete(head, &parsed),
        Ok(httparse::Status::Partial) if end.is_none() => Verdict::Incomplete,
        Ok(httparse::Status::Partial) => refuse(400, "the request head is not valid HTTP"),
        Err(httparse::Error::TooManyHeaders) => {
            refuse(431, format!("the request has more than {HEADERS_MAX} header lines"))
        }
        Err(httparse::Error::Version) if names_another_version(head) => {
            refuse(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        }
        Err(error) => refuse(400, format!("the request head is not valid HTTP: {error}")),
    }
}

fn names_another_version(head: &[u8]) -> bool {
    let line = head.split(|&b| b == b'\r').next().unwrap_or_default();
    let version = line.rsplit(|&b| b == b' ').next().unwrap_or_default();
    version.starts_with(b"HTTP/") && version.get(5).is_some_and(u8::is_ascii_digit)
}

fn complete(bytes: &[u8], parsed: &httparse::Request<'_, '_>) -> Verdict {
    let at = |part: &[u8]| {
        let start = part.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + part.len()
    };
    let (method, target) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
    if !target.is_ascii() {
        return refuse(400, "the request line has a byte that is not ASCII: percent-encode it");
    }
    let mut fields = Vec::with_capacity(parsed.headers.len());
    let mut told = Told::default();
    for header in parsed.headers.iter() {
        if let Err(refusal) = told.hear(header.name, header.value) {
            return Verdict::Refuse(refusal);
        }
        fields.push((at(header.name.as_bytes()), at(header.value)));
    }
    let minor = parsed.version.unwrap_or(1);
    let framing = match told.framing(minor) {
        Ok(framing) => framing,
        Err(refusal) => return Verdict::Refuse(refusal),
    };
    let (text, raw) = match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() => (text.into(), None),
        _ => {
            let text = bytes.iter().map(|&b| if b.is_ascii() { char::from(b) } else { PLACEHOLDER });
            (text.collect::<String>().into(), Some(bytes.into()))
        }
    };
    Verdict::Complete(Box::new(Head {
        text,
        raw,
        method: at(method.as_bytes()),
        target: at(target.as_bytes()),
        fields,
        framing,
        minor,
        expects_continue: told.expects_continue,
        keep_alive: told.keep_alive(minor),
        connection: told.connection,
    }))
}

/// What the headers say about the message itself (RFC 9112 section 6).
#[derive(Default)]
struct Told<'a> {
    length: Option<&'a [u8]>,
    coding: Option<&'a [u8]>,
    connection: Option<String>,
    expects_continue: bool,
}

impl<'a> Told<'a> {
    fn hear(&mut self, name: &str, value: &'a [u8]) -> Result<(), Refusal> {
        if name.eq_ignore_ascii_case("content-length") {
            if self.length.replace(value).is_some() {
                return Err(bad(400, "the request has more than one Content-Length"));
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if self.coding.replace(value).is_some() {
                return Err(bad(400, "the request has more than one Transfer-Encoding"));
            }
        } else if name.eq_ignore_ascii_case("connection") {
            let said = self.connection.get_or_insert_default();
            said.push(',');
            said.push_str(&String::from_utf8_lossy(value).to_ascii_lowercase());
        } else if name.eq_ignore_ascii_case("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(bad(417, "the only Expect understood here is 100-continue"));
            }
            self.expects_continue = true;
        }
        Ok(())
    }

    fn framing(&self, minor: u8) -> Result<Framing, Refusal> {
        match (self.length, self.coding) {
            (Some(_), Some(_)) => Err(bad(400, "the request has both Content-Length and Transfer-Encoding")),
            (None, None) => Ok(Framing::None),
            (None, Some(b"chunked")) if minor == 0 => {
                Err(bad(400, "HTTP/1.0 has no Transfer-Encoding: send a Content-Length"))
            }
            (None, Some(b"chunked")) => Ok(Framing::Chunked),
            (None, Some(_)) => Err(bad(501, "the only Transfer-Encoding understood here is chunked")),
            (Some(digits), None) => {
                if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
                    return Err(bad(400, "the Content-Length is not a plain number"));
                }
                // More digits than fit are a very large body, which the size limit answers.
                let length = std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok());
                Ok(Framing::Length(length.unwrap_or(u64::MAX)))
            }
        }
    }

    /// Whoever asks for another protocol does not get it, and is not kept waiting for it either. A client of
    /// HTTP/1.0 that asks for more waits for a `Connection: keep-alive` of ours, or else for the end: it gets the end.
    fn keep_alive(&self, minor: u8) -> bool {
        minor == 1 && !self.says("close") && !self.says("upgrade")
    }

    fn says(&self, word: &str) -> bool {
        self.connection.as_ref().is_some_and(|said| said.contains(word))
    }
}

fn bad(status: u16, message: impl Into<String>) -> Refusal {
    Refusal::new(status, message)
}

fn refuse(status: u16, message: impl Into<String>) -> Verdict {
    Verdict::Refuse(bad(status, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 64 * 1024;

    fn head(text: &str) -> Head {
        match judge(text.as_bytes(), LIMIT) {
            Verdict::Complete(head) => *head,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], status: u16) {
        match judge(bytes, LIMIT) {
            Verdict::Refuse(refusal) => assert_eq!(refusal.status, status, "{}", refusal.message),
            other => panic!("{:?}: {other:?}", String::from_utf8_lossy(bytes)),
        }
    }

    #[test]
    fn a_plain_request_is_read() {
        let head = head(
            "POST /v1/messages?beta=true HTTP/1.1\r\nHost: x\r\nX-Api-Key:  k \r\nContent-Length: 12\r\n\r\n",
        );
        assert_eq!((head.method(), head.path(), head.query()), ("POST", "/v1/messages", Some("beta=true")));
        assert_eq!(head.header("x-api-key"), Some("k"));
        assert_eq!(head.framing(), Framing::Length(12));
        assert!(head.keep_alive() && !head.expects_continue() && !head.is_http_1_0());
    }

    #[test]
    fn what_strangers_choose_is_shown_in_part() {
        assert_eq!(shown("/v1/messages"), "/v1/messages");
        assert_eq!(shown(&"y".repeat(60_000)).len(), 256);
    }

    #[test]
    fn absolute_form_is_read_like_origin_form() {
        for (target, path, query) in [
            ("http://host:1/a/b?c=d", "/a/b", Some("c=d")),
            ("http://host", "/", None),
            ("HTTP://host?x", "", Some("x")),
            ("/plain?next=http://x/y", "/plain", Some("next=http://x/y")),
            ("*", "*", None),
        ] {
            let head = head(&format!("GET {target} HTTP/1.1\r\n\r\n"));
            assert_eq!((head.path(), head.query()), (path, query), "{target}");
        }
    }

    #[test]
    fn every_prefix_of_a_good_head_is_incomplete() {
        let whole = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n";
        for cut in 0..whole.len() {
            assert!(matches!(judge(&whole[..cut], LIMIT), Verdict::Incomplete), "cut at {cut}");
        }
    }

    #[test]
    fn connections_are_kept_or_closed_as_http_says() {
        for (version, connection, kept) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: Keep-Alive\r\nConnection: Close\r\n", false),
            ("1.1", "Connection: Upgrade, HTTP2-Settings\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: keep-alive\r\n", false),
        ] {
            let head = head(&format!("GET / HTTP/{version}\r\n{connection}\r\n"));
            assert_eq!(head.keep_alive(), kept, "{version} {connection:?}");
        }
    }

    #[test]
    fn what_is_not_a_request_is_refused() {
        for (text, status) in [
            ("GET / HTTP/2.0\r\n\r\n", 505),
            ("GET / HTTP/3.0\r\n\r\n", 505),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            ("GET / HTTP/1.2\r\n\r\n", 505),
            ("GET / HTTX/1.1\r\n\r\n", 400),
            ("GET /\r\n\r\n", 400),
            ("nonsense\r\n\r\n", 400),
            ("\r\nGET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\nHost: x\n\n", 400),
            ("GET / HTTP/1.1\r\nHost: x\n", 400),
            ("GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nX: a\x7fb\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nX: a\x1b[31mb\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nÜ: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", 400),
            ("GET /ü HTTP/1.1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: abc\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length:\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chünked\r\n\r\n", 501),
            ("POST / HTTP/1.1\r\nContent-Length: ٣\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", 501),
            ("POST / HTTP/1.1\r\nExpect: miracles\r\n\r\n", 417),
        ] {
            check_refused(text.as_bytes(), status);
        }
        check_refused(b"\x16\x03\x01\x02\x00\x01\x00\x01", 400);
    }

    #[test]
    fn odd_headers_are_taken_as_they_are() {
        let bytes =
            b"GET /p?q HTTP/1.1\r\nX: caf\xe9\r\nX.Y!: a\tb\r\nX-Api-Key: \xf0\x9f\x98\x80\r\nEmpty:\r\n\r\n";
        let Verdict::Complete(head) = judge(bytes, LIMIT) else { panic!("an odd head is a head") };
        let fields: [(&str, &[u8]); 4] =
            [("X", b"caf\xe9"), ("X.Y!", b"a\tb"), ("X-Api-Key", "😀".as_bytes()), ("Empty", b"")];
        assert_eq!(head.headers().collect::<Vec<_>>(), fields);
        assert_eq!((head.header("x"), head.header("x.y!")), (Some("caf\x7f"), Some("a\tb")));
        assert_eq!(head.header("x-api-key"), Some("\x7f\x7f\x7f\x7f"));
        assert_eq!(
            (head.method(), head.path(), head.query(), head.len()),
            ("GET", "/p", Some("q"), bytes.len())
        );
    }

    #[test]
    fn sizes_are_bounded_with_and_without_an_end() {
        let endless = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(LIMIT));
        check_refused(endless.as_bytes(), 431);
        check_refused(format!("{endless}\r\n\r\n").as_bytes(), 431);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_MAX + 1));
        check_refused(many.as_bytes(), 431);
    }

    #[test]
    fn a_length_that_does_not_fit_is_a_very_large_body() {
        let head = head("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n");
        assert_eq!(head.framing(), Framing::Length(u64::MAX));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut rng = fastrand::Rng::with_seed(7);
        let good = b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n";
        for _ in 0..20_000 {
            let mut bytes = good.to_vec();
            for _ in 0..rng.usize(1..6) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            if let Verdict::Complete(head) = judge(&bytes[..rng.usize(..=bytes.len())], LIMIT) {
                let _ = (head.method(), head.path(), head.query(), head.headers().count());
            }
        }
    }
}
