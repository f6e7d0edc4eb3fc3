//! What becomes of a workspace's error page on its way to the client.

use crate::support::client::Request;
use crate::support::proxy::{Proxy, token};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;

fn plain_and_streaming(work: impl Fn(&Request) + Sync) {
    crate::support::together(2, |index| {
        work(&if index == 0 { Request::message() } else { Request::stream() })
    });
}

#[test]
fn an_html_error_page_becomes_an_anthropic_error() {
    plain_and_streaming(|request| {
        let upstream = Upstream::always(Reply::error(503, "databricks-503.html"));
        let proxy = Proxy::with(&[&upstream]).start();
        let answer = proxy.ask(request);
        let body = answer.json();
        assert_eq!((answer.status(), body["type"].as_str()), (503, Some("error")));
        let message = body["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("upstream connect error"), "{message}");
        assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
    });
}

#[test]
fn an_empty_error_becomes_an_anthropic_error() {
    plain_and_streaming(|request| {
        let upstream = Upstream::always(Reply::page(500, "", ""));
        let proxy = Proxy::with(&[&upstream]).start();
        assert!(!proxy.ask(request).error(500, "api_error").is_empty());
    });
}

#[test]
fn a_server_error_of_another_shape_is_wrapped_with_its_words() {
    let upstream =
        Upstream::always(Reply::json(500, r#"{"error_code":"INTERNAL_ERROR","message":"lost my way"}"#));
    let proxy = Proxy::with(&[&upstream]).start();
    assert!(proxy.ask(&Request::message()).error(500, "api_error").contains("lost my way"));
}

#[test]
fn a_client_error_that_is_no_json_is_wrapped_with_its_words() {
    let upstream = Upstream::always(Reply::page(400, "text/plain", "the request was no good"));
    let proxy = Proxy::with(&[&upstream]).start();
    let message = proxy.ask(&Request::message()).error(400, "invalid_request_error");
    assert!(message.contains("the request was no good"), "{message}");
}

#[test]
fn a_token_quoted_in_an_error_body_is_masked() {
    for status in [400, 403, 500] {
        let body = format!(r#"{{"error_code":"X","message":"token {} is not welcome"}}"#, token(0));
        let upstream = Upstream::always(Reply::json(status, body));
        let proxy = Proxy::with(&[&upstream]).start();
        let answer = proxy.ask(&Request::message());
        assert_eq!(answer.status(), status);
        assert!(!answer.text().contains(&token(0)), "{}", answer.text());
        assert!(answer.text().contains("is not welcome"), "{}", answer.text());
    }
}
