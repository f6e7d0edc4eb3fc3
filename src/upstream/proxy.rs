//! Which HTTP proxy a workspace is reached through: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, as curl reads
//! them. Pure; the environment is passed in.
//!
//! ureq reads these variables itself, but takes HTTP_PROXY for https, keeps blanks in NO_PROXY, and sends loopback
//! addresses through the proxy. The last is the most common trap on company laptops.

/// The proxy's URL for a host, or none.
pub(super) fn for_host(scheme: &str, host: &str, env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let is_loopback = host == "localhost"
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    // HTTP_PROXY in capitals can be set by a web client through CGI; curl ignores it for that reason, but we are no
    // CGI program and people do set it.
    let names: &[&str] = match scheme {
        "https" => &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"],
        _ => &["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"],
    };
    let set = |names: &[&str]| names.iter().find_map(|name| env(name).filter(|value| !value.is_empty()));
    let proxy = set(names)?;
    let no_proxy = set(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let is_excepted = no_proxy.split(',').any(|entry| is_match(entry.trim(), host));
    (!is_loopback && !is_excepted).then_some(proxy)
}

/// `*`, the host itself, or a domain it lies in; a leading dot or star is allowed.
fn is_match(entry: &str, host: &str) -> bool {
    if entry == "*" {
        return true;
    }
    let domain = entry.trim_start_matches('*').trim_start_matches('.').to_ascii_lowercase();
    let host = host.to_ascii_lowercase();
    !domain.is_empty()
        && (host == domain || host.strip_suffix(&domain).is_some_and(|front| front.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_as_curl_reads_it() {
        for (scheme, host, vars, expected) in [
            ("https", "a.net", "HTTPS_PROXY=http://p:1", Some("http://p:1")),
            ("http", "a.net", "HTTPS_PROXY=http://p:1", None),
            ("https", "a.net", "HTTP_PROXY=http://p:1", None),
            ("https", "a.net", "all_proxy=http://p:1", Some("http://p:1")),
            ("https", "a.net", "HTTPS_PROXY=;ALL_PROXY=http://p:1", Some("http://p:1")),
            ("http", "127.0.0.1", "HTTP_PROXY=http://p:1", None),
            ("http", "localhost", "HTTP_PROXY=http://p:1", None),
            ("http", "[::1]", "HTTP_PROXY=http://p:1", None),
            ("https", "a.net", "HTTPS_PROXY=http://p:1;NO_PROXY=b.net, a.net", None),
            ("https", "x.a.net", "HTTPS_PROXY=http://p:1;NO_PROXY=a.net", None),
            ("https", "x.a.net", "HTTPS_PROXY=http://p:1;NO_PROXY=.A.net", None),
            ("https", "xa.net", "HTTPS_PROXY=http://p:1;NO_PROXY=a.net", Some("http://p:1")),
            ("https", "x.net", "HTTPS_PROXY=http://p:1;no_proxy=*", None),
        ] {
            let env = |name: &str| {
                vars.split(';')
                    .find_map(|pair| pair.split_once('=').filter(|(n, _)| *n == name))
                    .map(|p| p.1.into())
            };
            assert_eq!(for_host(scheme, host, &env).as_deref(), expected, "{host} with {vars}");
        }
    }
}
