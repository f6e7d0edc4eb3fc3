//! Finds a workspace token in an error body and puts stars in its place.
//!
//! A service that echoes the `Authorization` header may do so inside JSON, or JSON inside JSON: a character of the
//! token then stands as an escape, after one or several backslashes. Every spelling is recognised.

use memchr::memchr2;

/// Below this length a token may be part of a common word, so only its whole occurrences are masked.
const SURE_BYTES_MIN: usize = 8;

/// Four levels of JSON inside JSON; without a limit a body of backslashes would be read again from each of them.
const SLASHES_MAX: usize = 15;

/// The body with every occurrence of the token replaced by `***`; `None` when there is none, or no token.
pub(super) fn mask(body: &[u8], token: &str) -> Option<Vec<u8>> {
    let token = token.as_bytes();
    let first = *token.first()?;
    let mut masked: Vec<u8> = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(step) = memchr2(first, b'\\', &body[at..]) {
        at += step;
        // Of several ends the last, so that no half of an escape stays behind.
        let ends = ends_of_token(body, at, token);
        let is_sure = |end: &&usize| token.len() >= SURE_BYTES_MIN || is_whole(body, at, **end);
        match ends.iter().rev().find(is_sure) {
            Some(&end) => {
                masked.extend_from_slice(&body[copied..at]);
                masked.extend_from_slice(b"***");
                (copied, at) = (end, end);
            }
            None => at += 1,
        }
    }
    if copied == 0 {
        return None;
    }
    masked.extend_from_slice(&body[copied..]);
    Some(masked)
}

/// The places where a token that begins at `at` may end, in order; more than one only behind a backslash.
fn ends_of_token(body: &[u8], at: usize, token: &[u8]) -> Vec<usize> {
    let (mut places, mut next) = (vec![at], Vec::new());
    for wanted in token {
        places.iter().for_each(|at| ends_of_character(body, *at, *wanted, &mut next));
        next.sort_unstable();
        next.dedup();
        std::mem::swap(&mut places, &mut next);
        if places.is_empty() {
            break;
        }
        next.clear();
    }
    places
}

/// Adds the places where one character may end that stands plain or as an escape. More than one only for a
/// backslash: how many of a row of them are one character depends on how often the text is read.
fn ends_of_character(body: &[u8], at: usize, wanted: u8, ends: &mut Vec<usize>) {
    let is = |at: usize| body.get(at) == Some(&wanted);
    if is(at) {
        ends.push(at + 1);
    }
    let mut after = at;
    for _ in 0..SLASHES_MAX {
        if body.get(after) != Some(&b'\\') {
            return;
        }
        after += 1;
        loop {
            if wanted == b'\\' {
                ends.push(after);
            } else if is(after) {
                ends.push(after + 1);
            }
            if is_code(body, after, wanted) {
                ends.push(after + 5);
            }
            // A backslash that is an escape itself can begin the next one.
            if !is_code(body, after, b'\\') {
                break;
            }
            after += 5;
        }
    }
}

/// True for `uXXXX` with the code of this character.
fn is_code(body: &[u8], at: usize, character: u8) -> bool {
    let code = body.get(at..at + 5).and_then(|code| std::str::from_utf8(code).ok()?.strip_prefix('u'));
    code.is_some_and(|code| u32::from_str_radix(code, 16) == Ok(u32::from(character)))
}

/// The letter of an escape in front is no part of a word: what it stands for hardly ever is.
fn is_whole(body: &[u8], start: usize, end: usize) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_escape = |length: usize| start >= length && body[start - length] == b'\\';
    let is_glued = body[..start].last().is_some_and(is_word) && !is_escape(2) && !is_escape(6);
    !is_glued && !body.get(end).is_some_and(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_masked() {
        let table = [
            ("dapi01234567", "x dapi01234567 y dapi01234567", Some("x *** y ***")),
            ("dapi01234567", "dapi0123456", None),
            ("dapi01234567", "dapi0123456dapi01234567", Some("dapi0123456***")),
            ("dapi01234567", "xdapi012345678", Some("x***8")),
            ("dapi01234567", r#"{"m":"\u0064api01234567"}"#, Some(r#"{"m":"***"}"#)),
            (
                "dapi01234567",
                r#"{"m":"{\"n\":\"\\u0064api0123456\\u0037\"}"}"#,
                Some(r#"{"m":"{\"n\":\"***\"}"}"#),
            ),
            ("ab/cd+efgh=", r#"say \"ab\/cd\u002Befgh=\""#, Some(r#"say \"***\""#)),
            ("quo\"te\\back", r#"quo\"te\\back"#, Some("***")),
            ("quo\"te\\back", r#"quo\\\"te\\\\back"#, Some("***")),
            // Found by fuzzing: a backslash of the token as a code, and an escape in front of a short token.
            ("quo\"te\\back", r#"quo\"te\u005cback"#, Some("***")),
            ("quo\"te\\back", r#"quo\\u0022te\\\\u005C\\u0062ack"#, Some("***")),
            ("quo\"te\\back", r#"quo\u005c"te\u005c\u005cu0062ack"#, Some("***")),
            ("tail\\\\\\\\", r#"{"m":"tail\\\\\\\\"}"#, Some(r#"{"m":"***"}"#)),
            (r"key\", r"a key\\n, a key\", Some(r"a ***\n, a ***")),
            ("secret", r#"line\nsecret\u000asecret"#, Some(r#"line\n***\u000a***"#)),
            ("secret", "the secret's out, secretly: secret", Some("the ***'s out, secretly: ***")),
            ("a", "a banana", Some("*** banana")),
            ("", "anything", None),
            ("dapi01234567", "", None),
            ("dapi01234567", r"\u00", None),
            ("dapi01234567", r"\\\\", None),
        ];
        for (token, body, wanted) in table {
            let masked = mask(body.as_bytes(), token);
            assert_eq!(masked.as_deref().map(String::from_utf8_lossy).as_deref(), wanted, "{body}");
        }
    }
}
