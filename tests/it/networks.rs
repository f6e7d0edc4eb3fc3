//! The way to a workspace: TLS with a certificate of one's own, a proxy from the environment.

use crate::support::client::{End, Request};
use crate::support::fixtures;
use crate::support::proxy::{Proxy, Setup, token};
use crate::support::reply::Reply;
use crate::support::tls::{TlsUpstream, authority};
use crate::support::upstream::Upstream;

fn https(upstream: &TlsUpstream) -> Setup {
    let base = format!("https://127.0.0.1:{}/serving-endpoints", upstream.address().port());
    Proxy::with(&[]).and_endpoint_at(upstream.address()).endpoint(0, "api_base", base)
}

#[test]
fn a_ca_file_of_ones_own_is_trusted() {
    let upstream = TlsUpstream::start();
    let ways = [
        https(&upstream).set("tls.ca_file", authority().display()),
        https(&upstream).env("SSL_CERT_FILE", &authority().to_string_lossy()),
    ];
    for setup in ways {
        let proxy = setup.start();
        let mut client = proxy.connect();
        for _ in 0..3 {
            let answer = client.ask(&Request::stream());
            assert_eq!((answer.status(), answer.end), (200, End::Complete), "{}", answer.text());
            assert_eq!(answer.body, fixtures::transcript("text"));
        }
    }
    let head = upstream.last_head();
    assert!(
        head.starts_with("POST /serving-endpoints/anthropic/v1/messages?beta=true HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(head.to_lowercase().contains(&format!("authorization: bearer {}", token(0))), "{head}");
}

/// An answer of this many bytes with its head.
fn answer_of(bytes: usize) -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    let body = |length: usize| format!("{{\"x\":\"{}\"}}", "y".repeat(length.saturating_sub(8)));
    let whole = |length: usize| format!("{head}content-length: {length:05}\r\n\r\n{}", body(length));
    let head_bytes = whole(8).len() - 8;
    whole(bytes - head_bytes).into_bytes()
}

/// A workspace that ends an idle connection says goodbye inside TLS. Met by a request on its way, those bytes were
/// taken for the beginning of an answer, and the workspace was blamed.
#[test]
fn a_goodbye_inside_tls_is_no_answer() {
    let upstream = TlsUpstream::answering_once(answer_of(200));
    let proxy = https(&upstream).set("tls.ca_file", authority().display()).start();
    for _ in 0..4 {
        let answer = proxy.ask(&Request::message());
        assert_eq!((answer.status(), answer.header("x-claude-lb-attempts")), (200, Some("1")));
    }
    assert_eq!(proxy.number("w1", "total_errors"), 0);
}

/// Bytes behind an answer lie decrypted where nobody looked: with an answer as long as the input buffer, they became
/// the answer to somebody else's request.
#[test]
fn what_comes_behind_an_answer_inside_tls_is_nobodys_answer() {
    for bytes in [500, 8 * 1024] {
        let whole = answer_of(bytes);
        let tail =
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{\"a\":\"b\"}";
        let upstream = TlsUpstream::answering([&whole[..], tail].concat());
        let proxy = https(&upstream).set("tls.ca_file", authority().display()).start();
        for _ in 0..4 {
            let answer = proxy.ask(&Request::message());
            assert!(answer.status() == 200 && whole.ends_with(&answer.body), "{bytes}: {}", answer.text());
        }
    }
}

#[test]
fn an_unknown_authority_is_a_failure_before_any_token_is_sent() {
    let upstream = TlsUpstream::start();
    let proxy = https(&upstream).start();
    proxy.ask(&Request::message()).error(502, "api_error");
    assert_eq!(upstream.last_head(), "");
}

#[test]
fn the_proxy_of_the_environment_is_used_for_https() {
    let corporate = Upstream::always(Reply::page(403, "text/plain", "not through me"));
    let proxy_address = format!("http://{}", corporate.address());
    let setup =
        Proxy::with(&[&Upstream::start()]).endpoint(0, "api_base", "https://adb-1.example/serving-endpoints");
    let proxy = setup.set("load_balancer.max_attempts", 1).env("HTTPS_PROXY", &proxy_address).start();
    proxy.ask(&Request::message()).error(502, "api_error");
    let asked = corporate.wait_requests(1);
    assert_eq!(asked[0].request_line(), "CONNECT adb-1.example:443 HTTP/1.1");
    assert!(!asked[0].lines.join("\n").contains(&token(0)), "no token in the clear");
}

#[test]
fn no_proxy_leads_past_it() {
    let corporate = Upstream::always(Reply::page(403, "text/plain", "not through me"));
    let upstream = TlsUpstream::start();
    let setup = https(&upstream).set("tls.ca_file", authority().display());
    let setup = setup.env("HTTPS_PROXY", &format!("http://{}", corporate.address()));
    let proxy = setup.env("NO_PROXY", "localhost,127.0.0.1").start();
    assert_eq!(proxy.ask(&Request::stream()).status(), 200);
    assert_eq!(corporate.count(), 0);
}
