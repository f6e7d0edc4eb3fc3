//! The workspaces' side, and the only room that names ureq.
//!
//! A [`Workspace`] sends one request and brings back status, headers and a body that can be read. It decides nothing:
//! what a failure means stands in `outcome`, and whether to try again in `retry`. The one exception is a pooled
//! connection that turns out closed: it is replaced by a fresh one, once, because that says nothing about anybody.

mod connections;
mod credential;
mod oauth;
mod pieces;
mod proxy;
mod resolver;
mod tls;
mod transport;
mod wait;

use std::borrow::Cow;
use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};
use ureq::http::uri::Scheme;
use ureq::http::{Request, Uri};
use ureq::unversioned::transport::{ConnectProxyConnector, Connector};
use ureq::{Agent, Error, SendBody};

use crate::config;
use crate::secret::Secret;
use connections::{Connections, IDLE_AGE, InUse};
use credential::{Credential, OAuth, TokenFile};
use pieces::{Payload, SentElsewhere};

pub use pieces::{Bytes, Pieces};
pub use resolver::CachingResolver;
pub use tls::Tls;
pub use wait::{Abort, Wait};

/// A shorter token is no real one, and may stand in a header by chance.
const TOKEN_BYTES_MIN: usize = 8;

/// What all workspaces share.
#[derive(Clone)]
pub struct Network {
    /// Certificate roots.
    pub tls: Tls,
    /// Names to addresses.
    pub resolver: CachingResolver,
    /// The longest a connect with its handshake may take.
    pub connect_timeout: Duration,
    /// How often a wait looks up, at most 500 ms.
    pub tick: Duration,
    /// Idle connections kept per workspace: one a worker.
    pub idle_connections: usize,
}

/// One endpoint's address, credential and connections.
pub struct Workspace {
    /// Its name in the configuration.
    pub name: String,
    url: String,
    credential: Credential,
    /// Headers that are set for this endpoint, in place of the client's.
    headers: Vec<(String, Secret)>,
    connections: Arc<Connections>,
}

/// A request as it goes to any workspace; every attempt sends the same bytes.
pub struct Outgoing<'a> {
    /// The client's query, without `?`.
    pub query: Option<&'a str>,
    /// The client's headers that pass, in wire order.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The body.
    pub body: &'a Pieces,
}

/// Status and headers of an answer; the body is still on the wire.
pub struct Incoming {
    /// The HTTP status.
    pub status: u16,
    headers: HeaderMap,
    body: ureq::Body,
    token: Secret,
    in_use: InUse,
}

impl Incoming {
    /// The first value of a header, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// What all Connection lines say, as one list, where they are text (RFC 9110 section 5.3).
    pub fn connection(&self) -> Option<Cow<'_, str>> {
        let mut values = self.headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
        let first = Cow::Borrowed(values.next()?);
        Some(values.fold(first, |all, next| format!("{all},{next}").into()))
    }

    /// All headers, but for those that quote the token that was sent: it is not the client's to know.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let quotes_token = |value: &[u8]| {
            let token = self.token.expose().as_bytes();
            let can_be_in = TOKEN_BYTES_MIN <= token.len() && token.len() <= value.len();
            can_be_in && memchr::memmem::find(value, token).is_some()
        };
        let all = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        all.filter(move |(_, value)| !quotes_token(value))
    }

    /// The length that was announced, in bytes.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length").and_then(|value| value.parse().ok())
    }

    /// The token that was sent, to mask it should the answer quote it.
    pub fn token(&self) -> &Secret {
        &self.token
    }

    /// The body. A read that finds nothing for one tick fails with `WouldBlock` and can simply be repeated. Dropped
    /// before its end, it closes the connection, and the workspace can stop working.
    pub fn into_body(self) -> impl Read {
        struct Reader<R>(R, #[expect(dead_code, reason = "it ends when the reader does")] InUse);
        impl<R: Read> Read for Reader<R> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(buffer)
            }
        }
        Reader(self.body.into_with_config().limit(u64::MAX).reader(), self.in_use)
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub struct SendError {
    /// What happened.
    pub kind: SendErrorKind,
    /// In words, for the log and the client.
    pub message: String,
}

/// What kept an answer from coming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendErrorKind {
    /// No token to send: the file cannot be read, or OAuth failed.
    Credential,
    /// The client's query or headers cannot be sent to anybody.
    Request,
    /// No connection.
    Connect,
    /// The connection ended or brought garbage before a status.
    NoAnswer,
    /// Given up from our side.
    Aborted(Abort),
}

