//! What hostile and broken clients send, and what each gets. The same table stands in `docs/RELIABILITY.md`; a test
//! compares the two, and the soak sends from it at random.

use super::client::KEY;

/// What becomes of the connection after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It ends.
    Closes,
    /// Another request is served on it.
    Lives,
}

/// One row of the table.
pub struct Row {
    /// In the words of the documentation.
    pub what: &'static str,
    pub sends: Vec<u8>,
    pub status: u16,
    pub then: Then,
}

const BODY: &str = r#"{"model":"claude-sonnet-4-5","messages":[]}"#;

/// A message request with these header lines and whatever follows the head.
fn post(lines: &str, rest: &str) -> Vec<u8> {
    format!("POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\n{lines}\r\n{rest}").into_bytes()
}

fn get(line: &str, headers: &str) -> Vec<u8> {
    format!("{line}\r\nHost: x\r\n{headers}\r\n").into_bytes()
}

fn chunked(rest: &str) -> Vec<u8> {
    post("Transfer-Encoding: chunked\r\n", rest)
}

/// All rows. The limit on bodies is that of the default configuration.
pub fn rows() -> Vec<Row> {
    use Then::{Closes, Lives};
    let row = |what, sends: Vec<u8>, status, then| Row { what, sends, status, then };
    let whole = format!("{:x}\r\n{BODY}\r\n", BODY.len());
    let length = |value: &str| post(&format!("Content-Length: {value}\r\n"), BODY);
    let hello = [b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03".as_slice(), &[7; 200]].concat();
    let large_chunks = format!("10000\r\n{}\r\n", "y".repeat(0x10000)).repeat(80);
    vec![
        // Heads that are too large or never end.
        row("a request line that never ends", format!("GET /{}", "y".repeat(1 << 20)).into(), 431, Closes),
        row(
            "one header of 1 MB",
            get("GET /health HTTP/1.1", &format!("X: {}\r\n", "y".repeat(1 << 20))),
            431,
            Closes,
        ),
        row("20,000 headers", get("GET /health HTTP/1.1", &"X-Many: 1\r\n".repeat(20_000)), 431, Closes),
        row("129 headers", get("GET /health HTTP/1.1", &"X-Many: 1\r\n".repeat(129)), 431, Closes),
        row(
            "header lines that never end",
            format!("GET /health HTTP/1.1\r\n{}", "X: y\r\n".repeat(200_000)).into(),
            431,
            Closes,
        ),
        // What is not HTTP/1.
        row("a TLS hello", hello, 400, Closes),
        row("another protocol's banner", b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec(), 400, Closes),
        row("a lone blank line", b"\r\n\r\n".to_vec(), 400, Closes),
        row("a method and nothing else", b"GET\r\n\r\n".to_vec(), 400, Closes),
        row("HTTP/0.9: no version", b"GET /health\r\n\r\n".to_vec(), 400, Closes),
        row("two spaces in the request line", get("GET  /health HTTP/1.1", ""), 400, Closes),
        row("a space before the method", get(" GET /health HTTP/1.1", ""), 400, Closes),
        row("a null byte in the request line", get("GET /hea\0lth HTTP/1.1", ""), 400, Closes),
        row("a null byte in a header's name", get("GET /health HTTP/1.1", "X\0Y: 1\r\n"), 400, Closes),
        row("a null byte in a header's value", get("GET /health HTTP/1.1", "X: 1\x002\r\n"), 400, Closes),
        row("a line without a carriage return", b"GET /health HTTP/1.1\nHost: x\n\n".to_vec(), 400, Closes),
        row("a folded header", get("GET /health HTTP/1.1", "X: 1\r\n folded: yes\r\n"), 400, Closes),
        row("a space before the colon", get("GET /health HTTP/1.1", "X : 1\r\n"), 400, Closes),
        row("a header without a colon", get("GET /health HTTP/1.1", "no colon\r\n"), 400, Closes),
        // Versions.
        row("an HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), 505, Closes),
        row("HTTP/2.0 in a request line", get("GET /health HTTP/2.0", ""), 505, Closes),
        row("HTTP/3.0 in a request line", get("POST /v1/messages HTTP/3.0", ""), 505, Closes),
        row("HTTP/1.2", get("GET /health HTTP/1.2", ""), 505, Closes),
        row("HTTP/1.0", get("GET /health HTTP/1.0", ""), 200, Closes),
        row(
            "HTTP/1.0 with chunks",
            get("POST /v1/messages HTTP/1.0", "Transfer-Encoding: chunked\r\n"),
            400,
            Closes,
        ),
        // Lengths that two parsers could read differently.
        row(
            "Content-Length and Transfer-Encoding",
            post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            400,
            Closes,
        ),
        row(
            "Content-Length twice, equal",
            post("Content-Length: 43\r\nContent-Length: 43\r\n", BODY),
            400,
            Closes,
        ),
        row(
            "Content-Length twice, different",
            post("Content-Length: 43\r\nContent-Length: 5\r\n", BODY),
            400,
            Closes,
        ),
        row("Content-Length as a list", length("43, 43"), 400, Closes),
        row("Content-Length with a plus", length("+43"), 400, Closes),
        row("Content-Length with a minus", length("-43"), 400, Closes),
        row("Content-Length in hexadecimal", length("0x2b"), 400, Closes),
        row("Content-Length that is a word", length("many"), 400, Closes),
        row("an empty Content-Length", length(""), 400, Closes),
        row("Content-Length of 2^64 - 1", length("18446744073709551615"), 413, Closes),
        row("Content-Length of 30 digits", length(&"9".repeat(30)), 413, Closes),
        row(
            "Transfer-Encoding: gzip, chunked",
            post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
            501,
            Closes,
        ),
        row("Transfer-Encoding: identity", post("Transfer-Encoding: identity\r\n", ""), 501, Closes),
        // Chunks.
        row(
            "chunks with extensions",
            chunked(&format!("{:x};ext=\"a b\"\r\n{BODY}\r\n0\r\n\r\n", BODY.len())),
            200,
            Lives,
        ),
        row("chunks with trailers", chunked(&format!("{whole}0\r\nX-Trailer: 1\r\n\r\n")), 200, Lives),
        row(
            "chunks with a second request behind them",
            chunked(&format!("{whole}0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")),
            200,
            Closes,
        ),
        row("trailers of 100 KB", chunked(&format!("0\r\n{}\r\n", "X: y\r\n".repeat(17_000))), 400, Closes),
        row("a chunk extension of 100 KB", chunked(&format!("1;{}", "x".repeat(100_000))), 400, Closes),
        row("a chunk size that is no number", chunked("zz\r\n{}\r\n0\r\n\r\n"), 400, Closes),
        row("a negative chunk size", chunked("-2\r\n{}\r\n0\r\n\r\n"), 400, Closes),
        row("a chunk size of 2^68", chunked("100000000000000000\r\n{}\r\n"), 400, Closes),
        row("a chunk size line of 100 KB", chunked(&format!("{}\r\n", "0".repeat(100_000))), 400, Closes),
        row("a chunk without its line end", chunked("2\r\n{}garbage"), 400, Closes),
        row("chunks beyond the limit on bodies", chunked(&large_chunks), 413, Closes),
        // Expectations.
        row("Expect: miracles", post("Expect: miracles\r\nContent-Length: 43\r\n", BODY), 417, Closes),
        row(
            "Expect: 100-continue and 900 MB",
            post("Expect: 100-continue\r\nContent-Length: 900000000\r\n", ""),
            413,
            Closes,
        ),
        // Well formed, but unusual.
        row(
            "a second request behind the first",
            [get("GET /health HTTP/1.1", ""), get("GET /stats HTTP/1.1", "")].concat(),
            200,
            Closes,
        ),
        row("an absolute URL in the request line", get("GET http://x:8000/health HTTP/1.1", ""), 200, Lives),
        row("CONNECT", get("CONNECT adb-1.example:443 HTTP/1.1", ""), 404, Lives),
        row("OPTIONS *", get("OPTIONS * HTTP/1.1", ""), 404, Lives),
        row("an unknown method", get("BREW /health HTTP/1.1", ""), 405, Lives),
        row("a method in lower case", get("get /health HTTP/1.1", ""), 405, Lives),
        row("a path that climbs", get("GET /health/../../etc/passwd HTTP/1.1", ""), 404, Lives),
        row(
            "Upgrade: h2c",
            get("GET /health HTTP/1.1", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"),
            200,
            Closes,
        ),
    ]
}
