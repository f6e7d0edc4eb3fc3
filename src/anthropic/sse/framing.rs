//! Where events end and what they are, in a buffer that begins with one.
//!
//! It serves the time before content, when only whole events are passed on so that another endpoint can still take
//! over; and it holds the reading of lines that the scanner shares. It keeps nothing between calls. All three line
//! ends of the event-stream format are taken: LF, CRLF and a lone CR.

use std::ops::Range;

use memchr::memchr2;

use crate::anthropic::json::{self, Cursor};

/// What an event is, by its `event:` line, else by the `type` in its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The answer begins: id, model, input usage.
    MessageStart,
    /// Content begins: from here on no other endpoint can take over.
    ContentBlockStart,
    /// A piece of content; about one per token.
    ContentBlockDelta,
    /// A block of content is complete.
    ContentBlockStop,
    /// The stop reason and the cumulative usage.
    MessageDelta,
    /// The answer is complete.
    MessageStop,
    /// A sign of life.
    Ping,
    /// The upstream failed, and says so after a 200.
    Error,
    /// Nothing but comments, blank lines or fields without an event.
    Comment,
    /// An event we do not know; tolerated, as Anthropic asks of clients.
    Other,
}

impl Kind {
    /// True for the events that carry content, even when they come out of order.
    pub fn is_content(self) -> bool {
        matches!(self, Self::ContentBlockStart | Self::ContentBlockDelta | Self::ContentBlockStop)
    }

    fn of_name(name: &[u8]) -> Self {
        match name {
            b"message_start" => Self::MessageStart,
            b"content_block_start" => Self::ContentBlockStart,
            b"content_block_delta" => Self::ContentBlockDelta,
            b"content_block_stop" => Self::ContentBlockStop,
            b"message_delta" => Self::MessageDelta,
            b"message_stop" => Self::MessageStop,
            b"ping" => Self::Ping,
            b"error" => Self::Error,
            _ => Self::Other,
        }
    }

    /// True when the data is worth keeping: usage, the stop reason, the words of an error.
    pub(super) fn is_telling(self) -> bool {
        matches!(self, Self::MessageStart | Self::MessageDelta | Self::Error)
    }
}

/// One whole event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Bytes from its first line to the end of its blank line.
    pub len: usize,
    /// What it is.
    pub kind: Kind,
    /// The payload of its first data line; empty when it has none.
    pub data: Range<usize>,
}

/// One whole event at the front of `bytes`, or `None` when its blank line has not come yet. A block of comments
/// counts as an event, and so does a blank line on its own.
pub fn split_event(bytes: &[u8]) -> Option<Event> {
    let mut head = EventHead::default();
    let mut data = 0..0;
    let mut lines = Lines { bytes, at: 0 };
    while let Some(line) = lines.next_whole() {
        if line.is_empty() {
            return Some(Event { len: lines.at, kind: head.kind(), data });
        }
        if let Field::Data(payload) = head.read(&bytes[line.clone()])
            && data.is_empty()
        {
            data = line.end - payload.len()..line.end;
        }
    }
    None
}

/// The lines of a buffer.
struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Lines<'_> {
    /// The next line that has its end, without it. A carriage return at the very end of the buffer is a whole line
    /// end only where the line before ended in a bare one: elsewhere a line feed is about to follow.
    fn next_whole(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        let end = start + memchr2(b'\n', b'\r', &self.bytes[start..])?;
        let after = match (self.bytes[end], self.bytes.get(end + 1)) {
            (b'\r', Some(b'\n')) => end + 2,
            (b'\r', None) if self.bytes[..start].ends_with(b"\r\n") => return None,
            _ => end + 1,
        };
        self.at = after;
        Some(start..end)
    }
}

/// A line of an event, as far as we care.
pub(super) enum Field<'a> {
    Name(&'a [u8]),
    Data(&'a [u8]),
    /// A comment, `id`, `retry`, or nonsense.
    Ignored,
}

impl<'a> Field<'a> {
    pub(super) fn of(line: &'a [u8]) -> Self {
        let colon = line.iter().take(6).position(|byte| *byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            b"data" => Self::Data(value),
            b"event" => Self::Name(value),
            _ => Self::Ignored,
        }
    }
}

/// What the lines of one event have told so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EventHead {
    named: Option<Kind>,
    typed: Option<Kind>,
    pub(super) has_data: bool,
}

impl EventHead {
    /// Reads a whole line that is not blank.
    pub(super) fn read<'a>(&mut self, line: &'a [u8]) -> Field<'a> {
        let field = Field::of(line);
        match field {
            // An empty name counts as none.
            Field::Name(name) if !name.is_empty() => self.named = Some(Kind::of_name(name)),
            Field::Data(data) => {
                self.has_data = true;
                if self.known().is_none() {
                    self.typed = type_at_front(data).or_else(|| type_inside(data));
                }
            }
            _ => {}
        }
        field
    }

    /// Looks at the beginning of a line whose end has not come.
    pub(super) fn read_unfinished(&mut self, line: &[u8]) {
        if self.known().is_none()
            && let Field::Data(data) = Field::of(line)
        {
            self.typed = type_at_front(data);
        }
    }

    pub(super) fn known(&self) -> Option<Kind> {
        self.named.or(self.typed)
    }

    pub(super) fn kind(&self) -> Kind {
        self.known().unwrap_or(if self.has_data { Kind::Other } else { Kind::Comment })
    }
}

