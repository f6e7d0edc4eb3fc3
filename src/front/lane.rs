//! A lane: a bounded queue and the fixed pool of threads that serves it.
//!
//! The queue is a crossbeam channel that is only ever tried: its blocking receive yields the processor several times
//! before it sleeps, which cost a fifth of all system time here. Idle threads park themselves, and the one that
//! parked last is woken first, since its stack is still in the cache.
//!
//! Threads start when they are first needed. A job is counted from the moment it is sent until it is done, and a
//! thread is started whenever there are more jobs than threads: that count is exact, so no job ever waits beside a
//! thread that only seemed idle (the fault in tiny_http's own task pool).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

use super::{Job, Pool, Settings};
use crate::{env, stack};

/// Threads for everything that is answered at once, and for counting tokens.
const SMALL_POOL: usize = 2;
/// Requests that may wait for a small pool.
const SMALL_QUEUE: usize = 256;
/// Bodies with a checked key that may arrive slowly at once.
const READERS: usize = 64;
/// The same without a key: anybody can send those.
const READERS_WITHOUT_KEY: usize = 16;
/// How long an elastic thread waits for more before it ends.
const ELASTIC_IDLE: Duration = Duration::from_secs(10);
/// Workers use little stack: bodies are scanned, not parsed into trees.
const STACK_BYTES: usize = 512 * 1024;

/// All lanes.
pub(super) struct Pools {
    messages: Lane<Job>,
    count: Lane<Job>,
    quick: Lane<Job>,
    readers: Lane<Job>,
    readers_without_key: Lane<Job>,
    queue_timeout: Duration,
}

impl Pools {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            messages: Lane::new("worker", settings.workers, settings.queue, None),
            count: Lane::new("count", SMALL_POOL, SMALL_QUEUE, None),
            quick: Lane::new("quick", SMALL_POOL, SMALL_QUEUE, None),
            readers: Lane::new("reader", READERS, READERS, Some(ELASTIC_IDLE)),
            readers_without_key: Lane::new(
                "reader-open",
                READERS_WITHOUT_KEY,
                READERS_WITHOUT_KEY,
                Some(ELASTIC_IDLE),
            ),
            queue_timeout: settings.queue_timeout,
        }
    }

    pub(super) fn of(&self, pool: Pool) -> &Lane<Job> {
        match pool {
            Pool::Messages => &self.messages,
            Pool::Count => &self.count,
            Pool::Quick => &self.quick,
        }
    }

    pub(super) fn readers_for(&self, pool: Pool) -> &Lane<Job> {
        match pool {
            Pool::Messages => &self.readers,
            Pool::Count | Pool::Quick => &self.readers_without_key,
        }
    }

    fn all(&self) -> [&Lane<Job>; 5] {
        [&self.messages, &self.count, &self.quick, &self.readers, &self.readers_without_key]
    }

    /// Jobs that are queued or running.
    pub(super) fn busy(&self) -> usize {
        self.all().iter().map(|lane| lane.jobs()).sum()
    }

    /// Requests that have waited for a worker, or for somebody to read their body, for too long.
    pub(super) fn overdue(&self, now: Instant) -> Vec<Job> {
        self.all().iter().flat_map(|lane| lane.overdue(self.queue_timeout, now)).collect()
    }
}

struct Queued<J> {
    job: J,
    since: Instant,
}

/// One queue and its threads.
pub(super) struct Lane<J> {
    name: &'static str,
    sender: Sender<Queued<J>>,
    receiver: Receiver<Queued<J>>,
    threads_max: usize,
    elastic: Option<Duration>,
    counts: Arc<Counts>,
    /// The last thread could not be started.
    is_short: AtomicBool,
    /// No job in the queue is older than its timeout before this moment.
    look_again: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Counts {
    jobs: AtomicUsize,
    threads: AtomicUsize,
    /// Threads that have found the queue empty.
    idle: Mutex<Vec<Thread>>,
}

impl Counts {
    /// Wakes the thread that went to sleep last.
    fn wake_one(&self) {
        let thread = self.idle.lock().pop();
        if let Some(thread) = thread {
            thread.unpark();
        }
    }

