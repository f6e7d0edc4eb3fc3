//! The workspaces: their address, credential, share, models and headers.

use std::collections::HashMap;

use super::auth::secret;
use super::raw::{self, At, Field, Number, Pairs, Place, Reader, Text};
use super::resolve::{name, names, path_at, whole};
use super::{Credential, Endpoint, EndpointLimits, Quota};
use crate::secret::Secret;

/// All endpoints without problems; those with problems were reported.
pub fn endpoints(field: Field<Vec<At<raw::Endpoint>>>, reader: &mut Reader<'_>) -> Vec<Endpoint> {
    let At { value: items, place } = match field {
        Field::Given(at) => at,
        Field::Faulty => return Vec::new(),
        Field::Absent => {
            reader.report_without_line("endpoints", "missing (list at least one workspace)");
            return Vec::new();
        }
    };
    if items.is_empty() {
        reader.report(&place, "the list is empty (list at least one workspace)");
        return Vec::new();
    }
    let (count, mut seen, mut endpoints) = (items.len(), HashMap::new(), Vec::new());
    for item in items {
        endpoints.extend(endpoint(item, &mut seen, reader));
    }
    if endpoints.len() == count && endpoints.iter().all(|endpoint| endpoint.weight == 0) {
        reader.report(
            &place,
            "every weight is 0, so that no request could be sent (give one a weight of 1 or more)",
        );
    }
    endpoints
}

fn endpoint(
    item: At<raw::Endpoint>,
    seen: &mut HashMap<String, Place>,
    reader: &mut Reader<'_>,
) -> Option<Endpoint> {
    let At { value: raw, place } = item;
    let name = match raw.name {
        Field::Absent => reader.fault(&place, "`name` is missing (any word that is unique)"),
        field => field.given().and_then(|at| unique_name(at, seen, reader)),
    };
    let api_base = match raw.api_base {
        Field::Absent => reader.fault(&place, format!("`api_base` is missing (write {API_BASE_EXAMPLE})")),
        field => field.given().and_then(|at| api_base(at, reader)),
    };
    let credential = credential(raw.token, raw.token_file, raw.oauth, &place, reader);
    let weight = whole(raw.weight, 1, 0, 1_000_000, reader);
    let max_concurrent = match raw.max_concurrent {
        Field::Absent => None,
        field => Some(whole(field, 1, 1, 1_000_000, reader)),
    };
    let models = names(raw.models, reader);
    let limits = limits(raw.limits.section(), reader);
    let headers = headers(raw.headers.section(), reader);
    Some(Endpoint {
        name: name?,
        api_base: api_base?,
        credential: credential?,
        weight,
        max_concurrent,
        models,
        limits,
        headers,
    })
}

fn unique_name(at: At<Text>, seen: &mut HashMap<String, Place>, reader: &mut Reader<'_>) -> Option<String> {
    let place = at.place.clone();
    let name = name(at, reader)?;
    if let Some(first) = seen.get(&name) {
        let first = reader.line_words(first.id);
        return reader
            .fault(&place, format!("another endpoint has this name, {first} (names must be unique)"));
    }
    seen.insert(name.clone(), place);
    Some(name)
}

fn api_base(at: At<Text>, reader: &mut Reader<'_>) -> Option<String> {
    let At { value: Text(text), place } = at;
    match checked_api_base(&text) {
        Ok(api_base) => Some(api_base),
        Err(what) => reader.fault(&place, what),
    }
}

/// The address without slashes at its end, or what is wrong with it. The text is not quoted: it may hold a
/// password.
fn checked_api_base(text: &str) -> Result<String, String> {
    let text = text.trim_ascii();
    if text.is_empty() {
        return Err(format!("is empty (write {API_BASE_EXAMPLE})"));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!("must begin with https:// or http:// (write {API_BASE_EXAMPLE})"));
    };
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "https" && scheme != "http" {
        return Err(format!("must begin with https:// or http:// (write {API_BASE_EXAMPLE})"));
    }
    if rest.contains(['?', '#']) {
        return Err(format!("must have no `?` or `#` (write {API_BASE_EXAMPLE})"));
    }
    let rest = rest.trim_end_matches('/');
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    if authority.contains('@') {
        return Err("must have no user or password (the token has its own key, `token`)".to_owned());
    }
    if !is_authority(authority) {
        return Err(format!("has no valid host and port (write {API_BASE_EXAMPLE})"));
    }
    if !path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&byte)) {
        return Err("has a character that cannot stand in a URL (write it as %XX)".to_owned());
    }
    for tail in ["/anthropic/v1/messages", "/anthropic/v1", "/anthropic"] {
        if path.ends_with(tail) {
            return Err(format!("ends in `{tail}`, which the proxy adds itself (remove that part)"));
        }
    }
    if path.ends_with("/invocations") {
        return Err(format!(
            "ends in `/invocations`, which takes another format than Anthropic's (write {API_BASE_EXAMPLE})"
        ));
    }
    Ok(format!("{scheme}://{authority}{path}"))
}

