//! The YAML text as a tree in which every node can tell its line.
//!
//! serde_yaml keeps no lines with values, and stops at its first error. But an error that a visitor raises is
//! stamped with the line of the node being visited. So nodes are numbered in the order of the walk, and
//! [`line_of`] walks the same text once more and fails on purpose at the wanted number: the line comes from
//! the parser itself, in whatever style the file is written, and a file without problems pays nothing for it.
//!
//! A tree is bounded in size and depth, so that aliases of aliases cannot fill the memory. No message made
//! here holds a value of the file: it could be a token.

use std::fmt;

use serde::de::{DeserializeSeed, EnumAccess, Error, MapAccess, SeqAccess, Visitor};

/// The number of a node in the order of the walk.
pub type NodeId = u32;

/// One value of the file. Not `Debug`: it may hold secrets.
pub struct Node {
    /// Names the node to [`line_of`].
    pub id: NodeId,
    /// What it holds.
    pub value: Value,
}

/// What a node can hold. The entries of a map keep the order of the file, and repeated keys stay.
pub enum Value {
    Null,
    Bool(bool),
    Whole(i128),
    Fraction(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

impl Value {
    /// The kind of value in the words of a message.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Null => "empty",
            Value::Bool(_) => "true or false",
            Value::Whole(_) | Value::Fraction(_) => "a number",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// The key of an entry. A key that is a number or a boolean is kept as text.
pub struct Key {
    /// Names the key to [`line_of`].
    pub id: NodeId,
    /// The key itself.
    pub text: String,
}

/// Why there is no tree.
#[derive(Debug, PartialEq, Eq)]
pub struct NotYaml {
    /// The line, where one is known for certain.
    pub line: Option<usize>,
    /// What is wrong, with the remedy.
    pub what: String,
}

/// Reads the whole text.
pub fn parse(text: &str) -> Result<Node, NotYaml> {
    if let Some(problem) = control_character(text) {
        return Err(problem);
    }
    let too_many = |most: usize, which: &str| {
        let what = format!("holds more than {most} brackets{which} (is it the right file?)");
        Err(NotYaml { line: None, what })
    };
    if text.bytes().filter(|byte| b"[{".contains(byte)).count() > BRACKETS_MAX {
        return too_many(BRACKETS_MAX, "");
    }
    if open_at_once(text) > OPEN_MAX {
        return too_many(OPEN_MAX, " that are open at once");
    }
    let mut walk = Walk::new(None);
    walk.run(text).map_err(|error| not_yaml(text, &walk, &error))
}

/// How many brackets are open where most are, wherever they stand.
fn open_at_once(text: &str) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for byte in text.bytes().filter(|byte| b"[]{}".contains(byte)) {
        open = if b"[{".contains(&byte) { open + 1 } else { open.saturating_sub(1) };
        most = most.max(open);
    }
    most
}

/// For each token, libyaml (0.2.11) looks at every open bracket: half a megabyte of `[` takes it minutes. A
/// thousand endpoints in flow style have a few thousand.
const BRACKETS_MAX: usize = 10_000;

/// Ten thousand of them open, and commas behind, still took a minute. Keys need five; texts may hold some more.
const OPEN_MAX: usize = 200;

/// The line of a node, counted from 1. `None` if the text has no such node, or its lines can be counted in
/// two ways.
pub fn line_of(text: &str, id: NodeId) -> Option<usize> {
    if !lines_are_certain(text) {
        return None;
    }
    let error = Walk::new(Some(id)).run(text).err()?;
    Some(error.location()?.line())
}

/// libyaml ends lines where editors do not all do so; a wrong line is worse than none.
fn lines_are_certain(text: &str) -> bool {
    !text.contains(['\u{85}', '\u{2028}', '\u{2029}']) && !text.replace("\r\n", "").contains('\r')
}

/// One walk over the text: builds the tree, or stops at a node to learn its line.
struct Walk {
    next_id: NodeId,
    stop_at: Option<NodeId>,
    depth: usize,
    cost: usize,
    refusal: Option<&'static str>,
}

impl Walk {
    fn new(stop_at: Option<NodeId>) -> Self {
        Self { next_id: 0, stop_at, depth: 0, cost: 0, refusal: None }
    }

    fn run(&mut self, text: &str) -> Result<Node, serde_yaml::Error> {
        NodeSeed { walk: self }.deserialize(serde_yaml::Deserializer::from_str(text))
    }

    /// Numbers the node being visited, unless the walk ends here.
    fn enter<E: Error>(&mut self, text_bytes: usize) -> Result<NodeId, E> {
        let id = self.next_id;
        self.next_id += 1;
        self.cost += NODE_COST + text_bytes;
        if self.cost > COST_MAX {
            return Err(self.refuse("too large for a configuration (repeated aliases count each time)"));
        }
        if self.stop_at == Some(id) {
            return Err(E::custom("the wanted node"));
        }
        Ok(id)
    }

    fn refuse<E: Error>(&mut self, what: &'static str) -> E {
        self.refusal = Some(what);
        E::custom(what)
    }

    fn descend<E: Error>(&mut self) -> Result<(), E> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.refuse("nested too deeply (no key of this file needs more than five levels)"));
        }
        Ok(())
    }
}

