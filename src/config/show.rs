//! The resolved configuration as YAML: what `--check` prints. Secrets are stars; everything else could be
//! read back.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::{AuthMode, CompatMode, Config, Credential, Endpoint, LogFormat, Quota, Strategy};
use crate::balancer::limits::Kind;

/// The whole configuration, in the order of `config.yaml.example`.
pub fn show(config: &Config) -> String {
    let mut page = Page::default();
    server(config, &mut page);
    balancing(config, &mut page);
    auth(config, &mut page);
    models(config, &mut page);
    surroundings(config, &mut page);
    page.line(0, "endpoints:");
    for shown in &config.endpoints {
        endpoint(shown, &mut page);
    }
    page.text
}

/// Lines of YAML.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, indent: usize, line: &str) {
        self.text += &" ".repeat(indent);
        self.text += line;
        self.text += "\n";
    }

    /// A value that needs no quotes.
    fn entry(&mut self, indent: usize, key: &str, value: impl std::fmt::Display) {
        self.line(indent, &format!("{key}: {value}"));
    }

    fn seconds(&mut self, indent: usize, key: &str, duration: Duration) {
        self.entry(indent, key, duration.as_secs_f64());
    }

    fn path(&mut self, indent: usize, key: &str, path: &Path) {
        self.entry(indent, key, scalar(&path.to_string_lossy()));
    }

    fn list(&mut self, indent: usize, key: &str, items: &[String]) {
        let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
        self.entry(indent, key, format!("[{}]", items.join(", ")));
    }
}

fn server(config: &Config, page: &mut Page) {
    let server = &config.server;
    page.line(0, "server:");
    page.entry(2, "host", scalar(&server.host));
    page.entry(2, "port", server.port);
    page.entry(2, "workers", server.workers);
    page.entry(2, "queue", server.queue);
    page.seconds(2, "queue_timeout", server.queue_timeout);
    page.entry(2, "max_connections", server.max_connections);
    page.seconds(2, "drain_timeout", server.drain_timeout);
}

fn balancing(config: &Config, page: &mut Page) {
    let balancer = &config.load_balancer;
    let strategy = match balancer.strategy {
        Strategy::LeastRequests => "least_requests",
        Strategy::RoundRobin => "round_robin",
        Strategy::Random => "random",
    };
    page.line(0, "load_balancer:");
    page.entry(2, "strategy", strategy);
    page.entry(2, "session_affinity", balancer.session_affinity);
    page.entry(2, "circuit_breaker_threshold", balancer.circuit_breaker_threshold);
    page.seconds(2, "circuit_breaker_timeout", balancer.circuit_breaker_timeout);
    match balancer.circuit_breaker_rate {
        Some(rate) => {
            page.entry(2, "circuit_breaker_failure_rate_threshold", rate.failure_rate_threshold);
            page.entry(2, "circuit_breaker_minimum_calls", rate.minimum_calls);
            page.seconds(2, "circuit_breaker_window", rate.window);
        }
        None => page.entry(2, "circuit_breaker_failure_rate_threshold", 0),
    }
    page.entry(2, "max_attempts", balancer.max_attempts);

    let timeouts = &config.timeouts;
    page.line(0, "timeouts:");
    page.seconds(2, "connect", timeouts.connect);
    page.seconds(2, "first_byte", timeouts.first_byte);
    page.seconds(2, "idle", timeouts.idle);
    page.seconds(2, "heartbeat", timeouts.heartbeat);
    page.seconds(2, "head", timeouts.head);
    page.seconds(2, "body", timeouts.body);
    page.seconds(2, "keep_alive", timeouts.keep_alive);
    page.line(0, "limits:");
    page.entry(2, "max_body_bytes", config.limits.max_body_bytes);
    page.entry(2, "max_buffered_bytes", config.limits.max_buffered_bytes);
}

fn auth(config: &Config, page: &mut Page) {
    let auth = &config.auth;
    page.line(0, "auth:");
    match auth.mode {
        AuthMode::Key => page.line(2, "mode: key"),
        AuthMode::None => page.line(2, "mode: none"),
    }
    if !auth.keys.is_empty() {
        page.line(2, "api_keys:");
    }
    for key in &auth.keys {
        page.entry(4, "- name", scalar(&key.name));
        page.entry(6, "key", STARS);
    }
    page.entry(2, "protect_admin", auth.protect_admin);
}

fn models(config: &Config, page: &mut Page) {
    let models = &config.models;
    page.line(0, "models:");
    page.entry(2, "sonnet", scalar(&models.sonnet));
    page.entry(2, "opus", scalar(&models.opus));
    page.entry(2, "haiku", scalar(&models.haiku));
    if models.map.is_empty() {
        page.line(2, "map: {}");
    } else {
        page.line(2, "map:");
    }
    for (pattern, model) in &models.map {
        page.entry(4, &key(pattern), scalar(model));
    }
}

