//! Is session affinity worth it? Four ways of choosing under one workload, with the real balancer in virtual time.
//!
//! `cargo test --test simulation -- --nocapture` prints the table of `docs/ROUTING.md`, which holds the assumptions, too.
//! Nothing here measures the machine: a run is the same everywhere, so the figures are asserted.

mod policy;
mod workload;
mod workspace;
mod world;

use policy::Kind;
use world::{Tally, p95};

const SEEDS: std::ops::RangeInclusive<u64> = 1..=5;
/// Input tokens per minute that a workspace lets in, for the runs that count 429s.
const QUOTA: u64 = 3_800_000;

/// All seeds together, without a quota and with it.
struct Row {
    kind: Kind,
    free: Tally,
    limited_per_run: f64,
}

impl Row {
    fn of(kind: Kind) -> Self {
        let sum = |quota| {
            let mut sum = Tally::default();
            SEEDS.for_each(|seed| sum.add(world::run(kind, seed, quota)));
            sum
        };
        let limited_per_run = sum(Some(QUOTA)).limited as f64 / SEEDS.count() as f64;
        Self { kind, free: sum(None), limited_per_run }
    }

    fn print(&self) {
        println!(
            "| {:16} | {:12.1} % | {:13.3} | {:13.2} | {:12.2} | {:12.1} |",
            self.kind.name(),
            100.0 * self.free.cached_share(),
            self.free.relative_cost(),
            p95(&self.free.imbalance),
            p95(&self.free.imbalance_by_clock),
            self.limited_per_run,
        );
    }
}

#[test]
fn affinity_is_worth_it() {
    let rows = Kind::ALL.map(Row::of);
    println!(
        "|                  | cached share   | relative cost | max/mean, p95 | each second  | 429s per run |"
    );
    println!(
        "|------------------|---------------:|--------------:|--------------:|-------------:|-------------:|"
    );
    rows.iter().for_each(Row::print);
    let [_, least_requests, sticky, ours] = rows;

    // The model: what it says of the known policies is what was expected of them.
    let share = least_requests.free.cached_share();
    assert!((0.81..0.845).contains(&share), "least requests: {share}");
    let uneven = p95(&sticky.free.imbalance);
    assert!((2.8..3.4).contains(&uneven), "plain stickiness: {uneven}");
    assert!(sticky.limited_per_run > 15.0, "plain stickiness: {}", sticky.limited_per_run);

    // The targets.
    assert!(ours.free.cached_share() >= 0.94, "{}", ours.free.cached_share());
    assert!(ours.free.relative_cost() <= 0.17, "{}", ours.free.relative_cost());
    assert!(p95(&ours.free.imbalance) <= 1.75, "{}", p95(&ours.free.imbalance));
    assert!(ours.limited_per_run <= least_requests.limited_per_run, "{}", ours.limited_per_run);
}

#[test]
fn a_run_is_the_same_each_time() {
    let figures = |tally: Tally| (tally.requests, tally.input, tally.cached, tally.imbalance);
    let [first, second] = [(); 2].map(|()| figures(world::run(Kind::Ours, 1, Some(QUOTA))));
    assert_eq!(first, second);
}
