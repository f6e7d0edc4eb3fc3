//! How many tokens a text is worth, without a vocabulary.
//!
//! A tokenizer first cuts text where its character changes, into words, numbers, marks and blanks, and then each piece
//! into the tokens of its vocabulary. We cut the same way, and price the pieces: a word by its length, its capitals and
//! its pairs and triples of letters, for those tell a word of everyday English, which is one token, from one that is put
//! together out of syllables; marks by their pairs and triples; numbers and blanks by their length. A piece is one token
//! at least. That is one pass with a table of 4,096 bytes instead of a hundred thousand words, and comes within a few
//! per cent for most texts of some pages, in any language.
//!
//! The prices were fitted to `@anthropic-ai/tokenizer`, the only vocabulary that Anthropic has published. That of
//! today's models is another one, hence what is learned from real answers: see `learned`. `docs/TOKENS.md` has the
//! figures, and says how to repeat the fit.

use std::ops::Range;

use super::prices::{
    CASE, DIGIT_BEYOND, INDENT, LENGTH, LETTER_BEYOND, LINE, MARKS, NGRAM, NUMBER, SCRIPT, SPACE, TAB, WORD,
};

/// A hundredth of a token: the unit of all prices.
pub(super) const TOKEN: u64 = 100;

/// No piece is less than one token.
const PIECE_MIN: i32 = TOKEN as i32;

/// Blanks beyond the tables.
const BLANKS_PER_TOKEN: usize = 64;

// What stands in the pairs and triples for something that is no character.
const NOTHING: u32 = 0;
const AFTER_SPACE: u32 = 27;
const GLUED: u32 = 28;
const END: u32 = 30;
const MARKS_START: u32 = 31;
/// Tells marks from letters, of which only five bits are taken.
const MARK: u32 = 0x80;

/// Prices the inside of a JSON string, or a whole JSON value taken as text, in hundredths of a token. Escapes count
/// as what they stand for. The bytes must be valid UTF-8.
pub(super) fn weigh(json: &[u8]) -> u64 {
    let mut meter = Meter::default();
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        at += match byte {
            b'a'..=b'z' => meter.small_letters(&json[at..]),
            b'\'' => meter.apostrophe(&json[at..]),
            b'\\' => meter.escape(&json[at..]),
            0x80.. => {
                let (code, len) = code_point(&json[at..]);
                meter.wide(code);
                len
            }
            _ => {
                meter.ascii(byte);
                1
            }
        };
    }
    meter.end()
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Start,
    Word,
    Number,
    Marks,
    Blank,
}

/// How a letter looks, for what its neighbour costs.
#[derive(Clone, Copy, Default)]
enum Shape {
    #[default]
    None,
    Small,
    Capital,
    Wide,
}

/// The price so far, and the piece that the next character may continue.
#[derive(Default)]
struct Meter {
    total: u64,
    kind: Kind,
    /// What the characters of the piece have cost.
    price: i32,
    /// Its characters.
    len: usize,
    is_after_space: bool,
    before: u32,
    last: u32,
    shape: Shape,
    blanks: Blanks,
}

/// A run of blanks.
#[derive(Clone, Copy, Default)]
struct Blanks {
    spaces: usize,
    tabs: usize,
    lines: usize,
    last: u8,
}

impl Meter {
    fn ascii(&mut self, byte: u8) {
        match byte {
            b'a'..=b'z' => self.letter(byte, Shape::Small),
            b'A'..=b'Z' => self.letter(byte, Shape::Capital),
            b'0'..=b'9' => {
                self.go_on(Kind::Number);
                self.len += 1;
            }
            b' ' | b'\t'..=b'\r' => {
                self.go_on(Kind::Blank);
                self.blanks.add(byte);
            }
            _ => {
                self.go_on(Kind::Marks);
                self.follow(u32::from(byte) | MARK);
            }
        }
    }

    /// Takes all the small letters at the front at once, which is most of any text; the answer is their number.
    fn small_letters(&mut self, text: &[u8]) -> usize {
        let len = text.iter().position(|byte| !byte.is_ascii_lowercase()).unwrap_or(text.len());
        self.letter(text[0], Shape::Small);
        for &byte in &text[1..len] {
            self.price = self.price.saturating_add(SMALL_AFTER_SMALL);
            self.follow(u32::from(byte & 31));
        }
        self.len += len - 1;
        len
    }

    fn letter(&mut self, byte: u8, shape: Shape) {
        self.go_on(Kind::Word);
        let is_capital = usize::from(matches!(shape, Shape::Capital));
        self.price = self.price.saturating_add(i32::from(CASE[self.shape as usize * 2 + is_capital]));
        self.follow(u32::from(byte & 31));
        self.shape = shape;
        self.len += 1;
    }

