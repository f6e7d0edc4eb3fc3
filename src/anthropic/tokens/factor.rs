//! What the models really count, learned from what they report.
//!
//! Each model has its own vocabulary, and today's make up to a third more tokens of a text than the one that the prices
//! were fitted to. An answer reports how many tokens its request had; the ratio of that to our estimate is one
//! observation. The factor of a model is a high quantile of its last observations: a count that is too low makes the
//! client overrun its context, one that is a little high costs nothing. A quantile of what was really seen lies as far
//! above the middle as the texts make necessary, and no single observation moves it far.
//!
//! Pure: who observes when, and what is kept, is decided by `messages::counting`.

use super::Estimate;

/// The factor before any data: errs high by a little.
pub const UNTAUGHT: f64 = 1.02;

/// Observations that count: the last ones.
const WINDOW: usize = 64;

/// The least that is looked at: what is missing is filled up with the start, for one odd request must not decide.
const FEW: usize = 5;

/// The share of the observations that the factor is to cover.
const COVERED: f64 = 0.92;

/// How far above their middle the factor may lie: odd requests pull it no further.
const ABOVE_MIDDLE_MAX: f64 = 1.08;

/// Ratios beyond these come from something else than the model's vocabulary: a search within the turn, an endpoint that
/// reports only a part.
const RATIO_MIN: f64 = 0.6;
const RATIO_MAX: f64 = 2.0;

/// Smaller requests tell more about what surrounds the text than about the text.
const TEXT_MIN: u64 = 400;

/// Of a request, at most one part in this many may be no text.
const APART_SHARE: u64 = 5;

/// The factor of one model.
#[derive(Debug, Clone, Default)]
pub struct Factor {
    ratios: Vec<f64>,
    observed: u64,
}

impl Factor {
    /// A request that was estimated so had `reported` tokens, cached ones included. False when that tells nothing.
    pub fn observe(&mut self, estimate: Estimate, reported: u64) -> bool {
        let Estimate { text, apart } = estimate;
        if text < TEXT_MIN || apart > (text + apart) / APART_SHARE {
            return false;
        }
        let ratio = reported.saturating_sub(apart) as f64 / text as f64;
        if !(RATIO_MIN..=RATIO_MAX).contains(&ratio) {
            return false;
        }
        match self.ratios.len() < WINDOW {
            true => self.ratios.push(ratio),
            false => self.ratios[self.observed as usize % WINDOW] = ratio,
        }
        self.observed += 1;
        true
    }

    /// What an estimate of text is to be multiplied by.
    pub fn value(&self) -> f64 {
        let mut sorted = self.ratios.clone();
        sorted.resize(sorted.len().max(FEW), UNTAUGHT);
        sorted.sort_unstable_by(f64::total_cmp);
        match self.ratios.is_empty() {
            true => UNTAUGHT,
            false => quantile(&sorted, COVERED).min(quantile(&sorted, 0.5) * ABOVE_MIDDLE_MAX),
        }
    }

    /// Observations so far, those included that have left the window.
    pub fn observations(&self) -> u64 {
        self.observed
    }
}

/// Between the two values beside the place.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len() - 1;
    let place = last as f64 * share;
    let (low, part) = (place as usize, place.fract());
    sorted[low] * (1.0 - part) + sorted[(low + 1).min(last)] * part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anthropic::samples::seed;

    fn text(tokens: u64) -> Estimate {
        Estimate { text: tokens, apart: 0 }
    }

    fn of(ratios: &[f64]) -> Factor {
        let mut factor = Factor::default();
        for ratio in ratios {
            factor.observe(text(1_000_000), (ratio * 1e6).round() as u64);
        }
        factor
    }

    #[track_caller]
    fn is_about(value: f64, expected: f64) {
        assert!((value - expected).abs() < 0.001, "{value} is not {expected}");
    }

    #[test]
    fn it_goes_from_the_start_to_what_is_seen() {
        is_about(of(&[]).value(), UNTAUGHT);
        let mut last = UNTAUGHT;
        for observations in 1..=FEW {
            let value = of(&vec![1.3; observations]).value();
            assert!((last..=1.3001).contains(&value), "{value} after {observations}");
            last = value;
        }
        is_about(last, 1.3);
        is_about(of(&[0.85; FEW]).value(), 0.85);
    }

    #[test]
    fn it_covers_nearly_all_that_was_seen() {
        let ratios: Vec<f64> = (0..=50).map(|step| 1.0 + f64::from(step) / 1000.0).collect();
        is_about(of(&ratios).value(), 1.046);
    }

    #[test]
    fn what_says_nothing_about_text_is_passed_over() {
        let mut factor = Factor::default();
        let table = [
            (text(TEXT_MIN - 1), TEXT_MIN),
            (text(1_000), 0),
            (text(1_000), 599),
            (text(1_000), 2_001),
            (text(1_000), u64::MAX),
            (text(0), 1_000),
            (Estimate { text: 1_000, apart: 300 }, 1_300),
            (Estimate { text: 1_000, apart: u64::MAX / 2 }, 1_300),
            (Estimate { text: 1_000, apart: 200 }, 100),
        ];
        for (estimate, reported) in table {
            assert!(!factor.observe(estimate, reported), "{estimate:?} {reported}");
        }
        assert_eq!((factor.value(), factor.observations()), (UNTAUGHT, 0));
    }

    #[test]
    fn pictures_do_not_move_the_factor_of_text() {
        let mut factor = Factor::default();
        for _ in 0..FEW {
            assert!(factor.observe(Estimate { text: 10_000, apart: 2_400 }, 13_000 + 2_400));
        }
        is_about(factor.value(), 1.3);
        assert_eq!(Estimate { text: 1_000, apart: 500 }.tokens(factor.value()), 1_800);
    }

    #[test]
    fn only_the_last_ones_count() {
        let mut ratios = vec![1.1; WINDOW];
        ratios.extend([1.4; WINDOW]);
        let factor = of(&ratios);
        is_about(factor.value(), 1.4);
        assert_eq!((factor.observations(), factor.ratios.len()), (2 * WINDOW as u64, WINDOW));
    }

    #[test]
    fn any_order_gives_the_same() {
        let seed = seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let mut ratios: Vec<f64> = (0..rng.usize(..=WINDOW)).map(|_| 0.5 + rng.f64() * 2.0).collect();
            let one = of(&ratios).value();
            rng.shuffle(&mut ratios);
            assert_eq!(of(&ratios).value(), one, "seed {seed}");
            assert!((RATIO_MIN..=RATIO_MAX).contains(&one), "seed {seed}: {one}");
        }
    }

    #[test]
    fn odd_requests_do_not_decide() {
        let seed = seed();
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..500 {
            let middle = 1.0 + rng.f64() * 0.3;
            let mut ratios: Vec<f64> = (0..rng.usize(5..50)).map(|_| middle + rng.f64() * 0.01).collect();
            let odd = rng.usize(..=ratios.len() * 2 / 5);
            // Ten times off is passed over; what may pass is met by the bound above the middle.
            ratios.extend((0..odd).map(|_| *rng.choice(&[10.0, 0.1, RATIO_MAX, RATIO_MIN]).unwrap_or(&10.0)));
            rng.shuffle(&mut ratios);
            let value = of(&ratios).value();
            let bounds = middle - 0.001..=(middle + 0.011) * ABOVE_MIDDLE_MAX;
            assert!(bounds.contains(&value), "seed {seed}: {value} with {odd} odd ones: {ratios:?}");
        }
        is_about(of(&[10.0, 10.0, 0.1, 1.1, 1.1, 1.1, 1.1, 1.1]).value(), 1.1);
    }
}
