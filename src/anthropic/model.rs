//! Which model name goes upstream for the one the client asked for.
//!
//! The names of Claude models move every few weeks, so this is a rule and three defaults rather than a table: a
//! fixed table silently turns a new model into an old one. It never refuses a name; what a workspace does not
//! serve, the workspace says. Called once per message request, and `glob_matches` for each endpoint's model list.

use std::borrow::Cow;

/// The names to send for a Claude name that cannot be served as asked: too old, or a bare family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Families {
    /// For anything that names sonnet.
    pub sonnet: String,
    /// For anything that names opus.
    pub opus: String,
    /// For anything that names haiku.
    pub haiku: String,
}

/// The oldest version that Databricks serves under its own name, `databricks-claude-<family>-4-5`.
const OLDEST: (u8, u8) = (4, 5);

/// The name to send upstream. In this order: the operator's globs, Databricks' own names as they are, a version of
/// 4.5 or later under Databricks' name, the default of the family named, and else the name as asked.
///
/// In Claude names case does not matter and the client's `[1m]` mark is dropped: it selects a context window by a
/// header and is no part of any name (the client strips it itself).
pub fn map_model<'a>(asked: &'a str, map: &'a [(String, String)], families: &'a Families) -> Cow<'a, str> {
    let name = plain_name(asked);
    let mapped = |(pattern, _): &&(String, String)| {
        glob_matches(pattern, asked)
            || (is_claude(&name) && glob_matches(&pattern.to_ascii_lowercase(), &name))
    };
    if let Some((_, target)) = map.iter().find(mapped) {
        return Cow::Borrowed(target);
    }
    if !is_claude(&name) {
        return Cow::Borrowed(asked);
    }
    if name.starts_with("databricks-") || name.starts_with("system.ai.") {
        return as_asked(asked, name);
    }
    if let Some(current) = current_name(&name) {
        return Cow::Owned(current);
    }
    match family_of(&name) {
        Some("sonnet") => Cow::Borrowed(&families.sonnet),
        Some("opus") => Cow::Borrowed(&families.opus),
        Some("haiku") => Cow::Borrowed(&families.haiku),
        // A custom endpoint may be called anything, in any case: only the mark goes.
        _ => Cow::Borrowed(&asked[..name.len()]),
    }
}

/// True for the name of a Claude model of 4.5 or older, in whatever spelling it goes upstream: those know no adaptive
/// thinking. False when the name tells no version.
pub fn is_4_5_or_older(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let Some((_, rest)) = name.split_once("claude-") else { return false };
    let family = ["sonnet-", "opus-", "haiku-"].into_iter().find_map(|family| rest.strip_prefix(family));
    let Some((major, rest)) = version_part(family.unwrap_or(rest)) else { return false };
    let minor = rest.strip_prefix(['-', '.']).and_then(version_part).map_or(0, |(minor, _)| minor);
    (major, minor) <= OLDEST
}

/// Matches a whole text against a pattern of literal characters, `*` (any run, also none) and `?` (one character).
/// Remembers one star only, so the time is at most the product of both lengths.
pub fn glob_matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                star = Some((p, t));
            }
            Some(b'?') => {
                p += 1;
                t = next_character(text, t);
            }
            Some(literal) if *literal == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                // Let the last star swallow one character more; without a star there is no second chance.
                let Some((after, from)) = star else { return false };
                let from = next_character(text, from);
                star = Some((after, from));
                (p, t) = (after, from);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

fn next_character(text: &[u8], at: usize) -> usize {
    let is_inside = |at: &usize| text.get(*at).is_some_and(|byte| byte & 0xc0 == 0x80);
    (at + 1..).find(|at| !is_inside(at)).unwrap_or(text.len())
}

/// Lower case, without `[1m]`. Its length is that of the front part of what was asked.
fn plain_name(asked: &str) -> String {
    let name = asked.to_ascii_lowercase();
    match name.strip_suffix("[1m]") {
        Some(short) if is_claude(short) => short.to_owned(),
        _ => name,
    }
}

fn as_asked(asked: &str, name: String) -> Cow<'_, str> {
    if asked == name { Cow::Borrowed(asked) } else { Cow::Owned(name) }
}

fn is_claude(name: &str) -> bool {
    name.contains("claude") || family_of(name).is_some()
}

/// The family that a name names: at its start or after anything but a letter, so `opusplan` does and `octopus`
/// does not.
fn family_of(name: &str) -> Option<&'static str> {
    ["sonnet", "opus", "haiku"].into_iter().find(|family| {
        name.match_indices(family)
            .any(|(at, _)| !name[..at].ends_with(|last: char| last.is_ascii_alphabetic()))
    })
}

