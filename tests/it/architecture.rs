//! The import graph: who may name whom, read from the source itself.
//!
//! The table below is the law of `ARCHITECTURE.md`. A room may import its own layer and every lower one; a room
//! that is missing here fails the test, so that a new room has to be placed. Comments and the unit tests at the
//! end of a file are not looked at.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up. A path names a folder with all that is in it, unless a longer entry names a part.
const LAYERS: [(&str, &[&str]); 9] = [
    ("words", &["secret", "http", "anthropic"]),
    (
        "decisions",
        &[
            "auth",
            "outcome",
            "retry",
            "balancer/strategy",
            "balancer/breaker",
            "balancer/cooldown",
            "balancer/window",
            "balancer/limits",
        ],
    ),
    ("what the operator wrote", &["config", "cli"]),
    ("the machine", &["env", "logging", "panics", "stack"]),
    ("shared truth", &["balancer"]),
    // Sees only readers and a sink, so it lies below the edges that implement them.
    ("copying", &["relay"]),
    ("edges", &["upstream", "front"]),
    ("the path", &["explain", "access", "messages", "routes", "admin"]),
    ("assembly", &["app", "server", "demo", "health", "program", "main", "lib"]),
];

/// Rooms that decide and do nothing: no clock, lock, log, socket, thread or HTTP library.
const PURE: [&str; 10] = [
    "anthropic",
    "auth",
    "http",
    "outcome",
    "retry",
    "balancer/strategy",
    "balancer/breaker",
    "balancer/cooldown",
    "balancer/window",
    "balancer/limits",
];

const BANNED_IN_PURE: [&str; 11] = [
    "crate::env",
    "log::",
    "parking_lot",
    "crossbeam_channel",
    "std::net",
    "std::thread",
    "std::fs",
    "std::sync::Mutex",
    "Instant::now",
    "tiny_http",
    "ureq",
];

/// A library that only one room may name.
const ONE_ROOM_ONLY: [(&str, &str); 2] = [("tiny_http", "front"), ("ureq", "upstream")];

/// Neighbours of one layer that know nothing of each other.
const STRANGERS: [(&str, &str); 2] = [("upstream", "front"), ("front", "upstream")];

const LINES_WISHED: usize = 500;
const LINES_MAX: usize = 700;

