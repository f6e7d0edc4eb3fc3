//! How many input tokens a request has, estimated on the spot.
//!
//! It answers `/v1/messages/count_tokens`, which Claude Code asks up to 26 times at once for `/context`: no upstream
//! is known to offer it, and a round trip would cost a worker. It counts all that reaches the model (system, tools
//! and messages, not the settings), and takes one pass of linear time; nesting deeper than any real content is priced as
//! text instead of being followed. What is text is then multiplied by the factor of the model: see [`Factor`]. With it,
//! and before it, a count errs high by a little.

mod factor;
mod image;
mod prices;
mod text;

use std::ops::Add;

use super::body::{self, Problem};
use super::json::{self, Cursor, Fault};
use text::{TOKEN, weigh};

pub use factor::{Factor, UNTAUGHT};

// Overheads in tokens. Anthropic's documentation gives whole requests: 14 for a greeting of two short lines, 403
// for one question with one small tool; and the size of the hidden prompt that explains tools.
const REQUEST: u64 = 2;
const MESSAGE: u64 = 4;
const BLOCK: u64 = 2;
const TOOL_BLOCK: u64 = 10;
const TOOLS_PROMPT: u64 = 346;
const TOOLS_PROMPT_FORCED: u64 = 313;

/// A PDF page is read as text and as a picture; the size of the file is all that is cheap to know.
const PAGE_TOKENS: u64 = 2_300;
const PAGE_BYTES: u64 = 50_000;
const PAGES_MAX: u64 = 100;

/// A document behind a URL or a file id.
const UNSEEN_DOCUMENT: u64 = 5_000;

/// Thinking that only its signature carries: letters of base64 for each token.
const SEALED_BYTES_PER_TOKEN: u64 = 6;

/// Content inside content (a page in a tool's result); real requests reach three.
const DEPTH_MAX: u8 = 4;

/// What a request is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Tokens of all that is text, which differ from model to model by about one factor.
    pub text: u64,
    /// Tokens of pictures, documents and sealed thinking, which no text's factor fits.
    pub apart: u64,
}

impl Estimate {
    /// All tokens, by the factor of a model.
    pub fn tokens(&self, factor: f64) -> u64 {
        (self.text as f64 * factor).ceil() as u64 + self.apart
    }
}

/// Estimates the input tokens of a request body; the error is a sentence for a 400. The model may be missing.
pub fn estimate(body: &[u8]) -> Result<Estimate, String> {
    let parts = Parts::read(body).map_err(|problem| problem.to_string())?;
    let messages = match parts.messages {
        Messages::Absent => return Err("messages: Field required".into()),
        Messages::NoList => return Err("messages: Input should be a valid list".into()),
        Messages::Priced { count: 0, .. } => return Err("messages: at least one message is required".into()),
        Messages::Priced { price, .. } => price,
    };
    let prompt = match (parts.tools.text > 0, parts.forces_tool) {
        (false, _) => 0,
        (true, true) => TOOLS_PROMPT_FORCED,
        (true, false) => TOOLS_PROMPT,
    };
    let all = Price::of_text((REQUEST + prompt) * TOKEN) + parts.system + parts.tools + messages;
    Ok(Estimate { text: all.text.div_ceil(TOKEN), apart: all.apart.div_ceil(TOKEN) })
}

/// A price in hundredths of a token, with its two parts as in [`Estimate`].
#[derive(Clone, Copy, Default)]
struct Price {
    text: u64,
    apart: u64,
}

impl Price {
    fn of_text(text: u64) -> Self {
        Self { text, apart: 0 }
    }

    fn apart(apart: u64) -> Self {
        Self { text: 0, apart }
    }
}

impl Add for Price {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { text: self.text + other.text, apart: self.apart + other.apart }
    }
}

/// What was found at the top level; of duplicate keys the last stands.
#[derive(Default)]
struct Parts {
    system: Price,
    tools: Price,
    forces_tool: bool,
    messages: Messages,
}

#[derive(Default)]
enum Messages {
    #[default]
    Absent,
    NoList,
    Priced {
        price: Price,
        count: u64,
    },
}

