//! The bearer token of a workspace: written in the configuration, kept in a file, or fetched by OAuth.
//!
//! No lock is held over I/O: whoever finds the token old marks itself as the one who renews it, the others go on with
//! the old one while it lasts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};

use crate::env;
use crate::secret::Secret;

/// How often a token file is looked at.
const FILE_CHECK: Duration = Duration::from_secs(1);
/// How long before its end an OAuth token is renewed.
const RENEW_EARLY: Duration = Duration::from_secs(120);
/// An OAuth token is not believed for longer than this, whatever its server says.
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long a request waits for another request's renewal.
const RENEWAL_WAIT: Duration = Duration::from_secs(20);

/// Fetches a new OAuth token: the token and how long it lasts.
pub(super) type Fetch = dyn Fn() -> Result<(Secret, Duration), String> + Send + Sync;

/// Where the token of one endpoint comes from.
pub(super) enum Credential {
    Fixed(Secret),
    File(TokenFile),
    OAuth(OAuth),
}

impl Credential {
    /// The token to send now, or why there is none.
    pub(super) fn token(&self) -> Result<Secret, String> {
        match self {
            Self::Fixed(token) => Ok(token.clone()),
            Self::File(file) => file.token(env::now()),
            Self::OAuth(oauth) => oauth.token(env::now()),
        }
    }
}

/// A token in a file that another program renews.
pub(super) struct TokenFile {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    token: Option<Secret>,
    stamp: Option<(SystemTime, u64)>,
    checked_at: Option<Instant>,
}

impl TokenFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::default() }
    }

    fn token(&self, now: Instant) -> Result<Secret, String> {
        {
            let mut known = self.known.lock();
            let is_recent = known.checked_at.is_some_and(|at| now.saturating_duration_since(at) < FILE_CHECK);
            if let Some(token) = known.token.clone().filter(|_| is_recent) {
                return Ok(token);
            }
            known.checked_at = Some(now);
        }
        let stamp = std::fs::metadata(&self.path).and_then(|m| Ok((m.modified()?, m.len()))).ok();
        {
            let known = self.known.lock();
            if let Some(token) = known.token.clone().filter(|_| stamp.is_some() && stamp == known.stamp) {
                return Ok(token);
            }
        }
        let read = read_token(&self.path);
        let mut known = self.known.lock();
        match read {
            Ok(token) => {
                (known.token, known.stamp) = (Some(token.clone()), stamp);
                Ok(token)
            }
            // While the file is being replaced, the token read before is the best there is.
            Err(why) => known.token.clone().ok_or(why),
        }
    }
}

fn read_token(path: &Path) -> Result<Secret, String> {
    let named = |why: &dyn std::fmt::Display| format!("token_file {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    let token = text.trim();
    if token.is_empty() {
        return Err(named(&"the file is empty"));
    }
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(named(&"the token has a character that cannot stand in a header"));
    }
    Ok(Secret::new(token))
}

/// A token fetched with client id and secret.
pub(super) struct OAuth {
    fetch: Box<Fetch>,
    state: Mutex<Renewal>,
    renewed: Condvar,
}

#[derive(Default)]
struct Renewal {
    token: Option<(Secret, Instant)>,
    is_running: bool,
    error: Option<String>,
}

impl OAuth {
    pub(super) fn new(fetch: Box<Fetch>) -> Self {
        Self { fetch, state: Mutex::default(), renewed: Condvar::new() }
    }

