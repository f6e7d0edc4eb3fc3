//! Decodes a chunked request body (RFC 9112 section 7.1) as it arrives.
//!
//! Ours because tiny_http's decoder (chunked_transfer 1.5.0) collects a size line of any length in memory, does not
//! come back to its caller while an extension goes on, forgets half a line when nothing arrives for a moment, and
//! takes no trailers. Here whatever has arrived is kept, a line is bounded, and every read comes back after one look
//! at the source. Trailers are read and thrown away, as RFC 9110 section 6.5.1 allows.

use std::io::{self, Read};

/// The longest line: a size with its extensions, or one trailer.
const LINE_BYTES_MAX: usize = 4 * 1024;
/// All trailers together.
const TRAILER_BYTES_MAX: usize = 16 * 1024;

/// A reader of the bytes between the framing. A read that finds nothing of them yet fails with `WouldBlock` and can be
/// repeated; at the end of the body it gives 0.
pub struct Chunked<R> {
    source: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// The line with a size.
    Size,
    /// So many bytes before the end of a chunk.
    Data(u64),
    /// The line end behind a chunk.
    DataEnd,
    /// A trailer, or the blank line that ends the body; so many bytes of trailers came before.
    Trailer(usize),
    /// Behind the body.
    End,
}

impl<R: Read> Chunked<R> {
    /// Begins at the first byte behind the head.
    pub fn new(source: R) -> Self {
        Self { source, buffer: vec![0; 2 * LINE_BYTES_MAX].into(), start: 0, end: 0, at: At::Size }
    }

    /// True when the source gave more than the body: it is lost to whoever reads on.
    pub fn has_read_beyond(&self) -> bool {
        self.start < self.end
    }

    /// Reads the source once. What is held stays.
    fn fill(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match self.source.read(&mut self.buffer[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }

    /// Goes past the framing that is held whole. False when more of it has to come.
    fn advance(&mut self) -> io::Result<bool> {
        let held = &self.buffer[self.start..self.end];
        if self.at == At::DataEnd && held.first().is_some_and(|&byte| byte != b'\r') {
            return Err(bad("a chunk is longer than its size"));
        }
        let Some(line) = line(held)? else { return Ok(false) };
        let taken = line.len() + 2;
        self.at = match self.at {
            At::Size => match size(line)? {
                0 => At::Trailer(0),
                bytes => At::Data(bytes),
            },
            At::DataEnd if line.is_empty() => At::Size,
            At::DataEnd => return Err(bad("a chunk is longer than its size")),
            At::Trailer(_) if line.is_empty() => At::End,
            At::Trailer(before) if before + taken > TRAILER_BYTES_MAX => {
                return Err(bad("the trailers are too long"));
            }
            At::Trailer(before) => At::Trailer(before + taken),
            at @ (At::Data(_) | At::End) => at,
        };
        self.start += taken;
        Ok(true)
    }
}

impl<R: Read> Read for Chunked<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let (mut filled, mut may_fill) = (0, true);
        // Chunk after chunk as far as they are held: a read for each would let a body of one-byte chunks cost its
        // caller thousands of times its size.
        while filled < out.len() {
            let has_more = match self.at {
                At::End => break,
                At::Data(left) => {
                    let room = &mut out[filled..];
                    let held = &self.buffer[self.start..self.end];
                    let count = held.len().min(room.len()).min(usize::try_from(left).unwrap_or(usize::MAX));
                    room[..count].copy_from_slice(&held[..count]);
                    self.start += count;
                    filled += count;
                    self.at = if left == count as u64 { At::DataEnd } else { At::Data(left - count as u64) };
                    count > 0
                }
                At::Size | At::DataEnd | At::Trailer(_) => self.advance()?,
            };
            if !has_more {
                if filled > 0 {
                    break;
                }
                if !may_fill {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.fill()?;
                may_fill = false;
            }
        }
        Ok(filled)
    }
}

/// The first line without its end, if that is there. A line feed alone ends nothing: somebody else on the way might
/// think that it does.
fn line(held: &[u8]) -> io::Result<Option<&[u8]>> {
    let end = memchr::memchr(b'\n', held);
    if end.unwrap_or(held.len()) > LINE_BYTES_MAX {
        return Err(bad("a line between the chunks is too long"));
    }
    let Some(end) = end else { return Ok(None) };
    let line = held[..end].strip_suffix(b"\r").ok_or_else(|| bad("a line ends without a carriage return"))?;
    if line.contains(&b'\r') {
        return Err(bad("a carriage return within a line"));
    }
    Ok(Some(line))
}

/// `1a` or `1a;whatever=it is`. At most 16 digits, so it always fits.
fn size(line: &[u8]) -> io::Result<u64> {
    let digits = line.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii_end();
    let is_plain = (1..=16).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(digits).ok().filter(|_| is_plain);
    text.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or_else(|| bad("a chunk's size is no number"))
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives so many bytes a read, with nothing between two of them.
    struct Dripping<'a> {
        rest: &'a [u8],
        step: usize,
        is_quiet: bool,
    }

