//! `${VARIABLE}` in a text of the configuration.
//!
//! `${NAME}` is the variable, and an error if it is not set; `${NAME:-text}` is `text` if the variable is
//! unset or empty, as in a shell; `$${` is a plain `${`. A `$` elsewhere stands for itself. What a variable
//! holds is not expanded again.

/// Expands every variable in `text`. The error tells what is wrong and the remedy, and quotes nothing but
/// names.
pub fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let before = &rest[..at];
        let after = &rest[at + 2..];
        if let Some(before) = before.strip_suffix('$') {
            expanded.push_str(before);
            expanded.push_str("${");
            rest = after;
            continue;
        }
        let Some(end) = after.find('}') else {
            return Err("has a `${` without its `}` (write `$${` for a plain `${`)".to_owned());
        };
        expanded.push_str(before);
        expanded.push_str(&variable(&after[..end], env)?);
        rest = &after[end + 1..];
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// The value for what stands between the braces.
fn variable(inside: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    if !is_name(name) {
        return Err(
            "has a `${...}` that is not the name of a variable (write `${NAME}` or `${NAME:-default}`, and \
             `$${` for a plain `${`)"
                .to_owned(),
        );
    }
    let Some(default) = default else {
        return env(name).ok_or_else(|| {
            format!("the environment variable {name} is not set (set it, or write `${{{name}:-default}}`)")
        });
    };
    if default.contains("${") {
        return Err(format!("the default of {name} holds another variable (a default is plain text)"));
    }
    Ok(env(name).filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned()))
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expands_variables() {
        let env = |name: &str| match name {
            "A" => Some("alpha".to_owned()),
            "B_2" => Some("${A}".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        const NOT_A_NAME: &str = "has a `${...}` that is not the name of a variable (write `${NAME}` or \
                                  `${NAME:-default}`, and `$${` for a plain `${`)";
        for (text, expected) in [
            ("", Ok("")),
            ("plain $ $x }", Ok("plain $ $x }")),
            ("${A}", Ok("alpha")),
            ("<${A}-${A}>", Ok("<alpha-alpha>")),
            ("${B_2}", Ok("${A}")),
            ("${EMPTY}", Ok("")),
            ("${EMPTY:-x}", Ok("x")),
            ("${NONE:-}", Ok("")),
            ("${NONE:-a b:-c}", Ok("a b:-c")),
            ("${A:-x}", Ok("alpha")),
            ("$${A}", Ok("${A}")),
            ("$$${A}", Ok("$${A}")),
            ("$${", Ok("${")),
            ("$$", Ok("$$")),
            ("é${A}é", Ok("éalphaé")),
            (
                "${NONE}",
                Err("the environment variable NONE is not set (set it, or write `${NONE:-default}`)"),
            ),
            ("${A", Err("has a `${` without its `}` (write `$${` for a plain `${`)")),
            ("${}", Err(NOT_A_NAME)),
            ("${A-x}", Err(NOT_A_NAME)),
            ("${ A }", Err(NOT_A_NAME)),
            ("${1A}", Err(NOT_A_NAME)),
            ("${A:-${B}}", Err("the default of A holds another variable (a default is plain text)")),
        ] {
            assert_eq!(
                expand(text, &env),
                expected.map(str::to_owned).map_err(str::to_owned),
                "for {text:?}"
            );
        }
    }
}
