//! What the tests of these rooms share: the captured bodies and transcripts, and seeded noise.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use fastrand::Rng;

/// The files below `folder` of the fixtures whose name ends like this, sorted by path.
pub fn files(folder: &str, ending: &str) -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/claude-code").join(folder);
    let mut found = Vec::new();
    for entry in fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display())) {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(ending) {
            found.push((format!("{folder}/{name}"), fs::read(root.join(&name)).unwrap()));
        }
    }
    found.sort();
    found
}

/// Every captured request body.
pub fn bodies() -> Vec<(String, Vec<u8>)> {
    [files("2.1.197", ".body.json"), files("2.1.330", ".body.json")].concat()
}

/// A new seed each run, to be printed by the assertion that fails; `CLAUDE_LB_SEED` repeats one.
pub fn seed() -> u64 {
    match std::env::var("CLAUDE_LB_SEED") {
        Ok(seed) => seed.parse().expect("CLAUDE_LB_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    }
}

/// One to four small injuries: bytes changed, dropped, doubled, or the end cut off.
pub fn mutate(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    const SHARP: &[u8] = b"\"\\{}[]:,\n\r\t u0e-.\x00\xff\xc3";
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.usize(1..=4) {
        let at = rng.usize(..=bytes.len());
        let end = (at + rng.usize(..20)).min(bytes.len());
        match rng.u8(..5) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, SHARP[rng.usize(..SHARP.len())]),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ if at < bytes.len() => bytes[at] = SHARP[rng.usize(..SHARP.len())],
            _ => {}
        }
    }
    bytes
}

/// A random object of the keys that matter and others, now and then with one mark lost.
pub fn object(rng: &mut Rng, depth: u8) -> String {
    let keys = [
        "model",
        "mod\\u0065l",
        "stream",
        "max_tokens",
        "metadata",
        "user_id",
        "x",
        "",
        "\\\"",
        "mode",
        "ttl",
    ];
    let named = rng.bool();
    let mut text = String::from(if named { "{\"model\":\"m\"" } else { "{" });
    for index in 0..rng.usize(..7) {
        let space = if rng.u8(..4) == 0 { " " } else { "" };
        let comma = if index == 0 && !named { "" } else { "," };
        let key = rng.choice(keys).unwrap_or_default();
        text += &format!("{comma}{space}\"{key}\"{space}:{space}{}", value(rng, depth));
    }
    text.push('}');
    // Never a character of an escape: in skipped strings a broken one passes, by design.
    let at = rng.usize(..text.len());
    if rng.u8(..8) == 0 && b"{}[]:,\"".contains(&text.as_bytes()[at]) {
        text.remove(at);
    }
    text
}

fn value(rng: &mut Rng, depth: u8) -> String {
    let plain = [
        "\"m\"",
        "\"\"",
        "\"a\\n\\u00e9\\\\\"",
        "true",
        "false",
        "null",
        "0",
        "12",
        "-3",
        "1.5",
        "2E+1",
        "[]",
        "{}",
        "\"claude-opus-5-5\"",
        "00",
        "tru",
        "\"1h\"",
        "\"\\ud83e\\udd16\"",
    ];
    match rng.u8(..8) {
        0 if depth > 0 => object(rng, depth - 1),
        1 if depth > 0 => format!("[{},{}]", value(rng, depth - 1), value(rng, depth - 1)),
        // The broken ones are rare, or no large object would ever be accepted.
        _ => match rng.choice(plain).unwrap_or_default() {
            "00" | "tru" if rng.u8(..8) > 0 => "7".into(),
            other => other.into(),
        },
    }
}
