//! Two instances behind HAProxy with the very configuration of `contrib/haproxy.cfg`: what `docs/SCALING.md` promises.
//!
//! Not part of a plain `cargo test`, because it needs HAProxy: `cargo test --test it replicas -- --ignored`. CI does so.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use socket2::{Domain, Socket, Type};

use crate::support::client::{Answer, Client, End, Request, ask};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Running, Setup};
use crate::support::reply::Reply;
use crate::support::upstream::Upstream;
use crate::support::{eventually, fixtures, sse};

const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/haproxy.cfg");
const NAMES: [&str; 2] = ["one", "two"];

/// The instances are told apart by the name that each has for the only workspace.
struct Replicas {
    haproxy: Running,
    address: SocketAddr,
    instances: BTreeMap<&'static str, Proxy>,
    /// Bound, but not listening: nobody else gets the port before HAProxy takes it, too.
    _port: Socket,
}

impl Replicas {
    fn in_front_of(upstream: &Upstream) -> Self {
        let instances: BTreeMap<_, _> =
            NAMES.into_iter().map(|name| (name, setup(upstream, name).start())).collect();
        let port = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a descriptor for one more socket");
        port.set_reuse_port(true).expect("Linux shares ports between sockets of one user");
        port.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free loopback port");
        let address = port.local_addr().expect("a bound socket").as_socket().expect("an IPv4 address");
        let usual = Path::new("/usr/sbin/haproxy");
        let mut command = Command::new(if usual.exists() { usual } else { Path::new("haproxy") });
        command.args(["-db", "-f", CONFIGURATION]).env("CLAUDE_LB_BIND", address.to_string());
        for (number, name) in NAMES.into_iter().enumerate() {
            command.env(format!("CLAUDE_LB_{}", number + 1), instances[name].address().to_string());
        }
        let haproxy = Running::spawn(command);
        eventually("HAProxy to listen", || TcpStream::connect(address).ok());
        Self { haproxy, address, instances, _port: port }
    }

    /// Who answers this session, over a connection of its own.
    fn instance_of(&self, session: &str) -> String {
        who(&ask(self.address, &message_in(session)))
    }

    fn wait_state(&self, name: &str, state: &str) {
        self.haproxy.out.wait(&format!("Server claude-lb/{name} is {state}"));
    }
}

/// The instance behind an answer that must be a good one.
fn who(answer: &Answer) -> String {
    assert_eq!((answer.status(), &answer.body), (200, &fixtures::message_json()), "{}", answer.text());
    answer.header("x-claude-lb-endpoint").expect("the answer names its endpoint").to_owned()
}

fn setup(upstream: &Upstream, name: &str) -> Setup {
    Proxy::with(&[upstream]).endpoint(0, "name", name).set("server.workers", 64)
}

/// Names as Claude Code makes them, the same in each run.
fn sessions(count: usize) -> Vec<String> {
    let mut chance = fastrand::Rng::with_seed(11);
    let mut name = || {
        let (a, b, c) = (chance.u32(..), chance.u32(..), chance.u64(..));
        format!("{a:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}", b >> 16, b & 0xfff, c >> 52, c & 0xffff_ffff_ffff)
    };
    (0..count).map(|_| name()).collect()
}

fn message_in(session: &str) -> Request {
    Request::message().with("X-Claude-Code-Session-Id", session)
}

fn stream_in(session: &str) -> Request {
    Request::stream().with("X-Claude-Code-Session-Id", session)
}

fn begun() -> Vec<u8> {
    [sse::message_start("msg_1"), sse::block_start(), sse::delta("begun")].concat()
}

fn rest() -> Vec<u8> {
    [sse::delta("ended"), sse::ending()].concat()
}

/// Streams that begin, and go on when the gate is opened.
fn stream_behind(gate: &Gate) -> Upstream {
    let upstream = Upstream::start();
    let gate = gate.clone();
    upstream.answer(move |request| match request.json()["stream"] == true {
        true => Reply::sse().part(begun()).wait(&gate).part(rest()),
        false => Reply::message(),
    });
    upstream
}

/// A stream that has begun, and who serves it.
fn begin(replicas: &Replicas, session: &str) -> (Client, String) {
    let mut client = Client::connect(replicas.address);
    client.send(&stream_in(session));
    let (head, body) = client.head_and_body_until("begun");
    assert_eq!((head.status, body), (200, begun()));
    let name = head.header("x-claude-lb-endpoint").expect("the answer names its endpoint").to_owned();
    (client, name)
}

#[test]
#[ignore = "needs HAProxy"]
fn sessions_stay_and_spread() {
    let upstream = Upstream::start();
    let replicas = Replicas::in_front_of(&upstream);
    // An odd number: taking turns would give each session the other instance in the next round.
    let sessions = sessions(199);
    let first: Vec<_> = sessions.iter().map(|session| replicas.instance_of(session)).collect();
    for name in NAMES {
        let share = first.iter().filter(|instance| *instance == name).count();
        assert!((60..=140).contains(&share), "{name} has {share} of 199 sessions");
    }
    // One kept connection for all sessions, as another proxy in front would have: each request counts by itself.
    let mut client = Client::connect(replicas.address);
    for (session, instance) in sessions.iter().zip(&first) {
        assert_eq!(who(&client.ask(&message_in(session))), *instance, "{session}, on a shared connection");
    }
    for (session, instance) in sessions.iter().zip(&first) {
        assert_eq!(replicas.instance_of(session), *instance, "{session}, asked again");
    }
}