impl Workspace {
    /// Prepares an endpoint. Nothing is connected yet.
    pub fn new(written: &config::Endpoint, network: &Network) -> Result<Self, String> {
        let url = format!("{}/anthropic/v1/messages", written.api_base);
        let uri: Uri = url.parse().map_err(|error| format!("{url}: {error}"))?;
        let connections = Connections::new(Box::new(agents(&uri, network)?));
        for (name, value) in &written.headers {
            HeaderName::from_bytes(name.as_bytes()).map_err(|error| error.to_string())?;
            HeaderValue::from_str(value.expose()).map_err(|error| error.to_string())?;
        }
        let headers = written.headers.clone();
        let credential = match &written.credential {
            config::Credential::Token(token) => Credential::Fixed(token.clone()),
            config::Credential::TokenFile(path) => Credential::File(TokenFile::new(path.clone())),
            config::Credential::OAuth { client_id, client_secret } => {
                let grant = oauth::Grant::new(&uri, client_id, client_secret, Arc::clone(&connections));
                Credential::OAuth(OAuth::new(Box::new(move || grant.fetch())))
            }
        };
        Ok(Self { name: written.name.clone(), url, credential, headers, connections })
    }

    /// Closes connections that have been idle for too long. To be called now and then; waits for nothing.
    pub fn release_idle(&self, now: Instant) {
        self.connections.release_idle(now);
    }

    /// Sends a request and waits for status and headers. `wait` is asked on every tick.
    pub fn send(&self, outgoing: &Outgoing<'_>, wait: &Rc<dyn Wait>) -> Result<Incoming, SendError> {
        let in_use = self.connections.begin();
        let (token, result, trace) = self.call(&in_use.agent, outgoing, wait, false)?;
        // Closed just as we sent, without a byte of answer: nobody's fault, and nobody has seen the request.
        let has_begun = trace.unresolved || trace.connecting || trace.received;
        let is_stale = result.is_err() && !has_begun && abort_of(&result).is_none();
        let (token, result, trace) =
            if is_stale { self.call(&in_use.agent, outgoing, wait, true)? } else { (token, result, trace) };
        let abort = abort_of(&result);
        match result {
            Ok(response) => {
                let (parts, body) = response.into_parts();
                Ok(Incoming { status: parts.status.as_u16(), headers: parts.headers, body, token, in_use })
            }
            Err(error) => {
                let kind = match abort {
                    Some(Abort::Connect) => SendErrorKind::Connect,
                    Some(abort) => SendErrorKind::Aborted(abort),
                    None if trace.connecting && !trace.connected => SendErrorKind::Connect,
                    None if trace.unresolved => SendErrorKind::Connect,
                    None => SendErrorKind::NoAnswer,
                };
                Err(SendError { kind, message: words(&error) })
            }
        }
    }

    #[allow(clippy::type_complexity)]
    fn call(
        &self,
        agent: &Agent,
        outgoing: &Outgoing<'_>,
        wait: &Rc<dyn Wait>,
        fresh_only: bool,
    ) -> Result<(Secret, Result<ureq::http::Response<ureq::Body>, Error>, wait::Trace), SendError> {
        let refused = |kind| move |message| SendError { kind, message };
        let token = self.credential.token().map_err(refused(SendErrorKind::Credential))?;
        let lines = self.lines(outgoing, &token).map_err(refused(SendErrorKind::Credential))?;
        let payload = Payload { lines, body: outgoing.body.clone() };
        let length = outgoing.body.len();
        let mut body = SentElsewhere { left: length };
        let request = self.request(outgoing, length).map_err(refused(SendErrorKind::Request))?;
        let request = request.map(|()| SendBody::from_reader(&mut body));
        let head_bytes = self.url.len() + outgoing.query.map_or(0, str::len);
        let is_tls = request.uri().scheme() == Some(&Scheme::HTTPS);
        let trace = wait::Trace { fresh_only, is_tls, head_bytes, ..wait::Trace::default() };
        let run = || agent.run(request);
        let (result, trace) = wait::during(Rc::clone(wait), trace, Some(payload), run);
        Ok((token, result, trace))
    }

    /// The request as ureq sees it. The headers are not its business, see `pieces`.
    fn request(&self, outgoing: &Outgoing<'_>, length: usize) -> Result<Request<()>, String> {
        let uri = match outgoing.query {
            Some(query) => format!("{}?{query}", self.url),
            None => self.url.clone(),
        };
        let request = Request::post(uri).header(CONTENT_LENGTH, length).body(());
        request.map_err(|_| "the query has a character that must be percent-encoded".into())
    }

