//! Which headers pass through the proxy, each way.
//!
//! Everything passes but what belongs to one connection, to one host, or to the client alone. `anthropic-*` headers
//! are an open list and are never looked at here.

/// True when a request header goes upstream. `connection` is the value of the client's Connection header, which may
/// name further headers that end here (RFC 9110 section 7.6.1).
pub fn goes_upstream(name: &str, connection: Option<&str>) -> bool {
    const ENDS_HERE: Names = Names::new(&[
        "host",
        "content-length",
        "expect",
        // We relay bytes as they are and do not unpack them, but must be able to read a stream.
        "accept-encoding",
        // The client's credentials are for us.
        "authorization",
        "x-api-key",
        "api-key",
        "cookie",
        // A stranger must not speak for us.
        "x-claude-lb-endpoint",
        "x-claude-lb-attempts",
    ]);
    !HOP_BY_HOP.has(name) && !ENDS_HERE.has(name) && !is_named_in(connection, name)
}

/// True when a response header goes to the client. Length and coding are set anew for the client's connection.
pub fn goes_to_client(name: &str, connection: Option<&str>) -> bool {
    const ENDS_HERE: Names = Names::new(&["content-length", "x-claude-lb-endpoint", "x-claude-lb-attempts"]);
    !HOP_BY_HOP.has(name) && !ENDS_HERE.has(name) && !is_named_in(connection, name)
}

/// What belongs to one connection (RFC 9110 section 7.6.1).
const HOP_BY_HOP: Names = Names::new(&[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
]);

/// Header names in any case. Most that are asked for have a length or an initial that none of these has.
struct Names {
    /// Bit N stands for a name of N bytes.
    lengths: u64,
    /// Bit N stands for a name whose first byte is N modulo 32: a letter's case does not matter.
    initials: u32,
    names: &'static [&'static str],
}

impl Names {
    const fn new(names: &'static [&'static str]) -> Self {
        let (mut lengths, mut initials) = (0, 0);
        let mut at = 0;
        while at < names.len() {
            lengths |= 1 << names[at].len();
            initials |= 1 << (names[at].as_bytes()[0] % 32);
            at += 1;
        }
        Self { lengths, initials, names }
    }

    fn has(&self, name: &str) -> bool {
        let Some(initial) = name.bytes().next() else { return false };
        let is_like_one = name.len() < 64
            && self.lengths & (1 << name.len()) != 0
            && self.initials & (1 << (initial % 32)) != 0;
        is_like_one && self.names.iter().any(|known| known.eq_ignore_ascii_case(name))
    }
}

fn is_named_in(connection: Option<&str>, name: &str) -> bool {
    let long_enough = connection.filter(|value| value.len() >= name.len());
    long_enough.is_some_and(|value| value.split(',').any(|item| item.trim().eq_ignore_ascii_case(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_own_headers_stay_here() {
        for name in ["Host", "Authorization", "X-Api-Key", "Expect", "Accept-Encoding", "TE", "Connection"] {
            assert!(!goes_upstream(name, None), "{name}");
        }
        for name in ["anthropic-beta", "anthropic-version", "User-Agent", "X-Claude-Code-Session-Id", "x-app"]
        {
            assert!(goes_upstream(name, None), "{name}");
        }
    }

    #[test]
    fn names_of_any_length_are_looked_for() {
        for length in 0..200 {
            assert!(goes_upstream(&"x".repeat(length), None) && goes_to_client(&"x".repeat(length), None));
        }
        let all = HOP_BY_HOP.names.iter().chain(&["Content-Length", "X-CLAUDE-LB-ENDPOINT"]);
        for name in all {
            assert!(!goes_to_client(name, None) && !goes_upstream(&name.to_uppercase(), None), "{name}");
        }
    }

    #[test]
    fn connection_can_name_more() {
        assert!(!goes_upstream("X-Hop", Some("close, x-hop")));
        assert!(goes_upstream("X-Hop", Some("close, x-hop-2")));
        assert!(!goes_to_client("Keep-Alive", None));
        assert!(goes_to_client("Retry-After", Some("keep-alive")));
    }
}
