//! A place in a request body that holds for every request: keys, and `*` for every element of an array.
//!
//! A refusal names one place in one body: with indexes, and with union tags that are no keys. The body that was sent
//! tells which is which. What is learned holds for every index, and what stands inside a `cache_control` for every
//! `cache_control`. But it holds only for objects of the same `type`: a thinking block takes no `cache_control`, and
//! all other blocks must keep theirs.

use std::fmt;
use std::ops::Range;

use super::OPAQUE;
use crate::anthropic::json::{self, Cursor};

/// More steps than any real place has.
const STEPS_MAX: usize = 12;

/// The longest name of a key in bytes.
const KEY_BYTES_MAX: usize = 64;

/// What a request cannot do without, or what would make another request of it.
const NEEDED: [&str; 24] = [
    "model",
    "messages",
    "max_tokens",
    "role",
    "content",
    "type",
    "text",
    "stream",
    "system",
    "tools",
    "name",
    "id",
    "input",
    "input_schema",
    "tool_use_id",
    "tool_name",
    "source",
    "data",
    "media_type",
    "url",
    "signature",
    "budget_tokens",
    "schema",
    "is_error",
];

/// Tags of unions that stand in Anthropic's places between keys. For places that an operator copies from an error.
const TAGS: [&str; 16] = [
    "custom",
    "ephemeral",
    "enabled",
    "adaptive",
    "disabled",
    "text",
    "image",
    "document",
    "thinking",
    "redacted_thinking",
    "tool_use",
    "tool_result",
    "server_tool_use",
    "search_result",
    "tool_reference",
    "base64",
];

/// One step down.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The member with this key, of an object with this `type` or, without one, of any.
    Key { of: Option<String>, key: String },
    /// Every element of an array.
    Every,
}

/// A place that can be taken out of a body.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Path {
    /// The steps begin at any `cache_control` rather than at the top.
    pub(super) is_in_cache_control: bool,
    /// Never empty; the last one is a key.
    pub(super) steps: Vec<Step>,
}

impl Path {
    /// A place as an operator writes it: ours (`tools.*.defer_loading`) or one copied from an error. `None` for a
    /// place that is no place, or that no request can do without.
    pub fn configured(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.trim().split('.').collect();
        let last = words.len() - 1;
        let mut steps: Vec<Step> = Vec::new();
        let mut kind = None;
        for (at, word) in words.iter().enumerate() {
            let is_behind_union = kind.is_none()
                && match steps.last() {
                    Some(Step::Every) => true,
                    Some(Step::Key { key, .. }) => {
                        matches!(key.as_str(), "cache_control" | "thinking" | "source")
                    }
                    None => false,
                };
            if *word == "*" || json::count(word.as_bytes()).is_some() {
                steps.push(Step::Every);
            } else if at == last || !is_behind_union || !TAGS.contains(word) {
                steps.push(Step::Key { of: kind.take(), key: (*word).to_owned() });
            } else {
                kind = Some((*word).to_owned());
            }
        }
        Self::new(steps)
    }

    /// The place that a refusal names (Anthropic's notation), looked up in the body that was sent. `None` when the
    /// body has no such place, or when it cannot be taken out.
    pub fn rejected(place: &str, body: &[u8]) -> Option<Self> {
        let words: Vec<&str> = place.split('.').collect();
        if words.len() > STEPS_MAX {
            return None;
        }
        let mut steps = Vec::new();
        resolve(body, &words, &mut steps).then_some(())?;
        Self::new(steps)
    }

    fn new(mut steps: Vec<Step>) -> Option<Self> {
        for step in &mut steps {
            // Tools of one's own need no `type`.
            if let Step::Key { of, .. } = step {
                of.take_if(|kind| kind == "custom");
            }
        }
        let Some((Step::Key { key: last, .. }, above)) = steps.split_last() else { return None };
        let is_key = |step: &Step| match step {
            Step::Key { key, .. } => !key.is_empty() && key.len() <= KEY_BYTES_MAX,
            Step::Every => true,
        };
        let is_opaque = |step: &Step| matches!(step, Step::Key { key, .. } if OPAQUE.contains(&key.as_str()));
        // At the top it is a setting; inside a message it is what the model thought.
        let is_thought = last == "thinking" && !above.is_empty();
        let is_needed = NEEDED.contains(&last.as_str()) || is_thought;
        if steps.len() > STEPS_MAX || !steps.iter().all(is_key) || is_needed || above.iter().any(is_opaque) {
            return None;
        }
        let holder =
            above.iter().rposition(|step| matches!(step, Step::Key { key, .. } if key == "cache_control"));
        match holder {
            Some(at) => {
                let mut steps = steps.split_off(at + 1);
                if let Some(Step::Key { of, .. }) = steps.first_mut() {
                    // There is only one.
                    of.take_if(|kind| kind == "ephemeral");
                }
                Some(Self { is_in_cache_control: true, steps })
            }
            None => Some(Self { is_in_cache_control: false, steps }),
        }
    }

