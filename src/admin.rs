//! The answers that the proxy gives by itself: health, numbers, token counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::balancer::limits::{Kind, Level, PerKind, Quota};
use crate::balancer::{Balancer, EndpointView};
use crate::http::answer::Answer;
use crate::messages::counting;
use crate::messages::learned::Views;

/// 200 as long as the process answers at all.
pub fn live() -> Answer {
    Answer::json(200, r#"{"status":"healthy"}"#)
}

/// 200, or 503 with the reasons why requests should go elsewhere.
pub fn ready<T>(balancer: &Balancer<T>, is_draining: bool, now: Instant) -> Answer {
    let mut reasons = Vec::new();
    if is_draining {
        reasons.push("draining: the process is about to end".to_string());
    }
    if !balancer.is_usable(now) {
        reasons.extend(balancer.snapshot(now).iter().map(|view| format!("{}: {}", view.name, reason(view))));
    }
    if reasons.is_empty() {
        return Answer::json(200, r#"{"status":"ready"}"#);
    }
    let body = json!({ "status": "not_ready", "reasons": reasons });
    Answer::json(503, body.to_string()).with("retry-after", "1")
}

fn reason(view: &EndpointView) -> String {
    let whole = view.holds.iter().find(|(model, ..)| model.is_none());
    match (view.state, whole) {
        ("open", _) if view.opened_by == Some("failure_rate") => {
            "out because too many requests failed".into()
        }
        ("open", _) => format!("out after {} failures in a row", view.consecutive_failures),
        (_, Some((_, reason, _))) => (*reason).to_string(),
        _ if view.weight == 0 => "its weight is 0".into(),
        (state, None) => state.to_string(),
    }
}

/// What the process counts about itself.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ProcessNumbers {
    /// Seconds since the start.
    pub uptime_s: u64,
    /// Client connections now.
    pub connections: usize,
    /// Reloads since the start.
    pub reloads: u64,
    /// Faults of ours since the start; each cost one request at most.
    pub panics: u64,
    /// The process is about to end.
    pub draining: bool,
}

/// What was learned from requests and their answers.
#[derive(Debug, Default, Serialize)]
pub struct Learned {
    /// What is left out of requests.
    pub compat: Views,
    /// What each model makes of a text.
    pub token_counts: Vec<counting::View>,
}

/// /stats: the five fields that older tools read, and the finer truth.
pub fn stats<T>(balancer: &Balancer<T>, learned: Learned, process: ProcessNumbers, now: Instant) -> Answer {
    #[derive(Serialize)]
    struct Hold<'a> {
        model: Option<&'a str>,
        reason: &'a str,
        seconds_left: f64,
    }
    #[derive(Serialize)]
    struct Endpoint<'a> {
        name: &'a str,
        active_requests: usize,
        total_requests: u64,
        total_errors: u64,
        circuit_open: bool,
        state: &'a str,
        opened_by: Option<&'a str>,
        consecutive_failures: u32,
        trial_in_s: Option<f64>,
        weight: u32,
        share: f64,
        holds: Vec<Hold<'a>>,
        limits: serde_json::Value,
        tokens: Tokens,
    }
    #[derive(Serialize)]
    struct Tokens {
        input_tokens: u64,
        output_tokens: u64,
        cache_write_tokens: u64,
        cache_read_tokens: u64,
        cached_share: Option<f64>,
    }
    #[derive(Serialize)]
    struct Stats<'a> {
        endpoints: Vec<Endpoint<'a>>,
        waiting_for_room: usize,
        affinity: Affinity,
        #[serde(flatten)]
        learned: Learned,
        process: ProcessNumbers,
    }
    #[derive(Serialize)]
    struct Affinity {
        bindings: usize,
        hits: u64,
        detours: u64,
        moves: u64,
        moved_because: BTreeMap<&'static str, u64>,
        new: u64,
        hit_rate: Option<f64>,
    }
    let (bindings, counts) = balancer.affinity(now);
    let of_bound = counts.hits + counts.detours + counts.moves;
    let affinity = Affinity {
        bindings,
        hits: counts.hits,
        detours: counts.detours,
        moves: counts.moves,
        moved_because: counts.moved_because.each().collect(),
        new: counts.new,
        hit_rate: (of_bound > 0).then(|| counts.hits as f64 / of_bound as f64),
    };
    let views = balancer.snapshot(now);
    fn endpoint(view: &EndpointView) -> Endpoint<'_> {
        let holds = view.holds.iter().map(|(model, reason, left)| Hold {
            model: model.as_deref(),
            reason,
            seconds_left: seconds(*left),
        });
        Endpoint {
            name: &view.name,
            active_requests: view.active_requests,
            total_requests: view.total_requests,
            total_errors: view.total_errors,
            circuit_open: view.circuit_open,
            state: view.state,
            opened_by: view.opened_by,
            consecutive_failures: view.consecutive_failures,
            trial_in_s: view.opens_again_in.map(seconds),
            weight: view.weight,
            share: view.share as f64 / 1000.0,
            holds: holds.collect(),
            limits: limits(view),
            tokens: Tokens {
                input_tokens: view.tokens.input,
                output_tokens: view.tokens.output,
                cache_write_tokens: view.tokens.cache_write,
                cache_read_tokens: view.tokens.cache_read,
                cached_share: view.tokens.cached_share(),
            },
        }
    }
    let endpoints = views.iter().map(endpoint).collect();
    let stats = Stats { endpoints, waiting_for_room: balancer.waiting(), affinity, learned, process };
    Answer::json(200, serde_json::to_vec(&stats).unwrap_or_default())
}

