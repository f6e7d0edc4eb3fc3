//! The configuration: no text makes it panic or hang, no message shows what a variable or a value holds, and what
//! `--check` prints is the same configuration again.

use claude_lb::config::{Config, Credential};
use claude_lb::secret::Secret;

/// What the environment holds. It cannot stand in a header or be a variable's name, and nobody guesses it.
const PLANTED: &str = "se-same/opens";

fn env(name: &str) -> Option<String> {
    let value = match name {
        "SECRET" => PLANTED,
        "ODD" => "a\u{2028}b\u{feff}c\u{ffff}d\\\"$${x}",
        "EMPTY" => "",
        "PORT" => "9000",
        "TRUE" => "true",
        _ => return None,
    };
    Some(value.to_owned())
}

/// The whole input is a file.
pub fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match Config::parse(text, "c.yaml", &env) {
        Ok(config) => {
            let shown = config.show();
            shows_no_secret(&config, &shown);
            reads_back(&config, &shown);
        }
        Err(problems) => {
            let lines = problems.lines();
            assert!(!lines.is_empty() && lines.len() <= 60);
            let told = lines.concat();
            let is_a_key = text.contains(PLANTED);
            assert!(is_a_key || !told.contains(PLANTED), "a variable's value is shown: {told}");
            assert!(!told.contains(char::is_control), "{told:?}");
            let most = text.lines().count().max(1);
            assert!(
                problems
                    .list
                    .iter()
                    .all(|problem| problem.line.is_none_or(|line| (1..=most).contains(&line)))
            );
        }
    }
}

fn secrets(config: &mut Config) -> Vec<&mut Secret> {
    let mut secrets: Vec<&mut Secret> = config.auth.keys.iter_mut().map(|key| &mut key.key).collect();
    for endpoint in &mut config.endpoints {
        match &mut endpoint.credential {
            Credential::Token(token) => secrets.push(token),
            Credential::TokenFile(_) => {}
            Credential::OAuth { client_id, client_secret } => secrets.extend([client_id, client_secret]),
        }
        secrets.extend(endpoint.headers.iter_mut().map(|(_, value)| value));
    }
    secrets
}

/// A secret is only found in what is shown when something that may be shown holds the same text.
fn shows_no_secret(config: &Config, shown: &str) {
    let mut starred = config.clone();
    let texts: Vec<String> = secrets(&mut starred)
        .into_iter()
        .map(|secret| std::mem::replace(secret, Secret::new("x")).expose().to_owned())
        .collect();
    assert_eq!(starred.show(), shown, "what is shown depends on a secret");
    let debug = format!("{config:?}");
    for text in texts.iter().filter(|text| text.len() > 8) {
        let open = format!("{starred:?}");
        assert!(open.contains(text.as_str()) || !debug.contains(text.as_str()), "Debug shows a secret");
    }
}

/// With a word in the place of each row of stars, what is shown is the same configuration.
fn reads_back(config: &Config, shown: &str) {
    let mut text = String::new();
    for (index, part) in shown.split(": \"***\"\n").enumerate() {
        if index > 0 {
            text += &format!(": s{index}\n");
        }
        text += part;
    }
    let mut wanted = config.clone();
    let mut again =
        Config::parse(&text, "shown", &|_| None).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
    for config in [&mut wanted, &mut again] {
        secrets(config).into_iter().for_each(|secret| *secret = Secret::new("x"));
    }
    assert_eq!(again, wanted, "for\n{text}");
}
