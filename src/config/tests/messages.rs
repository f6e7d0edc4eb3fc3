//! What is wrong with a file, in the exact words and with the line.

use super::*;

const NO_KEY: &str = "no key (write `auth.api_key: ${CLAUDE_LB_KEY}`; for a proxy that only this machine \
                      can reach, `auth.mode: none` with `server.host: 127.0.0.1`)";
const EXAMPLE: &str = "https://adb-123.azuredatabricks.net/serving-endpoints";

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_lines() {
    check(
        "\
server:
  prot: 80
  workers: many
endpoints:
  - name: a
    api_base: https://h/anthropic
    token: ${NOWHERE}
  - name: a
    api_base: https://h
    token: ${EMPTY}
    weight: -1
loging: {}
",
        &[
            "c.yaml: auth: ".to_owned() + NO_KEY,
            "c.yaml:2: server.prot: unknown key (did you mean `port`?)".to_owned(),
            "c.yaml:3: server.workers: must be a number, not a text (digits alone, without a unit)"
                .to_owned(),
            "c.yaml:6: endpoints[0].api_base: ends in `/anthropic`, which the proxy adds itself (remove \
             that part)"
                .to_owned(),
            "c.yaml:7: endpoints[0].token: the environment variable NOWHERE is not set (set it, or write \
             `${NOWHERE:-default}`)"
                .to_owned(),
            "c.yaml:8: endpoints[1].name: another endpoint has this name, on line 5 (names must be unique)"
                .to_owned(),
            "c.yaml:10: endpoints[1].token: is empty (set it, or remove it)".to_owned(),
            "c.yaml:11: endpoints[1].weight: must be a whole number from 0 to 1000000".to_owned(),
            "c.yaml:12: loging: unknown key (did you mean `logging`?)".to_owned(),
        ]
        .each_ref()
        .map(String::as_str),
    );
}

#[test]
fn keys_that_do_not_exist() {
    check_after("port: 80\n", &["c.yaml:6: port: unknown key (it belongs under `server`)"]);
    check_after("weight: 1\n", &["c.yaml:6: weight: unknown key (it belongs under `endpoints`)"]);
    check_after(
        "tls: { server: 1 }\n",
        &["c.yaml:6: tls.server: unknown key (it belongs at the top of the file)"],
    );
    check_after(
        "limits: { size: 1 }\n",
        &["c.yaml:6: limits.size: unknown key (known here: max_body_bytes, max_buffered_bytes)"],
    );
    check_after("tls: { 5: 1 }\n", &["c.yaml:6: tls.5: unknown key (known here: ca_file)"]);
    check_endpoint(
        "api-base: https://h\ntoken: t\n",
        &[
            "c.yaml:4: endpoints[0]: `api_base` is missing (write \
             https://adb-123.azuredatabricks.net/serving-endpoints)",
            "c.yaml:5: endpoints[0].api-base: unknown key (did you mean `api_base`?)",
        ],
    );
}

/// A missing space makes a token part of the key.
#[test]
fn a_secret_within_a_key_is_not_shown() {
    check(
        "auth: {api_key:sesame}\nendpoints: [{name: a, api_base: 'http://h', token=sesame}]\n",
        &[
            "c.yaml:1: auth.api_key...: unknown key (write a space behind the colon of `api_key:`)"
                .to_owned(),
            format!("c.yaml:1: auth: {NO_KEY}"),
            "c.yaml:2: endpoints[0].token...: unknown key (known here: name, api_base, token, token_file, \
             oauth, weight, max_concurrent, models, limits, headers)"
                .to_owned(),
            "c.yaml:2: endpoints[0]: `token` is missing (or write `token_file` or `oauth`)".to_owned(),
        ]
        .each_ref()
        .map(String::as_str),
    );
    // The same in block style, where it makes the section one text.
    check(
        "auth:\n  api_key:sesame\nendpoints: []\n",
        &[
            "c.yaml:1: auth: must be a mapping (indented `key: value` lines), not a text (is the space \
             behind a colon missing?)",
            "c.yaml:3: endpoints: the list is empty (list at least one workspace)",
        ],
    );
}

