//! Request heads: the verdict does not depend on how the bytes arrive, the ranges and values are those of a naive
//! reader, and so is the length of the body: whoever stands before us must not take for a body what we take for a
//! request.

use claude_lb::http::head::{Framing, HEADERS_MAX, Head, Verdict, judge};

/// The last byte chooses the largest head; the rest is what a client sent.
pub fn check(input: &[u8]) {
    let Some((&how, bytes)) = input.split_last() else { return };
    let limit = if how % 8 == 0 { 16 + usize::from(how) } else { 64 * 1024 };
    let verdict = judge(bytes, limit);
    does_not_depend_on_the_split(bytes, limit, &verdict);
    match verdict {
        Verdict::Complete(head) => {
            assert!(head.len() <= limit.min(bytes.len()) && head.headers().count() <= HEADERS_MAX);
            reads_as_a_naive_reader_does(&bytes[..head.len()], &head);
        }
        Verdict::Refuse(refusal) => {
            assert!([400, 417, 431, 501, 505].contains(&refusal.status) && !refusal.message.is_empty());
        }
        Verdict::Incomplete => assert!(bytes.len() < limit),
    }
}

/// Looks at some beginnings, the sharp ones among them.
fn does_not_depend_on_the_split(bytes: &[u8], limit: usize, whole: &Verdict) {
    let ends = bytes.iter().enumerate().filter(|(_, byte)| matches!(byte, b'\r' | b'\n' | b' ' | b':'));
    let sharp = ends.flat_map(|(at, _)| [at, at + 1]).take(40);
    for cut in sharp.chain((0..bytes.len()).step_by(1 + bytes.len() / 16)) {
        match (judge(&bytes[..cut], limit), whole) {
            (Verdict::Complete(early), Verdict::Complete(late)) => assert_eq!(early.len(), late.len()),
            (Verdict::Complete(_), other) => panic!("accepted at {cut}, then {other:?}"),
            (Verdict::Refuse(_), Verdict::Refuse(_)) => {}
            (Verdict::Refuse(early), other) => panic!("refused at {cut} ({}), then {other:?}", early.message),
            (Verdict::Incomplete, Verdict::Complete(late)) => assert!(cut < late.len()),
            (Verdict::Incomplete, _) => {}
        }
    }
}

fn reads_as_a_naive_reader_does(whole: &[u8], head: &Head) {
    let lines = whole.strip_suffix(b"\r\n\r\n").expect("an accepted head has its end");
    let mut lines = lines.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = std::str::from_utf8(lines.next().unwrap()).expect("the request line is ASCII");
    let words: Vec<&str> = first.split(' ').collect();
    let [method, target, version] = words[..] else { panic!("{words:?}") };
    assert_eq!((head.method(), version), (method, if head.is_http_1_0() { "HTTP/1.0" } else { "HTTP/1.1" }));
    if target.starts_with('/') {
        let (path, query) =
            target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        assert_eq!((head.path(), head.query()), (path, query));
    }
    let fields: Vec<(&str, &[u8])> = lines
        .map(|line| {
            let colon = line.iter().position(|&byte| byte == b':').expect("a colon");
            (std::str::from_utf8(&line[..colon]).expect("names are ASCII"), line[colon + 1..].trim_ascii())
        })
        .collect();
    assert_eq!(head.headers().collect::<Vec<_>>(), fields);

    let values = |wanted: &str| -> Vec<&[u8]> {
        fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| *value).collect()
    };
    for (name, value) in &fields {
        let text = head.header(name).expect("a header that is there");
        let first = values(name)[0];
        assert!(text.is_ascii() && (text.as_bytes() == first || !first.is_ascii()), "{name}: {value:?}");
    }
    let framing = match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => Framing::None,
        ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
        ([digits], []) if digits.iter().all(u8::is_ascii_digit) => {
            Framing::Length(std::str::from_utf8(digits).unwrap().parse().unwrap_or(u64::MAX))
        }
        other => panic!("{other:?} was accepted"),
    };
    assert_eq!(head.framing(), framing);
}
