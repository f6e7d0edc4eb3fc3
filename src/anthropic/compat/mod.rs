//! What a workspace refuses in a request, and how the request does without it.
//!
//! Databricks serves Anthropic's API, but not every field of it, and which ones changes. This room reads a refusal
//! (`rejection`), names the refused place so that it holds for other requests, too (`path`), finds such places in a
//! body (`strip`), and turns adaptive thinking into what older models know (`thinking`). It works by scanning: no tree
//! is built, nothing is copied, and every byte that is not taken out stays as it was. It never looks into tool inputs,
//! schemas or text. Called by `messages/prepare` and `messages/turn`.

mod path;
mod rejection;
mod strip;
mod thinking;

pub use path::Path;
pub use rejection::rejected_path;
pub use strip::{PATHS_MAX, cuts};
pub use thinking::without_adaptive;

/// Values that nobody but a tool or a validator reads: never looked into, whatever stands there.
const OPAQUE: [&str; 5] = ["input", "input_schema", "input_examples", "schema", "arguments"];

/// An `anthropic-beta` list without the values that begin like one of `prefixes`; `None` when nothing is left.
/// Values have dates that change, so the date is not compared.
pub fn without_betas(list: &str, prefixes: &[&str]) -> Option<String> {
    let goes = |value: &str| {
        let dated = |rest: &str| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        prefixes.iter().any(|prefix| value.strip_prefix(prefix).is_some_and(dated))
    };
    let kept: Vec<&str> =
        list.split(',').map(str::trim).filter(|value| !value.is_empty() && !goes(value)).collect();
    (!kept.is_empty()).then(|| kept.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn betas_go_by_their_name_without_the_date() {
        let table = [
            ("a-2025-01-01,effort-2025-11-24", &["effort-"][..], Some("a-2025-01-01")),
            ("effort-2030-01-01 , b", &["effort-"], Some("b")),
            ("effort-2025-11-24", &["effort-"], None),
            ("effort-plus-2025-11-24", &["effort-"], Some("effort-plus-2025-11-24")),
            ("x,,y", &["effort-"], Some("x,y")),
            ("a-1,b-2,c", &["a-", "b-"], Some("c")),
        ];
        for (list, prefixes, wanted) in table {
            assert_eq!(without_betas(list, prefixes).as_deref(), wanted, "{list}");
        }
    }
}