    /// Takes this thread off the list. False when it was taken off already, to be woken for a job.
    fn is_still_idle(&self) -> bool {
        let this = std::thread::current().id();
        let mut idle = self.idle.lock();
        let at = idle.iter().position(|thread| thread.id() == this);
        at.map(|at| idle.remove(at)).is_some()
    }
}

impl<J: Send + 'static> Lane<J> {
    fn new(name: &'static str, threads_max: usize, queue: usize, elastic: Option<Duration>) -> Self {
        // The queue holds jobs that no thread has taken yet; those for threads that are about to start count, too.
        let (sender, receiver) = bounded(queue + threads_max);
        let (counts, is_short, look_again) = (Arc::default(), AtomicBool::new(false), Mutex::new(None));
        Self { name, sender, receiver, threads_max, elastic, counts, is_short, look_again }
    }

    pub(super) fn jobs(&self) -> usize {
        self.counts.jobs.load(Ordering::SeqCst)
    }

    /// At most half of the threads that there may be have something to do, and no job waits because they could not all
    /// be had.
    pub(super) fn is_mostly_idle(&self) -> bool {
        let jobs = self.jobs();
        jobs * 2 <= self.threads_max && jobs <= self.counts.threads.load(Ordering::SeqCst)
    }

    /// Hands a job over, or back when as many wait as may.
    pub(super) fn send(&self, job: J, run: impl Fn(J) + Send + Clone + 'static) -> Result<(), J> {
        let queue = self.sender.capacity().unwrap_or(usize::MAX) - self.threads_max;
        let jobs = self.counts.jobs.fetch_add(1, Ordering::SeqCst) + 1;
        if jobs > self.threads_max + queue {
            self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
            return Err(job);
        }
        if let Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) =
            self.sender.try_send(Queued { job, since: env::now() })
        {
            self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
            return Err(back.job);
        }
        let threads = self.counts.threads.load(Ordering::SeqCst);
        let may_start = jobs > threads && threads < self.threads_max;
        if may_start && self.start_thread(run) {
            return Ok(());
        }
        if may_start && threads == 0 {
            // Nobody would ever look into the queue: one job goes back, this one or its neighbour.
            if let Ok(back) = self.receiver.try_recv() {
                self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
                return Err(back.job);
            }
        }
        self.counts.wake_one();
        Ok(())
    }

    /// False when there are as many as may be, or no thread is to be had.
    fn start_thread(&self, run: impl Fn(J) + Send + 'static) -> bool {
        let (counts, receiver, elastic) = (Arc::clone(&self.counts), self.receiver.clone(), self.elastic);
        if counts.threads.fetch_add(1, Ordering::SeqCst) >= self.threads_max {
            counts.threads.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        let work = move || {
            stack::begins(STACK_BYTES);
            serve(&receiver, &counts, elastic, run)
        };
        let spawned = std::thread::Builder::new().name(self.name.into()).stack_size(STACK_BYTES).spawn(work);
        let was_short = self.is_short.swap(spawned.is_err(), Ordering::SeqCst);
        match spawned {
            Ok(_) if was_short => log::info!("the {} pool gets threads again", self.name),
            Ok(_) => {}
            Err(error) => {
                self.counts.threads.fetch_sub(1, Ordering::SeqCst);
                // Once, not for every request.
                if !was_short {
                    log::error!("no thread for the {} pool: {error} (raise the limit on tasks)", self.name);
                }
                return false;
            }
        }
        true
    }

    /// Takes the jobs that have waited longer than `timeout` out of the queue. The channel can only be looked into by
    /// taking, so the others go back to its end, in order; that happens once per `timeout` at most.
    fn overdue(&self, timeout: Duration, now: Instant) -> Vec<J> {
        let mut look_again = self.look_again.lock();
        if self.receiver.is_empty() {
            *look_again = None;
            return Vec::new();
        }
        if now < *look_again.get_or_insert(now + timeout) {
            return Vec::new();
        }
        let mut late = Vec::new();
        let mut oldest = now;
        for _ in 0..self.receiver.len() {
            let Ok(queued) = self.receiver.try_recv() else { break };
            if queued.since + timeout <= now {
                self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
                late.push(queued.job);
                continue;
            }
            oldest = oldest.min(queued.since);
            if let Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) =
                self.sender.try_send(queued)
            {
                self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
                late.push(back.job);
            }
            // A thread may have found the queue empty while we held its job.
            self.counts.wake_one();
        }
        *look_again = Some(oldest + timeout);
        late
    }
}

