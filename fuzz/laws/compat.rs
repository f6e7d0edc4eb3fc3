//! Places taken out of a body: what is left is the same JSON without the members that were named, and tool inputs,
//! schemas and text are not touched.

use claude_lb::anthropic::compat::{Path, cuts, rejected_path, without_adaptive, without_betas};
use claude_lb::anthropic::edit::applied;
use serde_json::Value;

use super::keeps_raw_values;

/// What the room itself calls opaque, said once more.
const OPAQUE: [&str; 5] = ["input", "input_schema", "input_examples", "schema", "arguments"];

/// Places that are known to be refused, for a body that comes without any.
const USUAL: &str =
    "context_management output_config.effort tools.*.defer_loading cache_control.scope cache_control.ttl";

/// The first line holds places as an operator or a refusal names them, with blanks between; the rest is the body.
pub fn check(input: &[u8]) {
    let (line, body) = match input.iter().position(|byte| *byte == b'\n') {
        Some(at) if !input.starts_with(b"{") => (&input[..at], &input[at + 1..]),
        _ => (USUAL.as_bytes(), input),
    };
    let Ok(line) = std::str::from_utf8(line) else { return };
    let places: Vec<&str> = line.split(' ').collect();
    let tree = serde_json::from_slice::<Value>(body).ok().filter(|_| !keeps_raw_values(body));

    let configured: Vec<Path> = places.iter().filter_map(|place| Path::configured(place)).collect();
    removes(body, tree.as_ref(), &configured);
    for place in &places {
        if let Some(path) = Path::rejected(place, body) {
            let found = removes(body, tree.as_ref(), std::slice::from_ref(&path));
            assert!(tree.is_none() || found == 1, "{path} was found in the body, and is not taken out");
        }
        let kept = without_betas(line, &[place]);
        assert!(kept.is_none_or(|kept| kept.split(',').all(|value| line.contains(value))));
    }
    rejected_path(body);
    adapts(body, tree.as_ref());
}

/// Which of the paths were there.
fn removes(body: &[u8], tree: Option<&Value>, paths: &[Path]) -> u64 {
    let Some((edits, found)) = cuts(body, paths) else { return 0 };
    let left = applied(body, &edits);
    assert!(found != 0 && left.len() < body.len());
    let mut rest = body.iter();
    assert!(left.iter().all(|byte| rest.any(|other| other == byte)), "bytes that were not there");
    if let Some(before) = tree {
        let after: Value = serde_json::from_slice(&left).expect("JSON stays JSON");
        let gone: Vec<&str> = paths
            .iter()
            .enumerate()
            .filter(|(at, _)| found >> at & 1 == 1)
            .map(|(_, path)| path.key())
            .collect();
        lost_only(&gone, before, &after);
        assert_eq!(cuts(&left, paths), None, "something was left for a second pass");
    }
    found
}

/// Panics unless the one is the other without members of these names.
fn lost_only(gone: &[&str], before: &Value, after: &Value) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            assert!(after.keys().all(|key| before.contains_key(key)), "a member that was not there");
            for (key, value) in before {
                match after.get(key) {
                    None => assert!(gone.contains(&key.as_str()), "{key} is gone, and nobody named it"),
                    Some(left) if OPAQUE.contains(&key.as_str()) => {
                        assert_eq!(value, left, "{key} is not ours")
                    }
                    Some(left) => lost_only(gone, value, left),
                }
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            assert_eq!(before.len(), after.len(), "an element is gone");
            before.iter().zip(after).for_each(|(before, after)| lost_only(gone, before, after));
        }
        (before, after) => assert_eq!(before, after),
    }
}

/// Thinking for older models changes three values and no other.
fn adapts(body: &[u8], tree: Option<&Value>) {
    let (Some(edits), Some(before)) = (without_adaptive(body), tree) else { return };
    let changed = applied(body, &edits);
    let after: Value = serde_json::from_slice(&changed).expect("JSON stays JSON");
    let budget = after["thinking"]["budget_tokens"].as_u64().expect("a budget");
    assert_eq!(
        (&before["thinking"]["type"], &after["thinking"]["type"]),
        (&"adaptive".into(), &"enabled".into())
    );
    // No answer at all is asked for by nobody; there the budget is all there is.
    let is_room = after["max_tokens"].as_u64().is_some_and(|max| max > budget || before["max_tokens"] == 0);
    assert!(budget >= 1024 && is_room);
    let others = |tree: &Value| {
        let mut tree = tree.clone();
        tree["max_tokens"].take();
        for changed in ["type", "budget_tokens"] {
            tree["thinking"][changed].take();
        }
        tree
    };
    assert_eq!(others(before), others(&after));
}