    /// The client's headers, the endpoint's own in place of those of the same name, and the token.
    fn lines(&self, outgoing: &Outgoing<'_>, token: &Secret) -> Result<Vec<u8>, String> {
        if !token.expose().bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err("the token has a character that cannot stand in a header".into());
        }
        let is_set_here = |name: &str| {
            name.eq_ignore_ascii_case("authorization")
                || self.headers.iter().any(|(ours, _)| ours.eq_ignore_ascii_case(name))
        };
        let clients = outgoing.headers.iter().filter(|(name, _)| !is_set_here(name)).copied();
        let ours = self.headers.iter().map(|(name, value)| (name.as_str(), value.expose().as_bytes()));
        let mut lines = Vec::with_capacity(2 * 1024);
        for (name, value) in
            clients.chain(ours.filter(|(name, _)| !name.eq_ignore_ascii_case("authorization")))
        {
            for part in [name.as_bytes(), b": ", value, b"\r\n"] {
                lines.extend_from_slice(part);
            }
        }
        for part in ["authorization: Bearer ", token.expose(), "\r\n"] {
            lines.extend_from_slice(part.as_bytes());
        }
        Ok(lines)
    }
}

/// What makes agents for this address.
fn agents(uri: &Uri, network: &Network) -> Result<impl Fn() -> Agent + Send + Sync + use<>, String> {
    let (scheme, host) = (uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default());
    let proxy = proxy::for_host(scheme, host, &|name| std::env::var(name).ok());
    let proxy = proxy.map(|url| ureq::Proxy::new(&url)).transpose();
    let proxy =
        proxy.map_err(|_| format!("the proxy set in the environment for {host} is not a URL that works"))?;
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(proxy)
        .user_agent(ureq::config::AutoHeaderValue::None)
        .accept(ureq::config::AutoHeaderValue::None)
        .accept_encoding(ureq::config::AutoHeaderValue::None)
        .max_idle_connections(network.idle_connections)
        .max_idle_connections_per_host(network.idle_connections)
        .max_idle_age(IDLE_AGE)
        .build();
    let network = network.clone();
    Ok(move || {
        let (connect_timeout, tick) = (network.connect_timeout, network.tick);
        let connector =
            ().chain(ConnectProxyConnector::default())
                .chain(transport::TcpConnector { connect_timeout, tick })
                .chain(tls::TlsConnector(network.tls.clone()));
        Agent::with_parts(config.clone(), connector, network.resolver.clone())
    })
}

fn abort_of<T>(result: &Result<T, Error>) -> Option<Abort> {
    match result {
        Err(Error::Other(inner)) => inner.downcast_ref::<wait::Aborted>().map(|aborted| aborted.0),
        Err(Error::Io(error)) => {
            let inner = error.get_ref()?;
            if let Some(Error::Other(inner)) = inner.downcast_ref::<Error>() {
                return inner.downcast_ref::<wait::Aborted>().map(|aborted| aborted.0);
            }
            inner.downcast_ref::<wait::Aborted>().map(|aborted| aborted.0)
        }
        _ => None,
    }
}

/// The error in words. ureq's own text may quote a proxy's URL with its password, so that kind is left out.
fn words(error: &Error) -> String {
    match error {
        Error::Io(error) => error.to_string(),
        Error::InvalidProxyUrl => "the proxy's URL is not valid".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Patient;

    impl Wait for Patient {
        fn tick(&self) -> Result<(), Abort> {
            Ok(())
        }
    }

    /// A failed lookup looked like a pooled connection that turned out closed, and was made twice: when DNS did not
    /// answer, that was twice `timeouts.connect`.
    #[test]
    fn a_name_that_cannot_be_found_is_looked_up_once() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let lookup = move |_: &str| {
            count.fetch_add(1, Ordering::SeqCst);
            Err(std::io::Error::other("no such host"))
        };
        let second = Duration::from_secs(1);
        let network = Network {
            tls: Tls::new(&[]).unwrap(),
            resolver: CachingResolver::with_lookup(5 * second, second, Box::new(lookup)),
            connect_timeout: 5 * second,
            tick: second,
            idle_connections: 1,
        };
        let written = config::Endpoint {
            name: "w1".into(),
            api_base: "http://w.invalid/serving-endpoints".into(),
            credential: config::Credential::Token(Secret::new("t")),
            weight: 1,
            max_concurrent: None,
            models: Vec::new(),
            limits: config::EndpointLimits::default(),
            headers: Vec::new(),
        };
        let workspace = Workspace::new(&written, &network).unwrap();
        let body = Pieces::new(Arc::new(b"{}".to_vec()), Arc::default());
        let outgoing = Outgoing { query: None, headers: &[], body: &body };
        let wait: Rc<dyn Wait> = Rc::new(Patient);
        let error = workspace.send(&outgoing, &wait).err().unwrap();
        assert_eq!(
            (error.kind, asked.load(Ordering::SeqCst)),
            (SendErrorKind::Connect, 1),
            "{}",
            error.message
        );
    }
}
