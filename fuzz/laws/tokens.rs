//! Counting tokens: any body gets a bounded count or the very problem that a message with it would get.

use claude_lb::anthropic::body::{Problem, scan};
use claude_lb::anthropic::tokens::estimate;
use serde_json::Value;

/// A block that names a document nobody sees is the dearest text there is, byte for byte.
const TOKENS_PER_BYTE_MAX: u64 = 300;

/// What any request costs, with the hidden prompt for tools.
const OVERHEAD_MAX: u64 = 400;

/// The count before anything was learned.
fn count(body: &[u8]) -> Result<u64, String> {
    estimate(body).map(|estimate| estimate.tokens(1.0))
}

/// The whole input is a body.
pub fn check(body: &[u8]) {
    let estimated = count(body);
    let is_about_the_text = |problem: &Problem| {
        !matches!(
            problem,
            Problem::ModelMissing
                | Problem::ModelNotString
                | Problem::ModelEmpty
                | Problem::ModelUnreadable { .. }
        )
    };
    match (&estimated, scan(body)) {
        (Ok(tokens), scanned) => {
            assert!(
                *tokens > 0 && *tokens <= OVERHEAD_MAX + TOKENS_PER_BYTE_MAX * body.len() as u64,
                "{tokens}"
            );
            assert!(
                scanned.err().is_none_or(|problem| !is_about_the_text(&problem)),
                "a broken text was counted"
            );
        }
        (Err(words), Err(problem)) if is_about_the_text(&problem) => assert_eq!(*words, problem.to_string()),
        (Err(words), _) => assert!(words.starts_with("messages: "), "{words}"),
    }
    let Ok(tree) = serde_json::from_slice::<Value>(body) else { return };
    if super::keeps_raw_values(body) {
        return;
    }
    let is_countable = tree["messages"].as_array().is_some_and(|messages| !messages.is_empty());
    assert_eq!(estimated.is_ok(), tree.is_object() && is_countable, "{estimated:?}");
    if let Ok(tokens) = estimated {
        more_text_costs_more(body, tokens);
    }
}

/// Settings cost nothing, and one more message costs something.
fn more_text_costs_more(body: &[u8], tokens: u64) {
    let end = body.iter().rposition(|byte| *byte == b'}').expect("an object has an end");
    let with = |more: &str| count(&[&body[..end], more.as_bytes(), b"}"].concat()).expect("still an object");
    assert_eq!(with(r#","max_tokens":1,"model":"m","metadata":{"user_id":"u"},"stream":true"#), tokens);
    assert_eq!(with(r#","system":"","tools":[],"messages":[{"role":"user","content":"hi"}]"#), 7);
}
