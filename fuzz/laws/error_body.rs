//! Error bodies: a token never leaves in a spelling that a JSON reader would undo, and a 4xx without one is not touched.

use claude_lb::anthropic::error::{Presented, error_type, meaning, present};
use serde_json::Value;

/// How often a text is read as JSON again: Databricks wraps Anthropic's words once, a gateway perhaps once more.
const WRAPPINGS_MAX: usize = 4;

/// The first line is the endpoint's token, the last two bytes choose status and type; between them is the body, in
/// which the bytes 1 to 7 stand for the token in one spelling or another.
pub fn check(input: &[u8]) {
    let Some((rest, &[kind, seed])) = input.split_last_chunk::<2>() else { return };
    let Some(end) = rest.iter().position(|byte| *byte == b'\n') else { return };
    // As the configuration guarantees it, but that stars cannot hide a token of stars.
    let token: String =
        rest[..end].iter().map(|byte| char::from(*byte)).filter(char::is_ascii_graphic).collect();
    if token.is_empty() || token.contains('*') {
        return;
    }
    let body = planted(&rest[end + 1..], &token, seed);
    let status = [400, 401, 403, 404, 422, 429, 500, 502, 503, 529][usize::from(kind % 10)];
    let content_type =
        [None, Some("application/json"), Some("text/html"), Some("")][usize::from(kind / 10 % 4)];

    meaning(status, &body);
    let shown = match present(status, content_type, &body, &token, "req_1") {
        Presented::Unchanged => {
            // What passes is a body that its reader understands.
            assert!(status < 500 || serde_json::from_slice::<Value>(&body).is_ok());
            body.clone()
        }
        Presented::Masked(bytes) => bytes,
        Presented::Wrapped(text) => {
            let tree: Value = serde_json::from_str(&text).expect("a wrapped error is JSON");
            assert_eq!(
                (&tree["type"], &tree["error"]["type"]),
                (&"error".into(), &error_type(status).into())
            );
            assert!(tree["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
            // Our own escapes can spell a token that its reader does not see.
            if token.contains(['"', '\\']) {
                let message = tree["error"]["message"].as_str().unwrap_or_default();
                return assert!(!leaks(message.as_bytes(), &token, WRAPPINGS_MAX), "{text}");
            }
            text.into_bytes()
        }
    };
    // Words of our own can spell a token that is no secret.
    let ours = [&b""[..], b"<p>"].map(|empty| present(status, content_type, empty, "", "req_1"));
    if ours.iter().any(|ours| matches!(ours, Presented::Wrapped(text) if finds(text.as_bytes(), &token))) {
        return;
    }
    let was_there = leaks(&body, &token, WRAPPINGS_MAX);
    assert!(!leaks(&shown, &token, WRAPPINGS_MAX), "{:?}", String::from_utf8_lossy(&shown));
    if status < 500
        && !was_there
        && !holds_escaped(&body, &token)
        && serde_json::from_slice::<Value>(&body).is_ok()
    {
        assert_eq!(shown, body, "a 4xx in JSON without the token passes byte for byte");
    }
}

/// The body with the token where the input wants it.
fn planted(template: &[u8], token: &str, seed: u8) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(u64::from(seed));
    let mut body = Vec::with_capacity(template.len() + 64);
    for byte in template {
        let mut once = if matches!(byte, 2..=5) { escaped(token, &mut rng) } else { String::new() };
        match byte {
            1 => body.extend_from_slice(token.as_bytes()),
            2 => body.extend_from_slice(once.as_bytes()),
            // JSON inside JSON, once to three times.
            3..=5 => {
                for _ in 2..*byte {
                    once = once.replace('\\', "\\\\").replace('"', "\\\"");
                }
                body.extend_from_slice(once.as_bytes());
            }
            6 => body.extend_from_slice(&token.as_bytes()[..token.len() / 2]),
            7 => body.extend_from_slice(
                token.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;").as_bytes(),
            ),
            other => body.push(*other),
        }
    }
    body
}

/// A text inside a JSON string: what must be escaped is, and any other character may be.
fn escaped(text: &str, rng: &mut fastrand::Rng) -> String {
    text.chars()
        .map(|c| match (c, rng.u8(..4)) {
            (c, 0) => format!("\\u{:04x}", u32::from(c)),
            (c, 1) => format!("\\u{:04X}", u32::from(c)),
            ('"' | '\\', _) | ('/', 2) => format!("\\{c}"),
            (c, _) => c.to_string(),
        })
        .collect()
}

/// True when somebody who reads the text, as it is or as JSON in JSON, comes upon the token.
fn leaks(text: &[u8], token: &str, wrappings: usize) -> bool {
    if finds(text, token) {
        return true;
    }
    if wrappings == 0 || super::keeps_raw_values(text) {
        return false;
    }
    match serde_json::from_slice::<Value>(text) {
        Ok(tree) => tree_leaks(&tree, token, wrappings - 1),
        Err(_) => false,
    }
}

fn tree_leaks(tree: &Value, token: &str, wrappings: usize) -> bool {
    match tree {
        Value::String(text) => leaks(text.as_bytes(), token, wrappings),
        Value::Array(items) => items.iter().any(|item| tree_leaks(item, token, wrappings)),
        Value::Object(members) => members.iter().any(|(key, value)| {
            leaks(key.as_bytes(), token, wrappings) || tree_leaks(value, token, wrappings)
        }),
        _ => false,
    }
}

/// A short token may be part of a word, and then is none; next to a masked one it was.
fn finds(text: &[u8], token: &str) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*');
    let token = token.as_bytes();
    text.windows(token.len()).enumerate().any(|(at, part)| {
        let is_whole =
            || !text[..at].last().is_some_and(is_word) && !text.get(at + token.len()).is_some_and(is_word);
        part == token && (token.len() >= 8 || is_whole())
    })
}

/// True when the token might stand there in a spelling that only counts inside a string that is never read as JSON,
/// or next to stars; masking it is the cautious choice.
fn holds_escaped(body: &[u8], token: &str) -> bool {
    body.iter().any(|byte| matches!(byte, b'\\' | b'*')) || finds(body, token)
}
