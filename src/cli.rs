//! The command line: what the arguments ask for. Pure; whoever calls it prints, reads and runs.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg;

use crate::config::nearest::nearest;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Run the proxy.
    Run {
        /// The value of `--config`.
        config: Option<PathBuf>,
    },
    /// Check the configuration and print it.
    Check {
        /// The value of `--config`.
        config: Option<PathBuf>,
    },
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
    /// Show the proxy with embedded workspaces.
    Demo {
        /// End after the requests instead of staying up.
        once: bool,
        /// The port to listen on; if not given, 8000 or any free one.
        port: Option<u16>,
    },
    /// Write a commented configuration file.
    Init {
        /// The value of `--config`.
        config: Option<PathBuf>,
    },
    /// Ask a running proxy for its health.
    Health {
        /// The configuration that says where it listens.
        config: Option<PathBuf>,
        /// Its address, instead of a configuration.
        url: Option<String>,
    },
}

/// What `--help` prints.
pub const HELP: &str = "\
claude-lb spreads Claude Code over several Databricks workspaces.

Usage:
  claude-lb [--config FILE]             run the proxy
  claude-lb [--config FILE] --check     check the configuration and print it
  claude-lb [--config FILE] init        write a commented configuration
  claude-lb demo [--once] [--port N]    show it with built-in workspaces
  claude-lb health [--url URL]          ask a running proxy whether it is well

Options:
  -c, --config FILE   the configuration; else the variable CONFIG_PATH, else
                      config.yaml
      --check         print what the configuration means, with secrets
                      hidden, or all that is wrong with it
  -V, --version       print the version
  -h, --help          print this

Options of demo:
      --once          end after its requests instead of staying up
      --port N        listen on this port; else on 8000, or on any free one

Options of health:
      --url URL       where the proxy is; else the configuration says it

Environment:
  LOG_LEVEL, LOG_FORMAT   win over the configuration's `logging`

Exit codes:
  0  fine
  1  failed while running, such as a port in use
  2  wrong usage or configuration

Examples:
  claude-lb demo
  claude-lb --config /etc/claude-lb.yaml --check
  claude-lb health --url http://127.0.0.1:8000
";

/// What the arguments (without the program's name) ask for, or one line on what is wrong with them.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut typed = Typed::default();
    while let Some(arg) = parser.next().map_err(|error| usage(&error))? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help),
            Arg::Short('V') | Arg::Long("version") => return Ok(Command::Version),
            Arg::Short('c') | Arg::Long("config") => {
                let path = parser.value().map_err(|error| usage(&error))?;
                if path.is_empty() {
                    return Err("--config names no file".to_owned());
                }
                once(&mut typed.config, PathBuf::from(path), "--config")?;
            }
            Arg::Long("check") => typed.check = true,
            Arg::Long("once") => typed.once = true,
            Arg::Long("port") => {
                let port = parser.value().map_err(|error| usage(&error))?;
                let port = port.to_str().and_then(|port| port.parse().ok());
                once(&mut typed.port, port.ok_or("--port must be a number from 0 to 65535")?, "--port")?;
            }
            Arg::Long("url") => {
                let url = parser.value().map_err(|error| usage(&error))?;
                let url = url.into_string().map_err(|_| "--url must be UTF-8 text")?;
                once(&mut typed.url, url, "--url")?;
            }
            Arg::Long(name) => return Err(unknown_option(&format!("--{name}"))),
            Arg::Short(letter) => return Err(unknown_option(&format!("-{letter}"))),
            Arg::Value(word) => {
                let word = word.to_string_lossy().into_owned();
                if !COMMANDS.contains(&word.as_str()) {
                    return Err(unknown_command(&word));
                }
                once(&mut typed.command, word, "the command")?;
            }
        }
    }
    typed.command()
}

/// The file to read: the flag's, else the environment's, else `config.yaml`.
pub fn config_path(flag: Option<PathBuf>, env: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let named = || env("CONFIG_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
    flag.or_else(named).unwrap_or_else(|| PathBuf::from("config.yaml"))
}

/// The commands. `top` has its place here, in [`Typed::command`], and in [`HELP`].
const COMMANDS: &[&str] = &["init", "demo", "health"];
const OPTIONS: &[&str] = &["--config", "--check", "--version", "--help", "--once", "--port", "--url"];

/// The arguments as typed.
#[derive(Default)]
struct Typed {
    command: Option<String>,
    config: Option<PathBuf>,
    check: bool,
    once: bool,
    port: Option<u16>,
    url: Option<String>,
}

impl Typed {
    /// The command, if all options belong to it.
    fn command(self) -> Result<Command, String> {
        let command = self.command.as_deref().unwrap_or("");
        let given = [
            (self.config.is_some(), "--config", &["", "init", "health"][..]),
            (self.check, "--check", &[""]),
            (self.once, "--once", &["demo"]),
            (self.port.is_some(), "--port", &["demo"]),
            (self.url.is_some(), "--url", &["health"]),
        ];
        for (is_given, option, commands) in given {
            if is_given && !commands.contains(&command) {
                return Err(misplaced(option, command, commands));
            }
        }
        if self.url.is_some() && self.config.is_some() {
            return Err("--url and --config both say where the proxy is (give one)".to_owned());
        }
        Ok(match command {
            "init" => Command::Init { config: self.config },
            "demo" => Command::Demo { once: self.once, port: self.port },
            "health" => Command::Health { config: self.config, url: self.url },
            _ if self.check => Command::Check { config: self.config },
            _ => Command::Run { config: self.config },
        })
    }
}

fn misplaced(option: &str, command: &str, commands: &[&str]) -> String {
    match (command, commands) {
        ("", [command, ..]) => format!("{option} belongs to a command (claude-lb {command} {option})"),
        _ => format!("{option} does not go with `{command}` (see --help)"),
    }
}

fn once<T>(slot: &mut Option<T>, value: T, what: &str) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{what} is given twice")),
    }
}