impl Parts {
    fn read(body: &[u8]) -> Result<Self, Problem> {
        let mut parts = Self::default();
        let mut cursor = body::open(body)?;
        cursor.members(|cursor, key| {
            let key = cursor.bytes(key);
            if json::is_name(key, "messages") {
                parts.messages = messages(cursor)?;
            } else if json::is_name(key, "system") {
                parts.system = content(cursor, 0)?;
            } else if json::is_name(key, "tools") {
                parts.tools = sum(cursor, tool)?;
            } else if json::is_name(key, "tool_choice") {
                let choice = cursor.value()?;
                let [kind] = fields(cursor.bytes(choice), ["type"]);
                parts.forces_tool = matches!(kind, Some(b"\"any\"" | b"\"tool\""));
            } else {
                cursor.value()?;
            }
            Ok(())
        })?;
        cursor.end()?;
        Ok(parts)
    }
}

fn messages(cursor: &mut Cursor<'_>) -> Result<Messages, Fault> {
    if cursor.peek()? != b'[' {
        cursor.value()?;
        return Ok(Messages::NoList);
    }
    let (mut price, mut count) = (Price::default(), 0);
    cursor.elements(|cursor| {
        count += 1;
        price.text += MESSAGE * TOKEN;
        if cursor.peek()? != b'{' {
            return cursor.value().map(drop);
        }
        let mut inside = Price::default();
        cursor.members(|cursor, key| {
            match json::is_name(cursor.bytes(key), "content") {
                true => inside = content(cursor, 0)?,
                false => _ = cursor.value()?,
            }
            Ok(())
        })?;
        price = price + inside;
        Ok(())
    })?;
    Ok(Messages::Priced { price, count })
}

/// Prices content: a string, or a list of blocks.
fn content(cursor: &mut Cursor<'_>, depth: u8) -> Result<Price, Fault> {
    if cursor.peek()? == b'"' {
        let text = cursor.string()?;
        return Ok(Price::of_text(weigh(inside(cursor.bytes(text)))));
    }
    sum(cursor, |item| block(item, depth))
}

fn block(block: &[u8], depth: u8) -> Price {
    if depth == DEPTH_MAX {
        return Price::of_text(weigh(block));
    }
    let [kind, text, source, nested, name, input] =
        fields(block, ["type", "text", "source", "content", "name", "input"]);
    let nested = || nested.map(|nested| inner(nested, depth)).unwrap_or_default();
    let own = match kind {
        Some(b"\"text\"") => return Price::of_text(weigh(inside(text.unwrap_or_default()))),
        Some(b"\"thinking\"" | b"\"redacted_thinking\"") => thinking(block),
        Some(b"\"tool_use\"" | b"\"server_tool_use\"" | b"\"mcp_tool_use\"") => {
            let input = input.map_or(0, weigh);
            Price::of_text(TOOL_BLOCK * TOKEN + weigh(inside(name.unwrap_or_default())) + input)
        }
        Some(b"\"tool_result\"" | b"\"mcp_tool_result\"") => Price::of_text(TOOL_BLOCK * TOKEN) + nested(),
        Some(b"\"image\"") => Price::apart(image(source) * TOKEN),
        Some(b"\"document\"") => {
            let [title, context] = fields(block, ["title", "context"]);
            let words = [title, context].into_iter().flatten().map(|text| weigh(inside(text))).sum::<u64>();
            Price::of_text(words) + document(source.unwrap_or_default(), depth)
        }
        Some(b"\"search_result\"") => {
            let [title] = fields(block, ["title"]);
            Price::of_text(weigh(source.unwrap_or_default()) + weigh(title.unwrap_or_default())) + nested()
        }
        // A block of a later day: all of its text, which errs high.
        _ => Price::of_text(weigh(block)),
    };
    own + Price::of_text(BLOCK * TOKEN)
}

/// Content inside a block.
fn inner(nested: &[u8], depth: u8) -> Price {
    content(&mut Cursor::new(nested), depth + 1).unwrap_or_default()
}

/// Thinking is sent back word for word, or sealed: then the length of the seal is all there is.
fn thinking(block: &[u8]) -> Price {
    let [text, signature, data] =
        fields(block, ["thinking", "signature", "data"]).map(Option::unwrap_or_default);
    match inside(text) {
        [] => Price::apart((signature.len() + data.len()) as u64 * TOKEN / SEALED_BYTES_PER_TOKEN),
        text => Price::of_text(weigh(text)),
    }
}

