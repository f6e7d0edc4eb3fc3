//! Finds places to be taken out of a body: one pass, and every byte that stays is as it was.

use super::OPAQUE;
use super::path::{Path, Step};
use crate::anthropic::edit::Edit;
use crate::anthropic::json::{self, Cursor, Fault};

/// Paths looked for in one pass; further ones are not.
pub const PATHS_MAX: usize = 64;

/// How deep a `cache_control` is looked for. Real ones stand seven levels deep at most, and a body of a hundred
/// thousand brackets must not overflow the stack.
const DEPTH_MAX: usize = 24;

/// Parts that are taken out of one body. No real request has a tenth of them, and a body that consists of them must not
/// be paid for with several times its size: it goes out as it came.
const CUTS_MAX: usize = 4096;

/// What to leave out for the body to be without these places, in ascending order and none within another; and which of
/// the paths were there, as a mask by position. `None` when none was.
pub fn cuts(body: &[u8], paths: &[Path]) -> Option<(Vec<Edit>, u64)> {
    let paths = &paths[..paths.len().min(PATHS_MAX)];
    let mut search = Search { paths, cuts: Vec::new(), found: 0, floating: 0 };
    let mut from_top = 0;
    for (at, path) in paths.iter().enumerate() {
        if path.is_in_cache_control {
            search.floating |= 1 << at;
        } else {
            from_top |= 1 << at;
        }
    }
    let top = Front { from_top, steps_from_top: 0, in_cache_control: 0, steps_in_cache_control: 0 };
    search.value(&mut Cursor::new(body), top, 0).ok()?;
    (search.found != 0).then_some((search.cuts, search.found))
}

struct Search<'p> {
    paths: &'p [Path],
    /// In ascending order, none within another.
    cuts: Vec<Edit>,
    /// Which paths were there, one bit each.
    found: u64,
    /// Which paths begin at any `cache_control`.
    floating: u64,
}

/// Which paths have led to a value, one bit each, and how many of their steps that took.
#[derive(Debug, Clone, Copy)]
struct Front {
    from_top: u64,
    steps_from_top: usize,
    in_cache_control: u64,
    steps_in_cache_control: usize,
}

