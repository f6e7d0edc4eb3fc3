//! A cursor over JSON text: where a value begins and ends, without building it.
//!
//! It walks the grammar of RFC 8259 with one bit per open bracket, so a hundred thousand of them cost twelve
//! kilobytes and no stack. It never decodes what nobody asked for, and it is looser than the RFC in exactly two
//! ways: inside a string that is only skipped, raw control characters and unknown escapes pass (the upstream reads
//! the same bytes and judges them). Called by `body`, `sse`, `error` and `tokens`.

use std::ops::Range;

use memchr::memchr;

/// Where the text stopped being JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Offset in bytes, counted from zero.
    pub at: usize,
    /// True when the text ended too early, false when the byte there does not belong.
    pub is_end: bool,
}

/// A place in a JSON text. After a fault its position means nothing.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor before the first byte.
    pub fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// Offset in bytes of the next byte to be read.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The bytes of a range this cursor returned.
    pub fn bytes(&self, range: Range<usize>) -> &'a [u8] {
        &self.text[range]
    }

    /// The first byte of the next token, which tells the kind of value; white space before it is consumed.
    pub fn peek(&mut self) -> Result<u8, Fault> {
        while let Some(&byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Ok(byte);
            }
            self.at += 1;
        }
        Err(Fault { at: self.text.len(), is_end: true })
    }

    /// Walks the object that comes next. `each` gets every key as the range of its token, quotes included, and
    /// must consume exactly the value. Keys are not compared with each other: with duplicates the last call wins.
    pub fn members(
        &mut self,
        mut each: impl FnMut(&mut Self, Range<usize>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.expect(b'{')?;
        if self.peek()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            let key = self.key()?;
            each(self, key)?;
            match self.peek()? {
                b',' => self.at += 1,
                _ => return self.expect(b'}'),
            }
        }
    }

    /// Walks the array that comes next. `each` must consume exactly one element.
    pub fn elements(&mut self, mut each: impl FnMut(&mut Self) -> Result<(), Fault>) -> Result<(), Fault> {
        self.expect(b'[')?;
        if self.peek()? == b']' {
            self.at += 1;
            return Ok(());
        }
        loop {
            each(self)?;
            match self.peek()? {
                b',' => self.at += 1,
                _ => return self.expect(b']'),
            }
        }
    }

    /// Consumes the string that comes next; the range includes the quotes.
    pub fn string(&mut self) -> Result<Range<usize>, Fault> {
        self.expect(b'"')?;
        let start = self.at - 1;
        self.rest_of_string()?;
        Ok(start..self.at)
    }

    /// Consumes one value of any kind; the range has no white space around it.
    pub fn value(&mut self) -> Result<Range<usize>, Fault> {
        self.value_with(|_, _| {})
    }

    /// Like [`Cursor::value`]; `on_key` sees the token of each key inside, however deep, and the text that follows
    /// its colon (white space included).
    pub fn value_with(&mut self, mut on_key: impl FnMut(&'a [u8], &'a [u8])) -> Result<Range<usize>, Fault> {
        self.peek()?;
        let start = self.at;
        let mut open = Nesting::default();
        'value: loop {
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    self.rest_of_string()?;
                }
                b'{' => {
                    self.at += 1;
                    if self.peek()? != b'}' {
                        open.push(true);
                        let key = self.key()?;
                        on_key(&self.text[key], &self.text[self.at..]);
                        continue 'value;
                    }
                    self.at += 1;
                }
                b'[' => {
                    self.at += 1;
                    if self.peek()? != b']' {
                        open.push(false);
                        continue 'value;
                    }
                    self.at += 1;
                }
                b't' => self.word(b"true")?,
                b'f' => self.word(b"false")?,
                b'n' => self.word(b"null")?,
                b'-' | b'0'..=b'9' => self.number()?,
                _ => return Err(self.unexpected()),
            }
            loop {
                let Some(in_object) = open.innermost() else { return Ok(start..self.at) };
                match (self.peek()?, in_object) {
                    (b',', true) => {
                        self.at += 1;
                        let key = self.key()?;
                        on_key(&self.text[key], &self.text[self.at..]);
                        continue 'value;
                    }
                    (b',', false) => {
                        self.at += 1;
                        continue 'value;
                    }
                    (b'}', true) | (b']', false) => {
                        self.at += 1;
                        open.pop();
                    }
                    _ => return Err(self.unexpected()),
                }
            }
        }
    }

    /// Checks that nothing but white space is left.
    pub fn end(&mut self) -> Result<(), Fault> {
        match self.peek() {
            Ok(_) => Err(self.unexpected()),
            Err(_) => Ok(()),
        }
    }

    fn key(&mut self) -> Result<Range<usize>, Fault> {
        let key = self.string()?;
        self.expect(b':')?;
        Ok(key)
    }

    fn expect(&mut self, wanted: u8) -> Result<(), Fault> {
        if self.peek()? != wanted {
            return Err(self.unexpected());
        }
        self.at += 1;
        Ok(())
    }

    /// From behind the opening quote to behind the closing one. Every byte of a conversation passes here. Text is full
    /// of escaped line ends and has few quotes, so quotes are looked for: one behind an odd number of backslashes is text.
    fn rest_of_string(&mut self) -> Result<(), Fault> {
        let start = self.at;
        loop {
            let Some(step) = quote(&self.text[self.at..]) else {
                return Err(Fault { at: self.text.len(), is_end: true });
            };
            let at = self.at + step;
            self.at = at + 1;
            let backslashes = self.text[start..at].iter().rev().take_while(|&&byte| byte == b'\\').count();
            if backslashes % 2 == 0 {
                return Ok(());
            }
        }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), Fault> {
        for &wanted in word {
            match self.text.get(self.at) {
                Some(&byte) if byte == wanted => self.at += 1,
                _ => return Err(self.unexpected()),
            }
        }
        Ok(())
    }

    fn number(&mut self) -> Result<(), Fault> {
        self.take_if(|byte| byte == b'-');
        if !self.take_if(|byte| byte == b'0') {
            self.digits()?;
        }
        if self.take_if(|byte| byte == b'.') {
            self.digits()?;
        }
        if self.take_if(|byte| byte | 0x20 == b'e') {
            self.take_if(|byte| byte == b'+' || byte == b'-');
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        if !self.take_if(|byte| byte.is_ascii_digit()) {
            return Err(self.unexpected());
        }
        while self.take_if(|byte| byte.is_ascii_digit()) {}
        Ok(())
    }

    fn take_if(&mut self, wanted: impl Fn(u8) -> bool) -> bool {
        let taken = self.text.get(self.at).is_some_and(|&byte| wanted(byte));
        self.at += usize::from(taken);
        taken
    }

    fn unexpected(&self) -> Fault {
        Fault { at: self.at, is_end: self.at >= self.text.len() }
    }
}

