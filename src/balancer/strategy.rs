//! Which of the eligible endpoints is taken. Pure: eligibility is decided elsewhere, chance is passed in.

/// How to choose; `load_balancer.strategy` in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// The smallest load for its weight.
    LeastRequests,
    /// Each in turn, by weight.
    RoundRobin,
    /// By chance, by weight.
    Random,
}

/// One eligible endpoint, as the strategies see it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Its place in the balancer's list.
    pub index: usize,
    /// Requests it is serving.
    pub active: usize,
    /// Conversations between two turns that are expected back soon, in thousandths of a request; 0 without affinity.
    pub awaited: u64,
    /// Its weight in thousandths, already lowered while it recovers. Never 0.
    pub weight: u64,
    /// How much it was used lately; old use fades.
    pub recent: f64,
}

impl Candidate {
    /// Requests running and expected, in thousandths.
    pub fn load(&self) -> u64 {
        1000 * self.active as u64 + self.awaited
    }
}

/// Picks one candidate. `credit` is the running credit of each endpoint for smooth round robin, by
/// [`Candidate::index`]; only that strategy touches it.
pub fn choose(
    strategy: Strategy,
    candidates: &[Candidate],
    credit: &mut [i64],
    rng: &mut fastrand::Rng,
) -> Option<usize> {
    match strategy {
        Strategy::LeastRequests => least_requests(candidates, rng),
        Strategy::RoundRobin => round_robin(candidates, credit),
        Strategy::Random => random(candidates, rng),
    }
}

/// The smallest (load + 1) / weight; among equals the least used lately for its weight; then chance.
fn least_requests(candidates: &[Candidate], rng: &mut fastrand::Rng) -> Option<usize> {
    use std::cmp::Ordering;
    let load = |a: &Candidate, b: &Candidate| {
        // Cross-multiplied, so that equal loads compare as equal.
        let (left, right) = (
            u128::from(a.load() + 1000) * u128::from(b.weight),
            u128::from(b.load() + 1000) * u128::from(a.weight),
        );
        left.cmp(&right).then_with(|| {
            (a.recent * b.weight as f64).partial_cmp(&(b.recent * a.weight as f64)).unwrap_or(Ordering::Equal)
        })
    };
    let mut best: Option<&Candidate> = None;
    let mut equals = 0;
    for candidate in candidates {
        match best.map_or(Ordering::Less, |best| load(candidate, best)) {
            Ordering::Less => (best, equals) = (Some(candidate), 1),
            Ordering::Equal => {
                equals += 1;
                // Each of n equals is kept with chance 1/n.
                if rng.usize(..equals) == 0 {
                    best = Some(candidate);
                }
            }
            Ordering::Greater => {}
        }
    }
    best.map(|candidate| candidate.index)
}

/// Smooth weighted round robin, as nginx does it: exact shares, never in blocks.
fn round_robin(candidates: &[Candidate], credit: &mut [i64]) -> Option<usize> {
    let mut total = 0;
    let mut best: Option<usize> = None;
    for candidate in candidates {
        let weight = candidate.weight as i64;
        total += weight;
        credit[candidate.index] += weight;
        if best.is_none_or(|best| credit[candidate.index] > credit[best]) {
            best = Some(candidate.index);
        }
    }
    if let Some(best) = best {
        credit[best] -= total;
    }
    best
}

fn random(candidates: &[Candidate], rng: &mut fastrand::Rng) -> Option<usize> {
    let total: u64 = candidates.iter().map(|c| c.weight).sum();
    if total == 0 {
        return None;
    }
    let mut at = rng.u64(..total);
    candidates
        .iter()
        .find(|c| match at.checked_sub(c.weight) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        })
        .map(|c| c.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(weights: &[u64]) -> Vec<Candidate> {
        let one =
            |(index, &weight)| Candidate { index, active: 0, awaited: 0, weight: weight * 1000, recent: 0.0 };
        weights.iter().enumerate().map(one).collect()
    }

    fn shares(strategy: Strategy, weights: &[u64], rounds: usize) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(3);
        let (mut list, mut credit) = (candidates(weights), vec![0; weights.len()]);
        let mut counts = vec![0; weights.len()];
        for _ in 0..rounds {
            let picked = choose(strategy, &list, &mut credit, &mut rng).unwrap();
            counts[picked] += 1;
            list[picked].recent += 1.0;
        }
        counts
    }

    /// The original's round robin gave 30/0/0.
    #[test]
    fn round_robin_gives_exact_shares() {
        assert_eq!(shares(Strategy::RoundRobin, &[1, 1, 1], 30), [10, 10, 10]);
        assert_eq!(shares(Strategy::RoundRobin, &[5, 1, 1], 70), [50, 10, 10]);
        assert_eq!(shares(Strategy::RoundRobin, &[7], 5), [5]);
    }

    /// The fork's weighted round robin came in blocks (B, B, B in a row).
    #[test]
    fn round_robin_is_smooth() {
        let (list, mut credit) = (candidates(&[5, 1, 1]), vec![0; 3]);
        let order: Vec<usize> = (0..7).filter_map(|_| round_robin(&list, &mut credit)).collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
    }

    /// The original broke ties by list order: sequential traffic went 30/0/0.
    #[test]
    fn sequential_traffic_is_spread_by_weight() {
        assert_eq!(shares(Strategy::LeastRequests, &[1, 1, 1], 30), [10, 10, 10]);
        assert_eq!(shares(Strategy::LeastRequests, &[3, 1], 40), [40, 0]);
    }

    #[test]
    fn least_requests_weighs_what_is_running() {
        let mut list = candidates(&[2, 1]);
        let mut rng = fastrand::Rng::with_seed(1);
        for (active, expected) in [([0, 0], 0), ([1, 0], 1), ([2, 0], 1), ([1, 1], 0), ([4, 1], 1)] {
            (list[0].active, list[1].active) = (active[0], active[1]);
            // (1+1)/2 against (0+1)/1 is a tie that recent use decides.
            list[0].recent = 1.0;
            assert_eq!(least_requests(&list, &mut rng), Some(expected), "{active:?}");
        }
    }

    #[test]
    fn whoever_is_expected_back_counts() {
        let (mut list, mut rng) = (candidates(&[1, 1]), fastrand::Rng::with_seed(1));
        (list[0].active, list[1].awaited) = (1, 900);
        assert_eq!(least_requests(&list, &mut rng), Some(1));
        list[1].awaited = 1100;
        assert_eq!(least_requests(&list, &mut rng), Some(0));
    }

    #[test]
    fn random_follows_the_weights() {
        let counts = shares(Strategy::Random, &[3, 1, 0], 40_000);
        assert!((29_000..31_000).contains(&counts[0]), "{counts:?}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn nothing_to_choose_from_is_none() {
        let mut rng = fastrand::Rng::with_seed(1);
        for strategy in [Strategy::LeastRequests, Strategy::RoundRobin, Strategy::Random] {
            assert_eq!(choose(strategy, &[], &mut [], &mut rng), None);
        }
    }
}
