//! What each key means: its default, its limits, and how keys depend on each other.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::nearest::nearest;
use super::problems::Problems;
use super::raw::{self, At, Field, FromNode, Number, Place, Reader, Text};
use super::tree::{self, Value};
use super::{
    Compat, CompatMode, Config, Limits, LoadBalancer, LogFormat, Logging, Models, RateRule, Server, Strategy,
    Timeouts, Tls, Usage, auth, endpoint,
};
use crate::anthropic::compat::Path;

/// The meaning of a text, or all its problems. The file's name is filled in by the caller.
pub fn resolve(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Problems> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let tree = tree::parse(text).map_err(|error| Problems::of_file("", error.line, error.what))?;
    match tree.value {
        Value::Map(_) => {}
        Value::Null => return Err(Problems::of_file("", None, EMPTY)),
        other => return Err(Problems::of_file("", None, format!("holds {}, {NO_SECTIONS}", other.kind()))),
    }
    let mut reader = Reader::new(text, env);
    let root = raw::Root::from_node(&tree, &Place { id: tree.id, key: String::new() }, &mut reader);
    match root.and_then(|root| config(root, &mut reader)) {
        Some(config) if reader.problems.is_empty() => Ok(config),
        _ => {
            reader.problems.sort_by_key(|problem| problem.line);
            Err(Problems { file: String::new(), list: reader.problems, more: reader.more })
        }
    }
}

const EMPTY: &str = "empty (config.yaml.example shows what it may hold)";
const NO_SECTIONS: &str = "where sections such as `auth:` and `endpoints:` belong (see config.yaml.example)";

/// `None` only after a problem was reported.
fn config(raw: raw::Root, reader: &mut Reader<'_>) -> Option<Config> {
    let server = server(raw.server.section(), reader);
    let auth = auth::auth(raw.auth, &server.host, reader);
    let endpoints = endpoint::endpoints(raw.endpoints, reader);
    Some(Config {
        load_balancer: load_balancer(raw.load_balancer.section(), reader),
        timeouts: timeouts(raw.timeouts.section(), reader),
        limits: limits(raw.limits.section(), reader),
        models: models(raw.models.section(), reader),
        compat: compat(raw.compat.section(), reader),
        tls: Tls { ca_file: path(raw.tls.section().ca_file, reader) },
        usage: usage(raw.usage, reader),
        logging: logging(raw.logging.section(), reader),
        server,
        auth: auth?,
        endpoints,
    })
}

fn server(raw: raw::Server, reader: &mut Reader<'_>) -> Server {
    Server {
        host: host(raw.host, reader),
        port: whole(raw.port, 8000, 0, 65_535, reader) as u16,
        workers: whole(raw.workers, 128, 1, 10_000, reader) as usize,
        queue: whole(raw.queue, 256, 0, 1_000_000, reader) as usize,
        queue_timeout: seconds(raw.queue_timeout, 10, reader),
        max_connections: whole(raw.max_connections, 1024, 1, 1_000_000, reader) as usize,
        drain_timeout: seconds_or_zero(raw.drain_timeout, 30, reader),
    }
}

fn host(field: Field<Text>, reader: &mut Reader<'_>) -> String {
    let default = "0.0.0.0";
    let Some(At { value: Text(text), place }) = field.given() else { return default.to_owned() };
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let is_name =
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if !is_name && bare.parse::<IpAddr>().is_err() {
        reader.report(
            &place,
            "must be an IP address or a host name, without scheme and port (the port is `server.port`)",
        );
    }
    bare.to_owned()
}

fn load_balancer(raw: raw::LoadBalancer, reader: &mut Reader<'_>) -> LoadBalancer {
    const STRATEGIES: &[(&str, Strategy)] = &[
        ("least_requests", Strategy::LeastRequests),
        ("round_robin", Strategy::RoundRobin),
        ("random", Strategy::Random),
    ];
    let strategy = choice(raw.strategy, STRATEGIES, reader).unwrap_or(Strategy::LeastRequests);
    let affinity = raw.session_affinity.given().map(|at| at.value);
    let rule = RateRule {
        failure_rate_threshold: whole(raw.circuit_breaker_failure_rate_threshold, 0, 0, 100, reader),
        minimum_calls: whole(raw.circuit_breaker_minimum_calls, 20, 1, 1_000_000, reader),
        window: seconds(raw.circuit_breaker_window, 60, reader),
    };
    let rate = (rule.failure_rate_threshold > 0).then_some(rule);
    LoadBalancer {
        strategy,
        session_affinity: affinity.unwrap_or(strategy == Strategy::LeastRequests),
        circuit_breaker_threshold: whole(raw.circuit_breaker_threshold, 5, 1, 1_000_000, reader),
        circuit_breaker_timeout: seconds(raw.circuit_breaker_timeout, 60, reader),
        circuit_breaker_rate: rate,
        max_attempts: whole(raw.max_attempts, 3, 1, 100, reader),
    }
}