    fn token(&self, now: Instant) -> Result<Secret, String> {
        let by = now + RENEWAL_WAIT;
        let mut state = self.state.lock();
        loop {
            let live = state.token.clone().filter(|(_, until)| now < *until);
            match live {
                Some((token, until)) if now + RENEW_EARLY < until || state.is_running => return Ok(token),
                None if state.is_running => {
                    if self.renewed.wait_until(&mut state, by).timed_out() {
                        return Err("OAuth: the token request takes too long".into());
                    }
                    // The same request again would fail the same way, and each in the crowd would wait for the next.
                    if let Some(error) = state.error.clone().filter(|_| !state.is_running) {
                        return Err(error);
                    }
                }
                _ => break,
            }
        }
        (state.is_running, state.error) = (true, None);
        drop(state);
        let fetched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.fetch)()))
            .unwrap_or_else(|_| Err("OAuth: the token request failed in the proxy".into()));
        let mut state = self.state.lock();
        state.is_running = false;
        self.renewed.notify_all();
        match fetched {
            Ok((token, lifetime)) => {
                // A lifetime shorter than the early renewal would renew on every request.
                let lifetime = lifetime.clamp(RENEW_EARLY + Duration::from_secs(30), LIFETIME_MAX);
                state.token = Some((token.clone(), now + lifetime));
                Ok(token)
            }
            Err(why) => {
                let old = state.token.clone().filter(|(_, until)| now < *until);
                state.error = Some(why.clone());
                old.map(|(token, _)| token).ok_or(why)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, OnceLock, Weak};

    fn text(token: Result<Secret, String>) -> Result<String, String> {
        token.map(|t| t.expose().to_string())
    }

    #[test]
    fn a_token_file_is_read_again_when_it_changes() {
        let path = std::env::temp_dir().join(format!("claude-lb-token-{}", std::process::id()));
        std::fs::write(&path, "first\n").unwrap();
        let (file, now) = (TokenFile::new(path.clone()), env::now());
        assert_eq!(text(file.token(now)).unwrap(), "first");
        std::fs::write(&path, "second token").unwrap();
        assert_eq!(text(file.token(now)).unwrap(), "first", "not looked at within the second");
        // A bad file (a blank inside) does not replace what worked.
        assert_eq!(text(file.token(now + FILE_CHECK)).unwrap(), "first");
        std::fs::write(&path, "second").unwrap();
        assert_eq!(text(file.token(now + 2 * FILE_CHECK)).unwrap(), "second");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text(file.token(now + 3 * FILE_CHECK)).unwrap(), "second");
        let error = TokenFile::new(path).token(now).unwrap_err();
        assert!(error.contains("token_file"), "{error}");
    }

    #[test]
    fn an_oauth_token_is_fetched_once_and_renewed_before_its_end() {
        let count = Arc::new(AtomicUsize::new(0));
        let fetched = Arc::clone(&count);
        let oauth = OAuth::new(Box::new(move || match fetched.fetch_add(1, Ordering::SeqCst) {
            2 => Err("down".into()),
            n => Ok((Secret::new(format!("t{n}")), Duration::from_secs(3600))),
        }));
        let now = env::now();
        let minute = Duration::from_secs(60);
        assert_eq!(text(oauth.token(now)).unwrap(), "t0");
        assert_eq!(text(oauth.token(now + 57 * minute)).unwrap(), "t0");
        assert_eq!(text(oauth.token(now + 59 * minute)).unwrap(), "t1");
        // The renewal fails, but the token still lives.
        assert_eq!(text(oauth.token(now + 118 * minute)).unwrap(), "t1");
        assert_eq!(text(oauth.token(now + 120 * minute)).unwrap(), "t3");
        assert_eq!(count.load(Ordering::SeqCst), 4);
    }

    /// While the token server was down and the old token had ended, each request in a crowd asked in turn: the last
    /// one waited for all of them.
    #[test]
    fn a_failed_renewal_is_the_answer_for_all_who_waited_for_it() {
        let fetches = Arc::new(AtomicUsize::new(0));
        let (count, itself) = (Arc::clone(&fetches), Arc::new(OnceLock::<Weak<OAuth>>::new()));
        let crowd = Arc::clone(&itself);
        let oauth = Arc::new(OAuth::new(Box::new(move || {
            if count.fetch_add(1, Ordering::SeqCst) == 0 {
                return Ok((Secret::new("t"), Duration::MAX));
            }
            let oauth = crowd.get().and_then(Weak::upgrade).unwrap();
            while oauth.renewed.notify_all() < 3 {
                std::thread::yield_now();
            }
            Err("down".into())
        })));
        itself.set(Arc::downgrade(&oauth)).unwrap();
        let now = env::now();
        assert_eq!(text(oauth.token(now)).unwrap(), "t", "a lifetime without end is no panic");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(text(oauth.token(now + LIFETIME_MAX)).unwrap_err(), "down"));
            }
        });
        assert_eq!(fetches.load(Ordering::SeqCst), 2);
        let broken = OAuth::new(Box::new(|| panic!("a fault of ours")));
        assert!(
            text(broken.token(now)).is_err() && text(broken.token(now)).is_err(),
            "and nobody waits for it"
        );
    }
}