fn image(source: Option<&[u8]>) -> u64 {
    let [data] = fields(source.unwrap_or_default(), ["data"]);
    let data = data.unwrap_or_default();
    match data.contains(&b'\\') {
        // Some clients escape the slashes of base64.
        true => json::decode(data).map_or(image::TOKENS_MAX, |data| image::tokens(data.as_bytes())),
        false => image::tokens(inside(data)),
    }
}

fn document(source: &[u8], depth: u8) -> Price {
    let [kind, data, nested] = fields(source, ["type", "data", "content"]);
    let data = inside(data.unwrap_or_default());
    match kind {
        Some(b"\"text\"") => Price::of_text(weigh(data)),
        Some(b"\"base64\"") => {
            let pages = 1 + data.len() as u64 * 3 / 4 / PAGE_BYTES;
            Price::apart(pages.min(PAGES_MAX) * PAGE_TOKENS * TOKEN)
        }
        Some(b"\"content\"") => nested.map(|nested| inner(nested, depth)).unwrap_or_default(),
        _ => Price::apart(UNSEEN_DOCUMENT * TOKEN),
    }
}

/// A tool as the model reads it: name, description and schema. A deferred one is but a name until it is searched
/// for, and one that the service brings along has its settings only.
fn tool(tool: &[u8]) -> Price {
    let [name, description, schema, deferred] =
        fields(tool, ["name", "description", "input_schema", "defer_loading"]);
    let name = weigh(inside(name.unwrap_or_default()));
    Price::of_text(match schema {
        _ if deferred == Some(b"true") => name.max(TOKEN),
        Some(schema) => name + weigh(inside(description.unwrap_or_default())) + weigh(schema),
        None => weigh(tool),
    })
}

/// The raw values of some keys of an object; of duplicates the last. What is no object has none of them.
fn fields<'a, const N: usize>(value: &'a [u8], names: [&str; N]) -> [Option<&'a [u8]>; N] {
    let mut found = [None; N];
    // The value was walked as a part of the body, so a fault only means that it is no object.
    let _ = Cursor::new(value).members(|cursor, key| {
        let value = cursor.value()?;
        let key = cursor.bytes(key);
        if let Some(index) = names.iter().position(|name| json::is_name(key, name)) {
            found[index] = Some(cursor.bytes(value));
        }
        Ok(())
    });
    found
}

/// Adds up what the elements cost by their raw text; a value that is no array is passed over.
fn sum<'a>(cursor: &mut Cursor<'a>, price_of: impl Fn(&'a [u8]) -> Price) -> Result<Price, Fault> {
    if cursor.peek()? != b'[' {
        return cursor.value().map(|_| Price::default());
    }
    let mut sum = Price::default();
    cursor.elements(|cursor| {
        let item = cursor.value()?;
        sum = sum + price_of(cursor.bytes(item));
        Ok(())
    })?;
    Ok(sum)
}

