//! What each command does, and the exit code it ends with.

use std::fmt::Display;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::{self, Command};
use crate::config::Config;
use crate::server::Server;
use crate::{env, health, logging, panics};

/// Wrong usage or configuration.
const USAGE: u8 = 2;
/// A failure at run time.
const FAILURE: u8 = 1;

/// Runs what the command line asks for.
pub fn run() -> ExitCode {
    env::return_large_buffers();
    let command = match cli::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(why) => return fail(USAGE, &why),
    };
    match command {
        Command::Version => print(concat!("claude-lb ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Help => print(cli::HELP),
        Command::Check { config } => with_config(config.as_deref(), |config| print(&config.show())),
        Command::Run { config } => {
            let file = cli::config_path(config.clone(), &|name| std::env::var(name).ok());
            with_config(config.as_deref(), |config| serve(config, file))
        }
        Command::Init { config } => exit(init(&cli::config_path(config, &|name| std::env::var(name).ok()))),
        Command::Health { config, url } => match url {
            Some(url) => exit(health::ask(&url)),
            None => with_config(config.as_deref(), |config| exit(health::ask(&health::url_of(config)))),
        },
        Command::Demo { once, port } => exit(crate::demo::run(once, port)),
    }
}

fn serve(config: &Config, file: PathBuf) -> ExitCode {
    logging::init(&config.logging);
    panics::watch();
    exit(Server::start(config, Some(file)).map(|server| {
        server.announce(config);
        server.run_until_signal(config.server.drain_timeout);
    }))
}

/// Writes the commented example where a configuration is looked for. Never over a file that is there.
fn init(path: &Path) -> Result<(), String> {
    const EXAMPLE: &str = include_str!("../config.yaml.example");
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            format!(
                "{} is there already and was not touched (give another name with --config)",
                path.display()
            )
        }
        _ => format!("cannot write {}: {error}", path.display()),
    };
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
    file.write_all(EXAMPLE.as_bytes()).map_err(failed)?;
    print(&format!(
        "Wrote {0}. Name your workspaces in it, set the variables it reads, then:\n  claude-lb --config {0} --check\n",
        path.display()
    ));
    Ok(())
}

fn with_config(path: Option<&Path>, run: impl FnOnce(&Config) -> ExitCode) -> ExitCode {
    let env = |name: &str| std::env::var(name).ok();
    let path = cli::config_path(path.map(Path::to_path_buf), &env);
    match Config::load(&path, &env) {
        Ok(config) => run(&config),
        Err(problems) => {
            for line in problems.lines() {
                complain(&line);
            }
            ExitCode::from(USAGE)
        }
    }
}

fn exit(result: Result<(), String>) -> ExitCode {
    result.map_or_else(|why| fail(FAILURE, &why), |()| ExitCode::SUCCESS)
}

fn fail(code: u8, why: &dyn Display) -> ExitCode {
    complain(&format!("claude-lb: {why}"));
    ExitCode::from(code)
}

/// A closed stderr or stdout is no reason to fail louder.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    ExitCode::SUCCESS
}
