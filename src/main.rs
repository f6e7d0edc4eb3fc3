//! Exit codes, and nothing else: 0 fine, 1 a failure at run time, 2 wrong usage or configuration.

use std::process::ExitCode;

fn main() -> ExitCode {
    claude_lb::program::run()
}
