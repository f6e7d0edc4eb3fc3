//! Who answers what, and who may ask. Pure: (method, path, key) in, a target or a refusal out.

use std::sync::Arc;

use subtle::ConstantTimeEq;

use crate::front::{Pool, Route};
use crate::http::answer::Refusal;
use crate::http::head::{Framing, Head, shown};
use crate::secret::Secret;

/// Everything that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Relay a message.
    Messages,
    /// Estimate tokens here.
    CountTokens,
    /// The process lives.
    Live,
    /// It can serve.
    Ready,
    /// Its numbers.
    Stats,
    /// Why a request went where it went.
    Explain,
    /// Close breakers and end holds.
    Reset,
    /// Read the configuration again.
    Reload,
    /// Telemetry of the client, thrown away.
    EventLogging,
    /// A client warming its connection up.
    WarmUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    /// Open unless `auth.protect_admin` asks for a key.
    Admin,
    Key,
}

struct Row {
    path: &'static str,
    methods: &'static [&'static str],
    target: Target,
    access: Access,
}

const GET: &[&str] = &["GET", "HEAD"];
const POST: &[&str] = &["POST"];
const HEAD: &[&str] = &["HEAD"];

const fn row(path: &'static str, methods: &'static [&'static str], target: Target, access: Access) -> Row {
    Row { path, methods, target, access }
}

/// The one path that ends in a name.
const EXPLAIN: &str = "/explain/{request-id}";

/// The request that `/explain/{request-id}` asks about.
pub fn explained_id(path: &str) -> Option<&str> {
    path.strip_prefix("/explain/").filter(|id| !id.is_empty() && !id.contains('/'))
}

/// Paths with a `/` at their end are other paths: the client never sends them.
const TABLE: &[Row] = &[
    row("/v1/messages", POST, Target::Messages, Access::Key),
    row("/v1/messages/count_tokens", POST, Target::CountTokens, Access::Open),
    row("/health", GET, Target::Live, Access::Open),
    row("/health/live", GET, Target::Live, Access::Open),
    row("/health/ready", GET, Target::Ready, Access::Open),
    row("/stats", GET, Target::Stats, Access::Admin),
    row(EXPLAIN, GET, Target::Explain, Access::Admin),
    row("/reset", POST, Target::Reset, Access::Admin),
    row("/admin/reload", POST, Target::Reload, Access::Key),
    row("/api/event_logging/batch", POST, Target::EventLogging, Access::Open),
    row("/api/event_logging/v2/batch", POST, Target::EventLogging, Access::Open),
    row("/", HEAD, Target::WarmUp, Access::Open),
    row("/api/hello", HEAD, Target::WarmUp, Access::Open),
];

/// The largest body of a request whose body is not looked at.
const IGNORED_BODY_BYTES_MAX: usize = 1024 * 1024;

/// The keys that clients may use. Without any, every request may pass (`auth.mode: none`, loopback only).
pub struct Keys {
    list: Vec<(Arc<str>, Secret)>,
    /// Ask for a key on the admin routes, too.
    pub protect_admin: bool,
}

impl Keys {
    /// Named keys.
    pub fn new(list: impl IntoIterator<Item = (String, Secret)>, protect_admin: bool) -> Self {
        Self { list: list.into_iter().map(|(name, key)| (name.into(), key)).collect(), protect_admin }
    }

    /// True when a request with this key, or none, may ask for what needs one.
    pub fn admit(&self, key: Option<&str>) -> bool {
        key.is_some() || self.list.is_empty()
    }

    /// The name of the key in `x-api-key` or `Authorization: Bearer`; either may match, for the client can send both.
    pub fn find(&self, head: &Head) -> Option<Arc<str>> {
        let presented = head.headers().filter_map(|(name, value)| {
            if name.eq_ignore_ascii_case("x-api-key") {
                Some(value)
            } else if name.eq_ignore_ascii_case("authorization") {
                bearer(value)
            } else {
                None
            }
        });
        let mut found = None;
        for key in presented {
            // Every key is compared whatever was found before: the time tells nothing.
            for (name, known) in &self.list {
                if bool::from(known.expose().as_bytes().ct_eq(key)) {
                    found = Some(Arc::clone(name));
                }
            }
        }
        found
    }
}

/// The token of `Bearer <token>`; the scheme's case does not matter (RFC 9110 section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// What a path and method stand for.
pub fn target(method: &str, path: &str) -> Result<Target, Refusal> {
    find(method, path).map(|row| row.target)
}

fn find(method: &str, path: &str) -> Result<&'static Row, Refusal> {
    let plain = if explained_id(path).is_some() { EXPLAIN } else { path };
    let Some(row) = TABLE.iter().find(|row| row.path == plain) else {
        return Err(Refusal::new(404, format!("there is nothing at {} here", shown(path))));
    };
    if row.methods.contains(&method) {
        return Ok(row);
    }
    let allowed = row.methods.join(", ");
    Err(Refusal::new(405, format!("{} takes {allowed}, not {}", shown(path), shown(method)))
        .with("allow", allowed))
}

