//! What the proxy needs to know of a request body, found by scanning.
//!
//! It decides whether the bytes are one JSON object with a usable `model`, and where that name stands. It never
//! builds a tree, never changes a byte but the name, and judges nothing else: a wrong `stream` or `max_tokens` is
//! the upstream's to refuse, in words the client knows. Only top-level keys count; of duplicates the last, as every
//! JSON reader upstream would take it. Called once per message request, before the first attempt.

use std::fmt;
use std::ops::Range;

use super::edit::Edit;
use super::json::{self, Cursor, Fault};

/// What the proxy needs to know of a request body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The name the client asked for, decoded; never empty.
    pub model: String,
    /// The bytes of the JSON string that holds the name, quotes included.
    pub model_at: Range<usize>,
    /// True only for a literal `true`: the newest clients send it, an absent key means a whole answer.
    pub stream: bool,
    /// `max_tokens`, if it is a whole number that fits.
    pub max_tokens: Option<u64>,
    /// `metadata.user_id`, decoded: what Claude Code puts its session in.
    pub user_id: Option<String>,
    /// Some `"ttl":"1h"` occurs: the prompt cache entry lives an hour instead of five minutes.
    pub ttl_1h: bool,
    /// `thinking` has the word `"adaptive"`: not every model knows it.
    pub is_adaptive: bool,
}

/// Why a body cannot be relayed. Its text is a sentence for the client; offsets are bytes from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// There are no bytes, or only white space.
    Empty,
    /// The bytes from here on are not UTF-8.
    NotUtf8 {
        /// The first byte that is not.
        at: usize,
    },
    /// The text begins with a byte order mark, which JSON does not allow.
    ByteOrderMark,
    /// A byte the grammar does not allow.
    Unexpected {
        /// Where it stands.
        at: usize,
    },
    /// The text stops inside a value.
    Truncated {
        /// The length of the text.
        at: usize,
    },
    /// A JSON value, but no object.
    NotAnObject {
        /// Where it begins.
        at: usize,
    },
    /// No `model` at the top level.
    ModelMissing,
    /// `model` is not a string.
    ModelNotString,
    /// `model` is `""`.
    ModelEmpty,
    /// `model` is longer than any name, and would go into logs, tables and headers.
    ModelTooLong {
        /// Its length in bytes.
        bytes: usize,
    },
    /// `model` is a string that has no text: a broken escape, a lone surrogate, a raw control character.
    ModelUnreadable {
        /// Where the string begins.
        at: usize,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the body is empty; a JSON object is expected"),
            Self::NotUtf8 { at } => write!(f, "the body is not valid JSON: it is not UTF-8 at byte {at}"),
            Self::ByteOrderMark => {
                f.write_str("the body is not valid JSON: it starts with a byte order mark at byte 0")
            }
            Self::Unexpected { at } => {
                write!(f, "the body is not valid JSON: unexpected character at byte {at}")
            }
            Self::Truncated { at } => {
                write!(f, "the body is not valid JSON: it ends inside a value at byte {at}")
            }
            Self::NotAnObject { at } => {
                write!(f, "the body must be a JSON object, but another value begins at byte {at}")
            }
            Self::ModelMissing => f.write_str("`model` is missing"),
            Self::ModelNotString => f.write_str("`model` must be a string"),
            Self::ModelEmpty => f.write_str("`model` must not be empty"),
            Self::ModelTooLong { bytes } => {
                write!(f, "`model` has {bytes} bytes; no name is longer than {MODEL_BYTES_MAX}")
            }
            Self::ModelUnreadable { at } => {
                write!(f, "`model` is not a valid JSON string (it begins at byte {at})")
            }
        }
    }
}

impl std::error::Error for Problem {}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault { at, is_end: true } => Self::Truncated { at },
            Fault { at, is_end: false } => Self::Unexpected { at },
        }
    }
}