#[test]
fn keys_given_twice() {
    check_after(
        "server:\n  port: 1\n  host: h\n  port: 2\n",
        &["c.yaml:9: server.port: is given twice, first on line 7 (remove one)"],
    );
    check_after("auth: {}\n", &["c.yaml:6: auth: is given twice, first on line 1 (remove one)"]);
    check_after(
        "models:\n  map:\n    a: b\n    a: c\n",
        &["c.yaml:9: models.map.a: is given twice, first on line 8 (remove one)"],
    );
    // Found by fuzzing: the second was never looked at, and what `--check` printed could not be read back.
    check_after(
        "models:\n  map:\n    a: b\n    'a ': c\n",
        &["c.yaml:9: models.map.a...: is given twice (blanks around a pattern do not count; remove one)"],
    );
}

#[test]
fn values_of_the_wrong_kind() {
    check_after(
        "server: 5\n",
        &["c.yaml:6: server: must be a mapping (indented `key: value` lines), not a number"],
    );
    check_after(
        "server: []\n",
        &["c.yaml:6: server: must be a mapping (indented `key: value` lines), not a list"],
    );
    check_after(
        "server:\n  host: 1\n",
        &["c.yaml:7: server.host: must be a text, not a number (put it in quotes)"],
    );
    check_after(
        "server:\n  host: [a]\n",
        &["c.yaml:7: server.host: must be a text, not a list (a text that holds { or [ needs quotes)"],
    );
    check_after(
        "server:\n  host:\n",
        &["c.yaml:7: server.host: has no value (write one, or remove the key)"],
    );
    check_after(
        "server:\n  port:\n",
        &["c.yaml:7: server.port: has no value (write one, or remove the key)"],
    );
    check_after("server:\n  port: true\n", &["c.yaml:7: server.port: must be a number, not true or false"]);
    check_after(
        "server:\n  queue_timeout: 10s\n",
        &["c.yaml:7: server.queue_timeout: must be a number, not a text (digits alone, without a unit)"],
    );
    check_after(
        "server:\n  port: ${SECRET}\n",
        &["c.yaml:7: server.port: must be a number, not a text (digits alone, without a unit)"],
    );
    check_after(
        "load_balancer: { session_affinity: 'yes' }\n",
        &["c.yaml:6: load_balancer.session_affinity: must be true or false"],
    );
    check_after(
        "compat: { strip: a.b }\n",
        &["c.yaml:6: compat.strip: must be a list (lines that begin with `-`, or [ ]), not a text"],
    );
    check_after(
        "compat:\n  strip:\n    - a\n    - 1\n",
        &["c.yaml:9: compat.strip[1]: must be a text, not a number (put it in quotes)"],
    );
    check_after(
        "compat: { strip: [ a.b, tools.*.name ] }\n",
        &[
            "c.yaml:6: compat.strip[1]: is no place that can be left out (write for example tools.*.defer_loading)",
        ],
    );
    check(
        "auth: { api_key: k }\nendpoints: { a: b }\n",
        &["c.yaml:2: endpoints: must be a list (lines that begin with `-`, or [ ]), not a mapping"],
    );
    check(
        "auth: { api_key: k }\nendpoints:\n  - a\n",
        &["c.yaml:3: endpoints[0]: must be a mapping (indented `key: value` lines), not a text"],
    );
}

