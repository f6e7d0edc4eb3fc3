//! The text of an error body that no client could read as it is: a page, another vendor's JSON, plain words.

use serde_json::Value;

/// The length of a message in bytes; a page has its say at the top.
const MESSAGE_BYTES_MAX: usize = 2_048;

/// How often JSON is looked for inside a JSON string: Databricks wraps Anthropic's words once.
const WRAPPINGS_MAX: usize = 3;

/// The part of a page in bytes that is searched for text.
const PAGE_BYTES_MAX: usize = 256 * 1024;

/// What to tell the client of a body; never empty.
pub(super) fn message(status: u16, content_type: Option<&str>, body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(PAGE_BYTES_MAX)]);
    let text = text.trim();
    if text.is_empty() {
        return format!("the upstream answered {status} without a body");
    }
    let is_page =
        text.starts_with('<') || content_type.is_some_and(|kind| kind.to_ascii_lowercase().contains("html"));
    let readable = match innermost_message(text) {
        Some(message) => one_line(&message),
        None if is_page => one_line(&without_tags(text)),
        None => one_line(text),
    };
    if readable.is_empty() {
        return format!("the upstream answered {status} with a page that has no text");
    }
    readable
}

/// The message inside JSON, and inside JSON that is that message in turn.
pub(in crate::anthropic) fn innermost_message(text: &str) -> Option<String> {
    let mut innermost: Option<String> = None;
    for _ in 0..WRAPPINGS_MAX {
        let tree: Value = match serde_json::from_str(innermost.as_deref().unwrap_or(text)) {
            Ok(tree) => tree,
            Err(_) => break,
        };
        let Some(message) = message_of(&tree) else { break };
        innermost = Some(message.to_owned());
    }
    innermost
}

fn message_of(tree: &Value) -> Option<&str> {
    let places = ["/error/message", "/message", "/detail", "/detail/message", "/error", "/error_description"];
    let mut texts = places.iter().filter_map(|place| tree.pointer(place)?.as_str());
    texts.find(|text| !text.trim().is_empty())
}

/// A page without its tags, scripts, styles and comments; a tag counts as a space.
fn without_tags(page: &str) -> String {
    let mut text = String::with_capacity(page.len() / 2);
    let mut rest = page;
    while let Some(at) = rest.find('<') {
        text.push_str(&rest[..at]);
        text.push(' ');
        rest = behind_tag(&rest[at..]);
    }
    text.push_str(rest);
    unescaped(&text)
}

fn behind_tag(tag: &str) -> &str {
    if let Some(comment) = tag.strip_prefix("<!--") {
        return comment.split_once("-->").map_or("", |(_, rest)| rest);
    }
    for (open, close) in [("<script", "</script"), ("<style", "</style")] {
        if tag.get(..open.len()).is_some_and(|front| front.eq_ignore_ascii_case(open)) {
            let end = tag
                .as_bytes()
                .windows(close.len())
                .position(|part| part.eq_ignore_ascii_case(close.as_bytes()));
            let rest = end.map_or("", |end| &tag[end..]);
            return rest.split_once('>').map_or("", |(_, rest)| rest);
        }
    }
    tag.split_once('>').map_or("", |(_, rest)| rest)
}

fn unescaped(text: &str) -> String {
    let entities =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&nbsp;", " "), ("&amp;", "&")];
    entities.iter().fold(text.to_owned(), |text, (entity, character)| text.replace(entity, character))
}

/// White space and control characters folded to single spaces, and cut where it gets too long.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > MESSAGE_BYTES_MAX {
            line.truncate(line.floor_char_boundary(MESSAGE_BYTES_MAX));
            line.push('…');
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_a_line() {
        let table = [
            ("<title>502</title>\n<h1>Bad\tGateway</h1>", "502 Bad Gateway"),
            ("<style>a{b:c}</style><SCRIPT>if (a<b) {}</SCRIPT >text<!-- <p>no</p> -->", "text"),
            ("<p>1 &lt; 2 &amp;amp; &quot;x&quot;</p>", "1 < 2 &amp; \"x\""),
            ("<p>open <a href='x", "open"),
            ("<script>never closed", "the upstream answered 502 with a page that has no text"),
            ("<!-- never closed", "the upstream answered 502 with a page that has no text"),
            ("a\u{0}b\u{1b}[31mc", "a b [31mc"),
        ];
        for (page, wanted) in table {
            assert_eq!(message(502, None, page.as_bytes()), wanted, "{page}");
        }
        assert_eq!(message(502, None, b"\xff\xfe bytes"), "\u{fffd}\u{fffd} bytes");
    }

    #[test]
    fn long_pages_are_cut() {
        for page in
            ["你".repeat(100_000), "word ".repeat(100_000), format!("<p>{}", "<b>x</b>".repeat(100_000))]
        {
            let line = message(502, None, page.as_bytes());
            assert!(
                line.ends_with('…') && line.len() <= MESSAGE_BYTES_MAX + '…'.len_utf8(),
                "{}",
                line.len()
            );
        }
    }

    #[test]
    fn pages_full_of_open_scripts_take_linear_time() {
        // Each unclosed script would otherwise be searched to the end again.
        let page = "<script>".repeat(30_000);
        assert!(message(502, None, page.as_bytes()).contains("no text"));
    }
}
