//! Accounts in virtual time: stories, then random traffic against an exact record.

use super::*;

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn input(limit: u64) -> Limits {
    Limits { each: Quota { input: Some(limit), ..Quota::default() }, models: vec![] }
}

fn output(limit: u64) -> Limits {
    Limits { each: Quota { output: Some(limit), ..Quota::default() }, models: vec![] }
}

/// A request of a conversation whose last one had one token for each byte.
fn exactly(tokens: u64) -> Need {
    Need { bytes: tokens * 100 / 105, max_tokens: Some(0), density: Some(1.0) }
}

fn reserving(tokens: u64) -> Need {
    Need { bytes: 0, max_tokens: Some(tokens), density: None }
}

fn is_full(room: Room) -> bool {
    matches!(room, Room::Full { .. })
}

/// The first 429 would teach nothing if the account began with it.
#[test]
fn an_account_is_kept_without_limits_as_well() {
    let (mut ledgers, limits, now) = (Ledgers::default(), Limits::default(), crate::env::now());
    ledgers.admit(&limits, "m", exactly(1000), now);
    assert_eq!(ledgers.room("m", exactly(1_000_000_000), now), Room::Free);
    assert!(!ledgers.is_limited("m", now));
    ledgers.limited(&limits, "m", Some(Kind::Input), now);
    assert_eq!(ledgers.level(&limits, "m", now).input.ceiling, Some(950));
    assert!(ledgers.is_limited("m", now) && !ledgers.is_limited("other", now));
}

#[test]
fn models_have_their_own_numbers_and_accounts() {
    let own = Quota { input: Some(50), ..Quota::default() };
    let none = Quota::default();
    let limits = Limits {
        each: Quota { input: Some(1000), requests: Some(2), ..none },
        models: vec![("databricks-claude-opus-*".into(), own), ("*".into(), none)],
    };
    assert_eq!(limits.of("databricks-claude-opus-4-6"), Quota { input: Some(50), requests: Some(2), ..none });
    assert_eq!(limits.of("databricks-claude-haiku-4-5"), limits.each);
    let (mut ledgers, now) = (Ledgers::default(), crate::env::now());
    ledgers.admit(&limits, "a", exactly(900), now);
    assert!(is_full(ledgers.room("a", exactly(200), now)));
    assert_eq!(ledgers.room("b", exactly(200), now), Room::Free);
    ledgers.admit(&limits, "b", exactly(1), now);
    ledgers.admit(&limits, "b", exactly(1), now);
    let Room::Full { until, kind } = ledgers.room("b", exactly(1), now) else { panic!("two an hour") };
    assert_eq!((kind, until), (Kind::Requests, now + seconds(3660.0)));
}

#[test]
fn what_is_reserved_and_not_used_comes_back() {
    let (mut ledgers, limits, now) = (Ledgers::default(), output(10_000), crate::env::now());
    let charge = ledgers.admit(&limits, "m", reserving(9_000), now).unwrap();
    assert!(is_full(ledgers.room("m", reserving(2_000), now)));
    ledgers.settle("m", charge, Spent::Ended { input: None, output: Some(300) }, now + seconds(5.0));
    assert_eq!(ledgers.room("m", reserving(9_000), now + seconds(5.0)), Room::Free);
    assert_eq!(ledgers.level(&limits, "m", now).output.used, 300);
    assert_eq!(ledgers.level(&limits, "m", now + seconds(61.0)).output.used, 0);
}

#[test]
fn nobody_knows_what_a_client_that_left_still_costs() {
    let (mut ledgers, limits, now) = (Ledgers::default(), output(10_000), crate::env::now());
    let charge = ledgers.admit(&limits, "m", reserving(9_000), now).unwrap();
    ledgers.settle("m", charge, spent(&Outcome::ClientGone, &Usage::default()), now);
    assert!(is_full(ledgers.room("m", reserving(2_000), now + seconds(59.0))));
    assert_eq!(ledgers.room("m", reserving(2_000), now + seconds(61.0)), Room::Free);
}

