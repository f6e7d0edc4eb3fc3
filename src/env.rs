//! The one place with a clock, a seed and a pause.
//!
//! Everything that decides takes `now` and a generator as arguments; the code that does I/O gets them here. The
//! lint list in `clippy.toml` keeps it so.

#![allow(clippy::disallowed_methods)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic time, for every decision.
pub fn now() -> Instant {
    Instant::now()
}

/// Seconds and nanoseconds since 1970, for display only.
pub fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Waits. Only for the pause before the sole endpoint is asked again, for accepting after a shortage, and for the
/// pace of the demo's workspaces.
pub fn sleep(pause: Duration) {
    std::thread::sleep(pause);
}

/// A generator with a fresh seed.
pub fn rng() -> fastrand::Rng {
    fastrand::Rng::new()
}

/// An id for a request that no workspace has named: unique, and recognisable as ours.
pub fn request_id() -> String {
    const DIGITS: usize = 24;
    let bits = fastrand::u128(..);
    let digits = (0..DIGITS).map(|at| b"0123456789abcdef"[(bits >> (4 * at)) as usize % 16]);
    let mut id = String::with_capacity("req_clb_".len() + DIGITS);
    id.push_str("req_clb_");
    id.extend(digits.map(char::from));
    id
}

/// Gives large buffers back to the system as soon as they are free. Without this glibc raises its own threshold after
/// the first 4 MB body, keeps such blocks in every thread's arena, and a hundred uploads leave 100 MB behind. Each
/// arena also reserves 64 MB of addresses, which count under `ulimit -v`: two a core are enough, not eight.
pub fn return_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const BYTES: libc::c_int = 256 * 1024;
        let cores =
            std::thread::available_parallelism().map_or(1, |cores| cores.get().min(1024)) as libc::c_int;
        // SAFETY: mallopt only sets numbers of the allocator; it is called before any thread is started.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, BYTES);
            libc::mallopt(libc::M_TRIM_THRESHOLD, BYTES);
            libc::mallopt(libc::M_ARENA_MAX, (2 * cores).max(4));
        }
    }
}
