//! Watches the bytes of one stream go by and remembers how far it got.
//!
//! It decides nothing: it says whether content has begun, whether this is a place between two events, how the
//! stream ended and what it cost. It must never disturb the relay, so it cannot fail, keeps at most two lines of
//! [`LINE_BYTES_MAX`], and passes over the data of content (one event per token) without copying it. One scanner
//! per attempt, fed every chunk as it arrives; the split of the chunks makes no difference to any answer.

use memchr::memchr2;

use super::framing::{EventHead, Field, Kind};
use super::report::{self, Report, Usage};

/// The part of a line that is looked at. A `message_start` is a few hundred bytes; beyond this the data counts
/// as broken, which costs its figures and nothing else.
const LINE_BYTES_MAX: usize = 16 * 1024;

/// The part of an unreadable error that is kept as its message, in bytes.
const UNREADABLE_BYTES_MAX: usize = 512;

/// How a stream said that it is over. A stream that stops without saying so is broken, whatever its framing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// `message_stop`: the answer is complete.
    Stop,
    /// An `error` event.
    Error {
        /// Anthropic's error type, `api_error` when there is none.
        kind: String,
        /// The upstream's own words.
        message: String,
    },
}

/// The state of one stream.
#[derive(Debug, Default)]
pub struct Scanner {
    bytes_seen: u64,
    head: EventHead,
    /// The data of the current event, when it may tell something.
    data: Vec<u8>,
    /// The front of a line whose end has not come.
    partial: Vec<u8>,
    /// The rest of the current line is of no interest.
    skipping: bool,
    /// Some byte of the current event has been seen.
    inside_event: bool,
    /// The last byte was a carriage return; a line feed right after it belongs to it.
    after_cr: bool,
    /// This stream ends its lines with CRLF, so a carriage return alone is half a line end.
    crlf: bool,
    message_started: bool,
    content_started: bool,
    usage: Usage,
    stop_reason: Option<String>,
    end: Option<End>,
}

impl Scanner {
    /// A scanner before the first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Watches the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        self.bytes_seen += bytes.len() as u64;
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_cr) && bytes[0] == b'\n' {
                self.crlf = true;
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = memchr2(b'\n', b'\r', bytes) else { return self.hold(bytes) };
            self.finish_line(&bytes[..end]);
            self.after_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
        }
    }

    /// True at the start and behind a blank line: where an event of our own may be slipped in.
    pub fn at_event_boundary(&self) -> bool {
        let half_line_end = self.after_cr && self.crlf;
        !self.inside_event && !half_line_end
    }

    /// True from the moment a `message_start` is certain.
    pub fn message_started(&self) -> bool {
        self.message_started
    }

    /// True from the moment an event of a content block is certain, be it incomplete.
    pub fn content_started(&self) -> bool {
        self.content_started
    }

    /// How the stream said that it is over; what comes after that changes nothing.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// The token counts so far.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Why the model stopped, once it said so.
    pub fn stop_reason(&self) -> Option<&str> {
        self.stop_reason.as_deref()
    }

    /// All bytes fed.
    pub fn bytes_seen(&self) -> u64 {
        self.bytes_seen
    }

    /// Keeps a line that has no end yet, as far as it may matter.
    fn hold(&mut self, piece: &[u8]) {
        self.inside_event = true;
        if self.skipping {
            return;
        }
        append(&mut self.partial, piece);
        self.head.read_unfinished(&self.partial);
        self.note_kind();
        // Six bytes tell which field it is: `event:` is the longest that matters.
        if self.partial.len() >= 6 {
            match Field::of(&self.partial) {
                Field::Data(_) if self.is_wanted() => {}
                Field::Data(_) => {
                    self.head.has_data = true;
                    self.skip();
                }
                Field::Name(_) => {}
                Field::Ignored => self.skip(),
            }
        }
    }

    fn skip(&mut self) {
        self.skipping = true;
        self.partial.clear();
    }

    fn finish_line(&mut self, piece: &[u8]) {
        if std::mem::take(&mut self.skipping) {
            return;
        }
        if self.partial.is_empty() {
            return self.line(piece);
        }
        append(&mut self.partial, piece);
        let mut line = std::mem::take(&mut self.partial);
        self.line(&line);
        line.clear();
        self.partial = line;
    }

    fn line(&mut self, line: &[u8]) {
        if line.is_empty() {
            return self.dispatch();
        }
        self.inside_event = true;
        // A long line is cut here too, so that one feed and many come to the same answer.
        if let Field::Data(data) = self.head.read(&line[..line.len().min(LINE_BYTES_MAX)])
            && self.is_wanted()
        {
            if !self.data.is_empty() {
                append(&mut self.data, b"\n");
            }
            append(&mut self.data, data);
        }
        self.note_kind();
    }

    /// True while the data of the current event may tell something.
    fn is_wanted(&self) -> bool {
        self.end.is_none() && self.head.known().is_none_or(Kind::is_telling)
    }

    fn note_kind(&mut self) {
        // Behind the end, lines are skipped before their kind is certain: where the chunks are cut would show.
        if let Some(kind) = self.head.known()
            && self.end.is_none()
        {
            self.message_started |= kind == Kind::MessageStart;
            self.content_started |= kind.is_content();
        }
    }

    /// The blank line: the event counts now.
    fn dispatch(&mut self) {
        let head = std::mem::take(&mut self.head);
        self.inside_event = false;
        if self.end.is_none() {
            match head.kind() {
                Kind::MessageStart | Kind::MessageDelta => self.take_report(),
                Kind::MessageStop => self.end = Some(End::Stop),
                Kind::Error => self.end = Some(error_end(&self.data)),
                _ => {}
            }
        }
        self.data.clear();
    }

    fn take_report(&mut self) {
        if let Some(report) = Report::read(&self.data) {
            self.usage.merge(&report.usage);
            self.stop_reason = report.stop_reason.or(self.stop_reason.take());
        }
    }
}

