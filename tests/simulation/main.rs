//! Is session affinity worth it? Four ways of choosing under one workload, with the real balancer in virtual time.
//!
//! `cargo test --test simulation -- --nocapture` prints the table of `docs/ROUTING.md`, which holds the assumptions, too.
//! Nothing here measures the machine: a run is the same everywhere, so the figures are asserted.

mod policy;
mod workload;
mod workspace;
mod world;

use claude_lb::balancer::limits::Quota;
use policy::Kind;
use world::{Tally, p95};

const SEEDS: std::ops::RangeInclusive<u64> = 1..=5;
/// Input tokens per minute that a workspace lets in, for the runs that count 429s.
const QUOTA: u64 = 3_800_000;
/// The same where it is tight, and output tokens likewise.
const TIGHT_INPUT: u64 = 2_000_000;
const TIGHT_OUTPUT: u64 = 300_000;
const NO_QUOTA: Quota = Quota { input: None, output: None, requests: None };

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
        let limited_per_run =
            sum(Quota { input: Some(QUOTA), ..NO_QUOTA }).limited as f64 / SEEDS.count() as f64;
        Self { kind, free: sum(NO_QUOTA), limited_per_run }
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
    let [first, second] =
        [(); 2].map(|()| figures(world::run(Kind::Ours, 1, Quota { input: Some(QUOTA), ..NO_QUOTA })));
    assert_eq!(first, second);
}

/// All seeds together under a quota that is too small at times.
fn tight(what: &str, quota: Quota) -> [Tally; 4] {
    let mut table =
        format!("| {what:28} | 429s per run | turned away | waited | p95 | answered | cached |\n");
    let sums = Kind::TIGHT.map(|kind| {
        let mut sum = Tally::default();
        SEEDS.for_each(|seed| sum.add(world::run(kind, seed, quota)));
        let per_run = |count: u64| count as f64 / SEEDS.count() as f64;
        table += &format!(
            "| {:28} | {:.1} | {:.1} | {:.1} | {:.1} s | {:.0} | {:.1} % |\n",
            kind.name(),
            per_run(sum.limited),
            per_run(sum.turned_away),
            per_run(sum.waited.len() as u64),
            p95(&sum.waited),
            per_run(sum.requests),
            100.0 * sum.cached_share(),
        );
        sum
    });
    println!("{table}");
    sums
}

/// Input per minute that the workspaces together take on average, and not when sub-agents come in numbers.
#[test]
fn a_tight_quota_of_input_brings_few_429s() {
    let quota = Quota { input: Some(TIGHT_INPUT), ..NO_QUOTA };
    let [least_requests, _, learned, limited] = tight("input tokens", quota);
    assert!(least_requests.limited > 500, "the quota is tight: {}", least_requests.limited);
    at_most_a_tenth([learned, limited], &least_requests);
}

/// What `max_tokens` reserves is given back when an answer ends; until then it is spent.
#[test]
fn a_tight_quota_of_output_brings_few_429s() {
    let quota = Quota { output: Some(TIGHT_OUTPUT), ..NO_QUOTA };
    let [least_requests, _, learned, limited] = tight("output tokens", quota);
    assert!(least_requests.limited > 500, "the quota is tight: {}", least_requests.limited);
    // Rests that doubled while requests were let in between them left 2,355 of 7,200.
    assert!(least_requests.requests / SEEDS.count() as u64 > 6_500, "{}", least_requests.requests);
    at_most_a_tenth([learned, limited], &least_requests);
}

/// Of 429s from workspaces, and of those that clients see.
fn at_most_a_tenth(ours: [Tally; 2], least_requests: &Tally) {
    for tally in ours {
        assert!(10 * tally.limited <= least_requests.limited, "{}", tally.limited);
        assert!(10 * tally.turned_away <= least_requests.turned_away, "{}", tally.turned_away);
        // Few refusals would be worth little if it were because few are let in.
        assert!(20 * tally.requests >= 19 * least_requests.requests, "{}", tally.requests);
    }
}
