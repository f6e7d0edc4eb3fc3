//! Reading the configuration again: SIGHUP and `POST /admin/reload`.

use rustix::process::Signal;

use crate::support::client::{End, KEY, Request};
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, sse};

fn reload() -> Request {
    Request::new("POST", "/admin/reload").with("x-api-key", KEY)
}

#[test]
fn a_reload_harms_no_stream_and_keeps_what_is_known() {
    let gate = Gate::closed();
    let held = Reply::sse()
        .part(sse::message_start("msg_1"))
        .wait(&gate)
        .part(sse::block_start())
        .part(sse::ending());
    let (old, new) = (Upstream::script([held]), Upstream::always(Reply::message()));
    old.answer(|_| Reply::error(500, "anthropic-500.json"));
    let setup = Proxy::with(&[&old]).set("load_balancer.circuit_breaker_threshold", 100);
    let proxy = setup.start();
    let mut stream = proxy.connect();
    stream.send(&Request::stream());
    stream.head_and_body_until("message_start");
    assert_eq!(proxy.ask(&Request::message()).status(), 500);
    let before = proxy.endpoint("w1");
    proxy.rewrite(&setup.clone().and_endpoint_at(new.address()).endpoint(0, "weight", 0).yaml());
    proxy.signal(Signal::HUP);
    proxy.wait_log("reloaded");
    let after = proxy.endpoint("w1");
    for field in ["active_requests", "total_requests", "total_errors"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    assert_eq!(proxy.ask_who(&Request::message()), "w2", "the new endpoint serves at once");
    gate.open();
    assert_eq!(stream.rest(), ([sse::block_start(), sse::ending()].concat(), End::Complete));
    proxy.wait_idle();
}

/// Connections to a workspace that is no longer named end with the reload, those to others go on.
#[test]
fn a_workspace_that_is_gone_has_no_connections_left() {
    let (stays, goes) = (Upstream::always(Reply::message()), Upstream::always(Reply::message()));
    let proxy = Proxy::with(&[&stays, &goes]).set("load_balancer.strategy", "round_robin").start();
    for _ in 0..4 {
        assert_eq!(proxy.ask(&Request::message()).status(), 200);
    }
    stays.wait_open_connections(1);
    goes.wait_open_connections(1);
    proxy.rewrite(&Proxy::with(&[&stays]).set("load_balancer.strategy", "round_robin").yaml());
    assert_eq!(proxy.ask(&reload()).status(), 200);
    goes.wait_open_connections(0);
    assert_eq!(proxy.ask_who(&Request::message()), "w1");
    assert_eq!((stays.connections(), stays.count()), (1, 3), "the same connection as before");
}

#[test]
fn an_invalid_file_changes_nothing_and_is_explained() {
    let upstream = Upstream::always(Reply::message());
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    proxy.rewrite(&setup.clone().set("load_balancer.strategie", "random").set("server.port", -1).yaml());
    let message = proxy.ask(&reload()).error(400, "invalid_request_error");
    assert!(message.contains("strategie") && message.contains("port"), "{message}");
    proxy.signal(Signal::HUP);
    proxy.wait_log("not reloaded, nothing has changed");
    assert_eq!(proxy.ask_who(&Request::message()), "w1");
    proxy.rewrite(&setup.yaml());
    let answer = proxy.ask(&reload());
    assert_eq!((answer.status(), answer.json()["status"].as_str()), (200, Some("reloaded")));
}

/// A configuration that was piped in cannot be read again. To wait for it would have made the process deaf to signals.
#[test]
fn a_pipe_is_not_read_again() {
    let upstream = Upstream::always(Reply::message());
    let mut proxy = Proxy::with(&[&upstream]).start();
    proxy.replace_by_pipe();
    let message = proxy.ask(&reload()).error(400, "invalid_request_error");
    assert!(message.contains("can be read at the start only"), "{message}");
    proxy.signal(Signal::HUP);
    proxy.wait_log("not reloaded, nothing has changed");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.running.wait().code(), Some(0));
}

#[test]
fn reloading_needs_the_key() {
    let upstream = Upstream::always(Reply::message());
    let proxy = Proxy::with(&[&upstream]).start();
    proxy.ask(&Request::new("POST", "/admin/reload")).error(401, "authentication_error");
    assert_eq!(proxy.ask(&Request::get("/admin/reload")).status(), 405);
}

#[test]
fn keys_and_tokens_change_at_once() {
    let upstream = Upstream::start();
    upstream.answer(|request| match request.header("authorization") {
        Some("Bearer renewed") => Reply::message(),
        _ => Reply::error(403, "databricks-403-invalid-token.json"),
    });
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    assert_eq!(proxy.ask(&Request::message()).status(), 403);
    assert_eq!(proxy.ask(&Request::message()).status(), 503, "parked: its token is not accepted");
    let renewed =
        setup.endpoint(0, "token", "renewed").set("auth.api_keys", "[{ name: bob, key: bobs-key }]");
    proxy.rewrite(&renewed.yaml());
    assert_eq!(proxy.ask(&reload()).status(), 200);
    assert_eq!(proxy.ask_who(&Request::message()), "w1");
    assert_eq!(proxy.ask_who(&Request::message().without("x-api-key").with("x-api-key", "bobs-key")), "w1");
}

/// Connections of an endpoint that is written as before are kept; a token in a file is a matter of its own.
#[test]
fn an_unchanged_endpoint_keeps_its_connections() {
    let upstream = Upstream::always(Reply::message());
    let setup = Proxy::with(&[&upstream]);
    let proxy = setup.start();
    proxy.ask_who(&Request::message());
    proxy.rewrite(&setup.clone().set("load_balancer.max_attempts", 2).yaml());
    assert_eq!(proxy.ask(&reload()).status(), 200);
    proxy.ask_who(&Request::message());
    eventually("both requests", || (upstream.count() == 2).then_some(()));
    assert_eq!(upstream.connections(), 1);
}

/// The listener stays where it is, so a file that would be fine at the next start must not be let in now.
#[test]
fn a_reload_does_not_open_the_door() {
    let upstream = Upstream::always(Reply::message());
    let setup = Proxy::with(&[&upstream]).set("server.host", "0.0.0.0");
    let proxy = setup.start();
    let open = setup.set("server.host", "127.0.0.1").unset("auth.api_key").set("auth.mode", "none");
    proxy.rewrite(&open.yaml());
    let message = proxy.ask(&reload()).error(400, "invalid_request_error");
    assert!(message.contains("loopback"), "{message}");
    proxy.ask(&Request::message().without("x-api-key")).error(401, "authentication_error");
}
