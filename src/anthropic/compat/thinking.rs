//! Adaptive thinking for models that do not know it.
//!
//! Models up to 4.5 take `{"type":"enabled","budget_tokens":N}` and refuse `{"type":"adaptive"}`. The client chose by
//! the name it asked for; when another model serves it, the words have to change with it.

use std::ops::Range;

use crate::anthropic::edit::{Edit, in_order};
use crate::anthropic::json::{self, Cursor};

/// The smallest budget that the API takes.
const BUDGET_MIN: u64 = 1_024;

/// What makes enabled of adaptive thinking, or `None` when there is nothing to change. The budget is 80 % of
/// `max_tokens`, at least 1,024; then `max_tokens` grows by the budget where it would not exceed it. What else stands
/// in `thinking` stays.
pub fn without_adaptive(body: &[u8]) -> Option<Vec<Edit>> {
    let (mut thinking, mut max_tokens) = (None, None);
    let mut cursor = Cursor::new(body);
    let walked = cursor.members(|cursor, key| {
        let key = cursor.bytes(key);
        let value = cursor.value()?;
        if json::is_name(key, "thinking") {
            thinking = Some(value);
        } else if json::is_name(key, "max_tokens") {
            max_tokens = Some(value);
        }
        Ok(())
    });
    walked.ok()?;
    let (thinking, max_at) = (thinking?, max_tokens?);
    let (kind, budget_at) = parts(body, thinking)?;
    let max = json::count(&body[max_at.clone()])?;
    let budget = (max / 5 * 4 + max % 5 * 4 / 5).max(BUDGET_MIN);
    let mut edits = Vec::new();
    match budget_at {
        Some(at) => {
            edits.push(Edit::exchange(kind, "\"enabled\""));
            edits.push(Edit::exchange(at, budget.to_string()));
        }
        None => edits.push(Edit::exchange(kind, format!("\"enabled\",\"budget_tokens\":{budget}"))),
    }
    if max <= budget {
        edits.push(Edit::exchange(max_at, max.checked_add(budget)?.to_string()));
    }
    Some(in_order(edits))
}

/// Where `"adaptive"` stands in a `thinking` object, and its budget if it has one.
fn parts(body: &[u8], thinking: Range<usize>) -> Option<(Range<usize>, Option<Range<usize>>)> {
    let from = thinking.start;
    let mut cursor = Cursor::new(&body[thinking]);
    let (mut kind, mut budget) = (None, None);
    let walked = cursor.members(|cursor, key| {
        let key = cursor.bytes(key);
        let value = cursor.value()?;
        if json::is_name(key, "type") {
            kind = Some(value);
        } else if json::is_name(key, "budget_tokens") {
            budget = Some(value);
        }
        Ok(())
    });
    walked.ok()?;
    let moved = |range: Range<usize>| range.start + from..range.end + from;
    let kind = moved(kind?);
    (&body[kind.clone()] == b"\"adaptive\"").then(|| (kind, budget.map(moved)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::edit::applied;

    #[test]
    fn adaptive_becomes_enabled_with_a_budget() {
        let table = [
            (
                r#"{"max_tokens":32000,"thinking":{"type":"adaptive"}}"#,
                r#"{"max_tokens":32000,"thinking":{"type":"enabled","budget_tokens":25600}}"#,
            ),
            (
                r#"{"thinking": { "type" : "adaptive" , "display":"omitted"},"max_tokens":10}"#,
                r#"{"thinking": { "type" : "enabled","budget_tokens":1024 , "display":"omitted"},"max_tokens":1034}"#,
            ),
            (
                r#"{"max_tokens":1024,"thinking":{"type":"adaptive"}}"#,
                r#"{"max_tokens":2048,"thinking":{"type":"enabled","budget_tokens":1024}}"#,
            ),
            (
                r#"{"max_tokens":1025,"thinking":{"type":"adaptive"}}"#,
                r#"{"max_tokens":1025,"thinking":{"type":"enabled","budget_tokens":1024}}"#,
            ),
            (
                r#"{"max_tokens":64001,"thinking":{"budget_tokens":7,"type":"adaptive"}}"#,
                r#"{"max_tokens":64001,"thinking":{"budget_tokens":51200,"type":"enabled"}}"#,
            ),
        ];
        for (body, wanted) in table {
            let edits = without_adaptive(body.as_bytes()).unwrap_or_else(|| panic!("{body}"));
            let changed = applied(body.as_bytes(), &edits);
            assert_eq!(String::from_utf8_lossy(&changed), wanted, "{body}");
        }
    }

    #[test]
    fn everything_else_stays() {
        for body in [
            r#"{"max_tokens":32000,"thinking":{"type":"enabled","budget_tokens":5}}"#,
            r#"{"max_tokens":32000,"thinking":{"type":"disabled"}}"#,
            r#"{"max_tokens":32000,"x":{"thinking":{"type":"adaptive"}}}"#,
            r#"{"max_tokens":32000,"thinking":"adaptive"}"#,
            r#"{"max_tokens":"adaptive","thinking":{"type":"adaptive"}}"#,
            r#"{"thinking":{"type":"adaptive"}}"#,
            r#"{"max_tokens":18446744073709551615,"thinking":{"x":"adaptive"}}"#,
            r#"{"thinking":{"type":"adaptive"}"#,
            r#"["adaptive"]"#,
        ] {
            assert_eq!(without_adaptive(body.as_bytes()), None, "{body}");
        }
    }
}
