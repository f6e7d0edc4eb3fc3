//! The event stream of an answer: where events end, what they are, and what they report.
//!
//! These rooms watch the bytes of a stream that are relayed anyway. They must never disturb it: any split, any line
//! end, unknown events and broken JSON are all taken in stride. Called by `relay`; [`usage_of_message`] also by the
//! path that is not streamed.

mod framing;
mod report;
mod scanner;

pub use framing::{Event, Kind, split_event};
pub use report::{Usage, error_of, usage_of_message};
pub use scanner::{End, Scanner};