impl Search<'_> {
    /// Consumes the value that comes next.
    fn value(&mut self, cursor: &mut Cursor<'_>, front: Front, depth: usize) -> Result<(), Fault> {
        let may_hold_more = self.floating != 0 && depth < DEPTH_MAX;
        let is_of_interest = front.from_top != 0 || front.in_cache_control != 0 || may_hold_more;
        match cursor.peek()? {
            b'{' if is_of_interest => self.object(cursor, front, depth),
            b'[' if is_of_interest => {
                let next = self.advance(front, None, None);
                cursor.elements(|cursor| self.value(cursor, next, depth + 1))
            }
            _ => cursor.value().map(|_| ()),
        }
    }

    /// A cut takes the comma before it; at the front of the object the one behind it.
    fn object(&mut self, cursor: &mut Cursor<'_>, front: Front, depth: usize) -> Result<(), Fault> {
        // Where the last member ended, and whether one was kept so far.
        let (mut end, mut has_kept) = (0, false);
        // Members at the front that go, up to the next key.
        let mut leading: Option<usize> = None;
        let kind = if self.asks_for_kind(front) { kind_of(cursor.clone()) } else { None };
        cursor.members(|cursor, key| {
            let start = key.start;
            let name = cursor.bytes(key);
            let next = self.advance(front, Some(name), kind);
            let gone = self.complete(next);
            if self.cuts.len() > CUTS_MAX {
                return Err(Fault { at: start, is_end: false });
            }
            if gone != 0 {
                self.found |= gone;
                let value = cursor.value()?;
                if has_kept {
                    self.cuts.push(Edit::cut(end..value.end));
                } else {
                    leading.get_or_insert(start);
                }
                end = value.end;
                return Ok(());
            }
            if let Some(from) = leading.take() {
                self.cuts.push(Edit::cut(from..start));
            }
            has_kept = true;
            if OPAQUE.iter().any(|opaque| json::is_name(name, opaque)) {
                cursor.value()?;
            } else {
                self.value(cursor, self.entered(next, name), depth + 1)?;
            }
            end = cursor.at();
            Ok(())
        })?;
        if let Some(from) = leading {
            self.cuts.push(Edit::cut(from..end));
        }
        Ok(())
    }

    /// True when the next step of some path holds for one `type` of object only.
    fn asks_for_kind(&self, front: Front) -> bool {
        let asks = |mask: u64, at: usize| {
            bits(mask).any(|bit| matches!(self.paths[bit].steps.get(at), Some(Step::Key { of: Some(_), .. })))
        };
        asks(front.from_top, front.steps_from_top)
            || asks(front.in_cache_control, front.steps_in_cache_control)
    }

    /// The paths whose next step leads to this member (`None`: to an element) of an object of this `type`.
    fn advance(&self, front: Front, name: Option<&[u8]>, kind: Option<&[u8]>) -> Front {
        let step = |mask: u64, at: usize| {
            let leads = |path: &Path| match (path.steps.get(at), name) {
                (Some(Step::Key { of, key }), Some(name)) => {
                    let is_kind = |of: &String| kind.is_some_and(|kind| json::is_name(kind, of));
                    json::is_name(name, key) && of.as_ref().is_none_or(is_kind)
                }
                (Some(Step::Every), None) => true,
                _ => false,
            };
            bits(mask).filter(|bit| leads(&self.paths[*bit])).fold(0, |mask, bit| mask | 1 << bit)
        };
        Front {
            from_top: step(front.from_top, front.steps_from_top),
            steps_from_top: front.steps_from_top + 1,
            in_cache_control: step(front.in_cache_control, front.steps_in_cache_control),
            steps_in_cache_control: front.steps_in_cache_control + 1,
        }
    }

    /// What to look for inside a member that stays.
    fn entered(&self, front: Front, name: &[u8]) -> Front {
        if self.floating != 0 && json::is_name(name, "cache_control") {
            return Front { in_cache_control: self.floating, steps_in_cache_control: 0, ..front };
        }
        front
    }

    /// The paths that end here.
    fn complete(&self, front: Front) -> u64 {
        let ends = |mask: u64, at: usize| {
            bits(mask).filter(|bit| self.paths[*bit].steps.len() == at).fold(0, |mask, bit| mask | 1 << bit)
        };
        ends(front.from_top, front.steps_from_top)
            | ends(front.in_cache_control, front.steps_in_cache_control)
    }
}

/// The token of the `type` of the object that comes next.
fn kind_of<'a>(mut cursor: Cursor<'a>) -> Option<&'a [u8]> {
    let mut kind = None;
    let walked = cursor.members(|cursor, key| {
        let is_type = json::is_name(cursor.bytes(key), "type");
        let value = cursor.value()?;
        if is_type {
            kind = Some(cursor.bytes(value));
        }
        Ok(())
    });
    walked.ok().and(kind)
}

