//! The place that a refusal names.

use crate::anthropic::error::innermost_message;

/// A real error body is a few hundred bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// The words behind the place, the same for every field that the validator does not know.
const WORDS: &str = ": Extra inputs are not permitted";

/// The place that the body of a 400 refuses as an extra input, in Anthropic's notation
/// (`tools.3.custom.defer_loading`); of several the first. The words may stand plain or inside Databricks' envelope.
pub fn rejected_path(body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok().filter(|text| text.len() <= BODY_BYTES_MAX)?;
    let message = innermost_message(text).unwrap_or_else(|| text.to_owned());
    let mut places = message.match_indices(WORDS).filter_map(|(at, _)| {
        let place = message[..at].rsplit(|c: char| !is_part(c)).next()?;
        (!place.is_empty() && place.split('.').all(|step| !step.is_empty())).then(|| place.to_owned())
    });
    places.next()
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_in_every_wrapping() {
        let plain = |message: &str| {
            serde_json::json!({"type": "error", "error": {"type": "invalid_request_error", "message": message}})
                .to_string()
        };
        let wrapped = |message: &str| {
            let inner = serde_json::json!({ "message": message }).to_string();
            serde_json::json!({"error_code": "BAD_REQUEST", "message": inner}).to_string()
        };
        let twice = |message: &str| {
            serde_json::json!({"error_code": "BAD_REQUEST", "message": plain(message)}).to_string()
        };
        let table = [
            ("context_management: Extra inputs are not permitted", Some("context_management")),
            ("output_config: Extra inputs are not permitted", Some("output_config")),
            ("messages.1.output_config: Extra inputs are not permitted", Some("messages.1.output_config")),
            (
                "system.2.cache_control.ephemeral.scope: Extra inputs are not permitted",
                Some("system.2.cache_control.ephemeral.scope"),
            ),
            (
                "tools.3.custom.defer_loading: Extra inputs are not permitted",
                Some("tools.3.custom.defer_loading"),
            ),
            ("a.b: Extra inputs are not permitted\nc: Extra inputs are not permitted", Some("a.b")),
            // A sign of more than one byte right before the place was cut through.
            ("\u{201c}a.b: Extra inputs are not permitted\u{201d}", Some("a.b")),
            ("BAD_REQUEST: `thinking.adaptive.display`: Extra inputs are not permitted", None),
            ("BAD_REQUEST: thinking.display: Extra inputs are not permitted", Some("thinking.display")),
            (
                "thinking: Input tag 'adaptive' found using 'type' does not match any of the expected tags",
                None,
            ),
            ("messages: Unexpected role \"system\".", None),
            ("thinking.enabled.budget_tokens: Field required", None),
            ("`max_tokens` must be greater than `thinking.budget_tokens`", None),
            (": Extra inputs are not permitted", None),
            ("a..b: Extra inputs are not permitted", None),
            ("", None),
        ];
        for (message, wanted) in table {
            for body in [plain(message), wrapped(message), twice(message)] {
                assert_eq!(rejected_path(body.as_bytes()).as_deref(), wanted, "{body}");
            }
        }
        assert_eq!(rejected_path(b"\xff: Extra inputs are not permitted"), None);
        let bare = rejected_path(b"context_management: Extra inputs are not permitted");
        assert_eq!(bare.as_deref(), Some("context_management"));
    }
}