#[test]
fn numbers_out_of_range() {
    for (section, key, value, range) in [
        ("server", "port", "65536", "a whole number from 0 to 65535"),
        ("server", "port", "80.5", "a whole number from 0 to 65535"),
        ("server", "workers", "0", "a whole number from 1 to 10000"),
        ("server", "workers", "99999999999999999999999999999999999999999", "a whole number from 1 to 10000"),
        ("server", "queue", "-1", "a whole number from 0 to 1000000"),
        ("server", "max_connections", "0", "a whole number from 1 to 1000000"),
        ("server", "queue_timeout", "0", "seconds from 0.001 to 86400"),
        ("server", "drain_timeout", "-1", "seconds from 0 to 86400"),
        ("load_balancer", "circuit_breaker_threshold", "0", "a whole number from 1 to 1000000"),
        ("load_balancer", "circuit_breaker_timeout", "0", "seconds from 0.001 to 86400"),
        ("load_balancer", "circuit_breaker_failure_rate_threshold", "101", "a whole number from 0 to 100"),
        ("load_balancer", "circuit_breaker_minimum_calls", "0", "a whole number from 1 to 1000000"),
        ("load_balancer", "circuit_breaker_window", "0", "seconds from 0.001 to 86400"),
        ("load_balancer", "max_attempts", "0", "a whole number from 1 to 100"),
        ("timeouts", "connect", "-0.5", "seconds from 0.001 to 86400"),
        ("timeouts", "first_byte", "300000", "seconds from 0.001 to 86400"),
        ("timeouts", "idle", ".inf", "seconds from 0.001 to 86400"),
        ("timeouts", "heartbeat", ".nan", "seconds from 0.001 to 86400"),
        ("timeouts", "head", "'NaN'", "seconds from 0.001 to 86400"),
        ("timeouts", "body", "1.0e-9", "seconds from 0.001 to 86400"),
        ("limits", "max_body_bytes", "0", "a whole number from 1 to 1073741824"),
        ("limits", "max_buffered_bytes", "8388607", "a whole number from 8388608 to 4294967295"),
    ] {
        let text = format!("{section}:\n  {key}: {value}\n");
        check_after(&text, &[&format!("c.yaml:7: {section}.{key}: must be {range}")]);
    }
    check_after(
        "usage: { dir: d, retention_days: 0 }\n",
        &["c.yaml:6: usage.retention_days: must be a whole number from 1 to 36500"],
    );
}

#[test]
fn words_that_are_none_of_the_choices() {
    check_after(
        "load_balancer: { strategy: least_request }\n",
        &["c.yaml:6: load_balancer.strategy: must be one of least_requests, round_robin, random (did you \
             mean `least_requests`?)"],
    );
    check_after(
        "logging: { level: loud, format: jsn }\ncompat: { mode: on }\n",
        &[
            "c.yaml:6: logging.level: must be one of off, error, warn, info, debug, trace",
            "c.yaml:6: logging.format: must be one of text, json (did you mean `json`?)",
            "c.yaml:7: compat.mode: must be one of learn, off",
        ],
    );
}

#[test]
fn doors_left_open() {
    let endpoints = "endpoints: [{ name: a, api_base: 'http://h', token: t }]\n";
    let check_auth = |text: &str, expected: &str| check(&format!("{text}{endpoints}"), &[expected]);
    let no_key = |place: &str| format!("{place}: {NO_KEY}");
    check_auth("", &no_key("c.yaml: auth"));
    check_auth("auth:\n", &no_key("c.yaml: auth"));
    check_auth("auth: {}\n", &no_key("c.yaml:1: auth"));
    check_auth("auth:\n  api_keys: []\n", &no_key("c.yaml:1: auth"));
    check_auth("auth:\n  mode: key\n", &no_key("c.yaml:1: auth"));
    check_auth(
        "auth:\n  mode: non\n",
        "c.yaml:2: auth.mode: must be one of key, none (did you mean `none`?)",
    );
    check_auth("auth:\n  api_key: ''\n", "c.yaml:2: auth.api_key: is empty (set it, or remove it)");
    check_auth("auth:\n  api_key: ' '\n", "c.yaml:2: auth.api_key: is empty (set it, or remove it)");
    check_auth("auth:\n  api_key: ${EMPTY}\n", "c.yaml:2: auth.api_key: is empty (set it, or remove it)");
    check_auth("auth:\n  api_key:\n", "c.yaml:2: auth.api_key: has no value (write one, or remove the key)");
    check_auth(
        "auth:\n  api_key: ${UNSET}\n",
        "c.yaml:2: auth.api_key: the environment variable UNSET is not set (set it, or write \
         `${UNSET:-default}`)",
    );
    check_auth(
        "auth:\n  api_key: 12345\n",
        "c.yaml:2: auth.api_key: must be a text, not a number (put it in quotes)",
    );
    let open = "auth.mode: `none` would let everyone in the network use your workspaces (write \
                `server.host: 127.0.0.1`, or give a key)";
    check_auth("auth:\n  mode: none\n", &format!("c.yaml:2: {open}"));
    check_auth("server: { host: '::' }\nauth: { mode: none }\n", &format!("c.yaml:2: {open}"));
    check_auth(
        "server: { host: localhost }\nauth:\n  api_key: k\n  mode: none\n",
        "c.yaml:4: auth.mode: `none` asks for no key, but there are keys (remove them, or write `mode: key`)",
    );
    check_auth(
        "server: { host: localhost }\nauth: { mode: none, protect_admin: true }\n",
        "c.yaml:2: auth.mode: `none` leaves no key for `protect_admin: true` to ask for (remove one of them)",
    );
    for host in ["127.0.0.1", "127.3.4.5", "'::1'", "'[::1]'", "localhost"] {
        let config = good(&format!("server: {{ host: {host} }}\nauth: {{ mode: none }}\n{endpoints}"));
        assert!(config.auth.keys.is_empty());
    }
}