fn surroundings(config: &Config, page: &mut Page) {
    page.line(0, "compat:");
    match config.compat.mode {
        CompatMode::Learn => page.line(2, "mode: learn"),
        CompatMode::Off => page.line(2, "mode: off"),
    }
    page.list(2, "strip", &config.compat.strip);
    match &config.tls.ca_file {
        Some(file) => {
            page.line(0, "tls:");
            page.path(2, "ca_file", file);
        }
        None => page.line(0, "# tls: the built-in roots alone"),
    }
    match &config.usage {
        Some(usage) => {
            page.line(0, "usage:");
            page.path(2, "dir", &usage.dir);
            page.entry(2, "retention_days", usage.retention_days);
        }
        None => page.line(0, "# usage: not kept"),
    }
    page.line(0, "logging:");
    page.entry(2, "level", config.logging.level.as_str().to_ascii_lowercase());
    match config.logging.format {
        LogFormat::Text => page.line(2, "format: text"),
        LogFormat::Json => page.line(2, "format: json"),
    }
}

fn endpoint(endpoint: &Endpoint, page: &mut Page) {
    page.entry(2, "- name", scalar(&endpoint.name));
    page.entry(4, "api_base", scalar(&endpoint.api_base));
    match &endpoint.credential {
        Credential::Token(_) => page.entry(4, "token", STARS),
        Credential::TokenFile(file) => page.path(4, "token_file", file),
        Credential::OAuth { .. } => {
            page.line(4, "oauth:");
            page.entry(6, "client_id", STARS);
            page.entry(6, "client_secret", STARS);
        }
    }
    page.entry(4, "weight", endpoint.weight);
    match endpoint.max_concurrent {
        Some(max) => page.entry(4, "max_concurrent", max),
        None => page.line(4, "# max_concurrent: no limit"),
    }
    if endpoint.models.is_empty() {
        page.line(4, "models: [] # all");
    } else {
        page.list(4, "models", &endpoint.models);
    }
    if endpoint.limits.is_empty() {
        page.line(4, "limits: {} # none; learned from 429s");
    } else {
        page.line(4, "limits:");
        quota(6, &endpoint.limits.each, page);
    }
    if !endpoint.limits.models.is_empty() {
        page.line(6, "models:");
    }
    for (pattern, own) in &endpoint.limits.models {
        let is_empty = *own == Quota::default();
        page.line(8, &format!("{}:{}", key(pattern), if is_empty { " {}" } else { "" }));
        quota(10, own, page);
    }
    if endpoint.headers.is_empty() {
        page.line(4, "headers: {}");
    } else {
        page.line(4, "headers:");
    }
    for (name, _) in &endpoint.headers {
        page.entry(6, &scalar(name), STARS);
    }
}

fn quota(indent: usize, quota: &Quota, page: &mut Page) {
    for kind in Kind::ALL {
        if let Some(limit) = quota.of(kind) {
            page.entry(indent, kind.key(), limit);
        }
    }
}

/// In quotes, since a plain `*` is an alias.
const STARS: &str = "\"***\"";

/// A text as a YAML value: plain where it reads back as itself.
fn scalar(text: &str) -> String {
    let is_tame = |c: char| c.is_alphanumeric() || "-_./:".contains(c);
    let reads_back =
        || serde_yaml::from_str::<serde_yaml::Value>(text).is_ok_and(|value| value.as_str() == Some(text));
    if text.chars().all(is_tame) && reads_back() { text.to_owned() } else { quoted(text) }
}

/// In quotes, with `${` written so that it stands for itself.
fn quoted(text: &str) -> String {
    key(&text.replace("${", "$${"))
}

/// A key in quotes; variables mean nothing in keys.
fn key(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            // YAML folds the first two as line ends and refuses the last two; the one between cannot be seen.
            c if c.is_control() || "\u{2028}\u{2029}\u{feff}\u{fffe}\u{ffff}".contains(c) => {
                // A string takes whatever is written to it.
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_quoted_where_they_must_be() {
        for (text, expected) in [
            ("plain-1_a.b", "plain-1_a.b"),
            ("https://h:80/x", "https://h:80/x"),
            ("工作区", "工作区"),
            ("0.0.0.0", "0.0.0.0"),
            ("::1", "::1"),
            ("true", "\"true\""),
            ("12", "\"12\""),
            ("", "\"\""),
            ("a b", "\"a b\""),
            ("a:", "\"a:\""),
            ("*", "\"*\""),
            ("a\"\\\n", "\"a\\\"\\\\\\U0000000A\""),
            ("${A}", "\"$${A}\""),
            // Found by fuzzing: from a variable such a character got in, and what was shown could not be read back.
            ("a\u{2028}b\u{feff}", "\"a\\U00002028b\\U0000FEFF\""),
            ("\u{ffff}", "\"\\U0000FFFF\""),
        ] {
            assert_eq!(scalar(text), expected, "for {text:?}");
        }
    }
}