fn error_end(data: &[u8]) -> End {
    let (kind, message) = report::error_of(data).unwrap_or_else(|| {
        let front = &data[..data.len().min(UNREADABLE_BYTES_MAX)];
        ("api_error".to_owned(), String::from_utf8_lossy(front).into_owned())
    });
    End::Error { kind, message }
}

fn append(kept: &mut Vec<u8>, bytes: &[u8]) {
    let room = LINE_BYTES_MAX - kept.len().min(LINE_BYTES_MAX);
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::samples;

    fn feed(pieces: &[&[u8]]) -> Scanner {
        let mut scanner = Scanner::new();
        for piece in pieces {
            scanner.feed(piece);
        }
        scanner
    }

    /// Everything a scanner answers.
    fn answers(scanner: &Scanner) -> String {
        format!(
            "boundary {} message {} content {} end {:?} {:?} stop {:?} bytes {}",
            scanner.at_event_boundary(),
            scanner.message_started(),
            scanner.content_started(),
            scanner.end(),
            scanner.usage(),
            scanner.stop_reason(),
            scanner.bytes_seen()
        )
    }

    #[test]
    fn reads_the_transcripts() {
        let error = || Some(End::Error { kind: "overloaded_error".into(), message: "Overloaded".into() });
        // Name, message and content begun, output tokens, stop reason, end.
        let table = [
            ("text", true, true, Some(14), Some("end_turn"), Some(End::Stop)),
            ("crlf", true, true, Some(14), Some("end_turn"), Some(End::Stop)),
            ("tool_use", true, true, Some(71), Some("tool_use"), Some(End::Stop)),
            ("thinking", true, true, Some(63), Some("end_turn"), Some(End::Stop)),
            ("max_tokens", true, true, Some(32), Some("max_tokens"), Some(End::Stop)),
            ("comment_keepalive", true, true, Some(5), Some("end_turn"), Some(End::Stop)),
            ("ping_before_start", true, true, Some(5), Some("end_turn"), Some(End::Stop)),
            ("error_first_event", false, false, None, None, error()),
            ("error_mid_stream", true, true, Some(1), None, error()),
            ("error_after_block", true, true, Some(1), None, error()),
            ("cut_mid_block", true, true, Some(1), None, None),
            ("cut_mid_event", true, true, Some(1), None, None),
            ("cut_before_message_stop", true, true, Some(1), None, None),
        ];
        let transcripts = samples::files("responses", ".sse");
        for (name, message, content, output, stop_reason, end) in table {
            let (_, bytes) =
                transcripts.iter().find(|(path, _)| path.ends_with(&format!("/{name}.sse"))).unwrap();
            let scanner = feed(&[bytes]);
            assert_eq!(scanner.message_started(), message, "{name}");
            assert_eq!(scanner.content_started(), content, "{name}");
            assert_eq!(scanner.usage().output_tokens, output, "{name}");
            assert_eq!(scanner.usage().cache_read_input_tokens, message.then_some(11_904), "{name}");
            assert_eq!(scanner.stop_reason(), stop_reason, "{name}");
            assert_eq!(scanner.end(), end.as_ref(), "{name}");
            assert_eq!(scanner.at_event_boundary(), name != "cut_mid_event", "{name}");
            assert_eq!(scanner.bytes_seen(), bytes.len() as u64, "{name}");
        }
    }

    #[test]
    fn any_split_gives_the_same_answers() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        for (name, bytes) in samples::files("responses", ".sse") {
            let text = String::from_utf8(bytes).unwrap().replace("\r\n", "\n");
            let unnamed = text.split_inclusive('\n').filter(|line| !line.starts_with("event:")).collect();
            let variants = [text.replace('\n', "\r\n"), text.replace('\n', "\r"), unnamed, text];
            for (index, text) in variants.iter().enumerate() {
                let bytes = text.as_bytes();
                let wanted = answers(&feed(&[bytes]));
                // Every cut of each second variant: all of them take seconds and find nothing more.
                let step = if index % 2 == 0 { 1 } else { 7 };
                for cut in (0..bytes.len()).step_by(step) {
                    let (front, back) = bytes.split_at(cut);
                    assert_eq!(answers(&feed(&[front, back])), wanted, "{name} cut at {cut}");
                }
                let single: Vec<&[u8]> = bytes.chunks(1).collect();
                assert_eq!(answers(&feed(&single)), wanted, "{name} byte by byte");
                for _ in 0..20 {
                    let mut rest = bytes;
                    let mut scanner = Scanner::new();
                    while !rest.is_empty() {
                        let (piece, more) = rest.split_at(rng.usize(1..=rest.len().min(200)));
                        scanner.feed(piece);
                        rest = more;
                    }
                    assert_eq!(answers(&scanner), wanted, "{name} seed {seed}");
                }
            }
        }
    }

    /// Found by fuzzing: behind the end an unnamed event counted as content when it came in one piece, and did not
    /// when the cut was behind `data: `.
    #[test]
    fn behind_the_end_nothing_counts_in_any_split() {
        let text = b"event: error\ndata: x\n\ndata: {\"type\":\"content_block_delta\"}\n\n";
        let wanted = answers(&feed(&[text]));
        for cut in 0..text.len() {
            let (front, back) = text.split_at(cut);
            assert_eq!(answers(&feed(&[front, back])), wanted, "cut at {cut}");
        }
        assert!(!feed(&[text]).content_started());
    }

    #[test]
    fn line_ends_and_missing_names_change_nothing() {
        let bytes = include_str!("../../../tests/fixtures/claude-code/responses/tool_use.sse");
        let wanted = feed(&[bytes.as_bytes()]);
        let no_names: String =
            bytes.lines().filter(|line| !line.starts_with("event")).map(|line| format!("{line}\n")).collect();
        for text in
            [bytes.replace('\n', "\r\n"), bytes.replace('\n', "\r"), bytes.replace(": ", ":"), no_names]
        {
            let scanner = feed(&[text.as_bytes()]);
            assert_eq!(scanner.usage(), wanted.usage());
            assert_eq!(scanner.end(), Some(&End::Stop));
            assert_eq!(scanner.stop_reason(), Some("tool_use"));
            assert!(scanner.content_started() && scanner.at_event_boundary());
        }
    }

    #[test]
    fn boundaries() {
        let table = [
            ("", true),
            ("e", false),
            ("event: ping\n", false),
            ("event: ping\n\n", true),
            ("event: ping\n\nd", false),
            (": comment\n", false),
            (": comment\n\n", true),
            ("\n", true),
            ("data: x\r\n", false),
            ("data: x\r\n\r", false),
            ("data: x\r\n\r\n", true),
            ("data: x\r\r", true),
            ("data: x\r\ry", false),
        ];
        for (text, wanted) in table {
            assert_eq!(feed(&[text.as_bytes()]).at_event_boundary(), wanted, "{text:?}");
        }
    }

    #[test]
    fn oddities_do_not_confuse() {
        let start = "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":3}}}\n\n";
        let check = |text: &str, end: Option<End>, input: Option<u64>| {
            let scanner = feed(&[text.as_bytes()]);
            assert_eq!(scanner.end(), end.as_ref(), "{text}");
            assert_eq!(scanner.usage().input_tokens, input, "{text}");
        };
        let error =
            |kind: &str, message: &str| Some(End::Error { kind: kind.into(), message: message.into() });
        let late = "event: error\ndata: {\"error\":{\"type\":\"x\"}}\n\n";

        check(&format!("{start}event: message_stop\ndata: {{}}\n\n{late}"), Some(End::Stop), Some(3));
        check(&format!("{late}event: message_stop\ndata: {{}}\n\n"), error("x", ""), None);
        check(&format!("{start}event: vote\ndata: {{\"usage\":{{\"input_tokens\":9}}}}\n\n"), None, Some(3));
        check(
            &format!("{start}event: message_delta\ndata: {{\"usage\":{{\"input_tokens\":9\n\n"),
            None,
            Some(3),
        );
        check(&format!("{start}event: message_delta\ndata: {{\"usage\":7}}\n\n"), None, Some(3));
        check("event: error\ndata: plain words\n\n", error("api_error", "plain words"), None);
        check("event: error\n\n", error("api_error", ""), None);
        check("event: error\ndata: {\"error\":\ndata: {\"type\":\"t\"}}\n\n", error("t", ""), None);
        check("data: {\"index\":0,\"type\":\"message_stop\"}\n\n", Some(End::Stop), None);
        // Until its blank line an event has not happened; and words inside content are not events.
        check("event: message_stop\ndata: {}\n", None, None);
        let quoted = "event: content_block_delta\ndata: {\"text\":\"\\n\\nevent: message_stop\\n\\n\"}\n\n";
        check(quoted, None, None);
    }

    #[test]
    fn huge_lines_cost_no_memory() {
        let megabyte = "x".repeat(1 << 20);
        for front in [
            "event: content_block_delta\ndata: {\"delta\":\"",
            "data: {\"type\":\"content_block_delta\",\"delta\":\"",
            "data: {\"delta\":\"",
            "event: error\ndata: {\"error\":\"",
            ": ",
            "event: ",
            "id: ",
            "nonsense",
        ] {
            let mut split = feed(&[front.as_bytes(), megabyte.as_bytes(), megabyte.as_bytes(), b"\"}"]);
            assert!(split.partial.capacity() + split.data.capacity() <= 4 * LINE_BYTES_MAX, "{front}");
            split.feed(b"\n\n");
            assert!(split.partial.capacity() + split.data.capacity() <= 4 * LINE_BYTES_MAX, "{front}");
            let whole = feed(&[format!("{front}{megabyte}{megabyte}\"}}\n\n").as_bytes()]);
            assert_eq!(answers(&split), answers(&whole), "{front}");
        }
    }

    #[test]
    fn content_is_never_copied() {
        let delta = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0}\n\n";
        let scanner = feed(&[delta.repeat(100).as_bytes()]);
        assert_eq!(scanner.partial.capacity() + scanner.data.capacity(), 0);
    }

    #[test]
    fn mutated_streams_never_panic() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        let transcripts = samples::files("responses", ".sse");
        for _ in 0..4_000 {
            let (name, bytes) = rng.choice(&transcripts).unwrap();
            let bytes = samples::mutate(bytes, &mut rng);
            let (front, back) = bytes.split_at(rng.usize(..=bytes.len()));
            let split = answers(&feed(&[front, back]));
            assert_eq!(split, answers(&feed(&[&bytes])), "{name} seed {seed}");
            if let Some(event) = super::super::split_event(&bytes) {
                assert!(event.len <= bytes.len() && event.data.end <= event.len, "{name} seed {seed}");
            }
        }
    }
}