fn timeouts(raw: raw::Timeouts, reader: &mut Reader<'_>) -> Timeouts {
    Timeouts {
        connect: seconds(raw.connect, 10, reader),
        first_byte: seconds(raw.first_byte, 300, reader),
        idle: seconds(raw.idle, 300, reader),
        heartbeat: seconds(raw.heartbeat, 15, reader),
        head: seconds(raw.head, 10, reader),
        body: seconds(raw.body, 60, reader),
        keep_alive: seconds(raw.keep_alive, 300, reader),
    }
}

fn models(raw: raw::Models, reader: &mut Reader<'_>) -> Models {
    let mut family = |field: Field<Text>, default: &str| match field.given() {
        Some(at) => name(at, reader).unwrap_or_default(),
        None => default.to_owned(),
    };
    let sonnet = family(raw.sonnet, "databricks-claude-sonnet-4-5");
    let opus = family(raw.opus, "databricks-claude-opus-4-5");
    let haiku = family(raw.haiku, "databricks-claude-haiku-4-5");
    let mut map: Vec<(String, String)> = Vec::new();
    for (At { value, place }, model) in raw.map.section().0 {
        let pattern = name(At { value: Text(value), place: place.clone() }, reader);
        let Some((pattern, model)) = pattern.zip(name(model, reader)) else { continue };
        if map.iter().any(|(other, _)| *other == pattern) {
            reader.report(&place, "is given twice (blanks around a pattern do not count; remove one)");
        }
        map.push((pattern, model));
    }
    Models { sonnet, opus, haiku, map }
}

fn compat(raw: raw::Compat, reader: &mut Reader<'_>) -> Compat {
    let modes = &[("learn", CompatMode::Learn), ("off", CompatMode::Off)];
    Compat {
        mode: choice(raw.mode, modes, reader).unwrap_or(CompatMode::Learn),
        strip: strip(raw.strip, reader),
    }
}

/// Places that requests can do without; of a misspelt one the operator would only hear from a workspace.
fn strip(field: Field<Vec<At<Text>>>, reader: &mut Reader<'_>) -> Vec<String> {
    const PLACES_MAX: usize = 32;
    let mut places = Vec::new();
    for at in field.section() {
        let place = at.place.clone();
        let Some(text) = name(at, reader) else { continue };
        if Path::configured(&text).is_none() {
            reader
                .report(&place, "is no place that can be left out (write for example tools.*.defer_loading)");
        } else if places.len() == PLACES_MAX {
            reader.report(&place, format!("is one too many: at most {PLACES_MAX} places"));
        }
        places.push(text);
    }
    places
}

fn usage(field: Field<raw::Usage>, reader: &mut Reader<'_>) -> Option<Usage> {
    let At { value: raw, place } = field.given()?;
    if raw.dir.is_absent() {
        reader.report(&place, "`dir` is missing (name a directory, or remove the section)");
    }
    let dir = path(raw.dir, reader);
    let retention_days = whole(raw.retention_days, 90, 1, 36_500, reader);
    Some(Usage { dir: dir?, retention_days })
}

fn logging(raw: raw::Logging, reader: &mut Reader<'_>) -> Logging {
    use log::LevelFilter::{Debug, Error, Info, Off, Trace, Warn};
    const LEVELS: &[(&str, log::LevelFilter)] =
        &[("off", Off), ("error", Error), ("warn", Warn), ("info", Info), ("debug", Debug), ("trace", Trace)];
    const FORMATS: &[(&str, LogFormat)] = &[("text", LogFormat::Text), ("json", LogFormat::Json)];
    let level = choice(raw.level, LEVELS, reader).unwrap_or(Info);
    let format = choice(raw.format, FORMATS, reader).unwrap_or(LogFormat::Text);
    Logging {
        level: choice_of_environment("LOG_LEVEL", LEVELS, reader).unwrap_or(level),
        format: choice_of_environment("LOG_FORMAT", FORMATS, reader).unwrap_or(format),
    }
}

/// One of a few words; `None` if there is none, or after a wrong one was reported.
pub fn choice<T: Copy>(field: Field<Text>, words: &[(&str, T)], reader: &mut Reader<'_>) -> Option<T> {
    let At { value: Text(text), place } = field.given()?;
    chosen(&text, words).map_err(|what| reader.report(&place, what)).ok()
}

