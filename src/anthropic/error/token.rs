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
        match end_of_token(body, at, token) {
            Some(end) if token.len() >= SURE_BYTES_MIN || is_whole(body, at, end) => {
                masked.extend_from_slice(&body[copied..at]);
                masked.extend_from_slice(b"***");
                (copied, at) = (end, end);
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return None;
    }
    masked.extend_from_slice(&body[copied..]);
    Some(masked)
}

/// Where the token that begins at `at` ends, if one does.
fn end_of_token(body: &[u8], mut at: usize, token: &[u8]) -> Option<usize> {
    for wanted in token {
        at = end_of_character(body, at, *wanted)?;
    }
    Some(at)
}

/// Where one character ends that stands plain or as an escape.
fn end_of_character(body: &[u8], at: usize, wanted: u8) -> Option<usize> {
    if *body.get(at)? == wanted {
        return Some(at + 1);
    }
    let slashes = body[at..].iter().take(SLASHES_MAX).take_while(|byte| **byte == b'\\').count();
    let after = at + slashes;
    let byte = *body.get(after)?;
    if slashes == 0 {
        return None;
    }
    if byte == wanted {
        return Some(after + 1);
    }
    let code = std::str::from_utf8(body.get(after + 1..after + 5)?).ok()?;
    let is_code = byte == b'u' && u32::from_str_radix(code, 16) == Ok(u32::from(wanted));
    is_code.then_some(after + 5)
}

fn is_whole(body: &[u8], start: usize, end: usize) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !body[..start].last().is_some_and(is_word) && !body.get(end).is_some_and(is_word)
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
