//! Watches every connection on which nothing runs.
//!
//! One thread, one poller, one-shot events. When bytes arrive, the head is peeked at and judged; then the request goes
//! to its lane, or is refused on the spot. Nothing here waits: answers to refused requests go out without blocking, an
//! unfinished head is looked at again on a tick, and a connection that was refused with an unread body lingers for a
//! second so that the answer is not destroyed by a reset.

use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polling::{Events, PollMode, Poller};

use super::connection::Connection;
use super::{Job, Settings, Shared};
use crate::env;
use crate::http::answer::Refusal;
use crate::http::head::{Framing, Head, Verdict, judge};

/// The largest request head, in bytes.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// How much is peeked at first: a head of Claude Code has about 1.5 KiB, its body need not be copied.
pub(super) const FIRST_LOOK: usize = 4 * 1024;
/// Requests up to this size, head and body, are waited for in the kernel's buffer; larger ones are read by a thread.
const WAITED_FOR: u64 = 16 * 1024;
/// How soon a request that is still unfinished may be looked at again. Each look reads its head from the front, so the
/// pause doubles with every look that found it unfinished: a head that comes byte by byte must not keep us busy.
const LOOK_PAUSE: Duration = Duration::from_millis(2);
/// The pause is not doubled more often than this: half a second.
const DOUBLED_MAX: u32 = 8;
/// How often unfinished requests are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How often the service above gets its turn.
const SERVICE_TICK: Duration = Duration::from_secs(1);
/// How long a connection stays open after its last answer although the process is about to end: closed at once, it would
/// meet the next request of a client that goes on, which nobody has told.
const LAST_MOMENT: Duration = Duration::from_millis(100);
/// How long a refused client is listened to after the answer.
const LINGER: Duration = Duration::from_secs(1);
/// How many may linger at once; beyond that they are closed at once.
const LINGERING_MAX: usize = 256;
/// How often one of them is read from in a row: a client that sends faster than we read must not hold the watcher up.
const READS_IN_A_ROW: usize = 16;

/// The parked connections. Anybody parks, only the watcher's thread takes.
pub(super) struct Watcher {
    poller: Arc<Poller>,
    parked: Mutex<HashMap<usize, Parked>>,
    lingering: Mutex<Vec<Lingering>>,
    tick: Duration,
}

struct Parked {
    connection: Connection,
    since: Instant,
    until: Instant,
}

struct Lingering {
    connection: Connection,
    until: Instant,
}

impl Watcher {
    pub(super) fn new(settings: &Settings) -> io::Result<Self> {
        let shortest = settings.queue_timeout.min(settings.head).min(settings.keep_alive);
        let tick = (shortest / 4).clamp(Duration::from_millis(20), Duration::from_secs(1));
        Ok(Self {
            poller: Arc::new(Poller::new()?),
            parked: Mutex::default(),
            lingering: Mutex::default(),
            tick,
        })
    }

    pub(super) fn poller(&self) -> &Arc<Poller> {
        &self.poller
    }

    /// Takes a connection in; it ends unless it brings bytes until then.
    pub(super) fn park(&self, connection: Connection, until: Instant) {
        // Dropped in reverse order: with the handle still open, the accept thread must not take it for a new connection.
        let _place = connection.place();
        let (key, socket) = (connection.key(), Arc::clone(connection.socket()));
        // First where the watcher will look for it, then the one event that sends it looking.
        self.parked.lock().insert(key, Parked { connection, since: env::now(), until });
        if self.poller.modify(&*socket, polling::Event::readable(key)).is_err() {
            // Only when it was closed between these two lines, for being idle or to make room.
            self.take(key);
        }
    }

    /// Listens to a refused client a little longer.
    pub(super) fn linger(&self, connection: Connection) {
        connection.end_sending();
        let mut lingering = self.lingering.lock();
        if lingering.len() < LINGERING_MAX {
            lingering.push(Lingering { connection, until: env::now() + LINGER });
        }
    }

    /// Closes the connection that is missed least: one that has its answer and merely lingers, else the one that has
    /// been idle for longest. False when there is none.
    pub(super) fn make_room(&self) -> bool {
        let lingering = {
            let mut lingering = self.lingering.lock();
            if lingering.is_empty() { None } else { Some(lingering.remove(0)) }
        };
        if lingering.is_some() {
            return true;
        }
        let mut parked = self.parked.lock();
        let mut longest: Option<(Instant, usize)> = None;
        for (&key, idle) in parked.iter() {
            // One whose request has just arrived is idle no more.
            if longest.is_none_or(|(since, _)| idle.since < since) && idle.connection.available() == 0 {
                longest = Some((idle.since, key));
            }
        }
        let evicted = longest.and_then(|(_, key)| parked.remove(&key));
        drop(parked);
        evicted.is_some()
    }

