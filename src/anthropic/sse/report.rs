//! What an answer reports of itself: token counts, the stop reason, the words of an error.
//!
//! The same reader serves the data of `message_start` and `message_delta` and a whole Message: the fields have the
//! same names, one level deeper in the first. Reading never fails loudly; what is broken is simply not reported.

use crate::anthropic::json::{self, Cursor, Fault};

/// Token counts as the upstream reports them; `None` where it reported none. Input excludes the cached tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Input read at full price.
    pub input_tokens: Option<u64>,
    /// Output so far.
    pub output_tokens: Option<u64>,
    /// Input written to the prompt cache.
    pub cache_creation_input_tokens: Option<u64>,
    /// Input read from the prompt cache.
    pub cache_read_input_tokens: Option<u64>,
}

impl Usage {
    /// Takes over what a later event of the same answer reports. The figures of `message_delta` are cumulative, so
    /// the last one stands and nothing is added. Input does not shrink while an answer is written: a later zero
    /// is an upstream that does not repeat the figure, and changes nothing.
    pub fn merge(&mut self, later: &Self) {
        let input = |mine: &mut Option<u64>, later: Option<u64>| {
            if later.is_some_and(|tokens| tokens > 0) || mine.is_none() {
                *mine = later;
            }
        };
        input(&mut self.input_tokens, later.input_tokens);
        input(&mut self.cache_creation_input_tokens, later.cache_creation_input_tokens);
        input(&mut self.cache_read_input_tokens, later.cache_read_input_tokens);
        self.output_tokens = later.output_tokens.or(self.output_tokens);
    }

    /// All input: what was cached is not in `input_tokens`.
    pub fn whole_input(&self) -> Option<u64> {
        let cached = [self.cache_creation_input_tokens, self.cache_read_input_tokens];
        let cached = cached.into_iter().flatten().fold(0, u64::saturating_add);
        self.input_tokens.map(|tokens| tokens.saturating_add(cached))
    }

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let mut usage = Self::default();
        object(cursor, |cursor, key| {
            let value = cursor.value()?;
            let tokens = json::count(cursor.bytes(value));
            match key {
                b"\"input_tokens\"" => usage.input_tokens = tokens,
                b"\"output_tokens\"" => usage.output_tokens = tokens,
                b"\"cache_creation_input_tokens\"" => usage.cache_creation_input_tokens = tokens,
                b"\"cache_read_input_tokens\"" => usage.cache_read_input_tokens = tokens,
                _ => {}
            }
            Ok(())
        })?;
        Ok(usage)
    }
}

/// The token counts of a whole Message; `None` when it is no JSON object or reports none.
pub fn usage_of_message(json: &[u8]) -> Option<Usage> {
    Report::read(json).map(|report| report.usage).filter(|usage| *usage != Usage::default())
}

/// Type and message of an error: of an error event's data or of an error body, in Anthropic's shape or in Databricks'
/// `{"error_code","message"}`. A missing type counts as `api_error`; `None` when it is no error at all.
pub fn error_of(data: &[u8]) -> Option<(String, String)> {
    let (mut kind, mut code, mut message, mut found) = (None, None, None, false);
    let mut cursor = Cursor::new(data);
    object(&mut cursor, |cursor, key| {
        match key {
            b"\"error\"" if cursor.peek()? == b'{' => {
                found = true;
                return object(cursor, |cursor, key| {
                    let value = cursor.value()?;
                    match key {
                        b"\"type\"" => kind = json::decode(cursor.bytes(value)),
                        b"\"message\"" => message = json::decode(cursor.bytes(value)),
                        _ => {}
                    }
                    Ok(())
                });
            }
            b"\"error_code\"" => {
                let value = cursor.value()?;
                code = Some(cursor.bytes(value));
            }
            b"\"message\"" | b"\"error\"" if !found => {
                let value = cursor.value()?;
                message = json::decode(cursor.bytes(value));
            }
            _ => _ = cursor.value()?,
        }
        Ok(())
    })
    .ok()?;
    if !found && code.is_none() && message.is_none() {
        return None;
    }
    let by_code = match code {
        Some(b"\"REQUEST_LIMIT_EXCEEDED\"") => "rate_limit_error",
        _ => "api_error",
    };
    Some((kind.unwrap_or_else(|| by_code.to_owned()), message.unwrap_or_default()))
}

/// The figures of one event, or of a whole Message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) usage: Usage,
    pub(super) stop_reason: Option<String>,
}

impl Report {
    /// `None` when the text is no JSON object, or is cut.
    pub(super) fn read(json: &[u8]) -> Option<Self> {
        let mut report = Self::default();
        let mut cursor = Cursor::new(json);
        report.members(&mut cursor, 0).ok()?;
        cursor.end().ok()?;
        Some(report)
    }

