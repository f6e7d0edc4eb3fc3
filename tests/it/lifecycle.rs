//! From the start to the end of the process: signals, reloads under load, as the first process of a container. What
//! an operator types, and the simple cases, stand in `command_line.rs` and `reload.rs`.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::client::{Client, End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::{Folder, Proxy, Running, program, run};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures, sse, together};

fn stream_behind(gate: &Gate) -> Reply {
    Reply::sse().part(sse::message_start("msg_1")).wait(gate).part(sse::block_start()).part(sse::ending())
}

fn expect_port_closed(proxy: &Proxy) {
    eventually("the port to close", || TcpStream::connect(proxy.address()).is_err().then_some(()));
}

/// A probe on a connection that was open before sees why it should go elsewhere.
#[test]
fn readiness_is_a_503_while_draining() {
    let gate = Gate::closed();
    let upstream = Upstream::script([stream_behind(&gate)]);
    let mut proxy = Proxy::with(&[&upstream]).start();
    let mut stream = proxy.connect();
    stream.send(&Request::stream());
    stream.head_and_body_until("message_start");
    let mut probe = proxy.connect();
    let head = Request::get("/health/ready").bytes();
    probe.send_bytes(&head[..20]);
    eventually("the probe to be known", || (proxy.stats()["process"]["connections"] == 3).then_some(()));
    proxy.signal(Signal::TERM);
    expect_port_closed(&proxy);
    probe.send_bytes(&head[20..]);
    let answer = probe.answer();
    assert_eq!((answer.status(), answer.header("connection")), (503, Some("close")), "{}", answer.text());
    assert!(answer.text().contains("draining"), "{}", answer.text());
    gate.open();
    assert_eq!(stream.rest().1, End::Complete);
    assert_eq!(proxy.running.wait().code(), Some(0));
}

/// Sent before the signal, on a connection that was idle or one that is new: served. The process ended while such
/// requests were in the kernel's buffers.
#[test]
fn a_request_that_came_before_the_signal_is_served() {
    let upstream = Upstream::start();
    together(4, |place| {
        for round in 0..6 {
            let mut proxy = Proxy::with(&[&upstream]).start();
            let mut idle: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
            for client in &mut idle {
                assert_eq!(client.ask(&Request::get("/health")).status(), 200);
            }
            let mut fresh: Vec<Client> = (0..4).map(|_| proxy.connect()).collect();
            for client in idle.iter_mut().chain(&mut fresh) {
                client.send(&Request::message());
            }
            proxy.signal(if (place + round) % 2 == 0 { Signal::TERM } else { Signal::INT });
            for client in idle.iter_mut().chain(&mut fresh) {
                let answer = client.answer();
                assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
            }
            assert_eq!(proxy.running.wait().code(), Some(0));
        }
    });
}

/// Small bodies are waited for without a thread; that is a running request all the same.
#[test]
fn a_body_that_is_arriving_is_waited_for() {
    let upstream = Upstream::start();
    for padding in [10, 600, 40_000] {
        let mut proxy = Proxy::with(&[&upstream]).start();
        let body = format!(r#"{{"model":"claude-sonnet-4-5","x":"{}"}}"#, "y".repeat(padding));
        let bytes = Request::post_message(body).bytes();
        let mut client = proxy.connect();
        client.send_bytes(&bytes[..bytes.len() - 5]);
        eventually("the request to be known", || {
            (proxy.stats()["process"]["connections"] == 2).then_some(())
        });
        proxy.signal(Signal::TERM);
        expect_port_closed(&proxy);
        client.send_bytes(&bytes[bytes.len() - 5..]);
        assert_eq!(client.answer().status(), 200, "{padding}");
        assert_eq!(proxy.running.wait().code(), Some(0));
    }
}

/// Half a head is given a second, not the ten of `timeouts.head`: a container has to end.
#[test]
fn half_a_head_does_not_hold_the_end_up() {
    let mut proxy = Proxy::with(&[&Upstream::start()]).set("timeouts.head", 600).start();
    let mut half = proxy.connect();
    half.send_bytes(b"GET /hea");
    eventually("the connection to be known", || (proxy.stats()["process"]["connections"] == 2).then_some(()));
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.running.wait().code(), Some(0));
    assert_ne!(half.expect_closed(), End::Complete);
}

