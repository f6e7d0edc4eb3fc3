//! Sets up the log: text or JSON lines on stderr, one line an entry whatever is in it.
//!
//! Fields (`log`'s key-values) come behind the message, so that the access line reads the same in both forms. Control
//! characters are escaped: what a client sends cannot forge a line. Other crates' entries are left out, for ureq's
//! contain whole requests.

use std::fmt::Write as _;
use std::io::{LineWriter, Stderr, Write as _};

use log::kv::{Error, Key, Value, VisitSource};
use log::{Log, Metadata, Record};
use simplelog::{ConfigBuilder, LevelFilter, WriteLogger, format_description};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;

use crate::config::{LogFormat, Logging};
use crate::env;

/// RFC 3339 in UTC, always of the same width.
const TIME: &[BorrowedFormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// The target that marks access lines.
pub const ACCESS: &str = "access";

/// Longer lines than this go out in more than one piece.
const LINE_BYTES: usize = 8 * 1024;

/// Starts logging. Called once, before any thread is started.
pub fn init(logging: &Logging) {
    let config = ConfigBuilder::new()
        .set_time_format_custom(TIME)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build();
    // simplelog writes a line in twenty pieces, each of them a system call, and somebody else's may come between them.
    let err = LineWriter::with_capacity(LINE_BYTES, std::io::stderr());
    let text = WriteLogger::new(logging.level, config, err);
    let logger = Lines { text, level: logging.level, format: logging.format };
    // Only fails when a logger is set already, as in tests; that one serves then.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(logging.level);
    }
}

struct Lines {
    text: Box<WriteLogger<LineWriter<Stderr>>>,
    level: LevelFilter,
    format: LogFormat,
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        metadata.level() <= self.level && (target == ACCESS || target.starts_with("claude_lb"))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        match self.format {
            LogFormat::Text => {
                let line = text_line(record);
                self.text.log(
                    &Record::builder()
                        .level(record.level())
                        .target(record.target())
                        .args(format_args!("{line}"))
                        .build(),
                );
            }
            LogFormat::Json => {
                let mut line = json_line(record, env::wall_clock());
                line.push('\n');
                // A full disk or a closed pipe must not stop the proxy.
                let _ = std::io::stderr().lock().write_all(line.as_bytes());
            }
        }
    }

    fn flush(&self) {}
}

/// A moment as log lines write it.
pub fn timestamp(wall_clock: std::time::Duration) -> String {
    (OffsetDateTime::UNIX_EPOCH + wall_clock).format(TIME).unwrap_or_default()
}

fn text_line(record: &Record<'_>) -> String {
    struct Fields(String);
    impl<'kvs> VisitSource<'kvs> for Fields {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
            let value = value.to_string();
            let is_plain =
                !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic() && !b"\"\\".contains(&b));
            let _ = match is_plain {
                true => write!(self.0, " {key}={value}"),
                false => write!(self.0, " {key}={value:?}"),
            };
            Ok(())
        }
    }
    let mut fields = Fields(escaped(&record.args().to_string()));
    let _ = record.key_values().visit(&mut fields);
    fields.0
}

fn escaped(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_string();
    }
    text.chars().fold(String::with_capacity(text.len() + 8), |mut out, c| {
        if c.is_control() {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    })
}

fn json_line(record: &Record<'_>, wall_clock: std::time::Duration) -> String {
    struct Fields(serde_json::Map<String, serde_json::Value>);
    impl<'kvs> VisitSource<'kvs> for Fields {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
            let json = if let Some(number) = value.to_u64() {
                number.into()
            } else if let Some(number) = value.to_f64() {
                number.into()
            } else if let Some(truth) = value.to_bool() {
                truth.into()
            } else {
                value.to_string().into()
            };
            self.0.insert(key.to_string(), json);
            Ok(())
        }
    }
    let mut fields = Fields(serde_json::Map::new());
    fields.0.insert("time".into(), timestamp(wall_clock).into());
    fields.0.insert("level".into(), record.level().as_str().into());
    fields.0.insert("message".into(), record.args().to_string().into());
    let _ = record.key_values().visit(&mut fields);
    serde_json::Value::Object(fields.0).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record<R>(message: &str, kvs: &[(&str, &str)], check: impl Fn(&Record<'_>) -> R) -> R {
        check(
            &Record::builder()
                .args(format_args!("{message}"))
                .level(log::Level::Info)
                .key_values(&kvs)
                .build(),
        )
    }

    #[test]
    fn nothing_a_client_sends_can_forge_a_line() {
        let kvs = [("path", "/x\r\nINFO forged"), ("key", ""), ("id", "req_1"), ("quote", "a\"b")];
        let line = record("two\nlines \u{1b}[31m", &kvs, text_line);
        assert_eq!(
            line,
            "two\\nlines \\u{1b}[31m path=\"/x\\r\\nINFO forged\" key=\"\" id=req_1 quote=\"a\\\"b\""
        );
    }

    #[test]
    fn json_lines_hold_the_same_fields() {
        let line =
            record("request\n", &[("id", "r\"1")], |r| json_line(r, std::time::Duration::from_secs(0)));
        assert_eq!(
            line,
            r#"{"id":"r\"1","level":"INFO","message":"request\n","time":"1970-01-01T00:00:00.000Z"}"#
        );
    }
}
