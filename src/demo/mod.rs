//! `claude-lb demo`.

/// Shows the proxy with embedded workspaces.
pub fn run(_once: bool, _port: Option<u16>) -> Result<(), String> {
    Err("the demo is not here yet".into())
}
