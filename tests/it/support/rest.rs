//! What the kernel says about the program when nothing runs, to be compared after a storm.

use std::fs;

use super::eventually;
use super::proxy::Proxy;

/// Workers and small pools start when they are first needed and stay; elastic readers end after 10 s.
const POOL_THREADS: u64 = 16 + 4;
/// Connections to workspaces are kept for the next request.
const POOLED: u64 = 16;
/// Memory may grow by what pools, buffers and allocator keep.
const GROWTH_BYTES: u64 = 24 << 20;

/// The program at rest.
#[derive(Clone, Copy, Debug)]
pub struct AtRest {
    threads: u64,
    descriptors: u64,
    resident_bytes: u64,
}

impl AtRest {
    pub fn of(proxy: &Proxy) -> Self {
        proxy.wait_idle();
        Self::look(proxy)
    }

    fn look(proxy: &Proxy) -> Self {
        let id = proxy.running.id();
        let count = |folder: &str| {
            fs::read_dir(format!("/proc/{id}/{folder}")).map_or(0, |entries| entries.count() as u64)
        };
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap_or_default();
        Self { threads: count("task"), descriptors: count("fd"), resident_bytes: kib * 1024 }
    }

    /// Threads beyond the resting number.
    pub fn threads_above(&self, proxy: &Proxy) -> u64 {
        Self::look(proxy).threads.saturating_sub(self.threads)
    }

    /// Memory beyond what was resident.
    pub fn grown_bytes(&self, proxy: &Proxy) -> u64 {
        Self::look(proxy).resident_bytes.saturating_sub(self.resident_bytes)
    }

    /// Waits until threads, descriptors, connections and memory are back.
    pub fn expect(&self, proxy: &Proxy) {
        proxy.wait_idle();
        let mut seen = Seen { before: *self, last: *self };
        eventually("threads, descriptors, connections and memory to be back", || {
            let last = Self::look(proxy);
            seen.last = last;
            let is_back = proxy.stats()["process"]["connections"] == 1
                && last.threads <= self.threads + POOL_THREADS
                && last.descriptors <= self.descriptors + POOLED
                && last.resident_bytes <= self.resident_bytes + GROWTH_BYTES;
            is_back.then_some(())
        });
    }
}

/// Tells what was seen when the wait fails.
struct Seen {
    before: AtRest,
    last: AtRest,
}

impl Drop for Seen {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "before: {:?}
now: {:?}",
                self.before, self.last
            );
        }
    }
}