    impl Read for Dripping<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.is_quiet = !self.is_quiet;
            if self.is_quiet {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let count = self.step.min(self.rest.len()).min(out.len());
            out[..count].copy_from_slice(&self.rest[..count]);
            self.rest = &self.rest[count..];
            Ok(count)
        }
    }

    /// The body, and whether more than it was read.
    fn decode(bytes: &[u8], step: usize) -> io::Result<(Vec<u8>, bool)> {
        let mut chunked = Chunked::new(Dripping { rest: bytes, step, is_quiet: false });
        let (mut body, mut piece) = (Vec::new(), [0; 1000]);
        loop {
            match chunked.read(&mut piece) {
                Ok(0) => return Ok((body, chunked.has_read_beyond())),
                Ok(count) => body.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    #[test]
    fn a_body_is_the_same_however_it_arrives() {
        let long = "y".repeat(20_000);
        for (bytes, body) in [
            ("0\r\n\r\n".to_string(), ""),
            ("3\r\nhel\r\nb\r\nlo world!!!\r\n0\r\n\r\n".into(), "hello world!!!"),
            ("03 ; ext=\"a b\"\r\nhel\r\n1;x\r\nL\r\n000;last\r\nX: 1\r\nY: 2\r\n\r\n".into(), "helL"),
            (format!("{:X}\r\n{long}\r\n0\r\n\r\n", long.len()), &long),
        ] {
            for step in [1, 2, 3, 7, 100, 100_000] {
                assert_eq!(decode(bytes.as_bytes(), step).unwrap(), (body.as_bytes().to_vec(), false));
            }
            let more = format!("{bytes}GET / HTTP/1.1\r\n\r\n");
            assert_eq!(decode(more.as_bytes(), 100_000).unwrap(), (body.as_bytes().to_vec(), true));
        }
    }

    /// Each read gave one chunk at most, and its caller made room for 16 KiB each time: 100,000 chunks of one byte, which
    /// anybody may send without a key, cost it a gigabyte and a half of zeros.
    #[test]
    fn small_chunks_are_not_read_one_by_one() {
        let bytes = "1\r\nx\r\n".repeat(50_000) + "0\r\n\r\n";
        let mut chunked = Chunked::new(bytes.as_bytes());
        let (mut piece, mut reads, mut length) = ([0; 16 * 1024], 0, 0);
        loop {
            match chunked.read(&mut piece).unwrap() {
                0 => break,
                count => (reads, length) = (reads + 1, length + count),
            }
        }
        assert_eq!(length, 50_000);
        assert!(reads <= bytes.len() / LINE_BYTES_MAX, "{reads} reads");
    }

    #[test]
    fn what_is_no_chunk_is_an_error() {
        let endless = |start: &str| format!("{start}{}", "0".repeat(50_000));
        let trailers = format!("0\r\n{}\r\n", "X: y\r\n".repeat(5_000));
        for bytes in [
            "",
            "3\r\nhel",
            "3\r\nhel\r\n",
            "3\r\nhel\r\n0\r\n",
            "\r\n",
            ";x\r\n\r\n",
            "zz\r\n",
            "-2\r\n{}\r\n",
            "+2\r\n{}\r\n",
            "0x2\r\n{}\r\n",
            " 2\r\n{}\r\n",
            "2 2\r\n{}\r\n",
            "10000000000000000\r\n",
            "2\r\n{}x",
            "2\r\n{}\rx\r\n",
            "2\r\n{}\n0\r\n\r\n",
            "2\n{}\r\n0\r\n\r\n",
            "2;a\nb\r\n{}\r\n",
            "2;a\rb\r\n{}\r\n",
            "0\r\n\n",
            "0\r\nX: 1\n\r\n",
            &endless("1;"),
            &endless(""),
            &trailers,
        ] {
            for step in [1, 100_000] {
                assert!(decode(bytes.as_bytes(), step).is_err(), "{:?}", bytes.get(..40).unwrap_or(bytes));
            }
        }
    }
}