/// `databricks-claude-<family>-<major>[-<minor>]` for a Claude name of 4.5 or later. A date, `latest` or a build
/// number behind the version is dropped; anything else there is a model we do not know, and the family decides.
fn current_name(name: &str) -> Option<String> {
    let rest = name.strip_prefix("anthropic/").unwrap_or(name).strip_prefix("claude-")?;
    let family = ["sonnet", "opus", "haiku"].into_iter().find(|family| rest.starts_with(family))?;
    let rest = rest[family.len()..].strip_prefix('-')?;

    let (major, rest) = version_part(rest)?;
    let (minor, rest) = match rest.strip_prefix(['-', '.']).and_then(version_part) {
        Some((minor, rest)) => (Some(minor), rest),
        None => (None, rest),
    };
    if (major, minor.unwrap_or(0)) < OLDEST || !is_droppable(rest) {
        return None;
    }
    Some(match minor {
        Some(minor) => format!("databricks-claude-{family}-{major}-{minor}"),
        None => format!("databricks-claude-{family}-{major}"),
    })
}

/// One or two digits at the front, no more: eight are a date.
fn version_part(text: &str) -> Option<(u8, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number = if digits <= 2 { text[..digits].parse().ok()? } else { return None };
    Some((number, &text[digits..]))
}