    /// The end of `don't` and its like is one token.
    fn apostrophe(&mut self, text: &[u8]) -> usize {
        let is_inside = self.kind == Kind::Marks || (self.kind == Kind::Blank && self.blanks.last == b' ');
        let short = match text.get(1..) {
            Some([b's' | b't' | b'm' | b'd', ..]) => 2,
            Some([b'r' | b'v', b'e', ..] | [b'l', b'l', ..]) => 3,
            _ => 0,
        };
        if is_inside || short == 0 {
            self.ascii(b'\'');
            return 1;
        }
        self.close(true);
        self.total += TOKEN;
        self.kind = Kind::Start;
        short
    }

    fn wide(&mut self, code: u32) {
        let (script, is_mark) = script_of(code);
        self.go_on(if is_mark { Kind::Marks } else { Kind::Word });
        let mut price = i32::from(SCRIPT[script]) + ngram(NOTHING, NOTHING, code);
        if !is_mark {
            price += ngram(NOTHING, self.last, code);
            self.shape = Shape::Wide;
            self.len += 1;
        }
        self.price = self.price.saturating_add(price);
        (self.before, self.last) = (self.last, code);
    }

    /// Adds what a character costs after the two before it.
    fn follow(&mut self, symbol: u32) {
        let price = ngram(NOTHING, self.last, symbol) + ngram(self.before, self.last, symbol);
        self.price = self.price.saturating_add(price);
        (self.before, self.last) = (self.last, symbol);
    }

    /// Goes on with the piece, or begins one of another kind.
    fn go_on(&mut self, kind: Kind) {
        if self.kind == kind {
            return;
        }
        self.is_after_space = self.close(true);
        let start = match (kind, self.is_after_space) {
            (Kind::Marks, _) => MARKS_START,
            (_, true) => AFTER_SPACE,
            (_, false) => GLUED,
        };
        (self.kind, self.price, self.len) = (kind, 0, 0);
        (self.before, self.last, self.shape) = (NOTHING, start, Shape::None);
    }

    /// Ends the piece. True when it was blanks whose last space belongs to what follows.
    fn close(&mut self, is_followed: bool) -> bool {
        let led = usize::from(self.is_after_space);
        let price = match self.kind {
            Kind::Start => return false,
            Kind::Blank => return self.close_blanks(is_followed),
            Kind::Word => {
                let end = ngram(NOTHING, self.last, END) + ngram(self.before, self.last, END);
                let length = by_length(&LENGTH, self.len, LETTER_BEYOND);
                self.price.saturating_add(end + i32::from(WORD[led])).saturating_add(length)
            }
            Kind::Number => {
                let (glued, spaced) = NUMBER.split_at(NUMBER.len() / 2);
                by_length(if self.is_after_space { spaced } else { glued }, self.len, DIGIT_BEYOND)
            }
            Kind::Marks => self.price.saturating_add(i32::from(MARKS[led])),
        };
        self.total += u64::from(price.max(PIECE_MIN).unsigned_abs());
        false
    }

    /// Of several blanks before something else the last is apart: a space becomes a part of what follows.
    fn close_blanks(&mut self, is_followed: bool) -> bool {
        let blanks = std::mem::take(&mut self.blanks);
        if !is_followed {
            self.total += blanks.price();
            return false;
        }
        let mut last = Blanks::default();
        last.add(blanks.last);
        self.total += blanks.without(last).price();
        if blanks.last != b' ' {
            self.total += last.price();
        }
        blanks.last == b' '
    }

    fn end(mut self) -> u64 {
        self.close(false);
        self.total
    }

    /// Prices what an escape stands for; the answer is its length in bytes.
    fn escape(&mut self, escape: &[u8]) -> usize {
        match escape.get(1) {
            Some(b'u') => {
                let Some(unit) = code_unit(escape) else { return 2 };
                match (unit, escape.get(6..).and_then(code_unit)) {
                    (0xd800..=0xdbff, Some(low @ 0xdc00..=0xdfff)) => {
                        self.wide(0x1_0000 + ((unit & 0x3ff) << 10 | low & 0x3ff));
                        return 12;
                    }
                    (0..=0x7f, _) => self.ascii(unit as u8),
                    _ => self.wide(unit),
                }
                6
            }
            Some(b'n') => self.short(b'\n'),
            Some(b't') => self.short(b'\t'),
            Some(b'r' | b'b' | b'f') => self.short(b'\r'),
            Some(byte) if byte.is_ascii() => self.short(*byte),
            _ => 1,
        }
    }

