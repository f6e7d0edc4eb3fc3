//! Token counts against a real tokenizer: before anything is learned, and after twenty answers.
//!
//! `tests/fixtures/tokens/replay.jsonl` holds conversations with the true count after each turn; `docs/TOKENS.md` says
//! how it was made, and has the tables that these tests print with `--nocapture`.

use std::collections::BTreeMap;

use claude_lb::anthropic::tokens::{Estimate, Factor, UNTAUGHT, estimate};
use serde_json::{Value, json};

/// Observations before the held-out conversations are counted.
const OBSERVATIONS: u64 = 20;
/// Ways to divide the conversations into those learned from and those held out.
const SPLITS: u64 = 200;
/// What a newer model makes of a text, beside the tokenizer of the replay.
const SCALES: [f64; 3] = [1.0, 1.15, 1.35];
/// Below the true count by more than this overruns a context.
const UNDER: f64 = -0.03;

struct Pair {
    kind: String,
    conversation: usize,
    estimate: Estimate,
    real: u64,
}

impl Pair {
    /// Kinds that no client sends like this are counted, but neither learned from nor held to the bounds.
    fn is_bare(&self) -> bool {
        self.kind.starts_with("bare")
    }

    /// The true count of a model whose tokenizer makes `scale` times as many tokens of a text.
    fn scaled(&self, scale: f64) -> u64 {
        let apart = self.estimate.apart;
        ((self.real - apart) as f64 * scale).round() as u64 + apart
    }

    fn error(&self, factor: f64, scale: f64) -> f64 {
        self.estimate.tokens(factor) as f64 / self.scaled(scale) as f64 - 1.0
    }
}

fn replay() -> Vec<Pair> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokens/replay.jsonl");
    let text = std::fs::read_to_string(path).expect("the replay is there");
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON in each line"));
    let shared = lines.next().expect("a first line");
    lines.enumerate().flat_map(|(number, line)| pairs(number, &line, &shared)).collect()
}

/// The requests of one conversation: each has one turn more.
fn pairs(conversation: usize, line: &Value, shared: &Value) -> Vec<Pair> {
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let number = |value: &Value| value.as_u64().expect("a number");
    let mut body = json!({ "model": "m", "max_tokens": 64 });
    if line["system"] == true {
        body["system"] = json!([{ "type": "text", "text": shared["system"] }]);
    }
    let tools: Vec<Value> =
        list(&line["tools"]).iter().map(|at| shared["tools"][number(at) as usize].clone()).collect();
    if !tools.is_empty() {
        body["tools"] = tools.into();
    }
    let messages = list(&line["messages"]);
    let pair = |count: &Value| {
        body["messages"] = messages[..number(&count[0]) as usize].into();
        Pair {
            kind: line["kind"].as_str().expect("a kind").to_owned(),
            conversation,
            estimate: estimate(body.to_string().as_bytes()).expect("a valid body"),
            real: number(&count[1]),
        }
    };
    list(&line["counts"]).iter().map(pair).collect()
}

/// How far counts are off.
struct Errors(Vec<f64>);

impl Errors {
    fn quantile_of_sizes(&self, share: f64) -> f64 {
        let mut sizes: Vec<f64> = self.0.iter().map(|error| error.abs()).collect();
        sizes.sort_by(f64::total_cmp);
        sizes[((sizes.len() - 1) as f64 * share) as usize]
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    fn share_under(&self) -> f64 {
        self.0.iter().filter(|error| **error < UNDER).count() as f64 / self.0.len() as f64
    }
}

fn by_kind<'a>(errors: impl Iterator<Item = (&'a str, f64)>) -> BTreeMap<&'a str, Errors> {
    let mut kinds = BTreeMap::new();
    for (kind, error) in errors {
        kinds.entry(kind).or_insert_with(|| Errors(Vec::new())).0.push(error);
    }
    kinds
}

