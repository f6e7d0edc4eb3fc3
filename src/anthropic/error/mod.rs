//! How an error looks to the client, and what an upstream's error means.
//!
//! Claude Code repairs itself from the words of a 4xx, so those pass byte for byte; only what no client could read
//! is put into Anthropic's shape. A workspace token never leaves in an error body. Nothing here decides what to do
//! about an error: `outcome` and `retry` do, from the [`Meaning`].

mod meaning;
mod readable;
mod token;

pub use meaning::{Meaning, meaning};
pub(super) use readable::innermost_message;

use serde::Serialize;
use serde_json::Value;

use crate::anthropic::json::Cursor;

/// Anthropic's error type for a status, from its API reference. A 503 of an upstream is an `api_error`: the clients
/// take `overloaded_error` for a 529 and give up sooner. "No available endpoints" names its type itself.
pub fn error_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        409 => "conflict_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// The status that an error event inside a stream would have had; 500 for a type we do not know.
pub fn status_of_error_type(kind: &str) -> u16 {
    match kind {
        "invalid_request_error" => 400,
        "authentication_error" => 401,
        "billing_error" => 402,
        "permission_error" => 403,
        "not_found_error" => 404,
        "conflict_error" => 409,
        "request_too_large" => 413,
        "rate_limit_error" => 429,
        "timeout_error" => 504,
        "overloaded_error" => 529,
        _ => 500,
    }
}

/// Anthropic's error body.
pub fn error_body(kind: &str, message: &str, request_id: &str) -> String {
    envelope(kind, message, Some(request_id))
}

/// Anthropic's error event for a stream whose 200 is out already, blank line included.
pub fn error_event(kind: &str, message: &str) -> String {
    format!("event: error\ndata: {}\n\n", envelope(kind, message, None))
}

fn envelope(kind: &str, message: &str, request_id: Option<&str>) -> String {
    let words = Words { kind, message };
    serde_json::to_string(&Envelope { kind: "error", error: words, request_id })
        .expect("texts always serialise")
}

#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    error: Words<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct Words<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    message: &'a str,
}

/// What the client gets of an upstream's error body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presented {
    /// The upstream's own bytes.
    Unchanged,
    /// The upstream's own bytes, but for the token.
    Masked(Vec<u8>),
    /// A body in Anthropic's shape, to be sent as `application/json` with the upstream's status.
    Wrapped(String),
}

/// Decides what the client gets of an upstream's error body. JSON with a 4xx passes whatever its shape, and so does
/// a 5xx in Anthropic's; a page, an empty body and other 5xx are wrapped, with the original text as message. `token`
/// is the endpoint's, masked wherever it stands.
pub fn present(
    status: u16,
    content_type: Option<&str>,
    body: &[u8],
    token: &str,
    request_id: &str,
) -> Presented {
    let masked = token::mask(body, token);
    let body = masked.as_deref().unwrap_or(body);
    let passes = if status < 500 { is_json(body) } else { is_anthropic_error(body) };
    match masked {
        Some(masked) if passes => Presented::Masked(masked),
        None if passes => Presented::Unchanged,
        _ => {
            let message = readable::message(status, content_type, body);
            // Decoding may have put a token together that the bytes did not show.
            let message = match token::mask(message.as_bytes(), token) {
                Some(masked) => String::from_utf8_lossy(&masked).into_owned(),
                None => message,
            };
            Presented::Wrapped(error_body(error_type(status), &message, request_id))
        }
    }
}

fn is_json(body: &[u8]) -> bool {
    let mut cursor = Cursor::new(body);
    std::str::from_utf8(body).is_ok() && cursor.value().and_then(|_| cursor.end()).is_ok()
}