/// The text of a string token, quotes included; `None` for a broken escape, a lone surrogate, a raw control
/// character, or a token that is no string.
pub fn decode(token: &[u8]) -> Option<String> {
    serde_json::from_slice(token).ok()
}

/// True when a string token spells `name`, with escapes or without.
pub fn is_name(token: &[u8], name: &str) -> bool {
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    if inner.len() <= name.len() {
        return inner == name.as_bytes();
    }
    // No escape spells a character shorter than itself, nor in more than six bytes.
    inner.len() <= name.len() * 6 && inner.contains(&b'\\') && decode(token).as_deref() == Some(name)
}

/// A number token as a whole count; `None` for a sign, a fraction, an exponent, or more than 64 bits.
pub fn count(token: &[u8]) -> Option<u64> {
    let plain = token.first().is_some_and(u8::is_ascii_digit) && token.iter().all(u8::is_ascii_digit);
    if plain { std::str::from_utf8(token).ok()?.parse().ok() } else { None }
}

/// The open brackets, one bit each: set for an object. The innermost 64 need no memory of their own.
#[derive(Default)]
struct Nesting {
    depth: usize,
    word: u64,
    outer: Vec<u64>,
}

impl Nesting {
    fn push(&mut self, object: bool) {
        if self.depth > 0 && self.depth.is_multiple_of(64) {
            self.outer.push(self.word);
        }
        self.word = self.word << 1 | u64::from(object);
        self.depth += 1;
    }

    fn pop(&mut self) {
        self.depth -= 1;
        self.word >>= 1;
        if self.depth > 0 && self.depth.is_multiple_of(64) {
            self.word = self.outer.pop().unwrap_or_default();
        }
    }

    fn innermost(&self) -> Option<bool> {
        (self.depth > 0).then_some(self.word & 1 == 1)
    }
}

