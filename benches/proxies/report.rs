//! What came out: medians, ratios to HAProxy, a table for people and a JSON file for machines.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::proxy::Kind;
use crate::scenario::{SCENARIOS, Sample};

/// The proxy that the ratios refer to.
const REFERENCE: Kind = Kind::Haproxy;

/// All samples of a run, by scenario, metric and proxy; each with one value for each round.
#[derive(Default)]
pub struct Report {
    samples: BTreeMap<(&'static str, &'static str, Kind), Vec<f64>>,
}

impl Report {
    pub fn add(&mut self, scenario: &'static str, kind: Kind, samples: &[Sample]) {
        for &(metric, value) in samples {
            self.samples.entry((scenario, metric, kind)).or_default().push(value);
        }
    }

    fn median(&self, scenario: &'static str, metric: &'static str, kind: Kind) -> Option<f64> {
        let mut values: Vec<f64> =
            self.samples.get(&(scenario, metric, kind))?.iter().copied().filter(|v| v.is_finite()).collect();
        values.sort_unstable_by(f64::total_cmp);
        match (values.len(), values.get(values.len() / 2)) {
            (length, Some(upper)) if length % 2 == 0 => Some((values[length / 2 - 1] + upper) / 2.0),
            (_, upper) => upper.copied(),
        }
    }

    /// Rows of a scenario, in the order of the metrics' names.
    fn metrics(&self, scenario: &str) -> Vec<&'static str> {
        let mut metrics: Vec<_> =
            self.samples.keys().filter(|key| key.0 == scenario).map(|key| key.1).collect();
        metrics.dedup();
        metrics
    }

    /// A table in Markdown; claude-lb's ratio to HAProxy stands last.
    pub fn table(&self, kinds: &[Kind]) -> String {
        let mut table = String::from("| scenario | figure |");
        for kind in kinds {
            table.push_str(&format!(" {} |", kind.name()));
        }
        table.push_str(" claude-lb / HAProxy |\n|---|---|");
        table.push_str(&"--:|".repeat(kinds.len() + 1));
        table.push('\n');
        for scenario in SCENARIOS {
            for (row, metric) in self.metrics(scenario.name).into_iter().enumerate() {
                let name = if row == 0 { scenario.name } else { "" };
                table.push_str(&format!("| {name} | {metric} |"));
                let of = |kind| self.median(scenario.name, metric, kind);
                for kind in kinds {
                    table.push_str(&format!(" {} |", of(*kind).map_or("–".into(), figure)));
                }
                let ratio = match (of(Kind::ClaudeLb), of(REFERENCE)) {
                    (Some(ours), Some(theirs)) if theirs > 0.0 => format!("{:.2}", ours / theirs),
                    _ => "–".into(),
                };
                table.push_str(&format!(" {ratio} |\n"));
            }
        }
        table
    }

    /// Time to the first byte with the time taken away that it takes without a proxy.
    pub fn added_first_byte(&mut self, kinds: &[Kind]) {
        let direct = self.samples.get(&("first-byte", "first_byte_p50_us", Kind::Direct)).cloned();
        let Some(direct) = direct else { return };
        for &kind in kinds.iter().filter(|kind| **kind != Kind::Direct) {
            let Some(values) = self.samples.get(&("first-byte", "first_byte_p50_us", kind)) else { continue };
            let added = values.iter().zip(&direct).map(|(whole, direct)| whole - direct).collect();
            self.samples.insert(("first-byte", "added_p50_us", kind), added);
        }
    }

    pub fn save(&self, path: &Path, facts: &Value) -> std::io::Result<()> {
        let mut results = json!({});
        for (&(scenario, metric, kind), rounds) in &self.samples {
            results[scenario][metric][kind.name()] =
                json!({ "median": self.median(scenario, metric, kind), "rounds": rounds });
        }
        let whole = json!({ "facts": facts, "results": results });
        fs::write(path, serde_json::to_string_pretty(&whole)? + "\n")
    }
}

/// Three digits that mean something.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 || value == 0.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
