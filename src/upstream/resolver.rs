//! Names to addresses, remembered.
//!
//! ureq 3.5.2 looks a name up for every request, even when a pooled connection is at hand. Here an answer is good for
//! [`FRESH`]; after that it still serves while one thread fetches a new one, so that a DNS outage costs nothing that
//! was known before. Only the very first lookup of a name is waited for, and that wait ticks like any other.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::wait;
use crate::env;

/// How long an answer is used without asking again.
const FRESH: Duration = Duration::from_secs(30);
/// How long a failed lookup is believed while older addresses serve.
const RETRY_AFTER_FAILURE: Duration = Duration::from_secs(5);

pub(super) type Lookup = dyn Fn(&str) -> std::io::Result<Vec<SocketAddr>> + Send + Sync;

#[derive(Default)]
struct Entry {
    addresses: Vec<SocketAddr>,
    fresh_until: Option<Instant>,
    is_asking: bool,
    /// Counts finished lookups, so that a waiter knows that its own has ended.
    round: u64,
    error: Option<String>,
}

impl Entry {
    fn is_fresh(&self, now: Instant) -> bool {
        !self.addresses.is_empty() && self.fresh_until.is_some_and(|until| now < until)
    }
}

struct Shared {
    entries: Mutex<HashMap<String, Entry>>,
    changed: Condvar,
    lookup: Box<Lookup>,
}

/// A resolver that remembers. Cloning shares what it knows.
#[derive(Clone)]
pub struct CachingResolver {
    shared: Arc<Shared>,
    /// The longest the first lookup of a name is waited for.
    timeout: Duration,
    /// How often that wait looks up.
    tick: Duration,
}

impl std::fmt::Debug for CachingResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CachingResolver")
    }
}

impl CachingResolver {
    /// Asks the system's resolver.
    pub fn new(timeout: Duration, tick: Duration) -> Self {
        Self::with_lookup(timeout, tick, Box::new(|name| Ok(name.to_socket_addrs()?.collect())))
    }

    pub(super) fn with_lookup(timeout: Duration, tick: Duration, lookup: Box<Lookup>) -> Self {
        let shared = Shared { entries: Mutex::default(), changed: Condvar::new(), lookup };
        Self { shared: Arc::new(shared), timeout, tick }
    }

    /// The addresses of `host:port`.
    fn addresses(&self, name: &str) -> Result<Vec<SocketAddr>, Error> {
        if let Ok(literal) = name.parse() {
            return Ok(vec![literal]);
        }
        let now = env::now();
        let deadline = now + self.timeout;
        let mut entries = self.shared.entries.lock();
        if let Some(known) = entries.get(name).filter(|known| known.is_fresh(now)) {
            return Ok(known.addresses.clone());
        }
        let entry = entries.entry(name.to_string()).or_default();
        let round = entry.round;
        if !entry.is_asking && entry.fresh_until.is_none_or(|until| until <= now) {
            match self.ask(name.to_string()) {
                Ok(()) => entry.is_asking = true,
                Err(error) if entry.addresses.is_empty() => return Err(Error::Io(error)),
                Err(_) => {}
            }
        }
        loop {
            let entry = entries.entry(name.to_string()).or_default();
            if !entry.addresses.is_empty() {
                return Ok(entry.addresses.clone());
            }
            if entry.round > round {
                let why = entry.error.clone().unwrap_or_else(|| "the name has no address".into());
                return Err(Error::Io(std::io::Error::new(std::io::ErrorKind::NotFound, why)));
            }
            if self.shared.changed.wait_for(&mut entries, self.tick).timed_out() {
                if env::now() >= deadline {
                    return Err(Error::Io(std::io::Error::new(
                        std::io::ErrorKind::TimedOut,
                        "DNS lookup timed out",
                    )));
                }
                parking_lot::MutexGuard::unlocked(&mut entries, wait::tick)
                    .map_err(|aborted| Error::Other(Box::new(aborted)))?;
            }
        }
    }

