//! The laws of `fuzz/laws`, for a moment in every run of the suite: all seeds as they are, then with small injuries.
//!
//! The fuzzer looks longer and follows the branches of the code (`fuzz/README.md`). This keeps the laws true from one
//! of its runs to the next, and repeats whatever it found: its findings are among the seeds.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};

use fastrand::Rng;

#[path = "../../fuzz/laws/mod.rs"]
mod laws;

/// Larger captures say nothing new here and take their time.
const SEED_BYTES_MAX: usize = 4 * 1024;

const CAPTURED: [&str; 2] = ["tests/fixtures/claude-code/2.1.197", "tests/fixtures/claude-code/2.1.330"];

#[test]
fn bodies() {
    run("body", &CAPTURED, "json", 1_500, laws::body::check);
}

#[test]
fn event_streams() {
    run("sse", &["tests/fixtures/claude-code/responses"], "sse", 300, laws::sse::check);
}

#[test]
fn relayed_answers() {
    run("chunk", &["tests/fixtures/claude-code/responses"], "sse", 600, laws::chunk::check);
}

#[test]
fn error_bodies() {
    let captured = "tests/fixtures/claude-code/responses/errors";
    run("error_body", &[captured], "error", 1_500, laws::error_body::check);
}

#[test]
fn heads() {
    run("head", &[], "head", 1_500, laws::head::check);
}

#[test]
fn places_taken_out() {
    run("compat", &CAPTURED, "json", 1_500, laws::compat::check);
}

#[test]
fn configurations() {
    run("config", &[], "yaml", 400, laws::config::check);
}

#[test]
fn token_counts() {
    run("tokens", &CAPTURED, "json", 1_500, laws::tokens::check);
}

/// Checks every seed, and then so many descendants of them. What breaks a law is told with the way to repeat it.
fn run(target: &str, folders: &[&str], words: &str, rounds: usize, check: fn(&[u8])) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = format!("fuzz/seeds/{target}");
    let folders = folders.iter().copied().chain([own.as_str()]);
    let seeds: Vec<Vec<u8>> = folders.flat_map(|folder| files(&root.join(folder))).collect();
    let words = dictionary(&root.join(format!("fuzz/dictionaries/{words}.dict")));
    assert!(seeds.len() > 3 && words.len() > 10, "the seeds are part of the repository");

    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    for input in &seeds {
        let _told = Told { target, seed, input };
        check(input);
    }
    for _ in 0..rounds {
        let input = &injured(&seeds, &words, &mut rng);
        let _told = Told { target, seed, input };
        check(input);
    }
}

/// Says what was being checked when a check panics.
struct Told<'a> {
    target: &'a str,
    seed: u64,
    input: &'a [u8],
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { target, seed, input } = self;
            eprintln!(
                "{target}: CLAUDE_LB_SEED={seed} repeats this; the input is\n\"{}\"",
                input.escape_ascii()
            );
        }
    }
}

fn files(folder: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    let read = paths.iter().map(|path| fs::read(path).expect("a readable file"));
    read.filter(|bytes| bytes.len() <= SEED_BYTES_MAX).collect()
}

/// The words of a libFuzzer dictionary: one in quotes on each line, with `\xNN`, `\\` and `\"`.
fn dictionary(path: &Path) -> Vec<Vec<u8>> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    quoted.map(unquoted).collect()
}

fn unquoted(mut text: &str) -> Vec<u8> {
    let mut word = Vec::new();
    while let Some(&first) = text.as_bytes().first() {
        let length = match text.as_bytes().get(1) {
            Some(b'x') if first == b'\\' => {
                word.push(u8::from_str_radix(&text[2..4], 16).expect("two hex digits"));
                4
            }
            Some(&escaped) if first == b'\\' => {
                word.push(escaped);
                2
            }
            _ => {
                word.push(first);
                1
            }
        };
        text = &text[length..];
    }
    word
}

/// A seed with one to six injuries: bytes changed, dropped or doubled, words put in, halves of two seeds joined.
fn injured(seeds: &[Vec<u8>], words: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let any = |rng: &mut Rng, of: &[Vec<u8>]| of[rng.usize(..of.len())].clone();
    let mut bytes = any(rng, seeds);
    for _ in 0..rng.usize(1..=6) {
        let at = rng.usize(..=bytes.len());
        let end = (at + rng.usize(..20)).min(bytes.len());
        match rng.u8(..8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            3 => {
                let other = any(rng, seeds);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[rng.usize(..=other.len())..]);
            }
            4 if at < bytes.len() => bytes[at] = rng.u8(..),
            _ => {
                let word = any(rng, words);
                bytes.splice(at..at, word);
            }
        }
    }
    bytes
}

/// A new seed each run; `CLAUDE_LB_SEED` repeats one.
fn seed() -> u64 {
    match std::env::var("CLAUDE_LB_SEED") {
        Ok(seed) => seed.parse().expect("CLAUDE_LB_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    }
}