/// True for `{"type":"error","error":{"type":"...","message":"..."}}`, with whatever else in it.
fn is_anthropic_error(body: &[u8]) -> bool {
    serde_json::from_slice::<Value>(body).is_ok_and(|tree| {
        tree["type"] == "error" && tree["error"]["type"].is_string() && tree["error"]["message"].is_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::samples;
    use serde_json::json;

    const TOKEN: &str = "dapi0123456789abcdef";

    #[test]
    fn types_and_statuses() {
        let table = [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (402, "billing_error"),
            (403, "permission_error"),
            (404, "not_found_error"),
            (409, "conflict_error"),
            (413, "request_too_large"),
            (429, "rate_limit_error"),
            (500, "api_error"),
            (504, "timeout_error"),
            (529, "overloaded_error"),
        ];
        for (status, kind) in table {
            assert_eq!(error_type(status), kind);
            assert_eq!(status_of_error_type(kind), status);
        }
        for (status, kind) in
            [(405, "invalid_request_error"), (408, "invalid_request_error"), (502, "api_error")]
        {
            assert_eq!(error_type(status), kind);
        }
        assert_eq!(error_type(503), "api_error");
        assert_eq!(status_of_error_type("invented_error"), 500);
    }

    #[test]
    fn the_shapes() {
        assert_eq!(
            error_body("api_error", "say \"no\"\n", "req_1"),
            r#"{"type":"error","error":{"type":"api_error","message":"say \"no\"\n"},"request_id":"req_1"}"#
        );
        assert_eq!(
            error_event("overloaded_error", "two\nlines"),
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"two\\nlines\"}}\n\n"
        );
    }

    /// The message inside an Anthropic error body, whose other fields must fit the status.
    fn wrapped(presented: Presented, status: u16) -> String {
        let Presented::Wrapped(body) = presented else { panic!("{presented:?} is not wrapped") };
        let body: Value = serde_json::from_str(&body).unwrap();
        let message = body["error"]["message"].as_str().unwrap().to_owned();
        let kind = error_type(status);
        assert_eq!(
            body,
            json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"})
        );
        message
    }

    #[test]
    fn the_captured_errors() {
        for (name, body) in samples::files("responses/errors", "") {
            let status: u16 = name.split('-').nth(1).unwrap()[..3].parse().unwrap();
            let presented = present(status, Some("application/json"), &body, TOKEN, "req_1");
            match name.ends_with(".html") {
                true => {
                    let message = wrapped(presented, status);
                    assert_eq!(message, "503 503 Service Unavailable upstream connect error");
                }
                false => assert_eq!(presented, Presented::Unchanged, "{name}"),
            }
        }
    }

    #[test]
    fn what_passes() {
        let table = [
            (400, r#"{"detail":"no"}"#),
            (400, "null"),
            (422, "[1, 2]"),
            (404, " \"gone\" \n"),
            (500, r#"{"error":{"message":"m","type":"t","x":1},"request_id":null,"type":"error"}"#),
        ];
        for (status, body) in table {
            let presented = present(status, Some("text/html"), body.as_bytes(), TOKEN, "req_1");
            assert_eq!(presented, Presented::Unchanged, "{body}");
        }
    }

    #[test]
    fn what_is_wrapped() {
        let check = |status, content_type, body: &str, message: &str| {
            let presented = present(status, content_type, body.as_bytes(), TOKEN, "req_1");
            assert_eq!(wrapped(presented, status), message, "{body}");
        };
        let html = Some("text/html; charset=utf-8");
        let json = Some("application/json");

        check(502, html, "", "the upstream answered 502 without a body");
        check(400, None, " \n", "the upstream answered 400 without a body");
        check(502, html, "<html></html>", "the upstream answered 502 with a page that has no text");
        check(403, html, "<p>Sign&nbsp;in &amp; wait</p>", "Sign in & wait");
        check(404, Some("text/plain"), "no <such> thing", "no <such> thing");
        check(400, json, r#"{"message": "cut"#, r#"{"message": "cut"#);
        check(503, json, r#"{"error_code":"TEMPORARILY_UNAVAILABLE","message":"later"}"#, "later");
        check(500, json, r#"{"error_code":"X","message":"{\"message\": \"inner\"}"}"#, "inner");
        check(500, json, r#"{"error":{"type":"t","message":"no envelope"}}"#, "no envelope");
        check(500, json, r#"{"detail":"from a framework"}"#, "from a framework");
        check(500, json, r#"{"a":[1]}"#, r#"{"a":[1]}"#);
        check(500, json, r#"{"message":""}"#, r#"{"message":""}"#);
    }

    #[test]
    fn a_token_never_leaves() {
        let body = format!(r#"{{"message":"Bearer {TOKEN} is invalid"}}"#);
        let masked = present(403, None, body.as_bytes(), TOKEN, "req_1");
        assert_eq!(masked, Presented::Masked(br#"{"message":"Bearer *** is invalid"}"#.to_vec()));

        let page = format!("<p>Bearer {TOKEN}</p>");
        assert_eq!(wrapped(present(502, None, page.as_bytes(), TOKEN, "req_1"), 502), "Bearer ***");
        let page = b"<p>dapi0123&amp;4567</p>";
        assert_eq!(wrapped(present(502, None, page, "dapi0123&4567", "req_1"), 502), "***");
    }

    #[test]
    fn mutated_errors_never_panic() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        let errors = samples::files("responses/errors", "");
        for _ in 0..4_000 {
            let (name, body) = rng.choice(&errors).unwrap();
            let mut body = samples::mutate(body, &mut rng);
            if rng.bool() {
                body.splice(body.len() / 2..body.len() / 2, TOKEN.bytes());
            }
            let status = *rng.choice(&[400, 403, 404, 429, 500, 503]).unwrap();
            meaning(status, &body);
            let shown = match present(status, None, &body, TOKEN, "req_1") {
                Presented::Unchanged => body,
                Presented::Masked(bytes) => bytes,
                Presented::Wrapped(text) => text.into_bytes(),
            };
            assert!(memchr::memmem::find(&shown, TOKEN.as_bytes()).is_none(), "{name} seed {seed}");
        }
    }
}