const API_BASE_EXAMPLE: &str = "https://adb-123.azuredatabricks.net/serving-endpoints";

/// `host`, `host:port`, `[IPv6]` or `[IPv6]:port`.
fn is_authority(authority: &str) -> bool {
    let (host_is_valid, port) = if let Some(rest) = authority.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        (address.parse::<std::net::Ipv6Addr>().is_ok(), port)
    } else {
        let (host, port) = authority.find(':').map_or((authority, ""), |at| authority.split_at(at));
        let is_host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        (
            !host.is_empty()
                && !host.starts_with('.')
                && !host.contains("..")
                && host.bytes().all(is_host_byte),
            port,
        )
    };
    let port_is_valid = match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|byte| byte.is_ascii_digit())
                && digits.parse::<u16>().is_ok_and(|port| port > 0)
        }
        None => port.is_empty(),
    };
    host_is_valid && port_is_valid
}

/// Exactly one of the three ways.
fn credential(
    token: Field<Text>,
    token_file: Field<Text>,
    oauth: Field<raw::OAuth>,
    endpoint: &Place,
    reader: &mut Reader<'_>,
) -> Option<Credential> {
    let ways =
        [("token", token.is_absent()), ("token_file", token_file.is_absent()), ("oauth", oauth.is_absent())];
    let present: Vec<&str> = ways.iter().filter(|(_, is_absent)| !is_absent).map(|(key, _)| *key).collect();
    if present.is_empty() {
        return reader.fault(endpoint, "`token` is missing (or write `token_file` or `oauth`)");
    }
    if present.len() > 1 {
        let what = format!("has {} at once (keep one of them)", present.join(" and "));
        reader.report(endpoint, what);
    }
    let token = token.given().and_then(|at| secret(at, reader)).map(Credential::Token);
    let file = token_file.given().and_then(|at| path_at(at, reader)).map(Credential::TokenFile);
    let oauth = oauth.given().and_then(|at| principal(at, reader));
    token.or(file).or(oauth)
}

fn principal(at: At<raw::OAuth>, reader: &mut Reader<'_>) -> Option<Credential> {
    let At { value: raw, place } = at;
    let mut part = |field: Field<Text>, key: &str| match field {
        Field::Absent => reader.fault(&place, format!("`{key}` is missing")),
        field => field.given().and_then(|at| secret(at, reader)),
    };
    let client_id = part(raw.client_id, "client_id");
    let client_secret = part(raw.client_secret, "client_secret");
    Some(Credential::OAuth { client_id: client_id?, client_secret: client_secret? })
}

fn limits(raw: raw::EndpointLimits, reader: &mut Reader<'_>) -> EndpointLimits {
    let each = Quota {
        input: limit(raw.input_tokens_per_minute, reader),
        output: limit(raw.output_tokens_per_minute, reader),
        requests: limit(raw.requests_per_hour, reader),
    };
    let mut models = Vec::new();
    for (pattern, At { value: raw, .. }) in raw.models.section().0 {
        let own = Quota {
            input: limit(raw.input_tokens_per_minute, reader),
            output: limit(raw.output_tokens_per_minute, reader),
            requests: limit(raw.requests_per_hour, reader),
        };
        models.extend(
            name(At { value: Text(pattern.value), place: pattern.place }, reader).map(|glob| (glob, own)),
        );
    }
    EndpointLimits { each, models }
}

fn limit(field: Field<Number>, reader: &mut Reader<'_>) -> Option<u64> {
    let is_given = field.place().is_some();
    let number = whole(field, 1, 1, u32::MAX, reader);
    is_given.then_some(u64::from(number))
}