#[test]
fn before_any_data_every_request_is_within_a_fifth() {
    let replay = replay();
    assert!(replay.len() > 300 && replay.iter().all(|pair| pair.real > 0), "{} pairs", replay.len());
    let kinds = by_kind(replay.iter().map(|pair| (pair.kind.as_str(), pair.error(UNTAUGHT, 1.0))));
    println!("| kind | requests | mean | lowest | highest |");
    for (kind, errors) in &kinds {
        let (mean, least, most) = (errors.mean() * 100.0, errors.least() * 100.0, errors.most() * 100.0);
        println!("| {kind} | {} | {mean:+.1} % | {least:+.1} % | {most:+.1} % |", errors.0.len());
        assert!(errors.least() > -0.2 && errors.most() < 0.2, "{kind}: {least} to {most}");
    }
    let sent = Errors(replay.iter().filter(|pair| !pair.is_bare()).map(|p| p.error(UNTAUGHT, 1.0)).collect());
    assert!((0.01..0.05).contains(&sent.mean()), "errs high by a little: {}", sent.mean());
}

/// The factor after twenty observations from half of the conversations, and the other half.
fn learned(replay: &[Pair], seed: u64, scale: f64, in_order: bool) -> (Factor, Vec<&Pair>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut conversations: Vec<usize> = (0..=replay.last().expect("pairs").conversation).collect();
    rng.shuffle(&mut conversations);
    let (train, _) = conversations.split_at(conversations.len() / 2);
    let of = |conversation: usize| replay.iter().filter(move |pair| pair.conversation == conversation);
    let mut seen: Vec<&Pair> = train.iter().copied().flat_map(of).filter(|pair| !pair.is_bare()).collect();
    if !in_order {
        rng.shuffle(&mut seen);
    }
    let mut factor = Factor::default();
    for pair in seen {
        if factor.observations() < OBSERVATIONS {
            factor.observe(pair.estimate, pair.scaled(scale));
        }
    }
    assert_eq!(factor.observations(), OBSERVATIONS, "seed {seed}");
    (factor, replay.iter().filter(|pair| !train.contains(&pair.conversation)).collect())
}

/// Whole conversations one after the other, as one client makes them, and requests of many in any order.
#[test]
fn twenty_observations_are_enough() {
    let replay = replay();
    println!("| tokens | observations | median | p90 | p99 | under by more than 3 % |");
    for (scale, in_order) in SCALES.into_iter().flat_map(|scale| [(scale, true), (scale, false)]) {
        let (mut sent, mut all) = (Errors(Vec::new()), Vec::new());
        for seed in 0..SPLITS {
            let (factor, held_out) = learned(&replay, seed, scale, in_order);
            for pair in held_out {
                let error = pair.error(factor.value(), scale);
                all.push((pair.kind.as_str(), error));
                if !pair.is_bare() {
                    sent.0.push(error);
                }
            }
        }
        let [median, p90, p99] = [0.5, 0.9, 0.99].map(|share| sent.quantile_of_sizes(share));
        let (under, how) = (sent.share_under(), if in_order { "in order" } else { "mixed" });
        let line = format!(
            "| x {scale} | {how} | {:.1} % | {:.1} % | {:.1} % | {:.2} % |",
            median * 100.0,
            p90 * 100.0,
            p99 * 100.0,
            under * 100.0
        );
        println!("{line}");
        assert!(median <= 0.03 && p90 <= 0.08 && under < 0.01, "{line}");
        let kinds = by_kind(all.into_iter()).into_iter().filter(|_| scale == 1.0 && in_order);
        for (kind, errors) in kinds {
            let (mean, least, most) = (errors.mean() * 100.0, errors.least() * 100.0, errors.most() * 100.0);
            println!(
                "| {kind} | {mean:+.1} % | {least:+.1} % | {most:+.1} % | {:.1} % |",
                errors.share_under() * 100.0
            );
        }
    }
}