/// A thread's life.
fn serve<J>(receiver: &Receiver<Queued<J>>, counts: &Counts, elastic: Option<Duration>, run: impl Fn(J)) {
    /// Counts a job as done even if it panics through.
    struct Done<'a>(&'a Counts);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.jobs.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let work = |queued: Queued<J>| {
        let _done = Done(counts);
        // Requests are guarded one level up; this keeps the thread, whatever else goes wrong.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(queued.job)));
    };
    loop {
        while let Ok(queued) = receiver.try_recv() {
            work(queued);
        }
        counts.idle.lock().push(std::thread::current());
        // A job sent before the line above woke nobody: look once more before sleeping.
        if let Ok(queued) = receiver.try_recv() {
            // Taken off the list by somebody else: that was for another job, which must not wait for this one.
            if !counts.is_still_idle() {
                counts.wake_one();
            }
            work(queued);
            continue;
        }
        match elastic {
            None => std::thread::park(),
            Some(idle) => std::thread::park_timeout(idle),
        }
        let is_bored = counts.is_still_idle();
        if elastic.is_some() && is_bored && receiver.is_empty() {
            counts.threads.fetch_sub(1, Ordering::SeqCst);
            // A job sent before the line above saw us as a thread and started none: it is ours.
            if receiver.is_empty() {
                return;
            }
            counts.threads.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// tiny_http's own pool left 60 of 64 connections unserved while their neighbours were busy.
    #[test]
    fn a_burst_gets_all_its_threads() {
        let lane: Lane<usize> = Lane::new("test", 64, 0, None);
        let (started, starts) = mpsc::channel();
        let (open, gate) = bounded::<()>(0);
        for job in 0..64 {
            let (started, gate) = (started.clone(), gate.clone());
            let run = move |job| {
                started.send(job).unwrap();
                let _ = gate.recv();
            };
            lane.send(job, run).unwrap();
        }
        let mut seen: Vec<usize> = (0..64).map(|_| starts.recv_timeout(DEADLINE).unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..64).collect::<Vec<_>>());
        assert_eq!(lane.send(64, |_| {}), Err(64), "no place is left");
        drop(open);
    }

    #[test]
    fn what_waits_too_long_is_handed_back_in_order() {
        let lane: Lane<u32> = Lane::new("test", 1, 3, None);
        let (started, starts) = mpsc::channel();
        let (open, gate) = bounded::<()>(0);
        let run = move |job| {
            started.send(job).unwrap();
            let _ = gate.recv();
        };
        lane.send(0, run.clone()).unwrap();
        assert_eq!(starts.recv_timeout(DEADLINE).unwrap(), 0);
        for job in 1..=3 {
            lane.send(job, run.clone()).unwrap();
        }
        assert_eq!(lane.send(4, run.clone()), Err(4));
        let (second, now) = (Duration::from_secs(1), env::now());
        assert!(lane.overdue(10 * second, now).is_empty());
        assert!(lane.overdue(10 * second, now + 5 * second).is_empty());
        assert_eq!(lane.overdue(10 * second, now + 11 * second), [1, 2, 3]);
        assert_eq!(lane.jobs(), 1);
        drop(open);
    }
}