fn choice_of_environment<T: Copy>(variable: &str, words: &[(&str, T)], reader: &mut Reader<'_>) -> Option<T> {
    let text = reader.variable(variable)?;
    let key = format!("{variable} (environment)");
    chosen(&text, words).map_err(|what| reader.report_without_line(&key, what)).ok()
}

fn chosen<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let text = text.trim();
    if let Some((_, chosen)) = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)) {
        return Ok(*chosen);
    }
    let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    let hint = nearest(text, all.iter().copied())
        .map(|word| format!(" (did you mean `{word}`?)"))
        .unwrap_or_default();
    Err(format!("must be one of {}{hint}", all.join(", ")))
}

fn limits(raw: raw::Limits, reader: &mut Reader<'_>) -> Limits {
    let max_body_bytes = whole(raw.max_body_bytes, 4 * 1024 * 1024, 1, 1 << 30, reader);
    // One that is served must not keep the next one out.
    let least = 2 * max_body_bytes;
    let max_buffered_bytes =
        whole(raw.max_buffered_bytes, least.max(512 * 1024 * 1024), least, u32::MAX, reader);
    Limits { max_body_bytes: max_body_bytes as usize, max_buffered_bytes: max_buffered_bytes as usize }
}

/// A whole number within limits.
pub fn whole(field: Field<Number>, default: u32, min: u32, max: u32, reader: &mut Reader<'_>) -> u32 {
    let Some(At { value, place }) = field.given() else { return default };
    let number = match value {
        Number::Whole(number) => Some(number),
        Number::Fraction(number) if number.fract() == 0.0 => Some(number as i128),
        Number::Fraction(_) => None,
    };
    match number.and_then(|number| u32::try_from(number).ok()).filter(|number| (min..=max).contains(number)) {
        Some(number) => number,
        None => {
            reader.report(&place, format!("must be a whole number from {min} to {max}"));
            default
        }
    }
}

fn seconds(field: Field<Number>, default: u64, reader: &mut Reader<'_>) -> Duration {
    seconds_from(SECONDS_MIN, field, default, reader)
}

fn seconds_or_zero(field: Field<Number>, default: u64, reader: &mut Reader<'_>) -> Duration {
    seconds_from(0.0, field, default, reader)
}

/// The clocks and waits of the program are no finer.
const SECONDS_MIN: f64 = 0.001;
/// A day: more is a mistake, such as milliseconds written for seconds.
const SECONDS_MAX: f64 = 86_400.0;

fn seconds_from(min: f64, field: Field<Number>, default: u64, reader: &mut Reader<'_>) -> Duration {
    let default = Duration::from_secs(default);
    let Some(At { value, place }) = field.given() else { return default };
    let seconds = match value {
        Number::Whole(seconds) => seconds as f64,
        Number::Fraction(seconds) => seconds,
    };
    if !(min..=SECONDS_MAX).contains(&seconds) {
        reader.report(&place, format!("must be seconds from {min} to {SECONDS_MAX}"));
        return default;
    }
    Duration::from_secs_f64(seconds)
}

fn path(field: Field<Text>, reader: &mut Reader<'_>) -> Option<PathBuf> {
    path_at(field.given()?, reader)
}

/// A path that is not empty.
pub fn path_at(at: At<Text>, reader: &mut Reader<'_>) -> Option<PathBuf> {
    let At { value: Text(text), place } = at;
    if text.trim().is_empty() || text.contains('\0') {
        return reader.fault(&place, "must be a path (write one, or remove the key)");
    }
    Some(PathBuf::from(text))
}

/// A list of names.
pub fn names(field: Field<Vec<At<Text>>>, reader: &mut Reader<'_>) -> Vec<String> {
    field.section().into_iter().filter_map(|at| name(at, reader)).collect()
}

/// A short text for people and machines: not empty, of one line.
pub fn name(at: At<Text>, reader: &mut Reader<'_>) -> Option<String> {
    let At { value: Text(text), place } = at;
    let text = text.trim();
    if text.is_empty() {
        return reader.fault(&place, "is empty (write a value, or remove the key)");
    }
    if text.chars().any(char::is_control) {
        return reader.fault(&place, "holds a line end or a control character (write it on one line)");
    }
    if text.chars().count() > NAME_CHARS_MAX {
        return reader.fault(&place, format!("is longer than {NAME_CHARS_MAX} characters"));
    }
    Some(text.to_owned())
}

const NAME_CHARS_MAX: usize = 200;
