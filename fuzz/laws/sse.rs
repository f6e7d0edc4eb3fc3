//! Event streams: no split of the bytes changes an answer, nothing is lost between events, and both readers agree
//! with a third that follows the letter of the specification.

use claude_lb::anthropic::sse::{End, Kind, Scanner, split_event, usage_of_message};
use fastrand::Rng;
use serde_json::Value;

/// The part of a line that the scanner looks at.
const LINE_BYTES_MAX: usize = 16 * 1024;

/// The last two bytes choose the pieces; the rest is the stream.
pub fn check(input: &[u8]) {
    let Some((stream, seed)) = input.split_last_chunk::<2>() else { return };
    let mut rng = Rng::with_seed(u64::from(u16::from_le_bytes(*seed)));
    let pieces = super::pieces(stream, &mut rng);

    let (whole, split) = (fed(&[stream]), fed(&pieces));
    assert_eq!(answers(&whole), answers(&split), "the split of the chunks shows");
    let state = format!("{split:?}").len();
    // Debug writes up to five characters a byte, for two lines at most.
    assert!(state < 5 * 2 * LINE_BYTES_MAX + 4_096, "the scanner keeps {state} characters");

    let (events, rest) = events_of(stream);
    let (piecemeal, piecemeal_rest) = piecemeal(&pieces);
    assert_eq!(piecemeal_rest, rest, "what is left over depends on the split");
    assert_eq!(meaningful(&piecemeal), meaningful(&events), "the events depend on the split");
    assert_eq!(piecemeal.iter().map(|event| event.len).sum::<usize>() + rest.len(), stream.len());

    if stream.split(|byte| matches!(byte, b'\n' | b'\r')).all(|line| line.len() < LINE_BYTES_MAX) {
        // Whether a carriage return at the very end is a line end or half of one is each reader's own guess.
        if !stream.ends_with(b"\r") {
            agrees_with_events(&whole, &events, rest);
        }
        let (ours, theirs) = (meaningful(&events), by_the_letter(stream));
        assert_eq!(ours.len(), theirs.len(), "the specification counts other events");
        for ((kind, data), (their_kind, their_data)) in ours.into_iter().zip(theirs) {
            assert_eq!(
                (kind, data),
                (their_kind.unwrap_or(kind), their_data),
                "the specification reads it differently"
            );
        }
    }
    usage_of_message(stream);
}

fn fed(pieces: &[&[u8]]) -> Scanner {
    let mut scanner = Scanner::new();
    pieces.iter().for_each(|piece| scanner.feed(piece));
    scanner
}

fn answers(scanner: &Scanner) -> impl PartialEq + std::fmt::Debug {
    (
        (scanner.at_event_boundary(), scanner.message_started(), scanner.content_started()),
        scanner.end().cloned(),
        *scanner.usage(),
        scanner.stop_reason().map(str::to_owned),
        scanner.bytes_seen(),
    )
}

#[derive(Debug, Clone, PartialEq)]
struct Event {
    len: usize,
    kind: Kind,
    data: Vec<u8>,
}

/// The events at the front, and the bytes behind the last of them.
fn events_of(mut bytes: &[u8]) -> (Vec<Event>, &[u8]) {
    let mut events = Vec::new();
    while let Some(event) = split_event(bytes) {
        assert!(event.len > 0 && event.data.end <= event.len);
        let data = bytes[event.data.clone()].to_vec();
        assert!(!data.iter().any(|byte| matches!(byte, b'\n' | b'\r')), "data of one line");
        events.push(Event { len: event.len, kind: event.kind, data });
        bytes = &bytes[event.len..];
    }
    (events, bytes)
}

/// As the relay does it: each event is taken as soon as it is whole.
fn piecemeal(pieces: &[&[u8]]) -> (Vec<Event>, Vec<u8>) {
    let (mut all, mut held) = (Vec::new(), Vec::new());
    for piece in pieces {
        held.extend_from_slice(piece);
        let (events, rest) = events_of(&held);
        all.extend(events);
        held = rest.to_vec();
    }
    (all, held)
}

