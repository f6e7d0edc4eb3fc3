//! The configuration as a whole: from the text to the value, or to the exact messages.

use std::time::Duration;

use super::raw::SHAPES;
use super::*;

mod files;
mod messages;

/// The environment of all tests.
fn env(name: &str) -> Option<String> {
    let value = match name {
        "CLAUDE_LB_KEY" => "sk-team",
        "DATABRICKS_TOKEN_1" => "dapi-1",
        "DATABRICKS_TOKEN_2" => "dapi-2\n",
        "EMPTY" => "",
        "SECRET" => "sesame opens",
        "PORT" => "9000",
        _ => return None,
    };
    Some(value.to_owned())
}

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, "c.yaml", &env)
}

/// `parse`, for texts without problems.
fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|problems| panic!("{problems}\nfor\n{text}"))
}

/// What is wrong with `text`, line for line. No message may hold a secret.
fn check(text: &str, expected: &[&str]) {
    let problems = parse(text).map(|config| config.show()).expect_err("problems");
    assert_eq!(problems.lines(), expected, "for\n{text:.1000}");
    assert!(!problems.to_string().contains("sesame"), "a secret is shown:\n{problems}");
}

/// `check` for text under `- name: a` in an otherwise good file, whose first line is line 5.
fn check_endpoint(text: &str, expected: &[&str]) {
    let indented: String = text.lines().map(|line| format!("    {line}\n")).collect();
    check(&format!("auth:\n  api_key: k\nendpoints:\n  - name: a\n{indented}"), expected);
}

/// `check` for text behind a good beginning of five lines.
fn check_after(text: &str, expected: &[&str]) {
    check(&format!("{GOOD}{text}"), expected);
}

const GOOD: &str = "\
auth: { api_key: k }
endpoints:
  - name: a
    api_base: https://h
    token: t
";

#[test]
fn the_least_file_gets_every_default() {
    let config = good(GOOD);
    let second = Duration::from_secs(1);
    let expected = Config {
        server: Server {
            host: "0.0.0.0".into(),
            port: 8000,
            workers: 128,
            queue: 256,
            queue_timeout: 10 * second,
            max_connections: 1024,
            drain_timeout: 30 * second,
        },
        load_balancer: LoadBalancer {
            strategy: Strategy::LeastRequests,
            session_affinity: true,
            circuit_breaker_threshold: 5,
            circuit_breaker_timeout: 60 * second,
            circuit_breaker_rate: None,
            max_attempts: 3,
        },
        timeouts: Timeouts {
            connect: 10 * second,
            first_byte: 300 * second,
            idle: 300 * second,
            heartbeat: 15 * second,
            head: 10 * second,
            body: 60 * second,
            keep_alive: 300 * second,
        },
        limits: Limits { max_body_bytes: 4_194_304, max_buffered_bytes: 536_870_912 },
        auth: Auth {
            mode: AuthMode::Key,
            keys: vec![ClientKey { name: "default".into(), key: Secret::new("k") }],
            protect_admin: false,
        },
        models: Models {
            sonnet: "databricks-claude-sonnet-4-5".into(),
            opus: "databricks-claude-opus-4-5".into(),
            haiku: "databricks-claude-haiku-4-5".into(),
            map: vec![],
        },
        compat: Compat { mode: CompatMode::Learn, strip: vec![] },
        tls: Tls { ca_file: None },
        usage: None,
        logging: Logging { level: log::LevelFilter::Info, format: LogFormat::Text },
        endpoints: vec![Endpoint {
            name: "a".into(),
            api_base: "https://h".into(),
            credential: Credential::Token(Secret::new("t")),
            weight: 1,
            max_concurrent: None,
            models: vec![],
            limits: EndpointLimits::default(),
            headers: vec![],
        }],
    };
    assert_eq!(config, expected);
}