    /// `message` and `delta` hold the same fields one level down; below that nothing is ours.
    fn members(&mut self, cursor: &mut Cursor<'_>, depth: u8) -> Result<(), Fault> {
        object(cursor, |cursor, key| {
            match key {
                b"\"usage\"" => self.usage.merge(&Usage::read(cursor)?),
                b"\"message\"" | b"\"delta\"" if depth == 0 => self.members(cursor, 1)?,
                b"\"stop_reason\"" => {
                    let value = cursor.value()?;
                    self.stop_reason = json::decode(cursor.bytes(value));
                }
                _ => _ = cursor.value()?,
            }
            Ok(())
        })
    }
}

/// Walks the object that comes next, keys with their quotes; a value of another kind is passed over.
fn object<'a>(
    cursor: &mut Cursor<'a>,
    mut each: impl FnMut(&mut Cursor<'a>, &'a [u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    if cursor.peek()? != b'{' {
        return cursor.value().map(drop);
    }
    cursor.members(|cursor, key| {
        let key = cursor.bytes(key);
        each(cursor, key)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(input: u64, output: u64, written: u64, read: u64) -> Usage {
        Usage {
            input_tokens: Some(input),
            output_tokens: Some(output),
            cache_creation_input_tokens: Some(written),
            cache_read_input_tokens: Some(read),
        }
    }

    #[test]
    fn the_last_figure_stands() {
        let mut total = Usage::default();
        total.merge(&usage(42, 1, 1_180, 11_904));
        total.merge(&Usage { output_tokens: Some(7), ..Usage::default() });
        assert_eq!(total, usage(42, 7, 1_180, 11_904));
        total.merge(&usage(50, 5, 0, 0));
        assert_eq!(total, usage(50, 5, 1_180, 11_904), "a zero is no news, a smaller output is");
        let mut zero = Usage::default();
        zero.merge(&usage(0, 0, 0, 0));
        assert_eq!(zero, usage(0, 0, 0, 0), "a first zero is");
    }

    #[test]
    fn the_whole_input_has_its_cached_parts() {
        assert_eq!(usage(42, 7, 1_180, 11_904).whole_input(), Some(13_126));
        assert_eq!(Usage { input_tokens: Some(5), ..Usage::default() }.whole_input(), Some(5));
        assert_eq!(Usage { cache_read_input_tokens: Some(5), ..Usage::default() }.whole_input(), None);
        assert_eq!(usage(u64::MAX, 0, u64::MAX, 1).whole_input(), Some(u64::MAX));
    }

    #[test]
    fn usage_of_whole_messages() {
        let message = include_bytes!("../../../tests/fixtures/claude-code/responses/message.json");
        assert_eq!(usage_of_message(message), Some(usage(42, 7, 1_180, 11_904)));
        let only = |input_tokens| Some(Usage { input_tokens, ..Usage::default() });
        let table = [
            (r#"{"usage":{"input_tokens":3}}"#, only(Some(3))),
            (r#"{"content":[{"usage":{"input_tokens":9}}],"usage":{"input_tokens":3}}"#, only(Some(3))),
            (r#"{"usage":{"input_tokens":"3","output_tokens":-1}}"#, None),
            (r#"{"usage":{"input_tokens":3}"#, None),
            (r#"{"usage":[3]}"#, None),
            (r#"{"usage":null}"#, None),
            ("[]", None),
            ("", None),
            ("<html>", None),
        ];
        for (json, wanted) in table {
            assert_eq!(usage_of_message(json.as_bytes()), wanted, "{json}");
        }
    }

    #[test]
    fn words_of_errors() {
        let table = [
            (
                r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
                Some(("overloaded_error", "Overloaded")),
            ),
            (r#"{"error":{"message":"m\n"}}"#, Some(("api_error", "m\n"))),
            (r#"{"error":{}}"#, Some(("api_error", ""))),
            (r#"{"error":{"type":"a","message":"b"},"message":"c"}"#, Some(("a", "b"))),
            (r#"{"error":"text"}"#, Some(("api_error", "text"))),
            (
                r#"{"error_code":"REQUEST_LIMIT_EXCEEDED","message":"slow"}"#,
                Some(("rate_limit_error", "slow")),
            ),
            (
                r#"{"error_code":403,"message":"Invalid access token."}"#,
                Some(("api_error", "Invalid access token.")),
            ),
            (r#"{"type":"ping"}"#, None),
            ("[1]", None),
            ("Overloaded", None),
            ("", None),
        ];
        for (data, wanted) in table {
            let found = error_of(data.as_bytes());
            let found = found.as_ref().map(|(kind, message)| (kind.as_str(), message.as_str()));
            assert_eq!(found, wanted, "{data}");
        }
    }
}