/// Twenty reloads, valid and not, while streams run: none is harmed, and no workspace is blamed.
#[test]
fn reloads_under_load_harm_no_stream() {
    let (one, two) = (Upstream::start(), Upstream::start());
    let setup = Proxy::with(&[&one, &two]);
    let proxy = setup.start();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = proxy.connect();
                while !is_over.load(Ordering::SeqCst) {
                    let answer = client.ask(&Request::stream());
                    assert_eq!((answer.body, answer.end), (fixtures::transcript("text"), End::Complete));
                }
            });
        }
        let reload = Request::new("POST", "/admin/reload").with("x-api-key", KEY);
        for round in 0..20 {
            let setup = setup.clone().endpoint(0, "weight", round % 3).set("timeouts.connect", 5 + round % 2);
            let is_valid = round % 4 != 3;
            let setup = if is_valid { setup } else { setup.set("server.workers", "many") };
            proxy.rewrite(&setup.yaml());
            assert_eq!(proxy.ask(&reload).status(), if is_valid { 200 } else { 400 });
        }
        is_over.store(true, Ordering::SeqCst);
    });
    proxy.wait_idle();
    for name in ["w1", "w2"] {
        assert_eq!(proxy.number(name, "total_errors"), 0);
    }
    assert_eq!(proxy.stats()["process"]["reloads"], 15);
}

/// A workspace that gets a new token by way of a file: nothing is reloaded, no request fails.
#[test]
fn a_token_file_is_read_again_when_it_changes() {
    let upstream = Upstream::start();
    let folder = Folder::new();
    let file = folder.write("token", "token-one\n");
    let setup = Proxy::with(&[&upstream]).endpoint_unset(0, "token");
    let proxy = setup.endpoint(0, "token_file", file.display()).start();
    assert_eq!(proxy.ask(&Request::message()).status(), 200);
    fs::write(&file, "token-two-which-is-longer\n").expect("the file is ours");
    eventually("the new token to be sent", || {
        assert_eq!(proxy.ask(&Request::message()).status(), 200);
        let last = upstream.requests().pop()?;
        (last.header("authorization") == Some("Bearer token-two-which-is-longer")).then_some(())
    });
    assert_eq!(proxy.number("w1", "total_errors"), 0);
}

#[test]
fn a_configuration_that_cannot_be_read_is_one_clear_message() {
    let folder = Folder::new();
    let garbage = folder.path().join("garbage.yaml");
    fs::write(&garbage, [0xff, 0xfe, 0x00, 0x80]).expect("the folder is ours");
    for (path, word) in [
        (folder.path().to_path_buf(), "directory"),
        (garbage, "UTF-8"),
        (folder.path().join("none.yaml"), "none.yaml"),
    ] {
        let mut command = program();
        command.arg("--config").arg(&path);
        let finished = run(command);
        assert_eq!(finished.code, Some(2), "{path:?}: {}", finished.err);
        assert!(
            finished.err.contains(&*path.to_string_lossy()) && finished.err.contains(word),
            "{word}: {}",
            finished.err
        );
        assert_eq!(finished.err.lines().count(), 1, "{}", finished.err);
    }
}

/// The first process of a PID namespace gets no default action for signals, and the orphans of others.
#[test]
fn as_the_first_process_of_a_container_it_ends_when_told() {
    let works = Command::new("unshare").args(["-pf", "--mount-proc", "true"]).output();
    if !works.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no PID namespace to be had here");
        return;
    }
    let upstream = Upstream::start();
    for signal in [Signal::TERM, Signal::INT] {
        let setup = Proxy::with(&[&upstream]);
        let mut proxy =
            setup.through_shell("exec unshare -pf --mount-proc --kill-child \"$0\" \"$@\"").start();
        assert_eq!(proxy.ask(&Request::stream()).status(), 200);
        let first = only_child(&proxy.running);
        assert_eq!(proxy.ask(&Request::get("/health")).status(), 200);
        assert_eq!(children(first).len(), 0, "it starts no processes, so it leaves none behind");
        kill_process(Pid::from_raw(first).expect("a process id"), signal).expect("it runs");
        assert_eq!(proxy.running.wait().code(), Some(0), "{signal:?}");
    }
}

fn children(process: i32) -> Vec<i32> {
    let path = format!("/proc/{process}/task/{process}/children");
    let text = fs::read_to_string(Path::new(&path)).unwrap_or_default();
    text.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

fn only_child(running: &Running) -> i32 {
    let parent = i32::try_from(running.id()).expect("a process id");
    eventually("the program in its namespace", || children(parent).first().copied())
}
