//! Who may use the proxy, and what a secret may look like. Whatever is doubtful here is refused: it must
//! never become an open door.

use std::collections::HashMap;
use std::net::IpAddr;

use super::raw::{self, At, Field, Place, Reader, Text};
use super::resolve::{choice, name};
use super::{Auth, AuthMode, ClientKey};
use crate::secret::Secret;

/// `None` only after a problem was reported.
pub fn auth(field: Field<raw::Auth>, host: &str, reader: &mut Reader<'_>) -> Option<Auth> {
    let At { value: raw, place: section } = match field {
        Field::Given(at) => at,
        Field::Faulty => return None,
        Field::Absent => {
            reader.report_without_line("auth", NO_KEY);
            return None;
        }
    };
    let mode_place = raw.mode.place().cloned().unwrap_or_else(|| section.clone());
    let mode_is_given = !raw.mode.is_absent();
    let mode = choice(raw.mode, &[("key", AuthMode::Key), ("none", AuthMode::None)], reader);
    let mode_is_wrong = mode_is_given && mode.is_none();
    let mode = mode.unwrap_or(AuthMode::Key);
    let protect_admin = raw.protect_admin.given().is_some_and(|at| at.value);

    let list_is_empty = match &raw.api_keys {
        Field::Absent => true,
        Field::Faulty => false,
        Field::Given(at) => at.value.is_empty(),
    };
    let none_written = raw.api_key.is_absent() && list_is_empty;
    let keys = keys(raw.api_key, raw.api_keys, reader);
    match mode {
        AuthMode::Key if none_written && !mode_is_wrong => reader.report(&section, NO_KEY),
        AuthMode::None if !none_written => {
            reader.report(
                &mode_place,
                "`none` asks for no key, but there are keys (remove them, or write `mode: key`)",
            );
        }
        AuthMode::None if !is_loopback(host) => reader.report(
            &mode_place,
            "`none` would let everyone in the network use your workspaces (write `server.host: 127.0.0.1`, \
             or give a key)",
        ),
        AuthMode::None if protect_admin => {
            reader.report(
                &mode_place,
                "`none` leaves no key for `protect_admin: true` to ask for (remove one of them)",
            );
        }
        _ => {}
    }
    Some(Auth { mode, keys, protect_admin })
}

const NO_KEY: &str = "no key (write `auth.api_key: ${CLAUDE_LB_KEY}`; for a proxy that only this machine \
                      can reach, `auth.mode: none` with `server.host: 127.0.0.1`)";

/// All client keys: `api_key` first, under the name `default`.
fn keys(
    api_key: Field<Text>,
    api_keys: Field<Vec<At<raw::ClientKey>>>,
    reader: &mut Reader<'_>,
) -> Vec<ClientKey> {
    let mut keys = Keys::default();
    if let Some(at) = api_key.given() {
        let place = at.place.clone();
        if let Some(key) = secret(at, reader) {
            keys.add("default".to_owned(), &place, key, &place, reader);
        }
    }
    for At { value: raw, place } in api_keys.section() {
        for (field, key) in [(&raw.name, "name"), (&raw.key, "key")] {
            if field.is_absent() {
                reader.report(&place, format!("`{key}` is missing"));
            }
        }
        let (Some(name_at), Some(key_at)) = (raw.name.given(), raw.key.given()) else { continue };
        let (name_place, key_place) = (name_at.place.clone(), key_at.place.clone());
        let (name, key) = (name(name_at, reader), secret(key_at, reader));
        if let (Some(name), Some(key)) = (name, key) {
            keys.add(name, &name_place, key, &key_place, reader);
        }
    }
    keys.list
}

#[derive(Default)]
struct Keys {
    list: Vec<ClientKey>,
    places: HashMap<String, Place>,
    names: HashMap<String, String>,
}

impl Keys {
    fn add(
        &mut self,
        name: String,
        name_place: &Place,
        key: Secret,
        key_place: &Place,
        reader: &mut Reader<'_>,
    ) {
        if let Some(first) = self.places.get(&name) {
            let first = reader.line_words(first.id);
            reader.report(
                name_place,
                format!("another key has this name, {first} (each client needs its own)"),
            );
            return;
        }
        if let Some(other) = self.names.get(key.expose()) {
            reader
                .report(key_place, format!("the same key as that of `{other}` (each client needs its own)"));
            return;
        }
        self.places.insert(name.clone(), name_place.clone());
        self.names.insert(key.expose().to_owned(), name.clone());
        self.list.push(ClientKey { name, key });
    }
}

/// A token or key: what stands in a header. Blanks around it are dropped: `$(cat file)` and editors leave
/// them.
pub fn secret(at: At<Text>, reader: &mut Reader<'_>) -> Option<Secret> {
    let At { value: Text(text), place } = at;
    let text = text.trim_ascii();
    if text.is_empty() {
        return reader.fault(&place, "is empty (set it, or remove it)");
    }
    if text.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("bearer ")) {
        return reader.fault(&place, "begins with `Bearer` (write the token alone)");
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let what = "holds a blank, a line end or a character that is not ASCII, which cannot stand in a \
                    header (copy it again, without anything around it)";
        return reader.fault(&place, what);
    }
    Some(Secret::new(text))
}

fn is_loopback(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_what_no_other_machine_reaches() {
        for (host, expected) in [
            ("127.0.0.1", true),
            ("127.9.8.7", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("localhost", true),
            ("LocalHost", true),
            ("0.0.0.0", false),
            ("::", false),
            ("10.0.0.1", false),
            ("128.0.0.1", false),
            ("localhost.example.com", false),
            ("127.0.0.1.example.com", false),
            ("", false),
        ] {
            assert_eq!(is_loopback(host), expected, "for {host:?}");
        }
    }
}
