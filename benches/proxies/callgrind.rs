//! Valgrind's callgrind around a program, and what its file says: instructions and calls of the allocator, in all, by
//! function and by caller.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::wire::broken;

/// What the C library calls its ways to get memory. Giving it back is no allocation.
const ALLOCATORS: [&str; 6] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign"];

/// How many callers of each allocation are told apart: from the library's ways to grow a vector to whoever wanted it.
const CALLERS: usize = 12;
/// Of these, callers that are named: the first that are not of Rust's own library.
const NAMED: usize = 3;

/// What a program did from its start to its end.
#[derive(Default, Clone)]
pub struct Counts {
    pub instructions: f64,
    pub allocations: f64,
    /// Instructions by function, without those of the functions it calls.
    pub by_function: BTreeMap<String, f64>,
    /// Allocations by who asks for memory.
    pub by_caller: BTreeMap<String, f64>,
}

/// Valgrind's version, or why it cannot be used.
pub fn version() -> Result<String, String> {
    let output = Command::new("valgrind").arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|why| format!("valgrind: {why} (Debian package valgrind)"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The words that stand before a program's own, so that it leaves its counts in `file`.
pub fn wrapper(file: &Path) -> Vec<String> {
    let out = format!("--callgrind-out-file={}", file.display());
    let callers = ALLOCATORS.map(|name| format!("--separate-callers{CALLERS}={name}"));
    ["valgrind", "--quiet", "--tool=callgrind", "--fair-sched=yes", &out]
        .map(str::to_owned)
        .into_iter()
        .chain(callers)
        .collect()
}

impl Counts {
    pub fn read(file: &Path) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(file)?)
    }

    /// The part of the format that is needed here: who is running (`fn`), what a line of it cost, and whom it called
    /// (`cfn`, `calls`). The line behind `calls` is the cost of what was called, and counts there.
    fn parse(text: &str) -> io::Result<Self> {
        let mut counts = Self::default();
        let mut names: BTreeMap<&str, &str> = BTreeMap::new();
        let (mut function, mut called, mut is_cost_of_called, mut has_totals) = ("", "", false, false);
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("fn=") {
                function = full_name(&mut names, name);
            } else if let Some(name) = line.strip_prefix("cfn=") {
                called = full_name(&mut names, name);
            } else if let Some(numbers) = line.strip_prefix("calls=") {
                is_cost_of_called = true;
                if is_allocator(called) {
                    let times = number(numbers.split(' ').next());
                    counts.allocations += times;
                    *counts.by_caller.entry(who_wanted(called)).or_default() += times;
                }
            } else if let Some(totals) = line.strip_prefix("totals: ") {
                counts.instructions = number(Some(totals));
                has_totals = true;
            } else if is_cost(line) && !std::mem::take(&mut is_cost_of_called) {
                let own = number(line.split(' ').nth(1));
                let name = if is_allocator(function) { base(function) } else { function };
                *counts.by_function.entry(name.to_owned()).or_default() += own;
            }
        }
        if has_totals { Ok(counts) } else { Err(broken("callgrind's file has no totals")) }
    }

    /// What `more` units cost beyond these, for each of them.
    pub fn until(&self, later: &Self, units: f64) -> Self {
        let each = |before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>| {
            let more = |name: &str, after: f64| (after - before.get(name).unwrap_or(&0.0)) / units;
            after.iter().map(|(name, after)| (name.clone(), more(name, *after))).collect()
        };
        Self {
            instructions: (later.instructions - self.instructions) / units,
            allocations: (later.allocations - self.allocations) / units,
            by_function: each(&self.by_function, &later.by_function),
            by_caller: each(&self.by_caller, &later.by_caller),
        }
    }
}

/// The name of a function without its callers, which stand behind it where they are told apart.
fn base(name: &str) -> &str {
    name.split('\'').next().unwrap_or(name)
}

fn is_allocator(name: &str) -> bool {
    ALLOCATORS.contains(&base(name))
}

/// The callers of an allocation that say something: those outside of Rust's own library.
fn who_wanted(name: &str) -> String {
    let is_library = |name: &str| {
        let name = name.trim_start_matches('<');
        ["alloc::", "core::", "std::", "__rust", "realloc"].iter().any(|library| name.starts_with(library))
    };
    let callers: Vec<_> = name.split('\'').skip(1).filter(|name| !is_library(name)).take(NAMED).collect();
    callers.join(" < ")
}

/// A line of costs begins with where in the source they arose: absolute, or relative to the line before.
fn is_cost(line: &str) -> bool {
    line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c))
}

/// A name is written out once, as `(7) name`, and is `(7)` from then on.
fn full_name<'a>(names: &mut BTreeMap<&'a str, &'a str>, text: &'a str) -> &'a str {
    let (number, name) = text.split_once(' ').unwrap_or((text, ""));
    match name {
        "" => names.get(number).copied().unwrap_or(number),
        name => {
            names.insert(number, name);
            name
        }
    }
}

fn number(text: Option<&str>) -> f64 {
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}
