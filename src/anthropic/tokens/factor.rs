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
pub const UNTAUGHT: f64 = 1.04;

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