/// What may stand behind a version without making it another model: `-20250929`, `@20250929`, `-latest`, `-v1:0`.
fn is_droppable(mut rest: &str) -> bool {
    while let Some(part) = rest.strip_prefix(['-', '@']) {
        let end = part.find(['-', '@']).unwrap_or(part.len());
        let is_date = end == 8 && part[..end].bytes().all(|byte| byte.is_ascii_digit());
        let is_build = part[..end].strip_prefix('v').is_some_and(|build| {
            !build.is_empty() && build.bytes().all(|byte| byte.is_ascii_digit() || byte == b':')
        });
        if !is_date && !is_build && &part[..end] != "latest" && &part[..end] != "default" {
            return false;
        }
        rest = &part[end..];
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn families() -> Families {
        Families { sonnet: "S".into(), opus: "O".into(), haiku: "H".into() }
    }

    #[test]
    fn names_as_they_go_upstream() {
        let table = [
            // The defaults of the clients we have captured.
            ("claude-opus-5-5", "databricks-claude-opus-5-5"),
            ("claude-sonnet-5-5", "databricks-claude-sonnet-5-5"),
            ("claude-haiku-5-5", "databricks-claude-haiku-5-5"),
            ("claude-opus-4-8", "databricks-claude-opus-4-8"),
            ("claude-sonnet-5", "databricks-claude-sonnet-5"),
            ("claude-haiku-4-5-20251001", "databricks-claude-haiku-4-5"),
            // What may stand around a version.
            ("claude-sonnet-4-5", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-4-5[1m]", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-4-5-20250929[1M]", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-4-5@20250929", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-4-5@default", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-4-5-latest", "databricks-claude-sonnet-4-5"),
            ("claude-sonnet-5-20270101", "databricks-claude-sonnet-5"),
            ("claude-sonnet-5-latest", "databricks-claude-sonnet-5"),
            ("claude-sonnet-4-5-20250929-v1:0", "databricks-claude-sonnet-4-5"),
            ("anthropic/claude-sonnet-4.5", "databricks-claude-sonnet-4-5"),
            ("Claude-Opus-5-5", "databricks-claude-opus-5-5"),
            ("CLAUDE-SONNET-12-10", "databricks-claude-sonnet-12-10"),
            // Older than 4.5, in either order of the name.
            ("claude-3-5-sonnet-20241022", "S"),
            ("claude-3-5-haiku-latest", "H"),
            ("claude-3-opus-20240229", "O"),
            ("claude-sonnet-4-20250514", "S"),
            ("claude-sonnet-4-0", "S"),
            ("claude-opus-4-1-20250805", "O"),
            ("claude-opus-4", "O"),
            ("us.anthropic.claude-3-7-sonnet-20250219-v1:0", "S"),
            // Families, and versions with a meaning we do not know.
            ("sonnet", "S"),
            ("Opus", "O"),
            ("haiku[1m]", "H"),
            ("opusplan", "O"),
            ("claude-sonnet", "S"),
            ("claude-sonnet-", "S"),
            ("claude-sonnet-4-", "S"),
            ("claude-sonnet-4-5-", "S"),
            ("claude-opus-5-5-preview", "O"),
            ("claude-opus-555", "O"),
            ("claude-haiku-latest", "H"),
            // Databricks' own.
            ("databricks-claude-sonnet-4-5", "databricks-claude-sonnet-4-5"),
            ("databricks-claude-sonnet-4", "databricks-claude-sonnet-4"),
            ("databricks-claude-opus-4-6[1m]", "databricks-claude-opus-4-6"),
            ("Databricks-Claude-Opus-4-6", "databricks-claude-opus-4-6"),
            ("databricks-", "databricks-"),
            ("databricks-Meta-Llama", "databricks-Meta-Llama"),
            ("system.ai.claude-opus-5-5[1m]", "system.ai.claude-opus-5-5"),
            ("system.ai.claude-sonnet-4-5", "system.ai.claude-sonnet-4-5"),
            ("system.ai.Other", "system.ai.Other"),
            // Others.
            ("gpt-4", "gpt-4"),
            ("GPT-4[1m]", "GPT-4[1m]"),
            ("[1m]", "[1m]"),
            ("claude-", "claude-"),
            ("claude-instant-1", "claude-instant-1"),
            ("claude-mythos-6[1m]", "claude-mythos-6"),
            ("My-Claude-Endpoint", "My-Claude-Endpoint"),
            ("octopus-v2", "octopus-v2"),
            ("模型", "模型"),
        ];
        for (asked, sent) in table {
            assert_eq!(map_model(asked, &[], &families()), sent, "{asked}");
        }
    }

    #[test]
    fn versions_that_know_no_adaptive_thinking() {
        for name in [
            "databricks-claude-sonnet-4-5",
            "databricks-claude-opus-4-1",
            "databricks-claude-sonnet-4",
            "databricks-claude-3-7-sonnet",
            "system.ai.claude-haiku-4-5",
            "claude-sonnet-4-20250514",
            "anthropic.claude-sonnet-4.5",
        ] {
            assert!(is_4_5_or_older(name), "{name}");
        }
        for name in [
            "databricks-claude-opus-4-6",
            "databricks-claude-sonnet-5",
            "databricks-claude-opus-5-5",
            "databricks-claude-sonnet-4-10",
            "my-sonnet",
            "claude-instant",
            "gpt-4",
            "",
        ] {
            assert!(!is_4_5_or_older(name), "{name}");
        }
    }

    #[test]
    fn the_operators_globs_come_first() {
        let map: Vec<(String, String)> = [
            ("claude-opus-4-1*", "first"),
            ("claude-opus-*", "second"),
            ("databricks-claude-haiku-?-5", "third"),
            ("gpt-*", "fourth"),
            ("Claude-Sonnet-9", "fifth"),
            ("sonnet[1m]", "sixth"),
        ]
        .map(|(pattern, target)| (pattern.into(), target.into()))
        .into();
        let table = [
            ("claude-opus-4-1-20250805", "first"),
            ("CLAUDE-OPUS-4-1", "first"),
            ("claude-opus-5-5[1m]", "second"),
            ("databricks-claude-haiku-4-5", "third"),
            ("databricks-claude-haiku-4-55", "databricks-claude-haiku-4-55"),
            ("gpt-4", "fourth"),
            ("GPT-4", "GPT-4"),
            ("claude-sonnet-9", "fifth"),
            ("sonnet[1m]", "sixth"),
            ("sonnet", "S"),
        ];
        for (asked, sent) in table {
            assert_eq!(map_model(asked, &map, &families()), sent, "{asked}");
        }
    }

    #[test]
    fn globs() {
        let table = [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "anything", true),
            ("**", "x", true),
            ("?", "", false),
            ("?", "é", true),
            ("??", "é", false),
            ("*?", "你好", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbd", false),
            ("a*b*c", "aXbYbZc", true),
            ("*-4-5", "databricks-claude-sonnet-4-5", true),
            ("*-4-5", "databricks-claude-sonnet-4-5x", false),
            ("databricks-claude-*", "databricks-claude-", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("abc", "ABC", false),
            ("a[1m]", "a[1m]", true),
        ];
        for (pattern, text, matches) in table {
            assert_eq!(glob_matches(pattern, text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn a_hostile_glob_does_not_blow_up() {
        // Naive backtracking would need more steps than there are atoms.
        assert!(!glob_matches(&format!("{}b", "*a".repeat(50)), &"a".repeat(2_000)));
        assert!(glob_matches(&"*a".repeat(50), &"a".repeat(2_000)));
    }
}
