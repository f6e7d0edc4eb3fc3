//! The words of HTTP/1.1 that we judge or write ourselves. Pure: bytes in, values out.

pub mod answer;
pub mod chunked;
pub mod forward;
pub mod head;