    /// Looks the name up on a thread of its own: the system's resolver cannot be interrupted.
    fn ask(&self, name: String) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let work = move || {
            let found = (shared.lookup)(&name);
            shared.answer(&name, found);
        };
        std::thread::Builder::new().name("dns".into()).stack_size(256 * 1024).spawn(work).map(drop)
    }
}

impl Shared {
    fn answer(&self, name: &str, found: std::io::Result<Vec<SocketAddr>>) {
        let mut entries = self.entries.lock();
        let entry = entries.entry(name.to_string()).or_default();
        entry.is_asking = false;
        entry.round += 1;
        let now = env::now();
        match found {
            Ok(addresses) if !addresses.is_empty() => {
                entry.addresses = addresses;
                entry.fresh_until = Some(now + FRESH);
                entry.error = None;
            }
            Ok(_) => entry.error = Some("the name has no address".into()),
            Err(error) => entry.error = Some(error.to_string()),
        }
        if entry.error.is_some() && !entry.addresses.is_empty() {
            entry.fresh_until = Some(now + RETRY_AFTER_FAILURE);
        }
        self.changed.notify_all();
    }
}

impl Resolver for CachingResolver {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let authority = uri.authority().ok_or_else(|| Error::BadUri(uri.to_string()))?;
        let name = match authority.port() {
            Some(_) if !authority.as_str().contains('@') => Cow::Borrowed(authority.as_str()),
            port => {
                let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
                let port = port.map_or(usual, |port| port.as_u16());
                Cow::Owned(format!("{}:{port}", authority.host()))
            }
        };
        let mut result = self.empty();
        let found = self.addresses(&name);
        let found = found.inspect_err(|_| wait::note(|trace| trace.unresolved = true))?;
        for address in found.into_iter().take(16) {
            result.push(address);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SECOND: Duration = Duration::from_secs(1);

    fn resolver(
        answers: impl Fn(usize) -> std::io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> (CachingResolver, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let lookup = move |_: &str| answers(count.fetch_add(1, Ordering::SeqCst));
        (CachingResolver::with_lookup(5 * SECOND, SECOND / 100, Box::new(lookup)), asked)
    }

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 443))
    }

    fn expire(resolver: &CachingResolver, name: &str) {
        resolver.shared.entries.lock().get_mut(name).unwrap().fresh_until = Some(env::now());
    }

    /// ureq asked for every request: 10 requests on one pooled connection were 20 DNS queries.
    #[test]
    fn a_name_is_asked_for_once() {
        let (resolver, asked) = resolver(|_| Ok(vec![address(1)]));
        for _ in 0..10 {
            assert_eq!(resolver.addresses("w.net:443").unwrap(), [address(1)]);
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert_eq!(resolver.addresses("127.0.0.1:80").unwrap(), [SocketAddr::from(([127, 0, 0, 1], 80))]);
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn old_answers_serve_while_dns_is_down() {
        let (resolver, asked) = resolver(|round| match round {
            0 => Ok(vec![address(1)]),
            _ => Err(std::io::Error::other("no DNS")),
        });
        resolver.addresses("w.net:443").unwrap();
        expire(&resolver, "w.net:443");
        assert_eq!(resolver.addresses("w.net:443").unwrap(), [address(1)]);
        // The refresh runs beside us: wait for its end, then the old answer still serves.
        let mut entries = resolver.shared.entries.lock();
        while entries["w.net:443"].round < 2 {
            assert!(!resolver.shared.changed.wait_for(&mut entries, 5 * SECOND).timed_out());
        }
        drop(entries);
        assert_eq!(resolver.addresses("w.net:443").unwrap(), [address(1)]);
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn an_unknown_name_is_an_error_that_says_why() {
        let (resolver, _) = resolver(|_| Err(std::io::Error::other("no such host")));
        let error = resolver.addresses("nowhere.net:443").unwrap_err().to_string();
        assert!(error.contains("no such host"), "{error}");
    }
}