/// A file as the original project's README shows it.
#[test]
fn a_file_of_the_original_project_works_unchanged() {
    let config = good(
        "\
load_balancer:
  strategy: round_robin  # least_requests, round_robin, random
  circuit_breaker_threshold: 3
  circuit_breaker_timeout: 0.5

auth:
  api_key: ${CLAUDE_LB_KEY}

endpoints:
  - name: 工作区-1
    api_base: https://adb-1.azuredatabricks.net/serving-endpoints/
    token: ${DATABRICKS_TOKEN_1}
    weight: 1

  - name: workspace-2
    api_base: https://adb-2.azuredatabricks.net/serving-endpoints
    token: ${DATABRICKS_TOKEN_2}
    weight: 2
",
    );
    assert_eq!(config.load_balancer.strategy, Strategy::RoundRobin);
    assert!(!config.load_balancer.session_affinity);
    assert_eq!(config.load_balancer.circuit_breaker_timeout, Duration::from_millis(500));
    assert_eq!(config.auth.keys[0].key.expose(), "sk-team");
    assert_eq!(config.endpoints[0].api_base, "https://adb-1.azuredatabricks.net/serving-endpoints");
    assert_eq!(
        config.endpoints[1].credential,
        Credential::Token(Secret::new("dapi-2")),
        "the line end is dropped"
    );
    assert_eq!(config.endpoints[1].weight, 2);
}

/// Every key in one file, as documentation writes it.
const EVERY_KEY: &str = r#"
server: { host: 127.0.0.1, port: "${PORT}", workers: 4, queue: 0, queue_timeout: 1, max_connections: 9, drain_timeout: 0 }
load_balancer:
  strategy: random
  session_affinity: true
  circuit_breaker_threshold: 2
  circuit_breaker_timeout: 1.5
  circuit_breaker_failure_rate_threshold: 40
  circuit_breaker_minimum_calls: 8
  circuit_breaker_window: 2.5
  max_attempts: 7
timeouts: { connect: 1, first_byte: 2, idle: 3, heartbeat: 4, head: 5, body: 6, keep_alive: 7.25 }
limits: { max_body_bytes: 4194304 }
auth:
  mode: key
  api_keys: [ { name: alice, key: ... } ]
  protect_admin: true
models: { sonnet: s, opus: o, haiku: h, map: { "z*": databricks-z, "a-${x}": databricks-a } }
compat: { mode: off, strip: [ a.b, "c" ] }
tls: { ca_file: /etc/ssl/corp.pem }
usage: { dir: ./usage, retention_days: 30 }
logging: { level: debug, format: json }
endpoints:
  - name: workspace 1
    api_base: https://adb-xxx.azuredatabricks.net/serving-endpoints
    token: ${DATABRICKS_TOKEN_1}
    weight: 1
    max_concurrent: 32
    models: [ "databricks-claude-*" ]
    limits:
      input_tokens_per_minute: 200000
      requests_per_hour: 7200
      models:
        "databricks-claude-opus-*": { input_tokens_per_minute: 50000, output_tokens_per_minute: 5000 }
        "*": {}
    headers: { X-Databricks-Use-Coding-Agent-Mode: "true" }
  - { name: w2, api_base: "http://[::1]:1", token_file: /run/token, weight: 0 }
  - { name: w3, api_base: "http://h", oauth: { client_id: id, client_secret: "$${x}" }, weight: 2.0 }
"#;