#[test]
fn a_refusal_is_taken_out_again() {
    let (mut ledgers, now) = (Ledgers::default(), crate::env::now());
    let each = Quota { input: Some(1000), output: Some(1000), requests: Some(1) };
    let limits = Limits { each, models: vec![] };
    let need = Need { max_tokens: Some(900), ..exactly(900) };
    let charge = ledgers.admit(&limits, "m", need, now).unwrap();
    assert!(is_full(ledgers.room("m", need, now)));
    let limited = Outcome::ErrorEvent { status: 429 };
    ledgers.settle("m", charge, spent(&limited, &Usage::default()), now);
    assert_eq!(ledgers.room("m", need, now), Room::Free);
}

/// It would wait for ever, and whether the workspace takes it is the workspace's to say.
#[test]
fn a_request_above_the_limit_goes_when_half_is_free() {
    let (mut ledgers, limits, now) = (Ledgers::default(), input(1000), crate::env::now());
    assert_eq!(ledgers.room("m", exactly(5000), now), Room::Free);
    ledgers.admit(&limits, "m", exactly(500), now);
    assert_eq!(ledgers.room("m", exactly(5000), now), Room::Free);
    ledgers.admit(&limits, "m", exactly(100), now + seconds(1.0));
    assert!(is_full(ledgers.room("m", exactly(5000), now + seconds(1.0))));
    let later = now + seconds(61.0);
    assert_eq!(ledgers.room("m", exactly(5000), later), Room::Free);
    ledgers.admit(&limits, "m", exactly(5000), later);
    assert!(is_full(ledgers.room("m", exactly(1), later + seconds(59.0))), "it counts whole");
}

#[test]
fn answers_teach_how_large_a_request_is() {
    let (mut ledgers, limits, now) = (Ledgers::default(), input(1_000_000), crate::env::now());
    let need = Need { bytes: 100_000, max_tokens: None, density: None };
    let first = ledgers.admit(&limits, "m", need, now).unwrap();
    assert_eq!(ledgers.level(&limits, "m", now).input.used, 33_600, "before any answer");
    let usage = Usage {
        input_tokens: Some(1_000),
        cache_creation_input_tokens: Some(4_000),
        cache_read_input_tokens: Some(5_000),
        ..Usage::default()
    };
    assert_eq!(density(&first, &usage), Some(0.1), "cached input counts as well");
    ledgers.settle("m", first, spent(&Outcome::Completed, &usage), now);
    assert_eq!(ledgers.level(&limits, "m", now).input.used, 10_000, "the truth");
    for _ in 0..100 {
        let charge = ledgers.admit(&limits, "m", need, now).unwrap();
        ledgers.settle("m", charge, spent(&Outcome::Completed, &usage), now);
    }
    let before = ledgers.level(&limits, "m", now).input.used;
    ledgers.admit(&limits, "m", need, now);
    let guess = ledgers.level(&limits, "m", now).input.used - before;
    assert!((11_900..12_300).contains(&guess), "a fifth more than usual: {guess}");
}

#[test]
fn refusals_teach_a_ceiling_that_steers_rises_and_is_forgotten() {
    let (mut ledgers, limits, start) = (Ledgers::default(), Limits::default(), crate::env::now());
    for second in 0..70 {
        ledgers.admit(&limits, "m", exactly(105), start + seconds(f64::from(second)));
    }
    let ceiling = |ledgers: &Ledgers, now| ledgers.level(&limits, "m", now).input.ceiling;
    let now = start + seconds(70.0);
    ledgers.limited(&limits, "m", Some(Kind::Output), now);
    assert_eq!(ceiling(&ledgers, now), None, "that was about output");
    assert_eq!(ledgers.room("m", exactly(2000), now), Room::Free);
    ledgers.limited(&limits, "m", None, now);
    let learned = ceiling(&ledgers, now).expect("a ceiling");
    assert!((5900..6100).contains(&learned), "{learned}: 61 requests of 105, and a twentieth below");
    assert_eq!(
        ledgers.room("m", exactly(2000), now),
        Room::Above { until: None, kind: Kind::Input },
        "nobody knows of what"
    );
    assert_eq!(ledgers.room("m", exactly(2000), now + seconds(60.0)), Room::Free);
    ledgers.limited(&limits, "m", Some(Kind::Input), now);
    let Room::Above { until: Some(until), .. } = ledgers.room("m", exactly(2000), now) else {
        panic!("it is named")
    };
    assert_eq!(ledgers.room("m", exactly(2000), until), Room::Free, "when it was promised");
    let risen = ceiling(&ledgers, now + seconds(300.0)).expect("a ceiling");
    assert!(risen.abs_diff(learned + learned / 20) <= 1, "{risen}: a hundredth each minute");
    assert_eq!(ceiling(&ledgers, now + seconds(600.0)), None);
    let forgotten = now + seconds(3700.0);
    assert_eq!(ledgers.levels(forgotten), [], "and so is the account");
    ledgers.admit(&limits, "other", exactly(1), forgotten);
    assert_eq!(ledgers.find("m").map(Ledger::used_at), None);
}