    fn short(&mut self, byte: u8) -> usize {
        self.ascii(byte);
        2
    }
}

impl Blanks {
    fn add(&mut self, byte: u8) {
        match byte {
            b'\n' => self.lines += 1,
            b' ' => self.spaces += 1,
            _ => self.tabs += 1,
        }
        self.last = byte;
    }

    fn without(self, other: Self) -> Self {
        let (spaces, tabs) = (self.spaces - other.spaces, self.tabs - other.tabs);
        Self { spaces, tabs, lines: self.lines - other.lines, last: self.last }
    }

    fn price(self) -> u64 {
        let Self { spaces, tabs, lines, .. } = self;
        let price = match (lines, tabs) {
            (0, 0) if spaces == 0 => return 0,
            (0, 0) => by_length(&SPACE, spaces, 0),
            (0, _) => by_length(&TAB, tabs, 0),
            _ => by_length(&LINE, lines, 0) + by_length(&INDENT, spaces + tabs, 0),
        };
        let more = (spaces + tabs + lines) / BLANKS_PER_TOKEN;
        u64::from(price.max(PIECE_MIN).unsigned_abs()) + more as u64 * TOKEN
    }
}

const SMALL_AFTER_SMALL: i32 = CASE[Shape::Small as usize * 2] as i32;

/// The price for a length, of which the table holds the usual ones.
fn by_length(table: &[i16], len: usize, beyond: i32) -> i32 {
    let most = table.len() - 1;
    let more = i32::try_from(len.saturating_sub(most)).unwrap_or(i32::MAX);
    i32::from(table[len.min(most)]).saturating_add(more.saturating_mul(beyond))
}

/// What a character adds after two others.
fn ngram(before: u32, last: u32, symbol: u32) -> i32 {
    let hash = before
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(last.wrapping_mul(0x85eb_ca6b))
        .wrapping_add(symbol.wrapping_mul(0xc2b2_ae35));
    let hash = (hash ^ hash >> 15).wrapping_mul(0x2c1b_3c6d);
    // The table has 2^12 entries.
    i32::from(NGRAM[(hash >> 20) as usize])
}

/// Where scripts end, in the order of `SCRIPT`, and whether they are marks rather than letters.
const SCRIPT_ENDS: [(u32, bool); SCRIPT.len()] = [
    (0x250, false),   // Latin with accents
    (0x370, false),   // phonetic letters
    (0x400, false),   // Greek
    (0x530, false),   // Cyrillic
    (0x600, false),   // Armenian, Hebrew
    (0x800, false),   // Arabic
    (0xe00, false),   // scripts of India
    (0xf00, false),   // Thai, Lao
    (0x1e00, false),  // other scripts
    (0x2000, false),  // more Latin, more Greek
    (0x2c00, true),   // dashes, quotes, arrows, boxes
    (0x3000, false),  // rare
    (0x3040, true),   // CJK marks
    (0x3100, false),  // kana
    (0x3400, false),  // signs between
    (0xa000, false),  // CJK
    (0xac00, false),  // other scripts
    (0xd800, false),  // hangul
    (0xfe00, false),  // compatible forms
    (0x1_0000, true), // full-width forms
    (u32::MAX, true), // emoji
];

/// The marks among the Latin letters.
const LATIN_MARKS: Range<u32> = 0xa0..0xc0;

/// The script of a character beyond ASCII, as a place in `SCRIPT`, and whether it is a mark.
fn script_of(code: u32) -> (usize, bool) {
    let script = SCRIPT_ENDS.partition_point(|(end, _)| *end <= code).min(SCRIPT_ENDS.len() - 1);
    (script, SCRIPT_ENDS[script].1 || LATIN_MARKS.contains(&code))
}