/// Where the first quote stands. Names and most values are shorter than what the vector search needs to get going, so
/// the first bytes are looked at eight at a time.
fn quote(text: &[u8]) -> Option<usize> {
    const SHORT: usize = 32;
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let (words, _) = text[..text.len().min(SHORT)].as_chunks::<8>();
    for (number, word) in words.iter().enumerate() {
        // Zero where a quote is; the lowest bit set in `found` is the highest of the first such byte.
        let word = u64::from_le_bytes(*word) ^ (ONES * b'"' as u64);
        let found = word.wrapping_sub(ONES) & !word & (ONES << 7);
        if found != 0 {
            return Some(number * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let seen = words.len() * 8;
    memchr(b'"', &text[seen..]).map(|at| seen + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_quote_is_found_wherever_it_stands() {
        for length in 0..200 {
            for byte in [0x00, 0x01, 0x21, 0x23, 0x5c, 0x7f, 0x80, 0xa2, 0xff] {
                let mut text = vec![byte; length];
                assert_eq!(quote(&text), None);
                for at in (0..length).step_by(1 + length / 40) {
                    text[at..].fill(b'"');
                    assert_eq!(quote(&text), Some(at), "{length} {byte}");
                    text[at + 1..].fill(byte);
                    assert_eq!(quote(&text), Some(at), "{length} {byte}");
                    text[at] = byte;
                }
            }
        }
    }

    #[test]
    fn a_quote_ends_a_string_unless_it_is_escaped() {
        for backslashes in 0..80 {
            for before in [0, 1, 7, 8, 31, 32, 33, 100] {
                let text = format!("\"{}{}\" \"", "x".repeat(before), "\\".repeat(backslashes));
                let end = if backslashes % 2 == 0 { text.len() - 2 } else { text.len() };
                assert_eq!(Cursor::new(text.as_bytes()).string(), Ok(0..end), "{text}");
            }
        }
        assert_eq!(Cursor::new(br#""\\"a\""#).string(), Ok(0..4));
        assert_eq!(Cursor::new(br#""\"""#).string(), Ok(0..4));
        assert_eq!(Cursor::new(br#""\""#).string(), Err(Fault { at: 3, is_end: true }));
    }

    /// Offset of the fault, or `None` when the whole text is one value.
    fn fault(text: &[u8]) -> Option<Fault> {
        let mut cursor = Cursor::new(text);
        cursor.value().and_then(|_| cursor.end()).err()
    }

    #[test]
    fn the_grammar() {
        let good = [
            "0",
            "-0",
            "10",
            "1.5",
            "1e9",
            "-1.25E-7",
            "1e+2",
            "true",
            "false",
            "null",
            r#""""#,
            r#""a\"b\\""#,
            "[]",
            "{}",
            "[[]]",
            " [ 1 , 2 ] ",
            "{\"a\":{}}",
            "\t{\"a\" : [ {\"b\":1} , null ] , \"c\":\"d\"}\r\n",
        ];
        for text in good {
            assert_eq!(fault(text.as_bytes()), None, "{text}");
        }
        let bad: [(&str, usize, bool); 24] = [
            ("", 0, true),
            ("  ", 2, true),
            ("NaN", 0, false),
            ("nul", 3, true),
            ("tru3", 3, false),
            ("01", 1, false),
            ("-", 1, true),
            ("-a", 1, false),
            ("1.", 2, true),
            ("1.e", 2, false),
            ("1e", 2, true),
            ("+1", 0, false),
            (".5", 0, false),
            ("[1,]", 3, false),
            ("[1", 2, true),
            ("[1}", 2, false),
            ("{\"a\"}", 4, false),
            ("{\"a\":1,}", 7, false),
            ("{a:1}", 1, false),
            ("{\"a\":1]", 6, false),
            ("\"abc", 4, true),
            ("\"abc\\", 5, true),
            ("{} x", 3, false),
            ("\u{feff}{}", 0, false),
        ];
        for (text, at, is_end) in bad {
            assert_eq!(fault(text.as_bytes()), Some(Fault { at, is_end }), "{text}");
        }
    }

    #[test]
    fn deep_nesting_keeps_the_kinds_apart() {
        // Alternating kinds over several machine words: a wrong bit anywhere would refuse the closing bracket.
        let depth = 1_000;
        let open: String = (0..depth).map(|level| if level % 3 == 0 { "[" } else { "{\"k\":" }).collect();
        let close: String = (0..depth).rev().map(|level| if level % 3 == 0 { "]" } else { "}" }).collect();
        assert_eq!(fault(format!("{open}1{close}").as_bytes()), None);
        let wrong = close.replacen('}', "]", 1);
        assert!(fault(format!("{open}1{wrong}").as_bytes()).is_some());
    }

    #[test]
    fn names_and_counts() {
        let names = [
            (r#""model""#, true),
            (r#""mod\u0065l""#, true),
            (r#""\u006d\u006f\u0064\u0065\u006c""#, true),
            (r#""mode\ud800""#, false),
            (r#""models""#, false),
            (r#""Model""#, false),
            (r#""""#, false),
        ];
        for (token, same) in names {
            assert_eq!(is_name(token.as_bytes(), "model"), same, "{token}");
        }
        let counts = [
            ("0", Some(0)),
            ("128000", Some(128_000)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("-1", None),
            ("1.0", None),
            ("1e3", None),
            ("null", None),
            ("\"1\"", None),
        ];
        for (token, wanted) in counts {
            assert_eq!(count(token.as_bytes()), wanted, "{token}");
        }
    }

    #[test]
    fn keys_are_seen_at_every_depth() {
        let mut seen = Vec::new();
        let mut cursor = Cursor::new(br#"[{"a":{"b":[{"c": 1}]},"d":2}]"#);
        cursor.value_with(|key, rest| seen.push((key.to_vec(), rest[0]))).unwrap();
        let seen: Vec<_> =
            seen.iter().map(|(key, next)| (std::str::from_utf8(key).unwrap(), *next)).collect();
        assert_eq!(seen, [("\"a\"", b'{'), ("\"b\"", b'['), ("\"c\"", b' '), ("\"d\"", b'2')]);
    }
}
