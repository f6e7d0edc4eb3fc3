//! OAuth for a machine: client id and secret against a token that lasts an hour.
//!
//! `POST https://<workspace>/oidc/v1/token`, basic auth, `grant_type=client_credentials&scope=all-apis` (Databricks
//! documentation, "Authorize service principal access with OAuth").

use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ureq::http::Uri;

use super::connections::Connections;
use super::wait::{self, Abort, Wait};
use super::words;
use crate::env;
use crate::secret::Secret;

/// The longest a token request may take.
const LIMIT: Duration = Duration::from_secs(15);

/// Asks for tokens.
pub(super) struct Grant {
    url: String,
    basic: Secret,
    connections: Arc<Connections>,
}

/// Gives a token request up when it takes too long.
struct Deadline(Instant);

impl Wait for Deadline {
    fn tick(&self) -> Result<(), Abort> {
        if env::now() < self.0 { Ok(()) } else { Err(Abort::FirstByte) }
    }
}

impl Grant {
    /// `uri` is any address in the workspace.
    pub(super) fn new(
        uri: &Uri,
        client_id: &Secret,
        client_secret: &Secret,
        connections: Arc<Connections>,
    ) -> Self {
        let (scheme, authority) = (uri.scheme_str().unwrap_or("https"), uri.authority());
        let url = format!("{scheme}://{}/oidc/v1/token", authority.map_or("", |a| a.as_str()));
        let pair = format!("{}:{}", client_id.expose(), client_secret.expose());
        let basic = Secret::new(format!("Basic {}", BASE64_STANDARD.encode(pair)));
        Self { url, basic, connections }
    }

    /// A new token and how long it lasts.
    pub(super) fn fetch(&self) -> Result<(Secret, Duration), String> {
        let limit: Rc<dyn Wait> = Rc::new(Deadline(env::now() + LIMIT));
        let (result, _) = wait::during(limit, wait::Trace::default(), None, || self.ask());
        result.map_err(|why| format!("OAuth at {}: {why}", self.url))
    }

    fn ask(&self) -> Result<(Secret, Duration), String> {
        #[derive(serde::Deserialize)]
        struct Granted {
            access_token: String,
            #[serde(default)]
            expires_in: Option<u64>,
        }
        let in_use = self.connections.begin();
        let answer = in_use
            .agent
            .post(&self.url)
            .header("authorization", self.basic.expose())
            .content_type("application/x-www-form-urlencoded")
            .send("grant_type=client_credentials&scope=all-apis")
            .map_err(|error| words(&error))?;
        let status = answer.status().as_u16();
        let mut text = String::new();
        let mut body = answer.into_body().into_reader().take(64 * 1024);
        body.read_to_string(&mut text).map_err(|error| error.to_string())?;
        if status != 200 {
            return Err(format!("status {status}: check client_id and client_secret"));
        }
        let granted: Granted = serde_json::from_str(&text).map_err(|_| "not a token answer".to_string())?;
        Ok((Secret::new(granted.access_token), Duration::from_secs(granted.expires_in.unwrap_or(3600))))
    }
}