fn unknown_option(option: &str) -> String {
    let hint = nearest(option, OPTIONS.iter().copied());
    let hint = hint.map_or("see --help".to_owned(), |known| format!("did you mean {known}?"));
    format!("unknown option {option} ({hint})")
}

fn unknown_command(word: &str) -> String {
    let hint = match nearest(word, COMMANDS.iter().copied()) {
        Some(known) => format!("did you mean {known}?"),
        None if word.contains(['.', '/']) => format!("a file is named with --config {word}"),
        None => "see --help".to_owned(),
    };
    format!("unknown command {word} ({hint})")
}

fn usage(error: &lexopt::Error) -> String {
    match error {
        lexopt::Error::MissingValue { option: Some(option) } => {
            format!("{option} needs a value (see --help)")
        }
        lexopt::Error::UnexpectedValue { option, .. } => format!("{option} takes no value (see --help)"),
        other => format!("{other} (see --help)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn commands() {
        let config = || Some(PathBuf::from("f.yaml"));
        for (line, expected) in [
            ("", Command::Run { config: None }),
            ("--config f.yaml", Command::Run { config: config() }),
            ("--config=f.yaml", Command::Run { config: config() }),
            ("-c f.yaml", Command::Run { config: config() }),
            ("-cf.yaml", Command::Run { config: config() }),
            ("--check", Command::Check { config: None }),
            ("--check -c f.yaml", Command::Check { config: config() }),
            ("--version", Command::Version),
            ("-V", Command::Version),
            ("--help", Command::Help),
            ("-h", Command::Help),
            ("demo --once --help", Command::Help),
            ("demo", Command::Demo { once: false, port: None }),
            ("demo --once --port 0", Command::Demo { once: true, port: Some(0) }),
            ("--port=9000 demo", Command::Demo { once: false, port: Some(9000) }),
            ("health", Command::Health { config: None, url: None }),
            ("health -c f.yaml", Command::Health { config: config(), url: None }),
            ("-c f.yaml health", Command::Health { config: config(), url: None }),
            ("health --url http://h:1", Command::Health { config: None, url: Some("http://h:1".into()) }),
        ] {
            assert_eq!(parsed(line), Ok(expected), "for {line:?}");
        }
    }

    #[test]
    fn wrong_usage() {
        for (line, expected) in [
            ("--chek", "unknown option --chek (did you mean --check?)"),
            ("--conf f", "unknown option --conf (did you mean --config?)"),
            ("--confg f", "unknown option --confg (did you mean --config?)"),
            ("--frobnicate", "unknown option --frobnicate (see --help)"),
            ("-x", "unknown option -x (see --help)"),
            ("--config", "--config needs a value (see --help)"),
            ("--config=", "--config names no file"),
            ("--check=yes", "--check takes no value (see --help)"),
            ("-c a -c b", "--config is given twice"),
            ("dmeo", "unknown command dmeo (did you mean demo?)"),
            ("config.yaml", "unknown command config.yaml (a file is named with --config config.yaml)"),
            ("serve", "unknown command serve (see --help)"),
            ("demo health", "the command is given twice"),
            ("--once", "--once belongs to a command (claude-lb demo --once)"),
            ("--url x", "--url belongs to a command (claude-lb health --url)"),
            ("demo --check", "--check does not go with `demo` (see --help)"),
            ("demo -c x", "--config does not go with `demo` (see --help)"),
            ("health --port 1", "--port does not go with `health` (see --help)"),
            ("health --url x -c y", "--url and --config both say where the proxy is (give one)"),
            ("demo --port 99999", "--port must be a number from 0 to 65535"),
            ("demo --port x", "--port must be a number from 0 to 65535"),
        ] {
            assert_eq!(parsed(line), Err(expected.to_owned()), "for {line:?}");
        }
    }

    #[test]
    fn help_fits_a_terminal_and_names_everything() {
        assert!(HELP.lines().all(|line| line.chars().count() <= 80));
        for word in OPTIONS.iter().chain(COMMANDS) {
            assert!(HELP.contains(word), "{word} is missing");
        }
    }

    #[test]
    fn the_flag_wins_over_the_environment() {
        let set = |_: &str| Some("env.yaml".to_owned());
        let empty = |_: &str| Some(String::new());
        let unset = |_: &str| None;
        assert_eq!(config_path(Some("flag.yaml".into()), &set), PathBuf::from("flag.yaml"));
        assert_eq!(config_path(None, &set), PathBuf::from("env.yaml"));
        assert_eq!(config_path(None, &empty), PathBuf::from("config.yaml"));
        assert_eq!(config_path(None, &unset), PathBuf::from("config.yaml"));
    }
}