fn bits(mask: u64) -> impl Iterator<Item = usize> {
    (0..PATHS_MAX).take_while(move |bit| mask >> bit != 0).filter(move |bit| mask >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::edit::applied;
    use crate::anthropic::samples;
    use serde_json::Value;

    fn remove(body: &[u8], paths: &[Path]) -> Option<(Vec<u8>, u64)> {
        cuts(body, paths).map(|(edits, found)| (applied(body, &edits), found))
    }

    fn paths(texts: &[&str]) -> Vec<Path> {
        texts.iter().map(|text| Path::configured(text).unwrap_or_else(|| panic!("{text}"))).collect()
    }

    #[test]
    fn commas_and_spaces_stay_json() {
        let table: [(&str, &[&str], &str); 18] = [
            (
                r#"{"c":[{"cache_control":1,"type":"thinking"},{"type":"text","cache_control":2},{"cache_control":3}]}"#,
                &["c.*.thinking.cache_control"],
                r#"{"c":[{"type":"thinking"},{"type":"text","cache_control":2},{"cache_control":3}]}"#,
            ),
            (r#"{"a":1}"#, &["a"], "{}"),
            (r#"{ "a" : 1 }"#, &["a"], "{  }"),
            (r#"{"a":1,"b":2}"#, &["a"], r#"{"b":2}"#),
            (r#"{ "a" : 1 , "b" : 2 }"#, &["a"], r#"{ "b" : 2 }"#),
            (r#"{ "a" : 1 , "b" : 2 }"#, &["b"], r#"{ "a" : 1 }"#),
            (r#"{"a":1,"b":2,"c":3}"#, &["b"], r#"{"a":1,"c":3}"#),
            (r#"{"a":1,"b":2,"c":3}"#, &["a", "b"], r#"{"c":3}"#),
            (r#"{"a":1,"b":2,"c":3}"#, &["b", "c"], r#"{"a":1}"#),
            (r#"{"a":1,"b":2,"c":3}"#, &["a", "c"], r#"{"b":2}"#),
            (r#"{"a":1,"b":2,"c":3}"#, &["a", "b", "c"], "{}"),
            (r#"{"a":1,"\u0061":2,"b":{"a":3}}"#, &["a"], r#"{"b":{"a":3}}"#),
            (r#"{"a":{"b":{"c":1}},"x":2}"#, &["a.b.c"], r#"{"a":{"b":{}},"x":2}"#),
            (
                r#"{"t":[{"d":1,"n":2},{"n":3},{"n":4,"d":5}]}"#,
                &["t.*.d"],
                r#"{"t":[{"n":2},{"n":3},{"n":4}]}"#,
            ),
            (r#"{"x":"a","b":"{\"a\":1}","a":"x"}"#, &["a"], r#"{"x":"a","b":"{\"a\":1}"}"#),
            (
                r#"{"cache_control":{"type":"e","ttl":"1h"},"s":[{"cache_control":{"ttl":"1h"}}],"ttl":1}"#,
                &["cache_control.ttl"],
                r#"{"cache_control":{"type":"e"},"s":[{"cache_control":{}}],"ttl":1}"#,
            ),
            (
                r#"{"input":{"cache_control":{"ttl":1}},"inp\u0075t":{"cache_control":{"ttl":1}},"cache_control":{"ttl":2}}"#,
                &["cache_control.ttl"],
                r#"{"input":{"cache_control":{"ttl":1}},"inp\u0075t":{"cache_control":{"ttl":1}},"cache_control":{}}"#,
            ),
            (r#"{"o":{"e":1},"m":[{"o":{"e":2},"r":1}]}"#, &["o", "m.*.o"], r#"{"m":[{"r":1}]}"#),
        ];
        for (body, texts, wanted) in table {
            let (kept, _) = remove(body.as_bytes(), &paths(texts)).unwrap_or_else(|| panic!("{body}"));
            assert_eq!(String::from_utf8_lossy(&kept), wanted, "{body} {texts:?}");
        }
        for (body, texts) in
            [(r#"{"b":1}"#, ["a"]), (r#"[{"a":1}]"#, ["a"]), (r#"{"a":[1]}"#, ["a.b"]), ("{", ["a"])]
        {
            assert_eq!(remove(body.as_bytes(), &paths(&texts)), None, "{body}");
        }
    }

    #[test]
    fn a_body_that_is_nothing_but_such_places_stays() {
        let body = |count: usize| format!("{{\"t\":[{}0]}}", r#"{"a":1},"#.repeat(count));
        let found = |count| cuts(body(count).as_bytes(), &paths(&["t.*.a"])).map(|(edits, _)| edits.len());
        assert_eq!(found(CUTS_MAX), Some(CUTS_MAX));
        assert_eq!(found(10 * CUTS_MAX), None);
    }

    #[test]
    fn deep_brackets_overflow_no_stack() {
        let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
        let body = format!(r#"{{"x":{open}1{close},"cache_control":{{"ttl":1}}}}"#);
        let (kept, found) = remove(body.as_bytes(), &paths(&["cache_control.ttl"])).unwrap();
        assert_eq!((kept, found), (body.replace("\"ttl\":1", "").into_bytes(), 1));
    }

    /// The same by a tree, written without a look at the scanner.
    fn by_tree(value: &mut Value, path: &Path) {
        if path.is_in_cache_control {
            floating(value, path);
        } else {
            take(value, &path.steps);
        }
    }

    fn floating(value: &mut Value, path: &Path) {
        match value {
            Value::Object(map) => {
                for (key, value) in map.iter_mut().filter(|(key, _)| !OPAQUE.contains(&key.as_str())) {
                    if key == "cache_control" {
                        take(value, &path.steps);
                    }
                    floating(value, path);
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|value| floating(value, path)),
            _ => {}
        }
    }

    fn take(value: &mut Value, steps: &[Step]) {
        match (steps, value) {
            ([Step::Key { of: Some(kind), .. }, ..], Value::Object(map))
                if map.get("type") != Some(&Value::from(kind.as_str())) => {}
            ([Step::Key { key, .. }], Value::Object(map)) => {
                map.remove(key);
            }
            ([Step::Key { key, .. }, rest @ ..], Value::Object(map)) if !OPAQUE.contains(&key.as_str()) => {
                if let Some(value) = map.get_mut(key) {
                    take(value, rest);
                }
            }
            ([Step::Every, rest @ ..], Value::Array(list)) => {
                list.iter_mut().for_each(|value| take(value, rest));
            }
            _ => {}
        }
    }

    fn check(name: &str, body: &[u8], paths: &[Path]) {
        let before: Value = serde_json::from_slice(body).unwrap();
        let mut wanted = before.clone();
        paths.iter().for_each(|path| by_tree(&mut wanted, path));
        match remove(body, paths) {
            Some((kept, found)) => {
                let after: Value = serde_json::from_slice(&kept)
                    .unwrap_or_else(|error| panic!("{name}: {error}: {}", String::from_utf8_lossy(&kept)));
                assert_eq!(after, wanted, "{name} {paths:?}");
                assert!(found != 0 && kept.len() < body.len(), "{name}");
                assert_eq!(remove(&kept, paths), None, "{name}: everything went at once");
            }
            None => assert_eq!(before, wanted, "{name} {paths:?}"),
        }
    }

    #[test]
    fn every_captured_body_loses_exactly_the_path() {
        let all = paths(&[
            "context_management",
            "output_config",
            "messages.*.output_config",
            "tools.*.defer_loading",
            "tools.*.input_examples",
            "cache_control.ttl",
            "cache_control.scope",
            "thinking.display",
            "metadata.user_id",
            "messages.*.content.*.cache_control",
            "messages.*.content.*.tool_result.cache_control",
            "thinking.adaptive.display",
            "tools.*.description",
        ]);
        for (name, body) in samples::bodies() {
            for path in &all {
                check(&name, &body, std::slice::from_ref(path));
            }
            check(&name, &body, &all);
        }
    }

    #[test]
    fn agrees_with_a_tree_on_random_bodies() {
        let seed = samples::seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        let all = paths(&[
            "a",
            "b.a",
            "t.*.a",
            "t.*.text.c",
            "t.*.b",
            "b.*.cache_control",
            "cache_control.a",
            "cache_control.b.a",
        ]);
        let mut hits = 0;
        for _ in 0..2_000 {
            let body = random(&mut rng, 4);
            let chosen: Vec<Path> = all.iter().filter(|_| rng.bool()).cloned().collect();
            hits += usize::from(remove(body.as_bytes(), &chosen).is_some());
            check(&format!("seed {seed}: {body}"), body.as_bytes(), &chosen);
        }
        assert!(hits > 200, "seed {seed}: {hits} prove too little");
    }

    /// An object without duplicate keys: serde_json keeps the last of them, and what lies below the others is gone.
    fn random(rng: &mut fastrand::Rng, depth: u8) -> String {
        let mut keys = ["a", "b", "t", "cache_control", "input", "input_schema", "c", "text", "type"];
        rng.shuffle(&mut keys);
        let space = |rng: &mut fastrand::Rng| ["", "", " ", "\n "][rng.usize(..4)];
        let members: Vec<String> = keys[..rng.usize(..7)]
            .iter()
            .map(|key| format!("{}\"{key}\"{}:{}", space(rng), space(rng), random_value(rng, depth)))
            .collect();
        format!("{{{}{}}}", members.join(","), space(rng))
    }

    fn random_value(rng: &mut fastrand::Rng, depth: u8) -> String {
        match rng.u8(..6) {
            0..3 if depth > 0 => random(rng, depth - 1),
            3 if depth > 0 => {
                let items: Vec<String> = (0..rng.usize(..4)).map(|_| random_value(rng, depth - 1)).collect();
                format!("[{}]", items.join(" , "))
            }
            4 => "\"{\\\"a\\\":1,\\\"cache_control\\\":{\\\"a\\\":1}}\"".into(),
            5 if rng.bool() => "\"text\"".into(),
            _ => "12".into(),
        }
    }
}
