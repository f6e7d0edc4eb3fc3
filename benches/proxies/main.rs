//! claude-lb beside nginx, HAProxy and LiteLLM, over loopback: `cargo bench --bench proxies`.
//!
//! Fake workspaces (`workspaces`) and clients (`load`) run in this process, one thread each; a proxy (`proxy`) runs
//! between them, and the kernel says what it cost (`meter`). `scenario` says what is measured, `report` shows it.
//! `costs` counts instead of timing: instructions, allocations and system calls, which are kept from rising.
//! Rounds are interleaved, so that a noisy minute hits all proxies. Linux only: epoll and /proc. It is no test:
//! nothing here fails because something was slow.

// A benchmark is about time; the rule that decisions take `now` as an argument is for the proxy.
#![allow(clippy::disallowed_methods)]

#[cfg(target_os = "linux")]
mod callgrind;
#[cfg(target_os = "linux")]
mod costs;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod meter;
#[cfg(target_os = "linux")]
mod proxy;
#[cfg(target_os = "linux")]
mod report;
#[cfg(target_os = "linux")]
mod run;
#[cfg(target_os = "linux")]
mod scenario;
#[cfg(target_os = "linux")]
mod strace;
#[cfg(target_os = "linux")]
mod wire;
#[cfg(target_os = "linux")]
mod workspaces;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    match run::run() {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::FAILURE,
        Err(why) => {
            eprintln!("proxies: {why}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("proxies: this benchmark reads /proc and needs Linux");
}
