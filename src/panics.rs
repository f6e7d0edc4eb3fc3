//! What a panic leaves behind: one loud line in the log, and a count.
//!
//! A panic costs one request; the room that catches it answers the client. Here it is told to the operator, in one
//! log line instead of the default text over several. A message may hold what was being worked on (a `String` that
//! would not parse, a piece of a body), so only what is known to be harmless is shown; the place says the rest. With
//! `RUST_BACKTRACE` set, the frames follow, a line each.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::Cell;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Panics since the start, but for those that were expected.
pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Makes panics a matter of the log. Called once, after logging was set up.
pub fn watch() {
    std::panic::set_hook(Box::new(note));
}

/// Runs `work`, in which a library is known to panic where it should return an error: that is no news.
pub fn expected<R>(work: impl FnOnce() -> R) -> std::thread::Result<R> {
    EXPECTED.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    EXPECTED.set(false);
    result
}

fn note(info: &PanicHookInfo<'_>) {
    if EXPECTED.get() {
        return;
    }
    COUNT.fetch_add(1, Ordering::Relaxed);
    let thread = std::thread::current();
    let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
    log::error!("panic in thread {}{place}: {}", thread.name().unwrap_or("?"), message(info.payload()));
    let frames = Backtrace::capture();
    if frames.status() == BacktraceStatus::Captured {
        frames.to_string().lines().for_each(|frame| log::error!("panic: {frame}"));
    }
}

/// As much of the message as cannot hold anything secret.
fn message(payload: &(dyn Any + Send)) -> String {
    // A literal of the program's text.
    if let Some(literal) = payload.downcast_ref::<&'static str>() {
        return (*literal).to_string();
    }
    let Some(text) = payload.downcast_ref::<String>() else { return "(no message)".into() };
    /// Messages of the standard library that hold numbers only.
    const HARMLESS: [&str; 4] = ["index out of bounds: ", "range ", "slice index ", "mid > len"];
    if HARMLESS.iter().any(|start| text.starts_with(start)) && !text.contains(['`', '\'', '"']) {
        return text.clone();
    }
    // What is formatted stands behind a colon or in quotes.
    let end = text.find([':', '`', '\'', '"', '\n', '=']).unwrap_or(text.len().min(80));
    let shown = text.get(..end).unwrap_or_default().trim_end();
    if shown.is_empty() { "(not shown: it may hold content)".into() } else { format!("{shown} (...)") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<R: std::fmt::Debug>(panics: impl FnOnce() -> R + std::panic::UnwindSafe, expected: &str) {
        let payload = std::panic::catch_unwind(panics).unwrap_err();
        assert_eq!(message(&*payload), expected);
    }

    #[test]
    fn messages_are_shown_without_what_was_worked_on() {
        let secret = || std::hint::black_box("sécret".to_string());
        check(|| panic!("a literal: `all` of it"), "a literal: `all` of it");
        check(|| panic!("in the middle of {}", secret().len()), "in the middle of 7 (...)");
        check(|| assert_eq!(secret(), "x", "they differ"), "assertion (...)");
        check(|| secret().parse::<u8>().expect("a number"), "a number (...)");
        check(|| secret().parse::<u8>().map_err(|_| secret()).unwrap(), "called (...)");
        check(|| secret()[..2].to_string(), "end byte index 2 is not a char boundary; it is inside (...)");
        check(|| vec![1, 2][std::hint::black_box(7)], "index out of bounds: the len is 2 but the index is 7");
        check(|| [0u8; 0].iter().max().copied().expect("it is there"), "it is there (...)");
        check(|| std::panic::panic_any(7), "(no message)");
    }
}