/// Far above any real configuration, far below what would be felt: a thousand endpoints cost about 2 MB.
const COST_MAX: usize = 32 * 1024 * 1024;
const NODE_COST: usize = 64;
const DEPTH_MAX: usize = 16;

struct NodeSeed<'w> {
    walk: &'w mut Walk,
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Node;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        self.visit_unit()
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node { id: self.walk.enter(0)?, value: Value::Null })
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node { id: self.walk.enter(0)?, value: Value::Bool(value) })
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        self.visit_i128(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        self.visit_i128(value.into())
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Node, E> {
        Ok(Node { id: self.walk.enter(0)?, value: Value::Whole(value) })
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Node, E> {
        self.visit_i128(i128::try_from(value).unwrap_or(i128::MAX))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node { id: self.walk.enter(0)?, value: Value::Fraction(value) })
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        Ok(Node { id: self.walk.enter(value.len())?, value: Value::Text(value.to_owned()) })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let id = self.walk.enter(0)?;
        self.walk.descend()?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(NodeSeed { walk: &mut *self.walk })? {
            items.push(item);
        }
        self.walk.depth -= 1;
        Ok(Node { id, value: Value::List(items) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let id = self.walk.enter(0)?;
        self.walk.descend()?;
        let mut entries = Vec::new();
        while let Some(key) = access.next_key_seed(KeySeed { walk: &mut *self.walk })? {
            let value = access.next_value_seed(NodeSeed { walk: &mut *self.walk })?;
            entries.push((key, value));
        }
        self.walk.depth -= 1;
        Ok(Node { id, value: Value::Map(entries) })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _access: A) -> Result<Node, A::Error> {
        Err(self
            .walk
            .refuse("a YAML tag (a word that begins with `!`) means nothing here (remove it or use quotes)"))
    }
}

struct KeySeed<'w> {
    walk: &'w mut Walk,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        let walk = self.walk;
        let node = deserializer.deserialize_any(NodeSeed { walk: &mut *walk })?;
        let text = match node.value {
            Value::Text(text) => text,
            Value::Null => "null".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Whole(value) => value.to_string(),
            Value::Fraction(value) => value.to_string(),
            // Without a line: the error is raised after the node, where serde_yaml would name the whole
            // mapping.
            Value::List(_) | Value::Map(_) => return Err(walk.refuse(KEY_IS_NO_WORD)),
        };
        Ok(Key { id: node.id, text })
    }
}

const KEY_IS_NO_WORD: &str =
    "a key must be a word, not a list or a mapping (a text that holds { or [ needs quotes)";

