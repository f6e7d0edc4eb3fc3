//! `claude-lb demo`: the real proxy in front of three fake workspaces, for a newcomer without any account.
//!
//! The proxy is started from the text of a configuration, like any other, so what is seen here is what it does. Only
//! the workspaces are fake: `workspace` is their sockets, `answer` their words on the wire, and `script` decides which
//! of them fails when. `tour` sends the requests that a newcomer watches, through `client` over a real socket, and
//! `show` prints. Nothing here is used by the proxy itself.

mod answer;
mod client;
mod script;
mod show;
mod tour;
mod workspace;

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::config::Config;
use crate::server::Server;
use crate::{logging, panics};
use script::{NAMES, Script};
use show::Show;
use tour::Tour;

/// What clients of the demo show. No secret: only this machine reaches the demo, and nothing but fakes is behind it.
const KEY: &str = "demo-key";
/// The port that the README's examples use, taken when it is free.
const PORT_WISHED: u16 = 8000;

/// Shows the proxy with embedded workspaces. With `once` it ends after its requests, and an error says which of them
/// went wrong; else it stays up until a signal.
pub fn run(once: bool, port: Option<u16>) -> Result<(), String> {
    let is_ending = Arc::new(AtomicBool::new(false));
    // Before the server takes the signals over, so that none falls between the two.
    hear_signals(once, &is_ending).map_err(|error| format!("demo: cannot wait for signals: {error}"))?;
    let script = Arc::new(Script::default());
    let workspaces = workspace::start_all(&script)
        .map_err(|error| format!("demo: cannot start a fake workspace on 127.0.0.1: {error}"))?;
    let config = |port| configuration(&workspaces, port);
    logging::init(&config(0)?.logging);
    panics::watch();
    let server = match port {
        Some(port) => Server::start(&config(port)?, None).map_err(|why| not_started(port, why))?,
        // Another program, or another demo, may have it; that is no reason to fail.
        None => Server::start(&config(PORT_WISHED)?, None).or_else(|_| Server::start(&config(0)?, None))?,
    };
    let tour = Tour { address: server.address(), script, is_ending: Arc::clone(&is_ending) };
    let mut show = Show::on_stdout();
    introduce(&mut show, &workspaces, server.address());
    if once { tour.run(&mut show) } else { stay(tour, show, &server, &config(0)?, &is_ending) }
}

/// With `once` a signal ends the process as usual, for a script must see that its command was interrupted; the server
/// alone would keep the signal for its drain. Else the tour is told, and the server drains.
fn hear_signals(once: bool, is_ending: &Arc<AtomicBool>) -> std::io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        if once {
            flag::register_conditional_default(signal, Arc::new(AtomicBool::new(true)))?;
        } else {
            flag::register(signal, Arc::clone(is_ending))?;
        }
    }
    Ok(())
}

/// The tour runs beside the wait for signals, so that Ctrl-C is heard from its first word on.
fn stay(
    tour: Tour,
    mut show: Show,
    server: &Server,
    config: &Config,
    is_ending: &Arc<AtomicBool>,
) -> Result<(), String> {
    if is_ending.load(Ordering::SeqCst) {
        return Ok(());
    }
    let told = Arc::clone(is_ending);
    let guide = std::thread::Builder::new().name("tour".into()).spawn(move || {
        let went = tour.run(&mut show);
        // Requests that met a closed port are what the person asked for.
        if told.load(Ordering::SeqCst) {
            return;
        }
        if let Err(why) = went {
            show.line(&why);
        }
        invite(&mut show, tour.address);
    });
    guide.map_err(|error| format!("demo: cannot start a thread: {error}"))?;
    let is_clean = server.run_until_signal(config.server.drain_timeout);
    let mut show = Show::on_stdout();
    show.line(if is_clean { "\nStopped." } else { "\nStopped; a running answer was cut off." });
    Ok(())
}

/// The configuration that the demo runs with; like one in a file, but for the warnings-only log.
fn configuration(workspaces: &[SocketAddr], port: u16) -> Result<Config, String> {
    let mut yaml = format!(
        "server: {{ host: 127.0.0.1, port: {port}, max_connections: 256, drain_timeout: 5 }}\n\
         auth: {{ api_key: {KEY} }}\n\
         logging: {{ level: warn }}\n\
         endpoints:\n"
    );
    for (number, address) in workspaces.iter().enumerate() {
        let (name, token) = (NAMES[number], workspace::token(number));
        let _ =
            writeln!(yaml, "  - {{ name: {name}, api_base: \"{}\", token: {token} }}", api_base(*address));
    }
    // LOG_LEVEL and LOG_FORMAT win here as everywhere, and may be wrong.
    Config::parse(&yaml, "demo", &|name| std::env::var(name).ok()).map_err(|problems| problems.to_string())
}

