//! strace around a program: how many system calls it made from its start to its end.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::wire::{broken, clock};

/// How long the summary may take to be written once the program has ended.
const PATIENCE: Duration = Duration::from_secs(10);

/// An error when it cannot be used.
pub fn find() -> Result<(), String> {
    let run = Command::new("strace").arg("-V").stdin(Stdio::null()).stdout(Stdio::null()).status();
    run.map(|_| ()).map_err(|why| format!("strace: {why} (Debian package strace)"))
}

/// The words that stand before a program's own. With `-D` the program is our child and gets our signals.
pub fn wrapper(file: &Path) -> Vec<String> {
    let file = file.display().to_string();
    ["strace", "-D", "-f", "-c", "-o", &file].map(str::to_owned).to_vec()
}

/// Waits for the summary, which comes after the program's end, and returns the calls in its last line.
pub fn calls(file: &Path) -> io::Result<f64> {
    let begin = clock();
    while clock() - begin < PATIENCE.as_nanos() as u64 {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if let Some(total) = text.lines().find(|line| line.ends_with(" total")) {
            let calls = total.split_whitespace().nth(3).and_then(|word| word.parse().ok());
            return calls.ok_or_else(|| broken("strace's summary has no number of calls"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(broken("strace left no summary"))
}
