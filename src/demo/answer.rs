//! What a fake workspace writes: events and messages in Anthropic's shape, errors as Databricks sends them. Pure.

use serde_json::{Value, json};

use crate::anthropic::error::{error_body, error_event};
use crate::http::answer::{self, Answer};

/// What an answer is about.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Counts the answers of the demo; makes the ids.
    pub(super) serial: usize,
    /// The model as the request named it.
    pub(super) model: String,
    /// The input, as the token estimate has it.
    pub(super) input_tokens: u64,
}

impl Facts {
    /// A message in the order of keys that Anthropic writes; without a text, one that has only begun.
    fn message(&self, text: Option<&str>) -> String {
        let content =
            text.map_or_else(String::new, |text| format!(r#"{{"type":"text","text":{}}}"#, quoted(text)));
        let stop_reason = if text.is_some() { r#""end_turn""# } else { "null" };
        format!(
            r#"{{"id":"msg_demo_{:06}","type":"message","role":"assistant","model":{},"content":[{content}],"stop_reason":{stop_reason},"stop_sequence":null,"usage":{}}}"#,
            self.serial,
            quoted(&self.model),
            self.usage(text),
        )
    }

    /// Most of a conversation is read from the prompt cache, as with the real thing.
    fn usage(&self, text: Option<&str>) -> String {
        let (read, written) = (self.input_tokens * 9 / 10, self.input_tokens / 20);
        let input = self.input_tokens - read - written;
        let output = text.map_or(1, |text| words(text).count() * 4 / 3 + 1);
        format!(
            r#"{{"input_tokens":{input},"cache_creation_input_tokens":{written},"cache_read_input_tokens":{read},"cache_creation":{{"ephemeral_5m_input_tokens":{written},"ephemeral_1h_input_tokens":0}},"output_tokens":{output},"service_tier":"standard"}}"#
        )
    }

    fn request_id(&self) -> String {
        format!("req_demo_{:06}", self.serial)
    }
}

/// The words of a text, each with the blank behind it: one delta each.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(' ')
}

/// The head of a stream.
pub(super) fn stream_head(facts: &Facts) -> String {
    let mut head = String::new();
    answer::start(&mut head, 200);
    answer::field(&mut head, "content-type", "text/event-stream; charset=utf-8");
    answer::field(&mut head, "cache-control", "no-cache");
    answer::field(&mut head, "request-id", facts.request_id());
    answer::field(&mut head, "transfer-encoding", "chunked");
    answer::finish(&mut head, false);
    head
}

/// The first event.
pub(super) fn message_start(facts: &Facts) -> String {
    event("message_start", &format!(r#","message":{}"#, facts.message(None)))
}

/// What stands between `message_start` and the first word.
pub(super) fn opening() -> String {
    event("ping", "")
        + &event("content_block_start", r#","index":0,"content_block":{"type":"text","text":""}"#)
}

/// A piece of the text.
pub(super) fn delta(text: &str) -> String {
    let delta = format!(r#","index":0,"delta":{{"type":"text_delta","text":{}}}"#, quoted(text));
    event("content_block_delta", &delta)
}

/// What stands behind the last word.
pub(super) fn closing(facts: &Facts, text: &str) -> String {
    let usage = facts.usage(Some(text));
    let delta = format!(r#","delta":{{"stop_reason":"end_turn","stop_sequence":null}},"usage":{usage}"#);
    event("content_block_stop", r#","index":0"#)
        + &event("message_delta", &delta)
        + &event("message_stop", "")
}

/// The only event of a stream that fails at once.
pub(super) fn overloaded_event() -> String {
    error_event("overloaded_error", "Overloaded")
}

/// A whole message.
pub(super) fn message(facts: &Facts, text: &str) -> Answer {
    Answer::json(200, facts.message(Some(text))).with("request-id", facts.request_id())
}

/// 529.
pub(super) fn overloaded(facts: &Facts) -> Answer {
    Answer::json(529, error_body("overloaded_error", "Overloaded", &facts.request_id()))
        .with("request-id", facts.request_id())
}

/// 503, with the page of the gateway in front of a workspace.
pub(super) fn unavailable() -> Answer {
    let page = "<!doctype html><html><head><title>503</title></head><body><h1>503 Service Unavailable</h1>\
                <p>upstream connect error</p></body></html>";
    Answer { status: 503, headers: vec![("content-type".into(), "text/html".into())], body: page.into() }
}

/// A mistake of whoever asks, in Databricks' shape.
pub(super) fn refusal(status: u16, code: &str, message: &str) -> Answer {
    Answer::json(status, json!({ "error_code": code, "message": message }).to_string())
}

/// `more` is what the data holds besides its type, beginning with a comma.
fn event(name: &str, more: &str) -> String {
    format!("event: {name}\ndata: {{\"type\":\"{name}\"{more}}}\n\n")
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::sse::{End, Scanner, usage_of_message};

    fn facts() -> Facts {
        Facts { serial: 7, model: "databricks-claude-sonnet-4-5".into(), input_tokens: 1000 }
    }

    #[test]
    fn the_proxys_scanner_takes_a_stream_for_a_whole_one() {
        let text = "Hello from workspace-1. All is \"well\".";
        let deltas: String = words(text).map(delta).collect();
        let stream = message_start(&facts()) + &opening() + &deltas + &closing(&facts(), text);
        let mut scanner = Scanner::new();
        scanner.feed(stream.as_bytes());
        assert!(scanner.message_started() && scanner.content_started() && scanner.at_event_boundary());
        assert!(matches!(scanner.end(), Some(End::Stop)), "{:?}", scanner.end());
        for data in stream.lines().filter_map(|line| line.strip_prefix("data: ")) {
            assert!(serde_json::from_str::<Value>(data).is_ok(), "{data}");
        }
        let usage = scanner.usage();
        assert_eq!((usage.input_tokens, usage.output_tokens), (Some(50), Some(9)));
        assert_eq!(usage.cache_read_input_tokens, Some(900));
        assert_eq!(words(text).collect::<String>(), text);
    }

    #[test]
    fn a_message_is_whole_json_with_the_same_usage() {
        let answer = message(&facts(), "Hi.");
        let value: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(
            (&value["content"][0]["text"], &value["stop_reason"]),
            (&json!("Hi."), &json!("end_turn"))
        );
        assert_eq!(
            usage_of_message(&answer.body).and_then(|usage| usage.cache_creation_input_tokens),
            Some(50)
        );
    }

    #[test]
    fn an_error_event_is_no_content() {
        let mut scanner = Scanner::new();
        scanner.feed(overloaded_event().as_bytes());
        assert!(matches!(scanner.end(), Some(End::Error { .. })) && !scanner.content_started());
    }
}
