//! What Claude Code asks for: main turns with pauses between them, and bursts of sub-agents.
//!
//! Every session and every sub-agent draws from a generator of its own, so all policies see the same draws whatever
//! they do with them.

use std::time::Duration;

/// Sessions that work at once.
pub const SESSIONS: usize = 16;
/// A main conversation is given up for a new one after so many turns.
const CONVERSATION_TURNS: u64 = 60;
/// Turns that end with a burst of sub-agents.
const BURST_SHARE: f64 = 0.04;

/// Whose prompt prefix it is. What is in front of all messages of one kind is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prefix {
    /// System prompt and tools of a main loop.
    Main,
    /// System prompt and tools of a sub-agent, the same for all of them.
    Sub,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// The conversation, as the balancer knows it.
    pub conversation: u64,
    /// Which prefix it begins with.
    pub prefix: Prefix,
    /// Tokens of that prefix.
    pub prefix_tokens: u64,
    /// Input tokens altogether.
    pub input: u64,
    /// Output tokens.
    pub output: u64,
    /// Bytes of the request: 4 for a token of the prefix, 3.2 to 4.4 for one of the conversation, by what it is about.
    pub bytes: u64,
}

/// A main loop or a sub-agent.
#[derive(Debug, Clone)]
pub struct Agent {
    /// Its session; for a sub-agent the one that waits for it.
    pub session: usize,
    /// A sub-agent ends after so many turns; a main loop never does.
    pub turns_left: Option<u64>,
    conversation: u64,
    turn: u64,
    rng: fastrand::Rng,
}

/// What follows a turn.
#[derive(Debug)]
pub enum Next {
    /// The next turn, after this long.
    Turn(Duration),
    /// A burst: each sub-agent begins after its delay, and the main loop waits for all.
    Burst(Vec<(Duration, Agent)>),
    /// A sub-agent is done.
    Done,
}

impl Agent {
    /// The main loop of a session, and when it begins.
    pub fn main(session: usize, seed: u64) -> (Duration, Self) {
        let mut rng = fastrand::Rng::with_seed(seed * 1000 + session as u64);
        let begin = seconds(60.0 * rng.f64());
        let conversation = rng.u64(..);
        (begin, Self { session, turns_left: None, conversation, turn: 0, rng })
    }

    fn sub(&mut self) -> Self {
        let mut rng = self.rng.fork();
        let (turns, conversation) = (rng.u64(6..=20), rng.u64(..));
        Self { session: self.session, turns_left: Some(turns), conversation, turn: 0, rng }
    }

    /// What it asks for now. Asking again gives another output, as sending again would.
    pub fn ask(&mut self) -> Turn {
        let (prefix, prefix_tokens, first, per_turn, output) = match self.turns_left {
            None => (Prefix::Main, 22_000, 500, 1_500, 350.0),
            Some(_) => (Prefix::Sub, 14_000, 800, 1_800, 300.0),
        };
        let input = prefix_tokens + first + per_turn * self.turn;
        let bytes_per_token = 3.2 + (self.conversation % 1201) as f64 / 1000.0;
        Turn {
            conversation: self.conversation,
            prefix,
            prefix_tokens,
            input,
            output: 1 + exponential(&mut self.rng, output) as u64,
            bytes: 4 * prefix_tokens + ((input - prefix_tokens) as f64 * bytes_per_token) as u64,
        }
    }

    /// The turn is answered.
    pub fn next(&mut self) -> Next {
        self.turn += 1;
        if let Some(left) = &mut self.turns_left {
            *left -= 1;
            return if *left == 0 { Next::Done } else { Next::Turn(seconds(3.0)) };
        }
        if self.turn == CONVERSATION_TURNS {
            (self.turn, self.conversation) = (0, self.rng.u64(..));
        }
        if self.rng.f64() < BURST_SHARE {
            let count = self.rng.usize(3..=16);
            return Next::Burst((0..count).map(|_| (seconds(2.0 * self.rng.f64()), self.sub())).collect());
        }
        Next::Turn(seconds(match self.rng.f64() {
            kind if kind < 0.01 => between(&mut self.rng, 360.0, 900.0),
            kind if kind < 0.11 => between(&mut self.rng, 20.0, 120.0),
            _ => exponential(&mut self.rng, 5.0),
        }))
    }
}

fn exponential(rng: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

fn between(rng: &mut fastrand::Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * rng.f64()
}

/// Seconds as a duration.
pub fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}
