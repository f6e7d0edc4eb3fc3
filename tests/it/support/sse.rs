//! Event streams in Anthropic's format: made for upstreams, taken apart for assertions.

use serde_json::{Value, json};

/// One event, with the name the API gives it (the `type` of its data).
pub fn event(data: &Value) -> Vec<u8> {
    let name = data["type"].as_str().expect("every event has a type");
    format!("event: {name}\ndata: {data}\n\n").into_bytes()
}

pub fn message_start(id: &str) -> Vec<u8> {
    event(&json!({"type": "message_start", "message": {"id": id, "type": "message", "role": "assistant",
        "model": "databricks-claude-sonnet-4-5", "content": [], "stop_reason": null, "stop_sequence": null,
        "usage": {"input_tokens": 9, "output_tokens": 1}}}))
}

pub fn ping() -> Vec<u8> {
    event(&json!({"type": "ping"}))
}

pub fn block_start() -> Vec<u8> {
    event(&json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}))
}

pub fn delta(text: &str) -> Vec<u8> {
    event(&json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}))
}

/// The end of the only block, of the message, of the stream.
pub fn ending() -> Vec<u8> {
    [
        event(&json!({"type": "content_block_stop", "index": 0})),
        event(&json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
            "usage": {"output_tokens": 5}})),
        event(&json!({"type": "message_stop"})),
    ]
    .concat()
}

pub fn error(kind: &str) -> Vec<u8> {
    event(&json!({"type": "error", "error": {"type": kind, "message": "scripted failure"}}))
}

/// A whole message with one text block.
pub fn message(id: &str, text: &str) -> Vec<u8> {
    [message_start(id), block_start(), delta(text), ending()].concat()
}

/// The events of a stream, each with the blank line that ends it; a last unfinished one as it stands.
pub fn split(stream: &[u8]) -> Vec<&[u8]> {
    let mut events = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let end = (1..=rest.len())
            .find(|&end| rest[..end].ends_with(b"\n\n") || rest[..end].ends_with(b"\r\n\r\n"))
            .unwrap_or(rest.len());
        let (event, later) = rest.split_at(end);
        events.push(event);
        rest = later;
    }
    events
}

/// The `event:` names in order; a comment counts as `:`, and an event without a name as an empty text.
pub fn names(stream: &[u8]) -> Vec<String> {
    let name = |event: &&[u8]| {
        let text = String::from_utf8_lossy(event);
        if text.starts_with(':') {
            return ":".to_owned();
        }
        text.lines().find_map(|line| line.strip_prefix("event: ")).unwrap_or_default().to_owned()
    };
    split(stream).iter().map(name).collect()
}

/// The JSON of the first event with this name.
pub fn data_of(stream: &[u8], name: &str) -> Option<Value> {
    split(stream).into_iter().find_map(|event| {
        let text = String::from_utf8_lossy(event);
        text.lines().any(|line| line == format!("event: {name}")).then(|| {
            let data = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or("null");
            serde_json::from_str(data).expect("the data of an event is JSON")
        })
    })
}

/// The stream without its pings, which the proxy may add where the upstream was silent.
pub fn without_pings(stream: &[u8]) -> Vec<u8> {
    let is_ping = |event: &&[u8]| event.starts_with(b"event: ping");
    split(stream).into_iter().filter(|event| !is_ping(event)).flatten().copied().collect()
}