/// A string token without its quotes; nothing for another kind of value.
fn inside(token: &[u8]) -> &[u8] {
    token.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::image::tests::{base64, png};
    use super::*;
    use crate::anthropic::samples;

    fn count(body: &str) -> u64 {
        estimate(body.as_bytes()).unwrap_or_else(|error| panic!("{error}: {body}")).tokens(1.0)
    }

    /// The tokens that blocks add to a message, without its own.
    fn blocks(blocks: &str) -> u64 {
        let message =
            |content: &str| count(&format!(r#"{{"messages":[{{"role":"user","content":[{content}]}}]}}"#));
        message(blocks) - message("")
    }

    #[test]
    fn documented_requests() {
        // The token counting guide of platform.claude.com answers 14 and 403 for these.
        let greeting =
            r#"{"system":"You are a scientist","messages":[{"role":"user","content":"Hello, Claude"}]}"#;
        let weather = r#"{"tools":[{"name":"get_weather","description":"Get the current weather in a given location","input_schema":{"type":"object","properties":{"location":{"type":"string","description":"The city and state, e.g. San Francisco, CA"}},"required":["location"]}}],"messages":[{"role":"user","content":"What's the weather like in San Francisco?"}]}"#;
        for (body, real) in [(greeting, 14), (weather, 403)] {
            let ours = count(body);
            assert!((real..=real * 115 / 100).contains(&ours), "{ours} for {real}");
        }
    }

    #[test]
    fn what_cannot_be_counted() {
        let table = [
            ("", "the body is empty; a JSON object is expected"),
            ("[]", "the body must be a JSON object, but another value begins at byte 0"),
            ("{\"messages\":[}", "the body is not valid JSON: unexpected character at byte 13"),
            ("{\"messages\":[1]", "the body is not valid JSON: it ends inside a value at byte 15"),
            ("{\"messages\":[1]} x", "the body is not valid JSON: unexpected character at byte 17"),
            ("{}", "messages: Field required"),
            ("{\"messages\":null}", "messages: Input should be a valid list"),
            ("{\"messages\":[]}", "messages: at least one message is required"),
        ];
        for (body, sentence) in table {
            assert_eq!(estimate(body.as_bytes()), Err(sentence.into()), "{body}");
        }
    }

    #[test]
    fn everything_that_reaches_the_model_counts() {
        let base = count(r#"{"messages":[{"role":"user","content":"hi"}]}"#);
        let more = [
            r#"{"messages":[{"role":"user","content":"hi"}],"system":"Answer in one word."}"#,
            r#"{"messages":[{"role":"user","content":"hi"}],"system":[{"type":"text","text":"Answer in one word."}]}"#,
            r#"{"messages":[{"role":"user","content":"hi"}],"tools":[{"name":"a","input_schema":{}}]}"#,
            r#"{"messages":[{"role":"user","content":"hi"}],"tools":[{"type":"web_search_20250305","name":"web_search"}]}"#,
            r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":""}]}"#,
            r#"{"mess\u0061ges":[{"role":"user","content":[{"type":"text","text":"hi there"}]}]}"#,
        ];
        for body in more {
            assert!(count(body) > base, "{body}");
        }
        // Settings do not reach it, and of duplicates only the last does.
        let same = [
            r#"{"model":"m","max_tokens":9,"metadata":{"user_id":"x"},"messages":[{"role":"user","content":"hi"}]}"#,
            r#"{"messages":[{"role":"user","content":"quite another text"}],"messages":[{"role":"user","content":"hi"}]}"#,
            r#"{"tools":[],"tool_choice":{"type":"any"},"messages":[{"content":"x","role":"user","content":"hi"}]}"#,
        ];
        for body in same {
            assert_eq!(count(body), base, "{body}");
        }
    }

    #[test]
    fn a_forced_tool_has_the_shorter_prompt() {
        let with = |choice: &str| {
            count(&format!(
                r#"{{"messages":[{{"content":"x"}}],"tools":[{{"name":"a","input_schema":{{}}}}],"tool_choice":{{"type":"{choice}"}}}}"#
            ))
        };
        assert_eq!(with("auto"), with("none"));
        assert_eq!(with("auto") - with("any"), TOOLS_PROMPT - TOOLS_PROMPT_FORCED);
        assert_eq!(with("tool"), with("any"));
    }

    #[test]
    fn blocks_of_every_kind() {
        let image = |file: &[u8]| {
            let data = base64(file);
            blocks(&format!(
                r#"{{"type":"image","source":{{"type":"base64","media_type":"image/png","data":"{data}"}}}}"#
            ))
        };
        assert_eq!(image(&png(200, 200)), 54 + BLOCK);
        assert_eq!(image(b"no picture"), image::TOKENS_MAX + BLOCK);
        let escaped = base64(&png(200, 200)).replace('/', "\\/");
        assert_eq!(blocks(&format!(r#"{{"source":{{"data":"{escaped}"}},"type":"image"}}"#)), 54 + BLOCK);
        assert_eq!(
            blocks(r#"{"type":"image","source":{"type":"url","url":"https://x/y.png"}}"#),
            image::TOKENS_MAX + BLOCK
        );

        let text = r#""one two three four five six seven eight nine ten""#;
        let words = blocks(&format!(
            r#"{{"type":"text","text":{text},"cache_control":{{"type":"ephemeral","ttl":"1h"}}}}"#
        ));
        assert!((10..=12).contains(&words), "{words}");
        for (block, overhead) in [
            (format!(r#"{{"type":"tool_result","tool_use_id":"t","content":{text}}}"#), TOOL_BLOCK + BLOCK),
            (
                format!(r#"{{"type":"tool_result","content":[{{"type":"text","text":{text}}}]}}"#),
                TOOL_BLOCK + BLOCK,
            ),
            (format!(r#"{{"type":"thinking","thinking":{text},"signature":"c2lnbmF0dXJl"}}"#), BLOCK),
            (format!(r#"{{"type":"document","source":{{"type":"text","data":{text}}}}}"#), BLOCK),
            (format!(r#"{{"type":"document","source":{{"type":"content","content":{text}}}}}"#), BLOCK),
        ] {
            let ours = blocks(&block);
            assert!(ours.abs_diff(words + overhead) <= 1, "{ours} for {words} + {overhead}: {block}");
        }
        let sealed = format!(r#"{{"type":"thinking","thinking":"","signature":"{}"}}"#, "A".repeat(600));
        assert!((100..110).contains(&blocks(&sealed)));
        let use_of_bash =
            blocks(r#"{"type":"tool_use","id":"t","name":"Bash","input":{"command":"cargo test"}}"#);
        assert!((15..30).contains(&use_of_bash), "{use_of_bash}");
        let pdf = |bytes: usize| {
            blocks(&format!(
                r#"{{"type":"document","source":{{"type":"base64","data":"{}"}}}}"#,
                "A".repeat(bytes * 4 / 3)
            ))
        };
        assert_eq!(pdf(10_000), PAGE_TOKENS + BLOCK);
        assert_eq!(pdf(250_000), 5 * PAGE_TOKENS + BLOCK);
        assert_eq!(
            blocks(r#"{"type":"document","source":{"type":"url","url":"u"}}"#),
            UNSEEN_DOCUMENT + BLOCK
        );
        assert!(blocks(&format!(r#"{{"type":"later_invention","words":{text}}}"#)) > words);
        assert!(blocks("7") < 5 && blocks("null") < 5);
    }

    #[test]
    fn captured_bodies() {
        // The texts of each, counted by `@anthropic-ai/tokenizer` 0.0.4, without the overheads. The filler of these
        // fixtures is chopped Latin, the worst case for prices made for English: hence the wide lower bound.
        let table = [
            ("2.1.330/count-tokens-text", 649),
            ("2.1.330/count-tokens-tools", 9_326),
            ("2.1.330/count-tokens-large", 35_041),
            ("2.1.330/main-turn", 15_115),
            ("2.1.330/large-tool-result-turn", 45_899),
            ("2.1.330/main-turn-databricks-opus-4-6", 27_443),
            ("2.1.197/main-turn", 23_674),
        ];
        let bodies = samples::bodies();
        for (name, body) in &bodies {
            assert!(estimate(body).is_ok(), "{name}");
        }
        for (name, real) in table {
            let (_, body) = bodies.iter().find(|(path, _)| *path == format!("{name}.body.json")).unwrap();
            let ours = estimate(body).unwrap().tokens(1.0);
            assert!((real * 70 / 100..=real * 115 / 100).contains(&ours), "{ours} for {real}: {name}");
        }
    }

    #[test]
    fn no_depth_and_no_size_is_too_much() {
        let deep =
            |levels, open: &str, close: &str| format!("{}1{}", open.repeat(levels), close.repeat(levels));
        let results = deep(20_000, "[{\"type\":\"tool_result\",\"content\":", "}]");
        for value in [deep(100_000, "[", "]"), deep(100_000, "{\"content\":", "}"), results] {
            let body = format!(
                r#"{{"messages":[{{"content":{value}}},{value}],"tools":[{value}],"system":{value},"tool_choice":1}}"#
            );
            assert!(estimate(body.as_bytes()).is_ok());
            assert!(estimate(&body.as_bytes()[..body.len() / 2]).is_err());
        }
    }

    #[test]
    fn mutated_bodies_never_panic() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        let all = r#"{"system":[{"type":"text","text":"a\u00e9"}],"tools":[{"name":"n","input_schema":{"a":[1]}}],"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64","data":"/9j/4AAQSkZJRgABAQAAAQABAAD/"}},{"type":"tool_result","content":[{"type":"document","source":{"type":"base64","data":"AAAA"}}]},{"type":"thinking","thinking":"","signature":"x"}]}]}"#;
        let mut bodies: Vec<_> =
            samples::bodies().into_iter().filter(|(_, body)| body.len() < 3_000).collect();
        bodies.push(("all".into(), all.into()));
        for _ in 0..4_000 {
            let (name, body) = rng.choice(&bodies).unwrap();
            let body = samples::mutate(body, &mut rng);
            if let Ok(tokens) = estimate(&body).map(|estimate| estimate.tokens(1.0)) {
                assert!(tokens < 20_000, "{name} seed {seed}: {tokens}");
            }
        }
    }
}
