//! The stack of a thread, given back where it is not needed for a while.
//!
//! A page of a stack that was touched once stays. Connecting to a workspace and asking it touches 50 KB, with TLS 64 KB;
//! then the worker copies an answer for minutes, which takes a fifth of that. With thousands of streams it was the
//! largest part of their memory. No library for this is known to us, so here is one call of `madvise`.

use std::cell::Cell;

/// What the calls below here may need themselves. Optimised, they are none: the system call is made in place.
const OWN_BYTES: usize = if cfg!(debug_assertions) { 8 * 1024 } else { 512 };

thread_local! {
    /// Where the stack of this thread began, and how far it may be given back.
    static STACK: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// Notes that this thread begins about here, with a stack of at least so many bytes.
pub fn begins(bytes: usize) {
    let top = address();
    // The lower half is left alone: nobody goes there, and what lies behind a stack is somebody else's.
    STACK.set(Some((top, top - bytes / 2)));
}

/// Gives back what lies below the caller. Only on a thread whose beginning was noted. Costs some microseconds, and as
/// much when the thread goes deep again: so it is for those who stay for a while.
#[inline(never)]
pub fn release() {
    let Some((top, floor)) = STACK.get() else { return };
    #[cfg(target_os = "linux")]
    {
        let page = rustix::param::page_size();
        let (from, to) = (floor.next_multiple_of(page), (address() - OWN_BYTES) / page * page);
        if from < to && to < top {
            // SAFETY: whole pages of the calling thread's own stack, below all frames that are alive: nobody has a
            // reference into them. They stay mapped, and hold zeros when they are used again.
            let _ =
                unsafe { rustix::mm::madvise(from as *mut _, to - from, rustix::mm::Advice::LinuxDontNeed) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (top, floor, OWN_BYTES);
}

/// Where the stack stands.
#[inline(never)]
fn address() -> usize {
    let here = 0u8;
    std::ptr::from_ref(std::hint::black_box(&here)).addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn deep() -> usize {
        std::hint::black_box([1u8; 100 * 1024]).iter().map(|&byte| usize::from(byte)).sum()
    }

    fn resident_kib(near: usize) -> u64 {
        let maps = std::fs::read_to_string("/proc/thread-self/smaps").unwrap_or_default();
        let mut is_ours = false;
        for line in maps.lines() {
            if let Some((from, to)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
                let bound = |text| usize::from_str_radix(text, 16).unwrap_or_default();
                is_ours = (bound(from)..bound(to)).contains(&near);
            } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| is_ours) {
                return kib.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        0
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_was_used_is_given_back_and_can_be_used_again() {
        const BYTES: usize = 512 * 1024;
        let run = || {
            let alive = std::hint::black_box([7u8; 3000]);
            release();
            assert_eq!(deep(), 100 * 1024);
            let used = resident_kib(address());
            release();
            assert_eq!(resident_kib(address()), used, "nobody has said where this stack begins");
            begins(BYTES);
            release();
            let left = resident_kib(address());
            assert!(left + 90 < used, "{used} KiB, then {left}");
            assert_eq!(deep(), 100 * 1024);
            assert!(alive.iter().all(|&byte| byte == 7));
        };
        std::thread::Builder::new().stack_size(BYTES).spawn(run).unwrap().join().unwrap();
    }
}
