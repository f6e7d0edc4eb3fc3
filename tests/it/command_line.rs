//! What an operator types: flags, exit codes, configuration errors, signals, the demo.

use std::net::TcpStream;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::client::{Client, End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Finished, Folder, Proxy, Running, program, run, token};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{Stopwatch, eventually, sse};

fn run_with(arguments: &[&str]) -> Finished {
    let folder = Folder::new();
    let mut command = program();
    command.args(arguments).current_dir(folder.path());
    run(command)
}

/// `--check` of this configuration.
fn check(yaml: &str) -> Finished {
    let folder = Folder::new();
    let path = folder.write("config.yaml", yaml);
    let mut command = program();
    command.arg("--check").arg("--config").arg(&path);
    run(command)
}

fn healthy_yaml() -> String {
    Proxy::with(&[&Upstream::start()]).yaml()
}

#[test]
fn version_and_help_go_to_stdout() {
    let version = run_with(&["--version"]);
    assert_eq!(version.code, Some(0), "{}", version.err);
    assert_eq!(version.out.trim(), format!("claude-lb {}", env!("CARGO_PKG_VERSION")));
    let help = run_with(&["--help"]);
    assert_eq!(help.code, Some(0), "{}", help.err);
    for word in ["--config", "--check", "--version", "--help", "demo", "health"] {
        assert!(help.out.contains(word), "{word} in {}", help.out);
    }
    assert!(help.out.lines().all(|line| line.chars().count() <= 80), "fits 80 columns: {}", help.out);
}

#[test]
fn an_unknown_argument_is_a_usage_error() {
    for arguments in [&["--confgi", "x"][..], &["nonsense"], &["--config"]] {
        let finished = run_with(arguments);
        assert_eq!(finished.code, Some(2), "{arguments:?}: {}", finished.err);
        assert!(finished.err.starts_with("claude-lb: "), "{arguments:?}: {}", finished.err);
    }
}

#[test]
fn check_prints_the_resolved_configuration_without_a_secret() {
    let checked = check(&healthy_yaml());
    assert_eq!(checked.code, Some(0), "{}", checked.err);
    for word in
        ["w1", "least_requests", "first_byte", "max_body_bytes", "circuit_breaker_threshold", "127.0.0.1"]
    {
        assert!(checked.out.contains(word), "{word} in {}", checked.out);
    }
    for secret in [KEY, &token(0)] {
        assert!(
            !checked.out.contains(secret) && !checked.err.contains(secret),
            "{secret} in {}",
            checked.out
        );
    }
}

#[test]
fn variables_work_in_every_string_and_the_seeds_file_is_understood() {
    let folder = Folder::new();
    let yaml = "load_balancer:\n  strategy: round_robin\n  circuit_breaker_threshold: 5\n  circuit_breaker_timeout: 60\n\
        auth:\n  api_key: ${TEST_KEY}\n\
        endpoints:\n  - name: workspace-${TEST_NUMBER}\n    api_base: ${TEST_BASE}/serving-endpoints/\n    \
        token: ${TEST_TOKEN}\n    weight: 2\n";
    let path = folder.write("config.yaml", yaml);
    let mut command = program();
    command.arg("--check").env("CONFIG_PATH", &path);
    command.env("TEST_KEY", "key-of-the-test").env("TEST_NUMBER", "7").env("TEST_TOKEN", "token-of-the-test");
    command.env("TEST_BASE", "https://adb-1.azuredatabricks.net");
    let checked = run(command);
    assert_eq!(checked.code, Some(0), "{}", checked.err);
    for word in ["workspace-7", "https://adb-1.azuredatabricks.net/serving-endpoints", "round_robin"] {
        assert!(checked.out.contains(word), "{word} in {}", checked.out);
    }
    assert!(!checked.out.contains("of-the-test"), "{}", checked.out);
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let yaml = "server:\n  prot: 8000\nload_balancer:\n  strategy: fastest\nauth:\n  api_key: ${NO_SUCH_VARIABLE_HERE}\n\
        endpoints:\n  - name: w1\n    api_base: https://one.example\n    token: a\n  - name: w1\n    \
        api_base: https://two.example\n    token: b\n    weight: -1\n";
    let checked = check(yaml);
    assert_eq!(checked.code, Some(2), "{}", checked.err);
    assert!(checked.err.contains("config.yaml"), "the file is named: {}", checked.err);
    for word in ["prot", "port", "strategy", "NO_SUCH_VARIABLE_HERE", "weight", "name"] {
        assert!(checked.err.contains(word), "{word} in {}", checked.err);
    }
    for line in ["2", "4", "6"] {
        let named =
            checked.err.contains(&format!(":{line}")) || checked.err.contains(&format!("line {line}"));
        assert!(named, "line {line} in {}", checked.err);
    }
}