/// Reads the facts off a body, or says what is wrong with it. One pass, no allocation but for the texts returned
/// and one bit per bracket beyond the 64th level.
pub fn scan(body: &[u8]) -> Result<Facts, Problem> {
    let mut cursor = open(body)?;
    let (mut model, mut max_tokens, mut user_id) = (None, None, None);
    let (mut stream, mut ttl_1h, mut is_adaptive) = (false, false, false);
    cursor.members(|cursor, key| {
        let key = cursor.bytes(key);
        if json::is_name(key, "metadata") {
            user_id = user_id_of(cursor)?;
            return Ok(());
        }
        let value = cursor.value_with(|key, rest| ttl_1h |= is_ttl_1h(key, rest))?;
        if json::is_name(key, "model") {
            model = Some(value);
        } else if json::is_name(key, "stream") {
            stream = cursor.bytes(value) == b"true";
        } else if json::is_name(key, "max_tokens") {
            max_tokens = json::count(cursor.bytes(value));
        } else if json::is_name(key, "thinking") {
            is_adaptive = memchr::memmem::find(cursor.bytes(value), b"\"adaptive\"").is_some();
        }
        Ok(())
    })?;
    cursor.end()?;

    let model_at = model.ok_or(Problem::ModelMissing)?;
    let model = model_name(body, &model_at)?;
    Ok(Facts { model, model_at, stream, max_tokens, user_id, ttl_1h, is_adaptive })
}

/// What puts another model's name in its place; `None` when it is that name already, so that the client's own bytes are
/// sent.
pub fn rename(facts: &Facts, model: &str) -> Option<Edit> {
    let token = if facts.model == model { None } else { serde_json::to_string(model).ok() };
    token.map(|token| Edit::exchange(facts.model_at.clone(), token))
}

/// A cursor before the object that a body must be. The object itself is not walked yet.
pub(super) fn open(body: &[u8]) -> Result<Cursor<'_>, Problem> {
    std::str::from_utf8(body).map_err(|error| Problem::NotUtf8 { at: error.valid_up_to() })?;
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(Problem::ByteOrderMark);
    }
    let mut cursor = Cursor::new(body);
    match cursor.peek() {
        Ok(b'{') => Ok(cursor),
        Ok(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => {
            let at = cursor.value()?.start;
            cursor.end()?;
            Err(Problem::NotAnObject { at })
        }
        Ok(_) => Err(Problem::Unexpected { at: cursor.at() }),
        Err(_) => Err(Problem::Empty),
    }
}

/// Consumes the value of `metadata`. A second `metadata` replaces the first whole, so the answer starts empty.
fn user_id_of(cursor: &mut Cursor<'_>) -> Result<Option<String>, Fault> {
    if cursor.peek()? != b'{' {
        cursor.value()?;
        return Ok(None);
    }
    let mut user_id = None;
    cursor.members(|cursor, key| {
        let key = cursor.bytes(key);
        let value = cursor.value()?;
        if json::is_name(key, "user_id") {
            user_id = json::decode(cursor.bytes(value));
        }
        Ok(())
    })?;
    Ok(user_id)
}

/// The longest model name, in bytes. Real ones have about 40.
const MODEL_BYTES_MAX: usize = 512;

fn model_name(body: &[u8], at: &Range<usize>) -> Result<String, Problem> {
    let token = &body[at.clone()];
    if !token.starts_with(b"\"") {
        return Err(Problem::ModelNotString);
    }
    match json::decode(token) {
        Some(name) if name.is_empty() => Err(Problem::ModelEmpty),
        Some(name) if name.len() > MODEL_BYTES_MAX => Err(Problem::ModelTooLong { bytes: name.len() }),
        Some(name) => Ok(name),
        None => Err(Problem::ModelUnreadable { at: at.start }),
    }
}