/// Decides by the head alone: who serves it, whose key it bears, or why it is turned away.
pub fn route(head: &Head, keys: &Keys, body_bytes_max: usize) -> Result<Route, Refusal> {
    let row = find(head.method(), head.path())?;
    let key = keys.find(head);
    let needs_key = match row.access {
        Access::Open => false,
        Access::Admin => keys.protect_admin,
        Access::Key => true,
    };
    if needs_key && !keys.admit(key.as_deref()) {
        return Err(Refusal::new(
            401,
            "neither x-api-key nor Authorization: Bearer holds a key of this proxy",
        ));
    }
    let (pool, body_bytes_max) = match row.target {
        Target::Messages => (Pool::Messages, body_bytes_max),
        Target::CountTokens => (Pool::Count, body_bytes_max),
        _ => (Pool::Quick, IGNORED_BODY_BYTES_MAX),
    };
    match head.framing() {
        Framing::Length(bytes) if bytes > body_bytes_max as u64 => {
            Err(Refusal::too_large(Some(bytes), body_bytes_max))
        }
        _ => Ok(Route { pool, key, body_bytes_max }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::{Verdict, judge};

    fn head(line: &str, headers: &str) -> Head {
        match judge(format!("{line} HTTP/1.1\r\n{headers}\r\n").as_bytes(), 65536) {
            Verdict::Complete(head) => *head,
            other => panic!("{other:?}"),
        }
    }

    fn keys(protect_admin: bool) -> Keys {
        let key = |name: &str, key: &str| (name.to_string(), Secret::new(key));
        Keys::new([key("alice", "key-a"), key("bob", "key-b")], protect_admin)
    }

    #[track_caller]
    fn check(line: &str, headers: &str, expected: Result<(Pool, Option<&str>), u16>) {
        let routed = route(&head(line, headers), &keys(false), 1000);
        let seen = routed.as_ref().map(|r| (r.pool, r.key.as_deref())).map_err(|refusal| refusal.status);
        assert_eq!(seen, expected, "{line} {headers:?}");
    }

    #[test]
    fn the_table_decides() {
        let a = "X-Api-Key: key-a\r\n";
        check("POST /v1/messages?beta=true", a, Ok((Pool::Messages, Some("alice"))));
        check("POST /v1/messages", "Authorization: bearer key-b\r\n", Ok((Pool::Messages, Some("bob"))));
        check(
            "POST /v1/messages",
            "x-api-key: wrong\r\nAuthorization: Bearer key-b\r\n",
            Ok((Pool::Messages, Some("bob"))),
        );
        for wrong in
            ["", "x-api-key: \r\n", "x-api-key: key-\r\n", "authorization: key-a\r\n", "api-key: key-a\r\n"]
        {
            check("POST /v1/messages", wrong, Err(401));
        }
        check("GET /v1/messages", a, Err(405));
        check("POST /v1/messages/", a, Err(404));
        check("POST /v1/messages/count_tokens?beta=true", "", Ok((Pool::Count, None)));
        check("GET /health", "", Ok((Pool::Quick, None)));
        check("HEAD /", "", Ok((Pool::Quick, None)));
        check("DELETE /stats", "", Err(405));
        check("GET /explain/req_1", "", Ok((Pool::Quick, None)));
        check("POST /explain/req_1", "", Err(405));
        check("GET /explain", "", Err(404));
        check("GET /explain/", "", Err(404));
        check("GET /explain/a/b", "", Err(404));
        check("GET /nowhere", "", Err(404));
        check("POST /admin/reload", "", Err(401));
        check("POST /admin/reload", a, Ok((Pool::Quick, Some("alice"))));
        check("POST /v1/messages", &format!("{a}Content-Length: 1001\r\n"), Err(413));
        check("POST /v1/messages", "Content-Length: 1001\r\n", Err(401));
    }

    #[test]
    fn protect_admin_asks_for_the_key_there_too() {
        for (line, status) in [
            ("GET /stats", Err(401)),
            ("GET /explain/req_1", Err(401)),
            ("POST /reset", Err(401)),
            ("GET /health", Ok(())),
        ] {
            let routed = route(&head(line, ""), &keys(true), 1000).map(|_| ()).map_err(|r| r.status);
            assert_eq!(routed, status, "{line}");
        }
    }

    #[test]
    fn a_405_names_what_is_allowed() {
        let refusal = target("PUT", "/v1/messages").unwrap_err();
        assert_eq!(refusal.headers, [("allow", "POST".to_string())]);
    }
}