/// The character at the front and its length in bytes.
fn code_point(bytes: &[u8]) -> (u32, usize) {
    let tail = |at: usize| u32::from(bytes.get(at).copied().unwrap_or_default() & 0x3f);
    let lead = u32::from(bytes[0]);
    match lead {
        0xf0.. => ((lead & 7) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        0xe0.. => ((lead & 0xf) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((lead & 0x1f) << 6 | tail(1), 2),
    }
}

/// The code unit of a `\uXXXX` at the front.
fn code_unit(escape: &[u8]) -> Option<u32> {
    let digits = escape.strip_prefix(b"\\u")?.get(..4)?;
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts with their count by `@anthropic-ai/tokenizer` 0.0.4.
    const COUNTED: &[(&str, u64)] = &[
        (
            "The proxy relays every request to one of several workspaces and copies the answer back as it arrives. When a workspace is busy or broken, another one takes over, and the person at the keyboard never notices that anything went wrong.",
            47,
        ),
        (
            "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.",
            46,
        ),
        (
            "fn take_report(&mut self) {\n    if let Some(report) = Report::read(&self.data) {\n        self.usage.merge(&report.usage);\n        self.stop_reason = report.stop_reason.or(self.stop_reason.take());\n    }\n}\n",
            65,
        ),
        (
            "def merge(left, right):\n    result = []\n    while left and right:\n        result.append(left.pop(0) if left[0] < right[0] else right.pop(0))\n    return result + left + right\n",
            53,
        ),
        (
            "const res = await fetch(`${base}/v1/messages`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(payload) });\nif (!res.ok) throw new HttpError(res.status);\n",
            60,
        ),
        (
            "{\"id\":\"msg_01\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"Hello.\"}],\"stop_reason\":\"end_turn\",\"usage\":{\"input_tokens\":42,\"output_tokens\":7}}",
            49,
        ),
        (
            "SELECT endpoint, count(*) AS requests, avg(latency_ms) FROM access_log WHERE status >= 500 GROUP BY endpoint ORDER BY requests DESC LIMIT 10;",
            32,
        ),
        (
            "2026-11-23T06:13:11.123Z INFO relay request=req_01 endpoint=workspace-1 status=200 bytes=10432 ttfb_ms=812",
            41,
        ),
        (
            "diff --git a/src/main.rs b/src/main.rs\nindex 83db48f..bf3a2c1 100644\n--- a/src/main.rs\n+++ b/src/main.rs\n@@ -1,4 +1,5 @@\n fn main() {\n-    println!(\"one\");\n+    println!(\"two\");\n }\n",
            87,
        ),
        (
            "| route | method | key |\n|---|---|---|\n| `/v1/messages` | POST | yes |\n| `/health` | GET, HEAD | no |\n",
            39,
        ),
        (
            "代理把每个请求转发到若干工作区之一,并在数据到达时立即返回。当某个工作区繁忙或出现故障时,另一个会接管,用户完全不会察觉。",
            61,
        ),
        (
            "昨天下午,我们在办公室讨论了如何提高缓存命中率的问题,最后决定让同一个会话尽量留在同一个工作区。",
            50,
        ),
        ("プロキシは各リクエストをワークスペースの一つに転送し、届いたデータをそのまま返します。", 43),
        ("프록시는 각 요청을 여러 작업 공간 중 하나로 전달하고 도착하는 대로 응답을 복사합니다.", 50),
        (
            "Прокси передаёт каждый запрос в одно из нескольких рабочих пространств и копирует ответ по мере поступления.",
            52,
        ),
        ("😀🚀🎉👍🤖✨🔥💡", 18),
        ("c1a0dec1 0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f 1234567890 3.14159265", 50),
    ];

    #[test]
    fn close_to_a_real_tokenizer() {
        let (mut all_ours, mut all_real) = (0.0, 0.0);
        for (text, real) in COUNTED {
            let token = serde_json::to_string(text).unwrap();
            let ours = weigh(&token.as_bytes()[1..token.len() - 1]) as f64 / TOKEN as f64;
            let ratio = ours / *real as f64;
            assert!((0.85..=1.25).contains(&ratio), "{ratio:.2}: {ours} for {real}: {text}");
            (all_ours, all_real) = (all_ours + ours, all_real + *real as f64);
        }
        let ratio = all_ours / all_real;
        assert!((1.0..1.1).contains(&ratio), "errs high by a little: {ratio:.2}");
    }

    #[test]
    fn escapes_count_as_what_they_stand_for() {
        let table = [
            (
                "line\\nbreak \\\"quoted\\\" back\\\\slash\\tand\\/on",
                "line\nbreak \"quoted\" back\\u005cslash\tand/on",
            ),
            ("\\u4f60\\u597d \\u0041bc \\ud83e\\udd16\\u00e9", "你好 Abc 🤖é"),
        ];
        for (escaped, plain) in table {
            assert_eq!(weigh(escaped.as_bytes()), weigh(plain.as_bytes()), "{escaped}");
        }
        // Broken ones are priced somehow, and end.
        for broken in ["\\", "\\u", "\\u12", "\\uzzzz", "\\ud800", "\\ud800\\u0041", "\\é"] {
            assert!(weigh(broken.as_bytes()) < 10 * TOKEN, "{broken}");
        }
    }
}