fn is_ttl_1h(key: &[u8], rest: &[u8]) -> bool {
    key == b"\"ttl\"" && rest.trim_ascii_start().starts_with(b"\"1h\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::edit::applied;
    use crate::anthropic::samples;
    use serde_json::Value;

    /// The body with another model's name; `None` when it is that name already.
    fn splice_model(body: &[u8], facts: &Facts, model: &str) -> Option<Vec<u8>> {
        rename(facts, model).map(|edit| applied(body, &[edit]))
    }

    #[test]
    fn reads_the_facts() {
        // `check` looks at the bytes of `model_at` instead of counting them.
        let facts = |model: &str| Facts {
            model: model.into(),
            model_at: 0..0,
            stream: false,
            max_tokens: None,
            user_id: None,
            ttl_1h: false,
            is_adaptive: false,
        };
        let check = |body: &str, wanted: Facts| {
            let found = scan(body.as_bytes()).unwrap();
            assert_eq!(json::decode(&body.as_bytes()[found.model_at.clone()]), Some(found.model.clone()));
            assert_eq!(found, Facts { model_at: found.model_at.clone(), ..wanted }, "{body}");
        };

        check(r#"{"model":"m"}"#, facts("m"));
        check("\r\n{ \"model\" :\t\"m\" }\n", facts("m"));
        check(r#"{"mod\u0065l":"m"}"#, facts("m"));
        check(r#"{"model":"a","model":"b"}"#, facts("b"));
        check(r#"{"model":"a","mod\u0065l":"b"}"#, facts("b"));
        check(r#"{"model":7,"model":"b"}"#, facts("b"));
        check(r#"{"model":"q\"\\\n\u4f60\ud83e\udd16"}"#, facts("q\"\\\n你🤖"));
        check(r#"{"messages":[{"model":"x","stream":true}],"model":"m"}"#, facts("m"));
        check(r#"{"model":"m","stream":true}"#, Facts { stream: true, ..facts("m") });
        check(r#"{"model":"m","stream":true,"stream":false}"#, facts("m"));
        check(r#"{"model":"m","stream":"true"}"#, facts("m"));
        check(r#"{"model":"m","stream":[true]}"#, facts("m"));
        check(r#"{"model":"m","max_tokens":64000}"#, Facts { max_tokens: Some(64_000), ..facts("m") });
        check(r#"{"model":"m","max_tokens":5,"max_tokens":-1}"#, facts("m"));
        check(r#"{"model":"m","max_tokens":1e3}"#, facts("m"));
        let known = |user_id: &str| Facts { user_id: Some(user_id.into()), ..facts("m") };
        check(r#"{"model":"m","metadata":{"user_id":"u\"1"}}"#, known("u\"1"));
        check(r#"{"model":"m","metadata":{"user_id":"a","user_id":"b"}}"#, known("b"));
        check(r#"{"model":"m","metadata":{"user_id":"a","user_id":5}}"#, facts("m"));
        check(r#"{"model":"m","metadata":{"user_id":"a"},"metadata":{}}"#, facts("m"));
        check(r#"{"model":"m","metadata":{"user_id":"a"},"metadata":null}"#, facts("m"));
        check(r#"{"model":"m","metadata":{"user_id":"\ud800"}}"#, facts("m"));
        check(r#"{"model":"m","metadata":{"x":{"user_id":"a"}}}"#, facts("m"));
        check(r#"{"model":"m","user_id":"a"}"#, facts("m"));
        let hour = Facts { ttl_1h: true, ..facts("m") };
        check(r#"{"model":"m","system":[{"cache_control":{"ttl":"1h"}}]}"#, hour.clone());
        check("{\"model\":\"m\",\"system\":[{\"cache_control\":{\"ttl\" : \"1h\"}}]}", hour);
        check(r#"{"model":"m","system":[{"cache_control":{"ttl":"5m"}}]}"#, facts("m"));
        check(r#"{"model":"m","system":"\"ttl\":\"1h\""}"#, facts("m"));
        let adaptive = Facts { is_adaptive: true, ..facts("m") };
        check(r#"{"model":"m","thinking":{"type":"adaptive"}}"#, adaptive.clone());
        check(r#"{"thinking":{},"model":"m","thinking":{"type" : "adaptive"}}"#, adaptive);
        check(r#"{"model":"m","thinking":{"type":"adaptive"},"thinking":{"type":"enabled"}}"#, facts("m"));
        check(r#"{"model":"m","messages":[{"thinking":"\"adaptive\"","x":"adaptive"}]}"#, facts("m"));
    }

    #[test]
    fn says_what_is_wrong() {
        let check = |body: &[u8], sentence: &str| {
            let problem =
                scan(body).expect_err(&format!("{:?} must be refused", String::from_utf8_lossy(body)));
            assert_eq!(problem.to_string(), sentence, "{:?}", String::from_utf8_lossy(body));
        };
        let json = |rest: &str| format!("the body is not valid JSON: {rest}");

        check(b"", "the body is empty; a JSON object is expected");
        check(b" \n", "the body is empty; a JSON object is expected");
        check(b"[1]", "the body must be a JSON object, but another value begins at byte 0");
        check(b"\"model\"", "the body must be a JSON object, but another value begins at byte 0");
        check(b"hello", &json("unexpected character at byte 0"));
        check(b"\xef\xbb\xbf{\"model\":\"m\"}", &json("it starts with a byte order mark at byte 0"));
        check(b"{\"model\":\"\xff\"}", &json("it is not UTF-8 at byte 10"));
        check(b"{\"model\":\"m\",\"x\":NaN}", &json("unexpected character at byte 17"));
        check(b"{\"model\":\"m\",}", &json("unexpected character at byte 13"));
        check(b"{\"model\":\"m\"} {}", &json("unexpected character at byte 14"));
        check(b"{\"model\":\"m\"", &json("it ends inside a value at byte 12"));
        check(b"{\"model\":\"m", &json("it ends inside a value at byte 11"));
        check(b"{}", "`model` is missing");
        check(b"{\"messages\":[{\"model\":\"m\"}]}", "`model` is missing");
        check(b"{\"model\":null}", "`model` must be a string");
        check(b"{\"model\":{\"model\":\"m\"}}", "`model` must be a string");
        check(b"{\"model\":\"\"}", "`model` must not be empty");
        check(b"{\"model\":\"\\ud800\"}", "`model` is not a valid JSON string (it begins at byte 9)");
        check(b"{\"model\":\"a\\x\"}", "`model` is not a valid JSON string (it begins at byte 9)");
    }

    #[test]
    fn a_hundred_thousand_brackets_overflow_nothing() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let (open, close) = (open.repeat(100_000), close.repeat(100_000));
            let facts = scan(format!("{{\"x\":{open}1{close},\"model\":\"m\"}}").as_bytes()).unwrap();
            assert_eq!(facts.model, "m");
            let cut = format!("{{\"x\":{open}");
            assert_eq!(scan(cut.as_bytes()), Err(Problem::Truncated { at: cut.len() }));
        }
        let bare = "[".repeat(100_000);
        assert_eq!(scan(bare.as_bytes()), Err(Problem::Truncated { at: 100_000 }));
    }

    #[test]
    fn splices_only_the_name() {
        let check = |name: &str| {
            let body = r#"{"a":"é","model":"claude-opus-5-5","z":[1, 2]}"#;
            let spliced = splice_model(body.as_bytes(), &scan(body.as_bytes()).unwrap(), name).unwrap();
            assert_eq!(scan(&spliced).unwrap().model, name);
            assert!(spliced.starts_with("{\"a\":\"é\",\"model\":\"".as_bytes()));
            assert!(spliced.ends_with(b"\",\"z\":[1, 2]}"));
        };
        for name in ["x", "with \"quotes\" and \\", "line\nbreak\u{0}", "你好", &"m".repeat(MODEL_BYTES_MAX)]
        {
            check(name);
        }
        let long = format!(r#"{{"model":"{}"}}"#, "m".repeat(1 << 20));
        assert_eq!(scan(long.as_bytes()), Err(Problem::ModelTooLong { bytes: 1 << 20 }));

        let body = br#"{"mod\u0065l":"d\u0065f"}"#;
        assert_eq!(splice_model(body, &scan(body).unwrap(), "def"), None);
    }

    #[test]
    fn every_captured_body_scans_and_differs_only_in_the_name() {
        let bodies = samples::bodies();
        assert_eq!(bodies.len(), 23);
        for (name, body) in bodies {
            let facts = scan(&body).unwrap_or_else(|problem| panic!("{name}: {problem}"));
            let tree: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(facts.model, tree["model"], "{name}");
            assert_eq!(facts.stream, tree["stream"] == true, "{name}");
            assert_eq!(facts.max_tokens, tree["max_tokens"].as_u64(), "{name}");
            assert_eq!(facts.user_id.as_deref(), tree["metadata"]["user_id"].as_str(), "{name}");
            assert_eq!(facts.ttl_1h, name.contains("cache-1h"), "{name}");

            let spliced = splice_model(&body, &facts, "another-model").unwrap();
            let after = facts.model_at.start + "\"another-model\"".len();
            assert_eq!(spliced[..facts.model_at.start], body[..facts.model_at.start], "{name}");
            assert_eq!(&spliced[facts.model_at.start..after], b"\"another-model\"", "{name}");
            assert_eq!(spliced[after..], body[facts.model_at.end..], "{name}");
        }
    }

    /// What serde_json makes of the same text; it keeps the last of duplicate keys, as we promise.
    fn by_tree(tree: Value) -> Option<(String, bool, Option<u64>, Option<String>)> {
        let model = tree.as_object()?.get("model")?.as_str()?.to_owned();
        let user_id = tree.get("metadata").and_then(|metadata| metadata.get("user_id")?.as_str());
        let max_tokens = tree.get("max_tokens").and_then(Value::as_u64);
        (!model.is_empty()).then(|| {
            (model, tree.get("stream") == Some(&Value::Bool(true)), max_tokens, user_id.map(str::to_owned))
        })
    }

    #[test]
    fn agrees_with_a_tree_on_random_texts() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        // The exponent ends in a space: glued to more digits it leaves the range of a double, which serde_json
        // refuses and the grammar does not.
        let pieces = [
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            " ",
            "\n",
            "\"model\"",
            "\"mod\\u0065l\"",
            "\"m\"",
            "\"\"",
            "\"stream\"",
            "true",
            "false",
            "null",
            "\"max_tokens\"",
            "12",
            "-0",
            "1.5",
            "2e1 ",
            "01",
            "\"metadata\"",
            "\"user_id\"",
            "\"a\\\"b\"",
            "\"ttl\"",
            "{\"model\":\"m\",",
            "\"metadata\":{\"user_id\":\"u\"},",
            "1.",
        ];
        let mut accepted = 0;
        for _ in 0..20_000 {
            let body: String = match rng.u8(..4) {
                // Noise, mostly refused; and members in random order, mostly accepted.
                0 => (0..rng.usize(..12)).map(|_| *rng.choice(pieces.iter()).unwrap()).collect(),
                _ => samples::object(&mut rng, 3),
            };
            let ours = scan(body.as_bytes());
            let is_json =
                !matches!(ours, Err(Problem::Empty | Problem::Unexpected { .. } | Problem::Truncated { .. }));
            let by_serde = serde_json::from_str::<Value>(&body);
            assert_eq!(is_json, by_serde.is_ok(), "seed {seed}: {body}");
            accepted += usize::from(ours.is_ok());
            let ours = ours.ok().map(|facts| (facts.model, facts.stream, facts.max_tokens, facts.user_id));
            assert_eq!(ours, by_serde.ok().and_then(by_tree), "seed {seed}: {body}");
        }
        assert!((4_000..18_000).contains(&accepted), "seed {seed}: {accepted} accepted prove too little");
    }

    #[test]
    fn mutated_bodies_never_panic() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        let bodies: Vec<_> = samples::bodies().into_iter().filter(|(_, body)| body.len() < 3_000).collect();
        for _ in 0..4_000 {
            let (_, body) = rng.choice(&bodies).unwrap();
            let body = samples::mutate(body, &mut rng);
            if let Ok(facts) = scan(&body) {
                let spliced = splice_model(&body, &facts, "n").unwrap_or(body);
                assert_eq!(scan(&spliced).unwrap().model, "n", "seed {seed}");
            }
        }
    }
}
