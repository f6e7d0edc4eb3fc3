//! Scripted readers against a recording client: no socket, no clock that runs.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::Read;

use super::body::{self, Body};
use super::stream::{Ended, Stream};
use super::*;
use crate::anthropic::sse::Scanner;

const LIMITS: Limits = Limits { idle: Duration::from_secs(30), heartbeat: Duration::from_secs(10) };

/// What the workspace does next.
#[derive(Clone)]
enum Step {
    Bytes(Vec<u8>),
    /// Nothing for so many seconds.
    Quiet(u64),
    Cut,
}

struct Upstream {
    steps: VecDeque<Step>,
    time: Rc<Cell<Instant>>,
}

impl Read for Upstream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.steps.pop_front() {
            None => Ok(0),
            Some(Step::Bytes(bytes)) => {
                let count = bytes.len().min(buffer.len());
                buffer[..count].copy_from_slice(&bytes[..count]);
                if count < bytes.len() {
                    self.steps.push_front(Step::Bytes(bytes[count..].to_vec()));
                }
                Ok(count)
            }
            Some(Step::Quiet(0)) => self.read(buffer),
            Some(Step::Quiet(seconds)) => {
                self.time.set(self.time.get() + Duration::from_secs(1));
                self.steps.push_front(Step::Quiet(seconds - 1));
                Err(io::ErrorKind::WouldBlock.into())
            }
            Some(Step::Cut) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

#[derive(Default)]
struct Recorder {
    sends: RefCell<Vec<Vec<u8>>>,
    gone_after: Cell<Option<usize>>,
}

impl Client for Recorder {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if self.is_gone() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.sends.borrow_mut().push(bytes.to_vec());
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.gone_after.get().is_some_and(|most| self.sends.borrow().len() >= most)
    }
}

struct Bench {
    client: Rc<Recorder>,
    downstream: Downstream,
    time: Rc<Cell<Instant>>,
}

impl Bench {
    fn new() -> Self {
        let (client, now) = (Rc::new(Recorder::default()), crate::env::now());
        let downstream = Downstream::new(Rc::clone(&client) as Rc<dyn Client>, false, now);
        Self { client, downstream, time: Rc::new(Cell::new(now)) }
    }

    fn upstream(&self, steps: Vec<Step>) -> Upstream {
        Upstream { steps: steps.into(), time: Rc::clone(&self.time) }
    }

    fn stream(&self, steps: Vec<Step>) -> Ended {
        let time = Rc::clone(&self.time);
        let clock = move || time.get();
        let (had_content, began) = (self.downstream.has_content(), Cell::new(0));
        let content_began = || {
            began.set(began.get() + 1);
            assert!(self.downstream.first_at().is_some(), "the client has it");
        };
        let mut stream = Stream {
            downstream: &self.downstream,
            content_began: &content_began,
            lasts: &|| (),
            head: b"HEAD|".to_vec(),
            limits: LIMITS,
            clock: &clock,
            scanner: Scanner::new(),
        };
        let ended = stream.run(&mut self.upstream(steps));
        // A client that left has not heard of it.
        if ended != Ended::ClientGone {
            assert_eq!(began.get(), usize::from(self.downstream.has_content() && !had_content));
        }
        ended
    }

    fn body(&self, length: Option<u64>, steps: Vec<Step>) -> body::Ended {
        let time = Rc::clone(&self.time);
        let clock = move || time.get();
        let make_head = |length: Option<u64>| format!("HEAD {length:?}|").into_bytes();
        let body = Body {
            downstream: &self.downstream,
            make_head: &make_head,
            length,
            limits: LIMITS,
            clock: &clock,
        };
        body.run(&mut self.upstream(steps), &mut Vec::new())
    }

    fn sends(&self) -> Vec<String> {
        self.client.sends.borrow().iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect()
    }
}

fn bytes(text: &str) -> Step {
    Step::Bytes(text.as_bytes().to_vec())
}

const START: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{}}\n\n";
const SECOND_START: &str =
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"2\"}}\n\n";
const BLOCK: &str = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0}\n\n";
const STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
const OVERLOADED: &str = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n";

#[test]
fn head_and_first_event_leave_in_one_piece_and_every_chunk_at_once() {
    let bench = Bench::new();
    let ended =
        bench.stream(vec![bytes(START), bytes(BLOCK), bytes("event: par"), bytes("tial\n\n"), bytes(STOP)]);
    assert_eq!(ended, Ended::Complete);
    assert_eq!(bench.sends(), [&format!("HEAD|{START}"), BLOCK, "event: par", "tial\n\n", STOP]);
}

#[test]
fn before_content_only_whole_events_go_out() {
    let bench = Bench::new();
    let (front, back) = START.split_at(20);
    bench.stream(vec![bytes(front), bytes(back), bytes("event: pi"), Step::Cut]);
    assert_eq!(bench.sends(), [format!("HEAD|{START}")]);
    assert!(bench.downstream.has_message_start() && !bench.downstream.has_content());
}

/// Half a content event is no content yet: another workspace can still take over.
#[test]
fn content_begins_with_a_whole_event() {
    let bench = Bench::new();
    let (front, back) = BLOCK.split_at(45);
    assert!(matches!(
        bench.stream(vec![bytes(START), bytes(front), Step::Cut]),
        Ended::BrokeBeforeContent(_)
    ));
    assert_eq!(bench.sends(), [format!("HEAD|{START}")]);
    bench.stream(vec![bytes(SECOND_START), bytes(front), bytes(back), bytes("event: con"), Step::Cut]);
    assert_eq!(bench.sends()[1..], [BLOCK, "event: con"]);
}