/// Characters that YAML forbids. libyaml refuses them too, but names no line.
fn control_character(text: &str) -> Option<NotYaml> {
    let forbidden =
        |c: char| (c.is_control() && !"\t\n\r\u{85}".contains(c)) || "\u{fffe}\u{ffff}".contains(c);
    let at = text.find(forbidden)?;
    let code = text[at..].chars().next().map_or(0, u32::from);
    let line = 1 + text[..at].matches('\n').count();
    Some(NotYaml {
        line: Some(line),
        what: format!("holds the control character U+{code:04X} (is it a text file?)"),
    })
}

/// The words of libyaml quote nothing of the file; those of serde do, so they are replaced.
fn not_yaml(text: &str, walk: &Walk, error: &serde_yaml::Error) -> NotYaml {
    // libyaml leaves the first position where it knows none.
    let location =
        error.location().filter(|at| (at.line(), at.column()) != (1, 1) && lines_are_certain(text));
    // An end that comes too early is told as one line behind the last.
    let line = location.map(|at| at.line().min(text.lines().count()));
    if let Some(what) = walk.refusal {
        let line = if what == KEY_IS_NO_WORD { None } else { line };
        return NotYaml { line, what: what.to_owned() };
    }
    let words = error.to_string();
    let what = if words.contains("invalid type") || words.contains("invalid value") {
        "a YAML tag does not fit its value (remove the tag)".to_owned()
    } else if words.contains("more than one document") {
        "holds more than one YAML document (keep one, and remove the other `---` lines)".to_owned()
    } else if words.contains("recursion limit") {
        "nested too deeply, or an alias holds itself".to_owned()
    } else if words.contains("repetition limit") {
        "repeats its aliases too often".to_owned()
    } else {
        format!("not valid YAML: {words}{}", syntax_hint(text, line, &words))
    };
    NotYaml { line, what }
}