#[test]
fn every_key_is_read() {
    let config = good(EVERY_KEY);
    assert_eq!(config.server.port, 9000);
    assert_eq!(config.server.drain_timeout, Duration::ZERO);
    assert!(config.load_balancer.session_affinity);
    assert_eq!(config.timeouts.keep_alive, Duration::from_millis(7250));
    assert_eq!(config.auth.keys, [ClientKey { name: "alice".into(), key: Secret::new("...") }]);
    let map = [("z*", "databricks-z"), ("a-${x}", "databricks-a")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(config.models.map, map, "in the order of the file");
    assert_eq!(config.compat, Compat { mode: CompatMode::Off, strip: vec!["a.b".into(), "c".into()] });
    assert_eq!(config.tls.ca_file, Some("/etc/ssl/corp.pem".into()));
    assert_eq!(config.usage, Some(Usage { dir: "./usage".into(), retention_days: 30 }));
    assert_eq!(config.logging, Logging { level: log::LevelFilter::Debug, format: LogFormat::Json });
    let [first, second, third] = &config.endpoints[..] else { panic!("three endpoints") };
    assert_eq!(first.max_concurrent, Some(32));
    let quota = |input, output, requests| Quota { input, output, requests };
    let models = [
        ("databricks-claude-opus-*", quota(Some(50_000), Some(5_000), None)),
        ("*", quota(None, None, None)),
    ];
    let models = models.map(|(glob, quota)| (glob.to_owned(), quota)).to_vec();
    assert_eq!(first.limits, EndpointLimits { each: quota(Some(200_000), None, Some(7_200)), models });
    assert!(second.limits.is_empty());
    assert_eq!(first.headers, [("x-databricks-use-coding-agent-mode".to_owned(), Secret::new("true"))]);
    assert_eq!((second.weight, &second.credential), (0, &Credential::TokenFile("/run/token".into())));
    let oauth = Credential::OAuth { client_id: Secret::new("id"), client_secret: Secret::new("${x}") };
    assert_eq!((third.weight, &third.credential), (2, &oauth));
}

/// The file as the project's contract prints it.
#[test]
fn the_file_of_the_contract_parses() {
    let config = good(CONTRACT);
    let least = good(GOOD);
    assert_eq!((&config.server, &config.load_balancer), (&least.server, &least.load_balancer));
    assert_eq!((&config.timeouts, &config.limits), (&least.timeouts, &least.limits));
    assert_eq!((&config.compat, &config.logging), (&least.compat, &least.logging));
    let names: Vec<&str> = config.auth.keys.iter().map(|key| key.name.as_str()).collect();
    assert_eq!(names, ["default", "alice"]);
    assert_eq!(config.endpoints[0].max_concurrent, Some(32));
}

const CONTRACT: &str = r#"
server: { host: 0.0.0.0, port: 8000, workers: 128, queue: 256, queue_timeout: 10, max_connections: 1024, drain_timeout: 30 }
load_balancer:
  strategy: least_requests         # S least_requests | round_robin | random
  session_affinity: true           # default true with least_requests, false otherwise; section 5
  circuit_breaker_threshold: 5     # S consecutive server errors
  circuit_breaker_timeout: 60      # S seconds (fractions allowed)
  max_attempts: 3
timeouts: { connect: 10, first_byte: 300, idle: 300, heartbeat: 15, head: 10, body: 60, keep_alive: 300 }   # seconds; the last three are the client's
limits: { max_body_bytes: 4194304 }     # Databricks' own limit
auth:
  api_key: ${CLAUDE_LB_KEY}        # S
  api_keys: [ { name: alice, key: ... } ]
  protect_admin: false
models: { sonnet: databricks-claude-sonnet-4-5, opus: databricks-claude-opus-4-5, haiku: databricks-claude-haiku-4-5, map: { "claude-opus-4-1*": databricks-claude-opus-4-1 } }
compat: { mode: learn, strip: [] } # learn | off; section 7
tls: { ca_file: /etc/ssl/corp.pem } # in addition to the built-in roots; SSL_CERT_FILE likewise
usage: { dir: ./usage, retention_days: 90 }   # off unless set
logging: { level: info, format: text }        # or json; LOG_LEVEL, LOG_FORMAT
endpoints:
  - name: workspace-1              # S unique
    api_base: https://adb-xxx.azuredatabricks.net/serving-endpoints   # S trailing slash allowed
    token: ${DATABRICKS_TOKEN_1}   # S or token_file: PATH, re-read when it changes, or oauth: { client_id, client_secret }
    weight: 1                      # S integer >= 0; 0 = no new traffic
    max_concurrent: 32             # optional
    models: [ "databricks-claude-*" ]          # optional, which models this workspace serves
    headers: { x-databricks-use-coding-agent-mode: "true" }   # optional
"#;

#[test]
fn aliases_and_merges_work() {
    let config = good(
        "\
auth: { api_key: &key k }
endpoints:
  - &first
    name: a
    api_base: https://h
    token: t
    weight: 3
    headers: &headers { x-a: '1' }
  - <<: *first
    name: b
  - { <<: [{ weight: 5 }, *first], name: c, token: *key, headers: { x-b: '2', <<: *headers } }
",
    );
    let weights: Vec<u32> = config.endpoints.iter().map(|endpoint| endpoint.weight).collect();
    assert_eq!(weights, [3, 3, 5]);
    assert_eq!(config.endpoints[2].credential, Credential::Token(Secret::new("k")));
    assert_eq!(config.endpoints[2].headers.len(), 2);
    check_after(
        "  - { <<: 1, name: b, api_base: 'http://h', token: t }\n",
        &["c.yaml:6: endpoints[1].<<: must name a mapping, or a list of mappings, to merge"],
    );
}

#[test]
fn the_environment_wins_in_logging() {
    let with = |level: &'static str, format: &'static str| {
        move |name: &str| match name {
            "LOG_LEVEL" => Some(level.to_owned()),
            "LOG_FORMAT" => Some(format.to_owned()),
            _ => None,
        }
    };
    let text = format!("{GOOD}logging: {{ level: error, format: text }}\n");
    let logging =
        |level, format| Config::parse(&text, "c.yaml", &with(level, format)).map(|config| config.logging);
    let (debug, error) = (log::LevelFilter::Debug, log::LevelFilter::Error);
    assert_eq!(logging("DEBUG", "json"), Ok(Logging { level: debug, format: LogFormat::Json }));
    assert_eq!(logging("", ""), Ok(Logging { level: error, format: LogFormat::Text }));
    assert_eq!(
        logging("debg", "xml").map_err(|problems| problems.lines()),
        Err(vec![
            "c.yaml: LOG_LEVEL (environment): must be one of off, error, warn, info, debug, trace (did you \
             mean `debug`?)"
                .to_owned(),
            "c.yaml: LOG_FORMAT (environment): must be one of text, json".to_owned(),
        ])
    );
}

#[test]
fn show_can_be_read_back() {
    for text in [GOOD, EVERY_KEY] {
        let mut config = good(text);
        let shown = config.show();
        for secret in ["sk-team", "dapi", "\"t\"", "key: ..."] {
            assert!(!shown.contains(secret), "{secret} is shown:\n{shown}");
        }
        let stars = || Secret::new("***");
        config.auth.keys[0].key = stars();
        for endpoint in &mut config.endpoints {
            match &mut endpoint.credential {
                Credential::Token(token) => *token = stars(),
                Credential::TokenFile(_) => {}
                Credential::OAuth { client_id, client_secret } => {
                    (*client_id, *client_secret) = (stars(), stars())
                }
            }
            endpoint.headers.iter_mut().for_each(|(_, value)| *value = stars());
        }
        assert_eq!(good(&shown), config, "for\n{shown}");
    }
}

#[test]
fn the_example_is_a_configuration_and_documents_every_key() {
    let text = include_str!("../../config.yaml.example");
    let config = good(text);
    assert_eq!(config.endpoints.len(), 2);
    for (section, keys) in SHAPES {
        for key in *keys {
            assert!(text.contains(&format!("{key}:")), "{section}.{key} is not in the example");
        }
    }
    assert!(text.lines().all(|line| line.len() <= 84), "the example fits a terminal");

    // Without the `#` before optional keys everything is still right, and what is shown as a default is one.
    let mut uncommented = String::new();
    for line in text.lines() {
        let comment =
            line.trim_start().strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' '));
        let is_inside_item = line.starts_with("  #  ");
        uncommented += &match comment {
            Some(rest) => format!("{}{rest}\n", &line[..line.len() - rest.len() - 1]),
            None if is_inside_item => format!("{}\n", line.replacen('#', "", 1)),
            None => format!("{line}\n"),
        };
    }
    let any = |name: &str| Some(format!("value-of-{name}"));
    let full =
        Config::parse(&uncommented, "c.yaml", &|name: &str| any(name).filter(|_| !name.starts_with("LOG_")))
            .unwrap_or_else(|problems| panic!("{problems}\nfor\n{uncommented}"));
    assert_eq!(full.endpoints.len(), 4);
    assert_eq!(full.auth.keys.len(), 3);
    assert_eq!((&full.server, &full.load_balancer), (&config.server, &config.load_balancer));
    assert_eq!((&full.timeouts, &full.limits), (&config.timeouts, &config.limits));
    assert_eq!((&full.compat, &full.logging), (&config.compat, &config.logging));
    assert_eq!((&full.models.sonnet, &full.models.opus), (&config.models.sonnet, &config.models.opus));
    assert_eq!(full.usage.map(|usage| usage.retention_days), Some(90));
}
