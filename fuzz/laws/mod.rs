//! What must hold for every input, one file for each room that reads what strangers send.
//!
//! Each `check` takes any bytes and panics if a law is broken. The fuzz targets call them for as long as they are
//! let, and `tests/it/fuzzing.rs` calls them in every run of the suite with seeds from the fixtures.

#![allow(clippy::unwrap_used, reason = "a panic is how a law says that it is broken")]

pub mod body;
pub mod chunk;
pub mod compat;
pub mod config;
pub mod error_body;
pub mod head;
pub mod sse;
pub mod tokens;

/// True for a text in which serde_json's feature `raw_value` would make a tree see what is not there: its private
/// name for a raw value is taken seriously as a key.
fn keeps_raw_values(text: &[u8]) -> bool {
    const PRIVATE: &[u8] = b"serde_json::private";
    text.windows(PRIVATE.len()).any(|part| part == PRIVATE)
}

/// Cuts `bytes` at random places, into single bytes now and then, but into no more than some hundred pieces.
fn pieces<'a>(bytes: &'a [u8], rng: &mut fastrand::Rng) -> Vec<&'a [u8]> {
    let longest = rng.choice([1, 2, 7, 40, 400, 20_000]).unwrap_or(1).max(bytes.len() / 256);
    let (mut pieces, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let (piece, more) = rest.split_at(rng.usize(1..=rest.len().min(longest)));
        pieces.push(piece);
        rest = more;
    }
    pieces
}