    /// Ends the current wait.
    pub(super) fn wake(&self) {
        let _ = self.poller.notify();
    }

    fn take(&self, key: usize) -> Option<Parked> {
        self.parked.lock().remove(&key)
    }

    fn take_expired(&self, now: Instant, is_draining: bool) -> Vec<Parked> {
        let mut parked = self.parked.lock();
        let is_over = |idle: &Parked| has_idled_enough(idle.since, idle.until, now, is_draining);
        let expired: Vec<usize> = parked.iter().filter(|(_, p)| is_over(p)).map(|(&key, _)| key).collect();
        expired.iter().filter_map(|key| parked.remove(key)).collect()
    }
}

/// A request of which not enough has arrived. Watched edge-triggered: each new piece is one event.
struct Unfinished {
    connection: Connection,
    /// When its head must be whole.
    head_until: Instant,
    /// When what is missing must be there: the rest of the head, or of the body.
    until: Instant,
    /// Bytes there when it was last looked at.
    available: u64,
    look_again: Instant,
    /// How often it was found unfinished.
    looks: u32,
}

impl Unfinished {
    fn new(connection: Connection, until: Instant, available: u64, looks: u32, now: Instant) -> Self {
        let look_again = now + LOOK_PAUSE * (1 << looks.min(DOUBLED_MAX));
        Self { connection, head_until: until, until, available, look_again, looks: looks + 1 }
    }

    /// Worth waiting for when the process is about to end: a body that is coming, or a head that has just begun.
    fn is_arriving(&self, now: Instant, shared: &Shared) -> bool {
        let is_body = self.until != self.head_until;
        is_body || self.head_until.saturating_duration_since(now) + HEAD_GRACE > shared.settings.head
    }
}

/// How long the end of the process waits for the rest of a head.
const HEAD_GRACE: Duration = Duration::from_secs(1);