/// Kinds and data, without what says nothing: half of a line end that was split counts as a blank line of its own.
fn meaningful(events: &[Event]) -> Vec<(Kind, Vec<u8>)> {
    let told = events.iter().filter(|event| event.kind != Kind::Comment);
    told.map(|event| (event.kind, event.data.clone())).collect()
}

fn agrees_with_events(scanner: &Scanner, events: &[Event], rest: &[u8]) {
    let kinds = || events.iter().map(|event| event.kind);
    let is_end = |kind: &Kind| matches!(kind, Kind::MessageStop | Kind::Error);
    let mut in_time = kinds().take_while(|kind| !is_end(kind));
    if in_time.clone().any(Kind::is_content) {
        assert!(scanner.content_started());
    }
    if in_time.any(|kind| kind == Kind::MessageStart) {
        assert!(scanner.message_started());
    }
    let end = kinds().find(is_end);
    match (scanner.end(), end) {
        (None, None)
        | (Some(End::Stop), Some(Kind::MessageStop))
        | (Some(End::Error { .. }), Some(Kind::Error)) => {}
        other => panic!("the scanner and the events end differently: {other:?}"),
    }
    if rest.is_empty() {
        assert!(scanner.at_event_boundary(), "behind a whole event");
    }
    if scanner.at_event_boundary() {
        assert!(rest.is_empty(), "{rest:?} is inside an event");
    }
}

/// The event-stream format read naively: lines first, then fields, then events.
fn by_the_letter(stream: &[u8]) -> Vec<(Option<Kind>, Vec<u8>)> {
    let (mut events, mut name, mut data) = (Vec::new(), None::<Vec<u8>>, Vec::<Vec<u8>>::new());
    for line in whole_lines(stream) {
        if line.is_empty() {
            let (name, data) = (name.take(), std::mem::take(&mut data));
            if name.is_some() || !data.is_empty() {
                let kind = name.as_deref().map_or_else(|| typed(&data), |name| Some(kind_of(name)));
                events.push((kind, data.into_iter().find(|line| !line.is_empty()).unwrap_or_default()));
            }
            continue;
        }
        let (field, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &b""[..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"event" if !value.is_empty() => name = Some(value.to_vec()),
            b"data" => data.push(value.to_vec()),
            _ => {}
        }
    }
    events
}

/// The lines that have their end. A lone carriage return ends one, too.
fn whole_lines(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = Vec::new();
    let mut crlf = false;
    while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
        let is_cr = bytes[end] == b'\r';
        let pair = is_cr && bytes.get(end + 1) == Some(&b'\n');
        // At the very end a carriage return is whole only where line ends are not CRLF.
        if is_cr && bytes.len() == end + 1 && crlf {
            break;
        }
        crlf = pair;
        lines.push(&bytes[..end]);
        bytes = &bytes[end + 1 + usize::from(pair)..];
    }
    lines
}

/// The kind by the data alone; `None` where more than one answer is right: broken JSON, or more than one type.
fn typed(data: &[Vec<u8>]) -> Option<Kind> {
    let [line] = data else { return None };
    let line = std::str::from_utf8(line).ok()?;
    if line.matches("\"type\"").count() > 1 || line.contains('\\') || super::keeps_raw_values(line.as_bytes())
    {
        return None;
    }
    let tree: Value = serde_json::from_str(line).ok()?;
    let kind = tree.get("type").and_then(Value::as_str);
    Some(kind.map_or(Kind::Other, |kind| kind_of(kind.as_bytes())))
}

fn kind_of(name: &[u8]) -> Kind {
    match name {
        b"message_start" => Kind::MessageStart,
        b"content_block_start" => Kind::ContentBlockStart,
        b"content_block_delta" => Kind::ContentBlockDelta,
        b"content_block_stop" => Kind::ContentBlockStop,
        b"message_delta" => Kind::MessageDelta,
        b"message_stop" => Kind::MessageStop,
        b"ping" => Kind::Ping,
        b"error" => Kind::Error,
        _ => Kind::Other,
    }
}
