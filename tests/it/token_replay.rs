//! The token counts against a real tokenizer.
use claude_lb::anthropic::tokens::estimate;
use serde_json::{Value, json};
use std::collections::BTreeMap;

struct Pair {
    kind: String,
    #[allow(unused)]
    conversation: usize,
    body: Vec<u8>,
    tokens: u64,
}

fn replay() -> Vec<Pair> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokens/replay.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let shared = lines.next().unwrap();
    let mut pairs = Vec::new();
    for (conversation, line) in lines.enumerate() {
        for count in line["counts"].as_array().unwrap() {
            let (length, tokens) = (count[0].as_u64().unwrap() as usize, count[1].as_u64().unwrap());
            let mut body = json!({"model": "m", "max_tokens": 1, "messages": &line["messages"].as_array().unwrap()[..length]});
            if line["system"] == true {
                body["system"] = json!([{"type":"text","text":shared["system"]}]);
            }
            let tools: Vec<&Value> = line["tools"]
                .as_array()
                .unwrap()
                .iter()
                .map(|at| &shared["tools"][at.as_u64().unwrap() as usize])
                .collect();
            if !tools.is_empty() {
                body["tools"] = json!(tools);
            }
            pairs.push(Pair {
                kind: line["kind"].as_str().unwrap().into(),
                conversation,
                body: body.to_string().into_bytes(),
                tokens,
            });
        }
    }
    pairs
}

#[test]
fn by_kind() {
    let mut kinds: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for pair in replay() {
        let e = estimate(&pair.body).unwrap();
        kinds.entry(pair.kind).or_default().push(e.tokens(1.0) as f64 / pair.tokens as f64 - 1.0);
    }
    for (kind, mut list) in kinds {
        list.sort_by(f64::total_cmp);
        println!(
            "{kind:24} {:3} min {:+.3} med {:+.3} max {:+.3}",
            list.len(),
            list[0],
            list[list.len() / 2],
            list[list.len() - 1]
        );
    }
}

#[test]
fn learned() {
    use claude_lb::anthropic::tokens::{Factor, UNTAUGHT};
    let pairs = replay();
    let est: Vec<_> = pairs.iter().map(|p| estimate(&p.body).unwrap()).collect();
    let convs = pairs.last().unwrap().conversation + 1;
    for scale in [1.0, 1.15, 1.35] {
        for mode in ["random", "stream"] {
            let mut errors = Vec::new();
            let mut by: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
            for seed in 0..200 {
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut order: Vec<usize> = (0..convs).collect();
                rng.shuffle(&mut order);
                let train: Vec<usize> = order[..convs / 2].to_vec();
                let real =
                    |at: usize| (((pairs[at].tokens - est[at].apart) as f64) * scale) as u64 + est[at].apart;
                let mut factor = Factor::default();
                let mut seen: Vec<usize> = train
                    .iter()
                    .flat_map(|c| {
                        (0..pairs.len()).filter(|at| pairs[*at].conversation == *c).collect::<Vec<_>>()
                    })
                    .collect();
                if mode == "random" {
                    rng.shuffle(&mut seen);
                }
                for at in seen {
                    if factor.observations() < 20 {
                        factor.observe(est[at], real(at));
                    }
                }
                for at in 0..pairs.len() {
                    if train.contains(&pairs[at].conversation) {
                        continue;
                    }
                    let e = est[at].tokens(factor.value()) as f64 / real(at) as f64 - 1.0;
                    if !pairs[at].kind.starts_with("bare") { errors.push(e); }
                    by.entry(&pairs[at].kind).or_default().push(e);
                }
            }
            let mut abs: Vec<f64> = errors.iter().map(|e| e.abs()).collect();
            abs.sort_by(f64::total_cmp);
            let under = errors.iter().filter(|e| **e < -0.03).count() as f64 / errors.len() as f64;
            println!(
                "scale {scale} {mode} median {:.4} p90 {:.4} p99 {:.4} under {:.4}",
                abs[abs.len() / 2],
                abs[abs.len() * 9 / 10],
                abs[abs.len() * 99 / 100],
                under
            );
            if scale == 1.0 {
                for (k, l) in by {
                    println!(
                        "   {k:24} {:.3} under {:.3}",
                        l.iter().sum::<f64>() / l.len() as f64,
                        l.iter().filter(|e| **e < -0.03).count() as f64 / l.len() as f64
                    );
                }
            }
        }
    }
    let _ = UNTAUGHT;
}