fn headers(pairs: Pairs, reader: &mut Reader<'_>) -> Vec<(String, Secret)> {
    let mut headers: Vec<(String, Secret)> = Vec::new();
    for (header, value) in pairs.0 {
        let name = header.value.to_ascii_lowercase();
        if let Err(what) = check_header_name(&name) {
            reader.report(&header.place, what);
        } else if headers.iter().any(|(other, _)| *other == name) {
            reader
                .report(&header.place, "is given twice (upper and lower case are the same in a header name)");
        } else if let Some(value) = header_value(value, reader) {
            headers.push((name, value));
        }
    }
    headers
}

fn check_header_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty()
        || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
    {
        return Err("not a header name (letters, digits and `-`)");
    }
    match name {
        "authorization" | "proxy-authorization" | "x-api-key" | "cookie" => {
            Err("a header for credentials, which the proxy sets itself (write `token`)")
        }
        "connection" | "keep-alive" | "proxy-authenticate" | "proxy-connection" | "te" | "trailer"
        | "transfer-encoding" | "upgrade" | "host" | "content-length" | "expect" | "accept-encoding" => {
            Err("a header of the connection, which the proxy sets itself (remove it)")
        }
        _ => Ok(()),
    }
}

fn header_value(at: At<Text>, reader: &mut Reader<'_>) -> Option<Secret> {
    let At { value: Text(text), place } = at;
    let text = text.trim_ascii();
    if text.is_empty() {
        return reader.fault(&place, "is empty (set it, or remove it)");
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ' || byte == b'\t') {
        return reader.fault(
            &place,
            "holds a line end or a character that is not ASCII, which cannot stand in a header",
        );
    }
    Some(Secret::new(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_trimmed() {
        for (text, expected) in [
            ("https://adb-1.net/serving-endpoints", "https://adb-1.net/serving-endpoints"),
            ("https://adb-1.net/serving-endpoints///", "https://adb-1.net/serving-endpoints"),
            (" HTTPS://adb-1.net/ai-gateway\n", "https://adb-1.net/ai-gateway"),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("http://[::1]:8080/x", "http://[::1]:8080/x"),
            ("http://[::1]", "http://[::1]"),
            ("https://h/anthropic-proxy", "https://h/anthropic-proxy"),
        ] {
            assert_eq!(checked_api_base(text), Ok(expected.to_owned()), "for {text:?}");
        }
    }

    #[test]
    fn wrong_addresses_are_refused_with_the_remedy() {
        let example = API_BASE_EXAMPLE;
        let scheme = format!("must begin with https:// or http:// (write {example})");
        let host = format!("has no valid host and port (write {example})");
        let question = format!("must have no `?` or `#` (write {example})");
        let appended =
            |tail: &str| format!("ends in `{tail}`, which the proxy adds itself (remove that part)");
        for (text, expected) in [
            ("", format!("is empty (write {example})")),
            ("adb-1.net/serving-endpoints", scheme.clone()),
            ("ftp://adb-1.net", scheme),
            ("https://", host.clone()),
            ("https:///serving-endpoints", host.clone()),
            ("https://a b", host.clone()),
            ("https://h:", host.clone()),
            ("https://h:0", host.clone()),
            ("https://h:+1", host.clone()),
            ("https://h:99999", host.clone()),
            ("https://[::1", host.clone()),
            ("https://[x]", host.clone()),
            ("https://工.net", host.clone()),
            ("https://h..net", host),
            ("https://h/x?o=1", question.clone()),
            ("https://h/x#a", question),
            (
                "https://user:pass@h/x",
                "must have no user or password (the token has its own key, `token`)".to_owned(),
            ),
            ("https://h/a b", "has a character that cannot stand in a URL (write it as %XX)".to_owned()),
            ("https://h/serving-endpoints/anthropic/v1/messages/", appended("/anthropic/v1/messages")),
            ("https://h/serving-endpoints/anthropic/v1", appended("/anthropic/v1")),
            ("https://h/serving-endpoints/anthropic/", appended("/anthropic")),
            (
                "https://h/serving-endpoints/m/invocations",
                format!(
                    "ends in `/invocations`, which takes another format than Anthropic's (write {example})"
                ),
            ),
        ] {
            assert_eq!(checked_api_base(text), Err(expected), "for {text:?}");
        }
    }

    #[test]
    fn header_names_are_checked() {
        for name in ["x-databricks-use-coding-agent-mode", "anthropic-beta", "user-agent"] {
            assert_eq!(check_header_name(name), Ok(()), "for {name:?}");
        }
        for name in ["", "a b", "a:b", "é", "host", "authorization", "x-api-key", "te", "content-length"] {
            assert!(check_header_name(name).is_err(), "for {name:?}");
        }
    }
}