#[test]
fn each_mistake_refuses_to_start() {
    let endpoint = "endpoints:\n  - name: w1\n    api_base: https://one.example\n    token: t\n";
    let auth = "auth:\n  api_key: k\n";
    let cases = [
        ("no key at all", endpoint.to_owned(), "api_key"),
        ("an empty key", format!("auth:\n  api_key: \"\"\n{endpoint}"), "api_key"),
        (
            "an unset key",
            format!("auth:\n  api_key: ${{UNSET_KEY_VARIABLE}}\n{endpoint}"),
            "UNSET_KEY_VARIABLE",
        ),
        ("no door on every address", format!("auth:\n  mode: none\n{endpoint}"), "auth.mode"),
        ("no endpoints", auth.to_owned(), "endpoints"),
        ("an empty list", format!("{auth}endpoints: []\n"), "endpoints"),
        ("no token", format!("{auth}endpoints:\n  - name: w1\n    api_base: https://one.example\n"), "token"),
        ("no such scheme", format!("{auth}{}", endpoint.replace("https", "ftp")), "api_base"),
        ("not a number", format!("{auth}server:\n  workers: many\n{endpoint}"), "workers"),
        ("no workers", format!("{auth}server:\n  workers: 0\n{endpoint}"), "workers"),
        ("not YAML", "auth: [unclosed".to_owned(), ""),
        ("a list", "- a\n- b\n".to_owned(), ""),
        ("nothing", String::new(), ""),
    ];
    for (what, yaml, word) in cases {
        let checked = check(&yaml);
        assert_eq!(checked.code, Some(2), "{what}: {} {}", checked.out, checked.err);
        assert!(checked.err.contains(word), "{what}: {word} in {}", checked.err);
        assert!(!checked.err.contains("panicked"), "{what}: {}", checked.err);
    }
}

#[test]
fn a_missing_file_is_named() {
    for arguments in [&["--config", "no-such-file.yaml"][..], &["--check"]] {
        let finished = run_with(arguments);
        assert_eq!(finished.code, Some(2), "{}", finished.err);
        let name = if arguments.len() == 2 { "no-such-file.yaml" } else { "config.yaml" };
        assert!(finished.err.contains(name), "{}", finished.err);
    }
}

/// `python main.py`, as the README said, could not start (O13): the first start is what a newcomer sees.
#[test]
fn at_start_it_says_where_it_listens_and_what_to_export() {
    let proxy = Proxy::with(&[&Upstream::start()]).start();
    eventually("the start-up lines", || {
        let output = proxy.running.output();
        let words = ["ANTHROPIC_BASE_URL", "w1", &proxy.address().to_string()];
        words.iter().all(|word| output.contains(word)).then_some(())
    });
}

#[test]
fn a_port_in_use_is_a_runtime_error_that_names_it() {
    let upstream = Upstream::start();
    let taken = Proxy::with(&[&upstream]).start();
    let port = taken.address().port();
    let folder = Folder::new();
    let path = folder.write("config.yaml", &Proxy::with(&[&upstream]).set("server.port", port).yaml());
    let mut command = program();
    command.arg("--config").arg(&path);
    let finished = run(command);
    assert_eq!(finished.code, Some(1), "{}", finished.err);
    assert!(finished.err.contains(&port.to_string()) && finished.err.contains("port"), "{}", finished.err);
}

#[test]
fn the_health_command_asks_the_configured_address() {
    let upstream = Upstream::start();
    let mut proxy = Proxy::with(&[&upstream]).start();
    let folder = Folder::new();
    let yaml = Proxy::with(&[&upstream]).set("server.port", proxy.address().port()).yaml();
    let path = folder.write("config.yaml", &yaml);
    let health = || {
        let mut command = program();
        command.arg("health").arg("--config").arg(&path);
        run(command)
    };
    let healthy = health();
    assert_eq!(healthy.code, Some(0), "{}", healthy.err);
    proxy.signal(Signal::KILL);
    proxy.running.wait();
    let dead = health();
    assert_eq!(dead.code, Some(1), "{}", dead.out);
    assert!(!dead.err.is_empty());
}

