//! Files as they come: missing, foreign, broken, hostile. Whatever they hold, there is an answer and no
//! panic.

use std::fs;

use super::*;

/// A directory of its own, removed at the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("claude-lb-config-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_file_is_read_or_its_problem_told() {
    let place = Place::new("load");
    let file = place.0.join("c.yaml");
    let name = file.display().to_string();
    let load = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        Config::load(&file, &env).map_err(|problems| problems.to_string().replace(&name, "c.yaml"))
    };

    assert_eq!(load(GOOD.as_bytes()), Ok(good(GOOD)));
    assert_eq!(load(format!("\u{feff}{GOOD}").as_bytes()), Ok(good(GOOD)), "a byte order mark is no matter");
    assert_eq!(load(GOOD.replace('\n', "\r\n").as_bytes()), Ok(good(GOOD)));
    for (bytes, expected) in [
        (&b""[..], "c.yaml: empty (config.yaml.example shows what it may hold)"),
        (b"# nothing\n---\n", "c.yaml: empty (config.yaml.example shows what it may hold)"),
        (b"a: 1\nb: \xff\n", "c.yaml:2: not UTF-8 text (save the file as UTF-8)"),
        (b"\x7fELF\x00", "c.yaml:1: holds the control character U+007F (is it a text file?)"),
        (
            b"A=1\nB=2\n",
            "c.yaml: holds a text, where sections such as `auth:` and `endpoints:` belong (see \
             config.yaml.example)",
        ),
        (
            b"- a\n",
            "c.yaml: holds a list, where sections such as `auth:` and `endpoints:` belong (see \
             config.yaml.example)",
        ),
    ] {
        assert_eq!(load(bytes), Err(expected.to_owned()), "for {bytes:?}");
    }
    assert_eq!(
        load(&vec![b' '; 600 * 1024]),
        Err("c.yaml: larger than 512 KiB (is it the right file?)".to_owned())
    );

    let problem = |path: &Path| Config::load(path, &env).unwrap_err().list.remove(0).what;
    assert_eq!(
        problem(&place.0.join("none.yaml")),
        "no such file (`claude-lb init` writes one, see also the README; --config FILE or CONFIG_PATH names \
         another)"
    );
    assert_eq!(problem(&place.0), "is a directory (name the file in it with --config or CONFIG_PATH)");
}

#[test]
fn hostile_files_are_answered() {
    let wide: String = (0..2000).map(|n| format!("key{n}: 1\n")).collect();
    check(&wide, &["c.yaml:1: holds more than 1000 keys"]);

    let many = format!("auth: {{ api_key: k }}\nendpoints:\n{}", "- { nam: a }\n".repeat(60));
    let problems = parse(&many).unwrap_err();
    assert_eq!((problems.list.len(), problems.more), (PROBLEMS_MAX, 4 * 60 - PROBLEMS_MAX));
    assert_eq!(problems.lines().last().map(String::as_str), Some("c.yaml: and 190 more problems"));

    // An alias bomb among the endpoints, and recursion.
    let mut bomb = "auth: { api_key: k }\nendpoints:\n- &a0 { name: a }\n".to_owned();
    for level in 1..12 {
        bomb += &format!("- &a{level} [{}]\n", vec![format!("*a{}", level - 1); 20].join(", "));
    }
    assert!(parse(&bomb).is_err());
    assert!(parse("endpoints: &e [*e]\n").is_err());
    assert!(parse("auth: &a { <<: *a }\n").is_err());
    let brackets = "c.yaml: holds more than 10000 brackets (is it the right file?)";
    check(&"[".repeat(500_000), &[brackets]);
    check(&"{a: ".repeat(100_000), &[brackets]);
    // Found beside the fuzzing: as many as were allowed, and commas, took a minute.
    let open = "c.yaml: holds more than 200 brackets that are open at once (is it the right file?)";
    check(&format!("a: {}{}", "[".repeat(9_990), "a,".repeat(200_000)), &[open]);
    check(
        &"a\n".repeat(100_000),
        &["c.yaml: holds a text, where sections such as `auth:` and `endpoints:` belong (see \
           config.yaml.example)"],
    );
    assert!(parse(&"- ".repeat(100_000)).is_err());
}

/// Thousands of damaged files: none may panic, and none may show a secret.
#[test]
fn damaged_files_never_panic() {
    let pieces = [
        "\n",
        " ",
        "  ",
        "\t",
        ":",
        ": ",
        "- ",
        "#",
        "'",
        "\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!x ",
        "|",
        ">",
        "?",
        "---\n",
        "...\n",
        "%",
        "@",
        "`",
        "${",
        "${A}",
        "$${",
        "é",
        "\u{0}",
        "\u{feff}",
        "null",
        "-1",
        "1e999",
        "0x",
        ".nan",
        "true",
        "endpoints:\n",
        "name: ",
    ];
    let seeds = [GOOD, EVERY_KEY, include_str!("../../../config.yaml.example")];
    for seed in 0..3000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut text: Vec<char> = seeds[rng.usize(..seeds.len())].replace("dapi", "sesame").chars().collect();
        for _ in 0..rng.usize(1..8) {
            let at = rng.usize(..text.len());
            let until = (at + rng.usize(..6)).min(text.len());
            match rng.u8(..4) {
                0 => drop(text.drain(at..until)),
                1 => {
                    let copy = text[at..until].to_vec();
                    text.splice(at..at, copy);
                }
                2 => text.swap(at, until.saturating_sub(1)),
                _ => drop(text.splice(at..at, pieces[rng.usize(..pieces.len())].chars())),
            }
        }
        let text: String = text.into_iter().collect();
        check_lines(&text, seed);
        match parse(&text) {
            Ok(config) => assert!(!config.show().contains("sk-team"), "seed {seed}"),
            Err(problems) => {
                assert!(!problems.list.is_empty(), "seed {seed}");
                assert!(!problems.to_string().contains("sk-team"), "seed {seed}: {problems}");
                let count = text.lines().count() + 1;
                assert!(
                    problems.list.iter().all(|problem| problem.line.is_none_or(|line| line <= count)),
                    "seed {seed}"
                );
            }
        }
    }
}

/// Every key of a text that still is YAML stands on the line that is told for it.
fn check_lines(text: &str, seed: u64) {
    fn check_node(text: &str, node: &tree::Node, seed: u64) {
        match &node.value {
            tree::Value::List(items) => items.iter().for_each(|item| check_node(text, item, seed)),
            tree::Value::Map(entries) => {
                for (key, value) in entries {
                    check_node(text, value, seed);
                    let is_word = key.text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                    if let (true, Some(line)) = (is_word && key.text != "null", tree::line_of(text, key.id)) {
                        let line = text.lines().nth(line - 1).unwrap_or_default();
                        assert!(line.contains(&key.text), "seed {seed}: {} is not in {line:?}", key.text);
                    }
                }
            }
            _ => {}
        }
    }
    if seed.is_multiple_of(30)
        && let Ok(root) = tree::parse(text)
    {
        check_node(text, &root, seed);
    }
}