fn api_base(address: SocketAddr) -> String {
    format!("http://{address}/serving-endpoints")
}

/// The server's own words name a configuration file, which the demo does not have.
fn not_started(port: u16, why: String) -> String {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            format!("demo: another program uses port {port} (leave out --port for a free one, or end it)")
        }
        _ => format!("demo: {why}"),
    }
}

fn introduce(show: &mut Show, workspaces: &[SocketAddr], address: SocketAddr) {
    let version = env!("CARGO_PKG_VERSION");
    show.line(&format!("claude-lb {version} demo: three fake workspaces behind the real proxy\n"));
    for (name, address) in NAMES.iter().zip(workspaces) {
        show.line(&format!("  {name}  {}", api_base(*address)));
    }
    show.line(&format!("  claude-lb    http://{address}"));
}

/// What to do while it stays up. Each command works as printed.
fn invite(show: &mut Show, address: SocketAddr) {
    show.heading("It stays up. In another terminal:");
    if is_behind_proxy(&|name| std::env::var(name).ok()) {
        show.line("  export no_proxy=127.0.0.1 NO_PROXY=127.0.0.1   # you have a proxy set");
    }
    show.line(&format!(
        "  curl -N http://{address}/v1/messages \\\n    \
           -H 'x-api-key: {KEY}' -H 'content-type: application/json' \\\n    \
           -d '{{\"model\":\"claude-sonnet-4-5\",\"max_tokens\":99,\"stream\":true,\n         \
                \"messages\":[{{\"role\":\"user\",\"content\":\"Hello?\"}}]}}'\n  \
         curl http://{address}/stats"
    ));
    show.heading("With the real Claude Code; the answers are the fakes':");
    show.line(&format!(
        "  export ANTHROPIC_BASE_URL=http://{address}\n  export ANTHROPIC_API_KEY={KEY}\n  claude -p 'Hello?'"
    ));
    let flaky = NAMES[script::FLAKY];
    show.line(&format!(
        "\n{flaky} fails every third of your requests that it gets; you should not\nnotice. Ctrl-C ends the demo."
    ));
}

/// True when curl would ask a proxy for 127.0.0.1, which cannot work.
fn is_behind_proxy(env: &dyn Fn(&str) -> Option<String>) -> bool {
    let is_set = |name: &&str| env(name).is_some_and(|value| !value.is_empty());
    let excepts = |name: &str| env(name).is_some_and(|hosts| hosts == "*" || hosts.contains("127.0.0.1"));
    let proxies = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    proxies.iter().any(is_set) && !excepts("no_proxy") && !excepts("NO_PROXY")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_one_like_any_other() {
        let addresses: Vec<SocketAddr> = (1..4).map(|port| (Ipv4Addr::LOCALHOST, port).into()).collect();
        let config = configuration(&addresses, 0).unwrap();
        assert_eq!((config.server.host.as_str(), config.server.port), ("127.0.0.1", 0));
        let names: Vec<&str> = config.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
        assert_eq!(names, NAMES);
        assert_eq!(config.endpoints[2].api_base, "http://127.0.0.1:3/serving-endpoints");
    }

    #[test]
    fn a_proxy_is_mentioned_when_it_would_be_in_the_way() {
        for (vars, expected) in [
            ("", false),
            ("http_proxy=", false),
            ("http_proxy=http://p:1", true),
            ("ALL_PROXY=socks5://p:1", true),
            ("HTTPS_PROXY=http://p:1;NO_PROXY=localhost,127.0.0.1", false),
            ("http_proxy=http://p:1;no_proxy=*", false),
            ("http_proxy=http://p:1;no_proxy=a.net", true),
        ] {
            let env = |name: &str| {
                let mut pairs = vars.split(';').filter_map(|pair| pair.split_once('='));
                pairs.find(|pair| pair.0 == name).map(|pair| pair.1.to_string())
            };
            assert_eq!(is_behind_proxy(&env), expected, "{vars}");
        }
    }

    #[test]
    fn what_is_printed_fits_a_terminal() {
        let address = (Ipv4Addr::LOCALHOST, 65_535).into();
        let (mut show, printed) = Show::into_memory();
        introduce(&mut show, &[address; 3], address);
        invite(&mut show, address);
        let text = printed.text();
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
