//! After a failed attempt: again, or show it to the client. Pure.
//!
//! The rule that everything else bends to: nothing is tried again once content went to the client.

use std::time::Duration;

use crate::outcome::{Meaning, Outcome};

/// Whether and where a failed attempt is followed by another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// At once, on an endpoint this request has not tried. When none is left, the outcome is shown.
    Other,
    /// On another endpoint; and when this one is the only endpoint there is, once more here after a short pause.
    OtherOrSame,
    /// The client sees how this attempt ended.
    Surface,
}

/// Decides what follows an attempt. `made` counts the attempts so far, this one included.
pub fn next(outcome: &Outcome, made: u32, max_attempts: u32) -> Next {
    if made >= max_attempts {
        return Next::Surface;
    }
    match *outcome {
        Outcome::Completed | Outcome::BrokeAfterContent | Outcome::ClientGone | Outcome::Local => {
            Next::Surface
        }
        Outcome::ConnectFailed | Outcome::NoAnswer | Outcome::BrokeBeforeContent | Outcome::WebPage => {
            Next::OtherOrSame
        }
        // Whoever was silent for so long is not asked again; the client has waited enough.
        Outcome::FirstByteTimeout | Outcome::NoCredential => Next::Other,
        Outcome::Refused { meaning: Meaning::RequestLimitExceeded | Meaning::ModelMissing, .. } => {
            Next::Other
        }
        Outcome::Refused { status: 401 | 403 | 429 | 529, .. } => Next::Other,
        // It said itself when to come back.
        Outcome::Refused { status: 500.., retry_after: Some(_), .. } => Next::Other,
        Outcome::Refused { status: 500.., .. } => Next::OtherOrSame,
        Outcome::Refused { status: 300..=399, .. } => Next::Other,
        Outcome::Refused { .. } => Next::Surface,
        Outcome::ErrorEvent { status: 429 | 529 } => Next::Other,
        Outcome::ErrorEvent { status: 500.. } => Next::OtherOrSame,
        Outcome::ErrorEvent { .. } => Next::Surface,
    }
}

/// How long to wait before the only endpoint is asked a second time: 0.3 to 1 s, so that many clients spread out.
pub fn same_endpoint_pause(rng: &mut fastrand::Rng) -> Duration {
    Duration::from_millis(rng.u64(300..=1000))
}

/// How many retries to endpoints whose last result was not good may run at once, with `in_flight` requests running.
/// Keeps one bad minute from turning every request into three.
pub fn budget(in_flight: usize) -> usize {
    (in_flight / 5).max(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, retry_after: Option<u64>) -> Outcome {
        let retry_after = retry_after.map(Duration::from_secs);
        Outcome::Refused { status, retry_after, meaning: Meaning::Other }
    }

    #[test]
    fn the_table_decides() {
        for (outcome, expected) in [
            (Outcome::Completed, Next::Surface),
            (Outcome::NoCredential, Next::Other),
            (Outcome::ConnectFailed, Next::OtherOrSame),
            (Outcome::NoAnswer, Next::OtherOrSame),
            (Outcome::FirstByteTimeout, Next::Other),
            (Outcome::WebPage, Next::OtherOrSame),
            (Outcome::BrokeBeforeContent, Next::OtherOrSame),
            (Outcome::BrokeAfterContent, Next::Surface),
            (Outcome::ClientGone, Next::Surface),
            (Outcome::Local, Next::Surface),
            (refused(302, None), Next::Other),
            (refused(400, None), Next::Surface),
            (refused(401, None), Next::Other),
            (refused(403, None), Next::Other),
            (refused(404, None), Next::Surface),
            (refused(413, None), Next::Surface),
            (refused(422, None), Next::Surface),
            (refused(429, Some(1)), Next::Other),
            (refused(500, None), Next::OtherOrSame),
            (refused(503, Some(5)), Next::Other),
            (refused(529, None), Next::Other),
            (Outcome::ErrorEvent { status: 529 }, Next::Other),
            (Outcome::ErrorEvent { status: 500 }, Next::OtherOrSame),
            (Outcome::ErrorEvent { status: 400 }, Next::Surface),
        ] {
            assert_eq!(next(&outcome, 1, 3), expected, "{outcome:?}");
            assert_eq!(next(&outcome, 3, 3), Next::Surface, "{outcome:?}, attempts used up");
        }
        let missing = Outcome::Refused { status: 404, retry_after: None, meaning: Meaning::ModelMissing };
        assert_eq!(next(&missing, 1, 3), Next::Other);
    }

    #[test]
    fn the_budget_is_a_fifth_but_never_less_than_three() {
        for (in_flight, expected) in [(0, 3), (1, 3), (15, 3), (20, 4), (100, 20)] {
            assert_eq!(budget(in_flight), expected);
        }
    }
}