    /// The key that goes.
    pub fn key(&self) -> &str {
        match self.steps.last() {
            Some(Step::Key { key, .. }) => key,
            _ => "",
        }
    }

    /// How the `anthropic-beta` values begin that announce this field.
    pub fn betas(&self) -> &'static [&'static str] {
        let keys: Vec<&str> = self
            .steps
            .iter()
            .map(|step| match step {
                Step::Key { key, .. } => key.as_str(),
                Step::Every => "*",
            })
            .collect();
        match (self.is_in_cache_control, keys.as_slice()) {
            (true, ["scope"]) => &["prompt-caching-scope-"],
            (true, ["ttl"]) => &["extended-cache-ttl-"],
            (true, _) => &[],
            (_, ["context_management", ..]) => &["context-management-"],
            (_, ["output_config"] | ["output_config", "effort"] | ["effort"]) => &["effort-"],
            (_, ["output_config", "format"] | ["output_format"]) => &["structured-outputs-"],
            (_, ["messages", "*", "output_config", ..]) => &["per-turn-control-"],
            (_, ["tools", "*", "defer_loading" | "input_examples" | "allowed_callers"]) => {
                &["advanced-tool-use-"]
            }
            (_, ["tools", "*", "eager_input_streaming"]) => &["fine-grained-tool-streaming-"],
            (_, ["mcp_servers"]) => &["mcp-client-"],
            _ => &[],
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_in_cache_control {
            f.write_str("cache_control.")?;
        }
        for (at, step) in self.steps.iter().enumerate() {
            if at > 0 {
                f.write_str(".")?;
            }
            match step {
                Step::Key { of: Some(kind), key } => write!(f, "{kind}.{key}")?,
                Step::Key { of: None, key } => f.write_str(key)?,
                Step::Every => f.write_str("*")?,
            }
        }
        Ok(())
    }
}

/// Finds the place in a value. A word that is no key there is a union tag; one that is both (a text block has the
/// tag `text` and the key `text`) is tried as a key first. Each level takes a word, so the depth is bounded.
fn resolve(value: &[u8], words: &[&str], steps: &mut Vec<Step>) -> bool {
    let Some((word, rest)) = words.split_first() else { return false };
    let mut cursor = Cursor::new(value);
    match cursor.peek() {
        Ok(b'{') => {
            if let Some(found) = member(&mut cursor, word) {
                let of = member(&mut Cursor::new(value), "type").and_then(|kind| json::decode(&value[kind]));
                steps.push(Step::Key { of, key: (*word).to_owned() });
                let is_opaque = OPAQUE.contains(word);
                if rest.is_empty() || (!is_opaque && resolve(&value[found], rest, steps)) {
                    return true;
                }
                steps.pop();
            }
            !rest.is_empty() && resolve(value, rest, steps)
        }
        Ok(b'[') => {
            let Some(index) = json::count(word.as_bytes()) else { return false };
            let Some(found) = element(&mut cursor, index) else { return false };
            steps.push(Step::Every);
            if resolve(&value[found], rest, steps) {
                return true;
            }
            steps.pop();
            false
        }
        _ => false,
    }
}

/// The last value with this key, as every JSON reader would take it.
fn member(cursor: &mut Cursor<'_>, name: &str) -> Option<Range<usize>> {
    let mut found = None;
    let walked = cursor.members(|cursor, key| {
        let is_it = json::is_name(cursor.bytes(key), name);
        let value = cursor.value()?;
        if is_it {
            found = Some(value);
        }
        Ok(())
    });
    walked.ok().and(found)
}