#[test]
#[ignore = "needs HAProxy"]
fn requests_without_a_session_are_spread() {
    let upstream = Upstream::start();
    let replicas = Replicas::in_front_of(&upstream);
    let asked: Vec<_> = (0..40).map(|_| who(&ask(replicas.address, &Request::message()))).collect();
    let of_one = asked.iter().filter(|instance| *instance == "one").count();
    assert!((5..=35).contains(&of_one), "{of_one} of 40 went to the first");
}

#[test]
#[ignore = "needs HAProxy"]
fn streams_pass_as_they_come_and_large_bodies_whole() {
    let gate = Gate::closed();
    let upstream = stream_behind(&gate);
    let replicas = Replicas::in_front_of(&upstream);
    // The first events are read while the gate is closed: nothing waited for the rest.
    let (mut client, _) = begin(&replicas, &sessions(1)[0]);
    gate.open();
    assert_eq!(client.rest(), (rest(), End::Complete));
    let text = "x".repeat(3_000_000);
    let body = format!(
        r#"{{"model":"claude-sonnet-4-5","max_tokens":9,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    );
    let answer = ask(replicas.address, &message_in("large").body(&body));
    assert_eq!((answer.status(), answer.body), (200, fixtures::message_json()));
    let recorded = upstream.wait_requests(2);
    assert_eq!(recorded[1].json()["messages"][0]["content"], text);
}

#[test]
#[ignore = "needs HAProxy"]
fn what_concerns_one_instance_is_not_reached_through_both() {
    let upstream = Upstream::start();
    let replicas = Replicas::in_front_of(&upstream);
    for path in ["/stats", "/metrics", "/reset", "/admin/reload", "/explain/req_1"] {
        assert_eq!(ask(replicas.address, &Request::get(path)).status(), 404, "{path}");
    }
    assert_eq!(ask(replicas.address, &Request::get("/health")).status(), 200);
    let wrong = Request::message().without("x-api-key").with("x-api-key", "wrong");
    assert_eq!(ask(replicas.address, &wrong).status(), 401);
}

#[test]
#[ignore = "needs HAProxy"]
fn a_killed_instance_takes_only_its_own_streams_along() {
    let gate = Gate::closed();
    let upstream = stream_behind(&gate);
    let mut replicas = Replicas::in_front_of(&upstream);
    let sessions = sessions(16);
    let streams: Vec<_> = sessions.iter().map(|session| begin(&replicas, session)).collect();
    let before: Vec<_> = streams.iter().map(|(_, instance)| instance.clone()).collect();
    assert!(NAMES.iter().all(|name| before.iter().any(|instance| instance == name)), "{before:?}");

    let killed = replicas.instances.get_mut("one").expect("the first instance");
    let port = killed.address().port();
    killed.signal(Signal::KILL);
    killed.running.wait();
    let (of_killed, of_other): (Vec<_>, Vec<_>) =
        streams.into_iter().partition(|(_, instance)| instance == "one");
    for (mut client, _) in of_killed {
        let (bytes, end) = client.rest();
        assert!(end.is_broken() && bytes.is_empty(), "{end:?} after {bytes:?}");
    }
    gate.open();
    for (mut client, _) in of_other {
        assert_eq!(client.rest(), (rest(), End::Complete));
    }
    // Before HAProxy has noticed, and after: nobody is refused, and those of the other instance stay.
    for session in &sessions {
        assert_eq!(replicas.instance_of(session), "two");
    }
    replicas.wait_state("one", "DOWN");
    for session in &sessions {
        assert_eq!(replicas.instance_of(session), "two");
    }
    // It comes back, and so do its sessions.
    let again = setup(&upstream, "one").set("server.port", port).start();
    replicas.instances.insert("one", again);
    replicas.wait_state("one", "UP");
    let after: Vec<_> = sessions.iter().map(|session| replicas.instance_of(session)).collect();
    assert_eq!(after, before);
}

#[test]
#[ignore = "needs HAProxy"]
fn a_draining_instance_finishes_its_streams_and_gets_no_more() {
    let gate = Gate::closed();
    let upstream = stream_behind(&gate);
    let mut replicas = Replicas::in_front_of(&upstream);
    let sessions = sessions(16);
    let streams: Vec<_> = sessions.iter().map(|session| begin(&replicas, session)).collect();
    let draining = &replicas.instances["one"];
    draining.signal(Signal::TERM);
    eventually("the port to close", || TcpStream::connect(draining.address()).is_err().then_some(()));
    for session in &sessions {
        assert_eq!(replicas.instance_of(session), "two");
    }
    replicas.wait_state("one", "DOWN");
    gate.open();
    for (mut client, instance) in streams {
        assert_eq!(client.rest(), (rest(), End::Complete), "a stream of {instance}");
    }
    let drained = replicas.instances.get_mut("one").expect("the first instance");
    assert_eq!(drained.running.wait().code(), Some(0));
}