/// Somebody else had used most of the quota: what looked like a limit of 1,900 is none.
#[test]
fn an_answer_from_above_a_ceiling_corrects_it() {
    let limits = Limits::default();
    let stands_after = |tokens: u64, spent: Spent| {
        let (mut ledgers, now) = (Ledgers::default(), crate::env::now());
        ledgers.admit(&limits, "m", exactly(2000), now);
        ledgers.limited(&limits, "m", Some(Kind::Input), now);
        let charge = ledgers.admit(&limits, "m", exactly(tokens), now).unwrap();
        ledgers.settle("m", charge, spent, now);
        ledgers.level(&limits, "m", now).input.ceiling
    };
    let answered = Spent::Ended { input: None, output: Some(1) };
    assert_eq!(stands_after(50, answered), Some(2050), "a little more is let in than was thought");
    assert_eq!(stands_after(1000, answered), None, "there is no such limit");
    for unclear in
        [Spent::Nothing, Spent::Unknown { input: None }, Spent::Ended { input: None, output: Some(0) }]
    {
        assert_eq!(stands_after(1000, unclear), Some(1900), "{unclear:?} proves nothing");
    }
}

/// It was let in before the refusal, so the refusal is the newer truth.
#[test]
fn an_answer_from_before_the_refusal_proves_nothing() {
    let (mut ledgers, limits, start) = (Ledgers::default(), Limits::default(), crate::env::now());
    let charge = ledgers.admit(&limits, "m", exactly(1000), start).unwrap();
    let now = start + seconds(2.0);
    ledgers.limited(&limits, "m", Some(Kind::Input), now);
    let answered = Spent::Ended { input: Some(2000), output: Some(1) };
    ledgers.settle("m", charge, answered, now);
    assert_eq!(ledgers.level(&limits, "m", now).input.ceiling, Some(950));
}

#[test]
fn a_reset_forgets_what_was_learned_and_a_reload_keeps_what_is_counted() {
    let (mut ledgers, none, now) = (Ledgers::default(), Limits::default(), crate::env::now());
    ledgers.admit(&none, "m", exactly(1000), now);
    ledgers.limited(&none, "m", None, now);
    assert_eq!(ledgers.room("m", exactly(1000), now), Room::Above { until: None, kind: Kind::Input });
    ledgers.configure(&input(1500));
    assert!(is_full(ledgers.room("m", exactly(1000), now)), "what was counted before counts");
    ledgers.configure(&none);
    ledgers.forget_learned();
    assert_eq!(ledgers.room("m", exactly(1000), now), Room::Free);
}