fn element(cursor: &mut Cursor<'_>, index: u64) -> Option<Range<usize>> {
    let (mut at, mut found) = (0, None);
    let walked = cursor.elements(|cursor| {
        let value = cursor.value()?;
        if at == index {
            found = Some(value);
        }
        at += 1;
        Ok(())
    });
    walked.ok().and(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = br#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"x",
        "cache_control":{"type":"ephemeral","ttl":"1h"},"extra":1},{"type":"tool_use","input":{"defer_loading":1},
        "caller":{"type":"direct","z":1}},{"type":"tool_result","content":[{"type":"text","text":"y","odd":{}}]}]},
        {"role":"system","content":"s","output_config":{"effort":"low"}}],
        "system":[{"type":"text","text":"s"},{"type":"text","text":"s","cache_control":{"type":"ephemeral","scope":"g"}}],
        "tools":[{"name":"a","input_schema":{"custom":1}},{"name":"b","defer_loading":true,"input_examples":[{"q":1}],
        "custom":{"odd":1}}],"max_tokens":1,"thinking":{"type":"adaptive","display":"omitted","budget_tokens":5},
        "context_management":{"edits":[{"type":"t","keep":"all"}]},"output_config":{"effort":"medium"},"stream":true}"#;

    #[test]
    fn a_refused_place_holds_for_every_index() {
        let table = [
            ("context_management", Some("context_management")),
            ("context_management.edits.0.t.keep", Some("context_management.edits.*.t.keep")),
            ("output_config", Some("output_config")),
            ("output_config.effort", Some("output_config.effort")),
            ("messages.1.output_config", Some("messages.*.output_config")),
            ("messages.1.system.output_config", Some("messages.*.output_config")),
            ("tools.1.custom.defer_loading", Some("tools.*.defer_loading")),
            ("tools.1.defer_loading", Some("tools.*.defer_loading")),
            ("tools.1.custom.input_examples", Some("tools.*.input_examples")),
            ("tools.1.custom.odd", Some("tools.*.custom.odd")),
            ("system.1.cache_control.ephemeral.scope", Some("cache_control.scope")),
            ("messages.0.content.0.text.cache_control.ephemeral.ttl", Some("cache_control.ttl")),
            ("messages.0.content.0.text.cache_control", Some("messages.*.content.*.text.cache_control")),
            ("messages.0.content.0.cache_control", Some("messages.*.content.*.text.cache_control")),
            ("messages.0.content.0.text.extra", Some("messages.*.content.*.text.extra")),
            ("messages.0.content.1.tool_use.caller", Some("messages.*.content.*.tool_use.caller")),
            (
                "messages.0.content.2.tool_result.content.0.text.odd",
                Some("messages.*.content.*.tool_result.content.*.text.odd"),
            ),
            ("thinking.adaptive.display", Some("thinking.adaptive.display")),
            ("thinking", Some("thinking")),
            // Not in the body.
            ("tools.0.custom.defer_loading", None),
            ("tools.9.custom.defer_loading", None),
            ("speed", None),
            ("messages.0.content.0.text.text.odd", None),
            ("tools.1", None),
            ("", None),
            // Needed, or nobody's to touch.
            ("model", None),
            ("messages", None),
            ("max_tokens", None),
            ("stream", None),
            ("messages.0.role", None),
            ("messages.0.content", None),
            ("messages.0.content.0.text.text", None),
            ("messages.0.content.0.type", None),
            ("messages.0.content.1.tool_use.input", None),
            ("messages.0.content.1.tool_use.input.defer_loading", None),
            ("tools.0.custom.input_schema", None),
            ("tools.0.custom.input_schema.custom", None),
            ("tools.1.custom.input_examples.0.q", None),
            ("system.1.cache_control.ephemeral.type", None),
            ("thinking.adaptive.budget_tokens", None),
            ("a.b.c.d.e.f.g.h.i.j.k.l.m", None),
        ];
        for (place, wanted) in table {
            let path = Path::rejected(place, BODY).map(|path| path.to_string());
            assert_eq!(path.as_deref(), wanted, "{place}");
        }
    }

    #[test]
    fn an_operators_place_needs_no_body() {
        let table = [
            ("tools.*.defer_loading", Some("tools.*.defer_loading")),
            ("tools.3.custom.defer_loading", Some("tools.*.defer_loading")),
            ("system.2.cache_control.ephemeral.scope", Some("cache_control.scope")),
            ("cache_control.scope", Some("cache_control.scope")),
            (" context_management ", Some("context_management")),
            ("messages.*.content.*.text.extra", Some("messages.*.content.*.text.extra")),
            ("thinking.adaptive.display", Some("thinking.adaptive.display")),
            ("thinking.display", Some("thinking.display")),
            ("a.b", Some("a.b")),
            ("", None),
            ("a..b", None),
            ("*", None),
            ("tools.*", None),
            ("messages", None),
            ("messages.*.content.*.thinking", None),
            ("tools.*.input_schema.x", None),
        ];
        for (text, wanted) in table {
            assert_eq!(Path::configured(text).map(|path| path.to_string()).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn betas_belong_to_fields() {
        let table: [(&str, &[&str]); 10] = [
            ("context_management", &["context-management-"]),
            ("output_config", &["effort-"]),
            ("messages.*.output_config", &["per-turn-control-"]),
            ("tools.*.defer_loading", &["advanced-tool-use-"]),
            ("tools.*.input_examples", &["advanced-tool-use-"]),
            ("cache_control.scope", &["prompt-caching-scope-"]),
            ("cache_control.ttl", &["extended-cache-ttl-"]),
            ("output_config.format", &["structured-outputs-"]),
            ("thinking.display", &[]),
            ("tools.*.other", &[]),
        ];
        for (text, betas) in table {
            assert_eq!(Path::configured(text).unwrap().betas(), betas, "{text}");
        }
    }
}
