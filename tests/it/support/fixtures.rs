//! What was captured from the real client, and answers written in the documented format.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

/// One request of Claude Code as it stood on the wire.
pub struct Captured {
    pub name: String,
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/claude-code")
}

fn bytes(path: PathBuf) -> Vec<u8> {
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `responses/NAME.sse`.
pub fn transcript(name: &str) -> Vec<u8> {
    bytes(folder().join("responses").join(format!("{name}.sse")))
}

/// The answer of a request that does not stream.
pub fn message_json() -> Vec<u8> {
    bytes(folder().join("responses/message.json"))
}

/// `responses/errors/FILE`.
pub fn error_body(file: &str) -> Vec<u8> {
    bytes(folder().join("responses/errors").join(file))
}

/// The names of all transcripts, sorted.
pub fn transcripts() -> Vec<String> {
    let entries = fs::read_dir(folder().join("responses")).expect("the fixtures are part of the repository");
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.expect("a readable folder").file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".sse").map(str::to_owned))
        .collect();
    names.sort();
    names
}

/// Every captured request, both versions of the client.
pub fn captured() -> Vec<Captured> {
    ["2.1.197", "2.1.330"].iter().flat_map(|version| captured_by(version)).collect()
}

/// One captured request of the newer client.
pub fn captured_named(name: &str) -> Captured {
    let wanted = format!("2.1.330/{name}");
    captured_by("2.1.330")
        .into_iter()
        .find(|captured| captured.name == wanted)
        .expect("a request of this name")
}

fn captured_by(version: &str) -> Vec<Captured> {
    let folder = folder().join(version);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("the fixtures are part of the repository")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.to_string_lossy().ends_with(".request.json"))
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        let request: Value = serde_json::from_slice(&bytes(path.clone())).expect("a capture is JSON");
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let headers = request["headers"].as_array().expect("a list of headers");
        let name = path.file_name().expect("a file").to_string_lossy().replace(".request.json", "");
        Captured {
            name: format!("{version}/{name}"),
            method: text(&request["method"]),
            target: text(&request["target"]),
            headers: headers.iter().map(|pair| (text(&pair[0]), text(&pair[1]))).collect(),
            body: request["body_file"].as_str().map(|file| bytes(folder.join(file))).unwrap_or_default(),
        }
    };
    paths.into_iter().map(read).collect()
}
