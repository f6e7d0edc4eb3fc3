//! Which fake workspace fails when, and what they say. Knows no socket.
//!
//! The tour must show its failures every time, whichever workspace the proxy asks first. So the tour arms a failure,
//! and the workspace that gets the next request of the tour takes it. Requests of anybody else never do; for them the
//! third workspace has a bad moment now and then.

use parking_lot::Mutex;

/// The workspaces, as the configuration names them.
pub(super) const NAMES: [&str; 3] = ["workspace-1", "workspace-2", "workspace-3"];
/// The one that fails now and then.
pub(super) const FLAKY: usize = 2;
/// Which of its requests fail: every third.
const FLAKY_EVERY: usize = 3;

/// A way to fail that the proxy hides as long as another workspace works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// 529 with Anthropic's error.
    Overloaded,
    /// 503 with the page of a gateway.
    Unavailable,
    /// 200, but the stream begins with an `error` event.
    ErrorEvent,
    /// The stream ends after `message_start`.
    Cut,
}

const FAILURES: [Failure; 4] = [Failure::Overloaded, Failure::Cut, Failure::Unavailable, Failure::ErrorEvent];

/// What a workspace does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Says this.
    Say(String),
    /// Fails.
    Fail(Failure),
}

/// What all fake workspaces follow.
#[derive(Debug, Default)]
pub(super) struct Script {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    armed: Option<Failure>,
    failed: Option<usize>,
    visits_of_flaky: usize,
}

impl Script {
    /// The next request of the tour fails at the workspace that gets it.
    pub(super) fn arm(&self, failure: Failure) {
        let mut inner = self.inner.lock();
        (inner.armed, inner.failed) = (Some(failure), None);
    }

    /// Who took the failure that was armed last.
    pub(super) fn who_failed(&self) -> Option<&'static str> {
        self.inner.lock().failed.map(|number| NAMES[number])
    }

    /// Decides about one request. `line` is the tour's number for what it wants to hear; nobody else sends one.
    pub(super) fn act(&self, number: usize, line: Option<usize>, body_bytes: usize) -> Act {
        let mut inner = self.inner.lock();
        if let Some(line) = line {
            if let Some(failure) = inner.armed.take() {
                inner.failed = Some(number);
                return Act::Fail(failure);
            }
            return Act::Say(format!("Hello from {}. {}", NAMES[number], LINES[line % LINES.len()]));
        }
        if number == FLAKY {
            inner.visits_of_flaky += 1;
            if inner.visits_of_flaky.is_multiple_of(FLAKY_EVERY) {
                return Act::Fail(FAILURES[(inner.visits_of_flaky / FLAKY_EVERY - 1) % FAILURES.len()]);
            }
        }
        Act::Say(format!(
            "Hello from {}. I am one of the three fakes of `claude-lb demo`: your {body_bytes} bytes arrived here, \
             but I can only say this. With your workspaces in a config.yaml a model answers in my place, through \
             the same proxy.",
            NAMES[number]
        ))
    }
}

/// What the tour hears, by the number it sends.
pub(super) const LINES: [&str; 8] = [
    "I am no model, but this stream is real: each word is an event of its own, and you see it as I send it.",
    "The proxy asked me because I had the least to do.",
    "You did not have to know which of us would answer.",
    "On again: of the three of us I had rested longest.",
    "Three turns at once, and one for each of us.",
    "A colleague was too busy for you. I was not.",
    "A colleague began and hung up before the first word, so I went on; you still see one whole stream.",
    "All of this came in one piece, for a client that does not want a stream.",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_workspace_that_the_tour_asks_fails_and_only_that_one() {
        for (first, name) in NAMES.iter().enumerate() {
            let script = Script::default();
            script.arm(Failure::Cut);
            assert_eq!(script.who_failed(), None);
            assert!(matches!(script.act(0, None, 1), Act::Say(_)), "a visitor never takes it");
            assert_eq!(script.act(first, Some(5), 1), Act::Fail(Failure::Cut));
            assert_eq!(script.who_failed(), Some(*name));
            for (next, name) in NAMES.iter().enumerate() {
                let Act::Say(text) = script.act(next, Some(5), 1) else { panic!("it failed twice") };
                assert_eq!(text, format!("Hello from {name}. {}", LINES[5]));
            }
        }
    }

    #[test]
    fn one_workspace_fails_every_third_visitor_in_every_way() {
        let script = Script::default();
        let acts: Vec<Act> = (0..12).map(|_| script.act(FLAKY, None, 1)).collect();
        let failed: Vec<&Act> = acts.iter().skip(2).step_by(3).collect();
        assert_eq!(failed, FAILURES.map(Act::Fail).iter().collect::<Vec<_>>());
        assert_eq!(acts.iter().filter(|act| matches!(act, Act::Say(_))).count(), 8);
        assert!((0..12).all(|_| matches!(script.act(0, None, 1), Act::Say(_))));
    }
}
