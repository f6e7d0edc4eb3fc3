//! The conversation that a request belongs to, as `metadata.user_id` tells it.
//!
//! Claude Code sends a JSON text with a `session_id`; older clients a word that ends in `_session_<uuid>`. The
//! answer is a key for session affinity, so anything unreasonable is no session rather than an error.

use serde::Deserialize;

/// The longest session in bytes; a UUID has 36. It becomes a key of a table.
const SESSION_BYTES_MAX: usize = 128;

/// The longest `user_id` that is looked at in bytes; the clients send about 200.
const USER_ID_BYTES_MAX: usize = 8 * 1024;

/// The session named by a decoded `metadata.user_id`: visible ASCII, at most 128 bytes, else `None`.
pub fn session_of_user_id(user_id: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Ids {
        session_id: String,
    }
    if user_id.len() > USER_ID_BYTES_MAX {
        return None;
    }
    let session = match serde_json::from_str::<Ids>(user_id) {
        Ok(ids) => ids.session_id,
        Err(_) if user_id.trim_start().starts_with('{') => return None,
        Err(_) => user_id.rsplit_once("_session_")?.1.to_owned(),
    };
    let is_plausible = (1..=SESSION_BYTES_MAX).contains(&session.len())
        && session.bytes().all(|byte| byte.is_ascii_graphic());
    is_plausible.then_some(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions() {
        let uuid = "0f3c1d2e-4b5a-4c6d-8e7f-9a0b1c2d3e4f";
        let table = [
            (format!(r#"{{"device_id":"c1","account_uuid":"","session_id":"{uuid}"}}"#), Some(uuid)),
            (format!(r#" {{"session_id":"{uuid}","later":[1]}}"#), Some(uuid)),
            (format!("user_abc_account__session_{uuid}"), Some(uuid)),
            (format!("user_a_session_b_session_{uuid}"), Some(uuid)),
            (r#"{"session_id":""}"#.into(), None),
            (r#"{"session_id":7}"#.into(), None),
            (r#"{"session_id":"two words"}"#.into(), None),
            (r#"{"session_id":"line\nbreak"}"#.into(), None),
            (r#"{"session_id":"é"}"#.into(), None),
            (r#"{"device_id":"x_session_y"}"#.into(), None),
            (r#"{"session_id":"cut"#.into(), None),
            ("user_abc_session_".into(), None),
            ("user_abc".into(), None),
            ("".into(), None),
            ("[".repeat(5_000), None),
            (format!(r#"{{"session_id":"{}"}}"#, "x".repeat(129)), None),
            (format!("{}_session_{uuid}", "x".repeat(9_000)), None),
        ];
        for (user_id, wanted) in table {
            assert_eq!(session_of_user_id(&user_id).as_deref(), wanted, "{user_id:.80}");
        }
        let longest = "x".repeat(128);
        assert_eq!(session_of_user_id(&format!("_session_{longest}")), Some(longest));
    }
}
