//! Request bodies: the scanner agrees with serde_json, and splicing changes the model's bytes alone.

use claude_lb::anthropic::body::{Problem, rename, scan};
use claude_lb::anthropic::edit::applied;
use claude_lb::anthropic::model::{Families, map_model};
use claude_lb::anthropic::session::session_of_user_id;
use serde_json::Value;

use super::keeps_raw_values;

/// Names that need no quoting, all of it, and more than fits in the place of the old one.
const NAMES: [&str; 4] =
    ["n", "q\"\\\n\u{0}\u{7f}", "模型\u{2028}🤖", "a-name-that-is-longer-than-the-one-it-replaces"];

/// The whole input is a body.
pub fn check(body: &[u8]) {
    let ours = scan(body);
    if !keeps_raw_values(body) {
        match serde_json::from_slice::<Value>(body) {
            Ok(tree) => agree(&ours, &tree, body),
            Err(error) => {
                let is_json = !matches!(
                    ours,
                    Err(Problem::Empty
                        | Problem::NotUtf8 { .. }
                        | Problem::ByteOrderMark
                        | Problem::Unexpected { .. }
                        | Problem::Truncated { .. })
                );
                assert!(!is_json || is_looseness(&error.to_string(), body), "{error}, but {ours:?}");
            }
        }
    }
    if let Ok(facts) = ours {
        assert_eq!(serde_json::from_slice::<String>(&body[facts.model_at.clone()]).unwrap(), facts.model);
        for name in NAMES {
            splices(body, name);
        }
        assert_eq!(rename(&facts, &facts.model), None, "its own name changes nothing");
        facts.user_id.as_deref().map(session_of_user_id);
        let families = Families { sonnet: "S".into(), opus: "O".into(), haiku: "H".into() };
        assert!(!map_model(&facts.model, &[("*o?u*".into(), "M".into())], &families).is_empty());
    }
}

/// What serde_json refuses and the scanner lets pass, as its documentation says: depth, numbers that no double
/// holds, and what stands inside a string that is only skipped.
fn is_looseness(words: &str, body: &[u8]) -> bool {
    const LOOSE: [&str; 7] = [
        "recursion limit exceeded",
        "number out of range",
        "control character",
        "invalid escape",
        "lone leading surrogate",
        "unexpected end of hex escape",
        "invalid unicode code point",
    ];
    // In `"\ux"` serde_json takes the quotation mark for a digit and misses the end.
    let escape_eats_end =
        words.contains("EOF while parsing a string") && body.windows(2).any(|two| two == b"\\u");
    escape_eats_end || LOOSE.iter().any(|loose| words.contains(loose))
}

/// Every fact is what the tree holds, and every problem is one that the tree has.
fn agree(ours: &Result<claude_lb::anthropic::body::Facts, Problem>, tree: &Value, body: &[u8]) {
    let Some(top) = tree.as_object() else {
        assert!(matches!(ours, Err(Problem::NotAnObject { .. })), "{ours:?}");
        return;
    };
    let facts = match (ours, top.get("model")) {
        (Ok(facts), _) => facts,
        (Err(problem), None) => return assert_eq!(*problem, Problem::ModelMissing),
        (Err(Problem::ModelTooLong { bytes }), Some(Value::String(name))) => {
            assert!(*bytes > 500);
            return assert_eq!(*bytes, name.len());
        }
        (Err(problem), Some(Value::String(name))) => {
            assert!(name.is_empty());
            return assert_eq!(*problem, Problem::ModelEmpty);
        }
        (Err(problem), Some(_)) => return assert_eq!(*problem, Problem::ModelNotString),
    };
    assert_eq!(tree["model"], facts.model);
    assert!(!facts.model.is_empty());
    assert_eq!(tree["stream"] == true, facts.stream);
    // A tree makes `-0` and numbers beyond 64 bits a double, as we make them nothing.
    assert_eq!(tree["max_tokens"].as_u64(), facts.max_tokens);
    assert_eq!(tree["metadata"]["user_id"].as_str(), facts.user_id.as_deref());
    if !body.contains(&b'\\') {
        assert!(
            facts.is_adaptive || !top.get("thinking").is_some_and(is_adaptive),
            "the word was overlooked"
        );
    }
    let elsewhere = top.iter().filter(|(key, _)| *key != "metadata");
    if elsewhere.clone().any(|(_, value)| holds_ttl_1h(value)) && !body.contains(&b'\\') {
        assert!(facts.ttl_1h, "a ttl of an hour was overlooked");
    }
}

/// True when the word is a name or a text anywhere within.
fn is_adaptive(value: &Value) -> bool {
    match value {
        Value::Object(members) => members.iter().any(|(key, value)| key == "adaptive" || is_adaptive(value)),
        Value::Array(items) => items.iter().any(is_adaptive),
        other => other == "adaptive",
    }
}

fn holds_ttl_1h(value: &Value) -> bool {
    match value {
        Value::Object(members) => {
            members.iter().any(|(key, value)| (key == "ttl" && value == "1h") || holds_ttl_1h(value))
        }
        Value::Array(items) => items.iter().any(holds_ttl_1h),
        _ => false,
    }
}

fn splices(body: &[u8], name: &str) {
    let before = scan(body).unwrap();
    let Some(edit) = rename(&before, name) else { return assert_eq!(before.model, name) };
    let spliced = applied(body, &[edit]);
    let after = scan(&spliced).unwrap();
    assert_eq!(spliced[..after.model_at.start], body[..before.model_at.start]);
    assert_eq!(spliced[after.model_at.end..], body[before.model_at.end..]);
    let others = |facts: &claude_lb::anthropic::body::Facts| {
        (facts.stream, facts.max_tokens, facts.user_id.clone(), facts.ttl_1h, facts.model_at.start)
    };
    assert_eq!((after.model.as_str(), others(&after)), (name, others(&before)));
}