#[test]
fn the_words_of_a_refusal_name_its_limit() {
    let limited =
        Outcome::Refused { status: 429, retry_after: None, meaning: crate::outcome::Meaning::Other };
    for (words, kind) in [
        ("Exceeded workspace input tokens per minute rate limit for databricks-claude-x", Some(Kind::Input)),
        (r#"{"limit_type":"output_tokens_per_minute"}"#, Some(Kind::Output)),
        ("Rate limit exceeded: ITPM limit of 200,000 tokens reached", Some(Kind::Input)),
        ("Exceeded the rate limit of 7200 queries per hour", Some(Kind::Requests)),
        ("input tokens per minute or output tokens per minute", None),
        ("slow down", None),
    ] {
        assert_eq!(Kind::named_by(&limited, words.as_bytes()), kind, "{words}");
        assert_eq!(Kind::named_by(&Outcome::Completed, words.as_bytes()), None);
    }
}

#[test]
fn memory_is_bounded() {
    let (mut ledgers, limits, now) = (Ledgers::default(), input(1000), crate::env::now());
    for model in 0..1000 {
        let at = now + seconds(f64::from(model));
        ledgers.admit(&limits, "kept", exactly(1), at);
        ledgers.admit(&limits, &format!("m{model}"), exactly(1), at);
        assert!(ledgers.list.len() <= MODELS_MAX);
    }
    assert!(ledgers.find("kept").is_some(), "the one used least lately makes room");
    let mine = Limits { each: Quota::default(), models: vec![("mine".into(), input(1000).each)] };
    ledgers.admit(&mine, "mine", exactly(1), now + seconds(2000.0));
    for model in 0..1000 {
        ledgers.admit(&mine, &format!("n{model}"), exactly(1), now + seconds(2001.0));
    }
    assert!(ledgers.find("mine").is_some(), "and never one with a limit for the sake of one without");
}

/// What is counted against one limit, exactly: when, how much, and as what it was settled.
#[derive(Default)]
struct Exact(Vec<(Instant, u64)>);

impl Exact {
    /// The most in any 60 seconds that begin with an entry.
    fn most(&self) -> u64 {
        let from = |begin: Instant| move |(at, _): &&(Instant, u64)| *at >= begin && *at < begin + MINUTE;
        self.0
            .iter()
            .map(|(begin, _)| self.0.iter().filter(from(*begin)).map(|(_, tokens)| tokens).sum())
            .max()
            .unwrap_or(0)
    }
}

/// Whatever comes and however it ends: within any 60 seconds no more is let in than the limit allows, and in the end
/// the account is empty.
#[test]
fn no_minute_ever_holds_more_than_the_limit() {
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let limit = rng.u64(1_000..50_000);
        let limits = Limits {
            each: Quota { input: Some(limit), output: Some(limit), requests: Some(10_000) },
            models: vec![],
        };
        let (mut ledgers, mut now) = (Ledgers::default(), crate::env::now());
        let (mut input, mut output) = (Exact::default(), Exact::default());
        let mut running: Vec<(Charge, usize)> = Vec::new();
        for _ in 0..600 {
            now += seconds(rng.f64() * rng.f64() * 4.0);
            if rng.bool() && !running.is_empty() {
                let (charge, at) = running.swap_remove(rng.usize(..running.len()));
                let (taken_in, taken_out) = (rng.u64(..=input.0[at].1), rng.u64(..=output.0[at].1));
                let spent = match rng.u8(..4) {
                    0 => Spent::Nothing,
                    1 => Spent::Unknown { input: Some(taken_in) },
                    _ => Spent::Ended { input: Some(taken_in), output: Some(taken_out) },
                };
                match spent {
                    Spent::Nothing => (input.0[at].1, output.0[at].1) = (0, 0),
                    Spent::Unknown { .. } => input.0[at].1 = taken_in,
                    Spent::Ended { .. } => (input.0[at].1, output.0[at].1) = (taken_in, taken_out),
                }
                ledgers.settle("m", charge, spent, now);
            }
            let need = Need { max_tokens: Some(rng.u64(..limit / 2)), ..exactly(rng.u64(..limit / 2)) };
            match ledgers.room("m", need, now) {
                Room::Full { until, .. } => {
                    assert!(until > now && until <= now + seconds(61.0), "{:?}", until - now);
                    assert!(!is_full(ledgers.room("m", need, until)), "there is room when it was promised");
                }
                room => {
                    assert_eq!(room, Room::Free);
                    let charge = ledgers.admit(&limits, "m", need, now).unwrap();
                    running.push((charge, input.0.len()));
                    input.0.push((now, charge.input));
                    output.0.push((now, charge.output));
                }
            }
            let levels = ledgers.level(&limits, "m", now);
            assert!(levels.input.used <= limit && levels.output.used <= limit);
        }
        assert!(input.most() <= limit && output.most() <= limit, "seed {seed}");
        let later = now + seconds(61.0);
        let levels = ledgers.level(&limits, "m", later);
        assert_eq!((levels.input.used, levels.output.used), (0, 0), "seed {seed}");
    }
}
