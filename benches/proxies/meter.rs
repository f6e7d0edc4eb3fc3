//! What the kernel says of a process and its children: CPU time, context switches, memory.
//!
//! CPU time is utime + stime. Where the kernel counts by the nanosecond (`schedstat`) and no thread has ended between
//! two readings, that is taken instead: a tick of 10 ms is too coarse for a few hundred events.

use std::collections::BTreeMap;
use std::fs;

/// Linux counts in hundredths of a second for programs, whatever its own clock.
const TICK_US: f64 = 10_000.0;

/// One reading of a process and its children.
pub struct Reading {
    ticks: u64,
    /// Nanoseconds on a CPU, for each thread.
    threads: BTreeMap<u32, u64>,
    switches: u64,
}

/// What lies between two readings.
pub struct Spent {
    pub cpu_us: f64,
    pub switches: f64,
}

/// The process and all its descendants.
pub fn family(root: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if let Some(parent) = stat(id).and_then(|fields| fields.get(1)?.parse::<u32>().ok()) {
            parents.push((id, parent));
        }
    }
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&member) = family.get(next) {
        family.extend(parents.iter().filter(|(_, parent)| *parent == member).map(|(id, _)| *id));
        next += 1;
    }
    family
}

impl Reading {
    pub fn of(family: &[u32]) -> Self {
        let mut reading = Self { ticks: 0, threads: BTreeMap::new(), switches: 0 };
        for &id in family {
            let field = |fields: &[String], number: usize| -> u64 {
                fields.get(number).and_then(|field| field.parse().ok()).unwrap_or_default()
            };
            reading.ticks += stat(id).map_or(0, |fields| field(&fields, 11) + field(&fields, 12));
            for thread in fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
                let Some(number) = thread.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
                if let Some(on_cpu) = text.split(' ').next().and_then(|word| word.parse().ok()) {
                    reading.threads.insert(number, on_cpu);
                }
                let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
                reading.switches += counts.filter_map(last_number).sum::<u64>();
            }
        }
        reading
    }

    pub fn until(&self, later: &Self) -> Spent {
        let by_ticks = later.ticks.saturating_sub(self.ticks) as f64 * TICK_US;
        let is_exact =
            !later.threads.is_empty() && self.threads.keys().all(|thread| later.threads.contains_key(thread));
        let on_cpu = |reading: &Self| reading.threads.values().sum::<u64>();
        let exact = on_cpu(later).saturating_sub(on_cpu(self)) as f64 / 1e3;
        let cpu_us = if is_exact { exact } else { by_ticks };
        Spent { cpu_us, switches: later.switches.saturating_sub(self.switches) as f64 }
    }
}

/// Proportional set size in KiB: memory, with shared pages divided among those who share them.
pub fn pss_kib(family: &[u32]) -> f64 {
    let of = |id: &u32| {
        let text = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).unwrap_or_default();
        text.lines()
            .find(|line| line.starts_with("Pss:"))
            .and_then(|line| line.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok()))
    };
    family.iter().filter_map(of).sum()
}

/// The fields of a process behind its name, which may hold anything.
fn stat(id: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, behind) = text.rsplit_once(')')?;
    Some(behind.split_whitespace().map(str::to_owned).collect())
}

fn last_number(line: &str) -> Option<u64> {
    line.split_whitespace().next_back()?.parse().ok()
}