/// The watcher's thread.
pub(super) fn run(shared: &Arc<Shared>) {
    let watcher = &shared.watcher;
    let mut events = Events::new();
    let mut watch = Watch { shared, scratch: vec![0; HEAD_BYTES_MAX + 1], unfinished: HashMap::new() };
    let mut next_sweep = env::now();
    let mut next_tick = next_sweep;
    loop {
        let is_draining = shared.is_draining();
        let is_hurried = is_draining || !watch.unfinished.is_empty() || !watcher.lingering.lock().is_empty();
        let wait = if is_hurried { LOOK_AGAIN.min(watcher.tick) } else { watcher.tick };
        events.clear();
        if let Err(error) = watcher.poller.wait(&mut events, Some(wait)) {
            log::error!("waiting for connections failed: {error}");
            env::sleep(LOOK_AGAIN);
        }
        let now = env::now();
        for event in events.iter() {
            watch.guarded(|watch| watch.on_event(event.key, now));
        }
        if now >= next_tick {
            next_tick = now + SERVICE_TICK;
            watch.guarded(|watch| watch.shared.service.tick(now));
        }
        if now >= next_sweep || is_draining {
            next_sweep = now + wait.min(LOOK_AGAIN);
            // Asked first: what was accepted before that is swept now.
            let has_all = is_draining && shared.has_stopped_accepting.load(Ordering::SeqCst);
            watch.guarded(|watch| watch.sweep(now));
            let is_quiet = has_all && watcher.parked.lock().is_empty();
            if is_quiet && !watch.unfinished.values().any(|u| u.is_arriving(now, shared)) {
                shared.quiet_sweeps.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

struct Watch<'a> {
    shared: &'a Arc<Shared>,
    scratch: Vec<u8>,
    unfinished: HashMap<usize, Unfinished>,
}

impl Watch<'_> {
    /// One connection's trouble is not the others'.
    fn guarded(&mut self, work: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| work(self))).is_err() {
            log::error!("a connection was lost to a fault in the watcher");
        }
    }

    fn on_event(&mut self, key: usize, now: Instant) {
        if let Some(parked) = self.shared.watcher.take(key) {
            let until = now + self.shared.settings.head;
            return self.look(parked.connection, Some(parked.until), until, 0, now);
        }
        self.look_again(key, now);
    }

    /// Looks at an unfinished request if there is anything new about it.
    fn look_again(&mut self, key: usize, now: Instant) {
        // A client that sends byte by byte is looked at on a sweep, not for every byte.
        let has_news = |u: &Unfinished| {
            now >= u.until
                || now >= u.look_again && (u.connection.available() != u.available || u.connection.is_gone())
        };
        if self.unfinished.get(&key).is_some_and(has_news)
            && let Some(unfinished) = self.unfinished.remove(&key)
        {
            self.look(unfinished.connection, None, unfinished.head_until, unfinished.looks, now);
        }
    }

    /// What is due by time: unfinished requests, idle connections, queued requests, lingering ones.
    fn sweep(&mut self, now: Instant) {
        let watcher = &self.shared.watcher;
        for key in self.unfinished.keys().copied().collect::<Vec<_>>() {
            self.look_again(key, now);
        }
        for Parked { connection, until, .. } in watcher.take_expired(now, self.shared.is_draining()) {
            // A request that came at the last moment is served: its event would find nobody any more.
            match connection.available() {
                0 => connection.close(),
                _ => self.look(connection, Some(until), now + self.shared.settings.head, 0, now),
            }
        }
        for job in self.shared.pools.overdue(now) {
            self.shared.turn_away(job, Refusal::overloaded("no worker became free in time"));
        }
        self.drain_lingering(now);
    }

    /// Looks at a connection that has bytes to read, or whose time is up. `idle_until` is when an idle connection
    /// would have ended; `until` when an unfinished request does, which was looked at `looks` times before.
    fn look(
        &mut self,
        connection: Connection,
        idle_until: Option<Instant>,
        until: Instant,
        looks: u32,
        now: Instant,
    ) {
        let mut room = FIRST_LOOK;
        let mut length = match connection.peek(&mut self.scratch[..room]) {
            Ok(0) => return connection.close(),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Nothing there after all: back to waiting.
                return self.shared.watcher.park(connection, idle_until.unwrap_or(until));
            }
            Err(_) => return connection.close(),
        };
        let mut verdict = judge(&self.scratch[..length], HEAD_BYTES_MAX);
        if matches!(verdict, Verdict::Incomplete) && length == room {
            room = self.scratch.len();
            length = connection.peek(&mut self.scratch).unwrap_or(0);
            verdict = judge(&self.scratch[..length], HEAD_BYTES_MAX);
        }
        match verdict {
            Verdict::Refuse(refusal) => self.shared.refuse(connection, refusal, None),
            Verdict::Complete(head) => {
                let available = if length < room { length as u64 } else { connection.available() };
                self.dispatch(connection, head, available, until, looks, now);
            }
            Verdict::Incomplete if now >= until => {
                let refusal = Refusal::new(408, "the request head did not come in time");
                self.shared.refuse(connection, refusal, None);
            }
            Verdict::Incomplete if connection.is_gone() => connection.close(),
            Verdict::Incomplete => {
                let wait = Unfinished::new(connection, until, length as u64, looks, now);
                self.wait_for_more(wait);
            }
        }
    }

    /// Sends a request whose head is whole on its way.
    fn dispatch(
        &mut self,
        connection: Connection,
        head: Box<Head>,
        available: u64,
        until: Instant,
        looks: u32,
        now: Instant,
    ) {
        let route = match self.shared.service.route(&head) {
            Ok(route) => route,
            Err(refusal) => return self.shared.refuse(connection, refusal, Some(&head)),
        };
        let whole = whole_length(&head);
        let has_arrived = whole.is_some_and(|bytes| bytes <= available);
        if whole.is_some_and(|bytes| bytes <= WAITED_FOR) && !has_arrived {
            let wait = Unfinished::new(connection, until, available, looks, now);
            return self.wait_for_small_body(wait, &head, now);
        }
        let has_more = whole.is_some_and(|bytes| bytes < available);
        let job = Job { connection, head, route, received_at: now, has_more, read: None };
        let taken = if has_arrived { self.shared.enqueue(job) } else { self.shared.enqueue_unread(job) };
        if let Err(job) = taken {
            let refusal = Refusal::overloaded("every worker is busy and the queue is full");
            self.shared.turn_away(*job, refusal);
        }
    }

    /// A small body is waited for here, in the kernel's buffer: no thread is needed for it.
    fn wait_for_small_body(&mut self, mut wait: Unfinished, head: &Head, now: Instant) {
        if wait.connection.is_gone() {
            let have = wait.available.saturating_sub(head.len() as u64);
            let refusal = Refusal::new(400, format!("the request body ended after {have} bytes"));
            return self.shared.refuse(wait.connection, refusal, Some(head));
        }
        // Both deadlines began with the first byte.
        let settings = &self.shared.settings;
        wait.until = wait.head_until - settings.head + settings.body;
        if now >= wait.until {
            let refusal = Refusal::new(408, "the request body did not come in time");
            return self.shared.refuse(wait.connection, refusal, Some(head));
        }
        self.wait_for_more(wait);
    }

    fn wait_for_more(&mut self, unfinished: Unfinished) {
        let connection = &unfinished.connection;
        let (key, poller) = (connection.key(), &self.shared.watcher.poller);
        let interest = polling::Event::readable(key);
        match poller.modify_with_mode(&**connection.socket(), interest, PollMode::Edge) {
            Ok(()) => drop(self.unfinished.insert(key, unfinished)),
            Err(_) => unfinished.connection.close(),
        }
    }

    fn drain_lingering(&mut self, now: Instant) {
        let waiting = std::mem::take(&mut *self.shared.watcher.lingering.lock());
        for lingering in waiting {
            let has_ended =
                (0..READS_IN_A_ROW).find_map(|_| match lingering.connection.discard(&mut self.scratch) {
                    Ok(0) => Some(true),
                    Ok(_) => None,
                    Err(error) => Some(error.kind() != io::ErrorKind::WouldBlock),
                });
            if !has_ended.unwrap_or(false) && now < lingering.until {
                self.shared.watcher.lingering.lock().push(lingering);
            }
        }
    }
}

