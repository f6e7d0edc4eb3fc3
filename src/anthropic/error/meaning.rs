//! What an upstream's error body says about the endpoint, where the status alone does not.
//!
//! The words are those that users of Databricks quote in public reports; none is documented. So each is matched
//! loosely, in Databricks' shape and in Anthropic's, plain or wrapped into each other.

use serde_json::Value;

use super::readable::innermost_message;

/// What an error body means beyond its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// 404: this workspace has no such model or serving endpoint; another may have it.
    ModelMissing,
    /// 403 "rate limit of 0": the workspace is not entitled to the model.
    RateLimitZero,
    /// 403: the workspace's IP access list blocks us, whatever the model.
    IpBlocked,
    /// `REQUEST_LIMIT_EXCEEDED`: a rate limit, whatever the status (it is seen with 429 and with 400).
    RequestLimitExceeded,
    /// Nothing of these.
    Other,
}

/// The part of a body in bytes that is read for its meaning; a real error is a few hundred.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Reads the meaning off an error body.
pub fn meaning(status: u16, body: &[u8]) -> Meaning {
    if !(400..500).contains(&status) || body.len() > BODY_BYTES_MAX {
        return Meaning::Other;
    }
    let Ok(text) = std::str::from_utf8(body) else { return Meaning::Other };
    let code = error_code(text).unwrap_or_default();
    let message = innermost_message(text).unwrap_or_else(|| text.trim().to_owned());
    // Only at its start: a 400 may quote the client's own words further on.
    if code == "REQUEST_LIMIT_EXCEEDED" || message.starts_with("REQUEST_LIMIT_EXCEEDED") {
        return Meaning::RequestLimitExceeded;
    }
    let message = message.to_ascii_lowercase();
    match status {
        403 if says_rate_limit_zero(&message) => Meaning::RateLimitZero,
        403 if says_ip_blocked(&message) => Meaning::IpBlocked,
        404 if says_model_missing(&code, &message) => Meaning::ModelMissing,
        _ => Meaning::Other,
    }
}

fn error_code(text: &str) -> Option<String> {
    let tree: Value = serde_json::from_str(text).ok()?;
    Some(tree.get("error_code")?.as_str()?.to_owned())
}

fn says_rate_limit_zero(message: &str) -> bool {
    message.split_once("rate limit of 0").is_some_and(|(_, rest)| {
        let mut rest = rest.chars();
        match rest.next() {
            Some('.') => !rest.next().is_some_and(|next| next.is_ascii_digit()),
            next => !next.is_some_and(|next| next.is_ascii_digit()),
        }
    })
}

fn says_ip_blocked(message: &str) -> bool {
    message.contains("ip acl")
        || message.contains("ip access list")
        || (message.contains("source ip address") && message.contains("blocked"))
}

/// A path that does not exist is the same to us: this workspace does not serve the model where we ask for it.
fn says_model_missing(code: &str, message: &str) -> bool {
    // The last one is said where a workspace has no AI Gateway.
    let is_known_code = matches!(code, "RESOURCE_DOES_NOT_EXIST" | "ENDPOINT_NOT_FOUND" | "FEATURE_DISABLED");
    let names_it = message.contains("model") || message.contains("endpoint");
    let is_gone = ["not exist", "not found", "no such"].iter().any(|words| message.contains(words));
    // Anthropic says `model: <name>` and nothing else.
    is_known_code || message.starts_with("model:") || (names_it && is_gone && !message.starts_with('<'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::samples;

    #[test]
    fn the_captured_errors() {
        let table = [
            ("anthropic-404.json", Meaning::ModelMissing),
            ("databricks-404.json", Meaning::ModelMissing),
            ("databricks-403-rate-limit-zero.json", Meaning::RateLimitZero),
            ("databricks-429.json", Meaning::RequestLimitExceeded),
        ];
        for (path, body) in samples::files("responses/errors", "") {
            let name = path.rsplit('/').next().unwrap();
            let status: u16 = name.split('-').nth(1).unwrap()[..3].parse().unwrap();
            let listed = table.iter().find(|(listed, _)| *listed == name);
            assert_eq!(
                meaning(status, &body),
                listed.map_or(Meaning::Other, |(_, meaning)| *meaning),
                "{name}"
            );
        }
    }

    #[test]
    fn words_and_wrappings() {
        let limit = r#"{"error_code":"REQUEST_LIMIT_EXCEEDED","message":"slow down"}"#;
        let table = [
            (400, limit, Meaning::RequestLimitExceeded),
            (429, limit, Meaning::RequestLimitExceeded),
            (500, limit, Meaning::Other),
            (400, r#"{"message":"REQUEST_LIMIT_EXCEEDED: Exceeded"}"#, Meaning::RequestLimitExceeded),
            (
                400,
                r#"{"error_code":"BAD_REQUEST","message":"{\"message\":\"REQUEST_LIMIT_EXCEEDED: x\"}"}"#,
                Meaning::RequestLimitExceeded,
            ),
            (400, "REQUEST_LIMIT_EXCEEDED: plain", Meaning::RequestLimitExceeded),
            (400, r#"{"message":"tool REQUEST_LIMIT_EXCEEDED is unknown"}"#, Meaning::Other),
            (
                403,
                r#"{"type":"error","error":{"type":"permission_error","message":"Databricks-set rate limit of 0."}}"#,
                Meaning::RateLimitZero,
            ),
            (403, r#"{"message":"a rate limit of 0"}"#, Meaning::RateLimitZero),
            (403, r#"{"message":"a rate limit of 0.5"}"#, Meaning::Other),
            (429, r#"{"message":"a rate limit of 0"}"#, Meaning::Other),
            (
                403,
                r#"{"error_code":"PERMISSION_DENIED","message":"Source IP address: 10.0.0.1 is blocked by Databricks IP ACL for workspace: 1"}"#,
                Meaning::IpBlocked,
            ),
            (403, "Source IP address: 10.0.0.1 is blocked", Meaning::IpBlocked),
            (
                404,
                r#"{"error_code":"ENDPOINT_NOT_FOUND","message":"Endpoint x is not there"}"#,
                Meaning::ModelMissing,
            ),
            (
                404,
                r#"{"error_code":"NOT_FOUND","message":"{\"message\":\"Model x does not exist\"}"}"#,
                Meaning::ModelMissing,
            ),
            (404, r#"{"error":{"type":"not_found_error","message":"model: x"}}"#, Meaning::ModelMissing),
            (
                404,
                r#"{"error_code":"FEATURE_DISABLED","message":"The preview is not enabled"}"#,
                Meaning::ModelMissing,
            ),
            (404, r#"{"message":"Not Found"}"#, Meaning::Other),
            (404, "<html>endpoint not found</html>", Meaning::Other),
            (404, "", Meaning::Other),
            (400, r#"{"message":"model: x"}"#, Meaning::Other),
        ];
        for (status, body, wanted) in table {
            assert_eq!(meaning(status, body.as_bytes()), wanted, "{status} {body}");
        }
    }
}
