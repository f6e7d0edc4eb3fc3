//! What is wrong with a configuration, told all at once.
//!
//! A message names the place and the remedy, and never a value of the file: it could be a token in the wrong
//! place.

use std::fmt;

/// Everything that is wrong with one configuration, in the order of the lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    /// The file, as it was named.
    pub file: String,
    /// At least one, at most [`PROBLEMS_MAX`].
    pub list: Vec<Problem>,
    /// How many more there were.
    pub more: usize,
}

/// More than this helps nobody, and each costs a walk over the file.
pub const PROBLEMS_MAX: usize = 50;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line in the file, counted from 1, where one is known for certain.
    pub line: Option<usize>,
    /// The key with its parents, as `endpoints[0].token`; empty if the file as a whole is meant.
    pub key: String,
    /// What is wrong, and the remedy in parentheses.
    pub what: String,
}

impl Problems {
    /// One problem with the file as a whole.
    pub fn of_file(file: &str, line: Option<usize>, what: impl Into<String>) -> Self {
        let problem = Problem { line, key: String::new(), what: what.into() };
        Self { file: file.to_owned(), list: vec![problem], more: 0 }
    }

    /// One line for each problem: `file:line: key: what is wrong (remedy)`.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.list.iter().map(|problem| self.line_of(problem)).collect();
        if self.more > 0 {
            lines.push(format!("{}: and {} more problems", self.file, self.more));
        }
        lines
    }

    fn line_of(&self, problem: &Problem) -> String {
        let mut text = self.file.clone();
        if let Some(line) = problem.line {
            text += &format!(":{line}");
        }
        if !problem.key.is_empty() {
            text += &format!(": {}", problem.key);
        }
        text + ": " + &problem.what
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_what_is_known() {
        let mut problems = Problems::of_file("c.yaml", None, "empty (write one)");
        problems.list.push(Problem { line: Some(3), key: "auth.api_key".into(), what: "empty".into() });
        assert_eq!(problems.to_string(), "c.yaml: empty (write one)\nc.yaml:3: auth.api_key: empty");
        problems.more = 2;
        assert_eq!(problems.lines()[2], "c.yaml: and 2 more problems");
    }
}