/// What an endpoint is configured to take, and for each model with an account what counts now: of the configured limit,
/// or of what 429s have taught.
fn limits(view: &EndpointView) -> Value {
    let numbers = |quota: &Quota| -> Map<String, Value> {
        let given = |kind: Kind| Some((kind.key().to_owned(), (*quota.of(kind))?.into()));
        Kind::ALL.into_iter().filter_map(given).collect()
    };
    let own = |(glob, quota): &(String, Quota)| (glob.clone(), Value::Object(numbers(quota)));
    let mut configured = numbers(&view.limits.each);
    if !view.limits.models.is_empty() {
        configured.insert("models".into(), Value::Object(view.limits.models.iter().map(own).collect()));
    }
    let level = |level: &Level| json!({ "used": level.used, "limit": level.limit, "learned": level.ceiling });
    let model = |(model, levels): &(String, PerKind<Level>)| {
        let of_kinds = Kind::ALL.into_iter().map(|kind| (kind.key().to_owned(), level(levels.of(kind))));
        let name = ("model".to_owned(), Value::from(model.as_str()));
        Value::Object(std::iter::once(name).chain(of_kinds).collect())
    };
    json!({ "configured": configured, "now": view.levels.iter().map(model).collect::<Vec<_>>() })
}

/// /reset.
pub fn reset<T>(balancer: &Balancer<T>) -> Answer {
    balancer.reset();
    log::info!("reset: every breaker closed, every hold ended, error counts zeroed");
    Answer::json(200, r#"{"status":"reset"}"#)
}

/// /admin/reload, when the file was fine.
pub fn reloaded() -> Answer {
    Answer::json(200, r#"{"status":"reloaded"}"#)
}

/// The client's telemetry is not wanted, but must not be an error either.
pub fn event_logging() -> Answer {
    Answer::json(200, r#"{"status":"ok"}"#)
}

/// An empty 200.
pub fn warm_up() -> Answer {
    Answer { status: 200, headers: Vec::new(), body: Vec::new() }
}

/// /v1/messages/count_tokens, in Anthropic's shape.
pub fn count(tokens: u64) -> Answer {
    Answer::json(200, format!(r#"{{"input_tokens":{tokens}}}"#))
}

fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balancer::limits::{Limits, Need};
    use crate::balancer::strategy::Strategy;
    use crate::balancer::{Ask, Endpoint, Settings, breaker};
    use crate::outcome::{Meaning, Outcome};

    /// The window is a minute, so this is told in virtual time.
    #[test]
    fn what_429s_have_taught_is_shown_beside_what_is_configured() {
        let start = crate::env::now();
        let breaker = breaker::Settings { threshold: 5, timeout: Duration::from_secs(60), rate: None };
        let settings = Settings {
            strategy: Strategy::LeastRequests,
            session_affinity: true,
            breaker,
            waiting_max: 8,
            learns_limits: true,
        };
        let quota = Quota { requests: Some(7200), ..Quota::default() };
        let endpoint = Endpoint {
            name: "a".into(),
            address: "http://a".into(),
            weight: 1,
            max_concurrent: None,
            models: vec![],
            limits: Limits { each: quota, models: vec![("x*".into(), quota)] },
            payload: std::sync::Arc::new(()),
        };
        let balancer = Balancer::new(settings, vec![endpoint], fastrand::Rng::with_seed(1), start);
        let need = Need { max_tokens: Some(1000), ..Need::default() };
        let ask = Ask { model: "m", need, ..Ask::default() };
        drop(balancer.pick(ask, start).unwrap());
        let now = start + Duration::from_secs(60);
        let _running = balancer.pick(ask, now).unwrap();
        let limited = Outcome::Refused { status: 429, retry_after: None, meaning: Meaning::Other };
        let mut refused = balancer.pick(ask, now).unwrap();
        refused.limited_by(Some(Kind::Output));
        refused.finish(&limited, now);
        let process = ProcessNumbers { uptime_s: 0, connections: 0, reloads: 0, panics: 0, draining: false };
        let stats: Value =
            serde_json::from_slice(&stats(&balancer, Learned::default(), process, now).body).unwrap();
        let limits = &stats["endpoints"][0]["limits"];
        let configured =
            json!({ "requests_per_hour": 7200, "models": { "x*": { "requests_per_hour": 7200 } } });
        assert_eq!(limits["configured"], configured);
        let shown = &limits["now"][0];
        assert_eq!(shown["model"], "m");
        let output = json!({ "used": 2000, "limit": null, "learned": 1900 });
        assert_eq!(shown["output_tokens_per_minute"], output, "two of 1000, and a twentieth below");
        assert_eq!(shown["requests_per_hour"], json!({ "used": 2, "limit": 7200, "learned": null }));
        assert_eq!(stats["waiting_for_room"], 0);
    }
}