#[test]
fn the_demo_runs_once_and_shows_the_workspaces() {
    let demo = run_with(&["demo", "--once"]);
    assert_eq!(demo.code, Some(0), "{}\n{}", demo.out, demo.err);
    assert!(demo.out.to_lowercase().matches("workspace").count() >= 3, "{}", demo.out);
    assert!(demo.out.lines().all(|line| line.chars().count() <= 100), "{}", demo.out);
}

#[test]
fn two_demos_can_run_side_by_side() {
    let codes = crate::support::together(2, |_| run_with(&["demo", "--once"]).code);
    assert_eq!(codes, [Some(0), Some(0)]);
}

#[test]
fn the_demo_stays_up_until_it_is_told_to_stop() {
    let mut command = program();
    command.arg("demo");
    let mut demo = Running::spawn(command);
    demo.out.wait("ANTHROPIC_BASE_URL");
    demo.out.wait("curl");
    assert!(demo.is_alive());
    demo.signal(Signal::INT);
    assert_eq!(demo.wait().code(), Some(0));
}

#[test]
fn a_term_or_int_signal_ends_it_with_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut proxy = Proxy::with(&[&Upstream::start()]).start();
        let mut idle = proxy.connect();
        assert_eq!(idle.ask(&Request::get("/health")).status(), 200);
        proxy.signal(signal);
        assert_eq!(proxy.running.wait().code(), Some(0), "an idle connection holds nothing up");
    }
}

#[test]
fn a_running_stream_is_finished_while_the_port_is_closed() {
    let gate = Gate::closed();
    let (opening, rest) = ([sse::message_start("msg_1"), sse::block_start()].concat(), sse::ending());
    let upstream = Upstream::script([Reply::sse().part(&opening).wait(&gate).part(&rest)]);
    let mut proxy = Proxy::with(&[&upstream]).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head();
    client.expect_body(&opening);
    proxy.signal(Signal::TERM);
    eventually("the port to close", || TcpStream::connect(proxy.address()).is_err().then_some(()));
    assert!(proxy.running.is_alive());
    gate.open();
    assert_eq!(client.rest(), (rest, End::Complete));
    assert_eq!(proxy.running.wait().code(), Some(0));
}

fn with_a_stalled_stream(drain: f64) -> (Upstream, Proxy, Client) {
    let upstream = Upstream::always(Reply::sse().part(sse::message_start("msg_1")).stall());
    let proxy = Proxy::with(&[&upstream]).set("server.drain_timeout", drain).start();
    let mut client = proxy.connect();
    client.send(&Request::stream());
    client.head_and_body_until("message_start");
    (upstream, proxy, client)
}

#[test]
fn draining_ends_at_its_limit() {
    let (_upstream, mut proxy, _client) = with_a_stalled_stream(0.3);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.running.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (_upstream, mut proxy, _client) = with_a_stalled_stream(600.0);
    proxy.signal(Signal::TERM);
    eventually("the port to close", || TcpStream::connect(proxy.address()).is_err().then_some(()));
    let watch = Stopwatch::start();
    proxy.signal(Signal::TERM);
    proxy.running.wait();
    assert!(watch.elapsed() < Duration::from_secs(10), "{:?}", watch.elapsed());
}

#[test]
fn init_writes_a_configuration_that_works_and_never_overwrites() {
    let folder = Folder::new();
    let init = || {
        let mut command = program();
        command.arg("init").current_dir(folder.path());
        run(command)
    };
    let written = init();
    assert_eq!(written.code, Some(0), "{}", written.err);
    let mut check = program();
    check.arg("--check").current_dir(folder.path());
    check.envs([("CLAUDE_LB_KEY", "k"), ("DATABRICKS_TOKEN_1", "t1"), ("DATABRICKS_TOKEN_2", "t2")]);
    let checked = run(check);
    assert_eq!(checked.code, Some(0), "{}", checked.err);
    folder.write("config.yaml", "mine");
    let again = init();
    assert_eq!(again.code, Some(1));
    assert!(again.err.contains("not touched"), "{}", again.err);
    assert_eq!(std::fs::read_to_string(folder.path().join("config.yaml")).unwrap(), "mine");
}
