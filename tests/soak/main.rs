//! The soak: the built program for a minute, or for as long as `SOAK_SECONDS` says, under random faults of three
//! scripted workspaces, clients that leave, read slowly or send nonsense, and a reload every few seconds. At the end
//! every request must be accounted for, and nothing may be left behind.
//!
//! A step of its own: `SOAK_SECONDS=60 cargo test --release --test soak -- --ignored --nocapture`. The seed is
//! printed; `SOAK_SEED` runs the same choices again.

// A soak runs for a given time, so it reads the clock and pauses.
#![allow(clippy::disallowed_methods)]

mod clients;
mod ledger;
mod process;
mod workspace;

#[allow(dead_code)] // shared with the behaviour tests, which use all of it
#[path = "../it/support/mod.rs"]
mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clients::Crew;
use ledger::{Ledger, Sums};
use process::{Process, Sample};
use workspace::Workspace;

/// Clients at work at the same time.
const CLIENTS: usize = 24;
/// Workers of the proxy; never the limit here.
const WORKERS: usize = 64;
/// The share of the run after which memory must not grow any more.
const WARM_UP: f64 = 0.25;
/// What memory may grow by after that: allocators keep some of what is given back.
const GROWTH_SHARE: f64 = 0.2;
const GROWTH_BYTES: u64 = 8 << 20;
/// How long the last requests and the elastic threads may take to end.
const WIND_DOWN: Duration = Duration::from_secs(40);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
#[ignore = "takes SOAK_SECONDS; a step of its own"]
fn nothing_is_lost_and_nothing_leaks() {
    let length = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(60));
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("soak: {length:?}, SOAK_SEED={seed}");
    let workspaces: Vec<Workspace> = (0..3).map(|place| Workspace::start(seed ^ place)).collect();
    let process = Process::start(&workspaces);
    let resting = process.sample();
    let (ledger, stop) = (Ledger::default(), AtomicBool::new(false));
    let samples = std::thread::scope(|scope| {
        for place in 0..CLIENTS {
            let crew = Crew { address: process.address, ledger: &ledger, stop: &stop };
            scope.spawn(move || crew.work(seed.wrapping_add(1_000 + place as u64)));
        }
        scope.spawn(|| clients::probe(process.address, &ledger, &stop));
        scope.spawn(|| process.reload_now_and_then(&stop, seed));
        let samples = watch(&process, length);
        stop.store(true, Ordering::SeqCst);
        samples
    });
    let last = settle(&process, resting);
    let sums = Sums::take(&ledger, &process, &workspaces);
    sums.print();
    report(&samples, resting, last, length);
    sums.check();
    check_memory(&samples);
    assert!(
        last.descriptors <= resting.descriptors,
        "descriptors are left: {last:?}, at the start {resting:?}"
    );
    assert!(last.threads <= process::threads_at_rest(WORKERS), "{} threads are left", last.threads);
    process.end();
}

/// One sample a second until the time is up.
fn watch(process: &Process, length: Duration) -> Vec<Sample> {
    let start = Instant::now();
    let mut samples = Vec::new();
    while start.elapsed() < length {
        std::thread::sleep(Duration::from_secs(1).min(length.saturating_sub(start.elapsed())));
        samples.push(process.sample());
    }
    samples
}

/// Waits until nothing is active and no connection is left; then a reload gives up the pooled connections.
fn settle(process: &Process, resting: Sample) -> Sample {
    let until = Instant::now() + WIND_DOWN;
    while !process.is_quiet() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(process.is_quiet(), "requests or connections are left: {}", process.stats());
    process.forget_pooled_connections();
    loop {
        let sample = process.sample();
        let is_at_rest =
            sample.descriptors <= resting.descriptors && sample.threads <= process::threads_at_rest(WORKERS);
        if is_at_rest || Instant::now() >= until {
            return sample;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn warm(samples: &[Sample]) -> (u64, u64) {
    let from = (samples.len() as f64 * WARM_UP) as usize;
    // The median of a stretch, not one moment: what is in flight differs from second to second.
    let median = |stretch: &[Sample]| {
        let mut sizes: Vec<u64> = stretch.iter().map(|sample| sample.resident_bytes).collect();
        sizes.sort_unstable();
        sizes.get(sizes.len() / 2).copied().unwrap_or_default()
    };
    let stretch = (samples.len() / 8).max(1);
    (median(&samples[from..(from + stretch).min(samples.len())]), median(&samples[samples.len() - stretch..]))
}

fn check_memory(samples: &[Sample]) {
    let (warm, last) = warm(samples);
    let most = (warm as f64 * (1.0 + GROWTH_SHARE)) as u64 + GROWTH_BYTES;
    assert!(last <= most, "memory grew from {warm} to {last} bytes");
}

fn report(samples: &[Sample], resting: Sample, last: Sample, length: Duration) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (warm, end) = warm(samples);
    let most = samples.iter().map(|sample| sample.resident_bytes).max().unwrap_or_default();
    println!(
        "resident: at start {:.1} MiB, warm {:.1}, at the end {:.1}, most {:.1}, after it {:.1}",
        mib(resting.resident_bytes),
        mib(warm),
        mib(end),
        mib(most),
        mib(last.resident_bytes)
    );
    let busiest = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or_default();
    println!(
        "threads: at start {}, most {}, after it {}; descriptors: at start {}, most {}, after it {}",
        resting.threads,
        busiest(|sample| sample.threads),
        last.threads,
        resting.descriptors,
        busiest(|sample| sample.descriptors),
        last.descriptors
    );
    let cpu = last.cpu.saturating_sub(resting.cpu).as_secs_f64();
    println!("processor time of the proxy: {cpu:.1} s of {:.0} s", length.as_secs_f64());
}