/// The kind by a `type` that is the first member of the data, however much of the rest is missing.
fn type_at_front(data: &[u8]) -> Option<Kind> {
    let rest = data.trim_ascii_start().strip_prefix(b"{")?;
    let rest = rest.trim_ascii_start().strip_prefix(b"\"type\"")?;
    let rest = rest.trim_ascii_start().strip_prefix(b":")?;
    let name = rest.trim_ascii_start().strip_prefix(b"\"")?;
    Some(Kind::of_name(&name[..memchr::memchr(b'"', name)?]))
}

/// The kind by a `type` that stands anywhere at the top level. Slower, and never needed for Anthropic's own order.
fn type_inside(data: &[u8]) -> Option<Kind> {
    let mut kind = None;
    // A fault behind the type does not matter.
    let _ = Cursor::new(data).members(|cursor, key| {
        let value = cursor.value()?;
        if json::is_name(cursor.bytes(key), "type") {
            kind = json::decode(cursor.bytes(value)).map(|name| Kind::of_name(name.as_bytes()));
        }
        Ok(())
    });
    kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::samples;

    #[test]
    fn whole_events() {
        // Text, kind, data, and what is left behind the event.
        let table = [
            ("event: ping\ndata: {}\n\n", Kind::Ping, "{}", ""),
            ("event: ping\ndata: {}\n\nevent: x", Kind::Ping, "{}", "event: x"),
            ("event:ping\ndata:{}\n\n\n", Kind::Ping, "{}", "\n"),
            ("event: ping\r\ndata: {}\r\n\r\n", Kind::Ping, "{}", ""),
            ("event: ping\rdata: {}\r\r", Kind::Ping, "{}", ""),
            ("event: ping\rdata: {}\r\rdata", Kind::Ping, "{}", "data"),
            (": keep-alive\n\n", Kind::Comment, "", ""),
            (": a\n: b\n\n: c", Kind::Comment, "", ": c"),
            ("\n\n", Kind::Comment, "", "\n"),
            ("\r\nevent: x", Kind::Comment, "", "event: x"),
            ("id: 7\nretry: 10\n\n", Kind::Comment, "", ""),
            (": c\nevent: error\ndata: x\n\n", Kind::Error, "x", ""),
            ("event: later_invention\ndata: {}\n\n", Kind::Other, "{}", ""),
            ("data: [DONE]\n\n", Kind::Other, "[DONE]", ""),
            ("data: {\"type\":\"message_stop\"}\n\n", Kind::MessageStop, "{\"type\":\"message_stop\"}", ""),
            (
                "data: {\"a\":{\"type\":\"ping\"}, \"type\" : \"error\"}\n\n",
                Kind::Error,
                "{\"a\":{\"type\":\"ping\"}, \"type\" : \"error\"}",
                "",
            ),
            ("event:\ndata: {\"type\":\"ping\"}\n\n", Kind::Ping, "{\"type\":\"ping\"}", ""),
            // The name wins over the data, as in the clients; which line comes first does not matter.
            ("event: ping\ndata: {\"type\":\"error\"}\n\n", Kind::Ping, "{\"type\":\"error\"}", ""),
            ("data: {\"type\":\"error\"}\nevent: ping\n\n", Kind::Ping, "{\"type\":\"error\"}", ""),
            ("event: ping\ndata: a\ndata: b\n\n", Kind::Ping, "a", ""),
            ("event: message_stop\n\n", Kind::MessageStop, "", ""),
        ];
        for (text, kind, data, rest) in table {
            let event = split_event(text.as_bytes()).unwrap_or_else(|| panic!("{text:?} is whole"));
            assert_eq!((event.kind, &text[event.data], &text[event.len..]), (kind, data, rest), "{text:?}");
        }
        let unfinished =
            ["", "event: ping", "event: ping\ndata: {}\n", "data: {}\r\n\r", "data: {}\r", ": c\n"];
        for text in unfinished {
            assert_eq!(split_event(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn transcripts_fall_into_whole_events() {
        for (name, bytes) in samples::files("responses", ".sse") {
            let mut rest = &bytes[..];
            let mut kinds = Vec::new();
            while let Some(event) = split_event(rest) {
                for cut in 0..event.len {
                    assert!(split_event(&rest[..cut]).is_none(), "{name}");
                }
                kinds.push(event.kind);
                rest = &rest[event.len..];
            }
            assert_eq!(rest.is_empty(), !name.contains("cut_mid_event"), "{name}");
            assert!(!kinds.contains(&Kind::Other), "{name}");
        }
    }
}