struct Source {
    /// Path below `src` without the extension: `balancer/mod` is `balancer`.
    room: String,
    /// The code: no comments, and nothing from the unit tests on.
    code: String,
    /// Modules of its own that exist for unit tests only.
    test_rooms: Vec<String>,
    lines: usize,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let mut sources: Vec<Source> = files.iter().map(|path| read(&root, path)).collect();
    let tests: BTreeSet<String> = sources.iter().flat_map(|source| source.test_rooms.clone()).collect();
    for source in sources.iter_mut().filter(|source| tests.contains(&source.room)) {
        source.code.clear();
    }
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the sources are readable") {
        let path = entry.expect("the sources are readable").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn read(root: &Path, path: &Path) -> Source {
    let text = fs::read_to_string(path).expect("the sources are readable");
    let relative = path.strip_prefix(root).expect("below src").with_extension("");
    let room = relative.to_string_lossy().replace('\\', "/");
    let room = room.strip_suffix("/mod").map(str::to_owned).unwrap_or(room);
    let (mut code, mut test_rooms) = (String::new(), Vec::new());
    let mut lines = text.lines().map(|line| line.split("//").next().unwrap_or_default()).peekable();
    while let Some(line) = lines.next() {
        let is_test = line.trim() == "#[cfg(test)]";
        match lines.peek().and_then(|next| next.trim().strip_prefix("mod ")) {
            Some(module) if is_test && module.ends_with(';') => {
                test_rooms.push(format!("{room}/{}", module.trim_end_matches(';')));
                lines.next();
            }
            Some(_) if is_test => break,
            _ => code.push_str(line),
        }
        code.push('\n');
    }
    Source { room, code, test_rooms, lines: text.lines().count() }
}

/// The layer of a path such as `balancer/strategy/Foo`, by the longest entry it lies under.
fn layer_of(path: &str) -> Option<usize> {
    let fits = |entry: &str| path == entry || path.starts_with(&format!("{entry}/"));
    let entries = LAYERS
        .iter()
        .enumerate()
        .flat_map(|(layer, (_, rooms))| rooms.iter().map(move |room| (layer, *room)));
    entries.filter(|(_, room)| fits(room)).max_by_key(|(_, room)| room.len()).map(|(layer, _)| layer)
}

/// All paths behind each `prefix`, with groups in braces taken apart: `a::{b, c::d}` gives `a/b` and `a/c/d`.
fn paths_behind(code: &str, prefix: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut paths = BTreeSet::new();
    for (start, _) in code.match_indices(prefix) {
        if !code[..start].chars().next_back().is_some_and(|c| is_word(c) || c == ':') {
            let mut rest = &code[start + prefix.len()..];
            tree(&mut rest, "", &mut paths);
        }
    }
    paths
}

/// Reads one use-tree and takes it off the front of `rest`.
fn tree(rest: &mut &str, so_far: &str, paths: &mut BTreeSet<String>) {
    *rest = rest.trim_start();
    if let Some(inside) = rest.strip_prefix('{') {
        *rest = inside;
        loop {
            *rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
            if let Some(behind) = rest.strip_prefix('}') {
                *rest = behind;
                return;
            }
            let before = rest.len();
            tree(rest, so_far, paths);
            if let Some(renamed) = rest.trim_start().strip_prefix("as ") {
                *rest = renamed.trim_start().trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
            }
            if rest.len() == before {
                return;
            }
        }
    }
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
    let (word, behind) = rest.split_at(end);
    let path = if so_far.is_empty() { word.to_owned() } else { format!("{so_far}/{word}") };
    *rest = behind;
    match behind.strip_prefix("::") {
        Some(deeper) if !word.is_empty() => {
            *rest = deeper;
            tree(rest, &path, paths);
        }
        _ if !word.is_empty() => {
            paths.insert(path);
        }
        _ => {
            // A glob: the room itself is meant.
            *rest = rest.strip_prefix('*').unwrap_or(rest);
            paths.insert(so_far.to_owned());
        }
    }
}

/// Every room of ours that this file names, as a path below `src`.
fn imports(source: &Source) -> BTreeSet<String> {
    let mut found = paths_behind(&source.code, "crate::");
    found.extend(paths_behind(&source.code, "claude_lb::"));
    // `super::` of `balancer/strategy` is `balancer`; of `balancer`, the root.
    let parent = source.room.rsplit_once('/').map_or("", |(parent, _)| parent);
    for path in paths_behind(&source.code, "super::") {
        found.insert(if parent.is_empty() { path } else { format!("{parent}/{path}") });
    }
    // Names that begin with a capital letter are items of the root, not rooms.
    found.into_iter().filter(|path| path.starts_with(|c: char| c.is_lowercase())).collect()
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn every_room_has_its_layer() {
    let missing: Vec<String> = sources()
        .iter()
        .filter(|source| layer_of(&source.room).is_none())
        .map(|source| format!("src/{}: in no layer; give it one in LAYERS", source.room))
        .collect();
    report(&missing);
}

#[test]
fn no_room_imports_a_higher_one() {
    let mut problems = Vec::new();
    for source in sources() {
        let Some(own) = layer_of(&source.room) else { continue };
        for path in imports(&source) {
            let Some(layer) = layer_of(&path) else { continue };
            if layer > own {
                let (low, high) = (LAYERS[own].0, LAYERS[layer].0);
                problems.push(format!("src/{} ({low}) imports {path} ({high})", source.room));
            }
        }
    }
    report(&problems);
}

#[test]
fn strangers_do_not_know_each_other() {
    let lies_in = |path: &str, room: &str| path == room || path.starts_with(&format!("{room}/"));
    let mut problems = Vec::new();
    for source in sources() {
        for path in imports(&source) {
            if STRANGERS.iter().any(|(from, to)| lies_in(&source.room, from) && lies_in(&path, to)) {
                problems.push(format!("src/{} imports {path}", source.room));
            }
        }
    }
    report(&problems);
}

#[test]
fn each_library_is_named_in_its_room_only() {
    let mut problems = Vec::new();
    for source in sources() {
        for (library, room) in ONE_ROOM_ONLY {
            let is_home = source.room == room || source.room.starts_with(&format!("{room}/"));
            if !is_home && source.code.contains(&format!("{library}::")) {
                problems.push(format!("src/{} names {library}, which only src/{room} may", source.room));
            }
        }
    }
    report(&problems);
}

#[test]
fn pure_rooms_touch_nothing() {
    let mut problems = Vec::new();
    for source in sources() {
        if PURE.iter().any(|room| source.room == *room || source.room.starts_with(&format!("{room}/"))) {
            let touched = BANNED_IN_PURE.iter().filter(|word| !paths_or_text(&source.code, word).is_empty());
            problems.extend(touched.map(|word| format!("src/{} is pure and names {word}", source.room)));
        }
    }
    report(&problems);
}

/// Where a word stands as a word: `log::` is not found in `catalog::`.
fn paths_or_text<'a>(code: &'a str, word: &str) -> Vec<&'a str> {
    let stands_alone =
        |start: &usize| !code[..*start].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
    let starts = code.match_indices(word).map(|(start, _)| start).filter(stands_alone);
    starts.map(|start| &code[start..]).collect()
}

/// One file, one idea, at most 500 lines with its tests. Between 500 and 700 it is said, above 700 it fails.
#[test]
fn files_stay_readable() {
    let mut problems = Vec::new();
    for source in sources() {
        if source.lines > LINES_MAX {
            problems.push(format!("src/{}: {} lines, at most {LINES_MAX}", source.room, source.lines));
        } else if source.lines > LINES_WISHED {
            eprintln!("src/{}: {} lines, wished are at most {LINES_WISHED}", source.room, source.lines);
        }
    }
    report(&problems);
}

#[test]
fn use_trees_are_taken_apart() {
    let code =
        "use crate::{a::b, c::{d as e, f::*}, G};\nlet x = crate::h::i(crate::j::K);\nuse mycrate::no;";
    let found: Vec<String> = paths_behind(code, "crate::").into_iter().collect();
    assert_eq!(found, ["G", "a/b", "c/d", "c/f", "h/i", "j/K"]);
    let source = Source {
        room: "balancer/strategy".to_owned(),
        code: "use super::breaker::State;".into(),
        test_rooms: vec![],
        lines: 1,
    };
    assert_eq!(imports(&source).into_iter().collect::<Vec<_>>(), ["balancer/breaker/State"]);
}

#[test]
fn layers_go_by_the_longest_entry() {
    assert_eq!(layer_of("balancer/strategy/Choice"), Some(1));
    assert_eq!(layer_of("balancer/lease"), Some(4));
    assert_eq!(layer_of("healthy"), None);
}
