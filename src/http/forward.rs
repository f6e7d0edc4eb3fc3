//! Which headers pass through the proxy, each way.
//!
//! Everything passes but what belongs to one connection, to one host, or to the client alone. `anthropic-*` headers
//! are an open list and are never looked at here.

/// True when a request header goes upstream. `connection` is the value of the client's Connection header, which may
/// name further headers that end here (RFC 9110 section 7.6.1).
pub fn goes_upstream(name: &str, connection: Option<&str>) -> bool {
    const ENDS_HERE: [&str; 10] = [
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
    ];
    !is_hop_by_hop(name) && !is_one_of(&ENDS_HERE, name) && !is_named_in(connection, name)
}

/// True when a response header goes to the client. Length and coding are set anew for the client's connection.
pub fn goes_to_client(name: &str, connection: Option<&str>) -> bool {
    const ENDS_HERE: [&str; 3] = ["content-length", "x-claude-lb-endpoint", "x-claude-lb-attempts"];
    !is_hop_by_hop(name) && !is_one_of(&ENDS_HERE, name) && !is_named_in(connection, name)
}

fn is_hop_by_hop(name: &str) -> bool {
    const HOP_BY_HOP: [&str; 10] = [
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
    ];
    is_one_of(&HOP_BY_HOP, name)
}

fn is_one_of(list: &[&str], name: &str) -> bool {
    list.iter().any(|known| known.eq_ignore_ascii_case(name))
}

fn is_named_in(connection: Option<&str>, name: &str) -> bool {
    connection.is_some_and(|value| value.split(',').any(|item| item.trim().eq_ignore_ascii_case(name)))
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
    fn connection_can_name_more() {
        assert!(!goes_upstream("X-Hop", Some("close, x-hop")));
        assert!(goes_upstream("X-Hop", Some("close, x-hop-2")));
        assert!(!goes_to_client("Keep-Alive", None));
        assert!(goes_to_client("Retry-After", Some("keep-alive")));
    }
}