/// The original sent the retried stream's message_start, too.
#[test]
fn another_attempt_continues_one_coherent_stream() {
    let bench = Bench::new();
    assert!(matches!(bench.stream(vec![bytes(START), Step::Cut]), Ended::BrokeBeforeContent(_)));
    assert!(matches!(
        bench.stream(vec![bytes(&format!("{SECOND_START}{OVERLOADED}"))]),
        Ended::ErrorEvent { .. }
    ));
    let ended = bench.stream(vec![bytes(&format!("{SECOND_START}{BLOCK}")), bytes(STOP)]);
    assert_eq!(ended, Ended::Complete);
    assert_eq!(bench.sends().concat(), format!("HEAD|{START}{BLOCK}{STOP}"));
}

#[test]
fn an_error_event_before_content_is_reported_and_not_shown() {
    let bench = Bench::new();
    let Ended::ErrorEvent { kind, data } = bench.stream(vec![bytes(OVERLOADED)]) else { panic!() };
    assert_eq!(kind, "overloaded_error");
    assert!(data.starts_with(b"{\"type\":\"error\""));
    assert!(bench.sends().is_empty());
}

#[test]
fn an_error_event_after_content_passes_and_ends_well() {
    let bench = Bench::new();
    assert_eq!(bench.stream(vec![bytes(START), bytes(BLOCK), bytes(OVERLOADED)]), Ended::Complete);
    assert!(bench.sends().concat().ends_with(OVERLOADED));
}

/// The fork invented message_stop after a cut: a truncated answer could be taken for complete.
#[test]
fn nothing_is_invented_after_content() {
    for last in [vec![], vec![Step::Cut], vec![Step::Quiet(40)]] {
        let bench = Bench::new();
        let steps = [vec![bytes(START), bytes(BLOCK)], last].concat();
        assert!(matches!(bench.stream(steps), Ended::BrokeAfterContent(_)));
        assert!(!bench.sends().concat().contains("message_stop"));
    }
}

#[test]
fn silence_is_filled_with_pings_at_event_boundaries_only() {
    let bench = Bench::new();
    let ended = bench.stream(vec![
        bytes(START),
        Step::Quiet(12),
        bytes(BLOCK),
        Step::Quiet(12),
        bytes("event: half"),
        Step::Quiet(25),
        bytes("\n\n"),
        bytes(STOP),
    ]);
    assert_eq!(ended, Ended::Complete);
    let ping = String::from_utf8_lossy(PING);
    let head = format!("HEAD|{START}");
    assert_eq!(bench.sends(), [&head, &*ping, BLOCK, &*ping, "event: half", "\n\n", STOP]);
}

/// The fork's heartbeat had no bound: a silent workspace hung the user for ever.
#[test]
fn pings_do_not_keep_a_silent_workspace_alive() {
    let bench = Bench::new();
    assert_eq!(bench.stream(vec![bytes(START), Step::Quiet(100)]), Ended::SilentBeforeContent);
}

#[test]
fn a_workspace_that_does_not_end_its_body_does_not_keep_the_client_waiting() {
    let bench = Bench::new();
    let started = bench.time.get();
    let ended = bench.stream(vec![bytes(START), bytes(BLOCK), bytes(STOP), Step::Quiet(100)]);
    assert_eq!(ended, Ended::Complete);
    assert!(bench.time.get() - started < Duration::from_secs(2));
}

#[test]
fn a_client_that_left_is_seen_on_a_send_and_on_a_tick() {
    for steps in [vec![bytes(START), bytes(BLOCK), bytes(STOP)], vec![bytes(START), Step::Quiet(5)]] {
        let bench = Bench::new();
        bench.client.gone_after.set(Some(1));
        assert_eq!(bench.stream(steps), Ended::ClientGone);
        assert_eq!(
            bench.downstream.body_bytes(),
            START.len() as u64,
            "what could not be sent does not count"
        );
    }
}

#[test]
fn a_message_without_content_is_complete() {
    let bench = Bench::new();
    assert_eq!(bench.stream(vec![bytes(&format!("{START}{STOP}"))]), Ended::Complete);
}

#[test]
fn a_small_answer_leaves_in_one_piece_with_its_length() {
    let bench = Bench::new();
    assert_eq!(bench.body(None, vec![bytes("{\"a\""), bytes(":1}")]), body::Ended::Complete);
    assert_eq!(bench.sends(), ["HEAD Some(7)|{\"a\":1}"]);
}

#[test]
fn an_answer_that_breaks_before_it_went_out_has_cost_nothing() {
    let bench = Bench::new();
    assert!(matches!(bench.body(Some(9), vec![bytes("{"), Step::Cut]), body::Ended::BrokeBeforeContent(_)));
    assert_eq!(bench.body(Some(9), vec![bytes("{"), Step::Quiet(40)]), body::Ended::SilentBeforeContent);
    assert!(bench.sends().is_empty());
}

#[test]
fn a_large_answer_flows() {
    let bench = Bench::new();
    let large = "x".repeat(body::GATHERED_BYTES_MAX + 5);
    let length = Some(large.len() as u64);
    assert_eq!(bench.body(length, vec![bytes(&large)]), body::Ended::Complete);
    assert_eq!(bench.sends().concat(), format!("HEAD {length:?}|{large}"));
    let bench = Bench::new();
    let ended = bench.body(length, vec![bytes(&large[..body::GATHERED_BYTES_MAX]), Step::Cut]);
    assert!(matches!(ended, body::Ended::BrokeAfterContent(_)));
}

#[test]
fn a_web_page_is_no_answer() {
    let bench = Bench::new();
    assert_eq!(bench.body(None, vec![bytes("\n <!DOCTYPE html><html>log in")]), body::Ended::WebPage);
    assert!(bench.sends().is_empty());
}
