//! What an image costs, from the size that the head of its file states.
//!
//! Anthropic prices an image at width x height / 750 after scaling its long edge to 1,568 pixels, about 1,600 tokens
//! at most. The data is base64: single bytes are decoded where the formats keep their sizes, never the picture.

/// Pixels of the long edge above which the service scales an image down.
const LONG_EDGE_MAX: u64 = 1_568;

/// Tokens of an image of unknown size, and of any at most.
pub(super) const TOKENS_MAX: u64 = 1_600;

const PIXELS_PER_TOKEN: u64 = 750;

/// A JPEG has a few dozen segments before its size.
const SEGMENTS_MAX: usize = 512;

/// Tokens of the image that is this base64 text.
pub(super) fn tokens(base64: &[u8]) -> u64 {
    let Some((width, height)) = size(Base64(base64)) else { return TOKENS_MAX };
    let long_edge = width.max(height);
    let (width, height) = match long_edge > LONG_EDGE_MAX {
        true => (width * LONG_EDGE_MAX / long_edge, height * LONG_EDGE_MAX / long_edge),
        false => (width, height),
    };
    (width * height).div_ceil(PIXELS_PER_TOKEN).clamp(1, TOKENS_MAX)
}

/// Width and height in pixels, by the format's own mark: the media type that the client states may be wrong.
fn size(file: Base64<'_>) -> Option<(u64, u64)> {
    let (width, height) = match file.bytes(0)? {
        [0x89, b'P', b'N', b'G'] => {
            (u32::from_be_bytes(file.bytes(16)?), u32::from_be_bytes(file.bytes(20)?))
        }
        [b'G', b'I', b'F', b'8'] => (little(file.bytes(6)?), little(file.bytes(8)?)),
        [b'R', b'I', b'F', b'F'] => webp(file)?,
        [0xff, 0xd8, ..] => jpeg(file)?,
        _ => return None,
    };
    (width > 0 && height > 0).then_some((u64::from(width), u64::from(height)))
}

fn webp(file: Base64<'_>) -> Option<(u32, u32)> {
    match &file.bytes(12)? {
        b"VP8 " => Some((little(file.bytes(26)?) & 0x3fff, little(file.bytes(28)?) & 0x3fff)),
        b"VP8L" => {
            let bits = u32::from_le_bytes(file.bytes(21)?);
            Some(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
        }
        b"VP8X" => {
            let [a, b, c] = file.bytes(24)?;
            let [d, e, f] = file.bytes(27)?;
            Some((u32::from_le_bytes([a, b, c, 0]) + 1, u32::from_le_bytes([d, e, f, 0]) + 1))
        }
        _ => None,
    }
}

/// Walks the segments to the start of frame, jumping over previews and colour profiles.
fn jpeg(file: Base64<'_>) -> Option<(u32, u32)> {
    let mut at = 2;
    for _ in 0..SEGMENTS_MAX {
        let [mark, kind] = file.bytes(at)?;
        if mark != 0xff {
            return None;
        }
        match kind {
            0xff => at += 1,
            0x01 | 0xd0..=0xd8 => at += 2,
            0xc0..=0xcf if !matches!(kind, 0xc4 | 0xc8 | 0xcc) => {
                return Some((big(file.bytes(at + 7)?), big(file.bytes(at + 5)?)));
            }
            _ => at += 2 + big(file.bytes(at + 2)?) as usize,
        }
    }
    None
}

fn big(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_be_bytes(bytes))
}

fn little(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_le_bytes(bytes))
}

/// A file in base64, read at any offset.
#[derive(Clone, Copy)]
struct Base64<'a>(&'a [u8]);

impl Base64<'_> {
    fn bytes<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (offset, byte) in bytes.iter_mut().enumerate() {
            *byte = self.byte(at + offset)?;
        }
        Some(bytes)
    }

    fn byte(self, at: usize) -> Option<u8> {
        let start = at / 3 * 4 + at % 3;
        let pair = self.0.get(start..start + 2)?;
        let bits = u16::from(sextet(pair[0])?) << 6 | u16::from(sextet(pair[1])?);
        // The pair holds twelve bits; the byte begins two bits further in each time.
        Some((bits >> (4 - 2 * (at % 3))) as u8)
    }
}

fn sextet(letter: u8) -> Option<u8> {
    match letter {
        b'A'..=b'Z' => Some(letter - b'A'),
        b'a'..=b'z' => Some(letter - b'a' + 26),
        b'0'..=b'9' => Some(letter - b'0' + 52),
        b'+' | b'-' => Some(62),
        b'/' | b'_' => Some(63),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The other direction, to make samples.
    pub(in super::super) fn base64(bytes: &[u8]) -> String {
        const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for group in bytes.chunks(3) {
            let bits =
                group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for index in 0..4 {
                let letter = LETTERS[(bits >> (18 - 6 * index) & 63) as usize];
                text.push(if index <= group.len() { letter as char } else { '=' });
            }
        }
        text
    }

    pub(in super::super) fn png(width: u32, height: u32) -> Vec<u8> {
        let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        file.extend(width.to_be_bytes());
        file.extend(height.to_be_bytes());
        file.extend(b"\x08\x06\0\0\0");
        file
    }

    fn jpeg(width: u16, height: u16) -> Vec<u8> {
        let mut file = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0\xff\xe1\xff\xff".to_vec();
        file.extend(vec![0xff; 0xffff - 2]);
        file.extend(b"\xff\xc4\0\x03x\xff\xff\xc2\0\x11\x08");
        file.extend(height.to_be_bytes());
        file.extend(width.to_be_bytes());
        file.extend(b"\x03\x01");
        file
    }

    #[test]
    fn sizes_of_every_format() {
        let gif = b"GIF89a\x40\x01\xf0\x00\0\0\0".to_vec();
        let lossy = b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a\x40\x01\xf0\x40\0".to_vec();
        let bits = (320u32 - 1) | (240 - 1) << 14;
        let lossless = [b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f".as_slice(), &bits.to_le_bytes()].concat();
        let extended = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x3f\x01\0\xef\0\0".to_vec();
        for file in [png(320, 240), gif, jpeg(320, 240), lossy, lossless, extended] {
            assert_eq!(size(Base64(base64(&file).as_bytes())), Some((320, 240)), "{:?}", &file[..16]);
        }
    }

    #[test]
    fn prices() {
        // The first three are Anthropic's own figures.
        let table = [
            (200, 200, 54),
            (1_000, 1_000, 1_334),
            (1_092, 1_092, 1_590),
            (1, 1, 1),
            (3_136, 1_568, 1_600),
            (3_136, 600, 628),
            (u32::MAX, u32::MAX, 1_600),
        ];
        for (width, height, wanted) in table {
            assert_eq!(tokens(base64(&png(width, height)).as_bytes()), wanted, "{width} x {height}");
        }
    }

    #[test]
    fn what_is_unknown_costs_the_most() {
        let cut = |file: Vec<u8>| base64(&file[..file.len() - 4]);
        let endless = [b"\xff\xd8".as_slice(), &[0xff; 4_000]].concat();
        let no_size = base64(&png(0, 7));
        for text in [
            "",
            "AAAA",
            "%%%%",
            "iVBORw0KGgo",
            &cut(jpeg(1, 1)),
            &base64(&endless),
            &no_size,
            "RIFF",
            "UklGRg==",
        ] {
            assert_eq!(tokens(text.as_bytes()), TOKENS_MAX, "{text:.40}");
        }
    }
}