#[test]
fn client_keys() {
    let endpoints = "endpoints: [{ name: a, api_base: 'http://h', token: t }]\n";
    check(
        &format!(
            "\
auth:
  api_key: one
  api_keys:
    - {{ name: default, key: two }}
    - {{ name: bob, key: one }}
    - {{ name: '', key: three }}
    - {{ key: four }}
    - {{ name: eve }}
    - {{ name: \"a\\nb\", key: five }}
{endpoints}"
        ),
        &[
            "c.yaml:4: auth.api_keys[0].name: another key has this name, on line 2 (each client needs its \
             own)",
            "c.yaml:5: auth.api_keys[1].key: the same key as that of `default` (each client needs its own)",
            "c.yaml:6: auth.api_keys[2].name: is empty (write a value, or remove the key)",
            "c.yaml:7: auth.api_keys[3]: `name` is missing",
            "c.yaml:8: auth.api_keys[4]: `key` is missing",
            "c.yaml:9: auth.api_keys[5].name: holds a line end or a control character (write it on one line)",
        ],
    );
}

#[test]
fn secrets_that_cannot_stand_in_a_header() {
    let what = "holds a blank, a line end or a character that is not ASCII, which cannot stand in a header \
                (copy it again, without anything around it)";
    let base = "api_base: https://h\n";
    for token in ["'sesame x'", "\"sesame\\u0001\"", "sesamé", "${SECRET}", "|\n  sesame\n  x"] {
        check_endpoint(&format!("{base}token: {token}"), &[&format!("c.yaml:6: endpoints[0].token: {what}")]);
    }
    check_endpoint(
        &format!("{base}token: bearer sesame"),
        &["c.yaml:6: endpoints[0].token: begins with `Bearer` (write the token alone)"],
    );
    check_endpoint(
        &format!("{base}oauth:\n  client_secret: é"),
        &[
            "c.yaml:6: endpoints[0].oauth: `client_id` is missing",
            &format!("c.yaml:7: endpoints[0].oauth.client_secret: {what}"),
        ],
    );
    let trimmed = good(&GOOD.replace("token: t", "token: \"\\tdapi-x \\r\\n\""));
    assert_eq!(trimmed.endpoints[0].credential, Credential::Token(Secret::new("dapi-x")));
}

#[test]
fn endpoints() {
    let auth = "auth: { api_key: k }\n";
    check(auth, &["c.yaml: endpoints: missing (list at least one workspace)"]);
    check(&format!("{auth}endpoints:\n"), &["c.yaml: endpoints: missing (list at least one workspace)"]);
    check(
        &format!("{auth}endpoints: []\n"),
        &["c.yaml:2: endpoints: the list is empty (list at least one workspace)"],
    );
    check(
        &format!("{auth}endpoints:\n  - {{}}\n"),
        &[
            "c.yaml:3: endpoints[0]: `name` is missing (any word that is unique)",
            &format!("c.yaml:3: endpoints[0]: `api_base` is missing (write {EXAMPLE})"),
            "c.yaml:3: endpoints[0]: `token` is missing (or write `token_file` or `oauth`)",
        ],
    );
    check(
        &GOOD.replace("token: t", "token: t\n    weight: 0"),
        &["c.yaml:2: endpoints: every weight is 0, so that no request could be sent (give one a weight of \
             1 or more)"],
    );
    let base = "api_base: https://h\n";
    check_endpoint(
        &format!("{base}token: t\ntoken_file: f\noauth: {{ client_id: i, client_secret: s }}"),
        &["c.yaml:4: endpoints[0]: has token and token_file and oauth at once (keep one of them)"],
    );
    check_endpoint(
        &format!("{base}token_file: ''"),
        &["c.yaml:6: endpoints[0].token_file: must be a path (write one, or remove the key)"],
    );
    check_endpoint(
        &format!("{base}token: t\nmax_concurrent: 0\nmodels: ['']"),
        &[
            "c.yaml:7: endpoints[0].max_concurrent: must be a whole number from 1 to 1000000",
            "c.yaml:8: endpoints[0].models[0]: is empty (write a value, or remove the key)",
        ],
    );
    let number = "must be a whole number from 1 to 4294967295";
    check_endpoint(
        &format!(
            "{base}token: t\nlimits:\n  input_token_per_minute: 1\n  output_tokens_per_minute: 0\n  \
             requests_per_hour: many\n  models:\n    'a*': {{ requests_per_hour: 1.5 }}\n    '': {{}}\n    b: 7"
        ),
        &[
            "c.yaml:8: endpoints[0].limits.input_token_per_minute: unknown key (did you mean \
             `input_tokens_per_minute`?)"
                .to_owned(),
            format!("c.yaml:9: endpoints[0].limits.output_tokens_per_minute: {number}"),
            "c.yaml:10: endpoints[0].limits.requests_per_hour: must be a number, not a text (digits alone, without a \
             unit)"
                .to_owned(),
            format!("c.yaml:12: endpoints[0].limits.models.a*.requests_per_hour: {number}"),
            "c.yaml:13: endpoints[0].limits.models.: is empty (write a value, or remove the key)".to_owned(),
            "c.yaml:14: endpoints[0].limits.models.b: must be a mapping (indented `key: value` lines), not a number"
                .to_owned(),
        ]
        .each_ref()
        .map(String::as_str),
    );
    check_endpoint(
        "api_base: https://me:sesame@h\ntoken: t",
        &["c.yaml:5: endpoints[0].api_base: must have no user or password (the token has its own key, \
           `token`)"],
    );
}

#[test]
fn headers() {
    check_endpoint(
        "\
api_base: https://h
token: t
headers:
  Authorization: sesame
  Connection: close
  'a b': sesame
  x-a: '1'
  X-A: '2'
  x-b: ''
  x-c: \"a\\nb: sesame\"
  x-d: true",
        &[
            "c.yaml:8: endpoints[0].headers.Authorization: a header for credentials, which the proxy sets \
             itself (write `token`)",
            "c.yaml:9: endpoints[0].headers.Connection: a header of the connection, which the proxy sets \
             itself (remove it)",
            "c.yaml:10: endpoints[0].headers.a...: not a header name (letters, digits and `-`)",
            "c.yaml:12: endpoints[0].headers.X-A: is given twice (upper and lower case are the same in a \
             header name)",
            "c.yaml:13: endpoints[0].headers.x-b: is empty (set it, or remove it)",
            "c.yaml:14: endpoints[0].headers.x-c: holds a line end or a character that is not ASCII, which \
             cannot stand in a header",
            "c.yaml:15: endpoints[0].headers.x-d: must be a text, not true or false (put it in quotes)",
        ],
    );
}

#[test]
fn the_other_sections() {
    check_after(
        "server: { host: 'http://h:80' }\n",
        &["c.yaml:6: server.host: must be an IP address or a host name, without scheme and port (the port \
             is `server.port`)"],
    );
    check_after(
        "usage: {}\n",
        &["c.yaml:6: usage: `dir` is missing (name a directory, or remove the section)"],
    );
    check_after(
        "tls: { ca_file: '' }\n",
        &["c.yaml:6: tls.ca_file: must be a path (write one, or remove the key)"],
    );
    check_after(
        "models: { opus: '' }\n",
        &["c.yaml:6: models.opus: is empty (write a value, or remove the key)"],
    );
    check_after(
        "models: { map: { '': x } }\n",
        &["c.yaml:6: models.map.: is empty (write a value, or remove the key)"],
    );
}