/// True for a connection that ends, idle `since` then and allowed to be so `until` then.
fn has_idled_enough(since: Instant, until: Instant, now: Instant, is_draining: bool) -> bool {
    until <= now || is_draining && since + LAST_MOMENT <= now
}

/// The length of head and body together, if it is known.
pub(super) fn whole_length(head: &Head) -> Option<u64> {
    let body = match head.framing() {
        Framing::None => 0,
        Framing::Length(bytes) => bytes,
        Framing::Chunked => return None,
    };
    (!head.expects_continue() || body == 0).then(|| body.saturating_add(head.len() as u64))
}

impl Shared {
    /// Answers a request that goes to no lane. If all of it has arrived it is thrown away and the connection
    /// lives on; else the connection ends.
    pub(super) fn refuse(&self, connection: Connection, refusal: Refusal, head: Option<&Head>) {
        let answer = self.service.refuse(refusal, head, connection.peer());
        let rest = head
            .filter(|head| head.keep_alive() && !self.is_draining())
            .and_then(whole_length)
            .filter(|&bytes| bytes == connection.available());
        let head_only = head.is_some_and(|head| head.method() == "HEAD");
        let was_sent = connection.send_now(&answer.to_bytes(head_only, rest.is_none()));
        match rest {
            Some(bytes) if was_sent => {
                if !connection.discard_exactly(bytes) {
                    return connection.close();
                }
                self.watcher.park(connection, env::now() + self.settings.keep_alive);
            }
            _ if was_sent => self.watcher.linger(connection),
            _ => connection.close(),
        }
    }

    /// Answers a request that got no worker, whether its body was read or not.
    pub(super) fn turn_away(&self, job: Job, refusal: Refusal) {
        let Job { connection, head, read, .. } = job;
        let Some(read) = read else { return self.refuse(connection, refusal, Some(&head)) };
        let answer = self.service.refuse(refusal, Some(&head), connection.peer());
        let closes = read.closes || !head.keep_alive() || self.is_draining();
        let was_sent = connection.send_now(&answer.to_bytes(false, closes));
        match (was_sent, closes) {
            (true, false) => self.watcher.park(connection, env::now() + self.settings.keep_alive),
            (true, true) => self.end(connection),
            (false, _) => connection.close(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With six clients that asked again and again, one in three drains closed a connection on a request that was
    /// on its way.
    #[test]
    fn a_client_that_goes_on_while_draining_has_a_moment() {
        let since = env::now();
        let minute = Duration::from_secs(60);
        for (after, is_draining, ends) in [
            (Duration::ZERO, true, false),
            (LAST_MOMENT / 2, true, false),
            (LAST_MOMENT, true, true),
            (LAST_MOMENT, false, false),
            (minute, false, true),
        ] {
            let ended = has_idled_enough(since, since + minute, since + after, is_draining);
            assert_eq!(ended, ends, "{after:?} {is_draining}");
        }
        assert!(has_idled_enough(since, since, since, true), "its time is up");
    }
}
