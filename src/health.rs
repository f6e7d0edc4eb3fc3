//! `claude-lb health`: asks a running proxy whether it lives, for HEALTHCHECK in an image without a shell.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use crate::config::Config;

/// A healthy proxy answers within milliseconds, however busy it is.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Where a proxy with this configuration is asked from the same machine.
pub fn url_of(config: &Config) -> String {
    let host = match config.server.host.as_str() {
        "0.0.0.0" => "127.0.0.1",
        "::" | "[::]" => "[::1]",
        host => host,
    };
    let is_bare_v6 = host.contains(':') && !host.starts_with('[');
    let host = if is_bare_v6 { format!("[{host}]") } else { host.to_string() };
    format!("http://{host}:{}", config.server.port)
}

/// Asks `GET /health` there. The error says what is wrong.
pub fn ask(url: &str) -> Result<(), String> {
    let place = url.strip_prefix("http://").unwrap_or(url);
    let place = place.split('/').next().unwrap_or(place);
    let place = if place.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        place.to_string()
    } else {
        format!("{place}:80")
    };
    let failed =
        |error: std::io::Error| format!("{url} does not answer: {error} (is claude-lb running there?)");
    let address = place.to_socket_addrs().map_err(failed)?.next();
    let address = address.ok_or_else(|| format!("{place} has no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).map_err(failed)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(failed)?;
    let request = format!("GET /health HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer).map_err(failed)?;
    let text = String::from_utf8_lossy(&answer);
    let line = text.lines().next().unwrap_or("nothing");
    if line.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(format!("{url} is not healthy: {line}")) }
}