/// The remedy, for the mistakes whose cause is plain from the line.
fn syntax_hint(text: &str, line: Option<usize>, words: &str) -> &'static str {
    let Some(line) = line.and_then(|line| text.lines().nth(line - 1)) else { return "" };
    let indent = &line[..line.len() - line.trim_start().len()];
    if indent.contains('\t') {
        " (indent with spaces: YAML allows no tabs)"
    } else if line.contains("${") && line.replace("${", "").contains(['{', '[']) {
        " (inside { } or [ ] a \"${VARIABLE}\" needs quotes)"
    } else if words.contains("mapping values are not allowed") {
        " (a text that holds `: ` needs quotes; keys of one section begin in the same column)"
    } else if words.contains("cannot start any token") {
        " (a text that begins with such a sign needs quotes)"
    } else if words.contains("expected key") || words.contains("expected '-'") {
        " (keys of one section, and items of one list, begin in the same column)"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line of each key and list item, found by walking the whole tree.
    fn lines(text: &str) -> Vec<(String, usize)> {
        fn collect(text: &str, node: &Node, into: &mut Vec<(String, usize)>) {
            match &node.value {
                Value::Map(entries) => {
                    for (key, value) in entries {
                        into.push((key.text.clone(), line_of(text, key.id).unwrap()));
                        collect(text, value, into);
                    }
                }
                Value::List(items) => {
                    for item in items {
                        into.push(("-".to_owned(), line_of(text, item.id).unwrap()));
                        collect(text, item, into);
                    }
                }
                _ => {}
            }
        }
        let mut found = Vec::new();
        collect(text, &parse(text).ok().unwrap(), &mut found);
        found
    }

    #[test]
    fn every_style_tells_its_lines() {
        let text = "\
# a comment
a: 1

b:
  - x: |
      a block: not a key
      - not an item
    y: 'quoted
      over lines: no key'
  - {z: 1,
     w: [one,
         two]}
\"c\": >
  folded
? d
: e
";
        let expected = [
            ("a", 2),
            ("b", 4),
            ("-", 5),
            ("x", 5),
            ("y", 8),
            ("-", 10),
            ("z", 10),
            ("w", 11),
            ("-", 11),
            ("-", 12),
            ("c", 13),
            ("d", 15),
        ];
        assert_eq!(lines(text), expected.map(|(key, line)| (key.to_owned(), line)));
        assert_eq!(lines(&text.replace('\n', "\r\n")), lines(text), "line ends do not matter");
    }

    #[test]
    fn a_doubtful_line_is_not_told() {
        for text in ["a: 'x\u{2028}y'\nb: 1\n", "a: 1\rb: 2\n", "a: x\u{85}b: 2\n"] {
            assert_eq!(line_of(text, 1), None, "for {text:?}");
        }
        assert_eq!(line_of("a: 1\r\nb: 2\n", 3), Some(2));
        assert_eq!(line_of("a: 1\n", 3), None, "there is no such node");
    }

    #[test]
    fn an_alias_tells_the_line_where_the_value_stands() {
        assert_eq!(
            lines("a: &x\n  k: 1\nb: *x\n"),
            [("a", 1), ("k", 2), ("b", 3), ("k", 2)].map(|(key, line)| (key.to_owned(), line))
        );
    }

    fn check(text: &str, line: Option<usize>, what: &str) {
        assert_eq!(parse(text).err().unwrap(), NotYaml { line, what: what.to_owned() }, "for {text:?}");
    }

    #[test]
    fn what_is_not_yaml_is_refused_with_its_line() {
        check(
            "a:\n\tb: 2\n",
            Some(2),
            "not valid YAML: found character that cannot start any token at line 2 column 1, while scanning \
             for the next token (indent with spaces: YAML allows no tabs)",
        );
        check(
            "a: 1\nauth: { api_key: ${KEY} }\n",
            Some(2),
            "not valid YAML: did not find expected ',' or '}' at line 2 column 19, while parsing a flow \
             mapping at line 2 column 7 (inside { } or [ ] a \"${VARIABLE}\" needs quotes)",
        );
        check(
            "a: b: c\n",
            Some(1),
            "not valid YAML: mapping values are not allowed in this context at line 1 column 5 (a text that \
             holds `: ` needs quotes; keys of one section begin in the same column)",
        );
        check(
            "a: 1\nb: @c\n",
            Some(2),
            "not valid YAML: found character that cannot start any token at line 2 column 4, while scanning \
             for the next token (a text that begins with such a sign needs quotes)",
        );
        check(
            "a:\n  - b: 1\n   c: 2\n",
            Some(3),
            "not valid YAML: did not find expected '-' indicator at line 3 column 4, while parsing a block \
             collection at line 2 column 3 (keys of one section, and items of one list, begin in the same \
             column)",
        );
        check(
            "a: 1\nb: 'c\n",
            Some(2),
            "not valid YAML: found unexpected end of stream at line 3 column 1, while scanning a quoted \
             scalar at line 2 column 4",
        );
        check("a: *nowhere\n", Some(1), "not valid YAML: unknown anchor at line 1 column 4");
        check(
            "a: 1\n---\nb: 2\n",
            None,
            "holds more than one YAML document (keep one, and remove the other `---` lines)",
        );
        check("a: 1\nb: \u{1}\n", Some(2), "holds the control character U+0001 (is it a text file?)");
        check("a: 1\nb: !!int dapi-secret\n", Some(2), "a YAML tag does not fit its value (remove the tag)");
        check(
            "a: 1\nb: !secret x\n",
            Some(2),
            "a YAML tag (a word that begins with `!`) means nothing here (remove it or use quotes)",
        );
        check("a: 1\n{b: 1}: c\n", None, KEY_IS_NO_WORD);
    }

    #[test]
    fn bombs_end_early() {
        let deep = format!("a: {}", "[".repeat(500));
        assert!(parse(&deep).is_err());
        let nested = format!("a: {}1{}", "[".repeat(50), "]".repeat(50));
        check(&nested, Some(1), "nested too deeply (no key of this file needs more than five levels)");
        check("a: &a [*a]\n", Some(1), "nested too deeply (no key of this file needs more than five levels)");

        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..9 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            laughs += &format!("a{level}: &a{level} [{aliases}]\n");
        }
        assert!(parse(&laughs).is_err());

        let wide = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), "*a, ".repeat(10_000));
        check(&wide, Some(1), "too large for a configuration (repeated aliases count each time)");
    }
}
